"""An unplug that the guest's agent is asked for first: nothing is sent to QEMU before, and what comes to nothing is
taken back.
"""

from dataclasses import replace
from typing import Any

import pytest

from qmpvcpu import (
    DenialReason,
    OnFailure,
    OutcomeUnknownError,
    StepDeniedError,
    UnplugPendingError,
    UnplugRefusedError,
    VcpuMap,
)
from qmpvcpu.engine.messages import Result, Stop
from qmpvcpu.engine.removal import State
from qmpvcpu.errors import (
    AgentConnectError,
    AgentSilentError,
    CommandRejectedError,
    GuestAgentError,
    GuestNumberUnknownError,
    MonitorLostError,
)
from qmpvcpu.events import UnplugRefused
from qmpvcpu.model.transition import Action, Direction, Intent, Step
from qmpvcpu.model.verdicts import Denied, Refused
from qmpvcpu.planning.recovery import revert_plan
from tests.engine.story import Story, make_state, set_state, unplug, whole_map

STOP, CONTINUE, REVERT = OnFailure
MAY_BE_OFFLINE = "it may be offline in the guest"


def told_of(start: str, wish: str = "", *, reconnects: bool = False, **options: Any) -> Story:
    """Return a story of a VM with an agent, whose guest has all vCPUs online; unplugs go through the agent."""
    told = Story(make_state(start, has_agent=True), reconnects=reconnects)
    told.guest = dict.fromkeys(VcpuMap.parse(start), True)
    if wish:
        told.begun = told.wish(wish, offline_first=True, **options)
    return told


def one(told: Story, vcpu: int = 1, **options: Any) -> Any:
    """Have one vCPU unplugged through the agent; return the request."""
    request = unplug(vcpu, offline_first=True, **options)
    told.ask(request)
    return request


def numberless() -> GuestNumberUnknownError:
    return GuestNumberUnknownError("/ga", VcpuMap([1]), "nothing tells which it is")


def nobody() -> AgentConnectError:
    return AgentConnectError("/ga", "nobody listens")


def last(told: Story, vcpu: int) -> str:
    """Why the step of *vcpu* is not as wanted."""
    return told.step(vcpu).reason


# One vCPU.


def test_the_agent_takes_it_offline_and_then_qemu_is_asked() -> None:
    told, request = told_of("0-1"), unplug(1, offline_first=True)
    assert told.ask(request) == ["save intent", "take 1 offline"]
    (step,) = told.intents[0].steps if told.intents[0] else ()
    assert step.asks_agent, "a crash must know"
    told.now += 2.0
    assert told.obeys() == ["del 1"]
    told.accept(1)
    assert told.ejects(1) == ["save outcome"]
    assert told.result(request) == {1}
    assert told.subject.runs[0].seconds == 2.0, "from the first question"


def test_a_guest_that_refuses_keeps_it_and_qemu_is_sent_nothing() -> None:
    told = told_of("0-1")
    request = one(told)
    told.now += 1.5
    assert told.balks("Device or resource busy (EBUSY)") == ["save outcome"]
    error = told.error(request)
    assert isinstance(error, UnplugRefusedError)
    assert (error.by_agent, error.code, error.reason) == (True, None, "Device or resource busy (EBUSY)")
    assert str(error) == (
        "unplug of vCPU 1 refused by the guest, which keeps it online: Device or resource busy (EBUSY); nothing was"
        " sent to QEMU, you may ask again"
    )
    assert told.subject.runs[0].verdict == Refused(VcpuMap([1]), None, error.reason, 1.5, by_agent=True)
    assert not told.sent
    assert told.state.layout.pending == set()
    assert [each.reason for each in told.events if isinstance(each, UnplugRefused)] == [error.reason]


def test_after_a_refusal_it_may_be_asked_again() -> None:
    told = told_of("0-1")
    one(told)
    told.balks()
    request = unplug(1, offline_first=True)
    assert told.ask(request) == ["save intent", "take 1 offline"]
    assert told.obeys() == ["del 1"]


def test_what_was_taken_offline_before_a_refusal_comes_back() -> None:
    """Of a slot of several vCPUs, one may go and the next refuse."""
    told = told_of("0-1")
    request = one(told)
    assert told.balks(done=[1]) == ["bring 1 online"]
    assert not told.is_settled(request)
    assert told.obeys() == ["save outcome"]
    assert isinstance(told.error(request), UnplugRefusedError)


@pytest.mark.parametrize(("error", "may_be_offline"), [(nobody(), False), (numberless(), False), (None, True)])
def test_an_agent_that_fails_denies_it_with_its_own_error(
    error: GuestAgentError | None, may_be_offline: bool
) -> None:
    """One that fell silent may do it yet: the guest is told that it stays."""
    told = told_of("0-1")
    request = one(told)
    sent = told.is_silent(error)
    if may_be_offline:
        assert sent == ["bring 1 online"]
        assert told.obeys() == ["save outcome"]
    else:
        assert sent == ["save outcome"]
    failed = told.error(request)
    assert isinstance(failed, AgentSilentError) if error is None else failed is error
    assert isinstance(told.subject.runs[0].verdict, Denied)
    assert not told.sent


def test_what_is_offline_already_is_not_taken_offline() -> None:
    told = told_of("0-1")
    told.guest = {0: True, 1: False}
    request = unplug(1, offline_first=True)
    assert told.ask(request) == ["save intent", "del 1"]
    told.accept(1)
    assert told.refuses(1) == ["save outcome"], "and not brought online by us"
    assert isinstance(told.error(request), UnplugRefusedError)


def test_what_went_offline_by_itself_meanwhile_is_not_ours_to_bring_back() -> None:
    told = told_of("0-1")
    request = one(told)
    told.guest = {0: True, 1: False}
    assert told.obeys() == ["del 1"]
    assert told.accept(1) == []
    assert told.refuses(1) == ["save outcome"]
    assert isinstance(told.error(request), UnplugRefusedError)


def test_one_that_the_guest_refuses_all_the_same_is_brought_online_again() -> None:
    told = told_of("0-1")
    request = one(told)
    told.obeys()
    told.accept(1)
    assert told.refuses(1) == ["bring 1 online"]
    assert not told.is_settled(request), "it is over when the vCPU is back"
    assert told.obeys() == ["save outcome"]
    error = told.error(request)
    assert isinstance(error, UnplugRefusedError)
    assert not error.by_agent
    assert told.guest == {0: True, 1: True}


def test_as_long_as_one_may_have_to_be_brought_online_again_a_crash_must_know() -> None:
    told = told_of("0-2")
    request = one(told)
    told.obeys()
    told.accept(1)
    told.ask(unplug(2))
    assert told.intents[-1] is not None, "what another change saves covers it too"
    assert {step.first for step in told.intents[-1].steps} == {1, 2}
    assert told.refuses(1) == ["bring 1 online"]
    told.obeys()
    assert told.error(request)


def test_one_that_qemu_rejects_is_brought_online_again() -> None:
    told = told_of("0-1")
    request = one(told)
    told.obeys()
    assert told.reject(1) == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert isinstance(told.error(request), CommandRejectedError)


def test_one_that_must_not_be_sent_any_more_is_brought_online_again() -> None:
    told = told_of("0-1")
    request = one(told)
    told.state.exported = True
    assert told.obeys() == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    error = told.error(request)
    assert isinstance(error, StepDeniedError)
    assert error.reason is DenialReason.EXPORTED


def test_an_agent_that_does_not_bring_it_back_is_told_of() -> None:
    told = told_of("0-1", "0", on_failure=CONTINUE)
    told.obeys()
    told.accept(1)
    told.refuses(1)
    assert told.is_silent() == ["save outcome"]
    assert f"; {MAY_BE_OFFLINE}: guest agent on /ga: no answer within 10 s: it hangs" in last(told, 1)


def test_the_error_of_a_single_one_tells_of_it_too() -> None:
    told = told_of("0-1")
    request = one(told)
    told.obeys()
    told.accept(1)
    told.refuses(1)
    told.is_silent(nobody())
    assert str(told.error(request)).endswith(f"; {MAY_BE_OFFLINE}: guest agent on /ga: nobody listens")


def test_a_deadline_leaves_it_offline_and_says_so() -> None:
    told = told_of("0-1", "0", timeout=5.0)
    told.obeys()
    told.accept(1)
    assert told.wait(5.0) == ["look"]
    assert told.look("0-1") == ["save outcome"], "QEMU never forgets the request"
    assert told.verdicts == {1: "PENDING"}
    assert (
        last(told, 1)
        == "the guest has not reacted in time; QEMU never forgets the request; it is offline in the guest"
    )


def test_a_single_one_that_is_pending_stays_offline_too() -> None:
    told = told_of("0-1")
    request = one(told, timeout=0.0)
    told.obeys()
    assert told.accept(1) == ["save outcome"]
    error = told.error(request)
    assert isinstance(error, UnplugPendingError)
    assert str(error).endswith("; it is offline in the guest")


def test_a_reply_that_does_not_come_leaves_it_offline_and_says_so() -> None:
    told = told_of("0-1", "0")
    told.obeys()
    assert told.wait(10.0) == ["save the rest"]
    assert told.verdicts == {1: "UNKNOWN"}
    assert last(told, 1).endswith(f"; {MAY_BE_OFFLINE}")


@pytest.mark.parametrize("answer", ["done", "refused", "silent"])
def test_one_that_has_left_meanwhile_is_gone_whatever_the_agent_says(answer: str) -> None:
    """Somebody else was faster: that is what was asked for."""
    told = told_of("0-1")
    request = one(told)
    told.read("0")
    answers = {"done": told.obeys, "refused": told.balks, "silent": told.is_silent}
    assert answers[answer]() == ["save outcome"]
    assert told.result(request) == {1}


def test_a_removal_that_another_client_asks_for_meanwhile_is_joined() -> None:
    told = told_of("0-1", "0", on_failure=REVERT)
    told.works(1)
    assert told.obeys() == [], "never asked twice"
    assert told.refuses(1) == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert told.verdicts == {1: "REFUSED"}


def test_what_another_clients_removal_has_taken_meanwhile_is_not_undone() -> None:
    told = told_of("0-2", "0", on_failure=REVERT)
    told.works(2)
    assert told.obeys() == ["take 1 offline"]
    told.ejects(2)
    assert told.balks() == ["save outcome"]
    assert told.verdicts == {2: "UNPLUGGED, not undone", 1: "REFUSED"}


def test_a_removal_that_is_under_way_is_joined_and_the_agent_not_asked() -> None:
    told = told_of("0-1")
    told.works(1)
    request = unplug(1, offline_first=True)
    assert told.ask(request) == []
    told.ejects(1)
    assert told.result(request) == {1}
    assert not told.sent


def test_set_state_takes_it_offline_first_too() -> None:
    told, request = told_of("0-1"), set_state(1, enabled=False, offline_first=True)
    assert told.ask(request) == ["save intent", "take 1 offline"]
    assert told.obeys() == ["del 1"]


def test_without_an_agent_it_is_denied() -> None:
    told, request = Story("0-1"), unplug(1, offline_first=True)
    assert told.ask(request) == []
    error = told.error(request)
    assert isinstance(error, StepDeniedError)
    assert error.reason is DenialReason.NO_AGENT


# Only a request.


def test_a_request_is_settled_when_qemu_has_accepted_it_and_the_vcpu_stays_offline() -> None:
    told = told_of("0-1")
    request = one(told, result=Result.REMOVAL)
    assert told.obeys() == ["del 1"]
    assert told.accept(1) == ["save outcome"]
    removal, joined = told.result(request)
    assert (removal.state, joined) == (State.REQUESTED, False)
    assert not told.asks


@pytest.mark.parametrize("how", ["refused", "rejected"])
def test_a_request_that_comes_to_nothing_brings_it_back(how: str) -> None:
    told = told_of("0-1")
    request = one(told, result=Result.REMOVAL)
    if how == "refused":
        assert told.balks(done=[1]) == ["bring 1 online"]
    else:
        told.obeys()
        assert told.reject(1) == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert told.error(request)


# The list before the plan.


def test_the_plan_is_made_of_the_guests_list() -> None:
    told = told_of("0-3")
    told.first_looks_wait = True
    request = whole_map("0", offline_first=True, on_failure=CONTINUE)
    assert told.ask(request) == ["list the guest"]
    assert told.lists({0: True, 1: True, 2: False, 3: True}) == ["first look"]
    assert told.see(first=True) == ["save intent", "take 3 offline", "del 2"]
    assert told.obeys() == ["del 3", "take 1 offline"], "the agent is asked for one after another"


@pytest.mark.parametrize("wish", ["0", "0-3"])
def test_an_agent_that_tells_no_list_matters_only_to_what_needs_it(wish: str) -> None:
    told = told_of("0-1")
    told.guest = None
    request = whole_map(wish, offline_first=True)
    if wish == "0":
        assert told.ask(request) == []
        assert isinstance(told.error(request), AgentSilentError)
        assert not told.sent
    else:
        assert told.ask(request) == ["save intent", "add 2", "add 3"]


# Whole maps.


def test_under_stop_one_is_taken_offline_when_the_one_before_has_left() -> None:
    told = told_of("0-2", "0")
    assert told.begun == ["save intent", "take 2 offline"]
    assert told.obeys() == ["del 2"]
    assert told.accept(2) == []
    assert told.ejects(2) == ["take 1 offline"]
    assert told.balks() == ["save outcome"]
    assert told.verdicts == {2: "UNPLUGGED", 1: "REFUSED"}
    assert last(told, 1).startswith("the guest keeps it online, and QEMU was sent nothing: Device or resource busy")


def test_under_stop_nothing_is_sent_after_a_refusal() -> None:
    told = told_of("0-2", "0")
    assert told.balks() == ["save outcome"]
    assert told.verdicts == {2: "REFUSED", 1: "not sent"}
    assert not told.sent


def test_questions_to_the_agent_count_among_the_commands_in_flight() -> None:
    told = told_of("0-5", "0", on_failure=CONTINUE, in_flight=2)
    assert told.begun == ["save intent", "take 5 offline"]
    assert told.obeys() == ["del 5", "take 4 offline"]
    assert told.obeys() == ["del 4"], "two commands are out"
    assert told.accept(5) == ["take 3 offline"]


def test_after_a_refusal_under_revert_nothing_more_is_taken_offline() -> None:
    told = told_of("0-2", "0", on_failure=REVERT)
    assert told.balks() == ["save outcome"]
    assert told.verdicts == {2: "REFUSED", 1: "not sent"}
    assert told.outcome == "REVERTED"
    assert not told.sent


def test_after_a_refusal_under_revert_what_the_agent_still_takes_offline_comes_back() -> None:
    told = told_of("0-2", "0", on_failure=REVERT)
    assert told.obeys() == ["del 2", "take 1 offline"]
    told.accept(2)
    assert told.refuses(2) == ["bring 2 online"], "the other question is out"
    assert told.obeys() == ["bring 1 online"], "and nothing is sent for it"
    told.obeys()
    assert told.obeys() == ["save outcome"]
    assert told.verdicts == {2: "REFUSED", 1: "not sent"}
    assert last(told, 1).endswith("taken offline in the guest, and brought online again")
    assert told.outcome == "REVERTED"


def test_the_undoing_of_an_unplug_brings_online_what_the_agent_had_taken_offline() -> None:
    told = told_of("0-2", "0", on_failure=REVERT)
    told.obeys()
    told.accept(2)
    told.ejects(2)
    assert told.balks() == ["save reverting", "add 2"]
    assert told.accept(2) == ["list the guest"]
    assert told.lists({0: True, 1: True, 2: False}) == ["bring 2 online"]
    assert told.obeys() == ["save outcome"]
    assert told.verdicts == {2: "UNPLUGGED, undone", 1: "REFUSED"}
    assert told.outcome == "REVERTED"


def test_an_undoing_that_does_not_come_online_is_incomplete() -> None:
    told = told_of("0-2", "0", on_failure=REVERT, timeout=5.0)
    told.obeys()
    told.accept(2)
    told.ejects(2)
    told.balks()
    told.accept(2)
    told.lists({0: True, 1: True, 2: False})
    assert told.balks("No space left on device") == ["save outcome"]
    assert told.verdicts == {2: "UNPLUGGED, not undone", 1: "REFUSED"}
    assert told.outcome == "REVERT_INCOMPLETE"
    assert last(told, 2).startswith("undoing it: the guest agent did not show it online: guest agent on /ga")


def test_what_the_guest_had_offline_before_is_not_brought_online_by_the_undoing() -> None:
    told = told_of("0-2")
    told.guest = {0: True, 1: True, 2: False}
    assert told.wish("0", offline_first=True, on_failure=REVERT) == ["save intent", "del 2", "take 1 offline"]
    told.accept(2)
    told.ejects(2)
    assert told.balks() == ["save reverting", "add 2"]
    assert told.accept(2) == ["save outcome"]
    assert told.outcome == "REVERTED"


def test_the_undoing_of_a_plug_goes_through_the_agent_too() -> None:
    told = told_of("0-1", "0,2", on_failure=REVERT)
    assert told.accept(2) == ["take 1 offline"]
    assert told.balks() == ["save reverting", "take 2 offline"]
    assert told.obeys() == ["del 2"]
    told.accept(2)
    assert told.ejects(2) == ["save outcome"]
    assert told.outcome == "REVERTED"


def test_what_is_not_brought_back_makes_the_revert_incomplete() -> None:
    told = told_of("0-2", "0", on_failure=REVERT)
    told.obeys()
    told.accept(2)
    told.refuses(2)
    assert told.obeys() == ["bring 1 online"]
    told.obeys()
    assert told.is_silent() == ["save outcome"]
    assert told.outcome == "REVERT_INCOMPLETE"
    assert told.verdicts == {2: "REFUSED", 1: "not sent, not undone"}
    assert MAY_BE_OFFLINE in last(told, 1)


def test_a_kept_vcpu_has_nothing_to_do_with_the_agent() -> None:
    told = told_of("0-2")
    told.works(1)
    assert told.wish("0-1", offline_first=True) == ["save intent", "take 2 offline"]
    assert told.ejects(1) == ["add 1"]
    assert told.accept(1) == []
    assert told.obeys() == ["del 2"]


# Stopping.


def test_a_map_that_is_cancelled_while_the_agent_is_asked_takes_back_what_it_does() -> None:
    told = told_of("0-2", "0")
    assert told.cancel() == [], "the agent's answer is awaited"
    assert told.obeys() == ["bring 2 online"]
    assert told.obeys() == ["save outcome"]
    assert told.report.cancelled
    assert told.verdicts == {2: "not sent", 1: "not sent"}
    assert not told.sent


def test_a_single_one_whose_caller_goes_away_between_the_two_is_taken_back() -> None:
    told = told_of("0-1")
    request = one(told)
    assert told.cancel(request) == []
    assert told.obeys() == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert not told.sent


def test_a_caller_who_goes_away_while_it_is_taken_back_changes_nothing() -> None:
    told = told_of("0-1")
    request = one(told)
    told.is_silent()
    assert told.cancel(request) == []
    assert told.obeys() == ["save outcome"]


def test_total_timeout_between_the_two_takes_it_back() -> None:
    told = told_of("0-2", "0", total_timeout=3.0)
    assert told.wait(3.0) == []
    assert told.obeys() == ["bring 2 online"]
    assert told.obeys() == ["save outcome"]
    assert told.outcome == "PARTIAL"


def test_closing_takes_it_back() -> None:
    told = told_of("0-1")
    one(told)
    assert told.tell(Stop()) == []
    assert told.engine.is_busy
    assert told.obeys() == ["bring 1 online"]
    assert told.engine.is_busy
    assert told.obeys() == ["save outcome"]
    assert not told.engine.is_busy


def test_while_the_connection_is_lost_it_waits_and_then_qemu_is_asked() -> None:
    told = told_of("0-1", reconnects=True)
    request = one(told)
    told.pause()
    assert told.obeys() == []
    assert told.resume("0-1") == ["del 1"], "and the agent not again"
    told.accept(1)
    assert told.ejects(1) == ["save outcome"]
    assert told.result(request) == {1}


@pytest.mark.parametrize("whole", [True, False])
def test_one_that_is_stopped_while_the_connection_is_lost_comes_back(*, whole: bool) -> None:
    told = told_of("0-1", reconnects=True)
    request = whole_map("0", offline_first=True) if whole else unplug(1, offline_first=True)
    told.ask(request)
    told.pause()
    told.obeys()
    assert told.cancel(request) == ["bring 1 online"], "the agent is not QEMU"
    assert told.obeys() == ["save outcome"]
    assert not told.sent


def test_a_connection_that_is_lost_for_good_while_the_agent_is_asked_leaves_what_may_be_offline() -> None:
    told = told_of("0-1", "0")
    told.lose()
    assert last(told, 1) == f"not sent: gone; {MAY_BE_OFFLINE}"
    assert told.engine.recorded.intent is not None, "who recovers knows"
    assert told.obeys() == [], "late"


def test_a_connection_that_is_lost_for_good_between_the_two_leaves_it_offline_and_says_so() -> None:
    told = told_of("0-1", "0", reconnects=True)
    told.pause()
    told.obeys()
    told.lose()
    assert last(told, 1) == f"not sent: gone; {MAY_BE_OFFLINE}"


def test_a_single_one_is_told_of_the_loss() -> None:
    told = told_of("0-1")
    request = one(told)
    told.lose()
    error = told.error(request)
    assert isinstance(error, MonitorLostError)
    assert str(error).endswith(MAY_BE_OFFLINE)


def test_a_command_that_was_in_flight_when_the_connection_was_lost_may_have_been_carried_out() -> None:
    told = told_of("0-1")
    request = one(told)
    told.obeys()
    told.lose()
    error = told.error(request)
    assert isinstance(error, OutcomeUnknownError)
    assert str(error).endswith(f"; {MAY_BE_OFFLINE}")


# Late answers.


def test_a_late_ejection_still_counts() -> None:
    told = told_of("0-2", "0", on_failure=CONTINUE, timeout=5.0)
    told.obeys()
    told.accept(2)
    told.wait(4.0)
    told.obeys()
    told.accept(1)
    told.wait(1.0)
    told.look("0-2")
    assert last(told, 2).endswith("; it is offline in the guest")
    told.ejects(2)
    assert told.verdicts == {2: "UNPLUGGED", 1: "not sent"}
    assert last(told, 2) == ""


def test_a_late_refusal_brings_it_back() -> None:
    told = told_of("0-2", "0", on_failure=CONTINUE, timeout=5.0)
    told.obeys()
    told.accept(2)
    told.wait(4.0)
    told.obeys()
    told.accept(1)
    told.wait(1.0)
    told.look("0-2")
    assert told.refuses(2) == ["bring 2 online"]
    assert told.obeys() == []
    assert told.verdicts == {2: "REFUSED", 1: "not sent"}
    assert told.ejects(1) == ["save outcome"]


def test_a_late_refusal_while_the_rest_is_undone_leaves_it_offline_and_says_so() -> None:
    told = told_of("0-2", "0", on_failure=REVERT, timeout=5.0)
    told.obeys()
    told.obeys()
    told.accept(2, 1)
    told.ejects(1)
    told.wait(5.0)
    assert told.look("0,2") == ["save reverting", "add 1"]
    assert told.refuses(2) == []
    told.accept(1)
    assert told.lists() == ["bring 1 online"]
    assert told.obeys() == ["save outcome", "bring 2 online"], "which nobody waits for"
    assert told.verdicts == {2: "REFUSED, not undone", 1: "UNPLUGGED, undone"}
    assert last(told, 2).endswith(f"; {MAY_BE_OFFLINE}")
    assert told.outcome == "REVERT_INCOMPLETE"


# After a crash.


def intent(*steps: Step) -> Intent:
    return Intent(VcpuMap.parse("0-2"), VcpuMap([0]), steps, REVERT, direction=Direction.REVERTING)


def test_a_vcpu_of_a_plan_that_is_only_to_be_online_is_asked_for_and_brought_online() -> None:
    told = told_of("0-2")
    told.guest = {0: True, 1: False, 2: True}
    assert told.ask(only_online(1)) == ["save reverting", "list the guest"]
    assert told.lists() == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert told.outcome == "REVERTED"
    assert told.step(1).action is Action.ONLINE
    assert told.verdicts == {1: "PLUGGED"}


def test_one_that_does_not_come_online_is_told_of_once() -> None:
    told = told_of("0-2")
    told.ask(only_online(1, tries=3))
    assert told.lists({0: True, 1: False, 2: True}) == ["bring 1 online"]
    assert told.balks("no") == ["save outcome"]
    assert told.outcome == "REVERT_INCOMPLETE"
    assert "did not show it online" in last(told, 1)


def test_one_that_no_agent_is_known_for_is_told_of() -> None:
    told = Story("0-2")
    assert told.ask(only_online(1)) == ["save reverting", "save outcome"]
    assert told.outcome == "REVERT_INCOMPLETE"
    assert "it may be offline in the guest, and no agent was given" in last(told, 1)


def test_an_answer_to_a_question_of_an_earlier_try_changes_nothing() -> None:
    told = told_of("0-2")
    told.last_looks_wait = True
    request = only_online(1, tries=2)
    told.ask(request)
    told.guest = {0: True, 1: True, 2: True}
    assert told.tell(told.listing()) == ["last look"], "somebody else has asked; our own question is out"
    told.last_looks_wait = False
    assert told.see("0-1") == ["save outcome", "save reverting", "add 2"], "it is tried again"
    assert told.lists() == []
    assert not told.is_settled(request)
    assert told.accept(2) == ["list the guest"]
    assert told.lists() == ["save outcome"]
    assert told.outcome == "REVERTED"


def cut_short(
    told: Story, how: str, steps: tuple[Step, ...], wish: str, *, target: str = "0", policy: OnFailure = STOP
) -> list[str]:
    """Finish or revert a map of 0-2 to *target* that was cut short, as ``vm.recover`` does."""
    reverts = how == "revert"
    direction = Direction.REVERTING if reverts else Direction.FORWARD
    cut = Intent(VcpuMap.parse("0-2"), VcpuMap.parse(target), steps, policy, direction=direction)
    change = whole_map(wish, intent=cut, timeout=5.0, on_failure=policy, offline_first=not reverts)
    if reverts:
        return told.ask(replace(change, plan=lambda now: revert_plan(cut, change.plan(now), now.layout)))
    return told.ask(change)


ASKED = Step(Action.UNPLUG, VcpuMap([1]), "/machine/peripheral/vcpu1", asks_agent=True)


def test_what_was_offline_before_the_crash_is_brought_online_when_the_rest_is_refused() -> None:
    told = told_of("0-1")
    told.guest = {0: True, 1: False}
    assert cut_short(told, "finish", (ASKED,), "0") == ["save intent", "del 1"]
    told.accept(1)
    assert told.refuses(1) == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]


def test_what_was_removed_before_the_crash_is_plugged_online_when_the_rest_is_refused() -> None:
    told = told_of("0,2")
    also = Step(Action.UNPLUG, VcpuMap([2]), "/machine/peripheral/vcpu2")
    assert cut_short(told, "finish", (ASKED, also), "0", policy=REVERT) == ["save intent", "take 2 offline"]
    assert told.balks() == ["save reverting", "add 1"]
    assert told.accept(1) == ["list the guest"]
    assert told.lists({0: True, 1: False, 2: True}) == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert told.outcome == "REVERTED"


def test_a_removal_that_was_asked_for_before_the_crash_and_is_refused_now_leaves_it_online() -> None:
    told = told_of("0-2")
    told.works(1)
    told.guest = {0: True, 1: False, 2: True}
    assert cut_short(told, "revert", (ASKED,), "0-2", policy=CONTINUE) == ["save reverting"]
    assert told.refuses(1) == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert told.outcome == "REVERTED"


def test_one_that_goes_all_the_same_is_plugged_again_and_online() -> None:
    told = told_of("0-2")
    told.works(1)
    cut_short(told, "revert", (ASKED,), "0-2", policy=CONTINUE)
    assert told.ejects(1) == ["add 1"]
    assert told.accept(1) == ["list the guest"]
    assert told.lists({0: True, 1: True, 2: True}) == ["save outcome"]
    assert told.outcome == "REVERTED"


def test_one_that_is_pending_still_and_offline_is_no_way_back() -> None:
    told = told_of("0-2")
    told.works(1)
    cut_short(told, "revert", (ASKED,), "0-2", policy=CONTINUE)
    told.wait(5.0)
    told.look("0-2")
    assert told.outcome == "REVERT_INCOMPLETE"
    assert last(told, 1).endswith("; it is offline in the guest")


def test_one_that_leaves_while_it_is_to_be_brought_online_is_plugged_again() -> None:
    """QEMU had been asked for it before the crash, which nobody could know of."""
    told = told_of("0-2")
    assert told.ask(only_online(1, tries=3)) == ["save reverting", "list the guest"]
    told.works(1)
    assert told.ejects(1) == ["save outcome", "save reverting", "add 1"]
    assert told.accept(1) == ["list the guest"]
    assert told.lists({0: True, 2: True}) == [], "which was asked for before"
    assert told.lists({0: True, 1: True, 2: True}) == ["save outcome"]
    assert told.outcome == "REVERTED"


def only_online(vcpu: int, *, tries: int = 1, timeout: float = 5.0) -> Any:
    """Return a map that leads back to what is there, with *vcpu* to be brought online."""
    cut = intent(Step(Action.UNPLUG, VcpuMap([vcpu]), asks_agent=True))
    change = whole_map("0-2", intent=cut, tries=tries, timeout=timeout, on_failure=CONTINUE)
    return replace(change, plan=lambda now: revert_plan(cut, change.plan(now), now.layout))
