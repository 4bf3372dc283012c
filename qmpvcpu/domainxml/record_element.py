"""Our own element under ``<metadata>``, for what libvirt cannot express.

::

    <qmpvcpu:record xmlns:qmpvcpu="urn:qmpvcpu:record:1" generation="7" made-up-uuid="...">
      <qmpvcpu:instance host-tid="4711" start-ticks="123456"/>
      <qmpvcpu:pending vcpus="3"/>
      <qmpvcpu:device vcpu="4" id="cpu-4"/>
      <qmpvcpu:previous max="8" started-with="1" order="0,5,3,2" sockets="2" cores="2" threads="2"/>
      <qmpvcpu:desired vcpus="0,2-5"/>
      <qmpvcpu:next-boot vcpus="0-3"/>
      <qmpvcpu:next-placement cpuset="0-7">
        <qmpvcpu:place vcpus="2-3" cpuset="8-11" scheduler="fifo:1"/>
        <qmpvcpu:emulator cpuset="0"/>
      </qmpvcpu:next-placement>
      <qmpvcpu:transition start="0-1,6" target="0,2-5" on-failure="revert" timeout="30.0" direction="forward"
                          next-boot="0,2-5">
        <qmpvcpu:step action="plug" vcpus="2"/>
        <qmpvcpu:step action="unplug" vcpus="6" path="/machine/peripheral/vcpu6" joins="yes"/>
      </qmpvcpu:transition>
    </qmpvcpu:record>

It is read back exactly or not at all: rewriting a record that holds more than we understand would lose it. One table
names its attributes, for reading and for writing.
"""

import enum
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Any, Final, NamedTuple, NoReturn
from uuid import UUID

from lxml import etree

from qmpvcpu.domainxml.safe_xml import line_of
from qmpvcpu.domainxml.writer import Node
from qmpvcpu.errors import DomainXmlError, InvalidMapError
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.names import is_device_id, is_qom_path
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.placement import CoreScheduling, Place, Placement, Scheduler
from qmpvcpu.model.transition import Action, Direction, Intent, Step
from qmpvcpu.model.vcpumap import MOST_VCPUS, VcpuMap
from qmpvcpu.model.vm import SMP_LEVELS, Topology

_FAMILY = "urn:qmpvcpu:record:"
NAMESPACE = f"{_FAMILY}1"
"""Namespace of our element under ``<metadata>``; its number changes when an old reader could misread a new one."""

_PREFIX: Final = "qmpvcpu"
_NEWER: Final = "written by a newer version of qmpvcpu"
_PLACE: Final = "/next-placement/place"
_SEVERAL: Final = {"record/device", "record/transition/step", f"record{_PLACE}", f"record/transition{_PLACE}"}
# 18 digits hold all our counts, and spare int() the quadratic time that it takes for megabytes.
_NUMBER: Final = re.compile("[0-9]{1,18}")
# As repr() writes a float.
_SECONDS: Final = re.compile(r"[0-9]{1,18}(\.[0-9]{1,24})?(e[+-][0-9]{1,3})?")
# Enough for every vCPU to be in four steps; a hostile record would not stop there.
_MOST_IDS_IN_STEPS: Final = 4 * MOST_VCPUS
# As in a document's cpusets.
_MOST_CPUS_NAMED: Final = 2**20
_MOST_TOLD: Final = 200
_TRUTHS: Final = {"yes": True, "no": False}


class Instance(NamedTuple):
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
    """What our own element under ``<metadata>`` holds, because libvirt cannot express it.

    Attributes:
        generation: How often this record was written.
        uuid: The uuid made up for a VM whose QEMU has none; None where QEMU has one.
        pending: vCPUs whose removal QEMU accepted and the guest has not answered.
        device_ids: Device ids that are not ``vcpu<first id>``, by first vCPU id of their slot. A VM rebuilt from
            the document has ``vcpu<first id>`` in their place.
        instance: The QEMU that this was read from, or None where not known.
        intent: The transition under way, or None while there is none.
        desired: The map last requested, or None.
        next_boot: The vCPUs of the next boot; None: those that are plugged.
        next_placement: Where threads are to run from the next boot on: what a document can say of it; None: where
            they do now.
        previous: What an earlier QEMU had, and this one has not been given again, or None.
        nameless: True if the VM was given neither a uuid nor a name: the document's name is a label.
        in_place: True if the document around it is not ours: it is only changed, never written anew.
        core_scheduling: Which threads share no core with others; None: nothing is said of that.
    """

    generation: int = 0
    uuid: str | None = None
    pending: VcpuMap = field(default_factory=VcpuMap)
    device_ids: Mapping[int, str] = field(default_factory=dict)
    instance: Instance | None = None
    intent: Intent | None = None
    desired: VcpuMap | None = None
    next_boot: VcpuMap | None = None
    next_placement: Placement | None = None
    previous: PreviousVcpus | None = None
    nameless: bool = False
    in_place: bool = False
    core_scheduling: CoreScheduling | None = None

    def with_layout(self, layout: Layout) -> "Metadata":
        """Return this with what *layout* says of pending removals, foreign device ids, and the VM's name."""
        foreign = {
            slot.first: slot.device_id
            for slot in layout.slots
            if slot.device_id is not None and slot.device_id != slot.new_device_id
        }
        return replace(self, pending=layout.pending, device_ids=foreign, nameless=layout.vm.identity is None)


# How the values are written.


def _map(text: str) -> VcpuMap:
    # We write ascending ids and ranges. A hostile text would have VcpuMap unfold the same range again and again.
    bounds = [_number(each) for each in re.split("[,-]", text)] if text else []
    if any(after <= before for before, after in pairwise(bounds)):
        raise ValueError(f"{text!r} does not ascend")
    return VcpuMap.parse(text)


def _map_of_a_slot(text: str) -> VcpuMap:
    return _map(_checked(text, bool(text), "is empty, and a slot has a vCPU"))


def _map_of_a_vm(text: str) -> VcpuMap:
    ids = _map(text)
    _checked(text, 0 in ids, "lacks vCPU 0")
    return ids


def _host_cpus(text: str) -> VcpuMap:
    return _map(_checked(text, bool(text), "names no host CPU"))


def _birthplaces(text: str) -> tuple[VcpuMap, ...]:
    found: list[VcpuMap] = []
    named = 0
    for each in text.split(";"):
        found.append(_host_cpus(each))
        named += len(found[-1])
        _checked("it", named <= _MOST_CPUS_NAMED, "names more host CPUs than any placement")
    return tuple(found)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(_number(each) for each in text.split(","))


def _number(text: str) -> int:
    return int(_checked(text, _NUMBER.fullmatch(text), "is not a number"))


def _count(text: str) -> int:
    number = _number(text)
    _checked(text, 1 <= number <= MOST_VCPUS, f"is not 1 to {MOST_VCPUS}")
    return number


def _truth(text: str) -> bool:
    return _TRUTHS[_checked(text, text in _TRUTHS, "is neither yes nor no")]


def _seconds(text: str) -> float:
    seconds = float(text) if _SECONDS.fullmatch(text) else math.inf
    _checked(text, math.isfinite(seconds), "is not a time")
    return seconds


def _device_id(text: str) -> str:
    return _checked(text, is_device_id(text), "is not a device id")


def _path(text: str) -> str:
    return _checked(text, is_qom_path(text), "is not a QOM path")


def _uuid(text: str) -> str:
    return str(UUID(text))


def _checked(text: str, good: object, fault: str) -> str:
    if not good:
        raise ValueError(f"{text!r} {fault}")
    return text


def _written(value: object) -> object:
    match value:
        case enum.Enum():
            return value.value
        case True:
            return "yes"
        case tuple():
            return (";" if isinstance(value[0], VcpuMap) else ",").join(map(str, value))
        case float():
            text = repr(value)
            if not _SECONDS.fullmatch(text):
                raise DomainXmlError(f"{text} is not a time to wait for an answer")
            return text
        case _:
            return value


class _Attribute(NamedTuple):
    """An attribute: the field of the value that it is kept in, how it is read, and whether it may be absent."""

    field: str
    read: Callable[[str], Any]
    optional: bool = False


_WHERE: Final = {
    "cpuset": _Attribute("cpus", _host_cpus, optional=True),
    "scheduler": _Attribute("scheduler", Scheduler.parse, optional=True),
}
_PLACEMENT: Final = {
    "/next-placement": {"cpuset": _Attribute("cpuset", _host_cpus, optional=True)},
    _PLACE: {"vcpus": _Attribute("vcpus", _map_of_a_slot), **_WHERE},
    "/next-placement/emulator": _WHERE,
}
# All attributes of each element, by its path from ours down, in the order in which they are written.
_KNOWN: Final[Mapping[str, Mapping[str, _Attribute]]] = {
    "record": {
        "generation": _Attribute("generation", _number),
        "made-up-uuid": _Attribute("uuid", _uuid, optional=True),
        "nameless": _Attribute("nameless", _truth, optional=True),
        "in-place": _Attribute("in_place", _truth, optional=True),
        "core-scheduling": _Attribute("core_scheduling", CoreScheduling, optional=True),
    },
    "record/instance": {
        "host-tid": _Attribute("host_tid", _number),
        "start-ticks": _Attribute("start_ticks", _number, optional=True),
    },
    "record/pending": {"vcpus": _Attribute("vcpus", _map)},
    "record/device": {"vcpu": _Attribute("vcpu", _number), "id": _Attribute("id", _device_id)},
    "record/previous": {
        "max": _Attribute("max", _count),
        "started-with": _Attribute("started_with", _count),
        "order": _Attribute("order", _ids),
        **{level: _Attribute(level, _count, optional=True) for level in SMP_LEVELS},
    },
    "record/desired": {"vcpus": _Attribute("vcpus", _map)},
    "record/next-boot": {"vcpus": _Attribute("vcpus", _map_of_a_vm)},
    "record/transition": {
        "start": _Attribute("start", _map),
        "target": _Attribute("target", _map),
        "on-failure": _Attribute("on_failure", OnFailure),
        "timeout": _Attribute("timeout", _seconds),
        "main-cpus": _Attribute("main_cpus", _host_cpus, optional=True),
        "birthplaces": _Attribute("birthplaces", _birthplaces, optional=True),
        "direction": _Attribute("direction", Direction),
        "next-boot": _Attribute("next_boot", _map_of_a_vm, optional=True),
        "config": _Attribute("config", str, optional=True),
    },
    "record/transition/step": {
        "action": _Attribute("action", Action),
        "vcpus": _Attribute("ids", _map_of_a_slot),
        "path": _Attribute("qom_path", _path, optional=True),
        "joins": _Attribute("joins", _truth, optional=True),
        "asks-agent": _Attribute("asks_agent", _truth, optional=True),
    },
    **{f"{path}{below}": known for path in ("record", "record/transition") for below, known in _PLACEMENT.items()},
}


# Writing.


def record_node(metadata: Metadata) -> Node:
    """Return our element, to be written.

    Raises:
        DomainXmlError: A transition that could not be read back: its timeout is not a time, or a step has no vCPU.
    """
    attributes = {f"xmlns:{_PREFIX}": NAMESPACE, **_attributes_of(metadata, "record")}
    return Node(f"{_PREFIX}:record", attributes, tuple(_children(metadata)))


def _children(metadata: Metadata) -> Iterator[Node]:
    if metadata.instance is not None:
        yield _node(metadata.instance, "record/instance")
    if metadata.pending:
        yield Node(f"{_PREFIX}:pending", {"vcpus": metadata.pending})
    for first, device_id in sorted(metadata.device_ids.items()):
        yield Node(f"{_PREFIX}:device", {"vcpu": first, "id": device_id})
    if metadata.previous is not None:
        topology = metadata.previous.topology
        sizes = {} if topology is None else {level: getattr(topology, level) for level in SMP_LEVELS}
        levels = {level: size for level, size in sizes.items() if size > 1 or level == "sockets"}
        attributes = _attributes_of(metadata.previous, "record/previous")
        attributes["started-with"] = len(metadata.previous.started_with)
        yield Node(f"{_PREFIX}:previous", {**attributes, **levels})
    if metadata.desired is not None:
        yield Node(f"{_PREFIX}:desired", {"vcpus": metadata.desired})
    if metadata.next_boot is not None:
        yield Node(f"{_PREFIX}:next-boot", {"vcpus": metadata.next_boot})
    if metadata.next_placement is not None:
        yield _placement_node(metadata.next_placement)
    if metadata.intent is not None:
        intent = replace(metadata.intent, timeout=float(metadata.intent.timeout))
        placement = () if intent.next_placement is None else (_placement_node(intent.next_placement),)
        yield _node(intent, "record/transition", (*map(_step_node, intent.steps), *placement))


def _placement_node(placement: Placement) -> Node:
    groups: dict[Place, list[int]] = {}
    for vcpu, place in sorted(placement.vcpus.items()):
        groups.setdefault(place, []).append(vcpu)
    path = "record/next-placement"
    places = [
        Node(f"{_PREFIX}:place", {"vcpus": VcpuMap(vcpus), **_attributes_of(place, f"{path}/emulator")})
        for place, vcpus in groups.items()
        if place
    ]
    emulator = [_node(placement.emulator, f"{path}/emulator")] if placement.emulator else []
    return _node(placement, path, (*places, *emulator))


def _step_node(step: Step) -> Node:
    if not step.ids:
        raise DomainXmlError(f"a step without a vCPU: {step!r}")
    return _node(step, "record/transition/step")


def _node(value: object, path: str, content: tuple[Node, ...] = ()) -> Node:
    return Node(f"{_PREFIX}:{path.rpartition('/')[2]}", _attributes_of(value, path), content)


def _attributes_of(value: object, path: str) -> dict[str, object]:
    given = ((name, getattr(value, each.field, None)) for name, each in _KNOWN[path].items())
    said = ((name, held) for name, held in given if held is not None and held is not False)
    return {name: _written(held) for name, held in said if not isinstance(held, tuple) or held}


# Reading.


def find_record(metadata: etree._Element) -> etree._Element | None:
    """Return our element out of ``<metadata>``, or None if there is none.

    Raises:
        DomainXmlError: A newer version of ours wrote there, or there are two.
    """
    found = []
    for child in metadata.iterchildren(tag=etree.Element):
        namespace = etree.QName(child).namespace or ""
        if child.tag == f"{{{NAMESPACE}}}record":
            found.append(child)
        elif namespace.startswith(_FAMILY):
            raise DomainXmlError(f"{_NEWER} ({child.tag!s})", line=line_of(child))
    if len(found) > 1:
        raise _damaged(found[1], "there are two of it")
    return found[0] if found else None


def read_metadata(record: etree._Element) -> Metadata:
    """Return what our element says.

    Raises:
        DomainXmlError: It is damaged, or holds what only a newer version can have written; ``line`` says where.
    """
    _check_known(record, "record")
    values = _values(record, "record")
    devices: dict[int, str] = {}
    for child in record.iterchildren(tag=etree.Element):
        name = etree.QName(child).localname
        found = _values(child, f"record/{name}")
        match name:
            case "device":
                if found["vcpu"] in devices:
                    raise _damaged(child, f"there is another of vCPU {found['vcpu']}")
                devices[found["vcpu"]] = found["id"]
            case "instance":
                values["instance"] = Instance(**found)
            case "previous":
                values["previous"] = _previous(child, found)
            case "next-placement":
                values["next_placement"] = _placement(child, "record/next-placement")
            case "transition":
                values["intent"] = _intent(child, found)
            case _:
                values[name.replace("-", "_")] = found["vcpus"]
    return Metadata(device_ids=devices, **values)


def _check_known(element: etree._Element, path: str) -> None:
    for attribute in sorted(set(map(str, element.keys())) - set(_KNOWN[path])):
        _refuse_unknown(element, attribute, namespace=etree.QName(attribute).namespace or NAMESPACE)
    seen = set()
    for child in element.iterchildren(tag=etree.Element):
        name = etree.QName(child)
        below = f"{path}/{name.localname}"
        if name.namespace != NAMESPACE or below not in _KNOWN:
            _refuse_unknown(element, f"<{name.text}>", namespace=name.namespace or "")
        if below in seen and below not in _SEVERAL:
            raise _damaged(child, "there are two of it")
        seen.add(below)
        _check_known(child, below)


def _refuse_unknown(holder: etree._Element, what: str, *, namespace: str) -> NoReturn:
    if not namespace.startswith(_FAMILY):
        raise _damaged(holder, f"{what} is not ours")
    raise DomainXmlError(f"{_NEWER} ({what} in <{etree.QName(holder).localname}>)", line=line_of(holder))


def _previous(element: etree._Element, found: Mapping[str, Any]) -> PreviousVcpus:
    most, order, started_with = found["max"], found["order"], found["started_with"]
    if len(set(order)) < len(order) or max(order) >= most or started_with > len(order):
        raise _damaged(element, f"order: not {started_with} or more of {most} vCPUs, each once")
    sizes = {level: found[level] for level in SMP_LEVELS if level in found}
    topology = Topology(prod(sizes.values()), **sizes) if sizes else None
    return PreviousVcpus(most, VcpuMap(order[:started_with]), order, topology)


def _intent(transition: etree._Element, found: Mapping[str, Any]) -> Intent:
    placement = transition.find(f"{{{NAMESPACE}}}next-placement")
    kept = None if placement is None else _placement(placement, "record/transition/next-placement")
    return Intent(steps=_steps(transition), next_placement=kept, **found)


def _placement(element: etree._Element, path: str) -> Placement:
    vcpus: dict[int, Place] = {}
    emulator = Place()
    named = 0
    for child in element.iterchildren(tag=etree.Element):
        name = etree.QName(child).localname
        found = _values(child, f"{path}/{name}")
        ids = found.pop("vcpus", ())
        place = Place(**found)
        named += len(place.cpus or ())
        if named > _MOST_CPUS_NAMED:
            raise _damaged(child, "more host CPUs than any document names")
        if not vcpus.keys().isdisjoint(ids):
            raise _damaged(child, f"there is another of vCPU {next(each for each in ids if each in vcpus)}")
        if name == "emulator":
            emulator = place
        vcpus |= dict.fromkeys(ids, place)
    return Placement(vcpus, emulator, **_values(element, path))


def _steps(transition: etree._Element) -> tuple[Step, ...]:
    steps: list[Step] = []
    ids = 0
    for element in transition.iterchildren(tag=f"{{{NAMESPACE}}}step"):
        steps.append(Step(**_values(element, "record/transition/step")))
        ids += len(steps[-1].ids)
        if ids > _MOST_IDS_IN_STEPS:
            raise _damaged(element, "more vCPUs than any machine has")
    return tuple(steps)


def _values(element: etree._Element, path: str) -> dict[str, Any]:
    """Return the attributes of *element* by the fields that they are kept in."""
    values = {}
    for name, attribute in _KNOWN[path].items():
        text = element.get(name)
        if text is not None:
            try:
                values[attribute.field] = attribute.read(text)
            except (InvalidMapError, ValueError) as error:
                raise _damaged(element, f"{name}: {_shortened(str(error))}") from error
        elif not attribute.optional:
            raise _damaged(element, f"{name} is missing")
    return values


def _shortened(text: str) -> str:
    # The value comes first and the fault last.
    return text if len(text) <= _MOST_TOLD else f"{text[: _MOST_TOLD // 2]}...{text[-_MOST_TOLD // 2 :]}"


def _damaged(element: etree._Element, why: str) -> DomainXmlError:
    where = etree.QName(element).localname
    return DomainXmlError(f"our metadata is damaged: <{where}>: {why}", line=line_of(element))
