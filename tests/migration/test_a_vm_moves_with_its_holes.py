"""The story: a Linux whose vCPU map has holes moves to another QEMU, goes on, and is changed there."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import Proof, VcpuController, VcpuMap
from qmpvcpu.errors import TargetLostError, TargetMismatchError
from qmpvcpu.migration import Export, check_target, confirm_target
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.planning.compatibility import DifferenceKind
from qmpvcpu.testing.linuxguest import LinuxGuest
from tests.migration.moving import call, keep, move, rebuild, restore, save, send
from tests.substrates import qemus

pytestmark = pytest.mark.guest

# Linux runs under TCG here, where 7.2 dies at the first plug after an unplug: what arrives could not be changed.
# Nor may a vCPU leave before the VM moves, since a migration may then hang under TCG: the holes are there from the
# start.
QEMU = "10.0"


@pytest.fixture
def qemu() -> Path:
    return qemus()[QEMU]


@pytest.fixture
async def source(qemu: Path) -> AsyncIterator[LinuxGuest]:
    async with LinuxGuest(qemu, accel="tcg", boot=1) as guest:
        yield guest


@pytest.fixture
async def vm(source: LinuxGuest, tmp_path: Path) -> AsyncIterator[VcpuController]:
    """vCPUs 0, 3, 5 and 6 of 8, plugged as 5, 3, 6."""
    async with qmpvcpu.attach(source.qmp, name="story", record=tmp_path / "source.xml") as vm:
        for vcpu in (5, 3, 6):
            await vm.plug(vcpu, proof=Proof.ACKNOWLEDGED, require_proof=True)
        await source.wait_online(lambda cpus: len(cpus) == 4)
        assert vm.layout.enabled == VcpuMap.parse("0,3,5-6")
        assert vm.layout.order == (0, 5, 3, 6)
        yield vm


@contextlib.asynccontextmanager
async def target_for(state: ExportedState, qemu: Path) -> AsyncIterator[tuple[LinuxGuest, VcpuController]]:
    """A QEMU that was started from *state*, and waits for the VM."""
    async with (
        LinuxGuest(qemu, accel="tcg", boot=len(state.started_with), incoming=True) as guest,
        qmpvcpu.attach(guest.qmp, name="story", record=guest.process.directory / "target.xml") as vm,
    ):
        await rebuild(state, vm)
        yield guest, vm


async def test_a_linux_moves_live_and_is_changed_where_it_arrived(
    vm: VcpuController, source: LinuxGuest, qemu: Path, tmp_path: Path
) -> None:
    # Linux numbers CPUs as it meets them: its 0-3 are vCPUs 0, 5, 3 and 6.
    its_own = await source.online()
    assert its_own == VcpuMap.parse("0-3")

    # The VM is exported, which keeps its vCPUs as they are, and the export travels as JSON.
    async with await vm.export() as export:
        state = ExportedState.from_json(export.to_json())
        with pytest.raises(qmpvcpu.StepDeniedError, match="the VM is exported"):
            await vm.plug(4)

        # The target is built from it, and checked before anything moves: nothing differs, not even ids and order.
        async with target_for(state, qemu) as (target, there):
            assert there.layout.order == vm.layout.order
            assert await check_target(state, there) == ()

            # It moves, it has arrived, and only now the source may be quit.
            assert await move(source, target) == "completed"
            assert await confirm_target(export, there) == ()
            assert (await vm.refresh()).enabled == state.enabled
            await call(source, "quit")

            # Linux goes on with the CPUs that it had, and takes and gives more of them.
            assert await target.online() == its_own
            await there.plug(1, proof=Proof.ACKNOWLEDGED, require_proof=True)
            assert len(await target.wait_online(lambda cpus: len(cpus) == 5)) == 5
            assert await there.unplug(5) == {5}
            # vCPU 5 was its CPU 1.
            assert await target.wait_online(lambda cpus: len(cpus) == 4) == VcpuMap.parse("0,2-4")
            assert there.layout.enabled == VcpuMap.parse("0-1,3,6")
            record = (target.process.directory / "target.xml").read_bytes()
            assert b"<vcpu placement='static' current='4'>8</vcpu>" in record
    assert b"<vcpu id='5' enabled='yes' hotpluggable='yes' order='2'/>" in (tmp_path / "source.xml").read_bytes()


@pytest.mark.parametrize("scheme", ["exec", "file"])
async def test_a_linux_is_saved_to_a_file_and_restored(
    vm: VcpuController, source: LinuxGuest, qemu: Path, tmp_path: Path, scheme: str
) -> None:
    its_own, file = await source.online(), tmp_path / "saved"
    export: Export = await vm.export()
    # Saving is a migration to nowhere: the source is left in postmigrate, and its VM is in the file.
    saved = save(source, file) if scheme == "exec" else send(source, f"file:{file}")
    assert await saved == "completed"
    assert await export.changes() == ()
    await call(source, "quit")
    async with target_for(export.state, qemu) as (target, there):
        assert [each.kind for each in await check_target(export.state, there) if each.refuses] == []
        if scheme == "exec":
            await restore(target, file)
        else:
            await call(target, "migrate-incoming", uri=f"file:{file}")
        assert await confirm_target(export.state, there, timeout=30) == ()
        assert await target.online() == its_own
        assert await there.unplug(3) == {3}
        await there.plug(2, proof=Proof.ACKNOWLEDGED, require_proof=True)
        assert len(await target.wait_online(lambda cpus: len(cpus) == 4)) == 4
        assert there.layout.enabled == VcpuMap.parse("0,2,5-6")


async def test_a_linux_whose_target_died_goes_on_where_it_was(
    vm: VcpuController, source: LinuxGuest, qemu: Path
) -> None:
    its_own = await source.online()
    export = await vm.export()
    async with target_for(export.state, qemu) as (target, there):
        # Somebody takes another target, and does not ask whether it fits: vCPU 6 is missing.
        async with (
            LinuxGuest(qemu, accel="tcg", boot=1, incoming=True) as other,
            qmpvcpu.attach(other.qmp, name="story") as elsewhere,
        ):
            for vcpu in (5, 3):
                await elsewhere.plug(vcpu)
            with pytest.raises(TargetMismatchError) as refused:
                await check_target(export, elsewhere)
            assert [(each.kind, each.ids) for each in refused.value.differences] == [
                (DifferenceKind.MISSING_VCPU, VcpuMap([6]))
            ]
            said = await move(source, other)
            await other.process.wait()
            with pytest.raises(TargetLostError, match="do not quit it"):
                await confirm_target(export, elsewhere)
        # Even if the source says "completed" the VM is not lost.
        await keep(export, source, said)
        assert await source.online() == its_own
        await vm.plug(4, proof=Proof.ACKNOWLEDGED, require_proof=True)
        assert len(await source.wait_online(lambda cpus: len(cpus) == 5)) == 5
        # The first target does not fit any more, and says so.
        with pytest.raises(TargetMismatchError, match="lacks: the source has vCPU 4, the target none"):
            await check_target(await vm.export(), there)
        assert target.process.returncode is None
