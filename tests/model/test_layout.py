"""Layout: all slots of a VM, and what each vCPU is."""

from itertools import product
from typing import Any

import pytest

from qmpvcpu import Layout, Proof, VcpuMap
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.qapi import SlotReading, ThreadReading, build_slots, creation_order


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


# What is proven of a vCPU.


def test_of_what_was_there_before_only_what_the_guest_has_acknowledged_is_known() -> None:
    layout = small_layout(0, 1)
    assert (layout[0].proof, layout[0].proven_at) == (Proof.PRESENT, None)
    assert (layout[2].proof, layout[2].proven_at) == (None, None)
    answered = layout[1].slot.answered(OstAnswer(1, 0))
    assert (answered.proof, answered.proven_at) == (Proof.ACKNOWLEDGED, None)
    assert layout[1].slot.answered(OstAnswer(1, 0x81)).proof is Proof.PRESENT


def test_a_vcpu_has_the_highest_rung_known_and_since_when() -> None:
    slot = small_layout(0, 1)[1].slot.answered(OstAnswer(1, 0)).proving(Proof.STARTED, 1e9)
    layout = Layout(vm=small_layout(0).vm, slots=(*small_layout(0, 1).slots[:1], slot), creation=(0, 1))
    assert (layout[1].proof, layout[1].proven_at) == (Proof.STARTED, 1e9)
    assert slot.seen((7,)).proof is Proof.STARTED
    assert slot.answered(OstAnswer(1, 0x81)).proof is Proof.STARTED


def test_the_next_cpu_of_a_slot_has_proven_nothing() -> None:
    slot = small_layout(0, 1)[1].slot.proving(Proof.ONLINE, 1e9)
    assert slot.emptied().proof is None
    assert slot.emptied().filled("/machine/peripheral/vcpu1").proof is Proof.PRESENT
    assert slot.filled("/machine/peripheral/vcpu1", 2e9).proving(Proof.STARTED, 3e9).proven_at == 3e9
    assert slot.filled("/machine/peripheral/vcpu1", 2e9).proven_at == 2e9
