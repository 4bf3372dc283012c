"""The options of commands on a VM, each written once, and what makes a command of a function."""

import enum
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Container, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.errors import RecordError, naming_file

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qmpvcpu.model.exported import ExportedState

_E = TypeVar("_E", bound=enum.Enum)
Work = Callable[..., Coroutine[Any, Any, CommandResult]]

# Wider help is hard to read; below the second click gives up to fit, and below the third it cuts words to pieces.
_WIDEST, _NARROW, _NARROWEST = 80, 60, 20
# On a narrow terminal an option stands on a line of its own, and what it does below, indented by so much.
_INDENT: Final = 4
# The document of 4096 vCPUs, with a pin for each, has not a tenth of it.
_MOST_BYTES: Final = 16 * 1024 * 1024


class _Formatter(click.HelpFormatter):
    """Help that fits the terminal, however narrow it is."""

    def __init__(self, **_: Any) -> None:
        from shutil import get_terminal_size  # not at the top: only help needs it, and it takes a while

        super().__init__(width=max(min(get_terminal_size().columns, _WIDEST), _NARROWEST) - 2)

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, _INDENT if self.width < _NARROW else col_max, col_spacing)


class Context(click.Context):
    """What click keeps of one command while it is carried out."""

    formatter_class = _Formatter


class Command(click.Command):
    """One command."""

    context_class = Context


class Seconds(click.ParamType):  # type: ignore[type-arg]  # it has no type argument in older versions
    """A length of time; *some*: why it is more than none."""

    name = "seconds"

    def __init__(self, *, some: str = "") -> None:
        self._some = some

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return *value* as a number of seconds."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"it is a finite number of seconds, 0 or more, not {value}", param, ctx)
        if self._some and seconds == 0:
            self.fail(self._some, param, ctx)
        return seconds


class File(click.ParamType):  # type: ignore[type-arg]  # as above
    """A path."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return *value* if it can be a path."""
        if not value:
            self.fail("it is empty", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Have the shell offer files."""
        return click.Path().shell_complete(ctx, param, incomplete)


class Choice(click.Choice):  # type: ignore[type-arg]  # as above
    """One of the values of an enumeration."""

    def __init__(self, kind: type[_E]) -> None:
        self._kind = kind
        super().__init__([each.value for each in kind])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the member."""
        return value if isinstance(value, self._kind) else self._kind(super().convert(value, param, ctx))


def option(*names: str, **how: Any) -> click.Option:
    """Return an option; a default that is a value is shown, and an enumeration is chosen from by its default."""
    default = how.get("default")
    if isinstance(default, enum.Enum):
        how |= {"type": Choice(type(default)), "default": default.value}
    return click.Option([*names], show_default=default is not None, **how)


def flag(name: str, text: str) -> click.Option:
    """Return an option without a value."""
    return click.Option([name], is_flag=True, help=text)


_QMP_HELP = "The VM's QMP socket: a path, unix:PATH or tcp:HOST:PORT, or as -qmp has it."
JSON = flag("--json", "Print one JSON document, for programs.")
VERBOSE = flag("--verbose", "Print the exchange with QEMU, and with the guest's agent, on standard error.")
QMP = option("--qmp", metavar="ADDRESS", help=f"{_QMP_HELP} Else $QMPVCPU_QMP.")
# The environment is read before the command only: read after it, it would win over a --qmp before it.
FIRST_QMP = option("--qmp", metavar="ADDRESS", envvar="QMPVCPU_QMP", help=_QMP_HELP)
_AGENT_HELP = "The socket of the guest's agent (qemu-ga): as --qmp."
AGENT = option("--agent", metavar="ADDRESS", help=f"{_AGENT_HELP} Else $QMPVCPU_AGENT.")
FIRST_AGENT = option("--agent", metavar="ADDRESS", envvar="QMPVCPU_AGENT", help=_AGENT_HELP)
NAME = option(
    "--name",
    metavar="NAME",
    help="The VM's name, where QEMU has no -name: a record of a VM without uuid goes by it.",
)
RECORD = option("--record", metavar="PATH", type=File(), help="Keep the VM's durable record in this file.")
READ_RECORD = option(
    "--record",
    metavar="PATH",
    type=File(),
    help="Read the VM's record: it knows of removals that no guest has answered. It is not written.",
)
TIMEOUT = option("--timeout", metavar="SECONDS", type=Seconds(), help="How long the guest has for each answer (30).")
REPLY_TIMEOUT = option(
    "--reply-timeout",
    metavar="SECONDS",
    type=Seconds(some="QEMU needs some time to answer"),
    help="How long QEMU, or the agent, has to take the connection, and for each reply (10).",
)
OUTPUT_OPTIONS = (JSON, VERBOSE)
VM_OPTIONS = (QMP, NAME, RECORD, REPLY_TIMEOUT, *OUTPUT_OPTIONS)
READ_OPTIONS = (QMP, NAME, READ_RECORD, REPLY_TIMEOUT, *OUTPUT_OPTIONS)
FIRST_OPTIONS = (FIRST_QMP, FIRST_AGENT, NAME, RECORD, TIMEOUT, REPLY_TIMEOUT, *OUTPUT_OPTIONS)
SHARED = tuple(str(each.name) for each in FIRST_OPTIONS)

OUTPUT = option("--output", "-o", metavar="FILE", type=File(), help="Replace this file, whole or not at all.")


def said(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given: 0 is a value."""
    return {name: value for name, value in given.items() if value is not None and value is not False}


def command(*parameters: click.Parameter) -> Callable[[Work], Command]:
    """Make a command of the function below.

    It is called with a Shell, whose options are those that commands share, and with its own *parameters* by name;
    also with ``timeout`` if it has that option and a time was given.
    """
    waits = any(each.name == "timeout" for each in parameters)
    taken = {word for each in parameters for word in each.opts}

    def decorate(work: Work) -> Command:
        def callback(**given: Any) -> int:
            # Not at the top: help needs none of it.
            from qmpvcpu.cli.run import Options, carry_out

            context = click.get_current_context()
            _refuse_unused(context, taken)
            shared = {name: value for name, value in context.obj.items() if f"--{name.replace('_', '-')}" in taken}
            shared |= said({name: given.pop(name) for name in SHARED if name in given})
            if (timeout := shared.get("timeout")) is not None and waits:
                given["timeout"] = timeout
            return carry_out(Options(**shared), lambda shell: work(shell, **given))

        help_ = inspect.cleandoc(work.__doc__ or "")
        name = work.__name__.strip("_").replace("_", "-")
        return Command(name, params=[*parameters], callback=callback, help=help_)

    return decorate


def _refuse_unused(context: click.Context, taken: Container[str]) -> None:
    """Refuse what was said before the command, and could not be said after it; not what the environment says.

    Raises:
        BadUsageError: There is some of it.
    """
    first = context.find_root()
    for each in FIRST_OPTIONS:
        said_here = first.get_parameter_source(str(each.name)) is click.core.ParameterSource.COMMANDLINE
        if said_here and each.opts[0] not in taken:
            raise BadUsageError(f"{context.command_path} takes no {each.opts[0]}")


def named_on_the_line(name: str) -> bool:
    """Return True if an option of the command that runs was typed, and does not come from the environment."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return typed in (context.get_parameter_source(name), context.find_root().get_parameter_source(name))


def read_document(path: str) -> bytes:
    """Return the document at *path*; ``-`` is standard input.

    Raises:
        BadUsageError: It cannot be read, or is larger than any.
    """
    try:
        if path == "-":
            data = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            # A pipe that nobody writes to has no end that could be waited for: opened so, it is empty.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(descriptor, True)
            with os.fdopen(descriptor, "rb") as file:
                data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise BadUsageError(f"{path}: {error.strerror or error}") from error
    if len(data) > _MOST_BYTES:
        raise BadUsageError(f"{path}: larger than {_MOST_BYTES // 2**20} MiB, which no domain document is")
    return data


def naming_document(path: str | None) -> AbstractContextManager[None]:
    """Have errors about the document at *path*, as in ``read_document``, name it; None: there is none to name."""
    return nullcontext() if path is None else naming_file("standard input" if path == "-" else path)


def exported_in(path: str, data: bytes) -> "ExportedState":
    """Return what ``export`` has written to *path*, with ``--json`` or without.

    Raises:
        BadUsageError: It is no export.
    """
    from qmpvcpu.model.exported import ExportedState  # not at the top: few commands read one

    try:
        content = json.loads(data)
        return ExportedState.from_json(content.get("export", content) if isinstance(content, dict) else data.decode())
    except (ValueError, RecursionError) as error:
        where = "standard input" if path == "-" else path
        raise BadUsageError(f"{where}: no export (qmpvcpu export -o FILE writes one): {error}") from error


async def write_file(path: str, data: bytes) -> None:
    """Replace the file at *path*, whole or not at all.

    Raises:
        BadUsageError: It cannot be written.
    """
    from qmpvcpu.record.file import save  # not at the top: few commands write a file

    try:
        await save(path, data)
    except RecordError as error:
        raise BadUsageError(f"--output: {error}") from error
