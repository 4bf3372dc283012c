import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpvcpu import OnFailure
from qmpvcpu.cli import main
from qmpvcpu.cli.failures import failure
from qmpvcpu.cli.reports import report_blocks, shortcoming
from qmpvcpu.cli.run import Options, Shell
from qmpvcpu.errors import TransitionError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import Action, StepReport, TransitionOutcome, TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Unknown
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.cli.running import Ran, run, running, said
from tests.exchange import exchange
from tests.layouts import layout

pytestmark = pytest.mark.qemu


@pytest.fixture
async def story() -> AsyncIterator[MicroGuest]:
    """A micro-guest at 0-1,6 of 8."""
    async with MicroGuest(boot=[0, 1, 6]) as guest:
        yield guest


def verdicts(ran: Ran) -> dict[str, tuple[str, str | None, bool | None]]:
    """What was done to each slot, how it ended, and whether it was undone."""
    ended = {step["ids"]: step["verdict"] and step["verdict"]["kind"] for step in ran.document["steps"]}
    return {step["ids"]: (step["action"], ended[step["ids"]], step["undone"]) for step in ran.document["steps"]}


async def test_set_makes_exactly_these_vcpus_plugged_and_is_content_when_they_are(story: MicroGuest) -> None:
    ran = await run("set", "0,2-5", "--json", "--qmp", story.qmp)
    assert ran.code == 0
    document = ran.document
    assert (document["outcome"], document["max"], document["enabled"], document["pending"]) == (
        "reached",
        8,
        "0,2-5",
        "",
    )
    assert list(verdicts(ran)) == ["2", "3", "4", "5", "6", "1"]
    assert {verdict for _, verdict, _ in verdicts(ran).values()} == {"plugged", "unplugged"}
    again = await run("set", "0,2-5", "--json", "--qmp", story.qmp)
    assert (again.code, again.document["outcome"], again.document["steps"]) == (0, "reached", [])


async def test_the_document_of_a_set_is_the_report_whole(story: MicroGuest) -> None:
    ran = await run("set", "0,2-5", "--json", "--qmp", story.qmp)
    report = TransitionReport.from_json(ran.out)
    assert report.outcome is TransitionOutcome.REACHED
    assert report.on_failure is OnFailure.STOP
    assert str(report.layout.enabled) == ran.document["enabled"]


async def test_people_see_a_row_for_each_slot_and_the_map(story: MicroGuest) -> None:
    await story.set_behaviour(Behaviour.refusing(0x82).for_slot(1))
    ran = await run("set", "0,2-5", "--on-failure", "revert", "--qmp", story.qmp)
    assert ran.code == 1
    head, columns, *rows, last = ran.out.splitlines()
    assert head.startswith("REVERTED in ")
    assert head.endswith(": wanted was 0-1,6 -> 0,2-5")
    assert columns.split() == ["action", "vCPU", "verdict", "time", "undone", "why"]
    assert [row.split()[:3] for row in rows] == [
        ["plug", "2", "PLUGGED"],
        ["plug", "3", "PLUGGED"],
        ["plug", "4", "PLUGGED"],
        ["plug", "5", "PLUGGED"],
        ["unplug", "6", "UNPLUGGED"],
        ["unplug", "1", "REFUSED"],
    ]
    assert [row.split()[5] for row in rows[:5]] == ["yes"] * 5
    assert "the guest refused: device is busy (OST status 0x82)" in rows[5]
    assert last == "[0][1][ ][ ][ ][ ][6][ ]  plugged 0-1,6"
    assert ran.err == "qmpvcpu: 0,2-5 not reached (reverted): 1 REFUSED\n"


async def test_stop_asks_for_nothing_more_after_a_refusal(story: MicroGuest) -> None:
    await story.set_behaviour(Behaviour.refusing(0x82).for_slot(6))
    ran = await run("set", "0,2", "--in-flight", "1", "--json", "--qmp", story.qmp)
    assert ran.code == 1
    assert ran.error["kind"] == "TransitionError"
    assert ran.document["outcome"] == "partial"
    assert verdicts(ran) == {
        "2": ("plug", "plugged", None),
        "6": ("unplug", "refused", None),
        "1": ("unplug", None, None),
    }
    assert ran.document["enabled"] == "0-2,6"


async def test_continue_does_the_others_all_the_same(story: MicroGuest) -> None:
    await story.set_behaviour(Behaviour.refusing(0x82).for_slot(6))
    ran = await run("set", "0,2", "--on-failure", "continue", "--in-flight", "1", "--json", "--qmp", story.qmp)
    assert ran.code == 1
    assert ran.document["outcome"] == "partial"
    assert verdicts(ran)["6"] == ("unplug", "refused", None)
    assert verdicts(ran)["1"] == ("unplug", "unplugged", None)
    assert ran.document["enabled"] == "0,2,6"


async def test_revert_puts_back_what_was_done_and_what_it_cannot_is_named(story: MicroGuest) -> None:
    await story.set_behaviour([Behaviour.refusing(0x82).for_slot(6), Behaviour.refusing(0x81).for_slot(2)])
    ran = await run("set", "0,2", "--on-failure", "revert", "--json", "--qmp", story.qmp)
    assert ran.code == 1
    assert ran.document["outcome"] == "revert_incomplete"
    assert verdicts(ran) == {
        "2": ("plug", "plugged", False),
        "6": ("unplug", "refused", None),
        "1": ("unplug", "unplugged", True),
    }
    [plugged] = [step for step in ran.document["steps"] if step["ids"] == "2"]
    assert plugged["undo"]["kind"] == "refused"
    assert ran.document["enabled"] == "0-2,6"


async def test_a_guest_that_takes_too_long_is_pending_and_a_later_set_waits_for_its_answer(story: MicroGuest) -> None:
    await story.set_behaviour(Behaviour.hanging())
    ran = await run("set", "0-1", "--timeout", "0.3", "--json", "--qmp", story.qmp)
    assert ran.code == 1
    assert verdicts(ran) == {"6": ("unplug", "pending", None)}
    assert (ran.document["pending"], ran.error["outcome"]) == ("6", "unknown")
    async with running("set", "0-1,6", "--json", "--qmp", story.qmp) as it:
        await it.wait_said("0 of 1: asking QEMU")
        await story.set_behaviour(Behaviour.complying())
        kept = await it.end()
    assert kept.code == 0
    assert verdicts(kept) == {"6": ("keep", "plugged", None)}
    assert kept.document["enabled"] == "0-1,6"


async def test_count_takes_the_lowest_in_and_the_highest_out_but_no_boot_vcpu(story: MicroGuest) -> None:
    more = await run("count", "5", "--json", "--qmp", story.qmp)
    assert (more.code, more.document["enabled"]) == (0, "0-3,6")
    denied = await run("count", "1", "--qmp", story.qmp)
    assert denied.code == 2
    assert "--include-boot does" in denied.err
    assert "nothing was sent" in denied.err
    less = await run("count", "1", "--include-boot", "--json", "--qmp", story.qmp)
    assert (less.code, less.document["enabled"]) == (0, "0")


async def test_a_slow_guest_is_told_of_as_it_goes(story: MicroGuest) -> None:
    await story.set_behaviour(Behaviour.slow(400))
    ran = await run("count", "1", "--include-boot", "--json", "--qmp", story.qmp)
    assert ran.code == 0
    assert "0 of 2: vCPU " in ran.err
    assert "1 of 2: " in ran.err


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_stops_at_the_next_safe_point_and_what_was_done_is_told(
    story: MicroGuest, sig: signal.Signals, tmp_path: Path
) -> None:
    record = tmp_path / "vm.xml"
    await story.set_behaviour(Behaviour.hanging().for_slot(6))
    arguments = ("set", "0,2-3", "--in-flight", "1", "--record", record, "--qmp", story.qmp)
    async with running(*arguments, "--json") as it:
        await it.wait_said("vCPU 6: the guest works on it")
        it.process.send_signal(sig)
        ran = await it.end()
    assert ran.code == 130
    assert "stopping at the next safe point" in ran.err
    assert (ran.document["cancelled"], ran.document["outcome"]) == (True, "partial")
    assert verdicts(ran) == {
        "2": ("plug", "plugged", None),
        "3": ("plug", "plugged", None),
        "6": ("unplug", "pending", None),
        "1": ("unplug", None, None),
    }
    assert (ran.document["enabled"], ran.document["pending"]) == ("0-3,6", "6")
    # It was stopped, not cut short: there is nothing to recover.
    looked = await run("recover", "--record", record, "--json", "--qmp", story.qmp)
    assert (looked.code, looked.document["interrupted"], looked.document["pending"]) == (0, None, "6")


async def test_a_second_signal_does_not_wait_for_a_qemu_that_is_silent(story: MicroGuest) -> None:
    await story.set_behaviour(Behaviour.hanging())
    async with running("set", "0-1", "--json", "--qmp", story.qmp) as it:
        await it.wait_said("vCPU 6: the guest works on it")
        story.process.kill(signal.SIGSTOP)
        try:
            it.process.send_signal(signal.SIGINT)
            await it.wait_said("a second signal lets go of the VM")
            it.process.send_signal(signal.SIGINT)
            ran = await it.end()
        finally:
            story.process.kill(signal.SIGCONT)
    # If all was said when it came, it meets a process that ends anyway: shells show both as 130.
    assert ran.code in {130, -signal.SIGINT}
    assert ran.document["pending"] == "6"


async def test_a_signal_before_it_has_begun_sends_nothing(story: MicroGuest) -> None:
    waits = (
        "import asyncio\nfrom qmpvcpu.vm.driver import Driver\n"
        "async def wait(self, look):\n    print('now', file=sys.stderr)\n    await asyncio.sleep(60)\n"
        "Driver._look = wait"
    )
    async with running("set", "0-7", "--json", "--verbose", "--qmp", story.qmp, code=waits) as it:
        await it.wait_said("now")
        it.process.send_signal(signal.SIGINT)
        ran = await it.end()
    assert ran.code == 130
    assert ran.error["message"] == "stopped by SIGINT"
    assert '"execute": "device_' not in ran.err
    assert ran.document["enabled"] == "0-1,6"


async def test_a_third_signal_ends_the_process_at_once(story: MicroGuest) -> None:
    await story.set_behaviour(Behaviour.hanging())
    lingers = (
        "import asyncio, contextlib\nfrom qmpvcpu import VcpuController\n"
        "async def close(self):\n"
        "    while True:\n"
        "        print('closing', file=sys.stderr)\n"
        "        with contextlib.suppress(asyncio.CancelledError):\n"
        "            await asyncio.sleep(60)\n"
        "VcpuController.close = close"
    )
    async with running("set", "0-1", "--json", "--qmp", story.qmp, code=lingers) as it:
        await it.wait_said("vCPU 6: the guest works on it")
        it.process.send_signal(signal.SIGTERM)
        await it.wait_said("closing")
        it.process.send_signal(signal.SIGTERM)
        await it.wait_said("closing")
        it.process.send_signal(signal.SIGTERM)
        ran = await it.end()
    assert (ran.code, ran.out) == (-signal.SIGTERM, "")


def test_an_outcome_that_nobody_knows_has_an_exit_code_of_its_own() -> None:
    slot = VcpuMap([1])
    layout = Layout(vm=VmInfo("vm", "x86_64", "pc-q35-10.0", "kvm", (10, 0, 2)), slots=())
    step = StepReport(Action.UNPLUG, slot, Unknown(slot, "no reply"), "no reply")
    report = TransitionReport(
        start=VcpuMap([0, 1]),
        target=VcpuMap([0]),
        on_failure=OnFailure.STOP,
        outcome=TransitionOutcome.PARTIAL,
        steps=(step,),
        layout=layout,
        cancelled=True,
    )
    answer = failure(TransitionError(report), Shell(Options()))
    assert answer.code == 3
    assert answer.complaint == ("qmpvcpu: 0 not reached (stopped, partial): 1 UNKNOWN",)


async def test_a_qemu_that_dies_on_the_way_leaves_the_outcome_unknown(story: MicroGuest) -> None:
    await story.set_behaviour(Behaviour.hanging())
    async with running("set", "0-2", "--json", "--qmp", story.qmp) as it:
        await it.wait_said("vCPU 6: the guest works on it")
        story.process.kill()
        ran = await it.end()
    assert ran.code == 3
    assert ran.error["outcome"] == "unknown"
    assert "connection is lost" in ran.document["lost"]
    assert verdicts(ran)["2"] == ("plug", "plugged", None)
    assert verdicts(ran)["6"][1] in {"pending", "unknown"}


async def test_plan_shows_the_steps_and_sends_nothing(story: MicroGuest) -> None:
    shown = await run("plan", "0,2", "--qmp", story.qmp, "--verbose")
    assert shown.code == 0
    assert shown.out.startswith("vCPUs 0-1,6 -> 0,2: 1 to plug, 2 to unplug\n  plug   2 ")
    assert "there at boot" in shown.out
    assert '"execute": "device_' not in shown.err
    ran = await run("plan", "0,2", "--json", "--qmp", story.qmp)
    document = ran.document
    assert [(step["action"], step["ids"]) for step in document["steps"]] == [
        ("plug", "2"),
        ("unplug", "6"),
        ("unplug", "1"),
    ]
    assert (document["start"], document["target"], document["denied"]) == ("0-1,6", "0,2", [])
    assert "the guest has answered nothing about a vCPU since it started" in document["warnings"][-1]
    assert (await run("list", "--json", "--qmp", story.qmp)).document["enabled"] == "0-1,6"


async def test_plan_names_all_that_is_denied(story: MicroGuest, capsys: pytest.CaptureFixture[str]) -> None:
    ran = await said(capsys, "plan", "1,9", "--json", "--qmp", story.qmp)
    assert ran.code == 2
    assert {(each["reason"], each["ids"]) for each in ran.document["denied"]} == {
        ("unknown_vcpu", "9"),
        ("boot_vcpu", "0"),
    }
    counted = await said(capsys, "plan", "--count", "1", "--json", "--qmp", story.qmp)
    assert counted.code == 2
    assert [each["reason"] for each in counted.document["denied"]] == ["count_keeps_boot"]
    allowed = await said(capsys, "plan", "--count", "1", "--include-boot", "--json", "--qmp", story.qmp)
    assert (allowed.code, allowed.document["target"]) == (0, "0")
    nothing = await said(capsys, "plan", "0-1,6", "--qmp", story.qmp)
    assert (nothing.code, nothing.out.splitlines()[0]) == (0, "vCPUs 0-1,6 -> 0-1,6: nothing to do")


async def test_a_map_that_cannot_be_is_denied_and_nothing_is_sent(
    story: MicroGuest, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in {
        "set 1-2": "vCPU 0 is the one that booted the VM",
        "set 9": "no vCPU 9: this machine has 0 to 7",
        "set 0-99": "8-99: this machine has 0 to 7",
        "count 0": "this machine has 1 to 8 vCPUs, not 0",
        "count 99": "this machine has 1 to 8 vCPUs, not 99",
        "count -- -1": "this machine has 1 to 8 vCPUs, not -1",
    }.items():
        with exchange() as sent:
            ran = await said(capsys, "--json", "--qmp", story.qmp, *arguments.split())
        assert ran.code == 2, arguments
        assert ran.error["kind"] == "StepDeniedError"
        assert words in ran.error["message"]
        assert ran.document["enabled"] == "0-1,6"
        assert "query-hotpluggable-cpus" in sent
        assert not {"device_add", "device_del"} & set(sent)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["set", "0-"], "is not a vCPU id"),
        (["set", "^1"], "is not a set of vCPU ids"),
        (["set", ""], "it is empty"),
        (["set", "3-1"], "runs downwards"),
        (["set", "0,,1"], "is not a vCPU id"),
        (["set", "9" * 100_000], "a vCPU id is 0 to 16383"),
        (["set"], "Missing argument"),
        (["set", "0", "1"], "unexpected extra argument"),
        (["set", "0", "--in-flight", "0"], "--in-flight"),
        (["set", "0", "--on-failure", "nonsense"], "nonsense"),
        (["set", "0", "--timeout", "nan"], "finite number of seconds"),
        (["set", "0", "--total-timeout", "-1"], "finite number of seconds"),
        (["set", "0", "--proof", "faith"], "faith"),
        (["count"], "Missing argument"),
        (["count", "many"], "valid integer"),
        (["plan"], "name the map"),
        (["plan", "0-1", "--count", "2"], "one of them"),
        (["plan", "0-1", "--include-boot"], "goes with a count"),
        (["recover"], "--record PATH"),
        (["recover", "--finish", "--revert", "--record", "vm.xml"], "one of them"),
        (["watch", "--until", "0-"], "is not a vCPU id"),
        (["watch", "--for", "-1"], "finite number of seconds"),
        (["watch", "--reply-timeout", "0"], "QEMU needs some time"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_words_need_no_vm_to_be_turned_away(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMPVCPU_QMP", "/nonexistent/vm.qmp")
    assert main(["--json", *arguments]) == 2
    document = json.loads(capsys.readouterr().out)
    assert words in document["error"]["message"]
    assert len(document["error"]["message"]) < 1000
    assert document["error"]["outcome"] == "unchanged"


def test_a_long_reason_that_steps_in_a_row_share_is_shown_once() -> None:
    long = "the guest's agent forbids the command, as its configuration says"
    steps = tuple(StepReport(Action.PLUG, VcpuMap([vcpu]), reason=long) for vcpu in (2, 3, 4))
    short = StepReport(Action.UNPLUG, VcpuMap([1]), reason="device is busy")
    report = TransitionReport(
        VcpuMap([0, 1]),
        VcpuMap([0]),
        OnFailure.STOP,
        TransitionOutcome.PARTIAL,
        (*steps, short, short),
        layout("0-1"),
    )
    said = "\n".join(map(str, report_blocks(report)))
    assert (said.count(long), said.count("as above"), said.count("device is busy")) == (1, 2, 2)


def test_vcpus_that_were_not_asked_for_are_named_by_their_ids() -> None:
    steps = tuple(StepReport(Action.UNPLUG, VcpuMap([vcpu])) for vcpu in (4, 3, 1))
    report = TransitionReport(
        VcpuMap([0, 1, 3, 4]), VcpuMap([0]), OnFailure.STOP, TransitionOutcome.PARTIAL, steps, layout("0-1,3-4")
    )
    assert shortcoming(report) == "0 not reached (partial): not sent: 1,3-4"
