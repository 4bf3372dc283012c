"""Real QEMUs are started with the arguments, and asked what they have."""

import pytest

from qmpvcpu.launch import arguments
from tests.launch.domains import STATES
from tests.launch.vms import assert_is, started
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("on", [*substrates(("q35",)), *substrates(("pc",), accels=("kvm",))])
@pytest.mark.parametrize("state", STATES)
async def test_a_qemu_started_with_all_of_it_has_the_same_slots_in_the_same_order(on: Substrate, state: str) -> None:
    domain = STATES[state]
    built = arguments(domain)
    async with started(on, built, *built.argv) as vm:
        assert_is(vm.layout, domain)
        again = arguments(vm.layout)
    assert again.device_add == built.device_add
    assert again.cpu == built.cpu
    assert again.smp.partition(",")[0] == built.smp.partition(",")[0]
