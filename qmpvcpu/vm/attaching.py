"""attach(): from any kind of QMP address to a VcpuController."""

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.intents import Intentions
from qmpvcpu.engine.messages import GuestIs, GuestTold, Refresh
from qmpvcpu.engine.vmstate import VmState
from qmpvcpu.errors import MonitorError, RecordError, printable, shorten
from qmpvcpu.given import checked, path
from qmpvcpu.model.options import Recovery, over_kept, read_placement
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import VmInfo, VmStatus
from qmpvcpu.qapi import runs_single_threaded
from qmpvcpu.qmp.monitor import Monitor, Target, is_address
from qmpvcpu.qmp.queries import Reading, layout_of
from qmpvcpu.vm.connection import Connection, Finder, called
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.driver import Driver
from qmpvcpu.vm.guest import Guest
from qmpvcpu.vm.record_writer import RecordWriter

if TYPE_CHECKING:
    from qmpvcpu.domainxml import Instance
    from qmpvcpu.model.placement import PlacementWish
    from qmpvcpu.record.record import Record
    from qmpvcpu.traces import Traces
    from qmpvcpu.vm.next_boot import NextBoot

_log = logging.getLogger("qmpvcpu.vm")

_P = ParamSpec("_P")
_Path = str | os.PathLike[str]


class Attaching:
    """What ``attach`` returns: to be awaited, or entered with ``async with``; once."""

    def __init__(self, open_: Callable[[], Awaitable[VcpuController]]) -> None:
        self._open = open_
        self._vm: VcpuController | None = None

    def __await__(self) -> Generator[Any, None, VcpuController]:
        return self._open().__await__()

    async def __aenter__(self) -> VcpuController:
        self._vm = await self._open()
        return self._vm

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._vm is not None:
            await self._vm.close()

    if not TYPE_CHECKING:  # a type checker finds it by itself

        def __getattr__(self, name: str) -> NoReturn:
            advice = "vm = await attach(...), or async with attach(...) as vm"
            raise AttributeError(f"attach() was not awaited, so there is no {name!r} yet: {advice}")


def _to_await_or_enter(open_: Callable[_P, Awaitable[VcpuController]]) -> Callable[_P, Attaching]:
    @functools.wraps(open_)
    def begin(*args: _P.args, **given: _P.kwargs) -> Attaching:
        return Attaching(functools.partial(open_, *args, **given))

    shown = inspect.signature(open_).replace(return_annotation=Attaching)
    begin.__signature__ = shown  # type: ignore[attr-defined]  # for help() and the reference: it is that of open_
    return begin


@checked
@_to_await_or_enter
async def attach(
    target: Target,
    *,
    name: str | None = None,
    record: str | os.PathLike[str] | None = None,
    base: bytes | str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    reply_timeout: float = 10.0,
    reconnect: bool = False,
    on_interrupted: Recovery = Recovery.REPORT,
    resync_interval: float | None = 30.0,
    arrived: bool = False,
    read_only: bool = False,
    agent: Target | None = None,
    placement: "PlacementWish | None" = None,
) -> VcpuController:
    """Attach to a running QEMU.

    Use as ``async with attach(...) as vm:`` or ``vm = await attach(...)`` and ``await vm.close()``. Reads the VM
    once (a constant number of queries), changes nothing. Cancelling it leaves nothing behind.

    A QMPClient of the caller's is borrowed: a listener is added and removed again, its own ``events`` queue and its
    runstate are left alone, and it is never disconnected.

    Args:
        target: Path of a UNIX socket, ``"unix:PATH"``, ``"tcp:HOST:PORT"``, ``(host, port)``, a connected
            ``socket.socket``, or a running ``qemu.qmp.QMPClient``. Text may be as QEMU's ``-qmp`` has it, options and
            all; ``HOST:PORT`` without a slash is TCP; ``@NAME`` is an abstract socket.
        name: What to call the VM; default: QEMU's ``-name``, else the socket's stem. A VM without a uuid is
            identified by a name that it was given; the socket's stem identifies nothing. With *record* it is no
            other than QEMU's own, where there is one.
        record: Path of the domain XML that is to follow the VM's state; None keeps none. It must be this VM's.
        base: The VM's own libvirt document (its bytes, or its path) to start the record from where there is none yet;
            the record is then that document, changed in place. None: the record is made of what QEMU tells.
        config: Path of the domain XML that the VM is next started from, for changes with ``affect=``; None: its next
            boot is kept in the record.
        reply_timeout: Deadline of connecting, and of each QMP command, in seconds.
        reconnect: When the connection is lost, connect again, for as long as it takes, and find out what happened
            meanwhile; needs an address. A transition under way waits for that, as long as for an answer.
        on_interrupted: What to do with a transition that the record says was begun and is not over: REPORT leaves it
            in ``vm.interrupted``; FINISH and REVERT do so before this returns.
        resync_interval: Seconds between reads that find what no event announces; None: no such reads.
        arrived: The VM has migrated into this QEMU (``confirm_target``) from that of the record: removals that are
            pending there came along, and so did a transition that was cut short.
        read_only: Only read the record, which is neither locked nor written; a change is RecordError then. If another
            process keeps it, ``interrupted`` may be what that one is at work on.
        agent: Where the guest's agent (qemu-ga) is, for ``vm.guest``: as *target*. It is connected to when it is
            first asked, and again after a loss. No work over QMP waits for it.
        placement: Where QEMU's threads should run on this host, and how they are scheduled: a ``Placement``, which
            overrides the record's document (``<cputune>``, ``<vcpu cpuset>``). Or only the policy for a vCPU that
            cannot be in its place: ``"required"`` (the default: it is not plugged, or is taken out again) or
            ``"preferred"`` (it is kept, and the report says so). It applies to vCPUs plugged from now on;
            ``vm.host.place`` moves existing threads.

    Raises:
        MonitorConnectError: No QMP session could be opened; it says why, and what the kernel tells of the peer.
        AgentConnectError: *agent* is no address, or that of the VM's QMP. Nobody was connected to.
        MonitorTimeoutError: QEMU stopped answering.
        MonitorLostError: QEMU went away meanwhile.
        MalformedReplyError: What answers is no QEMU that can be understood.
        RecordError: The record is another VM's, nobody's, locked by another process, or cannot be written; nothing
            has *arrived*; or *config* is another VM's, or cannot be read.
        DomainXmlError: *config* is no document that libvirt would define.
        TransitionError: What *on_interrupted* asks for was not reached; nothing is left attached.
        ValueError: *reconnect* with a socket or client that is given; *base*, *arrived* or *read_only* without
            *record*; *config* is the record; a duration, path or word that cannot be meant. Nobody was connected to.
        TypeError: An argument is of a wrong type. Nobody was connected to.

    Example:
        >>> async with attach("/run/vm.qmp") as vm:
        ...     await vm.plug(3)
        ...     print(vm.layout.enabled)
        VcpuMap('3')
        0,3
    """
    if reconnect and not is_address(target):
        raise ValueError("reconnect=True needs an address: a socket or client that is given cannot be opened again")
    _check_record_options(record, base, config, arrived=arrived, read_only=read_only)
    wish = read_placement(placement)
    guest = Guest(
        agent,
        lambda: engine.layout,
        lambda: driver.connection.monitor,
        lambda online: driver.put(GuestTold(None, online)),
        lambda system: driver.put(GuestIs(system)),
        qmp=target,
        traced=lambda call, **told: driver.traced(call, **told),  # noqa: PLW0108 -- it is made below
    )
    try:
        connection = await Connection.open(target, reply_timeout)
    except BaseException:
        await guest.close()
        raise
    kept = None
    try:
        reading, status, answers, vm = await connection.reader.everything()
        _check_name(record, vm, name)
        vm = called(vm, name)
        guest.found(status)
        instance = _instance(reading, connection) if reconnect or record is not None else None
        if record is not None:
            kept = await _open_record(record, vm, status, instance, base=base, arrived=arrived, read_only=read_only)
        now = asyncio.get_running_loop().time()
        seen = reading[1] or ()
        state = VmState(
            layout_of(vm if kept is None else replace(vm, name=kept.name), reading, answers),
            status=status,
            single_threaded=runs_single_threaded(seen) if len(seen) > 1 else None,
            answers=answers,
            now=now,
            epoch=time.time() - now,
            has_agent=guest.has_agent,
            placement=over_kept(wish, None if kept is None else kept.placement),
            everywhere=kept is not None and kept.everywhere,
        )
        intentions = _take_record_in(kept, state, answers, now, arrived=arrived)
        _put_right(kept, state, intentions, connection.monitor)
        traces = _traces(state.layout.vm.name)
        engine = Engine(
            state,
            intentions,
            is_recorded=kept is not None,
            reply_timeout=reply_timeout,
            reconnects=reconnect,
            resync_interval=resync_interval,
            is_traced=traces is not None,
            now=now,
        )
        writer = RecordWriter(kept, engine)
        if kept is not None and not kept.read_only:
            await writer.save()
        next_boot = None if kept is None and config is None else await _next_boot(writer, engine, config)
    except BaseException:
        await guest.close()
        await connection.monitor.close()
        if kept is not None:
            await kept.close()
        raise
    finder = Finder(target, name, instance, reply_timeout) if reconnect else None
    driver = Driver(engine, connection, writer, finder, guest, traces=traces)
    driver.meet_host()
    controller = VcpuController(driver, next_boot)
    try:
        if engine.is_reading:  # something was heard that may be older than what was read
            with contextlib.suppress(MonitorError):
                await driver.request(Refresh(status=False))
        if on_interrupted is not Recovery.REPORT:
            await controller.recover(on_interrupted)
    except BaseException:
        await controller.close()
        raise
    return controller


def _traces(vm: str) -> "Traces | None":
    """Return what makes spans, if this program has imported OpenTelemetry: without that no span would go anywhere."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from qmpvcpu.traces import Traces

    return Traces(vm, asyncio.get_running_loop().time)


def _check_record_options(
    record: _Path | None, base: bytes | _Path | None, config: _Path | None, *, arrived: bool, read_only: bool
) -> None:
    """Raise ValueError if what is said of the record does not go together, TypeError if *base* is no document."""
    if base is not None and not isinstance(base, bytes):
        path("base", base)
    if base is not None and record is None:
        raise ValueError("base= is what a record starts from: it needs record=")
    if (arrived or read_only) and record is None:
        raise ValueError(f"{'arrived' if arrived else 'read_only'}= is about a record: it needs record=")
    if config is not None and record is not None and _same(config, record):
        raise ValueError("config= is a document of its own: a record keeps the next boot without it")


def _same(config: str | os.PathLike[str], record: str | os.PathLike[str]) -> bool:
    from qmpvcpu.record.file import absolute  # as in _instance

    return absolute(config) == absolute(record)


def _check_name(record: _Path | None, vm: VmInfo, name: str | None) -> None:
    """Refuse a record under another name than QEMU's own, which it would have from then on.

    Raises:
        RecordError: *name* is another one.
    """
    if record is not None and name and vm.named and vm.name != name:
        why = f"QEMU was given the name {shorten(vm.name)} for this VM, not {shorten(name)}: leave the name out"
        raise RecordError(record, why)


def _instance(reading: Reading, connection: Connection) -> "Instance | None":
    # Here, and not above: XML and files are a third of the time that importing us would take.
    from qmpvcpu.record.owner import instance_running

    return instance_running(reading[0], connection.find_qemu(reading[0]).pid)


async def _open_record(
    record: _Path,
    vm: VmInfo,
    status: VmStatus,
    instance: "Instance | None",
    *,
    base: bytes | _Path | None,
    arrived: bool,
    read_only: bool,
) -> "Record":
    from qmpvcpu.record.owner import Claim  # as in _instance
    from qmpvcpu.record.record import Record

    if arrived and status.run_state == "inmigrate":
        raise RecordError(record, "no VM has arrived in this QEMU yet: attach with arrived=True once it has")
    if arrived and status.migration == "none":
        raise RecordError(record, "no VM has migrated into this QEMU: attach without arrived=True")
    claim = Claim(vm.name, vm.uuid, vm.named, instance, arrived)
    return await Record.open(record, claim, base=base, read_only=read_only)


async def _next_boot(writer: RecordWriter, engine: Engine, config: _Path | None) -> "NextBoot":
    from qmpvcpu.vm.next_boot import NextBoot  # as in _instance

    next_boot = NextBoot(writer, lambda: engine.layout, config)
    await next_boot.check()
    return next_boot


def _put_right(record: "Record | None", state: VmState, intentions: Intentions, monitor: Monitor) -> None:
    """Have QEMU's main thread go home, if who died at a change has left it elsewhere."""
    intent = intentions.interrupted
    if record is not None and not record.read_only and intent is not None and intent.main_cpus is not None:
        from qmpvcpu.vm.placing import Placer  # few VMs have a placement

        intentions.interrupted = Placer(state, lambda: monitor).put_right(intent)


def _take_record_in(
    record: "Record | None", state: VmState, answers: Mapping[int, OstAnswer], now: float, *, arrived: bool
) -> Intentions:
    """Take in what the record knows of this very QEMU, and return what is wanted of the VM."""
    if record is not None and (other_cpu := record.cpu_differs(state.layout)) is not None:
        called = printable(state.layout.vm.name)
        _log.warning("VM %s: %s", called, printable(other_cpu), extra={"vm": called})
    before = None if record is None or record.previous is None else record.previous.metadata
    if record is None or before is None:
        return Intentions()
    intent = before.intent if record.same_instance else None
    if arrived:
        state.arrived(before.pending, answers, now)
        if intent is not None:  # the main thread that was sent away, and its host CPUs, are the source's
            intent = replace(intent, main_cpus=None, birthplaces=())
    elif record.same_instance:
        state.known_from_record(before.pending, answers, now)
    else:
        state.tell_instance_changed()
    intentions = Intentions(intent, before.desired, record.earlier)
    intentions.drop_if_there(state.layout)
    if intentions.interrupted is not None:
        state.interrupted({step.first for step in intentions.interrupted.steps}, now)
    return intentions
