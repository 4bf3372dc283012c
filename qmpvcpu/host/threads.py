"""QEMU's threads on this host: finding them by the ids that QEMU reports, and putting them in their place.

A thread is always identified together with its start time: another thread may get its id once it has ended.
Nothing here changes a cgroup.

Source: proc(5); sched(7); sched_setaffinity(2); sched_setscheduler(2); pid_namespaces(7), ``NSpid``.
"""

import contextlib
import os
from collections.abc import Collection
from typing import Final, NamedTuple

from qmpvcpu.errors import HostError, ThreadGoneError
from qmpvcpu.host.cgroups import cpus_in, read_cpuset, why_no_realtime
from qmpvcpu.host.files import names_in, read_text
from qmpvcpu.host.processes import read_stat, read_status
from qmpvcpu.model.placement import Place, SchedPolicy, Scheduler
from qmpvcpu.model.vcpumap import VcpuMap

_POLICIES: Final = {
    os.SCHED_OTHER: SchedPolicy.OTHER,
    os.SCHED_BATCH: SchedPolicy.BATCH,
    os.SCHED_IDLE: SchedPolicy.IDLE,
    os.SCHED_FIFO: SchedPolicy.FIFO,
    os.SCHED_RR: SchedPolicy.RR,
}
_NUMBERS: Final = {policy: number for number, policy in _POLICIES.items()}
_NO_CPUS: Final = VcpuMap()
_NS_PER_TICK: Final = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class HostThread(NamedTuple):
    """One thread of one process.

    Attributes:
        directory: Its directory in ``/proc``, such as ``/proc/7/task/8``.
        tid: Its id on this host; QEMU in a container reports another one.
        start_ticks: When it started, in clock ticks since boot.
        name: Its name, at most 15 bytes.
    """

    directory: str
    tid: int
    start_ticks: int
    name: str


class Usage(NamedTuple):
    """What a thread has done since it began.

    Attributes:
        run_ns: Time on a host CPU, in nanoseconds.
        delay_ns: Time ready and waiting for a host CPU, in nanoseconds; None: this kernel does not count it.
        turns: How often it was given a host CPU; None: this kernel does not count it.
        host_cpu: The host CPU it last ran on.
        wait_ns: The waiting time as counted by schedstats, in nanoseconds; None: not asked for, or not counted.
    """

    run_ns: int
    delay_ns: int | None
    turns: int | None
    host_cpu: int
    wait_ns: int | None = None


def find(pid: int, tids: Collection[int]) -> dict[int, HostThread]:
    """Return the threads of process *pid* that have the ids *tids* in its own PID namespace, by these ids.

    In a container its threads have other ids than on this host. Threads that are gone or hidden are left out.
    """
    if len(_numbers(f"/proc/{pid}")) > 1:  # all threads of a process are in one namespace
        own = {numbers[-1]: directory for directory in _directories(pid) if (numbers := _numbers(directory))}
        named = {tid: own[tid] for tid in tids if tid in own}
    else:
        named = {tid: f"/proc/{pid}/task/{tid}" for tid in tids}
    found = {tid: _thread(directory) for tid, directory in named.items()}
    return {tid: thread for tid, thread in found.items() if thread is not None}


def all_of(pid: int) -> list[HostThread]:
    """Return all threads of process *pid*, its main thread first; none if it is gone or hidden."""
    return [thread for directory in _directories(pid) if (thread := _thread(directory)) is not None]


def find_main(pid: int) -> HostThread | None:
    """Return the main thread of process *pid*, or None if it is gone or hidden."""
    return _thread(f"/proc/{pid}/task/{pid}")


def is_there(thread: HostThread) -> bool:
    """Return True if this thread still has its id, and has not ended."""
    now = _thread(thread.directory)
    return now is not None and now.start_ticks == thread.start_ticks


def read_place(thread: HostThread) -> Place | None:
    """Return where a thread may run and how it is scheduled, or None if it is gone.

    The host CPUs are those that are online. A scheduler that ``SchedPolicy`` does not know (deadline) is None.
    """
    try:
        place = _read(thread.tid)
    except ProcessLookupError:
        return None
    return place if is_there(thread) else None


def put(thread: HostThread, place: Place, *, everywhere: VcpuMap = _NO_CPUS) -> Place:
    """Put a thread in its place, and return where it is found afterwards.

    What *place* does not specify stays as it is; so does the nice value. The host CPUs are set first, so that a
    real-time thread never runs elsewhere.

    Args:
        thread: The thread.
        place: Where it is wanted.
        everywhere: All host CPUs that the thread's cgroup allows it: if the thread gets all of them, it also gets
            those that the cgroup allows later. Empty: it only ever gets what is in *place*.

    Raises:
        ThreadGoneError: It has ended. If another thread got its id meanwhile, that thread's place is restored.
        HostError: The kernel refused, or gave it fewer host CPUs than requested. What was set by then stays.
    """
    if not is_there(thread):
        raise ThreadGoneError(thread.tid)
    try:
        before = _read(thread.tid)
        _set(thread, place, everywhere)
        found = _read(thread.tid)
    except ProcessLookupError:
        raise ThreadGoneError(thread.tid) from None
    except HostError:
        if is_there(thread):
            raise
        raise ThreadGoneError(thread.tid) from None
    if not is_there(thread):
        # Where the number is another's by now, it may have been hit.
        with contextlib.suppress(OSError, HostError):
            if not place.differs(_read(thread.tid)):
                _set(thread, before, everywhere)
        raise ThreadGoneError(thread.tid)
    if place.scheduler not in (None, found.scheduler):
        raise HostError(f"thread {thread.tid} is scheduled as {found.scheduler}, not as {place.scheduler}")
    return found


def thread_ids(pid: int) -> list[int]:
    """Return the numbers of all threads of process *pid* on this host; none if it is gone or hidden."""
    return [int(tid) for tid in names_in(f"/proc/{pid}/task")]


def set_affinity(thread: HostThread, cpus: VcpuMap, *, everywhere: VcpuMap = _NO_CPUS) -> None:
    """Pin a thread to these host CPUs, as ``put`` does, but without checking who has its id.

    Raises:
        ProcessLookupError: It has ended.
        HostError: The kernel refused, or would have left it fewer host CPUs: it is where it was, or on those.
    """
    # Also those that may be allowed later: the kernel (6.2 and newer) remembers what was asked for.
    wide = cpus | cpus_in("/sys/devices/system/cpu/possible") if cpus == everywhere else cpus
    try:
        os.sched_setaffinity(thread.tid, wide)
        found = os.sched_getaffinity(thread.tid)
        if cpus not in (found, wide):  # it is allowed more by now
            os.sched_setaffinity(thread.tid, cpus)
            found = os.sched_getaffinity(thread.tid)
    except ProcessLookupError:
        raise
    except PermissionError as error:
        why = "run as QEMU's user, or with CAP_SYS_NICE"
        raise HostError(f"thread {thread.tid} may not be moved: {why}") from error
    except OSError as error:
        raise HostError(_why_not_on(thread, Place(cpus), f"not even on some ({error.strerror})")) from error
    if found != cpus:
        raise HostError(_why_not_on(thread, Place(cpus), f"but only on {VcpuMap(found)}"))


def read_usage(thread: HostThread, *, waits: bool = False) -> Usage | None:
    """Return what a thread has done, or None if it is gone.

    Args:
        thread: The thread.
        waits: True also reads ``wait_ns``: see ``counts_waits``.

    Source: the kernel's scheduler/sched-stats.rst; ``proc_pid_schedstat()`` in fs/proc/base.c, which prints
    ``0 0 0`` where it does not count; ``proc_sched_show_task()`` in kernel/sched/debug.c; proc(5), fields 14, 15 and
    39 of ``/proc/pid/stat``.
    """
    fields = read_text(f"{thread.directory}/stat").rpartition(")")[2].split()
    if not fields or int(fields[19]) != thread.start_ticks:
        return None
    host_cpu = int(fields[36])
    counted = read_text(f"{thread.directory}/schedstat").split()
    if len(counted) != 3 or counted[2] == "0":  # noqa: PLR2004 - the three numbers that are documented
        return Usage((int(fields[11]) + int(fields[12])) * _NS_PER_TICK, None, None, host_cpu)
    wait_ns = _waited(read_text(f"{thread.directory}/sched")) if waits else None
    return Usage(int(counted[0]), int(counted[1]), int(counted[2]), host_cpu, wait_ns)


def counts_waits() -> bool:
    """Return True if the kernel counts what ``Usage.wait_ns`` is: ``sysctl kernel.sched_schedstats=1``."""
    return read_text("/proc/sys/kernel/sched_schedstats").strip() == "1"


def _waited(sched: str) -> int | None:
    """Return the waiting time in ``/proc/pid/sched``, where it is in milliseconds, in nanoseconds.

    Older kernels call it ``se.statistics.wait_sum``.
    """
    for line in sched.splitlines():
        name, _, value = line.partition(":")
        if name.rstrip().endswith("wait_sum"):
            ms, _, parts = value.strip().partition(".")
            return int(ms) * 1_000_000 + int(parts.ljust(6, "0"))
    return None


def _numbers(directory: str) -> list[int]:
    """Return the numbers of a thread in each PID namespace, from that of /proc to its own; none if it is hidden."""
    return [int(number) for number in read_status(directory).get("NSpid", "").split()]


def _directories(pid: int) -> list[str]:
    return [f"/proc/{pid}/task/{tid}" for tid in names_in(f"/proc/{pid}/task")]


def _thread(directory: str) -> HostThread | None:
    stat = read_stat(directory)
    if stat is None or stat.has_ended:
        return None
    return HostThread(directory, int(directory.rpartition("/")[2]), stat.start_ticks, stat.name)


def _read(tid: int) -> Place:
    cpus = VcpuMap(os.sched_getaffinity(tid)) or None  # none for a moment, when its last one goes offline
    policy = _POLICIES.get(os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK)
    priority = os.sched_getparam(tid).sched_priority
    if policy is None:
        return Place(cpus)
    if bool(priority) != policy.is_realtime:
        return _read(tid)  # it changed in between
    return Place(cpus, Scheduler(policy, priority or None))


def _set(thread: HostThread, place: Place, everywhere: VcpuMap) -> None:
    if place.cpus is not None:
        set_affinity(thread, place.cpus, everywhere=everywhere)
    if place.scheduler is not None:
        # The flag stays as it was: only a privileged caller may take it off.
        flag = os.sched_getscheduler(thread.tid) & os.SCHED_RESET_ON_FORK
        number, priority = _NUMBERS[place.scheduler.policy], place.scheduler.priority or 0
        try:
            os.sched_setscheduler(thread.tid, number | flag, os.sched_param(priority))
        except ProcessLookupError:
            raise
        except OSError as error:
            raise HostError(_why_not_so(thread, place.scheduler, error)) from error


def _why_not_on(thread: HostThread, place: Place, instead: str) -> str:
    why = f"thread {thread.tid} cannot run on host CPUs {place.cpus}, {instead}"
    cpuset = read_cpuset(thread.directory)
    if place.cpus and cpuset.cpus and (outside := place.cpus - cpuset.cpus):
        return f"{why}: its cgroup ({cpuset.cgroup}) does not allow {outside}, or they are not online"
    return f"{why}: not all of them are online"


def _why_not_so(thread: HostThread, scheduler: Scheduler, error: OSError) -> str:
    why = f"thread {thread.tid} may not be scheduled as {scheduler}"
    if not isinstance(error, PermissionError):
        return f"{why}: {error.strerror}"
    if not scheduler.policy.is_realtime:
        return f"{why}: it needs CAP_SYS_NICE, or a QEMU limit that allows it (LimitNICE= of its unit)"
    limit = "CAP_SYS_NICE, or a higher QEMU limit (LimitRTPRIO= of its unit, ulimit -r)"
    return f"{why}: {why_no_realtime(thread.directory) or f'it needs {limit}'}"
