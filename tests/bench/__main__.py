"""Measure qmpvcpu beside raw QMP and libvirt, print the table, and publish it in docs/.

Everybody works on QEMUs of the same binary with the same guest, in turns, in one process (libvirt-python in its own,
beside it), so that whatever else the machine does meets all alike. The ratios of medians count, not the times.
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from rich.console import Console

from qmpvcpu.testing import best_qemu, probe_accelerator
from tests.bench import bulk, documents, fleet, hosts, large, placed, processes, reads, record, single
from tests.bench.publish import machine, merge, publish, redraw
from tests.bench.row import Row
from tests.bench.setting import Setting
from tests.bench.table import goal_lines, terminal
from tests.libvirt.daemon import running_libvirtd
from tests.substrates import qemus

PARTS: dict[str, Callable[[Setting], AsyncIterator[Row]]] = {
    "single": single.measure,
    "bulk": bulk.measure,
    "placed": placed.measure,
    "reads": reads.measure,
    "record": record.measure,
    "processes": processes.measure,
    "large": large.measure,
    "documents": documents.measure,
    "fleet": fleet.measure,
    "hosts": hosts.measure,
}


async def main() -> None:
    """Measure, print, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none: all of them")
    parser.add_argument("--rounds", type=int, default=7, help="alternations, at least (%(default)s)")
    parser.add_argument(
        "--hosts", type=_sizes, default=(10, 30, 100, 300), metavar="N,N", help="numbers of hosts (10,30,100,300)"
    )
    parser.add_argument("--no-libvirt", action="store_true", help="leave libvirt out")
    parser.add_argument("--no-publish", action="store_true", help="only print; so it is with a PART, too")
    parser.add_argument(
        "--merge", action="store_true", help="publish the PARTs that were measured, and keep the rest"
    )
    parser.add_argument("--redraw", action="store_true", help="only write the page anew, from its JSON")
    options = parser.parse_args()
    if options.redraw:
        redraw()
        return
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    console = Console(width=150)
    start = time.monotonic()
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        # Not in /tmp, which is often in memory: fsync counts.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.home())))
        libvirt = None if options.no_libvirt else stack.enter_context(running_libvirtd())
        kvm = await probe_accelerator(best_qemu()) == "kvm"
        setting = Setting(
            qemus(), kvm=kvm, libvirt=libvirt, folder=folder, rounds=options.rounds, hosts=options.hosts
        )
        for part in options.parts or PARTS:
            rows += [row async for row in PARTS[part](setting)]
            console.print(f"{time.monotonic() - start:6.1f} s  {part}", style="dim")
        on = machine(setting)
    console.print(terminal(rows))
    console.print(on, highlight=False)
    for line in goal_lines(rows):
        console.print(line, highlight=False)
    if options.merge:
        merge(rows, options.parts or PARTS, on)
    elif not options.parts and not options.no_publish:
        publish(rows, on, time.monotonic() - start)
    if options.merge or not (options.parts or options.no_publish):
        console.print("written: docs/performance.md, docs/performance.json, docs/performance.svg")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, text.split(","))))


if __name__ == "__main__":
    asyncio.run(main())
