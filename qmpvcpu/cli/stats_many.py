"""stats, of many VMs: what the vCPUs of each do together."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpvcpu.cli.fleet import Row, worst
from qmpvcpu.cli.output import Block, Column, Line
from qmpvcpu.cli.progress import short_address
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.stats import (
    RESYNC_S,
    By,
    RateTable,
    Readings,
    View,
    bars_for,
    exits,
    number,
    percent,
    rates_of_vm,
    settings_line,
    show,
    style_of,
)
from qmpvcpu.cli.vms import Vms, look_again
from qmpvcpu.documents.form import REACHED
from qmpvcpu.documents.readings import statistics_json
from qmpvcpu.errors import counted
from qmpvcpu.fleet import Fleet, VmResult
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.statistics import VmRates, VmStatistics

if TYPE_CHECKING:
    from qmpvcpu.cli.terminal import Screen

_Reading = Sequence[VmResult[VmStatistics]]
_Rates = Mapping[str, VmRates]

# Of a live table: how many VMs that gave no answer are named above it.
_MOST_NAMED = 3


async def stats_of_many(
    shell: Shell, vms: Vms, interval: float, count: int | None, *, kvm: Collection[str] | None, by: By
) -> CommandResult:
    """Show *count* readings of *vms*; of one VM, to people, its vCPUs."""
    async with vms.opened(shell, read_only=True, resync_interval=RESYNC_S) as fleet:
        if not shell.options.json and len(found := await fleet.refresh()) == 1:
            only = _OnlyVm(fleet, found[0].unwrap(), kvm)
            readings = Readings(only.statistics, rates_of_vm, interval)
            await show(shell, readings, View(only, by, interval, bars=bars_for(shell)), count)
            return CommandResult(REACHED, {})
        view = _View(fleet, by, interval, bars=bars_for(shell))

        async def read() -> _Reading:
            if why := await look_again(fleet):
                shell.note(f"qmpvcpu: {why}")
            view.last = await fleet.statistics(kvm=kvm)
            return view.last

        await show(shell, Readings(read, _since, interval), view, count)
    rows = [Row(each.address, each) for each in view.last]
    return CommandResult(
        worst(row.code for row in rows), {}, complaint=tuple(row.told for row in rows if row.complaint)
    )


class _OnlyVm:
    """The only VM of a fleet, as it is read here."""

    def __init__(self, fleet: Fleet, layout: Layout, kvm: Collection[str] | None) -> None:
        self.layout = layout
        self._fleet = fleet
        self._kvm = kvm

    async def statistics(self) -> VmStatistics:
        """Read what its vCPUs have done."""
        (result,) = await self._fleet.statistics(kvm=self._kvm)
        self.layout = result.layout or self.layout
        return result.unwrap()


def _since(now: _Reading, before: _Reading) -> _Rates:
    """Return what the vCPUs of each did between two readings; it is left out where that is not known."""
    earlier = {each.address: each.value for each in before}
    rates: dict[str, VmRates] = {}
    for each in now:
        was = earlier.get(each.address)
        if each.value is not None and was is not None:
            with suppress(ValueError):  # its host was started anew
                rates[each.address] = each.value.since(was)
    return rates


class _VmRow(NamedTuple):
    """One VM: what its vCPUs have done, and what they did since the reading before; None: that is not known."""

    key: str
    now: VmStatistics | None
    rates: VmRates | None

    @property
    def run(self) -> float | None:
        """How many host CPUs it used."""
        return _sum(self._all(lambda vcpu: vcpu.run))

    @property
    def waits(self) -> list[float]:
        """The shares in which its vCPUs waited."""
        return self._all(lambda vcpu: vcpu.delay)

    @property
    def exits(self) -> float | None:
        """Its exits per second."""
        return _sum(self._all(exits))

    @property
    def style(self) -> str:
        """How it is shown."""
        return "red" if self.now is None else style_of(max(self.waits, default=None))

    def share(self, by: By) -> float | None:
        """Return how much it ran, or how much the vCPU waited that waited most."""
        return self.run if by is By.RUN else max(self.waits, default=None)

    def _all(self, of: Callable[[Any], float | None]) -> list[float]:
        vcpus = () if self.rates is None else self.rates.vcpus
        return [value for vcpu in vcpus if (value := of(vcpu)) is not None]


def _sum(values: Sequence[float]) -> float | None:
    return sum(values) if values else None


def _cpus(run: float | None) -> str:
    return "-" if run is None else f"{run:.2f}"


class _View:
    """The table of VMs.

    Attributes:
        last: What each came to at the last reading.
    """

    def __init__(self, fleet: Fleet, by: By, interval: float, *, bars: str) -> None:
        self.last: _Reading = ()
        self._is_local = fleet.is_local
        self._settings = f"each {interval:g} s, by {'name' if by is By.VCPU else by.value}"
        self._taken: _Reading = ()
        self._table: RateTable[_VmRow] = RateTable(by, _columns, bars=bars, told=_cpus if by is By.RUN else percent)

    def take(self, now: _Reading, rates: _Rates | None) -> None:
        """Take a reading in."""
        self._taken = now
        if rates is not None:
            self._table.take([_VmRow(each.address, each.value, rates.get(each.address)) for each in now])

    def as_json(self, now: _Reading, rates: _Rates | None) -> dict[str, Any]:
        """Return a reading for a document."""
        return {"vms": [self._vm_json(each, (rates or {}).get(each.address)) for each in now]}

    def _vm_json(self, each: VmResult[VmStatistics], rates: VmRates | None) -> dict[str, Any]:
        host, name = (None, each.name) if self._is_local else each.address.split("/", 1)
        row = Row(each.address, each).as_json(whole=False)
        said = {} if each.value is None else statistics_json(each.value, rates)
        return {"address": each.address, "host": host, "vm": name, "error": row["error"], **said}

    def picture(self, screen: "Screen | None") -> list[Block]:
        """Return it as large as *screen* is; None: all of it, without history, for a file or a pipe."""
        at = max((each.value.at for each in self._taken if each.value is not None), default=0.0)
        silent = [Row(each.address, each) for each in self._taken if each.error is not None]
        known = len(self._taken) - len(silent)
        head: list[Block] = [f"{known} of {counted(len(self._taken), 'VM')} read", settings_line(at, self._settings)]
        if screen is not None:  # else they are told at the end
            head += [Line((row.told, "red")) for row in silent[:_MOST_NAMED]]
        return self._table.below(head, screen)


def _columns(rows: Sequence[_VmRow], narrow: bool) -> Sequence[tuple[Column, Callable[[_VmRow], str]]]:
    columns: list[tuple[Column, Callable[[_VmRow], str]]] = [
        (Column("VM"), lambda row: short_address(row.key)),
        (Column("run", "right"), lambda row: _cpus(row.run)),
        (Column("wait", "right"), lambda row: percent(max(row.waits, default=None))),
    ]
    if not narrow:
        columns.insert(1, (Column("vCPUs", "right"), lambda row: "-" if row.now is None else str(len(row.now.vcpus))))
        columns.append((Column("mean", "right"), lambda row: percent(_mean(row.waits))))
        if any(row.exits is not None for row in rows):
            columns.append((Column("exits/s", "right"), lambda row: number(row.exits)))
    return columns


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
