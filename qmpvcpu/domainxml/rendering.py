"""The live state of a VM as libvirt's ``<domain>``, and what libvirt has no words for."""

from collections.abc import Iterator

from qmpvcpu.domainxml.metadata import Metadata, record_node
from qmpvcpu.domainxml.nodes import Node, write
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model import Layout, Slot, Topology

__all__ = ["NO_PCI_DEVICES", "omissions", "render"]

# QEMU's target where libvirt has another word for it; all others are the same.
_ARCHES = {"i386": "i686", "arm": "armv7l", "or1k": "openrisc", "hppa": "parisc"}
# Elsewhere libvirt has no use for <acpi/> (ppc64, s390x) or refuses it without UEFI (aarch64).
_ACPI_ARCHES = frozenset({"x86_64", "i386"})
_MOST_WITHOUT_EIM = 255

# libvirt gives every VM a USB controller and a balloon on PCI unless told not to, and refuses one that has no PCI.
_WITHOUT_PCI = frozenset({"microvm", "isapc"})
NO_PCI_DEVICES = (Node("controller", {"type": "usb", "model": "none"}), Node("memballoon", {"model": "none"}))


def render(layout: Layout, *, emulator: str | None = None, metadata: Metadata | None = None) -> bytes:
    """Return the live state of a VM as a ``<domain>`` that ``virsh define`` accepts.

    Idempotent: equal arguments give equal bytes. Every possible vCPU is listed. ``order`` is QEMU's creation order, a
    dense 1..K over the slots that are plugged, and nothing else has one. ``hotpluggable='no'`` is the unbroken run
    of boot CPUs from vCPU 0 on that were created in the order of their ids, which is what a new QEMU starts with;
    every other vCPU is ``'yes'``: libvirt plugs it, in this order, before the guest runs. The vCPUs of one slot are
    alike.

    What libvirt cannot say, or QEMU does not tell, is left out; ``omissions`` names it. The CPU model is never
    written: QEMU does not tell its features.

    Args:
        layout: The state to write.
        emulator: Absolute path of the QEMU that shall run it, or None for libvirt's default.
        metadata: What goes under ``<metadata>``, or None to leave that out. Its ``uuid`` is used where QEMU has none;
            libvirt makes one up where there is neither.

    Returns:
        UTF-8 in libvirt's own style, without XML declaration.

    Raises:
        DomainXmlError: The memory size is not known (libvirt cannot do without); vCPU 0 is not plugged; a name or
            path that libvirt or XML has no way to hold.
    """
    vm = layout.vm
    if not layout.slots or not layout.slots[0].present:
        raise DomainXmlError("vCPU 0 is not plugged: libvirt has no such domain")
    if vm.memory_kib is None:
        raise DomainXmlError(
            "QEMU did not tell its memory size, and libvirt cannot do without: set VmInfo.memory_kib"
        )
    if not vm.name.strip() or "/" in vm.name:
        raise DomainXmlError(f"libvirt takes no domain of the name {vm.name!r}")
    if emulator is not None and not emulator.startswith("/"):
        raise DomainXmlError(f"emulator {emulator!r} is no absolute path")
    domain = Node(
        "domain", {"type": "kvm" if vm.accelerator == "kvm" else "qemu"}, tuple(_domain(layout, emulator, metadata))
    )
    return write(domain)


def omissions(layout: Layout) -> tuple[str, ...]:
    """Say what ``render`` must leave out, so that a VM started from its document would differ: one sentence each."""
    found = []
    topology = layout.vm.topology
    if topology is None:
        found.append("QEMU did not tell its CPU topology: <topology> is left out, libvirt gives every vCPU a socket")
    elif not _sayable(topology, layout.max):
        found.append(
            "libvirt cannot say this CPU topology: <topology> is left out, and libvirt gives every vCPU a socket"
        )
    nodes = {slot.props.number("node-id") for slot in layout.slots} - {None}
    if len(nodes) > 1:
        found.append(f"<numa> is left out: QEMU does not tell the memory of its {len(nodes)} NUMA nodes")
    if layout.vm.arch in _ACPI_ARCHES and layout.max > _MOST_WITHOUT_EIM:
        found.append(f"libvirt wants an <iommu> with eim for more than {_MOST_WITHOUT_EIM} vCPUs; none is written")
    return tuple(found)


def _domain(layout: Layout, emulator: str | None, metadata: Metadata | None) -> Iterator[Node]:
    vm = layout.vm
    yield Node("name", content=vm.name)
    known_uuid = vm.uuid or (metadata.uuid if metadata else None)
    if known_uuid is not None:
        yield Node("uuid", content=known_uuid)
    if metadata is not None:
        yield Node("metadata", content=(record_node(metadata),))
    for tag in ("memory", "currentMemory"):
        yield Node(tag, {"unit": "KiB"}, str(vm.memory_kib))
    plugged = sum(slot.count for slot in layout.slots if slot.present)
    count = {} if plugged == layout.max else {"current": plugged}
    yield Node("vcpu", {"placement": "static", **count}, str(layout.max))
    yield Node("vcpus", content=tuple(_vcpus(layout)))
    machine = {"arch": _ARCHES.get(vm.arch, vm.arch), "machine": vm.machine}
    yield Node("os", content=(Node("type", machine, "hvm"),))
    if vm.arch in _ACPI_ARCHES:
        yield Node("features", content=(Node("acpi"),))
    if vm.topology is not None and _sayable(vm.topology, layout.max):
        yield Node("cpu", content=(_topology(vm.topology),))
    devices: tuple[Node, ...] = () if emulator is None else (Node("emulator", content=emulator),)
    if vm.machine in _WITHOUT_PCI:
        devices += NO_PCI_DEVICES
    if devices:
        yield Node("devices", content=devices)


def _vcpus(layout: Layout) -> Iterator[str]:
    places = {first: place for place, first in enumerate(layout.creation)}
    # Counted here, over what is plugged and nothing else, vCPU 0 first as libvirt wants it: libvirt's own numbers go
    # stale or double when a removal completes late, and such a document cannot be restored from.
    present = sorted(
        (slot for slot in layout.slots if slot.present),
        key=lambda slot: (slot.first != 0, places.get(slot.first, len(places)), slot.first),
    )
    order = {slot.first: place for place, slot in enumerate(present, start=1)}
    started_with = 0
    for slot, created in zip(layout.slots, present, strict=False):
        if slot is not created or not (slot.first == 0 or _is_boot(slot)):
            break
        started_with += 1
    for index, slot in enumerate(layout.slots):
        hotpluggable = "no" if index < started_with else "yes"
        place = f" order='{order[slot.first]}'" if slot.present else ""
        state = f"enabled='{'yes' if slot.present else 'no'}' hotpluggable='{hotpluggable}'{place}/>"
        # Text at once: a node for each of hundreds of rows would be half of what rendering costs.
        yield from (f"<vcpu id='{each}' {state}" for each in range(slot.first, slot.first + slot.count))


def _is_boot(slot: Slot) -> bool:
    return slot.qom_path is not None and not slot.qom_path.startswith("/machine/peripheral")


def _sayable(topology: Topology, maximum: int) -> bool:
    # libvirt has no words for modules, drawers and books; for clusters since 10.1, and older ones refuse the product.
    said = topology.sockets * topology.dies * topology.cores * topology.threads
    return said == maximum


def _topology(topology: Topology) -> Node:
    return Node(
        "topology",
        {
            "sockets": topology.sockets,
            "dies": topology.dies,
            "cores": topology.cores,
            "threads": topology.threads,
        },
    )
