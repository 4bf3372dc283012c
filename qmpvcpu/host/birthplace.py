"""Sends QEMU's main thread to where vCPU threads should be born, and back home.

A new thread inherits the host CPUs of its creator, and QEMU's main thread creates the vCPU threads. Other threads
that it creates meanwhile, such as workers, are sent home with it.

Source: clone(2), sched_setaffinity(2).
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from typing import Final, NamedTuple

from qmpvcpu.errors import HostBusyError, HostError, ThreadGoneError
from qmpvcpu.host.facts import read_facts
from qmpvcpu.host.threads import HostThread, all_of, is_there, put, read_place, set_affinity, thread_ids
from qmpvcpu.model.placement import Place
from qmpvcpu.model.vcpumap import VcpuMap

_log = logging.getLogger("qmpvcpu.host")

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class Snapshot(NamedTuple):
    """The threads of a QEMU at one moment.

    Attributes:
        tids: Their numbers on this host.
        births: How many plugs had begun by then; -1: some were under way.
    """

    tids: frozenset[int]
    births: int


class Birthplace:
    """Where the main thread of one QEMU is while plugs are under way.

    Every step is done for each plug, so it asks the kernel only for what it needs.

    Args:
        main_thread: Finds it; raises HostError if it cannot be found.
        everywhere: Returns all host CPUs that its cgroup allows, or none: see ``threads.put``. For its home only.

    Attributes:
        home: The host CPUs it gets back; None while it is there.
    """

    def __init__(self, main_thread: Callable[[], HostThread], everywhere: Callable[[], VcpuMap]) -> None:
        self.home: VcpuMap | None = None
        self._main_thread = main_thread
        self._everywhere = everywhere
        self._main: HostThread | None = None
        self._cpus: VcpuMap | None = None
        self._births = 0
        self._begun = 0
        self._threads = 0  # that these make, as far as they have not been seen
        self._known: frozenset[int] = frozenset()
        self._strays_home: VcpuMap | None = None
        self._lock: int | None = None  # the file descriptor of the lock that keeps other programs' births out
        self._since = 0
        self._used: set[VcpuMap] = set()  # where something may have been born that is no vCPU thread
        self._used_now: set[VcpuMap] = set()  # since the threads were looked at

    def begin(self, cpus: VcpuMap, threads: int) -> None:
        """Have new threads of QEMU born on these host CPUs until ``end``; one more plug is under way.

        Args:
            cpus: The host CPUs.
            threads: How many threads the plug creates.

        Raises:
            HostBusyError: Another program has vCPUs of this QEMU born just now.
            HostError: It cannot be; no more is under way than before.
        """
        if self.home is None or self._main is None:
            main = self._main_thread()
            self._lock = _locked(main, fcntl.LOCK_EX)
            try:
                self.home = self._strays_home = VcpuMap(_affinity(main))
            except HostError:
                self.restore()
                raise
            if main != self._main:  # another QEMU
                self._main, self._known = main, frozenset()
                self._used.clear()
            if not self._used:
                self._since = int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)
            self._known = self._known or frozenset(thread_ids(main.tid))
        main = self._main
        if cpus != self._cpus:
            self._heed_others(main)
            try:
                set_affinity(main, cpus)
            except (HostError, ProcessLookupError) as error:
                self._cpus = None  # it may be on some of them
                if not self._births:
                    self.restore()
                raise error if isinstance(error, HostError) else HostError("QEMU has ended") from error
            self._cpus = cpus
        self._used_now.add(cpus)
        self._births += 1
        self._begun += 1
        self._threads += threads

    def is_born(self) -> bool:
        """Return True if no other plug is under way, and every thread that the last ones created is in its place.

        It does not matter which is which: QEMU has created as many threads as the plugs need, all on the same host
        CPUs. False says nothing.
        """
        if self._births != 1:
            return False
        try:
            now = frozenset(thread_ids(self._main_thread().tid))
            born = now - self._known
            in_place = len(born) == self._threads and all(os.sched_getaffinity(tid) == self._cpus for tid in born)
        except (HostError, OSError):
            return False
        self._known, self._threads = now, 0
        self._looked_at(in_place=in_place)
        return in_place

    def _looked_at(self, *, in_place: bool) -> None:
        """Note that nothing but vCPU threads was born since the last look, or that something may have been."""
        self._used |= set() if in_place else self._used_now
        self._used_now = set()

    def end(self, unmade: int = 0) -> None:
        """Note that a plug is over; after the last one the main thread goes home.

        Args:
            unmade: How many of the plug's threads were not created.
        """
        self._births -= 1
        self._threads -= unmade
        if self._births <= 0:
            self.restore()

    def restore(self) -> None:
        """Send the main thread home, even while plugs are under way. Never raises; failures are logged."""
        # As it was then: who QEMU is cannot be found out any more if its connection is lost.
        if self.home is not None and self._main is not None:
            try:
                if not is_there(self._main):
                    raise ThreadGoneError(self._main.tid)
                self._heed_others(self._main)
                set_affinity(self._main, self.home, everywhere=self._everywhere())
            except (HostError, ProcessLookupError) as error:
                _log.warning("QEMU's main thread was not sent back to host CPUs %s: %s", self.home, error)
        self.home = self._cpus = None
        self._births = self._threads = 0
        _unlock(self._lock)
        self._lock = None
        self._looked_at(in_place=False)

    def _heed_others(self, main: HostThread) -> None:
        """If somebody else has moved the main thread from the birthplace, take that as its home.

        The kernel moves it too: it removes host CPUs that the cgroup forbids, and allows all if none are left.
        """
        if self._cpus is None or (found := _affinity(main)) == self._cpus:
            return
        usable = read_facts(main.tid).usable
        if found != (self._cpus & usable or usable):
            self.home = self._strays_home = VcpuMap(found)
            _log.info("QEMU's main thread belongs on host CPUs %s now: somebody else moved it there", self.home)

    def rehome(self, cpus: VcpuMap) -> VcpuMap | None:
        """Note that the main thread belongs on these host CPUs from now on.

        Returns:
            Where it belonged, if it is elsewhere now, and goes there when the plugs under way are over; None: it is
            at home, so that somebody has to move it.
        """
        home, self.home = self.home, None if self.home is None else cpus
        if home is not None:
            self._strays_home = cpus
        return home

    def snapshot(self) -> Snapshot:
        """Return which threads QEMU has now. What is asked of it from now on tells all vCPU threads among them."""
        if not (self._used or self._used_now):
            return Snapshot(frozenset(), self._begun)
        births = -1 if self._births else self._begun
        return Snapshot(frozenset(thread_ids(self._main_thread().tid)), births)

    def settle(self, vcpus: Collection[HostThread], snapshot: Snapshot) -> None:
        """Send home other threads that were born with the vCPU threads.

        Args:
            vcpus: All vCPU threads that have a place of their own, as QEMU told after the snapshot.
            snapshot: What there was before that. Of a newer thread it is not known what it is.
        """
        used, home = self._used | self._used_now, self._strays_home
        if not used or home is None:
            return
        main = self._main_thread()
        strays = snapshot.tids - {main.tid, *(thread.tid for thread in vcpus)}
        threads = [each for each in all_of(main.tid) if each.tid in strays and each.start_ticks >= self._since]
        _send_home(_found_on(threads, used), home, self._everywhere())
        if snapshot.births == self._begun:  # nothing can have been born since
            self._used.clear()
            self._used_now.clear()


@contextlib.contextmanager
def undisturbed(main: HostThread) -> Iterator[bool]:
    """Keep other programs from giving QEMU's main thread a birthplace inside; yield False if one has.

    Where it is then does not tell where it belongs. Not for a program that has it elsewhere itself.
    """
    try:
        lock = _locked(main, fcntl.LOCK_SH)
    except HostBusyError:
        yield False
        return
    except HostError:  # it is hidden, or has ended
        lock = None
    try:
        yield True
    finally:
        _unlock(lock)


def put_right(
    main: HostThread,
    home: VcpuMap,
    birthplaces: Collection[VcpuMap],
    vcpus: Collection[HostThread],
    since: int | None,
) -> bool:
    """Send home QEMU's main thread after its controller died during a plug, and other threads born meanwhile.

    Args:
        main: The main thread.
        home: The host CPUs that it had.
        birthplaces: Those that it may have been given; what is elsewhere was sent there by somebody else.
        vcpus: All vCPU threads.
        since: When the first vCPU thread was born, in clock ticks since boot; None: none was. What is older was put
            where it is by somebody else.

    Returns:
        True if anything was moved.

    Raises:
        HostError: The main thread could not be sent home.
    """
    known = {thread.tid for thread in vcpus}
    others = [
        thread
        for thread in all_of(main.tid)
        if thread.tid == main.tid or (thread.tid not in known and since is not None and thread.start_ticks >= since)
    ]
    moved = _found_on(others, birthplaces)
    if main.tid not in {thread.tid for thread in moved}:
        return False  # it was at home, so that nothing was being born
    _send_home(moved, home, read_facts(main.tid).allowed)
    if (found := read_place(main)) is not None and found.cpus != home:
        raise HostError(f"it is on host CPUs {found.cpus}")
    return True


def _found_on(threads: Collection[HostThread], places: Collection[VcpuMap]) -> list[HostThread]:
    found = ((thread, read_place(thread)) for thread in threads)
    return [thread for thread, place in found if place is not None and place.cpus in places]


def _send_home(threads: Collection[HostThread], home: VcpuMap, everywhere: VcpuMap) -> None:
    for thread in threads:
        try:
            put(thread, Place(home), everywhere=everywhere)
        except HostError as error:
            _log.warning("thread %s of QEMU (%s) was not sent back to host CPUs %s: %s", *_named(thread), home, error)


def _named(thread: HostThread) -> tuple[int, str]:
    return thread.tid, thread.name


def _locked(main: HostThread, kind: int) -> int | None:
    """Return a lock against other programs that give the main thread birthplaces; None where the kernel has none.

    Two that did so at a time would each take the other's birthplace for its home. It is that of a directory in
    /proc, which every program has that sees QEMU, and ends with ours.
    """
    try:
        lock = os.open(main.directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise HostError(f"QEMU, process {main.tid}, cannot be looked at: {error.strerror}") from error
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise HostBusyError("another program is plugging vCPUs of this QEMU into their place just now") from None
    except OSError:
        os.close(lock)
        return None
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)  # also for a child that has inherited it
        os.close(lock)


def _affinity(thread: HostThread) -> set[int]:
    try:
        return os.sched_getaffinity(thread.tid)
    except OSError as error:
        raise HostError(f"where thread {thread.tid} runs cannot be read: {error.strerror}") from error
