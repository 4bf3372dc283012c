"""Several VMs at once, good ones and bad ones."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from qmpvcpu.testing import MicroGuest, best_qemu, probe_accelerator
from qmpvcpu.testing.peer import ScriptedPeer

# At most so many QEMUs start at a time: more take no less time, and each of them longer.
_STARTING = 4


@contextlib.asynccontextmanager
async def guests(count: int, **options: Any) -> AsyncIterator[list[MicroGuest]]:
    """Start so many micro-guests, under KVM where it runs them."""
    qemu = best_qemu()
    accel = await probe_accelerator(qemu)
    started = [MicroGuest(qemu, accel=accel, **options) for _ in range(count)]
    room = asyncio.Semaphore(_STARTING)
    async with contextlib.AsyncExitStack() as stack:

        async def start(guest: MicroGuest) -> None:
            async with room:
                await guest.__aenter__()
            stack.push_async_exit(guest)

        try:
            async with asyncio.TaskGroup() as group:
                for guest in started:
                    group.create_task(start(guest))
            yield started
        finally:
            for guest in started:  # all at once: their end is only waited for one by one
                if hasattr(guest, "process"):
                    guest.process.kill()


@contextlib.contextmanager
def stopped(guest: MicroGuest) -> Iterator[MicroGuest]:
    """A QEMU that does not run for a while."""
    guest.process.kill(signal.SIGSTOP)
    try:
        yield guest
    finally:
        guest.process.kill(signal.SIGCONT)


@contextlib.asynccontextmanager
async def held(guest: MicroGuest) -> AsyncIterator[MicroGuest]:
    """A QEMU whose first socket another client has."""
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(guest.qmp))
        assert b"QMP" in await asyncio.to_thread(holder.recv, 4096)
        yield guest


def dead_socket(path: Path) -> Path:
    """A socket that a process left behind."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return path


def garbage() -> ScriptedPeer:
    """Something that is no QEMU."""
    return ScriptedPeer(greeting=b"220 mail.example ESMTP\r\n")
