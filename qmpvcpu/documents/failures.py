"""Errors as JSON, with all their evidence, and their exit codes."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from qmpvcpu import errors
from qmpvcpu.documents.form import BAD_RECORD, INTERRUPTED, NO_ANSWER, NOT_REACHED, NOT_SENT
from qmpvcpu.errors import (
    LOOK,
    AgentForbiddenError,
    CampaignError,
    DenialReason,
    DomainXmlError,
    GuestAgentError,
    GuestNumberUnknownError,
    GuestRefusedError,
    HostsError,
    InvalidMapError,
    LeaseTakenError,
    MonitorError,
    NameTakenError,
    Outcome,
    OutcomeUnknownError,
    PlacementError,
    PlanError,
    QmpVcpuError,
    RecordError,
    ReplayMismatchError,
    RequestRefusedError,
    SameNameError,
    SameVmError,
    ServerForbiddenError,
    SocketDirectoryError,
    TargetLostError,
    TooLongError,
    TransitionError,
    UnfitServerError,
    WishError,
    printable,
    shorten,
)
from qmpvcpu.model.codec import members, to_json
from qmpvcpu.model.options import Proof
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Unknown, verdict_of

# The first that fits counts.
_CODES: Final = (
    (KeyboardInterrupt, INTERRUPTED),
    (GuestNumberUnknownError, NOT_SENT),
    ((GuestRefusedError, AgentForbiddenError), NOT_REACHED),
    (
        (
            *(ServerForbiddenError, UnfitServerError, TooLongError),
            *(LeaseTakenError, RequestRefusedError, NameTakenError, SameNameError, CampaignError),
        ),
        NOT_SENT,
    ),
    ((MonitorError, GuestAgentError, OutcomeUnknownError, TargetLostError, HostsError), NO_ANSWER),
    (RecordError, BAD_RECORD),
    ((PlanError, InvalidMapError, DomainXmlError, SameVmError, SocketDirectoryError), NOT_SENT),
    (OSError, NO_ANSWER),
)
_NOT_EVIDENCE: Final = ("report", "outcome")  # the document has the report, and the outcome has a key of its own
# An error of a domain document has these only if they are known.
_WHERE: Final = ("line", "path")


def code_of(error: BaseException) -> int:
    """Return the exit code for *error*."""
    if isinstance(error, TransitionError):
        return _code_of_report(error.report)
    if isinstance(error, WishError):
        return error.code
    if isinstance(error, PlacementError) and error.action == LOOK:
        return NOT_SENT
    if isinstance(error, ReplayMismatchError) and error.outcome is not Outcome.UNCHANGED:
        return NOT_REACHED
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), NOT_REACHED)


def _code_of_report(report: TransitionReport) -> int:
    if any(isinstance(verdict, Unknown) for step in report.steps for verdict in (step.verdict, step.undo)):
        return NO_ANSWER
    return INTERRUPTED if report.cancelled else NOT_REACHED


def error_json(error: BaseException) -> dict[str, Any]:
    """Return *error* with all its evidence; ``verdict`` is the step's, or null if it is not about a step.

    A TransitionError's report is left out: it is in the document that has the error.
    """
    message = str(error) or type(error).__name__
    if not isinstance(error, QmpVcpuError):
        system = isinstance(error, OSError)  # nothing tells how far it got
        kind, outcome = ("OSError", "unknown") if system else (type(error).__name__, "unchanged")
        return {"kind": kind, "message": message, "outcome": outcome, "verdict": None}
    return {
        "kind": type(error).__name__,
        "message": message,
        "outcome": to_json(error.outcome),
        "verdict": to_json(verdict_of(error)),
        **{name: _shown(value) for name, value in vars(error).items() if _is_evidence(error, name)},
    }


def _is_evidence(error: QmpVcpuError, name: str) -> bool:
    if isinstance(error, DomainXmlError) and name in _WHERE:
        return getattr(error, name) is not None
    return name not in _NOT_EVIDENCE and name[0] != "_"


def _shown(value: object) -> object:
    """Return *value* as JSON; if it has no JSON form, as bytes that are not text, quote it as messages do."""
    try:
        return to_json(value)
    except (TypeError, ValueError):
        return shorten(value)


def error_from_json(data: object, *, report: TransitionReport | None = None) -> QmpVcpuError | OSError:
    """Return the error that ``error_json`` was given, with the same class, attributes and message.

    An error that is neither from ``qmpvcpu.errors`` nor an OSError, or that cannot be read, becomes a QmpVcpuError
    with its message. Its outcome is kept if it can be read, else it is UNKNOWN.

    Args:
        data: The JSON object.
        report: The report of a TransitionError, from the document that has the error.
    """
    said = data if isinstance(data, Mapping) else {}
    message = said.get("message")
    text = message if isinstance(message, str) else f"an error that cannot be read: {shorten(data)}"
    if said.get("kind") == "OSError":
        return OSError(text)
    try:
        outcome = members(said, {"outcome": Outcome})["outcome"]
    except ValueError:
        outcome = Outcome.UNKNOWN
    try:
        error = _restored(said, text, report)
    except ValueError:
        error = QmpVcpuError(text)
    error.outcome = outcome
    return error


def _restored(data: Mapping[str, Any], message: str, report: TransitionReport | None) -> QmpVcpuError:
    """Return the error of the class that *data* names, or raise ValueError."""
    kind = _class_of(data)
    of_xml = issubclass(kind, DomainXmlError)
    kinds = _evidence_of(kind).items()
    found = members(data, {name: each for name, each in kinds if not of_xml or name not in _WHERE or name in data})
    if of_xml:
        found.setdefault("line", None)
        message = message.removeprefix(f"{printable(found['path'])}: ") if "path" in found else message
    if issubclass(kind, TransitionError):
        if report is None:
            raise ValueError("the document has no report")
        found["report"] = report
    error = kind.__new__(kind)  # not by its constructor, which would make the message anew
    error.args = (message,)
    vars(error).update(found)
    return error


def _class_of(data: Mapping[str, Any]) -> type[QmpVcpuError]:
    name = members(data, {"kind": str})["kind"]
    match vars(errors).get(name):
        case type() as kind if issubclass(kind, QmpVcpuError):
            return kind
    raise ValueError(f"{shorten(name)} is no error of qmpvcpu")


def _evidence_of(kind: type) -> dict[str, Any]:
    """Return the attributes of *kind*, each with the annotation to read it by."""
    table = _evidence()
    return {name: each for base in kind.__mro__[::-1] for name, each in table.get(base, {}).items()}


@cache
def _evidence() -> Mapping[type, Mapping[str, Any]]:
    """Return what each class adds to the attributes of its base."""
    # Not at the top: most commands neither read nor write an error.
    from qmpvcpu.domainxml.domainrule import DomainRule, RuleStage
    from qmpvcpu.model.wish import WishPhase
    from qmpvcpu.planning.compatibility import Difference

    text, word = str, str | None
    denied = {"ids": VcpuMap, "reason": DenialReason, "detail": text}
    return {
        errors.InvalidMapError: {"text": object},
        errors.DomainXmlError: {"line": int, "path": text},
        errors.DomainRuleError: {
            "rule": DomainRule,
            "element": text,
            "attribute": word,
            "value": word,
            "stage": RuleStage,
            "libvirt_says": text,
        },
        errors.StepDeniedError: {"action": text, **denied},
        errors.UnsupportedMachineError: {"machine": text},
        errors.ConfigDeniedError: {"asked": text, **denied},
        errors.StalePlanError: {"planned": VcpuMap, "observed": VcpuMap, "why": text},
        errors.ReplayMismatchError: {"differences": tuple[str, ...]},
        errors.MonitorConnectError: {"address": text, "why": text, "reason": errors.Unreachable, "hint": text},
        errors.MonitorTimeoutError: {"command": text, "timeout": float, "hint": text},
        errors.MonitorLostError: {"why": text, "hung_up": bool, "last_sent": word},
        errors.MalformedReplyError: {"command": text, "reply": object},
        errors.GuestAgentError: {"address": text, "why": text, "hint": text},
        errors.AgentSilentError: {"timeout": float, "port_open": bool | None},
        errors.AgentForbiddenError: {"command": text},
        errors.GuestRefusedError: {
            "reason": text,
            "errno": text,
            "number": int | None,
            "ids": VcpuMap,
            "done": VcpuMap,
        },
        errors.MalformedAnswerError: {"command": word, "answer": text},
        errors.GuestNumberUnknownError: {"ids": VcpuMap},
        errors.StepError: {"action": word, "ids": VcpuMap},
        errors.CommandRejectedError: {"error_class": text, "desc": text, "sent": dict, "hint": text},
        errors.UnplugRefusedError: {"code": int | None, "reason": text, "by_agent": bool},
        errors.UnplugPendingError: {"timeout": float, "acknowledged": bool},
        errors.UnprovenError: {
            "wanted": Proof,
            "reached": Proof,
            "code": int | None,
            "reason": text,
            "hint": text,
        },
        errors.PlacementError: {"why": text, "taken_out": bool | None},
        errors.PlugUndoneError: {"by_second_removal": bool},
        errors.OutcomeUnknownError: {"why": text},
        errors.SameVmError: {"address": text, "other": text},
        errors.SocketDirectoryError: {"path": text, "why": text},
        errors.HostError: {"why": text},
        errors.ThreadGoneError: {"tid": int},
        errors.SameNameError: {"name": text, "hosts": tuple[str, str]},
        errors.ServerConnectError: {"address": text, "why": text},
        errors.ServerLostError: {"asked": text, "maybe_done": bool},
        errors.UnfitServerError: {"what": text},
        errors.ServerForbiddenError: {"asked": text, "subject": text},
        errors.StaleError: {"key": text, "last": int},
        errors.LeaseTakenError: {"key": text, "holder": bytes},
        errors.TooLongError: {"size": int, "most": int},
        errors.NameTakenError: {"host": text, "name": text, "addresses": tuple[str, ...]},
        errors.HostSilentError: {"subject": text, "is_there": bool},
        errors.HostFailedError: {"subject": text, "said": text},
        errors.CampaignError: {"campaign": text, "why": text},
        errors.WishError: {"vm": text, "phase": WishPhase, "why": text, "code": int},
        errors.TargetMismatchError: {
            "vm": text,
            "differences": tuple[Difference, ...],
            "notes": tuple[Difference, ...],
        },
        errors.TargetLostError: {"vm": text, "why": text},
        errors.TakeBackError: {"vm": text, "why": text, "run_state": word},
        errors.WaitTimeoutError: {"timeout": float, "enabled": VcpuMap, "pending": VcpuMap},
        errors.RecordError: {"path": text, "why": text},
        errors.RecordLockedError: {"pid": int | None},
    }
