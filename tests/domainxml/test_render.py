"""What is rendered is what libvirt would print: valid by its schema, right by its rules, and rebuilds the same VM."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from qmpvcpu.domainxml import Instance, Metadata, omissions, read_identity, render, validate
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from tests.domainxml.examples import (
    GOLDEN,
    PSERIES,
    Q35,
    captured_layouts,
    layout_of,
    started_by_libvirt,
    vcpu_rows,
)

CAPTURED = dict(captured_layouts())
# libvirt 9's schema has no such architecture; the rest of the document is held to it all the same.
TOO_NEW = {"loongarch64": "ppc64"}
BOOT_CPU_LEFT = layout_of(8, [0, 2, 3, 5], boot=3)
GOLDENS = {
    "q35-boot-cpu-left": replace(
        BOOT_CPU_LEFT,
        vm=replace(
            Q35, uuid="6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a", topology=Topology(8, sockets=2, cores=2, threads=2)
        ),
    ),
    "q35-replugged-and-foreign": layout_of(6, [0, 1, 3, 4, 2], boot=2, foreign=[4]),
    "pseries-whole-cores": CAPTURED["10.0.2-pseries-threads4-1"],
    "s390x": CAPTURED["10.0.2-s390-ccw-virtio-1"],
    "pc": CAPTURED["7.2.22-pc-sct-2x2x1-1"],
    "aarch64-without-hotplug": CAPTURED["10.0.2-virt-aarch64-clusters-0"],
}


@pytest.fixture(scope="session")
def schema() -> etree.RelaxNG:
    """libvirt's own schema, wherever libvirt's own tool looks for it."""
    script = Path(subprocess.check_output(["sh", "-c", "command -v virt-xml-validate"], text=True).strip())
    folder = re.search(r'SCHEMA="(.+)/\$', script.read_text())
    assert folder, "virt-xml-validate does not say where its schemas are"
    return etree.RelaxNG(etree.parse(f"{folder[1]}/domain.rng"))


def group_of(layout: Layout) -> int:
    return layout.slots[0].count


@pytest.mark.parametrize("case", CAPTURED)
def test_every_recorded_qemu_renders_to_what_libvirts_schema_and_rules_allow(
    case: str, schema: etree.RelaxNG
) -> None:
    layout = CAPTURED[case]
    document = render(layout, emulator="/usr/bin/qemu", metadata=Metadata().with_layout(layout))
    assert validate(document) == ()
    assert started_by_libvirt(document, group=group_of(layout)) == list(layout.creation)
    known = TOO_NEW.get(layout.vm.arch, layout.vm.arch)
    tree = etree.fromstring(document.replace(layout.vm.arch.encode(), known.encode()))
    assert schema.validate(tree), schema.error_log


@pytest.mark.parametrize("case", GOLDENS)
def test_the_document_is_byte_for_byte_the_reviewed_one(case: str) -> None:
    layout = GOLDENS[case]
    metadata = Metadata(generation=7, instance=Instance(4711, 123456)).with_layout(layout)
    path = GOLDEN / f"{case}.xml"
    assert render(layout, metadata=metadata).decode() == path.read_text()


@pytest.mark.parametrize("case", GOLDENS)
def test_libvirts_own_validator_takes_the_reviewed_document(case: str) -> None:
    result = subprocess.run(
        ["virt-xml-validate", GOLDEN / f"{case}.xml", "domain"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that plugs and unplugs can lead to, boot CPUs and foreign ids included."""
    slots = draw(st.integers(1, 10))
    count = draw(st.sampled_from([1, 1, 1, 2, 4]))
    others = draw(st.lists(st.integers(1, max(1, slots - 1)), unique=True, max_size=slots - 1))
    boot = draw(st.integers(1, len(others) + 1))
    if draw(st.booleans()):
        others[: boot - 1] = sorted(others[: boot - 1])
    foreign = draw(st.lists(st.integers(1, slots), max_size=3))
    # Slots of several vCPUs are cores of pseries: libvirt is told by its topology, and we by that alone.
    cores = replace(PSERIES, topology=Topology(slots * count, cores=slots, threads=count))
    vm = Q35 if count == 1 else cores
    layout = layout_of(slots, [0, *others], boot=boot, count=count, foreign=foreign, vm=vm)
    pending = draw(st.sets(st.sampled_from([0, *others]))) - {0}
    return replace(layout, pending_slots=frozenset(number * count for number in pending))


@given(layouts())
def test_whatever_was_plugged_and_unplugged_libvirt_has_no_complaint_and_starts_the_same_vm(layout: Layout) -> None:
    document = render(layout)
    group = group_of(layout)
    assert validate(document) == ()
    assert started_by_libvirt(document, group=group) == list(layout.creation)
    enabled = {int(row[0]) for row in vcpu_rows(document) if row[1] == "yes"}
    assert enabled == set(layout.enabled)


@given(layouts())
def test_orders_are_dense_in_creation_order_and_absent_where_no_cpu_is(layout: Layout) -> None:
    rows = vcpu_rows(render(layout))[:: group_of(layout)]
    orders = {int(row[0]): int(row[3]) for row in rows if row[3]}
    assert sorted(orders, key=lambda each: orders[each]) == list(layout.creation)
    assert sorted(orders.values()) == list(range(1, len(orders) + 1))
    assert all(not row[3] for row in rows if row[1] == "no")


@given(layouts())
def test_what_libvirt_has_no_place_for_comes_back_from_the_metadata(layout: Layout) -> None:
    metadata = Metadata(generation=3, instance=Instance(17)).with_layout(layout)
    found = read_identity(render(layout, metadata=metadata))
    assert found.metadata == metadata
    assert found.metadata.pending == layout.pending
    assert found.foreign == ()


@given(st.text(min_size=1))
def test_a_name_is_written_faithfully_or_refused(name: str) -> None:
    layout = replace(layout_of(1, [0], boot=1), vm=replace(Q35, name=name))
    try:
        document = render(layout)
    except DomainXmlError:
        assert not name.strip() or re.search("[/\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]", name)
    else:
        assert read_identity(document).name == name


def test_a_replugged_cpu_of_the_boot_prefix_is_plugged_again_and_all_after_it_too() -> None:
    # 0 to 3 booted, 1 left and came back as vcpu1: a VM started with 0 to 3 would have created it second.
    layout = layout_of(4, [0, 2, 3, 1], boot=3)
    assert vcpu_rows(render(layout)) == [
        ("0", "yes", "no", "1"),
        ("1", "yes", "yes", "4"),
        ("2", "yes", "yes", "2"),
        ("3", "yes", "yes", "3"),
    ]


def test_boot_cpus_that_qemu_made_in_another_order_than_their_ids_are_plugged_in_that_order() -> None:
    # An s390x with two sockets to a book: libvirt refuses boot CPUs whose order descends.
    layout = layout_of(6, [0, 1, 4, 5, 2, 3], boot=6)
    assert [row[2] for row in vcpu_rows(render(layout))] == ["no", "no", "yes", "yes", "yes", "yes"]


def test_a_pending_removal_is_enabled_in_the_vcpus_and_named_in_the_metadata() -> None:
    layout = replace(layout_of(4, [0, 2], boot=1), pending_slots=frozenset({2}))
    document = render(layout, metadata=Metadata().with_layout(layout))
    assert vcpu_rows(document)[2] == ("2", "yes", "yes", "2")
    assert b'<qmpvcpu:pending vcpus="2"/>' in document


@pytest.mark.parametrize(("plugged", "attribute"), [([0, 1], None), ([0], "1")])
def test_current_is_written_only_where_a_vcpu_is_missing(plugged: list[int], attribute: str | None) -> None:
    vcpu = etree.fromstring(render(layout_of(2, plugged, boot=1))).find("vcpu")
    assert vcpu is not None
    assert (vcpu.get("current"), vcpu.text) == (attribute, "2")


def test_the_uuid_is_qemus_else_the_one_made_up_for_it() -> None:
    layout = layout_of(1, [0], boot=1)
    made_up = Metadata(uuid="00000000-0000-4000-8000-000000000001")
    assert read_identity(render(layout)).uuid is None
    assert read_identity(render(layout, metadata=made_up)).uuid == made_up.uuid
    own = replace(layout, vm=replace(Q35, uuid="00000000-0000-4000-8000-000000000002"))
    assert read_identity(render(own, metadata=Metadata())).uuid == own.vm.uuid


@pytest.mark.parametrize(("accelerator", "kind"), [("kvm", "kvm"), ("tcg", "qemu")])
def test_the_accelerator_decides_the_domains_type(accelerator: str, kind: str) -> None:
    layout = replace(layout_of(1, [0], boot=1), vm=replace(Q35, accelerator=accelerator))
    assert etree.fromstring(render(layout)).get("type") == kind
    assert not any("accelerator" in each for each in omissions(layout))


@pytest.mark.parametrize("accelerator", ["mshv", "hvf", "unknown"])
def test_an_accelerator_that_the_document_cannot_name_is_told_of_and_never_becomes_tcg(accelerator: str) -> None:
    layout = replace(layout_of(1, [0], boot=1), vm=replace(Q35, accelerator=accelerator))
    assert etree.fromstring(render(layout)).get("type") == "kvm"
    assert [each for each in omissions(layout) if repr(accelerator) in each]
    assert not any("accelerator" in each for each in omissions(layout, base=render(layout)))


@pytest.mark.parametrize("arch", ["ppc64", "s390x", "aarch64"])
def test_acpi_is_left_out_where_libvirt_has_no_use_for_it(arch: str) -> None:
    layout = replace(layout_of(1, [0], boot=1), vm=replace(Q35, arch=arch))
    assert b"<acpi/>" not in render(layout)


@pytest.mark.parametrize(
    ("change", "emulator", "told"),
    [
        ({"memory_kib": None}, None, "memory size"),
        ({"name": "a/b"}, None, "a/b"),
        ({"name": " "}, None, "does not accept the domain name"),
        ({"name": "a\nb"}, None, "cannot"),
        ({}, "qemu", "not an absolute path"),
        ({}, "/bin/\x00", "cannot"),
    ],
)
def test_what_libvirt_cannot_hold_is_an_error_that_names_it(
    change: dict[str, Any], emulator: str | None, told: str
) -> None:
    layout = replace(layout_of(1, [0], boot=1), vm=replace(Q35, **change))
    with pytest.raises(DomainXmlError, match=told):
        render(layout, emulator=emulator)


def test_a_layout_without_vcpu_0_is_refused() -> None:
    with pytest.raises(DomainXmlError, match="vCPU 0"):
        render(layout_of(2, [1], boot=1))


@pytest.mark.parametrize(
    "topology", [Topology(8, sockets=2, cores=2, threads=2), Topology(8, sockets=2, dies=2, cores=2)], ids=str
)
def test_a_topology_is_written_where_libvirt_can_say_it(topology: Topology) -> None:
    layout = replace(layout_of(8, [0], boot=1), vm=replace(Q35, topology=topology))
    written = etree.fromstring(render(layout)).find("cpu/topology")
    assert written is not None
    assert {level: int(number) for level, number in written.items()} == {
        level: getattr(topology, level) for level in ("sockets", "dies", "cores", "threads")
    }
    assert not any("topology" in each for each in omissions(layout))


@pytest.mark.parametrize(
    "topology",
    [Topology(8, sockets=2, modules=2, cores=2), Topology(8, clusters=2, cores=4), Topology(16, cores=16), None],
    ids=str,
)
def test_a_topology_that_libvirt_cannot_say_is_left_out_and_told_of(topology: Topology | None) -> None:
    layout = replace(layout_of(8, [0], boot=1), vm=replace(Q35, topology=topology))
    assert b"topology" not in render(layout)
    assert sum("<topology>" in each for each in omissions(layout)) == 1


def test_numa_nodes_and_more_vcpus_than_libvirt_starts_without_an_iommu_are_omissions() -> None:
    assert any("2 NUMA nodes" in each for each in omissions(CAPTURED["10.0.2-q35-numa2-cpu-by-socket-0"]))
    assert not any("NUMA" in each for each in omissions(CAPTURED["10.0.2-pseries-threads4-0"]))
    topology = Topology(256, sockets=256)
    wide = replace(layout_of(256, [0], boot=1), vm=replace(Q35, topology=topology))
    assert sum("<iommu>" in each for each in omissions(wide)) == 1


def test_a_rendered_map_of_pendings_survives_its_shortest_form() -> None:
    metadata = Metadata(pending=VcpuMap([1, 2, 3, 9]))
    found = read_identity(render(layout_of(10, [0], boot=1), metadata=metadata)).metadata
    assert found is not None
    assert found.pending == metadata.pending
