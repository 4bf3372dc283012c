"""Looking at a VM: the layout that is known, reading it again, its XML, and what its vCPUs have done."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import qmpvcpu
from qmpvcpu.domainxml import render
from qmpvcpu.testing import MicroGuest
from tests.bench.libvirtd import VCPU_STATS, peer
from tests.bench.raw import Raw, raw_client
from tests.bench.row import LIBVIRT, OURS, RAW, Goal, Row, Samples
from tests.bench.setting import Setting, timed

__all__ = ["measure"]

SIZES = (8, 64, 240)
REPEATS = 200
REFRESH = "vm.refresh(): both queries and two of the VM's state, checked and taken in; raw: the two queries alone"
KNOWN = "vm.layout and its map, kept current by events: no query, no lock; libvirt: vcpus(), which asks the host"
STATISTICS = (
    "vm.statistics(): all that KVM counts, and the times of threads; raw: query-stats alone, most of QEMU's work; "
    "libvirt: getAllDomainStats() of its one VM, as virsh domstats --vcpu"
)
TIMES = "vm.statistics(kvm=()): the threads' times alone, which asks QEMU nothing"
MEASURED, MOST_OVER_RAW = 64, 3  # vCPUs, and ms
XML = "the state as <domain>; libvirt: XMLDesc(), of a longer document"


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Compare looking at VMs whose slots are all plugged."""
    qemu = setting.qemus[setting.newest]
    for vcpus in SIZES:
        samples = Samples()
        name = setting.named(setting.newest, vcpus)
        async with (
            MicroGuest(qemu, accel=setting.accel, max_vcpus=vcpus, boot=vcpus) as one,  # type: ignore[arg-type]  # a literal
            qmpvcpu.attach(one.sockets[0]) as vm,
            raw_client(one.sockets[1]) as client,
        ):
            with (
                client.listener("RESET") as listener,
                peer(setting.libvirt, qemu, vcpus, accel=setting.accel) as theirs,
            ):
                raw = Raw(client, (), listener, tcg=False)
                if theirs is not None:
                    theirs.set_count(vcpus)
                for _ in range(3 * setting.rounds):
                    samples.note("refresh", RAW, await timed(raw.read()))
                    samples.note("refresh", OURS, await timed(vm.refresh()))
                    samples.note("statistics", RAW, await timed(client.execute("query-stats", {"target": "vcpu"})))
                    samples.note("statistics", OURS, await timed(vm.statistics()))
                    samples.note("times", OURS, await timed(vm.statistics(kvm=())))
                    samples.note("known", OURS, _each(lambda: vm.layout.enabled))
                    samples.note("xml", OURS, _each(lambda: render(vm.layout), 10))
                    if theirs is not None:
                        samples.note("statistics", LIBVIRT, theirs.call("getAllDomainStats", VCPU_STATS))
                        samples.note("known", LIBVIRT, theirs.call("vcpus"))
                        samples.note("xml", LIBVIRT, theirs.call("XMLDesc", 0))
                    await asyncio.sleep(0)
        goals = (Goal(OURS, 1.3, RAW),) if vcpus == max(SIZES) else ()
        yield Row("read again", name, REFRESH, samples["refresh"], goals=goals)
        yield Row("look at what is known", name, KNOWN, samples["known"])
        if setting.accel == "kvm":
            most = (Goal(OURS, MOST_OVER_RAW, RAW, above=True),) if vcpus == MEASURED else ()
            yield Row("statistics", name, STATISTICS, samples["statistics"], goals=most)
        yield Row("statistics, times alone", name, TIMES, samples["times"])
        yield Row("XML", name, XML, samples["xml"])


def _each(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Milliseconds that *work* takes, one of *repeats*."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) * 1000 / repeats
