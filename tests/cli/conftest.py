"""A VM for the commands to work on."""

from collections.abc import AsyncIterator

import pytest

from qmpvcpu.testing import MicroGuest


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    """A micro-guest with vCPUs 0 and 1 of 8, which obliges until told otherwise."""
    async with MicroGuest(boot=2) as guest:
        yield guest
