"""Domains in a few characters, and as documents, for the tests of what is changed in them.

One character a vCPU: ``0`` QEMU starts with it, ``+`` it is plugged before the guest runs, a letter from ``b`` on: so
too, as the second, third, ... of all, ``-`` it is off.
"""

from dataclasses import replace
from typing import Any
from xml.sax.saxutils import quoteattr

from hypothesis import strategies as st

from qmpvcpu.domainxml import DomainVcpu, DomainVcpus, NumaCell, validate
from qmpvcpu.domainxml.domainrule import DomainRule
from qmpvcpu.model.vcpumap import VcpuMap

_ORDERED = "abcdefghijklmnopqrstuvwxyz"


def domain_of_rows(rows: str, **more: Any) -> DomainVcpus:
    """Return a domain with vCPUs as *rows* say, and what else is given."""
    orders = {each: 1 + _ORDERED.index(row) for each, row in enumerate(rows) if row in _ORDERED}
    if orders:
        boot = [each for each, row in enumerate(rows) if row == "0"]
        orders |= {each: place for place, each in enumerate(boot, start=1)}
    vcpus = tuple(DomainVcpu(each, row != "-", row != "0", orders.get(each)) for each, row in enumerate(rows))
    given: dict[str, Any] = {
        "name": "vm",
        "uuid": None,
        "type": "qemu",
        "arch": "x86_64",
        "machine": "q35",
        "emulator": None,
        "memory_kib": 65536,
        "individual": rows.strip("0").strip("-") != "",
    }
    return DomainVcpus(vcpus=vcpus, **(given | more))


def said(domain: DomainVcpus) -> str:
    """Return a domain's vCPUs as ``domain_of_rows`` takes them."""
    return "".join(
        "-" if not row.enabled else "0" if not row.hotpluggable else _ORDERED[row.order - 1] if row.order else "+"
        for row in domain.vcpus
    )


def started(domain: DomainVcpus) -> tuple[int, ...]:
    """Return the vCPUs of the VM that is started from it, in the order of their creation."""
    return (*domain.started_with, *domain.order)


def document(domain: DomainVcpus) -> bytes:
    """Return a document that says this, as libvirt prints it."""
    count = "" if domain.current == domain.max else f" current='{domain.current}'"
    lines = ["<domain type='qemu'>", f"<name>{domain.name}</name>"]
    lines += [f"<uuid>{domain.uuid}</uuid>"] if domain.uuid else []
    lines += [f"<memory unit='KiB'>{domain.memory_kib}</memory>"]
    lines += [f"<vcpu placement='static'{count}>{domain.max}</vcpu>"]
    if domain.individual:
        words = {True: "yes", False: "no"}
        lines += ["<vcpus>"]
        for row in domain.vcpus:
            order = f" order='{row.order}'" if row.order else ""
            state = f"enabled='{words[row.enabled]}' hotpluggable='{words[row.hotpluggable]}'"
            lines += [f"<vcpu id='{row.id}' {state}{order}/>"]
        lines += ["</vcpus>"]
    if domain.pins or domain.scheds:
        lines += ["<cputune>"]
        lines += [f"<vcpupin vcpu='{vcpu}' cpuset='{pin}'/>" for vcpu, pin in domain.pins.items()]
        lines += [f"<vcpusched vcpus='{vcpu}' scheduler='{each.scheduler}'/>" for vcpu, each in domain.scheds.items()]
        lines += ["</cputune>"]
    lines += [f"<os><type arch='{domain.arch}' machine='{domain.machine}'>hvm</type></os>"]
    lines += ["<features><acpi/></features>"]
    if domain.topology is not None or domain.numa:
        lines += ["<cpu>"]
        if domain.topology is not None:
            levels = {each: getattr(domain.topology, each) for each in ("sockets", "dies", "cores", "threads")}
            lines += ["<topology" + "".join(f" {each}='{value}'" for each, value in levels.items()) + "/>"]
        if domain.numa:
            lines += ["<numa>"]
            lines += [
                f"<cell id='{cell.id}' cpus='{cell.cpus}' memory='{cell.memory_kib}' unit='KiB'/>"
                for cell in domain.numa
            ]
            lines += ["</numa>"]
        lines += ["</cpu>"]
    if domain.emulator is not None:
        lines += [f"<devices><emulator>{quoteattr(domain.emulator)[1:-1]}</emulator></devices>"]
    lines += ["</domain>"]
    return "\n".join(lines).encode()


def broken(domain: DomainVcpus) -> list[DomainRule]:
    """Return the rules of libvirt's that it breaks, at define or at start."""
    return [error.rule for error in validate(document(domain))]


@st.composite
def domains(draw: st.DrawFn) -> DomainVcpus:
    """Whatever libvirt defines and starts: with or without orders, holes, cells."""
    most = draw(st.integers(1, 9))
    boot = draw(st.integers(1, most))
    rest = draw(st.permutations(range(boot + 1, most)))
    late = rest[: draw(st.integers(0, len(rest)))]
    orders = draw(st.booleans())
    place = {each: boot + 1 + number for number, each in enumerate(late)} | {each: each + 1 for each in range(boot)}
    rows = tuple(
        DomainVcpu(each, each in place, each >= boot, place.get(each) if orders else None) for each in range(most)
    )
    numa = (NumaCell(0, VcpuMap(range(most)), 65536),) if draw(st.booleans()) else ()
    return replace(domain_of_rows("0"), vcpus=rows, individual=bool(late) or orders or draw(st.booleans()), numa=numa)
