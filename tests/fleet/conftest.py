"""The server that the hosts of a test meet at."""

from collections.abc import AsyncIterator

import pytest

from qmpvcpu.bus import Bus
from qmpvcpu.testing.nats import NatsServer
from tests.hosts.world import connected, served


@pytest.fixture
async def server() -> AsyncIterator[NatsServer]:
    async with served() as server:
        yield server


@pytest.fixture
async def bus(server: NatsServer) -> AsyncIterator[Bus]:
    async with connected(server) as bus:
        yield bus
