"""From a document, or a layout, to QEMU's arguments: what they say, and what they say that they do not know."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from qmpvcpu.domainxml import CpuModel, DomainVcpus, NumaCell, parse
from qmpvcpu.errors import DomainXmlError
from qmpvcpu.launch import LaunchArguments, arguments
from qmpvcpu.model.layout import CpuProps, Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology
from qmpvcpu.qapi import SlotReading, ThreadReading, build_slots, creation_order
from tests.captures import Capture, all_captures
from tests.domainxml.examples import Q35, captured_layouts, layout_of
from tests.launch.domains import CELLS, DIES, EIGHT, INTERLEAVED, STATES, domain_of, domains

NEHALEM = """
<cpu>
  <model>Nehalem</model>
  <feature policy='require' name='x2apic'/>
  <feature policy='forbid' name='lahf_lm'/>
  <feature policy='force' name='sse4.2'/>
  <feature policy='disable' name='pclmuldq'/>
  <feature policy='require' name='osxsave'/>
</cpu>
"""


def commandline(*words: str) -> str:
    inside = "".join(f"<qemu:arg value='{word}'/>" for word in words)
    return f"<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>{inside}</qemu:commandline>"


def document(cpu: str = "", *, kind: str = "qemu", beside: str = "", arch: str = "x86_64") -> DomainVcpus:
    os = f"<os><type arch='{arch}' machine='q35'>hvm</type></os>"
    return parse(f"<domain type='{kind}'><name>a</name><vcpu>2</vcpu>{os}{cpu}{beside}</domain>".encode())


@pytest.mark.parametrize(
    ("domain", "smp"),
    [
        (domain_of(8, 8), "8,sockets=8,cores=1,threads=1"),
        (domain_of(8, 2), "2,maxcpus=8,sockets=8,cores=1,threads=1"),
        (domain_of(8, 2, [5], topology=EIGHT), "2,maxcpus=8,sockets=2,dies=1,cores=2,threads=2"),
        (domain_of(8, 1, topology=DIES), "1,maxcpus=8,sockets=1,dies=2,cores=2,threads=2"),
        (
            domain_of(8, 1, topology=Topology(8, clusters=2, cores=4)),
            "1,maxcpus=8,sockets=1,dies=1,clusters=2,cores=4,threads=1",
        ),
    ],
)
def test_smp_counts_what_is_on_and_not_hotpluggable(domain: DomainVcpus, smp: str) -> None:
    assert arguments(domain).smp == smp


@pytest.mark.parametrize(
    ("cpu", "kind", "expected"),
    [
        ("", "qemu", "qemu64"),
        ("<cpu><topology sockets='2' cores='1' threads='1'/></cpu>", "kvm", "qemu64"),
        ("<cpu mode='maximum'/>", "qemu", "max"),
        ("<cpu mode='maximum' migratable='off'/>", "kvm", "max,migratable=off"),
        ("<cpu mode='host-passthrough'/>", "kvm", "host,migratable=on"),
        (
            "<cpu mode='host-passthrough' migratable='off'><feature policy='disable' name='vmx'/></cpu>",
            "kvm",
            "host,migratable=off,vmx=off",
        ),
        (
            NEHALEM,
            "kvm",
            "Nehalem,x2apic=on,lahf-lm=off,sse4.2=on,pclmulqdq=off",
        ),
    ],
)
def test_a_cpu_model_is_spelled_as_qemu_spells_it(cpu: str, kind: str, expected: str) -> None:
    built = arguments(document(cpu, kind=kind))
    assert built.cpu == expected
    assert built.unknown == ()
    assert built.argv[:2] == ["-cpu", expected]


@pytest.mark.parametrize(("kind", "stands_for"), [("kvm", "host"), ("qemu", "max")])
def test_a_host_model_is_not_known_without_the_host_unless_the_caller_says_it(kind: str, stands_for: str) -> None:
    domain = domain_of(4, 1, [3], type=kind, cpu=CpuModel("host-model"))
    built = arguments(domain)
    assert built.cpu == stands_for
    assert built.device_add[0]["driver"] == f"{stands_for}-x86_64-cpu"
    assert "host-model" in built.unknown[0]
    told = arguments(domain, cpu="EPYC-Milan,x2apic=on")
    assert told.argv[:2] == ["-cpu", "EPYC-Milan,x2apic=on"]
    assert told.device_add[0]["driver"] == "EPYC-Milan-x86_64-cpu"
    assert told.unknown == ()


@pytest.mark.parametrize(
    ("cpu", "beside", "words"),
    [
        ("<cpu><model>qemu64</model><feature policy='optional' name='aes'/></cpu>", "", "whether the host has aes"),
        ("<cpu match='minimum'><model>qemu64</model></cpu>", "", "cpu[@match='minimum']"),
        ("<cpu deprecated_features='off'><model>qemu64</model></cpu>", "", "cpu[@deprecated_features]"),
        ("<cpu><model vendor_id='GenuineIntel,'>qemu64</model></cpu>", "", "cpu/model[@vendor_id]"),
        ("<cpu><model>qemu64</model><cache mode='emulate' level='2'/></cpu>", "", "cpu/cache"),
        ("<cpu><model>qemu64</model><cache mode='passthrough'/></cpu>", "", "cpu/cache"),
        ("<cpu><maxphysaddr mode='passthrough' limit='40'/></cpu>", "", "cpu/maxphysaddr"),
        ("<cpu><maxphysaddr mode='emulate'/></cpu>", "", "cpu/maxphysaddr"),
        ("", "<features><apic eoi='maybe'/></features>", "features/apic"),
        ("", "<features><pvspinlock state='maybe'/></features>", "features/pvspinlock"),
        ("", "<features><pmu state='x'/></features>", "features/pmu"),
        ("", "<features><hyperv mode='host-model'/></features>", "features/hyperv"),
        ("", "<features><hyperv><emsr_bitmap state='on'/></hyperv></features>", "features/hyperv"),
        ("", "<features><hyperv><relaxed/></hyperv></features>", "features/hyperv/relaxed"),
        ("", "<features><hyperv><spinlocks state='on'/></hyperv></features>", "features/hyperv/spinlocks"),
        (
            "",
            "<features><hyperv><vendor_id state='on' value='a,b'/></hyperv></features>",
            "features/hyperv/vendor_id",
        ),
        (
            "",
            "<features><hyperv><tlbflush state='on'><direct state='on'/></tlbflush></hyperv></features>",
            "features/hyperv/tlbflush",
        ),
        ("", "<features><kvm><dirty-ring state='on' size='4096'/></kvm></features>", "features/kvm"),
        ("", "<features><kvm><hidden/></kvm></features>", "features/kvm/hidden"),
        ("", "<clock><timer name='kvmclock' present='maybe'/></clock>", "clock/timer[@name='kvmclock']"),
        ("", "<clock><timer name='tsc' frequency='1e9'/></clock>", "clock/timer[@name='tsc']"),
        ("", "<clock><timer name='armvtimer' tickpolicy='delay'/></clock>", "clock/timer[@name='armvtimer']"),
        ("", "<memoryBacking><hugepages/></memoryBacking>", "memoryBacking"),
        ("", commandline("-cpu", "max"), "qemu:commandline"),
        ("", commandline("--smp", "3"), "qemu:commandline"),
        ("", commandline("-device", "qemu64-x86_64-cpu,id=vcpu1"), "qemu:commandline"),
        ("", commandline("-device", '{"driver":"qemu64-x86_64-cpu"}'), "qemu:commandline"),
    ],
)
def test_what_is_not_read_of_a_document_is_named(cpu: str, beside: str, words: str) -> None:
    (sentence,) = arguments(document(cpu, beside=beside)).unknown
    assert words in sentence


@pytest.mark.parametrize(
    ("cpu", "beside", "options"),
    [
        ("", "<features><apic/><apic eoi='on'/></features>", "kvm-pv-eoi=on"),
        ("", "<features><pvspinlock/></features>", "kvm-pv-unhalt=on"),
        ("", "<features><pmu state='on'/><pmu state='off'/></features>", "pmu=off"),
        ("", "<features><kvm><hidden state='on'/><pv-ipi state='on'/></kvm></features>", "kvm=off"),
        (
            "",
            (
                "<features><kvm><pv-ipi state='off'/><hint-dedicated state='on'/><poll-control state='on'/></kvm>"
                "</features>"
            ),
            "kvm-hint-dedicated=on,kvm-poll-control=on,kvm-pv-ipi=off",
        ),
        (
            "",
            (
                "<features><hyperv><vendor_id state='on' value='KVM Hv'/><spinlocks state='on' retries='8191'/>"
                "<stimer state='on'><direct state='on'/></stimer><vapic state='off'/></hyperv></features>"
            ),
            "hv-spinlocks=0x1fff,hv-stimer=on,hv-stimer-direct=on,hv-vendor-id=KVM Hv",
        ),
        ("", "<features><hyperv mode='passthrough'/></features>", "hv-passthrough=on"),
        (
            "",
            (
                "<clock><timer name='hypervclock' present='yes'/><timer name='kvmclock' present='no'/>"
                "<timer name='tsc' frequency='2000000000'/><timer name='hpet' present='no'/></clock>"
            ),
            "hv-time=on,kvmclock=off,tsc-frequency=2000000000",
        ),
        ("", "<devices><panic model='hyperv'/></devices>", "hv-crash"),
        ("<cpu><cache mode='emulate' level='3'/></cpu>", "", "l3-cache=on"),
        ("<cpu><cache mode='disable'/></cpu>", "", "l3-cache=off"),
        ("<cpu><maxphysaddr mode='emulate' bits='42'/></cpu>", "", "phys-bits=42"),
        ("<cpu><maxphysaddr mode='passthrough'/></cpu>", "", "host-phys-bits=on"),
    ],
)
def test_what_else_a_document_says_of_the_cpu_is_in_its_words(cpu: str, beside: str, options: str) -> None:
    built = arguments(document(cpu, beside=beside))
    assert built.cpu == f"qemu64,{options}"
    assert built.unknown == ()
    assert arguments(document(cpu, beside=beside), cpu="max").cpu == "max"


def test_a_vendor_follows_the_model_and_the_host_keeps_its_caches() -> None:
    vendor = "<cpu><model vendor_id='AuthenticAMD'>Nehalem</model><feature policy='disable' name='vmx'/></cpu>"
    assert arguments(document(vendor)).cpu == "Nehalem,vendor=AuthenticAMD,vmx=off"
    model = "<model vendor_id='AuthenticAMD'>Nehalem</model>"
    host = f"<cpu mode='host-passthrough'>{model}<cache mode='passthrough'/></cpu>"
    assert arguments(document(host, kind="kvm")).cpu == "host,migratable=on,host-cache-info=on,l3-cache=off"
    assert arguments(document(host, kind="kvm")).unknown == ()


def test_on_other_architectures_the_words_of_x86_are_not_known() -> None:
    said = "<features><apic eoi='on'/><pmu state='off'/></features>"
    built = arguments(document("<cpu mode='host-passthrough'/>", kind="kvm", arch="aarch64", beside=said))
    assert built.cpu == "host,pmu=off"
    assert "features/apic" in built.unknown[0]
    assert built.unknown[0].endswith("add these yourself if they matter")
    left_to_qemu = arguments(document(kind="kvm", arch="aarch64", beside=said))
    assert left_to_qemu.cpu is None
    assert "asks for more than a model: pmu=off" in left_to_qemu.unknown[0]


def test_the_host_s_cpu_needs_kvm() -> None:
    domain = document("<cpu mode='host-passthrough'/>")
    with pytest.raises(DomainXmlError, match="needs KVM"):
        arguments(domain)
    assert arguments(domain, cpu="max").cpu == "max"


def test_no_option_gets_past_a_comma() -> None:
    domain = replace(document("<cpu><model>qemu64</model></cpu>"), cpu_options=("kvm=off,check=on",))
    with pytest.raises(DomainXmlError, match="has a comma"):
        arguments(domain)


@pytest.mark.parametrize(
    ("emulator", "cpu", "driver"),
    [
        ("/usr/bin/qemu-system-x86_64", "qemu64", "qemu64-x86_64-cpu"),
        ("/usr/bin/kvm", "qemu64", "qemu64-x86_64-cpu"),
        ("/usr/libexec/qemu-kvm", "qemu64", "qemu64-x86_64-cpu"),
        ("/usr/bin/qemu-system-i386", "qemu32", "qemu32-i386-cpu"),
    ],
)
def test_the_emulator_of_i686_decides_which_cpus_there_are(emulator: str, cpu: str, driver: str) -> None:
    built = arguments(domain_of(4, 1, [3], arch="i686", emulator=emulator))
    assert (built.cpu, built.device_add[0]["driver"], built.unknown) == (cpu, driver, ())


def test_an_emulator_of_i686_that_may_be_either_is_not_guessed() -> None:
    wrapped = arguments(domain_of(4, 1, [3], arch="i686", emulator="/opt/start-qemu"))
    assert (wrapped.cpu, wrapped.device_add) == (None, ())
    assert "/opt/start-qemu" in wrapped.unknown[0]
    assert "names no emulator" in arguments(domain_of(4, 1, arch="i686")).unknown[0]


def test_a_cell_without_memory_has_no_object() -> None:
    bare = (NumaCell(0, VcpuMap([0]), 65536), NumaCell(1, VcpuMap([1]), 0))
    built = arguments(domain_of(2, 1, numa=bare))
    assert built.numa[2:] == ("-numa", "node,nodeid=0,cpus=0,memdev=ram-node0", "-numa", "node,nodeid=1,cpus=1")
    assert built.memory_mib == 64
    with pytest.raises(DomainXmlError, match="no cell of <numa> has memory"):
        arguments(domain_of(2, 1, numa=bare[1:]))


def test_cells_have_a_memory_object_each_and_their_vcpus_by_ranges() -> None:
    built = arguments(domain_of(8, 1, [5, 4], topology=EIGHT, numa=INTERLEAVED))
    assert built.numa == (
        "-object",
        '{"qom-type":"memory-backend-ram","id":"ram-node0","size":16777216}',
        "-numa",
        "node,nodeid=0,cpus=0,cpus=2,cpus=4,cpus=6,memdev=ram-node0",
        "-object",
        '{"qom-type":"memory-backend-ram","id":"ram-node1","size":33554432}',
        "-numa",
        "node,nodeid=1,cpus=1,cpus=3,cpus=5,cpus=7,memdev=ram-node1",
        "-object",
        '{"qom-type":"memory-backend-ram","id":"ram-node2","size":16777216}',
        "-numa",
        "node,nodeid=2,memdev=ram-node2",
    )
    assert built.memory_mib == 64
    assert [device["node-id"] for device in built.device_add] == [1, 0]


def test_a_cell_is_rounded_up_to_what_qemu_takes() -> None:
    odd = (NumaCell(0, VcpuMap([0]), 32769), NumaCell(1, VcpuMap([1]), 32767))
    assert arguments(domain_of(2, 1, numa=odd)).memory_mib == 33 + 32
    assert arguments(domain_of(2, 1, numa=odd, arch="ppc64", machine="pseries")).memory_mib == 512
    assert arguments(domain_of(2, 1)).memory_mib is None


def test_plugged_vcpus_follow_in_their_order_each_in_its_place() -> None:
    built = arguments(domain_of(8, 1, [6, 3], topology=DIES))
    assert built.device_argv == [
        *("-device", "qemu64-x86_64-cpu,id=vcpu6,socket-id=0,die-id=1,core-id=1,thread-id=0"),
        *("-device", "qemu64-x86_64-cpu,id=vcpu3,socket-id=0,die-id=0,core-id=1,thread-id=1"),
    ]
    assert built.argv == [*built.boot_argv, *built.device_argv]
    assert built.device_add[1] == {
        "driver": "qemu64-x86_64-cpu",
        "id": "vcpu3",
        "socket-id": 0,
        "die-id": 0,
        "core-id": 1,
        "thread-id": 1,
    }


@pytest.mark.parametrize(
    ("said", "driver", "place"),
    [
        ({"arch": "i686"}, "qemu32-i386-cpu", {"socket-id": 3, "core-id": 0, "thread-id": 0}),
        ({"arch": "s390x", "machine": "s390-ccw-virtio"}, "qemu-s390x-cpu", {"core-id": 3}),
        (
            {"arch": "s390x", "type": "kvm", "cpu": CpuModel("custom", "z14.2", {"vx": "disable"})},
            "z14.2-s390x-cpu",
            {"core-id": 3},
        ),
        (
            {"arch": "loongarch64", "machine": "virt"},
            "la464-loongarch-cpu",
            {"socket-id": 3, "core-id": 0, "thread-id": 0},
        ),
    ],
)
def test_other_architectures_have_their_own_places(said: dict[str, Any], driver: str, place: dict[str, int]) -> None:
    (device,) = arguments(domain_of(4, 1, [3], **said)).device_add
    assert device == {"driver": driver, "id": "vcpu3", **place}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"arch": "ppc64", "machine": "pseries-10.0", "cpu": CpuModel("custom", "POWER9")}, "only QEMU knows it"),
        ({"arch": "aarch64", "machine": "virt"}, "QEMU cannot plug vCPUs into machine virt of aarch64"),
        ({"arch": "ppc64", "machine": "powernv9"}, "QEMU cannot plug vCPUs into machine powernv9 of ppc64"),
        ({"machine": "microvm"}, "QEMU cannot plug vCPUs into machine microvm"),
        ({"arch": "s390x", "type": "kvm"}, "without a CPU model"),
    ],
)
def test_where_only_qemu_could_plug_there_is_no_guess(said: dict[str, Any], words: str) -> None:
    built = arguments(domain_of(4, 1, [3, 2], **said))
    assert built.device_add == ()
    (sentence,) = built.unknown
    assert words in sentence
    assert "vCPUs 3,2 are to be plugged in this order" in sentence
    assert arguments(domain_of(4, 4, **said)).unknown == ()


def test_an_architecture_that_is_not_said_is_named() -> None:
    assert "no architecture" in arguments(domain_of(2, 1, arch=None)).unknown[0]


def test_the_cells_of_a_machine_from_before_memory_objects_are_not_known() -> None:
    old = domain_of(8, 1, numa=CELLS, machine="pc-q35-5.0")
    assert "pc-q35-5.0" in arguments(old).unknown[0]
    assert arguments(replace(old, machine="pc-q35-5.1")).unknown == ()


@pytest.mark.parametrize(
    ("domain", "words"),
    [
        (domain_of(4, 1, topology=EIGHT), "<topology> has 8 vCPUs, and <vcpu> has 4"),
        (domain_of(4, 0, [1]), "start with none"),
        (replace(domain_of(4, 2), vcpus=domain_of(4, 1).vcpus[:2] + domain_of(4, 4).vcpus[2:]), "start with 0,2-3"),
        (domain_of(2, 1, cpu=CpuModel("custom", "qemu64,x2apic=on")), "cannot be a QEMU CPU model"),
        (domain_of(2, 1, cpu=CpuModel("custom", "max", {"a=on,b": "require"})), "cannot be a QEMU CPU feature"),
        (domain_of(2, 1, cpu=CpuModel("custom", "max", {"aes": "perhaps"})), "libvirt has no such policy"),
        (domain_of(2, 1, cpu=CpuModel("guess")), "libvirt has no such mode"),
    ],
)
def test_what_no_qemu_can_be_started_with_is_refused(domain: DomainVcpus, words: str) -> None:
    with pytest.raises(DomainXmlError, match=words.replace("(", r"\(")):
        arguments(domain)


# QEMU's rule, written down a second time: what it lists of its slots, and in which order it makes CPUs.


def started(domain: DomainVcpus, built: LaunchArguments) -> Layout:
    """The layout that a QEMU started with *built* would have."""
    count, *levels = built.smp.split(",")
    sizes = {name: int(size) for name, _, size in (level.partition("=") for level in levels)}
    topology = Topology(sizes.pop("maxcpus", int(count)), **sizes)
    nodes: dict[int, int] = {}
    for option in built.numa[3::4]:
        _, node, *rest = option.split(",")
        for part in rest[:-1]:
            low, _, high = part.removeprefix("cpus=").partition("-")
            nodes |= dict.fromkeys(range(int(low), int(high or low) + 1), int(node.removeprefix("nodeid=")))
    every: list[dict[str, int]] = []
    for socket in range(topology.sockets):
        for die in range(topology.dies):
            for core in range(topology.cores):
                for thread in range(topology.threads):
                    place = {"socket-id": socket, "core-id": core, "thread-id": thread}
                    place |= {"die-id": die} if topology.dies > 1 else {}
                    every.append(place | ({"node-id": nodes[len(every)]} if nodes else {}))
    model = (built.cpu or "").partition(",")[0]
    paths: dict[int, str] = {each: f"/machine/unattached/device[{each}]" for each in range(int(count))}
    for device in built.device_add:
        wanted = {name: value for name, value in device.items() if isinstance(value, int)}
        assert device["driver"] == f"{model}-x86_64-cpu"
        number = every.index(wanted)
        assert number not in paths
        paths[number] = f"/machine/peripheral/{device['id']}"
    readings = [
        SlotReading(f"{model}-x86_64-cpu", 1, CpuProps(place), paths.get(number))
        for number, place in enumerate(every)
    ]
    threads = [ThreadReading(path, 100 + number, number, CpuProps({})) for number, path in enumerate(paths.values())]
    slots = build_slots(readings[::-1], threads)
    vm = replace(Q35, topology=topology)
    assert topology.max_cpus == domain.max
    return Layout(vm=vm, slots=slots, creation=creation_order(slots, threads))


def assert_rebuilt(domain: DomainVcpus, layout: Layout) -> None:
    assert layout.max == domain.max
    assert layout.enabled == domain.enabled
    assert layout.order == (*domain.started_with, *domain.order)
    assert layout.started_with == domain.started_with
    cells = {each: cell.id for cell in domain.numa for each in cell.cpus}
    assert {slot.first: slot.props.number("node-id") for slot in layout.slots} == {
        each: cells.get(each) for each in range(domain.max)
    }


@given(domain=domains())
def test_any_domain_is_rebuilt_slot_for_slot_and_in_its_order(domain: DomainVcpus) -> None:
    assert_rebuilt(domain, started(domain, arguments(domain)))


@given(domain=domains())
def test_the_arguments_of_the_layout_that_came_of_it_rebuild_it_again(domain: DomainVcpus) -> None:
    first = arguments(domain)
    layout = started(domain, first)
    again = arguments(layout)
    assert again.device_add == first.device_add
    assert again.cpu == first.cpu
    cells = started(domain, replace(again, numa=first.numa))
    assert (cells.slots, cells.order) == (layout.slots, layout.order)
    assert len([each for each in again.unknown if "NUMA" in each]) == (
        len({slot.props.number("node-id") for slot in layout.slots}) > 1
    )


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_rebuilt_slot_for_slot_and_in_its_order(state: str) -> None:
    assert_rebuilt(STATES[state], started(STATES[state], arguments(STATES[state])))


# A layout.

PLACED = [each for each in all_captures() if each.arch in {"x86_64", "s390x", "loongarch64"} and any(each.layouts())]
LAYOUTS = dict(captured_layouts())


@pytest.mark.parametrize("capture", PLACED, ids=str)
def test_places_are_those_that_every_recorded_qemu_listed(capture: Capture) -> None:
    for layout in capture.layouts():
        topology = LAYOUTS[f"{capture.name}-0"].vm.topology
        if not layout.vm.can_plug:
            continue
        nodes: dict[int, list[int]] = {}
        for slot in layout.slots:
            nodes.setdefault(slot.props.number("node-id") or 0, []).append(slot.first)
        cells = tuple(NumaCell(node, VcpuMap(ids), 16384) for node, ids in sorted(nodes.items()))
        domain = domain_of(
            layout.max,
            1,
            range(1, layout.max),
            arch=capture.arch,
            topology=topology,
            numa=cells if "node-id" in layout.slots[0].props else (),
        )
        model = (
            layout.slots[0].type.removesuffix(f"-{capture.arch.removesuffix('64')}-cpu").removesuffix("-x86_64-cpu")
        )
        for device, slot in zip(arguments(domain, cpu=model).device_add, layout.slots[1:], strict=True):
            # QEMU places the rest of an s390x CPU by its core-id.
            wanted = {"core-id": slot.props["core-id"]} if capture.arch == "s390x" else dict(slot.props)
            assert device == {"driver": slot.type, "id": f"vcpu{slot.first}", **wanted}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_recorded_layout_gives_back_what_it_was_started_with(name: str) -> None:
    layout = LAYOUTS[name]
    built = arguments(layout)
    later = [slot for first in layout.order if not (slot := layout.slot_of(first)).is_boot]
    if layout.vm.can_plug and layout.slots[0].type:
        assert [device["driver"] for device in built.device_add[-len(later) :]] == [slot.type for slot in later]
        assert built.cpu is not None
        assert layout.slots[0].type.startswith(f"{built.cpu}-")
    count = len(layout.enabled) - sum(layout.slot_of(int(str(each["id"])[4:])).count for each in built.device_add)
    assert int(built.smp.partition(",")[0]) == count
    assert any("QEMU does not report" in sentence for sentence in built.unknown)


@pytest.mark.parametrize(
    ("layout", "boot", "ids"),
    [
        (layout_of(8, [0, 1, 4, 2], boot=2), 2, ["vcpu4", "vcpu2"]),
        (layout_of(8, [0, 2, 3], boot=3), 1, ["vcpu2", "vcpu3"]),
        (layout_of(8, [0, 2, 3, 1], boot=3), 1, ["vcpu2", "vcpu3", "vcpu1"]),
        (layout_of(8, [0, 1, 2, 3], boot=3), 3, ["vcpu3"]),
        (layout_of(8, [0, 1, 4, 5, 2, 3], boot=6), 2, ["vcpu4", "vcpu5", "vcpu2", "vcpu3"]),
        (layout_of(8, [0, 1, 4], boot=2, foreign=[4]), 2, ["vcpu4"]),
        (layout_of(2, [0, 1], boot=1, count=4), 4, ["vcpu4"]),
    ],
)
def test_a_layout_starts_with_its_unbroken_boot_prefix(layout: Layout, boot: int, ids: list[str]) -> None:
    built = arguments(layout)
    assert int(built.smp.partition(",")[0]) == boot
    assert [device["id"] for device in built.device_add] == ids


def test_a_layout_says_what_it_does_not_know_and_takes_what_the_caller_does() -> None:
    layout = layout_of(4, [0, 2], boot=1)
    assert arguments(layout).smp == "1,maxcpus=4"
    topology, model = arguments(layout).unknown
    assert "topology" in topology
    assert "besides the model qemu64" in model
    known = replace(layout, vm=replace(Q35, topology=Topology(4, modules=2, cores=2)))
    told = arguments(known, cpu="qemu64,x2apic=on")
    assert told.argv[:4] == [
        "-cpu",
        "qemu64,x2apic=on",
        "-smp",
        "1,maxcpus=4,sockets=1,dies=1,modules=2,cores=2,threads=1",
    ]
    assert told.unknown == ()


@pytest.mark.parametrize("source", [b"<domain/>", "vm.xml"])
def test_what_is_no_value_is_refused_with_what_makes_one(source: Any) -> None:
    with pytest.raises(TypeError, match=r"what parse\(\) reads from a document, not"):
        arguments(source)
