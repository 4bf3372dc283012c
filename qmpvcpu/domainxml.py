"""Floor 3: libvirt's ``<domain>``, and the only door to lxml. Pure: bytes in, bytes out.

``render`` writes the live state as libvirt itself would print it, so that ``virsh define`` accepts it and a VM
started from it has the same vCPUs, created in the same order. ``read_identity`` tells whose a document is.

Source: libvirt formatdomain, "CPU Allocation" and "CPU model and topology"; the rules of ``<vcpus>`` as measured
with libvirt 9.0.0 (define, start, dumpxml) on QEMU 7.2.22 and 10.0.2.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from lxml import etree

from qmpvcpu.errors import DomainXmlError, InvalidMapError
from qmpvcpu.model import Layout, Slot, Topology, VcpuMap

__all__ = ["NAMESPACE", "Identity", "Instance", "Metadata", "omissions", "read_identity", "render"]

NAMESPACE = "urn:qmpvcpu:record:1"
"""Namespace of our element under ``<metadata>``; its number changes when an old reader could misread a new one."""

_RECORD = f"{{{NAMESPACE}}}record"
_DEFAULT_PREFIX = "qmpvcpu"

# QEMU's target where libvirt has another word for it; all others are the same.
_ARCHES = {"i386": "i686", "arm": "armv7l", "or1k": "openrisc", "hppa": "parisc"}
# Elsewhere libvirt has no use for <acpi/> (ppc64, s390x) or refuses it without UEFI (aarch64).
_ACPI_ARCHES = frozenset({"x86_64", "i386"})
_MOST_WITHOUT_EIM = 255

# Everything that render() writes; a document with more than this is not ours alone.
_WRITTEN = frozenset(
    {"name", "uuid", "metadata", "memory", "currentMemory", "vcpu", "vcpus", "os", "features", "cpu", "devices"}
)
# XML 1.0 cannot hold these, save for tab and line breaks, which libvirt refuses in a name.
_UNWRITABLE = re.compile("[^\x20-\x7e\x80-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"})


@dataclass(frozen=True, slots=True)
class Instance:
    """One run of QEMU: the same VM started again is another instance.

    Attributes:
        host_tid: Thread id of vCPU 0 on QEMU's host.
        start_ticks: When that thread started, in clock ticks since its host booted (field 22 of
            ``/proc/<pid>/task/<tid>/stat``), or None where QEMU runs on another host.
    """

    host_tid: int
    start_ticks: int | None = None


@dataclass(frozen=True, slots=True)
class Metadata:
    """What libvirt has no place for; kept in our own element under ``<metadata>``.

    Attributes:
        generation: How often this record was written.
        uuid: The uuid made up for a VM whose QEMU has none; None where QEMU has one.
        pending: vCPUs whose removal QEMU accepted and the guest has not answered.
        device_ids: Device ids that are not ``vcpu<first id>``, by first vCPU id of their slot. A VM rebuilt from
            the document has ``vcpu<first id>`` in their place.
        instance: The QEMU that this was read from, or None where not known.
    """

    generation: int = 0
    uuid: str | None = None
    pending: VcpuMap = field(default_factory=VcpuMap)
    device_ids: Mapping[int, str] = field(default_factory=dict)
    instance: Instance | None = None

    @classmethod
    def of(
        cls, layout: Layout, *, generation: int = 0, uuid: str | None = None, instance: Instance | None = None
    ) -> "Metadata":
        """Return what *layout* has to tell that libvirt has no place for; the rest as given."""
        foreign = {
            slot.first: slot.device_id
            for slot in layout.slots
            if slot.device_id is not None and slot.device_id != slot.new_device_id
        }
        return cls(generation, uuid, layout.pending, foreign, instance)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose document it is.

    Attributes:
        name: The VM's name.
        uuid: Lower-case text with dashes, or None where the document has none.
        metadata: Our own element, or None where it has none: the document was not written by us.
        foreign: Names of elements that ``render`` never writes (``disk``, ``cputune``, ...): to replace such a
            document by a rendered one would lose them.
    """

    name: str
    uuid: str | None
    metadata: Metadata | None
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Node:
    """An element to be written; its content is text or other elements."""

    tag: str
    attributes: Mapping[str, object] = field(default_factory=dict)
    content: "str | tuple[_Node, ...]" = ()


# libvirt gives every VM a USB controller and a balloon on PCI unless told not to, and refuses one that has no PCI.
_WITHOUT_PCI = frozenset({"microvm", "isapc"})
_NO_PCI_DEVICES = (_Node("controller", {"type": "usb", "model": "none"}), _Node("memballoon", {"model": "none"}))


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
    domain = _Node(
        "domain", {"type": "kvm" if vm.accelerator == "kvm" else "qemu"}, tuple(_domain(layout, emulator, metadata))
    )
    return ("\n".join(_lines(domain, "")) + "\n").encode()


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


def _domain(layout: Layout, emulator: str | None, metadata: Metadata | None) -> Iterator[_Node]:
    vm = layout.vm
    yield _Node("name", content=vm.name)
    known_uuid = vm.uuid or (metadata.uuid if metadata else None)
    if known_uuid is not None:
        yield _Node("uuid", content=known_uuid)
    if metadata is not None:
        yield _Node("metadata", content=(_record(metadata),))
    for tag in ("memory", "currentMemory"):
        yield _Node(tag, {"unit": "KiB"}, str(vm.memory_kib))
    count = {} if not layout.free else {"current": len(layout.enabled)}
    yield _Node("vcpu", {"placement": "static", **count}, str(layout.max))
    yield _Node("vcpus", content=tuple(_vcpus(layout)))
    machine = {"arch": _ARCHES.get(vm.arch, vm.arch), "machine": vm.machine}
    yield _Node("os", content=(_Node("type", machine, "hvm"),))
    if vm.arch in _ACPI_ARCHES:
        yield _Node("features", content=(_Node("acpi"),))
    if vm.topology is not None and _sayable(vm.topology, layout.max):
        yield _Node("cpu", content=(_topology(vm.topology),))
    devices: tuple[_Node, ...] = () if emulator is None else (_Node("emulator", content=emulator),)
    if vm.machine in _WITHOUT_PCI:
        devices += _NO_PCI_DEVICES
    if devices:
        yield _Node("devices", content=devices)


def _vcpus(layout: Layout) -> Iterator[_Node]:
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
        rows = {
            "enabled": _yes(slot.present),
            "hotpluggable": _yes(index >= started_with),
            **({"order": order[slot.first]} if slot.present else {}),
        }
        yield from (_Node("vcpu", {"id": each, **rows}) for each in slot.ids)


def _is_boot(slot: Slot) -> bool:
    return slot.qom_path is not None and not slot.qom_path.startswith("/machine/peripheral")


def _sayable(topology: Topology, maximum: int) -> bool:
    # libvirt has no words for modules, drawers and books; for clusters since 10.1, and older ones refuse the product.
    said = topology.sockets * topology.dies * topology.cores * topology.threads
    return said == maximum


def _topology(topology: Topology) -> _Node:
    return _Node(
        "topology",
        {
            "sockets": topology.sockets,
            "dies": topology.dies,
            "cores": topology.cores,
            "threads": topology.threads,
        },
    )


def _record(metadata: Metadata) -> _Node:
    attributes: dict[str, object] = {f"xmlns:{_DEFAULT_PREFIX}": NAMESPACE, "generation": metadata.generation}
    if metadata.uuid is not None:
        attributes["made-up-uuid"] = metadata.uuid
    content: list[_Node] = []
    if metadata.instance is not None:
        started = metadata.instance.start_ticks
        ticks = {} if started is None else {"start-ticks": started}
        content.append(_Node(f"{_DEFAULT_PREFIX}:instance", {"host-tid": metadata.instance.host_tid, **ticks}))
    if metadata.pending:
        content.append(_Node(f"{_DEFAULT_PREFIX}:pending", {"vcpus": metadata.pending}))
    for first, device_id in sorted(metadata.device_ids.items()):
        content.append(_Node(f"{_DEFAULT_PREFIX}:device", {"vcpu": first, "id": device_id}))
    return _Node(f"{_DEFAULT_PREFIX}:record", attributes, tuple(content))


def _yes(value: bool) -> str:  # noqa: FBT001 -- the word for a truth is all that it makes
    return "yes" if value else "no"


def _lines(node: _Node, indent: str) -> Iterator[str]:
    # libvirt writes what it knows in single quotes, and hands foreign metadata to libxml2, which writes double ones.
    quote = '"' if ":" in node.tag else "'"
    attributes = "".join(f" {key}={quote}{_escaped(value)}{quote}" for key, value in node.attributes.items())
    if not node.content:
        yield f"{indent}<{node.tag}{attributes}/>"
    elif isinstance(node.content, str):
        yield f"{indent}<{node.tag}{attributes}>{_escaped(node.content)}</{node.tag}>"
    else:
        yield f"{indent}<{node.tag}{attributes}>"
        for child in node.content:
            yield from _lines(child, indent + "  ")
        yield f"{indent}</{node.tag}>"


def _escaped(value: object) -> str:
    text = str(value)
    if _UNWRITABLE.search(text):
        raise DomainXmlError(f"{text!r} holds a character that a libvirt document cannot")
    return text.translate(_ESCAPES)


def read_identity(xml: bytes) -> Identity:
    """Tell whose document this is, without trusting it.

    Nothing is fetched, no entity is expanded, no document type is accepted, and the size of what is built is bounded
    by that of *xml*, which the caller bounds.

    Returns:
        Name, uuid, our metadata if it has any, and what it holds that we would not write.

    Raises:
        DomainXmlError: Not well-formed (torn, empty, not UTF-8), a document type, not a ``<domain>``, no name, or
            our own element damaged; ``line`` says where.
    """
    root = _parse(xml)
    if root.tag != "domain":
        raise DomainXmlError(f"a <{root.tag}>, not a <domain>", line=_line(root))
    name = root.findtext("name")
    if not name:
        raise DomainXmlError("the domain has no name", line=_line(root))
    try:
        identifier = _uuid(root.findtext("uuid"))
    except ValueError as error:
        raise DomainXmlError(f"not a uuid: {error}", line=_line(root)) from error
    record = root.find(f"metadata/{_RECORD}")
    foreign = [child.tag for child in root.iterchildren(tag=etree.Element) if child.tag not in _WRITTEN]
    nothing = [(node.tag, node.attributes) for node in _NO_PCI_DEVICES]
    devices = (child for child in root.iterfind("devices/*") if child.tag != "emulator")
    foreign += [child.tag for child in devices if (child.tag, dict(child.items())) not in nothing]
    foreign += [child.tag for child in root.iterfind("metadata/*") if child.tag != _RECORD]
    return Identity(
        name=name,
        uuid=identifier,
        metadata=None if record is None else _read_record(record),
        foreign=tuple(dict.fromkeys(str(tag) for tag in foreign)),
    )


def _parse(xml: bytes) -> etree._Element:
    if not xml.strip():
        raise DomainXmlError("the document is empty")
    try:
        xml.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DomainXmlError(f"not UTF-8 ({error.reason})", line=xml.count(b"\n", 0, error.start) + 1) from error
    # Refused before any parsing: entities, and with them every expansion attack, need a document type. Whatever
    # encoding the document claims, it is read as UTF-8, so that these bytes are the only way to spell one.
    doctype = xml.find(b"<!DOCTYPE")
    if doctype >= 0:
        raise DomainXmlError("a document type is not accepted", line=xml.count(b"\n", 0, doctype) + 1)
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_pis=True
    )
    try:
        return etree.fromstring(xml, parser)
    except etree.XMLSyntaxError as error:
        raise DomainXmlError(f"not well-formed: {error.msg}", line=error.lineno) from error


def _read_record(record: etree._Element) -> Metadata:
    instance = record.find(f"{{{NAMESPACE}}}instance")
    pending = record.find(f"{{{NAMESPACE}}}pending")
    try:
        devices = record.iterfind(f"{{{NAMESPACE}}}device")
        return Metadata(
            generation=_number(record.get("generation")),
            uuid=_uuid(record.get("made-up-uuid")),
            pending=VcpuMap.parse(pending.get("vcpus") or "") if pending is not None else VcpuMap(),
            device_ids={_number(each.get("vcpu")): each.get("id") or "" for each in devices},
            instance=None if instance is None else _read_instance(instance),
        )
    except (InvalidMapError, ValueError) as error:
        raise DomainXmlError(f"our metadata is damaged: {error}", line=_line(record)) from error


def _read_instance(instance: etree._Element) -> Instance:
    ticks = instance.get("start-ticks")
    return Instance(_number(instance.get("host-tid")), None if ticks is None else _number(ticks))


def _line(element: etree._Element) -> int | None:
    line = element.sourceline
    return line if isinstance(line, int) else None


def _uuid(text: str | None) -> str | None:
    return None if text is None else str(UUID(text.strip()))


def _number(text: str | None) -> int:
    if text is None or not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no number")
    return int(text)
