"""What this host's kernel says about processes and threads.

A process can choose any name, and the kernel cuts it at 15 bytes, so it may hold any byte or half a character. So
nothing from ``/proc`` is decoded strictly.

Source: proc(5), ``/proc/pid/stat``.
"""

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
    head, _, tail = _read(f"{directory}/stat").rpartition(")")  # the name may hold parentheses, and line breaks
    fields = tail.split()
    if not fields:
        return None
    return ProcessStat(head.partition("(")[2], fields[0], int(fields[6]), int(fields[19]))


def why_idle(pid: int) -> str:
    """Return why *pid* answers nobody, as words that follow its name; "" if it runs, or is not there."""
    stat = read_stat(pid)
    if stat is None:
        return ""
    if stat.state in "DS" and _is_frozen(pid):
        return "is frozen, as a container that was paused; thawing its cgroup lets it go on"
    return _IDLE.get(stat.state, "")


def _is_frozen(pid: int) -> bool:
    """Return True if the cgroup of *pid* is frozen.

    Source: cgroups(7); the kernel's admin-guide/cgroup-v1/freezer-subsystem.rst and cgroup-v2.rst.
    """
    for line in _read(f"/proc/{pid}/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and "frozen 1" in _read(f"/sys/fs/cgroup{path}/cgroup.events").splitlines():
            return True
        state = _read(f"/sys/fs/cgroup/freezer{path}/freezer.state") if controllers == "freezer" else ""
        if state.strip() in ("FREEZING", "FROZEN"):
            return True
    return False


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:  # noqa: PTH123 - pathlib brings urllib
            return file.read()
    except OSError:
        return ""


def read_children(pid: int) -> list[int]:
    """Return the processes that the main thread of *pid* has started and that still are its children."""
    return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]
