"""The core beside a naive QEMU: single changes, guests, other clients, resets and lost connections in any order.

The wire is modelled as it is: QEMU answers one monitor's commands in order, events and replies share the wire, events
are taken in as they come, and a reply may be taken in later than events that came behind it. What is on the wire when
the connection is lost never arrives; of the commands on their way, QEMU has carried out some.

The core is told all this by its one entry, and its effects are carried out as ``vm.driver`` does.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qmpvcpu import Layout, MalformedReplyError, MonitorLostError, OnFailure, Proof, QmpVcpuError, VcpuMap, qapi
from qmpvcpu.engine.intents import Intentions
from qmpvcpu.engine.messages import (
    Accepted,
    Ask,
    Cancelled,
    Change,
    Effect,
    GuestTold,
    Heard,
    HostIs,
    Input,
    LetGo,
    Look,
    Looked,
    LookFailed,
    Lost,
    NotBorn,
    PlaceThreads,
    Publish,
    Refresh,
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
    Wait,
    Wanted,
    WantRead,
)
from qmpvcpu.engine.removal import Removal, State
from qmpvcpu.engine.steprun import StepRun, StepStage
from qmpvcpu.engine.transition import Phase, Transition
from qmpvcpu.engine.vmstate import Read, VmState
from qmpvcpu.errors import (
    AgentConnectError,
    AgentSilentError,
    GuestNumberUnknownError,
    GuestRefusedError,
    Outcome,
    StepDeniedError,
)
from qmpvcpu.events import Event, VcpuProven, VcpuUnplugged
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.placement import Placement, PlacementPolicy
from qmpvcpu.model.transition import Action, Intent
from qmpvcpu.model.verdicts import OstStatus, Pending, Plugged, Refused, Unknown, Unplugged
from qmpvcpu.model.vm import VmInfo, VmStatus
from tests.engine.model_qemu import OTHER, SLOTS, US, Deletions, ModelQemu, Reply
from tests.engine.story import HOST, plug, set_state, unplug
from tests.engine.watched import Watched

__all__ = ["REPLY_TIMEOUT", "Command", "Disk", "EngineBesideQemu", "vcpus"]

REPLY_TIMEOUT = 10.0
MOST_TICKS = 8  # at one moment
MOST_ROUNDS = 100  # until everything has arrived
MOST_QUESTIONS = 40  # of one transition at one moment
vcpus = st.integers(1, SLOTS - 1)
VM = VmInfo("t", "x86_64", "q35", "kvm", (10, 0, 2))
PERIPHERAL = "/machine/peripheral/"
UNDER_WAY = {StepStage.LEAVING_GUEST, StepStage.SENT, StepStage.UNSURE, StepStage.RETURNING_TO_GUEST}
proofs = st.sampled_from([Proof.PRESENT, *Proof])
policies = st.sampled_from([None, None, *PlacementPolicy])
placements = st.sampled_from(
    [
        None,
        Placement.pinned({1: "4", 2: "4", 3: "5"}),
        Placement.pinned({1: "4", 3: "5"}, policy=PlacementPolicy.PREFERRED),
        Placement.pinned({1: "4", 2: "0-3", 3: "4"}),
    ]
)
single_options = st.builds(
    CheckedOptions,
    on_failure=st.just(OnFailure.STOP),
    timeout=st.sampled_from([0.0, 5.0, 30.0]),
    total_timeout=st.sampled_from([None, None, 8.0]),
    in_flight=st.sampled_from([1, 8]),
    proof=proofs,
    require_proof=st.sampled_from([False, False, True]),
    online=st.booleans(),
    offline_first=st.booleans(),
    placement_policy=policies,
)


class Command(NamedTuple):
    """A command of ours: carrying it out gives what is then told; ``lost`` is what is told instead."""

    number: int
    execute: Callable[[], Input]
    lost: Callable[[Exception], Input]


class Question(NamedTuple):
    """A question to the guest's agent."""

    ask: Ask
    until: float


class Disk(NamedTuple):
    """What the record holds."""

    intent: Intent | None
    enabled: VcpuMap
    pending: dict[int, int]  # by vCPU: which of the CPUs that were ever in its slot is to go
    desired: VcpuMap | None = None


class EngineBesideQemu(RuleBasedStateMachine):
    """Everybody does something, in any order."""

    deletions = Deletions.AT_ONCE_OR_LATE
    others_use_our_names = True

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0
        self.reconnects = True
        self.qemu = self.judged = ModelQemu(self.deletions)
        self.inputs: deque[Input] = deque()
        self.receiving = False
        self.commands: deque[Command] = deque()
        self.replies: deque[Input] = deque()  # on our side, not taken in yet
        self.open: dict[Request, None] = {}
        self.cancelled: set[Request] = set()
        self.settled: set[Request] = set()
        self.seen_to = [0] * SLOTS
        self.seen_by: dict[int, list[list[str | None]]] = {}  # by look: what had been when it was carried out
        self.seen_last: dict[Transition, list[list[str | None]]] = {}
        self.heard_working: dict[int, str | None] = {}  # the CPUs that the guest is heard to work on
        self.added: dict[Transition, set[int]] = {}
        self.asked: dict[Transition, set[int]] = {}
        self.replaced: set[Transition] = set()  # another QEMU took the place of the one that they were about
        self.online = True
        self.was_away = self.spoke_nonsense = False
        self.returning = 0  # how much of coming back is done
        self.between = False  # true while two QEMUs are compared, and what is gone is gone with the first
        self.disk = Disk(None, VcpuMap(), {})
        self.has_agent = True
        self.agent = "well"
        self.agent_failures = 0
        self.questions: deque[Question] = deque()
        self.unheeded: list[Ask] = []  # that a silent agent has not carried out yet
        self.refusers: set[StepRun] = set()  # that the agent refused to take offline
        self.offline: dict[StepRun, tuple[int, int]] = {}  # the CPU that the agent has taken offline for each
        self.failed_before: dict[StepRun, int] = {}  # how often the agent had failed by then
        self.asked_at: Counter[object] = Counter()
        self.births: dict[int, VcpuMap | None] = {}  # where QEMU's main thread has to be, by device_add in flight
        self.host = "well"
        self.placement: Placement | None = None
        self.engine = self.attach()

    @initialize(placement=placements)
    def threads_are_to_run_there(self, placement: Placement | None) -> None:
        self.want(placement)

    def want(self, placement: Placement | None) -> None:
        self.placement = placement
        self.put(Wanted(placement))

    def attach(self) -> Watched:
        """Look for the first time, and take in what the record knows of this very QEMU."""
        slots, threads = self.qemu.read()
        creation = tuple(next(s.first for s in slots if s.qom_path == t.qom_path) for t in threads)
        layout = Layout(vm=VM, slots=slots, creation=creation)
        self.hear_answers()
        answers, status = self.qemu.answers, VmStatus("running")
        state = VmState(
            layout,
            status=status,
            single_threaded=None,
            answers=answers,
            now=self.now,
            has_agent=self.has_agent,
            placement=self.placement,
        )
        state.places.host = HOST
        pending = {vcpu for vcpu, seen in self.disk.pending.items() if seen == len(self.qemu.history[vcpu]) - 1}
        state.known_from_record(pending, answers, self.now)
        intentions = Intentions(self.disk.intent, self.disk.desired)
        return Watched(
            state,
            intentions,
            is_recorded=True,
            reply_timeout=REPLY_TIMEOUT,
            reconnects=self.reconnects,
            now=self.now,
        )

    def hear_answers(self) -> None:
        self.heard_working = {
            vcpu: self.qemu.paths[vcpu]
            for vcpu, answer in self.qemu.answers.items()
            if answer.is_ejection and answer.status is OstStatus.IN_PROGRESS and self.qemu.paths[vcpu] is not None
        }

    # What the core is told, and what it wants.

    def put(self, given: Input) -> None:
        """Tell the core, after all that came before it."""
        self.inputs.append(given)
        if self.receiving:
            return
        self.receiving = True
        ticks = 0
        try:
            while self.inputs:
                self.receive(self.inputs.popleft())
                deadline = self.engine.deadline
                assert deadline is None or deadline >= self.now, "a deadline is left in the past"
                if not self.inputs and deadline == self.now:
                    ticks += 1
                    assert ticks < MOST_TICKS, "there is no end of ticks"
                    self.inputs.append(Tick())
        finally:
            self.receiving = False

    def receive(self, given: Input) -> None:
        if isinstance(given, Accepted | Rejection | Unanswered | NotBorn):
            born_on = self.births.get(given.number)
            alone = len(self.births) == 1 and born_on is not None and self.host == "well"
            if isinstance(given, Accepted) and alone:
                given = given._replace(in_place=True)
            effects = self.engine.receive(given, self.now)
            self.births.pop(given.number, None)
        else:
            effects = self.engine.receive(given, self.now)
        for transition in self.engine.confirmed:
            assert isinstance(given, Looked)
            self.seen_last[transition] = self.seen_by[given.number]
        self.engine.confirmed.clear()
        ended, self.engine.ended_removals = self.engine.ended_removals, []
        for removal in ended:
            if removal.state is State.REFUSED:
                assert self.may_have_refused(min(removal.ids), removal.code)
        slots = self.engine.layout.slots
        self.heard_working = {v: path for v, path in self.heard_working.items() if slots[v].qom_path == path}
        for effect in effects:
            self.perform(effect)

    def perform(self, effect: Effect) -> None:
        match effect:
            case Send():
                self.send(effect)
            case Look():
                self.look(effect)
            case Ask():
                self.question(effect)
            case PlaceThreads():
                self.place(effect)
            case Save():
                self.save(effect)
            case Publish():
                for event in effect.events:
                    self.check_event(event)
            case Settle():
                self.settle(effect)
            case LetGo():
                assert self.engine.closed

    def send(self, send: Send) -> None:
        transition, run = self.engine.senders[send.number]
        self.check_sending(transition, run)
        vcpu, device = run.step.first, str(send.arguments["id"])
        path = device if device.startswith("/") else PERIPHERAL + device
        (self.added if run.plugs else self.asked).setdefault(transition, set()).add(vcpu)

        if run.plugs:
            self.births[send.number] = send.born_on
            if send.born_on is not None and self.host == "full":
                self.put(NotBorn(send.number, "no such host CPU"))
                return
            self.check_births(run)

        def execute() -> Input:
            taken = self.qemu.add(vcpu, path, US) if run.plugs else self.qemu.remove(path, US)
            return Accepted(send.number) if taken else Rejection(send.number, "GenericError", "no")

        self.commands.append(Command(send.number, execute, lambda error: Unanswered(send.number, error)))

    def check_births(self, run: StepRun) -> None:
        """QEMU's main thread is at one place only, and that is the new vCPU's."""
        assert len(set(self.births.values())) == 1, "what is born elsewhere waits"
        born_on = next(iter(self.births.values()))
        wanted = None if self.placement is None else self.placement.born_on(run.step.ids, HOST)
        assert run.born_anyway or run.rejections or born_on == (None if wanted == HOST.main_cpus else wanted)

    def place(self, effect: PlaceThreads) -> None:
        """QEMU is asked for its threads, and they are put in their place."""
        self.count_question(effect.slots)
        lost = ThreadsPlaced(effect.number, {})

        def execute() -> Input:
            why = {"well": "", "full": "no such host CPU"}.get(self.host)
            return lost if why is None else ThreadsPlaced(effect.number, {slot.first: why for slot in effect.slots})

        self.commands.append(Command(effect.number, execute, lambda error: lost._replace(error=error)))

    def question(self, ask: Ask) -> None:
        transition, run = self.engine.askers.get(ask.number, (None, None))
        self.count_question(transition)
        if run is not None and not ask.online:
            assert run.step.asks_agent
            assert run.stage is StepStage.LEAVING_GUEST
        assert self.has_agent
        self.questions.append(Question(ask, self.now + ask.limit))

    def count_question(self, of: object) -> None:
        """What no event tells is asked for at a pace that is no load."""
        self.asked_at[of, self.now] += 1
        assert self.asked_at[of, self.now] < MOST_QUESTIONS, "asked again and again"

    def look(self, look: Look) -> None:
        if look.started:
            self.count_question("who runs")

        def execute() -> Input:
            self.seen_by[look.number] = [list(each) for each in self.judged.history]
            slots, threads = self.qemu.read()
            return Looked(
                look.number,
                None if look.read is Read.NONE else slots,
                threads if look.read is Read.FULL else None,
                VmStatus("running") if look.status else None,
                frozenset() if look.other_paths else None,
                frozenset(s.first for s in look.started if self.qemu.cpu(s.first) in self.qemu.ran)
                if look.started
                else None,
            )

        self.commands.append(Command(look.number, execute, lambda error: LookFailed(look.number, error)))

    def save(self, save: Save) -> None:
        self.disk = self.known()
        self.put(Saved(save.number, None))

    def known(self) -> Disk:
        """What a save that begins now writes."""
        layout, recorded = self.engine.layout, self.engine.recorded
        pending = {vcpu: self.seen_to[vcpu] for vcpu in layout.pending}
        return Disk(recorded.intent, layout.enabled, pending, recorded.desired)

    def check_sending(self, transition: Transition, run: StepRun) -> None:
        """Nothing is sent in vain, twice, beside a map, or unless the record tells of it."""
        engine, vcpu = self.engine, run.step.first
        options = transition.change.options
        assert engine.lost is None
        sent = [each for each in engine._commands.values() if each.run.stage is StepStage.SENT]
        asked = len(transition.batch._out.asked)
        assert asked + sum(each.transition is transition for each in sent) <= options.in_flight
        assert run not in self.refusers, "nothing is sent to QEMU after the agent's refusal"
        if run.step.asks_agent and not run.plugs:
            assert run.is_offline, "nothing is sent to QEMU before the agent has taken it offline"
        assert run.plugs or vcpu not in self.heard_working, "asked twice: the guest works on it"
        assert self.disk.intent is not None, "nothing is sent without an intent on disk"
        assert vcpu in {step.first for step in self.disk.intent.steps}
        if transition.is_map:
            assert all(each.transition is transition for each in sent), "a map is alone"
        else:
            assert engine._exclusive is None, "nothing is sent beside a map, or a hold"

    # We.

    def ask(self, request: Request) -> None:
        self.open[request] = None
        self.put(request)

    @rule(vcpu=st.one_of(st.none(), vcpus), options=single_options)
    def plug(self, vcpu: int | None, options: CheckedOptions) -> None:
        self.ask(plug(vcpu, **options._asdict()))

    @rule(vcpu=vcpus, options=single_options, result=st.sampled_from([Result.IDS, Result.REMOVAL]))
    def unplug(self, vcpu: int, options: CheckedOptions, result: Result) -> None:
        self.ask(unplug(vcpu, result=result, **options._asdict()))

    @rule(vcpu=vcpus, enabled=st.booleans(), options=single_options)
    def set_state(self, vcpu: int, enabled: bool, options: CheckedOptions) -> None:
        self.ask(set_state(vcpu, enabled=enabled, **options._asdict()))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), really=st.sampled_from([True, False, False]))
    def a_caller_goes_away(self, which: int, really: bool) -> None:
        if really:
            self.cancel(list(self.open)[which % len(self.open)])

    def cancel(self, request: Request) -> None:
        del self.open[request]
        self.cancelled.add(request)
        self.put(Cancelled(request))

    @rule(read=st.sampled_from(Read), status=st.booleans())
    def we_read(self, read: Read, status: bool) -> None:
        self.ask(Refresh(read, status=status))

    @rule(read=st.sampled_from([Read.SLOTS, Read.FULL]))
    def something_may_have_been_missed(self, read: Read) -> None:
        self.put(WantRead(read))

    @rule(vcpu=vcpus, timeout=st.sampled_from([0.0, 0.0, 5.0, None]))
    def somebody_waits(self, vcpu: int, timeout: float | None) -> None:
        if vcpu in self.engine.state.removals:
            self.ask(Wait(self.engine.state.removals[vcpu], timeout))

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.questions and self.questions[0].until <= until:
            self.now = max(self.now, self.questions[0].until)
            self.the_agent_is_silent()
        self.now = until
        self.put(Tick())

    @rule()
    def a_deadline_passes(self) -> None:
        limits = [self.engine.deadline, *(each.until for each in self.questions)]
        moments = [each for each in limits if each is not None]
        if moments:
            self.time_passes(max(min(moments) - self.now, 0.0))

    # The host.

    @rule(mood=st.sampled_from(["well", "well", "full", "hidden"]))
    def the_host_is(self, mood: str) -> None:
        self.host = mood

    @rule(placement=placements)
    def somebody_wants_threads_elsewhere(self, placement: Placement | None) -> None:
        self.want(placement)

    # The guest's agent.

    @rule(mood=st.sampled_from(["well", "well", "absent", "silent", "refusing"]))
    def the_agent_is(self, mood: str) -> None:
        self.agent = mood
        if mood == "absent":  # what it had not done, nobody does
            self.unheeded.clear()

    @precondition(lambda self: self.questions)
    @rule()
    def the_agent_answers(self) -> None:
        self.agent_failures += self.agent != "well"
        if self.agent == "silent":
            return
        ask = self.questions.popleft().ask
        for late in self.unheeded:
            self.carry_out(late)
        self.unheeded.clear()
        error: QmpVcpuError | None = None
        changed = VcpuMap()
        if self.agent == "absent":
            error = AgentConnectError("/ga", "nobody listens")
        elif ask.online is not None and not set(ask.ids) <= self.qemu.listed().keys():
            error = GuestNumberUnknownError("/ga", ask.ids, "the guest does not list it")
            self.agent_failures += 1
        elif ask.online is not None and self.agent == "refusing":
            error = GuestRefusedError("/ga", "busy", ids=ask.ids, done=VcpuMap())
            if not ask.online:
                self.refusers.add(self.engine.askers[ask.number][1])
        elif ask.online is not None:
            changed = self.carry_out(ask)
        if self.agent != "absent":
            self.put(GuestTold(None, self.qemu.listed()))
        self.put(GuestTold(ask.number, None, changed, error))

    def carry_out(self, ask: Ask) -> VcpuMap:
        """Have the guest do what the agent is asked for, to CPUs that it lists; return those that it changed."""
        assert ask.online is not None
        listed = self.qemu.listed()
        changed = VcpuMap(vcpu for vcpu in ask.ids if listed.get(vcpu) is (not ask.online))
        for vcpu in changed:
            self.qemu.set_online(vcpu, online=ask.online)
            if not ask.online and ask.number in self.engine.askers:
                run = self.engine.askers[ask.number][1]
                self.offline[run], self.failed_before[run] = self.qemu.cpu(vcpu), self.agent_failures
        return changed

    def the_agent_is_silent(self) -> None:
        """The time for the oldest answer is over; what it was told to do, it may do yet."""
        ask = self.questions.popleft().ask
        self.agent_failures += 1
        outcome = Outcome.UNCHANGED if ask.online is None else Outcome.UNKNOWN
        if ask.online is not None and self.agent == "silent":
            self.unheeded.append(ask)
        self.put(GuestTold(ask.number, None, error=AgentSilentError("/ga", "", timeout=ask.limit, outcome=outcome)))

    @rule()
    def somebody_asks_for_the_guests_list(self) -> None:
        if self.has_agent and self.agent in {"well", "refusing"}:
            self.put(GuestTold(None, self.qemu.listed()))

    @rule(vcpu=vcpus, online=st.booleans())
    def the_guest_takes_a_cpu(self, vcpu: int, online: bool) -> None:
        if self.qemu.cpu(vcpu) not in self.qemu.online:
            self.qemu.set_online(vcpu, online=online)

    @rule(vcpu=vcpus)
    def a_cpu_runs(self, vcpu: int) -> None:
        self.qemu.run(vcpu)

    # QEMU, its guest, and others.

    def qemu_executes(self) -> None:
        command = self.commands.popleft()
        self.qemu.emit(Reply(command.execute(), command.lost))

    @precondition(lambda self: self.commands)
    @rule(which=st.integers(0, 100), really=st.sampled_from([True, False, False]))
    def qemu_speaks_nonsense(self, which: int, really: bool) -> None:
        """It carries a command out, and answers with what nobody understands."""
        if really and self.online:
            self.spoke_nonsense = True
            command = self.commands[which % len(self.commands)]
            nonsense = command._replace(
                execute=lambda: (command.execute(), command.lost(MalformedReplyError("device_add", "no", 0)))[1]
            )
            self.commands[which % len(self.commands)] = nonsense

    @rule(vcpu=vcpus, as_ours=st.booleans(), told=st.sampled_from([True, True, False]))
    def another_client_plugs(self, vcpu: int, as_ours: bool, told: bool) -> None:
        name = "vcpu" if as_ours and self.others_use_our_names else "other"
        if self.qemu.add(vcpu, f"{PERIPHERAL}{name}{vcpu}", OTHER) and told:
            self.qemu.ost(vcpu, 0, source=1)

    @rule(late=st.booleans(), holds=st.booleans())
    def qemu_is_late(self, late: bool, holds: bool) -> None:
        self.qemu.late, self.qemu.holds = late, holds

    @precondition(lambda self: self.qemu.owed or self.qemu.unsaid)
    @rule()
    def what_is_owed_is_said(self) -> None:
        self.qemu.catch_up()

    @rule(vcpu=vcpus)
    def another_client_unplugs(self, vcpu: int) -> None:
        self.qemu.remove(self.qemu.paths[vcpu] or "", OTHER)

    @rule(vcpu=vcpus, status=st.sampled_from([0, 1, 0x81]))
    def the_guest_answers_a_plug(self, vcpu: int, status: int) -> None:
        self.qemu.acknowledge(vcpu, status)

    @precondition(lambda self: self.qemu.requested)
    @rule(vcpu=vcpus)
    def the_guest_takes_a_removal_up(self, vcpu: int) -> None:
        self.qemu.take_up(vcpu)

    @precondition(lambda self: self.qemu.requested or self.qemu.working)
    @rule(vcpu=vcpus, answer=st.sampled_from(["eject", "refuse", "lie", "eject without a word"]))
    def the_guest_decides(self, vcpu: int, answer: str) -> None:
        self.qemu.decide(vcpu, answer)

    @precondition(lambda self: self.qemu.working)
    @rule(forgotten=st.booleans())
    def the_vm_is_reset(self, forgotten: bool) -> None:
        self.qemu.reset(forgotten=forgotten)

    @rule(stops=st.booleans())
    def the_vm_stops_or_goes_on(self, stops: bool) -> None:
        self.qemu.emit(qapi.RunEvent.STOP if stops else qapi.RunEvent.RESUME)

    # The connection.

    @precondition(lambda self: self.online)
    @rule(executed=st.integers(0, 3), told_first=st.booleans())
    def the_connection_is_lost(self, executed: int, told_first: bool) -> None:
        self.lose_the_connection(executed, told_first=told_first)

    def lose_the_connection(self, executed: int, *, told_first: bool) -> None:
        """The loss is told before those of the commands, as the monitor does, or after."""
        self.cut(executed)
        lost = MonitorLostError("QEMU hung up")
        if not told_first:
            self.lose_replies(lost)
        self.put(Lost(lost, self.reconnects))
        self.lose_replies(lost)
        assert not self.commands

    def cut(self, executed: int) -> None:
        """What has come in is taken in; of what is on its way QEMU carries *executed* commands out."""
        while self.replies:
            self.a_reply_is_taken_in()
        self.online, self.returning, self.qemu.listened = False, 0, False
        self.was_away = True
        for command in list(self.commands)[:executed]:
            command.execute()

    def lose_replies(self, error: MonitorLostError) -> None:
        lost = [message.lost for message in self.qemu.wire if isinstance(message, Reply)]
        lost += [command.lost for command in self.commands]  # the monitor refuses those of who knows of no loss yet
        self.qemu.wire.clear()
        self.commands.clear()
        for tell in lost:
            self.put(tell(error))

    @precondition(lambda self: not self.online and not self.returning)
    @rule(full=st.booleans())
    def another_qemu_takes_its_place(self, full: bool) -> None:
        self.qemu = ModelQemu(self.deletions, listened=False)
        if full:
            self.qemu.add(2, f"{PERIPHERAL}vcpu2", OTHER)

    @precondition(lambda self: not self.online and not self.engine.closed)
    @rule()
    def we_find_qemu_again(self) -> None:
        """Bit by bit: what happens between our questions comes as an event too, afterwards."""
        self.returning += 1
        if self.returning == 1:
            self.qemu.listened = True
        elif self.returning == 2:
            self.seen = self.qemu.read()
        else:
            self.take_the_gap_in()

    def take_the_gap_in(self) -> None:
        slots, threads = self.seen
        same = self.judged is self.qemu
        if not same:
            self.judged, self.seen_to, self.between = self.qemu, [0] * SLOTS, True
            self.replaced |= set(self.engine._running.values())
        self.hear_answers()
        self.online, self.returning = True, 0
        self.put(HostIs(HOST))
        self.put(Returned(slots, threads, VmStatus("running"), dict(self.qemu.answers), same))
        self.between = False

    # The wire.

    def a_message_arrives(self, times: int = 1) -> None:
        message = self.qemu.wire.popleft()
        if isinstance(message, Reply):
            self.replies.append(message.take_in)
            return
        for _ in range(times):
            self.hear(message)
            self.put(Heard(message))
        self.what_we_say_of_a_slot_has_been_so_and_never_goes_back()

    def hear(self, message: object) -> None:
        """Note what a perfect listener would know of the guest's work."""
        if message is qapi.RunEvent.RESET:
            self.heard_working.clear()
        elif isinstance(message, qapi.OstEvent) and message.answer.is_ejection:
            path = self.engine.layout.slot_of(message.cpu_index).qom_path
            if message.answer.status is OstStatus.IN_PROGRESS and path is not None:
                self.heard_working[message.cpu_index] = path
            elif message.answer.status is not OstStatus.IN_PROGRESS:  # it is done, or says so
                self.heard_working.pop(message.cpu_index, None)

    def a_reply_is_taken_in(self) -> None:
        self.put(self.replies.popleft())
        self.what_we_say_of_a_slot_has_been_so_and_never_goes_back()

    @rule(steps=st.lists(st.sampled_from(["execute", "arrive", "arrive", "twice", "take in"]), max_size=12))
    def things_move_on(self, steps: list[str]) -> None:
        for step in steps:
            self.move(step)

    def move(self, step: str) -> None:
        if step == "execute" and self.commands:
            self.qemu_executes()
        elif step in {"arrive", "twice"} and self.qemu.wire and self.online:
            self.a_message_arrives(2 if step == "twice" else 1)
        elif step == "take in" and self.replies:
            self.a_reply_is_taken_in()

    @rule()
    def everything_arrives(self) -> None:
        rounds = 0
        while self.online and (
            self.commands or self.qemu.wire or self.replies or (self.questions and self.agent != "silent")
        ):
            rounds += 1
            assert rounds < MOST_ROUNDS, "there is no end of commands"
            while self.commands:
                self.qemu_executes()
            while self.qemu.wire:
                self.a_message_arrives()
            while self.replies:
                self.a_reply_is_taken_in()
            if self.questions:
                self.the_agent_answers()

    # What callers are told must be so.

    def settle(self, settle: Settle) -> None:
        request = settle.request
        assert request not in self.settled, "settled twice"
        assert request in self.open or request in self.cancelled
        self.settled.add(request)
        self.open.pop(request, None)
        assert settle.error is None or isinstance(settle.error, QmpVcpuError), repr(settle.error)
        if isinstance(settle.error, MonitorLostError):
            assert self.was_away or self.spoke_nonsense or request in self.cancelled
        if isinstance(request, Change):
            self.conclude(request, settle)
        elif isinstance(request, Wait) and settle.error is None:
            self.check_verdict(min(request.removal.ids), settle.result)

    def conclude(self, change: Change, settle: Settle) -> None:
        """A change is over: what is said of it must be so."""
        transition = self.engine.begun.get(change)
        if transition is None:
            done = settle.error is None and change not in self.cancelled
            assert not done, "nothing is said to be done that was not begun"
            return
        if transition.not_begun is not None:
            assert transition not in self.added, "nothing was sent"
            assert transition not in self.asked, "nothing was sent"
        if settle.error is None and change.result is Result.REMOVAL and change not in self.cancelled:
            removal, _ = settle.result if isinstance(settle.result, tuple) else (None, None)
            assert isinstance(removal, Removal)
            assert removal.state not in {State.SENT, State.REJECTED}
        for run in transition.runs if transition not in self.replaced else ():
            if run.step.action is not Action.UNPLUG or not isinstance(run.verdict, Refused):
                self.check_verdict(run.step.first, run.verdict if not isinstance(run.verdict, Refused) else None)
            else:
                self.check_verdict(run.step.first, run.verdict)
        self.check_proofs(transition)
        self.check_places(transition)
        self.check_taken_back(transition)

    def check_proofs(self, transition: Transition) -> None:
        """A step without its proof is a failure, and one with it has it."""
        for run in transition.runs:
            if run.missing is not None:
                assert isinstance(run.verdict, Plugged)
                assert run.missing not in run.proofs or run.missing is Proof.ACKNOWLEDGED
                assert run.reason

    def check_places(self, transition: Transition) -> None:
        """What has to be in its place is there, or the step has failed."""
        for run in transition.runs:
            assert not run.unplaced or run.placed_at is None
            assert not (run.taken_out is not None and run.went_well)
            if run.taken_out is not None and run.taken_out.verdict is None:
                assert transition.cancelled or transition.lost or run.taken_out.reason, run

    def check_taken_back(self, transition: Transition) -> None:
        """What the agent has taken offline is online again, has left, or is told of."""
        if self.engine.closed or transition.lost:
            return
        for run in transition.runs:
            cpu = self.offline.get(run)
            if cpu is None or self.qemu.online.get(cpu) is not False or transition.change.result is Result.REMOVAL:
                continue
            others = {each for each, of in self.offline.items() if of == cpu} - {run}
            if isinstance(run.verdict, Pending | Unknown):
                assert run.left_offline
            elif not others:
                assert run.left_offline or isinstance(run.verdict, Unplugged), run
                failed = self.agent_failures > self.failed_before[run]
                comes_back = any(each.ask.online and run.first in each.ask.ids for each in self.questions)
                assert failed or comes_back or self.was_away or isinstance(run.verdict, Unplugged), run

    def check_verdict(self, vcpu: int, verdict: object) -> None:
        if isinstance(verdict, Refused) and verdict.by_agent:
            assert vcpu in {run.step.first for run in self.refusers}
        elif isinstance(verdict, Refused):
            assert self.may_have_refused(vcpu, verdict.code), verdict
        elif isinstance(verdict, Plugged):
            assert any(path is not None for path in self.judged.history[vcpu]), verdict
        elif isinstance(verdict, Unplugged):
            assert None in self.judged.history[vcpu], verdict

    def check_event(self, event: Event) -> None:
        if isinstance(event, VcpuUnplugged) and not self.between:
            (vcpu,) = event.ids
            assert None in self.judged.history[vcpu]
        # The agent of another QEMU may be reached before we know that it is another: what it says is forgotten then.
        known = self.judged is self.qemu
        if known and isinstance(event, VcpuProven) and event.proof in {Proof.STARTED, Proof.ONLINE}:
            (vcpu,) = event.ids
            proven = self.judged.ran if event.proof is Proof.STARTED else self.judged.was_online
            those = {(vcpu, place) for place in range(self.seen_to[vcpu], len(self.judged.history[vcpu]))}
            assert those & proven, "nothing is proven by what another CPU did"

    def may_have_refused(self, vcpu: int, code: int | None) -> bool:
        """Tell whether the guest has ever refused *vcpu*, by its word or by a false success."""
        # Of two CPUs that had one path, one after the other while we were away, nobody can tell which one it is.
        swapped = code == 0 and self.was_away and None in self.judged.history[vcpu]
        return swapped or vcpu in self.judged.refused | self.judged.claimed

    # What must hold, always.

    @invariant()
    def what_we_say_of_a_slot_has_been_so_and_never_goes_back(self) -> None:
        for vcpu, slot in enumerate(self.engine.layout.slots):
            history = self.judged.history[vcpu]
            while self.seen_to[vcpu] < len(history) and history[self.seen_to[vcpu]] != slot.qom_path:
                self.seen_to[vcpu] += 1
            assert self.seen_to[vcpu] < len(history), (vcpu, slot.qom_path, history)

    @invariant()
    def pending_is_part_of_enabled_and_the_order_is_of_what_is_there(self) -> None:
        layout, removals = self.engine.layout, self.engine.state.removals
        assert layout.pending <= layout.enabled
        assert set(layout.order) == set(layout.enabled)
        assert len(set(layout.order)) == len(layout.order)
        held = {first for first, each in removals.items() if each.state in {State.REQUESTED, State.WORKING}}
        assert held <= layout.pending_slots <= set(removals)

    @invariant()
    def what_is_under_way_is_recorded(self) -> None:
        under_way = {each.run for each in self.engine._commands.values()}
        for transition in self.engine._running.values():
            under_way |= {run for run in transition.runs if run.stage in UNDER_WAY}
        told = {step.first for step in self.disk.intent.steps} if self.disk.intent is not None else set()
        assert {run.step.first for run in under_way} <= told | self.engine.superseded

    @invariant()
    def who_waits_waits_for_something(self) -> None:
        engine = self.engine
        moves = (
            self.commands or self.replies or self.questions or any(isinstance(each, Reply) for each in self.qemu.wire)
        )
        waits = {each for each in self.open if not (isinstance(each, Wait) and each.timeout is None)}
        if waits and self.online and engine._exclusive not in waits:
            assert moves or engine.deadline is not None or engine._saves or engine._configs or self.is_held()

    def is_held(self) -> bool:
        """Whether somebody keeps every change out."""
        return False

    @invariant()
    def who_is_stopped_waits_for_replies_only(self) -> None:
        for transition in self.engine._running.values():
            if transition.cancelled and self.online and self.engine.lost is None:
                looks = transition.phase in {Phase.LOOK, Phase.CONFIG}
                saves = transition in {self.engine.savers.get(number, (None,))[0] for number in self.engine._saves}
                busy = transition.batch.has_commands or transition.batch.is_placing
                assert looks or saves or busy, "a safe point was reached"

    # The end.

    def everybody_obliges(self, but: int = 0, until: Callable[[], bool] | None = None) -> None:
        """QEMU answers and the guest does all that it is asked for, until nobody waits any more."""
        self.qemu.late = False
        for round_ in range(100):
            self.we_oblige()
            self.everything_arrives()
            if until() if until is not None else not (self.open or self.engine._running):
                return
            self.qemu.catch_up()
            self.agent = self.host = "well"
            if round_ > 10:  # what has been misheard is never answered
                self.a_deadline_passes()
            for vcpu in range(SLOTS):
                self.the_guest_takes_a_cpu(vcpu, online=True)
                self.qemu.decide(vcpu, "refuse" if vcpu == but and but else "eject")
                if vcpu in self.qemu.lied:
                    self.qemu.eject(vcpu)
                if self.engine.layout[vcpu].acknowledged is None:
                    self.qemu.acknowledge(vcpu)
        raise AssertionError(f"nobody is told what became of {list(self.open)}")

    def we_oblige(self) -> None:
        """Nothing on our side is in the way."""

    def teardown(self) -> None:
        """Everything that is under way arrives; then one read, and both sides agree."""
        while not self.online:
            self.we_find_qemu_again()
        for request in list(self.open):
            if isinstance(request, Wait) and request.timeout is None:
                self.cancel(request)
                assert request in self.settled
        self.everybody_obliges()
        self.qemu.catch_up()
        self.everything_arrives()
        self.ask(Refresh())
        self.everything_arrives()
        assert not self.open
        layout, engine = self.engine.layout, self.engine
        assert [slot.qom_path for slot in layout.slots] == self.qemu.paths
        assert [layout.slot_of(first).qom_path for first in layout.order] == self.qemu.created
        assert not engine.situation.in_flight
        assert not engine.is_busy
        assert engine.state.places.oldest_birth is None
        assert not engine.state.places.arriving
        assert not self.births
        under_way, left = (
            each and replace(each, main_cpus=None, birthplaces=())
            for each in (engine.recorded.intent, engine.intentions.interrupted)
        )
        assert under_way == left, "what nobody does is under way"


def reason_of(error: BaseException | None) -> str:
    """Return why a step was denied, or ""."""
    return error.reason.name if isinstance(error, StepDeniedError) else ""
