"""The table of one removal: every pair of state and evidence."""

from dataclasses import asdict
from itertools import product

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.engine.removal import TRANSITIONS, Evidence, IllegalEvidenceError, Removal, State
from qmpvcpu.events import Origin

S, E = State, Evidence


def removal(state: State) -> Removal:
    return Removal(VcpuMap([3]), "/machine/peripheral/vcpu3", Origin.US, requested_at=10.0, state=state)


@pytest.mark.parametrize(("state", "evidence"), list(product(State, Evidence)), ids=lambda member: member.name)
def test_every_pair_either_moves_as_the_table_says_or_raises_and_changes_nothing(
    state: State, evidence: Evidence
) -> None:
    subject = removal(state)
    if (state, evidence) in TRANSITIONS:
        assert subject.advance(evidence, 12.5) is state
        assert subject.state is TRANSITIONS[state, evidence]
    else:
        with pytest.raises(IllegalEvidenceError, match=f"{evidence.name} for a removal that is {state.name}"):
            subject.advance(evidence, 12.5)
        assert asdict(subject) == asdict(removal(state))


def test_nothing_but_proof_ends_in_unplugged() -> None:
    into = {evidence for (state, evidence), after in TRANSITIONS.items() if after is S.UNPLUGGED is not state}
    assert into == {E.GONE}


def test_nothing_but_the_guests_no_ends_in_refused() -> None:
    into = {evidence for (state, evidence), after in TRANSITIONS.items() if after is S.REFUSED is not state}
    assert into == {E.FAILURE}


def test_what_is_final_stays_so_whatever_reply_comes_last() -> None:
    for (state, _), after in TRANSITIONS.items():
        if state.is_final:
            assert after is state


def test_the_time_of_the_end_is_kept_once() -> None:
    subject = removal(S.WORKING)
    assert subject.seconds == 0.0
    subject.advance(E.GONE, 12.5)
    subject.advance(E.ACCEPTED, 99.0)
    assert subject.seconds == 2.5
