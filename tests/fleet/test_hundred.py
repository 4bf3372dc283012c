"""A hundred real QEMUs on one event loop, beside the same done raw; the figures stand in pytest's summary."""

import asyncio
import contextlib
import gc
import statistics
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, QMPClient

from qmpvcpu.events import VmResumed, VmStopped
from qmpvcpu.fleet import Fleet, FleetEvents, Results
from qmpvcpu.model.layout import Slot
from qmpvcpu.testing import MicroGuest
from tests.bench.raw import Raw
from tests.bench.setting import timed
from tests.figures import FLEET
from tests.fleet.vms import guests

pytestmark = [pytest.mark.qemu]

Queries = tuple[tuple[str, dict[str, object] | None], ...]
Times = dict[str, list[float]]

MANY = 100
ROUNDS = 3
# Attaching reads more than what a list needs: identity, machine, run state, unanswered removals. So it is measured
# against both: the two queries that make a list, and all that we ask.
LISTING: Queries = (("query-hotpluggable-cpus", None), ("query-cpus-fast", None))
ATTACHING: Queries = (
    *LISTING,
    *((f"query-{each}", None) for each in ("status", "migrate", "acpi-ospm-status", "kvm", "name", "uuid")),
    ("query-memory-size-summary", None),
    ("qom-get", {"path": "/machine", "property": "type"}),
    ("qom-get", {"path": "/machine", "property": "smp"}),
    ("qom-list", {"path": "/objects"}),
)
PHASES = ("attach", "attach, same asked", "list", "plug one each", "unplug one each", "close")


async def test_a_hundred_qemus_at_once(record_property: Any) -> None:
    ours: Times = {phase: [] for phase in PHASES}
    theirs: Times = {phase: [] for phase in PHASES}
    cpu: Times = {phase: [] for phase in PHASES}
    started = time.perf_counter()
    async with guests(MANY) as vms:
        starting = time.perf_counter() - started
        async with Fleet([each.qmp for each in vms]) as fleet:
            await fleet.attach()
            slots = next(iter(fleet.vms.values())).layout.slots
        for _ in range(ROUNDS):
            await raw_phases(vms, slots, theirs)
            await our_phases(vms, ours, cpu)
        events = await events_to_all(vms)
    record_property(FLEET, [*table(ours, theirs, cpu, events), f"  started in {starting:.1f} s"])


async def our_phases(vms: Sequence[MicroGuest], wall: Times, cpu: Times) -> None:
    async with Fleet([each.qmp for each in vms], reply_timeout=30) as fleet:

        async def phase(name: str, work: Awaitable[object]) -> None:
            before = time.process_time()
            wall[name].append(await timed(work))
            cpu[name].append((time.process_time() - before) * 1000)

        async def work(results: Results[Any]) -> None:
            ended = await results
            assert [each.error for each in ended] == [None] * MANY

        await phase("attach", work(fleet.attach()))
        for figures in (wall, cpu):
            figures["attach, same asked"] = figures["attach"]
        await phase("list", work(fleet.refresh()))
        await phase("plug one each", work(fleet.each(lambda vm: vm.plug(1))))
        assert {str(vm.layout.enabled) for vm in fleet.vms.values()} == {"0-1"}
        await phase("unplug one each", work(fleet.each(lambda vm: vm.unplug(1))))
        assert {str(vm.layout.enabled) for vm in fleet.vms.values()} == {"0"}
        await phase("close", fleet.close())


async def raw_phases(vms: Sequence[MicroGuest], slots: Sequence[Slot], wall: Times) -> None:
    """The same with QMPClient alone, commands known beforehand, all VMs at once."""
    clients = [QMPClient(f"raw{number}") for number in range(len(vms))]
    listeners = [
        EventListener(names="DEVICE_DELETED" if vm.accelerator == "kvm" else "ACPI_DEVICE_OST") for vm in vms
    ]
    raws = [
        Raw(client, slots[1:2], listener, tcg=vm.accelerator == "tcg")
        for client, listener, vm in zip(clients, listeners, vms, strict=True)
    ]

    async def phase(name: str, works: Sequence[Awaitable[object]]) -> None:
        wall[name].append(await timed(asyncio.gather(*works)))

    async def ask(client: QMPClient, queries: Queries) -> None:
        await asyncio.gather(*(client.execute(name, arguments) for name, arguments in queries))

    async def connect(client: QMPClient, path: Path, queries: Queries) -> None:
        await client.connect(str(path))
        await ask(client, queries)

    for client, listener in zip(clients, listeners, strict=True):
        client.register_listener(listener)
    for name, queries in (("attach", LISTING), ("attach, same asked", ATTACHING)):
        await phase(name, [connect(client, vm.qmp, queries) for client, vm in zip(clients, vms, strict=True)])
        if queries is LISTING:
            await asyncio.gather(*(client.disconnect() for client in clients))
    await phase("list", [ask(client, LISTING) for client in clients])
    await phase("plug one each", [raw.plug(1) for raw in raws])
    await phase("unplug one each", [raw.unplug(1) for raw in raws])
    await phase("close", [client.disconnect() for client in clients])


async def events_to_all(vms: Sequence[MicroGuest]) -> tuple[float, float]:
    """Stop and resume every VM; return the milliseconds until the last event was here, by us and raw, at once."""
    async with Fleet([each.sockets[1] for each in vms], reply_timeout=30) as fleet, raw_clients(vms) as clients:
        await fleet.attach()
        merged = fleet.events()

        async def see(name: str, client: QMPClient) -> None:
            with client.listener(name) as listener:
                await listener.get()

        taken: list[tuple[float, float]] = []
        for command, name, kind in (("stop", "STOP", VmStopped), ("cont", "RESUME", VmResumed)):
            seeing = asyncio.ensure_future(timed(asyncio.gather(*(see(name, client) for client in clients))))
            merging = asyncio.ensure_future(timed(take(merged, kind)))
            await asyncio.gather(*(client.execute(command) for client in clients))
            taken.append((await merging, await seeing))
        return statistics.mean(each[0] for each in taken), statistics.mean(each[1] for each in taken)


async def take(merged: FleetEvents, kind: type) -> None:
    left = MANY
    async for each in merged:
        left -= isinstance(each.event, kind)
        if not left:
            return


@contextlib.asynccontextmanager
async def raw_clients(vms: Sequence[MicroGuest]) -> AsyncIterator[list[QMPClient]]:
    clients = [QMPClient(f"raw{number}") for number in range(len(vms))]
    for client in clients:
        client.events.event_filter = lambda _: False  # it keeps all events for ever
    await asyncio.gather(*(client.connect(str(vm.qmp)) for client, vm in zip(clients, vms, strict=True)))
    try:
        yield clients
    finally:
        await asyncio.gather(*(client.disconnect() for client in clients))


def table(ours: Times, theirs: Times, cpu: Times, events: tuple[float, float]) -> list[str]:
    lines = [f"fleet: {MANY} QEMUs on one loop, in turn with QMPClient; medians of {ROUNDS}, ms for all of them"]
    for phase in PHASES:
        wall, raw = statistics.median(ours[phase]), statistics.median(theirs[phase])
        each = statistics.median(cpu[phase]) / MANY
        lines.append(
            f"  {phase:<20}{wall:5.0f}, raw {raw:5.0f}, ratio {wall / raw:5.2f}; our CPU {each:5.2f} for each VM"
        )
    merged, raw = events
    lines.append(f"  {'events to all':<20}{merged:5.0f}, raw {raw:5.0f}, ratio {merged / raw:5.2f}")
    return lines


async def test_an_attached_vm_takes_less_than_100_kb(record_property: Any) -> None:
    count = 20
    async with guests(count) as vms:

        async def attached() -> tuple[int, Fleet]:
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            fleet = Fleet([each.qmp for each in vms])
            assert [each.error for each in await fleet.refresh()] == [None] * count
            gc.collect()
            return (tracemalloc.get_traced_memory()[0] - before) // count, fleet

        tracemalloc.start()
        try:
            _, fleet = await attached()  # what the first one imports and caches
            await fleet.close()
            del fleet
            ours, fleet = await attached()
            await fleet.close()
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            async with raw_clients(vms):
                gc.collect()
                theirs = (tracemalloc.get_traced_memory()[0] - before) // count
        finally:
            tracemalloc.stop()
    sizes = f"{ours / 1000:.1f} kB for each attached VM of 8 slots; a QMPClient alone {theirs / 1000:.1f} kB"
    record_property(FLEET, [f"fleet: memory {sizes}"])
    assert ours < 100_000
