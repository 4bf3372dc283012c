"""Floor 1: between QMP's JSON and the model. Pure: no I/O.

Its own values are named tuples: they live from one line to the next, and cost an eighth of a dataclass to import.

Source: QEMU qapi/machine.json, qdev.json, acpi.json, run-state.json, migration.json.
"""

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qmpvcpu.errors import MalformedReplyError
from qmpvcpu.model import CpuProps, OstAnswer, Slot, SlotReading, ThreadReading, Topology
from qmpvcpu.model.shapes import is_cpu_type, is_qom_path, is_uuid, is_word

__all__ = [
    "Deleted",
    "GuestError",
    "MigrationStatus",
    "OstEvent",
    "QemuEvent",
    "RunEvent",
    "device_add",
    "device_del",
    "parse_cpus_fast",
    "parse_event",
    "parse_hotpluggable_cpus",
    "parse_machine",
    "parse_ospm_status",
    "parse_target",
    "parse_topology",
    "parse_uuid",
]


class Deleted(NamedTuple):
    """DEVICE_DELETED: this very path is gone (a child such as ``.../lapic`` is not its parent)."""

    path: str


class GuestError(NamedTuple):
    """DEVICE_UNPLUG_GUEST_ERROR: the guest refused (pseries; never sent for x86 CPUs)."""

    path: str


class OstEvent(NamedTuple):
    """ACPI_DEVICE_OST of a CPU; ``cpu_index`` is QEMU's slot number."""

    cpu_index: int
    answer: OstAnswer


class MigrationStatus(NamedTuple):
    """MIGRATION: sent only where the capability ``events`` is on."""

    status: str


class RunEvent(enum.Enum):
    """The VM as a whole was reset, stopped, or goes on."""

    RESET = "RESET"
    STOP = "STOP"
    RESUME = "RESUME"


_NIL_UUID = "00000000-0000-0000-0000-000000000000"

QemuEvent = Deleted | GuestError | OstEvent | MigrationStatus | RunEvent


def device_add(slot: Slot) -> dict[str, Any]:
    """Return the arguments that plug *slot*: its type, our id, and its props verbatim in QEMU's order."""
    return {"driver": slot.type, "id": slot.new_device_id, **slot.props}


def device_del(slot: Slot) -> dict[str, Any]:
    """Return the arguments that ask for *slot*: by device id, or by QOM path where its CPU has none."""
    return {"id": slot.device_id or slot.qom_path}


def parse_hotpluggable_cpus(reply: object) -> tuple[SlotReading, ...]:
    """Read ``query-hotpluggable-cpus``.

    Raises:
        MalformedReplyError: An entry lacks what libvirt needs: a type, a positive vcpus-count, and props with at
            least one of node-, socket-, core- or thread-id; or these are not what device_add takes of a CPU.
    """
    command = "query-hotpluggable-cpus"
    readings: list[SlotReading] = []
    for entry in _entries(command, reply):
        props, count, path = entry.get("props"), entry.get("vcpus-count"), entry.get("qom-path")
        if not is_cpu_type(entry.get("type")):
            raise MalformedReplyError(command, "an entry's type is no CPU's", entry)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise MalformedReplyError(command, "an entry has no positive vcpus-count", entry)
        if not isinstance(props, dict) or not props.keys() & {"node-id", "socket-id", "core-id", "thread-id"}:
            raise MalformedReplyError(command, "an entry's props name no node, socket, core or thread", entry)
        if path is not None and not is_qom_path(path):
            raise MalformedReplyError(command, "an entry's qom-path is none", entry)
        readings.append(SlotReading(entry["type"], count, _props(command, props, entry), path))
    return tuple(readings)


def parse_cpus_fast(reply: object) -> tuple[ThreadReading, ...]:
    """Read ``query-cpus-fast``.

    Raises:
        MalformedReplyError: An entry lacks qom-path, thread-id or cpu-index.
    """
    command = "query-cpus-fast"
    threads: list[ThreadReading] = []
    for entry in _entries(command, reply):
        path, tid, index = entry.get("qom-path"), entry.get("thread-id"), entry.get("cpu-index")
        if not is_qom_path(path) or not isinstance(tid, int) or not isinstance(index, int):
            raise MalformedReplyError(command, "an entry lacks qom-path, thread-id or cpu-index", entry)
        props, arch = entry.get("props"), entry.get("target")
        known = _props(command, props if isinstance(props, dict) else {}, entry)
        threads.append(ThreadReading(path, tid, index, known, arch if is_word(arch) else None))
    return tuple(threads)


def parse_ospm_status(reply: object) -> dict[int, OstAnswer]:
    """Read ``query-acpi-ospm-status``: the last answer for each CPU slot, by cpu-index.

    Raises:
        MalformedReplyError: An entry is not an ACPIOSTInfo.
    """
    command = "query-acpi-ospm-status"
    answers: dict[int, OstAnswer] = {}
    for entry in _entries(command, reply):
        if entry.get("slot-type") == "CPU":
            event = _ost(entry)
            if event is None:
                raise MalformedReplyError(command, "an entry is no ACPIOSTInfo", entry)
            answers[event.cpu_index] = event.answer
    return answers


def parse_machine(reply: object) -> str | None:
    """Read ``qom-get /machine type``; None if there is none to be told.

    Raises:
        MalformedReplyError: No machine type can be called so.
    """
    if not isinstance(reply, str):
        return None
    return _word("qom-get /machine type", reply.removesuffix("-machine"), reply)


def parse_target(reply: object) -> str | None:
    """Read ``query-target``; None if there is none to be told.

    Raises:
        MalformedReplyError: No architecture can be called so.
    """
    arch = reply.get("arch") if isinstance(reply, dict) else None
    return None if arch is None else _word("query-target", arch, reply)


def parse_uuid(reply: object) -> str | None:
    """Read ``query-uuid``; None where QEMU was given none.

    Raises:
        MalformedReplyError: It is no uuid.
    """
    uuid = reply.get("UUID") if isinstance(reply, dict) else None
    if uuid is not None and not is_uuid(uuid):
        raise MalformedReplyError("query-uuid", "it is no uuid", reply)
    return None if uuid == _NIL_UUID else uuid


def parse_topology(reply: object) -> Topology | None:
    """Read ``qom-get /machine smp``; None if it is not what it should be (an old or foreign machine)."""
    if not isinstance(reply, dict) or not isinstance(reply.get("maxcpus"), int):
        return None
    levels = ("sockets", "dies", "clusters", "modules", "cores", "threads", "drawers", "books")
    known = {level: reply[level] for level in levels if isinstance(reply.get(level), int)}
    return Topology(max_cpus=reply["maxcpus"], **known)


def parse_event(message: Mapping[str, Any]) -> QemuEvent | None:
    """Read one QMP event; None for every event that says nothing about vCPUs or the VM's run state.

    A malformed event is None too: events are a shared channel, and whatever a client must know is re-read.
    """
    data = message.get("data")
    reader = _EVENTS.get(str(message.get("event")))
    return reader(data if isinstance(data, Mapping) else {}) if reader else None


def _word(command: str, text: object, reply: object) -> str:
    if not is_word(text):
        raise MalformedReplyError(command, "no name that QEMU gives", reply)
    return text


def _props(command: str, props: Mapping[str, Any], entry: object) -> CpuProps:
    try:
        return CpuProps(props)
    except ValueError as error:
        raise MalformedReplyError(command, f"an entry's props: {error}", entry) from error


def _ost(info: Mapping[str, Any]) -> OstEvent | None:
    slot, source, status = info.get("slot"), info.get("source"), info.get("status")
    if info.get("slot-type") != "CPU" or not isinstance(source, int) or not isinstance(status, int):
        return None
    if not isinstance(slot, str) or not slot.isascii() or not slot.isdigit():
        return None
    return OstEvent(int(slot), OstAnswer(source, status))


def _read_ost(data: Mapping[str, Any]) -> OstEvent | None:
    info = data.get("info")
    return _ost(info) if isinstance(info, Mapping) else None


def _read_deleted(data: Mapping[str, Any]) -> Deleted | None:
    path = data.get("path")
    return Deleted(path) if isinstance(path, str) else None


def _read_guest_error(data: Mapping[str, Any]) -> GuestError | None:
    path = data.get("path")
    return GuestError(path) if isinstance(path, str) else None


def _read_migration(data: Mapping[str, Any]) -> MigrationStatus | None:
    status = data.get("status")
    return MigrationStatus(status) if isinstance(status, str) else None


_EVENTS = {
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
    for entry in reply:
        if not isinstance(entry, dict):
            raise MalformedReplyError(command, "an entry is no object", entry)
    return reply
