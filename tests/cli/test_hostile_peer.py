"""What a peer, a file's author or another user of the host calls things never reaches a terminal as it is."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

from qmpvcpu import Layout, Slot
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.model.layout import CpuProps
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.testing import ScriptedPeer
from tests.cli.running import on_terminal, run, running, said
from tests.hostile import HOSTILE, hostile_vm, impossible_vms, small_vm

COMMANDS = [
    "list",
    "plan 0-1",
    "plan 0-2",
    "plug 2",
    "unplug 1",
    "set 0,2",
    "set 0,2 --on-failure continue",
    "count 1",
    "count 3 --on-failure revert",
    "recover --record {folder}/vm.xml",
    "xml",
    "watch --for 0",
    "stats --interval 0.05 --count 1",
    "export",
    "check-target {folder}/state.json",
    "confirm-target --timeout 0 {folder}/state.json",
    "take-back --destination-is-gone",
    "fleet list --dir {folder}/vms",
    "fleet set 0,2 --dir {folder}/vms",
    "check-target {folder}/no-state.json",
    "config {folder}/base.xml",
    "config {folder}/base.xml --count 2",
    "args {folder}/base.xml",
    "args {folder}/no-base.xml",
    "xml --base {folder}/base.xml -o {folder}/vm\x1b]0;owned\x07\nFORGED.xml",
    "list --record {folder}/\x1b]0;owned\x07\nFORGED.xml",
    "list --frob\x1b]0;owned\x07\nFORGED",
]
# What rich itself sends a terminal: colours, and the moves of a live table.
_OF_RICH = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|[0-9]*[AK]|2K)|\r\n|\r")


def printed(text: str) -> None:
    """Make sure that *text* has nothing but printable lines, of which none is forged."""
    for line in text.split("\n"):
        bad = {each for each in line if not each.isprintable()}
        assert not bad, f"{[unicodedata.category(each) for each in bad]} in {line!r}"
        assert not re.match(r"\W*FORGED", line)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files whose author means harm."""
    vm = VmInfo(HOSTILE, "x86_64", "pc", "tcg", (10, 0, 2), package=HOSTILE)
    boot = Slot(0, 1, "qemu64-x86_64-cpu", CpuProps({"core-id": 0}), 0, "/machine/unattached/device[0]", (1,))
    (tmp_path / "state.json").write_text(json.dumps(ExportedState(Layout(vm, (boot,), (0,))).to_json()))
    (tmp_path / "no-state.json").write_text(json.dumps({HOSTILE: HOSTILE, "schema": HOSTILE}))
    name = "&#x9b;31m&#10;FORGED&#x202e;cod&#x85;FORGED&#x7f;"
    for file, word in (("base.xml", "pc"), ("no-base.xml", name)):
        (tmp_path / file).write_text(
            f"<domain type='kvm'><name>{name}</name><memory>1024</memory><vcpu current='1'>3</vcpu>"
            f"<os><type arch='x86_64' machine='{word}'>hvm</type></os>"
            f"<cpu mode='custom'><model>{word}</model><feature name='{word}'/></cpu></domain>"
        )
    (tmp_path / "vms").mkdir()
    return tmp_path


def reach(peer: ScriptedPeer, folder: Path) -> None:
    """Have *peer* under a name that another user gave its socket."""
    socket = folder / "vms" / "\x1b]0;owned\x07\nFORGED\udcff.sock"
    socket.unlink(missing_ok=True)
    socket.symlink_to(peer.path)


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.encode("unicode_escape").decode())
async def test_every_command_prints_lines_of_its_own_and_no_control(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.format(folder=folder).split(" ")
    vms = [hostile_vm(), *(impossible_vms() if line in ("list", "doctor", "fleet list --dir {folder}/vms") else [])]
    for vm in vms:
        async with vm as peer:
            reach(peer, folder)
            address = [] if words[0] in ("fleet", "config", "args") else ["--qmp", peer.address]
            ran = await said(capsys, *words, *address)
            assert ran.out or ran.err
            told = await said(capsys, *words, "--json", *address)
            assert json.loads(told.out.splitlines()[-1])["schema"] == "qmpvcpu/1"
        for text in (ran.out, ran.err, told.out, told.err):
            printed(text)


@pytest.mark.parametrize(
    "line", ["list", "set 0,2", "watch --for 0.3", "stats --interval 0.05 --count 2", "fleet list --dir {folder}/vms"]
)
async def test_a_terminal_gets_no_control_but_those_of_its_table(line: str, folder: Path) -> None:
    words = line.format(folder=folder).split(" ")
    async with hostile_vm() as peer:
        reach(peer, folder)
        address = [] if words[0] == "fleet" else ["--qmp", peer.address]
        async with on_terminal(*words, *address, columns=200, lines=60) as it:
            await it.end()
    shown = it.raw.decode()
    assert "FORGED" in shown
    printed(_OF_RICH.sub("\n", shown).replace("\n\n", "\n"))


async def test_a_document_is_exact_in_a_file_and_printable_on_a_terminal(tmp_path: Path) -> None:
    base = "<domain type='kvm'>\r\n\t<name>\u202eö\x9b31m</name>\t<memory>1024</memory>\n<vcpu>4</vcpu></domain>"
    (tmp_path / "base.xml").write_bytes(base.encode())
    async with small_vm() as peer:
        words = ("xml", "--base", tmp_path / "base.xml", "--qmp", peer.address)
        wrote = await run(*words, "-o", tmp_path / "out.xml")
        ran = await run(*words)
        async with on_terminal(*words) as it:
            assert await it.end() == 0
    assert (wrote.code, ran.code) == (0, 0)
    out = (tmp_path / "out.xml").read_bytes().decode()
    assert out.startswith("<domain type='kvm'>\r\n\t<name>\u202eö\x9b31m</name>\t<memory>1024</memory>\n")
    assert ran.out == out + "\n"
    assert r"<name>\u202eö\x9b31m</name>" in it.raw.decode()


async def test_the_exchange_is_printed_in_lines() -> None:
    async with hostile_vm() as peer:
        ran = await run("plug", "2", "--verbose", "--qmp", peer.address)
    assert "received" in ran.err
    printed(ran.err)


async def test_json_has_what_was_said_to_the_letter() -> None:
    async with hostile_vm() as peer:
        ran = await run("export", "--json", "--qmp", peer.address)
    assert ran.document["export"]["layout"]["vm"]["name"] == HOSTILE


async def test_what_happens_is_told_in_printable_words() -> None:
    async with hostile_vm() as peer, running("watch", "--qmp", peer.address) as it:
        assert it.process.stdout is not None
        line = (await it.process.stdout.readline()).decode()
        assert "FORGED too" in line
        printed(line)
        await peer.send(b"\x1b]0;owned\x07 \xe2\x80\xae\r\n")
        ran = await it.end()
    assert ran.code == 3
    assert "the QMP connection is lost" in ran.out
    printed(ran.out)
    printed(ran.err)


async def test_markup_in_a_name_is_a_name() -> None:
    async with small_vm(query_name={"name": "[bold red]vm[/] [link=http://x]y"}) as peer:
        ran = await run("list", "--qmp", peer.address)
    assert "[bold red]vm[/] [link=http://x]y (" in ran.out
