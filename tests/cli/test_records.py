"""What commands do to a record: those that only look leave no trace, and none goes by a socket's file name."""

import os
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.domainxml import parse
from qmpvcpu.launch import arguments
from qmpvcpu.testing import MicroGuest, QemuProcess, best_qemu, rom_image
from tests.cli.running import run

pytestmark = pytest.mark.qemu

# With which exit codes they end while a removal is pending, and a record is there.
LOOKING = {
    "list": 0,
    "plan 0-3": 0,
    "plan 0-3 --affect both": 0,
    "xml": 0,
    "watch --for 0.1": 0,
    "stats --interval 0.05 --count 1": 0,
    "export": 0,
    "check-target STATE": 1,
    "fleet list": 0,
}


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in folder.iterdir()}


@pytest.mark.parametrize("line", LOOKING)
async def test_a_command_that_only_looks_neither_writes_nor_locks_a_record(
    guest: MicroGuest, tmp_path: Path, line: str
) -> None:
    folder, state = tmp_path / "records", tmp_path / "state.json"
    folder.mkdir()
    # As the fleet names it.
    record = folder / f"{str(guest.qmp).strip('/').replace('/', '-')}.xml"
    words = line.replace("STATE", str(state)).split()
    where = folder if words[0] == "fleet" else record
    assert (await run("export", "-o", state, "--qmp", guest.qmp)).code == 0
    if "both" not in words:
        assert (await run(*words, "--record", where, "--qmp", guest.qmp)).code == LOOKING[line]
        assert state_of(folder) == {}
    async with qmpvcpu.attach(guest.sockets[1], record=record) as vm:
        await vm.plug(3)
        await vm.wait_for(lambda layout: layout[3].acknowledged, timeout=10)  # which is written too
    async with qmpvcpu.attach(guest.sockets[1], record=record):  # it is locked
        before = state_of(folder)
        folder.chmod(0o555)
        ran = await run(*words, "--record", where, "--qmp", guest.qmp)
        folder.chmod(0o755)
        assert ran.code == LOOKING[line], ran.err
        assert state_of(folder) == before


async def test_another_vms_record_is_not_even_read_for_it(guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest() as other:
        async with qmpvcpu.attach(other.qmp, record=record) as vm:
            await vm.plug(1)
        ran = await run("list", "--record", record, "--qmp", guest.qmp, "--json")
    assert ran.code == 4
    assert "neither a uuid nor a name" in ran.error["message"]


async def test_a_nameless_vm_has_its_record_under_the_name_that_it_is_called(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    for code, more in ((0, ()), (4, ()), (4, ("--name", "other")), (0, ("--name", "web"))):
        async with MicroGuest() as guest:
            named = ("--name", "web") if not record.exists() else more
            ran = await run("plug", "1", "--record", record, "--qmp", guest.qmp, "--json", *named)
            assert ran.code == code
    assert "<name>web</name>" in record.read_text()
    async with MicroGuest() as guest:  # it is taken before the command, too
        assert (await run("--name", "web", "list", "--record", record, "--qmp", guest.qmp)).code == 0


async def test_a_record_may_begin_as_the_document_of_the_vm(tmp_path: Path) -> None:
    record, base = tmp_path / "vm.xml", tmp_path / "base.xml"
    async with MicroGuest(extra_args=("-name", "web")) as guest:
        base.write_text((await run("xml", "--qmp", guest.qmp)).out.replace("<name>", "<!-- mine --><name>"))
        words = ("--base", base, "--qmp", guest.qmp, "--json")
        for command in ("plug 1", "unplug 1", "set 0-1", "count 2"):
            ran = await run(*command.split(), *words)
            assert (ran.code, ran.error["kind"]) == (2, "BadUsageError")
            assert "--record PATH" in ran.error["message"]
        nowhere = await run("set", "0-1", "--affect", "config", "--record", record, *words)
        assert nowhere.code == 2
        assert (await run("set", "0-1", "--record", record, *words)).code == 0
    assert "<!-- mine -->" in record.read_text()


@pytest.mark.parametrize("kind", ["document", "export", "record"])
async def test_replay_plugs_what_a_vm_had_into_a_qemu_that_is_stopped(tmp_path: Path, kind: str) -> None:
    record, source = tmp_path / "vm.xml", tmp_path / "source"
    who = ("-name", "web")
    async with MicroGuest(extra_args=who) as guest:
        for vcpu in ("5", "2"):
            assert (await run("plug", vcpu, "--record", record, "--qmp", guest.qmp)).code == 0
        running = await run("replay", record, "--qmp", guest.qmp, "--json")
        assert (running.code, running.error["kind"]) == (2, "ReplayMismatchError")
        source.write_text((await run("export" if kind == "export" else "xml", "--qmp", guest.qmp)).out)
    words = ("replay", "--record", record) if kind == "record" else ("replay", source)
    machine = ("-machine", "q35", "-accel", "tcg", "-m", "16", "-bios", "microguest.rom", *who)
    argv = arguments(parse(record.read_bytes())).boot_argv
    async with QemuProcess(best_qemu(), [*machine, *argv, "-S"], files={"microguest.rom": rom_image()}) as qemu:
        for steps in (["5", "2"], []):
            ran = await run(*words, "--qmp", qemu.qmp, "--json")
            if steps or kind != "record":
                assert ran.code == 0
                assert [each["ids"] for each in ran.document["steps"]] == steps
            else:  # nothing is kept any more
                assert (ran.code, ran.error["kind"]) == (2, "ReplayMismatchError")
        listed = (await run("list", "--qmp", qemu.qmp, "--json")).document["vcpus"]
    assert [each["order"] for each in listed] == [1, None, 3, None, None, 2, None, None]


async def test_replay_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "vm.xml").write_text("<domain/>")
    ran = await run("replay", "--qmp", "/nonexistent")
    assert ran.code == 2
    assert "--record" in ran.err
    async with MicroGuest() as guest:
        ran = await run("replay", tmp_path / "vm.xml", "--qmp", guest.qmp, "--json")
    assert ran.code == 2
    assert str(tmp_path / "vm.xml") in ran.error["message"]


async def test_a_record_is_not_renamed_against_the_name_of_its_qemu(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(extra_args=("-name", "web")) as guest:
        words = ("plug", "1", "--record", record, "--qmp", guest.qmp, "--json")
        ran = await run(*words, "--name", "db")
        assert ran.code == 4
        assert 'the name "web" for this VM, not "db"' in ran.error["message"]
        assert not record.exists()
        assert (await run(*words, "--name", "web")).code == 0


async def test_the_next_boot_of_a_record_goes_before_what_an_earlier_qemu_had(tmp_path: Path) -> None:
    record = tmp_path / "a vm.xml"
    who = ("-name", "web")
    async with MicroGuest(extra_args=who) as guest:
        assert (await run("plug", "5", "--record", record, "--qmp", guest.qmp)).code == 0
        assert (await run("config", record, "--set", "0-3")).code == 0
    async with MicroGuest(extra_args=who) as guest:
        ran = await run("recover", "--record", record, "--qmp", guest.qmp)
    assert f"its next boot is to have 0-3, which is what qmpvcpu args '{record}' prints" in ran.out
    assert "to start one that has" not in ran.out


async def test_what_an_earlier_qemu_had_is_told_until_it_is_there_or_dropped(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    who = ("-name", "web")
    async with MicroGuest(extra_args=who) as guest:
        for vcpu in ("5", "2"):
            assert (await run("plug", vcpu, "--record", record, "--qmp", guest.qmp)).code == 0
    machine = ("-machine", "q35", "-accel", "tcg", "-m", "16", "-bios", "microguest.rom", *who)
    built = arguments(parse(record.read_bytes()))
    async with QemuProcess(
        best_qemu(), [*machine, *built.boot_argv, "-S"], files={"microguest.rom": rom_image()}
    ) as qemu:
        before = record.read_bytes()
        for _ in range(2):
            ran = await run("recover", "--record", record, "--qmp", qemu.qmp, "--json")
            assert ran.code == 0
            previous = ran.document["previous"]
            assert (previous["max"], previous["started_with"], previous["order"]) == (8, "0", [0, 5, 2])
            assert record.read_bytes() == before
            said = await run("recover", "--record", record, "--qmp", qemu.qmp)
            assert "had vCPUs 0,2,5, created as 0,5,2; this one has not" in said.out
            # Once somebody has attached to keep it, it is there all the same.
            async with qmpvcpu.attach(qemu.qmp, record=record):
                before = record.read_bytes()
        argv = (await run("args", record)).out
        assert argv.index("id=vcpu5") < argv.index("id=vcpu2")
        ran = await run("recover", "--drop-previous", "--record", record, "--qmp", qemu.qmp, "--json")
        assert (ran.code, ran.document["previous"]) == (0, None)
        ran = await run("recover", "--record", record, "--qmp", qemu.qmp, "--json")
        assert ran.document["previous"] is None
        assert "vcpu5" not in (await run("args", record)).out
    ran = await run("recover", "--drop-previous", "--finish", "--record", record, "--qmp", os.devnull)
    assert ran.code == 2
    assert "one of them" in ran.err
