"""Which CPU of a real Linux is which vCPU: by both kernels' rules, with holes, after a reboot and a migration.

What is expected is written out for each kernel. An agent that may read files tells all of it; one that may not tells
less, and nothing else.
"""

import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import VcpuController
from qmpvcpu.errors import GuestNumberUnknownError
from qmpvcpu.events import VmReset
from qmpvcpu.model.guest import KnownBy
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator
from tests.guest.plugging import plug_in_order
from tests.migration.moving import call, move, rebuild

pytestmark = pytest.mark.guest

Numbers = Mapping[int, int]  # a guest's number by vCPU id

NO_FILES = ["guest-file-open", "guest-file-read"]


@contextlib.asynccontextmanager
async def attached(guest: LinuxGuest, *, files: bool = True) -> AsyncIterator[VcpuController]:
    """Attach, with an agent that may read the guest's files or not."""
    await guest.start_agent(blocks=[] if files else NO_FILES)
    async with qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm:
        yield vm


async def numbers(vm: VcpuController) -> dict[int | None, int]:
    """The guest's numbers by vCPU id, of those that are known."""
    return {cpu.vcpu: cpu.number for cpu in await vm.guest.vcpus() if cpu.vcpu is not None}


async def known_by(vm: VcpuController) -> set[KnownBy]:
    """How it is known of any vCPU but 0."""
    return {cpu.known_by for cpu in await vm.guest.vcpus() if cpu.number != 0}


async def reboot(vm: VcpuController, guest: LinuxGuest) -> None:
    """Reset the VM; return when Linux is up again."""
    events = vm.events()
    await call(guest, "system_reset")
    async for event in events:
        if isinstance(event, VmReset):
            break
    await guest.wait_ready()


async def prove(vm: VcpuController, guest: LinuxGuest, expected: Numbers) -> None:
    """Take each vCPU but 0 offline and bring it online, by vCPU id; Linux itself says which of its CPUs that was."""
    for vcpu, number in expected.items():
        if vcpu == 0:
            continue
        everything = await guest.online()
        await vm.guest.set_offline(vcpu)
        assert await guest.online() == everything - {number}
        await vm.guest.set_online(vcpu)
        assert await guest.online() == everything


@pytest.mark.parametrize("files", [True, False], ids=["files", "no files"])
async def test_numbers_with_holes_and_after_a_reboot(
    qemu: Path, accel: Accelerator, kernel: str, fixed_at_boot: bool, files: bool
) -> None:
    blocks = [] if files else NO_FILES
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, boot=1, agent_blocks=blocks) as guest,
        qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm,
    ):
        assert await numbers(vm) == {0: 0}
        expected = {0: 0, 5: 5, 2: 2, 7: 7} if fixed_at_boot else {0: 0, 5: 1, 2: 2, 7: 3}
        for vcpu in (5, 2, 7):
            await plug_in_order(vm, guest, vcpu)
            assert await numbers(vm) == {each: expected[each] for each in vm.layout.enabled}
        assert await known_by(vm) == {KnownBy.FIRMWARE if files else KnownBy.LEARNT}
        await prove(vm, guest, expected)

        # One that leaves and comes again has its number again, whatever came meanwhile.
        await vm.unplug(5)
        expected |= {3: 3 if fixed_at_boot else 4}
        assert await numbers(vm) == {each: expected[each] for each in vm.layout.enabled}
        for vcpu in (3, 5):
            await plug_in_order(vm, guest, vcpu)
            assert await numbers(vm) == {each: expected[each] for each in vm.layout.enabled}
        await prove(vm, guest, expected)

        # Booted with them, Linux counts them from the first to the last, and 6.12 then the others.
        await reboot(vm, guest)
        expected = {0: 0, 2: 1, 3: 2, 5: 3, 7: 4}
        assert await numbers(vm) == expected
        assert await known_by(vm) == {KnownBy.FIRMWARE if files else KnownBy.RULE}
        await prove(vm, guest, expected)
        await plug_in_order(vm, guest, 4, 1)
        expected |= {1: 5, 4: 6} if fixed_at_boot else {4: 5, 1: 6}
        assert await numbers(vm) == expected
        await prove(vm, guest, expected)


async def test_numbers_of_a_linux_that_booted_with_holes(
    qemu: Path, accel: Accelerator, kernel: str, fixed_at_boot: bool
) -> None:
    expected = {0: 0, 5: 1, 1: 2, 2: 3, 7: 7} if fixed_at_boot else {0: 0, 5: 1, 7: 2, 2: 3, 1: 4}
    async with LinuxGuest(qemu, accel=accel, kernel=kernel, boot={0, 5}) as guest:
        async with attached(guest) as vm:
            await plug_in_order(vm, guest, 7, 2, 1)
            assert await numbers(vm) == expected
            await prove(vm, guest, expected)
        # Without files nothing tells what it booted with, nor what came first.
        async with attached(guest, files=False) as vm:
            assert await numbers(vm) == {0: 0}
            with pytest.raises(GuestNumberUnknownError, match="let the agent read files"):
                await vm.guest.set_offline(7)
            assert len(await guest.online()) == 5


async def test_numbers_after_a_migration(qemu: Path, accel: Accelerator, kernel: str, fixed_at_boot: bool) -> None:
    expected = {0: 0, 5: 5, 3: 3} if fixed_at_boot else {0: 0, 5: 1, 3: 2}
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, boot=1) as source,
        LinuxGuest(qemu, accel=accel, kernel=kernel, boot=1, incoming=True) as target,
    ):
        async with qmpvcpu.attach(source.qmp) as vm, qmpvcpu.attach(target.qmp, agent=target.agent) as there:
            await plug_in_order(vm, source, 5, 3)
            async with await vm.export() as export:
                await rebuild(export.state, there)
                assert await move(source, target) == "completed"
                await call(source, "quit")
            assert len(await target.online()) == 3
            assert await numbers(there) == expected
            await prove(there, target, expected)
        # The numbers came along. What tells them did not, if it may not be read.
        async with attached(target, files=False) as there:
            assert await numbers(there) == {0: 0}
            with pytest.raises(GuestNumberUnknownError):
                await there.guest.set_offline(5)
            await plug_in_order(there, target, 6)
            learnt = {0: 0, 6: 6 if fixed_at_boot else 3}
            assert await numbers(there) == learnt
            await prove(there, target, learnt)
