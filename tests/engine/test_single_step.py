"""One vCPU's change: what its caller is told, whatever QEMU and the guest say."""

import pytest

from qmpvcpu import (
    CommandRejectedError,
    DenialReason,
    MonitorTimeoutError,
    OnFailure,
    OutcomeUnknownError,
    Plugged,
    Proof,
    StepDeniedError,
    UnplugPendingError,
    UnplugRefusedError,
    UnprovenError,
    VcpuMap,
)
from qmpvcpu.engine.messages import Change, Looked, Result, Wait
from qmpvcpu.engine.removal import State
from qmpvcpu.errors import PlugUndoneError
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import VmStatus
from tests.engine.story import Story, make_state, path, plug, set_state, unplug, whole_map

# Plug.


def test_a_plug_is_done_when_qemu_has_accepted_it() -> None:
    told = Story("0")
    request = plug(1)
    assert told.ask(request) == ["save intent", "add 1"]
    assert told.accept(1) == ["save outcome"]
    assert told.result(request) == {1}
    assert not told.looks


@pytest.mark.parametrize(("start", "vcpu", "reason"), [("0-1", 1, "SLOT_OCCUPIED"), ("0", 9, "UNKNOWN_VCPU")])
def test_what_cannot_be_plugged_is_denied_and_nothing_is_recorded(start: str, vcpu: int, reason: str) -> None:
    told = Story(start)
    request = plug(vcpu)
    assert told.ask(request) == []
    error = told.error(request)
    assert isinstance(error, StepDeniedError)
    assert error.reason is DenialReason[reason]


@pytest.mark.parametrize("options", [{"proof": Proof.ACKNOWLEDGED}, {"require_proof": True}])
def test_an_acknowledgement_that_comes_ends_it(options: dict[str, object]) -> None:
    told = Story("0")
    request = plug(1, timeout=5.0, **options)
    told.ask(request)
    assert told.accept(1) == []
    assert told.acknowledges(1) == ["save outcome"]
    assert told.result(request) == {1}


def test_an_acknowledgement_that_does_not_come_is_no_failure_unless_it_is_required() -> None:
    told = Story("0")
    wanted, required = plug(1, timeout=5.0, proof=Proof.ACKNOWLEDGED), plug(2, timeout=5.0, require_proof=True)
    told.ask(wanted)
    told.ask(required)
    told.accept(1, 2)
    assert told.wait(5) == ["save outcome", "save outcome"]
    assert told.result(wanted) == {1}
    error = told.error(required)
    assert isinstance(error, UnprovenError)
    assert (error.code, error.reason) == (None, "no answer within 5 s")


def test_a_plug_that_the_guest_answers_with_a_failure_is_unproven() -> None:
    told = Story("0")
    required = plug(1, require_proof=True)
    told.ask(required)
    told.accept(1)
    assert told.ost(1, 1, source=1) == ["save outcome"]
    error = told.error(required)
    assert isinstance(error, UnprovenError)
    assert (error.code, error.reason) == (1, "non-specific failure")


@pytest.mark.parametrize("policy", OnFailure)
def test_in_a_map_too_a_plug_that_is_unproven_is_a_failure(policy: OnFailure) -> None:
    told = Story("0-1", "0,2-3", on_failure=policy, timeout=5.0, require_proof=True, in_flight=1)
    assert told.accept(2) == ["add 3"]
    assert told.wait(5) == []
    assert told.verdicts[2].startswith("PLUGGED")
    assert told.step(2).reason == "the guest did not acknowledge it: no answer"
    told.accept(3)
    sent = told.acknowledges(3)
    if policy is OnFailure.CONTINUE:
        assert sent == ["del 1"]
        told.accept(1)
        assert told.ejects(1) == ["save outcome"]
        assert told.outcome == "PARTIAL", "although the map is as wanted"
        assert told.report.layout.enabled == told.report.target
    elif policy is OnFailure.STOP:
        assert sent == ["save outcome"]
        assert told.outcome == "PARTIAL"
    else:
        assert sent == ["save reverting", "del 3"]
        assert told.accept(3) == ["del 2"]
        told.accept(2)
        assert told.ejects(3, 2) == ["save outcome"]
        assert told.outcome == "REVERTED"


def test_where_a_removal_may_be_queued_twice_the_last_look_is_at_the_threads_too() -> None:
    state = make_state("0")
    state.maybe_queued_twice.add(1)
    told = Story(state)
    request = plug(1, timeout=5.0)
    told.ask(request)
    assert told.accept(1) == [], "it is waited for, whatever proof is wanted"
    assert told.wait(5) == ["look closely"]
    assert told.look("0-1") == ["save outcome"]
    assert told.result(request) == {1}
    assert not state.maybe_queued_twice


def test_a_plug_that_such_a_removal_ejects_again_is_undone() -> None:
    state = make_state("0")
    state.maybe_queued_twice.add(1)
    told = Story(state)
    request = plug(1, timeout=5.0)
    told.ask(request)
    told.accept(1)
    assert told.wait(5) == ["look closely"]
    assert told.look("0") == ["save outcome"]
    assert isinstance(told.error(request), PlugUndoneError)


# What QEMU rejects.


def test_a_rejection_is_explained_by_a_look() -> None:
    told = Story("0-1")
    adding, removing = plug(2), unplug(1)
    told.ask(adding)
    told.ask(removing)
    assert told.reject(2, "Duplicate device ID 'vcpu2'") == ["save outcome"]
    assert told.reject(1) == ["save outcome"]
    error = told.error(adding)
    assert isinstance(error, CommandRejectedError)
    assert (error.action, error.ids, error.desc) == ("plug", VcpuMap([2]), "Duplicate device ID 'vcpu2'")
    assert "its id for a moment" in str(error)
    error = told.error(removing)
    assert isinstance(error, CommandRejectedError)
    assert "ACPI hotplug is not up yet" in str(error)
    assert told.state.layout.pending == set()


@pytest.mark.parametrize(
    ("desc", "hint"),
    [
        ("cpu hotplug with SMI wasn't enabled by firmware", "start the VM with a newer machine type"),
        ("a text of a QEMU to come", "the slot is empty)"),
    ],
)
def test_a_plug_that_asking_again_does_not_help_is_not_advised_to_be_asked_again(desc: str, hint: str) -> None:
    told, request = Story("0"), plug(2)
    told.ask(request)
    told.reject(2, desc)
    assert hint in str(told.error(request))
    assert ": ask again" not in str(told.error(request))


@pytest.mark.parametrize(
    ("desc", "error_class", "hint"),
    [
        ("cpu hot-unplug with SMI wasn't enabled by firmware", "GenericError", "newer firmware, or without SMM"),
        (
            "Device 'a' not found",
            "DeviceNotFound",
            "and device_del finds no device of that name",
        ),
    ],
)
def test_an_unplug_that_asking_again_does_not_help_is_not_advised_to_be_asked_again(
    desc: str, error_class: str, hint: str
) -> None:
    told, request = Story("0-1"), unplug(1)
    told.ask(request)
    told.reject(1, desc, error_class=error_class)
    assert hint in str(told.error(request))
    assert ": ask again" not in str(told.error(request))


def test_an_unplug_that_is_rejected_because_it_is_gone_is_done() -> None:
    told = Story("0-1")
    request = unplug(1)
    told.ask(request)
    told.rejections_wait = True
    assert told.reject(1) == []
    told.read("0")
    assert told.explain() == ["save outcome"]
    assert told.result(request) == {1}


def test_rejections_share_a_look_and_those_that_come_meanwhile_the_next() -> None:
    told = Story("0")
    told.rejections_wait = True
    for vcpu in (1, 2, 3):
        told.ask(plug(vcpu))
    told.reject(1)
    told.reject(2)
    told.reject(3)
    assert len(told.explanations) == 1
    assert told.explain() == ["save outcome"]
    assert len(told.explanations) == 1
    assert told.explain() == ["save outcome", "save outcome"]


def test_what_takes_the_place_is_named() -> None:
    told = Story("0")
    told.rejections_wait = True
    request = plug(1)
    told.ask(request)
    told.reject(1)
    told.explain("0-1", others=[1])
    assert "occupied meanwhile, by /machine/peripheral/other1" in str(told.error(request))


def test_a_device_that_has_the_id_is_named() -> None:
    told = Story("0")
    told.rejections_wait = True
    request = plug(1)
    told.ask(request)
    told.reject(1)
    look = told.explanations.popleft()
    told.tell(told._shown(look)._replace(other_paths=frozenset({path(1)})))
    assert f"another device is {path(1)}" in str(told.error(request))
    told.ask(plug(1))
    assert told.sent[1][0].arguments["id"] == "vcpu1-2"


def test_a_vm_that_migrates_is_told_of_first() -> None:
    told = Story("0")
    told.rejections_wait = True
    request = plug(1)
    told.ask(request)
    told.reject(1)
    look = told.explanations.popleft()
    told.tell(Looked(look.number, None, None, VmStatus("running", "active"), None))
    assert "the VM is migrating or has migrated" in str(told.error(request))


def left_just_now() -> Story:
    """Return a story in which vCPU 1 has just been unplugged, so that QEMU may hold its id for a while."""
    told = Story("0-1")
    told.ask(unplug(1))
    told.accept(1)
    told.ejects(1)
    return told


def test_a_plug_into_a_slot_that_was_left_just_now_is_sent_again_until_the_id_is_free() -> None:
    told, request = left_just_now(), plug(1)
    assert told.ask(request) == ["save intent", "add 1"]
    for pause in (0.01, 0.02):
        assert told.reject(1) == []
        assert told.deadline == pytest.approx(told.now + pause)
        assert told.wait(pause) == ["add 1"]
    assert told.accept(1) == ["save outcome"]
    assert told.result(request) == {1}


def test_a_plug_into_a_slot_of_a_change_that_was_cut_short_is_sent_again_likewise() -> None:
    state = make_state("0")
    told, request = Story(state), plug(1)
    state.interrupted({1, 400}, told.now)  # the record may name any
    assert told.ask(request) == ["save intent", "add 1"]
    assert told.reject(1) == []
    assert told.wait(0.01) == ["add 1"]
    assert told.accept(1) == ["save outcome"]
    assert told.result(request) == {1}


def test_it_is_not_sent_for_ever() -> None:
    told, request = left_just_now(), plug(1)
    told.ask(request)
    for pause in (0.01, 0.02, 0.04, 0.08):
        assert told.reject(1) == []
        other = plug(1)
        told.ask(other)
        assert isinstance(told.error(other), StepDeniedError), "the slot stays reserved"
        assert told.wait(pause) == ["add 1"]
    assert told.reject(1) == ["save outcome"]
    assert isinstance(told.error(request), CommandRejectedError)


def test_what_was_sent_again_is_unknown_if_the_connection_is_lost_in_the_pause() -> None:
    told, request = left_just_now(), plug(1)
    told.ask(request)
    told.reject(1)
    told.lose()
    assert told.is_settled(request)
    assert told.wait(1) == []
    assert not told.engine.situation.in_flight


# No reply.


def test_a_command_without_a_reply_is_unknown_and_a_late_reply_is_taken_in() -> None:
    told = Story("0", reply_timeout=2.0)
    request = plug(1)
    told.ask(request)
    assert told.wait(2) == ["save the rest"]
    error = told.error(request)
    assert isinstance(error, OutcomeUnknownError)
    assert isinstance(error.__cause__, MonitorTimeoutError)
    assert told.engine.recorded.intent is not None
    assert told.accept(1) == []
    assert told.state.layout.enabled == {0, 1}


def test_a_reply_that_makes_no_sense_leaves_the_outcome_to_the_next_read() -> None:
    told = Story("0-1")
    request = unplug(1)
    told.ask(request)
    assert told.fail_to_answer(1) == ["save the rest"]
    assert isinstance(told.error(request), OutcomeUnknownError)
    assert told.in_background
    told.read("0")
    assert told.state.layout.enabled == {0}


# Unplug.


def test_an_unplug_is_done_on_evidence() -> None:
    told = Story("0-1")
    request = unplug(1)
    assert told.ask(request) == ["save intent", "del 1"]
    assert told.accept(1) == []
    assert told.works(1) == []
    assert told.ejects(1) == ["save outcome"]
    assert told.result(request) == {1}


def test_a_refusal_is_an_error_with_its_reason() -> None:
    told = Story("0-1")
    request = unplug(1)
    told.ask(request)
    told.accept(1)
    assert told.refuses(1) == ["save outcome"]
    error = told.error(request)
    assert isinstance(error, UnplugRefusedError)
    assert (error.ids, error.code, error.reason) == (VcpuMap([1]), 0x82, "device is busy")


@pytest.mark.parametrize("works", [True, False])
def test_no_answer_in_time_is_pending_and_a_late_one_is_an_event(*, works: bool) -> None:
    told = Story("0-1")
    request = unplug(1, timeout=5.0)
    told.ask(request)
    told.accept(1)
    if works:
        told.works(1)
    assert told.wait(5) == ["look"]
    assert told.look("0-1") == ["save outcome"]
    error = told.error(request)
    assert isinstance(error, UnplugPendingError)
    assert error.acknowledged is works
    told.ejects(1)
    assert told.events[-1].late  # type: ignore[attr-defined]


def test_no_timeout_looks_at_nothing_and_is_pending_at_once() -> None:
    told = Story("0-1")
    request = unplug(1, timeout=0.0)
    told.ask(request)
    assert told.accept(1) == ["save outcome"]
    assert isinstance(told.error(request), UnplugPendingError)


def test_the_time_for_the_whole_is_that_of_maps() -> None:
    told = Story("0-1", saves_wait=True)
    adding, removing = plug(2, total_timeout=1.0), unplug(1, timeout=5.0, total_timeout=1.0)
    told.ask(adding)
    told.ask(removing)
    told.wait(2)
    assert told.saved() == ["add 2"]
    assert told.saved() == ["del 1"]
    told.accept(1)
    assert told.wait(2) == []


@pytest.mark.parametrize("accepted", [True, False])
def test_who_joins_gets_the_end_of_the_removal(*, accepted: bool) -> None:
    told = Story("0-1", reply_timeout=2.0)
    first, joining = unplug(1), unplug(1)
    told.ask(first)
    assert told.ask(joining) == []
    if accepted:
        told.accept(1)
        assert told.refuses(1) == ["save outcome", "save outcome"]
        assert isinstance(told.error(joining), UnplugRefusedError)
    else:
        assert told.reject(1) == ["save outcome", "save outcome"]
        error = told.error(joining)
        assert isinstance(error, CommandRejectedError)
        assert (error.action, error.desc) == ("unplug", "no")


# A removal that is only requested.


def test_a_removal_is_handed_out_once_qemu_has_accepted_it() -> None:
    told = Story("0-1")
    request = unplug(1, result=Result.REMOVAL)
    assert told.ask(request) == ["save intent", "del 1"]
    assert told.accept(1) == ["save outcome"]
    removal, joined = told.result(request)
    assert removal is told.state.removals[1]
    assert not joined
    assert removal.state is State.REQUESTED


def test_one_that_is_under_way_is_handed_out_at_once() -> None:
    told = Story(make_state("0-1", answers={1: OstAnswer(3, 0x84)}))
    request = unplug(1, result=Result.REMOVAL)
    assert told.ask(request) == ["save outcome"]
    removal, joined = told.result(request)
    assert removal is told.state.removals[1]
    assert joined


def test_one_that_another_has_sent_is_handed_out_with_the_reply_to_that() -> None:
    told = Story("0-1")
    first, second = unplug(1, result=Result.REMOVAL), unplug(1, result=Result.REMOVAL)
    told.ask(first)
    told.ask(second)
    assert told.accept(1) == ["save outcome", "save outcome"]
    assert told.result(first)[1] is False
    assert told.result(second) == (told.result(first)[0], True)


@pytest.mark.parametrize("answer", ["works", "refuses", "ejects"])
def test_an_answer_may_overtake_the_reply(answer: str) -> None:
    told = Story("0-1")
    request = unplug(1, result=Result.REMOVAL)
    told.ask(request)
    getattr(told, answer)(1)
    told.accept(1)
    removal, _ = told.result(request)
    assert removal.state is {"works": State.WORKING, "refuses": State.REFUSED, "ejects": State.UNPLUGGED}[answer]


def test_one_that_qemu_does_not_reply_to_is_unknown() -> None:
    told = Story("0-1", reply_timeout=2.0)
    request = unplug(1, result=Result.REMOVAL, timeout=0.0)
    told.ask(request)
    assert told.wait(2) == ["save the rest"]
    assert isinstance(told.error(request), OutcomeUnknownError)


def test_one_whose_reply_another_waits_for_in_vain_is_unknown() -> None:
    told = Story("0-1", reply_timeout=2.0)
    told.ask(unplug(1))
    told.wait(1)
    request = unplug(1, result=Result.REMOVAL)
    told.ask(request)
    told.wait(1)
    assert not told.is_settled(request), "it has as long as for a reply of its own"
    told.wait(1)
    assert isinstance(told.error(request), OutcomeUnknownError)


def test_who_waits_for_one_that_qemu_rejects_is_told_so() -> None:
    told = Story("0-1")
    told.ask(unplug(1))
    wait = Wait(told.state.removals[1], None)
    told.ask(wait)
    told.reject(1)
    assert isinstance(told.error(wait), CommandRejectedError)


def test_one_that_qemu_rejects_is_an_error() -> None:
    told = Story("0-1")
    request = unplug(1, result=Result.REMOVAL)
    told.ask(request)
    told.reject(1)
    assert isinstance(told.error(request), CommandRejectedError)


# Keeping what is about to leave.


def keeping(**options: float) -> tuple[Story, Change]:
    """Return a story in which somebody wants vCPU 1 plugged, on whose removal the guest works, and that request."""
    told = Story(make_state("0-1", answers={1: OstAnswer(3, 0x84)}))
    request = set_state(1, enabled=True, **options)
    assert told.ask(request) == ["save intent"]
    return told, request


def test_one_whose_removal_is_refused_stays() -> None:
    told, request = keeping()
    assert told.refuses(1) == ["save outcome"]
    assert told.result(request) == {1}


def test_one_that_leaves_is_plugged_again_and_the_record_tells_of_it() -> None:
    told, request = keeping()
    assert told.ejects(1) == ["add 1"]
    assert told.engine.recorded.intent is not None
    assert [str(step) for step in told.engine.recorded.intent.steps] == ["keep 1"]
    assert told.engine.recorded.desired == {0, 1}
    assert told.accept(1) == ["save outcome"]
    assert told.result(request) == {1}
    assert told.engine.recorded.intent is None


def test_no_answer_is_pending() -> None:
    told, request = keeping(timeout=5.0)
    assert told.wait(5) == ["look"]
    assert told.look("0-1") == ["save outcome"]
    assert isinstance(told.error(request), UnplugPendingError)


def test_a_removal_that_qemu_rejects_leaves_it_there() -> None:
    told = Story("0-1")
    told.ask(unplug(1))
    request = set_state(1, enabled=True)
    told.ask(request)
    told.reject(1)
    assert told.result(request) == {1}


# A caller who goes away.


def test_what_was_not_sent_is_not_sent() -> None:
    told = Story("0", saves_wait=True)
    request = plug(1)
    told.ask(request)
    assert told.cancel(request) == []
    assert told.saved() == ["save outcome"]
    assert told.saved() == []
    assert told.engine.recorded.intent is None


def test_what_was_sent_is_taken_in_and_recorded_all_the_same() -> None:
    told = Story("0-1")
    adding, removing = plug(2), unplug(1, timeout=5.0)
    told.ask(adding)
    told.ask(removing)
    told.accept(1)
    assert told.cancel(adding) == told.cancel(removing) == []
    assert told.accept(2) == ["save outcome"]
    assert told.ejects(1) == ["save outcome"]
    assert told.state.layout.enabled == {0, 2}


def test_who_only_joined_is_forgotten_and_the_removal_goes_on() -> None:
    told = Story("0-1")
    first, joining = unplug(1), unplug(1)
    told.ask(first)
    told.ask(joining)
    told.accept(1)
    assert told.cancel(joining) == []
    assert told.is_settled(joining)
    assert told.ejects(1) == ["save outcome"]
    assert told.result(first) == {1}


def test_a_vcpu_that_nobody_wants_kept_any_more_is_not_plugged_again() -> None:
    told, request = keeping()
    assert told.cancel(request) == []
    assert told.ejects(1) == []
    assert told.is_settled(request)
    assert told.engine.recorded.intent is None


def test_a_plug_that_nobody_wants_any_more_is_not_sent_again() -> None:
    told, request = left_just_now(), plug(1)
    told.ask(request)
    told.reject(1)
    told.cancel(request)
    assert told.wait(0.01) == ["save outcome"]
    assert not told.engine.situation.in_flight


def test_what_waits_for_its_turn_is_forgotten() -> None:
    told = Story("0", "0-1")
    request = plug(2)
    told.ask(request)
    assert told.cancel(request) == []
    assert told.is_settled(request)
    assert told.accept(1) == ["save outcome"]


def test_the_verdict_of_a_plug_tells_whether_anybody_waited_for_the_guest() -> None:
    told = Story("0")
    told.ask(plug(1))
    told.accept(1)
    assert told.subject.runs[0].verdict == Plugged(told.subject.plan.ids)
    assert told.state.slots[1].qom_path == path(1)


def test_a_map_of_one_step_is_a_map() -> None:
    told = Story("0", last_looks_wait=True)
    told.ask(whole_map("0-1"))
    assert told.accept(1) == ["last look"]
