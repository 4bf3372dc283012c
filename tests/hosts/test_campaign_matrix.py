"""Whoever takes part in a campaign of real VMs is killed or cut off at every step of its controller.

Every VM is answered, no QEMU is asked twice, and the bounds hold at every instant, as the server itself tells.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pytest

import qmpvcpu
from qmpvcpu import OnFailure, QmpVcpuError, VcpuMap
from qmpvcpu.hosts import CampaignBook, CampaignController
from qmpvcpu.hosts.campaignbook import ledger_in
from qmpvcpu.model.campaign import CampaignSpec, CampaignStatus, Ledger, wish_id
from qmpvcpu.model.hosts import CAMPAIGNS, VmKey
from qmpvcpu.model.wish import WishOptions, WishPhase
from qmpvcpu.testing import Behaviour
from qmpvcpu.testing.hosts import Hosts, HostVm, VmHost
from qmpvcpu.testing.nats import NatsServer
from qmpvcpu.testing.netns import can_make_namespaces
from tests.crash.matrix import PointMatrix
from tests.crash.zygote import Zygote
from tests.figures import WISHES_KEPT
from tests.hosts.agents import LOOKED, AgentJob
from tests.hosts.agents import MODULE as AGENTS
from tests.hosts.controllers import MODULE as CONTROLLERS
from tests.hosts.controllers import ControllerJob
from tests.hosts.wishmatrix import World
from tests.waiting import until

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]  # each is many tests in one, and other tests run

START: Final = VcpuMap.parse("0-2")
WANTED: Final = VcpuMap.parse("0-1,3")  # 3 is plugged, then 2 unplugged
SPEC: Final = CampaignSpec(
    map=WANTED,
    options=WishOptions(on_failure=OnFailure.STOP, timeout=10),
    at_once=2,
    per_host=1,
    stop_after=2,
    drop_after=120,
)
REFUSING: Final = VmKey("c", "v1")
_RUN_S: Final = 60.0


@dataclass
class History:
    """What the server had of one campaign, each with the time at which it was written there."""

    ledgers: list[tuple[float, Ledger]] = field(default_factory=list)
    begun: dict[str, float] = field(default_factory=dict)
    over: dict[str, float] = field(default_factory=dict)
    answers: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether the campaign is."""
        return bool(self.ledgers) and self.ledgers[-1][1].is_over

    def check_bounds(self) -> None:
        """At no instant were more VMs begun than the bounds allow; nor after so many had failed."""
        early = {
            key: (begun, self.over[key]) for key, begun in self.begun.items() if begun >= self.over.get(key, 1e99)
        }
        assert not early, f"answered before they were begun: {early}"
        for now in self.begun.values():
            running = [key for key, begun in self.begun.items() if begun <= now < self.over.get(key, float("inf"))]
            assert len(running) <= SPEC.at_once, f"{running} at once"
            per_host = Counter(key.partition(".")[0] for key in running)
            assert max(per_host.values()) <= SPEC.per_host, f"{running} at once"
        for when, ledger in self.ledgers:
            if ledger.failed >= (SPEC.stop_after or 0):
                assert max(self.begun.values()) <= when, "a VM was begun after so many had failed"


class CampaignMatrix(PointMatrix[str]):
    """One campaign again and again, while something happens at each point of its controller.

    Args:
        hosts: The hosts.
        world: The server.
        server: Its process.
        zygotes: Where each host's agents come from, and, as CONTROLLER, the controllers.
        way: What happens: one of those below.
    """

    tries = 2

    def __init__(
        self,
        hosts: Hosts,
        world: World,
        server: NatsServer,
        zygotes: dict[str, Zygote],
        way: str,
    ) -> None:
        super().__init__()
        self.ways = (way,)
        self.twice: list[str] = []
        self._hosts = hosts
        self._world = world
        self._server = server
        self._agents = zygotes
        self._controllers = zygotes[CONTROLLER]
        self._pids: dict[str, int] = {}
        self._history = History()
        self._campaign = ""

    async def play(self) -> list[str]:
        """As of ``PointMatrix``, with an agent on each host."""
        collecting = [asyncio.ensure_future(each()) for each in (self._collect_wishes, self._collect_states)]
        collecting.append(asyncio.ensure_future(self._collect_ledgers()))
        try:
            for host in self._hosts:
                await self._start_agent(host)
            points = await super().play()
            for each in collecting:
                assert not each.done(), each
            return points
        finally:
            for pid in self._pids.values():
                os.kill(pid, signal.SIGKILL)
            for each in collecting:
                each.cancel()
            await asyncio.wait(collecting)

    async def run(self, point: str | None, way: str) -> list[str]:
        """Carry a campaign out, while something happens at *point*; then look."""
        for vm in self._hosts.vms.values():
            await _reset(vm)
        before = {name: len(vm.changes) for name, vm in self._hosts.vms.items()}
        book = await CampaignBook.open(self._world.bus)
        self._history, self._campaign = History(), ""
        vms = [VmKey(host.name, vm) for vm in ("v0", "v1") for host in self._hosts]
        ledger = await book.create(SPEC, vms)
        self._campaign = ledger.id
        crossed: list[str] = []
        try:
            async with asyncio.timeout(_RUN_S):
                dies = way == CONTROLLER
                job = ControllerJob(
                    self._world.url, ledger.id, (point or "") if dies else "", "" if dies else point or ""
                )
                pid = await self._controllers.start(job)
                while not (said := await self._controllers.line()).startswith("="):
                    crossed.append(said)
                    if said == job.hold_at:
                        await self._interfere(way, lambda: os.kill(pid, signal.SIGUSR1))
                assert said == "=0" or dies, f"the controller ended with {said}"
                await self._adopt(book)
                await self._look(book, ledger.id, vms, before)
        except (AssertionError, QmpVcpuError, TimeoutError) as error:
            self.lost.append(f"{way}: {point}: {type(error).__name__}: {error}")
        return crossed

    async def _adopt(self, book: CampaignBook) -> None:
        """Have another controller go on, unless the campaign is over: a controller that lost its lease has ended."""
        if not (await book.get(self._campaign)).is_over:
            heir = asyncio.ensure_future(CampaignController(self._world.bus, name="heir").adopt())
            try:
                await until(lambda: heir.done() or self._history.is_over, _RUN_S)
            finally:
                heir.cancel()
                await asyncio.wait({heir})
        await until(lambda: self._history.is_over, _RUN_S)

    async def _look(self, book: CampaignBook, campaign: str, vms: list[VmKey], before: dict[str, int]) -> None:
        for name, vm in self._hosts.vms.items():
            asked = Counter(
                f"{name}: {each.command} {each.device}"
                for each in vm.changes[before[name] :]
                if each.accepted is not None
            )
            self.twice += [f"{each}: {count} times" for each, count in asked.items() if count > 1]
        assert not self.twice, ", ".join(self.twice)
        summary = await book.summary(campaign)
        ledger = summary.ledger
        ended = {each.key.key: each for each in summary.ended}
        assert not summary.in_flight
        assert {each.key for each in vms} == ended.keys() | {each.key for each in summary.waiting}
        for key, each in ended.items():
            await until(partial(self._history.over.get, key))
            plugged = await _plugged(self._hosts.vms[str(VmKey.parse(key))])
            reached = plugged == WANTED
            assert (each.code == 0) == reached, f"{key} has {plugged}, and ended with {each.code}"
            assert reached or plugged == START | WANTED
            assert self._history.answers[key] == (WishPhase.ENDED.value, each.code)
        assert ledger.failed == sum(each.code != 0 for each in ended.values())
        assert ledger.status in (CampaignStatus.DONE, CampaignStatus.HALTED)
        assert (ledger.status is CampaignStatus.HALTED) == bool(summary.waiting)
        if not summary.waiting:
            assert ended[REFUSING.key].code == 1
        self._history.check_bounds()

    async def _interfere(self, way: str, go_on: Callable[[], None]) -> None:
        victim = self._hosts["a"]
        if way == SERVER:
            await self._server.kill()
            go_on()
            await self._server.start()
        elif way == AGENT:
            await self._kill_agent(victim)
            go_on()
            await self._start_agent(victim)
        else:
            await victim.host.cut()
            go_on()
            await until(self._is_given_up, 30)
            await victim.host.mend()

    async def _is_given_up(self) -> bool:
        return await self._world.leases.get("host.a") is None

    async def _start_agent(self, host: VmHost) -> None:
        zygote = self._agents[host.name]
        job = AgentJob(self._world.url, host.name, str(host.sockets), str(host.records))
        self._pids[host.name] = await zygote.start(job)
        await zygote.crossed(LOOKED)

    async def _kill_agent(self, host: VmHost) -> None:
        os.kill(self._pids.pop(host.name), signal.SIGKILL)
        assert (await self._agents[host.name].end()).code == -signal.SIGKILL

    # What the server has.

    async def _collect_wishes(self) -> None:
        async for entry in self._world.wishes.watch():
            if entry is not None and entry.value is not None:
                wish = json.loads(entry.value)
                if wish["campaign"] == self._campaign and wish["claim"] is None:
                    assert entry.key not in self._history.begun, f"{entry.key} was begun twice"
                    self._history.begun[entry.key] = entry.created

    async def _collect_states(self) -> None:
        phases = {each.value for each in WishPhase if each.is_over}
        async for entry in self._world.states.watch():
            if entry is not None and entry.value is not None:
                answer = json.loads(entry.value)["answer"]
                is_ours = answer is not None and answer["id"] == wish_id(self._campaign, entry.key)
                if is_ours and answer["phase"] in phases:
                    self._history.over.setdefault(entry.key, entry.created)
                    self._history.answers[entry.key] = (answer["phase"], answer["code"])

    async def _collect_ledgers(self) -> None:
        async for entry in (await self._world.bus.bucket(CAMPAIGNS)).watch("*"):
            if entry is not None and entry.key == self._campaign:
                self._history.ledgers.append((entry.created, ledger_in(entry)))


CONTROLLER, AGENT, SERVER, CABLE = "its controller", "an agent", "the server", "a host's cable"


async def _plugged(vm: HostVm) -> VcpuMap:
    async with qmpvcpu.attach(vm.guest.sockets[1]) as seen:
        return seen.layout.enabled


async def _reset(vm: HostVm) -> None:
    await vm.guest.set_behaviour()
    async with qmpvcpu.attach(vm.guest.sockets[1]) as seen:
        await seen.set_map(START)
    if vm.name == REFUSING.vm and vm.socket.parts[-3] == REFUSING.host:
        await vm.guest.set_behaviour(Behaviour.refusing(0x82))


@contextlib.asynccontextmanager
async def matrix_of(way: str) -> AsyncIterator[CampaignMatrix]:
    """Three hosts with two VMs each, and a server, for one way."""
    async with contextlib.AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(Hosts("abc", vms=["v0", "v1"], boot=1, separate=way == CABLE))
        server = await stack.enter_async_context(NatsServer(host=hosts.network.address))
        world = await stack.enter_async_context(World.at(server.url))
        zygotes = {
            host.name: await stack.enter_async_context(Zygote(AGENTS, prefix=host.host.prefix)) for host in hosts
        }
        zygotes[CONTROLLER] = await stack.enter_async_context(Zygote(CONTROLLERS))
        yield CampaignMatrix(hosts, world, server, zygotes, way)


@pytest.mark.parametrize("way", [CONTROLLER, AGENT, SERVER, CABLE])
async def test_a_campaign_keeps_its_bounds_and_loses_no_vm_wherever_somebody_is_lost(
    way: str, record_property: Callable[[str, Any], None]
) -> None:
    if way == CABLE and not can_make_namespaces():
        pytest.skip("no network namespaces here")
    async with matrix_of(way) as matrix:
        points = await matrix.play()
    met = len(points) - len(matrix.unmet)
    record_property(WISHES_KEPT, (f"of a campaign, {way} lost", met, len(matrix.lost), len(matrix.twice)))
    assert not matrix.lost, "\n".join(matrix.lost)
    assert met >= 10, matrix.unmet
