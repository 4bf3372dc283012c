"""What stands in a domain document about vCPUs, before libvirt fills anything in.

Read in the order in which libvirt reads it, so that of several rules that are broken the first is libvirt's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lxml import etree

from qmpvcpu.domainxml.attributes import Fields, signed, unsigned
from qmpvcpu.domainxml.cpu import Cpu, read_cpu
from qmpvcpu.domainxml.domain import VcpuSched
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.domainxml.safe_xml import line_of, text_of
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.vcpumap import VcpuMap

_UINT_MAX = 2**32 - 1
# No machine has more, and the id of each must fit a VcpuMap.
_MOST_VCPUS = 16384
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


@dataclass(frozen=True, slots=True)
class Row:
    """One possible vCPU, and the element that speaks of it: hotpluggable may be unsaid, and an order of 0 is none."""

    element: etree._Element
    enabled: bool
    hotpluggable: bool | None
    order: int


@dataclass(frozen=True, slots=True)
class Tune:
    """One number of ``<cputune>``."""

    element: etree._Element
    text: str
    number: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What stands there; what libvirt would refuse is left out.

    Attributes:
        root: The document.
        memory_kib: What ``<memory>`` says.
        vcpu: The element with the number of vCPUs.
        count: That number; None where there is no telling.
        current: How many of them are on, where that is said.
        placement: ``static`` or ``auto``.
        cpuset: That of ``<vcpu>``.
        rows: ``<vcpus>``, the last one of each id; None where one cannot be read.
        pins: ``<vcpupin>``, by vCPU id.
        emulator_pin: ``<emulatorpin>``.
        scheds: ``<vcpusched>``, as they stand there.
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
    rows: Mapping[int, Row] | None
    pins: Mapping[int, VcpuMap]
    emulator_pin: VcpuMap | None
    scheds: tuple[VcpuSched, ...]
    tunes: Mapping[str, Tune]
    cpu: Cpu


def read_contents(root: etree._Element, fields: Fields) -> Contents:
    """Read what is there, and let *fields* collect what libvirt would refuse to read.

    Raises:
        DomainXmlError: Not a ``<domain>``, or too much of one.
    """
    if root.tag != "domain":
        raise DomainXmlError(f"a <{root.tag}>, not a <domain>", line=line_of(root))
    memory = root.find("memory")
    memory_kib = None if memory is None else fields.kib(memory)
    vcpu = root.find("vcpu")
    count = 1 if vcpu is None else _count(vcpu, fields)
    current = cpuset = None
    placement = "static"
    if vcpu is not None:
        current = fields.number(vcpu, "current")
        placement = fields.choice(vcpu, "placement", _PLACEMENTS) or "static"
        # Under "auto" libvirt does not even look at it.
        cpuset = None if placement == "auto" else fields.cpuset(vcpu, "cpuset")
    rows = _rows(root, count, fields)
    if vcpu is not None and rows == {} and count is not None and current is not None and current > count:
        says = "maximum vCPU count must not be less than current vCPU count"
        detail = f"{current} of {count}"
        fields.refuse(DomainRule.CURRENT_ABOVE_MAX, vcpu, "current", says=says, detail=detail)
    return Contents(
        root=root,
        memory_kib=memory_kib or None,
        vcpu=vcpu,
        count=count,
        current=current,
        placement=placement,
        cpuset=cpuset,
        rows=rows,
        tunes=_tunes(root, fields),
        pins=_pins(root, count, fields),
        emulator_pin=_emulator_pin(root, fields),
        scheds=tuple(_scheds(root, count, fields)),
        cpu=read_cpu(root, count, fields),
    )


def _count(vcpu: etree._Element, fields: Fields) -> int | None:
    text = text_of(vcpu)
    found = signed(text)
    if found is None or abs(found) > _UINT_MAX:
        rule, says = DomainRule.COUNT_NOT_A_NUMBER, "maximum vcpus count must be an integer"
    elif found < 0:
        rule, says = DomainRule.COUNT_NEGATIVE, f"takes it for {2**32 + found}; libvirtd 9.0.0 aborts"
    elif found == 0:
        # It has no words for it, and stumbles later.
        rule, says = DomainRule.COUNT_ZERO, "CPU IDs in <numa> exceed the <vcpu> count"
    elif found > _MOST_VCPUS:
        rule, says = DomainRule.COUNT_TOO_HIGH, "Maximum CPUs greater than specified machine type limit"
    else:
        return found
    fields.refuse(rule, vcpu, value=text, says=says)
    return None


def _rows(root: etree._Element, count: int | None, fields: Fields) -> Mapping[int, Row] | None:
    rows: dict[int, Row] = {}
    readable = True
    for element in root.iterfind("vcpus/vcpu"):
        before = fields.count
        number = fields.number(element, "id") if fields.required(element, "id") else None
        if number is not None and count is not None and number >= count:
            says = f"vcpu id '{number}' is out of range of maximum vcpu count"
            fields.refuse(DomainRule.ID_ABOVE_MAX, element, "id", says=says, detail=f"<vcpu> says {count}")
            continue
        enabled = fields.truth(element, "enabled") if fields.required(element, "enabled") else None
        hotpluggable = fields.truth(element, "hotpluggable")
        order = fields.number(element, "order")
        if fields.count > before or number is None or enabled is None:
            readable = False
            continue
        rows[number] = Row(element, enabled, hotpluggable, order or 0)
    return rows if readable else None


def _tunes(root: etree._Element, fields: Fields) -> Mapping[str, Tune]:
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
            fields.refuse(DomainRule.TUNE_NOT_A_NUMBER, element, value=text, says=says)
        else:
            found[name] = Tune(element, text, number)
    return found


def _pins(root: etree._Element, count: int | None, fields: Fields) -> Mapping[int, VcpuMap]:
    pins: dict[int, VcpuMap] = {}
    seen = set()
    for element in root.iterfind("cputune/vcpupin"):
        number = fields.number(element, "vcpu") if fields.required(element, "vcpu") else None
        if number is None or count is None or number >= count:
            continue  # of a vCPU that cannot be, libvirt drops it unread
        if "cpuset" not in element.attrib:
            says = "missing cpuset for vcpupin"
            fields.refuse(DomainRule.PIN_WITHOUT_CPUSET, element, "cpuset", says=says)
        elif number in seen:
            says = f"duplicate vcpupin for vcpu '{number}'"
            fields.refuse(DomainRule.PIN_TWICE, element, "vcpu", says=says)
        else:
            seen.add(number)
            cpuset = fields.cpuset(element, "cpuset")
            if cpuset is not None:
                pins[number] = cpuset
    return pins


def _emulator_pin(root: etree._Element, fields: Fields) -> VcpuMap | None:
    elements = root.findall("cputune/emulatorpin")
    if len(elements) > 1:
        says = "only one emulatorpin is supported"
        fields.refuse(DomainRule.EMULATORPIN_TWICE, elements[1], says=says)
    if not elements:
        return None
    if "cpuset" not in elements[0].attrib:
        says = "missing cpuset for emulatorpin"
        fields.refuse(DomainRule.PIN_WITHOUT_CPUSET, elements[0], "cpuset", says=says)
    return fields.cpuset(elements[0], "cpuset")


def _scheds(root: etree._Element, count: int | None, fields: Fields) -> list[VcpuSched]:
    found = []
    taken: set[int] = set()
    for element in root.iterfind("cputune/vcpusched"):
        text = element.get("vcpus")
        if text is None:
            says = "Missing attribute 'vcpus' in element 'vcpusched'"
            fields.refuse(DomainRule.ATTRIBUTE_MISSING, element, "vcpus", says=says)
        vcpus = fields.cpuset(element, "vcpus", says_empty=f"'vcpus' scheduler bitmap '{text}' is empty")
        fields.required(element, "scheduler")
        scheduler = fields.choice(element, "scheduler", _SCHEDULERS)
        priority = None
        if scheduler in _WITH_PRIORITY and fields.required(element, "priority"):
            priority = fields.integer(element, "priority")
        if vcpus is None or count is None:
            continue
        fields.count_named(element, vcpus)
        if not taken.isdisjoint(vcpus):
            says = "'vcpusched' attributes 'vcpus' must not overlap"
            detail = f"vCPU {next(each for each in vcpus if each in taken)}"
            fields.refuse(DomainRule.SCHED_TWICE, element, "vcpus", says=says, detail=detail)
        beyond = next((each for each in vcpus if each >= count), None)
        if beyond is not None:
            says = f"vCPU '{beyond}' is not present in domain definition"
            fields.refuse(DomainRule.SCHED_ABOVE_MAX, element, "vcpus", says=says, detail=f"<vcpu> says {count}")
        taken.update(vcpus)
        if scheduler is not None:
            found.append(VcpuSched(vcpus, scheduler, priority))
    return found
