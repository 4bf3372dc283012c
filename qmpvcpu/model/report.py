"""How a transition ended, slot by slot."""

import enum
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from qmpvcpu.errors import Outcome, printable
from qmpvcpu.model.jsonform import layout_as_json, layout_from_json
from qmpvcpu.model.jsonread import flag, number, one_of, optional, rows, take, text, vcpu_map, whole_number
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import Action, Affect, OnFailure
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdictjson import verdict_beside, verdict_from_json
from qmpvcpu.model.verdicts import Pending, Plugged, Refused, Unknown, Unplugged, Verdict, as_json


class TransitionOutcome(enum.Enum):
    """How a transition ended.

    REACHED: the map is the target. PARTIAL: it is not, and nothing was undone. REVERTED: all that was done is undone.
    REVERT_INCOMPLETE: some of it could not be.
    """

    REACHED = "reached"
    PARTIAL = "partial"
    REVERTED = "reverted"
    REVERT_INCOMPLETE = "revert incomplete"


class ConfigOutcome(enum.Enum):
    """What became of the next boot.

    WRITTEN: it is as wished, durably. UNCHANGED: it was so already. NOT_TRIED: the live side was not reached. FAILED:
    it could not be written, and is as it was.
    """

    WRITTEN = "written"
    UNCHANGED = "so already"
    NOT_TRIED = "not tried"
    FAILED = "failed"


_AFFECTS: Final = {affect.value: affect for affect in Affect}
_ACTIONS: Final = {action.value: action for action in Action}
_MOST_LISTED: Final = 4  # more alike steps in a row than these share a line
_MOST_SAID: Final = 5  # an error's message is one line to be read; its report has them all
_POLICIES: Final = {policy.value: policy for policy in OnFailure}


def succeeded(action: Action, verdict: Verdict | None) -> bool:
    """Return True if *verdict* is what *action* was for; a KEEP is content with a guest that refuses to let go."""
    match action:
        case Action.PLUG:
            return isinstance(verdict, Plugged)
        case Action.UNPLUG:
            return isinstance(verdict, Unplugged)
    return isinstance(verdict, Refused | Plugged)


@dataclass(frozen=True, slots=True)
class StepReport:
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

    @property
    def left(self) -> bool | None:
        """True if the step left its vCPUs plugged, False if unplugged; None if nobody can tell."""
        match self.verdict if self.undo is None else self.undo:
            case Pending() | Unknown():
                return None
            case Plugged() | Refused():
                return True
            case Unplugged():
                return False
        if self.undo is not None:  # an undoing that did not happen
            return isinstance(self.verdict, Plugged)
        # Not sent, denied or rejected: as it was. A KEEP is sent something only once its vCPU has left.
        return self.action is Action.UNPLUG or (self.action is Action.KEEP and self.verdict is None)

    def as_json(self) -> dict[str, Any]:
        """Return the step as a JSON object: ``verdict`` is its word, beside the verdict's own attributes.

        ``why`` is the step's reason, ``reason`` the verdict's. Where the verdict has other ``ids``, ``seconds`` or
        ``why`` than the step, they are ``verdict_ids`` and so on.
        """
        own = {
            "action": self.action.value,
            "ids": str(self.ids),
            "why": self.reason,
            "seconds": self.seconds,
            "undone": self.undone,
            "undo": None if self.undo is None else as_json(self.undo),
        }
        return verdict_beside(self.verdict, own)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StepReport":
        """Return the step that ``as_json`` was given.

        Raises:
            ValueError: It is not of that shape; the text names the key.
        """
        return cls(
            action=take(data, "action", one_of(_ACTIONS)),
            ids=take(data, "ids", vcpu_map),
            verdict=verdict_from_json(data),
            reason=take(data, "why", text),
            seconds=take(data, "seconds", number),
            undo=take(data, "undo", optional(verdict_from_json)),
            undone=take(data, "undone", optional(flag)),
        )

    def __str__(self) -> str:
        return f"{self.action.value} {self.ids}: {self.said}"

    @property
    def said(self) -> str:
        """How it ended and why, in words of one line."""
        undone = {None: "", True: "undone", False: "NOT undone"}[self.undone]
        ended = ", ".join(filter(None, ("" if self.verdict is None else self.verdict.name, undone)))
        why = printable(" ".join(self.reason.split()))
        return ": ".join(filter(None, (ended, why))) or "not sent"


@dataclass(frozen=True, slots=True)
class ConfigReport:
    """What became of the next boot.

    Attributes:
        path: The document, or the record, that it is kept in.
        outcome: How it ended.
        start: The vCPUs that the next boot had before.
        target: Those that it was to have.
        max: How many vCPUs the next boot has room for.
        reason: Why it is not as wished, in words; "" if it is.
    """

    path: str
    outcome: ConfigOutcome
    start: VcpuMap
    target: VcpuMap
    max: int
    reason: str = ""

    @property
    def ok(self) -> bool:
        """True if the next boot is as wished."""
        return self.outcome in (ConfigOutcome.WRITTEN, ConfigOutcome.UNCHANGED)

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object; ``from_json`` gives an equal one back."""
        return {
            "path": self.path,
            "outcome": self.outcome.name,
            "start": str(self.start),
            "target": str(self.target),
            "max": self.max,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ConfigReport":
        """Return what ``as_json`` was given.

        Raises:
            ValueError: It is not of that shape; the text names the key.
        """
        return cls(
            path=take(data, "path", text),
            outcome=take(data, "outcome", one_of(ConfigOutcome.__members__)),
            start=take(data, "start", vcpu_map),
            target=take(data, "target", vcpu_map),
            max=take(data, "max", whole_number),
            reason=take(data, "reason", text),
        )

    def __str__(self) -> str:
        why = f": {printable(self.reason)}" if self.reason else ""
        return f"next boot {self.start} to {self.target}: {self.outcome.name}{why}"


@dataclass(frozen=True)
class TransitionReport:
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
        unconfirmed: Why the VM could not be read once more at the end, or "": then nothing is called reached.
        affect: What was to be changed. Under CONFIG there are no steps, and *start* and *target* are the next boot's.
        config: What became of the next boot, or None under LIVE.
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
    unconfirmed: str = ""
    affect: Affect = Affect.LIVE
    config: ConfigReport | None = None

    @property
    def live(self) -> TransitionOutcome | None:
        """How the live side ended by itself; None under CONFIG. Under LIVE it is the outcome."""
        if self.affect is Affect.CONFIG:
            return None
        failed = self.config is not None and self.config.outcome is ConfigOutcome.FAILED
        return TransitionOutcome.REACHED if failed else self.outcome  # else it would not have been tried

    @property
    def changed_by_other(self) -> VcpuMap:
        """The vCPUs that are not as the start and the steps left them: another client plugged or unplugged them."""
        if self.affect is Affect.CONFIG:
            return VcpuMap()
        expected, untold = set(self.start), set[int]()
        for step in self.steps:
            left = step.left
            if left is None:
                untold.update(step.ids)
            else:
                (expected.update if left else expected.difference_update)(step.ids)
        return VcpuMap((self.layout.enabled ^ expected) - untold)

    @property
    def failure(self) -> str:
        """Why the target is not reached, in one line, as the message of TransitionError."""
        wrong = _grouped(step for step in self.steps if step.verdict is not None and not step.ok)
        wrong += _grouped(step for step in self.steps if step.ok and step.undone is False)
        unsent = VcpuMap(each for step in self.steps if step.verdict is None for each in step.ids)
        wrong += [f"not sent: {unsent}"] if unsent else []
        if self.config is not None and self.config.outcome is ConfigOutcome.FAILED:
            wrong.append(str(self.config))
        wrong += _beyond_steps(self)
        pending = f", pending {self.layout.pending}" if self.layout.pending else ""
        return (
            f"vCPUs {self.target} not reached ({self.outcome.value}): {'; '.join(wrong) or 'changed by other'};"
            f" plugged now: {self.layout.enabled}{pending}"
        )

    @property
    def vm_outcome(self) -> Outcome:
        """Whether the transition has left the VM changed."""
        verdicts = [verdict for step in self.steps for verdict in (step.verdict, step.undo)]
        if any(isinstance(verdict, Unknown | Pending) for verdict in verdicts):
            return Outcome.UNKNOWN
        return Outcome.CHANGED if any(_changed(step) for step in self.steps) else Outcome.UNCHANGED

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object; ``from_json`` gives an equal one back."""
        return {
            "outcome": self.outcome.name,
            "start": str(self.start),
            "target": str(self.target),
            "on_failure": self.on_failure.value,
            "cancelled": self.cancelled,
            "unrecorded": self.unrecorded,
            "unconfirmed": self.unconfirmed,
            "seconds": self.seconds,
            "steps": [step.as_json() for step in self.steps],
            "layout": layout_as_json(self.layout),
            **({} if self.affect is Affect.LIVE else self._beyond_live()),
        }

    def _beyond_live(self) -> dict[str, Any]:
        return {
            "affect": self.affect.value,
            "live": None if self.live is None else self.live.name,
            "config": None if self.config is None else self.config.as_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> "TransitionReport":
        """Return the report that ``as_json`` was given, from the object or from its text.

        Raises:
            ValueError: It is not of that shape; the text names the key.
        """
        try:
            content = json.loads(data) if isinstance(data, str) else data
        except RecursionError as error:
            raise ValueError("it is nested too deeply for a report") from error
        return cls(
            start=take(content, "start", vcpu_map),
            target=take(content, "target", vcpu_map),
            on_failure=take(content, "on_failure", one_of(_POLICIES)),
            outcome=take(content, "outcome", one_of(TransitionOutcome.__members__)),
            steps=take(content, "steps", rows(StepReport.from_json)),
            layout=take(content, "layout", layout_from_json),
            seconds=take(content, "seconds", number),
            cancelled=take(content, "cancelled", flag),
            unrecorded=take(content, "unrecorded", text),
            unconfirmed=take(content, "unconfirmed", text),
            affect=take(content, "affect", one_of(_AFFECTS)) if "affect" in content else Affect.LIVE,
            config=take(content, "config", optional(ConfigReport.from_json)) if "affect" in content else None,
        )

    def __str__(self) -> str:
        layout = self.layout
        pending = f", pending {layout.pending}" if layout.pending else ""
        stopped = ", stopped by its caller" if self.cancelled else ""
        head = (
            f"{self.outcome.name}{stopped}: vCPUs {self.start} to {self.target}, on failure {self.on_failure.value};"
            f" plugged now: {layout.enabled}{pending}"
        )
        unrecorded = [f"  not recorded: {printable(self.unrecorded)}"] if self.unrecorded else []
        config = [] if self.config is None else [f"  {self.config}"]
        others = [f"  {said}" for said in _beyond_steps(self)]
        return "\n".join([head, *(f"  {line}" for line in _listed(self.steps)), *others, *config, *unrecorded])


def _beyond_steps(report: TransitionReport) -> list[str]:
    """Return what the steps of *report* do not tell: what others did, and that the end could not be seen."""
    others, enabled = report.changed_by_other, report.layout.enabled
    said = [f"plugged outside this transition: {VcpuMap(others & enabled)}"] if others & enabled else []
    said += [f"unplugged outside this transition: {VcpuMap(others - enabled)}"] if others - enabled else []
    return said + ([f"the VM could not be read at the end: {report.unconfirmed}"] if report.unconfirmed else [])


def _changed(step: StepReport) -> bool:
    """Return True if the slot of *step* is not as it was, on evidence: a KEEP whose vCPU left changes it too."""
    if step.undone:
        return False
    match step.action:
        case Action.PLUG:
            return isinstance(step.verdict, Plugged)
        case Action.UNPLUG:
            return isinstance(step.verdict, Unplugged)
    return isinstance(step.verdict, Plugged | Unplugged)


def _listed(steps: Iterable[StepReport]) -> Iterator[str]:
    """Return a line a step, in order; one for all that follow each other and ended alike, where there are many."""
    for (action, said), group in groupby(steps, lambda step: (step.action.value, step.said)):
        run = list(group)
        if len(run) > _MOST_LISTED:
            yield f"{action} {VcpuMap(each for step in run for each in step.ids)}: {said}"
        else:
            yield from map(str, run)


def _grouped(steps: Iterable[StepReport]) -> list[str]:
    """Return what is said of *steps* in one line, of all that ended alike at once, and of not too many."""
    alike: dict[tuple[str, str], list[int]] = {}
    for step in steps:
        alike.setdefault((step.action.value, step.said), []).extend(step.ids)
    said = [f"{action} {VcpuMap(ids)}: {said}" for (action, said), ids in alike.items()]
    more = len(said) - _MOST_SAID
    return said if more <= 0 else [*said[:_MOST_SAID], f"and {more} more"]
