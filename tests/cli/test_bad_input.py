import asyncio
import json
import signal
import socket
import sys
from pathlib import Path

import pytest

from qmpvcpu.cli import main
from qmpvcpu.testing import UNTIL_TOLD, Behaviour, MicroGuest, QemuProcess, best_qemu
from tests.cli.running import environment, program_on_terminal, run, running
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("plug 99", "no vCPU 99: this machine has 0 to 7"),
        ("plug 1", "plugged already, as /machine/unattached/"),
        ("unplug 0", "vCPU 0 is the one that booted the VM"),
        ("unplug 3", "it is not plugged"),
        ("unplug 1 99", "no vCPU 99"),
    ],
)
async def test_what_cannot_be_is_denied_and_nothing_is_sent(guest: MicroGuest, arguments: str, words: str) -> None:
    ran = await run(*arguments.split(), "--qmp", guest.qmp, "--verbose")
    assert ran.code == 2
    assert words in ran.err
    assert "nothing was sent" in ran.err
    assert "now: [0][1][ ]" in ran.err
    assert "device_" not in ran.err.replace("device_id", "")
    document = (await run("--json", *arguments.split(), "--qmp", guest.qmp)).document
    assert document["error"]["verdict"]["kind"] == "denied"
    assert document["error"]["outcome"] == "unchanged"
    assert document["enabled"] == "0-1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "no command"),
        ("frobnicate", "No such command"),
        ("pulg 3", "Did you mean 'plug'?"),
        ("setvcpus vm 3", "In place of virsh setvcpus use count"),
        ("plug abc", "is not a vCPU id"),
        ("plug -- -1", "is not a vCPU id"),
        ("plug 3 4,", "is not a vCPU id"),
        ("plug 4-2", "runs downwards"),
        ("list 3", "unexpected extra argument"),
        ("plug 16384", "16383"),
        ("plug --proof enlightenment", "enlightenment"),
        ("unplug", "Missing argument"),
        ("unplug ^2", "excludes an id, and no id is included"),
        ("list", "which VM?"),
        ("list --qmp", "requires an argument"),
        ("list --frob", "No such option"),
        ("--timeout 3 list --qmp /x", "qmpvcpu list takes no --timeout"),
        ("--record vm.xml demo", "qmpvcpu demo takes no --record"),
        ("--qmp /x args vm.xml", "qmpvcpu args takes no --qmp"),
        ("--timeout 3 fleet list --qmp /x", "qmpvcpu fleet list takes no --timeout"),
        ("list --reply-timeout soon", "--reply-timeout"),
        ("list --reply-timeout nan --qmp /x", "finite number of seconds"),
        ("list --reply-timeout inf --qmp /x", "finite number of seconds"),
        ("list --reply-timeout=-1 --qmp /x", "finite number of seconds"),
        ("list --reply-timeout 1e999 --qmp /x", "finite number of seconds"),
        ("unplug 3 --timeout nan --qmp /x", "'--timeout': it is a finite number of seconds, 0 or more, not nan"),
        ("set 0 --in-flight 0 --qmp /x", "--in-flight"),
        ("set 0 --in-flight 1.5 --qmp /x", "valid integer"),
        ("set 0 --total-timeout 1e999 --qmp /x", "finite number of seconds"),
        ("export --settle nan --qmp /x", "'--settle': it is a finite number of seconds"),
        ("stats --interval 0.01 --qmp /x", "--interval 0.01: it is 0.05 or more"),
        ("stats --interval nan --qmp /x", "'--interval': it is a finite number of seconds"),
        ("stats --count 0 --qmp /x", "'--count'"),
        ("stats --by pid --qmp /x", "'--by'"),
        ("watch --for inf --qmp /x", "'--for': it is a finite number of seconds"),
        ("doctor --reply-timeout nan", "finite number of seconds"),
        ("list --reply-timeout 0 --qmp /x", "QEMU needs some time"),
        ("list --qmp tcp:nowhere", "tcp:HOST:PORT"),
        ("list --qmp tcp:[::1]:99999", "not a number from 1 to 65535"),
        ("list --qmp /" + "x" * 200, "a UNIX socket's can have 107"),
        ("demo --guest windows", "windows"),
        ("demo --qemu /nonexistent/qemu", "no program that can be run"),
    ],
)
def test_bad_usage_is_one_sentence_or_one_document(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QMPVCPU_QMP", raising=False)
    assert main(arguments.split()) == 2
    spoken = capsys.readouterr()
    assert words in spoken.err
    assert spoken.out == ""
    assert main(["--json", *arguments.split()]) == 2
    document = json.loads(capsys.readouterr().out)
    assert words in document["error"]["message"]
    assert document["error"]["outcome"] == "unchanged"


async def test_a_usage_error_reaches_the_exit_code_of_the_process() -> None:
    ran = await run("plug", "abc", "--json")
    assert ran.code == 2
    assert ran.error["kind"] == "BadUsageError"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/nonexistent/vm.qmp", "no such path"),
        ("/etc/passwd", "regular file, no socket"),
        ("unix:/tmp", "directory"),
        ("tcp:127.0.0.1:1", "connection refused"),
    ],
)
async def test_an_address_without_a_vm_is_one_clear_error(address: str, words: str) -> None:
    ran = await run("list", "--json", "--qmp", address)
    assert ran.code == 3
    assert ran.error["kind"] == "MonitorConnectError"
    assert words in ran.error["message"]


async def test_something_that_is_no_qmp_is_named_as_such(tmp_path: Path) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    path = tmp_path / "mail"
    async with await asyncio.start_unix_server(greet, path):
        ran = await run("list", "--json", "--qmp", path)
    assert ran.code == 3
    assert "220 mail.example" in ran.error["message"]


async def test_a_word_that_is_no_choice_is_told_with_the_choices() -> None:
    ran = await run("set", "0", "--on-failure", "undo", "--qmp", "/nonexistent")
    assert ran.code == 2
    assert ran.err.startswith("qmpvcpu: Invalid value for '--on-failure': 'undo' is not one of 'stop', 'continue'")


async def test_a_stopped_qemu_is_told_by_its_deadline(guest: MicroGuest) -> None:
    guest.process.kill(signal.SIGSTOP)
    try:
        ran = await run("list", "--reply-timeout", "0.5", "--json", "--qmp", guest.qmp)
        told = await run("list", "--reply-timeout", "0.5", "--qmp", guest.sockets[1])
    finally:
        guest.process.kill(signal.SIGCONT)
    assert "SIGCONT lets it go on" in told.err
    assert "how to share" not in told.err
    assert ran.code == 3
    assert "stopped" in ran.error["message"]
    assert "another client" in ran.error["message"]
    assert str(guest.process.pid) in ran.error["hint"]


async def test_a_socket_that_another_client_holds_is_told_with_what_to_do(guest: MicroGuest) -> None:
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(guest.qmp))
        assert b"QMP" in await asyncio.to_thread(holder.recv, 4096)
        ran = await run("list", "--reply-timeout", "0.5", "--qmp", guest.qmp)
    assert ran.code == 3
    assert "another client" in ran.err
    assert "second -qmp" in ran.err
    assert "how to share a VM with who holds its socket" in ran.err


async def test_a_qemu_that_dies_while_the_guest_works_leaves_the_outcome_unknown(guest: MicroGuest) -> None:
    await guest.set_behaviour(Behaviour.hanging())
    async with running("unplug", "1", "--json", "--qmp", guest.qmp) as it:
        await it.wait_said("the guest works on it")
        guest.process.kill()
        ran = await it.end()
    assert ran.code == 3
    assert ran.error["kind"] == "MonitorLostError"
    assert ran.error["outcome"] == "unknown"


@pytest.mark.parametrize("on", [each for each in substrates(["q35"]) if each.values[0].has_legacy_mode])
async def test_a_guest_that_is_not_up_yet_is_a_rejection_with_a_hint(on: Substrate) -> None:
    async with MicroGuest(on.qemu, accel=on.accel, boot=2, ready_after_ms=UNTIL_TOLD, wait=False) as guest:
        ran = await run("unplug", "1", "--json", "--qmp", guest.qmp)
    assert ran.code == 1
    assert ran.error["verdict"]["kind"] == "rejected"
    assert "ACPI hotplug is not up yet" in ran.error["hint"]


async def test_a_full_machine_is_denied() -> None:
    async with MicroGuest(boot=8) as guest:
        ran = await run("plug", "--json", "--qmp", guest.qmp)
    assert ran.code == 2
    assert ran.error["reason"] == "machine_full"


async def test_a_machine_without_hotplug_is_listed_and_denied() -> None:
    async with QemuProcess(best_qemu(), ["-machine", "microvm", "-S"]) as process:
        listed = await run("list", "--qmp", process.qmp)
        denied = await run("plug", "--json", "--qmp", process.qmp)
    assert listed.code == 0
    assert "1 of 1 vCPU plugged" in listed.out
    assert denied.code == 2
    assert denied.error["reason"] == "machine_cannot_plug"


async def test_a_record_that_is_not_ours_is_left_alone(guest: MicroGuest, tmp_path: Path) -> None:
    theirs = tmp_path / "vm.xml"
    theirs.write_text("<domain><name>db1</name><devices><disk/></devices></domain>")
    ran = await run("plug", "3", "--record", theirs, "--json", "--qmp", guest.qmp)
    assert ran.code == 4
    assert ran.error["kind"] == "RecordCorruptError"
    assert theirs.read_text() == "<domain><name>db1</name><devices><disk/></devices></domain>"
    assert (await run("list", "--json", "--qmp", guest.qmp)).document["enabled"] == "0-1"


@pytest.mark.parametrize("target", ["missing/vm.xml", "."])
async def test_xml_that_cannot_be_written_is_bad_input(guest: MicroGuest, tmp_path: Path, target: str) -> None:
    ran = await run("xml", "--output", tmp_path / target, "--json", "--qmp", guest.qmp)
    assert ran.code == 2
    assert str(tmp_path) in ran.error["message"]


async def test_an_error_of_the_system_is_not_one_of_printing() -> None:
    fails = (
        "import qmpvcpu.qmp.queries\n"
        "async def look(*_, **__): raise PermissionError(13, 'Permission denied', '/run/\\x1bx')\n"
        "qmpvcpu.qmp.queries.look = look"
    )
    told = await run("list", "--qmp", "/x", code=fails)
    assert (told.code, told.err) == (3, "qmpvcpu: /run/\\x1bx: Permission denied\n")
    ran = await run("list", "--json", "--qmp", "/x", code=fails)
    assert (ran.code, ran.error["kind"], ran.error["outcome"]) == (3, "OSError", "unknown")


async def test_a_mistake_is_told_with_options_and_not_with_pythons_parameters(
    guest: MicroGuest, tmp_path: Path
) -> None:
    record = str(tmp_path / "vm.xml")
    async with MicroGuest(boot=2) as other:
        assert (await run("plug", "3", "--record", record, "--qmp", other.qmp)).code == 0
    another = await run("list", "--record", record, "--qmp", guest.qmp)
    assert another.code == 4
    assert "name the VM: --name NAME" in another.err
    same = await run("set", "0", "--affect", "both", "--record", record, "--config", record, "--qmp", guest.qmp)
    assert same.code == 2
    assert "--config and --record name one file" in same.err
    theirs = tmp_path / "theirs.xml"
    theirs.write_text("<domain><name>db1</name></domain>")
    none_of_ours = await run("plug", "--record", theirs, "--qmp", guest.qmp)
    assert none_of_ours.code == 4
    assert "--record names a file of ours" in none_of_ours.err
    for ran in (another, same, none_of_ours):
        assert "=" not in ran.err


async def test_a_missing_extra_is_one_sentence() -> None:
    ran = await run("list", code="sys.modules['click'] = None")
    assert ran.code == 2
    assert ran.err == ("qmpvcpu: the command line needs click, which is not installed: pip install 'qmpvcpu[cli]'\n")


async def test_without_rich_a_terminal_gets_what_a_pipe_gets(guest: MicroGuest) -> None:
    program = "import sys; sys.modules['rich'] = None; from qmpvcpu.cli import main; sys.exit(main())"
    words = (sys.executable, "-c", program, "list", "--qmp", str(guest.qmp))
    async with program_on_terminal(*words, columns=200, env=environment()) as it:
        assert await it.end() == 0
    piped = await run("list", "--qmp", guest.qmp)
    assert it.screen.lines == piped.out.splitlines()
