"""The live state of a VM as libvirt's ``<domain>``, and what libvirt cannot express."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from qmpvcpu.domainxml.cpu import (
    CPU_FEATURES,
    CPU_MODEL,
    IOMMU,
    cpu_differs,
    cpu_parts,
    mark_node,
    model_from,
    running_model,
)
from qmpvcpu.domainxml.domain import MOST_WITHOUT_EIM, X86, DomainVcpu, DomainVcpus, needs_rows
from qmpvcpu.domainxml.placing import with_placement
from qmpvcpu.domainxml.writer import NO_PCI_DEVICES, Node, cputune_nodes, topology_node, vcpu_row, write
from qmpvcpu.errors import DomainXmlError, counted
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.vm import Topology, VmInfo

# Imports in functions below: a document that is written anew needs no lxml, which takes long to import.
if TYPE_CHECKING:
    from qmpvcpu.domainxml.reader import ReadDocument
    from qmpvcpu.domainxml.record_element import Metadata

# QEMU's targets that libvirt names differently.
_ARCHES: Final = {"i386": "i686", "arm": "armv7l", "or1k": "openrisc", "hppa": "parisc"}
_WITHOUT_PCI: Final = frozenset({"microvm", "isapc"})


def render(
    layout: Layout,
    *,
    base: bytes | None = None,
    emulator: str | None = None,
    metadata: "Metadata | None" = None,
    placement: Placement | None = None,
) -> bytes:
    """Return the live state of a VM as a ``<domain>`` that ``virsh define`` accepts.

    Equal arguments give equal bytes. Every possible vCPU is listed. ``order`` is QEMU's creation order, a dense 1..K
    over the plugged slots; no other slot has one. ``hotpluggable='no'`` marks the unbroken run of boot CPUs from
    vCPU 0 on that were created in the order of their ids, which is what a new QEMU boots with. Every other vCPU is
    ``'yes'``: libvirt plugs it, in this order, before the guest runs. The vCPUs of one slot are alike.

    What libvirt cannot express, or QEMU does not report, is left out; ``omissions`` names it. The CPU model is
    written without features, which QEMU does not report; an element of ours under ``<metadata>`` notes that.

    With *base*, that document is changed to describe this state, as ``update`` does: memory, devices and everything
    else in it stay, byte for byte; so do pins and schedulers, unless there is a *placement*.

    Args:
        layout: The state to write.
        base: The VM's own document, or None to write one from what QEMU reports. The caller bounds its size.
        emulator: Absolute path of the QEMU that should run it, or None for libvirt's default; *base* has its own.
        metadata: Our own element for ``<metadata>``, or None to leave it out, or as it is in *base*. Its ``uuid`` is
            used where QEMU has none; without either, libvirt makes one up.
        placement: Where the VM's threads are to run, for ``<cputune>`` and ``<vcpu cpuset>``, as ``with_placement``
            writes it; vCPUs that are not plugged keep theirs. None: as it is in *base*, or nothing is said.

    Returns:
        UTF-8; without *base* in libvirt's own style, without XML declaration.

    Raises:
        DomainXmlError: The memory size is not known (libvirt requires it); vCPU 0 is not plugged; a name or path that
            libvirt or XML cannot hold; *base* cannot be read, or is another VM's: it has another uuid, or another
            maximum.
    """
    if base is not None:
        from qmpvcpu.domainxml.patch import update_with

        return update_with(base, lambda said: _placed(domain_of(layout, said), placement), metadata)
    vm = layout.vm
    if vm.memory_kib is None:
        raise DomainXmlError("QEMU did not report its memory size, which libvirt requires: set VmInfo.memory_kib")
    if not vm.name.strip() or "/" in vm.name:
        raise DomainXmlError(f"libvirt does not accept the domain name {vm.name!r}")
    if emulator is not None and not emulator.startswith("/"):
        raise DomainXmlError(f"emulator {emulator!r} is not an absolute path")
    domain = _placed(domain_from(layout), placement)
    inside = _domain(replace(domain, emulator=emulator), metadata, mark_node(layout))
    return write(Node("domain", {"type": domain.type}, tuple(inside)))


def domain_from(layout: Layout) -> DomainVcpus:
    """Return what ``render`` writes of *layout*, as a value; the memory size may be unknown here.

    Raises:
        DomainXmlError: vCPU 0 is not plugged.
    """
    vm = layout.vm
    model = model_from(layout)
    return DomainVcpus(
        name=vm.name,
        uuid=vm.uuid,
        type=_type(vm),
        arch=_arch(vm),
        machine=vm.machine,
        emulator=None,
        memory_kib=vm.memory_kib,
        vcpus=tuple(_vcpus(layout)),
        individual=True,
        topology=vm.topology,
        cpu=model,
        untold=(CPU_MODEL if model is None else CPU_FEATURES, *((IOMMU,) if _needs_eim(layout) else ())),
    )


def domain_of(layout: Layout, base: DomainVcpus) -> DomainVcpus:
    """Return *base*, what a document says, with the live state of its VM.

    Which vCPUs are enabled, which of them are hotpluggable, and their order are *layout*'s; all else is *base*'s.

    Args:
        layout: The live state.
        base: What the VM's document says.

    Raises:
        DomainXmlError: They are of two VMs (both have a uuid, and these differ) or of different maximums; vCPU 0 is
            not plugged.
    """
    uuid = layout.vm.uuid
    if uuid is not None and base.uuid is not None and uuid != base.uuid:
        raise DomainXmlError(f"the document is that of a VM with uuid {base.uuid}, not {uuid}")
    if base.max != layout.max:
        raise DomainXmlError(f"the document has a maximum of {counted(base.max, 'vCPU')}, and QEMU has {layout.max}")
    vcpus = tuple(_vcpus(layout))
    individual = base.individual or needs_rows(vcpus)
    return replace(base, vcpus=vcpus, individual=individual, previous=None, next_boot=None, next_placement=None)


def _placed(domain: DomainVcpus, placement: Placement | None) -> DomainVcpus:
    return domain if placement is None else with_placement(domain, placement)


def omissions(layout: Layout, *, base: bytes | None = None) -> tuple[str, ...]:
    """Return what ``render`` must leave out, so that a VM started from its document would differ: a sentence each.

    Args:
        layout: The state to write.
        base: The VM's own document, or None. What it says is not left out; if its CPU model is not the one that QEMU
            runs, that is reported.

    Raises:
        DomainXmlError: *base* cannot be read.
    """
    document = None if base is None else _read(base)
    said = None if document is None else document.domain
    found = []
    if said is None and layout.vm.accelerator not in {"kvm", "tcg"}:
        found.append(f"the document cannot name the accelerator {layout.vm.accelerator!r}: it says type='kvm'")
    topology = layout.vm.topology
    if said is None or said.topology is None:
        if topology is None:
            found.append("QEMU did not report its CPU topology: <topology> is left out, and every vCPU gets a socket")
        elif not _is_expressible(topology, layout.max):
            found.append(
                "libvirt cannot express this CPU topology: <topology> is left out, and every vCPU gets a socket"
            )
    nodes = {slot.props.number("node-id") for slot in layout.slots} - {None}
    if len(nodes) > 1 and not (said and said.numa):
        found.append(f"<numa> is left out: QEMU does not report the memory of its {len(nodes)} NUMA nodes")
    if _needs_eim(layout) and (document is None or document.root.find("devices/iommu/driver[@eim='on']") is None):
        found.append(
            f"libvirt requires an <iommu> with eim for more than {MOST_WITHOUT_EIM} vCPUs, and refuses the document"
            " without: none is written, since QEMU does not report whether the VM has one"
        )
    found.append(_cpu_omission(layout) if said is None else cpu_differs(layout, said) or "")
    return tuple(filter(None, found))


def _cpu_omission(layout: Layout) -> str:
    model = running_model(layout)
    if model is None:
        return "QEMU does not report its CPU model: <cpu> is left out, and libvirt chooses a model"
    return (
        f"QEMU does not report which CPU features were requested besides the model {model}: none is written;"
        " add those that were switched on or off at its start"
    )


def _needs_eim(layout: Layout) -> bool:
    return _arch(layout.vm) in X86 and layout.max > MOST_WITHOUT_EIM


def _arch(vm: VmInfo) -> str:
    return _ARCHES.get(vm.arch, vm.arch)


def _type(vm: VmInfo) -> Literal["kvm", "qemu"]:
    """Return the domain type: libvirt starts ``qemu`` under TCG, and cannot start ``kvm`` without KVM."""
    return "qemu" if vm.accelerator == "tcg" else "kvm"


def _read(xml: bytes) -> "ReadDocument":
    from qmpvcpu.domainxml.reader import ReadDocument

    return ReadDocument(xml)


def _domain(domain: DomainVcpus, metadata: "Metadata | None", mark: Node) -> Iterator[Node]:
    yield Node("name", content=domain.name)
    uuid = domain.uuid or (metadata.uuid if metadata else None)
    if uuid is not None:
        yield Node("uuid", content=uuid)
    yield Node("metadata", content=(*_records(metadata), mark))
    for tag in ("memory", "currentMemory"):
        yield Node(tag, {"unit": "KiB"}, str(domain.memory_kib))
    current = None if domain.current == domain.max else domain.current
    said = {"placement": domain.placement, "cpuset": domain.cpuset, "current": current}
    yield Node("vcpu", {name: value for name, value in said.items() if value is not None}, str(domain.max))
    yield Node("vcpus", content=tuple(map(vcpu_row, domain.vcpus)))
    if tunes := cputune_nodes(domain):
        yield Node("cputune", content=tunes)
    machine = {"arch": domain.arch, "machine": domain.machine}
    yield Node("os", content=(Node("type", machine, "hvm"),))
    if domain.arch in X86:  # elsewhere libvirt does not need <acpi/> (ppc64, s390x), or refuses it without UEFI
        yield Node("features", content=(Node("acpi"),))
    attributes, inside = ({}, ()) if domain.cpu is None else cpu_parts(domain.cpu)
    if domain.topology is not None and _is_expressible(domain.topology, domain.max):
        inside = (*inside, topology_node(domain.topology))
    if attributes or inside:
        yield Node("cpu", attributes, inside)
    devices: tuple[Node, ...] = () if domain.emulator is None else (Node("emulator", content=domain.emulator),)
    if domain.machine in _WITHOUT_PCI:
        devices += NO_PCI_DEVICES
    if devices:
        yield Node("devices", content=devices)


def _records(metadata: "Metadata | None") -> tuple[Node, ...]:
    if metadata is None:
        return ()
    from qmpvcpu.domainxml.record_element import record_node

    return (record_node(metadata),)


def _vcpus(layout: Layout) -> Iterator[DomainVcpu]:
    """Return every possible vCPU, by id, so that a VM started from them has the same ones, created in the same order.

    Raises:
        DomainXmlError: vCPU 0 is not plugged.
    """
    if not layout.slots or not layout.slots[0].present:
        raise DomainXmlError("vCPU 0 is not plugged: libvirt has no such domain")
    places = {first: place for place, first in enumerate(layout.creation)}
    # Counted here over the plugged slots, vCPU 0 first as libvirt requires: libvirt's own numbers go stale or double
    # when a removal completes late, and such a document cannot be restored from.
    present = sorted(
        (slot for slot in layout.slots if slot.present),
        key=lambda slot: (slot.first != 0, places.get(slot.first, len(places)), slot.first),
    )
    order = {slot.first: place for place, slot in enumerate(present, start=1)}
    started_with = layout.started_with
    for slot in layout.slots:
        for each in range(slot.first, slot.first + slot.count):
            yield DomainVcpu(each, slot.present, each not in started_with, order.get(slot.first))


def _is_expressible(topology: Topology, maximum: int) -> bool:
    # libvirt cannot express modules, drawers and books, nor before 10.1 clusters.
    return topology.sockets * topology.dies * topology.cores * topology.threads == maximum
