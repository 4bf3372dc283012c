"""The vCPU side of any libvirt ``<domain>``, read as libvirt reads it, with the defaults that it fills in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from uuid import UUID

from lxml import etree

from qmpvcpu.domainxml.cpu import CPU_MARK, IOMMU, has_mark, is_as_written, untold_of
from qmpvcpu.domainxml.document import Contents
from qmpvcpu.domainxml.domain import CpuModel, DomainVcpu, DomainVcpus, NumaCell, VcpuSched
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.domainxml.record_element import Metadata, find_record, read_metadata
from qmpvcpu.domainxml.rules import examine
from qmpvcpu.domainxml.safe_xml import line_of, parse_safely, text_of
from qmpvcpu.domainxml.writer import NO_PCI_DEVICES
from qmpvcpu.errors import DomainXmlError, shorten
from qmpvcpu.model.names import is_word
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology

# What else changes -cpu, or the memory of cells, and is for nobody here but whoever starts QEMU.
_UNREAD = (
    "cpu[@match='minimum']",
    "cpu/model[@vendor_id]",
    "cpu/cache",
    "cpu/maxphysaddr",
    "cpu/numa/cell[@memAccess]",
    "cpu/numa/cell[@discard]",
    "cpu/numa/cell/distances",
    "cpu/numa/cell/cache",
    "cpu/numa/interconnects",
    "features/hyperv",
    "features/kvm",
    "features/pvspinlock",
    "features/pmu",
    "clock/timer[@name='kvmclock']",
    "clock/timer[@name='tsc']",
    "memoryBacking",
    "numatune",
)


_MOST_QUOTED = 60


def parse(xml: bytes) -> DomainVcpus:
    """Read what a domain document says about vCPUs, as libvirt reads it.

    What libvirt fills in by itself, without asking QEMU, is filled in: vCPUs that ``<vcpus>`` does not list are off,
    of two rows for one vCPU the last counts, ``current`` counts only where there are no rows, a vCPU that is on is
    not hotpluggable and one that is off is unless it is said, vCPUs of no cell are in cell 0, a cpuset under
    ``placement='auto'`` and a pin of a vCPU that cannot be are dropped.

    The rows of a record are the VM as it runs; ``start_of`` returns what it is next started with.

    Args:
        xml: The document, in UTF-8; the caller bounds its size.

    Raises:
        DomainXmlError: Not well-formed, not safe to read, or no domain of QEMU's; or our own element in it is
            damaged, or of a newer version; ``line`` says where.
        DomainRuleError: What libvirt would refuse when the document is defined; the first of these. Only that more
            than 255 vCPUs need an ``<iommu>`` is not held against a document that ``render`` wrote (``untold``).
    Source:
        libvirt formatdomain; measured with libvirt 9.0.0.

    Example:
        >>> domain = parse(b"<domain type='kvm'><name>a</name><vcpu current='2'>4</vcpu></domain>")
        >>> domain.max, domain.enabled
        (4, VcpuMap('0-1'))
    """
    domain, root = parse_with_tree(xml)
    metadata = root.find("metadata")
    record = None if metadata is None else find_record(metadata)
    if record is None:
        return domain
    said = read_metadata(record)
    return replace(domain, previous=said.previous, next_boot=said.next_boot)


def parse_with_tree(xml: bytes) -> tuple[DomainVcpus, etree._Element]:
    """Do what ``parse`` does, and return the document's root too: building the tree twice would be dear.

    Raises:
        DomainXmlError: As ``parse`` does.
    """
    contents, broken = examine(xml, at_start=False)
    root = contents.root
    is_ours = has_mark(root)
    for each in broken:
        # Whether the VM has such an IOMMU QEMU did not tell; its vCPUs are read all the same.
        if not is_ours or each.rule is not DomainRule.EIM_MISSING:
            raise each
    os_type = root.find("os/type")
    # Not refused, so that it can be told.
    count = contents.count or 1
    cells = tuple(_cells(contents.cpu.cells, count))
    levels = contents.cpu.levels
    domain = DomainVcpus(
        name=_text(root, "name"),
        uuid=str(UUID(_text(root, "uuid").strip().replace("-", ""))) if _text(root, "uuid") else None,
        type="kvm" if root.get("type") == "kvm" else "qemu",
        arch=None if os_type is None else _name_of(os_type, "arch"),
        machine=None if os_type is None else _name_of(os_type, "machine"),
        emulator=_text(root, "devices/emulator") or None,
        memory_kib=sum(cell.memory_kib for cell in cells) or contents.memory_kib,
        vcpus=tuple(_vcpus(contents, count)),
        individual=bool(contents.rows),
        placement="auto" if contents.placement == "auto" else "static",
        cpuset=contents.cpuset,
        pins=dict(sorted(contents.pins.items())),
        emulator_pin=contents.emulator_pin,
        scheds=_scheds(contents.scheds),
        topology=None if levels is None else Topology(count, **levels),
        numa=cells,
        cpu=contents.cpu.model,
        unread=tuple(way for way in _UNREAD if root.find(way) is not None),
        untold=tuple(filter(None, (untold_of(root, contents.cpu.model), IOMMU if broken else None))),
    )
    return domain, root


def _text(root: etree._Element, way: str) -> str:
    element = root.find(way)
    return "" if element is None else text_of(element)


def _name_of(os_type: etree._Element, attribute: str) -> str | None:
    """Return a name of QEMU's; libvirt asks QEMU for it, and refuses what it does not have."""
    name = os_type.get(attribute)
    if name and not is_word(name):
        told = f"<type {attribute}=...>: {shorten(name, _MOST_QUOTED)} is no name that QEMU gives"
        raise DomainXmlError(told, line=line_of(os_type))
    return name


def _vcpus(contents: Contents, count: int) -> Iterator[DomainVcpu]:
    on = count if contents.current is None else contents.current
    for each in range(count):
        row = (contents.rows or {}).get(each)
        enabled = each < on if not contents.rows else row is not None and row.enabled
        said = None if row is None else row.hotpluggable
        order = None if row is None else row.order or None
        yield DomainVcpu(each, enabled, not enabled if said is None else said, order)


def _cells(cells: tuple[NumaCell, ...], count: int) -> Iterator[NumaCell]:
    named = {each for cell in cells for each in cell.cpus}
    rest = [each for each in range(count) if each not in named]
    for cell in cells:
        yield cell if cell.id or not rest else NumaCell(0, VcpuMap([*cell.cpus, *rest]), cell.memory_kib)


def _scheds(scheds: tuple[VcpuSched, ...]) -> tuple[VcpuSched, ...]:
    """Merge those that are alike: libvirt writes one for each vCPU."""
    found: dict[tuple[str, int | None], list[int]] = {}
    for each in scheds:
        found.setdefault((each.scheduler, each.priority), []).extend(each.vcpus)
    merged = (VcpuSched(VcpuMap(vcpus), scheduler, priority) for (scheduler, priority), vcpus in found.items())
    return tuple(sorted(merged, key=lambda each: next(iter(each.vcpus))))


# Everything that render() writes, by the way from <domain> down, with its attributes: a document with more than this
# is not ours alone. Our own element is read, and checked, by itself.
_WRITTEN = {
    "domain": {"type"},
    "domain/name": set(),
    "domain/uuid": set(),
    "domain/metadata": set(),
    f"domain/metadata/{CPU_MARK}": {"model", "features"},
    "domain/memory": {"unit"},
    "domain/currentMemory": {"unit"},
    "domain/vcpu": {"placement", "current"},
    "domain/vcpus": set(),
    "domain/vcpus/vcpu": {"id", "enabled", "hotpluggable", "order"},
    "domain/os": set(),
    "domain/os/type": {"arch", "machine"},
    "domain/features": set(),
    "domain/features/acpi": set(),
    "domain/cpu": {"mode", "match", "check", "migratable"},
    "domain/cpu/model": {"fallback"},
    "domain/cpu/topology": {"sockets", "dies", "cores", "threads"},
    "domain/devices": set(),
    "domain/devices/emulator": set(),
}
# Of a hostile document each can be long, and there can be as many as it has tags.
_MOST_FOREIGN = 100
_NO_PCI = [(f"domain/devices/{node.tag}", dict(node.attributes)) for node in NO_PCI_DEVICES]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose document it is.

    Attributes:
        name: The VM's name.
        uuid: Lower-case text with dashes, or None where the document has none.
        metadata: Our own element, or None where it has none: the document was not written by us.
        foreign: What ``render`` never writes: names of elements (``disk``, ``cputune``, ...), of attributes
            (``vcpu cpuset``), and ``!--`` for a comment; at most 100 of them. To replace such a document by a
            rendered one would lose it.
    """

    name: str
    uuid: str | None
    metadata: Metadata | None
    foreign: tuple[str, ...] = ()


def read_identity(xml: bytes) -> Identity:
    """Tell whose document this is, without trusting it.

    Nothing is fetched or included, no entity is expanded, no document type is accepted, and what is built is bounded.
    The time it takes is in proportion to the size of *xml*.

    Returns:
        Name, uuid, our metadata if it has any, and what it holds that we would not write.

    Raises:
        DomainXmlError: Not well-formed (torn, empty, not UTF-8), too large, a document type, not a ``<domain>``, no
            name, our own element damaged, or written by a newer version; ``line`` says where.
    """
    root = parse_safely(xml)
    if root.tag != "domain":
        raise DomainXmlError(f"a <{root.tag}>, not a <domain>", line=line_of(root))
    name = root.findtext("name")
    if not name:
        raise DomainXmlError("the domain has no name", line=line_of(root))
    text = root.findtext("uuid")
    try:
        uuid = None if text is None else str(UUID(text.strip()))
    except ValueError as error:
        raise DomainXmlError(f"not a uuid: {error}", line=line_of(root)) from error
    metadata = root.find("metadata")
    record = None if metadata is None else find_record(metadata)
    return Identity(
        name=name,
        uuid=uuid,
        metadata=None if record is None else read_metadata(record),
        foreign=tuple(islice(_once(chain(_foreign_model(root), _foreign(root, "domain", record))), _MOST_FOREIGN)),
    )


def _once(names: Iterator[str]) -> Iterator[str]:
    seen = set()
    for name in names:
        if name not in seen:
            seen.add(name)
            yield name


def _foreign_model(root: etree._Element) -> Iterator[str]:
    """Tell whether somebody else has named the CPU model."""
    cpu = root.find("cpu")
    if cpu is None:
        return
    mode, name = cpu.get("mode"), cpu.findtext("model")
    if (mode or name) and not is_as_written(root, CpuModel(mode or "custom", name)):
        yield "cpu model"


def _foreign(element: etree._Element, way: str, ours: etree._Element | None) -> Iterator[str]:
    # Not items(): lxml looks for the value of each attribute among all of them.
    names = element.keys()
    if not any(way == known and _has(element, names, attributes) for known, attributes in _NO_PCI):
        if way not in _WRITTEN:
            yield str(element.tag)
            return
        yield from (f"{element.tag!s} {name!s}" for name in names if name not in _WRITTEN[way])
    if next(element.iterchildren(tag=etree.Comment), None) is not None:
        yield "!--"
    for child in element.iterchildren(tag=etree.Element):
        if child is not ours:
            yield from _foreign(child, f"{way}/{child.tag}", ours)


def _has(element: etree._Element, names: Sequence[object], attributes: Mapping[str, object]) -> bool:
    return len(names) == len(attributes) and all(element.get(name) == value for name, value in attributes.items())
