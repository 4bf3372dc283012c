"""What an earlier QEMU of a VM had: kept until it is there again, or something else is asked for."""

from dataclasses import dataclass

from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology


@dataclass(frozen=True, slots=True)
class PreviousVcpus:
    """The vCPUs of an earlier QEMU, in the order in which they were created.

    Attributes:
        max: How many there could be.
        started_with: How many of the first ones a new QEMU starts with (the number in ``-smp``).
        order: The vCPU ids in the order of creation; those that QEMU starts with come first.
        topology: The CPU topology, or None where it is not known.
    """

    max: int
    started_with: int
    order: tuple[int, ...]
    topology: Topology | None = None

    @property
    def enabled(self) -> VcpuMap:
        """The vCPUs that were plugged."""
        return VcpuMap(self.order)

    @classmethod
    def of(cls, layout: Layout) -> "PreviousVcpus":
        """Return what *layout* has."""
        started_with = sum(layout.slot_of(first).count for first in layout.started_with) or 1
        return cls(layout.max, started_with, _order(layout), layout.vm.topology)

    def is_there(self, layout: Layout) -> bool:
        """Return True if *layout* has these vCPUs, created in this order."""
        return len(self.order) == len(layout.enabled) and self.order == _order(layout)


def _order(layout: Layout) -> tuple[int, ...]:
    # vCPU 0 first, as every document has it, should QEMU tell another order.
    firsts = sorted(layout.order, key=lambda first: first != 0)
    return tuple(each for first in firsts for each in layout.slot_of(first).ids)
