"""Whether a QEMU can take a VM over: the exported state compared with the target, and each difference as a value.

What QEMU makes of a difference was measured on 7.2.22 and 10.0.2, KVM and TCG, with the micro-guest. Only the set of
occupied slots (their cpu-index and APIC id) is in the stream: device ids, order and topology are not.
"""

import enum
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from qmpvcpu.errors import TargetMismatchError, printable
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.vcpumap import VcpuMap, named, union
from qmpvcpu.model.vm import SMP_LEVELS, VmStatus, apic_id

_LISTENING = ("none", "setup")  # migration statuses of a target that no stream has reached
# Run states of a target in which no VM has arrived, or none that can live.
_NOT_ARRIVED = frozenset({"inmigrate", "prelaunch", "preconfig", "finish-migrate", "postmigrate", "internal-error"})
_MOST_LISTED = 8


class DifferenceKind(enum.Enum):
    """In what source and target differ; the value is what a person reads."""

    RUN_STATE = "run state"
    MISSING_VCPU = "vCPUs that the target lacks"
    EXTRA_VCPU = "vCPUs that only the target has"
    TOPOLOGY = "place of vCPUs in the topology"
    MAXIMUM = "maximum of vCPUs"
    MACHINE = "machine type"
    MEMORY = "memory"
    CPU_TYPE = "CPU type"
    ACCELERATOR = "accelerator"
    QEMU_VERSION = "QEMU version"
    UUID = "uuid"
    NAME = "name"
    DEVICE_ID = "device ids"
    ORDER = "order of creation"
    PENDING = "removals under way"
    KNOWN_FAULT = "known fault of the target's QEMU"


class Severity(enum.Enum):
    """What QEMU makes of a difference."""

    NOT_BEGUN = "QEMU refuses to begin"
    KILLS = "the target dies, and the source may report completed all the same"
    SILENT = "QEMU accepts it silently, and what arrives is not what left"
    UNPROMISED = "it may work, QEMU does not promise it"
    HARMLESS = "QEMU does not care"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which source and target differ.

    Attributes:
        kind: In what.
        source: What the source has, as text.
        target: What the target has, as text.
        severity: What QEMU makes of it.
        advice: What to do about it.
        ids: The vCPUs concerned; empty where it is about the VM.
    """

    kind: DifferenceKind
    source: str
    target: str
    severity: Severity
    advice: str
    ids: VcpuMap = field(default_factory=VcpuMap)

    @property
    def refuses(self) -> bool:
        """True if a migration should not be begun with it; False if it is a note."""
        return self.severity is not Severity.HARMLESS

    def __str__(self) -> str:
        return printable(
            f"{self.kind.value}: the source has {self.source}, the target {self.target}; {self.severity.value}:"
            f" {self.advice}"
        )


def raise_if_incompatible(
    vm: str, found: Collection[Difference], accept: Collection[DifferenceKind] = ()
) -> tuple[Difference, ...]:
    """Return *found*; raise TargetMismatchError if it is more than notes, and kinds that *accept* names."""
    wrong = [each for each in found if each.refuses and each.kind not in accept]
    if wrong:
        raise TargetMismatchError(vm, wrong, [each for each in found if each not in wrong])
    return tuple(found)


def arrived(status: VmStatus) -> bool:
    """Return True if a VM has migrated into the QEMU with this status, and is its to run."""
    return status.run_state not in _NOT_ARRIVED and status.migration == "completed"


def arrival_failure(status: VmStatus) -> str:
    """Return why nothing more can be expected of a target with this status, or ""."""
    if status.migration in {"failed", "cancelled"}:
        return f"its incoming migration is {status.migration} (run state {status.run_state})"
    if status.run_state != "inmigrate" and status.migration == "none":
        return f"nothing has migrated into it: run state {status.run_state}, no migration"
    return ""


def compare_target(state: ExportedState, target: Layout, status: VmStatus) -> tuple[Difference, ...]:
    """Return all differences between what was exported and a target that waits for it, those that refuse first."""
    found = [*_waits(status), *_vcpus(state, target), *_machine(state.layout, target), *_notes(state, target)]
    return tuple(sorted(found, key=lambda each: not each.refuses))


def compare_arrived(state: ExportedState, target: Layout) -> tuple[Difference, ...]:
    """Return the differences in vCPUs between what was exported and what has arrived.

    A vCPU whose removal was pending may have left since: that is a note.
    """
    gone = state.pending - target.enabled
    found = list(_vcpus(state, target, answered=gone))
    if gone:
        found.append(
            Difference(
                DifferenceKind.PENDING,
                f"{named(gone)} with a removal under way",
                "none",
                Severity.HARMLESS,
                "the removal was answered after the arrival, as requested",
                gone,
            )
        )
    return (*found, *_ids_and_order(state.layout, target))


def changes_since(state: ExportedState, source: Layout) -> tuple[Difference, ...]:
    """Return in which vCPUs the source itself differs from what was exported of it: the target was built for that."""
    left, came = state.enabled - source.enabled, source.enabled - state.enabled
    found = []
    if left:
        advice = "it left the source after the export: unplug it on the target too, or build the target anew"
        found.append(
            Difference(DifferenceKind.EXTRA_VCPU, "left", f"{named(left)}", Severity.SILENT, advice, left),
        )
    if came:
        advice = "somebody plugged it on the source after the export: export again, and build the target anew"
        found.append(Difference(DifferenceKind.MISSING_VCPU, named(came), "none", Severity.KILLS, advice, came))
    return tuple(found)


def _waits(status: VmStatus) -> Iterator[Difference]:
    if status.run_state != "inmigrate":
        advice = "start the target with -incoming defer, and let nothing else run in it"
        yield Difference(DifferenceKind.RUN_STATE, "a VM to give", status.run_state, Severity.NOT_BEGUN, advice)
    elif status.migration not in _LISTENING:
        advice = "the stream has begun: what the target lacks now comes too late; start another target"
        target = f"inmigrate, migration {status.migration}"
        yield Difference(DifferenceKind.RUN_STATE, "a VM to give", target, Severity.UNPROMISED, advice)


def _vcpus(state: ExportedState, target: Layout, *, answered: VcpuMap = VcpuMap()) -> Iterator[Difference]:  # noqa: B008 -- immutable
    source = state.layout
    if source.max != target.max:
        advice = f"start the target with maxcpus={source.max} and the source's topology"
        yield Difference(DifferenceKind.MAXIMUM, str(source.max), str(target.max), Severity.KILLS, advice)
    missing = source.enabled - target.enabled - answered
    if missing:
        advice = "give it the slots that are named here, by device_add before migrate-incoming, or by -device"
        yield Difference(DifferenceKind.MISSING_VCPU, named(missing), "none", Severity.KILLS, advice, missing)
    extra = target.enabled - source.enabled
    if extra:
        advice = (
            "the guest would not know them: start the target without them (QEMU unplugs none before the VM arrives),"
            " or unplug them there afterwards"
        )
        yield Difference(DifferenceKind.EXTRA_VCPU, "none", named(extra), Severity.SILENT, advice, extra)
    pairs = [(a, b) for a, b in zip(source.slots, target.slots, strict=False) if a.present and b.present]
    moved = [(a, b) for a, b in pairs if (a.first, a.count, a.props) != (b.first, b.count, b.props)]
    if moved or _shape(source) != _shape(target):
        ids = union(a.ids for a, _ in moved)
        addresses = _addresses(source, [a for a, _ in pairs])
        same = addresses is not None and addresses == _addresses(target, [b for _, b in pairs])
        advice = "give the target the source's -smp (and -numa); the guest would find its caches and cores changed"
        yield Difference(
            DifferenceKind.TOPOLOGY,
            _shape(source) or _place(moved[0][0]),
            _shape(target) or _place(moved[0][1]),
            Severity.SILENT if same else Severity.KILLS,
            advice,
            ids,
        )
    retyped = [(a, b) for a, b in pairs if a.type != b.type]
    if retyped:
        emulated = target.vm.accelerator == "tcg"
        yield Difference(
            DifferenceKind.CPU_TYPE,
            retyped[0][0].type,
            retyped[0][1].type,
            Severity.SILENT if emulated else Severity.KILLS,
            "start the target with the source's -cpu, feature flags included: QMP does not tell those",
            union(a.ids for a, _ in retyped),
        )


def _shape(layout: Layout) -> str:
    topology = layout.vm.topology
    if topology is None:
        return ""
    counts = {level: getattr(topology, level) for level in SMP_LEVELS}
    shown = [f"{level}={count}" for level, count in counts.items() if count > 1]
    return ",".join(shown) or "sockets=1"


def _place(slot: Slot) -> str:
    return f"vCPU {slot.first} at {slot.props}"


def _addresses(layout: Layout, slots: Iterable[Slot]) -> set[tuple[int, int]] | None:
    """Return what the stream names the CPUs of *slots* by; None where that cannot be told."""
    topology = layout.vm.topology
    if topology is None or not layout.vm.is_x86:
        return None
    return {(slot.cpu_index, apic_id(topology, slot.props)) for slot in slots}


def _machine(source: Layout, target: Layout) -> Iterator[Difference]:
    a, b = source.vm, target.vm
    if (a.arch, a.machine) != (b.arch, b.machine):
        advice = "start the target with the source's versioned machine type"
        theirs = f"{b.machine} ({b.arch})"
        yield Difference(DifferenceKind.MACHINE, f"{a.machine} ({a.arch})", theirs, Severity.KILLS, advice)
    if a.memory_kib is not None and b.memory_kib is not None and a.memory_kib != b.memory_kib:
        advice = "start the target with the source's memory, DIMMs included"
        sizes = f"{a.memory_kib} KiB", f"{b.memory_kib} KiB"
        yield Difference(DifferenceKind.MEMORY, *sizes, Severity.KILLS, advice)
    if a.accelerator != b.accelerator:
        kills = a.accelerator == "kvm" and b.accelerator != "unknown"
        severity = Severity.KILLS if kills else Severity.UNPROMISED
        advice = "use the same accelerator on both sides"
        yield Difference(DifferenceKind.ACCELERATOR, a.accelerator, b.accelerator, severity, advice)
    if b.qemu_version < a.qemu_version:
        ours, theirs = (".".join(map(str, each.qemu_version)) for each in (a, b))
        advice = "migrate to the same or a newer QEMU, or accept it where this machine type is known to go back"
        yield Difference(DifferenceKind.QEMU_VERSION, ours, theirs, Severity.UNPROMISED, advice)
    if a.uuid != b.uuid:
        advice = "start the target with the source's -uuid: the guest reads it, and records are identified by it"
        yield Difference(DifferenceKind.UUID, str(a.uuid), str(b.uuid), Severity.SILENT, advice)


def _notes(state: ExportedState, target: Layout) -> Iterator[Difference]:
    harmless = Severity.HARMLESS
    if state.name != target.vm.name:
        advice = "attach(name=) names it"
        yield Difference(DifferenceKind.NAME, repr(state.name), repr(target.vm.name), harmless, advice)
    yield from _ids_and_order(state.layout, target)
    if state.pending:
        advice = "QEMU's requests migrate along: they may be answered on the target, at any time"
        yield Difference(DifferenceKind.PENDING, named(state.pending), "none yet", harmless, advice, state.pending)
    for fault in sorted(target.vm.known_faults - state.layout.vm.known_faults, key=lambda each: each.name):
        advice = "steps into it are denied there once the VM has arrived"
        yield Difference(DifferenceKind.KNOWN_FAULT, "no such fault", fault.value, harmless, advice)


def _ids_and_order(source: Layout, target: Layout) -> Iterator[Difference]:
    renamed = [
        (a, b)
        for a, b in zip(source.slots, target.slots, strict=False)
        if a.present and b.present and a.device_id != b.device_id
    ]
    if renamed:
        ids = union(a.ids for a, _ in renamed)
        source_ids, target_ids = (_listed(pair[side].device_id or "none" for pair in renamed) for side in (0, 1))
        advice = "from then on vCPUs are unplugged under the target's ids; qmpvcpu does so by itself"
        yield Difference(DifferenceKind.DEVICE_ID, source_ids, target_ids, Severity.HARMLESS, advice, ids)
    common = set(source.order) & set(target.order)
    ours, theirs = ([first for first in layout.order if first in common] for layout in (source, target))
    if ours != theirs:
        advice = "the target's XML has another order; the guest keeps its own numbers"
        shown = _listed(map(str, ours)), _listed(map(str, theirs))
        yield Difference(DifferenceKind.ORDER, *shown, Severity.HARMLESS, advice)


def _listed(words: Iterable[str]) -> str:
    every = list(words)
    return ",".join(every[:_MOST_LISTED]) + (",..." if len(every) > _MOST_LISTED else "")
