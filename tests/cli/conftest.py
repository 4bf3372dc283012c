"""A VM for the commands to work on."""

import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from qmpvcpu.testing import MicroGuest


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    """A micro-guest with vCPUs 0 and 1 of 8, which complies until told otherwise."""
    async with MicroGuest(boot=2) as guest:
        yield guest


@pytest.fixture(autouse=True, scope="session")
def sigint_is_not_ignored() -> Iterator[None]:
    """Start the commands as a terminal does; a script's background job hands on that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
