"""What the agent has taken offline for an unplug comes back, whoever goes away, and whenever it comes to nothing."""

from dataclasses import replace

import pytest

from qmpvcpu import MonitorLostError, OnFailure, Proof, UnplugPendingError, VcpuMap
from qmpvcpu.engine.intents import Intentions
from qmpvcpu.engine.messages import Change, Result, Stop
from qmpvcpu.engine.removal import State
from qmpvcpu.errors import Outcome
from qmpvcpu.model.transition import Action, Direction, Intent, Step
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import Plan, plan_map
from qmpvcpu.planning.recovery import revert_plan, revert_target
from tests.engine.story import Story, make_state, plug, unplug, whole_map

STOP, CONTINUE, REVERT = OnFailure


def beginning(start: str = "0-1", *, reconnects: bool = False) -> Story:
    """A VM whose guest has an agent, and all that is plugged online."""
    told = Story(make_state(start, has_agent=True), reconnects=reconnects)
    told.guest = dict.fromkeys(VcpuMap.parse(start), True)
    return told


def cut_short(start: str, target: str, policy: OnFailure, *steps: Step) -> Intent:
    return Intent(VcpuMap.parse(start), VcpuMap.parse(target), steps, policy, 5.0)


def unplugging(vcpu: int) -> Step:
    return Step(Action.UNPLUG, VcpuMap([vcpu]), f"/machine/peripheral/vcpu{vcpu}", asks_agent=True)


def reverting(intent: Intent) -> Change:
    """What ``recover`` asks for; see the controller."""
    change = whole_map("0", on_failure=CONTINUE)

    def plan(now: Situation) -> Plan:
        return revert_plan(intent, plan_map(now, revert_target(intent, now.layout), change.options), now.layout)

    back = replace(intent, direction=Direction.REVERTING)
    return Change(plan, change.options, intent=back, rebuilds=True, tries=3)


def test_a_caller_that_leaves_while_it_is_brought_online_changes_nothing() -> None:
    told = beginning()
    request = unplug(1, offline_first=True)
    told.ask(request)
    told.is_silent()
    assert told.cancel(request) == []
    assert not told.is_settled(request)
    assert told.obeys() == ["save outcome"]


def test_a_side_that_closes_between_the_two_says_that_nothing_was_done() -> None:
    told = beginning()
    request = unplug(1, offline_first=True)
    told.ask(request)
    assert told.tell(Stop()) == []
    assert told.engine.is_busy
    assert told.obeys() == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    error = told.error(request)
    assert isinstance(error, MonitorLostError)
    assert error.outcome is Outcome.UNCHANGED


def test_a_request_that_is_refused_later_has_it_online_again() -> None:
    told = beginning()
    request = unplug(1, offline_first=True, result=Result.REMOVAL)
    told.ask(request)
    told.obeys()
    told.accept(1)
    assert told.refuses(1) == ["bring 1 online"]
    assert told.obeys() == []
    assert told.guest == {0: True, 1: True}


def test_a_pending_one_stays_offline_until_the_guest_refuses_to_let_it_go() -> None:
    told = beginning()
    request = unplug(1, offline_first=True, timeout=5.0)
    told.ask(request)
    told.obeys()
    told.accept(1)
    assert told.wait(5) == ["look"]
    assert told.look("0-1") == ["save outcome"]
    error = told.error(request)
    assert isinstance(error, UnplugPendingError)
    assert str(error).endswith("; it is offline in the guest")
    assert told.refuses(1) == ["bring 1 online"]
    told.obeys()
    assert told.guest == {0: True, 1: True}


def test_two_callers_have_one_removal() -> None:
    told = beginning()
    first, second = (unplug(1, offline_first=True) for _ in range(2))
    assert told.ask(first) == ["save intent", "take 1 offline"]
    assert told.ask(second) == ["save intent", "take 1 offline"]
    assert told.obeys() == ["del 1"]
    assert told.obeys() == []
    told.accept(1)
    assert told.ejects(1) == ["save outcome", "save outcome"]
    assert told.result(first) == told.result(second) == {1}


@pytest.mark.parametrize("answer", ["done", "refused"])
def test_a_plain_unplug_that_is_faster_ends_both(answer: str) -> None:
    told = beginning()
    gentle, plain = unplug(1, offline_first=True), unplug(1)
    told.ask(gentle)
    assert told.ask(plain) == ["save intent", "del 1"]
    told.accept(1)
    assert told.ejects(1) == ["save outcome"]
    assert told.result(plain) == {1}
    assert (told.obeys() if answer == "done" else told.balks("no such CPU")) == ["save outcome"]
    assert told.result(gentle) == {1}


def test_a_request_for_what_has_left_meanwhile_is_over() -> None:
    told = beginning()
    request = unplug(1, offline_first=True, result=Result.REMOVAL)
    told.ask(request)
    told.read("0")
    assert told.obeys() == ["save outcome"]
    removal, joined = told.result(request)
    assert (removal.state, joined) == (State.UNPLUGGED, True)


def test_a_refusal_while_the_outcome_is_saved_has_it_brought_online_after_that() -> None:
    told = beginning()
    told.wish("0", offline_first=True, timeout=0.0)
    told.obeys()
    told.saves_wait = True
    assert told.accept(1) == ["save outcome"]
    assert told.refuses(1) == []
    assert told.saved() == ["bring 1 online"]


def test_a_connection_that_is_lost_between_the_two_has_it_brought_online() -> None:
    told = beginning()
    request = unplug(1, offline_first=True)
    told.ask(request)
    assert told.lose() == ["bring 1 online"]
    error = told.error(request)
    assert isinstance(error, MonitorLostError)
    assert str(error).endswith("; it may be offline in the guest")
    assert told.obeys() == []
    assert told.obeys() == []
    assert told.guest == {0: True, 1: True}
    assert told.engine.recorded.intent is not None, "it was under way"


@pytest.mark.parametrize("answered", ["before", "after"])
def test_a_connection_that_stays_away_has_it_brought_online(answered: str) -> None:
    told = beginning(reconnects=True)
    request = unplug(1, offline_first=True, timeout=5.0)
    told.ask(request)
    told.pause()
    if answered == "before":
        assert told.obeys() == []
    assert told.wait(10) == ["bring 1 online"]
    assert isinstance(told.error(request), MonitorLostError)
    while told.asks:
        assert told.obeys() == []
    assert told.guest == {0: True, 1: True}


def test_a_caller_that_leaves_while_the_connection_is_away_has_it_online_again() -> None:
    told = beginning(reconnects=True)
    request = unplug(1, offline_first=True)
    told.ask(request)
    told.pause()
    told.obeys()
    assert told.cancel(request) == ["bring 1 online"]
    told.obeys()
    assert told.guest == {0: True, 1: True}


def test_a_total_timeout_ends_the_patience_with_the_agent() -> None:
    told = beginning()
    told.wish("0", offline_first=True, total_timeout=3.0)
    assert told.asks[0].limit == 3.0
    told.wait(3)
    assert told.is_silent() == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert told.outcome == "PARTIAL"


def test_a_map_that_waits_for_the_guests_list_when_the_connection_is_lost_ends_with_it() -> None:
    told = beginning()
    told.first_looks_wait = True
    request = whole_map("0", offline_first=True)
    assert told.ask(request) == ["list the guest"]
    told.lose()
    assert isinstance(told.error(request), MonitorLostError)


@pytest.mark.parametrize("left", ["offline", "online"])
def test_finishing_gives_back_what_had_been_taken_offline_before_the_crash(left: str) -> None:
    intent = cut_short("0-2", "0", REVERT, unplugging(2), unplugging(1))
    told = Story(make_state("0-2", has_agent=True), intentions=Intentions(intent))
    told.guest = {0: True, 1: left == "online", 2: True}
    begun = told.wish("0", intent=intent, on_failure=REVERT, offline_first=True)
    asked = ["take 2 offline"] if left == "online" else ["take 2 offline", "del 1"]
    assert begun == ["save intent", *asked]
    back = ["bring 2 online", "bring 1 online"] if left == "online" else ["bring 2 online"]
    assert told.balks() == back, "for all that is known"
    if left == "offline":
        told.accept(1)
        assert told.refuses(1) == ["bring 1 online"]
    told.obeys()
    assert told.obeys() == ["save outcome"]
    assert told.guest == {0: True, 1: True, 2: True}
    assert told.outcome == "REVERTED"


def test_reverting_brings_online_what_had_been_taken_offline_before_the_crash() -> None:
    intent = cut_short("0-2", "0", STOP, unplugging(2), unplugging(1))
    told = Story(make_state("0-1", has_agent=True), intentions=Intentions(intent))
    told.guest = {0: True, 1: False}
    assert told.ask(reverting(intent)) == ["save reverting", "add 2"]
    assert told.accept(2) == ["list the guest"]
    assert told.lists({0: True, 1: False, 2: False}) == ["bring 2 online"]
    assert told.obeys() == ["bring 1 online"]
    assert told.obeys() == ["save outcome"]
    assert told.guest == {0: True, 1: True, 2: True}
    assert told.outcome == "REVERTED"
    assert told.engine.intentions.interrupted is None


def test_reverting_without_an_agent_says_so_and_keeps_what_it_owes() -> None:
    intent = cut_short("0-2", "0", STOP, unplugging(2), unplugging(1))
    told = Story(make_state("0-1"), intentions=Intentions(intent))
    assert told.ask(reverting(intent)) == ["save reverting", "add 2"]
    assert told.accept(2) == ["save outcome"]
    assert told.outcome == "REVERT_INCOMPLETE"
    assert told.report.layout.enabled == {0, 1, 2}
    assert "attach with agent=" in told.step(1).reason
    assert told.engine.intentions.interrupted is not None


def test_a_caller_that_leaves_while_its_plug_is_proven_has_the_agent_asked_no_more() -> None:
    told = beginning("0")
    request = plug(1, proof=Proof.ONLINE)
    told.ask(request)
    assert told.accept(1) == ["list the guest"]
    assert told.cancel(request) == ["save outcome"]
    assert told.lists({0: True, 1: False}) == []
    assert told.wait(1) == []
