"""``<cpu>``: the model, the topology and the NUMA cells, as they stand in a domain document."""

from collections.abc import Mapping
from dataclasses import dataclass

from lxml import etree

from qmpvcpu.domainxml.domain import CpuModel, NumaCell
from qmpvcpu.domainxml.fields import Fields, text_of
from qmpvcpu.errors import DomainRule
from qmpvcpu.model.vcpumap import VcpuMap

LEVELS = ("sockets", "dies", "clusters", "cores", "threads")
_REQUIRED = frozenset({"sockets", "cores", "threads"})
_MODES = ("custom", "host-model", "host-passthrough", "maximum")
_POLICIES = ("force", "require", "optional", "disable", "forbid")
_MODES_WITHOUT_MODEL = ("host-passthrough", "maximum")


@dataclass(frozen=True, slots=True)
class Cpu:
    """What ``<cpu>`` says; what libvirt would refuse is left out.

    Attributes:
        model: The CPU model, or None where nothing is said of one.
        levels: The numbers of ``<topology>``, by their names; None where there is none.
        topology: That element.
        cells: ``<numa>``, as it stands there.
    """

    model: CpuModel | None = None
    levels: Mapping[str, int] | None = None
    topology: etree._Element | None = None
    cells: tuple[NumaCell, ...] = ()


def read_cpu(root: etree._Element, count: int | None, fields: Fields) -> Cpu:
    """Read ``<cpu>`` of a domain with *count* possible vCPUs (None: there is no telling)."""
    cpu = root.find("cpu")
    if cpu is None:
        return Cpu()
    says = f"Invalid mode attribute '{cpu.get('mode')}'"
    mode = fields.choice(cpu, "mode", _MODES, says=says) or "custom"
    migratable = fields.choice(cpu, "migratable", ("on", "off"))
    if migratable is not None and mode not in _MODES_WITHOUT_MODEL:
        says = "Attribute migratable is only allowed for 'host-passthrough' / 'maximum' CPU mode"
        fields.refuse(DomainRule.MIGRATABLE_MODE, cpu, "migratable", says=says)
    topology = cpu.find("topology")
    levels = None if topology is None else _levels(topology, fields)
    element = cpu.find("model")
    name = None if element is None else text_of(element) or None
    features = _features(cpu, fields, has_model=mode != "custom" or name is not None)
    model = None
    if mode != "custom" or name is not None:
        # libvirt drops the name where the mode says it all, and lets the host's own CPU migrate.
        name = None if mode in _MODES_WITHOUT_MODEL else name
        migratable = migratable or ("on" if mode == "host-passthrough" else None)
        model = CpuModel(mode, name, features, migratable)
    return Cpu(model, levels, topology, _cells(root, count, fields))


def _levels(topology: etree._Element, fields: Fields) -> Mapping[str, int] | None:
    levels = {}
    broken = False
    for level in LEVELS:
        if level not in topology.attrib and level not in _REQUIRED:
            levels[level] = 1
            continue
        number = fields.number(topology, level) if fields.required(topology, level) else None
        if number == 0:
            says = f"Invalid value for attribute '{level}' in element 'topology': Zero is not permitted"
            fields.refuse(DomainRule.TOPOLOGY_ZERO, topology, level, says=says)
        broken |= not number
        levels[level] = number or 1
    return None if broken else levels


def _features(cpu: etree._Element, fields: Fields, *, has_model: bool) -> Mapping[str, str]:
    elements = cpu.findall("feature")
    if elements and not has_model:
        says = "Non-empty feature list specified without CPU model"
        fields.refuse(DomainRule.FEATURE_WITHOUT_MODEL, elements[0], "name", says=says)
    features: dict[str, str] = {}
    for element in elements:
        policy = fields.choice(element, "policy", _POLICIES, says="Invalid CPU feature policy") or "require"
        name = element.get("name")
        if not name:
            says = "Invalid CPU feature name"
            fields.refuse(DomainRule.FEATURE_WITHOUT_NAME, element, "name", says=says)
        elif name in features:
            says = f"CPU feature '{name}' specified more than once"
            fields.refuse(DomainRule.FEATURE_TWICE, element, "name", says=says)
        else:
            features[name] = policy
    return features


def _cells(root: etree._Element, count: int | None, fields: Fields) -> tuple[NumaCell, ...]:
    numa = root.find("cpu/numa")
    if numa is None:
        return ()
    elements = numa.findall("cell")
    if not elements:
        says = "NUMA topology defined without NUMA cells"
        fields.refuse(DomainRule.NUMA_WITHOUT_CELLS, numa, says=says)
    owners: dict[int, int] = {}
    cells: dict[int, NumaCell] = {}
    read: list[tuple[etree._Element, NumaCell]] = []
    for place, element in enumerate(elements):
        cell = _cell(element, place, len(elements), fields, cells)
        if cell is not None:
            _refuse_overlap(element, cell, owners, fields)
            memory = fields.kib(element, "memory")
            if not element.get("memory"):
                says = "missing element or attribute './@memory'"
                fields.refuse(DomainRule.ATTRIBUTE_MISSING, element, "memory", says=says)
            cells[cell.id] = NumaCell(cell.id, cell.cpus, memory or 0)
            read.append((element, cell))
    if count is not None:
        _refuse_beyond(read, len(owners), count, fields)
    return tuple(cells[each] for each in sorted(cells))


def _cell(
    element: etree._Element, place: int, most: int, fields: Fields, known: Mapping[int, NumaCell]
) -> NumaCell | None:
    number = fields.number(element, "id") if "id" in element.attrib else place
    if number is None:
        return None
    if number >= most:
        says = "Exactly one 'cell' element per guest NUMA cell allowed"
        fields.refuse(DomainRule.NUMA_ID_GAP, element, "id", says=says, detail=f"there are {most} cells")
        return None
    if number in known:
        says = f"Duplicate NUMA cell info for cell id '{number}'"
        fields.refuse(DomainRule.NUMA_ID_TWICE, element, "id", value=str(number), says=says)
        return None
    return NumaCell(number, fields.cpuset(element, "cpus", may_be_empty=True) or VcpuMap(), 0)


def _refuse_overlap(element: etree._Element, cell: NumaCell, owners: dict[int, int], fields: Fields) -> None:
    fields.count_named(element, cell.cpus)
    shared = [each for each in cell.cpus if each in owners]
    if shared:
        other = min(owners[each] for each in shared)
        says = f"NUMA cells {cell.id} and {other} have overlapping vCPU ids"
        detail = f"vCPU {next(each for each in shared if owners[each] == other)} is in cells {other} and {cell.id}"
        fields.refuse(DomainRule.NUMA_OVERLAP, element, "cpus", says=says, detail=detail)
    for each in cell.cpus:
        owners.setdefault(each, cell.id)


def _refuse_beyond(cells: list[tuple[etree._Element, NumaCell]], named: int, count: int, fields: Fields) -> None:
    for element, cell in cells:
        if any(each >= count for each in cell.cpus):
            rule, says = DomainRule.NUMA_ABOVE_MAX, "CPU IDs in <numa> exceed the <vcpu> count"
            if named > count:
                rule, says = DomainRule.NUMA_TOO_MANY, "Number of CPUs in <numa> exceeds the <vcpu> count"
            fields.refuse(rule, element, "cpus", says=says, detail=f"<vcpu> says {count}")
            return
