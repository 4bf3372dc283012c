"""An event, and what a document says of it."""

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import events
from qmpvcpu.documents import as_line, event_from_json, event_json
from qmpvcpu.events import Event, Origin, PlaceDrifted, UnplugRefused, VcpuUnplugged
from qmpvcpu.model.options import Proof
from qmpvcpu.model.placement import Place, SchedPolicy, Scheduler
from qmpvcpu.model.vcpumap import VcpuMap
from tests.documents.values import any_json
from tests.model.values import maps

seconds = st.floats(0, 1e6)
places = st.builds(Place, st.none() | maps.filter(bool), st.none() | st.just(Scheduler(SchedPolicy.FIFO, 3)))
# By the names of their fields; another of that name is given in OTHERS.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "generation": st.integers(0, 2**40),
    "origin": st.sampled_from(Origin),
    "ids": maps,
    "proof": st.sampled_from(Proof),
    "seconds": st.none() | seconds,
    "why_not": st.text(max_size=9),
    "why": st.text(max_size=9),
    "status": st.text(max_size=9),
    "reason": st.text(max_size=9),
    "code": st.none() | st.integers(0, 255),
    "late": st.booleans(),
    "acknowledged": st.booleans(),
    "resync": st.booleans(),
    "wanted": places,
    "found": places,
    "requested_at": st.none() | seconds,
}
KINDS = [
    kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
]


def some(kind: type[Event]) -> "st.SearchStrategy[Event]":
    return st.builds(kind, **{name: FIELDS[name] for name in kind.__dataclass_fields__})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_an_event_comes_back_as_it_was(kind: type[Event], data: st.DataObject) -> None:
    event = data.draw(some(kind))
    back = event_from_json(json.loads(as_line({"time": "12:00", **event_json(event), "max": 8})))
    if isinstance(event, VcpuUnplugged):
        event = replace(event, requested_at=None)
    assert back == event
    assert type(back) is kind


def test_an_event_is_told_with_its_name_and_all_that_it_says() -> None:
    assert event_json(UnplugRefused(generation=4, ids=VcpuMap([3]), code=0x82, reason="busy")) == {
        "event": "UnplugRefused",
        "generation": 4,
        "origin": "unknown",
        "ids": "3",
        "code": 0x82,
        "reason": "busy",
        "late": False,
    }


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({}, "'event' is missing"),
        ({"event": None}, "'event': null is not text"),
        ({"event": "Origin", "generation": 1}, '"Origin" is no event'),
        ({"event": "Proof"}, '"Proof" is no event'),
        ({"event": "enum"}, '"enum" is no event'),
        ({"event": "VmReset", "generation": -1, "origin": "us"}, "'generation'"),
        ({"event": "VmReset", "generation": 1, "origin": "me"}, "'origin'"),
        ({"event": "VcpuPlugged", "generation": 1, "origin": "us"}, "'ids' is missing"),
        ([], "a JSON object"),
    ],
)
def test_what_is_no_event_is_refused(said: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        event_from_json(said)


@given(any_json, st.sampled_from(KINDS))
def test_nothing_but_valueerror_comes_of_nonsense(said: Any, kind: type[Event]) -> None:
    for each in (said, {"event": kind.__name__, "generation": said, "origin": said, "ids": said}):
        with contextlib.suppress(ValueError):
            event_from_json(each)


def test_a_place_is_read_as_a_place() -> None:
    event = PlaceDrifted(generation=1, ids=VcpuMap(), wanted=Place.on("2-3", "fifo:5"), found=Place.on("0"))
    back = event_from_json(event_json(event))
    assert isinstance(back, PlaceDrifted)
    assert back.wanted.scheduler == Scheduler(SchedPolicy.FIFO, 5)
