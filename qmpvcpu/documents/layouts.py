"""Layouts as JSON: only the map, or everything known about the VM and each vCPU."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from qmpvcpu.errors import shorten
from qmpvcpu.model.codec import members, to_json
from qmpvcpu.model.layout import Layout, Slot, Vcpu
from qmpvcpu.model.options import Proof
from qmpvcpu.model.vm import VmInfo

_MOST_QUOTED: Final = 60

# What all vCPUs of a slot share.
_OF_SLOT: Final = ("type", "props", "cpu_index", "qom_path", "answer", "proof", "proven_at", "order", "pending")


def state_json(layout: Layout) -> dict[str, Any]:
    """Return only the map."""
    return {"max": layout.max, "enabled": str(layout.enabled), "pending": str(layout.pending)}


def layout_json(layout: Layout) -> dict[str, Any]:
    """Return everything known about the VM and each vCPU."""
    return {
        **state_json(layout),
        "vm": to_json(layout.vm),
        "generation": layout.generation,
        "vcpus": [_vcpu_json(vcpu) for vcpu in layout],
    }


def _vcpu_json(vcpu: Vcpu) -> dict[str, Any]:
    return {
        "id": vcpu.id,
        "slot": vcpu.slot.first,
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
        "cpu_index": vcpu.slot.cpu_index,
        "answer": to_json(vcpu.slot.answer),
        "proof": to_json(vcpu.proof),
        "proven_at": vcpu.proven_at,
    }


def layout_from_json(data: Mapping[str, Any]) -> Layout:
    """Return the layout that ``layout_json`` was given; unknown and derived keys are ignored.

    Raises:
        ValueError: It has another shape, or contradicts itself; the text names the key.
    """
    content = members(data, {"vm": VmInfo, "generation": int, "vcpus": tuple[object, ...]})
    kinds = {field.name: field.type for field in fields(Slot)}
    kinds = {name: kinds[name] for name in _OF_SLOT if name in kinds} | {
        "id": int,
        "slot": int,
        "order": int | None,
        "pending": bool,
        "proof": Proof | None,
        "host_tid": int | None,
    }
    slots: list[list[dict[str, Any]]] = []
    for place, each in enumerate(content["vcpus"]):
        try:
            vcpu = members(each, kinds)
            if vcpu["slot"] == vcpu["id"]:
                slots.append([vcpu])
            else:
                _check_same_slot(vcpu, slots[-1] if slots else [])
                slots[-1].append(vcpu)
        except ValueError as error:
            raise ValueError(f"'vcpus': [{place}]: {error}") from error
    firsts = [vcpus[0] for vcpus in slots]
    layout = Layout(
        vm=content["vm"],
        slots=tuple(map(_slot_of, slots)),
        creation=_creation(firsts),
        pending_slots=frozenset(vcpu["id"] for vcpu in firsts if vcpu["pending"]),
        generation=content["generation"],
    )
    layout.check_foreign()
    return layout


def _check_same_slot(vcpu: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless *vcpu* follows *others* in their slot."""
    if not others or vcpu["slot"] != others[0]["id"] or vcpu["id"] != others[-1]["id"] + 1:
        raise ValueError(f"'slot': {shorten(vcpu['slot'], _MOST_QUOTED)} is not the first vCPU of its slot")
    for name in _OF_SLOT:
        if vcpu[name] != others[0][name]:
            raise ValueError(f"{name!r}: it is another than that of vCPU {others[0]['id']}, of the same slot")


def _slot_of(vcpus: Sequence[Mapping[str, Any]]) -> Slot:
    first = vcpus[0]
    present = first["qom_path"] is not None
    slot = Slot(
        first["id"],
        len(vcpus),
        first["type"],
        first["props"],
        first["cpu_index"],
        first["qom_path"],
        tuple(vcpu["host_tid"] for vcpu in vcpus) if present else (),
        first["answer"],
    )
    # A CPU may be known to be there, or acknowledged, although nobody saw it happen.
    if first["proven_at"] is None and slot.proof is first["proof"]:
        return slot
    return slot.proving(first["proof"], first["proven_at"])


def _creation(firsts: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Return the slots in the order in which QEMU created them, each by its first vCPU."""
    by_place = {vcpu["order"]: vcpu["id"] for vcpu in firsts if vcpu["order"] is not None}
    wrong = next((each for each in by_place if not 1 <= each <= len(by_place)), None)
    if wrong is not None or len(by_place) < sum(vcpu["order"] is not None for vcpu in firsts):
        raise ValueError("'vcpus': 'order': the places of the slots are not 1, 2, 3 and so on, each once")
    return tuple(by_place[place] for place in sorted(by_place))
