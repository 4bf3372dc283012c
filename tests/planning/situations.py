"""VMs to plan for: any mixture of boot vCPUs, of ours, and of what others plugged."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.engine.vmstate import SlotTable
from qmpvcpu.model.layout import Slot
from qmpvcpu.model.vm import Topology, VmInfo, VmStatus
from qmpvcpu.planning.checks import Situation
from tests.layouts import KVM, PATHS, TCG, layout


def situation(
    plugged: Mapping[int, str],
    *,
    slots: int = 8,
    count: int = 1,
    pending: tuple[int, ...] = (),
    vm: VmInfo = KVM,
    **changes: Any,
) -> Situation:
    """A running VM, with a layout as `tests.layouts.layout` makes it."""
    now = layout(plugged, slots=slots, count=count, pending=pending, vm=vm)
    given: dict[str, Any] = {"status": VmStatus("running"), "created": len(plugged) * count}
    return Situation(layout=now, **(given | changes))


def with_slot(of: Layout, slot: Slot) -> Layout:
    """Return *of* with *slot* in the place of the one with its first id."""
    table = SlotTable(of)
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
