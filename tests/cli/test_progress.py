from typing import Any

import pytest

from qmpvcpu.cli.progress import FleetProgress, StepTracker, sentence
from qmpvcpu.events import (
    Disconnected,
    Event,
    InstanceChanged,
    LayoutChanged,
    MigrationChanged,
    Origin,
    PlaceDrifted,
    Reconnected,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlaced,
    VcpuPlugged,
    VcpuProven,
    VcpuUnplugged,
    VmReset,
    VmResumed,
    VmStopped,
)
from qmpvcpu.model.options import Proof
from qmpvcpu.model.placement import Place
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.vcpumap import VcpuMap
from tests.cli.schema import KINDS_OF_EVENT

STEPS = (
    Step(Action.PLUG, VcpuMap([2])),
    Step(Action.KEEP, VcpuMap([5]), "/machine/peripheral/vcpu5"),
    Step(Action.UNPLUG, VcpuMap([6, 7]), "/machine/peripheral/vcpu6"),
    Step(Action.UNPLUG, VcpuMap([1]), "/machine/unattached/device[2]"),
)


def plugged(*ids: int) -> Event:
    return VcpuPlugged(generation=1, ids=VcpuMap(ids))


def unplugged(*ids: int) -> Event:
    return VcpuUnplugged(generation=1, ids=VcpuMap(ids))


def refused(*ids: int) -> Event:
    return UnplugRefused(generation=1, ids=VcpuMap(ids), code=0x82, reason="device is busy")


def pending(*ids: int) -> Event:
    return UnplugPending(generation=1, ids=VcpuMap(ids), acknowledged=True)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([], "0 of 4"),
        ([plugged(2)], "1 of 4"),
        ([plugged(2), plugged(2)], "1 of 4"),
        ([plugged(3), unplugged(4)], "0 of 4"),
        ([unplugged(2)], "0 of 4"),
        ([UnplugRequested(generation=1, ids=VcpuMap([1]))], "0 of 4"),
        ([unplugged(6, 7), refused(1)], "2 of 4"),
        ([pending(6, 7)], "1 of 4"),
        ([unplugged(5)], "0 of 4"),
        ([unplugged(5), plugged(5)], "1 of 4"),
        ([refused(5)], "1 of 4"),
        ([plugged(2), unplugged(6, 7), refused(1), plugged(6, 7), unplugged(2)], "3 of 4, 2 undone"),
        ([refused(1), plugged(1)], "1 of 4"),
    ],
)
def test_what_is_settled_and_undone_is_counted_from_events(events: list[Event], says: str) -> None:
    tracker = StepTracker(STEPS)
    for event in events:
        tracker.take(event)
    assert str(tracker) == says


def proven(first: int, proof: Proof) -> VcpuProven:
    return VcpuProven(generation=1, ids=VcpuMap([first]), proof=proof, seconds=0.1)


def test_a_plug_is_settled_once_its_proof_is_there() -> None:
    tracker = StepTracker([Step(Action.PLUG, VcpuMap([2]))], Proof.STARTED)
    tracker.take(plugged(2))
    assert (str(tracker), words_of(tracker)) == ("0 of 1", ["plug 2: plugged, not yet started"])
    tracker.take(proven(2, Proof.ACKNOWLEDGED))
    assert str(tracker) == "0 of 1"
    tracker.take(proven(2, Proof.STARTED))
    assert (str(tracker), words_of(tracker)) == ("1 of 1", ["plug 2: plugged, started"])


def test_a_plug_that_is_never_proven_can_be_undone() -> None:
    tracker = StepTracker([Step(Action.PLUG, VcpuMap([2]))], Proof.ONLINE)
    for event in (plugged(2), proven(2, Proof.STARTED), unplugged(2)):
        tracker.take(event)
    assert (str(tracker), words_of(tracker)) == ("1 of 1, 1 undone", ["plug 2: undone"])


def test_a_vcpu_that_is_brought_online_is_settled_when_it_is() -> None:
    tracker = StepTracker([Step(Action.ONLINE, VcpuMap([2]))])
    tracker.take(proven(2, Proof.STARTED))
    assert str(tracker) == "0 of 1"
    tracker.take(proven(2, Proof.ONLINE))
    assert str(tracker) == "1 of 1"


def words_of(tracker: StepTracker, most: int = 9) -> list[str]:
    return [f"{row.step}: {row.words}" for row in tracker.rows(most)]


def test_each_step_has_a_row_with_what_it_does() -> None:
    tracker = StepTracker(STEPS)
    requested = UnplugRequested(generation=1, ids=VcpuMap([2]))
    for event in (plugged(2), UnplugAcknowledged(generation=1, ids=VcpuMap([6, 7])), refused(1)):
        tracker.take(event)
    assert words_of(tracker) == [
        "plug 2: plugged",
        "keep 5: waits",
        "unplug 6-7: the guest works on it",
        "unplug 1: refused: device is busy",
    ]
    assert words_of(tracker, most=2) == ["unplug 6-7: the guest works on it", "plug 2: plugged"]
    tracker.take(requested)
    assert words_of(tracker)[0] == "plug 2: to be undone: asked, no reaction yet"
    tracker.take(unplugged(2))
    assert words_of(tracker)[0] == "plug 2: undone"


SENTENCES: list[tuple[type[Event], dict[str, Any], str]] = [
    (VcpuPlugged, {"ids": VcpuMap([3])}, "vCPU 3 is plugged"),
    (VcpuProven, {"ids": VcpuMap([3]), "proof": Proof.STARTED, "seconds": 0.1}, "vCPU 3 started"),
    (VcpuPlaced, {"ids": VcpuMap([3]), "seconds": 0.1}, "vCPU 3 is in its place"),
    (VcpuPlaced, {"ids": VcpuMap([3]), "seconds": 0.1, "why_not": "gone"}, "vCPU 3 is not in its place: gone"),
    (
        PlaceDrifted,
        {"ids": VcpuMap([3]), "wanted": Place.on("8"), "found": Place.on("0-9", "batch")},
        "vCPU 3 has drifted to host CPUs 0-9, batch; its place is host CPUs 8",
    ),
    (
        PlaceDrifted,
        {"ids": VcpuMap(), "wanted": Place.on("8"), "found": Place.on("9")},
        "QEMU's main thread has drifted to host CPUs 9; its place is host CPUs 8",
    ),
    (UnplugRequested, {"ids": VcpuMap([3])}, "the guest is asked"),
    (UnplugAcknowledged, {"ids": VcpuMap([3])}, "the guest works on it"),
    (UnplugRefused, {"ids": VcpuMap([3]), "code": 0x82, "reason": "device is busy"}, "refused: device is busy"),
    (UnplugPending, {"ids": VcpuMap([3]), "acknowledged": True}, "it is pending"),
    (VcpuUnplugged, {"ids": VcpuMap([3])}, "vCPU 3 is gone"),
    (LayoutChanged, {}, "no event had told"),
    (LayoutChanged, {"resync": True}, "some events were dropped"),
    (VmReset, {}, "what is pending stays so"),
    (VmStopped, {}, "paused"),
    (VmResumed, {}, "runs again"),
    (MigrationChanged, {"status": "active"}, "migration: active"),
    (Disconnected, {"why": "EOF"}, "lost: EOF"),
    (Reconnected, {}, "is back"),
    (InstanceChanged, {}, "another QEMU"),
]


@pytest.mark.parametrize(("kind", "more", "words"), SENTENCES)
def test_an_event_is_told_in_a_sentence(kind: type[Event], more: dict[str, Any], words: str) -> None:
    assert words in sentence(kind(generation=1, origin=Origin.OTHER, **more))


def test_there_is_a_sentence_for_every_kind_of_event() -> None:
    assert {kind.__name__ for kind, _, _ in SENTENCES} == KINDS_OF_EVENT


def test_the_line_of_a_fleet_says_why_no_more_vms_are_begun() -> None:
    progress = FleetProgress(("rack1/web-1", "rack2/web-2"))
    assert progress.line() == "0 of 2 VMs; waiting for rack1/web-1, rack2/web-2"
    progress.held = "paused until campaign resume 42"
    assert progress.line() == "0 of 2 VMs; paused until campaign resume 42; waiting for rack1/web-1, rack2/web-2"
