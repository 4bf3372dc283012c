"""HostAgent: what carries out on one host what is wished of its VMs."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import PurePath
from typing import Any, Final, NamedTuple
from uuid import uuid4

import qmpvcpu
from qmpvcpu.bus import Bucket, Bus, Endpoint, Entry, Lease, Request
from qmpvcpu.documents.events import event_json
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.errors import (
    HostsError,
    MonitorLostError,
    NameTakenError,
    QmpVcpuError,
    RecordLockedError,
    ServerLostError,
)
from qmpvcpu.events import Disconnected
from qmpvcpu.fleet import Fleet, FleetEvents, VmResult
from qmpvcpu.hosts.board import StateBoard
from qmpvcpu.hosts.hosted import HostedVm
from qmpvcpu.hosts.keeper import Duty, WishKeeper, first_of
from qmpvcpu.hosts.outbox import Outbox
from qmpvcpu.hosts.policy import AgentPolicy
from qmpvcpu.hosts.requests import RequestDesk
from qmpvcpu.model.codec import to_bytes
from qmpvcpu.model.hosts import (
    LEASES,
    STATES,
    WISHES,
    HostInfo,
    Operation,
    VmKey,
    host_lease_key,
    request_subjects,
    token,
)
from qmpvcpu.vm.controller import VcpuController

_log = logging.getLogger("qmpvcpu.hosts")

_SERVICE: Final = "qmpvcpu"
_ENDED: Final = "its QEMU has ended, or another client has its socket"
# Once told to stop, an agent waits so long for the server to hear what became of the last wishes.
_LAST_WORDS_S: Final = 10.0
# How much longer than its time a lease may be there that nobody renews.
_FORGOTTEN_S: Final = 2.0
# How long what came of the last wish is still told of a VM that is gone.
_REMEMBERED_S: Final = 600.0


class HostAgent:
    """The agent of one host: carries out the wishes for its VMs, and reports what happens to them.

    Each host name has one agent at a time: it holds a lease, which runs out if it dies. Everything that it knows is
    on the server, in the VMs' records, or in the VMs themselves: it may be killed at any time, and another agent
    continues.

    Args:
        bus: The server.
        host: The name of the host.
        fleets: Its VMs; each with a record, unless *policy* only reads.
        policy: What it may do, and to which VMs.
        rescan: How often it looks for VMs that came or went, in seconds.

    Attributes:
        vms: Its VMs, by name, and the VMs that somebody wrote a wish for.
        serves: Set once it is this host's agent.

    Raises:
        ValueError: *host* is empty, or has a slash in it.
    """

    def __init__(
        self,
        bus: Bus,
        host: str,
        fleets: Sequence[Fleet],
        *,
        policy: AgentPolicy | None = None,
        rescan: float = 5.0,
    ) -> None:
        if not host or "/" in host:
            raise ValueError(f"a host's name is not empty and has no slash, since its VMs are HOST/NAME: {host!r}")
        self.vms: dict[str, HostedVm] = {}
        self._bus = bus
        self._host = host
        self._fleets = tuple(fleets)
        self._policy = policy or AgentPolicy()
        self._rescan_s = rescan
        self._id = uuid4().hex
        self._since = 0.0
        self._outbox = Outbox(bus)
        self._board = StateBoard(bus, host, self._state_of, self._outbox)
        self._found: dict[str, _Found] = {}  # by address
        self._names: dict[str, str] = {}  # that VMs were given, by address
        self._keepers: dict[str, WishKeeper] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._look_now = asyncio.Event()
        self._wishes_known = asyncio.Event()
        self._stop = asyncio.Event()
        self.serves = asyncio.Event()
        self._lease: Lease | None = None

    def stop(self) -> None:
        """Have ``run`` begin nothing more, and return once all work under way has ended and is reported."""
        self._stop.set()
        for keeper in self._keepers.values():
            keeper.stop()

    async def run(self) -> None:
        """Serve until ``stop``. If it is cancelled, work under way stops at its next safe point, unreported.

        Raises:
            LeaseTakenError: Another agent has this host's name.
            HostsError: The server refuses what it needs.
        """
        bus, whose = self._bus, f"{token(self._host)}.>"
        wishes, states, leases = [await bus.bucket(each) for each in (WISHES, STATES, LEASES)]
        await bus.sync_clock()
        self._since = bus.now()
        desk = RequestDesk(
            self._host, self.vms, self._policy, self._outbox, most_bytes=bus.most_bytes, refresh=_refresh
        )
        begun: list[asyncio.Task[None]] = []
        try:
            while not self._stop.is_set():
                # One that was killed is forgotten after the lease's time; who renews it meanwhile is alive.
                try:
                    async with self._leased(leases) as lease, self._listening(desk):
                        if not begun:
                            for key, entry in (await states.all(whose)).items():
                                self._recall(key, entry)
                            work = [
                                self._board.run(states),
                                self._board.keep(states),
                                self._outbox.run(),
                                self._look_on(),
                            ]
                            work += [self._take_wishes(wishes, whose)]
                            work += [self._take_events(fleet.events()) for fleet in self._fleets]
                            begun += [asyncio.ensure_future(each) for each in work]
                        await self._until_lost(lease, begun)
                except ServerLostError:
                    if not begun:
                        raise
                    await first_of(bus.wait_connected(), self._stop.wait())
            await asyncio.gather(*self._serving)
            await self._tell_the_rest()
        finally:
            tasks = {*begun, *self._serving}
            for each in tasks:
                each.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _tell_the_rest(self) -> None:
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await asyncio.gather(self._board.told(), self._outbox.told())
        except TimeoutError:
            _log.warning("%s: the server is away: what became of the last wishes will be told later", self._host)

    @contextlib.asynccontextmanager
    async def _leased(self, leases: Bucket) -> AsyncIterator[Lease]:
        """Be this host's agent inside; begin nothing when that is not sure."""
        key, wait = host_lease_key(self._host), (leases.ttl or 0.0) + _FORGOTTEN_S
        async with Lease(leases, key, self._announcement(), wait=wait) as self._lease:
            for hosted in self.vms.values():
                hosted.moved.set()
            self.serves.set()
            yield self._lease

    @property
    def _may_begin(self) -> bool:
        return self._lease is not None and self._lease.is_held and not self._stop.is_set()

    async def _until_lost(self, lease: Lease, work: "list[asyncio.Task[None]]") -> None:
        """Wait until the lease is lost, or this is to stop; or raise what ended the work."""
        ends = [asyncio.ensure_future(each.wait()) for each in (lease.lost, self._stop)]
        try:
            await asyncio.wait([*work, *ends], return_when=asyncio.FIRST_COMPLETED)
            for each in work:
                if each.done():
                    each.result()
        finally:
            for end in ends:
                end.cancel()

    def _announcement(self) -> bytes:
        info = HostInfo(
            self._host,
            self._id,
            qmpvcpu.__version__,
            tuple(each.value for each in Operation if each in self._policy.operations),
            self._since,
            sum(hosted.is_here for hosted in self.vms.values()),
        )
        return to_bytes(info)

    def _listening(self, desk: RequestDesk) -> contextlib.AbstractAsyncContextManager[None]:
        """Take requests inside, as a micro service that the server's own tools see."""

        def handler(operation: Operation) -> Callable[[Request], Awaitable[bytes]]:
            return lambda request: desk.answer(operation, request.subject, request.data)

        endpoints = {
            operation.value: Endpoint(request_subjects(self._host, operation), handler(operation))
            for operation in Operation
        }
        return self._bus.serve(
            _SERVICE,
            qmpvcpu.__version__,
            "changes the vCPUs of the VMs of a host",
            {"host": self._host, "agent": self._id},
            endpoints,
        )

    # Its VMs.

    def _hosted(self, name: str) -> HostedVm:
        if name not in self.vms:
            self.vms[name] = HostedVm(VmKey(self._host, name), self._board.changed)
        return self.vms[name]

    def _recall(self, key: str, entry: Entry) -> None:
        """Take over what an earlier agent has told of a VM."""
        with contextlib.suppress(ValueError, RecursionError):
            self._hosted(VmKey.parse(key).vm).recall(json.loads(entry.value or b"{}"))

    def _state_of(self, name: str) -> dict[str, Any] | None:
        hosted = self.vms.get(name)
        if hosted is None or not self._policy.covers(name):
            return None
        return hosted.document(self._bus.now())

    async def _look_on(self) -> None:
        """Look for VMs again and again."""
        while True:
            await self._look()
            if self._lease is not None and self._lease.is_held:
                with contextlib.suppress(HostsError):  # it is renewed all the same
                    await self._lease.update(self._announcement())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rescan_s):
                    await self._look_now.wait()
            self._look_now.clear()

    async def _look(self) -> None:
        """Find the VMs that are there now, and attach those that are not attached; each is served once it is."""
        seen: set[str] = set()
        for fleet in self._fleets:
            if fleet.directory is not None:
                try:
                    await fleet.rescan()
                except QmpVcpuError as error:
                    _log.warning("%s", error)
            async for result in fleet.attach():
                seen.add(result.address)
                vm = fleet.vms.get(result.address)
                self._place(result.address, _Found(self._name_of(fleet, result, vm), vm, result.error))
        for address in self._found.keys() - seen:
            self._place(address, None)
        await self._wishes_known.wait()  # a VM that is gone is still told of while something is wished of it
        for name, keeper in list(self._keepers.items()):
            if keeper.idle_s > _REMEMBERED_S and not self.vms[name].address:
                self._keepers.pop(name).stop()
        for name in [name for name, hosted in self.vms.items() if not hosted.address and name not in self._keepers]:
            del self.vms[name]
            self._board.changed(name, urgent=False)
        self._names = {
            address: name for address, name in self._names.items() if address in self._found or name in self.vms
        }

    def _place(self, address: str, found: "_Found | None") -> None:
        """Note what is at *address*: None is nothing any more."""
        before = self._found.pop(address, None)
        if before is not None and before == found:
            self._found[address] = before
            return
        if found is not None:
            self._found[address] = found
            if found.error is not None and (before is None or str(before.error) != str(found.error)):
                _log.warning("%s/%s at %s cannot be served: %s", self._host, found.name, address, found.error)
        for name in {each.name for each in (before, found) if each is not None}:
            there = {address: each for address, each in self._found.items() if each.name == name}
            if len(there) > 1:
                self._hosted(name).found(", ".join(there), None, NameTakenError(self._host, name, tuple(there)))
            elif there:
                ((where, one),) = there.items()
                self._hosted(name).found(where, one.vm, one.error)
            else:
                self._hosted(name).found("", None, None)

    def _name_of(self, fleet: Fleet, result: VmResult[Any], vm: VcpuController | None) -> str:
        """Return what a VM is called: the name that it was given, else its socket's path below the directory."""
        if vm is not None and vm.layout.vm.named:
            self._names[result.address] = vm.layout.vm.name
        elif isinstance(result.error, RecordLockedError):  # another VM of that name here may have it
            record = result.error.path
            for found in self._found.values():
                if found.vm is not None and found.vm.record_info is not None and found.vm.record_info.path == record:
                    return found.name
        if result.address not in self._names:
            path = PurePath(result.address.partition(":")[2]).with_suffix("")
            below = fleet.directory is not None and path.is_relative_to(fleet.directory)
            return str(path.relative_to(fleet.directory) if below and fleet.directory else path)
        return self._names[result.address]

    async def _take_events(self, events: FleetEvents) -> None:
        """Tell what happens to the VMs."""
        async for each in events:
            found = self._found.get(each.address)
            hosted = None if found is None else self.vms.get(found.name)
            if hosted is None or not self._policy.covers(hosted.key.vm):
                continue
            layout = None if hosted.vm is None else hosted.vm.layout
            said = event_json(each.event) | ({} if layout is None else state_json(layout))
            self._outbox.happened(hosted.key, said.pop("event"), said)
            if isinstance(each.event, Disconnected):
                self._place(each.address, _Found(hosted.key.vm, None, MonitorLostError(_ENDED)))
                self._look_now.set()
            else:
                hosted.changed()

    # Wishes.

    async def _take_wishes(self, wishes: Bucket, whose: str) -> None:
        """Pass on what is wished, each to who keeps the wishes of its VM."""
        async for entry in wishes.watch(whose, deleted=True):
            if entry is None:
                self._withdraw_deleted(wishes)
                self._wishes_known.set()
                continue
            if self._stop.is_set():
                continue
            try:
                name = VmKey.parse(entry.key).vm
            except ValueError:
                _log.warning("%s: %s is no VM's key", self._host, entry.key)
                continue
            if entry.value is not None or name in self._keepers:
                self._keeper(name, wishes).take(entry)
            elif name in self.vms:  # it was deleted before it was seen
                self.vms[name].take_deletion(entry.revision)

    def _withdraw_deleted(self, wishes: Bucket) -> None:
        """Answer the wishes that were deleted while there was no agent, and of which an earlier one had told."""
        for name, hosted in self.vms.items():
            if name not in self._keepers and hosted.answer is not None and not hosted.answer.phase.is_over:
                self._keeper(name, wishes).take(Entry(hosted.key.key, None, hosted.deleted, self._bus.now()))

    def _keeper(self, name: str, wishes: Bucket) -> WishKeeper:
        if name not in self._keepers:
            duty = Duty(
                self._bus, wishes, self._id, self._policy, self._outbox, lambda: self._may_begin, self._board.told
            )
            self._keepers[name] = WishKeeper(self._hosted(name), duty)
            serving = asyncio.ensure_future(self._keepers[name].run())
            self._serving.add(serving)
            serving.add_done_callback(self._serving.discard)
        return self._keepers[name]


class _Found(NamedTuple):
    """What is at an address: a VM of which name, and whether it could be attached."""

    name: str
    vm: VcpuController | None
    error: BaseException | None


async def _refresh(some: list[HostedVm]) -> None:
    """Read these VMs again; who cannot be read is looked for later."""
    await asyncio.gather(*(hosted.vm.refresh() for hosted in some if hosted.vm is not None), return_exceptions=True)
