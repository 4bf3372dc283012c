"""Whether one step may be sent.

Every check, and ``find_slot``, raises StepDeniedError with a named reason if the step cannot or must not be sent: a
denied step costs nothing and changes nothing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from qmpvcpu.errors import DenialReason, StepDeniedError, UnsupportedMachineError, counted
from qmpvcpu.model.guest import GuestOs
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.options import DEFAULTS, CheckedOptions, Proof
from qmpvcpu.model.vcpumap import VcpuMap, possible_ids
from qmpvcpu.model.vm import ONE_THREAD, KnownFault, VmStatus, needs_x2apic

if TYPE_CHECKING:
    from qmpvcpu.model.placement import HostFacts, Placement

PLUG: Final = "plug"
UNPLUG: Final = "unplug"
EXPORT: Final = "export"
COUNT: Final = "count"

_ASKS_AGENT: Final = "asks the guest's agent: attach with agent= and the address of its socket"
NEVER_LEAVES: Final = "vCPU 0 is the one that booted the VM, it never leaves"
ALL_THE_SAME: Final = " (allow_fatal=True does it all the same)"
_CONFIDENTIAL: Final = "the VM is confidential: its vCPUs are sealed at launch, and one more probably ends it"
_WINDOWS: Final = (
    "the guest is Windows, which releases no vCPU: the request would be pending for good, and QEMU cannot withdraw it"
)


class Situation(NamedTuple):
    """Everything that decides whether a step may be sent.

    Attributes:
        layout: The slots.
        status: What the VM is doing.
        created: How many vCPUs this QEMU has created, as far as is known (a lower bound).
        unplug_seen: True if this QEMU is known to have completed an unplug.
        single_threaded: True if one host thread runs all vCPUs (TCG), None if that cannot be told yet.
        in_flight: First ids of the slots with a plug that QEMU has not answered.
        exported: True while the VM is exported, to be migrated: nothing may change.
        asked: First ids of the slots with a removal under way.
        leaving: Those of *asked* whose removal a new request joins, the others may be asked for again; None: those
            with a removal pending.
        unheard: True if the guest has answered nothing about a vCPU since it started, though it can: it may be
            booting.
        arrived: True if the VM has migrated into this QEMU.
        guest_os: The system in the guest, where its agent has told it since the guest started.
        has_agent: True if the guest's agent may be asked.
        guest_sees: Whether the guest has the CPUs of each slot online, as its agent told last, by first id; None: it
            told nothing.
        placement: Where QEMU's threads are to run on its host, or None.
        host: What the host allows, where that was looked at.
    """

    layout: Layout
    status: VmStatus
    created: int
    unplug_seen: bool = False
    single_threaded: bool | None = None
    in_flight: frozenset[int] = frozenset()
    exported: bool = False
    asked: frozenset[int] = frozenset()
    leaving: frozenset[int] | None = None
    unheard: bool = False
    arrived: bool = False
    guest_os: GuestOs | None = None
    has_agent: bool = False
    guest_sees: Mapping[int, bool] | None = None
    placement: "Placement | None" = None
    host: "HostFacts | None" = None


class Fatal(NamedTuple):
    """Why this VM would not survive a step: the reason to deny it with, and what would happen."""

    reason: DenialReason
    why: str

    @classmethod
    def of(cls, fault: KnownFault) -> "Fatal":
        """Return that it is a known fault of this QEMU."""
        return cls(DenialReason.FATAL, fault.value)


def check_plug(now: Situation, vcpu: int | None, options: CheckedOptions = DEFAULTS) -> Slot:
    """Return the slot that plugging *vcpu* (None: the first free one) fills."""
    layout = now.layout
    if not layout.vm.can_plug or not layout.slots[0].present:  # vCPU 0 never leaves
        named = VcpuMap() if vcpu is None else possible_ids([vcpu])
        if not layout.vm.can_plug:
            detail = f"machine {layout.vm.machine!r} has no hotpluggable CPUs"
            raise denial(layout, PLUG, named, DenialReason.MACHINE_CANNOT_PLUG, detail)
        detail = "QEMU has not built the machine yet (-preconfig): x-exit-preconfig, and refresh(), first"
        raise StepDeniedError(PLUG, named, DenialReason.MACHINE_NOT_BUILT, detail)
    slot = _first_free(now) if vcpu is None else find_slot(PLUG, layout, vcpu)
    if slot.first in now.in_flight:
        raise StepDeniedError(PLUG, slot.ids, DenialReason.IN_PROGRESS, "another plug of it is in flight")
    if slot.present:
        held = f"it is plugged already, as {slot.qom_path}"
        if slot.first in layout.pending_slots:
            held += ", and a removal of it is pending: wait for the guest's answer first"
        raise StepDeniedError(PLUG, slot.ids, DenialReason.SLOT_OCCUPIED, held)
    _check_proof(now, slot, options)
    if now.placement is not None and options.requires_place(now.placement) and (why := why_unplaced(now, slot)):
        detail = f'{why} (placement="preferred" plugs it all the same)'
        raise StepDeniedError(PLUG, slot.ids, DenialReason.CANNOT_PLACE, detail)
    _check_status(PLUG, slot, now)
    fatal = None if options.allow_fatal else fatal_plug(now, slot)
    if fatal is not None:
        raise _fatal(PLUG, slot.ids, fatal)
    return slot


def _check_proof(now: Situation, slot: Slot, options: CheckedOptions) -> None:
    layout = now.layout
    if options.awaited_proof is Proof.ACKNOWLEDGED and not layout.vm.acknowledges:
        detail = f"a guest of machine {layout.vm.machine!r} has no way to acknowledge it: use Proof.PRESENT"
        raise StepDeniedError(PLUG, slot.ids, DenialReason.MACHINE_CANNOT_ACKNOWLEDGE, detail)
    unknowable = layout.vm.start_unknowable or (ONE_THREAD if now.single_threaded else "")
    if options.proof is Proof.STARTED and unknowable:
        raise StepDeniedError(PLUG, slot.ids, DenialReason.CANNOT_TELL_STARTED, f"{unknowable}: use Proof.PRESENT")
    if options.awaited_proof is Proof.ONLINE and not now.has_agent:
        raise StepDeniedError(PLUG, slot.ids, DenialReason.NO_AGENT, f"Proof.ONLINE {_ASKS_AGENT}")


def check_unplug(now: Situation, vcpu: int, options: CheckedOptions = DEFAULTS) -> Slot:
    """Return the slot that unplugging *vcpu* empties."""
    layout = now.layout
    slot = find_slot(UNPLUG, layout, vcpu)
    if not slot.present:
        raise StepDeniedError(UNPLUG, slot.ids, DenialReason.SLOT_EMPTY, "it is not plugged")
    if slot.first == 0:
        raise StepDeniedError(UNPLUG, slot.ids, DenialReason.BOOT_VCPU, NEVER_LEAVES)
    if not layout.vm.can_unplug:
        detail = f"machine {layout.vm.machine!r} does not give CPUs back"
        raise denial(layout, UNPLUG, slot.ids, DenialReason.MACHINE_CANNOT_UNPLUG, detail)
    if slot.device_id is None and layout.vm.libvirt_owned and not options.allow_boot_vcpus:
        raise StepDeniedError(
            UNPLUG,
            slot.ids,
            DenialReason.LIBVIRT_OWNED,
            "it was there at boot and libvirt runs this VM: libvirtd would forget the VM at its second restart after"
            " this (allow_boot_vcpus=True does it all the same)",
        )
    if now.guest_os is not None and now.guest_os.is_windows:
        raise StepDeniedError(UNPLUG, slot.ids, DenialReason.GUEST_CANNOT_UNPLUG, _WINDOWS)
    if options.offline_first and not now.has_agent:
        raise StepDeniedError(UNPLUG, slot.ids, DenialReason.NO_AGENT, f"offline_first=True {_ASKS_AGENT}")
    _check_status(UNPLUG, slot, now)
    fatal = None if options.allow_fatal else fatal_unplug(now)
    if fatal is not None:
        raise _fatal(UNPLUG, slot.ids, fatal)
    return slot


def check_placement(now: Situation, action: str = PLUG) -> None:
    """Return if the placement, which is for *action*, names only vCPUs that the machine can have."""
    beyond = [vcpu for vcpu in (now.placement.vcpus if now.placement else ()) if vcpu >= now.layout.max]
    if beyond:
        detail = f"the placement names it, but this machine has vCPUs 0-{now.layout.max - 1}"
        raise StepDeniedError(action, possible_ids(beyond), DenialReason.UNKNOWN_VCPU, detail)


def why_unplaced(now: Situation, slot: Slot) -> str:
    """Return why the threads of *slot* cannot be put in their place on the host; "": they can."""
    if now.placement is None or now.host is None:
        return ""
    return now.placement.why_not(slot.ids, now.host)


def denial(layout: Layout, action: str, ids: VcpuMap, reason: DenialReason, detail: str) -> StepDeniedError:
    """Return the error that denies *action*; one of its own if the machine cannot do it to any CPU."""
    if reason in (DenialReason.MACHINE_CANNOT_PLUG, DenialReason.MACHINE_CANNOT_UNPLUG):
        return UnsupportedMachineError(action, ids, reason, detail, machine=layout.vm.machine)
    return StepDeniedError(action, ids, reason, detail)


def fatal_plug(now: Situation, slot: Slot) -> Fatal | None:
    """Return why this VM is not expected to survive a plug into *slot*, or None."""
    vm = now.layout.vm
    if vm.seals_vcpus:
        return Fatal(DenialReason.CONFIDENTIAL, _CONFIDENTIAL)
    faults = vm.known_faults
    if not faults:
        return None
    fault = None
    if KnownFault.TCG_SMM_PLUG_HANGS in faults:
        fault = KnownFault.TCG_SMM_PLUG_HANGS
    elif KnownFault.TCG_REPLUG_CORRUPTS_HEAP in faults and now.unplug_seen:
        fault = KnownFault.TCG_REPLUG_CORRUPTS_HEAP
    elif KnownFault.TCG_CREATED_BEYOND_MAX in faults and now.created + slot.count > now.layout.max:
        fault = KnownFault.TCG_CREATED_BEYOND_MAX
    elif KnownFault.TCG_APIC_ID_255 in faults and vm.topology is not None and needs_x2apic(vm.topology, slot.props):
        fault = KnownFault.TCG_APIC_ID_255
    return None if fault is None else Fatal.of(fault)


def plug_suspects(layout: Layout, slot: Slot) -> list[KnownFault]:
    """Return the known faults that a plug into *slot* may have met, for all that is known, if QEMU ended at it."""
    possible = {KnownFault.TCG_CREATED_BEYOND_MAX, KnownFault.TCG_REPLUG_CORRUPTS_HEAP}
    if layout.vm.topology is not None and needs_x2apic(layout.vm.topology, slot.props):
        possible.add(KnownFault.TCG_APIC_ID_255)
    return sorted(possible & layout.vm.known_faults, key=lambda fault: fault.name)


def fatal_unplug(now: Situation) -> Fatal | None:
    """Return why this QEMU is known not to survive that a vCPU leaves, or None."""
    faults = now.layout.vm.known_faults
    if KnownFault.TCG_PSERIES_UNPLUG_ABORTS in faults:
        return Fatal.of(KnownFault.TCG_PSERIES_UNPLUG_ABORTS)
    if now.single_threaded and KnownFault.TCG_SINGLE_THREAD_UNPLUG in faults:
        return Fatal.of(KnownFault.TCG_SINGLE_THREAD_UNPLUG)
    return None


def find_slot(action: str, layout: Layout, vcpu: int) -> Slot:
    """Return the slot whose first vCPU is *vcpu*; *action* is for the error."""
    try:
        slot = layout.slot_of(vcpu)
    except IndexError as error:
        raise StepDeniedError(action, possible_ids([vcpu]), DenialReason.UNKNOWN_VCPU, str(error)) from None
    if vcpu != slot.first:
        raise StepDeniedError(
            action,
            VcpuMap([vcpu]),
            DenialReason.PART_OF_SLOT,
            f"it is part of the slot of vCPUs {slot.ids}, which move together: name it by the first, {slot.first}",
        )
    return slot


def _first_free(now: Situation) -> Slot:
    for slot in now.layout.slots:
        if not slot.present and slot.first not in now.in_flight:
            return slot
    detail = f"this machine has {counted(now.layout.max, 'vCPU')}, all plugged or being plugged"
    raise StepDeniedError(PLUG, VcpuMap(), DenialReason.MACHINE_FULL, detail)


def check_keep(now: Situation, slot: Slot) -> None:
    """Return if *slot*, whose removal is pending, may be plugged again once it has left."""
    if now.exported:
        raise _exported(PLUG, slot.ids)


def check_export(now: Situation, *, allow_fatal: bool = False) -> None:
    """Return if the VM may be exported: it is here, at rest, and this QEMU is not known to fail to bring it there."""
    status = now.status
    if now.exported:
        raise _exported(EXPORT, VcpuMap())
    if status.run_state == "inmigrate":
        detail = "no VM has arrived here yet: run state inmigrate"
        raise StepDeniedError(EXPORT, VcpuMap(), DenialReason.MIGRATING, detail)
    _check_migration(EXPORT, VcpuMap(), status)
    fault = KnownFault.TCG_UNPLUG_BLOCKS_MIGRATION
    if now.unplug_seen and fault in now.layout.vm.known_faults and not allow_fatal:
        raise _fatal(EXPORT, VcpuMap(), Fatal.of(fault))


def _check_status(action: str, slot: Slot, now: Situation) -> None:
    _check_migration(action, slot.ids, now.status)
    if now.exported:
        raise _exported(action, slot.ids)


def _check_migration(action: str, ids: VcpuMap, status: VmStatus) -> None:
    if status.migrated_away:
        detail = "the VM has migrated away; what runs is its other side"
        raise StepDeniedError(action, ids, DenialReason.MIGRATED_AWAY, detail)
    if status.migrating:
        detail = f"the VM is migrating (status {status.migration}); CPUs must stay as they are until it is over"
        raise StepDeniedError(action, ids, DenialReason.MIGRATING, detail)


def _exported(action: str, ids: VcpuMap) -> StepDeniedError:
    detail = (
        "the VM is exported, and the target of its migration must have exactly these CPUs: release() the export, or"
        " take_back() the VM, first"
    )
    return StepDeniedError(action, ids, DenialReason.EXPORTED, detail)


def _fatal(action: str, ids: VcpuMap, fatal: Fatal) -> StepDeniedError:
    return StepDeniedError(action, ids, fatal.reason, f"{fatal.why}{ALL_THE_SAME}")
