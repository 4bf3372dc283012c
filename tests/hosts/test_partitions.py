"""A host is cut off at every step of a wish, and back: nothing is lost, and nothing is carried out twice."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qmpvcpu.model.hosts import token
from qmpvcpu.testing.nats import NatsServer
from qmpvcpu.testing.netns import Host, Network, can_make_namespaces
from tests.crash.matrix import Agenda
from tests.crash.zygote import Zygote
from tests.hosts.agents import MODULE
from tests.hosts.wishmatrix import MIXED_STORY, WITHDRAWN, Disturbed, World, play
from tests.waiting import until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(900),  # it is many tests in one, and other tests run
    pytest.mark.skipif(not can_make_namespaces(), reason="no network namespaces here"),
]

BRIEFLY, LONG = "briefly", "for longer than its lease"
_BRIEFLY_S = 0.3
_LANES = 2  # how many share the points of a story


class CutOff(Disturbed[str]):
    """The host's cable is pulled at each point, and plugged in again."""

    host: Host

    async def interfere(self, way: str, go_on: Callable[[], None]) -> None:
        """Cut it off, briefly or until everybody takes it for dead."""
        await self.host.cut()
        go_on()
        if way == BRIEFLY:
            await asyncio.sleep(_BRIEFLY_S)  # it is what is tested
        else:
            await until(self._is_given_up, 30)
        await self.host.mend()

    async def _is_given_up(self) -> bool:
        return await self.world.leases.get(f"host.{token(self.wished.key.host)}") is None


async def test_no_wish_is_lost_or_carried_out_twice_wherever_its_host_is_cut_off(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with (
        Network() as network,
        NatsServer(host=network.address) as server,
        World.at(server.url) as world,
        contextlib.AsyncExitStack() as stack,
    ):
        matrices: list[CutOff] = []
        for story, way in itertools.product((MIXED_STORY, WITHDRAWN), (BRIEFLY, LONG)):
            agenda = Agenda[str]()
            for lane in range(_LANES):
                number = len(matrices)
                host = await network.host(f"host{number}")
                zygote = await stack.enter_async_context(Zygote(MODULE, prefix=host.prefix))
                folder = tmp_path / str(number)
                folder.mkdir()
                named = replace(story, name=f"{story}, {way}, {lane}")
                matrix = CutOff(named, zygote, world, folder, (way,), agenda=agenda)
                matrix.host = host
                matrices.append(matrix)
        assert await play("a host cut off and back", matrices, record_property) >= 60
