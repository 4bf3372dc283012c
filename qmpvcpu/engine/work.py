"""What a transition is made of while it runs: pieces of work, and the effects that its owner is to bring about."""

import enum
from dataclasses import dataclass, replace
from typing import NamedTuple

from qmpvcpu.engine.removal import Removal
from qmpvcpu.model.report import StepReport
from qmpvcpu.model.transition import Action, Intent, OnFailure, Step
from qmpvcpu.model.verdicts import Denied, Pending, Proof, Refused, Rejected, Unknown, Verdict

BY_OTHER = "changed by other"


class Terms(NamedTuple):
    """How a transition is to be carried out; all durations in seconds.

    Attributes:
        on_failure: The policy.
        timeout: For each answer of the guest, from QEMU's acceptance of the request; 0 only requests.
        total_timeout: For all that leads to the target, or None.
        revert_timeout: As *timeout*, for what is undone.
        reply_timeout: For QEMU's reply to each command.
        in_flight: At most so many commands without a reply; under STOP removals go one at a time all the same.
        proof: What a plug waits for.
        allow_fatal: Send even what this QEMU is known not to survive.
        allow_boot_vcpus: Take boot vCPUs from a VM that libvirt runs.
        reconnect: Wait for ``resumed`` when the connection is lost, rather than end.
    """

    on_failure: OnFailure = OnFailure.STOP
    timeout: float = 30.0
    total_timeout: float | None = None
    revert_timeout: float = 30.0
    reply_timeout: float = 10.0
    in_flight: int = 8
    proof: Proof = Proof.PRESENT
    allow_fatal: bool = False
    allow_boot_vcpus: bool = False
    reconnect: bool = False


class Stage(enum.Enum):
    """Where a piece of work stands."""

    WAITING = "not sent"
    SENT = "sent, QEMU has not replied"
    UNSURE = "sent, and the connection was lost: what the next look shows is the reply"
    ASKED = "QEMU accepted, the guest's answer is awaited"
    LOOKING = "the deadline has passed, a last read is under way"
    DONE = "over"


@dataclass(slots=True, eq=False)
class Work:
    """One slot's change under way: a step's, or the undoing of one.

    Attributes:
        step: What is to be done.
        undoes: The work that this undoes, or None.
        stage: Where it stands.
        verdict: How it ended, or None.
        reason: Why it is not as wished, or "".
        sent_at: When it was sent, by the caller's clock.
        ended_at: When it ended.
        deadline: When it is no longer waited for, or None.
        removal: The removal that is awaited, or None.
        ours: False if somebody else had done it, or asked for it, before.
        path: The QOM path of the CPU that it plugs, once that is sent.
        replug: True once a vCPU that was to be kept has left, and is being plugged again.
    """

    step: Step
    undoes: "Work | None" = None
    stage: Stage = Stage.WAITING
    verdict: Verdict | None = None
    reason: str = ""
    sent_at: float = 0.0
    ended_at: float = 0.0
    deadline: float | None = None
    removal: Removal | None = None
    ours: bool = True
    path: str | None = None
    replug: bool = False

    @property
    def plugs(self) -> bool:
        """True if the command to be sent is ``device_add``."""
        return self.step.action is Action.PLUG or self.replug

    @property
    def seconds(self) -> float:
        """From sending to the end, in whole microseconds; 0 if it was never sent."""
        return round(max(self.ended_at - self.sent_at, 0.0), 6) if self.sent_at else 0.0


class Save(NamedTuple):
    """Write the record, durably, with this intent (None: the transition is over), before anything else is done."""

    intent: Intent | None


class Send(NamedTuple):
    """Send the command of this work; the engine has been told. Its reply goes to ``Transition.replied``."""

    work: Work


class Look(NamedTuple):
    """Read the slots, then call ``Transition.looked``."""

    full: bool


class LastLook(NamedTuple):
    """Read the slots, then call ``Transition.confirmed``: nothing is called reached that was not looked at."""

    number: int


Effect = Save | Send | Look | LastLook


def why(verdict: Verdict) -> str:
    """Return why *verdict* is not what was wished, in words."""
    said = ""
    match verdict:
        case Refused():
            shown = "" if verdict.code is None else f" (OST status {verdict.code:#04x})"
            said = f"the guest refused: {verdict.reason}{shown}"
        case Pending(acknowledged=True):
            said = "the guest works on it, and has not answered in time"
        case Pending():
            said = "the guest has not reacted in time; QEMU never forgets the request"
        case Rejected():
            said = f"{verdict.error_class}: {verdict.desc}" + (f" ({verdict.hint})" if verdict.hint else "")
        case Denied():
            said = verdict.detail
        case Unknown():
            said = verdict.why
    return said


def report_on(
    work: Work,
    undo: Work | None,
    undone: bool | None,  # noqa: FBT001 -- three-valued
    *,
    unsent: str,
    unsent_back: str,
) -> StepReport:
    """Return what became of *work* and of its undoing; with why nothing more was sent, on either way."""
    reason = work.reason
    if work.verdict is None and not reason:
        reason = f"not sent: {unsent}"
    if undo is not None and (undo.reason or undo.verdict is None):
        reason = "; ".join(filter(None, (reason, f"undoing it: {undo.reason or f'not sent: {unsent_back}'}")))
    verdict = work.verdict
    if verdict is not None and not isinstance(verdict, Denied | Unknown):
        verdict = replace(verdict, seconds=work.seconds)  # of this step, where a removal may be older
    return StepReport(
        action=work.step.action,
        ids=work.step.ids,
        verdict=verdict,
        reason=reason,
        seconds=work.seconds,
        undo=None if undo is None else undo.verdict,
        undone=undone,
    )
