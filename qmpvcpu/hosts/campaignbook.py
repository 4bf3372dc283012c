"""CampaignBook: campaigns as every client sees and controls them."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Self, TypeVar

from qmpvcpu.bus import Bucket, Bus, Entry
from qmpvcpu.documents import REACHED
from qmpvcpu.errors import CampaignError, StaleError, TooLongError, WishError, counted
from qmpvcpu.fleet.results import VmResult
from qmpvcpu.fleet.wishes import answered_result
from qmpvcpu.model.campaign import (
    MOST_VMS,
    VMS_IN_A_PART,
    CampaignSpec,
    Ended,
    Ledger,
    SelectedVms,
    campaign_key,
    ended_key,
    lease_key,
    part_key,
)
from qmpvcpu.model.codec import from_json, to_bytes
from qmpvcpu.model.hosts import CAMPAIGNS, LEASES, MOST_BYTES, VmKey
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.wish import WishPhase

_T = TypeVar("_T")

_TRIES: Final = 20
_DELETED_AT_ONCE: Final = 64
_LETTERS: Final = "abcdefghjkmnpqrstuvwxyz23456789"  # none that is taken for another


@dataclass(frozen=True)
class CampaignSummary:
    """A campaign and every VM of it.

    Attributes:
        ledger: How far it is.
        ended: The results of the VMs that have ended, in that order.
        in_flight: VMs that may have been begun, and have not ended.
        waiting: VMs that were not begun.
    """

    ledger: Ledger
    ended: tuple[Ended, ...]
    in_flight: tuple[VmKey, ...]
    waiting: tuple[VmKey, ...]


class CampaignBook:
    """The campaigns on a server: any client can make, show, pause, resume, stop and forget them.

    It carries none out: a ``CampaignController`` does. Get one with ``await CampaignBook.open(bus)``.

    Args:
        bus: The server.
        bucket: Its bucket of campaigns.
    """

    def __init__(self, bus: Bus, bucket: Bucket) -> None:
        self._bus = bus
        self.bucket = bucket

    @classmethod
    async def open(cls, bus: Bus) -> Self:
        """Return the campaigns on the server of *bus*.

        Raises:
            UnfitServerError: It was not prepared for hosts.
            HostsError: It cannot be reached, or does not let this user.
        """
        return cls(bus, await bus.bucket(CAMPAIGNS))

    async def create(self, spec: CampaignSpec, selection: Iterable[VmKey]) -> Ledger:
        """Make a campaign for the VMs of *selection*, in this order; it begins once a controller carries it out.

        Its VMs are fixed from then on. If this is cancelled, or loses the server, there is no campaign.

        Raises:
            ValueError: *spec* contradicts itself, or there is no VM, or there are too many.
            TooLongError: Agents would not read its wishes.
            HostsError: It could not be written.
        """
        spec.check_foreign()
        vms = tuple(dict.fromkeys(selection))
        if not 1 <= len(vms) <= MOST_VMS:
            raise ValueError(f"a campaign is for 1 to {MOST_VMS:,} VMs, and this one for {len(vms):,}")
        longest = max(vms, key=lambda vm: len(vm.key))
        await self._bus.sync_clock()
        ledger = Ledger(self._new_id(), spec, self._bus.now(), len(vms))
        size = len(to_bytes(spec.wish(ledger.id, longest)))
        if size > MOST_BYTES // 2:  # its claim is written into it
            raise TooLongError(f"a wish for {longest}", size, MOST_BYTES // 2)
        for number, begin in enumerate(range(0, len(vms), VMS_IN_A_PART)):
            part = SelectedVms(tuple(vm.key for vm in vms[begin : begin + VMS_IN_A_PART]))
            await self.bucket.create(part_key(ledger.id, number), to_bytes(part))
        await self.bucket.create(campaign_key(ledger.id), to_bytes(ledger))
        return ledger

    def _new_id(self) -> str:
        when = time.strftime("%m%d-%H%M", time.gmtime(self._bus.now()))
        return f"{when}-{''.join(secrets.choice(_LETTERS) for _ in range(5))}"

    # What there is.

    async def get(self, campaign: str) -> Ledger:
        """Return how far *campaign* is.

        Raises:
            CampaignError: There is none of this id, or it cannot be read.
            HostsError: The server cannot be asked.
        """
        return (await self.read(campaign))[1]

    async def read(self, campaign: str) -> tuple[int, Ledger]:
        """Return the revision of *campaign*'s ledger, and the ledger; raises as ``get``."""
        try:
            entry = await self.bucket.get(campaign_key(campaign))
        except ValueError as error:
            raise CampaignError(campaign, str(error)) from error
        if entry is None:
            raise CampaignError(campaign, "there is none of this id: `qmpvcpu campaign list` has them")
        return entry.revision, ledger_in(entry)

    async def all(self) -> tuple[Ledger, ...]:
        """Return all campaigns that can be read, in the order in which they were made."""
        found = []
        for entry in (await self.bucket.all("*")).values():
            try:
                found.append(ledger_in(entry))
            except CampaignError:
                continue  # of a later version: `get` says so
        return tuple(sorted(found, key=lambda ledger: ledger.created))

    async def controllers(self) -> dict[str, str]:
        """Return who carries campaigns out now, by campaign; those that nobody carries out are left out."""
        leases = await (await self._bus.bucket(LEASES)).all(lease_key("*"))
        return {key.removeprefix(lease_key("")): _said_by(entry) for key, entry in leases.items()}

    async def selection(self, ledger: Ledger) -> tuple[str, ...]:
        """Return the keys of the campaign's VMs, in the order in which they are begun.

        Raises:
            CampaignError: They are not there, or cannot be read.
            HostsError: The server cannot be asked.
        """
        entries = await self.bucket.all(part_key(ledger.id, "*"))
        keys: list[str] = []
        for number in range(len(entries)):
            entry = entries.get(part_key(ledger.id, number))
            keys += () if entry is None else _read(SelectedVms, entry, ledger.id).vms
        if len(set(keys)) != ledger.vms:
            raise CampaignError(
                ledger.id, f"it is for {counted(ledger.vms, 'VM')}, and {len(set(keys))} are left: begin anew"
            )
        return tuple(keys)

    async def summary(self, campaign: str) -> CampaignSummary:
        """Return *campaign* with every VM of it.

        Raises:
            CampaignError: There is none of this id, or it cannot be read.
            HostsError: The server cannot be asked.
        """
        ledger = await self.get(campaign)
        selection = await self.selection(ledger)
        results = (await self.bucket.all(ended_key(campaign, ">"))).values()
        ended = tuple(ended_in(entry, campaign) for entry in results)
        over = {each.key.key for each in ended}
        waiting = (key for key in selection if key not in over and key not in ledger.in_flight)
        in_flight = (key for key in ledger.in_flight if key not in over)
        return CampaignSummary(ledger, ended, tuple(map(VmKey.parse, in_flight)), tuple(map(VmKey.parse, waiting)))

    async def follow(self, campaign: str) -> AsyncGenerator[Ended | Ledger, None]:
        """Yield the result of each VM, first of those that have ended, and the ledger whenever it changes.

        It ends when the campaign is over and every result was yielded, whoever carries it out; the ledger comes last.

        Raises:
            CampaignError: There is none of this id, it cannot be read, or it was deleted meanwhile.
            HostsError: The server cannot be asked any more.
        """
        ledger = await self.get(campaign)
        news: asyncio.Queue[Ended | Ledger | BaseException] = asyncio.Queue()

        async def watch(keys: str, read: Callable[[Entry], Ended | Ledger]) -> None:
            try:
                async with self.bucket.watch(keys) as entries:
                    async for entry in entries:
                        if entry is not None:
                            news.put_nowait(read(entry))
            except Exception as error:  # noqa: BLE001 -- JUSTIFICATION: it is raised to who iterates
                news.put_nowait(error)

        watches = [
            asyncio.ensure_future(watch(ended_key(campaign, ">"), partial(ended_in, campaign=campaign))),
            asyncio.ensure_future(watch(campaign, ledger_in)),
        ]
        told: set[VmKey] = set()
        try:
            while not (ledger.is_over and len(told) >= ledger.ended):
                each = await news.get()
                if isinstance(each, BaseException):
                    raise each
                if isinstance(each, Ledger):
                    ledger = each
                elif each.key in told:
                    continue
                else:
                    told.add(each.key)
                yield each
            yield ledger
        finally:
            for watching in watches:
                watching.cancel()
            await asyncio.wait(watches)

    # What operators decide.

    async def pause(self, campaign: str) -> Ledger:
        """Have no more VMs begun until it is resumed; VMs that were begun are finished.

        Raises:
            CampaignError: There is none of this id, or it is over.
            HostsError: It could not be written.
        """
        return (await self._change(campaign, Ledger.paused))[1]

    async def resume(self, campaign: str) -> Ledger:
        """Continue it; raises as ``pause``."""
        return (await self._change(campaign, Ledger.resumed))[1]

    async def stop(self, campaign: str) -> Ledger:
        """End it: no more VMs are begun, and whoever carries it out withdraws the wishes that no host has begun.

        VMs that were begun are finished. Raises as ``pause``.
        """
        return (await self._change(campaign, Ledger.stopped))[1]

    async def forget(self, campaign: str) -> Ledger:
        """Delete it with its results; return the ledger that it had.

        The wishes of its VMs stay, each until a newer one replaces it: drift is what differs from them. If this is
        cancelled, or loses the server, the ledger is still there, and it can be done again.

        Raises:
            CampaignError: There is none of this id, it cannot be read, or it is not over.
            HostsError: It could not be deleted.
        """
        revision, ledger = await self.read(campaign)
        if not ledger.is_over:
            raise CampaignError(campaign, f"it is {ledger.status.value}: stop it, and wait until it is over")
        places = asyncio.Semaphore(_DELETED_AT_ONCE)

        async def delete(key: str) -> None:
            async with places:
                await self.bucket.delete(key)

        for keys in (ended_key(campaign, ">"), part_key(campaign, "*")):
            await asyncio.gather(*map(delete, await self.bucket.keys(keys)))
        with contextlib.suppress(StaleError):  # another one has done the same
            await self.bucket.delete(campaign, last=revision)
        return ledger

    async def _change(self, campaign: str, change: Callable[[Ledger], Ledger]) -> tuple[int, Ledger]:
        for _ in range(_TRIES):
            revision, ledger = await self.read(campaign)
            try:
                after = change(ledger)
            except ValueError as error:
                raise CampaignError(campaign, str(error)) from error
            if after == ledger:
                return revision, ledger
            try:
                return await self.bucket.update(campaign, to_bytes(after), last=revision), after
            except StaleError:
                continue
        raise CampaignError(campaign, f"it changed each of the {_TRIES} times that this was tried: try again")

    async def take_on(self, campaign: str) -> tuple[int, Ledger]:
        """Note in its ledger that another controller carries it out from now on; return its revision, and it.

        Raises:
            CampaignError: There is none of this id, or it cannot be read.
            HostsError: It could not be written.
        """
        return await self._change(campaign, lambda now: now if now.is_over else replace(now, epoch=now.epoch + 1))


def _said_by(entry: Entry) -> str:
    """Return what whoever holds the lease in *entry* is called; "" if that cannot be read."""
    try:
        said = from_json(dict, entry.value or b"{}").get("controller")
    except ValueError:
        return ""
    return said if isinstance(said, str) else ""


def ledger_in(entry: Entry) -> Ledger:
    """Return the ledger in *entry*.

    Raises:
        CampaignError: It cannot be read.
    """
    ledger = _read(Ledger, entry, entry.key)
    if ledger.id != entry.key:  # it would be changed, and its results kept, in another one's place
        raise CampaignError(entry.key, f"{entry.key} cannot be read: it is the ledger of {ledger.id}")
    return ledger


def ended_in(entry: Entry, campaign: str) -> Ended:
    """Return the result in *entry*, of a VM of *campaign*.

    Raises:
        CampaignError: It cannot be read.
    """
    return _read(Ended, entry, campaign)


def vm_result(ended: Ended) -> VmResult[TransitionReport | None]:
    """Return what a VM came to as a result of a fleet: its layout, and its report or its error.

    Where nothing but its fate is known, that is a WishError.
    """
    vm = ended.key
    found: VmResult[TransitionReport | None] = VmResult(str(vm), vm.vm, None, None, None, 0.0)
    why = ended.why
    if ended.state:
        try:
            found = answered_result(ended.state, vm)
        except ValueError as error:
            why = f"{why}; its state cannot be read: {error}".removeprefix("; ")
    told_by_state = ended.phase is WishPhase.ENDED and found.code == ended.code
    if told_by_state and (ended.code != REACHED or found.value is not None):
        return found
    return replace(found, value=None, error=WishError(str(vm), ended.phase, why, ended.code))


def _read(kind: type[_T], entry: Entry, campaign: str) -> _T:
    if entry.value is None:
        raise CampaignError(campaign, f"{entry.key} was deleted meanwhile")
    try:
        return from_json(kind, entry.value)
    except ValueError as error:
        raise CampaignError(campaign, f"{entry.key} cannot be read: {error}") from error
