"""The events of all VMs in one stream, in which none can drown another's."""

import asyncio
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Final, Self

from qmpvcpu.events import Event
from qmpvcpu.vm.subscribers import EventStream

# A subscriber with a backlog takes so many events before it lets the loop read new ones.
_AT_A_TIME: Final = 64


@dataclass(frozen=True, slots=True)
class VmEvent:
    """An event, and whose it is.

    Attributes:
        address: The VM's address.
        name: Its name.
        event: What happened.
    """

    address: str
    name: str
    event: Event


class _Feed:
    """One VM's own stream, bounded by itself."""

    def __init__(self, address: str, name: str, stream: EventStream) -> None:
        self.address = address
        self.name = name
        self.stream = stream
        self.queued = False


class FleetEvents:
    """What ``fleet.events()`` returns: an asynchronous iterator of the events of all VMs, from the call on.

    VMs that are attached later are in it from then on; of one that is lost the last event is ``Disconnected``. Where
    several have events waiting they take turns, one event each, in the order of each. A subscriber that falls behind
    gets, of the VM concerned and no other, one ``LayoutChanged(resync=True)`` in place of what it missed.

    It ends when the fleet is closed, or ``close`` is called; one that is dropped costs nothing any more. Cancelling
    ``anext`` loses nothing.
    """

    def __init__(self) -> None:
        self._feeds: set[_Feed] = set()
        self._ready: deque[_Feed] = deque()
        self._news = asyncio.Event()
        self._closed = False
        self._taken = 0

    def add(self, address: str, name: str, stream: EventStream) -> None:
        """Take a VM in."""
        feed = _Feed(address, name, stream)
        self._feeds.add(feed)
        # Weakly: who drops this object drops the streams with it, and their VMs fill them no more.
        queue, one = weakref.WeakMethod(self._queue), weakref.ref(feed)

        def on_news() -> None:
            if (to_queue := queue()) is not None and (news_of := one()) is not None:
                to_queue(news_of)

        stream.on_news = on_news
        self._queue(feed)  # what attaching found

    def close(self) -> None:
        """End the stream after what it holds; idempotent."""
        self._closed = True
        self._news.set()

    def _queue(self, feed: _Feed) -> None:
        if not feed.queued:
            feed.queued = True
            self._ready.append(feed)
            self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> VmEvent:
        if self._taken >= _AT_A_TIME:
            self._taken = 0
            await asyncio.sleep(0)
        while True:
            while self._ready:
                feed = self._ready.popleft()
                event = feed.stream.take()
                if event is not None:
                    self._ready.append(feed)
                    self._taken += 1
                    return VmEvent(feed.address, feed.name, event)
                feed.queued = False
                if feed.stream.ended:
                    self._feeds.discard(feed)
            if self._closed:
                raise StopAsyncIteration
            self._taken = 0
            self._news.clear()
            await self._news.wait()
