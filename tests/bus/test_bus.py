"""Requests, what happened, and what must be on the server, on real ones."""

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qmpvcpu.bus import Bus, Endpoint, Happened, Request
from qmpvcpu.bus.feed import Feed
from qmpvcpu.errors import (
    HostFailedError,
    HostSilentError,
    Outcome,
    ServerForbiddenError,
    ServerLostError,
    TooLongError,
    UnfitServerError,
)
from qmpvcpu.model.hosts import (
    CAMPAIGNS,
    EVENTS,
    LEASES,
    STATES,
    WISHES,
    Operation,
    VmKey,
    event_subject,
    request_subject,
)
from qmpvcpu.testing.nats import NatsCluster, NatsServer
from tests.bus.conftest import Connect
from tests.bus.proxy import Proxy
from tests.bus.test_connection import users
from tests.waiting import until

if TYPE_CHECKING:
    from nats.aio.client import Client

LIST = request_subject("web1.example", Operation.LIST, "me")
EVENT = event_subject(VmKey("web1", "a.b"), "VcpuPlugged")


async def echo(request: Request) -> bytes:
    return request.subject.encode() + b" " + request.data


# --- requests


async def test_a_request_is_answered_with_its_subject_at_hand(bus: Bus, server: NatsServer, connect: Connect) -> None:
    asking = await connect(server.url)
    endpoint = Endpoint("qmpvcpu.do.web1=2Eexample.list.*", echo)
    async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": endpoint}):
        assert await asking.request(LIST, b"?", 5) == LIST.encode() + b" ?"


async def test_whoever_serves_can_be_asked_from_then_on(bus: Bus, server: NatsServer, connect: Connect) -> None:
    """nats-py sends the ping of its flush before the subscriptions that it waits for."""
    asking = await connect(server.url)
    for number in range(300):
        subject = f"qmpvcpu.do.web{number}.list.me"
        async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(subject, echo)}):
            assert await asking.request(subject, b"?", 20) == subject.encode() + b" ?"


async def test_a_request_that_nobody_answers_to_is_told_at_once(bus: Bus) -> None:
    async with asyncio.timeout(10):
        with pytest.raises(HostSilentError, match="start the agent of that host") as silent:
            await bus.request(LIST, b"", 60)
    assert not silent.value.is_there
    assert silent.value.outcome is Outcome.UNCHANGED


async def test_a_request_that_is_not_answered_in_time_may_have_been_carried_out(bus: Bus) -> None:
    async def never(_request: Request) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(LIST, never)}):
        with pytest.raises(HostSilentError, match=r"no answer to \S+ in 0\.1 s: it may have been") as silent:
            await bus.request(LIST, b"", 0.1)
    assert silent.value.is_there
    assert silent.value.outcome is Outcome.UNKNOWN


async def test_a_long_request_holds_up_no_other(bus: Bus) -> None:
    go_on = asyncio.Event()

    async def answer(request: Request) -> bytes:
        if request.data == b"long":
            await go_on.wait()
        return request.data

    async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(LIST, answer)}):
        long = asyncio.create_task(bus.request(LIST, b"long", 30))
        for number in range(100):
            assert await bus.request(LIST, b"%d" % number, 30) == b"%d" % number
        assert not long.done()
        go_on.set()
        assert await long == b"long"


async def test_a_handler_that_fails_is_told_to_who_asked_and_logged(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_request: Request) -> bytes:
        raise LookupError("no \x1b such\nthing")

    async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(LIST, fail)}):
        with pytest.raises(HostFailedError) as failed:
            await bus.request(LIST, b"", 5)
    assert failed.value.said == r"LookupError: no \x1b such\nthing"
    assert failed.value.outcome is Outcome.UNKNOWN
    (record,) = [record for record in caplog.records if record.exc_info]
    assert LIST in record.getMessage()


async def test_requests_that_are_being_answered_when_an_agent_ends_are_told_so(bus: Bus) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def answer(_request: Request) -> bytes:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(LIST, answer)}):
        asked = asyncio.create_task(bus.request(LIST, b"", 30))
        await begun.wait()
    assert ended.is_set()
    with pytest.raises(HostFailedError, match="stopped meanwhile"):
        await asked
    with pytest.raises(HostSilentError):
        await bus.request(LIST, b"", 5)


async def test_a_question_or_answer_that_is_too_long_is_said_to_be(bus: Bus) -> None:
    async def much(_request: Request) -> bytes:
        return bytes(bus.most_bytes + 1)

    async def enough(request: Request) -> bytes:
        return request.data

    endpoints = {"list": Endpoint(LIST, much), "plan": Endpoint("plan", enough)}
    async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, endpoints):
        with pytest.raises(TooLongError):
            await bus.request("plan", bytes(bus.most_bytes + 1), 5)
        with pytest.raises(HostFailedError, match=f"TooLongError: answer to {LIST}"):
            await bus.request(LIST, b"", 5)
        assert len(await bus.request("plan", bytes(bus.most_bytes), 5)) == bus.most_bytes


async def test_a_subject_that_is_too_long_for_a_line_does_not_cost_the_connection(bus: Bus) -> None:
    lost: list[str] = []
    bus._link.on_cut.add(lambda: lost.append("lost"))
    states = await bus.bucket(STATES)
    for size in (3980, 5000):
        with pytest.raises(TooLongError, match="max_control_line"):
            await states.put("x" * size, b"")
    await states.put("x" * 3960, b"")
    assert not lost


async def test_an_agent_is_found_with_the_tools_of_nats(bus: Bus) -> None:
    endpoints = {"list": Endpoint(LIST, echo), "plan": Endpoint("plan.*", echo)}
    async with bus.serve("qmpvcpu", "1.2.3", "a test", {"host": "web1"}, endpoints):
        await bus.request(LIST, b"", 5)
        found = json.loads(await bus.request("$SRV.PING.qmpvcpu", b"", 5))
        assert (found["name"], found["version"], found["metadata"]) == ("qmpvcpu", "1.2.3", {"host": "web1"})
        info = json.loads(await bus.request("$SRV.INFO.qmpvcpu", b"", 5))
        assert info["description"] == "a test"
        assert [(each["name"], each["subject"]) for each in info["endpoints"]] == [("list", LIST), ("plan", "plan.*")]
        stats = json.loads(await bus.request("$SRV.STATS.qmpvcpu", b"", 5))
        assert [each["num_requests"] for each in stats["endpoints"]] == [1, 0]
    with pytest.raises(HostSilentError):
        await bus.request("$SRV.PING.qmpvcpu", b"", 5)


async def test_an_agent_answers_again_after_the_connection_was_lost(
    bus: Bus, server: NatsServer, connect: Connect
) -> None:
    async with Proxy(server.host, server.port) as proxy:
        agent = await connect(proxy.url)
        async with agent.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(LIST, echo)}):
            for _ in range(3):
                proxy.cut()
                await until(lambda: not agent.is_connected)
                await asyncio.wait_for(agent.wait_connected(), 20)
                assert await bus.request(LIST, b"?", 5) == LIST.encode() + b" ?"


async def test_an_agent_answers_again_after_it_was_cut_off_while_it_came_back(
    bus: Bus, server: NatsServer, connect: Connect
) -> None:
    async with Proxy(server.host, server.port) as proxy:
        agent = await connect(proxy.url)
        lost: list[Client] = []

        async def cut_once() -> None:
            if not lost:
                lost.append(agent._link.client)
                proxy.cut()
                await until(lambda: lost[0].is_closed)
                await lost[0].flush()  # which fails, as subscribing does

        agent._link.on_client.add(cut_once)
        async with agent.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(LIST, echo)}):
            proxy.cut()
            await until(lambda: bool(lost), within=20)
            await asyncio.wait_for(agent.wait_connected(), 30)
            assert agent._link.client is not lost[0]
            assert await bus.request(LIST, b"?", 5) == LIST.encode() + b" ?"


async def test_to_begin_to_answer_on_a_connection_that_has_just_ended_says_that_it_is_lost(bus: Bus) -> None:
    await bus._link.client.close()
    with pytest.raises(ServerLostError, match="serve qmpvcpu"):
        async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(LIST, echo)}):
            pass


async def test_who_may_not_answer_is_told_when_it_begins(tmp_path: Path, binary: Path, connect: Connect) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    denied = "qmpvcpu.do.WEB2.>"
    async with NatsServer(binary=binary, config=users(subscribe=f'deny: "{denied}"')) as server:
        bus = await connect(server.url, login=login)
        subject = "qmpvcpu.do.WEB2.list.*"
        with pytest.raises(ServerForbiddenError, match="serve qmpvcpu") as refused:
            async with bus.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(subject, echo)}):
                pass
        assert refused.value.subject == subject


async def test_who_may_not_ask_is_told_and_does_not_wait(tmp_path: Path, binary: Path, connect: Connect) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    async with NatsServer(binary=binary, config=users(publish='deny: "qmpvcpu.do.>"')) as server:
        bus = await connect(server.url, login=login)
        async with asyncio.timeout(20):
            with pytest.raises(ServerForbiddenError) as refused:
                await bus.request(LIST, b"", 60)
        assert refused.value.subject == LIST


async def test_a_request_without_a_connection_waits_for_one_and_says_that_it_was_not_sent(
    bus: Bus, server: NatsServer
) -> None:
    await server.kill()
    await until(lambda: not bus.is_connected, within=20)
    with pytest.raises(ServerLostError, match="not done"):
        await bus.request(LIST, b"", 0.2)
    asked = asyncio.create_task(bus.request(LIST, b"", 30))
    await server.start()
    with pytest.raises(HostSilentError):
        await asked


async def test_a_request_whose_connection_is_lost_may_have_been_carried_out(
    server: NatsServer, connect: Connect
) -> None:
    async with Proxy(server.host, server.port) as proxy:
        bus, agent = await connect(proxy.url), await connect(server.url)
        begun = asyncio.Event()

        async def answer(_request: Request) -> bytes:
            begun.set()
            await asyncio.Event().wait()
            raise AssertionError

        async with agent.serve("qmpvcpu", "1.2.3", "a test", {}, {"list": Endpoint(LIST, answer)}):
            asked = asyncio.create_task(bus.request(LIST, b"", 60))
            await begun.wait()
            proxy.cut()
            with pytest.raises((HostSilentError, ServerLostError)) as lost:
                await asked
            assert lost.value.outcome is Outcome.UNKNOWN


# --- what happened


async def some(feed: Feed[Happened], count: int) -> list[Happened]:
    """Return the next *count* of *feed*."""
    async with asyncio.timeout(30):
        return [await anext(feed) for _ in range(count)]


async def test_what_happens_from_then_on_is_followed(bus: Bus) -> None:
    await bus.publish(EVENT, b"before")
    before = time.time()
    async with bus.follow("qmpvcpu.event.web1.*.*") as feed:
        await bus.publish(EVENT, b"1")
        await bus.publish(event_subject(VmKey("web2", "a"), "VcpuPlugged"), b"other")
        await bus.publish(EVENT, b"2")
        first, second = await some(feed, 2)
    assert (first.subject, first.data, second.data) == (EVENT, b"1", b"2")
    assert before - 1 < first.created <= second.created < time.time() + 1


async def test_what_happens_is_followed_without_a_gap_or_a_double(server: NatsServer, connect: Connect) -> None:
    async with Proxy(server.host, server.port) as proxy:
        direct, bus = await connect(server.url), await connect(proxy.url)
        await direct.prepare()
        async with bus.follow("qmpvcpu.event.>") as feed:
            for number in range(0, 300, 100):
                for each in range(number, number + 100):
                    await direct.publish(EVENT, b"%d" % each)
                    if each == number + 50:
                        proxy.cut()
                assert [int(each.data) for each in await some(feed, 100)] == list(range(number, number + 100))
            await server.kill()
            await server.start()
            await direct.publish(EVENT, b"300")
            assert [each.data for each in await some(feed, 1)] == [b"300"]


async def test_a_stream_that_was_made_anew_is_followed_from_its_start(bus: Bus) -> None:
    async with bus.follow("qmpvcpu.event.>") as feed:
        for number in range(3):
            await bus.publish(EVENT, b"%d" % number)
        await some(feed, 3)
        await bus._link.api(f"STREAM.DELETE.{EVENTS}", {}, asked="delete")
        await bus.prepare()
        await bus.publish(EVENT, b"new")
        assert [each.data for each in await some(feed, 1)] == [b"new"]


async def test_following_what_is_not_there_names_the_command_that_makes_it(
    server: NatsServer, connect: Connect
) -> None:
    bus = await connect(server.url)
    with pytest.raises(UnfitServerError, match="qmpvcpu hosts init"):
        async with bus.follow("qmpvcpu.event.>"):
            pass


async def test_who_may_not_tell_of_another_host_is_told_so(tmp_path: Path, connect: Connect) -> None:
    login = tmp_path / "login"
    login.write_text("web1:x")
    async with NatsServer(config=users(publish='deny: "qmpvcpu.event.web2.>"')) as server:
        bus = await connect(server.url, login=login)
        await bus.prepare()
        await bus.publish(EVENT, b"1")
        with pytest.raises(ServerForbiddenError, match=r"publish to qmpvcpu\.event\.web2\.a"):
            await bus.publish(event_subject(VmKey("web2", "a"), "VcpuPlugged"), b"2")


# --- what must be there


async def test_what_hosts_need_is_made_once_and_kept(bus: Bus) -> None:
    wishes = await bus.bucket(WISHES)
    await wishes.put("web1.a", b"1")
    await bus.prepare(lease_s=99)
    assert await wishes.keys() == ["web1.a"]
    ages = {name: (await bus.bucket(name)).ttl for name in (WISHES, STATES, LEASES, CAMPAIGNS)}
    assert ages == {WISHES: None, STATES: None, LEASES: 2.0, CAMPAIGNS: None}


async def test_revisions_are_later_than_those_of_a_bucket_that_was_deleted(connect: Connect) -> None:
    async with NatsServer() as server:  # Debian's cannot be told with which to begin
        bus = await connect(server.url)
        await bus.prepare()
        before = await (await bus.bucket(WISHES)).put("a.b", b"")
        await bus._link.api(f"STREAM.DELETE.KV_{WISHES}", {}, asked="delete it")
        await bus.prepare()
        assert await (await bus.bucket(WISHES)).put("a.b", b"") > before


async def test_two_that_make_it_at_once_both_succeed(server: NatsServer, connect: Connect) -> None:
    both = [await connect(server.url) for _ in range(2)]
    await asyncio.gather(*(each.prepare() for each in both))
    await asyncio.gather(*(each.bucket(CAMPAIGNS) for each in both))


@pytest.mark.parametrize("stream", [f"KV_{STATES}", EVENTS])
async def test_what_somebody_else_made_under_its_name_is_left_alone(
    server: NatsServer, connect: Connect, stream: str
) -> None:
    bus = await connect(server.url)
    config = {"name": stream, "subjects": [f"other.{stream}"], "retention": "limits", "storage": "memory"}
    await bus._link.api(f"STREAM.CREATE.{stream}", config, asked="make")
    with pytest.raises(UnfitServerError, match="somebody else made it; use an account of its own"):
        await bus.prepare(replicas=1)
    if stream != EVENTS:
        with pytest.raises(UnfitServerError, match="somebody else made it"):
            await bus.bucket(STATES)


async def test_replicas_need_servers(bus: Bus) -> None:
    with pytest.raises(UnfitServerError, match="it is no cluster, so it cannot have 3 replicas"):
        await bus.prepare(replicas=3)


async def test_a_cluster_wants_to_be_told_on_how_many_servers_each_bucket_is(
    cluster: NatsCluster, connect: Connect
) -> None:
    bus = await connect(cluster.url)
    with pytest.raises(UnfitServerError, match="qmpvcpu hosts init --replicas 3"):
        await bus.prepare()
    await bus.prepare(replicas=1)
    await bus.prepare(replicas=3)
    await bus.prepare()
    for stream in (f"KV_{WISHES}", f"KV_{LEASES}", EVENTS):
        info = await bus._link.api(f"STREAM.INFO.{stream}", {}, asked="look")
        assert info["config"]["num_replicas"] == 3
    assert (await bus.bucket(WISHES)).name == WISHES


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_servers_clock_that_was_set_is_noticed_by_what_it_writes(bus: Bus, hours: int) -> None:
    wishes = await bus.bucket(WISHES)
    await wishes.put("web1.old", b"")
    async with wishes.watch() as entries:
        assert (await anext(entries)) is not None
        assert (await anext(entries)) is None  # all that was there
        assert bus._clock._offset is not None
        bus._clock._offset += hours * 3600  # for us the same as if the server's had been set by an hour
        assert abs(bus.now() - time.time()) > 1800
        await wishes.put("web1.new", b"")
        assert (await anext(entries)) is not None
        assert abs(bus.now() - time.time()) < 60


async def test_the_servers_clock_is_known_after_it_was_asked_for(bus: Bus) -> None:
    await bus.sync_clock()
    entry_at = await (await bus.bucket(WISHES)).put("web1.a", b"")
    entry = await (await bus.bucket(WISHES)).get("web1.a")
    assert entry is not None
    assert entry.revision == entry_at
    assert abs(bus.now() - entry.created) < 5
    assert abs(bus.now() - time.time()) < 5
