"""demo: the test kit's demo on the command line's stage, which works without the extra ``cli`` too."""

from pathlib import Path
from typing import TYPE_CHECKING

from qmpvcpu.cli.failures import failure
from qmpvcpu.cli.output import Line
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.documents.form import NO_ANSWER, NOT_REACHED, NOT_SENT, REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.testing.demo import GuestKind, play
from qmpvcpu.testing.directory import TemporaryDirectoryError
from qmpvcpu.testing.linuxguest import LinuxGuestMissingError
from qmpvcpu.testing.qemu import QemuNotFoundError, QemuProcessError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    import click

    from qmpvcpu.vm.controller import VcpuController


def command() -> "click.Command":
    """Return the command, for which click is needed."""
    from qmpvcpu.cli.options import OUTPUT_OPTIONS, File, command, option

    return command(
        option(
            "--guest",
            default=GuestKind.MICROGUEST,
            help="microguest: up in a tenth of a second. linux: a real Linux.",
        ),
        option("--qemu", metavar="PATH", type=File(), help="The QEMU to run. Else QMPVCPU_QEMU, else the newest."),
        *OUTPUT_OPTIONS,
    )(demo)


async def demo(shell: Shell, *, guest: GuestKind = GuestKind.MICROGUEST, qemu: str | None = None) -> CommandResult:
    """Start a VM and show every verdict on it, with the map after each step and the XML at the end.

    Needs a qemu-system-x86_64 and nothing else: the guest is some hundred bytes that come with the package. The Linux
    guest is made by `python -m qmpvcpu.testing.linuxguest`. KVM is used where it runs the guest, else TCG.

    In the map, [3] is plugged, (3) is plugged with a removal pending, [ ] is free.

      qmpvcpu demo

      qmpvcpu demo --guest linux --verbose

    Exit codes: 0 every step went as expected; 1 one did not; 2 no QEMU, or no Linux guest; 3 QEMU did not start, or
    was lost; 130 stopped by a signal.
    """
    try:
        played = await play(_Stage(shell), guest, qemu)
    except (QemuNotFoundError, LinuxGuestMissingError, TemporaryDirectoryError) as error:
        return failure(error, shell, NOT_SENT)
    except QemuProcessError as error:
        return failure(error, shell, NO_ANSWER)
    shell.say("\nThe state as libvirt's domain XML (virsh define takes it):\n")
    code = NOT_REACHED if played.differences else REACHED
    content = document(**played.content, **state_json(played.layout))
    return CommandResult(code, content, (played.xml.rstrip("\n"),), played.differences)


async def demo_alone(shell: Shell) -> CommandResult:
    """Play it where the extra ``cli`` is not installed, and tell how to get the other commands."""
    result = await demo(shell)
    if shell.stdout_closed or "error" in result.document:
        return result
    hint = "\nAll other commands: pip install 'qmpvcpu[cli]'"
    return CommandResult(result.code, result.document, result.text, (*result.complaint, hint))


class _Stage:
    """The command line as the demo's stage."""

    def __init__(self, shell: Shell) -> None:
        self.done = shell.done
        self.note = shell.note
        self._shell = shell

    def attach(self, target: Path, *, name: str) -> "AbstractAsyncContextManager[VcpuController]":
        self._shell.options = self._shell.options._replace(qmp=str(target), name=name)
        return self._shell.attach()

    def say(self, *parts: str | tuple[str, str]) -> None:
        self._shell.say(Line(*parts))
