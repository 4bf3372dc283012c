"""vCPUs of real QEMUs in their place on this host: from birth, by /proc; and what happens where that cannot be."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import DenialReason, Proof, Recovery, StepDeniedError, VcpuController, VcpuMap, qapi
from qmpvcpu.engine.vmstate import VmState
from qmpvcpu.errors import HostError, Outcome, PlacementError, TransitionError
from qmpvcpu.events import Disconnected, InstanceChanged, PlaceDrifted, VcpuPlaced, VcpuUnplugged
from qmpvcpu.host.birthplace import Birthplace
from qmpvcpu.host.finding import Found
from qmpvcpu.model.layout import CpuProps, Layout, Slot
from qmpvcpu.model.placement import CoreScheduling, Place, Placement, PlacementPolicy, QemuThread, ThreadKind
from qmpvcpu.model.vm import VmInfo, VmStatus
from qmpvcpu.qapi import ThreadReading
from qmpvcpu.testing import Behaviour, MicroGuest, best_qemu
from qmpvcpu.vm.placing import Move, Placer
from tests.controller.vms import other_client, running, until
from tests.host.conftest import MakeCgroup, Sleeper, make_cgroup, root
from tests.substrates import Substrate, substrates
from tests.waiting import until as wait_until

__all__ = ["make_cgroup", "root"]  # fixtures

pytestmark = pytest.mark.qemu

HOME = VcpuMap(os.sched_getaffinity(0))
FIRST, LAST = str(HOME.lowest), str(max(HOME))
STARTING = Behaviour.complying().starting()
ROOT = Path(qmpvcpu.__file__).parents[1]
ONE_CPU = "this host has one CPU"


@pytest.fixture(autouse=True)
def two_host_cpus() -> None:
    if len(HOME) == 1:
        pytest.skip(ONE_CPU)


# What the kernel tells.


def affinity(tid: int) -> VcpuMap:
    return VcpuMap(os.sched_getaffinity(tid))


def tids_of(pid: int) -> set[int]:
    return {int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()}


def ran_only_on(thread: QemuThread, cpus: str) -> None:
    """Assert that the kernel knows of no moment at which *thread* was anywhere else than on one host CPU."""
    directory = Path("/proc", str(thread.tid))
    status = dict(line.split(":\t", 1) for line in (directory / "status").read_text().splitlines())
    assert status["Cpus_allowed_list"].strip() == cpus
    sched = dict(line.split(":") for line in (directory / "sched").read_text().splitlines() if ":" in line)
    moves = {name.strip(): value.strip() for name, value in sched.items()}["se.nr_migrations"]
    assert moves == "0", "it was moved from another host CPU"
    assert (directory / "stat").read_text().rpartition(")")[2].split()[36] == cpus


async def check_threads(vm: VcpuController, guest: MicroGuest, pins: dict[int, str]) -> None:
    """The vCPUs that are pinned ran nowhere else, and all other threads are where QEMU's main thread was."""
    assert affinity(guest.process.pid) == HOME
    threads = await vm.host.threads()
    of = {thread.vcpu: thread for thread in threads if thread.vcpu is not None}
    for vcpu, cpus in pins.items():
        ran_only_on(of[vcpu], cpus)
    rest = [thread for thread in threads if thread.vcpu not in pins]
    assert {thread.found.cpus for thread in rest} == {HOME}, rest


class Sampler:
    """Watches a process's threads as fast as it can: where each new one is, from the first look at it."""

    def __init__(self, pid: int) -> None:
        self.seen: dict[int, set[VcpuMap]] = {}
        self._pid = pid
        self._end = False
        self._before = tids_of(pid)
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._end:
            for tid in tids_of(self._pid) - self._before:
                with contextlib.suppress(ProcessLookupError):
                    self.seen.setdefault(tid, set()).add(affinity(tid))


@contextlib.contextmanager
def held_birth(vm: VcpuController, cpus: str) -> Iterator[Birthplace]:
    """Inside, QEMU's main thread is there, as while a vCPU is being born."""
    birthplace = vm._driver.placer.birthplace
    birthplace.begin(VcpuMap.parse(cpus), 0)
    try:
        yield birthplace
    finally:
        birthplace.end()


# In their place.


@pytest.mark.parametrize("on", substrates(["q35"]))
async def test_a_vcpu_runs_in_its_place_from_its_first_instruction(on: Substrate) -> None:
    async with running(on, behaviour=STARTING, attach={"placement": Placement.pinned({3: LAST})}) as (guest, vm):
        stream = vm.events()
        with Sampler(guest.process.pid) as sampler:
            assert await vm.plug(3, proof=Proof.STARTED) == {3}
        placed = (await until(stream, VcpuPlaced))[-1]
        assert isinstance(placed, VcpuPlaced)
        assert placed.ids == {3}
        assert placed.why_not == ""
        (places,) = sampler.seen.values()
        assert places == {VcpuMap.parse(LAST)}
        await check_threads(vm, guest, {3: LAST})
        await vm.plug(4)
        await check_threads(vm, guest, {3: LAST})


@pytest.mark.parametrize("on", substrates(["q35"]))
@pytest.mark.parametrize("turns", [False, True], ids=["equal pins", "different pins"])
async def test_each_vcpu_of_a_map_runs_in_its_place(on: Substrate, turns: bool) -> None:
    pins = {vcpu: FIRST if turns and vcpu % 2 else LAST for vcpu in range(1, 8)}
    async with running(on, behaviour=STARTING, attach={"placement": Placement.pinned(pins)}) as (guest, vm):
        report = await vm.set_map("0-7", proof=Proof.STARTED)
        assert all(step.placed is not None and not step.unplaced for step in report.steps)
        await check_threads(vm, guest, pins)


async def test_a_vcpu_that_is_plugged_again_is_born_in_its_place_again() -> None:
    pins = {vcpu: FIRST if vcpu % 2 else LAST for vcpu in range(1, 16)}
    async with MicroGuest(max_vcpus=64) as guest, qmpvcpu.attach(guest.qmp, placement=Placement.pinned(pins)) as vm:
        for target in ("0-7", "0,2", "0-15"):
            await vm.set_map(target)
        await check_threads(vm, guest, pins)


@pytest.mark.parametrize("turns", [False, True], ids=["equal pins", "different pins"])
async def test_none_of_64_vcpus_ever_ran_outside_its_place(turns: bool) -> None:
    pins = {vcpu: FIRST if turns and vcpu % 2 else LAST for vcpu in range(1, 64)}
    some = [STARTING.for_slot(vcpu) for vcpu in (1, 22, 43, 63)]  # all 64 would keep a host CPU busy for long
    async with (
        MicroGuest(max_vcpus=64, behaviour=[*some, Behaviour.complying()]) as guest,
        qmpvcpu.attach(guest.qmp, placement=Placement.pinned(pins)) as vm,
    ):
        with Sampler(guest.process.pid) as sampler:
            await vm.set_map("0-63")
        await check_threads(vm, guest, pins)
        vcpu_of = {thread.tid: thread.vcpu for thread in await vm.host.threads()}
        seen = {vcpu_of[tid]: {str(place) for place in places} for tid, places in sampler.seen.items()}
        assert seen == {vcpu: {cpus} for vcpu, cpus in pins.items()}


async def test_callers_side_by_side_each_have_their_own_place() -> None:
    pins = {vcpu: FIRST if vcpu % 2 else LAST for vcpu in range(1, 7)}
    async with (
        MicroGuest(behaviour=STARTING) as guest,
        qmpvcpu.attach(guest.qmp, placement=Placement.pinned(pins)) as vm,
    ):
        await asyncio.gather(*(vm.plug(vcpu) for vcpu in range(1, 8)))
        await check_threads(vm, guest, pins)


async def test_two_controllers_at_once_leave_the_main_thread_at_home() -> None:
    pins = [Placement.pinned(dict.fromkeys(range(1, 16), cpus)) for cpus in (FIRST, LAST)]
    async with (
        MicroGuest(max_vcpus=16) as guest,
        qmpvcpu.attach(guest.sockets[0], placement=pins[0]) as one,
        qmpvcpu.attach(guest.sockets[1], placement=pins[1]) as other,
    ):
        for _ in range(5):
            await asyncio.gather(*((one if vcpu % 2 else other).plug(vcpu) for vcpu in range(1, 16)))
            await one.refresh()
            await check_threads(one, guest, {vcpu: FIRST if vcpu % 2 else LAST for vcpu in range(1, 16)})
            await one.set_map("0")
            await other.refresh()


async def test_where_another_program_has_vcpus_born_is_no_drift() -> None:
    wish = Placement(emulator=Place(HOME))
    async with (
        MicroGuest() as guest,
        qmpvcpu.attach(guest.sockets[0]) as one,
        qmpvcpu.attach(guest.sockets[1], placement=wish) as other,
    ):
        with held_birth(one, FIRST):
            assert str(affinity(guest.process.pid)) == FIRST
            await other.refresh()
            assert other.host.drifted == {}
            assert other.host.facts().main_cpus == HOME
            assert not any(thread.drifted for thread in await other.host.threads())
        os.sched_setaffinity(guest.process.pid, VcpuMap.parse(FIRST))
        await other.refresh()
        assert set(other.host.drifted) == {-1}
        assert [thread.name for thread in await other.host.threads() if thread.drifted] == [
            (Path("/proc") / str(guest.process.pid) / "comm").read_text().strip()
        ]


async def test_who_comes_while_another_program_plugs_into_the_same_place_waits_for_its_turn() -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.sockets[0]) as one:
        birth = contextlib.ExitStack()
        birth.enter_context(held_birth(one, LAST))
        async with qmpvcpu.attach(guest.sockets[1]) as other:
            assert not other.host.facts().main_cpus
            plug = asyncio.create_task(other.plug(1, placement=Placement.pinned({1: LAST})))
            for _ in range(5):
                assert (await one.refresh()).enabled == {0}
            birth.close()
            assert await plug == {1}
            await check_threads(other, guest, {1: LAST})


async def test_a_vcpu_gets_its_scheduler_and_is_born_on_its_cpus() -> None:
    placement = Placement({1: Place.on(LAST, "batch"), 2: Place.on(LAST)})
    async with MicroGuest(behaviour=STARTING) as guest, qmpvcpu.attach(guest.qmp, placement=placement) as vm:
        await vm.set_map("0-2")
        await check_threads(vm, guest, {1: LAST, 2: LAST})
        found = {thread.vcpu: str(thread.found.scheduler) for thread in await vm.host.threads()}
        assert (found[1], found[2]) == ("batch", "other")


async def test_the_placement_of_a_call_is_kept() -> None:
    async with MicroGuest(behaviour=STARTING) as guest, qmpvcpu.attach(guest.qmp) as vm:
        assert not vm.host.placement
        await vm.plug(3, placement=Placement.pinned({3: FIRST, 4: LAST}))
        await vm.plug(4)
        await check_threads(vm, guest, {3: FIRST, 4: LAST})


@pytest.mark.parametrize("option", [(), ("-S",)], ids=["paused", "not started"])
async def test_a_vm_that_does_not_run_has_its_vcpus_placed(option: tuple[str, ...]) -> None:
    async with (
        MicroGuest(wait=not option, extra_args=option) as guest,
        other_client(guest) as other,
        qmpvcpu.attach(guest.qmp, placement=Placement.pinned({1: LAST, 2: FIRST})) as vm,
    ):
        if not option:
            await other.execute("stop")
        await vm.set_map("0-2")
        await check_threads(vm, guest, {1: LAST, 2: FIRST})


async def test_a_qemu_in_a_pid_namespace_of_its_own(tmp_path: Path) -> None:
    root = "" if os.geteuid() == 0 else "--map-root-user"
    wrapper = tmp_path / "qemu"
    wrapper.write_text(f'#!/bin/sh\nexec unshare {root} --pid --fork --mount-proc --kill-child {best_qemu()} "$@"\n')
    wrapper.chmod(0o755)
    async with (
        MicroGuest(wrapper, accel="tcg") as guest,
        qmpvcpu.attach(guest.qmp, placement=Placement.pinned({1: LAST, 2: FIRST})) as vm,
    ):
        await vm.set_map("0-2")
        threads = {thread.vcpu: thread for thread in await vm.host.threads() if thread.vcpu is not None}
        ran_only_on(threads[1], LAST)
        ran_only_on(threads[2], FIRST)
        assert threads[1].tid != vm.layout[1].host_tid
        assert threads[0].found.cpus == HOME


async def test_each_thread_of_a_slot_has_a_place_of_its_own() -> None:
    """On pseries a slot holds the vCPUs of a core, which are plugged together."""
    sleepers = [Sleeper() for _ in range(3)]
    ids, tids = (4, 5, 6), tuple(sleeper.tid for sleeper in sleepers)
    boot = Slot(0, 1, "t", CpuProps({}), 0, "/machine/unattached/device[0]", (tids[0],))
    slot = Slot(4, 3, "t", CpuProps({"core-id": 4}), 4, "/machine/peripheral/vcpu4", tids)
    vm = VmInfo("t", "ppc64", "pseries", accelerator="tcg", qemu_version=(10, 0, 2))
    layout = Layout(vm=vm, slots=(boot, slot), creation=(0, 4))
    placement = Placement({4: Place.on(FIRST), 5: Place.on(LAST, "batch")})
    status = VmStatus("running")
    state = VmState(layout, status=status, single_threaded=False, answers={}, now=0.0, placement=placement)
    placer = Placer(state, Here)  # type: ignore[arg-type]  # a stand-in
    for tid in tids:
        os.sched_setaffinity(tid, VcpuMap.parse(FIRST))
    readings = [
        ThreadReading("/machine/peripheral/vcpu4", tid, each, CpuProps({}))
        for each, tid in zip(ids, tids, strict=True)
    ]
    assert placer.place([slot], readings, placer.birthplace.snapshot()) == {4: ""}
    assert [str(affinity(tid)) for tid in tids] == [FIRST, LAST, str(HOME)]
    for sleeper in sleepers:
        sleeper.end()
    assert placer.place([slot], readings, placer.birthplace.snapshot()) == {4: "its thread has ended"}


class Here:
    """A session with this process."""

    lost = None

    def find_qemu(self, _tids: object) -> Found:
        return Found(os.getpid())


# What is born with them.


async def create_files(client: QMPClient, folder: Path, count: int) -> None:
    """Have QEMU create files in the background, for which it makes workers."""
    for number in range(count):
        options = {"driver": "file", "filename": str(folder / str(number)), "size": 1 << 20}
        await client.execute("blockdev-create", {"job-id": f"create{number}", "options": options})


@pytest.mark.parametrize("how", ["scheduler", "pin"])
async def test_a_worker_that_was_born_with_a_vcpu_goes_home(tmp_path: Path, how: str) -> None:
    place = Place.on(LAST, "batch" if how == "scheduler" else None)
    async with MicroGuest(extra_args=("-object", "iothread,id=io0")) as guest:
        before = tids_of(guest.process.pid)
        async with (
            other_client(guest) as other,
            qmpvcpu.attach(guest.qmp, placement=Placement({1: place, 2: Place.on(LAST)})) as vm,
        ):
            with held_birth(vm, LAST):
                await create_files(other, tmp_path, 4)
                await wait_until(lambda: tids_of(guest.process.pid) - before)
                born = tids_of(guest.process.pid) - before
                assert {affinity(tid) for tid in born} == {VcpuMap.parse(LAST)}
                await vm.plug(1)
            await check_threads(vm, guest, {1: LAST})
            kinds = [thread.kind for thread in await vm.host.threads()]
            assert ThreadKind.IOTHREAD in kinds
            await vm.plug(2)
            await check_threads(vm, guest, {1: LAST, 2: LAST})


async def test_an_iothread_that_was_made_meanwhile_goes_home_and_one_that_was_pinned_stays() -> None:
    async with (
        MicroGuest(extra_args=("-object", "iothread,id=io0")) as guest,
        other_client(guest) as other,
        qmpvcpu.attach(guest.qmp, placement=Placement({1: Place.on(LAST, "batch")})) as vm,
    ):
        (pinned,) = [thread.tid for thread in await vm.host.threads() if thread.kind is ThreadKind.IOTHREAD]
        os.sched_setaffinity(pinned, VcpuMap.parse(LAST))
        with held_birth(vm, LAST):
            await other.execute("object-add", {"qom-type": "iothread", "id": "io1"})
            await vm.plug(1)
        found = {
            thread.tid: thread.found.cpus for thread in await vm.host.threads() if thread.kind is ThreadKind.IOTHREAD
        }
        assert found.pop(pinned) == VcpuMap.parse(LAST)
        assert list(found.values()) == [HOME]


async def test_a_vcpu_that_somebody_else_plugs_meanwhile_goes_home() -> None:
    placement = Placement({1: Place.on(LAST, "batch")})
    async with (
        MicroGuest() as guest,
        other_client(guest) as other,
        qmpvcpu.attach(guest.qmp, placement=placement) as vm,
    ):
        with held_birth(vm, LAST):
            await other.execute("device_add", qapi.device_add(vm.layout.slot_of(5), "/machine/peripheral/theirs"))
            await vm.plug(1)
        await vm.refresh()
        await check_threads(vm, guest, {1: LAST})
        assert vm.layout.enabled == {0, 1, 5}


async def test_vcpus_that_are_born_while_others_are_placed_stay_where_they_are() -> None:
    pins = Placement({vcpu: Place.on(LAST, "batch" if vcpu % 2 else None) for vcpu in range(1, 16)})
    async with MicroGuest(max_vcpus=16) as guest, qmpvcpu.attach(guest.qmp, placement=pins) as vm:
        with Sampler(guest.process.pid) as sampler:
            await asyncio.gather(*(vm.plug(vcpu) for vcpu in range(1, 16)))
        assert set().union(*sampler.seen.values()) == {VcpuMap.parse(LAST)}
        await check_threads(vm, guest, dict.fromkeys(range(1, 16), LAST))


# Moving.


async def test_a_main_thread_that_is_moved_while_a_vcpu_is_born_goes_there_afterwards() -> None:
    async with MicroGuest(behaviour=STARTING) as guest:
        main = guest.process.pid
        async with qmpvcpu.attach(guest.qmp, placement=Placement.pinned({1: FIRST})) as vm:
            with held_birth(vm, FIRST):
                await vm.host.place(Placement(emulator=Place.on(LAST)))
                assert str(affinity(main)) == FIRST, "it bears a vCPU"
                await vm.plug(1)
            assert str(affinity(main)) == LAST
            threads = await vm.host.threads()
            assert {str(each.found.cpus) for each in threads if each.kind is ThreadKind.EMULATOR} == {LAST}
            assert not any(thread.drifted for thread in threads)
            await asyncio.gather(vm.plug(2), vm.host.place(Placement(emulator=Place.on(FIRST))), vm.plug(3))
            assert str(affinity(main)) == FIRST
            threads = await vm.host.threads()
            ran_only_on(next(thread for thread in threads if thread.vcpu == 1), FIRST)
            assert not any(thread.drifted for thread in threads)


async def test_a_place_that_cannot_be_given_gives_everything_back() -> None:
    async with MicroGuest() as guest:
        main = guest.process.pid
        async with qmpvcpu.attach(guest.qmp, placement=Placement.pinned({1: FIRST})) as vm:
            placer = vm._driver.placer
            threads = placer.all_threads()
            with held_birth(vm, FIRST) as birthplace:
                facts = placer.facts()
                beyond = Place.on([4000])
                with pytest.raises(HostError, match="4000"):
                    placer.move([Move(threads[0], Place.on(LAST), HOME), Move(threads[-1], beyond, HOME)], facts)
                assert birthplace.home == HOME
            assert affinity(main) == HOME


async def test_threads_that_end_meanwhile_are_left_out(tmp_path: Path) -> None:
    async with MicroGuest() as guest, other_client(guest) as other, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(1)
        await create_files(other, tmp_path, 2)
        placer = vm._driver.placer
        threads = placer.all_threads()
        await vm.unplug(1)
        assert any(not Path(thread.directory).exists() for thread in threads)
        placer.move([Move(thread, Place.on(LAST), HOME) for thread in threads], placer.facts())
        assert str(affinity(guest.process.pid)) == LAST


async def test_a_vcpu_that_is_plugged_while_threads_are_asked_for_is_moved_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        reader = vm._driver.connection.reader
        read = reader.threads

        async def read_too_early() -> Any:
            monkeypatch.setattr(reader, "threads", read)
            readings = await read()
            await vm.plug(1)
            return readings

        monkeypatch.setattr(reader, "threads", read_too_early)
        await vm.host.place(Placement.pinned({1: LAST}))
        (thread,) = [thread for thread in await vm.host.threads() if thread.vcpu == 1]
        assert str(thread.found.cpus) == LAST
        monkeypatch.setattr(reader, "threads", read_too_early)
        await vm.unplug(1)
        threads = await vm.host.threads()
        (thread,) = [thread for thread in threads if thread.vcpu == 1]
        assert str(thread.found.cpus) == LAST
        main = [thread for thread in threads if thread.kind is ThreadKind.EMULATOR]
        assert {thread.found.cpus for thread in main} == {HOME}


@pytest.mark.parametrize("raises", [False, True])
async def test_a_vcpu_that_an_earlier_change_has_plugged_goes_where_the_later_one_says(*, raises: bool) -> None:
    async with (
        MicroGuest(behaviour=[Behaviour.silent().for_slot(1), Behaviour.complying()]) as guest,
        qmpvcpu.attach(guest.qmp) as vm,
    ):
        if raises:
            await vm.plug(1)
        later = VcpuMap.parse("0,4") if raises else VcpuMap.parse("0-4")
        first = asyncio.create_task(vm.set_map("0-4", placement=Placement.pinned({4: FIRST})))
        second = asyncio.create_task(vm.set_map(later, timeout=0.1, placement=Placement.pinned({4: LAST})))
        told = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(told[1], TransitionError) == raises
        (thread,) = [thread for thread in await vm.host.threads() if thread.vcpu == 4]
        assert str(thread.found.cpus) == LAST
        assert not thread.drifted


async def test_it_goes_there_too_if_the_later_call_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        first = asyncio.create_task(vm.set_map("0-4", placement=Placement.pinned({4: FIRST})))
        second = asyncio.create_task(vm.set_map("0-4", placement=Placement.pinned({4: LAST})))

        async def cancelled(vcpus: set[int]) -> None:
            if vcpus:  # it is that of the later call
                monkeypatch.undo()
                second.cancel()
                await asyncio.sleep(1)

        monkeypatch.setattr(vm.host, "place_vcpus", cancelled)
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
        thread = next(thread.tid for thread in await vm.host.threads() if thread.vcpu == 4)
        await wait_until(lambda: str(affinity(thread)) == LAST)


async def test_a_drift_is_told_once() -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, placement=Placement.pinned({1: LAST})) as vm:
        await vm.plug(1)
        await vm.refresh()
        stream = vm.events()
        (thread,) = [thread.tid for thread in await vm.host.threads() if thread.vcpu == 1]
        os.sched_setaffinity(thread, VcpuMap.parse(FIRST))
        await vm.refresh()
        await vm.refresh()
        assert vm.host.drifted == {1: Place.on(FIRST, "other")}
        await vm.unplug(1)
        events = await until(stream, VcpuUnplugged)
        (drift,) = [event for event in events if isinstance(event, PlaceDrifted)]
        assert drift.ids == {1}
        assert drift.wanted == Place.on(LAST)
        assert drift.found == Place.on(FIRST, "other")
        await vm.refresh()
        assert vm.host.drifted == {}


async def test_a_thread_that_was_put_back_has_not_drifted_any_more() -> None:
    async with (
        MicroGuest() as guest,
        qmpvcpu.attach(guest.qmp, placement=Placement({0: Place.on(LAST), 1: Place.on(LAST)}, Place.on(FIRST))) as vm,
    ):
        await vm.plug(1)
        assert vm.host.drifted.keys() == {-1, 0}
        await vm.host.place()
        assert vm.host.drifted == {}
        (thread,) = [thread.tid for thread in await vm.host.threads() if thread.vcpu == 1]
        os.sched_setaffinity(thread, VcpuMap.parse(FIRST))
        await vm.host.place(Placement({0: Place.on(FIRST)}))
        assert vm.host.drifted == {1: Place.on(FIRST, "other")}


# Where it cannot be.


class Cpuset:
    """A cgroup that QEMU is in."""

    def __init__(self, guest: MicroGuest, cgroup: Path) -> None:
        self._cgroup = cgroup
        (cgroup / "cgroup.procs").write_text(str(guest.process.pid))

    def allow(self, cpus: str) -> None:
        (self._cgroup / "cpuset.cpus").write_text(cpus)


@pytest.mark.parametrize("policy", PlacementPolicy)
async def test_a_cgroup_that_shrinks_after_the_check(make_cgroup: MakeCgroup, policy: PlacementPolicy) -> None:
    placement = Placement.pinned({1: LAST}, policy=policy)
    async with MicroGuest() as guest:
        cpuset = Cpuset(guest, make_cgroup("cpuset"))
        async with qmpvcpu.attach(guest.qmp, placement=placement) as vm:
            cpuset.allow(FIRST)
            if policy is PlacementPolicy.REQUIRED:
                with pytest.raises(StepDeniedError, match=f"host CPU.*{LAST}") as caught:
                    await vm.plug(1)
                assert caught.value.reason is DenialReason.CANNOT_PLACE
                assert caught.value.outcome is Outcome.UNCHANGED
                assert vm.layout.enabled == {0}
            else:
                (step,) = (await vm.set_map("0-1")).steps
                assert step.ok
                assert LAST in step.unplaced
                assert vm.layout.enabled == {0, 1}
            assert str(affinity(guest.process.pid)) == FIRST
            cpuset.allow(str(HOME))
            await asyncio.sleep(1.1)  # what the host allows is known for a second
            await vm.plug(2, placement=Placement.pinned({2: LAST}))
            ran_only_on(next(thread for thread in await vm.host.threads() if thread.vcpu == 2), LAST)


@pytest.mark.parametrize("emulator", [Place(), Place.on(FIRST)], ids=["vCPUs", "vCPUs and emulator"])
async def test_what_is_pinned_stays_there_once_its_cgroup_allows_more(
    make_cgroup: MakeCgroup, emulator: Place
) -> None:
    """The kernel remembers what was asked for, and what is pinned is asked for exactly."""
    wish = replace(Placement.pinned({1: FIRST, 2: FIRST, 3: LAST}), emulator=emulator)
    async with MicroGuest(boot=2) as guest:
        cpuset = Cpuset(guest, make_cgroup("cpuset"))
        async with qmpvcpu.attach(guest.qmp, placement=wish) as vm:
            await vm.plug(3)
            cpuset.allow(FIRST)
            await vm.host.place(replace(wish, vcpus={**wish.vcpus, 3: Place.on(FIRST)}))  # the kernel has them there
            await vm.plug(2)
            cpuset.allow(str(HOME))
            threads = await vm.host.threads()
            assert {thread.vcpu for thread in threads if str(thread.found.cpus) == FIRST} >= {1, 2, 3}
            rest = {thread.found.cpus for thread in threads if thread.vcpu is None}
            assert rest == {emulator.cpus or HOME}
            assert threads[0].found.cpus == HOME
            await vm.refresh()
            assert vm.host.drifted == {}


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_vcpu_that_cannot_be_placed_is_taken_out_again(
    make_cgroup: MakeCgroup, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    placement = Placement({1: Place.on(LAST, "batch")})
    behaviour = Behaviour.refusing(0x82) if refuses else Behaviour.complying()
    async with MicroGuest(behaviour=behaviour) as guest:
        cpuset = Cpuset(guest, make_cgroup("cpuset"))
        async with qmpvcpu.attach(guest.qmp, placement=placement) as vm:
            placer, place = vm._driver.placer, vm._driver.placer.place

            def shrink(*args: Any) -> dict[int, str]:
                cpuset.allow(FIRST)
                placer.facts(anew=True)
                return place(*args)

            monkeypatch.setattr(placer, "place", shrink)
            with pytest.raises(PlacementError) as caught:
                await vm.plug(1)
            assert caught.value.taken_out is not refuses
            assert f"does not allow host CPU {LAST}" in caught.value.why
            assert vm.layout.enabled == ({0, 1} if refuses else {0})
            assert str(affinity(guest.process.pid)) == FIRST


@pytest.mark.parametrize("version", ["10.0", "11.1"])
async def test_one_thread_for_all_vcpus_cannot_be_in_two_places(version: str) -> None:
    on = next(each.values[0] for each in substrates(["q35"], accels=["tcg"]) if each.values[0].version == version)
    guest = MicroGuest(on.qemu, accel="tcg,thread=single")  # type: ignore[arg-type]  # an option rides along
    async with guest, qmpvcpu.attach(guest.qmp, placement=Placement.pinned({1: LAST})) as vm:
        with pytest.raises(PlacementError, match="one host thread runs all vCPUs") as caught:
            await vm.plug(1)
        assert caught.value.taken_out is False, "QEMU would not survive it"
        assert vm.layout.enabled == {0, 1}
        assert affinity(vm.layout[0].host_tid or 0) == HOME
        with pytest.raises(StepDeniedError, match="one host thread runs all vCPUs"):
            await vm.plug(2, placement=Placement.pinned({2: LAST}))
        await vm.plug(2, placement="preferred")
        assert vm.layout.enabled == {0, 1, 2}


async def child(code: str, *arguments: object, before: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run a program of its own, which *before* starts; return its exit status, and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *before, sys.executable, "-c", code, *map(str, arguments), stdout=subprocess.PIPE, cwd=ROOT
    )
    said, _ = await process.communicate()
    return await process.wait(), said.decode().strip()


_PLUG = """
import asyncio, sys
import qmpvcpu
from qmpvcpu.model.placement import Place, Placement

async def main(address, cpus, scheduler):
    placement = Placement({1: Place.on(cpus or "0", scheduler or None)})
    async with qmpvcpu.attach(address, placement=placement) as vm:
        try:
            await vm.plug(1)
        except qmpvcpu.StepDeniedError as error:
            print(error)
        report = await vm.set_map("0-1", placement="preferred")
        print([step.unplaced for step in report.steps])

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_real_time_scheduler_without_permission(tmp_path: Path, root: None) -> None:  # noqa: ARG001
    without = ("setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice")
    wrapper = tmp_path / "qemu"
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(without)} {best_qemu()} "$@"\n')
    wrapper.chmod(0o755)
    async with MicroGuest(wrapper) as guest:
        _, said = await child(_PLUG, guest.qmp, LAST, "fifo:5", before=without)
        denied, kept = said.splitlines()
        assert "a real-time priority of 5 is not allowed here, none may be set" in denied
        assert "CAP_SYS_NICE" in denied
        assert "a real-time priority of 5 is not allowed here" in kept
        assert affinity(guest.process.pid) == HOME


async def test_a_qemu_of_which_proc_shows_nothing(root: None) -> None:  # noqa: ARG001 - a condition
    name = f"@qmpvcpu-{os.getpid()}"
    socket = ("-qmp", f"unix:path={name[1:]},abstract=on,server=on,wait=off")
    hidden = "mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid=65534 --regid=65534 --clear-groups "
    async with MicroGuest(extra_args=socket) as guest:
        script = f'{hidden} "$0" "$@"'
        before = ("unshare", "--mount", "--propagation=private", "sh", "-c", script)
        _, said = await child(_PLUG, name, LAST, "", before=before)
        denied, kept = said.splitlines()
        assert "hidepid" in denied
        assert "hidepid" in kept
        assert affinity(guest.process.pid) == HOME


@pytest.mark.parametrize("placement", [Placement.pinned({1: LAST, 2: FIRST}), None], ids=["placement", "none yet"])
async def test_another_qemu_that_takes_its_place(tmp_path: Path, placement: Placement | None) -> None:
    name = ("-name", "vm")
    async with MicroGuest(extra_args=name) as one, MicroGuest(extra_args=name) as two:
        socket = tmp_path / "qmp"
        socket.symlink_to(one.qmp)
        os.sched_setaffinity(two.process.pid, VcpuMap.parse(FIRST))
        async with qmpvcpu.attach(socket, placement=placement, reconnect=True) as vm:
            await vm.plug(1)
            stream = vm.events()
            with held_birth(vm, LAST) if placement else contextlib.nullcontext():
                socket.unlink()
                one.process.kill()
                await until(stream, Disconnected)
            waiting = asyncio.create_task(vm.plug(3, placement=Placement.pinned({3: LAST})))
            await asyncio.sleep(0)
            socket.symlink_to(two.qmp)
            await until(stream, InstanceChanged)
            assert await waiting == {3}
            await vm.set_map("0-3", placement=Placement.pinned({1: LAST, 2: FIRST}))
            threads = {thread.vcpu: thread for thread in await vm.host.threads() if thread.vcpu is not None}
            ran_only_on(threads[3], LAST)  # sent as soon as it was back
            ran_only_on(threads[1], LAST)
            ran_only_on(threads[2], FIRST)
            assert str(affinity(two.process.pid)) == FIRST


# Killed while a vCPU is born.

_DIE = """
import asyncio, os, signal, sys
import qmpvcpu
from qmpvcpu.host.birthplace import Birthplace
from qmpvcpu.model.placement import Placement
from qmpvcpu.qmp.monitor import Monitor

address, record, cpus, where = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

begin, end, execute = Birthplace.begin, Birthplace.end, Monitor.execute

def _begin(self, *args):
    begin(self, *args)
    if where == "main thread sent there":
        die()

def _end(self, *args):
    if where == "before it goes home":
        die()
    end(self, *args)

async def _execute(self, command, *args, **more):
    reply = asyncio.create_task(execute(self, command, *args, **more))
    if command == "device_add" and where == "command sent":
        await asyncio.sleep(0.002)
        die()
    reply = await reply
    if command == "device_add" and where == "replied":
        die()
    return reply

Birthplace.begin, Birthplace.end, Monitor.execute = _begin, _end, _execute

async def main():
    async with qmpvcpu.attach(address, record=record or None) as vm:
        await vm.plug(1, placement=Placement.pinned({1: cpus}))

asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["main thread sent there", "command sent", "replied", "before it goes home"])
async def test_who_comes_after_a_kill_sends_the_main_thread_home(tmp_path: Path, where: str) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(extra_args=("-name", "vm", "-object", "iothread,id=io0")) as guest:
        status, _ = await child(_DIE, guest.qmp, record, LAST, where)
        assert status == -signal.SIGKILL
        assert str(affinity(guest.process.pid)) == LAST
        async with qmpvcpu.attach(guest.qmp, record=record) as vm:
            assert vm.interrupted is not None
            assert affinity(guest.process.pid) == HOME
            await vm.recover(Recovery.FINISH)
            await check_threads(vm, guest, {1: LAST})


async def test_without_a_record_nothing_is_known_of_the_main_thread(caplog: pytest.LogCaptureFixture) -> None:
    async with MicroGuest() as guest:
        status, _ = await child(_DIE, guest.qmp, "", LAST, "replied")
        assert status == -signal.SIGKILL
        async with qmpvcpu.attach(guest.qmp) as vm:
            assert vm.interrupted is None
            assert not vm.host.placement
            assert vm.host.drifted == {}
            assert str(affinity(guest.process.pid)) == LAST
        assert "main thread" not in caplog.text


async def test_a_main_thread_that_somebody_else_has_moved_is_left_there(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(extra_args=("-name", "vm")) as guest:
        await child(_DIE, guest.qmp, record, LAST, "replied")
        os.sched_setaffinity(guest.process.pid, VcpuMap.parse(FIRST))
        async with qmpvcpu.attach(guest.qmp, record=record):
            assert str(affinity(guest.process.pid)) == FIRST


@pytest.mark.parametrize("given", [None, Placement.pinned({3: FIRST})], ids=["as wanted", "a pin more"])
async def test_core_scheduling_that_the_kernel_does_not_have_is_denied_beforehand(
    given: Placement | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpvcpu.host.facts.why_not_core_scheduling", lambda: "not in this kernel")
    monkeypatch.setattr("qmpvcpu.vm.placing._FRESH_S", 0.0)
    wish = Placement(core_scheduling=CoreScheduling.VCPUS)
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, placement=wish) as vm:
        with pytest.raises(StepDeniedError, match="not in this kernel") as caught:
            await vm.plug(3, placement=given)
    assert caught.value.reason is DenialReason.CANNOT_PLACE


async def test_whether_the_kernel_has_core_scheduling_is_told_though_nobody_wants_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qmpvcpu.host.facts.why_not_core_scheduling", lambda: "not in this kernel")
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        assert vm.host.facts().why_not_core_scheduling == "not in this kernel"


async def test_a_vcpu_that_is_there_and_cannot_be_moved_keeps_no_preferred_change_from_being_made() -> None:
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        placement = Placement.pinned({0: [4000], 1: [min(os.sched_getaffinity(0))]})
        with pytest.raises(StepDeniedError, match="no CPU 4000"):
            await vm.plug(1, placement=placement)
        assert vm.layout.enabled == {0}
        assert await vm.plug(1, placement=replace(placement, policy=PlacementPolicy.PREFERRED)) == {1}
        await vm.refresh()
        assert set(vm.host.drifted) == {0}


async def test_those_that_are_there_and_can_be_moved_are_moved_if_it_is_only_preferred(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wish = Placement.pinned({0: [4000], 1: LAST, 2: FIRST}, policy=PlacementPolicy.PREFERRED)
    async with MicroGuest(boot=2) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(2, placement=replace(wish, emulator=Place.on(LAST)))
        threads = {thread.vcpu: thread for thread in await vm.host.threads()}
        assert [str(threads[vcpu].found.cpus) for vcpu in (0, 1, 2)] == [str(HOME), LAST, FIRST]
        assert str(affinity(guest.process.pid)) == LAST
        (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert warning.startswith("placing of vCPU 0 denied")
