"""pin and sched, --pin and --sched, and where threads are shown: real QEMUs, whose threads are looked at."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu.cli import main
from qmpvcpu.cli.watch import told
from qmpvcpu.events import Origin, PlaceDrifted, VcpuPlugged
from qmpvcpu.model.placement import Place
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.testing import MicroGuest, best_qemu
from tests.cli.running import Ran, environment, on_terminal, run, running
from tests.cli.schema import command_of
from tests.substrates import Substrate, substrates

pytestmark = pytest.mark.qemu

HERE = sorted(os.sched_getaffinity(0))
FIRST, LAST = HERE[0], HERE[-1]
NO_CPU = 4000
ONLY_ROOT = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a capability up, or become somebody else"
)


def threads_of(ran: Ran) -> dict[int, dict[str, Any]]:
    """The threads of vCPUs that a command has shown, by vCPU id."""
    return {each["vcpu"]: each for each in ran.document["threads"] if each["vcpu"] is not None}


async def looked(guest: MicroGuest) -> dict[int, dict[str, Any]]:
    return threads_of(await run("pin", "--json", "--qmp", guest.qmp))


def is_on(thread: dict[str, Any], cpu: int) -> bool:
    """Whether the kernel has the thread run there and nowhere else."""
    return os.sched_getaffinity(thread["tid"]) == {cpu}


@pytest.mark.parametrize("on", substrates(["q35"]))
async def test_threads_are_shown_and_moved(on: Substrate) -> None:
    async with MicroGuest(on.qemu, accel=on.accel, boot=2) as guest:
        vm = ("--qmp", guest.qmp, "--json")
        ran = await run("pin", f"1={LAST}", "--emulator", str(FIRST), *vm)
        assert ran.code == 0
        assert is_on(threads_of(ran)[1], LAST)
        others = [each for each in ran.document["threads"] if each["kind"] == "emulator"]
        assert others[0]["tid"] == guest.process.pid
        assert all(is_on(each, FIRST) for each in others)
        assert threads_of(ran)[1]["wanted"]["cpus"] == str(LAST)
        assert os.sched_getaffinity(threads_of(ran)[0]["tid"]) == set(HERE)
        ran = await run("sched", "0-1=batch", *vm)
        assert [os.sched_getscheduler(each["tid"]) for each in threads_of(ran).values()] == [os.SCHED_BATCH] * 2
        shown = await run("pin", "--qmp", guest.qmp)
    row = next(line.split() for line in shown.out.splitlines() if line.startswith("vCPU 1"))
    assert row[2:] == [str(threads_of(ran)[1]["tid"]), str(LAST), "batch", *row[5:]]


@pytest.mark.parametrize("on", substrates(["q35"]))
async def test_a_vcpu_is_plugged_into_its_place(on: Substrate) -> None:
    async with MicroGuest(on.qemu, accel=on.accel) as guest:
        ran = await run("plug", "3", "--pin", f"3={LAST}", "--sched", "3=batch", "--qmp", guest.qmp, "--json")
        (step,) = ran.document["steps"]
        assert step["placed"] > 0
        assert (step["unplaced"], step["taken_out"]) == ("", False)
        thread = (await looked(guest))[3]
    assert thread["found"] == {"cpus": str(LAST), "scheduler": {"policy": "batch", "priority": None}}
    assert (thread["host_cpu"], thread["drifted"]) == (LAST, False)


async def test_a_map_tells_of_each_vcpu_whether_it_is_in_its_place(guest: MicroGuest) -> None:
    pins = ("--pin", f"2-3={FIRST}", "--pin", f"4={LAST}")
    ran = await run("set", "0-4", *pins, "--qmp", guest.qmp)
    assert ran.code == 0
    assert "in its place" in ran.out
    threads = await looked(guest)
    assert [is_on(threads[2], FIRST), is_on(threads[3], FIRST), is_on(threads[4], LAST)] == [True] * 3
    both = (await run("count", "6", "--pin", f"5={FIRST}", "--qmp", guest.qmp, "--json")).document
    assert [(step["ids"], step["placed"] > 0, step["unplaced"]) for step in both["steps"]] == [("5", True, "")]


async def test_what_the_host_does_not_allow_is_denied_or_told_as_the_policy_says(guest: MicroGuest) -> None:
    vm = ("--pin", f"3={NO_CPU}", "--qmp", guest.qmp)
    ran = await run("plug", "3", *vm, "--json")
    assert ran.code == 2
    assert ran.error["verdict"]["reason"] == "cannot_place"
    assert f"this host has no CPU {NO_CPU}" in ran.error["message"]
    assert "--placement preferred plugs it all the same" in ran.error["message"]
    assert (await run("set", "0-3", *vm)).code == 2
    denied = (await run("plan", "0-3", *vm, "--json")).document["denied"]
    assert [(each["ids"], each["reason"]) for each in denied] == [("3", "cannot_place")]
    warned = (await run("plan", "0-3", *vm, "--placement", "preferred", "--json")).document
    assert any(f"no CPU {NO_CPU}" in each for each in warned["warnings"])
    kept = await run("plug", "3", *vm, "--placement", "preferred")
    assert kept.code == 0
    assert "not in its place: " in kept.out
    reported = await run(
        "set", "0-4", "--pin", f"4={NO_CPU}", "--placement", "preferred", "--qmp", guest.qmp, "--json"
    )
    assert [(step["placed"], step["taken_out"]) for step in reported.document["steps"] if step["ids"] == "4"] == [
        (None, False)
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("pin 3=", "3= needs host CPUs after the ="),
        ("pin =1", "=1 names no vCPU"),
        ("pin x=1", '"x" is not a vCPU id'),
        ("pin 3", "3 names no host CPUs"),
        ("pin 3=x", "is not a set of host CPUs"),
        ("pin 3=0,^0", "no host CPU is named"),
        ("pin ^3=0", "excludes an id"),
        ("pin 3=99999", "99999"),
        ("pin 3=0 2-4=1", "vCPU 3 cannot be both on host CPUs 0 and on host CPUs 1: name it once"),
        ("pin 2=0 3=0-1 --exclusive", "vCPU 2 and vCPU 3 must not share host CPUs (exclusive), but both have 0"),
        ("pin 2=0 --emulator 0 --exclusive", "vCPU 2 and the emulator must not share host CPUs"),
        ("pin --emulator", "requires an argument"),
        ("pin 3=1 --affect config", "what keeps the next boot?"),
        ("pin --affect config --config x.xml", "what is to change?"),
        ("pin 3=1 --config x.xml", "--affect live leaves as it is"),
        ("pin --restore", "back to where?"),
        ("pin 3=1 --restore --record r.xml", "name nothing else with it"),
        ("pin --restore --affect both --record r.xml", "without --affect both"),
        ("pin 3=1 --core-scheduling some", "'none', 'vcpus', 'emulator'"),
        ("sched 3=fifo", "scheduler fifo needs a priority, such as fifo:10"),
        ("sched 3=fifo:100", "a priority is 1 to 99 (the highest), not 100"),
        ("sched 3=fifo:0", "a priority is 1 to 99 (the highest), not 0"),
        ("sched 3=batch:1", "scheduler batch has no priority"),
        ("sched 3=deadline", "is not a scheduler: use other, batch, idle"),
        ("sched 3=rr:1 3=rr:2", "vCPU 3 cannot be both scheduled as rr:1 and scheduled as rr:2"),
        ("sched 3", "3 names no scheduler"),
        ("plug 3 --pin 3=1 --pin 3=2", "vCPU 3 cannot be both on host CPUs 1 and on host CPUs 2: name it once"),
        ("plug 3 --pin 3", "3 names no host CPUs"),
        ("set 0-3 --sched 3=fifo", "needs a priority"),
        ("count 3 --placement always", "'required', 'preferred'"),
        ("set 0 --placement preferred --affect config --config x.xml", "--placement is about the running VM"),
        ("plan 0-3 --pin 2-3=0 --exclusive", "both have 0"),
        ("fleet set 0-3 --pin 3=1", "No such option"),
    ],
)
def test_bad_words_are_told_and_nothing_is_sent(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMPVCPU_QMP", "/nonexistent/vm.qmp")
    assert main(["--json", *arguments.split()]) == 2
    ran = Ran(2, capsys.readouterr().out, "", command_of(arguments.split()))
    assert words in ran.error["message"]


async def test_a_vcpu_that_is_not_there_is_told(guest: MicroGuest) -> None:
    vm = ("--qmp", guest.qmp, "--json")
    beyond = await run("pin", f"9={FIRST}", *vm)
    assert (beyond.code, beyond.error["reason"]) == (2, "unknown_vcpu")
    assert "this machine has vCPUs 0-7" in beyond.error["message"]
    absent = await run("pin", f"5={FIRST}", *vm)
    assert absent.code == 2
    assert "vCPU 5: not plugged, and without --record nothing keeps its place" in absent.error["message"]
    some = await run("pin", f"1={FIRST}", f"5={FIRST}", "--qmp", guest.qmp)
    assert some.code == 0
    assert "vCPU 5: not plugged" in some.err
    nowhere = await run("pin", f"1={NO_CPU}", *vm)
    assert (nowhere.code, nowhere.error["reason"]) == (2, "cannot_place")
    assert is_on((await looked(guest))[1], FIRST)
    assert (await run("plug", "3", "--pin", f"9={FIRST}", *vm)).code == 2


@asynccontextmanager
async def passed_on(guest: MicroGuest) -> AsyncIterator[str]:
    """A TCP address at which this process passes on what the VM says, as for a VM on another host."""

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
        sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_unix_connection(guest.qmp)
        await asyncio.gather(copy(reader, inner[1]), copy(inner[0], writer))

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        yield f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_qemu_on_another_host_is_told_and_the_rest_works(guest: MicroGuest) -> None:
    async with passed_on(guest) as address:
        shown = await run("pin", "--json", "--qmp", address)
        assert (shown.code, shown.error["kind"]) == (2, "PlacementError")
        assert "on QEMU's host" in shown.error["message"]
        moved = await run("pin", f"1={FIRST}", "--json", "--qmp", address)
        assert (moved.code, moved.error["reason"]) == (2, "cannot_place")
        denied = await run("plug", "3", "--pin", f"3={FIRST}", "--json", "--qmp", address)
        assert (denied.code, denied.error["reason"]) == (2, "cannot_place")
        listed = await run("list", "--host", "--qmp", address)
        assert listed.code == 0
        assert "where the vCPU threads run is not known" in listed.err
        doctor = await run("doctor", "--json", "--qmp", address, env=environment(PATH="/nowhere"))
        (finding,) = [each for each in doctor.document["findings"] if each["subject"] == "threads"]
        assert (finding["level"], "placement.md" in finding["advice"]) == ("note", True)


async def run_below(*before: str, words: tuple[str | Path, ...]) -> Ran:
    """Run a command in a process of its own that *before* has started with less than this one may."""
    argv = [*before, sys.executable, "-m", "qmpvcpu", *map(str, words)]
    process = await asyncio.create_subprocess_exec(
        *argv, env=environment(QMPVCPU_CACHE="/nowhere"), stdout=-1, stderr=-1
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode(), command_of(words))


@ONLY_ROOT
async def test_fifo_without_permission_is_denied_with_what_it_takes(tmp_path: Path) -> None:
    less = ("setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice")
    qemu = tmp_path / "qemu"
    qemu.write_text(f'#!/bin/sh\nexec {" ".join(less)} {best_qemu()} "$@"\n')
    qemu.chmod(0o755)
    async with MicroGuest(qemu, accel="tcg", boot=2) as guest:
        for words in (("sched", "1=fifo:10"), ("plug", "3", "--sched", "3=fifo:10")):
            ran = await run_below(*less, words=(*words, "--qmp", guest.qmp, "--json"))
            assert (ran.code, ran.error["reason"]) == (2, "cannot_place")
            assert "a real-time priority of 10 is not allowed here, none may be set" in ran.error["message"]
            assert "LimitRTPRIO=" in ran.error["message"]
        ran = await run_below(*less, words=("pin", f"1={LAST}", "--qmp", guest.qmp, "--json"))
        assert is_on(threads_of(ran)[1], LAST)
        assert ran.document["enabled"] == "0-1"


@ONLY_ROOT
async def test_another_user_is_told_that_the_threads_are_not_his(guest: MicroGuest) -> None:
    for path in (guest.qmp, *guest.qmp.parents):
        if path != Path("/"):
            path.chmod(path.stat().st_mode | 0o007)
    nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    ran = await run_below(*nobody, words=("pin", f"1={LAST}", "--qmp", guest.qmp, "--json"))
    assert (ran.code, ran.error["reason"]) == (2, "cannot_place")
    assert "run as QEMU's user (uid 0), or with CAP_SYS_NICE" in ran.error["message"]
    hidden = ("unshare", "--mount", "sh", "-ec", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh", *nobody)
    for words in (("pin",), ("plug", "3", "--pin", f"3={LAST}")):
        ran = await run_below(*hidden, words=(*words, "--qmp", guest.qmp, "--json"))
        assert ran.code == 2
        assert "hidepid" in ran.error["message"]
    doctor = await run_below(*hidden, words=("doctor", "--qmp", guest.qmp, "--json"))
    (finding,) = [each for each in doctor.document["findings"] if each["subject"] == "threads"]
    assert "hidepid" in finding["found"]


async def test_list_has_columns_for_threads_where_they_are_asked_for(guest: MicroGuest) -> None:
    assert (await run("pin", f"1={LAST}", "--qmp", guest.qmp)).code == 0
    plain = await run("list", "--qmp", guest.qmp)
    assert "host CPUs" not in plain.out
    assert "threads" not in (await run("list", "--json", "--qmp", guest.qmp)).document
    asked = await run("list", "--host", "--qmp", guest.qmp)
    rows = [line.split() for line in asked.out.splitlines()]
    assert next(row for row in rows if row[:1] == ["1"])[-3:-1] == [str(LAST), "other"]
    document = await run("list", "--host", "--json", "--qmp", guest.qmp)
    assert document.document["host_error"] is None
    assert is_on(threads_of(document)[1], LAST)


async def test_doctor_tells_what_the_host_allows(guest: MicroGuest) -> None:
    ran = await run("doctor", "--json", "--qmp", guest.qmp, env=environment(PATH="/nowhere"))
    found = [each["found"] for each in ran.document["findings"] if each["subject"] == "threads"]
    assert found[0].startswith("they can be found, and moved on host CPUs ")


def test_a_thread_that_was_moved_is_the_work_of_no_client_of_qemu() -> None:
    moved = PlaceDrifted(
        generation=1, origin=Origin.OTHER, ids=VcpuMap([1]), wanted=Place.on("0"), found=Place.on("1", "batch")
    )
    assert told(moved) == "vCPU 1 has drifted to host CPUs 1, batch; its place is host CPUs 0"
    assert told(VcpuPlugged(generation=1, origin=Origin.OTHER, ids=VcpuMap([1]))).endswith("(by another client)")


async def test_watch_begins_with_where_threads_run(guest: MicroGuest) -> None:
    ran = await run("watch", "--for", "0.2", "--host", "--json", "--qmp", guest.qmp)
    assert {each["vcpu"] for each in ran.documents[0]["threads"] if each["kind"] == "vcpu"} == {0, 1}


async def test_doctor_advises_to_restore_only_what_the_host_allows(guest: MicroGuest, tmp_path: Path) -> None:
    vm = ("--record", tmp_path / "vm.xml", "--qmp", guest.qmp)
    assert (await run("plug", "3", "--pin", f"3={NO_CPU}", "--placement", "preferred", *vm)).code == 0
    doctor = await run("doctor", "--json", *vm, env=environment(PATH="/nowhere"))
    (told_of_it,) = [each for each in doctor.document["findings"] if each["found"].startswith("vCPU 3 has drifted")]
    assert told_of_it["advice"].startswith(f"it cannot be put there: this host has no CPU {NO_CPU}")


async def test_to_restore_takes_a_record_that_is_there(guest: MicroGuest, tmp_path: Path) -> None:
    ran = await run("pin", "--restore", "--json", "--record", tmp_path / "no.xml", "--qmp", guest.qmp)
    assert (ran.code, list(tmp_path.iterdir())) == (4, [])
    assert "there is no record of that name" in ran.error["message"]


async def test_a_pin_that_would_have_no_effect_is_no_change(guest: MicroGuest) -> None:
    vm = ("--qmp", guest.qmp)
    told = (
        "vCPU 5: not plugged, and without --record nothing keeps its place: --pin and --sched are for what is plugged"
    )
    for words in (["plug", "3"], ["plug"], ["set", "0-3"], ["count", "3"]):
        ran = await run(*words, "--pin", f"5={FIRST}", *vm)
        assert (ran.code, told in ran.err) == (2, True), words
    some = await run("plug", "2", "--pin", f"2,5={FIRST}", *vm)
    assert (some.code, "vCPU 5: not plugged, and without" in some.err) == (0, True)
    assert is_on((await looked(guest))[2], FIRST)


async def test_the_first_free_vcpu_is_the_one_that_is_plugged_without_an_id(guest: MicroGuest) -> None:
    ran = await run("plug", "--pin", f"2={FIRST}", "--qmp", guest.qmp)
    assert (ran.code, ran.err) == (0, "")
    assert is_on((await looked(guest))[2], FIRST)


async def test_that_vcpus_which_were_there_could_not_be_moved_is_told(guest: MicroGuest) -> None:
    pins = ("--pin", f"0={FIRST}", "--pin", f"1={NO_CPU}", "--pin", f"2={LAST}", "--placement", "preferred")
    ran = await run("set", "0-2", *pins, "--qmp", guest.qmp)
    assert ran.code == 0
    assert "vCPU 0: already plugged, and moved to where --pin and --sched say" in ran.err
    assert "vCPU 1: already plugged, but not moved to where --pin and --sched say" in ran.err
    threads = await looked(guest)
    assert (is_on(threads[0], FIRST), is_on(threads[1], FIRST), is_on(threads[2], LAST)) == (True, False, True)


async def test_that_vcpus_which_were_there_are_moved_is_told(guest: MicroGuest) -> None:
    told_so = "vCPU 1: already plugged, and moved to where --pin and --sched say"
    plugged = await run("plug", "3", "--pin", f"1={LAST}", "--qmp", guest.qmp)
    assert (plugged.code, told_so in plugged.err) == (0, True)
    reached = await run("set", "0-4", "--pin", f"1,4={FIRST}", "--qmp", guest.qmp)
    assert (reached.code, told_so in reached.err) == (0, True)
    assert "already" not in (await run("set", "0-5", "--pin", f"5={FIRST}", "--qmp", guest.qmp)).err


async def test_a_record_remembers_and_what_drifted_is_told_everywhere_and_put_back(
    guest: MicroGuest, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    vm = ("--record", record, "--qmp", guest.qmp)
    assert (await run("pin", f"1={LAST}", f"3={FIRST}", *vm)).code == 0
    born = await run("plug", "3", *vm)
    assert f"on host CPUs {FIRST}" in born.out
    threads = threads_of(await run("pin", "--json", *vm))
    assert (is_on(threads[3], FIRST), threads[1]["drifted"]) == (True, False)
    os.sched_setaffinity(threads[1]["tid"], {FIRST})
    found = f"vCPU 1 has drifted to host CPUs {FIRST}, other; its place is host CPUs {LAST}"
    listed = await run("list", "--json", *vm)
    assert [vcpu for vcpu, thread in threads_of(listed).items() if thread["drifted"]] == [1]
    assert f"{FIRST}, not {LAST}" in (await run("list", *vm)).out
    assert found in (await run("watch", "--for", "0", *vm)).out
    doctor = await run("doctor", "--json", *vm, env=environment(PATH="/nowhere"))
    (told,) = [each for each in doctor.document["findings"] if each["found"] == found]
    assert (told["level"], told["advice"]) == (
        "warning",
        f"qmpvcpu pin --restore --record {record} --qmp {guest.qmp}",
    )
    restored = threads_of(await run("pin", "--restore", "--json", *vm))
    assert (is_on(restored[1], LAST), restored[1]["drifted"]) == (True, False)


async def test_watch_tells_whose_thread_was_moved(guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    assert (await run("pin", f"1={LAST}", "--record", record, "--qmp", guest.qmp)).code == 0
    thread = (await looked(guest))[1]
    words = ("watch", "--for", "8", "--json", "--record", record, "--qmp", guest.qmp)
    async with running(*words) as watching:
        assert watching.process.stdout is not None
        await watching.process.stdout.readline()
        os.sched_setaffinity(thread["tid"], {FIRST})
        ran = await watching.end()
    (moved,) = [each for each in ran.documents if each.get("event") == "PlaceDrifted"]
    assert (moved["ids"], moved["wanted"]["cpus"], moved["found"]["cpus"]) == ("1", str(LAST), str(FIRST))


async def test_a_record_that_says_nothing_cannot_be_restored(guest: MicroGuest, tmp_path: Path) -> None:
    vm = ("--record", tmp_path / "vm.xml", "--qmp", guest.qmp)
    assert (await run("plug", "3", *vm)).code == 0
    ran = await run("pin", "--restore", *vm, "--json")
    assert (ran.code, "has no placement" in ran.error["message"]) == (2, True)


DOCUMENT = """<domain type="kvm"><name>web1</name><memory>1048576</memory><vcpu current="1">4</vcpu>
<os><type arch="x86_64">hvm</type></os></domain>"""


async def test_where_the_next_boot_runs_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.write_text(DOCUMENT)
    assert "  place" not in (await run("config", path)).out
    config = ("--affect", "config", "--config", path)
    assert (await run("pin", "1-2=0", "--emulator", "0-1", *config)).code == 0
    assert (await run("sched", "2=fifo:5", *config)).code == 0
    shown = [" ".join(line.split()) for line in (await run("config", path)).out.splitlines()]
    assert shown == [
        "web1 next boot: 1 of 4 vCPUs: 0",
        "QEMU's other threads: host CPUs 0-1",
        "",
        "vCPU next boot order place",
        "0 on anywhere",
        "1 off host CPUs 0",
        "2 off host CPUs 0, fifo:5",
        "3 off anywhere",
    ]


async def test_the_next_boot_is_placed_without_the_vm(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.write_text(DOCUMENT)
    config = ("--affect", "config", "--config", path)
    ran = await run("pin", f"1-2={NO_CPU}", "--emulator", "0", *config, "--json")
    assert ran.document["changes"] == [f"vCPU 1-2: host CPUs {NO_CPU}", "emulator threads: host CPUs 0"]
    assert (await run("sched", "1=fifo:3", *config)).out.count(f"vCPU 1: host CPUs {NO_CPU}, fifo:3") == 1
    assert "cpuset='4000'" in path.read_text()
    beyond = await run("pin", "9=0", *config, "--json")
    assert beyond.code == 2
    denied = "placement of vCPU 9 at the next boot denied, nothing was changed: the document has vCPUs 0 to 3"
    assert denied in beyond.error["message"]
    overlap = await run("pin", f"3={NO_CPU}", "--exclusive", *config, "--json")
    assert (overlap.code, "must not share host CPUs" in overlap.error["message"]) == (2, True)
    planned = await run("plan", "0-3", "--pin", "3=1", *config, "--json")
    assert "vCPU 3: host CPUs 1" in planned.document["changes"]
    assert (await run("plug", "3", "--pin", "3=1", *config)).code == 0
    assert "<vcpupin vcpu='3' cpuset='1'/>" in path.read_text()


async def test_both_the_vm_and_its_next_boot_are_placed(guest: MicroGuest, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    vm = ("--affect", "both", "--config", path, "--qmp", guest.qmp)
    assert (await run("xml", "-o", path, "--qmp", guest.qmp)).code == 0
    pinned = await run("pin", f"1={LAST}", *vm, "--json")
    assert (pinned.code, pinned.document["affect"]) == (0, "both")
    assert is_on(threads_of(pinned)[1], LAST)
    changed = await run("set", "0-2", "--pin", f"2={FIRST}", *vm, "--json")
    assert changed.document["config"]["outcome"] == "written"
    assert is_on((await looked(guest))[2], FIRST)
    assert [
        f"<vcpupin vcpu='{vcpu}' cpuset='{cpu}'/>" in path.read_text() for vcpu, cpu in ((1, LAST), (2, FIRST))
    ] == [
        True,
        True,
    ]


async def test_a_document_taken_over_from_libvirt_says_where_a_plugged_vcpu_runs(
    guest: MicroGuest, tmp_path: Path
) -> None:
    base = tmp_path / "libvirt.xml"
    assert (await run("xml", "-o", base, "--qmp", guest.qmp)).code == 0
    tuned = f"<cputune><vcpupin vcpu='3' cpuset='{LAST}'/><vcpusched vcpus='3' scheduler='batch'/></cputune><os>"
    base.write_text(base.read_text().replace("<os>", tuned))
    ran = await run("plug", "3", "--record", tmp_path / "vm.xml", "--base", base, "--qmp", guest.qmp)
    assert f"on host CPUs {LAST}, batch" in ran.out
    assert is_on((await looked(guest))[3], LAST)


@pytest.mark.parametrize("columns", [40, 80])
async def test_a_terminal_shows_the_columns_of_threads(guest: MicroGuest, columns: int) -> None:
    async with on_terminal("list", "--host", "--qmp", str(guest.qmp), columns=columns, lines=60) as it:
        assert await it.end() == 0
    shown = " ".join(str(it.screen).split())
    assert "other" in shown
    assert "…" not in shown


async def test_a_record_of_our_own_sends_no_other_vcpu_out_of_where_qemu_was_started(
    guest: MicroGuest, tmp_path: Path
) -> None:
    started = ("pin", f"0-1={FIRST}", "--emulator", str(FIRST))  # as with taskset
    assert (await run(*started, "--qmp", guest.qmp)).code == 0
    vm = ("--record", tmp_path / "vm.xml", "--qmp", guest.qmp)
    assert (await run("pin", f"1={FIRST}", *vm)).code == 0
    assert (await run("plug", "3", *vm)).code == 0
    threads = threads_of(await run("pin", "--json", *vm))
    assert [is_on(threads[vcpu], FIRST) for vcpu in (0, 1, 3)] == [True] * 3
    assert not any(thread["drifted"] for thread in threads.values())


async def test_a_change_that_is_denied_moves_no_thread(guest: MicroGuest) -> None:
    vm = ("--qmp", guest.qmp, "--json")
    for words in (
        ("set", "0-3", "--pin", f"1={FIRST}", "--pin", f"3={NO_CPU}"),
        ("set", "0-9", "--pin", f"1={FIRST}"),
        ("count", "0", "--pin", f"1={FIRST}"),
        ("plug", "1", "--pin", f"1={FIRST}"),
    ):
        assert (await run(*words, *vm)).code == 2
    assert os.sched_getaffinity((await looked(guest))[1]["tid"]) == set(HERE)
    assert (await run("set", "0-2", "--pin", f"1={FIRST}", *vm)).code == 0
    assert is_on((await looked(guest))[1], FIRST)


async def test_threads_that_are_not_one_a_vcpu_are_told() -> None:
    single = MicroGuest(accel="tcg,thread=single", boot=2)  # type: ignore[arg-type]  # an option rides along
    async with single as guest:
        ran = await run("pin", f"1={FIRST}", "--qmp", guest.qmp, "--json")
    assert (ran.code, ran.error["reason"]) == (2, "cannot_place")
    assert "one host thread runs all vCPUs" in ran.error["message"]


async def test_a_qemu_in_a_pid_namespace_of_its_own_is_placed(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    root = "" if os.geteuid() == 0 else "--map-root-user"
    qemu.write_text(f'#!/bin/sh\nexec unshare {root} --pid --fork --kill-child {best_qemu()} "$@"\n')
    qemu.chmod(0o755)
    async with MicroGuest(qemu, accel="tcg", boot=2) as guest:
        ran = await run("plug", "3", "--pin", f"3={LAST}", "--qmp", guest.qmp)
        assert f"on host CPUs {LAST}" in ran.out
        assert is_on((await looked(guest))[3], LAST)


async def test_a_qemu_that_is_stopped_is_told_by_its_deadline(guest: MicroGuest) -> None:
    guest.process.kill(signal.SIGSTOP)
    try:
        ran = await run("pin", f"1={FIRST}", "--reply-timeout", "0.5", "--json", "--qmp", guest.qmp)
    finally:
        guest.process.kill(signal.SIGCONT)
    assert ran.code == 3
    assert "stopped" in ran.error["message"]


async def test_vcpus_that_are_plugged_complete_with_their_sign(guest: MicroGuest) -> None:
    words = ["qmpvcpu", "pin", ""]
    env = environment(
        _QMPVCPU_COMPLETE="fish_complete", COMP_WORDS=" ".join(words), COMP_CWORD="", QMPVCPU_QMP=str(guest.qmp)
    )
    ran = await run(env=env)
    offered = [line.split(",", 1)[1].split("\t")[0] for line in ran.out.splitlines() if line.startswith("plain,")]
    assert offered == ["0=", "1="]


# A host that changes its mind between the plug and the moment in which its thread is put in its place.
REFUSING = """
import qmpvcpu.vm.placing
why = "the host has changed its mind"
qmpvcpu.vm.placing.Placer.place = lambda self, slots, *_: {slot.first: why for slot in slots}
"""


async def test_a_vcpu_that_could_not_be_placed_after_all_is_taken_out_or_kept_as_the_policy_says(
    guest: MicroGuest,
) -> None:
    vm = ("--sched", "2-4=batch", "--qmp", guest.qmp)
    out = await run("plug", "3", *vm, "--json", code=REFUSING)
    assert (out.code, out.error["kind"], out.error["taken_out"]) == (1, "PlacementError", True)
    (step,) = out.document["steps"]
    assert (step["placed"], step["unplaced"], step["taken_out"]) == (None, "the host has changed its mind", True)
    assert out.document["enabled"] == "0-1"
    told = await run("plug", "3", *vm, code=REFUSING)
    assert "the host has changed its mind; it was taken out again" in told.err
    report = await run("set", "0-3", *vm, code=REFUSING)
    assert report.code == 1
    assert "taken out" in report.out
    assert "(not in its place: the host has changed its mind)" in report.err
    kept = await run("set", "0-2", "--placement", "preferred", *vm, "--json", code=REFUSING)
    assert [(step["unplaced"], step["taken_out"]) for step in kept.document["steps"]] == [
        ("the host has changed its mind", False)
    ]
    assert (kept.code, kept.document["enabled"]) == (0, "0-2")


async def test_sets_overlap_also_with_those_of_the_record(guest: MicroGuest, tmp_path: Path) -> None:
    vm = ("--record", tmp_path / "vm.xml", "--qmp", guest.qmp, "--json")
    assert (await run("pin", f"1={FIRST}", *vm)).code == 0
    for words in (
        ("pin", f"3={FIRST}"),
        ("plug", "3", "--pin", f"3={FIRST}"),
        ("plan", "0-3", "--pin", f"3={FIRST}"),
    ):
        ran = await run(*words, "--exclusive", *vm)
        assert (ran.code, "vCPU 1 and vCPU 3" in ran.error["message"]) == (2, True)
    assert (await run("list", *vm)).document["enabled"] == "0-1"


async def test_watch_tells_that_a_vcpu_was_plugged_into_its_place(guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    vm = ("--record", record, "--qmp", guest.qmp)
    assert (await run("pin", f"3={FIRST}", *vm)).code == 0
    watched = ("watch", "--until", "0-1,3", "--for", "20", "--json", "--record", record, "--qmp", guest.sockets[1])
    async with running(*watched) as watching:
        assert watching.process.stdout is not None
        await watching.process.stdout.readline()
        assert (await run("plug", "3", *vm)).code == 0
        ran = await watching.end()
    assert (ran.code, ran.documents[-1]["enabled"]) == (0, "0-1,3")


async def test_the_live_table_shows_where_threads_run_and_who_was_moved(guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    assert (await run("pin", f"1={LAST}", "--record", record, "--qmp", guest.qmp)).code == 0
    thread = (await looked(guest))[1]
    async with on_terminal("watch", "--record", str(record), "--qmp", str(guest.qmp), columns=100) as it:
        await it.wait_on_screen("last on")
        os.sched_setaffinity(thread["tid"], {FIRST})
        await it.wait_on_screen(f"{FIRST}, not {LAST}")
        await it.wait_on_screen(f"its place is host CPUs {LAST}")
        it.process.send_signal(signal.SIGINT)
        assert await it.end() == 0


async def test_a_fleet_takes_its_pins_from_the_records_and_the_policy_from_the_line(
    guest: MicroGuest, tmp_path: Path
) -> None:
    name = f"{str(guest.qmp).strip('/').replace('/', '-')}.xml"
    assert (await run("pin", f"3={FIRST}", "--record", tmp_path / name, "--qmp", guest.qmp)).code == 0
    fleet = ("--record", tmp_path, "--qmp", guest.qmp, "--json")
    placed = await run("fleet", "set", "0-1,3", *fleet)
    assert placed.code == 0
    (step,) = placed.document["vms"][0]["steps"]
    assert (step["ids"], step["placed"] > 0) == ("3", True)
    assert is_on((await looked(guest))[3], FIRST)
    record = tmp_path / name
    record.write_text(record.read_text().replace("</cputune>", f"<vcpupin vcpu='4' cpuset='{NO_CPU}'/></cputune>"))
    assert (await run("fleet", "set", "0-1,3-4", *fleet)).code == 2
    kept = await run("fleet", "set", "0-1,3-4", "--placement", "preferred", *fleet)
    assert kept.code == 0
    assert f"{NO_CPU}" in kept.document["vms"][0]["steps"][0]["unplaced"]
    assert (await run("fleet", "count", "3", "--placement", "preferred", *fleet)).code == 0


async def test_replay_puts_what_it_plugs_in_its_place(guest: MicroGuest, tmp_path: Path) -> None:
    assert (await run("set", "0-1,3", "--qmp", guest.qmp)).code == 0
    assert (await run("export", "-o", tmp_path / "vm.json", "--qmp", guest.qmp)).code == 0
    async with MicroGuest(boot=2) as other:
        async with qmpvcpu.attach(other.sockets[1]) as vm:
            await vm.run_control.pause()
        ran = await run("replay", tmp_path / "vm.json", "--pin", f"3={LAST}", "--qmp", other.qmp, "--json")
        assert ran.code == 0
        assert is_on((await looked(other))[3], LAST)


async def test_a_priority_of_the_document_that_no_kernel_has_is_not_said_of_exclusive(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    sched = "<cputune><vcpusched vcpus='1' scheduler='fifo' priority='200'/></cputune>"
    path.write_text(f"<domain type='kvm'><name>a</name><vcpu>4</vcpu>{sched}</domain>")
    ran = await run("pin", "0=1", "--affect", "config", "--config", path)
    assert ran.code == 2
    assert "priority" in ran.err
    assert "--exclusive" not in ran.err
