"""list: every vCPU of a VM."""

from qmpvcpu.cli.options import READ_OPTIONS, command
from qmpvcpu.cli.result import REACHED, CommandResult, document
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import headline, layout_json, vcpu_table


@command(*READ_OPTIONS)
async def list_(shell: Shell) -> CommandResult:
    """Show every vCPU: plugged or free, order, place, device id, QOM path, host thread.

    Reads only. States: plugged; fixed (plugged, cannot be unplugged by us now); pending (its removal is accepted and
    the guest has not answered); free.

      qmpvcpu list --qmp /run/vm.qmp

      qmpvcpu list --qmp tcp:host:4444 --json

    Exit codes: 0 shown; 2 bad usage; 3 no connection, or QEMU lost; 4 record unreadable or locked.
    """
    layout = await shell.look()
    width = shell.out.width
    text = headline(layout, width), "", *vcpu_table(layout, width=width)
    return CommandResult(REACHED, document(**layout_json(layout)), text)
