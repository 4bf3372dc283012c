"""What is held to be so of one VM, and how it changes: each change is told, and nothing here decides on it."""

import enum

from qmpvcpu.engine.removal import Evidence, Removal, State
from qmpvcpu.engine.slots import SlotTable
from qmpvcpu.events import (
    Event,
    Origin,
    UnplugAcknowledged,
    UnplugRefused,
    UnplugRequested,
    VcpuPlugged,
    VcpuUnplugged,
)
from qmpvcpu.model.layout import Layout, Slot


class Read(enum.IntEnum):
    """Which read the engine wants next."""

    NONE = 0
    SLOTS = 1  # query-hotpluggable-cpus: is the CPU there
    FULL = 2  # query-cpus-fast too: whose it is, in which order, on which thread


class Ledger:
    """The slots of a VM, their removals, and the news of both.

    Attributes:
        slots: All slots, by the first vCPU id of each.
        removals: Those that are not final, by the first vCPU id of their slot.
        wanted: Which read is wanted.
    """

    def __init__(self, layout: Layout) -> None:
        self.slots = SlotTable(layout)
        self.removals: dict[int, Removal] = {}
        self.wanted = Read.NONE
        self._events: list[Event] = []
        self._settled: list[Removal] = []
        self._tick = 0
        self._changed: dict[int, int] = {}
        self._by_path = {slot.qom_path: slot.first for slot in layout.slots if slot.qom_path is not None}
        self._late: dict[str, None] = {}  # of CPUs that a read has found gone: their DEVICE_DELETED may still come
        self._created = len(layout.enabled)
        self._unplug_seen = False

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
        """True while ``take_events`` or ``take_settled`` would return something."""
        return bool(self._events or self._settled)

    def take_events(self) -> list[Event]:
        """Return the events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def take_settled(self) -> list[Removal]:
        """Return the removals that became final since the last call."""
        settled, self._settled = self._settled, []
        return settled

    def _want(self, read: Read) -> None:
        self.wanted = max(self.wanted, read)

    def _adopt(self, slot: Slot, origin: Origin, now: float) -> Removal:
        path = slot.qom_path or slot.new_qom_path
        removal = self.removals[slot.first] = Removal(slot.ids, path, origin, requested_at=now)
        return removal

    def _advance(self, removal: Removal, evidence: Evidence, now: float) -> None:
        before = removal.advance(evidence, now)
        after = removal.state
        first = min(removal.ids)
        if before is State.SENT and after not in {State.SENT, State.REJECTED, State.UNKNOWN}:
            self.slots.mark(first, pending=True)
            self._tell(UnplugRequested, removal.origin, ids=removal.ids)
        if before is not State.WORKING and after is State.WORKING:
            self._tell(UnplugAcknowledged, removal.origin, ids=removal.ids)
        if after.is_final and not before.is_final:
            self.removals.pop(first, None)
            self._settled.append(removal)
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

    def _fill(self, slot: Slot, origin: Origin) -> None:
        self._created += slot.count
        self._replace(slot)
        self._tell(VcpuPlugged, origin, ids=slot.ids)

    def _empty(self, first: int, origin: Origin, now: float) -> None:
        slot = self.slots[first]
        removal = self.removals.get(first)
        if removal is not None:
            self._advance(removal, Evidence.GONE, now)
            origin = removal.origin
        self._unplug_seen = True
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
        if slot.qom_path != before:  # of anything else a read under way tells what is so
            self._tick += 1
            self._changed[slot.first] = self._tick
        self.slots.put(slot)

    def _tell(self, kind: type[Event], origin: Origin, **details: object) -> None:
        self._events.append(kind(generation=self.slots.generation, origin=origin, **details))
