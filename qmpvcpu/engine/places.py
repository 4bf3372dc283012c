"""Where the threads of one VM are to run on the host, and what is known of that.

A vCPU's thread inherits the host CPUs of QEMU's main thread, which carries ``device_add`` out. So the main thread is
given the vCPU's place, its birthplace, while the command is under way. All plugs under way have one birthplace.

Source: clone(2), sched_setaffinity(2); QEMU system/cpus.c, ``qemu_init_vcpu``; measured on QEMU 7.2, 10.0 and 11.1.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from qmpvcpu.model.layout import Slot
from qmpvcpu.model.transition import Intent
from qmpvcpu.model.vcpumap import VcpuMap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qmpvcpu.model.placement import HostFacts, Place, Placement

EMULATOR = -1
"""Stands for QEMU's main thread where vCPU ids stand for theirs."""


class Places:
    """What is wanted of the threads of one VM, and known of them.

    Args:
        placement: Where they are to run; None: nothing is wanted.

    Attributes:
        placement: As given; another one once that is wanted.
        host: What the host allows, as it was told last; None: it was not.
        drifted: Where threads were found last that are to be elsewhere, by vCPU id, QEMU's main thread as EMULATOR.
    """

    def __init__(self, placement: "Placement | None" = None) -> None:
        self.placement = placement
        self.host: HostFacts | None = None
        self._births: dict[int, VcpuMap | None] = {}
        self._born: set[int] = set()
        self._why_not: dict[int, str] = {}  # of the CPU in each slot; "" once its threads are in their place
        self.drifted: dict[int, Place] = {}

    def wants(self, slot: Slot) -> bool:
        """Return True if anything is wanted of the threads of *slot*."""
        return self.placement is not None and self.placement.wants(slot.ids)

    def with_birthplaces(self, intent: Intent) -> Intent:
        """Return *intent* with where QEMU's main thread may be sent to for it, and where it belongs."""
        if self.placement is None or self.host is None or self.host.unreachable:
            return intent
        born_on = {self.placement.born_on(step.ids, self.host) for step in intent.steps}
        elsewhere = sorted((cpus for cpus in born_on if cpus not in (None, self.host.main_cpus)), key=str)
        if not elsewhere:
            return intent
        return replace(intent, main_cpus=self.host.main_cpus, birthplaces=tuple(elsewhere))

    @property
    def births(self) -> bool:
        """True while a plug is under way whose birthplace others may have to wait for."""
        return bool(self._births)

    # Births.

    def birthplace(self, slot: Slot) -> VcpuMap | None:
        """Return the host CPUs of QEMU's main thread while *slot* is plugged; None: those that it has."""
        if self.placement is None or self.host is None or self.placement.why_not(slot.ids, self.host):
            return None
        born_on = self.placement.born_on(slot.ids, self.host)
        return None if born_on == self.host.main_cpus else born_on

    def may_be_born(self, birthplace: VcpuMap | None) -> bool:
        """Return True if every plug under way has this birthplace."""
        return all(other == birthplace for other in self._births.values())

    def birth_begins(self, first: int, birthplace: VcpuMap | None) -> None:
        """Note that the plug of the slot of vCPU *first* is about to be sent."""
        if self.placement is not None:
            if not self._births:
                self._born.clear()
            self._births[first] = birthplace
            if birthplace is not None:
                self._born.add(first)

    def birth_ends(self, first: int) -> None:
        """Note that the plug of the slot of vCPU *first* is over, or not sent at all."""
        self._births.pop(first, None)

    def take_born(self) -> set[int]:
        """Return the first vCPU ids of the slots whose plugs were under way together, up to the last one."""
        born, self._born = self._born, set()
        return born

    def are_only_pinned(self, slot: Slot) -> bool:
        """Return True if host CPUs are all that is wanted of the threads of *slot*, and for all the same."""
        if self.placement is None or self.host is None or self.placement.groups:
            return False
        places = self.placement.of_vcpus(slot.ids, self.host).values()
        return len({place.cpus for place in places}) == 1 and not any(place.scheduler for place in places)

    # What became of it.

    def why_not(self, first: int) -> str | None:
        """Return why the threads of the slot of vCPU *first* are not in their place; "": they are; None: unknown."""
        return self._why_not.get(first)

    def placed(self, first: int, why_not: str) -> None:
        """Note that the threads of the slot of vCPU *first* are in their place, or why not."""
        self._why_not[first] = why_not

    def forget(self, first: int) -> None:
        """Note that the CPU in the slot of vCPU *first* is another one, or gone."""
        self._why_not.pop(first, None)

    # Drift.

    def drifts(self, found: "Mapping[int, Place]") -> "list[tuple[int, Place, Place]]":
        """Return which threads are newly found elsewhere: the vCPU (or EMULATOR), where it should run, and does."""
        if self.placement is None or self.host is None:
            return []
        wanted = self.placement.of_vcpus((vcpu for vcpu in found if vcpu >= 0), self.host)
        if EMULATOR in found and (emulator := self.placement.of_emulator()):
            wanted[EMULATOR] = emulator
        now = {vcpu: place for vcpu, place in found.items() if vcpu in wanted and wanted[vcpu].differs(place)}
        new = [(vcpu, wanted[vcpu], place) for vcpu, place in now.items() if self.drifted.get(vcpu) != place]
        self.drifted = now
        return new
