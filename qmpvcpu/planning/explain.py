"""A plan in words, for people: alike steps in one line, so that 240 of them can be read."""

from collections.abc import Container, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Final

from qmpvcpu.errors import DenialReason, printable
from qmpvcpu.model.layout import Slot
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Denied

if TYPE_CHECKING:
    from qmpvcpu.planning.plan import Plan

# More alike steps in a row than these share a line: so many still show each one's place in the machine.
_MOST_ALIKE: Final = 4
_WIDEST_IDS: Final = 12
_MOST_OF_A_MAP: Final = 60


def named(ids: VcpuMap) -> str:
    """Return ``vCPU 3``, or ``vCPUs 3-5``; a very scattered map is cut."""
    text = str(ids)
    shown = text if len(text) <= _MOST_OF_A_MAP else f"{text[:_MOST_OF_A_MAP]}..."
    return f"vCPU {shown}" if len(ids) == 1 else f"vCPUs {shown}"


def merged(denied: Iterable[Denied]) -> list[Denied]:
    """Return *denied* with those that say the same put together, in the order of the first of each."""
    alike: dict[tuple[DenialReason, str], list[int]] = {}
    for each in denied:
        alike.setdefault((each.reason, each.detail), []).extend(each.ids)
    return [Denied(VcpuMap(ids), reason, detail) for (reason, detail), ids in alike.items()]


def explained(plan: "Plan") -> Iterator[str]:
    """Return the lines that tell what *plan* does, what is denied of it, and what may come out otherwise."""
    yield _head(plan)
    rows = list(_step_rows(plan))
    rows += [("denied", str(each.ids or "the count"), each.detail) for each in merged(plan.denied)]
    width = min(max((len(ids) for _, ids, _ in rows), default=0), _WIDEST_IDS)
    for word, ids, how in rows:
        yield f"  {word:<6} {ids:<{width}}  ({printable(how)})"
    for warning in plan.warnings:
        yield f"  warning: {printable(warning)}"


def _head(plan: "Plan") -> str:
    counts = {action: sum(len(step.ids) for step in plan.steps if step.action is action) for action in Action}
    parts = [f"{number} to {action.value}" for action, number in counts.items() if number]
    if plan.denied:
        parts = ["denied, nothing would be sent"]
    way = f"{plan.start}" if plan.denied and plan.start == plan.target else f"{plan.start} -> {plan.target}"
    return f"vCPUs {way}: {', '.join(parts) or 'nothing to do'}"


def _step_rows(plan: "Plan") -> Iterator[tuple[str, str, str]]:
    slots = {slot.first: slot for slot in plan.slots}
    taken = {slot.qom_path for slot in plan.slots if slot.qom_path is not None}
    for _, group in groupby(plan.steps, lambda step: (step.action, step.joins, slots[step.first].is_boot)):
        run = list(group)
        word = run[0].action.value
        if len(run) > _MOST_ALIKE:
            ids = VcpuMap(each for step in run for each in step.ids)
            yield word, str(ids), _how_all(run, slots, taken)
        else:
            for step in run:
                yield word, str(step.ids), _how(step, slots[step.first], taken)


def _how(step: Step, slot: Slot, taken: Container[str]) -> str:
    if step.action is Action.PLUG:
        place = " ".join(f"{name.removesuffix('-id')} {value}" for name, value in slot.props.items())
        return f"device_add {_id(slot, taken)}, {place}"
    if step.action is Action.KEEP:
        return "its removal is pending: the guest's answer is awaited"
    if step.joins:
        return "its removal is pending already: nothing is sent, the guest's answer is awaited"
    boot = ", there at boot" if slot.is_boot else ""
    return f"the guest is asked to give up {step.qom_path}{boot}"


def _id(slot: Slot, taken: Container[str]) -> str:
    return slot.free_path(taken).rpartition("/")[2]


def _how_all(run: list[Step], slots: dict[int, Slot], taken: Container[str]) -> str:
    """Return how all of *run*, which are alike, are done."""
    first, last = slots[run[0].first], slots[run[-1].first]
    if run[0].action is Action.PLUG:
        return f"device_add {_id(first, taken)} .. {_id(last, taken)}"
    if run[0].action is Action.KEEP:
        return "their removals are pending: the guest's answers are awaited"
    if run[0].joins:
        return "their removals are pending already: nothing is sent, the guest's answers are awaited"
    boot = "; they were there at boot" if first.is_boot else ""
    return f"the guest is asked to give them up, {first.first} first{boot}"
