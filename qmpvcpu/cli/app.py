"""The command line as a whole: what its commands are called, where each is, and what becomes of bad words."""

import sys
from collections import UserDict
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import typer

from qmpvcpu.cli.answer import REACHED
from qmpvcpu.cli.helping import fit_help, help_width
from qmpvcpu.cli.options import BadUsageError, FirstOptions, Options, takes_groups
from qmpvcpu.cli.run import Shell, failure, print_answer
from qmpvcpu.cli.streams import cannot_print, complain, silence

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

# Where the words of each command stand, with what it does; and what the list of commands says of it.
_COMMANDS: Final = {
    "demo": ("demo:demo", "See it work, on a VM of its own."),
    "list": ("commands:list_", "Show every vCPU, plugged or not."),
    "plug": ("commands:plug", "Plug a vCPU."),
    "unplug": ("commands:unplug", "Unplug vCPUs, one by one."),
    "set": ("maps:set_", "Have exactly these vCPUs plugged."),
    "count": ("maps:count", "Have so many vCPUs plugged."),
    "plan": ("maps:plan", "Show what set or count would do."),
    "recover": ("maps:recover", "Finish or revert what was cut short."),
    "xml": ("writing:xml", "Print libvirt's domain XML."),
    "watch": ("watch:watch", "Follow what happens to the vCPUs."),
    "args": ("launching:args", "Print QEMU's arguments for a domain XML."),
    "doctor": ("doctor:doctor", "Tell what works here, and what to do about what does not."),
    "export": ("migrating:export", "Print a VM's vCPUs for its migration."),
    "check-target": ("migrating:check_target_", "Tell whether a QEMU can take the VM over."),
    "confirm-target": ("migrating:confirm_target_", "Make sure that the VM has arrived."),
    "take-back": ("migrating:take_back", "Run a VM again that did not arrive."),
    "config": ("nextboot:config", "Show or change a VM's next boot, without the VM."),
    "fleet": ("fleet:app", "Many VMs at once: list, set, count."),
}


class _Commands(UserDict[str, tuple[str, str]]):
    """The commands by name, each imported and made when it is asked for, since that takes longer than to do it."""

    def __getitem__(self, name: str) -> Any:
        place, summary = super().__getitem__(name)
        module, _, words = place.partition(":")
        found = getattr(import_module(f"qmpvcpu.cli.{module}"), words)
        app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name, short_help=summary)
        else:
            app.command(name, short_help=summary)(takes_groups(found))
        fit_help(app)
        return typer.main.get_group(app).commands[name]


def program() -> Any:
    """Return the whole command line, a click group."""
    app = typer.Typer(
        name="qmpvcpu",
        help=_HELP,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(takes_groups(_shared))
    fit_help(app)
    group: Any = typer.main.get_command(app)
    group.commands = _Commands(_COMMANDS)
    return group


def _shared(context: typer.Context, options: FirstOptions) -> None:
    context.obj = options
    if context.invoked_subcommand is None:
        complain(context.get_help())
        raise BadUsageError("no command")


def run(arguments: Sequence[str]) -> int:
    """Carry out the command line *arguments* and return the exit code."""
    try:
        code = program()(list(arguments), prog_name="qmpvcpu", standalone_mode=False, terminal_width=help_width())
        sys.stdout.flush()
    except (_UsageError, BadUsageError) as error:
        return _complain(error, json="--json" in arguments)
    except SystemExit as end:  # a shell has been told what completes; or click found a broken pipe, which is no fault
        if end.code:
            silence(sys.stdout)
        return REACHED
    except OSError as error:  # help that cannot be printed
        return cannot_print(error)
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
