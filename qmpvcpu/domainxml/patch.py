"""A document with another vCPU side, all else as it was, byte for byte."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from qmpvcpu.domainxml.attributes import Fields
from qmpvcpu.domainxml.byte_editor import Editor
from qmpvcpu.domainxml.domain import DomainVcpu, DomainVcpus, creation_of, needs_rows
from qmpvcpu.domainxml.reader import parse, parse_with_tree
from qmpvcpu.domainxml.record_element import Metadata, find_record, read_metadata, record_node
from qmpvcpu.domainxml.safe_xml import parse_safely
from qmpvcpu.domainxml.writer import Node, row
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology

if TYPE_CHECKING:
    from lxml import etree
from bisect import bisect

from lxml import etree

from qmpvcpu.domainxml.domain import VcpuSched

# As libvirt prints them.
_DOMAIN = (
    *("name", "uuid", "genid", "hwuuid", "title", "description", "metadata", "maxMemory", "memory", "currentMemory"),
    *("blkiotune", "memtune", "memoryBacking", "vcpu", "vcpus", "iothreads", "iothreadids", "defaultiothread"),
    *("cputune", "numatune", "resource", "sysinfo", "bootloader", "bootloader_args", "os", "idmap", "features"),
    "cpu",
)
_BEFORE_TOPOLOGY = ("arch", "model", "vendor")
_VCPU = ("placement", "cpuset", "current")
_ROW = ("id", "enabled", "hotpluggable", "order")
_LEVELS = ("sockets", "dies", "clusters", "cores", "threads")
_CELL = ("id", "cpus")
# Whole cores are a matter of the topology besides the rows.
_WITH_CORES = frozenset({"ppc64", "ppc64le"})


def update(base: bytes, domain: DomainVcpus, *, metadata: Metadata | None = None) -> bytes:
    """Return a document that says *domain*'s vCPU side, and is otherwise *base* byte for byte.

    Only elements that have to say something else are changed: ``<vcpu>``, rows of ``<vcpus>``, ``<vcpupin>``,
    ``<emulatorpin>``, ``<vcpusched>``, ``<topology>``, the ``cpus`` of a ``<cell>``, and our own element; in them,
    only the attributes that have to. What says the same in other words stays: ``current`` beside rows, orders with
    gaps in them, no rows where none are needed. Once a state changes, every order is written as *domain* has it. New
    elements are written as libvirt writes them, where libvirt writes them. Idempotent.

    Of *domain*, the name, uuid, type, machine, emulator, memory and CPU model are not looked at.

    Args:
        base: The document to start from, in UTF-8; the caller bounds its size.
        domain: What its vCPU side is to say.
        metadata: What our own element is to say; None leaves it as it is, or absent.

    Raises:
        DomainXmlError: *base* cannot be read, as ``parse``; our element in it is damaged or of a newer version;
            libvirt would refuse what *domain* says, or has no words for it.

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
    """Do what ``update`` does, with what *change* makes of what *base* says.

    Raises:
        DomainXmlError: As ``update`` does, or *change*.
    """
    said, root = parse_with_tree(base)
    domain = change(said)
    if domain.vcpus != said.vcpus:  # libvirt defines some states that it does not start, and so do we
        _refuse_unsayable(domain)
    editor = Editor(base, root)
    _update_vcpu(editor, said, domain)
    _update_rows(editor, said, domain)
    update_tuning(editor, said, domain, after=_before("cputune"))
    _update_topology(editor, said.topology, domain.topology)
    _update_cells(editor, said, domain)
    if metadata is not None:
        _update_record(editor, metadata)
    result = editor.result()
    if domain.max != said.max or domain.arch in _WITH_CORES or _besides_rows(domain) != _besides_rows(said):
        _refuse_unread(result, domain)
    return result


def identify(base: bytes, uuid: str) -> bytes:
    """Return *base* with this ``<uuid>``, if it has none: what libvirt would otherwise make up anew.

    Raises:
        DomainXmlError: It is not well-formed, or not safe to read.
    """
    editor = Editor(base, parse_safely(base))
    if editor.root.find("uuid") is None:
        editor.insert(editor.root, Node("uuid", content=uuid), after=_before("uuid"))
    return editor.result()


def _before(tag: str) -> tuple[str, ...]:
    return _DOMAIN[: _DOMAIN.index(tag)]


def _refuse_unsayable(domain: DomainVcpus) -> None:
    """Refuse a state that libvirt does not define.

    Raises:
        DomainXmlError: It does not; with libvirt's reason.
    """
    vcpus = domain.vcpus
    if not vcpus or [vcpu.id for vcpu in vcpus] != list(range(len(vcpus))):
        raise DomainXmlError("vCPUs are numbered from 0 on, without gaps, and there is at least one")
    if not vcpus[0].enabled or vcpus[0].hotpluggable or vcpus[0].order not in {None, 1}:
        raise DomainXmlError("vCPU 0 is enabled, not hotpluggable, and the first in the order, or libvirt refuses it")
    if len({vcpu.order is None for vcpu in vcpus if vcpu.enabled}) > 1:
        raise DomainXmlError("either every enabled vCPU has an order or none, or libvirt refuses them")
    last = vcpus[0]
    for vcpu in vcpus:
        if not vcpu.enabled and not vcpu.hotpluggable:
            raise DomainXmlError(f"vCPU {vcpu.id} is neither enabled nor hotpluggable: libvirt refuses that")
        if not vcpu.hotpluggable and (last.hotpluggable or (vcpu.order or 0) < (last.order or 0)):
            raise DomainXmlError(
                f"vCPU {vcpu.id} is not hotpluggable and comes after vCPU {last.id}, in id or order: "
                "libvirt starts a VM with its first vCPUs, and plugs the others after them"
            )
        last = vcpu


def _besides_rows(domain: DomainVcpus) -> dict[str, object]:
    topology = domain.topology
    return {
        "placement": domain.placement,
        "cpuset": domain.cpuset,
        "pins": domain.pins,
        "emulator_pin": domain.emulator_pin,
        "scheds": by_vcpu(domain.scheds),
        "topology": None if topology is None else tuple(getattr(topology, level) for level in _LEVELS),
        "numa": domain.numa,
    }


def _refuse_unread(result: bytes, domain: DomainVcpus) -> None:
    """Refuse what libvirt would not define, or would read as something else.

    Raises:
        DomainXmlError: It would.
    """
    again = _besides_rows(parse(result))
    lost = [name for name, value in _besides_rows(domain).items() if again[name] != value]
    if lost:
        raise DomainXmlError(f"libvirt would read something else than is asked for: {', '.join(lost)}")


def _update_vcpu(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> None:
    count = None if domain.current == domain.max else str(domain.current)
    cpuset = None if domain.cpuset is None else str(domain.cpuset)
    vcpu = editor.root.find("vcpu")
    if vcpu is None:
        if (said.max, said.placement, said.cpuset) != (domain.max, domain.placement, domain.cpuset):
            given = {"placement": domain.placement, "cpuset": cpuset, "current": count}
            attributes = {name: value for name, value in given.items() if value is not None}
            editor.insert(editor.root, Node("vcpu", attributes, str(domain.max)), after=_before("vcpu"))
        return
    changes: dict[str, str | None] = {}
    if domain.placement != said.placement:
        changes["placement"] = domain.placement
    # Beside placement='auto' libvirt drops a cpuset that is given; it must not come alive.
    before = said.cpuset if domain.placement == said.placement else Fields().cpuset(vcpu, "cpuset")
    if domain.cpuset != before:
        changes["cpuset"] = cpuset
    # A count that rows overrule may say anything, and stays so until there is news.
    overruled = said.individual and _has_rows(domain)
    news = not overruled or (domain.current, domain.max) != (said.current, said.max)
    if news and int(vcpu.get("current", domain.max)) != domain.current:
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
        node = Node("vcpus", content=tuple(map(row, domain.vcpus)))
        if lists:
            editor.replace(lists[0], node)
        else:
            editor.insert(editor.root, node, after=_before("vcpus"))
    elif not _is_same_state(said.vcpus, domain.vcpus):
        _update_each_row(editor, said, domain)


def _has_rows(domain: DomainVcpus) -> bool:
    return domain.individual or needs_rows(domain.vcpus)


def _is_same_state(before: Sequence[DomainVcpu], after: Sequence[DomainVcpu]) -> bool:
    alike = len(before) == len(after) and all(
        (old.enabled, old.hotpluggable) == (new.enabled, new.hotpluggable)
        for old, new in zip(before, after, strict=True)
    )
    return alike and creation_of(before) == creation_of(after)


def _update_each_row(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> None:
    rows: dict[int, etree._Element] = {}
    for element in editor.root.iterfind("vcpus/vcpu"):
        number = int(element.get("id", ""))
        if number < domain.max:
            rows[number] = element  # of two for one vCPU the last counts
        else:
            editor.remove(element)
    lists_all = len(rows) >= min(said.max, domain.max)
    unlisted = chain(said.vcpus, (DomainVcpu(each, False, True) for each in range(said.max, domain.max)))  # noqa: FBT003
    last = rows[0]
    for before, vcpu in zip(unlisted, domain.vcpus, strict=False):
        element_or_none = rows.get(vcpu.id)
        if element_or_none is None:
            if vcpu != before or lists_all:
                editor.insert_after(last, Node("vcpu", _row_attributes(vcpu)))
            continue
        last = element_or_none
        # Most rows are as libvirt prints them, and writing one anew is a tenth of the cost of editing it.
        if vcpu != before and not editor.rewrite(last, row(before), row(vcpu)):
            changes = {name: value for name, value in _row_attributes(vcpu).items() if name != "id"}
            editor.set_attributes(last, {"order": None, **changes}, order=_ROW)


def _row_attributes(vcpu: DomainVcpu) -> dict[str, str]:
    truths = {True: "yes", False: "no"}
    order = {"order": str(vcpu.order)} if vcpu.order else {}
    return {
        "id": str(vcpu.id),
        "enabled": truths[vcpu.enabled],
        "hotpluggable": truths[vcpu.hotpluggable],
        **order,
    }


def _update_topology(editor: Editor, said: Topology | None, wanted: Topology | None) -> None:
    element = editor.root.find("cpu/topology")
    if wanted is None:
        if element is not None:
            editor.remove(element)
        return
    if wanted.modules * wanted.drawers * wanted.books != 1:
        raise DomainXmlError(f"libvirt has no words for modules, drawers and books: {wanted!r}")
    levels = {level: int(getattr(wanted, level)) for level in _LEVELS}
    if element is None or said is None:
        node = Node("topology", {name: size for name, size in levels.items() if name != "clusters" or size > 1})
        cpu = editor.root.find("cpu")
        if cpu is None:
            editor.insert(editor.root, Node("cpu", content=(node,)), after=_before("cpu"))
        else:
            editor.insert(cpu, node, after=_BEFORE_TOPOLOGY)
        return
    changes = {level: str(size) for level, size in levels.items() if size != getattr(said, level)}
    if changes:
        editor.set_attributes(element, changes, order=_LEVELS)


def _update_cells(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> None:
    wanted = {cell.id: cell.cpus for cell in domain.numa}
    before = {cell.id: cell.cpus for cell in said.numa}
    if set(wanted) != set(before):
        raise DomainXmlError(
            f"the document has the NUMA cells {sorted(before)}, not {sorted(wanted)}: cells are not added or removed"
        )
    for place, cell in enumerate(editor.root.iterfind("cpu/numa/cell")):
        number = int(cell.get("id", place))
        text = cell.get("cpus")
        # A vCPU of no cell is in the first: what is not listed need not be.
        if wanted[number] != before[number] and wanted[number] != (
            VcpuMap() if text is None else VcpuMap.parse(text)
        ):
            editor.set_attributes(cell, {"cpus": str(wanted[number]) or None}, order=_CELL)


def _update_record(editor: Editor, metadata: Metadata) -> None:
    holder = editor.root.find("metadata")
    node = record_node(metadata)
    if holder is None:
        editor.insert(editor.root, Node("metadata", content=(node,)), after=_before("metadata"))
        return
    record = find_record(holder)
    if record is not None:
        if read_metadata(record) != metadata:
            editor.replace(record, node)
        return
    others = holder.findall("*")
    if others:
        editor.insert_after(others[-1], node)
    else:
        editor.insert(holder, node, after=())


# As libvirt prints them.
_CHILDREN = (
    *("shares", "period", "quota", "global_period", "global_quota", "emulator_period", "emulator_quota"),
    *("iothread_period", "iothread_quota", "vcpupin", "emulatorpin", "iothreadpin", "vcpusched"),
)

_WITH_PRIORITY = ("fifo", "rr")
_Scheduler = tuple[str, int | None]


def update_tuning(editor: Editor, said: DomainVcpus, domain: DomainVcpus, *, after: Sequence[str]) -> None:
    """Have ``<cputune>`` say what *domain* says of pins and schedulers.

    Args:
        editor: Of the document.
        said: What it says.
        domain: What it is to say.
        after: What stands before ``<cputune>``, if that is new.
    """
    new = [
        *_update_pins(editor, said, domain),
        *_update_emulator_pin(editor, said, domain),
        *_update_scheds(editor, said, domain),
    ]
    holder = editor.root.find("cputune")
    if holder is None:
        if new:
            editor.insert(editor.root, Node("cputune", content=tuple(new)), after=after)
        return
    pins = {int(pin.get("vcpu", "")): pin for pin in holder.iterfind("vcpupin")}
    sorted_pins = sorted(pins)
    for node in new:
        # Behind the pin of the vCPU before it, as libvirt sorts them.
        lower = bisect(sorted_pins, int(str(node.attributes["vcpu"]))) if node.tag == "vcpupin" else 0
        if lower:
            editor.insert_after(pins[sorted_pins[lower - 1]], node)
        else:
            behind = _CHILDREN[: _CHILDREN.index(node.tag) + (node.tag != "vcpupin")]
            editor.insert(holder, node, after=behind)


def _update_pins(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    missing = dict(domain.pins)
    for pin in editor.root.iterfind("cputune/vcpupin"):
        vcpu = int(pin.get("vcpu", ""))
        wanted = missing.pop(vcpu, None)
        if wanted is None:
            # libvirt drops the pin of a vCPU that cannot be; when it can, it must not come alive.
            if vcpu in said.pins or vcpu < domain.max:
                editor.remove(pin)
        elif wanted != Fields().cpuset(pin, "cpuset"):
            editor.set_attributes(pin, {"cpuset": str(wanted)}, order=("vcpu", "cpuset"))
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


def _update_scheds(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    wanted = by_vcpu(domain.scheds)
    if wanted == by_vcpu(said.scheds):
        return []
    for element in editor.root.iterfind("cputune/vcpusched"):
        scheduler = _scheduler(element)
        named = Fields().cpuset(element, "vcpus") or VcpuMap()
        kept = VcpuMap(each for each in named if wanted.get(each) == scheduler)
        for each in kept:
            del wanted[each]
        if not kept:
            editor.remove(element)
        elif kept != named:
            editor.set_attributes(element, {"vcpus": str(kept)}, order=("vcpus",))
    groups: dict[_Scheduler, list[int]] = {}
    for vcpu, scheduler in sorted(wanted.items()):
        groups.setdefault(scheduler, []).append(vcpu)
    return [
        Node(
            "vcpusched",
            {"vcpus": VcpuMap(vcpus), "scheduler": scheduler} | ({} if priority is None else {"priority": priority}),
        )
        for (scheduler, priority), vcpus in groups.items()
    ]


def by_vcpu(scheds: Sequence[VcpuSched]) -> dict[int, _Scheduler]:
    """Return the scheduler and the priority of each vCPU that has one."""
    return {vcpu: (each.scheduler, each.priority) for each in scheds for vcpu in each.vcpus}


def _scheduler(element: etree._Element) -> _Scheduler:
    scheduler = element.get("scheduler", "")
    return scheduler, Fields().integer(element, "priority") if scheduler in _WITH_PRIORITY else None
