"""Layouts of hundreds and thousands of slots, from replies as QEMU gives them: is the cost linear?"""

import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from typing import Any

from qmpvcpu import Layout, VcpuMap, qapi
from qmpvcpu.domainxml import render
from qmpvcpu.engine.vmstate import SlotTable
from qmpvcpu.model.vm import Topology, VmInfo, VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import plan_map
from qmpvcpu.qapi import build_slots, creation_order
from tests.bench.row import Goal, Row, Samples
from tests.bench.setting import Setting

__all__ = ["measure"]

SIZES = (255, 1024, 4096)
# A quarter more for each slot is what caches cost; quadratic would be sixteen times.
MOST_GROWTH = 1.5
WORKS = {
    "parse": "both replies (as json.loads gives them) to a Layout, all slots plugged; CPU time, as in the next three",
    "plan": "what it takes from one vCPU to all",
    "render": "the Layout as libvirt's <domain>",
    "change": "one slot's change, as an event brings it, and a Layout of it for whoever looks at each",
    "memory": "what a Layout holds, all slots plugged; kB for each slot",
}


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Measure each piece of work for each size, per slot: linear if the numbers of a row are alike."""
    samples = Samples()
    for _ in range(setting.rounds):
        for slots in SIZES:
            for work, took in _take(slots).items():
                samples.note(work, _name(slots), took)
    goals = tuple(Goal(_name(size), MOST_GROWTH, _name(SIZES[0])) for size in SIZES[1:])
    for work, reads in WORKS.items():
        unit = "kB" if work == "memory" else "µs"
        bounds = () if work == "change" else goals
        yield Row(f"{work}, each slot", "synthetic replies", reads, samples[work], unit, bounds)


def _name(slots: int) -> str:
    return f"{slots:,} slots"


def _take(slots: int) -> dict[str, float]:
    """Microseconds of CPU time (memory: kB) a slot."""
    hotpluggable, fast = _replies(slots)
    took: dict[str, float] = {}

    def timed(work: str, do: Callable[[], Any], times: int) -> Any:
        gc.collect()
        start = time.process_time()
        result = do()
        took[work] = (time.process_time() - start) * 1e6 / times
        return result

    layout: Layout = timed("parse", lambda: _layout(hotpluggable, fast), slots)
    empty = layout
    table = SlotTable(layout)
    for slot in layout.slots[1:]:
        table.put(slot.emptied())
    empty = table.layout
    now = Situation(layout=empty, status=VmStatus("running"), created=1)
    timed("plan", lambda: plan_map(now, VcpuMap(range(slots))), slots)
    timed("render", lambda: render(layout), slots)

    def change() -> None:
        for slot in empty.slots[1:51]:
            table.put(slot.filled(slot.new_qom_path))
            assert table.layout.slots

    timed("change", change, 50)
    del layout
    tracemalloc.start()
    layout = _layout(hotpluggable, fast)
    assert layout.enabled
    took["memory"] = tracemalloc.get_traced_memory()[0] / 1000 / slots
    tracemalloc.stop()
    return took


def _layout(hotpluggable: list[dict[str, Any]], fast: list[dict[str, Any]]) -> Layout:
    threads = qapi.parse_cpus_fast(fast)
    slots = build_slots(qapi.parse_hotpluggable_cpus(hotpluggable), threads)
    topology = Topology(max_cpus=len(slots), sockets=len(slots))
    vm = VmInfo("bench", "x86_64", "pc-q35-10.0", "kvm", (10, 0, 2), memory_kib=16384, topology=topology)
    return Layout(vm=vm, slots=slots, creation=creation_order(slots, threads))


def _replies(slots: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both queries' replies, of a q35 whose slots are all plugged."""
    props = [{"socket-id": number, "core-id": 0, "thread-id": 0} for number in range(slots)]
    paths = ["/machine/unattached/device[0]", *(f"/machine/peripheral/vcpu{number}" for number in range(1, slots))]
    hotpluggable = [
        {"type": "qemu64-x86_64-cpu", "vcpus-count": 1, "props": props[number], "qom-path": paths[number]}
        for number in reversed(range(slots))
    ]
    fast = [
        {"thread-id": 10_000 + number, "cpu-index": number, "qom-path": paths[number], "props": props[number]}
        for number in range(slots)
    ]
    return hotpluggable, fast
