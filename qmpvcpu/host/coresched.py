"""Core scheduling: the threads of one group share no core with other programs.

Source: the kernel's admin-guide/hw-vuln/core-scheduling.rst; ``sched_core_share_pid()`` in kernel/sched/core_sched.c.
"""

import errno
import threading
from collections.abc import Iterable
from typing import Final

from qmpvcpu.errors import HostError, ThreadGoneError
from qmpvcpu.host.threads import HostThread, is_there

# include/uapi/linux/prctl.h
_PR_SCHED_CORE: Final = 62
_GET: Final = 0
_CREATE: Final = 1
_SHARE_TO: Final = 2
_SHARE_FROM: Final = 3
_THIS_THREAD: Final = 0
_ONE_THREAD: Final = 0  # the scope

_WHY: Final = {
    errno.EINVAL: "this kernel has no core scheduling (CONFIG_SCHED_CORE)",
    errno.ENODEV: "SMT is off on this host, so its cores run one thread at a time and core scheduling has no use",
    errno.EPERM: "we may not group QEMU's threads: run as QEMU's user, or with CAP_SYS_PTRACE",
}


def why_not_core_scheduling() -> str:
    """Return why this kernel has no core scheduling, or ""."""
    try:
        _prctl(_GET, _THIS_THREAD)
    except OSError as error:
        return _why(error)
    return ""


def share_core(member: HostThread, others: Iterable[HostThread]) -> None:
    """Put *others* in the group of *member*, creating the group if there is none.

    Only a thread in the group can pass it on, so a thread of our own joins it, and then ends.

    Raises:
        ThreadGoneError: One has ended. Those before it are in the group.
        HostError: The kernel refused.
    """
    failed: list[HostError] = []

    def hand_on() -> None:
        try:
            if not _ask(_GET, member):
                _ask(_CREATE, member)
            _ask(_SHARE_FROM, member)
            for thread in others:
                _ask(_SHARE_TO, thread)
        except HostError as error:
            failed.append(error)

    messenger = threading.Thread(target=hand_on, name="share_core")
    messenger.start()
    messenger.join()
    if failed:
        raise failed[0]


def _ask(operation: int, thread: HostThread) -> int:
    if not is_there(thread):
        raise ThreadGoneError(thread.tid)
    try:
        answer = _prctl(operation, thread.tid)
    except ProcessLookupError:
        raise ThreadGoneError(thread.tid) from None
    except OSError as error:
        raise HostError(f"thread {thread.tid} cannot share a core: {_why(error)}") from error
    if not is_there(thread):
        raise ThreadGoneError(thread.tid)
    return answer


def _why(error: OSError) -> str:
    return _WHY.get(error.errno or 0, error.strerror or str(error))


def _prctl(operation: int, tid: int) -> int:
    """Return the group of a thread if the operation is to get it, 0 if it is another one.

    Raises:
        OSError: The kernel refused.
    """
    import ctypes  # takes as long as a plug

    cookie = ctypes.c_ulonglong()
    wanted = ctypes.byref(cookie) if operation == _GET else None
    arguments = (ctypes.c_ulong(operation), ctypes.c_ulong(tid), ctypes.c_ulong(_ONE_THREAD), wanted)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SCHED_CORE, *arguments):
        raise OSError(ctypes.get_errno(), "prctl")
    return cookie.value
