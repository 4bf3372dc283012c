"""A naive QEMU with a guest: what is so, what has been, and who brought it about."""

import enum
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from qmpvcpu import qapi
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.qapi import ThreadReading

__all__ = ["BOOT", "OTHER", "SLOTS", "US", "Deletions", "ModelQemu", "Reply"]

SLOTS = 4  # few, so that much happens to each
BOOT = "/machine/unattached/device[0]"
US, OTHER = "us", "other"


class Deletions(enum.Enum):
    """When a CPU's own DEVICE_DELETED comes."""

    AT_ONCE_OR_LATE = "KVM: at once, or after reads have shown the slot empty, and its id may be taken until then"
    NEVER = "TCG before 11.1"
    WITH_THE_NEXT_PLUG = "TCG of 11.1: before the reply to the next device_add of any CPU, or at the next reset"


@dataclass(frozen=True)
class Reply:
    """The reply to a command, on the wire: what is to be done when it is taken in, and when it is lost."""

    take_in: Any
    lost: Any


@dataclass
class ModelQemu:
    """What is so, and what has been since the start, slot by slot.

    ``requested`` has the slots with a removal that no guest has taken up, ``working`` those with one that it has; a
    second ``device_del`` puts a slot into both. In ``lied`` are those with one that came to nothing, unrefused.
    ``askers`` tells who asked, ``by`` who made the slot what it is; ``contested`` are those of which another client
    ever asked for the CPU that is, or was last, there.

    ``ran`` has the CPUs that have run guest code, ``online`` what the guest lists, and ``was_online`` what it
    has ever listed as online; each CPU as its vCPU and its place in the slot's history.

    While QEMU is ``late`` it owes what it would say of an ejection: the CPU's DEVICE_DELETED (with ``holds`` the id
    is taken until then) and the guest's last word. ``claimed`` are the slots of which the guest said so falsely.
    """

    deletions: Deletions
    late: bool = False
    holds: bool = False
    owed: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    unsaid: list[int] = field(default_factory=list)
    claimed: set[int] = field(default_factory=set)
    listened: bool = True
    paths: list[str | None] = field(
        default_factory=lambda: [BOOT, "/machine/unattached/device[2]", None, "/machine/peripheral/vcpu3"]
    )
    created: list[str] = field(init=False)
    requested: set[int] = field(default_factory=set)
    working: set[int] = field(default_factory=set)
    lied: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    askers: list[set[str]] = field(default_factory=lambda: [set() for _ in range(SLOTS)])
    contested: set[int] = field(default_factory=set)
    by: list[str] = field(default_factory=lambda: ["" for _ in range(SLOTS)])
    answers: dict[int, OstAnswer] = field(default_factory=dict)
    history: list[list[str | None]] = field(init=False)
    tids: dict[str, int] = field(default_factory=dict)  # of those that are there; none is ever used again
    wire: deque[Any] = field(default_factory=deque)
    ran: set[tuple[int, int]] = field(default_factory=set)
    online: dict[tuple[int, int], bool] = field(default_factory=dict)
    was_online: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.created = [path for path in self.paths if path is not None]
        self.history = [[path] for path in self.paths]
        self._next_tid = itertools.count(100)
        self.tids = {path: next(self._next_tid) for path in self.created}
        self._boot()

    @property
    def removals(self) -> set[int]:
        """The slots in which something is to go, and is there."""
        return {vcpu for vcpu in self.requested | self.working if self.paths[vcpu] is not None}

    # Commands.

    def add(self, vcpu: int, path: str, who: str) -> bool:
        if self.paths[vcpu] is not None or path in self.held:
            return False
        self._put(vcpu, path, who)
        # A guest that lets one go without a last word, and takes the next without one, is beyond telling.
        self.answers.pop(vcpu, None)
        if who == US:  # after it is there, and before it is replied to; of another client's we may be told any time
            self._pay()
        return True

    def _pay(self) -> None:
        """Send the DEVICE_DELETED that are owed."""
        for path in self.owed:
            self.emit(qapi.Deleted(path))
        self.owed.clear()
        self.held.clear()

    def catch_up(self) -> None:
        """Say all that is owed."""
        self._pay()
        for vcpu in self.unsaid:
            self.ost(vcpu, 0)
        self.unsaid.clear()

    def remove(self, path: str, who: str) -> bool:
        if path not in self.paths:
            return False
        vcpu = self.paths.index(path)
        self.requested.add(vcpu)
        self.askers[vcpu].add(who)
        if who == OTHER:
            self.contested.add(vcpu)
        return True

    def read(self) -> tuple[tuple[Slot, ...], tuple[ThreadReading, ...]]:
        tids = self.tids
        slots = tuple(
            Slot(v, 1, "t", CpuProps({"core-id": v}), v, path, (tids[path],) if path else ())
            for v, path in enumerate(self.paths)
        )
        threads = tuple(ThreadReading(path, tids[path], 0, CpuProps({})) for path in self.created)
        return slots, threads

    # The guest.

    def acknowledge(self, vcpu: int, status: int = 0) -> None:
        """Answer the plug of the CPU that is there, before anything is said of its removal."""
        if self.paths[vcpu] is not None and (vcpu not in self.answers or self.answers[vcpu].is_insertion):
            self.ost(vcpu, status, source=1)

    def cpu(self, vcpu: int) -> tuple[int, int]:
        """Return which CPU is in the slot, or was not yet."""
        return vcpu, len(self.history[vcpu]) - 1

    def _boot(self) -> None:
        self.online.clear()
        for vcpu, path in enumerate(self.paths):
            if path is not None:
                self.set_online(vcpu, online=True)

    def run(self, vcpu: int) -> None:
        """Have the guest start the CPU that is there."""
        if self.paths[vcpu] is not None:
            self.ran.add(self.cpu(vcpu))

    def set_online(self, vcpu: int, *, online: bool) -> None:
        """Have the guest list the CPU that is there, and use it or not."""
        if self.paths[vcpu] is not None:
            self.online[self.cpu(vcpu)] = online
            if online:
                self.run(vcpu)
                self.was_online.add(self.cpu(vcpu))

    def listed(self) -> dict[int, bool]:
        """Return the guest's list."""
        return {vcpu: online for (vcpu, _), online in self.online.items()}

    def take_up(self, vcpu: int) -> None:
        if vcpu in self.requested:
            if vcpu in self.unsaid:  # a guest does one thing after the other
                self.unsaid.remove(vcpu)
                self.ost(vcpu, 0)
            self.requested.discard(vcpu)
            self.working.add(vcpu)
            self.ost(vcpu, 0x84)

    def decide(self, vcpu: int, answer: str) -> None:
        self.take_up(vcpu)
        if vcpu not in self.working:
            return
        self.working.discard(vcpu)
        if answer == "refuse":
            self.refused.add(vcpu)
            self._settle_askers(vcpu)
            self.ost(vcpu, 0x82)
        elif answer == "lie":
            self.lied.add(vcpu)
            self.claimed.add(vcpu)
            self.ost(vcpu, 0)
        else:
            self.eject(vcpu, silent=answer == "eject without a word")

    def eject(self, vcpu: int, *, silent: bool = False) -> None:
        path = self.paths[vcpu]
        self.lied.discard(vcpu)
        if path is not None:
            self._put(vcpu, None, US if US in self.askers[vcpu] else OTHER)
            self.emit(qapi.Deleted(f"{path}/lapic"))
            if self.deletions is Deletions.WITH_THE_NEXT_PLUG:
                self.owed.append(path)
            elif self.deletions is Deletions.AT_ONCE_OR_LATE and self.late:
                self.owed.append(path)
                if self.holds:
                    self.held.add(path)
            elif self.deletions is Deletions.AT_ONCE_OR_LATE:
                self.emit(qapi.Deleted(path))
        self._settle_askers(vcpu)
        if not silent and self.late and vcpu not in self.unsaid:
            self.unsaid.append(vcpu)
        elif not silent:
            self.ost(vcpu, 0)

    def reset(self, *, forgotten: bool) -> None:
        """Start over: what the guest was at is for the next one to do, or is known to nobody."""
        left = {vcpu for vcpu in self.working if self.paths[vcpu] is not None}
        if forgotten:
            self.lied |= left
        else:
            self.requested |= left
        self.working.clear()
        self.unsaid.clear()
        self.emit(qapi.RunEvent.RESET)
        self._boot()
        self._pay()

    # The wire.

    def ost(self, vcpu: int, code: int, source: int = 3) -> None:
        self.answers[vcpu] = OstAnswer(source, code)
        self.emit(qapi.OstEvent(vcpu, self.answers[vcpu]))

    def emit(self, message: object) -> None:
        if self.listened:
            self.wire.append(message)

    def _put(self, vcpu: int, path: str | None, who: str) -> None:
        old = self.paths[vcpu]
        if old is not None:
            self.created.remove(old)
        if path is not None:
            self.created.append(path)
            self.tids[path] = next(self._next_tid)
            self.contested.discard(vcpu)
        self.online.pop(self.cpu(vcpu), None)
        self.paths[vcpu] = path
        self.by[vcpu] = who
        self.history[vcpu].append(path)

    def _settle_askers(self, vcpu: int) -> None:
        if vcpu not in self.requested:
            self.askers[vcpu].clear()
