"""What a libvirt ``<domain>`` says about vCPUs, as values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology

LEVELS: Final = ("sockets", "dies", "clusters", "cores", "threads")
"""libvirt's levels of ``<topology>``."""

X86: Final = ("x86_64", "i686")
"""libvirt's names of the architectures that are alike in nearly everything."""

MOST_WITHOUT_EIM: Final = 255
"""So many vCPUs an x86 machine has at most unless it has an ``<iommu>`` with ``eim='on'``."""


@dataclass(frozen=True, slots=True)
class DomainVcpu:
    """One possible vCPU, as ``<vcpus>`` says it, or as libvirt would fill it in.

    Attributes:
        id: Its number, 0 to max - 1.
        enabled: True if the VM has it once it runs.
        hotpluggable: True if it is, or would be, plugged before the guest runs, and can be unplugged; False if QEMU
            boots with it.
        order: Its place in the order of creation, from 1 on; None where the document gives none.
    """

    id: int
    enabled: bool
    hotpluggable: bool
    order: int | None = None


@dataclass(frozen=True, slots=True)
class NumaCell:
    """One ``<cell>`` of ``<numa>``.

    Attributes:
        id: Its number.
        cpus: The vCPUs in it; libvirt puts a vCPU that no cell names into cell 0.
        memory_kib: Its memory in KiB.
    """

    id: int
    cpus: VcpuMap
    memory_kib: int


@dataclass(frozen=True, slots=True)
class ThreadSched:
    """What ``<vcpusched>`` and ``<emulatorsched>`` say of a thread: how the host schedules it.

    Attributes:
        scheduler: ``batch``, ``idle``, ``fifo`` or ``rr``.
        priority: For ``fifo`` and ``rr``; None for the others. libvirt defines a domain with any number here, and
            starts it with 1 to 99.
    """

    scheduler: str
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class CpuModel:
    """``<cpu>`` without its topology and cells.

    Attributes:
        mode: ``custom``, ``host-model``, ``host-passthrough`` or ``maximum``.
        model: The model's name under ``custom``, or None.
        features: The policy for each feature, by its name: ``force``, ``require``, ``optional``, ``disable`` or
            ``forbid``.
        migratable: ``on`` or ``off`` for ``host-passthrough`` and ``maximum``; None where the document does not say.
        vendor_id: The vendor that the guest sees, 12 characters, or None for the model's own.
    """

    mode: str
    model: str | None = None
    features: Mapping[str, str] = field(default_factory=dict)
    migratable: str | None = None
    vendor_id: str | None = None


@dataclass(frozen=True, slots=True)
class DomainVcpus:
    """What a ``<domain>`` says about vCPUs, with libvirt's defaults filled in.

    Attributes:
        name: The VM's name.
        uuid: Lower-case text with dashes, or None where the document has none.
        type: ``kvm`` or ``qemu`` (TCG).
        arch: libvirt's name (``x86_64``, ``i686``, ``ppc64``, ...), or None.
        machine: The machine type, or None.
        emulator: Absolute path of the QEMU, or None.
        memory_kib: Its memory in KiB, or None.
        vcpus: Every possible vCPU, by ascending id: as many as ``<vcpu>`` says.
        individual: True if the document has ``<vcpus>``, so that holes and order are kept.
        placement: ``static`` or ``auto``.
        cpuset: Host CPUs that vCPUs may run on by default, or None.
        pins: ``<vcpupin>``: the host CPUs of a vCPU, by its id.
        emulator_pin: ``<emulatorpin>``, or None.
        scheds: ``<vcpusched>``: how the thread of a vCPU is scheduled, by its id.
        emulator_sched: ``<emulatorsched>``, or None.
        topology: ``<topology>``, or None where libvirt would give every vCPU a socket.
        numa: The cells, by ascending id.
        cpu: The CPU model, or None where QEMU's default is used.
        cpu_options: More words of ``-cpu``, in libvirt's order, which it takes from ``<features>``, ``<clock>``,
            ``<cache>`` and others: ``kvm=off``, ``hv-relaxed=on``, ... Ignored by ``==``, as all that follows.
        unread: Where the document says more that changes how libvirt starts QEMU's CPUs and cells, and that is not
            read here (``memoryBacking``, ``cpu/numa/cell/distances``, ...).
        untold: What QEMU did not report when the document was written from a running VM, and nobody has added since:
            ``cpu-model``, ``cpu-features``, ``iommu`` (which libvirt requires for so many vCPUs).
        previous: In a record: what an earlier QEMU had and the running VM has not been given again. The rows describe
            the running VM.
        next_boot: In a record: the vCPUs requested for the next boot, or None.
        next_placement: In a record: where threads are to run from the next boot on, if other than now, or None.
    """

    name: str
    uuid: str | None
    type: Literal["kvm", "qemu"]
    arch: str | None
    machine: str | None
    emulator: str | None
    memory_kib: int | None
    vcpus: tuple[DomainVcpu, ...]
    individual: bool
    placement: Literal["static", "auto"] = "static"
    cpuset: VcpuMap | None = None
    pins: Mapping[int, VcpuMap] = field(default_factory=dict)
    emulator_pin: VcpuMap | None = None
    scheds: Mapping[int, ThreadSched] = field(default_factory=dict)
    emulator_sched: ThreadSched | None = None
    topology: Topology | None = None
    numa: tuple[NumaCell, ...] = ()
    cpu: CpuModel | None = None
    cpu_options: tuple[str, ...] = field(default=(), compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    untold: tuple[str, ...] = field(default=(), compare=False)
    previous: PreviousVcpus | None = field(default=None, compare=False)
    next_boot: VcpuMap | None = field(default=None, compare=False)
    next_placement: Placement | None = field(default=None, compare=False)

    @property
    def max(self) -> int:
        """How many vCPUs there can be."""
        return len(self.vcpus)

    @property
    def enabled(self) -> VcpuMap:
        """The vCPUs that the VM has once it runs."""
        return VcpuMap(each.id for each in self.vcpus if each.enabled)

    @property
    def current(self) -> int:
        """How many are enabled."""
        return sum(each.enabled for each in self.vcpus)

    @property
    def hotpluggable(self) -> VcpuMap:
        """The vCPUs that are plugged after QEMU's start, or can be."""
        return VcpuMap(each.id for each in self.vcpus if each.hotpluggable)

    @property
    def started_with(self) -> VcpuMap:
        """The vCPUs that QEMU boots with (the number in ``-smp``): enabled, and not hotpluggable."""
        return VcpuMap(each.id for each in self.vcpus if each.enabled and not each.hotpluggable)

    @property
    def order(self) -> tuple[int, ...]:
        """The ids of the enabled hotpluggable vCPUs, in the order in which they are plugged before the guest runs."""
        late = [each for each in self.vcpus if each.enabled and each.hotpluggable]
        return tuple(each.id for each in sorted(late, key=lambda each: (each.order or 0, each.id)))

    @property
    def creation(self) -> tuple[int, ...]:
        """The ids of all enabled vCPUs, in the order in which QEMU creates them."""
        return (*self.started_with, *self.order)

    @property
    def target(self) -> str | None:
        """The architecture that its QEMU emulates; None if that is an unknown one of the two that run i686.

        It decides which types of CPU there are, and which is the default. A document without an architecture is read
        as one for x86_64, one of i686 without an emulator as one for qemu-system-i386, which libvirt looks for first.
        """
        if self.arch != "i686" or self.emulator is None:
            return self.arch or "x86_64"
        name = self.emulator.rpartition("/")[2]
        return "x86_64" if "x86_64" in name or "kvm" in name else "i686" if "i386" in name else None

    @property
    def has_cores(self) -> bool:
        """True if the machine's slots are cores; elsewhere each thread is a slot of its own."""
        return has_cores(self.arch, self.machine)

    @property
    def slot_size(self) -> int:
        """How many vCPUs make a slot, and are plugged and unplugged together."""
        return self.topology.threads if self.has_cores and self.topology is not None else 1


def has_cores(arch: str | None, machine: str | None) -> bool:
    """Return True if the slots of a machine are cores, as those of pseries are.

    Source: libvirt src/qemu/qemu_domain.c, qemuDomainDefGetVcpuHotplugGranularity.
    """
    return arch in {"ppc64", "ppc64le"} and (machine or "pseries").startswith("pseries")


def needs_rows(vcpus: Sequence[DomainVcpu]) -> bool:
    """Return True if ``<vcpu current>`` cannot express it: there is a hole, or an enabled vCPU is hotpluggable."""
    enabled = sum(vcpu.enabled for vcpu in vcpus)
    return any(vcpu.enabled != (vcpu.id < enabled) or vcpu.hotpluggable == vcpu.enabled for vcpu in vcpus)
