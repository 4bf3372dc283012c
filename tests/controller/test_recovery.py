"""What the next look makes of a transition that was cut short, and of removals that only the record knows."""

import asyncio
import sys
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import OnFailure, RecordError, Recovery, TransitionError, TransitionOutcome, VcpuMap
from qmpvcpu.events import Disconnected, InstanceChanged
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.controller.vms import until
from tests.exchange import exchange

pytestmark = pytest.mark.qemu

DIES = """
import asyncio, os, sys
import qmpvcpu
async def main(address, record, wish, until):
    vm = await qmpvcpu.attach(address, record=record)
    asyncio.create_task(vm.set_map(wish, timeout=20))
    await vm.wait_for(lambda layout: eval(until, {"layout": layout}))
    os._exit(9)
asyncio.run(main(*sys.argv[1:]))
"""


async def cut_short(guest: MicroGuest, record: Path, wish: str, when: str) -> None:
    """Have a process of its own begin *wish*, and die once the layout is so."""
    arguments = [sys.executable, "-c", DIES, str(guest.qmp), str(record), wish, when]
    process = await asyncio.create_subprocess_exec(*arguments)
    assert await process.wait() == 9


async def test_what_was_cut_short_is_found_and_reported_and_left(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(behaviour=Behaviour.hanging()) as guest:
        await cut_short(guest, record, "0-2", "len(layout.enabled) == 3")
        await cut_short(guest, record, "0,5", "layout.pending")
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            assert vm.interrupted is not None
            assert vm.interrupted.start == {0, 1, 2}
            assert vm.interrupted.target == {0, 5}
            with exchange() as sent:
                report = await vm.recover(Recovery.REPORT)
            assert report is not None
            assert report.outcome is TransitionOutcome.PARTIAL
            assert not {"device_add", "device_del"} & set(sent)
            assert str(report.steps[0]) == "plug 5: PLUGGED"
            assert vm.interrupted is not None


@pytest.mark.parametrize(("how", "left"), [(Recovery.FINISH, "0,5"), (Recovery.REVERT, "0-2")])
async def test_what_was_cut_short_is_finished_or_reverted(tmp_path: Path, how: Recovery, left: str) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(behaviour=Behaviour.slow(100)) as guest:
        await cut_short(guest, record, "0-2", "len(layout.enabled) == 3")
        await cut_short(guest, record, "0,5", "layout.pending")
        # The guest serves one removal at a time: the second is asked for, and QEMU tells nobody.
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            report = await vm.recover(how)
            assert report is not None
            assert vm.interrupted is None
            assert await vm.recover(Recovery.REPORT) is None
            await vm.wait_for(lambda layout: layout.enabled == VcpuMap.parse(left) and not layout.pending, timeout=10)
        assert b"transition" not in record.read_bytes()


async def test_the_record_tells_whether_anything_was_begun(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest() as guest:
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            info = vm.record_info
            assert info is not None
            assert (info.path, info.found) == (str(record), 0)
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            before = vm.record_info
            assert before is not None
            assert info.saves <= before.found < before.saves  # attaching writes too
            with pytest.raises(qmpvcpu.PlanError):
                await vm.plug(99)
            assert vm.record_info == before
        await cut_short(guest, record, "0-6", "len(layout.enabled) == 4")
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            after = vm.record_info
            assert after is not None
            assert after.found > before.saves
        async with qmpvcpu.attach(guest.qmp) as vm:
            assert vm.record_info is None


async def test_attach_itself_can_finish(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest() as guest:
        await cut_short(guest, record, "0-6", "len(layout.enabled) == 4")
        async with qmpvcpu.attach(guest.qmp, record=record, on_interrupted=Recovery.FINISH) as vm:
            assert vm.interrupted is None
            assert vm.layout.enabled == VcpuMap.parse("0-6")


async def test_attach_that_cannot_finish_leaves_nothing_attached(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(behaviour=Behaviour.hanging()) as guest:
        await cut_short(guest, record, "0-2", "len(layout.enabled) == 3")
        await cut_short(guest, record, "0", "layout.pending")
        await guest.set_behaviour(Behaviour.refusing(0x82))
        with pytest.raises(TransitionError):
            async with qmpvcpu.attach(guest.qmp, record=record, on_interrupted=Recovery.FINISH):
                raise AssertionError("attached")
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:  # and not locked
            assert vm.layout.enabled == {0, 1, 2}


async def test_a_new_map_supersedes_what_was_cut_short(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest() as guest:
        await cut_short(guest, record, "0-6", "len(layout.enabled) == 4")
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            assert vm.interrupted is not None
            await vm.set_map("0,7")
            assert vm.interrupted is None
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            assert vm.interrupted is None


async def test_a_word_that_is_none_of_the_three_is_refused(tmp_path: Path) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, record=tmp_path / "vm.xml") as vm:
        with pytest.raises(TypeError, match=r"how is one of Recovery\.REPORT, Recovery\.FINISH, Recovery\.REVERT"):
            await vm.recover("undo")  # type: ignore[arg-type]  # that is the point
        assert await vm.recover(Recovery.REVERT) is None


async def test_a_silent_removal_is_known_from_the_record_and_may_be_asked_for_again(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(behaviour=Behaviour.silent()) as guest:
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            await vm.plug(3)
            await vm.request_unplug(3)
        async with qmpvcpu.attach(guest.qmp) as vm:
            assert not vm.layout.pending  # QEMU tells nobody
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            assert vm.layout.pending == {3}
            await guest.set_behaviour(Behaviour.complying())
            with exchange() as sent:
                assert await vm.unplug(3, timeout=10) == {3}
            assert "device_del" in sent


async def test_another_run_of_qemu_voids_what_was_pending(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with (
        MicroGuest(behaviour=Behaviour.hanging()) as guest,
        qmpvcpu.attach(guest.qmp, name="web", record=record) as vm,
    ):
        await vm.set_map("0,3")
        with pytest.raises(TransitionError):
            await vm.set_map("0,4", timeout=0.1, on_failure=OnFailure.CONTINUE)
        assert vm.layout.pending == {3}
    async with MicroGuest() as other, qmpvcpu.attach(other.qmp, name="web", record=record) as vm:
        assert vm.interrupted is None
        assert not vm.layout.pending
        assert isinstance((await until(vm.events(), InstanceChanged))[-1], InstanceChanged)
        assert b'<qmpvcpu:desired vcpus="0,4"/>' in record.read_bytes()


async def test_the_record_is_free_once_the_connection_is_given_up(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest() as guest:
        vm = await qmpvcpu.attach(guest.qmp, name="web", record=record)
        events = vm.events()
        guest.process.kill()
        await until(events, Disconnected)
    async with MicroGuest() as other:
        while True:
            try:
                async with qmpvcpu.attach(other.qmp, name="web", record=record) as again:
                    assert again.layout.enabled == {0}
                    break
            except RecordError:
                await asyncio.sleep(0.01)
    await vm.close()
