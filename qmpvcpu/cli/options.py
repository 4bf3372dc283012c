"""The options that all commands share, accepted before the command and after it alike."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["BadUsageError", "Json", "Options", "Qmp", "RecordPath", "Timeout", "Verbose"]

_QMP_HELP = "The VM's QMP socket: a path, unix:PATH or tcp:HOST:PORT."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.", show_default=False)]
# The environment is read at one place only, before the command: read again after it, it would win over a --qmp there.
QmpFirst = Annotated[
    str | None, typer.Option("--qmp", metavar="ADDRESS", envvar="QMPVCPU_QMP", help=_QMP_HELP, show_default=False)
]
Qmp = Annotated[
    str | None,
    typer.Option("--qmp", metavar="ADDRESS", help=f"{_QMP_HELP} Else $QMPVCPU_QMP.", show_default=False),
]
RecordPath = Annotated[
    Path | None,
    typer.Option("--record", metavar="PATH", help="Keep the VM's durable record in this file.", show_default=False),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="How long the guest has to answer (plug, unplug: 30), or QEMU (list, xml: 10).",
        show_default=False,
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print the QMP exchange on standard error.", show_default=False)
]


class BadUsageError(Exception):
    """The command line says something that cannot be meant; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Options:
    """The shared options, as given.

    Attributes:
        json: One JSON document on standard output, nothing else there.
        qmp: Address of the VM's QMP socket, or None.
        record: Path of the record, or None.
        timeout: Seconds, or None for the command's own default.
        verbose: Print the QMP exchange on standard error.
    """

    json: bool = False
    qmp: str | None = None
    record: Path | None = None
    timeout: float | None = None
    verbose: bool = False

    def merged(self, later: "Options") -> "Options":
        """Return these options with those given *later*, after the command, on top.

        Raises:
            BadUsageError: The deadline is no length of time.
        """
        timeout = self.timeout if later.timeout is None else later.timeout
        if timeout is not None and not (timeout >= 0 and math.isfinite(timeout)):
            raise BadUsageError(f"--timeout {timeout:g}: a deadline is a finite number of seconds, 0 or more")
        return Options(
            json=self.json or later.json,
            qmp=self.qmp if later.qmp is None else later.qmp,
            record=self.record if later.record is None else later.record,
            timeout=timeout,
            verbose=self.verbose or later.verbose,
        )

    @property
    def address(self) -> str:
        """The VM's address.

        Raises:
            BadUsageError: None was given.
        """
        if not self.qmp:
            raise BadUsageError("which VM? Name its QMP socket: --qmp ADDRESS, or QMPVCPU_QMP in the environment")
        return self.qmp
