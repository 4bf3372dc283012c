"""Whatever a peer says, background work goes on, and says once that it failed."""

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    MalformedReplyError,
    MonitorLostError,
    TransitionError,
    UnplugPendingError,
    UnplugRefusedError,
    VcpuMap,
)
from qmpvcpu.events import MigrationChanged, Reconnected
from qmpvcpu.testing.peer import GREETING, HANG, Command, Failure, ScriptedPeer
from qmpvcpu.vm.connection import Ear
from tests import waiting
from tests.captures import all_captures
from tests.controller.test_scripted import capture_answers, ost, recorded
from tests.controller.vms import until
from tests.peer.conftest import left_behind, sockets

NAME = "10.0.2-q35-sct-2x2x2-boot3"
CAPTURE = next(capture for capture in all_captures() if capture.name == NAME)
SLOTS: list[dict[str, Any]] = CAPTURE.replies("query-hotpluggable-cpus")[0]
THREADS: list[dict[str, Any]] = CAPTURE.replies("query-cpus-fast")[0]
DEEP = b'{"return": ' + b"[" * 50_000 + b"]" * 50_000 + b"}\r\n"


@pytest.fixture(autouse=True)
async def nothing_is_left_behind() -> AsyncIterator[None]:
    """No task, socket or exception that nobody looked at."""
    stray: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context))
    before = sockets()
    yield
    left = await left_behind(before)
    gc.collect()
    await asyncio.sleep(0)
    assert (left, stray) == (([], set()), [])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the controller logged, from WARNING on."""
    caplog.set_level(logging.INFO, "qmpvcpu.vm")

    def warnings() -> list[str]:
        return [
            each.message for each in caplog.records if each.levelno >= logging.WARNING and "qemu" not in each.name
        ]

    return warnings


def with_third(peer: ScriptedPeer) -> None:
    """Let QEMU have one more vCPU, which no event told of."""
    slots = [dict(slot) for slot in SLOTS]
    free = next(slot for slot in slots if "qom-path" not in slot)
    free["qom-path"] = "/machine/peripheral/other"
    thread = {**THREADS[0], "qom-path": free["qom-path"], "thread-id": 77, "cpu-index": 7, "props": free["props"]}
    peer.answers |= {"query-hotpluggable-cpus": slots, "query-cpus-fast": [*THREADS, thread]}


BAD_READS: list[tuple[str, Any]] = [
    ("query-hotpluggable-cpus", Failure("not now")),
    ("query-hotpluggable-cpus", [{**SLOTS[0], "vcpus-count": 20_000}, *SLOTS[1:]]),
    ("query-hotpluggable-cpus", SLOTS[1:]),
    ("query-hotpluggable-cpus", None),
    ("query-cpus-fast", Failure("not now")),
    ("query-cpus-fast", [{"x": 1}]),
    ("query-cpus-fast", [{**THREADS[0], "thread-id": 10**30}]),
]


@pytest.mark.parametrize(("command", "reply"), BAD_READS, ids=range(len(BAD_READS)))
async def test_the_resync_goes_on_after_a_bad_reply(command: str, reply: Any, said: Any) -> None:
    async with recorded(NAME, resync_interval=0.01) as (peer, vm):
        good = peer.answers[command]
        peer.answers[command] = reply
        await peer.wait_for(command, peer.count(command) + 5)
        assert len(said()) == 1, said()  # of a run of failures, the first
        assert said()[0].startswith(f"cannot read {vm.layout.vm.name}: malformed reply to {command}")
        peer.answers[command] = good
        with_third(peer)
        await vm.wait_for(lambda layout: len(layout.enabled) == 4, timeout=5)
    assert len(said()) == 1


@pytest.mark.parametrize(("command", "reply"), BAD_READS, ids=range(len(BAD_READS)))
async def test_one_bad_reply_leaves_the_next_refresh_as_it_was(command: str, reply: Any) -> None:
    async with recorded(NAME, {"device_add": {}}, resync_interval=None) as (peer, vm):
        good, before = peer.answers[command], vm.layout
        peer.answers[command] = reply
        with pytest.raises(MalformedReplyError, match=command):
            await vm.refresh()
        assert vm.layout is before
        peer.answers[command] = good
        assert (await vm.refresh()).enabled == before.enabled
        assert vm.capabilities.can_plug


async def test_an_error_in_place_of_the_status_is_no_verdict_on_a_plug() -> None:
    async with recorded(NAME, resync_interval=None) as (peer, vm):
        stream = vm.events()
        await peer.event("MIGRATION", {"status": "setup"})
        await until(stream, MigrationChanged)  # so it is asked before anything is sent
        peer.answers["query-status"] = Failure("not now")
        with pytest.raises(MalformedReplyError, match="query-status: an error where every QEMU answers"):
            await vm.plug(3)
        assert peer.count("device_add") == 0


async def test_an_error_at_attach_is_a_machine_without_hotplug_only_where_query_machines_agrees() -> None:
    machines = [{"name": "pc-q35-10.0", "hotpluggable-cpus": True}]
    given = {"query-hotpluggable-cpus": Failure("not now"), "qom-get": "pc-q35-10.0-machine"}
    with pytest.raises(MalformedReplyError, match="an error, from a machine that has slots"):
        async with recorded(NAME, {**given, "query-machines": machines}):
            pass
    machines[0]["hotpluggable-cpus"] = False
    async with recorded(NAME, {**given, "query-machines": machines}) as (_, vm):
        assert not vm.capabilities.can_plug
        assert vm.layout.enabled == {0, 1, 2}


async def test_a_wanted_read_that_failed_is_tried_again() -> None:
    async with recorded(NAME, {"device_del": {}}, resync_interval=None) as (peer, vm):
        unplugging = asyncio.create_task(vm.unplug(2, timeout=30))
        await peer.wait_for("device_del")
        left = [
            {key: slot[key] for key in slot if key != "qom-path"} if n == 5 else slot for n, slot in enumerate(SLOTS)
        ]
        assert sum("qom-path" in slot for slot in left) == 2
        replies: list[Any] = [Failure("not now"), {"not": "a list"}, left]
        peer.answers["query-hotpluggable-cpus"] = lambda _: replies.pop(0) if len(replies) > 1 else left
        await peer.event("ACPI_DEVICE_OST", ost(2, 0))
        assert await unplugging == {2}


async def test_a_close_in_the_middle_of_a_read_is_no_failure(said: Any) -> None:
    async with recorded(NAME, resync_interval=None) as (peer, vm):
        peer.answers["query-hotpluggable-cpus"] = HANG
        await peer.event("DEVICE_DELETED", {"path": next(slot["qom-path"] for slot in SLOTS if "qom-path" in slot)})
        await peer.wait_for("query-hotpluggable-cpus", 2)
        await vm.close()
    assert said() == []


async def test_the_last_look_at_a_deadline_may_fail() -> None:
    async with recorded(NAME, {"device_del": {}}, resync_interval=None) as (peer, vm):
        peer.answers["query-hotpluggable-cpus"] = [SLOTS][0]
        plan = vm.plan("0-1")

        def refuse(_: Command) -> Any:
            peer.answers["query-hotpluggable-cpus"] = Failure("no")
            return {}

        peer.answers["device_del"] = refuse
        with pytest.raises(TransitionError, match="PENDING"):
            await vm.set_map(plan, timeout=0.05)
        with pytest.raises(UnplugPendingError):
            await vm.unplug(2, timeout=0.05)
        peer.answers["query-hotpluggable-cpus"] = SLOTS
        waiting = asyncio.create_task(vm.wait_settled(timeout=30))
        await peer.event("ACPI_DEVICE_OST", ost(2, 0x82))
        assert 2 in (await waiting).enabled


def deep(peer: ScriptedPeer) -> None:
    peer._greeting = DEEP + json.dumps(GREETING).encode() + b"\r\n"


def infinite(peer: ScriptedPeer) -> None:
    greeting = json.loads(json.dumps(GREETING))
    greeting["QMP"]["version"]["qemu"]["major"] = float("inf")
    peer._greeting = greeting


def answering(command: str, reply: Any) -> Any:
    def spoil(peer: ScriptedPeer) -> None:
        peer.answers[command] = reply

    return spoil


SPOILT: list[Any] = [
    deep,
    infinite,
    *(answering(command, reply) for command, reply in BAD_READS),
    answering("query-status", Failure("not now")),
    answering("query-acpi-ospm-status", [{"slot": "9" * 5000, "slot-type": "CPU", "source": 3, "status": 0}]),
    answering("query-uuid", {"UUID": "11111111-1111-1111-1111-111111111111"}),
    answering("query-uuid", {"UUID": 5}),
    answering("query-memory-size-summary", {"base-memory": 10**30}),
]


@pytest.mark.parametrize("spoil", SPOILT, ids=range(len(SPOILT)))
async def test_reconnecting_goes_on_after_a_bad_reply(spoil: Any, said: Any) -> None:
    uuid = {"UUID": "4a1b2f7e-0000-4000-8000-000000000001"}
    async with recorded(NAME, {"query-uuid": uuid}, resync_interval=None, reconnect=True, reply_timeout=5) as (
        peer,
        vm,
    ):
        good, stream = dict(peer.answers), vm.events()
        spoil(peer)
        await peer.hang_up()
        await waiting.until(lambda: any("is not back yet" in line for line in said()))
        peer.answers, peer._greeting = good, GREETING
        assert isinstance((await until(stream, Reconnected))[-1], Reconnected)
        assert (await vm.refresh()).enabled == {0, 1, 2}
        assert len(said()) == 1, said()


@pytest.mark.parametrize("reply", [Failure("not now"), None, 7, [[[]]], {"a": {}}], ids=str)
async def test_a_qemu_that_does_not_tell_its_uuid_for_a_while_is_not_another_vm(reply: Any, said: Any) -> None:
    uuid = {"UUID": "4a1b2f7e-0000-4000-8000-000000000001"}
    async with recorded(NAME, {"query-uuid": uuid}, resync_interval=None, reconnect=True, reply_timeout=5) as (
        peer,
        vm,
    ):
        stream = vm.events()
        peer.answers["query-uuid"] = reply
        await peer.hang_up()
        await waiting.until(lambda: peer.count("query-uuid") >= 4)
        peer.answers["query-uuid"] = uuid
        assert isinstance((await until(stream, Reconnected))[-1], Reconnected)
        assert len(said()) == 1, said()


async def test_another_vm_is_taken_for_one_when_it_has_answered_twice(said: Any) -> None:
    async with recorded(NAME, resync_interval=None, reconnect=True) as (peer, vm):
        peer.answers["query-uuid"] = {"UUID": "11111111-1111-1111-1111-111111111111"}
        await peer.hang_up()
        with pytest.raises(MonitorLostError, match="not the same VM: another uuid"):
            await vm.wait_for(lambda _: False)
        assert peer.count("query-uuid") == 3
    assert len(said()) == 1


async def test_closing_while_a_qemu_that_was_found_is_taken_over_leaves_no_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uuid = {"UUID": "4a1b2f7e-0000-4000-8000-000000000001"}
    async with recorded(NAME, {"query-uuid": uuid}, resync_interval=None, reconnect=True) as (peer, vm):
        left, taking_over, may_end = vm._driver.connection.monitor, asyncio.Event(), asyncio.Event()
        close = left.close

        async def close_slowly() -> None:
            if not taking_over.is_set():
                taking_over.set()
                await may_end.wait()
            await close()

        monkeypatch.setattr(left, "close", close_slowly)
        await peer.hang_up()
        await taking_over.wait()
        closing = asyncio.create_task(vm.close())
        await asyncio.sleep(0)
        may_end.set()
        await closing
        await peer.wait_left()


async def test_what_is_heard_while_attaching_is_kept_as_the_last_word_on_each_thing() -> None:
    ear = Ear()
    heard: list[object] = []

    for _ in range(1000):
        for status in (0x84, 0x82):
            ear.event({"event": "ACPI_DEVICE_OST", "data": ost(2, status)})
        for name in ("STOP", "RESUME", "RESET", "BLOCK_JOB_COMPLETED"):
            ear.event({"event": name, "data": {"x": "y" * 1000}})
    assert len(ear._early) == 4
    for number in range(20_000):
        ear.event({"event": "DEVICE_DELETED", "data": {"path": f"/machine/peripheral/x{number}"}})
    assert len(ear._early) == 16384 + 1024
    ear.hand_over(heard.append, lambda: heard.append("doubt"), heard.append)
    assert heard[-1] == "doubt"  # since it forgot something
    assert ear._early == {}


async def test_what_was_heard_while_attaching_is_taken_in_afterwards() -> None:
    given = {**capture_answers(CAPTURE), "device_add": {}}
    async with ScriptedPeer.from_capture(CAPTURE.data, answers=given) as peer:

        async def busy(_: Command) -> Any:
            await peer.event("ACPI_DEVICE_OST", ost(2, 0x84))
            left = [{k: v for k, v in slot.items() if slot is not SLOTS[5] or k != "qom-path"} for slot in SLOTS]
            peer.answers["query-hotpluggable-cpus"] = left
            await peer.event("DEVICE_DELETED", {"path": SLOTS[5]["qom-path"]})
            return {"status": "running", "running": True}

        peer.answers["query-status"] = busy
        async with qmpvcpu.attach(peer.address, resync_interval=None) as vm:
            assert vm.layout.enabled == {0, 1}


@pytest.mark.parametrize("device", [None, "vcpu2"])
async def test_a_list_in_ascending_order_does_not_lose_a_refusal(device: str | None) -> None:
    slots = [dict(slot) for slot in reversed(SLOTS)]
    async with recorded(NAME, {"query-hotpluggable-cpus": slots, "device_del": {}}) as (peer, vm):
        assert [slot.cpu_index for slot in vm.layout.slots] == list(range(8))
        unplugging = asyncio.create_task(vm.unplug(2))
        await peer.wait_for("device_del")
        answer = ost(2, 0x82)
        answer["info"] |= {} if device is None else {"device": device}
        await peer.event("ACPI_DEVICE_OST", answer)
        with pytest.raises(UnplugRefusedError, match="device is busy"):
            await unplugging


async def test_an_answer_that_names_its_device_is_that_devices_whatever_the_order_of_the_list() -> None:
    shuffled = [SLOTS[n] for n in (3, 7, 1, 0, 5, 2, 6, 4)]
    answers = {"query-hotpluggable-cpus": shuffled, "device_add": {}, "device_del": {}}
    async with recorded(NAME, answers, resync_interval=None) as (peer, vm):
        assert [vm.layout.slot_of(each).cpu_index for each in (0, 1, 2)] == [0, 1, 2]
        await vm.plug(6)
        unplugging = asyncio.create_task(vm.unplug(6))
        await peer.wait_for("device_del")
        answer = ost(6, 0x82)
        answer["info"]["device"] = "vcpu6"
        await peer.event("ACPI_DEVICE_OST", answer)
        with pytest.raises(UnplugRefusedError, match="device is busy"):
            await unplugging


async def test_what_becomes_known_once_the_record_is_closed_is_no_error(tmp_path: Path, said: Any) -> None:
    memory = {"query-memory-size-summary": {"base-memory": 1 << 27}}
    async with recorded(NAME, memory, record=tmp_path / "vm.xml") as (_, vm):
        writer = vm._driver.writer
    vm._engine.intentions.desired = VcpuMap({0})
    writer.changed()
    assert writer._timer is None
    assert said() == []
