"""The same, and we die at any moment: what comes after us reads QEMU and the record, and must know the truth."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from qmpvcpu import OnFailure, VcpuMap
from qmpvcpu.engine.messages import Change
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.transition import Action, Direction, Intent
from qmpvcpu.model.verdicts import OstStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import Plan, plan_map
from qmpvcpu.planning.recovery import finish_target, in_order_of, observed_report, revert_plan, revert_target
from tests.engine.model_qemu import SLOTS, US
from tests.engine.transition_machine import TransitionsBesideQemu

__all__ = ["CrashesBesideQemu"]


class CrashesBesideQemu(TransitionsBesideQemu):
    """Everybody does something, we change vCPUs, and die."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten: set[int] = set()  # slots with a request of ours that the answer to an earlier one hides

    @precondition(lambda self: self.engine._running or self.disk.intent is not None)
    @rule(
        executed=st.integers(0, 3),
        saved=st.integers(0, 2),
        how=st.sampled_from(["report", "finish", "revert"]),
        obliged=st.booleans(),
    )
    def we_die_and_another_comes(self, executed: int, saved: int, how: str, obliged: bool) -> None:
        self.die(executed, saved)
        intent = self.begin_anew()
        if intent is not None and how != "report":
            self.recover(intent, reverts=how == "revert", obliged=obliged)

    def die(self, executed: int, saved: int) -> None:
        for command in list(self.commands)[: executed if self.online else 0]:
            command.execute()
        for _, written in list(self.saving)[:saved]:
            self.disk = written
        self.saving.clear()
        self.writing.clear()
        self.commands.clear()
        self.replies.clear()

    def what_we_know_again_is_the_truth(self) -> None:
        layout, intent = self.engine.layout, self.disk.intent
        assert [slot.qom_path for slot in layout.slots] == self.qemu.paths
        # Of two requests for one CPU, ours and another's, nobody can tell which one an answer is to.
        covered = (
            self.engine.superseded
            | self.forgotten
            | self.qemu.contested
            | (set() if intent is None else {step.first for step in intent.steps})
        )
        for vcpu in range(SLOTS):
            if (vcpu in layout.enabled) != (vcpu in self.disk.enabled) and self.qemu.by[vcpu] == US:
                assert vcpu in covered or vcpu in self.disk.pending, vcpu
            answer = self.qemu.answers.get(vcpu)
            # QEMU keeps answers: one to an earlier request cannot be told from one to this.
            refused = answer is not None and answer.is_ejection and answer.status is OstStatus.FAILURE
            if vcpu in self.qemu.removals and US in self.qemu.askers[vcpu]:
                if refused:
                    self.forgotten.add(vcpu)
                else:
                    assert vcpu in covered or vcpu in layout.pending, vcpu
        self.forgotten &= self.qemu.removals
        if intent is None:
            self.engine.superseded &= self.qemu.removals
        else:
            assert str(observed_report(intent, layout))

    def recover(self, intent: Intent, *, reverts: bool, obliged: bool) -> None:
        """Finish or revert *intent*, as ``VcpuController.recover`` does."""
        wishes: list[VcpuMap] = []

        def plan(now: Situation) -> Plan:
            wish = (revert_target if reverts else finish_target)(intent, now.layout)
            if not wishes:
                self.check_wish(intent, wish, reverts=reverts)
            wishes.append(wish)
            plan = plan_map(now, wish, options)
            return revert_plan(intent, plan, now.layout) if reverts else in_order_of(intent, plan)

        direction = Direction.REVERTING if reverts else Direction.FORWARD
        policy = OnFailure.CONTINUE if reverts else intent.on_failure
        asks = any(step.asks_agent for step in intent.steps)
        options = CheckedOptions(on_failure=policy, timeout=5.0, offline_first=asks and not reverts)
        change = Change(
            plan,
            options,
            intent=replace(intent, direction=direction),
            rebuilds=True,
            tries=3,
        )
        unseen = {vcpu for vcpu in self.qemu.removals | self.qemu.lied if vcpu not in self.engine.layout.pending}
        if obliged:
            self.agent = "well"
        self.ask(change)
        if obliged:
            self.everybody_obliges()
            if reverts and self.has_agent:
                self.check_online(intent)
            # What QEMU was asked for and nobody can see goes one day, unless the wish is that it goes.
            phantoms = {vcpu for vcpu in self.engine.layout.pending if vcpu not in self.qemu.removals}
            assert (self.engine.layout.enabled ^ wishes[-1]) <= (unseen & wishes[-1]) | phantoms
            owes = reverts and asks and not self.has_agent
            assert owes or self.engine.recorded.intent is None

    def check_online(self, intent: Intent) -> None:
        """What the agent may have taken offline is online again, or may go yet."""
        for step in intent.steps:
            if step.asks_agent and step.first not in self.engine.layout.pending:
                assert self.qemu.online.get(self.qemu.cpu(step.first)) is not False, step

    def check_wish(self, intent: Intent, wish: VcpuMap, *, reverts: bool) -> None:
        joined = {step.first for step in intent.steps if step.joins}
        # Where single commands followed a transition, a slot is named twice: its first step tells what was there.
        for step in {each.first: each for each in (reversed(intent.steps) if reverts else intent.steps)}.values():
            there = (step.action is Action.PLUG) is not reverts
            theirs = self.qemu.paths[step.first] == f"/machine/peripheral/other{step.first}"
            known = theirs or step.first in joined or step.action is Action.KEEP
            assert known or (step.first in wish) is there
