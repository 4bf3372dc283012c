"""`Host`: QEMU's threads on this host, where they run, and their places."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from qmpvcpu.engine.messages import HostIs, Persist, Wanted
from qmpvcpu.errors import LOOK, DenialReason, HostError, PlacementError, StepDeniedError
from qmpvcpu.given import checked
from qmpvcpu.host.threads import HostThread
from qmpvcpu.model.options import Affect
from qmpvcpu.model.placement import CoreScheduling, HostFacts, Place, Placement, QemuThread
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.planning.checks import check_placement
from qmpvcpu.qapi import ThreadReading
from qmpvcpu.vm.driver import Driver
from qmpvcpu.vm.placing import Move, allowing, may_spread

if TYPE_CHECKING:
    from qmpvcpu.vm.next_boot import NextBoot

_PLACE = "placing"
# How often QEMU is asked again for the threads of vCPUs that come meanwhile.
_MOST_READS = 5
_WANTS_ALL: Final = Placement(core_scheduling=CoreScheduling.VCPUS)  # so that all is looked at


class Host:
    """The threads of one QEMU on this host: ``vm.host``. It uses QMP only to learn which thread runs which vCPU.

    It changes affinity and scheduler only: cgroups, including libvirt's, stay as they are. QEMU must run on this
    host, and ``/proc`` must show it.
    """

    def __init__(self, driver: Driver, next_boot: "Callable[[str], NextBoot]") -> None:
        self._driver = driver
        self._next_boot = next_boot

    @property
    def placement(self) -> Placement:
        """The places of the threads, from the record's document, ``attach`` and later calls."""
        return self._driver.engine.state.places.placement or Placement()

    @property
    def drifted(self) -> Mapping[int, Place]:
        """Where drifted threads were last found, by vCPU id; -1 is QEMU's main thread.

        Every full read looks for drift: ``attach``, ``refresh``, and one each ``resync_interval``. So does ``place``.
        """
        return dict(self._driver.engine.state.places.drifted)

    def facts(self) -> HostFacts:
        """Return what this host allows for QEMU's threads now."""
        facts = self._driver.placer.facts(_WANTS_ALL, anew=True)
        self._driver.put(HostIs(facts))
        return facts

    async def threads(self) -> tuple[QemuThread, ...]:
        """Return QEMU's threads: those of the vCPUs by ascending id, then its others, the main thread first.

        Raises:
            PlacementError: They cannot be found from here; the message says why.
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        await self._driver.check_open()
        placer = self._driver.placer
        try:
            older = placer.all_threads()
            readings, iothreads = await self._read()
            return tuple(placer.listed(older, readings, iothreads, self.placement))
        except HostError as error:
            raise PlacementError(VcpuMap(), str(error), action=LOOK) from error

    async def _read(self) -> tuple[Sequence[ThreadReading], Collection[int]]:
        """Ask QEMU for the threads of all vCPUs that are plugged by then, and for those of its iothreads."""
        reader = self._driver.connection.reader
        readings, iothreads = await asyncio.gather(reader.threads(), reader.iothreads())
        for _ in range(_MOST_READS):
            if self._driver.layout.enabled <= self._driver.placer.told_of(readings):
                break
            readings = await reader.threads()  # a vCPU was plugged after QEMU had told of the others
        return readings, iothreads

    @checked
    async def place(self, placement: Placement | None = None, *, affect: Affect = Affect.LIVE) -> Placement:
        """Put threads in their place: existing ones now, others when they are plugged.

        Args:
            placement: Overrides the placement so far, whose policy stays; None: put threads in the place they already
                have.
            affect: LIVE moves threads, and the record follows. CONFIG only changes the next boot's document. BOTH
                does both, the running VM first.

        Returns:
            The placement from now on.

        Raises:
            StepDeniedError: It names a vCPU that the machine does not have, or the host does not allow it. Nothing
                was changed.
            PlacementError: A thread could not be moved; the others were moved back.
            ConfigDeniedError: Nothing keeps the next boot.
            RecordError: The record, or the next boot, cannot be written.
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        if not isinstance(placement, Placement | None):
            raise TypeError(f"placement is a Placement, not {placement!r}")
        with self._driver.traced("host.place", **_told(placement)):
            return await self._place_all(placement, affect)

    async def _place_all(self, placement: Placement | None, affect: Affect) -> Placement:
        driver = self._driver
        check_placement(driver.engine.situation._replace(placement=placement), _PLACE)
        config = None if affect is Affect.LIVE else self._next_boot("another placement")
        if affect is not Affect.CONFIG:
            named = self.placement if placement is None else placement
            await self._place(placement, lambda vcpu: named.wants([vcpu]), emulator=bool(named.of_emulator()))
            if placement is not None:
                await driver.request(Persist())
        if config is not None and placement is not None:
            await config.place(placement)
        return self.placement

    async def place_vcpus(self, vcpus: Collection[int]) -> None:
        """Put the threads of these vCPUs in their place, as ``place`` does; unplugged vCPUs have none.

        Raises:
            StepDeniedError: As ``place``.
            PlacementError: As ``place``.
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        if vcpus and self.placement.wants(vcpus):
            await self._place(None, lambda vcpu: vcpu in vcpus, emulator=False)

    async def _place(
        self, placement: Placement | None, is_concerned: Callable[[int], bool], *, emulator: bool
    ) -> None:
        """Have *placement* wanted too, and move the threads of the vCPUs that are concerned, and *emulator* threads.

        What the host does not allow of that is denied, also for vCPUs that are not there yet.
        """
        driver = self._driver
        await driver.check_open()
        try:
            older = driver.placer.all_threads() if emulator else []
        except HostError:
            older = []  # what the host allows says why
        readings, iothreads = await self._read()
        # Only now: others may have wanted something meanwhile.
        wanted = driver.engine.state.places.wanted_with(placement) or Placement()
        ahead = () if placement is None else placement.vcpus
        concerned = VcpuMap(vcpu for vcpu in driver.layout.enabled if is_concerned(vcpu))
        facts = driver.placer.facts(wanted, anew=True)
        vcpus = {} if facts.unreachable else driver.placer.vcpus(readings)
        for vcpu in VcpuMap([*concerned, *ahead]):
            directory = vcpus[vcpu].directory if vcpu in vcpus else None
            if why := wanted.why_not([vcpu], allowing(facts, directory)):
                raise StepDeniedError(_PLACE, VcpuMap([vcpu]), DenialReason.CANNOT_PLACE, why)
        if why := facts.unreachable or (wanted.why_not_emulator(facts) if emulator else ""):
            raise StepDeniedError(_PLACE, VcpuMap(), DenialReason.CANNOT_PLACE, why)
        try:
            self._move(wanted, facts, concerned, vcpus, (older, iothreads) if emulator else None)
        except HostError as error:
            raise PlacementError(concerned, str(error), action=_PLACE) from error
        if placement is not None:
            driver.put(Wanted(wanted))
        driver.put(HostIs(driver.placer.facts(wanted, anew=True), driver.placer.places_of(vcpus)))

    def _move(
        self,
        wanted: Placement,
        facts: HostFacts,
        concerned: VcpuMap,
        vcpus: Mapping[int, HostThread],
        emulator: tuple[Sequence[HostThread], Collection[int]] | None,
    ) -> None:
        placer = self._driver.placer
        places = wanted.of_vcpus(concerned, facts)
        moves = [
            Move(vcpus[vcpu], place, may_spread(wanted.of_vcpu(vcpu), facts))
            for vcpu, place in places.items()
            if vcpu in vcpus
        ]
        if emulator is not None:
            threads, iothreads = emulator
            place = wanted.of_emulator()
            spread = may_spread(place, facts)
            moves += [Move(thread, place, spread) for thread in placer.others(threads, vcpus, iothreads)]
        placer.move(moves, facts)
        placer.group(wanted, vcpus)


def _told(placement: Placement | None) -> dict[str, str]:
    """Return what the span of a call says of *placement*: the vCPUs that it names, if any."""
    return {"vcpus": str(VcpuMap(placement.vcpus))} if placement is not None and placement.vcpus else {}
