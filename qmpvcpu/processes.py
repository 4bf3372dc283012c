"""What this host's kernel tells of processes and threads.

A process can call itself anything, and the kernel cuts its name at 15 bytes: it may hold any byte, or half of a
character. So nothing of ``/proc`` is decoded strictly.

Source: proc(5), ``/proc/pid/stat``.
"""

from typing import Final, NamedTuple

# States in which a process does nothing for others.
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
        name: What it is called, at most 15 bytes; what is no text is replaced.
        state: The kernel's letter for its state.
        flags: The kernel's flags of it.
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

    @property
    def why_idle(self) -> str:
        """Why it does nothing, as words that follow its name, such as ``is stopped (SIGSTOP)``; "" if it runs."""
        return _IDLE.get(self.state, "")


def read_stat(process: int | str) -> ProcessStat | None:
    """Return what the kernel tells of *process*, or None if it is gone or hidden.

    Args:
        process: A process id of this host, or the directory of a thread, such as ``/proc/7/task/8``.
    """
    directory = f"/proc/{process}" if isinstance(process, int) else process
    try:
        with open(f"{directory}/stat", errors="replace") as file:  # noqa: PTH123 - pathlib brings urllib
            head, _, tail = file.read().rpartition(")")  # the name may hold parentheses, and line breaks
    except OSError:
        return None
    fields = tail.split()
    return ProcessStat(head.partition("(")[2], fields[0], int(fields[6]), int(fields[19]))


def read_children(pid: int) -> list[int]:
    """Return the processes that the main thread of *pid* has started and that still are its children."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123 - as above
            return [int(child) for child in file.read().split()]
    except OSError:
        return []
