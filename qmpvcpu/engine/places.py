"""The places of one VM's threads on the host, and what is known of them.

A vCPU's thread inherits the host CPUs of QEMU's main thread, which carries out ``device_add``. So the main thread
gets the vCPU's host CPUs, its birthplace, during the command. All plugs under way share one birthplace.

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
        everywhere: True has vCPU threads for which nothing is said run on all host CPUs, once anything is said.

    Attributes:
        host: What the host allows, as it was told last; None: it was not.
        arriving: The vCPUs that are being plugged, or whose threads are being put in their place.
        drifted: Where drifted threads were last found, by vCPU id; EMULATOR is QEMU's main thread.
    """

    def __init__(self, placement: "Placement | None" = None, *, everywhere: bool = False) -> None:
        self._everywhere = everywhere
        self.placement = placement
        self.host: HostFacts | None = None
        self.arriving: set[int] = set()
        self._births: dict[int, tuple[VcpuMap | None, float]] = {}  # and since when; the oldest first
        self._born: dict[int, VcpuMap] = {}
        self._why_not: dict[int, str] = {}  # of the CPU in each slot; "" once its threads are in their place
        self.drifted: dict[int, Place] = {}

    @property
    def placement(self) -> "Placement | None":
        """Where the threads are to run; None: nothing is wanted."""
        return self._placement

    @placement.setter
    def placement(self, placement: "Placement | None") -> None:
        if placement is not None and self._everywhere and placement.names_places:
            placement = replace(placement, everywhere=True)
        self._placement = placement

    def wanted_with(self, given: "Placement | None") -> "Placement | None":
        """Return the placement with *given* over it; the policy stays as it is.

        Raises:
            ValueError: Sets overlap that must not.
        """
        known = self.placement
        if given is None or known is None:
            return known if given is None else given
        return given.over(known)

    def wants(self, slot: Slot) -> bool:
        """Return True if anything is wanted of the threads of *slot*."""
        return self.placement is not None and self.placement.wants(slot.ids)

    def with_birthplaces(self, intent: Intent) -> Intent:
        """Return *intent* with where QEMU's main thread may be sent to for it, and where it belongs.

        Where *intent* says so already, nobody could send it home yet since an earlier controller died.
        """
        if self.host is None or not self.host.main_cpus or intent.main_cpus is not None:
            return intent
        born_on = {cpus for cpus, _ in self._births.values()}  # as was wanted when these were sent
        if self.placement is not None:
            born_on |= {self.placement.born_on(step.ids, self.host) for step in intent.steps}
        elsewhere = sorted((cpus for cpus in born_on if cpus not in (None, self.host.main_cpus)), key=str)
        if not elsewhere:
            return intent
        return replace(intent, main_cpus=self.host.main_cpus, birthplaces=tuple(elsewhere))

    @property
    def oldest_birth(self) -> tuple[int, float] | None:
        """The first vCPU id of the slot whose plug has been under way for longest, and since when; None: none is."""
        return next(((first, since) for first, (_, since) in self._births.items()), None)

    # Births.

    def birthplace(self, slot: Slot) -> VcpuMap | None:
        """Return the host CPUs of QEMU's main thread while *slot* is plugged; None: those that it has."""
        if self.placement is None or self.host is None or self.placement.why_not(slot.ids, self.host):
            return None
        born_on = self.placement.born_on(slot.ids, self.host)
        return None if born_on == self.host.main_cpus else born_on

    def may_be_born(self, birthplace: VcpuMap | None) -> bool:
        """Return True if every plug under way has this birthplace."""
        return all(other == birthplace for other, _ in self._births.values())

    def birth_begins(self, first: int, birthplace: VcpuMap | None, now: float) -> None:
        """Note that the plug of the slot of vCPU *first* is about to be sent; also of one that nothing is wanted of.

        What is wanted may change while it is under way.
        """
        if not self._births:
            self._born.clear()
        self._births[first] = birthplace, now
        if birthplace is not None:
            self._born[first] = birthplace

    def birth_ends(self, first: int) -> None:
        """Note that the plug of the slot of vCPU *first* is over, or not sent at all."""
        self._births.pop(first, None)

    def take_born(self) -> dict[int, VcpuMap]:
        """Return where the plugs that were under way together, up to the last one, were born: by first vCPU id."""
        born, self._born = self._born, {}
        return born

    def are_only_on(self, slot: Slot, cpus: VcpuMap) -> bool:
        """Return True if all that is wanted of the threads of *slot* is that they run on these host CPUs.

        Not if they are to run on all of the host's: on those that the cgroup allows later too.
        """
        if self.placement is None or self.host is None or self.placement.groups:
            return False
        places = map(self.placement.of_vcpu, slot.ids)
        return all(place.cpus == cpus and place.scheduler is None for place in places)

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

    def forget_qemu(self) -> None:
        """Note that another QEMU runs the VM now. What the host allows for it is told before."""
        self._why_not.clear()
        self.drifted = {}

    # Drift.

    def drifts(self, found: "Mapping[int, Place]") -> "list[tuple[int, Place, Place]]":
        """Return which threads are newly found elsewhere: the vCPU (or EMULATOR), where it should run, and does.

        One that is being put in its place is not there yet. While a vCPU is born, *found* is without the main thread.
        """
        if self.placement is None or self.host is None:
            return []
        vcpus = (vcpu for vcpu in found if vcpu >= 0 and vcpu not in self.arriving)
        wanted = self.placement.of_vcpus(vcpus, self.host)
        if EMULATOR in found and (emulator := self.placement.of_emulator()):
            wanted[EMULATOR] = emulator
        now = {vcpu: place for vcpu, place in found.items() if vcpu in wanted and wanted[vcpu].differs(place)}
        new = [(vcpu, wanted[vcpu], place) for vcpu, place in now.items() if self.drifted.get(vcpu) != place]
        if EMULATOR in self.drifted and EMULATOR not in found:
            now[EMULATOR] = self.drifted[EMULATOR]
        self.drifted = now
        return new
