"""Layouts to render, and what libvirt makes of what comes out."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from lxml import etree

from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vm import Topology, VmInfo
from tests.captures import Capture, all_captures
from tests.layouts import layout

GOLDEN = Path(__file__).parents[2] / "fixtures" / "domains"
LEVELS = ("sockets", "dies", "clusters", "modules", "cores", "threads", "drawers", "books")
Q35 = VmInfo(
    name="vm", arch="x86_64", machine="pc-q35-7.2", accelerator="tcg", qemu_version=(7, 2, 22), memory_kib=65536
)
PSERIES = replace(Q35, arch="ppc64", machine="pseries-7.2")


def captured_layouts() -> Iterator[tuple[str, Layout]]:
    """Every layout of every capture, with the VM as its command line describes it."""
    for capture in all_captures():
        vm = _vm_of(capture)
        for number, captured in enumerate(capture.layouts()):
            yield f"{capture.name}-{number}", replace(captured, vm=vm)


def _vm_of(capture: Capture) -> VmInfo:
    argv = capture.data["argv"]
    options = dict(pairwise(argv))
    version = capture.data["greeting"]["QMP"]["version"]["qemu"]
    return VmInfo(
        name=capture.name,
        arch=capture.arch,
        machine=capture.data["query-machines-entry"][0]["name"],
        accelerator="tcg",
        qemu_version=(version["major"], version["minor"], version["micro"]),
        memory_kib=int(options["-m"]) * 1024,
        topology=_topology_of(options["-smp"]),
    )


def _topology_of(smp: str) -> Topology:
    first, *rest = smp.split(",")
    given = {key: int(value) for key, value in (part.split("=") for part in rest)}
    most = given.pop("maxcpus", int(first))
    product = 1
    for level in given.values():
        product *= level
    # As QEMU does since 6.2: what is not given is cores.
    given.setdefault("cores", max(1, most // product))
    return Topology(max_cpus=most, **given)


def layout_of(
    slots: int, created: Sequence[int], *, boot: int, count: int = 1, vm: VmInfo = Q35, foreign: Sequence[int] = ()
) -> Layout:
    """Return a layout of *slots* slots, of which the numbers *created* are plugged, in this order.

    The first *boot* that were created are boot CPUs; those in *foreign* have ids that are not libvirt's.
    """
    plugged = {
        number * count: "boot" if place < boot else "other" if number in foreign else "ours"
        for place, number in enumerate(created)
    }
    return layout(plugged, slots=slots, count=count, vm=vm)


def vcpu_rows(xml: bytes) -> list[tuple[str, ...]]:
    """Return the rows of ``<vcpus>`` as (id, enabled, hotpluggable, order), an order that is absent as ""."""
    rows = etree.fromstring(xml).iterfind("vcpus/vcpu")
    return [tuple(row.get(key) or "" for key in ("id", "enabled", "hotpluggable", "order")) for row in rows]


def started_by_libvirt(xml: bytes, *, group: int = 1) -> list[int]:
    """Return the vCPUs of a VM that libvirt starts from *xml*, one per slot, in the order of their creation."""
    rows = [row for row in vcpu_rows(xml)[::group] if row[1] == "yes"]
    boot = [int(row[0]) for row in rows if row[2] == "no"]
    plugged = sorted((int(row[3]), int(row[0])) for row in rows if row[2] == "yes")
    return [number * group for number in range(len(boot))] + [each for _, each in plugged]
