"""An unplug that can be taken back, on a real Linux with a real agent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import qmpvcpu
from qmpvcpu import (
    AgentSilentError,
    OnFailure,
    Proof,
    Recovery,
    Refused,
    TransitionError,
    TransitionOutcome,
    Unplugged,
    UnplugRefusedError,
    VcpuController,
    VcpuMap,
)
from qmpvcpu.agent.door import GuestAgent
from qmpvcpu.errors import AgentLostError
from qmpvcpu.events import UnplugRefused
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.vms import TRACE_FILE, read_transcript

pytestmark = [pytest.mark.guest, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(loop_scope="module")
async def vm(roomy_guest: LinuxGuest) -> AsyncIterator[VcpuController]:
    """A Linux with vCPUs 0, 1 and 5, all online; afterwards with 0 and 1, and a running agent."""
    async with qmpvcpu.attach(roomy_guest.qmp, agent=roomy_guest.agent, reply_timeout=3) as vm:
        await vm.plug(5, proof=Proof.ONLINE)
        yield vm
        await roomy_guest.comply()
        await roomy_guest.start_agent()
        await vm.set_map("0-1", timeout=10)


def removals_sent(guest: LinuxGuest) -> int:
    """How many ``device_del`` QEMU has read so far, by its own transcript."""
    said = read_transcript((guest.process.directory / TRACE_FILE).read_text(errors="replace"))
    return sum(message.content.get("execute") == "device_del" for message in said)


async def online(vm: VcpuController) -> VcpuMap:
    """The vCPUs that the guest uses."""
    return VcpuMap(cpu.vcpu for cpu in await vm.guest.vcpus() if cpu.online and cpu.vcpu is not None)


async def comes_to(vm: VcpuController, wanted: str) -> None:
    """Return when the guest uses these vCPUs."""
    async with asyncio.timeout(10):
        while await online(vm) != VcpuMap.parse(wanted):
            pass  # the agent takes its time


@contextlib.contextmanager
def between(vm: VcpuController, act: Callable[[], Awaitable[object]]) -> Iterator[None]:
    """Inside, *act* is awaited each time a vCPU is offline in the guest, and before QEMU is asked to remove it."""
    set_offline = vm.guest.set_offline

    async def set_offline_and_act(ids: Any, **more: Any) -> VcpuMap:
        done = await set_offline(ids, **more)
        await act()
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vm.guest, "set_offline", set_offline_and_act)
        yield


async def test_an_unplug_is_refused_while_deadline_tasks_hold_the_cpu_and_leaves_nothing_behind(
    vm: VcpuController, roomy_guest: LinuxGuest
) -> None:
    sent, events = removals_sent(roomy_guest), vm.events()

    # Three SCHED_DEADLINE tasks, one for each CPU, so that Linux cannot spare any.
    await roomy_guest.refuse()
    with pytest.raises(UnplugRefusedError, match=r"Device or resource busy \(EBUSY\)") as caught:
        await vm.unplug(5, offline_first=True)
    assert caught.value.by_agent
    assert caught.value.code is None
    assert removals_sent(roomy_guest) == sent
    assert vm.layout.enabled == {0, 1, 5}
    assert not vm.layout.pending
    assert await online(vm) == {0, 1, 5}
    assert any([isinstance(event, UnplugRefused) async for event in _so_far(events)])

    # A removal that was pending would fire after a reset, with the next hotplug.
    await vm.run_control.reset()
    await roomy_guest.wait_ready()
    await vm.plug(6, proof=Proof.ONLINE)
    assert (await vm.refresh()).enabled == {0, 1, 5, 6}
    assert not vm.layout.pending
    await vm.unplug(6, offline_first=True)

    # The reset has ended the tasks: three anew, and then they end.
    await roomy_guest.refuse()
    with pytest.raises(UnplugRefusedError, match="EBUSY"):
        await vm.unplug(5, offline_first=True)
    await roomy_guest.comply()
    assert await vm.unplug(5, offline_first=True) == {5}
    assert removals_sent(roomy_guest) == sent + 2
    assert (await vm.refresh()).enabled == {0, 1}
    assert await roomy_guest.online() == VcpuMap([0, 1])


async def _so_far(events: Any) -> AsyncIterator[object]:
    with contextlib.suppress(TimeoutError):
        while True:
            yield await asyncio.wait_for(anext(events), 0.2)


@pytest.mark.parametrize("call", ["unplug", "request_unplug", "set_map", "set_state"])
async def test_cancelled_between_the_two_phases_the_cpu_is_online_again(
    vm: VcpuController, roomy_guest: LinuxGuest, call: str
) -> None:
    sent = removals_sent(roomy_guest)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "unplug": lambda: vm.unplug(5, offline_first=True),
        "request_unplug": lambda: vm.request_unplug(5, offline_first=True),
        "set_map": lambda: vm.set_map("0-1", offline_first=True),
        "set_state": lambda: vm.set_state(5, enabled=False, offline_first=True),
    }
    task = asyncio.ensure_future(calls[call]())
    seen = []

    async def cancel() -> None:
        seen.append(len(await roomy_guest.online()))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with between(vm, cancel):
        await asyncio.wait({task})
        await comes_to(vm, "0-1,5")
    assert seen == [2]
    assert removals_sent(roomy_guest) == sent
    assert vm.layout.enabled == {0, 1, 5}
    assert not vm.layout.pending
    assert await vm.unplug(5, offline_first=True) == {5}


async def test_a_map_whose_one_vcpu_is_kept_has_the_others_online_again(
    vm: VcpuController, roomy_guest: LinuxGuest
) -> None:
    await vm.plug(3, proof=Proof.ONLINE)
    # Unplugs are asked for from the highest down, so 5 is gone, or on its way, when the guest refuses 3.
    await roomy_guest.refuse(next(cpu.number for cpu in await vm.guest.vcpus() if cpu.vcpu == 3))
    with pytest.raises(TransitionError, match="the guest keeps it online, and QEMU was sent nothing") as caught:
        await vm.set_map("0-1", offline_first=True, on_failure=OnFailure.REVERT)
    report = caught.value.report
    assert report.outcome is TransitionOutcome.REVERTED
    gone, kept = report.steps
    assert isinstance(gone.verdict, Unplugged)
    assert gone.undone
    assert isinstance(kept.verdict, Refused)
    assert kept.verdict.by_agent
    assert vm.layout.enabled == {0, 1, 3, 5}
    assert await online(vm) == {0, 1, 3, 5}
    await roomy_guest.comply()
    report = await vm.set_map("0-1", offline_first=True, on_failure=OnFailure.REVERT)
    assert report.outcome is TransitionOutcome.REACHED
    assert await online(vm) == {0, 1}


async def test_a_silent_agent_is_told_within_its_deadline_and_nothing_is_sent(
    vm: VcpuController, roomy_guest: LinuxGuest
) -> None:
    sent = removals_sent(roomy_guest)
    await roomy_guest.pause_agent()
    async with asyncio.timeout(10):
        with pytest.raises(AgentSilentError):
            await vm.unplug(5, offline_first=True)
    await roomy_guest.resume_agent()
    await comes_to(vm, "0-1,5")
    assert removals_sent(roomy_guest) == sent


@pytest.mark.parametrize("how", ["dies", "hangs"])
async def test_of_an_agent_that_fails_in_the_middle_the_error_says_that_the_cpu_may_be_offline(
    vm: VcpuController, roomy_guest: LinuxGuest, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = removals_sent(roomy_guest)
    set_cpus = GuestAgent.set_cpus

    async def fail_and_set(self: GuestAgent, wanted: Any, **more: Any) -> int:
        await (roomy_guest.stop_agent() if how == "dies" else roomy_guest.pause_agent())
        return await set_cpus(self, wanted, **more)

    monkeypatch.setattr(GuestAgent, "set_cpus", fail_and_set)
    async with asyncio.timeout(20):
        with pytest.raises((AgentSilentError, AgentLostError)) as caught:
            await vm.unplug(5, offline_first=True, timeout=2)
    assert "; it may be offline in the guest: guest agent on " in str(caught.value)
    monkeypatch.undo()
    await (roomy_guest.start_agent() if how == "dies" else roomy_guest.resume_agent())
    await vm.guest.set_online(5)  # one that was only stopped has done it since, as the error warns
    assert await online(vm) == {0, 1, 5}
    assert removals_sent(roomy_guest) == sent
    assert vm.layout.enabled == {0, 1, 5}


async def test_a_request_outlives_its_call(vm: VcpuController) -> None:
    request = await vm.request_unplug(5, offline_first=True)
    assert isinstance(await request.wait(30), Unplugged)
    assert await online(vm) == {0, 1}


async def test_what_is_offline_already_is_unplugged_without_the_agent(vm: VcpuController) -> None:
    await vm.guest.set_offline(5)
    assert await vm.unplug(5, offline_first=True) == {5}


@pytest.mark.parametrize("whole", [False, True], ids=["at the same time", "all of it in between"])
async def test_two_callers_share_one_removal(vm: VcpuController, roomy_guest: LinuxGuest, whole: bool) -> None:
    sent = removals_sent(roomy_guest)
    plain: list[asyncio.Task[VcpuMap]] = []

    async def another() -> None:
        plain.append(asyncio.create_task(vm.unplug(5)))
        if whole:
            await plain[0]

    with between(vm, another):
        assert await vm.unplug(5, offline_first=True) == {5}
    assert await plain[0] == {5}
    assert removals_sent(roomy_guest) == sent + 1


async def test_a_crash_between_the_two_is_known_to_who_comes_after(roomy_guest: LinuxGuest, tmp_path: Path) -> None:
    """The connection of the one who unplugs is cut between the two phases, and so is that to the agent."""
    record = tmp_path / "vm.xml"
    async with qmpvcpu.attach(roomy_guest.qmp, record=record, agent=roomy_guest.agent, name="t") as first:
        await first.plug(5, proof=Proof.ONLINE)

        async def cut() -> None:
            await first._driver.guest.close()  # nothing may be made good
            await first._driver.connection.monitor.close()  # as when it dies

        with between(first, cut), pytest.raises(qmpvcpu.QmpVcpuError):
            await first.unplug(5, offline_first=True)
    async with qmpvcpu.attach(roomy_guest.qmp, record=record, agent=roomy_guest.agent, name="t") as second:
        assert await online(second) == {0, 1}
        assert second.interrupted is not None
        report = await second.recover(Recovery.REVERT)
        assert report is not None
        assert report.outcome is TransitionOutcome.REVERTED
        assert await online(second) == {0, 1, 5}
        assert second.interrupted is None
        await second.unplug(5, offline_first=True)
