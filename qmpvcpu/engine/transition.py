r"""One transition, from a plan to a report: says what to do next, and is told what came of it.

::

    BEGIN --Save(intent)--> FORWARD --Save(None)--> ENDED
                              |                       ^
                        a failure under REVERT        |
                              |                  Save(None)
                              v                       |
                            TURN --Save(reverting)--> REVERTING

Before the last Save there is a LastLook: what is told at the end has been seen, not only heard.

The owner's loop is: ``advance``, bring its effects about, wait for a reply, an answer, a deadline or a wish to stop,
tell it here, and again. A Save is awaited before anything else is sent: what a crash leaves behind is always an
intent that covers whatever may have been sent.

Rules that live here:

- After a failure STOP and REVERT send nothing more; what is in flight is awaited. CONTINUE goes on.
- REVERT undoes, in reverse order, what this transition did and nothing else: a slot that somebody else has changed is
  left alone, a removal that is still pending cannot be withdrawn. An undoing that fails is reported, not tried again.
  One that finishes what was cut short is the same transition: what had been done before it was cut is undone too.
- An answer that comes after its deadline, but before the end, still counts: the step's verdict is what became of it,
  and a vCPU that left while the rest is being undone is plugged again.
- Loss of the connection ends it where it stands, with the intent still recorded; with ``reconnect`` it waits, and
  what the next look shows is the reply to what was in flight.
"""

import enum
from collections.abc import Iterator
from dataclasses import replace

from qmpvcpu.engine.batch import Batch
from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.work import BY_OTHER, Effect, LastLook, Save, Stage, Terms, Work, report_on
from qmpvcpu.model.report import StepReport, TransitionOutcome, TransitionReport, succeeded
from qmpvcpu.model.transition import Action, Direction, Intent, OnFailure, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Plugged, Unknown, Unplugged
from qmpvcpu.planning.plan import Plan

_CANCELLED = "stopped by its caller"
_MOST_LOOKS = 8  # where others go on changing the VM there is no last one


class Phase(enum.Enum):
    """How far a transition is."""

    BEGIN = "the intent is being recorded"
    FORWARD = "towards the target"
    TURN = "the turning back is being recorded"
    REVERTING = "back to the start"
    FINISH = "the outcome is being recorded"
    ENDED = "over"


class Transition:
    """One run of one plan, which must be of the engine's layout as it is now.

    Not safe for threads; every method is synchronous.

    Attributes:
        phase: How far it is.
        cancelled: True once somebody stopped it.
        intent: What the record holds while it runs.
        batch: The work that is under way; replies and answers go there.
    """

    def __init__(self, plan: Plan, engine: Engine, terms: Terms, now: float, *, intent: Intent | None = None) -> None:
        self.phase = Phase.BEGIN
        self.cancelled = False
        own = Intent(plan.start, plan.target, plan.steps, terms.on_failure, terms.timeout)
        self.intent = own if intent is None else _covering(intent, plan.steps)
        forward = intent is not None and intent.direction is Direction.FORWARD
        self._begun = {step.first: step for step in intent.steps if not step.joins} if intent and forward else {}
        self._plan = plan
        self._engine = engine
        self._terms = terms
        self._began = self._now = now
        self._works = [Work(step) for step in plan.steps]
        self._undoing: dict[int, Work] = {}  # by id() of the work that they undo
        self._turned = False
        self._unsent = ""
        self._stopped = ""
        self._saving = False
        self._looking = False
        self._looks = 0
        self._looked_at = 0
        self._confirmed = not plan.steps  # of nothing to be done, the look before the plan is the last one
        self._unconfirmed = ""
        self._forward = self.batch = Batch(
            self._works,
            engine,
            terms,
            limit=terms.timeout,
            halts=terms.on_failure is not OnFailure.CONTINUE,
            one_by_one=terms.on_failure is OnFailure.STOP,
            last_moment=None if terms.total_timeout is None else now + terms.total_timeout,
        )

    # What comes next.

    @property
    def ended(self) -> bool:
        """True when nothing is left to be done."""
        return self.phase is Phase.ENDED

    @property
    def deadline(self) -> float | None:
        """When ``advance`` is to be called again at the latest, by the caller's clock."""
        return self.batch.deadline

    def advance(self, now: float) -> list[Effect]:
        """Return what is to be done now; nothing while a save is under way."""
        self._now = now
        if self._saving or self.ended:
            return []
        if self.phase is Phase.BEGIN:
            return self._save(self.intent)
        effects = self.batch.advance(now)
        if effects or not self.batch.ended or self._looking:
            return effects
        return self._turn_or_finish()

    def _save(self, intent: Intent | None) -> list[Effect]:
        self._saving = True
        return [Save(intent)]

    def _turn_or_finish(self) -> list[Effect]:
        reverts = self._terms.on_failure is OnFailure.REVERT and not self.cancelled
        if self.batch.failed and reverts and not self._turned:
            self._turned = True
            self._unsent = self.batch.halted
            self._works = [*self._done_before(), *self._works]
            self._undoing = {
                id(work): undo for work in reversed(self._works) if (undo := self._undo(work)) is not None
            }
        if self._undoing and self.phase is Phase.FORWARD:
            self.phase = Phase.TURN
            self.intent = replace(self.intent, direction=Direction.REVERTING)
            return self._save(self.intent)
        if self.batch.offline and self.cancelled and not self._confirmed:
            self._confirmed, self._unconfirmed = True, "the connection is lost"
        if not self._confirmed:
            if self.batch.offline:
                return []
            self._looking = True
            self._looked_at = self._engine.changes
            return [LastLook(self._looks)]
        self.phase = Phase.FINISH
        # What nobody knows the outcome of is for the next look: the record goes on saying that it was begun.
        unknown = any(isinstance(work.verdict, Unknown) for work in (*self._works, *self._undoing.values()))
        return self._save(self.intent if unknown else None)

    def _done_before(self) -> Iterator[Work]:
        """Return what had been done when the transition was cut short, and is not in the plan that finishes it."""
        planned = {work.step.first for work in self._works}
        for first, step in self._begun.items():
            if first in planned or first >= self._engine.layout.max:
                continue
            slot = self._engine.slots[first]
            if step.action is Action.PLUG and slot.has_our_name:
                yield Work(step, stage=Stage.DONE, verdict=Plugged(step.ids), path=slot.qom_path)
            elif step.action is Action.UNPLUG and not slot.present:
                yield Work(step, stage=Stage.DONE, verdict=Unplugged(step.ids))

    def _undo(self, work: Work) -> Work | None:
        """Return what undoes *work*, or None where nothing of ours was done."""
        action, ids = work.step.action, work.step.ids
        begun = self._begun.get(work.step.first)
        if begun is not None and begun.action is Action.KEEP:
            return None  # it was there at the start, left before the cut, and has been plugged again
        if not work.ours and (begun is None or begun.action is not action):
            return None
        if action is Action.PLUG and isinstance(work.verdict, Plugged):
            return Work(Step(Action.UNPLUG, ids), undoes=work)
        if action is Action.UNPLUG and isinstance(work.verdict, Unplugged):
            return Work(Step(Action.PLUG, ids), undoes=work)
        return None

    # What is told.

    def saved(self) -> None:
        """Note that the save is over."""
        self._saving = False
        if self.phase is Phase.BEGIN:
            self.phase = Phase.FORWARD
        elif self.phase is Phase.TURN:
            self.phase = Phase.REVERTING
            offline = self.batch.offline
            self.batch = Batch(
                self._undoing.values(),
                self._engine,
                self._terms,
                limit=self._terms.revert_timeout,
                halts=False,
                one_by_one=False,
            )
            if offline:
                self.batch.paused()
            if self.cancelled:
                self.batch.stop(_CANCELLED, self._now)
        else:
            self.phase = Phase.ENDED

    def answered(self, removal: Removal, now: float) -> None:
        """Take in that *removal* became final."""
        self._now = now
        work = self.batch.answered(removal, now) or self._forward.answered(removal, now)
        if work is None or self.phase is Phase.FINISH or self.ended:
            return
        undo = self._undo(work) if self._turned and work.undoes is None and id(work) not in self._undoing else None
        if undo is not None:
            self._undoing[id(work)] = undo
            if self.phase is Phase.REVERTING:
                self.batch.add(undo)
        if undo is not None or not self.batch.ended:
            self._look_anew()

    def _look_anew(self) -> None:
        """Discard a last look under way: it predates work still to be done."""
        self._looking = self._confirmed = False
        self._looks += 1

    def confirmed(self, look: LastLook, failed: str, now: float) -> None:
        """Note that *look* is over; *failed* is why it did not succeed, or ""."""
        self._now = now
        if not self._looking or look.number != self._looks:
            return
        if not failed and self._engine.changes != self._looked_at and self._looks < _MOST_LOOKS:
            self._look_anew()  # it tells nothing of what has changed since it was sent
        else:
            self._looking, self._confirmed, self._unconfirmed = False, True, failed

    def paused(self) -> None:
        """Note that the connection is lost and may come back: nothing is sent until ``resumed``."""
        if self._looking:
            self._look_anew()
        self.batch.paused()

    def resumed(self, now: float) -> None:
        """Note that the connection is back, and the engine has read the VM again."""
        self._now = now
        self.batch.resumed(now)

    def cancel(self, now: float) -> None:
        """Send nothing more, and wait for no answer of the guest's; replies of QEMU are still awaited."""
        self._now = now
        self.cancelled = True
        self._stopped = self._stopped or _CANCELLED
        self.batch.stop(_CANCELLED, now)

    def lose(self, reason: str, now: float) -> None:
        """Note that the connection is lost for good: it ends here, and the record keeps the intent."""
        self._now = now
        self._stopped = self._stopped or reason
        if not self._confirmed:
            self._unconfirmed = reason
        self.phase = Phase.ENDED
        self.batch.lose(reason, now)

    # Telling.

    @property
    def wanted(self) -> VcpuMap:
        """The map that is wanted of the VM now: the target, or the start once it has turned back."""
        return (
            self.intent.start if self._turned or self.intent.direction is Direction.REVERTING else self.intent.target
        )

    def report(self, *, unrecorded: str = "") -> TransitionReport:
        """Return what became of each slot, as it stands now; *unrecorded* is why the record does not have it."""
        layout = self._engine.layout
        steps = tuple(self._report(work) for work in self._works)
        as_wished = layout.enabled == self._plan.target and not layout.pending & self._plan.target
        reached = as_wished and not self._unconfirmed
        kept = bool(self._unconfirmed) or any(step.undone is False for step in steps) if self._turned else not reached
        if self._turned or self.intent.direction is Direction.REVERTING:
            outcome = TransitionOutcome.REVERT_INCOMPLETE if kept else TransitionOutcome.REVERTED
        else:
            outcome = TransitionOutcome.REACHED if reached else TransitionOutcome.PARTIAL
        return TransitionReport(
            start=self.intent.start if self._turned else self._plan.start,
            target=self._plan.target,
            on_failure=self._terms.on_failure,
            outcome=outcome,
            steps=steps,
            layout=layout,
            seconds=round(self._now - self._began, 6),
            cancelled=self.cancelled,
            unrecorded=unrecorded,
            unconfirmed=self._unconfirmed,
        )

    def _report(self, work: Work) -> StepReport:
        undo = self._undoing.get(id(work))
        unsent = self._unsent or self.batch.halted
        return report_on(work, undo, self._undone(work, undo), unsent=unsent, unsent_back=self._stopped)

    def _undone(self, work: Work, undo: Work | None) -> bool | None:
        if not self._turned:
            return None
        if undo is not None:
            return None if undo.reason == BY_OTHER else succeeded(undo.step.action, undo.verdict)
        if isinstance(work.verdict, Unknown):
            return False  # it may have been done, or be done yet
        # A removal that is pending cannot be withdrawn; one that was asked for before was not this transition's.
        slot = self._engine.slots[work.step.first]
        leaves = work.removal is not None and (not slot.present or slot.first in self._engine.removals)
        return False if leaves and work.step.action is Action.UNPLUG else None


def _covering(intent: Intent, steps: tuple[Step, ...]) -> Intent:
    """Return *intent* with those of *steps* that concern other slots: what is recorded covers whatever is sent."""
    known = {step.first for step in intent.steps}
    return replace(intent, steps=(*intent.steps, *(step for step in steps if step.first not in known)))
