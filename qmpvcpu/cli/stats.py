"""stats: what a VM's vCPUs do: a live table, a table for a pipe, or a document each time they are read."""

import asyncio
import enum
import itertools
import sys
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

import click

from qmpvcpu.cli.options import Seconds, command, flag, option
from qmpvcpu.cli.output import Block, Column, Line, Table
from qmpvcpu.cli.progress import kept
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import headline
from qmpvcpu.cli.vms import READ_MANY_OPTIONS, take_many
from qmpvcpu.documents.form import REACHED, as_line, document
from qmpvcpu.documents.readings import statistics_json
from qmpvcpu.errors import printable
from qmpvcpu.model.counters import EXITS, HALTED

if TYPE_CHECKING:
    from qmpvcpu.cli.terminal import Screen
    from qmpvcpu.model.layout import Layout
    from qmpvcpu.model.statistics import VcpuRates, VcpuStatistics, VmRates, VmStatistics

_Reading = TypeVar("_Reading")
_Rates = TypeVar("_Rates")
_Reading_contra = TypeVar("_Reading_contra", contravariant=True)
_Rates_contra = TypeVar("_Rates_contra", contravariant=True)

_USUAL_INTERVAL_S: Final = 1.0
_SHORTEST_INTERVAL_S: Final = 0.05
RESYNC_S: Final = 5.0
"""A vCPU that another client has plugged, and no guest acknowledges, has a row within this time."""
_KEPT: Final = 120  # readings, for the line of history
_LEAST_HISTORY: Final = 4  # letters; shorter ones say nothing
_LEAST_SCALE: Final = 0.01  # shares below are noise, and are drawn low
_NARROW: Final = 60  # a terminal that is narrower has the columns that matter most
_OTHER_LINES: Final = 4  # below the head: a blank one, the names of columns, what is cut, the cursor's
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_WAITS, _WAITS_MUCH = 0.1, 0.5  # shares that are shown in yellow, and in red


class By(enum.Enum):
    """What comes first: the vCPU that waits most, that runs most, or that with the lowest id; of VMs, by name."""

    WAIT = "wait"
    RUN = "run"
    VCPU = "vcpu"


@command(
    option(
        "--interval",
        metavar="SECONDS",
        type=Seconds(),
        help=f"Time between readings ({_USUAL_INTERVAL_S:g}).",
    ),
    option("--count", metavar="N", type=click.IntRange(min=1), help="End after N tables, or documents."),
    flag("--no-kvm", "Read the times only: QEMU before 8.1 interrupts each vCPU to read KVM's counters."),
    option("--by", default=By.WAIT, help="What comes first, and what the history shows."),
    *READ_MANY_OPTIONS,
)
async def stats(
    shell: Shell, *, interval: float | None, count: int | None, no_kvm: bool, by: By, **vms: Any
) -> CommandResult:
    """Show what each vCPU does: how much it runs, and waits for a host CPU. Reads only.

    run, wait, idle: shares of the time; the guest sees wait as steal. turns: how often per second it got a host CPU.
    Under KVM: exits per second, and whether it is halted at the moment. On a terminal the table is live, with a
    history of each vCPU; otherwise it is printed once, or each --interval. --json prints one document of the counts
    so far; with --interval, one a line, with the rates since the previous line.

    Times are those of QEMU's threads on this host; for a QEMU elsewhere there are only KVM's counters.

    With --nats, --dir or more than one --qmp: a row for each VM. run: how many host CPUs its vCPUs used together.
    wait: how much the worst of them waited; mean: their average. A single VM is shown with its vCPUs. --json has
    everything.

      qmpvcpu stats --qmp /run/vm.qmp

      qmpvcpu stats --by run --interval 5 --count 12 --qmp /run/vm.qmp

      qmpvcpu stats --interval 10 --json --qmp /run/vm.qmp

      qmpvcpu stats --nats nats://10.0.0.1:4222 --where 'host=rack1-*'

    Exit codes: 0 shown, or a signal came; 2 bad usage; 3 no connection, or QEMU lost (with many VMs:
    any, at the last reading); 4 record unreadable or locked.
    """
    if interval is not None and interval < _SHORTEST_INTERVAL_S:
        raise BadUsageError(f"--interval {interval:g}: it is {_SHORTEST_INTERVAL_S:g} or more")
    many = take_many(shell, vms)
    live = shell.out.draws and not shell.options.json
    if count is None and interval is None and not live:
        count = 1
    interval = interval or _USUAL_INTERVAL_S
    kvm = () if no_kvm else None if shell.options.json else (*EXITS, HALTED)
    if many is not None:
        from qmpvcpu.cli.stats_many import stats_of_many  # not at the top: one VM does without

        return await stats_of_many(shell, many, interval, count, kvm=kvm, by=by)
    async with shell.attach(resync_interval=RESYNC_S, read_only=True) as vm:
        readings = Readings(lambda: vm.statistics(kvm=kvm), rates_of_vm, interval)
        await show(shell, readings, View(vm, by, interval, bars=bars_for(shell)), count)
    return CommandResult(REACHED, {})


def rates_of_vm(now: "VmStatistics", before: "VmStatistics") -> "VmRates":
    """Return what a VM's vCPUs did between two readings."""
    return now.since(before)


@dataclass(frozen=True)
class Readings(Generic[_Reading, _Rates]):
    """Something that is read again and again.

    Attributes:
        read: Reads it.
        since: Returns what was done from the reading that is given second to that which is given first.
        interval: How long it is from one reading to the next, in seconds.
    """

    read: Callable[[], Awaitable[_Reading]]
    since: Callable[[_Reading, _Reading], _Rates]
    interval: float

    async def take(self, count: int | None) -> AsyncIterator[tuple[_Reading, _Rates | None]]:
        """Give *count* readings, None: without end, and what was done since the one before."""
        clock = asyncio.get_running_loop().time
        due = clock()
        before: _Reading | None = None
        for number in itertools.count():
            if number == count:
                return
            await asyncio.sleep(due - clock())
            due = max(due + self.interval, clock())  # what was missed is not made up for
            now = await self.read()
            yield now, None if before is None else self.since(now, before)
            before = now


class Shown(Protocol[_Reading_contra, _Rates_contra]):
    """How readings are shown."""

    def take(self, now: _Reading_contra, rates: _Rates_contra | None) -> None:
        """Take a reading in."""

    def picture(self, screen: "Screen | None") -> list[Block]:
        """Return it as large as *screen* is; None: all of it, without history, for a file or a pipe."""

    def as_json(self, now: _Reading_contra, rates: _Rates_contra | None) -> dict[str, Any]:
        """Return a reading for a document."""


async def show(
    shell: Shell, readings: Readings[_Reading, _Rates], view: Shown[_Reading, _Rates], count: int | None
) -> None:
    """Show *count* readings, None: without end, until a signal comes or nobody reads."""
    showing = asyncio.create_task(_show(shell, readings, view, count))

    async def stop() -> None:
        showing.cancel()

    with shell.signals.stopped_by(stop):
        await asyncio.wait({showing})
    if not showing.cancelled():
        showing.result()  # raises what went wrong


async def _show(
    shell: Shell, readings: Readings[_Reading, _Rates], view: Shown[_Reading, _Rates], count: int | None
) -> None:
    if shell.options.json:
        async for now, rates in readings.take(count):
            shell.put(partial(sys.stdout.write, as_line(document(**view.as_json(now, rates)))))
            if shell.stdout_closed:
                return
        return
    taken = readings.take(None if count is None else count + 1)  # the first has no rates yet
    if shell.out.draws:
        async with kept(view, shell.out):
            async for now, rates in taken:
                view.take(now, rates)
        return
    apart: list[Block] = []
    async for now, rates in taken:
        if rates is not None:
            view.take(now, rates)
            shell.say(*apart, *view.picture(None))
            apart = [""]
        if shell.stdout_closed:
            return


def bars_for(shell: Shell) -> str:
    """Return the letters that draw a history on standard output, from low to high."""
    return _BARS if shell.out.can_show(_BARS) else _ASCII_BARS


class Rated(Protocol):
    """What has a row: whose it is, and its rates."""

    @property
    def key(self) -> int | str:
        """What tells it from the others, and orders them."""

    @property
    def style(self) -> str:
        """How it is shown."""

    def share(self, by: By) -> float | None:
        """Return what its history is made of: the share in which it waits, or ran."""


_Row = TypeVar("_Row", bound=Rated)
Columns = Callable[[Sequence[_Row], bool], Sequence[tuple[Column, Callable[[_Row], str]]]]


class RateTable(Generic[_Row]):
    """Rows of rates, sorted, each with a history of what sorts them.

    Args:
        by: What sorts them.
        columns: Returns, for rows and whether the terminal is narrow, the columns with what they show.
        bars: The letters of the history.
        told: Shows a number of the history.
    """

    def __init__(
        self, by: By, columns: "Columns[_Row]", *, bars: str, told: Callable[[float | None], str] | None = None
    ) -> None:
        self._by = by
        self._columns = columns
        self._bars = bars
        self._told = told or percent
        self._rows: list[_Row] = []
        self._history: defaultdict[int | str, deque[float | None]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def take(self, rows: Sequence[_Row]) -> None:
        """Take in how they are now."""
        for key, history in self._history.items():
            if key not in {row.key for row in rows}:
                history.append(None)
        for row in rows:
            self._history[row.key].append(row.share(self._by))
        self._rows = sorted(rows, key=self._order)

    def _order(self, row: _Row) -> tuple[float, Any]:
        return 0.0 if self._by is By.VCPU else -(row.share(self._by) or 0.0), row.key

    def below(self, head: Sequence[Block], screen: "Screen | None") -> list[Block]:
        """Return *head* with the table below it, as large as *screen* is; None: all of it, without history."""
        width = None if screen is None else screen.width
        rows = self._rows
        if screen is not None:
            room = max(screen.height - screen.height_of(*head) - _OTHER_LINES, 2)
            rows = rows if len(rows) <= room else rows[: room - 1]
        cut = len(self._rows) - len(rows)
        table = [self._table(rows, width)] if rows else []
        return [*head, "", *table, *([Line(f"{cut} more", style="dim")] if cut else [])]

    def _table(self, rows: Sequence[_Row], width: int | None) -> Table:
        narrow = width is not None and width < _NARROW
        columns = self._columns(rows, narrow)
        table = Table(*(column for column, _ in columns), gap=1 if narrow else 2)
        for row in rows:
            table.add(*(cell(row) for _, cell in columns), style=row.style)
        left = 0 if width is None else width - max(map(len, str(table).splitlines())) - table.gap - 1
        return table if left < _LEAST_HISTORY else self._with_history(table, rows, min(left, _KEPT))

    def _with_history(self, table: Table, rows: Sequence[_Row], width: int) -> Table:
        recent = [list(self._history[row.key])[-width:] for row in rows]
        top = max((share for history in recent for share in history if share is not None), default=0.0)
        scale = max(top, _LEAST_SCALE)
        what = "run" if self._by is By.RUN else "wait"
        head = f"{what} {self._bars[-1]}={self._told(scale)}"
        drawn = Table(*table.columns, Column(head if len(head) <= width else what), gap=table.gap)
        longest = max(map(len, recent))
        for (cells, style), history in zip(table.rows, recent, strict=True):
            bars = "".join(self._bar(share, scale) for share in history)
            drawn.add(*cells, bars.rjust(longest), style=style)  # the last reading is at the right
        return drawn

    def _bar(self, share: float | None, scale: float) -> str:
        if share is None:
            return " "
        return self._bars[min(int(share / scale * len(self._bars)), len(self._bars) - 1)]


class VcpuRow(NamedTuple):
    """One vCPU: what it has done, and what it did since the reading before."""

    now: "VcpuStatistics"
    rates: "VcpuRates"

    @property
    def key(self) -> int:
        """Its id."""
        return self.now.id

    @property
    def style(self) -> str:
        """How it is shown."""
        return style_of(self.rates.delay)

    def share(self, by: By) -> float | None:
        """Return the share in which it waits, or ran."""
        return self.rates.run if by is By.RUN else self.rates.delay


class _Layouted(Protocol):
    """What has a layout: a controller."""

    @property
    def layout(self) -> "Layout":
        """As it is known now."""


class View:
    """The table of the vCPUs of one VM, as it was read last, with what was read before."""

    def __init__(self, vm: _Layouted, by: By, interval: float, *, bars: str) -> None:
        self._vm = vm
        self._settings = f"each {interval:g} s, by {by.value}"
        self._why = ""
        self._at = 0.0
        self._table: RateTable[VcpuRow] = RateTable(by, _columns, bars=bars)

    def take(self, now: "VmStatistics", rates: "VmRates | None") -> None:
        """Take a reading in."""
        self._why, self._at = now.why_incomplete, now.at
        if rates is not None:
            self._table.take([VcpuRow(*pair) for pair in zip(now.vcpus, rates.vcpus, strict=True)])

    def as_json(self, now: "VmStatistics", rates: "VmRates | None") -> dict[str, Any]:
        """Return a reading for a document."""
        return statistics_json(now, rates)

    def picture(self, screen: "Screen | None") -> list[Block]:
        """Return it as large as *screen* is; None: all of it, without history, for a file or a pipe."""
        width = None if screen is None else screen.width
        head: list[Block] = [headline(self._vm.layout, width), settings_line(self._at, self._settings)]
        if self._why:
            head.append(Line((printable(self._why), "yellow")))
        return self._table.below(head, screen)


def settings_line(at: float, settings: str) -> Line:
    """Return when it was read, 0: not yet, and how."""
    when = datetime.fromtimestamp(at).astimezone().strftime("%H:%M:%S, ") if at else ""
    return Line((f"{when}{settings}", "dim"))


def _columns(rows: Sequence[VcpuRow], narrow: bool) -> "Sequence[tuple[Column, Callable[[VcpuRow], str]]]":
    """Return the columns with what they show."""
    columns: list[tuple[str, Callable[[VcpuRow], str]]] = [
        ("vCPU", lambda row: str(row.now.id)),
        ("run", lambda row: percent(row.rates.run)),
        ("wait", lambda row: percent(row.rates.delay)),
    ]
    if not narrow:
        columns.append(("idle", lambda row: percent(row.rates.idle)))
        columns.append(("turns/s", lambda row: number(row.rates.turns)))
    columns.append(("host CPU", lambda row: "-" if row.now.host_cpu is None else str(row.now.host_cpu)))
    if not narrow and any(row.now.kvm for row in rows):
        columns.append(("exits/s", lambda row: number(exits(row.rates))))
        if any(row.now.halted is not None for row in rows):
            columns.append(("halted", lambda row: {True: "yes", False: "no", None: "-"}[row.now.halted]))
    return [(Column(head, "right"), cell) for head, cell in columns]


def style_of(waits: float | None) -> str:
    """Return how something is shown that waits for a host CPU for this share of the time."""
    waits = waits or 0.0
    return "red" if waits >= _WAITS_MUCH else "yellow" if waits >= _WAITS else ""


def exits(rates: "VcpuRates") -> float | None:
    """Return a vCPU's exits per second; None: KVM does not tell."""
    return next((rates.kvm[name] for name in EXITS if name in rates.kvm), None)


def percent(share: float | None) -> str:
    """Return a share of the time as it is shown."""
    return "-" if share is None else f"{share * 100:.1f}%"


def number(value: float | None) -> str:
    """Return how often something was as it is shown."""
    return "-" if value is None else f"{value:,.0f}"
