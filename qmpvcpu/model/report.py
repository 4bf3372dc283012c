"""How a transition ended, slot by slot."""

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qmpvcpu.errors import Outcome, QmpVcpuError
from qmpvcpu.model.jsonform import layout_as_json, layout_from_json, take, verdict_from_json
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import Action, OnFailure
from qmpvcpu.model.value import Value
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Pending, Plugged, Refused, Unknown, Unplugged, Verdict, as_json

__all__ = ["StepReport", "TransitionError", "TransitionOutcome", "TransitionReport", "succeeded"]


class TransitionOutcome(enum.Enum):
    """How a transition ended.

    REACHED: the map is the target. PARTIAL: it is not, and nothing was undone. REVERTED: all that was done is undone.
    REVERT_INCOMPLETE: some of it could not be.
    """

    REACHED = "reached"
    PARTIAL = "partial"
    REVERTED = "reverted"
    REVERT_INCOMPLETE = "revert incomplete"


def succeeded(action: Action, verdict: Verdict | None) -> bool:
    """Return True if *verdict* is what *action* was for; a KEEP is content with a guest that refuses to let go."""
    match action:
        case Action.PLUG:
            return isinstance(verdict, Plugged)
        case Action.UNPLUG:
            return isinstance(verdict, Unplugged)
    return isinstance(verdict, Refused | Plugged)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StepReport(Value):
    """What became of one slot.

    Attributes:
        action: What was to be done.
        ids: All vCPU ids of the slot.
        verdict: How it ended, or None if it was never sent.
        reason: Why it is not as wished, in words; "" if it is.
        seconds: From sending to the verdict; 0 if it was never sent.
        undo: How the undoing of it ended, or None if there was none.
        undone: True if it was undone, False if it should have been and is not, None if there was nothing to undo.
    """

    action: Action
    ids: VcpuMap
    verdict: Verdict | None = None
    reason: str = ""
    seconds: float = 0.0
    undo: Verdict | None = None
    undone: bool | None = None

    @property
    def ok(self) -> bool:
        """True if the slot became what was wished, whether or not that was undone after."""
        return succeeded(self.action, self.verdict)

    def as_json(self) -> dict[str, Any]:
        """Return the step as a JSON object: ``verdict`` is its word, beside the verdict's own attributes."""
        verdict = {"verdict": None} if self.verdict is None else as_json(self.verdict)
        return verdict | {
            "action": self.action.value,
            "ids": str(self.ids),
            "why": self.reason,
            "seconds": self.seconds,
            "undone": self.undone,
            "undo": None if self.undo is None else as_json(self.undo),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StepReport":
        """Return the step that ``as_json`` was given.

        Raises:
            ValueError: It is not of that shape; the text names the key.
        """
        undo = data.get("undo")
        return cls(
            action=take(data, "action", Action),
            ids=take(data, "ids", VcpuMap.parse),
            verdict=verdict_from_json(data),
            reason=take(data, "why", str),
            seconds=take(data, "seconds", float),
            undo=None if undo is None else verdict_from_json(undo),
            undone=data.get("undone"),
        )

    def __str__(self) -> str:
        undone = {None: "", True: "undone", False: "NOT undone"}[self.undone]
        said = ", ".join(filter(None, ("" if self.verdict is None else self.verdict.name, undone)))
        return ": ".join(filter(None, (f"{self.action.value} {self.ids}", said, self.reason)))


@dataclass(frozen=True, eq=False, repr=False)
class TransitionReport(Value):
    """What became of a whole map; printable.

    Attributes:
        start: The vCPUs that were plugged before.
        target: The vCPUs that were to be.
        on_failure: The policy.
        outcome: How it ended.
        steps: Slot by slot, in the order of the plan.
        layout: The VM at the end.
        seconds: From the first command to the last answer.
        cancelled: True if somebody stopped it.
        unrecorded: Why the record does not have it, or "".
    """

    start: VcpuMap
    target: VcpuMap
    on_failure: OnFailure
    outcome: TransitionOutcome
    steps: tuple[StepReport, ...]
    layout: Layout
    seconds: float = 0.0
    cancelled: bool = False
    unrecorded: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object; ``from_json`` gives an equal one back."""
        return {
            "outcome": self.outcome.name,
            "start": str(self.start),
            "target": str(self.target),
            "on_failure": self.on_failure.value,
            "cancelled": self.cancelled,
            "unrecorded": self.unrecorded,
            "seconds": self.seconds,
            "steps": [step.as_json() for step in self.steps],
            "layout": layout_as_json(self.layout),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> "TransitionReport":
        """Return the report that ``as_json`` was given, from the object or from its text.

        Raises:
            ValueError: It is not of that shape; the text names the key.
        """
        content = json.loads(data) if isinstance(data, str) else data
        if not isinstance(content, Mapping):
            raise ValueError("a report is a JSON object")  # noqa: TRY004 -- of its content, not of its type here
        return cls(
            start=take(content, "start", VcpuMap.parse),
            target=take(content, "target", VcpuMap.parse),
            on_failure=take(content, "on_failure", OnFailure),
            outcome=take(content, "outcome", TransitionOutcome.__getitem__),
            steps=take(content, "steps", lambda steps: tuple(map(StepReport.from_json, steps))),
            layout=take(content, "layout", layout_from_json),
            seconds=take(content, "seconds", float),
            cancelled=take(content, "cancelled", bool),
            unrecorded=take(content, "unrecorded", str),
        )

    def __str__(self) -> str:
        layout = self.layout
        pending = f", pending {layout.pending}" if layout.pending else ""
        stopped = ", stopped by its caller" if self.cancelled else ""
        head = (
            f"{self.outcome.name}{stopped}: vCPUs {self.start} to {self.target}, on failure {self.on_failure.value};"
            f" plugged now: {layout.enabled}{pending}"
        )
        unrecorded = [f"  not recorded: {self.unrecorded}"] if self.unrecorded else []
        return "\n".join([head, *(f"  {step}" for step in self.steps), *unrecorded])


class TransitionError(QmpVcpuError):
    """A map was not reached; the report tells slot by slot what happened.

    Attributes:
        report: The report.
    """

    def __init__(self, report: TransitionReport) -> None:
        wrong = [str(step) for step in report.steps if step.verdict is not None and not step.ok]
        wrong += [str(step) for step in report.steps if step.ok and step.undone is False]
        unsent = [str(step.ids) for step in report.steps if step.verdict is None]
        wrong += [f"not sent: {', '.join(unsent)}"] if unsent else []
        pending = f", pending {report.layout.pending}" if report.layout.pending else ""
        super().__init__(
            f"vCPUs {report.target} not reached ({report.outcome.value}): {'; '.join(wrong) or 'changed by other'};"
            f" plugged now: {report.layout.enabled}{pending}"
        )
        self.report = report
        verdicts = [verdict for step in report.steps for verdict in (step.verdict, step.undo)]
        if any(isinstance(verdict, Unknown | Pending) for verdict in verdicts):
            self.outcome = Outcome.UNKNOWN
        elif any(step.ok and not step.undone for step in report.steps):
            self.outcome = Outcome.CHANGED
