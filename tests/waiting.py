"""Waiting for conditions that nothing announces: of code, of files, of processes that are not our children."""

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path


async def until(is_met: Callable[[], object], within: float = 60.0, *, every: float = 0.001) -> None:
    """Wait for a condition, a plain function or a coroutine function; *within* seconds are for a busy machine.

    It is looked at *every* so many seconds: seldom, where looking keeps others from working.
    """
    async with asyncio.timeout(within):
        while True:
            met = is_met()
            if await met if inspect.isawaitable(met) else met:
                return
            await asyncio.sleep(every)


def is_gone(pid: int) -> bool:
    """Whether there is no such process, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
