"""Subscribers: the streams of events, and the waits for what the layout becomes."""

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from typing import Self

from qmpvcpu.errors import MonitorLostError
from qmpvcpu.events import Event, LayoutChanged
from qmpvcpu.model.layout import Layout

# A full plug-and-unplug of the largest machine (4096 vCPUs, four events each) fits twice.
_CAPACITY = 32768


def check_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Return if *loop*, in which the VM was attached, is the one that runs here.

    Raises:
        RuntimeError: It is not.
    """
    if asyncio.get_running_loop() is not loop:
        raise RuntimeError(
            "this VM was attached in another event loop, and asyncio's objects work only in their own: call it there"
            " (asyncio.run_coroutine_threadsafe), or attach in this one"
        )


class EventStream:
    """What ``vm.events()`` returns: an asynchronous iterator of events, from the call on.

    A subscriber that falls more than the capacity behind gets one ``LayoutChanged(resync=True)`` in place of all
    that it missed, and goes on from there. The stream ends after ``Disconnected``, or when the VM is closed.
    One task may wait at a time: another gets RuntimeError. Cancelling ``anext`` loses nothing.

    Attributes:
        on_news: Called when an event can be taken, or the stream has ended; None: nothing is called. For a reader of
            many streams, which cannot wait for each.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, capacity: int = _CAPACITY) -> None:
        self._loop = loop
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
        check_loop(self._loop)
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            if self._waiter is not None and not self._waiter.done():
                raise RuntimeError("another task waits for this stream already: give each its own, from vm.events()")
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._queue.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self.on_news is not None:
            self.on_news()


class Subscribers:
    """Streams of events, and predicates on the layout; one event loop.

    Args:
        early: What happened before anybody could listen: the first stream begins with it.
        loop: The event loop of all this.
    """

    def __init__(self, early: list[Event], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._early = early
        self._closed = False
        self._streams: set[weakref.ref[EventStream]] = set()
        self._waiters: list[tuple[Callable[[Layout], object], asyncio.Future[Layout]]] = []

    def stream(self) -> EventStream:
        """Return a stream of all events from now on."""
        stream = EventStream(self._loop)
        early, self._early = self._early, []
        for event in early:
            stream.push(event)
        if self._closed:
            stream.close()
        else:
            self._streams.add(weakref.ref(stream, self._streams.discard))
        return stream

    async def wait_for(self, predicate: Callable[[Layout], object], limit: float | None) -> Layout:
        """Wait until *predicate* holds for the layout, at most *limit* seconds, and return that layout.

        Raises:
            TimeoutError: It did not hold.
            MonitorLostError: The connection was lost for good.
        """
        future: asyncio.Future[Layout] = self._loop.create_future()
        entry = (predicate, future)
        self._waiters.append(entry)
        try:
            async with asyncio.timeout(limit):
                return await future
        finally:
            if entry in self._waiters:  # not after the end, which clears them all
                self._waiters.remove(entry)

    def push(self, event: Event) -> None:
        """Append *event* to every stream that is still in use."""
        for held in tuple(self._streams):
            if (stream := held()) is not None:
                stream.push(event)

    @property
    def are_waiting(self) -> bool:
        """True while somebody waits for the layout to change."""
        return bool(self._waiters)

    def tell(self, layout: Layout) -> None:
        """Wake those who wait for what *layout* is."""
        for predicate, future in tuple(self._waiters):
            if not future.done():
                _try(predicate, layout, future)

    def close(self, error: MonitorLostError) -> None:
        """End every stream, and every wait with *error*: there will be no more news."""
        self._closed = True
        for held in tuple(self._streams):
            if (stream := held()) is not None:
                stream.close()
        for _, future in self._waiters:
            if not future.done():
                future.set_exception(error)
                future.exception()  # the waiter may be gone, and asyncio would report it
        self._waiters.clear()


def _try(predicate: Callable[[Layout], object], layout: Layout, future: asyncio.Future[Layout]) -> None:
    """Settle *future* if *predicate* holds, or with what it raises: that is for its caller, not the driver."""
    try:
        if predicate(layout):
            future.set_result(layout)
    except StopIteration as error:  # which no future takes
        future.set_exception(RuntimeError(f"the predicate raised {error!r}"))
    except asyncio.CancelledError:
        future.cancel()
    except Exception as error:  # noqa: BLE001 -- it is the caller's code, and is handed to the caller
        future.set_exception(error)
