"""The state of a VM as libvirt's domain XML: a document of its own, or the VM's own with the state in."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from qmpvcpu.cli.answer import REACHED, Answer
from qmpvcpu.cli.documents import document
from qmpvcpu.cli.launching import read_document
from qmpvcpu.cli.options import BadUsageError, Options
from qmpvcpu.cli.run import Shell, carry_out
from qmpvcpu.cli.show import state_json
from qmpvcpu.domainxml import omissions, render
from qmpvcpu.errors import RecordError, printable
from qmpvcpu.record.file import save


def xml(
    *,
    emulator: Annotated[
        Path | None,
        typer.Option("--emulator", metavar="PATH", help="QEMU that shall run it, as <emulator>.", show_default=False),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="FILE",
            help="The VM's own document: print it with this state in, all else as it was; -: standard input.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Replace this file, whole or not at all.", show_default=False
        ),
    ] = None,
    options: Options,
) -> int:
    """Print the live state as libvirt's domain XML, as virsh define accepts it.

    What libvirt cannot say, or QEMU does not tell, is left out and named on standard error. With --base it is not:
    that document keeps its memory, devices, NUMA cells and pins, byte for byte.

      qmpvcpu xml --qmp /run/vm.qmp --emulator /usr/bin/qemu-system-x86_64 -o vm.xml

      virsh dumpxml web1 | qmpvcpu xml --base - --qmp /run/web1.qmp2

    Exit codes: 0 written; 2 bad usage, or a VM that libvirt has no words for; 3 no connection, or QEMU lost;
    4 record unreadable or locked.
    """
    path = None if emulator is None else str(emulator.absolute())
    return carry_out(options, lambda shell: _write_xml(shell, path, output, base))


async def _write_xml(shell: Shell, emulator: str | None, output: Path | None, base: Path | None) -> Answer:
    """Write the live state as libvirt's domain XML: one of its own, or the document *base* with it in."""
    if base is not None and emulator is not None:
        raise BadUsageError("--emulator goes without --base, which has its own")
    document_of_vm = None if base is None else await asyncio.to_thread(read_document, base)
    async with shell.attach(reply_timeout=shell.reply_timeout, read_only=True) as vm:
        layout = vm.layout
    xml = render(layout, base=document_of_vm, emulator=emulator)
    left_out = omissions(layout, base=document_of_vm)
    content = document(xml=xml.decode(), left_out=list(left_out), **state_json(layout))
    if output is None:
        return Answer(REACHED, content, data=xml, complaint=left_out)
    try:
        await save(output, xml)
    except RecordError as error:
        raise BadUsageError(f"--output: {error}") from error
    return Answer(REACHED, content | {"output": str(output)}, printable(f"written to {output}"), complaint=left_out)
