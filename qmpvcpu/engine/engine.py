"""The core: decides what to do with one VM. Takes inputs, returns effects, does no I/O.

Rules that live here:

- A change that needs the guest's list asks the agent for it before it queues: nobody else waits for an agent.
- A request queues until it may begin. Single steps run together; a map, or an export's hold, has the VM to itself.
  First come, first served. A request that only joins a removal sends nothing, and does not queue.
- Each change is a ``Transition``; its commands, saves and looks are numbered here, and their ends find it again.
- A look is shared by all who want it at the same moment.
- Reads that no caller waits for run in the background, one at a time, and are tried again after a failure.
"""

import heapq
from collections import deque
from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from qmpvcpu import qapi
from qmpvcpu.engine.answers import (
    error_of,
    error_of_removal,
    errors_of_steps,
    hint_of_plug,
    hint_of_unplug,
    lost_for,
    verdict_on,
)
from qmpvcpu.engine.batch import AskGuest, Batch, LookAgain, LookStarted, PutInPlace, SendStep
from qmpvcpu.engine.intents import Intentions, Recorded, merged, promising
from qmpvcpu.engine.messages import (
    NO_VCPUS,
    Accepted,
    Arrived,
    Ask,
    BackgroundRead,
    Cancelled,
    Change,
    ConfigWritten,
    DropPrevious,
    Effect,
    ExportLock,
    Finished,
    GuestIs,
    GuestTold,
    Heard,
    Hold,
    HostIs,
    Input,
    LetGo,
    Look,
    Looked,
    LookFailed,
    Lost,
    NotBorn,
    Persist,
    PlaceThreads,
    Publish,
    Refresh,
    Rejection,
    Release,
    Request,
    Result,
    Returned,
    Save,
    Saved,
    Send,
    Settle,
    Stop,
    StopRunning,
    ThreadsPlaced,
    Tick,
    Unanswered,
    Wait,
    Wanted,
    WantRead,
    WriteConfig,
)
from qmpvcpu.engine.removal import Evidence, Removal, State
from qmpvcpu.engine.steprun import StepRun, StepStage
from qmpvcpu.engine.transition import LastLook, Phase, SaveIntent, Task, Transition, WriteNextBoot
from qmpvcpu.engine.vmstate import Read, VmState
from qmpvcpu.errors import (
    WITHOUT_AGENT,
    GuestAgentError,
    MalformedReplyError,
    MonitorLostError,
    MonitorTimeoutError,
    Outcome,
    OutcomeUnknownError,
    QmpVcpuError,
    RecordError,
    describe,
)
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.options import CheckedOptions, Proof
from qmpvcpu.model.transition import Action, Intent, TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap, union
from qmpvcpu.model.verdicts import Pending, Rejected, Unknown
from qmpvcpu.planning.checks import Situation, check_placement
from qmpvcpu.planning.plan import Plan, check_plan

# At a deadline one last read may still find the CPU gone; a QEMU that does not answer it within this many seconds
# does not stretch the caller's deadline any further.
_LAST_LOOK_S: Final = 1.0

# A background read that failed is tried again: soon, then at a pace that is no load.
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0

# A plug into a slot that a CPU has just left is sent again: after 10, 20, 40 and 80 milliseconds.
_MOST_REJECTIONS: Final = 4
_HELD_PAUSE_S: Final = 0.005

# A plug does not wait longer than this for an agent that need not be there yet, in seconds.
_FIRST_LIST_S: Final = 1.0

_READ_AGAIN: Final = "read again"
_RESYNC: Final = "resync"


@dataclass(slots=True, eq=False)
class _Command:
    """A command without a reply, and whose it is."""

    transition: Transition
    batch: Batch
    run: StepRun
    removal: Removal | None


@dataclass(slots=True, eq=False)
class _LookUnderWay:
    """A look, what was known when it was sent, and who wants to know what it shows."""

    tick: int
    look: Look
    then: list[Callable[[Exception | None], None]]


class _Alarm(NamedTuple):
    """What is done at a moment, unless it is set anew or dropped before."""

    when: float
    number: int  # so that two of one moment can be compared
    key: object
    ring: Callable[[], object]


class Engine:
    """What is known and wanted of one VM, and the changes under way.

    Not safe for threads; ``receive`` must not be called from within itself.

    Args:
        state: What is known of the VM.
        intentions: What is wanted of it.
        is_recorded: True if there is a record, so that ``Save`` is asked for.
        reply_timeout: How long QEMU has for each reply, in seconds.
        reconnects: True if somebody looks for QEMU when the connection is lost.
        resync_interval: Seconds between reads that find what no event announces; None: none are made.
        is_traced: True if somebody makes traces, so that ``Finished`` is told.
        now: The caller's clock, in seconds.

    Attributes:
        state: As given.
        intentions: As given.
        reply_timeout: As given.
        lost: Why the connection is gone, or None while it is there.
        closed: True once it is gone for good.
        last_report: What became of the last whole map that ended, or None.
    """

    def __init__(
        self,
        state: VmState,
        intentions: Intentions | None = None,
        *,
        is_recorded: bool = False,
        reply_timeout: float = 10.0,
        reconnects: bool = False,
        resync_interval: float | None = None,
        is_traced: bool = False,
        now: float = 0.0,
    ) -> None:
        self.state = state
        self.intentions = Intentions() if intentions is None else intentions
        self.reply_timeout = reply_timeout
        self.lost: MonitorLostError | None = None
        self.closed = False
        self.last_report: TransitionReport | None = None
        self._is_recorded = is_recorded
        self._reconnects = reconnects
        self._resync_interval = resync_interval
        self._is_traced = is_traced
        self._now = now
        self._number = 0
        self._effects: list[Effect] = []
        self._queue: deque[Change | Hold] = deque()
        self._exclusive: Change | Hold | None = None  # the map that runs, or the hold: it keeps all others out
        self._asking: list[Change] = []  # queues once the guest's agent has told its list
        self._planning: list[Change] = []  # may begin, and the VM is being looked at for it
        self._parked: list[Change] = []  # waits for a plug of the same slot that is in flight
        self._offline: list[Refresh] = []  # waits for the connection to come back, and nothing else
        self._running: dict[Change, Transition] = {}
        self._by_slot: dict[int, list[Transition]] = {}  # those of one step, by the first vCPU id of its slot
        self._reserved: dict[int, Transition] = {}  # slots that one of those is about to plug
        self._to_advance: dict[Transition, None] = {}
        self._map_intent: Intent | None = None
        self._tries: dict[Request, int] = {}
        self._stopping = False
        self._stopped_early: Change | Hold | None = None
        self._stoppers: list[StopRunning] = []
        self._commands: dict[int, _Command] = {}
        self._explaining: dict[int, Callable[[Exception | None], None]] = {}  # rejections, by command
        self._looks: dict[int, _LookUnderWay] = {}
        self._new_looks: list[_LookUnderWay] = []  # sent in this very step
        self._asks: dict[int, Callable[[GuestTold], None]] = {}
        self._agent_errors: dict[Change, QmpVcpuError] = {}  # why the agent told no list before the plan
        self._placings: dict[int, Callable[[ThreadsPlaced], None]] = {}
        self._saves: dict[int, Callable[[RecordError | None], None]] = {}
        self._configs: dict[int, Transition] = {}
        self._waits: dict[Removal, list[Wait]] = {}
        self._left_offline: dict[Removal, VcpuMap] = {}  # offline in the guest for removals that are not over
        self._reading: int | None = None  # the look that nobody in particular waits for
        self._pause = _FIRST_PAUSE_S
        self._alarms: list[_Alarm] = []
        self._alarm_of: dict[object, _Alarm] = {}
        self._handlers: Mapping[type, Callable[[Any], None]] = {
            Heard: self._heard,
            Accepted: self._accepted,
            Rejection: self._rejected,
            Unanswered: self._unanswered,
            Looked: self._looked,
            LookFailed: self._look_failed,
            GuestTold: self._guest_told,
            GuestIs: self._guest_is,
            HostIs: self._host_is,
            Wanted: self._wanted,
            NotBorn: self._not_born,
            ThreadsPlaced: self._threads_placed,
            Saved: self._saved,
            ConfigWritten: self._config_written,
            Change: self._change,
            Hold: self._enqueue,
            Wait: self._wait,
            Refresh: self._refresh,
            StopRunning: self._stop_running,
            Persist: self._persist,
            DropPrevious: self._drop_previous,
            Cancelled: self._cancelled,
            Release: self._release,
            ExportLock: self._export_lock,
            Arrived: self._arrived,
            Lost: self._lost,
            Returned: self._returned,
            WantRead: self._want_read,
            Stop: self._stop,
            Tick: lambda _: None,
        }
        self._arm_resync()

    def receive(self, given: Input, now: float) -> list[Effect]:
        """Take in what happened, and return what is to be done.

        Args:
            given: What happened.
            now: The caller's clock, in seconds.

        Returns:
            The effects, in order.
        """
        self._now = now
        self._new_looks.clear()
        self._handlers[type(given)](given)
        if self._alarms and self._alarms[0].when <= now:
            self._ring()
        self._go_on()
        if self.intentions.previous is not None:
            self.intentions.drop_if_there(self.layout)
        effects, self._effects = self._effects, []
        return effects

    # What is so now.

    @property
    def layout(self) -> Layout:
        """All slots, as known now."""
        return self.state.layout

    @property
    def situation(self) -> Situation:
        """What decides whether a change may be planned now."""
        removals = self.state.removals
        now = self.state.situation
        return now._replace(
            in_flight=now.in_flight | self._reserved.keys(),
            asked=frozenset(removals),
            leaving=frozenset(first for first, removal in removals.items() if removal.is_joined),
        )

    def situation_of(self, options: CheckedOptions) -> Situation:
        """Return what decides whether a change with *options* may be planned now."""
        return self.situation._replace(placement=self.state.places.wanted_with(options.placement))

    @property
    def recorded(self) -> Recorded:
        """What a save that begins now writes."""
        intentions = self.intentions
        placement = self.state.places.placement
        return Recorded(
            self.state.slots.generation, self._intent(), intentions.desired, intentions.previous, placement
        )

    @property
    def holds_saves(self) -> bool:
        """True while a map runs: it saves itself, and what changes meanwhile is written at its end."""
        return self._map_intent is not None

    @property
    def is_reading(self) -> bool:
        """True while a background read is under way, or wanted."""
        return self._reading is not None or self.state.wanted_read is not Read.NONE

    @property
    def is_busy(self) -> bool:
        """True while something is under way whose end is to be recorded: a command, a save, the next boot, a map."""
        waits = self._commands or self._saves or self._configs or self._placings
        return (
            bool(waits) or self._map() is not None or any(each.batch.has_commands for each in self._running.values())
        )

    @property
    def deadline(self) -> float | None:
        """When ``Tick`` is to be received at the latest, by the caller's clock; None: never."""
        return self._alarms[0].when if self._alarms else None

    # What is recorded.

    def _intent(self) -> Intent | None:
        base = self._map_intent or self.intentions.interrupted
        steps = [
            step
            for each in self._running.values()
            if not each.is_map and each.is_open
            for step in each.plan.steps
            if not step.joins
        ]
        # Of a step that its caller has given up, QEMU's reply may still come.
        told = () if base is None else base.steps
        steps += [
            each.run.step
            for each in self._commands.values()
            if each.transition.ended and not each.transition.is_map and each.run.step not in told
        ]
        configs = [each.change.config for each in self._running.values() if each.change.config is not None]
        promised = configs[-1].promised if configs else None
        intent = merged(base, tuple(steps), self.layout.enabled if steps else VcpuMap(), promised)
        return None if intent is None else self.state.places.with_birthplaces(intent)

    def _save(self, then: Callable[[RecordError | None], None]) -> None:
        if not self._is_recorded:
            then(None)
            return
        number = self._next()
        self._saves[number] = then
        self._effects.append(Save(number))

    def _saved(self, given: Saved) -> None:
        self._saves.pop(given.number)(given.error)

    # Requests.

    def _change(self, change: Change) -> None:
        if self._refuses(change) or self._joins(change):
            return
        limit = self._patience_with_agent(change)
        if limit is None or self.lost is not None:
            self._enqueue(change)
        else:
            self._ask_first(change, limit)

    def _joins(self, change: Change) -> bool:
        """Have *change* join the removal that is under way, if it may; return whether it did."""
        removal = None if change.slot is None else self.state.removals.get(change.slot)
        joins = change.joins and removal is not None and removal.is_joined and self.lost is None
        if joins:
            self._plan(change)
        return joins

    def _enqueue(self, request: Change | Hold) -> None:
        if self._refuses(request):
            return
        self._queue.append(request)
        self._await_return(request)

    def _refuses(self, request: Request) -> bool:
        """Settle *request* with an error if the connection is gone for good, or this side is closing."""
        if not (self.closed or self._stopping):
            return False
        self._settle(request, error=self._gone(request))
        return True

    def _gone(self, request: Request, more: str = "") -> MonitorLostError:
        """Return the error of *request*, which was not begun, or waits for what was asked for before."""
        lost = self.lost or MonitorLostError("closed by this side")
        outcome = Outcome.UNKNOWN if isinstance(request, Wait) else Outcome.UNCHANGED
        error = lost_for(lost, more, outcome=outcome)
        error.__cause__ = self.lost
        return error

    def _await_return(self, request: Request) -> None:
        """While the connection is lost, wait for it as long as for a reply of QEMU's."""
        if self.lost is not None:
            self._set_alarm(request, self._now + self.reply_timeout, lambda: self._give_up_waiting(request))

    def _give_up_waiting(self, request: Request) -> None:
        self._forget(request)
        self._settle(request, error=self._gone(request, f"; not back within {self.reply_timeout:g} s"))

    def _refresh(self, request: Refresh) -> None:
        if self._refuses(request):
            return
        if self.lost is not None:
            self._offline.append(request)
            self._await_return(request)
            return
        self._look(
            request.read,
            lambda error: self._settle(request, result=True, error=error),
            status=request.status,
        )

    def _wait(self, request: Wait) -> None:
        removal = request.removal
        if removal.state.is_final:
            self._answer(request)
        elif not self._refuses(request):
            self._waits.setdefault(removal, []).append(request)
            if request.timeout is not None:
                self._set_alarm(request, self._now + request.timeout, lambda: self._look_for(request))

    def _look_for(self, wait: Wait) -> None:
        """The time for the answer is over: read once more before returning PENDING."""
        if not wait.timeout or self.lost is not None:
            self._settle_wait(wait)
            return
        limit = min(_LAST_LOOK_S, self.reply_timeout)
        self._set_alarm(wait, self._now + limit, lambda: self._settle_wait(wait))
        self._look(Read.SLOTS, lambda _: self._settle_wait(wait))

    def _settle_wait(self, wait: Wait) -> None:
        if self._drop_wait(wait):  # else it was settled, or cancelled, before
            self._answer(wait)

    def _drop_wait(self, wait: Wait) -> bool:
        waits = self._waits.get(wait.removal, [])
        if wait not in waits:
            return False
        waits.remove(wait)
        if not waits:
            del self._waits[wait.removal]
        self._drop_alarm(wait)
        return True

    def _answer(self, wait: Wait) -> None:
        removal = wait.removal
        if (verdict := verdict_on(removal)) is not None:
            self._settle(wait, result=verdict)
        elif removal.state.is_final:
            self._settle(wait, error=error_of_removal(removal))
        else:
            self.state.deadline_passed(removal)
            working = removal.state is State.WORKING
            seconds = self._now - removal.requested_at
            self._settle(wait, result=Pending(removal.ids, acknowledged=working, seconds=seconds))

    def _stop_running(self, request: StopRunning) -> None:
        if self._refuses(request):
            return
        transition = self._map()
        if transition is None:
            self._stopped_early = self._exclusive  # it sends nothing once it is planned
            self._settle(request)
            return
        self._stoppers.append(request)
        transition.cancel(self._now)
        self._to_advance[transition] = None

    def _persist(self, request: Persist) -> None:
        self._save(lambda error: self._settle(request, error=error))

    def _drop_previous(self, request: DropPrevious) -> None:
        before, self.intentions.previous = self.intentions.previous, None

        def saved(error: RecordError | None) -> None:
            if error is not None:
                self.intentions.previous = before
            self._settle(request, error=error)

        self._save(saved)

    def _cancelled(self, given: Cancelled) -> None:
        request = given.request
        if isinstance(request, Change) and request in self._running:
            transition = self._running[request]
            self._cancel_running(transition)
            return
        if request is self._exclusive:
            self._make_room()
        if self._forget(request):  # what is under way is settled when it ends
            self._settle(request)

    def _forget(self, request: Request) -> bool:
        """Drop a request that waits for its turn, or for an answer; return whether it did."""
        self._drop_alarm(request)
        if isinstance(request, Wait):
            return self._drop_wait(request)
        unsettled: list[MutableSequence[Any]] = [
            self._offline,
            self._asking,
            self._planning,
            self._queue,
            self._parked,
        ]
        for waiting in unsettled:
            if request in waiting:
                waiting.remove(request)
                return True
        return False

    def _cancel_running(self, transition: Transition) -> None:
        if transition.is_map or not transition.has_begun:
            transition.cancel(self._now)
            self._to_advance[transition] = None
        elif transition.has_sent:
            transition.abandon(self._now)
            self._to_advance[transition] = None
        else:  # it only waits for a removal of somebody else's
            transition.drop()
            self._leave(transition)
            self._settle(transition.change)

    def _release(self, given: Release) -> None:
        if self._exclusive is given.hold:
            self._make_room()

    def _settle(self, request: Request, *, result: object = None, error: BaseException | None = None) -> None:
        self._tell_events()  # publish earlier events first
        self._tries.pop(request, None)
        if isinstance(request, Change):
            self._agent_errors.pop(request, None)
        self._effects.append(Settle(request, None if error is not None else result, error))

    # Whose turn it is, and the plan.

    def _make_room(self) -> None:
        """Note that the map, or the hold, is over: single steps that had to wait for it may send again."""
        self._exclusive = self._stopped_early = None
        self._to_advance.update(dict.fromkeys(self._running.values()))

    def _admit(self) -> bool:
        """Let the next request begin, if it may; return whether it did."""
        if self.lost is not None or self._exclusive is not None:
            return False
        request = self._queue[0]
        alone = isinstance(request, Hold) or request.result is Result.REPORT
        if alone and (self._planning or any(each.sends for each in self._running.values())):
            return False
        self._queue.popleft()
        self._drop_alarm(request)
        if alone:
            self._exclusive = request
        if isinstance(request, Hold):
            self._settle(request, result=True)
        else:
            self._look_first(request)
        return True

    def _ask_first(self, change: Change, limit: float) -> None:
        """Ask the agent for the guest's list before *change* queues: no other change waits for that."""

        def told(told: GuestTold) -> None:
            if change not in self._asking:
                return  # nobody waits for it any more
            self._asking.remove(change)
            if told.error is not None:
                self._agent_errors[change] = told.error
            if not (self._refuses(change) or self._joins(change)):
                self._enqueue(change)

        self._asking.append(change)
        self._ask(NO_VCPUS, online=None, limit=limit, then=told)

    def _patience_with_agent(self, change: Change) -> float | None:
        """Return how long the agent has for its list before *change* is planned, in seconds; None: it is not asked.

        Before vCPUs are taken offline it tells which are online. Before some are to be ONLINE it tells which of those
        that are there are not, and its list may show afterwards which CPU has come.
        """
        options = change.options
        if not self.state.has_agent:
            return None
        limit = min(options.timeout or self.reply_timeout, self.reply_timeout)
        if change.result is Result.REPORT and options.total_timeout is not None:
            limit = min(limit, options.total_timeout)
        if options.offline_first and (change.joins or change.result is Result.REPORT):
            return limit
        proves_online = options.awaited_proof is Proof.ONLINE and options.timeout > 0
        if proves_online and (
            self.state.guest_sees is None or change.waits_for_plug or change.result is Result.REPORT
        ):
            return min(_FIRST_LIST_S, limit)
        return None

    def _look_first(self, change: Change) -> None:
        """Look at the VM as far as the plan depends on what no event tells."""
        read = Read.SLOTS if change.result is Result.REPORT else Read.NONE
        if change.joins and self.state.single_threaded is None and self.layout.vm.accelerator == "tcg":
            read = Read.FULL  # only two vCPUs' threads tell, and there are two now
        # What runs cannot stop running without an event.
        status = self.state.status is None or not self.state.status.is_steady
        if read is Read.NONE and not status:
            self._plan(change)
            return
        self._planning.append(change)
        self._look(read, lambda error: self._looked_first(change, error), status=status)

    def _looked_first(self, change: Change, error: Exception | None) -> None:
        if change not in self._planning:
            return  # nobody waits for it any more
        self._planning.remove(change)
        if error is None:
            self._plan(change)
            return
        if isinstance(error, MonitorLostError) and self._reconnects:
            self._requeue(change)
            return
        if self._exclusive is change:
            self._make_room()
        self._settle(change, error=error)

    def _requeue(self, change: Change) -> None:
        """Have *change* wait for the connection to come back, before all others."""
        if self._exclusive is change:
            self._make_room()
        if not self._refuses(change):
            self._queue.appendleft(change)
            self._await_return(change)

    def _plan(self, change: Change) -> None:
        if self.lost is not None:
            self._requeue(change)
            return
        if change.waits_for_plug and change.slot in self.situation.in_flight:
            self._parked.append(change)
            self._set_alarm(change, self._now + self.reply_timeout, lambda: self._give_up_parked(change))
            return
        try:
            plan = self._planned(change)
            if change.config is not None:
                change.config.promise(plan)
        except Exception as error:  # noqa: BLE001 -- its caller is told what is wrong with the plan
            if self._exclusive is change:
                self._make_room()
            self._settle(change, error=error)
            return
        transition = Transition(
            change,
            plan,
            self.state,
            self._now,
            reply_timeout=self.reply_timeout,
            reconnects=self._reconnects,
            is_recorded=self._is_recorded,
        )
        self._running[change] = transition
        if transition.is_map and self._stopped_early is change:
            transition.cancel(self._now)
        for step in () if transition.is_map else plan.steps:
            self._by_slot.setdefault(step.first, []).append(transition)
            if step.action is Action.PLUG:
                self._reserved.setdefault(step.first, transition)
        self._to_advance[transition] = None

    def _planned(self, change: Change) -> Plan:
        """Return the plan of *change* for the VM as it is now.

        Raises:
            PlanError: It cannot be carried out.
            QmpVcpuError: It needs the guest's agent, which told no list.
        """
        agent_error = self._agent_errors.pop(change, None)
        now = self.situation_of(change.options)
        check_placement(now)
        plan = change.plan(now)
        if change.result is Result.REPORT:
            check_plan(plan, self.layout)
        if agent_error is not None:
            offline = union(step.ids for step in plan.steps if step.asks_agent and step.action is Action.UNPLUG)
            if offline and isinstance(agent_error, GuestAgentError):
                agent_error.concern(describe("offline", offline), hint=WITHOUT_AGENT)
            if offline:
                raise agent_error
        self.state.places.placement = now.placement
        return plan

    def _give_up_parked(self, change: Change) -> None:
        """QEMU does not reply to the plug that *change* waits for."""
        self._forget(change)
        ids = self.state.slots[change.slot or 0].ids
        silence = MonitorTimeoutError("device_add", self.reply_timeout)
        error = OutcomeUnknownError("plug", ids, str(silence))
        error.__cause__ = silence
        self._settle(change, error=error)

    def _concerned(self, first: int) -> list[Transition]:
        """Return the transitions that change the slot of vCPU *first*, or may."""
        running = self._map()
        return [*self._by_slot.get(first, ()), *(() if running is None else (running,))]

    def _unpark(self) -> bool:
        """Let those have their turn that waited for a plug which is over now; return whether there were any."""
        if self.lost is not None:
            return False
        in_flight = self.situation.in_flight
        ready = [change for change in self._parked if change.slot not in in_flight]
        for change in reversed(ready):  # they were first before
            self._drop_alarm(change)
            self._parked.remove(change)
            self._queue.appendleft(change)
            self._await_return(change)
        return bool(ready)

    # Transitions.

    def _map(self) -> Transition | None:
        return self._running.get(self._exclusive) if isinstance(self._exclusive, Change) else None

    def _go_on(self) -> None:
        """Go on until nothing more can be done now."""
        state = self.state
        while True:
            if state.has_news:
                self._take_news()
            if self._to_advance:
                self._advance(next(iter(self._to_advance)))
            elif not ((self._parked and self._unpark()) or (self._queue and self._admit())):
                break
        if state.wanted_read is not Read.NONE:
            self._read_wanted()

    def _advance(self, transition: Transition) -> None:
        del self._to_advance[transition]
        may_send = transition.is_map or self._exclusive is None
        for task in transition.advance(self._now, may_send=may_send):
            self._do(transition, task)
        if transition.ended:
            self._finish(transition)
        else:
            deadline = transition.deadline
            if deadline is None:
                self._drop_alarm(transition)
            else:
                self._set_alarm(transition, deadline, lambda: self._to_advance.setdefault(transition))

    def _do(self, transition: Transition, task: Task) -> None:
        match task:
            case SendStep(run):
                self._send(transition, run)
            case LookAgain(read, runs):
                self._look_again(transition, read, runs)
            case LookStarted(runs):
                self._look_started(transition, runs)
            case PutInPlace(runs):
                self._put_in_place(transition, runs)
            case AskGuest():
                self._ask_for(transition, task)
            case LastLook():
                self._look(Read.SLOTS, lambda error: self._confirmed(transition, task, error))
            case SaveIntent():
                self._save_intent(transition, task)
            case WriteNextBoot() if transition.change.config is not None:
                number = self._next()
                self._configs[number] = transition
                done = f"{transition.change.subject} is done"
                if transition.is_map:
                    done = "the running VM has the target map"
                self._effects.append(WriteConfig(number, transition.change.config, done))

    def _send(self, transition: Transition, run: StepRun, batch: Batch | None = None) -> None:
        slot = self.state.slots[run.first]
        number = self._next()
        self._reserved.pop(slot.first, None)
        if run.plugs and run.path is not None:
            command, run.arguments = "device_add", qapi.device_add(slot, run.path)
        else:
            command, run.arguments = "device_del", qapi.device_del(slot)
        self._commands[number] = _Command(
            transition, batch or transition.batch, run, None if run.plugs else run.removal
        )
        self._effects.append(Send(number, command, run.arguments, run.born_on, slot.count))

    def _look_again(self, transition: Transition, read: Read, runs: tuple[StepRun, ...]) -> None:
        batch, is_over = transition.batch, False

        def looked(_: object = None) -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                self._drop_alarm(runs)
                batch.looked(runs, self._now)
                self._to_advance[transition] = None

        self._set_alarm(runs, self._now + min(_LAST_LOOK_S, self.reply_timeout), looked)
        self._look(read, looked)

    def _look_started(self, transition: Transition, runs: tuple[StepRun, ...]) -> None:
        batch = transition.batch

        def looked(_: object) -> None:
            batch.probed(self._now)
            self._to_advance.setdefault(transition)

        slots = tuple(self.state.slots[run.first] for run in runs)
        self._look(Read.NONE, looked, started=slots)

    def _put_in_place(self, transition: Transition, runs: tuple[StepRun, ...]) -> None:
        batch, sent = transition.batch, self.state.changes

        def placed(told: ThreadsPlaced) -> None:
            self.state.placed(sent, told.why_not, self._now)
            batch.placed(told.error, self._now)
            self._to_advance.setdefault(transition)

        number = self._next()
        self._placings[number] = placed
        slots = tuple(self.state.slots[run.first] for run in runs)
        self._effects.append(PlaceThreads(number, slots))

    def _threads_placed(self, given: ThreadsPlaced) -> None:
        if given.single_threaded is not None:  # then some QEMUs do not survive that one is taken out again
            self.state.single_threaded = given.single_threaded
        self._placings.pop(given.number)(given)

    def _host_is(self, given: HostIs) -> None:
        self.state.places.host = given.facts
        if given.places is not None:
            self.state.found(given.places)
            self._take_news()

    def _wanted(self, given: Wanted) -> None:
        self.state.places.placement = given.placement

    def _ask_for(self, transition: Transition, ask: AskGuest) -> None:
        batch = transition.batch

        def told(told: GuestTold) -> None:
            batch.guest_told(ask, told, self._now)
            self._to_advance.setdefault(transition)

        ids = VcpuMap() if ask.online is None else union(run.step.ids for run in ask.runs)
        self._ask(ids, online=ask.online, limit=ask.limit, then=told)

    def _ask(self, ids: VcpuMap, *, online: bool | None, limit: float, then: Callable[[GuestTold], None]) -> None:
        """Ask the guest's agent, then call *then* with what it told."""
        number = self._next()
        self._asks[number] = then
        self._effects.append(Ask(number, ids, online, limit))

    def _guest_is(self, given: GuestIs) -> None:
        self.state.guest_os = given.system

    def _guest_told(self, given: GuestTold) -> None:
        if given.online is not None:
            self.state.guest_told(given.online, self._now)
            self._take_news()
        if given.number is not None:
            self._asks.pop(given.number)(given)

    def _confirmed(self, transition: Transition, look: LastLook, error: Exception | None) -> None:
        transition.confirmed(look, "" if error is None else str(error), self._now)
        self._to_advance[transition] = None

    def _save_intent(self, transition: Transition, task: SaveIntent) -> None:
        intent, phase = task
        take_back: Callable[[], None] | None = None
        if transition.is_map:
            if phase is Phase.START:
                rebuilds = transition.change.rebuilds
                take_back = self.intentions.want_map(transition.intent.target, rebuilds=rebuilds)
            if phase is Phase.FINISH:
                self._map_intent = None
                self.intentions.leave(self._with_next_boot(transition, intent))
                self.intentions.desired = transition.wanted
            else:
                self._map_intent = self._with_next_boot(transition, intent)
        elif phase is Phase.START:
            take_back = self.intentions.want_steps(transition.plan.steps, self.layout.enabled)
        elif phase is Phase.FINISH and transition.is_unknown:
            self.intentions.interrupted = self._unresolved(transition)
        if not self._is_recorded:
            return

        def saved(error: RecordError | None) -> None:
            if take_back is not None and error is not None and not transition.ended:
                take_back()
                self._map_intent = None if transition.is_map else self._map_intent
            transition.saved(error)
            self._to_advance[transition] = None

        self._save(saved)

    @staticmethod
    def _with_next_boot(transition: Transition, intent: Intent | None) -> Intent | None:
        config = transition.change.config
        return promising(intent, None if config is None else config.promised)

    def _config_written(self, given: ConfigWritten) -> None:
        transition = self._configs.pop(given.number)
        transition.config_written(given.report, given.error)
        self._to_advance[transition] = None

    def _finish(self, transition: Transition) -> None:
        """Settle what has ended, and let others go on."""
        change = transition.change
        if self._running.get(change) is not transition:
            return
        self._leave(transition)
        for run in transition.left_offline:
            self._bring_back(run)
        if transition.lost and self._map_intent is not None and transition.is_map:
            self._map_intent, self.intentions.interrupted = None, self._map_intent
        elif transition.lost and not transition.is_map and transition.is_unknown:
            self.intentions.interrupted = self._unresolved(transition)
        report = transition.report() if transition.is_map else None
        if report is not None:
            if transition.not_begun is None:
                self.last_report = report
            self._let_others_go_on(report)
        error = error_of(transition, report)
        if error is None and self._stopping and transition.is_given_up:
            error = self._gone(change)
        self._tries[change] = self._tries.get(change, 0) + 1
        if error is not None and self._tries[change] < change.tries and transition.may_try_again:
            self._requeue(change)
            return
        if error is not None:
            self._settle(change, error=error)
            return
        self._settle(change, result=self._result(transition) if report is None else report)

    def _bring_back(self, run: StepRun) -> None:
        """Have what *run* has left offline in the guest brought online: now, or if its removal is refused later."""
        if run.removal is not None and not run.removal.state.is_final:
            self._left_offline[run.removal] = run.step.ids
        elif (run.removal is None or run.removal.state is State.REFUSED) and self.state.slots[run.first].present:
            self._bring_online(run.step.ids)

    def _bring_online(self, ids: VcpuMap) -> None:
        """Have the agent bring *ids* online, for nobody who waits."""
        self._ask(ids, online=True, limit=self.reply_timeout, then=lambda _: None)

    def _leave(self, transition: Transition) -> None:
        del self._running[transition.change]
        if self._is_traced:
            stopped = transition.cancelled or transition.abandoned
            errors = errors_of_steps(transition)
            told = Finished(transition.change, transition.began, transition.runs, transition.undoing, errors, stopped)
            self._effects.append(told)
        self._to_advance.pop(transition, None)
        for step in () if transition.is_map else transition.plan.steps:
            self._by_slot[step.first].remove(transition)
            if not self._by_slot[step.first]:
                del self._by_slot[step.first]
            if self._reserved.get(step.first) is transition:
                del self._reserved[step.first]
        self._drop_alarm(transition)

    def _let_others_go_on(self, report: TransitionReport) -> None:
        """Note that the map is over: give those who stopped it its *report*, and let single steps send again."""
        stoppers, self._stoppers = self._stoppers, []
        for stopper in stoppers:
            self._settle(stopper, result=report)
        self._make_room()

    @staticmethod
    def _result(transition: Transition) -> object:
        """Return what a single step is settled with."""
        if transition.change.result is Result.IDS:
            return transition.plan.ids
        run = transition.runs[0]
        return run.removal, not run.ours

    def _unresolved(self, transition: Transition) -> Intent | None:
        """Return the intent that goes on: nobody knows what became of the step of *transition*."""
        steps = tuple(run.step for run in transition.runs if run.is_unknown)
        return merged(self.intentions.interrupted, steps, self.layout.enabled, None)

    # Replies.

    def _accepted(self, given: Accepted) -> None:
        command = self._commands.pop(given.number)
        run = command.run
        if command.removal is None:
            self.state.plug_accepted(run.first, self._now)
            if given.in_place:
                self.state.born(self._now)
        else:
            self.state.unplug_replied(command.removal, Evidence.ACCEPTED, self._now)
            self._take_news()
        self._replied(command, None)

    def _not_born(self, given: NotBorn) -> None:
        command = self._commands.pop(given.number)
        self.state.plug_failed(command.run.first)
        command.batch.not_born(command.run, given.why, self._now)
        self._advance_after_birth(command.transition)

    def _rejected(self, given: Rejection) -> None:
        """Read the VM after a rejection: QEMU's error texts are unstable, so they explain nothing for sure."""
        command = self._commands[given.number]
        plugs = command.removal is None
        if plugs:
            self.state.plug_failed(command.run.first)
            self._reserved[command.run.first] = command.transition  # it may be sent again
            self._advance_after_birth(command.transition)

        def explain(error: Exception | None) -> None:
            if self._explaining.pop(given.number, None) is None:
                return  # the connection was lost meanwhile
            if self._reserved.get(command.run.first) is command.transition:
                del self._reserved[command.run.first]
            del self._commands[given.number]
            if error is None and plugs and self._may_plug_again(command):
                self._plug_again(command, Rejected(command.run.step.ids, given.error_class, given.desc))
                return
            verdict = Rejected(command.run.step.ids, given.error_class, given.desc)
            if error is None:
                verdict = replace(verdict, hint=self._hint(command, verdict))
            gone = False
            if command.removal is not None:
                self.state.unplug_replied(command.removal, Evidence.REJECTION, self._now, rejection=verdict)
                gone = command.removal.state is State.UNPLUGGED  # the look showed it: that is what was asked for
            self._replied(command, None if gone else verdict)

        self._explaining[given.number] = explain
        if len(self._explaining) == 1:
            self._look_why()

    def _look_why(self) -> None:
        """Look at the VM once for all rejections known now; those that come meanwhile share the next look."""
        those = tuple(self._explaining.values())

        def looked(error: Exception | None) -> None:
            for explain in those:
                explain(error)
            if self._explaining:
                self._look_why()

        self._look(Read.FULL, looked, status=True, other_paths=True)

    def _may_plug_again(self, command: _Command) -> bool:
        """Return True if QEMU most likely only held the id of the CPU that was there before."""
        run = command.run
        held = self.state.id_may_be_held(run.first, self._now) and not self.state.is_taken(run.path or "")
        return held and run.rejections < _MOST_REJECTIONS and not self._is_given_up(command.transition)

    @staticmethod
    def _is_given_up(transition: Transition) -> bool:
        return transition.cancelled or transition.abandoned or transition.ended

    def _plug_again(self, command: _Command, rejected: Rejected) -> None:
        run, first = command.run, command.run.first
        run.rejections += 1
        run.path = self.state.plug_sent(first)  # it stays reserved until then

        def send() -> None:
            if run.stage is StepStage.SENT and self.lost is None and not self._is_given_up(command.transition):
                if not self.state.places.may_be_born(run.born_on):
                    self._set_alarm(command, self._now + _HELD_PAUSE_S, send)
                    return
                self.state.places.birth_begins(first, run.born_on, self._now)
                self._send(command.transition, run, command.batch)
                return
            self.state.plug_failed(first)
            if self.lost is None:
                self._replied(command, rejected)
            else:
                command.batch.unanswered(run, self.lost, self._now)

        self._set_alarm(command, self._now + _HELD_PAUSE_S * 2**run.rejections, send)

    def _hint(self, command: _Command, rejection: Rejected) -> str:
        run, status = command.run, self.state.status
        if status is not None and (status.migrating or status.migrated_away):
            return f"the VM is migrating or has migrated: run state {status.run_state}, migration {status.migration}"
        slot = self.state.slots[run.first]
        if command.removal is None:
            is_taken = self.state.is_taken(run.path or "")
            return hint_of_plug(run, rejection.desc, slot_path=slot.qom_path, is_taken=is_taken)
        return hint_of_unplug(rejection, path=slot.qom_path, arch=self.layout.vm.arch)

    def _unanswered(self, given: Unanswered) -> None:
        command = self._commands.pop(given.number)
        run = command.run
        if command.removal is None:
            self.state.plug_lost(run.first)
        else:
            self.state.unplug_replied(command.removal, Evidence.LOST, self._now)
        self._want_read(WantRead(Read.FULL))  # finds out whether QEMU did it anyway
        run.cause = given.error
        if isinstance(given.error, MonitorLostError):  # ``Lost`` may follow it; ``Returned`` cannot come first
            command.batch.unanswered(run, given.error, self._now)
            self._to_advance[command.transition] = None
        else:
            self._replied(command, Unknown(run.step.ids, str(given.error)))

    def _replied(self, command: _Command, verdict: Rejected | Unknown | None) -> None:
        command.batch.replied(command.run, verdict, self._now)
        self._advance_after_birth(command.transition)

    def _advance_after_birth(self, transition: Transition) -> None:
        """Let *transition* go on, and those that wait to have a vCPU born elsewhere."""
        if not transition.ended:
            self._to_advance[transition] = None
        places = self.state.places
        if places.placement is not None and places.oldest_birth is None:
            self._to_advance.update(dict.fromkeys(self._running.values()))

    # What QEMU and the guest say.

    def _heard(self, given: Heard) -> None:
        if self.lost is None:
            self.state.receive(given.event, self._now)

    def _take_news(self) -> None:
        """Hand what is new to those who wait for it."""
        self._tell_events()
        for removal in self.state.take_changed_removals():
            self._removal_changed(removal)
        for first in self.state.take_touched():
            for transition in self._concerned(first):
                if transition.batch.touched(first):
                    self._to_advance[transition] = None

    def _removal_changed(self, removal: Removal) -> None:
        for transition in self._concerned(min(removal.ids)):
            if removal.state.is_final:
                transition.answered(removal, self._now)
                self._to_advance[transition] = None
            elif transition.batch.accepted_by_other(removal, self._now):
                self._to_advance[transition] = None
        if removal.state.is_final:
            for wait in tuple(self._waits.get(removal, ())):
                self._settle_wait(wait)
            ids = self._left_offline.pop(removal, None)
            if ids is not None and removal.state is State.REFUSED:
                self._bring_online(ids)

    def _tell_events(self) -> None:
        events = self.state.take_events()
        if events:
            self._effects.append(Publish(events))

    def _export_lock(self, given: ExportLock) -> None:
        self.state.exported = given.locked

    def _arrived(self, given: Arrived) -> None:
        self.state.arrived(given.pending, given.answers, self._now)
        self.intentions.desired = given.desired

    # Looks.

    def _look(
        self,
        read: Read,
        then: Callable[[Exception | None], None],
        *,
        status: bool = False,
        other_paths: bool = False,
        started: tuple[Slot, ...] = (),
    ) -> int | None:
        """Read the VM, then call *then* with why that failed, or None; return the number of the look."""
        if self.lost is not None:
            then(self.lost)
            return None
        tick = self.state.read_sent(read)
        for each in self._new_looks:
            if each.tick == tick and each.look.read >= read and not (status or other_paths or started):
                each.then.append(then)
                return each.look.number
        look = Look(self._next(), read, status=status, other_paths=other_paths, started=started)
        under_way = self._looks[look.number] = _LookUnderWay(tick, look, [then])
        self._new_looks.append(under_way)
        self._effects.append(look)
        return look.number

    def _looked(self, given: Looked) -> None:
        under_way = self._looks.pop(given.number, None)
        if under_way is None:
            return  # the connection was given up meanwhile
        error: Exception | None = None
        if given.status is not None:
            self.state.status = given.status
        if given.other_paths is not None:
            self.state.others_read(given.other_paths)
        if given.places is not None:
            self.state.found(given.places)
        if given.started is not None:
            self.state.started(under_way.tick, given.started, self._now)
        if given.slots is not None:
            try:
                self.state.observed(under_way.tick, given.slots, given.threads, self._now)
            except MalformedReplyError as malformed:
                error = malformed
        self._take_news()
        for then in under_way.then:
            then(error)

    def _look_failed(self, given: LookFailed) -> None:
        under_way = self._looks.pop(given.number, None)
        for then in () if under_way is None else under_way.then:
            then(given.error)

    def _want_read(self, given: WantRead) -> None:
        """Have the slots read, now and for nobody in particular."""
        self.state.wanted_read = max(self.state.wanted_read, given.read)
        self._drop_alarm(_READ_AGAIN)

    def _read_wanted(self) -> None:
        read = self.state.wanted_read
        if read is Read.NONE or self.lost is not None or self._reading is not None or _READ_AGAIN in self._alarm_of:
            return

        def looked(error: Exception | None) -> None:
            self._reading = None
            self._tell_of_reading(error)
            if error is None:
                self._pause = _FIRST_PAUSE_S
                return
            self.state.wanted_read = max(self.state.wanted_read, read)
            self._set_alarm(_READ_AGAIN, self._now + self._pause, lambda: None)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)

        self._reading = self._look(read, looked)

    def _tell_of_reading(self, error: Exception | None) -> None:
        if self.lost is None:
            self._effects.append(BackgroundRead(error))

    def _arm_resync(self) -> None:
        if self._resync_interval:
            self._set_alarm(_RESYNC, self._now + self._resync_interval, self._resync)

    def _resync(self) -> None:
        def looked(error: Exception | None) -> None:
            self._tell_of_reading(error)
            self._arm_resync()

        if not self.closed:
            self._look(Read.FULL, looked)

    # The connection.

    def _lost(self, given: Lost) -> None:
        if self.lost is None:
            self.lost = given.error
            self.state.disconnected(given.error.why)
            for explain in tuple(self._explaining.values()):
                explain(given.error)
        elif given.may_return:
            return
        if not given.may_return:
            self._give_up(given.error)
            return
        for transition in self._running.values():
            patience = max(transition.change.options.timeout, self.reply_timeout)
            transition.paused(self._now + patience)
            self._to_advance[transition] = None
        for request in self._queue:
            self._await_return(request)

    def _give_up(self, error: MonitorLostError) -> None:
        """End everything that waits: the connection does not come back."""
        if self.closed:
            return
        self.lost, self.closed = error, True
        intent = self._intent()
        for transition in self._running.values():
            transition.lose(error, self._now)
            self._to_advance[transition] = None
        if self._running:
            self.intentions.interrupted, self._map_intent = intent, None
        self._refuse_waiting()
        looks, self._looks = self._looks, {}
        for under_way in looks.values():
            for then in under_way.then:
                then(error)
        for waits in self._waits.values():
            for wait in waits:
                self._drop_alarm(wait)
                self._refuses(wait)
        self._waits.clear()
        self._go_on()
        self._effects.append(LetGo(error))

    def _refuse_waiting(self) -> None:
        """Settle the requests that have not begun with an error."""
        for request in (*self._queue, *self._parked, *self._offline, *self._asking, *self._planning):
            self._forget(request)
            if self._exclusive is request:
                self._make_room()
            self._refuses(request)

    def _returned(self, given: Returned) -> None:
        if self.closed:
            return
        had = self.layout
        self.lost = None
        for request in self._queue:
            self._drop_alarm(request)
        self.state.resync(
            given.slots,
            given.threads,
            status=given.status,
            answers=given.answers,
            same_instance=given.same_instance,
            now=self._now,
        )
        self._take_news()
        for transition in tuple(self._running.values()):
            if given.same_instance:
                transition.resumed(self._now)
            else:
                transition.lose(MonitorLostError("another QEMU runs this VM now"), self._now)
            self._to_advance[transition] = None
        if not given.same_instance:
            self._go_on()
            self._map_intent = self.intentions.interrupted = None
            if self.intentions.previous is None and 0 in had.enabled:
                from qmpvcpu.model.exported import PreviousVcpus  # not at the top: QEMUs are seldom replaced

                self.intentions.previous = PreviousVcpus.of(had)
        for waiting in tuple(self._offline):
            self._forget(waiting)
            self._refresh(waiting)

    def _stop(self, _given: Stop) -> None:
        self._stopping = True
        self._refuse_waiting()
        transition = self._map()
        if transition is not None:
            transition.cancel(self._now)
            self._to_advance[transition] = None
        for single in self._running.values():
            if not single.is_map and any(step.asks_agent for step in single.plan.steps):
                single.abandon(self._now)  # what is offline in the guest, and was not asked of QEMU, comes back
                self._to_advance[single] = None

    # Time, and numbers.

    def _set_alarm(self, key: object, when: float, ring: Callable[[], object]) -> None:
        known = self._alarm_of.get(key)
        if known is None or known.when != when:
            alarm = self._alarm_of[key] = _Alarm(when, self._next(), key, ring)
            heapq.heappush(self._alarms, alarm)
            if known is not None:
                self._discard_dropped()

    def _drop_alarm(self, key: object) -> None:
        if self._alarm_of.pop(key, None) is not None:
            self._discard_dropped()

    def _discard_dropped(self) -> None:
        """Have an alarm first in the heap that is neither dropped nor set anew."""
        while self._alarms and self._alarm_of.get(self._alarms[0].key) is not self._alarms[0]:
            heapq.heappop(self._alarms)

    def _ring(self) -> None:
        """Act on the deadlines that have passed."""
        while (when := self.deadline) is not None and when <= self._now:
            alarm = self._alarms[0]
            self._drop_alarm(alarm.key)
            alarm.ring()

    def _next(self) -> int:
        self._number += 1
        return self._number
