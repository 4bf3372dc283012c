"""``list`` looks at a VM, and attaches only where a record is named: both say the same, and a look loads little."""

import signal
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import HANG, ScriptedPeer

from .running import environment, run, running

# What only people need, and what only those need who stay attached.
OTHERS = ("rich", "lxml", "aiofiles", "pathlib", "qmpvcpu.vm", "qmpvcpu.engine", "qmpvcpu.planning")


@pytest.fixture
def attached(tmp_path: Path) -> tuple[str, str]:
    """An option with which list attaches; it changes nothing of what is told."""
    return "--record", str(tmp_path / "none.xml")


async def test_both_ways_say_the_same(guest: MicroGuest, attached: tuple[str, str]) -> None:
    looked = await run("list", "--json", "--qmp", guest.qmp)
    assert (looked.code, looked.err) == (0, "")
    assert looked == await run("list", "--json", *attached, "--qmp", guest.qmp)
    assert looked == await run("--json", "list", env=environment(QMPVCPU_QMP=str(guest.qmp)))


async def test_both_ways_say_that_the_guest_works_on_a_removal(guest: MicroGuest, attached: tuple[str, str]) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with qmpvcpu.attach(guest.sockets[1]) as vm:
        await vm.request_unplug(1)
        await vm.wait_for(lambda _: 1 in vm.layout.pending, timeout=10)
    looked = await run("list", "--json", "--qmp", guest.qmp)
    assert looked.document["pending"] == "1"
    assert looked == await run("list", "--json", *attached, "--qmp", guest.qmp)


@pytest.mark.parametrize("more", [("--json",), ()])
async def test_it_loads_nothing_of_what_only_others_need(guest: MicroGuest, more: tuple[str, ...]) -> None:
    refusing = "\n".join(f"sys.modules[{name!r}] = None" for name in OTHERS)
    ran = await run("list", *more, "--qmp", guest.qmp, code=refusing)
    assert ran.code == 0
    assert guest.qmp.stem in ran.out


async def test_both_ways_tell_an_error_alike(tmp_path: Path, attached: tuple[str, str]) -> None:
    looked = await run("list", "--json", "--qmp", tmp_path / "nobody")
    assert looked.code == 3
    assert looked.error["kind"] == "MonitorConnectError"
    assert looked == await run("list", "--json", *attached, "--qmp", tmp_path / "nobody")


@pytest.mark.parametrize("record", [False, True])
async def test_a_signal_ends_both_ways_alike(attached: tuple[str, str], *, record: bool) -> None:
    way = attached if record else ()
    async with (
        ScriptedPeer(answers={"query-hotpluggable-cpus": HANG}) as peer,
        running("list", "--json", *way, "--qmp", peer.address) as it,
    ):
        await peer.wait_for("query-hotpluggable-cpus")
        it.process.send_signal(signal.SIGTERM)
        ran = await it.end()
    assert ran.code == 130
    assert ran.error["message"] == "stopped by SIGTERM"


@pytest.mark.parametrize("record", [False, True])
async def test_a_full_disk_is_told_on_both_ways(
    guest: MicroGuest, attached: tuple[str, str], *, record: bool
) -> None:
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    ran = await run("list", "--json", *(attached if record else ()), "--qmp", guest.qmp, code=full)
    assert ran.code == 1
    assert "cannot print the answer" in ran.err
