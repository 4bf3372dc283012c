"""What is known of a VM besides its CPUs: identity, machine, accelerator, and what its QEMU does not survive."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Capabilities", "KnownFault", "Topology", "VmInfo", "VmStatus", "apic_id", "needs_x2apic"]

_FIRST_APIC_ID_OF_X2APIC = 255  # 0xff is the broadcast id of an xAPIC
_APIC_MACHINES = ("i386", "x86_64")


class KnownFault(enum.Enum):
    """A way to kill or block a running QEMU that is known; the value tells what happens.

    Source: measured on QEMU 7.2.22, 10.0.2 and 11.1.3.
    """

    TCG_REPLUG_CORRUPTS_HEAP = "QEMU before 10.0 under TCG corrupts its heap at any plug after an unplug"
    TCG_CREATED_BEYOND_MAX = "QEMU under TCG aborts when more vCPUs were ever created than maxcpus"
    TCG_SINGLE_THREAD_UNPLUG = "QEMU under single-threaded TCG aborts when the guest ejects a vCPU"
    TCG_UNPLUG_BLOCKS_MIGRATION = (
        "QEMU under TCG, once a vCPU has left, may never get a migration out of its setup, nor cancel it"
    )
    TCG_APIC_ID_255 = "QEMU under TCG aborts at a vCPU with an APIC id from 255 on without x2apic in its model"


@dataclass(frozen=True, slots=True)
class Topology:
    """The machine's CPU topology; every level is at least 1.

    Attributes:
        max_cpus: All vCPUs that the machine can have: the product of the levels.

    Source: QEMU ``qom-get /machine smp`` (SMPConfiguration of qapi/machine.json).
    """

    max_cpus: int
    sockets: int = 1
    dies: int = 1
    clusters: int = 1
    modules: int = 1
    cores: int = 1
    threads: int = 1
    drawers: int = 1
    books: int = 1


@dataclass(frozen=True)
class VmInfo:
    """What QEMU tells once about the VM; none of it changes while this QEMU runs.

    Attributes:
        name: As given to ``attach``, else QEMU's ``-name``, else derived from the socket's path.
        uuid: Lower-case text with dashes, or None where QEMU was given none.
        arch: QEMU's target, such as ``x86_64``, ``ppc64``, ``s390x``.
        machine: Versioned machine type, such as ``pc-q35-10.0``, ``pseries-10.0``.
        accelerator: ``"kvm"`` or ``"tcg"``.
        qemu_version: Major, minor, micro.
        package: The distribution's version of QEMU, or "".
        memory_kib: Memory of the VM in KiB, hotplugged memory included, or None where QEMU does not tell.
        topology: CPU topology, or None where QEMU does not tell.
        can_plug: True if the machine takes hotplugged CPUs.
        can_unplug: True if the machine gives them back.
        libvirt_owned: True if libvirt started this QEMU.
        x2apic: Whether the CPU model has x2apic; None where that is unknown or no matter.
    """

    name: str
    arch: str
    machine: str
    accelerator: str
    qemu_version: tuple[int, int, int]
    uuid: str | None = None
    package: str = ""
    memory_kib: int | None = None
    topology: Topology | None = None
    can_plug: bool = True
    can_unplug: bool = True
    libvirt_owned: bool = False
    x2apic: bool | None = None

    @cached_property
    def known_faults(self) -> frozenset[KnownFault]:
        """What this QEMU is known not to survive."""
        if self.accelerator != "tcg":
            return frozenset()
        faults = {
            KnownFault.TCG_CREATED_BEYOND_MAX,
            KnownFault.TCG_SINGLE_THREAD_UNPLUG,
            KnownFault.TCG_UNPLUG_BLOCKS_MIGRATION,
        }
        if self.qemu_version < (10, 0, 0):
            faults.add(KnownFault.TCG_REPLUG_CORRUPTS_HEAP)
        if self.arch in _APIC_MACHINES and not self.x2apic:
            faults.add(KnownFault.TCG_APIC_ID_255)
        return frozenset(faults)


# MigrationStatus values (QEMU qapi/migration.json) in which a migration is not under way.
_IDLE_MIGRATIONS = frozenset({"none", "completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class VmStatus:
    """What the VM is doing at one moment.

    Attributes:
        run_state: QEMU's RunState, such as ``running``, ``paused``, ``postmigrate``.
        migration: QEMU's MigrationStatus, ``none`` where there never was one.
    """

    run_state: str
    migration: str = "none"

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


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this VM can do, and what its QEMU is known not to survive.

    Attributes:
        can_plug: True if the machine takes hotplugged CPUs.
        can_unplug: True if the machine gives them back.
        machine: Versioned machine type.
        accelerator: ``"kvm"`` or ``"tcg"``.
        qemu_version: Major, minor, micro.
        known_faults: What is DENIED with reason FATAL unless ``allow_fatal=True``.
    """

    can_plug: bool
    can_unplug: bool
    machine: str
    accelerator: str
    qemu_version: tuple[int, int, int]
    known_faults: frozenset[KnownFault]

    @classmethod
    def of(cls, vm: VmInfo) -> "Capabilities":
        """Return what *vm* can do."""
        return cls(
            can_plug=vm.can_plug,
            can_unplug=vm.can_unplug,
            machine=vm.machine,
            accelerator=vm.accelerator,
            qemu_version=vm.qemu_version,
            known_faults=vm.known_faults,
        )


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
