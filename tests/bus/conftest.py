"""Real NATS servers, and connections that end with the test."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.testing.nats import NatsCluster, NatsServer, find_nats
from qmpvcpu.testing.qemu import cache_directory

DEBIAN = cache_directory() / "nats-server" / "usr" / "sbin" / "nats-server"


def debian() -> Path:
    """Return Debian's server, as fixtures/install.sh has unpacked it."""
    if not DEBIAN.exists():
        pytest.skip("no old NATS server here: fixtures/install.sh tests unpacks Debian's")
    return DEBIAN


@pytest.fixture(params=["newest", "debian"])
def binary(request: pytest.FixtureRequest) -> Path:
    """The server of the wheel, and that of Debian."""
    return debian() if request.param == "debian" else find_nats()


class Connect(Protocol):
    """Connects to a server; the connection ends with the test."""

    async def __call__(self, url: str, **options: Any) -> Bus: ...


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def connected(url: str, *, name: str = "test", **options: Any) -> Bus:
            files = {key: options.pop(key) for key in list(options) if key not in ("timeout", "on_lost", "on_back")}
            bus = await Bus.connect(ServerAddress(url, **files), name=name, **options)
            return await stack.enter_async_context(bus)

        yield connected


@pytest.fixture
async def server(binary: Path) -> AsyncIterator[NatsServer]:
    """A server of each version."""
    async with NatsServer(binary=binary) as running:
        yield running


@pytest.fixture
async def bus(server: NatsServer, connect: Connect) -> Bus:
    """A connection to it; the buckets are there, and leases are short."""
    bus = await connect(server.url)
    await bus.prepare(lease_s=2.0)
    return bus


@pytest.fixture
async def cluster() -> AsyncIterator[NatsCluster]:
    """Three servers."""
    async with NatsCluster() as running:
        yield running
