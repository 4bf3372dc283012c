"""`Host`: QEMU's threads on this host, where they run, and where they are to run."""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qmpvcpu.engine.messages import HostIs, Persist, Wanted
from qmpvcpu.errors import HostError, PlacementError
from qmpvcpu.given import checked
from qmpvcpu.model.options import Affect
from qmpvcpu.model.placement import HostFacts, Place, Placement, QemuThread
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.planning.checks import check_placement
from qmpvcpu.vm.driver import Driver

if TYPE_CHECKING:
    from collections.abc import Callable

    from qmpvcpu.vm.next_boot import NextBoot

_PLACE = "place"


class Host:
    """The threads of one QEMU on this host: ``vm.host``. It speaks QMP only to learn which thread runs which vCPU.

    Only the kernel's scheduler is told anything: cgroups, libvirt's above all, stay as they are. QEMU has to run on
    this host, and ``/proc`` has to show it.
    """

    def __init__(self, driver: Driver, next_boot: "Callable[[str], NextBoot]") -> None:
        self._driver = driver
        self._next_boot = next_boot

    @property
    def placement(self) -> Placement:
        """Where the threads are to run, as the record's document, ``attach`` and later calls have said."""
        return self._driver.engine.state.places.placement or Placement()

    @property
    def drifted(self) -> Mapping[int, Place]:
        """Where threads were found last that are to run elsewhere, by vCPU id; -1 is QEMU's main thread.

        Every full read looks at it: that of ``attach``, ``refresh``, and one each ``resync_interval``.
        """
        return dict(self._driver.engine.state.places.drifted)

    def facts(self) -> HostFacts:
        """Return what this host allows for QEMU's threads now."""
        facts = self._driver.placer.facts(self.placement, anew=True)
        self._driver.put(HostIs(facts))
        return facts

    async def threads(self) -> tuple[QemuThread, ...]:
        """Return QEMU's threads: those of the vCPUs by ascending id, then its others, the main thread first.

        Raises:
            PlacementError: They cannot be found from here; it says why.
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        await self._driver.check_open()
        reader = self._driver.connection.reader
        readings, iothreads = await asyncio.gather(reader.threads(), reader.iothreads())
        try:
            return tuple(self._driver.placer.listed(readings, iothreads, self.placement))
        except HostError as error:
            raise PlacementError(VcpuMap(), str(error), action="look at threads") from error

    @checked
    async def place(self, placement: Placement | None = None, *, affect: Affect = Affect.LIVE) -> Placement:
        """Put threads in their place: those that are there at once, others when they are plugged.

        Args:
            placement: What it says goes over what was wanted before; None: what is wanted already is done.
            affect: LIVE moves threads, and the record follows. CONFIG only changes the next boot's document. BOTH
                does both, the running VM first.

        Returns:
            Where the threads are to run now.

        Raises:
            StepDeniedError: It names a vCPU that the machine does not have.
            PlacementError: The host does not allow it, and nothing was changed; or a thread could not be moved, and
                those that were are back where they had been.
            ConfigDeniedError: Nothing keeps the next boot.
            RecordError: The record, or the next boot, cannot be written.
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        if not isinstance(placement, Placement | None):
            raise TypeError(f"placement is a Placement, not {placement!r}")
        driver = self._driver
        check_placement(driver.engine.situation._replace(placement=placement))
        config = None if affect is Affect.LIVE else self._next_boot("another placement")
        known = self.placement
        wanted = known if placement is None else placement.over(known).with_policy(known.policy)
        if affect is not Affect.CONFIG:
            await self._place(wanted, known if placement is None else placement)
            if placement is not None:
                driver.put(Wanted(wanted))
                await driver.request(Persist())
        if config is not None and placement is not None:
            from qmpvcpu.domainxml import placement_of, with_placement  # few change the next boot

            await config.change(lambda domain: with_placement(domain, placement.over(placement_of(domain))))
        return wanted if affect is not Affect.CONFIG else known

    async def _place(self, wanted: Placement, named: Placement) -> None:
        """Move the threads that *named* says something of to where *wanted* has them."""
        driver = self._driver
        await driver.check_open()
        readings = await driver.connection.reader.threads()
        placer = driver.placer
        facts = placer.facts(wanted, anew=True)
        try:
            vcpus = {} if facts.unreachable else placer.vcpus(readings)
            concerned = {vcpu: thread for vcpu, thread in vcpus.items() if named.wants([vcpu])}
            if why := wanted.why_not(concerned, facts) or named.why_not_emulator(facts) or facts.unreachable:
                raise PlacementError(VcpuMap(concerned), f"{why}; nothing was changed", action=_PLACE)
            places = [(concerned[vcpu], place) for vcpu, place in wanted.of_vcpus(concerned, facts).items()]
            if emulator := named.of_emulator():
                places += [(thread, emulator) for thread in placer.others(vcpus, await self._iothreads())]
            placer.move(places, facts)
            if wanted.groups:
                placer.group(wanted, vcpus, placer.grouped(wanted, vcpus))
        except HostError as error:
            raise PlacementError(VcpuMap(concerned), str(error), action=_PLACE) from error
        driver.put(HostIs(placer.facts(wanted)))

    async def _iothreads(self) -> tuple[int, ...]:
        return await self._driver.connection.reader.iothreads()
