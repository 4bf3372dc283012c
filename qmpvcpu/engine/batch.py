"""A batch of steps, carried out: sent in order within its bounds, awaited, and ended one by one.

Rules that live here:

- Plugs come before unplugs; both are sent in the order given.
- At most ``in_flight`` commands have no reply. One by one: a removal is requested when no other is out.
- A removal that is under way is joined: nothing is sent, its end is the step's.
- Where a failure halts the batch, nothing more is sent after it; what is out is awaited.
- A deadline ends the waiting and nothing else. Before a removal is given up there is one last look.
- What somebody else has done meanwhile is not done again, and is not ours.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from qmpvcpu.engine.inflight import InFlight
from qmpvcpu.engine.removal import Removal, State
from qmpvcpu.engine.steprun import BY_OTHER, STAGES, StepRun, StepStage, why
from qmpvcpu.engine.vmstate import Read, VmState
from qmpvcpu.errors import StepDeniedError
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.transition import Action, succeeded
from qmpvcpu.model.verdicts import Denied, Pending, Plugged, Refused, Unknown, Unplugged, Verdict
from qmpvcpu.planning.checks import check_plug, check_unplug


class SendStep(NamedTuple):
    """Send the command of *run*; what comes of it goes to ``replied`` or ``unanswered``."""

    run: StepRun


class LookAgain(NamedTuple):
    """Read the slots, then call ``looked`` with *runs*, whether or not it succeeded."""

    read: Read
    runs: tuple[StepRun, ...]


class Bounds(NamedTuple):
    """How a batch is carried out.

    Attributes:
        limit: How long the guest has for each answer, in seconds; 0 only requests.
        halts: Send nothing more after a failure.
        one_by_one: Request a removal only when no other is out.
        last_moment: When nothing more is waited for, by the caller's clock, or None.
        reply_timeout: How long QEMU has for each reply, in seconds.
        reconnects: Wait for ``resumed`` when the connection is lost, rather than end.
        single: The caller waits for this one step: it gets the rejection of a removal that it joined, where a map
            would request the removal itself.
        until_accepted: A removal is over once QEMU has accepted it.
    """

    limit: float
    halts: bool = False
    one_by_one: bool = False
    last_moment: float | None = None
    reply_timeout: float = 10.0
    reconnects: bool = False
    single: bool = False
    until_accepted: bool = False


class Batch:
    """Some steps on one VM, from the first command to the last answer.

    Args:
        runs: What is to be done, in order.
        state: What is known of the VM.
        options: What the caller allows, and what proof is wanted.
        bounds: How it is carried out.

    Attributes:
        failed: True once a step did not become what it should.
        halted: Why nothing more is sent, or "".
        offline: True while the connection is lost: nothing is sent until ``resumed``.
    """

    def __init__(self, runs: Iterable[StepRun], state: VmState, options: CheckedOptions, bounds: Bounds) -> None:
        self.failed = False
        self.halted = ""
        self.offline = False
        self._state = state
        self._options = options
        self._bounds = bounds
        self._plugs: deque[StepRun] = deque()
        self._others: deque[StepRun] = deque()
        self._out = InFlight()
        self._stopped = False
        self._now = 0.0
        for run in runs:
            (self._plugs if run.plugs else self._others).append(run)
            removal = state.removals.get(run.step.first)
            if (
                removal is not None
                and not run.plugs
                and (run.step.action is Action.KEEP or not removal.may_ask_again)
            ):
                run.ours = False
                self._out.watch(run, removal)

    # What comes next.

    @property
    def ended(self) -> bool:
        """True when nothing is left to be sent, or to be waited for."""
        return not self._out and (bool(self.halted) or not (self._plugs or self._others))

    @property
    def has_commands(self) -> bool:
        """True while a command has no reply."""
        return bool(self._out.commands)

    @property
    def deadline(self) -> float | None:
        """When ``advance`` is to be called again at the latest, by the caller's clock."""
        first = self._out.deadline
        last = self._bounds.last_moment
        if self.halted or self.ended or last is None:
            return first
        return last if first is None else min(first, last)

    def touched(self, first: int) -> bool:
        """Take in that something new is known of a slot; return whether a plug waits for the guest's answer there."""
        return self._out.touch(first)

    def advance(self, now: float, *, may_send: bool = True) -> list[SendStep | LookAgain]:
        """Return what is to be done now."""
        self._now = now
        effects = self._expire() + self._prove()
        if self._bounds.single:
            self._await_joined()
        while may_send and (sent := self._send_next()) is not None:
            effects += sent
        return effects

    # What is told.

    def replied(self, run: StepRun, verdict: Verdict | None, now: float) -> None:
        """Take QEMU's reply to the command of *run*: its verdict, or None where QEMU accepted it."""
        self._now = now
        if not self._out.take_reply(run):
            return  # its deadline had passed; the state has taken the reply in
        if verdict is None:
            self._accepted(run)
        else:
            self._end(run, verdict)

    def unanswered(self, run: StepRun, reason: str, now: float) -> None:
        """Note that the connection was lost with the command of *run* in flight; nothing more is sent over it."""
        self._now = now
        self.offline = True
        if not self._out.take_reply(run):
            return
        if self._bounds.reconnects:
            run.stage = StepStage.UNSURE
            self._out.unsure.append(run)
        else:
            self._end(run, Unknown(run.step.ids, reason))

    def answered(self, removal: Removal, now: float) -> StepRun | None:
        """Take in that *removal* became final, and return the step it ends, even one whose deadline has passed."""
        self._now = now
        run = self._out.watcher(removal)
        if run is not None:
            if run.stage is StepStage.QUEUED:  # it joined, and needs no turn any more: nothing is to be sent
                self._others.remove(run)
            self._conclude(run)
        return run

    def accepted_by_other(self, removal: Removal, now: float) -> bool:
        """Take in that QEMU has accepted *removal*, which may be joined here; return whether that ends the step."""
        if not self._bounds.until_accepted or removal.state is State.SENT:
            return False
        self._now = now
        run = self._out.watcher(removal)
        if run is None or run.stage is not StepStage.REQUESTED:
            return False
        self._end(run, None)
        return True

    def add(self, run: StepRun) -> None:
        """Have *run* done too; a halted batch ends it unsent."""
        (self._plugs if run.plugs else self._others).append(run)

    def looked(self, runs: Iterable[StepRun], now: float) -> None:
        """Note that the look made for *runs* is over, whether or not it succeeded."""
        self._now = now
        for run in runs:
            if run.stage is StepStage.CHECKED:
                self._give_up(run)

    def paused(self) -> None:
        """Note that the connection is lost and may come back: nothing is sent until ``resumed``."""
        self.offline = True

    def resumed(self, now: float) -> None:
        """Note that the connection is back, and the state has read the VM again."""
        self._now = now
        self.offline = False
        unsure, self._out.unsure = self._out.unsure, []
        for run in reversed(unsure):  # requeue at the front, keeping the order
            present = self._state.slots[run.step.first].present
            unanswered, run.stage, run.removal = run.removal, StepStage.QUEUED, None
            if run.plugs and present:
                self._end(run, Plugged(run.step.ids))
            elif not (run.plugs or present):
                if unanswered is not None:  # who asked for no more than the removal gets one that is over
                    run.removal = replace(unanswered, state=State.UNPLUGGED, settled_at=now)
                self._end(run, Unplugged(run.step.ids))
            elif self.halted and not run.plugs:
                self._resume_halted(run)
            else:
                # Sent again, unless the guest is found to work on it: where it has not reacted, nothing is doubled.
                self._out.drop(run)
                (self._plugs if run.plugs else self._others).appendleft(run)

    def _resume_halted(self, run: StepRun) -> None:
        """Await the guest, if it is found to work on a removal that is not to be sent again."""
        removal = self._state.removals.get(run.step.first)
        if removal is None:
            why_unknown = "the connection was lost with the command in flight, and nothing more is sent"
            self._end(run, Unknown(run.step.ids, why_unknown))
        else:
            self._out.watch(run, removal)
            self._await_removal(run)

    def halt(self, reason: str) -> None:
        """Send nothing more; what is out is awaited."""
        self.halted = self.halted or reason

    def stop(self, reason: str, now: float) -> None:
        """Send nothing more, and wait for no answer of the guest's; replies of QEMU are still awaited."""
        self._now = now
        self._stopped = True
        self.halted = self.halted or reason
        for run in self._out.awaited:
            self._give_up(run, f"{reason}, before the guest's answer")

    def lose(self, reason: str, now: float) -> None:
        """Note that the connection is lost for good."""
        self.stop(reason, now)
        for run in (*self._out.sent, *self._out.unsure):
            self._end(run, Unknown(run.step.ids, reason))
        self._out.unsure.clear()

    # Sending.

    def _send_next(self) -> list[SendStep | LookAgain] | None:
        """Send the next command, if one can be sent now; None if not."""
        if self.halted or self.offline or self._out.commands >= self._options.in_flight:
            return None
        if self._plugs:
            return self._send_plug(self._plugs.popleft())
        if not self._others or self._out.plugging:
            return None
        keeps = self._others[0].step.action is Action.KEEP
        if self._bounds.one_by_one and not keeps and self._out.unplugging:
            return None
        run = self._others.popleft()
        if run.removal is None and not keeps:
            return self._send_unplug(run)
        run.sent_at = self._now
        self._await_removal(run)
        return []

    def _await_joined(self) -> None:
        """Await the removal that was joined: nothing is sent for it, so it needs no turn."""
        if self._others and self._others[0].removal is not None and not self._plugs:
            run = self._others.popleft()
            run.sent_at = self._now
            self._await_removal(run)

    def _send_plug(self, run: StepRun) -> list[SendStep | LookAgain]:
        first = run.step.first
        if self._state.slots[first].present and (run.replug or not self._bounds.single):
            return self._found_so(run, Plugged(run.step.ids))
        try:
            check_plug(self._state.situation, first, self._options)
        except StepDeniedError as error:
            return self._deny(run, error)
        run.path = self._state.plug_sent(first)
        return self._mark_sent(run)

    def _send_unplug(self, run: StepRun) -> list[SendStep | LookAgain]:
        first = run.step.first
        slot = self._state.slots[first]
        if not slot.present and not self._bounds.single:
            return self._found_so(run, Unplugged(run.step.ids))
        if run.undoes is not None and slot.qom_path != run.undoes.path:
            return self._found_so(run, None)
        removal = self._state.removals.get(first)
        if removal is not None and not removal.may_ask_again:
            run.ours = run.sent_at > 0  # sent before the connection was lost: then it is our own
            run.sent_at = run.sent_at or self._now
            self._out.watch(run, removal)
            self._await_removal(run)
            return []
        try:
            check_unplug(self._state.situation, first, self._options)
        except StepDeniedError as error:
            return self._deny(run, error)
        self._out.watch(run, self._state.unplug_sent(first, self._now))
        return self._mark_sent(run)

    def _found_so(self, run: StepRun, verdict: Verdict | None) -> list[SendStep | LookAgain]:
        """End *run* without sending: somebody else has changed its slot."""
        run.ours = False
        self._end(run, verdict, BY_OTHER)
        return []

    def _deny(self, run: StepRun, error: StepDeniedError) -> list[SendStep | LookAgain]:
        run.error = error
        self._end(run, Denied(run.step.ids, error.reason, error.detail))
        return []

    def _mark_sent(self, run: StepRun) -> list[SendStep | LookAgain]:
        self._out.send(run, self._now, self._bounds.reply_timeout)
        return [SendStep(run)]

    # Waiting.

    def _accepted(self, run: StepRun) -> None:
        """Go on to the next stage: QEMU accepted the command."""
        if not run.plugs:
            self._await_removal(run)
        elif STAGES[StepStage.PRESENT].is_awaited(run, self._state, self._options):
            self._wait(run, StepStage.PRESENT)
        else:
            self._end(run, Plugged(run.step.ids, seconds=round(self._now - run.sent_at, 6)))

    def _await_removal(self, run: StepRun) -> None:
        """Await the end of the removal of *run*, or its acceptance where that is enough."""
        self._wait(run, StepStage.REQUESTED)
        if STAGES[StepStage.REQUESTED].is_over(run, self._state):
            self._conclude(run)
        elif self._bounds.until_accepted and run.removal is not None and run.removal.state is not State.SENT:
            self._end(run, None)

    def _wait(self, run: StepRun, stage: StepStage) -> None:
        patience = self._bounds.reply_timeout if self._bounds.until_accepted else self._bounds.limit
        self._out.wait(run, stage, self._now + patience)
        if self._stopped and not STAGES[stage].is_over(run, self._state):
            self._give_up(run)

    def _expire(self) -> list[SendStep | LookAgain]:
        """Act on the deadlines that have passed."""
        last = self._bounds.last_moment
        if last is not None and not self.halted and not self.ended and self._now >= last:
            self.failed = True
            self.stop("the time for the whole was over", self._now)
        first = self._out.deadline
        if first is None or self._now < first:
            return []
        limit = f"within {self._bounds.reply_timeout:g} s"
        for run in self._out.overdue_replies(self._now):
            command = "device_add" if run.plugs else "device_del"
            silence = f"QEMU did not reply to {command} {limit}; a late reply is taken in, and is an event"
            self._end(run, Unknown(run.step.ids, silence))
        looks: dict[Read, list[StepRun]] = {}
        for run in self._out.take_overdue_answers(self._now):
            if self._bounds.until_accepted:
                self._end(run, Unknown(run.step.ids, f"QEMU did not reply to device_del {limit}"))
                continue
            read = STAGES[run.stage].last_look(run, self._state, self._bounds.limit)
            if read is Read.NONE:
                self._give_up(run)
            else:
                run.stage = StepStage.CHECKED
                looks.setdefault(read, []).append(run)
        return [LookAgain(read, tuple(runs)) for read, runs in looks.items()]

    def _prove(self) -> list[SendStep | LookAgain]:
        """End the plugs that the guest has answered."""
        looks: dict[Read, list[StepRun]] = {}
        stage = STAGES[StepStage.PRESENT]
        for run in self._out.take_touched():
            if run.stage is not StepStage.PRESENT or not stage.is_over(run, self._state):
                continue
            read = stage.proving_look(run, self._state)
            if read is Read.NONE:
                self._give_up(run)
            else:
                run.stage = StepStage.CHECKED
                looks.setdefault(read, []).append(run)
        return [LookAgain(read, tuple(runs)) for read, runs in looks.items()]

    def _conclude(self, run: StepRun) -> None:
        """Take the guest's answer to a removal in."""
        removal = run.removal
        if removal is not None and removal.state in {State.REJECTED, State.UNKNOWN}:
            self._end_unanswered(run, removal)
            return
        if self._bounds.until_accepted:  # the guest's answer goes to ``UnplugRequest.wait``
            self._end(run, None)
            return
        gone = (
            not self._state.slots[run.step.first].present if removal is None else (removal.state is State.UNPLUGGED)
        )
        seconds = 0.0 if removal is None else round(removal.seconds, 6)
        if not gone:
            code, reason = (removal.code, removal.reason) if removal is not None else (None, "no longer pending")
            self._end(run, Refused(run.step.ids, code, reason, seconds=seconds))
        elif run.step.action is Action.KEEP and not self.halted:
            self._out.drop(run)
            run.replug, run.stage = True, StepStage.QUEUED
            run.verdict, run.reason = Unplugged(run.step.ids, seconds=seconds), "it left"
            self._plugs.append(run)
        else:
            self._end(
                run,
                Unplugged(run.step.ids, seconds=seconds),
                "" if run.step.action is Action.UNPLUG else "it left",
            )

    def _end_unanswered(self, run: StepRun, removal: Removal) -> None:
        """Take in that no guest is going to answer *removal*: that is no refusal."""
        if self._bounds.single and removal.rejection is not None:
            kept = run.step.action is Action.KEEP  # then it stays, which is what was wanted
            self._end(run, Plugged(run.step.ids) if kept else removal.rejection)
            return
        mine = run.ours or run.step.action is Action.KEEP or self._bounds.single
        if mine or (removal.state is State.UNKNOWN and not self.offline):
            self._end(run, Unknown(run.step.ids, removal.state.value))
            return
        # QEMU dropped another client's request: send our own, once connected.
        self._out.drop(run)
        run.stage, run.removal = StepStage.QUEUED, None
        self._others.appendleft(run)

    def _give_up(self, run: StepRun, reason: str = "") -> None:
        """End *run* as it stands now; *reason* is why it is not waited for any longer, if not its deadline."""
        if not run.plugs and run.removal is not None:
            self._state.deadline_passed(run.removal)
            working = run.removal.state is State.WORKING
            waited = round(self._now - run.removal.requested_at, 6)
            self._end(run, Pending(run.step.ids, acknowledged=working, seconds=waited), reason)
            return
        slot = self._state.slots[run.step.first]
        self._state.maybe_queued_twice.discard(slot.first)
        if not slot.present:
            self._end(run, Unplugged(slot.ids), "plugged, then ejected by a removal that had been asked for twice")
            return
        acknowledged, answer = slot.acknowledged, slot.answer
        code, reason = (answer.code, "" if acknowledged else answer.reason) if answer else (None, "no answer")
        seconds = round(self._now - run.sent_at, 6)
        self._end(run, Plugged(slot.ids, acknowledged is True, code, reason, seconds))

    def _end(self, run: StepRun, verdict: Verdict | None, reason: str = "") -> None:
        self._out.drop(run)
        run.stage, run.verdict, run.ended_at = StepStage.ENDED, verdict, self._now
        good = succeeded(run.step.action, verdict) or (verdict is None and self._bounds.until_accepted)
        run.reason = reason or ("" if good or verdict is None else why(verdict))
        if good and self._options.require_proof and isinstance(verdict, Plugged) and verdict.acknowledged is False:
            good, run.unproven = False, True
            run.reason = f"the guest did not acknowledge it: {verdict.reason}"
        only_requested = isinstance(verdict, Pending) and not self._bounds.limit
        if not good and not only_requested:
            self.failed = True
            if self._bounds.halts:
                self.halted = self.halted or "an earlier step failed"
