"""Calls that change no vCPU of QEMU's: those to the guest's agent, and those that move threads on the host."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

import qmpvcpu
from qmpvcpu import GuestRefusedError, UnplugRefusedError, VcpuController, VcpuMap
from qmpvcpu.model.placement import Place, Placement
from qmpvcpu.testing import MicroGuest, Mood, ScriptedAgent
from tests.traces.spans import Spans, check_times, failed, stages, told

pytestmark = pytest.mark.qemu


@pytest.fixture
async def agent() -> AsyncIterator[ScriptedAgent]:
    async with ScriptedAgent((0, 1)) as agent:
        yield agent


@pytest.fixture
async def vm(agent: ScriptedAgent, spans: Spans) -> AsyncIterator[VcpuController]:
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp, agent=agent.path, name="web") as vm:
        agent.look = lambda: vm.layout.enabled
        yield vm
    assert spans is not None


async def test_what_the_guest_is_asked_is_a_span_below_the_callers(vm: VcpuController, spans: Spans) -> None:
    with spans.caller() as caller:
        await vm.guest.vcpus()
        await vm.guest.os()
        await vm.guest.commands()
        await vm.guest.execute("guest-ping")
        await vm.guest.set_offline("1")
        await vm.guest.set_online([1])
    names = ["vcpus", "os", "commands", "execute", "set_offline", "set_online"]
    assert [span.name for span in spans.below(caller)] == [f"qmpvcpu.guest.{name}" for name in names]
    assert told(spans.one("guest.set_online"), "vm.name", "vcpus") == ["web", "1"]
    assert told(spans.one("guest.execute"), "command") == ["guest-ping"]


async def test_a_guest_that_refuses_fails_the_call(vm: VcpuController, agent: ScriptedAgent, spans: Spans) -> None:
    await agent.turn(Mood.REFUSING)
    with pytest.raises(GuestRefusedError) as caught:
        await vm.guest.set_offline(1)
    span = spans.one("guest.set_offline")
    assert failed(span)
    assert span.status.description == str(caught.value)
    assert stages(span) == ["exception"]
    assert told(span, "vm.outcome") == [caught.value.outcome.value]


async def test_a_call_that_is_cancelled_ends(vm: VcpuController, agent: ScriptedAgent, spans: Spans) -> None:
    await agent.turn(Mood.SILENT)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await vm.guest.vcpus()
    span = spans.one("guest.vcpus")
    assert told(span, "cancelled") == [True]
    assert not failed(span)


async def test_what_a_change_asks_the_guest_is_told_by_its_step(vm: VcpuController, spans: Spans) -> None:
    await vm.unplug(1, offline_first=True)
    step = spans.one("step.unplug")
    assert stages(step)[:2] == ["leaving guest", "sent"]
    assert stages(step)[-1] == "gone"
    assert {span.name for span in spans.all} == {"qmpvcpu.step.unplug", "qmpvcpu.unplug"}
    check_times(spans)


async def test_an_agent_that_refuses_is_told_by_the_step(
    vm: VcpuController, agent: ScriptedAgent, spans: Spans
) -> None:
    await agent.turn(Mood.REFUSING)
    with pytest.raises(UnplugRefusedError):
        await vm.unplug(1, offline_first=True)
    step = spans.one("step.unplug")
    assert stages(step) == ["leaving guest", "refused", "exception"]
    assert told(step, "verdict", "ost.code") == ["refused", None]


async def test_a_processor_that_raises_does_a_call_no_harm(
    vm: VcpuController, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of the program's")

    for when in ("on_start", "on_end"):
        with monkeypatch.context() as patch:
            patch.setattr(spans.processor, when, fail)
            assert await vm.guest.set_online(1) == VcpuMap()
    assert spans.all == []


async def test_where_threads_are_put_is_told_by_the_step_and_by_the_call(spans: Spans) -> None:
    cpu = min(os.sched_getaffinity(0))
    placement = Placement(vcpus={3: Place(cpus=VcpuMap([cpu]))})
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, placement=placement) as vm:
        await vm.plug(3)
        with spans.caller() as caller:
            await vm.host.place()
            await vm.host.place(Placement(vcpus={0: Place(cpus=VcpuMap([cpu])), 3: Place(cpus=VcpuMap([cpu]))}))
    step = spans.one("step.plug")
    assert [stage for stage in stages(step) if stage != "acknowledged"] == ["sent", "present", "placed"]
    calls = spans.below(caller)
    assert {span.name for span in calls} == {"qmpvcpu.host.place"}
    assert [(span.attributes or {}).get("qmpvcpu.vcpus") for span in calls] == [None, "0,3"]
    check_times(spans)
