"""A VM to try the other examples on: a real QEMU with the micro-guest, which answers as you tell it.

It says where its QMP socket is. Each line of standard input gives it another personality: oblige, refuse, hold (take
up a removal, and decide nothing), silent; the end of standard input ends it.

    python guest.py
"""

import asyncio
import contextlib
import sys

from qmpvcpu.testing import MicroGuest, Personality

PERSONALITIES = {
    "oblige": Personality.obliging(),
    "refuse": Personality.refusing(0x82),
    "hold": Personality.held(),
    "silent": Personality.silent(),
}


async def main() -> None:
    """Run the VM until there is nothing more to read."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with MicroGuest(boot=1, max_vcpus=8) as guest:
        print(guest.qmp, flush=True)
        async for line in reader:
            if (personality := PERSONALITIES.get(line.decode().strip())) is None:
                print(f"one of: {', '.join(PERSONALITIES)}", flush=True)
            else:
                await guest.become(personality)
                print("so be it", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
