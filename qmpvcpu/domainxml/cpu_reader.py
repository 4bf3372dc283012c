"""What a document says about CPUs: ``<cpu>`` with its topology and NUMA cells, and more words of ``-cpu``.

libvirt takes these words from all over a document. What is not read here, though it changes QEMU's CPUs or cells, is
named. That is also what libvirt would refuse, and what newer versions of it may know.

Source: libvirt src/qemu/qemu_command.c, qemuBuildCpuCommandLine; the words and their order as measured with libvirt
9.0.0 (``tests/libvirt/test_launch.py``).
"""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from lxml import etree

from qmpvcpu.domainxml.attributes import AttributeReader, unsigned
from qmpvcpu.domainxml.cpu import (
    CPU_FEATURES,
    CPU_MARK,
    CPU_MODEL,
    DEFAULT_MODELS,
    MODES,
    MODES_WITHOUT_MODEL,
    SWITCHES,
    model_named,
)
from qmpvcpu.domainxml.domain import LEVELS, X86, CpuModel, NumaCell
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.domainxml.safe_xml import text_of
from qmpvcpu.model.vcpumap import VcpuMap

_UNREAD: Final = (
    "cpu[@match='minimum']",
    "cpu[@deprecated_features]",
    "cpu/numa/cell[@memAccess]",
    "cpu/numa/cell[@discard]",
    "cpu/numa/cell/distances",
    "cpu/numa/cell/cache",
    "cpu/numa/interconnects",
    "memoryBacking",
    "numatune",
)
# A text that stays one word of -cpu: no comma.
_TEXT: Final = re.compile(r"[ -+\--~]{0,12}")

_REQUIRED: Final = frozenset({"sockets", "cores", "threads"})
_VENDOR: Final = re.compile(r"[ -+\--~]{12}")
# As ACPI's SLIT has them.
_LOCAL_DISTANCE: Final = 10
_MOST_DISTANT: Final = 255


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
    topology: etree._Element | None = None
    cells: tuple[NumaCell, ...] = ()


def read_cpu(root: etree._Element, count: int | None, reader: AttributeReader) -> RawCpu:
    """Read ``<cpu>`` of a domain with *count* possible vCPUs (None: unknown)."""
    cpu = root.find("cpu")
    if cpu is None:
        return RawCpu()
    says = f"Invalid mode attribute '{cpu.get('mode')}'"
    mode = reader.choice(cpu, "mode", MODES, says=says) or "custom"
    migratable = reader.choice(cpu, "migratable", ("on", "off"))
    if migratable is not None and mode not in MODES_WITHOUT_MODEL:
        says = "Attribute migratable is only allowed for 'host-passthrough' / 'maximum' CPU mode"
        reader.refuse(DomainRule.MIGRATABLE_MODE, cpu, "migratable", says)
    topology = cpu.find("topology")
    levels = None if topology is None else _levels(topology, reader)
    element = cpu.find("model")
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


def _levels(topology: etree._Element, reader: AttributeReader) -> Mapping[str, int] | None:
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


def _features(cpu: etree._Element, reader: AttributeReader, *, has_model: bool) -> Mapping[str, str]:
    elements = cpu.findall("feature")
    if elements and not has_model:
        says = "Non-empty feature list specified without CPU model"
        reader.refuse(DomainRule.FEATURE_WITHOUT_MODEL, elements[0], "name", says)
    features: dict[str, str] = {}
    for element in elements:
        policy = reader.choice(element, "policy", SWITCHES, says="Invalid CPU feature policy") or "require"
        name = element.get("name")
        if not name:
            reader.refuse(DomainRule.FEATURE_WITHOUT_NAME, element, "name", "Invalid CPU feature name")
        elif name in features:
            reader.refuse(DomainRule.FEATURE_TWICE, element, "name", f"CPU feature '{name}' specified more than once")
        else:
            features[name] = policy
    return features


def _cells(root: etree._Element, count: int | None, reader: AttributeReader) -> tuple[NumaCell, ...]:
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
    element: etree._Element, place: int, most: int, reader: AttributeReader, known: Mapping[int, NumaCell]
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


def _refuse_overlap(element: etree._Element, cell: NumaCell, owners: dict[int, int], reader: AttributeReader) -> None:
    reader.count_named(element, cell.cpus)
    shared = [each for each in cell.cpus if each in owners]
    if shared:
        other = min(owners[each] for each in shared)
        says = f"NUMA cells {cell.id} and {other} have overlapping vCPU ids"
        detail = f"vCPU {next(each for each in shared if owners[each] == other)} is in cells {other} and {cell.id}"
        reader.refuse(DomainRule.NUMA_OVERLAP, element, "cpus", says, detail=detail)
    for each in cell.cpus:
        owners.setdefault(each, cell.id)


def _check_distances(cell: etree._Element, number: int, cells: int, reader: AttributeReader) -> None:
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
    cells: list[tuple[etree._Element, NumaCell]], named: int, count: int, reader: AttributeReader
) -> None:
    for element, cell in cells:
        if any(each >= count for each in cell.cpus):
            rule, says = DomainRule.NUMA_ABOVE_MAX, "CPU IDs in <numa> exceed the <vcpu> count"
            if named > count:
                rule, says = DomainRule.NUMA_TOO_MANY, "Number of CPUs in <numa> exceeds the <vcpu> count"
            reader.refuse(rule, element, "cpus", says, detail=f"<vcpu> says {count}")
            return


# Our own note.


def has_mark(root: etree._Element) -> bool:
    """Return True if we wrote the document from a running VM."""
    return root.find(f"metadata/{CPU_MARK}") is not None


def is_as_written(root: etree._Element, model: CpuModel | None) -> bool:
    """Return True if *model*, which the document names, is the one that we wrote."""
    mark = root.find(f"metadata/{CPU_MARK}")
    if mark is None:
        return False
    name = mark.get("model")
    if name is None:  # libvirt fills in its own default
        return model is None or (model.mode == "custom" and model.model in DEFAULT_MODELS.values())
    written = model_named(name)
    return model is not None and (model.mode, model.model) == (written.mode, written.model)


def untold_of(root: etree._Element, model: CpuModel | None) -> str | None:
    """Return what QEMU did not report about the CPU of a document that names *model*; None if it was added since."""
    if not is_as_written(root, model) or (model is not None and model.features):
        return None
    return CPU_MODEL if root.find(f"metadata/{CPU_MARK}[@model]") is None else CPU_FEATURES


# More words of -cpu.

# For an attribute's value the word of -cpu, "" for none; under None what libvirt takes where the attribute is absent.
_Words = Mapping[str | None, str]

_TIMERS: Final[Mapping[str, _Words]] = {
    "kvmclock": {None: "", "yes": "kvmclock=on", "no": "kvmclock=off"},
    "hypervclock": {None: "", "yes": "hv-time=on", "no": ""},
}
_APIC: Final[_Words] = {None: "", "on": "kvm-pv-eoi=on", "off": "kvm-pv-eoi=off"}
_PVSPINLOCK: Final[_Words] = {None: "kvm-pv-unhalt=on", "on": "kvm-pv-unhalt=on", "off": "kvm-pv-unhalt=off"}
_HYPERV_MODE: Final[_Words] = {None: "", "custom": "", "passthrough": "hv-passthrough=on"}
# In libvirt's order.
_HYPERV: Final[Mapping[str, str]] = {
    "relaxed": "hv-relaxed=on",
    "vapic": "hv-vapic=on",
    "spinlocks": "hv-spinlocks={retries:#x}",
    "vpindex": "hv-vpindex=on",
    "runtime": "hv-runtime=on",
    "synic": "hv-synic=on",
    "stimer": "hv-stimer=on",
    "reset": "hv-reset=on",
    "vendor_id": "hv-vendor-id={value}",
    "frequencies": "hv-frequencies=on",
    "reenlightenment": "hv-reenlightenment=on",
    "tlbflush": "hv-tlbflush=on",
    "ipi": "hv-ipi=on",
    "evmcs": "hv-evmcs=on",
    "avic": "hv-avic=on",
}
_KVM: Final[Mapping[str, _Words]] = {
    "hidden": {"on": "kvm=off", "off": ""},
    "hint-dedicated": {"on": "kvm-hint-dedicated=on", "off": ""},
    "poll-control": {"on": "kvm-poll-control=on", "off": ""},
    "pv-ipi": {"on": "", "off": "kvm-pv-ipi=off"},
}
_PMU: Final[_Words] = {None: "pmu=on", "on": "pmu=on", "off": "pmu=off"}
_QEMU: Final = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_OF_VCPUS: Final = frozenset({"-cpu", "-smp", "-numa"})
_CPU_DEVICE: Final = re.compile(r"[^,]*-(?:cpu|cpu-core)(?:,|$)|\{.*-(?:cpu|cpu-core)\"")


class CpuOptions:
    """The words that a document asks for, read when this is made.

    Args:
        root: The document.
        model: The model that it names, or None.
        arch: libvirt's name of its architecture.

    Attributes:
        words: The words, in libvirt's order.
        unread: Where the document asks for more, as paths.
    """

    def __init__(self, root: etree._Element, model: CpuModel | None, arch: str) -> None:
        self.words: list[str] = []
        self.unread: dict[str, None] = {}
        self._root = root
        self._is_x86 = arch in X86
        self._is_host = model is not None and model.mode in MODES_WITHOUT_MODEL
        for timer in root.iterfind("clock/timer"):
            self._timer(timer)
        for element in self._last("features/apic"):
            self._switch("features/apic", element, "eoi", _APIC)
        for element in self._last("features/pvspinlock"):
            self._switch("features/pvspinlock", element, "state", _PVSPINLOCK)
        self._hyperv()
        if root.find("devices/panic[@model='hyperv']") is not None:
            self._add("devices/panic[@model='hyperv']", "hv-crash")
        self._kvm()
        for element in self._last("features/pmu"):
            self._switch("features/pmu", element, "state", _PMU, everywhere=True)
        self._cache()
        self._physical_address()
        named = root.find("cpu/model")
        if (
            named is not None
            and named.get("vendor_id")
            and not self._is_host
            and (model is None or not model.vendor_id)
        ):
            self.unread["cpu/model[@vendor_id]"] = None
        self.unread |= {path: None for path in _UNREAD if root.find(path) is not None}
        given = [each.get("value", "") for each in root.iterfind(f"{_QEMU}commandline/{_QEMU}arg")]
        if any(each.replace("--", "-", 1) in _OF_VCPUS or _CPU_DEVICE.match(each) for each in given):
            self.unread["qemu:commandline"] = None

    def _add(self, path: str, word: str, *, everywhere: bool = False) -> None:
        """Take a *word*; on other architectures than x86 libvirt has words of its own."""
        if word and (self._is_x86 or everywhere):
            self.words.append(word)
        elif word:
            self.unread[path] = None

    def _switch(
        self, path: str, element: etree._Element, attribute: str, words: _Words, *, everywhere: bool = False
    ) -> None:
        word = words.get(element.get(attribute))
        if word is None:
            self.unread[path] = None
        else:
            self._add(path, word, everywhere=everywhere)

    def _last(self, path: str) -> list[etree._Element]:
        """Return the last element at *path*, which is the one that libvirt heeds."""
        return self._root.findall(path)[-1:]

    def _timer(self, timer: etree._Element) -> None:
        name = timer.get("name", "")
        path = f"clock/timer[@name='{name}']"
        if name in _TIMERS:
            self._switch(path, timer, "present", _TIMERS[name])
        elif name == "tsc" and "frequency" in timer.attrib:
            frequency = unsigned(timer.get("frequency", ""))
            if frequency is None or frequency >= 2**63:
                self.unread[path] = None
            elif frequency:
                self._add(path, f"tsc-frequency={frequency}")
        elif name == "armvtimer":
            self.unread[path] = None

    def _hyperv(self) -> None:
        for element in self._last("features/hyperv"):
            self._switch("features/hyperv", element, "mode", _HYPERV_MODE)
        found = {str(each.tag): each for each in self._root.iterfind("features/hyperv/*")}
        if not found.keys() <= _HYPERV.keys():
            self.unread["features/hyperv"] = None
        for name, word in _HYPERV.items():
            if name in found:
                self._enlightenment(f"features/hyperv/{name}", found[name], word)

    def _enlightenment(self, path: str, element: etree._Element, word: str) -> None:
        if element.get("state") == "on":
            retries, value = unsigned(element.get("retries", "")), element.get("value")
            if "{retries" in word and (retries is None or retries >= 2**32):
                self.unread[path] = None
                return
            if "{value" in word and (value is None or not _TEXT.fullmatch(value)):
                self.unread[path] = None
                return
            word = word.format(retries=retries, value=value)
        self._switch(path, element, "state", {"on": word, "off": ""})
        if element.get("state") != "on":
            return
        for child in element.iterchildren("*"):
            if (element.tag, child.tag) == ("stimer", "direct"):
                self._switch(path, child, "state", {"on": "hv-stimer-direct=on", "off": ""})
            else:
                self.unread[path] = None

    def _kvm(self) -> None:
        found = {str(each.tag): each for each in self._root.iterfind("features/kvm/*")}
        if not found.keys() <= _KVM.keys():
            self.unread["features/kvm"] = None
        for name, words in _KVM.items():
            if name in found:
                self._switch(f"features/kvm/{name}", found[name], "state", words)

    def _cache(self) -> None:
        cache = self._root.find("cpu/cache")
        if cache is None:
            return
        off = ["host-cache-info=off"] if self._is_host else []
        match cache.get("mode"), cache.get("level"):
            case "emulate", "3":
                words = ["l3-cache=on", *off]
            case "passthrough", None if off:
                words = ["host-cache-info=on", "l3-cache=off"]
            case "disable", None:
                words = [*off, "l3-cache=off"]
            case _:
                self.unread["cpu/cache"] = None
                return
        for word in words:
            self._add("cpu/cache", word)

    def _physical_address(self) -> None:
        size = self._root.find("cpu/maxphysaddr")
        if size is None:
            return
        match size.get("mode"), size.get("bits"), size.get("limit"):
            case "emulate", str(bits), None if re.fullmatch("[0-9]{1,2}", bits):
                self._add("cpu/maxphysaddr", f"phys-bits={int(bits)}")
            case "passthrough", None, None:
                self._add("cpu/maxphysaddr", "host-phys-bits=on")
            case _:
                self.unread["cpu/maxphysaddr"] = None
