"""The VMs of other hosts: their agents are asked over the server of many hosts, and carry wishes out."""

import asyncio
import contextlib
import getpass
import json
import logging
import os
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar, Unpack
from uuid import uuid4

from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.documents import NO_ANSWER, error_from_json, plan_from_json, statistics_from_json
from qmpvcpu.errors import (
    HostFailedError,
    HostsError,
    HostSilentError,
    QmpVcpuError,
    RequestRefusedError,
    ServerLostError,
    WishError,
    printable,
)
from qmpvcpu.fleet.merged import FleetEvents
from qmpvcpu.fleet.results import VmResult
from qmpvcpu.fleet.told import is_audit, read_told, whose
from qmpvcpu.fleet.transport import Rescan
from qmpvcpu.fleet.wishes import State, WishBook, deleted_error
from qmpvcpu.given import checked
from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.hosts import Operation, VmKey, client_inbox, request_subject
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import ChangeOptions
from qmpvcpu.model.statistics import VmStatistics
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.where import Where
from qmpvcpu.model.wish import DROP_AFTER_S, GRACE_S, Wish, WishOptions, WishPhase
from qmpvcpu.planning.plan import Plan
from qmpvcpu.vm.subscribers import EventStream

_T = TypeVar("_T")

_log = logging.getLogger("qmpvcpu.fleet")

# An agent that is there reads many VMs, and waits for those that are silent, before it answers.
_LIST_S: Final = 60.0
_HOSTS_AT_ONCE: Final = 64
# Thousands may wait for their guests. If all were written at once, the deadline of each would begin at once, too.
_WRITES_AT_ONCE: Final = 64
_AGAIN_S: Final = 0.2


class RemoteVm:
    """One VM of another host, as a member of a fleet, and as what can be worked on."""

    is_extra = False

    def __init__(self, vms: "RemoteVms", key: VmKey, listing: "_Listing") -> None:
        self._vms = vms
        self._listing = listing
        self._layout: Layout | None = None
        self.key = key
        self.name = key.vm

    @property
    def layout(self) -> Layout | None:
        """Its layout, as last seen."""
        return self._layout or self._vms.layout_of(self.key)

    async def reach(self) -> "RemoteVm":
        """Return it: whether its agent reaches it is found out by each call."""
        return self

    async def refresh(self) -> Layout:
        """Have its agent read it again.

        Raises:
            HostSilentError: No agent answers there.
            RequestRefusedError: Its agent has no such VM any more.
            QmpVcpuError: What came of reading it.
        """
        row = (await self._listing.rows_of(self.key.host)).get(self.key.vm)
        result = None if row is None else _result(row, self.key)
        if result is not None and result.error is not None:
            raise result.error
        if result is None or result.layout is None:
            raise RequestRefusedError(f"{self.key}: its host's agent has no such VM any more; look which there are")
        self._layout = result.layout
        return result.layout

    async def plan(self, target: VcpuMap, **options: Unpack[ChangeOptions]) -> Plan:
        """Have its agent plan what it takes to have exactly these vCPUs plugged; errors as of ``refresh``."""
        return await self._plan(options, map=str(target))

    async def plan_count(self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]) -> Plan:
        """Have its agent plan what it takes to have so many vCPUs plugged."""
        return await self._plan(options, count=count, include_boot=include_boot)

    async def _plan(self, options: ChangeOptions, **target: Any) -> Plan:
        given = {name: value for name, value in to_json(WishOptions.of(options)).items() if value is not None}
        request = {"vm": self.key.vm, "options": given, **target}
        content = await self._vms.ask(self.key.host, Operation.PLAN, request, dict)
        return self._told(lambda: plan_from_json(content, self.layout))

    async def statistics(self, *, kvm: Collection[str] | None = None) -> VmStatistics:
        """Have its agent read what its vCPUs have done."""
        request = {"vm": self.key.vm, "kvm": None if kvm is None else [*kvm]}
        content = await self._vms.ask(self.key.host, Operation.STATISTICS, request, dict)
        return self._told(lambda: statistics_from_json(content))

    def _told(self, read: Callable[[], _T]) -> _T:
        """Return what its agent told.

        Raises:
            HostFailedError: It cannot be read.
        """
        try:
            return read()
        except ValueError as error:
            raise HostFailedError(str(self.key), f"its answer cannot be read: {error}") from error

    async def set_map(self, target: VcpuMap, **options: Unpack[ChangeOptions]) -> TransitionReport:
        """Wish that exactly these vCPUs are plugged, and wait for what comes of it."""
        return await self._carry_out(self._vms.wish(options, map=target))

    async def set_count(
        self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]
    ) -> TransitionReport:
        """Wish that so many vCPUs are plugged, and wait for what comes of it."""
        return await self._carry_out(self._vms.wish(options, count=count, include_boot=include_boot))

    async def _carry_out(self, wish: Wish) -> TransitionReport:
        self._layout = None
        state, revision = await self._vms.carry_out(self.key, wish)
        return state.report_of(revision)


class RemoteVms:
    """The transport over the server of many hosts. Its options are those of ``Fleet``.

    Raises:
        ValueError: *server*, *where* or *drop_after* is none.
    """

    concurrency = 64  # agents do the work
    directory = None

    @checked
    def __init__(
        self,
        server: str | ServerAddress,
        *,
        where: str = "",
        reply_timeout: float = 10.0,
        who: str | None = None,
        why: str = "",
        drop_after: float = DROP_AFTER_S,
    ) -> None:
        if drop_after == 0:
            raise ValueError("drop_after is 0: a wish would be dropped at once")
        self._address = ServerAddress(server) if isinstance(server, str) else server
        self._where = Where.parse(where)
        self._who = who or user_name()
        self._why = why
        self.reply_timeout = reply_timeout
        self._drop_after = drop_after
        self._stack = contextlib.AsyncExitStack()
        self._bus: Bus
        self._book: WishBook
        self._chosen: dict[VmKey, None] = {}
        self._changing: set[asyncio.Task[Any]] = set()
        self._asking: set[asyncio.Task[Any]] = set()
        self._writes = asyncio.Semaphore(_WRITES_AT_ONCE)
        self._events: weakref.WeakSet[FleetEvents] = weakref.WeakSet()
        self._listening: set[asyncio.Event] = set()  # each is set once what happens reaches its stream
        self._closed = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """HOST/NAME of all VMs that were chosen, ordered by host and name."""
        return tuple(map(str, self._chosen))

    async def open(self) -> None:
        """Connect, and find the VMs.

        Raises:
            HostsError: The server cannot be reached, or is not fit.
            SameNameError: VMs of two hosts have a name that was chosen without a host.
        """
        async with contextlib.AsyncExitStack() as stack:
            inbox = client_inbox(self._who)
            bus = await Bus.connect(self._address, name="qmpvcpu fleet", inbox=inbox, timeout=self.reply_timeout)
            self._bus = await stack.enter_async_context(bus)
            self._book = await stack.enter_async_context(WishBook(self._bus, self._where.keys))
            await self.rescan()
            self._stack = stack.pop_all()

    async def rescan(self) -> Rescan:
        """Choose again among the VMs that agents tell of now.

        Raises:
            SameNameError: VMs of two hosts have a name that was chosen without a host.
        """
        before = self._chosen
        uuids = {key: state.uuid for key, state in self._book.states.items()}
        self._chosen = dict.fromkeys(self._where.choose(uuids))
        came = tuple(str(key) for key in self._chosen if key not in before)
        return Rescan(came, tuple(str(key) for key in before if key not in self._chosen))

    def check_options(self, options: ChangeOptions) -> None:
        """Raise TypeError or ValueError if these are no options that travel."""
        WishOptions.of(options)

    def members(self) -> Mapping[str, RemoteVm]:
        """Return whom to work on now; each host is asked once for all of them."""
        listing = _Listing(self, self._chosen)
        return {str(key): RemoteVm(self, key, listing) for key in self._chosen}

    def drifted(self) -> Mapping[str, VcpuMap]:
        """Return what was wished of VMs that somebody has changed by hand since, as their agents tell."""
        states = ((key, self._book.states.get(key)) for key in self._chosen)
        wanted = {str(key): state.drifted_from for key, state in states if state is not None}
        return {address: vcpus for address, vcpus in wanted.items() if vcpus is not None}

    def layouts(self) -> Mapping[str, Layout]:
        """Return the layouts that agents told last which are there; they have them as long as they reach the VMs."""
        here = {key: self.layout_of(key) for key in self._chosen if key.host in self._book.hosts}
        return {str(key): layout for key, layout in here.items() if layout is not None}

    def layout_of(self, key: VmKey) -> Layout | None:
        """Return the layout that the VM's agent told last, or None."""
        state = self._book.states.get(key)
        with contextlib.suppress(ValueError):
            return None if state is None else state.result.layout
        return None

    async def close(self) -> None:
        """Wait until all wishes are withdrawn or stopped, and let go of the server; idempotent."""
        self._closed = True
        while self._changing:
            await asyncio.wait(self._changing)
        for task in self._asking:
            task.cancel()
        while self._asking:
            await asyncio.wait(self._asking)
        await self._stack.aclose()
        for events in self._events:
            events.close()

    # Requests.

    def has(self, host: str) -> bool:
        """Return True if *host*'s agent holds its lease."""
        return host in self._book.hosts

    def start(self, asking: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Do it in a task of its own, until it is done or this is closed."""
        task = asyncio.get_running_loop().create_task(asking)
        self._asking.add(task)
        task.add_done_callback(self._asked)
        return task

    def _asked(self, task: "asyncio.Task[Any]") -> None:
        self._asking.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it may be gone, and asyncio would report it

    async def ask(self, host: str, operation: Operation, request: Mapping[str, Any], answer: type[_T]) -> _T:
        """Ask *host*'s agent, and return its *answer*.

        Raises:
            HostsError: It does not answer, or with nonsense.
            QmpVcpuError: Its answer is an error.
        """
        await self._listened()
        subject = request_subject(host, operation, self._who)
        asking = self.start(self._request(subject, json.dumps(request).encode()))
        gone = self.start(self._gone(host))
        try:
            await asyncio.wait({asking, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise HostSilentError(subject)
            return _read(answer, asking.result(), subject)
        finally:
            asking.cancel()
            gone.cancel()

    async def _request(self, subject: str, request: bytes) -> bytes:
        """Ask; a server that is away is waited for as long as a reply may take, an answer for longer."""
        try:
            async with asyncio.timeout(self.reply_timeout):
                await self._bus.wait_connected()
        except TimeoutError:
            raise ServerLostError(f"ask {subject}", "there is no connection", maybe_done=False) from None
        return await self._bus.request(subject, request, timeout=_LIST_S)

    async def _gone(self, host: str) -> None:
        """Return when *host* has been without an agent for as long as a reply may take."""
        book = self._book
        while await book.wait_host(host, None, gone=True):
            if not await book.wait_host(host, self.reply_timeout):
                return

    # Wishes.

    def wish(self, options: ChangeOptions, **target: Any) -> Wish:
        """Return the wish for *target*."""
        return Wish(
            id=uuid4().hex,
            options=WishOptions.of(options),
            drop_after=self._drop_after,
            who=self._who,
            why=self._why,
            **target,
        )

    async def carry_out(self, key: VmKey, wish: Wish) -> tuple[State, int]:
        """Have *wish* carried out; return the state with what came of it, and the wish's revision.

        Cancelling it withdraws the wish, or has it stopped at its next safe point.

        Raises:
            HostsError: It was not begun, or it is not known what came of it.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 -- JUSTIFICATION: a coroutine runs in a task, which mypy cannot know
        self._changing.add(task)
        try:
            await self._listened()
            if not await self._book.wait_host(key.host, self.reply_timeout):
                raise self._silence(key.host)
            await self._writes.acquire()
            writing = self.start(self._book.replace(key, wish))
            writing.add_done_callback(lambda _: self._writes.release())
            try:
                revision = await asyncio.shield(writing)
                return await self._answer(key, revision), revision
            except asyncio.CancelledError:
                # A task of its own: who cancels again gives up the waiting, not the stopping.
                _, late = await asyncio.wait({self.start(self._stop(key, writing))}, timeout=self.reply_timeout)
                if late:
                    _log.warning("%s: what was wished has not stopped yet", key, extra={"vm": str(key)})
                raise
        finally:
            self._changing.discard(task)

    def _silence(self, host: str) -> HostSilentError:
        return HostSilentError(request_subject(host, Operation.SET, self._who))

    async def _answer(self, key: VmKey, revision: int) -> State:
        """Return the state that answers the wish of *revision*; take the wish back if nobody can begin it."""
        book, loop = self._book, asyncio.get_running_loop()
        over = partial(book.is_over, key, revision)

        def stuck() -> bool:
            state = book.states.get(key)
            answer = None if state is None else state.answer
            waits = answer is not None and answer.revision == revision and answer.phase is WishPhase.WAITING
            return key.host not in book.hosts or (state is not None and not state.is_here and waits)

        deadline = loop.time() + self._drop_after + GRACE_S
        while not over() and (left := deadline - loop.time()) > 0:
            if not stuck():
                await book.wait_changed(key, lambda: over() or stuck(), left)
            elif not await book.wait_changed(key, lambda: over() or not stuck(), min(left, self.reply_timeout)):
                if await book.withdraw(key, revision):
                    raise self._not_begun(key)
                state, deletion = book.states.get(key), await book.deletion(key)
                told = state is not None and state.answer is not None and state.answer.revision == revision
                if deletion is not None and not told:
                    raise deleted_error(key, deletion)
                # It was begun before its agent died: the next one sees to it.
                await book.wait_changed(key, over, deadline - loop.time())
        if over():
            return book.states[key]
        if await book.withdraw(key, revision):
            raise WishError(str(key), WishPhase.EXPIRED, "nobody has begun it", NO_ANSWER)
        raise WishError(str(key), WishPhase.RUNNING, "there was no answer in time", NO_ANSWER)

    def _not_begun(self, key: VmKey) -> QmpVcpuError:
        """Return why a wish for *key* could not be begun, and was withdrawn."""
        state = self._book.states.get(key)
        if key.host not in self._book.hosts or state is None or state.answer is None:
            return self._silence(key.host)
        return WishError(str(key), WishPhase.WITHDRAWN, state.answer.why, NO_ANSWER)

    async def _stop(self, key: VmKey, writing: "asyncio.Task[int]") -> None:
        """Take a wish back, or have it stopped, and wait a while until it is."""
        try:
            revision = await writing
            if not await self._book.stop(key, revision):
                await self._book.answer_to(key, revision, self.reply_timeout)
        except HostsError as error:
            _log.warning("%s: the wish could not be withdrawn: %s", key, error, extra={"vm": str(key)})

    # Events.

    def events(self, *, audit: bool) -> FleetEvents:
        """Return what happens to the chosen VMs from now on, before anything else is asked or wished.

        *audit*: with who asks for what, and what comes of it.
        """
        events = FleetEvents()
        if self._closed:
            events.close()
            return events
        self._events.add(events)
        listening = asyncio.Event()
        self._listening.add(listening)
        task = self.start(self._follow(weakref.ref(events), listening, audit=audit))
        # Not in the task itself: if it is cancelled before its first step, nothing of it ever runs.
        task.add_done_callback(lambda _: self._began(listening))
        weakref.finalize(events, task.cancel)
        return events

    async def _listened(self) -> None:
        """Wait until all streams of events have begun."""
        for listening in tuple(self._listening):
            await listening.wait()

    async def _follow(self, events: "weakref.ref[FleetEvents]", listening: asyncio.Event, *, audit: bool) -> None:
        streams: dict[VmKey, EventStream] = {}
        try:
            async with self._bus.follow(f"qmpvcpu.event.{self._where.keys}.*") as happened:
                self._began(listening)
                async for each in happened:
                    try:
                        key, kind = whose(each.subject)
                    except ValueError as error:  # no agent tells of anything there
                        _log.warning("an event of nobody: %s", printable(str(error)))
                        continue
                    if key not in self._chosen or (is_audit(kind) and not audit):
                        continue
                    if (event := read_told(kind, each.data, each.created)) is None:
                        continue
                    if key not in streams:
                        streams[key] = EventStream(asyncio.get_running_loop())
                        if (stream := events()) is None:
                            return
                        stream.add(str(key), key.vm, streams[key])
                        del stream
                    streams[key].push(event)
        except Exception as error:  # noqa: BLE001 -- JUSTIFICATION: it is raised to who reads, who would wait for ever
            _log.warning("no events come any more: %s", error)
            if (stream := events()) is not None:
                stream.close(error)

    def _began(self, listening: asyncio.Event) -> None:
        listening.set()
        self._listening.discard(listening)


@dataclass(frozen=True)
class _Page:
    """A part of a list: *next* is where the rest begins after, None at the end."""

    vms: tuple[object, ...]
    next: str | None


class _Listing:
    """What the agents of some VMs say of them: each is asked once, all by the first who wants to know."""

    def __init__(self, vms: RemoteVms, wanted: Iterable[VmKey]) -> None:
        self._vms = vms
        self._wanted: dict[str, list[str]] = {}
        for key in wanted:
            self._wanted.setdefault(key.host, []).append(key.vm)
        self._asked: dict[str, asyncio.Task[dict[str, Mapping[str, Any]]]] = {}
        self._room = asyncio.Semaphore(_HOSTS_AT_ONCE)

    async def rows_of(self, host: str) -> dict[str, Mapping[str, Any]]:
        """Return the rows of *host*'s VMs, by name."""
        if not self._asked:
            self._asked = {each: self._vms.start(self._ask(each, names)) for each, names in self._wanted.items()}
        return await asyncio.shield(self._asked[host])  # the others wait for it too

    async def _ask(self, host: str, names: Collection[str]) -> dict[str, Mapping[str, Any]]:
        rows: dict[str, Mapping[str, Any]] = {}
        only = next(iter(names)) if len(names) == 1 else None
        after: str | None = None
        async with self._room:
            while True:
                request = {"fresh": True, "vm": only, "after": after}
                page = await self._page(host, request)
                rows |= {str(row.get("name")): row for row in page.vms if isinstance(row, Mapping)}
                if page.next is None or (after is not None and page.next <= after):
                    return rows
                after = page.next

    async def _page(self, host: str, request: Mapping[str, Any]) -> _Page:
        """Ask for a part of a list; again, for a while, where the server or the agent is about to be back."""
        vms, loop = self._vms, asyncio.get_running_loop()
        deadline = loop.time() + vms.reply_timeout
        while True:
            try:
                return await vms.ask(host, Operation.LIST, request, _Page)
            except (ServerLostError, HostSilentError) as error:
                silent = isinstance(error, HostSilentError) and (error.is_there or not vms.has(host))
                if silent or loop.time() >= deadline:
                    raise
                await asyncio.sleep(_AGAIN_S)


def _read(kind: type[_T], answer: bytes, subject: str) -> _T:
    """Return what an agent answered.

    Raises:
        HostFailedError: It cannot be read.
        QmpVcpuError: It is an error.
    """
    try:
        content = from_json(dict, answer)
        if (error := content.get("error")) is None:
            return from_json(kind, content)
    except ValueError as err:
        raise HostFailedError(subject, f"its answer cannot be read: {err}") from err
    raise error_from_json(error)


def _result(row: Mapping[str, Any], key: VmKey) -> VmResult[Any]:
    """Return what an agent's *row* says of a VM.

    Raises:
        HostFailedError: It cannot be read.
    """
    try:
        return VmResult.from_json(row)
    except ValueError as error:
        raise HostFailedError(str(key), f"its state cannot be read: {error}") from error


def user_name() -> str:
    """Return who runs this program."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # it has no name here
        return str(os.getuid())
