"""Documents to change, and what must be the same in them after that."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qmpvcpu.domainxml import NAMESPACE, DomainVcpu, DomainVcpus, parse, update
from qmpvcpu.domainxml.safe_xml import Span, find_spans, parse_safely
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vm import VmInfo
from tests.domainxml.examples import GOLDEN, layout_of
from tests.planning.situations import with_slot

SAMPLES = {path.stem: path.read_bytes() for path in sorted((GOLDEN / "samples").glob("*.xml"))}
OURS = f"{{{NAMESPACE}}}record"
VCPU = "  <vcpu placement='static' current='2'>4</vcpu>"


def started_from(domain: DomainVcpus) -> Layout:
    """Return the layout of a VM as libvirt starts it from a document that says *domain*."""
    cores = domain.topology is not None and domain.arch == "ppc64"
    group = domain.topology.threads if cores and domain.topology else 1
    boot = len(domain.started_with) // group
    created = [*range(boot), *dict.fromkeys(vcpu // group for vcpu in domain.order)]
    vm = VmInfo(
        name=domain.name,
        arch=domain.arch or "x86_64",
        machine=domain.machine or "pc",
        accelerator="kvm" if domain.type == "kvm" else "tcg",
        qemu_version=(10, 0, 2),
        uuid=domain.uuid,
        memory_kib=domain.memory_kib,
    )
    return layout_of(domain.max // group, created, boot=boot, count=group, vm=vm)


def one_plugged(layout: Layout) -> Layout | None:
    """Return the layout once its first free slot is filled; None if none is free."""
    free = [slot for slot in layout.slots if not slot.present]
    return with_slot(layout, free[0].filled(free[0].new_qom_path)) if free else None


def one_unplugged(layout: Layout) -> Layout | None:
    """Return the layout once the slot that was filled last is empty; None if only vCPU 0 is there."""
    last = layout.slot_of(layout.creation[-1])
    return with_slot(layout, last.emptied()) if last.first else None


def document(*elements: str, head: str = "<domain type='kvm'>", name: str = "  <name>vm</name>") -> bytes:
    return "\n".join([head, name, *elements, "</domain>", ""]).encode()


def states(text: str) -> tuple[DomainVcpu, ...]:
    """Return vCPUs from one letter each: b(oot), h(otplugged, in ascending order), - (off)."""
    on = [place for place, letter in enumerate(text) if letter != "-"]
    return tuple(
        DomainVcpu(place, letter != "-", letter != "b", on.index(place) + 1 if place in on else None)
        for place, letter in enumerate(text)
    )


def changed(base: bytes, **values: Any) -> str:
    """Return *base* after what it says is changed; it says so, and a second time changes nothing."""
    wanted = replace(parse(base), **values)
    result = update(base, wanted)
    assert_says(parse(result), wanted)
    assert update(result, wanted) == result
    return result.decode()


def assert_says(said: DomainVcpus, wanted: DomainVcpus) -> None:
    """Check that two values are the same, but for the numbers that say the same order."""
    assert replace(said, vcpus=(), individual=False) == replace(wanted, vcpus=(), individual=False)
    assert [(each.enabled, each.hotpluggable) for each in said.vcpus] == [
        (each.enabled, each.hotpluggable) for each in wanted.vcpus
    ]
    assert said.order == wanted.order


def inserted(before: bytes, after: str) -> list[str]:
    """Return the lines that were put in; every other line is as it was, in its place."""
    old = before.decode().split("\n")
    new = []
    for line in after.split("\n"):
        if old and line == old[0]:
            old.pop(0)
        else:
            new.append(line)
    assert not old
    return new


def ours(xml: bytes) -> Iterator[Span]:
    """Return where the elements are that a change of vCPUs may touch."""
    root = parse_safely(xml)
    spans = dict(zip(root.iter("*"), find_spans(xml), strict=True))
    for path in ("vcpu", "vcpus", "cputune", f"metadata/{OURS}"):
        yield from (spans[element] for element in root.iterfind(path))
    # One that holds nothing but ours was made for it, or may as well have been.
    for holder in root.iterfind("metadata"):
        if all(child.tag == OURS for child in holder):
            yield spans[holder]


def outside(xml: bytes) -> bytes:
    """Return a document without these elements, and without the margins that they stand behind."""
    hidden = bytearray(xml)
    for start, _, _, end in ours(xml):
        margin = re.search(rb"(\r\n|\n|\r)?[ \t]*\Z", xml[:start])
        assert margin
        hidden[margin.start() : end] = b"\0" * (end - margin.start())
    return bytes(hidden).replace(b"\0", b"")
