"""A QEMU that waits in -preconfig has slots and no vCPU: what it could only reject is not sent."""

import pytest

import qmpvcpu
from qmpvcpu import DenialReason, StepDeniedError
from qmpvcpu.testing import MicroGuest
from tests.controller.vms import other_client
from tests.exchange import exchange
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_a_machine_that_is_not_built_is_denied_plugs_until_it_is(on: Substrate) -> None:
    async with (
        MicroGuest(on.qemu, machine=on.machine, accel=on.accel, wait=False, extra_args=["-preconfig"]) as guest,
        qmpvcpu.attach(guest.qmp) as vm,
    ):
        with exchange() as sent:
            for change in (vm.plug(3), vm.plug(), vm.set_map("0,3")):
                with pytest.raises(StepDeniedError, match="-preconfig") as caught:
                    await change
                assert caught.value.reason is DenialReason.MACHINE_NOT_BUILT
        assert "device_add" not in sent
        async with other_client(guest) as client:
            await client.execute("x-exit-preconfig")
        await vm.refresh()
        assert await vm.plug(3) == {3}
