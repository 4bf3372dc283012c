"""A VMM that starts QEMU itself, owns its QMP connection, lends its client to qmpvcpu, and survives its own crash.

QEMU listens on a path. A VMM that is killed leaves the VM running; its next run finds it there, and finishes the
change that was under way, which is in the record next to the socket. (One end of a socket pair would be gone with the
VMM, and nobody could ever reach that QEMU again.) The VMM keeps reading its own events and sending its own commands;
qmpvcpu listens too, and gives the client back as it was.

Run it with a path for the socket and your QEMU command, whose -smp has maxcpus= above the count that it starts with:

    python vmm.py /run/vmm/web1.qmp qemu-system-x86_64 -machine q35 -accel kvm -m 512 -smp 1,maxcpus=8 disk.img

Each line of standard input is a wish: a map such as 0,2-5, or quit.
"""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qemu.qmp import ConnectError, QMPClient

import qmpvcpu
from qmpvcpu import OnFailure, Recovery, VcpuController


@asynccontextmanager
async def connected(path: Path, command: list[str]) -> AsyncIterator[QMPClient]:
    """Connect to the QEMU that listens at *path*, or start one. It keeps running if this is left by an error."""
    client = QMPClient("vmm")
    process = None
    with suppress(ConnectError):
        await client.connect(str(path))
        print("an earlier run has left the VM running", flush=True)
    if not client.greeting:
        # Nothing ties it to us: it has a session of its own, so Ctrl-C ends only us, and a log instead of our output.
        monitor = ["-qmp", f"unix:{path},server=on,wait=off"]
        with path.with_suffix(".log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, *monitor, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        await connect_when_it_listens(client, path, process)
    try:
        yield client
        if process is not None:
            await process.wait()
    finally:
        with suppress(EOFError, ConnectionError):  # what ended the connection, which is told here
            await client.disconnect()


async def connect_when_it_listens(client: QMPClient, path: Path, process: asyncio.subprocess.Process) -> None:
    """Connect to a QEMU that was just started."""
    async with asyncio.timeout(30):
        while True:
            try:
                await client.connect(str(path))
            except ConnectError:
                if process.returncode is not None:
                    sys.exit(f"QEMU ended with {process.returncode}; see {path.with_suffix('.log')}")
                await asyncio.sleep(0.05)
            else:
                return


async def follow_events(client: QMPClient) -> None:
    """The VMM's own events, from the client's own queue, which qmpvcpu leaves alone; return when the VM ends."""
    async for event in client.events:
        if event["event"] in ("STOP", "RESUME", "RESET", "GUEST_PANICKED", "SHUTDOWN"):
            print(f"event: {event['event']}", flush=True)
        if event["event"] == "SHUTDOWN":
            return


async def fulfil(wish: str, client: QMPClient, vm: VcpuController) -> None:
    """Carry one wish out; no failure ends the VMM."""
    try:
        if wish == "quit":
            await client.execute("quit")  # a command of our own, on the same connection
        elif wish == "finish":
            print(f"finishing what was under way: {await vm.recover(Recovery.FINISH)}", flush=True)
        else:
            print(await vm.set_map(wish, on_failure=OnFailure.REVERT, timeout=10), flush=True)
    except qmpvcpu.TransitionError as error:
        print(error.report, flush=True)
    except qmpvcpu.QmpVcpuError as error:
        print(error, flush=True)


async def follow_wishes(client: QMPClient, vm: VcpuController) -> None:
    """Read wishes until there are no more."""
    if vm.interrupted is not None:
        await fulfil("finish", client, vm)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        await fulfil(line.decode().strip(), client, vm)
    await client.execute("quit")


async def main(path: Path, command: list[str]) -> None:
    """Run one VM until it ends."""
    async with (
        connected(path, command) as client,
        qmpvcpu.attach(client, name=path.stem, record=path.with_suffix(".xml")) as vm,
    ):
        print(f"up with vCPUs {vm.layout.enabled} of {vm.layout.max}", flush=True)
        wishes = asyncio.create_task(follow_wishes(client, vm))
        await follow_events(client)
        wishes.cancel()


if __name__ == "__main__":
    if not sys.argv[2:]:
        sys.exit(__doc__)
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
