"""What a guest is doing while it takes its time, told on standard error from the VM's events alone."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qmpvcpu.cli.tally import Tally
from qmpvcpu.errors import printable
from qmpvcpu.events import (
    Disconnected,
    Event,
    InstanceChanged,
    LayoutChanged,
    MigrationChanged,
    Reconnected,
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
from qmpvcpu.model.transition import Step
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.stream import EventStream

# A guest that answers sooner needs no commentary.
_QUIET_S = 0.4
_TICK_S = 0.1
_BAR_WIDTH = 16
# Where a transition has more steps, those under way are shown and the rest is counted.
_MOST_ROWS = 16
# Lines of a terminal that show no step.
_OTHER_LINES = 5

_SENTENCES: Final[Mapping[type[Event], str]] = {
    VcpuPlugged: "vCPU {event.ids} is plugged",
    UnplugRequested: "vCPU {event.ids}: the guest is asked, no reaction yet",
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
        steps: What the body is to bring about; it is told how many of them are settled, and what each does.
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
    return printable(_SENTENCES[type(event)].format(event=event))


class _Narrator:
    """Keeps the last thing that happened, and shows it: one live line on a terminal, else a line for each."""

    def __init__(self, console: Console, wanted: str, tally: Tally) -> None:
        self._console = console
        self._now = wanted
        self._aside = wanted  # what is of no vCPU: those have rows of their own
        self._tally = tally

    async def listen(self, events: EventStream) -> None:
        async for event in events:
            self._tally.take(event)
            self._now = sentence(event)
            self._aside = "" if hasattr(event, "ids") else self._now

    async def show(self) -> None:
        started = time.monotonic()
        await asyncio.sleep(_QUIET_S)
        if not self._console.is_terminal:
            await self._show_lines(started)
        elif self._tally.total:
            await self._show_board()
        with self._console.status("") as status:
            while True:
                status.update(Text(f"{self._now} ({time.monotonic() - started:.1f} s)"))
                await asyncio.sleep(_TICK_S)

    async def _show_board(self) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            began = time.monotonic()
            while True:
                live.update(self._board(time.monotonic() - began + _QUIET_S), refresh=True)
                await asyncio.sleep(_TICK_S)

    def _board(self, seconds: float) -> RenderableType:
        """Return the bar, what the VM does, and a row for each vCPU as far as there is room."""
        tally = self._tally
        head = Table.grid(padding=(0, 2, 0, 0))
        width = min(_BAR_WIDTH, self._console.width // 5)
        bar = ProgressBar(tally.total, tally.settled, width=width, complete_style="green")
        head.add_row(bar, str(tally), f"{seconds:.0f} s")
        steps = Table.grid(padding=(0, 2, 0, 0))
        steps.add_column(no_wrap=True)
        steps.add_column(overflow="fold")
        rows = tally.rows(max(min(self._console.height - _OTHER_LINES, _MOST_ROWS), 1))
        for row in rows:
            took = "" if row.seconds is None else f" ({row.seconds:.1f} s)"
            steps.add_row(row.step, Text(row.words + took, row.style))
        left = tally.total - len(rows)
        more = [Text(f"... and {left} more", "dim")] if left else []
        aside = [Text(self._aside)] if self._aside else []
        return Group(head, *aside, steps, *more)

    async def _show_lines(self, started: float) -> None:
        shown = ""
        while True:
            if self._now != shown:
                shown = self._now
                count = f"{self._tally}: " if self._tally.total else ""
                self._console.print(f"{time.monotonic() - started:5.1f} s  {count}{shown}", soft_wrap=True)
            await asyncio.sleep(_TICK_S)
