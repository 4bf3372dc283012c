"""The engine beside a naive QEMU: commands, guests, other clients, resets and lost connections in any order.

The wire is modelled as it is: QEMU answers one monitor's commands in order, events and replies share the wire, events
are taken in as they come, and a reply may be taken in later than events that came behind it. What is on the wire when
the connection is lost never arrives; of the commands on their way, QEMU has carried out some.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qmpvcpu import Layout, qapi
from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.ledger import Read
from qmpvcpu.engine.removal import Evidence, Removal, State
from qmpvcpu.events import Event, VcpuUnplugged
from qmpvcpu.model.ost import OstStatus
from qmpvcpu.model.vm import VmInfo, VmStatus
from tests.engine.model_qemu import OTHER, SLOTS, US, Deletions, ModelQemu, Reply

__all__ = ["Command", "EngineBesideQemu"]

vcpus = st.integers(1, SLOTS - 1)
VM = VmInfo("t", "x86_64", "q35", "kvm", (10, 0, 2))


class Command(NamedTuple):
    """A command of ours: carrying it out gives the effect of its reply; ``lost`` is what comes instead."""

    execute: Callable[[], Callable[[], None]]
    lost: Callable[[], None]


class EngineBesideQemu(RuleBasedStateMachine):
    """Everybody does something, in any order."""

    deletions = Deletions.AT_ONCE_OR_LATE
    others_use_our_names = True

    def __init__(self) -> None:
        super().__init__()
        self.now = 1.0
        self.qemu = self.judged = ModelQemu(self.deletions)
        self.commands: deque[Command] = deque()
        self.replies: deque[Callable[[], None]] = deque()  # on our side, not taken in yet
        self.seen_to = [0] * SLOTS
        self.heard_working: dict[int, str | None] = {}  # the CPUs that the guest is heard to work on
        self.online = True
        self.was_away = False
        self.returning = 0  # how much of coming back is done
        self.between = False  # true while two QEMUs are compared, and what is gone is gone with the first
        self.engine = self.look_for_the_first_time()

    def look_for_the_first_time(self) -> Engine:
        slots, threads = self.qemu.read()
        creation = tuple(next(s.first for s in slots if s.qom_path == t.qom_path) for t in threads)
        layout = Layout(vm=VM, slots=slots, creation=creation)
        status = VmStatus("running")
        self.hear_answers()
        return Engine(layout, status=status, single_threaded=None, answers=self.qemu.answers, now=self.now)

    def hear_answers(self) -> None:
        self.heard_working = {
            vcpu: self.qemu.paths[vcpu]
            for vcpu, answer in self.qemu.answers.items()
            if answer.is_ejection and answer.status is OstStatus.IN_PROGRESS and self.qemu.paths[vcpu] is not None
        }

    # We.

    def may_send(self) -> bool:
        return self.online

    @precondition(lambda self: self.may_send())
    @rule(vcpu=vcpus)
    def plug(self, vcpu: int) -> None:
        if not self.engine.layout.slot_of(vcpu).present and vcpu not in self.engine.situation.in_flight:
            self.send_plug(vcpu, self.engine.plug_sent(vcpu))

    def send_plug(self, vcpu: int, path: str, told: Callable[[str], None] = lambda _: None) -> None:

        def accepted() -> None:
            self.engine.plug_accepted(vcpu)
            self.publish()
            told("accepted")

        def rejected() -> None:
            self.engine.plug_failed(vcpu)
            told("rejected")

        def lost() -> None:
            self.engine.plug_lost(vcpu)
            told("lost")

        self.commands.append(Command(lambda: accepted if self.qemu.add(vcpu, path, US) else rejected, lost))

    @precondition(lambda self: self.may_send())
    @rule(vcpu=vcpus)
    def unplug(self, vcpu: int) -> None:
        removal = self.engine.removals.get(vcpu)
        if self.engine.layout.slot_of(vcpu).present and (removal is None or removal.recalled):
            self.send_unplug(vcpu, self.engine.unplug_sent(vcpu, self.now))

    def send_unplug(self, vcpu: int, removal: Removal, told: Callable[[str], None] = lambda _: None) -> None:
        path = self.engine.layout.slot_of(vcpu).qom_path or ""
        assert vcpu not in self.heard_working, "asked twice: the guest works on it"

        def replied(evidence: Evidence, word: str) -> None:
            self.engine.unplug_replied(removal, evidence, self.now)
            self.publish()
            told("gone" if word == "rejected" and removal.state is State.UNPLUGGED else word)

        def rejected() -> None:  # then we look, before it is told
            self.read(full=False, then=lambda: replied(Evidence.REJECTION, "rejected"))

        def execute() -> Callable[[], None]:
            taken = self.qemu.remove(path, US)
            return (lambda: replied(Evidence.ACCEPTED, "accepted")) if taken else rejected

        self.commands.append(Command(execute, lambda: replied(Evidence.LOST, "lost")))

    @precondition(lambda self: self.online)
    @rule(full=st.booleans())
    def we_read(self, full: bool) -> None:
        self.read(full=full)

    def read(self, *, full: bool, then: Callable[[], None] = lambda: None) -> None:
        if not self.online:
            then()
            return
        sent = self.engine.read_sent(Read.FULL if full else Read.SLOTS)

        def execute() -> Callable[[], None]:
            slots, threads = self.qemu.read()

            def take_in() -> None:
                self.engine.observed(sent, slots, threads if full else None, self.now)
                self.publish()
                then()

            return take_in

        self.commands.append(Command(execute, then))

    @rule(vcpu=vcpus)
    def stop_waiting(self, vcpu: int) -> None:
        if vcpu in self.engine.removals:
            self.engine.deadline_passed(self.engine.removals[vcpu])
            self.publish()

    # QEMU, its guest, and others.

    def qemu_executes(self) -> None:
        command = self.commands.popleft()
        self.qemu.emit(Reply(command.execute(), command.lost))

    @rule(vcpu=vcpus, as_ours=st.booleans(), told=st.sampled_from([True, True, False]))
    def another_client_plugs(self, vcpu: int, as_ours: bool, told: bool) -> None:
        name = "vcpu" if as_ours and self.others_use_our_names else "other"
        if self.qemu.add(vcpu, f"/machine/peripheral/{name}{vcpu}", OTHER) and told:
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

    # The connection.

    @precondition(lambda self: self.online)
    @rule(executed=st.integers(0, 3), told_first=st.booleans())
    def the_connection_is_lost(self, executed: int, told_first: bool) -> None:
        self.lose_the_connection(executed, told_first=told_first)

    def lose_the_connection(self, executed: int, *, told_first: bool) -> None:
        """The loss is told before those of the commands, as the monitor does, or after."""
        self.cut(executed)
        if told_first:
            self.on_lost()
        self.lose_replies()
        if not told_first:
            self.on_lost()

    def cut(self, executed: int) -> None:
        """What has come in is taken in; of what is on its way QEMU carries *executed* commands out."""
        while self.replies:
            self.a_reply_is_taken_in()
        self.online, self.returning, self.qemu.listened = False, 0, False
        self.was_away = True
        for command in list(self.commands)[:executed]:
            command.execute()

    def lose_replies(self) -> None:
        lost = [message.lost for message in self.qemu.wire if isinstance(message, Reply)]
        lost += [command.lost for command in self.commands]
        self.qemu.wire.clear()
        self.commands.clear()
        for tell in lost:
            tell()
        self.publish()

    @precondition(lambda self: not self.online and not self.returning)
    @rule(full=st.booleans())
    def another_qemu_takes_its_place(self, full: bool) -> None:
        self.qemu = ModelQemu(self.deletions, listened=False)
        if full:
            self.qemu.add(2, "/machine/peripheral/vcpu2", OTHER)

    @precondition(lambda self: not self.online)
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
        self.hear_answers()
        status, answers = VmStatus("running"), self.qemu.answers
        self.engine.resync(slots, threads, status=status, answers=answers, same_instance=same, now=self.now)
        self.online, self.returning = True, 0
        self.publish()
        self.on_return(same=same)
        self.between = False

    def on_lost(self) -> None:
        """What else is to be told of a loss."""

    def on_return(self, *, same: bool) -> None:
        """What else is to be told of a return."""

    # The wire.

    def a_message_arrives(self, times: int = 1) -> None:
        message = self.qemu.wire.popleft()
        if isinstance(message, Reply):
            self.replies.append(message.take_in)
            return
        for _ in range(times):
            self.hear(message)
            self.engine.receive(message, self.now)
            self.publish()
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
        self.replies.popleft()()
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

    def everything_arrives(self) -> None:
        while self.online and (self.commands or self.qemu.wire or self.replies):
            while self.commands:
                self.qemu_executes()
            while self.qemu.wire:
                self.a_message_arrives()
            while self.replies:
                self.a_reply_is_taken_in()

    # What must hold, always.

    def publish(self) -> None:
        """Take the engine's news, which must be so."""
        for event in self.engine.take_events():
            self.check_event(event)
        for removal in self.engine.take_settled():
            self.check_settled(removal)
        slots = self.engine.layout.slots
        self.heard_working = {v: path for v, path in self.heard_working.items() if slots[v].qom_path == path}

    def check_event(self, event: Event) -> None:
        if isinstance(event, VcpuUnplugged) and not self.between:
            (vcpu,) = event.ids
            assert None in self.judged.history[vcpu]

    def check_settled(self, removal: Removal) -> None:
        assert removal.state.is_final
        if removal.state is State.REFUSED:
            assert self.may_have_refused(min(removal.ids), removal.code)

    def may_have_refused(self, vcpu: int, code: int | None) -> bool:
        """Tell whether the guest has ever refused *vcpu*, by its word or by a false success."""
        # Of two CPUs that had one path, one after the other while we were away, nobody can tell which one it is.
        swapped = code == 0 and self.was_away and None in self.judged.history[vcpu]
        return swapped or vcpu in self.judged.refused | self.judged.claimed

    @invariant()
    def what_we_say_of_a_slot_has_been_so_and_never_goes_back(self) -> None:
        for vcpu, slot in enumerate(self.engine.layout.slots):
            history = self.judged.history[vcpu]
            while self.seen_to[vcpu] < len(history) and history[self.seen_to[vcpu]] != slot.qom_path:
                self.seen_to[vcpu] += 1
            assert self.seen_to[vcpu] < len(history), (vcpu, slot.qom_path, history)

    @invariant()
    def pending_is_part_of_enabled_and_the_order_is_of_what_is_there(self) -> None:
        layout = self.engine.layout
        assert layout.pending <= layout.enabled
        assert set(layout.order) == set(layout.enabled)
        assert len(set(layout.order)) == len(layout.order)
        held = {
            first for first, each in self.engine.removals.items() if each.state in {State.REQUESTED, State.WORKING}
        }
        assert held <= layout.pending_slots <= set(self.engine.removals)

    def teardown(self) -> None:
        """Everything that is under way arrives; then one read, and both sides agree."""
        while not self.online:
            self.we_find_qemu_again()
        self.qemu.catch_up()
        self.everything_arrives()
        self.read(full=True)
        self.everything_arrives()
        layout = self.engine.layout
        assert [slot.qom_path for slot in layout.slots] == self.qemu.paths
        assert [layout.slot_of(first).qom_path for first in layout.order] == self.qemu.created
        assert not self.engine.situation.in_flight
