"""A script that follows load: enough vCPUs for what is to be done, and no change that is not needed.

The load is how many vCPUs' worth of work there is: a number in a file that somebody renews by a rename (an agent in
the guest, your monitoring), else the load average of this host. Growing is quick. Shrinking takes several looks in a
row, and a guest that refuses is left in peace for a while. One that has not answered is not asked again: the next
set_count joins what is pending.

    python follow_load.py /run/vm.qmp --load /run/vm.load --most 8
"""

import argparse
import asyncio
import math
import os
from collections.abc import Callable
from pathlib import Path

import qmpvcpu
from qmpvcpu import OnFailure, Pending, Refused, VcpuController

TARGET = 0.75  # load on each vCPU after a change
BUSY, IDLE = 0.9, 0.5  # no change while it is between these
LOOKS = 3  # so many in a row must say that there are too many
PEACE = 20  # looks for which a guest that said no is not asked to give anything up


def wanted(load: float, count: int, least: int, most: int) -> int:
    """How many vCPUs carry *load*; as many as now, unless they are too busy or too idle."""
    if IDLE <= load / count <= BUSY:
        return count
    return min(max(math.ceil(load / TARGET), least), most)


async def change(vm: VcpuController, count: int, patience: float) -> bool:
    """Ask for *count* vCPUs; return False if that cannot be now. No failure ends the script."""
    try:
        report = await vm.set_count(count, on_failure=OnFailure.CONTINUE, timeout=patience)
    except qmpvcpu.TransitionError as error:
        report = error.report
    except qmpvcpu.QmpVcpuError as error:  # denied while it migrates, the connection is lost for the moment, ...
        print(error, flush=True)
        return False
    print(f"{report.start} -> {report.layout.enabled}", flush=True)
    for step in report.steps:
        match step.verdict:
            case Refused(reason=reason):
                print(f"vCPU {step.ids} stays: {reason}", flush=True)
            case Pending():
                print(f"vCPU {step.ids} may leave later", flush=True)
    return not any(isinstance(step.verdict, Refused) for step in report.steps)


async def follow(vm: VcpuController, load: Callable[[], float], *, most: int, every: float, patience: float) -> None:
    """Look at *load* every so many seconds, and have as many vCPUs as it needs."""
    idle = peace = 0
    while True:
        # What is on its way out is not to be counted on.
        count = len(vm.layout.enabled) - len(vm.layout.pending)
        goal = wanted(load(), count, least=len(vm.layout.started_with), most=min(most, vm.layout.max))
        idle = idle + 1 if goal < count else 0
        peace = max(peace - 1, 0)
        if goal > count or (idle >= LOOKS and not peace):
            idle = 0
            if not await change(vm, goal, patience):
                peace = PEACE
        await asyncio.sleep(every)


async def main() -> None:
    """Read the command line and follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="the VM's QMP socket")
    parser.add_argument("--load", type=Path, help="a file with the load; else this host's load average")
    parser.add_argument("--most", type=int, default=8, help="never more vCPUs than this")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds that the guest has for each answer")
    options = parser.parse_args()

    def load() -> float:
        return os.getloadavg()[0] if options.load is None else float(options.load.read_text())

    async with qmpvcpu.attach(options.address, reconnect=True) as vm:
        await follow(vm, load, most=options.most, every=options.every, patience=options.patience)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except qmpvcpu.QmpVcpuError as error:  # it says what is so, and what to do
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
