"""The live state, written into the document that the VM has already."""

from dataclasses import replace

import pytest

from qmpvcpu.domainxml import domain_of, omissions, parse, render
from qmpvcpu.errors import DomainXmlError
from tests.domainxml.documents import SAMPLES, VCPU, document, started_from
from tests.domainxml.examples import layout_of

UUID = "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a"


def test_the_document_of_another_vm_is_refused() -> None:
    layout = layout_of(4, [0, 1], boot=2)
    named = replace(layout, vm=replace(layout.vm, uuid=UUID))
    own, others = (document(f"  <uuid>{uuid}</uuid>", VCPU) for uuid in (UUID, UUID.replace("6f", "7f")))
    assert render(named, base=own) == own
    assert render(layout, base=others) == others  # QEMU has no uuid: nothing to compare
    assert render(named, base=document(VCPU)) == document(VCPU)
    with pytest.raises(DomainXmlError, match=f"uuid 7f.*, not {UUID}"):
        render(named, base=others)


def test_a_document_with_another_maximum_is_refused() -> None:
    with pytest.raises(DomainXmlError, match="a maximum of 4 vCPUs, and QEMU has 6"):
        render(layout_of(6, [0], boot=1), base=document(VCPU))


def test_a_layout_without_vcpu_0_is_refused_with_a_document_too() -> None:
    with pytest.raises(DomainXmlError, match="vCPU 0"):
        render(layout_of(4, [1], boot=1), base=document(VCPU))


def test_a_state_from_a_layout_keeps_all_else_that_the_document_says() -> None:
    base = parse(SAMPLES["cputune-everything"])
    domain = domain_of(layout_of(6, [0, 1, 5], boot=2, vm=started_from(base).vm), base)
    assert domain.enabled == {0, 1, 5}
    assert replace(domain, vcpus=base.vcpus) == base


def test_what_a_document_says_is_not_left_out() -> None:
    wide = layout_of(288, [0], boot=1)
    assert len(omissions(wide)) == 3
    assert [each for each in omissions(wide, base=SAMPLES["more-than-255-vcpus"]) if "iommu" in each] == []
    numa = started_from(parse(SAMPLES["numa-distances"]))
    assert not any("<numa>" in each for each in omissions(numa, base=SAMPLES["numa-distances"]))
