"""Standard output and standard error: plain text into files and pipes, colours and tables on a terminal.

A stream may be closed, full, or read by nobody: a command goes on, and says so where it still can.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple, TextIO, cast

from qmpvcpu.documents.form import NOT_REACHED, REACHED
from qmpvcpu.errors import printable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from qmpvcpu.cli.terminal import Screen, Terminal

_GAP: Final = 2
_FEW_LETTERS: Final = ("linux", "dumb")  # of TERM
_USUAL_WIDTH: Final = 80  # of a terminal that does not say how wide it is


class Line:
    """One line of text in parts; a part is a text, or a text with its style, such as ``"bold red"``."""

    def __init__(self, *parts: str | tuple[str, str], style: str = "") -> None:
        self.parts = tuple((part, style) if isinstance(part, str) else part for part in parts)

    def __str__(self) -> str:
        return "".join(text for text, _ in self.parts)


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        head: What stands above it; may have several lines.
        justify: ``left``, ``right`` or ``center``.
        fold: Whether its cells may be broken into several lines on a narrow terminal.
    """

    head: str = ""
    justify: str = "left"
    fold: bool = False


class Table:
    """Rows of cells.

    Attributes:
        columns: The columns.
        gap: Columns of letters between two cells.
        rows: The rows, each its cells and its style.
    """

    def __init__(self, *columns: Column, gap: int = _GAP) -> None:
        self.columns = columns
        self.gap = gap
        self.rows: list[tuple[tuple[str | Line, ...], str]] = []

    def add(self, *cells: str | Line, style: str = "") -> None:
        """Add a row."""
        self.rows.append((cells, style))

    def __str__(self) -> str:
        heads = [tuple(column.head for column in self.columns)] if any(column.head for column in self.columns) else []
        grid = [[str(cell).split("\n") for cell in row] for row in (*heads, *(cells for cells, _ in self.rows))]
        widths = [max(len(line) for cell in column for line in cell) for column in zip(*grid, strict=True)]
        return "\n".join(line for row in grid for line in self._lines(row, widths))

    def _lines(self, row: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
        for number in range(max(map(len, row))):
            cells = (cell[number] if number < len(cell) else "" for cell in row)
            placed = (
                _PLACE[column.justify](text, width)
                for column, text, width in zip(self.columns, cells, widths, strict=True)
            )
            yield (" " * self.gap).join(placed).rstrip()


_PLACE: Final[dict[str, Callable[[str, int], str]]] = {"left": str.ljust, "right": str.rjust, "center": str.center}


class ByWidth(NamedTuple):
    """What is shown one way where there is room for it, and another way on a narrow terminal.

    Attributes:
        least: How many letters wide the terminal must be for *wide*.
        wide: What is shown there, and in a file or a pipe.
        narrow: What is shown else.
    """

    least: int
    wide: "Block"
    narrow: Sequence["Block"]

    def __str__(self) -> str:
        return str(self.wide)


Block = str | Line | Table | ByWidth


class Output:
    """One of the standard streams, for what people read.

    With *wraps* a line that is too long for the terminal is broken between words.
    """

    def __init__(self, file: TextIO, *, wraps: bool = False) -> None:
        self.is_terminal = file.isatty()
        self._file = file
        self._wraps = wraps
        self._terminal: Terminal | None = None

    @property
    def width(self) -> int | None:
        """How many letters wide the terminal is; None: it is a file or a pipe, and nothing is cut."""
        return (os.get_terminal_size(self._file.fileno()).columns or _USUAL_WIDTH) if self.is_terminal else None

    def print(self, *blocks: Block, style: str = "") -> None:
        """Print *blocks* below each other.

        Raises:
            OSError: The stream takes no more.
        """
        # rich takes as long to import as a short command: lines without a style do without it.
        plain = self._terminal is None and not style and all(isinstance(block, str) for block in blocks)
        terminal = None if plain else self._drawn()
        if terminal is not None:
            terminal.print(*blocks, style=style)
        else:
            for block in blocks:
                self._file.write(self._wrapped(printable(str(block), lines=True)) + "\n")
        self._file.flush()

    def _wrapped(self, text: str) -> str:
        width = self.width if self._wraps else None
        if width is None or all(len(line) <= width for line in text.split("\n")):
            return text
        from textwrap import fill  # not at the top: most lines fit

        lines = text.split("\n")
        return "\n".join(fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)

    def can_show(self, text: str) -> bool:
        """Whether *text* has only letters that the terminal or file takes; fonts of the Linux console have few."""
        if self.is_terminal and os.environ.get("TERM") in _FEW_LETTERS:
            return text.isascii()
        try:
            text.encode(self._file.encoding or "ascii")
        except UnicodeEncodeError:
            return False
        return True

    @property
    def draws(self) -> bool:
        """Whether a part of it can be drawn again and again."""
        return self._drawn() is not None

    def live(self, *, keep: bool) -> "AbstractContextManager[Screen]":
        """Return a part of the terminal that can be drawn again and again, and stays at the end if *keep*."""
        terminal = self._drawn()
        if terminal is None:
            raise ValueError("only a terminal can be drawn on")
        return terminal.live(keep=keep)

    def _drawn(self) -> "Terminal | None":
        if self._terminal is None and self.is_terminal:
            with contextlib.suppress(ModuleNotFoundError):  # without rich a terminal gets what a pipe gets
                from qmpvcpu.cli.terminal import Terminal

                self._terminal = Terminal(self._file)
        return self._terminal


def open_missing() -> None:
    """Open all three standard streams where this process was started without one of them.

    Python has None for such a stream, and the next file or socket that is opened would get its number. Writing to
    the substitute for standard output fails as on a full disk; what is written to standard error is dropped.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, flags)  # the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def encode_all() -> None:
    """Let both outputs take any text: what their encoding lacks is escaped, as Python does on standard error."""
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="backslashreplace")


def complain(line: str) -> None:
    """Print *line* on standard error if possible."""
    print(line, file=cast("TextIO", BestEffortStream(sys.stderr)), flush=True)


def cannot_print(error: OSError) -> int:
    """Drop all further output, tell why if that is a fault, and return the exit code."""
    silence(sys.stdout)
    if isinstance(error, BrokenPipeError):  # a reader that has seen enough (head, less)
        return REACHED
    complain(f"qmpvcpu: cannot print the answer: {error}")
    return NOT_REACHED


def silence(file: IO[str]) -> None:
    """Drop what is written to *file* from here on, so that Python's own flush at exit cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


class BestEffortStream:
    """A text stream that is silenced where it would fail: for progress and complaints."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write *text* if possible."""
        self._attempt(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        self._attempt(self._file.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            silence(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
