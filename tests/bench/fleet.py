"""Many VMs on one loop: attach, list, plug one each, unplug one each, an event to all."""

import asyncio
import contextlib
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu.events import VmStopped
from qmpvcpu.fleet import Fleet
from qmpvcpu.testing import MicroGuest
from qmpvcpu.vm.subscribers import EventStream
from tests.bench.libvirtd import VCPU_STATS, peer, run_domain
from tests.bench.raw import ALL_QUERIES, Raw
from tests.bench.row import LIBVIRT, OURS, RAW, Goal, Row, Samples
from tests.bench.setting import Setting, timed
from tests.metrics.scraping import GET, exporting
from tests.waiting import until

__all__ = ["measure"]

SIZES = (1, 10, 50, 100)
SLOTS = 8
STARTING = 4  # at once
TRACED = 20  # VMs
IDLE_S = 2.0
SAME = f"raw QMP, all {len(ALL_QUERIES)} queries"

WORKS = {
    "attach and list": "connect to all at once, and know every slot of each; raw: connect, and the two queries; "
    f"{SAME}: what a raw program asks to know of each VM what qmpvcpu knows",
    "list again": "vm.refresh() of all; raw: the two queries each; libvirt: getAllDomainStats of its own VMs",
    "plug one each": "one vCPU into each, all at once",
    "unplug one each": "and out of each, proven",
    "an event to all": "from another client's `stop` of all until everybody has heard of each",
}
MEMORY = "what tracemalloc counts for one more attached VM of 8 slots, qemu.qmp's own share (raw: connected) included"
CPU = "time of this process alone to attach and list, each VM"
QEMUS_CPU = "time of the QEMU at the other end while it is attached and listed"
SCRAPE = (
    f"GET of qmpvcpu exporter, all {SLOTS} vCPUs of each VM plugged: every VM is read, and a page of 7,000 lines is"
    " rendered"
)
IDLE = "CPU time that 100 attached VMs cost while nothing happens, each second"


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Compare one loop with many VMs; libvirt's are VMs of its own."""
    qemu = setting.qemus[setting.newest]
    async with contextlib.AsyncExitStack() as stack:
        guests = await _start(stack, setting)
        domains = stack.enter_context(contextlib.ExitStack())
        theirs = stack.enter_context(peer(setting.libvirt, qemu, SLOTS, accel=setting.accel))
        before = 1
        for size in SIZES:
            await _start_domains(domains, setting, range(before, size))
            before = size
            samples = Samples()
            for number in range(setting.rounds + 1):
                round_ = Samples() if number == 0 else samples  # the first one warms everybody up
                await _raw_round(round_, guests[:size], setting)
                await _our_round(round_, guests[:size])
                if theirs is not None:
                    round_.note("list again", LIBVIRT, theirs.call("getAllDomainStats", VCPU_STATS))
            name = f"{setting.named(setting.newest, SLOTS)}, {size} VMs"
            goals = {"attach and list": (Goal(OURS, 2.0, RAW), Goal(OURS, 2.0, SAME))} if size == max(SIZES) else {}
            for work, reads in WORKS.items():
                if samples[work]:
                    yield Row(work, name, reads, samples[work], goals=goals.get(work, ()))
            yield Row("attach and list, CPU each", name, CPU, samples["cpu"])
            yield Row("attach and list, QEMU's CPU each", name, QEMUS_CPU, samples["QEMU's cpu"])
        yield Row(
            "memory of one VM", f"{SLOTS} slots", MEMORY, await _memory(guests[:TRACED]), "kB", (Goal(OURS, 100),)
        )
        yield Row("idle", f"{len(guests)} VMs", IDLE, await _idle(guests))
        name = f"{setting.named(setting.newest, SLOTS)}, {len(guests)} VMs"
        scraped = await _scraped(guests, setting)
        yield Row("scrape of the exporter", name, SCRAPE, scraped, goals=(Goal(OURS, 250),))


async def _start(stack: contextlib.AsyncExitStack, setting: Setting) -> list[MicroGuest]:
    room = asyncio.Semaphore(STARTING)

    async def one() -> MicroGuest:
        async with room:
            guest = MicroGuest(setting.qemus[setting.newest], accel=setting.accel, max_vcpus=SLOTS)  # type: ignore[arg-type]  # a literal
            return await stack.enter_async_context(guest)

    return await asyncio.gather(*(one() for _ in range(max(SIZES))))


async def _start_domains(stack: contextlib.ExitStack, setting: Setting, numbers: range) -> None:
    """Have libvirt run more VMs, some at once."""
    if setting.libvirt is None:
        return
    libvirt, qemu = setting.libvirt, setting.qemus[setting.newest]
    room = asyncio.Semaphore(STARTING)

    async def one(number: int) -> None:
        async with room:
            await asyncio.to_thread(run_domain, stack, libvirt, qemu, SLOTS, accel=setting.accel, number=number)

    await asyncio.gather(*map(one, numbers))


def _all(
    each: Callable[[Path], Awaitable[object]], guests: Sequence[MicroGuest], socket: int = 0
) -> Awaitable[object]:
    return asyncio.gather(*(each(guest.sockets[socket]) for guest in guests))


async def _raw_attach(samples: Samples, guests: Sequence[MicroGuest], who: str, queries: int) -> list[QMPClient]:
    clients: list[QMPClient] = []

    async def listed(socket: Path) -> None:
        client = QMPClient("bench")
        client.events.event_filter = lambda _: False
        await client.connect(str(socket))
        clients.append(client)
        await Raw(client, (), client.events, tcg=False).read(queries)

    await _note_attaching(samples, guests, who, listed)
    return clients


async def _note_attaching(
    samples: Samples, guests: Sequence[MicroGuest], who: str, each: Callable[[Path], Awaitable[object]]
) -> None:
    before, theirs = time.process_time(), _cpu_of(guests)
    samples.note("attach and list", who, await timed(_all(each, guests)))
    samples.note("cpu", who, (time.process_time() - before) * 1000 / len(guests))
    samples.note("QEMU's cpu", who, (_cpu_of(guests) - theirs) / len(guests))


def _cpu_of(guests: Sequence[MicroGuest]) -> float:
    """Return the CPU time of all threads of all QEMUs until now, in milliseconds."""
    threads = (thread for guest in guests for thread in Path(f"/proc/{guest.process.pid}/task").iterdir())
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


async def _raw_round(samples: Samples, guests: Sequence[MicroGuest], setting: Setting) -> None:
    clients = await _raw_attach(samples, guests, RAW, 2)
    await asyncio.gather(*(client.disconnect() for client in clients))
    clients = await _raw_attach(samples, guests, SAME, len(ALL_QUERIES))
    raws: list[Raw] = []
    async with qmpvcpu.attach(guests[0].sockets[1]) as vm:
        slots = vm.layout.slots[1:]
    with contextlib.ExitStack() as listening:
        proof = "DEVICE_DELETED" if setting.kvm else "ACPI_DEVICE_OST"
        for client in clients:
            listener = listening.enter_context(client.listener(proof))
            raws.append(Raw(client, slots, listener, tcg=not setting.kvm))
        samples.note("list again", RAW, await timed(asyncio.gather(*(raw.read() for raw in raws))))
        if setting.kvm:  # under TCG no QEMU survives this many
            samples.note("plug one each", RAW, await timed(asyncio.gather(*(raw.plug(1) for raw in raws))))
            samples.note("unplug one each", RAW, await timed(asyncio.gather(*(raw.unplug(1) for raw in raws))))
    with contextlib.ExitStack() as listening:
        stops = [listening.enter_context(client.listener("STOP")) for client in clients]
        samples.note("an event to all", RAW, await _told(guests, [listener.get() for listener in stops]))
    await asyncio.gather(*(client.disconnect() for client in clients))


async def _our_round(samples: Samples, guests: Sequence[MicroGuest]) -> None:
    vms: list[qmpvcpu.VcpuController] = []

    async def listed(socket: Path) -> None:
        vms.append(await qmpvcpu.attach(socket))

    await _note_attaching(samples, guests, OURS, listed)
    assert all(vm.layout.max == SLOTS for vm in vms)
    samples.note("list again", OURS, await timed(asyncio.gather(*(vm.refresh() for vm in vms))))
    if guests[0].accelerator == "kvm":
        samples.note("plug one each", OURS, await timed(asyncio.gather(*(vm.plug(1) for vm in vms))))
        samples.note("unplug one each", OURS, await timed(asyncio.gather(*(vm.unplug(1) for vm in vms))))
    streams = [vm.events() for vm in vms]
    samples.note("an event to all", OURS, await _told(guests, [_stopped(stream) for stream in streams]))
    await asyncio.gather(*(vm.close() for vm in vms))


async def _stopped(stream: EventStream) -> None:
    while not isinstance(await anext(stream), VmStopped):
        pass


async def _told(guests: Sequence[MicroGuest], hearing: Sequence[Awaitable[object]]) -> float:
    """Stop all VMs from another socket; milliseconds until all *hearing* is done. They run again after it."""
    others: list[QMPClient] = []

    async def joined(socket: Path) -> None:
        client = QMPClient("other")
        client.events.event_filter = lambda _: False
        await client.connect(str(socket))
        others.append(client)

    await _all(joined, guests, 1)
    start = time.perf_counter()
    heard = asyncio.gather(*hearing)
    stopping = asyncio.gather(*(other.execute("stop") for other in others))
    await heard
    took = (time.perf_counter() - start) * 1000
    await stopping
    await asyncio.gather(*(other.execute("cont") for other in others))
    await asyncio.gather(*(other.disconnect() for other in others))
    return took


async def _memory(guests: Sequence[MicroGuest]) -> dict[str, tuple[float, ...]]:
    """KB for each of *guests*, connected and attached."""
    clients = [QMPClient("bench") for _ in guests]
    found: dict[str, tuple[float, ...]] = {}
    async with qmpvcpu.attach(guests[0].sockets[1]):  # imports and caches are not the VM's
        pass
    tracemalloc.start()
    try:
        before = _traced()
        await asyncio.gather(*(client.connect(str(guest.qmp)) for client, guest in zip(clients, guests, strict=True)))
        found[RAW] = ((_traced() - before) / len(guests),)
        await asyncio.gather(*(client.disconnect() for client in clients))
        before = _traced()
        vms = [await qmpvcpu.attach(guest.qmp) for guest in guests]
        assert all(len(vm.layout.vcpus) == SLOTS for vm in vms)
        found[OURS] = ((_traced() - before) / len(guests),)
        await asyncio.gather(*(vm.close() for vm in vms))
    finally:
        tracemalloc.stop()
    return found


def _traced() -> float:
    gc.collect()
    return tracemalloc.get_traced_memory()[0] / 1000


async def _idle(guests: Sequence[MicroGuest]) -> dict[str, tuple[float, ...]]:
    """Milliseconds of CPU time a second."""
    vms = await asyncio.gather(*(qmpvcpu.attach(guest.qmp).__aenter__() for guest in guests))
    before = time.process_time()
    await asyncio.sleep(IDLE_S)
    took = (time.process_time() - before) * 1000 / IDLE_S
    await asyncio.gather(*(vm.close() for vm in vms))
    return {OURS: (took,)}


async def _scraped(guests: Sequence[MicroGuest], setting: Setting) -> dict[str, tuple[float, ...]]:
    """Milliseconds of each scrape; the vCPUs stay plugged."""
    async with Fleet([guest.sockets[1] for guest in guests]) as fleet:
        for result in await fleet.set_count(SLOTS):
            result.unwrap()
    directory = setting.folder / "vms"
    directory.mkdir()
    for number, guest in enumerate(guests):
        (directory / f"vm{number}.qmp").symlink_to(guest.qmp)
    async with exporting("--dir", directory) as exporter:

        async def all_answer() -> bool:
            return sum((await exporter.scrape()).up.values()) == len(guests)

        await until(all_answer, 30)
        scrapes = [await timed(exporter.ask(GET)) for _ in range(2 * setting.rounds + 1)]
    return {OURS: tuple(scrapes[1:])}
