"""The same with the micro-guest, on every QEMU and accelerator; and what QEMU does with a target that does not fit.

What no QEMU can do under TCG: bring a VM away once vCPUs have left it. What 7.2 cannot do: under TCG it dies at a
plug after an unplug, so a VM that arrives there may be unplugged from and not plugged into after that (the controller
denies it); and it has no ``file:`` to migrate to, only ``exec:``.
"""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import DenialReason, RecordError, StepDeniedError, VcpuMap
from qmpvcpu.errors import TakeBackError, TargetLostError, TargetMismatchError
from qmpvcpu.events import InstanceChanged, Origin, VcpuUnplugged
from qmpvcpu.migration import check_target, confirm_target
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.planning.compatibility import DifferenceKind, Severity
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.controller.vms import other_client, running, until
from tests.migration.moving import call, ended, keep, move, rebuild, restore, save, waiting
from tests.substrates import Substrate, qemus, substrates

pytestmark = pytest.mark.qemu
EVERYWHERE = pytest.mark.parametrize("on", substrates(["q35"]))
UNDER_KVM = pytest.mark.parametrize("on", substrates(["q35"], accels=["kvm"]))
EVERY_MACHINE = pytest.mark.parametrize("on", substrates())
HOLES = (0, 2, 5)
NAMED: dict[str, Any] = {"name": "vm"}


def kinds(error: TargetMismatchError) -> list[DifferenceKind]:
    return [each.kind for each in error.differences]


@EVERY_MACHINE
async def test_a_vm_with_holes_moves_live_and_is_changed_where_it_arrived(on: Substrate) -> None:
    async with running(on, attach=NAMED) as (source, vm):
        for vcpu in (5, 2, 3):
            await vm.plug(vcpu)
        async with await vm.export() as export, waiting(on, boot=len(export.state.started_with)) as (target, there):
            assert [slot.first for slot in export.state.plugged_after] == [5, 2, 3]
            await rebuild(export.state, there)
            assert await check_target(export, there) == ()
            assert await move(source, target) == "completed"
            assert await confirm_target(export, there) == ()
            await call(source, "quit")
            await target.set_behaviour(Behaviour.complying())  # it lives, and listens
            await there.plug(6)
            assert await there.unplug(5) == {5}
            assert there.layout.enabled == {0, 2, 3, 6}
            if on.survives_plug_after_unplug:
                await there.plug(5)
            else:
                with pytest.raises(StepDeniedError) as denied:
                    await there.plug(5)
                assert denied.value.reason is DenialReason.FATAL


@EVERYWHERE
async def test_a_vm_is_saved_to_a_file_and_restored(on: Substrate, tmp_path: Path) -> None:
    async with running(on, attach=NAMED, boot=HOLES) as (source, vm):
        export = await vm.export()
        assert await save(source, tmp_path / "saved") == "completed"
        assert await export.changes() == ()
        await call(source, "quit")
    async with waiting(on, boot=HOLES) as (target, there):
        assert await check_target(export.state, there) == ()
        await restore(target, tmp_path / "saved")
        assert await confirm_target(export.state, there) == ()
        assert await there.unplug(5) == {5}


@EVERYWHERE
async def test_other_ids_and_another_order_are_notes(on: Substrate) -> None:
    async with running(on, attach=NAMED, boot=HOLES) as (source, vm), waiting(on) as (target, there):
        export = await vm.export()
        for vcpu, device_id in ((5, "cpu-five"), (2, "vcpu2")):
            slot = there.layout.slot_of(vcpu)
            await call(target, "device_add", driver=slot.type, id=device_id, **slot.props)
        notes = await check_target(export, there)
        assert [(each.kind, each.source, each.target) for each in notes] == [
            (DifferenceKind.DEVICE_ID, "vcpu5", "cpu-five"),
            (DifferenceKind.ORDER, "0,2,5", "0,5,2"),
        ]
        assert await move(source, target) == "completed"
        assert await confirm_target(export, there) == notes
        assert await confirm_target(export, there) == notes  # as often as one likes
        assert await there.unplug(5) == {5}


@EVERYWHERE
@pytest.mark.parametrize("behaviour", [Behaviour.silent(), Behaviour.hanging()], ids=["unseen", "worked on"])
async def test_a_pending_removal_migrates_and_fires_where_it_arrived(on: Substrate, behaviour: Behaviour) -> None:
    async with (
        running(on, attach=NAMED, boot=HOLES, behaviour=behaviour) as (source, vm),
        waiting(on, boot=HOLES) as (target, there),
    ):
        request = await vm.request_unplug(5)
        if behaviour == Behaviour.hanging():
            await vm.wait_for(lambda layout: layout.pending)
        export = await vm.export(settle=0.1)
        assert (export.state.pending, request.verdict) == (VcpuMap([5]), None)
        (note,) = await check_target(export, there)
        assert (note.kind, note.ids) == (DifferenceKind.PENDING, VcpuMap([5]))
        assert await move(source, target) == "completed"
        await confirm_target(export, there)
        assert there.layout.pending == {5}
        news = there.events()
        await target.set_behaviour(Behaviour.complying())
        await target.scan_slots()
        gone = (await until(news, VcpuUnplugged))[-1]
        assert isinstance(gone, VcpuUnplugged)
        assert (gone.ids, gone.late, gone.origin) == (VcpuMap([5]), True, Origin.US)
        assert there.layout.enabled == {0, 2}


@EVERYWHERE
@pytest.mark.parametrize("behaviour", [Behaviour.silent(), Behaviour.hanging()], ids=["unseen", "worked on"])
async def test_a_record_moves_along_with_the_removal_that_is_pending_in_it(
    on: Substrate, behaviour: Behaviour, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    async with contextlib.AsyncExitStack() as ours, contextlib.AsyncExitStack() as theirs:
        options = {**NAMED, "record": record}
        source, vm = await ours.enter_async_context(running(on, attach=options, boot=HOLES, behaviour=behaviour))
        target, there = await theirs.enter_async_context(waiting(on, boot=HOLES))
        with pytest.raises(RecordError, match="no VM has arrived"):
            await qmpvcpu.attach(target.sockets[1], **NAMED, record=record, arrived=True)
        await vm.request_unplug(5)
        assert await move(source, target) == "completed"
        await confirm_target(ExportedState(await vm.refresh()), there)
        await there.close()
        await vm.close()
        # The source waits to be quit, and it is the source's record until somebody says otherwise.
        with pytest.raises(RecordError, match="arrived=True"):
            await qmpvcpu.attach(target.qmp, **NAMED, record=record)
        await ours.aclose()
        for arrived in (True, False):  # and from then on it is the target's
            async with qmpvcpu.attach(target.qmp, **NAMED, record=record, arrived=arrived) as vm:
                assert vm.layout.pending == {5}
                assert vm.desired == {0, 2}
                assert vm.previous is None
        async with qmpvcpu.attach(target.qmp, **NAMED, record=record, arrived=True) as vm:
            news = vm.events()
            await target.set_behaviour(Behaviour.complying())
            await target.scan_slots()
            seen = await until(news, VcpuUnplugged)
            assert not any(isinstance(event, InstanceChanged) for event in seen)
            assert isinstance(gone := seen[-1], VcpuUnplugged)
            assert (gone.ids, gone.late, gone.origin) == (VcpuMap([5]), True, Origin.US)
            assert vm.layout.enabled == {0, 2}


async def test_nothing_arrives_in_a_qemu_that_no_vm_has_migrated_into(tmp_path: Path) -> None:
    async with MicroGuest() as guest:
        with pytest.raises(RecordError, match="no VM has migrated into this QEMU"):
            await qmpvcpu.attach(guest.qmp, **NAMED, record=tmp_path / "vm.xml", arrived=True)
        assert list(tmp_path.iterdir()) == []


@EVERYWHERE
async def test_a_removal_that_was_answered_before_the_arrival_was_confirmed_is_a_note(on: Substrate) -> None:
    async with (
        running(on, attach=NAMED, boot=HOLES, behaviour=Behaviour.silent()) as (source, vm),
        waiting(on, boot=HOLES) as (target, there),
    ):
        await vm.request_unplug(5)
        export = await vm.export()
        assert await move(source, target) == "completed"
        await target.set_behaviour(Behaviour.complying())
        await target.scan_slots()
        await there.wait_for(lambda layout: 5 not in layout.enabled)
        (note,) = await confirm_target(export, there)
        assert (note.kind, note.ids, note.refuses) == (DifferenceKind.PENDING, VcpuMap([5]), False)


@UNDER_KVM  # under TCG the migration may hang after that
async def test_a_vcpu_that_left_on_the_way_is_found_on_the_source(on: Substrate) -> None:
    async with (
        running(on, attach=NAMED, boot=HOLES, behaviour=Behaviour.silent()) as (source, vm),
        waiting(on, boot=HOLES) as (target, there),
    ):
        await vm.request_unplug(5)
        export = await vm.export()
        await check_target(export, there)
        await source.set_behaviour(Behaviour.complying())
        await source.scan_slots()  # the guest answers between the export and the migration
        await vm.wait_for(lambda layout: 5 not in layout.enabled)
        assert await move(source, target) == "completed"  # QEMU says nothing
        with pytest.raises(TargetMismatchError, match="left the source after the export") as found:
            await confirm_target(export, there)
        assert [(each.kind, each.ids, each.severity) for each in found.value.differences] == [
            (DifferenceKind.EXTRA_VCPU, VcpuMap([5]), Severity.SILENT)
        ]
        assert await there.unplug(5) == {5}  # as the error advises


# A target that does not fit.


@EVERYWHERE
async def test_a_target_that_lacks_a_slot_is_refused_and_would_have_lost_the_vm(
    on: Substrate, tmp_path: Path
) -> None:
    async with (
        running(on, attach=NAMED, boot=HOLES) as (source, vm),
        waiting(on, boot=(0, 2)) as (target, there),
    ):
        export = await vm.export()
        with pytest.raises(TargetMismatchError) as refused:
            await check_target(export, there)
        (missing,) = refused.value.differences
        assert (missing.kind, missing.ids, missing.severity) == (
            DifferenceKind.MISSING_VCPU,
            VcpuMap([5]),
            Severity.KILLS,
        )
        # What happens to those who do not ask. Through a pipe the source never hears of the target's end; over a
        # socket it is chance whether it does (the misfits below).
        assert await save(source, tmp_path / "saved") == "completed"
        await restore(target, tmp_path / "saved")
        assert await target.process.wait() == 1
        with pytest.raises(TargetLostError, match="The source still has the VM, even where it reports completed"):
            await confirm_target(export, there)
        with pytest.raises(TakeBackError, match="must say so"):
            await export.take_back(destination_is_gone=False)
        assert (await call(source, "query-status"))["status"] == "postmigrate"
        await export.take_back(destination_is_gone=True)
        assert not export.locked
        await source.set_behaviour(Behaviour.complying())
        await vm.plug(3)
        assert await vm.unplug(3) == {3}


@EVERYWHERE
async def test_a_target_with_a_slot_too_many_is_refused_and_would_be_accepted_silently(on: Substrate) -> None:
    async with (
        running(on, attach=NAMED, boot=HOLES) as (source, vm),
        waiting(on, boot=(0, 2, 5, 6)) as (target, there),
    ):
        export = await vm.export()
        with pytest.raises(TargetMismatchError) as refused:
            await check_target(export, there)
        (extra,) = refused.value.differences
        assert (extra.kind, extra.ids, extra.severity) == (DifferenceKind.EXTRA_VCPU, VcpuMap([6]), Severity.SILENT)
        assert await move(source, target) == "completed"
        with pytest.raises(TargetMismatchError) as found:
            await confirm_target(export, there)
        assert kinds(found.value) == [DifferenceKind.EXTRA_VCPU]
        assert await there.unplug(6) == {6}
        assert await confirm_target(export, there) == ()


# What each difference is, and whether the target dies of it.
MISFITS: dict[str, tuple[dict[str, Any], list[DifferenceKind], bool]] = {
    "maximum": (
        {"max_vcpus": 16, "topology": "sockets=4,cores=2,threads=2"},
        [DifferenceKind.MAXIMUM, DifferenceKind.TOPOLOGY],
        True,
    ),
    "machine type": ({"machine": "pc"}, [DifferenceKind.MACHINE], True),
    "memory": ({"extra_args": ["-m", "32"]}, [DifferenceKind.MEMORY], True),
    "other places": ({"topology": "sockets=1,cores=4,threads=2"}, [DifferenceKind.TOPOLOGY], False),
    "uuid": ({"extra_args": ["-uuid", "c0ffee00-0000-4000-8000-000000000001"]}, [DifferenceKind.UUID], False),
}


@pytest.mark.parametrize("misfit", MISFITS)
@EVERYWHERE
async def test_a_misfit_is_refused_and_does_what_it_is_said_to_do(on: Substrate, misfit: str) -> None:
    options, expected, kills = MISFITS[misfit]
    options = {"machine": on.machine, "accel": on.accel, "boot": HOLES, "incoming": True} | options
    async with (
        running(on, attach=NAMED, boot=HOLES) as (source, vm),
        MicroGuest(on.qemu, **options) as target,
        qmpvcpu.attach(target.qmp, name="vm") as there,
    ):
        export = await vm.export()
        with pytest.raises(TargetMismatchError) as refused:
            await check_target(export, there)
        assert kinds(refused.value) == expected
        said = await move(source, target)
        if not kills:
            assert {each.severity for each in refused.value.differences} == {Severity.SILENT}
            assert said == "completed"
            await target.set_behaviour()
            assert (await call(target, "query-status"))["status"] == "running"
            return
        assert Severity.KILLS in {each.severity for each in refused.value.differences}
        assert await target.process.wait() == 1
        with pytest.raises(TargetLostError):
            await confirm_target(export, there)
        await keep(export, source, said)
        await vm.plug(3)


@UNDER_KVM
async def test_another_cpu_type_kills_a_target_under_kvm(on: Substrate) -> None:
    async with (
        running(on, attach=NAMED, boot=HOLES) as (source, vm),
        waiting(on, boot=HOLES, extra_args=["-cpu", "qemu32"]) as (target, there),
    ):
        export = await vm.export()
        with pytest.raises(TargetMismatchError) as refused:
            await check_target(export, there)
        assert [(each.kind, each.severity) for each in refused.value.differences] == [
            (DifferenceKind.CPU_TYPE, Severity.KILLS)
        ]
        said = await move(source, target)
        assert await target.process.wait() != 0
        await keep(export, source, said)


@pytest.mark.kvm
async def test_a_vm_goes_back_to_an_older_qemu_only_if_its_owner_says_so() -> None:
    old, new = qemus()["7.2"], qemus()["10.0"]
    options: dict[str, Any] = {"machine": "pc-q35-7.2", "accel": "kvm", "boot": HOLES}
    async with (
        MicroGuest(new, **options) as source,
        MicroGuest(old, incoming=True, **options) as target,
        qmpvcpu.attach(source.qmp, name="vm") as vm,
        qmpvcpu.attach(target.qmp, name="vm") as there,
    ):
        export = await vm.export()
        with pytest.raises(TargetMismatchError) as refused:
            await check_target(export, there)
        assert kinds(refused.value) == [DifferenceKind.QEMU_VERSION]
        (note,) = await check_target(export, there, accept=[DifferenceKind.QEMU_VERSION])
        assert note.kind is DifferenceKind.QEMU_VERSION
        assert await move(source, target) == "completed"
        await confirm_target(export, there)
        await there.plug(3)
        assert await there.unplug(3) == {3}


@pytest.mark.kvm
async def test_a_vm_of_kvm_is_not_for_tcg() -> None:
    qemu = qemus()["10.0"]
    async with (
        MicroGuest(qemu, accel="kvm") as source,
        MicroGuest(qemu, accel="tcg", incoming=True) as target,
        qmpvcpu.attach(source.qmp, name="vm") as vm,
        qmpvcpu.attach(target.qmp, name="vm") as there,
    ):
        with pytest.raises(TargetMismatchError) as refused:
            await check_target(await vm.export(), there)
        assert [(each.kind, each.severity) for each in refused.value.differences] == [
            (DifferenceKind.ACCELERATOR, Severity.KILLS)
        ]
        await move(source, target)
        assert await target.process.wait() == 1


# A target in another state.


@EVERYWHERE
async def test_a_target_that_does_not_wait_is_refused(on: Substrate) -> None:
    async with running(on, attach=NAMED) as (_, vm), running(on, attach=NAMED) as (other, elsewhere):
        export = await vm.export()
        with pytest.raises(TargetMismatchError, match="-incoming defer") as refused:
            await check_target(export, elsewhere)
        (state,) = refused.value.differences
        assert (state.kind, state.target, state.severity) == (DifferenceKind.RUN_STATE, "running", Severity.NOT_BEGUN)
        with pytest.raises(Exception, match="incoming"):
            await call(other, "migrate-incoming", uri="exec:cat /dev/null")
        with pytest.raises(TargetLostError, match="nothing has migrated into it"):
            await confirm_target(export, elsewhere)  # the same vCPUs, and another VM


@EVERYWHERE
async def test_a_vm_that_arrives_paused_has_arrived(on: Substrate) -> None:
    async with running(on, attach=NAMED) as (source, vm), waiting(on, extra_args=["-S"]) as (target, there):
        export = await vm.export()
        assert await move(source, target) == "completed"
        assert await confirm_target(export, there) == ()
        assert (await call(target, "query-status"))["status"] == "paused"


@EVERYWHERE
async def test_a_vm_that_has_not_arrived_in_time_is_not_confirmed(on: Substrate) -> None:
    async with running(on, attach=NAMED) as (_, vm), waiting(on) as (target, there):
        export = await vm.export()
        with pytest.raises(TargetLostError, match=r"after 0\.05 s it has run state inmigrate"):
            await confirm_target(export, there, timeout=0.05)
        assert target.process.returncode is None


@EVERYWHERE
async def test_a_confirmation_may_be_waited_for_before_the_vm_arrives(on: Substrate) -> None:
    async with running(on, attach=NAMED, boot=HOLES) as (source, vm), waiting(on, boot=HOLES) as (target, there):
        export = await vm.export()
        confirming = asyncio.create_task(confirm_target(export, there))
        assert await move(source, target) == "completed"
        assert await confirming == ()


@EVERYWHERE
async def test_a_new_controller_takes_back_a_vm_that_was_left_behind(on: Substrate) -> None:
    async with running(on, attach=NAMED, boot=HOLES) as (source, vm):
        export = await vm.export()
        await save(source, Path("/dev/null"))
        await vm.close()
        assert not export.locked
        async with qmpvcpu.attach(source.qmp) as again:
            with pytest.raises(StepDeniedError) as denied:
                await again.export()
            assert denied.value.reason is DenialReason.MIGRATED_AWAY
            layout = await again.take_back(destination_is_gone=True)
            assert layout.enabled == VcpuMap(HOLES)
            await again.plug(3)


@EVERYWHERE
async def test_a_target_that_is_paused_by_its_owner_is_not_taken_back(on: Substrate) -> None:
    async with running(on, attach=NAMED) as (source, vm):
        await call(source, "stop")
        with pytest.raises(TakeBackError, match="run state paused, migration none") as refused:
            await vm.take_back(destination_is_gone=True)
        assert refused.value.run_state == "paused"
        assert (await call(source, "query-status"))["status"] == "paused"


@EVERYWHERE
async def test_what_was_wanted_goes_along_and_is_on_disk_before_the_source_may_be_quit(
    on: Substrate, tmp_path: Path
) -> None:
    async with (
        running(on, attach={"name": "vm", "record": tmp_path / "source.xml"}, behaviour=Behaviour.hanging()) as (
            source,
            vm,
        ),
        MicroGuest(on.qemu, machine=on.machine, accel=on.accel, incoming=True) as target,
        qmpvcpu.attach(target.qmp, name="vm", record=tmp_path / "target.xml") as there,
    ):
        await vm.plug(4)
        await vm.plug(2)
        await vm.request_unplug(4)
        export = await vm.export()
        assert (export.state.enabled, export.state.desired) == (VcpuMap([0, 2, 4]), VcpuMap([0, 2]))
        await rebuild(export.state, there)
        assert await move(source, target) == "completed"
        await confirm_target(export, there)
        record = qmpvcpu.domainxml.read_identity((tmp_path / "target.xml").read_bytes()).metadata
        assert record is not None
        assert (record.desired, record.pending) == (VcpuMap([0, 2]), VcpuMap([4]))
        # Another look takes nothing over again: the guest's answer, and a new wish, stand.
        await target.set_behaviour(Behaviour.complying())
        await there.wait_settled()
        await there.unplug(2)
        with pytest.raises(TargetMismatchError):
            await confirm_target(export.state, there)
        assert there.layout.pending == set()


HANGS = [on for on in substrates(["q35"], accels=["tcg"]) if on.values[0].version in {"7.2", "10.0"}]


@pytest.mark.parametrize("on", HANGS)
async def test_a_vm_under_tcg_is_not_exported_once_a_vcpu_has_left_since_its_migration_would_hang(
    on: Substrate,
) -> None:
    async with running(on, boot=HOLES) as (source, vm), other_client(source) as vmm:
        for vcpu in (5, 2):
            await vm.unplug(vcpu)
        with pytest.raises(StepDeniedError, match="may never get a migration out of its setup") as denied:
            await vm.export()
        assert denied.value.reason is DenialReason.FATAL
        async with await vm.export(allow_fatal=True):
            await vmm.execute("migrate", {"uri": "exec:cat >/dev/null"})
            assert await ended(vmm, within=1) == "setup"  # elsewhere it takes 0.05 s
            await vmm.execute("migrate_cancel")
            assert await ended(vmm, within=1) == "cancelling"
            status: Any = await vmm.execute("query-status")
            assert status["running"]  # the VM itself goes on


@pytest.mark.parametrize("on", [on for on in substrates(["q35"], accels=["tcg"]) if on not in HANGS])
async def test_a_newer_qemu_moves_a_vm_under_tcg_that_vcpus_have_left(on: Substrate) -> None:
    async with running(on, attach=NAMED, boot=HOLES) as (source, vm), waiting(on, boot=1) as (target, there):
        for vcpu in (5, 2):
            await vm.unplug(vcpu)
        export = await vm.export()
        assert await move(source, target) == "completed"
        await confirm_target(export, there)
        assert there.layout.enabled == {0}
