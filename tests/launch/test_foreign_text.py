"""Text that others wrote (a peer, an export, a document) never begins an option of QEMU's, nor another argument."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.domainxml import CpuModel, parse
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.launch import arguments
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.model.layout import CpuProps, Layout
from tests.domainxml.examples import layout_of
from tests.launch.domains import domain_of

LAYOUT = layout_of(4, [0, 3, 1], boot=1)
# What is inside of nothing else: an option ends with a comma, and a value begins with an equals sign.
HOSTILE = [
    "vfio-pci,host=0000:01:00.0",
    "virtio-9p-pci,fsdev=root",
    "virtio-9p-pci",
    "host,+vmx,hv-passthrough=on-x86_64-cpu",
    "host,,vmx-x86_64-cpu",
    "max x-x86_64-cpu",
    "max\n-x86_64-cpu",
    "max-x86_64-cpu\n",
    "-x86_64-cpu",
    "--help-x86_64-cpu",
    "ma\u0445-x86_64-cpu",
    "",
]


def with_type(layout: Layout, cpu_type: str, *firsts: int) -> Layout:
    slots = (replace(slot, type=cpu_type) if slot.first in firsts else slot for slot in layout.slots)
    return replace(layout, slots=tuple(slots))


@pytest.mark.parametrize("cpu_type", HOSTILE)
def test_a_layout_whose_slot_is_of_no_cpus_type_has_no_arguments(cpu_type: str) -> None:
    with pytest.raises(DomainXmlError, match="cannot be the type of a QEMU CPU"):
        arguments(with_type(LAYOUT, cpu_type, 3))


@pytest.mark.parametrize("cpu_type", HOSTILE[:-1])
def test_a_layout_whose_model_is_none_has_no_arguments(cpu_type: str) -> None:
    with pytest.raises(DomainXmlError, match="cannot be the type of a QEMU CPU"):
        arguments(with_type(LAYOUT, cpu_type, 0))


@pytest.mark.parametrize("cpu", ["-x", "EPYC x", "EPYC=1", ""])
def test_a_cpu_that_the_caller_gives_begins_with_a_model(cpu: str) -> None:
    with pytest.raises(DomainXmlError, match="cannot be the type of a QEMU CPU"):
        arguments(domain_of(4, 1, [3]), cpu=cpu)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("type", each) for each in HOSTILE),
        ("props", {"core-id": "0,x=y"}),
        ("props", {"core-id": 0, "driver": "virtio-9p-pci,fsdev=root"}),
        ("props", {"core-id": 0, "id": "evil"}),
        ("props", {"core-id": 0, "id": 7}),
        ("props", {"core-id=0,fsdev": 1}),
        ("qom_path", "/machine/peripheral/a,b=c"),
    ],
)
def test_an_export_that_would_begin_an_option_is_not_read(key: str, value: Any) -> None:
    exported = json.loads(json.dumps(ExportedState(LAYOUT).to_json()))
    assert ExportedState.from_json(exported).layout == LAYOUT
    exported["layout"]["slots"][3][key] = value
    with pytest.raises(ValueError, match=rf"'layout': 'slots': (\[3\]: '{key}'|\[3\]: 'type': a machine)"):
        ExportedState.from_json(json.dumps(exported))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("machine", "q35,firmware=/etc/shadow"),
        ("machine", "q35 -drive x"),
        ("arch", "x86_64,a=b"),
        ("machine", "-q35"),
    ],
)
def test_a_document_of_a_machine_that_is_none_is_not_read(attribute: str, value: str) -> None:
    said = {"arch": "x86_64", "machine": "q35"} | {attribute: value}
    words = "".join(f" {name}='{each}'" for name, each in said.items())
    document = f"<domain type='kvm'><name>a</name>\n<os><type{words}>hvm</type></os></domain>"
    with pytest.raises(DomainXmlError, match=rf"line 2: <type {attribute}=...>: .* is not a name that QEMU uses"):
        parse(document.encode())


DOMAIN_PLACE = ["socket-id", "core-id", "thread-id"]
names = st.text(st.sampled_from("aZ09._+-,= \n\"'\\;$`\u0445"), max_size=6)


@given(names, names, names)
def test_no_name_adds_an_option_to_the_command_line(model: str, feature: str, cpu_type: str) -> None:
    domain = domain_of(4, 1, [3], cpu=CpuModel("custom", f"m{model}", {f"f{feature}": "require"}))
    typed = with_type(LAYOUT, f"t{cpu_type}-x86_64-cpu", 0, 1, 2, 3)
    for source, options, place in ((domain, 2, DOMAIN_PLACE), (typed, 1, list(LAYOUT[0].props))):
        try:
            built = arguments(source)
        except DomainXmlError:
            continue
        assert built.cpu is not None
        assert len(built.cpu.split(",")) == options
        for device in built.device_argv[1::2]:
            driver, *rest = device.split(",")
            assert driver.endswith("-x86_64-cpu")
            assert [each.partition("=")[0] for each in rest] == ["id", *place]
        assert not set(" \n\"'\\;$`\u0445") & set("".join(built.argv))


def test_props_cannot_be_made_that_would_overrule_what_is_plugged() -> None:
    for name in ("driver", "id", "bus", "fsdev"):
        with pytest.raises(ValueError, match="does not name the place of a CPU"):
            CpuProps({"core-id": 0, name: 1})
