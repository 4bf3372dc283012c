"""The page on traces: its tree, its words and its programs are what a program gets."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import qmpvcpu
from qmpvcpu import OnFailure, TransitionError
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.docs.blocks import ROOT, block
from tests.examples.running import running
from tests.traces.spans import Spans, stages, told, tree

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

PAGE = ROOT / "docs" / "traces.md"
BUSY = Behaviour.refusing(0x82)


def shown(span: "ReadableSpan") -> str:
    """A span as the page shows it."""
    if not span.name.startswith("qmpvcpu."):
        return span.name
    start, target, outcome, vcpus, verdict = told(span, "start", "target", "outcome", "vcpus", "verdict")
    what = f"{vcpus}: {verdict}" if target is None else f"{start} -> {target}: {outcome}"
    passed = ", ".join(stage for stage in stages(span) if stage not in {"planned", "exception"})
    error = ", ERROR" if span.status.status_code.name == "ERROR" else ""
    return f"{span.name} {what}{f' ({passed})' if passed else ''}{error}"


def without_races(text: str) -> str:
    """The guest's answer may come before QEMU's reply, and its acknowledgement of a plug before the plug ends."""
    return text.replace("requested, ", "").replace(", acknowledged", "")


@pytest.mark.qemu
async def test_the_tree_of_the_page_is_that_of_the_trace(spans: Spans) -> None:
    async with MicroGuest(boot=3, behaviour=BUSY.for_slot(1)) as guest, qmpvcpu.attach(guest.qmp) as vm:
        with spans.caller("resize"), pytest.raises(TransitionError):
            await vm.set_map("0,3", on_failure=OnFailure.REVERT)
    drawn = "\n".join(tree(spans, shown))
    page = block("docs/traces.md", "a map that is reverted").text.strip()
    assert without_races(drawn) == without_races(page)


@pytest.mark.qemu
async def test_the_program_of_the_page_traces_an_unplug(spans: Spans) -> None:
    program = block("docs/traces.md", "switching them on").module()
    async with MicroGuest(boot=2) as guest:
        await program.take_out(str(guest.qmp), 1)
    assert [span.name for span in spans.all] == ["qmpvcpu.step.unplug", "qmpvcpu.unplug", "scale down"]


@pytest.mark.qemu
async def test_the_example_prints_its_trace_by_the_sdks_console_exporter() -> None:
    behaviour = BUSY.for_slot(1)
    async with (
        MicroGuest(boot=2, behaviour=behaviour) as guest,
        running("traced.py", guest.qmp, "0,3") as example,
    ):
        assert await example.end() == 1
    printed = list(documents("\n".join(line for line in example.said.splitlines() if not line.startswith("vCPUs"))))
    by_id = {span["context"]["span_id"]: span for span in printed}
    names = {span["name"]: by_id[span["parent_id"]]["name"] if span["parent_id"] else None for span in printed}
    assert names == {
        "resize": None,
        "qmpvcpu.set_map": "resize",
        "qmpvcpu.step.plug": "qmpvcpu.set_map",
        "qmpvcpu.step.unplug": "qmpvcpu.set_map",
        "qmpvcpu.undo.plug": "qmpvcpu.set_map",
    }
    (refused,) = [span for span in printed if span["name"] == "qmpvcpu.step.unplug"]
    assert refused["attributes"]["qmpvcpu.ost.code"] == 0x82
    assert refused["status"]["status_code"] == "ERROR"
    assert {event["name"] for event in refused["events"]} >= {"sent", "working", "refused", "exception"}


def documents(text: str) -> list[dict[str, Any]]:
    """The JSON objects in *text*, one after the other."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def test_the_page_has_every_attribute_and_no_other() -> None:
    source = (ROOT / "qmpvcpu" / "traces.py").read_text()
    used = set(re.findall(r'"(qmpvcpu\.[a-z_.]+)"', source)) - {"qmpvcpu.traces"}
    table = PAGE.read_text().partition("## Attributes")[2].partition("##")[0]
    given_by_callers = {"qmpvcpu.command"}
    assert set(re.findall(r"`(qmpvcpu\.[a-z_.]+)`", table)) == used - {"qmpvcpu.late_answer"} | given_by_callers


def test_the_page_has_every_change_and_every_event() -> None:
    text = PAGE.read_text()
    controller = Path(qmpvcpu.__file__).parent / "vm" / "controller.py"
    calls = set(re.findall(r'call="(\w+)"', controller.read_text())) | {"unplug", "request_unplug"}
    assert [call for call in sorted(calls) if f"`.{call}`" not in text and f"`qmpvcpu.{call}`" not in text] == []
    source = (ROOT / "qmpvcpu" / "traces.py").read_text()
    events = re.findall(r'yield "([a-z ]+)"', source) + re.findall(r': "([a-z ]+)",\n', source)
    assert len(events) > 15
    assert [event for event in events if f"`{event}`" not in text] == []
