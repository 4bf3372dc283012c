"""The command line as a whole: what its commands are called, where each is, and what becomes of bad words."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import click

from qmpvcpu.cli.options import FIRST_OPTIONS, Context, option, said
from qmpvcpu.cli.output import cannot_print, complain
from qmpvcpu.cli.result import BadUsageError
from qmpvcpu.documents.form import REACHED

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

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

  qmpvcpu set 0,2-5 --qmp /run/vm.qmp   these in, all others out

  qmpvcpu pin 3=8-11 --qmp /run/vm.qmp  vCPU 3 on these host CPUs

  qmpvcpu config vm.xml --count 4       have four at its next boot

  qmpvcpu watch --qmp /run/vm.qmp       what happens, as it happens

  qmpvcpu stats --qmp /run/vm.qmp       how much each vCPU runs, and waits

  qmpvcpu xml --qmp /run/vm.qmp         the state as libvirt's domain XML

  qmpvcpu args vm.xml                   QEMU's arguments for its vCPUs

  qmpvcpu replay vm.xml --qmp ...       the same, into a stopped QEMU

  qmpvcpu guest list --agent ...        which vCPUs the guest uses

  qmpvcpu fleet list --dir /run/vms     many VMs at once

  qmpvcpu exporter --dir /run/vms       their metrics, for Prometheus

  qmpvcpu certify -- qemu-system-x86_64 ...  what its guest can do

  qmpvcpu --version                     which one this is

The shared options may stand before the command or after it. With --json there is one document on standard output and
nothing else, errors included (watch, stats --interval: one a line). SIGINT, SIGTERM and SIGHUP stop at the next safe
point, and what was done is printed. The second one lets go of the VM at once.

Words complete in bash, zsh and fish after qmpvcpu --install-completion.

Exit codes: 0 reached; 1 refused, rejected, pending or partial; 2 bad usage or input, denied, nothing sent;
3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by a signal.
"""

COMPLETE_VARIABLE: Final = "_QMPVCPU_COMPLETE"
"""What a shell sets in the environment of the program that it asks what completes."""

# Where each command is, and what the list of commands says of it.
_COMMANDS: Final = {
    "demo": ("demo:command", "See it work, on a VM of its own."),
    "list": ("list:list_", "Show every vCPU, plugged or not."),
    "plug": ("plug:plug", "Plug vCPUs, one by one."),
    "unplug": ("plug:unplug", "Unplug vCPUs, one by one."),
    "set": ("set:set_", "Plug these vCPUs and unplug all others."),
    "count": ("set:count", "Change how many vCPUs are plugged."),
    "plan": ("set:plan", "Show what set or count would do."),
    "pin": ("pin:pin", "Show or choose which host CPUs vCPUs run on."),
    "sched": ("pin:sched", "Show or choose how vCPUs are scheduled."),
    "recover": ("recover:recover", "Finish or revert what was cut short."),
    "replay": ("replay:replay", "Plug into a stopped QEMU what a VM had."),
    "xml": ("xml:xml", "Print libvirt's domain XML."),
    "watch": ("watch:watch", "Follow what happens to the vCPUs."),
    "stats": ("stats:stats", "Show how much each vCPU runs, and waits."),
    "args": ("args:args", "Print QEMU's arguments for a domain XML."),
    "certify": ("certify:certify_", "Try everything a guest can do with vCPUs."),
    "doctor": ("doctor:doctor", "Show what works here, and what to do about the rest."),
    "export": ("migrate:export", "Print a VM's vCPUs for its migration."),
    "check-target": ("migrate:check_target_command", "Tell whether a QEMU can take the VM over."),
    "confirm-target": ("migrate:confirm_target_command", "Make sure that the VM has arrived."),
    "take-back": ("migrate:take_back", "Run a VM again that did not arrive."),
    "config": ("config:config", "Show or change a VM's next boot, without the VM."),
    "guest": ("guest:guest", "Which vCPUs the guest uses: list, online, offline."),
    "fleet": ("fleet:fleet", "Many VMs at once: list, set, count."),
    "agent": ("agent:agent", "Serve the VMs of this host over NATS."),
    "hosts": ("hosts:hosts", "Many hosts over NATS: init, list, demo."),
    "campaign": ("campaign:campaign", "Changes of many hosts: list, show, pause, stop."),
    "exporter": ("exporter:exporter", "Serve metrics of many VMs for Prometheus."),
}


_OF_VIRSH = {
    "setvcpus": "count",
    "setvcpu": "plug, unplug or config",
    "vcpucount": "list",
    "vcpuinfo": "list",
    "guestvcpus": "guest",
    "domstats": "stats",
    "cpu-stats": "stats",
    "vcpupin": "pin",
    "emulatorpin": "pin --emulator",
    "schedinfo": "sched",
    "dumpxml": "xml",
    "domxml-to-native": "args",
    "define": "config",
    "event": "watch",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for.

    Args:
        commands: Where each command is (``module:name`` in this package), and what the list of commands says of it.
        of_virsh: Which of them does what a command of virsh's does.
    """

    context_class = Context

    def __init__(
        self, name: str, commands: dict[str, tuple[str, str]], of_virsh: dict[str, str] | None = None, **how: Any
    ) -> None:
        super().__init__(name, **how)
        self._places = commands
        self._of_virsh = of_virsh or {}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        """Return the names of all commands, in the order in which they are listed."""
        return [*self._places]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        """Return the command of that name, or None."""
        if cmd_name not in self._places:
            return None
        module, _, name = self._places[cmd_name][0].partition(":")
        found: click.Command | Callable[[], click.Command] = getattr(import_module(f"qmpvcpu.cli.{module}"), name)
        return found if isinstance(found, click.Command) else found()

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one may be meant."""
        named = args[0]
        if named not in self._places and not named.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches  # not at the top: only a mistake needs it

            if there := self._of_virsh.get(named):
                ctx.fail(f"No such command {named!r}. In place of virsh {named} use {there}, see docs/virsh.md.")
            if meant := get_close_matches(named, self._places, 1):
                ctx.fail(f"No such command {named!r}. Did you mean {meant[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self._places.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        """Offer the commands, without importing them, and the options."""
        from click.shell_completion import CompletionItem  # not at the top: commands do without it

        names = [name for name in self._places if name.startswith(incomplete)]
        offered = [CompletionItem(name, help=self._places[name][1]) for name in names]
        return offered + click.Command.shell_complete(self, ctx, incomplete)


def pass_on(**given: Any) -> None:
    """Have what was said before the command of a group count for that command; it is the group's callback."""
    context = click.get_current_context()
    context.obj = {**context.obj, **said(given)}


def program() -> LazyGroup:
    """Return the whole command line."""
    return LazyGroup(
        "qmpvcpu",
        _COMMANDS,
        _OF_VIRSH,
        help=_HELP,
        params=[*FIRST_OPTIONS, *_completion_options()],
        callback=_begin,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _begin(**given: Any) -> None:
    context = click.get_current_context()
    context.obj = said(given)
    if context.invoked_subcommand is None:
        complain(context.get_help())
        raise BadUsageError("no command")


def _completion_options() -> list[click.Option]:
    texts = {
        "--install-completion": "Set completion up for bash, zsh or fish.",
        "--show-completion": "Print what that would write.",
    }
    how = {"metavar": "[SHELL]", "is_flag": False, "flag_value": "", "expose_value": False, "is_eager": True}
    return [option(name, callback=_complete, help=text, **how) for name, text in texts.items()]


def _complete(context: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    if shell is None or context.resilient_parsing:
        return
    # Not at the top: only completion needs it.
    from qmpvcpu.cli.completion import install, script

    click.echo(install(shell) if parameter.name == "install_completion" else script(shell))
    context.exit()


def run(arguments: Sequence[str]) -> int:
    """Carry out the command line *arguments* and return the exit code."""
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        from qmpvcpu.cli.completion import answer

        return answer(program(), instruction)
    try:
        with program().make_context("qmpvcpu", [*arguments]) as context:
            code = context.command.invoke(context)
        sys.stdout.flush()
    except (click.ClickException, BadUsageError, KeyboardInterrupt) as error:
        return _fail(error, json="--json" in arguments)
    except click.exceptions.Exit as end:  # help was printed, or completion
        return _flushed() or end.exit_code
    except click.Abort:
        return _fail(KeyboardInterrupt(), json="--json" in arguments)
    except OSError as error:
        # Help that cannot be printed, or modules that cannot be read: a command tells its own errors.
        return cannot_print(error) if error.filename is None else _fail(error, json="--json" in arguments)
    return code if isinstance(code, int) else 0


def _flushed() -> int:
    try:
        sys.stdout.flush()
    except OSError as error:
        return cannot_print(error)
    return REACHED


def _fail(error: BaseException, *, json: bool) -> int:
    # Not at the top: help needs none of it.
    from qmpvcpu.cli.run import Options, fail

    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        path = "qmpvcpu" if context is None else context.command_path
        error = BadUsageError(f"{error.format_message()} ({path} --help tells more)")
    return fail(error, Options(json=json))
