"""Calls that meet: one joins, waits for, stops or ends another."""

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    Affect,
    CommandRejectedError,
    Layout,
    MonitorLostError,
    OnFailure,
    OutcomeUnknownError,
    Pending,
    Recovery,
    StalePlanError,
    TransitionError,
    UnplugPendingError,
    UnprovenError,
)
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import HANG, Command
from tests.controller.test_scripted import CAPTURES, recorded
from tests.exchange import exchange

pytestmark = pytest.mark.qemu
NAME = "10.0.2-q35-sct-2x2x2-boot3"


async def test_a_call_that_joins_a_removal_keeps_its_deadline_beside_a_map() -> None:
    async with MicroGuest(boot=4, behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        mapping = asyncio.create_task(vm.set_map("0-2", timeout=20))
        await vm.wait_for(lambda layout: 3 in layout.pending)
        async with asyncio.timeout(5):
            with pytest.raises(UnplugPendingError):
                await vm.unplug(3, timeout=0.1)
            request = await vm.request_unplug(3)
            assert request.joined
            assert isinstance(await request.wait(0), Pending)
        assert not mapping.done()
        await guest.set_behaviour(Behaviour.complying())
        assert (await mapping).layout.enabled == {0, 1, 2}


async def test_a_cancelled_call_that_waits_to_keep_a_vcpu_plugs_nothing() -> None:
    async with MicroGuest(boot=2, behaviour=Behaviour.hanging()) as guest, qmpvcpu.attach(guest.qmp) as vm:
        request = await vm.request_unplug(1)
        keeping = asyncio.create_task(vm.set_state(1, enabled=True))
        await asyncio.sleep(0.05)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        await guest.set_behaviour(Behaviour.complying())
        await request.wait(10)
        with exchange() as sent:
            await vm.refresh()
        assert "device_add" not in sent
        assert vm.layout.enabled == {0}


async def test_a_call_that_waits_for_a_plug_in_flight_waits_as_long_as_for_a_reply() -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, reply_timeout=1.5) as vm:
        guest.process.kill(signal.SIGSTOP)
        try:
            async with asyncio.timeout(30):
                ended = await asyncio.gather(vm.plug(3), vm.set_state(3, enabled=True), return_exceptions=True)
        finally:
            guest.process.kill(signal.SIGCONT)
        assert [type(each) for each in ended] == [OutcomeUnknownError, OutcomeUnknownError]
        await vm.wait_for(lambda layout: 3 in layout.enabled, timeout=10)


async def test_closing_begins_nothing_that_is_queued_and_ends_what_is_read() -> None:
    async with MicroGuest(boot=3, behaviour=Behaviour.hanging()) as guest:
        vm = await qmpvcpu.attach(guest.qmp)
        mapping = asyncio.create_task(vm.set_map("0-1"))
        await vm.wait_for(lambda layout: layout.pending)
        waiting = [asyncio.create_task(each) for each in (vm.plug(5), vm.set_map("0"))]
        reading = asyncio.create_task(vm.refresh())
        await asyncio.sleep(0)
        with exchange() as sent:
            async with asyncio.timeout(10):
                await vm.close()
                with pytest.raises(TransitionError):
                    await mapping
                for each in waiting:
                    with pytest.raises(MonitorLostError):
                        await each
                with contextlib.suppress(MonitorLostError):  # unless QEMU was faster
                    await reading
                with pytest.raises(MonitorLostError):
                    await vm.plug(6)
        assert not {"device_add", "device_del"} & set(sent)


async def test_a_cancelled_plug_is_not_sent_again_however_it_is_rejected() -> None:
    async with recorded(NAME, {"device_del": {}}) as (peer, vm):
        slots = CAPTURES[NAME].replies("query-hotpluggable-cpus")[0]
        path = vm.layout.slot_of(2).qom_path
        request = await vm.request_unplug(2)
        kept = [{k: v for k, v in slot.items() if slot.get("qom-path") != path or k != "qom-path"} for slot in slots]
        peer.answers["query-hotpluggable-cpus"] = kept
        await peer.event("DEVICE_DELETED", {"path": path})
        await request.wait(5)
        rejected = asyncio.Event()

        async def reject(command: Command) -> Any:
            plugging.cancel()
            await command.fail("Duplicate device ID 'vcpu2'")
            rejected.set()
            return HANG

        peer.answers["device_add"] = reject
        plugging = asyncio.create_task(vm.plug(2))
        with pytest.raises(asyncio.CancelledError):
            await plugging
        await rejected.wait()
        await asyncio.sleep(0.1)
        assert peer.count("device_add") == 1


async def test_a_map_that_lacks_a_required_proof_says_so_and_one_vcpu_stays_plugged() -> None:
    unproven: dict[str, Any] = {"require_proof": True, "timeout": 0.05, "on_failure": OnFailure.REVERT}
    async with recorded(NAME, {"device_add": {}, "device_del": {}}) as (peer, vm):
        with pytest.raises(UnprovenError):
            await vm.plug(5, **unproven)
        assert 5 in vm.layout.enabled
        assert peer.count("device_del") == 0
        with pytest.raises(TransitionError, match="the guest did not acknowledge it"):
            await vm.set_map("0-2,5-6", **unproven)


async def test_what_a_predicate_raises_is_its_callers_alone() -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        for error in (StopIteration(), asyncio.CancelledError(), ValueError("no")):

            def predicate(layout: Layout, error: BaseException = error, before: Layout = vm.layout) -> bool:
                if layout is not before:
                    raise error
                return False

            waiting = asyncio.create_task(vm.wait_for(predicate, timeout=5))
            await asyncio.sleep(0)
            assert await vm.plug()
            with pytest.raises((RuntimeError, ValueError, asyncio.CancelledError)):
                await waiting


async def test_what_another_change_has_superseded_is_not_recovered(tmp_path: Path) -> None:
    async with MicroGuest(boot=2, behaviour=Behaviour.hanging()) as guest:
        record = tmp_path / "vm.xml"
        vm = await qmpvcpu.attach(guest.qmp, name="vm", record=record)
        mapping = asyncio.create_task(vm.set_map("0,3"))
        await vm.wait_for(lambda layout: layout.pending)
        vm._driver._lost(MonitorLostError("cut"))
        with pytest.raises(TransitionError):
            await mapping
        await vm.close()
        await guest.set_behaviour(Behaviour.complying())
        async with qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm:
            assert vm.interrupted is not None
            later = asyncio.create_task(vm.set_map("0,5"))
            await asyncio.sleep(0)
            with pytest.raises(StalePlanError, match="superseded"):
                await vm.recover(Recovery.REVERT)
            assert (await later).layout.enabled == {0, 5}


async def test_a_bare_request_changes_no_next_boot() -> None:
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp) as vm:
        for affect in (Affect.CONFIG, Affect.BOTH):
            with exchange() as sent, pytest.raises(ValueError, match=r"affect is Affect\.LIVE for request_unplug"):
                await vm.request_unplug(1, affect=affect)
            assert sent == []


async def test_a_rejection_is_looked_into_once_for_all_that_come_meanwhile() -> None:
    async with recorded(NAME) as (peer, vm):

        async def reject(command: Command) -> Any:
            await command.fail("no")
            return HANG

        peer.answers["device_add"] = reject
        looks = peer.count("query-cpus-fast")
        ended = await asyncio.gather(*(vm.plug(each) for each in range(3, 8)), return_exceptions=True)
        assert {type(each) for each in ended} == {CommandRejectedError}
        assert peer.count("query-cpus-fast") - looks <= 2
