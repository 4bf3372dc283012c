"""A transition that was cut short: what a look shows of it, and what to wish for to finish it, or to revert it.

Only the slots of its steps are touched; what others have changed since stays.
"""

from qmpvcpu.model import (
    Action,
    Direction,
    Intent,
    Layout,
    Pending,
    Plugged,
    Step,
    StepReport,
    TransitionOutcome,
    TransitionReport,
    Unplugged,
    VcpuMap,
    Verdict,
)

__all__ = ["finish_wish", "observed_report", "revert_wish"]

_NOT_DONE = "not done, as far as a look tells"


def finish_wish(intent: Intent, layout: Layout) -> VcpuMap:
    """Return the map that *intent* leads to from *layout*."""
    wish = set(layout.enabled)
    for step in intent.steps:
        if step.action is Action.UNPLUG:
            wish -= set(step.ids)
        else:
            wish |= set(step.ids)
    return VcpuMap(wish)


def revert_wish(intent: Intent, layout: Layout) -> VcpuMap:
    """Return the map that undoes what *intent* has done to *layout*.

    A slot that somebody else has filled meanwhile holds another device than ours, and is left alone.
    """
    wish = set(layout.enabled)
    for step in intent.steps:
        slot = layout.slot_of(step.first)
        if step.action is not Action.PLUG:
            wish |= set(step.ids)
        elif slot.qom_path == slot.new_qom_path:
            wish -= set(step.ids)
    return VcpuMap(wish)


def observed_report(intent: Intent, layout: Layout) -> TransitionReport:
    """Return what *layout* shows of each step of *intent*; whoever brought it about."""
    back = intent.direction is Direction.REVERTING
    steps = tuple(_observed(step, layout, reverting=back) for step in intent.steps)
    wanted = intent.start if back else intent.target
    if layout.enabled == wanted and not layout.pending & wanted:
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
    slot = layout.slot_of(step.first)
    verdict: Verdict | None = None
    if slot.first in layout.pending_slots:
        verdict = Pending(step.ids, acknowledged=False)
    elif slot.present and step.action is not Action.UNPLUG:
        verdict = Plugged(step.ids)
    elif not slot.present and step.action is Action.UNPLUG:
        verdict = Unplugged(step.ids)
    undone = None
    if reverting and step.action is not Action.KEEP:
        undone = verdict is None
    reason = _NOT_DONE if verdict is None and not reverting else ""
    return StepReport(step.action, step.ids, verdict, reason, undone=undone)
