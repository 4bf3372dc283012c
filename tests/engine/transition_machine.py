"""Transitions beside a naive QEMU: any wish under any policy, cut short anywhere, with a record of what a save left.

The record is the last thing that a Save put on disk: the intent, and the layout known when the save began.
"""

from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from qmpvcpu import DenialReason, OnFailure, Plugged, Proof, Refused, TransitionReport, Unknown, Unplugged, VcpuMap
from qmpvcpu.engine.batch import Batch
from qmpvcpu.engine.ledger import Read
from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.transition import Phase, Transition
from qmpvcpu.engine.work import Effect, LastLook, Look, Save, Send, Stage, Terms, Work
from qmpvcpu.model.report import TransitionOutcome
from qmpvcpu.model.transition import Action, Direction, Intent, Step
from qmpvcpu.model.verdicts import Rejected
from qmpvcpu.planning.plan import plan_map
from tests.engine.engine_machine import EngineBesideQemu, vcpus
from tests.engine.model_qemu import OTHER, SLOTS

__all__ = ["REPLY_TIMEOUT", "TransitionsBesideQemu"]

REPLY_TIMEOUT = 10.0
MOVES = ["execute", "arrive", "take in", "save", "save", "eject", "refuse", "acknowledge", "twice", "take up", "wait"]
MOVES += ["look ends", "round trip", "round trip", "round trip"]
moves = st.lists(st.tuples(st.sampled_from(MOVES), vcpus), min_size=4, max_size=20)
all_terms = st.builds(
    Terms,
    on_failure=st.sampled_from(OnFailure),
    timeout=st.sampled_from([0.0, 5.0, 30.0]),
    total_timeout=st.sampled_from([None, None, 8.0]),
    revert_timeout=st.just(5.0),
    reply_timeout=st.just(REPLY_TIMEOUT),
    in_flight=st.sampled_from([1, 2, 8]),
    proof=st.sampled_from(Proof),
    reconnect=st.booleans(),
)


class Disk(NamedTuple):
    """What the record holds."""

    intent: Intent | None
    enabled: VcpuMap
    pending: dict[int, int]  # by vCPU: which of the CPUs that were ever in its slot is to go


class TransitionsBesideQemu(EngineBesideQemu):
    """Everybody does something, and we change whole maps."""

    others_use_our_names = False  # what another client calls as we do is undone as if it were ours

    def __init__(self) -> None:
        super().__init__()
        self.intent: Intent | None = None  # under way, or left so
        self.steps: list[Step] = []  # of single commands without a reply, each its own intent
        self.disk = self.known()
        self.written = self.disk  # what the save under way will put there
        self.saving: Save | None = None
        self.transition: Transition | None = None
        self.superseded: set[int] = set()  # of which a record that was cut short told, and the next one need not
        self.forget()

    def forget(self) -> None:
        """Begin to watch another transition."""
        self.terms = Terms()
        self.unreplied: set[int] = set()
        self.looks: dict[int, Batch] = {}
        self.last_looks: list[LastLook] = []
        self.seen_last: list[list[str | None]] = []
        self.added: set[int] = set()
        self.asked: set[int] = set()
        self.sent = False
        self.knows_of_loss = False
        self.unrecorded = False
        self.replaced = False  # another QEMU took the place of the one that it was about

    def known(self) -> Disk:
        """What a save that begins now writes."""
        intent = self.intent
        if self.steps:
            enabled = self.engine.layout.enabled
            start = intent.start if intent else enabled
            target = set(intent.target if intent else enabled)
            for step in self.steps:
                target = target | step.ids if step.action is Action.PLUG else target - step.ids
            intent = Intent(start, VcpuMap(target), (*(intent.steps if intent else ()), *self.steps))
        layout = self.engine.layout
        return Disk(intent, layout.enabled, {vcpu: self.seen_to[vcpu] for vcpu in layout.pending})

    # Single commands: each is an intent, and no transition runs beside them.

    def may_send(self) -> bool:
        return self.online and self.transition is None

    def send_plug(self, vcpu: int, path: str, told: Callable[[str], None] | None = None) -> None:
        super().send_plug(vcpu, path, told or self.as_its_own_intent(Step(Action.PLUG, VcpuMap([vcpu]))))

    def send_unplug(self, vcpu: int, removal: Removal, told: Callable[[str], None] | None = None) -> None:
        step = Step(Action.UNPLUG, VcpuMap([vcpu]), removal.qom_path)
        super().send_unplug(vcpu, removal, told or self.as_its_own_intent(step))

    def as_its_own_intent(self, step: Step) -> Callable[[str], None]:
        self.steps.append(step)
        self.disk = self.known()

        def told(word: str) -> None:
            if word == "lost":  # nobody knows what became of it: the record goes on saying that it was begun
                self.intent = self.known().intent
            self.steps.remove(step)

        return told

    @precondition(lambda self: self.transition is None)
    @rule()
    def what_changed_is_written(self) -> None:
        self.disk = self.known()

    # A transition.

    @precondition(lambda self: self.may_send() and not self.steps)
    @rule(wish=st.sets(vcpus), terms=all_terms, goes_on=moves)
    def a_map_is_wished_for(self, wish: set[int], terms: Terms, goes_on: list[tuple[str, int]]) -> None:
        self.begin(VcpuMap({0, *wish}), terms)
        self.much_moves_on(goes_on)

    def begin(self, wish: VcpuMap, terms: Terms, intent: Intent | None = None) -> None:
        plan = plan_map(self.engine.situation, wish)
        if plan.denied:  # only since a plug of ours was never replied to
            assert {each.reason for each in plan.denied} == {DenialReason.IN_PROGRESS}
            return
        if self.intent is not None:
            self.superseded |= {step.first for step in self.intent.steps}
        self.forget()
        if (
            intent is not None and intent.direction is Direction.FORWARD
        ):  # it goes on: what was done before is ours too
            self.added |= {step.first for step in intent.steps if step.action is Action.PLUG}
            self.asked |= {step.first for step in intent.steps if step.action is Action.UNPLUG and not step.joins}
        self.terms = terms
        if intent is not None and intent.direction is Direction.FORWARD:  # it is the same transition that goes on
            self.added = {step.first for step in intent.steps if step.action is Action.PLUG}
            self.asked = {step.first for step in intent.steps if step.action is Action.UNPLUG and not step.joins}
        self.transition = Transition(plan, self.engine, terms, self.now, intent=intent)
        self.drive()

    def drive(self) -> None:
        """What the owner's loop does."""
        while self.transition is not None and not self.transition.ended:
            effects = self.transition.advance(self.now)
            if not effects:
                return
            for effect in effects:
                self.bring_about(self.transition, effect)
        if self.transition is not None and self.saving is None:
            self.conclude(self.transition)

    def bring_about(self, transition: Transition, effect: Effect) -> None:
        assert self.saving is None, "nothing is done while a save is under way"
        batch = transition.batch
        match effect:
            case Save():
                assert not self.unreplied or transition.phase is not Phase.BEGIN
                self.saving = effect
                before, self.intent = self.intent, effect.intent
                self.written = self.known()
                if transition.phase is Phase.BEGIN:
                    self.before = before
            case Send():
                self.check_sending(transition, effect.work)
                self.send(batch, effect.work)
            case Look():
                self.looks[id(effect)] = batch
                self.read(full=effect.full, then=lambda: self.looked(id(effect)))
            case LastLook():
                self.last_looks.append(effect)
                self.read(full=False, then=lambda: self.saw_the_end(effect))

    def saw_the_end(self, look: LastLook, failed: str = "") -> None:
        if look in self.last_looks and self.transition is not None:
            self.last_looks.remove(look)
            self.seen_last = [list(each) for each in self.judged.history]
            self.transition.confirmed(look, failed, self.now)

    def looked(self, look: int) -> None:
        batch = self.looks.pop(look, None)
        if batch is not None:
            batch.looked(self.now)

    def send(self, batch: Batch, work: Work) -> None:
        vcpu = work.step.first
        self.unreplied.add(id(work))
        self.sent = True

        def told(word: str) -> None:
            self.unreplied.discard(id(work))
            if word == "accepted":
                batch.replied(work, Plugged(work.step.ids) if work.plugs else None, self.now)
            elif word == "gone":
                batch.replied(work, None, self.now)
            elif word == "rejected":
                batch.replied(work, Rejected(work.step.ids, "GenericError", "no"), self.now)
            else:
                self.knows_of_loss = True
                batch.unanswered(work, "the connection was lost", self.now)

        if work.plugs:
            self.added.add(vcpu)
            assert work.path is not None
            self.send_plug(vcpu, work.path, told)
        else:
            assert work.removal is not None
            self.asked.add(vcpu)
            self.send_unplug(vcpu, work.removal, told)

    def check_sending(self, transition: Transition, work: Work) -> None:
        vcpu = work.step.first
        assert self.online or not self.knows_of_loss
        assert len(self.unreplied) < self.terms.in_flight or self.overdue(transition)
        if not work.plugs and self.terms.on_failure is OnFailure.STOP:
            unplugs = [each for each in transition._works if each.step.action is Action.UNPLUG]
            out = [each for each in unplugs if each.stage in {Stage.SENT, Stage.ASKED, Stage.LOOKING}]
            assert out == [work], "one at a time"
            assert not any(isinstance(each.verdict, Refused) for each in unplugs), "and none after a refusal"
        assert self.disk.intent is not None, "nothing is sent without an intent on disk"
        assert vcpu in {step.first for step in self.disk.intent.steps}
        if work.undoes is not None:
            assert self.unrecorded or self.disk.intent.direction is Direction.REVERTING
            assert vcpu in (self.asked if work.plugs else self.added), "only what we did is undone"
            assert vcpu not in self.engine.layout.pending or not work.plugs
            if not work.plugs:
                assert self.engine.layout.slot_of(vcpu).qom_path == f"/machine/peripheral/vcpu{vcpu}"

    def overdue(self, transition: Transition) -> bool:
        return any(isinstance(work.verdict, Unknown) for work in transition._works)

    # What happens to it.

    @precondition(lambda self: self.saving is not None)
    @rule(succeeds=st.sampled_from([True, True, True, False]), kept=st.booleans())
    def a_save_ends(self, succeeds: bool, kept: bool) -> None:
        transition = self.transition
        if self.saving is None or transition is None:
            return
        self.saving = None
        if succeeds or kept:  # a save may fail after it is done
            self.disk = self.written
        if not succeeds:
            self.unrecorded = True
            if transition.phase is Phase.BEGIN:
                assert not self.sent, "nothing was sent"
                self.intent, self.transition = self.before, None
                return
        transition.saved()
        self.drive()

    @precondition(lambda self: self.transition is not None)
    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.drive()

    @precondition(lambda self: self.transition is not None)
    @rule()
    def a_deadline_passes(self) -> None:
        deadline = self.transition.deadline if self.transition else None
        if deadline is not None:
            self.now = max(self.now, deadline)
            self.drive()

    @precondition(lambda self: self.last_looks)
    @rule()
    def the_last_look_fails(self) -> None:
        self.saw_the_end(self.last_looks[0], "QEMU said error")
        self.drive()

    @precondition(lambda self: self.looks)
    @rule()
    def a_look_takes_too_long(self) -> None:
        self.looked(next(iter(self.looks)))
        self.drive()

    @precondition(lambda self: self.transition is not None)
    @rule(really=st.sampled_from([True, False, False]))
    def its_caller_stops_it(self, really: bool) -> None:
        if self.transition is not None and really:
            self.transition.cancel(self.now)
            self.drive()

    @precondition(lambda self: self.transition is not None and not self.online and self.terms.reconnect)
    @rule()
    def coming_back_takes_too_long(self) -> None:
        self.give_up("it did not come back in time")

    def give_up(self, why: str) -> None:
        transition = self.transition
        if transition is not None and not transition.ended:
            transition.lose(why, self.now)
            self.intent = transition.intent
            if self.saving is None:
                self.conclude(transition)

    def on_lost(self) -> None:
        self.knows_of_loss = True
        if self.transition is None:
            return
        if self.terms.reconnect:
            self.transition.paused()
        else:
            self.give_up("the connection was lost")

    def on_return(self, *, same: bool) -> None:
        self.knows_of_loss = False
        if self.transition is None:
            self.intent = self.intent if same else None
        elif same:
            self.transition.resumed(self.now)
        else:
            self.replaced = True
            self.give_up("another QEMU runs this VM now")
        self.drive()

    def check_settled(self, removal: Removal) -> None:
        super().check_settled(removal)
        if self.transition is not None:
            self.transition.answered(removal, self.now)

    def a_message_arrives(self, times: int = 1) -> None:
        super().a_message_arrives(times)
        self.drive()

    def a_reply_is_taken_in(self) -> None:
        super().a_reply_is_taken_in()
        self.drive()

    def lose_replies(self) -> None:
        super().lose_replies()
        self.drive()
        if self.commands:  # sent by one who has heard of no loss yet: the monitor refuses it
            self.lose_replies()

    @rule(steps=moves)
    def much_moves_on(self, steps: list[tuple[str, int]]) -> None:
        for step, vcpu in steps:
            self.move(step, vcpu)

    def move(self, step: str, vcpu: int = 1) -> None:
        super().move(step)
        asked = sorted(self.qemu.removals)
        if step == "save" and self.saving is not None:
            self.a_save_ends(succeeds=True, kept=True)
        elif step == "round trip":
            self.everything_arrives()
        elif step == "acknowledge":
            self.the_guest_answers_a_plug(vcpu, 0)
        elif step == "take up" and asked:
            self.qemu.take_up(asked[vcpu % len(asked)])
        elif step in {"eject", "refuse"} and asked:
            self.qemu.decide(asked[vcpu % len(asked)], step)
        elif step == "wait" and not self.unreplied:
            self.a_deadline_passes()
        elif step == "look ends" and self.looks:
            self.a_look_takes_too_long()

    @precondition(lambda self: self.transition is not None and self.online)
    @rule(refuser=st.integers(0, SLOTS - 1))
    def all_goes_well_but_one(self, refuser: int) -> None:
        self.everybody_obliges(but=refuser)

    # Its end.

    def conclude(self, transition: Transition) -> None:
        """A transition is over: what it says must be so."""
        self.transition = None
        report = transition.report()
        self.check_verdicts(report)
        layout = self.engine.layout
        if report.outcome is TransitionOutcome.REACHED:
            assert layout.enabled == report.target
            assert not layout.pending & report.target
            self.check_seen(report)
        if report.outcome is TransitionOutcome.REVERTED and transition._turned:
            self.check_reverted(transition, report)
        assert str(report)

    def check_seen(self, report: TransitionReport) -> None:
        """What has not changed since the last look is as it is called."""
        for vcpu, seen in enumerate(self.seen_last):
            if self.judged.history[vcpu] == seen:
                assert (seen[-1] is not None) == (vcpu in report.target), (vcpu, str(report))

    def check_verdicts(self, report: TransitionReport) -> None:
        for step in report.steps if not self.replaced else ():
            (vcpu,) = step.ids
            if isinstance(step.verdict, Refused) and step.action is Action.UNPLUG:
                assert self.may_have_refused(vcpu, step.verdict.code), step
            elif isinstance(step.verdict, Plugged):
                assert any(path is not None for path in self.judged.history[vcpu]), step
            elif isinstance(step.verdict, Unplugged):
                assert None in self.judged.history[vcpu], step
            if step.undone:
                assert vcpu in self.added | self.asked, step

    def check_reverted(self, transition: Transition, report: TransitionReport) -> None:
        for work in transition._works:
            vcpu = work.step.first
            ours = vcpu in (self.added if work.step.action is Action.PLUG else self.asked)
            as_before = (vcpu in report.layout.enabled) == (vcpu in report.start)
            if ours and work.step.action is not Action.KEEP:
                assert as_before or work.reason or self.touched_by_other(vcpu), (vcpu, str(report))
                assert not isinstance(work.verdict, Unknown), str(report)

    def touched_by_other(self, vcpu: int) -> bool:
        return OTHER in {self.qemu.by[vcpu], *self.qemu.askers[vcpu]}

    @invariant()
    def a_transition_is_either_saving_or_waits_for_something(self) -> None:
        if self.transition is not None and self.online and self.saving is None:
            batch = self.transition.batch
            assert self.unreplied or self.looks or self.last_looks or batch.deadline is not None
            assert self.unreplied or self.last_looks or not self.transition.cancelled, "a safe point was reached"

    def everybody_obliges(self, but: int = 0) -> None:
        """Saves succeed, QEMU answers and the guest does all that it is asked for, until it is over."""
        self.qemu.late = False
        for round_ in range(50):
            if self.transition is None:
                return
            self.qemu.catch_up()
            if round_ > 10:  # what has been misheard is never answered
                self.a_deadline_passes()
            if self.saving is not None:
                self.a_save_ends(succeeds=True, kept=True)
            for vcpu in range(SLOTS):
                self.qemu.decide(vcpu, "refuse" if vcpu == but and but else "eject")
                if vcpu in self.qemu.lied:
                    self.qemu.eject(vcpu)
                if self.engine.layout[vcpu].acknowledged is None:
                    self.qemu.acknowledge(vcpu)
            if self.engine.wanted is not Read.NONE:
                self.read(full=True)
            self.everything_arrives()
        raise AssertionError(self.transition and str(self.transition.report()))

    def teardown(self) -> None:
        """A guest that obliges, or deadlines that pass, end every transition."""
        while not self.online:
            self.we_find_qemu_again()
        for _ in range(50):
            if self.saving is not None:
                self.a_save_ends(succeeds=True, kept=True)
            self.everything_arrives()
            self.a_deadline_passes()
        assert self.transition is None
        super().teardown()
