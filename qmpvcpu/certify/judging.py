"""What an error or a verdict says of an ability."""

from qmpvcpu.errors import (
    GuestAgentError,
    GuestRefusedError,
    MonitorError,
    PlugUndoneError,
    QmpVcpuError,
    TransitionError,
    UnprovenError,
)
from qmpvcpu.model.certificate import AbilityVerdict
from qmpvcpu.model.transition import StepReport
from qmpvcpu.model.verdicts import (
    Denied,
    Pending,
    Plugged,
    Refused,
    Rejected,
    Unknown,
    Unplugged,
    Verdict,
    verdict_of,
)
from qmpvcpu.planning.checks import ALL_THE_SAME


class NotDoneError(Exception):
    """A trial that did not work, with the row's verdict, seconds and detail."""

    def __init__(self, verdict: AbilityVerdict, detail: str, seconds: float | None = None) -> None:
        super().__init__(detail)
        self.verdict = verdict
        self.detail = detail
        self.seconds = seconds


def not_possible(why: str) -> NotDoneError:
    """Return the end of a trial that cannot be made."""
    return NotDoneError(AbilityVerdict.NOT_POSSIBLE, why)


def judged(error: "QmpVcpuError | NotDoneError") -> tuple[AbilityVerdict, str]:
    """Return what *error* says of an ability, and why."""
    match error:
        case NotDoneError():
            found = error.verdict, error.detail
        case TransitionError():
            failed = [step for step in error.report.steps if not step.ok and step.verdict is not None]
            found = _of_step(failed[0]) if failed else (AbilityVerdict.NEVER, error.report.failure)
        case UnprovenError():
            found = _unproven(error.code), f"{error.reached.value}, never {error.wanted.value}: {error.reason}"
        case PlugUndoneError():
            found = AbilityVerdict.REFUSED, str(error)
        case MonitorError():
            found = AbilityVerdict.LOST, str(error)
        case GuestRefusedError():
            found = AbilityVerdict.REFUSED, f"{error.reason}, by the agent"
        case GuestAgentError():
            found = AbilityVerdict.NOT_POSSIBLE, f"the agent: {error.why}"
        case _:
            verdict = verdict_of(error)
            found = (AbilityVerdict.NOT_POSSIBLE, str(error)) if verdict is None else _of_verdict(verdict)
    return found


def _of_step(step: StepReport) -> tuple[AbilityVerdict, str]:
    if isinstance(step.verdict, Plugged):
        return _unproven(step.verdict.code), step.reason
    assert step.verdict is not None  # noqa: S101 - JUSTIFICATION: for mypy, its caller looked
    return _of_verdict(step.verdict)


def _unproven(code: int | None) -> AbilityVerdict:
    """Return what a plug without its proof is, by the guest's OST status: 0 is a guest that took it, and no more."""
    return AbilityVerdict.REFUSED if code else AbilityVerdict.NEVER


def _of_verdict(verdict: Verdict) -> tuple[AbilityVerdict, str]:
    match verdict:
        case Refused():
            found = AbilityVerdict.REFUSED, reason_of(verdict)
        case Rejected():
            found = AbilityVerdict.REFUSED, f"by QEMU: {verdict.desc}"
        case Denied():
            found = AbilityVerdict.NOT_POSSIBLE, verdict.detail.removesuffix(ALL_THE_SAME)  # certify never does
        case Pending():
            found = AbilityVerdict.NEVER, pending_reason(verdict)
        case Unknown():
            found = AbilityVerdict.LOST, verdict.why
        case Plugged() | Unplugged():
            found = AbilityVerdict.REFUSED, f"it is {verdict.name.lower()} all the same"
    return found


def reason_of(verdict: Refused) -> str:
    """Return why the guest refused, and in what it said so."""
    if verdict.by_agent:
        return f"{verdict.reason}, by the agent"
    return verdict.reason if verdict.code is None else f"{verdict.reason}, OST status {verdict.code:#04x}"


def pending_reason(verdict: Pending) -> str:
    """Return what the guest has made of a request that it has not answered."""
    return "the guest works on it" if verdict.acknowledged else "the guest has not reacted"
