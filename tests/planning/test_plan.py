"""From a wish to steps, denials, warnings, and words."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import DenialReason, InvalidMapError, StalePlanError, StepDeniedError, VcpuMap
from qmpvcpu.errors import UnsupportedMachineError
from qmpvcpu.model.layout import CpuProps, Layout, Slot
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.verdicts import Denied
from qmpvcpu.model.vm import Topology, VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import Plan, check_plan, parse_target, plan_map
from tests.counting import calls
from tests.layouts import KVM, OLD_TCG, TCG
from tests.planning.situations import situation, situations, vcpus, wide

STORY = {0: "boot", 1: "boot", 6: "ours"}


def lines(plan: Plan) -> list[str]:
    return str(plan).splitlines()


def words(plan: Plan) -> list[str]:
    return [str(step) for step in plan.steps]


# Wishes.


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("", "it is empty, and vCPU 0 never leaves (this machine has vCPUs 0-7)"),
        ("  ", "it is empty"),
        ("0,^0", "it is empty"),
        ([], "it is empty"),
        ("^1", '"^1" excludes an id, and no id is included'),
        ("^1,^2", "excludes an id, and no id is included"),
        ("0-", '"" in "0-" is not a vCPU id'),
        ("3-1", '"3-1" runs downwards'),
        ("0,,1", '"" is not a vCPU id'),
        ("0,", '"" is not a vCPU id'),
        ("a", '"a" is not a vCPU id'),
        ("0,x-3", '"x" in "x-3" is not a vCPU id'),
        ("0,\u0663", "is not a vCPU id"),
        ("0-99999999999", '"99999999999" is too high: a vCPU id is 0 to 16383'),
        ("0,^1-2", '"^1-2": only one id can be taken out at a time'),
        ("0-3,^ 1", '" 1" in "^ 1" is not a vCPU id'),
        ("9" * 10_000_000, "longer than 200000 characters"),
        ("9" * 200_000, "is too high: a vCPU id is 0 to 16383"),
        ("x" * 200_000, "is not a vCPU id"),
        ("0," * 100_000, '"" is not a vCPU id'),
        ("0-16383," * 20_000 + "z", '"z" is not a vCPU id'),
        ([True], "a vCPU id is an int"),
        ([0, -1], "a vCPU id is 0 to 16383"),
        ([10**6000], "a vCPU id is 0 to 16383"),
        (itertools.count(), "a vCPU id is 0 to 16383"),
        (b"\x05", "by VcpuMap.from_bytes"),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, str) else None,
)
def test_a_wish_that_is_none_is_refused_at_once_and_shortly(wish: str | Iterable[int], says: str) -> None:
    layout = situation(STORY).layout
    with pytest.raises(InvalidMapError) as caught:
        parse_target(wish, layout)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("wish", ["0,2-5", " 0 , 2 - 5 ", [5, 4, 3, 2, 0, 0], VcpuMap([0, 2, 3, 4, 5]), "0,2-5,^7"])
def test_a_wish_is_text_or_ids(wish: str | Iterable[int]) -> None:
    assert parse_target(wish, situation(STORY).layout) == {0, 2, 3, 4, 5}


# Steps.


def test_the_story_is_planned_plugs_first_and_the_highest_out_first() -> None:
    plan = plan_map(situation(STORY), vcpus("0,2-5"))
    assert words(plan) == ["plug 2", "plug 3", "plug 4", "plug 5", "unplug 6", "unplug 1"]
    assert (plan.start, plan.target) == (vcpus("0-1,6"), vcpus("0,2-5"))
    assert (plan.denied, plan.warnings) == ((), ())


@pytest.mark.parametrize(
    ("wish", "steps"),
    [
        ("0-1,3", [Step(Action.KEEP, VcpuMap([3]), "/machine/peripheral/vcpu3")]),
        ("0-1", [Step(Action.UNPLUG, VcpuMap([3]), "/machine/peripheral/vcpu3", joins=True)]),
    ],
)
def test_a_removal_that_is_pending_is_joined_or_waited_for(wish: str, steps: list[Step]) -> None:
    now = situation({0: "boot", 1: "boot", 3: "ours"}, pending=(3,))
    assert list(plan_map(now, vcpus(wish)).steps) == steps


@given(situations(), st.data())
def test_the_steps_make_the_start_the_target_and_touch_nothing_else(now: Situation, data: st.DataObject) -> None:
    layout = now.layout
    target = VcpuMap(data.draw(st.sets(st.integers(0, layout.max + 3), min_size=1)))
    plan = plan_map(now, target)
    whole = all(len(target & slot.ids) in (0, slot.count) for slot in layout.slots)
    possible = whole and 0 in target and max(target) < layout.max
    assert possible == (not plan.denied)
    have = set(layout.enabled)
    for step in plan.steps:
        slot = layout.slot_of(step.first)
        assert step.ids == slot.ids  # whole
        assert step.qom_path == slot.qom_path
        if step.action is Action.PLUG:
            assert not slot.present
            have |= step.ids
        else:
            assert slot.present
            assert step.joins == (step.action is Action.UNPLUG and slot.first in layout.pending_slots)
            if step.action is Action.UNPLUG:
                have -= step.ids
            else:
                assert slot.first in layout.pending_slots
    if possible:
        assert have == target
    kinds = [(step.action, step.first) for step in plan.steps]
    assert len(set(kinds)) == len(kinds)
    rank = {Action.PLUG: 0, Action.KEEP: 1, Action.UNPLUG: 2}
    assert kinds == sorted(kinds, key=lambda kind: (rank[kind[0]], -kind[1] if kind[0] is Action.UNPLUG else kind[1]))
    assert plan == plan_map(now, VcpuMap(sorted(target, reverse=True)))
    assert len(lines(plan)) <= 1 + len(plan.steps) + len(plan.denied) + len(plan.warnings)


# Denials.


@pytest.mark.parametrize(
    ("now", "wish", "denied"),
    [
        (situation(STORY), "0,8-9", [(vcpus("8-9"), DenialReason.UNKNOWN_VCPU)]),
        (situation(STORY), "1,6", [(vcpus("0"), DenialReason.BOOT_VCPU)]),
        (
            situation(STORY),
            "1,9",
            [(vcpus("9"), DenialReason.UNKNOWN_VCPU), (vcpus("0"), DenialReason.BOOT_VCPU)],
        ),
        (
            situation({0: "boot", 4: "ours"}, count=4),
            "0-4,8-9",
            [(vcpus("4-7"), DenialReason.PART_OF_SLOT), (vcpus("8-11"), DenialReason.PART_OF_SLOT)],
        ),
        (
            situation({0: "boot"}, count=4),
            "1-3",
            [(vcpus("0-3"), DenialReason.BOOT_VCPU), (vcpus("0-3"), DenialReason.PART_OF_SLOT)],
        ),
        (
            situation(STORY, status=VmStatus("running", "active")),
            "0-2",
            [(vcpus("2"), DenialReason.MIGRATING), (vcpus("6"), DenialReason.MIGRATING)],
        ),
        (situation(STORY, exported=True), "0-1,3,6", [(vcpus("3"), DenialReason.EXPORTED)]),
        (situation(STORY, pending=(6,), exported=True), "0-1,6", [(vcpus("6"), DenialReason.EXPORTED)]),
        (situation(STORY, status=VmStatus("postmigrate")), "0-1,3,6", [(vcpus("3"), DenialReason.MIGRATED_AWAY)]),
        (
            situation(STORY, vm=replace(KVM, libvirt_owned=True)),
            "0",
            [(vcpus("1"), DenialReason.LIBVIRT_OWNED)],
        ),
        (
            situation(STORY, vm=replace(KVM, can_plug=False)),
            "0-2,6",
            [(vcpus("2"), DenialReason.MACHINE_CANNOT_PLUG)],
        ),
        (
            situation(STORY, vm=replace(KVM, can_unplug=False)),
            "0",
            [(vcpus("6"), DenialReason.MACHINE_CANNOT_UNPLUG), (vcpus("1"), DenialReason.MACHINE_CANNOT_UNPLUG)],
        ),
        (situation(STORY, in_flight=frozenset({2})), "0-3,6", [(vcpus("2"), DenialReason.IN_PROGRESS)]),
        (situation(STORY, vm=OLD_TCG, unplug_seen=True), "0-2,6", [(vcpus("2"), DenialReason.FATAL)]),
        (
            situation(STORY, vm=TCG, created=6),
            "0-6",  # the third and the fourth are more than this QEMU can ever create
            [(vcpus("4"), DenialReason.FATAL), (vcpus("5"), DenialReason.FATAL)],
        ),
        (
            situation(STORY, vm=TCG, single_threaded=True),
            "0",
            [(vcpus("6"), DenialReason.FATAL), (vcpus("1"), DenialReason.FATAL)],
        ),
    ],
)
def test_everything_that_cannot_be_done_is_collected(
    now: Situation, wish: str, denied: list[tuple[VcpuMap, DenialReason]]
) -> None:
    plan = plan_map(now, vcpus(wish))
    assert [(each.ids, each.reason) for each in plan.denied] == denied
    assert all(each.detail for each in plan.denied)
    assert ": denied, nothing would be sent" in lines(plan)[0]
    with pytest.raises(StepDeniedError) as caught:
        check_plan(plan, now.layout)
    assert caught.value.reason is denied[0][1]
    assert all(each.detail in str(caught.value) for each in plan.denied)


def test_an_apic_id_that_only_x2apic_reaches_is_denied_in_a_plan() -> None:
    paths = ["/machine/unattached/device[0]", None, None]
    places = [(0, 0), (0, 1), (1, 0)]
    slots = tuple(
        Slot(each, 1, "t", CpuProps({"socket-id": socket, "core-id": core, "thread-id": 0}), each, path)
        for each, (path, (socket, core)) in enumerate(zip(paths, places, strict=True))
    )
    vm = wide(Topology(max_cpus=512, sockets=2, cores=256))
    now = Situation(layout=Layout(vm=vm, slots=slots, creation=(0,)), status=VmStatus("running"), created=1)
    (denied,) = plan_map(now, vcpus("0-2")).denied
    assert (denied.ids, denied.reason) == (vcpus("2"), DenialReason.FATAL)
    assert "x2apic" in denied.detail


def test_a_layout_without_slots_has_nothing_to_plan() -> None:
    now = Situation(layout=Layout(vm=KVM, slots=()), status=VmStatus("running"), created=0)
    plan = plan_map(now, vcpus("0"))
    assert [each.reason for each in plan.denied] == [DenialReason.UNKNOWN_VCPU]
    assert plan.steps == ()


@pytest.mark.parametrize(
    ("now", "wish", "action", "ids"),
    [
        (situation(STORY, status=VmStatus("running", "active")), "0", "unplug", (1, 6)),
        (situation(STORY, status=VmStatus("running", "active")), "0-1,3,5-6", "plug", (3, 5)),
        (situation(STORY, status=VmStatus("running", "active")), "0,3", "plug", (3,)),
        (situation({0: "boot", 4: "ours"}, count=4), "0-4", "unplug", (4, 5, 6, 7)),
        (situation(STORY), "0,9,12", "plug", (9, 12)),
        (situation(STORY), "1", "unplug", (0,)),
    ],
)
def test_a_denied_plan_raises_with_what_the_first_denial_is_about(
    now: Situation, wish: str, action: str, ids: tuple[int, ...]
) -> None:
    with pytest.raises(StepDeniedError) as caught:
        check_plan(plan_map(now, vcpus(wish)), now.layout)
    assert (caught.value.action, tuple(caught.value.ids)) == (action, ids)


@pytest.mark.parametrize(
    ("cannot", "wish", "reason", "ids"),
    [
        ({"can_plug": False}, "0-3,6", DenialReason.MACHINE_CANNOT_PLUG, (2, 3)),
        ({"can_unplug": False}, "0", DenialReason.MACHINE_CANNOT_UNPLUG, (1, 6)),
    ],
)
def test_a_machine_that_cannot_is_named(
    cannot: dict[str, bool], wish: str, reason: DenialReason, ids: tuple[int, ...]
) -> None:
    now = situation(STORY, vm=replace(KVM, **cannot))  # type: ignore[arg-type]  # two of its flags
    with pytest.raises(UnsupportedMachineError) as caught:
        check_plan(plan_map(now, vcpus(wish)), now.layout)
    assert (caught.value.machine, caught.value.reason, tuple(caught.value.ids)) == (KVM.machine, reason, ids)


def test_a_slot_named_in_part_tells_what_is_lacking() -> None:
    (denied,) = plan_map(situation({0: "boot", 4: "ours"}, count=4), vcpus("0-3,5,7")).denied
    assert denied.detail == "vCPUs 4-7 are one slot and move together: the target has 5,7 and lacks 4,6"


def test_a_hundred_like_denials_are_one_in_words() -> None:
    now = situation({0: "boot", 1: "boot"}, slots=240, status=VmStatus("running", "active"))
    plan = plan_map(now, vcpus("0,2-239"))
    assert len(plan.denied) == 239
    assert lines(plan)[-1].startswith("  denied 1-239  (the VM is migrating")
    with pytest.raises(StepDeniedError) as caught:
        check_plan(plan, now.layout)
    assert len(str(caught.value)) < 400
    assert "denied too: vCPU 1: the VM is migrating" in str(caught.value)


def test_a_scattered_map_is_cut_in_words() -> None:
    scattered = VcpuMap([0, *range(1, 16384, 2)])
    plan = plan_map(situation(STORY), scattered)
    assert max(len(each.detail) for each in plan.denied) < 120


# Staleness.


@pytest.mark.parametrize(
    ("then", "says"),
    [
        (situation({0: "boot", 1: "boot"}), "starts from 0-1,6, the VM is at 0-1 now"),
        (situation(STORY, pending=(6,)), "starts from 0-1,6, the VM is at 0-1,6, pending 6 now"),
        (
            situation({0: "boot", 1: "boot", 6: "other"}),
            "with /machine/peripheral/vcpu6 as vCPU 6, the VM is at 0-1,6 with /machine/peripheral/cpu-6 as vCPU 6",
        ),
        (situation(STORY, slots=9), "with None as vCPU 8"),
    ],
)
def test_a_plan_for_another_layout_is_stale_even_if_something_is_denied(then: Situation, says: str) -> None:
    for wish in ("0,2-5", "1"):
        with pytest.raises(StalePlanError) as caught:
            check_plan(plan_map(situation(STORY), vcpus(wish)), then.layout)
        assert says in str(caught.value)


def test_a_plan_for_this_layout_can_be_carried_out() -> None:
    now = situation(STORY, pending=(6,))
    plan = plan_map(now, vcpus("0-2"))
    check_plan(plan, situation(STORY, pending=(6,)).layout)
    assert plan.denied == ()


# Warnings.

REPLUG = "QEMU before 8.2.2 under TCG corrupts its heap at any plug, and any reset, after an unplug"
BEYOND = "QEMU under TCG aborts when more vCPUs were ever created than maxcpus"
SINGLE = "QEMU under single-threaded TCG aborts when the guest ejects a vCPU"
SEALED = "the VM is confidential: its vCPUs are sealed at launch, and one more probably ends it"
LOCKS_UP = "a Linux guest of QEMU 8.2 under TCG locks up once vCPUs have been plugged into it"
UNDER_TCG = "Linux does not see TCG as a hypervisor: since 6.12.77 it acknowledges a vCPU and never uses it"
RESET = "QEMU up to 10.0.2 under TCG may hang and abort when a pseries machine is reset with a removal pending"
KEPT = (
    "should stay, and QEMU cannot withdraw a pending removal: the guest's answer is awaited, and a vCPU that leaves"
)


@pytest.mark.parametrize(
    ("now", "wish", "warnings"),
    [
        (situation(STORY), "0,2", []),
        (situation(STORY, vm=TCG), "0,2", [UNDER_TCG]),
        (situation(STORY, pending=(6,)), "0-2", ["the removal of vCPU 6 is pending: any plug may set it off"]),
        (
            situation(STORY, pending=(1, 6)),
            "0,2",
            ["the removals of vCPUs 1,6 are pending: any plug may set them off"],
        ),
        (situation(STORY, pending=(1, 6)), "0", []),
        (situation(STORY, pending=(1, 6)), "0-1,6", [f"vCPUs 1,6 {KEPT} is plugged again"]),
        (
            situation(STORY, pending=(6,), vm=OLD_TCG),
            "0-2,6",
            [
                "the removal of vCPU 6 is pending: any plug may set it off",
                f"no plug is safe after that: {REPLUG}",
                f"vCPU 6 {KEPT} is plugged again",
                f"plugging vCPU 6 again, should the guest let go, is known to be fatal: {REPLUG}",
                UNDER_TCG,
            ],
        ),
        (
            situation(STORY, vm=OLD_TCG),
            "0,2",
            [
                f"plugging vCPUs 1,6 again, as reverting does, is known to be fatal: {REPLUG}",
                f"do not reset the VM once a vCPU has left: {REPLUG}",
                UNDER_TCG,
            ],
        ),
        (
            situation(STORY, vm=TCG, created=6),
            "0,2",  # one is plugged, one can be plugged again, and that is all
            [f"plugging vCPU 6 again, as reverting does, is known to be fatal: {BEYOND}", UNDER_TCG],
        ),
        (
            situation(STORY, vm=TCG, created=7, pending=(6,)),
            "0-2,6",  # the KEEP's plug comes after those of the plan, and denies none of them
            [
                "the removal of vCPU 6 is pending: any plug may set it off",
                f"vCPU 6 {KEPT} is plugged again",
                f"plugging vCPU 6 again, should the guest let go, is known to be fatal: {BEYOND}",
                UNDER_TCG,
            ],
        ),
        (situation(STORY, vm=TCG, created=8, pending=(6,)), "0-1", []),  # joined: not ours to undo
        (
            situation(STORY, vm=TCG, single_threaded=True),
            "0-2,6",
            [f"taking vCPU 2 out again, as reverting does, is known to be fatal: {SINGLE}", UNDER_TCG],
        ),
        (
            situation(STORY, vm=replace(KVM, confidential=True)),
            "0,6",
            [f"plugging vCPU 1 again, as reverting does, is known to be fatal: {SEALED}"],
        ),
        (situation(STORY, vm=replace(TCG, qemu_version=(8, 2, 2))), "0-2,6", [LOCKS_UP, UNDER_TCG]),
        (
            situation(STORY, vm=replace(TCG, arch="ppc64", machine="pseries-10.0"), pending=(6,)),
            "0-1",
            [f"do not reset the VM before the guest has answered: {RESET}"],
        ),
    ],
)
def test_what_may_come_out_otherwise_is_told_beforehand(now: Situation, wish: str, warnings: list[str]) -> None:
    plan = plan_map(now, vcpus(wish))
    assert plan.denied == ()
    assert list(plan.warnings) == warnings
    assert [line for line in lines(plan) if "warning" in line] == [f"  warning: {each}" for each in warnings]


def test_what_is_fatal_and_allowed_is_planned_with_a_warning() -> None:
    now = situation(STORY, vm=TCG, created=8, single_threaded=True)
    plan = plan_map(now, vcpus("0-2"), CheckedOptions(allow_fatal=True))
    assert plan.denied == ()
    assert words(plan) == ["plug 2", "unplug 6"]
    assert f"plugging vCPU 2 is known to be fatal: {BEYOND}" in plan.warnings
    assert f"taking vCPU 6 out is known to be fatal: {SINGLE}" in plan.warnings


def test_boot_vcpus_of_libvirts_vm_leave_where_the_caller_insists() -> None:
    owned = replace(KVM, libvirt_owned=True)
    plan = plan_map(situation(STORY, vm=owned), vcpus("0"), CheckedOptions(allow_boot_vcpus=True))
    assert (plan.denied, words(plan)) == ((), ["unplug 6", "unplug 1"])


# Words.


def test_the_story_reads_well() -> None:
    assert lines(plan_map(situation(STORY), vcpus("0,2-5"))) == [
        "vCPUs 0-1,6 -> 0,2-5: 4 to plug, 2 to unplug",
        "  plug   2  (device_add vcpu2, socket 0 core 2)",
        "  plug   3  (device_add vcpu3, socket 0 core 3)",
        "  plug   4  (device_add vcpu4, socket 0 core 4)",
        "  plug   5  (device_add vcpu5, socket 0 core 5)",
        "  unplug 6  (the guest is asked to give up /machine/peripheral/vcpu6)",
        "  unplug 1  (the guest is asked to give up /machine/unattached/device[1], there at boot)",
    ]


def test_a_plan_that_does_nothing_says_so() -> None:
    assert str(plan_map(situation(STORY), vcpus("0-1,6"))) == "vCPUs 0-1,6 -> 0-1,6: nothing to do"


def test_few_pending_ones_are_told_one_by_one() -> None:
    now = situation({0: "boot", 4: "ours", 8: "ours"}, count=4, pending=(4, 8))
    assert lines(plan_map(now, vcpus("0-7")))[:3] == [
        "vCPUs 0-11 -> 0-7: 4 to unplug, 4 to keep",
        "  keep   4-7   (its removal is pending: the guest's answer is awaited)",
        "  unplug 8-11  (its removal is pending already: nothing is sent, the guest's answer is awaited)",
    ]


def test_many_alike_steps_are_one_line() -> None:
    ours = {0: "boot"} | dict.fromkeys(range(1, 240), "ours")
    boot = dict.fromkeys(range(240), "boot")
    half = tuple(range(120, 240))
    assert lines(plan_map(situation({0: "boot"}, slots=240), vcpus("0-239"))) == [
        "vCPUs 0 -> 0-239: 239 to plug",
        "  plug   1-239  (device_add vcpu1 .. vcpu239)",
    ]
    assert lines(plan_map(situation(ours, slots=240), vcpus("0")))[1:] == [
        "  unplug 1-239  (the guest is asked to give them up, 239 first)"
    ]
    assert lines(plan_map(situation(boot, slots=240), vcpus("0")))[1:] == [
        "  unplug 1-239  (the guest is asked to give them up, 239 first; they were there at boot)"
    ]
    joined = plan_map(situation(ours, slots=240, pending=half), vcpus("0"))
    assert lines(joined)[1:] == [
        "  unplug 120-239  (their removals are pending already: nothing is sent, the guest's answers are awaited)",
        "  unplug 1-119    (the guest is asked to give them up, 119 first)",
    ]
    kept = plan_map(situation(ours, slots=240, pending=half), vcpus("0-239"))
    assert lines(kept)[1:2] == ["  keep   120-239  (their removals are pending: the guest's answers are awaited)"]


def test_a_denial_of_nothing_in_particular_is_of_the_count() -> None:
    denied = Denied(VcpuMap(), DenialReason.COUNT_SPLITS_SLOT, "why")
    plan = Plan(vcpus("0"), vcpus("0"), (), (denied,))
    assert lines(plan) == ["vCPUs 0: denied, nothing would be sent", "  denied the count  (why)"]


@pytest.mark.parametrize(
    "wish",
    ["9" * 10_000_000, "0," * 100_000, "0-16383," * 20_000 + "z", itertools.count()],
    ids=["digits", "commas", "ranges", "without end"],
)
def test_a_wish_costs_no_more_than_it_is_long(wish: str | Iterable[int]) -> None:
    layout = situation(STORY).layout

    def refused() -> None:
        with pytest.raises(InvalidMapError):
            parse_target(wish, layout)

    length = min(len(wish), 200_000) if isinstance(wish, str) else 16384  # what is longer is not looked at
    assert calls(refused) < 6 * length + 1000


@pytest.mark.parametrize("unplug", [False, True])
def test_planning_costs_in_proportion_to_the_slots(unplug: bool) -> None:
    cost = {}
    for slots in (256, 1024):
        plugged = {0: "boot"} | (dict.fromkeys(range(1, slots), "ours") if unplug else {})
        now = situation(plugged, slots=slots)
        wish = VcpuMap([0] if unplug else range(slots))
        assert len(plan_map(now, wish).steps) == slots - 1
        cost[slots] = calls(partial(plan_map, now, wish))
    assert cost[1024] < 4.4 * cost[256]


# The guest's agent.


def test_an_unplug_that_asks_the_agent_says_so() -> None:
    options = CheckedOptions(offline_first=True)
    now = situation({0: "boot", 2: "ours", 3: "ours", 4: "ours"}, pending=(4,), has_agent=True)
    plan = plan_map(now._replace(guest_sees={0: True, 2: True, 3: False}), vcpus("0"), options)
    assert [(str(step), step.asks_agent) for step in plan.steps] == [
        ("unplug 4", False),
        ("unplug 3", False),
        ("unplug 2", True),
    ], "a removal is joined, and what is offline already needs no agent"
    assert "taken offline in the guest by its agent, then the guest is asked to give up" in lines(plan)[-1]


def test_without_an_agent_a_map_that_asks_it_is_denied_as_a_whole() -> None:
    now = situation({0: "boot", 2: "ours"})
    plan = plan_map(now, vcpus("0,3"), CheckedOptions(offline_first=True))
    assert [denied.reason for denied in plan.denied] == [DenialReason.NO_AGENT]
    assert plan_map(now, vcpus("0,2-3"), CheckedOptions(offline_first=True)).denied == ()
