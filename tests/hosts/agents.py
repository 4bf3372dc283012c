"""Agents that die: each a process of its own, which kills itself at a point.

``python -m tests.hosts.agents``: a zygote as ``tests.crash.zygote``.
"""

import asyncio
import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import qmpvcpu.agent.door
import qmpvcpu.record.record
import qmpvcpu.vm.attaching
import qmpvcpu.vm.placing  # noqa: F401 -- all of it once, before the forks
from qmpvcpu.bus import Bus, Entry, ServerAddress
from qmpvcpu.bus.bucket import Bucket
from qmpvcpu.fleet import Fleet
from qmpvcpu.hosts import HostAgent
from qmpvcpu.hosts.keeper import WishKeeper
from qmpvcpu.model.hosts import LEASES, STATES
from tests.crash.points import Points, watching
from tests.crash.zygote import dying_at, say, serve
from tests.waiting import until

MODULE: Final = "tests.hosts.agents"
QUIET: Final = "it has nothing to do"
LOOKED: Final = "it has looked for VMs"
_LONGEST_S: Final = 40.0
_SELDOM_S: Final = 3600.0
_FOREVER_S: Final = 600
_EFFECT: Final = re.compile(r"(?!before |query-|qom-|reply to |answer for |(?!Asked|Answered)\w+ is published)")
_TALK: Final = re.compile(
    r"(before )?(the (claim|wish|lease) is .*|.* is told|(Asked|Answered) is published|a wish comes|the .* is saved)"
)


@dataclass(frozen=True)
class AgentJob:
    """One run of an agent.

    Attributes:
        server: The server's addresses.
        host: The name of the host.
        directory: Where its VMs' sockets are.
        records: Where their records are.
        die_at: The point at which it kills itself; "" lets it live until SIGTERM.
        hold_at: The point at which it stops until SIGUSR1.
        only_talk: Whether only what it says to the server makes points, and before it is said too.
    """

    server: str
    host: str
    directory: str
    records: str
    die_at: str = ""
    hold_at: str = ""
    only_talk: bool = False


class LivePoints(Points):
    """Points that count from the first wish on: what an agent does before is no step of a wish.

    Only what others can see of a wish is one: who dies before an effect dies after the one before it.
    If it is only about what is said to the server, it matters whether the server is there before it is said.
    """

    def __init__(self, act: Callable[[str], None], *, only_talk: bool) -> None:
        super().__init__(act)
        self.are_on = False
        self._counts = _TALK.fullmatch if only_talk else _EFFECT.match

    def cross(self, name: str) -> None:
        """Take note of a point, if it counts."""
        if self.are_on and self._counts(name):
            super().cross(name)


@contextmanager
def watching_agent(points: LivePoints) -> Iterator[None]:
    """Inside, have *points* cross every step of an agent between it and the server."""
    write, publish, take = Bucket._write, Bus.publish, WishKeeper.take
    told: dict[str, str] = {}

    def named(bucket: str, key: str, value: bytes | None) -> str:
        """What a write is called; "": it is no step, and may come at any time."""
        if bucket == LEASES:
            return "" if value is not None else "the lease is released"
        if bucket != STATES:
            return "the wish is deleted" if value is None else "the claim is written"
        if value is None:
            return "the state is deleted"
        answer = json.loads(value)["answer"] or {"revision": 0, "phase": "nothing"}
        content = f"{answer['revision']} {answer['phase']}"
        if told.get(key) == content:
            return ""
        told[key] = content
        return f"{answer['phase']} is told"

    async def _write(self: Bucket, key: str, value: bytes | None, last: int | None, timeout: float) -> int:
        if not (name := named(self.name, key, value)):
            return await write(self, key, value, last, timeout)
        points.cross(f"before {name}")
        revision = await write(self, key, value, last, timeout)
        points.cross(name)
        return revision

    async def _publish(self: Bus, subject: str, data: bytes, **options: Any) -> None:
        kind = subject.rpartition(".")[2]
        points.cross(f"before {kind} is published")
        await publish(self, subject, data, **options)
        points.cross(f"{kind} is published")

    def _take(self: WishKeeper, entry: Entry) -> None:
        points.are_on = True
        points.cross("a wish comes")
        take(self, entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "_write", _write)
        patch.setattr(Bus, "publish", _publish)
        patch.setattr(WishKeeper, "take", _take)
        yield


@contextmanager
def _telling_quiet() -> Iterator[Callable[[HostAgent], "asyncio.Task[None]"]]:
    """Inside, tell the test when an agent has looked for VMs, and when it has nothing to do besides."""
    look, serve_one = HostAgent._look, WishKeeper._serve
    looked = asyncio.Event()
    busy: list[WishKeeper] = []

    async def _look(self: HostAgent) -> None:
        await look(self)
        if not looked.is_set():
            say(LOOKED)
            looked.set()

    async def _serve(self: WishKeeper, entry: Entry) -> None:
        busy.append(self)
        try:
            await serve_one(self, entry)
        finally:
            busy.remove(self)

    async def tell(agent: HostAgent) -> None:
        await looked.wait()
        await agent._wishes_known.wait()
        await until(lambda: not (busy or any(each._news.is_set() for each in agent._keepers.values())), _LONGEST_S)
        say(QUIET)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostAgent, "_look", _look)
        patch.setattr(WishKeeper, "_serve", _serve)
        yield lambda agent: asyncio.ensure_future(tell(agent))


async def _run(job: AgentJob) -> None:
    points = LivePoints(dying_at(job.die_at, hold_at=job.hold_at), only_talk=job.only_talk)
    records = Path(job.records)
    with watching(points), watching_agent(points), _telling_quiet() as telling:
        async with await Bus.connect(ServerAddress(job.server), name=f"agent of {job.host}") as bus:
            fleet = Fleet(
                directory=job.directory,
                pattern="*.qmp",
                record=lambda _, vm: records / f"{vm.name}.xml",
                resync_interval=None,
            )
            async with fleet:
                agent = HostAgent(bus, job.host, [fleet], rescan=_SELDOM_S)
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, agent.stop)
                quiet = telling(agent)
                await agent.run()
                quiet.cancel()


if __name__ == "__main__":
    serve(lambda job: _run(AgentJob(**job)), longest=_FOREVER_S)
