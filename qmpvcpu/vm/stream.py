"""Event streams: bounded, and never silently short of an event."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Self

from qmpvcpu.events import Event, LayoutChanged

if TYPE_CHECKING:
    from collections.abc import Callable

# A full plug-and-unplug of the largest machine (4096 vCPUs, four events each) fits twice.
_CAPACITY = 32768


class EventStream:
    """What ``vm.events()`` returns: an asynchronous iterator of events, from the call on.

    A subscriber that falls more than the capacity behind gets one ``LayoutChanged(resync=True)`` in place of all
    that it missed, and goes on from there. The stream ends after ``Disconnected``, or when the VM is closed.
    One task may iterate at a time. Cancelling ``anext`` loses nothing.

    Attributes:
        on_news: Called when there is something to take, or the end has come; None: nobody is. For who takes from many
            streams, and cannot wait for each.
    """

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._queue: deque[Event] = deque()
        self._capacity = capacity
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self.on_news: Callable[[], None] | None = None

    @property
    def ended(self) -> bool:
        """True once all is taken and nothing follows."""
        return self._closed and not self._queue

    def take(self) -> Event | None:
        """Return the next event, None if there is none now."""
        return self._queue.popleft() if self._queue else None

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
        if self.on_news is not None:
            self.on_news()
