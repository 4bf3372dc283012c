"""Whole maps and single changes beside a naive QEMU: under any policy, cut short anywhere, with a record.

The record is what the saves put on disk, one after the other: the intent, and the layout known when each began.
"""

from collections import deque
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from qmpvcpu import DenialReason, MonitorLostError, OnFailure, RecordError, Refused, TransitionReport, VcpuMap
from qmpvcpu.engine.messages import (
    Change,
    ConfigWritten,
    DropPrevious,
    Effect,
    ExportLock,
    Hold,
    Lost,
    Persist,
    Release,
    Request,
    Result,
    Save,
    Saved,
    Send,
    Settle,
    Stop,
    StopRunning,
    WriteConfig,
)
from qmpvcpu.engine.steprun import StepRun, StepStage
from qmpvcpu.engine.transition import Phase, Transition
from qmpvcpu.errors import GuestAgentError, MonitorError, StepDeniedError, TransitionError
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.transition import Action, ConfigOutcome, Direction, Intent, TransitionOutcome, succeeded
from qmpvcpu.model.verdicts import Unknown
from qmpvcpu.planning.plan import plan_map
from tests.engine.engine_machine import Disk, EngineBesideQemu, policies, proofs, vcpus
from tests.engine.model_qemu import OTHER, SLOTS
from tests.engine.story import NextBoot, set_state

__all__ = ["TransitionsBesideQemu", "moves"]

MOVES = ["execute", "arrive", "take in", "save", "save", "eject", "refuse", "acknowledge", "twice", "take up", "wait"]
MOVES += ["round trip", "round trip", "round trip", "answer", "take"]
moves = st.lists(st.tuples(st.sampled_from(MOVES), vcpus), min_size=4, max_size=20)
map_options = st.builds(
    CheckedOptions,
    on_failure=st.sampled_from(OnFailure),
    timeout=st.sampled_from([0.0, 5.0, 30.0]),
    total_timeout=st.sampled_from([None, None, 8.0]),
    revert_timeout=st.sampled_from([None, 5.0]),
    in_flight=st.sampled_from([1, 2, 8]),
    proof=proofs,
    require_proof=st.sampled_from([False, False, False, True]),
    online=st.booleans(),
    offline_first=st.booleans(),
    placement_policy=policies,
)


class TransitionsBesideQemu(EngineBesideQemu):
    """Everybody does something, and we change whole maps."""

    others_use_our_names = False  # what another client calls as we do is undone as if it were ours

    def __init__(self) -> None:
        self.saving: deque[tuple[int | None, Disk]] = deque()  # None: nobody waits for that one
        self.writing: deque[WriteConfig] = deque()
        super().__init__()
        self.disk = self.known()
        self.holding: set[Hold] = set()
        self.unrecorded = False

    @initialize(reconnects=st.booleans(), has_agent=st.sampled_from([True, True, False]))
    def somebody_looks_for_qemu(self, reconnects: bool, has_agent: bool) -> None:
        self.reconnects = self.engine._reconnects = reconnects
        self.has_agent = self.engine.state.has_agent = has_agent

    # Maps.

    @rule(wish=st.sets(vcpus), options=map_options, goes_on=moves)
    def a_map_is_wished_for(self, wish: set[int], options: CheckedOptions, goes_on: list[tuple[str, int]]) -> None:
        self.wish_for(VcpuMap({0, *wish}), options)
        self.much_moves_on(goes_on)

    def wish_for(self, wish: VcpuMap, options: CheckedOptions) -> Change:
        change = Change(lambda now: plan_map(now, wish, options), options)
        self.ask(change)
        return change

    @rule(vcpu=vcpus, enabled=st.booleans(), whole=st.booleans(), options=map_options)
    def the_next_boot_is_to_follow(self, vcpu: int, enabled: bool, whole: bool, options: CheckedOptions) -> None:
        there = self.engine.layout.enabled
        wish = VcpuMap(there | {vcpu} if enabled else there - {vcpu})
        change = set_state(vcpu, enabled=enabled, **options._asdict())
        if whole:
            change = Change(lambda now: plan_map(now, wish, options), options)
        self.ask(replace(change, config=NextBoot()))

    @property
    def map_running(self) -> Transition | None:
        return self.engine._map()

    @rule()
    def somebody_stops_the_map(self) -> None:
        self.ask(StopRunning())

    # The next boot.

    def perform(self, effect: Effect) -> None:
        if isinstance(effect, WriteConfig):
            transition = self.engine._configs[effect.number]
            reached = transition.report().outcome is TransitionOutcome.REACHED
            done = all(succeeded(run.step.action, run.verdict) for run in transition.runs)
            assert reached if transition.is_map else done
            self.writing.append(effect)
        super().perform(effect)

    @precondition(lambda self: self.writing)
    @rule(succeeds=st.sampled_from([True, True, False]))
    def the_next_boot_is_written(self, succeeds: bool) -> None:
        effect = self.writing.popleft()
        outcome = ConfigOutcome.WRITTEN if succeeds else ConfigOutcome.FAILED
        error = None if succeeds else RecordError("/next.xml", "no space")
        self.put(ConfigWritten(effect.number, NextBoot.report(outcome), error))

    # The record.

    def save(self, save: Save) -> None:
        self.saving.append((save.number, self.known()))

    @precondition(lambda self: not self.engine.holds_saves and not self.engine.closed)
    @rule()
    def what_changed_is_written(self) -> None:
        self.saving.append((None, self.known()))

    @precondition(lambda self: self.saving)
    @rule(succeeds=st.sampled_from([True, True, True, False]), kept=st.booleans())
    def a_save_ends(self, succeeds: bool, kept: bool) -> None:
        number, written = self.saving.popleft()
        if succeeds or kept:  # a save may fail after it is done
            self.disk = written
        self.unrecorded |= not succeeds
        if number is not None:
            self.put(Saved(number, None if succeeds else RecordError("/record.xml", "no space")))

    @rule()
    def somebody_wants_it_on_disk(self) -> None:
        self.ask(Persist())

    @rule()
    def what_an_earlier_qemu_had_is_dropped(self) -> None:
        self.ask(DropPrevious())

    def we_oblige(self) -> None:
        self.release()
        while self.saving or self.writing:
            if self.writing:
                self.the_next_boot_is_written(succeeds=True)
            if self.saving:
                self.a_save_ends(succeeds=True, kept=True)

    # Those who keep changes out.

    @rule()
    def somebody_holds_the_vm(self) -> None:
        self.ask(Hold())

    def is_held(self) -> bool:
        return bool(self.holding)

    @precondition(lambda self: self.holding)
    @rule(exported=st.booleans())
    def it_is_exported_or_released(self, exported: bool) -> None:
        if exported:
            self.put(ExportLock(locked=not self.engine.state.exported))
        else:
            self.release()

    def release(self) -> None:
        for hold in tuple(self.holding):
            self.holding.remove(hold)
            self.put(Release(hold))
        if self.engine.state.exported:
            self.put(ExportLock(locked=False))

    # Sending.

    def send(self, send: Send) -> None:
        transition, _ = self.engine.senders[send.number]
        saving = {self.engine.savers[number] for number, _ in self.saving if number in self.engine.savers}
        assert not any(each.is_map for each, _ in saving), "nothing is sent while a map saves"
        assert all(each is not transition for each, _ in saving)
        assert not self.holding
        assert not self.engine.state.exported
        super().send(send)

    def check_sending(self, transition: Transition, run: StepRun) -> None:
        super().check_sending(transition, run)
        if not transition.is_map:
            return
        vcpu = run.step.first
        if run.undoes is not None and run.undoes.taken_out is run:
            assert vcpu in self.added.get(transition, set()), "only what we plugged is taken out"
            return
        if not run.plugs and transition.change.options.on_failure is OnFailure.STOP:
            unplugs = [each for each in transition.runs if each.step.action is Action.UNPLUG]
            out = {StepStage.SENT, StepStage.REQUESTED, StepStage.LEAVING_GUEST, StepStage.RETURNING_TO_GUEST}
            assert [each for each in unplugs if each.stage in out] == [run], "one at a time"
            assert not any(isinstance(each.verdict, Refused) for each in unplugs), "and none after a refusal"
        if run.undoes is not None:
            assert self.disk.intent is not None
            assert self.unrecorded or self.disk.intent.direction is Direction.REVERTING
            did = (self.asked if run.plugs else self.added).get(transition, set()) | self.did_before(transition, run)
            assert vcpu in did, "only what we did is undone"
            assert vcpu not in self.engine.layout.pending or not run.plugs
            if not run.plugs:
                assert self.engine.layout.slot_of(vcpu).qom_path == f"/machine/peripheral/vcpu{vcpu}"

    @staticmethod
    def did_before(transition: Transition, run: StepRun) -> set[int]:
        """Return the slots in which what *run* undoes may have been done before *transition* was cut short."""
        intent, action = transition.change.intent, Action.UNPLUG if run.plugs else Action.PLUG
        if intent is None or intent.direction is not Direction.FORWARD:
            return set()
        return {step.first for step in intent.steps if step.action is action and not step.joins}

    # The connection.

    @precondition(lambda self: not self.online and self.reconnects and not self.engine.closed)
    @rule(really=st.sampled_from([True, False, False]))
    def nobody_looks_for_qemu_any_more(self, really: bool) -> None:
        if really:
            self.put(Lost(MonitorLostError("another VM is there"), may_return=False))

    @precondition(lambda self: not self.engine.closed)
    @rule(goes_on=moves, executed=st.integers(0, 3), really=st.sampled_from([True, False, False, False]))
    def we_close(self, goes_on: list[tuple[str, int]], executed: int, really: bool) -> None:
        """What is under way has some time to end."""
        if not really:
            return
        self.was_away = True
        self.put(Stop())
        self.much_moves_on(goes_on)
        if self.online:
            self.cut(executed)
        lost = MonitorLostError("closed by this side")
        self.put(Lost(lost, may_return=False))
        self.lose_replies(lost)

    @precondition(lambda self: self.engine.closed)
    @rule(saved=st.booleans())
    def we_attach_again(self, saved: bool) -> None:
        """What could not be written is tried once more, then somebody begins anew."""
        while self.saving or self.writing:
            if self.writing:
                self.the_next_boot_is_written(succeeds=saved)
            if self.saving:
                self.a_save_ends(succeeds=saved, kept=saved)
        assert not self.open, "nobody waits for what is gone"
        assert not self.engine._running
        if saved:
            self.disk = self.known()
        self.begin_anew()

    def begin_anew(self) -> Intent | None:
        """Another one of us comes, who knows what is on disk; return what that says was cut short."""
        superseded = self.engine.superseded
        if self.qemu is not self.judged:
            self.disk = self.disk._replace(intent=None, pending={})
            self.judged, self.seen_to = self.qemu, [0] * SLOTS
        self.qemu.wire.clear()
        self.qemu.listened, self.online, self.returning = True, True, 0
        self.open.clear()
        self.questions.clear()
        self.holding.clear()
        self.births.clear()
        self.engine = self.attach()
        self.engine.superseded = superseded
        self.what_we_know_again_is_the_truth()
        self.disk = self.known()
        return self.disk.intent

    def what_we_know_again_is_the_truth(self) -> None:
        """What is checked of one who has just come."""

    def teardown(self) -> None:
        """A guest that obliges, or deadlines that pass, end everything."""
        if self.engine.closed:
            self.we_attach_again(saved=True)
        super().teardown()

    # How it goes on.

    @rule(steps=moves)
    def much_moves_on(self, steps: list[tuple[str, int]]) -> None:
        for step, vcpu in steps:
            self.move(step, vcpu)

    def move(self, step: str, vcpu: int = 1) -> None:
        super().move(step)
        asked = sorted(self.qemu.removals)
        if step == "save" and self.saving:
            self.a_save_ends(succeeds=True, kept=True)
        elif step == "round trip":
            self.everything_arrives()
        elif step == "acknowledge":
            self.the_guest_answers_a_plug(vcpu, 0)
        elif step == "answer" and self.questions:
            self.the_agent_answers()
        elif step == "take":
            self.the_guest_takes_a_cpu(vcpu, online=vcpu == 1)
        elif step == "take up" and asked:
            self.qemu.take_up(asked[vcpu % len(asked)])
        elif step in {"eject", "refuse"} and asked:
            self.qemu.decide(asked[vcpu % len(asked)], step)
        elif step == "wait" and not self.engine._commands:
            self.a_deadline_passes()

    @precondition(lambda self: self.map_running is not None and self.online)
    @rule(refuser=st.integers(0, SLOTS - 1))
    def all_goes_well_but_one(self, refuser: int) -> None:
        transition = self.map_running
        self.everybody_obliges(but=refuser, until=lambda: transition is not self.map_running)

    # Its end.

    def settle(self, settle: Settle) -> None:
        super().settle(settle)
        if isinstance(settle.request, Hold) and settle.error is None and settle.request not in self.cancelled:
            self.holding.add(settle.request)
        if isinstance(settle.request, StopRunning) and settle.result is not None:
            assert isinstance(settle.result, TransitionReport)
            assert settle.result.cancelled

    def cancel(self, request: Request) -> None:
        super().cancel(request)
        if isinstance(request, Hold):  # as one does who is cancelled while it waits
            self.put(Release(request))

    def conclude(self, change: Change, settle: Settle) -> None:
        """A change is over: what it says must be so."""
        super().conclude(change, settle)
        transition = self.engine.begun.get(change)
        if change.result is not Result.REPORT or change in self.cancelled:
            return
        tried_again = change.tries > 1 and not isinstance(settle.error, TransitionError | None)
        if transition is None or transition.not_begun is not None or tried_again:
            if isinstance(settle.error, StepDeniedError):  # only since a plug of ours was never replied to
                denials = {DenialReason.IN_PROGRESS, DenialReason.EXPORTED}
                assert settle.error.reason in (denials if self.has_agent else denials | {DenialReason.NO_AGENT})
            elif isinstance(settle.error, GuestAgentError):
                assert self.agent_failures
                assert change.options.offline_first
            else:
                assert isinstance(settle.error, MonitorError | RecordError)
            return
        report = settle.error.report if isinstance(settle.error, TransitionError) else settle.result
        if isinstance(settle.error, RecordError):
            report = transition.report()
        assert isinstance(report, TransitionReport)
        assert str(report)
        for step in report.steps:
            if step.undone:
                (vcpu,) = step.ids
                assert vcpu in self.added.get(transition, set()) | self.asked.get(transition, set()) | self.before(
                    transition
                ), step
        if report.outcome is TransitionOutcome.REACHED:
            assert report.layout.enabled == report.target
            assert not report.layout.pending & report.target
            self.check_seen(transition, report)
        if report.outcome is TransitionOutcome.REVERTED and transition._turned:
            self.check_reverted(transition, report)

    @staticmethod
    def before(transition: Transition) -> set[int]:
        """Return the slots of the steps that were done, or begun, before *transition* was cut short."""
        intent = transition.change.intent
        return {step.first for step in intent.steps} if intent is not None else set()

    def check_seen(self, transition: Transition, report: TransitionReport) -> None:
        """What has not changed since the last look is as it is called."""
        for vcpu, seen in enumerate(self.seen_last.get(transition, [])):
            if self.judged.history[vcpu] == seen:
                assert (seen[-1] is not None) == (vcpu in report.target), (vcpu, str(report))

    def check_reverted(self, transition: Transition, report: TransitionReport) -> None:
        for run in transition.runs:
            vcpu = run.step.first
            did = (self.added if run.step.action is Action.PLUG else self.asked).get(transition, set())
            as_before = (vcpu in report.layout.enabled) == (vcpu in report.start)
            if vcpu in did and run.step.action is not Action.KEEP:
                told = run.reason or run.taken_out is not None
                assert as_before or told or self.touched_by_other(vcpu), (vcpu, str(report))
                assert not isinstance(run.verdict, Unknown), str(report)

    def touched_by_other(self, vcpu: int) -> bool:
        return OTHER in {self.qemu.by[vcpu], *self.qemu.askers[vcpu]}

    @invariant()
    def one_map_runs_at_a_time(self) -> None:
        running = [each for each in self.engine._running.values() if each.is_map]
        assert len(running) <= 1
        assert running == ([] if self.map_running is None else [self.map_running])
        if not running or running[0].phase is Phase.FINISH:
            assert not self.engine.holds_saves
        elif running[0].phase is not Phase.START and not self.engine.closed:
            assert self.engine.holds_saves
