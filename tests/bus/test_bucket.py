"""Keys and values, on real servers: compare-and-set, and watches that miss nothing."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from qmpvcpu.bus import Bucket, Bus, Entry
from qmpvcpu.bus.feed import Feed
from qmpvcpu.errors import ServerLostError, StaleError, TooLongError, UnfitServerError
from qmpvcpu.model.hosts import LEASES, STATES, WISHES, VmKey
from qmpvcpu.testing.nats import NatsCluster, NatsServer
from tests.bus.conftest import Connect
from tests.bus.proxy import Proxy
from tests.waiting import until


async def found(feed: Feed[Entry | None], is_it: Callable[[Entry], bool]) -> Entry:
    """Return the first entry of *feed* that is the one."""
    async with asyncio.timeout(30):
        async for entry in feed:
            if entry is not None and is_it(entry):
                return entry
    raise AssertionError


async def up_to(feed: Feed[Entry | None], key: str) -> AsyncIterator[Entry]:
    async for entry in feed:
        assert entry is not None
        yield entry
        if entry.key == key:
            break


async def is_free(bucket: Bucket) -> bool:
    return await bucket.get("host.web1") is None


async def present(feed: Feed[Entry | None]) -> dict[str, bytes | None]:
    """Return what *feed* has until it says that this is all."""
    values = {}
    async with asyncio.timeout(30):
        async for entry in feed:
            if entry is None:
                break
            values[entry.key] = entry.value
    return values


async def test_a_value_is_read_back_with_its_revision_and_the_servers_time(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    before = time.time()
    first = await bucket.put("web1.a", b"1")
    second = await bucket.put("web1.a", b"2")
    entry = await bucket.get("web1.a")
    assert entry == Entry("web1.a", b"2", second, entry.created if entry else 0)
    assert first < second
    assert entry is not None
    assert before - 1 < entry.created < time.time() + 1


async def test_every_name_of_a_vm_makes_a_key(bus: Bus) -> None:
    bucket = await bus.bucket(STATES)
    key = VmKey("räck 1.example", "web=1*>").key
    revision = await bucket.create(key, b"x")
    assert await bucket.get(key) == Entry(key, b"x", revision, (await bucket.all())[key].created)
    assert await bucket.keys() == [key]


@pytest.mark.parametrize("key", ["", ".", "a..b", "a.", "a b", "a.*", "a.>", "ä", "a\r\nb"])
async def test_what_is_no_key_is_refused(bus: Bus, key: str) -> None:
    bucket = await bus.bucket(WISHES)
    with pytest.raises(ValueError, match="no key"):
        await bucket.put(key, b"")


@pytest.mark.parametrize("key", ["", "a..b", ">.a", "a b", "a*"])
async def test_what_matches_no_key_is_refused(bus: Bus, key: str) -> None:
    bucket = await bus.bucket(WISHES)
    with pytest.raises(ValueError, match="matches no key"):
        bucket.watch(key)


async def test_a_missing_key_is_none_and_so_is_a_deleted_one(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    assert await bucket.get("web1.a") is None
    await bucket.put("web1.a", b"1")
    await bucket.delete("web1.a")
    assert await bucket.get("web1.a") is None
    assert await bucket.keys() == []
    assert await bucket.all() == {}


async def test_create_succeeds_once_and_again_after_a_deletion(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    revision = await bucket.create("web1.a", b"1")
    with pytest.raises(StaleError, match="is there already") as refused:
        await bucket.create("web1.a", b"2")
    assert (refused.value.key, refused.value.last) == ("web1.a", 0)
    await bucket.delete("web1.a", revision)
    assert await bucket.create("web1.a", b"3") > revision


async def test_an_update_or_deletion_of_an_old_revision_changes_nothing(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    old = await bucket.put("web1.a", b"1")
    new = await bucket.update("web1.a", b"2", old)
    with pytest.raises(StaleError, match=f"no longer has revision {old}"):
        await bucket.update("web1.a", b"3", old)
    with pytest.raises(StaleError, match="read it again"):
        await bucket.delete("web1.a", old)
    entry = await bucket.get("web1.a")
    assert entry is not None
    assert (entry.value, entry.revision) == (b"2", new)


async def test_of_two_writers_one_wins_each_time(bus: Bus, server: NatsServer, connect: Connect) -> None:
    buckets = [await bus.bucket(WISHES), await (await connect(server.url)).bucket(WISHES)]
    revision = await buckets[0].create("web1.a", b"0")
    for number in range(50):
        values = [b"%d of %d" % (number, writer) for writer in range(2)]
        results = await asyncio.gather(
            *(bucket.update("web1.a", value, revision) for bucket, value in zip(buckets, values, strict=True)),
            return_exceptions=True,
        )
        (won,) = [writer for writer, result in enumerate(results) if isinstance(result, int)]
        assert isinstance(results[1 - won], StaleError)
        entry = await buckets[0].get("web1.a")
        assert entry is not None
        assert (entry.value, entry.revision) == (values[won], revision + 1)
        revision += 1


async def test_a_filter_chooses_keys(bus: Bus) -> None:
    bucket = await bus.bucket(STATES)
    for key in ("web1.a", "web2.a", "web1.b"):
        await bucket.put(key, key.encode())
    assert await bucket.keys("web1.>") == ["web1.a", "web1.b"]
    assert await bucket.keys("*.a") == ["web1.a", "web2.a"]
    assert {key: entry.value for key, entry in (await bucket.all("web2.*")).items()} == {"web2.a": b"web2.a"}


async def test_many_and_long_values_are_all_read(bus: Bus) -> None:
    bucket = await bus.bucket(STATES)
    wanted = {f"web{number % 7}.vm{number}": bytes(60_000) + b"%d" % number for number in range(500)}
    await asyncio.gather(*(bucket.put(key, value) for key, value in wanted.items()))
    assert {key: entry.value for key, entry in (await bucket.all()).items()} == wanted
    async with bucket.watch() as feed:
        assert await present(feed) == wanted


async def test_a_value_that_is_too_long_is_refused_before_it_is_sent(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    await bucket.put("web1.a", bytes(bus.most_bytes))
    with pytest.raises(TooLongError, match=f"{bus.most_bytes + 1} bytes") as refused:
        await bucket.put("web1.a", bytes(bus.most_bytes + 1))
    assert refused.value.most == bus.most_bytes
    assert bus.is_connected
    entry = await bucket.get("web1.a")
    assert entry is not None
    assert len(entry.value or b"") == bus.most_bytes


async def test_a_watch_says_what_is_there_then_none_then_what_changes(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    await bucket.put("web1.a", b"1")
    await bucket.put("web2.a", b"1")
    await bucket.put("web1.gone", b"1")
    await bucket.delete("web1.gone")
    async with bucket.watch("web1.>") as feed:
        assert await present(feed) == {"web1.a": b"1"}
        revision = await bucket.put("web1.b", b"2")
        await bucket.put("web2.b", b"2")
        changed = await anext(feed)
        await bucket.delete("web1.b")
        deleted = await anext(feed)
        assert changed is not None
        assert deleted is not None
        assert (changed.key, changed.value, changed.revision) == ("web1.b", b"2", revision)
        assert (deleted.key, deleted.value, deleted.revision) == ("web1.b", None, revision + 2)


async def test_a_watch_tells_of_a_deletion_whose_value_it_never_saw(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    async with bucket.watch() as feed:
        assert await anext(feed) is None
        for _ in range(50):
            await bucket.put("web1.a", b"1")
            await bucket.delete("web1.a")
        revision = await bucket.put("web1.b", b"2")
        told = [entry async for entry in up_to(feed, "web1.b")]
    assert told[-1].revision == revision
    assert (told[-2].value, told[-2].revision) == (None, revision - 1)


async def test_a_watch_begins_with_what_was_deleted_if_it_is_asked_to(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    await bucket.put("web1.gone", b"1")
    gone = await bucket.delete("web1.gone")
    await bucket.put("web1.there", b"2")
    async with bucket.watch(deleted=True) as feed:
        assert await present(feed) == {"web1.gone": None, "web1.there": b"2"}
        last = await bucket.last("web1.gone")
        assert last is not None
        assert (last.value, last.revision) == (None, gone)
        assert await bucket.update("web1.gone", b"3", gone) > gone
        changed = await anext(feed)
        assert changed is not None
        assert (changed.key, changed.value) == ("web1.gone", b"3")


async def test_a_watch_of_nothing_says_none_at_once(bus: Bus) -> None:
    async with (await bus.bucket(WISHES)).watch() as feed:
        assert await anext(feed) is None


@pytest.mark.parametrize("how", ["killed", "cut", "stopped"])
async def test_a_watch_misses_nothing_while_the_server_cannot_be_reached(
    server: NatsServer, connect: Connect, how: str
) -> None:
    async with Proxy(server.host, server.port) as proxy:
        direct, bus = await connect(server.url), await connect(proxy.url)
        await direct.prepare()
        writing, reading = await direct.bucket(WISHES), await bus.bucket(WISHES)
        for key in ("web1.kept", "web1.changed", "web1.deleted"):
            await writing.put(key, b"1")
        async with reading.watch() as feed:
            assert len(await present(feed)) == 3
            proxy.stop()
            await writing.put("web1.changed", b"2")
            await writing.put("web1.new", b"2")
            await writing.delete("web1.deleted")
            if how == "killed":
                await server.kill()
                await server.start()
            if how != "stopped":
                proxy.cut()
            else:
                await until(lambda: not bus.is_connected, within=20)
            proxy.go_on()
            told = [await anext(feed), await anext(feed), await anext(feed)]
            assert {entry.key: entry.value for entry in told if entry} == {
                "web1.changed": b"2",
                "web1.new": b"2",
                "web1.deleted": None,
            }
            await writing.put("web1.last", b"3")
            entry = await anext(feed)
            assert entry is not None
            assert entry.key == "web1.last"


async def test_a_key_that_was_deleted_and_forgotten_while_a_watch_was_cut_off_is_told(
    bus: Bus, server: NatsServer, connect: Connect
) -> None:
    """A lease that expires leaves no trace."""
    async with Proxy(server.host, server.port) as proxy:
        reading = await (await connect(proxy.url)).bucket(LEASES)
        writing = await bus.bucket(LEASES)
        revision = await writing.put("host.web1", b"me")
        async with reading.watch() as feed:
            assert await present(feed) == {"host.web1": b"me"}
            proxy.stop()
            await until(lambda: is_free(writing), within=20)
            proxy.cut()
            proxy.go_on()
            entry = await anext(feed)
            assert entry is not None
            assert (entry.key, entry.value, entry.revision) == ("host.web1", None, revision)


async def test_a_value_that_expires_is_told_without_a_word_from_the_server(bus: Bus) -> None:
    bucket = await bus.bucket(LEASES)
    assert bucket.ttl == 2.0
    async with bucket.watch() as feed:
        assert await anext(feed) is None
        revision = await bucket.put("host.web1", b"me")
        await found(feed, lambda entry: entry.value == b"me")
        gone = await found(feed, lambda entry: entry.value is None)
        assert (gone.key, gone.revision) == ("host.web1", revision)
        assert await bucket.get("host.web1") is None


async def test_a_bucket_that_was_made_anew_is_watched_from_its_start(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    for number in range(3):
        await bucket.put("web1.a", b"%d" % number)
    async with bucket.watch() as feed:
        assert await present(feed) == {"web1.a": b"2"}
        await bus._link.api(f"STREAM.DELETE.KV_{WISHES}", {}, asked="delete")
        await bus.prepare()
        revision = await bucket.put("web1.a", b"new")
        entry = await found(feed, lambda entry: entry.value is not None)
        assert (entry.value, entry.revision) == (b"new", revision)


async def test_a_write_whose_answer_was_lost_is_made_once(server: NatsServer, connect: Connect) -> None:
    async with Proxy(server.host, server.port) as proxy:
        direct, bus = await connect(server.url), await connect(proxy.url)
        await direct.prepare()
        there, bucket = await direct.bucket(WISHES), await bus.bucket(WISHES)
        old = await there.put("web1.a", b"1")
        proxy.loses_answers = True
        async with there.watch() as feed:
            assert await present(feed) == {"web1.a": b"1"}
            update = asyncio.create_task(bucket.update("web1.a", b"2", old))
            written = await found(feed, lambda entry: entry.value == b"2")
            proxy.cut()
            proxy.loses_answers = False
            assert await update == written.revision
            proxy.loses_answers = True
            create = asyncio.create_task(bucket.create("web1.b", b"3"))
            written = await found(feed, lambda entry: entry.key == "web1.b")
            proxy.cut()
            proxy.loses_answers = False
            assert await create == written.revision
            assert await there.put("web1.c", b"4") == written.revision + 1


async def test_a_write_whose_answer_was_lost_is_stale_if_another_one_was_made(
    server: NatsServer, connect: Connect
) -> None:
    async with Proxy(server.host, server.port) as proxy:
        direct, bus = await connect(server.url), await connect(proxy.url)
        await direct.prepare()
        there, bucket = await direct.bucket(WISHES), await bus.bucket(WISHES)
        old = await there.put("web1.a", b"1")
        proxy.stop()
        update = asyncio.create_task(bucket.update("web1.a", b"2", old))
        await there.put("web1.a", b"2")  # the same value, by somebody else
        proxy.cut()
        proxy.go_on()
        with pytest.raises(StaleError):
            await update


async def test_a_call_says_whether_it_may_have_been_done_when_its_time_is_over(
    server: NatsServer, connect: Connect
) -> None:
    bus = await connect(server.url)
    await bus.prepare()
    bucket = await bus.bucket(WISHES)
    server.freeze()
    try:
        with pytest.raises(ServerLostError, match="may have been done") as unknown:
            await bucket.put("web1.a", b"1", timeout=0.5)
        assert unknown.value.maybe_done
        assert unknown.value.outcome.value == "unknown"
    finally:
        server.thaw()
    await server.kill()
    await until(lambda: not bus.is_connected, within=20)
    with pytest.raises(ServerLostError, match="there is no connection; it was not done") as not_done:
        await bucket.put("web1.a", b"1", timeout=0.5)
    assert not not_done.value.maybe_done
    with pytest.raises(ServerLostError, match="not done"):
        await bucket.all(timeout=0.5)


async def test_a_missing_bucket_names_the_command_that_makes_it(server: NatsServer, connect: Connect) -> None:
    bus = await connect(server.url)
    with pytest.raises(UnfitServerError, match="bucket qmpvcpu_wishes: it is not there; run 'qmpvcpu hosts init'"):
        await bus.bucket(WISHES)


async def test_a_bucket_that_is_deleted_under_its_users_is_said_to_be_gone(bus: Bus) -> None:
    bucket = await bus.bucket(WISHES)
    async with bucket.watch() as feed:
        assert await anext(feed) is None
        await bus._link.api(f"STREAM.DELETE.KV_{WISHES}", {}, asked="delete")
        with pytest.raises(UnfitServerError, match="qmpvcpu hosts init"):
            await bucket.get("web1.a")
        with pytest.raises(UnfitServerError, match="qmpvcpu hosts init"):
            await bucket.put("web1.a", b"1", timeout=0.5)
        with pytest.raises(UnfitServerError, match="qmpvcpu hosts init"):
            async with asyncio.timeout(30):
                await anext(feed)


async def test_nothing_that_was_acknowledged_is_lost_with_a_clusters_leader(
    cluster: NatsCluster, connect: Connect
) -> None:
    bus, watching = await connect(cluster.url), await connect(cluster.url)
    await bus.prepare(replicas=3)
    writing, reading = await bus.bucket(WISHES), await watching.bucket(WISHES)
    revisions: dict[str, int] = {}

    async def write() -> None:
        for number in range(200):
            key = f"web1.vm{number}"
            revisions[key] = await writing.create(key, b"%d" % number, timeout=30)

    async with reading.watch() as feed:
        assert await anext(feed) is None
        work = asyncio.create_task(write())
        await found(feed, lambda entry: entry.key == "web1.vm20")
        info = await bus._link.api(f"STREAM.INFO.KV_{WISHES}", {}, asked="leader")
        leader = cluster.named(info["cluster"]["leader"])
        await leader.kill()
        seen = {"web1.vm20"}
        async with asyncio.timeout(50):
            while not work.done() or len(seen) < 180:
                entry = await anext(feed)
                if entry is not None:
                    seen.add(entry.key)
                if len(seen) == 180:
                    await work
        assert len(revisions) == 200
        assert {key: entry.revision for key, entry in (await writing.all()).items()} == revisions
        assert len(seen) == 180
