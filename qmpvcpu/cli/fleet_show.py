"""What people and programs see of many VMs: rows, the table, the exit code of all, and how far it is."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qmpvcpu.cli.reports import shortcoming
from qmpvcpu.cli.run import BAD_RECORD, INTERRUPTED, NO_ANSWER, NOT_REACHED, NOT_SENT, REACHED, Answer, code_of
from qmpvcpu.cli.show import document, error_json, in_options, milliseconds, state_json
from qmpvcpu.fleet import VmResult
from qmpvcpu.model import TransitionError
from qmpvcpu.model.jsonform import layout_as_json

__all__ = ["Row", "answer", "telling"]

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
        return complaint if self.address in complaint else f"{_short(self.address)}: {complaint}"

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
    return Answer(code, content, Group(head, "", _table(rows)), complaint)


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
        word, style = _WORDS[row.code]
        result = row.result
        if result is None:
            table.add_row("", _short(row.address), Text(word, style))
            continue
        if result.report is not None:
            word = result.report.outcome.name.replace("_", " ")
        layout = result.layout
        state = ("", "", "")
        if layout is not None:
            state = (f"{len(layout.enabled)} of {layout.max}", str(layout.enabled), str(layout.pending))
        table.add_row(result.name, _short(row.address), Text(word, style), *state, milliseconds(result.seconds))
    return table


def _short(address: str) -> str:
    return address.removeprefix("unix:")


@contextlib.asynccontextmanager
async def telling(addresses: Iterable[str], console: Console) -> AsyncIterator[Callable[[VmResult[Any]], None]]:
    """Tell how far it is while the body runs; to be called with each result."""
    told = _Told(tuple(addresses))
    task = asyncio.create_task(told.show(console))
    try:
        yield told.take
    finally:
        task.cancel()
        await asyncio.wait({task})


class _Told:
    """Counts, and shows: a bar on a terminal, else a line now and then."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._total = len(addresses)
        self._left = dict.fromkeys(addresses)
        self._failed = 0

    def take(self, result: VmResult[Any]) -> None:
        self._left.pop(result.address, None)
        self._failed += result.error is not None

    def __str__(self) -> str:
        failed = f", {self._failed} failed" if self._failed else ""
        few = len(self._left) <= _MOST_NAMED
        waiting = f"; waiting for {', '.join(map(_short, self._left))}" if self._left and few else ""
        return f"{self._total - len(self._left)} of {self._total} VMs{failed}{waiting}"

    async def show(self, console: Console) -> None:
        started = time.monotonic()
        await asyncio.sleep(_QUIET_S)
        if console.is_terminal:
            columns = (BarColumn(_BAR_WIDTH), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task(str(self), total=self._total)
                while True:
                    bar.update(task, completed=self._total - len(self._left), description=str(self))
                    await asyncio.sleep(_TICK_S)
        shown = ""
        while True:
            if str(self) != shown:
                shown = str(self)
                console.print(f"{time.monotonic() - started:5.1f} s  {shown}", soft_wrap=True)
            await asyncio.sleep(_LINE_S)
