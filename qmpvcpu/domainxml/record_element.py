"""Our own element under ``<metadata>``: what libvirt has no place for.

::

    <qmpvcpu:record xmlns:qmpvcpu="urn:qmpvcpu:record:1" generation="7" made-up-uuid="...">
      <qmpvcpu:instance host-tid="4711" start-ticks="123456"/>
      <qmpvcpu:pending vcpus="3"/>
      <qmpvcpu:device vcpu="4" id="cpu-4"/>
      <qmpvcpu:previous max="8" started-with="1" order="0,5,3,2" sockets="2" cores="2" threads="2"/>
      <qmpvcpu:desired vcpus="0,2-5"/>
      <qmpvcpu:next-boot vcpus="0-3"/>
      <qmpvcpu:transition start="0-1,6" target="0,2-5" on-failure="revert" timeout="30.0" direction="forward"
                          next-boot="0,2-5">
        <qmpvcpu:step action="plug" vcpus="2"/>
        <qmpvcpu:step action="unplug" vcpus="6" path="/machine/peripheral/vcpu6" joins="yes"/>
      </qmpvcpu:transition>
    </qmpvcpu:record>

It is read back exactly, or not at all: to rewrite a record that holds more than is understood would lose it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import NoReturn, TypeVar
from uuid import UUID

from lxml import etree

from qmpvcpu.domainxml.safe_xml import line_of
from qmpvcpu.domainxml.writer import Node
from qmpvcpu.errors import DomainXmlError, InvalidMapError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.names import is_device_id, is_qom_path
from qmpvcpu.model.transition import Action, Direction, Intent, OnFailure, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from qmpvcpu.model.vmstate import PreviousVcpus

_T = TypeVar("_T")

_FAMILY = "urn:qmpvcpu:record:"
NAMESPACE = f"{_FAMILY}1"
"""Namespace of our element under ``<metadata>``; its number changes when an old reader could misread a new one."""

_PREFIX = "qmpvcpu"
_RECORD = f"{{{NAMESPACE}}}record"
_NEWER = "written by a newer version of qmpvcpu"

# As QEMU's -smp has them, highest first.
_LEVELS = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")
# What is understood, by the way from our element down: the attributes of each.
_KNOWN = {
    "record": {"generation", "made-up-uuid", "nameless", "in-place"},
    "record/instance": {"host-tid", "start-ticks"},
    "record/pending": {"vcpus"},
    "record/device": {"vcpu", "id"},
    "record/previous": {"max", "started-with", "order", *_LEVELS},
    "record/desired": {"vcpus"},
    "record/next-boot": {"vcpus"},
    "record/transition": {"start", "target", "on-failure", "timeout", "direction", "next-boot", "config"},
    "record/transition/step": {"action", "vcpus", "path", "joins"},
}
_SEVERAL = {"record/device", "record/transition/step"}
# 18 digits hold every count of ours, and spare int() the quadratic time that it takes for megabytes.
_NUMBER = re.compile("[0-9]{1,18}")
# As repr() writes a float.
_SECONDS = re.compile(r"[0-9]{1,18}(\.[0-9]{1,24})?(e[+-][0-9]{1,3})?")
# No machine has so many vCPUs, even if each were in four steps; a hostile record would have them without end.
_MOST_VCPUS = 16384
_MOST_IDS_IN_STEPS = 4 * _MOST_VCPUS
_MOST_TOLD = 200
_TRUTHS = {"yes": True, "no": False}


@dataclass(frozen=True, slots=True)
class Instance:
    """One run of QEMU: the same VM started again is another instance.

    Attributes:
        host_tid: Thread id of vCPU 0 on QEMU's host.
        start_ticks: When that thread started, in clock ticks since its host booted (field 22 of
            ``/proc/<pid>/task/<tid>/stat``), or None where QEMU runs on another host.
    """

    host_tid: int
    start_ticks: int | None = None


@dataclass(frozen=True, slots=True)
class Metadata:
    """What libvirt has no place for; kept in our own element under ``<metadata>``.

    Attributes:
        generation: How often this record was written.
        uuid: The uuid made up for a VM whose QEMU has none; None where QEMU has one.
        pending: vCPUs whose removal QEMU accepted and the guest has not answered.
        device_ids: Device ids that are not ``vcpu<first id>``, by first vCPU id of their slot. A VM rebuilt from
            the document has ``vcpu<first id>`` in their place.
        instance: The QEMU that this was read from, or None where not known.
        intent: The transition under way, or None while there is none.
        desired: The map that was last asked for, or None if none was.
        next_boot: The vCPUs that the next boot is to have; None: those that are plugged.
        previous: What an earlier QEMU had, and this one has not been given again; None: nothing is kept.
        nameless: True if the VM was given neither a uuid nor a name: that of the document is a label.
        in_place: True if the document around it is not of our making: it is never written anew, only changed.
    """

    generation: int = 0
    uuid: str | None = None
    pending: VcpuMap = field(default_factory=VcpuMap)
    device_ids: Mapping[int, str] = field(default_factory=dict)
    instance: Instance | None = None
    intent: Intent | None = None
    desired: VcpuMap | None = None
    next_boot: VcpuMap | None = None
    previous: PreviousVcpus | None = None
    nameless: bool = False
    in_place: bool = False

    @classmethod
    def of(
        cls,
        layout: Layout,
        *,
        generation: int = 0,
        uuid: str | None = None,
        instance: Instance | None = None,
        intent: Intent | None = None,
        desired: VcpuMap | None = None,
        next_boot: VcpuMap | None = None,
        previous: PreviousVcpus | None = None,
    ) -> "Metadata":
        """Return what *layout* has to tell that libvirt has no place for; the rest as given."""
        foreign = {
            slot.first: slot.device_id
            for slot in layout.slots
            if slot.device_id is not None and slot.device_id != slot.new_device_id
        }
        return cls(
            generation=generation,
            uuid=uuid,
            pending=layout.pending,
            device_ids=foreign,
            instance=instance,
            intent=intent,
            desired=desired,
            next_boot=next_boot,
            previous=previous,
            nameless=layout.vm.identity is None,
        )


def record_node(metadata: Metadata) -> Node:
    """Return our element, to be written.

    Raises:
        DomainXmlError: A transition that could not be read back: its timeout is no time, a step has no vCPU.
    """
    attributes: dict[str, object] = {f"xmlns:{_PREFIX}": NAMESPACE, "generation": metadata.generation}
    if metadata.uuid is not None:
        attributes["made-up-uuid"] = metadata.uuid
    if metadata.nameless:
        attributes["nameless"] = "yes"
    if metadata.in_place:
        attributes["in-place"] = "yes"
    return Node(f"{_PREFIX}:record", attributes, tuple(_children(metadata)))


def _children(metadata: Metadata) -> Iterator[Node]:
    if metadata.instance is not None:
        started = metadata.instance.start_ticks
        ticks = {} if started is None else {"start-ticks": started}
        yield Node(f"{_PREFIX}:instance", {"host-tid": metadata.instance.host_tid, **ticks})
    if metadata.pending:
        yield Node(f"{_PREFIX}:pending", {"vcpus": metadata.pending})
    for first, device_id in sorted(metadata.device_ids.items()):
        yield Node(f"{_PREFIX}:device", {"vcpu": first, "id": device_id})
    if metadata.previous is not None:
        yield _previous_node(metadata.previous)
    if metadata.desired is not None:
        yield Node(f"{_PREFIX}:desired", {"vcpus": metadata.desired})
    if metadata.next_boot is not None:
        yield Node(f"{_PREFIX}:next-boot", {"vcpus": metadata.next_boot})
    if metadata.intent is not None:
        yield _transition_node(metadata.intent)


def _previous_node(previous: PreviousVcpus) -> Node:
    attributes: dict[str, object] = {
        "max": previous.max,
        "started-with": len(previous.started_with),
        "order": ",".join(map(str, previous.order)),
    }
    if previous.topology is not None:
        sizes = {level: getattr(previous.topology, level) for level in _LEVELS}
        attributes |= {level: size for level, size in sizes.items() if size > 1 or level == "sockets"}
    return Node(f"{_PREFIX}:previous", attributes)


def _transition_node(intent: Intent) -> Node:
    timeout = repr(float(intent.timeout))
    if not _SECONDS.fullmatch(timeout):
        raise DomainXmlError(f"{timeout} is no time to wait for an answer")
    attributes: dict[str, object] = {
        "start": intent.start,
        "target": intent.target,
        "on-failure": intent.on_failure.value,
        "timeout": timeout,
        "direction": intent.direction.value,
    }
    if intent.next_boot is not None:
        attributes["next-boot"] = intent.next_boot
    if intent.config is not None:
        attributes["config"] = intent.config
    return Node(f"{_PREFIX}:transition", attributes, tuple(_step_node(step) for step in intent.steps))


def _step_node(step: Step) -> Node:
    if not step.ids:
        raise DomainXmlError(f"a step without a vCPU: {step!r}")
    path = {} if step.qom_path is None else {"path": step.qom_path}
    joins = {"joins": "yes"} if step.joins else {}
    return Node(f"{_PREFIX}:step", {"action": step.action.value, "vcpus": step.ids, **path, **joins})


def find_record(metadata: etree._Element) -> etree._Element | None:
    """Return our element out of ``<metadata>``, or None if there is none.

    Raises:
        DomainXmlError: A newer version of ours wrote there, or there are two.
    """
    found = []
    for child in metadata.iterchildren(tag=etree.Element):
        namespace = etree.QName(child).namespace or ""
        if child.tag == _RECORD:
            found.append(child)
        elif namespace.startswith(_FAMILY):
            raise DomainXmlError(f"{_NEWER} ({child.tag!s})", line=line_of(child))
    if len(found) > 1:
        raise _damaged(found[1], "it is there twice")
    return found[0] if found else None


def read_metadata(record: etree._Element) -> Metadata:
    """Return what our element says.

    Raises:
        DomainXmlError: It is damaged, or holds what only a newer version can have written; ``line`` says where.
    """
    _check_known(record, "record")
    names = ("instance", "pending", "previous", "desired", "next-boot", "transition")
    instance, pending, previous, desired, next_boot, transition = (
        record.find(f"{{{NAMESPACE}}}{name}") for name in names
    )
    return Metadata(
        generation=_value(record, "generation", _number),
        uuid=None if record.get("made-up-uuid") is None else _value(record, "made-up-uuid", _uuid),
        nameless=record.get("nameless") is not None and _value(record, "nameless", _truth),
        in_place=record.get("in-place") is not None and _value(record, "in-place", _truth),
        pending=VcpuMap() if pending is None else _value(pending, "vcpus", _map),
        device_ids=_read_devices(record),
        instance=None if instance is None else _read_instance(instance),
        intent=None if transition is None else _read_transition(transition),
        previous=None if previous is None else _read_previous(previous),
        desired=None if desired is None else _value(desired, "vcpus", _map),
        next_boot=None if next_boot is None else _value(next_boot, "vcpus", _map_of_a_vm),
    )


def _check_known(element: etree._Element, way: str) -> None:
    for attribute in sorted(set(map(str, element.keys())) - _KNOWN[way]):
        _refuse_unknown(element, attribute, namespace=etree.QName(attribute).namespace or NAMESPACE)
    seen = set()
    for child in element.iterchildren(tag=etree.Element):
        name = etree.QName(child)
        below = f"{way}/{name.localname}"
        if name.namespace != NAMESPACE or below not in _KNOWN:
            _refuse_unknown(element, f"<{name.text}>", namespace=name.namespace or "")
        if below in seen and below not in _SEVERAL:
            raise _damaged(child, "it is there twice")
        seen.add(below)
        _check_known(child, below)


def _refuse_unknown(holder: etree._Element, what: str, *, namespace: str) -> NoReturn:
    if not namespace.startswith(_FAMILY):
        raise _damaged(holder, f"{what} is not ours")
    raise DomainXmlError(f"{_NEWER} ({what} in <{etree.QName(holder).localname}>)", line=line_of(holder))


def _read_devices(record: etree._Element) -> dict[int, str]:
    found: dict[int, str] = {}
    for device in record.iterfind(f"{{{NAMESPACE}}}device"):
        first = _value(device, "vcpu", _number)
        if first in found:
            raise _damaged(device, f"another of vCPU {first} is there")
        found[first] = _value(device, "id", _device_id)
    return found


def _read_instance(instance: etree._Element) -> Instance:
    ticks = None if instance.get("start-ticks") is None else _value(instance, "start-ticks", _number)
    return Instance(_value(instance, "host-tid", _number), ticks)


def _read_previous(previous: etree._Element) -> PreviousVcpus:
    most = _value(previous, "max", _count)
    order = _value(previous, "order", _ids)
    started_with = _value(previous, "started-with", _count)
    if len(set(order)) < len(order) or max(order) >= most or started_with > len(order):
        raise _damaged(previous, f"order: not {started_with} or more of {most} vCPUs, each once")
    sizes = {level: _value(previous, level, _count) for level in _LEVELS if previous.get(level) is not None}
    topology = Topology(prod(sizes.values()), **sizes) if sizes else None
    return PreviousVcpus(most, VcpuMap(order[:started_with]), order, topology)


def _read_transition(transition: etree._Element) -> Intent:
    steps: list[Step] = []
    ids = 0
    for element in transition.iterfind(f"{{{NAMESPACE}}}step"):
        steps.append(_read_step(element))
        ids += len(steps[-1].ids)
        if ids > _MOST_IDS_IN_STEPS:
            raise _damaged(element, "more vCPUs than any machine has")
    return Intent(
        start=_value(transition, "start", _map),
        target=_value(transition, "target", _map),
        steps=tuple(steps),
        on_failure=_value(transition, "on-failure", OnFailure),
        timeout=_value(transition, "timeout", _seconds),
        direction=_value(transition, "direction", Direction),
        next_boot=None if transition.get("next-boot") is None else _value(transition, "next-boot", _map_of_a_vm),
        config=transition.get("config"),
    )


def _read_step(step: etree._Element) -> Step:
    return Step(
        _value(step, "action", Action),
        _value(step, "vcpus", _map_of_a_slot),
        None if step.get("path") is None else _value(step, "path", _path),
        joins=step.get("joins") is not None and _value(step, "joins", _truth),
    )


def _value(element: etree._Element, name: str, read: Callable[[str], _T]) -> _T:
    text = element.get(name)
    if text is None:
        raise _damaged(element, f"{name} is missing")
    try:
        return read(text)
    except (InvalidMapError, ValueError) as error:
        raise _damaged(element, f"{name}: {_shortened(str(error))}") from error


def _shortened(text: str) -> str:
    # The value comes first and what is wrong with it last.
    return text if len(text) <= _MOST_TOLD else f"{text[: _MOST_TOLD // 2]}...{text[-_MOST_TOLD // 2 :]}"


def _damaged(element: etree._Element, why: str) -> DomainXmlError:
    where = etree.QName(element).localname
    return DomainXmlError(f"our metadata is damaged: <{where}>: {why}", line=line_of(element))


def _map(text: str) -> VcpuMap:
    # As we write it: ascending ids and ranges. Others would have VcpuMap unfold the same range again and again.
    bounds = [_number(each) for each in re.split("[,-]", text)] if text else []
    if any(after <= before for before, after in pairwise(bounds)):
        raise ValueError(f"{text!r} does not ascend")
    return VcpuMap.parse(text)


def _map_of_a_slot(text: str) -> VcpuMap:
    if not text:
        raise ValueError("a slot has a vCPU")
    return _map(text)


def _map_of_a_vm(text: str) -> VcpuMap:
    ids = _map(text)
    if 0 not in ids:
        raise ValueError(f"{text!r} is without vCPU 0")
    return ids


def _ids(text: str) -> tuple[int, ...]:
    return tuple(_number(each) for each in text.split(","))


def _count(text: str) -> int:
    number = _number(text)
    if not 1 <= number <= _MOST_VCPUS:
        raise ValueError(f"{text!r} is not 1 to {_MOST_VCPUS}")
    return number


def _truth(text: str) -> bool:
    if text not in _TRUTHS:
        raise ValueError(f"{text!r} is neither yes nor no")
    return _TRUTHS[text]


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is no number")
    return int(text)


def _seconds(text: str) -> float:
    seconds = float(text) if _SECONDS.fullmatch(text) else math.inf
    if math.isinf(seconds):
        raise ValueError(f"{text!r} is no time")
    return seconds


def _device_id(text: str) -> str:
    if not is_device_id(text):
        raise ValueError(f"{text!r} is no device id")
    return text


def _path(text: str) -> str:
    if not is_qom_path(text):
        raise ValueError(f"{text!r} is no QOM path")
    return text


def _uuid(text: str) -> str:
    return str(UUID(text))
