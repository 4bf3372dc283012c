"""The door to the agent: each way of failing is told apart, within its deadline."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from qmpvcpu import (
    AgentSilentError,
    GuestAgentError,
    GuestRefusedError,
    MonitorConnectError,
    Outcome,
    attach,
)
from qmpvcpu.agent.answers import Port
from qmpvcpu.agent.client import AgentClient
from qmpvcpu.agent.door import GuestAgent, QemuSays
from qmpvcpu.errors import AgentConnectError, AgentForbiddenError, AgentLostError, MalformedAnswerError
from qmpvcpu.testing import Mood, ScriptedAgent, ScriptedPeer
from qmpvcpu.testing.signals import send_signal
from tests.agent.conftest import Asking
from tests.waiting import until


@pytest.fixture
async def agent() -> AsyncIterator[ScriptedAgent]:
    async with ScriptedAgent((0, 1)) as scripted:
        yield scripted


@contextlib.asynccontextmanager
async def raw_server(answer: bytes, *, then: bytes = b"") -> AsyncIterator[str]:
    """Serve one who says *answer* to whatever comes first, *then* after that."""
    async with ScriptedAgent() as place:
        path = f"{place.path}.raw"

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await reader.read(1 << 16)
                writer.write(answer)
                await writer.drain()
                if then:
                    writer.write(then)
                    await writer.drain()
                    writer.close()
                else:
                    await reader.read()
            writer.close()

        server = await asyncio.start_unix_server(serve, path)
        try:
            yield path
        finally:
            server.close()


async def test_it_asks_and_is_answered(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path)
    assert [(cpu.number, cpu.online, cpu.can_offline) for cpu in await door.cpus()] == [
        (0, True, False),
        (1, True, True),
    ]
    assert await door.set_cpus({1: False}) == 1
    assert [cpu.online for cpu in await door.cpus()] == [True, False]
    assert (await door.os()).id == "debian"
    assert "guest-set-vcpus" in await door.commands()
    assert await door.read_file("/sys/devices/system/cpu/cpu1/firmware_node/path") == b"\\_SB_.CPUS.C001\n"
    assert await door.read_file("/proc/sys/kernel/random/boot_id", limit=4) == agent.boot_id[:4].encode()


async def test_it_connects_when_it_is_first_asked(asking: Asking, tmp_path: Path) -> None:
    door = asking(str(tmp_path / "ga"))
    async with ScriptedAgent(path=tmp_path / "ga"):
        assert len(await door.cpus()) == 1


async def test_questions_of_several_tasks_wait_for_each_other(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path)
    lists = await asyncio.gather(*(door.cpus() for _ in range(20)))
    assert len(set(lists)) == 1
    assert agent.received == ["guest-get-vcpus"] * 20


# Nobody there.


async def test_no_socket_says_how_to_give_one(asking: Asking, tmp_path: Path) -> None:
    with pytest.raises(AgentConnectError, match="no such path") as caught:
        await asking(str(tmp_path / "ga")).cpus()
    assert "org.qemu.guest_agent.0" in caught.value.hint
    assert "qmp" not in str(caught.value).replace(str(tmp_path), "").lower()


async def test_a_socket_that_was_left_behind_is_told(asking: Asking, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "ga"))
    with pytest.raises(AgentConnectError, match="nobody listens"):
        await asking(str(tmp_path / "ga")).cpus()


async def test_what_is_no_address_is_told_at_once() -> None:
    with pytest.raises(AgentConnectError, match="port"):
        GuestAgent("tcp:host:99999")
    with pytest.raises(TypeError):
        GuestAgent(7)  # type: ignore[arg-type]


async def test_a_socket_that_serves_another_client_is_told(agent: ScriptedAgent, asking: Asking) -> None:
    first = asking(agent.path)
    await first.cpus()
    with pytest.raises(AgentConnectError, match="another client holds this socket"):
        await asking(agent.path, within=0.3).cpus()
    await first.close()
    assert await asking(agent.path).cpus()


async def test_a_qmp_socket_is_told(asking: Asking) -> None:
    async with ScriptedPeer() as peer:
        with pytest.raises(AgentConnectError, match="it is a QMP socket"):
            await asking(peer.path, within=30).cpus()


async def test_attach_tells_the_socket_of_an_agent_soon(agent: ScriptedAgent) -> None:
    began = time.monotonic()
    with pytest.raises(MonitorConnectError, match="it is the socket of a guest agent") as caught:
        await attach(agent.path, reply_timeout=50)
    assert time.monotonic() - began < 40
    assert "attach(agent=...)" in caught.value.hint


async def test_a_qemu_that_greets_after_it_was_taken_for_an_agent_is_attached_to_all_the_same() -> None:
    async with ScriptedPeer(greeting=None) as peer:

        async def greet_late() -> None:
            asked = await peer.expect("guest-sync")
            await peer.send(
                {
                    "QMP": {
                        "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""},
                        "capabilities": [],
                    }
                }
            )
            await asked.fail("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")

        late = asyncio.create_task(greet_late())
        attaching = asyncio.ensure_future(_open(peer.path))
        await late
        assert await attaching == (10, 0, 2)


async def _open(path: str) -> tuple[int, int, int]:
    from qmpvcpu.qmp.monitor import Monitor

    monitor = await Monitor.open(path, timeout=2.0, on_event=lambda _: None, on_lost=lambda _: None)
    await monitor.close()
    return monitor.version


# Silence.


async def test_a_silent_agent_is_told_within_the_deadline(
    agent: ScriptedAgent, asking: Asking, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="qmpvcpu.agent")
    await agent.turn(Mood.SILENT)
    with pytest.raises(AgentSilentError, match=r"no answer within 0\.4 s: no agent runs") as caught:
        await asking(agent.path, within=0.4).cpus()
    assert caught.value.port_open is None
    assert caught.value.outcome is Outcome.UNCHANGED
    assert caught.value.timeout == 0.4
    assert "guest-sync-delimited" in caplog.text


@pytest.mark.parametrize(
    ("is_open", "why"),
    [(False, "no process in the guest has the agent's port open"), (True, "it is stopped, or hangs")],
)
async def test_qemu_tells_an_absent_agent_from_a_stopped_one(agent: ScriptedAgent, is_open: bool, why: str) -> None:
    async def ask_qemu(path: str) -> QemuSays:
        assert path == agent.path
        return QemuSays(Port(is_open, has_client=True))

    await agent.turn(Mood.SILENT)
    door = GuestAgent(agent.path, timeout=0.3, ask_qemu=ask_qemu)
    with pytest.raises(AgentSilentError, match=why) as caught:
        await door.cpus()
    assert caught.value.port_open is is_open
    await door.close()


async def test_a_qemu_that_does_not_answer_either_costs_no_more_than_the_deadline(agent: ScriptedAgent) -> None:
    async def never(_path: str) -> QemuSays:
        await asyncio.sleep(3600)
        return QemuSays()

    await agent.turn(Mood.SILENT)
    door = GuestAgent(agent.path, timeout=0.3, ask_qemu=never)
    with pytest.raises(AgentSilentError, match="no agent runs"):
        await door.cpus()
    await door.close()


async def test_a_qemu_that_is_slow_to_accept_is_not_taken_for_one_that_serves_another(tmp_path: Path) -> None:
    async def ask_qemu(_path: str) -> QemuSays:
        return QemuSays(Port(is_open=True, has_client=False))

    with socket.socket(socket.AF_UNIX) as slow:
        slow.bind(str(tmp_path / "ga"))
        slow.listen()
        door = GuestAgent(str(tmp_path / "ga"), timeout=0.3, ask_qemu=ask_qemu)
        with pytest.raises(AgentSilentError, match="QEMU has not accepted the connection yet"):
            await door.cpus()
        await door.close()


async def test_an_agent_that_is_started_again_before_it_has_answered_anything_is_asked_again(
    agent: ScriptedAgent, asking: Asking
) -> None:
    await agent.turn(Mood.SILENT)
    waiting = asyncio.create_task(asking(agent.path, within=3).cpus())
    await asyncio.sleep(0.2)
    await agent.turn(Mood.NORMAL)  # and what it was asked is gone
    assert len(await waiting) == 2


async def test_a_process_that_is_stopped_is_named(asking: Asking, tmp_path: Path) -> None:
    program = (
        "import socket,sys,time; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
        " print(flush=True); time.sleep(600)"
    )
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path / "ga"), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        await server.stdout.readline()
        send_signal(server.pid, signal.SIGSTOP)
        with pytest.raises(AgentSilentError, match=rf"pid {server.pid} .* is stopped"):
            await asking(str(tmp_path / "ga"), within=0.5).cpus()
    finally:
        server.kill()
        await server.wait()


async def test_a_change_that_is_not_answered_may_have_been_made(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path, within=0.4)
    await door.cpus()
    await agent.turn(Mood.LATE)
    with pytest.raises(AgentSilentError) as caught:
        await door.set_cpus({1: False})
    assert caught.value.outcome is Outcome.UNKNOWN
    assert agent.changes == [(1, False)]


async def test_late_answers_are_passed_over(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path, within=0.4)
    assert len(await door.cpus()) == 2
    await agent.turn(Mood.LATE)
    with pytest.raises(AgentSilentError):
        await door.cpus()
    agent.plugged(5)
    waiting = asyncio.create_task(door.cpus(timeout=5))
    await until(lambda: agent._connection is not None and agent._late)
    await agent.turn(Mood.NORMAL)  # all that it owes, to the client of now
    assert len(await waiting) == 3


async def test_an_agent_that_is_started_again_in_the_middle_is_told_at_once(
    agent: ScriptedAgent, asking: Asking
) -> None:
    door = asking(agent.path, within=2)
    await door.cpus()
    await agent.turn(Mood.RESTARTING)
    with pytest.raises(AgentLostError, match="it restarted before it answered guest-set-vcpus") as caught:
        await door.set_cpus({1: False})
    assert caught.value.outcome is Outcome.UNKNOWN
    assert len(await door.cpus()) == 2


async def test_a_qemu_that_hangs_up_is_told_and_connected_to_again(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path)
    await door.cpus()
    await agent.turn(Mood.SILENT)
    waiting = asyncio.create_task(door.cpus())
    await until(lambda: agent.received.count("guest-get-vcpus") == 2)
    agent.hang_up()
    with pytest.raises(AgentLostError, match="the connection is lost with guest-get-vcpus in flight"):
        await waiting
    await agent.turn(Mood.NORMAL)
    assert len(await door.cpus()) == 2
    agent.hang_up()
    await asyncio.sleep(0.05)
    assert len(await door.cpus()) == 2


async def test_a_cancelled_question_does_not_spoil_the_next(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path)
    await door.cpus()
    await agent.turn(Mood.LATE)
    waiting = asyncio.create_task(door.cpus())
    await until(lambda: agent._late)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    agent.plugged(3)
    await agent.turn(Mood.NORMAL)
    assert len(await door.cpus()) == 3


async def test_a_question_that_waits_for_others_has_its_deadline_too(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path)
    await agent.turn(Mood.SILENT)
    first = asyncio.create_task(door.cpus(timeout=1.0))
    await asyncio.sleep(0)
    with pytest.raises(AgentSilentError, match="busy with earlier questions"):
        await door.cpus(timeout=0.2)
    with pytest.raises(AgentSilentError):
        await first


# Refusals.


async def test_a_refusal_has_the_guests_errno_in_words(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path)
    await agent.turn(Mood.REFUSING)
    with pytest.raises(GuestRefusedError, match=r"deadline tasks need this CPU.*\(EBUSY\)") as caught:
        await door.set_cpus({1: False})
    assert caught.value.errno == "EBUSY"
    assert caught.value.number == 1
    assert caught.value.outcome is Outcome.UNCHANGED
    with pytest.raises(GuestRefusedError, match="does not let this CPU go offline"):
        await door.set_cpus({0: False})
    with pytest.raises(GuestRefusedError, match="no such CPU") as caught:
        await door.set_cpus({99: False})
    assert (caught.value.errno, caught.value.number) == ("ENOENT", 99)


async def test_a_list_of_which_a_part_is_done_is_told_by_its_number(agent: ScriptedAgent, asking: Asking) -> None:
    assert await asking(agent.path).set_cpus({1: False, 99: False}) == 1


async def test_a_forbidden_command_is_told(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path)
    await agent.turn(Mood.FORBIDDING)
    with pytest.raises(AgentForbiddenError, match="guest-file-open is forbidden") as caught:
        await door.read_file("/proc/version")
    assert caught.value.command == "guest-file-open"
    assert "guest-file-open" not in await door.commands()
    with pytest.raises(AgentForbiddenError, match="guest-nosuch is not supported by this agent"):
        await door.execute("guest-nosuch")


async def test_an_agent_that_may_not_synchronise_is_told_as_that(agent: ScriptedAgent, asking: Asking) -> None:
    agent.answers["guest-sync-delimited"] = PermissionError("Command guest-sync-delimited has been disabled")
    door = asking(agent.path)
    for _ in range(2):
        with pytest.raises(AgentForbiddenError, match="guest-sync-delimited is forbidden") as caught:
            await door.cpus()
        assert caught.value.command == "guest-sync-delimited"
    assert agent.received == []
    del agent.answers["guest-sync-delimited"]
    assert len(await door.cpus()) == 2


# Lies.


@pytest.mark.parametrize("lie", [{}, [], [{"logical-id": 1, "online": True}], "text", None, [[]]], ids=repr)
async def test_a_list_that_makes_no_sense_is_refused(agent: ScriptedAgent, asking: Asking, lie: Any) -> None:
    await agent.turn(Mood.LYING)
    agent.lie = lie
    door = asking(agent.path)
    with pytest.raises(MalformedAnswerError, match="malformed answer to guest-get-vcpus"):
        await door.cpus()
    await agent.turn(Mood.NORMAL)
    assert len(await door.cpus()) == 2


@pytest.mark.parametrize(
    "lie",
    [b"garbage\n", b"\x80\x81\n", b"[1]\n", b"{}" * 10 + b"\n", b"[" * 100_000 + b"\n", b"x" * (10 << 20) + b"\n"],
    ids=["garbage", "no UTF-8", "no object", "many objects", "deep", "10 MB"],
)
async def test_a_line_that_makes_no_sense_ends_the_session(agent: ScriptedAgent, asking: Asking, lie: bytes) -> None:
    await agent.turn(Mood.LYING)
    agent.lie = lie
    door = asking(agent.path)
    with pytest.raises(MalformedAnswerError):
        await door.cpus()
    await agent.turn(Mood.NORMAL)
    assert len(await door.cpus()) == 2


async def test_a_million_entries_are_refused(agent: ScriptedAgent, asking: Asking) -> None:
    await agent.turn(Mood.LYING)
    agent.lie = [{"logical-id": 0}] * 1_000_000
    with pytest.raises(MalformedAnswerError):
        await asking(agent.path).cpus()


@pytest.mark.parametrize("lie", [b"{}\n" * 100_000, b"garbage\n" * 100_000], ids=["strays", "garbage"])
async def test_a_flood_ends_the_session_and_keeps_nobody_waiting(asking: Asking, lie: bytes) -> None:
    async with raw_server(lie) as path:
        longest = 0.0

        async def others() -> None:
            nonlocal longest
            while True:
                before = time.monotonic()
                await asyncio.sleep(0)
                longest = max(longest, time.monotonic() - before)

        other = asyncio.create_task(others())
        with pytest.raises(MalformedAnswerError, match="answer nothing"):
            await asking(path, within=5).cpus()
        other.cancel()
        assert longest < 1


async def test_half_an_answer_is_a_loss_or_nonsense(asking: Asking) -> None:
    async with raw_server(b'\xff{"return": 12', then=b"34") as path:
        with pytest.raises(GuestAgentError) as caught:
            await asking(path, within=1).cpus()
        assert isinstance(caught.value, AgentLostError | MalformedAnswerError)


async def test_the_rest_of_an_answer_for_somebody_else_is_passed_over(agent: ScriptedAgent, asking: Asking) -> None:
    agent.mood = Mood.LATE
    waiting = asyncio.create_task(asking(agent.path).cpus())
    await until(lambda: agent._late)  # asked to synchronise, and has not answered
    await agent.send(
        b'"kernel-release": "6.1"}}\n{"return": 17}\n{"error": {"class": "GenericError", "desc": "?"}}\n'
    )
    await agent.send(b'{"return": [], "id": "abc"}\n{"return": [], "id": ["a"]}\n{"return": [], "id": 3}\n')
    await agent.turn(Mood.NORMAL)
    assert len(await waiting) == 2


async def test_half_a_question_of_somebody_else_is_dropped(agent: ScriptedAgent, asking: Asking) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(agent.path)
        other.send(b'{"execute": "guest-set-vcpus", "arguments": {"vcpus": [')
        await asyncio.sleep(0.05)
    assert len(await asking(agent.path).cpus()) == 2


async def test_an_agent_whose_answers_have_no_ids_is_too_old(asking: Asking) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        question = json.loads((await reader.read(1 << 16)).lstrip(b"\xff"))
        writer.write(b"\xff" + json.dumps({"return": question["arguments"]["id"]}).encode() + b"\n")
        await reader.read()
        writer.close()

    async with ScriptedAgent() as place:
        server = await asyncio.start_unix_server(serve, f"{place.path}.old")
        with pytest.raises(AgentConnectError, match="too old"):
            await asking(f"{place.path}.old").cpus()
        server.close()


# What is given.


async def test_a_given_client_is_asked_and_stays_open(agent: ScriptedAgent, asking: Asking) -> None:
    client = QMPClient("mine")
    client.await_greeting = client.negotiate = False
    door = asking(client)
    with pytest.raises(AgentConnectError, match="it is not connected"):
        await door.cpus()
    await client.connect(agent.path)
    assert len(await door.cpus()) == 2
    await door.close()
    assert await client.execute("guest-ping") == {}
    await client.disconnect()


async def test_a_given_client_of_qmp_is_refused(asking: Asking) -> None:
    async with ScriptedPeer() as peer:
        client = QMPClient()
        await client.connect(peer.path)
        with pytest.raises(AgentConnectError, match="it is a QMP session"):
            await asking(client).cpus()
        await client.disconnect()


async def test_a_given_socket_is_asked_until_it_ends(agent: ScriptedAgent, asking: Asking) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(agent.path)
    door = asking(sock)
    assert len(await door.cpus()) == 2
    agent.hang_up()
    await asyncio.sleep(0.05)
    with pytest.raises(AgentLostError, match="cannot be opened again"):
        await door.cpus()


@pytest.mark.parametrize("name", ["_do_recv", "_on_message", "_cb_outbound", "_readline"])
def test_the_installed_qemu_qmp_has_what_the_agents_dialect_needs(name: str) -> None:
    assert callable(getattr(QMPClient, name))
    assert name == "_readline" or getattr(AgentClient, name) is not getattr(QMPClient, name)


async def test_an_answer_without_its_id_is_no_restart(asking: Asking, tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while text := (await reader.read(1 << 16)).lstrip(b"\xff"):
            question = json.loads(text)
            if question["execute"] == "guest-sync-delimited":
                answer = {"return": question["arguments"]["id"], "id": question["id"]}
            else:
                answer = {"return": []}
            writer.write(b"\xff" + json.dumps(answer).encode() + b"\n")
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "ga"):
        door = asking(str(tmp_path / "ga"), within=1)
        with pytest.raises(MalformedAnswerError, match="guest-get-vcpus: it does not carry the question's id"):
            await door.cpus()
        await door.close()


async def test_a_closed_door_stays_closed(agent: ScriptedAgent, asking: Asking) -> None:
    door = asking(agent.path)
    await door.close()
    with pytest.raises(AgentLostError, match="closed on this side"):
        await door.cpus()


async def test_a_given_socket_that_was_never_asked_is_closed(agent: ScriptedAgent, asking: Asking) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(agent.path)
    await asking(sock).close()
    assert sock.fileno() == -1


async def test_a_door_that_is_closed_while_it_connects_leaves_nothing(asking: Asking, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as full:
        full.bind(str(tmp_path / "ga"))
        full.listen(0)
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(tmp_path / "ga"))
            door = asking(str(tmp_path / "ga"), within=1)
            waiting = asyncio.create_task(door.cpus())
            await asyncio.sleep(0.05)
            await door.close()
            with contextlib.closing(full.accept()[0]), pytest.raises(AgentLostError):
                await waiting


async def test_large_messages_that_answer_nothing_end_the_session_sooner(asking: Asking) -> None:
    async with raw_server((b'{"return": "' + b"x" * (1 << 20) + b'"}\n') * 12) as path:
        with pytest.raises(MalformedAnswerError, match="answer nothing"):
            await asking(path).cpus()
