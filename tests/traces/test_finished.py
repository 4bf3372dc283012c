"""What the engine tells of a transition that has ended, for traces."""

from types import SimpleNamespace
from typing import cast

import pytest

from qmpvcpu import DenialReason, StepDeniedError, VcpuMap
from qmpvcpu.engine.answers import errors_of_steps
from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.messages import Accepted, Finished, Send, Settle
from qmpvcpu.engine.steprun import StepRun, StepStage
from qmpvcpu.engine.transition import Transition
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.verdicts import Denied, Pending
from tests.engine.story import make_state, plug


def ended(run: StepRun, **options: float) -> Transition:
    """A transition that has ended with that step alone, or with its undoing."""
    change = SimpleNamespace(options=CheckedOptions(**options))  # type: ignore[arg-type]  # they are durations
    return cast("Transition", SimpleNamespace(runs=[run], undoing={}, change=change, lost=None))


def test_that_a_vcpu_may_be_offline_is_said_once_however_often_the_error_is_asked_for() -> None:
    ids = VcpuMap([1])
    error = StepDeniedError("unplug", ids, DenialReason.MIGRATING, "the VM is migrating")
    denied = Denied(ids, error.reason, error.detail)
    run = StepRun(Step(Action.UNPLUG, ids), stage=StepStage.ENDED, verdict=denied, error=error, taken_offline=True)
    told = [errors_of_steps(ended(run))[run] for _ in range(2)]
    assert str(told[1]).count("it may be offline in the guest") == 1


def test_an_undoing_that_is_pending_names_its_own_timeout() -> None:
    ids = VcpuMap([1])
    undone = StepRun(Step(Action.PLUG, ids))
    undo = StepRun(Step(Action.UNPLUG, ids), undoes=undone, verdict=Pending(ids, acknowledged=False))
    error = errors_of_steps(ended(undo, timeout=30.0, revert_timeout=2.0))[undo]
    assert "pending after 2 s" in str(error)


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_transition_is_told_only_where_somebody_makes_traces(is_traced: bool) -> None:
    engine = Engine(make_state("0"), is_traced=is_traced)
    change = plug(3)
    (send,) = [effect for effect in engine.receive(change, 1.0) if isinstance(effect, Send)]
    effects = engine.receive(Accepted(send.number), 2.0)
    finished = [effect for effect in effects if isinstance(effect, Finished)]
    assert len(finished) == is_traced
    assert isinstance(effects[-1], Settle)
    if finished:
        assert finished[0].change is change
        assert [(run.first, run.sent_at, run.ended_at) for run in finished[0].runs] == [(3, 1.0, 2.0)]
