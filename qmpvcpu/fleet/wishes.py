"""Wishes for VMs of other hosts: written, watched until they are answered, and withdrawn."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType, TracebackType
from typing import Any, Self

from qmpvcpu.bus import Bucket, Bus, Entry
from qmpvcpu.documents import NOT_REACHED
from qmpvcpu.errors import HostsError, ServerLostError, StaleError, TooLongError, WishError, printable
from qmpvcpu.fleet.results import VmResult
from qmpvcpu.model.codec import from_json, members, to_bytes
from qmpvcpu.model.hosts import HOST_LEASES, LEASES, MOST_BYTES, STATES, WISHES, HostInfo, VmKey, name_of
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import Answer, Claim, Wish, WishPhase

_log = logging.getLogger("qmpvcpu.fleet")


@dataclass(frozen=True)
class State:
    """What a host's agent has told of a VM.

    Attributes:
        vm: Which VM.
        answer: How far the wish got that was answered last; None: there was none.
        uuid: The VM's uuid, or None.
        is_here: Whether the agent reached the VM.
        deleted: The revision of the last deletion of a wish that the agent has taken note of; 0: none.
        drifted_from: What was wished and reached, if others have changed it since; None: they have not.
        written: When it was told, by the server's clock, in seconds since 1970.
        content: The whole document.
    """

    vm: VmKey
    answer: Answer | None
    uuid: str | None
    is_here: bool
    deleted: int
    drifted_from: VcpuMap | None
    written: float
    content: bytes

    @classmethod
    def read(cls, entry: Entry) -> "State":
        """Return the state in *entry*.

        Raises:
            ValueError: It is none.
        """
        content = entry.value or b""
        data = from_json(dict, content)
        answer = members(data, {"answer": object})["answer"]
        vm = data.get("vm")
        return cls(
            vm=VmKey.parse(entry.key),
            answer=None if answer is None else from_json(Answer, answer),
            uuid=None if vm is None else members(vm, {"uuid": str | None})["uuid"],
            is_here=vm is not None,
            deleted=members(data, {"deleted": int})["deleted"] if "deleted" in data else 0,
            drifted_from=members(data, {"wanted": VcpuMap})["wanted"] if data.get("drift") is True else None,
            written=entry.created,
            content=content,
        )

    @property
    def document(self) -> dict[str, Any]:
        """All that was told, as ``fleet list --json`` has it of one VM, and more."""
        return from_json(dict, self.content)

    @cached_property
    def result(self) -> VmResult[TransitionReport | None]:
        """It as a result: its layout, and the report or the error of the wish that was answered last.

        Raises:
            ValueError: The document cannot be read.
        """
        return answered_result(self.document, self.vm)

    def has_answered(self, revision: int) -> bool:
        """Return True if the wish of *revision* is over: it was answered, a newer one was, or it was deleted."""
        answer = self.answer
        if answer is None or answer.revision < revision:
            return self.deleted >= revision
        return answer.revision > revision or answer.phase.is_over

    def report_of(self, revision: int) -> TransitionReport:
        """Return what came of the wish of *revision*, which is over.

        Raises:
            QmpVcpuError: What came of it, as ``VcpuController.set_map`` raises it.
            WishError: It was not carried out, or its outcome is unknown.
        """
        answer = self.answer
        if answer is None or answer.revision < revision:
            raise deleted_error(self.vm, self.deleted)
        if answer.revision != revision:
            raise WishError(str(self.vm), WishPhase.SUPERSEDED, "its events tell what was sent by then", NOT_REACHED)
        if answer.phase not in (WishPhase.REJECTED, WishPhase.EXPIRED):
            try:
                result = self.result
            except ValueError as error:
                raise WishError(
                    str(self.vm), answer.phase, f"its answer cannot be read: {error}", answer.code
                ) from error
            if result.error is not None:
                raise result.error
            if result.value is not None and answer.phase is WishPhase.ENDED:
                return result.value
        raise WishError(str(self.vm), answer.phase, answer.why, answer.code)


def answered_result(state: Mapping[str, Any], vm: VmKey) -> VmResult[TransitionReport | None]:
    """Return what the document *state* of *vm* says of the wish that was answered last, though the VM may be gone.

    Raises:
        ValueError: It cannot be read.
    """
    came_to = members(state, {"came_to": dict})["came_to"] if "came_to" in state else state
    return replace(VmResult.from_json(came_to), address=str(vm), name=vm.vm)


class WishBook:
    """The wishes of many VMs, and what their hosts say, as one async context: ``async with WishBook(bus) as book:``.

    Entering it reads their states and all leases, and from then on they are kept up to date, by one watch of each.

    Args:
        bus: The server; it stays open.
        keys: Which VMs, as a filter of keys: ``HOST.>``, or all.
    """

    def __init__(self, bus: Bus, keys: str = ">") -> None:
        self._bus = bus
        self._keys = keys
        self._wishes: Bucket
        self._states: dict[VmKey, State] = {}
        self._hosts: dict[str, HostInfo] = {}
        self._waiting: dict[VmKey, set[asyncio.Event]] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._wishes = await self._bus.bucket(WISHES)
        states, leases = await self._bus.bucket(STATES), await self._bus.bucket(LEASES)
        known = [asyncio.Event(), asyncio.Event()]
        self._watches = [
            asyncio.ensure_future(self._watch(states, self._keys, self._take_state, known[0])),
            asyncio.ensure_future(self._watch(leases, HOST_LEASES, self._take_lease, known[1])),
        ]
        try:
            for each in known:
                await each.wait()
            self._check()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        for each in self._watches:
            each.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        self._failed(HostsError("the wishes were closed"))

    # What is known.

    @property
    def states(self) -> Mapping[VmKey, State]:
        """What was told last of each VM, kept up to date; a host that is away is not known to be so by it."""
        return MappingProxyType(self._states)

    @property
    def hosts(self) -> Mapping[str, HostInfo]:
        """The hosts whose agents are there, by name, kept up to date."""
        return MappingProxyType(self._hosts)

    def is_over(self, vm: VmKey, revision: int) -> bool:
        """Return True if the wish of *revision* for *vm* is over: see ``State.has_answered``."""
        state = self._states.get(vm)
        return state is not None and state.has_answered(revision)

    async def wait_changed(self, vm: VmKey, until: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until *until* returns True, at most so long; return whether it did.

        It is asked again whenever the state of *vm* changes, or its host comes or goes.

        Raises:
            HostsError: They cannot be watched any more.
        """
        with self._waker(vm) as news:
            try:
                async with asyncio.timeout(timeout):
                    while not until():
                        await news.wait()
                        news.clear()
                        self._check()
            except TimeoutError:
                return False
            return True

    async def wait_host(self, host: str, timeout: float | None, *, gone: bool = False) -> bool:
        """Wait until *host*'s agent is there, or is *gone*, at most so long; return whether it is so.

        Raises:
            HostsError: It cannot be watched any more.
        """
        return await self.wait_changed(VmKey(host, ""), lambda: (host in self._hosts) is not gone, timeout)

    @contextlib.contextmanager
    def _waker(self, vm: VmKey) -> Iterator[asyncio.Event]:
        news = asyncio.Event()
        waiting = self._waiting.setdefault(vm, set())
        waiting.add(news)
        try:
            yield news
        finally:
            waiting.discard(news)
            if not waiting and self._waiting.get(vm) is waiting:
                del self._waiting[vm]

    async def answer_to(self, vm: VmKey, revision: int, timeout: float | None = None) -> State | None:
        """Wait until the wish of *revision* is over; return the state that says so, None if it was not by then.

        Raises:
            HostsError: The states cannot be watched any more.
        """
        is_over = partial(self.is_over, vm, revision)
        return self._states[vm] if await self.wait_changed(vm, is_over, timeout) else None

    # What is wished.

    async def write(self, vm: VmKey, wish: Wish, last: int | None) -> int:
        """Wish something of *vm*, in place of the wish of revision *last*; return the new revision.

        If the wish of this id is there already, begun or not, this returns its revision: whoever does not know
        whether it was written may write it again.

        Raises:
            StaleError: Another wish is there; nothing was written.
            TooLongError: Agents would not read it.
            ValueError: It contradicts itself, or a text in it is too long.
            HostsError: It could not be written.
        """
        wish.check_foreign()
        content = to_bytes(wish)
        if len(content) > MOST_BYTES:
            raise TooLongError(f"a wish for {vm}", len(content), MOST_BYTES)
        try:
            if last is None:
                return await self._wishes.create(vm.key, content)
            return await self._wishes.update(vm.key, content, last=last)
        except (StaleError, ServerLostError) as error:
            if isinstance(error, ServerLostError) and not error.maybe_done:
                raise
            revision = await self._written(vm, wish, error)
            if revision is None:
                raise
            return revision

    async def _written(self, vm: VmKey, wish: Wish, error: HostsError) -> int | None:
        """Return the revision of *wish* if it is there, None if it is not; raise *error* if that cannot be known."""
        try:
            entry = await self._wishes.get(vm.key)
        except ServerLostError:
            raise error from None
        there, claim = ("", None) if entry is None else _of(entry)
        if entry is None or there != wish.id:
            return None
        return entry.revision if claim is None else claim.revision

    async def replace(self, vm: VmKey, wish: Wish) -> int:
        """Wish something of *vm* in place of what is wished of it now; return the revision.

        Raises:
            StaleError: Another wish came just now; nothing was written.
            HostsError: It could not be written.
        """
        seen = await self._wishes.get(vm.key)
        while True:
            try:
                return await self.write(vm, wish, None if seen is None else seen.revision)
            except StaleError:
                now = await self._wishes.get(vm.key)
                if now is not None and (seen is None or _of(now)[0] != _of(seen)[0]):
                    raise
                seen = now  # it was begun just now, or is over

    async def withdraw(self, vm: VmKey, revision: int) -> bool:
        """Withdraw the wish of *revision* if it was not begun.

        Returns:
            True: it was not, and never will be. False: it was begun, is over, or another took its place.

        Raises:
            HostsError: It is not known whether it was withdrawn.
        """
        try:
            await self._wishes.delete(vm.key, last=revision)
        except StaleError:
            return False
        return True

    async def deletion(self, vm: VmKey) -> int | None:
        """Return the revision by which the last wish for *vm* was deleted; None: it was not.

        Raises:
            HostsError: The server cannot be asked.
        """
        entry = await self._wishes.last(vm.key)
        return entry.revision if entry is not None and entry.value is None else None

    async def stop(self, vm: VmKey, revision: int) -> bool:
        """Withdraw the wish of *revision*; if it was begun, its agent stops at the next safe point, and answers.

        Returns:
            True: it was not begun, and never will be. False: see ``answer_to``.

        Raises:
            HostsError: It is not known whether it was withdrawn.
        """
        while not await self.withdraw(vm, revision):
            now = await self._wishes.get(vm.key)
            claim = None if now is None else _of(now)[1]
            if now is None or claim is None or claim.revision != revision:
                return False
            try:
                await self._wishes.delete(vm.key, last=now.revision)
            except StaleError:
                continue
            return False
        return True

    # How it is kept up to date.

    async def _watch(self, bucket: Bucket, keys: str, take: Callable[[Entry], None], known: asyncio.Event) -> None:
        try:
            async with bucket.watch(keys) as entries:
                async for entry in entries:
                    if entry is None:
                        known.set()
                        continue
                    try:
                        take(entry)
                    except ValueError as error:
                        _log.warning("%s: %s cannot be read: %s", bucket.name, entry.key, printable(str(error)))
        except Exception as error:  # noqa: BLE001 -- JUSTIFICATION: it is raised to who waits, who would wait for ever
            self._failed(error)
        finally:
            known.set()

    def _take_state(self, entry: Entry) -> None:
        vm = VmKey.parse(entry.key)
        if entry.value is None:
            self._states.pop(vm, None)
        else:
            self._states[vm] = State.read(entry)
        self._tell(vm)

    def _take_lease(self, entry: Entry) -> None:
        host = name_of(entry.key.partition(".")[2])
        if entry.value is None:
            is_new = self._hosts.pop(host, None) is not None
        else:
            is_new = host not in self._hosts
            self._hosts[host] = HostInfo.read(entry.key, entry.value)
        if is_new:
            for vm in [vm for vm in self._waiting if vm.host == host]:
                self._tell(vm)

    def _tell(self, vm: VmKey) -> None:
        for news in self._waiting.get(vm, ()):
            news.set()

    def _failed(self, error: BaseException) -> None:
        self._failure = self._failure or error
        for waiting in self._waiting.values():
            for news in waiting:
                news.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


def deleted_error(vm: VmKey, revision: int) -> WishError:
    """Return what comes of a wish that somebody deleted, by *revision*, before any agent told that it began it."""
    why = f"somebody deleted it (revision {revision}), and no agent has begun it"
    return WishError(str(vm), WishPhase.WITHDRAWN, why, NOT_REACHED)


def _of(entry: Entry) -> tuple[str, Claim | None]:
    """Return the id of the wish in *entry*, and its claim; "" and None where it cannot be read."""
    try:
        wish = from_json(Wish, entry.value or b"")
    except ValueError:
        return "", None
    return wish.id, wish.claim
