"""What a careful program does without us: the arguments known beforehand, the CPU's own event awaited."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, QMPClient

from qmpvcpu import Slot, qapi

__all__ = ["ALL_QUERIES", "Raw", "raw_client"]

IN_FLIGHT = 8
_VCPU_0 = "/machine/unattached/device[0]"

# What attach() asks: a raw program that shall know as much asks the same.
ALL_QUERIES: tuple[tuple[str, dict[str, object] | None], ...] = (
    ("query-hotpluggable-cpus", None),
    ("query-cpus-fast", None),
    ("query-status", None),
    ("query-migrate", None),
    ("query-acpi-ospm-status", None),
    ("query-kvm", None),
    ("query-name", None),
    ("query-uuid", None),
    ("query-memory-size-summary", None),
    ("qom-get", {"path": "/machine", "property": "type"}),
    ("qom-get", {"path": "/machine", "property": "smp"}),
    ("qom-get", {"path": "/machine", "property": "confidential-guest-support"}),
    ("qom-list", {"path": "/objects"}),
    ("qom-list", {"path": "/machine/peripheral"}),
    ("query-stats", qapi.query_exits([_VCPU_0])),
    ("qom-get", {"path": _VCPU_0, "property": "feature-words"}),
)


@contextlib.asynccontextmanager
async def raw_client(socket: Path) -> AsyncIterator[QMPClient]:
    """Connect a client as qemu.qmp makes it."""
    client = QMPClient("bench")
    await client.connect(str(socket))
    client.events.event_filter = lambda _: False  # nobody reads them there
    try:
        yield client
    finally:
        await client.disconnect()


class Raw:
    """One VM driven by `QMPClient.execute` alone."""

    def __init__(self, client: QMPClient, slots: Sequence[Slot], listener: EventListener, *, tcg: bool) -> None:
        self._client = client
        self._arguments = {slot.first: qapi.device_add(slot) for slot in slots}
        self._listener = listener
        self._tcg = tcg

    async def plug(self, vcpu: int) -> None:
        """One device_add."""
        await self._client.execute("device_add", self._arguments[vcpu])

    async def plug_acknowledged(self, vcpu: int) -> None:
        """One device_add, and the guest's answer to it."""
        with self._client.listener("ACPI_DEVICE_OST") as listener:
            await self.plug(vcpu)
            await listener.get()

    async def unplug(self, vcpu: int) -> None:
        """device_del, and the wait for its proof; under TCG that is a query after the guest's answer."""
        await self._client.execute("device_del", {"id": f"vcpu{vcpu}"})
        while not await self._is_proof(await self._listener.get(), vcpu):
            pass

    async def _is_proof(self, event: Any, vcpu: int) -> bool:
        data = event["data"]
        if not self._tcg:
            return bool(data.get("path") == f"/machine/peripheral/vcpu{vcpu}")
        info = data.get("info", {})
        if (info.get("source"), info.get("status")) != (3, 0):
            return False
        await self._client.execute("query-hotpluggable-cpus")
        return True

    async def read(self, queries: int = 2) -> None:
        """Send the first *queries* of all at once, and wait for the replies."""
        await asyncio.gather(*(self._client.execute(*query) for query in ALL_QUERIES[:queries]))

    async def plug_all(self, vcpus: Sequence[int]) -> None:
        """A device_add for each, eight in flight."""
        room = asyncio.Semaphore(IN_FLIGHT)

        async def one(vcpu: int) -> None:
            async with room:
                await self.plug(vcpu)

        await asyncio.gather(*map(one, vcpus))

    async def unplug_each(self, vcpus: Sequence[int]) -> None:
        """One at a time, the next when the one before is gone for certain."""
        for vcpu in reversed(vcpus):
            await self.unplug(vcpu)

    async def unplug_all(self, vcpus: Sequence[int]) -> None:
        """A device_del for each, eight unanswered at a time, until the last CPU's own event (KVM)."""
        left = {f"/machine/peripheral/vcpu{vcpu}" for vcpu in vcpus}
        room = asyncio.Semaphore(IN_FLIGHT)

        async def ask(vcpu: int) -> None:
            await room.acquire()
            await self._client.execute("device_del", {"id": f"vcpu{vcpu}"})

        asking = asyncio.gather(*map(ask, vcpus))
        while left:
            event: Any = await self._listener.get()
            path = event["data"].get("path")
            if path in left:
                left.discard(path)
                room.release()
        await asking
