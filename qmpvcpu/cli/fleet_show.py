"""What people and programs see of many VMs: rows, the table, the exit code of all, and how far it is."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qmpvcpu.cli.answer import BAD_RECORD, INTERRUPTED, NO_ANSWER, NOT_REACHED, NOT_SENT, REACHED, Answer
from qmpvcpu.cli.documents import document
from qmpvcpu.cli.progress import sentence
from qmpvcpu.cli.reports import shortcoming
from qmpvcpu.cli.run import code_of
from qmpvcpu.cli.show import error_json, in_options, milliseconds, state_json
from qmpvcpu.cli.tally import Tally
from qmpvcpu.errors import TransitionError, printable
from qmpvcpu.fleet import VmResult
from qmpvcpu.model.jsonform import layout_as_json
from qmpvcpu.model.transition import Step
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.stream import EventStream

# Of the codes of all VMs the first of these that occurs is the command's: what nobody knows comes first, what was
# not even begun last.
_WORST_FIRST: Final = (NO_ANSWER, INTERRUPTED, BAD_RECORD, NOT_REACHED, NOT_SENT)
_WORDS: Final = {
    REACHED: ("ok", "green"),
    NOT_REACHED: ("FAILED", "red"),
    NOT_SENT: ("DENIED", "yellow"),
    NO_ANSWER: ("NO ANSWER", "red"),
    BAD_RECORD: ("BAD RECORD", "red"),
    INTERRUPTED: ("STOPPED", "yellow"),
}
# As of one VM: what is over sooner needs no commentary.
_QUIET_S: Final = 0.4
_TICK_S: Final = 0.1
_LINE_S: Final = 1.0
_BAR_WIDTH: Final = 20
_MOST_NAMED: Final = 3
# Lines of a terminal that are for no VM of its own.
_OTHER_LINES: Final = 4
# On a narrower terminal ids and paths would be columns of single letters.
_TABLE_WIDTH: Final = 64


@dataclass(frozen=True, slots=True)
class Row:
    """What one VM came to.

    Attributes:
        address: Its address.
        result: Its result; None: it was not begun, or was given up.
    """

    address: str
    result: VmResult[Any] | None

    @property
    def code(self) -> int:
        """The exit code that this VM alone would have had."""
        if self.result is None or isinstance(self.result.error, asyncio.CancelledError):
            return INTERRUPTED
        return REACHED if self.result.error is None else code_of(self.result.error)

    @property
    def complaint(self) -> str:
        """What went wrong, in a sentence; "" if nothing did."""
        if self.code == REACHED:
            return ""
        error = self.result.error if self.result is not None else None
        if isinstance(error, TransitionError):
            return shortcoming(error.report)
        if error is None or isinstance(error, asyncio.CancelledError):
            return "stopped before anything was sent"
        return in_options(str(error)) or type(error).__name__

    @property
    def told(self) -> str:
        """The complaint, with whose it is."""
        complaint = self.complaint
        return complaint if printable(self.address) in complaint else f"{_short(self.address)}: {complaint}"

    def as_json(self, *, whole: bool) -> dict[str, Any]:
        """Return it as JSON; *whole* has every vCPU of the layout."""
        shown: dict[str, Any] = {
            "address": self.address,
            "name": "",
            "code": self.code,
            "seconds": 0.0,
            "error": None,
        }
        result = self.result
        if self.code != REACHED:
            error = result.error if result is not None else None
            shown["error"] = error_json(KeyboardInterrupt() if error is None else error, self.complaint)
        if result is not None:
            shown |= {"name": result.name, "seconds": round(result.seconds, 6)}
            if result.report is not None:
                shown |= result.report.as_json()
            if result.layout is not None:
                shown |= layout_as_json(result.layout) if whole else state_json(result.layout)
        return shown


def answer(rows: Sequence[Row], *, seconds: float, whole: bool) -> Answer:
    """Return the answer that tells of all: a table, one document, and the worst code."""
    codes = {row.code for row in rows}
    code = next((each for each in _WORST_FIRST if each in codes), REACHED)
    reached = sum(row.code == REACHED for row in rows)
    content = document(
        reached=reached,
        failed=len(rows) - reached,
        seconds=round(seconds, 6),
        vms=[row.as_json(whole=whole) for row in rows],
    )
    head = f"{reached} of {len(rows)} VMs {'read' if whole else 'reached'} in {milliseconds(seconds)}"
    complaint = tuple(row.told for row in rows if row.code != REACHED)
    return Answer(code, content, Group(head, "", _VmRows(rows)), complaint)


class _VmRows:
    """The VMs: a table where there is room for it, else some lines for each."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = tuple(rows)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= _TABLE_WIDTH:
            yield _table(self._rows)
            return
        for row in self._rows:
            name, address, word, *state = _cells(row)
            yield Text.assemble((str(name or address), "bold"), ": ", word)
            if name:
                yield Text(f"  {address}")
            if state:
                plugged, ids, pending, took = state
                if ids:
                    yield Text(f"  {plugged} plugged: {ids}" + (f", pending {pending}" if pending else ""))
                yield Text(f"  in {took}")


def _table(rows: Iterable[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("VM", overflow="fold", min_width=4)
    table.add_column("QMP socket", overflow="fold", min_width=10)
    table.add_column("state", no_wrap=True)
    table.add_column("plugged", no_wrap=True, justify="right")
    table.add_column("vCPUs", overflow="fold")
    table.add_column("pending", overflow="fold")
    table.add_column("time", no_wrap=True, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str | Text]:
    """Return what stands in the row of one VM: name, socket, state; and where it was begun the rest."""
    word, style = _WORDS[row.code]
    result = row.result
    if result is None:
        return ["", _short(row.address), Text(word, style)]
    if result.report is not None:
        word = result.report.outcome.name.replace("_", " ")
    layout = result.layout
    state = ("", "", "")
    if layout is not None:
        state = (f"{len(layout.enabled)} of {layout.max}", str(layout.enabled), str(layout.pending))
    return [printable(result.name), _short(row.address), Text(word, style), *state, milliseconds(result.seconds)]


def _short(address: str) -> str:
    return printable(address.removeprefix("unix:"))


class Told:
    """Counts the VMs that are done, and shows it with what the others do: on a terminal, else a line now and then."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._left = dict.fromkeys(addresses)
        self._total = len(self._left)
        self._failed = 0
        self._doing: dict[str, str] = {}

    @contextlib.asynccontextmanager
    async def shown(self, console: Console) -> AsyncIterator[None]:
        """Show it on *console* while the body runs."""
        task = asyncio.create_task(self._show(console))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    def take(self, result: VmResult[Any]) -> None:
        """Take in that one VM is done."""
        self._left.pop(result.address, None)
        self._failed += result.error is not None

    @contextlib.asynccontextmanager
    async def following(self, vm: VcpuController, steps: Iterable[Step]) -> AsyncIterator[None]:
        """Show what becomes of *steps* on *vm* while the body runs."""
        task = asyncio.create_task(self._follow(vm.address, vm.events(), Tally(steps)))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})
            self._doing.pop(vm.address, None)

    async def _follow(self, address: str, events: EventStream, tally: Tally) -> None:
        async for event in events:
            tally.take(event)
            self._doing[address] = f"{tally}: {sentence(event)}"

    def __str__(self) -> str:
        failed = f", {self._failed} failed" if self._failed else ""
        few = len(self._left) <= _MOST_NAMED
        waiting = f"; waiting for {', '.join(map(_short, self._left))}" if self._left and few else ""
        return f"{self._total - len(self._left)} of {self._total} VMs{failed}{waiting}"

    async def _show(self, console: Console) -> None:
        started = time.monotonic()
        await asyncio.sleep(_QUIET_S)
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while True:
                    live.update(self._board(console, time.monotonic() - started), refresh=True)
                    await asyncio.sleep(_TICK_S)
        shown = ""
        while True:
            if str(self) != shown:
                shown = str(self)
                console.print(f"{time.monotonic() - started:5.1f} s  {shown}", soft_wrap=True)
            await asyncio.sleep(_LINE_S)

    def _board(self, console: Console, seconds: float) -> Group:
        """Return the bar, and a row for each VM that does something, as far as there is room."""
        done = self._total - len(self._left)
        bar = ProgressBar(self._total, done, width=min(_BAR_WIDTH, console.width // 5), complete_style="green")
        head = Table.grid(padding=(0, 2, 0, 0))
        head.add_row(bar, f"{seconds:.0f} s", str(self))
        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(overflow="fold", max_width=console.width // 3)
        rows.add_column(overflow="fold")
        room = max((console.height - _OTHER_LINES) // 2, 1)  # each may take two lines
        for address, words in list(self._doing.items())[:room]:
            rows.add_row(_short(address), Text(words, "yellow"))
        return Group(head, rows)
