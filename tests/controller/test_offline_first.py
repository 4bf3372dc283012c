"""An unplug that takes the vCPU offline in the guest first, on a real QEMU, with an agent that does as it is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    Affect,
    DenialReason,
    GuestAgentError,
    MonitorLostError,
    OnFailure,
    Outcome,
    Pending,
    Refused,
    StepDeniedError,
    TransitionError,
    TransitionOutcome,
    Unplugged,
    UnplugPendingError,
    UnplugRefusedError,
    VcpuController,
    VcpuMap,
)
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.agent import Mood, ScriptedAgent
from tests.controller.test_next_boot import config, next_boot
from tests.crash.proxy import Proxy
from tests.exchange import exchange

__all__ = ["config"]

pytestmark = pytest.mark.qemu

REFUSAL = Behaviour.refusing(0x82)


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    async with MicroGuest(boot=3, qmp_sockets=3) as guest:
        yield guest


@pytest.fixture
async def agent() -> AsyncIterator[ScriptedAgent]:
    """The agent of a guest that uses by itself what is plugged."""
    async with ScriptedAgent((0, 1, 2), onlines=True) as agent:
        yield agent


@contextlib.asynccontextmanager
async def attached(guest: MicroGuest, agent: ScriptedAgent, **more: Any) -> AsyncIterator[VcpuController]:
    """A controller whose layout the guest follows."""
    async with qmpvcpu.attach(**{"target": guest.qmp, "agent": agent.path, **more}) as vm:
        agent.look = lambda: vm.layout.enabled
        yield vm


@pytest.fixture
async def vm(guest: MicroGuest, agent: ScriptedAgent) -> AsyncIterator[VcpuController]:
    async with attached(guest, agent) as vm:
        yield vm


async def comes_online(vm: VcpuController, wanted: str) -> None:
    """Return when the guest uses these vCPUs."""
    async with asyncio.timeout(5):
        while VcpuMap(cpu.vcpu for cpu in await vm.guest.vcpus() if cpu.online and cpu.vcpu) != VcpuMap.parse(wanted):
            pass  # it takes its time


def before_qemu_is_asked(vm: VcpuController, act: Callable[[], Awaitable[object]]) -> None:
    """Have *act* awaited each time that a vCPU is offline in the guest, and before QEMU is asked."""
    set_offline = vm.guest.set_offline

    async def set_offline_and_act(ids: Any, **more: Any) -> VcpuMap:
        done = await set_offline(ids, **more)
        await act()
        return done

    vm.guest.set_offline = set_offline_and_act  # type: ignore[method-assign]


# What the agent says.


async def test_the_agent_goes_first_and_qemu_second(vm: VcpuController, agent: ScriptedAgent) -> None:
    with exchange() as sent:
        assert await vm.unplug(2, offline_first=True) == {2}
    assert "device_del" in sent
    assert agent.changes == [(2, False)]


async def test_what_the_agent_refuses_qemu_is_not_asked_for(vm: VcpuController, agent: ScriptedAgent) -> None:
    await agent.turn(Mood.REFUSING)
    with exchange() as sent, pytest.raises(UnplugRefusedError, match="EBUSY") as caught:
        await vm.unplug(2, offline_first=True)
    assert caught.value.by_agent
    assert "device_del" not in sent
    assert not vm.layout.pending


async def test_an_agent_that_says_that_it_is_done_and_lists_it_online_is_not_believed(
    vm: VcpuController, agent: ScriptedAgent
) -> None:
    agent.answers["guest-set-vcpus"] = 1
    with exchange() as sent, pytest.raises(UnplugRefusedError, match="its list does not show it"):
        await vm.unplug(2, offline_first=True)
    assert "device_del" not in sent


async def test_one_that_the_list_shows_offline_only_later_is_brought_online_again(
    vm: VcpuController, agent: ScriptedAgent
) -> None:
    await vm.guest.vcpus()
    real = agent._guest_get_vcpus
    late: list[bool] = []

    def list_late() -> Any:
        listed = real()
        if agent.changes and not late:
            late.append(True)
            return [{**cpu, "online": True} for cpu in listed]
        return listed

    agent._guest_get_vcpus = list_late  # type: ignore[method-assign]
    with exchange() as sent, pytest.raises(UnplugRefusedError, match="its list does not show it"):
        await vm.unplug(2, offline_first=True)
    assert "device_del" not in sent
    assert agent.changes == [(2, False), (2, True)]


async def test_a_vcpu_that_the_guest_cannot_do_without_is_refused(vm: VcpuController, agent: ScriptedAgent) -> None:
    agent.cpus[2].can_offline = False
    with exchange() as sent, pytest.raises(UnplugRefusedError, match="does not let this CPU go offline"):
        await vm.unplug(2, offline_first=True)
    assert "device_del" not in sent


@pytest.mark.parametrize("question", ["vcpus", "set_offline"])
async def test_a_fault_in_asking_the_agent_keeps_nobody_waiting(
    vm: VcpuController, agent: ScriptedAgent, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_given: Any, **_more: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(vm.guest, question, fail)
    async with asyncio.timeout(10):
        with exchange() as sent, pytest.raises(GuestAgentError, match="ZeroDivisionError"):
            await vm.unplug(2, offline_first=True)
    assert "device_del" not in sent
    assert agent.is_online(2)


@pytest.mark.parametrize("said", ["when it was planned", "when it is carried out"])
async def test_a_plan_is_carried_out_through_the_agent_whenever_that_was_said(
    vm: VcpuController, agent: ScriptedAgent, said: str
) -> None:
    planned = said == "when it was planned"
    plan = vm.plan("0-1", offline_first=planned)
    await agent.turn(Mood.REFUSING)
    with exchange() as sent, pytest.raises(TransitionError, match="the guest keeps it online"):
        await (vm.set_map(plan) if planned else vm.set_map(plan, offline_first=True))
    assert "device_del" not in sent


async def test_without_an_agent_it_is_denied(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        for call in (vm.unplug(2, offline_first=True), vm.set_map("0", offline_first=True)):
            with exchange() as sent, pytest.raises(StepDeniedError) as caught:
                await call
            assert caught.value.reason is DenialReason.NO_AGENT
            assert "device_del" not in sent


# What the guest says after that.


@pytest.mark.parametrize("call", ["unplug", "request"])
async def test_a_guest_that_refuses_after_all_has_it_online_again(
    vm: VcpuController, guest: MicroGuest, agent: ScriptedAgent, call: str
) -> None:
    await guest.set_behaviour(REFUSAL)
    if call == "unplug":
        with pytest.raises(UnplugRefusedError) as caught:
            await vm.unplug(2, offline_first=True)
        assert not caught.value.by_agent
        assert agent.is_online(2)
    else:
        request = await vm.request_unplug(2, offline_first=True)
        assert isinstance(await request.wait(10), Refused)
        await comes_online(vm, "1-2")
    assert agent.changes == [(2, False), (2, True)]


async def test_pending_it_stays_offline_until_the_guest_answers(
    vm: VcpuController, guest: MicroGuest, agent: ScriptedAgent
) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    with pytest.raises(UnplugPendingError) as caught:
        await vm.unplug(2, offline_first=True, timeout=0.3)
    assert str(caught.value).endswith("; it is offline in the guest")
    assert not agent.is_online(2)
    await guest.set_behaviour(REFUSAL)
    await vm.wait_settled(timeout=10)
    await comes_online(vm, "1-2")


async def test_a_removal_that_is_pending_is_joined(
    vm: VcpuController, guest: MicroGuest, agent: ScriptedAgent
) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    request = await vm.request_unplug(2)
    assert isinstance(await request.wait(0), Pending)
    joining = asyncio.create_task(vm.unplug(2, offline_first=True))
    await asyncio.sleep(0)
    await guest.set_behaviour(Behaviour.complying())
    assert await joining == {2}
    assert isinstance(await request.wait(10), Unplugged)
    assert agent.changes == []


async def test_reverted_it_is_online_again(vm: VcpuController, guest: MicroGuest, agent: ScriptedAgent) -> None:
    agent.look = None
    await guest.set_behaviour(REFUSAL.for_slot(1))

    def follow() -> VcpuMap:
        return vm.layout.enabled

    agent._onlines = False  # what comes is offline, as in most guests
    agent.look = follow
    with pytest.raises(TransitionError) as caught:
        await vm.set_map("0", offline_first=True, on_failure=OnFailure.REVERT)
    report = caught.value.report
    assert report.outcome is TransitionOutcome.REVERTED, str(report)
    assert vm.layout.enabled == {0, 1, 2}
    assert agent.is_online(1)
    assert agent.is_online(2)


async def test_reverted_without_its_agent_it_is_said_to_be_left_offline(
    vm: VcpuController, guest: MicroGuest, agent: ScriptedAgent
) -> None:
    agent._onlines = False
    await guest.set_behaviour(REFUSAL.for_slot(1))

    async def fall_silent() -> None:
        if not agent.is_online(1):
            await agent.turn(Mood.SILENT)

    before_qemu_is_asked(vm, fall_silent)
    with pytest.raises(TransitionError) as caught:
        await vm.set_map("0", offline_first=True, on_failure=OnFailure.REVERT, timeout=1, revert_timeout=1)
    report = caught.value.report
    assert report.outcome is TransitionOutcome.REVERT_INCOMPLETE, str(report)
    assert "offline in the guest" in str(report)


async def test_the_total_timeout_bounds_a_silent_agent(guest: MicroGuest, agent: ScriptedAgent) -> None:
    async with attached(guest, agent, reply_timeout=1) as vm:
        vcpus = vm.guest.vcpus

        async def list_and_fall_silent(**more: Any) -> Any:
            told = await vcpus(**more)
            await agent.turn(Mood.SILENT)
            return told

        vm.guest.vcpus = list_and_fall_silent  # type: ignore[method-assign]
        async with asyncio.timeout(20):
            with pytest.raises(TransitionError) as caught:
                await vm.set_map("0", offline_first=True, total_timeout=0.3, timeout=60)
        assert caught.value.report.outcome is TransitionOutcome.PARTIAL
        assert vm.layout.enabled == {0, 1, 2}


# Who goes away between the two.


async def test_a_side_that_closes_has_it_online_again(guest: MicroGuest, agent: ScriptedAgent) -> None:
    async with attached(guest, agent) as vm:
        offline = asyncio.Event()
        goes_on = asyncio.Event()

        async def wait() -> None:
            offline.set()
            await goes_on.wait()

        before_qemu_is_asked(vm, wait)
        unplugging = asyncio.create_task(vm.unplug(2, offline_first=True))
        await offline.wait()
        closing = asyncio.create_task(vm.close())
        await asyncio.sleep(0)
        goes_on.set()
        await closing
        with pytest.raises(MonitorLostError) as caught:
            await unplugging
        assert caught.value.outcome is Outcome.UNCHANGED
    assert agent.changes == [(2, False), (2, True)]
    async with attached(guest, agent) as vm:
        assert vm.layout.enabled == {0, 1, 2}
        assert not vm.layout.pending


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("returns", [False, True])
async def test_a_connection_that_is_lost_leaves_none_offline(
    guest: MicroGuest, agent: ScriptedAgent, tmp_path: Path, returns: bool, whole: bool
) -> None:
    async with (
        Proxy(tmp_path / "proxy", guest.sockets[2]) as proxy,
        attached(guest, agent, target=proxy.path, reconnect=returns) as vm,
    ):
        was_lost = False

        async def cut() -> None:
            nonlocal was_lost
            if not was_lost:
                proxy.cut()
                was_lost = True
                await asyncio.sleep(0.05)  # the loss is heard

        before_qemu_is_asked(vm, cut)
        work = vm.set_map("0-1", offline_first=True) if whole else vm.unplug(2, offline_first=True)
        if returns:
            await work
            assert vm.layout.enabled == {0, 1}
            assert agent.changes == [(2, False)]
            return
        with pytest.raises((MonitorLostError, TransitionError)) as caught:
            await work
        assert "it may be offline in the guest" in str(caught.value)
        await comes_online(vm, "1-2")
    async with attached(guest, agent) as vm:
        assert vm.layout.enabled == {0, 1, 2}
        assert not vm.layout.pending


# The next boot.


async def test_the_next_boot_follows_only_what_the_guest_lets_go(
    guest: MicroGuest, agent: ScriptedAgent, config: Path
) -> None:
    async with attached(guest, agent, config=config) as vm:
        before = await next_boot(config)
        await agent.turn(Mood.REFUSING)
        with pytest.raises(UnplugRefusedError):
            await vm.unplug(1, offline_first=True, affect=Affect.BOTH)
        assert await next_boot(config) == before
        await agent.turn(Mood.NORMAL)
        assert await vm.unplug(1, offline_first=True, affect=Affect.BOTH) == {1}
        assert await next_boot(config) != before


async def test_the_next_boot_alone_needs_no_agent(guest: MicroGuest, config: Path) -> None:
    async with qmpvcpu.attach(guest.qmp, config=config) as vm:
        before = await next_boot(config)
        await vm.unplug(1, offline_first=True, affect=Affect.CONFIG)
        assert await next_boot(config) != before
        assert vm.layout.enabled == {0, 1, 2}
