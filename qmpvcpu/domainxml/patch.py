"""Changes to the vCPU side of a document; everything else stays as it was, byte for byte."""

import re
from bisect import bisect
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Final

from qmpvcpu.domainxml.attributes import AttributeReader, unsigned
from qmpvcpu.domainxml.byte_editor import Editor
from qmpvcpu.domainxml.domain import LEVELS, DomainVcpu, DomainVcpus, needs_rows
from qmpvcpu.domainxml.reader import ReadDocument
from qmpvcpu.domainxml.record_element import Metadata, find_record, record_node
from qmpvcpu.domainxml.rules import broken_states
from qmpvcpu.domainxml.safe_xml import text_of
from qmpvcpu.domainxml.writer import Node, cputune_nodes, sched_attributes, topology_node, vcpu_row
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology

if TYPE_CHECKING:
    from lxml import etree

# In libvirt's order.
_DOMAIN: Final = (
    *("name", "uuid", "genid", "hwuuid", "title", "description", "metadata", "maxMemory", "memory", "currentMemory"),
    *("blkiotune", "memtune", "memoryBacking", "vcpu", "vcpus", "iothreads", "iothreadids", "defaultiothread"),
    *("cputune", "numatune", "resource", "sysinfo", "bootloader", "bootloader_args", "os", "idmap", "features"),
    "cpu",
)
_CPUTUNE: Final = (
    *("shares", "period", "quota", "global_period", "global_quota", "emulator_period", "emulator_quota"),
    *("iothread_period", "iothread_quota", "vcpupin", "emulatorpin", "iothreadpin", "emulatorsched", "vcpusched"),
)
_BEFORE_TOPOLOGY: Final = ("arch", "model", "vendor")
_VCPU: Final = ("placement", "cpuset", "current")
_ROW: Final = ("id", "enabled", "hotpluggable", "order")
_CELL: Final = ("id", "cpus")
_ATTRIBUTE: Final = re.compile(r" (\w+)='(\w+)'")
# libvirt sorts these by their vCPUs.
_OF_VCPUS: Final = {"vcpupin": "vcpu", "vcpusched": "vcpus"}


def update(base: bytes, domain: DomainVcpus, *, metadata: Metadata | None = None) -> bytes:
    """Return a document with *domain*'s vCPU side that is otherwise *base*, byte for byte.

    Only elements that must change do: ``<vcpu>``, rows of ``<vcpus>``, ``<vcpupin>``, ``<emulatorpin>``,
    ``<emulatorsched>``, ``<vcpusched>``, ``<topology>``, the ``cpus`` of a ``<cell>``, and our own element; in
    them, only the attributes that must. Equivalent spellings are left unchanged: ``current`` next to rows, orders
    with gaps, no rows where none are needed, one ``<vcpusched>`` for several vCPUs. Once a state changes, every order
    is written as *domain* has it. New elements are written as and where libvirt writes them. Idempotent.

    The name, uuid, type, machine, emulator, memory and CPU model of *domain* are ignored.

    Args:
        base: The document to start from, in UTF-8; the caller bounds its size.
        domain: The vCPU side to write.
        metadata: The content of our own element; None leaves it as it is, or absent.

    Raises:
        DomainXmlError: *base* cannot be read (as ``parse``); our element in it is damaged or of a newer version;
            libvirt would refuse *domain*, or cannot express it.

    Example:
        >>> from dataclasses import replace
        >>> from qmpvcpu.domainxml import parse
        >>> base = b"<domain type='kvm'><name>a</name><!-- two of four --><vcpu current='2'>4</vcpu></domain>"
        >>> domain = parse(base)
        >>> update(base, domain) == base
        True
        >>> third = replace(domain.vcpus[2], enabled=True, hotpluggable=False)
        >>> more = replace(domain, vcpus=(*domain.vcpus[:2], third, domain.vcpus[3]))
        >>> update(base, more)
        b"<domain type='kvm'><name>a</name><!-- two of four --><vcpu current='3'>4</vcpu></domain>"
    """
    return update_with(base, lambda _: domain, metadata)


def update_with(base: bytes, change: Callable[[DomainVcpus], DomainVcpus], metadata: Metadata | None) -> bytes:
    """Do what ``update`` does, with the domain that *change* makes of *base*'s.

    Raises:
        DomainXmlError: As ``update``, or from *change*.
    """
    document = ReadDocument(base)
    said = document.domain
    domain = change(said)
    if domain.vcpus != said.vcpus:  # libvirt defines some states that it does not start, and so do we
        _refuse_broken_states(domain)
    editor = Editor(base, document.root)
    _update_vcpu(editor, said, domain)
    _update_rows(editor, said, domain)
    _update_cputune(editor, said, domain)
    _update_topology(editor, said.topology, domain.topology)
    _update_cells(editor, said, domain)
    if metadata is not None and metadata != document.metadata:
        _update_record(editor, metadata)
    result = editor.result()
    # Whole cores are a rule about the topology and the rows together.
    if domain.max != said.max or domain.has_cores or _other_than_rows(domain) != _other_than_rows(said):
        _refuse_misread(result, said, domain)
    return result


def with_uuid(base: bytes, uuid: str) -> bytes:
    """Return *base* with this ``<uuid>`` if it has none, since libvirt would make one up.

    Raises:
        DomainXmlError: It is not well-formed, or not safe to read.
    """
    editor = Editor(base, ReadDocument(base).root)
    element = editor.root.find("uuid")
    node = Node("uuid", content=uuid)
    if element is None:
        editor.insert(editor.root, node, after=_before("uuid"))
    elif not text_of(element):
        editor.replace(element, node)
    return editor.result()


def _before(tag: str) -> tuple[str, ...]:
    return _DOMAIN[: _DOMAIN.index(tag)]


def _refuse_broken_states(domain: DomainVcpus) -> None:
    if not domain.vcpus or [vcpu.id for vcpu in domain.vcpus] != list(range(domain.max)):
        raise DomainXmlError("vCPUs are numbered from 0 on, without gaps, and there is at least one")
    for broken in broken_states(domain.vcpus):
        raise DomainXmlError(f"libvirt would refuse vCPU {broken.vcpu}: {broken.rule.value} ({broken.says})")


def _other_than_rows(domain: DomainVcpus) -> dict[str, object]:
    topology = domain.topology
    return {
        "placement": domain.placement,
        "cpuset": domain.cpuset,
        "pins": domain.pins,
        "emulator_pin": domain.emulator_pin,
        "scheds": domain.scheds,
        "emulator_sched": domain.emulator_sched,
        "topology": None if topology is None else tuple(getattr(topology, level) for level in LEVELS),
        "numa": domain.numa,
    }


def _refuse_misread(result: bytes, said: DomainVcpus, domain: DomainVcpus) -> None:
    """Refuse a document that libvirt would not define, or would read as something else.

    Raises:
        DomainXmlError: It would.
    """
    again = _other_than_rows(ReadDocument(result).domain)
    # Without the last pin libvirt derives "auto" from <numatune>, as it does when it reads its own document again.
    if domain.placement == said.placement == "static":
        again["placement"] = "static"
    lost = [name for name, value in _other_than_rows(domain).items() if again[name] != value]
    if lost:
        raise DomainXmlError(f"libvirt would read something else than was asked for: {', '.join(lost)}")


# <vcpu> and <vcpus>.


def _update_vcpu(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> None:
    count = None if domain.current == domain.max else str(domain.current)
    cpuset = None if domain.cpuset is None else str(domain.cpuset)
    vcpu = editor.root.find("vcpu")
    written = "static" if vcpu is None else vcpu.get("placement", "static")
    # libvirt derives "auto" from <numatune> while nothing is pinned: once something is, it has to be said.
    is_derived = said.placement == domain.placement == "auto" != written
    placed = is_derived and bool(domain.pins or domain.emulator_pin)
    if vcpu is None:
        if placed or (said.max, said.placement, said.cpuset) != (domain.max, domain.placement, domain.cpuset):
            given = {"placement": domain.placement, "cpuset": cpuset, "current": count}
            attributes = {name: value for name, value in given.items() if value is not None}
            editor.insert(editor.root, Node("vcpu", attributes, str(domain.max)), after=_before("vcpu"))
        return
    changes: dict[str, str | None] = {}
    if placed or domain.placement != said.placement:
        changes["placement"] = domain.placement
    # Under placement='auto' libvirt drops a cpuset; it must not take effect when the placement changes.
    before = said.cpuset if domain.placement == said.placement else AttributeReader().cpuset(vcpu, "cpuset")
    if domain.cpuset != before:
        changes["cpuset"] = cpuset
    # A count that rows overrule may say anything, and stays until the numbers change.
    overruled = said.individual and _has_rows(domain)
    changed = not overruled or (domain.current, domain.max) != (said.current, said.max)
    if changed and _number(vcpu, "current", domain.max) != domain.current:
        changes["current"] = count
    if changes:
        editor.set_attributes(vcpu, changes, order=_VCPU)
    if domain.max != said.max:
        editor.set_number(vcpu, domain.max)


def _update_rows(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> None:
    lists = editor.root.findall("vcpus")
    if not _has_rows(domain):
        for each in lists if said.individual else ():
            editor.remove(each)
    elif not said.individual:
        node = Node("vcpus", content=tuple(map(vcpu_row, domain.vcpus)))
        if lists:
            editor.replace(lists[0], node)
        else:
            editor.insert(editor.root, node, after=_before("vcpus"))
    elif not _is_same_state(said, domain):
        _update_each_row(editor, said, domain)


def _has_rows(domain: DomainVcpus) -> bool:
    return domain.individual or needs_rows(domain.vcpus)


def _is_same_state(before: DomainVcpus, after: DomainVcpus) -> bool:
    alike = before.max == after.max and all(
        (old.enabled, old.hotpluggable) == (new.enabled, new.hotpluggable)
        for old, new in zip(before.vcpus, after.vcpus, strict=True)
    )
    return alike and before.creation == after.creation


def _number(element: "etree._Element", attribute: str, absent: int = 0) -> int:
    """Return the number of an attribute that was read before: libvirt takes any number of zeros, int() does not."""
    text = element.get(attribute)
    return absent if text is None else unsigned(text) or 0


def _update_each_row(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> None:
    rows: dict[int, etree._Element] = {}
    for element in editor.root.iterfind("vcpus/vcpu"):
        number = _number(element, "id")
        if number < domain.max:
            rows[number] = element  # the last of two for one vCPU counts
        else:
            editor.remove(element)
    lists_all = len(rows) >= min(said.max, domain.max)
    unlisted = chain(said.vcpus, (DomainVcpu(each, False, True) for each in range(said.max, domain.max)))  # noqa: FBT003
    last = rows[0]
    for before, vcpu in zip(unlisted, domain.vcpus, strict=False):
        element_or_none = rows.get(vcpu.id)
        if element_or_none is None:
            if vcpu != before or lists_all:
                editor.insert_after(last, vcpu_row(vcpu))
            continue
        last = element_or_none
        # Most rows are as libvirt prints them, and replacing one costs a tenth of editing it.
        if vcpu != before and not editor.rewrite(last, vcpu_row(before), vcpu_row(vcpu)):
            changes = dict(_ATTRIBUTE.findall(vcpu_row(vcpu)))
            editor.set_attributes(last, {"order": None, **changes}, order=_ROW)


# <cputune>.


def _update_cputune(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> None:
    holder = editor.root.find("cputune")
    if holder is None:
        if new := cputune_nodes(domain):
            editor.insert(editor.root, Node("cputune", content=new), after=_before("cputune"))
        return
    new = (
        *_update_pins(editor, said, domain),
        *_update_emulator_pin(editor, said, domain),
        *_update_emulator_sched(editor, said, domain),
        *_update_scheds(editor, said, domain),
    )
    there = {tag: _by_first_vcpu(holder, tag) for tag in {node.tag for node in new} & set(_OF_VCPUS)}
    for node in new:
        before = _CPUTUNE.index(node.tag)
        if node.tag not in _OF_VCPUS:
            editor.insert(holder, node, after=_CPUTUNE[: before + 1])
            continue
        ids, elements = there[node.tag]
        if lower := bisect(ids, int(str(node.attributes[_OF_VCPUS[node.tag]]))):
            editor.insert_after(elements[lower - 1], node)
        else:
            editor.insert(holder, node, after=_CPUTUNE[:before])


def _by_first_vcpu(holder: "etree._Element", tag: str) -> "tuple[list[int], list[etree._Element]]":
    """Return the children *tag* of ``<cputune>``, and the first vCPU that each is for; by ascending vCPU."""
    reader = AttributeReader()
    found: dict[int, etree._Element] = {}
    for element in holder.iterfind(tag):
        named = reader.cpuset(element, "vcpus") if tag == "vcpusched" else [_number(element, "vcpu")]
        found[next(iter(named or [0]))] = element
    ids = sorted(found)
    return ids, [found[each] for each in ids]


def _update_pins(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    missing = dict(domain.pins)
    for pin in editor.root.iterfind("cputune/vcpupin"):
        vcpu = _number(pin, "vcpu")
        cpuset = missing.pop(vcpu, None)
        if cpuset is None:
            # libvirt drops the pin of an impossible vCPU; it must not take effect once the vCPU is possible.
            if vcpu in said.pins or vcpu < domain.max:
                editor.remove(pin)
        elif cpuset != AttributeReader().cpuset(pin, "cpuset"):
            editor.set_attributes(pin, {"cpuset": str(cpuset)}, order=("vcpu", "cpuset"))
    return [Node("vcpupin", {"vcpu": vcpu, "cpuset": cpus}) for vcpu, cpus in sorted(missing.items())]


def _update_emulator_pin(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    if domain.emulator_pin == said.emulator_pin:
        return []
    element = editor.root.find("cputune/emulatorpin")
    if element is None:
        return [Node("emulatorpin", {"cpuset": domain.emulator_pin})]
    if domain.emulator_pin is None:
        editor.remove(element)
    else:
        editor.set_attributes(element, {"cpuset": str(domain.emulator_pin)}, order=("cpuset",))
    return []


def _update_emulator_sched(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    sched = domain.emulator_sched
    if sched == said.emulator_sched:
        return []
    element = editor.root.find("cputune/emulatorsched")
    if element is None:
        return [] if sched is None else [Node("emulatorsched", sched_attributes(sched))]
    if sched is None:
        editor.remove(element)
    else:
        priority = None if sched.priority is None else str(sched.priority)
        changes = {"scheduler": sched.scheduler, "priority": priority}
        editor.set_attributes(element, changes, order=("scheduler", "priority"))
    return []


def _update_scheds(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    if domain.scheds == said.scheds:
        return []
    missing = dict(domain.scheds)
    reader = AttributeReader()
    for element in editor.root.iterfind("cputune/vcpusched"):
        named = reader.cpuset(element, "vcpus") or VcpuMap()
        kept = VcpuMap(each for each in named if missing.get(each) == said.scheds[each])
        for each in kept:
            del missing[each]
        if not kept:
            editor.remove(element)
        elif kept != named:
            editor.set_attributes(element, {"vcpus": str(kept)}, order=("vcpus",))
    return [Node("vcpusched", {"vcpus": vcpu, **sched_attributes(sched)}) for vcpu, sched in sorted(missing.items())]


# <cpu>.


def _update_topology(editor: Editor, said: Topology | None, topology: Topology | None) -> None:
    element = editor.root.find("cpu/topology")
    if topology is None:
        if element is not None:
            editor.remove(element)
        return
    if topology.modules * topology.drawers * topology.books != 1:
        raise DomainXmlError(f"libvirt cannot express modules, drawers and books: {topology!r}")
    if element is None or said is None:
        cpu = editor.root.find("cpu")
        if cpu is None:
            editor.insert(editor.root, Node("cpu", content=(topology_node(topology),)), after=_before("cpu"))
        else:
            editor.insert(cpu, topology_node(topology), after=_BEFORE_TOPOLOGY)
        return
    sizes = {level: getattr(topology, level) for level in LEVELS}
    changes = {level: str(size) for level, size in sizes.items() if size != getattr(said, level)}
    if changes:
        editor.set_attributes(element, changes, order=LEVELS)


def _update_cells(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> None:
    after = {cell.id: cell.cpus for cell in domain.numa}
    before = {cell.id: cell.cpus for cell in said.numa}
    if set(after) != set(before):
        raise DomainXmlError(
            f"the document has the NUMA cells {sorted(before)}, not {sorted(after)}: cells are not added or removed"
        )
    reader = AttributeReader()
    for place, cell in enumerate(editor.root.iterfind("cpu/numa/cell")):
        number = _number(cell, "id", place)
        # A vCPU of no cell is in the first, and need not be listed there.
        written = reader.cpuset(cell, "cpus", may_be_empty=True) or VcpuMap()
        if after[number] not in (before[number], written):
            editor.set_attributes(cell, {"cpus": str(after[number]) or None}, order=_CELL)


# <metadata>.


def _update_record(editor: Editor, metadata: Metadata) -> None:
    holder = editor.root.find("metadata")
    node = record_node(metadata)
    if holder is None:
        editor.insert(editor.root, Node("metadata", content=(node,)), after=_before("metadata"))
    elif (record := find_record(holder)) is not None:
        editor.replace(record, node)
    elif others := holder.findall("*"):
        editor.insert_after(others[-1], node)
    else:
        editor.insert(holder, node, after=())
