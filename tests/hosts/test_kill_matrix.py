"""Whoever takes part in a wish is killed at every step of it: nothing is lost, and nothing is carried out twice."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.bus import Bus
from qmpvcpu.model.hosts import CAMPAIGNS, EVENTS, LEASES, STATES, WISHES
from qmpvcpu.testing.nats import NatsCluster, NatsServer
from tests.crash.matrix import Agenda
from tests.crash.zygote import Zygote
from tests.hosts.agents import MODULE
from tests.hosts.wishmatrix import (
    MIXED_STORY,
    STORIES,
    SUPERSEDED,
    Disturbed,
    Wishing,
    WishMatrix,
    WishStory,
    World,
    play,
)
from tests.waiting import until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]  # each is many tests in one, and other tests run

Record = Callable[[str, object], None]
_LANES = 3  # how many share the points of a story that waits for servers most of the time


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


class ServerKilled(Disturbed[str]):
    """The only server is killed at each point, and started again."""

    server: NatsServer

    async def interfere(self, way: str, go_on: Callable[[], None]) -> None:  # noqa: ARG002 -- there is one way
        """Kill it."""
        await self.server.kill()
        go_on()
        await self.server.start()


class MemberKilled(Disturbed[str]):
    """One of three servers is killed at each point, and started again once the others go on without it."""

    cluster: NatsCluster

    async def interfere(self, way: str, go_on: Callable[[], None]) -> None:
        """Kill the one that leads in the matter of wishes, or one that does not."""
        leader = self.cluster.named((await _group(self.world.bus, f"KV_{WISHES}"))["leader"])
        victim = leader if way == LEADER else next(each for each in self.cluster.servers if each is not leader)
        await victim.kill()
        go_on()
        await self.world.wishes.get(self.wished.key.key, timeout=30)  # which the leader answers
        await victim.start()
        await until(self._is_whole, 60, every=0.05)

    async def _is_whole(self) -> bool:
        """Whether every server has everything, so that another one may be killed."""
        streams = [EVENTS, *(f"KV_{each}" for each in (WISHES, STATES, LEASES, CAMPAIGNS))]
        groups = [await _group(self.world.bus, stream) for stream in streams]
        return all(each.get("leader") and all(one["current"] for one in each["replicas"]) for each in groups)


FOLLOWER, LEADER = "a follower", "the leader"


async def _group(bus: Bus, stream: str) -> dict[str, Any]:
    info = await bus._link.api(f"STREAM.INFO.{stream}", {}, asked="who leads", timeout=30)
    group: dict[str, Any] = info["cluster"]
    return group


@contextlib.asynccontextmanager
async def _server_killed(story: WishStory, agenda: Agenda[str], folder: Path) -> AsyncIterator[ServerKilled]:
    async with NatsServer() as server, World.at(server.url) as world, Zygote(MODULE) as zygote:
        matrix = ServerKilled(story, zygote, world, folder, ("the server",), agenda=agenda)
        matrix.server = server
        yield matrix


@contextlib.asynccontextmanager
async def _member_killed(way: str, agenda: Agenda[str], folder: Path) -> AsyncIterator[MemberKilled]:
    async with NatsCluster() as cluster, World.at(cluster.url, replicas=3) as world, Zygote(MODULE) as zygote:
        matrix = MemberKilled(MIXED_STORY, zygote, world, folder, (way,), agenda=agenda)
        matrix.cluster = cluster
        yield matrix


async def test_no_wish_is_lost_or_carried_out_twice_wherever_its_agent_is_killed(
    tmp_path: Path, record_property: Record
) -> None:
    async with NatsServer() as server, World.at(server.url) as world, contextlib.AsyncExitStack() as stack:
        matrices = []
        for number, story in enumerate(STORIES):
            zygote = await stack.enter_async_context(Zygote(MODULE))
            folder = _new_folder(tmp_path, number)
            matrices.append(AgentsKilled(story, zygote, world, folder, story.agents))
        assert await play("a host's agent killed", matrices, record_property) >= 150


async def test_no_wish_is_lost_or_carried_out_twice_wherever_the_server_is_killed(
    tmp_path: Path, record_property: Record
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        lanes = [each for each in ((MIXED_STORY, Agenda[str]()), (SUPERSEDED, Agenda[str]())) for _ in range(_LANES)]
        matrices = await asyncio.gather(
            *(
                stack.enter_async_context(_server_killed(story, agenda, _new_folder(tmp_path, number)))
                for number, (story, agenda) in enumerate(lanes)
            )
        )
        assert await play("the only server killed", matrices, record_property) >= 20


async def test_no_wish_is_lost_or_carried_out_twice_wherever_a_server_of_a_cluster_is_killed(
    tmp_path: Path, record_property: Record
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        lanes = [each for each in ((FOLLOWER, Agenda[str]()), (LEADER, Agenda[str]())) for _ in range(_LANES)]
        matrices = await asyncio.gather(
            *(
                stack.enter_async_context(_member_killed(way, agenda, _new_folder(tmp_path, number)))
                for number, (way, agenda) in enumerate(lanes)
            )
        )
        assert await play("a cluster's follower and its leader killed", matrices, record_property) >= 20


def _new_folder(folder: Path, number: int) -> Path:
    path = folder / str(number)  # the path of a socket cannot be long
    path.mkdir()
    return path
