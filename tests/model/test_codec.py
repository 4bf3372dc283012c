"""Values as JSON: nothing is lost on the way there and back, and nothing bad is let in."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from qmpvcpu import Layout, VcpuMap
from qmpvcpu.model.codec import from_json, to_bytes, to_json
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.transition import Action, StepReport
from qmpvcpu.model.verdicts import OstAnswer, Pending, Refused, Verdict
from qmpvcpu.model.vm import Topology, VmInfo
from tests.captures import all_captures
from tests.model.values import layouts, verdicts

CORE = "power10_v2.0-spapr-cpu-core"


def there_and_back(layout: Layout) -> Layout:
    return from_json(Layout, json.loads(json.dumps(to_json(layout))))


@given(layouts())
def test_any_layout_comes_back_as_it_was(layout: Layout) -> None:
    assert there_and_back(layout) == layout


@given(layouts())
def test_any_layout_comes_back_from_its_utf_8(layout: Layout) -> None:
    assert from_json(Layout, to_bytes(layout)) == layout


@pytest.mark.parametrize("content", [b"\xff", b"{", "{}".encode("utf-16"), b"[" * 100_000])
def test_bytes_that_are_no_json_in_utf_8_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- each decoder has words of its own
        from_json(dict, content)


def test_every_recorded_qemu_comes_back_as_it_was() -> None:
    for capture in all_captures():
        for layout in capture.layouts():
            assert there_and_back(layout) == layout, capture.name


@given(verdicts)
def test_any_verdict_comes_back_as_it_was(verdict: Verdict) -> None:
    step = StepReport(Action.UNPLUG, verdict.ids, verdict)
    assert from_json(StepReport, json.loads(json.dumps(to_json(step)))) == step


def whole() -> dict[str, Any]:
    """Two cores of two threads, the second free, as a JSON object."""
    vm = VmInfo("vm", "ppc64", "pseries", "tcg", (10, 0, 2), topology=Topology(max_cpus=4, cores=2, threads=2))
    props = CpuProps({"core-id": 0, "node-id": 0})
    slots = (Slot(0, 2, CORE, props, 0, "/c0", (7, None), OstAnswer(1, 0)), Slot(2, 2, CORE, props, 2))
    layout = Layout(vm=vm, slots=slots, creation=(0,), pending_slots=frozenset({0}), generation=3)
    document: dict[str, Any] = json.loads(json.dumps(to_json(layout)))
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
        (drop("vm", "qemu_version"), "'vm': 'qemu_version' is missing"),
        (put("vm", "qemu_version", value="10.0.2"), "'vm': 'qemu_version': \"10.0.2\" is not a list"),
        (put("vm", "qemu_version", value=[10, 0]), "'vm': 'qemu_version': [10, 0] is not a list of 3"),
        (put("vm", "qemu_version", value=[10, 0, "x"]), "'vm': 'qemu_version': [2]: \"x\" is not a whole number"),
        (put("vm", "qemu_version", value=[10, 0, -1]), "'vm': 'qemu_version': [2]: -1 is not a whole number"),
        (put("vm", "name", value=3), "'vm': 'name': 3 is not text"),
        (put("vm", "name", value=["x"] * 10_000), "... (50000 characters) is not text"),
        (put("vm", "can_plug", value="false"), "'vm': 'can_plug': \"false\" is not true or false"),
        (put("vm", "memory_kib", value=1.5), "'vm': 'memory_kib': 1.5 is not a whole number from 0 on"),
        (put("vm", "memory_kib", value=True), "'vm': 'memory_kib': true is not a whole number"),
        (put("vm", "x2apic", value=0), "'vm': 'x2apic': 0 is not true or false"),
        (put("vm", "topology", "cores", value="2"), "'vm': 'topology': 'cores': \"2\" is not a whole number"),
        (drop("vm", "topology", "dies"), "'vm': 'topology': 'dies' is missing"),
        (put("vm", "other_paths", value=["../x"]), "'vm': 'other_paths': [0]: \"../x\" is not a QOM path"),
        (put("generation", value=-1), "'generation': -1 is not a whole number from 0 on"),
        (put("pending_slots", value="0"), "'pending_slots': \"0\" is not a list"),
        (
            put("pending_slots", value=[1]),
            "'pending_slots': [1] are not the first vCPUs of slots with",
        ),
        (put("pending_slots", value=[2]), "'pending_slots': [2] are not the first vCPUs of slots with a CPU"),
        (put("pending_slots", value=[16384]), "'pending_slots': [16384] are not the first vCPUs of slots"),
        (put("creation", value=[0, 2]), "'creation': [0, 2] are not the first vCPUs of slots with a CPU, each once"),
        (put("creation", value=[0, 0]), "'creation': [0, 0] are not the first vCPUs of slots with a CPU, each once"),
        (put("creation", value=[True]), "'creation': [0]: true is not a whole number"),
        (put("slots", value={}), "'slots': {} is not a list"),
        (put("slots", 1, value="vcpu1"), "'slots': [1]: \"vcpu1\" is not a JSON object"),
        (drop("slots", 1, "first"), "'slots': [1]: 'first' is missing"),
        (put("slots", 1, "first", value=3), "'slots': [1]: 'first': 3 is not 2, the next vCPU id"),
        (put("slots", 0, "first", value=1), "'slots': [0]: 'first': 1 is not 0, the next vCPU id"),
        (put("slots", 1, "count", value=0), "'slots': [1]: 'count': 0 is not 1 to 16382"),
        (put("slots", 1, "count", value=16383), "'slots': [1]: 'count': 16383 is not 1 to 16382"),
        (put("slots", 1, "count", value=10**400), "'slots': [1]: 'count': 1000"),
        (put("slots", 0, "host_tids", value=[7]), "'slots': [0]: 'host_tids': 1 thread for 2 vCPUs"),
        (put("slots", 1, "host_tids", value=[7, 8]), "'slots': [1]: 'host_tids': 2 threads for 0 vCPUs"),
        (put("slots", 0, "qom_path", value=None), "'slots': [0]: 'host_tids': 2 threads for 0 vCPUs"),
        (put("slots", 0, "props", value=None), "'slots': [0]: 'props': null is not a JSON object"),
        (put("slots", 0, "props", "core-id", value=[1]), "'props': 'core-id': [1] is not a whole number from 0 on"),
        (put("slots", 0, "props", "core-id", value="0,x=y"), "'props': 'core-id': \"0,x=y\" is not a whole number"),
        (put("slots", 0, "props", "core-id", value=2**31), "'props': 'core-id': 2147483648 is not a whole number"),
        (put("slots", 0, "props", "id", value=1), "'props': \"id\" does not name the place of a CPU"),
        (
            put("slots", 0, "props", "driver", value="vfio-pci"),
            "'props': \"driver\" does not name the place",
        ),
        (
            put("slots", 0, "type", value="vfio-pci,host=1"),
            "'type': \"vfio-pci,host=1\" is not a CPU's type",
        ),
        (put("slots", 0, "qom_path", value="/c0,x=y z"), "'slots': [0]: 'qom_path': \"/c0,x=y z\" is not a QOM path"),
        (
            put("slots", 0, "qom_path", value="/machine/peripheral/7/a"),
            "'qom_path': \"/machine/peripheral/7/a\" is not a QOM path",
        ),
        (
            put("vm", "machine", value="q35,firmware=x"),
            "'vm': 'machine': \"q35,firmware=x\" is not a name of",
        ),
        (put("vm", "arch", value="x86 64"), "'vm': 'arch': \"x86 64\" is not a name of letters, digits"),
        (put("vm", "accelerator", value=""), "'vm': 'accelerator': \"\" is not a name of letters, digits"),
        (put("vm", "uuid", value="../../x"), "'vm': 'uuid': \"../../x\" is not a uuid"),
        (
            put("vm", "topology", "cores", value=0),
            "'topology': 'cores': 0 is not a whole number from 1 to 16384",
        ),
        (put("slots", 0, "host_tids", 0, value="7"), "'slots': [0]: 'host_tids': [0]: \"7\" is not a whole number"),
        (put("slots", 0, "answer", value=[1, 0]), "'answer': [1, 0] is not a JSON object"),
        (put("slots", 0, "answer", "code", value="0"), "'answer': 'code': \"0\" is not a whole number"),
    ],
)
def test_a_bad_layout_is_refused_by_the_name_of_its_key(change: Callable[[dict[str, Any]], None], says: str) -> None:
    document = whole()
    from_json(Layout, document)
    change(document)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        from_json(Layout, document)
    assert len(str(caught.value)) < 300


def test_only_a_machine_that_cannot_plug_has_slots_without_a_type() -> None:
    document = whole()
    for slot in document["slots"]:
        slot["type"] = ""
    with pytest.raises(ValueError, match=r"'slots': \[0\]: 'type': a machine that takes CPUs names the type of each"):
        from_json(Layout, document)
    document["vm"]["can_plug"] = False
    assert {slot.type for slot in from_json(Layout, document).slots} == {""}


def test_keys_of_a_later_version_are_no_matter() -> None:
    document = whole()
    before = from_json(Layout, document)
    document["slots"][0]["pinned"] = "0-3"
    assert from_json(Layout, {**document, "schema": "qmpvcpu/1", "fleet": None}) == before


def test_a_layout_lacks_nothing() -> None:
    document = whole()
    for key in document:
        with pytest.raises(ValueError, match=f"^'{key}' is missing"):
            from_json(Layout, {name: value for name, value in document.items() if name != key})


def step_with(verdict: Verdict) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(to_json(StepReport(Action.UNPLUG, verdict.ids, verdict))))
    return document


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("kind", "lost", "'kind': \"lost\" is not one of plugged, unplugged, refused, pending, rejected, denied"),
        ("kind", "REFUSED", "'kind': \"REFUSED\" is not one of"),
        ("kind", 1, "'kind': 1 is not one of"),
        ("kind", "denied", "'reason': \"busy\" is not one of unknown_vcpu"),
        ("ids", "3-1", "'ids': \"3-1\" is not a set of vCPU ids"),
        ("code", "130", "'code': \"130\" is not a whole number"),
        ("code", -1, "'code': -1 is not a whole number"),
        ("reason", None, "'reason': null is not text"),
        ("seconds", "1", "'seconds': \"1\" is not a number"),
        ("seconds", float("nan"), "'seconds': NaN is not a number"),
        ("seconds", True, "'seconds': true is not a number"),
        pytest.param("seconds", 10**400, "'seconds': 1000", id="more than a float holds"),
    ],
)
def test_a_bad_verdict_is_refused_by_the_name_of_its_key(key: str, value: object, says: str) -> None:
    shown = step_with(Refused(VcpuMap([6]), 0x82, "busy", 0.5))
    shown["verdict"][key] = value
    with pytest.raises(ValueError, match=re.escape(f"'verdict': {says}")):
        from_json(StepReport, shown)


def test_a_verdict_lacks_nothing() -> None:
    shown = step_with(Pending(VcpuMap([6]), acknowledged=True))
    for key in shown["verdict"]:
        verdict = {name: value for name, value in shown["verdict"].items() if name != key}
        with pytest.raises(ValueError, match=f"'verdict': '{key}' is missing"):
            from_json(StepReport, shown | {"verdict": verdict})


def test_what_is_no_value_of_ours_is_written_as_its_text() -> None:
    assert to_json({"path": Path("/vm.xml"), 3: (None, True, 0.5)}) == {"path": "/vm.xml", "3": [None, True, 0.5]}


def test_bytes_are_text_that_can_be_encoded() -> None:
    shown = to_json(ExportedState(from_json(Layout, whole()), xml="<domain>\u00e4</domain>".encode()))
    assert shown["xml"] == "<domain>\u00e4</domain>"
    with pytest.raises(ValueError, match="'xml': 'utf-8' codec can't encode"):
        from_json(ExportedState, shown | {"xml": "\ud800"})


@dataclass(frozen=True)
class Counts:
    of: Mapping[str, int]
    rest: Mapping[str, Any]


def test_a_mapping_comes_back_as_it_was() -> None:
    counts = Counts({"a": 1, "b": 2}, {"deep": [1, None, {"x": "y"}]})
    assert from_json(Counts, json.dumps(to_json(counts))) == counts


def test_a_bad_member_of_a_mapping_is_named() -> None:
    with pytest.raises(ValueError, match=r"'of': 'b': \"2\" is not a whole number"):
        from_json(Counts, {"of": {"a": 1, "b": "2"}, "rest": {}})
