"""Hosts and controllers whose clocks are wrong by an hour: the server's is the one that counts."""

from pathlib import Path

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.hosts import CampaignBook
from qmpvcpu.model.campaign import CampaignSpec, CampaignStatus
from qmpvcpu.model.hosts import HOST_LEASES, LEASES, HostInfo, VmKey
from qmpvcpu.model.wish import Wish
from qmpvcpu.testing.clock import find_compiler, other_clock
from qmpvcpu.testing.hosts import Hosts
from qmpvcpu.testing.nats import NatsServer
from tests.crash.zygote import Zygote
from tests.hosts.agents import LOOKED, AgentJob
from tests.hosts.agents import MODULE as AGENTS
from tests.hosts.controllers import MODULE as CONTROLLERS
from tests.hosts.controllers import ControllerJob
from tests.hosts.wishmatrix import World
from tests.hosts.world import answer, wish

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(find_compiler() is None, reason="no C compiler, which another clock needs"),
]

_HOUR_S = 3600.0


@pytest.mark.parametrize("offset", [_HOUR_S, -_HOUR_S], ids=["ahead", "behind"])
async def test_an_hour_is_neither_lost_nor_won(offset: float, tmp_path: Path) -> None:
    prefix = ("env", *(f"{name}={value}" for name, value in (await other_clock(offset, tmp_path)).items()))
    async with (
        Hosts(["a"], vms=["web"], separate=False) as hosts,
        NatsServer(host=hosts.network.address) as server,
        World.at(server.url) as world,
        Zygote(AGENTS, prefix=prefix) as agents,
        Zygote(CONTROLLERS, prefix=prefix) as controllers,
    ):
        host, web = hosts["a"], VmKey("a", "web")
        await agents.start(AgentJob(server.url, "a", str(host.sockets), str(host.records)))
        await agents.crossed(LOOKED)
        for key, entry in (await (await world.bus.bucket(LEASES)).all(HOST_LEASES)).items():
            assert abs(HostInfo.read(key, entry.value or b"").since - world.bus.now()) < _HOUR_S / 2
        revision = await wish(world.bus, web, Wish("in time", VcpuMap.parse("0-2"), drop_after=60))
        now = await answer(world.bus, web, revision, "ended")
        assert (now["answer"]["code"], now["enabled"]) == (0, "0-2")
        assert abs(now["time"] - world.bus.now()) < _HOUR_S / 2
        gone = VmKey("a", "gone")
        revision = await wish(world.bus, gone, Wish("too late", count=2, drop_after=0.5))
        await answer(world.bus, gone, revision, "expired")
        book = await CampaignBook.open(world.bus)
        ledger = await book.create(CampaignSpec(count=2, drop_after=60), [web])
        assert (await controllers.run(ControllerJob(server.url, ledger.id))).code == 0
        summary = await book.summary(ledger.id)
        assert (summary.ledger.status, summary.ledger.reached) == (CampaignStatus.DONE, 1)
        assert abs(summary.ended[0].time - world.bus.now()) < _HOUR_S / 2
