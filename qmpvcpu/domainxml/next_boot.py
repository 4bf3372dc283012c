"""What the next boot shall have: the changes that libvirt makes to the persistent definition of a domain.

Each takes what a document says, and returns what it is to say: the same value where nothing is to change. What comes
out of a document that libvirt defines and starts is one again. Where libvirt itself does something else is in
``docs/next-boot.md``, with the reason.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from qmpvcpu.domainxml.domain import DomainVcpu, DomainVcpus
from qmpvcpu.errors import ConfigDeniedError, DenialReason, DomainXmlError, describe, shorten
from qmpvcpu.model.vcpumap import VcpuMap, possible_ids
from qmpvcpu.model.vmstate import PreviousVcpus

# Where the slots of the machine are its cores; elsewhere each thread is a slot of its own.
_CORE_ARCHES = frozenset({"ppc64", "ppc64le"})
_MOST_VCPUS = 16384
_MOST_QUOTED = 40

# One vCPU of the next boot: enabled, hotpluggable.
_State = tuple[bool, bool]


def slot_of(domain: DomainVcpus, vcpu: int, *, enabled: bool = True) -> VcpuMap:
    """Return the vCPUs that move with *vcpu*, which names their slot.

    Args:
        domain: What the document says.
        vcpu: The first id of the slot.
        enabled: What is wanted of it, for the error.

    Raises:
        ConfigDeniedError: The document has no such vCPU, or it is not the first of its slot.
    """
    asked = _asked([vcpu], enabled=enabled)
    size = _slot_size(domain)
    if not 0 <= vcpu < domain.max:
        raise _unknown(domain, asked, [vcpu])
    ids = VcpuMap(range(vcpu - vcpu % size, vcpu - vcpu % size + size))
    if vcpu % size:
        detail = f"vCPUs {ids} are one slot and move together: name it by vCPU {min(ids)}"
        raise ConfigDeniedError(asked, ids, DenialReason.PART_OF_SLOT, detail)
    return ids


def with_map(domain: DomainVcpus, wish: Iterable[int]) -> DomainVcpus:
    """Return *domain* with exactly the vCPUs of *wish* enabled.

    One that comes is hotpluggable, as of libvirt's ``setVcpu``, and so is whatever is enabled after a hole.

    Raises:
        InvalidMapError: *wish* holds what is no vCPU id.
        ConfigDeniedError: vCPU 0 is not in it, one is beyond the maximum, or a slot is in it in part.
    """
    target = VcpuMap(wish)
    asked = f"map {target or 'empty'}"
    _check_known(domain, asked, target)
    if 0 not in target:
        raise _first_stays(asked)
    _check_whole(domain, asked, target)
    return _with_enabled(domain, target)


def with_state(domain: DomainVcpus, vcpus: Iterable[int], *, enabled: bool) -> DomainVcpus:
    """Return *domain* with these vCPUs enabled, or not; the others stay.

    Raises:
        InvalidMapError: *vcpus* holds what is no vCPU id.
        ConfigDeniedError: vCPU 0 is to leave, one is beyond the maximum, or a slot is named in part.

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
    """Return *domain* with *count* vCPUs enabled: the lowest free ones come, the highest leave.

    Those that come are among what QEMU starts with, unless one before them is hotpluggable.

    Args:
        domain: What the document says.
        count: How many; vCPU 0 is always one of them.
        hotpluggable: Have those that come plugged before the guest runs, so that they can leave.

    Raises:
        ConfigDeniedError: *count* is not 1 to the maximum, or it takes a part of a slot.

    Source: libvirt, virDomainSetVcpusFlags with VIR_DOMAIN_AFFECT_CONFIG, measured with libvirt 9.0.0.
    """
    asked = f"count {shorten(count, _MOST_QUOTED)}"
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= domain.max:
        detail = f"the document has 1 to {domain.max} vCPUs"
        raise ConfigDeniedError(asked, VcpuMap(), DenialReason.UNKNOWN_VCPU, detail)
    size = _slot_size(domain)
    states = _states(domain)
    missing = count - domain.current
    if missing % size:
        below = domain.current + missing // size * size
        near = " and ".join(str(each) for each in (below, below + size) if 1 <= each <= domain.max)
        detail = f"slots of {size} vCPUs move whole: {near} can be had"
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
    """Return *domain* with room for *maximum* vCPUs.

    New ones are off. Those above a lower maximum are dropped, enabled or not, with their pins and schedulers. New
    ones are in NUMA cell 0 where there are cells.

    Raises:
        ConfigDeniedError: *maximum* is not 1 to 16384, not the product of the topology, or below a vCPU of a cell.

    Source: libvirt, virDomainSetVcpusFlags with VIR_DOMAIN_VCPU_MAXIMUM, measured with libvirt 9.0.0.
    """
    asked = f"maximum {shorten(maximum, _MOST_QUOTED)}"
    if isinstance(maximum, bool) or not isinstance(maximum, int) or not 1 <= maximum <= _MOST_VCPUS:
        detail = f"a document has room for 1 to {_MOST_VCPUS} vCPUs"
        raise ConfigDeniedError(asked, VcpuMap(), DenialReason.UNKNOWN_VCPU, detail)
    if maximum == domain.max:
        return domain
    if domain.topology is not None:
        detail = f"the document's <topology> is of {domain.max} vCPUs, and libvirt takes no other number beside it"
        raise ConfigDeniedError(asked, VcpuMap(), DenialReason.TOPOLOGY_MISMATCH, detail)
    for cell in domain.numa:
        beyond = VcpuMap(each for each in cell.cpus if each >= maximum)
        if beyond:
            detail = f"NUMA cell {cell.id} has vCPUs {beyond}"
            raise ConfigDeniedError(asked, beyond, DenialReason.NUMA_MISMATCH, detail)
    more = range(domain.max, maximum)
    kept = (replace(sched, vcpus=VcpuMap(each for each in sched.vcpus if each < maximum)) for sched in domain.scheds)
    rows = (*domain.vcpus[:maximum], *(DomainVcpu(each, enabled=False, hotpluggable=True) for each in more))
    resized = replace(
        domain,
        vcpus=rows,
        pins={vcpu: pin for vcpu, pin in domain.pins.items() if vcpu < maximum},
        scheds=tuple(sched for sched in kept if sched.vcpus),
        numa=tuple(
            replace(cell, cpus=VcpuMap([*cell.cpus, *more])) if cell.id == 0 else cell for cell in domain.numa
        ),
    )
    return _rebuilt(resized, _states(resized))


# How it is done.


def _with_enabled(domain: DomainVcpus, target: Iterable[int]) -> DomainVcpus:
    wanted = frozenset(target)
    states = [(row.id in wanted, row.hotpluggable or row.enabled != (row.id in wanted)) for row in domain.vcpus]
    changed = _rebuilt(domain, states)
    return changed if changed is domain else replace(changed, individual=True)


def _rebuilt(domain: DomainVcpus, states: Sequence[_State]) -> DomainVcpus:
    """Return *domain* with its vCPUs in these *states*, as libvirt takes them; itself if they are so already."""
    # libvirt starts QEMU with the unbroken run from vCPU 0 on, and refuses a document that says otherwise.
    broken = False
    followed: list[_State] = []
    for each, (enabled, hotpluggable) in enumerate(states):
        broken |= each > 0 and (not enabled or hotpluggable)
        followed.append((enabled, broken))
    size = _slot_size(domain)
    if followed == _states(domain) and _startable(domain.vcpus, size):
        return domain
    late = any(enabled and hotpluggable for enabled, hotpluggable in followed)
    return replace(domain, vcpus=_ordered(followed, domain.vcpus, size), individual=domain.individual or late)


def _states(domain: DomainVcpus) -> list[_State]:
    return [(row.enabled, row.hotpluggable) for row in domain.vcpus]


def _startable(rows: Sequence[DomainVcpu], size: int) -> bool:
    """Return False where libvirt would define such orders, and then not start the domain."""
    orders = [row.order for row in rows[::size] if row.order is not None]
    return len(set(orders)) == len(orders) and all(order <= len(rows) for order in orders)


def _ordered(states: Sequence[_State], before: Sequence[DomainVcpu], size: int) -> tuple[DomainVcpu, ...]:
    """Return rows in these *states*, with orders where *before* has some: what stays keeps its place, others follow.

    libvirt clears all of them, and starts a VM whose vCPUs have another order of creation.
    """
    if all(row.order is None for row in before):
        return tuple(DomainVcpu(each, *state) for each, state in enumerate(states))
    present = [row for row in before[::size] if states[row.id][0]]
    present.sort(
        key=lambda row: (
            states[row.id][1],  # what QEMU starts with is there first, in the order of the ids
            states[row.id][1] and (row.order is None or not row.enabled),
            (states[row.id][1] and row.order) or 0,
            row.id,
        )
    )
    places = {row.id: place for place, row in enumerate(present, start=1)}
    return tuple(DomainVcpu(each, *state, places.get(each - each % size)) for each, state in enumerate(states))


def _slot_size(domain: DomainVcpus) -> int:
    if domain.arch in _CORE_ARCHES and domain.topology is not None:
        return domain.topology.threads
    return 1


# What is denied.


def _asked(vcpus: Iterable[int], *, enabled: bool) -> str:
    return describe("plug" if enabled else "unplug", tuple(vcpus))


def _unknown(domain: DomainVcpus, asked: str, ids: Iterable[int]) -> ConfigDeniedError:
    detail = f"the document has vCPUs 0 to {domain.max - 1}"
    return ConfigDeniedError(asked, possible_ids(ids), DenialReason.UNKNOWN_VCPU, detail)


def _first_stays(asked: str) -> ConfigDeniedError:
    detail = "vCPU 0 is the one that boots the VM, it never leaves"
    return ConfigDeniedError(asked, VcpuMap([0]), DenialReason.BOOT_VCPU, detail)


def _check_known(domain: DomainVcpus, asked: str, ids: VcpuMap) -> None:
    beyond = VcpuMap(each for each in ids if each >= domain.max)
    if beyond:
        raise _unknown(domain, asked, beyond)


def _check_whole(domain: DomainVcpus, asked: str, ids: VcpuMap) -> None:
    """Deny a slot that is named in part, which libvirt notices at the next start only."""
    size = _slot_size(domain)
    for slot in _slots(domain.max, size):
        inside = VcpuMap(each for each in slot if each in ids)
        if 0 < len(inside) < size:
            whole = VcpuMap(slot)
            detail = f"vCPUs {whole} are one slot and move together: {inside} named, {whole - inside} not"
            raise ConfigDeniedError(asked, whole, DenialReason.PART_OF_SLOT, detail)


def _slots(maximum: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, maximum)) for first in range(0, maximum, size))


def start_of(domain: DomainVcpus) -> DomainVcpus:
    """Return *domain* with the vCPUs that its VM is next started with.

    Of a record they are those of the next boot where one was asked for, else those of the earlier QEMU as long as
    they are kept, else those that the VM has; what stays keeps its place in the order. Idempotent.

    Raises:
        DomainXmlError: The next boot that was asked for is none of a VM with this maximum.
    """
    start = domain
    if domain.previous is not None:
        vcpus = tuple(_rows(domain.previous))
        start = replace(domain, vcpus=vcpus, individual=True, topology=domain.previous.topology)
    if domain.next_boot is not None:
        try:
            start = with_map(start, domain.next_boot)
        except ConfigDeniedError as error:
            raise DomainXmlError(f"the next boot that the record asks for cannot be: {error}") from error
    return replace(start, previous=None, next_boot=None)


def _rows(previous: PreviousVcpus) -> Iterator[DomainVcpu]:
    places = {vcpu: place for place, vcpu in enumerate(previous.order, start=1)}
    for each in range(previous.max):
        place = places.get(each)
        yield DomainVcpu(each, place is not None, each not in previous.started_with, place)
