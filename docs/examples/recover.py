"""Give a VM exactly the vCPUs that are wished for, and survive being killed while doing so.

The record tells the next run what this one had begun: run it again after a crash, as a supervisor would. It says what
was under way, finishes or reverts that, and goes on to its own wish. What the guest was asked for before the crash is
not asked for again.

    python recover.py /run/vm.qmp /var/lib/vmm/vm.xml 0,2-5 --interrupted finish
"""

import argparse
import asyncio
import sys

import qmpvcpu
from qmpvcpu import OnFailure, Recovery, VcpuController


async def recovered(vm: VcpuController, how: Recovery) -> None:
    """See to what an earlier run left, if it left anything."""
    if (intent := vm.interrupted) is None:
        return
    print(f"an earlier run was cut short on its way from {intent.start} to {intent.target}; now:")
    print(await vm.recover(Recovery.REPORT))  # only looks
    print(await vm.recover(how))


async def main() -> int:
    """Return 0 if the VM has the wished vCPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="the VM's QMP socket")
    parser.add_argument("record", help="the domain XML that follows the VM; made if there is none")
    parser.add_argument("wish", help="the vCPUs that it should have, such as 0,2-5")
    parser.add_argument("--interrupted", choices=["finish", "revert"], default="revert", help="what to do with that")
    options = parser.parse_args()
    try:
        async with qmpvcpu.attach(options.address, record=options.record) as vm:
            await recovered(vm, Recovery(options.interrupted))
            print(await vm.set_map(options.wish, on_failure=OnFailure.REVERT, timeout=30))
    except qmpvcpu.TransitionError as error:
        print(error.report)
        return 1
    except qmpvcpu.QmpVcpuError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
