import copy
import enum
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import qmpvcpu
from qmpvcpu.errors import DenialReason
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.planning.compatibility import DifferenceKind, Severity
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import run, said
from tests.cli.schema import KINDS_OF_EVENT, SCHEMA, errors_in

pytestmark = pytest.mark.qemu

# What is QEMU's or a caller's own, of any shape.
OPEN = {"arguments", "reply"}


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def objects_in(value: object, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object within *value* with its place, those of any shape left out."""
    if isinstance(value, dict):
        yield place, value
        for key, each in value.items():
            if key not in OPEN:
                yield from objects_in(each, f"{place}/{key}")
    elif isinstance(value, list):
        for each in value:
            yield from objects_in(each, f"{place}/*")


def assert_strict(document: dict[str, Any], command: str) -> None:
    """Nothing may be added to any of its objects, and of its top nothing may be another kind of thing."""
    assert errors_in(document, command) == []
    for place in dict(objects_in(document)):  # of a list's objects the last one
        surplus = copy.deepcopy(document)
        dict(objects_in(surplus))[place]["surplus"] = 1
        assert errors_in(surplus, command) != [], (command, place)
    for key in document:
        assert errors_in({**document, key: {"another": "thing"}}, command) != [], (command, key)


async def test_no_command_prints_more_than_its_schema_says_or_other_things(
    guest: MicroGuest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xml, record = tmp_path / "vm.xml", tmp_path / "record.xml"
    vm = ("--qmp", guest.qmp, "--json")
    both = ("--affect", "both", "--config", xml)
    assert (await run("xml", "-o", xml, *vm)).code == 0
    words: list[tuple[str | Path, ...]] = [
        ("xml", *vm),
        ("list", *vm),
        ("plan", "0,2", *both, *vm),
        ("plan", "1,99", *vm),
        ("plug", "2", *vm),
        ("plug", "2", *vm),
        ("plug", "--affect", "config", "--config", xml, "--json"),
        ("unplug", "2", *vm),
        ("set", "0,3", *both, *vm),
        ("count", "0", *vm),
        ("recover", "--record", record, *vm),
        ("set", "0-1", "--record", record, *vm),
        ("recover", "--record", record, *vm),
        ("config", xml, "--json"),
        ("args", xml, "--json"),
        ("fleet", "list", *vm, "--qmp", tmp_path / "nobody"),
        ("fleet", "set", "0-1", *vm),
        ("list", "--json", "--qmp", tmp_path / "nobody"),
        ("list", "--json", "--frob"),
    ]
    seen = [await said(capsys, *each) for each in words]
    await guest.set_behaviour(Behaviour.refusing(0x82))
    refused = [("set", "0,2", "--on-failure", "revert", *vm), ("unplug", "1", *vm)]
    seen += [await said(capsys, *each) for each in refused]
    for ran in seen:
        assert_strict(ran.document, ran.command)
    assert {ran.code for ran in seen} == {0, 1, 2, 3, 4}
    assert len({ran.command for ran in seen}) > len(("demo", "watch", "doctor"))


async def test_each_line_of_watch_and_stats_and_the_demo_is_as_its_schema_says() -> None:
    async with MicroGuest(boot=2) as guest:
        ran = await run("watch", "--until", "0-1", "--json", "--qmp", guest.qmp)
    for each in ran.documents:
        assert_strict(each, "watch")
        ran = await run("stats", "--interval", "0.05", "--count", "2", "--json", "--qmp", guest.qmp)
    for each in ran.documents:
        assert_strict(each, "stats")
    demo = await run("demo", "--json")
    assert_strict(demo.document, "demo")


def kinds(name: str) -> set[str]:
    """The constants that tell the branches of a definition apart."""
    key = {"error": "kind", "event": "event"}[name]
    return {branch["properties"][key]["const"] for branch in SCHEMA["$defs"][name]["oneOf"]}


def words(kind: type[enum.Enum]) -> set[str]:
    return {to_json(each) for each in kind}


def test_it_knows_every_error_event_and_reason_of_the_library() -> None:
    abstract = {"QmpVcpuError", "MonitorError", "GuestAgentError", "PlanError", "StepError", "MigrationError"}
    errors = {name for name in qmpvcpu.__all__ if name.endswith("Error")} - abstract
    errors |= {each.__name__ for each in qmpvcpu.GuestAgentError.__subclasses__()}
    assert errors - kinds("error") == set()
    assert kinds("event") == KINDS_OF_EVENT
    defs = SCHEMA["$defs"]
    assert set(defs["denial"]["enum"]) == words(DenialReason)
    assert set(defs["fault"]["enum"]) == words(KnownFault)
    difference = defs["difference"]["properties"]
    assert set(difference["kind"]["enum"]) == words(DifferenceKind)
    assert set(difference["severity"]["enum"]) == words(Severity)


def test_every_document_of_a_command_is_among_those_of_the_whole() -> None:
    listed = {each["$ref"].rpartition("/")[2] for each in SCHEMA["anyOf"]}
    assert listed >= {"list", "plug", "unplug", "set", "count", "plan", "watch", "xml", "recover", "args", "doctor"}
    assert listed <= SCHEMA["$defs"].keys()
    assert 'additionalProperties": true' not in json.dumps(SCHEMA)
