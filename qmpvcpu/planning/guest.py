"""What the guest may make of a plan: a step that QEMU accepts, and the system in the guest does not carry out."""

from collections.abc import Iterator, Sequence
from typing import Final

from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import CheckedOptions, Proof
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.vcpumap import named, union
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.planning.checks import Situation

_SINCE: Final = "since 6.12.77 it acknowledges a vCPU and never uses it"
UNDER_TCG: Final = f"Linux does not see TCG as a hypervisor: {_SINCE}"
HIDDEN: Final = f"the VM's CPU model hides the hypervisor from Linux: {_SINCE}"
NESTED: Final = (
    "the guest can run VMs of its own and has migrated: Linux may keep a vCPU offline that is added now (kvm_intel:"
    " Inconsistent VMCS config)"
)
_NEVER_HEARD: Final = "the guest has answered nothing about a vCPU since it started"
MAY_BOOT: Final = f"{_NEVER_HEARD}: while it boots, it takes a vCPU without acknowledging it, or starts it late"
_NEXT_BOOT: Final = "sees a new vCPU at its next boot: Datacenter and Standard editions take one while they run"


def guest_warnings(now: Situation, steps: Sequence[Step], options: CheckedOptions) -> Iterator[str]:
    """Tell what the guest may not do of *steps*, as far as it can be known beforehand."""
    plugs = [step for step in steps if step.action is Action.PLUG]
    asks = any(step.action is Action.UNPLUG and not step.joins for step in steps)
    vm, system = now.layout.vm, now.guest_os
    may_boot = now.unheard and system is None and now.guest_sees is None  # else it is up
    may_ignore = vm.lacks_hypervisor and (system is None or system.may_want_hypervisor)
    if plugs and may_ignore and not _uses_new(now.layout):
        yield hidden_hypervisor(vm)
    if plugs and vm.nested and now.arrived:
        yield NESTED
    if plugs and system is not None and system.ignores_new_cpus:
        called = system.full_name or "this edition of Windows"
        yield f"{called} {_NEXT_BOOT}"
    if plugs and system is not None and system.is_windows:
        yield f"{named(union(step.ids for step in plugs))} cannot be unplugged again: Windows releases no vCPU"
    if may_boot and asks:
        yield f"{_NEVER_HEARD}: while it boots, a removal is rejected, refused, or pending for good"
    if may_boot and plugs and options.awaited_proof is not Proof.PRESENT:
        yield MAY_BOOT


def tells_why_unused(warning: str) -> bool:
    """Return True if *warning* of ``guest_warnings`` is a reason why a guest may not use a vCPU that was plugged."""
    return warning in (UNDER_TCG, HIDDEN, NESTED, MAY_BOOT) or warning.endswith(_NEXT_BOOT)


def _uses_new(layout: Layout) -> bool:
    """Return True if the guest uses a vCPU that came while it ran: it sees a hypervisor then, as by -smbios."""
    return any(slot.proof in (Proof.STARTED, Proof.ONLINE) and not slot.is_boot for slot in layout.slots)


def hidden_hypervisor(vm: VmInfo) -> str:
    """Return why Linux sees no hypervisor in *vm*, which lacks one, and what comes of it."""
    return UNDER_TCG if vm.accelerator == "tcg" else HIDDEN
