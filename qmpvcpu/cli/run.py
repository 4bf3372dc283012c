"""One command from start to exit code: everything that happens becomes a result, never a traceback."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TextIO, cast

import qmpvcpu
from qmpvcpu.cli.output import BestEffortStream, Block, Output, silence
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.signals import Signals
from qmpvcpu.documents.form import NOT_REACHED, as_line
from qmpvcpu.errors import GuestAgentError, MonitorConnectError, QmpVcpuError
from qmpvcpu.qmp.address import Address

if TYPE_CHECKING:
    from qmpvcpu.model.guest import GuestOs
    from qmpvcpu.model.layout import Layout
    from qmpvcpu.vm.controller import VcpuController

_SYSTEM_S: Final = 1.0  # an agent that is there answers within some 100 ms


class Options(NamedTuple):
    """The options that many commands share; each may stand before the command or after it.

    Attributes:
        json: Print one JSON document on standard output, and nothing else there.
        verbose: Print the exchange with QEMU, and with the guest's agent, on standard error.
        qmp: Address of the VM's QMP socket, or None.
        agent: Address of the guest agent's socket, or None; in a fleet a pattern of them.
        name: What the VM is called, or None.
        record: Path of the record, or None.
        timeout: How long the guest has for each answer, in seconds, or None for the library's default.
        reply_timeout: How long QEMU has to accept the connection, and for each reply, in seconds.
    """

    json: bool = False
    verbose: bool = False
    qmp: str | None = None
    agent: str | None = None
    name: str | None = None
    record: str | None = None
    timeout: float | None = None
    reply_timeout: float = 10.0

    @property
    def address(self) -> str:
        """The VM's address.

        Raises:
            BadUsageError: None was given, or it is no address.
        """
        if not self.qmp:
            raise BadUsageError("which VM? Name its QMP socket: --qmp ADDRESS, or QMPVCPU_QMP in the environment")
        check_address(self.qmp)
        return self.qmp

    @property
    def agent_address(self) -> str | None:
        """The address of the guest's agent; None: none was given.

        Raises:
            BadUsageError: It is no address.
        """
        if not self.agent:
            return None
        check_address(self.agent, "--agent")
        return self.agent


def check_address(address: str, named: str = "--qmp") -> None:
    """Make sure that *address*, which the option *named* has, is one.

    Raises:
        BadUsageError: It is none.
    """
    try:
        Address.parse(address)
    except MonitorConnectError as error:
        raise BadUsageError(f"{named}: {error}") from error


class Shell:
    """What a command works with.

    Attributes:
        options: The shared options.
        vm: The VM, once attached; still readable after it was let go.
        done: JSON of the steps so far, so that an error's document has them too.
        extra: What else the document has, whether the command succeeds or fails.
        lost: Why the connection was lost in the middle of a transition, or "".
        not_sent: The vCPU ids that were named and not asked for yet.
        signals: What SIGINT, SIGTERM and SIGHUP do.
        stdout_closed: True once standard output takes no more.
        unprinted: The error if that is a fault, or None: a reader that has seen enough is none.
        out: Standard output.
        err: Standard error.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.vm: VcpuController | None = None
        self.done: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}
        self.lost = ""
        self.not_sent: list[int] = []
        self.signals = Signals()
        self.stdout_closed = False
        self.unprinted: OSError | None = None
        self.out = Output(sys.stdout)
        self.err = Output(cast("TextIO", BestEffortStream(sys.stderr)), wraps=True)

    @contextlib.asynccontextmanager
    async def attach(
        self,
        *,
        config: str | None = None,
        base: str | None = None,
        reconnect: bool = False,
        resync_interval: float | None = None,
        read_only: bool = False,
        arrived: bool = False,
        placement: str | None = None,
    ) -> "AsyncIterator[VcpuController]":
        """Attach to the VM that the options name.

        *config* is the document of its next boot, *base* the one that its record begins as. *read_only* is for
        commands that change nothing: the record, if one is named, is read and not written. *arrived*: the VM has
        migrated here, with its record. *placement*: what happens to a vCPU that cannot be in its place.

        Without *resync_interval* there are no resyncs: most commands are over before one would tell anything.
        """
        options = self.options
        if config is not None and options.record is not None:
            _check_config(config, options.record)
        attaching = qmpvcpu.attach(
            options.address,
            agent=options.agent_address,
            name=options.name,
            record=options.record,
            config=config,
            base=base,
            reply_timeout=options.reply_timeout,
            reconnect=reconnect,
            resync_interval=resync_interval,
            read_only=read_only and options.record is not None,
            arrived=arrived,
            placement=placement,
        )
        async with attaching as self.vm:
            yield self.vm

    async def ask_system(self, vm: "VcpuController") -> "GuestOs | None":
        """Have the guest's agent, where one was given, name the system in the guest: plans and denials depend on it.

        Returns:
            The system; None where that is not told, which is no failure.
        """
        if vm.guest.has_agent:
            with contextlib.suppress(GuestAgentError):
                return await vm.guest.os(timeout=min(_SYSTEM_S, self.options.reply_timeout))
        return None

    async def ask_cpus(self, vm: "VcpuController") -> GuestAgentError | None:
        """Have the guest's agent list the guest's CPUs, after which the layout knows which vCPUs are online.

        Returns:
            Why it did not; None if it did.
        """
        try:
            await vm.guest.vcpus(timeout=self.options.reply_timeout)
        except GuestAgentError as error:
            return error
        return None

    async def look(self) -> "Layout":
        """Return what is known of the VM, attached for no longer than that takes."""
        if self.options.record is None and self.options.name is None:
            # Not at the top: all but list and fleet attach. To look takes half the imports of attach().
            from qmpvcpu.qmp.queries import look

            return await look(self.options.address, reply_timeout=self.options.reply_timeout)
        async with self.attach(read_only=True) as vm:
            return vm.layout

    def say(self, *blocks: Block) -> None:
        """Print *blocks* for people, now; programs read the document."""
        if not self.options.json:
            self.put(lambda: self.out.print(*blocks))

    def note(self, line: str) -> None:
        """Tell people on standard error what goes on."""
        self.err.print(line)

    def put(self, write: Callable[[], object]) -> None:
        """Do *write* to standard output; a command goes on where that takes no more."""
        try:
            write()
            sys.stdout.flush()
        except OSError as error:
            self.stdout_closed = True
            # A reader that has seen enough (head, less) is no fault.
            self.unprinted = None if isinstance(error, BrokenPipeError) else error
            silence(sys.stdout)


def _check_config(config: str, record: str) -> None:
    from qmpvcpu.record.file import absolute  # not at the top: few commands name both

    if absolute(config) == absolute(record):
        raise BadUsageError("--config and --record name one file: a record keeps the next boot without --config")


def carry_out(options: Options, command: Callable[[Shell], Coroutine[Any, Any, CommandResult]]) -> int:
    """Run *command*, print its result, and return the exit code."""
    _configure_logging(verbose=options.verbose)
    shell = Shell(options)
    try:
        with asyncio.Runner() as runner:
            runner.get_loop()  # before there is work that would be lost with it
            result = runner.run(_carry_out(shell, command))
    except OSError as error:
        result = _failure(error, shell)
    return print_result(result, shell)


async def _carry_out(shell: Shell, command: Callable[[Shell], Coroutine[Any, Any, CommandResult]]) -> CommandResult:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - JUSTIFICATION: a coroutine that runs is in a task, mypy cannot know
    with shell.signals.handling_signals(task):
        try:
            return await command(shell)
        except (QmpVcpuError, BadUsageError, OSError) as error:
            return _failure(error, shell)
        except asyncio.CancelledError:
            return _failure(KeyboardInterrupt(), shell)


def _failure(error: BaseException, shell: Shell) -> CommandResult:
    from qmpvcpu.cli.failures import failure  # not at the top: most commands succeed

    return failure(error, shell)


def fail(error: BaseException, options: Options) -> int:
    """Print that *error* kept a command from beginning, and return the exit code."""
    shell = Shell(options)
    return print_result(_failure(error, shell), shell)


def print_result(result: CommandResult, shell: Shell) -> int:
    """Print *result* where and how the options say, and return its exit code."""
    if shell.options.json:
        if result.document:
            shell.put(lambda: sys.stdout.write(as_line(result.document)))
    else:
        if result.data is not None:
            _pass_on(result.data, shell)
        elif result.text:
            shell.say(*result.text)
        for line in result.complaint:
            shell.err.print(line)
    if shell.unprinted is not None:
        shell.err.print(f"qmpvcpu: cannot print the answer: {shell.unprinted}")
        return result.code or NOT_REACHED
    return result.code


def _pass_on(data: bytes, shell: Shell) -> None:
    """Print *data* byte by byte; on a terminal only what is printable of it."""
    if shell.out.is_terminal:
        shell.say(data.decode(errors="backslashreplace").removesuffix("\n"))
    else:
        shell.put(lambda: sys.stdout.buffer.write(data if data.endswith(b"\n") else data + b"\n"))


def _configure_logging(*, verbose: bool) -> None:
    # qemu.qmp logs every lost connection; the error says it better, once.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    if verbose:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(relativeCreated)7.1f ms  %(message)s"))
        for name in ("qmpvcpu.qmp", "qmpvcpu.agent"):
            logger = logging.getLogger(name)
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
