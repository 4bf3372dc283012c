"""One transition, step by step: every policy, and every way in which a step ends."""

import pytest

from qmpvcpu import OnFailure, Refused, Rejected, Unknown, VcpuMap
from qmpvcpu.engine.transition import Phase
from qmpvcpu.model.transition import Action, Direction, Intent, Step
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.recovery import finish_target, revert_target
from tests.engine.story import Story, make_state, path, story

STOP, CONTINUE, REVERT = OnFailure
WISH = "0,2-5"  # from 0-1,6: three plugs and two unplugs


def plugged(on_failure: OnFailure) -> Story:
    """Return a story in which the plugs are done, and the unplugs requested: under STOP only the first."""
    told = story(on_failure=on_failure)
    assert told.begun == ["save intent", "add 2", "add 3", "add 4", "add 5"]
    assert told.accept(2, 3, 4) == []
    unplugs = [6] if on_failure is STOP else [6, 1]
    assert told.accept(5) == [f"del {vcpu}" for vcpu in unplugs]
    assert told.accept(*unplugs) == []
    return told


# The happy path.


@pytest.mark.parametrize("policy", OnFailure)
def test_plugs_go_first_then_unplugs_and_both_saves_are_made(policy: OnFailure) -> None:
    told = plugged(policy)
    assert told.works(6) == []
    if policy is STOP:
        assert told.ejects(6) == ["del 1"]
        assert told.accept(1) == []
    else:
        assert told.ejects(6) == []
    assert told.ejects(1) == ["save outcome"]
    assert told.subject.ended
    assert told.outcome == "REACHED"
    assert told.verdicts == {2: "PLUGGED", 3: "PLUGGED", 4: "PLUGGED", 5: "PLUGGED", 6: "UNPLUGGED", 1: "UNPLUGGED"}
    assert told.report.layout.enabled == VcpuMap.parse(WISH)
    assert [intent and intent.direction for intent in told.intents] == [Direction.FORWARD, None]
    assert told.subject.wanted == VcpuMap.parse(WISH)
    assert told.subject.advance(99.0) == []
    assert told.engine.intentions.desired == VcpuMap.parse(WISH)


def test_the_intent_says_all_that_is_needed_to_go_on() -> None:
    told = story(on_failure=REVERT, timeout=7.0)
    (intent,) = told.intents
    assert intent is not None
    assert intent == Intent(VcpuMap.parse("0-1,6"), VcpuMap.parse(WISH), intent.steps, REVERT, 7.0, Direction.FORWARD)
    assert [str(step) for step in intent.steps] == ["plug 2", "plug 3", "plug 4", "plug 5", "unplug 6", "unplug 1"]


def test_a_wish_that_is_met_is_two_saves_and_no_command() -> None:
    told = story(start="0-1", wish="0-1")
    assert told.begun == ["save intent", "save outcome"]
    assert told.outcome == "REACHED"


def test_nothing_is_done_while_a_save_is_under_way() -> None:
    told = Story("0-1", "0,2", on_failure=REVERT, saves_wait=True)
    assert told.begun == ["save intent"]
    assert told.wait(1) == []
    assert told.phase is Phase.START
    assert told.saved() == ["add 2"]
    assert told.accept(2) == ["del 1"]
    told.accept(1)
    assert told.refuses(1) == ["save reverting"]
    assert told.phase.name == "TURN"
    assert told.wait(1) == []
    assert told.saved() == ["del 2"]
    told.accept(2)
    assert told.ejects(2) == ["save outcome"]
    assert not told.subject.ended
    assert told.saved() == []
    assert told.subject.ended


# A refusal, and what each policy makes of it.


def test_stop_leaves_what_is_done_and_asks_for_nothing_more() -> None:
    told = plugged(STOP)
    assert told.refuses(6) == ["save outcome"]
    assert told.outcome == "PARTIAL"
    assert told.verdicts[6] == "REFUSED"
    assert told.verdicts[1] == "not sent"
    assert told.report.layout.enabled == VcpuMap.parse("0-6")
    assert told.step(6).reason == "the guest refused: device is busy (OST status 0x82)"


def test_stop_sends_nothing_after_a_refusal_and_says_what_was_not_sent() -> None:
    told = story(start="0-4", wish="0")
    assert told.begun == ["save intent", "del 4"]
    told.accept(4)
    assert told.ejects(4) == ["del 3"]
    told.accept(3)
    assert told.refuses(3) == ["save outcome"]
    assert told.verdicts == {4: "UNPLUGGED", 3: "REFUSED", 2: "not sent", 1: "not sent"}
    assert told.step(1).reason == "not sent: an earlier step failed"
    assert told.step(1).seconds == 0


def test_continue_does_the_others_all_the_same() -> None:
    told = story(on_failure=CONTINUE, start="0-4", wish="0", in_flight=2)
    assert told.begun == ["save intent", "del 4", "del 3"]
    assert told.accept(4) == ["del 2"]  # only replies are bounded
    assert told.refuses(4) == []
    assert told.accept(3, 2) == ["del 1"]
    told.accept(1)
    assert told.ejects(3, 2, 1) == ["save outcome"]
    assert told.outcome == "PARTIAL"
    assert told.verdicts == {4: "REFUSED", 3: "UNPLUGGED", 2: "UNPLUGGED", 1: "UNPLUGGED"}


def test_revert_undoes_in_reverse_order_plugs_first() -> None:
    told = plugged(REVERT)
    assert told.ejects(1) == []
    assert told.refuses(6) == ["save reverting", "add 1"]
    assert told.subject.wanted == VcpuMap.parse("0-1,6")
    assert told.accept(1) == ["del 5", "del 4", "del 3", "del 2"]
    told.accept(5, 4, 3, 2)
    assert told.ejects(5, 4, 3, 2) == ["save outcome"]
    assert told.outcome == "REVERTED"
    assert told.verdicts == {
        2: "PLUGGED, undone",
        3: "PLUGGED, undone",
        4: "PLUGGED, undone",
        5: "PLUGGED, undone",
        6: "REFUSED",
        1: "UNPLUGGED, undone",
    }
    assert told.report.layout.enabled == VcpuMap.parse("0-1,6")


def test_revert_with_nothing_done_needs_no_second_save() -> None:
    told = story(on_failure=REVERT, start="0-1", wish="0")
    told.accept(1)
    assert told.refuses(1) == ["save outcome"]
    assert told.outcome == "REVERTED"
    assert told.subject.wanted == VcpuMap.parse("0-1")


def test_an_undoing_that_is_refused_is_reported_and_not_tried_again() -> None:
    told = plugged(REVERT)
    told.refuses(6)
    told.ejects(1)
    told.accept(1)
    told.accept(5, 4, 3, 2)
    told.ejects(5, 4, 3)
    assert told.refuses(2) == ["save outcome"]
    assert told.outcome == "REVERT_INCOMPLETE"
    assert told.verdicts[2] == "PLUGGED, not undone"
    assert told.step(2).reason == "undoing it: the guest refused: device is busy (OST status 0x82)"
    assert isinstance(told.step(2).undo, Refused)


def test_a_pending_unplug_is_never_plugged_again() -> None:
    told = plugged(REVERT)
    told.refuses(6)
    assert told.works(1) == []
    assert told.wait(30) == ["look"]
    assert told.look("0-6") == ["save reverting", "del 5", "del 4", "del 3", "del 2"]
    told.accept(5, 4, 3, 2)
    assert told.ejects(5, 4, 3, 2) == ["save outcome"]
    assert told.outcome == "REVERT_INCOMPLETE"
    assert told.pending(1).acknowledged
    assert told.verdicts[1] == "PENDING, not undone"
    assert told.step(1).reason == "the guest works on it, and has not answered in time"


def test_a_vcpu_that_leaves_late_while_turning_back_is_plugged_again() -> None:
    told = plugged(REVERT)
    told.refuses(6)
    told.works(1)
    told.wait(30)
    told.look("0-6")
    assert told.ejects(1) == ["add 1"]
    told.accept(5, 4, 3, 2)
    told.accept(1)
    told.ejects(5, 4, 3, 2)
    assert told.verdicts[1] == "UNPLUGGED, undone"
    assert told.outcome == "REVERTED"


def test_what_is_still_pending_when_there_is_nothing_to_undo_is_told_as_that() -> None:
    told = story(on_failure=REVERT, start="0-2", wish="0", timeout=5.0, saves_wait=True)
    told.saved()
    told.accept(2, 1)
    told.works(1)
    told.refuses(2)
    assert told.wait(5) == ["look"]
    told.look("0-2")
    assert told.verdicts == {2: "REFUSED", 1: "PENDING, not undone"}
    assert told.outcome == "REVERT_INCOMPLETE"


def test_a_vcpu_that_leaves_while_the_turning_back_is_recorded_is_plugged_again() -> None:
    told = story(on_failure=REVERT, start="0-2", wish="0,3", timeout=5.0, saves_wait=True)
    told.saved()
    told.accept(3)
    told.accept(2, 1)
    told.works(1)
    told.refuses(2)
    assert told.wait(5) == ["look"]
    assert told.look("0-3") == ["save reverting"]
    assert told.ejects(1) == []
    assert told.saved() == ["add 1"]
    assert told.accept(1) == ["del 3"]
    told.accept(3)
    assert told.ejects(3) == ["save outcome"]
    assert told.saved() == []
    assert told.verdicts == {3: "PLUGGED, undone", 2: "REFUSED", 1: "UNPLUGGED, undone"}
    assert told.outcome == "REVERTED"


def test_a_vcpu_that_leaves_during_the_last_look_is_plugged_again_and_looked_at() -> None:
    told = story(on_failure=REVERT, start="0-2", wish="0", timeout=5.0, last_looks_wait=True)
    told.accept(2, 1)
    told.works(1)
    told.refuses(2)
    told.wait(5)
    assert told.look("0-2") == ["last look"]
    assert told.ejects(1) == ["save reverting", "add 1"]
    assert told.see() == []  # it was sent before
    assert told.accept(1) == ["last look"]
    assert told.see() == ["save outcome"]
    assert told.verdicts == {2: "REFUSED", 1: "UNPLUGGED, undone"}
    assert told.outcome == "REVERTED"


def test_a_vcpu_that_leaves_while_the_outcome_is_recorded_is_told_as_gone() -> None:
    told = story(on_failure=REVERT, start="0-2", wish="0", timeout=5.0, saves_wait=True)
    told.saved()
    told.accept(2, 1)
    told.works(1)
    told.refuses(2)
    told.wait(5)
    assert told.look("0-2") == ["save outcome"]
    told.ejects(1)
    assert told.saved() == []
    assert told.verdicts == {2: "REFUSED", 1: "UNPLUGGED, not undone"}
    assert told.report.layout.enabled == {0, 2}
    assert told.outcome == "REVERT_INCOMPLETE"


def test_an_answer_after_its_deadline_and_before_the_end_is_the_verdict() -> None:
    told = story(start="0-2", wish="0", on_failure=CONTINUE, timeout=5.0, last_looks_wait=True)
    told.accept(2, 1)
    told.works(1)
    assert told.wait(5) == ["look"]
    assert told.fail_to_look() == ["last look"]
    assert told.verdicts == {2: "PENDING", 1: "PENDING"}
    assert told.ejects(2, 1) == []
    assert told.see() == ["last look"]  # they have left since it was sent
    assert told.see() == ["save outcome"]
    assert told.verdicts == {2: "UNPLUGGED", 1: "UNPLUGGED"}
    assert told.outcome == "REACHED"


def test_nothing_is_called_reached_that_was_not_looked_at_in_the_end() -> None:
    told = story(start="0", wish="0-1", last_looks_wait=True)
    assert told.accept(1) == ["last look"]
    assert told.see(failed="QEMU said error") == ["save outcome"]
    assert told.outcome == "PARTIAL"
    assert told.report.unconfirmed == "QEMU said error"
    assert "the VM could not be read at the end: QEMU said error" in str(told.report)


def test_what_others_plug_meanwhile_is_found_by_the_last_look_and_named() -> None:
    told = story(start="0-2", wish="0-1", last_looks_wait=True)
    told.accept(2)
    assert told.ejects(2) == ["last look"]
    told.read("0-1,3", others=[3])
    assert told.see() == ["last look"]  # something has changed since this one was sent
    assert told.see() == ["save outcome"]
    assert told.outcome == "PARTIAL"
    assert told.report.changed_by_other == {3}
    assert "plugged outside this transition: 3" in str(told.report)


def test_reverting_has_a_timeout_of_its_own() -> None:
    told = story(on_failure=REVERT, start="0-1", wish="0,2", timeout=30.0, revert_timeout=3.0)
    told.accept(2)
    told.accept(1)
    assert told.refuses(1) == ["save reverting", "del 2"]
    told.accept(2)
    assert told.deadline == told.now + 3.0
    assert told.wait(3) == ["look"]
    assert told.look("0-2") == ["save outcome"]
    assert told.step(2).reason.endswith("the guest has not reacted in time; QEMU never forgets the request")
    assert told.outcome == "REVERT_INCOMPLETE"


@pytest.mark.parametrize("policy", OnFailure)
def test_a_rejection_is_told_with_its_text(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-1", wish="0,2-3", in_flight=1)
    assert told.begun == ["save intent", "add 2"]
    sent = told.reject(2)
    if policy is CONTINUE:
        assert sent == ["add 3"]
        assert told.accept(3) == ["del 1"]
        told.accept(1)
        assert told.ejects(1) == ["save outcome"]
    else:
        assert sent == ["save outcome"]
    assert told.outcome == ("REVERTED" if policy is REVERT else "PARTIAL")
    assert isinstance(told.verdict(2), Rejected)
    assert told.step(2).reason == "GenericError: no (the slot is empty)"


@pytest.mark.parametrize("policy", OnFailure)
def test_a_rejected_unplug_fails_too(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-1", wish="0")
    assert told.reject(1) == ["save outcome"]
    assert told.verdicts == {1: "REJECTED"}
    assert told.outcome == ("REVERTED" if policy is REVERT else "PARTIAL")


@pytest.mark.parametrize("policy", OnFailure)
def test_a_command_without_a_reply_is_unknown_and_stays_recorded(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-1", wish="0-2", reply_timeout=2.0)
    assert told.deadline == told.now + 2.0
    assert told.wait(2) == ["save the rest"]
    assert told.verdicts == {2: "UNKNOWN" + (", not undone" if policy is REVERT else "")}
    assert told.step(2).reason.startswith("QEMU did not reply to device_add within 2 s")
    assert told.outcome == ("REVERT_INCOMPLETE" if policy is REVERT else "PARTIAL")
    assert told.accept(2) == []  # late: the state has it, the report stays
    assert isinstance(told.verdict(2), Unknown)
    assert told.state.layout.enabled == VcpuMap.parse("0-2")


def test_an_undoing_without_a_reply_is_unknown_too() -> None:
    told = story(on_failure=REVERT, start="0-1", wish="0,2", reply_timeout=2.0)
    told.accept(2)
    told.accept(1)
    assert told.refuses(1) == ["save reverting", "del 2"]
    assert told.wait(2) == ["save the rest"]
    assert told.intents[-1] is not None
    assert told.intents[-1].direction is Direction.REVERTING
    assert told.outcome == "REVERT_INCOMPLETE"


@pytest.mark.parametrize("policy", OnFailure)
def test_what_became_forbidden_meanwhile_is_denied_in_the_middle(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-1", wish="0,2-3", in_flight=1)
    told.state.status = VmStatus("running", "active")
    sent = told.accept(2)
    assert told.verdicts[3].startswith("DENIED")
    if policy is REVERT:
        assert sent == ["save reverting", "save outcome"]  # and so is the undoing
        assert told.verdicts[2] == "PLUGGED, not undone"
        assert "undoing it: the VM is migrating" in told.step(2).reason
    else:
        assert sent == ["save outcome"]
    assert "migrating" in told.step(3).reason
    assert told.verdicts[1] == ("DENIED" if policy is CONTINUE else "not sent")


# Recovery.


def test_a_recovery_records_the_intent_that_it_recovers() -> None:
    old = Intent(
        VcpuMap.parse("0-1"),
        VcpuMap.parse("0,2"),
        (Step(Action.PLUG, VcpuMap([2])),),
        REVERT,
        9.0,
        Direction.REVERTING,
    )
    told = Story("0,2", "0-1", intent=old, on_failure=CONTINUE)
    assert told.begun == ["save reverting", "add 1"]
    assert told.intents[0] is not None
    # What is sent is covered, whether or not the old one knew of it.
    assert [str(step) for step in told.intents[0].steps] == [
        "plug 2",
        "plug 1",
    ]
    assert told.subject.wanted == old.start
    told.accept(1)
    told.accept(2)
    assert told.ejects(2) == ["save outcome"]
    assert told.outcome == "REVERTED"


def test_a_recovery_that_does_not_get_there_says_so() -> None:
    old = Intent(
        VcpuMap.parse("0"), VcpuMap.parse("0,2"), (Step(Action.PLUG, VcpuMap([2])),), direction=Direction.REVERTING
    )
    told = Story("0,2", "0", intent=old, on_failure=CONTINUE)
    told.accept(2)
    assert told.refuses(2) == ["save outcome"]
    assert told.outcome == "REVERT_INCOMPLETE"


def test_finishing_what_was_cut_short_may_turn_back_and_undoes_what_was_done_before_the_cut() -> None:
    engine = make_state("0-1,3,6", answers={6: OstAnswer(3, 0x84)})
    steps = (
        Step(Action.PLUG, VcpuMap([2])),  # done, and somebody else took it out again
        Step(Action.PLUG, VcpuMap([3])),  # done
        Step(Action.PLUG, VcpuMap([4])),  # not done
        Step(Action.UNPLUG, VcpuMap([7]), path(7)),  # done
        Step(Action.UNPLUG, VcpuMap([6]), path(6), joins=True),
        Step(Action.UNPLUG, VcpuMap([5]), path(5), joins=True),  # joined, and gone
        Step(Action.UNPLUG, VcpuMap([1]), path(1)),  # not done
        Step(Action.UNPLUG, VcpuMap([0]), path(0)),  # neither planned nor done
        Step(Action.PLUG, VcpuMap([9])),  # of a VM that was larger
    )
    old = Intent(VcpuMap.parse("0-1,5-7"), VcpuMap.parse("0,2-4"), steps, REVERT)
    told = Story(engine, "0,2-4", intent=old, on_failure=REVERT)
    assert told.begun == ["save intent", "add 2", "add 4"]
    assert told.accept(2, 4) == ["del 1"]
    told.accept(1)
    told.ejects(6)
    assert told.refuses(1) == ["save reverting", "add 7"]
    assert told.accept(7) == ["del 4", "del 2", "del 3"]
    told.accept(4, 2, 3)
    assert told.ejects(4, 2, 3) == ["save outcome"]
    assert told.report.start == VcpuMap.parse("0-1,5-7")
    assert told.verdicts == {
        3: "PLUGGED, undone",
        7: "UNPLUGGED, undone",
        2: "PLUGGED, undone",
        4: "PLUGGED, undone",
        6: "UNPLUGGED, not undone",
        1: "REFUSED",
    }


def test_what_was_to_stay_and_left_before_the_cut_is_plugged_again_and_that_is_not_undone() -> None:
    steps = (Step(Action.KEEP, VcpuMap([2]), path(2)), Step(Action.UNPLUG, VcpuMap([1]), path(1)))
    old = Intent(VcpuMap.parse("0-2"), VcpuMap.parse("0,2"), steps, REVERT)
    told = Story("0-1", "0,2", intent=old, on_failure=REVERT)
    assert told.begun == ["save intent", "add 2"]
    assert told.accept(2) == ["del 1"]
    told.accept(1)
    assert told.refuses(1) == ["save outcome"]
    assert told.verdicts == {2: "PLUGGED", 1: "REFUSED"}
    assert told.report.layout.enabled == old.start
    assert told.outcome == "REVERTED"


def test_what_was_to_stay_and_left_is_plugged_again_once_though_its_leaving_is_told_twice() -> None:
    engine = make_state("0-2", answers={2: OstAnswer(3, 0x84)})
    told = Story(engine, "0-2", saves_wait=True)
    (removal,) = engine.removals.values()
    assert told.begun == ["save intent"]
    assert told.ejects(2) == []
    told.subject.answered(removal, told.now)
    assert told.saved() == ["add 2"]
    assert told.accept(2) == ["save outcome"]
    assert told.saved() == []
    assert told.outcome == "REACHED"


def test_finishing_a_removal_that_had_been_sent_undoes_it_although_it_is_joined_now() -> None:
    engine = make_state("0-2", answers={1: OstAnswer(3, 0x84)})
    steps = (Step(Action.UNPLUG, VcpuMap([2]), path(2)), Step(Action.UNPLUG, VcpuMap([1]), path(1)))
    old = Intent(VcpuMap.parse("0-2"), VcpuMap.parse("0"), steps, REVERT)
    told = Story(engine, "0", intent=old, on_failure=REVERT)
    assert told.begun == ["save intent", "del 2"]
    told.accept(2)
    told.ejects(1)
    assert told.refuses(2) == ["save reverting", "add 1"]
    assert told.accept(1) == ["save outcome"]
    assert told.outcome == "REVERTED"


def test_a_slot_that_was_plugged_and_then_unplugged_under_one_intent_goes_back_to_its_start() -> None:
    plug = Step(Action.PLUG, VcpuMap([2]))
    unplug = Step(Action.UNPLUG, VcpuMap([2]), path(2))
    there, gone = make_state("0,2").layout, make_state("0").layout
    start, target = VcpuMap([0]), VcpuMap([0])
    intent = Intent(start, target, (plug, unplug))
    assert revert_target(intent, there) == revert_target(intent, gone) == start
    assert finish_target(intent, there) == finish_target(intent, gone) == target
