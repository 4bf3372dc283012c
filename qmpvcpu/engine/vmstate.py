"""What is known of one VM, and how what QEMU and the guest say changes it.

Rules that live here:

- A slot is filled on an accepted ``device_add`` or a read; it is emptied by a read, or on ``DEVICE_DELETED`` for the
  exact QOM path of a CPU that is known to be leaving. Nothing else changes the layout.
- QOM paths are reused, and ``DEVICE_DELETED`` can be late: after a read has shown the slot empty, even after another
  CPU has taken the path. A read that finds a CPU gone has spent its event. In doubt the event is a reason to read.
- Events and replies may overtake each other. Whatever arrives before the reply to its command is kept until then.
- A read tells nothing of a slot that changed after the read was sent.
- OST success of a removal (3/0) is a reason to read, never evidence: a guest can answer it and keep the CPU, and a
  stale one can arrive after a re-plug. If the guest worked on the removal and the read still shows the CPU, that is a
  refusal.
"""

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from qmpvcpu import qapi
from qmpvcpu.engine.places import EMULATOR, Places
from qmpvcpu.engine.removal import Evidence, Removal, State
from qmpvcpu.errors import MalformedReplyError
from qmpvcpu.events import (
    Disconnected,
    Event,
    InstanceChanged,
    LayoutChanged,
    MigrationChanged,
    Origin,
    PlaceDrifted,
    Reconnected,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlaced,
    VcpuPlugged,
    VcpuProven,
    VcpuUnplugged,
    VmReset,
    VmResumed,
    VmStopped,
)
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.options import Proof
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import OstAnswer, OstStatus, Rejected
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.qapi import ThreadReading, creation_order, runs_single_threaded

if TYPE_CHECKING:
    from qmpvcpu.model.guest import GuestOs
    from qmpvcpu.model.placement import Place, Placement

# QEMU holds the id of a CPU that has left until it has joined its thread: some milliseconds.
_HELD_S = 1.0


class Read(enum.IntEnum):
    """Which read is wanted next."""

    NONE = 0
    SLOTS = 1  # query-hotpluggable-cpus: is the CPU there
    FULL = 2  # query-cpus-fast too: whose it is, in which order, on which thread


class SlotTable:
    """The slots of one VM as they change; a Layout is made of them when one is asked for, and kept until they change.

    A change takes the same time however many slots there are, and a burst of changes costs one Layout.

    Attributes:
        generation: Counts the changes; a Layout has it as its own.
    """

    def __init__(self, layout: Layout) -> None:
        self.generation = layout.generation
        self._layout: Layout | None = layout
        self._vm = layout.vm
        self._slots = {slot.first: slot for slot in layout.slots}  # and so by ascending id, for ever
        self._creation = dict.fromkeys(layout.creation)
        self._pending = set(layout.pending_slots)

    def __getitem__(self, first: int) -> Slot:
        return self._slots[first]

    @property
    def layout(self) -> Layout:
        """All slots as they are now."""
        if self._layout is None:
            self._layout = Layout(
                vm=self._vm,
                slots=tuple(self._slots.values()),
                creation=tuple(self._creation),
                pending_slots=frozenset(self._pending),
                generation=self.generation,
            )
        return self._layout

    def put(self, slot: Slot) -> None:
        """Put *slot* in the place of the one with its first id; the newest, if it is newly filled."""
        if slot.qom_path != self._slots[slot.first].qom_path:
            self._creation.pop(slot.first, None)
        if slot.present:
            self._creation.setdefault(slot.first)
        else:
            self._pending.discard(slot.first)
        self._slots[slot.first] = slot
        self._changed()

    def mark(self, first: int, *, pending: bool) -> None:
        """Note whether a removal of the slot of vCPU *first* is accepted and unanswered."""
        if pending is not (first in self._pending):
            self._pending ^= {first}
            self._changed()

    def reorder(self, creation: Iterable[int]) -> None:
        """Take the order in which QEMU says that it created the CPUs that are there."""
        self._creation = dict.fromkeys(creation)
        self._layout = None

    def _changed(self) -> None:
        self.generation += 1
        self._layout = None


class VmState:
    """The slots of one VM, the removals under way, and what is new about both.

    It decides nothing about what is to be sent; see ``Engine``. After each call the owner takes the news:
    ``take_events``, ``take_changed_removals``, ``take_touched``, ``wanted_read``.

    Args:
        layout: The first read.
        status: What the VM was doing then.
        single_threaded: Whether one host thread runs all vCPUs; None where it could not be told.
        answers: The guest's last answer per cpu-index (``query-acpi-ospm-status``), if QEMU has it.
        now: The caller's clock, in seconds.
        epoch: When that clock was at 0, in seconds since 1970.
        has_agent: True if the guest's agent may be asked.
        placement: Where QEMU's threads are to run on its host, or None.
        everywhere: True has vCPU threads for which nothing is said run on all host CPUs, once anything is said.

    Attributes:
        slots: All slots, by the first vCPU id of each.
        places: Where QEMU's threads are to run, and what is known of that.
        removals: Those that are not final, by the first vCPU id of their slot.
        wanted_read: Which read is wanted.
        guest_os: The system in the guest, while that is known.
        single_threaded: As given, until a read tells.
        exported: True while the VM is exported: nothing may be sent that changes a slot.
        maybe_queued_twice: First vCPU ids of the slots in which a second removal may be queued.
        has_agent: As given.
        guest_sees: Whether the guest has the CPUs of each slot online, by the slot's first vCPU id, as its agent told
            last; a slot that the guest does not list, or lists in part, is not in it. None: the agent told nothing.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        status: VmStatus,
        single_threaded: bool | None,
        answers: Mapping[int, OstAnswer],
        now: float,
        epoch: float = 0.0,
        has_agent: bool = False,
        placement: "Placement | None" = None,
        everywhere: bool = False,
    ) -> None:
        self.slots = SlotTable(layout)
        self.places = Places(placement, everywhere=everywhere)
        self.has_agent = has_agent
        self.guest_sees: dict[int, bool] | None = None
        self._epoch = epoch
        self._rungs: dict[int, dict[Proof, float]] = {}  # of the CPU in each slot: when each was first known
        self.removals: dict[int, Removal] = {}
        self.wanted_read = Read.NONE
        self._events: list[Event] = []
        self._changed_removals: dict[Removal, None] = {}
        self._touched: set[int] = set()
        self._tick = 0
        self._reset_at = 0
        self._changed: dict[int, int] = {}
        self._by_path = {slot.qom_path: slot.first for slot in layout.slots if slot.qom_path is not None}
        self._late: dict[str, None] = {}  # of CPUs that a read has found gone: their DEVICE_DELETED may still come
        self._status: VmStatus | None = status
        self._arrived = status.arrived
        self._heard = _has_answered(answers)
        self.guest_os: GuestOs | None = None
        self.single_threaded = single_threaded
        self.exported = False
        self.maybe_queued_twice: set[int] = set()
        self._other_paths = layout.vm.other_paths  # that a vCPU cannot have: some other device has them
        self._plugging: dict[int, str] = {}  # the QOM path that each is to have
        self._unsure: dict[int, str] = {}  # plugs of ours that QEMU may or may not have carried out
        self._early_answers: dict[int, OstAnswer] = {}
        self._left_at: dict[int, float] = {}  # when a CPU was last known to leave each slot
        self._told: set[int] = set()  # slots whose CPU was heard to be deleted, which a read has yet to show
        self._doubted: set[int] = set()  # plugs in flight during which their path was heard to be deleted
        self._by_index = {slot.cpu_index: slot.first for slot in layout.slots}
        self._answers = dict(answers)  # the last one of each slot, as heard or read
        self._meet(answers, now)

    def _meet(self, answers: Mapping[int, OstAnswer], now: float) -> None:
        """Take in what this QEMU has seen before we came."""
        # A slot that is empty now and has ever been answered for was filled before: QEMU keeps the answers.
        left = [
            slot
            for slot in self.layout.slots
            if not slot.present and answers.get(slot.cpu_index, OstAnswer(0, 0)).source
        ]
        for slot in left:  # its DEVICE_DELETED may still come
            self._late[slot.new_qom_path] = None
        self._created = len(self.layout.enabled) + sum(slot.count for slot in left)
        self._unplug_seen = bool(left)
        self._adopt_answered(answers, now)

    def _adopt_answered(self, answers: Mapping[int, OstAnswer], now: float) -> None:
        """Find the removals that the guest works on, or has refused, by its last answer for each slot."""
        for slot in self.layout.slots:
            answer = answers.get(slot.cpu_index)
            if answer is None or not (slot.present and answer.is_ejection):
                continue
            removal = self.removals.get(slot.first)
            if answer.status is OstStatus.IN_PROGRESS and (removal is None or removal.state is not State.WORKING):
                (removal or self._adopt(slot, Origin.UNKNOWN, now)).advance(Evidence.IN_PROGRESS, now)
                self.slots.mark(slot.first, pending=True)
            elif answer.status is OstStatus.SUCCESS and removal is not None:
                self._claim(removal)
            elif answer.status is OstStatus.FAILURE and removal is not None:
                # If the guest had not started, this may be an old refusal: then it may be asked for again.
                if removal.state is State.WORKING or answer != self._answers.get(slot.cpu_index, answer):
                    self._refuse(slot.first, answer.code, answer.reason, now)
                else:
                    removal.may_ask_again = True
        self._answers = dict(answers)

    def known_from_record(self, pending: Collection[int], answers: Mapping[int, OstAnswer], now: float) -> None:
        """Take in the removals that the record knows and QEMU does not tell: no guest has reacted to them yet.

        Args:
            pending: vCPU ids whose removal was pending when the record was written, by this very QEMU.
            answers: The guest's last answers; one that it has refused since is over.
            now: The caller's clock.
        """
        for slot in self.layout.slots:
            answer = answers.get(slot.cpu_index)
            refused = answer is not None and answer.is_ejection and answer.status is OstStatus.FAILURE
            if slot.first in pending and slot.present and slot.first not in self.removals and not refused:
                removal = self._adopt(slot, Origin.US, now)
                removal.advance(Evidence.ACCEPTED, now)
                removal.may_ask_again = removal.overdue = True
                self.slots.mark(slot.first, pending=True)

    def arrived(self, pending: Collection[int], answers: Mapping[int, OstAnswer], now: float) -> None:
        """Take in that a VM has migrated into this QEMU, with the removals that QEMU and guest brought along.

        Args:
            pending: vCPU ids whose removal was pending on the source: an answer to them is a late one.
            answers: The guest's last answers, which came along too.
            now: The caller's clock.
        """
        self._adopt_answered(answers, now)
        self.known_from_record(pending, answers, now)
        for first, removal in self.removals.items():
            if first in pending:
                removal.origin, removal.overdue = Origin.US, True

    @property
    def status(self) -> VmStatus | None:
        """What the VM does; None: QEMU said that it changed, not to what."""
        return self._status

    @status.setter
    def status(self, status: VmStatus | None) -> None:
        self._status = status
        self._arrived = self._arrived or (status is not None and status.arrived)

    @property
    def runs(self) -> bool:
        """True unless the VM is known to be paused, or may be."""
        return self.status is not None and self.status.run_state == "running"

    @property
    def situation(self) -> Situation:
        """What decides whether a step may be sent."""
        return Situation(
            layout=self.layout,
            status=self.status or VmStatus("unknown"),
            created=self._created + sum(self.slots[first].count for first in self._plugging),
            unplug_seen=self._unplug_seen,
            single_threaded=self.single_threaded,
            in_flight=frozenset(self._plugging),
            exported=self.exported,
            unheard=not self._heard and self.layout.vm.acknowledges,
            arrived=self._arrived,
            guest_os=self.guest_os,
            has_agent=self.has_agent,
            guest_sees=self.guest_sees,
            placement=self.places.placement,
            host=self.places.host,
        )

    # Our own commands.

    def plug_sent(self, first: int) -> str:
        """Note that a plug of the slot of vCPU *first* is about to be sent; return the QOM path to plug it at."""
        path = self.slots[first].free_path(self._by_path, self._other_paths)
        self._plugging[first] = path
        return path

    def plug_accepted(self, first: int, now: float) -> None:
        """Take QEMU's acceptance of our ``device_add`` (or a read that shows it); idempotent."""
        if first not in self._plugging:
            return
        path = self._plugging.pop(first)
        self.places.birth_ends(first)
        self._fill(self.slots[first].filled(path, self._epoch + now), Origin.US, now)
        answer = self._early_answers.pop(first, None)
        if answer is not None:
            self._receive_insertion(self.slots[first], answer, now)
        if first in self._doubted:
            self._doubted.discard(first)
            self._want(Read.SLOTS)

    def id_may_be_held(self, first: int, now: float) -> bool:
        """Return True if the CPU of an empty slot has left so lately that QEMU may still hold its id.

        QEMU shows the slot empty before it frees the id (measured on QEMU 7.2.22, 10.0.2 and 11.1.3).
        """
        return not self.slots[first].present and now - self._left_at.get(first, -_HELD_S) < _HELD_S

    def interrupted(self, slots: Collection[int], now: float) -> None:
        """Note that a change of these slots, by first vCPU id, was cut short: CPUs may just have left them."""
        self._left_at.update(
            (slot.first, now) for slot in self.layout.slots if not slot.present and slot.first in slots
        )

    def others_read(self, paths: frozenset[str]) -> None:
        """Take in which QOM paths other devices have now that a vCPU could want."""
        self._other_paths = paths

    def is_taken(self, path: str) -> bool:
        """Return True if some other device is known to have the QOM path *path*."""
        return path in self._by_path or path in self._other_paths

    def disconnected(self, why: str) -> None:
        """Note that the connection is lost."""
        self._tell(Disconnected, Origin.UNKNOWN, why=why)

    def tell_instance_changed(self) -> None:
        """Note that it is another QEMU than was known that runs the VM."""
        self._tell(InstanceChanged, Origin.UNKNOWN)

    def plug_lost(self, first: int) -> None:
        """Note that nobody knows whether QEMU carried our ``device_add`` out: the next read tells; idempotent."""
        if first in self._plugging:
            self._unsure[first] = self._plugging[first]
        self.plug_failed(first)

    def plug_failed(self, first: int) -> None:
        """Take QEMU's rejection of our ``device_add``; idempotent."""
        self._plugging.pop(first, None)
        self.places.birth_ends(first)
        self._early_answers.pop(first, None)
        self._doubted.discard(first)

    def unplug_sent(self, first: int, now: float) -> Removal:
        """Note that ``device_del`` for the slot of vCPU *first* is about to be sent."""
        again = self.removals.get(first)
        if again is None or again.is_joined:
            return self._adopt(self.slots[first], Origin.US, now)
        self.maybe_queued_twice.add(first)  # should the guest take the first request up right now
        again.may_ask_again = False
        again.overdue = False  # the first request is still waiting for the same answer
        return again

    def unplug_replied(
        self, removal: Removal, evidence: Evidence, now: float, *, rejection: Rejected | None = None
    ) -> None:
        """Take the reply to our ``device_del``: ACCEPTED, REJECTION (with QEMU's *rejection*) or LOST."""
        self._advance(removal, evidence, now)
        if removal.state is State.REJECTED:  # else it is the request of somebody else that goes on
            removal.rejection = rejection
        if removal.state is State.REQUESTED and evidence is not Evidence.ACCEPTED:
            removal.may_ask_again = True

    def deadline_passed(self, removal: Removal) -> None:
        """Note that somebody stopped waiting for *removal*: its answer will be a late one."""
        if not removal.state.is_final and not removal.overdue:
            removal.overdue = True
            working = removal.state is State.WORKING
            self._tell(UnplugPending, removal.origin, ids=removal.ids, acknowledged=working)

    # What QEMU and the guest say.

    def receive(self, event: qapi.QemuEvent, now: float) -> None:
        """Take one event of QEMU's in."""
        match event:
            case qapi.OstEvent():
                self._receive_ost(event, now)
            case qapi.Deleted():
                self._receive_deleted(event.path, now)
            case qapi.GuestError():
                first = self._by_path.get(event.path)
                if first is not None:
                    self._refuse(first, None, "the guest rejected the request", now)
            case qapi.RunEvent.RESET:
                for removal in self.removals.values():
                    removal.advance(Evidence.RESET, now)
                self._heard, self.guest_os = False, None  # it starts anew
                self._start_anew(now)
                self._tell(VmReset, Origin.UNKNOWN)
            case qapi.RunEvent.STOP:
                self.status = None  # paused, or migrated away: QEMU does not say which
                self._tell(VmStopped, Origin.UNKNOWN)
            case qapi.RunEvent.RESUME:
                self.status = VmStatus("running", self.status.migration if self.status else "none")
                self._tell(VmResumed, Origin.UNKNOWN)
            case qapi.MigrationStatus():
                self.status = None
                self._tell(MigrationChanged, Origin.UNKNOWN, status=event.status)

    def _receive_ost(self, event: qapi.OstEvent, now: float) -> None:
        first = self._by_path.get(event.path or "", self._by_index.get(event.cpu_index))
        if first is None:
            self._want(Read.FULL)
            return
        self._answers[event.cpu_index] = event.answer
        self._heard = True
        slot = self.slots[first]
        if event.answer.is_insertion:
            self._receive_insertion(slot, event.answer, now)
        elif event.answer.is_ejection and slot.present:
            self._receive_ejection(slot, event.answer, now)
        elif event.answer.status is OstStatus.IN_PROGRESS:
            # The guest ejects what we do not see there: a second removal, or a CPU that somebody plugged.
            self.maybe_queued_twice.add(first)
            self._want(Read.NONE if first in self._plugging else Read.FULL)

    def _receive_insertion(self, slot: Slot, answer: OstAnswer, now: float) -> None:
        if slot.first in self._plugging:
            self._early_answers[slot.first] = answer
        elif not slot.present:
            self._want(Read.FULL)  # somebody else's plug: only a read tells its path
        elif answer.status is OstStatus.SUCCESS:
            self._prove(slot.answered(answer), Proof.ACKNOWLEDGED, now)
        else:
            self._replace(slot.answered(answer))

    def _receive_ejection(self, slot: Slot, answer: OstAnswer, now: float) -> None:
        if answer.status is OstStatus.SUCCESS:
            if slot.first in self.removals:
                self._claim(self.removals[slot.first])
            self._want(Read.SLOTS)
        elif answer.status is OstStatus.FAILURE:
            self._refuse(slot.first, answer.code, answer.reason, now)
        else:
            removal = self.removals.get(slot.first)
            if removal is None:
                removal = self._adopt(slot, Origin.OTHER, now)
            elif removal.state is State.WORKING:
                self.maybe_queued_twice.add(slot.first)
            self._advance(removal, Evidence.IN_PROGRESS, now)

    def _receive_deleted(self, path: str, now: float) -> None:
        first = self._by_path.get(path)
        spent = self._spend(path)
        if first is None:
            # Most likely the last CPU in that slot. Only a read that is sent after our plug's reply can tell.
            self._doubted.update(each for each, new in self._plugging.items() if new == path)
        elif first in self.removals and not spent:
            self._empty(first, Origin.OTHER, now)
        else:
            if not spent:
                self._told.add(first)
            self._want(Read.SLOTS)

    # Reads.

    def read_sent(self, read: Read) -> int:
        """Note that a read is about to be sent; hand the number back with what it shows."""
        if self.wanted_read <= read:
            self.wanted_read = Read.NONE
        return self._tick

    def observed(self, sent: int, slots: Sequence[Slot], threads: Sequence[ThreadReading] | None, now: float) -> None:
        """Take a read in: only of slots that have not changed since it was sent.

        Args:
            sent: What ``read_sent`` returned.
            slots: The slots as read.
            threads: ``query-cpus-fast``, or None if it was not asked (then the slots' host_tids tell nothing).
            now: The caller's clock.

        Raises:
            MalformedReplyError: It shows other slots than the first read; nothing was taken in.
        """
        self.check_slots(slots)
        self._take(sent, slots, threads, now)

    def _take(
        self,
        sent: int,
        slots: Sequence[Slot],
        threads: Sequence[ThreadReading] | None,
        now: float,
        *,
        same_qemu: bool = True,
    ) -> None:
        unannounced = False
        for slot in slots:
            if self._changed.get(slot.first, 0) <= sent:
                unannounced |= self._observe(slot, sent, now, full=threads is not None, same_qemu=same_qemu)
        if threads is not None:
            self._take_creation(slots, threads)
        if unannounced:
            self._tell(LayoutChanged, Origin.UNKNOWN)

    def check_slots(self, slots: Sequence[Slot]) -> None:
        """Return if *slots* are those of this VM.

        Raises:
            MalformedReplyError: They are not.
        """
        if [slot.first for slot in slots] != [slot.first for slot in self.layout.slots]:
            shown = [str(slot.ids) for slot in slots]
            raise MalformedReplyError("query-hotpluggable-cpus", "its slots are not those of the first read", shown)

    def _observe(self, seen: Slot, sent: int, now: float, *, full: bool, same_qemu: bool) -> bool:
        """Take one slot of a read in; return True if it showed what no event had announced."""
        known = self.slots[seen.first]
        if seen.first in self._plugging:
            if seen.qom_path == self._plugging[seen.first]:
                self.plug_accepted(seen.first, now)
            return False
        removal = self.removals.get(seen.first)
        told = seen.first in self._told
        self._told.discard(seen.first)
        if seen.qom_path == known.qom_path and not (same_qemu and _has_other_threads(seen, known)):
            if removal is not None and removal.claimed is not None and removal.claimed <= sent:
                self._settle_claim(removal, now)
            if full and seen.host_tids != known.host_tids:
                self._replace(known.seen(seen.host_tids))
            return False
        if known.present:
            if not told:
                self._expect_late(known)
            self._empty(seen.first, Origin.UNKNOWN, now)
        if seen.qom_path is not None:
            ours_too = seen.qom_path == self._unsure.get(seen.first)
            origin = Origin.US if ours_too else Origin.OTHER
            filled = known.filled(seen.qom_path, self._epoch + now)
            self._fill(filled.seen(seen.host_tids), origin, now)
            if not full:
                self._want(Read.FULL)
        return removal is None

    def _settle_claim(self, removal: Removal, now: float) -> None:
        """Take in that the guest has said success, and that a read sent after it still shows the CPU."""
        removal.claimed = None
        if removal.state is State.WORKING:
            reason = "it answered success, and the vCPU is still there"
            self._refuse(min(removal.ids), 0, reason, now)
        elif removal.state is State.REQUESTED:  # success of an earlier removal, or of this one: either way it is idle
            removal.may_ask_again = True

    def _take_creation(self, seen: Sequence[Slot], threads: Sequence[ThreadReading]) -> None:
        self.single_threaded = runs_single_threaded(threads) if len(threads) > 1 else self.single_threaded
        known = self.layout.creation
        read = dict.fromkeys(first for first in creation_order(seen, threads) if first in known)
        order = (*read, *(first for first in known if first not in read))
        if order != known:
            self.slots.reorder(order)

    def resync(
        self,
        slots: Sequence[Slot],
        threads: Sequence[ThreadReading],
        *,
        status: VmStatus,
        answers: Mapping[int, OstAnswer],
        same_instance: bool,
        now: float,
    ) -> None:
        """Take in a reading of a VM whose events were missed for a while.

        Args:
            slots: The slots as read.
            threads: ``query-cpus-fast``.
            status: What the VM is doing.
            answers: The guest's last answer per cpu-index.
            same_instance: False if it is another QEMU that runs the VM now: what was pending is void.
            now: The caller's clock.

        Raises:
            MalformedReplyError: It shows other slots than the first read; nothing was taken in.
        """
        self.check_slots(slots)
        if not same_instance:  # the old guest's claims do not apply to the new QEMU
            for removal in self.removals.values():
                removal.claimed = None
            self.tell_instance_changed()
        self._take(self._tick, slots, threads, now, same_qemu=same_instance)
        self.status = status
        self._unsure.clear()
        if same_instance:
            self._adopt_answered(answers, now)
        else:
            for removal in list(self.removals.values()):
                self._advance(removal, Evidence.VOID, now)
            self.maybe_queued_twice.clear()
            self._late.clear()
            self.places.forget_qemu()
            self._arrived, self._heard, self.guest_os = status.arrived, _has_answered(answers), None
            self._start_anew(now)
            self._meet(answers, now)
        self._tell(Reconnected, Origin.UNKNOWN)

    # What is proven.

    def started(self, sent: int, firsts: Iterable[int], now: float) -> None:
        """Take in that the CPUs of these slots have run: not of a slot, or a boot, that is newer than the look.

        Args:
            sent: What ``read_sent`` returned.
            firsts: The first vCPU ids of the slots.
            now: The caller's clock.
        """
        if sent < self._reset_at:
            return
        for first in firsts:
            slot = self.slots[first]
            if self._changed.get(first, 0) <= sent and slot.present and Proof.STARTED not in self.proofs_of(first):
                self._prove(slot, Proof.STARTED, now)

    def guest_told(self, online: Mapping[int, bool], now: float) -> None:
        """Take in the guest's list of its CPUs, as vCPU ids; True: that one is online."""
        self.guest_sees = {}
        for slot in self.layout.slots:
            told = {online.get(each) for each in slot.ids}
            if None in told or not slot.present:
                continue
            self.guest_sees[slot.first] = told == {True}
            if told == {True}:
                if Proof.ONLINE not in self.proofs_of(slot.first):
                    self._prove(slot, Proof.ONLINE, now)
            elif slot.proof is Proof.ONLINE:
                self._rungs[slot.first].pop(Proof.ONLINE, None)
                self._take_back(slot, now)

    def placed(self, sent: int, why_not: Mapping[int, str], now: float) -> None:
        """Take in which threads are in their place: not of a slot that has changed since they were looked for.

        Args:
            sent: ``changes`` when they were.
            why_not: By the first vCPU id of each slot: why its threads are not in their place; "": they are.
            now: The caller's clock.
        """
        for first, why in why_not.items():
            slot = self.slots[first]
            if not slot.present or self._changed.get(first, 0) > sent or self.places.why_not(first) == why:
                continue
            self.places.placed(first, why)
            plugged = self.proofs_of(first).get(Proof.PRESENT)
            seconds = None if plugged is None else round(now - plugged, 6)
            self._touched.add(first)
            self._tell(VcpuPlaced, Origin.US, ids=slot.ids, why_not=why, seconds=seconds)

    def born(self, now: float) -> None:
        """Take in that the threads of the last plugs were born on the host CPUs where they are to run."""
        for first, cpus in self.places.take_born().items():
            if self.places.are_only_on(self.slots[first], cpus):
                self.placed(self.changes, {first: ""}, now)

    def found(self, places: "Mapping[int, Place]") -> None:
        """Take in where the host runs each thread, by vCPU id, QEMU's main thread as ``EMULATOR``."""
        for vcpu, wanted, found in self.places.drifts(places):
            ids = VcpuMap() if vcpu == EMULATOR else VcpuMap([vcpu])
            self._tell(PlaceDrifted, Origin.OTHER, ids=ids, wanted=wanted, found=found)

    def refused_by_agent(self, first: int, reason: str) -> None:
        """Tell that the guest's agent refused to take the CPUs of the slot of vCPU *first* offline."""
        self._tell(UnplugRefused, Origin.US, ids=self.slots[first].ids, code=None, reason=reason)

    def proofs_of(self, first: int) -> Mapping[Proof, float]:
        """When each rung was first known of the CPU in the slot of vCPU *first*, by the caller's clock."""
        return self._rungs.get(first, {})

    def _prove(self, slot: Slot, proof: Proof, now: float) -> None:
        """Take *slot* in, and that the CPU in it is on that rung."""
        known = self._rungs.setdefault(slot.first, {})
        known.setdefault(proof, now)
        if slot.proven is not None and proof <= slot.proven:
            self._replace(slot)
            return
        self._replace(slot.proving(proof, self._epoch + now))
        plugged = known.get(Proof.PRESENT)
        self._tell(
            VcpuProven,
            Origin.UNKNOWN,
            ids=slot.ids,
            proof=proof,
            seconds=None if plugged is None else round(now - plugged, 6),
        )

    def _take_back(self, slot: Slot, now: float) -> None:
        """Take in that no more is proven of the CPU in *slot* than what is left of its rungs."""
        known = self._rungs.get(slot.first, {})
        proof = max(known, default=Proof.PRESENT)
        self._replace(slot.proving(proof, self._epoch + known.get(proof, now)))

    def _start_anew(self, now: float) -> None:
        """Take in that the VM was reset, or is another one: its guest starts each CPU again."""
        self._tick += 1
        self._reset_at = self._tick
        self.guest_sees = None
        for slot in self.layout.slots:
            known = self._rungs.get(slot.first, {})
            self._rungs[slot.first] = {proof: at for proof, at in known.items() if proof is Proof.PRESENT}
            if slot.proof not in (None, Proof.PRESENT):
                self._take_back(slot, now)

    # How it changes.

    @property
    def layout(self) -> Layout:
        """All slots, as known now."""
        return self.slots.layout

    @property
    def changes(self) -> int:
        """How often what is known of any slot has changed: a read tells nothing of what changed after it was sent."""
        return self._tick

    @property
    def has_news(self) -> bool:
        """True if one of the three that follow has something to hand out."""
        return bool(self._events or self._changed_removals or self._touched)

    def take_events(self) -> list[Event]:
        """Return the events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def take_changed_removals(self) -> list[Removal]:
        """Return the removals whose state has changed since the last call, each once."""
        if not self._changed_removals:
            return []
        changed, self._changed_removals = self._changed_removals, {}
        return list(changed)

    def take_touched(self) -> set[int]:
        """Return the first vCPU ids of the slots that have changed since the last call, or were answered for."""
        touched, self._touched = self._touched, set()
        return touched

    def _want(self, read: Read) -> None:
        self.wanted_read = max(self.wanted_read, read)

    def _adopt(self, slot: Slot, origin: Origin, now: float) -> Removal:
        path = slot.qom_path or slot.new_qom_path
        removal = self.removals[slot.first] = Removal(slot.ids, path, origin, requested_at=now)
        return removal

    def _advance(self, removal: Removal, evidence: Evidence, now: float) -> None:
        before = removal.advance(evidence, now)
        after = removal.state
        first = min(removal.ids)
        if after is not before:
            self._changed_removals[removal] = None
        if before is State.SENT and after not in {State.SENT, State.REJECTED, State.UNKNOWN}:
            self.slots.mark(first, pending=True)
            self._tell(UnplugRequested, removal.origin, ids=removal.ids)
        if before is not State.WORKING and after is State.WORKING:
            self._tell(UnplugAcknowledged, removal.origin, ids=removal.ids)
        if after.is_final and not before.is_final:
            self.removals.pop(first, None)
            self.slots.mark(first, pending=False)

    def _refuse(self, first: int, code: int | None, reason: str, now: float) -> None:
        removal = self.removals.get(first)
        ids = self.slots[first].ids
        if removal is None:  # somebody else's, answered at once
            self._tell(UnplugRefused, Origin.OTHER, ids=ids, code=code, reason=reason)
            return
        removal.code, removal.reason = code, reason
        self._advance(removal, Evidence.FAILURE, now)
        late = removal.overdue
        self._tell(UnplugRefused, removal.origin, ids=ids, code=code, reason=reason, late=late)

    def _claim(self, removal: Removal) -> None:
        """Note that the guest has said success: a read sent from now on shows whether that is so."""
        self._tick += 1
        removal.claimed = self._tick
        self._want(Read.SLOTS)

    def _expect_late(self, slot: Slot) -> None:
        """Note that a read has found the CPU of *slot* gone, so that its DEVICE_DELETED tells nothing any more."""
        if slot.qom_path is not None:
            self._late.pop(slot.qom_path, None)
            self._late[slot.qom_path] = None
            if len(self._late) > len(self.layout.slots):  # a slot has at most one in any QEMU
                del self._late[next(iter(self._late))]

    def _spend(self, path: str) -> bool:
        """Return True if the DEVICE_DELETED of *path* may be that of a CPU that a read has found gone."""
        late = path in self._late
        self._late.pop(path, None)
        return late

    def _fill(self, slot: Slot, origin: Origin, now: float) -> None:
        self._created += slot.count
        self._rungs[slot.first] = {Proof.PRESENT: now}
        self.places.forget(slot.first)
        self._replace(slot)
        self._tell(VcpuPlugged, origin, ids=slot.ids)

    def _empty(self, first: int, origin: Origin, now: float) -> None:
        slot = self.slots[first]
        removal = self.removals.get(first)
        if removal is not None:
            self._advance(removal, Evidence.GONE, now)
            origin = removal.origin
        self._unplug_seen = True
        self._left_at[first] = now
        self._rungs.pop(first, None)
        self.places.forget(first)
        if self.guest_sees:
            self.guest_sees.pop(first, None)
        self._replace(slot.emptied())
        self._tell(
            VcpuUnplugged,
            origin,
            ids=slot.ids,
            late=removal is not None and removal.overdue,
            requested_at=removal.requested_at if removal and origin is Origin.US else None,
        )

    def _replace(self, slot: Slot) -> None:
        before = self.slots[slot.first].qom_path
        if before is not None:
            self._by_path.pop(before, None)
        if slot.qom_path is not None:
            self._by_path[slot.qom_path] = slot.first
        if slot.qom_path != before:  # other changes do not invalidate a read in flight
            self._tick += 1
            self._changed[slot.first] = self._tick
        self._touched.add(slot.first)
        self.slots.put(slot)

    def _tell(self, kind: type[Event], origin: Origin, **details: object) -> None:
        self._events.append(kind(generation=self.slots.generation, origin=origin, **details))


def _has_answered(answers: Mapping[int, OstAnswer]) -> bool:
    """Return True if the guest has ever answered for a slot: QEMU tells source 0 of those that it has not."""
    return any(answer.source for answer in answers.values())


def _has_other_threads(seen: Slot, known: Slot) -> bool:
    """Return True if the CPU *seen* runs in other host threads than the one *known* there: it is another CPU."""
    told = seen.host_tids and known.host_tids and None not in (*seen.host_tids, *known.host_tids)
    return bool(told) and seen.host_tids != known.host_tids
