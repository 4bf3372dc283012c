"""The commands' words: options, arguments, help."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qmpvcpu import Proof
from qmpvcpu.cli import commands
from qmpvcpu.cli.demo import GuestKind
from qmpvcpu.cli.demo import demo as play
from qmpvcpu.cli.options import BadUsageError, Json, Options, Qmp, QmpFirst, RecordPath, Timeout, Verbose
from qmpvcpu.cli.run import Shell, carry_out, failure, print_answer

__all__ = ["app", "run"]

# libvirt's own bound; no machine of QEMU's comes near it.
_MAX_ID = 16383

_HELP = """Plug and unplug chosen vCPUs of a running QEMU, on evidence.

The VM is named by its QMP socket: --qmp ADDRESS, or QMPVCPU_QMP in the environment. A UNIX QMP socket serves one
client at a time: where libvirt or a VMM holds it, give QEMU a second -qmp.

  qmpvcpu demo                        see it work, on a VM of its own

  qmpvcpu list --qmp /run/vm.qmp      every vCPU, plugged or not

  qmpvcpu plug 3 --qmp /run/vm.qmp    vCPU 3 in

  qmpvcpu unplug 3 --qmp /run/vm.qmp  vCPU 3 out, once the guest agrees

  qmpvcpu xml --qmp /run/vm.qmp       the state as libvirt's domain XML

The shared options may stand before the command or after it. With --json there is one document on standard output and
nothing else, errors included.

Exit codes: 0 reached; 1 refused, rejected, pending or partial; 2 bad usage or input, denied, nothing sent;
3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT.
"""

app = typer.Typer(
    name="qmpvcpu",
    help=_HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def run(arguments: Sequence[str]) -> int:
    """Carry out the command line *arguments* and return the exit code."""
    try:
        code = app(list(arguments), prog_name="qmpvcpu", standalone_mode=False)
    except (_UsageError, BadUsageError) as error:
        return _complain(error, json="--json" in arguments)
    except typer.Abort:
        return _complain(KeyboardInterrupt(), json="--json" in arguments)
    return code if isinstance(code, int) else 0


# Typer exports the most derived class only; the base has been click's own, or typer's copy, by version.
_UsageError: type[Exception] = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")


def _complain(error: BaseException, *, json: bool) -> int:
    shell = Shell(Options(json=json))
    say = getattr(error, "format_message", None)
    if say is None:
        return print_answer(failure(error, shell), shell)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "qmpvcpu"
    return print_answer(failure(BadUsageError(f"{say()} ({path} --help tells more)"), shell), shell)


@app.callback(invoke_without_command=True)
def _shared(
    context: typer.Context,
    *,
    json: Json = False,
    qmp: QmpFirst = None,
    record: RecordPath = None,
    timeout: Timeout = None,
    verbose: Verbose = False,
) -> None:
    context.obj = Options(json, qmp, record, timeout, verbose)
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help() + "\n")
        raise BadUsageError("no command")


@app.command(short_help="See it work, on a VM of its own.")
def demo(
    context: typer.Context,
    *,
    guest: Annotated[
        GuestKind, typer.Option("--guest", help="microguest: up in a tenth of a second. linux: a real Linux.")
    ] = GuestKind.MICROGUEST,
    qemu: Annotated[
        Path | None,
        typer.Option(
            "--qemu", metavar="PATH", help="The QEMU to run. Else QMPVCPU_QEMU, else the newest.", show_default=False
        ),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Start a VM and show every verdict on it, with the map after each step and the XML at the end.

    Needs a qemu-system-x86_64 and nothing else: the guest is some hundred bytes that come with the package. The Linux
    guest is made by fixtures/linux/build.sh. KVM is used where it runs the guest, else TCG.

    In the map, [3] is plugged, (3) is plugged with a removal pending, [ ] is free.

      qmpvcpu demo

      qmpvcpu demo --guest linux --verbose

    Exit codes: 0 every step went as expected; 1 one did not; 2 no QEMU, or no Linux guest; 3 QEMU did not start, or
    was lost.
    """
    options = context.obj.merged(Options(json=json, verbose=verbose))
    # Shared options that name a VM or its record are for the other commands.
    return carry_out(Options(json=options.json, verbose=options.verbose), lambda shell: play(shell, guest, qemu))


@app.command("list", short_help="Show every vCPU, plugged or not.")
def list_(
    context: typer.Context,
    *,
    json: Json = False,
    qmp: Qmp = None,
    record: RecordPath = None,
    timeout: Timeout = None,
    verbose: Verbose = False,
) -> int:
    """Show every vCPU: plugged or free, order, place, device id, QOM path, host thread.

    Reads only. States: plugged; fixed (plugged, cannot be unplugged by us now); pending (its removal is accepted and
    the guest has not answered); free.

      qmpvcpu list --qmp /run/vm.qmp

      qmpvcpu list --qmp tcp:host:4444 --json

    Exit codes: 0 shown; 2 bad usage; 3 no connection, or QEMU lost; 4 record unreadable.
    """
    options = context.obj.merged(Options(json, qmp, record, timeout, verbose))
    return carry_out(options, commands.list_vcpus)


@app.command(short_help="Plug a vCPU.")
def plug(
    context: typer.Context,
    vcpu: Annotated[
        int | None,
        typer.Argument(
            metavar="[ID]", min=0, max=_MAX_ID, help="vCPU id; none: the first free one.", show_default=False
        ),
    ] = None,
    *,
    proof: Annotated[
        Proof, typer.Option("--proof", help="present: QEMU has it. acknowledged: the guest has said so too.")
    ] = Proof.PRESENT,
    json: Json = False,
    qmp: Qmp = None,
    record: RecordPath = None,
    timeout: Timeout = None,
    verbose: Verbose = False,
) -> int:
    """Plug one vCPU, the chosen one or the first free one.

    What is known not to work is denied and never sent: an occupied slot, an unknown id, a full machine, a VM that
    migrates, a step that this QEMU would not survive.

      qmpvcpu plug 3 --qmp /run/vm.qmp

      qmpvcpu plug --proof acknowledged --timeout 5 --qmp /run/vm.qmp

    Exit codes: 0 plugged; 1 rejected by QEMU, or plugged without the proof asked for; 2 denied, nothing sent;
    3 no connection, QEMU lost, outcome unknown; 4 record unreadable; 130 stopped by SIGINT.
    """
    options = context.obj.merged(Options(json, qmp, record, timeout, verbose))
    return carry_out(options, lambda shell: commands.plug(shell, vcpu, proof))


@app.command(short_help="Unplug vCPUs, one by one.")
def unplug(
    context: typer.Context,
    vcpus: Annotated[
        list[int], typer.Argument(metavar="ID...", min=0, max=_MAX_ID, help="vCPU ids, asked for one by one.")
    ],
    *,
    json: Json = False,
    qmp: Qmp = None,
    record: RecordPath = None,
    timeout: Timeout = None,
    verbose: Verbose = False,
) -> int:
    """Unplug vCPUs one by one; each has left when QEMU proves it, not when it was asked.

    The guest may refuse (its reason is shown, it can be asked again), or take its time: after --timeout the vCPU is
    pending. QEMU never forgets such a request; unplug it again to wait for the same answer, nothing is sent twice.
    After one that does not leave, no other is asked for.

      qmpvcpu unplug 3 --qmp /run/vm.qmp

      qmpvcpu unplug 5 4 3 --timeout 60 --qmp /run/vm.qmp

    Exit codes: 0 all are gone; 1 refused, rejected or pending; 2 denied, nothing sent; 3 no connection, QEMU lost,
    outcome unknown; 4 record unreadable; 130 stopped by SIGINT.
    """
    options = context.obj.merged(Options(json, qmp, record, timeout, verbose))
    return carry_out(options, lambda shell: commands.unplug(shell, vcpus))


@app.command(short_help="Print libvirt's domain XML.")
def xml(
    context: typer.Context,
    *,
    emulator: Annotated[
        Path | None,
        typer.Option("--emulator", metavar="PATH", help="QEMU that shall run it, as <emulator>.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Replace this file, whole or not at all.", show_default=False
        ),
    ] = None,
    json: Json = False,
    qmp: Qmp = None,
    record: RecordPath = None,
    timeout: Timeout = None,
    verbose: Verbose = False,
) -> int:
    """Print the live state as libvirt's domain XML, as virsh define accepts it.

    What libvirt cannot say, or QEMU does not tell, is left out and named on standard error.

      qmpvcpu xml --qmp /run/vm.qmp --emulator /usr/bin/qemu-system-x86_64 -o vm.xml

    Exit codes: 0 written; 2 bad usage, or a VM that libvirt has no words for; 3 no connection, or QEMU lost;
    4 record unreadable.
    """
    options = context.obj.merged(Options(json, qmp, record, timeout, verbose))
    path = None if emulator is None else str(emulator.absolute())
    return carry_out(options, lambda shell: commands.write_xml(shell, path, output))
