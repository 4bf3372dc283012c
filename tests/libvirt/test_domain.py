"""libvirt's own QEMU driver, asked: what it takes, what it makes of it, and what it starts from it."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qmpvcpu import qapi
from qmpvcpu.domainxml import Instance, Metadata, parse, read_identity, render
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.transition import Action, Intent, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from qmpvcpu.qapi import build_slots, creation_order
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from tests.domainxml.examples import (
    Q35,
    captured_layouts,
    layout_of,
)
from tests.libvirt.daemon import Libvirt
from tests.substrates import qemus

pytestmark = pytest.mark.libvirt

QEMUS = qemus()
NEWEST = max(QEMUS, key=lambda version: tuple(map(int, version.split("."))))
EIGHT = replace(Q35, topology=Topology(8, sockets=2, cores=2, threads=2))
STATES = {
    "all plugged": layout_of(8, range(8), boot=8, vm=EIGHT),
    "a hole": layout_of(8, [0, 2], boot=1, vm=EIGHT),
    "plugged backwards": layout_of(8, [0, 7, 6, 5, 4, 3, 2, 1], boot=1, vm=EIGHT),
    "half of the cores": layout_of(8, [0, 1, 2, 5, 3], boot=3, vm=EIGHT),
    "a boot CPU left": layout_of(8, [0, 2, 3], boot=3, vm=EIGHT),
    "all boot CPUs but 0 left": layout_of(8, [0], boot=1, vm=EIGHT),
    "a boot CPU left and came back": layout_of(8, [0, 2, 3, 1], boot=3, vm=EIGHT),
    "the last boot CPU left and came back": layout_of(8, [0, 1, 2, 3], boot=3, vm=EIGHT),
    "foreign device ids": layout_of(8, [0, 1, 4, 2, 7], boot=2, vm=EIGHT, foreign=[2, 7]),
    "boot CPUs in another order": layout_of(8, [0, 1, 4, 5, 2, 3], boot=6, vm=EIGHT),
    "pending": replace(layout_of(8, [0, 3, 6], boot=1, vm=EIGHT), pending_slots=frozenset({3, 6})),
    "no topology": layout_of(6, [0, 3], boot=1),
}
INTENT = Intent(
    VcpuMap([0, 3, 6]),
    VcpuMap([0, 1, 3]),
    (
        Step(Action.PLUG, VcpuMap([1])),
        Step(Action.KEEP, VcpuMap([3]), "/machine/peripheral/vcpu3"),
        Step(Action.UNPLUG, VcpuMap([6]), "/machine/unattached/device[6]", joins=True),
    ),
    OnFailure.REVERT,
    timeout=12.5,
)


def machine_of(layout: Layout, version: str) -> Layout:
    """Put a layout on the machine type of a QEMU that is here."""
    machine = re.sub(r"\d+\.\d+$", version, layout.vm.machine)
    return replace(layout, vm=replace(layout.vm, machine=machine))


def excerpt(xml: bytes, *tags: str) -> list[str]:
    """Return the text of elements, as it stands there."""
    found = []
    for tag in tags:
        found += re.findall(rf"<{tag}\b[^>]*/>|<{tag}\b.*?</{tag}>", xml.decode(), re.DOTALL)
    return found


def captured_on_x86() -> Iterator[tuple[str, Layout, str]]:
    for name, layout in captured_layouts():
        if layout.vm.arch == "x86_64":
            version = ".".join(map(str, layout.vm.qemu_version[:2]))
            known = version if version in QEMUS else NEWEST
            yield name, machine_of(layout, known), known


CAPTURED = {name: (layout, version) for name, layout, version in captured_on_x86()}


def assert_libvirt_keeps(libvirt: Libvirt, xml: bytes) -> None:
    printed = libvirt.inactive(libvirt.define(xml))
    ours = ["name", "metadata", "memory", "currentMemory", "vcpu", "vcpus", "topology", "emulator", "acpi"]
    if b"<cpu " in xml:  # where we know of no model, libvirt puts in its own
        ours.append("cpu")
    assert parse(printed).untold == parse(xml).untold
    assert excerpt(printed, *ours) == excerpt(xml, *ours)


@pytest.mark.parametrize("state", STATES)
def test_libvirt_defines_every_state_and_prints_it_as_we_do(libvirt: Libvirt, state: str) -> None:
    layout = machine_of(STATES[state], NEWEST)
    metadata = Metadata(
        generation=3, instance=Instance(17, 42), intent=INTENT, desired=VcpuMap([0, 1, 3])
    ).with_layout(layout)
    assert_libvirt_keeps(libvirt, render(layout, emulator=str(QEMUS[NEWEST]), metadata=metadata))


@pytest.mark.parametrize("case", CAPTURED)
def test_libvirt_defines_every_recorded_x86_machine_and_prints_it_as_we_do(libvirt: Libvirt, case: str) -> None:
    layout, version = CAPTURED[case]
    assert_libvirt_keeps(
        libvirt, render(layout, emulator=str(QEMUS[version]), metadata=Metadata().with_layout(layout))
    )


def of_type(layout: Layout, cpu_type: str) -> Layout:
    return replace(layout, slots=tuple(replace(slot, type=cpu_type) for slot in layout.slots))


@pytest.mark.parametrize(
    "model", ["EPYC", "EPYC-v4", "Icelake-Server-noTSX", "486", "SierraForest-v2", "host", "max"]
)
@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_libvirt_defines_every_cpu_model_and_prints_it_as_we_do(
    libvirt: Libvirt, model: str, accelerator: str
) -> None:
    layout = of_type(machine_of(STATES["a hole"], NEWEST), f"{model}-x86_64-cpu")
    layout = replace(layout, vm=replace(layout.vm, accelerator=accelerator))
    xml = render(layout, emulator=str(QEMUS[NEWEST]), metadata=Metadata().with_layout(layout))
    assert_libvirt_keeps(libvirt, xml)


@pytest.mark.parametrize("version", QEMUS)
@pytest.mark.parametrize("model", ["EPYC", "max"])
def test_a_vm_that_libvirt_starts_from_it_has_the_same_cpu_model(libvirt: Libvirt, version: str, model: str) -> None:
    layout = of_type(machine_of(STATES["a hole"], version), f"{model}-x86_64-cpu")
    name = libvirt.define(render(layout, emulator=str(QEMUS[version])))
    libvirt.virsh("start", name, "--paused")
    command = json.dumps({"execute": "query-hotpluggable-cpus"})
    slots = json.loads(libvirt.virsh("qemu-monitor-command", name, command))["return"]
    assert {slot["type"] for slot in slots} == {f"{model}-x86_64-cpu"}


@pytest.mark.parametrize("name", ["vm & <co>", "\u00fcml\u00e4ut \U0001f600", "a'b\"c", " edged ", "-x", "a;b$c"])
def test_libvirt_keeps_an_odd_name(libvirt: Libvirt, name: str) -> None:
    layout = machine_of(STATES["a hole"], NEWEST)
    xml = render(replace(layout, vm=replace(layout.vm, name=name)), emulator=str(QEMUS[NEWEST]))
    libvirt.define(xml)
    assert libvirt.virsh("list", "--all", "--name").strip("\n") == name


async def test_libvirt_defines_the_record_file_and_gives_back_what_makes_it_ours(
    libvirt: Libvirt, tmp_path: Path
) -> None:
    layout = machine_of(STATES["pending"], NEWEST)
    record = await Record.open(tmp_path / "vm.xml", Claim("vm"), emulator=str(QEMUS[NEWEST]))
    await record.write(layout, intent=INTENT, desired=INTENT.target)
    await record.close()
    libvirt.virsh("define", "--validate", record.path)
    found = read_identity(libvirt.inactive("vm"))
    assert found.uuid == record.uuid
    assert found.metadata is not None
    assert found.metadata.pending == VcpuMap([3, 6])
    assert found.metadata.intent == INTENT
    assert found.metadata.desired == INTENT.target
    assert "on_poweroff" in found.foreign


@pytest.mark.parametrize("version", QEMUS)
@pytest.mark.parametrize(
    "state", ["a hole", "plugged backwards", "a boot CPU left and came back", "boot CPUs in another order"]
)
def test_a_vm_that_libvirt_starts_from_it_has_the_same_vcpus_in_the_same_order(
    libvirt: Libvirt, version: str, state: str
) -> None:
    layout = machine_of(STATES[state], version)
    xml = render(layout, emulator=str(QEMUS[version]))
    name = libvirt.define(xml)
    libvirt.virsh("start", name, "--paused")
    assert excerpt(libvirt.virsh("dumpxml", name).encode(), "vcpu", "vcpus") == excerpt(xml, "vcpu", "vcpus")

    def ask(command: str) -> object:
        return json.loads(libvirt.virsh("qemu-monitor-command", name, json.dumps({"execute": command})))["return"]

    threads = qapi.parse_cpus_fast(ask("query-cpus-fast"))
    slots = build_slots(qapi.parse_hotpluggable_cpus(ask("query-hotpluggable-cpus")), threads)
    rebuilt = replace(layout, slots=slots, creation=creation_order(slots, threads), pending_slots=frozenset())
    assert rebuilt.enabled == layout.enabled
    assert rebuilt.creation == layout.creation
    assert render(rebuilt, emulator=str(QEMUS[version])) == xml
