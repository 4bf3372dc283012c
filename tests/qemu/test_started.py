"""Which vCPUs have started: QEMU and the kernel tell it, whether the micro-guest starts them or not."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qmpvcpu.model.layout import Slot
from qmpvcpu.model.vm import ONE_THREAD, VmInfo
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.qmp.queries import Reader
from qmpvcpu.testing import Behaviour, MicroGuest, best_qemu
from tests.waiting import until

if TYPE_CHECKING:
    from tests.qemu.conftest import StartVm, Vm
    from tests.substrates import Substrate

pytestmark = pytest.mark.qemu

STARTING = Behaviour.complying().starting()
IN_A_PROCESS_OF_ITS_OWN = """
import asyncio, sys
from qmpvcpu.qmp.queries import look
print(asyncio.run(look(sys.argv[1])).vm.start_unknowable)
"""


class Looks:
    """Looks at one VM."""

    def __init__(self, reader: Reader, vm: VmInfo) -> None:
        self.reader = reader
        self.vm = vm

    async def slots(self) -> tuple[Slot, ...]:
        slots, _ = await self.reader.slots()
        return slots

    async def started(self, looks: int = 5) -> set[int]:
        """What has started, after several looks."""
        slots = await self.slots()
        seen = frozenset[int]()
        for _ in range(looks):
            seen = await self.reader.started(slots)
            await asyncio.sleep(0.01)
        return set(seen)

    async def until_started(self, ids: Iterable[int]) -> set[int]:
        """What has started, once *ids* have."""
        slots = await self.slots()
        seen = set[int]()

        async def are_met() -> bool:
            seen.update(await self.reader.started(slots))
            return seen.issuperset(ids)

        await until(are_met, within=20)
        return seen


@asynccontextmanager
async def looking(guest: MicroGuest) -> AsyncIterator[Looks]:
    monitor = await Monitor.open(guest.sockets[1], timeout=10, on_event=lambda _: None, on_lost=lambda _: None)
    try:
        reader = Reader(monitor, 10)
        yield Looks(reader, (await reader.everything())[3])
    finally:
        await monitor.close()


async def unplugged(vm: "Vm", number: int) -> None:
    """Unplug, and see the guest give it up."""
    await vm.unplug(number)
    while await vm.ost() != (number, 3, 0):
        pass


async def test_a_vcpu_that_the_guest_starts_is_told_from_those_that_it_does_not(start: "StartVm") -> None:
    vm = await start(behaviour=[Behaviour.complying().for_slot(2), STARTING])
    async with looking(vm.guest) as looks:
        assert looks.vm.start_unknowable == ""
        await vm.plugged(2)
        assert 2 not in await looks.started()
        await vm.plug(5)
        assert 2 not in await looks.until_started([5])
        await vm.plug(6)
        assert 2 not in await looks.until_started([6])


async def test_every_other_behaviour_starts_none(start: "StartVm") -> None:
    vm = await start(
        behaviour=[
            Behaviour.refusing(0x82).for_slot(1),
            Behaviour.silent_about_inserts().for_slot(2),
            Behaviour.refusing_inserts().for_slot(3),
            Behaviour.wordless().for_slot(4),
        ]
    )
    async with looking(vm.guest) as looks:
        for number in (1, 2, 3, 4):
            await vm.plug(number)
        assert (await looks.started()).isdisjoint({1, 2, 3, 4})


async def test_a_vcpu_that_never_started_is_not_said_to_whatever_wakes_its_thread(start: "StartVm") -> None:
    vm = await start(behaviour=Behaviour.complying())
    async with looking(vm.guest) as looks:
        for number in range(1, 7):
            await vm.plugged(number)
        for _ in range(300):
            await vm.execute("stop")
            await vm.execute("cont")
            await vm.execute("query-cpus-fast")
        assert (await looks.started()).isdisjoint(range(1, 7))
        for _ in range(5):
            await vm.execute("system_reset")
            await vm.guest.wait_ready()
            await vm.execute("human-monitor-command", command_line="info registers -a")
        await unplugged(vm, 6)
        assert (await looks.started()).isdisjoint(range(1, 7))


async def test_the_guest_is_told_to_start_vcpus_whatever_it_answers_to_removals(start: "StartVm") -> None:
    vm = await start()
    async with looking(vm.guest) as looks:
        await vm.plugged(1)
        await vm.guest.set_behaviour(Behaviour.refusing(0x82).starting())
        await vm.plugged(2)
        assert 1 not in await looks.until_started([2])
        await vm.unplug(2)
        assert [await vm.ost(), await vm.ost()] == [(2, 3, 0x84), (2, 3, 0x82)]
        await vm.guest.set_behaviour()
        await unplugged(vm, 2)
        assert await vm.present() == {0, 1}


async def test_a_vcpu_of_a_stopped_vm_starts_when_it_goes_on(start: "StartVm") -> None:
    vm = await start(behaviour=STARTING)
    async with looking(vm.guest) as looks:
        await vm.execute("stop")
        await vm.plug(3)
        assert 3 not in await looks.started()
        await vm.execute("cont")
        await looks.until_started([3])


async def test_a_new_vcpu_in_a_slot_has_not_started_until_it_runs(start: "StartVm", on: "Substrate") -> None:
    if not on.survives_plug_after_unplug:
        return
    vm = await start()
    async with looking(vm.guest) as looks:
        # Not one that ran, under KVM: where this was written its kernel refuses to take the CPUID of such a vCPU once
        # more, and QEMU ends. tests/peer has that case.
        if on.accel == "tcg":
            await vm.guest.set_behaviour(STARTING)
        await vm.plug(5)
        if on.accel == "tcg":
            await looks.until_started([5])
            await vm.guest.set_behaviour()
        assert await vm.ost() == (5, 1, 0)
        await unplugged(vm, 5)
        await vm.plugged(5)
        assert 5 not in await looks.started()
        await vm.guest.set_behaviour(STARTING)
        if on.accel == "kvm":
            await unplugged(vm, 5)
            await vm.plug(5)
            await looks.until_started([5])


async def test_an_apic_id_that_is_not_the_slot_s_number_is_found(start: "StartVm") -> None:
    vm = await start(behaviour=STARTING, topology="sockets=1,cores=6,threads=1", max_vcpus=6)
    async with looking(vm.guest) as looks:
        await vm.plug(3)
        await looks.until_started([3])
    vm = await start(behaviour=STARTING, topology="sockets=2,cores=3,threads=1", max_vcpus=6)
    async with looking(vm.guest) as looks:
        await vm.plug(4)  # APIC id 5
        assert await looks.until_started([4]) <= {0, 4}


async def test_the_threads_of_a_qemu_in_a_pid_namespace_of_its_own_are_found(tmp_path: Path) -> None:
    wrapper = tmp_path / "qemu"
    root = "" if os.geteuid() == 0 else "--map-root-user"
    wrapper.write_text(f'#!/bin/sh\nexec unshare {root} --pid --fork --kill-child {best_qemu()} "$@"\n')
    wrapper.chmod(0o755)
    async with MicroGuest(wrapper, accel="tcg", boot=2, behaviour=STARTING) as guest, looking(guest) as looks:
        assert looks.vm.start_unknowable == ""
        slots = await looks.slots()
        assert max(int(tid or 0) for tid in slots[0].host_tids) < 100  # its own numbers
        arguments: dict[str, Any] = {"driver": slots[3].type, "id": "vcpu3", **slots[3].props}
        await looks.reader._monitor.execute("device_add", arguments)
        assert 1 not in await looks.until_started([3])


async def test_a_qemu_that_proc_hides_cannot_be_told_to_have_started_vcpus(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        return  # only root can become another user, from whom the kernel hides it
    async with MicroGuest(accel="tcg") as guest:
        for path in (guest.sockets[1], *guest.sockets[1].parents):
            if path != Path("/"):
                path.chmod(path.stat().st_mode | 0o007)
        hidden = "mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid 65534 --regid 65534 --clear-groups"
        command = ["unshare", "--mount", "sh", "-ec", f'{hidden} "$@"', "sh", sys.executable, "-c"]
        process = await asyncio.create_subprocess_exec(
            *command, IN_A_PROCESS_OF_ITS_OWN, str(guest.sockets[1]), stdout=-1, stderr=-1, cwd=tmp_path
        )
        said, error = await process.communicate()
    assert b"hidepid" in said, error


async def test_single_threaded_tcg_cannot_be_told_to_have_started_a_vcpu() -> None:
    guest = MicroGuest(accel="tcg,thread=single", boot=2)  # type: ignore[arg-type]  # an option rides along
    async with guest, looking(guest) as looks:
        assert looks.vm.start_unknowable == ONE_THREAD
