"""Threads of this process and of others: found, looked at, and put in their place."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpvcpu.errors import HostError, Outcome, ThreadGoneError
from qmpvcpu.host import threads
from qmpvcpu.host.threads import (
    HostThread,
    Usage,
    all_of,
    counts_waits,
    find,
    find_main,
    is_there,
    put,
    read_place,
    read_usage,
)
from qmpvcpu.model.placement import Place
from qmpvcpu.model.vcpumap import VcpuMap

from .conftest import NOBODY, MakeCgroup, Sleeper, run

GONE = 2**22 + 1  # no process has this number


def test_the_threads_of_a_process_are_found_by_the_numbers_that_it_gives_them(sleeper: Sleeper) -> None:
    found = find(os.getpid(), [sleeper.tid, GONE])
    assert [*found] == [sleeper.tid]
    assert found[sleeper.tid].directory == f"/proc/{os.getpid()}/task/{sleeper.tid}"
    assert find(GONE, [sleeper.tid]) == {}
    listed = all_of(os.getpid())
    assert listed[0] == find_main(os.getpid())
    assert found[sleeper.tid] in listed
    assert all_of(GONE) == []
    assert find_main(GONE) is None


@pytest.fixture
def contained() -> Iterator[tuple[int, list[int]]]:
    """A process in a PID namespace of its own, and the numbers that its threads have there."""
    code = (
        "import threading; t = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(3)];"
        "[each.start() for each in t]; print(*(each.native_id for each in t), flush=True); input()"
    )
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *user, "--pid", "--fork", "--kill-child", "python3", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        tids = [int(tid) for tid in process.stdout.readline().split()]
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield int(child), tids
        process.kill()


def test_threads_with_other_numbers_in_their_own_pid_namespace_are_found(contained: tuple[int, list[int]]) -> None:
    pid, tids = contained
    found = find(pid, [*tids, 4000])
    assert [*found] == tids
    assert all(tid != thread.tid for tid, thread in found.items())
    assert {thread.tid for thread in all_of(pid)} == {pid, *(thread.tid for thread in found.values())}
    first = found[tids[0]]
    assert put(first, Place.on([0]), everywhere=VcpuMap([0])) == Place.on([0], "other")
    assert read_place(first) == Place.on([0], "other")


def test_what_a_thread_has_done_is_read(thread: HostThread, sleeper: Sleeper, everywhere: VcpuMap) -> None:
    usage = read_usage(thread, waits=True)
    assert usage is not None
    assert usage.turns is not None
    assert usage.run_ns > 0 < usage.turns
    assert usage.delay_ns is not None
    assert usage.host_cpu in everywhere
    assert (usage.wait_ns is not None) is counts_waits()
    assert read_usage(thread._replace(start_ticks=1)) is None
    sleeper.end()
    assert read_usage(thread) is None


STAT = "8 (CPU 0) R) S 1 7 7 0 -1 4194304 0 0 0 0 150 25 0 0 20 0 4 0 900 0 0" + " 0" * 14 + " 3 0 0"


@pytest.mark.parametrize(
    ("schedstat", "sched", "usage"),
    [
        ("5000 70 9\n", "", Usage(5000, 70, 9, 3)),
        ("5000 70 9\n", "wait_sum                :      12.000345\n", Usage(5000, 70, 9, 3, 12_000_345)),
        ("5000 70 9\n", "se.statistics.wait_sum  :       0.000000\n", Usage(5000, 70, 9, 3, 0)),
        ("5000 70 9\n", "se.sum_exec_runtime     :      12.000345\n", Usage(5000, 70, 9, 3)),
        ("0 0 0\n", "", Usage(1_750_000_000, None, None, 3)),  # a kernel that does not count
        ("", "", Usage(1_750_000_000, None, None, 3)),
    ],
)
def test_what_the_kernel_counts_is_taken_as_it_counts_it(
    schedstat: str, sched: str, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"/proc/7/task/8/stat": STAT, "/proc/7/task/8/schedstat": schedstat, "/proc/7/task/8/sched": sched}
    monkeypatch.setattr(threads, "read_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(threads, "_NS_PER_TICK", 10_000_000)
    thread = HostThread("/proc/7/task/8", 8, 900, "CPU 0")
    assert read_usage(thread, waits=True) == usage
    assert read_usage(thread) == usage._replace(wait_ns=None)
    assert read_usage(thread._replace(start_ticks=901)) is None


def test_no_file_is_left_open(thread: HostThread) -> None:
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(3):
        read_usage(thread, waits=True)
        find(os.getpid(), [thread.tid])
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_a_thread_is_put_in_its_place_and_the_rest_of_it_stays(thread: HostThread, everywhere: VcpuMap) -> None:
    first = everywhere.lowest
    assert put(thread, Place.on([first], "batch"), everywhere=everywhere) == Place.on([first], "batch")
    assert read_place(thread) == Place.on([first], "batch")
    assert put(thread, Place(everywhere), everywhere=everywhere) == Place.on(everywhere, "batch")
    assert put(thread, Place.on([first]), everywhere=everywhere) == Place.on([first], "batch")
    assert put(thread, Place(), everywhere=everywhere) == Place.on([first], "batch")


@pytest.mark.usefixtures("root")
def test_every_scheduler_can_be_set_and_the_nice_value_stays(thread: HostThread, everywhere: VcpuMap) -> None:
    os.setpriority(os.PRIO_PROCESS, thread.tid, 7)
    for scheduler in ("batch", "idle", "fifo:1", "rr:99", "fifo:50", "other"):
        wanted = Place.on(everywhere, scheduler)
        assert put(thread, wanted, everywhere=everywhere) == wanted
    assert os.getpriority(os.PRIO_PROCESS, thread.tid) == 7
    assert os.sched_getscheduler(thread.tid) == os.SCHED_OTHER


@pytest.mark.usefixtures("root")
def test_whether_children_are_reset_stays_as_it_was(thread: HostThread, everywhere: VcpuMap) -> None:
    put(thread, Place.on(everywhere, "fifo:5"), everywhere=everywhere)
    assert os.sched_getscheduler(thread.tid) == os.SCHED_FIFO
    os.sched_setscheduler(thread.tid, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    assert put(thread, Place.on(everywhere, "rr:5"), everywhere=everywhere) == Place.on(everywhere, "rr:5")
    assert os.sched_getscheduler(thread.tid) == os.SCHED_RR | os.SCHED_RESET_ON_FORK


@pytest.mark.usefixtures("root")
def test_a_thread_with_a_deadline_has_no_scheduler_that_we_know(everywhere: VcpuMap) -> None:
    deadline = ["chrt", "--deadline", "--sched-runtime=1000000", "--sched-period=100000000", "0", "sleep", "60"]
    with subprocess.Popen(deadline) as process:
        while read_place(main := find_main(process.pid) or HostThread("", process.pid, 0, "")) != Place(everywhere):
            pass
        assert put(main, Place.on(everywhere, "other"), everywhere=everywhere) == Place.on(everywhere, "other")
        process.kill()


def test_a_scheduler_that_changes_while_it_is_read_is_read_again(
    thread: HostThread, everywhere: VcpuMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [os.SCHED_FIFO, os.SCHED_OTHER]
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: policies.pop(0))
    assert read_place(thread) == Place.on(everywhere, "other")
    assert policies == []


def test_a_thread_that_has_ended_is_put_nowhere(thread: HostThread, sleeper: Sleeper, everywhere: VcpuMap) -> None:
    assert is_there(thread)
    sleeper.end()
    assert not is_there(thread)
    assert read_place(thread) is None
    with pytest.raises(ThreadGoneError, match=f"thread {thread.tid} has ended") as caught:
        put(thread, Place(everywhere), everywhere=everywhere)
    assert caught.value.tid == thread.tid
    assert caught.value.outcome is Outcome.UNCHANGED


def test_the_number_of_a_thread_that_is_another_s_by_now_is_left_alone(thread: HostThread) -> None:
    earlier = thread._replace(start_ticks=thread.start_ticks - 1)
    before = read_place(thread)
    assert not is_there(earlier)
    assert read_place(earlier) is None
    with pytest.raises(ThreadGoneError):
        put(earlier, Place.on([0], "batch"), everywhere=VcpuMap())
    assert read_place(thread) == before


def test_another_thread_that_was_hit_has_back_what_it_had(
    thread: HostThread, everywhere: VcpuMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_place(thread)
    answers = [True, False]
    monkeypatch.setattr(threads, "is_there", lambda _: answers.pop(0))
    with pytest.raises(ThreadGoneError):
        put(thread, Place.on([everywhere.lowest], "batch"), everywhere=everywhere)
    monkeypatch.undo()
    assert answers == []
    assert read_place(thread) == before


def test_another_thread_that_others_have_moved_meanwhile_is_left_there(
    thread: HostThread, everywhere: VcpuMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [True, False]

    def is_there(_: HostThread) -> bool:
        if len(answers) == 1:
            os.sched_setscheduler(thread.tid, os.SCHED_IDLE, os.sched_param(0))
        return answers.pop(0)

    monkeypatch.setattr(threads, "is_there", is_there)
    with pytest.raises(ThreadGoneError):
        put(thread, Place.on(everywhere, "batch"), everywhere=everywhere)
    assert os.sched_getscheduler(thread.tid) == os.SCHED_IDLE


def test_a_refusal_by_a_thread_that_was_not_meant_is_none(
    thread: HostThread, everywhere: VcpuMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is that of another user's thread by now."""
    answers = [True, False]
    monkeypatch.setattr(threads, "is_there", lambda _: answers.pop(0))

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with pytest.raises(ThreadGoneError):
        put(thread, Place(everywhere), everywhere=everywhere)


@pytest.mark.parametrize("call", ["sched_getaffinity", "sched_setaffinity", "sched_getparam", "sched_setscheduler"])
def test_a_thread_may_end_at_any_moment(
    call: str, thread: HostThread, everywhere: VcpuMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, call, end)
    with pytest.raises(ThreadGoneError):
        put(thread, Place.on(everywhere, "batch"), everywhere=everywhere)
    if call.startswith("sched_get"):
        assert read_place(thread) is None


def test_a_cpu_that_no_host_has_is_refused(thread: HostThread, everywhere: VcpuMap) -> None:
    first = everywhere.lowest
    with pytest.raises(HostError, match=r"on host CPUs 4000, not even .* cgroup \(/.*\) does not allow 4000"):
        put(thread, Place.on([4000]), everywhere=everywhere)
    with pytest.raises(HostError, match=rf"on host CPUs {first},4000, but only on {first}: its cgroup"):
        put(thread, Place.on([first, 4000]), everywhere=everywhere)
    found = read_place(thread)
    assert found is not None
    assert found.cpus == {first}


def test_a_scheduler_that_did_not_take_effect_is_no_success(
    thread: HostThread, everywhere: VcpuMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: None)
    with pytest.raises(HostError, match="is scheduled as other, not as batch"):
        put(thread, Place.on(everywhere, "batch"), everywhere=everywhere)


# Cgroups.


def test_what_a_cgroup_forbids_is_refused_and_named(thread: HostThread, make_cgroup: MakeCgroup) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        return
    first, second, *_ = sorted(os.sched_getaffinity(0))
    cgroup = make_cgroup("cpuset")
    (cgroup / "cpuset.cpus").write_text(f"{first}")
    (cgroup / "tasks").write_text(f"{thread.tid}")
    with pytest.raises(HostError, match=rf"cgroup \(.*/{cgroup.name}\) does not allow {second}"):
        put(thread, Place.on([second]), everywhere=VcpuMap([first]))
    with pytest.raises(HostError, match=f"{first}-{second}, but only on {first}: its cgroup"):
        put(thread, Place.on([first, second]), everywhere=VcpuMap([first]))
    assert put(thread, Place.on([first]), everywhere=VcpuMap([first])).cpus == {first}


def test_a_thread_that_may_run_on_all_that_its_cgroup_allows_gets_what_it_allows_later(
    sleeper: Sleeper, make_cgroup: MakeCgroup
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        return
    all_cpus = VcpuMap(os.sched_getaffinity(0))
    first = VcpuMap([all_cpus.lowest])
    cgroup = make_cgroup("cpuset")
    other = Sleeper()
    for each in (sleeper, other):
        (cgroup / "tasks").write_text(f"{each.tid}")
    put(other.found, Place(first), everywhere=all_cpus)
    (cgroup / "cpuset.cpus").write_text(str(first))
    put(sleeper.found, Place(first), everywhere=first)
    (cgroup / "cpuset.cpus").write_text(str(all_cpus))
    assert VcpuMap(os.sched_getaffinity(sleeper.tid)) == all_cpus
    assert VcpuMap(os.sched_getaffinity(other.tid)) == first
    other.end()


def test_a_thread_in_a_wider_cgroup_than_the_main_thread_s_gets_no_more_than_was_asked_for(
    thread: HostThread, everywhere: VcpuMap
) -> None:
    first = VcpuMap([everywhere.lowest])
    assert put(thread, Place(first), everywhere=first).cpus == first


def test_a_cgroup_without_time_for_real_time_threads_is_named(
    thread: HostThread, everywhere: VcpuMap, make_cgroup: MakeCgroup
) -> None:
    cgroup = make_cgroup("cpu")
    if not (cgroup / "cpu.rt_runtime_us").exists():
        return
    (cgroup / "tasks").write_text(f"{thread.tid}")
    with pytest.raises(HostError, match=rf"fifo:5: the cgroup of QEMU \(.*/{cgroup.name}\) has no time"):
        put(thread, Place.on(everywhere, "fifo:5"), everywhere=everywhere)


# Permissions.

PUT = """
import sys
from qmpvcpu.errors import HostError
from qmpvcpu.host.threads import find, put
from qmpvcpu.model.placement import Place
from qmpvcpu.model.vcpumap import VcpuMap
pid, tid, cpus, scheduler = sys.argv[1:]
thread = find(int(pid), [int(tid)])[int(tid)]
place = Place.on(cpus, scheduler) if cpus else Place(scheduler=Place.on("0", scheduler).scheduler)
try:
    print(put(thread, place, everywhere=VcpuMap()))
except HostError as error:
    print(error.why)
"""


@pytest.mark.usefixtures("root")
def test_another_user_may_not_move_a_thread_and_is_told_what_would_help(thread: HostThread) -> None:
    said = run(PUT, os.getpid(), thread.tid, "0", "other", before=NOBODY)
    assert said == f"thread {thread.tid} may not be moved: run as QEMU's user, or with CAP_SYS_NICE"


@pytest.mark.usefixtures("root")
def test_the_same_user_may_move_it_and_set_what_its_limits_allow(nobodys: int) -> None:
    assert run(PUT, nobodys, nobodys, "0", "batch", before=NOBODY) == "host CPUs 0, batch"
    said = run(PUT, nobodys, nobodys, "0", "fifo:5", before=NOBODY)
    why = "it needs CAP_SYS_NICE, or a higher QEMU limit (LimitRTPRIO= of its unit, ulimit -r)"
    assert said == f"thread {nobodys} may not be scheduled as fifo:5: {why}"
    assert run(PUT, nobodys, nobodys, "0", "idle", before=NOBODY) == "host CPUs 0, idle"
    said = run(PUT, nobodys, nobodys, "0", "other", before=NOBODY)
    assert said.endswith("it needs CAP_SYS_NICE, or a QEMU limit that allows it (LimitNICE= of its unit)")


def test_a_thread_that_comes_and_goes_is_never_mistaken_for_another(everywhere: VcpuMap) -> None:
    """Threads end while they are found, read and moved: each call says so, or does what it says."""
    end = threading.Event()

    def churn() -> None:
        while not end.is_set():
            short = threading.Thread(target=lambda: None)
            short.start()
            short.join()

    churning = threading.Thread(target=churn)
    churning.start()
    own = {os.getpid(), threading.get_native_id(), churning.native_id}
    try:
        for _ in range(300):
            for each in all_of(os.getpid()):
                if each.tid in own:
                    continue
                read_usage(each)
                found = read_place(each)
                assert found is None or found.cpus == everywhere
                with contextlib.suppress(ThreadGoneError):
                    put(each, Place(everywhere), everywhere=everywhere)
    finally:
        end.set()
        churning.join()
