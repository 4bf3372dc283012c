"""Kills what is left in network namespaces when their owner has gone, however that ended.

Run as a program it reads namespaces, one a line, such as ``net:[4026532281]``. At the end of its input, which is when
the owner closes it or dies, it kills every process in them; the kernel removes namespaces that nobody is in. It runs
without the package, so nothing but the standard library is imported here.
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
_LIMIT_S: Final = 10.0  # a process that the kernel holds longer is killed when it comes back


def processes_in(namespaces: Collection[str]) -> set[int]:
    """Return the processes in these network namespaces; those that have ended and were not waited for are in none."""
    found = set()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and _namespace(process) in namespaces:
                found.add(int(process.name))
    return found


def _namespace(process: Path) -> str:
    return str((process / "ns/net").readlink())


def kill_all(namespaces: Collection[str], *, spare: Collection[int] = ()) -> None:
    """Kill every process in these network namespaces but *spare*; blocks until they have ended.

    Also those that are started meanwhile.

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
