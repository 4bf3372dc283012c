"""list: every vCPU of a VM."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from qmpvcpu.cli.options import AGENT, READ_OPTIONS, command, flag
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import headline, vcpu_table
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.documents.layouts import layout_json
from qmpvcpu.model.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qmpvcpu.errors import GuestAgentError, PlacementError
    from qmpvcpu.model.placement import QemuThread
    from qmpvcpu.vm.controller import VcpuController

HOST = flag("--host", "Also show where the vCPU threads run on this host.")


@command(HOST, AGENT, *READ_OPTIONS)
async def list_(shell: Shell, *, host: bool) -> CommandResult:
    """Show every vCPU: plugged or free, order, place, device id, QOM path, host thread.

    Reads only. States: plugged; fixed (plugged, cannot be unplugged by us now); pending (its removal is accepted and
    the guest has not answered); free. A column says what is proven of each, where that is more than its being
    present: with --agent the guest is asked which it uses. If it does not answer, the rest is shown all the same.

    With --host, or if the record has a placement: the host CPUs of each vCPU's thread, its scheduler, and the host
    CPU it last ran on. A thread that has drifted is marked.

      qmpvcpu list --qmp /run/vm.qmp

      qmpvcpu list --qmp tcp:host:4444 --json

      qmpvcpu list --qmp /run/vm.qmp --agent /run/vm.agent

      qmpvcpu list --host --qmp /run/vm.qmp

    Exit codes: 0 shown; 2 bad usage; 3 no connection, or QEMU lost; 4 record unreadable or locked.
    """
    seen = await _look(shell, host=host)
    width = shell.out.width
    threads = {thread.vcpu: thread for thread in seen.threads if thread.vcpu is not None}
    text = headline(seen.layout, width), "", *vcpu_table(seen.layout, width=width, threads=threads)
    return CommandResult(REACHED, document(**layout_json(seen.layout), **seen.asked), text)


class _Seen(NamedTuple):
    """What is known of a VM, and of asking others than QEMU.

    Attributes:
        layout: The VM.
        threads: QEMU's threads; none: nobody looked, or they cannot be found.
        asked: What the document has of it.
    """

    layout: Layout
    threads: "Sequence[QemuThread]" = ()
    asked: Mapping[str, Any] = MappingProxyType({})


async def _look(shell: Shell, *, host: bool) -> _Seen:
    """Return what is known of the VM; that the guest, or the host, does not tell is no failure."""
    if shell.options.agent_address is None and shell.options.record is None and not host:
        return _Seen(await shell.look())
    asked: dict[str, Any] = {}
    threads: Sequence[QemuThread] = ()
    async with shell.attach(read_only=True) as vm:
        if vm.guest.has_agent:
            asked["agent_error"] = _told(shell, "which vCPUs the guest uses", await shell.ask_cpus(vm))
        if host or vm.host.placement:
            threads, error = await look_at_threads(vm)
            asked["host_error"] = _told(shell, "where the vCPU threads run", error)
        layout = vm.layout
    if threads:
        from qmpvcpu.cli.pin import threads_json  # not at the top: most lists do without

        asked["threads"] = threads_json(threads)
    return _Seen(layout, threads, asked)


async def look_at_threads(vm: "VcpuController") -> "tuple[Sequence[QemuThread], PlacementError | None]":
    """Return QEMU's threads, or why they cannot be found."""
    from qmpvcpu.errors import PlacementError

    try:
        return await vm.host.threads(), None
    except PlacementError as error:
        return (), error


def _told(shell: Shell, what: str, error: "GuestAgentError | PlacementError | None") -> dict[str, Any] | None:
    """Tell people that *what* is not known, and return the error for the document."""
    if error is None:
        return None
    from qmpvcpu.cli.failures import printed_error  # not at the top: most lists do without

    shell.note(f"qmpvcpu: {what} is not known: {error}")
    return printed_error(error, str(error))
