"""A process that makes threads as QEMU does: its main thread is sent to where they are to be born, and back home."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpvcpu.errors import HostBusyError, HostError, ThreadGoneError
from qmpvcpu.host.birthplace import Birthplace, put_right
from qmpvcpu.host.threads import HostThread, all_of, find, find_main, put
from qmpvcpu.model.placement import HostFacts, Place
from qmpvcpu.model.vcpumap import VcpuMap
from tests.host.conftest import MakeCgroup

EVERYWHERE = VcpuMap(os.sched_getaffinity(0))
THERE = VcpuMap([EVERYWHERE.lowest])

QEMU = """
import threading
while line := input():
    threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(int(line))]
    for thread in threads:
        thread.start()
    print(*(thread.native_id for thread in threads), flush=True)
"""


class Qemu:
    """A process whose main thread makes threads when it is told to."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        main = find_main(process.pid)
        assert main is not None
        self.main = main

    def make(self, count: int = 1) -> list[HostThread]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        tids = [int(tid) for tid in self._process.stdout.readline().split()]
        return [*find(self._process.pid, tids).values()]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def qemu() -> Iterator[Qemu]:
    command = [sys.executable, "-c", QEMU]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        made = Qemu(process)
        assert len(made.make()) == 1  # it is up
        yield made
        process.kill()


@pytest.fixture
def birthplace(qemu: Qemu) -> Birthplace:
    return Birthplace(lambda: qemu.main, lambda: EVERYWHERE)


@pytest.fixture(autouse=True)
def two_cpus() -> None:
    """On a host with one CPU all is in its place."""
    assert len(EVERYWHERE) > 1, "these tests need two host CPUs"


def cpus(*threads: HostThread) -> list[VcpuMap]:
    return [VcpuMap(os.sched_getaffinity(thread.tid)) for thread in threads]


def test_what_is_born_during_a_plug_is_born_there_and_the_main_thread_goes_home(
    qemu: Qemu, birthplace: Birthplace
) -> None:
    birthplace.begin(THERE, 2)
    assert birthplace.home == EVERYWHERE
    assert cpus(qemu.main) == [THERE]
    born = qemu.make(2)
    assert birthplace.is_born()
    birthplace.end()
    assert birthplace.home is None
    assert cpus(qemu.main, *born, *qemu.make()) == [EVERYWHERE, THERE, THERE, EVERYWHERE]


def test_what_was_born_on_all_that_the_cgroup_allows_stays_there_and_the_main_thread_gets_more(
    qemu: Qemu, make_cgroup: MakeCgroup
) -> None:
    cgroup = make_cgroup("cpuset")
    (cgroup / "cgroup.procs").write_text(str(qemu.main.tid))
    (cgroup / "cpuset.cpus").write_text(str(THERE))
    birthplace = Birthplace(lambda: qemu.main, lambda: THERE)
    birthplace.begin(THERE, 1)
    born = qemu.make()
    birthplace.end()
    (cgroup / "cpuset.cpus").write_text(str(EVERYWHERE))
    assert cpus(qemu.main, *born) == [EVERYWHERE, THERE]


def test_it_goes_home_after_the_last_of_the_plugs_under_way(qemu: Qemu, birthplace: Birthplace) -> None:
    birthplace.begin(THERE, 1)
    birthplace.begin(THERE, 1)
    birthplace.end()
    assert cpus(qemu.main) == [THERE]
    qemu.make(2)
    assert birthplace.is_born()
    birthplace.end()
    assert cpus(qemu.main) == [EVERYWHERE]


def test_it_goes_home_to_where_it_was(qemu: Qemu, birthplace: Birthplace) -> None:
    home = VcpuMap([max(EVERYWHERE)])
    put(qemu.main, Place(home), everywhere=EVERYWHERE)
    birthplace.begin(THERE, 1)
    birthplace.end()
    assert cpus(qemu.main) == [home]
    birthplace.begin(THERE, 1)
    birthplace.rehome(EVERYWHERE)  # somebody wants it there meanwhile
    birthplace.end()
    assert cpus(qemu.main) == [EVERYWHERE]
    birthplace.rehome(home)  # nothing is under way
    assert birthplace.home is None


def test_it_stays_where_somebody_else_has_moved_it_meanwhile(qemu: Qemu, birthplace: Birthplace) -> None:
    theirs = VcpuMap([max(EVERYWHERE)])
    birthplace.begin(THERE, 1)
    os.sched_setaffinity(qemu.main.tid, theirs)
    birthplace.end()
    assert cpus(qemu.main) == [theirs]
    put(qemu.main, Place(EVERYWHERE), everywhere=EVERYWHERE)
    birthplace.begin(THERE, 1)
    os.sched_setaffinity(qemu.main.tid, theirs)
    birthplace.begin(EVERYWHERE, 1)  # elsewhere, while the one before is not over
    birthplace.end()
    birthplace.end()
    assert cpus(qemu.main) == [theirs]


def test_a_place_of_which_the_cgroup_has_left_nothing_is_nobodys_wish(
    qemu: Qemu, birthplace: Birthplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    birthplace.begin(THERE, 1)
    shrunk = HostFacts(online=EVERYWHERE, allowed=EVERYWHERE - THERE)
    monkeypatch.setattr("qmpvcpu.host.birthplace.read_facts", lambda _: shrunk)
    os.sched_setaffinity(qemu.main.tid, shrunk.usable)  # as the kernel has it then
    birthplace.end()
    assert cpus(qemu.main) == [EVERYWHERE]


def test_two_programs_have_one_birthplace_at_a_time(qemu: Qemu, birthplace: Birthplace) -> None:
    other = Birthplace(lambda: qemu.main, lambda: EVERYWHERE)
    birthplace.begin(THERE, 1)
    with pytest.raises(HostBusyError, match="another program"):
        other.begin(VcpuMap([max(EVERYWHERE)]), 1)
    assert other.home is None
    assert cpus(qemu.main) == [THERE]
    birthplace.end()
    other.begin(VcpuMap([max(EVERYWHERE)]), 1)
    assert other.home == EVERYWHERE
    other.end()
    assert cpus(qemu.main) == [EVERYWHERE]


def test_fewer_or_more_threads_than_plugs_make_prove_nothing(qemu: Qemu, birthplace: Birthplace) -> None:
    birthplace.begin(THERE, 2)
    qemu.make()
    assert not birthplace.is_born()
    birthplace.end()
    birthplace.begin(THERE, 1)
    qemu.make(2)
    assert not birthplace.is_born()


def test_a_thread_that_somebody_has_moved_proves_nothing(qemu: Qemu, birthplace: Birthplace) -> None:
    birthplace.begin(THERE, 1)
    put(qemu.make()[0], Place(EVERYWHERE), everywhere=EVERYWHERE)
    assert not birthplace.is_born()


def test_a_worker_that_was_born_meanwhile_is_sent_home(qemu: Qemu, birthplace: Birthplace) -> None:
    birthplace.begin(THERE, 1)
    vcpu, worker = qemu.make(2)
    birthplace.settle([vcpu], birthplace.snapshot())
    assert cpus(vcpu, worker) == [THERE, EVERYWHERE]
    birthplace.end()
    birthplace.settle([vcpu], birthplace.snapshot())
    assert cpus(qemu.main, vcpu, worker) == [EVERYWHERE, THERE, EVERYWHERE]
    late = qemu.make()[0]
    put(late, Place(THERE), everywhere=EVERYWHERE)  # by somebody else, and after
    birthplace.settle([vcpu], birthplace.snapshot())
    assert cpus(late) == [THERE]


def test_what_is_newer_than_what_qemu_has_told_may_be_a_vcpu(qemu: Qemu, birthplace: Birthplace) -> None:
    birthplace.begin(THERE, 2)
    vcpu, worker = qemu.make(2)
    seen = birthplace.snapshot()
    newer = qemu.make()[0]
    birthplace.settle([vcpu], seen)
    birthplace.end()
    assert cpus(vcpu, worker, newer) == [THERE, EVERYWHERE, THERE]
    birthplace.settle([vcpu], birthplace.snapshot())
    assert cpus(newer) == [EVERYWHERE], "it was none"


def test_a_worker_of_an_earlier_plug_is_sent_home_though_a_later_one_made_none(
    qemu: Qemu, birthplace: Birthplace
) -> None:
    birthplace.begin(THERE, 1)
    one, worker = qemu.make(2)
    assert not birthplace.is_born()
    birthplace.end()
    birthplace.begin(THERE, 1)
    two = qemu.make()[0]
    assert birthplace.is_born()
    birthplace.end()
    birthplace.settle([one, two], birthplace.snapshot())
    assert cpus(one, two, worker) == [THERE, THERE, EVERYWHERE]


def test_a_worker_is_not_taken_for_the_vcpu_that_a_rejected_plug_has_not_made(
    qemu: Qemu, birthplace: Birthplace
) -> None:
    birthplace.begin(THERE, 1)
    birthplace.begin(THERE, 1)
    birthplace.end(unmade=1)
    vcpu, worker = qemu.make(2)
    assert not birthplace.is_born()
    birthplace.end()
    birthplace.settle([vcpu], birthplace.snapshot())
    assert cpus(vcpu, worker) == [THERE, EVERYWHERE]


def test_it_goes_home_though_nobody_can_find_it_any_more(qemu: Qemu) -> None:
    finds = [qemu.main]
    birthplace = Birthplace(finds.pop, lambda: EVERYWHERE)
    birthplace.begin(THERE, 1)
    birthplace.end()
    assert cpus(qemu.main) == [EVERYWHERE]


def test_another_qemu_has_no_threads_of_the_one_before(qemu: Qemu) -> None:
    before = qemu.main._replace(start_ticks=1)
    finds = [qemu.main, qemu.main, qemu.main, before]
    birthplace = Birthplace(finds.pop, lambda: EVERYWHERE)
    birthplace.begin(THERE, 1)
    birthplace.end()  # it has ended, for all that its start tells
    put(qemu.main, Place(EVERYWHERE), everywhere=EVERYWHERE)
    worker = qemu.make()[0]
    put(worker, Place(THERE), everywhere=EVERYWHERE)
    birthplace.begin(VcpuMap([max(EVERYWHERE)]), 1)
    birthplace.settle([], birthplace.snapshot())
    assert cpus(worker) == [THERE]


def test_a_birthplace_that_cannot_be_had_leaves_the_main_thread_at_home(qemu: Qemu, birthplace: Birthplace) -> None:
    with pytest.raises(HostError, match="4000"):
        birthplace.begin(VcpuMap([4000]), 1)
    assert birthplace.home is None
    with pytest.raises(HostError, match=f"only on {THERE}"):
        birthplace.begin(THERE | {4000}, 1)
    assert cpus(qemu.main) == [EVERYWHERE]
    birthplace.begin(THERE, 1)
    birthplace.end()
    assert cpus(qemu.main) == [EVERYWHERE]


def test_a_qemu_that_ends_meanwhile_is_said_and_logged(
    qemu: Qemu, birthplace: Birthplace, caplog: pytest.LogCaptureFixture
) -> None:
    birthplace.begin(THERE, 1)
    qemu.kill()
    assert not birthplace.is_born()
    with caplog.at_level(logging.WARNING, logger="qmpvcpu.host"):
        birthplace.end()
    assert "was not sent back" in caplog.text
    assert birthplace.home is None
    with pytest.raises(HostError):
        birthplace.begin(THERE, 1)


def test_what_a_controller_that_died_has_left_elsewhere_is_put_right(qemu: Qemu, birthplace: Birthplace) -> None:
    birthplace.begin(THERE, 1)
    vcpu, worker = qemu.make(2)
    assert put_right(qemu.main, EVERYWHERE, {THERE}, [vcpu], vcpu.start_ticks)
    assert cpus(qemu.main, vcpu, worker) == [EVERYWHERE, THERE, EVERYWHERE]
    assert not put_right(qemu.main, EVERYWHERE, {THERE}, [vcpu], vcpu.start_ticks)  # it is at home


def test_what_is_older_than_the_births_is_left_where_it_is(qemu: Qemu) -> None:
    (iothread,) = qemu.make()
    for thread in (qemu.main, iothread):
        put(thread, Place(THERE), everywhere=EVERYWHERE)
    assert put_right(qemu.main, EVERYWHERE, {THERE}, [], iothread.start_ticks + 1)
    assert cpus(qemu.main, iothread) == [EVERYWHERE, THERE]
    put(qemu.main, Place(THERE), everywhere=EVERYWHERE)
    assert put_right(qemu.main, EVERYWHERE, {THERE}, [], None)  # none was born
    assert cpus(qemu.main, iothread) == [EVERYWHERE, THERE]


def test_what_somebody_else_has_moved_is_left_where_it_is(qemu: Qemu) -> None:
    elsewhere = VcpuMap([max(EVERYWHERE)])
    put(qemu.main, Place(elsewhere), everywhere=EVERYWHERE)
    assert not put_right(qemu.main, EVERYWHERE, {THERE}, [], 0)
    assert cpus(qemu.main) == [elsewhere]


def test_one_that_ends_while_it_is_sent_home_is_no_error(
    qemu: Qemu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(thread: HostThread, place: Place, *, everywhere: VcpuMap) -> Place:
        if thread == qemu.main:
            return put(thread, place, everywhere=everywhere)
        raise ThreadGoneError(thread.tid)

    for thread in all_of(qemu.main.tid):
        put(thread, Place(THERE), everywhere=EVERYWHERE)
    monkeypatch.setattr("qmpvcpu.host.birthplace.put", gone)
    assert put_right(qemu.main, EVERYWHERE, {THERE}, [], 0)
    assert cpus(qemu.main) == [EVERYWHERE]
    assert "was not sent back to host CPUs" in caplog.text
    assert Path(f"/proc/{qemu.main.tid}").exists()


def test_a_main_thread_that_cannot_be_sent_home_is_told(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> Place:
        raise HostError("not permitted")

    put(qemu.main, Place(THERE), everywhere=EVERYWHERE)
    monkeypatch.setattr("qmpvcpu.host.birthplace.put", refused)
    with pytest.raises(HostError, match=f"it is on host CPUs {THERE}"):
        put_right(qemu.main, EVERYWHERE, {THERE}, [], None)
