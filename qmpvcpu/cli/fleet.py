"""The words of ``qmpvcpu fleet``: list, set and count, for many VMs at once."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated

import typer

from qmpvcpu.cli.answer import Answer
from qmpvcpu.cli.maps import IncludeBoot, Wish
from qmpvcpu.cli.options import BadUsageError, Bulk, Options, Permits, Saying, check_seconds, takes_groups
from qmpvcpu.cli.run import Shell, carry_out
from qmpvcpu.errors import MonitorConnectError
from qmpvcpu.model.transition import Affect
from qmpvcpu.qmp.address import Address

_HELP = """Work on many VMs of this host at once.

The VMs are named by --qmp, as often as needed, and by --dir: every socket there, or those that --pattern names. One
that does not answer holds no other up, and has its own error.

  qmpvcpu fleet list --dir /run/vms

  qmpvcpu fleet set 0-3 --dir /run/vms --pattern '*/qmp.sock' --timeout 10

  qmpvcpu fleet count 4 --qmp /run/a.qmp --qmp tcp:host:4444 --json

Exit codes: 0 reached by all, else the worst of all VMs: 3 no connection, QEMU lost, outcome unknown; else 130 stopped
by SIGINT or SIGTERM; else 4 record unreadable or locked; else 1 refused, rejected, pending or partial; else 2 bad
usage or input, denied, nothing sent.
"""

app = typer.Typer(help=_HELP, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class FleetOptions(Saying):
    """Which VMs, and how.

    Attributes:
        qmp: Addresses of QMP sockets, or None.
        directory: Directory of QMP sockets, or None.
        pattern: Which paths in it.
        concurrency: How many VMs are begun at a time.
        record: Directory of the records, or None.
        timeout: Seconds, or None for the command's own default.
    """

    qmp: Annotated[
        list[str] | None,
        typer.Option(
            "--qmp",
            metavar="ADDRESS",
            help="A VM's QMP socket; may be repeated. Else $QMPVCPU_QMP, without --dir.",
            show_default=False,
        ),
    ] = None
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="All QMP sockets in this directory.", show_default=False),
    ] = None
    pattern: Annotated[
        str, typer.Option("--pattern", metavar="GLOB", help="Which paths below --dir: '*.qmp', '*/qmp.sock'.")
    ] = "*"
    concurrency: Annotated[
        int, typer.Option("--concurrency", metavar="N", min=1, help="How many VMs are begun at a time.")
    ] = 16
    record: Annotated[
        Path | None,
        typer.Option(
            "--record",
            metavar="DIR",
            help="Keep each VM's durable record in this directory, as its socket's path with - for / and .xml.",
            show_default=False,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="How long a guest has for each answer, where one is awaited (30); else QEMU for each reply (10).",
            show_default=False,
        ),
    ] = None

    def after(self, earlier: Options) -> "FleetOptions":
        """Return these options on top of those given *earlier*, before the command.

        Raises:
            BadUsageError: No VM is named, or not as one is.
        """
        first = [earlier.qmp] if earlier.qmp and self.directory is None else []
        made = FleetOptions(
            json=self.json or earlier.json,
            verbose=self.verbose or earlier.verbose,
            qmp=self.qmp or first,
            directory=self.directory,
            pattern=self.pattern,
            concurrency=self.concurrency,
            record=earlier.record if self.record is None else self.record,
            timeout=check_seconds("--timeout", earlier.timeout if self.timeout is None else self.timeout),
        )
        made._check()
        return made

    def _check(self) -> None:
        if not self.qmp and self.directory is None:
            raise BadUsageError("which VMs? Name their QMP sockets: --qmp ADDRESS, as often as needed, or --dir DIR")
        if not self.pattern or PurePath(self.pattern).is_absolute():
            raise BadUsageError(f"--pattern {self.pattern!r}: it is relative to --dir, such as '*.qmp'")
        for address in self.qmp or ():
            try:
                Address.parse(address)
            except MonitorConnectError as error:
                raise BadUsageError(f"--qmp: {error}") from error

    def record_of(self, address: str) -> Path | None:
        """Return where the record of the VM at *address* is kept."""
        if self.record is None:
            return None
        where = address.removeprefix("unix:").strip("/").replace("/", "-")
        return self.record / f"{where}.xml"

    @property
    def shared(self) -> Options:
        """The options that every command has."""
        return Options(json=self.json, verbose=self.verbose, timeout=self.timeout)


@dataclass(frozen=True, slots=True)
class FleetBulk(Bulk):
    """How a whole map is carried out in every VM, and of what.

    Attributes:
        affect: The VMs as they run, their next boots, or both.
    """

    affect: Annotated[
        Affect,
        typer.Option(
            "--affect",
            help="live: the VMs as they run. config: their next boots, in their records. both: live, then config.",
        ),
    ] = Affect.LIVE


@app.command("list", short_help="Show the vCPUs of every VM.")
@takes_groups
def list_(
    *,
    options: FleetOptions,
) -> int:
    """Show which vCPUs are plugged, VM by VM. Reads only; with --json every vCPU, as in list.

      qmpvcpu fleet list --dir /run/vms

      qmpvcpu fleet list --dir /run --pattern '*/qmp.sock' --timeout 2 --json

    Exit codes: 0 all are shown; 3 one or more gave no answer; 4 a record is unreadable or locked; 2 bad usage, no
    socket there, or two that lead to one VM; 130 stopped by SIGINT or SIGTERM.
    """
    return carry_out(options.shared, lambda shell: _list(shell, options))


@app.command("set", short_help="Have exactly these vCPUs plugged in every VM.")
@takes_groups
def set_(
    wish: Annotated[str, typer.Argument(metavar="MAP", help="vCPU ids and ranges: 0,2-5, or 0-3,^2.")],
    *,
    bulk: FleetBulk,
    permits: Permits,
    options: FleetOptions,
) -> int:
    """Have exactly these vCPUs plugged in every VM, each for itself, as set does.

    What one VM does not reach is undone there if --on-failure says so, and on no other. SIGINT stops all of them at
    their next safe point.

      qmpvcpu fleet set 0-3 --dir /run/vms

      qmpvcpu fleet set 0,2 --on-failure revert --timeout 10 --qmp /run/a.qmp --qmp /run/b.qmp --json

    Exit codes: 0 reached by all, also if it was so already; else the worst of all VMs, as qmpvcpu fleet --help says.
    """
    return carry_out(options.shared, lambda shell: _set(shell, options, Wish(wish), bulk, permits))


@app.command("count", short_help="Have so many vCPUs plugged in every VM.")
@takes_groups
def count(
    number: Annotated[int, typer.Argument(metavar="N", help="How many vCPUs shall be plugged.")],
    *,
    include_boot: IncludeBoot = False,
    bulk: FleetBulk,
    permits: Permits,
    options: FleetOptions,
) -> int:
    """Have so many vCPUs plugged in every VM, each for itself, as count does.

      qmpvcpu fleet count 4 --dir /run/vms

    Exit codes: 0 reached by all, also if it was so already; else the worst of all VMs, as qmpvcpu fleet --help says.
    """
    wish = Wish(count=number, include_boot=include_boot)
    return carry_out(options.shared, lambda shell: _set(shell, options, wish, bulk, permits))


# Imported where they are asked for: all other commands start without them.


async def _list(shell: Shell, options: FleetOptions) -> Answer:
    from qmpvcpu.cli.fleet_work import list_all

    return await list_all(shell, options)


async def _set(shell: Shell, options: FleetOptions, wish: Wish, bulk: FleetBulk, permits: Permits) -> Answer:
    from qmpvcpu.cli.fleet_work import set_all

    if bulk.affect is not Affect.LIVE and options.record is None:
        raise BadUsageError(
            f"--affect {bulk.affect.value}: what keeps the next boots? Name the records: --record DIR"
        )
    return await set_all(shell, options, wish, bulk, permits)
