"""VMs to plan for: any mixture of boot vCPUs, of ours, and of what others plugged."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.engine.slots import SlotTable
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.vm import Topology, VmInfo, VmStatus
from qmpvcpu.planning.checks import Situation

KVM = VmInfo("test", "x86_64", "pc-q35-10.0", "kvm", (10, 0, 2))
TCG = replace(KVM, accelerator="tcg")
OLD_TCG = replace(TCG, qemu_version=(7, 2, 22))

PATHS = {
    "boot": "/machine/unattached/device[{}]",
    "ours": "/machine/peripheral/vcpu{}",
    "other": "/machine/peripheral/cpu-{}",
    "nameless": "/machine/peripheral-anon/device[{}]",
}


def situation(
    plugged: dict[int, str],
    *,
    slots: int = 8,
    count: int = 1,
    pending: tuple[int, ...] = (),
    vm: VmInfo = KVM,
    **changes: Any,
) -> Situation:
    """*plugged* names, by first vCPU id, whence each CPU is (``PATHS``)."""
    firsts = range(0, slots * count, count)
    made = tuple(
        Slot(
            first,
            count,
            "t-x86_64-cpu",
            CpuProps({"socket-id": 0, "core-id": place}),
            first,
            PATHS[plugged[first]].format(first) if first in plugged else None,
            (None,) * count if first in plugged else (),
        )
        for place, first in enumerate(firsts)
    )
    layout = Layout(vm=vm, slots=made, creation=tuple(plugged), pending_slots=frozenset(pending))
    given: dict[str, Any] = {"status": VmStatus("running"), "created": len(plugged) * count}
    return Situation(layout=layout, **(given | changes))


def with_slot(layout: Layout, slot: Slot) -> Layout:
    """Return *layout* with *slot* in the place of the one with its first id."""
    table = SlotTable(layout)
    table.put(slot)
    return table.layout


def wide(topology: Topology) -> VmInfo:
    """Return a VM under TCG, without x2apic, of this topology."""
    return replace(TCG, topology=topology, x2apic=False)


def vcpus(text: str) -> VcpuMap:
    return VcpuMap.parse(text)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """Draw any VM of up to ten slots of 1, 2 or 4 vCPUs, vCPU 0 plugged, under KVM."""
    count = draw(st.sampled_from([1, 2, 4]))
    slots = draw(st.integers(1, 10))
    origins = [draw(st.sampled_from(["", *PATHS])) for _ in range(1, slots)]
    plugged = {0: "boot"} | {place * count: origin for place, origin in enumerate(origins, 1) if origin}
    leaving = draw(st.lists(st.sampled_from(sorted(plugged)), unique=True))
    pending = tuple(first for first in leaving if first)
    return situation(plugged, slots=slots, count=count, pending=pending)
