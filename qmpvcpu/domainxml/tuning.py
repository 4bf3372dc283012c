"""``<cputune>``: pins and schedulers, edited in place."""

from bisect import bisect
from collections.abc import Sequence

from lxml import etree

from qmpvcpu.domainxml.domain import DomainVcpus, VcpuSched
from qmpvcpu.domainxml.editing import Editor
from qmpvcpu.domainxml.fields import Fields
from qmpvcpu.domainxml.nodes import Node
from qmpvcpu.model.vcpumap import VcpuMap

# As libvirt prints them.
_CHILDREN = (
    *("shares", "period", "quota", "global_period", "global_quota", "emulator_period", "emulator_quota"),
    *("iothread_period", "iothread_quota", "vcpupin", "emulatorpin", "iothreadpin", "vcpusched"),
)

_WITH_PRIORITY = ("fifo", "rr")
_Scheduler = tuple[str, int | None]


def update_tuning(editor: Editor, said: DomainVcpus, domain: DomainVcpus, *, after: Sequence[str]) -> None:
    """Have ``<cputune>`` say what *domain* says of pins and schedulers.

    Args:
        editor: Of the document.
        said: What it says.
        domain: What it is to say.
        after: What stands before ``<cputune>``, if that is new.
    """
    new = [
        *_update_pins(editor, said, domain),
        *_update_emulator_pin(editor, said, domain),
        *_update_scheds(editor, said, domain),
    ]
    holder = editor.root.find("cputune")
    if holder is None:
        if new:
            editor.insert(editor.root, Node("cputune", content=tuple(new)), after=after)
        return
    pins = {int(pin.get("vcpu", "")): pin for pin in holder.iterfind("vcpupin")}
    sorted_pins = sorted(pins)
    for node in new:
        # Behind the pin of the vCPU before it, as libvirt sorts them.
        lower = bisect(sorted_pins, int(str(node.attributes["vcpu"]))) if node.tag == "vcpupin" else 0
        if lower:
            editor.insert_after(pins[sorted_pins[lower - 1]], node)
        else:
            behind = _CHILDREN[: _CHILDREN.index(node.tag) + (node.tag != "vcpupin")]
            editor.insert(holder, node, after=behind)


def _update_pins(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    missing = dict(domain.pins)
    for pin in editor.root.iterfind("cputune/vcpupin"):
        vcpu = int(pin.get("vcpu", ""))
        wanted = missing.pop(vcpu, None)
        if wanted is None:
            # libvirt drops the pin of a vCPU that cannot be; when it can, it must not come alive.
            if vcpu in said.pins or vcpu < domain.max:
                editor.remove(pin)
        elif wanted != Fields().cpuset(pin, "cpuset"):
            editor.set_attributes(pin, {"cpuset": str(wanted)}, order=("vcpu", "cpuset"))
    return [Node("vcpupin", {"vcpu": vcpu, "cpuset": cpus}) for vcpu, cpus in sorted(missing.items())]


def _update_emulator_pin(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    if domain.emulator_pin == said.emulator_pin:
        return []
    element = editor.root.find("cputune/emulatorpin")
    if element is None:
        return [Node("emulatorpin", {"cpuset": domain.emulator_pin})]
    if domain.emulator_pin is None:
        editor.remove(element)
    else:
        editor.set_attributes(element, {"cpuset": str(domain.emulator_pin)}, order=("cpuset",))
    return []


def _update_scheds(editor: Editor, said: DomainVcpus, domain: DomainVcpus) -> list[Node]:
    wanted = by_vcpu(domain.scheds)
    if wanted == by_vcpu(said.scheds):
        return []
    for element in editor.root.iterfind("cputune/vcpusched"):
        scheduler = _scheduler(element)
        named = Fields().cpuset(element, "vcpus") or VcpuMap()
        kept = VcpuMap(each for each in named if wanted.get(each) == scheduler)
        for each in kept:
            del wanted[each]
        if not kept:
            editor.remove(element)
        elif kept != named:
            editor.set_attributes(element, {"vcpus": str(kept)}, order=("vcpus",))
    groups: dict[_Scheduler, list[int]] = {}
    for vcpu, scheduler in sorted(wanted.items()):
        groups.setdefault(scheduler, []).append(vcpu)
    return [
        Node(
            "vcpusched",
            {"vcpus": VcpuMap(vcpus), "scheduler": scheduler} | ({} if priority is None else {"priority": priority}),
        )
        for (scheduler, priority), vcpus in groups.items()
    ]


def by_vcpu(scheds: Sequence[VcpuSched]) -> dict[int, _Scheduler]:
    """Return the scheduler and the priority of each vCPU that has one."""
    return {vcpu: (each.scheduler, each.priority) for each in scheds for vcpu in each.vcpus}


def _scheduler(element: etree._Element) -> _Scheduler:
    scheduler = element.get("scheduler", "")
    return scheduler, Fields().integer(element, "priority") if scheduler in _WITH_PRIORITY else None
