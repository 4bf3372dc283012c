"""Whole maps on a real QEMU: policies, wishes that change, removals that are pending, others who interfere."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    DenialReason,
    InvalidMapError,
    MonitorLostError,
    OnFailure,
    Pending,
    Proof,
    StalePlanError,
    StepDeniedError,
    TransitionError,
    TransitionOutcome,
    TransitionReport,
    Unplugged,
    VcpuController,
    VcpuMap,
)
from qmpvcpu.events import UnplugPending, UnplugRequested, VcpuUnplugged
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.controller.vms import other_client, present, running, until
from tests.exchange import exchange
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu
# Every plug comes before every unplug, so 7.2 under TCG survives what does not replug.
EVERYWHERE = pytest.mark.parametrize("on", substrates())
WHERE_REPLUG_WORKS = pytest.mark.parametrize("on", substrates(["q35"], that_survive=True))
ON_KVM = pytest.mark.parametrize("on", substrates(["q35"], accels=["kvm"]))
BUSY = Behaviour.refusing(0x82)


def words(report: TransitionReport) -> list[str]:
    """The steps in short, such as ``plug 2 PLUGGED``; undone ones end with a minus sign."""
    return [
        f"{step.action.value} {step.ids} {step.verdict.name if step.verdict else '-'}{' -' if step.undone else ''}"
        for step in report.steps
    ]


async def failing(vm: VcpuController, wish: str, **terms: Any) -> TransitionReport:
    with pytest.raises(TransitionError) as caught:
        await vm.set_map(wish, **terms)
    return caught.value.report


async def recorded(record: Path, step: bytes) -> None:
    """Wait until a *step* of the transition under way is on record: what the guest answers then finds it half-way."""
    async with asyncio.timeout(10):
        while step not in await asyncio.to_thread(record.read_bytes):
            pass


async def seen_by_qemu(guest: MicroGuest) -> int:
    async with other_client(guest) as client:
        return len(await present(client))


# Reaching a map.


@EVERYWHERE
async def test_a_map_with_holes_is_reached_in_one_call(on: Substrate) -> None:
    async with running(on, boot=2) as (guest, vm):
        report = await vm.set_map("0,2-5")
        assert report.outcome is TransitionOutcome.REACHED
        assert words(report) == [*(f"plug {vcpu} PLUGGED" for vcpu in (2, 3, 4, 5)), "unplug 1 UNPLUGGED"]
        assert vm.layout.enabled == {0, 2, 3, 4, 5}
        assert await seen_by_qemu(guest) == 5
        assert report.layout.enabled == vm.layout.enabled


@EVERYWHERE
async def test_what_is_so_already_sends_nothing(on: Substrate) -> None:
    async with running(on, boot=2) as (_, vm):
        with exchange() as sent:
            report = await vm.set_map([0, 1])
        assert report.outcome is TransitionOutcome.REACHED
        assert report.steps == ()
        assert sent == ["query-hotpluggable-cpus"]


@EVERYWHERE
async def test_commands_are_one_a_step_and_queries_do_not_grow(on: Substrate) -> None:
    async with running(on, boot=1, attach={"resync_interval": None}) as (_, vm):
        with exchange() as sent:
            await vm.set_map("0-7")
        assert sent.count("device_add") == 7
        assert [sent[0], *sent[8:]] == ["query-hotpluggable-cpus"] * 2  # one look before, one after


@WHERE_REPLUG_WORKS
async def test_a_count_takes_the_lowest_free_in_and_the_highest_removable_out(on: Substrate) -> None:
    async with running(on, boot=2, max_vcpus=8) as (_, vm):
        await vm.plug(4)
        assert words(await vm.set_count(5)) == ["plug 2 PLUGGED", "plug 3 PLUGGED"]
        assert words(await vm.set_count(3)) == ["unplug 4 UNPLUGGED", "unplug 3 UNPLUGGED"]
        with pytest.raises(StepDeniedError, match="vCPUs 0-1 were there at boot") as caught:
            await vm.set_count(1)
        assert caught.value.reason is DenialReason.COUNT_KEEPS_BOOT
        await vm.set_count(1, include_boot=True)
        assert vm.layout.enabled == {0}


@ON_KVM
async def test_the_guests_word_can_be_waited_for(on: Substrate) -> None:
    mute = Behaviour(insert_answer=False).for_slot(3)
    async with running(on, behaviour=[mute]) as (_, vm):
        report = await vm.set_map("0,2-3", proof=Proof.ACKNOWLEDGED, timeout=0.2)
        assert report.outcome is TransitionOutcome.REACHED
        two, three = (step.verdict for step in report.steps)
        assert isinstance(two, qmpvcpu.Plugged)
        assert isinstance(three, qmpvcpu.Plugged)
        assert two.acknowledged is True
        assert three.acknowledged is False


# Refused before anything is sent.


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("0-", '"" in "0-" is not a vCPU id'),
        ("3-1", "runs downwards"),
        ("0,,1", '"" is not a vCPU id'),
        ("", "empty"),
        ("1" * 10_000_000, "is not a set of vCPU ids"),
        ([], "empty"),
        ([-1], "-1"),
    ],
)
async def test_a_wish_that_is_no_map_is_refused(guest: MicroGuest, wish: str | Iterable[int], said: str) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        with exchange() as sent, pytest.raises(InvalidMapError, match=said) as caught:
            await vm.set_map(wish)
        assert sent == []
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("policy", OnFailure)
async def test_one_denied_step_fails_the_whole(guest: MicroGuest, policy: OnFailure) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        with (
            exchange() as sent,
            pytest.raises(StepDeniedError, match="no vCPUs 8-9: this machine has 0 to 7") as caught,
        ):
            await vm.set_map("2,8-9", on_failure=policy)
        assert "vCPU 0 is the one that booted the VM" in str(caught.value)
        assert not {"device_add", "device_del"} & set(sent)
        assert vm.layout.enabled == {0}


async def test_a_plan_is_carried_out_unless_the_vm_has_changed(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        plan = vm.plan("0,3-4")
        assert "plug   3" in str(plan) or "plug 3" in str(plan)
        stale = vm.plan("0,5")
        assert words(await vm.set_map(plan)) == ["plug 3 PLUGGED", "plug 4 PLUGGED"]
        with pytest.raises(StalePlanError, match=r"it starts from 0, .* at 0,3-4 now"):
            await vm.set_map(stale)
        assert vm.layout.enabled == {0, 3, 4}


@pytest.mark.parametrize(
    "terms", [{"in_flight": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"revert_timeout": -2}]
)
async def test_terms_that_cannot_be_meant_are_refused(guest: MicroGuest, terms: dict[str, Any]) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        with pytest.raises(ValueError, match=next(iter(terms))):
            await vm.set_map("0-1", **terms)
        assert vm.layout.enabled == {0}


# When a step fails.


@WHERE_REPLUG_WORKS
@pytest.mark.parametrize(
    ("policy", "in_flight", "wanted", "left"),
    [
        ("stop", 1, ["PARTIAL", "unplug 6 UNPLUGGED", "unplug 5 REFUSED", "unplug 1 -"], "0-5"),
        ("stop", 8, ["PARTIAL", "unplug 6 UNPLUGGED", "unplug 5 REFUSED", "unplug 1 -"], "0-5"),
        ("continue", 1, ["PARTIAL", "unplug 6 UNPLUGGED", "unplug 5 REFUSED", "unplug 1 UNPLUGGED"], "0,2-5"),
        ("revert", 8, ["REVERTED", "unplug 6 UNPLUGGED -", "unplug 5 REFUSED", "unplug 1 UNPLUGGED -"], "0-1,5-6"),
    ],
)
async def test_each_policy_does_what_its_name_says(
    on: Substrate, policy: str, in_flight: int, wanted: list[str], left: str
) -> None:
    async with running(on, boot=2, max_vcpus=16, behaviour=[BUSY.for_slot(5)]) as (guest, vm):
        await vm.set_map("0-1,5-6")
        report = await failing(vm, "0,2-4", on_failure=OnFailure(policy), in_flight=in_flight)
        undone = " -" if policy == "revert" else ""
        plugs = [f"plug {vcpu} PLUGGED{undone}" for vcpu in (2, 3, 4)]
        assert [report.outcome.name, *words(report)] == [wanted[0], *plugs, *wanted[1:]]
        assert vm.layout.enabled == VcpuMap.parse(left)
        assert await seen_by_qemu(guest) == len(vm.layout.enabled)
        assert "device is busy" in str(report)


@WHERE_REPLUG_WORKS
async def test_nothing_leaves_after_the_first_refusal_unless_the_caller_asks_for_it(on: Substrate) -> None:
    async with running(on, behaviour=[BUSY.for_slot(7)]) as (guest, vm):
        await vm.set_map("0-7")
        with exchange() as sent:
            report = await failing(vm, "0")
        assert sent.count("device_del") == 1
        assert words(report) == ["unplug 7 REFUSED", *(f"unplug {vcpu} -" for vcpu in (6, 5, 4, 3, 2, 1))]
        assert vm.layout.enabled == VcpuMap.parse("0-7")
        assert await seen_by_qemu(guest) == 8


@ON_KVM
async def test_what_cannot_be_undone_is_told(on: Substrate) -> None:
    stubborn = [BUSY.for_slot(5), BUSY.for_slot(3)]
    async with running(on, behaviour=stubborn) as (_, vm):
        await vm.plug(5)
        report = await failing(vm, "0,2-3", on_failure=OnFailure.REVERT)
        assert report.outcome is TransitionOutcome.REVERT_INCOMPLETE
        assert [(str(step.ids), step.undone) for step in report.steps] == [("2", True), ("3", False), ("5", None)]
        assert "undoing it: the guest refused: device is busy" in str(report)
        assert vm.layout.enabled == {0, 3, 5}


@ON_KVM
async def test_revert_never_plugs_what_is_still_pending(on: Substrate) -> None:
    async with running(on, behaviour=[Behaviour.silent().for_slot(5)]) as (guest, vm):
        await vm.plug(5)
        report = await failing(vm, "0,2", on_failure=OnFailure.REVERT, timeout=0.2)
        assert report.outcome is TransitionOutcome.REVERT_INCOMPLETE
        assert words(report) == ["plug 2 PLUGGED -", "unplug 5 PENDING"]
        assert vm.layout.enabled == {0, 5}
        assert vm.layout.pending == {5}
        events = vm.events()
        await guest.set_behaviour(Behaviour.complying())
        await vm.plug(7)  # QEMU's notice of any plug makes the guest look at the rest too
        gone = (await until(events, VcpuUnplugged))[-1]
        assert isinstance(gone, VcpuUnplugged)
        assert gone.ids == {5}
        assert gone.late
        assert report.layout.enabled == {0, 5}  # an ended report is not mutated
        assert vm.layout.enabled == {0, 7}


@ON_KVM
async def test_unplugs_are_awaited_together_and_not_one_after_another(on: Substrate) -> None:
    # Nothing else happens that would have the end of the waiting told along with it.
    async with running(on, behaviour=Behaviour.silent(), attach={"resync_interval": None}) as (_, vm):
        await vm.set_map("0-4", proof=Proof.ACKNOWLEDGED)
        stream = vm.events()
        report = await failing(vm, "0", on_failure=OnFailure.CONTINUE, timeout=0.5)
        told = [type(await anext(stream)) for _ in range(8)]
        assert told == [UnplugRequested] * 4 + [UnplugPending] * 4
        assert [type(step.verdict) for step in report.steps] == [Pending] * 4


async def test_that_a_stopped_map_waits_no_longer_is_told_at_once(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.silent())
    async with qmpvcpu.attach(guest.qmp, resync_interval=None) as vm:
        await vm.set_map("0-2", proof=Proof.ACKNOWLEDGED)
        stream = vm.events()
        wishing = asyncio.create_task(failing(vm, "0", on_failure=OnFailure.CONTINUE))
        assert [type(await anext(stream)) for _ in range(2)] == [UnplugRequested] * 2
        report = await vm.cancel()
        assert report is not None
        assert [type(await anext(stream)) for _ in range(2)] == [UnplugPending] * 2
        await wishing


@ON_KVM
async def test_a_timeout_of_zero_only_requests(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (guest, vm):
        await vm.set_map("0-3")
        report = await vm.set_map("0", timeout=0)
        assert report.outcome is TransitionOutcome.REQUESTED
        assert words(report) == ["unplug 3 PENDING", "unplug 2 PENDING", "unplug 1 PENDING"]
        assert vm.desired == {0}
        await guest.set_behaviour(Behaviour.complying())
        await vm.wait_for(lambda layout: layout.enabled == {0}, timeout=10)


@ON_KVM
async def test_requested_is_no_excuse_for_what_else_went_wrong(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (guest, vm):
        await vm.set_map("0-3")
        await vm.set_map("0-2", timeout=0)
        report = await failing(vm, "0,3", timeout=0)  # vCPU 3 is to stay, and may leave
        assert report.outcome is TransitionOutcome.PARTIAL
        await guest.set_behaviour(Behaviour.complying())
        await vm.wait_for(lambda layout: layout.enabled == {0}, timeout=10)


@ON_KVM
async def test_who_did_not_wait_finds_the_report(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (_, vm):
        assert vm.last_report is None
        reached = await vm.set_map("0-3")
        assert vm.last_report == reached
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await vm.set_map("0")
        await vm.wait_for(lambda _: vm.last_report != reached, timeout=10)
        assert vm.last_report is not None
        assert vm.last_report.cancelled
        assert words(vm.last_report) == ["unplug 3 PENDING", "unplug 2 -", "unplug 1 -"]


@ON_KVM
async def test_the_whole_can_be_bounded(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (_, vm):
        await vm.set_map("0-3")
        report = await failing(vm, "0", timeout=30, total_timeout=0.2)
        assert words(report) == ["unplug 3 PENDING", "unplug 2 -", "unplug 1 -"]
        assert "total_timeout has passed" in str(report)


# Removals that are pending.


@ON_KVM
async def test_a_wish_without_a_pending_vcpu_joins_its_removal(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with running(on, behaviour=Behaviour.hanging(), attach={"record": record, "name": "web"}) as (guest, vm):
        await vm.plug(3)
        await vm.request_unplug(3)
        await vm.wait_for(lambda layout: 3 in layout.pending, timeout=10)
        with exchange() as sent:
            wished = asyncio.create_task(vm.set_map("0"))
            await recorded(record, b'joins="yes"')
            await guest.set_behaviour(Behaviour.complying())
            report = await wished
        assert "device_del" not in sent
        assert words(report) == ["unplug 3 UNPLUGGED"]


@ON_KVM
async def test_a_pending_vcpu_that_shall_stay_is_plugged_again_if_it_leaves(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with running(on, behaviour=Behaviour.hanging(), attach={"record": record, "name": "web"}) as (guest, vm):
        await vm.plug(3)
        await vm.request_unplug(3)
        plan = vm.plan("0,3")
        assert "QEMU cannot withdraw" in str(plan)
        wished = asyncio.create_task(vm.set_map("0,3"))
        await recorded(record, b'action="keep"')
        await guest.set_behaviour(Behaviour.complying())
        report = await wished
        assert words(report) == ["keep 3 PLUGGED"]
        assert vm.layout.enabled == {0, 3}
        assert not vm.layout.pending
        assert await seen_by_qemu(guest) == 2


@ON_KVM
async def test_a_pending_vcpu_that_shall_stay_and_gets_no_answer_is_partial(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.silent()) as (_, vm):
        await vm.plug(3)
        await vm.request_unplug(3)
        report = await failing(vm, "0,3", timeout=0.2)
        assert report.outcome is TransitionOutcome.PARTIAL
        assert words(report) == ["keep 3 PENDING"]


@ON_KVM
async def test_a_pending_vcpu_that_the_guest_refuses_to_give_up_stays(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with running(on, behaviour=Behaviour.hanging(), attach={"record": record, "name": "web"}) as (guest, vm):
        await vm.plug(3)
        await vm.request_unplug(3)
        wished = asyncio.create_task(vm.set_map("0,3"))
        await recorded(record, b'action="keep"')
        await guest.set_behaviour(BUSY)
        report = await wished
        assert report.outcome is TransitionOutcome.REACHED
        assert words(report) == ["keep 3 REFUSED"]


# Wishes that change.


@ON_KVM
async def test_a_second_wish_waits_for_the_first(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.slow(50)) as (_, vm):
        await vm.set_map("0-3")
        first, second = await asyncio.gather(vm.set_map("0,4"), vm.set_map("0,5"))
        assert words(first) == ["plug 4 PLUGGED", "unplug 3 UNPLUGGED", "unplug 2 UNPLUGGED", "unplug 1 UNPLUGGED"]
        assert words(second) == ["plug 5 PLUGGED", "unplug 4 UNPLUGGED"]
        assert vm.layout.enabled == {0, 5}


@ON_KVM
async def test_cancel_stops_at_the_next_safe_point_with_a_report(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (guest, vm):
        await vm.set_map("0-3")
        assert await vm.cancel() is None
        wished = asyncio.create_task(vm.set_map("0", in_flight=1, on_failure=OnFailure.REVERT))
        await vm.wait_for(lambda layout: 1 in layout.pending or 3 in layout.pending, timeout=10)
        report = await vm.cancel()
        assert report is not None
        with pytest.raises(TransitionError) as caught:
            await wished
        assert caught.value.report == report
        assert report.cancelled
        assert report.outcome is TransitionOutcome.PARTIAL
        assert vm.layout.enabled == {0, 1, 2, 3}
        await guest.set_behaviour(Behaviour.complying())
        await vm.wait_settled(timeout=10)
        assert (await vm.set_map("0-3")).outcome is TransitionOutcome.REACHED


@ON_KVM
async def test_a_cancelled_caller_leaves_no_outcome_unread(on: Substrate, tmp_path: Path) -> None:
    async with running(on, behaviour=Behaviour.hanging(), attach={"record": tmp_path / "vm.xml", "name": "web"}) as (
        guest,
        vm,
    ):
        await vm.set_map("0-2")
        wished = asyncio.create_task(vm.set_map("0,5"))
        await vm.wait_for(lambda layout: 5 in layout.enabled and layout.pending, timeout=10)
        wished.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wished
        await guest.set_behaviour(Behaviour.complying())
        # The next in turn sees what the first one left, and nothing of it is lost.
        report = await vm.set_map("0,5")
        assert report.outcome is TransitionOutcome.REACHED
        assert vm.interrupted is None
    record = (tmp_path / "vm.xml").read_bytes()
    assert b"<vcpu id='5' enabled='yes'" in record
    assert b"transition" not in record


@ON_KVM
async def test_a_caller_that_is_cancelled_before_its_turn_leaves_no_trace(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.slow(100)) as (_, vm):
        await vm.set_map("0-1")
        first = asyncio.create_task(vm.set_map("0"))
        second = asyncio.create_task(vm.set_map("0-7"))
        await vm.wait_for(lambda layout: layout.pending, timeout=10)
        second.cancel()
        assert words(await first) == ["unplug 1 UNPLUGGED"]
        assert (await vm.set_map("0,2")).outcome is TransitionOutcome.REACHED
        assert vm.layout.enabled == {0, 2}


@ON_KVM
async def test_single_commands_and_maps_take_turns(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.slow(20)) as (guest, vm):
        await vm.set_map("0-3")
        results = await asyncio.gather(
            vm.unplug(3), vm.set_map("0,4-5"), vm.plug(6), vm.plug(), vm.set_map("0-1,6"), vm.unplug(6)
        )
        assert [each for each in results if isinstance(each, VcpuMap)] == [{3}, {6}, {1}, {6}]
        assert vm.layout.enabled == {0, 1}
        assert await seen_by_qemu(guest) == 2


@ON_KVM
async def test_closing_in_the_middle_ends_cleanly(on: Substrate, tmp_path: Path) -> None:
    async with MicroGuest(on.qemu, accel=on.accel, behaviour=Behaviour.hanging()) as guest:
        vm = await qmpvcpu.attach(guest.qmp, name="web", record=tmp_path / "vm.xml")
        await vm.set_map("0-2")
        first = asyncio.create_task(vm.set_map("0", on_failure=OnFailure.CONTINUE))
        second = asyncio.create_task(vm.set_map("0-5"))
        await vm.wait_for(lambda layout: len(layout.pending) == 2, timeout=10)
        await vm.close()
        with pytest.raises(TransitionError) as caught:
            await first
        assert words(caught.value.report) == ["unplug 2 PENDING", "unplug 1 PENDING"]
        with pytest.raises(MonitorLostError, match="closed by this side"):
            await second
        async with qmpvcpu.attach(guest.qmp, name="web", record=tmp_path / "vm.xml") as again:
            assert again.layout.pending == {1, 2}


# Others.


@ON_KVM
async def test_what_others_changed_is_neither_done_again_nor_undone(on: Substrate) -> None:
    async with (
        running(on, behaviour=[Behaviour.slow(200).for_slot(6), BUSY.for_slot(5)]) as (guest, vm),
        # Before anything happens: qemu.qmp gives up at an event between its qmp_capabilities and the reply.
        other_client(guest) as client,
    ):
        await vm.set_map("0,5-6")
        wished = asyncio.create_task(failing(vm, "0,2-3", on_failure=OnFailure.REVERT))
        await vm.wait_for(lambda layout: 3 in layout.enabled and layout.pending, timeout=10)
        await client.execute("device_del", {"id": "vcpu3"})
        report = await wished
        assert 3 not in vm.layout.enabled
        assert report.outcome is TransitionOutcome.REVERTED
        assert vm.layout.enabled == {0, 5, 6}


async def test_the_latent_removal_of_another_vcpu_is_a_late_answer(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.silent())
    async with qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        request = await vm.request_unplug(3)
        assert isinstance(await request.wait(0.1), Pending)
        assert "any plug may set it off" in str(vm.plan("0,2"))
        await guest.set_behaviour(Behaviour.complying())
        report = await vm.set_map("0,2")
        assert report.outcome is TransitionOutcome.REACHED
        assert isinstance(await request.wait(10), Unplugged)
        assert vm.layout.enabled == {0, 2}


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    """A VM on whatever is best here."""
    async with MicroGuest() as running_guest:
        yield running_guest


# The end: what is told is so.


@ON_KVM
async def test_what_another_client_plugs_meanwhile_is_seen_at_the_end(on: Substrate) -> None:
    slow = dataclasses.replace(Behaviour.hanging(), insert_answer=False)
    async with running(on, boot=3, behaviour=slow, attach={"resync_interval": None}) as (guest, vm):
        changing = asyncio.create_task(vm.set_map("0-1"))
        await vm.wait_for(lambda layout: 2 in layout.pending, timeout=10)
        async with other_client(guest) as other:
            slot = next(each for each in vm.layout.slots if each.first == 3)
            await other.execute("device_add", {"driver": slot.type, "id": "theirs", **slot.props})
        await guest.set_behaviour(Behaviour.complying())
        with pytest.raises(TransitionError, match="plugged outside this transition: 3") as caught:
            await changing
        report = caught.value.report
        assert report.outcome is TransitionOutcome.PARTIAL
        assert words(report) == ["unplug 2 UNPLUGGED"]
        assert report.layout.enabled == vm.layout.enabled == {0, 1, 3}
        assert report.changed_by_other == {3}
        assert TransitionReport.from_json(report.to_json()) == report


@ON_KVM
async def test_a_vcpu_that_leaves_late_while_the_rest_is_undone_is_plugged_again(on: Substrate) -> None:
    late = [Behaviour.slow(250).for_slot(5), Behaviour.silent().for_slot(7)]
    async with running(on, boot={0, 5}, behaviour=late) as (guest, vm):
        report = await failing(vm, "0,7", on_failure=OnFailure.REVERT, timeout=0.1, revert_timeout=1)
        assert report.outcome is TransitionOutcome.REVERT_INCOMPLETE
        assert words(report) == ["plug 7 PLUGGED", "unplug 5 UNPLUGGED -"]
        assert report.layout.enabled == {0, 5, 7}
        assert await seen_by_qemu(guest) == 3
