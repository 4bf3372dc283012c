import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpvcpu.errors import CommandRejectedError, MonitorConnectError, QmpVcpuError, RecordError, counted, printable
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.transition import Action, ConfigOutcome, ConfigReport, StepReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Rejected

HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\nFORGED ok\x9b31m\u202egpj.exe\u2066\u200b\u2028\x7f\x00\udcff"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("web-1 ö 日本 \\x1b", "web-1 ö 日本 \\x1b"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202egpj\u2066\u200b\u2028\ufeff", r"\u202egpj\u2066\u200b\u2028\ufeff"),
        ("\udcff", r"\udcff"),
        ("\U000e0041", r"\U000e0041"),
        ("", ""),
    ],
)
def test_what_is_not_printable_is_escaped_as_in_python(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_text_of_several_lines_keeps_line_breaks_and_tabs_and_nothing_else() -> None:
    assert printable("a\n\tb\r\x0b\x0c\x1c\x85\u2028", lines=True) == "a\n\tb\\r\\x0b\\x0c\\x1c\\x85\\u2028"


@given(st.text(st.characters()))
def test_no_control_is_left_of_any_text_and_escaping_twice_changes_nothing(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(each) for each in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert printable(shown) == shown
    shown.encode()


@pytest.mark.parametrize(
    "error",
    [
        QmpVcpuError(HOSTILE),
        CommandRejectedError("GenericError", HOSTILE, {"execute": HOSTILE}, ids=VcpuMap(), hint=HOSTILE),
        MonitorConnectError(f"unix:/run/{HOSTILE}", HOSTILE, hint=HOSTILE),
        RecordError(HOSTILE, HOSTILE),
    ],
)
def test_the_message_of_an_error_is_one_printable_line_and_its_attributes_are_exact(error: QmpVcpuError) -> None:
    assert str(error).isprintable()
    assert "FORGED" in str(error)
    evidence = [value for value in vars(error).values() if isinstance(value, str)]
    assert all(HOSTILE in value for value in evidence if "FORGED" in value)


def test_reports_are_printable_and_their_json_is_exact() -> None:
    ids = VcpuMap([3])
    step = StepReport(Action.PLUG, ids, Rejected(ids, "GenericError", HOSTILE), reason=HOSTILE)
    config = ConfigReport(HOSTILE, ConfigOutcome.FAILED, ids, ids, 8, reason=HOSTILE)
    assert str(step).isprintable()
    assert str(config).isprintable()
    assert to_json(step)["verdict"]["desc"] == HOSTILE
    assert json.loads(json.dumps(to_json(config)))["reason"] == HOSTILE


@pytest.mark.parametrize(("number", "said"), [(0, "0 VMs"), (1, "1 VM"), (2, "2 VMs"), (1000, "1000 VMs")])
def test_a_count_has_its_noun_in_the_right_number(number: int, said: str) -> None:
    assert counted(number, "VM") == said
