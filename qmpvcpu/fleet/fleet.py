"""Fleet: VMs that come and go, and work on each of them."""

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack, overload

from qmpvcpu.bus.address import ServerAddress
from qmpvcpu.errors import InvalidMapError
from qmpvcpu.fleet.local import LocalVms, Location
from qmpvcpu.fleet.merged import FleetEvents
from qmpvcpu.fleet.results import Admission, Results, VmResult
from qmpvcpu.fleet.transport import FleetVm, Member, Rescan, Transport
from qmpvcpu.given import at_least, checked
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import ChangeOptions
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.vm.controller import VcpuController

if TYPE_CHECKING:
    from qmpvcpu.model.statistics import VmStatistics
    from qmpvcpu.planning.plan import Plan

_T = TypeVar("_T")
_Vm = TypeVar("_Vm")

_SERVERS: Final = ("nats://", "tls://")


class Fleet:
    """Many VMs on one event loop, as one async context: ``async with Fleet(directory="/run/vms") as fleet:``.

    They are VMs of this host, or with ``Fleet("nats://server:4222", where="host=rack1-* name=web-*")`` of many hosts,
    each of which runs an agent (``qmpvcpu agent``).

    Work on the fleet (``attach``, ``refresh``, ``plan``, ``set_map``, ``each``, ...) begins on each VM as soon as
    *concurrency* allows, and yields one result for each VM, as they come: see Results. A VM is attached when there is
    work for it, and stays attached; if it could not be reached, or was lost, the next work tries again. A VM that
    fails, is silent or floods its stream of events does not affect the others: its error is in its own result.

    Any number of tasks may call it at once; each VM takes its callers as VcpuController says. Leaving the context
    cancels what runs and lets go of all VMs, which go on. Cancelling a method stops what its own docstring says.

    On other hosts a VM's address is ``HOST/NAME``. ``refresh`` sends each host's agent one request. ``set_map`` and
    ``set_count`` write a wish for each VM, which its agent carries out at most once, whatever happens to this
    program. Cancelling them withdraws the wishes that were not begun, and stops the others at their next safe point.
    ``events`` yields what agents report. Functions cannot be sent: ``each``, ``attach`` and ``vms`` raise TypeError.
    A wish that is not begun within *reply_timeout*, since its host or its VM is away, is withdrawn.

    Args:
        server: The server that other hosts meet at: ``"nats://HOST:PORT"``, ``"tls://HOST:PORT"``, or several servers
            of a cluster with commas between them. To log in there, a ``qmpvcpu.bus.ServerAddress``, which names the
            files for it.
        where: Which VMs of which hosts: ``host=PATTERN``, ``name=PATTERN``, ``uuid=PATTERN``, with ``*``, ``?`` and
            ``[...]``; a VM must match all that are given. Empty: every VM. They are chosen on entering, and at each
            ``rescan``.
        who: Who asks, for the audit and the server's permissions; None: the user's name.
        why: The reason, for the audit.
        drop_after: How many seconds a wish may take, counted from when the server took it, by the server's clock.
            After that nothing is begun for it.
        addresses: UNIX paths, ``"unix:PATH"``, ``"tcp:HOST:PORT"`` or ``(host, port)``, of VMs of this host. Each has
            a result, even one that leads nowhere, or to a VM that another one leads to.
        directory: Where else to look for sockets: when entered, and at each ``rescan``. There each VM is found once,
            even if several links lead to its socket, or its QEMU has several sockets; other files are passed over.
        pattern: Which paths below *directory*, as in ``pathlib.Path.glob``: ``"*.qmp"``, ``"*/qmp.sock"``.
        concurrency: How many VMs are begun at a time; None: 16, and 64 on other hosts, where agents do the work. One
            that takes longer than a tenth of a second makes room for the next, so that silent VMs do not hold up the
            others.
        reply_timeout: Deadline of connecting, and of each QMP command, of each VM, in seconds from its own beginning.
            With a server: of connecting to it, and how long a host or a VM may be away.
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
        ValueError: *concurrency* is not at least 1, or *pattern*, *agent*, *where*, *drop_after* or the server's
            address cannot be one.
        TypeError: An address is none of these, or an option does not go with where the VMs are.

    Example:
        >>> async with Fleet(directory="/run/vms", pattern="*.qmp") as fleet:
        ...     async for result in fleet.set_map("0-3", timeout=10):
        ...         print(result.name, result.error or result.unwrap().layout.enabled)
        vm 0-3
    """

    @overload
    def __init__(
        self,
        server: str | ServerAddress,
        /,
        *,
        where: str = "",
        concurrency: int | None = None,
        reply_timeout: float = 10.0,
        who: str | None = None,
        why: str = "",
        drop_after: float = 600.0,
    ) -> None: ...

    @overload
    def __init__(
        self,
        addresses: Iterable[Location] = (),
        /,
        *,
        directory: str | os.PathLike[str] | None = None,
        pattern: str = "*",
        concurrency: int | None = None,
        reply_timeout: float = 10.0,
        record: Callable[[str, VmInfo], str | os.PathLike[str] | None] | None = None,
        agent: str | Callable[[str], Location | None] | None = None,
        read_only: bool = False,
        resync_interval: float | None = 30.0,
    ) -> None: ...

    def __init__(
        self,
        vms: Iterable[Location] | str | ServerAddress = (),
        /,
        *,
        concurrency: int | None = None,
        **options: Any,
    ) -> None:
        self._here: LocalVms | None = None
        self._transport: Transport
        if isinstance(vms, ServerAddress) or (isinstance(vms, str) and vms.startswith(_SERVERS)):
            from qmpvcpu.fleet.remote import RemoteVms  # not at the top: most fleets are of one host

            _check_names(RemoteVms, options, "a fleet of other hosts, whose agents attach the VMs")
            self._transport = RemoteVms(vms, **options)
        elif isinstance(vms, str | os.PathLike):
            raise TypeError("addresses are many: give a list of them, or directory=; or a server, nats://HOST:PORT")
        else:
            _check_names(LocalVms, options, "a fleet of this host: no server is given")
            self._transport = self._here = LocalVms(vms, **options)
        begun = self._transport.concurrency if concurrency is None else concurrency
        self._admission = Admission(at_least("concurrency", begun, 1))
        self._running: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._entered = False

    async def __aenter__(self) -> Self:
        if self._entered or self._closing is not None:
            raise RuntimeError("a fleet is entered once: make another")
        await self._transport.open()
        self._entered = True
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
        return self._transport.addresses

    @property
    def is_local(self) -> bool:
        """True if its VMs are of this host, False if they are of others."""
        return self._here is not None

    @property
    def directory(self) -> Path | None:
        """Where it looks for sockets; None: nowhere."""
        return None if self._here is None else self._here.directory

    @property
    def drifted(self) -> Mapping[str, VcpuMap]:
        """The vCPUs that were wished of VMs, and reached, and that somebody has changed by hand since; by address.

        Only VMs of other hosts have wishes: of this host it is empty.
        """
        return self._transport.drifted()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """The layouts as known now, by address, of the VMs that are reached: attached, by this or by their agents.

        Nobody is asked for them. VMs whose host has no agent now are left out.
        """
        return self._transport.layouts()

    @property
    def vms(self) -> Mapping[str, VcpuController]:
        """The VMs that are attached now, by address; one whose connection is lost is in it until its next work.

        Raises:
            TypeError: They are VMs of other hosts, which their agents attach.
        """
        return self._local("vms: agents attach them; refresh() has their layouts").vms

    async def rescan(self) -> Rescan:
        """Look into the directory again; new sockets are in the fleet from now on, and none is connected to.

        A VM leaves when its socket is gone and its connection too; while that lives, so does the VM. What was begun
        goes on. Cancelling it changes nothing. On other hosts it chooses again among the VMs that agents report.

        Raises:
            SocketDirectoryError: The directory cannot be read; the fleet stays as it was.
            ValueError: There is none to look into.
            SameNameError: VMs of two hosts have a name that was chosen without a host.
            RuntimeError: The fleet is closed, or its VMs are of other hosts and it was not entered.
        """
        self._check_open()
        return await self._transport.rescan()

    # Work.

    def attach(self) -> Results[VcpuController]:
        """Attach to every VM that is not attached; the others are not asked.

        Raises:
            TypeError: They are VMs of other hosts, which their agents attach.
        """
        return self._each(self._local("attach: agents attach them; refresh() has their layouts").members(), _itself)

    def refresh(self) -> Results[Layout]:
        """Read every VM again."""
        return self._each(self._transport.members(), lambda vm: vm.refresh())

    def statistics(self, *, kvm: Collection[str] | None = None) -> "Results[VmStatistics]":
        """Read what the vCPUs of every VM have done, as ``VcpuController.statistics`` does."""
        return self._each(self._transport.members(), lambda vm: vm.statistics(kvm=kvm))

    def plan(self, target: str | Iterable[int], **options: Unpack[ChangeOptions]) -> "Results[Plan]":
        """Return what ``set_map`` would do on every VM; nothing is sent to any QEMU, but attaching where it is not.

        Raises:
            InvalidMapError: *target* is empty, or no set of vCPU ids; no VM was asked.
        """
        wanted = _wanted(target)
        self._transport.check_options(options)
        return self._each(self._transport.members(), lambda vm: _now(vm.plan(wanted, **options)))

    @checked
    def plan_count(
        self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]
    ) -> "Results[Plan]":
        """Return what ``set_count`` would do on every VM; nothing is sent to any QEMU."""
        self._transport.check_options(options)

        def plan(vm: FleetVm) -> "Awaitable[Plan]":
            return _now(vm.plan_count(count, include_boot=include_boot, **options))

        return self._each(self._transport.members(), plan)

    def set_map(self, target: str | Iterable[int], **options: Unpack[ChangeOptions]) -> Results[TransitionReport]:
        """Make exactly these vCPUs plugged on every VM, as ``VcpuController.set_map`` does, each for itself.

        What one VM does not reach is the error of its result, with its report; nothing is undone on the others.

        Raises:
            InvalidMapError: *target* is empty, or no set of vCPU ids; no VM was asked.
        """
        wanted = _wanted(target)
        self._transport.check_options(options)
        return self._each(self._transport.members(), lambda vm: vm.set_map(wanted, **options))

    @checked
    def set_count(
        self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]
    ) -> Results[TransitionReport]:
        """Make so many vCPUs plugged on every VM, as ``VcpuController.set_count`` does, each for itself."""
        self._transport.check_options(options)

        def change(vm: FleetVm) -> Awaitable[TransitionReport]:
            return vm.set_count(count, include_boot=include_boot, **options)

        return self._each(self._transport.members(), change)

    def each(self, work: Callable[[VcpuController], Awaitable[_T]]) -> Results[_T]:
        """Do *work* on every VM that is in the fleet now, and return the results as they come.

        Whatever it raises is that VM's error. It has no deadline but its own: ``async with asyncio.timeout(...)``.

        Raises:
            RuntimeError: The fleet is closed.
            TypeError: They are VMs of other hosts: functions cannot be sent.
        """
        return self._each(
            self._local("each: functions do not travel; use refresh, set_map or set_count").members(), work
        )

    def events(self, *, audit: bool = False) -> FleetEvents:
        """Return the events of all VMs from now on, each with whose it is; see FleetEvents.

        If the VMs are of other hosts, *audit* adds ``Asked`` and ``Answered``: who asked their agents to change them,
        and what came of it.

        Raises:
            RuntimeError: They are VMs of other hosts, and the fleet was not entered.
        """
        self._check_entered()
        return self._transport.events(audit=audit)

    async def close(self) -> None:
        """Cancel what runs and let go of all VMs, all at once; idempotent.

        Each VM gets what ``VcpuController.close`` gives it: a second for commands in flight. Cancelling it stops the
        waiting, not the closing.
        """
        for task in self._running:
            task.cancel()
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._transport.close())
        await asyncio.wait({*self._running, self._closing})

    # How it is done.

    def _local(self, instead: str) -> LocalVms:
        if self._here is None:
            raise TypeError(f"these are VMs of other hosts. {instead}")
        return self._here

    def _check_open(self) -> None:
        if self._closing is not None:
            raise RuntimeError("this fleet is closed")
        self._check_entered()

    def _check_entered(self) -> None:
        if self._here is None and not self._entered:
            raise RuntimeError("this fleet is not connected to its server yet: use it inside async with")

    def _each(self, members: Mapping[str, Member[_Vm]], work: Callable[[_Vm], Awaitable[_T]]) -> Results[_T]:
        self._check_open()

        async def one(address: str, results: Results[_T]) -> VmResult[_T] | None:
            return await _work(address, members[address], work, results)

        return Results(members, one, self._admission, self._start)

    def _start(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._running.discard)
        return task


async def _work(
    address: str, member: Member[_Vm], work: Callable[[_Vm], Awaitable[_T]], results: Results[_T]
) -> VmResult[_T] | None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    value: _T | None = None
    error: BaseException | None = None
    try:
        vm = await member.reach()
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
    return VmResult(address, member.name, member.layout, value, error, loop.time() - started)


def _wanted(target: str | Iterable[int]) -> VcpuMap:
    """Return the vCPUs that *target* names.

    Raises:
        InvalidMapError: There are none.
    """
    wanted = VcpuMap.parse(target) if isinstance(target, str) else VcpuMap(target)
    if not wanted:
        raise InvalidMapError(target if isinstance(target, str) else "", "it is empty, and vCPU 0 never leaves")
    return wanted


async def _now(value: _T | Awaitable[_T]) -> _T:
    """Return *value*, whose VM is here, or what it comes to."""
    return await value if isinstance(value, Awaitable) else value


async def _itself(vm: VcpuController) -> VcpuController:
    return vm


def _check_names(transport: type[Transport], options: Mapping[str, object], whose: str) -> None:
    """Raise TypeError if *transport* does not have one of *options*."""
    known = [each.name for each in inspect.signature(transport).parameters.values() if each.kind is each.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"{unknown[0]} is no option of {whose}; it has {', '.join(known)}")
