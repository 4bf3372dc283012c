"""Strategies for the values that are kept as JSON: any layout, any verdict, any report."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from qmpvcpu import DenialReason, Layout, VcpuMap
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.options import Affect, OnFailure, Proof
from qmpvcpu.model.transition import (
    Action,
    ConfigOutcome,
    ConfigReport,
    ProofSeconds,
    StepReport,
    TransitionOutcome,
    TransitionReport,
)
from qmpvcpu.model.verdicts import Denied, OstAnswer, Pending, Plugged, Refused, Rejected, Unknown, Unplugged, Verdict
from qmpvcpu.model.vm import Topology, VmInfo

__all__ = ["layouts", "maps", "reports", "step_reports", "verdicts"]

numbers = st.integers(0, 2**40)
texts = st.text(max_size=12)
seconds = st.floats(0, 1e6)
maybe = st.sampled_from([None, True, False])
maps = st.sets(st.integers(0, 40), max_size=8).map(VcpuMap)

verdicts: st.SearchStrategy[Verdict] = st.one_of(
    st.builds(Plugged, maps, maybe, st.none() | st.integers(0, 255), texts, seconds),
    st.builds(Unplugged, maps, seconds),
    st.builds(Refused, maps, st.none() | st.integers(0, 255), texts, seconds, st.booleans()),
    st.builds(Pending, maps, acknowledged=st.booleans(), seconds=seconds),
    st.builds(Rejected, maps, texts, texts, texts, seconds),
    st.builds(Denied, maps, st.sampled_from(DenialReason), texts),
    st.builds(Unknown, maps, texts),
)

step_reports = st.builds(
    StepReport,
    st.sampled_from(Action),
    maps,
    st.none() | verdicts,
    texts,
    seconds,
    st.none() | verdicts,
    maybe,
    st.none() | st.builds(ProofSeconds, *[st.none() | seconds] * len(Proof)),
    st.none() | st.sampled_from(Proof),
)

sizes = st.integers(1, 64)
words = st.from_regex("[A-Za-z0-9][A-Za-z0-9_.+-]{0,12}", fullmatch=True)
uuids = st.uuids().map(str)
vms = st.builds(
    VmInfo,
    texts,
    words,
    words,
    st.sampled_from(["kvm", "tcg"]),
    st.tuples(*[st.integers(0, 99)] * 3),
    st.none() | uuids,
    texts,
    st.none() | numbers,
    st.none() | st.builds(Topology, *[sizes] * 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    maybe,
)
places = st.sampled_from(["node-id", "socket-id", "die-id", "core-id", "thread-id", "tile-id"])
props = st.dictionaries(places, st.integers(0, 2**31 - 1), max_size=4).map(CpuProps)
cpu_types = st.builds("{}-{}".format, words, st.sampled_from(["x86_64-cpu", "spapr-cpu-core", "s390x-cpu"]))
device_ids = st.from_regex("[A-Za-z][A-Za-z0-9._-]{0,8}", fullmatch=True)
paths = device_ids.map("/machine/peripheral/{}".format) | st.builds(
    "/machine/unattached/device[{}]".format, st.integers(0, 9999)
)
answers = st.none() | st.builds(OstAnswer, numbers, numbers)
proven = st.just((None, None)) | st.tuples(st.sampled_from(Proof), st.none() | seconds)


@st.composite
def layouts(draw: st.DrawFn, count: int | None = None) -> Layout:
    """Any layout, whether or not a QEMU could bring it about; its slots hold *count* vCPUs each, or one to four."""
    size = draw(st.integers(1, 4)) if count is None else count
    slots: list[Slot] = []
    for first in range(0, size * draw(st.integers(0, 6)), size):
        path = draw(st.none() | paths)
        tids = tuple(draw(st.none() | numbers) for _ in range(size)) if path is not None else ()
        known = draw(answers), *(draw(proven) if path is not None else (None, None))
        slots.append(Slot(first, size, draw(cpu_types), draw(props), draw(numbers), path, tids, *known))
    present = [slot.first for slot in slots if slot.present]
    created = draw(st.permutations(present))
    pending = draw(st.sets(st.sampled_from(present))) if present else set()
    return Layout(
        vm=draw(vms),
        slots=tuple(slots),
        creation=tuple(created[: draw(st.integers(0, len(created)))]),
        pending_slots=frozenset(pending),
        generation=draw(numbers),
    )


config_reports = st.builds(
    ConfigReport, texts, st.sampled_from(ConfigOutcome), maps, maps, st.integers(0, 16384), texts
)
beyond_live: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    affect=st.sampled_from([Affect.CONFIG, Affect.BOTH]),
    config=st.none() | config_reports,
)
reports_of_live = st.builds(
    TransitionReport,
    maps,
    maps,
    st.sampled_from(OnFailure),
    st.sampled_from(TransitionOutcome),
    st.lists(step_reports, max_size=4).map(tuple),
    layouts(),
    seconds,
    st.booleans(),
    texts,
)
reports = reports_of_live | st.builds(lambda report, more: replace(report, **more), reports_of_live, beyond_live)
