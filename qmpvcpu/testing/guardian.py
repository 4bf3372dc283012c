"""Kills what is left in network namespaces when their owner ends, however it ends.

As a program, it reads namespaces such as ``net:[4026532281]``, one per line. When its input ends, because the owner
closed it or died, it kills every process in them; the kernel then removes the namespaces. It runs without the
package, so it imports only the standard library.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

_PAUSE_S: Final = 0.005
_LIMIT_S: Final = 10.0  # a process that is stuck in the kernel dies when it comes back


def processes_in(namespaces: Collection[str]) -> set[int]:
    """Return the processes in these network namespaces, without zombies."""
    found = set()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and _namespace(process) in namespaces:
                found.add(int(process.name))
    return found


def _namespace(process: Path) -> str:
    return str((process / "ns/net").readlink())


def kill_all(namespaces: Collection[str], *, spare: Collection[int] = ()) -> None:
    """Kill every process in these network namespaces except *spare*; blocks until they have ended.

    This includes processes that are started meanwhile.

    Raises:
        ValueError: It is our own namespace.
    """
    if _namespace(Path("/proc/self")) in namespaces:
        raise ValueError("these are our own network namespaces")
    deadline = time.monotonic() + _LIMIT_S
    while (found := processes_in(namespaces).difference(spare)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    kill_all({line.strip() for line in sys.stdin})
