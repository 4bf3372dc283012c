"""The events of all VMs in one stream, in which none can drown another's."""

import asyncio
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from qmpvcpu.events import Event
from qmpvcpu.fleet.told import MapState, Told
from qmpvcpu.vm.subscribers import EventStream

if TYPE_CHECKING:
    from qmpvcpu.vm.controller import VcpuController

# A subscriber with a backlog takes so many events before it lets the loop read new ones.
_AT_A_TIME: Final = 64


@dataclass(frozen=True, slots=True)
class VmEvent:
    """An event, and whose it is.

    Attributes:
        address: The VM's address.
        name: Its name.
        event: What happened.
        at: When, in seconds since 1970: by the server's clock; for a VM of this host, when it is taken from the
            stream.
        state: What was known of the VM then; None: the event does not say.
    """

    address: str
    name: str
    event: Event
    at: float
    state: MapState | None


class _Feed:
    """One VM's own stream, bounded by itself."""

    def __init__(self, address: str, name: str, stream: EventStream, vm: "VcpuController | None") -> None:
        self._address = address
        self._name = name
        self._vm = vm
        self.stream = stream
        self.queued = False

    def take(self) -> VmEvent | None:
        """Return the next event, None if there is none now."""
        event = self.stream.take()
        if event is None:
            return None
        if isinstance(event, Told):
            return VmEvent(self._address, self._name, event.event, event.at, event.state)
        state = None if self._vm is None else MapState.of(self._vm.layout)
        return VmEvent(self._address, self._name, event, time.time(), state)


class FleetEvents:
    """What ``fleet.events()`` returns: an asynchronous iterator of the events of all VMs, from the call on.

    VMs that are attached later are in it from then on; of one that is lost the last event is ``Disconnected``. Where
    several have events waiting they take turns, one event each, in the order of each. A subscriber that falls behind
    gets, of the VM concerned and no other, one ``LayoutChanged(resync=True)`` in place of what it missed.

    It ends when the fleet is closed, or ``close`` is called, or with an error if the server refuses to tell more; one
    that is dropped costs nothing any more. Cancelling ``anext`` loses nothing.
    """

    def __init__(self) -> None:
        self._feeds: set[_Feed] = set()
        self._ready: deque[_Feed] = deque()
        self._news = asyncio.Event()
        self._closed = False
        self._error: BaseException | None = None
        self._taken = 0

    def add(self, address: str, name: str, stream: EventStream, vm: "VcpuController | None" = None) -> None:
        """Take a VM in; *vm*: it is here, and tells what is known of it."""
        feed = _Feed(address, name, stream, vm)
        self._feeds.add(feed)
        # Weakly: who drops this object drops the streams with it, and their VMs fill them no more.
        queue, one = weakref.WeakMethod(self._queue), weakref.ref(feed)

        def on_news() -> None:
            if (to_queue := queue()) is not None and (news_of := one()) is not None:
                to_queue(news_of)

        stream.on_news = on_news
        self._queue(feed)  # what attaching found

    def close(self, error: BaseException | None = None) -> None:
        """End the stream after what it holds, by *error* if there is one; idempotent."""
        self._error = self._error or error
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
                event = feed.take()
                if event is not None:
                    self._ready.append(feed)
                    self._taken += 1
                    return event
                feed.queued = False
                if feed.stream.ended:
                    self._feeds.discard(feed)
            if self._closed:
                raise self._error or StopAsyncIteration
            self._taken = 0
            self._news.clear()
            await self._news.wait()
