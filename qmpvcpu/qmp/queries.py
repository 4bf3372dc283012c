"""What is read from QEMU, and how: the same number of queries for a VM of any size."""

import asyncio
from collections.abc import Mapping
from typing import Any

from qmpvcpu import qapi
from qmpvcpu.errors import CommandRejectedError, MalformedReplyError, clip
from qmpvcpu.given import checked
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.verdicts import OstAnswer, OstStatus
from qmpvcpu.model.vm import Topology, VmInfo, VmStatus, needs_x2apic
from qmpvcpu.qapi import ThreadReading, build_fixed_slots, build_slots, creation_order
from qmpvcpu.qmp.monitor import Monitor, Target

Reading = tuple[tuple[Slot, ...], tuple[ThreadReading, ...] | None]

# query-kvm is deprecated since 11.0, and QEMU can be told to abort at what is deprecated (-compat).
_FIRST_WITH_ACCELERATORS = (10, 2, 0)
# libvirt gives every QEMU this secret to encrypt its other secrets with; nobody else names one so.
_LIBVIRT_SECRET = "masterKey0"  # noqa: S105 - the name of an object, no password


class Reader:
    """Reads one VM over one monitor.

    Args:
        monitor: The connection.
        timeout: Deadline of each command, in seconds.
    """

    def __init__(self, monitor: Monitor, timeout: float) -> None:
        self._monitor = monitor
        self._timeout = timeout
        self._hotplugs: bool | None = None  # whether the machine takes hotplugged CPUs; None: not asked yet

    async def slots(self, *, full: bool = True) -> Reading:
        """Read the slots; *full* also tells threads and creation order.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        if self._hotplugs is False:
            threads = await self._threads()
            return build_fixed_slots(threads or ()), threads
        if not full:
            return build_slots(qapi.parse_hotpluggable_cpus(await self._ask("query-hotpluggable-cpus")), ()), None
        # Both go out before either is answered, in libvirt's order.
        reply, threads = await asyncio.gather(self._try("query-hotpluggable-cpus"), self._threads())
        if reply is None:
            await self._check_fixed()
            return build_fixed_slots(threads or ()), threads
        self._hotplugs = True
        slots = build_slots(qapi.parse_hotpluggable_cpus(reply), threads or ())
        if threads is None and any(slot.present for slot in slots):
            raise MalformedReplyError("query-cpus-fast", "an error, and there are CPUs", None)
        return slots, threads or ()

    async def _check_fixed(self) -> None:
        """Make sure that an error in place of the slots means a machine that cannot hotplug, and not a bad moment."""
        if self._hotplugs is None:
            machine, machines = await asyncio.gather(self._machine(), self._try("query-machines"))
            self._hotplugs = machine is not None and qapi.parse_hotplugs(machines, machine)
        if self._hotplugs:
            raise MalformedReplyError("query-hotpluggable-cpus", "an error, from a machine that has slots", None)

    async def _machine(self) -> str | None:
        return qapi.parse_machine(await self._try("qom-get", {"path": "/machine", "property": "type"}))

    async def _threads(self) -> tuple[ThreadReading, ...] | None:
        # Before machine initialisation (-preconfig) there are no CPUs yet, and QEMU rejects the question.
        reply = await self._try("query-cpus-fast")
        return None if reply is None else qapi.parse_cpus_fast(reply)

    async def status(self) -> VmStatus:
        """Read what the VM is doing.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        status, migration = await asyncio.gather(self._ask("query-status"), self._try("query-migrate"))
        moves = isinstance(migration, dict) and "status" in migration
        return VmStatus(
            qapi.parse_status("query-status", status),
            qapi.parse_status("query-migrate", migration) if moves else "none",
        )

    async def answers(self) -> dict[int, OstAnswer]:
        """Read the guest's last answer for each slot; empty where the machine has no ACPI hotplug.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        reply = await self._try("query-acpi-ospm-status")
        return {} if reply is None else qapi.parse_ospm_status(reply)

    async def everything(self) -> tuple[Reading, VmStatus, dict[int, OstAnswer], VmInfo]:
        """Read all that there is to know, asked for in one go: slots, status, answers, and what never changes.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        reading, status, answers, facts = await asyncio.gather(
            self.slots(), self.status(), self.answers(), self._facts()
        )
        return reading, status, answers, await self._vm_info(reading, facts)

    async def _facts(self) -> list[Any]:
        return await asyncio.gather(
            self._try("query-accelerators"),
            self._kvm(),
            self._try("query-name"),
            self._try("query-uuid"),
            self._try("query-memory-size-summary"),
            self._machine(),
            self._try("qom-get", {"path": "/machine", "property": "smp"}),
            self._try("qom-get", {"path": "/machine", "property": "confidential-guest-support"}),
            self._try("qom-list", {"path": "/objects"}),
            self.other_paths(),
        )

    async def _kvm(self) -> Any:
        return None if self._monitor.version >= _FIRST_WITH_ACCELERATORS else await self._try("query-kvm")

    async def _accelerator(self, accelerators: object, kvm: object) -> str:
        known = qapi.parse_accelerators(accelerators) or qapi.parse_kvm(kvm)
        if known is None and kvm is None:  # a new QEMU that hides the new command
            known = qapi.parse_kvm(await self._try("query-kvm"))
        return known or "unknown"

    async def other_paths(self) -> frozenset[str]:
        """Read which devices have an id that a vCPU could want, and are none; CPUs are in the slots.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        return qapi.parse_peripherals(await self._try("qom-list", {"path": "/machine/peripheral"}))

    async def _vm_info(self, reading: Reading, facts: list[Any]) -> VmInfo:
        slots, threads = reading
        accelerators, kvm, known_name, uuid, memory, machine, smp, confidential, objects, other_paths = facts
        arch = threads[0].arch if threads else None  # that of one is that of all
        if arch is None:
            arch = qapi.parse_arch(await self._try("query-target")) or "unknown"
        machine_type = machine or "unknown"
        accelerator = await self._accelerator(accelerators, kvm)
        topology = qapi.parse_topology(smp)
        given = qapi.parse_name(known_name)
        return VmInfo(
            name=given or _name_from(self._monitor.address),
            named=given is not None,
            uuid=qapi.parse_uuid(uuid),
            arch=arch,
            machine=machine_type,
            accelerator=accelerator,
            qemu_version=self._monitor.version,
            package=self._monitor.package,
            memory_kib=qapi.parse_memory_kib(memory),
            topology=topology,
            can_plug=self._hotplugs is not False,
            # s390x hardware cannot take a CPU back; isapc has no ACPI to ask the guest with.
            can_unplug=self._hotplugs is not False and arch != "s390x" and machine_type != "isapc",
            libvirt_owned=isinstance(objects, list)
            and any(isinstance(each, dict) and each.get("name") == _LIBVIRT_SECRET for each in objects),
            x2apic=await self._x2apic(accelerator, topology, slots),
            smm_firmware=accelerator == "tcg" and "q35" in machine_type and await self._has_smm_firmware(),
            confidential=isinstance(confidential, str) and confidential.startswith("/"),  # the path of an object
            other_paths=other_paths,
        )

    async def _x2apic(self, accelerator: str, topology: Topology | None, slots: tuple[Slot, ...]) -> bool | None:
        if accelerator != "tcg" or topology is None or not slots or slots[0].qom_path is None:
            return None
        if not needs_x2apic(topology, slots[-1].props):
            return None
        reply = await self._try("qom-get", {"path": slots[0].qom_path, "property": "x2apic"})
        return reply is True

    async def _has_smm_firmware(self) -> bool:
        return await self._try("qom-get", {"path": "/machine/system.flash0", "property": "secure"}) is True

    async def _ask(self, command: str) -> Any:
        """Ask what every QEMU answers.

        Raises:
            MonitorError: No reply, or an error.
        """
        try:
            return await self._monitor.execute(command, timeout=self._timeout)
        except CommandRejectedError as error:
            told = {"class": error.error_class, "desc": error.desc}
            raise MalformedReplyError(command, "an error where every QEMU answers", told) from error

    async def _try(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Ask what this QEMU may not know; None if it does not."""
        try:
            return await self._monitor.execute(command, arguments, timeout=self._timeout)
        except CommandRejectedError:
            return None


@checked
async def look(target: Target, *, reply_timeout: float = 10.0) -> Layout:
    """Connect, read the VM, and leave: what ``attach`` would know of it, at less cost.

    Args:
        target: As for ``attach``.
        reply_timeout: As for ``attach``, in seconds.

    Returns:
        The VM as it is now.

    Raises:
        MonitorError: As for ``attach``.
    """
    news = False

    def listen(message: Mapping[str, Any]) -> None:
        nonlocal news
        news = news or qapi.parse_event(message) is not None

    monitor = await Monitor.open(target, timeout=reply_timeout, on_event=listen, on_lost=lambda _: None)
    try:
        reader = Reader(monitor, reply_timeout)
        everything = await reader.everything()
        if news:  # of two replies one may be older than it
            everything = await reader.everything()
    finally:
        await monitor.close()
    reading, _, answers, vm = everything
    return layout_of(vm, reading, answers)


def layout_of(vm: VmInfo, reading: Reading, answers: Mapping[int, OstAnswer]) -> Layout:
    """Return what was read as a layout, in which the removals are pending that the guest says it works on."""
    slots, threads = reading
    pending = (
        slot.first
        for slot in slots
        if slot.present
        and (answer := answers.get(slot.cpu_index)) is not None
        and answer.is_ejection
        and answer.status is OstStatus.IN_PROGRESS
    )
    return Layout(vm=vm, slots=slots, creation=creation_order(slots, threads or ()), pending_slots=frozenset(pending))


def _name_from(address: str) -> str:
    """Return the stem of a UNIX socket's path; pathlib is a tenth of what importing us would take."""
    kind, _, path = address.partition(":")
    name = path.rpartition("/")[2]
    stem, _, suffix = name.rpartition(".")
    return clip((stem if stem and suffix else name) if kind == "unix" else "") or "qemu"
