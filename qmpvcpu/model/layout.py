"""Layout: all slots of a VM with their vCPU ids at one moment."""

import itertools
import re
from bisect import bisect_right
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any

from qmpvcpu.errors import counted, shorten
from qmpvcpu.given import whole
from qmpvcpu.model.names import KNOWN_PLACES, PERIPHERAL, QOM_PATH, Shape, cpu_model_of, is_cpu_type, is_place
from qmpvcpu.model.options import Proof
from qmpvcpu.model.vcpumap import MOST_VCPUS, VcpuMap, union
from qmpvcpu.model.verdicts import OstAnswer, OstStatus
from qmpvcpu.model.vm import VmInfo

_PERIPHERALS = "/machine/peripheral"  # those without an id too, in /machine/peripheral-anon
_MOST_PLACE = 2**31 - 1  # QEMU's properties have 32 bits
_MOST_QUOTED = 60
# A machine without CPU hotplug names none.
_TYPE = Shape("a CPU's type", lambda text: text == "" or is_cpu_type(text))
# Wider rows wrap on a terminal of 80 columns; ids with ranges say it shorter then.
_MOST_IN_ROW = 16


@lru_cache(maxsize=8192)  # values that never change, asked for at every change of their slot
def _ids(first: int, count: int) -> VcpuMap:
    return VcpuMap(range(first, first + count))


class CpuProps(Mapping[str, int]):
    """A slot's properties, as QEMU names and orders them (``socket-id``, ``core-id``, ``node-id``, ...).

    A read-only mapping. Levels that this version does not know are kept and passed through, since all of them must be
    given back to ``device_add``. Anything but a place, such as ``driver`` or ``id``, would plug something else.

    Args:
        props: They.

    Raises:
        ValueError: A property is not named as a place (``...-id``), or is not a whole number from 0 to 2**31 - 1.

    Source: QEMU qapi/machine.json, CpuInstanceProperties.
    """

    __slots__ = ("_items",)

    def __init__(self, props: Mapping[str, Any]) -> None:
        # Nearly all are known, and there are some for each vCPU at every read.
        for name in () if props.keys() <= KNOWN_PLACES else props:
            if not is_place(name):
                raise ValueError(f"{shorten(name, _MOST_QUOTED)} does not name the place of a CPU, such as core-id")
        for name, value in props.items():
            if type(value) is not int or not 0 <= value <= _MOST_PLACE:  # True is an int too
                raise ValueError(f"{name!r}: {shorten(value, _MOST_QUOTED)} is not a whole number from 0 on")
        self._items: dict[str, int] = dict(props)

    def __getitem__(self, key: str) -> int:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __str__(self) -> str:
        return " ".join(f"{name} {value}" for name, value in self._items.items())

    def __repr__(self) -> str:
        return f"CpuProps({self._items!r})"

    def number(self, key: str) -> int | None:
        """Return the id named *key*, or None where the machine has no such level."""
        return self._items.get(key)


@dataclass(frozen=True, slots=True)
class Slot:
    """One entry of ``query-hotpluggable-cpus``: one or more vCPUs that are plugged and unplugged together.

    Attributes:
        first: vCPU id of its first vCPU, which names the slot.
        count: How many vCPUs it holds (a whole core on pseries, one elsewhere).
        type: The CPU type to give to ``device_add``.
        props: Its properties, to be given to ``device_add`` unchanged.
        cpu_index: QEMU's cpu-index of its first vCPU; on ACPI machines the guest's answers name it as slot.
        qom_path: Path of the CPU in it, or None while it is empty.
        host_tids: Host thread id of each vCPU; None where not known (not read yet, or empty).
        answer: The guest's last answer to the plug of the CPU in it, or None.
        proven: The highest proof that was seen of the CPU in it, or None: none was seen, or it is empty.
        proven_at: Since when, in seconds since 1970 (POSIX time), or None.
    """

    first: int
    count: int
    type: Annotated[str, _TYPE]
    props: CpuProps
    cpu_index: int
    qom_path: Annotated[str, QOM_PATH] | None = None
    host_tids: tuple[int | None, ...] = ()
    answer: OstAnswer | None = None
    proven: Proof | None = None
    proven_at: float | None = None

    @property
    def ids(self) -> VcpuMap:
        """The vCPU ids that it holds."""
        return _ids(self.first, self.count)

    @property
    def model(self) -> str | None:
        """The CPU model, as ``-cpu`` takes it; None on a machine without CPU hotplug, which does not tell it."""
        return cpu_model_of(self.type)

    @property
    def present(self) -> bool:
        """True if there is a CPU in it."""
        return self.qom_path is not None

    @property
    def device_id(self) -> str | None:
        """The device id of the CPU in it; None if it is empty, or its CPU has none (boot CPUs)."""
        path = self.qom_path or ""
        return path.removeprefix(PERIPHERAL).partition("/")[0] if path.startswith(PERIPHERAL) else None

    @property
    def is_boot(self) -> bool:
        """True if its CPU was there when the machine was made, and not by ``-device``."""
        return self.present and not (self.qom_path or "").startswith(_PERIPHERALS)

    @property
    def acknowledged(self) -> bool | None:
        """What the guest said of its CPU's plug: True, False (a failure), or None (nothing, or not seen)."""
        if self.answer is None or self.answer.status is OstStatus.IN_PROGRESS:
            return None
        return self.answer.status is OstStatus.SUCCESS

    @property
    def proof(self) -> Proof | None:
        """The highest rung that is known of the CPU in it; None while it is empty."""
        if self.proven is not None or not self.present:
            return self.proven
        return Proof.ACKNOWLEDGED if self.acknowledged else Proof.PRESENT

    @property
    def new_device_id(self) -> str:
        """The device id that a CPU plugged by us gets: libvirt loses a VM whose ids do not start with "vcpu"."""
        return f"vcpu{self.first}"

    @property
    def new_qom_path(self) -> str:
        """The QOM path of a CPU plugged by us."""
        return PERIPHERAL + self.new_device_id

    def free_path(self, *taken: Container[str]) -> str:
        """Return the QOM path of a CPU plugged by us: ``vcpu3``, or ``vcpu3-2`` and so on where that is *taken*."""
        path = self.new_qom_path
        others = map(f"{path}-{{}}".format, itertools.count(2))
        while any(path in each for each in taken):
            path = next(others)
        return path

    @property
    def has_our_name(self) -> bool:
        """True if its CPU has an id that we give to the CPU of this slot."""
        return re.fullmatch(rf"{self.new_device_id}(-[1-9][0-9]*)?", self.device_id or "") is not None

    def filled(self, qom_path: str, at: float | None = None) -> "Slot":
        """Return this slot with a CPU in it that was plugged *at* that POSIX time."""
        return self._holding(qom_path, (None,) * self.count, None, Proof.PRESENT, at)

    def emptied(self) -> "Slot":
        """Return this slot without its CPU."""
        return self._holding(None, (), None, None, None)

    def answered(self, answer: OstAnswer) -> "Slot":
        """Return this slot with the guest's answer to the plug of the CPU in it."""
        return self._holding(self.qom_path, self.host_tids, answer, self.proven, self.proven_at)

    def proving(self, proof: Proof, at: float) -> "Slot":
        """Return this slot with what is proven of the CPU in it, since that POSIX time."""
        return self._holding(self.qom_path, self.host_tids, self.answer, proof, at)

    def seen(self, host_tids: tuple[int | None, ...]) -> "Slot":
        """Return this slot with the threads of the CPU in it."""
        return self._holding(self.qom_path, host_tids, self.answer, self.proven, self.proven_at)

    def _holding(
        self,
        qom_path: str | None,
        host_tids: tuple[int | None, ...],
        answer: OstAnswer | None,
        proven: Proof | None,
        at: float | None,
    ) -> "Slot":
        # Not by replace(), which takes twice as long, at each change of each vCPU.
        fixed = self.first, self.count, self.type, self.props, self.cpu_index
        return Slot(*fixed, qom_path, host_tids, answer, proven, at)


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One vCPU, present or not.

    Attributes:
        id: libvirt's number for it.
        slot: The slot that it is part of.
        enabled: True if it is plugged.
        hotpluggable: True if it can be unplugged by us now (libvirt's attribute of this name says more about
            how a VM is to be started; see ``domainxml``).
        order: Place of its slot in QEMU's creation order, from 1; None while absent.
        pending: True if a removal of it is accepted and unanswered.
        host_tid: Thread id on QEMU's host, in QEMU's own PID namespace; None where not known: a plug reads nothing,
            so ``refresh`` first.
        acknowledged: What the guest said of its plug: True, False (a failure), or None (nothing, or not seen).
    """

    id: int
    slot: Slot
    enabled: bool
    hotpluggable: bool
    order: int | None
    pending: bool
    host_tid: int | None
    acknowledged: bool | None

    @property
    def proof(self) -> Proof | None:
        """The highest rung that is known of it; None while absent.

        What was proven before ``attach`` is not known, but for what the guest has acknowledged. A reset of the VM
        takes it back to PRESENT.
        """
        return self.slot.proof

    @property
    def proven_at(self) -> float | None:
        """Since when ``proof`` is known, in seconds since 1970; None where it was so before ``attach``."""
        return self.slot.proven_at

    @property
    def device_id(self) -> str | None:
        """Device id of its CPU, or None."""
        return self.slot.device_id

    @property
    def qom_path(self) -> str | None:
        """QOM path of its slot's CPU, or None while absent."""
        return self.slot.qom_path

    @property
    def type(self) -> str:
        """QEMU's CPU type."""
        return self.slot.type

    @property
    def props(self) -> CpuProps:
        """Its slot's properties."""
        return self.slot.props


@dataclass(frozen=True)
class Layout:
    """All slots of a VM at one moment; ``layout[3]`` is vCPU 3.

    Attributes:
        vm: What is known of the VM itself.
        slots: Every slot, by ascending vCPU id.
        creation: First vCPU ids of the occupied slots, in the order in which QEMU created their CPUs.
        pending_slots: First vCPU ids of the slots whose removal is accepted and unanswered.
        generation: Counts the changes seen since attach.
    """

    vm: VmInfo
    slots: tuple[Slot, ...]
    creation: tuple[int, ...] = ()
    pending_slots: frozenset[int] = frozenset()
    generation: int = 0

    @property
    def max(self) -> int:
        """How many vCPUs the machine can have."""
        return self.slots[-1].first + self.slots[-1].count if self.slots else 0

    @cached_property
    def enabled(self) -> VcpuMap:
        """The vCPUs that are plugged."""
        return union(slot.ids for slot in self.slots if slot.qom_path is not None)

    @cached_property
    def free(self) -> VcpuMap:
        """The vCPUs that are not plugged."""
        return union(slot.ids for slot in self.slots if slot.qom_path is None)

    @cached_property
    def pending(self) -> VcpuMap:
        """The vCPUs whose removal QEMU accepted and the guest has not answered; a subset of ``enabled``."""
        return union(self.slot_of(first).ids for first in self.pending_slots)

    @cached_property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """Every vCPU, present or not, by id."""
        return tuple(self[each] for each in range(self.max))

    def __str__(self) -> str:
        """Return the map as a row of cells, ``[0][ ][ ][3]``, a pending removal as ``(3)``; a long one in words."""
        if self.max > _MOST_IN_ROW:
            pending = f", pending {self.pending}" if self.pending else ""
            return f"{self.enabled} of 0-{self.max - 1}{pending}"
        width = len(str(self.max - 1))
        return "".join(_cell(vcpu, width) for vcpu in self)

    @property
    def order(self) -> tuple[int, ...]:
        """First vCPU ids of the occupied slots, in QEMU's creation order."""
        return self.creation

    @property
    def started_with(self) -> VcpuMap:
        """The vCPUs that a new QEMU starts with (their number is that of ``-smp``), to rebuild this layout.

        They are the unbroken run of boot vCPUs from vCPU 0 on that were created in the order of their ids; all others
        are plugged after them, in the order of ``order``.
        """
        run: list[int] = []
        for slot, first in zip(self.slots, self.creation, strict=False):
            if slot.first != first or not (slot.is_boot or first == 0):
                break
            run.extend(slot.ids)
        return VcpuMap(run)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {first: place for place, first in enumerate(self.creation, start=1)}

    def slot_of(self, vcpu: int) -> Slot:
        """Return the slot that holds *vcpu*.

        Raises:
            IndexError: There is no such vCPU.
            TypeError: It is no whole number.
        """
        if type(vcpu) is not int:
            vcpu = whole("a vCPU id", vcpu)
        slots = self.slots
        if 0 <= vcpu < len(slots) and slots[vcpu].first == vcpu:  # every machine with one vCPU a slot
            return slots[vcpu]
        if not 0 <= vcpu < self.max:
            raise IndexError(f"no vCPU {vcpu}: this machine has 0 to {self.max - 1}")
        return slots[bisect_right(slots, vcpu, key=lambda slot: slot.first) - 1]

    def __getitem__(self, vcpu: int) -> Vcpu:
        slot = self.slot_of(vcpu)
        vcpu = int(vcpu)
        tids = slot.host_tids
        return Vcpu(
            id=vcpu,
            slot=slot,
            enabled=slot.present,
            hotpluggable=self._can_leave(slot),
            order=self._places.get(slot.first),
            pending=slot.first in self.pending_slots,
            host_tid=tids[vcpu - slot.first] if tids else None,
            acknowledged=slot.acknowledged,
        )

    def __len__(self) -> int:
        return self.max

    def __contains__(self, vcpu: object) -> bool:
        if isinstance(vcpu, int):
            raise TypeError(f"{vcpu} in layout: is it plugged, free, pending? Ask layout.enabled, .free or .pending")
        return vcpu in self.vcpus

    def __iter__(self) -> Iterator[Vcpu]:
        return iter(self.vcpus)

    def check_foreign(self) -> None:
        """Return if a layout that came from outside is one that a VM can have.

        Raises:
            ValueError: Its slots contradict each other; the text names the key.
        """
        following = 0
        for place, slot in enumerate(self.slots):
            if wrong := self._contradiction(slot, following):
                raise ValueError(f"'slots': [{place}]: {wrong}")
            following += slot.count
        occupied = {slot.first for slot in self.slots if slot.present}
        for key, firsts in (("creation", self.creation), ("pending_slots", tuple(self.pending_slots))):
            if len(set(firsts)) < len(firsts) or not occupied.issuperset(firsts):
                named = shorten(sorted(firsts), _MOST_QUOTED)
                raise ValueError(f"{key!r}: {named} are not the first vCPUs of slots with a CPU, each once")

    def _contradiction(self, slot: Slot, following: int) -> str:
        """Return what is wrong with *slot*, whose first vCPU should be *following*; "" if nothing is."""
        if slot.first != following:
            return f"'first': {shorten(slot.first, _MOST_QUOTED)} is not {following}, the next vCPU id"
        if not 1 <= slot.count <= MOST_VCPUS - following:
            return f"'count': {shorten(slot.count, _MOST_QUOTED)} is not 1 to {MOST_VCPUS - following}"
        if self.vm.can_plug and not slot.type:
            return "'type': a machine that takes CPUs names the type of each"
        if len(slot.host_tids) not in ((0, slot.count) if slot.present else (0,)):
            vcpus = counted(slot.count if slot.present else 0, "vCPU")
            return f"'host_tids': {counted(len(slot.host_tids), 'thread')} for {vcpus}"
        return ""

    def _can_leave(self, slot: Slot) -> bool:
        boot = slot.device_id is None
        return slot.present and slot.first != 0 and self.vm.can_unplug and not (boot and self.vm.libvirt_owned)


def _cell(vcpu: Vcpu, width: int) -> str:
    if not vcpu.enabled:
        return f"[{'':{width}}]"
    return f"({vcpu.id:{width}})" if vcpu.pending else f"[{vcpu.id:{width}}]"
