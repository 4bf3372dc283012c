"""The CPU model of a running VM is in its document, and that its features are unknown is said wherever it is read."""

from dataclasses import replace

import pytest

from qmpvcpu.domainxml import CpuModel, domain_from, omissions, parse, read_identity, render, update
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.errors import DomainRuleError
from qmpvcpu.launch import arguments
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vm import VmInfo
from tests.domainxml.documents import document
from tests.domainxml.examples import PSERIES, Q35, captured_layouts, layout_of

S390X = replace(Q35, arch="s390x", machine="s390-ccw-virtio-7.2")
LOONGARCH = replace(Q35, arch="loongarch64", machine="virt")
# QEMU's type of CPU; how libvirt says it; what a new QEMU is given.
MODELS = {
    "EPYC-x86_64-cpu": (Q35, CpuModel("custom", "EPYC"), "EPYC"),
    "EPYC-v4-x86_64-cpu": (Q35, CpuModel("custom", "EPYC-v4"), "EPYC-v4"),
    "Icelake-Server-noTSX-x86_64-cpu": (Q35, CpuModel("custom", "Icelake-Server-noTSX"), "Icelake-Server-noTSX"),
    "qemu64-x86_64-cpu": (Q35, CpuModel("custom", "qemu64"), "qemu64"),
    "486-x86_64-cpu": (Q35, CpuModel("custom", "486"), "486"),
    "host-x86_64-cpu": (
        replace(Q35, accelerator="kvm"),
        CpuModel("host-passthrough", migratable="on"),
        "host,migratable=on",
    ),
    "max-x86_64-cpu": (Q35, CpuModel("maximum"), "max"),
    "qemu32-i386-cpu": (replace(Q35, arch="i386"), CpuModel("custom", "qemu32"), "qemu32"),
    "power9_v2.0-spapr-cpu-core": (PSERIES, CpuModel("custom", "power9_v2.0"), "power9_v2.0"),
    "host-spapr-cpu-core": (
        replace(PSERIES, accelerator="kvm"),
        CpuModel("host-passthrough", migratable="on"),
        "host",
    ),
    "qemu-s390x-cpu": (S390X, CpuModel("custom", "qemu"), "qemu"),
    "z14.2-base-s390x-cpu": (S390X, CpuModel("custom", "z14.2-base"), "z14.2-base"),
    "la464-loongarch-cpu": (LOONGARCH, CpuModel("custom", "la464"), "la464"),
}
CAPTURED = dict(captured_layouts())


def of_type(cpu_type: str, vm: VmInfo = Q35, slots: int = 4) -> Layout:
    layout = layout_of(slots, [0, 2], boot=1, vm=vm)
    return replace(layout, slots=tuple(replace(slot, type=cpu_type) for slot in layout.slots))


@pytest.mark.parametrize("cpu_type", MODELS)
def test_the_model_of_the_slots_type_is_written_and_gives_the_same_model_back(cpu_type: str) -> None:
    vm, model, cpu = MODELS[cpu_type]
    layout = of_type(cpu_type, vm)
    written = parse(render(layout))
    assert written.cpu == model == domain_from(layout).cpu
    assert written.untold == ("cpu-features",) == domain_from(layout).untold
    built = arguments(written)
    assert built.cpu == cpu
    assert built.cpu.partition(",")[0] == arguments(layout).cpu
    (sentence,) = [each for each in built.unknown if "features" in each]
    assert "give -cpu as it was" in sentence
    (left_out,) = [each for each in omissions(layout) if "features" in each]
    assert layout.slots[0].model
    assert f"the model {layout.slots[0].model}: " in left_out


@pytest.mark.parametrize("case", CAPTURED)
def test_every_recorded_qemu_says_its_model_or_that_it_is_not_known(case: str) -> None:
    layout = CAPTURED[case]
    written = parse(render(layout))
    assert written.cpu == domain_from(layout).cpu
    assert written.untold == domain_from(layout).untold
    assert (written.cpu is None) == (written.untold == ("cpu-model",)) == (layout.slots[0].type == "")
    assert any("CPU" in each for each in omissions(layout))
    assert any("QEMU did not report" in each for each in arguments(written).unknown)


def test_a_machine_that_does_not_tell_its_model_says_that() -> None:
    layout = of_type("", replace(Q35, can_plug=False))
    document = render(layout)
    assert b"<cpu" not in document
    assert parse(document).untold == ("cpu-model",)
    assert any("its CPU model" in each for each in omissions(layout))
    assert any("its CPU model" in each for each in arguments(parse(document)).unknown)


def test_the_callers_cpu_is_all_that_was_not_known() -> None:
    assert arguments(parse(render(of_type("EPYC-x86_64-cpu"))), cpu="EPYC,x2apic=on").unknown == ()


@pytest.mark.parametrize(
    ("before", "after", "untold"),
    [
        (b"</model>", b"</model><feature policy='require' name='x2apic'/>", ()),
        (b">EPYC<", b">EPYC-Milan<", ()),
        (b"mode='custom' match='exact' check='none'", b"", ("cpu-features",)),
        (b' model="EPYC"', b"", ()),
        (b"fallback='forbid'", b"fallback='allow'", ("cpu-features",)),
    ],
)
def test_somebody_who_edits_the_model_knows_better(before: bytes, after: bytes, untold: tuple[str, ...]) -> None:
    document = render(of_type("EPYC-x86_64-cpu"))
    assert before in document
    assert parse(document.replace(before, after, 1)).untold == untold


def test_a_model_that_somebody_else_has_named_is_never_written_over() -> None:
    document = render(of_type("EPYC-x86_64-cpu"))
    assert read_identity(document).foreign == ()
    assert read_identity(document.replace(b">EPYC<", b">EPYC-Milan<")).foreign == ("cpu model",)
    assert read_identity(document.replace(b"mode='custom'", b"mode='host-model'")).foreign == ("cpu model",)


def test_a_change_of_the_document_keeps_its_model_and_what_is_not_known_of_it() -> None:
    document = render(of_type("EPYC-x86_64-cpu"))
    domain = parse(document)
    more = replace(domain, vcpus=(*domain.vcpus[:3], replace(domain.vcpus[3], enabled=True, order=3)))
    again = parse(update(document, more))
    assert (again.cpu, again.untold) == (domain.cpu, domain.untold)
    assert 3 in again.enabled


MILAN = "  <cpu><model>EPYC-Milan</model></cpu>"


@pytest.mark.parametrize(
    ("cpu", "cpu_type", "differs"),
    [
        (MILAN, "EPYC-Milan-x86_64-cpu", False),
        (MILAN, "EPYC-Milan-v2-x86_64-cpu", False),
        (MILAN, "EPYC-x86_64-cpu", True),
        (MILAN.replace("Milan", "Milan-v1"), "EPYC-Milan-v2-x86_64-cpu", True),
        (MILAN.replace("Milan", "Milan-v1"), "EPYC-Milan-x86_64-cpu", False),
        ("", "qemu64-x86_64-cpu", False),
        ("", "EPYC-x86_64-cpu", True),
        ("  <cpu mode='host-passthrough'/>", "host-x86_64-cpu", False),
        ("  <cpu mode='host-passthrough'/>", "max-x86_64-cpu", True),
        ("  <cpu mode='maximum'/>", "max-x86_64-cpu", False),
        ("  <cpu mode='host-model'/>", "EPYC-x86_64-cpu", False),
        (MILAN, "", False),
    ],
)
def test_a_documents_own_model_stays_and_one_that_is_not_what_runs_is_named(
    cpu: str,
    cpu_type: str,
    differs: bool,
) -> None:
    own = document("  <vcpu current='2'>4</vcpu>", *filter(None, [cpu]))
    layout = of_type(cpu_type)
    after = render(layout, base=own)
    assert parse(after).cpu == parse(own).cpu
    told = [each for each in omissions(layout, base=own) if "a VM that is started from it has another CPU" in each]
    assert len(told) == differs


def test_a_power_revision_is_the_model_that_libvirt_names() -> None:
    own = document("  <vcpu current='2'>4</vcpu>", "  <cpu><model>POWER9</model></cpu>")
    assert not any("another CPU" in each for each in omissions(of_type("power9_v2.2-spapr-cpu-core"), base=own))
    assert any("another CPU" in each for each in omissions(of_type("power10_v2.0-spapr-cpu-core"), base=own))


def wide(maximum: int = 300, machine: str = "pc-q35-10.0") -> Layout:
    return of_type("EPYC-x86_64-cpu", replace(Q35, machine=machine), maximum)


@pytest.mark.parametrize("machine", ["pc-q35-10.0", "q35", "microvm"])
def test_more_than_255_vcpus_of_a_running_vm_are_read_back_and_what_libvirt_wants_is_told(machine: str) -> None:
    layout = wide(288, machine)
    written = parse(render(layout))
    assert written == domain_from(layout)
    assert written.untold == ("cpu-features", "iommu") == domain_from(layout).untold
    built = arguments(written)
    assert built.smp.startswith("1,maxcpus=288,")
    assert any("IOMMU, which libvirt requires with eim='on'" in each for each in built.unknown)
    assert any("IOMMU" in each for each in arguments(written, cpu="EPYC").unknown)
    assert any("<iommu>" in each for each in omissions(layout))
    assert parse(render(wide(255))).untold == ("cpu-features",)


def test_an_iommu_that_somebody_adds_is_what_libvirt_wants() -> None:
    iommu = b"  <devices><iommu model='intel'><driver intremap='on' eim='on'/></iommu></devices>\n</domain>"
    assert parse(render(wide()).replace(b"</domain>", iommu)).untold == ("cpu-features",)


def test_anybody_elses_document_of_so_many_is_held_to_libvirts_rule() -> None:
    without = render(wide()).replace(b"urn:qmpvcpu:cpu:1", b"urn:somebody:1")
    with pytest.raises(DomainRuleError) as caught:
        parse(without)
    assert caught.value.rule is DomainRule.EIM_MISSING
