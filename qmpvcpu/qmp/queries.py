"""What is read from QEMU, and how: the same number of queries for a VM of any size."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu import qapi
from qmpvcpu.errors import CommandRejectedError, MalformedReplyError, clip
from qmpvcpu.given import checked
from qmpvcpu.model.counters import KvmCounters
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.verdicts import OstAnswer, OstStatus
from qmpvcpu.model.vm import ONE_THREAD, X86, Topology, VmInfo, VmStatus, needs_x2apic
from qmpvcpu.qapi import (
    CpuFeatures,
    ThreadReading,
    build_fixed_slots,
    build_slots,
    creation_order,
    runs_single_threaded,
    vcpu_paths,
)
from qmpvcpu.qmp.monitor import Monitor, Target

# Imports in functions below: most programs look at no thread of QEMU's.
if TYPE_CHECKING:
    from qmpvcpu.host.threads import Usage

Reading = tuple[tuple[Slot, ...], tuple[ThreadReading, ...] | None]

# query-kvm is deprecated since 11.0, and QEMU can be told to abort at what is deprecated (-compat).
_FIRST_WITH_ACCELERATORS = (10, 2, 0)
_HYPERV = "Microsoft Hv"
# libvirt gives every QEMU this secret to encrypt its other secrets with; nobody else names one so.
_LIBVIRT_SECRET = "masterKey0"  # noqa: S105 - the name of an object, no password
_USUAL_VCPU_0: Final = "/machine/unattached/device[0]"  # its QOM path on the PC machines

# What the host thread of a vCPU under TCG has run for if its guest has started it: more than it took to make the
# thread, and to wake it as often as it was. Measured on QEMU 7.2.22, 10.0.2 and 11.1.3, with 2 host CPUs idle, and
# with 12 processes on them: vCPUs that never started ran 0.04 to 0.3 ms at first, and then 3 to 6 us for each turn,
# over plugs and unplugs of others, 400 times stop and cont, resets and migrations: with 20 us a turn taken off, 0.15
# ms at most. Those that Linux 6.1 had started ran 41 ms in 51 turns by the time that it said so.
_ONCE_NS: Final = 5_000_000
_EACH_TURN_NS: Final = 20_000

# What a line has for one vCPU when QEMU tells all that KVM counts of it: x86 has 47 counters, 140 numbers in all,
# which take 2.2 KiB at first, and 5 KiB if each has as many digits as it can.
_BYTES_OF_STATS: Final = 8192


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
        self._counts_exits = False  # whether KVM counts how often each vCPU has left guest mode
        # By vCPU: its thread, and the count at the first look.
        self._first_exits: dict[str, tuple[int, int]] = {}

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

    async def threads(self) -> tuple[ThreadReading, ...]:
        """Read which host thread runs each vCPU.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        return qapi.parse_cpus_fast(await self._ask("query-cpus-fast"))

    async def iothreads(self) -> tuple[int, ...]:
        """Read the host threads of the iothreads; none where QEMU does not tell.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        return qapi.parse_iothreads(await self._try("query-iothreads"))

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
            qapi.parse_has_arrived(migration),
        )

    async def answers(self) -> dict[int, OstAnswer]:
        """Read the guest's last answer for each slot; empty where the machine has no ACPI hotplug.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        reply = await self._try("query-acpi-ospm-status")
        return {} if reply is None else qapi.parse_ospm_status(reply)

    async def started(self, slots: Collection[Slot]) -> frozenset[int]:
        """Read which of *slots* are known to have started, after ``everything``: all their vCPUs ran guest code.

        Under KVM a vCPU is known to when it has left guest mode since it was first asked for here, as ``query-stats``
        tells; so it takes two looks. Its count may have begun with an earlier vCPU: QEMU keeps what KVM has of one
        that leaves, and gives it to the next in its slot. Under TCG one look is enough: its host thread has run for
        longer than that of any vCPU that never started. Where ``VmInfo.start_unknowable`` says why, none is known to.

        Returns:
            First ids of the slots that have started.

        Raises:
            MonitorError: No reply, or none that can be understood.

        Source: QEMU accel/kvm/kvm-all.c, ``kvm_park_vcpu()``.
        """
        paths = {slot.first: vcpu_paths(slot) for slot in slots if slot.present}
        asked = [path for each in paths.values() for path in each]
        if not asked:
            return frozenset()
        ran = await (self._left_guest_mode(asked) if self._counts_exits else self._threads_ran(asked))
        return frozenset(first for first, each in paths.items() if ran.issuperset(each))

    async def _left_guest_mode(self, paths: Sequence[str]) -> set[str]:
        """Return which of the vCPUs at *paths* have left guest mode since they were first asked for."""
        # In this order, so that no count is taken for that of a later vCPU in its slot.
        threads, exits = await asyncio.gather(self._threads(), self._exits(paths))
        tids = {thread.qom_path: thread.host_tid for thread in threads or ()}
        ran = set[str]()
        for path in paths:
            if path not in exits or path not in tids:
                continue
            tid, first = self._first_exits.get(path, (None, 0))
            if tid != tids[path]:
                self._first_exits[path] = tids[path], exits[path]
            elif exits[path] > first:
                ran.add(path)
        return ran

    async def _threads_ran(self, paths: Sequence[str]) -> set[str]:
        """Return which of the vCPUs at *paths* have a thread that has run for longer than one that never started."""
        from qmpvcpu.host.threads import find, read_usage

        threads = await self._threads() or ()
        if not threads or runs_single_threaded(threads):
            return set()
        pid = self._monitor.find_qemu([threads[0].host_tid]).pid
        tids = {thread.qom_path: thread.host_tid for thread in threads if thread.qom_path in paths}
        found = {} if pid is None else find(pid, {*tids.values()})
        ran = {tid for tid, thread in found.items() if thread.tid != pid and _has_executed(read_usage(thread))}
        return {path for path, tid in tids.items() if tid in ran}

    async def _exits(self, paths: Sequence[str]) -> dict[str, int]:
        reply = await self._try("query-stats", qapi.query_exits(paths))
        return {} if reply is None else qapi.parse_exits(reply)

    async def statistics(
        self, paths: Sequence[str], names: Collection[str] | None = None, *, threads: bool = False
    ) -> tuple[dict[str, KvmCounters], tuple[ThreadReading, ...] | None]:
        """Read what KVM counts of the vCPUs at *paths*, and with *threads* their threads too, all asked for at once.

        Args:
            paths: Where they are; none: KVM is not asked. QEMU may tell of more.
            names: The counters; None: all.
            threads: Whether to read the threads.

        Returns:
            The counters by QOM path, none where QEMU or the kernel does not count; and the threads, None if they
            were not asked for, or QEMU does not tell.

        Raises:
            MonitorError: No reply, or none that can be understood.
        """
        most = max(self._monitor.longest_line // _BYTES_OF_STATS, 1)
        parts = [paths[start : start + most] for start in range(0, len(paths), most)]
        asked: list[Collection[str] | None] = [None] if len(parts) == 1 else [*parts]
        found, *replies = await asyncio.gather(
            self._threads() if threads else asyncio.sleep(0),
            *(self._try("query-stats", qapi.query_stats(each, names)) for each in asked),
        )
        stats: dict[str, KvmCounters] = {}
        for reply in replies:
            stats |= {} if reply is None else qapi.parse_stats(reply)
        return stats, found

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
            self._exits([_USUAL_VCPU_0]),
            self._try("qom-get", {"path": _USUAL_VCPU_0, "property": "feature-words"}),
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
        accelerators, kvm, known_name, uuid, memory, machine, smp, confidential, objects, exits, words, others = facts
        arch = threads[0].arch if threads else None  # that of one is that of all
        if arch is None:
            arch = qapi.parse_arch(await self._try("query-target")) or "unknown"
        machine_type = machine or "unknown"
        accelerator = await self._accelerator(accelerators, kvm)
        topology = qapi.parse_topology(smp)
        given = qapi.parse_name(known_name)
        features = qapi.parse_feature_words(words) if arch in X86 else None
        under_kvm = accelerator == "kvm"
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
            x2apic=features.x2apic if features is not None and _needs_x2apic(accelerator, topology, slots) else None,
            smm_firmware=accelerator == "tcg" and "q35" in machine_type and await self._has_smm_firmware(),
            hides_hypervisor=features is not None and await self._hides_hypervisor(features, under_kvm=under_kvm),
            nested=features is not None and features.nested and under_kvm,
            confidential=isinstance(confidential, str) and confidential.startswith("/"),  # the path of an object
            other_paths=others,
            start_unknowable=await self._why_start_unknowable(accelerator, threads or (), exits),
        )

    async def _why_start_unknowable(
        self, accelerator: str, threads: Sequence[ThreadReading], exits: Mapping[str, int]
    ) -> str:
        """Say why ``started`` cannot tell, "" if it can; *exits* as asked for where vCPU 0 usually is."""
        if not threads:
            return "QEMU had not built the machine yet when it was attached to (-preconfig): attach again"
        path = threads[0].qom_path
        if accelerator == "kvm" and path != _USUAL_VCPU_0:
            exits = await self._exits([path])
        self._counts_exits = path in exits
        if self._counts_exits:
            return ""
        if accelerator == "kvm":
            return "QEMU (7.1 and newer would, by query-stats) or its kernel does not tell how often a vCPU has run"
        if accelerator != "tcg":
            return f"with accelerator {accelerator!r} nothing tells which vCPUs have run"
        return ONE_THREAD if runs_single_threaded(threads) else self._why_no_run_time(threads[0].host_tid)

    def _why_no_run_time(self, tid: int) -> str:
        """Say why the run time of QEMU's threads, such as *tid*, cannot be read; "" if it can."""
        from qmpvcpu.host.threads import find, read_usage

        only = "under TCG only the run time of QEMU's threads tells it"
        qemu = self._monitor.find_qemu([tid])
        if qemu.pid is None:
            return f"{only}, and {qemu.why}"
        usage = read_usage(thread) if (thread := find(qemu.pid, [tid]).get(tid)) else None
        tells = usage is not None and usage.turns is not None
        return "" if tells else f"{only}, and this host's kernel does not tell it (schedstat)"

    async def _hides_hypervisor(self, features: CpuFeatures, *, under_kvm: bool) -> bool:
        """Return whether Linux sees no hypervisor by the CPU.

        Source: Linux arch/x86/kernel/kvm.c, ``kvm_detect``, and arch/x86/kernel/cpu/mshyperv.c,
        ``ms_hyperv_platform``.
        """
        if not features.hypervisor or features.kvm or not under_kvm:
            return not features.hypervisor
        names = ("kvm", "hv-vpindex", "hv-passthrough", "hv-vendor-id")
        replies = (self._try("qom-get", {"path": _USUAL_VCPU_0, "property": name}) for name in names)
        kvm, index, passthrough, vendor = await asyncio.gather(*replies)
        shows_hyperv = (index is True or passthrough is True) and vendor == _HYPERV
        return kvm is False and not shows_hyperv

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


def _has_executed(usage: "Usage | None") -> bool:
    if usage is None or usage.turns is None:
        return False
    return usage.run_ns > _ONCE_NS + usage.turns * _EACH_TURN_NS


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
    """Return what was read as a layout, with what the guest has said of each vCPU that is plugged.

    A removal that it works on is pending. Its answer to a plug counts: QEMU keeps the last answer of each slot, and
    that to an ejection would have come after it.
    """
    read, threads = reading
    slots = tuple(_answered(slot, answers.get(slot.cpu_index)) for slot in read)
    pending = (
        slot.first
        for slot in slots
        if slot.present
        and (answer := answers.get(slot.cpu_index)) is not None
        and answer.is_ejection
        and answer.status is OstStatus.IN_PROGRESS
    )
    return Layout(vm=vm, slots=slots, creation=creation_order(slots, threads or ()), pending_slots=frozenset(pending))


def _answered(slot: Slot, answer: OstAnswer | None) -> Slot:
    return slot.answered(answer) if slot.present and answer is not None and answer.is_insertion else slot


def _needs_x2apic(accelerator: str, topology: Topology | None, slots: tuple[Slot, ...]) -> bool:
    """Return whether a fault of TCG may matter, which x2apic avoids."""
    return accelerator == "tcg" and topology is not None and bool(slots) and needs_x2apic(topology, slots[-1].props)


def _name_from(address: str) -> str:
    """Return the stem of a UNIX socket's path; pathlib is a tenth of what importing us would take."""
    kind, _, path = address.partition(":")
    name = path.rpartition("/")[2]
    stem, _, suffix = name.rpartition(".")
    return clip((stem if stem and suffix else name) if kind == "unix" else "") or "qemu"
