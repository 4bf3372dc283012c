"""A device id that a vCPU would get and something else has."""

from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import CommandRejectedError, OnFailure, TransitionError, VcpuController
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.controller.vms import other_client, running
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu
ON_Q35 = pytest.mark.parametrize("on", substrates(["q35"]))
WHERE_REPLUG_WORKS = pytest.mark.parametrize("on", substrates(["q35"], that_survive=True))
OTHER_DEVICE = ["-device", "pcie-root-port,id=vcpu3,chassis=1"]


async def plug_as(guest: MicroGuest, vm: VcpuController, vcpu: int, device_id: str) -> None:
    """Have another client plug *vcpu* under *device_id*."""
    slot = vm.layout.slot_of(vcpu)
    async with other_client(guest) as other:
        await other.execute("device_add", {"driver": slot.type, "id": device_id, **slot.props})
    await vm.refresh()


@ON_Q35
async def test_a_vcpu_whose_id_another_vcpu_has_is_plugged_under_a_free_one(on: Substrate) -> None:
    async with running(on) as (guest, vm):
        await plug_as(guest, vm, 5, "vcpu3")
        assert "device_add vcpu3-2" in str(vm.plan("0,3,5"))
        assert await vm.plug(3) == {3}
        assert (vm.layout[3].device_id, vm.layout[5].device_id) == ("vcpu3-2", "vcpu3")
        await vm.refresh()
        assert vm.layout.enabled == {0, 3, 5}
        assert vm.layout[3].device_id == "vcpu3-2"
        assert await vm.unplug(3) == {3}
        assert vm.layout.enabled == {0, 5}


@ON_Q35
async def test_the_first_free_vcpu_and_a_count_are_not_stopped_by_a_taken_id(on: Substrate) -> None:
    async with running(on, boot=3) as (guest, vm):
        await plug_as(guest, vm, 5, "vcpu3")
        assert await vm.plug() == {3}
        assert (await vm.set_count(6)).layout.enabled == {0, 1, 2, 3, 4, 5}


@WHERE_REPLUG_WORKS
async def test_a_vcpu_under_another_id_is_undone_like_any_other(on: Substrate) -> None:
    stubborn = Behaviour.refusing(0x82).for_slot(1)
    async with running(on, boot=2, behaviour=stubborn) as (guest, vm):
        await plug_as(guest, vm, 5, "vcpu3")
        with pytest.raises(TransitionError) as caught:
            await vm.set_map("0,3,5", on_failure=OnFailure.REVERT)
        assert caught.value.report.outcome.name == "REVERTED"
        assert vm.layout.enabled == {0, 1, 5}


@ON_Q35
async def test_an_id_that_another_kind_of_device_has_is_not_asked_for(on: Substrate) -> None:
    async with running(on, extra_args=OTHER_DEVICE) as (_, vm):
        assert await vm.plug(3) == {3}
        assert vm.layout[3].device_id == "vcpu3-2"


@ON_Q35
async def test_an_id_that_was_taken_since_we_came_is_named_and_passed_over_the_next_time(on: Substrate) -> None:
    port = ["-device", "pcie-root-port,id=port1,chassis=1"]
    async with running(on, extra_args=port) as (guest, vm):
        async with other_client(guest) as other:
            await other.execute("device_add", {"driver": "virtio-rng-pci", "id": "vcpu3", "bus": "port1"})
        with pytest.raises(CommandRejectedError, match="another device is /machine/peripheral/vcpu3: ask again"):
            await vm.plug(3)
        assert await vm.plug(3) == {3}
        assert vm.layout[3].device_id == "vcpu3-2"


@ON_Q35
async def test_a_record_of_a_vcpu_under_another_id_is_read_back(on: Substrate, tmp_path: Any) -> None:
    record = tmp_path / "vm.xml"
    async with running(on, extra_args=OTHER_DEVICE, attach={"record": record}) as (guest, vm):
        await vm.plug(3)
        await vm.close()
        async with qmpvcpu.attach(guest.qmp, record=record) as again:
            assert again.layout[3].device_id == "vcpu3-2"
            assert again.interrupted is None


@pytest.mark.parametrize("on", [each for each in substrates(["q35"]) if each.values[0].version.startswith("10.")])
async def test_a_vcpu_whose_id_no_command_can_name_is_told_to_stay(on: Substrate) -> None:
    """QEMU 10 checks no id that comes over QMP."""
    async with running(on) as (guest, vm):
        await plug_as(guest, vm, 2, "a/b")
        with pytest.raises(CommandRejectedError, match="it stays until the VM is started anew") as caught:
            await vm.unplug(2)
        assert caught.value.error_class == "DeviceNotFound"
        assert vm.layout.enabled == {0, 2}
