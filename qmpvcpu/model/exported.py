"""What another QEMU must know to have the vCPUs of this one: on another host, or on this one later."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.names import Shape
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology

_SCHEMA: Final = Shape("qmpvcpu-export/1", lambda text: text == "qmpvcpu-export/1")


@dataclass(frozen=True, slots=True)
class ExportedState:
    """A VM's vCPUs at the moment of ``vm.export()``.

    Attributes:
        layout: All slots with their ids, props, types, device ids and order, and what is known of the VM: name,
            uuid, arch, machine type, accelerator, QEMU version, topology, memory.
        desired: The map that was last asked for, or None where nobody has asked.
        xml: The VM as a libvirt ``<domain>``, or None where libvirt has none for it (a name with a slash, ...). It
            says where QEMU's threads are to run, by the host CPUs of the source, as libvirt's document does.
        schema: The format of its JSON.
    """

    schema: Annotated[str, _SCHEMA] = field(default=_SCHEMA.what, kw_only=True)
    layout: Layout
    desired: VcpuMap | None = None
    xml: bytes | None = None

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.layout.vm.name

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot, by ascending vCPU id."""
        return self.layout.slots

    @property
    def enabled(self) -> VcpuMap:
        """The vCPUs that were plugged."""
        return self.layout.enabled

    @property
    def pending(self) -> VcpuMap:
        """The vCPUs whose removal was unanswered: QEMU's requests migrate along."""
        return self.layout.pending

    @property
    def generation(self) -> int:
        """How many changes the source had seen since its attach."""
        return self.layout.generation

    @property
    def started_with(self) -> VcpuMap:
        """The vCPUs that a target starts with (their number is that of ``-smp``): boot vCPUs created in order.

        ``domainxml.render`` marks them ``hotpluggable='no'``.
        """
        return self.layout.started_with

    @property
    def plugged_after(self) -> tuple[Slot, ...]:
        """The slots that a target also needs, by ``device_add`` or ``-device``, in this order."""
        started = self.started_with
        return tuple(self.layout.slot_of(first) for first in self.layout.order if first not in started)

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, for another host; ``from_json`` reads it there."""
        shown: dict[str, Any] = to_json(self)
        return shown

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> "ExportedState":
        """Return the state that ``to_json`` was given, from the object or from its text.

        Raises:
            ValueError: It has another shape, or contradicts itself; the text names the key.
        """
        return from_json(cls, data)


@dataclass(frozen=True, slots=True)
class PreviousVcpus:
    """The vCPUs of an earlier QEMU, in the order in which they were created.

    Attributes:
        max: How many there could be.
        started_with: Those that a new QEMU starts with (their number is that of ``-smp``).
        order: The vCPU ids in the order of creation; those that QEMU starts with come first.
        topology: The CPU topology, or None where it is not known.
    """

    max: int
    started_with: VcpuMap
    order: tuple[int, ...]
    topology: Topology | None = None

    @property
    def enabled(self) -> VcpuMap:
        """The vCPUs that were plugged."""
        return VcpuMap(self.order)

    @classmethod
    def of(cls, layout: Layout) -> "PreviousVcpus":
        """Return what *layout* has."""
        started_with = layout.started_with or layout.slots[0].ids
        return cls(layout.max, started_with, _order(layout), layout.vm.topology)

    def is_there(self, layout: Layout) -> bool:
        """Return True if *layout* has these vCPUs, created in this order."""
        return len(self.order) == len(layout.enabled) and self.order == _order(layout)


def _order(layout: Layout) -> tuple[int, ...]:
    # vCPU 0 first, as every document has it, should QEMU tell another order.
    firsts = sorted(layout.order, key=lambda first: first != 0)
    return tuple(each for first in firsts for each in layout.slot_of(first).ids)
