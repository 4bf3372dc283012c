"""What a plan says beforehand of a real Linux, and what that Linux then does."""

import asyncio
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import (
    CommandRejectedError,
    Proof,
    UnplugPendingError,
    UnplugRefusedError,
    VcpuController,
)
from qmpvcpu.events import VmReset
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator
from tests.controller.vms import until
from tests.migration.moving import call

pytestmark = pytest.mark.guest

NEVER_USED = "it acknowledges a vCPU and never uses it"
UNHEARD = "the guest has answered nothing about a vCPU since it started"


def warns(vm: VcpuController, target: str, of: str) -> bool:
    return any(of in warning for warning in vm.plan(target).warnings)


async def test_a_linux_that_sees_no_hypervisor_does_as_the_plan_says_once_its_kernel_is_known(
    qemu: Path, accel: Accelerator, kernel: str, fixed_at_boot: bool
) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, hypervisor=False) as guest,
        qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm,
    ):
        assert warns(vm, "0-2", NEVER_USED)  # of a guest that nobody knows
        system = await vm.guest.os()
        assert system.kernel.startswith(f"{kernel}.")
        assert not system.is_windows
        ignored = warns(vm, "0-2", NEVER_USED)
        assert ignored is fixed_at_boot
        await vm.plug(2, proof=Proof.ACKNOWLEDGED, require_proof=True)
        if not ignored:
            await guest.wait_online(lambda cpus: len(cpus) == 3)
        assert len(await guest.present()) == (2 if ignored else 3)


async def test_what_is_asked_of_a_linux_that_boots_comes_to_nothing_as_the_plan_says(guest: LinuxGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3, proof=Proof.ACKNOWLEDGED, require_proof=True)
        assert not warns(vm, "0-1", UNHEARD)  # it has answered
        events = vm.events()
        await call(guest, "system_reset")
        await asyncio.wait_for(until(events, VmReset), 5)
        assert warns(vm, "0-1", UNHEARD)
        with pytest.raises((CommandRejectedError, UnplugRefusedError, UnplugPendingError)):
            await vm.unplug(3, timeout=0.2)
