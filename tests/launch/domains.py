"""Domains to launch: values as parse() makes them, and the states that are hard to rebuild."""

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from qmpvcpu.domainxml import DomainVcpu, DomainVcpus, NumaCell
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology

EIGHT = Topology(8, sockets=2, cores=2, threads=2)
DIES = Topology(8, sockets=1, dies=2, cores=2, threads=2)
CELLS = (NumaCell(0, VcpuMap.parse("0-3"), 32768), NumaCell(1, VcpuMap.parse("4-7"), 32768))
INTERLEAVED = (
    NumaCell(0, VcpuMap.parse("0,2,4,6"), 16384),
    NumaCell(1, VcpuMap.parse("1,3,5,7"), 32768),
    NumaCell(2, VcpuMap(), 16384),
)


def domain_of(most: int, boot: int, later: Sequence[int] = (), **said: Any) -> DomainVcpus:
    """A domain that starts with the first *boot* of *most* vCPUs, and has *later* plugged, in this order."""
    order = {**{each: each + 1 for each in range(boot)}, **{each: boot + n for n, each in enumerate(later, start=1)}}
    rows = tuple(DomainVcpu(each, each in order, each >= boot, order.get(each)) for each in range(most))
    values: dict[str, Any] = {
        "name": "vm",
        "uuid": None,
        "type": "qemu",
        "arch": "x86_64",
        "machine": "q35",
        "emulator": None,
        "memory_kib": 65536,
        "vcpus": rows,
        "individual": True,
    }
    return DomainVcpus(**(values | said))


# By name: what the state came from, as far as it shows in the document.
STATES: Mapping[str, DomainVcpus] = {
    "all at boot": domain_of(8, 8, topology=EIGHT),
    "one of many": domain_of(8, 1),
    "holes": domain_of(8, 2, [4, 7], topology=EIGHT),
    "plugged backwards": domain_of(8, 1, [7, 6, 5, 4, 3, 2, 1], topology=EIGHT),
    "plugged again": domain_of(8, 3, [4, 5, 3], topology=EIGHT),
    "a boot vCPU left": domain_of(8, 1, [2, 3], topology=EIGHT),
    "a boot vCPU left and came back": domain_of(8, 1, [2, 3, 1], topology=EIGHT),
    "half of the cores": domain_of(8, 3, [5], topology=EIGHT),
    "one socket": domain_of(8, 1, [6, 2], topology=Topology(8, cores=8)),
    "dies": domain_of(8, 1, [6, 3], topology=DIES),
    "cells": domain_of(8, 1, [6, 3], topology=EIGHT, numa=CELLS),
    "cells without a topology": domain_of(8, 2, [4, 3], numa=CELLS),
    "cells that interleave": domain_of(8, 1, [5, 4, 7], topology=EIGHT, numa=INTERLEAVED),
    "cells and dies": domain_of(8, 2, [7, 2], topology=DIES, numa=CELLS),
    "three threads": domain_of(12, 4, [11, 5, 6], topology=Topology(12, sockets=2, cores=2, threads=3)),
}


@st.composite
def domains(draw: st.DrawFn) -> DomainVcpus:
    """Any state that libvirt can say, on any topology, with or without cells."""
    levels = {
        level: draw(st.integers(1, most))
        for level, most in {"sockets": 4, "dies": 2, "cores": 4, "threads": 3}.items()
    }
    most = levels["sockets"] * levels["dies"] * levels["cores"] * levels["threads"]
    boot = draw(st.integers(1, most))
    later = draw(st.lists(st.integers(boot, most - 1), unique=True)) if boot < most else []
    cells = draw(st.integers(0, 3))
    inside = draw(st.lists(st.integers(0, max(0, cells - 1)), min_size=most, max_size=most))
    return domain_of(
        most,
        boot,
        later,
        topology=draw(st.sampled_from([None, Topology(most, **levels)])),
        numa=tuple(
            NumaCell(cell, VcpuMap(each for each in range(most) if inside[each] == cell), 16384 * (cell + 1))
            for cell in range(cells)
        ),
    )


def document_of(domain: DomainVcpus, *, said: str = "", cpu: str = "") -> bytes:
    """Return *domain* as a document that libvirt takes; its ``<cpu>`` has the attributes *said*, and *cpu* inside."""

    def yes(truth: bool) -> str:
        return "yes" if truth else "no"

    rows = "".join(
        f"<vcpu id='{each.id}' enabled='{yes(each.enabled)}' hotpluggable='{yes(each.hotpluggable)}'"
        + (f" order='{each.order}'/>" if each.order else "/>")
        for each in domain.vcpus
    )
    if domain.topology is not None:
        levels = ("sockets", "dies", "cores", "threads")
        sizes = "".join(f" {level}='{getattr(domain.topology, level)}'" for level in levels)
        cpu += f"<topology{sizes}/>"
    if domain.numa:
        cells = (
            f"<cell id='{cell.id}' memory='{cell.memory_kib}'" + (f" cpus='{cell.cpus}'/>" if cell.cpus else "/>")
            for cell in domain.numa
        )
        cpu += f"<numa>{''.join(cells)}</numa>"
    memory = sum(cell.memory_kib for cell in domain.numa) or domain.memory_kib
    emulator = f"<emulator>{domain.emulator}</emulator>" if domain.emulator else ""
    return (
        f"<domain type='{domain.type}'><name>{domain.name}</name><memory unit='KiB'>{memory}</memory>"
        f"<vcpu>{domain.max}</vcpu><vcpus>{rows}</vcpus>"
        f"<os><type arch='{domain.arch}' machine='{domain.machine}'>hvm</type></os><features><acpi/></features>"
        f"<cpu{said}>{cpu}</cpu>"
        f"<devices>{emulator}</devices></domain>"
    ).encode()
