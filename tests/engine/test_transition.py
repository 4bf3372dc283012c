"""One transition, step by step: every policy, every way in which a step ends, and nothing sent out of turn."""

from typing import Any

import pytest

from qmpvcpu import OnFailure, Pending, Plugged, Proof, Refused, Rejected, Unknown, Unplugged, VcpuMap
from qmpvcpu.engine import Evidence, Phase, Terms, Transition
from qmpvcpu.model import Action, Direction, Intent, OstAnswer, Step, VmStatus
from qmpvcpu.planning import finish_wish, plan_map, revert_wish
from tests.engine.story import RUNNING, Story, make_engine, path, read_slots

STOP, CONTINUE, REVERT = OnFailure
WISH = "0,2-5"  # from 0-1,6: three plugs and two unplugs


def story(*, on_failure: OnFailure = STOP, start: str = "0-1,6", wish: str = WISH, **terms: Any) -> Story:
    return Story(start, wish, on_failure=on_failure, **terms)


def plugged(on_failure: OnFailure) -> Story:
    """Return a story in which the three plugs are done, and both unplugs are requested."""
    told = story(on_failure=on_failure)
    assert told.begun == ["save intent", "add 2", "add 3", "add 4", "add 5"]
    assert told.accept(2, 3, 4) == []
    assert told.accept(5) == ["del 6", "del 1"]
    assert told.accept(6, 1) == []
    return told


# The happy path.


@pytest.mark.parametrize("policy", OnFailure)
def test_plugs_go_first_then_unplugs_and_both_saves_are_made(policy: OnFailure) -> None:
    told = plugged(policy)
    assert told.works(6) == []
    assert told.ejects(6) == []
    assert told.ejects(1) == ["save outcome"]
    assert told.subject.ended
    assert told.outcome == "REACHED"
    assert told.verdicts == {2: "PLUGGED", 3: "PLUGGED", 4: "PLUGGED", 5: "PLUGGED", 6: "UNPLUGGED", 1: "UNPLUGGED"}
    assert told.report.layout.enabled == VcpuMap.parse(WISH)
    assert [intent and intent.direction for intent in told.intents] == [Direction.FORWARD, None]
    assert told.subject.wanted == VcpuMap.parse(WISH)
    assert told.subject.advance(99.0) == []


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
    assert told.phase is Phase.BEGIN
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


def test_stop_leaves_what_is_done_and_awaits_what_is_out() -> None:
    told = plugged(STOP)
    assert told.refuses(6) == []
    assert told.ejects(1) == ["save outcome"]
    assert told.outcome == "PARTIAL"
    assert told.verdicts[6] == "REFUSED"
    assert told.verdicts[1] == "UNPLUGGED"
    assert told.step(6).reason == "the guest refused: device is busy (OST status 0x82)"


def test_stop_sends_nothing_after_a_refusal_and_says_what_was_not_sent() -> None:
    told = story(start="0-4", wish="0", in_flight=2)
    assert told.begun == ["save intent", "del 4", "del 3"]
    told.accept(4, 3)
    assert told.refuses(4) == []
    assert told.ejects(3) == ["save outcome"]
    assert told.verdicts == {4: "REFUSED", 3: "UNPLUGGED", 2: "not sent", 1: "not sent"}
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


def test_a_vcpu_that_leaves_late_while_turning_back_is_not_undone() -> None:
    told = plugged(REVERT)
    told.refuses(6)
    told.wait(30)
    told.look("0-6")
    told.ejects(1)
    told.accept(5, 4, 3, 2)
    told.ejects(5, 4, 3, 2)
    assert told.verdicts[1] == "PENDING, not undone"
    assert told.outcome == "REVERT_INCOMPLETE"


def test_reverting_has_a_timeout_of_its_own() -> None:
    told = story(on_failure=REVERT, start="0-1", wish="0,2", timeout=30.0, revert_timeout=3.0)
    told.accept(2)
    told.accept(1)
    assert told.refuses(1) == ["save reverting", "del 2"]
    told.accept(2)
    assert told.subject.deadline == told.now + 3.0
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
    assert told.step(2).reason == "GenericError: no (why)"


@pytest.mark.parametrize("policy", OnFailure)
def test_a_rejected_unplug_fails_too(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-1", wish="0")
    assert told.reject(1) == ["save outcome"]
    assert told.verdicts == {1: "REJECTED"}
    assert told.outcome == ("REVERTED" if policy is REVERT else "PARTIAL")


@pytest.mark.parametrize("policy", OnFailure)
def test_a_command_without_a_reply_is_unknown_and_stays_recorded(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-1", wish="0-2", reply_timeout=2.0)
    assert told.subject.deadline == told.now + 2.0
    assert told.wait(2) == ["save the rest"]
    assert told.verdicts == {2: "UNKNOWN" + (", not undone" if policy is REVERT else "")}
    assert told.step(2).reason.startswith("QEMU did not reply within 2 s")
    assert told.outcome == ("REVERT_INCOMPLETE" if policy is REVERT else "PARTIAL")
    assert told.accept(2) == []  # late: the engine has it, the report stays
    assert isinstance(told.verdict(2), Unknown)
    assert told.report.layout.enabled == VcpuMap.parse("0-2")


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
    told.engine.status = VmStatus("running", "active")
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


# Windows.


def test_at_most_in_flight_commands_have_no_reply() -> None:
    told = story(start="0", wish="0-6", in_flight=4)
    assert told.begun == ["save intent", "add 1", "add 2", "add 3", "add 4"]
    assert told.accept(2) == ["add 5"]
    assert told.accept(1, 3) == ["add 6"]


def test_one_in_flight_under_stop_is_strictly_one_by_one() -> None:
    told = story(start="0-3", wish="0", in_flight=1)
    assert told.begun == ["save intent", "del 3"]
    assert told.accept(3) == []
    assert told.ejects(3) == ["del 2"]
    assert told.accept(2) == []
    assert told.ejects(2) == ["del 1"]


@pytest.mark.parametrize("policy", [CONTINUE, REVERT])
def test_the_other_policies_request_all_at_once(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-3", wish="0")
    assert told.begun == ["save intent", "del 3", "del 2", "del 1"]


def test_an_unplug_waits_for_every_plug() -> None:
    told = story(start="0-1", wish="0,2-3")
    assert told.accept(3) == []
    assert told.accept(2) == ["del 1"]


# Time.


def test_the_timeout_counts_from_each_reply() -> None:
    told = story(on_failure=CONTINUE, start="0-2", wish="0", timeout=5.0)
    told.accept(2)
    told.wait(3)
    told.accept(1)
    assert told.subject.deadline == 6.0
    assert told.wait(2) == ["look"]
    assert told.look("0-2") == []
    assert told.verdicts == {2: "PENDING", 1: "not sent"}
    assert told.pending(2) == Pending(VcpuMap([2]), acknowledged=False, seconds=5.0)
    assert told.subject.deadline == 9.0
    assert told.ejects(1) == ["save outcome"]
    assert told.verdicts == {2: "PENDING", 1: "UNPLUGGED"}


def test_the_last_look_may_find_it_gone() -> None:
    told = story(start="0-2", wish="0", timeout=5.0)
    told.accept(2, 1)
    assert told.wait(5) == ["look"]
    assert told.wait(1) == []
    assert told.look("0") == ["save outcome"]
    assert told.verdicts == {2: "UNPLUGGED", 1: "UNPLUGGED"}
    assert told.verdict(2) == Unplugged(VcpuMap([2]), seconds=6.0)


@pytest.mark.parametrize("policy", OnFailure)
def test_no_timeout_only_requests_and_is_no_failure(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-3", wish="0", timeout=0.0)
    assert told.begun == ["save intent", "del 3", "del 2", "del 1"]
    assert told.accept(3) == []
    assert told.accept(2, 1) == ["save outcome"]
    assert told.verdicts == {3: "PENDING", 2: "PENDING", 1: "PENDING"}
    assert told.outcome == "PARTIAL"
    assert told.report.layout.pending == VcpuMap.parse("1-3")


@pytest.mark.parametrize("policy", OnFailure)
def test_the_time_for_the_whole_stops_the_waiting(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-2", wish="0,3", total_timeout=8.0, timeout=30.0, in_flight=1)
    told.accept(3)
    told.accept(2)
    assert told.subject.deadline == 9.0
    sent = told.wait(8)
    if policy is REVERT:
        assert sent == []  # the reply to what is out is awaited
        sent = told.accept(1)
        assert sent == ["save reverting", "del 3"]
        assert told.subject.deadline == told.now + 10.0
        told.accept(3)
        assert told.ejects(3) == ["save outcome"]
        assert told.outcome == "REVERT_INCOMPLETE"
    elif policy is CONTINUE:
        assert sent == []
        assert told.accept(1) == ["save outcome"]
        assert told.verdicts == {3: "PLUGGED", 2: "PENDING", 1: "PENDING"}
    else:
        assert sent == ["save outcome"]
        assert told.verdicts == {3: "PLUGGED", 2: "PENDING", 1: "not sent"}
        assert told.step(1).reason == "not sent: the time for the whole was over"


# Keeping what is about to leave.


def keeping(answer: dict[int, OstAnswer] | None = None, **terms: Any) -> Story:
    """Return a story that wishes for vCPU 1, on whose removal the guest works."""
    engine = make_engine("0-1", answers=answer or {1: OstAnswer(3, 0x84)})
    return Story(engine, "0-1", **terms)


@pytest.mark.parametrize("policy", OnFailure)
def test_a_guest_that_refuses_lets_it_stay_and_that_is_what_was_wished(policy: OnFailure) -> None:
    told = keeping(on_failure=policy)
    assert told.begun == ["save intent"]
    assert told.refuses(1) == ["save outcome"]
    assert told.verdicts == {1: "REFUSED"}
    assert told.step(1).reason == ""
    assert told.outcome == "REACHED"


@pytest.mark.parametrize("policy", OnFailure)
def test_what_was_to_stay_and_left_is_plugged_again(policy: OnFailure) -> None:
    told = keeping(on_failure=policy)
    assert told.ejects(1) == ["add 1"]
    assert told.accept(1) == ["save outcome"]
    assert told.verdicts == {1: "PLUGGED"}
    assert told.outcome == "REACHED"


@pytest.mark.parametrize("policy", OnFailure)
def test_no_answer_leaves_it_open_whether_it_stays(policy: OnFailure) -> None:
    told = keeping(on_failure=policy, timeout=5.0)
    assert told.wait(5) == ["look"]
    assert told.look("0-1") == ["save outcome"]
    assert told.verdicts == {1: "PENDING"}
    assert told.outcome == ("REVERTED" if policy is REVERT else "PARTIAL")


def test_what_left_after_the_halt_is_not_plugged_again() -> None:
    engine = make_engine("0-2", answers={1: OstAnswer(3, 0x84)})
    told = Story(engine, "0-1", timeout=5.0)
    assert told.begun == ["save intent", "del 2"]
    told.accept(2)
    assert told.refuses(2) == []
    assert told.ejects(1) == ["save outcome"]
    assert told.verdicts == {1: "UNPLUGGED", 2: "REFUSED"}
    assert told.step(1).reason == "it left"


def test_a_removal_that_ended_before_it_was_asked_about_is_no_longer_pending() -> None:
    engine = make_engine("0-1", answers={1: OstAnswer(3, 0x84)})
    told = Story(engine, "0-2", in_flight=1)
    assert told.begun == ["save intent", "add 2"]
    told.refuses(1)
    assert told.accept(2) == ["save outcome"]
    assert told.verdicts == {2: "PLUGGED", 1: "REFUSED"}


def test_a_removal_that_ended_between_plan_and_start_is_no_longer_pending() -> None:
    engine = make_engine("0-1", answers={1: OstAnswer(3, 0x84)})
    plan = plan_map(engine.situation, VcpuMap.parse("0-1"))
    engine.removals.clear()
    subject = Transition(plan, engine, Terms(), 1.0)
    subject.advance(1.0)
    subject.saved()
    subject.advance(1.0)
    (step,) = subject.report().steps
    assert step.verdict == Refused(VcpuMap([1]), None, "no longer pending")
    assert step.ok


# Joining.


def test_a_removal_that_is_pending_is_joined_and_nothing_is_sent() -> None:
    engine = make_engine("0-1", answers={1: OstAnswer(3, 0x84)})
    told = Story(engine, "0", on_failure=REVERT)
    assert told.begun == ["save intent"]
    assert told.ejects(1) == ["save outcome"]
    assert told.verdicts == {1: "UNPLUGGED"}


def test_a_removal_that_somebody_began_meanwhile_is_joined() -> None:
    told = story(on_failure=REVERT, start="0-1,3", wish="0,2", in_flight=1)
    told.works(1)
    assert told.accept(2) == ["del 3"]
    told.accept(3)
    told.ejects(1)
    assert told.refuses(3) == ["save reverting", "del 2"]  # and 1, which is not ours, is left alone
    told.accept(2)
    assert told.ejects(2) == ["save outcome"]
    assert told.verdicts == {2: "PLUGGED, undone", 3: "REFUSED", 1: "UNPLUGGED, not undone"}
    assert told.outcome == "REVERT_INCOMPLETE"  # the map is not that of the start, and this is why


def test_a_joined_removal_that_qemu_rejects_late_is_asked_for_again() -> None:
    engine = make_engine("0-1")
    first = Story(engine, "0", reply_timeout=2.0)
    first.wait(2)
    told = Story(engine, "0")
    assert told.begun == ["save intent"]
    late = first.sent.pop(1)
    assert late.removal is not None
    engine.unplug_replied(late.removal, Evidence.REJECTION, 4.0)
    assert told.go() == ["del 1"]
    told.accept(1)
    assert told.ejects(1) == ["save outcome"]
    assert told.outcome == "REACHED"


def test_a_joined_removal_whose_reply_is_lost_is_asked_for_once_the_connection_is_back() -> None:
    engine = make_engine("0-1")
    first = Story(engine, "0", reply_timeout=2.0)
    first.wait(2)
    told = Story(engine, "0", reconnect=True)
    late = first.sent.pop(1)
    assert late.removal is not None
    engine.unplug_replied(late.removal, Evidence.LOST, 4.0)
    assert told.go() == []  # before anybody has said that the connection is gone
    assert told.pause() == []
    assert told.resume("0-1") == ["del 1"]


def test_what_only_the_record_knows_is_asked_for_again() -> None:
    engine = make_engine("0-1")
    engine.recall({1}, {}, 0.0)
    told = Story(engine, "0")
    assert told.begun == ["save intent", "del 1"]
    told.accept(1)
    assert told.ejects(1) == ["save outcome"]


def test_the_answer_to_what_only_the_record_knows_is_awaited_to_keep_it() -> None:
    engine = make_engine("0-1")
    engine.recall({1}, {}, 0.0)
    told = Story(engine, "0-1")
    assert told.begun == ["save intent"]
    assert told.refuses(1) == ["save outcome"]


# Others.


def test_what_others_did_meanwhile_is_neither_done_again_nor_undone() -> None:
    told = story(on_failure=REVERT, start="0-2,4", wish="0,3,5", in_flight=1)
    assert told.begun == ["save intent", "add 3"]
    told.read("0-2,4-5", others=[5])
    assert told.accept(3) == ["del 4"]  # 5 is there, by somebody else
    assert told.accept(4) == ["del 2"]
    told.read("0,2-5", others=[5])  # and 1 is gone
    assert told.accept(2) == []
    told.ejects(2)
    assert told.refuses(4) == ["save reverting", "add 2"]
    told.read("0,4-5", others=[5])  # and 3, which we plugged, is gone too
    assert told.accept(2) == ["save outcome"]
    assert told.verdicts == {3: "PLUGGED", 5: "PLUGGED", 4: "REFUSED", 2: "UNPLUGGED, undone", 1: "UNPLUGGED"}
    assert told.step(5).reason == told.step(1).reason == "changed by other"
    assert told.step(3).reason == "undoing it: changed by other"
    assert told.outcome == "REVERTED"


def test_a_slot_that_somebody_else_has_filled_again_is_left_alone_on_the_way_back() -> None:
    told = story(on_failure=REVERT, start="0-2", wish="0,3")
    told.accept(3)
    told.accept(2, 1)
    told.ejects(2)
    told.read("0-3", others=[2, 3])  # 2 is back and 3 another, both by somebody else
    assert told.refuses(1) == ["save reverting", "save outcome"]
    assert told.verdicts == {3: "PLUGGED", 2: "UNPLUGGED", 1: "REFUSED"}
    assert told.step(3).reason == told.step(2).reason == "undoing it: changed by other"


def test_a_plug_into_a_slot_with_a_doubled_removal_is_proved_by_a_close_look() -> None:
    engine = make_engine("0")
    engine.doubled.add(1)
    told = Story(engine, "0-1")
    assert told.begun == ["save intent", "add 1"]
    assert told.accept(1) == []
    assert told.ost(1, 0, source=1) == ["look closely"]
    assert told.look("0-1") == ["save outcome"]
    assert told.verdict(1) == Plugged(VcpuMap([1]), acknowledged=True, code=0)
    assert engine.doubled == set()


def test_a_plug_that_a_doubled_removal_ejects_again_is_not_there() -> None:
    engine = make_engine("0")
    engine.doubled.add(1)
    told = Story(engine, "0-1")
    told.accept(1)
    told.works(1)
    assert told.ejects(1) == ["save outcome"]
    assert told.verdicts == {1: "UNPLUGGED"}
    assert "ejected by a removal that had been asked for twice" in told.step(1).reason
    assert told.outcome == "PARTIAL"


# Proof.


def test_an_acknowledgement_is_awaited_where_it_is_asked_for() -> None:
    told = story(start="0,3", wish="0-2", proof=Proof.ACKNOWLEDGED, timeout=5.0)
    assert not told.subject.batch.looks_at_layout
    assert told.accept(1, 2) == []
    assert told.subject.batch.looks_at_layout
    assert told.ost(2, 0, source=1) == []
    told.wait(1)
    assert told.ost(1, 1, source=1) == ["del 3"]  # unplugs wait for it too
    told.accept(3)
    assert told.ejects(3) == ["save outcome"]
    assert told.verdict(2) == Plugged(VcpuMap([2]), acknowledged=True, code=0)
    assert told.verdict(1) == Plugged(
        VcpuMap([1]), acknowledged=False, code=1, reason="non-specific failure", seconds=1.0
    )
    assert told.outcome == "REACHED"


@pytest.mark.parametrize("timeout", [0.0, 5.0])
def test_no_acknowledgement_in_time_is_plugged_all_the_same(timeout: float) -> None:
    told = story(start="0", wish="0-1", proof=Proof.ACKNOWLEDGED, timeout=timeout)
    sent = told.accept(1)
    if timeout:
        assert sent == []
        sent = told.wait(timeout)
    assert sent == ["save outcome"]
    assert told.verdict(1) == Plugged(VcpuMap([1]), acknowledged=False, reason="no answer", seconds=timeout)


# Stopping it.


def test_stopping_before_the_first_command_sends_none() -> None:
    told = Story("0-1", "0,2", saves_wait=True)
    assert told.cancel() == []
    assert told.saved() == ["save outcome"]
    assert told.verdicts == {2: "not sent", 1: "not sent"}
    assert told.step(2).reason == "not sent: stopped by its caller"
    assert told.report.cancelled


def test_stopping_awaits_replies_and_no_guest() -> None:
    told = story(start="0-3", wish="0", on_failure=REVERT, in_flight=2)
    told.accept(3)
    assert told.cancel() == []
    assert told.verdicts[3] == "PENDING"
    assert told.accept(2) == []
    assert told.accept(1) == ["save outcome"]
    assert told.verdicts == {3: "PENDING", 2: "PENDING", 1: "PENDING"}
    assert told.outcome == "PARTIAL"  # and not turned back: its caller wants it left alone
    assert told.report.layout.pending == VcpuMap.parse("1-3")


def test_stopping_while_it_turns_back_undoes_nothing_more() -> None:
    told = Story("0-1", "0,2", on_failure=REVERT, saves_wait=True)
    told.saved()
    told.accept(2)
    told.accept(1)
    assert told.refuses(1) == ["save reverting"]
    assert told.cancel() == []
    assert told.saved() == ["save outcome"]
    assert told.verdicts == {2: "PLUGGED, not undone", 1: "REFUSED"}
    assert told.step(2).reason == "undoing it: not sent: stopped by its caller"
    assert told.outcome == "REVERT_INCOMPLETE"


def test_stopping_on_the_way_back_awaits_replies_only() -> None:
    told = story(on_failure=REVERT, start="0-1", wish="0,2-3", in_flight=1)
    told.accept(2)
    told.accept(3)
    told.accept(1)
    assert told.refuses(1) == ["save reverting", "del 3"]
    assert told.cancel() == []
    assert told.accept(3) == ["save outcome"]
    assert told.verdicts[3] == "PLUGGED, not undone"
    assert isinstance(told.step(3).undo, Pending)
    assert told.step(2).reason == "undoing it: not sent: stopped by its caller"


def test_stopping_what_is_being_finished_changes_nothing() -> None:
    told = Story("0", "0", saves_wait=True)
    assert told.saved() == ["save outcome"]
    assert told.cancel() == []
    assert told.saved() == []
    assert told.outcome == "REACHED"


# The connection.


@pytest.mark.parametrize("policy", OnFailure)
def test_a_loss_for_good_ends_it_where_it_stands(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-2,7", wish="0,3-4", in_flight=2)
    told.accept(3, 4)
    told.accept(7)
    assert told.lose("QEMU is gone") == []
    assert told.subject.ended
    waiting = "not sent" if policy is STOP else "UNKNOWN"
    assert told.verdicts == {3: "PLUGGED", 4: "PLUGGED", 7: "PENDING", 2: "UNKNOWN", 1: waiting}
    assert told.step(2).reason == "QEMU is gone"
    assert told.intents[-1] is not None  # nobody has written an outcome
    assert told.outcome == "PARTIAL"


@pytest.mark.parametrize("phase", [Phase.BEGIN, Phase.FINISH, Phase.TURN])
def test_a_loss_during_a_save_ends_it_too(phase: Phase) -> None:
    told = Story("0-1", "0,2", on_failure=REVERT, saves_wait=True)
    if phase is not Phase.BEGIN:
        told.saved()
        told.accept(2)
        told.accept(1)
        if phase is Phase.TURN:
            told.refuses(1)
        else:
            told.ejects(1)
    assert told.phase is phase
    assert told.lose() == []
    assert told.saved() == []
    assert told.subject.ended
    assert told.outcome == {"BEGIN": "PARTIAL", "FINISH": "REACHED", "TURN": "REVERT_INCOMPLETE"}[phase.name]


def test_a_command_that_a_loss_overtakes_is_unknown_and_nothing_follows_it() -> None:
    told = story(on_failure=CONTINUE, start="0", wish="0-2", in_flight=1)
    told.subject.batch.unanswered(told.sent[1], "lost", told.now)
    assert told.go() == []
    assert told.lose("lost for good") == []
    assert told.verdicts == {1: "UNKNOWN", 2: "not sent"}
    told.subject.batch.unanswered(told.sent[1], "again", told.now)
    assert told.step(1).reason == "lost"


def test_what_the_next_look_shows_is_the_reply_to_what_was_in_flight() -> None:
    told = story(start="0,4-5", wish="0-3", in_flight=2, reconnect=True)
    told.pause()
    assert told.wait(1) == []
    assert told.resume("0-1,4-5") == ["add 2", "add 3"]  # 1 was carried out, 2 was not
    told.accept(2)
    assert told.accept(3) == ["del 5", "del 4"]
    told.pause()
    assert told.resume("0-3,5") == ["del 5"]  # 4 is gone; of 5 nothing shows: it is asked for (again)
    told.accept(5)
    assert told.ejects(5) == ["save outcome"]
    assert told.outcome == "REACHED"


def test_what_the_guest_is_found_to_work_on_is_not_asked_for_twice() -> None:
    told = story(start="0,4", wish="0", reconnect=True, on_failure=REVERT)
    told.pause()
    assert told.resume("0,4", {4: OstAnswer(3, 0x84)}) == []
    assert told.step(4).verdict is None
    assert told.ejects(4) == ["save outcome"]
    assert told.outcome == "REACHED"


def test_an_answer_that_was_missed_is_found_by_the_next_look() -> None:
    told = story(start="0,3-5", wish="0", reconnect=True, on_failure=CONTINUE)
    told.accept(5, 4, 3)
    told.works(4)
    told.pause()
    assert told.resume("0,3-4", {4: OstAnswer(3, 0x82)}) == []
    assert told.verdicts == {5: "UNPLUGGED", 4: "REFUSED", 3: "not sent"}
    assert told.ejects(3) == ["save outcome"]


@pytest.mark.parametrize("policy", OnFailure)
def test_what_is_unknown_after_a_halt_stays_recorded(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0,4-5", wish="0", reconnect=True)
    told.cancel()
    told.pause()
    assert told.resume("0,4-5") == ["save the rest"]
    assert told.verdicts == {5: "UNKNOWN", 4: "UNKNOWN"}
    assert "nothing more is sent" in told.step(5).reason


def test_what_the_guest_works_on_after_a_halt_is_awaited_still() -> None:
    told = story(start="0,4-5", wish="0", reconnect=True)
    told.accept(5)
    told.refuses(5)
    told.pause()
    assert told.resume("0,4-5", {4: OstAnswer(3, 0x84)}) == []
    assert told.ejects(4) == ["save outcome"]
    assert told.verdicts == {5: "REFUSED", 4: "UNPLUGGED"}


def test_what_the_guest_works_on_after_a_stop_is_pending() -> None:
    told = story(start="0,4", wish="0", reconnect=True)
    told.cancel()
    told.pause()
    assert told.resume("0,4", {4: OstAnswer(3, 0x84)}) == ["save outcome"]
    assert told.verdicts == {4: "PENDING"}


def test_a_pause_while_the_turning_is_saved_holds_on_the_way_back() -> None:
    told = Story("0-1", "0,2", on_failure=REVERT, reconnect=True, saves_wait=True)
    told.saved()
    told.accept(2)
    told.accept(1)
    assert told.refuses(1) == ["save reverting"]
    told.pause()
    assert told.saved() == []
    assert told.resume("0-2") == ["del 2"]


def test_a_plug_that_was_not_carried_out_is_not_sent_again_after_a_halt() -> None:
    told = story(start="0", wish="0-1", reconnect=True)
    told.cancel()
    told.pause()
    assert told.resume("0") == ["save outcome"]
    assert told.verdicts == {1: "not sent"}


def test_a_deadline_that_passes_in_a_gap_gives_up_after_its_look() -> None:
    told = story(start="0,4", wish="0", reconnect=True, timeout=5.0)
    told.accept(4)
    told.pause()
    assert told.wait(5) == ["look"]
    told.subject.batch.looked(told.now)  # it cannot be done
    assert told.go() == ["save outcome"]
    assert told.verdicts == {4: "PENDING"}


def test_another_qemu_makes_what_was_asked_unknown_and_not_refused() -> None:
    told = story(start="0,4-5", wish="0", reconnect=True, on_failure=CONTINUE)
    told.accept(5)
    slots = read_slots({0: path(0), 4: path(4), 5: path(5)})
    told.subject.batch.paused()
    told.engine.resync(slots, (), status=RUNNING, answers={}, same_instance=False, now=told.now)
    told.go()
    told.lose("another QEMU runs this VM now")
    assert told.verdicts == {5: "UNKNOWN", 4: "UNKNOWN"}
    assert "QEMU was replaced" in told.step(5).reason


def test_a_loss_for_good_after_a_pause_leaves_what_was_in_flight_unknown() -> None:
    told = story(start="0,4", wish="0,2", reconnect=True)
    told.pause()
    told.lose("it did not come back in time")
    assert told.verdicts == {2: "UNKNOWN", 4: "not sent"}
    assert told.subject.ended


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
    engine = make_engine("0-1,3,6", answers={6: OstAnswer(3, 0x84)})
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


def test_finishing_a_removal_that_had_been_sent_undoes_it_although_it_is_joined_now() -> None:
    engine = make_engine("0-2", answers={1: OstAnswer(3, 0x84)})
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
    there, gone = make_engine("0,2").layout, make_engine("0").layout
    start, target = VcpuMap([0]), VcpuMap([0])
    intent = Intent(start, target, (plug, unplug))
    assert revert_wish(intent, there) == revert_wish(intent, gone) == start
    assert finish_wish(intent, there) == finish_wish(intent, gone) == target
