"""Two hosts with agents at one server, for commands that read the VMs of many."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from qmpvcpu.bus import Bus
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.nats import NatsServer
from tests.hosts.world import agent_of, connected, served, state, vm_in

__all__ = ["Hosts", "hosts_in"]

WEB, DB = VmKey("rack1", "web"), VmKey("rack2", "db")


class Hosts(NamedTuple):
    """The server, and a VM of each host: rack1/web and rack2/db."""

    nats: NatsServer
    bus: Bus
    web: MicroGuest
    db: MicroGuest

    @property
    def url(self) -> str:
        """Where the server is."""
        return self.nats.url


@contextlib.asynccontextmanager
async def hosts_in(directory: Path, *, away: str = "") -> AsyncIterator[Hosts]:
    """Start them; the sockets are in *directory*, below their hosts' names. One host's agent may be *away* again."""
    for key in (WEB, DB):
        (directory / key.host).mkdir()
    async with (
        served() as server,
        connected(server) as bus,
        vm_in(directory / WEB.host, WEB.vm, boot=2) as web,
        vm_in(directory / DB.host, DB.vm, boot=2) as db,
        contextlib.AsyncExitStack() as stack,
    ):
        for key in (WEB, DB):
            agent = contextlib.AsyncExitStack()
            await stack.enter_async_context(agent)
            await agent.enter_async_context(agent_of(server, key.host, directory / key.host))
            await state(bus, key, lambda told: "vm" in told)
            if key.host == away:
                await agent.aclose()
        yield Hosts(server, bus, web, db)
