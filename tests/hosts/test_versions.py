"""Hosts and clients of this version beside those of a later one, which say more."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.bus import Bus
from qmpvcpu.fleet.wishes import WishBook
from qmpvcpu.hosts import CampaignBook, CampaignController
from qmpvcpu.model.campaign import CampaignSpec, CampaignStatus
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.hosts import LEASES, STATES, WISHES, VmKey
from qmpvcpu.model.wish import Wish
from tests.hosts.world import agent_of, answer, connected, served, state, vm_in, wish

pytestmark = [pytest.mark.qemu]

NOW, LATER = VmKey("now", "web"), VmKey("later", "web")


@contextlib.asynccontextmanager
async def later_host(bus: Bus) -> AsyncIterator[None]:
    """A host whose agent speaks qmpvcpu/2: what it announces, claims and answers has keys that nobody here knows."""
    wishes, states, leases = [await bus.bucket(each) for each in (WISHES, STATES, LEASES)]

    async def tell(said: dict[str, Any]) -> None:
        row = {"schema": "qmpvcpu/2", "address": "unix:/web.qmp", "name": "web", "code": 0, "seconds": 0.0}
        row |= {"error": None, "host": "later", "time": bus.now(), "wanted": None, "drift": False, "mood": "good"}
        await states.put(LATER.key, json.dumps(row | {"answer": said}).encode())

    async def announce() -> None:
        info = {"schema": "qmpvcpu/2", "host": "later", "agent": "2", "version": "9", "since": 0.0, "vms": 1}
        while True:
            await leases.put(
                "host.later", json.dumps(info | {"operations": ["list", "teleport"], "rack": 7}).encode()
            )
            await asyncio.sleep((leases.ttl or 3) / 3)

    async def serve() -> None:
        async with wishes.watch(f"{LATER.host}.>") as entries:
            async for entry in entries:
                if entry is None or entry.value is None or json.loads(entry.value)["claim"] is not None:
                    continue
                asked = json.loads(entry.value)
                claim = {
                    "revision": entry.revision,
                    "written": entry.created,
                    "agent": "2",
                    "saves": 0,
                    "mood": "good",
                }
                await wishes.update(entry.key, json.dumps(asked | {"claim": claim}).encode(), last=entry.revision)
                said = {"revision": entry.revision, "id": asked["id"], "code": 0, "why": "", "mood": "good"}
                await tell(said | {"phase": "running"})
                await tell(said | {"phase": "ended"})

    tasks = [asyncio.ensure_future(announce()), asyncio.ensure_future(serve())]
    try:
        yield
    finally:
        for each in tasks:
            each.cancel()
        await asyncio.wait(tasks)


async def test_a_campaign_goes_over_hosts_of_this_version_and_of_a_later_one(tmp_path: Path) -> None:
    async with (
        served() as server,
        vm_in(tmp_path, "web"),
        connected(server) as bus,
        agent_of(server, NOW.host, tmp_path),
        later_host(bus),
    ):
        book = await CampaignBook.open(bus)
        ledger = await book.create(CampaignSpec(count=3, drop_after=20), [NOW, LATER])
        async with asyncio.timeout(30):
            done = await CampaignController(bus, name="this version").run(ledger.id)
        assert (done.status, done.reached, done.failed) == (CampaignStatus.DONE, 2, 0)


async def test_a_wish_of_a_later_version_is_rejected_in_words_and_holds_up_no_other(tmp_path: Path) -> None:
    later = {**to_json(Wish("1", VcpuMap.parse("0-3"))), "schema": "qmpvcpu/2", "mood": "good"}
    async with (
        served() as server,
        vm_in(tmp_path, "web"),
        connected(server) as bus,
        agent_of(server, NOW.host, tmp_path),
        later_host(bus),
        WishBook(bus) as book,
    ):
        await state(bus, NOW, lambda now: "enabled" in now)
        revision = await wish(bus, NOW, json.dumps(later).encode())
        now = await answer(bus, NOW, revision, "rejected")
        assert now["answer"]["why"]
        assert now["enabled"] == "0"
        for vm in (NOW, LATER):
            revision = await wish(bus, vm, Wish("2", count=2))
            said = await book.answer_to(vm, revision, 20)
            assert said is not None
            assert said.answer is not None
            assert (said.answer.phase.value, said.answer.code) == ("ended", 0)
        assert {host: info.schema for host, info in book.hosts.items()} == {"now": "qmpvcpu/1", "later": "qmpvcpu/2"}
