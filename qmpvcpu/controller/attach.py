"""attach(): from any kind of QMP address to a VcpuController."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Generator, Mapping
from types import TracebackType
from typing import Any

from qmpvcpu.controller.controller import VcpuController
from qmpvcpu.controller.reading import Reader
from qmpvcpu.controller.session import Session
from qmpvcpu.engine import Engine
from qmpvcpu.errors import MonitorLostError
from qmpvcpu.model import Layout, creation_order, runs_single_threaded
from qmpvcpu.monitor import Monitor, Target

__all__ = ["Attaching", "attach"]


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


def attach(
    target: Target,
    *,
    name: str | None = None,
    record: str | os.PathLike[str] | None = None,
    timeout: float = 10.0,
    resync_interval: float | None = 30.0,
) -> Attaching:
    """Attach to a running QEMU.

    Use as ``async with attach(...) as vm:`` or ``vm = await attach(...)`` and ``await vm.close()``. Reads the VM
    once (a constant number of queries), changes nothing. Cancelling it leaves nothing behind.

    A QMPClient of the caller's is borrowed: a listener is added and removed again, its own ``events`` queue and its
    runstate are left alone, and it is never disconnected.

    Args:
        target: Path of a UNIX socket, ``"unix:PATH"``, ``"tcp:HOST:PORT"``, ``(host, port)``, a connected
            ``socket.socket``, or a running ``qemu.qmp.QMPClient``.
        name: What to call the VM; default: QEMU's ``-name``, else the socket's stem.
        record: Path of the domain XML that is to follow the VM's state; None keeps none.
        timeout: Deadline of connecting, and of each QMP command, in seconds.
        resync_interval: Seconds between reads that find what no event announces; None: no such reads.

    Raises:
        MonitorConnectError: No QMP session came about; it says why, and what the kernel tells of the peer.
        MonitorTimeoutError: QEMU stopped answering.
        MonitorLostError: QEMU went away meanwhile.
        MalformedReplyError: What answers is no QEMU that can be understood.
        RecordError: The record is another VM's, nobody's, or cannot be written.

    Example:
        >>> async def main():  # doctest: +SKIP
        ...     async with attach("/run/vm.qmp") as vm:
        ...         print(vm.layout.enabled)
    """
    return Attaching(lambda: _open(target, name, record, timeout, resync_interval))


class _Inbox:
    """Keeps what arrives while the VM is being read, and then hands on."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self._early: list[Mapping[str, Any]] = []
        self._lost: MonitorLostError | None = None

    def event(self, message: Mapping[str, Any]) -> None:
        if self.session is None:
            self._early.append(message)
        else:
            self.session.on_event(message)

    def lost(self, error: MonitorLostError) -> None:
        self._lost = error
        if self.session is not None:
            self.session.on_lost(error)

    def hand_over(self, session: Session) -> None:
        self.session = session
        if self._lost is not None:
            session.on_lost(self._lost)
        for message in self._early:
            session.on_event(message)


async def _open(
    target: Target,
    name: str | None,
    record: str | os.PathLike[str] | None,
    timeout: float,  # noqa: ASYNC109 - the deadline of each command, not of this function
    resync_interval: float | None,
) -> VcpuController:
    inbox = _Inbox()  # listening comes before reading: what changes in between is not missed
    monitor = await Monitor.open(target, timeout=timeout, on_event=inbox.event, on_lost=inbox.lost)
    try:
        reader = Reader(monitor, timeout)
        (slots, threads), status, answers = await asyncio.gather(reader.slots(), reader.status(), reader.answers())
        seen = threads or ()
        layout = Layout(vm=await reader.vm_info(name, slots), slots=slots, creation=creation_order(slots, seen))
        engine = Engine(
            layout,
            status=status,
            single_threaded=runs_single_threaded(seen) if len(seen) > 1 else None,
            answers=answers,
            now=asyncio.get_running_loop().time(),
        )
        kept = None
        if record is not None:
            # Here, and not above: XML and files are a third of the time that importing us would take.
            from qmpvcpu.record import Record, instance_of  # noqa: PLC0415

            instance = instance_of(layout[0].host_tid if layout.max else None, monitor.peer_pid)
            kept = await Record.open(record, name=layout.vm.name, uuid=layout.vm.uuid, instance=instance)
            await kept.write(engine.layout)
        session = Session(monitor, reader, engine, record=kept, timeout=timeout, resync_interval=resync_interval)
    except BaseException:
        await monitor.close()
        raise
    inbox.hand_over(session)
    return VcpuController(session)
