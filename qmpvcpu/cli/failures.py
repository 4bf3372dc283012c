"""What an error comes to: an exit code, a document with all its evidence, and words that name options."""

from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.cli.reports import report_blocks, shortcoming
from qmpvcpu.cli.result import (
    BAD_RECORD,
    INTERRUPTED,
    NO_ANSWER,
    NOT_REACHED,
    NOT_SENT,
    BadUsageError,
    CommandResult,
    document,
)
from qmpvcpu.cli.show import state_json, state_text
from qmpvcpu.cli.wording import in_options
from qmpvcpu.errors import (
    LOOK,
    AgentForbiddenError,
    DomainXmlError,
    GuestAgentError,
    GuestNumberUnknownError,
    GuestRefusedError,
    InvalidMapError,
    MonitorConnectError,
    MonitorError,
    Outcome,
    OutcomeUnknownError,
    PlacementError,
    PlanError,
    QmpVcpuError,
    RecordError,
    ReplayMismatchError,
    SameVmError,
    SocketDirectoryError,
    TargetLostError,
    TransitionError,
    printable,
)
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.verdicts import Unknown, verdict_of

if TYPE_CHECKING:
    from qmpvcpu.cli.run import Shell

# The first that fits counts.
_CODES: Final = (
    (KeyboardInterrupt, INTERRUPTED),
    (GuestNumberUnknownError, NOT_SENT),
    ((GuestRefusedError, AgentForbiddenError), NOT_REACHED),
    ((MonitorError, GuestAgentError, OutcomeUnknownError, TargetLostError), NO_ANSWER),
    (RecordError, BAD_RECORD),
    ((BadUsageError, PlanError, InvalidMapError, DomainXmlError, SameVmError, SocketDirectoryError), NOT_SENT),
    (OSError, NO_ANSWER),
)


def failure(error: BaseException, shell: "Shell", code: int | None = None) -> CommandResult:
    """Return the result that tells of *error*, with the VM's state as far as it is known.

    *code* is the exit code where the error itself does not tell it.
    """
    message = _message_of(error, shell)
    if code is None:
        code = NO_ANSWER if shell.lost else code_of(error)
    if code == NOT_SENT and shell.done:
        code = NOT_REACHED  # this step was not sent, those before it were
    report = error.report if isinstance(error, TransitionError) else None
    complaint = f"qmpvcpu: {message if report is None else shortcoming(report)}".split("\n")
    content: dict[str, Any] = {"error": error_json(error, message), **shell.extra}
    if report is not None:
        content |= report.to_json()
    elif shell.done:
        content["steps"] = shell.done
    if shell.lost:
        content["lost"] = shell.lost
        complaint.append(shell.lost)
    if shell.not_sent:
        content["not_sent"] = ",".join(map(str, shell.not_sent))
        complaint.append(f"not asked for any more: {content['not_sent']}")
    if is_held(error):
        complaint.append("how to share a VM with who holds its socket: qmpvcpu --help, and docs/sharing.md")
    content |= {} if shell.vm is None else state_json(shell.vm.layout)
    if report is not None:
        return CommandResult(code, document(**content), report_blocks(report), tuple(map(printable, complaint)))
    if shell.vm is not None:
        when = "last seen" if isinstance(error, MonitorError) else "now"
        complaint.append(f"{when}: {state_text(shell.vm.layout)}")
    return CommandResult(code, document(**content), complaint=tuple(map(printable, complaint)))


def _message_of(error: BaseException, shell: "Shell") -> str:
    match error:
        case KeyboardInterrupt():  # what was sent before has been taken in while the VM was let go
            return f"stopped by {shell.signals.came or 'SIGINT'}"
        case OSError(filename=str(name), strerror=str(why)) if not isinstance(error, QmpVcpuError):
            return f"{name}: {why}"
    return in_options(str(error))


def code_of(error: BaseException) -> int:
    """Return the exit code that tells of *error*."""
    if isinstance(error, TransitionError):
        return _code_of_report(error.report)
    if isinstance(error, PlacementError) and error.action == LOOK:
        return NOT_SENT
    if isinstance(error, ReplayMismatchError) and error.outcome is not Outcome.UNCHANGED:
        return NOT_REACHED
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), NOT_REACHED)


def _code_of_report(report: TransitionReport) -> int:
    if any(isinstance(verdict, Unknown) for step in report.steps for verdict in (step.verdict, step.undo)):
        return NO_ANSWER
    return INTERRUPTED if report.cancelled else NOT_REACHED


def is_held(error: BaseException) -> bool:
    """Return True where another client most likely holds the QMP socket; not where its QEMU is stopped."""
    return isinstance(error, MonitorConnectError) and "second -qmp" in error.hint


def error_json(error: BaseException, message: str) -> dict[str, Any]:
    """Return *error* with all its evidence; ``verdict`` is the step's, or null where it is about no step."""
    if not isinstance(error, QmpVcpuError):
        system = isinstance(error, OSError)  # and nothing tells how far it had come
        kind, outcome = ("OSError", "unknown") if system else (type(error).__name__, "unchanged")
        return {"kind": kind, "message": message, "outcome": outcome, "verdict": None}
    hidden = {"report", "outcome"}  # the one is in the document itself, the other is below
    if isinstance(error, DomainXmlError) and error.line is None:
        hidden.add("line")
    evidence = {
        name: in_options(value) if isinstance(value, str) else value
        for name, value in vars(error).items()
        if name not in hidden and name[0] != "_"
    }
    return {
        "kind": type(error).__name__,
        "message": message,
        "outcome": to_json(error.outcome),
        "verdict": to_json(verdict_of(error)),
        **to_json(evidence),
    }
