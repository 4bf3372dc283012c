"""VMs for the controller's tests: a real QEMU, the micro-guest, and us attached to it."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import VcpuController
from qmpvcpu.events import Event
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.guestvm import GuestVm
from qmpvcpu.vm.subscribers import EventStream
from tests.substrates import Substrate


@contextlib.asynccontextmanager
async def running(
    on: Substrate, *, attach: dict[str, Any] | None = None, **guest: Any
) -> AsyncIterator[tuple[MicroGuest, VcpuController]]:
    """Start a VM with the micro-guest on *on*, and attach to it."""
    async with (
        MicroGuest(on.qemu, machine=on.machine, accel=on.accel, **guest) as micro,
        qmpvcpu.attach(micro.qmp, **(attach or {})) as vm,
    ):
        yield micro, vm


@contextlib.asynccontextmanager
async def other_client(guest: GuestVm) -> AsyncIterator[QMPClient]:
    """Somebody else, on the VM's second QMP socket."""
    client = QMPClient("other")
    await client.connect(str(guest.sockets[1]))
    try:
        yield client
    finally:
        with contextlib.suppress(EOFError, OSError):
            await client.disconnect()


async def present(client: QMPClient) -> set[str]:
    """What QEMU itself says is plugged, by QOM path."""
    reply: Any = await client.execute("query-hotpluggable-cpus")
    return {slot["qom-path"] for slot in reply if "qom-path" in slot}


async def until(stream: EventStream, kind: type[Event]) -> list[Event]:
    """All events up to the first of *kind*."""
    seen: list[Event] = []
    async for event in stream:
        seen.append(event)
        if isinstance(event, kind):
            return seen
    raise AssertionError(f"the stream ended without {kind.__name__}: {seen}")
