"""What agents tell in one stream: events with what was known then, and who asked for what."""

import asyncio
import json
from pathlib import Path

import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.bus import Bus
from qmpvcpu.events import LayoutChanged, VcpuPlugged
from qmpvcpu.fleet import Answered, Asked, Fleet, MapState, VmEvent
from qmpvcpu.fleet.told import read_told
from qmpvcpu.model.hosts import EVENTS, Operation, VmKey
from qmpvcpu.model.wish import Wish, WishPhase
from qmpvcpu.testing.nats import NatsServer
from tests.hosts.world import agent_of, answer, ask, state, vm_in, wish

WEB = VmKey("rack1", "web")


@pytest.mark.qemu
async def test_who_asked_and_what_came_of_it_are_among_the_events_if_that_is_wanted(
    server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    async with vm_in(tmp_path, "web"), agent_of(server, "rack1", tmp_path):
        await state(bus, WEB, lambda told: "vm" in told)
        async with Fleet(server.url) as fleet:
            assert fleet.layouts["rack1/web"].enabled == {0}
            with_audit, without = fleet.events(audit=True), fleet.events()
            await fleet.refresh()  # from now on the streams have all
            revision = await wish(bus, WEB, Wish("1", VcpuMap.parse("0-1"), who="alice", why="load"))
            await answer(bus, WEB, revision, "ended")
            await ask(bus, "rack1", Operation.PLUG, vm="web", ids=[4])
            seen: list[VmEvent] = []
            async with asyncio.timeout(20):
                while not (isinstance(last := seen[-1].event if seen else None, Answered) and last.phase is None):
                    seen.append(await anext(with_audit))
                plain = [await anext(without) for each in seen if not isinstance(each.event, Asked | Answered)]
    assert {(each.address, each.name) for each in seen} == {("rack1/web", "web")}
    asked = [each.event for each in seen if isinstance(each.event, Asked)]
    assert [(each.who, each.operation, each.why) for each in asked] == [
        ("alice", "wish", "load"),
        ("tester", "plug", ""),
    ]
    assert asked[0].revision == revision
    assert asked[0].wish is not None
    assert asked[0].wish.map == {0, 1}
    assert asked[1].request == {"vm": "web", "ids": [4]}
    answered = [each.event for each in seen if isinstance(each.event, Answered)]
    assert [(each.operation, each.phase, each.code) for each in answered] == [
        ("wish", WishPhase.ENDED, 0),
        ("plug", None, 0),
    ]
    plugged = [each for each in plain if isinstance(each.event, VcpuPlugged)]
    assert [each.state for each in plugged] == [
        MapState(each.state.max, VcpuMap.parse(enabled), VcpuMap())
        for each, enabled in zip(plugged, ("0-1", "0-1,4"), strict=True)
        if each.state is not None
    ]
    assert [each.at for each in seen] == sorted(each.at for each in seen)


async def test_a_stream_that_the_server_refuses_ends_with_its_error(server: NatsServer, bus: Bus) -> None:
    async with Fleet(server.url) as fleet:
        await bus._link.api(f"STREAM.DELETE.{EVENTS}", {}, asked="delete it")
        with pytest.raises(Exception, match="it is not there"):
            await asyncio.wait_for(anext(fleet.events()), 20)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("VcpuPlugged", b"\xff"),
        ("VcpuPlugged", b'{"event": "VcpuPlugged"}'),
        ("Asked", b'{"who": 1, "operation": "plug"}'),
        ("Asked", b'{"who": "me", "operation": "wish", "wish": {"id": ""}}'),
        ("Answered", b'{"operation": "wish", "phase": "over"}'),
        ("Answered", b"[]"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_logged(
    kind: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_told(kind, content, 1.0) is None
    assert f"an event {kind} cannot be read" in caplog.text


def test_an_event_without_a_state_says_none_and_one_that_was_missed_is_a_resync() -> None:
    told = read_told("Asked", json.dumps({"who": "me", "operation": "plug", "more": 1}).encode(), 1.0)
    assert told is not None
    assert (told.event, told.at, told.state) == (Asked(who="me", operation="plug"), 1.0, None)
    missed = read_told("Missed", b"", 2.0)
    assert missed is not None
    assert missed.event == LayoutChanged(generation=0, resync=True)
