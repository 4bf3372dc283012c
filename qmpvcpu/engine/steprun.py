"""One step of a transition while it runs, and the stages that it goes through.

====== ================================================ ======================================================
step   stages                                           a stage ends
====== ================================================ ======================================================
plug   SENT, PLACING, PRESENT, STARTING, ONLINING,      SENT with QEMU's reply; PLACING, where anything is wanted
       ENDED                                            of its threads, once they are in their place; the others,
                                                        where they are waited in, with a proof: acknowledged,
                                                        started, online
unplug LEAVING_GUEST, SENT, REQUESTED, ENDED            LEAVING_GUEST, where the agent is asked first, with its
                                                        answer; SENT with QEMU's reply; REQUESTED with the end of its
                                                        removal, whose own states (``removal``) tell whether the
                                                        guest works on it. One that comes to nothing once the vCPU is
                                                        offline ends with RETURNING_TO_GUEST
online ONLINING, ENDED                                  ONLINING as that of a plug
====== ================================================ ======================================================

The table ``STAGES`` says what a step waits for in each stage beyond a reply, how that is found out where no event
tells it, and what is read before the step goes on or is given up. ``Batch`` goes through the rows in their order. To
add a stage, such as a further proof of a plug, add a row, and where it needs them an effect and an input
(``messages``) that tell the state what the step waits for.
"""

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.vmstate import Read, VmState
from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.model.options import CheckedOptions, Proof
from qmpvcpu.model.transition import Action, ProofSeconds, Step, StepReport, succeeded
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Denied, Pending, Refused, Rejected, Unknown, Unplugged, Verdict

BY_OTHER: Final = "changed by other"
BACK_ONLINE: Final = "taken offline in the guest, and brought online again"
EJECTED: Final = "plugged, then ejected by a removal that had been asked for twice"
NOT_RUNNING: Final = "the VM is paused, so that no vCPU runs"
LEFT_OFFLINE: Final = "the guest has it, but offline"


class StepStage(enum.Enum):
    """How far a step is."""

    QUEUED = "not sent"
    SENT = "sent, QEMU has not replied"
    UNSURE = "sent, and the connection was lost: what the next look shows is the reply"
    LEAVING_GUEST = "the guest's agent is asked to take it offline"
    PLACING = "plugged; its threads are being put in their place on the host"
    PRESENT = "QEMU accepted the plug; the guest's acknowledgement is awaited"
    STARTING = "plugged; that it runs is awaited"
    ONLINING = "plugged; that the guest has it online is awaited"
    REQUESTED = "QEMU accepted the removal, or it was under way already"
    RETURNING_TO_GUEST = "the unplug came to nothing; the agent is asked to bring it online again"
    ENDED = "over"

    __hash__ = object.__hash__  # members compare by identity; Enum's own hash is a call of Python for each look-up


class Probe(enum.Enum):
    """How it is found out whether what is waited for is so, where no event tells."""

    NONE = "events tell"
    PLACE = "QEMU is asked for its threads, and the host where they run"
    STARTED = "QEMU, or its host, is asked which vCPUs have run"
    GUEST = "the guest's agent is asked which CPUs are online, and to bring some online"

    __hash__ = object.__hash__


@dataclass(slots=True, eq=False)
class StepRun:
    """One slot's change under way: a step's, or the undoing of one.

    Attributes:
        step: What is to be done.
        undoes: The run that this undoes, or None.
        stage: How far it is.
        verdict: How it ended, or None.
        reason: Why it is not as wanted, or "".
        sent_at: When it was sent, by the caller's clock.
        ended_at: When it ended.
        deadline: When it is no longer waited for, or None.
        looking: True while the VM is read before it goes on, or is given up.
        overdue: True once the time for what it waits for is over.
        removal: The removal that is awaited, or None.
        ours: False if somebody else had done it, or asked for it, before.
        path: The QOM path of the CPU that it plugs, once that is sent.
        error: Why it was not sent, where a check denied it, or the agent failed.
        rejections: How often QEMU rejected it while it held the id of the CPU that was there before.
        arguments: Of its command, once that is sent.
        cause: What kept QEMU's reply from coming, or None.
        proofs: When each rung was proven of the CPU that it plugged, by the caller's clock.
        missing: The rung that was required of a plug and did not come, or None.
        no_agent: Why the agent did not do what it was asked for the last time, or "".
        is_offline: True once the agent says that its vCPUs are offline, so that QEMU is asked.
        taken_offline: True while the agent has them offline for this step, or what it finishes, or may have.
        unplaced: Why its threads are not in their place on the host; "": they are, or nothing is wanted of them.
        born_anyway: True once it is to be plugged though QEMU's main thread cannot be given its birthplace.
        born_on: The host CPUs that QEMU's main thread has while it is plugged; None: its own.
        taken_out: The run that takes its vCPUs out again, since they could not be put in their place; None: none.
        placed_at: When its threads were known to be in their place, by the caller's clock; None: they are not.
        known_rungs: How many rungs were known of its CPU when it last hurried to ask for the next; -1: it did not.
        first: First vCPU id of its slot.
        plugs: True if its command is ``device_add``: a plug, or a vCPU that was to be kept and has left.
        arrives: True if it goes through the stages of a plug: also one that is there, and only brought online.
    """

    step: Step
    undoes: "StepRun | None" = None
    stage: StepStage = StepStage.QUEUED
    verdict: Verdict | None = None
    reason: str = ""
    sent_at: float = 0.0
    ended_at: float = 0.0
    deadline: float | None = None
    looking: bool = False
    overdue: bool = False
    removal: Removal | None = None
    ours: bool = True
    path: str | None = None
    error: QmpVcpuError | None = None
    rejections: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cause: Exception | None = None
    proofs: Mapping[Proof, float] = field(default_factory=dict)
    missing: Proof | None = None
    no_agent: str = ""
    is_offline: bool = False
    taken_offline: bool = False
    unplaced: str = ""
    born_anyway: bool = False
    born_on: VcpuMap | None = None
    taken_out: "StepRun | None" = None
    placed_at: float | None = None
    known_rungs: int = -1
    first: int = field(init=False)
    plugs: bool = field(init=False)
    arrives: bool = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.step.first
        self.plugs = self.step.action is Action.PLUG
        self.arrives = self.plugs or self.step.action is Action.ONLINE

    @property
    def may_send(self) -> bool:
        """True while its command may be sent, or has no reply: a vCPU that is to be kept may yet be plugged again.

        One that is not in its place may yet be taken out again, and one that the agent has taken offline may yet be
        brought online again: if its removal comes to nothing.
        """
        if self.step.action is Action.KEEP or self.taken_offline:
            return self.stage is not StepStage.ENDED
        return self.stage in _MAY_SEND

    @property
    def takes_out(self) -> bool:
        """True if it takes vCPUs out again that could not be put in their place."""
        return self.undoes is not None and self.undoes.taken_out is self

    @property
    def is_unknown(self) -> bool:
        """True if nobody knows what became of it, or of taking out again what it plugged."""
        runs = (self, *(() if self.taken_out is None else (self.taken_out,)))
        return any(isinstance(run.verdict, Unknown) for run in runs)

    @property
    def was_tried(self) -> bool:
        """True once it was sent, or found that nothing is to be sent, or denied."""
        return bool(self.sent_at) or self.verdict is not None

    @property
    def proof_seconds(self) -> ProofSeconds | None:
        """In how many seconds from sending each rung was proven of what it plugged; None where it plugged nothing."""
        if not (self.proofs and self.plugs):
            return None
        return ProofSeconds(**{proof.value: self.seconds_until(at) for proof, at in self.proofs.items()})

    @property
    def left_offline(self) -> str:
        """Say that the agent has left its vCPUs offline, though they are still there; "": it has not."""
        if not self.taken_offline or isinstance(self.verdict, Unplugged):
            return ""
        if isinstance(self.verdict, Pending):
            return "it is offline in the guest"
        return "it may be offline in the guest" + (f": {self.no_agent}" if self.no_agent else "")

    @property
    def went_well(self) -> bool:
        """True if its slot became what was wanted, with the proof that was required."""
        return succeeded(self.step.action, self.verdict) and self.missing is None and self.taken_out is None

    @property
    def seconds(self) -> float:
        """From sending to the end, in whole microseconds; 0 if it was never sent."""
        return self.seconds_until(self.ended_at) if self.sent_at else 0.0

    def seconds_until(self, moment: float) -> float:
        """Return how long it was from sending to *moment*, by the caller's clock, in whole microseconds."""
        return round(max(moment - self.sent_at, 0.0), 6)


_MAY_SEND: Final = frozenset(
    {
        StepStage.QUEUED,
        StepStage.LEAVING_GUEST,
        StepStage.SENT,
        StepStage.UNSURE,
        StepStage.PLACING,
        StepStage.RETURNING_TO_GUEST,
    }
)


class StageRule(NamedTuple):
    """What a step waits for in a stage, beyond QEMU's reply.

    Attributes:
        of_plugs: True for a stage of plugs, False for one of removals.
        of_host: True if it waits for the host, and not for the guest: as long as for a reply of QEMU's, and also once
            nobody waits for the guest any more.
        proves: The rung that a plug waits for, or None.
        probe: How it is found out, where no event tells it.
        is_awaited: Whether the step waits here at all.
        is_over: Whether what it waits for is known.
        last_look: The read that is made before the step is given up when the time (in seconds) is over; NONE: none.
        proving_look: The read that has to confirm what is known before the step ends; NONE: none does.
    """

    of_plugs: bool
    of_host: bool
    proves: Proof | None
    probe: Probe
    is_awaited: Callable[[StepRun, VmState, CheckedOptions], bool]
    is_over: Callable[[StepRun, VmState], bool]
    last_look: Callable[[StepRun, VmState, float], Read]
    proving_look: Callable[[StepRun, VmState], Read]


def _wants_acknowledgement(run: StepRun, state: VmState, options: CheckedOptions) -> bool:
    return run.plugs and (options.awaited_proof is Proof.ACKNOWLEDGED or run.first in state.maybe_queued_twice)


def _is_acknowledged(run: StepRun, state: VmState) -> bool:
    slot = state.slots[run.first]
    return not slot.present or slot.acknowledged is not None


def _is_started(run: StepRun, state: VmState) -> bool:
    return not state.slots[run.first].present or Proof.STARTED in state.proofs_of(run.first)


def _wants_online(run: StepRun, state: VmState, options: CheckedOptions) -> bool:
    return (run.step.asks_agent and state.has_agent) or options.awaited_proof is Proof.ONLINE or not run.plugs


def _is_online(run: StepRun, state: VmState) -> bool:
    return not state.slots[run.first].present or Proof.ONLINE in state.proofs_of(run.first)


def _nothing_read(_run: StepRun, _state: VmState, _limit: float = 0.0) -> Read:
    return Read.NONE


def _read_if_maybe_ejected(run: StepRun, state: VmState) -> Read:
    """A second removal that may be queued ejects what was just plugged: only a read tells whether it did."""
    slot = state.slots[run.first]
    return Read.FULL if slot.present and run.first in state.maybe_queued_twice else Read.NONE


def _wants_place(run: StepRun, state: VmState, _options: CheckedOptions) -> bool:
    return run.plugs and state.places.wants(state.slots[run.first])


def _is_placed(run: StepRun, state: VmState) -> bool:
    return not state.slots[run.first].present or state.places.why_not(run.first) is not None


def _is_settled(run: StepRun, _state: VmState) -> bool:
    return run.removal is None or run.removal.state.is_final


#: What is waited for in each stage, in order. ``SENT`` is not in it: QEMU's reply ends it, or ``reply_timeout``.
STAGES: Final = MappingProxyType(
    {
        StepStage.PLACING: StageRule(
            of_plugs=True,
            of_host=True,
            proves=None,
            probe=Probe.PLACE,
            is_awaited=_wants_place,
            is_over=_is_placed,
            last_look=_nothing_read,
            proving_look=_nothing_read,
        ),
        StepStage.PRESENT: StageRule(
            of_plugs=True,
            of_host=False,
            proves=Proof.ACKNOWLEDGED,
            probe=Probe.NONE,
            is_awaited=_wants_acknowledgement,
            is_over=_is_acknowledged,
            last_look=lambda run, state, _limit: _read_if_maybe_ejected(run, state),
            proving_look=_read_if_maybe_ejected,
        ),
        StepStage.STARTING: StageRule(
            of_plugs=True,
            of_host=False,
            proves=Proof.STARTED,
            probe=Probe.STARTED,
            is_awaited=lambda run, _state, options: run.plugs and options.awaited_proof is Proof.STARTED,
            is_over=_is_started,
            last_look=_nothing_read,
            proving_look=_nothing_read,
        ),
        StepStage.ONLINING: StageRule(
            of_plugs=True,
            of_host=False,
            proves=Proof.ONLINE,
            probe=Probe.GUEST,
            is_awaited=_wants_online,
            is_over=_is_online,
            last_look=_nothing_read,
            proving_look=_nothing_read,
        ),
        StepStage.REQUESTED: StageRule(
            of_plugs=False,
            of_host=False,
            proves=None,
            probe=Probe.NONE,
            is_awaited=lambda _run, _state, _options: True,
            is_over=_is_settled,
            # The guest may send no OST, and under TCG QEMU sends no event.
            last_look=lambda _run, _state, limit: Read.SLOTS if limit else Read.NONE,
            proving_look=_nothing_read,
        ),
    }
)


def next_stage(run: StepRun, state: VmState, options: CheckedOptions) -> StepStage | None:
    """Return the stage after its own in which *run* has to wait, or None if there is none."""
    stages = tuple(STAGES)
    for stage in stages[stages.index(run.stage) + 1 if run.stage in STAGES else 0 :]:
        rule = STAGES[stage]
        if rule.of_plugs is run.arrives and rule.is_awaited(run, state, options):
            return stage
    return None


def why(verdict: Verdict) -> str:
    """Return why *verdict* is not what was wanted, in words."""
    said = ""
    match verdict:
        case Refused(by_agent=True):
            said = f"the guest keeps it online, and QEMU was sent nothing: {verdict.reason}"
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
    run: StepRun,
    undo: StepRun | None,
    undone: bool | None,  # noqa: FBT001 -- three-valued
    *,
    unsent: str,
    unsent_back: str,
) -> StepReport:
    """Return what became of *run* and of its undoing; with why nothing more was sent, on either way."""
    reason = run.reason
    if run.verdict is None and not reason:
        reason = f"not sent: {unsent}"
    reason = "; ".join(filter(None, (reason, run.left_offline)))
    if undo is not None and (undo.reason or undo.verdict is None):
        reason = "; ".join(filter(None, (reason, f"undoing it: {undo.reason or f'not sent: {unsent_back}'}")))
    verdict = run.verdict
    if verdict is not None and not isinstance(verdict, Denied | Unknown):
        verdict = replace(verdict, seconds=run.seconds)  # of this step, where a removal may be older
    return StepReport(
        action=run.step.action,
        ids=run.step.ids,
        verdict=verdict,
        reason=reason,
        seconds=run.seconds,
        undo=None if undo is None else undo.verdict,
        undone=undone,
        proofs=run.proof_seconds,
        missing=run.missing,
        placed=None if run.placed_at is None else run.seconds_until(run.placed_at),
        unplaced=run.unplaced,
        taken_out=run.taken_out is not None,
    )
