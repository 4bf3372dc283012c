"""A transition as values: its steps, the intent that is recorded before it begins, and how it ended, slot by slot."""

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.errors import Outcome, milliseconds, printable
from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Affect, OnFailure, Proof
from qmpvcpu.model.vcpumap import VcpuMap, union, union_by
from qmpvcpu.model.verdicts import Pending, Plugged, Refused, Unknown, Unplugged, Verdict

if TYPE_CHECKING:
    from qmpvcpu.model.placement import Placement

_MOST_LISTED: Final = 4  # more alike steps in a row than these share a line
_MOST_SAID: Final = 5  # an error's message is one line; the report has them all


class Action(enum.Enum):
    """What a step does to its slot.

    KEEP is for a vCPU that should stay while its removal is pending. QEMU cannot withdraw a removal, so the step
    waits for the guest's answer and plugs the vCPU again if it left. ONLINE is for one that is plugged and should be
    online in the guest: with ``Proof.ONLINE``, or because an interrupted change may have taken it offline.
    """

    PLUG = "plug"
    UNPLUG = "unplug"
    KEEP = "keep"
    ONLINE = "online"


class Direction(enum.Enum):
    """Whether a transition goes towards its target or back to its start."""

    FORWARD = "forward"
    REVERTING = "reverting"


@dataclass(frozen=True, slots=True)
class Step:
    """One slot's part of a transition.

    Attributes:
        action: What is done.
        ids: All vCPU ids of the slot, which move together.
        qom_path: The CPU that should go, or stay; None for a plug.
        joins: True for the unplug of a vCPU whose removal is pending already: nothing is sent, its answer is awaited.
        asks_agent: True if the guest's agent has a part in it: it takes the vCPU offline before an unplug, or brings
            it online after a plug.
    """

    action: Action
    ids: VcpuMap
    qom_path: str | None = None
    joins: bool = False
    asks_agent: bool = False

    @property
    def first(self) -> int:
        """The first vCPU id of the slot, which names it."""
        return self.ids.lowest

    def __str__(self) -> str:
        return f"{self.action.value} {self.ids}"


@dataclass(frozen=True, slots=True)
class Intent:
    """A transition as it is recorded: before its first command, and until its outcome is known.

    Attributes:
        start: The vCPUs that were plugged before.
        target: The vCPUs that should be.
        steps: The slots concerned, in order.
        on_failure: The policy.
        timeout: How long the guest has for each answer, in seconds.
        direction: Which way it goes now.
        next_boot: What the next boot should have once the target is reached; None: it stays as it is.
        config: The document that keeps the next boot; None: the record.
        main_cpus: The host CPUs of QEMU's main thread, which it has to get back if it was sent elsewhere to bear a
            vCPU in its place; None: it is not sent anywhere.
        birthplaces: The host CPUs that it may be sent to for that.
        next_placement: Where threads should run from the next boot on, then; None: that stays as it is.
    """

    start: VcpuMap
    target: VcpuMap
    steps: tuple[Step, ...]
    on_failure: OnFailure = OnFailure.STOP
    timeout: float = 30.0
    direction: Direction = Direction.FORWARD
    next_boot: VcpuMap | None = None
    config: str | None = None
    main_cpus: VcpuMap | None = None
    birthplaces: tuple[VcpuMap, ...] = ()
    next_placement: "Placement | None" = None


class TransitionOutcome(enum.Enum):
    """How a transition ended.

    REACHED: the map is the target. REQUESTED: it will be, once the guest has given up the vCPUs that are pending;
    only with ``timeout=0``. PARTIAL: it is not, and nothing was undone. REVERTED: all that was done is undone.
    REVERT_INCOMPLETE: some of it could not be.
    """

    REACHED = "reached"
    REQUESTED = "requested"
    PARTIAL = "partial"
    REVERTED = "reverted"
    REVERT_INCOMPLETE = "revert incomplete"


class ConfigOutcome(enum.Enum):
    """How the change of the next boot ended.

    WRITTEN: it is on disk as requested. UNCHANGED: it was so before. NOT_TRIED: the live side was not reached.
    FAILED: it could not be written, and is as it was.
    """

    WRITTEN = "written"
    UNCHANGED = "unchanged"
    NOT_TRIED = "not tried"
    FAILED = "failed"


def succeeded(action: Action, verdict: Verdict | None) -> bool:
    """Return True if *verdict* is what *action* was for; a KEEP has succeeded if the guest refuses to let go."""
    match action:
        case Action.PLUG | Action.ONLINE:
            return isinstance(verdict, Plugged)
        case Action.UNPLUG:
            return isinstance(verdict, Unplugged)
    return isinstance(verdict, Refused | Plugged)


@dataclass(frozen=True, slots=True)
class ProofSeconds:
    """In how many seconds from sending each rung was proven of a plug; None where it was not, or nobody looked."""

    present: float | None = None
    acknowledged: float | None = None
    started: float | None = None
    online: float | None = None

    def __str__(self) -> str:
        times = ((proof.value, getattr(self, proof.value)) for proof in Proof)
        return ", ".join(f"{word} in {milliseconds(seconds)}" for word, seconds in times if seconds is not None)


@dataclass(frozen=True, slots=True)
class StepReport:
    """How the change of one slot ended.

    Attributes:
        action: What the step was for.
        ids: All vCPU ids of the slot.
        verdict: How it ended, or None if it was never sent.
        reason: Why it is not as requested, in words; "" if it is.
        seconds: From sending to the verdict; 0 if it was never sent.
        undo: How the undoing of it ended, or None if there was none.
        undone: True if it was undone, False if it should have been and is not, None if there was nothing to undo.
        proofs: What was proven of a vCPU that it plugged, and when; None where it plugged none.
        missing: The proof that was required of a plug and did not come, or None.
        placed: In how many seconds from sending the threads of what it plugged were in their place on the host; None
            where they are not, or nothing is wanted of them.
        unplaced: Why they are not; "" if they are, or nothing is wanted of them.
        taken_out: True if it was to be taken out again for that; *undone* says whether it was.
    """

    action: Action
    ids: VcpuMap
    verdict: Verdict | None = None
    reason: str = ""
    seconds: float = 0.0
    undo: Verdict | None = None
    undone: bool | None = None
    proofs: ProofSeconds | None = None
    missing: Proof | None = None
    placed: float | None = None
    unplaced: str = ""
    taken_out: bool = False

    @property
    def ok(self) -> bool:
        """True if the slot became what was wanted, with what was required of it; undone afterwards or not."""
        return succeeded(self.action, self.verdict) and self.missing is None and not self.taken_out

    @property
    def left(self) -> bool | None:
        """True if the step left its vCPUs plugged, False if unplugged; None if that is unknown."""
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
        return self.action in (Action.UNPLUG, Action.ONLINE) or (self.action is Action.KEEP and self.verdict is None)

    def __str__(self) -> str:
        return f"{self.action.value} {self.ids}: {self.said}{self._proven}"

    @property
    def _proven(self) -> str:
        """What was proven beyond the verdict's own, if more was looked for than what QEMU tells by itself."""
        if self.proofs is None or (self.missing is None and self.proofs.started is self.proofs.online is None):
            return ""
        proofs = str(replace(self.proofs, present=None))
        return f" ({proofs})" if proofs else ""

    @property
    def word(self) -> str:
        """The verdict in a word; ONLINE if the step was to bring the vCPU online and did; "" if it was never sent."""
        if self.verdict is None:
            return ""
        return "ONLINE" if self.action is Action.ONLINE and self.ok else self.verdict.name

    @property
    def said(self) -> str:
        """How it ended and why, in words of one line."""
        undone = {None: "", True: "undone", False: "NOT undone"}[self.undone]
        ended = ", ".join(filter(None, (self.word, undone)))
        unplaced = self.unplaced and f"not in its place: {self.unplaced}"
        why = printable(" ".join("; ".join(filter(None, (self.reason, unplaced))).split()))
        return ": ".join(filter(None, (ended, why))) or "not sent"


@dataclass(frozen=True, slots=True)
class ConfigReport:
    """How the change of the next boot ended.

    Attributes:
        path: The document, or the record, that keeps it.
        outcome: How it ended.
        start: The vCPUs that the next boot had before.
        target: Those that it should have.
        max: How many vCPUs the next boot has room for.
        reason: Why it is not as requested, in words; "" if it is.
    """

    path: str
    outcome: ConfigOutcome
    start: VcpuMap
    target: VcpuMap
    max: int
    reason: str = ""

    @property
    def ok(self) -> bool:
        """True if the next boot is as requested."""
        return self.outcome in (ConfigOutcome.WRITTEN, ConfigOutcome.UNCHANGED)

    def __str__(self) -> str:
        why = f": {printable(self.reason)}" if self.reason else ""
        return f"next boot {self.start} to {self.target}: {self.outcome.name}{why}"


@dataclass(frozen=True)
class TransitionReport:
    """How the change to a whole map ended; ``str()`` is for people.

    Attributes:
        start: The vCPUs that were plugged before.
        target: The vCPUs that should be.
        on_failure: The policy.
        outcome: How it ended.
        steps: Slot by slot, in the order of the plan.
        layout: The VM at the end.
        seconds: From the first command to the last answer.
        cancelled: True if it was stopped before its end.
        unrecorded: Why the record does not have it, or "".
        unconfirmed: Why the VM could not be read again at the end, or "". Such a transition is never REACHED.
        affect: What the change applied to. Under CONFIG there are no steps, and *start* and *target* are the next
            boot's.
        config: How the change of the next boot ended, or None under LIVE.
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
        expected, untold = self.start, VcpuMap()
        for step in self.steps:
            left = step.left
            if left is None:
                untold |= step.ids
            else:
                expected = expected | step.ids if left else expected - step.ids
        return (self.layout.enabled ^ expected) - untold

    @property
    def failure(self) -> str:
        """Why the target is not reached, in one line, as the message of TransitionError."""
        wrong = _grouped(step for step in self.steps if step.verdict is not None and not step.ok)
        wrong += _grouped(step for step in self.steps if step.ok and step.undone is False)
        unsent = [step for step in self.steps if step.verdict is None]
        if unsent:  # if no step failed, nothing else says why
            why = "" if wrong else unsent[0].reason.removeprefix("not sent: ")
            wrong.append(f"not sent: {union(step.ids for step in unsent)}{f' ({why})' if why else ''}")
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

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object, its attributes and ``live``; ``from_json`` reads it back."""
        shown: dict[str, Any] = to_json(self) | {"live": to_json(self.live)}
        return shown

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> "TransitionReport":
        """Return the report that ``to_json`` was given, from the object or from its text.

        Raises:
            ValueError: It has another shape; the text names the key.
        """
        return from_json(cls, data)

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
    """Return what the steps of *report* do not say: what others did, and why the end could not be read."""
    others, enabled = report.changed_by_other, report.layout.enabled
    said = [f"plugged outside this transition: {others & enabled}"] if others & enabled else []
    said += [f"unplugged outside this transition: {others - enabled}"] if others - enabled else []
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
        case Action.ONLINE:
            return False
    return isinstance(step.verdict, Plugged | Unplugged)


def _listed(steps: Iterable[StepReport]) -> Iterator[str]:
    """Return a line for each step, in order; many steps in a row that ended alike share one."""
    for (action, said), group in groupby(steps, lambda step: (step.action.value, step.said)):
        run = list(group)
        if len(run) > _MOST_LISTED:
            yield f"{action} {union(step.ids for step in run)}: {said}"
        else:
            yield from map(str, run)


def _grouped(steps: Iterable[StepReport]) -> list[str]:
    """Return how *steps* ended: one entry for all that ended alike, and not too many entries."""
    alike = union_by(((step.action.value, step.said), step.ids) for step in steps)
    said = [f"{action} {ids}: {said}" for (action, said), ids in alike.items()]
    more = len(said) - _MOST_SAID
    return said if more <= 0 else [*said[:_MOST_SAID], f"and {more} more"]
