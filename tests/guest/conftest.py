"""A Linux guest for each test; which accelerator runs it is found out once."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.qemu import Accelerator, best_qemu


@pytest.fixture(scope="session")
def qemu() -> Path:
    return best_qemu()


@pytest.fixture(scope="session")
def accel(qemu: Path) -> Accelerator:
    async def boot() -> Accelerator:
        async with LinuxGuest(qemu) as guest:
            return guest.accelerator

    return asyncio.run(boot())


@pytest.fixture
async def guest(qemu: Path, accel: Accelerator) -> AsyncIterator[LinuxGuest]:
    async with LinuxGuest(qemu, accel=accel) as guest:
        yield guest
