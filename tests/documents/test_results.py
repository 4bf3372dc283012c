"""A row of fleet list, set and count, and the result that it was made of."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpvcpu import TransitionReport
from qmpvcpu.documents import INTERRUPTED, REACHED, as_line, code_of
from qmpvcpu.errors import MonitorConnectError, QmpVcpuError, TransitionError
from qmpvcpu.fleet import VmResult
from tests.documents.test_layouts import as_seen
from tests.documents.values import any_json, every_error
from tests.layouts import layout
from tests.model.values import layouts, reports

addresses = st.text(max_size=12)
seconds = st.floats(0, 1e6)
some_layouts = layouts().map(as_seen)


def there_and_back(result: VmResult[Any], *, whole: bool = True) -> VmResult[TransitionReport | None]:
    return VmResult.from_json(json.loads(as_line(result.to_json(whole=whole))))


@given(addresses, addresses, st.none() | some_layouts, seconds)
def test_a_result_without_a_report_comes_back_but_for_its_value(
    address: str, name: str, layout: Any, seconds: float
) -> None:
    result: VmResult[Any] = VmResult(address, name, layout, "anything", None, seconds)
    assert there_and_back(result) == replace(result, value=None, seconds=round(seconds, 6))
    assert result.code == REACHED


@settings(max_examples=40)  # each has a layout of its own, twice
@given(addresses, some_layouts, reports)
def test_a_report_is_the_value_again(address: str, layout: Any, report: TransitionReport) -> None:
    result = VmResult(address, "vm", layout, report, None, report.seconds)
    assert there_and_back(result) == result


@settings(max_examples=40)  # each has a layout of its own, twice
@given(every_error, st.none() | some_layouts)
def test_an_error_is_raised_again(error: QmpVcpuError, layout: Any) -> None:
    result: VmResult[Any] = VmResult("unix:/run/a", "vm", layout, None, error, 0.5)
    back = there_and_back(result)
    of_report = None if result.report is None else result.report.layout
    assert back.layout == (of_report if layout is None else layout)
    assert (type(back.error), back.code, back.verdict) == (type(error), code_of(error), result.verdict)
    assert back.report == result.report
    with pytest.raises(type(error)):
        back.unwrap()


@settings(max_examples=40)  # each has a layout of its own, twice
@given(reports)
def test_without_every_vcpu_the_layout_is_that_of_the_report(report: TransitionReport) -> None:
    result: VmResult[Any] = VmResult("a", "vm", layout("0-3"), None, TransitionError(report), 1.0)
    row = result.to_json(whole=False)
    assert (row["enabled"], "vcpus" in row) == ("0-3", False)
    assert VmResult.from_json(row).layout == report.layout
    assert VmResult.from_json(replace(result, error=None).to_json(whole=False)).layout is None


def test_a_vm_that_was_given_up_is_so_again() -> None:
    for error in (asyncio.CancelledError(), KeyboardInterrupt()):
        result: VmResult[Any] = VmResult("a", "", None, None, error, 0.0)
        back = there_and_back(result)
        assert result.code == back.code == INTERRUPTED
        assert isinstance(back.error, asyncio.CancelledError)


def test_what_else_a_document_has_stands_before_the_layout() -> None:
    result: VmResult[Any] = VmResult("a", "vm", layout("0"), None, None, 0.0)
    told = result.to_json(whole=False, more={"agent_error": None})
    assert list(told) == [
        *("address", "name", "code", "seconds", "error"),
        "agent_error",
        *("max", "enabled", "pending"),
    ]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("address", None, "'address': null is not text"),
        ("seconds", "soon", "'seconds': \"soon\" is not a number"),
        ("vcpus", 5, "'vcpus': 5 is not a list"),
        ("steps", {}, "'steps': {} is not a list|'start' is missing"),
    ],
)
def test_a_row_that_is_none_is_refused(key: str, value: Any, why: str) -> None:
    row = VmResult("a", "vm", layout("0"), None, MonitorConnectError("a", "no"), 0.0).to_json(whole=True)
    with pytest.raises(ValueError, match=why):
        VmResult.from_json(row | {key: value})


@settings(max_examples=40)  # each has a layout of its own, twice
@given(some_layouts, reports, st.data())
def test_whatever_is_changed_in_a_row_it_is_read_or_refused(
    layout: Any, report: TransitionReport, data: st.DataObject
) -> None:
    row = VmResult("a", "vm", layout, None, TransitionError(report), 0.0).to_json(whole=True)
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(any_json)
    try:
        back = VmResult.from_json(row)
    except ValueError:
        return
    as_line(back.to_json(whole=True))
