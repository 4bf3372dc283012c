"""A VM's vCPUs, built again in a stopped QEMU: what to plug, or how that QEMU differs."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from qmpvcpu.errors import Outcome, ReplayMismatchError, counted
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.names import is_same_model
from qmpvcpu.model.options import DEFAULTS, CheckedOptions
from qmpvcpu.model.vcpumap import VcpuMap, named, union
from qmpvcpu.model.vm import SMP_LEVELS, Topology
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import Plan, plan_plugs

# Run states in which no guest runs, and one can: QEMU takes device_add in all of them.
_STOPPED: Final = ("prelaunch", "paused", "inmigrate")


class ReplayTarget(NamedTuple):
    """What a QEMU should have.

    Attributes:
        max: How many vCPUs there can be.
        started_with: The vCPUs that it starts with.
        later: The vCPUs that are plugged after, in order.
        topology: Its topology, or None if that is not known.
        cells: The NUMA cell of each vCPU; empty if there are none.
        slots: Its slots, if they are known: their types and places must be the same.
        model: The CPU model, or None if that is not known.
    """

    max: int
    started_with: VcpuMap
    later: tuple[int, ...]
    topology: Topology | None = None
    cells: Mapping[int, int] = MappingProxyType({})
    slots: tuple[Slot, ...] = ()
    model: str | None = None

    @classmethod
    def of(cls, source: Layout | PreviousVcpus) -> "ReplayTarget":
        """Return what *source* has."""
        if isinstance(source, PreviousVcpus):
            later = tuple(each for each in source.order if each not in source.started_with)
            return cls(source.max, source.started_with, later, source.topology)
        boot = source.started_with
        later = tuple(each for first in source.order if first not in boot for each in source.slot_of(first).ids)
        return cls(source.max, boot, later, source.vm.topology, slots=source.slots)


def plan_replay(now: Situation, target: ReplayTarget, options: CheckedOptions = DEFAULTS) -> Plan:
    """Return the plugs that give a QEMU what it lacks of *target*, in its order.

    Idempotent: what the QEMU has already may be a beginning of that order.

    Raises:
        ReplayMismatchError: The VM runs, or its QEMU cannot become *target* by plugging.
    """
    found = tuple(_differences(now, target))
    if found:
        raise ReplayMismatchError(found)
    have = len(now.layout.order)
    return plan_plugs(now, _expected(now.layout, target)[have:], options)


def check_replayed(layout: Layout, target: ReplayTarget) -> None:
    """Raise ReplayMismatchError if *layout* does not have the vCPUs of *target*, created in its order."""
    expected = _expected(layout, target)
    if layout.order != expected:
        raise ReplayMismatchError([_other_order(layout, expected)], outcome=Outcome.CHANGED)


def _expected(layout: Layout, target: ReplayTarget) -> tuple[int, ...]:
    """Return the first vCPU ids of the slots of *target*, in the order in which they are created."""
    return tuple(dict.fromkeys(layout.slot_of(each).first for each in (*target.started_with, *target.later)))


def _differences(now: Situation, target: ReplayTarget) -> Iterator[str]:
    layout, state = now.layout, now.status.run_state
    if state not in _STOPPED:
        yield f"it is {state}, not stopped ({', '.join(_STOPPED)}): set_map is for a VM that runs"
    if layout.max != target.max:
        yield f"it can have {counted(layout.max, 'vCPU')}, not {target.max} (maxcpus)"
        return  # what else differs follows from that
    running = layout.slots[0].model
    if target.model is not None and running is not None and not is_same_model(target.model, running):
        yield f"its CPU model is {running}, not {target.model} (-cpu)"
    yield from _other_places(layout, target)
    if layout.pending:
        yield f"a removal of {named(layout.pending)} is pending, and may come true at any plug"
    parts = list(_parts(layout, target))
    yield from parts
    if not parts:
        yield from _other_cpus(layout, target)


def _other_places(layout: Layout, target: ReplayTarget) -> Iterator[str]:
    here = layout.vm.topology
    if here is not None and target.topology is not None:
        sizes = [(level, getattr(here, level), getattr(target.topology, level)) for level in SMP_LEVELS]
        unlike = [f"{level} {size}, not {other}" for level, size, other in sizes if size != other]
        if unlike:
            yield f"its topology has {'; '.join(unlike)}"
    pairs = list(zip(layout.slots, target.slots, strict=False))
    others = {
        "are of other sizes": _ids(slot for slot, other in pairs if slot.count != other.count),
        "are of another CPU type": _ids(slot for slot, other in pairs if slot.type != other.type),
        "have another place": _ids(slot for slot, other in pairs if slot.props != other.props),
    }
    for how, ids in others.items():
        if ids:
            first = layout.slot_of(min(ids))
            other = next(each for each in target.slots if each.first <= first.first < each.first + each.count)
            is_so, not_so = _said(first), _said(other)
            yield f"the slots of {named(ids)} {how}: the first is {is_so}, not {not_so}"
    cells = [(each, slot.props.number("node-id")) for slot in layout.slots for each in slot.ids]
    strays = [(each, node) for each, node in cells if target.cells and node != target.cells.get(each)]
    if strays:
        vcpu, node = strays[0]
        ids = VcpuMap(each for each, _ in strays)
        is_in, not_in = ("none" if cell is None else f"cell {cell}" for cell in (node, target.cells.get(vcpu)))
        yield f"{named(ids)} are in other NUMA cells: vCPU {vcpu} is in {is_in}, not in {not_in}"


def _said(slot: Slot) -> str:
    return f"{slot.count} of {slot.type} at {slot.props}"


def _parts(layout: Layout, target: ReplayTarget) -> Iterator[str]:
    """Say which slots would have only some of their vCPUs, or only some at the start."""
    for ids, when in ((target.started_with, "to be there at the start"), (target.later, "to be plugged")):
        those = frozenset(ids)
        for slot in layout.slots:
            inside = [each for each in range(slot.first, slot.first + slot.count) if each in those]
            if 0 < len(inside) < slot.count:
                yield f"{named(slot.ids)} are one slot and move together: {VcpuMap(inside)} of it is {when}"


def _other_cpus(layout: Layout, target: ReplayTarget) -> Iterator[str]:
    has = _ids(slot for slot in layout.slots if slot.is_boot)
    expected = _expected(layout, target)
    if has != target.started_with:
        should = target.started_with
        yield f"QEMU has started with {named(has)}, not with {named(should)} (-smp {len(should)})"
    elif layout.order != expected[: len(layout.order)]:
        yield _other_order(layout, expected)


def _other_order(layout: Layout, expected: tuple[int, ...]) -> str:
    order = ",".join(map(str, layout.order))
    return f"its vCPUs were created as {order}, which is not how {','.join(map(str, expected))} begins"


def _ids(slots: Iterator[Slot]) -> VcpuMap:
    return union(slot.ids for slot in slots)
