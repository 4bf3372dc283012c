"""What this host's kernel says about processes and threads.

A process can choose any name, and the kernel cuts it at 15 bytes, so it may hold any byte or half a character. So
nothing from ``/proc`` is decoded strictly.

Source: proc(5), ``/proc/pid/stat``, ``/proc/pid/status``; ``/proc/pid/schedstat``: the kernel's
scheduler/sched-stats.rst.
"""

import os
from collections.abc import Collection
from typing import Final, NamedTuple

# States in which a process answers nobody.
_IDLE: Final = {
    "T": "is stopped (SIGSTOP); SIGCONT lets it go on",
    "t": "is stopped by a debugger",
    "Z": "has ended",
    "X": "has ended",
    "x": "has ended",
    "D": "is blocked in the kernel, as on storage that does not answer",
}
_PF_EXITING: Final = 0x4  # include/linux/sched.h


class ProcessStat(NamedTuple):
    """A process or thread at one moment.

    Attributes:
        name: Its name, at most 15 bytes; bytes that are not text are replaced.
        state: The kernel's letter for its state.
        flags: Its flags, ``PF_`` in the kernel.
        start_ticks: When it started, in clock ticks since boot.
    """

    name: str
    state: str
    flags: int
    start_ticks: int

    @property
    def has_ended(self) -> bool:
        """True if nothing of it but its exit status is left."""
        return self.state in "ZXx"

    @property
    def is_ending(self) -> bool:
        """True if it has begun to end: its sockets may be closed some time before its parent can know."""
        return bool(self.flags & _PF_EXITING)


def read_stat(process: int | str) -> ProcessStat | None:
    """Return what the kernel says about *process*, or None if it is gone or hidden.

    Args:
        process: A process id of this host, or the directory of a thread, such as ``/proc/7/task/8``.
    """
    directory = f"/proc/{process}" if isinstance(process, int) else process
    head, _, tail = read_text(f"{directory}/stat").rpartition(")")  # the name may hold parentheses, and line breaks
    fields = tail.split()
    if not fields:
        return None
    return ProcessStat(head.partition("(")[2], fields[0], int(fields[6]), int(fields[19]))


class RunTime(NamedTuple):
    """How long a thread has run since it began.

    Attributes:
        ns: Time on a CPU, in nanoseconds; what it waited for one is not in it.
        turns: How often it was given a CPU.
    """

    ns: int
    turns: int


def read_run_time(thread: str) -> RunTime | None:
    """Return how long the thread with this directory has run; None if it is gone, or this kernel does not count.

    Source: ``proc_pid_schedstat()`` in the kernel's fs/proc/base.c, which prints ``0 0 0`` where it does not count.
    """
    fields = read_text(f"{thread}/schedstat").split()
    return RunTime(int(fields[0]), int(fields[2])) if len(fields) > 2 and fields[2] != "0" else None  # noqa: PLR2004


def find_threads(pid: int, tids: Collection[int]) -> dict[int, str]:
    """Return the directories of those threads of process *pid* that it calls *tids* itself, by that number.

    In a PID namespace of its own, as in a container, its threads have other numbers there than here. What is gone or
    hidden is left out.

    Source: pid_namespaces(7); proc(5), ``NSpid``.
    """
    tasks = f"/proc/{pid}/task"
    found = {tid: f"{tasks}/{tid}" for tid in tids if _own_number(f"{tasks}/{tid}") == tid}
    if len(found) < len(tids):
        try:
            listed = os.listdir(tasks)  # noqa: PTH208 - pathlib brings urllib
        except OSError:
            listed = []
        for task in listed:
            own = _own_number(f"{tasks}/{task}")
            if own is not None and own in tids:
                found[own] = f"{tasks}/{task}"
    return found


def _own_number(thread: str) -> int | None:
    """Return the number that a thread has in its own PID namespace, None if it is gone or hidden."""
    numbers = [line for line in read_text(f"{thread}/status").splitlines() if line.startswith(("Pid:", "NSpid:"))]
    return int(numbers[-1].split()[-1]) if numbers else None  # NSpid comes last, its innermost number too


def why_idle(pid: int) -> str:
    """Return why *pid* answers nobody, as words that follow its name; "" if it runs, or is not there."""
    stat = read_stat(pid)
    if stat is None:
        return ""
    if stat.state in "DS" and _is_frozen(pid):
        return "is frozen, as a container that was paused; thawing its cgroup lets it go on"
    return _IDLE.get(stat.state, "")


def has_ended(pid: int) -> bool:
    """Return True if *pid* has ended, or is about to; False if it runs, or its state cannot be known."""
    stat = read_stat(pid)
    if stat is not None:
        return stat.has_ended or stat.is_ending
    try:
        os.kill(pid, 0)  # others' processes may be hidden from us: hidepid in proc(5)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _is_frozen(pid: int) -> bool:
    """Return True if the cgroup of *pid* is frozen.

    Source: cgroups(7); the kernel's admin-guide/cgroup-v1/freezer-subsystem.rst and cgroup-v2.rst.
    """
    for line in read_text(f"/proc/{pid}/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and "frozen 1" in read_text(f"/sys/fs/cgroup{path}/cgroup.events").splitlines():
            return True
        state = read_text(f"/sys/fs/cgroup/freezer{path}/freezer.state") if controllers == "freezer" else ""
        if state.strip() in ("FREEZING", "FROZEN"):
            return True
    return False


def read_text(path: str) -> str:
    """Return what is in a file of ``/proc`` or ``/sys``; "" if it is not there, or hidden."""
    try:
        with open(path, errors="replace") as file:  # noqa: PTH123 - pathlib brings urllib
            return file.read()
    except OSError:
        return ""


def read_children(pid: int) -> list[int]:
    """Return the processes that the main thread of *pid* has started and that still are its children."""
    return [int(child) for child in read_text(f"/proc/{pid}/task/{pid}/children").split()]


def find_openers(targets: Collection[str]) -> list[int]:
    """Return the processes that have one of *targets* open, such as ``socket:[123]``; hidden ones are left out."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib brings urllib
        if not name.isdigit():
            continue
        try:
            files = os.listdir(f"/proc/{name}/fd")  # noqa: PTH208 - as above
        except OSError:
            continue
        if any(_link(f"/proc/{name}/fd/{file}") in targets for file in files):
            found.append(int(name))
    return found


def _link(path: str) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - as above
    except OSError:
        return ""
