import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qmpvcpu.cli.show import vcpu_table
from qmpvcpu.model.layout import CpuProps
from qmpvcpu.model.options import Proof
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import on_terminal, run
from tests.layouts import layout

pytestmark = pytest.mark.qemu


async def test_a_live_table_of_vcpus_follows_what_happens(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with on_terminal("watch", "--until", "0", "--qmp", guest.sockets[1]) as it:
        await it.wait_shown("pending since")
        asked = await run("unplug", "1", "--timeout", "0.3", "--qmp", guest.qmp)
        assert asked.code == 1
        await it.wait_shown("vCPU 1: the guest works on it (by another client)")
        await guest.set_behaviour(Behaviour.complying())
        assert await it.end() == 0
    assert "1 of 8 vCPUs plugged: 0" in it.shown
    assert "vCPU 1 is gone" in it.shown


async def test_a_lost_qemu_is_told_above_what_was_last_seen(guest: MicroGuest) -> None:
    async with on_terminal("watch", "--reconnect", "--qmp", guest.qmp) as it:
        await it.wait_shown("pending since")
        guest.process.kill()
        await it.wait_shown("QEMU is lost; it was:")
        it.process.send_signal(signal.SIGINT)
        assert await it.end() == 0


async def test_each_vcpu_of_a_map_has_a_row_while_the_guest_takes_its_time(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with on_terminal("set", "0,2-3", "--qmp", guest.qmp) as it:
        await it.wait_shown("2 of 3")
        await it.wait_shown("plug 2    plugged")
        await it.wait_shown("unplug 1  the guest works on it (0.")
        await guest.set_behaviour(Behaviour.complying())
        assert await it.end() == 0
    assert "REACHED in" in it.shown


async def test_vcpus_that_leave_one_by_one_are_shown_with_those_that_wait(guest: MicroGuest) -> None:
    assert (await run("set", "0-3", "--qmp", guest.qmp)).code == 0
    await guest.set_behaviour(Behaviour.hanging())
    async with on_terminal("unplug", "3", "2", "1", "--qmp", guest.qmp) as it:
        await it.wait_shown("0 of 3")
        await it.wait_shown("unplug 3  the guest works on it (0.")
        await it.wait_shown("unplug 1  waits")
        await guest.set_behaviour(Behaviour.complying())
        assert await it.end() == 0
    assert "unplugged vCPU 1 in" in it.shown


async def test_one_vcpu_has_one_live_line(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with on_terminal("unplug", "1", "--qmp", guest.qmp) as it:
        await it.wait_shown("vCPU 1: the guest works on it (0.")
        await guest.set_behaviour(Behaviour.complying())
        assert await it.end() == 0
    assert "unplugged vCPU 1 in" in it.shown


async def test_ctrl_c_stops_it_and_shows_the_report(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with on_terminal("set", "0", "--qmp", guest.qmp) as it:
        await it.wait_shown("unplug 1  the guest works on it")
        it.process.send_signal(signal.SIGINT)
        assert await it.end() == 130
    assert "PARTIAL, stopped in" in it.shown
    assert "[0](1)[ ]" in it.shown


@pytest.mark.parametrize("command", ["list", "set 0,3", "plan 0,3", "watch --until 0-1"])
async def test_nothing_is_wider_than_a_narrow_terminal(guest: MicroGuest, command: str) -> None:
    async with on_terminal(*command.split(), "--qmp", guest.qmp, columns=40) as it:
        assert await it.end() == 0
    lines = it.shown.splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 40


async def test_colours_are_for_terminals_and_not_for_those_who_want_none(
    guest: MicroGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def styles() -> set[str]:
        async with on_terminal("list", "--qmp", guest.qmp) as it:
            assert await it.end() == 0
        return {str(span.style) for line in it.screen.coloured for span in line.spans}

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert {"green", "bold"} <= await styles()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "green" not in await styles()
    piped = await run("list", "--qmp", guest.qmp)
    assert "\x1b" not in piped.out + piped.err


@pytest.mark.parametrize("since", [None, {3: "12:00:00 (59 min)"}])
@pytest.mark.parametrize("columns", [40, 80, 96, 120])
def test_what_is_proven_fits_into_the_table(columns: int, since: dict[int, str] | None) -> None:
    if since is not None and columns < 80:
        since = {3: "12:00:00"}
    seen = layout({0: "boot", 3: "ours"}, pending=(3,), first_tid=4_000_000)
    props = CpuProps({"socket-id": 0, "core-id": 0, "thread-id": 0})
    proven = replace(seen.slots[3], proven=Proof.ACKNOWLEDGED, proven_at=time.time() - 59 * 60)
    slots = (replace(seen.slots[0], props=props), *seen.slots[1:3], proven, *seen.slots[4:])
    (table,) = vcpu_table(replace(seen, slots=slots), width=columns, since=since)
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= columns
    assert [line for line in lines if "acknowledged" in line]


async def test_a_long_complaint_is_broken_between_words() -> None:
    path = Path("/nonexistent", "a-directory-" * 5, "vm.qmp")
    async with on_terminal("list", "--qmp", path, columns=80) as it:
        assert await it.end() == 3
    lines = it.shown.replace("\r", "").split("\n")
    complaint = next(line for line in lines if line.startswith("qmpvcpu:"))
    assert len(lines) > 2
    assert [line for line in lines if str(path) not in line and len(line) > 80] == []
    in_a_pipe = await run("list", "--qmp", path)
    assert " ".join(" ".join(lines).split()) == " ".join(in_a_pipe.err.split())
    assert complaint
