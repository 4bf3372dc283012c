"""What the driver does with QEMU's threads on this host, without waiting or using QMP."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from qmpvcpu.engine.places import EMULATOR
from qmpvcpu.engine.vmstate import VmState
from qmpvcpu.errors import HostError, ThreadGoneError, printable
from qmpvcpu.host.birthplace import Birthplace, Snapshot, put_right, undisturbed
from qmpvcpu.host.cgroups import read_cpuset
from qmpvcpu.host.coresched import share_core
from qmpvcpu.host.facts import numa_node, read_facts
from qmpvcpu.host.threads import HostThread, all_of, find, find_main, put, read_place, read_usage
from qmpvcpu.model.layout import Slot
from qmpvcpu.model.placement import CoreScheduling, HostFacts, Place, Placement, QemuThread, ThreadKind
from qmpvcpu.model.transition import Action, Intent
from qmpvcpu.model.vcpumap import VcpuMap, union
from qmpvcpu.qapi import ThreadReading, runs_single_threaded, threads_of

if TYPE_CHECKING:
    from qmpvcpu.qmp.monitor import Monitor

_log = logging.getLogger("qmpvcpu.vm")

# A change is checked against what the host allowed at most so long before.
_FRESH_S = 1.0

_GONE = "its thread has ended"
_SHARED = "one host thread runs all vCPUs (TCG with thread=single), so none has a place of its own"


class Placer:
    """The threads of one QEMU on this host.

    Args:
        state: What is known of the VM.
        monitor: Returns the session with QEMU: while it lives, so does the process that was found to be QEMU.
    """

    def __init__(self, state: VmState, monitor: "Callable[[], Monitor]") -> None:
        self.birthplace = Birthplace(self.main_thread, self._main_may_spread)
        self._state = state
        self._monitor = monitor
        self._main: tuple[Monitor, HostThread] | None = None
        self._facts: tuple[Monitor, float, HostFacts] | None = None
        self._home: tuple[HostThread, VcpuMap] | None = None  # of the main thread, as seen last

    def _main_may_spread(self) -> VcpuMap:
        return may_spread((self._state.places.placement or Placement()).of_emulator(), self.facts())

    def main_thread(self, slots: Sequence[Slot] | None = None) -> HostThread:
        """Return QEMU's main thread.

        Args:
            slots: As they were read, where the state does not know them yet.

        Raises:
            HostError: It cannot be found.
        """
        if self._state.single_threaded and slots is None:
            raise HostError(_SHARED)
        monitor = self._monitor()
        if self._main is None or self._main[0] is not monitor or monitor.lost is not None:
            self._main = None
            self._main = monitor, self._find_main_thread(monitor, slots or self._state.layout.slots)
        return self._main[1]

    @staticmethod
    def _find_main_thread(monitor: "Monitor", slots: Sequence[Slot]) -> HostThread:
        # That of vCPU 0 alone may be a thread of another program too, which passes the socket on; of the others those
        # that were there at boot hardly ever leave.
        tids = [tid for _, tid in _tids([slot for slot in slots if slot.is_boot])]
        found = monitor.find_qemu(tids)
        thread = None if found.pid is None else find_main(found.pid)
        if thread is None:
            raise HostError(found.why or f"QEMU, process {found.pid}, has ended")
        return thread

    def facts(
        self, placement: Placement | None = None, *, anew: bool = False, slots: Sequence[Slot] | None = None
    ) -> HostFacts:
        """Return what the host allows now.

        Args:
            placement: Tells what is to be looked at.
            anew: False may give what was found in the last second, but for where the main thread is.
            slots: As for ``main_thread``.
        """
        try:
            main = self.main_thread(slots)
        except HostError as error:
            return HostFacts(unreachable=str(error))
        monitor, now = self._monitor(), time.monotonic()
        groups = placement is not None and placement.groups
        if anew or groups or self._facts is None or self._facts[0] is not monitor or now > self._facts[1] + _FRESH_S:
            self._facts = monitor, now, read_facts(main.tid, core_scheduling=groups)
        return replace(self._facts[2], main_cpus=self._home_of(main))

    def _home_of(self, main: HostThread) -> VcpuMap:
        """Return where the main thread belongs; no host CPUs if another program has had it elsewhere so far."""
        if self.birthplace.home is not None:
            return self.birthplace.home
        found = self._place_of_main(main)
        if found is not None and found.cpus is not None:
            self._home = main, found.cpus
        return self._home[1] if self._home is not None and self._home[0] == main else VcpuMap()

    def _place_of_main(self, main: HostThread) -> Place | None:
        """Return where the main thread runs; None if that is where a vCPU is being born, or if it is gone."""
        with self._undisturbed(main) as is_home:
            return read_place(main) if is_home else None

    def _undisturbed(self, main: HostThread) -> contextlib.AbstractContextManager[bool]:
        """Return a context in which the main thread is where it belongs, if it yields True."""
        return contextlib.nullcontext(enter_result=False) if self.birthplace.home is not None else undisturbed(main)

    def threads(self, tids: Sequence[int]) -> Mapping[int, HostThread]:
        """Return the threads that QEMU calls *tids*, by these numbers; without those that are gone.

        Raises:
            HostError: QEMU cannot be found.
        """
        return find(self.main_thread().tid, tids)

    def vcpus(self, readings: Sequence[ThreadReading]) -> dict[int, HostThread]:
        """Return the thread of each vCPU that is plugged, by its id; without those that are gone.

        Args:
            readings: ``query-cpus-fast``.

        Raises:
            HostError: QEMU cannot be found.
        """
        threads = self.threads([reading.host_tid for reading in readings])
        return {vcpu: threads[tid] for vcpu, tid in self._tids_in(readings) if tid in threads}

    def told_of(self, readings: Sequence[ThreadReading]) -> VcpuMap:
        """Return the plugged vCPUs that ``query-cpus-fast`` lists."""
        return VcpuMap(vcpu for vcpu, _ in self._tids_in(readings))

    def _tids_in(self, readings: Sequence[ThreadReading]) -> Iterator[tuple[int, int]]:
        for slot in self._state.layout.slots:
            if slot.present:
                yield from zip(slot.ids, threads_of(slot, readings), strict=False)

    def place(self, slots: Sequence[Slot], readings: Sequence[ThreadReading], seen: Snapshot) -> dict[int, str]:
        """Put the threads of *slots* in their place, and other threads born with them back.

        Args:
            slots: The slots.
            readings: ``query-cpus-fast``.
            seen: The threads that there were before that was asked.

        Returns:
            By first vCPU id: why the threads are not in their place; "": they are.

        Raises:
            HostError: QEMU cannot be found.
        """
        placement = self._state.places.placement or Placement()
        facts = self.facts(placement)
        unreachable = _SHARED if runs_single_threaded(readings) else facts.unreachable
        if unreachable:
            return {slot.first: unreachable for slot in slots}
        vcpus = self.vcpus(readings)
        told = {slot.first: self._place(slot, placement, facts, vcpus) for slot in slots}
        # One for which nothing is said was plugged by somebody else if it was born there.
        settled = tuple(vcpus[vcpu] for vcpu, place in placement.of_vcpus(vcpus, facts).items() if place.cpus)
        self.birthplace.settle(settled, seen)
        return told

    def _place(self, slot: Slot, placement: Placement, facts: HostFacts, vcpus: Mapping[int, HostThread]) -> str:
        if why := placement.why_not(slot.ids, facts):
            return why
        try:
            places = placement.of_vcpus(slot.ids, facts)
            for vcpu in slot.ids if places else ():
                if vcpu not in vcpus:
                    return _GONE
                place = places.get(vcpu, Place())
                if place.cpus is None and slot.count > 1:  # born with others for which something is said
                    place = place.over(Place(facts.main_cpus or None))
                _move(Move(vcpus[vcpu], place, may_spread(placement.of_vcpu(vcpu), facts)))
            self.group(placement, vcpus, of=slot.ids)
        except HostError as error:
            return str(error)
        return ""

    def group(
        self, placement: Placement, vcpus: Mapping[int, HostThread], *, of: Collection[int] | None = None
    ) -> None:
        """Group threads for core scheduling, if *placement* asks for it.

        Args:
            placement: Says which threads share no core with others.
            vcpus: The threads of all vCPUs, by vCPU id.
            of: Only those of these vCPUs, which join the others; None: all that *placement* groups.

        Raises:
            HostError: They cannot be grouped.
        """
        if not placement.groups:
            return
        # vCPU 0 never leaves, nor does the main thread.
        everybody = placement.core_scheduling is CoreScheduling.EMULATOR
        member = self.main_thread() if everybody else vcpus.get(0)
        if member is None:
            raise HostError("the thread of vCPU 0 cannot be found")
        if of is not None:
            share_core(member, [vcpus[vcpu] for vcpu in of if vcpu in vcpus])
        else:
            share_core(member, all_of(member.tid) if everybody else list(vcpus.values()))

    def move(self, moves: Sequence["Move"], facts: HostFacts) -> None:
        """Put each thread in its place; if one cannot be moved, move those before it back.

        Threads that have ended are skipped. The main thread goes to its place once no vCPU is being born.

        Raises:
            HostError: A thread could not be moved; the message names it, and those that could not be moved back.
        """
        moved: list[Move] = []
        try:
            for move in moves:
                with contextlib.suppress(ThreadGoneError):
                    before = self._move(move)
                    moved += [] if before is None else [Move(move.thread, before, facts.allowed)]
        except HostError as error:
            left = list(self._not_given_back(moved))
            now = f"; not moved back: {', '.join(left)}" if left else ""
            raise HostError(f"{error}{now}") from error

    def _move(self, move: "Move") -> Place | None:
        home = None
        if move.thread.tid == self.main_thread().tid and move.place.cpus is not None:
            home = self.birthplace.rehome(move.place.cpus)
        if home is None:
            return _move(move)
        before = _move(move._replace(place=Place(scheduler=move.place.scheduler)))
        return Place(home, None if before is None else before.scheduler)

    def _not_given_back(self, moved: Sequence["Move"]) -> Iterator[str]:
        for move in reversed(moved):
            try:
                self._move(move)
            except ThreadGoneError:
                continue
            except HostError as error:
                yield str(error)

    def all_threads(self) -> list[HostThread]:
        """Return all of QEMU's threads, the main thread first.

        Raises:
            HostError: QEMU cannot be found.
        """
        main = self.main_thread()
        return sorted(all_of(main.tid), key=lambda each: (each.tid != main.tid, each.tid))

    def others(
        self, threads: Sequence[HostThread], vcpus: Mapping[int, HostThread], iothreads: Collection[int]
    ) -> list[HostThread]:
        """Return those of *threads* that run neither a vCPU nor one of *iothreads*.

        *threads* are older than what QEMU has told of these: a newer one may be that of a vCPU that is being plugged.
        """
        known = {thread.tid for thread in (*vcpus.values(), *self.threads(tuple(iothreads)).values())}
        return [thread for thread in threads if thread.tid not in known]

    def listed(
        self,
        threads: Sequence[HostThread],
        readings: Sequence[ThreadReading],
        iothreads: Collection[int],
        placement: Placement,
    ) -> list[QemuThread]:
        """Return QEMU's threads: those of the vCPUs by ascending id, then its others, the main thread first.

        While a vCPU is being born, emulator threads have no place.

        Args:
            threads: ``all_threads``, older than what follows: a newer one may be that of a vCPU.
            readings: ``query-cpus-fast``.
            iothreads: The threads of ``query-iothreads``.
            placement: Their places.

        Raises:
            HostError: QEMU cannot be found.
        """
        vcpus = self.vcpus(readings)
        wanted = placement.of_vcpus(vcpus, self.facts())
        of_vcpu = {thread.tid for thread in vcpus.values()}
        of_io = {thread.tid for thread in self.threads(tuple(iothreads)).values()}
        listed: list[QemuThread] = []
        for vcpu, thread in sorted(vcpus.items()):
            listed += _look(thread, ThreadKind.VCPU, vcpu, wanted.get(vcpu, Place()))
        with self._undisturbed(self.main_thread()) as is_home:
            place = placement.of_emulator() if is_home else Place()
            for thread in threads:
                if thread.tid in of_io:
                    listed += _look(thread, ThreadKind.IOTHREAD, None, Place())
                elif thread.tid not in of_vcpu:
                    listed += _look(thread, ThreadKind.EMULATOR, None, place)
        return listed

    def read_places(self, slots: Sequence[Slot]) -> dict[int, Place]:
        """Return where each thread runs, by vCPU id, QEMU's main thread as ``EMULATOR``; without what is hidden."""
        tids = dict(_tids(slots))
        try:
            main, found = self.main_thread(), self.threads(tuple(tids.values()))
        except HostError:
            return {}
        return self._places_of({vcpu: found[tid] for vcpu, tid in tids.items() if tid in found}, main)

    def places_of(self, vcpus: Mapping[int, HostThread]) -> dict[int, Place]:
        """Return what ``read_places`` does, of these threads of vCPUs and of QEMU's main thread.

        Raises:
            HostError: QEMU cannot be found.
        """
        return self._places_of(vcpus, self.main_thread())

    def _places_of(self, vcpus: Mapping[int, HostThread], main: HostThread) -> dict[int, Place]:
        places = {vcpu: read_place(thread) for vcpu, thread in vcpus.items()}
        places[EMULATOR] = self._place_of_main(main)
        return {vcpu: place for vcpu, place in places.items() if place is not None}

    def put_right(self, intent: Intent) -> Intent:
        """Send home what a controller that died at a plug of *intent* has left elsewhere; what fails is logged.

        Returns:
            *intent*, which says where the main thread belongs for as long as that could not be done.
        """
        home = intent.main_cpus
        if home is None:
            return intent
        name = printable(self._state.layout.vm.name)
        try:
            born = union(step.ids for step in intent.steps if step.action is Action.PLUG)
            tids = dict(_tids(self._state.layout.slots))
            threads = self.threads(tuple(tids.values()))
            vcpus = {vcpu: threads[tid] for vcpu, tid in tids.items() if tid in threads}
            since = min((vcpus[vcpu].start_ticks for vcpu in born if vcpu in vcpus), default=None)
            if put_right(self.main_thread(), home, intent.birthplaces, tuple(vcpus.values()), since):
                _log.warning("VM %s: QEMU's main thread is back on host CPUs %s", name, home, extra={"vm": name})
        except HostError as error:
            told = f"QEMU's main thread may not be on host CPUs {home}, where it belongs: {error}"
            _log.warning("VM %s: %s", name, printable(told), extra={"vm": name})
            return intent
        return replace(intent, main_cpus=None, birthplaces=())


def allowing(facts: HostFacts, thread: int | str | None) -> HostFacts:
    """Return *facts* with what the cgroup of a thread allows, which libvirt gives each vCPU of its own.

    Args:
        facts: Of the main thread.
        thread: Its id on this host, or its directory, as ``read_cpuset`` takes it; None: it is not there yet.
    """
    cpuset = None if thread is None else read_cpuset(thread)
    return replace(facts, allowed=cpuset.cpus, cgroup=cpuset.cgroup) if cpuset is not None and cpuset.cpus else facts


class Move(NamedTuple):
    """A thread, its place, and *everywhere* as ``threads.put`` takes it."""

    thread: HostThread
    place: Place
    everywhere: VcpuMap


def may_spread(named: Place, facts: HostFacts) -> VcpuMap:
    """Return *everywhere* of a thread for which *named* is specified: what is pinned by name never runs elsewhere."""
    return facts.allowed if named.cpus is None else VcpuMap()


def _move(move: Move) -> Place | None:
    """Put a thread in its place, and return where it was before; None if it was there already.

    It is pinned even then: the kernel may have moved it there when the cgroup allowed nothing else, and moves it back
    when it does.

    Raises:
        ThreadGoneError: It has ended.
        HostError: It cannot be put there.
    """
    before = read_place(move.thread)
    if before is None:
        raise ThreadGoneError(move.thread.tid)
    is_elsewhere = move.place.differs(before)
    if is_elsewhere or move.place.cpus is not None:
        put(move.thread, move.place if is_elsewhere else Place(move.place.cpus), everywhere=move.everywhere)
    return before if is_elsewhere else None


def _look(thread: HostThread, kind: ThreadKind, vcpu: int | None, wanted: Place) -> Iterator[QemuThread]:
    found, usage = read_place(thread), read_usage(thread)
    if found is not None and usage is not None:
        name = printable(thread.name)
        yield QemuThread(kind, vcpu, thread.tid, name, found, wanted, usage.host_cpu, numa_node(usage.host_cpu))


def _tids(slots: Sequence[Slot]) -> Iterator[tuple[int, int]]:
    for slot in slots:
        for vcpu, tid in zip(slot.ids, slot.host_tids, strict=False):
            if tid is not None:
                yield vcpu, tid
