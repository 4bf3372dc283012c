"""What another QEMU must know: an export as JSON, from which nothing is lost; and what an earlier QEMU had."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import VcpuMap
from qmpvcpu.model.exported import ExportedState, PreviousVcpus
from qmpvcpu.model.vm import Topology
from tests.captures import all_captures
from tests.domainxml.examples import layout_of
from tests.model.values import layouts, maps
from tests.planning.situations import situation

texts = st.text(st.characters(codec="utf-8"), max_size=20)
states = st.builds(ExportedState, layouts(), st.none() | maps, st.none() | texts.map(str.encode))


@given(states)
def test_any_export_comes_back_as_it_was(state: ExportedState) -> None:
    assert ExportedState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert ExportedState.from_json(json.dumps(state.to_json())) == state


def test_every_recorded_qemu_comes_back_as_it_was() -> None:
    for capture in all_captures():
        for layout in capture.layouts():
            state = ExportedState(layout)
            assert ExportedState.from_json(state.to_json()) == state, capture.name


def whole() -> dict[str, Any]:
    return ExportedState(situation({0: "boot", 5: "ours"}).layout, VcpuMap([0, 5]), b"<domain/>").to_json()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": "qmpvcpu/1"}, "'schema': \"qmpvcpu/1\" is not qmpvcpu-export/1"),
        ({"desired": "5-"}, "'desired':"),
        ({"xml": 7}, "'xml': 7 is not text"),
        ({"xml": "\ud800"}, "'xml':"),
        ({"layout": None}, "'layout': null is not a JSON object"),
        ({"layout": {}}, "'layout': 'vm' is missing"),
    ],
)
def test_what_is_bad_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        ExportedState.from_json(whole() | changes)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000], ids=["empty", "a list", "nothing", "deep"])
def test_what_is_no_export_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting value|not a JSON object|is missing|nested too deeply"):
        ExportedState.from_json(text)


def state_of(plugged: dict[int, str], **options: Any) -> ExportedState:
    layout = situation(plugged, **options).layout
    return ExportedState(layout)


@pytest.mark.parametrize(
    ("plugged", "started_with", "after"),
    [
        ({0: "boot", 1: "boot", 2: "boot"}, 3, []),
        ({0: "boot", 1: "boot", 5: "ours", 3: "ours"}, 2, [5, 3]),
        ({0: "boot", 2: "boot"}, 1, [2]),  # vCPU 1, there at boot, has left
        ({0: "boot", 1: "ours", 2: "boot"}, 1, [1, 2]),
        ({0: "boot", 2: "ours", 1: "boot"}, 1, [2, 1]),  # created in another order
    ],
)
def test_a_target_starts_with_the_boot_vcpus_and_is_given_the_rest_in_order(
    plugged: dict[int, str], started_with: int, after: list[int]
) -> None:
    state = state_of(plugged)
    assert state.started_with == VcpuMap(range(started_with))
    assert [slot.first for slot in state.plugged_after] == after


def test_a_target_starts_with_whole_slots() -> None:
    state = state_of({0: "boot", 4: "boot", 12: "ours"}, count=4)
    assert state.started_with == VcpuMap(range(8))
    assert [slot.first for slot in state.plugged_after] == [12]


def test_an_export_tells_what_it_is_of() -> None:
    state = state_of({0: "boot", 3: "ours"}, pending=(3,))
    assert (state.name, state.enabled, state.pending, state.generation) == (
        "test",
        VcpuMap([0, 3]),
        VcpuMap([3]),
        0,
    )
    assert state.slots == state.layout.slots


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
