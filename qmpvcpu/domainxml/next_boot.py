"""The next boot: the changes that libvirt makes to a domain's persistent definition, and what a VM starts with.

Each function takes what a document says and returns what it should say: the same value where nothing changes. From a
document that libvirt defines and starts, the result is one again. ``docs/next-boot.md`` lists where libvirt does
something else, and why.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod

from qmpvcpu.domainxml.domain import LEVELS, DomainVcpu, DomainVcpus
from qmpvcpu.domainxml.placing import placement_of, with_placement
from qmpvcpu.errors import ConfigDeniedError, DenialReason, DomainXmlError, counted, describe, shorten
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.vcpumap import MOST_VCPUS, VcpuMap, possible_ids

_MOST_QUOTED = 40

# One vCPU of the next boot: enabled, hotpluggable.
_State = tuple[bool, bool]


def start_of(domain: DomainVcpus) -> DomainVcpus:
    """Return *domain* with the vCPUs that its VM is next started with; idempotent.

    In a record these are the vCPUs of the next boot if one was requested, else those of the earlier QEMU while they
    are kept, else those of the running VM. vCPUs that stay keep their place in the order. Their threads run where the
    next boot has them, if that was requested, else where they do now.

    Raises:
        DomainXmlError: The requested next boot does not fit the maximum.
    """
    start = domain
    if domain.previous is not None:
        vcpus = tuple(_rows(domain.previous))
        start = replace(_bounded(domain, len(vcpus)), vcpus=vcpus, individual=True, topology=domain.previous.topology)
    if domain.next_boot is not None:
        try:
            start = with_map(start, domain.next_boot)
        except ConfigDeniedError as error:
            raise DomainXmlError(f"the record requests an impossible next boot: {error}") from error
    if domain.next_placement is not None:
        start = with_placement(start, domain.next_placement)
    return replace(start, previous=None, next_boot=None, next_placement=None)


def _rows(previous: PreviousVcpus) -> Iterator[DomainVcpu]:
    places = {vcpu: place for place, vcpu in enumerate(previous.order, start=1)}
    for each in range(previous.max):
        place = places.get(each)
        yield DomainVcpu(each, place is not None, each not in previous.started_with, place)


def first_free(domain: DomainVcpus) -> int:
    """Return the lowest id of a vCPU that *domain* does not have at the next boot.

    Raises:
        ConfigDeniedError: It has all of them.
    """
    free = next((row.id for row in domain.vcpus if not row.enabled), None)
    if free is None:
        detail = f"{domain.max} of its {counted(domain.max, 'vCPU')} are there at the next boot already"
        raise ConfigDeniedError("plug", VcpuMap(), DenialReason.MACHINE_FULL, detail)
    return free


def slot_of(domain: DomainVcpus, vcpu: int, *, enabled: bool = True) -> VcpuMap:
    """Return the vCPUs of the slot that *vcpu* names.

    Args:
        domain: What the document says.
        vcpu: The first id of the slot.
        enabled: Whether it is to be enabled or disabled, for the error.

    Raises:
        ConfigDeniedError: The document has no such vCPU, or it is not the first of its slot.
    """
    asked = _asked([vcpu], enabled=enabled)
    size = domain.slot_size
    if not 0 <= vcpu < domain.max:
        raise _unknown(domain, asked, [vcpu])
    ids = VcpuMap(range(vcpu - vcpu % size, vcpu - vcpu % size + size))
    if vcpu % size:
        detail = f"vCPUs {ids} are one slot: name it by vCPU {min(ids)}"
        raise ConfigDeniedError(asked, ids, DenialReason.PART_OF_SLOT, detail)
    return ids


def with_map(domain: DomainVcpus, target: Iterable[int]) -> DomainVcpus:
    """Return *domain* with exactly the vCPUs of *target* enabled.

    Newly enabled vCPUs are hotpluggable, as with libvirt's ``setVcpu``, and so are all that are enabled after a hole.

    Raises:
        InvalidMapError: *target* holds something other than vCPU ids.
        ConfigDeniedError: vCPU 0 is missing, an id is beyond the maximum, or only part of a slot is in it.
    """
    ids = VcpuMap(target)
    asked = f"map {ids or 'empty'}"
    _check_known(domain, asked, ids)
    if 0 not in ids:
        raise _first_stays(asked)
    _check_whole(domain, asked, ids)
    return _with_enabled(domain, ids)


def with_state(domain: DomainVcpus, vcpus: Iterable[int], *, enabled: bool) -> DomainVcpus:
    """Return *domain* with these vCPUs enabled or disabled; the others stay.

    Raises:
        InvalidMapError: *vcpus* holds something other than vCPU ids.
        ConfigDeniedError: vCPU 0 would be disabled, an id is beyond the maximum, or only part of a slot is named.

    Source: libvirt, virDomainSetVcpu with VIR_DOMAIN_AFFECT_CONFIG, measured with libvirt 9.0.0.
    """
    named = VcpuMap(vcpus)
    asked = _asked(named, enabled=enabled)
    _check_known(domain, asked, named)
    if not enabled and 0 in named:
        raise _first_stays(asked)
    _check_whole(domain, asked, named)
    return _with_enabled(domain, domain.enabled | named if enabled else domain.enabled - named)


def with_count(domain: DomainVcpus, count: int, *, hotpluggable: bool = False) -> DomainVcpus:
    """Return *domain* with *count* vCPUs enabled: the lowest free ones are added, the highest removed.

    QEMU boots with those added, unless one before them is hotpluggable.

    Args:
        domain: What the document says.
        count: How many; vCPU 0 is always one of them.
        hotpluggable: Plug those added before the guest runs, so that they can be unplugged.

    Raises:
        ConfigDeniedError: *count* is not 1 to the maximum, or would split a slot.

    Source: libvirt, virDomainSetVcpusFlags with VIR_DOMAIN_AFFECT_CONFIG, measured with libvirt 9.0.0.
    """
    asked = f"count {shorten(count, _MOST_QUOTED)}"
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= domain.max:
        detail = f"the document has 1 to {counted(domain.max, 'vCPU')}"
        raise ConfigDeniedError(asked, VcpuMap(), DenialReason.UNKNOWN_VCPU, detail)
    size = domain.slot_size
    states = _states(domain)
    missing = count - domain.current
    if missing % size:
        below = domain.current + missing // size * size
        nearest = " and ".join(str(each) for each in (below, below + size) if 1 <= each <= domain.max)
        detail = f"slots of {size} vCPUs are plugged whole: {nearest} are possible"
        raise ConfigDeniedError(asked, VcpuMap(), DenialReason.COUNT_SPLITS_SLOT, detail)
    ids = range(domain.max) if missing > 0 else range(domain.max - 1, -1, -1)
    late = hotpluggable
    for each in ids:
        enabled, is_late = states[each]
        late |= missing > 0 and enabled and is_late
        if missing > 0 and not enabled:
            states[each] = (True, late)
            missing -= 1
        elif missing < 0 and enabled:
            states[each] = (False, True)
            missing += 1
    return _rebuilt(domain, states)


def with_max(domain: DomainVcpus, maximum: int) -> DomainVcpus:
    """Return *domain* with a maximum of *maximum* vCPUs.

    New ones are disabled, and in NUMA cell 0 if there are cells. Those above a lower maximum are dropped, enabled or
    not, with their pins and schedulers.

    Raises:
        ConfigDeniedError: *maximum* is not 1 to 16384, is not that of the topology, or excludes a vCPU of a cell.

    Source: libvirt, virDomainSetVcpusFlags with VIR_DOMAIN_VCPU_MAXIMUM, measured with libvirt 9.0.0.
    """
    asked = f"maximum {shorten(maximum, _MOST_QUOTED)}"
    if isinstance(maximum, bool) or not isinstance(maximum, int) or not 1 <= maximum <= MOST_VCPUS:
        detail = f"a document has a maximum of 1 to {MOST_VCPUS} vCPUs"
        raise ConfigDeniedError(asked, VcpuMap(), DenialReason.UNKNOWN_VCPU, detail)
    if maximum == domain.max:
        return domain
    size = maximum if domain.topology is None else prod(getattr(domain.topology, level) for level in LEVELS)
    if size != maximum:
        detail = (
            f"the document's <topology> has {counted(size, 'vCPU')}, and libvirt accepts no other maximum with it:"
            " change or remove it first"
        )
        raise ConfigDeniedError(asked, VcpuMap(), DenialReason.TOPOLOGY_MISMATCH, detail)
    for cell in domain.numa:
        beyond = VcpuMap(each for each in cell.cpus if each >= maximum)
        if beyond:
            detail = f"NUMA cell {cell.id} has vCPUs {beyond}"
            raise ConfigDeniedError(asked, beyond, DenialReason.NUMA_MISMATCH, detail)
    more = range(domain.max, maximum)
    rows = (*domain.vcpus[:maximum], *(DomainVcpu(each, enabled=False, hotpluggable=True) for each in more))
    resized = replace(
        _bounded(domain, maximum),
        vcpus=rows,
        numa=tuple(
            replace(cell, cpus=VcpuMap([*cell.cpus, *more])) if cell.id == 0 else cell for cell in domain.numa
        ),
    )
    return _rebuilt(resized, _states(resized))


def with_places(domain: DomainVcpus, placement: Placement) -> DomainVcpus:
    """Return *domain* with its threads where *placement* has them; what that does not say stays as it is.

    Raises:
        ConfigDeniedError: It names a vCPU beyond the maximum.
        DomainXmlError: *domain* has a priority that no kernel has.
        ValueError: The sets of an exclusive placement overlap with those of *domain*.

    Source: libvirt, virDomainPinVcpuFlags and virDomainPinEmulator with VIR_DOMAIN_AFFECT_CONFIG, measured with
        libvirt 9.0.0.
    """
    if beyond := [vcpu for vcpu in placement.vcpus if vcpu >= domain.max]:
        raise _unknown(domain, describe("placement", beyond), beyond)
    return with_placement(domain, placement.over(placement_of(domain)))


def _bounded(domain: DomainVcpus, maximum: int) -> DomainVcpus:
    """Return *domain* without pins and schedulers of vCPUs from *maximum* on."""
    return replace(
        domain,
        pins={vcpu: pin for vcpu, pin in domain.pins.items() if vcpu < maximum},
        scheds={vcpu: sched for vcpu, sched in domain.scheds.items() if vcpu < maximum},
    )


def _with_enabled(domain: DomainVcpus, ids: Collection[int]) -> DomainVcpus:
    states = [(vcpu.id in ids, vcpu.hotpluggable or vcpu.enabled != (vcpu.id in ids)) for vcpu in domain.vcpus]
    changed = _rebuilt(domain, states)
    return changed if changed is domain else replace(changed, individual=True)


def _rebuilt(domain: DomainVcpus, states: Sequence[_State]) -> DomainVcpus:
    """Return *domain* with its vCPUs in these *states*, made acceptable to libvirt; itself if nothing changes."""
    # libvirt boots QEMU with the unbroken run from vCPU 0 on, and refuses a document that says otherwise.
    broken = False
    followed: list[_State] = []
    for each, (enabled, hotpluggable) in enumerate(states):
        broken |= each > 0 and (not enabled or hotpluggable)
        followed.append((enabled, broken))
    size = domain.slot_size
    if followed == _states(domain) and _startable(domain.vcpus, size):
        return domain
    late = any(enabled and hotpluggable for enabled, hotpluggable in followed)
    return replace(domain, vcpus=_ordered(followed, domain.vcpus, size), individual=domain.individual or late)


def _states(domain: DomainVcpus) -> list[_State]:
    return [(row.enabled, row.hotpluggable) for row in domain.vcpus]


def _startable(rows: Sequence[DomainVcpu], size: int) -> bool:
    """Return False if libvirt would define these orders and then refuse to start the domain."""
    orders = [row.order for row in rows[::size] if row.order is not None]
    return len(set(orders)) == len(orders) and all(order <= len(rows) for order in orders)


def _ordered(states: Sequence[_State], before: Sequence[DomainVcpu], size: int) -> tuple[DomainVcpu, ...]:
    """Return rows in these *states*, with orders if *before* has some.

    vCPUs that stay keep their place, and others follow. libvirt clears all orders here, and so starts a VM whose
    vCPUs are created in another order.
    """
    if all(row.order is None for row in before):
        return tuple(DomainVcpu(each, *state) for each, state in enumerate(states))
    present = [row for row in before[::size] if states[row.id][0]]
    present.sort(
        key=lambda row: (
            states[row.id][1],  # boot vCPUs come first, in the order of their ids
            states[row.id][1] and (row.order is None or not row.enabled),
            (states[row.id][1] and row.order) or 0,
            row.id,
        )
    )
    places = {row.id: place for place, row in enumerate(present, start=1)}
    return tuple(DomainVcpu(each, *state, places.get(each - each % size)) for each, state in enumerate(states))


def _asked(vcpus: Iterable[int], *, enabled: bool) -> str:
    return describe("plug" if enabled else "unplug", tuple(vcpus))


def _unknown(domain: DomainVcpus, asked: str, ids: Iterable[int]) -> ConfigDeniedError:
    detail = f"the document has vCPUs 0 to {domain.max - 1}"
    return ConfigDeniedError(asked, possible_ids(ids), DenialReason.UNKNOWN_VCPU, detail)


def _first_stays(asked: str) -> ConfigDeniedError:
    detail = "vCPU 0 boots the VM and is always enabled"
    return ConfigDeniedError(asked, VcpuMap([0]), DenialReason.BOOT_VCPU, detail)


def _check_known(domain: DomainVcpus, asked: str, ids: VcpuMap) -> None:
    beyond = VcpuMap(each for each in ids if each >= domain.max)
    if beyond:
        raise _unknown(domain, asked, beyond)


def _check_whole(domain: DomainVcpus, asked: str, ids: VcpuMap) -> None:
    """Deny part of a slot, which libvirt notices only at the next start."""
    size = domain.slot_size
    for first in range(0, domain.max, size) if size > 1 else ():
        whole = VcpuMap(range(first, min(first + size, domain.max)))
        inside = whole & ids
        if 0 < len(inside) < size:
            detail = f"vCPUs {whole} are one slot: {inside} named, {whole - inside} not"
            raise ConfigDeniedError(asked, whole, DenialReason.PART_OF_SLOT, detail)
