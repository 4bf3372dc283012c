"""The events of all VMs in one stream."""

import asyncio
import gc
import weakref
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from qmpvcpu.events import Disconnected, LayoutChanged, VcpuPlugged, VcpuUnplugged
from qmpvcpu.fleet import Fleet, FleetEvents
from qmpvcpu.testing import MicroGuest
from qmpvcpu.vm.subscribers import EventStream
from tests.fleet.vms import guests


@pytest.fixture
async def vms() -> AsyncIterator[list[MicroGuest]]:
    async with guests(3) as started:
        yield started


@pytest.mark.qemu
async def test_every_vms_events_come_named_whenever_it_was_attached(vms: list[MicroGuest]) -> None:
    async with Fleet([each.qmp for each in vms]) as fleet:
        before = fleet.events()
        await fleet.set_map("0-1")
        after = fleet.events()
        await fleet.set_map("0")
    seen = [(each.address, type(each.event)) async for each in before]
    later = [(each.address, type(each.event)) async for each in after]
    for address in fleet.addresses:
        kinds = [kind for who, kind in seen if who == address]
        assert kinds.index(VcpuPlugged) < kinds.index(VcpuUnplugged) < kinds.index(Disconnected)
        assert VcpuUnplugged in [kind for who, kind in later if who == address]
        assert VcpuPlugged not in [kind for who, kind in later if who == address]


@pytest.mark.qemu
async def test_a_vm_that_is_found_again_is_in_the_stream_again(vms: list[MicroGuest]) -> None:
    async with Fleet([vms[0].qmp]) as fleet:
        await fleet.attach()
        events = fleet.events()
        await fleet.vms[fleet.addresses[0]].close()
        assert isinstance((await anext(events)).event, Disconnected)
        await fleet.set_map("0,3")
        seen = [await anext(events)]
        while not isinstance(seen[-1].event, VcpuPlugged):
            seen.append(await anext(events))
        assert seen[-1].event.ids == {3}
        assert seen[-1].name == "qmp0"


def stream(events: FleetEvents, address: str, capacity: int = 100) -> EventStream:
    made = EventStream(asyncio.get_running_loop(), capacity)
    events.add(address, address, made)
    return made


async def test_vms_with_a_backlog_take_turns() -> None:
    events = FleetEvents()
    flood, trickle = stream(events, "flood"), stream(events, "trickle")
    for number in range(50):
        flood.push(LayoutChanged(generation=number))
    trickle.push(LayoutChanged(generation=0))
    first = [(await anext(events)).address for _ in range(3)]
    assert "trickle" in first
    events.close()
    rest = [each async for each in events]
    assert [each.event.generation for each in rest] == sorted(each.event.generation for each in rest)
    assert len(first) + len(rest) == 51


async def test_one_vms_overflow_is_no_others() -> None:
    events = FleetEvents()
    flood, quiet = stream(events, "flood", capacity=4), stream(events, "quiet", capacity=4)
    quiet.push(LayoutChanged(generation=1))
    for number in range(10):
        flood.push(LayoutChanged(generation=number))
    events.close()
    seen = [each async for each in events]
    assert [each.event for each in seen if each.address == "quiet"] == [LayoutChanged(generation=1)]
    resyncs = [each.address for each in seen if isinstance(each.event, LayoutChanged) and each.event.resync]
    assert set(resyncs) == {"flood"}


async def test_a_subscriber_with_a_backlog_lets_others_run() -> None:
    events = FleetEvents()
    one = stream(events, "one", capacity=10_000)
    for number in range(1000):
        one.push(LayoutChanged(generation=number))
    events.close()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    count = Counter([each.address async for each in events])
    task.cancel()
    assert count == {"one": 1000}
    assert turns >= 10


async def test_a_stream_that_is_dropped_is_filled_no_more() -> None:
    events = FleetEvents()
    held = weakref.ref(stream(events, "one"))
    assert held() is not None
    gc.disable()
    try:
        del events
        assert held() is None
    finally:
        gc.enable()


async def test_cancelling_anext_loses_nothing() -> None:
    events = FleetEvents()
    one = stream(events, "one")
    waiting = asyncio.create_task(anext(events))
    await asyncio.sleep(0)
    one.push(LayoutChanged(generation=1))
    waiting.cancel()
    await asyncio.wait({waiting})
    assert (await anext(events)).event == LayoutChanged(generation=1)
