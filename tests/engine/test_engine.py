"""The core as a whole: whose turn it is, what is looked at for whom, and what is done when nobody asks."""

import pytest

from qmpvcpu import (
    DenialReason,
    MonitorLostError,
    MonitorTimeoutError,
    OutcomeUnknownError,
    Refused,
    StepDeniedError,
    Unplugged,
    VcpuMap,
)
from qmpvcpu.engine.messages import (
    Accepted,
    Arrived,
    Cancelled,
    ExportLock,
    Hold,
    Publish,
    Refresh,
    Release,
    Request,
    Result,
    Settle,
    Stop,
    StopRunning,
    Wait,
    WantRead,
)
from qmpvcpu.engine.removal import State
from qmpvcpu.engine.vmstate import Read
from qmpvcpu.events import UnplugPending, VcpuPlugged
from qmpvcpu.model.verdicts import OstAnswer, Pending
from qmpvcpu.model.vm import VmStatus
from tests.engine.story import Story, make_state, plug, set_state, unplug, whole_map


def reason(told: Story, request: Request) -> DenialReason:
    error = told.error(request)
    assert isinstance(error, StepDeniedError)
    return error.reason


# Whose turn it is.


def test_single_steps_run_together() -> None:
    told = Story("0-1")
    first, second, third = plug(2), plug(3), unplug(1)
    assert told.ask(first) == ["save intent", "add 2"]
    assert told.ask(second) == ["save intent", "add 3"]
    assert told.ask(third) == ["save intent", "del 1"]
    assert told.accept(3) == ["save outcome"]
    assert told.result(second) == {3}
    assert not told.is_settled(first)
    assert told.accept(2, 1) == ["save outcome"]
    assert told.result(first) == {2}
    assert told.ejects(1) == ["save outcome"]
    assert told.result(third) == {1}


def test_two_plugs_of_the_first_free_slot_take_two() -> None:
    told = Story("0,2", saves_wait=True)
    first, second, third = plug(), plug(), plug()
    for each in (first, second, third):
        assert told.ask(each) == ["save intent"]
    assert told.saved() == ["add 1"]
    assert told.saved() == ["add 3"]
    assert told.saved() == ["add 4"]


def test_a_slot_that_is_about_to_be_plugged_is_not_plugged_twice() -> None:
    told = Story("0", saves_wait=True)
    first, second = plug(1), plug(1)
    told.ask(first)
    assert told.ask(second) == []
    assert reason(told, second) is DenialReason.IN_PROGRESS
    told.saved()
    third = plug(1)
    told.ask(third)
    assert reason(told, third) is DenialReason.IN_PROGRESS


def test_a_map_waits_for_replies_and_for_nothing_of_the_guests() -> None:
    told = Story("0-1")
    told.ask(plug(2))
    leaving = unplug(1)
    told.ask(leaving)
    assert told.wish("0,3") == []
    assert told.accept(1) == []
    assert told.accept(2) == ["save outcome", "save intent", "add 3"]
    assert told.accept(3) == ["del 2"]
    assert told.ejects(1) == ["save outcome"], "the single step ends beside the map"
    assert told.result(leaving) == {1}
    told.accept(2)
    assert told.ejects(2) == ["save outcome"]
    assert told.outcome == "REACHED"


def test_single_steps_wait_for_a_map_to_end() -> None:
    told = Story("0", "0-1")
    single = plug(2)
    assert told.ask(single) == []
    assert told.engine.situation.in_flight == {1}
    assert told.accept(1) == ["save outcome", "save intent", "add 2"]
    told.accept(2)
    assert told.result(single) == {2}


def test_first_come_first_served() -> None:
    told = Story("0")
    told.ask(plug(1))
    a_map, single = whole_map("0-2"), plug(3)
    assert told.ask(a_map) == []
    assert told.ask(single) == [], "although it could run beside the first one"
    assert told.accept(1) == ["save outcome", "save intent", "add 2"]
    assert told.accept(2) == ["save outcome", "save intent", "add 3"]


def test_one_that_joins_a_removal_waits_for_no_turn_and_sends_and_records_nothing() -> None:
    told = Story("0-1")
    first, joining = unplug(1), unplug(1)
    told.ask(first)
    told.accept(1)
    a_map = whole_map("0,2-3")
    assert told.ask(a_map) == ["save intent", "add 2", "add 3"]
    assert told.ask(joining) == []
    assert told.ejects(1) == ["save outcome", "save outcome"], "what became of it is on disk for both"
    assert told.result(first) == told.result(joining) == {1}
    assert not told.is_settled(a_map)


def test_one_that_joins_what_a_hold_keeps_out_is_told_the_answer() -> None:
    told = Story("0-1")
    told.ask(unplug(1))
    told.accept(1)
    told.ask(Hold())
    joining = unplug(1)
    assert told.ask(joining) == []
    told.refuses(1)
    assert told.error(joining).code == 0x82  # type: ignore[attr-defined]


def test_what_the_vm_may_have_forgotten_is_requested_again_and_queues() -> None:
    state = make_state("0-1")
    state.known_from_record({1}, {}, 0.0)
    told = Story(state)
    told.ask(Hold())
    assert told.ask(unplug(1)) == []


def test_one_who_wants_it_plugged_waits_for_a_plug_in_flight() -> None:
    told = Story("0")
    told.ask(plug(1))
    wanting = set_state(1, enabled=True)
    assert told.ask(wanting) == []
    assert told.accept(1) == ["save outcome", "save outcome"]
    assert told.result(wanting) == set(), "nothing was left to be done"


def test_one_who_wants_it_plugged_plugs_it_if_the_one_before_could_not() -> None:
    told = Story("0")
    told.ask(plug(1))
    first, second = set_state(1, enabled=True), set_state(1, enabled=True)
    told.ask(first)
    told.ask(second)
    assert told.reject(1) == ["save outcome", "save intent", "add 1"]
    assert told.accept(1) == ["save outcome", "save outcome"]
    assert told.result(first) == {1}
    assert told.result(second) == set()


def test_who_waits_for_a_plug_in_flight_may_go_away() -> None:
    told = Story("0")
    told.ask(plug(1))
    wanting = set_state(1, enabled=True)
    told.ask(wanting)
    assert told.cancel(wanting) == []
    assert told.is_settled(wanting)
    assert told.reject(1) == ["save outcome"]


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_so_already_is_no_step(*, enabled: bool) -> None:
    told = Story("0-1")
    wanting = set_state(1 if enabled else 2, enabled=enabled)
    assert told.ask(wanting) == ["save outcome"]
    assert told.result(wanting) == set()
    assert not told.sent


def test_who_waits_for_a_plug_in_flight_waits_no_longer_than_for_a_reply() -> None:
    told = Story("0", reply_timeout=2.0)
    told.ask(plug(1))
    told.wait(1)
    wanting = set_state(1, enabled=True)
    told.ask(wanting)
    assert told.wait(1) == ["save the rest"], "the reply to the plug is overdue"
    told.wait(1)
    assert isinstance(told.error(wanting), OutcomeUnknownError)
    assert told.accept(1) == []


# Those who keep changes out.


def test_a_hold_waits_for_replies_and_keeps_changes_out() -> None:
    told = Story("0")
    told.ask(plug(1))
    hold, single, a_map = Hold(), plug(2), whole_map("0-3")
    told.ask(hold)
    assert not told.is_settled(hold)
    assert told.accept(1) == ["save outcome"]
    assert told.result(hold) is True
    assert told.ask(single) == []
    assert told.ask(a_map) == []
    assert told.tell(Release(hold)) == ["save intent", "add 2"]
    assert told.accept(2) == ["save outcome", "save intent", "add 3"]


@pytest.mark.parametrize("granted", [True, False])
def test_a_hold_that_nobody_wants_any_more_keeps_nothing_out(*, granted: bool) -> None:
    told = Story("0")
    if not granted:
        told.ask(plug(1))
    hold = Hold()
    told.ask(hold)
    single = plug(2)
    told.ask(single)
    words = told.tell(Cancelled(hold), Release(hold))
    assert words == ["save intent", "add 2"]


def test_what_a_single_step_still_has_to_send_is_sent_after_a_hold() -> None:
    told = Story("0-1")
    told.ask(unplug(1))
    told.accept(1)
    keeping = set_state(1, enabled=True)
    told.ask(keeping)
    hold = Hold()
    told.ask(hold)
    assert told.result(hold) is True
    assert told.ejects(1) == ["save outcome"], "of the unplug"
    assert told.tell(Release(hold)) == ["add 1"]
    told.accept(1)
    assert told.result(keeping) == {1}


def test_an_exported_vm_changes_no_more() -> None:
    told = Story("0-1")
    told.ask(unplug(1))
    told.accept(1)
    told.tell(ExportLock(locked=True))
    single, a_map, joining = plug(2), whole_map("0-2"), unplug(1)
    told.ask(single)
    told.ask(a_map)
    assert reason(told, single) is reason(told, a_map) is DenialReason.EXPORTED
    assert told.ask(joining) == []
    told.ejects(1)
    assert told.result(joining) == {1}, "it sends nothing"
    told.tell(ExportLock(locked=False))
    assert told.ask(plug(2)) == ["save intent", "add 2"]


# Looks.


def test_a_map_is_looked_at_before_it_is_planned() -> None:
    told = Story("0", "0-2", first_looks_wait=True)
    assert told.begun == ["first look"]
    single = plug(3)
    assert told.ask(single) == [], "it is the map's turn"
    assert told.see("0,2", first=True) == ["save intent", "add 1"]


def test_a_map_that_cannot_be_looked_at_is_not_begun_and_lets_others_have_their_turn() -> None:
    told = Story("0", "0-2", first_looks_wait=True)
    a_map = told.change
    assert a_map is not None
    assert told.ask(plug(3)) == []
    assert told.see(failed="no", first=True) == ["save intent", "add 3"]
    assert str(told.error(a_map)) == "no"


def test_a_map_whose_caller_goes_away_before_it_is_planned_is_not_begun() -> None:
    told = Story("0", "0-2", first_looks_wait=True)
    a_map = told.change
    single = plug(3)
    told.ask(single)
    assert a_map is not None
    assert told.cancel(a_map) == ["save intent", "add 3"]
    assert told.see(first=True) == []


def test_a_single_step_asks_what_the_vm_does_only_where_it_is_not_known() -> None:
    told = Story("0", first_looks_wait=True)
    told.state.status = None
    single = plug(1)
    assert told.ask(single) == ["first look"]
    assert told.first_looks[0].read is Read.NONE
    assert told.first_looks[0].status
    assert told.see(first=True) == ["save intent", "add 1"]


def test_what_the_vm_does_may_forbid_it() -> None:
    told = Story(make_state("0", status=VmStatus("running", "active")), first_looks_wait=True)
    single = plug(1)
    assert told.ask(single) == ["first look"], "a migration may end without an event"
    told.see(first=True)
    assert reason(told, single) is DenialReason.MIGRATING


def test_under_tcg_the_threads_are_looked_at_before_the_first_unplug() -> None:
    told = Story(make_state("0-1", vm={"accelerator": "tcg"}), first_looks_wait=True)
    assert told.ask(unplug(1)) == ["first look"]
    assert told.first_looks[0].read is Read.FULL


def test_those_whose_time_is_over_at_one_moment_share_a_look() -> None:
    told = Story("0-3")
    requests = [unplug(vcpu, timeout=5.0) for vcpu in (1, 2, 3)]
    for request in requests:
        told.ask(request)
    told.accept(1, 2, 3)
    assert told.wait(5) == ["look"]
    assert told.look("0,2-3") == ["save outcome"] * 3
    assert told.result(requests[0]) == {1}
    assert type(told.error(requests[1])) is type(told.error(requests[2]))


def test_who_waits_and_whose_time_is_over_at_one_moment_share_a_look() -> None:
    told = Story("0-1")
    request = unplug(1, timeout=5.0)
    told.ask(request)
    told.accept(1)
    wait = Wait(told.state.removals[1], 5.0)
    told.ask(wait)
    assert told.wait(5) == ["look"]
    assert told.look("0") == ["save outcome"]
    assert told.result(request) == {1}
    assert told.result(wait) == Unplugged(VcpuMap([1]), seconds=5.0)


def test_a_look_that_somebody_waits_for_takes_a_second_at_most() -> None:
    told = Story("0-1")
    request = unplug(1, timeout=5.0)
    told.ask(request)
    told.accept(1)
    assert told.wait(5) == ["look"]
    assert told.deadline == told.now + 1.0
    assert told.wait(1) == ["save outcome"]
    assert told.is_settled(request)
    assert told.look("0") == [], "it comes too late for the caller, and is taken in"
    assert told.state.layout.enabled == {0}


def test_a_refresh_reads_what_it_asks_for() -> None:
    told = Story("0")
    everything, slots = Refresh(), Refresh(Read.SLOTS, status=False)
    assert told.ask(everything) == ["look closely"]
    assert told.looks[0].status
    assert told.ask(slots) == ["look"]
    told.look("0-1")
    assert told.result(everything) is True
    told.fail_to_look()
    assert isinstance(told.error(slots), MonitorTimeoutError)
    assert told.state.layout.enabled == {0, 1}


def test_a_refresh_whose_caller_goes_away_is_settled_once() -> None:
    told = Story("0")
    request = Refresh()
    told.ask(request)
    told.cancel(request)
    told.look("0")
    assert told.is_settled(request)


def test_a_read_of_another_vm_s_slots_is_an_error_for_who_waits() -> None:
    told = Story("0")
    request = Refresh()
    told.ask(request)
    look = told.looks.popleft()
    told.tell(told._shown(look, told.state.layout.slots[:4]))
    assert "not those of the first read" in str(told.error(request))


# Waiting for an answer.


def waiting(timeout: float | None, *, works: bool = False) -> tuple[Story, Wait]:
    """Return a story in which somebody waits for the removal of vCPU 1, and that."""
    told = Story("0-1")
    request = unplug(1, result=Result.REMOVAL)
    told.ask(request)
    told.accept(1)
    if works:
        told.works(1)
    removal, joined = told.result(request)
    assert not joined
    wait = Wait(removal, timeout)
    told.ask(wait)
    return told, wait


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_who_waits_is_told_the_answer(timeout: float | None) -> None:
    told, wait = waiting(timeout)
    told.wait(2)
    told.refuses(1)
    assert told.result(wait) == Refused(VcpuMap([1]), 0x82, "device is busy", seconds=2.0)
    again = Wait(wait.removal, 0.0)
    told.ask(again)
    assert told.result(again) == told.result(wait)


def test_who_does_not_want_to_wait_is_told_that_it_is_pending_and_nothing_is_read() -> None:
    told, wait = waiting(0.0, works=True)
    assert told.result(wait) == Pending(VcpuMap([1]), acknowledged=True, seconds=0.0)
    assert not told.looks
    assert isinstance(told.events[-1], UnplugPending)


def test_who_has_waited_long_enough_is_told_that_it_is_pending_after_a_look() -> None:
    told, wait = waiting(5.0)
    assert told.wait(5) == ["look"]
    assert not told.is_settled(wait)
    assert told.look("0-1") == []
    assert told.result(wait) == Pending(VcpuMap([1]), acknowledged=False, seconds=5.0)
    again = Wait(wait.removal, None)
    told.ask(again)
    told.ejects(1)
    assert told.result(again) == Unplugged(VcpuMap([1]), seconds=5.0)
    assert told.events[-1].late  # type: ignore[attr-defined]


def test_who_waits_for_ever_has_no_deadline_and_may_go_away() -> None:
    told, wait = waiting(None)
    assert told.deadline is None
    told.cancel(wait)
    assert told.is_settled(wait)
    assert not told.engine._waits
    assert told.ejects(1) == []


def test_who_waits_for_what_another_qemu_makes_void_gets_an_error() -> None:
    told, wait = waiting(None)
    told.engine._reconnects = True
    told.pause()
    told.resume("0-1", same_instance=False)
    assert "QEMU was replaced before the answer" in str(told.error(wait))


# In the background.


def test_what_events_do_not_tell_is_read_once_at_a_time() -> None:
    told = Story("0")
    told.ost(5, 0, source=1)  # somebody else's plug
    assert [look.read for look in told.in_background] == [Read.FULL]
    assert told.engine.is_reading
    told.tell(WantRead(Read.SLOTS))
    assert len(told.in_background) == 1
    told.tell(told._shown(told.in_background.popleft()))
    assert [look.read for look in told.in_background] == [Read.SLOTS]
    told.tell(told._shown(told.in_background.popleft()))
    assert not told.engine.is_reading
    assert told.background_reads == [None, None]


def test_a_read_in_the_background_that_fails_is_tried_again_after_a_growing_pause() -> None:
    told = Story("0")
    told.tell(WantRead(Read.SLOTS))
    pauses = []
    for _ in range(8):
        told.fail_to_read()
        assert told.deadline is not None
        pauses.append(round(told.deadline - told.now, 6))
        assert not told.in_background
        told.wait(pauses[-1])
        assert [look.read for look in told.in_background] == [Read.SLOTS]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert len(told.background_reads) == 8
    assert None not in told.background_reads
    told.tell(told._shown(told.in_background.popleft()))
    assert told.deadline is None
    told.tell(WantRead(Read.SLOTS))
    told.fail_to_read()
    assert told.deadline == told.now + 0.05


def test_a_doubt_does_not_wait_for_the_pause() -> None:
    told = Story("0")
    told.tell(WantRead(Read.SLOTS))
    told.fail_to_read()
    told.tell(WantRead(Read.FULL))
    assert [look.read for look in told.in_background] == [Read.FULL]


def test_what_no_event_announces_is_found_at_intervals() -> None:
    told = Story("0", resync_interval=30.0)
    assert told.deadline == 31.0
    told.wait(30)
    assert [look.read for look in told.in_background] == [Read.FULL]
    told.read("0-1")
    assert told.state.layout.enabled == {0, 1}
    assert told.deadline == 61.0
    told.wait(30)
    assert told.in_background


def test_events_are_told_before_the_end_of_what_they_lead_to() -> None:
    told = Story("0", recorded=False)
    single = plug(1)
    told.ask(single)
    effects = told.engine.receive(Accepted(told.sent[1][0].number), told.now)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(Publish) < kinds.index(Settle)
    published = next(effect for effect in effects if isinstance(effect, Publish))
    assert [type(event) for event in published.events] == [VcpuPlugged]


# A map that is stopped, and the end.


def test_nothing_to_stop_is_told_as_nothing() -> None:
    told = Story("0")
    request = StopRunning()
    told.ask(request)
    assert told.result(request) is None


def test_who_stops_a_map_is_told_what_became_of_it_as_is_its_caller() -> None:
    told = Story("0", "0-3", in_flight=1)
    a_map = told.change
    assert a_map is not None
    first, second = StopRunning(), StopRunning()
    assert told.tell(first, second) == []
    assert told.accept(1) == ["save outcome"]
    assert told.result(first) == told.result(second) == told.error(a_map).report  # type: ignore[attr-defined]
    assert told.result(first).cancelled


def test_a_map_that_is_only_being_looked_at_is_stopped_once_it_is_planned() -> None:
    told = Story("0", "0-3", first_looks_wait=True)
    stopping = StopRunning()
    assert told.ask(stopping) == []
    assert told.result(stopping) is None  # there is no report yet
    assert told.see(first=True) == ["save intent", "save outcome"]
    assert told.report.cancelled
    assert told.verdicts == {1: "not sent", 2: "not sent", 3: "not sent"}


def test_who_stops_a_map_that_cannot_be_planned_is_told_of_none() -> None:
    told = Story("0", "0-3", first_looks_wait=True)
    stopping = StopRunning()
    told.ask(stopping)
    told.see(failed="no", first=True)
    assert told.result(stopping) is None


def test_before_this_side_closes_a_map_is_stopped_and_nothing_is_begun() -> None:
    told = Story("0", "0-3", in_flight=1)
    a_map, waiting = told.change, plug(5)
    told.ask(waiting)
    assert told.tell(Stop()) == []
    assert isinstance(told.error(waiting), MonitorLostError)
    late = plug(6)
    assert told.ask(late) == []
    assert isinstance(told.error(late), MonitorLostError)
    assert told.accept(1) == ["save outcome"]
    assert a_map is not None
    assert told.error(a_map).report.cancelled  # type: ignore[attr-defined]


def test_a_map_that_may_be_tried_again_is_planned_anew_before_others() -> None:
    told = Story("0-1", last_looks_wait=True)
    told.ask(whole_map("0", tries=2))
    single = plug(3)
    told.ask(single)
    told.accept(1)
    assert told.ejects(1) == ["last look"]
    assert told.see("0,2") == ["last look"]  # what nobody could know of: somebody has plugged one
    assert told.see("0,2") == ["save outcome", "save intent", "del 2"]
    told.accept(2)
    told.ejects(2)
    told.see()
    assert told.sent.keys() == {3}


def test_it_is_not_tried_for_ever() -> None:
    told = Story("0-1", last_looks_wait=True)
    told.ask(whole_map("0", tries=1))
    told.accept(1)
    told.ejects(1)
    told.see("0,2")
    assert told.see("0,2") == ["save outcome"]
    assert told.outcome == "PARTIAL"


def test_a_vm_that_arrives_brings_its_removals_and_what_was_asked_for() -> None:
    told = Story("0-2")
    told.tell(Arrived(VcpuMap([1]), {1: OstAnswer(3, 0x84)}, VcpuMap([0, 2])))
    assert told.state.layout.pending == {1}
    assert told.state.removals[1].state is State.WORKING
    assert told.engine.intentions.desired == {0, 2}
