import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.cli import main
from qmpvcpu.cli.fleet import FLEET_OPTIONS, Row, merged
from qmpvcpu.errors import (
    DenialReason,
    MonitorConnectError,
    RecordLockedError,
    SameVmError,
    StepDeniedError,
    UnplugRefusedError,
)
from qmpvcpu.fleet import VmResult
from qmpvcpu.fleet.local import LocalVms
from qmpvcpu.fleet.remote import RemoteVms
from qmpvcpu.testing import Behaviour, MicroGuest
from qmpvcpu.testing.peer import HANG, Command, ScriptedPeer
from tests.captures import all_captures
from tests.cli.running import environment, on_terminal, run, running
from tests.controller.test_scripted import capture_answers
from tests.fleet.vms import dead_socket, guests, stopped

pytestmark = pytest.mark.qemu


@pytest.fixture
async def vms() -> AsyncIterator[list[MicroGuest]]:
    async with guests(3, boot=2) as started:
        yield started


@pytest.fixture
def folder(vms: list[MicroGuest], tmp_path: Path) -> Path:
    """A directory with a socket of each."""
    for number, vm in enumerate(vms):
        (tmp_path / f"vm{number}.qmp").symlink_to(vm.qmp)
    (tmp_path / "vm0.pid").write_text("1")
    return tmp_path


def test_how_many_vms_are_begun_at_a_time_is_left_to_the_fleet_and_told_by_help() -> None:
    (option,) = [each for each in FLEET_OPTIONS if each.name == "concurrency"]
    assert click.Command("list", params=[option]).make_context("list", []).params == {"concurrency": None}
    assert f"({LocalVms.concurrency}; with --nats {RemoteVms.concurrency})" in (option.help or "")


async def test_list_shows_people_every_vm_in_a_row(folder: Path) -> None:
    shown = await run("fleet", "list", "--dir", folder)
    assert shown.code == 0
    assert "3 of 3 VMs read in" in shown.out
    rows = [line.split() for line in shown.out.splitlines()[3:]]
    assert [row[:6] for row in rows] == [
        [f"vm{number}", f"{folder}/vm{number}.qmp", "ok", "2", "of", "8"] for number in range(3)
    ]
    assert shown.err == ""


@pytest.mark.parametrize(
    "words", ["--json fleet list", "fleet --json list", "fleet list --json"], ids=["first", "between", "last"]
)
async def test_list_gives_programs_every_vcpu_of_every_vm(folder: Path, words: str) -> None:
    document = (await run(*words.split(), "--dir", folder, "--pattern", "vm[01]*")).document
    assert (document["reached"], document["failed"]) == (2, 0)
    assert [vm["address"] for vm in document["vms"]] == [f"unix:{folder}/vm{number}.qmp" for number in range(2)]
    for vm in document["vms"]:
        assert (vm["name"], vm["code"], vm["error"], vm["enabled"], vm["max"]) == (
            vm["vm"]["name"],
            0,
            None,
            "0-1",
            8,
        )
        assert vm["seconds"] > 0
        assert len(vm["vcpus"]) == 8


async def test_the_next_boot_of_each_is_changed_in_its_record(folder: Path, tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    where = ("--json", "--dir", folder, "--pattern", "vm[01].qmp", "--record", records)
    both = await run("fleet", "set", "0,3", "--affect", "both", *where)
    assert both.code == 0
    later = await run("fleet", "count", "5", "--affect", "config", *where)
    assert later.code == 0
    for ran, affect, count in ((both, "both", 2), (later, "config", 5)):
        for vm in ran.document["vms"]:
            assert (vm["affect"], vm["enabled"]) == (affect, "0,3")
            assert len(VcpuMap.parse(vm["config"]["target"])) == count
    nowhere = await run("fleet", "set", "0-3", "--affect", "both", "--dir", folder)
    assert nowhere.code == 2
    assert "--record DIR" in nowhere.err


async def test_set_and_count_reach_all_and_report_each(folder: Path, tmp_path: Path) -> None:
    ran = await run("fleet", "set", "0,3", "--json", "--dir", folder)
    assert ran.code == 0
    for vm in ran.document["vms"]:
        assert (vm["outcome"], vm["enabled"]) == ("reached", "0,3")
        assert [step["verdict"]["kind"] for step in vm["steps"]] == ["plugged", "unplugged"]
    counted = await run("fleet", "count", "3", "--dir", folder, "--record", tmp_path)
    assert counted.code == 0
    assert counted.out.count("REACHED") == 3
    assert counted.out.count("3 of 8") == 3
    assert (tmp_path / f"{str(folder).strip('/').replace('/', '-')}-vm2.qmp.xml").is_file()


async def test_what_goes_wrong_in_one_vm_is_told_of_it_alone(
    vms: list[MicroGuest], folder: Path, tmp_path: Path
) -> None:
    await vms[1].set_behaviour(Behaviour.refusing(0x82).for_slot(1))
    arguments = ("fleet", "set", "0,2", "--on-failure", "revert", "--dir", folder)
    ran = await run(*arguments)
    assert ran.code == 1
    assert "2 of 3 VMs reached" in ran.out
    assert "REVERTED" in ran.out
    assert f"{folder}/vm1.qmp: 0,2 not reached (reverted): 1 REFUSED; the guest said: device is busy" in ran.err
    dead_socket(tmp_path / "vm9.qmp")
    ran = await run(*arguments, "--json")
    assert ran.code == 3  # nobody knows of a VM that does not answer: worse than a refusal
    by_code = {vm["code"]: vm for vm in ran.document["vms"]}
    assert by_code[3]["error"]["kind"] == "MonitorConnectError"
    assert by_code[1]["error"]["kind"] == "TransitionError"
    assert (by_code[1]["outcome"], by_code[1]["enabled"]) == ("reverted", "0-1")
    assert (by_code[0]["outcome"], by_code[0]["enabled"]) == ("reached", "0,2")
    assert (ran.document["reached"], ran.document["failed"]) == (2, 2)


async def test_a_map_that_no_vm_has_is_denied_by_each(folder: Path) -> None:
    ran = await run("fleet", "set", "0-8", "--dir", folder, "--verbose")
    assert ran.code == 2
    assert ran.err.count("no vCPU 8: this machine has 0 to 7") == 3
    assert "device_add" not in ran.err


async def test_a_silent_vm_is_named_while_it_is_waited_for_and_holds_up_no_other(
    vms: list[MicroGuest], folder: Path
) -> None:
    with stopped(vms[1]):
        ran = await run("fleet", "list", "--reply-timeout", "1.5", "--dir", folder, "--concurrency", "1")
    assert ran.code == 3
    assert f"2 of 3 VMs; waiting for {folder}/vm1.qmp" in ran.err
    assert "is stopped (SIGSTOP)" in ran.err
    assert re.search(r"2 of 3 VMs read in \d+\.\d s", ran.out)


async def test_a_silent_vm_is_given_up_after_the_reply_timeout_and_not_after_the_guests(
    vms: list[MicroGuest], folder: Path
) -> None:
    with stopped(vms[1]):
        ran = await run("fleet", "set", "0-2", "--reply-timeout", "0.5", "--timeout", "50", "--dir", folder, "--json")
    assert ran.code == 3
    assert [vm["code"] for vm in ran.document["vms"]] == [0, 3, 0]
    assert ran.document["seconds"] < 10


async def test_a_terminal_has_a_bar_with_what_each_vm_does_and_then_the_table(
    vms: list[MicroGuest], folder: Path
) -> None:
    await vms[2].set_behaviour(Behaviour.hanging())
    async with on_terminal("fleet", "set", "0", "--dir", folder, columns=160) as it:
        await it.wait_shown("2 of 3 VMs; waiting for")
        await it.wait_shown("0 of 1: vCPU 1: the guest works on it")
        await vms[2].set_behaviour(Behaviour.complying())
        assert await it.end() == 0
    assert "3 of 3 VMs reached" in it.shown


async def test_sigint_stops_all_at_their_next_safe_point(vms: list[MicroGuest], folder: Path) -> None:
    await vms[2].set_behaviour(Behaviour.hanging())
    async with running("fleet", "set", "0,4", "--dir", folder, "--json") as it:
        await it.wait_said("2 of 3 VMs; waiting for")
        it.process.send_signal(signal.SIGINT)
        ran = await it.end()
    assert ran.code == 130
    assert [vm["code"] for vm in ran.document["vms"]] == [0, 0, 130]
    last = ran.document["vms"][2]
    assert (last["outcome"], last["enabled"], last["pending"]) == ("partial", "0-1,4", "1")


async def test_the_second_sigint_abandons_and_tells_what_came(vms: list[MicroGuest], folder: Path) -> None:
    with stopped(vms[2]):
        async with running("fleet", "set", "0,4", "--dir", folder, "--json") as it:
            await it.wait_said("2 of 3 VMs; waiting for")
            it.process.send_signal(signal.SIGINT)
            await it.wait_said("a second signal lets go of the VM")
            it.process.send_signal(signal.SIGINT)
            ran = await it.end()
    assert ran.code == 130
    assert [vm["enabled"] for vm in ran.document["vms"]] == ["0,4"] * 2
    assert ran.error["message"] == "stopped by SIGINT"


async def test_sigint_before_a_map_is_begun_leaves_that_vm_as_it_is() -> None:
    (capture,) = (each for each in all_captures() if each.name == "10.0.2-q35-flat-sockets8")
    command = "query-hotpluggable-cpus"

    def once(_: Command) -> Any:
        peer.answers[command] = HANG
        return capture.replies(command)[0]

    peer = ScriptedPeer.from_capture(capture.data, answers={**capture_answers(capture), command: once})
    async with peer, running("fleet", "set", "0-1", "--qmp", peer.path, "--json") as it:
        await peer.wait_for(command, 2)
        it.process.send_signal(signal.SIGINT)
        ran = await it.end()
        assert peer.count("device_add") == 0
    assert ran.code == 130
    (vm,) = ran.document["vms"]
    assert vm["error"]["message"] == "stopped before anything was sent"
    assert vm["enabled"] == str(next(capture.layouts()).enabled)


@pytest.mark.parametrize("who", [("-name", "web"), ("-uuid", "b8e9d0c2-6a0d-4f8e-9c3e-0a1b2c3d4e5f")])
async def test_a_vm_has_one_record_whichever_socket_is_taken(who: tuple[str, str], tmp_path: Path) -> None:
    records, sockets = tmp_path / "records", tmp_path / "vms"
    records.mkdir()
    sockets.mkdir()
    async with MicroGuest(boot=2, extra_args=who) as guest:
        for number, socket in enumerate(guest.sockets[:2]):
            (sockets / f"{number}.qmp").symlink_to(socket)
        for _ in range(2):
            ran = await run("fleet", "set", "0-2", "--dir", sockets, "--record", records, "--json")
            assert (ran.code, ran.document["reached"]) == (0, 1)
        one = await run("fleet", "count", "2", "--qmp", guest.sockets[1], "--record", records)
        assert one.code == 0
    assert [each.name for each in records.iterdir() if each.suffix == ".xml"] == [f"{who[1]}.xml"]


async def test_a_vm_with_two_sockets_fails_once(tmp_path: Path) -> None:
    records, sockets = tmp_path / "records", tmp_path / "vms"
    records.mkdir()
    sockets.mkdir()
    async with MicroGuest(extra_args=("-name", "no/domain")) as guest:  # of which no record can be made
        for number, socket in enumerate(guest.sockets[:2]):
            (sockets / f"{number}.qmp").symlink_to(socket)
        ran = await run("fleet", "set", "0-2", "--dir", sockets, "--record", records, "--json")
    assert (ran.code, [each["code"] for each in ran.document["vms"]]) == (4, [4])


async def test_a_record_by_a_path_is_the_same_however_that_is_spelled(vms: list[MicroGuest], tmp_path: Path) -> None:
    path = vms[0].qmp
    for address in (path, f"unix:{path}", os.path.relpath(path), f"{path.parent}/./{path.name}"):
        ran = await run("fleet", "set", "0-1", "--qmp", address, "--record", tmp_path)
        assert ran.code == 0, address
    assert [each.stem for each in tmp_path.glob("*.xml")] == [str(path).strip("/").replace("/", "-")]


async def test_what_was_cut_short_is_given_up_aloud(vms: list[MicroGuest], folder: Path, tmp_path: Path) -> None:
    await vms[0].set_behaviour(Behaviour.hanging())
    arguments = ("--dir", folder, "--record", tmp_path)
    async with running("fleet", "set", "0", *arguments) as it:
        await it.wait_said("2 of 3 VMs; waiting for")
        it.process.kill()
        await it.process.wait()
    await vms[0].set_behaviour(Behaviour.complying())
    ran = await run("fleet", "set", "0,5", *arguments)
    assert ran.code == 0
    assert ran.err.count("given up for this: interrupted: vCPUs 0-1 to 0") == 1


async def test_sigint_ends_a_list_at_once_with_what_came(vms: list[MicroGuest], folder: Path) -> None:
    with stopped(vms[0]):
        async with running("fleet", "list", "--dir", folder, "--json") as it:
            await it.wait_said("2 of 3 VMs; waiting for")
            it.process.send_signal(signal.SIGINT)
            ran = await it.end()
    assert ran.code == 130
    assert [vm["code"] for vm in ran.document["vms"]] == [130, 0, 0]
    assert ran.document["vms"][0]["error"]["message"] == "stopped before anything was sent"


async def test_the_environment_names_one_vm_unless_others_are_named(vms: list[MicroGuest], folder: Path) -> None:
    env = environment(QMPVCPU_QMP=str(vms[0].qmp))
    alone = (await run("fleet", "list", "--json", env=env)).document
    assert [vm["address"] for vm in alone["vms"]] == [f"unix:{vms[0].qmp}"]
    named = (await run("fleet", "list", "--json", "--qmp", vms[1].qmp, "--qmp", vms[2].qmp, env=env)).document
    assert [vm["address"] for vm in named["vms"]] == [f"unix:{vm.qmp}" for vm in vms[1:]]
    found = (await run("fleet", "list", "--json", "--dir", folder, env=env)).document
    assert len(found["vms"]) == 3
    both = (await run("--json", "fleet", "list", "--qmp", vms[0].qmp, "--dir", folder, env=env)).document
    assert len(both["vms"]) == 3  # one socket by two paths is one VM


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "Missing command"),
        ("--reply-timeout nan list --qmp /nonexistent", "finite number of seconds"),
        ("frobnicate", "No such command"),
        ("list", "for those of many hosts the server: --nats"),
        ("list --dir /nonexistent", "cannot look into /nonexistent for QMP sockets: No such file"),
        ("list --dir /etc/passwd", "Not a directory"),
        ("list --dir /etc", "no socket in /etc matches '*': name another pattern"),
        ("list --dir /run --pattern /run/*.qmp", "relative to --dir"),
        ("list --dir /run --concurrency 0", "--concurrency"),
        ("list --qmp tcp:nowhere", "tcp:HOST:PORT"),
        ("list --qmp /nonexistent --reply-timeout 0", "QEMU needs some time"),
        ("list --qmp /nonexistent --reply-timeout nan", "finite number of seconds"),
        ("set --qmp /nonexistent", "Missing argument"),
        ("set 3-1 --qmp /nonexistent", "3-1"),
        ("set 0 --qmp /nonexistent --total-timeout inf", "finite number of seconds"),
        ("count many --qmp /nonexistent", "valid integer"),
    ],
)
def test_bad_usage_is_one_sentence_or_one_document(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QMPVCPU_QMP", raising=False)
    assert main(["fleet", *arguments.split()]) == 2
    spoken = capsys.readouterr()
    assert words in spoken.err
    assert spoken.out == ""
    assert main(["--json", "fleet", *arguments.split()]) == 2
    document = json.loads(capsys.readouterr().out)
    assert words in document["error"]["message"]
    assert document["schema"] == "qmpvcpu/1"


def ended(error: BaseException | None) -> Row:
    return Row("unix:/x", VmResult("unix:/x", "x", None, None, error, 0.1))


NO_ANSWER = ended(MonitorConnectError("unix:/x", "gone"))
STOPPED = Row("unix:/x", None)
CANCELLED = ended(asyncio.CancelledError())
LOCKED = ended(RecordLockedError("/x.xml", 1, "somebody"))
REFUSED = ended(UnplugRefusedError(VcpuMap([1]), 0x82, "busy"))
DENIED = ended(StepDeniedError("plug", VcpuMap([9]), DenialReason.UNKNOWN_VCPU, "no vCPU 9"))
SAME = ended(SameVmError("unix:/x", "unix:/y", same_socket=True))
GOOD = ended(None)


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([GOOD, GOOD], 0),
        ([GOOD, DENIED], 2),
        ([SAME, GOOD], 2),
        ([DENIED, REFUSED, GOOD], 1),
        ([REFUSED, LOCKED, DENIED], 4),
        ([LOCKED, STOPPED, REFUSED], 130),
        ([LOCKED, CANCELLED, REFUSED], 130),
        ([STOPPED, NO_ANSWER, LOCKED, REFUSED, DENIED, GOOD], 3),
    ],
)
def test_the_exit_code_is_that_of_the_vm_of_which_least_is_known(rows: list[Row], code: int) -> None:
    told = merged(rows, seconds=1.0, whole=False)
    assert told.code == code
    assert told.document["reached"] == rows.count(GOOD)
    assert len(told.complaint) == len(rows) - rows.count(GOOD)


async def test_a_socket_that_another_client_holds_says_what_to_do(vms: list[MicroGuest]) -> None:
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(vms[0].qmp))
        assert b"QMP" in await asyncio.to_thread(holder.recv, 4096)
        ran = await run("fleet", "list", "--reply-timeout", "0.5", "--qmp", vms[0].qmp, "--qmp", vms[1].qmp)
    assert ran.code == 3
    assert "second -qmp" in ran.err
    assert "1 of 2 VMs read" in ran.out
