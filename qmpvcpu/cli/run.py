"""One command from start to exit code: whatever happens becomes an answer, and never a traceback."""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

import qmpvcpu
from qmpvcpu import VcpuController
from qmpvcpu.cli.options import BadUsageError, Options
from qmpvcpu.cli.show import document, error_json, map_row, state_json
from qmpvcpu.errors import (
    DomainXmlError,
    InvalidMapError,
    MonitorError,
    OutcomeUnknownError,
    PlanError,
    QmpVcpuError,
    RecordError,
)
from qmpvcpu.testing.linuxguest import LinuxGuestMissingError
from qmpvcpu.testing.qemu import QemuNotFoundError, QemuProcessError

__all__ = [
    "INTERRUPTED",
    "NOT_REACHED",
    "NOT_SENT",
    "REACHED",
    "Answer",
    "Shell",
    "carry_out",
    "failure",
    "print_answer",
]

REACHED: Final = 0
NOT_REACHED: Final = 1
NOT_SENT: Final = 2
NO_ANSWER: Final = 3
BAD_RECORD: Final = 4
INTERRUPTED: Final = 130

# Of a pipe: cells must not be cut to the width of a terminal that is not there.
_UNBOUNDED = 100_000


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended.

    Attributes:
        code: The exit code.
        document: What ``--json`` prints.
        text: What people see on standard output; None: all was said on the way.
        complaint: What people see on standard error.
    """

    code: int
    document: dict[str, Any]
    text: RenderableType | None = None
    complaint: tuple[str, ...] = ()


@dataclass(slots=True)
class Shell:
    """What a command works with.

    Attributes:
        options: The shared options.
        vm: The VM, once attached; still readable after it was let go.
        done: JSON of the steps so far, so that an error's document has them too.
        not_sent: The vCPU ids that were named and not asked for yet.
        unprinted: Why standard output takes no more words, or None.
        out: Standard output.
        err: Standard error.
    """

    options: Options
    vm: VcpuController | None = None
    done: list[dict[str, Any]] = field(default_factory=list)
    not_sent: list[int] = field(default_factory=list)
    unprinted: OSError | None = None
    out: Console = field(default_factory=lambda: _console(sys.stdout))
    err: Console = field(default_factory=lambda: _console(sys.stderr))

    @contextlib.asynccontextmanager
    async def attach(
        self, target: Path | None = None, *, name: str | None = None, reply_timeout: float = 10.0
    ) -> AsyncIterator[VcpuController]:
        """Attach to *target*, else to the VM that the options name; *reply_timeout* is QEMU's, in seconds."""
        attaching = qmpvcpu.attach(
            self.options.address if target is None else target,
            name=name,
            record=self.options.record,
            timeout=reply_timeout,
            resync_interval=None,  # a command is over before a resync would tell it anything
        )
        async with attaching as self.vm:
            yield self.vm

    def say(self, line: RenderableType) -> None:
        """Print *line* for people, now; programs read the document."""
        if not self.options.json:
            self.put(lambda: self.out.print(line, soft_wrap=isinstance(line, str | Text)))

    def put(self, write: Callable[[], object]) -> None:
        """Do *write* to standard output; a command goes on where that takes no more."""
        try:
            write()
            sys.stdout.flush()
        except OSError as error:
            # A reader that has seen enough (head, less) is no fault.
            self.unprinted = None if isinstance(error, BrokenPipeError) else error
            # Nothing more is printed, and Python's own flush at exit has nothing to complain of.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _PlainConsole(Console):
    """A console of text as it is, that leaves the broken pipe to its user."""

    def on_broken_pipe(self) -> None:
        """Raise, where rich would end the process in the middle of a command."""
        raise BrokenPipeError


def _console(file: TextIO) -> Console:
    width = None if file.isatty() else _UNBOUNDED
    return _PlainConsole(file=file, width=width, highlight=False, markup=False, emoji=False)


def carry_out(options: Options, command: Callable[[Shell], Coroutine[Any, Any, Answer]]) -> int:
    """Run *command*, print its answer, and return the exit code."""
    _configure_logging(verbose=options.verbose)
    shell = Shell(options)
    try:
        answer = asyncio.run(command(shell))
    except (QmpVcpuError, BadUsageError, KeyboardInterrupt) as error:
        answer = failure(error, shell)
    return print_answer(answer, shell)


def failure(error: BaseException, shell: Shell) -> Answer:
    """Return the answer that tells of *error*, with the VM's state as far as it is known."""
    # What was sent before a SIGINT has been taken in while the VM was let go; the state below has it.
    message = "stopped by SIGINT" if isinstance(error, KeyboardInterrupt) else str(error)
    complaint = [f"qmpvcpu: {message}"]
    content: dict[str, Any] = {"error": error_json(error, message)}
    if shell.done:
        content["steps"] = shell.done
    if shell.not_sent:
        left = ",".join(map(str, shell.not_sent))
        content["not_sent"] = left
        complaint.append(f"not asked for any more: {left}")
    if shell.vm is not None:
        layout = shell.vm.layout
        content |= state_json(layout)
        when = "last seen" if isinstance(error, MonitorError) else "now"
        pending = f", pending {layout.pending}" if layout.pending else ""
        complaint.append(f"{when}: {map_row(layout)}  plugged {layout.enabled}{pending}")
    return Answer(_code(error), document(**content), complaint=tuple(complaint))


def _code(error: BaseException) -> int:
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED
        case MonitorError() | OutcomeUnknownError() | QemuProcessError():
            return NO_ANSWER
        case RecordError():
            return BAD_RECORD
        case BadUsageError() | PlanError() | InvalidMapError() | DomainXmlError():
            return NOT_SENT
        case QemuNotFoundError() | LinuxGuestMissingError():
            return NOT_SENT
    return NOT_REACHED


def print_answer(answer: Answer, shell: Shell) -> int:
    """Print *answer* where and how the options say, and return its exit code."""
    complaint = () if shell.options.json else answer.complaint
    if shell.options.json:
        shell.put(lambda: sys.stdout.write(json.dumps(answer.document) + "\n"))
    elif answer.text is not None:
        shell.say(answer.text)
    for line in complaint:
        shell.err.print(line)
    if shell.unprinted is not None:
        shell.err.print(f"qmpvcpu: cannot print the answer: {shell.unprinted}", soft_wrap=True)
        return answer.code or NOT_REACHED
    return answer.code


def _configure_logging(*, verbose: bool) -> None:
    # qemu.qmp logs every lost connection; the error says it better, once.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    if verbose:
        logger = logging.getLogger("qmpvcpu.monitor")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(relativeCreated)7.1f ms  %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
