"""The tables of the pages are those of the code, of the recordings' machines, and of libvirt's own commands."""

import ast
import logging
import re
import subprocess
import tomllib
from dataclasses import replace
from itertools import pairwise

import pytest

import qmpvcpu
from qmpvcpu.domainxml import record_element
from qmpvcpu.model import verdicts
from qmpvcpu.model.vm import KnownFault, VmInfo
from qmpvcpu.testing import MicroGuest
from tests.docs.blocks import ROOT, block, syntax_tree

CALLS = [
    *(
        "virDomainSetVcpus",
        "virDomainSetVcpusFlags",
        "virDomainSetVcpu",
        "virDomainGetVcpus",
        "virDomainGetVcpusFlags",
    ),
    *("virDomainGetMaxVcpus", "virDomainGetVcpuPinInfo", "virDomainPinVcpu", "virDomainPinVcpuFlags"),
    *("virDomainGetEmulatorPinInfo", "virDomainPinEmulator", "virDomainGetGuestVcpus", "virDomainSetGuestVcpus"),
    *("virDomainGetCPUStats", "virConnectGetMaxVcpus", "virConnectGetAllDomainStats"),
]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows(text: str, width: int) -> list[list[str]]:
    """The rows of all tables of so many columns."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if len(row) == width]


def test_the_known_faults_are_those_of_each_qemu() -> None:
    (header,) = [row for row in rows(page("qemu-versions.md"), 7) if row[0] == "fault"]
    faults = []
    for version in header[2:]:
        major, minor, micro = map(int, version.split("."))
        q35 = VmInfo("vm", "x86_64", "q35", "tcg", (major, minor, micro))
        pseries = replace(q35, arch="ppc64", machine="pseries")
        faults.append(replace(q35, smm_firmware=True).known_faults | pseries.known_faults)
    expected = [
        [f"`{fault.name}`", fault.value, *("yes" if fault in known else "" for known in faults)]
        for fault in KnownFault
    ]
    shown = [row for row in rows(page("qemu-versions.md"), 7) if row[0].startswith("`TCG")]
    assert shown == expected


def defined(module: str) -> set[str]:
    """The names of functions, classes and variables that *module*, a path below qmpvcpu/, defines."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "qmpvcpu" / module).read_text())):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
    return found


def test_what_answers_a_question_about_the_design_is_where_the_page_says() -> None:
    named = []
    for _, answer in rows(page("design.md"), 2):
        for module, names in re.findall(r"`([a-z_]+/[a-z_]+\.py)`:((?: `\w+`,?)+)", answer):
            missing = set(re.findall(r"`(\w+)`", names)) - defined(module)
            assert not missing, f"{module} does not define {missing}"
            named.append(module)
    assert len(named) > 12


def test_the_reasons_of_a_refusal_are_those_that_are_told() -> None:
    shown = {row[0]: row[1] for row in rows(page("evidence.md"), 2) if row[0].startswith("0x")}
    assert {int(code, 16) for code in shown} == set(verdicts.EJECTION_REASONS)
    for code, reason in verdicts.EJECTION_REASONS.items():
        assert shown[f"0x{code:02x}"].startswith(reason)


def test_every_element_and_attribute_of_a_record_is_explained_and_shown() -> None:
    text = page("record-format.md")
    element, told = "", set()
    for first, second, _ in rows(text, 3):
        element = found[0] if (found := re.findall(r"^`([\w-]+)`", first)) else element
        told |= {(element, attribute) for attribute in re.findall(r"`([\w-]+)`", second)}
    known = {(way.rpartition("/")[2], name) for way, names in record_element._KNOWN.items() for name in names}
    assert told == known
    example = block("docs/record-format.md", "a record with everything in it").text
    assert [name for _, name in known if f' {name}="' not in example] == ["made-up-uuid"]
    identity = qmpvcpu.domainxml.read_identity(example.encode())
    assert identity.metadata is not None
    assert identity.metadata.intent is not None
    assert str(identity.metadata.intent.target) == "0,2-5"


def logged() -> set[tuple[str, str]]:
    """(level, field) of every call of a logger in the package; a level without fields has the field ""."""
    found = set()
    for path in (ROOT / "qmpvcpu").rglob("*.py"):
        for node in ast.walk(syntax_tree(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name("_log" | "_LOGGER"), attr=str(level)), keywords=given
                ):
                    extra = [each.value for each in given if each.arg == "extra"]
                    fields = re.findall(r"'(\w+)':", ast.unparse(extra[0])) if extra else []
                    found |= {(level, field) for field in fields or [""]}
    return found - {("isEnabledFor", ""), ("log", "")}  # of the latter the level is decided as it runs


def test_every_field_of_a_log_record_is_explained() -> None:
    text = page("logging.md")
    told = {row[0].strip("`") for row in rows(text, 2)} - {"field", "---"}
    fields = {field for _, field in logged()} - {""}
    assert fields <= told
    assert told == {"vm", "event", "direction", "qmp"}
    levels = {"ERROR" if level == "exception" else level.upper() for level, _ in logged()}
    assert levels == {row[1] for row in rows(text, 4)} - {"level", "---"}


@pytest.mark.qemu
async def test_events_are_logged_as_data(caplog: pytest.LogCaptureFixture) -> None:
    module = block("docs/logging.md", "each event as one line of JSON").module()
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    logger, handler = logging.getLogger("qmpvcpu.vm"), Kept()
    before = logger.level
    try:
        module.tell_events(handler)
        async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp, name="vm") as vm:
            await vm.plug(3)
            await vm.unplug(3)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert '{"vm": "vm", "text": ' in lines[0]
    assert [line for line in lines if line.endswith('"event": "VcpuUnplugged"}')]
    assert {record.name for record in caplog.records} == {"qmpvcpu.vm"}


def test_every_call_of_libvirts_has_an_answer() -> None:
    told = {row[0] for row in rows(page("libvirt-calls.md"), 2)}
    assert [call for call in CALLS if f"`{call}`" not in told] == []
    assert [row for row in rows(page("libvirt-calls.md"), 2) if not row[1]] == []


@pytest.mark.libvirt
def test_every_command_of_virsh_that_is_about_vcpus_has_an_answer() -> None:
    helped = subprocess.run(["virsh", "help"], capture_output=True, text=True, check=True).stdout
    commands = set(re.findall(r"^    (\S+) ", helped, re.MULTILINE))
    about = {name for name in commands if "cpu" in name} | {
        "emulatorpin",
        "schedinfo",
        "domstats",
        "event",
        "dumpxml",
    }
    section = page("libvirt-calls.md").partition("## Commands")[2]
    told = {name for row in rows(section, 2) for name in re.findall(r"`([\w-]+)`", row[0])}
    assert about <= commands
    assert about - told == set()
    for command in ("setvcpus", "setvcpu", "vcpucount"):
        options = subprocess.run(["virsh", "help", command], capture_output=True, text=True, check=True).stdout
        (row,) = [row for row in rows(section, 2) if row[0] == f"`{command}`"]
        named = set(re.findall(r"^    (--[a-z]+) ", options, re.MULTILINE))
        assert named - set(re.findall(r"--[a-z]+", row[1])) == set()


def test_every_error_and_reason_is_on_the_errors_page() -> None:
    text = page("errors.md")
    abstract = {"QmpVcpuError", "PlanError", "MonitorError", "StepError"}
    errors = {name for name in qmpvcpu.__all__ if name.endswith("Error")} - abstract
    assert [name for name in sorted(errors) if f"`{name}`" not in text] == []
    assert [reason.name for reason in qmpvcpu.DenialReason if f"`{reason.name}`" not in text] == []


def test_every_dependency_is_named_with_its_reason() -> None:
    text = page("dependencies.md")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    specs = [
        *project["dependencies"],
        *(spec for extra in project["optional-dependencies"].values() for spec in extra),
    ]
    named = {re.split(r"[\[<>=]", spec)[0] for spec in specs}
    assert len(named) > 10
    assert [name for name in sorted(named) if f"`{name}`" not in text] == []


def test_the_floors_are_those_that_the_layers_keep() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    kept = [set(layer.split(" | ")) for layer in layers]
    floors: dict[str, set[str]] = {}
    for floor, modules, _ in rows(page("design.md"), 3):
        if floor.isdigit():
            floors.setdefault(floor, set()).update(re.findall(r"`(\w+)/?`", modules))
    place = {name: number for number, names in enumerate(kept) for name in names}
    assert set(place) == set().union(*floors.values())
    for higher, lower in pairwise(sorted(floors, reverse=True)):
        assert max(place[name] for name in floors[higher]) < min(place[name] for name in floors[lower])


def test_the_checks_that_are_named_are_what_ci_runs() -> None:
    (everything,) = block("docs/CONTRIBUTING.md", "what CI runs").lines
    assert everything.removeprefix("bash ") in (ROOT / ".ci" / "run").read_text()
    run = (ROOT / "tests" / "run.sh").read_text().replace('"$bin/', "").replace('"', "")
    checks = block("docs/CONTRIBUTING.md", "the single checks").lines
    assert [check for check in checks if check not in run] == []
    assert len(re.findall(r"^check [a-z]", run, re.MULTILINE)) == len(checks)


def test_every_page_is_in_the_index() -> None:
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    listed = set(re.findall(r"\]\(([\w/-]+\.md)\)", page("index.md") + page("reference.md")))
    assert pages - listed == set()
