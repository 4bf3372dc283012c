"""Event streams: bounded, and never silently short of an event."""

import asyncio
from collections import deque
from typing import Self

from qmpvcpu.model import Event, LayoutChanged

__all__ = ["EventStream"]

# A full plug-and-unplug of the largest machine (4096 vCPUs, four events each) fits twice.
_CAPACITY = 32768


class EventStream:
    """What ``vm.events()`` returns: an asynchronous iterator of events, from the call on.

    A subscriber that falls more than the capacity behind gets one ``LayoutChanged(resync=True)`` in place of all
    that it missed, and goes on from there. The stream ends after ``Disconnected``, or when the VM is closed.
    One task may iterate at a time. Cancelling ``anext`` loses nothing.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._queue: deque[Event] = deque()
        self._capacity = capacity
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def push(self, event: Event) -> None:
        """Append *event*; on overflow, a resync takes the place of what was not read."""
        if len(self._queue) >= self._capacity:
            self._queue.clear()
            self._queue.append(LayoutChanged(generation=event.generation, resync=True))
        self._queue.append(event)
        self._wake()

    def close(self) -> None:
        """End the stream after what it holds; idempotent."""
        self._closed = True
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._queue.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
