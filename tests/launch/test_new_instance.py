"""A VM whose QEMU has been replaced: what the earlier one had is kept until the new one has it."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import Outcome, RecordError, Recovery, StepDeniedError, TransitionOutcome, VcpuController
from qmpvcpu.domainxml import parse, read_identity
from qmpvcpu.errors import ReplayMismatchError
from qmpvcpu.events import InstanceChanged, Reconnected
from qmpvcpu.launch import LaunchArguments, arguments
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from qmpvcpu.record.config import DomainConfig
from qmpvcpu.testing import MicroGuest, QemuProcess
from tests.controller.vms import until
from tests.exchange import exchange
from tests.launch.vms import qemu_of
from tests.substrates import Substrate, substrates

pytestmark = [pytest.mark.qemu, pytest.mark.kvm]

EVERY = substrates(("q35",), accels=("kvm",))
ONE = EVERY[-1:]
WHO = ("-name", "vm", "-uuid", "8e9a45f1-0b52-4f1e-9d0c-3a5a7f6b2c11")
TOPOLOGY = Topology(8, sockets=2, cores=2, threads=2)
HAD = PreviousVcpus(8, VcpuMap([0]), (0, 5, 3, 2), TOPOLOGY)


@contextlib.asynccontextmanager
async def earlier(on: Substrate) -> AsyncIterator[MicroGuest]:
    async with MicroGuest(on.qemu, accel=on.accel, extra_args=WHO) as guest:
        yield guest


async def make_holes(on: Substrate, record: Path) -> None:
    """Have a VM with holes, plugged in an order of its own, and kill it."""
    async with earlier(on) as guest, qmpvcpu.attach(guest.qmp, record=record) as vm:
        await vm.set_map("0,5")
        await vm.plug(3)
        await vm.plug(2)
        assert vm.layout.order == HAD.order


@contextlib.asynccontextmanager
async def stopped(on: Substrate, record: Path, *more: str) -> AsyncIterator[QemuProcess]:
    """A new QEMU, started with the machine alone, as the record says; its guest does not run."""
    built = arguments(parse(record.read_bytes()))
    async with qemu_of(on, built, *WHO, *built.boot_argv, "-S", *more) as process:
        await process.wait_ready()
        yield process


def kept(record: Path) -> PreviousVcpus | None:
    metadata = read_identity(record.read_bytes()).metadata
    assert metadata is not None
    return metadata.previous


@pytest.mark.parametrize("on", EVERY)
async def test_what_the_earlier_qemu_had_is_kept_until_the_new_one_has_it(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    assert kept(record) is None
    async with stopped(on, record) as process, qmpvcpu.attach(process.qmp, record=record) as vm:
        assert vm.layout.order == (0,)
        assert vm.previous == kept(record) == HAD
        assert vm.previous.enabled == vm.desired == VcpuMap.parse("0,2-3,5")
        report = await vm.replay()
        assert [step.ids for step in report.steps] == [VcpuMap([5]), VcpuMap([3]), VcpuMap([2])]
        assert vm.layout.order == HAD.order
        assert vm.previous is None
        assert vm.desired == HAD.enabled
    assert kept(record) is None
    assert parse(record.read_bytes()).order == (5, 3, 2)


@pytest.mark.parametrize("on", ONE)
@pytest.mark.parametrize("form", ["bytes", "parsed", "previous"])
async def test_the_record_itself_is_replayed_as_what_it_keeps_though_attaching_rewrote_it(
    on: Substrate, tmp_path: Path, form: str
) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    async with stopped(on, record) as process, qmpvcpu.attach(process.qmp, record=record) as vm:
        data = record.read_bytes()
        assert parse(data).enabled == {0}  # the VM as it runs
        source: Any = {"bytes": data, "parsed": parse(data), "previous": vm.previous}[form]
        await vm.replay(source)
        assert vm.layout.order == HAD.order
        assert vm.previous is None
        # It is so now, and a replay of what the record now says finds nothing left to do.
        assert (await vm.replay(record.read_bytes())).steps == ()


DYING = """
import asyncio, os, sys, qmpvcpu

async def main():
    vm = await qmpvcpu.attach(sys.argv[1], record=sys.argv[2])
    if sys.argv[3] == "replaying":
        asyncio.create_task(vm.replay(in_flight=1))
        await vm.wait_for(lambda layout: len(layout.enabled) > 1)
    os._exit(9)

asyncio.run(main())
"""


async def die(process: QemuProcess, record: Path, when: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DYING, str(process.qmp), str(record), when, stdin=asyncio.subprocess.DEVNULL
    )
    assert await child.wait() == 9


@pytest.mark.parametrize("on", ONE)
@pytest.mark.parametrize("when", ["attached", "replaying"])
async def test_nothing_is_lost_if_controller_and_qemu_are_killed_before_it_is_replayed(
    on: Substrate, tmp_path: Path, when: str
) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    for _ in range(2):
        async with stopped(on, record) as process:
            await die(process, record, when)
            assert kept(record) == HAD
    async with stopped(on, record) as process:
        await die(process, record, when)
        async with qmpvcpu.attach(process.qmp, record=record) as vm:  # the same QEMU, which lives
            assert vm.previous == HAD
            assert (vm.interrupted is not None) == (when == "replaying")
            await vm.replay()
            assert vm.layout.order == HAD.order
            assert vm.previous is None
            assert vm.interrupted is None


@pytest.mark.parametrize("on", ONE)
async def test_a_replay_that_is_reverted_leaves_it_kept_and_one_that_is_finished_does_not(
    on: Substrate, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    async with stopped(on, record) as process:
        await die(process, record, "replaying")
        async with qmpvcpu.attach(process.qmp, record=record) as vm:
            report = await vm.recover(Recovery.FINISH)
            assert report is not None
            assert report.outcome is TransitionOutcome.REACHED
            assert vm.layout.order == HAD.order
            assert vm.previous is None
        assert kept(record) is None


CHANGES = {
    "a map": lambda vm: vm.set_map("0-1"),
    "a count": lambda vm: vm.set_count(2),
    "a plug": lambda vm: vm.plug(4),
}


@pytest.mark.parametrize("on", ONE)
@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_supersedes_what_is_kept(on: Substrate, tmp_path: Path, change: str) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    async with stopped(on, record) as process:
        async with qmpvcpu.attach(process.qmp, record=record) as vm:
            await CHANGES[change](vm)
            assert vm.previous is None
            await is_not_replayed(vm)
        assert kept(record) is None
        async with qmpvcpu.attach(process.qmp, record=record) as vm:
            assert vm.previous is None


async def is_not_replayed(vm: VcpuController) -> None:
    with pytest.raises(ReplayMismatchError, match="nothing is kept of an earlier QEMU") as caught, exchange() as sent:
        await vm.replay()
    assert caught.value.outcome is Outcome.UNCHANGED
    assert "device_add" not in sent


@pytest.mark.parametrize("on", ONE)
async def test_what_changes_nothing_supersedes_nothing_and_dropping_does(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    async with stopped(on, record) as process:
        async with qmpvcpu.attach(process.qmp, record=record) as vm:
            with pytest.raises(StepDeniedError):
                await vm.set_map("1")
            with pytest.raises(StepDeniedError):
                await vm.plug(0)
            await vm.refresh()
            assert vm.plan("0-3").steps
            assert vm.previous == kept(record) == HAD
            await vm.drop_previous()
            assert vm.previous is None
            await vm.drop_previous()
            await is_not_replayed(vm)
        assert kept(record) is None
        assert arguments(parse(record.read_bytes())).device_argv == []


@pytest.mark.parametrize("on", ONE)
async def test_a_change_that_cannot_be_recorded_supersedes_nothing(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "record" / "vm.xml"
    record.parent.mkdir()
    await make_holes(on, record)
    async with stopped(on, record) as process, qmpvcpu.attach(process.qmp, record=record) as vm:
        record.parent.rename(tmp_path / "elsewhere")
        for change in (lambda: vm.set_map("0-1"), lambda: vm.plug(4), vm.drop_previous):
            with pytest.raises(RecordError):
                await change()
            assert vm.previous == HAD
        (tmp_path / "elsewhere").rename(record.parent)
        await vm.replay()
        assert vm.layout.order == HAD.order


@pytest.mark.parametrize("on", ONE)
async def test_nothing_is_kept_of_a_qemu_that_the_new_one_is_like_from_its_start(
    on: Substrate, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    devices = arguments(parse(record.read_bytes())).device_argv
    async with stopped(on, record, *devices) as process, qmpvcpu.attach(process.qmp, record=record) as vm:
        assert vm.layout.order == HAD.order
        assert vm.previous is None
        assert kept(record) is None


@pytest.mark.parametrize("on", ONE)
async def test_a_qemu_with_another_topology_is_not_given_what_is_kept(on: Substrate, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    other = LaunchArguments("1,maxcpus=8,sockets=8,cores=1,threads=1", "qemu64")
    for _ in range(2):  # the second time its own topology is in the document
        async with qemu_of(on, other, *WHO, *other.boot_argv, "-S") as process:
            await process.wait_ready()
            async with qmpvcpu.attach(process.qmp, record=record) as vm:
                with pytest.raises(ReplayMismatchError, match="sockets 8, not 2"):
                    await vm.replay()
    assert arguments(parse(record.read_bytes())).smp == "1,maxcpus=8,sockets=2,dies=1,cores=2,threads=2"


@pytest.mark.parametrize("on", ONE)
async def test_a_next_boot_that_was_asked_for_is_what_the_new_qemu_is_started_with_and_given(
    on: Substrate, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    await make_holes(on, record)
    async with DomainConfig.open(record) as config:
        config.set_map("0,2,5-6")
        await config.save()
    wished = (0, 5, 2, 6)  # what stays keeps its place
    for _ in range(2):  # also once attaching has rewritten the record
        built = arguments(parse(record.read_bytes()))
        assert [device["id"] for device in built.device_add] == ["vcpu5", "vcpu2", "vcpu6"]
        async with stopped(on, record) as process, qmpvcpu.attach(process.qmp, record=record) as vm:
            assert vm.previous == HAD
            assert (await DomainConfig.load(record)).domain.enabled == VcpuMap.parse("0,2,5-6")
    async with stopped(on, record) as process, qmpvcpu.attach(process.qmp, record=record) as vm:
        await vm.replay()
        assert vm.layout.order == wished
        assert vm.previous is None
        assert (await vm.replay(record.read_bytes())).steps == ()


@pytest.mark.parametrize("on", ONE)
@pytest.mark.parametrize("with_record", [True, False])
async def test_a_qemu_that_takes_the_place_of_another_while_attached_can_be_given_what_that_had(
    on: Substrate, tmp_path: Path, *, with_record: bool
) -> None:
    record, address = tmp_path / "vm.xml", tmp_path / "vm.qmp"
    async with contextlib.AsyncExitStack() as first, contextlib.AsyncExitStack() as second:
        guest = await first.enter_async_context(earlier(on))
        address.symlink_to(guest.qmp)
        vm = await second.enter_async_context(
            qmpvcpu.attach(address, record=record if with_record else None, reconnect=True)
        )
        await vm.set_map("0,5")
        await vm.plug(3)
        await vm.plug(2)
        events = vm.events()
        built = arguments(vm.layout)
        await first.aclose()
        process = await second.enter_async_context(qemu_of(on, built, *WHO, *built.boot_argv, "-S"))
        await process.wait_ready()
        address.unlink()
        address.symlink_to(process.qmp)
        seen = await until(events, Reconnected)
        assert any(isinstance(event, InstanceChanged) for event in seen)
        assert vm.previous == HAD
        await vm.replay()
        assert vm.layout.order == HAD.order
        assert vm.previous is None
