"""--affect, --config, and the command that needs no VM."""

from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import DomainConfig, VcpuMap
from qmpvcpu.cli import main
from qmpvcpu.domainxml import Metadata, render
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import Ran, run
from tests.cli.schema import command_of
from tests.controller.test_next_boot import died_writing
from tests.domainxml.domains import document, domain_of_rows, said
from tests.domainxml.examples import layout_of
from tests.record.conftest import listing
from tests.record.test_config import XML

WITHOUT_A_VM = [
    ("--set 0,2-3", "0-++", "vCPU 1: on -> off"),
    ("--set 0-1", "00--", "unchanged"),
    ("--count 3", "000-", "vCPU 2: off -> on"),
    ("--count 4 --hotpluggable", "00++", "vCPU 2-3: off -> on, hotpluggable"),
    ("--enable 3", "00-+", "vCPU 3: off -> on, hotpluggable"),
    ("--enable 3 --enable 2", "00++", "vCPU 2-3: off -> on, hotpluggable"),
    ("--enable 2-3", "00++", "vCPU 2-3: off -> on, hotpluggable"),
    ("--disable 1", "0---", "vCPU 1: on -> off"),
    ("--max 6", "00----", "room for 4 -> 6 vCPUs"),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The document of a VM that is started with vCPUs 0 and 1."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "vm.xml").write_text(XML)
    return folder / "vm.xml"


class Here:
    """The command line, run in this process: for what needs neither a VM nor signals."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *words: str | Path) -> Ran:
        code = main([str(each) for each in words])
        spoken = self._capsys.readouterr()
        return Ran(code, spoken.out, spoken.err, command_of(words))

    def shown(self, config: Path) -> str:
        """What the command shows of the document, in the characters of ``domain_of_rows``."""
        ran = self.run("config", config, "--json")
        assert ran.code == 0
        assert listing(config.parent) == ["vm.xml"]
        rows = ran.document["vcpus"]
        assert ran.document["max"] == len(rows)
        return "".join("-" if not row["enabled"] else "+" if row["hotpluggable"] else "0" for row in rows)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.delenv("QMPVCPU_QMP", raising=False)
    return Here(capsys)


async def shown(config: Path) -> str:
    """What the document says, in the characters of ``domain_of_rows``."""
    assert listing(config.parent) == ["vm.xml"]
    return said((await DomainConfig.load(config)).domain)


@pytest.mark.parametrize(("words", "after", "told"), WITHOUT_A_VM)
def test_a_next_boot_is_changed_without_a_vm(here: Here, config: Path, words: str, after: str, told: str) -> None:
    assert here.shown(config) == "00--"
    ran = here.run("config", config, *words.split())
    assert (ran.code, ran.err) == (0, "")
    assert told in ran.out
    assert ran.out.startswith("vm  next boot: ")
    assert here.shown(config) == after
    again = here.run("config", config, *words.split(), "--json")
    assert again.code == 0
    assert again.document["config"]["outcome"] == "unchanged"
    assert again.document["changes"] == []
    assert "<!-- kept by hand -->" in config.read_text()


def test_the_next_boot_is_shown_and_nothing_is_written(here: Here, config: Path) -> None:
    ran = here.run("config", config)
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "vm  next boot: 2 of 4 vCPUs: 0-1"
    rows = [" ".join(line.split()) for line in ran.out.splitlines()[3:]]
    assert rows == ["0-1 on anywhere", "2 off anywhere", "3 off host CPUs 1"]
    document = here.run("config", config, "--json").document
    assert {"config", "changes", "affect"}.isdisjoint(document)
    assert document["vcpus"][1] == {"id": 1, "enabled": True, "hotpluggable": False, "order": None}
    assert config.read_text() == XML


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("--set 1", 2, "vCPU 0 boots the VM"),
        ("--set 0,9", 2, "the document has vCPUs 0 to 3"),
        ("--set 0-", 2, "is not a set of vCPU ids"),
        ("--count 0", 2, "the document has 1 to 4 vCPUs"),
        ("--disable 0", 2, "unplug of vCPU 0 at the next boot denied, nothing was changed"),
        ("--enable 3,9", 2, "the document has vCPUs 0 to 3"),
        ("--enable x", 2, "is not a set of vCPU ids"),
        ("--disable 1 --disable 0", 2, "vCPU 0 boots the VM"),
        ("--enable 3 --disable 1", 2, "--enable and --disable: one change at a time"),
        ("--max 0", 2, "1 to 16384 vCPUs"),
        ("--max 300", 2, "255"),
        ("--set 0 --count 1", 2, "--set and --count: one change at a time"),
        ("--hotpluggable", 2, "--hotpluggable goes with --count"),
    ],
)
def test_what_cannot_be_is_denied_and_the_document_stays(
    here: Here, config: Path, words: str, code: int, told: str
) -> None:
    ran = here.run("config", config, *words.split())
    assert ran.code == code
    assert told in ran.err
    assert config.read_text() == XML
    document = here.run("config", config, *words.split(), "--json").document
    assert told in document["error"]["message"]
    assert document["error"]["outcome"] == "unchanged"
    assert listing(config.parent) == ["vm.xml"]


def test_a_document_that_cannot_be_read_has_its_own_exit_code(here: Here, config: Path) -> None:
    ran = here.run("config", config.with_name("none.xml"))
    assert ran.code == 4
    assert "there is no such file" in ran.err
    config.write_text("<domain")
    ran = here.run("config", config, "--count", "1")
    assert ran.code == 2
    assert "not well-formed" in ran.err


@pytest.mark.parametrize(
    ("words", "after"),
    [("plug 3", "00-+"), ("plug", "00+-"), ("unplug 1", "0---"), ("set 0,3", "0--+"), ("count 3", "000-")],
)
def test_the_commands_change_the_next_boot_without_a_vm_too(here: Here, config: Path, words: str, after: str) -> None:
    ran = here.run(*words.split(), "--affect", "config", "--config", config, "--json")
    assert ran.code == 0
    assert ran.document["affect"] == "config"
    assert ran.document["config"]["outcome"] == "written"
    assert here.shown(config) == after


@pytest.mark.parametrize("command", ["plug 3", "unplug 3", "set 0,3", "count 3"])
@pytest.mark.parametrize("affect", ["config", "both"])
def test_what_keeps_the_next_boot_must_be_named(
    command: str, affect: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--affect", affect, "--qmp", "/nonexistent"]) == 2
    told = capsys.readouterr().err
    assert f"--affect {affect}: what keeps the next boot?" in told
    assert "--config PATH" in told


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("words", "after"),
    [("plug 3", "00-+----"), ("unplug 1", "0-------"), ("set 0,2-3", "0-++----"), ("count 3", "000-----")],
)
async def test_both_are_changed(guest: MicroGuest, config: Path, words: str, after: str) -> None:
    async with qmpvcpu.attach(guest.qmp) as vm:
        name = vm.layout.vm.name
    config.write_bytes(document(domain_of_rows("00------", name=name)))
    ran = await run(*words.split(), "--affect", "both", "--config", config, "--qmp", guest.qmp, "--json")
    assert ran.code == 0, ran
    assert ran.document["affect"] == "both"
    assert await shown(config) == after
    assert ran.document["enabled"] == str(domain_of_rows(after).enabled)
    so = await run(
        "set", str(domain_of_rows(after).enabled), "--affect", "both", "--config", config, "--qmp", guest.qmp
    )
    assert so.code == 0
    assert "REACHED" in so.out
    assert "UNCHANGED" in so.out


@pytest.mark.qemu
async def test_a_guest_that_refuses_is_told_of_and_the_next_boot_stays(config: Path) -> None:
    async with MicroGuest(boot=2, behaviour=Behaviour.refusing(0x82)) as guest:
        async with qmpvcpu.attach(guest.qmp) as vm:
            name = vm.layout.vm.name
        xml = document(domain_of_rows("00------", name=name))
        config.write_bytes(xml)
        both = ("--affect", "both", "--config", config, "--qmp", guest.qmp)
        ran = await run("set", "0", *both, "--json")
        assert ran.code == 1
        assert ran.document["live"] == ran.document["outcome"] == "partial"
        assert ran.document["config"]["outcome"] == "not_tried"
        ran = await run("unplug", "1", *both, "--json")
        assert ran.code == 1
        assert ran.document["steps"][0]["verdict"]["kind"] == "refused"
        ran = await run("set", "0", *both)
        assert "next boot 0-1 to 0: NOT_TRIED: the running VM is not as requested" in ran.out
        assert config.read_bytes() == xml
        link = config.with_name("link.xml")
        link.symlink_to(config)
        ran = await run("plug", "3", "--affect", "both", "--config", link, "--qmp", guest.qmp)
        assert ran.code == 4
        assert "a symlink" in ran.err


@pytest.mark.qemu
async def test_a_record_keeps_the_next_boot_for_the_next_program(guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "record" / "vm.xml"
    record.parent.mkdir()
    ran = await run("plug", "2", "--affect", "both", "--record", record, "--qmp", guest.qmp, "--json")
    assert ran.code == 0, ran
    ran = await run("set", "0-3", "--affect", "config", "--record", record)
    assert ran.code == 0
    assert "0-3" in ran.out
    assert await shown(record) == "00cd----"
    assert (await run("list", "--qmp", guest.qmp, "--record", record, "--json")).document["enabled"] == "0-2"
    assert await shown(record) == "00cd----"
    ran = await run("config", record, "--max", "4")
    assert ran.code == 2
    assert "a record's maximum is that of the running VM" in ran.err


@pytest.mark.qemu
@pytest.mark.parametrize("placed", [False, True])
async def test_what_was_cut_short_before_the_next_boot_was_written_is_finished(
    guest: MicroGuest, config: Path, tmp_path: Path, *, placed: bool
) -> None:
    config.write_bytes(document(domain_of_rows("00------")))
    record = tmp_path / "record.xml"
    placement = ", placement=qmpvcpu.Placement.pinned({2: '0'})" if placed else ""
    await died_writing(guest, record, config, f"vm.set_map('0-2', affect=Affect.BOTH{placement})")
    where = ("--qmp", guest.qmp, "--record", record)
    async with qmpvcpu.attach(guest.qmp) as vm:
        name = vm.layout.vm.name
    assert name != "vm"
    for document_of in (config, record):
        text = document_of.read_text()
        document_of.write_text(text.replace("<name>vm</name>", f"<name>{name}</name>"))
    ran = await run("recover", *where)
    assert ran.code == 2
    assert f"--config {config}" in ran.err
    assert "then at the next boot: 0-2" in ran.out
    assert ("at the next boot: 0-2, with another placement" in ran.out) is placed
    ran = await run("recover", *where, "--json")
    assert ran.code == 2
    assert ran.document["interrupted"]["next_boot"] == "0-2"
    ran = await run("recover", *where, "--config", config)
    assert ran.code == 1
    assert "then at the next boot: 0-2" in ran.out
    assert "NOT_TRIED: not done" in ran.out
    ran = await run("recover", "--finish", *where, "--config", config, "--json")
    assert ran.code == 0
    assert ran.document["config"]["outcome"] == "written"
    assert ran.document["interrupted"]["next_boot"] == "0-2"
    assert await shown(config) == "00+-----"
    assert ("<vcpupin vcpu='2' cpuset='0'/>" in config.read_text()) is placed


@pytest.mark.qemu
async def test_a_plan_tells_what_would_become_of_the_next_boot_and_writes_nothing(
    guest: MicroGuest, tmp_path: Path
) -> None:
    xml = tmp_path / "vm.xml"
    assert (await run("xml", "-o", xml, "--qmp", guest.qmp)).code == 0
    before = xml.read_bytes()
    alone = await run("plan", "0,3", "--affect", "config", "--config", xml, "--json")
    assert (alone.code, alone.document["enabled"], alone.document["config"]["outcome"]) == (0, "0,3", "not_tried")
    both = ("plan", "0,3", "--affect", "both", "--config", xml, "--qmp", guest.qmp)
    planned = await run(*both, "--json")
    assert [step["action"] for step in planned.document["steps"]] == ["plug", "unplug"]
    assert planned.document["changes"] == ["vCPU 1: on -> off", "vCPU 3: off -> on, hotpluggable"]
    shown = await run(*both)
    assert f"not written: {xml}" in shown.out
    assert xml.read_bytes() == before


@pytest.mark.parametrize("change", ["--count 3", "--count 4 --hotpluggable", "--set 0,3", "--enable 1"])
def test_the_next_boot_in_a_record_is_shown_as_it_was_written_and_started_from(
    here: Here, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    record = folder / "vm.xml"
    record.write_bytes(render(layout_of(4, [0, 2], boot=1), metadata=Metadata(generation=1)))
    written = here.run("config", record, *change.split(), "--json")
    looked = here.run("config", record, "--json")
    assert (written.code, looked.code) == (0, 0)
    assert written.document["vcpus"] == looked.document["vcpus"]
    enabled = VcpuMap.parse(written.document["enabled"])
    args = here.run("args", record, "--json").document
    assert "1,maxcpus=4" in args["argv"][args["argv"].index("-smp") + 1]
    assert {device["id"] for device in args["device_add"]} == {f"vcpu{each}" for each in enabled - {0}}


def test_an_error_about_a_document_does_not_call_it_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "/nonexistent/vm.xml"]) == 4
    assert capsys.readouterr().err == "qmpvcpu: /nonexistent/vm.xml: there is no such file\n"
