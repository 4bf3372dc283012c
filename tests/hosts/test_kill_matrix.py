"""Whoever takes part in a wish is killed at every step of it: nothing is lost, and nothing is carried out twice."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qmpvcpu.testing.nats import NatsServer
from tests.crash.zygote import Zygote
from tests.hosts.agents import MODULE
from tests.hosts.wishmatrix import STORIES, Wishing, WishMatrix, World, play

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]  # each is many tests in one, and other tests run

Record = Callable[[str, object], None]


class AgentsKilled(WishMatrix[int]):
    """The agent is killed at each point, and in some stories the next one too; the last one goes on."""

    async def happen(self, point: str, way: int, wishing: Wishing) -> None:
        """Have as many agents die at *point* as *way* says."""
        dying = replace(self.job, die_at=point)
        code = await self.live(dying, way, wishing=wishing)
        first = list(self.crossed)
        for _ in range(1, way):
            if code:
                code = await self.live(dying, way)
        assert await self.live(self.job, way) == 0
        self.crossed[:] = first


async def test_no_wish_is_lost_or_carried_out_twice_wherever_its_agent_is_killed(
    tmp_path: Path, record_property: Record
) -> None:
    async with NatsServer() as server, World.at(server.url) as world, contextlib.AsyncExitStack() as stack:
        matrices = []
        for number, story in enumerate(STORIES):
            zygote = await stack.enter_async_context(Zygote(MODULE))
            folder = tmp_path / str(number)  # the path of a socket cannot be long
            folder.mkdir()
            matrices.append(AgentsKilled(story, zygote, world, folder, story.agents))
        assert await play("a host's agent killed", matrices, record_property) >= 150
