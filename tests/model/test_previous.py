"""What an earlier QEMU had: its vCPUs in their order, and whether they are there again."""

from dataclasses import replace

from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from tests.domainxml.examples import layout_of

LAYOUT = layout_of(4, [0, 2], boot=1)


def test_it_has_what_a_layout_has_in_its_order() -> None:
    layout = layout_of(8, [0, 5, 3, 2], boot=1)
    previous = PreviousVcpus.of(layout)
    assert (previous.max, previous.started_with, previous.order) == (8, VcpuMap([0]), layout.order)
    assert previous.enabled == layout.enabled
    assert previous.topology == layout.vm.topology
    assert previous.is_there(layout)


def test_it_is_there_only_with_the_same_vcpus_in_the_same_order() -> None:
    previous = PreviousVcpus.of(LAYOUT)
    assert not previous.is_there(layout_of(4, [0], boot=1))
    assert not previous.is_there(layout_of(4, [0, 3], boot=1))
    assert not replace(previous, order=(0, 2, 3)).is_there(layout_of(4, [0, 3, 2], boot=1))
    assert replace(previous, topology=Topology(4, cores=4)).is_there(LAYOUT)  # which QEMU checks, not this


def test_vcpu_0_comes_first_whatever_order_qemu_tells() -> None:
    odd = replace(LAYOUT, creation=(2, 0))
    previous = PreviousVcpus.of(odd)
    assert (previous.started_with, previous.order) == (VcpuMap([0]), (0, 2))
    assert previous.is_there(odd)
    assert previous.enabled == VcpuMap([0, 2])
