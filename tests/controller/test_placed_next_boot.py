"""Where threads run from the next boot on follows a change of the running VM, or is changed alone; on a real QEMU."""

import asyncio
import os
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import Affect, DomainConfig, Place, Placement, Recovery, VcpuMap
from qmpvcpu.domainxml import Metadata, parse, read_identity
from qmpvcpu.events import InstanceChanged
from qmpvcpu.model.placement import PlacementPolicy
from qmpvcpu.model.transition import ConfigOutcome
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.controller.test_next_boot import died_writing
from tests.controller.vms import until
from tests.domainxml.domains import document, domain_of_rows

pytestmark = pytest.mark.qemu

HERE = min(os.sched_getaffinity(0))
PIN = VcpuMap([HERE])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The document of a VM that is started with vCPUs 0 and 1 of 8."""
    path = tmp_path / "config.xml"
    path.write_bytes(document(domain_of_rows("00------")))
    return path


def pins(path: Path) -> dict[int, VcpuMap]:
    return dict(parse(path.read_bytes()).pins)


def metadata_of(record: Path) -> Metadata:
    found = read_identity(record.read_bytes()).metadata
    assert found is not None
    return found


async def next_pins(path: Path) -> dict[int, VcpuMap]:
    return dict((await DomainConfig.load(path)).domain.pins)


async def test_a_plug_in_its_place_is_so_at_the_next_boot_and_the_record_follows(
    config: Path, tmp_path: Path
) -> None:
    record = tmp_path / "record.xml"
    async with (
        MicroGuest(boot=2) as guest,
        qmpvcpu.attach(guest.qmp, name="vm", record=record, config=config) as vm,
    ):
        await vm.plug(3, placement=Placement({3: Place(PIN)}), affect=Affect.BOTH)
        assert pins(config) == pins(record) == {3: PIN}
        await vm.unplug(3)
        assert pins(record) == {3: PIN}, "it is kept for when it is plugged again"
        await vm.plug(4, placement=Placement({4: Place(PIN)}), affect=Affect.CONFIG)
        assert pins(config) == {3: PIN, 4: PIN}
        assert pins(record) == {3: PIN}


async def test_places_alone_change_in_a_record_and_its_next_boot_follows_the_vm_in_all_else(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(boot=2) as guest:
        async with qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm:
            await vm.host.place(Placement({1: Place(PIN)}), affect=Affect.CONFIG)
            await vm.plug(3)
            assert metadata_of(record).next_boot is None
            assert pins(record) == {}
        assert await next_pins(record) == {1: PIN}
        assert (await DomainConfig.load(record)).domain.enabled == {0, 1, 3}


async def test_another_qemu_starts_with_the_places_of_the_next_boot(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm:
        await vm.host.place(Placement({0: Place(PIN)}))
        await vm.host.place(Placement({1: Place(PIN)}), affect=Affect.CONFIG)
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp, name="vm", record=record) as vm:
        assert vm.host.placement == Placement({0: Place(PIN), 1: Place(PIN)})
        await vm.plug()
        assert pins(record) == {0: PIN, 1: PIN}


CALL = f"vm.plug(5, placement=qmpvcpu.Placement.pinned({{5: '{HERE}'}}), affect=Affect.BOTH)"


async def test_who_dies_between_the_two_has_the_places_written_by_recover(config: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.xml"
    async with MicroGuest(boot=2) as guest:
        await died_writing(guest, record, config, CALL)
        assert pins(config) == {}
        intent = metadata_of(record).intent
        assert intent is not None
        assert intent.next_placement is not None
        async with qmpvcpu.attach(guest.qmp, name="vm", record=record, config=config) as vm:
            assert vm.host.placement.of_vcpu(5) == Place(PIN)
            report = await vm.recover(Recovery.FINISH)
            assert report is not None
            assert report.config is not None
            assert report.config.outcome is ConfigOutcome.WRITTEN
    assert pins(config) == pins(record) == {5: PIN}
    assert metadata_of(record).intent is None


async def test_a_record_keeps_its_promise_of_places_in_one_file(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    wish = Placement({2: Place(PIN)})
    async with (
        MicroGuest(boot=2, behaviour=Behaviour.hanging()) as guest,
        qmpvcpu.attach(guest.qmp, record=record) as vm,
    ):
        asking = asyncio.create_task(vm.set_map("0,2", placement=wish, affect=Affect.BOTH))
        await vm.wait_for(lambda layout: 1 in layout.pending)
        promised = metadata_of(record)
        assert promised.intent is not None
        assert promised.intent.next_placement is not None
        assert promised.next_placement is None
        await guest.set_behaviour(Behaviour.complying())
        await asking
        kept = metadata_of(record)
        assert kept.intent is None
        assert kept.next_boot == {0, 2}
        assert pins(record) == {2: PIN}


async def test_a_qemu_that_takes_the_place_of_another_has_the_places_of_the_next_boot(tmp_path: Path) -> None:
    record, socket, name = tmp_path / "vm.xml", tmp_path / "qmp", ("-name", "vm")
    async with MicroGuest(extra_args=name) as one, MicroGuest(extra_args=name) as two:
        socket.symlink_to(one.qmp)
        wish = Placement({0: Place(PIN)}, exclusive=True, policy=PlacementPolicy.PREFERRED)
        async with qmpvcpu.attach(socket, record=record, placement=wish, reconnect=True) as vm:
            await vm.host.place(Placement({1: Place(PIN)}), affect=Affect.CONFIG)
            stream = vm.events()
            socket.unlink()
            socket.symlink_to(two.qmp)
            one.process.kill()
            await until(stream, InstanceChanged)
            assert vm.host.placement == Placement({0: Place(PIN), 1: Place(PIN)}, policy=PlacementPolicy.PREFERRED)
            await vm.plug(1)
            assert pins(record) == {0: PIN, 1: PIN}
