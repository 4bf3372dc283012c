"""Layouts for tests: any mixture of boot vCPUs, of ours, and of what others plugged."""

from collections.abc import Mapping
from dataclasses import replace

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.vm import VmInfo

KVM = VmInfo("test", "x86_64", "pc-q35-10.0", "kvm", (10, 0, 2))
TCG = replace(KVM, accelerator="tcg")
OLD_TCG = replace(TCG, qemu_version=(7, 2, 22))

# By origin of a CPU; "boot" with its place in the order of creation, the others with their first vCPU id.
PATHS = {
    "boot": "/machine/unattached/device[{}]",
    "ours": "/machine/peripheral/vcpu{}",
    "other": "/machine/peripheral/cpu-{}",
    "nameless": "/machine/peripheral-anon/device[{}]",
}


def layout(
    plugged: str | Mapping[int, str],
    *,
    slots: int = 8,
    count: int = 1,
    pending: tuple[int, ...] = (),
    vm: VmInfo = KVM,
    first_tid: int | None = None,
) -> Layout:
    """Return a layout of *slots* slots of *count* vCPUs each.

    Args:
        plugged: Where each CPU is from (``PATHS``), by first vCPU id and in order of creation; or a map as text, in
            which 0 is from boot and the others are ours.
        slots: How many slots there are.
        count: How many vCPUs each has.
        pending: Those whose removal is pending, by first id.
        vm: The VM.
        first_tid: The host thread of vCPU 0, the others' following; None: nothing is known of threads.
    """
    if isinstance(plugged, str):
        plugged = {each: "ours" if each else "boot" for each in VcpuMap.parse(plugged)}
    paths = {
        first: PATHS[origin].format(place if origin == "boot" else first)
        for place, (first, origin) in enumerate(plugged.items())
    }
    made = (
        Slot(
            first,
            count,
            "qemu64-x86_64-cpu",
            CpuProps({"socket-id": 0, "core-id": place}),
            first,
            paths.get(first),
            tuple(None if first_tid is None else first_tid + first + each for each in range(count))
            if first in paths
            else (),
        )
        for place, first in enumerate(range(0, slots * count, count))
    )
    return Layout(vm=vm, slots=tuple(made), creation=tuple(plugged), pending_slots=frozenset(pending))
