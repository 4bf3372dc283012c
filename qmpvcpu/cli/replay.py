"""replay: the vCPUs that a document says, or that an earlier QEMU had, plugged into a QEMU that is stopped."""

import asyncio
from typing import TYPE_CHECKING, Any

import click

from qmpvcpu.cli.change_options import ALLOW_FATAL
from qmpvcpu.cli.options import TIMEOUT, VM_OPTIONS, File, command, exported_in, naming_document, read_document
from qmpvcpu.cli.progress import run_transition
from qmpvcpu.cli.reports import report_blocks
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.wishes import PLACEMENT_OPTIONS, check_wish, take_wish
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.documents.layouts import state_json

if TYPE_CHECKING:
    from qmpvcpu.model.layout import Layout


@command(
    click.Argument(["source"], metavar="[SOURCE]", required=False, type=File()),
    *PLACEMENT_OPTIONS,
    ALLOW_FATAL,
    TIMEOUT,
    *VM_OPTIONS,
)
async def replay(shell: Shell, *, source: str | None, **change: Any) -> CommandResult:
    """Plug into a stopped QEMU what a document says: the same vCPUs, with their holes and in their order.

    SOURCE is the VM's domain XML, its record, or what export has written; - reads standard input. Without it, what
    the record (--record) keeps of an earlier QEMU of this VM, as recover shows it.

    It is for a QEMU that was started with what qmpvcpu args --no-device prints, and -S or -incoming. QEMU itself says
    what each vCPU's slot takes, so it works where args cannot know that, as on pseries. Everything is compared before
    anything is sent, and again at the end. It may be repeated, and goes on from where it stopped.

      qmpvcpu replay vm.xml --qmp /run/vm.qmp

      qmpvcpu replay --record /var/lib/vmm/vm.xml --qmp /run/vm.qmp

    Exit codes: 0 they are there, or were already; 1 rejected by QEMU, or what is there is something else; 2 bad
    usage or input, or a QEMU that cannot become this VM: nothing sent; 3 no connection, QEMU lost, outcome unknown;
    4 record unreadable or locked; 130 stopped by a signal.
    """
    if source is None and shell.options.record is None:
        raise BadUsageError("replay what? Name the VM's domain XML, or with --record what an earlier QEMU of it had")
    wish = take_wish(change)
    wanted = None if source is None else await asyncio.to_thread(_read, source)
    async with shell.attach() as vm:
        check_wish(vm, wish)
        with naming_document(source):
            report = await run_transition(shell, vm, vm.replay(wanted, **change), ())
    content = document(**report.to_json(), **state_json(report.layout))
    return CommandResult(REACHED, content, report_blocks(report))


def _read(path: str) -> "Layout | bytes":
    data = read_document(path)
    return exported_in(path, data).layout if data.lstrip().startswith(b"{") else data
