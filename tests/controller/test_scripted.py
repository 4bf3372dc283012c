"""What no QEMU here does on demand: other architectures as recorded, stale answers, nonsense, silence."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import (
    CommandRejectedError,
    DenialReason,
    MalformedReplyError,
    MonitorConnectError,
    MonitorTimeoutError,
    OnFailure,
    OutcomeUnknownError,
    Pending,
    StepDeniedError,
    TransitionError,
    UnplugRefusedError,
    VcpuController,
)
from qmpvcpu.errors import PlugUndoneError, UnsupportedMachineError
from qmpvcpu.events import Disconnected, Origin, VcpuUnplugged
from qmpvcpu.testing.peer import HANG, Command, Failure, ScriptedPeer
from tests.captures import Capture, all_captures
from tests.controller.vms import until

CAPTURES = {capture.name: capture for capture in all_captures()}


def capture_answers(capture: Capture) -> dict[str, Any]:
    """What the recordings did not ask, and attach does."""
    kvm = {"enabled": True, "present": True}
    return {"query-target": {"arch": capture.arch}, "query-kvm": kvm, "query-migrate": {}}


@asynccontextmanager
async def recorded(
    name: str, answers: Mapping[str, Any] | None = None, **attach: Any
) -> AsyncIterator[tuple[ScriptedPeer, VcpuController]]:
    """A VM that speaks as a recorded one did."""
    capture = CAPTURES[name]
    given = {**capture_answers(capture), **(answers or {})}
    async with (
        ScriptedPeer.from_capture(capture.data, answers=given) as peer,
        qmpvcpu.attach(peer.address, **attach) as vm,
    ):
        yield peer, vm


def ost(vcpu: int, status: int, *, source: int = 3) -> dict[str, Any]:
    return {"info": {"slot": str(vcpu), "slot-type": "CPU", "source": source, "status": status}}


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=str)
async def test_every_recorded_machine_can_be_attached_to(capture: Capture) -> None:
    async with recorded(capture.name) as (_, vm):
        expected = next(capture.layouts())
        assert vm.layout.slots == expected.slots
        assert vm.layout.order == expected.order
        assert vm.capabilities.can_plug == bool(capture.replies("query-hotpluggable-cpus"))
        version = capture.data["greeting"]["QMP"]["version"]["qemu"]
        assert vm.capabilities.qemu_version == (version["major"], version["minor"], version["micro"])


async def test_a_pseries_core_moves_whole() -> None:
    answers: dict[str, Any] = {"device_add": {}, "device_del": {}}
    async with recorded("10.0.2-pseries-threads4", answers) as (peer, vm):
        with pytest.raises(StepDeniedError, match="slot of vCPUs 4-7") as caught:
            await vm.plug(5)
        assert caught.value.reason is DenialReason.PART_OF_SLOT
        assert await vm.plug(4) == {4, 5, 6, 7}
        added = await peer.wait_for("device_add")
        assert dict(added.arguments) == {
            "driver": "power10_v2.0-spapr-cpu-core",
            "id": "vcpu4",
            "core-id": 4,
            "node-id": 0,
        }
        request = await vm.request_unplug(4)
        path = "/machine/peripheral/vcpu4"
        await peer.event("DEVICE_DELETED", {"path": f"{path}/thread[0]"})
        await peer.event("DEVICE_UNPLUG_GUEST_ERROR", {"device": "vcpu4", "path": path})
        verdict = await request.wait(5)
        assert isinstance(verdict, qmpvcpu.Refused)
        assert (verdict.code, verdict.reason) == (None, "the guest rejected the request")
        assert {4, 5, 6, 7} <= vm.layout.enabled
        unplugging = asyncio.create_task(vm.unplug(4))
        await peer.wait_for("device_del", 2)
        await peer.event("DEVICE_DELETED", {"device": "vcpu4", "path": path})
        assert await unplugging == {4, 5, 6, 7}
        with pytest.raises(StepDeniedError) as caught:
            await vm.unplug(0)
        assert caught.value.reason is DenialReason.BOOT_VCPU


async def test_an_s390x_takes_cpus_and_does_not_give_them_back() -> None:
    async with recorded("10.0.2-s390-ccw-virtio", {"device_add": {}}) as (peer, vm):
        assert vm.capabilities.can_plug
        assert not vm.capabilities.can_unplug
        assert await vm.plug(2) == {2}
        with pytest.raises(UnsupportedMachineError):
            await vm.unplug(2)
        assert peer.count("device_del") == 0


async def test_a_refusal_without_0x84_before_it_is_one() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", {"device_add": {}, "device_del": {}}) as (peer, vm):
        unplugging = asyncio.create_task(vm.unplug(2))
        await peer.wait_for("device_del")
        await peer.event("ACPI_DEVICE_OST", ost(2, 0x80, source=0x103))
        with pytest.raises(UnplugRefusedError, match="device is locked"):
            await unplugging


async def test_a_stale_success_after_a_replug_is_not_believed() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", {"device_add": {}, "device_del": {}}) as (peer, vm):
        await vm.plug(5)
        reading = cpus_with(peer, 5)
        request = await vm.request_unplug(5)
        reads = peer.count("query-hotpluggable-cpus")
        await peer.event("ACPI_DEVICE_OST", ost(5, 0))
        await peer.wait_for("query-hotpluggable-cpus", reads + 1)
        assert isinstance(await request.wait(0.05), Pending)
        assert 5 in vm.layout.enabled
        reading["there"] = False
        await peer.event("ACPI_DEVICE_OST", ost(5, 0))
        assert isinstance(await request.wait(5), qmpvcpu.Unplugged)


def cpus_with(peer: ScriptedPeer, vcpu: int) -> dict[str, bool]:
    """Make *peer*'s reads show a CPU plugged by us in one slot while ``["there"]`` is true."""
    state = {"there": True}
    entries = CAPTURES["10.0.2-q35-sct-2x2x2-boot3"].replies("query-hotpluggable-cpus")[0]

    def answer(_: Command) -> Any:
        shown = [dict(entry) for entry in entries]
        if state["there"]:
            shown[len(shown) - 1 - vcpu]["qom-path"] = f"/machine/peripheral/vcpu{vcpu}"
        return shown

    peer.answers["query-hotpluggable-cpus"] = answer
    return state


async def test_a_plug_that_an_old_second_removal_undoes_is_told() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", {"device_add": {}, "device_del": {}}) as (peer, vm):
        await vm.plug(5)
        request = await vm.request_unplug(5)
        await peer.event("ACPI_DEVICE_OST", ost(5, 0x84))
        await peer.event("ACPI_DEVICE_OST", ost(5, 0x84))  # somebody asked a second time
        await peer.event("DEVICE_DELETED", {"device": "vcpu5", "path": "/machine/peripheral/vcpu5"})
        assert isinstance(await request.wait(5), qmpvcpu.Unplugged)
        plugging = asyncio.create_task(vm.plug(5))
        await peer.wait_for("device_add", 2)
        await peer.event("ACPI_DEVICE_OST", ost(5, 0, source=1))
        with pytest.raises(PlugUndoneError, match="still had a second removal"):
            await plugging  # the recording's read shows the slot empty
        assert 5 not in vm.layout.enabled


async def test_every_answer_may_come_before_the_reply() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", {"device_add": {}}) as (peer, vm):
        await vm.plug(5)
        stream = vm.events()
        del peer.answers["device_del"]
        peer.reject_others = False
        unplugging = asyncio.create_task(vm.unplug(5))
        command = await peer.expect("device_del")
        await peer.event("ACPI_DEVICE_OST", ost(5, 0x84))
        await peer.event("DEVICE_DELETED", {"device": "vcpu5", "path": "/machine/peripheral/vcpu5"})
        await peer.event("ACPI_DEVICE_OST", ost(5, 0))
        gone = (await until(stream, VcpuUnplugged))[-1]
        assert gone.origin is Origin.US
        await command.reply({})
        assert await unplugging == {5}


async def test_events_that_make_no_sense_are_passed_over() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", {"device_add": {}}) as (peer, vm):
        before = vm.layout
        nonsense: list[tuple[str, dict[str, Any]]] = [
            ("ACPI_DEVICE_OST", {"info": {"slot": "x", "slot-type": "CPU", "source": 3, "status": 0}}),
            ("ACPI_DEVICE_OST", {}),
            ("DEVICE_DELETED", {"device": "vcpu5"}),
            ("DEVICE_DELETED", {"path": "/machine/peripheral/vcpu77"}),
            ("SOMETHING_NEW", {"a": [1]}),
        ]
        for name, data in nonsense:
            await peer.event(name, data)
        await vm.plug(7)  # its reply comes behind them all
        assert vm.layout.enabled - before.enabled == {7}


ENTRY = {"type": "qemu64-x86_64-cpu", "vcpus-count": 1, "props": {"core-id": 0}}


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        ("query-hotpluggable-cpus", {"not": "a list"}),
        ("query-hotpluggable-cpus", [{"type": "t", "vcpus-count": 1, "props": {}}]),
        ("query-hotpluggable-cpus", [{**ENTRY, "type": "vfio-pci,host=0000:01:00.0"}]),
        ("query-hotpluggable-cpus", [{**ENTRY, "type": "host,+vmx-x86_64-cpu"}]),
        ("query-hotpluggable-cpus", [{**ENTRY, "props": {"core-id": 0, "driver": "virtio-9p-pci"}}]),
        ("query-hotpluggable-cpus", [{**ENTRY, "props": {"core-id": 0, "id": 7}}]),
        ("query-hotpluggable-cpus", [{**ENTRY, "props": {"core-id": "0,x=y"}}]),
        ("query-hotpluggable-cpus", [{**ENTRY, "qom-path": "/machine/peripheral/a,b"}]),
        ("query-cpus-fast", [{"cpu-index": 0}]),
        ("qom-get /machine type", "q35,firmware=/etc/shadow-machine"),
        ("query-uuid", {"UUID": "../../../etc/shadow"}),
        ("query-status", {}),
        ("query-acpi-ospm-status", "?"),
    ],
)
async def test_nonsense_at_attach_is_an_error_that_quotes_it(command: str, reply: Any) -> None:
    with pytest.raises(MalformedReplyError, match=f"malformed reply to {command}") as caught:
        async with recorded("10.0.2-q35-sct-2x2x2-boot3", {command.partition(" ")[0]: reply}):
            pass
    assert caught.value.command == command


async def test_silence_at_attach_ends_at_the_deadline() -> None:
    # Long enough for the queries that are answered, on a busy machine too: they go out with it.
    with pytest.raises(MonitorTimeoutError, match=r"query-status within 1 s"):
        async with recorded("10.0.2-q35-sct-2x2x2-boot3", {"query-status": HANG}, reply_timeout=1):
            pass


async def test_a_line_of_20_megabytes_ends_the_session_with_its_reason() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3") as (peer, vm):
        stream = vm.events()
        with contextlib.suppress(ConnectionError):  # we hang up before its end
            await peer.send(b'{"event": "' + b"x" * 20_000_000 + b'"}\n')
        lost = (await until(stream, Disconnected))[-1]
        assert isinstance(lost, Disconnected)
        assert "10" in lost.why  # the limit, in bytes
        with pytest.raises(qmpvcpu.MonitorLostError):
            await vm.plug(7)


async def test_what_is_no_qmp_is_no_vm() -> None:
    async with ScriptedPeer(greeting=b"HTTP/1.1 400 Bad Request\r\n\r\n") as peer:
        with pytest.raises(MonitorConnectError, match=r"HTTP/1\.1 400"):
            await qmpvcpu.attach(peer.address, reply_timeout=1)


async def test_a_read_of_another_machine_is_refused_and_changes_nothing() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3") as (peer, vm):
        before = vm.layout
        peer.answers["query-hotpluggable-cpus"] = CAPTURES["10.0.2-pc-sct-2x2x1"].replies("query-hotpluggable-cpus")[
            0
        ]
        peer.answers["query-cpus-fast"] = CAPTURES["10.0.2-pc-sct-2x2x1"].replies("query-cpus-fast")[0]
        with pytest.raises(MalformedReplyError, match="not those of the first read"):
            await vm.refresh()
        assert vm.layout is before


async def test_a_reply_that_is_none_leaves_the_outcome_unknown() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3") as (peer, vm):
        del peer.answers["device_add"], peer.answers["device_del"]
        peer.reject_others = False
        plugging = asyncio.create_task(vm.plug(5))
        await (await peer.expect("device_add")).answer({"neither": 1})
        with pytest.raises(OutcomeUnknownError, match="malformed reply to device_add"):
            await plugging
        assert 5 not in vm.layout.enabled
        cpus_with(peer, 5)  # QEMU did it all the same
        await peer.event("ACPI_DEVICE_OST", ost(5, 0, source=1))
        await vm.wait_for(lambda layout: 5 in layout.enabled, timeout=5)
        unplugging = asyncio.create_task(vm.unplug(2))
        await (await peer.expect("device_del")).answer({"neither": 1})
        with pytest.raises(OutcomeUnknownError, match="malformed reply to device_del"):
            await unplugging


async def test_a_session_that_ends_right_after_a_rejection_leaves_the_rejection() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3") as (peer, vm):

        async def reject_and_leave(command: Command) -> Any:
            await command.fail("no")
            await peer.hang_up()
            return HANG

        peer.answers["device_add"] = reject_and_leave
        with pytest.raises(CommandRejectedError) as caught:
            await vm.plug(5)
        assert caught.value.hint == ""


async def test_a_session_that_ends_right_after_a_rejection_lets_a_map_send_nothing_more() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3") as (peer, vm):

        async def reject_and_leave(command: Command) -> Any:
            await command.fail("no")
            await peer.hang_up()
            return HANG

        peer.answers["device_del"] = reject_and_leave
        with pytest.raises(TransitionError) as caught:
            await vm.set_map("0", on_failure=OnFailure.CONTINUE, in_flight=1, timeout=0)
        _, other = caught.value.report.steps
        assert other.verdict is None  # had it been sent, it would be UNKNOWN


async def test_a_wait_ends_though_the_last_look_is_not_answered() -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", {"device_del": {}}, reply_timeout=1.0) as (peer, vm):
        request = await vm.request_unplug(2)
        peer.answers["query-hotpluggable-cpus"] = HANG
        assert isinstance(await request.wait(0.05), Pending)


async def test_reads_that_fail_in_the_background_do_not_end_them(caplog: pytest.LogCaptureFixture) -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", reply_timeout=0.05, resync_interval=0.01) as (peer, vm):
        working = peer.answers["query-hotpluggable-cpus"]
        peer.answers["query-hotpluggable-cpus"] = HANG
        reads = peer.count("query-hotpluggable-cpus")
        await peer.wait_for("query-hotpluggable-cpus", reads + 2)
        peer.answers["query-hotpluggable-cpus"] = working
        reads = peer.count("query-hotpluggable-cpus")
        await peer.wait_for("query-hotpluggable-cpus", reads + 2)
        assert (await vm.refresh()).enabled == {0, 1, 2}
    assert "did not reply to query-hotpluggable-cpus" in caplog.text


async def test_what_qemu_does_not_know_is_done_without() -> None:
    missing = Failure("nope", "CommandNotFound")
    names = ("query-name", "query-uuid", "query-memory-size-summary", "qom-get", "qom-list", "query-migrate")
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", dict.fromkeys(names, missing)) as (_, vm):
        info = vm.layout.vm
        assert (info.uuid, info.memory_kib, info.topology, info.machine) == (None, None, None, "unknown")
        assert info.name  # from the socket's path


async def test_what_happens_while_we_read_is_not_missed() -> None:
    capture = CAPTURES["10.0.2-q35-sct-2x2x2-boot3"]
    slots: list[dict[str, Any]] = [dict(slot) for slot in capture.replies("query-hotpluggable-cpus")[0]]

    async def answer_late(_: Command) -> Any:
        for slot in slots:
            if slot.get("qom-path") == BOOT_CPU_2:
                del slot["qom-path"]
        await peer.event("DEVICE_DELETED", {"path": BOOT_CPU_2})
        return {"status": "running", "running": True}

    answers = {**capture_answers(capture), "query-status": answer_late, "query-hotpluggable-cpus": lambda _: slots}
    peer = ScriptedPeer.from_capture(capture.data, answers=answers)
    async with peer, qmpvcpu.attach(peer.address) as vm:
        assert vm.layout.enabled == {0, 1}
        assert vm.address == peer.address


BOOT_CPU_2 = next(CAPTURES["10.0.2-q35-sct-2x2x2-boot3"].layouts())[2].qom_path


async def test_a_session_that_ends_at_the_end_of_the_reading_is_lost_from_the_start(tmp_path: Path) -> None:
    async def leave(command: Command) -> Any:
        if command.arguments == {"path": "/machine/peripheral"}:  # what is asked last
            await command.reply([])
            await peer.hang_up()
            return HANG
        return []

    capture = CAPTURES["10.0.2-q35-sct-2x2x2-boot3"]
    memory = {"base-memory": 2**26, "plugged-memory": 0}
    answers = {**capture_answers(capture), "query-memory-size-summary": memory, "qom-list": leave}
    async with ScriptedPeer.from_capture(capture.data, answers=answers) as peer:
        vm = await qmpvcpu.attach(peer.address, name="web", record=tmp_path / "vm.xml")
        with pytest.raises(qmpvcpu.MonitorLostError):
            await vm.wait_for(lambda layout: 7 in layout.enabled, timeout=5)
        await vm.close()


@pytest.mark.parametrize("rejections", [3, 9])
async def test_a_plug_is_sent_again_while_qemu_holds_the_id_of_the_vcpu_that_left(rejections: int) -> None:
    async with recorded("10.0.2-q35-sct-2x2x2-boot3", {"device_del": {}}) as (peer, vm):
        path = vm.layout.slot_of(2).qom_path
        unplugging = asyncio.create_task(vm.unplug(2))
        await peer.wait_for("device_del")
        slots = CAPTURES["10.0.2-q35-sct-2x2x2-boot3"].replies("query-hotpluggable-cpus")[0]
        peer.answers["query-hotpluggable-cpus"] = [
            {key: value for key, value in slot.items() if slot.get("qom-path") != path or key != "qom-path"}
            for slot in slots
        ]
        await peer.event("DEVICE_DELETED", {"path": path})
        assert await unplugging == {2}
        left = rejections

        async def hold(command: Command) -> Any:
            nonlocal left
            left -= 1
            if left >= 0:
                await command.fail("Duplicate device ID 'vcpu2'")
                return HANG
            return {}

        peer.answers["device_add"] = hold
        if rejections == 3:
            assert await vm.plug(2) == {2}
            assert peer.count("device_add") == 4
        else:
            with pytest.raises(CommandRejectedError, match="QEMU may hold its id"):
                await vm.plug(2)
            assert peer.count("device_add") == 5
            assert not vm.layout[2].enabled
