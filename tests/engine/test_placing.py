"""vCPUs that are born in their place on the host, are put there, or are taken out again."""

from typing import Any

import pytest

from qmpvcpu import DenialReason, MonitorLostError, OnFailure, Proof, StepDeniedError, VcpuMap
from qmpvcpu.engine.messages import Change, HostIs, Looked, Wanted
from qmpvcpu.engine.places import EMULATOR
from qmpvcpu.engine.steprun import STAGES, StepStage
from qmpvcpu.engine.vmstate import Read
from qmpvcpu.errors import AgentSilentError, MonitorTimeoutError, Outcome, PlacementError, PlugUndoneError
from qmpvcpu.events import PlaceDrifted, VcpuPlaced
from qmpvcpu.model.placement import Place, Placement, PlacementPolicy
from qmpvcpu.model.verdicts import OstAnswer
from tests.engine.story import HOST, Story, make_state, plug, unplug, whole_map

STOP, CONTINUE, REVERT = OnFailure
PREFERRED = PlacementPolicy.PREFERRED
ALL_ON_4 = dict.fromkeys(range(8), "4")


def placing(
    pins: dict[int, str] | Placement, start: str = "0", *, answers: dict[int, OstAnswer] | None = None, **more: Any
) -> Story:
    """Return a story of a VM whose vCPUs are to run there, on a host of 8 CPUs; QEMU's main thread is on 0-3."""
    placement = pins if isinstance(pins, Placement) else Placement.pinned(pins)
    state = make_state(start, placement=placement, answers=answers or {})
    told = Story(state, **more)
    told.tell(HostIs(HOST))
    return told


def on(cpus: str, scheduler: str | None = None) -> Placement:
    """Return the placement of vCPU 1 there."""
    return Placement({1: Place.on(cpus, scheduler)})


def failed(told: Story, request: Change) -> PlacementError:
    error = told.error(request)
    assert isinstance(error, PlacementError)
    return error


def test_a_place_comes_before_every_proof() -> None:
    assert next(iter(STAGES)) is StepStage.PLACING


# Births.


def test_plugs_into_one_place_go_together() -> None:
    told = placing(ALL_ON_4)
    assert told.wish("0-7", in_flight=8) == ["save intent", *(f"add {vcpu} on 4" for vcpu in range(1, 8))]
    assert told.accept(1) == []
    assert told.accept(2, 3, 4, 5, 6) == []
    assert told.accept(7) == ["place 1-7"]
    assert told.place() == ["save outcome"]
    assert told.outcome == "REACHED"
    assert all(step.placed == 0.0 and not step.unplaced and not step.taken_out for step in told.report.steps)
    assert [event.ids for event in told.events if isinstance(event, VcpuPlaced)] == [{v} for v in range(1, 8)]


def test_a_plug_into_another_place_waits_for_the_reply() -> None:
    told = placing({1: "4", 2: "4", 3: "5", 4: "4"})
    assert told.wish("0-4") == ["save intent", "add 1 on 4", "add 2 on 4"]
    assert told.accept(1) == []
    assert told.accept(2) == ["add 3 on 5"]
    assert told.accept(3) == ["add 4 on 4"]
    assert told.accept(4) == ["place 1-4"]


def test_nothing_more_is_asked_where_the_host_shows_that_they_were_born_there() -> None:
    told = placing({1: "4", 2: "4", 3: "5"})
    told.wish("0-3")
    told.accept(1)
    assert told.accept(2, in_place=True) == ["add 3 on 5"]
    assert told.accept(3, in_place=True) == ["save outcome"]
    assert [step.placed for step in told.report.steps] == [0.0, 0.0, 0.0]


def test_a_birth_proves_nothing_of_what_is_wanted_by_then() -> None:
    told = placing({1: "4"})
    told.ask(plug(1))
    told.tell(Wanted(Placement.pinned({1: "5"})))
    assert told.accept(1, in_place=True) == ["place 1"]


def test_a_birth_does_not_set_a_scheduler() -> None:
    told = placing(on("4", "batch"))
    told.ask(plug(1))
    assert told.accept(1, in_place=True) == ["place 1"]


def test_what_runs_where_qemus_main_thread_is_needs_no_birthplace() -> None:
    told = placing({1: "0-3"})
    assert told.ask(plug(1)) == ["save intent", "add 1"]
    assert told.accept(1) == ["place 1"]


@pytest.mark.parametrize("first", [1, 2])
def test_a_plug_of_which_nothing_is_wanted_is_not_born_elsewhere(first: int) -> None:
    told = placing({1: "4"})
    second = 3 - first
    told.ask(plug(first))
    assert told.ask(plug(second)) == ["save intent"]
    assert ("add 2" if second == 2 else "add 1 on 4") in told.accept(first)


def test_a_plug_that_was_sent_before_anything_was_wanted_is_not_born_elsewhere() -> None:
    told = Story("0")
    told.ask(plug(1))
    told.tell(HostIs(HOST))
    assert told.ask(plug(2, placement=Placement.pinned({2: "4"}))) == ["save intent"]
    assert told.accept(1) == ["save outcome", "add 2 on 4"]


def test_two_callers_with_different_pins_take_turns() -> None:
    told = placing({1: "4", 2: "5"})
    one, two = plug(1), plug(2)
    told.ask(one)
    assert told.ask(two) == ["save intent"]
    assert told.accept(1) == ["place 1", "add 2 on 5"]
    assert told.place() == ["save outcome"]
    assert told.accept(2) == ["place 2"]
    assert told.place() == ["save outcome"]
    assert told.result(one) == {1}
    assert told.result(two) == {2}


def test_callers_with_one_pin_have_their_threads_looked_for_once_all_are_born() -> None:
    told = placing({1: "4", 2: "4"})
    told.ask(plug(1))
    assert told.ask(plug(2)) == ["save intent", "add 2 on 4"]
    assert told.accept(1) == []
    assert told.accept(2, in_place=True) == ["save outcome", "save outcome"]


def test_a_rejected_plug_lets_others_be_born() -> None:
    told = placing({1: "4", 2: "5"})
    told.rejections_wait = True
    told.ask(plug(1))
    told.ask(plug(2))
    assert told.reject(1) == ["add 2 on 5"]


@pytest.mark.parametrize(("proof", "asked"), [(Proof.STARTED, "look who runs of 1"), (Proof.ACKNOWLEDGED, None)])
def test_what_is_in_its_place_and_waits_for_a_proof_is_placed_once_and_keeps_no_map_out(
    proof: Proof, asked: str | None
) -> None:
    told = placing({1: "4", 2: "5"})
    told.ask(plug(1, proof=proof))
    assert told.accept(1) == ["place 1"]
    assert told.place() == ([asked] if asked else [])
    for _ in range(5):
        assert "place 1" not in told.wait(0.2)
    assert "add 2 on 5" in told.wish("0-2")


def test_a_map_begins_once_what_was_plugged_is_in_its_place() -> None:
    told = placing({1: "4"}, first_looks_wait=True)
    told.ask(plug(1))
    assert told.wish("0,2") == []
    assert told.accept(1) == ["place 1"]
    assert told.place() == ["save outcome", "first look"]


def test_a_map_begins_once_what_cannot_be_in_its_place_is_asked_to_leave() -> None:
    told = placing({1: "4"})
    told.ask(plug(1))
    told.wish("0,2")
    told.accept(1)
    assert told.place(why_not="no") == ["del 1"]
    assert told.accept(1) == ["save intent", "add 2"]


def test_a_plug_does_not_wait_for_good_for_one_that_is_born_elsewhere() -> None:
    told = placing({1: "4", 2: "5", 3: "4"}, reply_timeout=10.0)
    told.ask(plug(1))
    told.wait(4)
    two = plug(2)
    told.ask(two)
    assert told.deadline == 11.0
    told.wait(6)
    error = told.error(two)
    assert isinstance(error, StepDeniedError)
    assert error.reason is DenialReason.IN_PROGRESS
    assert "QEMU did not reply to the plug of vCPU 1 within 10 s, which is born on other host CPUs" in str(error)
    assert told.ask(plug(3)) == ["save intent", "add 3 on 4"], "it may be born there"


def test_a_map_ends_though_qemu_does_not_reply_to_its_first_plug() -> None:
    told = placing({1: "4", 2: "5", 3: "5"})
    told.wish("0-3", on_failure=CONTINUE)
    assert told.wait(10) == ["save the rest"]
    assert told.verdicts == {1: "UNKNOWN", 2: "DENIED", 3: "DENIED"}


# Where that cannot be.


def test_what_cannot_be_born_there_is_denied() -> None:
    told = placing({1: "4"})
    one = plug(1)
    told.ask(one)
    assert told.cannot_bear(1) == ["save outcome"]
    error = told.error(one)
    assert isinstance(error, StepDeniedError)
    assert error.reason is DenialReason.CANNOT_PLACE
    assert error.outcome is Outcome.UNCHANGED
    assert not told.state.situation.in_flight


def test_what_cannot_be_born_there_is_plugged_all_the_same_if_that_is_only_preferred() -> None:
    told = placing(Placement.pinned({1: "4"}, policy=PREFERRED))
    told.wish("0-1")
    assert told.cannot_bear(1) == ["add 1"]
    assert told.accept(1) == ["place 1"]
    assert told.place(why_not="not allowed") == ["save outcome"]
    assert told.outcome == "REACHED"
    assert told.step(1).unplaced == "not allowed"
    assert told.step(1).placed is None
    assert "not in its place: not allowed" in str(told.step(1))


def test_the_policy_of_a_call_goes_over_that_of_the_vm() -> None:
    told = placing({1: "4", 2: "9"})
    one = plug(1, placement_policy=PREFERRED)
    told.ask(one)
    assert told.cannot_bear(1) == ["add 1"]
    told.accept(1)
    assert told.place(why_not="no") == ["save outcome"]
    assert told.result(one) == {1}
    two = plug(2)
    told.ask(two)
    assert isinstance(told.error(two), StepDeniedError), "this host has no CPU 9"
    assert told.ask(plug(2, placement_policy=PREFERRED)) == ["save intent", "add 2"]


def test_after_a_loss_nothing_is_sent_for_what_could_not_be_born() -> None:
    told = placing(Placement.pinned({1: "4"}, policy=PREFERRED), reconnects=True)
    told.wish("0-1")
    command = told.sent.pop(1)
    told.pause()
    told.sent[1] = command
    assert told.cannot_bear(1) == []
    assert told.resume("0") == ["add 1"]


# Afterwards.


def test_threads_are_looked_for_again_until_they_are_found() -> None:
    told = placing({1: "4"})
    told.ask(plug(1))
    told.accept(1)
    assert told.place(error=MonitorTimeoutError("query-cpus-fast", 1.0)) == []
    assert told.wait(0.01) == ["place 1"]
    assert told.place() == ["save outcome"]


@pytest.mark.parametrize("policy", PlacementPolicy)
def test_what_is_not_found_in_time_is_not_in_its_place(policy: PlacementPolicy) -> None:
    told = placing(Placement.pinned({1: "4"}, policy=policy), reply_timeout=5.0)
    told.wish("0-1")
    told.accept(1)
    told.place(error=MonitorTimeoutError("query-cpus-fast", 1.0))
    sent = told.wait(10)
    if policy is PREFERRED:
        assert sent == ["save outcome"]
        assert told.outcome == "REACHED"
    else:
        assert sent == ["del 1"]
    assert told.step(1).unplaced.startswith(
        "its threads were not found within 10 s; QEMU did not reply to query-cpus-fast"
    )
    assert told.state.places.arriving == set()


def test_the_time_for_a_proof_begins_once_the_place_is_given_up() -> None:
    told = placing(Placement.pinned({1: "4"}, policy=PREFERRED), reply_timeout=5.0)
    one = plug(1, proof=Proof.ACKNOWLEDGED, require_proof=True, timeout=3.0)
    told.ask(one)
    told.accept(1)
    assert told.wait(10) == []
    assert told.deadline == told.now + 3
    assert told.acknowledges(1) == ["save outcome"]
    assert told.result(one) == {1}


def test_a_late_word_is_of_the_cpu_that_was_there_then() -> None:
    told = placing({1: "4"})
    one = plug(1)
    told.ask(one)
    told.accept(1)
    assert told.read("0") == ["save outcome"]
    assert isinstance(told.error(one), PlugUndoneError)
    assert told.ask(plug(1)) == ["save intent", "add 1 on 4"]
    assert told.accept(1) == ["place 1"]
    assert told.place(why_not="ended") == []
    assert told.state.places.why_not(1) is None
    assert told.place() == ["save outcome"]


def test_threads_are_looked_for_in_time_though_more_is_to_be_plugged() -> None:
    told = placing({1: "4", 2: "5"}, reply_timeout=0.8)
    told.wish("0-2")
    assert told.accept(1) == ["add 2 on 5"]
    assert told.wait(0.2) == ["place 1"]


# What is taken out again.


def unplaced(request: Change, told: Story | None = None, **more: Any) -> Story:
    """Return a story in which the threads of vCPU 1, which *request* plugs, cannot be where they have to be."""
    told = told or placing({1: "4"}, **more)
    told.ask(request)
    told.accept(1)
    assert told.place(why_not="the kernel says no") == ["del 1"]
    return told


def test_what_is_not_in_its_place_is_taken_out_again() -> None:
    one = plug(1)
    told = unplaced(one)
    assert told.intents[-1] is not None
    assert told.accept(1) == []
    assert told.ejects(1) == ["save outcome"]
    error = failed(told, one)
    assert error.taken_out is True
    assert error.outcome is Outcome.UNCHANGED
    assert error.why == "the kernel says no"
    assert told.state.layout.enabled == {0}


@pytest.mark.parametrize(
    ("end", "taken_out"),
    [
        (lambda told: told.refuses(1), False),
        (lambda told: told.wait(10) and told.look("0-1"), None),
        (lambda told: told.read("0"), True),
    ],
    ids=["refused", "pending", "gone by a read"],
)
def test_taking_it_out_may_fail(end: Any, taken_out: bool | None) -> None:
    one = plug(1, timeout=10.0)
    told = unplaced(one)
    told.accept(1)
    end(told)
    assert failed(told, one).taken_out is taken_out


def test_taking_it_out_may_be_rejected() -> None:
    one = plug(1)
    told = unplaced(one)
    assert told.reject(1) == ["save outcome"]
    error = failed(told, one)
    assert error.taken_out is False
    assert error.outcome is Outcome.CHANGED
    assert "could not be taken out again and is still there" in str(error)


def test_what_has_left_while_qemu_was_lost_is_out() -> None:
    one, told = plug(1), placing({1: "4"}, reconnects=True)
    told.ask(one)
    told.accept(1)
    told.pause()
    assert told.place(why_not="no") == []
    assert told.resume("0") == ["save outcome"]
    assert failed(told, one).taken_out is True


@pytest.mark.parametrize("others", [(), (1,)], ids=["nothing", "another CPU"])
def test_what_is_there_instead_is_left_alone(others: tuple[int, ...]) -> None:
    told = placing({1: "4", 2: "4"})
    told.wish("0-2", on_failure=CONTINUE, in_flight=1)
    told.accept(1)
    assert told.wait(1) == ["place 1"]
    assert told.place(why_not="no") == [], "the other plug has no reply"
    told.read("0-1" if others else "0", others=others)
    assert told.accept(2) == ["place 2"]
    told.place()
    assert told.verdicts == {1: "PLUGGED, undone", 2: "PLUGGED"}


def test_it_is_not_asked_twice_to_leave() -> None:
    one, told = plug(1), placing({1: "4"})
    told.ask(one)
    told.accept(1)
    assert told.works(1) == []  # somebody else has asked for it
    assert told.place(why_not="no") == []
    assert told.ejects(1) == ["save outcome"]
    assert failed(told, one).taken_out is True


def test_an_agent_that_is_not_there_does_not_keep_it() -> None:
    one = plug(1, offline_first=True)
    assert unplaced(one).accept(1) == []


@pytest.mark.parametrize("policy", OnFailure)
def test_a_map_goes_on_or_not_as_after_any_failure(policy: OnFailure) -> None:
    told = placing(ALL_ON_4)
    told.wish("0-3", on_failure=policy, in_flight=3)
    told.accept(1, 2)
    assert told.wait(1) == ["place 1-2"]
    assert told.place(why_not="no") == ["del 1", "del 2"]
    assert told.accept(3) == ["place 3"]
    told.place()
    told.accept(1, 2)
    told.refuses(2)
    told.ejects(1)
    if policy is REVERT:
        told.accept(3)
        told.ejects(3)
    assert told.step(1).taken_out
    assert told.step(1).undone is True
    assert not told.step(1).ok
    assert told.step(2).undone is False
    assert "undoing it: the guest refused" in told.step(2).reason
    assert told.verdicts[3] == ("PLUGGED, undone" if policy is REVERT else "PLUGGED")
    assert told.outcome == ("REVERT_INCOMPLETE" if policy is REVERT else "PARTIAL")


def test_a_late_answer_still_counts() -> None:
    told = placing({1: "4", 2: "4"})
    told.wish("0-2", on_failure=CONTINUE, timeout=5.0)
    told.accept(1, 2)
    told.place(why_not="no")
    told.accept(1, 2)
    told.wait(3)
    told.ejects(1)
    told.wait(2)
    told.look("0,2")
    assert told.verdicts[1] == "PLUGGED, undone"
    assert told.verdicts[2] == "PLUGGED, not undone"


# Losses and cancels in the middle.


def test_a_take_out_whose_outcome_is_unknown_stays_recorded() -> None:
    one = plug(1)
    told = unplaced(one)
    told.lose()
    error = failed(told, one)
    assert error.taken_out is None
    assert error.outcome is Outcome.UNKNOWN
    intent = told.engine.recorded.intent
    assert intent is not None
    assert {step.first for step in intent.steps} == {1}


@pytest.mark.parametrize("gone", [True, False])
def test_a_take_out_in_flight_is_looked_at_after_a_loss(gone: bool) -> None:
    one = plug(1)
    told = unplaced(one, reconnects=True)
    told.pause()
    if gone:
        assert told.resume("0") == ["save outcome"]
    else:
        assert told.resume("0-1") == ["del 1"]
        told.accept(1)
        told.ejects(1)
    assert failed(told, one).taken_out is True


def test_a_take_out_that_the_guest_works_on_is_joined_after_a_loss() -> None:
    one = plug(1)
    told = unplaced(one, reconnects=True)
    told.pause()
    assert told.resume("0-1", {1: OstAnswer(3, 0x84)}) == []
    assert told.ejects(1) == ["save outcome"]
    assert failed(told, one).taken_out is True


def test_threads_are_looked_for_once_qemu_is_back() -> None:
    one = plug(1, timeout=60.0)
    told = placing({1: "4"}, reconnects=True, reply_timeout=5.0)
    told.ask(one)
    told.accept(1)
    told.pause()
    told.place(error=MonitorLostError("lost"))
    told.wait(20)
    assert told.resume("0-1") == ["place 1"]
    assert told.place() == ["save outcome"]
    assert told.result(one) == {1}


def test_a_plug_in_flight_is_put_in_its_place_after_a_loss() -> None:
    told = placing({1: "4"}, reconnects=True)
    told.ask(plug(1))
    told.pause()
    assert told.resume("0-1") == ["place 1"]


def test_nobody_says_that_it_is_in_its_place_if_qemu_is_lost() -> None:
    one, told = plug(1), placing({1: "4"})
    told.ask(one)
    told.accept(1)
    told.lose()
    error = told.error(one)
    assert isinstance(error, MonitorLostError)
    assert error.outcome is Outcome.CHANGED
    assert "vCPU 1 is plugged, and where its threads run is not known" in str(error)
    assert told.state.places.arriving == set()


def test_another_qemu_has_other_births() -> None:
    told = placing({1: "4", 2: "5"}, reconnects=True)
    told.ask(plug(1))
    told.ask(plug(2))
    told.pause()
    told.resume("0", same_instance=False)
    assert told.state.places.oldest_birth is None
    assert told.ask(plug(2)) == ["save intent", "add 2 on 5"]


def test_a_plug_that_nobody_waits_for_is_put_in_its_place_or_taken_out() -> None:
    for why_not in ("", "no"):
        one, told = plug(1), placing({1: "4"})
        told.ask(one)
        assert told.cancel(one) == []
        assert told.accept(1) == ["place 1"]
        assert told.place(why_not=why_not) == (["del 1"] if why_not else ["save outcome"])


@pytest.mark.parametrize("policy", OnFailure)
def test_a_map_that_is_stopped_has_its_threads_placed_and_takes_nothing_out(policy: OnFailure) -> None:
    told = placing({1: "4", 2: "5"})
    told.wish("0-2", on_failure=policy)
    assert told.accept(1) == ["add 2 on 5"]
    assert told.cancel() == ["place 1"]
    assert told.accept(2) == []
    assert told.place(why_not="no") == []
    assert told.wait(0.01) == ["place 2"]
    assert told.place(why_not="no") == ["save outcome"]
    assert told.outcome == "PARTIAL"
    assert told.report.cancelled
    assert all(step.taken_out and step.undone is False for step in told.report.steps)
    assert "undoing it: not sent: stopped by its caller" in told.step(1).reason


def test_what_was_not_taken_out_in_time_is_reverted() -> None:
    told = placing({1: "4", 2: "4"})
    told.wish("0-2", on_failure=REVERT, total_timeout=8.0)
    told.accept(1, 2)
    told.wait(8)
    assert told.place(why_not="no") == ["save reverting", "del 2", "del 1"]
    told.accept(1, 2)
    told.ejects(1, 2)
    assert told.verdicts == {1: "PLUGGED, undone", 2: "PLUGGED, undone"}
    assert told.outcome == "REVERTED"


def test_a_take_out_waits_for_no_answer_once_the_map_is_stopped() -> None:
    told = placing({1: "4"})
    told.wish("0-1")
    told.accept(1)
    told.place(why_not="no")
    told.accept(1)
    assert told.cancel() == ["save outcome"]
    assert told.step(1).undone is False
    assert told.state.layout.pending == {1}


# What is plugged again.


def test_an_id_that_is_held_is_plugged_again_into_the_same_place() -> None:
    told = placing({1: "4", 2: "5"}, "0-1")
    told.ask(unplug(1))
    told.accept(1)
    told.ejects(1)
    told.ask(plug(1))
    assert told.reject(1, "Duplicate device ID 'vcpu1'") == []
    assert told.ask(plug(2)) == ["save intent", "add 2 on 5"]
    assert told.wait(0.01) == [], "another one is born elsewhere"
    assert told.accept(2) == ["place 2"]
    assert told.wait(0.005) == ["add 1 on 4"]
    assert told.accept(1) == ["place 1"]


def keeping(told: Story) -> list[str]:
    """Wish for vCPU 1, on whose removal the guest works, and which leaves."""
    told.wish("0-1")
    return told.ejects(1)


@pytest.mark.parametrize("pin", ["4", "9"])
def test_what_was_to_be_kept_is_plugged_again_even_elsewhere(pin: str) -> None:
    told = placing({1: pin}, "0-1", answers={1: OstAnswer(3, 0x84)})
    assert keeping(told) == (["add 1 on 4"] if pin == "4" else ["add 1"])
    if pin == "4":
        assert told.cannot_bear(1) == ["add 1"]
    told.accept(1)
    assert told.place(why_not="no") == ["save outcome"]
    assert told.outcome == "REACHED"
    assert told.step(1).unplaced == "no"


def test_what_is_undone_is_plugged_in_its_place_or_else_elsewhere() -> None:
    told = placing({1: "4", 2: "9"}, "0-3")
    told.wish("0", on_failure=REVERT)
    told.accept(3, 2, 1)
    told.ejects(1)
    told.ejects(2)
    assert told.refuses(3) == ["save reverting", "add 1 on 4"]
    assert told.cannot_bear(1) == ["add 1", "add 2"]
    assert told.accept(1) == []
    assert told.accept(2) == ["place 1-2"]
    assert told.place(why_not="no") == ["save outcome"]
    assert told.outcome == "REVERTED"


# What is recorded, wanted and told.


def test_the_record_knows_where_the_main_thread_belongs() -> None:
    told = placing({1: "4"})
    told.ask(plug(1))
    (intent,) = told.intents
    assert intent is not None
    assert intent.main_cpus == HOST.main_cpus
    told.accept(1)
    told.place()
    assert told.intents[-1] is None


def test_the_record_knows_where_the_main_thread_is_though_something_else_is_wanted_by_now() -> None:
    told = placing({1: "4"})
    told.ask(plug(1))
    for placement in (Placement.pinned({1: "5"}), None):
        told.tell(Wanted(placement))
        intent = told.engine.recorded.intent
        assert intent is not None
        assert VcpuMap.parse("4") in intent.birthplaces
        assert intent.main_cpus == HOST.main_cpus


def test_the_record_says_nothing_of_the_main_thread_where_it_is_not_moved() -> None:
    for told in (Story("0"), placing({1: "4"})):
        told.tell(HostIs(HOST if told.state.places.placement is None else HOST.__class__(unreachable="hidden")))
        told.ask(plug(1, placement_policy=PREFERRED))
        intent = told.intents[-1]
        assert intent is not None
        assert intent.main_cpus is None


def test_a_plug_in_its_place_that_is_not_over_is_recorded() -> None:
    told = placing({1: "4"})
    told.ask(plug(1))
    told.accept(1)
    assert told.engine.recorded.intent is not None, "it may yet be taken out"


def test_the_placement_of_a_call_is_kept_if_it_can_be_planned() -> None:
    told = Story("0-1")
    told.tell(HostIs(HOST))
    for vcpu in (1, 9):
        told.ask(plug(vcpu, placement=Placement.pinned({1: "4"})))
        assert told.state.places.placement is None, "it is there, or cannot be"
    told.ask(plug(2, placement=Placement.pinned({2: "4", 3: "5"})))
    assert told.accept(2) == ["place 2"]
    told.place()
    assert told.ask(plug(3)) == ["save intent", "add 3 on 5"]


def drifts(told: Story, places: dict[int, Place]) -> list[tuple[VcpuMap, Place]]:
    """What is told after a read that finds threads there."""
    told.events.clear()
    number = told.engine._look(Read.FULL, lambda _: None)
    assert number is not None
    told.tell(Looked(number, None, None, None, None, places=places))
    return [(event.ids, event.found) for event in told.events if isinstance(event, PlaceDrifted)]


def test_a_drift_is_told_once() -> None:
    placement = Placement({1: Place.on("4")}, emulator=Place.on("0-3"))
    told = placing(placement, "0-1")
    at_home = {1: Place.on("4"), EMULATOR: Place.on("0-3")}
    assert drifts(told, at_home) == []
    moved = {1: Place.on("5"), EMULATOR: Place.on("2")}
    assert drifts(told, moved) == [(VcpuMap([1]), Place.on("5")), (VcpuMap(), Place.on("2"))]
    assert drifts(told, moved) == []
    assert drifts(told, {1: Place.on("5")}) == [], "the main thread is bearing a vCPU"
    assert drifts(told, moved) == []
    assert drifts(told, at_home) == []
    assert drifts(told, at_home | {1: Place.on("6")}) == [(VcpuMap([1]), Place.on("6"))]


def test_what_is_on_its_way_has_not_drifted() -> None:
    told = placing(on("4", "batch"))
    told.ask(plug(1))
    elsewhere = {1: Place.on("4", "other")}
    assert drifts(told, elsewhere) == []
    told.accept(1)
    assert drifts(told, elsewhere) == []
    told.place()
    assert drifts(told, elsewhere) == [(VcpuMap([1]), Place.on("4", "other"))]


def test_a_plug_that_is_not_sent_again_is_not_on_its_way() -> None:
    told = placing(on("4"), reconnects=True)
    request = plug(1)
    told.ask(request)
    told.cancel(request)
    told.pause()
    told.resume("0")
    assert told.is_settled(request)
    assert not told.state.places.arriving


def test_the_placement_of_a_map_that_the_agent_keeps_from_beginning_is_not_kept() -> None:
    told = Story(make_state("0-1", has_agent=True))
    told.tell(HostIs(HOST))
    told.guest = None
    request = whole_map("0", offline_first=True, placement=Placement.pinned({2: "4"}))
    assert told.ask(request) == []
    assert isinstance(told.error(request), AgentSilentError)
    assert told.state.places.placement is None
