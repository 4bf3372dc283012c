"""The vCPU side of any libvirt ``<domain>``, read as libvirt reads it, with the defaults that it fills in."""

import re
from collections.abc import Iterator, Mapping
from typing import Literal
from uuid import UUID

from lxml import etree

from qmpvcpu.domainxml.domain import CpuModel, DomainVcpu, DomainVcpus, NumaCell, VcpuSched
from qmpvcpu.domainxml.nodes import line_of, parse_safely
from qmpvcpu.errors import DomainXmlError, InvalidMapError, shorten
from qmpvcpu.model import Topology, VcpuMap

__all__ = ["parse"]

_NUMBER = re.compile("[0-9]{1,18}")
# No machine has more, and an id of each must fit a VcpuMap.
_MOST_VCPUS = 16384
_TRUTHS = {"yes": True, "no": False}
# Bytes in each; libvirt compares without regard to case, and takes KiB where nothing is said.
_UNITS = {"b": 1, "byte": 1, "bytes": 1}
for _power, _letter in enumerate("kmgtpe", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse(xml: bytes) -> DomainVcpus:
    """Read what a domain document says about vCPUs, as libvirt reads it.

    What libvirt fills in by itself, without asking QEMU, is filled in: vCPUs that ``<vcpus>`` does not list are off,
    of two rows for one vCPU the last counts, ``current`` counts only where there are no rows, a vCPU that is on is
    not hotpluggable and one that is off is unless it is said, vCPUs of no cell are in cell 0, a cpuset under
    ``placement='auto'`` and a pin of a vCPU that cannot be are dropped.

    Args:
        xml: The document, in UTF-8; the caller bounds its size.

    Raises:
        DomainXmlError: Not well-formed, not safe to read, or no domain of QEMU's; ``line`` says where.
        DomainRuleError: What libvirt would refuse when the document is defined; the first of these.
    Source:
        libvirt formatdomain; measured with libvirt 9.0.0.

    Example:
        >>> domain = parse(b"<domain type='kvm'><name>a</name><vcpu current='2'>4</vcpu></domain>")
        >>> domain.max, domain.enabled
        (4, VcpuMap('0-1'))
    """
    root = parse_safely(xml)
    if root.tag != "domain":
        raise DomainXmlError(f"a <{root.tag}>, not a <domain>", line=line_of(root))
    most = _count(root)
    vcpus = tuple(_vcpus(root, most))
    cells = tuple(_cells(root, most))
    os_type = root.find("os/type")
    vcpu = root.find("vcpu")
    placement = _placement(vcpu)
    emulator_pin = root.find("cputune/emulatorpin")
    return DomainVcpus(
        name=_name(root),
        uuid=_uuid(root),
        type=_type(root),
        arch=None if os_type is None else os_type.get("arch"),
        machine=None if os_type is None else os_type.get("machine"),
        emulator=root.findtext("devices/emulator"),
        memory_kib=_memory(root, cells),
        vcpus=vcpus,
        individual=root.find("vcpus/vcpu") is not None,
        placement=placement,
        cpuset=None if vcpu is None or placement == "auto" else _optional_map(vcpu, "cpuset"),
        pins=_pins(root, most),
        emulator_pin=None if emulator_pin is None else _map(emulator_pin, "cpuset"),
        scheds=_scheds(root),
        topology=_topology(root, most),
        numa=cells,
        cpu=_cpu(root),
    )


def _name(root: etree._Element) -> str:
    name = root.findtext("name")
    if not name:
        raise DomainXmlError("the domain has no name", line=line_of(root))
    return name


def _uuid(root: etree._Element) -> str | None:
    element = root.find("uuid")
    if element is None:
        return None
    try:
        return str(UUID((element.text or "").strip()))
    except ValueError as error:
        raise _wrong(element, None, element.text) from error


def _type(root: etree._Element) -> Literal["kvm", "qemu"]:
    given = root.get("type")
    if given == "kvm":
        return "kvm"
    if given == "qemu":
        return "qemu"
    raise _wrong(root, "type", given)


def _placement(vcpu: etree._Element | None) -> Literal["static", "auto"]:
    given = "static" if vcpu is None else vcpu.get("placement", "static")
    if given == "auto":
        return "auto"
    if given == "static":
        return "static"
    raise _wrong(vcpu, "placement", given)


def _count(root: etree._Element) -> int:
    vcpu = root.find("vcpu")
    count = 1 if vcpu is None else _number(vcpu, None, vcpu.text)
    if not 0 < count <= _MOST_VCPUS:
        raise _wrong(vcpu, None, str(count))
    return count


def _vcpus(root: etree._Element, most: int) -> Iterator[DomainVcpu]:
    rows = {_number(row, "id"): row for row in root.iterfind("vcpus/vcpu")}
    vcpu = root.find("vcpu")
    on = most if vcpu is None or vcpu.get("current") is None else _number(vcpu, "current")
    for each in range(most):
        row = rows.get(each)
        enabled = each < on if not rows else row is not None and _truth(row, "enabled")
        hotpluggable, order = not enabled, None
        if row is not None:
            hotpluggable = _truth(row, "hotpluggable") if row.get("hotpluggable") is not None else not enabled
            order = (_number(row, "order") if row.get("order") is not None else 0) or None
        yield DomainVcpu(each, enabled, hotpluggable, order)


def _cells(root: etree._Element, most: int) -> Iterator[NumaCell]:
    elements = list(root.iterfind("cpu/numa/cell"))
    found = {}
    for place, element in enumerate(elements):
        number = place if element.get("id") is None else _number(element, "id")
        found[number] = NumaCell(
            number, _optional_map(element, "cpus") or VcpuMap(), _kib(element, element.get("memory"))
        )
    named = {each for cell in found.values() for each in cell.cpus}
    for number, cell in sorted(found.items()):
        rest = [each for each in range(most) if each not in named] if number == 0 else []
        yield NumaCell(number, VcpuMap([*cell.cpus, *rest]), cell.memory_kib)


def _memory(root: etree._Element, cells: tuple[NumaCell, ...]) -> int | None:
    memory = root.find("memory")
    if cells:
        return sum(cell.memory_kib for cell in cells)
    return None if memory is None else _kib(memory, memory.text)


def _kib(element: etree._Element, text: str | None) -> int:
    unit = _UNITS.get(element.get("unit", "KiB").lower())
    if unit is None:
        raise _wrong(element, "unit", element.get("unit"))
    return -(-_number(element, None, text) * unit // 1024)


def _pins(root: etree._Element, most: int) -> Mapping[int, VcpuMap]:
    pins = {_number(pin, "vcpu"): _map(pin, "cpuset") for pin in root.iterfind("cputune/vcpupin")}
    return {vcpu: pin for vcpu, pin in sorted(pins.items()) if vcpu < most}


def _scheds(root: etree._Element) -> tuple[VcpuSched, ...]:
    found: dict[tuple[str, int | None], set[int]] = {}
    for element in root.iterfind("cputune/vcpusched"):
        priority = None if element.get("priority") is None else _number(element, "priority")
        found.setdefault((element.get("scheduler", ""), priority), set()).update(_map(element, "vcpus"))
    scheds = (VcpuSched(VcpuMap(vcpus), scheduler, priority) for (scheduler, priority), vcpus in found.items())
    return tuple(sorted(scheds, key=lambda each: next(iter(each.vcpus))))


def _topology(root: etree._Element, most: int) -> Topology | None:
    element = root.find("cpu/topology")
    if element is None:
        return None
    levels = {
        level: _number(element, level) if level in element.attrib else 1
        for level in ("sockets", "dies", "clusters", "cores", "threads")
    }
    return Topology(most, **levels)


def _cpu(root: etree._Element) -> CpuModel | None:
    cpu = root.find("cpu")
    if cpu is None:
        return None
    model = cpu.findtext("model")
    features = {feature.get("name", ""): feature.get("policy", "require") for feature in cpu.iterfind("feature")}
    if cpu.get("mode") is None and model is None and not features:
        return None
    return CpuModel(cpu.get("mode", "custom"), model, features, cpu.get("migratable"))


def _optional_map(element: etree._Element, attribute: str) -> VcpuMap | None:
    return None if element.get(attribute) is None else _map(element, attribute)


def _map(element: etree._Element, attribute: str) -> VcpuMap:
    text = element.get(attribute)
    if text is None:
        raise _wrong(element, attribute, None)
    try:
        return VcpuMap.parse(text)
    except InvalidMapError as error:
        raise _wrong(element, attribute, text) from error


def _truth(element: etree._Element, attribute: str) -> bool:
    text = element.get(attribute)
    if text not in _TRUTHS:
        raise _wrong(element, attribute, text)
    return _TRUTHS[text]


def _number(element: etree._Element, attribute: str | None, text: str | None = None) -> int:
    given = (text if attribute is None else element.get(attribute)) or ""
    if not _NUMBER.fullmatch(given.strip()):
        raise _wrong(element, attribute, given)
    return int(given)


def _wrong(element: etree._Element | None, attribute: str | None, value: str | None) -> DomainXmlError:
    where = "" if element is None else f"<{element.tag}>"
    what = f" {attribute}" if attribute else ""
    line = None if element is None else line_of(element)
    return DomainXmlError(f"{where}{what}: {shorten(value)} is not what libvirt takes here", line=line)
