import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.errors import MonitorLostError
from qmpvcpu.qmp.monitor import Monitor, Target

Open = Callable[..., Coroutine[Any, Any, Monitor]]


@dataclass
class Heard:
    """What a monitor told us, in order."""

    events: list[Mapping[str, Any]] = field(default_factory=list)
    lost: list[MonitorLostError] = field(default_factory=list)

    @property
    def names(self) -> list[Any]:
        return [event["event"] for event in self.events]


def sockets() -> set[str]:
    """The sockets that this process has open."""
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.add(str(entry.readlink()))
        except FileNotFoundError:  # the folder's own
            continue
    return {link for link in links if link.startswith("socket:")}


async def left_behind(before: set[str]) -> tuple[list[asyncio.Task[Any]], set[str]]:
    """The tasks that run, and the sockets that are open and were not *before*, once they have had time to end."""
    current = asyncio.current_task()
    for _ in range(100):
        left = [task for task in asyncio.all_tasks() if task is not current], sockets() - before
        if not any(left):
            break
        await asyncio.sleep(0.01)
    return left


@pytest.fixture(autouse=True)
async def nothing_leaks() -> AsyncIterator[None]:
    """Every test ends with the tasks and sockets that it began with."""
    before = sockets()
    yield
    assert await left_behind(before) == ([], set())


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def connect(heard: Heard) -> AsyncIterator[Open]:
    """Open monitors, and close them after the test."""
    opened: list[Monitor] = []

    async def _open(target: Target, within: float = 30) -> Monitor:
        monitor = await Monitor.open(target, timeout=within, on_event=heard.events.append, on_lost=heard.lost.append)
        opened.append(monitor)
        return monitor

    yield _open
    for monitor in opened:
        await monitor.close()
