"""Who asks for the VMs of many hosts: a process with one ``Fleet("nats://...")``, so that its cost is known alone.

It takes lines on its standard input, and answers each with numbers::

    python -m tests.bench.asker URL   ->  (ready)
    count        ->  how many VMs are known
    open         ->  milliseconds, and those of CPU time, to know all VMs in a Fleet of its own; kB of memory it takes
    list         ->  milliseconds, and those of CPU time
    set MAP      ->  milliseconds, and those of CPU time
    listen       ->  (events are heard from now on)
    hear COUNT   ->  how many of so many stops and resumes came, and when the last one did (time.monotonic)
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import AsyncExitStack

from qmpvcpu.events import VmResumed, VmStopped
from qmpvcpu.fleet import Fleet, FleetEvents, Results, VmResult
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import TransitionReport
from tests.bench.helpers import resident_kb, serve
from tests.bench.setting import timed

PATIENCE_S = 10.0  # without an event


class _Asker:
    def __init__(self, url: str, fleet: Fleet) -> None:
        self._url = url
        self._fleet = fleet
        self._events: FleetEvents | None = None

    async def answer(self, words: list[str]) -> Iterable[float]:
        fleet = self._fleet
        match words:
            case ["count"]:
                await fleet.rescan()
                return [len(fleet.addresses)]
            case ["open"]:
                return await _open(self._url)
            case ["list"]:
                return await _costs(_all(fleet.refresh(), fleet))
            case ["set", vcpus]:
                return await _costs(_all(fleet.set_map(vcpus), fleet))
            case ["listen"]:
                self._events = fleet.events()
                await fleet.refresh()  # which begins once events are heard
                return ()
            case ["hear", count] if self._events is not None:
                events, self._events = self._events, None
                return await _hear(events, int(count))
        raise ValueError(words)


async def _main(url: str) -> None:
    async with Fleet(url, reply_timeout=30) as fleet:
        await serve(_Asker(url, fleet).answer)


async def _open(url: str) -> list[float]:
    before = resident_kb([os.getpid()])
    async with AsyncExitStack() as stack:
        took = await _costs(stack.enter_async_context(Fleet(url, reply_timeout=30)))
        return [*took, resident_kb([os.getpid()]) - before]


async def _all(results: Results[Layout] | Results[TransitionReport], fleet: Fleet) -> None:
    came: Sequence[VmResult[object]] = await results
    assert len(came) == len(fleet.addresses)
    for result in came:
        result.unwrap()


async def _costs(work: Awaitable[object]) -> list[float]:
    before = time.process_time()
    return [await timed(work), (time.process_time() - before) * 1000]


async def _hear(events: FleetEvents, count: int) -> list[float]:
    heard, last = 0, time.monotonic()
    try:
        while heard < count:
            async with asyncio.timeout(PATIENCE_S):
                event = await anext(events)
            if isinstance(event.event, VmStopped | VmResumed):
                heard, last = heard + 1, time.monotonic()
    except TimeoutError:
        pass
    events.close()
    return [heard, last]


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
