"""VMs for the controller's tests: a real QEMU, the micro-guest, and us attached to it."""

import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import VcpuController
from qmpvcpu.events import Event
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.qemu import GuestVm
from qmpvcpu.vm.stream import EventStream
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


class Exchange(logging.Handler):
    """Every command that we send, by name, as the monitor logs it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.sent: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "direction", None) == "sent":
            self.sent.append(record.qmp["execute"])  # type: ignore[attr-defined]  # the monitor's `extra`


@contextlib.contextmanager
def exchange() -> Iterator[list[str]]:
    """The names of the commands that are sent inside."""
    handler = Exchange()
    logger = logging.getLogger("qmpvcpu.qmp")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.sent
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


async def until(stream: EventStream, kind: type[Event]) -> list[Event]:
    """All events up to the first of *kind*."""
    seen: list[Event] = []
    async for event in stream:
        seen.append(event)
        if isinstance(event, kind):
            return seen
    raise AssertionError(f"the stream ended without {kind.__name__}: {seen}")
