"""Waiting, at the least cost: `asyncio.wait` does the same and wakes its caller a step of the loop later.

That counts where a VM is attached with a dozen queries, and where each vCPU of a map has its answer.
"""

import asyncio
from typing import Any


def wake(waiting: asyncio.Future[None]) -> None:
    """Have whoever waits for *waiting* go on; once is enough."""
    if not waiting.done():
        waiting.set_result(None)


async def wait_woken(waiting: asyncio.Future[None], limit: float | None) -> None:
    """Wait for *waiting*, the caller's alone, to be woken, at most *limit* seconds."""
    alarm = None if limit is None else waiting.get_loop().call_later(limit, wake, waiting)
    try:
        await waiting
    finally:
        if alarm is not None:
            alarm.cancel()


async def wait_ended(task: asyncio.Task[Any], limit: float) -> bool:
    """Wait for *task* to end, at most *limit* seconds, and return whether it has; being cancelled does not end it."""
    ended = task.get_loop().create_future()
    task.add_done_callback(lambda _: wake(ended))
    await wait_woken(ended, limit)
    return task.done()
