"""The commands' words: options, arguments, help."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qmpvcpu import Proof
from qmpvcpu.cli import commands, fleet, maps
from qmpvcpu.cli.completing import ids_to_plug, ids_to_unplug
from qmpvcpu.cli.demo import GuestKind
from qmpvcpu.cli.demo import demo as play
from qmpvcpu.cli.doctor import doctor
from qmpvcpu.cli.helping import fit_help, help_width
from qmpvcpu.cli.launching import args
from qmpvcpu.cli.maps import How, Wish
from qmpvcpu.cli.migrating import check_target_, confirm_target_, export, take_back
from qmpvcpu.cli.nextboot import config
from qmpvcpu.cli.options import (
    BadUsageError,
    Bulk,
    ConfigPath,
    Daring,
    FirstOptions,
    Impact,
    Options,
    Permits,
    Saying,
    takes_groups,
)
from qmpvcpu.cli.run import REACHED, Answer, Shell, carry_out, failure, print_answer
from qmpvcpu.cli.streams import silence
from qmpvcpu.cli.watch import watch
from qmpvcpu.cli.writing import xml

__all__ = ["app", "run"]

# libvirt's own bound; no machine of QEMU's comes near it.
_MAX_ID = 16383

_HELP = """Plug and unplug chosen vCPUs of a running QEMU, on evidence.

The VM is named by its QMP socket: --qmp ADDRESS, or QMPVCPU_QMP in the environment. A QMP socket serves one client at
a time. Where libvirt, a VMM or qmpvcpu watch holds it, start QEMU with a second one:
-qmp unix:/run/vm.qmp2,server=on,wait=off; of libvirt by <qemu:commandline>. docs/sharing.md has all ways.

  qmpvcpu demo                          see it work, on a VM of its own

  qmpvcpu doctor                        what works here, and what does not

  qmpvcpu list --qmp /run/vm.qmp        every vCPU, plugged or not

  qmpvcpu plug 3 --qmp /run/vm.qmp      vCPU 3 in

  qmpvcpu unplug 3 --qmp /run/vm.qmp    vCPU 3 out, once the guest agrees

  qmpvcpu plan 0,2-5 --qmp /run/vm.qmp  what it takes to have these

  qmpvcpu set 0,2-5 --qmp /run/vm.qmp   have exactly these

  qmpvcpu config vm.xml --count 4       have four at its next boot

  qmpvcpu watch --qmp /run/vm.qmp       what happens, as it happens

  qmpvcpu xml --qmp /run/vm.qmp         the state as libvirt's domain XML

  qmpvcpu args vm.xml                   QEMU's arguments for its vCPUs

  qmpvcpu fleet list --dir /run/vms     many VMs at once

  qmpvcpu --version                     which one this is

The shared options may stand before the command or after it. With --json there is one document on standard output and
nothing else, errors included (of watch: one a line). SIGINT and SIGTERM stop at the next safe point; what was done is
told. The second one abandons at once.

Words complete in bash, zsh and fish after qmpvcpu --install-completion.

Exit codes: 0 reached; 1 refused, rejected, pending or partial; 2 bad usage or input, denied, nothing sent;
3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT or SIGTERM.
"""

_MAP_HELP = "vCPU ids and ranges, as libvirt writes them: 0,2-5, or 0-3,^2."

IncludeBoot = Annotated[
    bool, typer.Option("--include-boot", help="Take boot vCPUs out too, highest first, never 0.", show_default=False)
]

app = typer.Typer(
    name="qmpvcpu",
    help=_HELP,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
app.add_typer(fleet.app, name="fleet", short_help="Many VMs at once: list, set, count.")


def run(arguments: Sequence[str]) -> int:
    """Carry out the command line *arguments* and return the exit code."""
    try:
        code = app(list(arguments), prog_name="qmpvcpu", standalone_mode=False, terminal_width=help_width())
        sys.stdout.flush()
    except (_UsageError, BadUsageError) as error:
        return _complain(error, json="--json" in arguments)
    except SystemExit as end:  # a shell has been told what completes; or click found a broken pipe, which is no fault
        if end.code:
            silence(sys.stdout)
        return REACHED
    except OSError as error:  # help that cannot be printed
        silence(sys.stdout)
        fault = None if isinstance(error, BrokenPipeError) else error
        return print_answer(Answer(REACHED, {}), Shell(Options(), unprinted=fault))
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
    words = say().replace("Value error, ", "")  # pydantic's, where typer has it check an enum
    return print_answer(failure(BadUsageError(f"{words} ({path} --help tells more)"), shell), shell)


@app.callback(invoke_without_command=True)
@takes_groups
def _shared(context: typer.Context, options: FirstOptions) -> None:
    context.obj = options
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help() + "\n")
        raise BadUsageError("no command")


@app.command(short_help="See it work, on a VM of its own.")
@takes_groups
def demo(
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
    options: Saying,
) -> int:
    """Start a VM and show every verdict on it, with the map after each step and the XML at the end.

    Needs a qemu-system-x86_64 and nothing else: the guest is some hundred bytes that come with the package. The Linux
    guest is made by fixtures/linux/build.sh. KVM is used where it runs the guest, else TCG.

    In the map, [3] is plugged, (3) is plugged with a removal pending, [ ] is free.

      qmpvcpu demo

      qmpvcpu demo --guest linux --verbose

    Exit codes: 0 every step went as expected; 1 one did not; 2 no QEMU, or no Linux guest; 3 QEMU did not start, or
    was lost; 130 stopped by SIGINT or SIGTERM.
    """
    return carry_out(Options(json=options.json, verbose=options.verbose), lambda shell: play(shell, guest, qemu))


@app.command("list", short_help="Show every vCPU, plugged or not.")
@takes_groups
def list_(
    *,
    options: Options,
) -> int:
    """Show every vCPU: plugged or free, order, place, device id, QOM path, host thread.

    Reads only. States: plugged; fixed (plugged, cannot be unplugged by us now); pending (its removal is accepted and
    the guest has not answered); free.

      qmpvcpu list --qmp /run/vm.qmp

      qmpvcpu list --qmp tcp:host:4444 --json

    Exit codes: 0 shown; 2 bad usage; 3 no connection, or QEMU lost; 4 record unreadable or locked.
    """
    return carry_out(options, commands.list_vcpus)


@app.command(short_help="Plug a vCPU.")
@takes_groups
def plug(
    vcpu: Annotated[
        int | None,
        typer.Argument(
            metavar="ID",
            min=0,
            max=_MAX_ID,
            help="vCPU id; none: the first free one.",
            show_default=False,
            autocompletion=ids_to_plug,
        ),
    ] = None,
    *,
    proof: Annotated[
        Proof, typer.Option("--proof", help="present: QEMU has it. acknowledged: the guest has said so too.")
    ] = Proof.PRESENT,
    impact: Impact,
    daring: Daring,
    options: Options,
) -> int:
    """Plug one vCPU, the chosen one or the first free one.

    What is known not to work is denied and never sent: an occupied slot, an unknown id, a full machine, a VM that
    migrates, a step that this QEMU would not survive.

      qmpvcpu plug 3 --qmp /run/vm.qmp

      qmpvcpu plug --proof acknowledged --timeout 5 --qmp /run/vm.qmp

      qmpvcpu plug 3 --affect both --config vm.xml --qmp /run/vm.qmp

    Exit codes: 0 plugged; 1 rejected by QEMU, or plugged without the proof asked for; 2 denied, nothing sent;
    3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT or
    SIGTERM.
    """
    return carry_out(options, lambda shell: commands.plug(shell, vcpu, proof, daring, impact))


@app.command(short_help="Unplug vCPUs, one by one.")
@takes_groups
def unplug(
    vcpus: Annotated[
        list[int],
        typer.Argument(
            metavar="ID...",
            min=0,
            max=_MAX_ID,
            help="vCPU ids, asked for one by one.",
            autocompletion=ids_to_unplug,
        ),
    ],
    *,
    impact: Impact,
    permits: Permits,
    options: Options,
) -> int:
    """Unplug vCPUs one by one; each has left when QEMU proves it, not when it was asked.

    The guest may refuse (its reason is shown, it can be asked again), or take its time: after --timeout the vCPU is
    pending. QEMU never forgets such a request; unplug it again to wait for the same answer, nothing is sent twice.
    After one that does not leave, no other is asked for.

      qmpvcpu unplug 3 --qmp /run/vm.qmp

      qmpvcpu unplug 5 4 3 --timeout 60 --qmp /run/vm.qmp

    Exit codes: 0 all are gone; 1 refused, rejected or pending; 2 denied, nothing sent; 3 no connection, QEMU lost,
    outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT or
    SIGTERM.
    """
    return carry_out(options, lambda shell: commands.unplug(shell, vcpus, permits, impact))


@app.command("set", short_help="Have exactly these vCPUs plugged.")
@takes_groups
def set_(
    wish: Annotated[str, typer.Argument(metavar="MAP", help=_MAP_HELP)],
    *,
    impact: Impact,
    bulk: Bulk,
    permits: Permits,
    options: Options,
) -> int:
    """Have exactly these vCPUs plugged, boot vCPUs included: the others leave.

    What cannot be is denied before anything is sent, as plan shows it. Plugs come first, then unplugs, highest first.
    The guest may refuse any of them, or take its time: --timeout is for each answer, and --on-failure says what
    becomes of the rest. The report has a row for each slot: what was done, how it ended, whether it was undone.

    With --record it can be looked at, finished or reverted later, whatever ends this program: qmpvcpu recover.

      qmpvcpu set 0,2-5 --qmp /run/vm.qmp

      qmpvcpu set 0-3,^2 --on-failure revert --timeout 10 --record vm.xml --qmp /run/vm.qmp --json

      qmpvcpu set 0-3 --affect config --config vm.xml

    Exit codes: 0 reached, also if it was so already; 1 refused, rejected, pending, partial or reverted; 2 bad usage
    or input, denied, nothing sent; 3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked;
    130 stopped by SIGINT or SIGTERM.
    """
    return carry_out(options, lambda shell: maps.set_wish(shell, Wish(wish), bulk, permits, impact))


@app.command(short_help="Have so many vCPUs plugged.")
@takes_groups
def count(
    number: Annotated[int, typer.Argument(metavar="N", help="How many vCPUs shall be plugged.")],
    *,
    include_boot: IncludeBoot = False,
    impact: Impact,
    bulk: Bulk,
    permits: Permits,
    options: Options,
) -> int:
    """Have so many vCPUs plugged, as libvirt's setvcpus does: the lowest free ones in, the highest out.

    What was there at boot stays, unless --include-boot; vCPU 0 always does. The rest is as in set.

      qmpvcpu count 4 --qmp /run/vm.qmp

      qmpvcpu count 1 --include-boot --on-failure continue --qmp /run/vm.qmp

    Exit codes: 0 reached, also if it was so already; 1 refused, rejected, pending, partial or reverted; 2 bad usage
    or input, denied, nothing sent; 3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked;
    130 stopped by SIGINT or SIGTERM.
    """
    wish = Wish(count=number, include_boot=include_boot)
    return carry_out(options, lambda shell: maps.set_wish(shell, wish, bulk, permits, impact))


@app.command(short_help="Show what set or count would do.")
@takes_groups
def plan(
    wish: Annotated[str | None, typer.Argument(metavar="MAP", help=_MAP_HELP, show_default=False)] = None,
    *,
    number: Annotated[
        int | None, typer.Option("--count", metavar="N", help="Instead of a map: how many.", show_default=False)
    ] = None,
    include_boot: IncludeBoot = False,
    impact: Impact,
    permits: Permits,
    options: Options,
) -> int:
    """Show what set, or count, would do now, step by step, and what would be denied. Nothing is sent, or written.

      qmpvcpu plan 0,2-5 --qmp /run/vm.qmp

      qmpvcpu plan --count 2 --include-boot --qmp /run/vm.qmp --json

      qmpvcpu plan 0-3 --affect both --config vm.xml --qmp /run/vm.qmp

    Exit codes: 0 it can be tried, or is so already; 2 denied, or bad usage or input; 3 no connection, or QEMU lost;
    4 record unreadable or locked.
    """
    return carry_out(options, lambda shell: maps.plan(shell, Wish(wish, number, include_boot), permits, impact))


@app.command(short_help="Finish or revert what was cut short.")
@takes_groups
def recover(
    *,
    finish: Annotated[bool, typer.Option("--finish", help="Go on to what was wanted.", show_default=False)] = False,
    revert: Annotated[bool, typer.Option("--revert", help="Undo what was done of it.", show_default=False)] = False,
    config: ConfigPath = None,
    options: Options,
) -> int:
    """Look at a set, count, plug or unplug that was cut short (killed, QEMU unreachable), and end it.

    The record says what was wanted, in which order, under which policy; QEMU says what is so now. Without --finish or
    --revert both are shown, and nothing is changed. Only the vCPUs concerned are touched.

      qmpvcpu recover --record vm.xml --qmp /run/vm.qmp

      qmpvcpu recover --finish --record vm.xml --qmp /run/vm.qmp

    Exit codes: 0 nothing was interrupted, or nothing is left to do of it; 1 something is left to do, also where
    --finish or --revert finds but a removal that the guest has still to answer; 2 bad usage, or denied, nothing sent;
    3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT or SIGTERM.
    """
    if finish and revert:
        raise BadUsageError("--finish or --revert: one of them")
    how = How.FINISH if finish else How.REVERT if revert else How.REPORT
    return carry_out(options, lambda shell: maps.recover(shell, how, config))


# Whose words stand with what they do.
app.command("xml", short_help="Print libvirt's domain XML.")(takes_groups(xml))
app.command("watch", short_help="Follow what happens to the vCPUs.")(takes_groups(watch))
app.command("args", short_help="Print QEMU's arguments for a domain XML.")(takes_groups(args))
app.command("doctor", short_help="Tell what works here, and what to do about what does not.")(takes_groups(doctor))
app.command("export", short_help="Print a VM's vCPUs for its migration.")(takes_groups(export))
app.command("check-target", short_help="Tell whether a QEMU can take the VM over.")(takes_groups(check_target_))
app.command("confirm-target", short_help="Make sure that the VM has arrived.")(takes_groups(confirm_target_))
app.command("take-back", short_help="Run a VM again that did not arrive.")(takes_groups(take_back))
app.command("config", short_help="Show or change a VM's next boot, without the VM.")(takes_groups(config))
fit_help(app)
