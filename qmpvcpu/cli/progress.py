"""What a guest is doing while it takes its time, told on standard error from the VM's events alone."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from qmpvcpu import EventStream, VcpuController
from qmpvcpu.model import (
    Action,
    Disconnected,
    Event,
    InstanceChanged,
    LayoutChanged,
    MigrationChanged,
    Reconnected,
    Step,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlugged,
    VcpuUnplugged,
    VmReset,
    VmResumed,
    VmStopped,
)

__all__ = ["Tally", "progress", "sentence"]

# A guest that answers sooner needs no commentary.
_QUIET_S = 0.4
_TICK_S = 0.1
_BAR_WIDTH = 16

_SENTENCES: Final[Mapping[type[Event], str]] = {
    VcpuPlugged: "vCPU {event.ids} is plugged",
    UnplugRequested: "vCPU {event.ids}: the guest is asked, and has not reacted yet",
    UnplugAcknowledged: "vCPU {event.ids}: the guest works on it",
    UnplugRefused: "vCPU {event.ids}: the guest refused: {event.reason}",
    UnplugPending: "vCPU {event.ids}: no answer in time, it is pending",
    VcpuUnplugged: "vCPU {event.ids} is gone",
    VmStopped: "the VM is paused: the guest answers when it runs again",
    VmResumed: "the VM runs again",
    VmReset: "the VM was reset: what is pending stays so",
    MigrationChanged: "migration: {event.status}",
    LayoutChanged: "a read showed what no event had told",
    Disconnected: "the QMP connection is lost: {event.why}",
    Reconnected: "the QMP connection is back",
    InstanceChanged: "another QEMU runs this VM now: what was pending is void",
}


@contextlib.asynccontextmanager
async def progress(
    vm: VcpuController, console: Console, *, wanted: str, steps: Iterable[Step] = ()
) -> AsyncIterator[None]:
    """Say what *vm*'s guest does for as long as the body runs.

    Args:
        vm: The VM.
        console: Where to say it.
        wanted: What the body waits for, until something happens.
        steps: What the body is to bring about; it is told how many of them are settled.
    """
    narrator = _Narrator(console, wanted, Tally(steps))
    tasks = [asyncio.create_task(narrator.listen(vm.events())), asyncio.create_task(narrator.show())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sentence(event: Event) -> str:
    """Return what *event* means to somebody who waits."""
    if isinstance(event, LayoutChanged) and event.resync:
        return "too much happened at once: some events were dropped"
    return _SENTENCES[type(event)].format(event=event)


class Tally:
    """Counts from events which of *steps* are settled, one way or the other, and which are undone again.

    Attributes:
        total: How many steps there are.
        settled: How many of them are answered.
        undone: How many of those are undone.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self._open = {step.first: step.action for step in steps}
        self._done: dict[int, Action] = {}
        self.total = len(self._open)
        self.undone = 0

    @property
    def settled(self) -> int:
        """How many are answered."""
        return self.total - len(self._open)

    def take(self, event: Event) -> None:
        """Take one event in."""
        match event:
            case VcpuPlugged(ids=ids):
                self._settle(min(ids), Action.PLUG)
            case VcpuUnplugged(ids=ids):
                self._settle(min(ids), Action.UNPLUG)
            case UnplugRefused(ids=ids) | UnplugPending(ids=ids):
                self._open.pop(min(ids), None)

    def _settle(self, first: int, action: Action) -> None:
        wanted = self._open.get(first)
        if wanted is action or (wanted is Action.KEEP and action is Action.PLUG):
            self._done[first] = self._open.pop(first)
        elif first in self._done and self._done[first] not in (action, Action.KEEP):
            del self._done[first]
            self.undone += 1

    def __str__(self) -> str:
        undone = f", {self.undone} undone" if self.undone else ""
        return f"{self.settled} of {self.total}{undone}"


class _Narrator:
    """Keeps the last thing that happened, and shows it: one live line on a terminal, else a line for each."""

    def __init__(self, console: Console, wanted: str, tally: Tally) -> None:
        self._console = console
        self._now = wanted
        self._tally = tally

    async def listen(self, events: EventStream) -> None:
        async for event in events:
            self._tally.take(event)
            self._now = sentence(event)

    async def show(self) -> None:
        started = time.monotonic()
        await asyncio.sleep(_QUIET_S)
        if not self._console.is_terminal:
            await self._show_lines(started)
        elif self._tally.total:
            await self._show_bar()
        with self._console.status("") as status:
            while True:
                status.update(f"{self._now} ({time.monotonic() - started:.1f} s)")
                await asyncio.sleep(_TICK_S)

    async def _show_bar(self) -> None:
        total = self._tally.total
        columns = (
            BarColumn(min(_BAR_WIDTH, self._console.width // 5)),
            TextColumn("{task.completed} of {task.total}", table_column=_column(len(f"{total} of {total}"))),
            TimeElapsedColumn(table_column=_column(len("0:00:00"))),
            TextColumn("{task.description}", markup=False, table_column=_column()),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(self._now, total=total)
            while True:
                undone = f"{self._tally.undone} undone; " if self._tally.undone else ""
                bar.update(task, completed=self._tally.settled, description=undone + self._now)
                await asyncio.sleep(_TICK_S)

    async def _show_lines(self, started: float) -> None:
        shown = ""
        while True:
            if self._now != shown:
                shown = self._now
                count = f"{self._tally}: " if self._tally.total else ""
                self._console.print(f"{time.monotonic() - started:5.1f} s  {count}{shown}", soft_wrap=True)
            await asyncio.sleep(_TICK_S)


def _column(width: int | None = None) -> Column:
    """Return a column that is cut rather than wrapped, but not below *width*."""
    return Column(no_wrap=True, overflow="ellipsis", min_width=width)
