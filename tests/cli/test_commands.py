import signal
from pathlib import Path

import click
import pytest

from qmpvcpu.cli.app import program
from qmpvcpu.cli.failures import failure
from qmpvcpu.cli.plug import by_slots
from qmpvcpu.cli.run import Options, Shell
from qmpvcpu.cli.wording import in_options
from qmpvcpu.domainxml import read_identity
from qmpvcpu.errors import DenialReason, StepDeniedError
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import Failure
from tests.cli.running import environment, run, running
from tests.hostile import small_vm
from tests.layouts import layout

pytestmark = pytest.mark.qemu


async def test_list_shows_people_every_vcpu_with_its_place_and_path(guest: MicroGuest) -> None:
    shown = await run("list", "--qmp", guest.qmp)
    assert shown.code == 0
    for word in ("id", "state", "order", "socket/", "core/", "thread", "device id", "QOM path", "host tid"):
        assert word in shown.out
    assert "2 of 8 vCPUs plugged: 0-1" in shown.out
    assert "/machine/unattached/device[0]" in shown.out
    assert shown.out.count("free") == 6
    assert shown.err == ""


async def test_list_gives_programs_one_document_with_the_promised_names(guest: MicroGuest) -> None:
    document = (await run("list", "--qmp", guest.qmp, "--json")).document
    assert (document["max"], document["enabled"], document["pending"]) == (8, "0-1", "")
    first, *_, last = document["vcpus"]
    assert first["id"] == 0
    assert first["enabled"] is True
    assert first["hotpluggable"] is False
    assert first["order"] == 1
    assert first["device_id"] is None
    assert first["qom_path"].startswith("/machine/unattached/device[")
    assert isinstance(first["host_tid"], int)
    assert last["props"] == {"socket-id": 1, "core-id": 1, "thread-id": 1}
    assert (last["enabled"], last["order"], last["qom_path"], last["host_tid"]) == (False, None, None, None)


async def test_a_large_machine_is_listed_without_a_line_for_each_free_vcpu() -> None:
    async with MicroGuest(boot=1, max_vcpus=200) as guest:
        shown = await run("list", "--qmp", guest.qmp)
    assert shown.code == 0
    assert "free: 1-199" in shown.out
    assert len(shown.out.splitlines()) < 10


async def test_the_state_of_a_machine_too_large_to_be_drawn_is_said_once() -> None:
    async with MicroGuest(boot=[0, 17], max_vcpus=20, behaviour=Behaviour.hanging()) as guest:
        ran = await run("unplug", "17", "--timeout", "0.1", "--qmp", guest.qmp)
    assert ran.err.splitlines()[-1] == "now: plugged 0,17 of 0-19, pending 17"


def test_a_step_that_is_denied_after_one_that_was_done_is_no_bad_usage() -> None:
    error = StepDeniedError("unplug", VcpuMap([3]), DenialReason.MIGRATING, "it migrates")
    assert failure(error, Shell(Options())).code == 2
    shell = Shell(Options())
    shell.done.append({"verdict": "UNPLUGGED"})
    assert failure(error, shell).code == 1


async def test_options_count_before_the_command_and_after_it(guest: MicroGuest) -> None:
    before = await run("--json", "--qmp", guest.qmp, "list")
    after = await run("list", "--json", "--qmp", guest.qmp)
    assert before.document == after.document


async def test_a_named_vm_counts_more_than_the_environments(guest: MicroGuest) -> None:
    env = environment(QMPVCPU_QMP=str(guest.qmp))
    assert (await run("list", "--json", env=env)).document["enabled"] == "0-1"
    elsewhere = environment(QMPVCPU_QMP="/nonexistent")
    for arguments in (("--qmp", guest.qmp, "list"), ("list", "--qmp", guest.qmp)):
        assert (await run("--json", *arguments, env=elsewhere)).document["enabled"] == "0-1"


async def test_plug_takes_the_chosen_vcpu_or_the_first_free_one(guest: MicroGuest) -> None:
    chosen = await run("plug", "5", "--qmp", guest.qmp)
    assert chosen.code == 0
    assert "plugged vCPU 5 as vcpu5" in chosen.out
    assert "[0][1][ ][ ][ ][5][ ][ ]" in chosen.out
    first = (await run("plug", "--qmp", guest.qmp, "--json", "--proof", "acknowledged")).document
    assert first["enabled"] == "0-2,5"
    verdict = first["steps"][0]["verdict"]
    assert (verdict["kind"], verdict["ids"], verdict["acknowledged"]) == ("plugged", "2", True)


async def test_plug_and_unplug_take_ranges_and_lists_as_set_does(guest: MicroGuest) -> None:
    plugged = (await run("plug", "2-4", "7,6", "3", "--qmp", guest.qmp, "--json")).document
    assert [each["verdict"]["ids"] for each in plugged["steps"]] == ["2", "3", "4", "6", "7"]
    gone = (await run("unplug", "7", "2-4,^3", "--qmp", guest.qmp, "--json")).document
    assert [each["verdict"]["ids"] for each in gone["steps"]] == ["7", "4", "2"]
    assert gone["enabled"] == "0-1,3,6"


async def test_of_many_nothing_is_plugged_if_one_can_be_known_not_to_be(guest: MicroGuest) -> None:
    ran = await run("plug", "2,1", "--qmp", guest.qmp, "--json")
    assert (ran.code, ran.error["ids"], ran.document["enabled"]) == (2, "1", "0-1")
    ran = await run("plug", "2-99", "--qmp", guest.qmp)
    assert ran.code == 2
    assert "no vCPU 8" in ran.err


async def test_after_one_that_is_rejected_no_other_is_plugged() -> None:
    async with small_vm(device_add=Failure("GenericError", "no memory")) as peer:
        ran = await run("plug", "2-3", "--qmp", peer.address, "--json")
    assert (ran.code, ran.document["not_sent"], ran.error["ids"]) == (1, "3", "2")


def test_a_slot_of_which_all_vcpus_are_named_is_named_by_its_first() -> None:
    of_two = layout("0,2", slots=4, count=2)
    assert by_slots(of_two, [2, 3, 6, 7]) == [2, 6]
    assert by_slots(of_two, [3, 2, 5, 99]) == [2, 5, 99]


async def test_a_map_that_the_guest_does_not_prove_is_not_reached_if_proof_is_asked_for() -> None:
    async with MicroGuest(behaviour=Behaviour.silent_about_inserts()) as guest:
        proof = ("--proof", "acknowledged", "--timeout", "0.2", "--qmp", guest.qmp)
        ran = await run("set", "0,3", *proof, "--json")
        assert (ran.code, ran.document["outcome"], ran.document["enabled"]) == (1, "partial", "0,3")
        reverted = await run("count", "3", *proof, "--on-failure", "revert", "--revert-timeout", "5", "--json")
    assert (reverted.code, reverted.document["outcome"], reverted.document["enabled"]) == (1, "reverted", "0,3")


async def test_a_plug_without_the_proof_asked_for_is_partial() -> None:
    async with MicroGuest(behaviour=Behaviour.silent_about_inserts()) as guest:
        ran = await run("plug", "3", "--proof", "acknowledged", "--timeout", "0.2", "--json", "--qmp", guest.qmp)
    assert ran.code == 1
    assert ran.error["kind"] == "UnprovenError"
    assert ran.error["outcome"] == "changed"
    [step] = ran.document["steps"]
    assert (step["verdict"]["kind"], step["verdict"]["acknowledged"]) == ("plugged", False)
    assert ran.document["enabled"] == "0,3"


async def test_unplug_takes_vcpus_one_by_one_boot_vcpus_too(guest: MicroGuest) -> None:
    await run("plug", "3", "--qmp", guest.qmp)
    ran = await run("unplug", "3", "1", "--qmp", guest.qmp)
    assert ran.code == 0
    assert "unplugged vCPU 3 in" in ran.out
    assert "unplugged vCPU 1 in" in ran.out
    assert ran.out.endswith("[0][ ][ ][ ][ ][ ][ ][ ]\n")


async def test_a_refusal_has_its_code_and_reason_and_the_same_call_succeeds_later(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.refusing(0x82))
    words = await run("unplug", "1", "--qmp", guest.qmp)
    assert words.code == 1
    assert "refused by the guest with OST status 0x82: device is busy" in words.err
    assert "now: [0][1][ ]" in words.err
    ran = await run("unplug", "1", "--json", "--qmp", guest.qmp)
    assert ran.code == 1
    assert ran.error["verdict"]["kind"] == "refused"
    assert (ran.error["code"], ran.error["reason"]) == (0x82, "device is busy")
    assert ran.error["outcome"] == "unchanged"
    await guest.set_behaviour(Behaviour.complying())
    again = await run("unplug", "1", "--json", "--qmp", guest.qmp)
    assert again.code == 0
    assert [step["verdict"]["kind"] for step in again.document["steps"]] == ["unplugged"]


async def test_after_a_vcpu_that_stays_no_other_is_asked_for(guest: MicroGuest) -> None:
    for vcpu in ("3", "5"):
        await run("plug", vcpu, "--qmp", guest.qmp)
    await guest.set_behaviour(Behaviour.refusing(0x81).for_slot(3))
    ran = await run("unplug", "5", "3", "1", "--json", "--qmp", guest.qmp)
    assert ran.code == 1
    assert [step["verdict"]["kind"] for step in ran.document["steps"]] == ["unplugged", "refused"]
    assert ran.document["not_sent"] == "1"
    assert ran.document["enabled"] == "0-1,3"


async def test_a_pending_unplug_is_told_and_is_joined_by_the_next_one(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    ran = await run("unplug", "1", "--timeout", "0.7", "--json", "--qmp", guest.qmp)
    assert ran.code == 1
    assert ran.error["verdict"]["kind"] == "pending"
    assert (ran.error["acknowledged"], ran.error["outcome"]) == (True, "unknown")
    assert ran.document["pending"] == "1"
    assert "the guest works on it" in ran.err
    async with running("unplug", "1", "--json", "--qmp", guest.qmp) as later:
        await later.wait_said("nothing is sent")
        await guest.set_behaviour(Behaviour.complying())
        ended = await later.end()
    assert ended.code == 0
    [step] = ended.document["steps"]
    assert (step["verdict"]["kind"], step["joined"]) == ("unplugged", True)


async def test_sigint_stops_the_waiting_and_tells_what_is_pending(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with running("unplug", "1", "--json", "--qmp", guest.qmp) as it:
        await it.wait_said("the guest works on it")
        it.process.send_signal(signal.SIGINT)
        ran = await it.end()
    assert ran.code == 130
    assert ran.error["kind"] == "KeyboardInterrupt"
    assert ran.document["pending"] == "1"


async def test_xml_is_printed_or_replaces_a_file(guest: MicroGuest, tmp_path: Path) -> None:
    await run("plug", "3", "--qmp", guest.qmp)
    printed = await run("xml", "--emulator", "/opt/qemu", "--qmp", guest.qmp)
    assert printed.code == 0
    assert "<vcpu id='3' enabled='yes' hotpluggable='yes' order='3'/>" in printed.out
    assert "<emulator>/opt/qemu</emulator>" in printed.out
    target = tmp_path / "vm.xml"
    target.write_text("what was there")
    written = await run("xml", "--emulator", "/opt/qemu", "--output", target, "--qmp", guest.qmp)
    assert written.code == 0
    assert target.read_text() == printed.out
    document = (await run("xml", "--emulator", "/opt/qemu", "--json", "--qmp", guest.qmp)).document
    assert document["xml"] == printed.out


async def test_a_record_follows_the_vm(guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    assert (await run("plug", "3", "--record", record, "--qmp", guest.qmp)).code == 0
    assert "<vcpu id='3' enabled='yes'" in record.read_text()
    assert read_identity(record.read_bytes()).metadata is not None
    assert (await run("unplug", "3", "--record", record, "--qmp", guest.qmp)).code == 0
    assert "<vcpu id='3' enabled='no'" in record.read_text()


async def test_verbose_prints_the_exchange_on_standard_error_only(guest: MicroGuest) -> None:
    ran = await run("plug", "3", "--verbose", "--json", "--qmp", guest.qmp)
    assert ran.document["enabled"] == "0-1,3"
    assert '"device_add"' in ran.err


async def test_a_reader_that_stops_reading_is_no_error(guest: MicroGuest) -> None:
    closes = "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1)"
    ran = await run("list", "--qmp", guest.qmp, code=closes)
    assert (ran.code, ran.err) == (0, "")


async def test_an_answer_that_cannot_be_printed_is_an_error(guest: MicroGuest) -> None:
    full = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    ran = await run("list", "--json", "--qmp", guest.qmp, code=full)
    assert ran.code == 1
    assert "cannot print the answer" in ran.err


@pytest.mark.parametrize(
    "command",
    [
        *("", "demo", "list", "plug", "unplug", "set", "count", "plan", "recover", "watch", "xml"),
        *(
            "fleet",
            "fleet list",
            "fleet plan",
            "fleet set",
            "fleet count",
            "agent",
            "hosts",
            "hosts init",
            "hosts list",
            "hosts demo",
        ),
    ],
)
async def test_help_teaches_with_an_example_and_the_exit_codes(command: str) -> None:
    ran = await run(*command.split(), "--help")
    assert ran.code == 0
    assert f"  qmpvcpu {command}" in ran.out
    assert "Exit codes: 0" in ran.out


def test_the_manual_has_every_command_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs/command-line.md").read_text()
    table = page.partition("| --- | --- |")[2].partition("\n\n")[0]
    named = {row.split("`")[1].split()[0] for row in table.strip().splitlines()}
    assert named == set(program().list_commands(click.Context(program())))


async def test_a_document_of_the_vms_own_gets_the_state_and_stays_as_it_is_otherwise(
    guest: MicroGuest, tmp_path: Path
) -> None:
    own = tmp_path / "own.xml"
    assert (await run("xml", "-o", own, "--qmp", guest.qmp)).code == 0
    own.write_text(own.read_text().replace("<features>", "<!-- mine -->\n  <features>"))
    assert (await run("plug", "3", "--qmp", guest.qmp)).code == 0
    ran = await run("xml", "--base", own, "--json", "--qmp", guest.qmp)
    assert ran.code == 0
    assert "<!-- mine -->" in ran.document["xml"]
    assert "<vcpu id='3' enabled='yes' hotpluggable='yes' order='3'/>" in ran.document["xml"]
    both = await run("xml", "--base", own, "--emulator", "/bin/true", "--qmp", guest.qmp)
    assert (both.code, "--emulator goes without --base" in both.err) == (2, True)
    none = await run("xml", "--base", tmp_path / "none.xml", "--qmp", guest.qmp)
    assert (none.code, "No such file" in none.err) == (2, True)


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (
            "which libvirt requires: set VmInfo.memory_kib",
            "which libvirt requires: name the VM's own document with --base",
        ),
        ("(-preconfig): x-exit-preconfig, and refresh(), first", "(-preconfig): x-exit-preconfig first"),
        ("attach() takes a connected socket", "qmpvcpu takes no open descriptor: name the socket's path"),
        (
            "Proof.ONLINE asks the guest's agent: attach with agent= and the address of its socket",
            "--proof online asks the guest's agent: name its socket with --agent ADDRESS",
        ),
        ("could bring it online: attach with agent=", "could bring it online: name its socket with --agent ADDRESS"),
        ("offline_first=True asks", "--offline-first asks"),
        ("not stopped: set_map is for a VM that runs", "not stopped: qmpvcpu set is for a VM that runs"),
    ],
)
def test_what_the_library_says_of_python_is_said_in_options(python: str, words: str) -> None:
    assert in_options(python) == words


async def test_xml_says_where_a_record_has_threads_run(guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    where = ("--qmp", guest.qmp, "--record", record, "--name", "vm")
    assert (await run("pin", "0=0", "5=0", *where)).code == 0
    kept = record.read_bytes()
    for options in ((), ("--base", record)):
        printed = await run("xml", *options, *where)
        assert printed.code == 0
        assert "<vcpupin vcpu='0' cpuset='0'/>\n    <vcpupin vcpu='5' cpuset='0'/>" in printed.out
    assert "cputune" not in (await run("xml", "--qmp", guest.qmp)).out
    assert record.read_bytes() == kept
