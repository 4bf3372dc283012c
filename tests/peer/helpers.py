"""What several files of these tests need."""

import asyncio
from collections.abc import Callable


async def until(is_met: Callable[[], object], within: float = 5.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(within):
        while not is_met():
            await asyncio.sleep(0.001)
