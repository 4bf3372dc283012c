"""The same, and we die at any moment: what comes after us reads QEMU and the record, and must know the truth."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from qmpvcpu import OnFailure
from qmpvcpu.engine.work import Terms
from qmpvcpu.model.ost import OstStatus
from qmpvcpu.model.transition import Action, Direction, Intent
from qmpvcpu.planning.recovery import finish_target, observed_report, revert_target
from tests.engine.model_qemu import SLOTS, US
from tests.engine.transition_machine import REPLY_TIMEOUT, TransitionsBesideQemu

__all__ = ["CrashesBesideQemu"]


class CrashesBesideQemu(TransitionsBesideQemu):
    """Everybody does something, we change whole maps, and die."""

    @precondition(lambda self: self.transition is not None or self.disk.intent is not None)
    @rule(
        executed=st.integers(0, 3),
        saved=st.booleans(),
        how=st.sampled_from(["report", "finish", "revert"]),
        obliged=st.booleans(),
    )
    def we_die_and_another_comes(self, executed: int, saved: bool, how: str, obliged: bool) -> None:
        self.die(executed, saved=saved)
        if self.qemu is not self.judged:
            self.intent, self.disk = None, self.disk._replace(intent=None, pending={})
            self.judged, self.seen_to = self.qemu, [0] * SLOTS
        self.qemu.listened = True
        self.engine = self.look_for_the_first_time()
        pending = {vcpu for vcpu, seen in self.disk.pending.items() if seen == len(self.qemu.history[vcpu]) - 1}
        self.engine.recall(pending, self.qemu.answers, self.now)
        self.publish()
        self.intent = self.disk.intent
        self.online, self.returning = True, 0
        self.what_we_know_again_is_the_truth()
        self.disk = self.known()
        if self.intent is not None:
            self.recover(self.intent, how, obliged=obliged)

    def die(self, executed: int, *, saved: bool) -> None:
        for command in list(self.commands)[: executed if self.online else 0]:
            command.execute()
        if self.saving is not None and saved:
            self.disk = self.written
        self.saving = self.transition = None
        self.steps.clear()
        self.commands.clear()
        self.replies.clear()
        self.qemu.wire.clear()

    def what_we_know_again_is_the_truth(self) -> None:
        layout, intent = self.engine.layout, self.disk.intent
        assert [slot.qom_path for slot in layout.slots] == self.qemu.paths
        # Of two requests for one CPU, ours and another's, nobody can tell which one an answer is to.
        covered = (
            self.superseded
            | self.qemu.contested
            | (set() if intent is None else {step.first for step in intent.steps})
        )
        for vcpu in range(SLOTS):
            if (vcpu in layout.enabled) != (vcpu in self.disk.enabled) and self.qemu.by[vcpu] == US:
                assert vcpu in covered or vcpu in self.disk.pending, vcpu
            answer = self.qemu.answers.get(vcpu)
            # QEMU keeps answers: one to an earlier request cannot be told from one to this.
            refused = answer is not None and answer.is_ejection and answer.status is OstStatus.FAILURE
            if vcpu in self.qemu.removals and US in self.qemu.askers[vcpu] and not refused:
                assert vcpu in covered or vcpu in layout.pending, vcpu
        if intent is None:
            self.superseded &= self.qemu.removals
        else:
            assert str(observed_report(intent, layout))

    def recover(self, intent: Intent, how: str, *, obliged: bool) -> None:
        if how == "report":
            return
        reverts = how == "revert"
        wish = (revert_target if reverts else finish_target)(intent, self.engine.layout)
        joined = {step.first for step in intent.steps if step.joins}
        # Where single commands followed a transition, a slot is named twice: its first step tells what was there.
        for step in {each.first: each for each in (reversed(intent.steps) if reverts else intent.steps)}.values():
            there = (step.action is Action.PLUG) is not reverts
            theirs = self.qemu.paths[step.first] == f"/machine/peripheral/other{step.first}"
            known = theirs or step.first in joined or step.action is Action.KEEP
            assert known or (step.first in wish) is there
        terms = Terms(OnFailure.CONTINUE if reverts else intent.on_failure, timeout=5.0, reply_timeout=REPLY_TIMEOUT)
        unseen = {vcpu for vcpu in self.qemu.removals | self.qemu.lied if vcpu not in self.engine.layout.pending}
        self.begin(wish, terms, replace(intent, direction=Direction.REVERTING if reverts else Direction.FORWARD))
        if obliged:
            self.everybody_obliges()
            # What QEMU was asked for and nobody can see goes one day, unless the wish is that it goes.
            phantoms = {vcpu for vcpu in self.engine.layout.pending if vcpu not in self.qemu.removals}
            assert (self.engine.layout.enabled ^ wish) <= (unseen & wish) | phantoms
            assert self.intent is None
