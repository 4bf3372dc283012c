"""libvirt as the oracle of where threads run: by the same document, after the same hotplug and the same changes."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qmpvcpu.domainxml import DomainVcpus, parse, placement_of, render, update, validate
from qmpvcpu.domainxml.next_boot import with_max, with_places
from qmpvcpu.errors import ConfigDeniedError
from qmpvcpu.model.placement import Place, Placement, SchedPolicy, Scheduler
from qmpvcpu.model.vcpumap import VcpuMap
from tests.domainxml.documents import started_from
from tests.domainxml.domains import document, domain_of_rows
from tests.libvirt.console import Console, open_console
from tests.libvirt.daemon import Libvirt, VirshError
from tests.libvirt.test_next_boot import on_libvirt

pytestmark = pytest.mark.libvirt

HOST = VcpuMap(os.sched_getaffinity(0))
FIRST, LAST = min(HOST), max(HOST)
POLICIES = {
    os.SCHED_OTHER: SchedPolicy.OTHER,
    os.SCHED_BATCH: SchedPolicy.BATCH,
    os.SCHED_IDLE: SchedPolicy.IDLE,
    os.SCHED_FIFO: SchedPolicy.FIFO,
    os.SCHED_RR: SchedPolicy.RR,
}
MAIN = -1
"""Stands for QEMU's main thread where vCPU ids are keys."""


@pytest.fixture
def console(libvirt: Libvirt) -> Iterator[Console]:
    with open_console(libvirt) as opened:
        yield opened


def written(cpuset: str, tunes: str, rows: str = "00---") -> bytes:
    xml = document(on_libvirt(domain_of_rows(rows))).decode()
    given = f" cpuset='{cpuset}'" if cpuset else ""
    tuned = re.sub(r"<cputune>.*</cputune>\n?", "", xml, flags=re.DOTALL).replace(
        "<vcpu placement='static'", f"<vcpu placement='static'{given}"
    )
    return tuned.replace("<os>", f"<cputune>{tunes}</cputune>\n<os>", 1).encode()


def defined(console: Console, xml: bytes) -> bytes:
    refusal = console.refusal(xml)
    assert not refusal, refusal
    return console.ask("dumpxml --inactive vm").encode()


def found() -> dict[int, Place]:
    """Return where the threads of the QEMU of "vm" run, by vCPU id, as the kernel tells."""
    pids = [each for each in Path("/proc").iterdir() if each.name.isdigit() and b"guest=vm," in command(each)]
    assert len(pids) == 1
    places = {}
    for task in (pids[0] / "task").iterdir():
        name = re.fullmatch(r"CPU (\d+)/(TCG|KVM)", (task / "comm").read_text().strip())
        if name or task.name == pids[0].name:
            places[int(name[1]) if name else MAIN] = place_of(int(task.name))
    return places


def command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def place_of(tid: int) -> Place:
    policy = POLICIES[os.sched_getscheduler(tid)]
    priority = os.sched_getparam(tid).sched_priority if policy.is_realtime else None
    return Place(VcpuMap(os.sched_getaffinity(tid)), Scheduler(policy, priority))


def expected(domain: DomainVcpus, started: VcpuMap) -> dict[int, Place]:
    """Return where we would have the same threads of a VM that was *started* with these vCPUs.

    A thread for which no scheduler is named has the one that it was born with: that of QEMU's main thread, which has
    the emulator's only once the VM has started.
    """
    placement = placement_of(domain)
    default = Place(HOST, Scheduler(SchedPolicy.OTHER))
    emulator = placement.of_emulator().over(default)
    born = {vcpu: default if vcpu in started else Place(HOST, emulator.scheduler) for vcpu in domain.enabled}
    return {MAIN: emulator, **{vcpu: placement.of_vcpu(vcpu).over(place) for vcpu, place in born.items()}}


TUNES = {
    "nothing": ("", ""),
    "a cpuset": (f"{LAST}", ""),
    "pins over nothing": ("", f"<vcpupin vcpu='1' cpuset='{LAST}'/><vcpupin vcpu='3' cpuset='{FIRST}'/>"),
    "pins over a cpuset": (f"{FIRST}", f"<vcpupin vcpu='0' cpuset='{LAST}'/><vcpupin vcpu='4' cpuset='{LAST}'/>"),
    "a pin of the emulator over nothing": ("", f"<emulatorpin cpuset='{LAST}'/>"),
    "a pin of the emulator over a cpuset": (f"{FIRST}", f"<emulatorpin cpuset='{LAST}'/>"),
    "a pin of a vCPU that cannot be": (f"{FIRST}", f"<vcpupin vcpu='5' cpuset='{LAST}'/>"),
    "schedulers": (
        "",
        "<vcpusched vcpus='0,3' scheduler='batch'/><vcpusched vcpus='4' scheduler='idle'/>",
    ),
    "real time": (
        f"{LAST}",
        "<emulatorsched scheduler='rr' priority='2'/><vcpusched vcpus='1,3' scheduler='fifo' priority='1'/>",
    ),
    "a scheduler of the emulator alone": ("", "<emulatorsched scheduler='batch'/>"),
}


@pytest.mark.parametrize("case", TUNES)
def test_threads_run_where_we_read_in_the_document_before_and_after_a_hotplug(console: Console, case: str) -> None:
    domain = parse(defined(console, written(*TUNES[case])))
    console.ask("start vm --paused")
    assert found() == expected(domain, domain.enabled)
    for vcpu in (3, 4):
        console.ask(f"setvcpu vm {vcpu} --enable --live")
        live = parse(console.ask("dumpxml vm").encode())
        assert vcpu in live.enabled
        assert found() == expected(live, domain.enabled)
    assert placement_of(live) == placement_of(domain)


# The next boot: the same by virsh and by us.


@dataclass(frozen=True)
class Change:
    """One change of the definition, in virsh's words and in ours."""

    words: str
    placement: Placement


CHANGES = (
    Change(f"vcpupin vm 1 {FIRST} --config", Placement({1: Place(VcpuMap([FIRST]))})),
    Change(f"vcpupin vm 1 {LAST} --config", Placement({1: Place(VcpuMap([LAST]))})),
    Change(f"vcpupin vm 4 {FIRST} --config", Placement({4: Place(VcpuMap([FIRST]))})),
    Change(f"vcpupin vm 0 {LAST} --config", Placement({0: Place(VcpuMap([LAST]))})),
    Change(f"emulatorpin vm {LAST} --config", Placement(emulator=Place(VcpuMap([LAST])))),
    Change(f"emulatorpin vm {FIRST} --config", Placement(emulator=Place(VcpuMap([FIRST])))),
)
IDLE = "<vcpusched vcpus='0-2' scheduler='idle'/><vcpusched vcpus='4' scheduler='rr' priority='7'/>"
BASES = {
    "nothing": TUNES["nothing"],
    "pins": TUNES["pins over a cpuset"],
    "all": (
        f"{FIRST}",
        f"<vcpupin vcpu='3' cpuset='{LAST}'/><emulatorpin cpuset='{LAST}'/><emulatorsched scheduler='batch'/>{IDLE}",
    ),
}


@pytest.mark.parametrize("base", BASES)
def test_pins_of_the_next_boot_are_written_as_virsh_writes_them(console: Console, base: str) -> None:
    theirs = ours = defined(console, written(*BASES[base]))
    for change in CHANGES:
        console.ask(change.words)
        theirs = console.ask("dumpxml --inactive vm").encode()
        ours = update(ours, with_places(parse(ours), change.placement))
        assert ours == theirs, change.words


def test_a_lower_maximum_drops_what_virsh_drops(console: Console) -> None:
    ours = parse(defined(console, written(*BASES["all"], rows="00---")))
    for maximum in (4, 3, 5):
        console.ask(f"setvcpus vm {maximum} --maximum --config")
        ours = with_max(ours, maximum)
        assert placement_of(parse(console.ask("dumpxml --inactive vm").encode())) == placement_of(ours)


def test_a_vcpu_beyond_the_maximum_is_refused_by_both(console: Console) -> None:
    domain = parse(defined(console, written(*BASES["nothing"])))
    with pytest.raises(VirshError, match="vcpu 5 is out of range of persistent cpu count"):
        console.ask(f"vcpupin vm 5 {FIRST} --config")
    with pytest.raises(ConfigDeniedError, match="the document has vCPUs 0 to 4"):
        with_places(domain, Placement({5: Place(VcpuMap([FIRST]))}))


@pytest.mark.parametrize("case", TUNES)
def test_what_is_written_anew_libvirt_takes_and_prints_as_it_is(libvirt: Libvirt, case: str) -> None:
    domain = parse(written(*TUNES[case]))
    layout = started_from(domain)
    xml = render(replace(layout, vm=replace(layout.vm, accelerator="tcg")), placement=placement_of(domain))
    assert validate(xml) == ()
    libvirt.define(xml)
    printed = libvirt.inactive("vm").decode()
    for element in ("<vcpu placement.*?</vcpu>", "  <cputune>.*?</cputune>\n"):
        said = re.search(element, xml.decode(), re.DOTALL)
        assert (said[0] if said else "cputune>") in printed or not said
    assert placement_of(parse(printed.encode())) == placement_of(domain)


def test_libvirt_refuses_to_plug_what_it_cannot_place_and_so_do_we_when_it_is_read(console: Console) -> None:
    wrong = "<vcpusched vcpus='4' scheduler='fifo' priority='100'/>"
    defined(console, written("", wrong))
    console.ask("start vm --paused")
    with pytest.raises(VirshError, match="Scheduler priority 100 out of range"):
        console.ask("setvcpu vm 4 --enable --live")
