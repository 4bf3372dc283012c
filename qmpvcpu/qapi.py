"""Floor 1: between QMP's JSON and the model. Pure: no I/O.

Its own values are named tuples: they live from one line to the next, and cost an eighth of a dataclass to import.

Every ``parse_`` raises MalformedReplyError if the reply lacks what it is read for, or something in it is out of
bounds: what a peer sends is checked here, before it goes anywhere.

Source: QEMU qapi/machine.json, qdev.json, acpi.json, run-state.json, migration.json. The vCPU ids of slots: libvirt
src/qemu/qemu_monitor.c, ``qemuMonitorGetCPUInfoHotplug`` and ``qemuMonitorQueryHotpluggableCpus``, as measured with
libvirt 9.0.0.
"""

import enum
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from qmpvcpu.errors import MalformedReplyError
from qmpvcpu.model.counters import EXITS, KvmCounters
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.names import (
    CPU_TYPE,
    DEVICE_ID,
    PERIPHERAL,
    QOM_PATH,
    UUID,
    WORD,
    Shape,
    is_cpu_type,
    is_device_id,
    is_word,
)
from qmpvcpu.model.vcpumap import MOST_VCPUS
from qmpvcpu.model.verdicts import OstAnswer
from qmpvcpu.model.vm import SMP_LEVELS, Topology

_LARGEST: Final = (1 << 63) - 1  # of QAPI's int
_LARGEST_DWORD: Final = (1 << 32) - 1  # what a guest writes to the registers behind _OST
_LARGEST_PID: Final = (1 << 31) - 1
_LARGEST_VERSION: Final = 9999
_MOST_PROPS: Final = 32  # QEMU 11.1 has nine
_HYPERVISOR, _X2APIC, _VMX = 1 << 31, 1 << 21, 1 << 5  # CPUID 1, ECX
_SVM = 1 << 2  # CPUID 0x80000001, ECX
_NIL_UUID: Final = "00000000-0000-0000-0000-000000000000"

_SLOT_NUMBER: Final = re.compile(r"[0-9]{1,5}")
_SLOT: Final = Shape("a slot's number", lambda text: _SLOT_NUMBER.fullmatch(str(text)) is not None)
# Half of a surrogate pair is what JSON can say and nothing can encode.
_TEXT: Final = Shape("text", lambda text: re.search("[\ud800-\udfff]", str(text)) is None)
_LONGEST_TEXT: Final = 1024

# node-id is not part of the key (nodes may interleave). module-id is QEMU's level that libvirt does not know: without
# it two CPUs would share a key and vCPU 0 would not be the boot CPU; it sits where QEMU nests it.
_KEY: Final = ("socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id")


class Deleted(NamedTuple):
    """DEVICE_DELETED: this very path is gone (a child such as ``.../lapic`` is not its parent)."""

    path: str


class GuestError(NamedTuple):
    """DEVICE_UNPLUG_GUEST_ERROR: the guest refused (pseries; never sent for x86 CPUs)."""

    path: str


class OstEvent(NamedTuple):
    """ACPI_DEVICE_OST of a CPU; ``cpu_index`` is QEMU's slot number, ``path`` that of a CPU that has a device id."""

    cpu_index: int
    answer: OstAnswer
    path: str | None = None


class MigrationStatus(NamedTuple):
    """MIGRATION: sent only where the capability ``events`` is on."""

    status: str


class RunEvent(enum.Enum):
    """The VM as a whole was reset, stopped, or goes on."""

    RESET = "RESET"
    STOP = "STOP"
    RESUME = "RESUME"


QemuEvent = Deleted | GuestError | OstEvent | MigrationStatus | RunEvent


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


class CpuFeatures(NamedTuple):
    """What an x86 CPU shows the guest.

    Attributes:
        hypervisor: That it runs under a hypervisor.
        kvm: That KVM is that hypervisor, by a feature of KVM's own.
        nested: VMX or SVM.
        x2apic: An APIC that can have ids from 255 on.
    """

    hypervisor: bool
    kvm: bool
    nested: bool
    x2apic: bool


def device_add(slot: Slot, path: str | None = None) -> dict[str, Any]:
    """Return the arguments that plug *slot*, at *path*: its type, an id, and its props verbatim in QEMU's order."""
    return {"driver": slot.type, "id": (path or slot.new_qom_path).removeprefix(PERIPHERAL), **slot.props}


def device_del(slot: Slot) -> dict[str, Any]:
    """Return the arguments that ask for *slot*: by device id, or by QOM path where its CPU has none."""
    return {"id": slot.device_id or slot.qom_path}


def parse_hotpluggable_cpus(reply: object) -> tuple[SlotReading, ...]:
    """Read ``query-hotpluggable-cpus``.

    An entry needs what libvirt needs: a type, a vcpus-count, and props with a node-, socket-, core- or thread-id.
    """
    command = "query-hotpluggable-cpus"
    readings: list[SlotReading] = []
    paths: set[str] = set()
    total = 0
    for entry in _entries(command, reply):
        kind = _text(command, entry, "type", CPU_TYPE)
        count = _number(command, entry, "vcpus-count", 1, MOST_VCPUS)
        path = _text(command, entry, "qom-path", QOM_PATH) if "qom-path" in entry else None
        props = _props(command, entry)
        if not entry["props"].keys() & {"node-id", "socket-id", "core-id", "thread-id"}:
            raise MalformedReplyError(command, "'props' name no node, socket, core or thread", entry)
        if path in paths:
            raise MalformedReplyError(command, "two entries have this 'qom-path'", entry)
        if path is not None:
            paths.add(path)
        total += count
        if total > MOST_VCPUS:
            raise MalformedReplyError(command, f"'vcpus-count': more than {MOST_VCPUS} vCPUs in all", entry)
        readings.append(SlotReading(kind, count, props, path))
    return tuple(readings)


def parse_cpus_fast(reply: object) -> tuple[ThreadReading, ...]:
    """Read ``query-cpus-fast``."""
    command = "query-cpus-fast"
    threads: list[ThreadReading] = []
    for entry in _entries(command, reply):
        path = _text(command, entry, "qom-path", QOM_PATH)
        tid = _number(command, entry, "thread-id", 0, _LARGEST_PID)
        index = _number(command, entry, "cpu-index", 0, MOST_VCPUS - 1)
        known = _props(command, entry) if "props" in entry else CpuProps({})
        arch = _text(command, entry, "target", WORD) if "target" in entry else None
        threads.append(ThreadReading(path, tid, index, known, arch))
    return tuple(threads)


def parse_iothreads(reply: object) -> tuple[int, ...]:
    """Read ``query-iothreads``: their host threads; none where this QEMU does not know it."""
    if reply is None:
        return ()
    command = "query-iothreads"
    return tuple(_number(command, entry, "thread-id", 0, _LARGEST_PID) for entry in _entries(command, reply))


def parse_ospm_status(reply: object) -> dict[int, OstAnswer]:
    """Read ``query-acpi-ospm-status``: the last answer for each CPU slot, by cpu-index."""
    command = "query-acpi-ospm-status"
    answers: dict[int, OstAnswer] = {}
    for entry in _entries(command, reply):
        if entry.get("slot-type") == "CPU":
            slot, answer = _ost(command, entry)
            answers[slot] = answer
    return answers


def query_stats(paths: Collection[str] | None = None, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return the arguments of ``query-stats`` that ask for KVM's counters of vCPUs.

    Args:
        paths: The vCPUs; None: all.
        names: The counters; None: all.
    """
    asked: dict[str, Any] = {"target": "vcpu"}  # short: QEMU takes 4 us for each letter of a command
    if paths is not None:
        asked["vcpus"] = [*paths]
    if names is not None:
        asked["providers"] = [{"provider": "kvm", "names": [*names]}]
    return asked


def query_exits(paths: Collection[str]) -> dict[str, Any]:
    """Return the arguments of ``query-stats`` that ask how often the vCPUs at *paths* have left guest mode."""
    return query_stats(paths, EXITS)


def parse_stats(reply: object) -> dict[str, KvmCounters]:
    """Read ``query-stats`` of vCPUs: what KVM counts, by QOM path. Empty where QEMU or the kernel does not count."""
    command = "query-stats"
    found: dict[str, KvmCounters] = {}
    for entry in _entries(command, reply):
        if entry.get("provider") != "kvm":
            continue
        path = _text(command, entry, "qom-path", QOM_PATH)
        if path in found:
            raise MalformedReplyError(command, "this 'qom-path' is told twice", entry)
        stats = _entries(command, entry.get("stats"))
        try:
            found[path] = KvmCounters({stat["name"]: stat["value"] for stat in stats})
        except (KeyError, TypeError, ValueError) as error:  # a name may be anything, a list too
            raise MalformedReplyError(command, f"'stats': {error}", entry) from error
        if len(found[path]) < len(stats):
            raise MalformedReplyError(command, "'stats' tell a name twice", entry)
    return found


def parse_exits(reply: object) -> dict[str, int]:
    """Read ``query-stats`` with the arguments of ``query_exits``: how often vCPUs have left guest mode, by QOM path.

    Above 0 only if they have entered it. Empty where QEMU or the kernel does not count.
    """
    exits: dict[str, int] = {}
    for path, stats in parse_stats(reply).items():
        for name in EXITS:
            count = stats.get(name, 0)
            if type(count) is not int:
                raise MalformedReplyError("query-stats", f"{name!r} is no number", {name: count})
            if name in stats:
                exits[path] = count
    return exits


def vcpu_paths(slot: Slot) -> list[str]:
    """Return the QOM paths of the vCPUs in *slot*, which is not empty: a core of pseries has threads."""
    if slot.type.endswith("-cpu-core"):
        return [f"{slot.qom_path}/thread[{number}]" for number in range(slot.count)]
    return [str(slot.qom_path)]


def parse_topology(reply: object) -> Topology | None:
    """Read ``qom-get /machine smp``; None where the machine has no such property."""
    command = "qom-get"
    if not isinstance(reply, Mapping) or "maxcpus" not in reply:
        return None
    known = {level: _number(command, reply, level, 1, MOST_VCPUS) for level in SMP_LEVELS if level in reply}
    return Topology(max_cpus=_number(command, reply, "maxcpus", 1, MOST_VCPUS), **known)


def parse_memory_kib(reply: object) -> int | None:
    """Read ``query-memory-size-summary``, hotplugged memory included; None where QEMU does not tell."""
    command = "query-memory-size-summary"
    if not isinstance(reply, Mapping) or "base-memory" not in reply:
        return None
    sizes = [key for key in ("base-memory", "plugged-memory") if key in reply]
    return sum(_number(command, reply, key, 0, _LARGEST) for key in sizes) // 1024


def parse_status(command: str, reply: object) -> str:
    """Read the state that ``query-status`` and ``query-migrate`` tell."""
    if not isinstance(reply, Mapping):
        raise MalformedReplyError(command, "not an object", reply)
    return _text(command, reply, "status", WORD)


def parse_has_arrived(reply: object) -> bool:
    """Read from ``query-migrate`` whether the VM has migrated into this QEMU.

    Only the source tells of the memory that was sent (QEMU 7.2.22, 10.0.2 and 11.1.3).
    """
    return isinstance(reply, Mapping) and reply.get("status") == "completed" and "ram" not in reply


def parse_feature_words(reply: object) -> CpuFeatures | None:
    """Read ``qom-get feature-words`` of an x86 CPU; None where what was asked has none.

    Source: QEMU target/i386/cpu.c, ``feature_word_info``.
    """
    if not isinstance(reply, list):
        return None
    command = "qom-get feature-words"
    words: dict[tuple[object, object], int] = {}
    for entry in _entries(command, reply):
        where = (entry.get("cpuid-register"), _number(command, entry, "cpuid-input-eax", 0, _LARGEST_DWORD))
        words.setdefault(where, _number(command, entry, "features", 0, _LARGEST))
    basic, extended = words.get(("ECX", 1), _HYPERVISOR), words.get(("ECX", 0x8000_0001), 0)
    return CpuFeatures(
        hypervisor=bool(basic & _HYPERVISOR),
        kvm=words.get(("EAX", 0x4000_0001), 0) != 0,
        nested=bool(basic & _VMX or extended & _SVM),
        x2apic=bool(basic & _X2APIC),
    )


def parse_peripherals(reply: object) -> frozenset[str]:
    """Read ``qom-list /machine/peripheral``: the paths of devices other than CPUs whose ids begin with ``vcpu``."""
    if reply is None:  # a QEMU without it
        return frozenset()
    command, paths = "qom-list", set[str]()
    for entry in _entries(command, reply):
        name, kind = _text(command, entry, "name"), _text(command, entry, "type")
        cpu = is_cpu_type(kind.removeprefix("child<").removesuffix(">"))
        if name.startswith("vcpu") and is_device_id(name) and not cpu:
            paths.add(PERIPHERAL + name)
    return frozenset(paths)


def parse_name(reply: object) -> str | None:
    """Read ``query-name``; None where QEMU was given none."""
    name = _text("query-name", reply, "name") if isinstance(reply, Mapping) and "name" in reply else ""
    return name or None


def parse_uuid(reply: object) -> str | None:
    """Read ``query-uuid``; None where QEMU was given none."""
    if not isinstance(reply, Mapping) or "UUID" not in reply:
        return None
    uuid = _text("query-uuid", reply, "UUID", UUID).lower()
    return None if uuid == _NIL_UUID else uuid


def parse_arch(reply: object) -> str | None:
    """Read ``query-target``; None where QEMU does not tell."""
    return _text("query-target", reply, "arch", WORD) if isinstance(reply, Mapping) and "arch" in reply else None


def parse_machine(reply: object) -> str | None:
    """Read ``qom-get /machine type``: the machine type as ``-machine`` takes it; None where QEMU does not tell."""
    if reply is None:
        return None
    if not is_word(reply):
        raise MalformedReplyError("qom-get /machine type", f"'type' is not {WORD.what}", reply)
    return reply.removesuffix("-machine")


def parse_hotplugs(reply: object, machine: str) -> bool:
    """Read from ``query-machines`` whether *machine* takes hotplugged CPUs; False where QEMU does not say so."""
    entries = reply if isinstance(reply, list) else []
    return any(
        isinstance(each, dict) and each.get("name") == machine and each.get("hotpluggable-cpus") is True
        for each in entries
    )


def parse_version(command: str, reply: object) -> tuple[tuple[int, int, int], str]:
    """Read QEMU's version and its package's name, from the greeting or from ``query-version``."""
    numbers = reply.get("qemu") if isinstance(reply, Mapping) else None
    if not isinstance(reply, Mapping) or not isinstance(numbers, Mapping):
        raise MalformedReplyError(command, "it names no QEMU version", reply)
    major, minor, micro = (_number(command, numbers, key, 0, _LARGEST_VERSION) for key in ("major", "minor", "micro"))
    return (major, minor, micro), _text(command, reply, "package") if reply.get("package") is not None else ""


def parse_accelerators(reply: object) -> str | None:
    """Read ``query-accelerators`` (QEMU 10.2): the accelerator's name; None if it tells none."""
    match reply:
        case {"enabled": name} if is_word(name):
            return name
    return None


def parse_kvm(reply: object) -> str | None:
    """Read ``query-kvm``: ``"kvm"``, or ``"tcg"`` for what is not; None if it does not tell."""
    match reply:
        case {"enabled": True}:
            return "kvm"
        case {"enabled": False}:
            return "tcg"
    return None


def parse_event(message: Mapping[str, Any]) -> QemuEvent | None:
    """Read one QMP event; None for every event that says nothing about vCPUs or the VM's run state.

    A malformed event is None too: events are a shared channel, and what matters is read again.
    """
    name, data = message.get("event"), message.get("data")
    reader = _EVENTS.get(name) if isinstance(name, str) else None
    if reader is None:
        return None
    try:
        return reader(data if isinstance(data, dict) else {})
    except MalformedReplyError:
        return None


def _ost(command: str, info: Mapping[str, Any]) -> tuple[int, OstAnswer]:
    slot = int(_text(command, info, "slot", _SLOT))
    if slot >= MOST_VCPUS:
        raise MalformedReplyError(command, f"'slot' is not a number from 0 to {MOST_VCPUS - 1}", info)
    source = _number(command, info, "source", 0, _LARGEST_DWORD)
    return slot, OstAnswer(source, _number(command, info, "status", 0, _LARGEST_DWORD))


def _read_ost(data: Mapping[str, Any]) -> OstEvent | None:
    info = data.get("info")
    if not isinstance(info, dict) or info.get("slot-type") != "CPU":
        return None
    device = _text("ACPI_DEVICE_OST", info, "device", DEVICE_ID) if "device" in info else None
    return OstEvent(*_ost("ACPI_DEVICE_OST", info), None if device is None else PERIPHERAL + device)


def _read_deleted(data: Mapping[str, Any]) -> Deleted:
    return Deleted(_text("DEVICE_DELETED", data, "path", QOM_PATH))


def _read_guest_error(data: Mapping[str, Any]) -> GuestError:
    return GuestError(_text("DEVICE_UNPLUG_GUEST_ERROR", data, "path", QOM_PATH))


def _read_migration(data: Mapping[str, Any]) -> MigrationStatus:
    return MigrationStatus(_text("MIGRATION", data, "status", WORD))


_EVENTS: Final[Mapping[str, Callable[[Mapping[str, Any]], QemuEvent | None]]] = {
    "ACPI_DEVICE_OST": _read_ost,
    "DEVICE_DELETED": _read_deleted,
    "DEVICE_UNPLUG_GUEST_ERROR": _read_guest_error,
    "RESET": lambda _: RunEvent.RESET,
    "STOP": lambda _: RunEvent.STOP,
    "RESUME": lambda _: RunEvent.RESUME,
    "MIGRATION": _read_migration,
}


def _entries(command: str, reply: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(reply, list):
        raise MalformedReplyError(command, "not a list", reply)
    if len(reply) > MOST_VCPUS:
        raise MalformedReplyError(command, f"more than {MOST_VCPUS} entries", reply)
    for entry in reply:
        if not isinstance(entry, dict):
            raise MalformedReplyError(command, "an entry is not an object", entry)
    return reply


def _number(command: str, entry: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not least <= value <= most:  # a bool is an int to isinstance
        raise MalformedReplyError(command, f"{key!r} is not a number from {least} to {most}", entry)
    return value


def _text(command: str, entry: Mapping[str, Any], key: str, shape: Shape = _TEXT) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not _fits(shape, value):
        raise MalformedReplyError(command, f"{key!r} is not {shape.what}", entry)
    return value


@lru_cache(maxsize=4096)  # each read has the same types and paths, and each vCPU its own events
def _fits(shape: Shape, value: str) -> bool:
    return shape.fits(value)


def _props(command: str, entry: Mapping[str, Any]) -> CpuProps:
    """Return an entry's props; ``device_add`` takes all of them back."""
    props = entry.get("props")
    if not isinstance(props, dict) or len(props) > _MOST_PROPS:
        raise MalformedReplyError(command, f"'props' is not an object of at most {_MOST_PROPS} members", entry)
    try:
        return CpuProps(props)
    except ValueError as error:
        raise MalformedReplyError(command, f"'props': {error}", entry) from error


# From the two replies to slots with vCPU ids: libvirt's rules, exactly.


def threads_of(slot: Slot, threads: Sequence[ThreadReading]) -> list[int]:
    """Return the host thread of each vCPU of *slot*, in the order of the vCPUs; fewer where QEMU tells fewer."""
    return [thread.host_tid for thread in threads if thread.core_path == slot.qom_path][: slot.count]


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
