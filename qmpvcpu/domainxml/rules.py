"""libvirt's rules for vCPUs: those by which it refuses to define a domain document, and to start it."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from lxml import etree

from qmpvcpu.domainxml.attributes import Fields
from qmpvcpu.domainxml.document import Contents, Row, Tune, read_contents
from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
from qmpvcpu.domainxml.safe_xml import parse_safely, text_of
from qmpvcpu.errors import DomainRuleError

_UINT_MAX = 2**32 - 1
_UUID = re.compile(r"\s*(-*[0-9a-fA-F]{2}){16}\s*", re.ASCII)
_TYPES = frozenset({"kvm", "qemu"})
_OTHER_TYPES = frozenset(
    "none kqemu xen lxc uml openvz test vmware hyperv vbox phyp parallels bhyve vz hvf".split()  # noqa: SIM905 - legible
)
_X86 = frozenset({"x86_64", "i686"})
_MOST_WITHOUT_EIM = 255

# Measured with query-machines of QEMU 7.2, 10.0 and 11.1; machine types of distributions are theirs to know.
_LIMITS = {"isapc": 1, "microvm": 288, "pc": 255, "s390-ccw-virtio": 248}
_VERSIONED = re.compile(r"(pc-i440fx|pc-q35|s390-ccw-virtio)-([0-9]{1,3})\.([0-9]{1,3})(\.[0-9]{1,3})?")
_Q35_LIMITS = (((9, 0), 4096), ((8, 1), 1024), ((2, 8), 288), ((0, 0), 255))

# In the order in which libvirt checks them.
_RANGES = {
    "shares": (2, 262144),
    "period": (1000, 1_000_000),
    "global_period": (1000, 1_000_000),
    "emulator_period": (1000, 1_000_000),
    "iothread_period": (1000, 1_000_000),
    "quota": (1000, 2**44 - 1),
    "global_quota": (1000, 2**44 - 1),
    "emulator_quota": (1000, 2**44 - 1),
    "iothread_quota": (1000, 2**44 - 1),
}


def validate(xml: bytes) -> tuple[DomainRuleError, ...]:
    """Return the rules of libvirt's for vCPUs that a domain document breaks, the first thousand of them.

    Those for which it is refused at define come first, in the order in which libvirt would come upon them, had the
    others been kept; then those for which libvirt takes it, and refuses to start it. What only the host knows (its
    CPUs, its QEMU, the machine types of distributions) is not looked at, nor what is no matter of vCPUs.

    Args:
        xml: The document, in UTF-8; the caller bounds its size.

    Raises:
        DomainXmlError: Not well-formed, not safe to read, or no ``<domain>``; ``line`` says where.
    Source:
        Measured with libvirt 9.0.0, which is asked again by ``tests/libvirt/test_generated_domains.py``.

    Example:
        >>> document = b"<domain type='kvm'><name>a</name><vcpu current='3'>2</vcpu></domain>"
        >>> [(error.rule.name, error.attribute, error.line) for error in validate(document)]
        [('CURRENT_ABOVE_MAX', 'current', 1)]
    """
    return examine(xml, at_start=True)[1]


def examine(xml: bytes, *, at_start: bool) -> tuple[Contents, tuple[DomainRuleError, ...]]:
    """Return what stands in a document, and what is wrong with it at define, or also *at_start*.

    Raises:
        DomainXmlError: As ``validate`` does.
    """
    root = parse_safely(xml)
    fields = Fields()
    _identity(root, fields)
    contents = read_contents(root, fields)
    states = _states(contents)
    if states:
        for each in _misplaced(states):
            _refuse_misplaced(states, each, fields, RuleStage.DEFINE)
        _off(states, fields)
    if contents.count is not None:
        is_within_limit = _machine(contents, contents.count, fields)
        _topology(contents, contents.count, fields)
        _whole_cores(contents, states, fields)
        if is_within_limit:
            _eim(contents, contents.count, fields)
    _ranges(contents.tunes, fields)
    if states and at_start:
        _at_start(contents, states, fields)
    return contents, tuple(fields.found)


def _identity(root: etree._Element, fields: Fields) -> None:
    if root.tag != "domain":
        return  # refused where it is read
    given = root.get("type")
    if given not in _TYPES:
        says = "missing domain type attribute" if given is None else f"invalid domain type {given}"
        if given in _OTHER_TYPES:
            says = f"does not support virt type '{given}'"
        fields.refuse(DomainRule.TYPE, root, "type", says=says)
    name = root.find("name")
    if name is None or not text_of(name):
        fields.refuse(DomainRule.NAME, root if name is None else name, says="missing name information")
    uuid = root.find("uuid")
    if uuid is not None and text_of(uuid) and not _UUID.fullmatch(text_of(uuid)):
        fields.refuse(DomainRule.UUID, uuid, value=text_of(uuid), says="malformed uuid element")


def _states(contents: Contents) -> list[Row]:
    """Return the vCPUs as they stand there; none where one cannot be read."""
    if contents.count is None or contents.rows is None:
        return []
    count = contents.count
    if contents.rows:
        vcpus = contents.root.find("vcpus")
        absent = Row(contents.root if vcpus is None else vcpus, enabled=False, hotpluggable=None, order=0)
        return [contents.rows.get(each, absent) for each in range(count)]
    on = count if contents.current is None else contents.current
    element = contents.root if contents.vcpu is None else contents.vcpu
    return [Row(element, each < on, None, 0) for each in range(count)]


@dataclass(frozen=True, slots=True)
class _Misplaced:
    """A vCPU that is not where it may be among the others."""

    number: int
    rule: DomainRule
    attribute: str
    says: str


def _misplaced(states: list[Row]) -> Iterator[_Misplaced]:
    first = states[0]
    if not first.enabled:
        yield _Misplaced(0, DomainRule.VCPU_0_OFF, "enabled", "vcpu 0 can't be offline")
    if first.hotpluggable:
        yield _Misplaced(0, DomainRule.VCPU_0_HOTPLUGGABLE, "hotpluggable", "vcpu0 can't be hotpluggable")
    if first.order > 1:
        yield _Misplaced(0, DomainRule.VCPU_0_NOT_FIRST, "order", "vcpu0 must be enabled first")
    for number, (before, state) in enumerate(pairwise(states), start=1):
        if state.enabled and bool(state.order) != bool(first.order):
            says = "all vcpus must have either set or unset order"
            yield _Misplaced(number, DomainRule.ORDER_INCOMPLETE, "order", says)
        if state.hotpluggable is False and before.hotpluggable:
            says = "online non-hotpluggable vcpus need to be ordered prior to hotplugable vcpus"
            yield _Misplaced(number, DomainRule.STARTED_WITH_AFTER_HOTPLUGGABLE, "hotpluggable", says)
        if state.hotpluggable is False and before.order > state.order:
            says = "online non-hotpluggable vcpus must be ordered in ascending order"
            yield _Misplaced(number, DomainRule.STARTED_WITH_DESCENDING, "order", says)


def _refuse_misplaced(states: list[Row], found: _Misplaced, fields: Fields, stage: RuleStage) -> None:
    element = states[found.number].element
    # Without <vcpus> it is the number of vCPUs that are on.
    name = "current" if "current" in element.attrib else found.attribute
    attribute = name if name in element.attrib else None
    fields.refuse(found.rule, element, attribute, says=found.says, stage=stage)


def _off(states: list[Row], fields: Fields) -> None:
    for number, state in enumerate(states):
        if not state.enabled and state.hotpluggable is False:
            says = f"vcpu '{number}' is both offline and not hotpluggable"
            fields.refuse(DomainRule.OFF_NOT_HOTPLUGGABLE, state.element, "hotpluggable", says=says)


def _machine(contents: Contents, count: int, fields: Fields) -> bool:
    os_type = contents.root.find("os/type")
    machine = "" if os_type is None else os_type.get("machine", "")
    limit = _limit(machine)
    if limit is None or count <= limit or contents.vcpu is None:
        return True
    says = f"Maximum CPUs greater than specified machine type limit {limit}"
    detail = f"that of {machine} is {limit}"
    fields.refuse(DomainRule.MACHINE_LIMIT, contents.vcpu, value=str(count), says=says, detail=detail)
    return False


def _limit(machine: str) -> int | None:
    found = _VERSIONED.fullmatch(machine)
    if machine == "q35":
        return _Q35_LIMITS[0][1]  # which version that is depends on QEMU
    if found is None:
        return _LIMITS.get(machine)
    family, version = found[1], (int(found[2]), int(found[3]))
    if family == "pc-q35":
        return next(limit for since, limit in _Q35_LIMITS if version >= since)
    return _LIMITS["pc" if family == "pc-i440fx" else family]


def _topology(contents: Contents, count: int, fields: Fields) -> None:
    cpu = contents.cpu
    if cpu.levels is None or cpu.topology is None:
        return
    product = math.prod(cpu.levels.values())
    if product != count:
        says = "CPU topology doesn't match maximum vcpu count"
        if product > _UINT_MAX:
            says = f"cpu topology results in more than {_UINT_MAX} cpus"
        detail = f"{product}, and <vcpu> says {count}"
        fields.refuse(DomainRule.TOPOLOGY_PRODUCT, cpu.topology, says=says, detail=detail)


def _core_size(contents: Contents) -> int:
    """How many vCPUs come and go together, as libvirt has it."""
    machine = contents.root.find("os/type")
    if machine is None or contents.cpu.levels is None or contents.count is None:
        return 1
    if machine.get("arch") not in {"ppc64", "ppc64le"} or not machine.get("machine", "pseries").startswith("pseries"):
        return 1
    return contents.cpu.levels["threads"]


def _whole_cores(contents: Contents, states: list[Row], fields: Fields) -> None:
    size = _core_size(contents)
    on = sum(state.enabled for state in states)
    if on % size and contents.vcpu is not None:
        attribute = "current" if "current" in contents.vcpu.attrib else None
        says = f"vCPUs count must be a multiple of the vCPU hotplug granularity ({size})"
        detail = f"{on} are on, and a core has {size}"
        fields.refuse(DomainRule.PART_OF_CORE, contents.vcpu, attribute, says=says, detail=detail)


def _eim(contents: Contents, count: int, fields: Fields) -> None:
    os_type = contents.root.find("os/type")
    if os_type is None or os_type.get("arch") not in _X86 or count <= _MOST_WITHOUT_EIM or contents.vcpu is None:
        return
    is_q35 = os_type.get("machine", "pc").startswith(("q35", "pc-q35-"))
    driver = contents.root.find("devices/iommu/driver")
    if not is_q35 or driver is None or driver.get("eim") != "on":
        says = f"more than {_MOST_WITHOUT_EIM} vCPUs require extended interrupt mode enabled on the iommu device"
        if not is_q35:
            says = f"more than {_MOST_WITHOUT_EIM} vCPUs are only supported on q35-based machine types"
        fields.refuse(DomainRule.EIM_MISSING, contents.vcpu, value=str(count), says=says)


def _ranges(tunes: Mapping[str, Tune], fields: Fields) -> None:
    for name, (low, high) in _RANGES.items():
        tune = tunes.get(name)
        if tune is not None and tune.number > 0 and not low <= tune.number <= high:
            says = f"Value of cputune '{name}' must be in range [{low}, {high}]"
            detail = f"{low} to {high}"
            fields.refuse(DomainRule.TUNE_OUT_OF_RANGE, tune.element, value=tune.text, says=says, detail=detail)


def _at_start(contents: Contents, states: list[Row], fields: Fields) -> None:
    # libvirt checks before it fills in what is not said, takes the document, and reads its own of it again at start.
    filled = [replace(each, hotpluggable=not each.enabled) if each.hotpluggable is None else each for each in states]
    known = {(each.number, each.rule) for each in _misplaced(states)}
    for each in _misplaced(filled):
        # What is said of vCPU 0 is always what stands there.
        if each.number and (each.number, each.rule) not in known:
            _refuse_misplaced(filled, each, fields, RuleStage.START)
    if any(each.enabled and each.hotpluggable for each in filled):
        _slots(filled, _core_size(contents), fields)


def _slots(states: list[Row], size: int, fields: Fields) -> None:
    """Check what libvirt checks once QEMU has told it which vCPUs make a slot; be they on or off."""
    seen: set[int] = set()
    for first in range(0, len(states), size):
        state = states[first]
        if state.order in seen:
            says = f"duplicate vcpu order '{state.order}'"
            fields.refuse(DomainRule.ORDER_TWICE, state.element, "order", says=says, stage=RuleStage.START)
        if state.order > len(states):
            says = f"vcpu order '{state.order}' exceeds vcpu count"
            fields.refuse(DomainRule.ORDER_ABOVE_MAX, state.element, "order", says=says, stage=RuleStage.START)
        if state.order:
            seen.add(state.order)
        for number, other in _others(states, first, size) if size > 1 else ():
            says = f"vcpus '{first}' and '{number}' are in the same hotplug group but differ in configuration"
            detail = f"vCPU {number} is not as vCPU {first}"
            fields.refuse(DomainRule.CORE_DIFFERS, other.element, says=says, detail=detail, stage=RuleStage.START)


def _others(states: list[Row], first: int, size: int) -> Iterator[tuple[int, Row]]:
    state = states[first]
    for number in range(first + 1, min(first + size, len(states))):
        other = states[number]
        if (other.enabled, other.hotpluggable, other.order) != (state.enabled, state.hotpluggable, state.order):
            yield number, other
