"""What a stopped QEMU lacks of a VM's vCPUs, or in what it is another one."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import DenialReason, Layout, Outcome
from qmpvcpu.errors import ReplayMismatchError
from qmpvcpu.model.layout import CpuProps
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.transition import Action
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import KnownFault, Topology, VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.replay import ReplayTarget, check_replayed, plan_replay
from tests.domainxml.examples import Q35, layout_of
from tests.planning.situations import with_slot

STOPPED = VmStatus("prelaunch")
EIGHT = replace(Q35, topology=Topology(8, sockets=2, cores=2, threads=2))


def situation(layout: Layout, status: VmStatus = STOPPED) -> Situation:
    return Situation(layout, status, created=len(layout.enabled))


def wanted(most: int, boot: int, *later: int) -> ReplayTarget:
    return ReplayTarget(most, VcpuMap(range(boot)), later)


@st.composite
def replays(draw: st.DrawFn) -> tuple[Layout, ReplayTarget, tuple[int, ...]]:
    """A QEMU that has some of what is wanted, and what it lacks, in order."""
    count = draw(st.sampled_from([1, 1, 2, 4]))
    slots = draw(st.integers(1, 8))
    boot = draw(st.integers(1, slots))
    later = draw(st.permutations(range(boot, slots)))
    later = later[: draw(st.integers(0, len(later)))]
    done = draw(st.integers(0, len(later)))
    layout = layout_of(slots, [*range(boot), *later[:done]], boot=boot, count=count)
    ids = tuple(each for number in later for each in range(number * count, (number + 1) * count))
    needs = ReplayTarget(slots * count, VcpuMap(range(boot * count)), ids)
    return layout, needs, tuple(number * count for number in later[done:])


@given(case=replays())
def test_what_is_lacking_is_plugged_in_its_order_and_nothing_else(
    case: tuple[Layout, ReplayTarget, tuple[int, ...]],
) -> None:
    layout, needs, lacking = case
    plan = plan_replay(situation(layout), needs)
    assert tuple(step.first for step in plan.steps) == lacking
    assert all(step.action is Action.PLUG for step in plan.steps)
    assert plan.target == needs.started_with | set(needs.later)
    for step in plan.steps:
        slot = layout.slot_of(step.first)
        layout = with_slot(layout, slot.filled(slot.new_qom_path))
    check_replayed(layout, needs)
    assert plan_replay(situation(layout), needs).steps == ()


@pytest.mark.parametrize("state", ["prelaunch", "paused", "inmigrate"])
def test_a_vm_that_is_stopped_takes_a_replay(state: str) -> None:
    assert plan_replay(situation(layout_of(4, [0], boot=1), VmStatus(state)), wanted(4, 1, 3)).steps


def test_a_destination_that_only_listens_takes_a_replay() -> None:
    listening = VmStatus("inmigrate", "setup")
    assert plan_replay(situation(layout_of(4, [0], boot=1), listening), wanted(4, 1, 3)).denied == ()
    arriving = VmStatus("inmigrate", "active")
    (denied,) = plan_replay(situation(layout_of(4, [0], boot=1), arriving), wanted(4, 1, 3)).denied
    assert denied.reason is DenialReason.MIGRATING


@pytest.mark.parametrize("state", ["running", "postmigrate", "preconfig", "internal-error", "guest-panicked"])
def test_a_vm_that_is_not_stopped_does_not(state: str) -> None:
    with pytest.raises(ReplayMismatchError, match=f"it is {state}, not stopped") as caught:
        plan_replay(situation(layout_of(4, [0], boot=1), VmStatus(state)), wanted(4, 1, 3))
    assert caught.value.outcome is Outcome.UNCHANGED


@pytest.mark.parametrize(
    ("layout", "needs", "words"),
    [
        (layout_of(4, [0], boot=1), wanted(8, 1), "it can have 4 vCPUs, not 8 (maxcpus)"),
        (layout_of(4, [0, 1], boot=2), wanted(4, 1, 3), "started with vCPUs 0-1, not with vCPU 0 (-smp 1)"),
        (layout_of(4, [0], boot=1), wanted(4, 2), "started with vCPU 0, not with vCPUs 0-1 (-smp 2)"),
        (layout_of(4, [0, 1], boot=1), wanted(4, 2), "started with vCPU 0, not with vCPUs 0-1 (-smp 2)"),
        (layout_of(4, [0, 2], boot=1), wanted(4, 1, 3), "created as 0,2, which is not how 0,3 begins"),
        (layout_of(4, [0, 2], boot=1), wanted(4, 1, 3, 2), "created as 0,2, which is not how 0,3,2 begins"),
        (layout_of(4, [0, 3, 2], boot=1), wanted(4, 1, 3), "created as 0,3,2, which is not how 0,3 begins"),
        (layout_of(2, [0], boot=1, count=4), wanted(8, 4, 4, 5), "4-7 are one slot and move together: 4-5 of it"),
        (layout_of(2, [0], boot=1, count=4), wanted(8, 2), "move together: 0-1 of it is to be there at the start"),
        (
            replace(layout_of(4, [0, 3], boot=1), pending_slots=frozenset({3})),
            wanted(4, 1, 3),
            "a removal of vCPU 3 is pending",
        ),
        (
            layout_of(8, [0], boot=1, vm=EIGHT),
            wanted(8, 1)._replace(topology=Topology(8, sockets=2, cores=4)),
            "its topology has cores 2, not 4; threads 2, not 1",
        ),
        (
            layout_of(4, [0], boot=1),
            wanted(4, 1)._replace(cells=dict.fromkeys(range(4), 1)),
            "vCPUs 0-3 are in other NUMA cells: vCPU 0 is in none, not in cell 1",
        ),
    ],
)
def test_a_qemu_that_is_another_is_told_in_what(layout: Layout, needs: ReplayTarget, words: str) -> None:
    with pytest.raises(ReplayMismatchError) as caught:
        plan_replay(situation(layout), needs)
    (difference,) = caught.value.differences
    assert words in difference


def test_another_layouts_slots_are_compared_by_type_and_place() -> None:
    layout = layout_of(4, [0], boot=1)
    other = layout.slots[2]
    moved = replace(other, type="max-x86_64-cpu", props=CpuProps({"core-id": 2}))
    needs = wanted(4, 1, 2)._replace(slots=(*layout.slots[:2], moved, layout.slots[3]))
    with pytest.raises(ReplayMismatchError) as caught:
        plan_replay(situation(layout), needs)
    kind, place = caught.value.differences
    assert "vCPU 2 are of another CPU type" in kind
    assert "not 1 of max-x86_64-cpu at core-id 2" in kind
    assert "vCPU 2 have another place" in place
    with pytest.raises(ReplayMismatchError, match="of other sizes"):
        plan_replay(situation(layout), wanted(4, 1)._replace(slots=layout_of(2, [0], boot=1, count=2).slots))


def test_every_difference_is_listed_at_once() -> None:
    with pytest.raises(ReplayMismatchError) as caught:
        plan_replay(
            situation(layout_of(8, [0, 1], boot=2, vm=EIGHT), VmStatus("running")),
            wanted(8, 1, 4)._replace(topology=Topology(8, sockets=8)),
        )
    assert len(caught.value.differences) == 3
    assert all(difference in str(caught.value) for difference in caught.value.differences)


def test_what_this_qemu_would_not_survive_is_denied() -> None:
    layout = layout_of(4, [0], boot=1)
    assert KnownFault.TCG_CREATED_BEYOND_MAX in layout.vm.known_faults
    used_up = situation(layout)._replace(created=3)
    plan = plan_replay(used_up, wanted(4, 1, 3, 2))
    assert [denied.reason for denied in plan.denied] == [DenialReason.FATAL]
    assert plan_replay(used_up, wanted(4, 1, 3, 2), CheckedOptions(allow_fatal=True)).denied == ()


def test_an_end_that_is_another_says_that_something_was_changed() -> None:
    with pytest.raises(ReplayMismatchError, match="the replay failed") as caught:
        check_replayed(layout_of(4, [0, 2, 3], boot=1), wanted(4, 1, 3, 2))
    assert caught.value.outcome is Outcome.CHANGED
