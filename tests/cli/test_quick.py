"""``list --json`` on its quick way: the same words as on the long one, and nothing loaded that it does not need."""

import signal
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.cli.quick import address_of
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import HANG, ScriptedPeer

from .running import environment, run, running

LONG_WAY = ("--timeout", "7")  # an option that the quick way leaves to the other
# What only people need, and what only those need who stay attached.
OTHERS = ("typer", "rich", "lxml", "aiofiles", "pathlib", "qmpvcpu.vm", "qmpvcpu.engine", "qmpvcpu.planning")


@pytest.mark.parametrize(
    ("words", "address"),
    [
        ("list --json --qmp /run/vm", "/run/vm"),
        ("--qmp=/run/vm --json list", "/run/vm"),
        ("--json list --qmp tcp:host:4444", "tcp:host:4444"),
        ("list --json", "/run/of-environment"),
        ("list --qmp /run/vm", None),
        ("list --json --qmp", None),
        ("list --json --qmp --json", None),
        ("list --json --qmp=", None),
        ("list --json --qmp tcp:host", None),
        ("list --json --qmp /a --qmp /b", None),
        ("list --json --qmpx /a", None),
        ("list --json --json --qmp /a", None),
        ("list --json --verbose --qmp /a", None),
        ("list --json --record list --qmp /a", None),
        ("plug 3 --json --qmp /a", None),
    ],
)
def test_only_the_plain_command_goes_the_quick_way(
    words: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMPVCPU_QMP", "/run/of-environment")
    assert address_of(words.split()) == address


async def test_both_ways_say_the_same(guest: MicroGuest) -> None:
    quick = await run("list", "--json", "--qmp", guest.qmp)
    assert (quick.code, quick.err) == (0, "")
    assert quick == await run("list", "--json", *LONG_WAY, "--qmp", guest.qmp)
    assert quick == await run("--json", "list", env=environment(QMPVCPU_QMP=str(guest.qmp)))


async def test_both_ways_say_that_the_guest_works_on_a_removal(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with qmpvcpu.attach(guest.sockets[1]) as vm:
        await vm.request_unplug(1)
        await vm.wait_for(lambda _: 1 in vm.layout.pending, timeout=10)
    quick = await run("list", "--json", "--qmp", guest.qmp)
    assert quick.document["pending"] == "1"
    assert quick == await run("list", "--json", *LONG_WAY, "--qmp", guest.qmp)


async def test_it_loads_nothing_of_what_only_others_need(guest: MicroGuest) -> None:
    refusing = "\n".join(f"sys.modules[{name!r}] = None" for name in OTHERS)
    ran = await run("list", "--json", "--qmp", guest.qmp, code=refusing)
    assert ran.document["vm"]["name"] == guest.qmp.stem


async def test_both_ways_tell_an_error_alike(tmp_path: Path) -> None:
    quick = await run("list", "--json", "--qmp", tmp_path / "nobody")
    assert quick.code == 3
    assert quick.error["kind"] == "MonitorConnectError"
    assert quick == await run("list", "--json", *LONG_WAY, "--qmp", tmp_path / "nobody")


@pytest.mark.parametrize("way", [(), ("--timeout", "30")])
async def test_a_signal_ends_both_ways_alike(way: tuple[str, ...]) -> None:
    async with (
        ScriptedPeer(answers={"query-hotpluggable-cpus": HANG}) as peer,
        running("list", "--json", *way, "--qmp", peer.address) as it,
    ):
        await peer.wait_for("query-hotpluggable-cpus")
        it.process.send_signal(signal.SIGTERM)
        ran = await it.end()
    assert ran.code == 130
    assert ran.error["message"] == "stopped by SIGTERM"


@pytest.mark.parametrize("way", [(), LONG_WAY])
async def test_a_full_disk_is_told_on_both_ways(guest: MicroGuest, way: tuple[str, ...]) -> None:
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    ran = await run("list", "--json", *way, "--qmp", guest.qmp, code=full)
    assert ran.code == 1
    assert "cannot print the answer" in ran.err
