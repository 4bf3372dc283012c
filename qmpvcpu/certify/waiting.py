"""Waiting for the guest."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from qmpvcpu.errors import AgentConnectError, AgentLostError, AgentSilentError, GuestAgentError, WaitTimeoutError
from qmpvcpu.given import checked
from qmpvcpu.model.guest import GuestOs
from qmpvcpu.vm.controller import VcpuController

LOOK_EVERY_S: Final = 0.1
_ASKED_S: Final = 2.0  # how long one question to the agent may take, of many


def now() -> float:
    """Return the event loop's time, in seconds."""
    return asyncio.get_running_loop().time()


@checked
async def wait_booted(vm: VcpuController, *, timeout: float) -> GuestOs | None:
    """Wait until the guest of *vm* is up: until its agent answers. Without one nothing tells, and all is waited.

    Args:
        vm: The VM, attached.
        timeout: How long to wait at most, in seconds.

    Returns:
        What system it is; None where its agent does not tell, or did not answer in time.

    Raises:
        MonitorLostError: The VM is lost.
    """
    deadline = now() + timeout
    while (left := deadline - now()) > 0:
        pause = left
        if vm.guest.has_agent:
            try:
                return await vm.guest.os(timeout=min(left, _ASKED_S))
            except (AgentSilentError, AgentConnectError, AgentLostError):
                pause = min(LOOK_EVERY_S, deadline - now())
            except GuestAgentError:
                return None  # it answers
        with contextlib.suppress(WaitTimeoutError):
            await vm.wait_for(lambda _: False, timeout=max(pause, 0.0))
    return None


async def seen(condition: Callable[[], Awaitable[bool]], limit: float) -> bool:
    """Wait until *condition* holds, at most *limit* seconds; return whether it does."""
    deadline = now() + limit
    while not await condition():
        if now() >= deadline:
            return False
        await asyncio.sleep(LOOK_EVERY_S)
    return True
