"""What is drawn on a terminal, by rich: tables, colours, and a part of the screen that changes."""

import contextlib
from collections.abc import Iterator
from typing import TextIO

from rich import table
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from qmpvcpu.cli.output import Block, ByWidth, Line, Table
from qmpvcpu.errors import printable


class Terminal:
    """A terminal behind *file*."""

    def __init__(self, file: TextIO) -> None:
        self._console = _PlainConsole(file=file, highlight=False, markup=False, emoji=False)

    def print(self, *blocks: Block, style: str = "") -> None:
        """Print *blocks* below each other, broken into lines that fit."""
        self._console.print(Group(*map(_drawn, blocks)), style=style or None)

    @contextlib.contextmanager
    def live(self, *, keep: bool) -> "Iterator[Screen]":
        """Give a part of the screen that can be drawn again and again, and stays at the end if *keep*."""
        with Live(console=self._console, auto_refresh=False, transient=not keep) as live:
            yield Screen(live)


class Screen:
    """The part of a terminal that is drawn again and again."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._shown: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many letters wide it is."""
        return self._live.console.width

    @property
    def height(self) -> int:
        """How many lines there are at most: what is longer would be cut."""
        return self._live.console.height

    def height_of(self, *blocks: Block) -> int:
        """Return how many lines *blocks* take."""
        return len(self._live.console.render_lines(Group(*map(_drawn, blocks)), pad=False))

    def draw(self, *blocks: Block) -> None:
        """Show *blocks* instead of what was there."""
        if self._shown != (shown := (str(self._live.console.size), *map(str, blocks))):
            self._shown = shown
            self._live.update(Group(*map(_drawn, blocks)), refresh=True)


class _PlainConsole(Console):
    """A console that escapes what is not printable, and leaves a broken pipe to its user."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Render, and escape what a text from outside has that is not printable."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, lines=True), style, control)

    def on_broken_pipe(self) -> None:
        """Raise, where rich would end the process in the middle of a command."""
        raise BrokenPipeError


class _WidthChoice:
    """Chooses by the width that there is when it is drawn."""

    def __init__(self, block: ByWidth) -> None:
        self._block = block

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= self._block.least
        yield from map(_drawn, [self._block.wide] if wide else self._block.narrow)


def _drawn(block: Block) -> RenderableType:
    match block:
        case Table():
            return _drawn_table(block)
        case ByWidth():
            return _WidthChoice(block)
        case Line():
            return Text.assemble(*block.parts)
    return Text(block)


def _drawn_table(block: Table) -> table.Table:
    headed = any(column.head for column in block.columns)
    drawn = table.Table(box=None, padding=(0, block.gap, 0, 0), pad_edge=False, show_header=headed)
    for column in block.columns:
        drawn.add_column(
            column.head,
            justify=column.justify,  # type: ignore[arg-type]  # one of rich's words
            no_wrap=not column.fold,
            overflow="fold" if column.fold else "ellipsis",
        )
    for cells, style in block.rows:
        drawn.add_row(*map(_drawn, cells), style=style or None)
    return drawn
