"""The engine beside a naive QEMU: commands, guests, other clients and resets in any order.

The wire is modelled as it is: QEMU answers one monitor's commands in order, events and replies share the wire, events
are taken in as they come, and a reply may be taken in later than events that came behind it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qmpvcpu import Layout, VcpuUnplugged, qapi
from qmpvcpu.engine import Engine, Evidence, Read, Removal, State
from qmpvcpu.model import CpuProps, OstAnswer, Slot, ThreadReading, VmInfo, VmStatus

SLOTS = 3  # few, so that much happens to each
BOOT = "/machine/unattached/device[0]"
vcpus = st.integers(1, SLOTS - 1)


@dataclass
class ModelQemu:
    """What is so, and what has been since the start, slot by slot."""

    has_event: bool  # KVM: the CPU's own DEVICE_DELETED comes; TCG: it does not
    paths: list[str | None] = field(default_factory=lambda: [BOOT, "/machine/unattached/device[2]", None])
    created: list[str] = field(default_factory=lambda: [BOOT, "/machine/unattached/device[2]"])
    requested: set[int] = field(default_factory=set)
    working: set[int] = field(default_factory=set)
    history: list[list[str | None]] = field(init=False)
    wire: deque[Any] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.history = [[path] for path in self.paths]

    def put(self, vcpu: int, path: str | None) -> None:
        old = self.paths[vcpu]
        if old is not None:
            self.created.remove(old)
        if path is not None:
            self.created.append(path)
        self.paths[vcpu] = path
        self.history[vcpu].append(path)

    def add(self, vcpu: int, path: str) -> bool:
        if self.paths[vcpu] is not None:
            return False
        self.put(vcpu, path)
        return True

    def remove(self, path: str) -> bool:
        if path not in self.paths:
            return False
        self.requested.add(self.paths.index(path))
        return True

    def ost(self, vcpu: int, code: int, source: int = 3) -> None:
        self.wire.append(qapi.OstEvent(vcpu, OstAnswer(source, code)))

    def read(self) -> tuple[tuple[Slot, ...], tuple[ThreadReading, ...]]:
        tids = {path: 100 + number for number, path in enumerate(self.created)}
        slots = tuple(
            Slot(v, 1, "t", CpuProps({"core-id": v}), v, path, (tids[path],) if path else ())
            for v, path in enumerate(self.paths)
        )
        threads = tuple(ThreadReading(path, tids[path], 0, CpuProps({})) for path in self.created)
        return slots, threads


class EngineBesideQemu(RuleBasedStateMachine):
    """Everybody does something, in any order."""

    has_event = True

    def __init__(self) -> None:
        super().__init__()
        self.qemu = ModelQemu(self.has_event)
        slots, _ = self.qemu.read()
        layout = Layout(vm=VmInfo("t", "x86_64", "q35", "kvm", (10, 0, 2)), slots=slots, creation=(0, 1))
        self.engine = Engine(layout, status=VmStatus("running"), single_threaded=None, answers={}, now=0.0)
        self.commands: deque[Callable[[], Callable[[], None]]] = (
            deque()
        )  # sent; executing one gives its reply's effect
        self.replies: deque[Callable[[], None]] = deque()  # on our side, not taken in yet
        self.seen_to = [0] * SLOTS
        self.asked: dict[int, Removal] = {}

    # We.

    @rule(vcpu=vcpus)
    def plug(self, vcpu: int) -> None:
        slot = self.engine.layout.slot_of(vcpu)
        if slot.present or vcpu in self.engine.situation.in_flight:
            return
        self.engine.plug_sent(vcpu)

        def execute() -> Callable[[], None]:
            if self.qemu.add(vcpu, slot.new_qom_path):
                return lambda: self.engine.plug_accepted(vcpu, 0.0)
            return lambda: self.engine.plug_failed(vcpu)

        self.commands.append(execute)

    @rule(vcpu=vcpus)
    def unplug(self, vcpu: int) -> None:
        slot = self.engine.layout.slot_of(vcpu)
        if not slot.present or vcpu in self.engine.removals:
            return
        path = slot.qom_path or ""
        removal = self.asked[vcpu] = self.engine.unplug_sent(vcpu, 0.0)

        def execute() -> Callable[[], None]:
            evidence = Evidence.ACCEPTED if self.qemu.remove(path) else Evidence.REJECTION
            return lambda: self.engine.unplug_replied(removal, evidence, 0.0)

        self.commands.append(execute)

    @rule(full=st.booleans())
    def read(self, full: bool) -> None:  # noqa: FBT001 - hypothesis calls it by name
        sent = self.engine.read_sent(Read.FULL if full else Read.SLOTS)

        def execute() -> Callable[[], None]:
            slots, threads = self.qemu.read()
            return lambda: self.engine.observed(sent, slots, threads if full else None, 0.0)

        self.commands.append(execute)

    @rule(vcpu=vcpus)
    def stop_waiting(self, vcpu: int) -> None:
        if vcpu in self.engine.removals:
            self.engine.deadline_passed(self.engine.removals[vcpu])

    # QEMU, its guest, and others.

    def qemu_executes(self) -> None:
        self.qemu.wire.append(("reply", self.commands.popleft()()))

    @rule(vcpu=vcpus)
    def another_client_plugs(self, vcpu: int) -> None:
        if self.qemu.add(vcpu, f"/machine/peripheral/other{vcpu}"):
            self.qemu.ost(vcpu, 0, source=1)

    @rule(vcpu=vcpus)
    def another_client_unplugs(self, vcpu: int) -> None:
        self.qemu.remove(self.qemu.paths[vcpu] or "")

    @rule(vcpu=vcpus, status=st.sampled_from([0, 1, 0x81]))
    def the_guest_answers_a_plug(self, vcpu: int, status: int) -> None:
        if self.qemu.paths[vcpu] is not None:
            self.qemu.ost(vcpu, status, source=1)

    @rule(vcpu=vcpus)
    def the_guest_takes_a_removal_up(self, vcpu: int) -> None:
        if vcpu not in self.qemu.requested:
            return
        self.qemu.requested.discard(vcpu)
        self.qemu.working.add(vcpu)
        self.qemu.ost(vcpu, 0x84)

    @precondition(lambda self: self.qemu.requested or self.qemu.working)
    @rule(vcpu=vcpus, answer=st.sampled_from(["eject", "refuse", "lie", "eject without a word"]))
    def the_guest_decides(self, vcpu: int, answer: str) -> None:
        if vcpu not in self.qemu.working:
            self.the_guest_takes_a_removal_up(vcpu)
        if vcpu not in self.qemu.working:
            return
        self.qemu.working.discard(vcpu)
        path = self.qemu.paths[vcpu]
        if answer == "refuse":
            self.qemu.ost(vcpu, 0x82)
            return
        if answer != "lie" and path is not None:
            self.qemu.put(vcpu, None)
            self.qemu.wire.append(qapi.Deleted(f"{path}/lapic"))
            if self.qemu.has_event:
                self.qemu.wire.append(qapi.Deleted(path))
        if answer != "eject without a word":
            self.qemu.ost(vcpu, 0)

    @precondition(lambda self: self.qemu.working)
    @rule()
    def the_vm_is_reset(self) -> None:
        self.qemu.requested |= {vcpu for vcpu in self.qemu.working if self.qemu.paths[vcpu] is not None}
        self.qemu.working.clear()
        self.qemu.wire.append(qapi.RunEvent.RESET)

    # The wire.

    def a_message_arrives(self) -> None:
        message = self.qemu.wire.popleft()
        if isinstance(message, tuple) and message[0] == "reply":
            self.replies.append(message[1])
        else:
            self.engine.receive(message, 0.0)
        self.what_we_say_of_a_slot_has_been_so_and_never_goes_back()

    def a_reply_is_taken_in(self) -> None:
        self.replies.popleft()()
        self.what_we_say_of_a_slot_has_been_so_and_never_goes_back()

    @rule(steps=st.lists(st.sampled_from(["execute", "arrive", "arrive", "take in"]), max_size=12))
    def things_move_on(self, steps: list[str]) -> None:
        for step in steps:
            if step == "execute" and self.commands:
                self.qemu_executes()
            elif step == "arrive" and self.qemu.wire:
                self.a_message_arrives()
            elif step == "take in" and self.replies:
                self.a_reply_is_taken_in()

    # What must hold, always.

    @invariant()
    def what_we_say_of_a_slot_has_been_so_and_never_goes_back(self) -> None:
        for vcpu, slot in enumerate(self.engine.layout.slots):
            history = self.qemu.history[vcpu]
            while self.seen_to[vcpu] < len(history) and history[self.seen_to[vcpu]] != slot.qom_path:
                self.seen_to[vcpu] += 1
            assert self.seen_to[vcpu] < len(history), (vcpu, slot.qom_path, history)

    @invariant()
    def pending_is_part_of_enabled_and_the_order_is_of_what_is_there(self) -> None:
        layout = self.engine.layout
        assert layout.pending <= layout.enabled
        assert set(layout.order) == set(layout.enabled)
        assert len(set(layout.order)) == len(layout.order)

    @invariant()
    def an_unplug_is_only_told_of_what_is_gone(self) -> None:
        for event in self.engine.take_events():
            if isinstance(event, VcpuUnplugged):
                (vcpu,) = event.ids
                assert None in self.qemu.history[vcpu][1:]

    @invariant()
    def what_is_settled_has_an_answer(self) -> None:
        for removal in self.engine.take_settled():
            assert removal.state in {State.UNPLUGGED, State.REFUSED, State.REJECTED}

    def teardown(self) -> None:
        """Everything that is under way arrives; then one read, and both sides agree."""
        for _ in range(2):
            while self.commands:
                self.qemu_executes()
            while self.qemu.wire:
                self.a_message_arrives()
            while self.replies:
                self.a_reply_is_taken_in()
            self.read(full=True)
        while self.commands:
            self.qemu_executes()
        while self.qemu.wire:
            self.a_message_arrives()
        while self.replies:
            self.a_reply_is_taken_in()
        layout = self.engine.layout
        assert [slot.qom_path for slot in layout.slots] == self.qemu.paths
        assert [layout.slot_of(first).qom_path for first in layout.order] == self.qemu.created
        assert not self.engine.situation.in_flight


class EngineBesideTcg(EngineBesideQemu):
    """The same, where no event tells that a CPU is gone."""

    has_event = False


TestUnderKvm = EngineBesideQemu.TestCase
TestUnderKvm.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestUnderTcg = EngineBesideTcg.TestCase
TestUnderTcg.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
