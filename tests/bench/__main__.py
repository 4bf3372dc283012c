"""One plug and one unplug against raw QMP, and what importing costs.

Two QEMUs of the same kind, one driven by `QMPClient.execute` alone, one by us, take turns cycle by cycle, so that
whatever else the machine does meets both alike. Medians, in milliseconds; the ratio is what counts.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, QMPClient
from rich.console import Console
from rich.table import Table

import qmpvcpu
from qmpvcpu import Slot, qapi
from qmpvcpu.testing import MicroGuest, best_qemu, find_qemus, probe_accelerator

VCPUS = 15
WARM_UP = 3  # of each fifteen


async def timed(work: Awaitable[object]) -> float:
    """Milliseconds that *work* takes."""
    start = time.perf_counter()
    await work
    return (time.perf_counter() - start) * 1000


class Raw:
    """What a careful program does without us: the arguments known beforehand, the CPU's own event awaited."""

    def __init__(self, client: QMPClient, slots: Sequence[Slot], listener: EventListener, *, tcg: bool) -> None:
        self._client = client
        self._arguments = {slot.first: qapi.device_add(slot) for slot in slots}
        self._listener = listener
        self._tcg = tcg

    async def plug(self, vcpu: int) -> None:
        """One device_add."""
        await self._client.execute("device_add", self._arguments[vcpu])

    async def unplug(self, vcpu: int) -> None:
        """device_del, and the wait for its proof; under TCG that is a query after the guest's answer."""
        await self._client.execute("device_del", {"id": f"vcpu{vcpu}"})
        while True:
            event = await self._listener.get()
            data: Any = event["data"]
            if self._tcg:
                info = data.get("info", {})
                if (info.get("source"), info.get("status")) == (3, 0):
                    await self._client.execute("query-hotpluggable-cpus")
                    return
            elif data.get("path") == f"/machine/peripheral/vcpu{vcpu}":
                return


async def compare(qemu: Path, accel: Any, rounds: int) -> list[tuple[str, float, float]]:
    """Medians of one plug and one unplug, raw and ours; each round plugs 15 vCPUs and then takes them out."""
    taken: dict[str, list[float]] = {"raw plug": [], "our plug": [], "raw unplug": [], "our unplug": []}
    # QEMU under TCG does not survive more CPUs than maxcpus in its life (7.2: none after an unplug): new VMs a round.
    for _ in range(1 if accel == "kvm" else rounds):
        async with (
            MicroGuest(qemu, accel=accel, max_vcpus=VCPUS + 1) as one,
            MicroGuest(qemu, accel=accel, max_vcpus=VCPUS + 1) as two,
            qmpvcpu.attach(two.qmp) as vm,
        ):
            client = QMPClient("bench")
            await client.connect(str(one.qmp))
            # Only TCG has no event of the CPU's own; under KVM the guest's answers are of no interest.
            with client.listener("ACPI_DEVICE_OST" if accel == "tcg" else "DEVICE_DELETED") as listener:
                raw = Raw(client, [slot for slot in vm.layout.slots if slot.first], listener, tcg=accel == "tcg")
                for _ in range(rounds if accel == "kvm" else 1):
                    for action in ("plug", "unplug"):
                        for vcpu in range(1, VCPUS + 1):
                            theirs = await timed(getattr(raw, action)(vcpu))
                            ours = await timed(getattr(vm, action)(vcpu))
                            if vcpu > WARM_UP:
                                taken[f"raw {action}"].append(theirs)
                                taken[f"our {action}"].append(ours)
            await client.disconnect()
    middle = {name: statistics.median(values) for name, values in taken.items()}
    return [
        ("plug one", middle["raw plug"], middle["our plug"]),
        ("unplug one, proven", middle["raw unplug"], middle["our unplug"]),
    ]


def import_cost(runs: int) -> tuple[float, float]:
    """Milliseconds to start Python with asyncio and qemu.qmp, and with qmpvcpu besides; medians, taking turns."""
    # Byte code is kept, as it is for any installed package.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    programs = {"base": "import asyncio, qemu.qmp", "ours": "import asyncio, qemu.qmp, qmpvcpu"}
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(runs):
        for name, program in programs.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, env=environment)
            taken[name].append((time.perf_counter() - start) * 1000)
    return statistics.median(taken["base"]), statistics.median(taken["ours"])


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="of 15 plugs and 15 unplugs each; TCG gets a fifth")
    options = parser.parse_args()
    table = Table("work", "QEMU", "raw, ms", "qmpvcpu, ms", "ratio", title="qmpvcpu against raw QMP, medians")
    for version, qemu in find_qemus().items():
        for accel in ("kvm", "tcg") if await probe_accelerator(best_qemu()) == "kvm" else ("tcg",):
            rounds = options.rounds if accel == "kvm" else max(options.rounds // 5, 1)
            for work, raw, ours in await compare(qemu, accel, rounds):
                table.add_row(work, f"{version} {accel}", f"{raw:.2f}", f"{ours:.2f}", f"{ours / raw:.2f}")
    base, ours = import_cost(21)
    table.add_row("import", "", f"{base:.1f}", f"{ours:.1f}", f"+{ours - base:.1f} ms")
    Console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
