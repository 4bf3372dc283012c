"""What this host's kernel says about processes and threads.

Source: proc(5), ``/proc/pid/stat`` and ``/proc/pid/status``.
"""

import os
from typing import Final, NamedTuple

from qmpvcpu.host.files import names_in, read_text

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


def is_suspended(pid: int) -> bool:
    """Tell whether no thread of a process runs any more; a stop meets one after the other."""
    stats = (read_stat(f"/proc/{pid}/task/{thread}") for thread in names_in(f"/proc/{pid}/task"))
    return all(stat is None or stat.state in "TtZXx" for stat in stats)


def network_namespace(pid: int) -> str:
    """Return the path of a process's network namespace: a link to its name, such as ``net:[4026532281]``."""
    return f"/proc/{pid}/ns/net"


def read_status(directory: str) -> dict[str, str]:
    """Return the fields of ``/proc/pid/status`` of a process or thread by name, none if it is gone or hidden."""
    lines = read_text(f"{directory}/status").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def why_idle(pid: int) -> str:
    """Return why *pid* answers nobody, as words that follow its name; "" if it runs, or is not there."""
    stat = read_stat(pid)
    if stat is None:
        return ""
    if stat.state in "DS" and _is_frozen(pid):
        return "is frozen, as a container that was paused; thawing its cgroup lets it go on"
    return _IDLE.get(stat.state, "")


def _is_frozen(pid: int) -> bool:
    from qmpvcpu.host.cgroups import is_frozen  # not at the top: every command imports this, and few meet such a QEMU

    return is_frozen(pid)


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


def read_children(pid: int) -> list[int]:
    """Return the processes that the main thread of *pid* has started and that still are its children."""
    return [int(child) for child in read_text(f"/proc/{pid}/task/{pid}/children").split()]
