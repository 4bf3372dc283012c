"""Fleet: VMs that come and go, and work on each of them."""

import asyncio
import logging
import os
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, Unpack

from qmpvcpu.errors import InvalidMapError, MonitorConnectError, MonitorLostError, SameVmError, printable
from qmpvcpu.fleet.merged import FleetEvents
from qmpvcpu.fleet.results import Admission, Results, VmResult
from qmpvcpu.fleet.scan import agent_socket, check_agent_pattern, find_sockets, socket_id
from qmpvcpu.given import at_least, checked
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import ChangeOptions, CheckedOptions
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.qmp.address import Address
from qmpvcpu.vm.attaching import attach
from qmpvcpu.vm.controller import VcpuController

_T = TypeVar("_T")
_Location = str | os.PathLike[str] | tuple[str, int]

_log = logging.getLogger("qmpvcpu.fleet")


class Rescan(NamedTuple):
    """What another look into the directory found.

    Attributes:
        came: Addresses of sockets that are new.
        went: Addresses of those whose socket and connection are both gone.
    """

    came: tuple[str, ...]
    went: tuple[str, ...]


class _Member:
    """One address, and the VM behind it while it is attached."""

    def __init__(self, target: _Location, address: str, path: str | None, *, scanned: bool) -> None:
        self.target = target
        self.address = address
        self.path = path
        self.scanned = scanned
        self.name = ""
        self.vm: VcpuController | None = None
        self.same_as: _Member | None = None
        self.attaching = asyncio.Lock()

    @property
    def is_extra(self) -> bool:
        """True for another way to a VM that the fleet has: a directory has each VM once."""
        return self.scanned and self.same_as is not None

    async def living(self) -> VcpuController | None:
        """Return the VM if it is attached, and its connection is there; asks nothing of QEMU."""
        if self.vm is not None:
            try:
                await self.vm.wait_for(lambda _: True)
            except MonitorLostError:
                return None
        return self.vm

    def holds(self, key: object) -> bool:
        """Return True if *key* is that of its socket, or of its VM: inodes and thread ids are used again."""
        return key == (self.path and socket_id(self.path)) or (self.vm is not None and key in _identities(self.vm))


class Fleet:
    """Many VMs on one event loop, as one async context: ``async with Fleet(directory="/run/vms") as fleet:``.

    Work on the fleet (``attach``, ``refresh``, ``set_map``, ``set_count``, ``each``) is begun on each VM as soon as
    there is a place for it, and has one result a VM, as they come: see Results. A VM is attached when there is work
    for it, and stays so; one that could not be reached, or was lost, is tried anew by the next work. One VM's
    failure, silence or flood of events is its own: its error is in its result, and it takes no other's time.

    Any number of tasks may call it at once; each VM takes its callers as VcpuController says. Leaving the context
    cancels what runs and lets go of all VMs, which go on. Cancelling a method stops what its own docstring says.

    Args:
        addresses: UNIX paths, ``"unix:PATH"``, ``"tcp:HOST:PORT"`` or ``(host, port)``. Each has a result, even
            one that leads nowhere, or to a VM that another one leads to.
        directory: Where else to look for sockets: when entered, and at each ``rescan``. There each VM is found once,
            even if several links lead to its socket, or its QEMU has several sockets; other files are passed over.
        pattern: Which paths below *directory*, as in ``pathlib.Path.glob``: ``"*.qmp"``, ``"*/qmp.sock"``.
        concurrency: How many VMs are begun at a time. One that takes longer than a tenth of a second makes room for
            the next, so that silent VMs do not hold up the others.
        reply_timeout: Deadline of connecting, and of each QMP command, of each VM, in seconds from its own beginning.
        record: Returns, for an address and what QEMU tells of its VM, the path of the domain XML that is to follow
            the VM, or None for none. Each VM is attached twice then: its name is known only after the first time.
        agent: Where the guest's agent of each VM is, for ``vm.guest``, proofs and ``offline_first``: a pattern of
            paths, in which ``{dir}``, ``{stem}`` and ``{name}`` stand for the directory of the VM's QMP socket, and
            for the socket's name without and with its suffix, such as ``"{dir}/{stem}.agent"``; a VM at a TCP
            address has none then. Or a function that returns its address for that of a VM, or None for none. Sockets
            of agents in *directory* are no VMs.
        read_only: As in ``attach``, of all records.
        resync_interval: As in ``attach``.

    Raises:
        ValueError: *concurrency* is not at least 1, or *pattern* or *agent* is no pattern.
        TypeError: An address is none of these.

    Example:
        >>> async with Fleet(directory="/run/vms", pattern="*.qmp") as fleet:
        ...     async for result in fleet.set_map("0-3", timeout=10):
        ...         print(result.name, result.error or result.unwrap().layout.enabled)
        vm 0-3
    """

    @checked
    def __init__(
        self,
        addresses: Iterable[_Location] = (),
        *,
        directory: str | os.PathLike[str] | None = None,
        pattern: str = "*",
        concurrency: int = 16,
        reply_timeout: float = 10.0,
        record: Callable[[str, VmInfo], str | os.PathLike[str] | None] | None = None,
        agent: str | Callable[[str], _Location | None] | None = None,
        read_only: bool = False,
        resync_interval: float | None = 30.0,
    ) -> None:
        if isinstance(addresses, str | os.PathLike):
            raise TypeError("addresses are many: give a list of them, or directory=")
        if not pattern or PurePath(pattern).is_absolute():
            raise ValueError(f"a pattern is a relative path such as *.qmp, not {pattern!r}")
        if isinstance(agent, str):
            check_agent_pattern(agent)
        self._agent = agent
        self._directory = None if directory is None else Path(directory)
        self._pattern = pattern
        self._reply_timeout = reply_timeout
        self._record = record
        self._read_only = read_only
        self._resync_interval = resync_interval
        self._admission = Admission(at_least("concurrency", concurrency, 1))
        self._members: dict[str, _Member] = {}
        self._holders: dict[object, _Member] = {}  # by socket and by VM: one member has each
        self._working: set[asyncio.Task[Any]] = set()
        self._letting_go: set[asyncio.Task[None]] = set()
        self._events: weakref.WeakSet[FleetEvents] = weakref.WeakSet()
        self._closed = False
        for target in addresses:
            self._add(target)

    async def __aenter__(self) -> Self:
        if self._directory is not None:
            await self.rescan()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # Who is in it.

    @property
    def addresses(self) -> tuple[str, ...]:
        """All addresses, attached or not: those that were given, then those that were found, as found.

        One that was found is left out once it has turned out to lead to a VM of another address.
        """
        return tuple(self._to_work_on())

    @property
    def directory(self) -> Path | None:
        """Where it looks for sockets; None: nowhere."""
        return self._directory

    @property
    def vms(self) -> Mapping[str, VcpuController]:
        """The VMs that are attached now, by address; one whose connection is lost is in it until its next work."""
        return {address: member.vm for address, member in self._members.items() if member.vm is not None}

    async def rescan(self) -> Rescan:
        """Look into the directory again; new sockets are in the fleet from now on, and none is connected to.

        A VM leaves when its socket is gone and its connection too; while that lives, so does the VM. What was begun
        goes on. Cancelling it changes nothing.

        Raises:
            SocketDirectoryError: The directory cannot be read; the fleet stays as it was.
            ValueError: There is none to look into.
        """
        if self._directory is None:
            raise ValueError("this fleet has no directory to look into")
        found = await asyncio.to_thread(find_sockets, self._directory, self._pattern)
        for agent in self._agents_of(found):
            found.pop(agent, None)
        gone = [
            member
            for member in tuple(self._members.values())  # another call may change them during the await
            if member.scanned and Path(member.path or "") not in found and await member.living() is None
        ]
        for member in gone:
            self._members.pop(member.address, None)
            self._start(self._let_go(member), self._letting_go)
        self._forget(gone)
        known = {socket_id(member.path) for member in self._members.values() if member.path is not None}
        came = []
        for path, socket in found.items():
            if f"unix:{path}" not in self._members and socket not in known:
                known.add(socket)
                came.append(self._add(path, scanned=True).address)
        return Rescan(tuple(came), tuple(member.address for member in gone))

    # Work.

    def attach(self) -> Results[VcpuController]:
        """Attach to every VM that is not attached; the others are not asked."""
        return self.each(_itself)

    def refresh(self) -> Results[Layout]:
        """Read every VM again."""
        return self.each(VcpuController.refresh)

    def set_map(self, target: str | Iterable[int], **options: Unpack[ChangeOptions]) -> Results[TransitionReport]:
        """Make exactly these vCPUs plugged on every VM, as ``VcpuController.set_map`` does, each for itself.

        What one VM does not reach is the error of its result, with its report; nothing is undone on the others.

        Raises:
            InvalidMapError: *target* is empty, or no set of vCPU ids; no VM was asked.
        """
        wanted = VcpuMap.parse(target) if isinstance(target, str) else VcpuMap(target)
        if not wanted:
            raise InvalidMapError(target if isinstance(target, str) else "", "it is empty, and vCPU 0 never leaves")
        CheckedOptions.of(options)
        return self.each(lambda vm: vm.set_map(wanted, **options))

    @checked
    def set_count(
        self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]
    ) -> Results[TransitionReport]:
        """Make so many vCPUs plugged on every VM, as ``VcpuController.set_count`` does, each for itself."""
        CheckedOptions.of(options)
        return self.each(lambda vm: vm.set_count(count, include_boot=include_boot, **options))

    def each(self, work: Callable[[VcpuController], Awaitable[_T]]) -> Results[_T]:
        """Do *work* on every VM that is in the fleet now, and return the results as they come.

        Whatever it raises is that VM's error. It has no deadline but its own: ``async with asyncio.timeout(...)``.

        Raises:
            RuntimeError: The fleet is closed.
        """
        if self._closed:
            raise RuntimeError("this fleet is closed")
        for member in self._members.values():
            if member.same_as is not None and member.same_as.vm is None:
                member.same_as = None  # this may be the way to the VM now
        members = self._to_work_on()

        async def one(address: str, results: Results[_T]) -> VmResult[_T] | None:
            return await self._work(members[address], work, results)

        return Results(members, one, self._admission, lambda work: self._start(work, self._working))

    def events(self) -> FleetEvents:
        """Return the events of all VMs from now on, each with whose it is; see FleetEvents."""
        events = FleetEvents()
        for member in self._members.values():
            if member.vm is not None:
                events.add(member.address, member.name, member.vm.events())
        if self._closed:
            events.close()
        self._events.add(events)
        return events

    async def close(self) -> None:
        """Cancel what runs and let go of all VMs, all at once; idempotent.

        Each VM gets what ``VcpuController.close`` gives it: a second for commands in flight. Cancelling it stops the
        waiting, not the closing.
        """
        self._closed = True
        for task in self._working:
            task.cancel()
        for member in self._members.values():
            self._start(self._let_go(member), self._letting_go)
        try:
            while tasks := self._working | self._letting_go:
                await asyncio.wait(tasks)
        finally:
            for events in self._events:
                events.close()

    # How it is done.

    def _to_work_on(self) -> dict[str, _Member]:
        return {address: member for address, member in self._members.items() if not member.is_extra}

    def _add(self, target: _Location, *, scanned: bool = False) -> _Member:
        path = None
        try:
            where = Address.parse(target)
        except MonitorConnectError as error:  # attaching will say so again, as this VM's own error
            address = error.address
        else:
            address, path = str(where), where.path
        return self._members.setdefault(address, _Member(target, address, path, scanned=scanned))

    def _agents_of(self, sockets: Iterable[Path]) -> set[Path]:
        """Return where the agents of the VMs at *sockets* are, if they are at paths."""
        agents = ((socket, self._agent_of(f"unix:{socket}", str(socket))) for socket in sockets)
        paths = ((socket, Path(agent)) for socket, agent in agents if isinstance(agent, str | os.PathLike))
        return {path for socket, path in paths if path != socket}

    def _agent_of(self, address: str, path: str | None) -> _Location | None:
        """Return where the agent of the VM at *address* is, whose QMP socket is at *path*; None: it has none."""
        if isinstance(self._agent, str):
            return None if path is None else agent_socket(self._agent, Path(path))
        return None if self._agent is None else self._agent(address)

    def _start(self, work: Coroutine[Any, Any, _T], among: "set[asyncio.Task[_T]]") -> "asyncio.Task[_T]":
        task = asyncio.get_running_loop().create_task(work)
        among.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(among.discard)
        return task

    async def _work(
        self, member: _Member, work: Callable[[VcpuController], Awaitable[_T]], results: Results[_T]
    ) -> VmResult[_T] | None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        value: _T | None = None
        error: BaseException | None = None
        try:
            vm = await self._attached(member)
            if results.stopped:
                return None
            value = await work(vm)
        except asyncio.CancelledError as err:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            error = err  # the work's own doing
        except Exception as err:  # noqa: BLE001 - JUSTIFICATION: the work is the caller's code, and so is its error
            if member.is_extra:
                return None
            error = err
        layout = None if member.vm is None else member.vm.layout
        return VmResult(member.address, member.name, layout, value, error, loop.time() - started)

    async def _attached(self, member: _Member) -> VcpuController:
        """Return the VM of *member*, attached if it is not."""
        async with member.attaching:
            if (vm := await member.living()) is not None:
                return vm
            if self._members.get(member.address) is not member:
                raise MonitorConnectError(member.address, "it has left this fleet: its socket was gone")
            if member.vm is not None:
                lost, member.vm = member.vm, None
                self._forget([member])
                await self._close(lost)
            # A socket serves one client: of two ways to it the second would wait for the first.
            socket = None if member.path is None else socket_id(member.path)
            if socket is not None and (holder := self._holder(socket, member)) is not member:
                member.same_as = holder
                raise SameVmError(member.address, holder.address, same_socket=True)
            vm = await self._attach(member)
            # A QEMU may have two sockets. Asked on both, a guest would have each removal twice.
            for mine in _identities(vm):
                if (holder := self._holder(mine, member)) is not member and _may_be_one(vm, holder.vm):
                    await self._close(vm)
                    member.same_as = holder
                    raise SameVmError(member.address, holder.address, same_socket=False)
            if self._record is not None and (record := self._record(member.address, vm.layout.vm)) is not None:
                # Not sooner: of two ways to a VM one would make a record of its own, or find the other's locked.
                member.vm = vm  # so that it has the VM meanwhile
                try:
                    await self._close(vm)
                    vm = await self._attach(member, record)
                finally:
                    member.vm = None
            member.vm, member.name = vm, self._name_of(member, vm)
            for events in self._events:
                events.add(member.address, member.name, vm.events())
            return vm

    async def _attach(self, member: _Member, record: str | os.PathLike[str] | None = None) -> VcpuController:
        return await attach(
            member.target,
            record=record,
            reply_timeout=self._reply_timeout,
            resync_interval=self._resync_interval,
            read_only=self._read_only and record is not None,
            agent=self._agent_of(member.address, member.path),
        )

    def _name_of(self, member: _Member, vm: VcpuController) -> str:
        """Return the name that *vm* was given; else as much of its address as tells it from the others."""
        if vm.layout.vm.named:
            return vm.layout.vm.name
        others = [each for each in self._members.values() if each is not member]
        parts = _parts(member)
        for count in range(1, len(parts)):
            label = "/".join(parts[-count:])
            if not any(label in (each.name, "/".join(_parts(each)[-count:])) for each in others):
                return label
        return member.path or parts[0]

    def _holder(self, key: object, member: _Member) -> _Member:
        """Return who has what *key* tells from others: another member, or else, from now on, *member*."""
        holder = self._holders.get(key)
        if holder is None or not holder.holds(key):
            self._holders[key] = holder = member
        return holder

    def _forget(self, members: Collection[_Member]) -> None:
        """Have *members* hold nothing any more."""
        self._holders = {key: holder for key, holder in self._holders.items() if holder not in members}
        for member in self._members.values():
            if member.same_as in members:
                member.same_as = None

    async def _let_go(self, member: _Member) -> None:
        async with member.attaching:
            vm, member.vm = member.vm, None
        if vm is not None:
            await self._close(vm)

    async def _close(self, vm: VcpuController) -> None:
        """Close *vm*, also if its caller is cancelled meanwhile."""
        await asyncio.wait({self._start(_closed(vm), self._letting_go)})


async def _closed(vm: VcpuController) -> None:
    try:
        await vm.close()
    except Exception:  # noqa: BLE001 - JUSTIFICATION: it is told, and the others are closed all the same
        address = printable(vm.address)
        _log.exception("closing %s failed", address, extra={"vm": address})


async def _itself(vm: VcpuController) -> VcpuController:
    return vm


def _parts(member: _Member) -> tuple[str, ...]:
    """Return what a member's address is made of, without the suffix of a socket's file name."""
    if member.path is None:
        return (member.address.partition(":")[2] or member.address,)
    return PurePath(member.path).with_suffix("").parts


def _identities(vm: VcpuController) -> list[object]:
    """Return what tells this QEMU from others; nothing where that cannot be known."""
    tid = vm.layout[0].host_tid if vm.layout.max else None
    if tid is None:
        return []
    uuid = vm.layout.vm.uuid
    # A launcher may listen for many, and in a PID namespace of its own a QEMU may have any thread id.
    local = [] if vm.peer_pid is None else [(vm.peer_pid, tid, uuid)]
    # Over TCP nobody tells whose process it is.
    return [*local] if uuid is None else [*local, (tid, uuid)]


def _may_be_one(vm: VcpuController, other: VcpuController | None) -> bool:
    """Return False for VMs that are known to be of two processes, even if all else is the same."""
    pids = {vm.peer_pid, other and other.peer_pid}
    return None in pids or len(pids) == 1
