"""Every QEMU of the machine, under every accelerator, on every machine type that the micro-guest knows."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import pytest
from qemu.qmp import EventListener, QMPClient

from qmpvcpu.testing import MicroGuest
from tests.substrates import Substrate, substrates

OST = tuple[int, int, int]  # slot, source event, status


class Vm:
    """A VM with the micro-guest, and raw QMP to it."""

    def __init__(self, guest: MicroGuest, client: QMPClient, listener: EventListener) -> None:
        self.guest = guest
        self.client = client
        self._events = listener

    async def execute(self, command: str, **arguments: object) -> Any:
        """QEMU's answer; arguments with underscores for hyphens."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.client.execute(command, named)

    async def slots(self) -> dict[int, Any]:
        """QEMU's slot table by cpu-index: the reply lists it in descending order."""
        reply = await self.execute("query-hotpluggable-cpus")
        return dict(enumerate(reversed(reply)))

    async def present(self) -> set[int]:
        """The occupied slots."""
        return {number for number, slot in (await self.slots()).items() if "qom-path" in slot}

    async def plug(self, number: int) -> None:
        """Ask for a CPU in a slot, as vcpuN."""
        slot = (await self.slots())[number]
        await self.execute("device_add", driver=slot["type"], id=f"vcpu{number}", **slot["props"])

    async def unplug(self, number: int) -> None:
        """Ask for the removal of vcpuN."""
        await self.execute("device_del", id=f"vcpu{number}")

    async def event(self) -> dict[str, Any]:
        """The next event."""
        async with asyncio.timeout(10):
            return dict(await self._events.get())

    async def ost(self) -> OST:
        """The next _OST that the guest says."""
        while (event := await self.event())["event"] != "ACPI_DEVICE_OST":
            pass
        info = event["data"]["info"]
        return int(info["slot"]), info["source"], info["status"]

    async def plugged(self, *numbers: int) -> None:
        """Plug slots, one after the other, and see the guest take each."""
        for number in numbers:
            await self.plug(number)
            assert await self.ost() == (number, 1, 0)


class StartVm(Protocol):
    """Starts a VM on the substrate of the test; takes what MicroGuest takes."""

    async def __call__(self, **options: Any) -> Vm: ...


@asynccontextmanager
async def _talking_to(guest: MicroGuest) -> AsyncIterator[Vm]:
    client = QMPClient("test")
    listener = EventListener()
    await client.connect(str(guest.qmp))
    try:
        with client.listen(listener):
            yield Vm(guest, client, listener)
    finally:
        await client.disconnect()


@pytest.fixture
async def start(on: Substrate) -> AsyncIterator[StartVm]:
    """A function that starts a VM on *on*; all end with the test."""
    async with AsyncExitStack() as stack:

        async def starting(**options: Any) -> Vm:
            options = {"machine": on.machine, "accel": on.accel} | options
            guest = await stack.enter_async_context(MicroGuest(on.qemu, **options))
            return await stack.enter_async_context(_talking_to(guest))

        yield starting


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that asks for a substrate on all of them."""
    if "on" in metafunc.fixturenames:
        metafunc.parametrize("on", list(substrates()))
