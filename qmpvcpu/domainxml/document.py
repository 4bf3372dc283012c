"""What a domain document says about vCPUs as written, before libvirt fills in its defaults.

It is read in libvirt's order, so that the first broken rule is the one that libvirt reports.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from lxml import etree

from qmpvcpu.domainxml.attributes import UINT_MAX, AttributeReader, signed, unsigned
from qmpvcpu.domainxml.cpu_reader import RawCpu, read_cpu
from qmpvcpu.domainxml.domain import ThreadSched
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.domainxml.safe_xml import line_of, text_of
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.vcpumap import MOST_VCPUS, VcpuMap

# libvirt accepts a dash before any byte.
_UUID = re.compile(r"\s*(-*[0-9a-fA-F]{2}){16}\s*", re.ASCII)
_TYPES = frozenset({"kvm", "qemu"})
_OTHER_TYPES = frozenset(
    "none kqemu xen lxc uml openvz test vmware hyperv vbox phyp parallels bhyve vz hvf".split()  # noqa: SIM905 - legible
)
NOT_IN_NAMES = {"/": "name {name} cannot contain '/'", "\n": "invalid char in name:"}
"""The characters that a name cannot have, and what libvirt says."""

_PLACEMENTS = ("static", "auto")
_MEMORY_MODES = ("strict", "preferred", "interleave", "restrictive")
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


class RawSched(NamedTuple):
    """How a thread is scheduled, and the element that says so."""

    element: etree._Element
    sched: ThreadSched


@dataclass(frozen=True, slots=True)
class RawDomain:
    """What the document says, without the values that libvirt would refuse.

    Attributes:
        root: The document.
        name: What ``<name>`` says; empty where there is none.
        uuid: Lower-case text with dashes, or None.
        memory_kib: What ``<memory>`` says.
        vcpu: The element with the number of vCPUs.
        count: That number; None where it cannot be read.
        current: How many of them are on, where the document says so.
        placement: ``static`` or ``auto``, as libvirt derives it.
        cpuset: That of ``<vcpu>``.
        rows: ``<vcpus>``, the last row of each id; None where a row cannot be read.
        pins: ``<vcpupin>``, by vCPU id.
        emulator_pin: ``<emulatorpin>``.
        scheds: ``<vcpusched>``, by vCPU id.
        emulator_sched: ``<emulatorsched>``.
        group: The first ``<cachetune>`` or ``<memorytune>`` that counts, or None.
        tunes: The numbers of ``<cputune>``, by their names.
        cpu: ``<cpu>``.
    """

    root: etree._Element
    name: str
    uuid: str | None
    memory_kib: int | None
    vcpu: etree._Element | None
    count: int | None
    current: int | None
    placement: str
    cpuset: VcpuMap | None
    rows: Mapping[int, RawVcpu] | None
    pins: Mapping[int, VcpuMap]
    emulator_pin: VcpuMap | None
    scheds: Mapping[int, RawSched]
    emulator_sched: RawSched | None
    group: etree._Element | None
    tunes: Mapping[str, RawTune]
    cpu: RawCpu


def read_name(root: etree._Element, reader: AttributeReader) -> tuple[str, str | None]:
    """Return the domain's name (empty: none), and its uuid as lower-case text with dashes, or None (also if empty).

    Raises:
        DomainXmlError: Not a ``<domain>``.
    """
    if root.tag != "domain":
        tag = etree.QName(root)
        space = f" of the namespace {tag.namespace}" if tag.namespace else ""
        raise DomainXmlError(f"a <{tag.localname}>{space}, not a <domain>", line=line_of(root))
    element = root.find("name")
    name = "" if element is None else text_of(element)
    if not name:
        holder = root if element is None else element
        reader.refuse(DomainRule.NAME, holder, None, "missing name information")
    element = root.find("uuid")
    text = "" if element is None else text_of(element)
    if element is None or not text:
        return name, None
    if not _UUID.fullmatch(text):
        reader.refuse(DomainRule.UUID, element, None, "malformed uuid element", value=text)
        return name, None
    return name, str(UUID(text.strip().replace("-", "")))


def refuse_in_name(root: etree._Element, name: str, character: str, reader: AttributeReader) -> None:
    """Refuse a *name* with one of the characters of ``NOT_IN_NAMES``; libvirt looks for each at another time."""
    element = root.find("name")
    if character in name and element is not None:
        says = NOT_IN_NAMES[character].format(name=name)
        reader.refuse(DomainRule.NAME_UNUSABLE, element, None, says, value=name)


def read_domain(root: etree._Element, reader: AttributeReader) -> RawDomain:
    """Read the document; *reader* collects what libvirt would refuse.

    Raises:
        DomainXmlError: Not a ``<domain>``, or too much of one.
    """
    if root.tag == "domain":
        _check_type(root, reader)
    name, uuid = read_name(root, reader)
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
    tunes = _tunes(root, reader)
    pins = _pins(root, count, reader)
    emulator_pin = _emulator_pin(root, reader)
    scheds = _scheds(root, count, reader)
    emulator_sched = _emulator_sched(root, reader)
    group = _resource_groups(root, count, reader)
    cpu = read_cpu(root, count, reader)
    has_auto_memory = _numatune(root, placement, {cell.id for cell in cpu.cells}, reader)
    is_pinned = pins or emulator_pin or root.find("cputune/iothreadpin") is not None
    return RawDomain(
        root=root,
        name=name,
        uuid=uuid,
        memory_kib=memory_kib or None,
        vcpu=vcpu,
        count=count,
        current=current,
        # libvirt has the placement of the memory decide, over what <vcpu> says, where nothing is pinned.
        placement="auto" if has_auto_memory and cpuset is None and not is_pinned else placement,
        cpuset=cpuset,
        rows=rows,
        tunes=tunes,
        pins=pins,
        emulator_pin=emulator_pin,
        scheds=scheds,
        emulator_sched=emulator_sched,
        group=group,
        cpu=cpu,
    )


def _check_type(root: etree._Element, reader: AttributeReader) -> None:
    given = root.get("type")
    if given not in _TYPES:
        says = "missing domain type attribute" if given is None else f"invalid domain type {given}"
        if given in _OTHER_TYPES:
            says = f"does not support virt type '{given}'"
        reader.refuse(DomainRule.TYPE, root, "type", says)


def _count(vcpu: etree._Element, reader: AttributeReader) -> int | None:
    text = text_of(vcpu)
    found = signed(text)
    if found is None or abs(found) > UINT_MAX:
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


def _scheds(root: etree._Element, count: int | None, reader: AttributeReader) -> Mapping[int, RawSched]:
    found: dict[int, RawSched] = {}
    taken: set[int] = set()
    for element in root.iterfind("cputune/vcpusched"):
        text = element.get("vcpus")
        if text is None:
            says = "Missing attribute 'vcpus' in element 'vcpusched'"
            reader.refuse(DomainRule.ATTRIBUTE_MISSING, element, "vcpus", says)
        vcpus = reader.cpuset(element, "vcpus", says_empty=f"'vcpus' scheduler bitmap '{text}' is empty")
        sched = _sched(element, reader)
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
        if sched is not None:
            found |= dict.fromkeys(vcpus, sched)
    return found


def _emulator_sched(root: etree._Element, reader: AttributeReader) -> RawSched | None:
    elements = root.findall("cputune/emulatorsched")
    if len(elements) > 1:
        reader.refuse(DomainRule.EMULATORSCHED_TWICE, elements[1], None, "only one emulatorsched is supported")
    return _sched(elements[0], reader) if elements else None


def _sched(element: etree._Element, reader: AttributeReader) -> RawSched | None:
    reader.required(element, "scheduler")
    scheduler = reader.choice(element, "scheduler", _SCHEDULERS)
    priority = None
    if scheduler in _WITH_PRIORITY and reader.required(element, "priority"):
        priority = reader.integer(element, "priority")
    return None if scheduler is None else RawSched(element, ThreadSched(scheduler, priority))


def _resource_groups(root: etree._Element, count: int | None, reader: AttributeReader) -> etree._Element | None:
    """Check which vCPUs share a cache or the bandwidth of the memory, and return the first such group.

    Source: libvirt src/conf/domain_conf.c, virDomainResctrlVcpuMatch: a group without content is none.
    """
    first = None
    taken = VcpuMap()
    known: set[int] = set()  # the groups, as numbers: thousands of large ones are compared
    for tag, content in (("cachetune", "cache"), ("memorytune", "node")):
        of_this_kind: set[int] = set()
        for element in root.iterfind(f"cputune/{tag}"):
            text = element.get("vcpus")
            if text is None:
                reader.refuse(DomainRule.ATTRIBUTE_MISSING, element, "vcpus", f"Missing {tag} attribute 'vcpus'")
            says = f"Invalid {tag} attribute 'vcpus' value '{text}'"
            named = reader.cpuset(element, "vcpus", may_be_empty=True, says=says) or VcpuMap()
            reader.count_named(element, named)
            vcpus = VcpuMap(each for each in named if count is None or each < count)
            if not vcpus:
                continue
            group = vcpus.to_int()
            if vcpus & taken and group not in known:
                reader.refuse(DomainRule.GROUPS_OVERLAP, element, "vcpus", "Overlapping vcpus in resctrls")
            elif tag == "cachetune" and group in of_this_kind:
                reader.refuse(DomainRule.GROUPS_OVERLAP, element, "vcpus", "Identical vcpus in cachetunes found")
            if element.find(content) is not None or element.find("monitor") is not None:
                of_this_kind.add(group)
                known.add(group)
                taken |= vcpus
                first = element if first is None else first
    return first


def _numatune(root: etree._Element, placement: str, cells: Collection[int], reader: AttributeReader) -> bool:
    """Check where the memory of the cells comes from; return True if libvirt has its placement decide."""
    tunes = root.findall("numatune")
    if len(tunes) > 1:
        reader.refuse(DomainRule.NUMATUNE_TWICE, tunes[1], None, "only one numatune is supported")
    memory = root.find("numatune/memory")
    says_nothing = memory is not None and not {"mode", "placement", "nodeset"} & set(memory.keys())
    is_auto = placement == "auto" and memory is None
    is_restrictive = False
    if memory is not None and not says_nothing:
        mode = _tuning(memory, "mode", _MEMORY_MODES, "tuning", reader)
        said = _tuning(memory, "placement", _PLACEMENTS, "placement", reader)
        reader.cpuset(memory, "nodeset")
        is_restrictive = mode == "restrictive"
        is_auto = (said or ("auto" if placement == "auto" and "nodeset" not in memory.attrib else "static")) == "auto"
        if not is_auto and "nodeset" not in memory.attrib:
            says = "nodeset for NUMA memory tuning must be set if 'placement' is 'static'"
            reader.refuse(DomainRule.NODESET_MISSING, memory, "nodeset", says)
    seen: set[int] = set()
    for element in root.iterfind("numatune/memnode"):
        if is_auto:
            says = "Per-node binding is not compatible with automatic NUMA placement."
            reader.refuse(DomainRule.MEMNODE_AUTO, element, None, says)
        elif not cells:
            says = "Element 'memnode' is invalid without any guest NUMA cells"
            reader.refuse(DomainRule.MEMNODE_WITHOUT_CELL, element, None, says)
        else:
            _memnode(element, cells, seen, reader, is_restrictive=is_restrictive)
    return is_auto


def _tuning(
    memory: etree._Element, attribute: str, choices: Collection[str], what: str, reader: AttributeReader
) -> str | None:
    says = f"Unsupported NUMA memory {what} mode '{memory.get(attribute)}'"
    return reader.choice(memory, attribute, choices, says=says)


def _memnode(
    element: etree._Element, cells: Collection[int], seen: set[int], reader: AttributeReader, *, is_restrictive: bool
) -> None:
    cell = reader.number(element, "cellid") if reader.required(element, "cellid") else None
    if cell is not None and cell not in cells:
        says = "Argument 'cellid' in memnode element must correspond to existing guest's NUMA cell"
        reader.refuse(DomainRule.MEMNODE_WITHOUT_CELL, element, "cellid", says)
    elif cell in seen:
        reader.refuse(DomainRule.MEMNODE_TWICE, element, "cellid", f"Multiple memnode elements with cellid {cell}")
    if cell is not None:
        seen.add(cell)
    mode = reader.choice(element, "mode", _MEMORY_MODES) or "strict"
    if is_restrictive and mode != "restrictive":
        says = "'restrictive' mode is required in memnode element when mode is 'restrictive' in memory element"
        reader.refuse(DomainRule.MEMNODE_RESTRICTIVE, element, "mode", says)
    if "nodeset" not in element.attrib:
        says = "Missing required nodeset attribute in memnode element"
        reader.refuse(DomainRule.NODESET_MISSING, element, "nodeset", says)
    reader.cpuset(element, "nodeset")
