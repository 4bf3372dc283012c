from collections.abc import AsyncIterator, Callable

import pytest

from qmpvcpu.agent.door import GuestAgent
from qmpvcpu.qmp.monitor import Target
from tests.peer.conftest import left_behind, sockets

Asking = Callable[..., GuestAgent]


@pytest.fixture(autouse=True)
async def nothing_leaks() -> AsyncIterator[None]:
    """Every test ends with the tasks and sockets that it began with."""
    before = sockets()
    yield
    assert await left_behind(before) == ([], set())


@pytest.fixture
async def asking() -> AsyncIterator[Asking]:
    """Make doors to an agent, and close them after the test."""
    made: list[GuestAgent] = []

    def make(target: Target, within: float = 30.0) -> GuestAgent:
        made.append(GuestAgent(target, timeout=within))
        return made[-1]

    yield make
    for door in made:
        await door.close()
