"""libvirt's own command lines and device_adds beside ours."""

import asyncio
import os
import re
import shlex
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lxml import etree

import qmpvcpu
from qmpvcpu.domainxml import DomainVcpus, parse, render
from qmpvcpu.launch import LaunchArguments, arguments
from qmpvcpu.testing import QemuProcess
from tests.domainxml.documents import SAMPLES
from tests.launch.domains import STATES, document_of, domain_of, domains
from tests.launch.vms import assert_is
from tests.libvirt.console import Console, open_console
from tests.libvirt.daemon import Libvirt, VirshError
from tests.libvirt.microguests import MonitorLog
from tests.substrates import qemus

pytestmark = pytest.mark.libvirt

QEMUS = qemus()
VERSIONS = list(QEMUS)
NAME = f"launch-{os.getpid()}"  # other QEMUs may run on this machine
COMPARED = ("-cpu", "-m", "-smp", "-object", "-numa")
CPU_MAP = Path("/usr/share/libvirt/cpu_map")


def ours(built: LaunchArguments) -> list[tuple[str, str]]:
    words = built.boot_argv
    memory = [("-m", str(built.memory_mib))] if built.memory_mib else []
    return sorted([*zip(words[::2], words[1::2], strict=True), *memory])


def theirs(words: list[str], built: LaunchArguments) -> list[tuple[str, str]]:
    """What of libvirt's command line is about vCPUs and their cells."""
    pairs = [(option, value) for option, value in pairwise(words) if option in COMPARED]
    # Other objects, and the memory of a VM without cells, are no matter of vCPUs.
    kept = [pair for pair in pairs if pair[0] != "-object" or '"id":"ram-node' in pair[1]]
    return sorted(pair for pair in kept if pair[0] != "-m" or built.memory_mib)


def on(domain: DomainVcpus, version: str, **changes: Any) -> DomainVcpus:
    """Put *domain* on the newest machine type of a QEMU that is here."""
    return replace(domain, name=NAME, machine=f"pc-q35-{version}", emulator=str(QEMUS[version]), **changes)


class Native:
    """libvirt, asked which command line it would make of a document."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def ask(self, command: str) -> str:
        return self._console.ask(command)

    def words(self, xml: bytes) -> list[str]:
        with tempfile.NamedTemporaryFile(suffix=".xml") as file:
            file.write(xml)
            file.flush()
            return shlex.split(self._console.ask(f"domxml-to-native qemu-argv --xml {file.name}"))

    def compare(self, xml: bytes) -> None:
        built = arguments(parse(xml))
        assert ours(built) == theirs(self.words(xml), built)


@pytest.fixture
def native(libvirt: Libvirt) -> Any:
    with open_console(libvirt) as console:
        yield Native(console)


@pytest.mark.parametrize("version", VERSIONS)
@given(domain=domains())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_libvirt_would_give_qemu_the_same_machine(native: Native, version: str, domain: DomainVcpus) -> None:
    native.compare(document_of(on(domain, version)))


FEATURE = "<feature policy='{}' name='{}'/>"
MODEL = "<model fallback='allow'>{}</model>"
EXACT = " mode='custom' match='exact' check='none'"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("kind", "said", "cpu"),
    [
        ("qemu", " mode='maximum'", ""),
        ("qemu", EXACT, MODEL.format("Nehalem") + FEATURE.format("disable", "x2apic")),
        ("kvm", "", ""),
        ("kvm", " mode='host-passthrough' check='none'", ""),
        ("kvm", " mode='host-passthrough' check='none' migratable='off'", FEATURE.format("disable", "vmx")),
        ("kvm", " mode='maximum' migratable='on'", ""),
        ("kvm", EXACT, MODEL.format("qemu64") + FEATURE.format("force", "sse4.2") + FEATURE.format("forbid", "aes")),
    ],
)
def test_every_way_to_name_a_model_is_spelled_alike(
    native: Native, version: str, kind: str, said: str, cpu: str
) -> None:
    domain = on(domain_of(8, 2, [5]), version, type=kind)
    native.compare(document_of(domain, said=said, cpu=cpu))


ON_OFF = st.sampled_from(["on", "off"])
ENLIGHTENMENTS = [
    *("relaxed", "vapic", "vpindex", "runtime", "synic", "reset", "frequencies", "reenlightenment", "tlbflush"),
    *("ipi", "evmcs", "avic"),
]


def one_of(*texts: str) -> st.SearchStrategy[str]:
    return st.sampled_from(["", *texts])


@st.composite
def features(draw: st.DrawFn) -> str:
    """What ``<features>`` says that goes into -cpu, each part of it in any state, or not at all."""
    inside = [
        f"<{each} state='{draw(ON_OFF)}'/>" for each in draw(st.lists(st.sampled_from(ENLIGHTENMENTS), unique=True))
    ]
    inside.append(draw(one_of("<spinlocks state='on' retries='8191'/>", "<spinlocks state='off'/>")))
    inside.append(draw(one_of("<vendor_id state='on' value='KVM Hv'/>", "<vendor_id state='off' value='x'/>")))
    inside.append(draw(one_of("<stimer state='on'/>", "<stimer state='on'><direct state='on'/></stimer>")))
    mode = draw(one_of(" mode='custom'", " mode='passthrough'"))
    hyperv = f"<hyperv{mode}>{''.join(draw(st.permutations(inside)))}</hyperv>"
    of_kvm = draw(st.lists(st.sampled_from(["hidden", "hint-dedicated", "poll-control", "pv-ipi"]), unique=True))
    kvm = "".join(f"<{each} state='{draw(ON_OFF)}'/>" for each in of_kvm)
    return "".join(
        [
            draw(one_of("<apic/>", "<apic eoi='on'/>", "<apic eoi='off'/><apic/>")),
            draw(one_of("<pvspinlock/>", "<pvspinlock state='off'/>", "<pvspinlock state='on'/>")),
            draw(one_of("<pmu/>", "<pmu state='off'/>")),
            draw(one_of(hyperv)),
            draw(one_of(f"<kvm>{kvm}</kvm>")),
        ]
    )


@st.composite
def clocks(draw: st.DrawFn) -> str:
    present = [
        f"<timer name='{each}'{said}/>" for each in ("kvmclock", "hypervclock", "hpet") for said in STATES_OF_TIMERS
    ]
    timers = draw(st.lists(st.sampled_from(present), max_size=3, unique_by=lambda each: each[:18]))
    return f"<clock offset='utc'>{''.join(timers)}</clock>"


STATES_OF_TIMERS = (" present='yes'", " present='no'", "")
CPUS = [
    ("qemu", "", "<model vendor_id='AuthenticAMD'>Nehalem</model>"),
    ("qemu", " mode='maximum'", ""),
    ("kvm", " mode='host-passthrough' migratable='off'", ""),
    ("kvm", "", ""),
]


@st.composite
def cpus(draw: st.DrawFn) -> bytes:
    """A domain with any of what libvirt makes words of -cpu of."""
    kind, said, cpu = draw(st.sampled_from(CPUS))
    cpu += draw(one_of("<cache mode='emulate' level='3'/>", "<cache mode='disable'/>"))
    cpu += draw(one_of("<maxphysaddr mode='emulate' bits='42'/>", "<maxphysaddr mode='passthrough'/>"))
    xml = document_of(on(domain_of(2, 2), VERSIONS[0], type=kind), said=said, cpu=cpu).decode()
    xml = xml.replace("<acpi/>", f"<acpi/>{draw(features())}").replace("<devices>", f"{draw(clocks())}<devices>")
    return xml.replace("</devices>", draw(one_of("<panic model='hyperv'/>")) + "</devices>").encode()


@given(xml=cpus())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_else_libvirt_gives_the_cpu_is_given_alike(native: Native, xml: bytes) -> None:
    assert parse(xml).unread == ()
    native.compare(xml)


def test_the_frequency_of_the_host_is_given_alike(native: Native) -> None:
    capabilities = etree.fromstring(native.ask("capabilities"))
    counter = capabilities.find("host/cpu/counter[@name='tsc']")
    assert counter is not None
    clock = f"<clock offset='utc'><timer name='tsc' frequency='{counter.get('frequency')}'/></clock><devices>"
    native.compare(document_of(on(domain_of(2, 2), VERSIONS[0])).replace(b"<devices>", clock.encode()))


@pytest.mark.parametrize("emulator", ["/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-system-i386"])
@pytest.mark.parametrize("said", ["", " mode='maximum'", " mode='host-passthrough'"])
def test_i686_is_given_alike_to_either_emulator(native: Native, emulator: str, said: str) -> None:
    domain = replace(domain_of(2, 2), name=NAME, arch="i686", machine="pc", emulator=emulator, type="kvm")
    native.compare(document_of(domain, said=said))


def test_a_domain_without_emulator_is_that_of_the_i386_one(native: Native) -> None:
    domain = replace(domain_of(2, 2), name=NAME, arch="i686", machine="pc")
    native.compare(document_of(domain))


@pytest.mark.parametrize("emulator", ["qemu-system-x86_64", "qemu-system-i386"])
def test_libvirt_plugs_into_i686_the_cpus_of_its_emulator(libvirt: Libvirt, emulator: str) -> None:
    domain = replace(domain_of(4, 1, [2]), name=NAME, arch="i686", machine="pc", emulator=f"/usr/bin/{emulator}")
    xml = document_of(domain)
    log = MonitorLog(libvirt)
    start_paused(libvirt, xml)
    adds = [each["arguments"] for each in log.sent() if each["execute"] == "device_add"]
    assert adds == [dict(device) for device in arguments(parse(xml)).device_add] != []


def test_every_feature_that_libvirt_knows_is_spelled_alike(native: Native) -> None:
    tree = etree.parse(CPU_MAP / "x86_features.xml")
    names = [str(feature.get("name")) for feature in tree.iterfind("feature")]
    assert len(names) > 200
    cpu = MODEL.format("qemu64") + "".join(FEATURE.format("require", name) for name in names)
    native.compare(document_of(on(domain_of(2, 2), VERSIONS[0]), said=EXACT, cpu=cpu))


# What libvirt adds to a model, or puts in its place: docs/launch.md has these, with the reason.
ADDED = {
    "Dhyana": ",monitor=off",
    "EPYC": ",monitor=off",
    "EPYC-IBPB": ",monitor=off",
    "Opteron_G3": ",monitor=off",
    "Icelake-Server": ",intel-pt=off",
    "Icelake-Server-noTSX": ",intel-pt=off",
}
REPLACED = {"Icelake-Client", "Icelake-Client-noTSX", "cpu64-rhel5", "cpu64-rhel6", "pentiumpro"}


def test_every_model_that_libvirt_knows_is_named_alike_but_for_those_on_the_list(native: Native) -> None:
    files = sorted(CPU_MAP.glob("x86_*.xml"))
    models = [str(model.get("name")) for file in files for model in etree.parse(file).iterfind("model")]
    assert len(models) > 50
    domain = on(domain_of(2, 2), VERSIONS[0])
    found = {}
    for model in models:
        xml = document_of(domain, said=EXACT, cpu=MODEL.format(model))
        words = dict(pairwise(native.words(xml)))
        built = arguments(parse(xml))
        if words["-cpu"] != built.cpu:
            found[model] = words["-cpu"]
    assert {model: f"{model}{rest}" for model, rest in ADDED.items()} == {
        model: cpu for model, cpu in found.items() if model not in REPLACED
    }
    assert found.keys() <= ADDED.keys() | REPLACED
    page = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
    assert [model for model in found if f"`{model}`" not in page] == []


# Where no libvirt here can be asked: it lacks the QEMU of that architecture, the daemon that places memory, or a host
# with caches to share. With its words for a cell without memory no QEMU starts.
NOT_ASKED = {
    *(
        "clusters-aarch64",
        "ppc64-whole-cores",
        "s390x",
        "placement-auto",
        "placement-derived",
        "schedulers-of-several",
        "cache-groups",
    ),
    "numa-cell-without-memory",
}


@pytest.mark.parametrize("case", sorted(SAMPLES.keys() - NOT_ASKED))
def test_of_every_sample_the_words_are_the_same_but_for_what_is_said_to_be_unknown(native: Native, case: str) -> None:
    built = arguments(parse(SAMPLES[case]))
    said = " ".join(built.unknown)
    unlike = set(theirs(native.words(SAMPLES[case]), built)) ^ set(ours(built))
    explained = {
        (option, value)
        for option, value in unlike
        if (option == "-cpu" and "host-model" in said)
        or (value.startswith("dist,") and "numa/cell/distances" in said)
    }
    assert unlike == explained


def command_line(name: str) -> list[str]:
    """The command line of the QEMU that libvirt runs under *name*."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"guest={name},debug-threads=on" in words:
            return words
    raise AssertionError(f"no QEMU runs {name}")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("state", STATES)
async def test_libvirt_starts_it_with_the_same_words_and_plugs_the_same_vcpus(
    libvirt: Libvirt, version: str, state: str
) -> None:
    domain = on(STATES[state], version)
    xml = document_of(domain)
    built = arguments(parse(xml))
    log = MonitorLog(libvirt)
    await asyncio.to_thread(start_paused, libvirt, xml)
    words = command_line(domain.name)
    assert theirs(words, built) == ours(built)
    adds = [each["arguments"] for each in log.sent() if each["execute"] == "device_add"]
    assert adds == [dict(device) for device in built.device_add]
    vcpus = re.findall(r"<vcpu id=.*/>", libvirt.virsh("dumpxml", domain.name))
    # A QEMU of ours, with all of it on its command line.
    machine = ["-machine", str(domain.machine), "-accel", "tcg", "-m", "64", "-S"]
    async with QemuProcess(QEMUS[version], [*machine, *built.argv]) as process:
        await process.wait_ready()
        async with qmpvcpu.attach(process.qmp) as vm:
            assert_is(vm.layout, domain)
            rendered = render(vm.layout).decode()
    assert len(vcpus) == domain.max
    assert re.findall(r"<vcpu id=.*/>", rendered) == vcpus


def start_paused(libvirt: Libvirt, xml: bytes) -> None:
    libvirt.define(xml)
    try:
        libvirt.virsh("start", NAME, "--paused")
    except VirshError as error:
        pytest.fail(f"libvirt does not start it: {error}")
