"""What a transition is made of, and what became of it: in words, in JSON, and as an error."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from qmpvcpu import VcpuMap
from qmpvcpu.errors import Outcome, TransitionError
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.options import Affect, OnFailure, Proof
from qmpvcpu.model.transition import (
    Action,
    ConfigOutcome,
    ConfigReport,
    Direction,
    Intent,
    ProofSeconds,
    Step,
    StepReport,
    TransitionOutcome,
    TransitionReport,
    succeeded,
)
from qmpvcpu.model.verdicts import Pending, Plugged, Refused, Rejected, Unknown, Unplugged, Verdict
from qmpvcpu.model.vm import VmInfo
from tests.layouts import layout
from tests.model.values import reports

VM = VmInfo("vm", "x86_64", "pc-q35-10.0", "kvm", (10, 0, 2))
START, TARGET = VcpuMap.parse("0-1,6"), VcpuMap.parse("0,2-5")
BUSY = "the guest refused: device is busy (OST status 0x82)"


@pytest.mark.parametrize(
    ("step", "first", "text"),
    [
        (Step(Action.PLUG, VcpuMap([3])), 3, "plug 3"),
        (Step(Action.UNPLUG, VcpuMap([8, 9, 10, 11]), "/machine/peripheral/vcpu8"), 8, "unplug 8-11"),
        (Step(Action.KEEP, VcpuMap([0, 1]), "/machine/peripheral/vcpu0"), 0, "keep 0-1"),
    ],
)
def test_a_step_is_named_by_the_first_vcpu_of_its_slot(step: Step, first: int, text: str) -> None:
    assert (step.first, str(step)) == (first, text)


def test_an_intent_goes_forward_and_stops_at_a_failure_unless_told_otherwise() -> None:
    intent = Intent(VcpuMap([0]), VcpuMap([0, 1]), (Step(Action.PLUG, VcpuMap([1])),))
    assert (intent.on_failure, intent.direction, intent.timeout) == (OnFailure.STOP, Direction.FORWARD, 30.0)
    assert intent == Intent(VcpuMap([0]), VcpuMap([0, 1]), (Step(Action.PLUG, VcpuMap([1])),))


def step(
    action: Action, vcpu: int, verdict: type[Verdict] | Verdict | None, reason: str = "", **more: Any
) -> StepReport:
    ids = VcpuMap([vcpu])
    ended: Any = verdict(ids) if isinstance(verdict, type) else verdict  # type: ignore[call-arg]  # those that need ids only
    return StepReport(action, ids, ended, reason, **more)


def story(policy: OnFailure) -> TransitionReport:
    """The map 0,2-5 from 0-1,6, the guest refusing to give up 6."""
    refused = step(Action.UNPLUG, 6, Refused(VcpuMap([6]), 0x82, "device is busy"), BUSY)
    plugs = [step(Action.PLUG, vcpu, Plugged) for vcpu in range(2, 6)]
    left, outcome = layout("0,2-6"), TransitionOutcome.PARTIAL
    last = step(Action.UNPLUG, 1, Unplugged)
    match policy:
        case OnFailure.STOP:
            left, last = layout("0-6"), step(Action.UNPLUG, 1, None, "not sent: an earlier step failed")
        case OnFailure.REVERT:
            left, outcome = layout("0-1,6"), TransitionOutcome.REVERTED
            plugs = [replace(plug, undo=Unplugged(plug.ids), undone=True) for plug in plugs]
            last = replace(last, undo=Plugged(last.ids), undone=True)
    return TransitionReport(START, TARGET, policy, outcome, (*plugs, refused, last), left, 0.25)


def test_the_story_under_stop_reads_well() -> None:
    assert str(story(OnFailure.STOP)) == (
        "PARTIAL: vCPUs 0-1,6 to 0,2-5, on failure stop; plugged now: 0-6\n"
        "  plug 2: PLUGGED\n"
        "  plug 3: PLUGGED\n"
        "  plug 4: PLUGGED\n"
        "  plug 5: PLUGGED\n"
        f"  unplug 6: REFUSED: {BUSY}\n"
        "  unplug 1: not sent: an earlier step failed"
    )
    error = TransitionError(story(OnFailure.STOP))
    assert str(error) == (
        f"vCPUs 0,2-5 not reached (partial): unplug 6: REFUSED: {BUSY}; not sent: 1; plugged now: 0-6"
    )
    assert error.outcome is Outcome.CHANGED


def test_an_error_says_why_nothing_was_sent_if_no_step_says_it() -> None:
    unsent = tuple(step(Action.UNPLUG, each, None, "not sent: total_timeout has passed") for each in (6, 1))
    report = TransitionReport(
        START, VcpuMap([0]), OnFailure.STOP, TransitionOutcome.PARTIAL, unsent, layout("0-1,6"), 0.0
    )
    assert "not sent: 1,6 (total_timeout has passed);" in str(TransitionError(report))


def test_the_story_under_continue_reads_well() -> None:
    assert str(story(OnFailure.CONTINUE)).splitlines()[0::6] == [
        "PARTIAL: vCPUs 0-1,6 to 0,2-5, on failure continue; plugged now: 0,2-6",
        "  unplug 1: UNPLUGGED",
    ]
    assert str(TransitionError(story(OnFailure.CONTINUE))) == (
        f"vCPUs 0,2-5 not reached (partial): unplug 6: REFUSED: {BUSY}; plugged now: 0,2-6"
    )


def test_the_story_under_revert_reads_well() -> None:
    report = story(OnFailure.REVERT)
    assert str(report).splitlines()[:2] == [
        "REVERTED: vCPUs 0-1,6 to 0,2-5, on failure revert; plugged now: 0-1,6",
        "  plug 2: PLUGGED, undone",
    ]
    error = TransitionError(report)
    assert str(error) == f"vCPUs 0,2-5 not reached (reverted): unplug 6: REFUSED: {BUSY}; plugged now: 0-1,6"
    assert error.outcome is Outcome.UNCHANGED
    assert error.report is report


def test_what_could_not_be_undone_is_named() -> None:
    busy = Refused(VcpuMap([2]), 0x82, "device is busy")
    kept = step(Action.PLUG, 2, Plugged, f"undoing it: {BUSY}", undo=busy, undone=False)
    report = story(OnFailure.REVERT)
    report = replace(report, outcome=TransitionOutcome.REVERT_INCOMPLETE, steps=(kept, *report.steps[1:]))
    assert str(report).splitlines()[1] == f"  plug 2: PLUGGED, NOT undone: undoing it: {BUSY}"
    error = TransitionError(report)
    assert f"plug 2: PLUGGED, NOT undone: undoing it: {BUSY}" in str(error)
    assert error.outcome is Outcome.CHANGED


def test_what_is_pending_and_what_nobody_knows_leave_the_outcome_unknown() -> None:
    waiting = step(Action.UNPLUG, 6, Pending(VcpuMap([6]), acknowledged=True), "the guest works on it")
    start, left = VcpuMap.parse("0-6"), layout("0-6", pending=(6,))
    report = replace(story(OnFailure.STOP), start=start, steps=(waiting,), layout=left, cancelled=True)
    assert str(report) == (
        "PARTIAL, stopped by its caller: vCPUs 0-6 to 0,2-5, on failure stop; plugged now: 0-6, pending 6\n"
        "  unplug 6: PENDING: the guest works on it"
    )
    assert str(TransitionError(report)).endswith("; plugged now: 0-6, pending 6")
    assert TransitionError(report).outcome is Outcome.UNKNOWN
    lost = step(Action.PLUG, 2, Plugged, undo=Unknown(VcpuMap([2]), "gone"), undone=False)
    assert TransitionError(replace(report, steps=(lost,))).outcome is Outcome.UNKNOWN


def test_an_error_says_once_what_ended_alike() -> None:
    waiting = [
        step(Action.UNPLUG, each, Pending(VcpuMap([each]), acknowledged=False), "silence") for each in (7, 6, 4)
    ]
    unsent = [step(Action.UNPLUG, each, None, "not sent: an earlier step failed") for each in (3, 2, 1)]
    report = replace(story(OnFailure.STOP), start=VcpuMap.parse("0-6"), steps=(*waiting, *unsent))
    assert str(TransitionError(report)) == (
        "vCPUs 0,2-5 not reached (partial): unplug 4,6-7: PENDING: silence; not sent: 1-3; plugged now: 0-6"
    )


def of_many(steps: list[StepReport], start: str, left: str) -> TransitionReport:
    end = layout(left, slots=244)
    return replace(story(OnFailure.STOP), start=VcpuMap.parse(start), steps=tuple(steps), layout=end)


def test_a_report_of_many_alike_steps_is_not_a_line_each() -> None:
    plugs = [step(Action.PLUG, vcpu, Plugged) for vcpu in range(1, 120)]
    refused = step(Action.PLUG, 120, Rejected(VcpuMap([120]), "GenericError", "no"), "GenericError: no")
    unsent = [step(Action.PLUG, vcpu, None, "not sent: an earlier step failed") for vcpu in range(121, 240)]
    few = [step(Action.UNPLUG, vcpu, Unplugged) for vcpu in (243, 242, 241, 240)]
    assert str(of_many([*plugs, refused, *unsent, *few], "0,240-243", "0-119")).splitlines()[1:] == [
        "  plug 1-119: PLUGGED",
        "  plug 120: REJECTED: GenericError: no",
        "  plug 121-239: not sent: an earlier step failed",
        *(f"  unplug {vcpu}: UNPLUGGED" for vcpu in (243, 242, 241, 240)),
    ]


def test_an_error_stays_one_readable_line_whatever_went_wrong() -> None:
    wrong = [
        step(Action.PLUG, each, Rejected(VcpuMap([each]), "GenericError", "x"), f"no\n  room {each}")
        for each in range(1, 240)
    ]
    message = str(TransitionError(of_many(wrong, "0", "0")))
    assert "plug 5: REJECTED: no room 5; and 234 more; plugged now" in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("one", "outcome"),
    [
        (step(Action.PLUG, 2, None), Outcome.UNCHANGED),
        (step(Action.PLUG, 2, Plugged), Outcome.CHANGED),
        (step(Action.PLUG, 2, Plugged, undone=True), Outcome.UNCHANGED),
        (step(Action.PLUG, 2, Plugged, undone=False), Outcome.CHANGED),
        (step(Action.PLUG, 2, Unplugged, "plugged, then ejected"), Outcome.UNCHANGED),
        (step(Action.PLUG, 2, Rejected(VcpuMap([2]), "GenericError", "no")), Outcome.UNCHANGED),
        (step(Action.PLUG, 2, Unknown(VcpuMap([2]), "lost")), Outcome.UNKNOWN),
        (step(Action.PLUG, 2, Plugged, undo=Pending(VcpuMap([2]), acknowledged=True), undone=False), Outcome.UNKNOWN),
        (step(Action.UNPLUG, 6, Unplugged), Outcome.CHANGED),
        (step(Action.UNPLUG, 6, Unplugged, undone=True), Outcome.UNCHANGED),
        (step(Action.UNPLUG, 6, Refused(VcpuMap([6]), 0x82, "busy")), Outcome.UNCHANGED),
        (step(Action.UNPLUG, 6, Pending(VcpuMap([6]), acknowledged=False)), Outcome.UNKNOWN),
        (step(Action.KEEP, 6, Refused(VcpuMap([6]), 0x82, "busy")), Outcome.UNCHANGED),
        (step(Action.KEEP, 6, Plugged), Outcome.CHANGED),
        (step(Action.KEEP, 6, Unplugged, "it left"), Outcome.CHANGED),
    ],
)
def test_an_error_tells_whether_the_vm_has_changed(one: StepReport, outcome: Outcome) -> None:
    assert TransitionError(of_many([one], "0", "0")).outcome is outcome


def test_a_step_of_which_nothing_is_known_says_so() -> None:
    assert str(step(Action.PLUG, 2, None)) == "plug 2: not sent"


def test_a_record_that_could_not_be_written_is_told() -> None:
    report = replace(story(OnFailure.CONTINUE), unrecorded="record /r: No space left on device")
    assert str(report).splitlines()[-1] == "  not recorded: record /r: No space left on device"


def test_a_map_that_somebody_else_moved_is_told() -> None:
    report = replace(story(OnFailure.CONTINUE), steps=())
    assert "plugged outside this transition: 2-5; unplugged outside this transition: 1" in str(
        TransitionError(report)
    )
    assert report.changed_by_other == VcpuMap.parse("1-5")
    assert TransitionError(report).outcome is Outcome.UNCHANGED


@pytest.mark.parametrize("action", Action)
def test_each_action_is_content_with_its_own_verdicts(action: Action) -> None:
    ids = VcpuMap([3])
    ends: list[Verdict | None] = [
        Plugged(ids),
        Unplugged(ids),
        Refused(ids, 1, "no"),
        Pending(ids, acknowledged=False),
        Rejected(ids, "GenericError", "no"),
        Unknown(ids, "gone"),
        None,
    ]
    content = {type(verdict) for verdict in ends if succeeded(action, verdict)}
    wanted = {
        Action.PLUG: {Plugged},
        Action.UNPLUG: {Unplugged},
        Action.KEEP: {Plugged, Refused},
        Action.ONLINE: {Plugged},
    }
    assert content == wanted[action]


def test_a_plug_without_the_required_proof_is_not_ok_and_the_failure_names_it() -> None:
    plugged = step(Action.PLUG, 3, Plugged, "it has run no guest code", missing=Proof.STARTED)
    assert not plugged.ok
    assert plugged.left is True
    assert step(Action.PLUG, 3, Plugged).ok
    report = replace(story(OnFailure.STOP), steps=(plugged,))
    assert "plug 3: PLUGGED: it has run no guest code" in report.failure


@pytest.mark.parametrize("verdict", [None, Plugged, Unknown(VcpuMap([3]), "gone")])
def test_a_vcpu_that_is_only_brought_online_stays_plugged(verdict: Any) -> None:
    brought = step(Action.ONLINE, 3, verdict)
    assert brought.left is (None if isinstance(verdict, Unknown) else True)
    assert str(brought).startswith("online 3: ")
    report = replace(story(OnFailure.STOP), steps=(brought,))
    changes = Outcome.UNKNOWN if isinstance(verdict, Unknown) else Outcome.UNCHANGED
    assert report.vm_outcome is changes


def test_the_seconds_of_each_rung_are_said_in_its_order() -> None:
    assert str(ProofSeconds()) == ""
    assert str(ProofSeconds(present=0.0004, online=2.5)) == "present in 0.4 ms, online in 2.5 s"


def test_a_report_tells_what_was_proven_where_that_was_looked_for() -> None:
    proven = replace(step(Action.PLUG, 2, Plugged), proofs=ProofSeconds(0.001, 0.01, online=0.25))
    assert (
        str(of_many([proven], "0", "0,2")).splitlines()[1]
        == "  plug 2: PLUGGED (acknowledged in 10.0 ms, online in 250 ms)"
    )
    assert str(replace(proven, proofs=ProofSeconds(0.001, 0.01))) == "plug 2: PLUGGED"
    missing = replace(proven, proofs=ProofSeconds(0.001, 0.01), missing=Proof.ONLINE, reason="no list has it")
    assert str(missing) == "plug 2: PLUGGED: no list has it (acknowledged in 10.0 ms)"


def test_a_vcpu_that_was_brought_online_is_called_that() -> None:
    assert str(step(Action.ONLINE, 3, Plugged)) == "online 3: ONLINE"


@given(reports)
def test_any_report_comes_back_as_it_was(report: TransitionReport) -> None:
    shown = report.to_json()
    assert TransitionReport.from_json(shown) == report
    assert TransitionReport.from_json(json.dumps(shown)) == report


def test_a_step_has_its_verdict_as_an_object() -> None:
    taken = Refused(VcpuMap([6]), 0x82, "device is busy", 0.25)
    assert to_json(step(Action.UNPLUG, 6, taken, BUSY, seconds=0.25)) == {
        "action": "unplug",
        "ids": "6",
        "verdict": {
            "kind": "refused",
            "ids": "6",
            "code": 130,
            "reason": "device is busy",
            "seconds": 0.25,
            "by_agent": False,
        },
        "reason": BUSY,
        "seconds": 0.25,
        "undo": None,
        "undone": None,
        "proofs": None,
        "missing": None,
        "placed": None,
        "unplaced": "",
        "taken_out": False,
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"outcome": "maybe"}, "'outcome': \"maybe\" is not one of reached, requested, partial, reverted"),
        ({"outcome": []}, "'outcome': [] is not one of"),
        ({"on_failure": "STOP"}, "'on_failure': \"STOP\" is not one of stop, continue, revert"),
        ({"target": "^1"}, "'target': \"^1\" is not a set of vCPU ids"),
        ({"cancelled": "false"}, "'cancelled': \"false\" is not true or false"),
        ({"unrecorded": None}, "'unrecorded': null is not text"),
        ({"seconds": float("inf")}, "'seconds': Infinity is not a number"),
        ({"steps": None}, "'steps': null is not a list"),
        ({"steps": [3]}, "'steps': [0]: 3 is not a JSON object"),
        ({"layout": "0-6"}, "'layout': \"0-6\" is not a JSON object"),
        ({"layout": {}}, "'layout': 'vm' is missing"),
    ],
)
def test_a_bad_report_is_refused_by_the_name_of_its_key(change: dict[str, object], says: str) -> None:
    shown = story(OnFailure.STOP).to_json()
    with pytest.raises(ValueError, match=re.escape(says)):
        TransitionReport.from_json(shown | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"action": "eject"}, "'steps': [4]: 'action': \"eject\" is not one of plug, unplug, keep"),
        ({"undone": "yes"}, "'steps': [4]: 'undone': \"yes\" is not true or false"),
        ({"undo": "REFUSED"}, "'steps': [4]: 'undo': \"REFUSED\" is not a JSON object"),
        ({"undo": to_json(Unknown(VcpuMap([6]), "x")) | {"why": 3}}, "[4]: 'undo': 'why': 3 is not text"),
        ({"verdict": {}}, "'steps': [4]: 'verdict': 'kind' is missing"),
        ({"ids": "x" * 10_000_000}, "'steps': [4]: 'ids': "),
    ],
)
def test_a_bad_step_is_refused_by_its_place(change: dict[str, object], says: str) -> None:
    shown = story(OnFailure.STOP).to_json()
    shown["steps"][4] |= change
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        TransitionReport.from_json(shown)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("lacking", to_json(story(OnFailure.STOP)))
def test_a_report_lacks_nothing(lacking: str) -> None:
    shown = story(OnFailure.STOP).to_json()
    del shown[lacking]
    with pytest.raises(ValueError, match=f"^'{lacking}' is missing"):
        TransitionReport.from_json(shown)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("", "Expecting value"),
        ("[]", "[] is not a JSON object"),
        ('"REACHED"', '"REACHED" is not a JSON object'),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["empty", "list", "text", "deep"],
)
def test_what_is_no_report_at_all_is_refused(document: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        TransitionReport.from_json(document)


def config(outcome: ConfigOutcome, reason: str = "") -> ConfigReport:
    return ConfigReport("/vm.xml", outcome, START, TARGET, 8, reason)


def test_a_next_boot_that_could_not_be_written_is_said_beside_what_was_reached() -> None:
    reached = replace(story(OnFailure.STOP), steps=(step(Action.PLUG, 2, Plugged),), layout=layout("0,2-5"))
    failed = config(ConfigOutcome.FAILED, "No space left on device")
    report = replace(reached, outcome=TransitionOutcome.PARTIAL, affect=Affect.BOTH, config=failed)
    assert report.live is TransitionOutcome.REACHED
    assert str(report).endswith("\n  next boot 0-1,6 to 0,2-5: FAILED: No space left on device")
    error = TransitionError(report)
    assert "next boot 0-1,6 to 0,2-5: FAILED: No space left on device" in str(error)
    assert error.outcome is Outcome.CHANGED


@pytest.mark.parametrize("outcome", TransitionOutcome)
def test_the_live_side_ended_as_the_whole_where_the_next_boot_was_not_to_blame(outcome: TransitionOutcome) -> None:
    whole = replace(story(OnFailure.STOP), outcome=outcome)
    assert whole.live is outcome
    assert replace(whole, affect=Affect.BOTH, config=config(ConfigOutcome.NOT_TRIED, "not so")).live is outcome
    assert replace(whole, affect=Affect.CONFIG, config=config(ConfigOutcome.WRITTEN)).live is None


def test_a_report_tells_what_was_to_be_changed() -> None:
    live = story(OnFailure.STOP).to_json()
    assert (live["affect"], live["live"], live["config"]) == ("live", live["outcome"], None)
    both = replace(story(OnFailure.STOP), affect=Affect.BOTH, config=config(ConfigOutcome.NOT_TRIED))
    assert both.to_json()["live"] == "partial"
    assert [config(each).ok for each in ConfigOutcome] == [True, True, False, False]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("outcome", "done", "'config': 'outcome'"), ("max", -1, "'config': 'max'"), ("path", None, "'config': 'path'")],
)
def test_a_damaged_word_of_the_next_boot_is_named(key: str, value: object, words: str) -> None:
    data = replace(story(OnFailure.STOP), affect=Affect.BOTH, config=config(ConfigOutcome.WRITTEN)).to_json()
    data["config"][key] = value
    with pytest.raises(ValueError, match=words):
        TransitionReport.from_json(data)
