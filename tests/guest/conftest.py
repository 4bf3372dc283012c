"""A Linux guest for each test and kernel; which accelerator runs it is found out once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from qmpvcpu.testing.linuxguest import LinuxGuest, find_images
from qmpvcpu.testing.qemu import Accelerator, best_qemu, cache_directory

# Linux 6.1 numbers CPUs as they come; 6.12 has numbered them all at boot.
FIXED_AT_BOOT = (6, 9)


@pytest.fixture(scope="session")
def qemu() -> Path:
    return best_qemu()


@pytest.fixture(scope="session")
def accel(qemu: Path) -> Accelerator:
    async def boot() -> Accelerator:
        async with LinuxGuest(qemu) as guest:
            return guest.accelerator

    return asyncio.run(boot())


@pytest.fixture(params=sorted(image.name for image in (cache_directory() / "linux").glob("vmlinuz*")))
def kernel(request: pytest.FixtureRequest) -> Path:
    """The kernel that was made for the guest, and the newer one that only the tests have."""
    return find_images()[0].with_name(request.param)


@pytest.fixture
async def guest(qemu: Path, accel: Accelerator, kernel: Path) -> AsyncIterator[LinuxGuest]:
    async with LinuxGuest(qemu, accel=accel, kernel=kernel) as guest:
        yield guest


@pytest.fixture
def third(kernel: Path) -> Callable[[int], int]:
    """Tells Linux's own number of a vCPU that was plugged next to the first two."""
    image = kernel.read_bytes()
    # Its version, as text: Documentation/arch/x86/boot.rst, kernel_version.
    at = int.from_bytes(image[0x20E:0x210], "little") + 0x200
    major, minor = map(int, image[at : at + 32].split(b".")[:2])
    return (lambda vcpu: vcpu) if (major, minor) >= FIXED_AT_BOOT else lambda _: 2
