"""libvirt's rules for vCPUs: why it refuses to define a domain document, or to start it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from lxml import etree

from qmpvcpu.domainxml.attributes import UINT_MAX, AttributeReader
from qmpvcpu.domainxml.cpu import needs_kvm
from qmpvcpu.domainxml.document import RawDomain, RawSched, RawTune, RawVcpu, read_domain, refuse_in_name
from qmpvcpu.domainxml.domain import MOST_WITHOUT_EIM, X86, DomainVcpu, has_cores
from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
from qmpvcpu.domainxml.safe_xml import parse_safely
from qmpvcpu.errors import DomainRuleError
from qmpvcpu.model.placement import HIGHEST_PRIORITY, LOWEST_PRIORITY

# Measured with query-machines of QEMU 7.2, 10.0 and 11.1; distributions have machine types of their own.
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
    """Return libvirt's rules for vCPUs that a domain document breaks, the first thousand of them.

    Rules that make libvirt refuse the definition come first, in the order in which libvirt checks them. Rules that
    make it refuse to start a domain that it has defined come after them. What depends on the host (its CPUs, its
    QEMU, a distribution's machine types) is not checked, nor what has nothing to do with vCPUs.

    Args:
        xml: The document, in UTF-8; the caller bounds its size.

    Raises:
        DomainXmlError: Not well-formed, not safe to read, or not a ``<domain>``; ``line`` says where.
    Source:
        Measured with libvirt 9.0.0; ``tests/libvirt/test_generated_domains.py`` compares the two.

    Example:
        >>> document = b"<domain type='kvm'><name>a</name><vcpu current='3'>2</vcpu></domain>"
        >>> [(error.rule.name, error.attribute, error.line) for error in validate(document)]
        [('CURRENT_ABOVE_MAX', 'current', 1)]
    """
    return examine(parse_safely(xml), at_start=True)[1]


def examine(root: etree._Element, *, at_start: bool) -> tuple[RawDomain, tuple[DomainRuleError, ...]]:
    """Return what a document says, and the rules that it breaks at define, or also *at_start*.

    Raises:
        DomainXmlError: Not a ``<domain>``, or too much of one.
    """
    reader = AttributeReader()
    raw = read_domain(root, reader)
    states = _states(raw)
    for each in broken_states(states):
        _refuse_state(states, each, reader, RuleStage.DEFINE)
    refuse_in_name(root, raw.name, "/", reader)
    product = math.prod(raw.cpu.levels.values()) if raw.cpu.levels else raw.count or 0
    if raw.count is not None:
        is_within_limit = _machine(raw, raw.count, reader)
        if product <= UINT_MAX:
            _topology(raw, product, "CPU topology doesn't match maximum vcpu count", reader)
        _whole_cores(raw, states, reader)
        if is_within_limit:
            _eim(raw, raw.count, reader)
    if raw.group is not None and root.get("type") == "qemu":
        says = "cachetune is only supported for KVM domains"
        reader.refuse(DomainRule.GROUPS_WITHOUT_KVM, raw.group, None, says)
    if raw.count is not None and product > UINT_MAX:  # which libvirt finds by counting again
        _topology(raw, product, f"cpu topology results in more than {UINT_MAX} cpus", reader)
    _ranges(raw.tunes, reader)
    refuse_in_name(root, raw.name, "\n", reader)
    if at_start:
        _at_start(raw, states, reader)
    return raw, tuple(reader.broken)


# hotpluggable may be unsaid (None), and an order of 0 or None is none.
VcpuState = RawVcpu | DomainVcpu


class BrokenState(NamedTuple):
    """A vCPU that may not be in its state, given the others.

    Attributes:
        vcpu: Its id.
        rule: The rule that it breaks.
        attribute: The attribute of its row that is at fault.
        says: libvirt's message.
    """

    vcpu: int
    rule: DomainRule
    attribute: str
    says: str


def broken_states(states: Sequence[VcpuState]) -> Iterator[BrokenState]:
    """Return the rules that the states of all vCPUs, by id, break at define; in libvirt's order."""
    for first in states[:1]:
        yield from _broken_first(first)
    for vcpu, (before, state) in enumerate(pairwise(states), start=1):
        if state.enabled and bool(state.order) != bool(states[0].order):
            says = "all vcpus must have either set or unset order"
            yield BrokenState(vcpu, DomainRule.ORDER_INCOMPLETE, "order", says)
        if state.hotpluggable is not False:
            continue
        if before.hotpluggable:
            says = "online non-hotpluggable vcpus need to be ordered prior to hotplugable vcpus"
            yield BrokenState(vcpu, DomainRule.STARTED_WITH_AFTER_HOTPLUGGABLE, "hotpluggable", says)
        if (before.order or 0) > (state.order or 0):
            says = "online non-hotpluggable vcpus must be ordered in ascending order"
            yield BrokenState(vcpu, DomainRule.STARTED_WITH_DESCENDING, "order", says)
    for vcpu, state in enumerate(states):
        if not state.enabled and state.hotpluggable is False:
            says = f"vcpu '{vcpu}' is both offline and not hotpluggable"
            yield BrokenState(vcpu, DomainRule.OFF_NOT_HOTPLUGGABLE, "hotpluggable", says)


def _broken_first(first: VcpuState) -> Iterator[BrokenState]:
    if not first.enabled:
        yield BrokenState(0, DomainRule.VCPU_0_OFF, "enabled", "vcpu 0 can't be offline")
    if first.hotpluggable:
        yield BrokenState(0, DomainRule.VCPU_0_HOTPLUGGABLE, "hotpluggable", "vcpu0 can't be hotpluggable")
    if (first.order or 0) > 1:
        yield BrokenState(0, DomainRule.VCPU_0_NOT_FIRST, "order", "vcpu0 must be enabled first")


def _states(raw: RawDomain) -> list[RawVcpu]:
    """Return the state of each vCPU as written; none where one cannot be read."""
    if raw.count is None or raw.rows is None:
        return []
    if raw.rows:
        vcpus = raw.root.find("vcpus")
        absent = RawVcpu(raw.root if vcpus is None else vcpus, enabled=False, hotpluggable=None, order=0)
        return [raw.rows.get(each, absent) for each in range(raw.count)]
    enabled = raw.count if raw.current is None else raw.current
    element = raw.root if raw.vcpu is None else raw.vcpu
    return [RawVcpu(element, each < enabled, None, 0) for each in range(raw.count)]


def _refuse_state(states: list[RawVcpu], broken: BrokenState, reader: AttributeReader, stage: RuleStage) -> None:
    element = states[broken.vcpu].element
    # Without <vcpus> the number of vCPUs that are on is at fault.
    name = "current" if "current" in element.attrib else broken.attribute
    attribute = name if name in element.attrib else None
    reader.refuse(broken.rule, element, attribute, broken.says, stage=stage)


def _machine(raw: RawDomain, count: int, reader: AttributeReader) -> bool:
    os_type = raw.root.find("os/type")
    machine = "" if os_type is None else os_type.get("machine", "")
    limit = _limit(machine)
    if limit is None or count <= limit or raw.vcpu is None:
        return True
    says = f"Maximum CPUs greater than specified machine type limit {limit}"
    detail = f"that of {machine} is {limit}"
    reader.refuse(DomainRule.MACHINE_LIMIT, raw.vcpu, None, says, value=str(count), detail=detail)
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


def _topology(raw: RawDomain, product: int, says: str, reader: AttributeReader) -> None:
    if product != raw.count and raw.cpu.topology is not None:
        detail = f"{product}, and <vcpu> says {raw.count}"
        reader.refuse(DomainRule.TOPOLOGY_PRODUCT, raw.cpu.topology, None, says, detail=detail)


def _core_size(raw: RawDomain) -> int:
    """Return how many vCPUs libvirt plugs and unplugs together."""
    machine = raw.root.find("os/type")
    if machine is None or raw.cpu.levels is None or not has_cores(machine.get("arch"), machine.get("machine")):
        return 1
    return raw.cpu.levels["threads"]


def _whole_cores(raw: RawDomain, states: list[RawVcpu], reader: AttributeReader) -> None:
    size = _core_size(raw)
    on = sum(state.enabled for state in states)
    if on % size and raw.vcpu is not None:
        attribute = "current" if "current" in raw.vcpu.attrib else None
        says = f"vCPUs count must be a multiple of the vCPU hotplug granularity ({size})"
        detail = f"{on} are on, and a core has {size}"
        reader.refuse(DomainRule.PART_OF_CORE, raw.vcpu, attribute, says, detail=detail)


def _eim(raw: RawDomain, count: int, reader: AttributeReader) -> None:
    os_type = raw.root.find("os/type")
    if os_type is None or os_type.get("arch") not in X86 or count <= MOST_WITHOUT_EIM or raw.vcpu is None:
        return
    is_q35 = os_type.get("machine", "pc").startswith(("q35", "pc-q35-"))
    driver = raw.root.find("devices/iommu/driver")
    if not is_q35 or driver is None or driver.get("eim") != "on":
        says = f"more than {MOST_WITHOUT_EIM} vCPUs require extended interrupt mode enabled on the iommu device"
        if not is_q35:
            says = f"more than {MOST_WITHOUT_EIM} vCPUs are only supported on q35-based machine types"
        reader.refuse(DomainRule.EIM_MISSING, raw.vcpu, None, says, value=str(count))


def _ranges(tunes: Mapping[str, RawTune], reader: AttributeReader) -> None:
    for name, (low, high) in _RANGES.items():
        tune = tunes.get(name)
        if tune is not None and tune.number > 0 and not low <= tune.number <= high:
            says = f"Value of cputune '{name}' must be in range [{low}, {high}]"
            detail = f"{low} to {high}"
            reader.refuse(DomainRule.TUNE_OUT_OF_RANGE, tune.element, None, says, value=tune.text, detail=detail)


def _at_start(raw: RawDomain, states: list[RawVcpu], reader: AttributeReader) -> None:
    # libvirt checks before it fills in what is unsaid, accepts the document, and reads its own version at start.
    filled = [each._replace(hotpluggable=not each.enabled) if each.hotpluggable is None else each for each in states]
    known = {(each.vcpu, each.rule) for each in broken_states(states)}
    for each in broken_states(filled):
        # Nothing is filled in for vCPU 0.
        if each.vcpu and (each.vcpu, each.rule) not in known:
            _refuse_state(filled, each, reader, RuleStage.START)
    cpu = raw.root.find("cpu")
    if cpu is not None and needs_kvm(raw.cpu.model) and raw.root.get("type") == "qemu":
        says = "CPU mode 'host-passthrough'"  # and then the architectures of guest and host, which are not at fault
        detail = "'maximum' is the nearest to it without KVM"
        reader.refuse(DomainRule.PASSTHROUGH_WITHOUT_KVM, cpu, "mode", says, detail=detail, stage=RuleStage.START)
    # The main thread is there first, then vCPUs are plugged, then those that are enabled are scheduled.
    _priority(raw.emulator_sched, reader)
    if any(each.enabled and each.hotpluggable for each in filled):
        _slots(filled, _core_size(raw), reader)
    enabled = (raw.scheds[each] for each in sorted(raw.scheds) if each < len(states) and states[each].enabled)
    for sched in {each.element: each for each in enabled}.values():
        _priority(sched, reader)


def _priority(raw: RawSched | None, reader: AttributeReader) -> None:
    priority = None if raw is None else raw.sched.priority
    if raw is not None and priority is not None and not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        says = f"Scheduler priority {priority} out of range [{LOWEST_PRIORITY}, {HIGHEST_PRIORITY}]"
        reader.refuse(DomainRule.PRIORITY_OUT_OF_RANGE, raw.element, "priority", says, stage=RuleStage.START)


def _slots(states: list[RawVcpu], size: int, reader: AttributeReader) -> None:
    """Check what libvirt checks once QEMU has told it which vCPUs make a slot, enabled or not."""
    seen: set[int] = set()
    for first in range(0, len(states), size):
        state = states[first]
        if state.order in seen:
            says = f"duplicate vcpu order '{state.order}'"
            reader.refuse(DomainRule.ORDER_TWICE, state.element, "order", says, stage=RuleStage.START)
        if state.order > len(states):
            says = f"vcpu order '{state.order}' exceeds vcpu count"
            reader.refuse(DomainRule.ORDER_ABOVE_MAX, state.element, "order", says, stage=RuleStage.START)
        if state.order:
            seen.add(state.order)
        for number, other in _others(states, first, size) if size > 1 else ():
            says = f"vcpus '{first}' and '{number}' are in the same hotplug group but differ in configuration"
            detail = f"vCPU {number} is not as vCPU {first}"
            reader.refuse(DomainRule.CORE_DIFFERS, other.element, None, says, detail=detail, stage=RuleStage.START)


def _others(states: list[RawVcpu], first: int, size: int) -> Iterator[tuple[int, RawVcpu]]:
    state = states[first]
    for number in range(first + 1, min(first + size, len(states))):
        other = states[number]
        if (other.enabled, other.hotpluggable, other.order) != (state.enabled, state.hotpluggable, state.order):
            yield number, other
