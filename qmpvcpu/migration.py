"""Migration of a VM to another QEMU: whether the target can take it over, and whether it has arrived.

``migrate`` itself is the VMM's to send; ``vm.export()``, ``check_target`` and ``confirm_target`` keep it from losing
the VM.
"""

import contextlib
from collections.abc import Collection

from qmpvcpu.errors import MonitorLostError, TargetMismatchError, shorten
from qmpvcpu.given import checked
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.planning.compatibility import Difference, DifferenceKind, Severity
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.migrating import Export

__all__ = [
    "Difference",
    "DifferenceKind",
    "Export",
    "ExportedState",
    "Severity",
    "check_target",
    "confirm_target",
]


@checked
async def check_target(
    export: Export | ExportedState, vm: VcpuController, *, accept: Collection[DifferenceKind] = ()
) -> tuple[Difference, ...]:
    """Look whether the QEMU of *vm*, which waits for a migration, can take over what was exported.

    To be called before ``migrate-incoming`` and ``migrate``: a target that lacks a slot dies while an older source
    reports ``completed``; one with a slot too many is accepted silently. Changes nothing.

    Args:
        export: What ``vm.export()`` returned on the source, or its state (``ExportedState.from_json`` on another
            host).
        vm: The target, attached; its QEMU was started with ``-incoming``.
        accept: Kinds of difference that the caller knows to be right, such as ``DifferenceKind.QEMU_VERSION``.

    Returns:
        The differences that do no harm, and those that were accepted.

    Raises:
        TargetMismatchError: It cannot, or what arrives would not be what left; ``differences`` has all of them.
        MonitorError: The target is gone or silent.

    Source: measured on QEMU 7.2.22 and 10.0.2.
    """
    return await vm.migration.check(_state_of(export), accept)


@checked
async def confirm_target(
    export: Export | ExportedState,
    vm: VcpuController,
    *,
    timeout: float = 10.0,
) -> tuple[Difference, ...]:
    """Make sure that the VM has arrived in the QEMU of *vm*; only then may the source be quit.

    It has if QEMU answers, completed an incoming migration, runs the VM or keeps it paused, and has exactly the vCPUs
    that were exported. With an Export of this process whose source is attached, the source is read again too: a guest
    may have let go of a vCPU on the way. What was pending is taken over: an answer is then known to be a late one of
    ours. So is the map that was asked for last. With a record, both are on disk when this returns. Calling it again
    compares again, and takes nothing over a second time.

    Args:
        export: As in ``check_target``.
        vm: The target, attached before the migration or after it.
        timeout: How long the VM may take to arrive, in seconds from now.

    Returns:
        The differences that do no harm.

    Raises:
        TargetLostError: The target died, is silent, or the VM has not arrived in time. The source still has it:
            ``export.take_back()``.
        TargetMismatchError: It has arrived, with other vCPUs.
        MonitorError: It has arrived, and the source does not answer.
        RecordError: It has arrived, and the target's record cannot be written.
    """
    state = _state_of(export)
    found = await vm.migration.confirm(state, timeout)
    if isinstance(export, Export):
        with contextlib.suppress(MonitorLostError):  # the source was closed, or has quit, and cannot change any more
            changes = await export.changes()
            if changes:
                raise TargetMismatchError(state.name, changes, found)
    return found


def _state_of(export: Export | ExportedState) -> ExportedState:
    state = export.state if isinstance(export, Export) else export
    if not isinstance(state, ExportedState):
        raise TypeError(f"export is an Export, or the ExportedState of one, not {shorten(state)}")
    return state
