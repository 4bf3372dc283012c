"""Layouts as JSON, and back: what the command line prints, and what a report is kept as."""

from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Any, Final, NamedTuple

from qmpvcpu.model.jsonread import flag, optional, rows, shaped, take, text, unlike, vcpu_map, whole_number
from qmpvcpu.model.layout import CpuProps, Layout, Slot, Vcpu
from qmpvcpu.model.names import is_cpu_type, is_qom_path, is_uuid, is_word
from qmpvcpu.model.ost import OstAnswer
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology, VmInfo

_MOST_VCPUS: Final = 16384


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
            "named": vm.named,
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
            "confidential": vm.confidential,
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

    Keys that it does not write are no matter; of those that follow from others ``max``, ``enabled`` and
    ``pending`` must agree with them, the rest is not read.

    Raises:
        ValueError: It is not of that shape, or contradicts itself; the text names the key.
    """
    vcpus = take(data, "vcpus", _read_vcpus)
    by_slot: dict[int, list[_Row]] = {}
    for vcpu in vcpus:
        by_slot.setdefault(vcpu.slot, []).append(vcpu)
    slots = tuple(_slot_of(of_slot) for of_slot in by_slot.values())
    places = {vcpu.slot: vcpu.order for vcpu in vcpus if vcpu.order is not None}
    if sorted(places.values()) != list(range(1, len(places) + 1)):
        raise ValueError(f"'vcpus': 'order' does not go from 1 to {len(places)}, the slots that have one")
    pending = take(data, "pending", vcpu_map)
    vm = take(data, "vm", _read_vm)
    untyped = next((slot.first for slot in slots if not slot.type), None)
    if vm.can_plug and untyped is not None:
        raise ValueError(f"'vcpus': [{untyped}]: 'type': a machine that takes CPUs names the type of each")
    layout = Layout(
        vm=vm,
        slots=slots,
        creation=tuple(sorted(places, key=places.__getitem__)),
        pending_slots=frozenset(slot.first for slot in slots if slot.first in pending),
        generation=take(data, "generation", whole_number),
    )
    for key, read, observed in (
        ("max", whole_number, layout.max),
        ("enabled", vcpu_map, layout.enabled),
        ("pending", vcpu_map, layout.pending & layout.enabled),
    ):
        if take(data, key, read) != observed:
            raise ValueError(f"{key!r}: {unlike(data[key], f'{observed}, which its vCPUs make')}")
    return layout


class _Row(NamedTuple):
    """One vCPU as it is read, before it is known whether its slot has more of them."""

    id: int
    slot: int
    host_tid: int | None
    type: str
    props: CpuProps
    cpu_index: int
    qom_path: str | None
    order: int | None
    answer: OstAnswer | None

    @property
    def shared(self) -> tuple[object, ...]:
        """What all vCPUs of a slot have in common."""
        return self[3:]


def _read_row(data: object) -> _Row:
    row = _Row(
        id=take(data, "id", _read_id),
        slot=take(data, "slot", whole_number),
        host_tid=take(data, "host_tid", optional(whole_number)),
        type=take(data, "type", _read_type),
        props=take(data, "props", _read_props),
        cpu_index=take(data, "cpu_index", whole_number),
        qom_path=take(data, "qom_path", optional(_read_path)),
        order=take(data, "order", optional(whole_number)),
        answer=take(data, "answer", optional(_read_answer)),
    )
    if row.order is not None and row.qom_path is None:
        raise ValueError(f"'order': vCPU {row.id} has one, and no 'qom_path'")
    return row


def _read_vcpus(value: object) -> tuple[_Row, ...]:
    vcpus = rows(_read_row)(value)
    for place, vcpu in enumerate(vcpus):
        if vcpu.id != place:
            raise ValueError(f"[{place}]: 'id': vCPU {vcpu.id} stands in the place of vCPU {place}")
    for before, vcpu in pairwise(vcpus):
        if vcpu.slot not in (before.slot, vcpu.id) or (vcpu.slot == before.slot and vcpu.shared != before.shared):
            raise ValueError(f"[{vcpu.id}]: 'slot': vCPUs {before.id} and {vcpu.id} make no slot {vcpu.slot}")
    if vcpus and vcpus[0].slot:
        raise ValueError(f"[0]: 'slot': vCPU 0 is the first of its slot, not of {vcpus[0].slot}")
    return vcpus


def _read_id(value: object) -> int:
    return min(VcpuMap([whole_number(value)]))  # which has a bound


def _slot_of(vcpus: list[_Row]) -> Slot:
    first = vcpus[0]
    return Slot(
        first=first.id,
        count=len(vcpus),
        type=first.type,
        props=first.props,
        cpu_index=first.cpu_index,
        qom_path=first.qom_path,
        host_tids=() if first.qom_path is None else tuple(vcpu.host_tid for vcpu in vcpus),
        answer=first.answer,
    )


_read_word = shaped(is_word, "a name of QEMU's")
_read_path = shaped(is_qom_path, "a QOM path")
_read_cpu_type = shaped(is_cpu_type, "a CPU's type")


def _read_type(value: object) -> str:
    return "" if value == "" else _read_cpu_type(value)  # a machine without CPU hotplug names none


def _read_props(value: object) -> CpuProps:
    if not isinstance(value, Mapping):
        raise ValueError(unlike(value, "a JSON object"))  # noqa: TRY004 -- bad content, whatever its type
    return CpuProps(value)


def _read_answer(value: object) -> OstAnswer:
    if not isinstance(value, list) or len(value) != len(fields(OstAnswer)):
        raise ValueError(unlike(value, "a source and a status"))
    return OstAnswer(*rows(whole_number)(value))


def _read_vm(data: object) -> VmInfo:
    return VmInfo(
        name=take(data, "name", text),
        named=take(data, "named", flag),
        arch=take(data, "arch", _read_word),
        machine=take(data, "machine", _read_word),
        accelerator=take(data, "accelerator", _read_word),
        qemu_version=take(data, "qemu", _read_version),
        uuid=take(data, "uuid", optional(shaped(is_uuid, "a uuid"))),
        package=take(data, "package", text),
        memory_kib=take(data, "memory_kib", optional(whole_number)),
        topology=take(data, "topology", optional(_read_topology)),
        can_plug=take(data, "can_plug", flag),
        can_unplug=take(data, "can_unplug", flag),
        libvirt_owned=take(data, "libvirt_owned", flag),
        x2apic=take(data, "x2apic", optional(flag)),
        confidential=take(data, "confidential", flag),
    )


def _read_topology(data: object) -> Topology:
    return Topology(**{field.name: take(data, field.name, _read_size) for field in fields(Topology)})


def _read_size(value: object) -> int:
    if not 1 <= whole_number(value) <= _MOST_VCPUS:
        raise ValueError(unlike(value, f"a whole number from 1 to {_MOST_VCPUS}"))
    return whole_number(value)


def _read_version(value: object) -> tuple[int, int, int]:
    match text(value).split("."):
        case [major, minor, micro] if all(_is_short_number(part) for part in (major, minor, micro)):
            return int(major), int(minor), int(micro)
    raise ValueError(unlike(value, "a version such as 10.0.2"))


def _is_short_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < len(str(2**32))
