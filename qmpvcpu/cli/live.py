"""The live table of ``watch``: the vCPUs and what happened last, as large as the terminal is."""

import asyncio
import time
from collections import deque
from datetime import datetime
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qmpvcpu.cli.progress import sentence
from qmpvcpu.cli.show import headline
from qmpvcpu.cli.table import WIDE, vcpu_table
from qmpvcpu.events import (
    Disconnected,
    Event,
    InstanceChanged,
    LayoutChanged,
    Origin,
    Reconnected,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlugged,
    VcpuUnplugged,
)
from qmpvcpu.model.layout import Layout
from qmpvcpu.vm.controller import VcpuController

_TICK_S: Final = 0.1
# How long ago a removal was asked for is counted in these.
_AGE_S: Final = 1.0
_MOST_EVENTS: Final = 20
# Lines that show no vCPU and no event: heads of the columns, blank ones, the cursor's.
_OTHER_LINES: Final = 7
# Of the rest a third is for events, at least these.
_FEWEST_EVENTS: Final = 3
_FEWEST_ROWS: Final = 4
_MINUTE: Final = 60

_STYLES: Final[dict[type[Event], str]] = {
    VcpuPlugged: "green",
    VcpuUnplugged: "green",
    UnplugRequested: "yellow",
    UnplugAcknowledged: "yellow",
    UnplugPending: "yellow",
    UnplugRefused: "red",
    Disconnected: "bold red",
    InstanceChanged: "bold",
}


def clock() -> str:
    """Return the time of day, to the millisecond."""
    return datetime.now().astimezone().isoformat(" ", "milliseconds")[11:23]


def told(event: Event) -> str:
    """Return *event* in words, with who brought it about if that was another client."""
    by = " (by another client)" if event.origin is Origin.OTHER else ""
    return f"{sentence(event)}{by}"


class _Since:
    """Since when a removal is pending; None: since before this was watching."""

    def __init__(self, *, before: bool) -> None:
        self._at = "" if before else clock()
        self._started = time.monotonic()

    def words(self, *, short: bool) -> str:
        if not self._at:
            return "before"
        if short:
            return self._at[:8]
        seconds = int(time.monotonic() - self._started)
        age = f"{seconds} s" if seconds < _MINUTE else f"{seconds // _MINUTE} min"
        return f"{self._at[:8]} ({age})"


class LiveTable:
    """The vCPUs and the last events, drawn again soon after each."""

    def __init__(self, live: Live, vm: VcpuController) -> None:
        self._live = live
        self._vm = vm
        self._since = {first: _Since(before=True) for first in vm.layout.pending_slots}
        self._last: deque[tuple[str, Text]] = deque(maxlen=_MOST_EVENTS)
        self._news = asyncio.Event()
        self._lost = False

    def begin(self, layout: Layout) -> None:
        """Draw it for the first time."""
        self._note_pending(layout)
        self._news.set()

    def tell(self, event: Event, layout: Layout) -> None:
        """Have it drawn again."""
        self._note_pending(layout)
        if not isinstance(event, LayoutChanged) or event.resync:  # the table shows what a read has found
            self._last.append((clock(), Text(told(event), _STYLES.get(type(event), ""))))
        self._lost = isinstance(event, Disconnected) or (self._lost and not isinstance(event, Reconnected))
        self._news.set()

    def _note_pending(self, layout: Layout) -> None:
        self._since = {
            first: self._since.get(first) or _Since(before=False) for first in sorted(layout.pending_slots)
        }

    async def draw(self) -> None:
        """Draw it again whenever something has happened, at most ten times a second; and while time is counted."""
        while True:
            try:
                async with asyncio.timeout(_AGE_S if self._since else None):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            self.draw_now()
            await asyncio.sleep(_TICK_S)

    def draw_now(self) -> None:
        """Draw it as things are."""
        self._live.update(self._drawn(self._live.console), refresh=True)

    def _drawn(self, console: Console) -> RenderableType:
        """Return all of it, not longer than the terminal: the rest would be cut at its bottom."""
        layout = self._vm.layout
        width, height = console.size
        narrow = width < WIDE
        head = Text(headline(layout, width))
        if self._lost:
            head = Text.assemble(("QEMU is lost; it was:\n", "bold red"), head)
        since = {first: each.words(short=narrow) for first, each in self._since.items()}
        left = height - _OTHER_LINES - _height(console, head)
        room = max(left - max(left // 3, _FEWEST_EVENTS), _FEWEST_ROWS)
        table = vcpu_table(layout, since=since, room=room, narrow=narrow)
        left = height - _height(console, Group(head, "", table, "")) - 1
        return Group(head, "", table, "", *self._events(console, left, short=narrow))

    def _events(self, console: Console, left: int, *, short: bool) -> list[RenderableType]:
        """Return the last events, as many as fit into *left* lines, the newest at the bottom."""
        shown: list[RenderableType] = []
        for at, words in reversed(self._last):
            row = Table.grid(padding=(0, 2, 0, 0))
            row.add_column(no_wrap=True)
            row.add_column(overflow="fold")
            row.add_row(Text(at[:8] if short else at, "dim"), words)
            left -= _height(console, row)
            if left < 0:
                break
            shown.append(row)
        return shown[::-1]


def _height(console: Console, shown: RenderableType) -> int:
    return len(console.render_lines(shown, pad=False))
