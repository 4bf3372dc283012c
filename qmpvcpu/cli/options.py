"""The options that several commands share, each written once: in groups that a command takes as one parameter."""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from qmpvcpu.errors import MonitorConnectError, printable
from qmpvcpu.given import seconds as duration
from qmpvcpu.model.transition import Affect, OnFailure
from qmpvcpu.model.verdicts import Proof
from qmpvcpu.qmp.address import Address

_T = TypeVar("_T")
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_QMP_HELP = "The VM's QMP socket: a path, unix:PATH or tcp:HOST:PORT."


class BadUsageError(Exception):
    """The command line says something that cannot be meant; nothing was sent."""

    def __str__(self) -> str:
        return printable(super().__str__())


@dataclass(frozen=True, slots=True)
class Saying:
    """How a command says what it has to say.

    Attributes:
        json: One JSON document on standard output, nothing else there.
        verbose: Print the QMP exchange on standard error.
    """

    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, for programs.", show_default=False)
    ] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the QMP exchange on standard error.", show_default=False)
    ] = False

    def after(self, earlier: "Options") -> "Saying":
        """Return these options on top of those given *earlier*, before the command."""
        return Saying(json=self.json or earlier.json, verbose=self.verbose or earlier.verbose)


@dataclass(frozen=True, slots=True)
class Options(Saying):
    """The options of all commands that work on a VM: accepted before the command and after it alike.

    Attributes:
        qmp: Address of the VM's QMP socket, or None.
        name: What the VM is called, or None.
        record: Path of the record, or None.
        timeout: Seconds, or None for the command's own default.
    """

    qmp: Annotated[
        str | None,
        typer.Option("--qmp", metavar="ADDRESS", help=f"{_QMP_HELP} Else $QMPVCPU_QMP.", show_default=False),
    ] = None
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="The VM's name, where QEMU has no -name: a record of a VM without uuid goes by it.",
            show_default=False,
        ),
    ] = None
    record: Annotated[
        Path | None,
        typer.Option(
            "--record", metavar="PATH", help="Keep the VM's durable record in this file.", show_default=False
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="How long the guest has for each answer, where one is awaited (30); else QEMU for each reply (10).",
            show_default=False,
        ),
    ] = None

    def after(self, earlier: "Options") -> "Options":
        """Return these options on top of those given *earlier*, before the command.

        Raises:
            BadUsageError: The deadline is no length of time.
        """
        return Options(
            json=self.json or earlier.json,
            verbose=self.verbose or earlier.verbose,
            qmp=earlier.qmp if self.qmp is None else self.qmp,
            name=earlier.name if self.name is None else self.name,
            record=earlier.record if self.record is None else self.record,
            timeout=check_seconds("--timeout", earlier.timeout if self.timeout is None else self.timeout),
        )

    @property
    def address(self) -> str:
        """The VM's address.

        Raises:
            BadUsageError: None was given, or it is no address.
        """
        if not self.qmp:
            raise BadUsageError("which VM? Name its QMP socket: --qmp ADDRESS, or QMPVCPU_QMP in the environment")
        try:
            Address.parse(self.qmp)
        except MonitorConnectError as error:
            raise BadUsageError(f"--qmp: {error}") from error
        return self.qmp


@dataclass(frozen=True, slots=True)
class FirstOptions(Options):
    """The same options before the command.

    The environment is read here only: read again after the command, it would win over a --qmp before it.
    """

    qmp: Annotated[
        str | None,
        typer.Option("--qmp", metavar="ADDRESS", envvar="QMPVCPU_QMP", help=_QMP_HELP, show_default=False),
    ] = None


@dataclass(frozen=True, slots=True)
class Daring:
    """What is denied unless it is said to be meant.

    Attributes:
        allow_fatal: Send what this QEMU is known not to survive.
    """

    allow_fatal: Annotated[
        bool,
        typer.Option("--allow-fatal", help="Send even what this QEMU is known not to survive.", show_default=False),
    ] = False


@dataclass(frozen=True, slots=True)
class Permits(Daring):
    """What of an unplug is denied unless it is said to be meant.

    Attributes:
        allow_boot_vcpus: Take boot vCPUs from a VM that libvirt runs.
    """

    allow_boot_vcpus: Annotated[
        bool,
        typer.Option(
            "--allow-boot-vcpus",
            help="Take boot vCPUs even from a VM that libvirt runs: libvirtd would lose it.",
            show_default=False,
        ),
    ] = False


ConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        help="The domain XML that the VM is next started from. Else the record keeps the next boot.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Impact:
    """What is changed.

    Attributes:
        affect: The VM as it runs, its next boot, or both.
        config: The document that the VM is next started from, or None.
    """

    affect: Annotated[
        Affect,
        typer.Option(
            "--affect",
            help="live: the VM as it runs. config: its next boot; QEMU is not asked. both: first live, then config.",
        ),
    ] = Affect.LIVE
    config: ConfigPath = None

    def as_json(self) -> dict[str, str]:
        """Return what a document says of it: nothing where only the VM as it runs is changed."""
        return {} if self.affect is Affect.LIVE else {"affect": self.affect.value}

    def document(self, options: Options) -> Path:
        """Return the file that keeps the next boot.

        Raises:
            BadUsageError: None was named.
        """
        path = self.config or options.record
        if path is None:
            raise BadUsageError(
                f"--affect {self.affect.value}: what keeps the next boot? Name the VM's domain XML with --config PATH"
                ", or its record with --record PATH"
            )
        return path


@dataclass(frozen=True, slots=True)
class Bulk:
    """How a whole map is carried out.

    Attributes:
        on_failure: What becomes of the rest when a vCPU stays, or does not come.
        total_timeout: Seconds for all of it, or None.
        in_flight: At most so many commands without a reply.
        proof: What a plug waits for.
    """

    on_failure: Annotated[
        OnFailure,
        typer.Option(
            "--on-failure",
            help="When one fails. stop: ask for nothing more. continue: do the others. revert: undo what was done.",
        ),
    ] = OnFailure.STOP
    total_timeout: Annotated[
        float | None,
        typer.Option(
            "--total-timeout",
            metavar="SECONDS",
            help="How long all of it may take; undoing not counted.",
            show_default=False,
        ),
    ] = None
    in_flight: Annotated[
        int,
        typer.Option(
            "--in-flight",
            metavar="N",
            min=1,
            help="Commands on their way at once. With stop, removals go one at a time all the same.",
        ),
    ] = 8
    proof: Annotated[
        Proof, typer.Option("--proof", help="present: QEMU has it. acknowledged: wait for the guest's word too.")
    ] = Proof.PRESENT


def check_seconds(option: str, seconds: float | None) -> float | None:
    """Return *seconds* if they are a length of time, or None.

    Raises:
        BadUsageError: They are none.
    """
    try:
        return None if seconds is None else duration(option, seconds)
    except ValueError as error:
        raise BadUsageError(str(error)) from None


def takes_groups(command: Callable[..., _T]) -> Callable[..., _T]:
    """Return *command* as typer wants it: each parameter that is a group has become the options of that group.

    Options that were given before the command are taken in.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters = {"context": inspect.Parameter("context", _POSITIONAL, annotation=typer.Context)}
    groups: dict[str, Any] = {}
    for each in inspect.signature(command).parameters.values():
        if dataclasses.is_dataclass(hint := hints[each.name]):
            groups[each.name] = hint
        else:
            parameters[each.name] = each.replace(annotation=hint)
    names = {name: [each.name for each in dataclasses.fields(group)] for name, group in groups.items()}
    for group in groups.values():
        types = typing.get_type_hints(group, include_extras=True)
        parameters |= {
            field.name: inspect.Parameter(field.name, _KEYWORD, default=field.default, annotation=types[field.name])
            for field in dataclasses.fields(group)
        }

    def adapted(context: typer.Context, **given: Any) -> _T:
        for name, group in groups.items():
            made = group(**{each: given.pop(each) for each in names[name]})
            first = context.obj is None or not isinstance(made, Saying)
            given[name] = made if first else made.after(context.obj)
        return command(**given, **({"context": context} if "context" in hints else {}))

    adapted.__doc__ = command.__doc__
    adapted.__name__ = command.__name__
    adapted.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]  # inspect's own
    adapted.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    return adapted
