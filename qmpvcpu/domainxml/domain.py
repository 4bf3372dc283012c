"""DomainVcpus: all that a libvirt ``<domain>`` says about vCPUs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from qmpvcpu.model.vmstate import PreviousVcpus


@dataclass(frozen=True, slots=True)
class DomainVcpu:
    """One possible vCPU, as ``<vcpus>`` says it, or as libvirt would fill it in.

    Attributes:
        id: Its number, 0 to max - 1.
        enabled: True if it is there once the VM runs.
        hotpluggable: True if it is, or would be, plugged before the guest runs, and can leave; False if QEMU starts
            with it.
        order: Its place in the order of creation, from 1 on; None where none is given.
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
        cpus: The vCPUs in it; a vCPU that no cell names is in cell 0, as libvirt has it.
        memory_kib: Its memory in KiB.
    """

    id: int
    cpus: VcpuMap
    memory_kib: int


@dataclass(frozen=True, slots=True)
class VcpuSched:
    """One ``<vcpusched>``: the host's scheduler for the threads of some vCPUs.

    Attributes:
        vcpus: Which.
        scheduler: ``batch``, ``idle``, ``fifo`` or ``rr``.
        priority: For ``fifo`` and ``rr``; None for the others.
    """

    vcpus: VcpuMap
    scheduler: str
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class CpuModel:
    """``<cpu>`` apart from its topology and cells.

    Attributes:
        mode: ``custom``, ``host-model``, ``host-passthrough`` or ``maximum``.
        model: The model's name under ``custom``, or None.
        features: What is asked of each feature, by its name: ``force``, ``require``, ``optional``, ``disable`` or
            ``forbid``.
        migratable: ``on`` or ``off`` as the document says it, for ``host-passthrough`` and ``maximum``; None where it
            does not.
    """

    mode: str
    model: str | None = None
    features: Mapping[str, str] = field(default_factory=dict)
    migratable: str | None = None


@dataclass(frozen=True, slots=True)
class DomainVcpus:
    """What a ``<domain>`` says about vCPUs, with libvirt's defaults filled in.

    Attributes:
        name: The VM's name.
        uuid: Lower-case text with dashes, or None where the document has none.
        type: ``kvm`` or ``qemu`` (TCG).
        arch: As libvirt names it (``x86_64``, ``i686``, ``ppc64``, ...), or None.
        machine: The machine type, or None.
        emulator: Absolute path of the QEMU, or None.
        memory_kib: Its memory in KiB, or None.
        vcpus: Every possible vCPU, by ascending id: there are as many as ``<vcpu>`` says.
        individual: True if the document has ``<vcpus>``, so that holes and order are kept.
        placement: ``static`` or ``auto``.
        cpuset: Host CPUs that vCPUs may run on by default, or None.
        pins: ``<vcpupin>``: the host CPUs of a vCPU, by its id.
        emulator_pin: ``<emulatorpin>``, or None.
        scheds: ``<vcpusched>``.
        topology: ``<topology>``, or None where libvirt would give every vCPU a socket.
        numa: The cells, by ascending id.
        cpu: The CPU model, or None where QEMU's default is taken.
        unread: Names of elements that change how libvirt starts QEMU's CPUs and cells, and that are not read here
            (``cpu/cache``, ``features/hyperv``, ...); of no matter to equality.
        untold: What QEMU did not tell when the document was written from a running VM, and nobody has added since:
            ``cpu-model``, ``cpu-features``, ``iommu`` (which libvirt wants for so many vCPUs); no matter either.
        previous: Of a record: what an earlier QEMU had, and the VM as it runs has not been given again. The rows are
            those of the VM as it runs. Of no matter to equality.
        next_boot: Of a record: the vCPUs that the next boot is to have, where that was asked for; likewise.
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
    scheds: tuple[VcpuSched, ...] = ()
    topology: Topology | None = None
    numa: tuple[NumaCell, ...] = ()
    cpu: CpuModel | None = None
    unread: tuple[str, ...] = field(default=(), compare=False)
    untold: tuple[str, ...] = field(default=(), compare=False)
    previous: PreviousVcpus | None = field(default=None, compare=False)
    next_boot: VcpuMap | None = field(default=None, compare=False)

    @property
    def max(self) -> int:
        """How many vCPUs there can be."""
        return len(self.vcpus)

    @property
    def enabled(self) -> VcpuMap:
        """The vCPUs that are there once the VM runs."""
        return VcpuMap(each.id for each in self.vcpus if each.enabled)

    @property
    def current(self) -> int:
        """How many these are."""
        return sum(each.enabled for each in self.vcpus)

    @property
    def hotpluggable(self) -> VcpuMap:
        """The vCPUs that are plugged after QEMU's start, or can be."""
        return VcpuMap(each.id for each in self.vcpus if each.hotpluggable)

    @property
    def started_with(self) -> VcpuMap:
        """The vCPUs that QEMU starts with (the number in ``-smp``): enabled, and not hotpluggable."""
        return VcpuMap(each.id for each in self.vcpus if each.enabled and not each.hotpluggable)

    @property
    def order(self) -> tuple[int, ...]:
        """The ids of those that are plugged before the guest runs, in this order."""
        late = [each for each in self.vcpus if each.enabled and each.hotpluggable]
        return tuple(each.id for each in sorted(late, key=lambda each: (each.order or 0, each.id)))


def needs_rows(vcpus: Sequence[DomainVcpu]) -> bool:
    """Return True if ``<vcpu current>`` cannot say it: there is a hole, or an enabled vCPU that is hotpluggable."""
    enabled = sum(vcpu.enabled for vcpu in vcpus)
    return any(vcpu.enabled != (vcpu.id < enabled) or vcpu.hotpluggable == vcpu.enabled for vcpu in vcpus)


def creation_of(vcpus: Sequence[DomainVcpu]) -> list[int]:
    """Return the enabled vCPUs in the order in which libvirt has QEMU create them."""
    enabled = [vcpu for vcpu in vcpus if vcpu.enabled]
    enabled.sort(key=lambda vcpu: (vcpu.hotpluggable, vcpu.hotpluggable and (vcpu.order or 0), vcpu.id))
    return [vcpu.id for vcpu in enabled]
