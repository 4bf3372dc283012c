"""``stats`` of many VMs: of other hosts, and of this one; and its table, of readings made up here."""

import json
import signal
from pathlib import Path
from typing import Any, cast

import pytest

from qmpvcpu.cli.stats import By
from qmpvcpu.cli.stats_many import _since, _View
from qmpvcpu.errors import MonitorLostError
from qmpvcpu.fleet import VmResult
from qmpvcpu.model.counters import KvmCounters
from qmpvcpu.model.statistics import VcpuStatistics, VmStatistics
from tests.cli.many import hosts_in
from tests.cli.running import on_terminal, run, running
from tests.hosts.world import vm_in


@pytest.mark.qemu
async def test_each_vm_of_other_hosts_has_a_row_and_an_only_one_its_vcpus(tmp_path: Path) -> None:
    async with hosts_in(tmp_path) as hosts:
        ran = await run("stats", "--interval", "0.1", "--count", "1", "--by", "vcpu", "--nats", hosts.url)
        assert (ran.code, ran.err) == (0, "")
        head, settings, blank, columns, *rows = ran.out.splitlines()
        assert (head, blank) == ("2 of 2 VMs read", "")
        assert settings.endswith("each 0.1 s, by name")
        assert columns.split()[:5] == ["VM", "vCPUs", "run", "wait", "mean"]
        assert [row.split()[:2] for row in rows] == [["rack1/web", "2"], ["rack2/db", "2"]]
        assert all(float(row.split()[2]) >= 0 for row in rows)

        told = await run("stats", "--interval", "0.1", "--count", "2", "--json", "--nats", hosts.url)
        assert told.code == 0
        first, second = (each["vms"] for each in told.documents)
        assert [(each["address"], each["host"], each["vm"], each["error"]) for each in first] == [
            ("rack1/web", "rack1", "web", None),
            ("rack2/db", "rack2", "db", None),
        ]
        assert [each["seconds"] for each in first] == [None, None]
        assert all(each["seconds"] > 0 for each in second)
        assert [[vcpu["rates"]["id"] for vcpu in each["vcpus"]] for each in second] == [[0, 1], [0, 1]]

        only = ("--interval", "0.1", "--count", "1", "--nats", hosts.url, "--where", "name=db")
        one = await run("stats", *only)
        assert (one.code, one.err) == (0, "")
        assert one.out.startswith("db (")
        assert "2 of 8 vCPUs plugged: 0-1" in one.out
        assert (await run("stats", "--json", *only)).document["vms"][0]["vm"] == "db"


@pytest.mark.qemu
async def test_one_that_gives_no_answer_holds_no_other_up_and_is_told(tmp_path: Path) -> None:
    async with vm_in(tmp_path, "a") as a, vm_in(tmp_path, "b"):
        gone = tmp_path / "gone.qmp"
        words = ("--interval", "0.1", "--count", "1", "--qmp", tmp_path / "a.qmp", "--qmp", gone)
        ran = await run("stats", *words)
        assert ran.code == 3
        assert ran.out.startswith("1 of 2 VMs read\n")
        assert "gone.qmp" in ran.err
        told = await run("stats", "--json", *words)
        assert told.code == 3
        read, failed = told.document["vms"]
        assert (read["error"], failed["error"]["kind"]) == (None, "MonitorConnectError")
        assert "vcpus" not in failed

        async with running("stats", "--json", "--interval", "0.1", "--dir", tmp_path, "--pattern", "*.qmp") as it:
            assert it.process.stdout is not None
            seen = json.loads(await it.process.stdout.readline())
            assert [each["vm"] for each in seen["vms"]] == ["a", "b"]
            a.process.kill()
            while seen["vms"][0]["vm"] == "a" and seen["vms"][0]["error"] is None:
                seen = json.loads(await it.process.stdout.readline())
            it.process.send_signal(signal.SIGINT)
            await it.end()


@pytest.mark.qemu
async def test_a_terminal_has_a_live_table_with_what_comes(tmp_path: Path) -> None:
    async with vm_in(tmp_path, "a"), vm_in(tmp_path, "b"):
        words = ("--interval", "0.1", "--dir", tmp_path, "--pattern", "*.qmp")
        async with on_terminal("stats", *words, columns=160) as it:
            await it.wait_on_screen("2 of 2 VMs read")
            async with vm_in(tmp_path, "c"):
                await it.wait_on_screen("c.qmp")
                await it.wait_on_screen("3 of 3 VMs read")
                it.process.send_signal(signal.SIGINT)
                assert await it.end() == 0
    assert "Traceback" not in it.shown


# The table, of readings that are made up.


class OneFleet:
    """What a view needs of a fleet."""

    is_local = False


class OneScreen:
    """What a view needs of a terminal."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height

    def height_of(self, *blocks: object) -> int:
        return sum(len(str(block).splitlines()) for block in blocks)


def reading(clock: float, shares: dict[str, list[tuple[float, float]]]) -> list[VmResult[Any]]:
    """VMs whose vCPUs have run and waited for these shares of each second."""
    return [
        VmResult(
            address,
            address,
            None,
            VmStatistics(
                address,
                1.8e9 + clock,
                clock,
                tuple(
                    VcpuStatistics(
                        vcpu,
                        100 + vcpu,
                        run * clock,
                        wait * clock,
                        turns=1,
                        kvm=KvmCounters({"exits": int(clock) * 100}),
                    )
                    for vcpu, (run, wait) in enumerate(vcpus)
                ),
            ),
            None,
            0.1,
        )
        for address, vcpus in shares.items()
    ]


SHARES = {
    "h/busy": [(0.9, 0.05), (0.8, 0.05)],
    "h/waits": [(0.1, 0.6), (0.1, 0.2)],
    "h/idle": [(0.0, 0.0)],
}


def view(by: By) -> _View:
    seen = _View(cast("Any", OneFleet()), by, 1.0, bars="_#")
    before, now = reading(1.0, SHARES), reading(2.0, SHARES)
    seen.take(before, None)
    seen.take(now, _since(now, before))
    return seen


def rows(seen: _View, width: int = 100, height: int = 30) -> list[str]:
    return str(seen.picture(cast("Any", OneScreen(width, height)))[3]).splitlines()


@pytest.mark.parametrize(
    ("by", "order"),
    [
        (By.WAIT, ["h/waits", "h/busy", "h/idle"]),
        (By.RUN, ["h/busy", "h/waits", "h/idle"]),
        (By.VCPU, ["h/busy", "h/idle", "h/waits"]),
    ],
)
def test_vms_are_sorted_as_is_asked_for(by: By, order: list[str]) -> None:
    assert [line.split()[0] for line in rows(view(by))[1:]] == order


def test_a_row_has_the_vcpus_of_a_vm_together() -> None:
    head, first, *_ = rows(view(By.WAIT))
    assert head.split() == ["VM", "vCPUs", "run", "wait", "mean", "exits/s", "wait", "#=60.0%"]
    assert first.split() == ["h/waits", "2", "0.20", "60.0%", "40.0%", "200", "#"]
    assert rows(view(By.RUN))[0].endswith("run #=1.70")


def test_a_narrow_or_low_terminal_has_what_matters_most() -> None:
    assert rows(view(By.WAIT), 40)[0].split()[:3] == ["VM", "run", "wait"]
    assert str(view(By.WAIT).picture(cast("Any", OneScreen(80, 8)))[-1]) == "2 more"


def test_a_vm_of_which_nothing_is_known_since_has_a_row_without_rates() -> None:
    seen = _View(cast("Any", OneFleet()), By.WAIT, 1.0, bars="_#")
    before, now = reading(5.0, {"h/a": [(0.5, 0.1)]}), reading(1.0, {"h/a": [(0.5, 0.1)]})  # its host started anew
    lost: VmResult[Any] = VmResult("h/b", "b", None, None, MonitorLostError("it ended"), 0.1)
    rates = _since([*now, lost], before)
    assert rates == {}
    seen.take([*now, lost], rates)
    head, settings, why, blank, table = map(str, seen.picture(cast("Any", OneScreen(100, 30))))
    assert (head, blank) == ("1 of 2 VMs read", "")
    assert settings.endswith("each 1 s, by wait")
    assert why.startswith("h/b: ")
    assert [line.split()[:4] for line in table.splitlines()[1:]] == [["h/a", "1", "-", "-"], ["h/b", "-", "-", "-"]]
