"""The real agents of some hosts in one process, each with its own connection to the server, as on hosts of their own.

The process takes nothing on its standard input but its end, and then has the agents stop in order::

    python -m tests.bench.agents URL DIRECTORY FIRST LAST   ->  (ready: connected)
"""

import asyncio
import sys
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.fleet import Fleet
from qmpvcpu.hosts import HostAgent
from qmpvcpu.model.vm import VmInfo
from tests.bench.helpers import allow_many_files, serve
from tests.bench.simulated import host_name, socket_of


async def _main(url: str, directory: Path, hosts: Iterable[int]) -> None:
    async with AsyncExitStack() as stack:
        agents = [await _agent(stack, url, directory, host) for host in hosts]
        running = [asyncio.ensure_future(agent.run()) for agent in agents]
        told = asyncio.ensure_future(serve(_nothing))
        await asyncio.wait([told, *running], return_when=asyncio.FIRST_COMPLETED)
        for agent in agents:
            agent.stop()
        await asyncio.gather(*running)


async def _nothing(words: list[str]) -> Iterable[float]:
    raise ValueError(words)


async def _agent(stack: AsyncExitStack, url: str, directory: Path, host: int) -> HostAgent:
    records = directory / f"records{host:04}"
    records.mkdir()

    def record(_: str, vm: VmInfo) -> Path:
        return records / f"{vm.name}.xml"

    fleet = Fleet(directory=socket_of(directory, host, 0).parent, pattern="*.qmp", record=record)
    name = host_name(host)
    bus = await Bus.connect(ServerAddress(url), name=f"qmpvcpu agent of {name}", timeout=30)
    return HostAgent(await stack.enter_async_context(bus), name, [await stack.enter_async_context(fleet)])


if __name__ == "__main__":
    allow_many_files()
    server, where, first, last = sys.argv[1:]
    asyncio.run(_main(server, Path(where), range(int(first), int(last))))
