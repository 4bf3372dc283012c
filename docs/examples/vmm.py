"""A VMM that starts QEMU itself, owns its QMP connection, and lends its client to qmpvcpu.

QEMU gets one end of a socket pair, so nobody else speaks QMP with it, and no path can be in the way. The VMM goes on
reading its own events and sending its own commands; qmpvcpu listens beside it, and gives the client back as it was.

Run it with the QEMU command that you have; -smp needs maxcpus= above the count it starts with:

    python vmm.py qemu-system-x86_64 -machine q35 -accel kvm -m 512 -smp 1,maxcpus=8 disk.img

Each line of standard input is a wish: a map such as 0,2-5, or quit.
"""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import OnFailure, VcpuController


@asynccontextmanager
async def started(command: list[str]) -> AsyncIterator[QMPClient]:
    """Run QEMU with a monitor that only this process has; it has ended when this is left."""
    ours, theirs = socket.socketpair()
    with theirs:
        monitor = ["-chardev", f"socket,id=vmm,fd={theirs.fileno()}", "-qmp", "chardev:vmm"]
        process = await asyncio.create_subprocess_exec(*command, *monitor, pass_fds=[theirs.fileno()])
    client = QMPClient("vmm")
    try:
        await client.connect(ours)
        yield client
        await process.wait()
    finally:
        with suppress(EOFError, ConnectionError):  # what ended the connection, which is told here
            await client.disconnect()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def follow_events(client: QMPClient) -> None:
    """The VMM's own events, from the client's own queue, which qmpvcpu leaves alone; return when the VM ends."""
    async for event in client.events:
        if event["event"] in ("STOP", "RESUME", "RESET", "GUEST_PANICKED", "SHUTDOWN"):
            print(f"event: {event['event']}", flush=True)
        if event["event"] == "SHUTDOWN":
            return


async def fulfil(wish: str, client: QMPClient, vm: VcpuController) -> None:
    """Carry one wish out; whatever comes of it, the VMM goes on."""
    try:
        if wish == "quit":
            await client.execute("quit")  # a command of our own, on the same connection
        else:
            print(await vm.set_map(wish, on_failure=OnFailure.REVERT, timeout=10), flush=True)
    except qmpvcpu.TransitionError as error:
        print(error.report, flush=True)
    except qmpvcpu.QmpVcpuError as error:
        print(error, flush=True)


async def follow_wishes(client: QMPClient, vm: VcpuController) -> None:
    """Read wishes until there are no more."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        await fulfil(line.decode().strip(), client, vm)
    await client.execute("quit")


async def main(command: list[str]) -> None:
    """Run one VM until it ends."""
    async with started(command) as client, qmpvcpu.attach(client) as vm:
        print(f"up with vCPUs {vm.layout.enabled} of {vm.layout.max}", flush=True)
        wishes = asyncio.create_task(follow_wishes(client, vm))
        await follow_events(client)
        wishes.cancel()


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1:]))
