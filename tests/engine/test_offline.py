"""The connection is lost: who waits for it, who is told, and what is so when it is back."""

import pytest

from qmpvcpu import MonitorLostError, OutcomeUnknownError, TransitionError, UnprovenError, VcpuMap
from qmpvcpu.engine.intents import Intentions
from qmpvcpu.engine.messages import DropPrevious, Hold, Lost, Persist, Refresh, Request, Result, StopRunning, Wait
from qmpvcpu.engine.removal import State
from qmpvcpu.engine.vmstate import Read
from qmpvcpu.model.transition import Action, Intent, Step
from qmpvcpu.model.verdicts import OstAnswer
from tests.engine.story import Story, plug, set_state, unplug, whole_map

INTERRUPTED = Intent(VcpuMap([0]), VcpuMap.parse("0,7"), (Step(Action.PLUG, VcpuMap([7])),))


def lost(told: Story, request: Request) -> MonitorLostError:
    error = told.error(request)
    assert isinstance(error, MonitorLostError)
    return error


# For good.


def test_a_loss_for_good_ends_everything_that_waits() -> None:
    told = Story("0-2", saves_wait=True)
    told.ask(unplug(1))
    told.saved()
    told.accept(1)
    wait = Wait(told.state.removals[1], None)
    sent, parked, refresh = plug(3), set_state(3, enabled=True), Refresh()
    others: list[Request] = [wait, parked, refresh]
    for request in (sent, *others):
        told.ask(request)
    told.saved()
    queued: list[Request] = [Hold(), whole_map("0"), plug(5)]
    for request in queued:
        told.ask(request)
    told.lose("QEMU is gone")
    for request in (*others, *queued):
        assert lost(told, request).why == "QEMU is gone"
    assert isinstance(told.error(sent), OutcomeUnknownError)
    assert told.let_go is not None
    assert told.engine.closed
    assert told.engine.recorded.intent is not None, "of what was in flight nobody knows"
    assert told.deadline is None


def test_nothing_is_begun_afterwards() -> None:
    told = Story("0")
    told.lose("QEMU is gone")
    changes: list[Request] = [plug(1), unplug(1), set_state(1, enabled=True), whole_map("0-1")]
    requests: list[Request] = [*changes, Hold(), Refresh(), StopRunning()]
    for request in requests:
        assert told.ask(request) == []
        error = lost(told, request)
        assert error.why == "QEMU is gone"
        assert error.__cause__ is told.engine.lost


def test_what_needs_no_qemu_is_done_afterwards() -> None:
    told = Story("0-1")
    told.ask(unplug(1))
    told.accept(1)
    removal = told.state.removals[1]
    told.ejects(1)
    told.lose()
    persisting, dropping, wait = Persist(), DropPrevious(), Wait(removal, None)
    assert told.ask(persisting) == ["save"]
    assert told.ask(dropping) == ["save"]
    told.ask(wait)
    assert told.result(persisting) is told.result(dropping) is None
    assert told.result(wait).ids == {1}


def test_a_map_that_is_lost_stays_recorded() -> None:
    told = Story("0", "0-1")
    told.lose("QEMU is gone")
    assert told.change is not None
    assert isinstance(told.error(told.change), TransitionError)
    assert told.engine.intentions.interrupted is not None
    assert told.engine.intentions.interrupted.target == {0, 1}
    assert not told.engine.holds_saves


def test_who_begins_to_wait_for_an_answer_afterwards_is_told_of_the_loss() -> None:
    told = Story("0-1")
    told.ask(unplug(1))
    told.accept(1)
    told.lose("QEMU is gone")
    wait = Wait(told.state.removals[1], None)
    told.ask(wait)
    assert lost(told, wait).why == "QEMU is gone"


def test_what_comes_afterwards_is_of_no_matter() -> None:
    told = Story("0")
    told.ask(Refresh())
    look = told.looks[0]
    told.lose("QEMU is gone")
    assert told.tell(told._shown(look)) == []
    assert told.resume("0-1") == []
    assert told.engine.closed
    assert told.state.layout.enabled == {0}


def test_a_loss_is_told_once() -> None:
    told = Story("0")
    told.lose("QEMU is gone")
    told.let_go = None
    told.lose("again")
    assert told.let_go is None


# It may come back.


def test_a_plug_waits_for_the_connection_as_long_as_for_a_reply() -> None:
    told = Story("0", reconnects=True, reply_timeout=10.0)
    told.pause()
    first, second = plug(1), plug(2)
    assert told.ask(first) == []
    told.wait(6)
    assert told.ask(second) == []
    assert told.wait(4) == []
    assert lost(told, first).why == "lost; not back within 10 s"
    assert not told.is_settled(second)
    assert told.resume("0") == ["save intent", "add 2"]
    assert told.deadline == told.now + 10.0, "that of the reply"
    told.accept(2)
    assert told.result(second) == {2}


def test_a_plug_that_the_loss_overtook_still_has_to_be_proven() -> None:
    told = Story("0", reconnects=True)
    required = plug(1, timeout=5.0, require_proof=True)
    told.ask(required)
    told.pause()
    told.resume("0-1")
    assert not told.is_settled(required)
    told.wait(5)
    assert isinstance(told.error(required), UnprovenError)


def test_what_was_queued_before_waits_from_the_loss_on() -> None:
    told = Story("0", "0-1", reconnects=True, reply_timeout=10.0)
    queued = plug(2)
    told.ask(queued)
    told.wait(9)
    told.pause()
    told.wait(9)
    assert not told.is_settled(queued)
    told.wait(1)
    assert told.is_settled(queued)


def test_a_map_waits_as_long_as_for_an_answer() -> None:
    told = Story("0", "0-1", reconnects=True, timeout=30.0)
    told.pause()
    assert told.wait(29) == []
    assert told.change is not None
    assert not told.is_settled(told.change)
    told.wait(1)
    assert told.step(1).reason == "the connection is lost, and did not come back in time"
    assert told.engine.intentions.interrupted is not None


@pytest.mark.parametrize(("carried_out", "words"), [("0-1", ["save outcome"]), ("0", ["add 1"])])
def test_a_plug_in_flight_is_found_done_or_sent_again(carried_out: str, words: list[str]) -> None:
    told = Story("0", reconnects=True)
    request = plug(1)
    told.ask(request)
    told.pause()
    assert not told.is_settled(request)
    assert told.engine.recorded.intent is not None
    assert told.resume(carried_out) == words
    if told.sent:
        told.accept(1)
    assert told.result(request) == {1}


def test_an_unplug_in_flight_is_found_done_and_who_requested_it_gets_one_that_is_over() -> None:
    told = Story("0-1", reconnects=True)
    request = unplug(1, result=Result.REMOVAL)
    told.ask(request)
    told.pause()
    assert told.resume("0") == ["save outcome"]
    removal, joined = told.result(request)
    assert (removal.ids, removal.state, joined) == ({1}, State.UNPLUGGED, False)


def test_an_unplug_that_the_guest_is_found_to_work_on_is_not_sent_again() -> None:
    told = Story("0-1", reconnects=True)
    request = unplug(1)
    told.ask(request)
    told.pause()
    assert told.resume("0-1", {1: OstAnswer(3, 0x84)}) == []
    assert told.ejects(1) == ["save outcome"]
    assert told.result(request) == {1}


def test_what_was_recorded_and_not_sent_before_the_loss_is_recorded_until_it_is_sent() -> None:
    told = Story("0", reconnects=True, saves_wait=True)
    told.ask(plug(1))
    told.pause()
    assert told.saved() == []
    assert told.ask(Persist()) == ["save"]
    intent = told.intents[-1]
    assert intent is not None, "it is sent when the connection is back"
    assert [str(step) for step in intent.steps] == ["plug 1"]
    assert told.resume("0") == ["add 1"]


def test_who_waited_for_a_plug_in_flight_waits_for_the_connection_now() -> None:
    told = Story("0", reconnects=True)
    told.ask(plug(1))
    wanting = set_state(1, enabled=True)
    told.ask(wanting)
    assert told.pause() == []
    assert told.resume("0") == ["add 1"]
    assert told.accept(1) == ["save outcome", "save outcome"]
    assert told.result(wanting) == set()


def test_a_map_that_is_being_looked_at_is_looked_at_anew() -> None:
    told = Story("0", "0-1", reconnects=True, first_looks_wait=True)
    assert told.pause() == []
    assert told.resume("0") == ["first look"]
    assert told.see(first=True) == ["save intent", "add 1"]


def test_a_map_that_was_looked_at_just_before_the_loss_is_looked_at_anew() -> None:
    told = Story("0", "0-1", reconnects=True, first_looks_wait=True)
    told.tell(Lost(MonitorLostError("lost"), may_return=True))
    assert told.see(first=True) == []
    assert told.resume("0") == ["first look"]
    assert told.see(first=True) == ["save intent", "add 1"]


def test_a_refresh_waits_too_and_may_be_given_up() -> None:
    told = Story("0", reconnects=True, reply_timeout=10.0)
    told.pause()
    early, late, gone = Refresh(), Refresh(Read.SLOTS, status=False), Refresh()
    told.ask(early)
    told.wait(6)
    told.ask(late)
    told.ask(gone)
    told.cancel(gone)
    assert told.is_settled(gone)
    told.wait(4)
    lost(told, early)
    assert told.resume("0") == ["look"]
    told.look("0")
    assert told.result(late) is True


def test_who_waits_for_an_answer_goes_on_waiting() -> None:
    told = Story("0-1", reconnects=True)
    told.ask(unplug(1, result=Result.REMOVAL))
    told.accept(1)
    patient, hasty = Wait(told.state.removals[1], None), Wait(told.state.removals[1], 5.0)
    told.ask(patient)
    told.ask(hasty)
    told.pause()
    assert told.wait(5) == [], "it cannot be looked at"
    assert told.result(hasty).name == "PENDING"
    told.resume("0")
    assert told.result(patient).name == "UNPLUGGED"


def test_what_the_monitor_hears_after_the_loss_is_nothing() -> None:
    told = Story("0-1", reconnects=True)
    told.pause()
    told.works(1)
    assert not told.state.layout.pending


def test_a_rejection_that_is_being_looked_into_is_told_as_it_is() -> None:
    told = Story("0", reconnects=True)
    told.rejections_wait = True
    request = plug(1)
    told.ask(request)
    told.reject(1)
    told.pause()
    assert told.is_settled(request)
    assert told.resume("0") == []


def test_whoever_looks_for_qemu_may_give_up() -> None:
    told = Story("0", reconnects=True)
    told.pause()
    request = plug(1)
    told.ask(request)
    told.tell(Lost(MonitorLostError("another VM is there"), may_return=False))
    assert lost(told, request).why == "another VM is there"
    assert told.let_go is not None


# Another QEMU.


def test_another_qemu_ends_what_runs_and_what_was_interrupted_is_of_no_matter() -> None:
    told = Story("0-2", reconnects=True, intentions=Intentions(INTERRUPTED))
    sent, queued = plug(3), plug(4)
    told.ask(sent)
    told.pause()
    told.ask(queued)
    assert told.resume("0", same_instance=False) == ["save intent", "add 4"]
    assert isinstance(told.error(sent), OutcomeUnknownError)
    recorded = told.engine.recorded
    assert recorded.intent is not None
    assert [str(step) for step in recorded.intent.steps] == ["plug 4"]
    told.accept(4)
    assert told.engine.recorded.intent is None


def test_what_the_qemu_before_had_is_kept() -> None:
    told = Story("0-2", reconnects=True)
    told.pause()
    told.resume("0", same_instance=False)
    previous = told.engine.recorded.previous
    assert previous is not None
    assert not previous.is_there(told.state.layout)
    told.pause()
    told.resume("0-1", same_instance=False)
    assert told.engine.recorded.previous is previous, "the first one that was not given again"


def test_a_request_that_waited_has_no_deadline_of_the_loss_any_more() -> None:
    told = Story("0-1", reconnects=True)
    told.pause()
    request = unplug(1, timeout=60.0)
    told.ask(request)
    assert told.resume("0-1", same_instance=False) == ["save intent", "del 1"]
    told.accept(1)
    told.wait(20)
    assert not told.is_settled(request)
