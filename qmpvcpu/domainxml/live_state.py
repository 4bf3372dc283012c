"""The live state of a VM as libvirt's ``<domain>``, and what libvirt has no words for."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from qmpvcpu.domainxml.cpu import CPU_FEATURES, CPU_MODEL, IOMMU, cpu_differs, cpu_parts, mark_node, model_from
from qmpvcpu.domainxml.domain import DomainVcpu, DomainVcpus, needs_rows
from qmpvcpu.domainxml.patch import update_with
from qmpvcpu.domainxml.reader import parse
from qmpvcpu.domainxml.record_element import Metadata, record_node
from qmpvcpu.domainxml.safe_xml import parse_safely
from qmpvcpu.domainxml.writer import NO_PCI_DEVICES, Node, row, write
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vm import Topology, VmInfo

# QEMU's target where libvirt has another word for it; all others are the same.
_ARCHES = {"i386": "i686", "arm": "armv7l", "or1k": "openrisc", "hppa": "parisc"}
# Elsewhere libvirt has no use for <acpi/> (ppc64, s390x) or refuses it without UEFI (aarch64).
_ACPI_ARCHES = frozenset({"x86_64", "i386"})
_MOST_WITHOUT_EIM = 255

# libvirt gives every VM a USB controller and a balloon on PCI unless told not to, and refuses one that has no PCI.
_WITHOUT_PCI = frozenset({"microvm", "isapc"})


def render(
    layout: Layout, *, base: bytes | None = None, emulator: str | None = None, metadata: Metadata | None = None
) -> bytes:
    """Return the live state of a VM as a ``<domain>`` that ``virsh define`` accepts.

    Idempotent: equal arguments give equal bytes. Every possible vCPU is listed. ``order`` is QEMU's creation order, a
    dense 1..K over the slots that are plugged, and nothing else has one. ``hotpluggable='no'`` is the unbroken run
    of boot CPUs from vCPU 0 on that were created in the order of their ids, which is what a new QEMU starts with;
    every other vCPU is ``'yes'``: libvirt plugs it, in this order, before the guest runs. The vCPUs of one slot are
    alike.

    What libvirt cannot say, or QEMU does not tell, is left out; ``omissions`` names it. The CPU model is written
    without features, which QEMU does not tell; an element of ours under ``<metadata>`` says that they are unknown.

    With *base*, that document is changed to tell this state, as ``update`` does: what it says of memory, devices,
    pins and all else stays, byte for byte.

    Args:
        layout: The state to write.
        base: The VM's own document, or None to write one from what QEMU tells. The caller bounds its size.
        emulator: Absolute path of the QEMU that shall run it, or None for libvirt's default; *base* has its own.
        metadata: What goes under ``<metadata>``, or None to leave that out, or as it is in *base*. Its ``uuid`` is
            used where QEMU has none; libvirt makes one up where there is neither.

    Returns:
        UTF-8; without *base* in libvirt's own style, without XML declaration.

    Raises:
        DomainXmlError: The memory size is not known (libvirt cannot do without); vCPU 0 is not plugged; a name or
            path that libvirt or XML has no way to hold; *base* cannot be read, or is that of another VM: by its
            uuid, or because its maximum is another.
    """
    if base is not None:
        return update_with(base, lambda said: domain_of(layout, said), metadata)
    vm = layout.vm
    if vm.memory_kib is None:
        raise DomainXmlError(
            "QEMU did not tell its memory size, and libvirt cannot do without: set VmInfo.memory_kib"
        )
    if not vm.name.strip() or "/" in vm.name:
        raise DomainXmlError(f"libvirt takes no domain of the name {vm.name!r}")
    if emulator is not None and not emulator.startswith("/"):
        raise DomainXmlError(f"emulator {emulator!r} is no absolute path")
    domain = Node("domain", {"type": _type(vm)}, tuple(_domain(layout, emulator, metadata)))
    return write(domain)


def domain_from(layout: Layout) -> DomainVcpus:
    """Return what ``render`` says of *layout*, as a value, however many vCPUs and whatever memory there are.

    Raises:
        DomainXmlError: vCPU 0 is not plugged.
    """
    vm = layout.vm
    model = model_from(layout)
    return DomainVcpus(
        name=vm.name,
        uuid=vm.uuid,
        type=_type(vm),
        arch=_ARCHES.get(vm.arch, vm.arch),
        machine=vm.machine,
        emulator=None,
        memory_kib=vm.memory_kib,
        vcpus=tuple(vcpus_of(layout)),
        individual=True,
        topology=vm.topology,
        cpu=model,
        untold=(CPU_MODEL if model is None else CPU_FEATURES, *((IOMMU,) if _wants_eim(layout) else ())),
    )


def omissions(layout: Layout, *, base: bytes | None = None) -> tuple[str, ...]:
    """Say what ``render`` must leave out, so that a VM started from its document would differ: one sentence each.

    Args:
        layout: The state to write.
        base: The VM's own document, or None: what it says is not left out. A CPU model in it that is not the one
            that QEMU runs is named.

    Raises:
        DomainXmlError: *base* cannot be read.
    """
    found = []
    said = None if base is None else parse(base)
    if said is None and layout.vm.accelerator not in {"kvm", "tcg"}:
        found.append(
            f"type='kvm' stands for the accelerator {layout.vm.accelerator!r}, which the document cannot name"
        )
    topology = layout.vm.topology
    if said is not None and said.topology is not None:
        pass
    elif topology is None:
        found.append("QEMU did not tell its CPU topology: <topology> is left out, libvirt gives every vCPU a socket")
    elif not _sayable(topology, layout.max):
        found.append(
            "libvirt cannot say this CPU topology: <topology> is left out, and libvirt gives every vCPU a socket"
        )
    nodes = {slot.props.number("node-id") for slot in layout.slots} - {None}
    if len(nodes) > 1 and not (said and said.numa):
        found.append(f"<numa> is left out: QEMU does not tell the memory of its {len(nodes)} NUMA nodes")
    if _wants_eim(layout) and not _has_eim(base):
        found.append(
            f"libvirt wants an <iommu> with eim for more than {_MOST_WITHOUT_EIM} vCPUs, and refuses the document"
            " without: none is written, since QEMU does not tell whether the VM has one"
        )
    found.append(_cpu_omission(layout) if said is None else cpu_differs(layout, said) or "")
    return tuple(filter(None, found))


def _cpu_omission(layout: Layout) -> str:
    model = layout.slots[0].model if layout.slots else None
    if model is None:
        return "QEMU does not tell its CPU model: <cpu> is left out, and libvirt takes a model of its own choice"
    return (
        f"QEMU does not tell which CPU features were asked for besides the model {model}: none is written, and those"
        " that were switched on or off at its start have to be added"
    )


def _wants_eim(layout: Layout) -> bool:
    return layout.vm.arch in _ACPI_ARCHES and layout.max > _MOST_WITHOUT_EIM


def _type(vm: VmInfo) -> Literal["kvm", "qemu"]:
    """Return the domain type: libvirt would start ``qemu`` under TCG, where it fails to start ``kvm`` without KVM."""
    return "qemu" if vm.accelerator == "tcg" else "kvm"


def _has_eim(base: bytes | None) -> bool:
    return base is not None and parse_safely(base).find("devices/iommu/driver[@eim='on']") is not None


def _domain(layout: Layout, emulator: str | None, metadata: Metadata | None) -> Iterator[Node]:
    vm = layout.vm
    yield Node("name", content=vm.name)
    known_uuid = vm.uuid or (metadata.uuid if metadata else None)
    if known_uuid is not None:
        yield Node("uuid", content=known_uuid)
    records = () if metadata is None else (record_node(metadata),)
    yield Node("metadata", content=(*records, mark_node(layout)))
    for tag in ("memory", "currentMemory"):
        yield Node(tag, {"unit": "KiB"}, str(vm.memory_kib))
    plugged = sum(slot.count for slot in layout.slots if slot.present)
    count = {} if plugged == layout.max else {"current": plugged}
    yield Node("vcpu", {"placement": "static", **count}, str(layout.max))
    yield Node("vcpus", content=tuple(map(row, vcpus_of(layout))))
    machine = {"arch": _ARCHES.get(vm.arch, vm.arch), "machine": vm.machine}
    yield Node("os", content=(Node("type", machine, "hvm"),))
    if vm.arch in _ACPI_ARCHES:
        yield Node("features", content=(Node("acpi"),))
    model = model_from(layout)
    said, inside = ({}, ()) if model is None else cpu_parts(model)
    if vm.topology is not None and _sayable(vm.topology, layout.max):
        inside = (*inside, _topology(vm.topology))
    if said or inside:
        yield Node("cpu", said, inside)
    devices: tuple[Node, ...] = () if emulator is None else (Node("emulator", content=emulator),)
    if vm.machine in _WITHOUT_PCI:
        devices += NO_PCI_DEVICES
    if devices:
        yield Node("devices", content=devices)


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


def domain_of(layout: Layout, base: DomainVcpus) -> DomainVcpus:
    """Return what a document says, with the live state of a VM in the place of the state that it tells.

    Which vCPUs are enabled, which of them are hotpluggable, and their order are *layout*'s; all else is *base*'s.

    Args:
        layout: The live state.
        base: What the VM's document says.

    Raises:
        DomainXmlError: They are of two VMs (both have a uuid, and not the same one), or of another number of possible
            vCPUs; vCPU 0 is not plugged.
    """
    ours = layout.vm.uuid
    if ours is not None and base.uuid is not None and ours != base.uuid:
        raise DomainXmlError(f"the document is that of a VM with uuid {base.uuid}, not {ours}")
    if base.max != layout.max:
        raise DomainXmlError(f"the document says that there can be {base.max} vCPUs, and QEMU has {layout.max}")
    vcpus = tuple(vcpus_of(layout))
    individual = base.individual or needs_rows(vcpus)
    return replace(base, vcpus=vcpus, individual=individual, previous=None, next_boot=None)


def vcpus_of(layout: Layout) -> Iterator[DomainVcpu]:
    """Return every possible vCPU, by id, so that a VM started from them has the same ones, created in the same order.

    Raises:
        DomainXmlError: vCPU 0 is not plugged.
    """
    if not layout.slots or not layout.slots[0].present:
        raise DomainXmlError("vCPU 0 is not plugged: libvirt has no such domain")
    places = {first: place for place, first in enumerate(layout.creation)}
    # Counted here, over what is plugged and nothing else, vCPU 0 first as libvirt wants it: libvirt's own numbers go
    # stale or double when a removal completes late, and such a document cannot be restored from.
    present = sorted(
        (slot for slot in layout.slots if slot.present),
        key=lambda slot: (slot.first != 0, places.get(slot.first, len(places)), slot.first),
    )
    order = {slot.first: place for place, slot in enumerate(present, start=1)}
    started_with = layout.started_with
    for slot in layout.slots:
        for each in range(slot.first, slot.first + slot.count):
            yield DomainVcpu(each, slot.present, each not in started_with, order.get(slot.first))
