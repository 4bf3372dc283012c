"""A vCPU that works, on a real Linux with its agent: proven up to the guest's own list, and taken back in time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import Proof, UnplugRefusedError, VcpuController
from qmpvcpu.errors import UnprovenError
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator
from qmpvcpu.testing.vms import TRACE_ARGUMENTS, TRACE_FILE, read_transcript
from tests.migration.moving import call

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


@contextlib.asynccontextmanager
async def attached(guest: LinuxGuest) -> AsyncIterator[VcpuController]:
    async with qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm:
        yield vm


def removals(guest: LinuxGuest) -> int:
    """How often QEMU was sent a ``device_del``, as its own transcript has it."""
    said = read_transcript((guest.process.directory / TRACE_FILE).read_text())
    return sum(message.content.get("execute") == "device_del" for message in said)


@pytest.mark.parametrize("itself", [True, False], ids=["by itself", "by the agent"])
async def test_a_plug_is_proven_by_the_guests_own_list(shared_guest: LinuxGuest, itself: bool) -> None:
    await shared_guest.set_auto_online(itself)
    async with attached(shared_guest) as vm:
        await vm.plug(3, proof=Proof.ONLINE)
        assert vm.layout[3].proof is Proof.ONLINE
        assert len(await shared_guest.online()) == 3
        assert {cpu.vcpu for cpu in await vm.guest.vcpus() if cpu.online} == {0, 1, 3}
        await vm.unplug(3)


async def test_a_vcpu_that_linux_leaves_offline_is_not_brought_online_against_the_callers_wish(
    shared_guest: LinuxGuest,
) -> None:
    await shared_guest.set_auto_online(False)
    async with attached(shared_guest) as vm:
        with pytest.raises(UnprovenError, match="plugged and acknowledged, never online") as caught:
            await vm.plug(3, proof=Proof.ONLINE, online=False, timeout=3)
        assert (caught.value.wanted, caught.value.reached) == (Proof.ONLINE, Proof.ACKNOWLEDGED)
        assert vm.layout.enabled == {0, 1, 3}
        assert len(await shared_guest.online()) == 2
        await vm.unplug(3)


async def test_an_unplug_that_is_cancelled_between_its_phases_leaves_the_cpu_online(
    shared_guest: LinuxGuest,
) -> None:
    async with attached(shared_guest) as vm:
        await vm.plug(5, proof=Proof.ONLINE)
        unplug = asyncio.create_task(vm.unplug(5, offline_first=True))
        await shared_guest.wait_online(lambda cpus: len(cpus) == 2)
        unplug.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await unplug
        # It was cancelled before QEMU was asked, or too late.
        await vm.wait_settled()
        wanted = 3 if 5 in vm.layout.enabled else 2
        assert len(await shared_guest.wait_online(lambda cpus: len(cpus) == wanted)) == wanted


async def test_a_vcpu_that_linux_starts_is_told_without_an_agent(qemu: Path, accel: Accelerator, kernel: str) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, agent_runs=False) as guest,
        qmpvcpu.attach(guest.qmp) as vm,
    ):
        await vm.plug(3, proof=Proof.STARTED)
        assert vm.layout[3].proof is Proof.STARTED
        await guest.set_auto_online(False)
        with pytest.raises(UnprovenError, match="never started") as caught:
            await vm.plug(5, proof=Proof.STARTED, timeout=3)
        assert caught.value.reached is Proof.ACKNOWLEDGED


async def test_a_linux_that_detects_no_hypervisor_never_starts_it(
    qemu: Path, accel: Accelerator, kernel: str, fixed_at_boot: bool
) -> None:
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, hypervisor=False) as guest, attached(guest) as vm:
        if not fixed_at_boot:  # an older one does not ask
            await vm.plug(3, proof=Proof.ONLINE)
            return
        for proof in (Proof.STARTED, Proof.ONLINE):
            with pytest.raises(UnprovenError, match=f"never {proof.value}") as caught:
                await vm.plug(3 if proof is Proof.STARTED else 4, proof=proof, timeout=3)
            assert caught.value.reached is Proof.ACKNOWLEDGED  # it lies
        assert vm.layout.enabled == {0, 1, 3, 4}
        assert await guest.present() == {0, 1}


async def test_an_unplug_is_taken_back_while_deadline_tasks_hold_the_cpu(
    qemu: Path, accel: Accelerator, kernel: str
) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, extra_args=TRACE_ARGUMENTS) as guest,
        attached(guest) as vm,
    ):
        await vm.plug(5, proof=Proof.ONLINE)
        # Three tasks have reserved nearly all of three CPUs: Linux cannot do with two.
        await guest.refuse()
        with pytest.raises(UnplugRefusedError) as refused:
            await vm.unplug(5, offline_first=True)
        assert refused.value.by_agent
        assert "busy" in str(refused.value)
        assert removals(guest) == 0
        assert len(await guest.online()) == 3

        # Nothing is pending: after a reset Linux still has it.
        await call(guest, "system_reset")
        await guest.wait_ready()
        assert len(await guest.online()) == 3
        assert vm.layout.enabled == {0, 1, 5}

        # With the tasks gone the same call succeeds, and there was nothing left to refuse.
        await guest.refuse()
        with pytest.raises(UnplugRefusedError):
            await vm.unplug(5, offline_first=True)
        await guest.comply()
        assert await vm.unplug(5, offline_first=True) == {5}
        assert removals(guest) == 1
        assert len(await guest.online()) == 2
