"""What proves a plug beyond QEMU's acceptance: how it is found out, how often, and what is made of it."""

from typing import Any

import pytest

from qmpvcpu import DenialReason, OnFailure, Outcome, Proof, StepDeniedError, UnprovenError, VcpuMap, qapi
from qmpvcpu.engine.messages import Heard
from qmpvcpu.errors import AgentConnectError, MonitorLostError
from qmpvcpu.events import VcpuProven
from qmpvcpu.model.transition import ProofSeconds
from tests.engine.story import Story, make_state, plug, set_state, whole_map

STARTED, ONLINE = Proof.STARTED, Proof.ONLINE


def with_agent(start: str, wish: str = "", *, guest: dict[int, bool] | None = None, **more: Any) -> Story:
    """Return a story of a VM whose guest has an agent, which lists *guest* before the plan."""
    told = Story(make_state(start, has_agent=True), **{key: more.pop(key) for key in ("reconnects",) if key in more})
    told.guest = {0: True} if guest is None else guest
    if wish:
        told.begun = told.wish(wish, **more)
    return told


def unproven(told: Story, request: object) -> UnprovenError:
    error = told.error(request)  # type: ignore[arg-type] # any request
    assert isinstance(error, UnprovenError)
    return error


def rung(told: Story) -> Proof | None:
    """The highest rung that is known of vCPU 1."""
    return told.state.layout[1].proof


def proven(told: Story) -> list[tuple[int, Proof, float | None]]:
    """What was announced: of which vCPU, which rung, and in how many seconds."""
    return [(min(each.ids), each.proof, each.seconds) for each in told.events if isinstance(each, VcpuProven)]


def reset(told: Story) -> list[str]:
    return told.tell(Heard(qapi.RunEvent.RESET))


# STARTED: what no event tells is asked for again and again.


def test_a_vcpu_has_started_once_a_look_shows_that_it_has_run() -> None:
    told, request = Story("0"), plug(1, proof=STARTED)
    told.ask(request)
    assert told.accept(1) == ["look who runs of 1"]
    assert told.have_run() == []
    assert told.wait(0.01) == ["look who runs of 1"]
    assert told.have_run(1) == ["save outcome"]
    assert told.result(request) == {1}
    assert rung(told) is STARTED
    assert proven(told) == [(1, STARTED, 0.01)]


def test_it_is_looked_for_at_once_and_then_after_pauses_that_double_up_to_half_a_second() -> None:
    told, pauses = Story("0"), []
    told.ask(plug(1, proof=STARTED))
    told.accept(1)
    for _ in range(9):
        told.have_run()
        assert told.deadline is not None
        pauses.append(round(told.deadline - told.now, 3))
        assert told.wait(pauses[-1] - 0.001) == [], "not before it is time"
        assert told.wait(0.0011) == ["look who runs of 1"]
    assert pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5, 0.5]


def test_while_a_look_is_out_no_other_is_sent() -> None:
    told = Story("0")
    told.ask(plug(1, proof=STARTED))
    told.accept(1)
    assert told.wait(5.0) == []
    assert told.acknowledges(1) == []
    assert told.have_run() == []
    assert told.deadline == pytest.approx(told.now + 0.01)


def test_the_guests_acknowledgement_has_it_looked_for_at_once_and_soon_again() -> None:
    told = Story("0")
    told.ask(plug(1, proof=STARTED))
    told.accept(1)
    for pause in (0.01, 0.02, 0.04, 0.08):
        told.have_run()
        told.wait(pause)
    told.have_run()
    assert told.wait(0.1) == [], "the pause is 0.16 s"
    assert told.acknowledges(1) == ["look who runs of 1"]
    told.have_run()
    assert told.wait(0.01) == ["look who runs of 1"]


def test_further_news_of_the_slot_change_nothing_of_the_pace() -> None:
    told = Story("0")
    told.ask(plug(1, proof=STARTED))
    told.accept(1)
    told.acknowledges(1)
    told.have_run()
    for _ in range(3):
        assert told.acknowledges(1) == []


def test_one_look_is_for_all_that_wait_for_it() -> None:
    told = Story("0", "0-3", proof=STARTED)
    assert told.accept(1) == ["look who runs of 1"]
    assert told.accept(2) == told.accept(3) == []
    assert told.have_run(1) == []
    assert told.wait(0.01) == ["look who runs of 2-3"]
    assert told.have_run(2, 3) == ["save outcome"]
    assert told.outcome == "REACHED"
    assert told.step(1).proofs == ProofSeconds(present=0.0, started=0.0)
    assert told.step(3).proofs == ProofSeconds(present=0.0, started=0.01)


def test_what_has_run_in_the_slot_before_counts_for_nothing() -> None:
    """The look was sent when another CPU was there."""
    told, request = Story("0-1"), plug(2, proof=STARTED)
    told.ask(request)
    told.accept(2)
    told.read("0-2", others=[2])
    assert told.state.layout[2].qom_path == "/machine/peripheral/other2"
    assert told.have_run(2) == []
    assert told.state.layout[2].proof is Proof.PRESENT
    assert told.wait(0.01) == ["look who runs of 2"]
    told.have_run(2)
    assert told.state.layout[2].proof is STARTED


def test_what_has_run_before_a_reset_counts_for_nothing() -> None:
    told, request = Story("0"), plug(1, proof=STARTED)
    told.ask(request)
    told.accept(1)
    reset(told)
    assert told.have_run(1) == []
    assert told.wait(0.01) == ["look who runs of 1"]
    assert told.have_run(1) == ["save outcome"]


def test_a_vcpu_that_never_starts_is_unproven_and_told_as_what_it_is() -> None:
    told, request = Story("0"), plug(1, timeout=0.2, proof=STARTED)
    told.ask(request)
    told.accept(1)
    told.acknowledges(1)
    told.have_run()
    for pause in (0.01, 0.02, 0.04, 0.08):
        told.wait(pause)
        told.have_run()
    assert told.wait(0.05) == ["save outcome"]
    error = unproven(told, request)
    assert (error.wanted, error.reached, error.code) == (STARTED, Proof.ACKNOWLEDGED, 0)
    assert error.reason == "it has run no guest code, after 0.2 s"
    assert str(error).startswith("plug of vCPU 1: plugged and acknowledged, never started: it has run no guest")
    assert "maxcpus=" in error.hint
    assert rung(told) is Proof.ACKNOWLEDGED


def test_the_deadline_passes_with_a_look_out_and_what_it_shows_then_is_noted_all_the_same() -> None:
    told, request = Story("0"), plug(1, timeout=5.0, proof=STARTED)
    told.ask(request)
    told.accept(1)
    assert told.wait(5.0) == ["save outcome"]
    assert unproven(told, request).reached is Proof.PRESENT
    assert told.have_run(1) == []
    assert rung(told) is STARTED


def test_nothing_is_looked_for_while_the_connection_is_lost_and_at_once_when_it_is_back() -> None:
    told = Story("0", reconnects=True)
    request = plug(1, timeout=60.0, proof=STARTED)
    told.ask(request)
    told.accept(1)
    told.pause()
    assert not told.run_looks
    for _ in range(5):
        assert told.wait(1.0) == []
    assert told.resume("0-1") == ["look who runs of 1"]
    assert told.have_run(1) == ["save outcome"]
    assert told.result(request) == {1}


def test_a_plug_whose_reply_was_lost_is_looked_for_when_it_is_found() -> None:
    told = Story("0", reconnects=True)
    request = plug(1, proof=STARTED)
    told.ask(request)
    told.pause()
    assert told.resume("0-1") == ["look who runs of 1"]
    assert told.have_run(1) == ["save outcome"]
    assert told.result(request) == {1}


def test_a_connection_that_is_lost_for_good_ends_the_waiting() -> None:
    told, request = Story("0"), plug(1, proof=STARTED)
    told.ask(request)
    told.accept(1)
    told.lose()
    error = told.error(request)
    assert isinstance(error, MonitorLostError), "not the guest's fault"
    assert error.outcome is Outcome.CHANGED
    assert "vCPU 1 is plugged, and was not started until then" in str(error)
    assert told.deadline is None


def test_the_report_of_a_map_tells_that_a_proof_was_cut_short() -> None:
    told = Story("0")
    told.wish("0-1", proof=STARTED)
    told.accept(1)
    told.lose()
    reason = told.step(1).reason
    assert reason.endswith("; until then it has run no guest code"), reason


def test_it_is_waited_for_on_after_a_look_that_fails() -> None:
    told, request = Story("0"), plug(1, proof=STARTED)
    told.ask(request)
    told.accept(1)
    told.looks.append(told.run_looks.popleft())
    assert told.fail_to_look() == []
    assert told.wait(0.01) == ["look who runs of 1"]
    assert told.have_run(1) == ["save outcome"]


@pytest.mark.parametrize("policy", OnFailure)
def test_in_a_map_a_vcpu_that_never_starts_is_a_failure(policy: OnFailure) -> None:
    told = Story("0", "0-2", on_failure=policy, timeout=1.0, proof=STARTED)
    told.accept(1, 2)
    told.have_run(1)
    told.wait(0.01)
    sent = told.wait(1.0)
    if policy is OnFailure.REVERT:
        assert sent == ["save reverting", "del 2", "del 1"]
        told.accept(1, 2)
        told.ejects(1, 2)
        assert told.verdicts == {1: "PLUGGED, undone", 2: "PLUGGED, undone"}
        assert told.outcome == "REVERTED"
    else:
        assert sent == ["save outcome"]
        assert told.outcome == "PARTIAL"
        assert told.report.layout.enabled == told.report.target
    assert told.step(1).missing is None
    assert told.step(2).missing is STARTED
    assert told.step(2).reason == "it has run no guest code"
    assert told.step(2).proofs == ProofSeconds(present=0.0)
    assert not told.step(2).ok


def test_a_map_that_is_cancelled_ends_the_waiting() -> None:
    told = Story("0", "0-2", proof=STARTED)
    told.accept(1, 2)
    assert told.cancel() == ["save outcome"]
    assert told.report.cancelled
    assert told.step(1).missing is STARTED
    assert told.have_run(1, 2) == [], "late"


def test_total_timeout_ends_the_waiting() -> None:
    told = Story("0", "0-2", proof=STARTED, timeout=30.0, total_timeout=4.0)
    told.accept(1, 2)
    assert told.wait(4.0) == ["save outcome"]
    assert told.outcome == "PARTIAL"
    assert told.have_run(1, 2) == []


def test_a_map_that_is_halted_still_waits_for_what_is_plugged() -> None:
    told = Story("0", "0-3", proof=STARTED, in_flight=2)
    told.accept(1)
    assert told.reject(2) == [], "nothing more is sent"
    told.have_run()
    assert told.wait(0.01) == ["look who runs of 1,3"] or told.run_looks
    assert told.step(1).verdict is None


def test_for_a_caller_who_goes_away_nobody_looks_again_and_what_was_asked_is_taken_in() -> None:
    told, request = Story("0"), plug(1, proof=STARTED)
    told.ask(request)
    told.accept(1)
    assert told.cancel(request) == ["save outcome"]
    assert told.have_run(1) == []
    assert told.state.layout[1].proof is STARTED
    assert told.wait(1.0) == []


def test_what_is_there_already_is_not_waited_for() -> None:
    told, request = Story("0-1"), set_state(1, enabled=True, proof=STARTED)
    told.ask(request)
    assert told.result(request) == VcpuMap()
    assert not told.run_looks


def test_where_nothing_tells_it_the_plug_is_denied() -> None:
    told = Story(make_state("0", vm={"start_unknowable": "QEMU runs on another host, under TCG"}))
    request = plug(1, proof=STARTED)
    assert told.ask(request) == []
    error = told.error(request)
    assert isinstance(error, StepDeniedError)
    assert error.reason is DenialReason.CANNOT_TELL_STARTED


def test_the_undoing_of_an_unplug_is_not_denied_for_want_of_a_proof() -> None:
    """The proof is of what the change itself plugs: of a map that plugs nothing it asks nothing."""
    state = make_state("0-2", vm={"start_unknowable": "QEMU runs on another host, under TCG"})
    told = Story(state, "0", on_failure=OnFailure.REVERT, proof=STARTED)
    told.accept(1, 2)
    told.ejects(2)
    assert told.refuses(1) == ["save reverting", "add 2"]
    assert told.accept(2) == ["save outcome"]
    assert told.outcome == "REVERTED"


# ONLINE: the guest's own list.


def test_a_vcpu_is_online_once_the_guest_lists_it_so() -> None:
    told, request = with_agent("0"), plug(1, proof=ONLINE)
    assert told.ask(request) == ["save intent", "add 1"]
    assert told.accept(1) == ["list the guest"]
    assert told.lists({0: True}) == []
    assert told.wait(0.01) == ["list the guest"]
    assert told.lists({0: True, 1: True}) == ["save outcome"]
    assert told.result(request) == {1}
    assert (1, ONLINE, 0.01) in proven(told)


def test_what_the_guest_has_left_offline_is_brought_online() -> None:
    told, request = with_agent("0"), plug(1, proof=ONLINE)
    told.ask(request)
    told.accept(1)
    assert told.lists({0: True, 1: False}) == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert told.result(request) == {1}


def test_only_looking_brings_nothing_online() -> None:
    told, request = with_agent("0"), plug(1, timeout=1.0, proof=ONLINE, online=False)
    told.ask(request)
    told.accept(1)
    assert told.lists({0: True, 1: False}) == []
    assert told.wait(0.01) == ["list the guest"]
    told.lists()
    assert told.wait(1.0) == ["save outcome"]
    assert unproven(told, request).reason == "the guest has it, but offline, after 1.01 s"


def test_a_guest_that_refuses_to_use_it_ends_the_waiting_at_once() -> None:
    told, request = with_agent("0"), plug(1, proof=ONLINE)
    told.ask(request)
    told.accept(1)
    told.lists({0: True, 1: False})
    told.wait(0.5)
    assert told.balks("No space left on device") == ["save outcome"]
    error = unproven(told, request)
    assert error.reason.startswith("the guest agent did not show it online: guest agent on /ga: refused by the")
    assert error.reason.endswith("No space left on device, after 0.5 s")
    assert error.hint == "", "the guest has said why"


def test_one_question_is_out_at_a_time_and_shared() -> None:
    told = with_agent("0", "0-3", proof=ONLINE)
    assert told.accept(1) == ["list the guest"]
    assert told.accept(2) == told.accept(3) == []
    assert told.acknowledges(2) == []
    assert told.lists({0: True, 1: True, 2: False, 3: False}) == ["bring 2 online", "bring 3 online"]
    assert told.wait(1.0) == []
    assert told.obeys() == []
    assert told.wait(1.0) == [], "the other is out"
    assert told.obeys() == ["save outcome"]
    assert told.outcome == "REACHED"
    assert [told.step(vcpu).missing for vcpu in (1, 2, 3)] == [None, None, None]


def test_each_is_brought_online_by_itself_so_that_a_refusal_is_of_one() -> None:
    told = with_agent("0", "0-2", proof=ONLINE, on_failure=OnFailure.CONTINUE)
    told.accept(1, 2)
    assert told.lists({0: True, 1: False, 2: False}) == ["bring 1 online", "bring 2 online"]
    assert told.balks() == []
    assert told.obeys() == ["save outcome"]
    assert [told.step(vcpu).missing for vcpu in (1, 2)] == [ONLINE, None]


def test_the_list_is_asked_for_in_doubling_pauses() -> None:
    told, pauses = with_agent("0"), []
    told.ask(plug(1, proof=ONLINE))
    told.accept(1)
    for _ in range(8):
        told.lists({0: True})
        assert told.deadline is not None
        pauses.append(round(told.deadline - told.now, 3))
        assert told.wait(pauses[-1]) == ["list the guest"]
    assert pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5]


def test_a_list_that_shows_it_before_it_is_plugged_counts_for_nothing() -> None:
    told, request = with_agent("0", guest={0: True, 1: True}), plug(1, proof=ONLINE)
    told.ask(request)
    assert told.accept(1) == ["list the guest"]
    assert rung(told) is Proof.PRESENT
    assert told.lists({0: True}) == []


def test_the_list_that_somebody_else_asked_for_counts() -> None:
    told, request = with_agent("0"), plug(1, proof=ONLINE)
    told.ask(request)
    told.accept(1)
    told.guest = {0: True, 1: True}
    assert told.tell(told.listing()) == ["save outcome"]
    assert told.result(request) == {1}
    assert told.lists() == [], "late"


def test_an_agent_that_is_not_there_beforehand_keeps_no_plug_from_being_sent() -> None:
    told, request = with_agent("0"), plug(1, proof=ONLINE)
    told.first_looks_wait = True
    assert told.ask(request) == ["list the guest"]
    assert told.asks[0].limit == 1.0, "it need not be there yet"
    assert told.is_silent() == ["save intent", "add 1"]
    assert told.accept(1) == ["list the guest"]
    assert told.is_silent(AgentConnectError("/ga", "nobody listens")) == []
    assert told.wait(0.01) == ["list the guest"]
    assert told.lists({0: True, 1: True}) == ["save outcome"]


def test_an_agent_that_is_never_there_is_told_as_the_reason() -> None:
    told, request = with_agent("0"), plug(1, timeout=1.0, proof=ONLINE)
    told.guest = None
    told.ask(request)
    told.accept(1)
    told.is_silent(AgentConnectError("/ga", "nobody listens"))
    told.wait(1.0)
    error = unproven(told, request)
    assert error.reason == ("the guest agent did not show it online: guest agent on /ga: nobody listens, after 1 s")
    assert error.hint == ""


@pytest.mark.parametrize(
    ("listed", "reason"),
    [({0: True}, "the guest's list does not have it"), ({0: True, 1: False}, "the guest has it, but offline")],
)
def test_the_reason_says_what_the_list_shows(listed: dict[int, bool], reason: str) -> None:
    told, request = with_agent("0"), plug(1, timeout=1.0, proof=ONLINE, online=False)
    told.ask(request)
    told.accept(1)
    told.lists(listed)
    told.wait(1.0)
    assert unproven(told, request).reason == f"{reason}, after 1 s"


def test_while_the_connection_is_lost_the_agent_is_asked_all_the_same() -> None:
    """It is another connection; what it says of the vCPU counts."""
    told = with_agent("0", reconnects=True)
    request = plug(1, proof=ONLINE)
    told.ask(request)
    told.accept(1)
    told.pause()
    assert told.lists({0: True}) == []
    assert told.wait(0.01) == ["list the guest"]
    told.lists({0: True, 1: True})
    told.resume("0-1")
    assert told.result(request) == {1}


def test_where_no_agent_is_known_the_plug_is_denied() -> None:
    told, request = Story("0"), plug(1, proof=ONLINE)
    assert told.ask(request) == []
    error = told.error(request)
    assert isinstance(error, StepDeniedError)
    assert error.reason is DenialReason.NO_AGENT


def test_a_change_that_is_cancelled_while_the_agent_is_asked_beforehand_is_over() -> None:
    told, request = with_agent("0"), plug(1, proof=ONLINE)
    told.first_looks_wait = True
    told.ask(request)
    assert told.cancel(request) == []
    assert told.is_settled(request)
    assert told.lists({0: True}) == [], "late"


def test_nobody_waits_while_the_agent_is_asked_for_somebody_else() -> None:
    told = with_agent("0")
    told.first_looks_wait = True
    assert told.ask(whole_map("0-1", proof=ONLINE)) == ["list the guest"]
    assert told.ask(plug(2)) == ["save intent", "add 2"]
    told.accept(2)
    assert told.ask(whole_map("0,2-3")) == ["first look"]
    assert told.see(first=True) == ["save intent", "add 3"]
    assert told.lists({0: True}) == [], "now it waits for its turn"
    assert told.accept(3)[-1] == "first look"


def test_one_that_is_plugged_and_offline_is_brought_online_by_a_map() -> None:
    told = with_agent("0-2")
    told.guest = {0: True, 1: True, 2: False}
    assert told.ask(whole_map("0-2", proof=ONLINE)) == ["save intent", "bring 2 online"]
    assert told.obeys() == ["save outcome"]
    assert told.verdicts == {2: "PLUGGED"}
    assert told.outcome == "REACHED"


def test_one_that_is_plugged_and_offline_is_only_looked_at_where_that_is_asked() -> None:
    told = with_agent("0-2")
    told.guest = {0: True, 1: True, 2: False}
    wish = whole_map("0-2", proof=ONLINE, online=False, timeout=1.0)
    assert told.ask(wish) == ["save intent", "list the guest"]
    told.lists()
    assert told.wait(1.0) == ["save outcome"]
    assert told.step(2).missing is ONLINE
    assert told.outcome == "PARTIAL"
    assert told.engine.intentions.interrupted is None, "nothing is owed to the guest"


def test_an_agent_that_tells_no_list_now_may_do_so_while_the_step_waits() -> None:
    told = with_agent("0-2")
    told.guest = {0: True, 1: True, 2: False}
    told.tell(told.listing())
    told.first_looks_wait = True
    assert told.ask(whole_map("0-2", proof=ONLINE)) == ["list the guest"]
    assert told.is_silent() == ["first look"]
    assert told.see(first=True) == ["save intent", "bring 2 online"]
    assert told.obeys() == ["save outcome"]
    assert told.outcome == "REACHED"


def test_a_guest_that_is_busy_for_a_moment_is_asked_again() -> None:
    told = with_agent("0")
    told.ask(plug(1, proof=ONLINE))
    told.accept(1)
    assert told.lists({0: True, 1: False}) == ["bring 1 online"]
    assert told.balks(passing=True) == []
    assert told.wait(0.5) == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]


def test_a_vm_that_is_paused_is_no_guest_that_starts_nothing() -> None:
    told, request = with_agent("0"), plug(1, proof=STARTED, timeout=1.0)
    told.ask(request)
    told.accept(1)
    told.tell(Heard(qapi.RunEvent.STOP))
    told.have_run()
    told.wait(1.0)
    error = unproven(told, request)
    assert error.reason.startswith("the VM is paused")
    assert error.hint == "cont lets it run"


# What is known of each CPU.


def test_the_highest_rung_is_kept_and_each_is_announced_once() -> None:
    told, request = with_agent("0"), plug(1, proof=ONLINE)
    told.ask(request)
    told.accept(1)
    told.lists({0: True, 1: True})
    told.acknowledges(1)
    told.acknowledges(1)
    assert rung(told) is ONLINE
    assert proven(told) == [(0, ONLINE, None), (1, ONLINE, 0.0)], "a lower rung than is known is no news"


def test_a_reset_takes_rungs_back() -> None:
    told, request = with_agent("0"), plug(1, proof=ONLINE)
    told.ask(request)
    told.accept(1)
    told.acknowledges(1)
    told.lists({0: True, 1: True})
    reset(told)
    assert rung(told) is Proof.PRESENT
    assert told.state.guest_sees is None
    told.acknowledges(1)
    assert rung(told) is Proof.ACKNOWLEDGED


def test_another_qemu_takes_rungs_back() -> None:
    told, request = with_agent("0", reconnects=True), plug(1, proof=ONLINE)
    told.ask(request)
    told.accept(1)
    told.lists({0: True, 1: True})
    told.pause()
    told.resume("0-1", same_instance=False)
    assert rung(told) is Proof.PRESENT
    assert told.state.guest_sees is None


def test_a_cpu_that_goes_offline_is_online_no_longer() -> None:
    told = with_agent("0-1")
    told.guest = {0: True, 1: True}
    told.tell(told.listing())
    assert rung(told) is ONLINE
    told.guest = {0: True, 1: False}
    told.tell(told.listing())
    assert rung(told) is Proof.PRESENT
    told.guest = {0: True, 1: True}
    told.tell(told.listing())
    assert rung(told) is ONLINE


def test_a_replug_begins_at_the_lowest_rung() -> None:
    told = with_agent("0-1")
    told.guest = {0: True, 1: True}
    told.tell(told.listing())
    told.read("0")
    assert rung(told) is None
    told.read("0-1")
    assert rung(told) is Proof.PRESENT
    assert told.state.guest_sees == {0: True}


def test_the_seconds_of_each_rung_are_from_sending() -> None:
    told = with_agent("0", "0-1", proof=ONLINE)
    told.now += 0.5
    told.accept(1)
    told.now += 0.25
    told.acknowledges(1)
    told.now += 0.25
    told.lists({0: True, 1: True})
    assert told.step(1).proofs == ProofSeconds(present=0.5, acknowledged=0.75, online=1.0)
    assert str(told.step(1).proofs) == "present in 500 ms, acknowledged in 750 ms, online in 1.0 s"
    assert told.step(1).ids == VcpuMap([1])
