"""Which differences there can be between source and target, and what each means."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.errors import TargetMismatchError
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.vm import KnownFault, Topology, VmInfo, VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.compatibility import (
    Difference,
    DifferenceKind,
    Severity,
    arrival_failure,
    arrived,
    changes_since,
    compare_arrived,
    compare_target,
    raise_if_incompatible,
)
from tests.layouts import KVM, OLD_TCG, TCG, layout
from tests.planning.situations import situations

WAITS = VmStatus("inmigrate")
PLUGGED = {0: "boot", 5: "ours", 2: "ours"}
EIGHT = Topology(max_cpus=8, sockets=2, cores=4)
K = DifferenceKind
E = Severity


def told(target: Layout, status: VmStatus = WAITS, source: Layout | None = None) -> list[tuple[K, E]]:
    state = ExportedState(source or layout(PLUGGED))
    return [(each.kind, each.severity) for each in compare_target(state, target, status)]


def as_vm(vm: VmInfo = KVM, **changes: Any) -> Layout:
    return layout(PLUGGED, vm=replace(vm, **changes))


def retyped(of: Layout) -> Layout:
    return replace(of, slots=tuple(replace(slot, type="other") for slot in of.slots))


@given(situations())
def test_a_target_like_the_source_has_no_difference(now: Situation) -> None:
    found = compare_target(ExportedState(now.layout), now.layout, WAITS)
    assert {each.kind for each in found} <= {K.PENDING}
    assert not any(each.refuses for each in found)
    assert changes_since(ExportedState(now.layout), now.layout) == ()
    assert compare_arrived(ExportedState(now.layout), now.layout) == ()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (layout({0: "boot", 2: "ours"}), [(K.MISSING_VCPU, E.KILLS)]),
        (layout({0: "boot", 5: "ours", 2: "ours", 6: "ours"}), [(K.EXTRA_VCPU, E.SILENT)]),
        (layout({0: "boot", 5: "ours", 3: "ours"}), [(K.MISSING_VCPU, E.KILLS), (K.EXTRA_VCPU, E.SILENT)]),
        (layout(PLUGGED, slots=16), [(K.MAXIMUM, E.KILLS)]),
        (as_vm(machine="pc-q35-9.2"), [(K.MACHINE, E.KILLS)]),
        (as_vm(arch="i386"), [(K.MACHINE, E.KILLS)]),
        (retyped(layout(PLUGGED)), [(K.CPU_TYPE, E.KILLS)]),
        (as_vm(TCG), [(K.ACCELERATOR, E.KILLS), *[(K.KNOWN_FAULT, E.HARMLESS)] * 4]),
        (as_vm(qemu_version=(10, 0, 1)), [(K.QEMU_VERSION, E.UNPROMISED)]),
        (as_vm(qemu_version=(11, 0, 0)), []),
        (as_vm(uuid="c0ffee00-0000-4000-8000-000000000001"), [(K.UUID, E.SILENT)]),
        (as_vm(name="other"), [(K.NAME, E.HARMLESS)]),
        (layout({0: "boot", 2: "ours", 5: "other"}), [(K.DEVICE_ID, E.HARMLESS), (K.ORDER, E.HARMLESS)]),
        (layout({0: "boot", 5: "nameless", 2: "ours"}), [(K.DEVICE_ID, E.HARMLESS)]),
        (as_vm(memory_kib=1024), []),  # the source's is not known
    ],
)
def test_each_difference_is_named_with_what_qemu_makes_of_it(target: Layout, expected: list[tuple[K, E]]) -> None:
    assert told(target) == expected


def test_another_size_of_memory_kills() -> None:
    assert told(as_vm(memory_kib=1024), source=as_vm(memory_kib=2048)) == [(K.MEMORY, E.KILLS)]


def test_what_qemu_makes_of_another_accelerator_or_cpu_type_depends_on_the_accelerator() -> None:
    assert told(retyped(as_vm(TCG)), source=as_vm(TCG)) == [(K.CPU_TYPE, E.SILENT)]
    assert told(layout(PLUGGED), source=as_vm(TCG)) == [(K.ACCELERATOR, E.UNPROMISED)]
    assert told(as_vm(accelerator="mshv")) == [(K.ACCELERATOR, E.KILLS)]
    assert told(as_vm(accelerator="unknown")) == [(K.ACCELERATOR, E.UNPROMISED)]
    assert told(retyped(as_vm(accelerator="hvf")), source=as_vm(accelerator="hvf")) == [(K.CPU_TYPE, E.KILLS)]
    faults = [each for each in compare_target(ExportedState(as_vm(TCG)), as_vm(OLD_TCG), WAITS) if not each.refuses]
    assert [each.target for each in faults] == [KnownFault.TCG_REPLUG_CORRUPTS_HEAP.value]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (VmStatus("inmigrate", "setup"), []),
        (VmStatus("inmigrate", "active"), [(K.RUN_STATE, E.UNPROMISED)]),
        (VmStatus("running"), [(K.RUN_STATE, E.NOT_BEGUN)]),
        (VmStatus("prelaunch"), [(K.RUN_STATE, E.NOT_BEGUN)]),
    ],
)
def test_a_target_has_to_wait(status: VmStatus, expected: list[tuple[K, E]]) -> None:
    assert told(layout(PLUGGED), status) == expected


def placed(topology: Topology, *places: tuple[int, int]) -> Layout:
    """A machine whose vCPUs sit at these (socket, core)."""
    slots = tuple(
        Slot(
            number, 1, "t", CpuProps({"socket-id": socket, "core-id": core}), number, f"/machine/unattached/{number}"
        )
        for number, (socket, core) in enumerate(places)
    )
    return Layout(replace(KVM, topology=topology), slots, creation=tuple(range(len(slots))))


def test_another_place_kills_only_where_the_apic_id_differs() -> None:
    pairs = Topology(max_cpus=4, sockets=2, cores=2)
    source = placed(pairs, (0, 0), (0, 1), (1, 0), (1, 1))
    flat = placed(Topology(max_cpus=4, sockets=4), (0, 0), (1, 0), (2, 0), (3, 0))
    assert told(flat, source=source) == [(K.TOPOLOGY, E.SILENT)]
    threes = Topology(max_cpus=6, sockets=2, cores=3)
    source = placed(threes, (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    flat = placed(Topology(max_cpus=6, sockets=6), *((socket, 0) for socket in range(6)))
    (difference,) = compare_target(ExportedState(source), flat, WAITS)
    assert (difference.severity, difference.source, difference.target) == (E.KILLS, "sockets=2,cores=3", "sockets=6")
    assert difference.ids == VcpuMap.parse("1-5")


def test_where_the_topology_is_not_told_another_place_is_taken_to_kill() -> None:
    source = layout(PLUGGED)
    slots = tuple(replace(slot, props=CpuProps({"core-id": slot.first + 8})) for slot in source.slots)
    (difference,) = compare_target(ExportedState(source), replace(source, slots=slots), WAITS)
    assert (difference.kind, difference.severity) == (K.TOPOLOGY, E.KILLS)
    assert (difference.source, difference.target) == ("vCPU 0 at socket-id 0 core-id 0", "vCPU 0 at core-id 8")


def test_what_refuses_comes_first_and_is_demanded() -> None:
    found = compare_target(
        ExportedState(layout(PLUGGED, pending=(5,))), layout({0: "boot", 2: "other", 5: "ours"}, slots=16), WAITS
    )
    assert [each.kind for each in found] == [K.MAXIMUM, K.DEVICE_ID, K.ORDER, K.PENDING]
    with pytest.raises(TargetMismatchError) as refused:
        raise_if_incompatible("test", found)
    assert refused.value.differences == found[:1]
    assert refused.value.notes == found[1:]
    assert str(refused.value) == (
        "the target is not what VM 'test' needs: (1) maximum of vCPUs: the source has 8, the target 16; the target"
        " dies, and the source may report completed all the same: start the target with maxcpus=8 and the source's"
        " topology"
    )
    assert raise_if_incompatible("test", found, [K.MAXIMUM]) == found


def test_many_ids_are_cut_in_words_and_whole_in_the_value() -> None:
    plugged = {0: "boot"} | dict.fromkeys(range(1, 20), "ours")
    other = {0: "boot"} | dict.fromkeys(range(19, 0, -1), "other")
    ids, order = compare_target(ExportedState(layout(plugged, slots=20)), layout(other, slots=20), WAITS)
    assert ids.ids == VcpuMap(range(1, 20))
    assert ids.source == "vcpu1,vcpu2,vcpu3,vcpu4,vcpu5,vcpu6,vcpu7,vcpu8,..."
    assert order.target == "0,19,18,17,16,15,14,13,..."


def test_a_pending_vcpu_may_have_left_on_arrival_and_any_other_may_not() -> None:
    state = ExportedState(layout(PLUGGED, pending=(5,)))
    (note,) = compare_arrived(state, layout({0: "boot", 2: "ours"}))
    assert (note.kind, note.ids, note.refuses) == (K.PENDING, VcpuMap([5]), False)
    (missing,) = compare_arrived(state, layout({0: "boot", 5: "ours"}))
    assert (missing.kind, missing.ids, missing.refuses) == (K.MISSING_VCPU, VcpuMap([2]), True)


def test_what_changes_on_the_source_after_the_export_is_told() -> None:
    left, came = changes_since(ExportedState(layout(PLUGGED)), layout({0: "boot", 2: "ours", 6: "other"}))
    assert (left.kind, left.ids, left.severity) == (K.EXTRA_VCPU, VcpuMap([5]), E.SILENT)
    assert (came.kind, came.ids, came.severity) == (K.MISSING_VCPU, VcpuMap([6]), E.KILLS)


@pytest.mark.parametrize(
    ("status", "here", "never"),
    [
        (VmStatus("running", "completed"), True, ""),
        (VmStatus("paused", "completed"), True, ""),
        (VmStatus("inmigrate"), False, ""),
        (VmStatus("inmigrate", "active"), False, ""),
        (VmStatus("running", "postcopy-active"), False, ""),
        (VmStatus("postmigrate", "completed"), False, ""),
        (VmStatus("inmigrate", "failed"), False, "its incoming migration is failed (run state inmigrate)"),
        (VmStatus("running"), False, "nothing has migrated into it: run state running, no migration"),
    ],
)
def test_a_vm_has_arrived_only_by_a_migration_that_is_over(status: VmStatus, here: bool, never: str) -> None:
    assert arrived(status) is here
    assert arrival_failure(status) == never


def test_a_difference_is_a_value() -> None:
    one = Difference(K.NAME, "a", "b", E.HARMLESS, "none")
    assert one == Difference(K.NAME, "a", "b", E.HARMLESS, "none")
    assert str(one) == "name: the source has a, the target b; QEMU does not care: none"
