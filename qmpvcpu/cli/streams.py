"""Standard streams that are closed, full, or read by nobody: a command goes on, and says so where it still can."""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import IO, Any, TextIO, cast

from qmpvcpu.cli.answer import NOT_REACHED, REACHED


def open_missing() -> None:
    """Have all three standard streams, where this process was started without one of them.

    Python has None for such a stream, and the next file or socket that is opened would get its number. Writing to
    what takes the place of standard output fails, as to a full disk; what is written to standard error goes nowhere.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, flags)  # the lowest number that is free, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def encode_all() -> None:
    """Have both outputs take any text: what their encoding lacks is escaped, as Python does on standard error."""
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="backslashreplace")


def complain(line: str) -> None:
    """Print *line* on standard error if that can be."""
    print(line, file=cast("TextIO", Forgiving(sys.stderr)), flush=True)


def cannot_print(error: OSError) -> int:
    """Let standard output go nowhere from here on, tell why if that is a fault, and return the exit code."""
    silence(sys.stdout)
    if isinstance(error, BrokenPipeError):  # a reader that has seen enough (head, less)
        return REACHED
    complain(f"qmpvcpu: cannot print the answer: {error}")
    return NOT_REACHED


def silence(file: IO[str]) -> None:
    """Let *file* go nowhere from here on, so that Python's own flush at exit has nothing to complain of."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


class Forgiving:
    """A text stream that is silenced instead of failing: for what is told beside the answer."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        """Write *text* if that can be."""
        self._attempt(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush if that can be."""
        self._attempt(self._file.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            silence(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
