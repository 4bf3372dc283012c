"""What is known of a VM apart from its CPUs: identity, machine, accelerator, and the known faults of its QEMU."""

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Final, NamedTuple

from qmpvcpu.model.names import QOM_PATH, UUID, WORD, Shape
from qmpvcpu.model.vcpumap import MOST_VCPUS

_Version = tuple[int, int, int]
_Size = Annotated[int, Shape(f"a whole number from 1 to {MOST_VCPUS}", range(1, MOST_VCPUS + 1).__contains__)]

SMP_LEVELS: Final = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")
"""The levels of a topology as ``-smp`` names them, outermost first."""

_FIRST_APIC_ID_OF_X2APIC = 255  # 0xff is the broadcast id of an xAPIC
X86: Final = ("i386", "x86_64")
"""QEMU's targets that are PCs."""

ONE_THREAD: Final = "one host thread runs all vCPUs (TCG with thread=single), so its run time tells nothing of one"
"""Why nobody can tell which vCPUs of single-threaded TCG have started."""


class KnownFault(enum.Enum):
    """A way to kill or block a running QEMU, or its guest, that is known; the value tells what happens.

    Source: measured on QEMU 7.2.22, 8.2.2, 10.0.2, 10.0.13 and 11.1.3.
    """

    TCG_REPLUG_CORRUPTS_HEAP = (
        "QEMU before 8.2.2 under TCG corrupts its heap at any plug, and any reset, after an unplug"
    )
    TCG_CREATED_BEYOND_MAX = "QEMU under TCG aborts when more vCPUs were ever created than maxcpus"
    TCG_SINGLE_THREAD_UNPLUG = "QEMU under single-threaded TCG aborts when the guest ejects a vCPU"
    TCG_UNPLUG_BLOCKS_MIGRATION = (
        "QEMU up to 10.0.2 under TCG, once a vCPU has left, may never get a migration out of its setup, nor cancel it"
    )
    TCG_APIC_ID_255 = "QEMU 10.0 under TCG aborts at a vCPU with an APIC id from 255 on without x2apic in its model"
    TCG_PSERIES_UNPLUG_ABORTS = "QEMU 10.0.13 under TCG aborts when the guest of a pseries machine gives up a vCPU"
    TCG_PSERIES_RESET_ABORTS = (
        "QEMU up to 10.0.2 under TCG may hang and abort when a pseries machine is reset with a removal pending"
    )
    TCG_LINUX_LOCKS_UP = "a Linux guest of QEMU 8.2 under TCG locks up once vCPUs have been plugged into it"
    TCG_SMM_PLUG_HANGS = "the guest of a QEMU under TCG hangs at a plug if the VM's firmware uses SMM"


_VERSIONS: Final[tuple[_Version, ...]] = ((7, 2, 22), (8, 2, 2), (10, 0, 2), (10, 0, 13), (11, 1, 3))  # measured

# 7.2.22 starts no VM with an APIC id of 255, so that fault is assumed there. 8.2.2 was measured without pseries, and
# SMM on 10.0.2 and 11.1.3, with OVMF.
_SEEN_IN: Final[Mapping[KnownFault, Collection[_Version]]] = {
    KnownFault.TCG_REPLUG_CORRUPTS_HEAP: [(7, 2, 22)],
    KnownFault.TCG_CREATED_BEYOND_MAX: _VERSIONS,
    KnownFault.TCG_SINGLE_THREAD_UNPLUG: _VERSIONS,
    KnownFault.TCG_UNPLUG_BLOCKS_MIGRATION: [(7, 2, 22), (8, 2, 2), (10, 0, 2)],
    KnownFault.TCG_APIC_ID_255: [(7, 2, 22), (10, 0, 2), (10, 0, 13)],
    KnownFault.TCG_PSERIES_UNPLUG_ABORTS: [(10, 0, 13)],
    KnownFault.TCG_PSERIES_RESET_ABORTS: [(7, 2, 22), (8, 2, 2), (10, 0, 2)],
    KnownFault.TCG_LINUX_LOCKS_UP: [(8, 2, 2)],
    KnownFault.TCG_SMM_PLUG_HANGS: _VERSIONS,
}
_OF_UNPLUG = frozenset(
    {
        KnownFault.TCG_REPLUG_CORRUPTS_HEAP,
        KnownFault.TCG_SINGLE_THREAD_UNPLUG,
        KnownFault.TCG_UNPLUG_BLOCKS_MIGRATION,
    }
)
_OF_PSERIES = frozenset({KnownFault.TCG_PSERIES_UNPLUG_ABORTS, KnownFault.TCG_PSERIES_RESET_ABORTS})


def _faults_of(version: _Version) -> frozenset[KnownFault]:
    """Return the faults of *version*; one that was not measured has those of its neighbours, older and newer.

    A neighbour is the nearest version that was measured. If that is of another series (major.minor), all that were
    measured of that series count: a fix in a later release of theirs need not be in the first of ours.
    """
    near = {version} & {*_VERSIONS}
    if not near:
        older = [each for each in _VERSIONS if each < version][-1:]
        newer = [each for each in _VERSIONS if each > version][:1]
        for nearest in older + newer:
            series = [each for each in _VERSIONS if each[:2] == nearest[:2]]
            near.update([nearest] if nearest[:2] == version[:2] else series)
    return frozenset(fault for fault, versions in _SEEN_IN.items() if not near.isdisjoint(versions))


@dataclass(frozen=True, slots=True)
class Topology:
    """The machine's CPU topology; every level is at least 1.

    Attributes:
        max_cpus: All vCPUs that the machine can have: the product of the levels.

    Source: QEMU ``qom-get /machine smp`` (SMPConfiguration of qapi/machine.json).
    """

    max_cpus: _Size
    sockets: _Size = 1
    dies: _Size = 1
    clusters: _Size = 1
    modules: _Size = 1
    cores: _Size = 1
    threads: _Size = 1
    drawers: _Size = 1
    books: _Size = 1


@dataclass(frozen=True)
class RecordInfo:
    """Which record follows a VM, and how often it was written.

    Attributes:
        path: Where it is.
        found: How often it had been written when it was opened: 0 if it was not there.
        saves: How often it has been now, counting a write that failed, or is under way.
    """

    path: str
    found: int
    saves: int


@dataclass(frozen=True)
class VmInfo:
    """What QEMU tells once about the VM; none of it changes while this QEMU runs.

    Attributes:
        name: As given to ``attach``, else QEMU's ``-name``; else a label: that in the record, or one made of the
            socket's path.
        uuid: Lower-case text with dashes, or None where QEMU was given none.
        arch: QEMU's target, such as ``x86_64``, ``ppc64``, ``s390x``.
        machine: Versioned machine type, such as ``pc-q35-10.0``, ``pseries-10.0``.
        accelerator: QEMU's word for it, such as ``"kvm"``, ``"tcg"``, ``"mshv"``; ``"unknown"`` where QEMU does not
            tell. Before 10.2 QEMU tells only whether it is KVM, and what is not is taken for TCG.
        qemu_version: Major, minor, micro.
        package: The distribution's version of QEMU, or "".
        memory_kib: Memory of the VM in KiB, hotplugged memory included, or None where QEMU does not tell.
        topology: CPU topology, or None where QEMU does not tell.
        can_plug: True if the machine takes hotplugged CPUs.
        can_unplug: True if the machine gives them back.
        libvirt_owned: True if libvirt started this QEMU.
        x2apic: Whether the CPU model has x2apic; None where that is unknown or no matter.
        confidential: True if the guest is sealed against the host (SEV, TDX, Secure Execution, ...).
        smm_firmware: True if the firmware's flash can be written in SMM only, which firmware that uses SMM asks for.
            Read under TCG only, where it matters.
        hides_hypervisor: True if the CPU model of an x86 VM shows the guest no hypervisor: ``hypervisor=off``; or
            ``kvm=off`` under KVM, unless it shows Hyper-V instead, for which Linux needs ``hv-vpindex`` and Hyper-V's
            own ``hv-vendor-id``.
        nested: True if the guest of an x86 VM under KVM can run VMs of its own (``vmx`` or ``svm``).
        other_paths: QOM paths of devices other than CPUs whose ids begin with ``vcpu``, as we do with those of CPUs.
        named: True if *name* was given; False for a label, which does not tell this VM from another.
        start_unknowable: Why nothing tells which vCPUs have executed guest code, so that ``Proof.STARTED`` cannot be
            had; "" where it can.
    """

    name: str
    arch: Annotated[str, WORD]
    machine: Annotated[str, WORD]
    accelerator: Annotated[str, WORD]
    qemu_version: tuple[int, int, int]
    uuid: Annotated[str, UUID] | None = None
    package: str = ""
    memory_kib: int | None = None
    topology: Topology | None = None
    can_plug: bool = True
    can_unplug: bool = True
    libvirt_owned: bool = False
    x2apic: bool | None = None
    confidential: bool = False
    smm_firmware: bool = False
    hides_hypervisor: bool = False
    nested: bool = False
    other_paths: frozenset[Annotated[str, QOM_PATH]] = frozenset()
    named: bool = True
    start_unknowable: str = ""

    @property
    def identity(self) -> str | None:
        """What identifies this VM in any QEMU: its uuid, else a name that was given, or None."""
        return self.uuid or (self.name if self.named else None)

    @property
    def acknowledges(self) -> bool:
        """True if its guests can acknowledge plugs, by ACPI's _OST; those of pseries and s390x cannot."""
        return self.can_plug and not self.arch.startswith(("ppc", "s390")) and self.machine != "isapc"

    @property
    def is_x86(self) -> bool:
        """True for a PC, of 32 or 64 bits."""
        return self.arch in X86

    @property
    def seals_vcpus(self) -> bool:
        """True if the vCPUs are sealed at launch, so that this VM probably does not survive one more.

        Secure Execution (s390x) is not so: KVM makes a vCPU that is added a secure one.

        Source: Linux arch/s390/kvm/kvm-s390.c, ``kvm_s390_vcpu_setup``.
        """
        return self.confidential and not self.arch.startswith("s390")

    @property
    def lacks_hypervisor(self) -> bool:
        """True if Linux in it detects no hypervisor by its CPU; TCG is none to Linux.

        Its SMBIOS may still name one: Linux takes a serial number that begins with ``VMware-`` for VMware.
        """
        return self.is_x86 and (self.hides_hypervisor or self.accelerator == "tcg")

    @cached_property
    def known_faults(self) -> frozenset[KnownFault]:
        """What this QEMU is known not to survive; of a version that was not measured, what its neighbours do not.

        A step into one is DENIED with reason FATAL unless ``allow_fatal=True``. A plan warns of those that depend on
        the guest or on a later reset.
        """
        if self.accelerator != "tcg" or not self.can_plug:
            return frozenset()
        faults = _faults_of(self.qemu_version)
        if not self.can_unplug:
            faults -= _OF_UNPLUG
        if not self.smm_firmware:
            faults -= {KnownFault.TCG_SMM_PLUG_HANGS}
        if not self.is_x86 or self.x2apic:
            faults -= {KnownFault.TCG_APIC_ID_255}
        return faults if self.machine.startswith("pseries") else faults - _OF_PSERIES


# MigrationStatus values (QEMU qapi/migration.json) in which a migration is not under way.
_IDLE_MIGRATIONS = frozenset({"none", "completed", "failed", "cancelled"})


class VmStatus(NamedTuple):
    """What the VM is doing at one moment.

    Attributes:
        run_state: QEMU's RunState, such as ``running``, ``paused``, ``postmigrate``.
        migration: QEMU's MigrationStatus, ``none`` where there never was one.
        arrived: True if the VM has migrated into this QEMU. QEMU forgets it when the VM is to migrate on.
    """

    run_state: str
    migration: str = "none"
    arrived: bool = False

    @property
    def migrating(self) -> bool:
        """True while a migration is under way, in or out; a destination that only listens is still at rest."""
        if self.run_state == "inmigrate" and self.migration == "setup":
            return False
        return self.migration not in _IDLE_MIGRATIONS or self.run_state == "finish-migrate"

    @property
    def migrated_away(self) -> bool:
        """True on a source whose VM now runs elsewhere."""
        return self.run_state == "postmigrate"

    @property
    def is_steady(self) -> bool:
        """True if it cannot leave this status without an event of QEMU's (STOP)."""
        return self.run_state == "running" and not self.migrating


def apic_id(topology: Topology, props: Mapping[str, int]) -> int:
    """Return the APIC id that QEMU gives the CPU with these *props* (wire names to numbers).

    Each level takes as many bits as its size needs, threads lowest.

    Source: QEMU include/hw/i386/topology.h, ``x86_apicid_from_topo_ids``.
    """
    value = props.get("socket-id", 0)
    for name, size in (
        ("die-id", topology.dies),
        ("module-id", topology.modules),
        ("core-id", topology.cores),
        ("thread-id", topology.threads),
    ):
        value = value << (size - 1).bit_length() | props.get(name, 0)
    return value


def needs_x2apic(topology: Topology, props: Mapping[str, int]) -> bool:
    """Return True if the CPU with these *props* has an APIC id that only x2apic can address."""
    return apic_id(topology, props) >= _FIRST_APIC_ID_OF_X2APIC
