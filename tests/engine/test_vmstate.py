"""What is known of one VM, fed with what QEMU says in any order."""

from dataclasses import replace
from typing import Any

import pytest

from qmpvcpu import Layout, MalformedReplyError, qapi
from qmpvcpu.engine.removal import Evidence, Removal, State
from qmpvcpu.engine.vmstate import Read, VmState
from qmpvcpu.events import (
    Event,
    LayoutChanged,
    MigrationChanged,
    Origin,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlugged,
    VcpuUnplugged,
    VmReset,
    VmResumed,
    VmStopped,
)
from qmpvcpu.model.guest import GuestOs
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.qapi import ThreadReading
from tests.layouts import KVM, layout

BOOT = "/machine/unattached/device[0]"
FIRST_PATH = "/machine/peripheral/vcpu1"


def slots(*present: int, count: int = 4) -> tuple[Slot, ...]:
    return layout({vcpu: "ours" if vcpu else "boot" for vcpu in present}, slots=count, first_tid=100).slots


def threads(*present: int) -> tuple[ThreadReading, ...]:
    return tuple(
        ThreadReading(f"/machine/peripheral/vcpu{vcpu}" if vcpu else BOOT, 100 + vcpu, vcpu, CpuProps({}))
        for vcpu in present
    )


def known(*present: int, **changes: Any) -> VmState:
    start = Layout(vm=KVM, slots=slots(*present), creation=present)
    given: dict[str, Any] = {"status": VmStatus("running"), "single_threaded": None, "answers": {}, "now": 0.0}
    return VmState(start, **{**given, **changes})


def ost(vcpu: int, code: int, *, source: int = 3) -> qapi.OstEvent:
    return qapi.OstEvent(vcpu, OstAnswer(source, code))


def deleted(vcpu: int) -> qapi.Deleted:
    return qapi.Deleted(f"/machine/peripheral/vcpu{vcpu}")


def wanted(subject: VmState) -> Read:
    # A function, since type checkers take an attribute that was compared once for constant.
    return subject.wanted_read


def state(removal: Removal) -> State:
    return removal.state


def words(subject: VmState) -> list[str]:
    return [f"{type(event).__name__} {event.origin.value}" for event in subject.take_events()]


def requested(subject: VmState, vcpu: int = 1, *, now: float = 1.0) -> Removal:
    removal = subject.unplug_sent(vcpu, now)
    subject.unplug_replied(removal, Evidence.ACCEPTED, now)
    return removal


# Plug.


def test_an_accepted_plug_fills_the_slot_without_a_read() -> None:
    subject = known(0)
    subject.plug_sent(2)
    assert subject.situation.in_flight == {2}
    assert subject.situation.created == 2
    assert subject.layout.enabled == {0}
    subject.plug_accepted(2, 1.0)
    assert subject.layout.enabled == {0, 2}
    assert subject.layout.order == (0, 2)
    assert subject.layout[2].qom_path == "/machine/peripheral/vcpu2"
    assert wanted(subject) is Read.NONE
    assert words(subject) == ["VcpuPlugged us"]
    assert subject.situation.created == 2


def test_an_acknowledgement_that_overtakes_the_reply_is_kept() -> None:
    subject = known(0)
    subject.plug_sent(2)
    subject.receive(ost(2, 0, source=1), 1.0)
    assert wanted(subject) is Read.NONE
    subject.plug_accepted(2, 1.0)
    assert subject.layout[2].acknowledged is True


def test_an_acknowledgement_after_the_reply_may_be_a_failure() -> None:
    subject = known(0)
    subject.plug_sent(2)
    subject.plug_accepted(2, 1.0)
    assert subject.layout[2].acknowledged is None
    subject.receive(ost(2, 0x80, source=1), 1.0)  # insertion in progress
    assert subject.layout[2].acknowledged is None
    subject.receive(ost(2, 1, source=1), 1.0)
    assert subject.layout[2].acknowledged is False


def test_a_plug_that_is_ejected_before_its_reply_is_found_gone_by_a_read() -> None:
    subject = known(0)
    subject.plug_sent(2)
    subject.receive(ost(2, 0x84), 1.0)
    subject.receive(deleted(2), 1.0)
    early = subject.read_sent(Read.FULL)
    subject.plug_accepted(2, 1.0)
    subject.observed(early, slots(0), threads(0), 2.0)  # sent before the reply: it tells nothing of the slot
    assert subject.layout.enabled == {0, 2}
    assert wanted(subject) is Read.SLOTS
    subject.observed(subject.read_sent(Read.SLOTS), slots(0), None, 2.0)
    assert subject.layout.enabled == {0}
    assert words(subject) == ["VcpuPlugged us", "VcpuUnplugged unknown", "LayoutChanged unknown"]
    assert subject.maybe_queued_twice == {2}


def test_the_late_event_of_the_last_cpu_in_a_slot_does_not_empty_it() -> None:
    subject = known(0, 2)
    removal = requested(subject, 2)
    subject.receive(ost(2, 0x84), 1.0)
    subject.observed(subject.read_sent(Read.SLOTS), slots(0), None, 2.0)
    assert state(removal) is State.UNPLUGGED
    subject.plug_sent(2)
    subject.receive(deleted(2), 3.0)  # before the reply to the device_add, and of the CPU before
    subject.plug_accepted(2, 1.0)
    assert subject.layout.enabled == {0, 2}
    assert wanted(subject) is Read.SLOTS
    subject.observed(subject.read_sent(Read.SLOTS), slots(0, 2), None, 4.0)
    assert words(subject)[-1] == "VcpuPlugged us"
    assert subject.situation.created == 3


@pytest.mark.parametrize("plugged_by_us", [True, False])
def test_an_event_that_a_read_has_spent_ends_no_later_removal_of_the_same_path(*, plugged_by_us: bool) -> None:
    subject = known(0, 2)
    requested(subject, 2)
    subject.observed(subject.read_sent(Read.SLOTS), slots(0), None, 2.0)
    if plugged_by_us:
        subject.plug_sent(2)
        subject.plug_accepted(2, 1.0)
    else:
        subject.observed(subject.read_sent(Read.FULL), slots(0, 2), threads(0, 2), 2.0)
    removal = requested(subject, 2)
    subject.receive(deleted(2), 3.0)
    assert state(removal) is State.REQUESTED
    assert wanted(subject) is Read.SLOTS
    subject.observed(subject.read_sent(Read.SLOTS), slots(0, 2), None, 4.0)
    assert state(removal) is State.REQUESTED
    subject.receive(deleted(2), 5.0)
    assert state(removal) is State.UNPLUGGED
    assert subject.layout.enabled == {0}


def test_paths_that_come_and_go_without_an_event_are_not_kept_for_ever() -> None:
    subject = known(0)
    for number in range(100):
        there = list(slots(0, 2))
        there[2] = replace(there[2], qom_path=f"/machine/peripheral/other{number}")
        subject.observed(subject.read_sent(Read.SLOTS), tuple(there), None, 1.0)
        subject.observed(subject.read_sent(Read.SLOTS), slots(0), None, 1.0)
    assert len(subject._late) <= len(subject.layout.slots)


def test_a_rejected_plug_leaves_nothing_behind() -> None:
    subject = known(0)
    subject.plug_sent(2)
    subject.receive(ost(2, 0, source=1), 1.0)
    subject.plug_failed(2)
    assert subject.situation.in_flight == frozenset()
    assert subject.layout.enabled == {0}
    subject.plug_accepted(2, 1.0)  # a late word changes nothing
    assert subject.layout.enabled == {0}


def test_a_read_proves_a_plug_whose_reply_is_overdue() -> None:
    subject = known(0)
    subject.plug_sent(2)
    sent = subject.read_sent(Read.FULL)
    subject.observed(sent, slots(0, 2), threads(0, 2), 1.0)
    assert subject.layout.enabled == {0, 2}
    subject.plug_accepted(2, 1.0)
    assert words(subject) == ["VcpuPlugged us"]


def test_a_read_without_a_plug_that_is_in_flight_says_nothing_about_it() -> None:
    subject = known(0)
    subject.plug_sent(2)
    subject.observed(subject.read_sent(Read.FULL), slots(0), threads(0), 1.0)
    assert subject.situation.in_flight == {2}
    assert words(subject) == []


# Unplug.


def test_the_path_under_kvm() -> None:
    subject = known(0, 1)
    removal = subject.unplug_sent(1, 1.0)
    assert not subject.layout.pending
    subject.unplug_replied(removal, Evidence.ACCEPTED, 1.1)
    assert subject.layout.pending == {1}
    subject.receive(ost(1, 0x84), 1.2)
    subject.receive(qapi.Deleted(FIRST_PATH + "/lapic"), 1.2)
    assert subject.layout.enabled == {0, 1}  # a child is not its parent
    subject.receive(deleted(1), 1.5)
    subject.receive(ost(1, 0), 1.6)
    assert subject.layout.enabled == {0}
    assert not subject.layout.pending
    assert wanted(subject) is Read.NONE
    assert state(removal) is State.UNPLUGGED
    assert removal.seconds == 0.5
    assert words(subject) == ["UnplugRequested us", "UnplugAcknowledged us", "VcpuUnplugged us"]
    assert subject.take_touched() == {1}
    assert subject.take_touched() == set()
    assert subject.take_changed_removals() == [removal]
    assert subject.take_changed_removals() == []


def test_every_event_may_overtake_the_reply() -> None:
    subject = known(0, 1)
    removal = subject.unplug_sent(1, 1.0)
    subject.receive(ost(1, 0x84), 1.0)
    subject.receive(deleted(1), 1.0)
    subject.receive(ost(1, 0), 1.0)
    subject.unplug_replied(removal, Evidence.ACCEPTED, 1.1)
    assert state(removal) is State.UNPLUGGED
    assert words(subject) == ["UnplugRequested us", "UnplugAcknowledged us", "VcpuUnplugged us"]


def test_under_tcg_success_is_a_reason_to_read_and_the_read_is_the_proof() -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(ost(1, 0x84), 1.0)
    subject.receive(ost(1, 0), 1.0)
    assert state(removal) is State.WORKING
    assert wanted(subject) is Read.SLOTS
    sent = subject.read_sent(Read.SLOTS)
    assert wanted(subject) is Read.NONE
    subject.observed(sent, slots(0), None, 2.0)
    assert state(removal) is State.UNPLUGGED
    assert subject.layout.enabled == {0}


def test_a_guest_that_says_success_and_keeps_the_vcpu_has_refused() -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(ost(1, 0x84), 1.0)
    early = subject.read_sent(Read.SLOTS)
    subject.receive(ost(1, 0), 1.0)
    subject.observed(early, slots(0, 1), None, 2.0)  # sent before it said so
    assert state(removal) is State.WORKING
    assert wanted(subject) is Read.SLOTS
    subject.observed(subject.read_sent(Read.SLOTS), slots(0, 1), None, 2.0)
    assert (removal.state, removal.code) == (State.REFUSED, 0)
    assert removal.reason == "it answered success, and the vCPU is still there"
    assert not subject.layout.pending
    assert subject.layout.enabled == {0, 1}
    assert words(subject)[-1] == "UnplugRefused us"


def test_a_success_that_may_be_of_an_earlier_removal_is_no_refusal_but_lets_us_ask_again() -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(ost(1, 0), 1.0)
    subject.observed(subject.read_sent(Read.SLOTS), slots(0, 1), None, 2.0)
    assert (removal.state, removal.may_ask_again) == (State.REQUESTED, True)
    assert subject.layout.pending == {1}


def test_a_refusal_is_known_at_once_and_another_request_may_follow() -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(ost(1, 0x84), 1.0)
    subject.receive(ost(1, 0x82), 1.1)
    assert (removal.state, removal.code, removal.reason) == (State.REFUSED, 0x82, "device is busy")
    assert subject.removals == {}
    assert subject.layout.enabled == {0, 1}
    assert not subject.layout.pending
    again = requested(subject)
    assert again is not removal
    assert subject.layout.pending == {1}


def test_the_machine_that_has_no_ost_refuses_by_guest_error() -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(qapi.GuestError(FIRST_PATH), 1.0)
    assert (removal.state, removal.code) == (State.REFUSED, None)
    subject.receive(qapi.GuestError("/machine/peripheral/else"), 1.0)
    assert words(subject) == ["UnplugRequested us", "UnplugRefused us"]


def test_a_rejection_leaves_the_vcpu_as_it_was() -> None:
    subject = known(0, 1)
    removal = subject.unplug_sent(1, 1.0)
    subject.unplug_replied(removal, Evidence.REJECTION, 1.0)
    assert state(removal) is State.REJECTED
    assert subject.removals == {}
    assert words(subject) == []


@pytest.mark.parametrize("answer", ["gone", "refused"])
def test_an_answer_after_the_deadline_is_late(answer: str) -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(ost(1, 0x84), 1.0)
    subject.deadline_passed(removal)
    subject.deadline_passed(removal)  # a second waiter tells nothing new
    events = subject.take_events()
    assert [e for e in events if isinstance(e, UnplugPending)] == [
        UnplugPending(generation=1, origin=Origin.US, ids=removal.ids, acknowledged=True)
    ]
    subject.receive(deleted(1) if answer == "gone" else ost(1, 0x81), 9.0)
    (late,) = subject.take_events()
    assert isinstance(late, VcpuUnplugged | UnplugRefused)
    assert late.late
    subject.deadline_passed(removal)
    assert subject.take_events() == []


def test_a_reset_makes_a_removal_latent_and_another_hotplug_fires_it() -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(ost(1, 0x84), 1.0)
    subject.receive(qapi.RunEvent.RESET, 2.0)
    assert state(removal) is State.REQUESTED
    assert subject.layout.pending == {1}
    subject.receive(ost(1, 0x84), 3.0)
    subject.receive(deleted(1), 3.0)
    assert state(removal) is State.UNPLUGGED
    assert subject.maybe_queued_twice == set()
    assert any(isinstance(event, VmReset) for event in subject.take_events())


def test_a_second_0x84_marks_the_slot_as_maybe_queued_twice() -> None:
    subject = known(0, 1)
    requested(subject)
    subject.receive(ost(1, 0x84), 1.0)
    subject.receive(ost(1, 0x84), 1.0)
    assert subject.maybe_queued_twice == {1}
    subject = known(0)
    subject.receive(ost(1, 0x84), 1.0)  # the guest ejects what is not there
    assert subject.maybe_queued_twice == {1}
    assert wanted(subject) is Read.FULL


# Others.


def test_a_foreign_removal_is_adopted_when_the_guest_works_on_it() -> None:
    subject = known(0, 1)
    subject.receive(ost(1, 0x84), 1.0)
    assert subject.layout.pending == {1}
    assert subject.removals[1].origin is Origin.OTHER
    subject.receive(deleted(1), 1.0)
    assert words(subject) == ["UnplugRequested other", "UnplugAcknowledged other", "VcpuUnplugged other"]


def test_a_foreign_removal_that_nobody_announced_is_an_event_too() -> None:
    subject = known(0, 1)
    subject.receive(deleted(1), 1.0)
    assert words(subject) == []  # it may be of the CPU before
    assert wanted(subject) is Read.SLOTS
    subject.observed(subject.read_sent(Read.SLOTS), slots(0), None, 2.0)
    assert words(subject) == ["VcpuUnplugged unknown", "LayoutChanged unknown"]
    subject = known(0, 1)
    subject.receive(ost(1, 0x82), 1.0)
    assert words(subject) == ["UnplugRefused other"]
    subject.receive(ost(1, 0), 1.0)
    assert wanted(subject) is Read.SLOTS


def test_a_foreign_plug_is_read_when_the_guest_acknowledges_it() -> None:
    subject = known(0)
    subject.receive(ost(2, 0, source=1), 1.0)
    assert wanted(subject) is Read.FULL
    seen = list(slots(0, 2))
    seen[2] = replace(seen[2], qom_path="/machine/peripheral/cpu-x")
    reading = (*threads(0), ThreadReading("/machine/peripheral/cpu-x", 102, 2, CpuProps({})))
    subject.observed(subject.read_sent(Read.FULL), tuple(seen), reading, 2.0)
    assert subject.layout[2].device_id == "cpu-x"
    assert subject.layout[2].host_tid == 102
    assert subject.layout.order == (0, 2)
    assert words(subject) == ["VcpuPlugged other", "LayoutChanged unknown"]


def test_a_slot_beyond_the_first_read_makes_us_read() -> None:
    subject = known(0)
    subject.receive(ost(99, 0, source=1), 1.0)
    assert wanted(subject) is Read.FULL


def test_removal_and_replug_by_others_between_two_reads_is_two_changes() -> None:
    subject = known(0, 1)
    seen = list(slots(0, 1))
    seen[1] = replace(seen[1], qom_path="/machine/peripheral/theirs", host_tids=(None,))
    subject.observed(subject.read_sent(Read.SLOTS), tuple(seen), None, 1.0)
    assert subject.layout[1].device_id == "theirs"
    assert words(subject) == ["VcpuUnplugged unknown", "VcpuPlugged other", "LayoutChanged unknown"]
    assert wanted(subject) is Read.FULL


# Reads.


def test_a_read_that_was_sent_before_a_change_does_not_undo_it() -> None:
    subject = known(0, 1)
    sent = subject.read_sent(Read.FULL)
    subject.plug_sent(2)
    subject.plug_accepted(2, 1.0)
    requested(subject)
    subject.receive(deleted(1), 1.0)
    subject.observed(sent, slots(0, 1), threads(0, 1), 2.0)
    assert subject.layout.enabled == {0, 2}
    subject.observed(subject.read_sent(Read.FULL), slots(0, 2), threads(0, 2), 3.0)
    assert subject.layout.enabled == {0, 2}
    assert subject.layout[2].host_tid == 102


def test_a_read_that_agrees_changes_nothing_and_says_nothing() -> None:
    subject = known(0, 2)
    before = subject.layout
    subject.observed(subject.read_sent(Read.FULL), slots(0, 2), threads(0, 2), 1.0)
    assert subject.layout is before
    assert subject.take_events() == []
    assert subject.single_threaded is False


def test_the_creation_order_is_qemus() -> None:
    subject = known(0, 1, 2)
    subject.observed(subject.read_sent(Read.FULL), slots(0, 1, 2), threads(0, 2, 1), 1.0)
    assert subject.layout.order == (0, 2, 1)


def test_a_read_of_other_slots_than_the_first_is_refused() -> None:
    subject = known(0)
    with pytest.raises(MalformedReplyError, match="not those of the first read"):
        subject.observed(subject.read_sent(Read.FULL), slots(0, count=3), threads(0), 1.0)


def test_a_small_read_does_not_satisfy_the_wish_for_a_full_one() -> None:
    subject = known(0)
    subject.receive(ost(2, 0, source=1), 1.0)
    subject.read_sent(Read.SLOTS)
    assert wanted(subject) is Read.FULL


def test_one_shared_thread_is_noticed() -> None:
    subject = known(0, 1)
    shared = tuple(thread._replace(host_tid=7) for thread in threads(0, 1))
    seen = tuple(replace(slot, host_tids=(None,) if slot.present else ()) for slot in slots(0, 1))
    subject.observed(subject.read_sent(Read.FULL), seen, shared, 1.0)
    assert subject.situation.single_threaded is True


# At attach, and the run state.


def test_what_the_guest_worked_on_at_attach_is_joined() -> None:
    subject = known(0, 1, answers={1: OstAnswer(3, 0x84)})
    assert subject.layout.pending == {1}
    assert subject.removals[1].state is State.WORKING
    assert subject.removals[1].origin is Origin.UNKNOWN
    refused = known(0, 1, answers={1: OstAnswer(3, 0x82), 0: OstAnswer(0, 0)})
    assert refused.removals == {}


def test_an_empty_slot_that_was_answered_for_was_filled_once() -> None:
    fresh = known(0, 1, answers={number: OstAnswer(0, 0) for number in range(4)})
    assert (fresh.situation.created, fresh.situation.unplug_seen) == (2, False)
    used = known(0, 1, answers={2: OstAnswer(3, 0), 3: OstAnswer(0, 0)})
    assert (used.situation.created, used.situation.unplug_seen) == (3, True)


def test_the_run_state_is_known_until_qemu_says_that_it_changed() -> None:
    subject = known(0)
    subject.receive(qapi.RunEvent.STOP, 1.0)
    assert subject.status is None
    assert subject.situation.status.run_state == "unknown"
    subject.receive(qapi.RunEvent.RESUME, 1.0)
    assert subject.status == VmStatus("running")
    subject.receive(qapi.MigrationStatus("setup"), 1.0)
    assert subject.status is None
    kinds: list[type[Event]] = [type(event) for event in subject.take_events()]
    assert kinds == [VmStopped, VmResumed, MigrationChanged]


def test_events_name_the_layout_that_they_led_to() -> None:
    subject = known(0)
    subject.plug_sent(1)
    subject.plug_accepted(1, 1.0)
    (event,) = subject.take_events()
    assert isinstance(event, VcpuPlugged)
    assert event.generation == subject.layout.generation
    assert event.ids == {1}
    for kind in (LayoutChanged, UnplugAcknowledged, UnplugRequested):
        assert issubclass(kind, Event)


def test_removals_that_migrated_along_are_late_ones_of_ours_whether_the_guest_works_on_them_or_not() -> None:
    subject = known(0, 1, 2, 3)
    subject.arrived({1, 2}, {1: OstAnswer(3, 0x84), 2: OstAnswer(0, 0), 3: OstAnswer(3, 0x84)}, 5.0)
    assert subject.layout.pending == {1, 2, 3}  # of vCPU 3 nobody told us, the guest's own word did
    assert [state(subject.removals[vcpu]) for vcpu in (1, 2, 3)] == [State.WORKING, State.REQUESTED, State.WORKING]
    subject.take_events()
    for vcpu in (1, 2, 3):
        subject.receive(deleted(vcpu), 6.0)
    gone = [event for event in subject.take_events() if isinstance(event, VcpuUnplugged)]
    assert [(event.late, event.origin) for event in gone] == [
        (True, Origin.US),
        (True, Origin.US),
        (False, Origin.UNKNOWN),
    ]


def test_a_removal_that_was_refused_on_the_way_is_not_pending_after_it() -> None:
    subject = known(0, 1)
    subject.arrived({1}, {1: OstAnswer(3, 0x82)}, 5.0)
    assert subject.layout.pending == set()
    assert subject.removals == {}


def test_an_acknowledgement_that_crosses_a_read_hides_nothing_of_it() -> None:
    subject = known(0)
    subject.plug_sent(2)
    subject.plug_accepted(2, 1.0)
    sent = subject.read_sent(Read.FULL)
    subject.receive(ost(2, 0, source=1), 1.0)
    subject.observed(sent, slots(0, 2), threads(0, 2), 2.0)
    assert subject.layout[2].host_tid == 102
    assert subject.layout[2].acknowledged


def test_of_many_who_ask_for_a_forgotten_removal_again_one_sends_it() -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(qapi.RunEvent.RESET, 1.0)
    assert removal.may_ask_again
    assert subject.unplug_sent(1, 2.0) is removal
    assert not removal.may_ask_again  # so the next one joins
    subject.unplug_replied(removal, Evidence.LOST, 3.0)
    assert removal.may_ask_again


def test_a_guest_that_takes_the_removal_up_again_has_not_refused_it_by_an_earlier_success() -> None:
    subject = known(0, 1)
    removal = requested(subject)
    subject.receive(ost(1, 0x84), 1.0)
    subject.receive(ost(1, 0), 1.0)
    sent = subject.read_sent(Read.SLOTS)
    subject.receive(ost(1, 0x84), 1.5)
    subject.observed(sent, slots(0, 1), None, 2.0)
    assert state(removal) is State.WORKING


def test_the_event_of_a_cpu_that_left_before_we_came_is_not_the_next_ones() -> None:
    subject = known(0, answers={2: OstAnswer(3, 0)})
    subject.plug_sent(2)
    subject.plug_accepted(2, 1.0)
    removal = requested(subject, 2)
    subject.receive(deleted(2), 3.0)
    assert state(removal) is State.REQUESTED
    assert wanted(subject) is Read.SLOTS


def test_an_event_that_made_us_read_is_not_waited_for_again() -> None:
    subject = known(0, 2)
    subject.receive(deleted(2), 1.0)  # of a removal of somebody else's that we have not heard of
    subject.observed(subject.read_sent(Read.SLOTS), slots(0), None, 2.0)
    subject.plug_sent(2)
    subject.plug_accepted(2, 1.0)
    removal = requested(subject, 2)
    subject.receive(deleted(2), 3.0)
    assert state(removal) is State.UNPLUGGED


def test_a_cpu_that_took_the_path_of_another_while_we_were_away_is_known_by_its_thread() -> None:
    subject = known(0, 2)
    removal = requested(subject, 2)
    subject.receive(ost(2, 0x84), 1.0)
    swapped = tuple(replace(each, host_tids=(999,)) if each.first == 2 else each for each in slots(0, 2))
    subject.resync(
        swapped, threads(0, 2), status=VmStatus("running"), answers={2: OstAnswer(1, 0)}, same_instance=True, now=2.0
    )
    assert state(removal) is State.UNPLUGGED
    assert not subject.layout.pending
    assert subject.layout[2].host_tid == 999
    again = requested(subject, 2)
    subject.receive(deleted(2), 3.0)  # of the CPU before
    assert state(again) is State.REQUESTED


# What the guest is, and has been through.


def test_a_guest_has_answered_until_it_starts_anew() -> None:
    subject = known(0, 1)
    assert subject.situation.unheard
    subject.receive(ost(1, 1), 1.0)
    assert not subject.situation.unheard
    subject.receive(qapi.RunEvent.RESET, 2.0)
    assert subject.situation.unheard
    assert not known(0, 1, answers={1: OstAnswer(1, 0)}).situation.unheard
    assert known(0, 1, answers={1: OstAnswer(0, 0)}).situation.unheard


def test_a_guest_that_cannot_answer_is_not_expected_to() -> None:
    pseries = replace(KVM, arch="ppc64", machine="pseries-10.0")
    start = Layout(vm=pseries, slots=slots(0), creation=(0,))
    now = VmState(start, status=VmStatus("running"), single_threaded=None, answers={}, now=0.0)
    assert not now.situation.unheard


def test_a_vm_that_has_migrated_here_stays_so_whatever_it_does_next() -> None:
    subject = known(0, 1)
    subject.status = VmStatus("inmigrate", "active")
    assert not subject.situation.arrived
    subject.status = VmStatus("running", "completed", arrived=True)
    assert subject.situation.arrived
    subject.receive(qapi.RunEvent.STOP, 1.0)
    subject.status = VmStatus("running", "failed")  # it was to go on
    assert subject.situation.arrived
    assert known(0, status=VmStatus("running", "completed", arrived=True)).situation.arrived


def test_another_qemu_has_another_guest() -> None:
    subject = known(0, 1, answers={1: OstAnswer(1, 0)}, status=VmStatus("running", "completed", arrived=True))
    subject.guest_os = GuestOs("mswindows")
    reading = {"status": VmStatus("running"), "answers": {}, "now": 1.0}
    subject.resync(slots(0, 1), threads(0, 1), same_instance=True, **reading)  # type: ignore[arg-type]
    now = subject.situation
    assert (now.unheard, now.arrived, now.guest_os) == (False, True, GuestOs("mswindows"))
    subject.resync(slots(0, 1), threads(0, 1), same_instance=False, **reading)  # type: ignore[arg-type]
    now = subject.situation
    assert (now.unheard, now.arrived, now.guest_os) == (True, False, None)


def test_a_reset_may_start_another_system() -> None:
    subject = known(0, 1)
    subject.guest_os = GuestOs("mswindows")
    assert subject.situation.guest_os == GuestOs("mswindows")
    subject.receive(qapi.RunEvent.RESET, 1.0)
    assert subject.situation.guest_os is None
