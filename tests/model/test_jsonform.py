"""Layouts and verdicts as JSON: nothing is lost on the way there and back, and nothing bad is let in."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.model.jsonform import layout_as_json, layout_from_json
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.ost import OstAnswer
from qmpvcpu.model.verdictjson import verdict_beside, verdict_from_json
from qmpvcpu.model.verdicts import Pending, Refused, Unknown, Verdict, as_json
from qmpvcpu.model.vm import Topology, VmInfo
from tests.captures import all_captures
from tests.model.values import layouts, verdicts

CORE = "power10_v2.0-spapr-cpu-core"


def there_and_back(layout: Layout) -> Layout:
    return layout_from_json(json.loads(json.dumps(layout_as_json(layout))))


@given(layouts())
def test_any_layout_comes_back_as_it_was(layout: Layout) -> None:
    assert there_and_back(layout) == layout


def test_every_recorded_qemu_comes_back_as_it_was() -> None:
    for capture in all_captures():
        for layout in capture.layouts():
            assert there_and_back(layout) == layout, capture.name


@given(verdicts)
def test_any_verdict_comes_back_as_it_was(verdict: Verdict) -> None:
    assert verdict_from_json(json.loads(json.dumps(as_json(verdict)))) == verdict


@given(verdicts)
def test_a_verdict_comes_back_from_beside_keys_of_the_same_name(verdict: Verdict) -> None:
    shown = verdict_beside(verdict, {"ids": "5", "seconds": 1.0, "why": "w", "reason": "r", "more": None})
    assert (shown["ids"], shown["seconds"], shown["why"]) == ("5", 1.0, "w")
    assert verdict_from_json(json.loads(json.dumps(shown))) == verdict


def test_what_is_the_same_beside_a_verdict_is_written_once() -> None:
    assert verdict_beside(Unknown(VcpuMap([5]), "gone"), {"ids": "5", "why": "gone"}) == {
        "verdict": "UNKNOWN",
        "ids": "5",
        "why": "gone",
    }
    assert verdict_beside(None, {"ids": "5"}) == {"verdict": None, "ids": "5"}


def whole() -> dict[str, Any]:
    """Two cores of two threads, the second free, as a JSON object."""
    vm = VmInfo("vm", "ppc64", "pseries", "tcg", (10, 0, 2), topology=Topology(max_cpus=4, cores=2, threads=2))
    props = CpuProps({"core-id": 0, "node-id": 0})
    slots = (Slot(0, 2, CORE, props, 0, "/c0", (7, None), OstAnswer(1, 0)), Slot(2, 2, CORE, props, 2))
    layout = Layout(vm=vm, slots=slots, creation=(0,), pending_slots=frozenset({0}), generation=3)
    document: dict[str, Any] = json.loads(json.dumps(layout_as_json(layout)))
    return document


def put(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("vm"), "'vm' is missing"),
        (put("vm", value=[]), "'vm': [] is not a JSON object"),
        (drop("vm", "qemu"), "'vm': 'qemu' is missing"),
        (put("vm", "qemu", value="10.0"), "'vm': 'qemu': \"10.0\" is not a version such as 10.0.2"),
        (put("vm", "qemu", value="10.0.x"), "'vm': 'qemu': \"10.0.x\" is not a version"),
        (put("vm", "qemu", value="10.0." + "9" * 5000), "is not a version"),
        (put("vm", "qemu", value="10.0.²"), "is not a version"),
        (put("vm", "name", value=3), "'vm': 'name': 3 is not text"),
        (put("vm", "name", value=["x"] * 10_000), "... (50000 characters) is not text"),
        (put("vm", "can_plug", value="false"), "'vm': 'can_plug': \"false\" is not true or false"),
        (put("vm", "memory_kib", value=1.5), "'vm': 'memory_kib': 1.5 is not a whole number from 0 on"),
        (put("vm", "memory_kib", value=True), "'vm': 'memory_kib': true is not a whole number"),
        (put("vm", "x2apic", value=0), "'vm': 'x2apic': 0 is not true or false"),
        (put("vm", "topology", "cores", value="2"), "'vm': 'topology': 'cores': \"2\" is not a whole number"),
        (drop("vm", "topology", "dies"), "'vm': 'topology': 'dies' is missing"),
        (put("generation", value=-1), "'generation': -1 is not a whole number from 0 on"),
        (put("pending", value="0-"), "'pending': \"0-\" is not a set of vCPU ids"),
        (put("pending", value="0"), "'pending': \"0\" is not 0-1, which its vCPUs make"),
        (put("pending", value="0-2"), "'pending': \"0-2\" is not 0-1"),
        (put("enabled", value="0-3"), "'enabled': \"0-3\" is not 0-1, which its vCPUs make"),
        (put("enabled", value=7), "'enabled': 7 is not text"),
        (put("max", value=5), "'max': 5 is not 4, which its vCPUs make"),
        (put("vcpus", value={}), "'vcpus': {} is not a list"),
        (put("vcpus", 1, value="vcpu1"), "'vcpus': [1]: \"vcpu1\" is not a JSON object"),
        (drop("vcpus", 1, "slot"), "'vcpus': [1]: 'slot' is missing"),
        (put("vcpus", 1, "id", value=2), "'vcpus': [1]: 'id': vCPU 2 stands in the place of vCPU 1"),
        (
            put("vcpus", 1, "id", value=16384),
            "'vcpus': [1]: 'id': 16384 is not a set of vCPU ids: a vCPU id is 0 to 16383",
        ),
        (put("vcpus", 0, "slot", value=1), "'vcpus': [1]: 'slot': vCPUs 0 and 1 make no slot 0"),
        (put("vcpus", value=[whole()["vcpus"][0] | {"slot": 1}]), "'vcpus': [0]: 'slot': vCPU 0 is the first"),
        (put("vcpus", 3, "slot", value=0), "'vcpus': [3]: 'slot': vCPUs 2 and 3 make no slot 0"),
        (put("vcpus", 1, "qom_path", value="/c1"), "'vcpus': [1]: 'slot': vCPUs 0 and 1 make no slot 0"),
        (put("vcpus", 1, "qom_path", value=None), "'vcpus': [1]: 'order': vCPU 1 has one, and no 'qom_path'"),
        (put("vcpus", 0, "props", value=None), "'vcpus': [0]: 'props': null is not a JSON object"),
        (put("vcpus", 0, "props", "core-id", value=[1]), "'props': 'core-id': [1] is not a whole number from 0 on"),
        (put("vcpus", 0, "props", "core-id", value="0,x=y"), "'props': 'core-id': \"0,x=y\" is not a whole number"),
        (put("vcpus", 0, "props", "core-id", value=2**31), "'props': 'core-id': 2147483648 is not a whole number"),
        (put("vcpus", 0, "props", "id", value=1), "'props': \"id\" does not name the place of a CPU"),
        (
            put("vcpus", 0, "props", "driver", value="vfio-pci"),
            "'props': \"driver\" does not name the place",
        ),
        (
            put("vcpus", 0, "type", value="vfio-pci,host=1"),
            "'type': \"vfio-pci,host=1\" is not a CPU's type",
        ),
        (put("vcpus", 0, "type", value=""), "'vcpus': [1]: 'slot': vCPUs 0 and 1 make no slot 0"),
        (put("vcpus", 0, "qom_path", value="/c0,x=y z"), "'vcpus': [0]: 'qom_path': \"/c0,x=y z\" is not a QOM path"),
        (
            put("vcpus", 0, "qom_path", value="/machine/peripheral/7/a"),
            "'qom_path': \"/machine/peripheral/7/a\" is not a QOM path",
        ),
        (put("vm", "machine", value="q35,firmware=x"), "'vm': 'machine': \"q35,firmware=x\" is not a name of QEMU's"),
        (put("vm", "arch", value="x86 64"), "'vm': 'arch': \"x86 64\" is not a name of QEMU's"),
        (put("vm", "accelerator", value=""), "'vm': 'accelerator': \"\" is not a name of QEMU's"),
        (put("vm", "uuid", value="../../x"), "'vm': 'uuid': \"../../x\" is not a uuid"),
        (
            put("vm", "topology", "cores", value=0),
            "'topology': 'cores': 0 is not a whole number from 1 to 16384",
        ),
        (put("vcpus", 0, "host_tid", value="7"), "'vcpus': [0]: 'host_tid': \"7\" is not a whole number"),
        (put("vcpus", 0, "answer", value=[1]), "'answer': [1] is not a source and a status"),
        (put("vcpus", 0, "answer", value=[1, "0"]), "'answer': [1]: \"0\" is not a whole number"),
    ],
)
def test_a_bad_layout_is_refused_by_the_name_of_its_key(change: Callable[[dict[str, Any]], None], says: str) -> None:
    document = whole()
    layout_from_json(document)
    change(document)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        layout_from_json(document)
    assert len(str(caught.value)) < 300


def test_only_a_machine_that_cannot_plug_has_slots_without_a_type() -> None:
    document = whole()
    for vcpu in document["vcpus"]:
        vcpu["type"] = ""
    with pytest.raises(ValueError, match=r"'vcpus': \[0\]: 'type': a machine that takes CPUs names the type of each"):
        layout_from_json(document)
    document["vm"]["can_plug"] = False
    assert {slot.type for slot in layout_from_json(document).slots} == {""}


def test_a_creation_order_that_does_not_count_is_refused() -> None:
    document = whole()
    for vcpu in document["vcpus"][:2]:
        vcpu["order"] = 2
    with pytest.raises(ValueError, match="'order' does not go from 1 to 1"):
        layout_from_json(document)


def test_keys_of_a_later_version_are_no_matter() -> None:
    document = whole()
    before = layout_from_json(document)
    document["vcpus"][0]["pinned"] = "0-3"
    assert layout_from_json({**document, "schema": "qmpvcpu/1", "fleet": None}) == before


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("verdict", "LOST", "'verdict': \"LOST\" is not one of PLUGGED, UNPLUGGED, REFUSED, PENDING, REJECTED"),
        ("verdict", 1, "'verdict': 1 is not one of"),
        ("verdict", "DENIED", "'reason': \"busy\" is not one of UNKNOWN_VCPU"),
        ("ids", "3-1", "'ids': \"3-1\" is not a set of vCPU ids"),
        ("code", "130", "'code': \"130\" is not a whole number"),
        ("reason", None, "'reason': null is not text"),
        ("seconds", "1", "'seconds': \"1\" is not a number"),
        ("seconds", float("nan"), "'seconds': NaN is not a number"),
        ("seconds", True, "'seconds': true is not a number"),
        pytest.param("seconds", 10**400, "'seconds': 1000", id="more than a float holds"),
    ],
)
def test_a_bad_verdict_is_refused_by_the_name_of_its_key(key: str, value: object, says: str) -> None:
    shown = as_json(Refused(VcpuMap([6]), 0x82, "busy", 0.5))
    with pytest.raises(ValueError, match=re.escape(says)):
        verdict_from_json(shown | {key: value})


def test_a_verdict_lacks_nothing() -> None:
    shown = as_json(Pending(VcpuMap([6]), acknowledged=True))
    for key in shown:
        with pytest.raises(ValueError, match=f"'{key}' is missing"):
            verdict_from_json({name: value for name, value in shown.items() if name != key})
