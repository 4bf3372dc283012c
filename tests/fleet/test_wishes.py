"""Wishes as they are written, watched and taken back, on a real server."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import nats
import pytest

from qmpvcpu import VcpuMap
from qmpvcpu.bus import Bus, Entry
from qmpvcpu.errors import (
    HostsError,
    ServerLostError,
    StaleError,
    TooLongError,
    TransitionError,
    UnfitServerError,
    WishError,
)
from qmpvcpu.fleet import VmResult
from qmpvcpu.fleet.wishes import State, WishBook
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.hosts import LEASES, STATES, WISHES, HostInfo, VmKey
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.transition import TransitionOutcome, TransitionReport
from qmpvcpu.model.wish import Answer, Claim, Wish, WishPhase
from qmpvcpu.testing.nats import NatsServer
from tests.hosts.world import LEASE_S
from tests.layouts import layout
from tests.waiting import until

WEB, DB = VmKey("rack1", "web"), VmKey("rack2", "db")
INFO = HostInfo("rack1", "agent", "0", (), 0.0, 1)
SOME = Wish("1", VcpuMap.parse("0-3"))


@pytest.fixture
async def book(bus: Bus) -> AsyncIterator[WishBook]:
    async with WishBook(bus) as book:
        yield book


def told(answer: Answer | None, result: VmResult[Any] | None = None) -> bytes:
    """What an agent tells of a VM."""
    row = (result or VmResult("unix:/x", "web", layout("0"), None, None, 0.0)).to_json(whole=True)
    return json.dumps({**row, "answer": None if answer is None else to_json(answer)}).encode()


async def tell(bus: Bus, vm: VmKey, answer: Answer | None, result: VmResult[Any] | None = None) -> None:
    await (await bus.bucket(STATES)).put(vm.key, told(answer, result))


async def revision_of(bus: Bus, vm: VmKey) -> int | None:
    entry = await (await bus.bucket(WISHES)).get(vm.key)
    return None if entry is None else entry.revision


async def claimed(bus: Bus, vm: VmKey, wish: Wish, revision: int) -> int:
    """Do what an agent does when it begins."""
    claim = Claim(revision, 0.0, "agent", 0)
    content = json.dumps(to_json(replace(wish, claim=claim))).encode()
    return await (await bus.bucket(WISHES)).update(vm.key, content, revision)


async def test_a_wish_takes_the_place_of_the_one_that_was_seen_and_of_no_other(bus: Bus, book: WishBook) -> None:
    assert await revision_of(bus, WEB) is None
    first = await book.write(WEB, SOME, None)
    with pytest.raises(StaleError):
        await book.write(WEB, replace(SOME, id="2"), None)
    second = await book.write(WEB, replace(SOME, id="2"), first)
    assert await revision_of(bus, WEB) == second
    with pytest.raises(StaleError):
        await book.write(WEB, SOME, first)


async def test_a_wish_that_is_there_already_is_not_written_again(bus: Bus, book: WishBook) -> None:
    revision = await book.write(WEB, SOME, None)
    assert await book.write(WEB, SOME, None) == revision
    begun = await claimed(bus, WEB, SOME, revision)
    assert await book.write(WEB, SOME, None) == revision
    assert await revision_of(bus, WEB) == begun


@pytest.mark.parametrize("arrived", [True, False])
async def test_a_wish_whose_writing_was_cut_off_is_looked_for(
    bus: Bus, book: WishBook, monkeypatch: pytest.MonkeyPatch, *, arrived: bool
) -> None:
    create = book._wishes.create
    revisions = []

    async def cut(key: str, content: bytes) -> int:
        if arrived:
            revisions.append(await create(key, content))
            await claimed(bus, WEB, SOME, revisions[0])  # agents are fast
        raise ServerLostError("write", "cut", maybe_done=True)

    monkeypatch.setattr(book._wishes, "create", cut)
    if arrived:
        assert [await book.replace(WEB, SOME)] == revisions
    else:
        with pytest.raises(ServerLostError):
            await book.replace(WEB, SOME)


async def test_a_wish_that_no_agent_would_read_is_not_written(bus: Bus, book: WishBook) -> None:
    scattered = Wish("1", VcpuMap(range(0, 16_000, 2)), why="🐢" * 1000, who="🐇" * 1000)
    with pytest.raises(TooLongError, match="wish for rack1/web"):
        await book.write(WEB, scattered, None)
    with pytest.raises(ValueError, match="1000 letters"):
        await book.write(WEB, replace(SOME, why="x" * 1001), None)
    assert await revision_of(bus, WEB) is None


async def test_what_was_not_begun_is_taken_back_and_what_was_is_not(bus: Bus, book: WishBook) -> None:
    revision = await book.write(WEB, SOME, None)
    assert await book.withdraw(WEB, revision) is True
    assert await revision_of(bus, WEB) is None
    assert await book.withdraw(WEB, revision) is False  # it is gone
    again = await book.write(WEB, SOME, None)
    begun = await claimed(bus, WEB, SOME, again)
    assert await book.withdraw(WEB, again) is False
    assert await revision_of(bus, WEB) == begun


async def test_what_was_begun_is_stopped_and_what_took_its_place_is_not(bus: Bus, book: WishBook) -> None:
    revision = await book.write(WEB, SOME, None)
    assert await book.stop(WEB, revision) is True
    revision = await book.write(WEB, SOME, None)
    begun = await claimed(bus, WEB, SOME, revision)
    assert await book.stop(WEB, revision) is False
    assert await revision_of(bus, WEB) is None  # which has its agent stop
    revision = await book.write(WEB, SOME, None)
    begun = await claimed(bus, WEB, SOME, revision)
    newer = await book.write(WEB, replace(SOME, id="2"), begun)
    assert await book.stop(WEB, revision) is False
    assert await revision_of(bus, WEB) == newer


async def test_a_wish_replaces_one_that_is_begun_meanwhile_but_not_another_that_came_meanwhile(
    bus: Bus, book: WishBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = book._wishes
    get = wishes.get
    first = await book.write(WEB, SOME, None)
    late: list[Any] = [await get(WEB.key)]

    async def get_late(key: str) -> Entry | None:
        return late.pop() if late else await get(key)

    monkeypatch.setattr(wishes, "get", get_late)
    await claimed(bus, WEB, SOME, first)
    second = await book.replace(WEB, replace(SOME, id="2"))
    assert await revision_of(bus, WEB) == second
    late.append(await get(WEB.key))
    await book.write(WEB, replace(SOME, id="3"), second)
    with pytest.raises(StaleError):
        await book.replace(WEB, replace(SOME, id="4"))
    late.append(await get(WEB.key))
    await wishes.delete(WEB.key)
    await book.replace(WEB, replace(SOME, id="5"))  # what it was to replace is gone


async def test_states_and_hosts_are_kept_up_to_date(bus: Bus) -> None:
    leases = await bus.bucket(LEASES)
    await tell(bus, WEB, None)
    await leases.put("host.rack1", json.dumps(to_json(INFO)).encode())
    await leases.put("campaign.1", b"{}")
    async with WishBook(bus) as book:
        assert list(book.states) == [WEB]
        assert book.states[WEB].answer is None
        assert book.states[WEB].is_here
        assert book.hosts == {"rack1": INFO}
        await tell(bus, DB, Answer(7, "1", WishPhase.RUNNING))
        await until(lambda: DB in book.states)
        assert book.states[DB].answer == Answer(7, "1", WishPhase.RUNNING)
        await (await bus.bucket(STATES)).delete(WEB.key)
        await until(lambda: WEB not in book.states)
        assert await book.wait_host("rack1", 20 * LEASE_S, gone=True)  # nobody renews its lease
        assert book.hosts == {}


async def test_an_answer_is_waited_for(bus: Bus, book: WishBook) -> None:
    assert await book.answer_to(WEB, 7, 0.05) is None
    waiting = asyncio.ensure_future(book.answer_to(WEB, 7))
    for answer in (Answer(5, "0", WishPhase.ENDED), Answer(7, "1", WishPhase.RUNNING)):
        await tell(bus, WEB, answer)
        await until(lambda: WEB in book.states and book.states[WEB].answer == answer)  # noqa: B023 - at once
    assert not waiting.done()
    await tell(bus, WEB, Answer(7, "1", WishPhase.REJECTED, 2, "read only"))
    state = await waiting
    assert state is not None
    with pytest.raises(WishError, match=r"rejected.*read only"):
        state.report_of(7)
    with pytest.raises(WishError, match="newer") as raised:
        state.report_of(6)
    assert raised.value.phase is WishPhase.SUPERSEDED


async def test_what_came_of_a_wish_is_its_report_or_its_error(bus: Bus, book: WishBook) -> None:
    now = layout("0-3")
    report = TransitionReport(now.enabled, now.enabled, OnFailure.STOP, TransitionOutcome.REACHED, (), now)
    partial = replace(report, outcome=TransitionOutcome.PARTIAL)
    ended = Answer(7, "1", WishPhase.ENDED)

    async def state_of(answer: Answer, result: VmResult[Any]) -> State:
        await tell(bus, WEB, answer, result)
        await until(lambda: WEB in book.states and book.states[WEB].content == told(answer, result))
        return book.states[WEB]

    reached = await state_of(ended, VmResult("unix:/x", "web", now, report, None, 0.5))
    assert reached.report_of(7) == replace(report, seconds=reached.report_of(7).seconds)
    assert (reached.result.address, reached.result.name) == ("rack1/web", "web")
    failed = await state_of(ended, VmResult("unix:/x", "web", now, None, TransitionError(partial), 0.5))
    with pytest.raises(TransitionError):
        failed.report_of(7)
    unknown = await state_of(replace(ended, why="nobody knows"), VmResult("unix:/x", "web", now, None, None, 0.5))
    with pytest.raises(WishError, match="nobody knows"):
        unknown.report_of(7)


async def test_who_waits_is_told_when_the_states_are_gone(server: NatsServer, bus: Bus, book: WishBook) -> None:
    waiting = [asyncio.ensure_future(each) for each in (book.answer_to(WEB, 7), book.wait_host("rack1", None))]
    await asyncio.sleep(0)
    client = await nats.connect(server.url)
    await client.jetstream().delete_stream(f"KV_{STATES}")
    await client.close()
    for each in waiting:
        with pytest.raises(UnfitServerError):
            await each
    del bus


async def test_who_waits_is_told_of_a_fault_of_our_own(
    bus: Bus, book: WishBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(State, "read")
    waiting = asyncio.ensure_future(book.answer_to(WEB, 7))
    await tell(bus, WEB, None)
    async with asyncio.timeout(20):
        with pytest.raises(AttributeError):
            await waiting


async def test_who_waits_is_told_when_it_is_closed(bus: Bus) -> None:
    async with WishBook(bus) as book:
        waiting = asyncio.ensure_future(book.answer_to(WEB, 7))
        await asyncio.sleep(0)
    with pytest.raises(HostsError, match="closed"):
        await waiting


async def test_a_bucket_that_is_missing_is_told_on_entering(server: NatsServer, bus: Bus) -> None:
    client = await nats.connect(server.url)
    await client.jetstream().delete_stream(f"KV_{LEASES}")
    await client.close()
    with pytest.raises(UnfitServerError, match="hosts init"):
        async with WishBook(bus):
            pass
