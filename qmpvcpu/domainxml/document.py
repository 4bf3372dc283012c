"""What a domain document says about vCPUs as written, before libvirt fills in its defaults.

It is read in libvirt's order, so that the first broken rule is the one that libvirt reports.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from lxml import etree

from qmpvcpu.domainxml.attributes import AttributeReader, signed, unsigned
from qmpvcpu.domainxml.cpu import RawCpu, read_cpu
from qmpvcpu.domainxml.domain import VcpuSched
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.domainxml.safe_xml import line_of, text_of
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.vcpumap import MOST_VCPUS, VcpuMap

# libvirt accepts a dash before any byte.
_UUID = re.compile(r"\s*(-*[0-9a-fA-F]{2}){16}\s*", re.ASCII)
_UINT_MAX = 2**32 - 1
_PLACEMENTS = ("static", "auto")
_SCHEDULERS = ("batch", "idle", "fifo", "rr")
_WITH_PRIORITY = ("fifo", "rr")

_TUNES = (
    "shares",
    *("period", "quota"),
    *("global_period", "global_quota"),
    *("emulator_period", "emulator_quota"),
    *("iothread_period", "iothread_quota"),
)


class RawVcpu(NamedTuple):
    """One possible vCPU and the element that describes it: hotpluggable may be unsaid, and an order of 0 is none."""

    element: etree._Element
    enabled: bool
    hotpluggable: bool | None
    order: int


class RawTune(NamedTuple):
    """One number of ``<cputune>``."""

    element: etree._Element
    text: str
    number: int


@dataclass(frozen=True, slots=True)
class RawDomain:
    """What the document says, without the values that libvirt would refuse.

    Attributes:
        root: The document.
        memory_kib: What ``<memory>`` says.
        vcpu: The element with the number of vCPUs.
        count: That number; None where it cannot be read.
        current: How many of them are on, where the document says so.
        placement: ``static`` or ``auto``.
        cpuset: That of ``<vcpu>``.
        rows: ``<vcpus>``, the last row of each id; None where a row cannot be read.
        pins: ``<vcpupin>``, by vCPU id.
        emulator_pin: ``<emulatorpin>``.
        scheds: ``<vcpusched>``, as written.
        tunes: The numbers of ``<cputune>``, by their names.
        cpu: ``<cpu>``.
    """

    root: etree._Element
    memory_kib: int | None
    vcpu: etree._Element | None
    count: int | None
    current: int | None
    placement: str
    cpuset: VcpuMap | None
    rows: Mapping[int, RawVcpu] | None
    pins: Mapping[int, VcpuMap]
    emulator_pin: VcpuMap | None
    scheds: tuple[VcpuSched, ...]
    tunes: Mapping[str, RawTune]
    cpu: RawCpu


def name_of(root: etree._Element) -> str:
    """Return the domain's name; empty where it has none."""
    name = root.find("name")
    return "" if name is None else text_of(name)


def uuid_of(root: etree._Element) -> str | None:
    """Return the domain's uuid as lower-case text with dashes; None where there is none, or an empty one.

    Raises:
        ValueError: libvirt would not accept it as a uuid.
    """
    element = root.find("uuid")
    text = "" if element is None else text_of(element)
    if not text:
        return None
    if not _UUID.fullmatch(text):
        raise ValueError("not a uuid: badly formed hexadecimal UUID string")
    return str(UUID(text.strip().replace("-", "")))


def read_domain(root: etree._Element, reader: AttributeReader) -> RawDomain:
    """Read the document; *reader* collects what libvirt would refuse.

    Raises:
        DomainXmlError: Not a ``<domain>``, or too much of one.
    """
    if root.tag != "domain":
        raise DomainXmlError(f"a <{root.tag}>, not a <domain>", line=line_of(root))
    memory = root.find("memory")
    memory_kib = None if memory is None else reader.kib(memory)
    vcpu = root.find("vcpu")
    count = 1 if vcpu is None else _count(vcpu, reader)
    current = cpuset = None
    placement = "static"
    if vcpu is not None:
        current = reader.number(vcpu, "current")
        placement = reader.choice(vcpu, "placement", _PLACEMENTS) or "static"
        # Under "auto" libvirt does not read it.
        cpuset = None if placement == "auto" else reader.cpuset(vcpu, "cpuset")
    rows = _rows(root, count, reader)
    if vcpu is not None and rows == {} and count is not None and current is not None and current > count:
        says = "maximum vCPU count must not be less than current vCPU count"
        reader.refuse(DomainRule.CURRENT_ABOVE_MAX, vcpu, "current", says, detail=f"{current} of {count}")
    return RawDomain(
        root=root,
        memory_kib=memory_kib or None,
        vcpu=vcpu,
        count=count,
        current=current,
        placement=placement,
        cpuset=cpuset,
        rows=rows,
        tunes=_tunes(root, reader),
        pins=_pins(root, count, reader),
        emulator_pin=_emulator_pin(root, reader),
        scheds=tuple(_scheds(root, count, reader)),
        cpu=read_cpu(root, count, reader),
    )


def _count(vcpu: etree._Element, reader: AttributeReader) -> int | None:
    text = text_of(vcpu)
    found = signed(text)
    if found is None or abs(found) > _UINT_MAX:
        rule, says = DomainRule.COUNT_NOT_A_NUMBER, "maximum vcpus count must be an integer"
    elif found < 0:
        rule, says = DomainRule.COUNT_NEGATIVE, f"takes it for {2**32 + found}; libvirtd 9.0.0 aborts"
    elif found == 0:
        # It has no message for zero, and fails later.
        rule, says = DomainRule.COUNT_ZERO, "CPU IDs in <numa> exceed the <vcpu> count"
    elif found > MOST_VCPUS:
        rule, says = DomainRule.COUNT_TOO_HIGH, "Maximum CPUs greater than specified machine type limit"
    else:
        return found
    reader.refuse(rule, vcpu, None, says, value=text)
    return None


def _rows(root: etree._Element, count: int | None, reader: AttributeReader) -> Mapping[int, RawVcpu] | None:
    rows: dict[int, RawVcpu] = {}
    readable = True
    for element in root.iterfind("vcpus/vcpu"):
        before = reader.count
        number = reader.number(element, "id") if reader.required(element, "id") else None
        if number is not None and count is not None and number >= count:
            says = f"vcpu id '{number}' is out of range of maximum vcpu count"
            reader.refuse(DomainRule.ID_ABOVE_MAX, element, "id", says, detail=f"<vcpu> says {count}")
            continue
        enabled = reader.truth(element, "enabled") if reader.required(element, "enabled") else None
        hotpluggable = reader.truth(element, "hotpluggable")
        order = reader.number(element, "order")
        if reader.count > before or number is None or enabled is None:
            readable = False
            continue
        rows[number] = RawVcpu(element, enabled, hotpluggable, order or 0)
    return rows if readable else None


def _tunes(root: etree._Element, reader: AttributeReader) -> Mapping[str, RawTune]:
    found = {}
    for name in _TUNES:
        element = root.find(f"cputune/{name}")
        text = "" if element is None else text_of(element)
        if element is None or not text:
            continue
        is_quota = name.endswith("quota")
        number = signed(text) if is_quota else unsigned(text)
        if number is None or abs(number) >= (2**63 if is_quota else 2**64):
            says = f"can't parse cputune {name.replace('_', ' ')} value"
            reader.refuse(DomainRule.TUNE_NOT_A_NUMBER, element, None, says, value=text)
        else:
            found[name] = RawTune(element, text, number)
    return found


def _pins(root: etree._Element, count: int | None, reader: AttributeReader) -> Mapping[int, VcpuMap]:
    pins: dict[int, VcpuMap] = {}
    seen = set()
    for element in root.iterfind("cputune/vcpupin"):
        number = reader.number(element, "vcpu") if reader.required(element, "vcpu") else None
        if number is None or count is None or number >= count:
            continue  # libvirt drops the pin of an impossible vCPU unread
        if "cpuset" in element.attrib:
            if number in seen:
                reader.refuse(DomainRule.PIN_TWICE, element, "vcpu", f"duplicate vcpupin for vcpu '{number}'")
                continue
            seen.add(number)
        if (cpuset := _pinned_to(element, "vcpupin", reader)) is not None:
            pins[number] = cpuset
    return pins


def _emulator_pin(root: etree._Element, reader: AttributeReader) -> VcpuMap | None:
    elements = root.findall("cputune/emulatorpin")
    if len(elements) > 1:
        reader.refuse(DomainRule.EMULATORPIN_TWICE, elements[1], None, "only one emulatorpin is supported")
    return _pinned_to(elements[0], "emulatorpin", reader) if elements else None


def _pinned_to(element: etree._Element, tag: str, reader: AttributeReader) -> VcpuMap | None:
    if "cpuset" not in element.attrib:
        reader.refuse(DomainRule.PIN_WITHOUT_CPUSET, element, "cpuset", f"missing cpuset for {tag}")
    return reader.cpuset(element, "cpuset")


def _scheds(root: etree._Element, count: int | None, reader: AttributeReader) -> list[VcpuSched]:
    found = []
    taken: set[int] = set()
    for element in root.iterfind("cputune/vcpusched"):
        text = element.get("vcpus")
        if text is None:
            says = "Missing attribute 'vcpus' in element 'vcpusched'"
            reader.refuse(DomainRule.ATTRIBUTE_MISSING, element, "vcpus", says)
        vcpus = reader.cpuset(element, "vcpus", says_empty=f"'vcpus' scheduler bitmap '{text}' is empty")
        reader.required(element, "scheduler")
        scheduler = reader.choice(element, "scheduler", _SCHEDULERS)
        priority = None
        if scheduler in _WITH_PRIORITY and reader.required(element, "priority"):
            priority = reader.integer(element, "priority")
        if vcpus is None or count is None:
            continue
        reader.count_named(element, vcpus)
        if not taken.isdisjoint(vcpus):
            says = "'vcpusched' attributes 'vcpus' must not overlap"
            detail = f"vCPU {next(each for each in vcpus if each in taken)}"
            reader.refuse(DomainRule.SCHED_TWICE, element, "vcpus", says, detail=detail)
        beyond = next((each for each in vcpus if each >= count), None)
        if beyond is not None:
            says = f"vCPU '{beyond}' is not present in domain definition"
            reader.refuse(DomainRule.SCHED_ABOVE_MAX, element, "vcpus", says, detail=f"<vcpu> says {count}")
        taken.update(vcpus)
        if scheduler is not None:
            found.append(VcpuSched(vcpus, scheduler, priority))
    return found
