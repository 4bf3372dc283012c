"""A real Linux starts the vCPUs that are plugged, unless it was told to have no more CPUs."""

from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import Proof
from qmpvcpu.errors import UnprovenError
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator

pytestmark = pytest.mark.guest

IMPATIENT = 4.0  # s: on a quiet machine a guest acknowledges a vCPU in half of one


async def test_a_plug_is_proven_once_linux_has_started_the_vcpu(guest: LinuxGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        assert await vm.plug(5, proof=Proof.STARTED) == {5}
        assert vm.layout[5].proof is Proof.STARTED
        assert await vm.plug(3, proof=Proof.STARTED) == {3}
        await guest.set_auto_online(False)
        with pytest.raises(UnprovenError, match="never started") as caught:
            await vm.plug(2, proof=Proof.STARTED, timeout=IMPATIENT)
        assert caught.value.reached is Proof.ACKNOWLEDGED


async def test_vcpus_that_linux_does_not_start_are_told_as_that(qemu: Path, accel: Accelerator, kernel: str) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, boot=1, kernel_options="nr_cpus=1") as guest,
        qmpvcpu.attach(guest.qmp) as vm,
    ):
        for vcpu in (5, 2):
            with pytest.raises(UnprovenError, match="never started"):
                await vm.plug(vcpu, proof=Proof.STARTED, timeout=IMPATIENT)
            assert vm.layout[vcpu].proof in {Proof.PRESENT, Proof.ACKNOWLEDGED}


async def test_a_linux_that_detects_no_hypervisor_acknowledges_vcpus_and_never_starts_them(
    qemu: Path, accel: Accelerator, kernel: str, fixed_at_boot: bool
) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, hypervisor=False) as guest,
        qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm,
    ):
        if not fixed_at_boot:  # it does not ask for one
            assert await vm.plug(3, proof=Proof.ONLINE) == {3}
            return
        for vcpu, proof in ((3, Proof.STARTED), (4, Proof.ONLINE)):
            with pytest.raises(UnprovenError, match=f"never {proof.value}") as caught:
                await vm.plug(vcpu, proof=proof, timeout=IMPATIENT)
            assert caught.value.reached is Proof.ACKNOWLEDGED
        assert vm.layout.enabled == {0, 1, 3, 4}
        assert await guest.present() == {0, 1}
