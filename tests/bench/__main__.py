"""One vCPU and whole maps against raw QMP and libvirt, and what importing costs.

QEMUs of the same kind, one driven by `QMPClient.execute` alone, the others by us and by libvirt, take turns cycle by
cycle, so that whatever else the machine does meets all alike. Medians, in milliseconds; the ratio is what counts.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient
from rich.console import Console
from rich.table import Table

import qmpvcpu
from qmpvcpu.testing import MicroGuest, best_qemu, find_qemus, probe_accelerator
from tests.bench import bulk, documents
from tests.bench.raw import Raw, timed
from tests.libvirt.daemon import running_libvirtd

VCPUS = 15
WARM_UP = 3  # of each fifteen


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
    parser.add_argument("--documents", action="store_true", help="measure only what documents cost; needs no QEMU")
    parser.add_argument("--bulk-rounds", type=int, default=7, help="of whole maps")
    options = parser.parse_args()
    console = Console(width=110)
    console.print(document_table(options.rounds))
    if options.documents:
        return
    kvm = await probe_accelerator(best_qemu()) == "kvm"
    table = Table("work", "QEMU", "raw, ms", "qmpvcpu, ms", "ratio", title="qmpvcpu against raw QMP, medians")
    for version, qemu in find_qemus().items():
        for accel in ("kvm", "tcg") if kvm else ("tcg",):
            rounds = options.rounds if accel == "kvm" else max(options.rounds // 5, 1)
            for work, raw, ours in await compare(qemu, accel, rounds):
                table.add_row(work, f"{version} {accel}", f"{raw:.2f}", f"{ours:.2f}", f"{ours / raw:.2f}")
    base, ours = import_cost(21)
    table.add_row("import", "", f"{base:.1f}", f"{ours:.1f}", f"+{ours - base:.1f} ms")
    console.print(table)
    if kvm:
        console.print(await bulk_table(options.bulk_rounds))
    else:
        console.print("whole maps: left out, KVM runs no guest here")


def document_table(rounds: int) -> Table:
    """Measure documents, and return the table."""
    table = Table("work", "vCPUs", "median, ms", "min, ms", "target, ms", title="Domain documents, processor time")
    for cost in documents.measure(rounds):
        target = "" if cost.target is None else f"{cost.target:.0f}{'' if cost.median < cost.target else ' MISSED'}"
        table.add_row(cost.work, f"{cost.vcpus:,}", f"{cost.median:.1f}", f"{cost.least:.1f}", target)
    return table


async def bulk_table(rounds: int) -> Table:
    """Measure whole maps, and return the table."""
    table = Table("work", "QEMU", "who", "median, ms", "min", "max", "/ raw", "/ libvirt", title="Whole maps, KVM")
    with running_libvirtd() as libvirt:
        for version, qemu in find_qemus().items():
            for vcpus in (64, 240):
                for row in await bulk.measure(qemu, vcpus, rounds, libvirt):
                    against = "" if row.libvirt is None else f"{row.median / row.libvirt:.2f}"
                    numbers = (row.median, min(row.times), max(row.times))
                    shown = [f"{number:.0f}" for number in numbers]
                    table.add_row(row.work, version, row.who, *shown, f"{row.median / row.raw:.2f}", against)
                table.add_section()
    return table


if __name__ == "__main__":
    asyncio.run(main())
