"""A VM to try the other examples on: a real QEMU with the micro-guest, which answers as you tell it.

It says where its QMP socket is. Each line of standard input gives it another behaviour: comply, refuse, hang (take
up a removal, and decide nothing), silent; the end of standard input ends it.

    python guest.py
"""

import asyncio
import contextlib
import os
import stat
import sys

from qmpvcpu.testing import Behaviour, MicroGuest

BEHAVIOURS = {
    "comply": Behaviour.complying(),
    "refuse": Behaviour.refusing(0x82),
    "hang": Behaviour.hanging(),
    "silent": Behaviour.silent(),
}


async def main() -> None:
    """Run the VM until there is nothing more to read."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with MicroGuest(boot=1, max_vcpus=8) as guest:
        print(guest.qmp, flush=True)
        async for line in reader:
            if (behaviour := BEHAVIOURS.get(line.decode().strip())) is None:
                print(f"one of: {', '.join(BEHAVIOURS)}", flush=True)
            else:
                await guest.set_behaviour(behaviour)
                print("done", flush=True)


def is_pipe_or_terminal(descriptor: int) -> bool:
    """Whether an event loop can wait for what comes from *descriptor*; of files and /dev/null it cannot."""
    mode = os.fstat(descriptor).st_mode
    return os.isatty(descriptor) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    if not is_pipe_or_terminal(sys.stdin.fileno()):
        sys.exit("standard input must be a terminal or a pipe; for a VM that runs on: sleep inf | python guest.py")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
