"""``<cpu>``: the model, the topology and the NUMA cells; and QEMU's names of models.

QMP reports the CPU model, through the type of the slots, but not the features that were requested. A document that is
written from a running VM notes that in an element of our own under ``<metadata>``, for those who start a VM from it::

    <qmpvcpu:cpu xmlns:qmpvcpu="urn:qmpvcpu:cpu:1" model="EPYC" features="unknown"/>

The note counts while ``<cpu>`` says what was written with it. Once somebody names another model, or features, the
document knows better. Without ``model``, QEMU reported none, as for a machine without CPU hotplug.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from qmpvcpu.domainxml.domain import LEVELS, CpuModel, DomainVcpus, NumaCell
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.domainxml.writer import Node
from qmpvcpu.errors import shorten
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.names import is_same_model
from qmpvcpu.model.vcpumap import VcpuMap

if TYPE_CHECKING:
    from lxml import etree

    from qmpvcpu.domainxml.attributes import AttributeReader

CPU_MODEL: Final = "cpu-model"
CPU_FEATURES: Final = "cpu-features"
IOMMU: Final = "iommu"

_MOST_QUOTED: Final = 60

_NAMESPACE: Final = "urn:qmpvcpu:cpu:1"
CPU_MARK: Final = f"{{{_NAMESPACE}}}cpu"

_MODES: Final[Mapping[str, str]] = {"host": "host-passthrough", "max": "maximum"}
_MODELS: Final = {mode: name for name, mode in _MODES.items()}
# What QEMU uses without -cpu; libvirt writes it out unless its own default differs.
_DEFAULTS: Final = {"x86_64": "qemu64", "i686": "qemu32", "loongarch64": "la464"}


_REQUIRED: Final = frozenset({"sockets", "cores", "threads"})
_LIBVIRT_MODES: Final = ("custom", "host-model", "host-passthrough", "maximum")
_POLICIES: Final = ("force", "require", "optional", "disable", "forbid")
MODES_WITHOUT_MODEL: Final = ("host-passthrough", "maximum")
_VENDOR: Final = re.compile(r"[ -+\--~]{12}")
# As ACPI's SLIT has them.
_LOCAL_DISTANCE: Final = 10
_MOST_DISTANT: Final = 255


def running_model(layout: Layout) -> str | None:
    """Return QEMU's name of the model that a VM runs with, or None where QEMU does not report it."""
    return layout.slots[0].model if layout.slots else None


def model_from(layout: Layout) -> CpuModel | None:
    """Return the model that a VM runs with in libvirt's terms, or None where QEMU does not report it."""
    name = running_model(layout)
    return None if name is None else _from_name(name)


def _from_name(name: str) -> CpuModel:
    mode = _MODES.get(name)
    if mode is None:
        return CpuModel("custom", name)
    return CpuModel(mode, migratable="on" if mode == "host-passthrough" else None)


def cpu_parts(model: CpuModel) -> tuple[Mapping[str, str], tuple[Node, ...]]:
    """Return the attributes and the children of the ``<cpu>`` that names *model*.

    They ask libvirt for exactly this model, without checking it against the host: QEMU already runs it.
    """
    if model.mode == "custom":
        said = {"mode": "custom", "match": "exact", "check": "none"}
        return said, (Node("model", {"fallback": "forbid"}, model.model or ""),)
    migratable = {} if model.migratable is None else {"migratable": model.migratable}
    return {"mode": model.mode, "check": "none", **migratable}, ()


def mark_node(layout: Layout) -> Node:
    """Return the note on the CPU that goes under ``<metadata>`` of a document written from *layout*."""
    name = running_model(layout)
    told = {} if name is None else {"model": name}
    return Node("qmpvcpu:cpu", {"xmlns:qmpvcpu": _NAMESPACE, **told, "features": "unknown"})


def has_mark(root: "etree._Element") -> bool:
    """Return True if we wrote the document from a running VM."""
    return root.find(f"metadata/{CPU_MARK}") is not None


def is_as_written(root: "etree._Element", model: CpuModel | None) -> bool:
    """Return True if *model*, which the document names, is the one that we wrote."""
    mark = root.find(f"metadata/{CPU_MARK}")
    if mark is None:
        return False
    name = mark.get("model")
    if name is None:  # libvirt fills in its own default
        return model is None or (model.mode == "custom" and model.model in _DEFAULTS.values())
    written = _from_name(name)
    return model is not None and (model.mode, model.model) == (written.mode, written.model)


def untold_of(root: "etree._Element", model: CpuModel | None) -> str | None:
    """Return what QEMU did not report about the CPU of a document that names *model*; None if it was added since."""
    if not is_as_written(root, model) or (model is not None and model.features):
        return None
    return CPU_MODEL if root.find(f"metadata/{CPU_MARK}[@model]") is None else CPU_FEATURES


def qemu_model(domain: DomainVcpus) -> str | None:
    """Return QEMU's name of the model that a document asks for; None where QEMU or the host chooses."""
    model = domain.cpu or CpuModel("custom")
    if model.mode != "custom":
        return _MODELS.get(model.mode)
    if model.model is None:
        # Under KVM libvirt's default for s390x is host-model.
        target = domain.target or ""
        return "qemu" if target == "s390x" and domain.type == "qemu" else _DEFAULTS.get(target)
    return model.model


def needs_kvm(model: CpuModel | None) -> bool:
    """Return True if a model is the host's own CPU, which TCG does not have."""
    return model is not None and model.mode == "host-passthrough"


def cpu_differs(layout: Layout, domain: DomainVcpus) -> str | None:
    """Return how the running CPU model differs from the document's; None if it does not, or is not known."""
    running = running_model(layout)
    named = qemu_model(domain)
    if running is None or named is None or is_same_model(named, running):
        return None
    said = f"names the CPU model {shorten(named, _MOST_QUOTED)}" if domain.cpu else f"names no CPU model ({named})"
    return f"the document {said}, and QEMU runs {running}: a VM that is started from it has another CPU"


class RawCpu(NamedTuple):
    """What ``<cpu>`` says, without the values that libvirt would refuse.

    Attributes:
        model: The CPU model, or None where the document names none.
        levels: The numbers of ``<topology>``, by their names; None where there is none.
        topology: That element.
        cells: ``<numa>``, as written.
    """

    model: CpuModel | None = None
    levels: Mapping[str, int] | None = None
    topology: "etree._Element | None" = None
    cells: tuple[NumaCell, ...] = ()


def read_cpu(root: "etree._Element", count: int | None, reader: "AttributeReader") -> RawCpu:
    """Read ``<cpu>`` of a domain with *count* possible vCPUs (None: unknown)."""
    cpu = root.find("cpu")
    if cpu is None:
        return RawCpu()
    says = f"Invalid mode attribute '{cpu.get('mode')}'"
    mode = reader.choice(cpu, "mode", _LIBVIRT_MODES, says=says) or "custom"
    migratable = reader.choice(cpu, "migratable", ("on", "off"))
    if migratable is not None and mode not in MODES_WITHOUT_MODEL:
        says = "Attribute migratable is only allowed for 'host-passthrough' / 'maximum' CPU mode"
        reader.refuse(DomainRule.MIGRATABLE_MODE, cpu, "migratable", says)
    topology = cpu.find("topology")
    levels = None if topology is None else _levels(topology, reader)
    element = cpu.find("model")
    from qmpvcpu.domainxml.safe_xml import text_of  # not at the top: what is written needs no lxml

    name = None if element is None else text_of(element) or None
    features = _features(cpu, reader, has_model=mode != "custom" or name is not None)
    model = None
    if mode != "custom" or name is not None:
        # libvirt drops the name where the mode says it all, and lets the host's own CPU migrate.
        name = None if mode in MODES_WITHOUT_MODEL else name
        migratable = migratable or ("on" if mode == "host-passthrough" else None)
        vendor = "" if element is None or mode in MODES_WITHOUT_MODEL else element.get("vendor_id", "")
        model = CpuModel(mode, name, features, migratable, vendor if _VENDOR.fullmatch(vendor) else None)
    return RawCpu(model, levels, topology, _cells(root, count, reader))


def _levels(topology: "etree._Element", reader: "AttributeReader") -> Mapping[str, int] | None:
    levels = {}
    broken = False
    for level in LEVELS:
        if level not in topology.attrib and level not in _REQUIRED:
            levels[level] = 1
            continue
        number = reader.number(topology, level) if reader.required(topology, level) else None
        if number == 0:
            says = f"Invalid value for attribute '{level}' in element 'topology': Zero is not permitted"
            reader.refuse(DomainRule.TOPOLOGY_ZERO, topology, level, says)
        broken |= not number
        levels[level] = number or 1
    return None if broken else levels


def _features(cpu: "etree._Element", reader: "AttributeReader", *, has_model: bool) -> Mapping[str, str]:
    elements = cpu.findall("feature")
    if elements and not has_model:
        says = "Non-empty feature list specified without CPU model"
        reader.refuse(DomainRule.FEATURE_WITHOUT_MODEL, elements[0], "name", says)
    features: dict[str, str] = {}
    for element in elements:
        policy = reader.choice(element, "policy", _POLICIES, says="Invalid CPU feature policy") or "require"
        name = element.get("name")
        if not name:
            reader.refuse(DomainRule.FEATURE_WITHOUT_NAME, element, "name", "Invalid CPU feature name")
        elif name in features:
            reader.refuse(DomainRule.FEATURE_TWICE, element, "name", f"CPU feature '{name}' specified more than once")
        else:
            features[name] = policy
    return features


def _cells(root: "etree._Element", count: int | None, reader: "AttributeReader") -> tuple[NumaCell, ...]:
    numa = root.find("cpu/numa")
    if numa is None:
        return ()
    elements = numa.findall("cell")
    if not elements:
        reader.refuse(DomainRule.NUMA_WITHOUT_CELLS, numa, None, "NUMA topology defined without NUMA cells")
    owners: dict[int, int] = {}
    cells: dict[int, NumaCell] = {}
    read: list[tuple[etree._Element, NumaCell]] = []
    for place, element in enumerate(elements):
        cell = _cell(element, place, len(elements), reader, cells)
        if cell is not None:
            _refuse_overlap(element, cell, owners, reader)
            memory = reader.kib(element, "memory")
            if not element.get("memory"):
                says = "missing element or attribute './@memory'"
                reader.refuse(DomainRule.ATTRIBUTE_MISSING, element, "memory", says)
            reader.choice(element, "memAccess", ("shared", "private"))
            reader.truth(element, "discard")
            _check_distances(element, cell.id, len(elements), reader)
            cells[cell.id] = NumaCell(cell.id, cell.cpus, memory or 0)
            read.append((element, cell))
    if count is not None:
        _refuse_beyond(read, len(owners), count, reader)
    return tuple(cells[each] for each in sorted(cells))


def _cell(
    element: "etree._Element", place: int, most: int, reader: "AttributeReader", known: Mapping[int, NumaCell]
) -> NumaCell | None:
    number = reader.number(element, "id") if "id" in element.attrib else place
    if number is None:
        return None
    if number >= most:
        says = "Exactly one 'cell' element per guest NUMA cell allowed"
        reader.refuse(DomainRule.NUMA_ID_GAP, element, "id", says, detail=f"there are {most} cells")
        return None
    if number in known:
        says = f"Duplicate NUMA cell info for cell id '{number}'"
        reader.refuse(DomainRule.NUMA_ID_TWICE, element, "id", says, value=str(number))
        return None
    return NumaCell(number, reader.cpuset(element, "cpus", may_be_empty=True) or VcpuMap(), 0)


def _refuse_overlap(
    element: "etree._Element", cell: NumaCell, owners: dict[int, int], reader: "AttributeReader"
) -> None:
    reader.count_named(element, cell.cpus)
    shared = [each for each in cell.cpus if each in owners]
    if shared:
        other = min(owners[each] for each in shared)
        says = f"NUMA cells {cell.id} and {other} have overlapping vCPU ids"
        detail = f"vCPU {next(each for each in shared if owners[each] == other)} is in cells {other} and {cell.id}"
        reader.refuse(DomainRule.NUMA_OVERLAP, element, "cpus", says, detail=detail)
    for each in cell.cpus:
        owners.setdefault(each, cell.id)


def _check_distances(cell: "etree._Element", number: int, cells: int, reader: "AttributeReader") -> None:
    """Check how far the other cells are; the numbers themselves are not read."""
    distances = cell.find("distances")
    if distances is None:
        return
    siblings = distances.findall("sibling")
    if not siblings:
        says = "NUMA distances defined without siblings"
        reader.refuse(DomainRule.DISTANCES_WITHOUT_SIBLINGS, distances, None, says)
    for element in siblings:
        sibling = reader.number(element, "id") if reader.required(element, "id") else None
        if sibling is not None and sibling >= cells:
            says = f"'sibling_id {sibling}' does not refer to a valid cell within NUMA 'cell id {number}'"
            reader.refuse(DomainRule.DISTANCE_TO_NO_CELL, element, "id", says, detail=f"there are {cells} cells")
            continue
        value = reader.number(element, "value") if reader.required(element, "value") else None
        if sibling is None or value is None:
            continue
        least = _LOCAL_DISTANCE if sibling == number else _LOCAL_DISTANCE + 1
        most = _LOCAL_DISTANCE if sibling == number else _MOST_DISTANT
        if not least <= value <= most:
            says = f"'value {value}' is invalid for 'sibling id {sibling}' under NUMA 'cell id {number}'"
            reader.refuse(DomainRule.DISTANCE_OUT_OF_RANGE, element, "value", says, detail=f"{least} to {most}")


def _refuse_beyond(
    cells: "list[tuple[etree._Element, NumaCell]]", named: int, count: int, reader: "AttributeReader"
) -> None:
    for element, cell in cells:
        if any(each >= count for each in cell.cpus):
            rule, says = DomainRule.NUMA_ABOVE_MAX, "CPU IDs in <numa> exceed the <vcpu> count"
            if named > count:
                rule, says = DomainRule.NUMA_TOO_MANY, "Number of CPUs in <numa> exceeds the <vcpu> count"
            reader.refuse(rule, element, "cpus", says, detail=f"<vcpu> says {count}")
            return
