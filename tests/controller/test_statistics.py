"""What vCPUs have done: of real QEMUs, and of scripted ones whose vCPU threads are threads of this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import MalformedReplyError, MonitorLostError, Proof, VcpuController
from qmpvcpu.host.files import read_text
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import Failure, ScriptedPeer
from tests.controller.vms import other_client, running
from tests.exchange import exchange
from tests.host.conftest import Sleeper
from tests.hostile import HOSTILE, slots, small_vm
from tests.substrates import Substrate, substrates

_BOOT, _PLUGGED = "/machine/unattached/device[0]", "/machine/peripheral/vcpu1"
_STARTING = Behaviour.complying().starting()
_KVM = {"enabled": True, "present": True}


@pytest.mark.qemu
@pytest.mark.parametrize("on", substrates(["q35"]))
async def test_each_vcpu_is_told_of_at_the_cost_of_one_round_trip(on: Substrate) -> None:
    asked, knows_halted = ["query-stats"] if on.accel == "kvm" else [], on.accel == "kvm" and on.version != "7.2"
    async with running(on, max_vcpus=4, boot=2, behaviour=_STARTING) as (_, vm):
        before = await vm.statistics()
        await vm.plug(3, proof=Proof.STARTED)
        for queries in ([*asked, "query-cpus-fast"], asked):  # its thread is asked for once
            with exchange() as said:
                after = await vm.statistics()
            assert sorted(said) == sorted(queries)
        assert after.why_incomplete == ""
        assert after.at > before.at
        await vm.refresh()
        assert [each.id for each in after.vcpus] == [0, 1, 3]
        for each in after.vcpus:
            assert each.host_tid == vm.layout[each.id].host_tid
            assert None not in (each.run_s, each.delay_s, each.turns, each.host_cpu)
            assert each.run_s
            assert each.turns
            assert (len(each.kvm) > 20) == (on.accel == "kvm")
            assert (each.halted is None) != knows_halted
        rates = after.since(before)
        assert [each.restarted for each in rates.vcpus] == [False, False, True]
        assert rates[3].run


@pytest.mark.qemu
@pytest.mark.parametrize("on", substrates(["q35"], that_survive=True))
async def test_a_vcpu_that_another_client_plugged_again_is_found_again(on: Substrate) -> None:
    async with (
        running(on, max_vcpus=4, boot=2, attach={"resync_interval": None}) as (guest, vm),
        other_client(guest) as client,
    ):
        await vm.plug(3)
        before = await vm.statistics()
        await client.execute("device_del", {"id": "vcpu3"})
        await vm.wait_for(lambda layout: 3 not in layout.enabled, timeout=20)
        assert [each.id for each in (await vm.statistics()).vcpus] == [0, 1]
        await vm.plug(3)
        after = await vm.statistics()
        assert after.why_incomplete == ""
        assert after[3].host_tid not in (None, before[3].host_tid)
        assert after.since(before)[3].restarted


@pytest.mark.qemu
@pytest.mark.kvm
async def test_kvm_is_asked_for_what_is_named() -> None:
    async with MicroGuest(accel="kvm") as guest, qmpvcpu.attach(guest.qmp) as vm:
        assert set((await vm.statistics(kvm=["exits", "no_such"]))[0].kvm) == {"exits"}
        with exchange() as said:
            without = await vm.statistics(kvm=())
        assert said == []
        assert without[0].kvm == {}
        assert without.why_incomplete == ""


@contextlib.asynccontextmanager
async def relayed(guest: MicroGuest) -> AsyncIterator[str]:
    """An address by which QEMU is reached as if it ran on another host."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_qemu, to_qemu = await asyncio.open_unix_connection(guest.qmp)
        await asyncio.gather(pass_on(reader, to_qemu), pass_on(from_qemu, writer))

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        yield f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.qemu
@pytest.mark.kvm
async def test_of_a_qemu_on_another_host_there_is_what_kvm_counts() -> None:
    async with MicroGuest(accel="kvm") as guest, relayed(guest) as address, qmpvcpu.attach(address) as vm:
        await vm.plug(1)
        with exchange() as said:
            told = await vm.statistics()
        assert said == ["query-stats"]
        assert "on QEMU's host" in told.why_incomplete
        for each in told.vcpus:
            assert "exits" in each.kvm
            assert (each.run_s, each.delay_s, each.turns, each.host_cpu) == (None,) * 4


@pytest.mark.qemu
async def test_one_thread_for_all_vcpus_says_so() -> None:
    guest = MicroGuest(accel="tcg,thread=single")  # type: ignore[arg-type]  # an option rides along
    async with guest, qmpvcpu.attach(guest.qmp) as vm:
        assert (await vm.statistics())[0].run_s
        await vm.plug(1)
        for _ in range(2):  # before the layout knows, and after
            told = await vm.statistics()
            assert told.why_incomplete.startswith("one host thread runs all vCPUs")
            assert [each.run_s for each in told.vcpus] == [None, None]
            await vm.refresh()


@pytest.fixture
def workers() -> Iterator[list[Sleeper]]:
    made = [Sleeper(), Sleeper()]
    yield made
    for each in made:
        each.end()


def cpus(workers: list[Sleeper]) -> list[dict[str, Any]]:
    return [
        {"qom-path": path, "thread-id": each.tid, "cpu-index": index, "target": "x86_64", "props": {}}
        for index, (path, each) in enumerate(zip((_BOOT, _PLUGGED), workers, strict=True))
    ]


@contextlib.asynccontextmanager
async def playing(workers: list[Sleeper], **answers: Any) -> AsyncIterator[tuple[ScriptedPeer, VcpuController]]:
    """A VM whose two vCPUs are *workers*."""
    async with (
        small_vm(query_cpus_fast=cpus(workers), **answers) as peer,
        qmpvcpu.attach(peer.address, reply_timeout=5, resync_interval=None) as vm,
    ):
        yield peer, vm


async def test_a_thread_that_has_ended_is_asked_for_once_and_its_successor_is_read(workers: list[Sleeper]) -> None:
    async with playing(workers) as (peer, vm):
        before = await vm.statistics()
        assert before.why_incomplete == ""
        attached = peer.count("query-cpus-fast")
        workers[1].end()
        told = await vm.statistics()
        assert told.why_incomplete == "QEMU has no thread for vCPU 1 now: it came or left while this was read"
        assert told[1].run_s is None
        assert told[0].run_s is not None
        workers[1] = Sleeper()
        peer.answers["query-cpus-fast"] = cpus(workers)
        after = await vm.statistics()
        assert (after[1].host_tid, after.why_incomplete) == (workers[1].tid, "")
        assert after.since(before)[1].restarted
        assert (await vm.statistics())[1].host_tid == workers[1].tid
        assert peer.count("query-cpus-fast") == attached + 2


async def test_a_tid_that_went_to_another_thread_is_not_taken_for_the_vcpu(
    workers: list[Sleeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with playing(workers) as (peer, vm):
        await vm.statistics()

        def later(path: str) -> str:
            """The thread with that number began a tick later than the one that was read."""
            text = read_text(path)
            if not path.endswith(f"/{workers[1].tid}/stat"):
                return text
            head, _, tail = text.rpartition(")")
            fields = tail.split()
            return f"{head}) {' '.join([*fields[:19], str(int(fields[19]) + 1), *fields[20:]])}"

        monkeypatch.setattr("qmpvcpu.host.threads.read_text", later)
        monkeypatch.setattr("qmpvcpu.host.processes.read_text", later)
        peer.answers["query-cpus-fast"] = cpus(workers)[:1]  # vCPU 1 left, and nobody has told of it
        for _ in range(2):
            told = await vm.statistics()
            assert (told[1].run_s, told[1].host_tid) == (None, None)
            assert told[0].run_s is not None
        peer.answers["query-cpus-fast"] = cpus(workers)  # the next one has a thread of the same number
        told = await vm.statistics()
        assert told[1].run_s is not None
        assert told[1].host_tid == workers[1].tid


async def test_a_process_that_only_has_the_socket_is_not_taken_for_qemu() -> None:
    async with small_vm() as peer, qmpvcpu.attach(peer.address) as vm:  # tids 1 and 2 are no threads of this process
        told = await vm.statistics()
        assert "it is not QEMU itself" in told.why_incomplete
        assert [each.run_s for each in told.vcpus] == [None, None]


@pytest.mark.parametrize(
    "answer",
    [
        HOSTILE,
        {"stats": []},
        [HOSTILE],
        [{"provider": "kvm", "qom-path": HOSTILE, "stats": []}],
        [{"provider": "kvm", "qom-path": _BOOT, "stats": [{"name": HOSTILE, "value": 1}]}],
        [{"provider": "kvm", "qom-path": _BOOT, "stats": [{"name": ["exits"], "value": 1}]}],
        [{"provider": "kvm", "qom-path": _BOOT, "stats": [{"name": "exits", "value": HOSTILE}]}],
        [{"provider": "kvm", "qom-path": _BOOT, "stats": [{"name": "exits", "value": [1] * 4096}]}],
        [{"provider": "kvm", "qom-path": _BOOT, "stats": [{"name": f"n{n}", "value": 1} for n in range(513)]}],
        [{"provider": "kvm", "qom-path": f"/a{n}", "stats": []} for n in range(16385)],
    ],
)
async def test_what_no_kvm_could_count_is_an_error_that_can_be_printed(workers: list[Sleeper], answer: Any) -> None:
    async with playing(workers, query_kvm=_KVM) as (peer, vm):
        peer.answers["query-stats"] = answer
        with pytest.raises(MalformedReplyError, match="malformed reply to query-stats") as caught:
            await vm.statistics()
        assert not set("\x1b\x07\r\x85\u202e") & set(str(caught.value))
        peer.answers["query-stats"] = [{"provider": "kvm", "qom-path": _PLUGGED, "stats": []}]
        assert (await vm.statistics())[0].run_s is not None


async def test_a_qemu_that_tells_of_other_vcpus_adds_none(workers: list[Sleeper]) -> None:
    counted = [{"name": "exits", "value": 2**64 - 1}]
    stats = [{"provider": "kvm", "qom-path": path, "stats": counted} for path in ("/machine/other", _PLUGGED)]
    async with playing(workers, query_kvm=_KVM, query_stats=stats) as (_, vm):
        told = await vm.statistics()
        assert [each.id for each in told.vcpus] == [0, 1]
        assert [dict(each.kvm) for each in told.vcpus] == [{}, {"exits": 2**64 - 1}]


async def test_a_kvm_that_does_not_count_is_told(workers: list[Sleeper]) -> None:
    async with playing(workers, query_kvm=_KVM) as (peer, vm):
        peer.answers["query-stats"] = Failure("CommandNotFound", HOSTILE)
        told = await vm.statistics()
        assert told.why_incomplete == "QEMU and its kernel do not report KVM's counters (query-stats)"
        named = await vm.statistics(kvm=["no_such", "nor_this"])
        assert named.why_incomplete == "QEMU and its kernel do not report no_such, nor_this (query-stats)"
        assert told[0].run_s is not None
    old = {"QMP": {"version": {"qemu": {"major": 7, "minor": 0, "micro": 0}, "package": ""}, "capabilities": []}}
    async with small_vm(greeting=old, query_kvm=_KVM) as peer, qmpvcpu.attach(peer.address) as vm:
        assert "too old to report KVM's counters: 7.1 and newer do" in (await vm.statistics()).why_incomplete


async def test_more_vcpus_than_fit_into_a_line_are_asked_for_in_parts(
    workers: list[Sleeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = [{"name": "exits", "value": 1}]

    def answer(command: Any) -> list[dict[str, Any]]:
        return [{"provider": "kvm", "qom-path": path, "stats": counted} for path in command.arguments["vcpus"]]

    async with playing(workers, query_kvm=_KVM) as (peer, vm):
        monkeypatch.setattr(type(vm._driver.connection.monitor), "longest_line", 10_000)
        peer.answers["query-stats"] = answer
        with exchange() as said:
            told = await vm.statistics()
        assert [each.kvm["exits"] for each in told.vcpus] == [1, 1]
        assert said == ["query-stats"] * 2


async def test_a_lost_vm_is_an_error() -> None:
    async with small_vm(query_hotpluggable_cpus=slots({})) as peer, qmpvcpu.attach(peer.address) as vm:
        await peer.hang_up()
        with pytest.raises(MonitorLostError):
            await vm.statistics()
