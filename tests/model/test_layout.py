"""Layout: libvirt's numbers on what QEMU lists."""

from itertools import product
from typing import Any

import pytest

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.qapi import SlotReading, ThreadReading, build_slots, creation_order, runs_single_threaded
from tests.captures import Capture, all_captures

CAPTURES = all_captures()
HOTPLUGGABLE = [capture for capture in CAPTURES if capture.replies("query-hotpluggable-cpus")]
FIXED = [capture for capture in CAPTURES if not capture.replies("query-hotpluggable-cpus")]


def test_the_captures_are_all_there() -> None:
    assert len(HOTPLUGGABLE) == 38
    assert {capture.name.split("-", 1)[1] for capture in FIXED} == {
        "loongarch-virt",  # of 7.2
        "microvm",
        "riscv-virt",
        "virt-aarch64-clusters",
        "virt-aarch64-maxcpus4",
    }


@pytest.mark.parametrize("capture", HOTPLUGGABLE, ids=str)
def test_ids_follow_socket_die_cluster_core_thread(capture: Capture) -> None:
    for layout in capture.layouts():
        ids = [(slot.first, slot.count) for slot in layout.slots]
        count = layout.slots[0].count
        assert ids == [(first, count) for first in range(0, layout.max, count)]
        keys = [
            tuple(
                slot.props.get(f"{level}-id", -1)
                for level in ("socket", "die", "cluster", "module", "core", "thread")
            )
            for slot in layout.slots
        ]
        assert keys == sorted(keys)
        assert len(set(keys)) == len(keys)
        assert 0 in layout.enabled


@pytest.mark.parametrize("capture", HOTPLUGGABLE, ids=str)
def test_every_prop_of_qemu_is_kept_in_its_order(capture: Capture) -> None:
    entries = capture.replies("query-hotpluggable-cpus")[0]
    layout = next(capture.layouts())
    listed = sorted(tuple(entry["props"].items()) for entry in entries)
    assert sorted(tuple(slot.props.items()) for slot in layout.slots) == listed
    assert {slot.type for slot in layout.slots} == {entry["type"] for entry in entries}


@pytest.mark.parametrize("capture", HOTPLUGGABLE, ids=str)
def test_threads_and_order_come_from_query_cpus_fast(capture: Capture) -> None:
    for layout, reply in zip(capture.layouts(), capture.replies("query-cpus-fast"), strict=True):
        assert [vcpu.host_tid for vcpu in layout if vcpu.enabled] != []
        by_path = {entry["qom-path"]: entry for entry in reply}
        for slot in layout.slots:
            if slot.present:
                parts = [entry for path, entry in by_path.items() if path.partition("/thread")[0] == slot.qom_path]
                assert [entry["cpu-index"] for entry in parts] == list(
                    range(slot.cpu_index, slot.cpu_index + slot.count)
                )
                if len({entry["thread-id"] for entry in reply}) == len(reply):
                    assert slot.host_tids == tuple(entry["thread-id"] for entry in parts)
        paths = list(dict.fromkeys(entry["qom-path"].partition("/thread")[0] for entry in reply))
        assert [layout.slot_of(first).qom_path for first in layout.order] == paths


@pytest.mark.parametrize("capture", FIXED, ids=str)
def test_a_machine_without_hotplug_is_numbered_by_thread(capture: Capture) -> None:
    layout = next(capture.layouts())
    assert layout.max == len(capture.replies("query-cpus-fast")[0])
    assert layout.enabled == set(range(layout.max))
    assert not layout.free


def test_pseries_cores_hold_all_their_threads() -> None:
    capture = next(c for c in HOTPLUGGABLE if c.name == "10.0.2-pseries-threads4")
    layouts = list(capture.layouts())
    assert [str(slot.ids) for slot in layouts[0].slots] == ["0-3", "4-7", "8-11", "12-15"]
    assert layouts[1][5].slot.ids == {4, 5, 6, 7}
    assert layouts[1][5].order == 2
    assert layouts[1][5].device_id == "plug0"
    assert not layouts[1][1].hotpluggable  # its core holds vCPU 0
    assert layouts[1][7].hotpluggable


def test_properties_of_a_future_qemu_are_passed_through() -> None:
    reading = SlotReading("cpu", 1, CpuProps({"tile-id": 3, "core-id": 0}), None)
    (slot,) = build_slots([reading], ())
    assert dict(slot.props) == {"tile-id": 3, "core-id": 0}
    assert slot.props.number("die-id") is None
    assert repr(slot.props) == "CpuProps({'tile-id': 3, 'core-id': 0})"
    assert hash(slot.props) == hash(CpuProps({"core-id": 0, "tile-id": 3}))


@pytest.mark.parametrize(
    "props",
    [
        {"driver": 1},
        {"id": 1},
        {"core-id,fsdev": 1},
        {"Core-id": 1},
        {"core-id\n": 1},
        {"-id": 1},
        {"core-id": -1},
        {"core-id": True},
        {"core-id": "1"},
        {"core-id": 1.0},
        {"core-id": None},
        {"core-id": 2**31},
    ],
)
def test_props_hold_nothing_but_the_place_of_a_cpu(props: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"place of a CPU|whole number"):
        CpuProps(props)


def test_a_cores_thread_has_the_id_of_its_core() -> None:
    slot = Slot(0, 1, "cpu", CpuProps({}), 0, "/machine/peripheral/core1/thread[0]")
    assert slot.device_id == "core1"


def test_node_ids_may_interleave() -> None:
    readings = [
        SlotReading("cpu", 1, CpuProps({"node-id": core % 2, "core-id": core}), None) for core in (3, 2, 1, 0)
    ]
    assert [slot.props["core-id"] for slot in build_slots(readings, ())] == [0, 1, 2, 3]


def small_layout(*present: int, libvirt_owned: bool = False) -> Layout:
    """Four slots; those *present* were created in this order, 0 at boot, the others as vcpuN."""
    props = [CpuProps({"socket-id": s, "core-id": c}) for s, c in product((1, 0), (1, 0))]
    paths = {
        vcpu: "/machine/unattached/device[0]" if vcpu == 0 else f"/machine/peripheral/vcpu{vcpu}" for vcpu in present
    }
    readings = [SlotReading("cpu", 1, each, paths.get(3 - place)) for place, each in enumerate(props)]
    threads = [ThreadReading(paths[vcpu], 100 + vcpu, vcpu, CpuProps({})) for vcpu in present]
    slots = build_slots(readings, threads)
    vm = VmInfo("test", "x86_64", "q35", "kvm", (10, 0, 2), libvirt_owned=libvirt_owned)
    return Layout(vm=vm, slots=slots, creation=creation_order(slots, threads))


def test_a_layout_answers_by_vcpu_id() -> None:
    layout = small_layout(0, 3, 2)
    assert layout.max == len(layout) == 4
    assert layout.enabled == {0, 2, 3}
    assert layout.free == {1}
    assert layout.order == (0, 3, 2)
    assert [vcpu.order for vcpu in layout] == [1, None, 3, 2]
    assert layout[3].device_id == "vcpu3"
    assert layout[3].host_tid == 103
    assert layout[3].qom_path == "/machine/peripheral/vcpu3"
    assert layout[0].device_id is None
    assert [vcpu.hotpluggable for vcpu in layout] == [False, False, True, True]
    assert layout[1].host_tid is None
    assert layout[1].type == "cpu"
    assert dict(layout[1].props) == {"socket-id": 0, "core-id": 1}
    for outside in (-1, 4):
        with pytest.raises(IndexError, match=r"has 0 to 3"):
            layout[outside]


@pytest.mark.parametrize("given", ["3", True, 3.0, None, [3], slice(0, 2)])
def test_what_is_no_vcpu_id_is_told(given: Any) -> None:
    with pytest.raises(TypeError, match=r"^a vCPU id is a whole number, not "):
        small_layout(0)[given]


def test_an_id_is_not_asked_of_the_layout_itself() -> None:
    layout = small_layout(0)
    with pytest.raises(TypeError, match=r"1 in layout: .* Ask layout\.enabled"):
        assert 1 in layout
    assert layout[1] in layout


def test_boot_vcpus_of_a_vm_that_libvirt_runs_are_not_ours_to_take() -> None:
    layout = small_layout(0, 1, libvirt_owned=True)
    assert layout[1].hotpluggable
    filled = layout[1].slot.filled("/machine/unattached/device[2]")
    slots = (layout.slots[0], filled, *layout.slots[2:])
    booted = Layout(vm=layout.vm, slots=slots, creation=layout.creation)
    assert not booted[1].hotpluggable


def test_what_is_pending_is_a_map_and_a_word_on_each_vcpu() -> None:
    layout = small_layout(0, 1, 2)
    pending = Layout(vm=layout.vm, slots=layout.slots, creation=layout.creation, pending_slots=frozenset({1, 2}))
    assert pending.pending == VcpuMap([1, 2])
    assert pending[1].pending
    assert not pending[0].pending


def test_vcpus_that_share_a_host_thread_have_none_of_their_own() -> None:
    reading = [SlotReading("cpu", 1, CpuProps({"core-id": core}), f"/c{core}") for core in (1, 0)]
    threads = [ThreadReading(f"/c{core}", 7, core, CpuProps({})) for core in (0, 1)]
    assert runs_single_threaded(threads)
    assert [slot.host_tids for slot in build_slots(reading, threads)] == [(None,), (None,)]
