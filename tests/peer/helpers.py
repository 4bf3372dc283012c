"""What several files of these tests need."""

import asyncio
from collections.abc import Callable


async def until(is_met: Callable[[], object], within: float = 5.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(within):
        while not is_met():  # noqa: ASYNC110 - the condition is of code that has no event for us
            await asyncio.sleep(0.001)
