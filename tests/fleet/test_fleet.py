"""Work on many VMs: results as they come, cancelling, closing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest

from qmpvcpu import Layout, TransitionError, VcpuController
from qmpvcpu.domainxml import read_identity
from qmpvcpu.errors import MonitorLostError, RecordError
from qmpvcpu.fleet import Fleet, Results
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import ScriptedPeer
from tests.captures import all_captures
from tests.controller.test_scripted import capture_answers
from tests.exchange import exchange
from tests.fleet.vms import guests, stopped

pytestmark = pytest.mark.qemu


@pytest.fixture
async def vms() -> AsyncIterator[list[MicroGuest]]:
    async with guests(3) as started:
        yield started


@pytest.fixture
async def fleet(vms: list[MicroGuest]) -> AsyncIterator[Fleet]:
    async with Fleet([each.qmp for each in vms], reply_timeout=5) as fleet:
        yield fleet


async def test_a_vm_is_attached_by_the_first_work_and_stays_so(fleet: Fleet) -> None:
    assert fleet.vms == {}
    with exchange() as sent:
        attached = await fleet.attach()
        assert sent.count("query-name") == 3
        sent.clear()
        again = await fleet.attach()
        assert sent == []
    assert [each.value for each in attached] == [each.value for each in again] == list(fleet.vms.values())
    assert tuple(fleet.vms) == fleet.addresses == tuple(each.address for each in attached)


async def test_all_operations_reach_all_vms(fleet: Fleet) -> None:
    assert [str(each.layout and each.layout.enabled) for each in await fleet.set_map(iter([0, 1, 5]))] == [
        "0-1,5"
    ] * 3
    reports = [each.value for each in await fleet.set_count(2)]
    assert [str(each and each.layout.enabled) for each in reports] == ["0-1"] * 3
    layouts = [each.value for each in await fleet.refresh()]
    assert all(isinstance(each, Layout) and each.enabled == {0, 1} for each in layouts)
    assert [each.value for each in await fleet.each(lambda vm: vm.plug())] == [{2}] * 3


async def test_results_come_as_vms_end_and_all_of_them_in_the_order_of_the_addresses(
    vms: list[MicroGuest], fleet: Fleet
) -> None:
    await fleet.set_map("0-1")
    await vms[0].set_behaviour(Behaviour.hanging())
    results = fleet.set_map("0", timeout=10)
    first = [(await anext(results)).address for _ in range(2)]
    assert set(first) == set(fleet.addresses[1:])
    waiting = asyncio.create_task(anext(results))
    await vms[0].set_behaviour(Behaviour.complying())
    assert (await waiting).address == fleet.addresses[0]
    assert [each async for each in results] == []
    assert tuple(each.address for each in await fleet.attach()) == fleet.addresses


async def test_leaving_the_loop_early_stops_nothing(fleet: Fleet) -> None:
    async for result in fleet.set_map("0-1"):
        assert result.error is None
        break
    for vm in fleet.vms.values():
        await vm.wait_for(lambda layout: layout.enabled == {0, 1}, timeout=5)


async def test_stopping_begins_no_other_vm_and_sees_to_its_end_what_was_begun(vms: list[MicroGuest]) -> None:
    asked = []

    async def work(vm: VcpuController) -> None:
        asked.append(vm.address)
        results.stop()
        await vm.plug(1)

    async with Fleet([each.qmp for each in vms], concurrency=1) as fleet:
        results: Results[None] = fleet.each(work)
        (only,) = await results
    assert asked == [only.address] == [f"unix:{vms[0].qmp}"]
    assert only.error is None
    assert only.layout is not None
    assert only.layout.enabled == {0, 1}


async def test_a_vm_that_is_attached_after_the_stop_is_not_worked_on(vms: list[MicroGuest]) -> None:
    asked = []

    async def work(vm: VcpuController) -> None:
        asked.append(vm.address)

    async with Fleet([each.qmp for each in vms[:2]], reply_timeout=20) as fleet:
        with stopped(vms[1]):
            results = fleet.each(work)
            first = await anext(results)
            results.stop()
        assert [each async for each in results] == []
        assert asked == [first.address]
        assert len(fleet.vms) == 2  # attached it is, and stays so


async def test_every_recorded_machine_is_a_vm_of_one_fleet() -> None:
    async with contextlib.AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(
                ScriptedPeer.from_capture(capture.data, answers=capture_answers(capture), tcp=True)
            )
            for capture in all_captures()
        ]
        async with Fleet([each.address for each in peers]) as fleet:
            results = await fleet.refresh()
    assert [each.error for each in results] == [None] * len(peers)
    assert [each.layout and each.layout.slots for each in results] == [
        next(capture.layouts()).slots for capture in all_captures()
    ]


async def test_one_that_cannot_be_closed_keeps_no_other_open(
    vms: list[MicroGuest], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Fleet([each.qmp for each in vms]) as fleet:
        await fleet.attach()
        bad, *others = fleet.vms.values()
        close = bad.close

        async def fail() -> None:
            await close()
            raise OSError("no space left on device")

        monkeypatch.setattr(bad, "close", fail)
        await fleet.close()
    assert "no space left" in caplog.text
    for vm in others:
        with pytest.raises(MonitorLostError):
            await vm.refresh()


async def test_one_at_a_time_means_one_at_a_time_while_nobody_waits(fleet: Fleet, vms: list[MicroGuest]) -> None:
    inside = most = 0

    async def work(_: VcpuController) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1

    await fleet.attach()
    await fleet.each(work)
    assert most == 3
    async with Fleet([each.sockets[1] for each in vms], concurrency=1) as narrow:
        await narrow.attach()
        most = 0
        await narrow.each(work)
    assert most == 1


async def test_who_waits_for_a_guest_makes_room_for_the_next(vms: list[MicroGuest]) -> None:
    async with Fleet([each.qmp for each in vms], concurrency=1) as fleet:
        await fleet.set_map("0-1")
        await vms[0].set_behaviour(Behaviour.hanging())
        results = fleet.set_map("0", timeout=20)
        assert [(await anext(results)).address for _ in range(2)] == list(fleet.addresses[1:])
        await vms[0].set_behaviour(Behaviour.complying())
        assert (await anext(results)).error is None


async def test_whatever_the_work_raises_is_that_vms_error(fleet: Fleet) -> None:
    async def fail(vm: VcpuController) -> int:
        if vm.address == fleet.addresses[0]:
            raise ZeroDivisionError
        if vm.address == fleet.addresses[1]:
            asyncio.get_running_loop().create_future().cancel()
            raise asyncio.CancelledError
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()
        return 1

    results = await fleet.each(fail)
    kinds = [type(each.error) for each in results]
    assert kinds == [ZeroDivisionError, asyncio.CancelledError, TimeoutError]
    with pytest.raises(ZeroDivisionError):
        results[0].unwrap()
    assert [each.unwrap() for each in await fleet.each(_seven)] == [7] * 3


async def test_closing_the_results_stops_maps_at_their_next_safe_point(vms: list[MicroGuest], fleet: Fleet) -> None:
    await fleet.set_map("0-1")
    for each in vms:
        await each.set_behaviour(Behaviour.hanging())
    results = fleet.set_map("0", timeout=20)
    for vm in fleet.vms.values():
        await vm.wait_for(lambda layout: layout.pending == {1}, timeout=5)
    async with contextlib.aclosing(results):
        pass
    assert [each async for each in results] == []
    for each in vms:
        await each.set_behaviour(Behaviour.complying())
    for vm in fleet.vms.values():  # a removal cannot be withdrawn, and is not forgotten
        await vm.wait_for(lambda layout: layout.enabled == {0}, timeout=5)
    assert [each.error for each in await fleet.set_map("0,2")] == [None] * 3


async def test_cancelling_who_waits_for_all_cancels_all(fleet: Fleet) -> None:
    await fleet.attach()
    ended = []

    async def wait(vm: VcpuController) -> NoReturn:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(vm.address)
        raise AssertionError

    task = asyncio.ensure_future(_all(fleet.each(wait)))
    await fleet.attach()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == sorted(fleet.addresses)


async def _seven(_: VcpuController) -> int:
    return 7


async def _all(results: Results[NoReturn]) -> None:
    await results


async def test_closing_lets_go_of_all_at_once_whatever_runs(vms: list[MicroGuest]) -> None:
    loop = asyncio.get_running_loop()
    async with Fleet([each.qmp for each in vms], reply_timeout=30) as fleet:
        await fleet.set_map("0-1")
        events = fleet.events()
        await vms[0].set_behaviour(Behaviour.hanging())
        setting = fleet.set_map("0", timeout=30)
        with stopped(vms[1]):
            async with contextlib.aclosing(fleet.attach()):
                await vms[2].set_behaviour()
            attached = fleet.vms
            start = loop.time()
            await asyncio.gather(fleet.close(), fleet.close())
            assert loop.time() - start < 4  # seconds of grace are one VM's, not the sum's
    assert fleet.vms == {}
    assert all(result.error is not None or result.report for result in [each async for each in setting])
    assert [each async for each in events]
    assert [each async for each in fleet.events()] == []
    for vm in attached.values():
        with pytest.raises(MonitorLostError):
            await vm.refresh()
    with pytest.raises(RuntimeError, match="closed"):
        fleet.attach()
    async with Fleet([each.qmp for each in vms]) as again:  # the sockets are free
        assert [each.error for each in await again.attach()] == [None] * 3


async def test_two_works_at_once_attach_a_vm_once(fleet: Fleet) -> None:
    with exchange() as sent:
        both = await asyncio.gather(_layouts(fleet), _layouts(fleet))
    assert sent.count("query-name") == 3
    assert both[0] == both[1] == ["0"] * 3


async def _layouts(fleet: Fleet) -> list[str]:
    return [str(each.value and each.value.enabled) for each in await fleet.refresh()]


async def test_each_vm_has_a_record_of_its_own(vms: list[MicroGuest], tmp_path: Path) -> None:
    def record(address: str, _: VmInfo) -> Path | None:
        return None if address.endswith(str(vms[2].qmp)) else tmp_path / f"{address[5:].replace('/', '-')}.xml"

    async with Fleet([each.qmp for each in vms], record=record) as fleet:
        await vms[1].set_behaviour(Behaviour.refusing(0x82))
        await fleet.set_map("0-1")
        failed = [each for each in await fleet.set_map("0") if each.error]
        assert isinstance(failed[0].error, TransitionError)
    assert names(tmp_path) == ["qmp0", "qmp0"]


async def test_nameless_vms_are_called_by_as_much_of_their_paths_as_tells_them_apart(
    vms: list[MicroGuest], tmp_path: Path
) -> None:
    paths = [tmp_path / way for way in ("one/qmp.sock", "two/qmp.sock", "two/qmp.other")]
    for path, guest in zip(paths, vms, strict=True):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(guest.qmp)
    async with MicroGuest(extra_args=("-name", "web")) as named, Fleet([*paths, named.qmp]) as fleet:
        results = await fleet.attach()
        assert [each.name for each in results] == ["one/qmp", str(paths[1]), str(paths[2]), "web"]
        events = fleet.events()
        await results[0].unwrap().plug(3)
        assert (await anext(events)).name == "one/qmp"


async def test_a_fleet_that_only_reads_writes_no_record(vms: list[MicroGuest], tmp_path: Path) -> None:
    addresses = [each.qmp for each in vms]
    async with Fleet(addresses, record=lambda _, __: tmp_path / "vm.xml", read_only=True) as fleet:
        assert not any(each.error for each in await fleet.refresh())
        errors = [each.error for each in await fleet.set_count(2)]
        assert all(isinstance(error, RecordError) for error in errors)
    assert list(tmp_path.iterdir()) == []


def names(folder: Path) -> list[str]:
    return [read_identity(each.read_bytes()).name for each in folder.iterdir()]
