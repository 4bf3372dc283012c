"""list: every vCPU of a VM."""

from typing import Any

from qmpvcpu.cli.options import AGENT, READ_OPTIONS, command
from qmpvcpu.cli.result import REACHED, CommandResult, document
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import headline, layout_json, vcpu_table
from qmpvcpu.model.layout import Layout


@command(AGENT, *READ_OPTIONS)
async def list_(shell: Shell) -> CommandResult:
    """Show every vCPU: plugged or free, order, place, device id, QOM path, host thread.

    Reads only. States: plugged; fixed (plugged, cannot be unplugged by us now); pending (its removal is accepted and
    the guest has not answered); free. A column says what is proven of each, where that is more than its being
    present: with --agent the guest is asked which it uses. If it does not answer, the rest is shown all the same.

      qmpvcpu list --qmp /run/vm.qmp

      qmpvcpu list --qmp tcp:host:4444 --json

      qmpvcpu list --qmp /run/vm.qmp --agent /run/vm.agent

    Exit codes: 0 shown; 2 bad usage; 3 no connection, or QEMU lost; 4 record unreadable or locked.
    """
    layout, asked = await _look(shell)
    width = shell.out.width
    text = headline(layout, width), "", *vcpu_table(layout, width=width)
    return CommandResult(REACHED, document(**layout_json(layout), **asked), text)


async def _look(shell: Shell) -> tuple[Layout, dict[str, Any]]:
    """Return what is known of the VM, and with an agent what became of asking the guest, which is no failure."""
    if shell.options.agent_address is None:
        return await shell.look(), {}
    async with shell.attach(read_only=True) as vm:
        error = await shell.ask_cpus(vm)
        layout = vm.layout
    if error is None:
        return layout, {"agent_error": None}
    from qmpvcpu.cli.failures import error_json  # not at the top: most lists do without

    shell.note(f"qmpvcpu: which vCPUs the guest uses is not known: {error}")
    return layout, {"agent_error": error_json(error, str(error))}
