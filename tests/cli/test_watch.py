import asyncio
import json
import signal
from pathlib import Path

import pytest

from qmpvcpu.testing import Behaviour, MicroGuest, QemuProcess, best_qemu
from tests.cli.running import Running, run, running

pytestmark = pytest.mark.qemu


async def first_line(it: Running) -> bytes:
    """The line that says that it watches."""
    assert it.process.stdout is not None
    return await asyncio.wait_for(it.process.stdout.readline(), 20)


async def test_another_clients_changes_are_seen_as_they_happen(guest: MicroGuest) -> None:
    async with running("watch", "--until", "0,3", "--json", "--qmp", guest.sockets[1]) as it:
        start = json.loads(await first_line(it))
        assert (start["event"], start["enabled"], start["max"]) == (None, "0-1", 8)
        assert (await run("set", "0,3", "--qmp", guest.qmp)).code == 0
        ran = await it.end()
    assert ran.code == 0
    *events, end = ran.documents
    seen = {each["event"]: each for each in events}
    assert (seen["VcpuPlugged"]["ids"], seen["VcpuPlugged"]["origin"]) == ("3", "other")
    assert seen["VcpuUnplugged"]["ids"] == "1"
    assert seen["VcpuUnplugged"]["time"].endswith("+00:00")
    assert (end["ended"], end["enabled"], end["pending"]) == ("reached", "0,3", "")


async def test_people_read_a_line_an_event_with_its_time_and_the_map(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.refusing(0x82))
    async with running("watch", "--qmp", guest.sockets[1]) as it:
        assert b"2 of 8 vCPUs plugged: 0-1" in await first_line(it)
        assert (await run("set", "0", "--qmp", guest.qmp)).code == 1
        refused = b""
        while b"refused" not in refused:
            refused = await first_line(it)
        it.process.send_signal(signal.SIGINT)
        ran = await it.end()
    assert ran.code == 0
    words = refused.decode().split()
    assert len(words[0]) == len("12:34:56.789")
    assert "vCPU 1: the guest refused: device is busy" in refused.decode()
    assert refused.decode().endswith("[0][1][ ][ ][ ][ ][ ][ ]\n")
    assert ran.err == ""


async def test_it_ends_after_the_time_it_was_given(guest: MicroGuest) -> None:
    ran = await run("watch", "--for", "0.2", "--json", "--qmp", guest.qmp)
    assert ran.code == 0
    assert ran.documents[-1]["ended"] == "time"
    late = await run("watch", "--for", "0.2", "--until", "0-7", "--qmp", guest.qmp)
    assert late.code == 1
    assert "0-7 not reached within 0.2 s" in late.err


async def test_a_reader_that_left_before_the_map_is_there_makes_no_success(guest: MicroGuest) -> None:
    nobody_reads = "import os; ours, theirs = os.pipe(); os.close(ours); os.dup2(theirs, 1)"
    words = ("watch", "--until", "0,3", "--for", "20", "--verbose", "--qmp", guest.sockets[1])
    async with running(*words, code=nobody_reads) as it:
        await it.wait_said("query-hotpluggable-cpus")
        for wish in ("0-2", "0-1"):
            assert (await run("set", wish, "--qmp", guest.qmp)).code == 0
        ran = await it.end()
    assert ran.code == 1
    assert ran.err.endswith("qmpvcpu: 0,3 not reached (nobody reads)\n")


@pytest.mark.parametrize("words", [(), ("--json",)])
async def test_it_holds_no_socket_for_a_reader_that_has_left(words: tuple[str, ...], guest: MicroGuest) -> None:
    nobody_reads = "import os; ours, theirs = os.pipe(); os.close(ours); os.dup2(theirs, 1)"
    async with running("watch", "--for", "60", *words, "--qmp", guest.sockets[1], code=nobody_reads) as it:
        ran = await asyncio.wait_for(it.end(), 20)
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize(
    ("never", "why"), [("0-9", "no vCPUs 8-9: this machine has 0 to 7"), ("1-3", "vCPU 0 never leaves")]
)
async def test_a_map_that_can_never_come_is_not_waited_for(never: str, why: str, guest: MicroGuest) -> None:
    ran = await run("watch", "--until", never, "--json", "--qmp", guest.qmp)
    assert ran.code == 2
    assert why in ran.error["message"]


async def test_what_was_waited_for_may_be_there_already(guest: MicroGuest) -> None:
    ran = await run("watch", "--until", "0-1", "--json", "--qmp", guest.qmp)
    assert ran.code == 0
    assert [each.get("ended") for each in ran.documents] == [None, "reached"]


async def test_a_signal_before_the_map_is_there_is_no_success(guest: MicroGuest) -> None:
    async with running("watch", "--until", "0-7", "--json", "--qmp", guest.qmp) as it:
        await first_line(it)
        it.process.send_signal(signal.SIGTERM)
        ran = await it.end()
    assert ran.code == 130
    assert ran.documents[-1]["ended"] == "SIGTERM"


async def test_a_qemu_that_ends_ends_it_too(guest: MicroGuest) -> None:
    async with running("watch", "--json", "--qmp", guest.qmp) as it:
        await first_line(it)
        guest.process.kill()
        ran = await it.end()
    assert ran.code == 3
    *_, lost, error = ran.documents
    assert lost["event"] == "Disconnected"
    assert error["error"]["kind"] == "MonitorLostError"


async def test_it_outlives_the_connection_if_told_to(tmp_path: Path) -> None:
    socket = tmp_path / "qmp"

    def machine(boot: int) -> QemuProcess:
        smp = f"{boot},maxcpus=4,sockets=4"
        return QemuProcess(
            best_qemu(),
            ["-name", "vm", "-machine", "q35", "-S", "-smp", smp, "-qmp", f"unix:{socket},server=on,wait=off"],
        )

    async with machine(1) as first:
        await first.wait_ready()
        async with running("watch", "--reconnect", "--json", "--qmp", socket) as it:
            await first_line(it)
            await first.aclose()
            async with machine(2):
                events = [json.loads(await first_line(it))]
                while events[-1]["event"] != "Reconnected":
                    events.append(json.loads(await first_line(it)))
            it.process.send_signal(signal.SIGINT)
            ran = await it.end()
    assert ran.code == 0
    first_seen, *found, last_seen = events
    assert first_seen["event"] == "Disconnected"
    assert {each["event"] for each in found} >= {"InstanceChanged", "VcpuPlugged"}
    assert (last_seen["event"], last_seen["enabled"]) == ("Reconnected", "0-1")


async def test_a_reader_that_has_seen_enough_ends_it(guest: MicroGuest) -> None:
    async with running("watch", "--json", "--qmp", guest.sockets[1]) as it:
        await first_line(it)
        assert it.process.stdout is not None
        it.process.stdout._transport.close()  # type: ignore[attr-defined]  # as head does
        assert (await run("plug", "3", "--qmp", guest.qmp)).code == 0
        assert await asyncio.wait_for(it.process.wait(), 20) == 0
