import json
from asyncio import CancelledError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu import errors
from qmpvcpu.documents import (
    INTERRUPTED,
    NO_ANSWER,
    NOT_REACHED,
    as_line,
    code_of,
    error_from_json,
    error_json,
)
from qmpvcpu.errors import InvalidMapError, Outcome, QmpVcpuError, TransitionError
from qmpvcpu.model.vcpumap import VcpuMap
from tests.cli.schema import errors_in
from tests.documents.values import ERRORS, any_json, every_error


def test_every_error_of_the_library_is_among_those_that_are_sent_here() -> None:
    found = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, QmpVcpuError)}
    assert set(ERRORS) == found


def there_and_back(error: BaseException) -> BaseException:
    return error_from_json(json.loads(as_line(error_json(error))), report=getattr(error, "report", None))


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_an_error_comes_back_with_class_message_and_evidence(kind: type[QmpVcpuError], data: st.DataObject) -> None:
    error = data.draw(ERRORS[kind])
    back = there_and_back(error)
    assert type(back) is kind
    assert str(back) == str(error) or (str(error) == "" and str(back) == kind.__name__)
    assert {**vars(back), "outcome": None} == {**vars(error), "outcome": None}
    assert back.outcome is error.outcome
    assert code_of(back) == code_of(error)
    assert error_json(back) == error_json(error)


BASES = {
    *(errors.PlanError, errors.MonitorError, errors.GuestAgentError, errors.StepError),
    *(errors.MigrationError, errors.HostsError),
}


@given(every_error)
def test_an_error_is_told_as_the_schema_says(error: QmpVcpuError) -> None:
    if type(error) not in BASES:  # never raised
        assert errors_in(json.loads(as_line(error_json(error))), "error") == []


def test_what_an_error_names_comes_back_as_it_was() -> None:
    back: Any = there_and_back(errors.StepDeniedError("plug", VcpuMap([3]), errors.DenialReason.FATAL, "it dies"))
    assert (back.ids, back.reason) == (VcpuMap([3]), errors.DenialReason.FATAL)
    with pytest.raises(TimeoutError, match="QEMU did not reply to query-status within 5 s"):
        raise there_and_back(errors.MonitorTimeoutError("query-status", 5))


def test_an_agents_error_that_came_back_can_be_told_what_it_is_about() -> None:
    back: Any = there_and_back(errors.AgentSilentError("", "it hangs", timeout=1))
    back.concern("offline of vCPU 3", timeout=2.0)
    assert str(back) == "guest agent: offline of vCPU 3: no answer within 2 s: it hangs"


def test_a_file_whose_name_is_not_printable_is_named_in_printable_letters() -> None:
    error = errors.DomainXmlError("it is empty")
    error.path = "\x1b[2J.xml"
    back: Any = there_and_back(error)
    assert str(error) == str(back) == r"\x1b[2J.xml: it is empty"
    assert back.path == error.path


def test_an_error_of_the_system_comes_back_as_one() -> None:
    error = FileNotFoundError(2, "No such file or directory", "/run/a")
    back = there_and_back(error)
    assert (type(back), str(back), code_of(back)) == (OSError, str(error), NO_ANSWER)


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3), CancelledError()])
def test_any_other_error_comes_back_as_one_of_ours_with_its_message(error: BaseException) -> None:
    back = there_and_back(error)
    assert type(back) is QmpVcpuError
    assert str(back) == (str(error) or type(error).__name__)


def test_a_failed_transition_needs_its_report() -> None:
    told = {"kind": "TransitionError", "message": "vCPUs 0-3 not reached", "outcome": "changed", "verdict": None}
    back = error_from_json(told)
    assert (type(back), str(back), back.outcome) == (QmpVcpuError, told["message"], Outcome.CHANGED)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "kind", ["Outcome", "os", "json", "__builtins__", "KeyboardInterrupt", "describe", "", None, 5, ["HostError"]]
)
def test_a_kind_that_is_no_error_of_ours_becomes_the_plainest(kind: object) -> None:
    back = error_from_json({"kind": kind, "message": "no", "outcome": "changed", "verdict": None})
    assert (type(back), str(back), back.outcome) == (QmpVcpuError, "no", Outcome.CHANGED)  # type: ignore[union-attr]


def test_no_attribute_is_taken_but_those_of_the_class() -> None:
    more = {"args": ["other"], "__class__": "int", "__traceback__": None, "add_note": 1}
    back = error_from_json(error_json(errors.HostError("no")) | more)
    assert (str(back), vars(back)) == ("no", {"why": "no", "outcome": Outcome.UNCHANGED})


@pytest.mark.parametrize("told", [None, 5, "HostError", [], {}, {"kind": "HostError"}, {"message": ["no"]}])
def test_what_is_no_error_is_told_as_such(told: object) -> None:
    back = error_from_json(told)
    assert (type(back), code_of(back), back.outcome) == (QmpVcpuError, NOT_REACHED, Outcome.UNKNOWN)  # type: ignore[union-attr]
    assert "cannot be read" in str(back)


@given(every_error, st.data())
def test_whatever_is_changed_in_an_error_it_is_read_as_one(error: QmpVcpuError, data: st.DataObject) -> None:
    told = error_json(error)
    key = data.draw(st.sampled_from(sorted(told)))
    told[key] = data.draw(any_json)
    back = error_from_json(told, report=getattr(error, "report", None))
    assert isinstance(back, QmpVcpuError | OSError)
    assert str(back).isprintable()
    as_line(error_json(back))


def test_evidence_that_json_has_not_is_quoted() -> None:
    assert error_json(InvalidMapError(b"\xff", "no"))["text"] == repr(b"\xff")
    assert error_json(InvalidMapError(frozenset({1, "a"}), "no"))["text"].startswith("frozenset")


def test_a_signal_has_a_code_of_its_own() -> None:
    assert code_of(KeyboardInterrupt()) == INTERRUPTED
    assert code_of(ValueError()) == NOT_REACHED


@given(ERRORS[TransitionError])
def test_the_report_of_a_failed_transition_is_told_apart_from_it(error: TransitionError) -> None:
    assert set(error_json(error)) == {"kind", "message", "outcome", "verdict"}
