"""Layouts to render, and libvirt's rules for what comes out, written down a second time."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from lxml import etree

from qmpvcpu.domainxml import DomainVcpus
from qmpvcpu.model import CpuProps, Layout, Slot, Topology, VmInfo
from tests.captures import Capture, all_captures

GOLDEN = Path(__file__).parents[2] / "fixtures" / "domains"
SAMPLES = {path.stem: path.read_bytes() for path in sorted((GOLDEN / "samples").glob("*.xml"))}
LEVELS = ("sockets", "dies", "clusters", "modules", "cores", "threads", "drawers", "books")
Q35 = VmInfo(
    name="vm", arch="x86_64", machine="pc-q35-7.2", accelerator="tcg", qemu_version=(7, 2, 22), memory_kib=65536
)


def captured_layouts() -> Iterator[tuple[str, Layout]]:
    """Every layout of every capture, with the VM as its command line describes it."""
    for capture in all_captures():
        vm = _vm_of(capture)
        for number, layout in enumerate(capture.layouts()):
            yield f"{capture.name}-{number}", replace(layout, vm=vm)


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
    paths = {}
    for place, number in enumerate(created):
        name = f"cpu-{number}" if number in foreign else f"vcpu{number * count}"
        paths[number] = f"/machine/unattached/device[{place}]" if place < boot else f"/machine/peripheral/{name}"
    made = tuple(
        Slot(
            first=number * count,
            count=count,
            type="qemu64-x86_64-cpu",
            props=CpuProps({"socket-id": number, "core-id": 0, "thread-id": 0}),
            cpu_index=number * count,
            qom_path=paths.get(number),
            host_tids=(None,) * count if number in paths else (),
        )
        for number in range(slots)
    )
    return Layout(vm=vm, slots=made, creation=tuple(number * count for number in created))


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
    return layout.with_slot(free[0].filled(free[0].new_qom_path)) if free else None


def one_unplugged(layout: Layout) -> Layout | None:
    """Return the layout once the slot that was filled last is empty; None if only vCPU 0 is there."""
    last = layout.slot_of(layout.creation[-1])
    return layout.with_slot(last.emptied()) if last.first else None


def complaints(xml: bytes, *, group: int = 1) -> list[str]:
    """Return what libvirt would say against the vCPUs of *xml*; empty if it would define and start it.

    Source: measured with libvirt 9.0.0 (``tests/libvirt`` holds these lists to it), for slots of *group* vCPUs.
    """
    return complaints_at_define(xml) + complaints_at_start(xml, group=group)


def complaints_at_define(xml: bytes) -> list[str]:
    """Return what libvirt would say when *xml* is defined; each with the words that libvirt has for it."""
    root = etree.fromstring(xml)
    rows, beyond = _rows(root)
    orders = [int(row.get("order", 0)) for row in rows]
    online = [row["enabled"] == "yes" for row in rows]
    said = ["is out of range of maximum vcpu count"] if beyond else []
    said += _complaints_about_the_first(rows[0], orders[0], on=online[0])
    if len({order == 0 for order, on in zip(orders, online, strict=True) if on}) > 1:
        said.append("all vcpus must have either set or unset order")
    for number in range(1, len(rows)):
        if rows[number].get("hotpluggable") == "no":
            if not online[number]:
                said.append("is both offline and not hotpluggable")
            if rows[number - 1].get("hotpluggable") == "yes":
                said.append("online non-hotpluggable vcpus need to be ordered prior to hotplugable vcpus")
            if orders[number - 1] > orders[number]:
                said.append("online non-hotpluggable vcpus must be ordered in ascending order")
    return said + _complaints_about_topology(root, len(rows))


def _rows(root: "etree._Element") -> tuple[list[dict[str, str]], bool]:
    """Return one row per possible vCPU, and whether there were more."""
    most = int(root.findtext("vcpu") or 0)
    given = {int(row.get("id") or -1): dict(row.attrib) for row in root.iterfind("vcpus/vcpu")}
    return [given.get(each, {"enabled": "no"}) for each in range(most)], any(each >= most for each in given)


def _complaints_about_the_first(row: dict[str, str], order: int, *, on: bool) -> list[str]:
    return [
        text
        for text, wrong in (
            ("vcpu 0 can't be offline", not on),
            ("vcpu0 can't be hotpluggable", row.get("hotpluggable") == "yes"),
            ("vcpu0 must be enabled first", order not in {0, 1}),
        )
        if wrong
    ]


def complaints_at_start(xml: bytes, *, group: int = 1) -> list[str]:
    """Return what libvirt would say when the domain is started."""
    rows, _ = _rows(etree.fromstring(xml))
    orders = [int(row.get("order", 0)) for row in rows]
    said = []
    entities = [order for order in orders[::group] if order]
    if len(set(entities)) < len(entities):
        said.append("duplicate vcpu order")
    if any(order > len(rows) for order in orders):
        said.append("exceeds vcpu count")
    slots = ([{**row, "id": ""} for row in rows[first : first + group]] for first in range(0, len(rows), group))
    said += [
        "are in the same hotplug group but differ in configuration"
        for slot in slots
        if any(row != slot[0] for row in slot)
    ]
    return said


def _complaints_about_topology(root: "etree._Element", most: int) -> list[str]:
    topology = root.find("cpu/topology")
    if topology is None:
        return []
    product = 1
    for level in ("sockets", "dies", "cores", "threads"):
        product *= int(topology.get(level) or 1)
    return [] if product == most else ["CPU topology doesn't match maximum vcpu count"]


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
