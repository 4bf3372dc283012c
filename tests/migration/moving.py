"""What a VMM does around the library when it moves a VM: its own QMP, the stream, and the VM at the other end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import VcpuController
from qmpvcpu.errors import TakeBackError
from qmpvcpu.migration import Export
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.guestvm import GuestVm
from tests.controller.vms import other_client
from tests.substrates import Substrate


async def call(guest: GuestVm, command: str, **arguments: object) -> Any:
    """QEMU's answer to the VMM; arguments with underscores for hyphens."""
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    async with other_client(guest) as client:
        return await client.execute(command, named)


async def ended(vmm: QMPClient, *, within: float = 90) -> str:
    """How the migration ended, as the source says; or its status *within* so many seconds, if it has not."""
    status = "none"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within):
            while status not in {"completed", "failed", "cancelled"}:
                reply: Any = await vmm.execute("query-migrate")
                status = str(reply.get("status"))
                await asyncio.sleep(0.01)
    return status


async def send(source: GuestVm, uri: str) -> str:
    """Have *source* migrate to *uri*; return how that ended, as it says."""
    async with other_client(source) as vmm:
        await vmm.execute("migrate", {"uri": uri})
        return await ended(vmm)


async def move(source: GuestVm, target: GuestVm) -> str:
    """Migrate live, over a UNIX socket; return how that ended, as the source says."""
    uri = f"unix:{target.process.directory / 'stream'}"
    await call(target, "migrate-incoming", uri=uri)
    return await send(source, uri)


async def save(source: GuestVm, file: Path) -> str:
    """Save the VM to *file*, which every QEMU can; return how that ended."""
    return await send(source, f"exec:cat > {file}")


async def restore(target: GuestVm, file: Path) -> None:
    """Begin to restore a VM from *file*."""
    await call(target, "migrate-incoming", uri=f"exec:cat {file}")


async def rebuild(state: ExportedState, target: VcpuController) -> None:
    """Plug what the source had plugged, in its order, into a target that was started with its boot vCPUs."""
    await target.replay(state.layout)


@contextlib.asynccontextmanager
async def waiting(on: Substrate, **options: Any) -> AsyncIterator[tuple[MicroGuest, VcpuController]]:
    """A QEMU on *on* that waits for a micro-guest, and us attached to it."""
    async with (
        MicroGuest(on.qemu, machine=on.machine, accel=on.accel, incoming=True, **options) as guest,
        qmpvcpu.attach(guest.qmp, name="vm") as vm,
    ):
        yield guest, vm


async def keep(export: Export, source: GuestVm, said: str) -> None:
    """Have the VM go on where it was, after its target died and the source *said* how the migration ended.

    A source that had written all before the target died says ``completed`` and stopped the VM; one that had not says
    ``failed`` and runs it. Which one it is, is chance.
    """
    state = (await call(source, "query-status"))["status"]
    assert (said, state) in {("completed", "postmigrate"), ("failed", "running")}
    if said == "completed":
        await export.take_back(destination_is_gone=True)
        return
    with pytest.raises(TakeBackError, match="it runs here"):
        await export.take_back(destination_is_gone=True)
    export.release()
