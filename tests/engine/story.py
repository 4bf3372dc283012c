"""One VM and those who want something of it, told as a story: what happens, and what is then to be done, in words."""

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qmpvcpu import ConfigDeniedError, DenialReason, Layout, OnFailure, TransitionReport, VcpuMap, qapi
from qmpvcpu.engine.intents import Intentions, Promised
from qmpvcpu.engine.messages import (
    Accepted,
    Ask,
    BackgroundRead,
    Cancelled,
    Change,
    Effect,
    GuestTold,
    Heard,
    Input,
    LetGo,
    Look,
    Looked,
    LookFailed,
    Lost,
    NotBorn,
    PlaceThreads,
    Publish,
    Rejection,
    Request,
    Result,
    Returned,
    Save,
    Saved,
    Send,
    Settle,
    ThreadsPlaced,
    Tick,
    Unanswered,
    WantRead,
    WriteConfig,
)
from qmpvcpu.engine.transition import Phase, Transition
from qmpvcpu.engine.vmstate import Read, VmState
from qmpvcpu.errors import (
    AgentSilentError,
    GuestRefusedError,
    MonitorLostError,
    MonitorTimeoutError,
    Outcome,
    QmpVcpuError,
    RecordError,
    TransitionError,
)
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.placement import HostFacts, Placement
from qmpvcpu.model.transition import ConfigOutcome, ConfigReport, Direction, Intent, StepReport
from qmpvcpu.model.vcpumap import union
from qmpvcpu.model.verdicts import OstAnswer, Pending, Verdict
from qmpvcpu.model.vm import VmInfo, VmStatus
from qmpvcpu.planning.plan import Plan, plan_map, plan_plug, plan_state, plan_unplug
from qmpvcpu.qapi import ThreadReading
from tests.engine.watched import Watched

if TYPE_CHECKING:
    from qmpvcpu.events import Event

__all__ = [
    "HOST",
    "RUNNING",
    "NextBoot",
    "Story",
    "make_state",
    "path",
    "plug",
    "read_slots",
    "set_state",
    "story",
    "unplug",
    "whole_map",
]

BOOT = "/machine/unattached/device[0]"
RUNNING = VmStatus("running")
_HOST_CPUS = VcpuMap.parse("0-7")
HOST = HostFacts(
    existing=_HOST_CPUS, online=_HOST_CPUS, allowed=_HOST_CPUS, main_cpus=VcpuMap.parse("0-3"), highest_priority=99
)


def path(vcpu: int) -> str:
    return f"/machine/peripheral/vcpu{vcpu}" if vcpu else BOOT


def read_slots(paths: dict[int, str], count: int = 8) -> tuple[Slot, ...]:
    return tuple(
        Slot(v, 1, "t", CpuProps({"core-id": v}), v, paths.get(v), (100 + v,) if v in paths else ())
        for v in range(count)
    )


def make_state(present: str, *, vm: dict[str, Any] | None = None, **changes: Any) -> VmState:
    """Return what is known of a VM of 8 vCPUs with *present* plugged."""
    enabled = VcpuMap.parse(present)
    info = VmInfo("test", "x86_64", "q35", **{"accelerator": "kvm", "qemu_version": (10, 0, 2), **(vm or {})})
    layout = Layout(vm=info, slots=read_slots({v: path(v) for v in enabled}), creation=tuple(enabled))
    given: dict[str, Any] = {"status": RUNNING, "single_threaded": None, "answers": {}, "now": 0.0}
    return VmState(layout, **{**given, **changes})


# Requests, as callers make them.


def whole_map(
    wish: str, *, intent: Intent | None = None, rebuilds: bool = False, tries: int = 1, **options: Any
) -> Change:
    target, given = VcpuMap.parse(wish), CheckedOptions(**options)
    return Change(
        lambda now: plan_map(now, target, given),
        given,
        intent=intent,
        rebuilds=rebuilds,
        tries=tries,
        subject=f"map {wish}",
    )


def plug(vcpu: int | None = None, **options: Any) -> Change:
    given = CheckedOptions(**options)
    return Change(
        lambda now: plan_plug(now, vcpu, given),
        given,
        Result.IDS,
        slot=vcpu,
        subject=f"plug of vCPU {vcpu}",
    )


def unplug(vcpu: int, *, result: Result = Result.IDS, **options: Any) -> Change:
    given = CheckedOptions(**options)
    return Change(
        lambda now: plan_unplug(now, vcpu, given),
        given,
        result,
        slot=vcpu,
        joins=True,
        subject=f"unplug of vCPU {vcpu}",
    )


def set_state(vcpu: int, *, enabled: bool, **options: Any) -> Change:
    given = CheckedOptions(**options)
    return Change(
        lambda now: plan_state(now, vcpu, given, enabled=enabled),
        given,
        Result.IDS,
        slot=vcpu,
        joins=not enabled,
        waits_for_plug=enabled,
        subject=f"{'plug' if enabled else 'unplug'} of vCPU {vcpu}",
    )


class NextBoot:
    """A next boot that is to have what *plan* leads to."""

    def __init__(self, denied: str = "", placement: Placement | None = None) -> None:
        self.denied = denied
        self.placement = placement
        self.promised: Promised | None = None

    def promise(self, plan: Plan) -> None:
        if self.denied:
            raise ConfigDeniedError("plug", plan.ids, DenialReason.NO_CONFIG, self.denied)
        self.promised = Promised(plan.target, "/next.xml", self.placement)

    def not_tried(self) -> ConfigReport:
        return self.report(ConfigOutcome.NOT_TRIED)

    async def write(self, done: str) -> tuple[ConfigReport, RecordError | None]:
        raise NotImplementedError(done)

    @staticmethod
    def report(outcome: ConfigOutcome) -> ConfigReport:
        return ConfigReport("/next.xml", outcome, VcpuMap([0]), VcpuMap.parse("0-1"), 8)


class Story:
    """The core and who carries out what it wants, who writes it down.

    Every method that tells something returns what is then to be done:

    - ``save intent``, ``save reverting``, ``save outcome`` (nothing is left), ``save the rest`` (something is
      unknown): of changes. ``save`` alone: of anything else. Saves succeed at once, unless ``saves_wait``.
    - ``add 3``, ``del 3``: commands.
    - ``look``, ``look closely`` (at threads too), ``look at the status``. The look before a map is planned, and the
      last one, show what is known, at once, and are not written down; unless ``first_looks_wait`` or
      ``last_looks_wait``: then ``first look`` and ``last look`` are, and ``see`` ends them.
    - ``write the next boot``.
    - ``look who runs`` of 1-2: which of these vCPUs have run.
    - ``add 3 on 4-5``: QEMU's main thread has these host CPUs meanwhile. ``place 3-4``: the threads of these vCPUs.
    - ``list the guest``, ``bring 3 online``, ``take 3 offline``: questions to the guest's agent. The list before a
      plan shows ``guest``, at once, unless ``first_looks_wait``; where that is None, the agent is silent.

    What is read in the background is not written down, and ends with the next ``read``.

    Args:
        start: What is plugged, or what is known.
        wish: The map that somebody wishes for, to begin with; "": nobody does.
        intent: Of the transition that this goes on with.
        options: Of the map.
    """

    def __init__(
        self,
        start: str | VmState,
        wish: str = "",
        *,
        intent: Intent | None = None,
        intentions: Intentions | None = None,
        recorded: bool = True,
        reply_timeout: float = 10.0,
        reconnects: bool = False,
        resync_interval: float | None = None,
        saves_wait: bool = False,
        first_looks_wait: bool = False,
        last_looks_wait: bool = False,
        **options: Any,
    ) -> None:
        self.state = make_state(start) if isinstance(start, str) else start
        self.now = 1.0
        self.engine = Watched(
            self.state,
            intentions,
            is_recorded=recorded,
            reply_timeout=reply_timeout,
            reconnects=reconnects,
            resync_interval=resync_interval,
            now=self.now,
        )
        self.saves_wait = saves_wait
        self.first_looks_wait = first_looks_wait
        self.last_looks_wait = last_looks_wait
        self.rejections_wait = False
        self.saves: deque[Save] = deque()
        self.configs: deque[WriteConfig] = deque()
        self.first_looks: deque[Look] = deque()
        self.last_looks: deque[Look] = deque()
        self.looks: deque[Look] = deque()
        self.explanations: deque[Look] = deque()
        self.in_background: deque[Look] = deque()
        self.run_looks: deque[Look] = deque()
        self.asks: deque[Ask] = deque()
        self.placings: deque[PlaceThreads] = deque()
        self.guest: dict[int, bool] | None = None
        self.sent: dict[int, deque[Send]] = {}
        self.intents: list[Intent | None] = []
        self.events: list[Event] = []
        self.ended: dict[int, Settle] = {}
        self.background_reads: list[Exception | None] = []
        self.let_go: LetGo | None = None
        self.change: Change | None = None
        self.begun = self.ask(whole_map(wish, intent=intent, **options)) if wish else []

    # What happens.

    def tell(self, *inputs: Input) -> list[str]:
        """Tell the core *inputs*, and return what is then to be done."""
        done: list[str] = []
        waiting = deque(inputs)
        while waiting:
            given = waiting.popleft()
            effects = self.engine.receive(given, self.now)
            for effect in effects:
                word, follows = self._do(effect)
                done += [word] if word else []
                waiting.extend(follows)
            deadline = self.engine.deadline
            if not waiting and deadline is not None and deadline <= self.now:
                waiting.append(Tick())
        return done

    def _do(self, effect: Effect) -> tuple[str, list[Input]]:
        match effect:
            case Save():
                word = self._word_of_save(effect)
                if not self.saves_wait:
                    return word, [Saved(effect.number, None)]
                self.saves.append(effect)
                return word, []
            case Send():
                return self._note_sent(effect), []
            case Look() | Ask() | PlaceThreads():
                return self._note_question(effect)
            case WriteConfig():
                self.configs.append(effect)
                return "write the next boot", []
            case Publish():
                self.events += effect.events
            case Settle():
                assert id(effect.request) not in self.ended, "settled twice"
                self.ended[id(effect.request)] = effect
            case BackgroundRead():
                self.background_reads.append(effect.error)
            case LetGo():
                self.let_go = effect
        return "", []

    def _word_of_save(self, save: Save) -> str:
        intent = self.engine.recorded.intent
        self.intents.append(intent)
        transition, phase = self.engine.savers.get(save.number, (None, None))
        if transition is None:
            return "save"
        if phase is Phase.FINISH:
            return "save the rest" if transition.is_unknown else "save outcome"
        return "save reverting" if transition.intent.direction is Direction.REVERTING else "save intent"

    def _note_sent(self, send: Send) -> str:
        adds, device = send.command == "device_add", send.arguments["id"]
        for slot in self.state.layout.slots:
            place = send.arguments["core-id"] == slot.props["core-id"] if adds else False
            if place or (not adds and device in {slot.device_id, slot.qom_path}):
                vcpu = slot.first
        self.sent.setdefault(vcpu, deque()).append(send)
        on = "" if send.born_on is None else f" on {send.born_on}"
        return f"{'add' if adds else 'del'} {vcpu}{on}"

    def _note_question(self, question: Look | Ask | PlaceThreads) -> tuple[str, list[Input]]:
        if isinstance(question, Ask):
            return self._note_asked(question)
        if isinstance(question, PlaceThreads):
            self.placings.append(question)
            return f"place {union(slot.ids for slot in question.slots)}", []
        if question.started:
            self.run_looks.append(question)
            return f"look who runs of {union(slot.ids for slot in question.started)}", []
        return self._note_look(question)

    def _note_asked(self, ask: Ask) -> tuple[str, list[Input]]:
        word = "list the guest"
        if ask.online is not None:
            word = f"bring {ask.ids} online" if ask.online else f"take {ask.ids} offline"
        elif self.engine.purposes[ask.number] == "first" and not self.first_looks_wait:
            error = AgentSilentError("/ga", "it is not there", timeout=ask.limit) if self.guest is None else None
            return "", [GuestTold(None, self.guest), GuestTold(ask.number, None, error=error)]
        self.asks.append(ask)
        return word, []

    def _note_look(self, look: Look) -> tuple[str, list[Input]]:
        match self.engine.purposes[look.number]:
            case "background":
                self.in_background.append(look)
                return "", []
            case "rejection":
                if not self.rejections_wait:
                    return "", [self._shown(look)]
                self.explanations.append(look)
                return "", []
            case "first":
                return self._unless(self.first_looks_wait, self.first_looks, look, "first look")
            case "last":
                return self._unless(self.last_looks_wait, self.last_looks, look, "last look")
        self.looks.append(look)
        return {Read.FULL: "look closely", Read.SLOTS: "look", Read.NONE: "look at the status"}[look.read], []

    def _unless(self, waits: bool, those: deque[Look], look: Look, word: str) -> tuple[str, list[Input]]:
        if not waits:
            return "", [self._shown(look)]
        those.append(look)
        return word, []

    def _shown(self, look: Look, slots: tuple[Slot, ...] | None = None) -> Looked:
        """Return what *look* shows: *slots*, or what is known."""
        shown = self.state.layout.slots if slots is None else slots
        threads = tuple(
            ThreadReading(each.qom_path, 100 + each.first, each.first, CpuProps({}))
            for each in shown
            if each.qom_path is not None
        )
        return Looked(
            look.number,
            None if look.read is Read.NONE else shown,
            threads if look.read is Read.FULL else None,
            (self.state.status or RUNNING) if look.status else None,
            frozenset() if look.other_paths else None,
        )

    # Callers.

    def ask(self, request: Request) -> list[str]:
        if isinstance(request, Change):
            self.change = request
        return self.tell(request)

    def wish(self, wish: str, **more: Any) -> list[str]:
        """Wish for another map."""
        return self.ask(whole_map(wish, **more))

    def cancel(self, request: Request | None = None) -> list[str]:
        """Nobody waits for *request* any more, or for the last change."""
        asked = request or self.change
        assert asked is not None
        return self.tell(Cancelled(asked))

    def is_settled(self, request: Request) -> bool:
        return id(request) in self.ended

    def result(self, request: Request) -> Any:
        settled = self.ended[id(request)]
        assert settled.error is None, settled.error
        return settled.result

    def error(self, request: Request) -> BaseException:
        error = self.ended[id(request)].error
        assert error is not None
        return error

    # The record.

    def saved(self, why: str = "") -> list[str]:
        """The oldest save is over; *why* it failed, if it did."""
        error = RecordError("/vm.xml", why) if why else None
        return self.tell(Saved(self.saves.popleft().number, error))

    # QEMU.

    def _command(self, vcpu: int) -> Send:
        sent = self.sent[vcpu].popleft()
        if not self.sent[vcpu]:
            del self.sent[vcpu]
        return sent

    def accept(self, *vcpus: int, in_place: bool = False) -> list[str]:
        return [word for vcpu in vcpus for word in self.tell(Accepted(self._command(vcpu).number, in_place))]

    def reject(self, vcpu: int, desc: str = "no", *, error_class: str = "GenericError") -> list[str]:
        return self.tell(Rejection(self._command(vcpu).number, error_class, desc))

    def explain(self, present: str | None = None, *, others: Iterable[int] = ()) -> list[str]:
        """The oldest look after a rejection shows *present*, or what is known."""
        shown = None if present is None else _slots_of(present, others)
        return self.tell(self._shown(self.explanations.popleft(), shown))

    def fail_to_answer(self, vcpu: int, error: Exception | None = None) -> list[str]:
        """What QEMU replies makes no sense, and the connection is there."""
        return self.tell(Unanswered(self._command(vcpu).number, error or MonitorTimeoutError("device_add", 1.0)))

    def fail_to_read(self) -> list[str]:
        """The read in the background fails."""
        look = self.in_background.popleft()
        return self.tell(LookFailed(look.number, MonitorTimeoutError("query-hotpluggable-cpus", 1.0)))

    def read(self, present: str, *, others: Iterable[int] = ()) -> list[str]:
        """A read in the background shows *present*, some of it plugged by others."""
        done: list[str] = []
        while self.in_background:  # it may have been sent before all this
            look = self.in_background.popleft()
            done += self.tell(Looked(look.number, None, None, None, None))
        done += self.tell(WantRead(Read.SLOTS))
        return done + self.tell(self._shown(self.in_background.popleft(), _slots_of(present, others)))

    def look(self, present: str, *, others: Iterable[int] = ()) -> list[str]:
        """The oldest look that was to be done shows *present*."""
        return self.tell(self._shown(self.looks.popleft(), _slots_of(present, others)))

    def fail_to_look(self) -> list[str]:
        return self.tell(LookFailed(self.looks.popleft().number, MonitorTimeoutError("query-hotpluggable-cpus", 1.0)))

    def see(self, present: str | None = None, *, failed: str = "", first: bool = False) -> list[str]:
        """The oldest last look, or *first* one, is over: it shows *present*, or what is known."""
        look = (self.first_looks if first else self.last_looks).popleft()
        if failed:
            return self.tell(LookFailed(look.number, ConnectionError(failed)))
        return self.tell(self._shown(look, None if present is None else _slots_of(present)))

    # The host.

    def cannot_bear(self, vcpu: int, why: str = "not allowed") -> list[str]:
        """QEMU's main thread cannot be given the birthplace of *vcpu*, so that nothing is sent."""
        return self.tell(NotBorn(self._command(vcpu).number, why))

    def place(self, *, why_not: str = "", error: Exception | None = None) -> list[str]:
        """The threads that were to be put in their place longest ago are there, or not."""
        placing = self.placings.popleft()
        told = {} if error else {slot.first: why_not for slot in placing.slots}
        return self.tell(ThreadsPlaced(placing.number, told, error))

    # The guest.

    def ost(self, vcpu: int, code: int, *, source: int = 3) -> list[str]:
        return self.tell(Heard(qapi.OstEvent(vcpu, OstAnswer(source, code))))

    def works(self, vcpu: int) -> list[str]:
        return self.ost(vcpu, 0x84)

    def refuses(self, vcpu: int) -> list[str]:
        return self.ost(vcpu, 0x82)

    def acknowledges(self, vcpu: int) -> list[str]:
        return self.ost(vcpu, 0, source=1)

    def ejects(self, *vcpus: int) -> list[str]:
        done: list[str] = []
        for vcpu in vcpus:
            done += self.tell(Heard(qapi.Deleted(self.state.layout.slot_of(vcpu).qom_path or "")))
        return done

    def have_run(self, *vcpus: int) -> list[str]:
        """The oldest look at which vCPUs have run shows *vcpus*."""
        look = self.run_looks.popleft()
        return self.tell(Looked(look.number, None, None, None, None, frozenset(vcpus)))

    # Its agent.

    def listing(self) -> GuestTold:
        """Return the guest's list as somebody else has asked for it."""
        return GuestTold(None, self.guest)

    def lists(self, guest: dict[int, bool] | None = None) -> list[str]:
        """The agent answers the oldest question with the guest's list: *guest*, or what it was before."""
        self.guest = {**(self.guest or {})} if guest is None else guest
        return self.tell(GuestTold(None, self.guest), GuestTold(self.asks.popleft().number, None))

    def obeys(self) -> list[str]:
        """The guest does what the oldest question wants, as its list shows."""
        ask = self.asks.popleft()
        assert ask.online is not None
        before = self.guest or {}
        self.guest = before | dict.fromkeys(ask.ids, ask.online)
        changed = VcpuMap(vcpu for vcpu in ask.ids if before.get(vcpu) is not ask.online)
        return self.tell(GuestTold(None, self.guest), GuestTold(ask.number, None, changed))

    def balks(
        self, reason: str = "Device or resource busy", *, done: Iterable[int] = (), passing: bool = False
    ) -> list[str]:
        """The guest refuses what the oldest question wants, but for *done*; if *passing*, only for the moment."""
        ask = self.asks.popleft()
        errno = "EAGAIN" if passing else ""
        error = GuestRefusedError("/ga", reason, ids=ask.ids, done=VcpuMap(done), errno=errno)
        return self.tell(GuestTold(ask.number, None, VcpuMap(done), error))

    def is_silent(self, error: QmpVcpuError | None = None) -> list[str]:
        """The agent does not answer the oldest question, or what it says is *error*."""
        ask = self.asks.popleft()
        silence = AgentSilentError("/ga", "it hangs", timeout=ask.limit, outcome=Outcome.UNKNOWN)
        return self.tell(GuestTold(ask.number, None, error=error or silence))

    # Time and the connection.

    def wait(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.tell(Tick())

    @property
    def deadline(self) -> float | None:
        """When something is to be done at the latest."""
        return self.engine.deadline

    def pause(self) -> list[str]:
        """The connection is lost, and what is in flight with it; it may come back."""
        return self._lose(MonitorLostError("lost"), may_return=True)

    def lose(self, why: str = "gone") -> list[str]:
        """The connection is lost for good."""
        return self._lose(MonitorLostError(why), may_return=False)

    def _lose(self, error: MonitorLostError, *, may_return: bool) -> list[str]:
        """The monitor tells the loss before it tells those of the commands."""
        done = self.tell(Lost(error, may_return))
        return done + self.lose_commands(error)

    def lose_commands(self, error: MonitorLostError) -> list[str]:
        done: list[str] = []
        for vcpu in sorted(self.sent):
            while vcpu in self.sent:
                done += self.tell(Unanswered(self._command(vcpu).number, error))
        for looks in (
            self.first_looks,
            self.looks,
            self.explanations,
            self.last_looks,
            self.in_background,
            self.run_looks,
        ):
            while looks:
                done += self.tell(LookFailed(looks.popleft().number, error))
        return done

    def resume(
        self, present: str, answers: dict[int, OstAnswer] | None = None, *, same_instance: bool = True
    ) -> list[str]:
        """The connection is back."""
        slots = _slots_of(present)
        threads = tuple(ThreadReading(path(v), 100 + v, v, CpuProps({})) for v in VcpuMap.parse(present))
        return self.tell(Returned(slots, threads, RUNNING, answers or {}, same_instance))

    # What came of it.

    @property
    def subject(self) -> Transition:
        """The transition of the last change."""
        assert self.change is not None
        return self.engine.begun[self.change]

    @property
    def phase(self) -> Phase:
        return self.subject.phase

    @property
    def report(self) -> TransitionReport:
        """What the last change was settled with, or how it stands."""
        settled = self.ended.get(id(self.change))
        if settled is None:
            return self.subject.report()
        report = settled.error.report if isinstance(settled.error, TransitionError) else settled.result
        assert isinstance(report, TransitionReport)
        return report

    def step(self, vcpu: int) -> StepReport:
        return next(step for step in self.report.steps if vcpu in step.ids)

    def verdict(self, vcpu: int) -> Verdict | None:
        return self.step(vcpu).verdict

    @property
    def verdicts(self) -> dict[int, str]:
        """By vCPU: the verdict, and what became of undoing it."""
        said = {None: "", True: ", undone", False: ", not undone"}
        return {
            min(step.ids): (step.verdict.name if step.verdict else "not sent") + said[step.undone]
            for step in self.report.steps
        }

    @property
    def outcome(self) -> str:
        return self.report.outcome.name

    def pending(self, vcpu: int) -> Pending:
        verdict = self.verdict(vcpu)
        assert isinstance(verdict, Pending)
        return verdict


def _slots_of(present: str, others: Iterable[int] = ()) -> tuple[Slot, ...]:
    theirs = set(others)
    return read_slots(
        {v: f"/machine/peripheral/other{v}" if v in theirs else path(v) for v in VcpuMap.parse(present)}
    )


def story(*, on_failure: OnFailure = OnFailure.STOP, start: str = "0-1,6", wish: str = "0,2-5", **more: Any) -> Story:
    return Story(start, wish, on_failure=on_failure, **more)
