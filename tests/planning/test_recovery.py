"""A transition that was cut short: what a look shows, how it is finished, how it is undone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import OnFailure, TransitionOutcome, VcpuMap
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import Action, Direction, Intent, Step
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import plan_map
from qmpvcpu.planning.recovery import finish_target, in_order_of, observed_report, revert_plan, revert_target
from qmpvcpu.planning.replay import ReplayTarget, plan_replay
from tests.layouts import layout
from tests.planning.situations import situation, situations, vcpus, with_slot

START = situation({0: "boot", 1: "boot", 6: "ours"})


def intent(now: Situation, wish: str) -> Intent:
    plan = plan_map(now, vcpus(wish))
    assert plan.denied == ()
    return Intent(plan.start, plan.target, plan.steps, OnFailure.REVERT)


STORY = intent(START, "0,2-5")
HALF = layout({0: "boot", 1: "boot", 6: "ours", 2: "ours", 3: "ours"})


@pytest.mark.parametrize(
    ("what", "now", "finish", "revert"),
    [
        (STORY, START.layout, "0,2-5", "0-1,6"),
        (STORY, HALF, "0,2-5", "0-1,6"),
        (STORY, layout(dict.fromkeys((0, 2, 3, 4, 5), "ours")), "0,2-5", "0-1,6"),
        # Somebody else filled 2 and 7, and emptied nothing: theirs stays.
        (STORY, layout({0: "boot", 1: "boot", 6: "ours", 2: "other", 7: "other"}), "0,2-5,7", "0-2,6-7"),
        # Our own removal of 6 is pending: it shall stay, so its answer is awaited.
        (STORY, layout({0: "boot", 1: "boot", 6: "ours"}, pending=(6,)), "0,2-5", "0-1,6"),
        # Somebody has asked 7 to leave since: not ours to keep, nor to ask again.
        (STORY, layout({0: "boot", 1: "boot", 6: "ours", 7: "ours"}, pending=(7,)), "0,2-5", "0-1,6"),
        # The machine has become smaller than the intent knows it.
        (STORY, layout({0: "boot", 1: "boot"}, slots=3), "0,2-5", "0-1,6"),
    ],
)
def test_finishing_and_reverting_touch_only_the_slots_of_the_steps(
    what: Intent, now: Layout, finish: str, revert: str
) -> None:
    assert finish_target(what, now) == vcpus(finish)
    assert revert_target(what, now) == vcpus(revert)


def test_a_replay_is_finished_in_its_own_order() -> None:
    before = situation({0: "boot"})._replace(status=VmStatus("prelaunch"))
    replay = plan_replay(before, ReplayTarget(8, vcpus("0"), (5, 2, 7, 1)))
    begun = Intent(replay.start, replay.target, replay.steps)
    now = situation({0: "boot", 5: "ours", 2: "ours"})
    rest = in_order_of(begun, plan_map(now, finish_target(begun, now.layout)))
    assert [step.first for step in rest.steps] == [7, 1]
    other = in_order_of(begun, plan_map(now, vcpus("0,1,4,7")))
    assert [(step.action, step.first) for step in other.steps] == [
        (Action.PLUG, 7),
        (Action.PLUG, 1),
        (Action.PLUG, 4),
        (Action.UNPLUG, 5),
        (Action.UNPLUG, 2),
    ]


def test_a_removal_that_was_only_joined_is_not_undone() -> None:
    before = {0: "boot", 3: "ours"}
    joined = intent(situation(before, pending=(3,)), "0")
    assert joined.steps[0].joins
    assert revert_target(joined, layout({0: "boot"})) == {0}
    assert revert_target(joined, layout(before)) == {0, 3}
    assert revert_target(joined, layout(before, pending=(3,))) == {0, 3}


def test_what_was_to_be_kept_is_wished_for_either_way() -> None:
    kept = intent(situation({0: "boot", 3: "ours"}, pending=(3,)), "0,3")
    assert [step.action for step in kept.steps] == [Action.KEEP]
    for now in (layout({0: "boot"}), layout({0: "boot", 3: "ours"}, pending=(3,))):
        assert finish_target(kept, now) == revert_target(kept, now) == {0, 3}


@given(situations(), st.data())
def test_from_any_point_finish_leads_to_the_target_and_revert_to_the_start(
    now: Situation, data: st.DataObject
) -> None:
    before = now.layout
    whole = data.draw(st.sets(st.sampled_from(before.slots)))
    plan = plan_map(now, VcpuMap(each for slot in {before.slots[0], *whole} for each in slot.ids))
    assert plan.denied == ()
    begun = Intent(plan.start, plan.target, plan.steps)
    reached = before
    for step in plan.steps:
        slot = reached.slot_of(step.first)
        if data.draw(st.booleans()):
            continue
        if step.action is Action.PLUG:
            reached = with_slot(reached, slot.filled(slot.new_qom_path))
        elif step.action is Action.UNPLUG:
            reached = with_slot(reached, slot.emptied())
    assert finish_target(begun, reached) == plan.target
    joined = {each for step in plan.steps if step.joins for each in step.ids}
    assert set(revert_target(begun, reached)) | joined == set(plan.start) | joined
    looked = observed_report(begun, reached)
    assert (looked.outcome is TransitionOutcome.REACHED) == (
        reached.enabled == plan.target and not reached.pending & plan.target
    )
    assert all(step.ok == (not step.reason) for step in looked.steps)


@pytest.mark.parametrize(
    ("now", "outcome", "steps"),
    [
        (
            HALF,
            TransitionOutcome.PARTIAL,
            ["plug 2: PLUGGED", "plug 3: PLUGGED", "plug 4", "plug 5", "unplug 6", "unplug 1"],
        ),
        (
            layout({0: "boot", 2: "ours", 3: "ours", 4: "ours", 5: "ours", 1: "boot"}, pending=(1,)),
            TransitionOutcome.PARTIAL,
            [
                *(f"plug {each}: PLUGGED" for each in (2, 3, 4, 5)),
                "unplug 6: UNPLUGGED",
                "unplug 1: PENDING: the guest has been asked, and has not answered",
            ],
        ),
        (
            layout(dict.fromkeys((0, 2, 3, 4, 5), "ours")),
            TransitionOutcome.REACHED,
            [*(f"plug {each}: PLUGGED" for each in (2, 3, 4, 5)), "unplug 6: UNPLUGGED", "unplug 1: UNPLUGGED"],
        ),
        (
            layout({0: "boot", 2: "ours", 1: "boot"}, slots=3),
            TransitionOutcome.PARTIAL,
            ["plug 2: PLUGGED", "plug 3", "plug 4", "plug 5", "unplug 6: UNPLUGGED", "unplug 1"],
        ),
    ],
)
def test_a_look_tells_what_is_done_and_what_is_not(now: Layout, outcome: TransitionOutcome, steps: list[str]) -> None:
    report = observed_report(STORY, now)
    assert report.outcome is outcome
    assert [str(step).removesuffix(": not done, judging by a fresh look") for step in report.steps] == steps
    assert all(step.undone is None for step in report.steps)
    assert (report.start, report.target, report.on_failure) == (STORY.start, STORY.target, OnFailure.REVERT)
    assert report.layout is now


BACK = replace(STORY, direction=Direction.REVERTING)


@pytest.mark.parametrize(
    ("now", "outcome", "undone"),
    [
        (START.layout, TransitionOutcome.REVERTED, [True] * 6),
        (HALF, TransitionOutcome.REVERT_INCOMPLETE, [False, False, True, True, True, True]),
        (
            layout({0: "boot", 1: "boot", 6: "ours"}, pending=(1,)),
            TransitionOutcome.REVERT_INCOMPLETE,
            [True, True, True, True, True, False],
        ),
        (
            layout({0: "boot", 2: "other", 1: "boot"}),
            TransitionOutcome.REVERT_INCOMPLETE,
            [None, True, True, True, False, True],
        ),
    ],
)
def test_a_look_on_the_way_back_tells_what_is_undone(
    now: Layout, outcome: TransitionOutcome, undone: list[bool | None]
) -> None:
    report = observed_report(BACK, now)
    assert report.outcome is outcome
    assert [step.undone for step in report.steps] == undone


@pytest.mark.parametrize(
    ("now", "says", "ok"),
    [
        (
            layout({0: "boot", 3: "ours"}, pending=(3,)),
            "keep 3: PENDING: the guest has been asked, and has not answered",
            False,
        ),
        (layout({0: "boot", 3: "ours"}), "keep 3: PLUGGED", True),
        (layout({0: "boot"}), "keep 3: UNPLUGGED: not done, judging by a fresh look", False),
    ],
)
def test_a_look_at_what_was_to_be_kept(now: Layout, says: str, ok: bool) -> None:
    kept = Intent(vcpus("0,3"), vcpus("0,3"), (Step(Action.KEEP, vcpus("3"), "/machine/peripheral/vcpu3"),))
    (step,) = observed_report(kept, now).steps
    assert (str(step), step.ok) == (says, ok)
    (back,) = observed_report(replace(kept, direction=Direction.REVERTING), now).steps
    assert back.undone is None


# What the guest's agent may have taken offline.


def asked(*firsts: int, start: str = "0-3", target: str = "0") -> Intent:
    """Return a map that was cut short, and whose unplugs of *firsts* ask the agent."""
    steps = tuple(
        Step(Action.UNPLUG, VcpuMap([first]), f"/machine/peripheral/vcpu{first}", asks_agent=first in firsts)
        for first in sorted(vcpus(start) - vcpus(target), reverse=True)
    )
    return Intent(vcpus(start), vcpus(target), steps, OnFailure.REVERT)


def back(intent: Intent, now: Situation) -> list[tuple[str, bool]]:
    """Return the steps that lead back, and whether each asks the agent."""
    plan = revert_plan(intent, plan_map(now, revert_target(intent, now.layout)), now.layout)
    assert plan.denied == ()
    return [(str(step), step.asks_agent) for step in plan.steps]


def test_what_is_there_may_be_offline_and_what_has_left_comes_back_online() -> None:
    now = situation({0: "boot", 1: "ours", 2: "ours"})
    assert back(asked(2, 3), now) == [("plug 3", True), ("online 2", True)]


def test_what_the_agent_was_not_asked_for_is_left_alone() -> None:
    now = situation({0: "boot", 1: "ours", 2: "ours"})
    assert back(asked(), now) == [("plug 3", False)]


def test_a_removal_that_is_pending_is_awaited_first() -> None:
    now = situation({0: "boot", 1: "ours", 2: "ours", 3: "ours"}, pending=(3,))
    assert back(asked(3), now) == [("keep 3", True)]


def test_what_is_not_to_be_there_is_not_brought_online() -> None:
    """Another client has asked for it since."""
    now = situation({0: "boot", 1: "ours", 2: "ours", 3: "ours"}, pending=(3,))
    plan = revert_plan(asked(3), plan_map(now, vcpus("0-2")), now.layout)
    assert [str(step) for step in plan.steps] == ["unplug 3"]


def test_a_look_says_what_may_be_offline() -> None:
    now = layout({0: "boot", 1: "ours", 2: "ours"})
    said = [str(step) for step in observed_report(asked(2), now).steps]
    assert said == [
        "unplug 3: UNPLUGGED",
        "unplug 2: not done, judging by a fresh look; it may be offline in the guest",
        "unplug 1: not done, judging by a fresh look",
    ]
