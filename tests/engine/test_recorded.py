"""What the record is to say at each moment, and what is done where it cannot be written; the next boot too."""

from dataclasses import replace

import pytest

from qmpvcpu import Affect, ConfigDeniedError, OnFailure, Outcome, RecordError, TransitionError, VcpuMap
from qmpvcpu.engine.intents import Intentions
from qmpvcpu.engine.messages import Change, ConfigWritten, DropPrevious, Persist
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.transition import Action, ConfigOutcome, Direction, Intent, Step
from qmpvcpu.model.verdicts import OstAnswer
from tests.engine.story import NextBoot, Story, make_state, plug, set_state, unplug, whole_map

PREVIOUS = PreviousVcpus.of(make_state("0-5").layout)
INTERRUPTED = Intent(VcpuMap([0]), VcpuMap.parse("0,7"), (Step(Action.PLUG, VcpuMap([7])),), OnFailure.REVERT, 9.0)


def steps(told: Story) -> list[str]:
    """Return the steps that a save that begins now would record as under way."""
    intent = told.engine.recorded.intent
    return [] if intent is None else [str(step) for step in intent.steps]


# What is recorded.


def test_a_single_step_is_recorded_before_it_is_sent_and_until_it_is_replied_to() -> None:
    told = Story("0-1", saves_wait=True)
    told.ask(plug(2))
    told.ask(unplug(1))
    intent = told.engine.recorded.intent
    assert intent is not None
    assert (intent.start, intent.target) == (VcpuMap.parse("0-1"), VcpuMap.parse("0,2"))
    assert steps(told) == ["plug 2", "unplug 1"]
    assert told.saved() == ["add 2"]
    assert told.saved() == ["del 1"]
    assert told.accept(2) == ["save outcome"]
    assert steps(told) == ["unplug 1"]
    told.accept(1)
    assert steps(told) == [], "the layout has it as pending"
    assert told.engine.recorded.desired == VcpuMap.parse("0,2")


def test_without_a_record_nothing_is_saved() -> None:
    told = Story("0-1", recorded=False)
    assert told.ask(plug(2)) == ["add 2"]
    told.accept(2)
    assert told.wish("0,2") == ["del 1"]
    told.accept(1)
    assert told.ejects(1) == []
    assert told.outcome == "REACHED"
    persisting = Persist()
    told.ask(persisting)
    assert told.result(persisting) is None


def test_what_is_unknown_stays_recorded_beside_what_was_interrupted() -> None:
    told = Story("0", intentions=Intentions(INTERRUPTED), reply_timeout=2.0)
    told.ask(plug(1))
    assert told.wait(2) == ["save the rest"]
    assert steps(told) == ["plug 7", "plug 1"]
    intent = told.engine.recorded.intent
    assert intent is not None
    assert (intent.on_failure, intent.timeout, intent.target) == (OnFailure.REVERT, 9.0, VcpuMap.parse("0-1,7"))


def test_a_map_supersedes_what_was_interrupted_and_what_an_earlier_qemu_had() -> None:
    told = Story("0", "0-1", intentions=Intentions(INTERRUPTED, VcpuMap([0]), PREVIOUS))
    assert steps(told) == ["plug 1"]
    assert told.engine.recorded.previous is None
    assert told.engine.recorded.desired == {0, 1}
    assert told.engine.holds_saves
    told.accept(1)
    assert not told.engine.holds_saves
    assert told.engine.recorded.intent is None


def test_what_brings_an_earlier_qemus_vcpus_back_keeps_them_until_they_are_there() -> None:
    told = Story("0", intentions=Intentions(previous=PREVIOUS))
    told.ask(whole_map("0-5", rebuilds=True))
    assert told.engine.recorded.previous is PREVIOUS
    told.accept(1, 2, 3, 4, 5)
    assert told.engine.recorded.previous is None


def test_what_a_single_step_leaves_unknown_beside_a_map_outlives_it() -> None:
    told = Story("0")
    told.wish("0-2")
    told.engine.intentions.interrupted = INTERRUPTED  # as if a step had ended so meanwhile
    told.accept(1)
    told.accept(2)
    assert told.outcome == "REACHED"
    assert told.engine.recorded.intent == INTERRUPTED


def test_a_step_beside_a_map_that_turns_back_leaves_its_direction() -> None:
    told = Story(make_state("0-1,4", answers={4: OstAnswer(3, 0x84)}))
    told.ask(set_state(4, enabled=True, timeout=60.0))
    told.wish("0,2,4", on_failure=OnFailure.REVERT, timeout=5.0)
    told.accept(2)
    told.accept(1)
    told.refuses(1)
    assert told.wait(5) == ["look"]
    assert told.look("0-2,4") == ["save reverting", "del 2"]
    intent = told.intents[-1]
    assert intent is not None
    assert "keep 4" in [str(step) for step in intent.steps]
    assert (intent.direction, intent.on_failure) == (Direction.REVERTING, OnFailure.REVERT)


# A record that cannot be written.


def test_what_cannot_be_recorded_is_not_begun() -> None:
    told = Story("0", saves_wait=True, intentions=Intentions(None, VcpuMap([0]), PREVIOUS))
    request = plug(1)
    told.ask(request)
    assert told.engine.recorded.previous is None
    assert told.saved("no space") == []
    error = told.error(request)
    assert isinstance(error, RecordError)
    assert error.outcome is Outcome.UNCHANGED
    recorded = told.engine.recorded
    assert (recorded.intent, recorded.desired, recorded.previous) == (None, VcpuMap([0]), PREVIOUS)


def test_a_map_that_cannot_be_recorded_is_not_begun_and_supersedes_nothing() -> None:
    told = Story("0", "0-1", saves_wait=True, intentions=Intentions(INTERRUPTED, VcpuMap([0]), PREVIOUS))
    single = plug(3)
    told.ask(single)
    a_map = told.engine._exclusive
    assert isinstance(a_map, Change)
    assert told.saved("no space") == ["save intent"], "of the next one"
    assert isinstance(told.error(a_map), RecordError)
    assert steps(told) == ["plug 7", "plug 3"]
    assert not told.engine.holds_saves


def test_what_one_step_cannot_record_takes_back_nothing_of_another() -> None:
    told = Story("0", saves_wait=True)
    first, second = plug(1), plug(2)
    told.ask(first)
    told.ask(second)
    told.saved("no space")
    assert told.is_settled(first)
    assert steps(told) == ["plug 2"]
    assert told.engine.recorded.desired == {0, 2}
    assert told.saved() == ["add 2"]


def test_what_is_done_and_not_recorded_is_an_error_that_says_so() -> None:
    told = Story("0-1", saves_wait=True)
    adding, removing = plug(2), unplug(1)
    for request in (adding, removing):
        told.ask(request)
        told.saved()
    told.accept(2, 1)
    told.ejects(1)
    told.saved("no space")
    told.saved("no space")
    for request, done in ((adding, "vCPU 2 is plugged"), (removing, "vCPU 1 is unplugged")):
        error = told.error(request)
        assert isinstance(error, RecordError)
        assert error.outcome is Outcome.CHANGED
        assert str(error) == f"/vm.xml: no space; {done}, and not recorded"
        assert isinstance(error.__cause__, RecordError)


def test_a_map_that_is_reached_and_not_recorded_is_an_error_too() -> None:
    told = Story("0", "0-1", saves_wait=True)
    told.saved()
    told.accept(1)
    told.saved("no space")
    assert told.change is not None
    error = told.error(told.change)
    assert isinstance(error, RecordError)
    assert "what was wanted is reached, and not recorded" in str(error)


@pytest.mark.parametrize("recorded", ["turn", "outcome"])
def test_a_map_that_is_not_reached_says_so_first(recorded: str) -> None:
    told = Story("0-1", "0,2", saves_wait=True, on_failure=OnFailure.REVERT)
    told.saved()
    told.accept(2)
    told.accept(1)
    assert told.refuses(1) == ["save reverting"]
    assert told.saved("no space" if recorded == "turn" else "") == ["del 2"], "it turns back all the same"
    told.accept(2)
    assert told.ejects(2) == ["save outcome"]
    told.saved("no space" if recorded == "outcome" else "")
    assert told.change is not None
    error = told.error(told.change)
    assert isinstance(error, TransitionError)
    assert isinstance(error.__cause__, RecordError)
    assert error.report.unrecorded == "/vm.xml: no space"


def test_a_save_that_fails_after_the_loss_is_taken_in() -> None:
    told = Story("0", "0-1", saves_wait=True)
    told.lose()
    assert told.saved("no space") == []
    assert told.outcome == "PARTIAL"


# Requests about the record.


@pytest.mark.parametrize("why", ["", "no space"])
def test_who_wants_it_on_disk_is_told_when_it_is(why: str) -> None:
    told = Story("0", saves_wait=True)
    request = Persist()
    assert told.ask(request) == ["save"]
    assert not told.is_settled(request)
    told.saved(why)
    if why:
        assert isinstance(told.error(request), RecordError)
    else:
        assert told.result(request) is None


@pytest.mark.parametrize("why", ["", "no space"])
def test_what_an_earlier_qemu_had_is_dropped_if_that_can_be_recorded(why: str) -> None:
    told = Story("0", saves_wait=True, intentions=Intentions(previous=PREVIOUS))
    request = DropPrevious()
    assert told.ask(request) == ["save"]
    assert told.engine.recorded.previous is None
    told.saved(why)
    assert told.engine.recorded.previous is (PREVIOUS if why else None)
    assert told.is_settled(request)


def test_a_save_whose_caller_goes_away_is_settled_once() -> None:
    told = Story("0", saves_wait=True)
    request = Persist()
    told.ask(request)
    told.cancel(request)
    told.saved()
    assert told.is_settled(request)


# The next boot.


def with_next_boot(change: Change, config: NextBoot | None = None) -> Change:
    return replace(change, config=config or NextBoot())


def test_the_next_boot_follows_once_the_step_is_done() -> None:
    told = Story("0")
    request = with_next_boot(plug(1))
    told.ask(request)
    intent = told.engine.recorded.intent
    assert intent is not None
    assert (intent.next_boot, intent.config) == (VcpuMap.parse("0-1"), "/next.xml")
    assert told.accept(1) == ["write the next boot"]
    assert steps(told) == ["plug 1"], "until that is done"
    effect = told.configs[0]
    assert effect.done == "plug of vCPU 1 is done"
    assert told.tell(ConfigWritten(effect.number, NextBoot.report(ConfigOutcome.WRITTEN), None)) == ["save outcome"]
    assert told.result(request) == {1}
    assert told.intents[-1] is None


@pytest.mark.parametrize("end", ["refused", "pending"])
def test_the_next_boot_does_not_follow_what_is_not_done(end: str) -> None:
    told = Story("0-1")
    request = with_next_boot(unplug(1, timeout=5.0))
    told.ask(request)
    told.accept(1)
    if end == "refused":
        assert told.refuses(1) == ["save outcome"]
    else:
        told.wait(5)
        assert told.look("0-1") == ["save outcome"]
    assert not told.configs
    assert told.engine.recorded.intent is None


def test_a_next_boot_that_cannot_be_so_denies_the_whole() -> None:
    told = Story("0")
    request = with_next_boot(plug(1), NextBoot("there is no document"))
    assert told.ask(request) == []
    assert isinstance(told.error(request), ConfigDeniedError)
    assert told.ask(plug(1)) == ["save intent", "add 1"]


def test_a_next_boot_that_cannot_be_written_is_an_error_and_undoes_nothing() -> None:
    told = Story("0", on_failure=OnFailure.REVERT)
    single, a_map = with_next_boot(plug(1)), with_next_boot(whole_map("0-2", on_failure=OnFailure.REVERT))
    why = RecordError("/next.xml", "no space", outcome=Outcome.CHANGED)
    for request, word in ((single, "save intent"), (a_map, "save intent")):
        assert told.ask(request)[0] == word
        told.accept(*sorted(told.sent))
        effect = told.configs.popleft()
        assert told.tell(ConfigWritten(effect.number, NextBoot.report(ConfigOutcome.FAILED), why)) == ["save outcome"]
    assert told.error(single) is why
    error = told.error(a_map)
    assert isinstance(error, TransitionError)
    assert error.__cause__ is why
    assert error.report.affect is Affect.BOTH
    assert told.state.layout.enabled == VcpuMap.parse("0-2")


def test_the_places_of_the_next_boot_are_promised_with_its_vcpus() -> None:
    placement = Placement.pinned({1: "8-11"})
    for change in (plug(1), whole_map("0-1")):
        told = Story("0")
        told.ask(with_next_boot(change, NextBoot(placement=placement)))
        intent = told.engine.recorded.intent
        assert intent is not None
        assert intent.next_placement == placement


def test_a_next_boot_that_was_not_tried_is_told_as_that() -> None:
    told = Story("0-1")
    a_map = with_next_boot(whole_map("0"))
    told.ask(a_map)
    told.accept(1)
    assert told.refuses(1) == ["save outcome"]
    assert told.report.config == NextBoot.report(ConfigOutcome.NOT_TRIED)
    assert told.outcome == "PARTIAL"


def test_a_next_boot_of_a_map_that_is_lost_was_not_tried() -> None:
    told = Story("0")
    a_map = with_next_boot(whole_map("0-1"))
    told.ask(a_map)
    told.lose()
    assert told.report.config == NextBoot.report(ConfigOutcome.NOT_TRIED)
    intent = told.engine.intentions.interrupted
    assert intent is not None
    assert (intent.next_boot, intent.config) == (VcpuMap.parse("0-1"), "/next.xml")
