r"""One transition, from a plan to its end: says what to do next, and is told what came of it.

::

    START --save--> FORWARD --------------------> LOOK --> CONFIG --> FINISH --save--> ENDED
                       |                           ^
                 a failure under REVERT            |
                       |                           |
                       +--> TURN --save--> REVERTING

A single plug or unplug is a transition of one step. Only whole maps LOOK, so REACHED always rests on a read. CONFIG
writes the next boot, where it is to follow.

The owner's loop is: ``advance``, carry out what it returns, wait for a reply, an answer, a deadline or a request to
stop, tell it here, and again. A save is awaited before anything else is sent: what a crash leaves behind is always an
intent that covers everything that may have been sent.

Rules that live here:

- After a failure STOP and REVERT send nothing more; what is in flight is awaited. CONTINUE goes on.
- REVERT undoes, in reverse order, what this transition did and nothing else: a slot that somebody else has changed is
  left alone, a removal that is still pending cannot be withdrawn. An undoing that fails is reported, not tried again.
  One that finishes what was cut short is the same transition: what had been done before it was cut is undone too.
- An answer that comes after its deadline, but before the end, still counts: the step's verdict is what became of it,
  and a vCPU that left while the rest is being undone is plugged again.
- Loss of the connection ends it where it stands, with the intent still recorded; if somebody looks for QEMU it waits,
  and what the next look shows is the reply to what was in flight.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from qmpvcpu.engine.batch import Batch, BatchTask, Bounds
from qmpvcpu.engine.messages import Change, Result
from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.steprun import BY_OTHER, StepRun, StepStage, report_on
from qmpvcpu.engine.vmstate import VmState
from qmpvcpu.errors import MonitorLostError, RecordError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Affect, OnFailure, Proof
from qmpvcpu.model.transition import (
    Action,
    ConfigOutcome,
    ConfigReport,
    Direction,
    Intent,
    Step,
    StepReport,
    TransitionOutcome,
    TransitionReport,
)
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Pending, Plugged, Unknown, Unplugged
from qmpvcpu.planning.plan import Plan

_CANCELLED = "stopped by its caller"
_MOST_LOOKS = 8  # where others go on changing the VM there is no last one


class Phase(enum.Enum):
    """How far a transition is."""

    START = "the intent is being recorded"
    FORWARD = "towards the target"
    TURN = "the turning back is being recorded"
    REVERTING = "back to the start"
    LOOK = "the VM is read once more"
    CONFIG = "the next boot is being written"
    FINISH = "the outcome is being recorded"
    ENDED = "over"

    __hash__ = object.__hash__  # as that of ``StepStage``


class SaveIntent(NamedTuple):
    """Write the record with *intent* (None: it is over), for *phase*; then call ``saved``, if there is a record."""

    intent: Intent | None
    phase: Phase


class LastLook(NamedTuple):
    """Read the slots, then call ``confirmed``: nothing is called reached that was not looked at."""

    number: int


class WriteNextBoot(NamedTuple):
    """Write the next boot, then call ``config_written``."""


Task = SaveIntent | LastLook | WriteNextBoot | BatchTask


class Transition:
    """One run of one plan, which must be of the state as it is now.

    Args:
        change: What was asked for.
        plan: The plan of it.
        state: What is known of the VM.
        now: The caller's clock, in seconds.
        reply_timeout: How long QEMU has for each reply, in seconds.
        reconnects: True if somebody looks for QEMU when the connection is lost.
        is_recorded: True if there is a record, so that each save is awaited.

    Attributes:
        change: As given.
        plan: As given.
        is_map: True for a whole map, which runs alone; False for one step: those run side by side.
        reply_timeout: As given.
        phase: How far it is.
        cancelled: True once somebody stopped it.
        abandoned: True once nobody waits for it, and it sends nothing more.
        intent: What the record holds while it runs.
        batch: The steps that are under way; replies and answers go there.
        lost: Why the connection was lost for good, or "".
        not_begun: Why the intent could not be recorded, so that nothing was sent; or None.
        unrecorded: Why the turn or the outcome could not be recorded, or None.
        unwritten: Why the next boot could not be written, or None.
        offline_until: When it gives up waiting for the connection to come back, or None.
    """

    def __init__(
        self,
        change: Change,
        plan: Plan,
        state: VmState,
        now: float,
        *,
        reply_timeout: float,
        reconnects: bool = False,
        is_recorded: bool = True,
    ) -> None:
        options, intent = change.options, change.intent
        self.change = change
        self.plan = plan
        self.is_map = change.result is Result.REPORT
        self.phase = Phase.START
        self.cancelled = False
        self.abandoned = False
        self.lost: MonitorLostError | None = None
        self.not_begun: RecordError | None = None
        self.unrecorded: RecordError | None = None
        self.unwritten: RecordError | None = None
        self.offline_until: float | None = None
        own = Intent(plan.start, plan.target, plan.steps, options.on_failure, options.timeout)
        self.intent = own if intent is None else _covering(intent, plan.steps)
        forward = intent is not None and intent.direction is Direction.FORWARD
        self._begun = {step.first: step for step in intent.steps if not step.joins} if intent and forward else {}
        self._state = state
        self.reply_timeout = reply_timeout
        self._reconnects = reconnects
        self._is_recorded = is_recorded
        self._began = self._now = now
        self._runs = [StepRun(step, taken_offline=self._was_taken_offline(step)) for step in plan.steps]
        self._undoing: dict[StepRun, StepRun] = {}  # by the run that they undo
        self._turned = False
        self._unsent = ""
        self._stopped = ""
        self._busy = False  # with a save, a last look or the next boot
        self._looks = 0
        self._looked_at = 0
        # An empty plan was confirmed by the read before it; a single step is confirmed by its evidence.
        self._confirmed = not (plan.steps and self.is_map)
        self._unconfirmed = ""
        self._config: ConfigReport | None = None
        self._forward = self.batch = Batch(
            self._runs,
            state,
            options,
            Bounds(
                limit=options.timeout,
                halts=options.on_failure is not OnFailure.CONTINUE,
                one_by_one=options.on_failure is OnFailure.STOP,
                # One step has one answer to wait for, and a timeout for that.
                last_moment=now + options.total_timeout
                if self.is_map and options.total_timeout is not None
                else None,
                reply_timeout=reply_timeout,
                reconnects=reconnects,
                single=not self.is_map,
                until_accepted=change.result is Result.REMOVAL,
            ),
        )

    def _was_taken_offline(self, step: Step) -> bool:
        """Return True if what this finishes, or reverts, may have taken the vCPUs of *step* offline in the guest."""
        begun = self._begun.get(step.first)
        if step.action is Action.UNPLUG:
            return begun is not None and begun.action is Action.UNPLUG and begun.asks_agent
        return step.action is Action.KEEP and step.asks_agent

    @property
    def left_offline(self) -> list[StepRun]:
        """The steps that have left vCPUs offline in the guest, and that the agent was not asked to bring back."""
        runs = (*self._runs, *self._undoing.values())
        return [run for run in runs if run.left_offline and not run.no_agent]

    @property
    def is_given_up(self) -> bool:
        """True if nobody waits for it, and a step has ended before anything was sent to QEMU."""
        return self.abandoned and any(run.verdict is None and run.removal is None for run in self._runs)

    @property
    def runs(self) -> tuple[StepRun, ...]:
        """Its steps, in order."""
        return tuple(self._runs)

    @property
    def began(self) -> float:
        """When it was planned, by the caller's clock."""
        return self._began

    @property
    def undoing(self) -> Mapping[StepRun, StepRun]:
        """What undoes its steps, by the step that it undoes."""
        return self._undoing

    @property
    def ended(self) -> bool:
        """True when nothing is left to be done."""
        return self.phase is Phase.ENDED

    @property
    def has_begun(self) -> bool:
        """True once its intent is recorded."""
        return self.phase is not Phase.START

    @property
    def sends(self) -> bool:
        """True while it has commands on their way, or is about to send: no map may begin."""
        return self.phase is Phase.START or self.batch.has_commands or self.batch.is_placing

    @property
    def has_sent(self) -> bool:
        """True once a command was sent, to QEMU or to the guest's agent."""
        return any(run.arguments or run.taken_offline or (run.ours and run.sent_at) for run in self._runs)

    @property
    def is_open(self) -> bool:
        """True while its outcome is open: it may still send, QEMU has not replied, or the next boot is to follow."""
        follows = self.change.config is not None and self.phase not in {Phase.FINISH, Phase.ENDED}
        may_send = not self.batch.ended and any(run.may_send or run.taken_out is not None for run in self._runs)
        return self.phase is Phase.START or may_send or follows

    # What comes next.

    @property
    def deadline(self) -> float | None:
        """When ``advance`` is to be called again at the latest, by the caller's clock; a save is to end first."""
        if self._busy and self.phase is not Phase.LOOK:
            return None
        first = self.batch.deadline
        if self.offline_until is None:
            return first
        return self.offline_until if first is None else min(first, self.offline_until)

    def advance(self, now: float, *, may_send: bool = True) -> list[Task]:
        """Return what is to be done now; nothing while a save is under way."""
        self._now = now
        if self.ended or (self._busy and self.phase is not Phase.LOOK):
            return []
        if self.offline_until is not None and now >= self.offline_until:
            self.lose(MonitorLostError("the connection is lost, and did not come back in time"), now)
            return []
        tasks: list[Task] = []
        if self.phase is Phase.START:
            # A step that only joins a removal sends nothing that a record would have to cover.
            if not self.is_map and all(step.joins for step in self.plan.steps):
                self.phase = Phase.FORWARD
            else:
                tasks = self._save(self.intent)
                if self._busy:
                    return tasks
        of_steps = self.batch.advance(now, may_send=may_send)
        tasks += of_steps
        return tasks if of_steps or not self.batch.ended or self._busy else tasks + self._turn_or_finish()

    def _save(self, intent: Intent | None) -> list[Task]:
        task = SaveIntent(intent, self.phase)
        self._busy = True
        if not self._is_recorded:
            self.saved()
        return [task]

    def _turn_or_finish(self) -> list[Task]:
        reverts = self.is_map and self.change.options.on_failure is OnFailure.REVERT and not self.cancelled
        if self.batch.failed and reverts and not self._turned:
            self._turned = True
            self._unsent = self.batch.halted
            self._runs = [*self._done_before(), *self._runs]
            self._undoing = {run: undo for run in reversed(self._runs) if (undo := self._undo(run)) is not None}
        if self._undoing and self.phase in {Phase.FORWARD, Phase.LOOK} and self.batch is self._forward:
            self.phase = Phase.TURN
            self.intent = replace(self.intent, direction=Direction.REVERTING)
            saves = self._save(self.intent)
            return saves if self._busy else saves + self.advance(self._now)
        if self.batch.offline and self.cancelled and not self._confirmed:
            self._confirmed, self._unconfirmed = True, "the connection is lost"
        if not self._confirmed:
            return self._look()
        if self.change.config is not None and self._config is None:
            if self._is_reached():
                self.phase, self._busy = Phase.CONFIG, True
                return [WriteNextBoot()]
            self._config = self.change.config.not_tried()
        self.phase = Phase.FINISH
        # Keep the intent recorded while an outcome is unknown, or a guest is owed a vCPU that it had before a crash.
        is_owed = self.change.intent is not None and not all(map(self._is_back, self._runs))
        return self._save(self.intent if self.is_unknown or is_owed else None)

    def _look(self) -> list[Task]:
        if self.batch.offline:
            return []
        self.phase, self._busy = Phase.LOOK, True
        self._looked_at = self._state.changes
        return [LastLook(self._looks)]

    @property
    def is_unknown(self) -> bool:
        """True if nobody knows what became of one of its steps."""
        return any(run.is_unknown for run in (*self._runs, *self._undoing.values()))

    def _done_before(self) -> Iterator[StepRun]:
        """Return what had been done when the transition was cut short, and is not in the plan that finishes it."""
        planned = {run.first for run in self._runs}
        for first, step in self._begun.items():
            if first in planned or first >= self._state.layout.max:
                continue
            slot = self._state.slots[first]
            if step.action is Action.PLUG and slot.has_our_name:
                yield StepRun(step, stage=StepStage.ENDED, verdict=Plugged(step.ids), path=slot.qom_path)
            elif step.action is Action.UNPLUG and not slot.present:
                yield StepRun(step, stage=StepStage.ENDED, verdict=Unplugged(step.ids))

    def _undo(self, run: StepRun) -> StepRun | None:
        """Return what undoes *run*, or None where nothing of ours was done."""
        action, ids = run.step.action, run.step.ids
        if run.taken_out is not None and run.taken_out.was_tried:
            return None
        begun = self._begun.get(run.first)
        if begun is not None and begun.action is Action.KEEP:
            return None  # it was there at the start, left before the cut, and has been plugged again
        if not run.ours and (begun is None or begun.action is not action):
            return None
        if action is Action.PLUG and isinstance(run.verdict, Plugged):
            asks_agent = self.change.options.offline_first
            return StepRun(Step(Action.UNPLUG, ids, asks_agent=asks_agent), undoes=run)
        if action is Action.UNPLUG and isinstance(run.verdict, Unplugged):
            asks_agent = run.taken_offline or (begun is not None and begun.asks_agent)
            return StepRun(Step(Action.PLUG, ids, asks_agent=asks_agent), undoes=run)
        return None

    # What is told.

    def saved(self, error: RecordError | None = None) -> None:
        """Note that the save is over; *error* is why it failed. Without the first one nothing is sent."""
        self._busy = False
        if self.phase is Phase.START and error is not None:
            self.not_begun = error
            self.phase = Phase.ENDED
            return
        self.unrecorded = error or self.unrecorded
        if self.phase is Phase.START:
            self.phase = Phase.FORWARD
        elif self.phase is Phase.TURN:
            self._turn_back()
        else:
            self.phase = Phase.ENDED

    def _turn_back(self) -> None:
        self.phase = Phase.REVERTING
        offline = self.batch.offline
        bounds = Bounds(
            limit=self.change.options.undo_timeout,
            reply_timeout=self.reply_timeout,
            reconnects=self._reconnects,
        )
        # The proof that was asked for is of what the change itself plugs.
        options = self.change.options._replace(proof=Proof.PRESENT, require_proof=False)
        if self._state.places.placement is not None:
            options = options.without_required_place()
        self.batch = Batch(self._undoing.values(), self._state, options, bounds)
        if offline:
            self.batch.paused()
        if self.cancelled:
            self.batch.stop(_CANCELLED, self._now)

    def answered(self, removal: Removal, now: float) -> None:
        """Take in that *removal* became final."""
        self._now = now
        run = self.batch.answered(removal, now) or self._forward.answered(removal, now)
        if run is None or self.phase in {Phase.CONFIG, Phase.FINISH, Phase.ENDED}:
            return
        undo = self._undo(run) if self._turned and run.undoes is None and run not in self._undoing else None
        if undo is not None:
            self._undoing[run] = undo
            if self.batch is not self._forward:
                self.batch.add(undo)
        if undo is not None or not self.batch.ended:
            self._look_anew()

    def _look_anew(self) -> None:
        """Discard a last look: it predates work still to be done."""
        if self.phase is Phase.LOOK:
            self._busy = False
            self.phase = Phase.FORWARD if self.batch is self._forward else Phase.REVERTING
        self._confirmed = not self.is_map
        self._looks += 1

    def confirmed(self, look: LastLook, failed: str, now: float) -> None:
        """Note that *look* is over; *failed* is why it did not succeed, or ""."""
        self._now = now
        if self.phase is not Phase.LOOK or look.number != self._looks:
            return
        if not failed and self._state.changes != self._looked_at and self._looks < _MOST_LOOKS:
            self._look_anew()  # it tells nothing of what has changed since it was sent
        else:
            self._busy, self._confirmed, self._unconfirmed = False, True, failed

    def config_written(self, report: ConfigReport, error: RecordError | None) -> None:
        """Note what became of the next boot."""
        self._busy, self._config, self.unwritten = False, report, error

    def paused(self, until: float) -> None:
        """Note that the connection is lost, and may come back *until* then: nothing is sent until ``resumed``."""
        self.offline_until = until
        if self.phase is Phase.LOOK:
            self._look_anew()
        self.batch.paused()

    def resumed(self, now: float) -> None:
        """Note that the connection is back, and the state has read the VM again."""
        self._now = now
        self.offline_until = None
        self.batch.resumed(now)

    def cancel(self, now: float) -> None:
        """Send nothing more, and wait for no answer of the guest's; replies of QEMU are still awaited."""
        self._now = now
        self.cancelled = True
        self._stopped = self._stopped or _CANCELLED
        self.batch.stop(_CANCELLED, now)

    def abandon(self, now: float) -> None:
        """Send nothing more, since nobody waits for it any more; what was sent is awaited as before."""
        self._now = now
        self.abandoned = True
        self.batch.abandon("its caller has gone", now)

    def drop(self) -> None:
        """End it as it is: nothing was sent, and nobody waits for it."""
        self.phase = Phase.ENDED

    def lose(self, error: MonitorLostError, now: float) -> None:
        """Note that the connection is lost for good: it ends here, and the record keeps the intent."""
        self._now = now
        self.lost = error
        self.offline_until = None
        if self.phase in {Phase.CONFIG, Phase.FINISH}:
            return  # the outcome is known, and is being written
        self._stopped = self._stopped or error.why
        if not self._confirmed:
            self._unconfirmed = error.why
        self.phase = Phase.ENDED
        self.batch.lose(error, now)

    # Telling.

    @property
    def wanted(self) -> VcpuMap:
        """The map that is wanted of the VM now: the target, or the start once it has turned back."""
        return (
            self.intent.start if self._turned or self.intent.direction is Direction.REVERTING else self.intent.target
        )

    def is_as_asked(self, outcome: TransitionOutcome) -> bool:
        """Return True if *outcome* is what was asked for: the target, or the start where one is reverted."""
        if self.change.intent is not None and self.change.intent.direction is Direction.REVERTING:
            return outcome is TransitionOutcome.REVERTED
        return outcome in (TransitionOutcome.REACHED, TransitionOutcome.REQUESTED)

    @property
    def may_try_again(self) -> bool:
        """True if every step went well, and what was asked for is not reached all the same.

        A removal that had been asked for before a crash, and that nobody could know of, was answered meanwhile.
        """
        return not (self.cancelled or self.lost) and all(
            run.went_well or self._left_meanwhile(run) for run in self._runs
        )

    def _left_meanwhile(self, run: StepRun) -> bool:
        return run.step.action is Action.ONLINE and not self._state.slots[run.first].present

    def _is_reached(self) -> bool:
        if self.is_map:
            return self.report().outcome is TransitionOutcome.REACHED
        return all(run.went_well for run in self._runs)

    def report(self) -> TransitionReport:
        """Return what became of each slot, as it stands now."""
        layout = self._state.layout
        steps = tuple(self._report(run) for run in self._runs)
        as_wanted = layout.enabled == self.plan.target and not layout.pending & self.plan.target
        proven = all(run.missing is None and run.taken_out is None and self._is_back(run) for run in self._runs)
        reached = as_wanted and not self._unconfirmed and proven
        kept = bool(self._unconfirmed) or any(step.undone is False for step in steps) if self._turned else not reached
        if self._turned or self.intent.direction is Direction.REVERTING:
            outcome = TransitionOutcome.REVERT_INCOMPLETE if kept else TransitionOutcome.REVERTED
        else:
            outcome = TransitionOutcome.PARTIAL
            if reached:
                outcome = TransitionOutcome.REACHED
            elif self._is_requested(layout):
                outcome = TransitionOutcome.REQUESTED
        if self._config is not None and self._config.outcome is ConfigOutcome.FAILED:
            outcome = TransitionOutcome.PARTIAL
        return TransitionReport(
            start=self.intent.start if self._turned else self.plan.start,
            target=self.plan.target,
            on_failure=self.change.options.on_failure,
            outcome=outcome,
            steps=steps,
            layout=layout,
            seconds=round(self._now - self._began, 6),
            cancelled=self.cancelled,
            unrecorded="" if self.unrecorded is None else str(self.unrecorded),
            unconfirmed=self._unconfirmed,
            affect=Affect.LIVE if self.change.config is None else Affect.BOTH,
            config=self._config_report(),
        )

    def _is_requested(self, layout: Layout) -> bool:
        """Return True if no more was asked for than to request removals, and all else is done."""
        return (
            not self.change.options.timeout
            and self.change.config is None
            and not (self.cancelled or self.lost or self._unconfirmed)
            and layout.enabled - layout.pending == self.plan.target
            and all(isinstance(run.verdict, Pending) or run.went_well for run in self._runs)
        )

    def _config_report(self) -> ConfigReport | None:
        if self._config is None and self.change.config is not None and self.ended:
            return self.change.config.not_tried()  # it was lost before
        return self._config

    def _report(self, run: StepRun) -> StepReport:
        undo = self._undoing.get(run, run.taken_out)
        unsent = self._unsent or self.batch.halted
        return report_on(run, undo, self._undone(run, undo), unsent=unsent, unsent_back=self._stopped)

    @staticmethod
    def _is_back(run: StepRun) -> bool:
        """Return False if what *run* was to bring online again in the guest is not."""
        if run.step.action is Action.ONLINE:
            return isinstance(run.verdict, Plugged) and run.missing is None
        if run.step.action is Action.KEEP and run.left_offline:
            return False
        return not (run.plugs and run.step.asks_agent and run.missing is not None)

    def _undone(self, run: StepRun, undo: StepRun | None) -> bool | None:
        if undo is not None and undo is run.taken_out:
            return undo.went_well
        if not self._turned:
            return None
        if undo is not None:
            return None if undo.reason == BY_OTHER else undo.went_well
        if isinstance(run.verdict, Unknown) or run.left_offline:
            return False  # it may have been done, or be done yet
        # A removal that is pending cannot be withdrawn; one that was asked for before was not this transition's.
        slot = self._state.slots[run.first]
        leaves = run.removal is not None and (not slot.present or slot.first in self._state.removals)
        return False if leaves and run.step.action is Action.UNPLUG else None


def _covering(intent: Intent, steps: tuple[Step, ...]) -> Intent:
    """Return *intent* with those of *steps* that concern other slots: what is recorded covers all that is sent."""
    known = {step.first for step in intent.steps}
    return replace(intent, steps=(*intent.steps, *(step for step in steps if step.first not in known)))
