"""The state of a VM after a gap, and at attach: what it missed, what a record remembers, and what nobody knows."""

import pytest

from qmpvcpu import MalformedReplyError, Plugged, VcpuMap, qapi
from qmpvcpu.engine.removal import Evidence, Removal, State
from qmpvcpu.engine.steprun import why
from qmpvcpu.engine.vmstate import Read, VmState
from qmpvcpu.events import InstanceChanged, Origin, UnplugAcknowledged, UnplugRefused, VcpuPlugged, VcpuUnplugged
from qmpvcpu.model.layout import CpuProps
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.qapi import ThreadReading
from tests.engine.story import RUNNING, make_state, path, read_slots

WORKS = OstAnswer(3, 0x84)
BUSY = OstAnswer(3, 0x82)


def requested(subject: VmState, vcpu: int = 1) -> Removal:
    removal = subject.unplug_sent(vcpu, 1.0)
    subject.unplug_replied(removal, Evidence.ACCEPTED, 1.0)
    subject.take_events()
    return removal


def come_back(
    subject: VmState, present: str, answers: dict[int, OstAnswer] | None = None, *, same_instance: bool = True
) -> list[str]:
    enabled = VcpuMap.parse(present)
    threads = tuple(ThreadReading(path(v), 100 + v, v, CpuProps({})) for v in enabled)
    slots = read_slots({v: path(v) for v in enabled})
    subject.resync(slots, threads, status=RUNNING, answers=answers or {}, same_instance=same_instance, now=9.0)
    return [f"{type(event).__name__} {event.origin.value}" for event in subject.take_events()]


# A gap.


def test_a_gap_in_which_nothing_happened_is_one_event() -> None:
    subject = make_state("0-1")
    subject.status = None
    removal = requested(subject)
    assert come_back(subject, "0-1") == ["Reconnected unknown"]
    assert removal.state is State.REQUESTED
    assert subject.status == RUNNING


def test_what_went_in_the_gap_is_gone_and_its_removal_is_settled() -> None:
    subject = make_state("0-2")
    removal = requested(subject)
    assert come_back(subject, "0") == [
        "VcpuUnplugged us",
        "VcpuUnplugged unknown",
        "LayoutChanged unknown",
        "Reconnected unknown",
    ]
    assert removal.state is State.UNPLUGGED
    assert removal.settled_at == 9.0
    assert subject.take_changed_removals() == [removal]


def test_a_removal_that_the_guest_took_up_in_the_gap_is_worked_on() -> None:
    subject = make_state("0-2")
    removal = requested(subject)
    come_back(subject, "0-2", {1: WORKS, 2: WORKS})
    assert removal.state is State.WORKING
    assert subject.removals[2].origin is Origin.UNKNOWN  # by whom it was asked for, nobody tells
    assert subject.layout.pending == VcpuMap.parse("1-2")
    come_back(subject, "0-2", {1: WORKS, 2: WORKS})
    assert subject.removals[1] is removal


def test_a_refusal_in_the_gap_ends_what_the_guest_worked_on() -> None:
    subject = make_state("0-1")
    removal = requested(subject)
    subject.receive(qapi.OstEvent(1, WORKS), 2.0)
    subject.take_events()
    assert come_back(subject, "0-1", {1: BUSY}) == ["UnplugRefused us", "Reconnected unknown"]
    assert (removal.state, removal.code) == (State.REFUSED, 0x82)
    assert not subject.layout.pending


def test_a_refusal_that_is_new_ends_a_request_whose_taking_up_was_missed() -> None:
    subject = make_state("0-1", answers={1: OstAnswer(3, 0x81)})
    removal = requested(subject)
    assert come_back(subject, "0-1", {1: BUSY}) == ["UnplugRefused us", "Reconnected unknown"]
    assert removal.state is State.REFUSED


def test_the_refusal_from_before_may_be_an_old_one_and_the_request_may_be_made_again() -> None:
    subject = make_state("0-1")
    subject.receive(qapi.OstEvent(1, BUSY), 0.5)  # somebody else was refused
    removal = requested(subject)
    assert come_back(subject, "0-1", {1: BUSY}) == ["Reconnected unknown"]
    assert removal.state is State.REQUESTED
    assert removal.may_ask_again
    assert subject.layout.pending == {1}
    assert requested(subject) is removal


@pytest.mark.parametrize("works", [True, False])
def test_a_success_in_the_gap_that_a_later_read_does_not_bear_out_is_none(*, works: bool) -> None:
    subject = make_state("0-1")
    removal = requested(subject)
    if works:
        subject.receive(qapi.OstEvent(1, WORKS), 2.0)
    come_back(subject, "0-1", {1: OstAnswer(3, 0)})
    assert not removal.state.is_final
    assert subject.wanted_read is Read.SLOTS
    read = subject.read_sent(Read.SLOTS)
    subject.observed(read, read_slots({0: path(0), 1: path(1)}), None, 10.0)
    assert removal.state is (State.REFUSED if works else State.REQUESTED)
    assert works or removal.may_ask_again


def test_an_answer_to_a_plug_tells_nothing_of_a_removal() -> None:
    subject = make_state("0-1")
    requested(subject)
    come_back(subject, "0-1", {1: OstAnswer(1, 0), 0: OstAnswer(0, 0), 5: WORKS})
    assert subject.layout.pending == {1}


def test_a_plug_of_ours_that_nobody_knew_of_is_ours_when_it_is_found() -> None:
    subject = make_state("0")
    subject.plug_sent(1)
    subject.plug_sent(2)
    subject.plug_lost(1)
    subject.plug_lost(1)
    subject.plug_lost(2)
    assert subject.situation.in_flight == frozenset()
    assert come_back(subject, "0-1,3") == [
        "VcpuPlugged us",
        "VcpuPlugged other",
        "LayoutChanged unknown",
        "Reconnected unknown",
    ]
    assert come_back(subject, "0-3")[0] == "VcpuPlugged other"  # that one was not carried out


def test_other_slots_than_before_are_not_taken_in() -> None:
    subject = make_state("0")
    subject.status = VmStatus("paused")
    with pytest.raises(MalformedReplyError, match="not those of the first read"):
        subject.resync(read_slots({0: path(0)}, 4), (), status=RUNNING, answers={}, same_instance=True, now=9.0)
    assert subject.status == VmStatus("paused")
    assert subject.take_events() == []


def test_a_lost_reply_is_unknown_and_no_longer_in_the_way() -> None:
    subject = make_state("0-1")
    removal = subject.unplug_sent(1, 1.0)
    subject.unplug_replied(removal, Evidence.LOST, 2.0)
    assert removal.state is State.UNKNOWN
    assert subject.removals == {}
    assert subject.take_changed_removals() == [removal]
    assert subject.take_events() == []


# Another QEMU.


def test_another_qemu_makes_void_what_was_pending() -> None:
    subject = make_state("0-3")
    pending, sent = requested(subject), subject.unplug_sent(2, 1.0)
    subject.maybe_queued_twice.add(3)
    subject.take_events()
    assert come_back(subject, "0-2", {5: OstAnswer(1, 0)}, same_instance=False) == [
        "InstanceChanged unknown",
        "VcpuUnplugged unknown",
        "LayoutChanged unknown",
        "Reconnected unknown",
    ]
    assert {pending.state, sent.state} == {State.UNKNOWN}
    assert subject.removals == {}
    assert not subject.layout.pending
    assert subject.maybe_queued_twice == set()
    # What this QEMU has created is counted anew.
    assert (subject.situation.created, subject.situation.unplug_seen) == (4, True)


def test_what_another_qemus_guest_works_on_is_joined() -> None:
    subject = make_state("0-1")
    come_back(subject, "0-1", {1: WORKS}, same_instance=False)
    assert subject.removals[1].state is State.WORKING


def test_that_it_is_another_qemu_can_be_told_at_attach() -> None:
    subject = make_state("0")
    subject.tell_instance_changed()
    (event,) = subject.take_events()
    assert isinstance(event, InstanceChanged)


# A record.


def test_what_the_record_knows_to_be_pending_is_pending_again() -> None:
    subject = make_state("0-3", answers={2: WORKS})
    subject.known_from_record({1, 2, 3, 5}, {2: WORKS, 3: BUSY, 1: OstAnswer(1, 0)}, 1.0)
    assert subject.layout.pending == VcpuMap.parse("1-2")  # 3 was refused since, 5 is gone
    found = subject.removals[1]
    assert (found.state, found.may_ask_again, found.overdue) == (State.REQUESTED, True, True)
    assert not subject.removals[2].may_ask_again
    subject.take_events()
    subject.receive(qapi.OstEvent(1, WORKS), 2.0)
    assert not found.may_ask_again  # now the guest works on it
    subject.receive(qapi.Deleted(path(1)), 3.0)
    acknowledged, gone = subject.take_events()
    assert isinstance(acknowledged, UnplugAcknowledged)
    assert isinstance(gone, VcpuUnplugged)
    assert gone.late


def test_a_removal_of_the_record_may_be_refused_late() -> None:
    subject = make_state("0-1")
    subject.known_from_record({1}, {}, 1.0)
    subject.take_events()
    subject.receive(qapi.OstEvent(1, BUSY), 2.0)
    (event,) = subject.take_events()
    assert isinstance(event, UnplugRefused)
    assert event.late
    assert not subject.layout.pending


# What changes nothing.


def test_news_of_other_cpus_and_of_nothing_known_change_nothing() -> None:
    subject = make_state("0")
    subject.plug_sent(1)
    before = subject.layout
    subject.receive(qapi.Deleted("/machine/peripheral/else"), 1.0)
    subject.receive(None, 1.0)  # type: ignore[arg-type] # what a newer parse_event might hand on
    assert subject.layout is before
    assert subject.take_events() == []
    subject.plug_accepted(1, 1.0)
    (event,) = subject.take_events()
    assert isinstance(event, VcpuPlugged)
    assert subject.wanted_read is Read.NONE


def test_success_needs_no_reason() -> None:
    assert why(Plugged(VcpuMap([1]))) == ""
