"""The export keeps a source's vCPUs as they are, for as long as it is held and not a moment longer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    CommandRejectedError,
    DenialReason,
    MonitorError,
    MonitorLostError,
    Outcome,
    Pending,
    Recovery,
    StepDeniedError,
    Unplugged,
    VcpuController,
    VcpuMap,
)
from qmpvcpu.errors import TakeBackError
from qmpvcpu.events import Reconnected
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.planning.compatibility import DifferenceKind
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import Failure, ScriptedPeer
from tests.captures import all_captures
from tests.controller.vms import other_client, present, until
from tests.crash.proxy import Proxy
from tests.exchange import exchange

pytestmark = pytest.mark.qemu
CHANGES: dict[str, Callable[[VcpuController], Awaitable[object]]] = {
    "plug": lambda vm: vm.plug(3),
    "plug any": lambda vm: vm.plug(),
    "unplug": lambda vm: vm.unplug(2),
    "request_unplug": lambda vm: vm.request_unplug(2),
    "set_state on": lambda vm: vm.set_state(3, enabled=True),
    "set_state off": lambda vm: vm.set_state(2, enabled=False),
    "set_map": lambda vm: vm.set_map("0-3"),
    "set_count": lambda vm: vm.set_count(5),
    "export": lambda vm: vm.export(),
}


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    """A VM with vCPUs 0, 2 and 5, whose guest answers no removal of vCPU 5 until it is told to."""
    async with MicroGuest(boot=(0, 2, 5), behaviour=Behaviour.hanging().for_slot(5)) as running:
        yield running


@pytest.fixture
async def vm(guest: MicroGuest, tmp_path: Path) -> AsyncIterator[VcpuController]:
    async with qmpvcpu.attach(guest.qmp, name="vm", record=tmp_path / "vm.xml") as vm:
        yield vm


async def is_unlocked(vm: VcpuController) -> bool:
    """Whether a vCPU can be plugged."""
    return await vm.plug(3) == {3}


async def test_every_change_is_denied_while_the_vm_is_exported(vm: VcpuController) -> None:
    async with await vm.export() as export:
        assert export.locked
        with exchange() as sent:
            for name, change in CHANGES.items():
                with pytest.raises(StepDeniedError, match="the VM is exported") as denied:
                    await change(vm)
                assert denied.value.reason is DenialReason.EXPORTED, name
        assert not {"device_add", "device_del"} & set(sent)
        for plan in (vm.plan("0,2-3"), vm.plan("0,2"), vm.plan_count(5)):
            assert {each.reason for each in plan.denied} == {DenialReason.EXPORTED}
        assert (await vm.set_map("0,2,5")).outcome.name == "REACHED"  # it is so already: nothing is sent
    assert not export.locked
    assert await is_unlocked(vm)


async def test_a_transition_that_was_cut_short_is_not_finished_while_the_vm_is_exported(
    guest: MicroGuest, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    async with (
        Proxy(tmp_path / "proxy", guest.qmp) as proxy,
        qmpvcpu.attach(proxy.path, name="vm", record=record) as vm,
    ):
        transition = asyncio.create_task(vm.set_map("0,2"))
        await vm.wait_for(lambda layout: layout.pending)
        proxy.cut()
        with pytest.raises(qmpvcpu.TransitionError):
            await transition
    async with qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm:
        assert vm.interrupted is not None
        async with await vm.export() as export:
            assert export.state.desired == {0, 2}
            for how in (Recovery.FINISH, Recovery.REVERT):
                with pytest.raises(StepDeniedError) as denied:
                    await vm.recover(how)
                assert denied.value.reason is DenialReason.EXPORTED


async def test_an_export_holds_all_that_the_other_side_has_to_know(vm: VcpuController) -> None:
    await vm.plug(1)
    async with await vm.export() as export:
        state = export.state
        assert ExportedState.from_json(export.to_json()) == state
        assert (state.name, state.enabled, state.pending) == ("vm", VcpuMap([0, 1, 2, 5]), VcpuMap())
        assert state.desired == state.enabled
        assert state.layout.order == (0, 2, 5, 1)
        assert state.slots[5].device_id == "vcpu5"
        assert state.generation == vm.layout.generation
        assert (state.layout.max, state.layout.vm.memory_kib) == (8, 16 * 1024)
        assert state.xml == qmpvcpu.domainxml.render(vm.layout)


async def test_a_vm_that_libvirt_has_no_domain_for_is_exported_without(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp, name="a/b") as vm, await vm.export() as export:
        assert export.state.xml is None
        assert export.to_json()["xml"] is None


async def test_an_export_waits_for_its_turn(vm: VcpuController, guest: MicroGuest) -> None:
    transition = asyncio.create_task(vm.set_map("0,2,4"))
    await vm.wait_for(lambda layout: layout.pending)
    exporting = asyncio.create_task(vm.export(allow_fatal=True))  # where TCG runs it
    assert not exporting.done()
    await guest.set_behaviour(Behaviour.complying())
    assert (await transition).outcome.name == "REACHED"
    async with await exporting as export:
        assert export.state.enabled == {0, 2, 4}


async def test_pending_removals_are_settled_or_reported(vm: VcpuController, guest: MicroGuest) -> None:
    request = await vm.request_unplug(5)
    async with await vm.export(settle=0.05) as export:
        assert export.state.pending == {5}
        assert isinstance(await request.wait(0), Pending)
        joined = await vm.request_unplug(5)  # nothing is sent
        assert joined.joined
        with pytest.raises(StepDeniedError) as denied:
            await vm.set_map("0,2,5")  # would plug it again, should it leave
        assert denied.value.reason is DenialReason.EXPORTED
    exporting = asyncio.create_task(vm.export(settle=30, allow_fatal=True))  # as above
    await guest.set_behaviour(Behaviour.complying())
    async with await exporting as export:
        assert (export.state.enabled, export.state.pending) == (VcpuMap([0, 2]), VcpuMap())
        assert isinstance(await request.wait(0), Unplugged)


async def test_the_lock_holds_while_pending_removals_are_settled_and_goes_with_a_cancel(vm: VcpuController) -> None:
    await vm.request_unplug(5)
    exporting = asyncio.create_task(vm.export(settle=30))
    await vm.refresh()  # nobody is before it in the queue
    with pytest.raises(StepDeniedError, match="the VM is exported"):
        await vm.plug(3)  # at once, not when the settling is over
    exporting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exporting
    assert await is_unlocked(vm)


async def test_an_export_that_is_cancelled_before_its_turn_locks_nothing(
    vm: VcpuController, guest: MicroGuest
) -> None:
    transition = asyncio.create_task(vm.set_map("0,2"))
    await vm.wait_for(lambda layout: layout.pending)
    exporting = asyncio.create_task(vm.export())
    await vm.refresh()
    exporting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exporting
    await guest.set_behaviour(Behaviour.complying())
    await transition
    assert await is_unlocked(vm)


async def test_releasing_twice_does_not_unlock_the_next_export(vm: VcpuController) -> None:
    first = await vm.export()
    first.release()
    async with await vm.export() as second:
        first.release()
        assert repr(second).endswith(", locked>")
        assert second.locked
        assert not first.locked
        with pytest.raises(StepDeniedError):
            await vm.plug(3)
    assert await is_unlocked(vm)


async def test_a_bad_settle_is_refused_and_locks_nothing(vm: VcpuController) -> None:
    for settle in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="settle is a finite number of seconds"):
            await vm.export(settle=settle)
    assert await is_unlocked(vm)


async def test_the_record_is_kept_while_the_vm_is_exported(
    vm: VcpuController, guest: MicroGuest, tmp_path: Path
) -> None:
    await vm.request_unplug(5)
    async with await vm.export() as export:
        await guest.set_behaviour(Behaviour.complying())
        await vm.wait_settled()
        (change,) = await export.changes()
        assert change.ids == {5}
    await vm.close()
    assert b"<vcpu id='5' enabled='no' hotpluggable='yes'/>" in (tmp_path / "vm.xml").read_bytes()


async def test_what_others_change_is_told(vm: VcpuController, guest: MicroGuest) -> None:
    async with await vm.export() as export:
        assert await export.changes() == ()
        async with other_client(guest) as other:
            slot = vm.layout.slot_of(3)
            await other.execute("device_add", {"driver": slot.type, "id": "vcpu3", **slot.props})
            assert len(await present(other)) == 4
        (change,) = await export.changes()
        assert (change.kind, change.ids) == (DifferenceKind.MISSING_VCPU, VcpuMap([3]))


# The connection.


async def test_a_lost_connection_ends_the_export(guest: MicroGuest, tmp_path: Path) -> None:
    async with (
        Proxy(tmp_path / "proxy", guest.qmp) as proxy,
        qmpvcpu.attach(proxy.path) as vm,
        await vm.export() as export,
    ):
        proxy.cut()
        with pytest.raises(MonitorLostError):
            await vm.wait_for(lambda _: False)
        assert not export.locked
        for call in (export.changes(), export.take_back(destination_is_gone=True), vm.export()):
            with pytest.raises(MonitorLostError):
                await call
    async with qmpvcpu.attach(guest.qmp) as again:
        assert await is_unlocked(again)


async def test_the_lock_outlives_a_connection_that_is_found_again(guest: MicroGuest, tmp_path: Path) -> None:
    async with Proxy(tmp_path / "proxy", guest.qmp) as proxy, qmpvcpu.attach(proxy.path, reconnect=True) as vm:
        async with await vm.export() as export:
            news = vm.events()
            proxy.cut()
            await until(news, Reconnected)
            assert export.locked
            with pytest.raises(StepDeniedError, match="the VM is exported"):
                await vm.plug(3)
            assert await export.changes() == ()
        assert await is_unlocked(vm)


async def test_a_connection_that_is_lost_while_it_settles_leaves_no_lock(guest: MicroGuest, tmp_path: Path) -> None:
    async with Proxy(tmp_path / "proxy", guest.qmp) as proxy, qmpvcpu.attach(proxy.path) as vm:
        await vm.request_unplug(5)
        exporting = asyncio.create_task(vm.export(settle=30))
        await vm.refresh()
        proxy.cut()
        with pytest.raises(MonitorError):
            await exporting
    async with qmpvcpu.attach(guest.qmp) as again:
        assert await is_unlocked(again)


async def test_closing_ends_the_export(vm: VcpuController, guest: MicroGuest) -> None:
    export = await vm.export()
    await vm.close()
    assert not export.locked
    export.release()
    with pytest.raises(MonitorLostError, match="closed by this side"):
        await export.changes()
    async with qmpvcpu.attach(guest.qmp) as again:
        assert await is_unlocked(again)


# What QEMU seldom does.


def left_behind(run_state: str, migration: str, cont: Any) -> dict[str, Any]:
    """The answers of a QEMU in this state, which goes on at ``cont`` if it answers so."""
    state = {"query-status": {"status": run_state, "running": False}, "query-migrate": {"status": migration}}

    def go_on(_: object) -> Any:
        if cont == {}:
            state["query-status"] = {"status": "running", "running": True}
        return {} if cont == "nothing" else cont

    return {
        "query-target": {"arch": "x86_64"},
        "query-kvm": {"enabled": True, "present": True},
        "query-status": lambda _: state["query-status"],
        "query-migrate": lambda _: state["query-migrate"],
        "cont": go_on,
    }


def capture() -> Any:
    return next(each.data for each in all_captures() if each.name.startswith("10.0.2-q35"))


@pytest.mark.parametrize("migration", ["failed", "cancelled"])
async def test_a_vm_that_a_failed_migration_left_paused_is_taken_back(migration: str) -> None:
    answers = left_behind("paused", migration, {})
    async with ScriptedPeer.from_capture(capture(), answers=answers) as peer, qmpvcpu.attach(peer.address) as vm:
        async with await vm.export() as export:
            await export.take_back(destination_is_gone=True)
            assert not export.locked
        assert [command.name for command in peer.received].count("cont") == 1


@pytest.mark.parametrize(
    ("cont", "says", "outcome"),
    [
        (Failure("GenericError", "no lock on the disk"), "no lock on the disk", Outcome.UNCHANGED),
        ("nothing", "told to go on, and does not: run state postmigrate", Outcome.UNKNOWN),
    ],
    ids=["rejected", "in vain"],
)
async def test_a_vm_that_does_not_go_on_is_not_said_to(cont: Any, says: str, outcome: Outcome) -> None:
    answers = left_behind("postmigrate", "completed", cont)
    async with ScriptedPeer.from_capture(capture(), answers=answers) as peer, qmpvcpu.attach(peer.address) as vm:
        with pytest.raises(TakeBackError, match=says) as caught:
            await vm.take_back(destination_is_gone=True)
        assert caught.value.outcome is outcome
        if isinstance(cont, Failure):
            assert isinstance(caught.value.__cause__, CommandRejectedError)


@pytest.mark.parametrize("word", [False, 1, "yes", None])
async def test_nobody_takes_a_vm_back_by_accident(vm: VcpuController, word: Any) -> None:
    with exchange() as sent, pytest.raises(TakeBackError, match="must say so"):
        await vm.take_back(destination_is_gone=word)
    assert sent == []
