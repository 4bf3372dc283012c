"""What documents of many vCPUs cost: rendered, read, and changed in place.

In processor time: it is all that there is to it, and what else the machine does is no part of it.
"""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from qmpvcpu.domainxml import Metadata, parse, render
from tests.bench.row import Goal, Row, Samples
from tests.bench.setting import Setting
from tests.domainxml.examples import Q35, layout_of

__all__ = ["measure"]

COUNTS = (255, 1024, 4096)
GOALS = {"render": Goal("4,096 vCPUs", 50.0), "one vCPU in place": Goal("4,096 vCPUs", 100.0)}
READS = {
    "render": "a document with its record, from a Layout",
    "parse": "a document read and checked",
    "one vCPU in place": "a document of somebody else's, in which one vCPU is another",
    "all vCPUs in place": "the same, in which every vCPU's order is another",
}
VM = replace(Q35, machine="pc-q35-10.0")
# libvirt refuses more than 255 vCPUs without it, and so do we.
IOMMU = b"""  <devices>
    <iommu model='intel'>
      <driver intremap='on' eim='on'/>
    </iommu>
  </devices>
</domain>
"""


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Render, read and change documents of VMs with all vCPUs plugged, by descending id."""
    samples = Samples()
    for count in COUNTS:
        for work, run in _works(count).items():
            for _ in range(setting.rounds):
                samples.note(work, f"{count:,} vCPUs", _timed(run))
    for work, reads in READS.items():
        goals = (GOALS[work],) if work in GOALS else ()
        yield Row(f"{work}, CPU time", "domain documents", reads, samples[work], goals=goals)


def _works(count: int) -> dict[str, Callable[[], object]]:
    order = range(count - 1, 0, -1)
    full = layout_of(count, [0, *order], boot=1, vm=VM)
    before = layout_of(count, [0, *order[:-1]], boot=1, vm=VM)
    reordered = layout_of(count, [0, *reversed(order)], boot=1, vm=VM)
    base = render(before, metadata=Metadata().with_layout(before)).replace(b"</domain>\n", IOMMU)
    metadata = Metadata(generation=1).with_layout(full)
    return {
        "render": lambda: render(full, metadata=metadata),
        "parse": lambda: parse(base),
        "one vCPU in place": lambda: render(full, base=base, metadata=metadata),
        "all vCPUs in place": lambda: render(reordered, base=base, metadata=metadata),
    }


def _timed(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1000
