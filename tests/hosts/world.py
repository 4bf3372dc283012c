"""A real server, real agents and real QEMUs with micro-guests, in one process."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.fleet import Fleet
from qmpvcpu.hosts import AgentPolicy, HostAgent
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.hosts import STATES, WISHES, Operation, VmKey, request_subject
from qmpvcpu.model.wish import Wish
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.nats import NatsServer

LEASE_S = 2.0


@contextlib.asynccontextmanager
async def served(**options: Any) -> AsyncIterator[NatsServer]:
    """A server that is ready for hosts; leases are short."""
    async with NatsServer(**options) as server, connected(server) as bus:
        await bus.prepare(lease_s=LEASE_S)
        yield server


@contextlib.asynccontextmanager
async def connected(server: NatsServer) -> AsyncIterator[Bus]:
    async with await Bus.connect(ServerAddress(server.url), name="test") as bus:
        yield bus


@contextlib.asynccontextmanager
async def agent_of(
    server: NatsServer | contextlib.AbstractAsyncContextManager[Bus],
    host: str,
    directory: Path,
    *,
    policy: AgentPolicy | None = None,
    rescan: float = 0.2,
) -> AsyncIterator[HostAgent]:
    """An agent that serves the VMs of *directory*; at the end it is stopped at once, as by a second signal.

    *server* is one that asks nobody who they are, or the agent's own connection.
    """
    records = directory / "records"
    records.mkdir(exist_ok=True)
    async with connected(server) if isinstance(server, NatsServer) else server as bus:
        fleet = Fleet(
            directory=directory,
            pattern="*.qmp",
            record=lambda _, vm: records / f"{vm.name}.xml",
            resync_interval=None,
        )
        async with fleet:
            agent = HostAgent(bus, host, [fleet], policy=policy, rescan=rescan)
            running = asyncio.ensure_future(agent.run())
            try:
                yield agent
                if running.done():
                    running.result()
            finally:
                running.cancel()
                await asyncio.wait({running})


@contextlib.asynccontextmanager
async def vm_in(directory: Path, name: str, **options: Any) -> AsyncIterator[MicroGuest]:
    """A VM whose QMP socket is in *directory*."""
    async with MicroGuest(extra_args=("-name", name), **options) as guest:
        link = directory / f"{name}.qmp"
        link.symlink_to(guest.qmp)
        try:
            yield guest
        finally:
            link.unlink(missing_ok=True)


async def wish(bus: Bus, vm: VmKey, wished: Wish | bytes) -> int:
    """Write a wish over whatever is there, and return its revision."""
    bucket = await bus.bucket(WISHES)
    content = wished if isinstance(wished, bytes) else json.dumps(to_json(wished)).encode()
    return await bucket.put(vm.key, content)


async def state(
    bus: Bus, vm: VmKey, wanted: Callable[[dict[str, Any]], object], *, within: float = 90
) -> dict[str, Any]:
    """Return the state of *vm* once it is as *wanted*."""
    last: dict[str, Any] = {}
    bucket = await bus.bucket(STATES)
    try:
        async with asyncio.timeout(within), bucket.watch(vm.key) as states:
            async for entry in states:
                if entry is not None and entry.value is not None:
                    last = json.loads(entry.value)
                    if wanted(last):
                        return last
    except TimeoutError:
        raise AssertionError(f"{vm} has never been so; it is {last}") from None
    raise AssertionError("the states have ended")


async def answer(bus: Bus, vm: VmKey, revision: int, *phases: str, within: float = 90) -> dict[str, Any]:
    """Return the state of *vm* once the wish of *revision* is answered with one of the *phases*."""

    def answered(now: dict[str, Any]) -> bool:
        told = now["answer"]
        return told is not None and told["revision"] == revision and told["phase"] in phases

    return await state(bus, vm, answered, within=within)


async def ask(bus: Bus, host: str, operation: Operation, **request: Any) -> dict[str, Any]:
    """Return what the agent of *host* answers."""
    reply = await bus.request(request_subject(host, operation, "tester"), json.dumps(request).encode(), 20)
    content: dict[str, Any] = json.loads(reply)
    return content
