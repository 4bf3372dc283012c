"""A transition that its caller stops, or that loses its connection, in every phase."""

import pytest

from qmpvcpu import MonitorLostError, OnFailure, Pending, VcpuMap
from qmpvcpu.engine.messages import Lost
from qmpvcpu.engine.transition import Phase
from qmpvcpu.model.verdicts import OstAnswer
from tests.engine.story import Story, story

STOP, CONTINUE, REVERT = OnFailure


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
    assert told.verdicts == {3: "PLUGGED", 4: "PLUGGED", 7: "PENDING", 2: waiting, 1: waiting}
    assert told.step(2).reason == ("not sent: QEMU is gone" if policy is STOP else "QEMU is gone")
    assert told.intents[-1] is not None  # nobody has written an outcome
    assert told.outcome == "PARTIAL"


@pytest.mark.parametrize("phase", [Phase.START, Phase.FINISH, Phase.TURN])
def test_a_loss_during_a_save_ends_it_too(phase: Phase) -> None:
    told = Story("0-1", "0,2", on_failure=REVERT, saves_wait=True)
    if phase is not Phase.START:
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
    assert told.outcome == {"START": "PARTIAL", "FINISH": "REACHED", "TURN": "REVERT_INCOMPLETE"}[phase.name]


def test_a_command_that_a_loss_overtakes_is_unknown_and_nothing_follows_it() -> None:
    told = story(on_failure=CONTINUE, start="0", wish="0-2", in_flight=1)
    run = told.subject.runs[0]
    lost = MonitorLostError("lost")
    assert told.lose_commands(lost) == []
    assert told.lose("lost for good") == []
    assert told.verdicts == {1: "UNKNOWN", 2: "not sent"}
    told.subject.batch.unanswered(run, MonitorLostError("again"), told.now)
    assert told.step(1).reason == run.reason == str(lost)


@pytest.mark.parametrize("timeout", [0.0, 5.0])
def test_a_rejection_that_is_told_after_the_loss_lets_nothing_follow_it(timeout: float) -> None:
    told = story(on_failure=CONTINUE, start="0,4-5", wish="0", in_flight=1, timeout=timeout, reconnects=True)
    assert told.tell(Lost(MonitorLostError("lost"), may_return=True)) == []
    assert told.reject(5) == []  # with many in flight, or a look between, its turn comes late
    assert told.resume("0,4-5") == ["del 4"]
    assert told.verdicts[5] == "REJECTED"


def test_plugs_that_a_loss_overtook_are_sent_again_in_their_order() -> None:
    told = story(start="0", wish="0-5", in_flight=3, reconnects=True)
    told.pause()
    assert told.resume("0") == ["add 1", "add 2", "add 3"]
    told.accept(1, 2)
    assert told.accept(3) == []
    told.pause()
    assert told.resume("0-3") == ["add 4", "add 5"]


def test_what_the_next_look_shows_is_the_reply_to_what_was_in_flight() -> None:
    told = story(on_failure=CONTINUE, start="0,4-5", wish="0-3", in_flight=2, reconnects=True)
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
    told = story(start="0,4", wish="0", reconnects=True, on_failure=REVERT)
    told.pause()
    assert told.resume("0,4", {4: OstAnswer(3, 0x84)}) == []
    assert told.step(4).verdict is None
    assert told.ejects(4) == ["save outcome"]
    assert told.outcome == "REACHED"


def test_an_answer_that_was_missed_is_found_by_the_next_look() -> None:
    told = story(start="0,3-5", wish="0", reconnects=True, on_failure=CONTINUE)
    told.accept(5, 4, 3)
    told.works(4)
    told.pause()
    assert told.resume("0,3-4", {4: OstAnswer(3, 0x82)}) == []
    assert told.verdicts == {5: "UNPLUGGED", 4: "REFUSED", 3: "not sent"}
    assert told.ejects(3) == ["save outcome"]


@pytest.mark.parametrize("policy", OnFailure)
def test_what_is_unknown_after_a_halt_stays_recorded(policy: OnFailure) -> None:
    told = story(on_failure=policy, start="0,4-5", wish="0", reconnects=True)
    told.cancel()
    told.pause()
    assert told.resume("0,4-5") == ["save the rest"]
    assert told.verdicts == {5: "UNKNOWN", 4: "not sent" if policy is STOP else "UNKNOWN"}
    assert "nothing more is sent" in told.step(5).reason


def test_what_the_guest_works_on_after_a_halt_is_awaited_still() -> None:
    told = story(on_failure=REVERT, start="0,4-5", wish="0", reconnects=True)
    told.accept(5)
    told.refuses(5)
    told.pause()
    assert told.resume("0,4-5", {4: OstAnswer(3, 0x84)}) == []
    assert told.ejects(4) == ["save reverting", "add 4"]
    assert told.accept(4) == ["save outcome"]
    assert told.verdicts == {5: "REFUSED", 4: "UNPLUGGED, undone"}


def test_what_the_guest_works_on_after_a_stop_is_pending() -> None:
    told = story(start="0,4", wish="0", reconnects=True)
    told.cancel()
    told.pause()
    assert told.resume("0,4", {4: OstAnswer(3, 0x84)}) == ["save outcome"]
    assert told.verdicts == {4: "PENDING"}


def test_a_pause_while_the_turning_is_saved_holds_on_the_way_back() -> None:
    told = Story("0-1", "0,2", on_failure=REVERT, reconnects=True, saves_wait=True)
    told.saved()
    told.accept(2)
    told.accept(1)
    assert told.refuses(1) == ["save reverting"]
    told.pause()
    assert told.saved() == []
    assert told.resume("0-2") == ["del 2"]


def test_a_plug_that_was_not_carried_out_is_not_sent_again_after_a_halt() -> None:
    told = story(start="0", wish="0-1", reconnects=True)
    told.cancel()
    told.pause()
    assert told.resume("0") == ["save outcome"]
    assert told.verdicts == {1: "not sent"}


def test_a_deadline_that_passes_in_a_gap_gives_up_after_its_look_and_ends_with_one_when_we_are_back() -> None:
    told = story(start="0,4", wish="0", reconnects=True, timeout=5.0)
    told.accept(4)
    told.pause()
    assert told.wait(5) == []  # the look cannot be done
    assert told.verdicts == {4: "PENDING"}
    assert told.resume("0,4") == ["save outcome"]


def test_another_qemu_makes_what_was_asked_unknown_and_not_refused() -> None:
    told = story(start="0,4-5", wish="0", reconnects=True, on_failure=CONTINUE)
    told.accept(5)
    told.pause()
    assert told.resume("0,4-5", same_instance=False) == []
    assert told.verdicts == {5: "UNKNOWN", 4: "UNKNOWN"}
    assert "QEMU was replaced" in told.step(5).reason


def test_a_loss_for_good_after_a_pause_leaves_what_was_in_flight_unknown() -> None:
    told = story(start="0,4", wish="0,2", reconnects=True)
    told.pause()
    told.lose("it did not come back in time")
    assert told.verdicts == {2: "UNKNOWN", 4: "not sent"}
    assert told.subject.ended
