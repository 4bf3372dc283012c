"""Real QEMUs are started with the arguments, and asked what they have."""

from dataclasses import replace

import pytest

from qmpvcpu.domainxml import NumaCell
from qmpvcpu.launch import arguments
from qmpvcpu.model.vcpumap import VcpuMap
from tests.launch.domains import STATES, domain_of
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


# Arguments that libvirt 9.0.0 does not give, or that few documents lead to.
UNLIKE = {
    "a cell without memory": domain_of(
        4, 1, [3], numa=(NumaCell(0, VcpuMap([0, 1]), 65536), NumaCell(1, VcpuMap([2, 3]), 0))
    ),
    "i686 on the x86_64 QEMU": domain_of(4, 1, [2], arch="i686", emulator="/usr/bin/qemu-system-x86_64"),
    "more words": replace(domain_of(2, 1, [1]), cpu_options=("pmu=off", "kvm-pv-eoi=off", "hv-vendor-id=KVM Hv")),
}


@pytest.mark.parametrize("on", substrates(("q35",)))
@pytest.mark.parametrize("case", UNLIKE)
async def test_a_qemu_starts_with_words_that_differ_from_libvirts(on: Substrate, case: str) -> None:
    domain = UNLIKE[case]
    built = arguments(domain)
    async with started(on, built, *built.argv) as vm:
        assert_is(vm.layout, domain)
