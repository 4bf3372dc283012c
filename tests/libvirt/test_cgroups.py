"""Threads in the cgroups of libvirt, which runs the VM: they are placed as far as these allow; none is changed."""

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import DenialReason, Place, Placement, PlacementPolicy, StepDeniedError, VcpuMap
from qmpvcpu.errors import MonitorConnectError
from tests.libvirt.daemon import Libvirt, VirshError, running_libvirtd
from tests.libvirt.microguests import Domain, Shape, microguest_domain, start
from tests.libvirt.placed_twins import HOST, pid_of, placed
from tests.substrates import Substrate, substrates

pytestmark = [
    pytest.mark.libvirt,
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this"),
    pytest.mark.skipif(len(HOST) == 1, reason="this host has one CPU"),
    pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpuset/tasks", os.W_OK), reason="no cgroup v1 here"),
]

KVM = substrates(["q35"], accels=["kvm"])
FIRST, LAST = str(min(HOST)), str(max(HOST))
CGROUPS = Path("/sys/fs/cgroup/cpuset/machine")
NARROW = f"<emulatorpin cpuset='{FIRST}'/>"


@pytest.fixture(scope="module")
def _daemon() -> Iterator[Libvirt]:
    with running_libvirtd(cgroups=True) as daemon:
        yield daemon
    for controller in ("cpuset", "cpu"):
        with contextlib.suppress(OSError):  # another libvirtd has its own there
            (CGROUPS.parent.parent / controller / CGROUPS.name).rmdir()


@pytest.fixture
def libvirt(_daemon: Libvirt) -> Iterator[Libvirt]:
    yield _daemon
    if not _daemon.answers():
        _daemon.start()
    _daemon.forget_all()


def running(libvirt: Libvirt, on: Substrate, cputune: str = NARROW) -> Domain:
    domain, document = microguest_domain(libvirt, f"cgroups{os.getpid()}", on.qemu, shape=Shape(boot=2))
    start(domain, placed(document, cputune=cputune), define=True)
    return domain


def cgroups_of(domain: Domain) -> dict[str, tuple[str, frozenset[str]]]:
    """The cgroups of a domain: the host CPUs of each, and its threads."""
    (top,) = CGROUPS.glob(f"qemu-*-{domain.name}.libvirt-qemu")
    return {
        str(each.parent.relative_to(top)): (
            each.read_text().strip(),
            frozenset(each.with_name("tasks").read_text().split()),
        )
        for each in top.rglob("cpuset.cpus")
    }


def sets_of(domain: Domain) -> dict[str, str]:
    return {name: cpus for name, (cpus, _) in cgroups_of(domain).items()}


@pytest.mark.parametrize("on", KVM)
async def test_a_vcpu_is_born_in_the_emulators_cgroup_and_placed_on_what_that_allows(
    libvirt: Libvirt, on: Substrate
) -> None:
    domain = running(libvirt, on)
    before = sets_of(domain)
    assert before["emulator"] == FIRST
    async with qmpvcpu.attach(domain.qmp) as vm:
        with pytest.raises(StepDeniedError) as denied:
            await vm.plug(3, placement=Placement.pinned({3: LAST}))
        assert denied.value.reason is DenialReason.CANNOT_PLACE
        assert f"libvirt-qemu/emulator) does not allow host CPU {LAST}, only {FIRST}" in str(denied.value)
        assert await vm.plug(4, placement=Placement.pinned({4: FIRST})) == {4}
        report = await vm.set_map(
            [0, 1, 3, 4], placement=Placement.pinned({3: LAST}, policy=PlacementPolicy.PREFERRED)
        )
        (step,) = report.steps
        assert f"does not allow host CPU {LAST}" in step.unplaced
        threads = {thread.vcpu: thread for thread in await vm.host.threads()}
        assert threads[4].found == Place.on(FIRST, "other")
        assert threads[3].found.cpus == VcpuMap.parse(FIRST)
        assert {str(threads[vcpu].tid) for vcpu in (3, 4)} <= cgroups_of(domain)["emulator"][1]
    assert sets_of(domain) == before


@pytest.mark.parametrize("on", KVM[:1])
async def test_a_vcpu_that_libvirt_plugged_may_run_where_its_own_cgroup_allows(
    libvirt: Libvirt, on: Substrate
) -> None:
    domain = running(libvirt, on)
    await asyncio.to_thread(domain.virsh, "setvcpu", "5", "--enable", "--live")
    before = cgroups_of(domain)
    assert {before[name][0] for name in ("vcpu0", "vcpu5")} == {str(HOST)}
    async with qmpvcpu.attach(domain.qmp) as vm:
        await vm.host.place(Placement({0: Place.on(LAST), 5: Place.on(LAST, "batch")}))
        threads = {thread.vcpu: thread for thread in await vm.host.threads()}
        assert [str(threads[vcpu].found) for vcpu in (0, 5)] == [
            f"host CPUs {LAST}, other",
            f"host CPUs {LAST}, batch",
        ]
        assert cgroups_of(domain) == before
        await asyncio.to_thread(domain.virsh, "vcpupin", "5", FIRST, "--live")  # which knows nothing of ours
        await vm.refresh()
        assert {vcpu: place.cpus for vcpu, place in vm.host.drifted.items()} == {5: VcpuMap.parse(FIRST)}
        with pytest.raises(StepDeniedError, match=f"vcpu5.* does not allow host CPU {LAST}, only {FIRST}"):
            await vm.host.place()
    assert sets_of(domain) == {**{name: cpus for name, (cpus, _) in before.items()}, "vcpu5": FIRST}


@pytest.mark.parametrize("on", KVM)
async def test_threads_are_found_over_the_monitor_that_libvirtd_has_opened(libvirt: Libvirt, on: Substrate) -> None:
    domain = running(libvirt, on)
    before = sets_of(domain)
    monitor = libvirt.monitor_socket(domain.name)
    with pytest.raises(MonitorConnectError):  # libvirtd has it
        await qmpvcpu.attach(monitor, reply_timeout=0.5)
    libvirt.stop()
    async with qmpvcpu.attach(monitor) as vm:
        await vm.plug(3, placement=Placement.pinned({3: FIRST}))
        with pytest.raises(StepDeniedError, match="does not allow host CPU"):
            await vm.plug(4, placement=Placement.pinned({4: LAST}))
        threads = {thread.vcpu: thread for thread in await vm.host.threads()}
        assert threads[3].found == Place.on(FIRST, "other")
    assert sets_of(domain) == before
    libvirt.start()
    assert domain.virsh("domstate").strip() == "running"
    # It makes a cgroup for each vCPU that it plugs, and can pin no other.
    with pytest.raises(VirshError, match="Failed to create v1 controller"):
        domain.virsh("vcpupin", "3", FIRST, "--live")
    for state in ("--disable", "--enable"):
        domain.virsh("setvcpu", "3", state, "--live")
    domain.virsh("vcpupin", "3", LAST, "--live")
    assert sets_of(domain) == {**before, "vcpu3": LAST}


@pytest.mark.parametrize("on", [each for each in KVM if each.values[0].version == "11.1"])
async def test_threads_are_placed_over_a_monitor_that_libvirt_is_asked_to_add(
    libvirt: Libvirt, on: Substrate
) -> None:
    domain = running(libvirt, on, cputune="")
    before = sets_of(domain)
    socket = libvirt.folder / "added.qmp"
    address = {"type": "unix", "data": {"path": str(socket)}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    for command in (
        {"execute": "chardev-add", "arguments": {"id": "added", "backend": backend}},
        {
            "execute": "object-add",
            "arguments": {
                "qom-type": "monitor-qmp",
                "id": "added-monitor",
                "chardev": "added",
                "close-action": "delete",
            },
        },
    ):
        domain.virsh("qemu-monitor-command", json.dumps(command))
    async with qmpvcpu.attach(socket) as vm:
        assert await vm.plug(3, placement=Placement.pinned({3: LAST})) == {3}
        threads = {thread.vcpu: thread for thread in await vm.host.threads()}
        assert threads[3].found == Place.on(LAST, "other")
        assert VcpuMap(os.sched_getaffinity(pid_of(domain))) == HOST
    assert sets_of(domain) == before
    domain.virsh("setvcpu", "4", "--enable", "--live")
    assert domain.virsh("domstate").strip() == "running"
