"""``certify``: carries the trials out, and puts back what the VM had."""

import contextlib
from collections.abc import AsyncGenerator

from qmpvcpu.certify.refusing import DeadlineTasks, Provocation
from qmpvcpu.certify.trials import Trials
from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.given import checked
from qmpvcpu.model.certificate import Ability, AbilityRow
from qmpvcpu.vm.controller import VcpuController


@checked
async def certify(
    vm: VcpuController,
    *,
    timeout: float = 30.0,
    boot: float = 60.0,
    resets: bool = True,
    fresh: bool = False,
    disposable: bool = False,
    provocation: Provocation | None = None,
) -> AsyncGenerator[AbilityRow, None]:
    """Try every ability of the guest of *vm*, and yield each row as soon as it is known, in the order of ``Ability``.

    What QEMU is known not to survive is never tried. A VM that is lost in the middle is said in the row, and the rest
    cannot be tried. Whatever ends it, the VM gets back the vCPUs that it had, as far as the guest lets go: close it
    with ``contextlib.aclosing`` where it may be left half-way.

    Args:
        vm: The VM, attached. Nobody else should change its vCPUs meanwhile.
        timeout: How long the guest has for each answer, in seconds.
        boot: How long the guest gets to boot after a reset, in seconds; see ``wait_booted``, which also waits for a
            guest that has just been started.
        resets: Whether the VM may be paused and reset.
        fresh: Whether it is certain that no vCPU has left this QEMU since it was started. If not, nothing is plugged
            under TCG: QEMU counts the vCPUs that have left too, does not tell how many, and ends beyond maxcpus.
        disposable: Whether nobody needs the VM afterwards: left half-way, it is left as it is then.
        provocation: What makes the guest refuse; None: its agent, if it runs programs (``guest-exec``) and the guest
            is a Linux with ``chrt``.

    Raises:
        MonitorError: The VM was lost before anything was tried.
    """
    await vm.refresh()
    if provocation is None and vm.guest.has_agent:
        provocation = DeadlineTasks(vm, timeout)
    trials = Trials(vm, timeout, boot, provocation, resets=resets, fresh=fresh)
    put_back_tried = False
    try:
        for ability, trial in trials.all().items():
            put_back_tried = ability is Ability.PUT_BACK
            yield await trials.row(ability, trial)
    finally:
        if not put_back_tried and not disposable:
            with contextlib.suppress(QmpVcpuError):  # stopped half-way: there is no row that could tell
                await trials.put_back()
