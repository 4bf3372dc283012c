"""Two hosts with agents at one server, for commands that read the VMs of many."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from qmpvcpu.bus import Bus
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.testing import MicroGuest
from tests.hosts.world import agent_of, connected, served, state, vm_in

__all__ = ["Hosts", "hosts_in"]

WEB, DB = VmKey("rack1", "web"), VmKey("rack2", "db")


class Hosts(NamedTuple):
    """The server, and a VM of each host: rack1/web and rack2/db."""

    url: str
    bus: Bus
    web: MicroGuest
    db: MicroGuest


@contextlib.asynccontextmanager
async def hosts_in(directory: Path) -> AsyncIterator[Hosts]:
    """Start them; the sockets are in *directory*, below their hosts' names."""
    for key in (WEB, DB):
        (directory / key.host).mkdir()
    async with (
        served() as server,
        connected(server) as bus,
        vm_in(directory / WEB.host, WEB.vm, boot=2) as web,
        vm_in(directory / DB.host, DB.vm, boot=2) as db,
        agent_of(server, WEB.host, directory / WEB.host),
        agent_of(server, DB.host, directory / DB.host),
    ):
        for key in (WEB, DB):
            await state(bus, key, lambda told: "vm" in told)
        yield Hosts(server.url, bus, web, db)
