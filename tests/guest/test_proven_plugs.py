"""Plugs of one vCPU and of many on a real Linux, proven by what the guest itself says and does."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import qmpvcpu
from qmpvcpu import OnFailure, Proof, TransitionError, TransitionOutcome, UnprovenError, VcpuController
from qmpvcpu.events import Event, VcpuProven
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator

pytestmark = [pytest.mark.guest, pytest.mark.asyncio(loop_scope="module")]

IMPATIENT = 4.0  # s: on a quiet machine a guest acknowledges a vCPU in half of one


@pytest_asyncio.fixture(loop_scope="module")
async def vm(roomy_guest: LinuxGuest) -> AsyncIterator[VcpuController]:
    """A Linux with vCPUs 0 and 1, which brings what comes online by itself; left as it was."""
    async with qmpvcpu.attach(roomy_guest.qmp, agent=roomy_guest.agent) as vm:
        yield vm
        await roomy_guest.comply()
        await roomy_guest.set_auto_online(True)
        await vm.set_map("0-1", timeout=10)


@pytest.mark.parametrize("by_itself", [True, False])
async def test_a_plugged_vcpu_is_online_by_the_guests_own_list(
    vm: VcpuController, roomy_guest: LinuxGuest, by_itself: bool
) -> None:
    await roomy_guest.set_auto_online(by_itself)
    events = vm.events()
    assert await vm.plug(3, proof=Proof.ONLINE) == {3}
    assert len(await roomy_guest.online()) == 3
    assert vm.layout[3].proof is Proof.ONLINE
    assert vm.layout[3].proven_at is not None
    assert {cpu.vcpu: cpu.online for cpu in await vm.guest.vcpus()} == {0: True, 1: True, 3: True}
    proven = await _proven(events, 3)
    assert proven[-1].seconds is not None
    assert proven[-1].seconds > 0


async def _proven(events: AsyncIterator[Event], vcpu: int) -> list[VcpuProven]:
    """What was proven of a vCPU, up to ONLINE."""
    seen: list[VcpuProven] = []
    async for event in events:
        if isinstance(event, VcpuProven) and vcpu in event.ids:
            seen.append(event)
            if event.proof is Proof.ONLINE:
                return seen
    raise AssertionError(seen)


async def test_who_only_looks_is_told_that_the_guest_has_it_offline(
    vm: VcpuController, roomy_guest: LinuxGuest
) -> None:
    await roomy_guest.set_auto_online(False)
    with pytest.raises(UnprovenError, match="the guest has it, but offline") as caught:
        await vm.plug(3, proof=Proof.ONLINE, online=False, timeout=IMPATIENT)
    error = caught.value
    assert error.ids == {3}
    assert (error.wanted, error.reached) == (Proof.ONLINE, Proof.ACKNOWLEDGED)
    assert vm.layout.enabled == {0, 1, 3}
    assert len(await roomy_guest.online()) == 2
    for change, proof in ((vm.guest.set_online, Proof.ONLINE), (vm.guest.set_offline, Proof.ACKNOWLEDGED)):
        await change(3)
        assert vm.layout[3].proof is proof


async def test_who_only_looks_sees_a_guest_that_does_it_by_itself(vm: VcpuController) -> None:
    assert await vm.plug(3, proof=Proof.ONLINE, online=False) == {3}


@pytest.mark.parametrize("by_itself", [True, False])
async def test_every_vcpu_of_a_map_is_online(vm: VcpuController, roomy_guest: LinuxGuest, by_itself: bool) -> None:
    await roomy_guest.set_auto_online(by_itself)
    report = await vm.set_map("0-1,3,5-6", proof=Proof.ONLINE)
    assert report.outcome is TransitionOutcome.REACHED
    assert len(await roomy_guest.online()) == 5
    for step in report.steps:
        assert step.missing is None
        assert step.proofs is not None
        assert step.proofs.present is not None
        assert step.proofs.online is not None
        assert step.proofs.present <= step.proofs.online


async def test_a_count_and_a_state_are_proven_too(vm: VcpuController, roomy_guest: LinuxGuest) -> None:
    await roomy_guest.set_auto_online(False)
    assert (await vm.set_count(4, proof=Proof.ONLINE)).outcome is TransitionOutcome.REACHED
    assert await vm.set_state(6, enabled=True, proof=Proof.ONLINE) == {6}
    assert len(await roomy_guest.online()) == 5


async def test_a_map_that_is_not_proven_is_reverted(vm: VcpuController, roomy_guest: LinuxGuest) -> None:
    await roomy_guest.set_auto_online(False)
    with pytest.raises(TransitionError, match="the guest has it, but offline") as caught:
        await vm.set_map("0-2", proof=Proof.ONLINE, online=False, timeout=IMPATIENT, on_failure=OnFailure.REVERT)
    report = caught.value.report
    assert report.outcome is TransitionOutcome.REVERTED
    assert report.steps[0].missing is Proof.ONLINE
    assert vm.layout.enabled == {0, 1}


async def test_a_vcpu_that_is_plugged_while_linux_boots_is_proven_in_time(
    qemu: Path, accel: Accelerator, kernel: str
) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel) as guest,
        qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm,
    ):
        await vm.run_control.reset()
        try:
            assert await vm.plug(3, proof=Proof.ONLINE, timeout=60) == {3}
        finally:
            await guest.wait_ready()
        assert len(await guest.online()) == 3
