"""Layouts and verdicts as JSON, and back: what the command line prints, and what a report is kept as."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final, TypeVar

from qmpvcpu.errors import DenialReason
from qmpvcpu.model.layout import CpuProps, Layout, Slot, Vcpu
from qmpvcpu.model.ost import OstAnswer
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Denied, Pending, Plugged, Refused, Rejected, Unknown, Unplugged, Verdict
from qmpvcpu.model.vm import Topology, VmInfo

__all__ = ["layout_as_json", "layout_from_json", "take", "verdict_from_json"]

_T = TypeVar("_T")

_VERDICTS: Final[Mapping[str, type[Verdict]]] = {
    kind.name: kind for kind in (Plugged, Unplugged, Refused, Pending, Rejected, Denied, Unknown)
}


def take(data: Mapping[str, Any], key: str, read: Callable[[Any], _T]) -> _T:
    """Return what *read* makes of ``data[key]``.

    Raises:
        ValueError: The key is missing, or its value is not what it should be; the text names the key.
    """
    try:
        return read(data[key])
    except KeyError as error:
        raise ValueError(f"{key!r} is missing" if error.args == (key,) else f"{key!r}: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{key!r}: {error}") from error


def layout_as_json(layout: Layout) -> dict[str, Any]:
    """Return everything that is known of a VM and of every vCPU."""
    vm = layout.vm
    topology = vm.topology
    return {
        "max": layout.max,
        "enabled": str(layout.enabled),
        "pending": str(layout.pending),
        "vm": {
            "name": vm.name,
            "uuid": vm.uuid,
            "arch": vm.arch,
            "machine": vm.machine,
            "accelerator": vm.accelerator,
            "qemu": ".".join(map(str, vm.qemu_version)),
            "package": vm.package,
            "memory_kib": vm.memory_kib,
            "topology": topology and {field.name: getattr(topology, field.name) for field in fields(topology)},
            "can_plug": vm.can_plug,
            "can_unplug": vm.can_unplug,
            "libvirt_owned": vm.libvirt_owned,
            "x2apic": vm.x2apic,
        },
        "generation": layout.generation,
        "vcpus": [_vcpu_as_json(vcpu) for vcpu in layout],
    }


def _vcpu_as_json(vcpu: Vcpu) -> dict[str, Any]:
    slot = vcpu.slot
    return {
        "id": vcpu.id,
        "slot": slot.first,
        "enabled": vcpu.enabled,
        "hotpluggable": vcpu.hotpluggable,
        "order": vcpu.order,
        "pending": vcpu.pending,
        "acknowledged": vcpu.acknowledged,
        "device_id": vcpu.device_id,
        "type": vcpu.type,
        "props": dict(vcpu.props),
        "qom_path": vcpu.qom_path,
        "host_tid": vcpu.host_tid,
        "cpu_index": slot.cpu_index,
        "answer": None if slot.answer is None else [slot.answer.source, slot.answer.code],
    }


def layout_from_json(data: Mapping[str, Any]) -> Layout:
    """Return the layout that ``layout_as_json`` was given.

    Raises:
        ValueError: It is not of that shape; the text names the key.
    """
    rows = take(data, "vcpus", list)
    by_slot: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_slot.setdefault(take(row, "slot", int), []).append(row)
    slots = tuple(_slot(first, of_slot) for first, of_slot in by_slot.items())
    orders = {take(row, "slot", int): row["order"] for row in rows if row.get("order") is not None}
    pending = take(data, "pending", VcpuMap.parse)
    return Layout(
        vm=take(data, "vm", _vm),
        slots=slots,
        creation=tuple(sorted(orders, key=lambda first: int(orders[first]))),
        pending_slots=frozenset(slot.first for slot in slots if slot.first in pending),
        generation=take(data, "generation", int),
    )


def _slot(first: int, rows: list[Mapping[str, Any]]) -> Slot:
    row = rows[0]
    path = row.get("qom_path")
    answer = row.get("answer")
    return Slot(
        first=first,
        count=len(rows),
        type=take(row, "type", str),
        props=take(row, "props", CpuProps),
        cpu_index=take(row, "cpu_index", int),
        qom_path=path if path is None else str(path),
        host_tids=() if path is None else tuple(each.get("host_tid") for each in rows),
        answer=None if answer is None else take(row, "answer", lambda pair: OstAnswer(int(pair[0]), int(pair[1]))),
    )


def _vm(data: Mapping[str, Any]) -> VmInfo:
    known = {field.name: data[field.name] for field in fields(VmInfo) if field.name in data}
    topology = data.get("topology")
    return VmInfo(
        **known
        | {
            "qemu_version": take(data, "qemu", _version),
            "topology": None if topology is None else Topology(**topology),
        }
    )


def _version(text: str) -> tuple[int, int, int]:
    major, minor, micro = text.split(".")
    return int(major), int(minor), int(micro)


def verdict_from_json(data: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict that ``as_json`` was given; more keys than its own are no matter. None: ``verdict`` is null.

    Raises:
        ValueError: It is not of that shape; the text names the key.
    """
    name = take(data, "verdict", lambda word: word)
    if name is None:
        return None
    kind = take(data, "verdict", _VERDICTS.__getitem__)
    values = {field.name: take(data, field.name, lambda value: value) for field in fields(kind)}
    values["ids"] = take(data, "ids", VcpuMap.parse)
    if kind is Denied:
        values["reason"] = take(data, "reason", DenialReason.__getitem__)
    return kind(**values)
