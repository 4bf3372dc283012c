"""A batch of work, carried out: sent in order within its bounds, awaited, and ended one by one.

Rules that live here:

- Plugs come before unplugs; both are sent in the order given.
- At most ``Terms.in_flight`` commands have no reply. One by one: a removal is asked for when no other is out.
- Where a failure halts the batch, nothing more is sent after it; what is out is awaited.
- A deadline ends the waiting and nothing else. Before a removal is given up there is one last look.
- What somebody else has done meanwhile is not done again, and is not ours.
"""

from collections import deque
from collections.abc import Iterable

from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.outstanding import Outstanding
from qmpvcpu.engine.removal import Removal, State
from qmpvcpu.engine.work import BY_OTHER, Effect, Look, Send, Stage, Terms, Work, why
from qmpvcpu.errors import StepDeniedError
from qmpvcpu.model.report import succeeded
from qmpvcpu.model.transition import Action
from qmpvcpu.model.verdicts import Denied, Pending, Plugged, Proof, Refused, Unknown, Unplugged, Verdict
from qmpvcpu.planning.checks import check_plug, check_unplug


class Batch:
    """Some work on one VM, from the first command to the last answer.

    Args:
        works: What is to be done, in order.
        engine: What is known of the VM.
        terms: How it is to be done.
        limit: How long the guest has for each answer, in seconds; 0 only requests.
        halts: Send nothing more after a failure.
        one_by_one: Ask for a removal only when no other is out.

    Attributes:
        failed: True once a work did not become what it should.
        halted: Why nothing more is sent, or "".
        offline: True while the connection is lost: nothing is sent until ``resumed``.
        last_moment: When nothing more is waited for, by the caller's clock, or None.
    """

    def __init__(
        self,
        works: Iterable[Work],
        engine: Engine,
        terms: Terms,
        *,
        limit: float,
        halts: bool,
        one_by_one: bool,
        last_moment: float | None = None,
    ) -> None:
        self.failed = False
        self.halted = ""
        self.offline = False
        self.last_moment = last_moment
        self._engine = engine
        self._terms = terms
        self._limit = limit
        self._halts = halts
        self._one_by_one = one_by_one
        self._plugs: deque[Work] = deque()
        self._others: deque[Work] = deque()
        self._out = Outstanding()
        self._stopped = False
        self._now = 0.0
        for work in works:
            (self._plugs if work.plugs else self._others).append(work)
            removal = engine.removals.get(work.step.first)
            if removal is not None and not work.plugs and (work.step.action is Action.KEEP or not removal.recalled):
                work.ours = False
                self._out.watch(work, removal)

    # What comes next.

    @property
    def ended(self) -> bool:
        """True when nothing is left to be sent, or to be waited for."""
        return not self._out and (bool(self.halted) or not (self._plugs or self._others))

    @property
    def deadline(self) -> float | None:
        """When ``advance`` is to be called again at the latest, by the caller's clock."""
        first = self._out.deadline
        if self.halted or self.ended or self.last_moment is None:
            return first
        return self.last_moment if first is None else min(first, self.last_moment)

    @property
    def looks_at_layout(self) -> bool:
        """True while any change of the layout may be what is waited for: the guest's word on a plug."""
        return bool(self._out.unproven)

    def advance(self, now: float) -> list[Effect]:
        """Return what is to be done now."""
        self._now = now
        effects = self._expire() + self._prove()
        while (sent := self._send_next()) is not None:
            effects += sent
        return effects

    # What is told.

    def replied(self, work: Work, verdict: Verdict | None, now: float) -> None:
        """Take QEMU's reply to the command of *work*: its verdict, or None for a removal that QEMU accepted."""
        self._now = now
        if not self._out.take_reply(work):
            return  # its deadline had passed; the engine has taken the reply in
        if verdict is None or (isinstance(verdict, Plugged) and self._wants_proof(work)):
            self._ask(work)
        else:
            self._end(work, verdict)

    def unanswered(self, work: Work, reason: str, now: float) -> None:
        """Note that the connection was lost with the command of *work* in flight; nothing more is sent over it."""
        self._now = now
        self.offline = True
        if not self._out.take_reply(work):
            return
        if self._terms.reconnect:
            work.stage = Stage.UNSURE
            self._out.unsure.append(work)
        else:
            self._end(work, Unknown(work.step.ids, reason))

    def answered(self, removal: Removal, now: float) -> Work | None:
        """Take in that *removal* became final, and return the work it ends, even one whose deadline has passed."""
        self._now = now
        work = self._out.asked_by(removal)
        if work is not None:
            if work.stage is Stage.WAITING:  # it joined, and needs no turn any more: nothing is to be sent
                self._others.remove(work)
            self._conclude(work)
        return work

    def add(self, work: Work) -> None:
        """Have *work* done too; where nothing more is sent, it ends as it is."""
        (self._plugs if work.plugs else self._others).append(work)

    def looked(self, now: float) -> None:
        """Note that a Look is over, whether or not it succeeded."""
        self._now = now
        for work in self._out.asked:
            if work.stage is Stage.LOOKING:
                self._give_up(work)

    def paused(self) -> None:
        """Note that the connection is lost and may come back: nothing is sent until ``resumed``."""
        self.offline = True

    def resumed(self, now: float) -> None:
        """Note that the connection is back, and the engine has read the VM again."""
        self._now = now
        self.offline = False
        unsure, self._out.unsure = self._out.unsure, []
        for work in reversed(unsure):  # what is sent again goes to the front, the first of it last
            present = self._engine.slots[work.step.first].present
            work.stage, work.removal = Stage.WAITING, None
            if work.plugs and present:
                self._end(work, Plugged(work.step.ids))
            elif not (work.plugs or present):
                self._end(work, Unplugged(work.step.ids))
            elif self.halted and not work.plugs:
                self._resume_halted(work)
            else:
                # Sent again, unless the guest is found to work on it: where it has not reacted, nothing is doubled.
                self._out.drop(work)
                (self._plugs if work.plugs else self._others).appendleft(work)

    def _resume_halted(self, work: Work) -> None:
        """Await the guest, if it is found to work on a removal that is not to be sent again."""
        removal = self._engine.removals.get(work.step.first)
        if removal is None:
            why_unknown = "the connection was lost with the command in flight, and nothing more is sent"
            self._end(work, Unknown(work.step.ids, why_unknown))
        else:
            self._out.watch(work, removal)
            self._ask(work)

    def stop(self, reason: str, now: float) -> None:
        """Send nothing more, and wait for no answer of the guest's; replies of QEMU are still awaited."""
        self._now = now
        self._stopped = True
        self.halted = self.halted or reason
        for work in self._out.asked:
            self._give_up(work, f"{reason}, before the guest's answer")

    def lose(self, reason: str, now: float) -> None:
        """Note that the connection is lost for good."""
        self.stop(reason, now)
        for work in (*self._out.sent, *self._out.unsure):
            self._end(work, Unknown(work.step.ids, reason))
        self._out.unsure.clear()

    # Sending.

    def _send_next(self) -> list[Effect] | None:
        """Send the next command, if one can be sent now; None if not."""
        if self.halted or self.offline or self._out.commands >= self._terms.in_flight:
            return None
        if self._plugs:
            return self._send_plug(self._plugs.popleft())
        if not self._others or self._out.plugging:
            return None
        keeps = self._others[0].step.action is Action.KEEP
        if self._one_by_one and not keeps and self._out.unplugging:
            return None
        work = self._others.popleft()
        if work.removal is None and not keeps:
            return self._send_unplug(work)
        work.sent_at = self._now
        self._ask(work)
        return []

    def _send_plug(self, work: Work) -> list[Effect]:
        first = work.step.first
        if self._engine.slots[first].present:
            return self._found_so(work, Plugged(work.step.ids))
        try:
            check_plug(self._engine.situation, first, allow_fatal=self._terms.allow_fatal)
        except StepDeniedError as error:
            return self._deny(work, error)
        work.path = self._engine.plug_sent(first)
        return self._mark_sent(work)

    def _send_unplug(self, work: Work) -> list[Effect]:
        first = work.step.first
        slot = self._engine.slots[first]
        if not slot.present:
            return self._found_so(work, Unplugged(work.step.ids))
        if work.undoes is not None and slot.qom_path != work.undoes.path:
            return self._found_so(work, None)
        removal = self._engine.removals.get(first)
        if removal is not None and not removal.recalled:
            work.ours = work.sent_at > 0  # sent before the connection was lost: then it is our own
            work.sent_at = work.sent_at or self._now
            self._out.watch(work, removal)
            self._ask(work)
            return []
        try:
            check_unplug(
                self._engine.situation,
                first,
                allow_fatal=self._terms.allow_fatal,
                allow_boot_vcpus=self._terms.allow_boot_vcpus,
            )
        except StepDeniedError as error:
            return self._deny(work, error)
        self._out.watch(work, self._engine.unplug_sent(first, self._now))
        return self._mark_sent(work)

    def _found_so(self, work: Work, verdict: Verdict | None) -> list[Effect]:
        """End *work* without sending: somebody else has changed its slot."""
        work.ours = False
        self._end(work, verdict, BY_OTHER)
        return []

    def _deny(self, work: Work, error: StepDeniedError) -> list[Effect]:
        self._end(work, Denied(work.step.ids, error.reason, error.detail))
        return []

    def _mark_sent(self, work: Work) -> list[Effect]:
        self._out.send(work, self._now, self._terms.reply_timeout)
        return [Send(work)]

    # Waiting.

    def _ask(self, work: Work) -> None:
        """Await the guest's answer from now on."""
        self._out.ask(work, self._now, self._limit)
        if not work.plugs and (work.removal is None or work.removal.state.is_final):
            self._conclude(work)
        elif self._stopped:
            self._give_up(work)

    def _wants_proof(self, work: Work) -> bool:
        return self._terms.proof is Proof.ACKNOWLEDGED or work.step.first in self._engine.doubled

    def _expire(self) -> list[Effect]:
        """Act on the deadlines that have passed."""
        if self.last_moment is not None and not self.halted and not self.ended and self._now >= self.last_moment:
            self.failed = True
            self.stop("the time for the whole was over", self._now)
        first = self._out.deadline
        if first is None or self._now < first:
            return []
        for work in self._out.overdue_replies(self._now):
            silence = f"QEMU did not reply within {self._terms.reply_timeout:g} s"
            self._end(work, Unknown(work.step.ids, f"{silence}; a late reply is taken in, and is an event"))
        looking = False
        for work in self._out.take_overdue_answers(self._now):
            if work.plugs or not self._limit:
                self._give_up(work)
            else:  # a guest may eject without a word, and under TCG without one of QEMU's
                work.stage = Stage.LOOKING
                looking = True
        return [Look(full=False)] if looking else []

    def _prove(self) -> list[Effect]:
        """End the plugs that the guest has answered."""
        looking = False
        for work in self._out.unproven:
            slot = self._engine.slots[work.step.first]
            if slot.present and slot.acknowledged is None:
                continue
            if slot.present and work.step.first in self._engine.doubled:
                work.stage = Stage.LOOKING
                looking = True
            else:
                self._give_up(work)
        return [Look(full=True)] if looking else []

    def _conclude(self, work: Work) -> None:
        """Take the guest's answer to a removal in."""
        removal = work.removal
        if removal is not None and removal.state in {State.REJECTED, State.UNKNOWN}:
            self._end_unanswered(work, removal)
            return
        gone = (
            not self._engine.slots[work.step.first].present if removal is None else (removal.state is State.UNPLUGGED)
        )
        seconds = 0.0 if removal is None else round(removal.seconds, 6)
        if not gone:
            code, reason = (removal.code, removal.reason) if removal is not None else (None, "no longer pending")
            self._end(work, Refused(work.step.ids, code, reason, seconds=seconds))
        elif work.step.action is Action.KEEP and not self.halted:
            self._out.drop(work)
            work.replug, work.stage = True, Stage.WAITING
            work.verdict, work.reason = Unplugged(work.step.ids, seconds=seconds), "it left"
            self._plugs.append(work)
        else:
            self._end(
                work,
                Unplugged(work.step.ids, seconds=seconds),
                "" if work.step.action is Action.UNPLUG else "it left",
            )

    def _end_unanswered(self, work: Work, removal: Removal) -> None:
        """Take in that no guest is going to answer *removal*: that is no refusal."""
        if work.ours or work.step.action is Action.KEEP or (removal.state is State.UNKNOWN and not self.offline):
            self._end(work, Unknown(work.step.ids, removal.state.value))
            return
        # It was somebody else's, so now it is for us to ask; if the connection went with it, once that is back.
        self._out.drop(work)
        work.stage, work.removal = Stage.WAITING, None
        self._others.appendleft(work)

    def _give_up(self, work: Work, reason: str = "") -> None:
        """End *work* as it stands now; *reason* is why it is not waited for any longer, if not its deadline."""
        if not work.plugs and work.removal is not None:
            self._engine.deadline_passed(work.removal)
            working = work.removal.state is State.WORKING
            waited = round(self._now - work.removal.requested_at, 6)
            self._end(work, Pending(work.step.ids, acknowledged=working, seconds=waited), reason)
            return
        slot = self._engine.slots[work.step.first]
        self._engine.doubled.discard(slot.first)
        if not slot.present:
            self._end(work, Unplugged(slot.ids), "plugged, then ejected by a removal that had been asked for twice")
            return
        acknowledged, answer = slot.acknowledged, slot.answer
        code, reason = (answer.code, "" if acknowledged else answer.reason) if answer else (None, "no answer")
        seconds = round(self._now - work.sent_at, 6)
        self._end(work, Plugged(slot.ids, acknowledged is True, code, reason, seconds))

    def _end(self, work: Work, verdict: Verdict | None, reason: str = "") -> None:
        self._out.drop(work)
        late = work.stage is Stage.DONE  # given up before: whatever was to follow from that has followed
        work.stage, work.verdict, work.ended_at = Stage.DONE, verdict, self._now
        good = succeeded(work.step.action, verdict)
        work.reason = reason or ("" if good or verdict is None else why(verdict))
        only_asked = isinstance(verdict, Pending) and not self._limit
        if not good and not only_asked and not late:
            self.failed = True
            if self._halts:
                self.halted = self.halted or "an earlier step failed"
