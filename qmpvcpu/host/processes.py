"""What this host's kernel says about processes and threads.

A process can choose any name, and the kernel cuts it at 15 bytes, so it may hold any byte or half a character. So
nothing from ``/proc`` is decoded strictly.

Source: proc(5), ``/proc/pid/stat``.
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
_AT_ONCE: Final = 65536  # bytes
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
    parts = []
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # half the time of open(), and there is much to be read
    except OSError:
        return ""
    try:
        while part := os.read(file, _AT_ONCE):
            parts.append(part)
    except OSError:  # it ended meanwhile
        return ""
    finally:
        os.close(file)
    return b"".join(parts).decode(errors="replace")


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
