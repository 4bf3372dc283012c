"""Campaigns on a real server: their bounds, their operators, and controllers that die."""

import asyncio
import contextlib
import functools
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest

from qmpvcpu.bus import Bucket, Bus
from qmpvcpu.errors import (
    CampaignError,
    LeaseTakenError,
    ServerForbiddenError,
    ServerLostError,
    TransitionError,
    WishError,
)
from qmpvcpu.hosts import CampaignBook, CampaignController, vm_result
from qmpvcpu.model.campaign import CampaignSpec, CampaignStatus, Ended, Ledger, lease_key
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.hosts import CAMPAIGNS, LEASES, STATES, WISHES, VmKey
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import Wish, WishOptions, WishPhase
from qmpvcpu.testing import Behaviour
from qmpvcpu.testing.nats import NatsServer
from tests import figures
from tests.hosts.accounts import permitted
from tests.hosts.obliging import ObligingHosts
from tests.hosts.world import agent_of, connected, served, vm_in, wish
from tests.waiting import until

SPEC = CampaignSpec(map=VcpuMap.parse("0-2"), at_once=3, per_host=1, stop_after=None, who="me", drop_after=60)
ANOTHER = json.dumps(to_json(Ledger("y", SPEC, 0.0, 1))).encode()


@contextlib.asynccontextmanager
async def ready(lease_s: float = 60.0) -> AsyncIterator[tuple[NatsServer, Bus]]:
    async with NatsServer() as server, connected(server) as bus:
        await bus.prepare(lease_s=lease_s)
        yield server, bus


def some(hosts: int, each: int) -> list[VmKey]:
    return [VmKey(f"h{host}", f"v{vm}") for host in range(hosts) for vm in range(each)]


def names(vms: list[VmKey]) -> tuple[str, ...]:
    return tuple(sorted({vm.host for vm in vms}))


async def created(bus: Bus, spec: CampaignSpec, vms: Iterable[VmKey]) -> Ledger:
    return await (await CampaignBook.open(bus)).create(spec, vms)


async def history(bus: Bus, campaign: str, into: list[Ledger]) -> None:
    """Note every ledger that there is, and check its bounds."""
    async for each in (await CampaignBook.open(bus)).follow(campaign):
        if isinstance(each, Ledger):
            into.append(each)
            assert len(each.in_flight) <= each.spec.at_once
            per_host = Counter(key.split(".")[0] for key in each.in_flight)
            assert max(per_host.values(), default=0) <= each.spec.per_host


@contextlib.asynccontextmanager
async def running(bus: Bus, campaign: str) -> AsyncIterator["asyncio.Task[Ledger]"]:
    task = asyncio.ensure_future(CampaignController(bus, name="test").run(campaign))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_campaign_changes_the_vms_of_real_hosts(tmp_path: Path) -> None:
    async with served() as server, connected(server) as bus, contextlib.AsyncExitStack() as stack:
        vms = some(2, 2)
        for host in names(vms):
            directory = tmp_path / host
            directory.mkdir()
            for vm in ("v0", "v1"):
                behaviour = Behaviour.refusing(0x82) if (host, vm) == ("h1", "v1") else None
                await stack.enter_async_context(
                    vm_in(directory, vm, **({} if behaviour is None else {"behaviour": behaviour}))
                )
            await stack.enter_async_context(agent_of(server, host, directory))
        controller, book = CampaignController(bus, name="test"), await CampaignBook.open(bus)
        ledger = await created(bus, SPEC, vms)
        ledgers: list[Ledger] = []
        watching = asyncio.ensure_future(history(bus, ledger.id, ledgers))
        done = await controller.run(ledger.id)
        assert (done.status, done.reached, done.failed) == (CampaignStatus.DONE, 4, 0)
        await watching
        assert max(len(each.in_flight) for each in ledgers) == 2
        summary = await book.summary(ledger.id)
        assert sorted(each.key for each in summary.ended) == vms
        for each in summary.ended:
            result = vm_result(each)
            assert str(result.unwrap() and result.layout and result.layout.enabled) == "0-2"

        # The guest of one VM refuses: that is its result, and a campaign stops after it.
        options = WishOptions(on_failure=OnFailure.REVERT, timeout=5)
        back = CampaignSpec(map=VcpuMap.parse("0"), options=options, at_once=1, stop_after=1)
        ledger = await created(bus, back, reversed(vms))
        halted = await controller.run(ledger.id)
        assert (halted.status, halted.failed, halted.waiting) == (CampaignStatus.HALTED, 1, 3)
        summary = await book.summary(ledger.id)
        (refused,) = summary.ended
        assert refused.key == VmKey("h1", "v1")
        with pytest.raises(TransitionError):
            vm_result(refused).unwrap()
        assert sorted(summary.waiting) == vms[:3]


async def test_nothing_is_begun_after_so_many_failures() -> None:
    async with ready() as (_, bus):
        vms = some(4, 5)
        hosts = ObligingHosts(bus, names(vms), lambda vm: int(vm.vm == "v1"))
        async with hosts.running():
            spec = CampaignSpec(count=2, at_once=1, stop_after=2)
            ledger = await created(bus, spec, vms)
            done = await CampaignController(bus, name="test").run(ledger.id)
        assert (done.status, done.failed, done.ended) == (CampaignStatus.HALTED, 2, 6)
        assert hosts.claims.total() == 6


async def test_a_silent_host_comes_last_and_holds_nobody_up() -> None:
    async with ready() as (_, bus):
        vms = [VmKey("dead", "v0"), VmKey("dead", "v1"), *some(2, 2)]
        async with ObligingHosts(bus, ("h0", "h1")).running():
            spec = CampaignSpec(count=2, at_once=6, per_host=1, drop_after=0.5)
            controller, book = CampaignController(bus, name="test"), await CampaignBook.open(bus)
            ledger = await created(bus, spec, vms)
            done = await controller.run(ledger.id)
        assert (done.status, done.reached, done.failed) == (CampaignStatus.DONE, 4, 2)
        ended = (await book.summary(ledger.id)).ended
        assert [each.host for each in ended[-2:]] == ["dead", "dead"]
        assert {(each.phase, each.code) for each in ended[-2:]} == {(WishPhase.EXPIRED, 3)}
        with pytest.raises(WishError, match="not begun in time"):
            vm_result(ended[-1]).unwrap()
        assert await (await bus.bucket(WISHES)).get("dead.v0") is None


async def test_operators_pause_resume_and_stop() -> None:
    async with ready() as (_, bus):
        vms = some(3, 3)
        hosts = ObligingHosts(bus, names(vms))
        hosts.may_answer.clear()
        async with hosts.running():
            book = await CampaignBook.open(bus)
            ledger = await book.create(SPEC, vms)
            async with running(bus, ledger.id) as carrying_out:
                await until(lambda: hosts.claims.total() == 3, within=20)
                await book.pause(ledger.id)
                hosts.may_answer.set()

                async def has_ended() -> bool:
                    return (await book.get(ledger.id)).ended == 3

                await until(has_ended, within=20)
                paused = await book.get(ledger.id)
                assert (paused.status, paused.in_flight) == (CampaignStatus.PAUSED, {})
                hosts.may_answer.clear()
                await book.resume(ledger.id)
                await until(lambda: hosts.claims.total() == 6, within=20)
                await book.stop(ledger.id)
                hosts.may_answer.set()
                done = await carrying_out
                assert (done.status, done.ended, done.waiting) == (CampaignStatus.STOPPED, 6, 3)
            assert hosts.claims.total() == 6
            with pytest.raises(CampaignError, match="it is stopped: begin another for the VMs that are left"):
                await book.resume(ledger.id)


async def test_a_campaign_whose_forgetting_was_cut_short_is_forgotten_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delete, deleted = Bucket.delete, 0

    async def cut(self: Bucket, key: str, last: int | None = None, **options: float) -> int:
        nonlocal deleted
        deleted += 1
        if deleted > 2:
            raise ServerLostError("delete", "cut short", maybe_done=False)
        return await delete(self, key, last, **options)

    vms = some(2, 2)
    async with ready() as (_, bus), ObligingHosts(bus, names(vms)).running():
        campaign = (await created(bus, SPEC, vms)).id
        await CampaignController(bus, name="one").run(campaign)
        book = await CampaignBook.open(bus)
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "delete", cut)
            with pytest.raises(ServerLostError):
                await book.forget(campaign)
        assert [ledger.id for ledger in await book.all()] == [campaign]
        await asyncio.gather(book.forget(campaign), book.forget(campaign))
        assert await book.bucket.keys() == []


async def test_what_no_host_has_begun_is_withdrawn_when_it_is_stopped() -> None:
    async with ready() as (_, bus):
        book, wishes = await CampaignBook.open(bus), await bus.bucket(WISHES)
        ledger = await book.create(SPEC, some(3, 1))
        async with running(bus, ledger.id) as carrying_out:

            async def are_written() -> bool:
                return len(await wishes.all()) == 3

            await until(are_written, within=20)
            await book.stop(ledger.id)
            done = await carrying_out
        assert (done.status, done.withdrawn, done.failed) == (CampaignStatus.STOPPED, 3, 0)
        assert await wishes.all() == {}
        assert {each.phase for each in (await book.summary(ledger.id)).ended} == {WishPhase.WITHDRAWN}


async def test_a_wish_of_a_vm_whose_last_one_was_deleted_is_written() -> None:
    async with ready() as (_, bus):
        wishes = await bus.bucket(WISHES)
        await wish(bus, VmKey("h0", "v0"), Wish("old", count=1))
        await wishes.delete("h0.v0")
        async with ObligingHosts(bus, ("h0",)).running():
            controller = CampaignController(bus, name="test")
            done = await controller.run((await created(bus, SPEC, some(1, 1))).id)
        assert (done.status, done.reached) == (CampaignStatus.DONE, 1)


async def test_a_fault_of_our_own_in_a_campaign_is_logged_and_the_campaign_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take_on, faults = CampaignBook.take_on, [RuntimeError("a fault")]

    async def faulty(book: CampaignBook, campaign: str) -> tuple[int, Ledger]:
        if faults:
            raise faults.pop()
        return await take_on(book, campaign)

    monkeypatch.setattr(CampaignBook, "take_on", faulty)
    async with ready() as (_, bus):
        controller = CampaignController(bus, name="test")
        ledger = await created(bus, SPEC, some(1, 1))
        book = await CampaignBook.open(bus)
        async with ObligingHosts(bus, ("h0",)).running():
            adopting = asyncio.ensure_future(controller.adopt())
            async with asyncio.timeout(30):
                seen = [each async for each in book.follow(ledger.id)]
            adopting.cancel()
            await asyncio.wait({adopting})
    assert isinstance(seen[-1], Ledger)
    assert seen[-1].status is CampaignStatus.DONE
    assert "RuntimeError: a fault" in caplog.text


async def test_two_cannot_carry_out_one_campaign_and_the_next_one_goes_on() -> None:
    async with ready() as (_, bus):
        vms = some(2, 2)
        hosts = ObligingHosts(bus, names(vms))
        hosts.may_answer.clear()
        async with hosts.running():
            controller = CampaignController(bus, name="second")
            ledger = await created(bus, SPEC, vms)
            async with running(bus, ledger.id):
                await until(lambda: hosts.claims.total() == 2, within=20)
                with pytest.raises(LeaseTakenError, match="test"):
                    await controller.run(ledger.id)
            hosts.may_answer.set()
            done = await controller.run(ledger.id)
            assert (done.status, done.reached, done.epoch) == (CampaignStatus.DONE, 4, 2)
            assert await controller.run(ledger.id) == done
        assert set(hosts.claims.values()) == {1}


async def test_a_controller_steps_aside_when_its_lease_is_lost_or_another_takes_over() -> None:
    async with ready(lease_s=2.0) as (_, bus):
        book, leases = await CampaignBook.open(bus), await bus.bucket(LEASES)
        ledger = await book.create(SPEC, some(2, 2))
        for epoch, lose in enumerate(("lease", "epoch"), 1):
            async with running(bus, ledger.id) as carrying_out:

                async def is_taken_on(epoch: int = epoch) -> bool:
                    now = await book.get(ledger.id)
                    return now.epoch == epoch and len(now.in_flight) == 2

                await until(is_taken_on, within=20)
                if lose == "lease":
                    await leases.put(lease_key(ledger.id), b"somebody else")
                else:
                    await book.take_on(ledger.id)
                seen = await carrying_out
                assert not seen.is_over
            await leases.delete(lease_key(ledger.id))


KILLED = """
import asyncio, sys
from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.hosts import CampaignController
async def main():
    async with await Bus.connect(ServerAddress(sys.argv[1]), name="killed") as bus:
        await CampaignController(bus, name="killed").run(sys.argv[2])
asyncio.run(main())
"""


async def test_a_campaign_goes_on_under_others_when_its_controllers_are_killed() -> None:
    async with ready(lease_s=2.0) as (server, bus):
        vms = some(6, 4)
        hosts = ObligingHosts(bus, names(vms))
        async with hosts.running():
            ledger = await created(bus, SPEC, vms)
            ledgers: list[Ledger] = []
            watching = asyncio.ensure_future(history(bus, ledger.id, ledgers))
            for kills in (1, 5, 11):
                process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, server.url, ledger.id)
                await until(functools.partial(hosts.has_claimed, kills), within=30)
                process.send_signal(signal.SIGKILL)
                await process.wait()

                async def is_free() -> bool:
                    return await (await bus.bucket(LEASES)).get(lease_key(ledger.id)) is None

                await until(is_free, within=20)
            heirs = [asyncio.ensure_future(CampaignController(bus, name=name).adopt()) for name in ("a", "b")]
            await asyncio.wait_for(watching, 30)
            for heir in heirs:
                heir.cancel()
            await asyncio.wait(heirs)
        assert hosts.claims == Counter(vms)
        assert (ledgers[-1].status, ledgers[-1].reached) == (CampaignStatus.DONE, 24)


class KilledError(Exception):
    """The controller is dead from here on."""


class Mortal:
    """A connection whose user dies at its write number *at*: before the server has it, or after that."""

    def __init__(self, bus: Bus, at: int, *, after: bool) -> None:
        self._left = at
        self._after = after
        self.is_dead = False
        self._open = bus.bucket
        bus.bucket = self.bucket  # type: ignore[method-assign]

    async def bucket(self, name: str) -> Bucket:
        bucket = await self._open(name)
        write = bucket._write

        async def dying(key: str, value: bytes | None, last: int | None, timeout: float) -> int:
            self._left -= 1
            dies_now = self._left < 0 and not self.is_dead
            if self.is_dead or (dies_now and not self._after):
                self.is_dead = True
                raise KilledError
            revision = await write(key, value, last, timeout)
            if dies_now:
                self.is_dead = True
                raise KilledError
            return revision

        bucket._write = dying  # type: ignore[method-assign]
        return bucket


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_controller_may_die_at_any_write(after: bool, record_property: Callable[[str, object], None]) -> None:
    points, lost, twice = 0, 0, 0
    async with ready() as (server, bus):
        book, leases = await CampaignBook.open(bus), await bus.bucket(LEASES)
        vms = some(3, 2)
        hosts = ObligingHosts(bus, names(vms), lambda vm: int(vm.vm == "v1" and vm.host == "h1"))
        async with hosts.running():
            while True:
                hosts.claims.clear()
                ledger = await book.create(SPEC, vms)
                watching = asyncio.ensure_future(history(bus, ledger.id, []))
                async with connected(server) as victim:
                    mortal = Mortal(victim, points, after=after)
                    with contextlib.suppress(KilledError):
                        await CampaignController(victim, name="mortal").run(ledger.id)
                if mortal.is_dead:
                    await leases.delete(lease_key(ledger.id))  # as if its time were over
                done = await CampaignController(bus, name="heir").run(ledger.id)
                await watching
                assert (done.status, done.reached, done.failed) == (CampaignStatus.DONE, 5, 1)
                ended = [each.key for each in (await book.summary(ledger.id)).ended]
                lost += len(set(vms) - set(ended) & hosts.claims.keys())
                twice += sum(count > 1 for count in hosts.claims.values())
                if not mortal.is_dead:
                    break
                points += 1
    record_property(figures.CAMPAIGNS, (points, lost, twice))
    assert (lost, twice) == (0, 0)
    assert points > 2 * len(vms)


async def test_another_wish_that_takes_its_place_is_the_result() -> None:
    async with ready() as (_, bus):
        hosts = ObligingHosts(bus, ("h0",))
        hosts.may_answer.clear()
        vm = VmKey("h0", "v0")
        async with hosts.running():
            book = await CampaignBook.open(bus)
            ledger = await book.create(SPEC, [vm])
            async with running(bus, ledger.id) as carrying_out:
                await until(lambda: hosts.claims.total() == 1, within=20)
                await wish(bus, vm, Wish("newer", count=1, who="you"))
                done = await carrying_out
        assert (done.status, done.failed) == (CampaignStatus.DONE, 1)
        (ended,) = (await book.summary(ledger.id)).ended
        assert (ended.phase, ended.why) == (
            WishPhase.SUPERSEDED,
            "the newer one is 'newer' of 'you'",
        )


async def test_a_wish_and_a_state_that_cannot_be_read_hold_nobody_up() -> None:
    async with ready() as (_, bus):
        vms = some(1, 2)
        await (await bus.bucket(STATES)).put(vms[0].key, b"{")
        await (await bus.bucket(WISHES)).put("other.v9", b"{")
        async with ObligingHosts(bus, ("h0",)).running():
            controller = CampaignController(bus, name="test")
            done = await controller.run((await created(bus, SPEC, vms)).id)
        assert done.reached == 2


async def test_a_campaign_is_followed_by_who_comes_late() -> None:
    async with ready() as (_, bus):
        vms = some(3, 2)
        async with ObligingHosts(bus, names(vms)).running():
            controller, book = CampaignController(bus, name="test"), await CampaignBook.open(bus)
            ledger = await created(bus, SPEC, vms)
            done = await controller.run(ledger.id)
        told = [each async for each in book.follow(ledger.id)]
        assert sorted(each.key for each in told if isinstance(each, Ended)) == vms
        assert told[-1] == done
        assert await book.all() == (done,)


async def test_who_follows_a_campaign_that_is_deleted_is_told_so() -> None:
    async with ready() as (_, bus):
        book = await CampaignBook.open(bus)
        ledger = await book.create(SPEC, some(2, 1))
        async with asyncio.timeout(60), contextlib.aclosing(book.follow(ledger.id)) as following:
            assert await anext(following) == ledger
            await book.bucket.delete(ledger.id)
            with pytest.raises(CampaignError, match="was deleted meanwhile"):
                await anext(following)


async def test_an_operator_may_carry_a_campaign_out_and_a_reader_may_follow_it(tmp_path: Path) -> None:
    async with permitted(tmp_path) as world, world.bus("alice") as alice, world.bus("web1") as host:
        vms = [VmKey("web1", f"v{vm}") for vm in range(3)]
        async with ObligingHosts(host, ("web1",)).running():
            controller = CampaignController(alice, name="alice")
            ledger = await created(alice, SPEC, vms)
            done = await controller.run(ledger.id)
        assert (done.status, done.reached) == (CampaignStatus.DONE, 3)
        async with world.bus("grafana") as reader:
            book = await CampaignBook.open(reader)
            assert len((await book.summary(ledger.id)).ended) == 3
            assert [each async for each in book.follow(ledger.id)][-1] == done
            with pytest.raises(ServerForbiddenError):
                await book.create(SPEC, vms)


async def test_bad_campaigns_are_refused_before_anything_is_written() -> None:
    async with ready() as (_, bus):
        book = await CampaignBook.open(bus)
        with pytest.raises(ValueError, match="for 1 to 100,000 VMs, and this one for 0"):
            await book.create(SPEC, [])
        with pytest.raises(ValueError, match="both or neither"):
            await book.create(CampaignSpec(), some(1, 1))
        for bad in ("nothing", "a.b", ">"):
            with pytest.raises(CampaignError, match="`qmpvcpu campaign list` has them"):
                await book.get(bad)
        assert await book.bucket.all() == {}


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"id": "x", "later": 1}', ANOTHER])
async def test_a_ledger_that_cannot_be_read_is_said_to_be_so(content: bytes) -> None:
    async with ready() as (_, bus):
        book = await CampaignBook.open(bus)
        await (await bus.bucket(CAMPAIGNS)).put("x", content)
        with pytest.raises(CampaignError, match="campaign x: x cannot be read"):
            await CampaignController(bus, name="test").run("x")
        assert await book.all() == ()


async def test_a_campaign_whose_vms_are_gone_begins_nothing() -> None:
    async with ready() as (_, bus):
        book = await CampaignBook.open(bus)
        ledger = await book.create(SPEC, some(1, 2))
        await book.bucket.delete(f"{ledger.id}.vms.0")
        with pytest.raises(CampaignError, match="it is for 2 VMs, and 0 are left: begin anew"):
            await CampaignController(bus, name="test").run(ledger.id)


async def test_a_thousand_vms_of_a_hundred_hosts_are_each_begun_once_within_the_bounds() -> None:
    async with ready() as (_, bus):
        vms = some(100, 10)
        hosts = ObligingHosts(bus, names(vms), lambda vm: int(vm.vm == "v3" and vm.host < "h2"))
        async with hosts.running():
            controller = CampaignController(bus, name="test")
            spec = CampaignSpec(count=2, at_once=200, per_host=4, stop_after=None)
            ledger = await created(bus, spec, vms)
            watching = asyncio.ensure_future(history(bus, ledger.id, []))
            done = await controller.run(ledger.id)
            await watching
        assert (done.reached, done.failed) == (988, 12)
        assert hosts.claims == Counter(vms)
