"""Which vCPUs have started, asked of a scripted QEMU whose vCPU threads are threads of this process."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qmpvcpu import MalformedReplyError, Slot
from qmpvcpu.host.threads import Usage
from qmpvcpu.model.layout import CpuProps
from qmpvcpu.model.vm import ONE_THREAD
from qmpvcpu.qmp.queries import Reader
from qmpvcpu.testing.peer import Failure, ScriptedPeer
from tests.hostile import small_vm

from .conftest import Open

VCPUS = ["/machine/unattached/device[0]", "/machine/peripheral/vcpu1"]
KVM = {"query_kvm": {"enabled": True, "present": True}}
TCG = {"query_kvm": {"enabled": False, "present": True}}


def exits(**counts: object) -> Callable[[Any], list[dict[str, Any]]]:
    """QEMU's answer to query-stats: the counts of those that were asked for, by vCPU id."""
    known = {VCPUS[int(name.removeprefix("vcpu"))]: count for name, count in counts.items()}

    def answer(command: Any) -> list[dict[str, Any]]:
        return [
            {"provider": "kvm", "qom-path": path, "stats": [{"name": "exits", "value": known[path]}]}
            for path in command.arguments["vcpus"]
            if path in known
        ]

    return answer


def threads(*tids: int) -> list[dict[str, Any]]:
    """What query-cpus-fast says of vCPUs that run in these threads."""
    return [
        {"qom-path": path, "thread-id": tid, "cpu-index": index, "target": "x86_64", "props": {}}
        for index, (path, tid) in enumerate(zip(VCPUS, tids, strict=False))
    ]


async def read(vm: ScriptedPeer, connect: Open) -> tuple[str, set[int], Reader, tuple[Slot, ...]]:
    """Return why the start cannot be told, what has started, the reader, and the slots."""
    reader = Reader(await connect(vm.address), 5)
    (slots, _), _, _, info = await reader.everything()
    return info.start_unknowable, set(await reader.started(slots)), reader, slots


@pytest.fixture
def idle() -> Iterator[int]:
    """A thread that sleeps, as one whose vCPU never started."""
    end, told = threading.Event(), threading.Event()

    def run() -> None:
        told.set()
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    told.wait()
    assert thread.native_id is not None
    yield thread.native_id
    end.set()
    thread.join()


@pytest.fixture
def busy() -> Iterator[int]:
    """A thread that has run for some 50 ms, and sleeps."""
    end, done = threading.Event(), threading.Event()

    def run() -> None:
        while time.thread_time() < 0.05:
            pass
        done.set()
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    done.wait()
    assert thread.native_id is not None
    yield thread.native_id
    end.set()
    thread.join()


async def test_under_kvm_a_vcpu_has_started_that_leaves_guest_mode(connect: Open) -> None:
    async with small_vm(**KVM, query_stats=exits(vcpu0=4, vcpu1=0)) as peer:
        why, started, reader, slots = await read(peer, connect)
        assert (why, started) == ("", set())  # the first look
        peer.answers["query-stats"] = exits(vcpu0=5, vcpu1=0)
        asked = len(peer.received)
        assert await reader.started(slots) == {0}
        assert await reader.started(slots[:1]) == {0}
        assert await reader.started(slots[2:]) == set()  # nothing there, so nothing is asked
        both, one = (command for command in peer.received[asked:] if command.name == "query-stats")
        peer.answers["query-stats"] = exits(vcpu0=5, vcpu1=1)
        assert await reader.started(slots) == {0, 1}
    assert both.arguments == {
        "target": "vcpu",
        "vcpus": VCPUS,
        "providers": [{"provider": "kvm", "names": ["exits", "sum_exits"]}],
    }
    assert one.arguments["vcpus"] == VCPUS[:1]


async def test_what_an_earlier_vcpu_in_its_slot_has_run_is_not_counted_for_a_new_one(connect: Open) -> None:
    async with small_vm(**KVM, query_stats=exits(vcpu0=4, vcpu1=70), query_cpus_fast=threads(11, 12)) as peer:
        _, started, reader, slots = await read(peer, connect)
        assert started == set()
        peer.answers["query-stats"] = exits(vcpu0=4, vcpu1=71)
        assert await reader.started(slots) == {1}
        # unplugged and plugged again: the same path, another thread, and KVM's count goes on
        peer.answers["query-cpus-fast"] = threads(11, 13)
        peer.answers["query-stats"] = exits(vcpu0=4, vcpu1=75)
        assert await reader.started(slots) == set()
        assert await reader.started(slots) == set()
        peer.answers["query-stats"] = exits(vcpu0=4, vcpu1=76)
        assert await reader.started(slots) == {1}


async def test_what_a_hostile_qemu_tells_of_other_vcpus_proves_nothing(connect: Open) -> None:
    async with small_vm(**KVM, query_stats=exits(vcpu0=4, vcpu1=0)) as peer:
        _, _, reader, slots = await read(peer, connect)
        for path in ("/machine/peripheral/vcpu10", "/machine/peripheral/vcpu1/thread[0]", "/machine/peripheral/vcpu"):
            peer.answers["query-stats"] = [
                {"provider": "kvm", "qom-path": path, "stats": [{"name": "exits", "value": 9}]}
            ]
            assert await reader.started(slots) == set()
        histogram = {"provider": "kvm", "qom-path": VCPUS[1], "stats": [{"name": "exits", "value": [9]}]}
        wrong: object
        for wrong in ([histogram], {}, 7):
            peer.answers["query-stats"] = wrong
            with pytest.raises(MalformedReplyError, match="query-stats"):
                await reader.started(slots)
        peer.answers["query-stats"] = Failure("no more")
        assert await reader.started(slots) == set()
        peer.answers["query-stats"] = exits(vcpu0=9, vcpu1=9)
        peer.answers["query-cpus-fast"] = []
        assert await reader.started(slots) == set()


@pytest.mark.parametrize("answer", [Failure("The command query-stats has not been found", "CommandNotFound"), []])
async def test_under_a_kvm_that_counts_nothing_nothing_can_be_told(answer: Any, connect: Open, busy: int) -> None:
    async with small_vm(**KVM, query_stats=answer, query_cpus_fast=threads(busy, os.getpid())) as peer:
        why, started, _, _ = await read(peer, connect)
        assert [command.name for command in peer.received].count("query-stats") == 1
    assert "query-stats" in why
    assert 1 not in started


async def test_a_vcpu_0_elsewhere_is_asked_for_where_it_is(connect: Open) -> None:
    elsewhere = "/machine/unattached/device[1]"

    def answer(command: Any) -> list[dict[str, Any]]:
        known = elsewhere in command.arguments["vcpus"]
        stat = {"provider": "kvm", "qom-path": elsewhere, "stats": [{"name": "exits", "value": 0}]}
        return [stat] if known else []

    cpus = [{**threads(1)[0], "qom-path": elsewhere}]
    slots = [{"type": "t-x86_64-cpu", "vcpus-count": 1, "props": {"core-id": 0}, "qom-path": elsewhere}]
    async with small_vm(**KVM, query_stats=answer, query_cpus_fast=cpus, query_hotpluggable_cpus=slots) as peer:
        why, started, _, _ = await read(peer, connect)
    assert (why, started) == ("", set())


async def test_under_tcg_a_vcpu_has_started_whose_thread_has_run(connect: Open, idle: int, busy: int) -> None:
    async with small_vm(**TCG, query_stats=[], query_cpus_fast=threads(idle, busy)) as peer:
        why, started, reader, slots = await read(peer, connect)
        assert (why, started) == ("", {1})
        peer.answers["query-cpus-fast"] = threads(busy, idle)  # the thread that is there now counts
        assert await reader.started(slots) == {0}
        peer.answers["query-cpus-fast"] = threads(busy)
        assert await reader.started(slots) == {0}
        peer.answers["query-cpus-fast"] = threads(busy, busy)
        assert await reader.started(slots) == set()
        core = Slot(0, 2, "power10_v2.0-spapr-cpu-core", CpuProps({"core-id": 0}), 0).filled("/machine/core0")
        parts = [{**part, "qom-path": f"/machine/core0/thread[{n}]"} for n, part in enumerate(threads(busy, idle))]
        peer.answers["query-cpus-fast"] = parts
        assert await reader.started([core]) == set()  # one of its two vCPUs has not


async def test_why_nothing_can_be_told_under_tcg(connect: Open, idle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with small_vm(**TCG, query_cpus_fast=threads(idle, idle)) as peer:
        assert (await read(peer, connect))[:2] == (ONE_THREAD, set())
    # the main thread is no vCPU: it may be that of a program which passes the socket on
    async with small_vm(**TCG, query_cpus_fast=threads(os.getpid(), idle)) as peer:
        why, started, _, _ = await read(peer, connect)
        assert f"has the other end of the connection, but no thread {os.getpid()}" in why
        assert 0 not in started
    async with small_vm(**TCG, query_cpus_fast=threads(2**22 + 1, idle)) as peer:
        assert "it is not QEMU itself" in (await read(peer, connect))[0]
    async with small_vm(**TCG, query_cpus_fast=[], query_hotpluggable_cpus=[]) as peer:
        assert "attach again" in (await read(peer, connect))[0]
    monkeypatch.setattr("qmpvcpu.host.threads.read_usage", lambda _: Usage(7, None, None, 0))
    async with small_vm(**TCG, query_cpus_fast=threads(idle, os.getpid())) as peer:
        assert "schedstat" in (await read(peer, connect))[0]


async def test_over_tcp_all_can_be_told_on_this_host_and_under_tcg_nothing_elsewhere(
    connect: Open, idle: int, busy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = small_vm(**TCG, query_cpus_fast=threads(idle, busy)).answers
    async with ScriptedPeer(answers=answers, tcp=True, reject_others=True) as peer:
        why, started, _, _ = await read(peer, connect)
        assert (why, started) == ("", {1})
    monkeypatch.setattr("qmpvcpu.qmp.monitor.peer_inode", lambda _: None)  # its socket is on another host
    async with ScriptedPeer(answers=answers, tcp=True, reject_others=True) as peer:
        why, started, _, _ = await read(peer, connect)
    assert "connect over a UNIX socket" in why
    assert started == set()
    answers = small_vm(**KVM, query_stats=exits(vcpu0=3, vcpu1=3)).answers
    async with ScriptedPeer(answers=answers, tcp=True, reject_others=True) as peer:
        why, _, reader, slots = await read(peer, connect)
        peer.answers["query-stats"] = exits(vcpu0=4, vcpu1=4)
        assert (why, set(await reader.started(slots))) == ("", {0, 1})


@pytest.mark.parametrize("name", ["mshv", "hvf", "whpx", "nvmm", "xen"])
async def test_under_another_accelerator_nothing_is_guessed(name: str, connect: Open, busy: int) -> None:
    async with small_vm(query_accelerators={"enabled": name}, query_cpus_fast=threads(os.getpid(), busy)) as peer:
        why, _, _, _ = await read(peer, connect)
    assert re.search(f"accelerator '{name}' nothing tells", why)


async def test_an_accelerator_that_qemu_does_not_tell_is_kvm_if_it_counts_exits(connect: Open) -> None:
    async with small_vm(query_stats=exits(vcpu0=3, vcpu1=0)) as peer:
        why, _, reader, slots = await read(peer, connect)
        peer.answers["query-stats"] = exits(vcpu0=4, vcpu1=0)
        assert (why, set(await reader.started(slots))) == ("", {0})
