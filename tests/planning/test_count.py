"""So many vCPUs: the lowest free ones in, the highest removable ones out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import DenialReason, StepDeniedError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import check_plan, plan_count
from tests.layouts import KVM, TCG
from tests.planning.situations import situation, situations, vcpus

HOLES = {0: "boot", 1: "boot", 3: "ours", 6: "other"}


@pytest.mark.parametrize(
    ("now", "count", "target"),
    [
        (situation(HOLES), 4, "0-1,3,6"),
        (situation(HOLES), 5, "0-3,6"),
        (situation(HOLES), 7, "0-6"),
        (situation(HOLES), 8, "0-7"),
        (situation(HOLES), 3, "0-1,3"),
        (situation(HOLES), 2, "0-1"),
        (situation(HOLES, pending=(3,)), 3, "0-1,6"),  # it is on its way already
        (situation(HOLES, pending=(3,)), 2, "0-1"),
        (situation(HOLES, pending=(3,)), 4, "0-1,3,6"),
        (situation({0: "boot", 4: "ours", 8: "nameless"}, count=4), 16, "0-15"),
        (situation({0: "boot", 4: "ours", 8: "nameless"}, count=4), 8, "0-7"),
    ],
)
def test_a_count_chooses_as_libvirt_does(now: Situation, count: int, target: str) -> None:
    plan = plan_count(now, count)
    assert (plan.target, plan.denied) == (vcpus(target), ())


def test_boot_vcpus_leave_only_where_that_is_asked_for_and_the_first_never() -> None:
    now = situation(dict.fromkeys(range(4), "boot"))
    denied = plan_count(now, 2)
    assert [(each.ids, each.reason) for each in denied.denied] == [(vcpus("0-3"), DenialReason.COUNT_KEEPS_BOOT)]
    assert (denied.start, denied.target, denied.steps) == (vcpus("0-3"), vcpus("0-3"), ())
    for count in (3, 2, 1):
        assert plan_count(now, count, include_boot=True).target == set(range(count))


@pytest.mark.parametrize(
    ("now", "count", "include_boot", "reason", "says"),
    [
        (situation(HOLES), 0, False, DenialReason.UNKNOWN_VCPU, "1 to 8 vCPUs, not 0"),
        (situation(HOLES), -3, True, DenialReason.UNKNOWN_VCPU, "1 to 8 vCPUs, not -3"),
        (situation(HOLES), 9, False, DenialReason.UNKNOWN_VCPU, "1 to 8 vCPUs, not 9"),
        (situation(HOLES), 10**4000, False, DenialReason.UNKNOWN_VCPU, "(4001 characters)"),
        (situation(HOLES), 1, False, DenialReason.COUNT_KEEPS_BOOT, "vCPUs 0-1 were there at boot"),
        (
            situation({0: "boot", 4: "ours"}, count=4),
            6,
            False,
            DenialReason.COUNT_SPLITS_SLOT,
            "4 or 8 can be had, 6",
        ),
        (
            situation({0: "boot", 4: "ours"}, count=4),
            9,
            False,
            DenialReason.COUNT_SPLITS_SLOT,
            "8 or 12 can be had, 9",
        ),
        (situation({0: "boot"}, count=4), 2, True, DenialReason.COUNT_SPLITS_SLOT, "slots of 4 vCPUs move whole"),
        (situation({0: "boot", 4: "ours"}, count=4), 2, True, DenialReason.COUNT_SPLITS_SLOT, "whole: 4 can be had"),
        (situation({0: "boot"}, count=4), 2, False, DenialReason.COUNT_SPLITS_SLOT, "4 can be had, 2 cannot"),
    ],
)
def test_a_count_that_cannot_be_had_is_denied(
    now: Situation,
    count: int,
    include_boot: bool,
    reason: DenialReason,
    says: str,
) -> None:
    plan = plan_count(now, count, include_boot=include_boot)
    (denied,) = plan.denied
    assert denied.reason is reason
    assert says in denied.detail
    assert len(denied.detail) < 200
    with pytest.raises(StepDeniedError, match="nothing was sent"):
        check_plan(plan, now.layout)


def test_a_boot_vcpu_whose_removal_is_pending_is_kept_by_a_count() -> None:
    now = situation({0: "boot", 1: "boot", 2: "ours", 3: "ours"}, pending=(1,))
    assert [str(step) for step in plan_count(now, 3).steps] == ["keep 1", "unplug 3"]
    (joined,) = plan_count(now, 3, include_boot=True).steps
    assert (str(joined), joined.joins) == ("unplug 1", True)


def test_a_count_that_no_text_can_hold_is_denied_too() -> None:
    (denied,) = plan_count(situation(HOLES), 10**6000).denied
    assert denied.detail == "this machine has 1 to 8 vCPUs, not a very large int"


def test_what_a_count_chooses_is_denied_as_a_map_is() -> None:
    migrating = situation(HOLES, status=VmStatus("running", "active"))
    assert [each.reason for each in plan_count(migrating, 5).denied] == [DenialReason.MIGRATING]
    full = situation(HOLES, vm=TCG, created=8)
    assert [each.reason for each in plan_count(full, 5).denied] == [DenialReason.FATAL]
    assert plan_count(full, 5, CheckedOptions(allow_fatal=True)).denied == ()
    owned = situation(HOLES, vm=replace(KVM, libvirt_owned=True))
    (stays,) = plan_count(owned, 1).denied
    assert stays.reason is DenialReason.COUNT_KEEPS_BOOT
    assert "include_boot=True does, here with allow_boot_vcpus=True" in stays.detail
    assert [each.reason for each in plan_count(owned, 1, include_boot=True).denied] == [DenialReason.LIBVIRT_OWNED]
    assert plan_count(owned, 1, CheckedOptions(allow_boot_vcpus=True), include_boot=True).denied == ()


def chosen_naively(layout: Layout, count: int, *, include_boot: bool) -> set[int] | None:
    """One slot at a time, from what is so now; None if the count is never met."""
    have = set(layout.enabled)
    while len(have) < count:
        free = [slot for slot in layout.slots if slot.first not in have]
        if not free:
            return None
        have |= free[0].ids
    while len(have) > count:
        can = [s for s in layout.slots if s.first in have and s.first != 0 and (include_boot or not s.is_boot)]
        waiting = [slot for slot in can if slot.first in layout.pending_slots]
        if not can:
            return None
        have -= (waiting or can)[-1].ids
        if len(have) < count:
            return None
    return have if len(have) == count else None


@given(situations(), st.integers(0, 44), st.booleans())
def test_a_count_is_what_one_slot_after_the_other_comes_to(now: Situation, count: int, include_boot: bool) -> None:
    plan = plan_count(now, count, include_boot=include_boot)
    expected = chosen_naively(now.layout, count, include_boot=include_boot) if count else None
    if expected is None:
        assert len(plan.denied) == 1
        assert (plan.steps, plan.target) == ((), now.layout.enabled)
    else:
        assert plan.target == expected
        assert plan.denied == ()
