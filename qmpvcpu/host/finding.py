"""Which process of this host is the QEMU at the other end of a QMP connection: proven, never guessed.

QEMU tells the numbers of its vCPU threads. The process that opened its socket may be another one: libvirt, systemd or
a launcher opens it and hands it on, and a program such as socat passes on what another host says. Numbers alone prove
nothing, since in containers the same ones are used again and again.

Source: proc(5), ``/proc/pid/fd``; pid_namespaces(7); unix(7), SO_PEERCRED.
"""

import os
from collections.abc import Collection
from typing import NamedTuple

from qmpvcpu.host.processes import find_openers, read_stat
from qmpvcpu.host.threads import find


class Found(NamedTuple):
    """The process that is QEMU, or why it is not known.

    Attributes:
        pid: Its process id here, or None.
        why: Why it is not known, or "".
    """

    pid: int | None
    why: str = ""


def find_qemu(peer_pid: int | None, tids: Collection[int], *, connection: int | None = None) -> Found:
    """Return the process whose threads QEMU calls *tids*.

    Args:
        peer_pid: The process that opened QEMU's socket, as ``address.peer_pid`` tells it; None where nothing tells.
        tids: The vCPU threads, by QEMU's own numbers (``query-cpus-fast``).
        connection: The inode of QEMU's end of the connection, where it is known: who has it open is QEMU. Looking for
            it takes a millisecond for each 100 processes, and only if *peer_pid* is not QEMU.
    """
    if not tids:
        return Found(None, "QEMU has told of no vCPU thread yet")
    if why := _why_other_proc():
        return Found(None, why)
    if peer_pid is not None and _has_all(peer_pid, tids):
        return Found(peer_pid)
    openers = [] if connection is None else find_openers([f"socket:[{connection}]"])
    found = [pid for pid in openers if _has_all(pid, tids)]
    if len(found) == 1:
        return Found(found[0])
    if found:
        return Found(None, f"processes {_listed(found)} all have such threads, and the connection: one is QEMU")
    return Found(None, _why_unknown(peer_pid, openers, tids))


def _has_all(pid: int, tids: Collection[int]) -> bool:
    """Return True if all of *tids* are threads of process *pid*, and none is its main thread, which runs no vCPU."""
    found = find(pid, tids)
    return len(found) == len({*tids}) and all(thread.tid != pid for thread in found.values())


def _why_other_proc() -> str:
    try:
        ourselves = os.readlink("/proc/self")  # noqa: PTH115 - pathlib brings urllib
    except OSError:
        return "/proc is not mounted here, so no thread can be found"
    if ourselves != str(os.getpid()):
        return "/proc is that of another PID namespace than ours, so the threads in it have other numbers for us"
    return ""


def _why_unknown(peer_pid: int | None, openers: list[int], tids: Collection[int]) -> str:
    if openers:
        return f"{_listed(openers)} passes the connection on, and has no thread {min(tids)}: QEMU is another process"
    if peer_pid is None:
        return "nothing tells which process is QEMU: connect over a UNIX socket, on QEMU's host"
    if read_stat(peer_pid) is None:
        hidden = "is hidden from us (/proc with hidepid: run as its user or as root)"
        return f"the process that opened the socket, {_listed([peer_pid])}, has ended or {hidden}"
    why = "and who QEMU is can only be seen by root or QEMU's user"
    return f"{_listed([peer_pid])}, which opened the socket, has no thread {min(tids)}: it is not QEMU itself, {why}"


def _listed(pids: list[int]) -> str:
    return ", ".join(f"pid {pid}" + (f" ({stat.name})" if (stat := read_stat(pid)) else "") for pid in sorted(pids))
