"""What vCPUs have done, and what a document says of it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.documents import as_line, statistics_from_json, statistics_json
from qmpvcpu.documents.form import document
from qmpvcpu.model.statistics import VcpuStatistics, VmStatistics
from tests.cli.schema import errors_in
from tests.documents.values import any_json
from tests.model.test_statistics import readings

EARLIER = VmStatistics("vm", 1e9, 5.0, (VcpuStatistics(0, 7, run_s=1.0, delay_s=0.5, turns=10),))
LATER = VmStatistics("vm", 1e9 + 2, 7.0, (VcpuStatistics(0, 7, run_s=2.0, delay_s=0.5, turns=12), VcpuStatistics(1)))


@given(readings)
def test_a_reading_comes_back_as_it_was(reading: VmStatistics) -> None:
    arrived = json.loads(as_line(document(**statistics_json(reading))))
    assert errors_in(arrived, "stats") == []
    assert statistics_from_json(arrived) == reading


def test_the_rates_of_a_document_are_those_that_its_reader_can_tell() -> None:
    rates = LATER.since(EARLIER)
    told = statistics_json(LATER, rates)
    assert (told["seconds"], told["vcpus"][0]["rates"]["run"], told["vcpus"][0]["rates"]["idle"]) == (2.0, 0.5, 0.5)
    assert statistics_from_json(told).since(statistics_from_json(statistics_json(EARLIER))) == rates


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("name", None, "'name'"),
        ("at", True, "'at'"),
        ("vcpus", [{"id": -1}], r"'vcpus': \[0\]: 'id'"),
        ("vcpus", [{**statistics_json(EARLIER)["vcpus"][0], "kvm": {"exits": "many"}}], r"'vcpus': \[0\]: 'kvm'"),
    ],
)
def test_what_is_no_reading_is_refused(key: str, value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        statistics_from_json(statistics_json(EARLIER) | {key: value})


@given(readings, st.data())
def test_whatever_is_changed_in_a_reading_it_is_read_or_refused(reading: VmStatistics, data: st.DataObject) -> None:
    told = statistics_json(reading)
    part = data.draw(st.sampled_from([told, *told["vcpus"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(any_json)
    try:
        back = statistics_from_json(told)
    except ValueError:
        return
    as_line(statistics_json(back))
