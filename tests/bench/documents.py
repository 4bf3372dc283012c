"""What documents of many vCPUs cost: rendered, read, and changed in place.

In processor time: it is all that there is to it, and what else the machine does is no part of it.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qmpvcpu.domainxml import Metadata, parse, render
from tests.domainxml.examples import Q35, layout_of

__all__ = ["Cost", "measure"]

COUNTS = (255, 1024, 4096)
TARGETS_MS = {("render", 4096): 50.0, ("one vCPU in place", 4096): 100.0}
VM = replace(Q35, machine="pc-q35-10.0")
# libvirt refuses more than 255 vCPUs without it, and so do we.
IOMMU = b"""  <devices>
    <iommu model='intel'>
      <driver intremap='on' eim='on'/>
    </iommu>
  </devices>
</domain>
"""


@dataclass(frozen=True)
class Cost:
    """One line of the table, in milliseconds of processor time.

    Attributes:
        work: What was done.
        vcpus: To a document of how many vCPUs.
        median: Of all rounds.
        least: The quickest.
        target: What it is to stay below, or None.
    """

    work: str
    vcpus: int
    median: float
    least: float
    target: float | None


def measure(rounds: int) -> list[Cost]:
    """Render, read and change documents of VMs with all vCPUs plugged, by descending id."""
    return [cost for count in COUNTS for cost in _measure(count, rounds)]


def _measure(count: int, rounds: int) -> Iterator[Cost]:
    order = range(count - 1, 0, -1)
    full = layout_of(count, [0, *order], boot=1, vm=VM)
    before = layout_of(count, [0, *order[:-1]], boot=1, vm=VM)
    reordered = layout_of(count, [0, *reversed(order)], boot=1, vm=VM)
    base = render(before, metadata=Metadata.of(before)).replace(b"</domain>\n", IOMMU)
    metadata = Metadata.of(full, generation=1)
    works: dict[str, Callable[[], object]] = {
        "render": lambda: render(full, metadata=metadata),
        "parse": lambda: parse(base),
        "one vCPU in place": lambda: render(full, base=base, metadata=metadata),
        "all vCPUs in place": lambda: render(reordered, base=base, metadata=metadata),
    }
    for work, run in works.items():
        times = [_timed(run) for _ in range(rounds)]
        yield Cost(work, count, statistics.median(times), min(times), TARGETS_MS.get((work, count)))


def _timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1000
