"""Threads of this process and of others: found, looked at, and put in their place."""

import os
import threading
from collections.abc import Iterator

import pytest

from qmpvcpu.errors import HostError, ThreadGoneError
from qmpvcpu.host.threads import HostThread, all_of, find, is_there, put, read_place, read_usage
from qmpvcpu.model.placement import Place
from qmpvcpu.model.vcpumap import VcpuMap

EVERYWHERE = VcpuMap(os.sched_getaffinity(0))


class Sleeper:
    """A thread that sleeps until it is told to end."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._end.wait)
        self._thread.start()
        assert self._thread.native_id is not None
        self.tid = self._thread.native_id

    def end(self) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    made = Sleeper()
    yield made
    made.end()


@pytest.fixture
def thread(sleeper: Sleeper) -> HostThread:
    return find(os.getpid(), [sleeper.tid])[sleeper.tid]


def test_the_threads_of_a_process_are_found_by_the_numbers_that_it_gives_them(sleeper: Sleeper) -> None:
    found = find(os.getpid(), [sleeper.tid, 2**22 + 1])
    assert {tid: thread.directory for tid, thread in found.items()} == {
        sleeper.tid: f"/proc/{os.getpid()}/task/{sleeper.tid}"
    }
    assert find(2**22 + 1, [sleeper.tid]) == {}
    threads = all_of(os.getpid())
    assert threads[0].tid == os.getpid()
    assert found[sleeper.tid] in threads
    assert all_of(2**22 + 1) == []


def test_what_a_thread_has_done_is_read(thread: HostThread, sleeper: Sleeper) -> None:
    usage = read_usage(thread)
    assert usage is not None
    assert usage.turns is not None
    assert usage.run_ns > 0 < usage.turns
    assert usage.host_cpu in EVERYWHERE
    assert read_usage(thread._replace(start_ticks=1)) is None
    sleeper.end()
    assert read_usage(thread) is None


def test_a_thread_is_put_in_its_place(thread: HostThread) -> None:
    (first, *_) = EVERYWHERE
    assert put(thread, Place.on([first], "batch"), everywhere=EVERYWHERE) == Place.on([first], "batch")
    assert read_place(thread) == Place.on([first], "batch")
    assert put(thread, Place(EVERYWHERE), everywhere=EVERYWHERE) == Place.on(EVERYWHERE, "batch")
    assert put(thread, Place(), everywhere=EVERYWHERE) == Place.on(EVERYWHERE, "batch")


def test_a_thread_that_has_ended_is_put_nowhere(thread: HostThread, sleeper: Sleeper) -> None:
    assert is_there(thread)
    sleeper.end()
    assert not is_there(thread)
    assert read_place(thread) is None
    with pytest.raises(ThreadGoneError, match=f"thread {thread.tid} has ended"):
        put(thread, Place(EVERYWHERE), everywhere=EVERYWHERE)


def test_a_cpu_that_no_host_has_is_refused(thread: HostThread) -> None:
    with pytest.raises(HostError, match=r"on host CPUs 4000, not even .* cgroup \(/.*\) does not allow 4000"):
        put(thread, Place.on([4000]), everywhere=EVERYWHERE)
    (first, *_) = EVERYWHERE
    with pytest.raises(HostError, match=rf"run on host CPUs {first},4000, but only on {first}: .* allow 4000"):
        put(thread, Place.on([first, 4000]), everywhere=EVERYWHERE)
