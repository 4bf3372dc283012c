"""``python -m tests.peer.exercise``: use every part of qemu.qmp that we use, on a real QEMU and on a scripted peer.

It runs in a process of its own, with whichever qemu.qmp PYTHONPATH leads to, and prints what it saw as JSON.
"""

import asyncio
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import qemu.qmp
from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import MonitorLostError
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.peer import Failure, ScriptedPeer


async def with_qemu() -> dict[str, str]:
    """Plug and unplug on a client of our own, on the same with its log on, and on a client that was given."""
    seen = {}
    async with MicroGuest() as guest:
        async with qmpvcpu.attach(guest.qmp) as vm:
            await vm.plug(3)
            await vm.set_map("0,3-6")
            await vm.unplug(3)
            seen["own"] = str(vm.layout.enabled)
        logging.getLogger("qemu.qmp").setLevel(logging.DEBUG)
        async with qmpvcpu.attach(guest.qmp) as vm:
            await vm.set_map("0,2")
            seen["logged"] = str(vm.layout.enabled)
        logging.getLogger("qemu.qmp").setLevel(logging.NOTSET)
        client = QMPClient()
        await client.connect(str(guest.qmp))
        try:
            async with qmpvcpu.attach(client) as vm:
                await vm.plug(7)
                await vm.unplug(2)
                seen["given"] = str(vm.layout.enabled)
        finally:
            await client.disconnect()
    return seen


async def with_peer() -> dict[str, Any]:
    """See an event, a rejection, and the end of a session by a line that is too long and by a hang-up."""
    seen: dict[str, Any] = {}
    answers = {"query-status": 1, "stop": Failure("no"), "cont": "x" * (11 << 20)}
    for part in ("a line", "a hang-up"):
        async with ScriptedPeer(answers=answers) as peer:
            events: list[Any] = []
            lost: list[MonitorLostError] = []
            monitor = await Monitor.open(peer.path, timeout=5, on_event=events.append, on_lost=lost.append)
            await peer.event("RESUME")
            pieces = await asyncio.gather(*(monitor.execute("query-status", timeout=5) for _ in range(9)))
            try:
                await monitor.execute("stop")
            except qmpvcpu.CommandRejectedError as error:
                seen["rejection"] = error.desc
            asking = asyncio.create_task(monitor.execute("cont" if part == "a line" else "wait"))
            if part == "a hang-up":
                await peer.expect("wait")
                await peer.hang_up()
            await asyncio.wait({asking})
            seen[part] = [error.why for error in lost] + [len(events), sum(pieces)]
            await monitor.close()
    return seen


async def main() -> None:
    """Do all of it."""
    print(json.dumps({"file": qemu.qmp.__file__, "qemu": await with_qemu(), "peer": await with_peer()}))  # noqa: T201


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        logging.basicConfig(filename=Path(directory, "log"))
        asyncio.run(main())
