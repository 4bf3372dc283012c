"""A transition that was interrupted: what a read shows of it, and the target that finishes or reverts it.

Only the slots of its steps are touched; what others have changed since stays.
"""

from dataclasses import replace

from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import (
    Action,
    Direction,
    Intent,
    Step,
    StepReport,
    TransitionOutcome,
    TransitionReport,
    succeeded,
)
from qmpvcpu.model.vcpumap import VcpuMap, union
from qmpvcpu.model.verdicts import Pending, Plugged, Unplugged, Verdict
from qmpvcpu.planning.plan import Plan

_NOT_DONE = "not done, judging by a fresh look"


def finish_target(intent: Intent, layout: Layout) -> VcpuMap:
    """Return the map that *intent* leads to from *layout*."""
    target = _standing(intent, layout)
    for step in intent.steps:
        if step.action is Action.UNPLUG:
            target -= step.ids
        elif step.action is not Action.ONLINE:  # such a one was there, and what has become of it since stays
            target |= step.ids
    return target


def in_order_of(intent: Intent, plan: Plan) -> Plan:
    """Return *plan* with its plugs in the order of *intent*, which may be that of another VM's vCPUs."""
    places = {step.first: place for place, step in enumerate(intent.steps)}
    plugs = [step for step in plan.steps if step.action is Action.PLUG]
    others = [step for step in plan.steps if step.action is not Action.PLUG]
    plugs.sort(key=lambda step: places.get(step.first, len(places)))
    return replace(plan, steps=(*plugs, *others))


def revert_target(intent: Intent, layout: Layout) -> VcpuMap:
    """Return the map that undoes what *intent* has done to *layout*.

    A slot that another client has filled meanwhile holds another device, and is left alone; so is a slot that an
    earlier removal, which the transition only joined, has emptied.
    """
    target = _standing(intent, layout)
    # Where a slot is named twice, as by single commands one after another, its first step tells what was there.
    for step in {step.first: step for step in reversed(intent.steps)}.values():
        if step.action is Action.PLUG:
            if _is_ours(step, layout):
                target -= step.ids
        elif not step.joins and step.action is not Action.ONLINE:
            target |= step.ids
    return target


def revert_plan(intent: Intent, plan: Plan, layout: Layout) -> Plan:
    """Return *plan*, which leads back, and have the agent bring online what it may have taken offline."""
    offline = {step.first for step in intent.steps if step.asks_agent and step.action is Action.UNPLUG}
    if not offline:
        return plan
    planned = {step.first for step in plan.steps}
    comes = {Action.PLUG, Action.KEEP}
    steps = [
        replace(step, asks_agent=True) if step.action in comes and step.first in offline else step
        for step in plan.steps
    ]
    there = [
        Step(Action.ONLINE, slot.ids, slot.qom_path, asks_agent=True)
        for slot in layout.slots
        if slot.first in offline - planned and slot.present and slot.ids <= plan.target
    ]
    return replace(plan, steps=(*steps, *there))


def _standing(intent: Intent, layout: Layout) -> VcpuMap:
    """Return what is plugged, without what another client has asked to leave since: we do not keep that."""
    concerned = union(step.ids for step in intent.steps)
    return layout.enabled - (layout.pending - concerned)


def _is_ours(step: Step, layout: Layout) -> bool:
    """Return True if the slot of *step* holds a device that has the name of ours."""
    if step.first >= layout.max:
        return False
    slot = layout.slot_of(step.first)
    return slot.has_our_name


def observed_report(intent: Intent, layout: Layout) -> TransitionReport:
    """Return what *layout* shows of each step of *intent*, no matter who did it."""
    back = intent.direction is Direction.REVERTING
    steps = tuple(_observed(step, layout, reverting=back) for step in intent.steps)
    goal = intent.start if back else intent.target
    if layout.enabled == goal and not layout.pending & goal:
        outcome = TransitionOutcome.REVERTED if back else TransitionOutcome.REACHED
    else:
        outcome = TransitionOutcome.REVERT_INCOMPLETE if back else TransitionOutcome.PARTIAL
    return TransitionReport(
        start=intent.start,
        target=intent.target,
        on_failure=intent.on_failure,
        outcome=outcome,
        steps=steps,
        layout=layout,
    )


def _observed(step: Step, layout: Layout, *, reverting: bool) -> StepReport:
    present = step.first < layout.max and layout.slot_of(step.first).present
    verdict: Verdict | None = None
    if step.action is Action.PLUG:
        verdict = Plugged(step.ids) if present else None
    elif not present:
        verdict = Unplugged(step.ids)
    elif step.first in layout.pending_slots:
        verdict = Pending(step.ids, acknowledged=False)
    elif step.action is Action.KEEP:
        verdict = Plugged(step.ids)
    reason = "" if succeeded(step.action, verdict) or reverting else _NOT_DONE
    if step.asks_agent and step.action is Action.UNPLUG and verdict is None:
        reason = "; ".join(filter(None, (reason, "it may be offline in the guest")))
    if isinstance(verdict, Pending):
        reason = "the guest has been asked, and has not answered"
    return StepReport(
        step.action, step.ids, verdict, reason, undone=_undone(step, layout, verdict) if reverting else None
    )


def _undone(step: Step, layout: Layout, verdict: Verdict | None) -> bool | None:
    """Return whether *step* is undone; None where there is nothing of ours to undo."""
    if step.action is Action.KEEP or (
        verdict is not None and step.action is Action.PLUG and not _is_ours(step, layout)
    ):
        return None
    return verdict is None
