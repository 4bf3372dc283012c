"""One vCPU in and out of a real QEMU with a guest that answers."""

import asyncio

import pytest

import qmpvcpu
from qmpvcpu import (
    CommandRejectedError,
    DenialReason,
    Pending,
    Proof,
    Refused,
    StepDeniedError,
    TransitionError,
    Unplugged,
    UnplugPendingError,
    UnplugRefusedError,
    UnprovenError,
    VcpuMap,
    WaitTimeoutError,
)
from qmpvcpu.events import (
    Origin,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlugged,
    VcpuProven,
    VcpuUnplugged,
    VmReset,
)
from qmpvcpu.testing import UNTIL_TOLD, Behaviour, MicroGuest
from tests.controller.vms import other_client, present, running, until
from tests.exchange import exchange
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu
EVERYWHERE = pytest.mark.parametrize("on", substrates())
WHERE_REPLUG_WORKS = pytest.mark.parametrize("on", substrates(["q35"], that_survive=True))
ON_Q35 = pytest.mark.parametrize("on", substrates(["q35"]))


@EVERYWHERE
async def test_a_chosen_vcpu_goes_in_and_comes_out(on: Substrate) -> None:
    async with running(on) as (guest, vm), other_client(guest) as other:
        assert await vm.plug(3) == VcpuMap([3])
        assert await vm.plug() == {1}
        assert vm.layout.enabled == {0, 1, 3}
        assert vm.layout.order == (0, 3, 1)
        assert vm.layout[3].device_id == "vcpu3"
        assert await present(other) == {vcpu.qom_path for vcpu in vm.layout if vcpu.enabled}
        assert await vm.unplug(3) == {3}
        assert vm.layout.enabled == {0, 1}
        assert await present(other) == {vcpu.qom_path for vcpu in vm.layout if vcpu.enabled}
        assert list(vm.layout.order) == [0, 1]


@WHERE_REPLUG_WORKS
async def test_the_same_slot_can_be_filled_again_and_again(on: Substrate) -> None:
    async with running(on) as (_, vm):
        for _ in range(3):
            await vm.plug(5)
            await vm.unplug(5)
        assert vm.layout.enabled == {0}


@ON_Q35
async def test_a_plug_is_one_device_add_and_nothing_else(on: Substrate) -> None:
    async with running(on) as (_, vm):
        with exchange() as sent:
            for vcpu in (1, 2, 3):
                await vm.plug(vcpu)
        assert sent == ["device_add"] * 3


@pytest.mark.parametrize("on", substrates(["q35"], accels=["kvm"]))
async def test_an_unplug_under_kvm_is_one_device_del_and_nothing_else(on: Substrate) -> None:
    async with running(on, boot=3) as (_, vm):
        with exchange() as sent:
            await vm.unplug(2)
            await vm.unplug(1)
        assert sent == ["device_del"] * 2


@EVERYWHERE
async def test_a_refusal_is_told_at_once_with_its_reason_and_may_be_retried(on: Substrate) -> None:
    busy = Behaviour.refusing(0x82).for_first(1)
    async with running(on, behaviour=busy) as (_, vm):
        await vm.plug(2)
        with pytest.raises(
            UnplugRefusedError, match="vCPU 2 refused by the guest with OST status 0x82: device is busy"
        ) as e:
            await vm.unplug(2, timeout=20)
        assert (e.value.code, e.value.reason, tuple(e.value.ids)) == (0x82, "device is busy", (2,))
        assert vm.layout.enabled == {0, 2}
        assert not vm.layout.pending
        assert await vm.unplug(2) == {2}


@ON_Q35
async def test_a_slow_guest_is_pending_and_its_late_answer_is_an_event(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (guest, vm):
        await vm.plug(2)
        stream = vm.events()
        request = await vm.request_unplug(2)
        assert repr(request) == "<UnplugRequest of vCPU 2: no answer yet>"
        await until(stream, UnplugAcknowledged)
        verdict = await request.wait(0.01)
        assert isinstance(verdict, Pending)
        assert verdict.acknowledged
        assert request.verdict is None
        assert vm.layout.pending == {2}
        assert vm.layout.enabled == {0, 2}
        with pytest.raises(WaitTimeoutError, match="plugged now: 0,2, pending 2"):
            await vm.wait_settled(timeout=0.01)
        await guest.set_behaviour(Behaviour.complying())
        assert isinstance(await request.wait(20), Unplugged)
        await vm.wait_settled(timeout=5)
        seen = await until(stream, VcpuUnplugged)
        assert [type(event) for event in seen] == [UnplugPending, VcpuUnplugged]
        late = seen[-1]
        assert isinstance(late, VcpuUnplugged)
        assert (late.late, late.origin, late.ids) == (True, Origin.US, VcpuMap([2]))
        assert late.requested_at is not None
        assert vm.layout.enabled == {0}
        assert isinstance(request.verdict, Unplugged)


@ON_Q35
async def test_a_late_refusal_is_an_event_too(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (guest, vm):
        await vm.plug(2)
        stream = vm.events()
        with pytest.raises(UnplugPendingError) as caught:
            await vm.unplug(2, timeout=0.05)
        assert caught.value.timeout == 0.05
        await guest.set_behaviour(Behaviour.refusing(0x81))
        late = (await until(stream, UnplugRefused))[-1]
        assert isinstance(late, UnplugRefused)
        assert (late.late, late.code, late.reason) == (True, 0x81, "device is in use by an application")
        assert vm.layout.enabled == {0, 2}
        assert not vm.layout.pending


@ON_Q35
async def test_a_silent_guest_is_asked_once_however_often_we_are(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.silent()) as (guest, vm):
        await vm.plug(2)
        with exchange() as sent:
            with pytest.raises(UnplugPendingError, match="the guest has not reacted") as caught:
                await vm.unplug(2, timeout=0.05)
            again = await vm.request_unplug(2)
            both = await asyncio.gather(again.wait(0), vm.request_unplug(2))
        assert not caught.value.acknowledged
        assert again.joined
        assert both[1].joined
        assert isinstance(both[0], Pending)
        assert sent.count("device_del") == 1
        await guest.set_behaviour(Behaviour.complying())
        await guest.scan_slots()
        assert isinstance(await again.wait(20), Unplugged)


@ON_Q35
async def test_a_guest_that_lies_is_not_believed_and_may_be_asked_again(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.lying()) as (guest, vm), other_client(guest) as other:
        await vm.plug(2)
        for _ in range(2):
            with pytest.raises(UnplugRefusedError, match="answered success, and the vCPU is still there") as caught:
                await vm.unplug(2)
            assert caught.value.code == 0
        assert vm.layout.enabled == {0, 2}
        assert vm.layout.pending == VcpuMap()
        assert "/machine/peripheral/vcpu2" in await present(other)
        await guest.set_behaviour(Behaviour.complying())
        assert await vm.unplug(2) == {2}
        assert "/machine/peripheral/vcpu2" not in await present(other)


@ON_Q35
async def test_a_guest_that_ejects_without_a_word_is_found_out(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.wordless()) as (_, vm):
        await vm.plug(2)
        assert await vm.unplug(2, timeout=1.0) == {2}


@WHERE_REPLUG_WORKS
async def test_a_removal_survives_a_reset_and_fires_with_the_next_hotplug(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.silent_until_reset()) as (guest, vm), other_client(guest) as other:
        await vm.plug(2)
        stream = vm.events()
        with pytest.raises(UnplugPendingError):
            await vm.unplug(2, timeout=0.05)
        await other.execute("system_reset")
        await until(stream, VmReset)
        await guest.wait_ready()
        assert vm.layout.pending == {2}
        await vm.plug(5)
        late = (await until(stream, VcpuUnplugged))[-1]
        assert isinstance(late, VcpuUnplugged)
        assert late.ids == {2}
        assert late.late
        assert vm.layout.enabled == {0, 5}


@EVERYWHERE
async def test_a_boot_vcpu_leaves_by_its_qom_path(on: Substrate) -> None:
    async with running(on, boot=3) as (_, vm):
        assert vm.layout[1].device_id is None
        assert vm.layout[1].hotpluggable
        assert await vm.unplug(1) == {1}
        assert vm.layout.enabled == {0, 2}
        if on.survives_plug_after_unplug:
            await vm.plug(1)
            assert vm.layout[1].device_id == "vcpu1"
            assert vm.layout.order == (0, 2, 1)
            assert await vm.unplug(1) == {1}


@ON_Q35
async def test_cpus_from_the_command_line_are_found_and_leave(on: Substrate) -> None:
    async with running(on, boot={0, 2, 5}) as (_, vm):
        assert vm.layout.enabled == {0, 2, 5}
        assert vm.layout[5].device_id == "vcpu5"
        assert await vm.unplug(5) == {5}
        assert vm.layout.enabled == {0, 2}


@ON_Q35
async def test_an_acknowledgement_can_be_waited_for(on: Substrate) -> None:
    async with running(on) as (_, vm):
        await vm.plug(2, proof=Proof.ACKNOWLEDGED)
        assert vm.layout[2].acknowledged is True


@ON_Q35
async def test_an_acknowledgement_that_does_not_come_is_no_failure_unless_required(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.silent_about_inserts()) as (_, vm):
        assert await vm.plug(2, proof=Proof.ACKNOWLEDGED, timeout=0.05) == {2}
        assert vm.layout[2].acknowledged is None
        with pytest.raises(UnprovenError, match=r"no answer within 0\.05 s .it is still booting, or") as caught:
            await vm.plug(3, require_proof=True, timeout=0.05)
        assert caught.value.code is None
        assert vm.layout.enabled == {0, 2, 3}


@ON_Q35
async def test_a_guest_that_does_not_take_the_cpu_is_told_with_its_code(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.refusing_inserts(0x81)) as (_, vm):
        assert await vm.plug(2, proof=Proof.ACKNOWLEDGED) == {2}
        assert vm.layout[2].acknowledged is False
        with pytest.raises(UnprovenError, match="device driver load failure") as caught:
            await vm.plug(3, require_proof=True)
        assert caught.value.code == 0x81


@WHERE_REPLUG_WORKS
async def test_set_state_is_idempotent(on: Substrate) -> None:
    async with running(on) as (_, vm):
        with exchange() as sent:
            await vm.set_state(2, enabled=True)
            await vm.set_state(2, enabled=True)
            await vm.set_state(2, enabled=False)
            await vm.set_state(2, enabled=False)
            assert await vm.set_state(2, enabled=True) == {2}
        assert [command for command in sent if command.startswith("device_")] == [
            "device_add",
            "device_del",
            "device_add",
        ]
        with pytest.raises(StepDeniedError, match="no vCPU 8"):
            await vm.set_state(8, enabled=True)


@WHERE_REPLUG_WORKS
async def test_a_wish_to_keep_a_vcpu_that_is_leaving_waits_and_plugs_it_again(on: Substrate) -> None:
    async with running(on, behaviour=Behaviour.hanging()) as (guest, vm):
        await vm.plug(2)
        await vm.request_unplug(2)
        with pytest.raises(UnplugPendingError):
            await vm.set_state(2, enabled=True, timeout=0.05)
        keeping = asyncio.create_task(vm.set_state(2, enabled=True))
        await guest.set_behaviour(Behaviour.complying())
        assert await keeping == {2}
        assert vm.layout.enabled == {0, 2}
        assert vm.layout.order == (0, 2)
        await guest.set_behaviour(Behaviour.hanging())
        request = await vm.request_unplug(2)
        keeping = asyncio.create_task(vm.set_state(2, enabled=True))
        await guest.set_behaviour(Behaviour.refusing(0x80))
        assert await keeping == {2}
        assert isinstance(request.verdict, Refused)


@pytest.mark.parametrize("on", [p for p in substrates(["q35"]) if p.values[0].has_legacy_mode])
async def test_a_guest_whose_acpi_is_not_up_yet_gets_a_hint(on: Substrate) -> None:
    # No time is told the guest to come up in: it is held in reset by not being run at all.
    async with running(on, wait=False, extra_args=["-S"]) as (guest, vm), other_client(guest) as other:
        await vm.plug(2)
        with pytest.raises(CommandRejectedError, match="ACPI hotplug is not up yet") as caught:
            await vm.unplug(2)
        assert caught.value.error_class == "GenericError"
        assert caught.value.sent["execute"] == "device_del"
        assert vm.layout.enabled == {0, 2}
        assert not vm.layout.pending
        await other.execute("cont")
        await guest.wait_ready()
        assert await vm.unplug(2) == {2}


@ON_Q35
async def test_a_paused_vm_answers_when_it_goes_on(on: Substrate) -> None:
    async with running(on) as (guest, vm), other_client(guest) as other:
        await other.execute("stop")
        await vm.plug(2)
        request = await vm.request_unplug(2)
        assert isinstance(await request.wait(0.05), Pending)
        await other.execute("cont")
        assert isinstance(await request.wait(20), Unplugged)


@ON_Q35
async def test_what_could_be_known_beforehand_is_not_sent(on: Substrate) -> None:
    async with running(on, max_vcpus=3) as (_, vm):
        await vm.plug(1)
        await vm.plug(2)
        with exchange() as sent:
            for call, reason in [
                (vm.plug(), DenialReason.MACHINE_FULL),
                (vm.plug(2), DenialReason.SLOT_OCCUPIED),
                (vm.plug(3), DenialReason.UNKNOWN_VCPU),
                (vm.plug(-1), DenialReason.UNKNOWN_VCPU),
                (vm.unplug(0), DenialReason.BOOT_VCPU),
                (vm.unplug(3), DenialReason.UNKNOWN_VCPU),
            ]:
                with pytest.raises(StepDeniedError) as caught:
                    await call
                assert caught.value.reason is reason
        assert [command for command in sent if command.startswith("device_")] == []
        await vm.unplug(2)
        with pytest.raises(StepDeniedError) as caught:
            await vm.unplug(2)
        assert caught.value.reason is DenialReason.SLOT_EMPTY


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_what_this_qemu_would_not_survive_is_denied(on: Substrate) -> None:
    async with running(on, max_vcpus=3) as (guest, vm):
        await vm.plug(1)
        await vm.unplug(1)
        if on.survives_plug_after_unplug:
            await vm.plug(2)
        with pytest.raises(StepDeniedError, match="allow_fatal=True") as caught:
            await vm.plug(1)
        assert caught.value.reason is DenialReason.FATAL
        assert guest.process.returncode is None


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_what_happened_before_we_attached_counts_too(on: Substrate) -> None:

    async with running(on, max_vcpus=2) as (guest, vm):
        await vm.plug(1)
        await vm.unplug(1)
        async with qmpvcpu.attach(guest.sockets[1]) as again:
            with pytest.raises(StepDeniedError) as caught:
                await again.plug(1)
        assert caught.value.reason is DenialReason.FATAL


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_single_threaded_tcg_is_noticed_before_it_kills_qemu(on: Substrate) -> None:
    # The accelerator's options are of the guest's making, so this QEMU is told by its last -accel.
    async with MicroGuest(on.qemu, machine=on.machine, accel="tcg,thread=single") as guest:  # type: ignore[arg-type]  # an option rides along
        async with qmpvcpu.attach(guest.qmp) as vm:
            await vm.plug(1)
            with pytest.raises(StepDeniedError, match="single-threaded TCG"):
                await vm.unplug(1)
        assert guest.process.returncode is None


@ON_Q35
async def test_the_events_of_a_plug_and_an_unplug_tell_the_story(on: Substrate) -> None:
    async with running(on) as (_, vm):
        stream = vm.events()
        await vm.plug(4, proof=Proof.ACKNOWLEDGED)
        await vm.unplug(4)
        seen = await until(stream, VcpuUnplugged)
        plugged, proven, *leaving = seen
        assert isinstance(plugged, VcpuPlugged)
        assert isinstance(proven, VcpuProven)
        assert proven.proof is Proof.ACKNOWLEDGED
        assert proven.seconds is not None
        assert [type(event) for event in leaving] == [UnplugRequested, UnplugAcknowledged, VcpuUnplugged]
        assert {event.origin for event in (plugged, *leaving)} == {Origin.US}
        assert [event.generation for event in seen] == sorted(event.generation for event in seen)


@pytest.mark.parametrize("on", [on for on in substrates(["q35"], accels=["kvm"]) if on.values[0].has_legacy_mode])
async def test_everybody_who_joined_a_removal_that_qemu_rejects_is_told_of_it(on: Substrate) -> None:
    async with running(on, boot=3, ready_after_ms=UNTIL_TOLD, wait=False) as (_, vm):
        for _ in range(5):
            asked = [vm.set_map("0-1", timeout=5), *(vm.unplug(2) for _ in range(3)), vm.set_state(2, enabled=False)]
            ends = await asyncio.gather(*asked, vm.set_state(2, enabled=True), return_exceptions=True)
            assert isinstance(ends[0], TransitionError)
            assert [type(each) for each in ends[1:-1]] == [CommandRejectedError] * 4
            assert all("guest's ACPI hotplug is not up yet" in str(each) for each in ends[:-1])
            assert ends[-1] == {2}  # it stays, as was wished
            assert vm.layout.enabled == {0, 1, 2}
            assert not vm.layout.pending
