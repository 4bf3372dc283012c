"""A batch of steps, carried out: sent in order within its bounds, awaited, and ended one by one.

Rules that live here:

- Plugs come before unplugs; both are sent in the order given.
- At most ``in_flight`` commands have no reply. One by one: a removal is requested when no other is out.
- A removal that is under way is joined: nothing is sent, its end is the step's.
- Where a failure halts the batch, nothing more is sent after it; what is out is awaited.
- A deadline ends the waiting and nothing else. Before a removal is given up there is one last look.
- A change that another client has made meanwhile is not made again, and does not count as ours.
- A vCPU is born in its place: QEMU's main thread is given that place for its ``device_add``, so plugs into other
  places wait for the reply. One that is not in its place afterwards is taken out again, if it has to be there.
- What no event tells (a vCPU runs, the guest has it online) is asked for again and again, for all steps at once.
- A vCPU that the agent has taken offline for an unplug is brought online again if the unplug comes to nothing; that
  is awaited even where nothing else is.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from qmpvcpu.engine.messages import GuestTold
from qmpvcpu.engine.removal import Removal, State
from qmpvcpu.engine.steprun import (
    BACK_ONLINE,
    BY_OTHER,
    EJECTED,
    LEFT_OFFLINE,
    NOT_RUNNING,
    STAGES,
    Probe,
    StepRun,
    StepStage,
    next_stage,
    why,
)
from qmpvcpu.engine.vmstate import Read, VmState
from qmpvcpu.errors import (
    AgentForbiddenError,
    DenialReason,
    GuestRefusedError,
    MonitorLostError,
    Outcome,
    QmpVcpuError,
    StepDeniedError,
)
from qmpvcpu.events import Origin
from qmpvcpu.model.options import CheckedOptions, Proof
from qmpvcpu.model.transition import Action, Step, succeeded
from qmpvcpu.model.verdicts import Denied, Pending, Plugged, Refused, Unknown, Unplugged, Verdict
from qmpvcpu.planning.checks import PLUG, check_plug, check_unplug, plug_suspects

# What no event tells is asked for soon at first, since most guests take a vCPU within milliseconds.
_FIRST_PAUSE_S: Final = 0.01
_LONGEST_PAUSE_S: Final = 0.5
_PLACING_PAUSE_S: Final = 1.0  # while there are more to plug, their threads are looked for seldom, and all at once
_PASSING: Final = ("EBUSY", "EAGAIN")  # a guest says so while it changes another CPU


class SendStep(NamedTuple):
    """Send the command of *run*; what comes of it goes to ``replied`` or ``unanswered``."""

    run: StepRun


class LookAgain(NamedTuple):
    """Read the slots, then call ``looked`` with *runs*, whether or not it succeeded."""

    read: Read
    runs: tuple[StepRun, ...]


class LookStarted(NamedTuple):
    """Find out which of the vCPUs of *runs* have run, then call ``probed``."""

    runs: tuple[StepRun, ...]


class PutInPlace(NamedTuple):
    """Put the threads of the vCPUs of *runs* in their place, then call ``placed``."""

    runs: tuple[StepRun, ...]


class AskGuest(NamedTuple):
    """Ask the guest's agent, then call ``guest_told``.

    Attributes:
        runs: Whose vCPUs it is about; one, unless the guest's list is all that is asked for.
        online: True has them brought online, False taken offline; None only asks for the list.
        limit: How long the agent has, in seconds.
    """

    runs: tuple[StepRun, ...]
    online: bool | None
    limit: float


BatchTask = SendStep | LookAgain | LookStarted | PutInPlace | AskGuest


class Bounds(NamedTuple):
    """How a batch is carried out.

    Attributes:
        limit: How long the guest has for each answer, in seconds; 0 only requests.
        halts: Send nothing more after a failure.
        one_by_one: Request a removal only when no other is out.
        last_moment: When nothing more is waited for, by the caller's clock, or None.
        reply_timeout: How long QEMU has for each reply, in seconds.
        reconnects: Wait for ``resumed`` when the connection is lost, rather than end.
        single: The caller waits for this one step: it gets the rejection of a removal that it joined, where a map
            would request the removal itself.
        until_accepted: A removal is over once QEMU has accepted it.
    """

    limit: float
    halts: bool = False
    one_by_one: bool = False
    last_moment: float | None = None
    reply_timeout: float = 10.0
    reconnects: bool = False
    single: bool = False
    until_accepted: bool = False


class InFlight:
    """Everything that is waited for, each found in constant time.

    Replies share one timeout and answers another, so both are sorted by deadline.

    Attributes:
        unsure: Steps whose command was in flight when the connection was lost.
        probed: Steps that wait for what no event tells, by how it is found out.
    """

    def __init__(self) -> None:
        self.unsure: list[StepRun] = []
        self._sent: dict[StepRun, None] = {}  # oldest first
        self._awaited: dict[StepRun, None] = {}
        self._due: deque[tuple[float, StepRun]] = deque()  # one that waits a second time is in it twice
        self._plugs: dict[StepRun, None] = {}
        self._unplugs: dict[StepRun, None] = {}
        self._by_removal: dict[Removal, StepRun] = {}
        self._asked: dict[StepRun, None] = {}
        self._present: dict[int, StepRun] = {}  # plugs that have more to prove, by the slot's first vCPU id
        self._touched: dict[StepRun, None] = {}
        self.probed: dict[Probe, dict[StepRun, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._sent or self._awaited or self._asked or self.unsure)

    @property
    def sent(self) -> tuple[StepRun, ...]:
        """Steps without a reply of QEMU's, oldest first."""
        return tuple(self._sent)

    @property
    def awaited(self) -> tuple[StepRun, ...]:
        """Steps without an answer of the guest's."""
        return tuple(self._awaited)

    def touch(self, first: int) -> bool:
        """Note that something new is known of the slot of vCPU *first*; return whether a plug waits there."""
        run = self._present.get(first)
        if run is not None:
            self._touched[run] = None
        return run is not None

    def take_touched(self) -> list[StepRun]:
        """Return the plugs in whose slot something new is known since the last call, or that began to wait."""
        if not self._touched:
            return []
        touched, self._touched = self._touched, {}
        return list(touched)

    @property
    def asked(self) -> tuple[StepRun, ...]:
        """Steps whose vCPUs the agent is to take offline, or to bring online again."""
        return tuple(self._asked)

    @property
    def commands(self) -> int:
        """How many commands have no reply, those to the agent among them."""
        return len(self._sent) + len(self._asked)

    @property
    def plugging(self) -> bool:
        """True while a plug is out."""
        return bool(self._plugs)

    @property
    def unplugging(self) -> bool:
        """True while a removal that is to be made is out."""
        return bool(self._unplugs)

    @property
    def deadline(self) -> float | None:
        """When the first of them is no longer waited for, or earlier."""
        reply = next(iter(self._sent)).deadline if self._sent else None
        while self._due and not _waits(*self._due[0]):
            self._due.popleft()
        answer = self._due[0][0] if self._due else None
        if reply is None or answer is None:
            return answer if reply is None else reply
        return min(reply, answer)

    def watch(self, run: StepRun, removal: Removal) -> None:
        """Note that the end of *removal* is that of *run*."""
        run.removal = removal
        self._by_removal[removal] = run

    def watcher(self, removal: Removal) -> StepRun | None:
        """Return the step that awaits the end of *removal*, will when its turn comes, or did until its deadline."""
        run = self._by_removal.get(removal)
        if run is None or run.removal is not removal or run.plugs:  # it has left, and is plugged again
            return None
        waits = run in self._awaited or run.stage is StepStage.QUEUED or isinstance(run.verdict, Pending)
        return run if waits else None

    def send(self, run: StepRun, now: float, limit: float) -> None:
        """Note that the command of *run* is sent."""
        run.sent_at = run.sent_at if run.is_offline else now
        run.stage, run.deadline = StepStage.SENT, now + limit
        self._sent[run] = None
        self._note(run)

    def ask(self, run: StepRun, stage: StepStage) -> None:
        """Note that the agent is asked to take the vCPUs of *run* offline, or to bring them online again."""
        run.stage = stage
        self._asked[run] = None
        self._note(run)

    def take_reply(self, run: StepRun) -> bool:
        """Note a reply to *run*; return False if it is no longer waited for."""
        waited = run in self._sent
        self._sent.pop(run, None)
        return waited

    def wait(self, run: StepRun, stage: StepStage, deadline: float) -> None:
        """Note that *run* waits in *stage* from now on."""
        run.stage, run.deadline, run.looking, run.overdue = stage, deadline, False, False
        self._awaited[run] = None
        self._due.append((deadline, run))
        self._note(run)
        for runs in self.probed.values():  # it waits in one stage only
            runs.pop(run, None)
        probe = STAGES[stage].probe
        if probe is not Probe.NONE:
            self.probed.setdefault(probe, {})[run] = None
        if run.arrives:
            self._present[run.first] = run
            self._touched[run] = None

    def _note(self, run: StepRun) -> None:
        if run.plugs:
            self._plugs[run] = None
        elif run.step.action is Action.UNPLUG:
            self._unplugs[run] = None

    def drop(self, run: StepRun) -> None:
        """Wait for *run* no more."""
        for those in (self._sent, self._awaited, self._asked, self._plugs, self._unplugs, *self.probed.values()):
            those.pop(run, None)
        if self._present.get(run.first) is run:
            del self._present[run.first]

    def overdue_replies(self, now: float) -> list[StepRun]:
        """Return the steps that QEMU should have replied to by *now*."""
        return [run for run in self._sent if run.deadline is not None and now >= run.deadline]

    def take_overdue_answers(self, now: float) -> list[StepRun]:
        """Return the steps that should have been answered by *now*; each once."""
        overdue: dict[StepRun, None] = {}
        while self._due and (now >= self._due[0][0] or not _waits(*self._due[0])):
            deadline, run = self._due.popleft()
            if _waits(deadline, run):
                overdue[run] = None
        return list(overdue)


@dataclass(slots=True)
class _Pace:
    """How often something is asked for that no event tells.

    Attributes:
        due: When it is asked for next.
        pause: For how long it is not asked for after that, in seconds.
        out: How many questions have no answer.
    """

    due: float = 0.0
    pause: float = _FIRST_PAUSE_S
    out: int = 0


def _is_final(error: QmpVcpuError | None) -> bool:
    """Return True if asking the agent again for what it answered with *error* would not help."""
    if isinstance(error, GuestRefusedError):
        return error.errno not in _PASSING
    return isinstance(error, AgentForbiddenError)


def _waits(deadline: float, run: StepRun) -> bool:
    return run.deadline == deadline and run.stage in STAGES and not run.looking


class Batch:
    """Some steps on one VM, from the first command to the last answer.

    Args:
        runs: What is to be done, in order.
        state: What is known of the VM.
        options: What the caller allows, and what proof is wanted.
        bounds: How it is carried out.

    Attributes:
        failed: True once a step did not become what it should.
        halted: Why nothing more is sent, or "".
        offline: True while the connection is lost: nothing is sent until ``resumed``.
    """

    def __init__(self, runs: Iterable[StepRun], state: VmState, options: CheckedOptions, bounds: Bounds) -> None:
        self.failed = False
        self.halted = ""
        self.offline = False
        self._state = state
        self._options = options
        self._bounds = bounds
        self._plugs: deque[StepRun] = deque()
        self._others: deque[StepRun] = deque()
        self._take_outs: deque[StepRun] = deque()
        self._out = InFlight()
        self._stopped = ""
        self._blocked = False  # the next plug waits for others, which are born elsewhere
        self._why_not_placed = ""
        self._now = 0.0
        self._paces: defaultdict[Probe, _Pace] = defaultdict(_Pace)
        self._returning: list[StepRun] = []
        for run in runs:
            (self._plugs if run.plugs else self._others).append(run)
            removal = state.removals.get(run.first)
            if removal is not None and not run.plugs and (run.step.action is Action.KEEP or removal.is_joined):
                run.ours = False
                self._out.watch(run, removal)

    # What comes next.

    @property
    def ended(self) -> bool:
        """True when nothing is left to be sent, or to be waited for."""
        return not (self._out or self._take_outs) and (bool(self.halted) or not (self._plugs or self._others))

    @property
    def has_commands(self) -> bool:
        """True while a command has no reply, of QEMU's or of the agent's."""
        return bool(self._out.commands)

    @property
    def is_placing(self) -> bool:
        """True while threads are put in their place, or what could not be is to be taken out again."""
        return bool(self._take_outs or self._out.probed.get(Probe.PLACE))

    @property
    def deadline(self) -> float | None:
        """When ``advance`` is to be called again at the latest, by the caller's clock."""
        first = self._out.deadline
        for _, due, _ in self._probes():
            first = due if first is None else min(first, due)
        if (until := self._blocked_until) is not None:
            first = until if first is None else min(first, until)
        last = self._bounds.last_moment
        if self.halted or self.ended or last is None:
            return first
        return last if first is None else min(first, last)

    def touched(self, first: int) -> bool:
        """Take in that something new is known of a slot; return whether a plug waits for the guest's answer there."""
        return self._out.touch(first)

    def advance(self, now: float, *, may_send: bool = True) -> list[BatchTask]:
        """Return what is to be done now."""
        self._now = now
        tasks = self._expire() + self._prove()
        if self.halted:
            for run in [each for each in self._others if each.taken_offline]:
                self._others.remove(run)
                self._end(run, None)
        if self._bounds.single:
            self._await_joined()
        while may_send and (sent := self._send_next()) is not None:
            tasks += sent
        if self._out.probed:
            tasks += self._probe()
        if self._returning:
            returning, self._returning = self._returning, []
            limit = self._bounds.reply_timeout
            tasks += [AskGuest((run,), online=True, limit=limit) for run in returning]
        return tasks

    # What is told.

    def replied(self, run: StepRun, verdict: Verdict | None, now: float) -> None:
        """Take QEMU's reply to the command of *run*: its verdict, or None where QEMU accepted it."""
        self._now = now
        if not self._out.take_reply(run):
            return  # its deadline had passed; the state has taken the reply in
        if verdict is None:
            self._go_further(run)
        else:
            self._end(run, verdict)

    def unanswered(self, run: StepRun, error: MonitorLostError, now: float) -> None:
        """Note that the connection was lost with the command of *run* in flight; nothing more is sent over it."""
        self._now = now
        self.offline = True
        if not self._out.take_reply(run):
            return
        if self._bounds.reconnects:
            run.stage = StepStage.UNSURE
            self._out.unsure.append(run)
        else:
            self._end_unknown(run, str(error), error)

    def answered(self, removal: Removal, now: float) -> StepRun | None:
        """Take in that *removal* became final, and return the step it ends, even one whose deadline has passed."""
        self._now = now
        run = self._out.watcher(removal)
        if run is not None:
            if run.stage is StepStage.QUEUED:  # it joined, and needs no turn any more: nothing is to be sent
                self._others.remove(run)
            self._conclude(run)
        return run

    def accepted_by_other(self, removal: Removal, now: float) -> bool:
        """Take in that QEMU has accepted *removal*, which may be joined here; return whether that ends the step."""
        if not self._bounds.until_accepted or removal.state is State.SENT:
            return False
        self._now = now
        run = self._out.watcher(removal)
        if run is None or run.stage is not StepStage.REQUESTED:
            return False
        self._end(run, None)
        return True

    def add(self, run: StepRun) -> None:
        """Have *run* done too; a halted batch ends it unsent."""
        (self._plugs if run.plugs else self._others).append(run)

    def looked(self, runs: Iterable[StepRun], now: float) -> None:
        """Note that the look made for *runs* is over, whether or not it succeeded."""
        self._now = now
        for run in runs:
            if run.looking and run.stage in STAGES:
                run.looking = False
                self._go_further(run)

    def probed(self, now: float) -> None:
        """Note that a look at which vCPUs have run is over; the state has taken in what it showed."""
        self._now = now
        self._slow_down(Probe.STARTED)

    def placed(self, error: Exception | None, now: float) -> None:
        """Note that threads have been put in their place, or why none was; the state has taken in which."""
        self._now = now
        self._why_not_placed = "" if error is None else str(error)
        self._slow_down(Probe.PLACE)

    def not_born(self, run: StepRun, why: str, now: float) -> None:
        """Note that *run* was not sent, since QEMU's main thread cannot be given its birthplace."""
        self._now = now
        if not self._out.take_reply(run):
            return
        if self._requires_place(run):
            self._deny(run, StepDeniedError(PLUG, run.step.ids, DenialReason.CANNOT_PLACE, why))
        else:
            run.born_anyway, run.stage = True, StepStage.QUEUED
            self._send_again(run)

    def guest_told(self, ask: AskGuest, told: GuestTold, now: float) -> None:
        """Note that the agent has been asked what *ask* says; the state has taken in the list that it *told*."""
        self._now = now
        for run in ask.runs:
            if run.stage is StepStage.LEAVING_GUEST:
                self._left_guest(run, told)
            elif run.stage is StepStage.RETURNING_TO_GUEST:
                self._returned_to_guest(run, told)
            elif run.stage is StepStage.ONLINING:
                run.no_agent = "" if told.error is None else str(told.error)
                if ask.online and _is_final(told.error):
                    self._give_up(run)
        if ask.runs[0].arrives:
            waiting = self._out.probed.get(Probe.GUEST, ()) if ask.online is None else ()
            self._slow_down(Probe.GUEST, asks_at_once=any(map(self._is_to_be_brought_online, waiting)))

    def _slow_down(self, probe: Probe, *, asks_at_once: bool = False) -> None:
        pace = self._paces[probe]
        pace.out = max(pace.out - 1, 0)
        pace.due = self._now if asks_at_once else self._now + pace.pause
        pace.pause = min(2 * pace.pause, _LONGEST_PAUSE_S)

    def paused(self) -> None:
        """Note that the connection is lost and may come back: nothing is sent until ``resumed``."""
        self.offline = True

    def resumed(self, now: float) -> None:
        """Note that the connection is back, and the state has read the VM again."""
        self._now = now
        self.offline = False
        unsure, self._out.unsure = self._out.unsure, []
        for run in reversed(unsure):  # requeue at the front, keeping the order
            present = self._state.slots[run.first].present
            unanswered, run.stage, run.removal = run.removal, StepStage.QUEUED, None
            if run.plugs and present:
                run.stage = StepStage.SENT  # and replied to: the guest may still be waited for
                self._go_further(run)
            elif not (run.plugs or present):
                if unanswered is not None:  # who asked for no more than the removal gets one that is over
                    run.removal = replace(unanswered, state=State.UNPLUGGED, settled_at=now)
                self._end(run, Unplugged(run.step.ids))
            elif self.halted and not (run.plugs or run.undoes is not None):
                self._resume_halted(run)
            else:
                # Sent again, unless the guest is found to work on it: where it has not reacted, nothing is doubled.
                self._send_again(run)

    def _send_again(self, run: StepRun) -> None:
        """Queue *run* before all others of its kind; it may never be sent."""
        self._out.drop(run)
        self._state.places.arriving.difference_update(run.step.ids)
        (self._plugs if run.plugs else self._take_outs if run.takes_out else self._others).appendleft(run)

    def _resume_halted(self, run: StepRun) -> None:
        """Await the guest, if it is found to work on a removal that is not to be sent again."""
        removal = self._state.removals.get(run.first)
        if removal is None:
            why_unknown = "the connection was lost with the command in flight, and nothing more is sent"
            self._end(run, Unknown(run.step.ids, why_unknown))
        else:
            self._out.watch(run, removal)
            self._await_removal(run)

    def halt(self, reason: str) -> None:
        """Send nothing more; what is out is awaited."""
        self.halted = self.halted or reason

    def abandon(self, reason: str, now: float) -> None:
        """Send nothing more, and ask no more for what no event tells; what is out is awaited.

        What was plugged is put in its place, or taken out again, as if somebody waited for it.
        """
        self._now = now
        self.halt(reason)
        for run in itertools.chain.from_iterable(map(tuple, self._out.probed.values())):
            if not STAGES[run.stage].of_host:
                self._give_up(run)

    def stop(self, reason: str, now: float) -> None:
        """Send nothing more, and wait for no answer of the guest's.

        Replies of QEMU are still awaited, and that threads are put in their place.
        """
        self._now = now
        self._stopped = reason
        self.halted = self.halted or reason
        for run in self._take_outs:
            run.reason = f"not sent: {reason}"
        self._take_outs.clear()
        for run in self._out.awaited:
            if not STAGES[run.stage].of_host:
                self._give_up(run, f"{reason}, before the guest's answer")

    def lose(self, error: MonitorLostError, now: float) -> None:
        """Note that the connection is lost for good."""
        reason = error.why
        self.stop(reason, now)
        for run in self._out.awaited:
            self._give_up(run, reason)
        for run in (*self._out.sent, *self._out.unsure):
            self._end_unknown(run, reason, error)
        self._out.unsure.clear()
        for run in (*self._out.asked, *(each for each in self._others if each.taken_offline)):
            self._out.drop(run)  # it is not awaited that it comes back
            run.stage, run.ended_at, run.taken_offline = StepStage.ENDED, now, True

    # Sending.

    def _send_next(self) -> list[BatchTask] | None:
        """Send the next command, if one can be sent now; None if not."""
        if self.offline or self._out.commands >= self._options.in_flight:
            return None
        if self._take_outs:
            return self._send_unplug(self._take_outs.popleft())
        if self._plugs and not self.halted:
            return self._send_plug()
        if self.halted or not self._others or self._out.plugging or self._has_to_wait(self._others[0]):
            return None
        return self._send_other(self._others.popleft())

    def _send_other(self, run: StepRun) -> list[BatchTask]:
        if run.removal is None and run.step.action is not Action.KEEP:
            return self._bring_online(run) if run.step.action is Action.ONLINE else self._send_unplug(run)
        run.sent_at = self._now
        self._await_removal(run)
        return []

    def _has_to_wait(self, run: StepRun) -> bool:
        """Return True if *run* is not sent before another has ended, or the agent has answered for another."""
        if self._bounds.one_by_one and run.step.action is not Action.KEEP and self._out.unplugging:
            return True
        # An agent does one thing after another, and a refusal may halt the rest.
        return self._asks_agent(run) and any(map(self._asks_agent, self._out.asked))

    @staticmethod
    def _asks_agent(run: StepRun) -> bool:
        """Return True if the agent is asked, or will be, before QEMU is."""
        return run.step.action is Action.UNPLUG and run.step.asks_agent and not run.is_offline

    def _bring_online(self, run: StepRun) -> list[BatchTask]:
        if not self._state.slots[run.first].present:
            return self._found_so(run, None)
        if not self._state.has_agent:
            detail = "it may be offline in the guest, and no agent was given to bring it online: attach with agent="
            self._end(run, Denied(run.step.ids, DenialReason.NO_AGENT, detail))
            return []
        run.sent_at = self._now
        self._wait(run, StepStage.ONLINING)
        return []

    def _await_joined(self) -> None:
        """Await the removal that was joined: nothing is sent for it, so it needs no turn."""
        if self._others and self._others[0].removal is not None and not self._plugs:
            run = self._others.popleft()
            run.sent_at = self._now
            self._await_removal(run)

    def _send_plug(self) -> list[BatchTask] | None:
        run, places = self._plugs[0], self._state.places
        first = run.first
        run.born_on = None if run.born_anyway else places.birthplace(self._state.slots[first])
        self._blocked = not places.may_be_born(run.born_on)
        if self._blocked:
            return None
        self._plugs.popleft()
        if self._state.slots[first].present and (run.step.action is Action.KEEP or not self._bounds.single):
            return self._found_plugged(run)
        options = self._options if run.step.action is not Action.KEEP else self._options.without_required_place()
        try:
            check_plug(self._state.situation, first, options)
        except StepDeniedError as error:
            return self._deny(run, error)
        run.path = self._state.plug_sent(first)
        places.birth_begins(first, run.born_on, self._now)
        places.arriving.update(run.step.ids)
        return self._mark_sent(run)

    @property
    def _blocked_until(self) -> float | None:
        """When QEMU should have replied to the plug that the next one has to wait for; None: it waits for none."""
        oldest = self._state.places.oldest_birth
        if oldest is None or not (self._blocked and self._plugs) or self.halted or self.offline:
            return None
        return oldest[1] + self._bounds.reply_timeout

    def _deny_blocked(self) -> None:
        """End the plugs that wait for another one to which QEMU does not reply."""
        while (until := self._blocked_until) is not None and self._now >= until:
            run, oldest = self._plugs[0], self._state.places.oldest_birth
            if oldest is None or self._state.places.may_be_born(run.born_on):
                return
            self._plugs.popleft()
            other = self._state.slots[oldest[0]].ids
            why_not = (
                f"QEMU did not reply to the plug of vCPU {other} {self._in_time}, which is born on other host CPUs"
            )
            self._deny(run, StepDeniedError(PLUG, run.step.ids, DenialReason.IN_PROGRESS, why_not))

    def _send_unplug(self, run: StepRun) -> list[BatchTask]:
        first = run.first
        slot = self._state.slots[first]
        if not slot.present and (run.is_offline or run.takes_out or not self._bounds.single):
            return self._found_gone(run)
        if run.undoes is not None and slot.qom_path != run.undoes.path:
            return self._found_so(run, Unplugged(run.step.ids) if run.takes_out else None)
        removal = self._state.removals.get(first)
        if removal is not None and removal.is_joined:
            run.ours = bool(run.arguments)  # sent before the connection was lost: then it is our own
            run.sent_at = run.sent_at or self._now
            self._out.watch(run, removal)
            self._await_removal(run)
            return []
        try:
            check_unplug(self._state.situation, first, self._options._replace(offline_first=run.step.asks_agent))
        except StepDeniedError as error:
            return self._deny(run, error)
        if run.step.asks_agent and not run.is_offline:
            run.sent_at = self._now
            self._out.ask(run, StepStage.LEAVING_GUEST)
            return [AskGuest((run,), online=False, limit=self._patience_with_agent())]
        self._out.watch(run, self._state.unplug_sent(first, self._now))
        return self._mark_sent(run)

    def _left_guest(self, run: StepRun, told: GuestTold) -> None:
        """Take in what became of taking the vCPUs of *run* offline: only then is QEMU asked."""
        self._out.drop(run)
        # A late agent may do it yet, and a list may be late to show it.
        unsure = told.error is not None and told.error.outcome is not Outcome.UNCHANGED
        run.taken_offline = run.taken_offline or bool(told.changed) or unsure
        if not self._state.slots[run.first].present:  # somebody else was faster
            self._found_gone(run)
        elif isinstance(told.error, GuestRefusedError):
            said = told.error.said
            self._state.refused_by_agent(run.first, said)
            seconds = run.seconds_until(self._now)
            self._end(run, Refused(run.step.ids, None, said, seconds=seconds, by_agent=True))
        elif told.error is not None:
            run.error = told.error
            self._end(run, Denied(run.step.ids, DenialReason.NO_AGENT, str(told.error)))
        elif self.halted:
            self._end(run, None)
        else:
            run.is_offline, run.stage = True, StepStage.QUEUED
            self._others.appendleft(run)

    def _returned_to_guest(self, run: StepRun, told: GuestTold) -> None:
        self._out.drop(run)
        run.stage, run.taken_offline = StepStage.ENDED, told.error is not None
        run.no_agent = "" if told.error is None else str(told.error)
        if told.error is None and run.verdict is None:
            run.reason = "; ".join(filter(None, (run.reason, f"not sent: {self.halted}", BACK_ONLINE)))

    def _found_plugged(self, run: StepRun) -> list[BatchTask]:
        """Go on without sending: somebody else has plugged it, and the guest may still be waited for."""
        stage = next_stage(run, self._state, self._options)
        if stage is None:
            return self._found_so(run, Plugged(run.step.ids))
        run.ours, run.sent_at = False, self._now
        self._wait(run, stage)
        return []

    def _found_gone(self, run: StepRun) -> list[BatchTask]:
        """End the unplug *run*, which somebody else has done; who only requests it gets a removal that is over."""
        if self._bounds.until_accepted:
            path, now = run.step.qom_path or "", self._now
            run.removal = Removal(run.step.ids, path, Origin.OTHER, run.sent_at, State.UNPLUGGED, settled_at=now)
        return self._found_so(run, Unplugged(run.step.ids))

    def _found_so(self, run: StepRun, verdict: Verdict | None) -> list[BatchTask]:
        """End *run* without sending: somebody else has changed its slot."""
        run.ours = False
        self._end(run, verdict, BY_OTHER)
        return []

    def _deny(self, run: StepRun, error: StepDeniedError) -> list[BatchTask]:
        run.error = error
        self._end(run, Denied(run.step.ids, error.reason, error.detail))
        return []

    def _mark_sent(self, run: StepRun) -> list[BatchTask]:
        self._out.send(run, self._now, self._bounds.reply_timeout)
        return [SendStep(run)]

    # Waiting.

    def _go_further(self, run: StepRun) -> None:
        """Have *run* wait in the next stage in which it has to; end it if there is none, or its time is over."""
        if run.stage is StepStage.PLACING:
            self._state.places.arriving.difference_update(run.step.ids)
            if self._has_to_leave(run):
                self._take_out(run)
                return
            run.overdue = False  # what is awaited next has time of its own
        stage = None if run.overdue else next_stage(run, self._state, self._options)
        if stage is None and run.stage is StepStage.SENT:  # QEMU's acceptance is enough
            self._end(run, Plugged(run.step.ids, seconds=run.seconds_until(self._now)))
        elif stage is None:
            self._give_up(run)
        elif run.arrives:
            self._wait(run, stage)
        else:
            self._await_removal(run)

    def _has_to_leave(self, run: StepRun) -> bool:
        """Take in whether *run* is in its place; return True if it is not, and has to be."""
        why_not = self._state.places.why_not(run.first)
        if not self._state.slots[run.first].present:
            return False
        run.unplaced = why_not if why_not is not None else self._why_unknown
        if not run.unplaced:
            run.placed_at = self._now
            return False
        return self._requires_place(run)

    @property
    def _why_unknown(self) -> str:
        limit = f"within {2 * self._bounds.reply_timeout:g} s"
        return "; ".join(filter(None, (f"its threads were not found {limit}", self._why_not_placed)))

    def _requires_place(self, run: StepRun) -> bool:
        """Return True if what *run* plugs must not stay anywhere else. One that was there before may."""
        required = self._options.requires_place(self._state.places.placement)
        return required and run.ours and run.step.action is not Action.KEEP

    def _take_out(self, run: StepRun) -> None:
        """End the plug *run*, which is not where it has to be, and have its vCPUs taken out again."""
        run.taken_out = StepRun(Step(Action.UNPLUG, run.step.ids), undoes=run)
        if self._stopped:
            run.taken_out.reason = f"not sent: {self._stopped}"
        else:
            self._take_outs.append(run.taken_out)
        self._end(run, Plugged(run.step.ids, seconds=run.seconds_until(self._now)))

    @property
    def _in_time(self) -> str:
        return f"within {self._bounds.reply_timeout:g} s"

    def _await_removal(self, run: StepRun) -> None:
        """Await the end of the removal of *run*, or its acceptance where that is enough."""
        self._wait(run, StepStage.REQUESTED)
        if STAGES[StepStage.REQUESTED].is_over(run, self._state):
            self._conclude(run)
        elif self._bounds.until_accepted and run.removal is not None and run.removal.state is not State.SENT:
            self._end(run, None)

    def _wait(self, run: StepRun, stage: StepStage) -> None:
        rule = STAGES[stage]
        if stage is StepStage.PLACING and not self._out.probed.get(Probe.PLACE):
            self._paces[Probe.PLACE] = _Pace(due=self._now)
        limit = self._bounds.reply_timeout if rule.of_host or self._bounds.until_accepted else self._bounds.limit
        # The question may have to wait for another one's answer, and its own may be as late.
        self._out.wait(run, stage, self._now + (2 * limit if rule.of_host else limit))
        if self._stopped and not (rule.of_host or rule.is_over(run, self._state)):
            self._give_up(run)

    def _expire(self) -> list[BatchTask]:
        """Act on the deadlines that have passed."""
        last = self._bounds.last_moment
        if last is not None and not self.halted and not self.ended and self._now >= last:
            self.failed = True
            self.stop("total_timeout has passed", self._now)
        moments = [each for each in (self._out.deadline, self._blocked_until) if each is not None]
        if not moments or self._now < min(moments):
            return []
        limit = self._in_time
        for run in self._out.overdue_replies(self._now):
            command = "device_add" if run.plugs else "device_del"
            silence = f"QEMU did not reply to {command} {limit}; a late reply becomes an event"
            self._end(run, Unknown(run.step.ids, silence))
        self._deny_blocked()
        looks: dict[Read, list[StepRun]] = {}
        for run in self._out.take_overdue_answers(self._now):
            if self._bounds.until_accepted:
                self._end(run, Unknown(run.step.ids, f"QEMU did not reply to device_del {limit}"))
                continue
            if self.offline and STAGES[run.stage].of_host:  # QEMU is asked for its threads once it is back
                self._wait(run, run.stage)
                continue
            run.overdue = True
            looks.setdefault(STAGES[run.stage].last_look(run, self._state, self._bounds.limit), []).append(run)
        return self._look_before(looks)

    def _prove(self) -> list[BatchTask]:
        """Have the plugs go on for which what they wait for is known."""
        looks: dict[Read, list[StepRun]] = {}
        for run in self._out.take_touched():
            rule = STAGES.get(run.stage)
            if rule is None or run.looking:
                continue
            if rule.is_over(run, self._state):
                looks.setdefault(rule.proving_look(run, self._state), []).append(run)
            elif rule.proves is not None and rule.probe is not Probe.NONE:
                self._hurry(run, self._paces[rule.probe])
        return self._look_before(looks)

    def _hurry(self, run: StepRun, pace: _Pace) -> None:
        """Ask soon for a plug that has just begun to wait, or has reached another rung: the next may follow."""
        known = len(self._state.proofs_of(run.first))
        if known != run.known_rungs:
            run.known_rungs, pace.pause = known, _FIRST_PAUSE_S
            pace.due = min(pace.due, self._now)

    def _probe(self) -> list[BatchTask]:
        """Ask for what no event tells, for all that wait for it, if it is time."""
        tasks: list[BatchTask] = []
        for probe, due, runs in self._probes():
            if self._now >= due:
                asked = self._probe_for(probe, tuple(runs))
                self._paces[probe].out = len(asked)
                tasks += asked
        return tasks

    def _probe_for(self, probe: Probe, waiting: tuple[StepRun, ...]) -> Sequence[BatchTask]:
        match probe:
            case Probe.STARTED:
                return [LookStarted(waiting)]
            case Probe.PLACE:
                return [PutInPlace(waiting)]
        return self._questions(waiting)

    def _probes(self) -> Iterator[tuple[Probe, float, Iterable[StepRun]]]:
        """Return what is asked for, when it is due, and for whom: some wait for it, and no question is out."""
        for probe, runs in self._out.probed.items():
            pace = self._paces[probe]
            if not runs or pace.out or (self.offline and probe is not Probe.GUEST):
                continue
            born = self._state.places.oldest_birth is not None
            more_to_come = probe is Probe.PLACE and (bool(self._plugs) or born)
            pause = min(_PLACING_PAUSE_S, self._bounds.reply_timeout / 4) if more_to_come and not self.halted else 0.0
            yield probe, pace.due + pause, runs

    def _questions(self, runs: tuple[StepRun, ...]) -> list[AskGuest]:
        """Return what the agent is asked: to bring those online that the guest has left offline, or for its list."""
        limit = self._patience_with_agent()
        to_bring = [run for run in runs if self._is_to_be_brought_online(run)]
        if to_bring:
            return [AskGuest((run,), online=True, limit=limit) for run in to_bring]
        return [AskGuest(runs, online=None, limit=limit)]

    def _patience_with_agent(self) -> float:
        """Return how long the agent has for what it is asked now, in seconds."""
        limit, last = self._bounds.limit or self._bounds.reply_timeout, self._bounds.last_moment
        return limit if last is None else min(limit, max(last - self._now, 0.0))

    def _is_to_be_brought_online(self, run: StepRun) -> bool:
        seen = self._state.guest_sees
        wanted = self._options.online or run.step.asks_agent
        return wanted and seen is not None and seen.get(run.first) is False

    def _look_before(self, looks: Mapping[Read, list[StepRun]]) -> list[BatchTask]:
        """Have the VM read, each time for some steps, before these go on; those for NONE go on at once."""
        if not looks:
            return []
        for run in looks.get(Read.NONE, ()):
            self._go_further(run)
        looked = [LookAgain(read, tuple(runs)) for read, runs in looks.items() if read is not Read.NONE]
        for run in itertools.chain.from_iterable(look.runs for look in looked):
            run.looking = True
        return [*looked]

    def _conclude(self, run: StepRun) -> None:
        """Take the guest's answer to a removal in."""
        removal = run.removal
        if removal is not None and removal.state in {State.REJECTED, State.UNKNOWN}:
            self._end_unanswered(run, removal)
            return
        if self._bounds.until_accepted:  # the guest's answer goes to ``UnplugRequest.wait``
            self._end(run, None)
            return
        gone = not self._state.slots[run.first].present if removal is None else (removal.state is State.UNPLUGGED)
        seconds = 0.0 if removal is None else round(removal.seconds, 6)
        if not gone:
            code, reason = (removal.code, removal.reason) if removal is not None else (None, "no longer pending")
            self._end(run, Refused(run.step.ids, code, reason, seconds=seconds))
        elif run.step.action is Action.KEEP and not self.halted:
            self._out.drop(run)
            run.plugs, run.arrives, run.stage, run.taken_offline = True, True, StepStage.QUEUED, False
            run.verdict, run.reason = Unplugged(run.step.ids, seconds=seconds), "it left"
            self._plugs.append(run)
        else:
            self._end(
                run,
                Unplugged(run.step.ids, seconds=seconds),
                "" if run.step.action is Action.UNPLUG else "it left",
            )

    def _end_unanswered(self, run: StepRun, removal: Removal) -> None:
        """Take in that no guest is going to answer *removal*: that is no refusal."""
        if self._bounds.single and removal.rejection is not None:
            kept = run.step.action is Action.KEEP  # then it stays, which is what was wanted
            self._end(run, Plugged(run.step.ids) if kept else removal.rejection)
            return
        mine = run.ours or run.step.action is Action.KEEP or self._bounds.single
        if mine or (removal.state is State.UNKNOWN and not self.offline):
            self._end(run, Unknown(run.step.ids, removal.state.value))
            return
        # QEMU dropped another client's request: send our own, once connected.
        run.stage, run.removal = StepStage.QUEUED, None
        self._send_again(run)

    def _give_up(self, run: StepRun, reason: str = "") -> None:
        """End *run* as it stands now; *reason* is why it is not waited for any longer, if not its deadline."""
        if not run.arrives and run.removal is not None:
            self._state.deadline_passed(run.removal)
            working = run.removal.state is State.WORKING
            waited = round(self._now - run.removal.requested_at, 6)
            self._end(run, Pending(run.step.ids, acknowledged=working, seconds=waited), reason)
            return
        slot = self._state.slots[run.first]
        if run.stage is StepStage.PLACING and run.placed_at is None and not run.unplaced and slot.present:
            run.unplaced = f"not known: {reason}"
            if self._requires_place(run):
                run.taken_out = StepRun(Step(Action.UNPLUG, run.step.ids), undoes=run, reason=f"not sent: {reason}")
        was_doubtful = slot.first in self._state.maybe_queued_twice
        self._state.maybe_queued_twice.discard(slot.first)
        if not slot.present:
            self._end(run, Unplugged(slot.ids), EJECTED if was_doubtful else "plugged, and unplugged again meanwhile")
            return
        acknowledged, answer = slot.acknowledged, slot.answer
        code, told = (answer.code, "" if acknowledged else answer.reason) if answer else (None, "no answer")
        if run.stage is StepStage.PRESENT:
            acknowledged = acknowledged is True
        elif answer is None:
            told = ""  # nobody waited for one
        seconds = run.seconds_until(self._now)
        by_other = run.step.action is Action.PLUG and not run.ours
        self._end(run, Plugged(slot.ids, acknowledged, code, told, seconds), BY_OTHER if by_other else "")

    def _end_unknown(self, run: StepRun, why: str, error: MonitorLostError) -> None:
        """End *run*, whose reply went with the connection; if QEMU died of a plug, say what it is known for."""
        if run.plugs and error.hung_up:
            faults = plug_suspects(self._state.layout, self._state.slots[run.first])
            why = "; ".join((why, *(f"known of this QEMU: {fault.value}" for fault in faults)))
        self._end(run, Unknown(run.step.ids, why))

    def _end(self, run: StepRun, verdict: Verdict | None, reason: str = "") -> None:
        self._out.drop(run)
        self._state.places.arriving.difference_update(run.step.ids)
        run.stage, run.verdict, run.ended_at = StepStage.ENDED, verdict, self._now
        good = succeeded(run.step.action, verdict) or (verdict is None and self._bounds.until_accepted)
        run.reason = reason or ("" if good or verdict is None else why(verdict))
        if run.arrives and isinstance(verdict, Plugged):
            run.proofs = dict(self._state.proofs_of(run.first))
            run.missing = self._missing(run, verdict) if good else None
            if run.missing is not None:
                good = False
                why_missing = self._why_unproven(run, verdict)
                run.reason = f"{self.halted}; until then {why_missing}" if self._stopped else why_missing
        if run.taken_out is not None:
            good = False
        if run.taken_offline:
            self._take_back(run)
        only_requested = isinstance(verdict, Pending) and not self._bounds.limit
        if not good and not only_requested:
            self.failed = True
            if self._bounds.halts:
                self.halted = self.halted or "an earlier step failed"

    def _take_back(self, run: StepRun) -> None:
        """Have *run*, which has ended, brought online again, unless its vCPUs have left, or may leave yet."""
        may_leave = run.removal is not None and not run.removal.state.is_final
        if not self._state.slots[run.first].present:
            run.taken_offline = isinstance(run.verdict, Unplugged)
        elif not (may_leave or isinstance(run.verdict, Unplugged | Unknown)):
            self._out.ask(run, StepStage.RETURNING_TO_GUEST)
            self._returning.append(run)

    def _missing(self, run: StepRun, plugged: Plugged) -> Proof | None:
        """Return the proof that is required of *run*, which has ended, if it did not come."""
        asks_agent = run.step.asks_agent or run.step.action is Action.ONLINE
        required = Proof.ONLINE if asks_agent else self._options.required_proof
        if required is Proof.ACKNOWLEDGED:
            return None if plugged.acknowledged is True else required
        return None if required is Proof.PRESENT or required in run.proofs else required

    def _why_unproven(self, run: StepRun, plugged: Plugged) -> str:
        if run.missing is Proof.ACKNOWLEDGED:
            return f"the guest did not acknowledge it: {plugged.reason}"
        if run.missing is Proof.STARTED:
            return "it has run no guest code" if self._state.runs else NOT_RUNNING
        if run.no_agent:
            return f"the guest agent did not show it online: {run.no_agent}"
        if self._state.guest_sees is None:
            return "the guest agent has not answered"
        listed = run.first in self._state.guest_sees
        return LEFT_OFFLINE if listed else "the guest's list does not have it"
