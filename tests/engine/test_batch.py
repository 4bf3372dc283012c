"""A batch of steps: its windows and deadlines, and what others have begun or done meanwhile."""

from typing import Any

import pytest

from qmpvcpu import OnFailure, Pending, Plugged, Proof, Refused, Unplugged, VcpuMap
from qmpvcpu.engine.removal import Evidence, Removal, State
from qmpvcpu.engine.transition import Transition
from qmpvcpu.events import Origin
from qmpvcpu.model.verdicts import OstAnswer
from tests.engine.story import Story, make_state, path, story, whole_map

STOP, CONTINUE, REVERT = OnFailure


# Windows.


def test_at_most_in_flight_commands_have_no_reply() -> None:
    told = story(start="0", wish="0-6", in_flight=4)
    assert told.begun == ["save intent", "add 1", "add 2", "add 3", "add 4"]
    assert told.accept(2) == ["add 5"]
    assert told.accept(1, 3) == ["add 6"]


@pytest.mark.parametrize("in_flight", [1, 8])
def test_under_stop_a_removal_is_asked_for_when_the_one_before_has_ended(in_flight: int) -> None:
    told = story(start="0-3", wish="0", in_flight=in_flight)
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
    assert told.deadline == 6.0
    assert told.wait(2) == ["look"]
    assert told.look("0-2") == []
    assert told.verdicts == {2: "PENDING", 1: "not sent"}
    assert told.pending(2) == Pending(VcpuMap([2]), acknowledged=False, seconds=5.0)
    assert told.deadline == 9.0
    assert told.ejects(1) == ["save outcome"]
    assert told.verdicts == {2: "PENDING", 1: "UNPLUGGED"}


def test_the_last_look_may_find_it_gone() -> None:
    told = story(on_failure=CONTINUE, start="0-2", wish="0", timeout=5.0)
    told.accept(2, 1)
    assert told.wait(5) == ["look"]
    assert told.wait(0.5) == []
    assert told.look("0") == ["save outcome"]
    assert told.verdicts == {2: "UNPLUGGED", 1: "UNPLUGGED"}
    assert told.verdict(2) == Unplugged(VcpuMap([2]), seconds=5.5)


@pytest.mark.parametrize("policy", OnFailure)
def test_no_timeout_only_requests_and_is_no_failure(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-3", wish="0", timeout=0.0)
    if policy is STOP:
        assert told.begun == ["save intent", "del 3"]
        assert told.accept(3) == ["del 2"]
        assert told.accept(2) == ["del 1"]
        assert told.accept(1) == ["save outcome"]
    else:
        assert told.begun == ["save intent", "del 3", "del 2", "del 1"]
        assert told.accept(3) == []
        assert told.accept(2, 1) == ["save outcome"]
    assert told.verdicts == {3: "PENDING", 2: "PENDING", 1: "PENDING"}
    assert told.outcome == "REQUESTED"
    assert told.report.layout.pending == VcpuMap.parse("1-3")


@pytest.mark.parametrize("policy", OnFailure)
def test_the_time_for_the_whole_stops_the_waiting(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0-2", wish="0,3", total_timeout=8.0, timeout=30.0, in_flight=1)
    told.accept(3)
    told.accept(2)
    assert told.deadline == 9.0
    sent = told.wait(8)
    if policy is REVERT:
        assert sent == []  # the reply to what is out is awaited
        sent = told.accept(1)
        assert sent == ["save reverting", "del 3"]
        assert told.deadline == told.now + 10.0
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
        assert told.step(1).reason == "not sent: total_timeout has passed"


# Keeping what is about to leave.


def keeping(answer: dict[int, OstAnswer] | None = None, **terms: Any) -> Story:
    """Return a story that wishes for vCPU 1, on whose removal the guest works."""
    state = make_state("0-1", answers=answer or {1: OstAnswer(3, 0x84)})
    return Story(state, "0-1", **terms)


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
    state = make_state("0-2", answers={1: OstAnswer(3, 0x84)})
    told = Story(state, "0-1", timeout=5.0)
    assert told.begun == ["save intent", "del 2"]
    told.accept(2)
    assert told.refuses(2) == []
    assert told.ejects(1) == ["save outcome"]
    assert told.verdicts == {1: "UNPLUGGED", 2: "REFUSED"}
    assert told.step(1).reason == "it left"


def test_a_removal_that_ended_before_it_was_asked_about_is_no_longer_pending() -> None:
    state = make_state("0-1", answers={1: OstAnswer(3, 0x84)})
    told = Story(state, "0-2", in_flight=1)
    assert told.begun == ["save intent", "add 2"]
    told.refuses(1)
    assert told.accept(2) == ["save outcome"]
    assert told.verdicts == {2: "PLUGGED", 1: "REFUSED"}


def test_a_removal_that_ended_between_plan_and_start_is_no_longer_pending() -> None:
    state = make_state("0-1", answers={1: OstAnswer(3, 0x84)})
    change = whole_map("0-1")
    plan = change.plan(state.situation)
    state.removals.clear()
    subject = Transition(change, plan, state, 1.0, reply_timeout=10.0)
    subject.advance(1.0)
    subject.saved()
    subject.advance(1.0)
    (step,) = subject.report().steps
    assert step.verdict == Refused(VcpuMap([1]), None, "no longer pending")
    assert step.ok


# Joining.


def test_under_stop_a_removal_that_is_joined_has_to_end_before_the_next_is_asked_for() -> None:
    state = make_state("0-2", answers={2: OstAnswer(3, 0x84)})
    told = Story(state, "0")
    assert told.begun == ["save intent"]
    assert told.refuses(2) == ["save outcome"]
    assert told.verdicts == {2: "REFUSED", 1: "not sent"}


def test_a_removal_that_is_pending_is_joined_and_nothing_is_sent() -> None:
    state = make_state("0-1", answers={1: OstAnswer(3, 0x84)})
    told = Story(state, "0", on_failure=REVERT)
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


def without_a_reply(**more: Any) -> Story:
    """Return a story in which QEMU does not reply to the removal of vCPU 1, which a second map then joins."""
    told = Story("0-1", "0", reply_timeout=2.0, **more)
    assert told.wait(2) == ["save the rest"]
    assert told.wish("0", on_failure=CONTINUE) == ["save intent"]
    return told


def test_a_joined_removal_that_qemu_rejects_late_is_asked_for_again() -> None:
    told = without_a_reply()
    assert told.reject(1) == ["del 1"]
    told.accept(1)
    assert told.ejects(1) == ["save outcome"]
    assert told.outcome == "REACHED"


def test_a_joined_removal_whose_reply_is_lost_is_asked_for_once_the_connection_is_back() -> None:
    told = without_a_reply(reconnects=True)
    assert told.pause() == []  # the monitor tells the loss before it tells those of the commands
    assert told.resume("0-1") == ["del 1"]


def test_a_joined_removal_whose_reply_makes_no_sense_is_not_asked_for_again() -> None:
    told = without_a_reply()
    assert told.fail_to_answer(1) == ["save the rest"]  # and the connection is there
    assert told.verdicts == {1: "UNKNOWN"}


def test_a_step_that_forgot_a_removal_is_not_ended_by_another_in_its_place() -> None:
    state = make_state("0-2")
    theirs = state.unplug_sent(1, 0.0)
    told = Story(state, "0,2")
    state.unplug_replied(theirs, Evidence.REJECTION, 1.0)
    assert told.wait(0) == ["del 1"]
    stranger = Removal(VcpuMap([2]), path(2), Origin.OTHER, 1.0, state=State.REFUSED)
    told.subject.batch._out._by_removal[stranger] = told.subject.runs[0]  # as if it had been awaited before
    told.subject.answered(stranger, 2.0)
    assert told.accept(1) == []
    assert told.ejects(1) == ["save outcome"]
    assert told.verdicts == {1: "UNPLUGGED"}


def test_a_joined_removal_that_ends_before_its_turn_is_told_as_it_ended() -> None:
    state = make_state("0-3")
    state.unplug_replied(state.unplug_sent(1, 0.0), Evidence.ACCEPTED, 0.0)
    told = Story(state, "0")
    assert told.begun == ["save intent", "del 3"]
    told.accept(3)
    assert told.ejects(1) == []
    assert told.refuses(3) == ["save outcome"]
    assert told.verdicts == {3: "REFUSED", 2: "not sent", 1: "UNPLUGGED"}
    assert not told.report.changed_by_other


def test_what_only_the_record_knows_is_asked_for_again() -> None:
    state = make_state("0-1")
    state.known_from_record({1}, {}, 0.0)
    told = Story(state, "0")
    assert told.begun == ["save intent", "del 1"]
    told.accept(1)
    assert told.ejects(1) == ["save outcome"]


def test_the_answer_to_what_only_the_record_knows_is_awaited_to_keep_it() -> None:
    state = make_state("0-1")
    state.known_from_record({1}, {}, 0.0)
    told = Story(state, "0-1")
    assert told.begun == ["save intent"]
    assert told.refuses(1) == ["save outcome"]


# Others.


@pytest.mark.parametrize("acknowledges", [True, False])
def test_what_another_has_plugged_meanwhile_has_to_be_proven_too(*, acknowledges: bool) -> None:
    told = story(start="0", wish="0-2", in_flight=1, timeout=5.0, require_proof=True)
    told.read("0,2", others=[2])
    told.accept(1)
    told.acknowledges(1)
    assert told.begun == ["save intent", "add 1"], "2 is there, and is not asked for"
    if acknowledges:
        told.acknowledges(2)
    else:
        told.wait(5)
    assert told.outcome == ("REACHED" if acknowledges else "PARTIAL")
    assert told.step(2).reason == (
        "changed by other" if acknowledges else "the guest did not acknowledge it: no answer"
    )


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
    state = make_state("0")
    state.maybe_queued_twice.add(1)
    told = Story(state, "0-1")
    assert told.begun == ["save intent", "add 1"]
    assert told.accept(1) == []
    assert told.ost(1, 0, source=1) == ["look closely"]
    assert told.look("0-1") == ["save outcome"]
    assert told.verdict(1) == Plugged(VcpuMap([1]), acknowledged=True, code=0)
    assert state.maybe_queued_twice == set()


def test_a_plug_that_a_doubled_removal_ejects_again_is_not_there() -> None:
    state = make_state("0")
    state.maybe_queued_twice.add(1)
    told = Story(state, "0-1")
    told.accept(1)
    told.works(1)
    assert told.ejects(1) == ["save outcome"]
    assert told.verdicts == {1: "UNPLUGGED"}
    assert "ejected by a removal that had been asked for twice" in told.step(1).reason
    assert told.outcome == "PARTIAL"


# Proof.


def test_an_acknowledgement_is_awaited_where_it_is_asked_for() -> None:
    told = story(start="0,3", wish="0-2", proof=Proof.ACKNOWLEDGED, timeout=5.0)
    assert not told.subject.batch.touched(1)
    assert told.accept(1, 2) == []
    assert told.subject.batch.touched(1)
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
