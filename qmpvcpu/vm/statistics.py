"""What the vCPUs of one VM have done: read from their threads on this host, and from KVM through QEMU."""

import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from qmpvcpu.errors import clip
from qmpvcpu.host.finding import Found
from qmpvcpu.host.threads import HostThread, Usage, counts_waits, find, read_usage
from qmpvcpu.model.counters import HALTED, NO_COUNTERS, KvmCounters
from qmpvcpu.model.statistics import VcpuStatistics, VmStatistics
from qmpvcpu.model.vcpumap import VcpuMap, named
from qmpvcpu.model.vm import ONE_THREAD
from qmpvcpu.qapi import runs_single_threaded, vcpu_paths

if TYPE_CHECKING:
    from qmpvcpu.vm.connection import Connection
    from qmpvcpu.vm.driver import Driver

_NS: Final = 1_000_000_000
# A QEMU that does not say what it runs under may run under KVM.
_MAY_COUNT: Final = ("kvm", "unknown")
# An older one wakes each vCPU to read its counters, so it finds none that is halted.
# Source: QEMU accel/kvm/kvm-all.c, ``query_stats_vcpu``.
_FIRST_THAT_WAKES_NONE: Final = (8, 1, 0)


class _VcpuThread(NamedTuple):
    """The thread of a vCPU, and its number as QEMU gives it."""

    tid: int
    thread: HostThread


class StatisticsReader:
    """Reads one VM again and again, with one round trip to QEMU at most.

    It remembers the threads that it has found. QEMU is asked only for those that the layout does not name yet, and
    for those of vCPUs whose thread has ended meanwhile.

    Args:
        driver: The VM.
    """

    def __init__(self, driver: "Driver") -> None:
        self._driver = driver
        self._connection: Connection | None = None
        self._qemu = Found(None)
        self._known: dict[str, _VcpuThread] = {}  # by QOM path
        self._ended: dict[str, int] = {}  # tids that the layout may name still, and other threads may have by now

    async def read(self, names: Collection[str] | None = None) -> VmStatistics:
        """Read the VM; *names* are those of KVM's counters, None: all.

        Raises:
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        await self._driver.check_open()
        layout, connection = self._driver.layout, self._driver.connection
        if connection is not self._connection:  # at first, and when QEMU was found again, or another one
            self._connection, self._qemu, self._known, self._ended = connection, Found(None), {}, {}
        present = [slot for slot in layout.slots if slot.present]
        vcpus = {path: vcpu for slot in present for path, vcpu in zip(vcpu_paths(slot), slot.ids, strict=True)}
        named_in_layout = (pair for slot in present for pair in zip(vcpu_paths(slot), slot.host_tids, strict=False))

        at, clock = time.time(), time.monotonic()
        waits = counts_waits()
        usages = self._read_known(vcpus, waits=waits)
        tids = {path: tid for path, tid in named_in_layout if tid is not None and tid != self._ended.get(path)}
        usages |= self._read_new({path: tid for path, tid in tids.items() if path not in usages}, waits=waits)
        asks_kvm = layout.vm.accelerator in _MAY_COUNT and (names is None or len(names) > 0)
        asks_threads = len(usages) < len(vcpus) and (self._qemu.pid is not None or not tids)
        counters: Mapping[str, KvmCounters] = {}
        shared = False
        if asks_kvm or asks_threads:
            paths = [*vcpus] if asks_kvm else []
            counters, threads = await connection.reader.statistics(paths, names, threads=asks_threads)
            shared = runs_single_threaded(threads or ())
            told = {thread.qom_path: thread.host_tid for thread in threads or ()}
            missing = {path: told[path] for path in vcpus if path in told and path not in usages}
            if shared:
                usages, tids, self._known = {}, {}, {}
            else:
                usages |= self._read_new(missing, waits=waits)
                tids |= missing
        known = {path: each.tid for path, each in self._known.items()}
        version = layout.vm.qemu_version
        found = tuple(
            _statistics(
                vcpu,
                known.get(path, tids.get(path)),
                usages.get(path),
                counters.get(path, NO_COUNTERS),
                tells_halted=version >= _FIRST_THAT_WAKES_NONE,
            )
            for path, vcpu in vcpus.items()
        )
        why = (
            ONE_THREAD if shared else self._why_no_times({vcpu: usages.get(path) for path, vcpu in vcpus.items()}),
            _why_no_counters(version, names) if asks_kvm and layout.vm.accelerator == "kvm" and not counters else "",
        )
        return VmStatistics(layout.vm.name, at, clock, found, "; ".join(filter(None, why)))

    def _read_known(self, paths: Collection[str], *, waits: bool) -> dict[str, Usage]:
        """Read the threads that are known of the vCPUs at *paths*, and forget those that have ended."""
        usages = {
            path: usage
            for path, each in self._known.items()
            if path in paths and (usage := read_usage(each.thread, waits=waits)) is not None
        }
        self._ended |= {path: each.tid for path, each in self._known.items() if path not in usages}
        self._known = {path: each for path, each in self._known.items() if path in usages}
        return usages

    def _read_new(self, tids: Mapping[str, int], *, waits: bool) -> dict[str, Usage]:
        """Find the threads that QEMU calls *tids*, by the QOM path of their vCPU, and read them."""
        if self._qemu.pid is None and self._connection is not None and tids:
            # By that of the first vCPU: it never leaves, so its number is not of the past.
            self._qemu = self._connection.monitor.find_qemu([next(iter(tids.values()))])
        threads = {} if self._qemu.pid is None else find(self._qemu.pid, [*tids.values()])
        usages: dict[str, Usage] = {}
        for path, tid in tids.items():
            usage = read_usage(threads[tid], waits=waits) if tid in threads else None
            if usage is not None:
                self._known[path] = _VcpuThread(tid, threads[tid])
                self._ended.pop(path, None)
                usages[path] = usage
        return usages

    def _why_no_times(self, usages: Mapping[int, Usage | None]) -> str:
        """Say what is missing of the threads of the vCPUs in *usages*, "" if nothing is."""
        if self._qemu.pid is None:
            return self._qemu.why or "QEMU has not named any vCPU thread yet"
        if missing := VcpuMap(vcpu for vcpu, usage in usages.items() if usage is None):
            return f"QEMU has no thread for {named(missing)} now: it came or left while this was read"
        if any(usage is not None and usage.delay_ns is None for usage in usages.values()):
            return "this host's kernel does not count how long threads wait (CONFIG_SCHED_INFO, /proc/PID/schedstat)"
        return ""


def _statistics(
    vcpu: int, tid: int | None, usage: Usage | None, kvm: KvmCounters, *, tells_halted: bool
) -> VcpuStatistics:
    halted = kvm.get(HALTED) if tells_halted else None
    run, delay, wait = (None, None, None) if usage is None else (usage.run_ns, usage.delay_ns, usage.wait_ns)
    return VcpuStatistics(
        vcpu,
        host_tid=tid,
        run_s=_seconds(run),
        delay_s=_seconds(delay),
        wait_s=_seconds(wait),
        turns=None if usage is None else usage.turns,
        halted=halted if isinstance(halted, bool) else None,
        host_cpu=None if usage is None else usage.host_cpu,
        kvm=kvm,
    )


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / _NS


def _why_no_counters(version: tuple[int, ...], names: Collection[str] | None) -> str:
    if version < (7, 1, 0):
        return "this QEMU is too old to report KVM's counters: 7.1 and newer do"
    if names is not None:
        return f"QEMU and its kernel do not report {clip(', '.join(names))} (query-stats)"
    return "QEMU and its kernel do not report KVM's counters (query-stats)"
