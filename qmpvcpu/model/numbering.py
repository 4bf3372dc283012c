"""From QEMU's two replies to slots with vCPU ids: libvirt's rules, exactly.

Source: libvirt src/qemu/qemu_monitor.c, ``qemuMonitorGetCPUInfoHotplug`` and ``qemuMonitorQueryHotpluggableCpus``
as measured with libvirt 9.0.0, and QEMU qapi/machine.json (HotpluggableCPU, CpuInfoFast).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from qmpvcpu.model.layout import CpuProps, Slot

# node-id is not part of the key (nodes may interleave). module-id is QEMU's level that libvirt does not know: without
# it two CPUs would share a key and vCPU 0 would not be the boot CPU; it sits where QEMU nests it.
_KEY = ("socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id")


class SlotReading(NamedTuple):
    """One entry of ``query-hotpluggable-cpus``.

    Attributes:
        type: CPU type.
        vcpus: ``vcpus-count``.
        props: The entry's properties.
        qom_path: Path of the CPU in it, or None.
    """

    type: str
    vcpus: int
    props: CpuProps
    qom_path: str | None


class ThreadReading(NamedTuple):
    """One entry of ``query-cpus-fast``.

    Attributes:
        qom_path: Path of the vCPU; on pseries below its core's path.
        host_tid: Its thread on QEMU's host.
        cpu_index: QEMU's number for it.
        props: Its properties, empty where the machine has none.
        arch: QEMU's target, such as ``x86_64``; None where the entry does not tell.
    """

    qom_path: str
    host_tid: int
    cpu_index: int
    props: CpuProps
    arch: str | None = None

    @property
    def core_path(self) -> str:
        """The path of the slot that it belongs to."""
        return self.qom_path.partition("/thread")[0]


def build_slots(readings: Sequence[SlotReading], threads: Sequence[ThreadReading]) -> tuple[Slot, ...]:
    """Give every entry its vCPU ids, and every thread its place.

    Entries are sorted by (socket, die, cluster, module, core, thread), a missing id counting as -1; an entry of
    n vCPUs takes the next n ids. Threads are joined by QOM path and given out in reply order. The cpu-index of an
    occupied slot, which is what the guest's ACPI answers name as slot, is that of its first thread; QEMU lists
    entries by descending cpu-index, and where the threads say otherwise, they are right.

    Thread ids are dropped for the whole VM if two vCPUs share one (single-threaded TCG), as libvirt does.

    Args:
        readings: ``query-hotpluggable-cpus``, in QEMU's order.
        threads: ``query-cpus-fast``, in QEMU's order (that of creation); may be empty where it cannot be read.

    Returns:
        The slots, by ascending vCPU id.
    """
    indexes = _cpu_indexes(readings, threads)
    by_path: dict[str, list[int]] = {}
    shared = runs_single_threaded(threads)
    for thread in threads:
        by_path.setdefault(thread.core_path, []).append(thread.host_tid)
    slots: list[Slot] = []
    first = 0
    for reading, cpu_index in sorted(zip(readings, indexes, strict=True), key=lambda pair: _sort_key(pair[0])):
        tids: list[int | None] = []
        if reading.qom_path is not None:
            tids += [] if shared else by_path.get(reading.qom_path, [])[: reading.vcpus]
            tids += [None] * (reading.vcpus - len(tids))
        slots.append(
            Slot(
                first=first,
                count=reading.vcpus,
                type=reading.type,
                props=reading.props,
                cpu_index=cpu_index,
                qom_path=reading.qom_path,
                host_tids=tuple(tids),
            )
        )
        first += reading.vcpus
    return tuple(slots)


def _cpu_indexes(readings: Sequence[SlotReading], threads: Sequence[ThreadReading]) -> list[int]:
    """Return the cpu-index of each entry's first vCPU: in the order that agrees with all threads, if one does."""
    known: dict[str, int] = {}
    for thread in threads:
        known[thread.core_path] = min(thread.cpu_index, known.get(thread.core_path, thread.cpu_index))
    told = [None if reading.qom_path is None else known.get(reading.qom_path) for reading in readings]
    ends = list(itertools.accumulate(reading.vcpus for reading in readings))
    ascending = [end - reading.vcpus for end, reading in zip(ends, readings, strict=True)]
    descending = [ends[-1] - end for end in ends]
    for indexes in (descending, ascending):
        if all(mine in (None, index) for mine, index in zip(told, indexes, strict=True)):
            return indexes
    left = iter([index for index in descending if index not in told])
    return [next(left, -1) if mine is None else mine for mine in told]


def creation_order(slots: Sequence[Slot], threads: Sequence[ThreadReading]) -> tuple[int, ...]:
    """Return the first ids of the occupied slots in the order in which QEMU created their CPUs.

    ``query-cpus-fast`` is in that order. Occupied slots that it does not name come last, by id.
    """
    by_path = {slot.qom_path: slot.first for slot in slots if slot.qom_path is not None}
    seen = dict.fromkeys(by_path[thread.core_path] for thread in threads if thread.core_path in by_path)
    seen.update(dict.fromkeys(sorted(set(by_path.values()) - set(seen))))
    return tuple(seen)


def build_fixed_slots(threads: Sequence[ThreadReading]) -> tuple[Slot, ...]:
    """Return the slots of a machine that cannot hotplug: the i-th thread is vCPU i, as libvirt numbers them."""
    shared = runs_single_threaded(threads)
    return tuple(
        Slot(
            first=first,
            count=1,
            type="",
            props=thread.props,
            cpu_index=thread.cpu_index,
            qom_path=thread.qom_path,
            host_tids=(None if shared else thread.host_tid,),
        )
        for first, thread in enumerate(threads)
    )


def runs_single_threaded(threads: Sequence[ThreadReading]) -> bool:
    """Return True if vCPUs share a host thread (``-accel tcg,thread=single``)."""
    return len({thread.host_tid for thread in threads}) < len(threads)


def _sort_key(reading: SlotReading) -> tuple[int, ...]:
    numbers = (reading.props.number(name) for name in _KEY)
    return tuple(-1 if number is None else number for number in numbers)
