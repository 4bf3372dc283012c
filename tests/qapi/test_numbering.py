"""From QEMU's two replies to slots with vCPU ids: libvirt's numbers on what QEMU lists."""

import pytest

from qmpvcpu.model.layout import CpuProps
from qmpvcpu.qapi import SlotReading, ThreadReading, build_slots, runs_single_threaded
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


def test_node_ids_may_interleave() -> None:
    readings = [
        SlotReading("cpu", 1, CpuProps({"node-id": core % 2, "core-id": core}), None) for core in (3, 2, 1, 0)
    ]
    assert [slot.props["core-id"] for slot in build_slots(readings, ())] == [0, 1, 2, 3]


def test_vcpus_that_share_a_host_thread_have_none_of_their_own() -> None:
    reading = [SlotReading("cpu", 1, CpuProps({"core-id": core}), f"/c{core}") for core in (1, 0)]
    threads = [ThreadReading(f"/c{core}", 7, core, CpuProps({})) for core in (0, 1)]
    assert runs_single_threaded(threads)
    assert [slot.host_tids for slot in build_slots(reading, threads)] == [(None,), (None,)]
