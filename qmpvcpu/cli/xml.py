"""xml: the state of a VM as libvirt's domain XML: a document of its own, or the VM's own with the state in."""

import asyncio
from typing import TYPE_CHECKING

from qmpvcpu.cli.options import (
    OUTPUT,
    READ_OPTIONS,
    File,
    command,
    naming_document,
    option,
    read_document,
    write_file,
)
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.domainxml import omissions, render

if TYPE_CHECKING:
    from qmpvcpu.model.layout import Layout
    from qmpvcpu.model.placement import Placement


@command(
    option("--emulator", metavar="PATH", type=File(), help="The QEMU that runs it at its next start, as <emulator>."),
    option(
        "--base",
        metavar="FILE",
        type=File(),
        help="The VM's own document: print it with this state in, all else as it was; -: standard input.",
    ),
    OUTPUT,
    *READ_OPTIONS,
)
async def xml(shell: Shell, *, emulator: str | None, base: str | None, output: str | None) -> CommandResult:
    """Print the live state as libvirt's domain XML, as virsh define accepts it.

    What libvirt cannot say, or QEMU does not tell, is left out and named on standard error. With --base it is not:
    that document keeps its memory, devices, NUMA cells and pins, byte for byte. With --record, <cputune> says where
    the record has QEMU's threads run.

      qmpvcpu xml --qmp /run/vm.qmp --emulator /usr/bin/qemu-system-x86_64 -o vm.xml

      virsh dumpxml web1 | qmpvcpu xml --base - --qmp /run/web1.qmp2

    Exit codes: 0 written; 2 bad usage, or a VM that libvirt has no words for; 3 no connection, or QEMU lost;
    4 record unreadable or locked.
    """
    if base is not None and emulator is not None:
        raise BadUsageError("--emulator goes without --base, which has its own")
    own = None if base is None else await asyncio.to_thread(read_document, base)
    layout, placement = await _look(shell)
    with naming_document(base):
        absolute = None if emulator is None else _absolute(emulator)
        xml = render(layout, base=own, emulator=absolute, placement=placement)
        left_out = omissions(layout, base=own)
    content = document(xml=xml.decode(), left_out=list(left_out), **state_json(layout))
    if output is None:
        return CommandResult(REACHED, content, (), left_out, xml)
    await write_file(output, xml)
    return CommandResult(REACHED, content | {"output": output}, (f"written to {output}",), left_out)


async def _look(shell: Shell) -> "tuple[Layout, Placement | None]":
    """Return what is known of the VM, and where its threads are to run, if a record says so."""
    if shell.options.record is None:
        return await shell.look(), None
    async with shell.attach(read_only=True) as vm:
        return vm.layout, vm.host.placement or None


def _absolute(path: str) -> str:
    from pathlib import Path  # it brings urllib

    try:
        return str(Path(path).absolute())
    except FileNotFoundError as error:
        why = "it is relative to the working directory, which was removed"
        raise BadUsageError(f"--emulator {path}: {why}") from error
