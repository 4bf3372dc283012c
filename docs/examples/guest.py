"""A VM to try the other examples on: a real QEMU with the micro-guest, which answers as you tell it.

It says where its QMP socket is. Each line of standard input gives it another personality: oblige, refuse, hold (take
up a removal, and decide nothing), silent; the end of standard input ends it.

    python guest.py
"""

import asyncio
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
    async with MicroGuest(boot=1, max_vcpus=8) as guest:
        print(guest.qmp, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            if (personality := PERSONALITIES.get(line.strip())) is None:
                print(f"one of: {', '.join(PERSONALITIES)}", flush=True)
            else:
                await guest.become(personality)
                print("so be it", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
