"""The QEMU arguments that rebuild a VM's vCPUs, with their holes and in their order. Pure: no I/O.

``arguments`` takes a domain document's vCPU side, or a live layout. Use its result in one of two ways: all of it on
the command line (``argv``), or the machine alone (``boot_argv``, with ``-S`` or ``-incoming``) and then ``replay``,
where QEMU itself says where each vCPU goes.

Source: libvirt src/qemu/qemu_command.c, and its command lines as measured with libvirt 9.0.0 on QEMU 7.2.22 and
10.0.2; QEMU qapi/machine.json.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

from qmpvcpu import qapi
from qmpvcpu.domainxml import CpuModel, DomainVcpus, NumaCell, start_of
from qmpvcpu.domainxml.cpu import (
    CPU_FEATURES,
    CPU_MODEL,
    IOMMU,
    MODES,
    MODES_WITHOUT_MODEL,
    SWITCHES,
    needs_kvm,
    qemu_model,
    running_model,
)
from qmpvcpu.domainxml.domain import X86
from qmpvcpu.errors import DomainXmlError, counted, shorten
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.names import is_cpu_type, is_word
from qmpvcpu.model.vcpumap import VcpuMap, union
from qmpvcpu.model.vm import SMP_LEVELS, Topology

Device = Mapping[str, str | int]

# Where a vCPU's place follows from its id by QEMU's rule for possible CPUs, and the type of its CPUs.
_TYPES: Final = {
    "x86_64": "x86_64-cpu",
    "i686": "i386-cpu",
    "s390x": "s390x-cpu",
    "loongarch64": "loongarch-cpu",
}
# Where QEMU's name differs from libvirt's; QEMU also has a dash wherever libvirt has an underscore.
_RENAMED: Final = {"pclmuldq": "pclmulqdq"}
# libvirt has names for these, and QEMU no switches: they follow from other features, or QEMU never had them.
_NO_SWITCH: Final = frozenset({"osxsave", "ospke", "cmt", "mbm_total", "mbm_local"})

_WITHOUT_HOTPLUG: Final = ("microvm", "none")
_UNTOLD: Final = {
    CPU_MODEL: "its CPU model: unless you give one, -cpu is the default of libvirt or QEMU",
    CPU_FEATURES: "which features were requested besides the CPU model: give -cpu as it was",
    IOMMU: "whether it has an IOMMU, which libvirt requires with eim='on' for so many vCPUs: give its -device",
}
_MIB: Final = 1024 * 1024
# libvirt rounds a cell's memory to MiB, and on ppc64 to 256 MiB, the block size of such a guest's memory.
_CELL_MIB: Final = 1
_CELL_MIB_PPC64: Final = 256
# Older machine types have the memory of all cells in one block: a memory-backend object each would be another VM.
_FIRST_WITH_MEMDEV: Final = (5, 1)


@dataclass(frozen=True, slots=True)
class LaunchArguments:
    """What to give a new QEMU so that it has the same vCPUs, created in the same order.

    Attributes:
        smp: The value of ``-smp``: how many vCPUs QEMU starts with, the maximum, and the topology.
        cpu: The value of ``-cpu``, or None: QEMU's default.
        numa: The cells: for each ``-object`` and its memory, ``-numa`` and its vCPUs.
        memory_mib: What ``-m`` must be if there are cells: their sum, in MiB. None if there are none.
        device_add: The vCPUs that QEMU does not start with, in order: the arguments of ``device_add``, each with
            ``driver``, ``id``, and its place.
        unknown: What is not known, and what follows from that: one sentence each.
    """

    smp: str
    cpu: str | None = None
    numa: tuple[str, ...] = ()
    memory_mib: int | None = None
    device_add: tuple[Device, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        """All of it for a command line, in libvirt's order: ``-cpu``, ``-smp``, the cells, a ``-device`` each."""
        return [*self.boot_argv, *self.device_argv]

    @property
    def boot_argv(self) -> list[str]:
        """The machine without its plugged vCPUs; for ``-S`` or ``-incoming``, with ``replay`` or ``device_add``."""
        cpu = [] if self.cpu is None else ["-cpu", self.cpu]
        return [*cpu, "-smp", self.smp, *self.numa]

    @property
    def device_argv(self) -> list[str]:
        """The plugged vCPUs as ``-device`` arguments; QEMU creates them in this order."""
        return [word for device in self.device_add for word in ("-device", _as_option(device))]


def arguments(source: DomainVcpus | Layout, *, cpu: str | None = None) -> LaunchArguments:
    """Return the arguments of a new QEMU that has the vCPUs of *source*, created in the same order.

    For a domain they are what libvirt gives QEMU: ``-smp`` counts the vCPUs that are on and not hotpluggable; all
    others that are on are plugged by ``order``, as ``vcpuN``, before the guest runs. For a layout, ``render``'s rule
    separates the two kinds, and places and types are QEMU's own. For a record they are what the VM is next started
    with (``domainxml.start_of``), not what it has now.

    ``-machine``, ``-accel``, ``-m`` and everything that does not concern vCPUs is left to the caller.

    Args:
        source: What ``parse`` read from a document, or the layout of a running VM.
        cpu: The value of ``-cpu`` where *source* cannot say it, such as ``EPYC-Milan,x2apic=on``; for a domain its
            model also names the type of the plugged vCPUs.

    Raises:
        DomainXmlError: QEMU cannot be started with the domain: the vCPUs to start with are not the first ones, or the
            topology does not multiply to the maximum, or it asks for the host's CPU without KVM; or names that cannot
            be a CPU model's, type's or feature's.
    Source:
        libvirt src/qemu/qemu_command.c, qemuBuildSmpCommandLine, qemuBuildCpuCommandLine,
        qemuBuildNumaCommandLine; src/qemu/qemu_process.c, qemuProcessSetupHotpluggableVcpus.

    Example:
        >>> from qmpvcpu.domainxml import parse
        >>> arguments(parse(b"<domain type='kvm'><name>a</name><vcpu current='2'>4</vcpu></domain>")).argv
        ['-cpu', 'qemu64', '-smp', '2,maxcpus=4,sockets=4,cores=1,threads=1']
    """
    if isinstance(source, Layout):
        return _of_layout(source, cpu)
    if not isinstance(source, DomainVcpus):
        raise TypeError(
            f"arguments() takes a layout, or what parse() reads from a document, not {type(source).__name__}"
        )
    return _of_domain(start_of(source), cpu)


# From a domain.


def _of_domain(domain: DomainVcpus, given_cpu: str | None) -> LaunchArguments:
    started_with = domain.started_with
    if started_with != VcpuMap(range(len(started_with))) or not started_with:
        raise DomainXmlError(
            f"QEMU can only start with the first vCPUs, and this domain would start with {started_with or 'none'}: a"
            " vCPU that is on and hotpluggable='no' follows one that is not, and libvirt would refuse to start it"
        )
    topology = domain.topology or Topology(domain.max, sockets=domain.max)
    size = prod(getattr(topology, level) for level in SMP_LEVELS)
    if size != domain.max:
        raise DomainXmlError(f"<topology> has {counted(size, 'vCPU')}, and <vcpu> has {domain.max}")
    if domain.numa and not any(cell.memory_kib for cell in domain.numa):
        raise DomainXmlError("no cell of <numa> has memory, and QEMU requires that theirs is all of the VM's")
    cpu = _cpu(domain) if given_cpu is None else given_cpu
    cpu_type = _TYPES.get(domain.target or "")
    driver = None if cpu is None or cpu_type is None else _checked_type(f"{cpu.partition(',')[0]}-{cpu_type}")
    not_placed = _why_not_placed(domain, cpu)
    return LaunchArguments(
        smp=_smp(len(started_with), topology, dies=domain.topology is not None),
        cpu=cpu,
        numa=tuple(word for cell in domain.numa for word in _cell(cell, _cell_mib(cell, domain))),
        memory_mib=sum(_cell_mib(cell, domain) for cell in domain.numa) if domain.numa else None,
        device_add=tuple(
            {"driver": driver or "", "id": f"vcpu{each}", **_place(each, domain, topology)}
            for each in domain.order
            if not_placed is None
        ),
        unknown=tuple(_unknown_of_domain(domain, not_placed, cpu, given_cpu)),
    )


def _place(vcpu: int, domain: DomainVcpus, topology: Topology) -> dict[str, int]:
    """Return where *vcpu* goes: threads count fastest, then cores, modules, dies and sockets.

    Source: QEMU hw/i386/x86.c, x86_possible_cpu_arch_ids; hw/s390x/s390-virtio-ccw.c, s390_possible_cpu_arch_ids;
    the slots that 83 recorded QEMUs listed.
    """
    if domain.target == "s390x":
        return {"core-id": vcpu}
    rest, thread = divmod(vcpu, topology.threads)
    rest, core = divmod(rest, topology.cores)
    rest, module = divmod(rest, topology.modules)
    socket, die = divmod(rest, topology.dies)
    place = {"socket-id": socket}
    if topology.dies > 1:
        place["die-id"] = die
    if topology.modules > 1:
        place["module-id"] = module
    place |= {"core-id": core, "thread-id": thread}
    if domain.numa:
        place["node-id"] = next((cell.id for cell in domain.numa if vcpu in cell.cpus), domain.numa[0].id)
    return place


def _why_not_placed(domain: DomainVcpus, cpu: str | None) -> str | None:
    """Return why the ``device_add`` arguments cannot be known, or None."""
    machine = domain.machine or ""
    if domain.has_cores:
        return (
            "which type of CPU device_add takes on pseries depends on the QEMU (such as power9_v2.0-spapr-cpu-core):"
            " only QEMU knows it, and replay asks it"
        )
    if domain.target is None:
        return (
            f"the CPUs of {domain.emulator} have other types if it is a qemu-system-x86_64 than if it is a"
            " qemu-system-i386: replay asks it"
        )
    if domain.target not in _TYPES or machine.startswith(_WITHOUT_HOTPLUG):
        return f"QEMU cannot plug vCPUs into machine {machine or 'none named'} of {domain.target}"
    if cpu is None:
        return "without a CPU model the type that device_add takes is not known: replay asks QEMU"
    return None


def _unknown_of_domain(
    domain: DomainVcpus, not_placed: str | None, cpu: str | None, given_cpu: str | None
) -> Iterator[str]:
    yield from _assumed(domain)
    if cpu is None and domain.cpu_options:
        yield f"-cpu is left to QEMU, and the document asks for more than a model: {','.join(domain.cpu_options)}"
    if domain.order and not_placed is not None:
        yield f"{not_placed}; vCPUs {','.join(map(str, domain.order))} are to be plugged in this order"
    for what in domain.untold if given_cpu is None else set(domain.untold) & {IOMMU}:
        yield f"the document was written from a running VM, and QEMU did not report {_UNTOLD[what]}"
    if given_cpu is None and domain.cpu is not None:
        if domain.cpu.mode == "host-model":
            yield (
                "libvirt derives host-model from the host's CPU, so that other hosts have it too: here -cpu"
                f" {_host(domain)} stands for it; give the model and flags that libvirt used, and that a migration"
                " needs"
            )
        optional = [name for name, policy in domain.cpu.features.items() if policy == "optional"]
        if optional:
            yield f"whether the host has {', '.join(optional)}: libvirt requests an optional feature only then"
    if domain.unread:
        more = ", ".join(domain.unread)
        yield f"left out here, although libvirt makes arguments of it: {more}; add these yourself if they matter"
    if domain.numa and _is_old(domain.machine):
        yield f"how machine {domain.machine} lays out its cells: libvirt gives such an old one -numa node,mem="


def _assumed(domain: DomainVcpus) -> Iterator[str]:
    if domain.arch is None:
        yield "the document names no architecture, and libvirt would use the host's: assumed to be x86_64"
    if domain.arch == "i686" and domain.emulator is None:
        yield (
            "the document names no emulator, and libvirt would use qemu-system-i386 if the host has it: assumed; the"
            " CPUs of qemu-system-x86_64 have other types"
        )


def _is_old(machine: str | None) -> bool:
    version = re.search(r"-(\d+)\.(\d+)$", machine or "")
    return version is not None and (int(version[1]), int(version[2])) < _FIRST_WITH_MEMDEV


def _cell(cell: NumaCell, mib: int) -> list[str]:
    name = f"ram-node{cell.id}"
    memory = {"qom-type": "memory-backend-ram", "id": name, "size": mib * _MIB}
    cpus = [f"cpus={part}" for part in str(cell.cpus).split(",") if part]
    node = ",".join(["node", f"nodeid={cell.id}", *cpus])
    if not mib:  # QEMU takes no object of size 0, which libvirt 9.0.0 would give it
        return ["-numa", node]
    return ["-object", json.dumps(memory, separators=(",", ":")), "-numa", f"{node},memdev={name}"]


def _cell_mib(cell: NumaCell, domain: DomainVcpus) -> int:
    block = _CELL_MIB_PPC64 if domain.arch in {"ppc64", "ppc64le"} else _CELL_MIB
    return -(-cell.memory_kib // (block * 1024)) * block


# The CPU model of a domain.


def _cpu(domain: DomainVcpus) -> str | None:
    """Return the value of ``-cpu``, or None where QEMU chooses.

    Raises:
        DomainXmlError: A name in it cannot be one, or libvirt has no such mode or policy, or would not start it.
    """
    model = domain.cpu or CpuModel("custom")
    if model.mode not in MODES:
        raise DomainXmlError(f"<cpu mode={shorten(model.mode)}>: libvirt has no such mode")
    if needs_kvm(model) and domain.type != "kvm":
        raise DomainXmlError(
            "<cpu mode='host-passthrough'> needs KVM, and the domain is of type='qemu': libvirt would refuse to start"
            " it; 'maximum' is the nearest to it without KVM, or give -cpu as it should be"
        )
    name = _host(domain) if model.mode == "host-model" else qemu_model(domain)
    if name is None:
        return None
    if not is_word(name):
        raise DomainXmlError(f"<model>: {shorten(name)} cannot be a QEMU CPU model")
    vendor = [] if model.vendor_id is None else [f"vendor={model.vendor_id}"]
    words = (*vendor, *_migratable(model, domain.target), *_features(model, domain.arch), *domain.cpu_options)
    for word in words:
        if "," in word:
            raise DomainXmlError(f"{shorten(word)} cannot be a word of -cpu: it has a comma")
    return ",".join((name, *words))


def _host(domain: DomainVcpus) -> str:
    return "host" if domain.type == "kvm" else "max"


def _migratable(model: CpuModel, target: str | None) -> Iterator[str]:
    # libvirt leaves it to QEMU elsewhere, whose default is the same.
    said = model.migratable or ("on" if model.mode == "host-passthrough" else None)
    if target == "x86_64" and said is not None and model.mode in MODES_WITHOUT_MODEL:
        yield f"migratable={said}"


def _features(model: CpuModel, arch: str | None) -> Iterator[str]:
    for name, policy in model.features.items():
        switch = SWITCHES.get(policy)
        if switch is None:
            raise DomainXmlError(f"<feature policy={shorten(policy)}>: libvirt has no such policy")
        if not is_word(name):
            raise DomainXmlError(f"<feature>: {shorten(name)} cannot be a QEMU CPU feature")
        if arch not in (*X86, None):
            yield f"{name}={switch}"
        elif name not in _NO_SWITCH:
            yield f"{_RENAMED.get(name, name).replace('_', '-')}={switch}"


# From a layout.


def _of_layout(layout: Layout, given_cpu: str | None) -> LaunchArguments:
    started_with = layout.started_with
    later = [layout.slot_of(first) for first in layout.creation if first not in started_with]
    topology = layout.vm.topology
    for slot in layout.slots[:1]:
        if slot.type:
            _checked_type(slot.type)
    model = running_model(layout)
    return LaunchArguments(
        smp=_smp(len(started_with), topology) if topology else f"{len(started_with)},maxcpus={layout.max}",
        cpu=given_cpu or model,
        device_add=tuple(qapi.device_add(slot) for slot in later if _checked_type(slot.type)),
        unknown=tuple(_unknown_of_layout(layout, given_cpu, model)),
    )


def _unknown_of_layout(layout: Layout, given_cpu: str | None, model: str | None) -> Iterator[str]:
    if layout.vm.topology is None:
        yield "QEMU did not report its CPU topology: -smp leaves it to the new QEMU, whose slots may differ"
    if given_cpu is None:
        what = "its CPU model" if model is None else f"which features were requested besides the model {model}"
        yield f"QEMU does not report {what}"
    nodes = sorted({node for slot in layout.slots if (node := slot.props.number("node-id")) is not None})
    if len(nodes) > 1:
        cells = ", ".join(f"{node} of vCPUs {_in_node(layout, node)}" for node in nodes)
        yield (
            f"QEMU does not report the memory of its NUMA cells ({cells}), which -numa needs: use the arguments of a"
            " document that has them"
        )


def _in_node(layout: Layout, node: int) -> VcpuMap:
    inside = (slot for slot in layout.slots if slot.props.number("node-id") == node)
    return union(slot.ids for slot in inside)


# For both.


def _smp(count: int, topology: Topology, *, dies: bool = True) -> str:
    parts = [str(count), *([f"maxcpus={topology.max_cpus}"] if count < topology.max_cpus else [])]
    for level in SMP_LEVELS:
        size = getattr(topology, level)
        always = level in {"sockets", "cores", "threads"} or (level == "dies" and dies)
        if always or size > 1:
            parts.append(f"{level}={size}")
    return ",".join(parts)


def _as_option(device: Device) -> str:
    driver, *rest = device.items()
    return ",".join([str(driver[1]), *(f"{name}={value}" for name, value in rest)])


def _checked_type(cpu_type: str) -> str:
    """Return *cpu_type*, which is about to be an argument.

    Raises:
        DomainXmlError: It cannot be a CPU's type.
    """
    if not is_cpu_type(cpu_type):
        raise DomainXmlError(f"{shorten(cpu_type)} cannot be the type of a QEMU CPU")
    return cpu_type
