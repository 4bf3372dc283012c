"""The steps that take a VM to a target map, or the reasons why it cannot get there; a plan explains itself.

The plan of a map or a count has what is denied in ``denied``; that of one vCPU raises it (``checks``).
"""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from qmpvcpu.errors import DenialReason, InvalidMapError, StalePlanError, StepDeniedError, counted, printable, shorten
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.options import DEFAULTS, CheckedOptions, Proof
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.vcpumap import VcpuMap, named, union, union_by
from qmpvcpu.model.verdicts import Denied
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.planning.checks import (
    COUNT,
    NEVER_LEAVES,
    PLUG,
    UNPLUG,
    Fatal,
    Situation,
    check_keep,
    check_plug,
    check_unplug,
    denial,
    fatal_plug,
    fatal_unplug,
    find_slot,
    why_unplaced,
)
from qmpvcpu.planning.guest import guest_warnings

# More alike steps in a row than these share a line: so many still show each one's place in the machine.
_MOST_ALIKE: Final = 4
_WIDEST_IDS: Final = 12
_MOST_QUOTED = 40


@dataclass(frozen=True)
class Plan:
    """What to do, in order, and what cannot be done; ``str()`` explains it.

    One step a slot, since the vCPUs of one slot move together. Plugs come first, by ascending id: the guest never has
    fewer vCPUs than the two maps share, and a QEMU before 10.0 under TCG dies at a plug after an unplug. Then what is
    to be kept. Unplugs come last, by descending id as libvirt's, so that what was there at boot leaves last.

    Attributes:
        start: The vCPUs that are plugged.
        target: The vCPUs that should be.
        steps: What to do, in order; empty if the target is reached already.
        denied: What cannot be done, and why; nothing is sent of a plan that has any.
        warnings: What may come out otherwise than planned.
        slots: The slots that the plan is made for, to explain it; empty: they are not known here.
        pending_slots: First vCPU ids of the slots with a removal pending.
    """

    start: VcpuMap
    target: VcpuMap
    steps: tuple[Step, ...]
    denied: tuple[Denied, ...] = ()
    warnings: tuple[str, ...] = ()
    slots: tuple[Slot, ...] = ()
    pending_slots: frozenset[int] = frozenset()

    @property
    def ids(self) -> VcpuMap:
        """The vCPUs that its steps concern."""
        return _ids(self.steps)

    def __str__(self) -> str:
        return "\n".join(explained(self))


def parse_target(given: str | Iterable[int], layout: Layout) -> VcpuMap:
    """Return the target map that a caller gives, as text or as ids.

    Raises:
        InvalidMapError: It is empty, or not a set of vCPU ids.
    """
    target = VcpuMap.parse(given) if isinstance(given, str) else VcpuMap(given)
    if not target:
        why = f"it is empty, and vCPU 0 never leaves (this machine has vCPUs 0-{layout.max - 1})"
        raise InvalidMapError(given if isinstance(given, str) else "", why)
    return target


def plan_map(now: Situation, target: VcpuMap, options: CheckedOptions = DEFAULTS) -> Plan:
    """Return the steps that make exactly *target* plugged."""
    layout = now.layout
    denied = list(_denied_ids(layout, target))
    plugs: list[Step] = []
    keeps: list[Step] = []
    onlines: list[Step] = []
    unplugs: list[Step] = []
    for slot in layout.slots:
        ids = range(slot.first, slot.first + slot.count)
        inside = sum(each in target for each in ids)
        pending = slot.first in layout.pending_slots
        if 0 < inside < slot.count:
            denied.append(_split(slot, target))
        elif inside and not slot.present:
            plugs.append(Step(Action.PLUG, slot.ids))
        elif inside and pending:
            keeps.append(Step(Action.KEEP, slot.ids, slot.qom_path))
        elif inside and _is_to_come_online(now, slot, options):
            onlines.append(_online(slot, options))
        elif not inside and slot.present and slot.first != 0:
            joins = pending and (now.leaving is None or slot.first in now.leaving)
            unplugs.append(_unplug(now, slot, options, joins=joins))
    steps = (*plugs, *keeps, *onlines, *reversed(unplugs))
    denied += _denied_steps(now, steps, options)
    return Plan(
        start=layout.enabled,
        target=target,
        steps=steps,
        denied=tuple(denied),
        warnings=(
            *_warnings(now, plugs, keeps, unplugs, allow_fatal=options.allow_fatal),
            *guest_warnings(now, steps, options),
            *_unplaced(now, plugs, options),
        ),
        slots=layout.slots,
        pending_slots=layout.pending_slots,
    )


def plan_plugs(now: Situation, slots: Iterable[int], options: CheckedOptions = DEFAULTS) -> Plan:
    """Return the steps that plug *slots*, named by their first vCPU ids, in this very order."""
    layout = now.layout
    steps = [Step(Action.PLUG, layout.slot_of(first).ids) for first in slots]
    return Plan(
        start=layout.enabled,
        target=layout.enabled | _ids(steps),
        steps=tuple(steps),
        denied=tuple(_denied_steps(now, steps, options)),
        warnings=(
            *_warnings(now, steps, [], [], allow_fatal=options.allow_fatal),
            *guest_warnings(now, steps, options),
            *_unplaced(now, steps, options),
        ),
        slots=layout.slots,
        pending_slots=layout.pending_slots,
    )


def plan_plug(now: Situation, vcpu: int | None, options: CheckedOptions = DEFAULTS) -> Plan:
    """Return the step that plugs the slot of *vCPU*, or the first free one if it is None."""
    return _plan_step(now, Step(Action.PLUG, check_plug(now, vcpu, options).ids))


def plan_unplug(now: Situation, vcpu: int, options: CheckedOptions = DEFAULTS) -> Plan:
    """Return the step that unplugs the slot of *vcpu*; a removal that is under way is joined."""
    if now.leaving is not None and vcpu in now.leaving:
        slot = now.layout.slot_of(vcpu)
        return _plan_step(now, Step(Action.UNPLUG, slot.ids, slot.qom_path, joins=True))
    return _plan_step(now, _unplug(now, check_unplug(now, vcpu, options), options, joins=False))


def _unplug(now: Situation, slot: Slot, options: CheckedOptions, *, joins: bool) -> Step:
    """Return the step that empties *slot*; what is offline in the guest already needs not be taken offline."""
    is_offline = now.guest_sees is not None and now.guest_sees.get(slot.first) is False
    asks_agent = options.offline_first and not joins and not is_offline
    return Step(Action.UNPLUG, slot.ids, slot.qom_path, joins=joins, asks_agent=asks_agent)


def _is_to_come_online(now: Situation, slot: Slot, options: CheckedOptions) -> bool:
    """Return True if *slot*, which is plugged, is to be online in the guest, and its list does not show that."""
    sees = now.guest_sees
    return options.awaited_proof is Proof.ONLINE and sees is not None and sees.get(slot.first) is not True


def _online(slot: Slot, options: CheckedOptions) -> Step:
    return Step(Action.ONLINE, slot.ids, slot.qom_path, asks_agent=options.online)


def plan_state(now: Situation, vcpu: int, options: CheckedOptions = DEFAULTS, *, enabled: bool) -> Plan:
    """Return the step that makes the slot of *vcpu* plugged or unplugged; no step if it already is."""
    slot = find_slot(PLUG if enabled else UNPLUG, now.layout, vcpu)
    if enabled and slot.present:
        if slot.first in now.asked:
            return _plan_step(now, Step(Action.KEEP, slot.ids, slot.qom_path))
        return _plan_step(now, _online(slot, options) if _is_to_come_online(now, slot, options) else None)
    if enabled:
        return plan_plug(now, vcpu, options)
    if not slot.present:
        return _plan_step(now, None)
    return plan_unplug(now, vcpu, options)


def _plan_step(now: Situation, step: Step | None) -> Plan:
    start = now.layout.enabled
    if step is None:
        return Plan(start, start, ())
    target = start | step.ids if step.action is not Action.UNPLUG else start - step.ids
    return Plan(start, target, (step,))


def plan_count(now: Situation, count: int, options: CheckedOptions = DEFAULTS, *, include_boot: bool = False) -> Plan:
    """Return the steps that make *count* vCPUs plugged: the lowest free ones in, the highest removable out.

    A removal that is pending is on its way, so it is joined before another vCPU is asked for. Boot vCPUs stay,
    even one whose removal is pending, unless *include_boot*; vCPU 0 always does.

    Source: libvirt, virDomainSetVcpusFlags; which vCPUs it chooses was measured with libvirt 9.0.0.
    """
    layout = now.layout
    if not 1 <= count <= layout.max:
        detail = f"this machine has 1 to {counted(layout.max, 'vCPU')}, not {shorten(count, _MOST_QUOTED)}"
        return _refused(layout, Denied(VcpuMap(), DenialReason.UNKNOWN_VCPU, detail))
    grows = count >= len(layout.enabled)
    chosen = {slot.first for slot in layout.slots if slot.present}
    reached = [len(layout.enabled)]
    for slot in _free(layout) if grows else _removable(layout, include_boot=include_boot):
        if (reached[-1] >= count) if grows else (reached[-1] <= count):
            break
        chosen ^= {slot.first}
        reached.append(reached[-1] + (slot.count if grows else -slot.count))
    target = union(slot.ids for slot in layout.slots if slot.first in chosen)
    if reached[-1] > count and not grows and len(chosen) > 1:  # the slot of vCPU 0 never leaves, include_boot or not
        owned = layout.vm.libvirt_owned and not options.allow_boot_vcpus
        more = ", here with allow_boot_vcpus=True, after which libvirtd would lose the VM" if owned else ""
        detail = (
            f"{named(target)} were there at boot, and a count takes none of those out (include_boot=True does{more})"
        )
        return _refused(layout, Denied(target, DenialReason.COUNT_KEEPS_BOOT, detail))
    if reached[-1] != count:
        return _refused(layout, _splits(layout, count, {*reached[-2:]}))
    return plan_map(now, target, options)


def _free(layout: Layout) -> list[Slot]:
    """Return the slots that a count takes in, in that order."""
    return [slot for slot in layout.slots if not slot.present]


def _removable(layout: Layout, *, include_boot: bool) -> list[Slot]:
    """Return the slots that a count takes out, in that order: those whose removal is pending first."""
    slots = [slot for slot in layout.slots if slot.present and slot.first and (include_boot or not slot.is_boot)]
    return sorted(slots, key=lambda slot: (slot.first in layout.pending_slots, slot.first), reverse=True)


def _refused(layout: Layout, denied: Denied) -> Plan:
    """Return a plan that does nothing, and says why."""
    start = layout.enabled
    return Plan(start, start, (), (denied,), slots=layout.slots, pending_slots=layout.pending_slots)


def check_plan(plan: Plan, layout: Layout) -> None:
    """Return if *plan* can be carried out on *layout*.

    Raises:
        StepDeniedError: Something in it is denied; the text names all of it, the attributes the first.
        StalePlanError: The VM has changed since it was made.
    """
    planned = {slot.first: slot.qom_path for slot in plan.slots}
    observed = {slot.first: slot.qom_path for slot in layout.slots}
    if planned != observed or plan.pending_slots != layout.pending_slots:
        pending = union(slot.ids for slot in plan.slots if slot.first in plan.pending_slots)
        was, now = _state(plan.start, pending), _state(layout.enabled, layout.pending)
        if was == now:  # the same vCPUs, but not the same CPUs
            other = min(planned.items() ^ observed.items(), key=lambda slot: slot[0])[0]
            was += f" with {planned.get(other)} as vCPU {other}"
            now += f" with {observed.get(other)} as vCPU {other}"
        raise StalePlanError(plan.start, layout.enabled, f"it starts from {was}, the VM is at {now} now")
    if plan.denied:
        action = _action_of(plan.denied[0], plan)
        alike = [each for each in plan.denied if _action_of(each, plan) == action]
        first, *others = merged(alike) + merged(each for each in plan.denied if each not in alike)
        also = "".join(
            f"; denied too: {named(each.ids) if each.ids else 'the count'}: {each.detail}" for each in others
        )
        raise denial(layout, action, first.ids, first.reason, first.detail + also)


def _splits(layout: Layout, count: int, reached: set[int]) -> Denied:
    """Deny *count*, and name the nearest of the counts that were *reached* on either side of it."""
    below = sorted(each for each in reached if each < count)[-1:]
    above = sorted(each for each in reached if each > count)[:1]
    sizes = ", ".join(sorted({str(slot.count) for slot in layout.slots}))
    nearest = " or ".join(map(str, below + above))
    detail = f"slots of {sizes} vCPUs move whole: {nearest} can be had, {count} cannot"
    return Denied(VcpuMap(), DenialReason.COUNT_SPLITS_SLOT, detail)


def _action_of(denied: Denied, plan: Plan) -> str:
    """Return the denied action: the count itself, the unplug of what is plugged, or the plug of what is not."""
    if not denied.ids:
        return COUNT
    return UNPLUG if denied.ids <= plan.start else PLUG


def _state(enabled: VcpuMap, pending: VcpuMap) -> str:
    return f"{enabled}, pending {pending}" if pending else str(enabled)


def _denied_ids(layout: Layout, target: VcpuMap) -> Iterator[Denied]:
    unknown = VcpuMap(each for each in target if each >= layout.max)
    if unknown:
        detail = f"no {named(unknown)}: this machine has 0 to {layout.max - 1}"
        yield Denied(unknown, DenialReason.UNKNOWN_VCPU, detail)
    if layout.slots and 0 not in target:
        yield Denied(layout.slots[0].ids, DenialReason.BOOT_VCPU, NEVER_LEAVES)


def _split(slot: Slot, target: VcpuMap) -> Denied:
    inside = slot.ids & target
    detail = (
        f"{named(slot.ids)} are one slot and move together: the target has {inside} and lacks {slot.ids - inside}"
    )
    return Denied(slot.ids, DenialReason.PART_OF_SLOT, detail)


def _denied_steps(now: Situation, steps: Iterable[Step], options: CheckedOptions) -> Iterator[Denied]:
    counts = KnownFault.TCG_CREATED_BEYOND_MAX in now.layout.vm.known_faults  # of no matter elsewhere
    for step in steps:
        try:
            if step.action is Action.PLUG:
                check_plug(now, step.first, options)
                now = now._replace(created=now.created + len(step.ids)) if counts else now
            elif step.action is Action.UNPLUG:
                check_unplug(now, step.first, options)
            elif step.action is Action.KEEP:
                check_keep(now, now.layout.slot_of(step.first))
        except StepDeniedError as error:
            yield Denied(step.ids, error.reason, error.detail)


def _warnings(
    now: Situation, plugs: list[Step], keeps: list[Step], unplugs: list[Step], *, allow_fatal: bool
) -> Iterator[str]:
    pending = now.layout.pending
    if pending and plugs:
        one = len(now.layout.pending_slots) == 1
        yield (
            f"the removal{'' if one else 's'} of {named(pending)} {'is' if one else 'are'} pending:"
            f" any plug may set {'it' if one else 'them'} off"
        )
        if KnownFault.TCG_REPLUG_CORRUPTS_HEAP in now.layout.vm.known_faults:
            yield f"no plug is safe after that: {KnownFault.TCG_REPLUG_CORRUPTS_HEAP.value}"
    if keeps:
        yield (
            f"{named(_ids(keeps))} should stay, and QEMU cannot withdraw a pending removal: the guest's answer is"
            " awaited, and a vCPU that leaves is plugged again"
        )
    if not now.layout.vm.known_faults and not now.layout.vm.seals_vcpus:
        return
    ours = [step for step in unplugs if not step.joins]
    yield from _fatal_plugs(now, plugs, keeps, ours, allow_fatal=allow_fatal)
    fatal = fatal_unplug(now)
    if fatal is not None and ours and allow_fatal:
        yield f"taking {named(_ids(ours))} out is known to be fatal: {fatal.why}"
    if fatal is not None and plugs:
        yield f"taking {named(_ids(plugs))} out again, as reverting does, is known to be fatal: {fatal.why}"
    yield from _of_guest_or_reset(now, plugs, unplugs)


def _unplaced(now: Situation, plugs: Iterable[Step], options: CheckedOptions) -> Iterator[str]:
    """Tell which vCPUs are plugged although they cannot be put in their place on the host."""
    if options.requires_place(now.placement):
        return
    told = ((why_unplaced(now, now.layout.slot_of(step.first)), step.ids) for step in plugs)
    for why, ids in union_by((why, ids) for why, ids in told if why).items():
        yield f"{named(ids)} will not run in its place on the host: {why}"


def _fatal_plugs(
    now: Situation, plugs: list[Step], keeps: list[Step], unplugs: list[Step], *, allow_fatal: bool
) -> Iterator[str]:
    """Tell which plugs this VM would not survive: of the plan, where that is allowed, and of what may follow."""
    for words, steps, left in (
        ("plugging {}", plugs, False),
        ("plugging {} again, should the guest let go,", keeps, True),
        ("plugging {} again, as reverting does,", unplugs, True),
    ):
        killing: list[tuple[Fatal, VcpuMap]] = []
        for step in steps:
            then = now._replace(unplug_seen=now.unplug_seen or left)
            fatal = fatal_plug(then, now.layout.slot_of(step.first))
            if fatal is not None and (left or allow_fatal):
                killing.append((fatal, step.ids))
            now = now._replace(created=now.created + len(step.ids))
        for fatal, ids in union_by(killing).items():
            yield f"{words.format(named(ids))} is known to be fatal: {fatal.why}"


def _of_guest_or_reset(now: Situation, plugs: list[Step], unplugs: list[Step]) -> Iterator[str]:
    """Tell the faults that a step alone does not set off, so it is not denied for them."""
    faults = now.layout.vm.known_faults
    if plugs and KnownFault.TCG_LINUX_LOCKS_UP in faults:
        yield KnownFault.TCG_LINUX_LOCKS_UP.value
    if unplugs and KnownFault.TCG_REPLUG_CORRUPTS_HEAP in faults:
        yield f"do not reset the VM once a vCPU has left: {KnownFault.TCG_REPLUG_CORRUPTS_HEAP.value}"
    if (unplugs or now.layout.pending_slots) and KnownFault.TCG_PSERIES_RESET_ABORTS in faults:
        yield f"do not reset the VM before the guest has answered: {KnownFault.TCG_PSERIES_RESET_ABORTS.value}"


def _ids(steps: Iterable[Step]) -> VcpuMap:
    return union(step.ids for step in steps)


# In words, for people: alike steps share a line, so that 240 of them can be read.


def merged(denied: Iterable[Denied]) -> list[Denied]:
    """Return *denied* with those that say the same put together, in the order of the first of each."""
    alike = union_by(((each.reason, each.detail), each.ids) for each in denied)
    return [Denied(ids, reason, detail) for (reason, detail), ids in alike.items()]


def explained(plan: Plan) -> Iterator[str]:
    """Return the lines that tell what *plan* does, what is denied of it, and what may come out otherwise."""
    yield _head(plan)
    rows = list(_step_rows(plan))
    rows += [("denied", str(each.ids or "the count"), each.detail) for each in merged(plan.denied)]
    width = min(max((len(ids) for _, ids, _ in rows), default=0), _WIDEST_IDS)
    for word, ids, how in rows:
        yield f"  {word:<6} {ids:<{width}}  ({printable(how)})"
    for warning in plan.warnings:
        yield f"  warning: {printable(warning)}"


def _head(plan: Plan) -> str:
    counts = {action: sum(len(step.ids) for step in plan.steps if step.action is action) for action in Action}
    parts = [f"{number} to {action.value}" for action, number in counts.items() if number]
    if plan.denied:
        parts = ["denied, nothing would be sent"]
    way = f"{plan.start}" if plan.denied and plan.start == plan.target else f"{plan.start} -> {plan.target}"
    return f"vCPUs {way}: {', '.join(parts) or 'nothing to do'}"


def _step_rows(plan: Plan) -> Iterator[tuple[str, str, str]]:
    slots = {slot.first: slot for slot in plan.slots}
    taken = {slot.qom_path for slot in plan.slots if slot.qom_path is not None}
    for _, group in groupby(
        plan.steps, lambda step: (step.action, step.joins, step.asks_agent, _is_boot(slots.get(step.first)))
    ):
        run = list(group)
        word = run[0].action.value
        for alike in [run] if len(run) > _MOST_ALIKE else [[step] for step in run]:
            yield word, str(_ids(alike)), _how(alike, slots, taken)


def _is_boot(slot: Slot | None) -> bool:
    return slot is not None and slot.is_boot


def _how(run: list[Step], slots: dict[int, Slot], taken: Container[str]) -> str:
    """Return how the steps of *run*, which are alike, are carried out."""
    step, one = run[0], len(run) == 1
    first, last = slots.get(step.first), slots.get(run[-1].first)
    is_pending = "its removal is pending" if one else "their removals are pending"
    awaited = "the guest's answer is awaited" if one else "the guest's answers are awaited"
    if step.action is Action.PLUG:
        online = ", then brought online by the guest's agent" if step.asks_agent else ""
        return f"device_add{_what(first, last, taken)}{online}"
    if step.action is Action.KEEP:
        return f"{is_pending}: {awaited}"
    if step.joins:
        return f"{is_pending} already: nothing is sent, {awaited}"
    if step.action is Action.ONLINE:
        if not step.asks_agent:
            return "the guest is looked at until it has it online"
        return "the guest's agent is asked to bring it online"
    what = f"up {step.qom_path}" if one else f"them up, {step.first} first"
    boot = (", there at boot" if one else "; they were there at boot") if _is_boot(first) else ""
    offline = "taken offline in the guest by its agent, then " if step.asks_agent else ""
    return f"{offline}the guest is asked to give {what}{boot}"


def _what(first: Slot | None, last: Slot | None, taken: Container[str]) -> str:
    """Return what is given to ``device_add`` for the slots from *first* to *last*; "" where they are not known."""
    if first is None or last is None:
        return ""
    if first is not last:
        return f" {_id(first, taken)} .. {_id(last, taken)}"
    place = " ".join(f"{name.removesuffix('-id')} {value}" for name, value in first.props.items())
    return f" {_id(first, taken)}, {place}"


def _id(slot: Slot, taken: Container[str]) -> str:
    return slot.free_path(taken).rpartition("/")[2]
