"""vm.guest with the real agent in real Linux guests of both ways of numbering."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import (
    AgentSilentError,
    GuestRefusedError,
    KnownBy,
    VcpuController,
)
from qmpvcpu.agent.door import GuestAgent
from qmpvcpu.errors import AgentForbiddenError, AgentLostError, GuestNumberUnknownError
from qmpvcpu.events import VmReset
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator
from tests.controller.vms import other_client
from tests.controller.vms import until as heard
from tests.guest.plugging import plug_in_order
from tests.waiting import until

pytestmark = [
    pytest.mark.guest,
    pytest.mark.qemu,
    pytest.mark.asyncio(loop_scope="module"),
]

FILES = ("guest-file-open", "guest-file-read", "guest-file-close")


@contextlib.asynccontextmanager
async def attached(guest: LinuxGuest, keep: str = "0-1") -> AsyncIterator[VcpuController]:
    """Attach with the agent; at the end the guest has the vCPUs *keep* again, online, and its agent.

    Under TCG a QEMU does not survive more plugs than it can have vCPUs: the tests of one guest plug four.
    """
    async with qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm:
        yield vm
        await vm.set_map(keep)
    await guest.start_agent()


def numbers(vcpus: tuple[qmpvcpu.GuestVcpu, ...]) -> dict[int, int | None]:
    return {each.number: each.vcpu for each in vcpus}


async def listed(vm: VcpuController, count: int, *, unknown: int = 0) -> tuple[qmpvcpu.GuestVcpu, ...]:
    """The guest's list once it has *count* CPUs, and all but *unknown* are known.

    Linux lists a plugged one a moment later, and only then makes its files and acknowledges the plug.
    """
    seen: tuple[qmpvcpu.GuestVcpu, ...] = ()

    async def is_settled() -> bool:
        nonlocal seen
        seen = await vm.guest.vcpus()
        return (len(seen), sum(each.vcpu is None for each in seen)) == (count, unknown)

    with contextlib.suppress(TimeoutError):  # what it is then tells more
        await until(is_settled, within=30)
    return seen


async def test_the_guests_cpus_are_listed_with_their_vcpus(shared_guest: LinuxGuest, kernel: str) -> None:
    async with attached(shared_guest) as vm:
        vcpus = await vm.guest.vcpus()
        assert numbers(vcpus) == {0: 0, 1: 1}
        assert [(each.online, each.can_offline) for each in vcpus] == [(True, False), (True, True)]
        assert {each.known_by for each in vcpus} == {KnownBy.FIRMWARE}
        assert (await vm.guest.os()).kernel.startswith(kernel)


async def test_a_plugged_vcpu_is_brought_online_and_taken_offline(
    shared_guest: LinuxGuest, *, fixed_at_boot: bool
) -> None:
    await shared_guest.set_auto_online(False)
    async with attached(shared_guest) as vm:
        await vm.plug(5)
        vcpus = await listed(vm, 3)
        assert numbers(vcpus) == {0: 0, 1: 1, 5 if fixed_at_boot else 2: 5}
        assert [each.online for each in vcpus] == [True, True, False]
        assert await vm.guest.set_online(5) == {5}
        assert len(await shared_guest.online()) == 3
        assert await vm.guest.set_offline([5, 1]) == {1, 5}
        assert await shared_guest.online() == {0}
        assert await vm.guest.set_online("1") == {1}
    await shared_guest.set_auto_online(True)


async def test_holes_are_told_apart_whatever_came_first(shared_guest: LinuxGuest, *, fixed_at_boot: bool) -> None:
    async with attached(shared_guest) as vm:
        await plug_in_order(vm, shared_guest, 5, 7, 3)
        vcpus = await listed(vm, 5)
        expected = {0: 0, 1: 1, 3: 3, 5: 5, 7: 7} if fixed_at_boot else {0: 0, 1: 1, 2: 5, 3: 7, 4: 3}
        assert numbers(vcpus) == expected
        await vm.unplug(3)
        assert set(numbers(await listed(vm, 4)).values()) == {0, 1, 5, 7}
        await vm.guest.set_offline(7)
        assert {each.vcpu for each in await vm.guest.vcpus() if not each.online} == {7}


async def test_cpu_0_cannot_be_taken_offline(shared_guest: LinuxGuest) -> None:
    async with attached(shared_guest) as vm:
        with pytest.raises(GuestRefusedError, match="offline of vCPU 0 refused"):
            await vm.guest.set_offline(0)
        door = GuestAgent(shared_guest.agent)
        await vm.guest.close()
        with pytest.raises(GuestRefusedError, match="does not let this CPU go offline") as caught:
            await door.set_cpus({0: False})
        assert caught.value.number == 0
        with pytest.raises(GuestRefusedError) as caught:
            await door.set_cpus({99: True})
        assert (caught.value.errno, caught.value.number) == ("ENOENT", 99)
        assert await door.set_cpus({1: True, 99: True}) == 1
        await door.close()


async def test_what_is_not_plugged_cannot_be_brought_online(shared_guest: LinuxGuest) -> None:
    async with attached(shared_guest) as vm:
        with pytest.raises(GuestNumberUnknownError, match="not plugged"):
            await vm.guest.set_online(6)


async def test_a_guest_whose_deadline_tasks_need_the_cpu_refuses(shared_guest: LinuxGuest) -> None:
    await shared_guest.refuse()
    async with attached(shared_guest) as vm:
        with pytest.raises(GuestRefusedError, match=r"deadline tasks need this CPU.*\(EBUSY\)") as caught:
            await vm.guest.set_offline(1)
        assert caught.value.ids == {1}
        assert await shared_guest.online() == {0, 1}
        await shared_guest.comply()
        assert await vm.guest.set_offline(1) == {1}
        await vm.guest.set_online(1)


async def test_an_agent_that_is_stopped_is_told_from_one_that_is_not_there(shared_guest: LinuxGuest) -> None:
    async with attached(shared_guest) as vm:
        await vm.guest.vcpus()
        await shared_guest.pause_agent()
        with pytest.raises(AgentSilentError, match="it is stopped, or hangs") as caught:
            await vm.guest.vcpus(timeout=1)
        assert caught.value.port_open is True
        await shared_guest.resume_agent()
        assert len(await vm.guest.vcpus()) == 2
        await shared_guest.stop_agent()
        with pytest.raises(AgentSilentError, match="no process in the guest has the agent's port open") as caught:
            await vm.guest.vcpus(timeout=1)
        assert caught.value.port_open is False
        await shared_guest.start_agent()
        assert len(await vm.guest.vcpus()) == 2


async def test_each_new_session_tells_them_apart_by_any_way_to_the_socket(
    shared_guest: LinuxGuest, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(shared_guest.agent)

    async def ask() -> AgentSilentError:
        async with qmpvcpu.attach(shared_guest.qmp, agent=link) as vm:
            with pytest.raises(AgentSilentError) as caught:
                await vm.guest.vcpus(timeout=1)
        return caught.value

    await shared_guest.pause_agent()
    error = await ask()
    assert error.port_open is True
    assert "restart qemu-guest-agent" in error.hint
    await shared_guest.stop_agent()
    error = await ask()
    assert error.port_open is False
    assert "start it" in error.hint
    await shared_guest.start_agent()
    async with qmpvcpu.attach(shared_guest.qmp, agent=link) as vm:
        assert len(await vm.guest.vcpus()) == 2


async def test_an_agent_that_is_started_again_in_the_middle_is_told(shared_guest: LinuxGuest) -> None:
    async with attached(shared_guest) as vm:
        await vm.guest.vcpus()
        await shared_guest.pause_agent()
        asking = asyncio.create_task(vm.guest.vcpus(timeout=10))
        await asyncio.sleep(0.3)
        await shared_guest.start_agent()
        with pytest.raises(AgentLostError, match="it restarted before"):
            await asking
        assert len(await vm.guest.vcpus()) == 2


async def test_an_agent_that_reads_no_files_leaves_rule_and_learning(
    qemu: Path, accel: Accelerator, kernel: str, *, fixed_at_boot: bool
) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, agent_blocks=FILES) as guest,
        qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm,
    ):
        vcpus = await vm.guest.vcpus()
        assert numbers(vcpus) == {0: 0, 1: 1}
        assert {each.known_by for each in vcpus} == {KnownBy.RULE}
        await vm.plug(5)
        vcpus = await listed(vm, 3)
        assert numbers(vcpus) == {0: 0, 1: 1, 5 if fixed_at_boot else 2: 5}
        assert vcpus[2].known_by is KnownBy.LEARNT
        await vm.set_map("0-1,3,5,7")
        vcpus = await listed(vm, 5, unknown=2)
        assert [each.vcpu for each in vcpus if each.known_by is KnownBy.UNKNOWN] == [None, None]
        with pytest.raises(GuestNumberUnknownError, match="CPU number of vCPU 3 in the guest is unknown"):
            await vm.guest.set_offline(3)


async def test_an_agent_that_may_not_change_cpus_says_so(shared_guest: LinuxGuest) -> None:
    await shared_guest.start_agent(blocks=["guest-set-vcpus"])
    async with attached(shared_guest) as vm:
        with pytest.raises(AgentForbiddenError, match="guest-set-vcpus is forbidden by the agent's configuration"):
            await vm.guest.set_offline(1)
        assert len(await vm.guest.vcpus()) == 2


async def test_after_a_reset_the_numbers_are_those_of_the_new_boot(
    qemu: Path, accel: Accelerator, kernel: str, *, fixed_at_boot: bool
) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, boot=1) as guest,
        qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm,
    ):
        await vm.plug(5)
        assert numbers(await listed(vm, 2)) == {0: 0, 5 if fixed_at_boot else 1: 5}
        events = vm.events()
        async with other_client(guest) as other:
            await other.execute("system_reset")
        await heard(events, VmReset)
        await guest.wait_ready()
        assert numbers(await vm.guest.vcpus()) == {0: 0, 1: 5}
        await guest.start_agent(blocks=FILES)
        await plug_in_order(vm, guest, 2, 7)
        expected = {0: 0, 1: 5, 3: 2, 7: 7} if fixed_at_boot else {0: 0, 1: 5, 2: 2, 3: 7}
        assert numbers(await listed(vm, 4)) == expected
        await vm.guest.set_offline(7)
        assert {each.vcpu for each in await vm.guest.vcpus() if not each.online} == {7}


async def test_after_a_reset_the_rule_alone_tells(
    qemu: Path, accel: Accelerator, kernel: str, *, fixed_at_boot: bool
) -> None:
    async with (
        LinuxGuest(qemu, accel=accel, kernel=kernel, boot=1, agent_blocks=FILES) as guest,
        qmpvcpu.attach(guest.qmp, agent=guest.agent) as vm,
    ):
        await vm.plug(5)
        events = vm.events()
        async with other_client(guest) as other:
            await other.execute("system_reset")
        await heard(events, VmReset)
        await guest.wait_ready()
        await vm.set_map("0,2,5,7", proof=qmpvcpu.Proof.ACKNOWLEDGED)
        vcpus = await listed(vm, 4)
        assert {each.known_by for each in vcpus} == {KnownBy.RULE}
        by_arrival = {0: 0, 1: 5, 2: 2, 3: 7}
        assert numbers(vcpus) == ({0: 0, 1: 5, 3: 2, 7: 7} if fixed_at_boot else by_arrival)
        await guest.wait_online(lambda cpus: len(cpus) == 4)
        await vm.guest.set_offline(2)
        assert len(await guest.online()) == 3
