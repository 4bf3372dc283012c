"""Documents that break one rule each, and where: the parts of a small domain, each on a line of its own."""

from dataclasses import dataclass, field

from qmpvcpu.domainxml.domainrule import DomainRule as Rule
from qmpvcpu.domainxml.domainrule import RuleStage

PARTS = {
    "domain": "<domain type='qemu'>",
    "name": "<name>broken</name>",
    "uuid": "<uuid>0d5c9f0e-6f6d-4d0e-8f3a-0a4b1e0c7a12</uuid>",
    "memory": "<memory>65536</memory>",
    "vcpu": "<vcpu>4</vcpu>",
    "vcpus": "",
    "cputune": "",
    "os": "<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>",
    "cpu": "",
    "rest": "<features><acpi/></features>",
}
KVM = "<domain type='kvm'>"
PSERIES = "<os><type arch='ppc64' machine='pseries-7.2'>hvm</type></os>"
PC = "<os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type></os>"
MICROVM = "<os><type arch='x86_64' machine='microvm'>hvm</type></os>"
S390 = "<os><type arch='s390x' machine='s390-ccw-virtio-7.2'>hvm</type></os>"
CORES_OF_4 = "<cpu><topology sockets='1' cores='2' threads='4'/></cpu>"
EIM = "<devices><iommu model='intel'><driver intremap='on' eim='off'/></iommu></devices>"


def document(**parts: str) -> bytes:
    """Return a domain with some parts as given; one of no text leaves an empty line."""
    return "\n".join([*{**PARTS, **parts}.values(), "</domain>", ""]).encode()


def rows(*attributes: str) -> str:
    """Return ``<vcpus>`` of vCPUs 0, 1, ..., each with these attributes beside its id."""
    return "<vcpus>" + "".join(f"<vcpu id='{each}' {given}/>" for each, given in enumerate(attributes)) + "</vcpus>"


@dataclass(frozen=True)
class Broken:
    """A document, the rule that it breaks, and where."""

    rule: Rule
    parts: dict[str, str]
    element: str
    attribute: str | None
    value: str | None
    line: int
    stage: RuleStage = RuleStage.DEFINE
    xml: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "xml", document(**self.parts))


def _broken(rule: Rule, place: str, value: str | None, *, start: bool = False, **parts: str) -> Broken:
    """*place* is an element, an attribute after ``@``, and the line if it is not that of the first part given."""
    element, _, attribute = place.partition("@")
    line = list(PARTS).index(next(iter(parts))) + 1
    stage = RuleStage.START if start else RuleStage.DEFINE
    return Broken(rule, parts, element, attribute or None, value, line, stage)


def _topology(**levels: object) -> str:
    return "<cpu><topology" + "".join(f" {level}='{value}'" for level, value in levels.items()) + "/></cpu>"


def _numa(*cells: str) -> str:
    return "<cpu><numa>" + "".join(f"<cell {each}/>" for each in cells) + "</numa></cpu>"


def _distances(sibling: str, others: str = "") -> str:
    inside = f"<sibling {sibling}/>" if sibling else ""
    return f"<cpu><numa><cell id='0' {CELL}><distances>{inside}</distances></cell>{others}</numa></cpu>"


def _numatune(inside: str) -> str:
    return f"<numatune>{inside}</numatune>"


def _groups(*cache: str, memory: str | None = None) -> str:
    allocation = "<cache id='0' level='3' type='both' size='3' unit='MiB'/>"
    made = "".join(f"<cachetune vcpus='{each}'>{allocation}</cachetune>" for each in cache)
    if memory is not None:
        made += f"<memorytune vcpus='{memory}'><node id='0' bandwidth='60'/></memorytune>"
    return f"<cputune>{made}</cputune>"


def _features(features: str, model: str = "<model>qemu64</model>") -> str:
    return f"<cpu>{model}{features}</cpu>"


ON, OFF = "enabled='yes'", "enabled='no'"
FIRST = "enabled='yes' hotpluggable='no' order='1'"
CELL = "cpus='0' memory='1024'"

BROKEN = {
    # <vcpu>
    "the number of vCPUs is no number": _broken(Rule.COUNT_NOT_A_NUMBER, "vcpu", "four", vcpu="<vcpu>four</vcpu>"),
    "there is no number of vCPUs": _broken(Rule.COUNT_NOT_A_NUMBER, "vcpu", "", vcpu="<vcpu/>"),
    "the number of vCPUs has space around it": _broken(
        Rule.COUNT_NOT_A_NUMBER, "vcpu", " 4 ", vcpu="<vcpu> 4 </vcpu>"
    ),
    "the number of vCPUs is above 32 bits": _broken(
        Rule.COUNT_NOT_A_NUMBER, "vcpu", "4294967296", vcpu="<vcpu>4294967296</vcpu>"
    ),
    "no vCPU": _broken(Rule.COUNT_ZERO, "vcpu", "0", vcpu="<vcpu>0</vcpu>"),
    "less than no vCPU": _broken(Rule.COUNT_NEGATIVE, "vcpu", "-1", vcpu="<vcpu>-1</vcpu>"),
    "more vCPUs than memory has room for": _broken(
        Rule.COUNT_TOO_HIGH, "vcpu", "4294967295", vcpu="<vcpu>4294967295</vcpu>"
    ),
    "more vCPUs than any machine has": _broken(Rule.COUNT_TOO_HIGH, "vcpu", "16385", vcpu="<vcpu>16385</vcpu>"),
    "more vCPUs than q35 of QEMU 7.2 takes": _broken(Rule.MACHINE_LIMIT, "vcpu", "289", vcpu="<vcpu>289</vcpu>"),
    "more vCPUs than pc takes": _broken(Rule.MACHINE_LIMIT, "vcpu", "256", vcpu="<vcpu>256</vcpu>", os=PC),
    "more vCPUs than s390x takes": _broken(Rule.MACHINE_LIMIT, "vcpu", "249", vcpu="<vcpu>249</vcpu>", os=S390),
    "more than 255 vCPUs without an IOMMU": _broken(Rule.EIM_MISSING, "vcpu", "256", vcpu="<vcpu>256</vcpu>"),
    "more than 255 vCPUs and an IOMMU without eim": _broken(
        Rule.EIM_MISSING, "vcpu", "256", vcpu="<vcpu>256</vcpu>", rest=EIM
    ),
    "more vCPUs on than there can be": _broken(
        Rule.CURRENT_ABOVE_MAX, "vcpu@current", "5", vcpu="<vcpu current='5'>4</vcpu>"
    ),
    "no vCPU on": _broken(Rule.VCPU_0_OFF, "vcpu@current", "0", vcpu="<vcpu current='0'>4</vcpu>"),
    "a negative number of vCPUs on": _broken(
        Rule.NOT_A_NUMBER, "vcpu@current", "-1", vcpu="<vcpu current='-1'>4</vcpu>"
    ),
    "an unknown placement": _broken(
        Rule.NOT_A_CHOICE, "vcpu@placement", "numad", vcpu="<vcpu placement='numad'>4</vcpu>"
    ),
    "an empty cpuset": _broken(Rule.CPUSET_UNREADABLE, "vcpu@cpuset", "", vcpu="<vcpu cpuset=''>4</vcpu>"),
    "a cpuset that is none": _broken(Rule.CPUSET_UNREADABLE, "vcpu@cpuset", "0-", vcpu="<vcpu cpuset='0-'>4</vcpu>"),
    "a cpuset beyond what libvirt can hold": _broken(
        Rule.CPUSET_UNREADABLE, "vcpu@cpuset", "0-16384", vcpu="<vcpu cpuset='0-16384'>4</vcpu>"
    ),
    "a cpuset that cancels out": _broken(
        Rule.CPUSET_EMPTY, "vcpu@cpuset", "0,^0", vcpu="<vcpu cpuset='0,^0'>4</vcpu>"
    ),
    # <vcpus>
    "a vCPU without id": _broken(
        Rule.ATTRIBUTE_MISSING, "vcpus/vcpu@id", None, vcpus="<vcpus><vcpu enabled='yes'/></vcpus>"
    ),
    "a vCPU neither on nor off": _broken(Rule.ATTRIBUTE_MISSING, "vcpus/vcpu@enabled", None, vcpus=rows("")),
    "an id that is no number": _broken(
        Rule.NOT_A_NUMBER, "vcpus/vcpu@id", "x", vcpus="<vcpus><vcpu id='x' enabled='yes'/></vcpus>"
    ),
    "a vCPU that is on indeed": _broken(Rule.NOT_YES_OR_NO, "vcpus/vcpu@enabled", "YES", vcpus=rows("enabled='YES'")),
    "a vCPU that is perhaps hotpluggable": _broken(
        Rule.NOT_YES_OR_NO, "vcpus/vcpu@hotpluggable", "maybe", vcpus=rows(f"{ON} hotpluggable='maybe'")
    ),
    "a negative order": _broken(Rule.NOT_A_NUMBER, "vcpus/vcpu@order", "-1", vcpus=rows(f"{ON} order='-1'")),
    "an id above the number of vCPUs": _broken(
        Rule.ID_ABOVE_MAX, "vcpus/vcpu@id", "4", vcpus=rows(ON, OFF, OFF, OFF, OFF)
    ),
    "vCPU 0 is off": _broken(
        Rule.VCPU_0_OFF, "vcpus/vcpu@enabled", "no", vcpus=rows(OFF, f"{ON} hotpluggable='yes'")
    ),
    "vCPU 0 is not listed": _broken(
        Rule.VCPU_0_OFF, "vcpus", None, vcpus="<vcpus><vcpu id='1' enabled='yes' hotpluggable='yes'/></vcpus>"
    ),
    "vCPU 0 is hotpluggable": _broken(
        Rule.VCPU_0_HOTPLUGGABLE, "vcpus/vcpu@hotpluggable", "yes", vcpus=rows(f"{ON} hotpluggable='yes'")
    ),
    "vCPU 0 comes second": _broken(
        Rule.VCPU_0_NOT_FIRST,
        "vcpus/vcpu@order",
        "2",
        vcpus=rows(f"{ON} order='2'", f"{ON} hotpluggable='yes' order='1'"),
    ),
    "an order is missing": _broken(
        Rule.ORDER_INCOMPLETE, "vcpus/vcpu", None, vcpus=rows(FIRST, f"{ON} hotpluggable='yes'")
    ),
    "an order that the first vCPU has not": _broken(
        Rule.ORDER_INCOMPLETE, "vcpus/vcpu@order", "2", vcpus=rows(ON, f"{ON} hotpluggable='yes' order='2'")
    ),
    "a vCPU that QEMU starts with follows a hotpluggable one": _broken(
        Rule.STARTED_WITH_AFTER_HOTPLUGGABLE,
        "vcpus/vcpu@hotpluggable",
        "no",
        vcpus=rows(ON, f"{ON} hotpluggable='yes'", f"{ON} hotpluggable='no'"),
    ),
    "a vCPU that QEMU starts with follows a hotpluggable one that is off": _broken(
        Rule.STARTED_WITH_AFTER_HOTPLUGGABLE,
        "vcpus/vcpu@hotpluggable",
        "no",
        vcpus=rows(ON, f"{OFF} hotpluggable='yes'", f"{ON} hotpluggable='no'"),
    ),
    "vCPUs that QEMU starts with are ordered backwards": _broken(
        Rule.STARTED_WITH_DESCENDING,
        "vcpus/vcpu@order",
        "2",
        vcpus=rows(FIRST, f"{ON} hotpluggable='no' order='3'", f"{ON} hotpluggable='no' order='2'"),
    ),
    "a vCPU is off and not hotpluggable": _broken(
        Rule.OFF_NOT_HOTPLUGGABLE, "vcpus/vcpu@hotpluggable", "no", vcpus=rows(ON, f"{OFF} hotpluggable='no'")
    ),
    "half of a core": _broken(
        Rule.PART_OF_CORE, "vcpu@current", "6", vcpu="<vcpu current='6'>8</vcpu>", os=PSERIES, cpu=CORES_OF_4
    ),
    # <vcpus>, at start
    "an unsaid default breaks the order": _broken(
        Rule.STARTED_WITH_AFTER_HOTPLUGGABLE,
        "vcpus/vcpu@hotpluggable",
        "no",
        start=True,
        vcpus=rows(ON, OFF, f"{ON} hotpluggable='no'"),
    ),
    "an unsaid default breaks the order, and is itself unsaid": _broken(
        Rule.STARTED_WITH_AFTER_HOTPLUGGABLE, "vcpus/vcpu", None, start=True, vcpus=rows(ON, OFF, ON)
    ),
    "two vCPUs of one order": _broken(
        Rule.ORDER_TWICE,
        "vcpus/vcpu@order",
        "2",
        start=True,
        vcpus=rows(FIRST, f"{ON} hotpluggable='yes' order='2'", f"{ON} hotpluggable='yes' order='2'"),
    ),
    "two vCPUs of one order, one of them off": _broken(
        Rule.ORDER_TWICE,
        "vcpus/vcpu@order",
        "2",
        start=True,
        vcpus=rows(FIRST, f"{ON} hotpluggable='yes' order='2'", f"{OFF} hotpluggable='yes' order='2'"),
    ),
    "an order above the number of vCPUs": _broken(
        Rule.ORDER_ABOVE_MAX,
        "vcpus/vcpu@order",
        "5",
        start=True,
        vcpus=rows(FIRST, f"{ON} hotpluggable='yes' order='5'"),
    ),
    "an order above the number of vCPUs of one that is off": _broken(
        Rule.ORDER_ABOVE_MAX,
        "vcpus/vcpu@order",
        "5",
        start=True,
        vcpus=rows(FIRST, f"{ON} hotpluggable='yes' order='2'", f"{OFF} order='5'"),
    ),
    "a core whose vCPUs differ": _broken(
        Rule.CORE_DIFFERS,
        "vcpus/vcpu",
        None,
        start=True,
        vcpus=rows(*[FIRST] * 4, *[f"{ON} hotpluggable='yes' order='2'"] * 3, f"{ON} hotpluggable='yes' order='3'"),
        vcpu="<vcpu>8</vcpu>",
        os=PSERIES,
        cpu=CORES_OF_4,
    ),
    # <topology>
    "a topology of other vCPUs": _broken(
        Rule.TOPOLOGY_PRODUCT, "cpu/topology", None, cpu=_topology(sockets=2, cores=1, threads=1)
    ),
    "a topology of the vCPUs that are on": _broken(
        Rule.TOPOLOGY_PRODUCT,
        "cpu/topology",
        None,
        cpu=_topology(sockets=1, cores=2, threads=1),
        vcpu="<vcpu current='2'>4</vcpu>",
    ),
    "a topology that 32 bits cannot count": _broken(
        Rule.TOPOLOGY_PRODUCT, "cpu/topology", None, cpu=_topology(sockets=65536, dies=4, cores=65536, threads=1)
    ),
    "no sockets": _broken(
        Rule.TOPOLOGY_ZERO, "cpu/topology@sockets", "0", cpu=_topology(sockets=0, cores=2, threads=2)
    ),
    "no dies": _broken(
        Rule.TOPOLOGY_ZERO, "cpu/topology@dies", "0", cpu=_topology(sockets=1, dies=0, cores=2, threads=2)
    ),
    "threads are not said": _broken(
        Rule.ATTRIBUTE_MISSING, "cpu/topology@threads", None, cpu=_topology(sockets=2, cores=2)
    ),
    "a number of cores that is none": _broken(
        Rule.NOT_A_NUMBER, "cpu/topology@cores", "2 ", cpu=_topology(sockets=2, cores="2 ", threads=1)
    ),
    # <numa>
    "more vCPUs in cells than there can be": _broken(
        Rule.NUMA_TOO_MANY, "cpu/numa/cell@cpus", "0-4", cpu=_numa("cpus='0-4' memory='1024'")
    ),
    "a vCPU in a cell that cannot be": _broken(
        Rule.NUMA_ABOVE_MAX, "cpu/numa/cell@cpus", "4", cpu=_numa("cpus='4' memory='1024'")
    ),
    "a vCPU in two cells": _broken(
        Rule.NUMA_OVERLAP, "cpu/numa/cell@cpus", "1-2", cpu=_numa("cpus='0-1' memory='1'", "cpus='1-2' memory='1'")
    ),
    "a gap in the ids of cells": _broken(
        Rule.NUMA_ID_GAP, "cpu/numa/cell@id", "2", cpu=_numa(CELL, "id='2' cpus='1' memory='1024'")
    ),
    "an id of a cell that is no number": _broken(
        Rule.NOT_A_NUMBER, "cpu/numa/cell@id", "-1", cpu=_numa("id='-1' memory='1024'")
    ),
    "two cells of one id": _broken(
        Rule.NUMA_ID_TWICE,
        "cpu/numa/cell@id",
        "0",
        cpu=_numa(f"id='0' {CELL}", "id='0' cpus='1' memory='1024'"),
    ),
    "no cell": _broken(Rule.NUMA_WITHOUT_CELLS, "cpu/numa", None, cpu=_numa()),
    "a cell without memory": _broken(Rule.ATTRIBUTE_MISSING, "cpu/numa/cell@memory", None, cpu=_numa("cpus='0'")),
    "memory of a cell that is no number": _broken(
        Rule.MEMORY_NOT_A_NUMBER, "cpu/numa/cell@memory", "1G", cpu=_numa("cpus='0' memory='1G'")
    ),
    "vCPUs of a cell that cannot be read": _broken(
        Rule.CPUSET_UNREADABLE, "cpu/numa/cell@cpus", "", cpu=_numa("cpus='' memory='1024'")
    ),
    "an unknown access to memory": _broken(
        Rule.NOT_A_CHOICE, "cpu/numa/cell@memAccess", "", cpu=_numa(f"{CELL} memAccess=''")
    ),
    "memory that is perhaps discarded": _broken(
        Rule.NOT_YES_OR_NO, "cpu/numa/cell@discard", "on", cpu=_numa(f"{CELL} discard='on'")
    ),
    "distances to no cell": _broken(
        Rule.DISTANCES_WITHOUT_SIBLINGS, "cpu/numa/cell/distances", None, cpu=_distances("")
    ),
    "a distance to a cell that is none": _broken(
        Rule.DISTANCE_TO_NO_CELL, "cpu/numa/cell/distances/sibling@id", "1", cpu=_distances("id='1' value='20'")
    ),
    "a distance that is not said": _broken(
        Rule.ATTRIBUTE_MISSING, "cpu/numa/cell/distances/sibling@value", None, cpu=_distances("id='0'")
    ),
    "a distance of a cell to itself": _broken(
        Rule.DISTANCE_OUT_OF_RANGE, "cpu/numa/cell/distances/sibling@value", "11", cpu=_distances("id='0' value='11'")
    ),
    "a distance as that of a cell to itself": _broken(
        Rule.DISTANCE_OUT_OF_RANGE,
        "cpu/numa/cell/distances/sibling@value",
        "10",
        cpu=_distances("id='1' value='10'", "<cell id='1' cpus='1' memory='1'/>"),
    ),
    # <cputune>
    "a pin without cpuset": _broken(
        Rule.PIN_WITHOUT_CPUSET, "cputune/vcpupin@cpuset", None, cputune="<cputune><vcpupin vcpu='0'/></cputune>"
    ),
    "a pin of no vCPU": _broken(
        Rule.ATTRIBUTE_MISSING, "cputune/vcpupin@vcpu", None, cputune="<cputune><vcpupin cpuset='0'/></cputune>"
    ),
    "a vCPU pinned twice": _broken(
        Rule.PIN_TWICE,
        "cputune/vcpupin@vcpu",
        "0",
        cputune="<cputune><vcpupin vcpu='0' cpuset='0'/><vcpupin vcpu='0' cpuset='1'/></cputune>",
    ),
    "a pin to nothing": _broken(
        Rule.CPUSET_EMPTY,
        "cputune/vcpupin@cpuset",
        "1,^1",
        cputune="<cputune><vcpupin vcpu='0' cpuset='1,^1'/></cputune>",
    ),
    "the emulator pinned without cpuset": _broken(
        Rule.PIN_WITHOUT_CPUSET, "cputune/emulatorpin@cpuset", None, cputune="<cputune><emulatorpin/></cputune>"
    ),
    "the emulator pinned twice": _broken(
        Rule.EMULATORPIN_TWICE,
        "cputune/emulatorpin",
        None,
        cputune="<cputune><emulatorpin cpuset='0'/><emulatorpin cpuset='1'/></cputune>",
    ),
    "a scheduler for a vCPU that cannot be": _broken(
        Rule.SCHED_ABOVE_MAX,
        "cputune/vcpusched@vcpus",
        "3-4",
        cputune="<cputune><vcpusched vcpus='3-4' scheduler='idle'/></cputune>",
    ),
    "a scheduler of no vCPU": _broken(
        Rule.ATTRIBUTE_MISSING,
        "cputune/vcpusched@vcpus",
        None,
        cputune="<cputune><vcpusched scheduler='idle'/></cputune>",
    ),
    "two schedulers for one vCPU": _broken(
        Rule.SCHED_TWICE,
        "cputune/vcpusched@vcpus",
        "1-2",
        cputune="<cputune><vcpusched vcpus='0-1' scheduler='idle'/>"
        "<vcpusched vcpus='1-2' scheduler='idle'/></cputune>",
    ),
    "fifo without priority": _broken(
        Rule.ATTRIBUTE_MISSING,
        "cputune/vcpusched@priority",
        None,
        cputune="<cputune><vcpusched vcpus='0' scheduler='fifo'/></cputune>",
    ),
    "a priority that is no number": _broken(
        Rule.NOT_AN_INTEGER,
        "cputune/vcpusched@priority",
        "high",
        cputune="<cputune><vcpusched vcpus='0' scheduler='rr' priority='high'/></cputune>",
    ),
    "an unknown scheduler": _broken(
        Rule.NOT_A_CHOICE,
        "cputune/vcpusched@scheduler",
        "fair",
        cputune="<cputune><vcpusched vcpus='0' scheduler='fair'/></cputune>",
    ),
    "the emulator scheduled twice": _broken(
        Rule.EMULATORSCHED_TWICE,
        "cputune/emulatorsched",
        None,
        cputune="<cputune><emulatorsched scheduler='idle'/><emulatorsched scheduler='batch'/></cputune>",
    ),
    "the emulator without a scheduler": _broken(
        Rule.ATTRIBUTE_MISSING,
        "cputune/emulatorsched@scheduler",
        None,
        cputune="<cputune><emulatorsched priority='1'/></cputune>",
    ),
    "the kernel's default as the emulator's scheduler": _broken(
        Rule.NOT_A_CHOICE,
        "cputune/emulatorsched@scheduler",
        "other",
        cputune="<cputune><emulatorsched scheduler='other'/></cputune>",
    ),
    "the emulator round robin without priority": _broken(
        Rule.ATTRIBUTE_MISSING,
        "cputune/emulatorsched@priority",
        None,
        cputune="<cputune><emulatorsched scheduler='rr'/></cputune>",
    ),
    "a priority above the kernel's": _broken(
        Rule.PRIORITY_OUT_OF_RANGE,
        "cputune/vcpusched@priority",
        "100",
        start=True,
        cputune="<cputune><vcpusched vcpus='1-2' scheduler='fifo' priority='100'/></cputune>",
    ),
    "a priority of the emulator below the kernel's": _broken(
        Rule.PRIORITY_OUT_OF_RANGE,
        "cputune/emulatorsched@priority",
        "0",
        start=True,
        cputune="<cputune><emulatorsched scheduler='rr' priority='0'/></cputune>",
    ),
    "a scheduler for nothing": _broken(
        Rule.CPUSET_EMPTY,
        "cputune/vcpusched@vcpus",
        "0,^0",
        cputune="<cputune><vcpusched vcpus='0,^0' scheduler='idle'/></cputune>",
    ),
    "a period too short": _broken(
        Rule.TUNE_OUT_OF_RANGE, "cputune/period", "999", cputune="<cputune><period>999</period></cputune>"
    ),
    "a period too long": _broken(
        Rule.TUNE_OUT_OF_RANGE,
        "cputune/emulator_period",
        "1000001",
        cputune="<cputune><emulator_period>1000001</emulator_period></cputune>",
    ),
    "a quota too small": _broken(
        Rule.TUNE_OUT_OF_RANGE, "cputune/quota", "999", cputune="<cputune><quota>999</quota></cputune>"
    ),
    "a quota that is no number": _broken(
        Rule.TUNE_NOT_A_NUMBER,
        "cputune/global_quota",
        "half",
        cputune="<cputune><global_quota>half</global_quota></cputune>",
    ),
    "a <cachetune> of no vCPU": _broken(
        Rule.ATTRIBUTE_MISSING, "cputune/cachetune@vcpus", None, cputune="<cputune><cachetune/></cputune>"
    ),
    "a <memorytune> of what is no set": _broken(
        Rule.CPUSET_UNREADABLE, "cputune/memorytune@vcpus", "", cputune="<cputune><memorytune vcpus=''/></cputune>"
    ),
    "a <cachetune> without KVM": _broken(Rule.GROUPS_WITHOUT_KVM, "cputune/cachetune", None, cputune=_groups("0-1")),
    "a vCPU in two <cachetune>": _broken(
        Rule.GROUPS_OVERLAP, "cputune/cachetune@vcpus", "1-2", cputune=_groups("0-1", "1-2"), domain=KVM
    ),
    "two <cachetune> of the same vCPUs": _broken(
        Rule.GROUPS_OVERLAP, "cputune/cachetune@vcpus", "0-1,9", cputune=_groups("0-1", "0-1,9"), domain=KVM
    ),
    "a <memorytune> of some of those of a <cachetune>": _broken(
        Rule.GROUPS_OVERLAP, "cputune/memorytune@vcpus", "0", cputune=_groups("0-1", memory="0"), domain=KVM
    ),
    # <numatune>
    "two <numatune>": _broken(Rule.NUMATUNE_TWICE, "numatune", None, cputune="<numatune/><numatune/>"),
    "an unknown mode of memory": _broken(
        Rule.NOT_A_CHOICE,
        "numatune/memory@mode",
        "default",
        cputune=_numatune("<memory mode='default' nodeset='0'/>"),
    ),
    "an unknown placement of memory": _broken(
        Rule.NOT_A_CHOICE,
        "numatune/memory@placement",
        "numad",
        cputune=_numatune("<memory placement='numad' nodeset='0'/>"),
    ),
    "memory of no node": _broken(
        Rule.NODESET_MISSING, "numatune/memory@nodeset", None, cputune=_numatune("<memory mode='strict'/>")
    ),
    "memory of a set that is none": _broken(
        Rule.CPUSET_UNREADABLE, "numatune/memory@nodeset", "9-x", cputune=_numatune("<memory nodeset='9-x'/>")
    ),
    "a <memnode> and no cells": _broken(
        Rule.MEMNODE_WITHOUT_CELL, "numatune/memnode", None, cputune=_numatune("<memnode cellid='0' nodeset='0'/>")
    ),
    "a <memnode> for a cell that is none": _broken(
        Rule.MEMNODE_WITHOUT_CELL,
        "numatune/memnode@cellid",
        "1",
        cputune=_numatune("<memnode cellid='1' nodeset='0'/>"),
        cpu=_numa(CELL),
    ),
    "a <memnode> of no cell": _broken(
        Rule.ATTRIBUTE_MISSING,
        "numatune/memnode@cellid",
        None,
        cputune=_numatune("<memnode nodeset='0'/>"),
        cpu=_numa(CELL),
    ),
    "a <memnode> of no node": _broken(
        Rule.NODESET_MISSING,
        "numatune/memnode@nodeset",
        None,
        cputune=_numatune("<memnode cellid='0'/>"),
        cpu=_numa(CELL),
    ),
    "two <memnode> for one cell": _broken(
        Rule.MEMNODE_TWICE,
        "numatune/memnode@cellid",
        "0",
        cputune=_numatune("<memnode cellid='0' nodeset='0'/>" * 2),
        cpu=_numa(CELL),
    ),
    "a <memnode> of memory that is placed automatically": _broken(
        Rule.MEMNODE_AUTO,
        "numatune/memnode",
        None,
        cputune=_numatune("<memory placement='auto'/><memnode cellid='0' nodeset='0'/>"),
        cpu=_numa(CELL),
    ),
    "a <memnode> of vCPUs that are placed automatically": _broken(
        Rule.MEMNODE_AUTO,
        "numatune/memnode",
        None,
        cputune=_numatune("<memnode cellid='0' nodeset='0'/>"),
        cpu=_numa(CELL),
        vcpu="<vcpu placement='auto'>4</vcpu>",
    ),
    "a <memnode> that is strict where the memory is restrictive": _broken(
        Rule.MEMNODE_RESTRICTIVE,
        "numatune/memnode@mode",
        "strict",
        cputune=_numatune("<memory mode='restrictive' nodeset='0'/><memnode cellid='0' mode='strict' nodeset='0'/>"),
        cpu=_numa(CELL),
    ),
    # <cpu>
    "the host's CPU without KVM": _broken(
        Rule.PASSTHROUGH_WITHOUT_KVM, "cpu@mode", "host-passthrough", start=True, cpu="<cpu mode='host-passthrough'/>"
    ),
    "an unknown mode": _broken(Rule.NOT_A_CHOICE, "cpu@mode", "host", cpu="<cpu mode='host'/>"),
    "a model that migrates": _broken(
        Rule.MIGRATABLE_MODE, "cpu@migratable", "on", cpu="<cpu mode='host-model' migratable='on'/>"
    ),
    "a feature without a model": _broken(
        Rule.FEATURE_WITHOUT_MODEL, "cpu/feature@name", "vmx", cpu=_features("<feature name='vmx'/>", model="")
    ),
    "a feature without a name": _broken(
        Rule.FEATURE_WITHOUT_NAME, "cpu/feature@name", None, cpu=_features("<feature policy='disable'/>")
    ),
    "a feature twice": _broken(
        Rule.FEATURE_TWICE,
        "cpu/feature@name",
        "vmx",
        cpu=_features("<feature name='vmx'/><feature name='vmx' policy='disable'/>"),
    ),
    "an unknown policy": _broken(
        Rule.NOT_A_CHOICE, "cpu/feature@policy", "off", cpu=_features("<feature name='vmx' policy='off'/>")
    ),
    # What it is that is read.
    "no type": _broken(Rule.TYPE, "domain@type", None, domain="<domain>"),
    "a domain of another hypervisor": _broken(Rule.TYPE, "domain@type", "lcx", domain="<domain type='lcx'>"),
    "a domain of Xen's": _broken(Rule.TYPE, "domain@type", "xen", domain="<domain type='xen'>"),
    "no name": _broken(Rule.NAME, "domain", None, domain=PARTS["domain"], name=""),
    "an empty name": _broken(Rule.NAME, "name", None, name="<name/>"),
    "a name with a slash": _broken(Rule.NAME_UNUSABLE, "name", "a/b", name="<name>a/b</name>"),
    "a name that ends with a line break": _broken(Rule.NAME_UNUSABLE, "name", "a\n", name="<name>a&#10;</name>"),
    "a UUID of a blank": _broken(Rule.UUID, "uuid", " ", uuid="<uuid> </uuid>"),
    "a UUID cut short": _broken(Rule.UUID, "uuid", "0d5c9f0e", uuid="<uuid>0d5c9f0e</uuid>"),
    "memory that is no number": _broken(
        Rule.MEMORY_NOT_A_NUMBER, "memory", "64 ", memory="<memory unit='MiB'>64 </memory>"
    ),
    "an unknown unit of memory": _broken(
        Rule.MEMORY_UNIT, "memory@unit", "Mi", memory="<memory unit='Mi'>64</memory>"
    ),
    "more memory than 64 bits count": _broken(
        Rule.MEMORY_TOO_LARGE, "memory", "8", memory="<memory unit='EiB'>8</memory>"
    ),
}
"""By what is wrong with it."""
