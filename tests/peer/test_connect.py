"""The ways in which a session does not come about: each has its own error, within its deadline."""

import asyncio
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.errors import MonitorConnectError
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.testing.peer import GREETING, HANG, Failure, ScriptedPeer

from .conftest import Heard, Open


async def refusal(target: Any, connect: Open, within: float = 30) -> MonitorConnectError:
    """The error that connecting ends in."""
    with pytest.raises(MonitorConnectError) as caught:
        await connect(target, within=within)
    return caught.value


async def test_a_session_knows_its_peer(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:
        monitor = await connect(peer.address)
        assert monitor.address == peer.address
        assert monitor.version == (10, 0, 2)
        assert monitor.package == "scripted"
        assert monitor.peer_pid is not None
        assert monitor.lost is None
        await monitor.close()
    assert heard.lost == []


async def test_every_kind_of_target_connects(connect: Open) -> None:
    async with ScriptedPeer() as peer:
        for target in (peer.path, Path(peer.path), f"unix:{peer.path}"):
            monitor = await connect(target)
            assert monitor.address == f"unix:{peer.path}"
            await monitor.close()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(peer.path)
        monitor = await connect(sock)
        assert monitor.address == f"fd {sock.fileno()}"
        await monitor.close()
        assert sock.fileno() == -1
    async with ScriptedPeer(tcp=True) as peer:
        port = int(peer.address.rpartition(":")[2])
        for pair in (peer.address, ("127.0.0.1", port), ("localhost", port)):
            monitor = await connect(pair)
            assert monitor.address.startswith("tcp:")
            assert monitor.peer_pid is None
            await monitor.close()


async def test_one_end_of_a_socket_pair_is_a_target(connect: Open) -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)
    opening = asyncio.create_task(connect(ours))
    writer.write(b'{"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 0}}, "capabilities": []}}\r\n')
    command = json.loads(await reader.read(1000))
    assert command["execute"] == "qmp_capabilities"
    writer.write(json.dumps({"return": {}, "id": command["id"]}).encode() + b"\r\n")
    monitor = await opening
    assert (monitor.version, monitor.package) == ((9, 1, 0), "")
    await monitor.close()
    writer.close()
    await writer.wait_closed()


async def test_a_path_that_is_no_socket_says_so(connect: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "the path is a regular file, no socket" in str(await refusal(tmp_path / "file", connect))


async def test_what_is_no_target_is_a_type_error(connect: Open) -> None:
    with pytest.raises(TypeError, match="not as float"):
        await connect(0.5)


async def test_a_silent_peer_is_one_error_that_names_both_causes(connect: Open) -> None:
    async with ScriptedPeer(greeting=None) as peer:
        error = await refusal(peer.address, connect, within=0.1)
    assert "no greeting within 0.1 s: another client holds this QMP socket, or QEMU is stopped" in error.why
    assert "runs, so most likely another client holds the socket" in error.hint
    assert error.address == peer.address


async def test_a_held_socket_is_found_out_and_free_again_afterwards(connect: Open) -> None:
    async with ScriptedPeer() as peer:
        holder = await connect(peer.address)
        error = await refusal(peer.address, connect, within=0.1)
        assert "another client holds this QMP socket" in error.why
        await holder.close()
        assert (await connect(peer.address)).lost is None


async def test_over_tcp_the_hint_is_advice_only(connect: Open) -> None:
    async with ScriptedPeer(greeting=None, tcp=True) as peer:
        error = await refusal(peer.address, connect, within=0.1)
    assert error.hint == "a QMP socket serves one client at a time; give QEMU a second -qmp"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", r"not a QMP greeting: b'HTTP/1.1 400 Bad Request\r\n\r\n'"),
        (b"\x00\xff\x17random, without a newline", r"not a QMP greeting: b'\x00\xff\x17random, without a newline'"),
        (b"220 mail.example ESMTP " + b"x" * 200 + b"\r\n", "not a QMP greeting: b'220 mail.example ESMTP xxx"),
        (b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ", "QEMU's monitor for people (HMP)"),
        (b'{"hello": "world"}\r\n', """not a QMP greeting: b'{"hello": "world"}\\r\\n'"""),
        (b'{"QMP": 5}\r\n', """not a QMP greeting: b'{"QMP": 5}"""),
        (b"{not json}\r\n", r"not a QMP greeting: b'{not json}\r\n'"),
        (b'{"\xff": 1}\r\n', "in its greeting: the peer sent a line that is not UTF-8"),
        (b'{\r\n    "QMP": {\r\n', "is it a monitor with pretty=on?"),
        (b"\r\n[1, 2]\r\n", "not a QMP greeting"),
        (b'{"QMP": {"version": {}, "capabilities": []}}\r\n', "it names no QEMU version: {}"),
        (b'{"QMP": {"version": {"qemu": {"major": "x"}}, "capabilities": []}}\r\n', "it names no QEMU version"),
    ],
)
async def test_what_is_no_greeting_is_refused_at_once_with_its_first_bytes(
    said: bytes, message: str, connect: Open
) -> None:
    async with ScriptedPeer(greeting=said) as peer:
        error = await refusal(peer.address, connect, within=30)
    assert message in str(error)
    assert len(str(error)) < 400


async def test_a_greeting_of_20_mb_is_over_the_limit(connect: Open) -> None:
    async with ScriptedPeer(greeting=b'{"QMP": "' + b"x" * 20_000_000 + b'"}\r\n') as peer:
        error = await refusal(peer.address, connect)
    assert "in its greeting: the peer sent a line of more than 10485760 bytes" in str(error)


async def test_an_unfinished_greeting_is_quoted_at_the_deadline(connect: Open) -> None:
    async with ScriptedPeer(greeting=b'{"QMP": {"versi') as peer:
        error = await refusal(peer.address, connect, within=0.1)
    assert """its greeting was not finished within 0.1 s: b'{"QMP": {"versi'""" in error.why


async def test_a_peer_that_hangs_up_at_once_says_so(connect: Open) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        error = await refusal(("127.0.0.1", server.sockets[0].getsockname()[1]), connect)
    assert error.why == "it hung up without a greeting"


async def test_a_peer_that_resets_at_once_says_so(connect: Open) -> None:
    async with ScriptedPeer(greeting=None, tcp=True) as peer:
        opening = asyncio.create_task(refusal(peer.address, connect))
        await peer.wait_connected()
        peer.reset()
        assert (await opening).why == "the peer reset the connection (ECONNRESET)"


async def test_a_peer_that_hangs_up_within_its_greeting_says_so(connect: Open) -> None:
    async with ScriptedPeer(greeting=b'{"QMP": ') as peer:
        opening = asyncio.create_task(refusal(peer.address, connect))
        await peer.wait_connected()
        await peer.hang_up()
        assert """what it sends is not a QMP greeting: b'{"QMP": '""" in (await opening).why


async def test_a_peer_that_rejects_the_negotiation_is_quoted(connect: Open) -> None:
    async with ScriptedPeer(answers={"qmp_capabilities": Failure("go away", "Unfriendly")}) as peer:
        error = await refusal(peer.address, connect)
    assert error.why == "it rejects qmp_capabilities: Unfriendly: go away"


async def test_a_negotiation_that_the_last_client_left_behind_serves_this_one(connect: Open) -> None:
    late = Failure("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
    async with ScriptedPeer(answers={"qmp_capabilities": late, "query-status": {"status": "running"}}) as peer:
        monitor = await connect(peer.address)
        assert await monitor.execute("query-status") == {"status": "running"}


async def test_a_peer_that_does_not_answer_the_negotiation_is_told_from_a_silent_one(connect: Open) -> None:
    async with ScriptedPeer(answers={"qmp_capabilities": HANG}) as peer:
        error = await refusal(peer.address, connect, within=0.1)
    assert error.why == "it greeted, but did not reply to qmp_capabilities within 0.1 s"


async def test_a_malformed_reply_to_the_negotiation_is_quoted(connect: Open) -> None:
    async with ScriptedPeer() as peer:
        del peer.answers["qmp_capabilities"]
        opening = asyncio.create_task(refusal(peer.address, connect))
        await (await peer.expect("qmp_capabilities")).answer({"spam": 1})
        assert """its reply to qmp_capabilities is malformed: {"spam": 1""" in (await opening).why


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "after its greeting: the peer hung up (end of file)"),
        (b'{"retu', """after its greeting: the peer hung up in the middle of a message: b'{"retu'"""),
        (b"nonsense\n", r"after its greeting: the peer sent a line that is not JSON: b'nonsense\n'"),
    ],
)
async def test_a_peer_that_fails_after_its_greeting_says_how(said: bytes, message: str, connect: Open) -> None:
    async with ScriptedPeer() as peer:
        del peer.answers["qmp_capabilities"]
        opening = asyncio.create_task(refusal(peer.address, connect))
        await peer.expect("qmp_capabilities")
        await peer.send(said)
        await peer.hang_up()
        assert (await opening).why == message


async def test_a_peer_that_fails_right_behind_its_greeting_says_how(connect: Open) -> None:
    async with ScriptedPeer(greeting=b'{"QMP": {"version": {}, "capabilities": []}}\nnonsense\n') as peer:
        error = await refusal(peer.address, connect)
    assert error.why == r"after its greeting: the peer sent a line that is not JSON: b'nonsense\n'"


@pytest.mark.parametrize("greeting", [None, b'{"QMP": ', GREETING])
async def test_cancelling_leaves_nothing_behind(greeting: Any, connect: Open) -> None:
    async with ScriptedPeer(greeting=greeting, answers={"qmp_capabilities": HANG}) as peer:
        opening = asyncio.create_task(connect(peer.address))
        await peer.wait_connected()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await peer.wait_left()


async def test_a_given_socket_is_closed_on_failure_too(connect: Open) -> None:
    async with ScriptedPeer(greeting=b"spam\n") as peer:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(peer.path)
        error = await refusal(sock, connect)
        assert error.address.startswith("fd ")
        assert sock.fileno() == -1


async def test_failures_print_nothing_unless_logging_is_configured(
    connect: Open, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    async with ScriptedPeer(greeting=b'{"hello": "world"}\r\n') as peer:
        await refusal(peer.address, connect)
    assert capfd.readouterr().err == ""


async def test_an_event_right_after_the_negotiation_is_not_missed(connect: Open, heard: Heard) -> None:
    async with ScriptedPeer() as peer:

        async def negotiate(_: object) -> dict[str, Any]:
            await peer.event("EARLY")
            return {}

        peer.answers["qmp_capabilities"] = negotiate
        await connect(peer.address)
    assert heard.names == ["EARLY"]


OLD_EVENT = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "DEVICE_DELETED", "data": {"path": "/x"}}\r\n'
OLD_REPLY = b'{"return": {}, "id": "__qmp#00000"}\r\n'
OLD_LONG_REPLY = b'{"return": ["' + b"x" * 200_000 + b'"]}\r\n'


@pytest.mark.parametrize("old", [OLD_EVENT, OLD_REPLY, OLD_LONG_REPLY, OLD_EVENT + OLD_REPLY + OLD_EVENT])
async def test_what_qemu_had_for_the_last_client_is_passed_over(old: bytes, connect: Open, heard: Heard) -> None:
    async with ScriptedPeer(greeting=old + json.dumps(GREETING).encode() + b"\r\n") as peer:
        assert (await connect(peer.address)).version == (10, 0, 2)
    assert heard.events == []


async def test_a_reply_to_the_last_client_behind_the_greeting_is_not_taken_for_ours(connect: Open) -> None:
    greeting = json.dumps(GREETING).encode() + b"\r\n"
    stale = b"".join(b'{"return": "stale", "id": "__qmp#%05d"}\r\n' % number for number in range(8))
    async with ScriptedPeer(greeting=greeting + stale, answers={"query-status": "fresh"}) as peer:
        monitor = await connect(peer.address)
        assert await monitor.execute("query-status") == "fresh"


async def test_two_sessions_number_their_commands_apart(connect: Open) -> None:
    ids = []
    async with ScriptedPeer(answers={"query-status": {}}) as peer:
        for _ in range(2):
            monitor = await connect(peer.address)
            await monitor.execute("query-status")
            await monitor.close()
            ids.append(peer.received[-1].message["id"])
    assert len(set(ids)) == 2


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        (b'{"return": nonsense}\r\n', 'not a QMP greeting: b\'{"return": nonsense}'),
        (b'{"timestamp": {"seconds": 1', 'not a QMP greeting: b\'{"timestamp": {"seconds": 1\''),
        (b'{"return": "' + b"x" * 2_000_000, 'not a QMP greeting: b\'{"return": "xxx'),
    ],
)
async def test_what_only_begins_like_an_old_message_is_refused(said: bytes, quoted: str, connect: Open) -> None:
    async with ScriptedPeer(greeting=said) as peer:
        opening = asyncio.create_task(refusal(peer.address, connect))
        await peer.wait_connected()
        if b"\n" not in said:
            await peer.hang_up()
        assert quoted in str(await opening)


async def test_opening_takes_its_options_by_keyword() -> None:
    with pytest.raises(TypeError):
        await Monitor.open("/x", 5, print, print)  # type: ignore[call-arg] # the mistake is the test
