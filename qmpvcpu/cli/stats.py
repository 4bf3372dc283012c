"""stats: what a VM's vCPUs do: a live table, a table for a pipe, or a document each time they are read."""

import asyncio
import enum
import itertools
import sys
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from qmpvcpu.cli.options import READ_OPTIONS, Seconds, command, flag, option
from qmpvcpu.cli.output import Block, Column, Line, Table
from qmpvcpu.cli.progress import kept
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import headline
from qmpvcpu.documents.document import REACHED, as_line, document
from qmpvcpu.documents.readings import statistics_json
from qmpvcpu.errors import printable
from qmpvcpu.model.counters import EXITS, HALTED

if TYPE_CHECKING:
    from qmpvcpu.cli.terminal import Screen
    from qmpvcpu.model.statistics import VcpuRates, VcpuStatistics, VmRates, VmStatistics
    from qmpvcpu.vm.controller import VcpuController

_USUAL_INTERVAL_S: Final = 1.0
_SHORTEST_INTERVAL_S: Final = 0.05
# A vCPU that another client has plugged, and no guest acknowledges, has a row within this time.
_RESYNC_S: Final = 5.0
_KEPT: Final = 120  # readings, for the line of history
_LEAST_HISTORY: Final = 4  # letters; shorter ones say nothing
_LEAST_SCALE: Final = 0.01  # shares below are noise, and are drawn low
_NARROW: Final = 60  # a terminal that is narrower has the columns that matter most
_OTHER_LINES: Final = 4  # below the head: a blank one, the names of columns, what is cut, the cursor's
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_WAITS, _WAITS_MUCH = 0.1, 0.5  # shares that are shown in yellow, and in red


class By(enum.Enum):
    """What comes first: the vCPU that waits most, that runs most, or that with the lowest id."""

    WAIT = "wait"
    RUN = "run"
    VCPU = "vcpu"


class _Row(NamedTuple):
    """One vCPU: what it has done, and what it did since the reading before."""

    now: "VcpuStatistics"
    rates: "VcpuRates"

    def share(self, by: By) -> float | None:
        """Return what its history is made of: the share in which it waits, or ran."""
        return self.rates.run if by is By.RUN else self.rates.delay


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
    *READ_OPTIONS,
)
async def stats(shell: Shell, *, interval: float | None, count: int | None, no_kvm: bool, by: By) -> CommandResult:
    """Show what each vCPU does: how much it runs, and waits for a host CPU. Reads only.

    run, wait, idle: shares of the time; the guest sees wait as steal. turns: how often per second it got a host CPU.
    Under KVM: exits per second, and whether it is halted at the moment. On a terminal the table is live, with a
    history of each vCPU; otherwise it is printed once, or each --interval. --json prints one document of the counts
    so far; with --interval, one a line, with the rates since the previous line.

    Times are those of QEMU's threads on this host; for a QEMU elsewhere there are only KVM's counters.

      qmpvcpu stats --qmp /run/vm.qmp

      qmpvcpu stats --by run --interval 5 --count 12 --qmp /run/vm.qmp

      qmpvcpu stats --interval 10 --json --qmp /run/vm.qmp

    Exit codes: 0 shown, or a signal came; 2 bad usage; 3 no connection, or QEMU lost; 4 record unreadable or locked.
    """
    if interval is not None and interval < _SHORTEST_INTERVAL_S:
        raise BadUsageError(f"--interval {interval:g}: it is {_SHORTEST_INTERVAL_S:g} or more")
    live = shell.out.draws and not shell.options.json
    if count is None and interval is None and not live:
        count = 1
    async with shell.attach(resync_interval=_RESYNC_S, read_only=True) as vm:
        kvm = () if no_kvm else None if shell.options.json else (*EXITS, HALTED)
        readings = _Readings(vm, interval or _USUAL_INTERVAL_S, kvm)
        showing = asyncio.create_task(_show(shell, readings, count, by))

        async def stop() -> None:
            showing.cancel()

        with shell.signals.stopped_by(stop):
            await asyncio.wait({showing})
        if not showing.cancelled():
            showing.result()  # raises what went wrong
    return CommandResult(REACHED, {})


class _Readings(NamedTuple):
    """A VM that is read again and again.

    Attributes:
        vm: The VM.
        interval: How long it is from one reading to the next, in seconds.
        kvm: Which of KVM's counters are read; None: all.
    """

    vm: "VcpuController"
    interval: float
    kvm: Collection[str] | None

    async def take(self, count: int | None) -> "AsyncIterator[tuple[VmStatistics, VmRates | None]]":
        """Give *count* readings, None: without end, and what each vCPU did since the one before."""
        clock = asyncio.get_running_loop().time
        due = clock()
        before: VmStatistics | None = None
        for number in itertools.count():
            if number == count:
                return
            await asyncio.sleep(due - clock())
            due = max(due + self.interval, clock())  # what was missed is not made up for
            now = await self.vm.statistics(kvm=self.kvm)
            yield now, None if before is None else now.since(before)
            before = now


async def _show(shell: Shell, readings: _Readings, count: int | None, by: By) -> None:
    if shell.options.json:
        async for now, rates in readings.take(count):
            shell.put(partial(sys.stdout.write, as_line(document(**statistics_json(now, rates)))))
            if shell.stdout_closed:
                return
        return
    view = View(readings.vm, by, readings.interval, bars=_BARS if shell.out.can_show(_BARS) else _ASCII_BARS)
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


class View:
    """The table of vCPUs, as it was read last, with what was read before."""

    def __init__(self, vm: "VcpuController", by: By, interval: float, *, bars: str) -> None:
        self._vm = vm
        self._by = by
        self._interval = interval
        self._bars = bars
        self._why = ""
        self._at = 0.0
        self._rows: list[_Row] = []
        self._history: defaultdict[int, deque[float | None]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def take(self, now: "VmStatistics", rates: "VmRates | None") -> None:
        """Take a reading in."""
        self._why, self._at = now.why_incomplete, now.at
        if rates is None:
            return
        rows = [_Row(*pair) for pair in zip(now.vcpus, rates.vcpus, strict=True)]
        for vcpu, history in self._history.items():
            if vcpu not in {row.now.id for row in rows}:
                history.append(None)
        for row in rows:
            self._history[row.now.id].append(row.share(self._by))
        self._rows = sorted(rows, key=self._key)

    def _key(self, row: _Row) -> tuple[float, int]:
        return 0.0 if self._by is By.VCPU else -(row.share(self._by) or 0.0), row.now.id

    def picture(self, screen: "Screen | None") -> list[Block]:
        """Return it as large as *screen* is; None: all of it, without history, for a file or a pipe."""
        width = None if screen is None else screen.width
        at = datetime.fromtimestamp(self._at).astimezone().strftime("%H:%M:%S, ") if self._at else ""
        head: list[Block] = [headline(self._vm.layout, width)]
        head.append(Line((f"{at}each {self._interval:g} s, by {self._by.value}", "dim")))
        if self._why:
            head.append(Line((printable(self._why), "yellow")))
        rows = self._rows
        if screen is not None:
            room = max(screen.height - screen.height_of(*head) - _OTHER_LINES, 2)
            rows = rows if len(rows) <= room else rows[: room - 1]
        cut = len(self._rows) - len(rows)
        table = [self._table(rows, width)] if rows else []
        return [*head, "", *table, *([Line(f"{cut} more", style="dim")] if cut else [])]

    def _table(self, rows: Sequence[_Row], width: int | None) -> Table:
        narrow = width is not None and width < _NARROW
        columns = _columns(rows, narrow=narrow)
        table = Table(*(Column(head, "right") for head, _ in columns), gap=1 if narrow else 2)
        for row in rows:
            table.add(*(cell(row) for _, cell in columns), style=_style(row))
        left = 0 if width is None else width - max(map(len, str(table).splitlines())) - table.gap - 1
        return table if left < _LEAST_HISTORY else self._with_history(table, rows, min(left, _KEPT))

    def _with_history(self, table: Table, rows: Sequence[_Row], width: int) -> Table:
        recent = [list(self._history[row.now.id])[-width:] for row in rows]
        top = max((share for history in recent for share in history if share is not None), default=0.0)
        scale = max(top, _LEAST_SCALE)
        what = "run" if self._by is By.RUN else "wait"
        head = f"{what} {self._bars[-1]}={_percent(scale)}"
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


def _columns(rows: Sequence[_Row], *, narrow: bool) -> "list[tuple[str, Callable[[_Row], str]]]":
    """Return the columns with what they show."""
    columns: list[tuple[str, Callable[[_Row], str]]] = [
        ("vCPU", lambda row: str(row.now.id)),
        ("run", lambda row: _percent(row.rates.run)),
        ("wait", lambda row: _percent(row.rates.delay)),
    ]
    if not narrow:
        columns.append(("idle", lambda row: _percent(row.rates.idle)))
        columns.append(("turns/s", lambda row: _number(row.rates.turns)))
    columns.append(("host CPU", lambda row: "-" if row.now.host_cpu is None else str(row.now.host_cpu)))
    if not narrow and any(row.now.kvm for row in rows):
        columns.append(("exits/s", lambda row: _number(_exits(row))))
        if any(row.now.halted is not None for row in rows):
            columns.append(("halted", lambda row: {True: "yes", False: "no", None: "-"}[row.now.halted]))
    return columns


def _style(row: _Row) -> str:
    waits = row.rates.delay or 0.0
    return "red" if waits >= _WAITS_MUCH else "yellow" if waits >= _WAITS else ""


def _exits(row: _Row) -> float | None:
    return next((row.rates.kvm[name] for name in EXITS if name in row.rates.kvm), None)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
