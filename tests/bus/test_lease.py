"""Leases on real servers: one holder at a time, whatever happens to servers and connections."""

import asyncio
import re
import time
from collections.abc import Callable

import pytest

from qmpvcpu.bus import Bucket, Bus, Lease
from qmpvcpu.errors import LeaseTakenError, StaleError
from qmpvcpu.model.hosts import LEASES, WISHES
from qmpvcpu.testing.nats import NatsCluster, NatsServer
from tests.bus.conftest import Connect
from tests.bus.proxy import Proxy
from tests.waiting import until


def renewed(lease: Lease) -> Callable[[], bool]:
    """Return whether it is renewed after now."""
    then = lease.held_until
    return lambda: lease.held_until > then


async def check_inherited(bucket: Bucket, *, wait: float) -> None:
    """Assert that the lease of one that died is free for the next one within *wait* seconds."""
    await bucket.create("host.web1", b"dead")
    async with Lease(bucket, "host.web1", b"heir", wait=wait) as lease:
        assert lease.is_held
        entry = await bucket.get("host.web1")
        assert entry is not None
        assert entry.value == b"heir"


async def test_a_lease_is_held_renewed_and_given_back(bus: Bus) -> None:
    bucket = await bus.bucket(LEASES)
    async with Lease(bucket, "host.web1", b"me") as lease:
        assert lease.is_held
        first = await bucket.get("host.web1")
        assert first is not None
        assert first.value == b"me"
        begun = time.monotonic()
        while time.monotonic() < begun + 2 * 2.0:  # twice its bucket's ttl
            assert lease.is_held
            assert await bucket.get("host.web1") is not None
            await asyncio.sleep(0.05)
        later = await bucket.get("host.web1")
        assert later is not None
        assert later.revision > first.revision
    assert not lease.is_held
    assert lease.lost.is_set()
    assert await bucket.get("host.web1") is None


async def test_a_lease_that_is_taken_names_its_holder(bus: Bus) -> None:
    bucket = await bus.bucket(LEASES)
    async with Lease(bucket, "host.web1", b'{"agent": "first"}'):
        with pytest.raises(LeaseTakenError, match=re.escape('held by {"agent": "first"}')) as taken:
            async with Lease(bucket, "host.web1", b"second"):
                pass
        assert taken.value.holder == b'{"agent": "first"}'
        async with Lease(bucket, "host.web2", b"second") as other:
            assert other.is_held
    async with Lease(bucket, "host.web1", b"second") as next_one:
        assert next_one.is_held


async def test_the_lease_of_one_that_died_is_free_after_a_while(bus: Bus) -> None:
    await check_inherited(await bus.bucket(LEASES), wait=30)


async def test_the_lease_of_one_that_died_is_free_though_the_server_does_not_forget_it(connect: Connect) -> None:
    async with NatsServer() as server:
        bus = await connect(server.url)
        await bus.prepare(lease_s=3600)  # as if the server's clock had been set back after it was written
        bucket = await bus.bucket(LEASES)
        bucket.ttl = 0.5
        await check_inherited(bucket, wait=60)


async def test_what_a_holder_says_of_itself_can_change(bus: Bus) -> None:
    bucket = await bus.bucket(LEASES)
    async with Lease(bucket, "host.web1", b"1") as lease:
        await lease.update(b"2")
        await until(renewed(lease), within=20)
        entry = await bucket.get("host.web1")
        assert entry is not None
        assert entry.value == b"2"


async def test_a_lease_that_somebody_took_away_is_lost(bus: Bus) -> None:
    bucket = await bus.bucket(LEASES)
    async with Lease(bucket, "host.web1", b"me") as lease:
        await bucket.put("host.web1", b"thief")
        await asyncio.wait_for(lease.lost.wait(), 20)
        assert not lease.is_held
        with pytest.raises(StaleError):
            await lease.update(b"me again")
    entry = await bucket.get("host.web1")
    assert entry is None or entry.value == b"thief"


async def test_a_lease_is_lost_before_another_one_can_have_it(bus: Bus, server: NatsServer, connect: Connect) -> None:
    async with Proxy(server.host, server.port) as proxy:
        cut_off = await (await connect(proxy.url)).bucket(LEASES)
        bucket = await bus.bucket(LEASES)
        async with Lease(cut_off, "host.web1", b"old") as old:
            lost_at = asyncio.create_task(_time_of(old.lost))
            proxy.stop()
            async with Lease(bucket, "host.web1", b"new", wait=30) as new:
                taken_at = time.monotonic()
                assert not old.is_held
                assert await asyncio.wait_for(lost_at, 20) - 0.5 < taken_at
                proxy.cut()
                proxy.go_on()
                assert new.is_held
        entry = await bucket.get("host.web1")
        assert entry is None  # the old holder took nothing away, and the new one gave it back


async def _time_of(event: asyncio.Event) -> float:
    await event.wait()
    return time.monotonic()


async def test_a_lease_survives_a_server_that_is_killed_and_comes_back(bus: Bus, server: NatsServer) -> None:
    bucket = await bus.bucket(LEASES)
    async with Lease(bucket, "host.web1", b"me") as lease:
        await server.kill()
        await server.start()
        is_renewed = renewed(lease)
        await until(lambda: is_renewed() or lease.lost.is_set(), within=20)
        assert lease.is_held is not lease.lost.is_set()


async def test_a_lease_is_renewed_through_a_change_of_leader(cluster: NatsCluster, connect: Connect) -> None:
    bus = await connect(cluster.url)
    await bus.prepare(replicas=3, lease_s=30.0)
    bucket = await bus.bucket(LEASES)
    async with Lease(bucket, "host.web1", b"me") as lease:
        for _ in range(2):
            info = await bus._link.api(f"STREAM.INFO.KV_{LEASES}", {}, asked="leader")
            leader = cluster.named(info["cluster"]["leader"])
            await leader.kill()
            await until(renewed(lease), within=40)
            assert lease.is_held
            await leader.start()


async def test_a_lease_in_a_bucket_that_forgets_nothing_is_refused(bus: Bus) -> None:
    with pytest.raises(ValueError, match="held for ever"):
        Lease(await bus.bucket(WISHES), "host.web1", b"me")
