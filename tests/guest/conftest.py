"""A Linux guest for each test and kernel; which accelerator runs it is found out once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from qmpvcpu.testing.linuxguest import LinuxGuest, find_kernels
from qmpvcpu.testing.qemu import Accelerator, best_qemu
from qmpvcpu.testing.vms import TRACE_ARGUMENTS

# The kernel from which on all CPUs are numbered at boot.
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


@pytest.fixture(params=find_kernels(), scope="module")
def kernel(request: pytest.FixtureRequest) -> str:
    """The kernel that was made for the guest, and the newer one that only the tests have."""
    return str(request.param)


@pytest.fixture
async def guest(qemu: Path, accel: Accelerator, kernel: str) -> AsyncIterator[LinuxGuest]:
    async with LinuxGuest(qemu, accel=accel, kernel=kernel) as guest:
        yield guest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_guest(qemu: Path, accel: Accelerator, kernel: str) -> AsyncIterator[LinuxGuest]:
    """The same for tests on the loop of their module: they leave it with CPUs 0 and 1, and with its agent."""
    async with LinuxGuest(qemu, accel=accel, kernel=kernel) as guest:
        yield guest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def roomy_guest(qemu: Path, accel: Accelerator, kernel: str) -> AsyncIterator[LinuxGuest]:
    """The same for tests that plug and unplug a lot: under TCG a QEMU dies when it has made more than maxcpus."""
    async with LinuxGuest(
        qemu, accel=accel, kernel=kernel, max_vcpus=64, memory_mib=512, extra_args=TRACE_ARGUMENTS
    ) as guest:
        yield guest


@pytest.fixture(scope="module")
def fixed_at_boot(kernel: str) -> bool:
    """Whether this Linux has numbered all CPUs at boot; an older one numbers them as they come."""
    return tuple(map(int, kernel.split("."))) >= FIXED_AT_BOOT


@pytest.fixture
def third(fixed_at_boot: bool) -> Callable[[int], int]:
    """Tells Linux's own number of a vCPU that was plugged next to the first two."""
    return (lambda vcpu: vcpu) if fixed_at_boot else lambda _: 2
