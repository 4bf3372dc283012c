"""What is told of VMs on its way into the stream: in order, many at once, and nothing waits for it for long."""

import asyncio
import base64
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.bus import Bus
from qmpvcpu.hosts import outbox
from qmpvcpu.hosts.outbox import Outbox
from qmpvcpu.model.hosts import EVENTS, VmKey
from qmpvcpu.model.wish import Answer, Wish, WishPhase
from tests.hosts.world import agent_of, answer, connected, served, vm_in, wish
from tests.waiting import until

WEB = VmKey("rack1", "web")


@contextlib.asynccontextmanager
async def sending(bus: Bus) -> AsyncIterator[Outbox]:
    box = Outbox(bus)
    running = asyncio.ensure_future(box.run())
    try:
        yield box
    finally:
        running.cancel()
        await asyncio.wait({running})


async def delete_stream(bus: Bus) -> None:
    await bus._link.api(f"STREAM.DELETE.{EVENTS}", {}, asked="delete the events")


async def test_each_vm_is_told_of_in_order_and_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vms = [VmKey("rack1", f"vm{number}") for number in range(100)]
    under_way: Counter[str] = Counter()
    most: Counter[str] = Counter()
    publish = Bus.publish

    async def counted(self: Bus, subject: str, data: bytes, **options: Any) -> None:
        under_way[subject] += 1
        most[subject] = max(most[subject], under_way[subject])
        most["all"] = max(most["all"], under_way.total())
        await publish(self, subject, data, **options)
        under_way[subject] -= 1

    monkeypatch.setattr(Bus, "publish", counted)
    async with served() as server, connected(server) as bus, sending(bus) as box:
        async with bus.follow("qmpvcpu.event.>") as stream:
            for number in range(10):
                for vm in vms:
                    box.happened(vm, "LayoutChanged", {"number": number})
            seen: dict[str, list[int]] = {vm.vm: [] for vm in vms}
            for _ in range(1000):
                told = json.loads((await anext(stream)).data)
                seen[told["vm"]].append(told["number"])
        await box.told()
    assert set(map(tuple, seen.values())) == {tuple(range(10))}
    assert most.pop("all") == outbox._AT_ONCE
    assert set(most.values()) == {1}


async def test_what_happened_waits_for_its_stream_and_no_answer_waits_with_it(tmp_path: Path) -> None:
    async with (
        served() as server,
        vm_in(tmp_path, "web"),
        connected(server) as bus,
        agent_of(server, "rack1", tmp_path),
    ):
        await answer(bus, WEB, await wish(bus, WEB, Wish("1", VcpuMap.parse("0-1"))), "ended")
        await delete_stream(bus)
        revision = await wish(bus, WEB, Wish("2", VcpuMap.parse("0-2"), who="alice"))
        await answer(bus, WEB, revision, "ended")
        await bus.prepare()
        async with asyncio.timeout(60):
            answered = await _last(bus, "qmpvcpu.event.rack1.web.Answered")
        assert (answered["who"], answered["revision"], answered["code"]) == ("alice", revision, 0)


async def _last(bus: Bus, subject: str) -> dict[str, Any]:
    """What the stream has last of *subject*, once there is any."""
    found: list[dict[str, Any]] = []

    async def is_there() -> bool:
        with contextlib.suppress(Exception):
            request = {"last_by_subj": subject}
            found.append(await bus._link.api(f"STREAM.MSG.GET.{EVENTS}", request, asked="read"))
        return bool(found)

    await until(is_there, 60)
    message: dict[str, Any] = json.loads(base64.b64decode(found[0]["message"]["data"]))
    return message


async def test_once_the_stream_is_late_nothing_waits_for_it_until_it_is_back() -> None:
    async with served() as server, connected(server) as bus:
        await delete_stream(bus)
        async with sending(bus) as box:
            for number in range(3):
                vm = VmKey("rack1", f"vm{number}")
                box.answered(vm, Answer(1, "1", WishPhase.ENDED), who="")
            async with asyncio.timeout(10):
                for number in range(3):
                    await box.audited(VmKey("rack1", f"vm{number}"))
            assert box._is_late
            await bus.prepare()
            async with asyncio.timeout(60):
                await box.told()
            assert not box._is_late


async def test_with_too_much_of_it_the_oldest_is_given_up_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_MOST_EVENTS", 5)
    other = VmKey("rack1", "db")
    async with served() as server, connected(server) as bus:
        box = Outbox(bus)
        box.happened(other, "LayoutChanged", {"number": -1})
        for number in range(8):
            box.happened(WEB, "LayoutChanged", {"number": number})
        async with bus.follow("qmpvcpu.event.>") as stream:
            running = asyncio.ensure_future(box.run())
            told = [json.loads((await anext(stream)).data) for _ in range(6)]
            running.cancel()
    assert [each["number"] for each in told if each["vm"] == "web" and "number" in each] == [4, 5, 6, 7]
    assert [each["number"] for each in told if each["vm"] == "db"] == [-1]
    assert (told[-1]["event"], told[-1]["vm"], told[-1]["count"]) == ("Missed", "web", 4)
