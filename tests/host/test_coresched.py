"""Core scheduling: which calls the kernel gets, and what its answers mean. Few kernels here have it."""

import errno
import os
import threading

import pytest

from qmpvcpu.errors import HostError, ThreadGoneError
from qmpvcpu.host import coresched
from qmpvcpu.host.coresched import share_core, why_not_core_scheduling
from qmpvcpu.host.threads import HostThread

from .conftest import Sleeper

GET, CREATE, SHARE_TO, SHARE_FROM = range(4)


class Kernel:
    """Keeps the groups of threads as the kernel does, by thread; 0 is none."""

    def __init__(self) -> None:
        self.groups: dict[int, int] = {}
        self.asked: list[tuple[int, int]] = []
        self.callers: set[int] = set()
        self.fails: dict[tuple[int, int], int] = {}

    def prctl(self, operation: int, tid: int) -> int:
        caller = threading.get_native_id()
        self.callers.add(caller)
        self.asked.append((operation, tid))
        if code := self.fails.get((operation, tid)):
            raise OSError(code, os.strerror(code))
        if operation == GET:
            return self.groups.get(tid, 0)
        if operation == CREATE:
            self.groups[tid] = max(self.groups.values(), default=6) + 1
        elif operation == SHARE_FROM:
            self.groups[caller] = self.groups[tid]
        else:
            self.groups[tid] = self.groups[caller]
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(coresched, "_prctl", made.prctl)
    return made


def test_threads_come_into_the_group_of_one_of_them(kernel: Kernel, thread: HostThread) -> None:
    others = [Sleeper(), Sleeper()]
    share_core(thread, [other.found for other in others])
    assert kernel.asked == [
        (GET, thread.tid),
        (CREATE, thread.tid),
        (SHARE_FROM, thread.tid),
        *((SHARE_TO, other.tid) for other in others),
    ]
    assert {kernel.groups[other.tid] for other in others} == {kernel.groups[thread.tid]} != {0}
    kernel.asked.clear()
    share_core(thread, [others[0].found])  # it has a group
    assert CREATE not in {operation for operation, _ in kernel.asked}
    for other in others:
        other.end()


def test_no_thread_of_ours_stays_in_the_group(kernel: Kernel, thread: HostThread) -> None:
    share_core(thread, [])
    (caller,) = kernel.callers
    assert caller != threading.get_native_id()
    assert caller not in {each.native_id for each in threading.enumerate()}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.EINVAL, "this kernel has no core scheduling"),
        (errno.ENODEV, "SMT is off"),
        (errno.EPERM, "CAP_SYS_PTRACE"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_what_the_kernel_refuses_is_said(code: int, why: str, kernel: Kernel, thread: HostThread) -> None:
    kernel.fails = {(GET, 0): code, (CREATE, thread.tid): code}
    assert why in why_not_core_scheduling()
    with pytest.raises(HostError, match=why):
        share_core(thread, [])


def test_a_thread_that_has_ended_shares_nothing(kernel: Kernel, thread: HostThread) -> None:
    other = Sleeper()
    found = other.found
    kernel.fails = {(SHARE_TO, other.tid): errno.ESRCH}
    with pytest.raises(ThreadGoneError, match=f"thread {other.tid} has ended"):
        share_core(thread, [found])
    other.end()
    kernel.fails.clear()
    kernel.asked.clear()
    with pytest.raises(ThreadGoneError):
        share_core(thread, [found])
    assert (SHARE_TO, other.tid) not in kernel.asked


def test_a_kernel_that_has_it_keeps_groups_and_one_that_has_not_says_so(thread: HostThread) -> None:
    if why := why_not_core_scheduling():
        assert why in coresched._WHY.values()
        with pytest.raises(HostError, match="cannot share a core"):
            share_core(thread, [])
        return
    other = Sleeper()
    share_core(thread, [other.found])
    assert coresched._prctl(GET, other.tid) == coresched._prctl(GET, thread.tid) != 0
    assert coresched._prctl(GET, 0) != coresched._prctl(GET, thread.tid)
    other.end()
