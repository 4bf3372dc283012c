"""What a guest is doing while it takes its time, told on standard error from the VM's events alone."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Final

from rich.console import Console

from qmpvcpu import EventStream, VcpuController
from qmpvcpu.model import (
    Event,
    UnplugAcknowledged,
    UnplugRefused,
    UnplugRequested,
    VcpuPlugged,
    VcpuUnplugged,
    VmReset,
    VmResumed,
    VmStopped,
)

__all__ = ["progress", "sentence"]

# A guest that answers sooner needs no commentary.
_QUIET_S = 0.4
_TICK_S = 0.1

_SENTENCES: Final[Mapping[type[Event], str]] = {
    VcpuPlugged: "vCPU {event.ids} is plugged",
    UnplugRequested: "vCPU {event.ids}: the guest is asked, and has not reacted yet",
    UnplugAcknowledged: "vCPU {event.ids}: the guest works on it",
    UnplugRefused: "vCPU {event.ids}: the guest refused: {event.reason}",
    VcpuUnplugged: "vCPU {event.ids} is gone",
    VmStopped: "the VM is paused: the guest answers when it runs again",
    VmResumed: "the VM runs again",
    VmReset: "the VM was reset: what is pending stays so",
}


@contextlib.asynccontextmanager
async def progress(vm: VcpuController, console: Console, *, wanted: str) -> AsyncIterator[None]:
    """Say what *vm*'s guest does for as long as the body runs; *wanted* is what the body waits for."""
    narrator = _Narrator(console, wanted)
    tasks = [asyncio.create_task(narrator.listen(vm.events())), asyncio.create_task(narrator.show())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sentence(event: Event) -> str | None:
    """Return what *event* means to somebody who waits, or None if it is nothing to them."""
    template = _SENTENCES.get(type(event))
    return None if template is None else template.format(event=event)


class _Narrator:
    """Keeps the last thing that happened, and shows it: one live line on a terminal, else a line for each."""

    def __init__(self, console: Console, wanted: str) -> None:
        self._console = console
        self._now = wanted

    async def listen(self, events: EventStream) -> None:
        async for event in events:
            self._now = sentence(event) or self._now

    async def show(self) -> None:
        started = time.monotonic()
        await asyncio.sleep(_QUIET_S)
        if not self._console.is_terminal:
            await self._show_lines(started)
        with self._console.status("") as status:
            while True:
                status.update(f"{self._now} ({time.monotonic() - started:.1f} s)")
                await asyncio.sleep(_TICK_S)

    async def _show_lines(self, started: float) -> None:
        shown = ""
        while True:
            if self._now != shown:
                shown = self._now
                self._console.print(f"{time.monotonic() - started:5.1f} s  {shown}", soft_wrap=True)
            await asyncio.sleep(_TICK_S)
