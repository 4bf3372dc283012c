"""The VMs of this host: found in a directory or given by address, attached when there is work for them."""

import asyncio
import logging
import os
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from qmpvcpu.errors import MonitorConnectError, MonitorLostError, SameVmError, printable
from qmpvcpu.fleet.merged import FleetEvents
from qmpvcpu.fleet.scan import agent_socket, check_agent_pattern, find_sockets, socket_id
from qmpvcpu.fleet.transport import Rescan
from qmpvcpu.given import checked
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import ChangeOptions, CheckedOptions
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.qmp.address import Address
from qmpvcpu.vm.attaching import attach
from qmpvcpu.vm.controller import VcpuController

Location = str | os.PathLike[str] | tuple[str, int]

_log = logging.getLogger("qmpvcpu.fleet")


class LocalMember:
    """One address, and the VM behind it while it is attached."""

    def __init__(self, vms: "LocalVms", target: Location, address: str, path: str | None, *, scanned: bool) -> None:
        self._vms = vms
        self.target = target
        self.address = address
        self.path = path
        self.scanned = scanned
        self.name = ""
        self.vm: VcpuController | None = None
        self.same_as: LocalMember | None = None
        self.attaching = asyncio.Lock()

    @property
    def is_extra(self) -> bool:
        """True for another way to a VM that the fleet has: a directory has each VM once."""
        return self.scanned and self.same_as is not None

    @property
    def layout(self) -> Layout | None:
        """Its layout, as last seen; None while it is not attached."""
        return None if self.vm is None else self.vm.layout

    async def reach(self) -> VcpuController:
        """Return the VM, attached if it is not."""
        return await self._vms.attached(self)

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


class LocalVms:
    """The transport of one host: each VM is attached by this process. Its options are those of ``Fleet``.

    Raises:
        ValueError: *pattern* or *agent* is no pattern.
        TypeError: An address is none.
    """

    concurrency = 16

    @checked
    def __init__(
        self,
        addresses: Iterable[Location],
        *,
        directory: str | os.PathLike[str] | None = None,
        pattern: str = "*",
        reply_timeout: float = 10.0,
        record: Callable[[str, VmInfo], str | os.PathLike[str] | None] | None = None,
        agent: str | Callable[[str], Location | None] | None = None,
        read_only: bool = False,
        resync_interval: float | None = 30.0,
    ) -> None:
        if not pattern or PurePath(pattern).is_absolute():
            raise ValueError(f"a pattern is a relative path such as *.qmp, not {pattern!r}")
        if isinstance(agent, str):
            check_agent_pattern(agent)
        self.directory = None if directory is None else Path(directory)
        self._agent = agent
        self._pattern = pattern
        self._reply_timeout = reply_timeout
        self._record = record
        self._read_only = read_only
        self._resync_interval = resync_interval
        self._members: dict[str, LocalMember] = {}
        self._holders: dict[object, LocalMember] = {}  # by socket and by VM: one member has each
        self._letting_go: set[asyncio.Task[None]] = set()
        self._events: weakref.WeakSet[FleetEvents] = weakref.WeakSet()
        self._closed = False
        for target in addresses:
            self._add(target)

    @property
    def vms(self) -> Mapping[str, VcpuController]:
        """The VMs that are attached now, by address."""
        return {address: member.vm for address, member in self._members.items() if member.vm is not None}

    @property
    def addresses(self) -> tuple[str, ...]:
        """All addresses but those that were found to lead to a VM of another."""
        return tuple(address for address, member in self._members.items() if not member.is_extra)

    def members(self) -> Mapping[str, LocalMember]:
        """Return whom to work on now; one that led to a VM of another is in it if that is not attached any more."""
        for member in self._members.values():
            if member.same_as is not None and member.same_as.vm is None:
                member.same_as = None  # this may be the way to the VM now
        return {address: self._members[address] for address in self.addresses}

    def drifted(self) -> Mapping[str, VcpuMap]:
        """Return nothing: only other hosts' VMs have wishes."""
        return {}

    def layouts(self) -> Mapping[str, Layout]:
        """Return the layouts of the VMs that are attached."""
        return {address: vm.layout for address, vm in self.vms.items()}

    def check_options(self, options: ChangeOptions) -> None:
        """Raise TypeError or ValueError if these are no options of a change."""
        CheckedOptions.of(options)

    async def open(self) -> None:
        """Look into the directory, if there is one."""
        if self.directory is not None:
            await self.rescan()

    async def rescan(self) -> Rescan:
        """Look into the directory again.

        Raises:
            SocketDirectoryError: The directory cannot be read.
            ValueError: There is none to look into.
        """
        if self.directory is None:
            raise ValueError("this fleet has no directory to look into")
        found = await asyncio.to_thread(find_sockets, self.directory, self._pattern)
        for agent in self._agents_of(found):
            found.pop(agent, None)
        gone = [
            member
            for member in tuple(self._members.values())  # another call may change them during the await
            if member.scanned and Path(member.path or "") not in found and await member.living() is None
        ]
        for member in gone:
            self._members.pop(member.address, None)
            self._start(self._let_go(member))
        self._forget(gone)
        known = {socket_id(member.path) for member in self._members.values() if member.path is not None}
        came = []
        for path, socket in found.items():
            if f"unix:{path}" not in self._members and socket not in known:
                known.add(socket)
                came.append(self._add(path, scanned=True).address)
        return Rescan(tuple(came), tuple(member.address for member in gone))

    def events(self, *, audit: bool) -> FleetEvents:  # noqa: ARG002 - VMs of this host have no agents to be asked
        """Return the events of all VMs from now on."""
        events = FleetEvents()
        for member in self._members.values():
            if member.vm is not None:
                events.add(member.address, member.name, member.vm.events(), member.vm)
        if self._closed:
            events.close()
        self._events.add(events)
        return events

    async def close(self) -> None:
        """Let go of all VMs, all at once; idempotent."""
        self._closed = True
        for member in self._members.values():
            self._start(self._let_go(member))
        while self._letting_go:
            await asyncio.wait(self._letting_go)
        for events in self._events:
            events.close()

    def _add(self, target: Location, *, scanned: bool = False) -> LocalMember:
        path = None
        try:
            where = Address.parse(target)
        except MonitorConnectError as error:  # attaching will say so again, as this VM's own error
            address = error.address
        else:
            address, path = str(where), where.path
        return self._members.setdefault(address, LocalMember(self, target, address, path, scanned=scanned))

    def _agents_of(self, sockets: Iterable[Path]) -> set[Path]:
        """Return where the agents of the VMs at *sockets* are, if they are at paths."""
        agents = ((socket, self._agent_of(f"unix:{socket}", str(socket))) for socket in sockets)
        paths = ((socket, Path(agent)) for socket, agent in agents if isinstance(agent, str | os.PathLike))
        return {path for socket, path in paths if path != socket}

    def _agent_of(self, address: str, path: str | None) -> Location | None:
        """Return where the agent of the VM at *address* is, whose QMP socket is at *path*; None: it has none."""
        if isinstance(self._agent, str):
            return None if path is None else agent_socket(self._agent, Path(path))
        return None if self._agent is None else self._agent(address)

    def _start(self, closing: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(closing)
        self._letting_go.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._letting_go.discard)
        return task

    async def attached(self, member: LocalMember) -> VcpuController:
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
                events.add(member.address, member.name, vm.events(), vm)
            return vm

    async def _attach(self, member: LocalMember, record: str | os.PathLike[str] | None = None) -> VcpuController:
        return await attach(
            member.target,
            record=record,
            reply_timeout=self._reply_timeout,
            resync_interval=self._resync_interval,
            read_only=self._read_only and record is not None,
            agent=self._agent_of(member.address, member.path),
        )

    def _name_of(self, member: LocalMember, vm: VcpuController) -> str:
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

    def _holder(self, key: object, member: LocalMember) -> LocalMember:
        """Return who has what *key* tells from others: another member, or else, from now on, *member*."""
        holder = self._holders.get(key)
        if holder is None or not holder.holds(key):
            self._holders[key] = holder = member
        return holder

    def _forget(self, members: Collection[LocalMember]) -> None:
        """Have *members* hold nothing any more."""
        self._holders = {key: holder for key, holder in self._holders.items() if holder not in members}
        for member in self._members.values():
            if member.same_as in members:
                member.same_as = None

    async def _let_go(self, member: LocalMember) -> None:
        async with member.attaching:
            vm, member.vm = member.vm, None
        if vm is not None:
            await self._close(vm)

    async def _close(self, vm: VcpuController) -> None:
        """Close *vm*, also if its caller is cancelled meanwhile."""
        await asyncio.wait({self._start(_closed(vm))})


async def _closed(vm: VcpuController) -> None:
    try:
        await vm.close()
    except Exception:  # noqa: BLE001 - JUSTIFICATION: it is told, and the others are closed all the same
        address = printable(vm.address)
        _log.exception("closing %s failed", address, extra={"vm": address})


def _parts(member: LocalMember) -> tuple[str, ...]:
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
