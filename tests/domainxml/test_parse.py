"""The vCPU side of a document reads as libvirt reads it, its defaults filled in; anything else is refused."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.domainxml import CpuModel, DomainVcpu, NumaCell, ThreadSched, parse, read_identity, update, validate
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from tests.domainxml.broken import BROKEN, document, rows
from tests.domainxml.examples import GOLDEN

FULL = b"""<?xml version="1.0"?>
<!-- kept by hand -->
<domain type="kvm" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <name>db &amp; web</name>
  <uuid>
    6F9E0A3E-6A2E-4A8D-9A38-0F6F4F8F4B8A
  </uuid>
  <metadata><x:vcpu xmlns:x="urn:x">99</x:vcpu></metadata>
  <memory unit="GiB">2</memory>
  <vcpu placement="static" cpuset="0-7,^3" current="3">8</vcpu>
  <vcpus>
    <vcpu id="5" enabled="yes" hotpluggable="yes" order="3"/>
    <vcpu id="0" enabled="yes" hotpluggable="no" order="1"/>
    <!-- came back -->
    <vcpu id="2" enabled="yes" hotpluggable="yes" order="2"/>
  </vcpus>
  <cputune>
    <vcpupin vcpu="5" cpuset="1"/>
    <vcpupin vcpu="0" cpuset="4-7"/>
    <vcpupin vcpu="8" cpuset="2"/>
    <emulatorpin cpuset="0,"/>
    <vcpusched vcpus="2" scheduler="batch"/>
    <vcpusched vcpus="0" scheduler="fifo" priority="1"/>
    <vcpusched vcpus="5" scheduler="batch" priority="9"/>
  </cputune>
  <os><type arch="x86_64" machine="pc-q35-10.0">hvm</type></os>
  <cpu mode="custom" match="exact">
    <model fallback="allow">Haswell</model>
    <feature policy="disable" name="vmx"/>
    <feature name="pcid"/>
    <topology sockets="2" cores="4" threads="1"/>
    <numa>
      <cell id="1" cpus="4-7" memory="1" unit="GiB"/>
      <cell id="0" cpus="0-2" memory="1048576"/>
    </numa>
  </cpu>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices>
  <qemu:commandline><qemu:arg value="-no-hpet"/></qemu:commandline>
</domain>
"""


def test_everything_that_is_said_of_vcpus_is_read() -> None:
    domain = parse(FULL)
    assert (domain.name, domain.uuid) == ("db & web", "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a")
    assert (domain.type, domain.arch, domain.machine) == ("kvm", "x86_64", "pc-q35-10.0")
    assert domain.emulator == "/usr/bin/qemu-system-x86_64"
    assert domain.memory_kib == 2 * 1024 * 1024
    assert (domain.max, domain.current, domain.individual) == (8, 3, True)
    assert domain.enabled == {0, 2, 5}
    assert domain.started_with == {0}
    assert domain.order == (2, 5)
    assert domain.vcpus[5] == DomainVcpu(5, enabled=True, hotpluggable=True, order=3)
    assert domain.vcpus[7] == DomainVcpu(7, enabled=False, hotpluggable=True)
    assert domain.placement == "static"
    assert domain.cpuset == {0, 1, 2, 4, 5, 6, 7}
    assert domain.pins == {0: {4, 5, 6, 7}, 5: {1}}
    assert list(domain.pins) == [0, 5]
    assert domain.emulator_pin == {0}
    assert domain.scheds == {0: ThreadSched("fifo", 1), 2: ThreadSched("batch"), 5: ThreadSched("batch")}
    assert domain.topology == Topology(8, sockets=2, cores=4)
    assert domain.numa == (NumaCell(0, VcpuMap([0, 1, 2, 3]), 1048576), NumaCell(1, VcpuMap([4, 5, 6, 7]), 1048576))
    assert domain.cpu == CpuModel("custom", "Haswell", {"vmx": "disable", "pcid": "require"})


def test_the_least_document_reads_as_libvirt_takes_it() -> None:
    domain = parse(b"<domain type='qemu'><name>a</name></domain>")
    assert domain.vcpus == (DomainVcpu(0, enabled=True, hotpluggable=False),)
    assert (domain.uuid, domain.arch, domain.machine, domain.emulator, domain.memory_kib) == (None,) * 5
    assert (domain.cpuset, domain.emulator_pin, domain.topology, domain.cpu) == (None,) * 4
    assert domain.placement == "static"
    assert (domain.individual, dict(domain.pins), domain.scheds, domain.numa) == (False, {}, {}, ())


@pytest.mark.parametrize(
    ("vcpu", "vcpus", "enabled", "hotpluggable"),
    [
        ("<vcpu>4</vcpu>", "", {0, 1, 2, 3}, set()),
        ("<vcpu current='2'>4</vcpu>", "", {0, 1}, {2, 3}),
        ("<vcpu current='2'>4</vcpu>", "<vcpus/>", {0, 1}, {2, 3}),
        ("<vcpu current='4'>4</vcpu>", rows("enabled='yes'"), {0}, {1, 2, 3}),
        ("<vcpu current='9'>4</vcpu>", rows("enabled='yes'"), {0}, {1, 2, 3}),
        ("<vcpu>2</vcpu>", rows("enabled='no'", "enabled='yes'") + rows("enabled='yes'"), {0, 1}, set()),
        ("<vcpu>2</vcpu>", rows("enabled='yes'", "enabled='no' order='7'"), {0}, {1}),
        (
            "<vcpu> 4</vcpu>".replace(" ", ""),
            rows("enabled='yes'", "enabled='yes' hotpluggable='yes'"),
            {0, 1},
            {1, 2, 3},
        ),
    ],
)
def test_which_vcpus_are_on_and_hotpluggable(
    vcpu: str, vcpus: str, enabled: set[int], hotpluggable: set[int]
) -> None:
    domain = parse(document(vcpu=vcpu, vcpus=vcpus))
    assert domain.enabled == enabled
    assert domain.hotpluggable == hotpluggable


@pytest.mark.parametrize("text", ["4", "+4", "04", "<!-- four -->4", "<b>4</b>", "<![CDATA[4]]>", "&#x34;"])
def test_a_number_is_read_as_libvirt_reads_it(text: str) -> None:
    assert parse(document(vcpu=f"<vcpu>{text}</vcpu>")).max == 4


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3,^1", {0, 2, 3}),
        (" 1 , 2 ", {1, 2}),
        ("1 - 3 ", {1, 2, 3}),
        ("0,", {0}),
        ("1, ", {1}),
        ("^0,1", {1}),
        ("1,^1,2", {2}),
        ("007", {7}),
        ("16383", {16383}),
        ("&#10;1", {1}),
    ],
)
def test_a_cpuset_is_read_as_libvirt_reads_it(text: str, cpus: set[int]) -> None:
    assert parse(document(vcpu=f"<vcpu cpuset='{text}'>4</vcpu>")).cpuset == cpus


@pytest.mark.parametrize("text", ["1\u00a0", "\u0661", ",1", "1,,", "1, ,", "0-2,^1-2", "1 2", "^", "1_0"])
def test_what_python_would_take_for_a_cpuset_and_libvirt_does_not_is_refused(text: str) -> None:
    with pytest.raises(DomainXmlError, match="a cpuset is ids and ranges"):
        parse(document(vcpu=f"<vcpu cpuset='{text}'>4</vcpu>"))


@pytest.mark.parametrize(
    ("unit", "number", "kib"),
    [
        ("", 4096, 4096),
        ("KiB", 4096, 4096),
        ("k", 4096, 4096),
        ("kb", 1000, 977),
        ("b", 1025, 2),
        ("bytes", 1024, 1),
        ("BYTE", 1, 1),
        ("M", 4, 4096),
        ("MB", 1, 977),
        ("GiB", 1, 2**20),
        ("GB", 1, 976563),
        ("t", 1, 2**30),
        ("PiB", 1, 2**40),
        ("E", 7, 7 * 2**50),
    ],
)
def test_memory_is_told_in_kib_whatever_its_unit(unit: str, number: int, kib: int) -> None:
    assert parse(document(memory=f"<memory unit='{unit}'>{number}</memory>")).memory_kib == kib
    cell = f"<cpu><numa><cell memory='{number}' unit='{unit}'/></numa></cpu>"
    assert parse(document(cpu=cell)).numa[0].memory_kib == kib


def test_the_memory_of_the_cells_is_that_of_the_domain() -> None:
    cells = "<cpu><numa><cell memory='1000'/><cell memory='24'/></numa></cpu>"
    assert parse(document(cpu=cells)).memory_kib == 1024
    assert parse(document(cpu=cells.replace("1000", "0").replace("24", "0"))).memory_kib == 65536


def test_vcpus_of_no_cell_are_in_the_first() -> None:
    cells = "<cpu><numa><cell id='1' cpus='1' memory='1'/><cell id='0' memory='1'/></numa></cpu>"
    assert [cell.cpus for cell in parse(document(cpu=cells)).numa] == [{0, 2, 3}, {1}]


def test_under_automatic_placement_a_cpuset_is_not_even_looked_at() -> None:
    domain = parse(document(vcpu="<vcpu placement='auto' cpuset='x'>4</vcpu>"))
    assert (domain.placement, domain.cpuset) == ("auto", None)


AUTO = "<numatune><memory placement='auto'/></numatune>"
NOTHING_PINNED = "<cputune><vcpupin vcpu='9' cpuset='0'/><vcpusched vcpus='0' scheduler='batch'/></cputune>"


@pytest.mark.parametrize(
    ("vcpu", "tune", "placement"),
    [
        ("<vcpu>4</vcpu>", AUTO, "auto"),
        ("<vcpu placement='static'>4</vcpu>", AUTO, "auto"),
        ("<vcpu>4</vcpu>", NOTHING_PINNED + AUTO, "auto"),
        ("<vcpu cpuset='0'>4</vcpu>", AUTO, "static"),
        ("<vcpu>4</vcpu>", f"<cputune><vcpupin vcpu='0' cpuset='0'/></cputune>{AUTO}", "static"),
        ("<vcpu>4</vcpu>", f"<cputune><emulatorpin cpuset='0'/></cputune>{AUTO}", "static"),
        ("<vcpu>4</vcpu>", f"<cputune><iothreadpin iothread='1' cpuset='0'/></cputune>{AUTO}", "static"),
        ("<vcpu placement='auto'>4</vcpu>", "<cputune><emulatorpin cpuset='0'/></cputune>", "auto"),
        ("<vcpu>4</vcpu>", "<numatune><memory nodeset='0'/></numatune>", "static"),
        ("<vcpu placement='auto'>4</vcpu>", "<numatune><memory nodeset='0'/></numatune>", "auto"),
        ("<vcpu placement='auto'>4</vcpu>", "<numatune><memory mode='strict'/></numatune>", "auto"),
        ("<vcpu>4</vcpu>", "<numatune/>", "static"),
    ],
)
def test_the_placement_of_the_memory_decides_unless_something_is_pinned(vcpu: str, tune: str, placement: str) -> None:
    assert parse(document(vcpu=vcpu, cputune=tune)).placement == placement


@pytest.mark.parametrize("read", [parse, validate, read_identity, lambda given: update(given, parse(document()))])
def test_what_is_not_bytes_is_refused_with_what_to_do(read: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"given as bytes, not str: text.encode\(\)"):
        read(document().decode())
    with pytest.raises(TypeError, match=r"read_bytes\(\)"):
        read(Path("vm.xml"))


def test_a_pin_of_a_vcpu_that_cannot_be_is_dropped_unread() -> None:
    pins = "<cputune><vcpupin vcpu='4' cpuset='x'/><vcpupin vcpu='3' cpuset='1'/><vcpupin vcpu='9'/></cputune>"
    assert parse(document(cputune=pins)).pins == {3: {1}}


@pytest.mark.parametrize(
    ("cpu", "model"),
    [
        ("<cpu/>", None),
        ("<cpu mode='custom' match='exact'><model/></cpu>", None),
        ("<cpu><topology sockets='4' cores='1' threads='1'/></cpu>", None),
        ("<cpu><model>Haswell</model></cpu>", CpuModel("custom", "Haswell")),
        ("<cpu mode='host-passthrough'/>", CpuModel("host-passthrough", migratable="on")),
        ("<cpu mode='host-passthrough' migratable='off'/>", CpuModel("host-passthrough", migratable="off")),
        ("<cpu mode='maximum'><model>Haswell</model></cpu>", CpuModel("maximum")),
        ("<cpu mode='host-model'><feature name='vmx'/></cpu>", CpuModel("host-model", features={"vmx": "require"})),
    ],
)
def test_the_cpu_model_is_the_one_that_is_named(cpu: str, model: CpuModel | None) -> None:
    assert parse(document(cpu=cpu)).cpu == model


def test_text_is_all_that_stands_in_an_element() -> None:
    domain = parse(
        b"<domain type='kvm'><name>a<!-- -->b<i>c</i></name><uuid/><devices><emulator/></devices></domain>"
    )
    assert (domain.name, domain.uuid, domain.emulator) == ("abc", None, None)


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.xml")), ids=lambda path: path.stem)
def test_the_samples_break_no_rule(path: Path) -> None:
    xml = path.read_bytes()
    assert validate(xml) == ()
    assert parse(xml).max >= 1


def test_what_was_read_can_be_copied_and_compared() -> None:
    domain = parse(FULL)
    assert copy.deepcopy(domain) == domain == parse(FULL)


SEEDS = [FULL, *(case.xml for case in BROKEN.values())]
PIECES = [b"<", b">", b"'", b"/", b"0", b"-1", b"9999999999", b"yes", b"no", b"<vcpu>", b"</vcpu>", b"vcpus", b"\xff"]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A document of which some pieces are cut out, doubled or replaced."""
    xml = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(xml)))
        end = min(len(xml), start + draw(st.integers(0, 12)))
        xml = xml[:start] + draw(st.sampled_from([*PIECES, b"", xml[start:end] * 2])) + xml[end:]
    return xml


def read(xml: bytes) -> None:
    """Read it or refuse it, both alike."""
    try:
        errors = validate(xml)
    except DomainXmlError:
        with pytest.raises(DomainXmlError):
            parse(xml)
        return
    if any(error.stage.value == "define" for error in errors):
        with pytest.raises(DomainXmlError):
            parse(xml)
    else:
        assert parse(xml).max >= 1


@given(mutated())
def test_a_damaged_document_is_read_or_refused_and_nothing_else(xml: bytes) -> None:
    read(xml)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_and_nothing_else(data: bytes) -> None:
    read(data)


MEGABYTE = 1 << 20
DIGITS = "9" * MEGABYTE
ZEROS = "0" * MEGABYTE + "4"
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a number of a megabyte": lambda: document(vcpu=f"<vcpu>{DIGITS}</vcpu>"),
    "a number behind a megabyte of zeros": lambda: document(vcpu=f"<vcpu current='{ZEROS}'>{ZEROS}</vcpu>"),
    "a negative number of a megabyte": lambda: document(vcpu=f"<vcpu>-{DIGITS}</vcpu>"),
    "memory of a megabyte of digits": lambda: document(memory=f"<memory>{DIGITS}</memory>"),
    "a quota of a megabyte of digits": lambda: document(cputune=f"<cputune><quota>{DIGITS}</quota></cputune>"),
    "a UUID of a megabyte of dashes": lambda: document(uuid=f"<uuid>{'-' * MEGABYTE}</uuid>"),
    "a cpuset of a megabyte": lambda: document(vcpu=f"<vcpu cpuset='{'0-16383,' * (MEGABYTE // 8)}'>4</vcpu>"),
    "as long a cpuset as is read": lambda: document(vcpu=f"<vcpu cpuset='{'0-16383,' * 24_000}'>4</vcpu>"),
    "all CPUs for each of many vCPUs": lambda: document(
        vcpu="<vcpu>16384</vcpu>",
        os="",
        cputune="<cputune>"
        + "".join(f"<vcpupin vcpu='{each}' cpuset='{each}-16383'/>" for each in range(16000))
        + "</cputune>",
    ),
    "a scheduler for all vCPUs again and again": lambda: document(
        vcpu="<vcpu>16384</vcpu>",
        os="",
        cputune="<cputune>" + "<vcpusched vcpus='0-16383' scheduler='idle'/>" * 2000 + "</cputune>",
    ),
    "all vCPUs in each of many cells": lambda: document(
        vcpu="<vcpu>16384</vcpu>",
        os="",
        cpu="<cpu><numa>" + "<cell cpus='0-16383' memory='1'/>" * 2000 + "</numa></cpu>",
    ),
    "rows without end": lambda: document(vcpus="<vcpus>" + "<vcpu/>" * 20_000 + "</vcpus>"),
    "as many vCPUs as can be": lambda: document(
        vcpu="<vcpu>16384</vcpu>", os="", vcpus=rows(*["enabled='yes'"] * 16384)
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_document_costs_no_more_than_an_honest_one_of_its_size(case: str) -> None:
    xml = HOSTILE[case]()
    begun = time.process_time()
    read(xml)
    # A second at most where nothing else runs and nothing is measured; what is not linear takes minutes.
    assert time.process_time() - begun < 20
