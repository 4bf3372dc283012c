"""What a domain document says: about vCPUs, as libvirt reads it, and about whose document it is."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

from lxml import etree

from qmpvcpu.domainxml.attributes import AttributeReader
from qmpvcpu.domainxml.cpu import CPU_MARK, IOMMU
from qmpvcpu.domainxml.cpu_reader import CpuOptions, has_mark, is_as_written, untold_of
from qmpvcpu.domainxml.document import NOT_IN_NAMES, RawDomain, read_name, refuse_in_name
from qmpvcpu.domainxml.domain import CpuModel, DomainVcpu, DomainVcpus, NumaCell
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.domainxml.placing import placement_of
from qmpvcpu.domainxml.record_element import Metadata, find_record, read_metadata
from qmpvcpu.domainxml.rules import examine
from qmpvcpu.domainxml.safe_xml import line_of, parse_safely, text_of
from qmpvcpu.domainxml.writer import NO_PCI_DEVICES
from qmpvcpu.errors import DomainXmlError, shorten
from qmpvcpu.model.names import is_word
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology

# Everything that render() writes, by the path from <domain> down, with its attributes. A document with more than this
# is not ours alone. Our own element is read and checked elsewhere.
_WRITTEN = {
    "domain": {"type"},
    "domain/name": set(),
    "domain/uuid": set(),
    "domain/metadata": set(),
    f"domain/metadata/{CPU_MARK}": {"model", "features"},
    "domain/memory": {"unit"},
    "domain/currentMemory": {"unit"},
    "domain/vcpu": {"placement", "cpuset", "current"},
    "domain/vcpus": set(),
    "domain/vcpus/vcpu": {"id", "enabled", "hotpluggable", "order"},
    "domain/cputune": set(),
    "domain/cputune/vcpupin": {"vcpu", "cpuset"},
    "domain/cputune/emulatorpin": {"cpuset"},
    "domain/cputune/emulatorsched": {"scheduler", "priority"},
    "domain/cputune/vcpusched": {"vcpus", "scheduler", "priority"},
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
_NO_PCI = [(f"domain/devices/{node.tag}", dict(node.attributes)) for node in NO_PCI_DEVICES]
# In a hostile document each name can be long, and every tag can be one.
_MOST_FOREIGN = 100
_MOST_QUOTED = 60


class Identity(NamedTuple):
    """Whose document it is.

    Attributes:
        name: The VM's name.
        uuid: Lower-case text with dashes, or None where the document has none.
        metadata: Our own element, or None: the document was not written by us.
        foreign: What ``render`` never writes: names of elements (``disk``, ``shares``, ...), of attributes
            (``cell memAccess``), and ``!--`` for a comment; at most 100 of them. A rendered document in its place
            would lose these.
    """

    name: str
    uuid: str | None
    metadata: Metadata | None
    foreign: tuple[str, ...] = ()


class ReadDocument:
    """A document, parsed once; each part is read when it is first asked for.

    Args:
        xml: The document, in UTF-8; the caller bounds its size.

    Attributes:
        xml: As given.
        root: Its tree, not to be changed.

    Raises:
        DomainXmlError: Not well-formed, or not safe to read; ``line`` says where.
    """

    def __init__(self, xml: bytes) -> None:
        self.xml = xml
        self.root = parse_safely(xml)

    @cached_property
    def metadata(self) -> Metadata | None:
        """Our own element, or None.

        Raises:
            DomainXmlError: It is damaged, or written by a newer version.
        """
        holder = self.root.find("metadata")
        record = None if holder is None else find_record(holder)
        return None if record is None else read_metadata(record)

    @cached_property
    def identity(self) -> Identity:
        """Whose document it is, as ``read_identity`` returns it.

        Raises:
            DomainXmlError: As ``read_identity``.
        """
        reader = AttributeReader()
        name, uuid = read_name(self.root, reader)
        for character in NOT_IN_NAMES:
            refuse_in_name(self.root, name, character, reader)
        for each in reader.broken:
            raise each
        return Identity(name, uuid, self.metadata, tuple(islice(self._foreign(), _MOST_FOREIGN)))

    @cached_property
    def domain(self) -> DomainVcpus:
        """The vCPU side, as ``parse`` returns it.

        Raises:
            DomainXmlError: As ``parse``.
        """
        raw, broken = examine(self.root, at_start=False)
        is_ours = has_mark(self.root)
        for each in broken:
            # QEMU does not report whether the VM has such an IOMMU; its vCPUs are read all the same.
            if not is_ours or each.rule is not DomainRule.EIM_MISSING:
                raise each
        domain = _filled_in(raw, lacks_iommu=bool(broken))
        said = self.metadata
        if said is None:
            return domain
        return replace(domain, previous=said.previous, next_boot=said.next_boot, next_placement=said.next_placement)

    @cached_property
    def placement(self) -> Placement:
        """Where the VM's threads are to run, as ``placement_of`` returns it.

        Raises:
            DomainXmlError: As ``parse`` and ``placement_of``, if anything is said of that.
        """
        # The vCPUs of a record are thousands of rows, which are read only if they must be.
        is_said = any(self.root.find(path) is not None for path in ("cputune/*", "vcpu[@cpuset]"))
        return placement_of(self.domain) if is_said else Placement()

    def _foreign(self) -> Iterator[str]:
        """Return what ``render`` never writes, each once."""
        holder = self.root.find("metadata")
        record = None if holder is None else find_record(holder)
        seen = {}
        for name, has_it in (("cpu model", _has_foreign_model), ("vcpu placement", _is_placed_by_numad)):
            if has_it(self.root):
                seen[name] = True
                yield name
        for name in _foreign(self.root, "domain", record):
            if name not in seen:
                seen[name] = True
                yield name


def parse(xml: bytes) -> DomainVcpus:
    """Return what a domain document says about vCPUs, as libvirt reads it.

    The defaults that libvirt fills in without asking QEMU are filled in: vCPUs that ``<vcpus>`` does not list are
    off; the last of two rows for one vCPU counts; ``current`` counts only without rows; an enabled vCPU is not
    hotpluggable and a disabled one is, unless the document says otherwise; vCPUs of no cell are in cell 0; a cpuset
    under ``placement='auto'`` and a pin of an impossible vCPU are dropped.

    The rows of a record describe the running VM; ``start_of`` returns what it is next started with.

    Args:
        xml: The document, in UTF-8; the caller bounds its size.

    Raises:
        DomainXmlError: Not well-formed, not safe to read, or not a QEMU domain; or our own element in it is damaged,
            or of a newer version; ``line`` says where.
        DomainRuleError: The first rule for which libvirt would refuse the definition. One rule is not applied to
            documents that ``render`` wrote: that more than 255 vCPUs need an ``<iommu>`` (see ``untold``).
    Source:
        libvirt formatdomain; measured with libvirt 9.0.0.

    Example:
        >>> domain = parse(b"<domain type='kvm'><name>a</name><vcpu current='2'>4</vcpu></domain>")
        >>> domain.max, domain.enabled
        (4, VcpuMap('0-1'))
    """
    return ReadDocument(xml).domain


def read_identity(xml: bytes) -> Identity:
    """Return whose document this is, without trusting it.

    Nothing is fetched or included, no entity is expanded, no document type is accepted, and memory is bounded. The
    time is proportional to the size of *xml*.

    Raises:
        DomainXmlError: Not well-formed (torn, empty, not UTF-8), too large, a document type, not a ``<domain>``, no
            name, our own element damaged, or written by a newer version; ``line`` says where.
    """
    return ReadDocument(xml).identity


# libvirt's defaults.


def _filled_in(raw: RawDomain, *, lacks_iommu: bool) -> DomainVcpus:
    root = raw.root
    os_type = root.find("os/type")
    count = raw.count or 1  # without a broken rule it is a number
    cells = tuple(_cells(raw.cpu.cells, count))
    levels = raw.cpu.levels
    options = CpuOptions(root, raw.cpu.model, "x86_64" if os_type is None else os_type.get("arch", "x86_64"))
    emulator = root.find("devices/emulator")
    return DomainVcpus(
        name=raw.name,
        uuid=raw.uuid,
        type="kvm" if root.get("type") == "kvm" else "qemu",
        arch=None if os_type is None else _qemu_name(os_type, "arch"),
        machine=None if os_type is None else _qemu_name(os_type, "machine"),
        emulator=None if emulator is None else text_of(emulator) or None,
        memory_kib=sum(cell.memory_kib for cell in cells) or raw.memory_kib,
        vcpus=tuple(_vcpus(raw, count)),
        individual=bool(raw.rows),
        placement="auto" if raw.placement == "auto" else "static",
        cpuset=raw.cpuset,
        pins=dict(sorted(raw.pins.items())),
        emulator_pin=raw.emulator_pin,
        scheds={vcpu: each.sched for vcpu, each in sorted(raw.scheds.items())},
        emulator_sched=None if raw.emulator_sched is None else raw.emulator_sched.sched,
        topology=None if levels is None else Topology(count, **levels),
        numa=cells,
        cpu=raw.cpu.model,
        cpu_options=tuple(options.words),
        unread=tuple(options.unread),
        untold=tuple(filter(None, (untold_of(root, raw.cpu.model), IOMMU if lacks_iommu else None))),
    )


def _qemu_name(os_type: etree._Element, attribute: str) -> str | None:
    """Return a name that libvirt looks up in QEMU, and refuses if QEMU does not have it."""
    name = os_type.get(attribute)
    if name and not is_word(name):
        told = f"<type {attribute}=...>: {shorten(name, _MOST_QUOTED)} is not a name that QEMU uses"
        raise DomainXmlError(told, line=line_of(os_type))
    return name


def _vcpus(raw: RawDomain, count: int) -> Iterator[DomainVcpu]:
    current = count if raw.current is None else raw.current
    for each in range(count):
        row = (raw.rows or {}).get(each)
        enabled = each < current if not raw.rows else row is not None and row.enabled
        said = None if row is None else row.hotpluggable
        order = None if row is None else row.order or None
        yield DomainVcpu(each, enabled, not enabled if said is None else said, order)


def _cells(cells: tuple[NumaCell, ...], count: int) -> Iterator[NumaCell]:
    named = {each for cell in cells for each in cell.cpus}
    rest = [each for each in range(count) if each not in named]
    for cell in cells:
        yield cell if cell.id or not rest else NumaCell(0, VcpuMap([*cell.cpus, *rest]), cell.memory_kib)


# What render() never writes.


def _has_foreign_model(root: etree._Element) -> bool:
    """Return True if somebody else named the CPU model."""
    cpu = root.find("cpu")
    mode, name = (None, None) if cpu is None else (cpu.get("mode"), cpu.findtext("model"))
    return bool(mode or name) and not is_as_written(root, CpuModel(mode or "custom", name))


def _is_placed_by_numad(root: etree._Element) -> bool:
    vcpu = root.find("vcpu")
    return vcpu is not None and vcpu.get("placement") == "auto"


def _foreign(element: etree._Element, path: str, ours: etree._Element | None) -> Iterator[str]:
    # Not items(): lxml looks for the value of each attribute among all of them.
    names = element.keys()
    if not any(path == known and _has(element, names, attributes) for known, attributes in _NO_PCI):
        if path not in _WRITTEN:
            yield str(element.tag)
            return
        yield from (f"{element.tag!s} {name!s}" for name in names if name not in _WRITTEN[path])
    if next(element.iterchildren(tag=etree.Comment), None) is not None:
        yield "!--"
    for child in element.iterchildren(tag=etree.Element):
        if child is not ours:
            yield from _foreign(child, f"{path}/{child.tag}", ours)


def _has(element: etree._Element, names: Sequence[object], attributes: Mapping[str, object]) -> bool:
    return len(names) == len(attributes) and all(element.get(name) == value for name, value in attributes.items())
