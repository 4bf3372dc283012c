"""``stats`` as users see it: in a pipe, as JSON and on a terminal; and its table, of readings made up here."""

import asyncio
import io
import json
import signal
import time
from collections.abc import Mapping
from typing import Any, cast

import pytest

from qmpvcpu.cli.output import Output
from qmpvcpu.cli.stats import By, View
from qmpvcpu.model.codec import from_json
from qmpvcpu.model.counters import KvmCounters
from qmpvcpu.model.statistics import VcpuStatistics, VmStatistics
from qmpvcpu.testing import MicroGuest
from tests.cli.running import environment, on_terminal, run, running
from tests.layouts import layout


@pytest.mark.qemu
async def test_one_document_has_what_was_counted_so_far(guest: MicroGuest) -> None:
    ran = await run("stats", "--json", "--qmp", guest.qmp)
    assert (ran.code, ran.err) == (0, "")
    said = ran.document
    assert (said["name"], said["seconds"], said["why_incomplete"]) == (guest.qmp.stem, None, "")
    assert [each["rates"] for each in said["vcpus"]] == [None, None]
    read = from_json(VmStatistics, said)
    assert [each.id for each in read.vcpus] == [0, 1]
    assert read[0].run_s
    assert abs(read.at - time.time()) < 60


@pytest.mark.qemu
async def test_each_interval_has_its_document_with_the_rates_since(guest: MicroGuest) -> None:
    ran = await run("stats", "--interval", "0.1", "--count", "3", "--json", "--qmp", guest.qmp)
    assert ran.code == 0
    first, *later = ran.documents
    assert first["seconds"] is None
    assert len(later) == 2
    for each in later:
        assert each["seconds"] >= 0.05
        for vcpu in each["vcpus"]:
            assert vcpu["rates"]["run"] + vcpu["rates"]["delay"] + vcpu["rates"]["idle"] == pytest.approx(1, abs=0.1)


@pytest.mark.qemu
@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_documents(guest: MicroGuest, name: signal.Signals) -> None:
    async with running("stats", "--interval", "0.05", "--json", "--qmp", guest.qmp) as it:
        assert it.process.stdout is not None
        for _ in range(2):
            json.loads(await asyncio.wait_for(it.process.stdout.readline(), 20))
        it.process.send_signal(name)
        ran = await it.end()
    assert (ran.code, ran.err) == (0, "")
    assert all(each["vcpus"] for each in ran.documents)


@pytest.mark.qemu
async def test_a_qemu_that_ends_ends_it_with_an_error(guest: MicroGuest) -> None:
    async with running("stats", "--interval", "0.05", "--json", "--qmp", guest.qmp) as it:
        assert it.process.stdout is not None
        await asyncio.wait_for(it.process.stdout.readline(), 20)
        guest.process.kill()
        ran = await it.end()
    assert ran.code == 3
    assert ran.documents[-1]["error"]["kind"] == "MonitorLostError"


@pytest.mark.qemu
@pytest.mark.parametrize("words", [(), ("--json",)])
async def test_it_holds_no_socket_for_a_reader_that_has_left(guest: MicroGuest, words: tuple[str, ...]) -> None:
    nobody_reads = "import os; ours, theirs = os.pipe(); os.close(ours); os.dup2(theirs, 1)"
    more = ("--interval", "0.05", *words)
    async with running("stats", *more, "--qmp", guest.sockets[1], code=nobody_reads) as it:
        ran = await asyncio.wait_for(it.end(), 20)
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.qemu
async def test_a_pipe_gets_one_table_or_as_many_as_it_asks_for(guest: MicroGuest) -> None:
    one = await run("stats", "--qmp", guest.qmp)
    assert (one.code, one.err) == (0, "")
    head, settings, blank, columns, *rows = one.out.splitlines()
    assert "2 of 8 vCPUs plugged: 0-1" in head
    assert settings.endswith(", each 1 s, by wait")
    assert blank == ""
    assert columns.split()[:4] == ["vCPU", "run", "wait", "idle"]
    assert [int(row.split()[0]) for row in rows] in ([0, 1], [1, 0])
    three = await run("stats", "--interval", "0.05", "--count", "3", "--by", "vcpu", "--qmp", guest.qmp)
    tables = three.out.split("\n\n" + head)
    assert len(tables) == 3
    assert "[" not in tables[1]


@pytest.mark.qemu
@pytest.mark.kvm
async def test_qemu_is_asked_for_what_is_shown_and_for_nothing_without_kvm() -> None:
    async with MicroGuest(accel="kvm", boot=2) as kvm:
        words = ("stats", "--interval", "0.05", "--count", "2", "--verbose", "--qmp", kvm.qmp)
        asked = '"names": ["exits", "sum_exits", "blocking"]'
        table = await run(*words)
        assert table.err.count(asked) == 3
        assert "exits/s" in table.out
        times = await run(*words, "--no-kvm")
        assert asked not in times.err
        assert "exits/s" not in times.out
        everything = await run("stats", "--json", "--qmp", kvm.qmp)
        assert len(everything.document["vcpus"][0]["kvm"]) > 20
        assert (await run("stats", "--json", "--no-kvm", "--qmp", kvm.qmp)).document["vcpus"][0]["kvm"] == {}


@pytest.mark.qemu
async def test_a_terminal_has_a_live_table_that_ends_with_ctrl_c(guest: MicroGuest) -> None:
    async with on_terminal("stats", "--interval", "0.05", "--by", "vcpu", "--qmp", guest.sockets[1]) as it:
        await it.wait_on_screen("▁▁▁▁")
        assert (await run("plug", "3", "--qmp", guest.qmp)).code == 0
        await it.wait_on_screen("3 of 8 vCPUs plugged: 0-1,3")
        await it.wait_until(lambda: any(line.split()[:1] == ["3"] for line in it.screen.lines))
        it.process.send_signal(signal.SIGINT)
        assert await it.end() == 0
    rows = [line.split() for line in it.screen.lines if line[:4].strip().isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "3"]
    assert "Traceback" not in it.shown


@pytest.mark.qemu
async def test_the_last_table_stays_on_the_terminal(guest: MicroGuest) -> None:
    async with on_terminal("stats", "--interval", "0.05", "--count", "3", "--qmp", guest.qmp, columns=40) as it:
        assert await it.end() == 0
    assert max(map(len, it.screen.lines)) <= 40
    assert "host CPU" in str(it.screen)
    assert "▁▁▁" in str(it.screen)


@pytest.mark.qemu
async def test_a_terminal_that_has_no_such_letters_gets_plain_ones(guest: MicroGuest) -> None:
    env = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    async with on_terminal("stats", "--interval", "0.05", "--count", "4", "--qmp", guest.qmp, env=env) as it:
        assert await it.end() == 0
    assert "____" in str(it.screen)
    assert str(it.screen).isascii()


def test_the_linux_console_gets_plain_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Console(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    out = Output(Console(io.BytesIO(), encoding="utf-8"))
    monkeypatch.setenv("TERM", "xterm")
    assert out.can_show("▁")
    monkeypatch.setenv("TERM", "linux")
    assert not out.can_show("▁")
    assert out.can_show("_")


# The table, of readings that are made up.


class OneVm:
    """What a view needs of a controller."""

    layout = layout({0: "boot", 3: "ours", 5: "ours"})


class OneScreen:
    """What a view needs of a terminal."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height

    def height_of(self, *blocks: object) -> int:
        return sum(len(str(block).splitlines()) for block in blocks)


def view(*shares: Mapping[int, tuple[float, float]], by: By = By.WAIT, bars: str = "_.-:=+*#", **more: Any) -> View:
    """A view that has seen the vCPUs run and wait with these shares, a second for each."""
    seen = View(cast("Any", OneVm()), by, 1.0, bars=bars)
    sums: dict[int, tuple[float, float]] = {}
    before = None
    for clock, each in enumerate([dict.fromkeys(shares[0], (0.0, 0.0)), *shares]):
        sums = {vcpu: tuple(map(sum, zip(sums.get(vcpu, (0, 0)), each[vcpu], strict=True))) for vcpu in each}  # type: ignore[misc]
        vcpus = tuple(
            VcpuStatistics(vcpu, 100 + vcpu, run, delay, None, 10 * clock, host_cpu=vcpu % 2, **more)
            for vcpu, (run, delay) in sums.items()
        )
        now = VmStatistics("vm", 1.8e9 + clock, float(1 + clock), vcpus)
        seen.take(now, None if before is None else now.since(before))
        before = now
    return seen


def rows(seen: View, width: int = 100, height: int = 30) -> list[str]:
    blocks = seen.picture(cast("Any", OneScreen(width, height)))
    return str(blocks[-1] if len(blocks) == 4 else blocks[-2]).splitlines()


SHARES = {0: (0.5, 0.0), 3: (0.2, 0.1), 5: (0.3, 0.4)}


@pytest.mark.parametrize(("by", "order"), [(By.WAIT, "530"), (By.RUN, "053"), (By.VCPU, "035")])
def test_vcpus_are_sorted_as_is_asked_for(by: By, order: str) -> None:
    _, *told = rows(view(SHARES, by=by))
    assert "".join(line.split()[0] for line in told) == order


def test_a_row_has_shares_turns_and_the_history_of_what_sorts() -> None:
    head, first, *_ = rows(view(SHARES, {**SHARES, 5: (0.3, 0.2)}, SHARES))
    assert head.split()[-2:] == ["wait", "#=40.0%"]
    assert first.split() == ["5", "30.0%", "40.0%", "30.0%", "10", "1", "#=#"]
    assert rows(view(SHARES, by=By.RUN))[0].split()[-2:] == ["run", "#=50.0%"]


def test_kvm_has_columns_of_its_own_where_it_tells() -> None:
    head, first, *_ = rows(view(SHARES, kvm=KvmCounters({"exits": 7}), halted=True))
    assert head.split()[7:9] == ["exits/s", "halted"]
    assert first.split()[6:8] == ["0", "yes"]
    head, *_ = rows(view(SHARES, kvm=KvmCounters({"exits": 7})))
    assert "halted" not in head


def test_a_small_terminal_has_what_fits() -> None:
    seen = view(SHARES)
    for width in (20, 40, 60, 80):
        assert max(map(len, rows(seen, width))) <= max(width, 28)
    few = seen.picture(cast("Any", OneScreen(80, 8)))
    assert str(few[-1]) == "2 more"
    assert len(str(few[-2]).splitlines()) == 2


def test_a_vcpu_that_left_and_came_back_has_a_gap_in_its_history() -> None:
    without = {vcpu: share for vcpu, share in SHARES.items() if vcpu != 5}
    assert rows(view(SHARES, without, SHARES))[1].endswith("# #")
    late = view(without, without, SHARES)
    assert rows(late)[1].endswith("    #")
    assert [len(line) for line in rows(late)[1:]] == [len(rows(late)[1])] * 3
