"""Which process of this host is the QEMU at the other end of a QMP connection: proven, never guessed.

QEMU reports the ids of its vCPU threads. Another process may have opened its socket: libvirt, systemd or a launcher
opens it and passes it on, and a program such as socat forwards from another host. Thread ids alone prove nothing,
because containers reuse the same ones; so QEMU is the process that has these threads, and opened the socket or holds
the connection.

Source: proc(5), ``/proc/pid/fd``; pid_namespaces(7); unix(7), SO_PEERCRED.
"""

import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

from qmpvcpu.host.files import read_link
from qmpvcpu.host.processes import read_stat, read_status
from qmpvcpu.host.sockets import has_open, openers
from qmpvcpu.host.threads import find


class Found(NamedTuple):
    """The process that is QEMU, or why it is not known.

    Attributes:
        pid: Its process id here, or None.
        why: Why it is not known, as a sentence without a full stop, or "".
    """

    pid: int | None
    why: str = ""


def find_qemu(peer_pid: int | None, tids: Collection[int], *, connection: int | None = None) -> Found:
    """Return the process whose threads QEMU calls *tids*.

    If the process that opened the socket is not QEMU, it checks what others have open, which takes a few
    milliseconds on a busy host.

    Args:
        peer_pid: The process that opened QEMU's socket, from ``address.peer_pid``; None: unknown.
        tids: The vCPU threads, by the ids that QEMU reports (``query-cpus-fast``).
        connection: The socket at QEMU's end, from ``sockets.peer_inode``; None: unknown.
    """
    why = _why_other_proc() if tids else "QEMU has not named any vCPU thread yet"
    if why:
        return Found(None, why)
    if peer_pid is not None and _has_all(peer_pid, tids):
        return Found(peer_pid)
    owner = _owner(min(tids))
    likely = owner if owner is not None and _has_all(owner, tids) else None
    if likely is not None and connection and has_open(likely, connection):
        return Found(likely)
    # It is enough to see one that has opened the socket itself; we may have kept what we handed on.
    passes_on = peer_pid not in (None, os.getpid()) and connection and has_open(peer_pid or 0, connection)
    holders = [peer_pid or 0] if passes_on else openers([connection or 0])
    having = [pid for pid in holders if _has_all(pid, tids)]
    if len(having) == 1:
        return Found(having[0])
    if holders:
        return Found(None, _why_passed_on(holders, having, tids))
    return Found(None, _why_hidden(peer_pid, likely, tids) if connection or peer_pid else _why_elsewhere(likely))


def _has_all(pid: int, tids: Collection[int]) -> bool:
    """Return True if all of *tids* are threads of process *pid*, and none is its main thread, which runs no vCPU."""
    found = find(pid, tids)
    return len(found) == len({*tids}) and all(thread.tid != pid for thread in found.values())


def _owner(tid: int) -> int | None:
    """Return the process that has a thread with this number here."""
    owner = read_status(f"/proc/{tid}").get("Tgid", "")
    return int(owner) if owner else None


def _why_other_proc() -> str:
    ourselves = read_link("/proc/self")
    if not ourselves:
        return "/proc is not mounted here, so QEMU's threads cannot be found"
    if ourselves != str(os.getpid()):
        return "/proc belongs to another PID namespace: mount the one of this process"
    return ""


def _why_passed_on(holders: list[int], having: list[int], tids: Collection[int]) -> str:
    if having:
        return f"{_listed(having)} all have these threads, and hold QEMU's end of the connection"
    why = f"has the other end of the connection, but no thread {min(tids)}: it is not QEMU itself"
    return f"{_listed(holders)} {why}; connect to QEMU's own socket, on QEMU's host"


def _why_elsewhere(likely: int | None) -> str:
    advice = "connect over a UNIX socket, on QEMU's host"
    if likely is None:
        return f"it is not known which process is QEMU: {advice}"
    return f"{_listed([likely])} has such threads, but nothing proves that it is this QEMU: {advice}"


def _why_hidden(peer_pid: int | None, likely: int | None, tids: Collection[int]) -> str:
    if likely is not None:
        return f"{_listed([likely])} has such threads, but only its user and root can see whether it is this QEMU"
    if peer_pid is None:
        return f"no process that we can see has the other end of the connection: {_where_to_look_from()}"
    if read_stat(peer_pid) is None:
        hidden = "has ended, or is hidden from us (/proc with hidepid): run as its user or as root"
        return f"pid {peer_pid}, which opened the socket, {hidden}"
    elsewhere = "it is not QEMU itself, and only QEMU's user and root can see which process is"
    return f"{_listed([peer_pid])}, which opened the socket, has no thread {min(tids)}: {elsewhere}"


def _where_to_look_from() -> str:
    share = "share QEMU's PID namespace (--pid=host, shareProcessNamespace)"
    if os.geteuid() == 0:
        return f"QEMU runs outside of this container; run on its host, or {share}"
    return f"run as QEMU's user or as root; in a container, {share}"


def _listed(pids: Iterable[int]) -> str:
    named = ((pid, read_stat(pid)) for pid in sorted(pids))
    return ", ".join(f"pid {pid}" if stat is None else f"pid {pid} ({stat.name})" for pid, stat in named)
