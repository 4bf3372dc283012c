"""CampaignController: carries campaigns out, its own and those whose controllers have died."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple

from qmpvcpu.bus import Bucket, Bus, Entry, Lease
from qmpvcpu.errors import CampaignError, HostsError, LeaseTakenError, ServerLostError, StaleError, TooLongError
from qmpvcpu.fleet.wishes import State
from qmpvcpu.hosts.campaign import (
    CampaignCore,
    Effect,
    Fence,
    ListResults,
    ReadLedger,
    ReadResult,
    SeenWish,
    Step,
    StoreResult,
    Withdraw,
    WriteWish,
)
from qmpvcpu.hosts.campaignbook import CampaignBook, ended_in, ledger_in
from qmpvcpu.model.campaign import Ended, Ledger, ended_key, lease_key, wish_id
from qmpvcpu.model.codec import from_json, to_bytes
from qmpvcpu.model.hosts import HOST_LEASES, LEASES, STATES, WISHES, VmKey
from qmpvcpu.model.wish import Wish

_log = logging.getLogger("qmpvcpu.hosts")

_AT_ONCE: Final = 64  # requests to the server
_AGAIN_S: Final = 1.0
_PAUSE_S: Final = 0.1
_LEASES: Final = "campaign."
_FOREVER_S: Final = 86400.0


class CampaignController:
    """Carries campaigns out: begins VMs as their bounds allow, and writes down the results.

    Nothing that matters is in its memory: it may be killed at any time, and another continues. It holds the
    campaign's lease meanwhile; the bounds hold even if two controllers believe that they hold it.

    Args:
        bus: The server.
        name: Its name, for people, such as the command and its host.
    """

    def __init__(self, bus: Bus, *, name: str) -> None:
        self._bus = bus
        self._name = name

    async def run(self, campaign: str) -> Ledger:
        """Carry *campaign* out until it is over, or until somebody else does; return its ledger as last seen.

        Once cancelled, it begins no more VMs. Hosts finish those that were begun, and another controller continues.

        Raises:
            LeaseTakenError: Another controller carries it out.
            CampaignError: There is none of this id, or it cannot be read.
            HostsError: The server refuses what is needed.
        """
        book = await CampaignBook.open(self._bus)
        wishes, states, leases = [await self._bus.bucket(each) for each in (WISHES, STATES, LEASES)]
        ledger = await book.get(campaign)
        if ledger.is_over:
            return ledger
        said = json.dumps({"controller": self._name}).encode()
        async with Lease(leases, lease_key(campaign), said) as lease:
            return await _Course(self._bus, book, _Buckets(wishes, states, leases)).run(campaign, lease)

    async def adopt(self) -> None:
        """Carry out every campaign that is not over and that nobody else carries out, until it is cancelled.

        Raises:
            HostsError: The campaigns cannot be watched.
        """
        book, leases = await CampaignBook.open(self._bus), await self._bus.bucket(LEASES)
        known = _Known()
        watches = [
            asyncio.ensure_future(_watch(book.bucket, "*", known.take_ledger, known.news)),
            asyncio.ensure_future(_watch(leases, f"{_LEASES}*", known.take_lease, known.news)),
        ]
        running: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for campaign in known.orphans() - running.keys():
                    running[campaign] = asyncio.ensure_future(self._adopt(campaign, running, known.news))
                coming = asyncio.ensure_future(known.news.wait())
                await asyncio.wait((*watches, coming), return_when=asyncio.FIRST_COMPLETED)
                coming.cancel()
                known.news.clear()
                for each in watches:
                    if each.done():
                        each.result()
        finally:
            tasks = {*watches, *running.values()}
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _adopt(self, campaign: str, running: dict[str, asyncio.Task[None]], news: asyncio.Event) -> None:
        try:
            ledger = await self.run(campaign)
            _log.info("campaign %s is %s", campaign, ledger.status.value)
        except LeaseTakenError:
            pass  # another one was faster
        except HostsError as error:
            _log.warning("%s", error)
        except Exception:  # noqa: BLE001 -- JUSTIFICATION: a fault of our own in one campaign ends no other
            _log.exception("campaign %s", campaign)
        await asyncio.sleep(_AGAIN_S)  # what cannot be carried out is not tried without a pause
        del running[campaign]
        news.set()


class _Buckets(NamedTuple):
    wishes: Bucket
    states: Bucket
    leases: Bucket


class _Known:
    """Which campaigns there are, and which of them are carried out."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._open: set[str] = set()
        self._held: set[str] = set()
        self._begun = 0

    def orphans(self) -> set[str]:
        """Return those that nobody carries out; none before all is known."""
        return self._open - self._held if self._begun >= 2 else set()  # noqa: PLR2004 -- both watches

    def take_ledger(self, entry: Entry | None) -> None:
        if entry is None:
            self._begun += 1
            return
        is_open = False
        if entry.value is not None:
            with contextlib.suppress(CampaignError):  # of a later version
                is_open = not ledger_in(entry).is_over
        (self._open.add if is_open else self._open.discard)(entry.key)

    def take_lease(self, entry: Entry | None) -> None:
        if entry is None:
            self._begun += 1
        else:
            campaign = entry.key.removeprefix(_LEASES)
            (self._held.discard if entry.value is None else self._held.add)(campaign)


async def _watch(
    bucket: Bucket, keys: str, take: Callable[[Entry | None], None], news: asyncio.Event, *, deleted: bool = False
) -> None:
    async with bucket.watch(keys, deleted=deleted) as entries:
        async for entry in entries:
            take(entry)
            news.set()


class _Course:
    """One campaign while this controller carries it out: moves news into its core, and carries its effects out."""

    def __init__(self, bus: Bus, book: CampaignBook, buckets: _Buckets) -> None:
        self._bus = bus
        self._book = book
        self._buckets = buckets
        self._news = asyncio.Event()
        self._begun = 0
        self._all_known = asyncio.Event()
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._core: CampaignCore
        self._epoch = 0

    async def run(self, campaign: str, lease: Lease) -> Ledger:
        await self._bus.sync_clock()
        revision, ledger = await self._book.take_on(campaign)
        self._epoch = ledger.epoch
        self._core = CampaignCore(ledger, revision, await self._book.selection(ledger))
        await self._list_results()
        buckets, news = self._buckets, self._news
        watches = [
            _watch(buckets.wishes, ">", self._take_wish, news, deleted=True),
            _watch(buckets.states, ">", self._take_state, news),
            _watch(buckets.leases, HOST_LEASES, self._take_host, news),
            _watch(self._book.bucket, campaign, self._take_ledger, news),
        ]
        driving = asyncio.ensure_future(self._drive(len(watches)))
        tasks: list[asyncio.Future[Any]] = [driving, asyncio.ensure_future(lease.lost.wait())]
        tasks += [asyncio.ensure_future(each) for each in watches]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.wait(tasks)
        return self._core.ledger

    # News.

    def _take_wish(self, entry: Entry | None) -> None:
        if entry is None:
            self._is_known()
        elif entry.key in self._core:
            self._core.see_wish(entry.key, _seen(entry))

    def _take_state(self, entry: Entry | None) -> None:
        if entry is None:
            self._is_known()
        elif entry.key in self._core:
            try:
                state = None if entry.value is None else State.read(entry)
            except ValueError as error:
                _log.warning("the state of %s cannot be read: %s", entry.key, error)
                state = None
            answer = None if state is None else state.answer
            is_ours = answer is not None and answer.id == wish_id(self._core.ledger.id, entry.key)
            document = state.document if state is not None and is_ours else {}
            self._core.see_state(entry.key, entry.revision, answer, document)

    def _take_host(self, entry: Entry | None) -> None:
        if entry is None:
            self._is_known()
        else:
            host = entry.key.partition(".")[2]
            self._core.see_host(host, entry.revision, is_live=entry.value is not None)

    def _take_ledger(self, entry: Entry | None) -> None:
        if entry is None:
            self._is_known()
        elif entry.value is not None:
            self._core.see_ledger(entry.revision, ledger_in(entry))

    def _is_known(self) -> None:
        self._begun += 1
        self._all_known.set()

    # What is done.

    async def _drive(self, watches: int) -> None:
        """Do what is next, until the campaign is over, or another controller has taken it on."""
        while self._begun < watches:
            self._all_known.clear()
            await self._all_known.wait()
        core = self._core
        while not core.ledger.is_over and core.ledger.epoch == self._epoch:
            self._news.clear()
            now = self._bus.now()
            step = core.next(now)
            if step.effects or step.ledger is not None:
                try:
                    await self._carry_out(step)
                except ServerLostError as error:
                    _log.warning("campaign %s: %s", core.ledger.id, error)
                    await self._bus.wait_connected()
                continue
            left = step.wake_at - now
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if left > _FOREVER_S else max(left, 0.0)):
                    await self._news.wait()

    async def _carry_out(self, step: Step) -> None:
        """Carry *step* out, as far as the server is there; what is not done is asked for again.

        Raises:
            HostsError: What the server refuses.
        """
        done = await asyncio.gather(*map(self._carry_out_one, step.effects), return_exceptions=True)
        for each in done:
            if isinstance(each, BaseException):
                raise each
        if step.ledger is None:
            return
        core = self._core
        content = to_bytes(step.ledger)
        try:
            revision = await self._book.bucket.update(core.ledger.id, content, last=core.revision)
        except StaleError:
            await self._read_ledger()
        else:
            core.see_ledger(revision, step.ledger)

    async def _carry_out_one(self, effect: Effect) -> None:
        async with self._places:
            match effect:
                case WriteWish(key, base):
                    await self._write(key, base)
                case Withdraw(key, revision):
                    await self._prevent(key, revision, None)
                case Fence(key, base):
                    await self._fence(key, base)
                case StoreResult(key, ended):
                    await self._store(key, ended)
                case ReadResult(key):
                    await self._read_result(key)
                case ListResults():
                    await asyncio.sleep(_PAUSE_S)  # a server of a cluster may be behind
                    await self._list_results()
                case ReadLedger():
                    await asyncio.sleep(_PAUSE_S)
                    await self._read_ledger()

    async def _write(self, key: str, base: int) -> None:
        ledger = self._core.ledger
        wish = ledger.spec.wish(ledger.id, VmKey.parse(key))
        wishes = self._buckets.wishes
        try:
            revision = await wishes.update(key, to_bytes(wish), last=base)
        except StaleError:
            await self._look_at(key)
        else:
            self._core.see_wish(key, SeenWish(revision, self._bus.now(), wish, is_gone=False))

    async def _prevent(self, key: str, last: int, content: bytes | None) -> None:
        """Put *content*, or its deletion, in the place of *last*."""
        wishes = self._buckets.wishes
        try:
            if content is None:
                revision = await wishes.delete(key, last=last)
            else:
                revision = await wishes.update(key, content, last=last)
        except StaleError:
            await self._look_at(key)
        else:
            self._core.see_prevented(key, _seen(Entry(key, content, revision, self._bus.now())))

    async def _fence(self, key: str, base: int) -> None:
        entry = await self._buckets.wishes.last(key)
        if entry is not None and entry.revision != base:
            self._core.see_wish(key, _seen(entry))
        else:
            await self._prevent(key, base, None if entry is None else entry.value)

    async def _look_at(self, key: str) -> None:
        entry = await self._buckets.wishes.last(key)
        if entry is not None:
            self._core.see_wish(key, _seen(entry))
        else:
            await asyncio.sleep(_PAUSE_S)

    async def _store(self, key: str, ended: Ended) -> None:
        bucket, place = self._book.bucket, ended_key(self._core.ledger.id, key)
        try:
            try:
                await bucket.create(place, to_bytes(ended))
            except TooLongError:
                ended = replace(ended, state={})
                await bucket.create(place, to_bytes(ended))
        except StaleError:
            await self._read_result(key)
        else:
            self._core.see_result(key, ended)

    async def _read_result(self, key: str) -> None:
        campaign = self._core.ledger.id
        entry = await self._book.bucket.get(ended_key(campaign, key))
        if entry is not None:
            self._core.see_result(key, ended_in(entry, campaign))
        else:
            await asyncio.sleep(_PAUSE_S)

    async def _list_results(self) -> None:
        every = ended_key(self._core.ledger.id, ">")
        keys = await self._book.bucket.keys(every)
        self._core.see_results(key.removeprefix(every[:-1]) for key in keys)

    async def _read_ledger(self) -> None:
        self._core.see_ledger(*await self._book.read(self._core.ledger.id))


def _seen(entry: Entry) -> SeenWish:
    wish = None
    if entry.value is not None:
        with contextlib.suppress(ValueError):  # its agent says so
            wish = from_json(Wish, entry.value)
    return SeenWish(entry.revision, entry.created, wish, entry.value is None)
