"""The VM around its vCPUs: other clients, faults of QEMU, migration, cancellation, the record."""

import asyncio
import logging
import os
import shutil
import signal
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient, Runstate

import qmpvcpu
from qmpvcpu import (
    CommandRejectedError,
    DenialReason,
    MonitorConnectError,
    MonitorLostError,
    OutcomeUnknownError,
    RecordError,
    StepDeniedError,
    Unplugged,
    VcpuController,
    VcpuMap,
    WaitTimeoutError,
    domainxml,
)
from qmpvcpu.engine.messages import Persist
from qmpvcpu.errors import UnsupportedMachineError
from qmpvcpu.events import Disconnected, LayoutChanged, Origin, VcpuPlugged, VcpuUnplugged, VmResumed, VmStopped
from qmpvcpu.model.transition import Intent
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.qapi import RunEvent
from qmpvcpu.testing import Behaviour, MicroGuest, QemuProcess
from qmpvcpu.vm.subscribers import EventStream
from tests import waiting
from tests.controller.vms import other_client, running, until
from tests.exchange import exchange
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu
ON_Q35 = pytest.mark.parametrize("on", substrates(["q35"]))
WHERE_REPLUG_WORKS = pytest.mark.parametrize("on", substrates(["q35"], that_survive=True))


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    """A VM on whatever is best here."""
    async with MicroGuest() as running_guest:
        yield running_guest


# Targets.


async def test_every_kind_of_target_leads_to_the_vm(guest: MicroGuest) -> None:
    path = guest.qmp
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(guest.sockets[1]))
    for target in (path, str(path), f"unix:{path}", os.fspath(path), connected):
        async with qmpvcpu.attach(target, name="mine") as vm:
            assert vm.layout.enabled == {0}
            assert vm.layout.vm.name == "mine"
            assert (await vm.refresh()).max == 8


async def test_its_repr_names_the_vm_and_its_vcpus(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        await guest.set_behaviour(Behaviour.hanging())
        await vm.set_map("0,3-4")
        await vm.request_unplug(4)
        assert repr(vm) == f"<VcpuController unix:{guest.qmp}: vCPUs 0,3-4 of 8, pending 4>"
    assert repr(vm).startswith("<VcpuController ")


async def test_a_vm_over_tcp_is_one_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with MicroGuest(extra_args=["-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"]):
        for target in (f"tcp:127.0.0.1:{port}", ("127.0.0.1", port)):
            vm = await qmpvcpu.attach(target)
            assert await vm.plug(1) or vm.layout.enabled == {0, 1}
            await vm.unplug(1)
            await vm.close()
            await vm.close()
            if vm.layout.vm.accelerator == "tcg":
                break


async def test_a_vmm_that_goes_on_using_its_own_client_notices_nothing(guest: MicroGuest) -> None:
    client = QMPClient("vmm")
    await client.connect(str(guest.qmp))
    before = list(client._listeners)
    async with qmpvcpu.attach(client) as vm:
        for vcpu in (1, 2, 3):
            status: Any
            _, status = await asyncio.gather(vm.plug(vcpu), client.execute("query-status"))
            assert status["running"]
        await asyncio.gather(vm.unplug(3), client.execute("query-block"))
        assert client.runstate is Runstate.RUNNING
    assert client.runstate is Runstate.RUNNING
    assert client._listeners == before
    reply: Any = await client.execute("query-cpus-fast")
    assert len(reply) == 3
    names = [event["event"] for event in client.events.clear()]
    assert names.count("ACPI_DEVICE_OST") >= 4  # its queue has had every event
    await client.disconnect()


# Others who change the VM.


@ON_Q35
async def test_a_plug_by_another_client_is_seen_and_can_be_taken_out(on: Substrate) -> None:
    async with running(on) as (guest, vm), other_client(guest) as other:
        for vcpu, arguments in ((2, {"id": "cpu-theirs"}), (4, {})):
            stream = vm.events()
            slot = vm.layout[vcpu].slot
            await other.execute("device_add", {"driver": slot.type, **slot.props, **arguments})
            seen = (await until(stream, VcpuPlugged))[-1]
            assert seen.origin is Origin.OTHER
            assert vm.layout[vcpu].device_id == arguments.get("id")
            assert vm.layout[vcpu].hotpluggable
            assert vm.layout[vcpu].host_tid is not None
        assert await vm.unplug(2) == {2}
        assert await vm.unplug(4) == {4}


@ON_Q35
async def test_an_unplug_by_another_client_is_seen(on: Substrate) -> None:
    async with running(on, boot=2, behaviour=Behaviour.hanging()) as (guest, vm), other_client(guest) as other:
        await vm.plug(2)
        stream = vm.events()
        await other.execute("device_del", {"id": "vcpu2"})
        await vm.wait_for(lambda layout: 2 in layout.pending, timeout=10)
        with exchange() as sent:  # ours joins theirs: a second request would eject what comes next
            joined = await vm.request_unplug(2)
        assert joined.joined
        assert "device_del" not in sent
        await guest.set_behaviour(Behaviour.complying())
        assert isinstance(await joined.wait(10), Unplugged)
        gone = (await until(stream, VcpuUnplugged))[-1]
        assert gone.origin is Origin.OTHER


@WHERE_REPLUG_WORKS
async def test_a_removal_that_was_asked_for_twice_is_noticed(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (guest, vm), other_client(guest) as other:
        await vm.plug(2)
        request = await vm.request_unplug(2)
        await vm.wait_for(lambda layout: 2 in layout.pending, timeout=10)
        stream = vm.events()
        # Theirs comes while the guest works on ours: QEMU queues a second removal.
        await other.execute("device_del", {"id": "vcpu2"})
        await guest.set_behaviour(Behaviour.complying())
        assert isinstance(await request.wait(10), Unplugged)
        await vm.refresh()
        assert vm.layout.enabled == {0}
        assert isinstance((await until(stream, VcpuUnplugged))[-1], VcpuUnplugged)


async def test_what_nobody_announces_is_found_by_the_next_read() -> None:
    async with (
        MicroGuest(behaviour=Behaviour.silent_about_inserts()) as guest,
        qmpvcpu.attach(guest.qmp, resync_interval=0.05) as vm,
        other_client(guest) as other,
    ):
        stream = vm.events()
        slot = vm.layout[3].slot
        await other.execute("device_add", {"driver": slot.type, "id": "vcpu3", **slot.props})
        seen = await until(stream, LayoutChanged)
        assert [type(event) for event in seen] == [VcpuPlugged, LayoutChanged]
        assert (await vm.wait_for(lambda layout: 3 in layout.enabled, timeout=1)).order == (0, 3)


async def test_a_plug_that_another_client_beat_us_to_says_so(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm, other_client(guest) as other:
        await guest.set_behaviour(Behaviour.silent_about_inserts())
        slot = vm.layout[3].slot
        await other.execute("device_add", {"driver": slot.type, "id": "theirs", **slot.props})
        with pytest.raises(CommandRejectedError, match="occupied meanwhile, by /machine/peripheral/theirs") as caught:
            await vm.plug(3)
        assert caught.value.ids == {3}
        assert vm.layout[3].device_id == "theirs"


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_an_unplug_of_what_is_gone_already_is_met(on: Substrate) -> None:
    async with running(on, boot=2, behaviour=Behaviour.wordless()) as (guest, vm), other_client(guest) as other:
        await vm.plug(2)
        await other.execute("device_del", {"id": "vcpu2"})

        async def is_gone() -> bool:
            reply: Any = await other.execute("query-hotpluggable-cpus")
            return not any(slot.get("qom-path", "").endswith("vcpu2") for slot in reply)

        await waiting.until(is_gone)  # QEMU has no event for it, which is the point
        assert 2 in vm.layout.enabled  # no event told us
        assert await vm.unplug(2) == {2}


# Concurrency and cancellation.


async def test_concurrent_callers_do_not_disturb_each_other(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        taken = await asyncio.gather(*(vm.plug() for _ in range(7)))
        assert sorted(next(iter(ids)) for ids in taken) == [1, 2, 3, 4, 5, 6, 7]
        with pytest.raises(StepDeniedError, match="8 vCPUs, all plugged"):
            await vm.plug()
        gone = await asyncio.gather(*(vm.unplug(vcpu) for vcpu in range(1, 8)))
        assert [str(ids) for ids in gone] == ["1", "2", "3", "4", "5", "6", "7"]
        assert vm.layout.enabled == {0}


@ON_Q35
async def test_two_callers_for_one_vcpu(on: Substrate) -> None:
    async with running(on) as (_, vm):
        results = await asyncio.gather(vm.plug(3), vm.plug(3), return_exceptions=True)
        assert results[0] == VcpuMap([3])
        assert isinstance(results[1], StepDeniedError)
        assert results[1].reason is DenialReason.IN_PROGRESS
        with exchange() as sent:
            gone = await asyncio.gather(*(vm.unplug(3) for _ in range(4)))
        assert [str(ids) for ids in gone] == ["3"] * 4
        assert sent.count("device_del") == 1


async def test_callers_with_one_wish_send_one_command(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        for enabled, command in ((True, "device_add"), (False, "device_del")):
            with exchange() as sent:
                states = await asyncio.gather(*(vm.set_state(3, enabled=enabled) for _ in range(3)))
            assert [str(ids) for ids in states] == ["3"] * 3
            assert sent.count(command) == 1
            assert vm.layout[3].enabled == enabled


async def test_cancelling_a_caller_leaves_no_outcome_unread(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        plugging = asyncio.create_task(vm.plug(3))
        await asyncio.sleep(0)  # it has been sent, and no reply can have come
        plugging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await plugging
        await vm.wait_for(lambda layout: 3 in layout.enabled, timeout=10)
        await vm.refresh()  # under TCG the first unplug would begin with this
        unplugging = asyncio.create_task(vm.unplug(3))
        await asyncio.sleep(0)
        unplugging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unplugging
        await vm.wait_for(lambda layout: 3 not in layout.enabled, timeout=10)


async def test_waiting_for_a_condition(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        waiting = asyncio.create_task(vm.wait_for(lambda layout: {2, 3} <= layout.enabled, timeout=10))
        await vm.plug(3)
        await vm.plug(2)
        assert (await waiting).enabled >= {2, 3}
        with pytest.raises(WaitTimeoutError, match=r"within 0\.01 s; plugged now: 0,2-3$"):
            await vm.wait_for(lambda layout: 7 in layout.enabled, timeout=0.01)
        broken = asyncio.create_task(vm.wait_for(lambda layout: layout[9 if 4 in layout.enabled else 0].pending))
        await asyncio.sleep(0)
        await vm.plug(4)  # the fault is the waiter's, not ours
        with pytest.raises(IndexError, match="no vCPU 9"):
            await broken


# Faults of QEMU.


async def test_a_qemu_that_dies_is_noticed_at_once_by_everyone(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.silent())
    async with qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(3)
        stream = vm.events()
        request = await vm.request_unplug(3)
        waiting = [
            asyncio.create_task(request.wait()),
            asyncio.create_task(vm.wait_for(lambda layout: 5 in layout.enabled)),
        ]
        await asyncio.sleep(0)
        guest.process.kill(signal.SIGKILL)
        async with asyncio.timeout(1):
            seen = await until(stream, Disconnected)
            for task in waiting:
                with pytest.raises(MonitorLostError):
                    await task
        assert isinstance(seen[-1], Disconnected)
        assert [event async for event in stream] == []
        for call in (vm.plug(1), vm.unplug(3), vm.refresh(), vm.wait_settled(), vm.set_state(1, enabled=True)):
            with pytest.raises(MonitorLostError):
                await call
        assert [event async for event in vm.events()] == []
        assert vm.layout.enabled == {0, 3}  # what was known last can still be read


@WHERE_REPLUG_WORKS
async def test_a_stopped_qemu_costs_the_deadline_and_its_late_reply_is_taken_in(on: Substrate) -> None:
    async with running(on, attach={"reply_timeout": 1.5}) as (guest, vm):
        stream = vm.events()
        guest.process.kill(signal.SIGSTOP)
        with pytest.raises(OutcomeUnknownError, match=r"did not reply to device_add within 1\.5 s"):
            await vm.plug(3)
        assert vm.layout.enabled == {0}
        with pytest.raises(StepDeniedError, match="in flight"):
            await vm.plug(3)
        guest.process.kill(signal.SIGCONT)
        await until(stream, VcpuPlugged)
        assert (await vm.refresh()).enabled == {0, 3}
        guest.process.kill(signal.SIGSTOP)
        with pytest.raises(OutcomeUnknownError, match="did not reply to device_del"):
            await vm.unplug(3)
        guest.process.kill(signal.SIGCONT)
        await until(stream, VcpuUnplugged)
        assert vm.layout.enabled == {0}


async def test_a_qemu_that_dies_with_a_command_in_flight_leaves_its_outcome_unknown(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        guest.process.kill(signal.SIGSTOP)
        plugging = asyncio.create_task(vm.plug(3))
        await asyncio.sleep(0)
        guest.process.kill(signal.SIGKILL)
        with pytest.raises(OutcomeUnknownError, match="plug of vCPU 3 was sent, its outcome is unknown") as caught:
            await plugging
        assert caught.value.outcome is qmpvcpu.Outcome.UNKNOWN
        assert isinstance(caught.value.__cause__, MonitorLostError)


async def test_a_qemu_that_is_gone_or_stopped_cannot_be_attached_to(guest: MicroGuest) -> None:
    guest.process.kill(signal.SIGSTOP)
    with pytest.raises(MonitorConnectError, match="stopped"):
        await qmpvcpu.attach(guest.qmp, reply_timeout=0.2)
    guest.process.kill(signal.SIGCONT)
    async with qmpvcpu.attach(guest.qmp):
        with pytest.raises(MonitorConnectError, match="another client"):
            await qmpvcpu.attach(guest.qmp, reply_timeout=0.2)


async def test_closing_ends_every_wait(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.silent())
    vm = await qmpvcpu.attach(guest.qmp)
    await vm.plug(1)
    request = await vm.request_unplug(1)
    waiting = asyncio.create_task(request.wait())
    stream = vm.events()
    await asyncio.sleep(0)
    await vm.close()
    with pytest.raises(MonitorLostError, match="closed by this side"):
        await waiting
    with pytest.raises(MonitorLostError):
        await request.wait(1)
    assert [type(event) async for event in stream] == [Disconnected]


# Migration and run state.


async def migration_status(other: QMPClient, *wanted: str) -> str:
    """Wait until the migration is in one of the states *wanted*."""
    while True:
        reply: Any = await other.execute("query-migrate")
        if reply.get("status") in wanted:
            return str(reply["status"])
        await asyncio.sleep(0.01)


async def test_a_vm_that_has_migrated_away_is_left_alone(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm, other_client(guest) as other:
        await vm.plug(1)
        await other.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await migration_status(other, "completed")
        for call in (vm.plug(2), vm.unplug(1)):
            with pytest.raises(StepDeniedError) as caught:
                await call
            assert caught.value.reason is DenialReason.MIGRATED_AWAY


async def test_a_vm_that_migrates_is_left_alone() -> None:
    async with (
        MicroGuest(extra_args=["-m", "512"]) as guest,
        qmpvcpu.attach(guest.qmp) as vm,
        other_client(guest) as other,
    ):
        await other.execute("migrate-set-parameters", {"max-bandwidth": 10_000})  # minutes for its empty pages
        await other.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await migration_status(other, "active")
        with pytest.raises(CommandRejectedError, match="the VM is migrating") as rejected:
            await vm.plug(2)  # nobody told us, but QEMU knows
        assert rejected.value.hint
        with exchange() as sent, pytest.raises(StepDeniedError) as caught:
            await vm.plug(2)  # now we know
        assert caught.value.reason is DenialReason.MIGRATING
        assert "device_add" not in sent
        await other.execute("migrate_cancel")
        await migration_status(other, "cancelled", "failed")
        assert await vm.plug(2) == {2}


async def test_the_run_state_is_announced(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm, other_client(guest) as other:
        stream = vm.events()
        await other.execute("stop")
        await other.execute("cont")
        seen = await until(stream, VmResumed)
        assert [type(event) for event in seen] == [VmStopped, VmResumed]


# Machines that are different.


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_a_machine_without_hotplug_can_be_read_but_not_changed(on: Substrate) -> None:
    async with QemuProcess(on.qemu, ["-M", "microvm", "-accel", "tcg", "-m", "16", "-smp", "2", "-S"]) as process:
        await process.wait_ready()
        async with qmpvcpu.attach(process.qmp) as vm:
            assert vm.layout.enabled == {0, 1}
            assert not vm.capabilities.can_plug
            assert not vm.capabilities.can_unplug
            with pytest.raises(UnsupportedMachineError, match="'microvm' has no hotpluggable CPUs"):
                await vm.plug(1)
            with pytest.raises(UnsupportedMachineError, match="'microvm' does not give CPUs back"):
                await vm.unplug(1)
            assert (await vm.refresh()).enabled == {0, 1}


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_a_machine_that_is_not_made_yet_has_its_slots_already(on: Substrate) -> None:
    arguments = ["-M", "q35", "-accel", "tcg", "-m", "16", "-smp", "1,maxcpus=4", "-preconfig"]
    async with QemuProcess(on.qemu, arguments) as process:
        await process.wait_ready()
        async with qmpvcpu.attach(process.qmp) as vm:
            assert vm.layout.max == 4
            assert not vm.layout.enabled
            with pytest.raises(StepDeniedError, match="has not built the machine yet"):
                await vm.plug(1)


@pytest.mark.parametrize("on", [p for p in substrates(["q35"], accels=["tcg"]) if p.values[0].version != "7.2"])
async def test_a_qemu_that_ends_at_a_plug_is_told_with_what_is_known_of_it(on: Substrate) -> None:
    async with running(on, max_vcpus=3, topology="sockets=3") as (guest, vm):
        for _ in range(2):
            await vm.plug(1)
            await vm.unplug(1)
        with pytest.raises(OutcomeUnknownError, match="more vCPUs were ever created than maxcpus") as caught:
            await vm.plug(1, allow_fatal=True)
        assert "known of this QEMU: " in caught.value.why
        assert f"its process, {guest.process.pid}, has ended" in str(caught.value)


@ON_Q35
async def test_what_the_vm_is_and_can(on: Substrate) -> None:
    known = "3f0f1f63-6c4c-4f52-a6e7-0d4a9d8d6d8c"
    async with running(on, extra_args=["-name", "web-1", "-uuid", known]) as (_, vm):
        info = vm.layout.vm
        assert (info.name, info.uuid, info.arch) == ("web-1", known, "x86_64")
        assert info.machine.startswith("pc-q35-")
        assert info.memory_kib == 16 * 1024
        assert info.topology is not None
        assert (info.topology.sockets, info.topology.cores, info.topology.threads) == (2, 2, 2)
        assert ".".join(map(str, info.qemu_version)).startswith(on.version)
        can = vm.capabilities
        assert (can.can_plug, can.can_unplug, can.accelerator) == (True, True, on.accel)
        assert (KnownFault.TCG_REPLUG_CORRUPTS_HEAP in can.known_faults) == (not on.survives_plug_after_unplug)


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_a_vm_that_libvirt_runs_keeps_its_boot_vcpus(on: Substrate) -> None:
    secret = ["-object", "secret,id=masterKey0,data=YWJjZA==,format=base64"]
    async with running(on, boot=2, extra_args=secret) as (_, vm):
        assert vm.layout.vm.libvirt_owned
        assert not vm.layout[1].hotpluggable
        with pytest.raises(StepDeniedError) as caught:
            await vm.unplug(1)
        assert caught.value.reason is DenialReason.LIBVIRT_OWNED
        assert await vm.unplug(1, allow_boot_vcpus=True) == {1}


@pytest.mark.parametrize("on", [p for p in substrates(["q35"], accels=["tcg"]) if p.values[0].version != "7.2"])
async def test_an_apic_id_beyond_255_needs_x2apic(on: Substrate) -> None:
    async with running(on, max_vcpus=258, topology="sockets=258") as (guest, vm):
        aborts = KnownFault.TCG_APIC_ID_255 in vm.capabilities.known_faults
        assert aborts == (on.version == "10.0")
        # 11.1 answers with an error where 10.0 would abort.
        with pytest.raises(StepDeniedError if aborts else CommandRejectedError, match=r"(?i)x2apic"):
            await vm.plug(256)
        assert await vm.plug(254) == {254}
        assert guest.process.returncode is None
    async with running(on, max_vcpus=258, topology="sockets=258", extra_args=["-cpu", "qemu64,x2apic=on"]) as (_, vm):
        assert await vm.plug(256) == {256}


# The record.


async def test_the_record_follows_the_vm(guest: MicroGuest, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    async with qmpvcpu.attach(guest.qmp, name="web", record=path) as vm:
        assert b"<vcpu placement='static' current='1'>8</vcpu>" in path.read_bytes()
        await vm.plug(3)
        assert b"<vcpu id='3' enabled='yes' hotpluggable='yes' order='2'/>" in path.read_bytes()
        await vm.plug(1)
        await vm.unplug(3)
        recorded = path.read_bytes()
        assert b"<vcpu id='3' enabled='no' hotpluggable='yes'/>" in recorded
        assert b"<vcpu id='1' enabled='yes' hotpluggable='yes' order='2'/>" in recorded
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["vm.xml"]  # noqa: PTH208 - no temporary file is left
    async with qmpvcpu.attach(guest.qmp, name="web", record=path) as vm:
        again = domainxml.read_identity(path.read_bytes())
        assert again.name == "web"
        assert again.uuid == domainxml.read_identity(recorded).uuid  # made up once
        assert again.metadata is not None
        instance = again.metadata.instance
        assert instance is not None
        assert instance.host_tid == vm.layout[0].host_tid
        assert instance.start_ticks is not None


async def test_a_late_answer_reaches_the_record_without_anyone_waiting(guest: MicroGuest, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    await guest.set_behaviour(Behaviour.hanging())
    async with qmpvcpu.attach(guest.qmp, name="web", record=path) as vm:
        await vm.plug(3)
        await vm.request_unplug(3)
        await guest.set_behaviour(Behaviour.complying())
        await vm.wait_for(lambda layout: 3 not in layout.enabled, timeout=10)
    assert b"<vcpu id='3' enabled='no'" in path.read_bytes()


async def test_a_late_answer_that_cannot_be_recorded_is_told_in_the_log(
    guest: MicroGuest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    await guest.set_behaviour(Behaviour.hanging())
    async with qmpvcpu.attach(guest.qmp, name="web", record=folder / "vm.xml") as vm:
        await vm.plug(3)
        await vm.request_unplug(3)
        await vm.wait_for(lambda layout: 3 in layout.pending, timeout=10)
        await vm._driver.request(Persist())
        shutil.rmtree(folder)
        await guest.set_behaviour(Behaviour.complying())
        await vm.wait_for(lambda layout: 3 not in layout.enabled, timeout=10)
    assert "vm.xml" in caplog.text


@pytest.mark.parametrize("content", [b"<domain type='kvm'><name>web</name><devices/></domain>", b"garbage", b""])
async def test_a_file_that_is_no_record_of_ours_is_left_alone(
    guest: MicroGuest, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=str(path)):
        await qmpvcpu.attach(guest.qmp, name="web", record=path)
    assert path.read_bytes() == content
    async with qmpvcpu.attach(guest.qmp):  # and QEMU is free again
        pass


async def test_another_vms_record_is_left_alone(guest: MicroGuest, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    async with qmpvcpu.attach(guest.qmp, name="web", record=path):
        pass
    before = path.read_bytes()
    async with MicroGuest() as other:
        with pytest.raises(RecordError, match="db"):
            await qmpvcpu.attach(other.qmp, name="db", record=path)
    assert path.read_bytes() == before


async def test_nothing_is_sent_whose_intent_cannot_be_recorded(guest: MicroGuest, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    async with qmpvcpu.attach(guest.qmp, name="web", record=folder / "vm.xml") as vm:
        await vm.plug(2)
        shutil.rmtree(folder)
        with exchange() as sent:
            for change in (vm.plug(3), vm.unplug(2), vm.set_map("0,5")):
                with pytest.raises(RecordError, match="No such file or directory") as caught:
                    await change
                assert caught.value.outcome is qmpvcpu.Outcome.UNCHANGED
        assert not {"device_add", "device_del"} & set(sent)
        assert vm.layout.enabled == {0, 2}
        assert not vm.layout.pending
        folder.mkdir()
        await vm.set_map("0,4")
        assert b"<vcpu id='4' enabled='yes'" in (folder / "vm.xml").read_bytes()


@pytest.mark.parametrize("change", ["plug", "unplug", "set_map"])
async def test_what_is_done_and_cannot_be_recorded_is_an_error_that_says_so(
    guest: MicroGuest, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()

    def lose_the_folder(record: logging.LogRecord) -> bool:
        if record.qmp.get("execute") in {"device_add", "device_del"}:  # type: ignore[attr-defined]  # the monitor's
            while folder.exists():  # a save that goes on puts a file into it, and then it is not empty
                shutil.rmtree(folder, ignore_errors=True)
        return True

    async with qmpvcpu.attach(guest.qmp, name="web", record=folder / "vm.xml") as vm:
        await vm.plug(2)
        work: dict[str, Callable[[], Awaitable[object]]] = {
            "plug": lambda: vm.plug(3),
            "unplug": lambda: vm.unplug(2),
            "set_map": lambda: vm.set_map("0,5"),
        }
        logger = logging.getLogger("qmpvcpu.qmp")
        logger.setLevel(logging.DEBUG)
        logger.addFilter(lose_the_folder)
        try:
            with pytest.raises(RecordError, match="and not recorded") as caught:
                await work[change]()
        finally:
            logger.removeFilter(lose_the_folder)
            logger.setLevel(logging.NOTSET)
        assert caught.value.outcome is qmpvcpu.Outcome.CHANGED


# Streams.


async def test_a_subscriber_that_falls_behind_is_told_so() -> None:
    stream = EventStream(asyncio.get_running_loop(), capacity=2)
    for generation in range(1, 4):
        stream.push(VcpuPlugged(generation=generation, ids=VcpuMap([generation])))
    stream.close()
    seen = [event async for event in stream]
    assert [type(event) for event in seen] == [LayoutChanged, VcpuPlugged]
    assert isinstance(seen[0], LayoutChanged)
    assert seen[0].resync
    assert seen[1].generation == 3


async def test_a_second_task_that_waits_for_a_stream_is_refused_and_the_first_is_served() -> None:
    stream = EventStream(asyncio.get_running_loop())
    first = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="another task waits"):
        await anext(stream)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    event = VcpuPlugged(generation=1, ids=VcpuMap([1]))
    stream.push(event)
    assert await second is event


async def test_a_burst_of_events_in_a_map_is_told_at_once_and_before_the_loss(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        stream, driver = vm.events(), vm._driver
        vm._engine._map_intent = Intent(VcpuMap({0}), VcpuMap({0}), ())
        for event in (RunEvent.STOP, RunEvent.RESUME, RunEvent.STOP):
            driver._heard(event)
        assert stream.take() is None
        await asyncio.sleep(0)
        first = stream.take()
        assert isinstance(first, VmStopped)
        driver._heard(RunEvent.RESUME)
        driver._lost(MonitorLostError("gone"))
        stream._queue.appendleft(first)
    assert [type(event) async for event in stream] == [
        VmStopped,
        VmResumed,
        VmStopped,
        VmResumed,
        Disconnected,
    ]


async def test_a_stream_that_is_dropped_is_forgotten(guest: MicroGuest) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        stream = vm.events()
        assert len(vm._driver.subscribers._streams) == 1
        del stream
        assert len(vm._driver.subscribers._streams) == 0
        assert isinstance(vm, VcpuController)


async def test_a_call_from_another_event_loop_says_so() -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        calls: tuple[Callable[[], Awaitable[object]], ...] = (
            vm.refresh,
            lambda: vm.plug(2),
            lambda: vm.set_map("0"),
            vm.wait_settled,
            vm.guest_answers,
            lambda: anext(vm.events()),
            vm.close,
        )
        for call in calls:
            with pytest.raises(RuntimeError, match="another event loop"):
                await asyncio.to_thread(in_a_loop_of_its_own, call)
        assert await vm.plug(2) == {2}


def in_a_loop_of_its_own(call: Callable[[], Awaitable[object]]) -> None:
    async def calling() -> None:
        async with asyncio.timeout(5):
            await call()

    asyncio.run(calling())


async def test_a_loss_leaves_unknown_only_what_was_asked_for(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    vm = await qmpvcpu.attach(guest.qmp)
    await vm.plug(1)
    request = await vm.request_unplug(1)
    calls: list[Awaitable[object]] = [request.wait(), vm.unplug(1), vm.wait_settled()]
    before = [asyncio.ensure_future(each) for each in calls]
    await asyncio.sleep(0)
    await vm.close()
    late: list[Awaitable[object]] = [vm.plug(3), vm.refresh(), vm.set_map("0"), request.wait()]
    errors = await asyncio.gather(*before, *late, return_exceptions=True)
    outcomes = [error.outcome.name for error in errors if isinstance(error, MonitorLostError)]
    sent, nothing = "UNKNOWN", "UNCHANGED"
    assert outcomes == [sent, sent, nothing, nothing, nothing, nothing, sent]


async def test_an_attach_that_was_not_awaited_says_so(guest: MicroGuest) -> None:
    forgotten: Any = qmpvcpu.attach(guest.qmp)
    with pytest.raises(AttributeError, match=r"attach\(\) was not awaited, so there is no 'plug' yet"):
        await forgotten.plug(2)
