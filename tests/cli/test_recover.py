import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import run, running

pytestmark = pytest.mark.qemu


@contextlib.asynccontextmanager
async def killed(record: Path, *options: str) -> AsyncIterator[MicroGuest]:
    """A guest at 0-1,6 whose way to 0,2 ended with SIGKILL: 2 is in, the guest works on 6, 1 was not asked for."""
    async with MicroGuest(boot=[0, 1, 6], behaviour=Behaviour.hanging()) as guest:
        words = ("set", "0,2", "--in-flight", "1", *options)
        async with running(*words, "--record", record, "--qmp", guest.qmp) as it:
            await it.wait_said("vCPU 6: the guest works on it")
            it.process.send_signal(signal.SIGKILL)
            assert await it.process.wait() == -signal.SIGKILL
        yield guest


async def test_what_was_wanted_is_known_after_a_kill_and_nothing_is_done_about_it(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with killed(record, "--timeout", "7") as guest:
        ran = await run("recover", "--record", record, "--json", "--qmp", guest.qmp)
        assert ran.code == 1
        intent = ran.document["interrupted"]
        assert (intent["start"], intent["target"], intent["on_failure"]) == ("0-1,6", "0,2", "stop")
        assert (intent["timeout"], intent["direction"]) == (7.0, "forward")
        assert [(step["action"], step["ids"]) for step in intent["steps"]] == [
            ("plug", "2"),
            ("unplug", "6"),
            ("unplug", "1"),
        ]
        assert ran.document["outcome"] == "partial"
        assert {step["ids"]: step["verdict"] and step["verdict"]["kind"] for step in ran.document["steps"]} == {
            "2": "plugged",
            "6": "pending",
            "1": None,
        }
        assert (ran.document["enabled"], ran.document["pending"]) == ("0-2,6", "6")
        shown = await run("recover", "--record", record, "--qmp", guest.qmp)
        assert shown.code == 1
        assert "interrupted: vCPUs 0-1,6 to 0,2, on failure stop, 7 s for each answer, forward" in shown.out
        assert "plug 2, unplug 6, unplug 1" in shown.out
        assert "recover --finish, or --revert" in shown.err


async def test_it_is_finished_without_asking_twice(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with killed(record) as guest:
        async with running(
            "recover", "--finish", "--record", record, "--json", "--verbose", "--qmp", guest.qmp
        ) as it:
            await it.wait_said("of 2: ")
            await guest.set_behaviour(Behaviour.complying())
            ran = await it.end()
        assert ran.code == 0
        assert (ran.document["outcome"], ran.document["enabled"]) == ("reached", "0,2")
        assert ran.document["interrupted"]["target"] == "0,2"
        assert ran.err.count('"execute": "device_del"') <= 1
        after = await run("recover", "--record", record, "--qmp", guest.qmp)
        assert (after.code, after.out.splitlines()[0]) == (0, "nothing was interrupted")


async def test_it_is_reverted_and_a_vcpu_that_leaves_meanwhile_is_put_back(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with killed(record) as guest:
        await guest.set_behaviour(Behaviour.complying())
        ran = await run("recover", "--revert", "--record", record, "--json", "--qmp", guest.qmp)
        assert ran.code == 0
        assert (ran.document["outcome"], ran.document["enabled"]) == ("reverted", "0-1,6")
        after = await run("recover", "--record", record, "--json", "--qmp", guest.qmp)
        assert (after.code, after.document["interrupted"]) == (0, None)


async def test_what_ended_well_by_itself_leaves_nothing_to_do(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with MicroGuest(boot=[0, 1, 6], behaviour=Behaviour.hanging()) as guest:
        async with running("set", "0-1", "--record", record, "--qmp", guest.qmp) as it:
            await it.wait_said("vCPU 6: the guest works on it")
            it.process.send_signal(signal.SIGKILL)
            await it.process.wait()
        await guest.set_behaviour(Behaviour.complying())
        async with qmpvcpu.attach(guest.qmp) as vm:
            await vm.wait_for(lambda layout: 6 not in layout.enabled, timeout=10)
        ran = await run("recover", "--record", record, "--json", "--qmp", guest.qmp)
    assert ran.code == 0
    assert ran.document["outcome"] == "reached"
    assert ran.document["interrupted"]["target"] == "0-1"


async def test_a_refusal_while_finishing_is_reported_as_ever(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with killed(record) as guest:
        await guest.set_behaviour(Behaviour.refusing(0x81))
        ran = await run("recover", "--finish", "--record", record, "--json", "--qmp", guest.qmp)
    assert ran.code == 1
    assert ran.document["outcome"] == "partial"
    assert ran.document["interrupted"]["target"] == "0,2"
    assert "refused" in {step["verdict"]["kind"] for step in ran.document["steps"] if step["verdict"]}


async def test_a_new_wish_gives_up_the_interrupted_one_and_says_so(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    async with killed(record) as guest:
        await guest.set_behaviour(Behaviour.complying())
        ran = await run("set", "0-2,6", "--record", record, "--qmp", guest.qmp)
        assert ran.code == 0
        assert "given up for this: interrupted: vCPUs 0-1,6 to 0,2" in ran.err
        assert (await run("recover", "--record", record, "--json", "--qmp", guest.qmp)).document[
            "interrupted"
        ] is None


async def test_a_record_that_another_process_keeps_names_it(guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    await guest.set_behaviour(Behaviour.hanging())
    async with running("set", "0", "--record", record, "--qmp", guest.sockets[1]) as keeper:
        await keeper.wait_said("the guest works on it")
        for command in (("set", "0-3"), ("recover",)):
            ran = await run(*command, "--record", record, "--json", "--qmp", guest.qmp)
            assert ran.code == 4, command
            assert ran.error["kind"] == "RecordLockedError"
            assert ran.error["pid"] == keeper.process.pid
            assert str(keeper.process.pid) in ran.error["message"]


async def test_what_a_revert_has_left_pending_is_named_where_nothing_is_left_to_finish(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    behaviours = [Behaviour.refusing(0x82).for_slot(1), Behaviour.silent()]
    async with MicroGuest(boot=[0, 1, 6], behaviour=behaviours) as guest:
        vm = ("--record", record, "--qmp", guest.qmp)
        left = await run("set", "0", "--on-failure", "revert", "--timeout", "0.5", "--json", *vm)
        assert (left.code, left.document["outcome"], left.document["pending"]) == (1, "revert_incomplete", "6")
        for how, code in ((), 0), (("--finish",), 1), (("--revert",), 1):
            ran = await run("recover", *how, *vm)
            assert ran.code == code
            assert ran.out.startswith("nothing was interrupted\n")
            assert "the removal of vCPU 6 was requested, and the guest has not answered yet" in ran.err
            assert "qmpvcpu unplug 6 (asks again only if the guest does not work on it)" in ran.err
            assert f"to keep vCPU 6: qmpvcpu set {left.document['enabled']}, which plugs again what leaves" in ran.err


async def test_a_record_that_is_not_there_says_nothing_of_what_was_wanted(guest: MicroGuest, tmp_path: Path) -> None:
    ran = await run("recover", "--record", tmp_path / "mistyped.xml", "--json", "--qmp", guest.qmp)
    assert ran.code == 4
    assert "there is no record of that name" in ran.error["message"]
    assert [*tmp_path.iterdir()] == []


async def test_what_was_sent_and_never_answered_is_not_called_unsent(tmp_path: Path) -> None:
    async with killed(tmp_path / "vm.xml") as guest:
        shown = await run("recover", "--record", tmp_path / "vm.xml", "--qmp", guest.qmp)
    assert "not sent" not in shown.out
    assert "not done" in shown.out
