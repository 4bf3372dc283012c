"""What a transition is made of."""

import pytest

from qmpvcpu import OnFailure, VcpuMap
from qmpvcpu.model.transition import Action, Direction, Intent, Step


@pytest.mark.parametrize(
    ("step", "first", "text"),
    [
        (Step(Action.PLUG, VcpuMap([3])), 3, "plug 3"),
        (Step(Action.UNPLUG, VcpuMap([8, 9, 10, 11]), "/machine/peripheral/vcpu8"), 8, "unplug 8-11"),
        (Step(Action.KEEP, VcpuMap([0, 1]), "/machine/peripheral/vcpu0"), 0, "keep 0-1"),
    ],
)
def test_a_step_is_named_by_the_first_vcpu_of_its_slot(step: Step, first: int, text: str) -> None:
    assert (step.first, str(step)) == (first, text)


def test_an_intent_goes_forward_and_stops_at_a_failure_unless_told_otherwise() -> None:
    intent = Intent(VcpuMap([0]), VcpuMap([0, 1]), (Step(Action.PLUG, VcpuMap([1])),))
    assert (intent.on_failure, intent.direction, intent.timeout) == (OnFailure.STOP, Direction.FORWARD, 30.0)
    assert intent == Intent(VcpuMap([0]), VcpuMap([0, 1]), (Step(Action.PLUG, VcpuMap([1])),))
