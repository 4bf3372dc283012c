"""What a VM is next started with, by its document."""

import pytest

from qmpvcpu.domainxml import Metadata, domain_of, parse, render, start_of
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.launch import arguments
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from tests.domainxml.examples import layout_of

LAYOUT = layout_of(8, [0], boot=1)
HAD = PreviousVcpus(8, VcpuMap([0]), (0, 5, 3, 2), Topology(8, sockets=1, dies=1, cores=4, threads=2))


def record(previous: PreviousVcpus | None = None, next_boot: VcpuMap | None = None) -> bytes:
    return render(LAYOUT, metadata=Metadata(previous=previous, next_boot=next_boot).with_layout(LAYOUT))


def test_of_a_document_it_is_what_the_document_says() -> None:
    domain = parse(render(LAYOUT))
    assert start_of(domain) == domain
    assert start_of(parse(record())) == domain


def test_of_a_record_it_is_what_an_earlier_qemu_had_as_long_as_that_is_kept() -> None:
    domain = parse(record(HAD))
    assert domain.enabled == {0}
    start = start_of(domain)
    assert (start.started_with, start.order, start.topology) == (VcpuMap([0]), (5, 3, 2), HAD.topology)
    assert start_of(start) == start
    built = arguments(domain)
    assert built.smp == "1,maxcpus=8,sockets=1,dies=1,cores=4,threads=2"
    assert [device["id"] for device in built.device_add] == ["vcpu5", "vcpu3", "vcpu2"]


def test_a_next_boot_that_was_asked_for_comes_first_and_what_stays_keeps_its_place() -> None:
    assert start_of(parse(record(HAD, VcpuMap.parse("0,2,5-6")))).order == (5, 2, 6)
    assert start_of(parse(record(None, VcpuMap.parse("0-2")))).enabled == VcpuMap.parse("0-2")


def test_a_next_boot_that_no_such_vm_can_have_is_refused() -> None:
    with pytest.raises(DomainXmlError, match=r"impossible next boot"):
        start_of(parse(record(HAD, VcpuMap([0, 9]))))


def test_the_live_state_in_a_records_place_is_what_it_says() -> None:
    domain = domain_of(layout_of(8, [0, 7], boot=1), parse(record(HAD, VcpuMap.parse("0-3"))))
    assert start_of(domain).enabled == VcpuMap([0, 7])
