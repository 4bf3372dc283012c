"""One command from start to exit code: whatever happens becomes an answer, and never a traceback."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

import qmpvcpu
from qmpvcpu.cli.answer import BAD_RECORD, INTERRUPTED, NO_ANSWER, NOT_REACHED, NOT_SENT, Answer
from qmpvcpu.cli.documents import as_line, document
from qmpvcpu.cli.options import BadUsageError, Options
from qmpvcpu.cli.reports import report_text, shortcoming
from qmpvcpu.cli.show import error_json, in_options, is_held, state_json, state_text
from qmpvcpu.cli.stopping import Stopping
from qmpvcpu.cli.streams import Forgiving, silence
from qmpvcpu.errors import (
    DomainXmlError,
    InvalidMapError,
    MonitorError,
    OutcomeUnknownError,
    PlanError,
    QmpVcpuError,
    RecordError,
    SameVmError,
    SocketDirectoryError,
    TargetLostError,
    TransitionError,
    printable,
)
from qmpvcpu.model.report import TransitionReport
from qmpvcpu.model.verdicts import Unknown
from qmpvcpu.vm.controller import VcpuController

_REPLY_TIMEOUT = 10.0
_GUEST_TIMEOUT = 30.0

# Of a pipe: cells must not be cut to the width of a terminal that is not there.
_UNBOUNDED = 100_000


@dataclass(slots=True)
class Shell:
    """What a command works with.

    Attributes:
        options: The shared options.
        vm: The VM, once attached; still readable after it was let go.
        done: JSON of the steps so far, so that an error's document has them too.
        beside: What else the document has, whether the command succeeds or fails.
        lost: Why the connection was lost in the middle of a transition, or "".
        not_sent: The vCPU ids that were named and not asked for yet.
        stopping: What SIGINT and SIGTERM do.
        unread: True once standard output takes no more words.
        unprinted: Why, if that is a fault, or None.
        out: Standard output.
        err: Standard error.
    """

    options: Options
    vm: VcpuController | None = None
    done: list[dict[str, Any]] = field(default_factory=list)
    beside: dict[str, Any] = field(default_factory=dict)
    lost: str = ""
    not_sent: list[int] = field(default_factory=list)
    stopping: Stopping = field(default_factory=Stopping)
    unread: bool = False
    unprinted: OSError | None = None
    out: Console = field(default_factory=lambda: _console(sys.stdout))
    err: Console = field(default_factory=lambda: _console(cast("TextIO", Forgiving(sys.stderr))))

    @property
    def guest_timeout(self) -> float:
        """How long the guest has for each answer, in seconds."""
        given = self.options.timeout
        return _GUEST_TIMEOUT if given is None else given

    @property
    def reply_timeout(self) -> float:
        """How long QEMU has for each reply, in seconds, where nobody waits for the guest.

        Raises:
            BadUsageError: None at all was given.
        """
        given = self.options.timeout
        if given == 0:
            raise BadUsageError("--timeout 0: QEMU needs some time to answer")
        return _REPLY_TIMEOUT if given is None else given

    @contextlib.asynccontextmanager
    async def attach(
        self,
        target: Path | None = None,
        *,
        name: str | None = None,
        config: Path | None = None,
        reply_timeout: float = _REPLY_TIMEOUT,
        reconnect: bool = False,
        resync_interval: float | None = None,
        read_only: bool = False,
        arrived: bool = False,
    ) -> AsyncIterator[VcpuController]:
        """Attach to *target*, else to the VM that the options name; *reply_timeout* is QEMU's, in seconds.

        *config* is the document of its next boot. *read_only* is for commands that change nothing: the record, if
        one is named, is read and not written. *arrived*: the VM has migrated here, with its record.

        Without *resync_interval* there are no resyncs: most commands are over before one would tell anything.
        """
        record = self.options.record
        attaching = qmpvcpu.attach(
            self.options.address if target is None else target,
            name=self.options.name if name is None else name,
            record=record,
            config=config,
            reply_timeout=reply_timeout,
            reconnect=reconnect,
            resync_interval=resync_interval,
            read_only=read_only and record is not None,
            arrived=arrived,
        )
        async with attaching as self.vm:
            yield self.vm

    def say(self, line: RenderableType) -> None:
        """Print *line* for people, now; programs read the document."""
        if not self.options.json:
            self.put(lambda: self.out.print(line, soft_wrap=isinstance(line, str | Text)))

    def say_styled(self, *parts: str | tuple[str, str]) -> None:
        """Print *parts*, each a text or a text with its style, as one line for people."""
        self.say(Text.assemble(*parts))

    def note(self, line: str) -> None:
        """Tell people on standard error what goes on."""
        self.err.print(line, soft_wrap=True, style="dim")

    def pass_on(self, data: bytes) -> None:
        """Print *data* as it is; to a terminal only what is printable of it."""
        if self.out.is_terminal:
            self.say(data.decode(errors="backslashreplace").removesuffix("\n"))
        else:
            self.put(lambda: sys.stdout.buffer.write(data if data.endswith(b"\n") else data + b"\n"))

    def put(self, write: Callable[[], object]) -> None:
        """Do *write* to standard output; a command goes on where that takes no more."""
        try:
            write()
            sys.stdout.flush()
        except OSError as error:
            self.unread = True
            # A reader that has seen enough (head, less) is no fault.
            self.unprinted = None if isinstance(error, BrokenPipeError) else error
            silence(sys.stdout)


class _PlainConsole(Console):
    """A console of text as it is, with no controls but rich's own, that leaves the broken pipe to its user."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Render, and escape what a text has that is not printable: what nobody has thought of arrives here."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, lines=True), style, control)

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
    return print_answer(asyncio.run(_carry_out(shell, command)), shell)


async def _carry_out(shell: Shell, command: Callable[[Shell], Coroutine[Any, Any, Answer]]) -> Answer:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - JUSTIFICATION: a coroutine that runs is in a task, mypy cannot know
    with shell.stopping.heeded(task):
        try:
            return await command(shell)
        except (QmpVcpuError, BadUsageError) as error:
            return failure(error, shell)
        except asyncio.CancelledError:
            return failure(KeyboardInterrupt(), shell)


def failure(error: BaseException, shell: Shell) -> Answer:
    """Return the answer that tells of *error*, with the VM's state as far as it is known."""
    # What was sent before a SIGINT has been taken in while the VM was let go; the state below has it.
    message = f"stopped by {shell.stopping.signal or 'SIGINT'}"
    if not isinstance(error, KeyboardInterrupt):
        message = in_options(str(error))
    report = error.report if isinstance(error, TransitionError) else None
    complaint = f"qmpvcpu: {message if report is None else shortcoming(report)}".split("\n")
    content: dict[str, Any] = {"error": error_json(error, message), **shell.beside}
    if report is not None:
        content |= report.as_json()
    elif shell.done:
        content["steps"] = shell.done
    if shell.lost:
        content["lost"] = shell.lost
        complaint.append(shell.lost)
    if shell.not_sent:
        left = ",".join(map(str, shell.not_sent))
        content["not_sent"] = left
        complaint.append(f"not asked for any more: {left}")
    if is_held(error):
        complaint.append("how to share a VM with who holds its socket: qmpvcpu --help, and docs/sharing.md")
    if shell.vm is not None:
        layout = shell.vm.layout
        content |= state_json(layout)
        when = "last seen" if isinstance(error, MonitorError) else "now"
        if report is None:  # it says so itself
            complaint.append(f"{when}: {state_text(layout)}")
    text = None if report is None else report_text(report)
    code = NO_ANSWER if shell.lost else code_of(error)
    if code == NOT_SENT and shell.done:
        code = NOT_REACHED  # this step was not sent, those before it were
    return Answer(code, document(**content), text, complaint=tuple(complaint))


def code_of(error: BaseException) -> int:
    """Return the exit code that tells of *error*."""
    # Not at the top: only the demo and the doctor start VMs, and every command would import what that takes.
    from qmpvcpu.testing.linuxguest import LinuxGuestMissingError
    from qmpvcpu.testing.qemu import QemuNotFoundError, QemuProcessError

    if isinstance(error, TransitionError):
        return _code_of_report(error.report)
    codes = (
        (KeyboardInterrupt, INTERRUPTED),
        ((MonitorError, OutcomeUnknownError, TargetLostError, QemuProcessError), NO_ANSWER),
        (RecordError, BAD_RECORD),
        ((BadUsageError, PlanError, InvalidMapError, DomainXmlError), NOT_SENT),
        ((QemuNotFoundError, LinuxGuestMissingError, SameVmError, SocketDirectoryError), NOT_SENT),
    )
    return next((code for kinds, code in codes if isinstance(error, kinds)), NOT_REACHED)


def _code_of_report(report: TransitionReport) -> int:
    if any(isinstance(verdict, Unknown) for step in report.steps for verdict in (step.verdict, step.undo)):
        return NO_ANSWER
    return INTERRUPTED if report.cancelled else NOT_REACHED


def print_answer(answer: Answer, shell: Shell) -> int:
    """Print *answer* where and how the options say, and return its exit code."""
    complaint = () if shell.options.json else answer.complaint
    if shell.options.json:
        shell.put(lambda: sys.stdout.write(as_line(answer.document)))
    elif answer.data is not None:
        shell.pass_on(answer.data)
    elif answer.text is not None:
        shell.say(answer.text)
    for line in complaint:
        shell.err.print(printable(line))
    if shell.unprinted is not None:
        shell.err.print(f"qmpvcpu: cannot print the answer: {shell.unprinted}", soft_wrap=True)
        return answer.code or NOT_REACHED
    return answer.code


def _configure_logging(*, verbose: bool) -> None:
    # qemu.qmp logs every lost connection; the error says it better, once.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    if verbose:
        logger = logging.getLogger("qmpvcpu.qmp")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(relativeCreated)7.1f ms  %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
