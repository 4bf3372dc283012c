"""Two VMs of one document and the places of their threads: one is changed by libvirt, a QEMU of our own by us."""

import asyncio
import contextlib
import os
import random
import re
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import qmpvcpu
from qmpvcpu import Affect, Place, Placement, PlacementError, StepDeniedError, VcpuController, VcpuMap
from qmpvcpu.domainxml import DomainVcpus, parse
from qmpvcpu.qmp.address import peer_pid
from qmpvcpu.testing import MicroGuest, QemuProcess
from tests.libvirt.console import Console, open_console
from tests.libvirt.daemon import Libvirt, VirshError
from tests.libvirt.microguests import Domain, Shape, microguest_domain, start, vcpu_side
from tests.libvirt.tolerated import OTHER_THREADS, Difference

VCPUS: Final = 8
BOOT: Final = 2
HOST: Final = VcpuMap(os.sched_getaffinity(0))
_FLAGS: Final = {Affect.LIVE: "--live", Affect.CONFIG: "--config", Affect.BOTH: "--live --config"}
_POLICIES: Final = {
    os.SCHED_OTHER: "other",
    os.SCHED_BATCH: "batch",
    os.SCHED_IDLE: "idle",
    os.SCHED_FIFO: "fifo",
    os.SCHED_RR: "rr",
}
MAIN: Final = "main thread"
OTHERS: Final = "other threads"

Kind = Literal["plug", "unplug", "pin", "emulatorpin"]


@dataclass(frozen=True)
class Change:
    """What both are asked for.

    Attributes:
        kind: Which call it is.
        vcpu: The vCPU, if it is about one.
        cpus: The host CPUs, if it is about some.
        affect: Live, next boot, or both.
    """

    kind: Kind
    vcpu: int = 0
    cpus: str = ""
    affect: Affect = Affect.LIVE

    def __str__(self) -> str:
        return f"{self.kind} {self.vcpu} {self.cpus} {self.affect.value}"


@dataclass(frozen=True)
class Side:
    """What came of a change on one side.

    Attributes:
        refused: True if it was.
        threads: Where each vCPU's thread and the main thread run, and how they are scheduled.
        others: Where QEMU's other threads run.
        live: What the live document says of places, and of vCPUs.
        next_boot: What that of the next boot says of places.
    """

    refused: bool
    threads: Mapping[int | str, str]
    others: frozenset[str]
    live: object
    next_boot: object


@dataclass
class PlacedTwins:
    """The two VMs, and what comparing them came to.

    Attributes:
        virsh: Where libvirt is asked to change the VM ``theirs``.
        their_pid: Its QEMU, as this host numbers it.
        look: A look at it past libvirt.
        ours: The VM that we change.
        our_pid: Its QEMU.
        record: Its record, which was started from libvirt's document.
        config: The document of its next boot, which is libvirt's too.
        compared: How many changes were.
        tolerated: The differences that are on the list, as far as they were met.
        unexplained: All others.
    """

    virsh: Console
    their_pid: int
    look: VcpuController
    ours: VcpuController
    our_pid: int
    record: Path
    config: Path
    compared: int = 0
    tolerated: set[Difference] = field(default_factory=set)
    unexplained: list[str] = field(default_factory=list)

    async def compare(self, change: Change | None = None) -> None:
        """Have both do *change*, and compare what became of the threads and of the documents; None: as they are."""
        theirs, ours = await asyncio.gather(self._libvirt(change), self._us(change))
        self.compared += 1
        for what, one, other in (
            ("refused", theirs.refused, ours.refused),
            ("threads", theirs.threads, ours.threads),
            ("live document", theirs.live, ours.live),
            ("next boot", theirs.next_boot, ours.next_boot),
        ):
            if one != other:
                told = f"{what} after {change} (no. {self.compared})"
                self.unexplained.append(f"{told}\nlibvirt: {one}\nours:    {other}")
        if theirs.others != ours.others:
            # Ours are where the main thread is.
            self.tolerated.add(OTHER_THREADS)
            if ours.others != {ours.threads[MAIN].partition(", ")[0]}:
                self.unexplained.append(f"other threads after {change}: {ours.others}")

    async def _libvirt(self, change: Change | None) -> Side:
        refused = False
        if change is not None:
            try:
                await asyncio.to_thread(self.virsh.ask, _virsh(change))
            except VirshError:
                refused = True
        layout = await self.look.refresh()
        threads, others = seen(self.their_pid, _tids(layout))
        live = (await asyncio.to_thread(self.virsh.ask, "dumpxml theirs")).encode()
        inactive = (await asyncio.to_thread(self.virsh.ask, "dumpxml --inactive theirs")).encode()
        return Side(refused, threads, others, (_places(live), vcpu_side(live)), _places(inactive))

    async def _us(self, change: Change | None) -> Side:
        refused = False
        if change is not None:
            try:
                await self._ask_us(change)
            except (StepDeniedError, PlacementError, ValueError):
                refused = True
        layout = await self.ours.refresh()
        threads, others = seen(self.our_pid, _tids(layout))
        live = self.record.read_bytes()
        return Side(refused, threads, others, (_places(live), vcpu_side(live)), _places(self.config.read_bytes()))

    async def _ask_us(self, change: Change) -> None:
        match change.kind:
            case "plug":
                await self.ours.plug(change.vcpu)
            case "unplug":
                await self.ours.unplug(change.vcpu)
            case "pin":
                placement = Placement({change.vcpu: Place.on(change.cpus)})
                await self.ours.host.place(placement, affect=change.affect)
            case "emulatorpin":
                await self.ours.host.place(Placement(emulator=Place.on(change.cpus)), affect=change.affect)


def _virsh(change: Change) -> str:
    match change.kind:
        case "plug":
            return f"setvcpu theirs {change.vcpu} --enable --live"
        case "unplug":
            return f"setvcpu theirs {change.vcpu} --disable --live"
        case "pin":
            return f"vcpupin theirs {change.vcpu} {change.cpus} {_FLAGS[change.affect]}"
    return f"emulatorpin theirs {change.cpus} {_FLAGS[change.affect]}"


def _tids(layout: Any) -> dict[int, int]:
    return {vcpu: tid for slot in layout.slots for vcpu, tid in zip(slot.ids, slot.host_tids, strict=False) if tid}


def seen(pid: int, tids: Mapping[int, int]) -> tuple[dict[int | str, str], frozenset[str]]:
    """Return where the vCPU threads and the main thread of a QEMU run, and all others.

    Args:
        pid: Its process, as this host numbers it.
        tids: The vCPU threads by vCPU id, as QEMU numbers them.
    """
    vcpus = {tid: vcpu for vcpu, tid in tids.items()}
    threads: dict[int | str, str] = {}
    others = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a worker that ends meanwhile
            status = (task / "status").read_text()
            number = int(re.findall(r"^NSpid:.*\t(\d+)$", status, re.MULTILINE)[0])
            tid = int(task.name)
            cpus = str(VcpuMap(os.sched_getaffinity(tid)))
            policy = _POLICIES[os.sched_getscheduler(tid)]
            how = f"{cpus}, {policy}:{os.sched_getparam(tid).sched_priority}"
            if number in vcpus:
                threads[vcpus[number]] = how
            elif tid == pid:
                threads[MAIN] = how
            elif (task / "comm").read_text() != "kvm-nx-lpage-re\n":  # the kernel's own
                others.add(cpus)
    return threads, frozenset(others)


def _places(xml: bytes) -> object:
    domain: DomainVcpus = parse(xml)
    tune = re.findall(r"^  <cputune>\n(.*?)^  </cputune>", xml.decode(), re.MULTILINE | re.DOTALL)
    said = (domain.placement, domain.cpuset, domain.pins, domain.emulator_pin, domain.scheds, domain.emulator_sched)
    return said, tune


def placed(document: bytes, *, cputune: str = "", cpuset: str = "") -> bytes:
    """Return *document* with a ``<cputune>`` and a ``<vcpu cpuset>``."""
    text = document.decode()
    if cputune:
        text = text.replace("  <os>", f"  <cputune>{cputune}</cputune>\n  <os>")
    if cpuset:
        text = text.replace("<vcpu placement='static'", f"<vcpu placement='static' cpuset='{cpuset}'")
    return text.encode()


def pid_of(domain: Domain) -> int:
    """Return the QEMU of a domain, as this host numbers it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(domain.qmp))
        pid = peer_pid(connection)
    assert pid is not None
    return pid


@contextlib.asynccontextmanager
async def running_placed_twins(
    libvirt: Libvirt,
    qemu: Path,
    folder: Path,
    *,
    accel: Literal["kvm", "tcg"] = "kvm",
    cputune: str = "",
    cpuset: str = "",
) -> AsyncIterator[PlacedTwins]:
    """Have libvirt start one VM, start the other ourselves, and put its threads where the same document has them."""
    domain, document = microguest_domain(libvirt, "theirs", qemu, accel=accel, shape=Shape(VCPUS, BOOT))
    await asyncio.to_thread(start, domain, placed(document, cputune=cputune, cpuset=cpuset), define=True)
    pid = pid_of(domain)
    record, config = folder / "record.xml", folder / "config.xml"
    base = libvirt.inactive("theirs")
    config.write_bytes(base)
    async with (
        MicroGuest(qemu, accel=accel, boot=BOOT, max_vcpus=VCPUS) as guest,
        qmpvcpu.attach(domain.qmp, resync_interval=None) as look,
        qmpvcpu.attach(guest.qmp, name="theirs", record=record, base=base, config=config) as ours,
    ):
        await ours.host.place()
        await ours.set_map(range(BOOT))
        process: QemuProcess = guest.process
        with open_console(libvirt) as virsh:
            yield PlacedTwins(virsh, pid, look, ours, process.pid, record, config)


def generated_document(choose: random.Random) -> tuple[str, str]:
    """Return a ``<cputune>`` and a ``<vcpu cpuset>``; either may be empty."""
    sets = _sets()
    tune = [
        f"<vcpupin vcpu='{vcpu}' cpuset='{choose.choice(sets)}'/>" for vcpu in range(VCPUS) if choose.random() < 0.4
    ]
    if choose.random() < 0.5:
        tune.append(f"<emulatorpin cpuset='{choose.choice(sets)}'/>")
    if choose.random() < 0.5:
        tune.append(f"<emulatorsched {choose.choice(_SCHEDULERS)}/>")
    half = choose.randint(1, VCPUS - 1)
    tune += [
        f"<vcpusched vcpus='{vcpus}' {choose.choice(_SCHEDULERS)}/>"
        for vcpus in (f"0-{half - 1}", f"{half}-{VCPUS - 1}")
        if choose.random() < 0.5
    ]
    choose.shuffle(tune)
    return "".join(tune), choose.choice(["", *sets])


_SCHEDULERS: Final = (
    "scheduler='batch'",
    "scheduler='idle'",
    "scheduler='fifo' priority='1'",
    "scheduler='rr' priority='3'",
)


def _sets() -> list[str]:
    return [str(HOST), str(min(HOST)), str(max(HOST))]


def generated_story(choose: random.Random, length: int) -> list[Change]:
    """Return changes, refused ones among them."""
    plugged = set(range(BOOT))
    story: list[Change] = []
    while len(story) < length:
        cpus, affect = choose.choice(_sets()), choose.choice(list(Affect))
        match choose.randrange(5):
            case 0 if len(plugged) > BOOT:
                vcpu = choose.choice(sorted(plugged - set(range(BOOT))))
                plugged.discard(vcpu)
                story.append(Change("unplug", vcpu))
            case 0 | 1 if len(plugged) < VCPUS:
                vcpu = choose.choice(sorted(set(range(VCPUS)) - plugged))
                plugged.add(vcpu)
                story.append(Change("plug", vcpu))
            case 2 | 3:
                vcpu = choose.randrange(VCPUS + 1)  # one beyond the maximum is refused
                story.append(Change("pin", vcpu, cpus, affect))
            case 4:
                story.append(Change("emulatorpin", 0, cpus, affect))
    return story
