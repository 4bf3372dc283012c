"""QEMU's main thread, which is sent to where the vCPU threads are to be born, and back home.

A new thread may run where the one that makes it may, and QEMU's main thread makes the threads of vCPUs. Other threads
that it makes meanwhile, such as workers, are sent home with it.

Source: clone(2), sched_setaffinity(2).
"""

import logging
import os
import time
from collections.abc import Callable, Collection
from typing import Final

from qmpvcpu.errors import HostError
from qmpvcpu.host.facts import read_facts
from qmpvcpu.host.threads import HostThread, all_of, put, read_place
from qmpvcpu.model.placement import Place
from qmpvcpu.model.vcpumap import VcpuMap

_log = logging.getLogger("qmpvcpu.host")

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class Birthplace:
    """Where the main thread of one QEMU is, for the time of the plugs under way.

    Args:
        main_thread: Finds it; raises HostError if it cannot be found.

    Attributes:
        home: The host CPUs that it gets back; None while it is there.
    """

    def __init__(self, main_thread: Callable[[], HostThread]) -> None:
        self.home: VcpuMap | None = None
        self._main_thread = main_thread
        self._thread: HostThread | None = None
        self._everywhere = VcpuMap()
        self._cpus: VcpuMap | None = None
        self._births = 0
        self._since = 0
        self._used: set[VcpuMap] = set()
        self._home_before: VcpuMap | None = None

    def begin(self, cpus: VcpuMap) -> None:
        """Have what QEMU makes from now on be born on these host CPUs, until ``end``; a plug more is under way.

        Raises:
            HostError: It cannot be; no more is under way than before.
        """
        if self.home is None or self._thread is None:
            thread = self._main_thread()
            found = read_place(thread)
            if found is None or found.cpus is None:
                raise HostError("QEMU's main thread has ended")
            self._everywhere = read_facts(thread.tid).allowed
            self._since = int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS_PER_S)
            self._thread, self.home = thread, found.cpus
        if cpus != self._cpus:
            try:
                put(self._thread, Place(cpus), everywhere=self._everywhere)
            except HostError:
                if not self._births:
                    self.restore()
                raise
            self._cpus = cpus
            self._used.add(cpus)
        self._births += 1

    def end(self) -> None:
        """Note that the plug is over; after the last one the main thread goes home."""
        self._births -= 1
        if self._births <= 0:
            self.restore()

    def restore(self) -> None:
        """Send the main thread home, whatever is under way. Never fails: what cannot be is logged."""
        thread, home, self._births = self._thread, self.home, 0
        if thread is not None and home is not None:
            _send_home([thread], home, self._everywhere)
        self._thread = self.home = self._cpus = None
        self._home_before = home

    def rehome(self, cpus: VcpuMap) -> None:
        """Note that somebody wants the main thread on these host CPUs: that is where it goes home to."""
        self.home = cpus if self.home is not None else None

    def settle(self, vcpus: Collection[HostThread]) -> None:
        """Send home what was born with the vCPU threads and is none of *vcpus*, which are all of them."""
        home = self.home or self._home_before
        if not self._used or home is None:
            return
        known = {thread.tid for thread in vcpus}
        main = self._main_thread()
        strays = [
            thread
            for thread in all_of(main.tid)
            if thread.tid not in known and thread.tid != main.tid and thread.start_ticks >= self._since
        ]
        _send_home(_found_on(strays, self._used), home, self._everywhere)
        if not self._births:
            self._used.clear()


def put_right(
    main: HostThread, home: VcpuMap, birthplaces: Collection[VcpuMap], vcpus: Collection[HostThread]
) -> bool:
    """Send home the main thread of a QEMU whose controller died at a plug, and what was born with the vCPU threads.

    Args:
        main: The main thread.
        home: The host CPUs that it had.
        birthplaces: Those that it may have been given; what is elsewhere was sent there by somebody else.
        vcpus: All vCPU threads.

    Returns:
        True if anything was moved.
    """
    known = {thread.tid for thread in vcpus}
    others = [thread for thread in all_of(main.tid) if thread.tid not in known]
    moved = _found_on(others, {cpus for cpus in birthplaces if cpus != home})
    if main.tid not in {thread.tid for thread in moved}:
        return False  # it was at home, so that nothing was being born
    _send_home(moved, home, read_facts(main.tid).allowed)
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
