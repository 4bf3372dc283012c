"""The last look of a transition, and what may come across it."""

import pytest

from qmpvcpu import OnFailure
from qmpvcpu.engine.removal import Evidence
from qmpvcpu.engine.vmstate import VmState
from tests.engine.story import Story, make_state

CONTINUE, REVERT = OnFailure.CONTINUE, OnFailure.REVERT


def with_removal_of_1(present: str) -> VmState:
    """Return the state of a VM in which the removal of vCPU 1 is pending."""
    state = make_state(present)
    state.unplug_replied(state.unplug_sent(1, 0.0), Evidence.ACCEPTED, 0.0)
    return state


def test_a_connection_lost_for_good_during_the_last_look_is_not_reached() -> None:
    told = Story("0", "0-1", last_looks_wait=True)
    assert told.accept(1) == ["last look"]
    told.lose("QEMU is gone")
    assert told.outcome == "PARTIAL"
    assert told.report.unconfirmed == "QEMU is gone"


@pytest.mark.parametrize("on_failure", [CONTINUE, REVERT])
def test_the_time_for_the_whole_that_passes_during_the_last_look_undoes_nothing(on_failure: OnFailure) -> None:
    told = Story("0", "0-1", on_failure=on_failure, total_timeout=5.0, last_looks_wait=True)
    assert told.accept(1) == ["last look"]
    assert told.deadline is None
    assert told.wait(6) == []
    assert told.see() == ["save outcome"]
    assert told.outcome == "REACHED"


def test_who_stops_it_while_the_connection_is_lost_is_not_kept_waiting() -> None:
    told = Story("0", "0-1", reconnects=True, last_looks_wait=True)
    assert told.accept(1) == ["last look"]
    told.pause()
    assert told.cancel() == ["save outcome"]
    assert told.outcome == "PARTIAL"
    assert told.report.unconfirmed == "the connection is lost"


def test_nothing_is_called_reverted_that_was_not_looked_at_in_the_end() -> None:
    told = Story("0-1", "0,2", on_failure=REVERT, last_looks_wait=True)
    told.accept(2)
    told.accept(1)
    assert told.refuses(1) == ["save reverting", "del 2"]
    told.accept(2)
    assert told.ejects(2) == ["last look"]
    assert told.see(failed="QEMU said error") == ["save outcome"]
    assert told.outcome == "REVERT_INCOMPLETE"


def test_a_vcpu_that_was_to_stay_and_left_for_good_is_no_other_clients_doing() -> None:
    told = Story(with_removal_of_1("0-1"), "0-1")
    assert told.ejects(1) == ["add 1"]
    told.wait(2)  # QEMU no longer holds the id of the CPU that left
    told.reject(1)
    assert told.verdicts == {1: "REJECTED"}
    assert not told.report.changed_by_other
    assert told.report.layout.enabled == {0}


def test_a_vcpu_that_was_to_stay_and_cannot_be_plugged_again_any_more_is_told_as_gone() -> None:
    told = Story(with_removal_of_1("0-2"), "0-1", in_flight=1)
    told.cancel()
    told.ejects(1)
    assert told.step(1).left is not True
    assert not told.report.changed_by_other


def test_a_look_that_was_sent_before_a_late_reply_is_not_the_last() -> None:
    told = Story("0", "0-1", reply_timeout=2.0, last_looks_wait=True)
    assert told.wait(2) == ["last look"]
    assert told.accept(1) == []  # late: of this slot the look tells nothing
    assert told.see() == ["last look"]
    assert told.see() == ["save the rest"]


def test_where_others_go_on_changing_the_vm_looking_has_an_end() -> None:
    told = Story("0", "0-1", last_looks_wait=True)
    told.accept(1)
    looks = 0
    while told.last_looks:
        looks += 1
        told.read("0-1" if looks % 2 else "0-1,3", others=[3])
        told.see()
    assert looks < 20
    assert told.subject.ended
