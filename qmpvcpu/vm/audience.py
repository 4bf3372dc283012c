"""Audience: whoever waits for news of one VM, or is to be told of them as they come."""

import asyncio
import itertools
import weakref
from collections.abc import Callable, Iterable

from qmpvcpu.engine.removal import Removal
from qmpvcpu.events import Event
from qmpvcpu.model.layout import Layout
from qmpvcpu.qmp.monitor import wait_woken, wake
from qmpvcpu.vm.stream import EventStream


class Audience:
    """Streams of events, predicates on the layout, and removals whose end is waited for; one event loop.

    Args:
        look: Returns the layout as known now, which is made only for those who ask.
        early: What happened before anybody could listen: the first stream begins with it.
    """

    def __init__(self, look: Callable[[], Layout], early: list[Event]) -> None:
        self._look = look
        self._early = early
        self._closed = False
        self._streams: set[weakref.ref[EventStream]] = set()
        self._waiters: list[tuple[Callable[[Layout], object], asyncio.Future[None]]] = []
        self._settling: dict[int, list[asyncio.Future[None]]] = {}  # by id() of the removal

    def push(self, event: Event) -> None:
        """Hand *event* to every stream."""
        for stream in self._listening():
            stream.push(event)

    def tell(self, settled: Iterable[Removal]) -> None:
        """Wake whoever waits for what holds of the layout now, or for the end of one of *settled*."""
        for removal in settled:
            for waiting in self._settling.pop(id(removal), ()):
                wake(waiting)
        for predicate, future in self._waiters:
            if not future.done():
                _try(predicate, self._look(), future)

    def close(self, error: Exception) -> None:
        """End every stream, and every wait with *error*: there will be no more news."""
        self._closed = True
        for stream in self._listening():
            stream.close()
        for future in [*(f for _, f in self._waiters), *itertools.chain(*self._settling.values())]:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waited may be gone: not retrieving it is then no fault
        self._waiters.clear()
        self._settling.clear()

    def stream(self) -> EventStream:
        """Return a stream of all events from now on."""
        stream = EventStream()
        early, self._early = self._early, []
        for event in early:
            stream.push(event)
        if self._closed:
            stream.close()
        else:
            self._streams.add(weakref.ref(stream, self._streams.discard))
        return stream

    def _listening(self) -> list[EventStream]:
        """Return the streams that somebody holds."""
        return [stream for held in tuple(self._streams) if (stream := held()) is not None]

    async def wait_for(self, predicate: Callable[[Layout], object], limit: float | None) -> None:
        """Wait until *predicate* is found to hold of the layout as it is told of, at most *limit* seconds.

        Raises:
            TimeoutError: It did not hold.
        """
        entry = (predicate, asyncio.get_running_loop().create_future())
        self._waiters.append(entry)
        try:
            async with asyncio.timeout(limit):
                await entry[1]
        finally:
            if entry in self._waiters:  # not after the end, which clears them all
                self._waiters.remove(entry)

    async def wait_settled(self, removal: Removal, limit: float | None) -> None:
        """Wait until *removal* is told to be settled, at most *limit* seconds."""
        answer = asyncio.get_running_loop().create_future()
        waiting = self._settling.setdefault(id(removal), [])
        waiting.append(answer)
        try:
            await wait_woken(answer, limit)
        finally:
            waiting.remove(answer)


def _try(predicate: Callable[[Layout], object], layout: Layout, future: asyncio.Future[None]) -> None:
    """Settle *future* if *predicate* holds; what it raises is its owner's to see, not the monitor's."""
    try:
        if predicate(layout):
            future.set_result(None)
    except Exception as error:  # noqa: BLE001 - JUSTIFICATION: it is the caller's code, and is handed to the caller
        future.set_exception(error)
