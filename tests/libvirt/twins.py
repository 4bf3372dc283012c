"""Two VMs of one document: libvirt changes the one, we the other, and they are compared after each step."""

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import qmpvcpu
from qmpvcpu import Layout, StepDeniedError, TransitionError, VcpuController
from qmpvcpu.domainxml import render
from qmpvcpu.errors import DenialReason
from qmpvcpu.model.transition import Action
from tests.exchange import sent_by
from tests.libvirt.console import Console, open_console
from tests.libvirt.daemon import Libvirt, VirshError
from tests.libvirt.microguests import MonitorLog, Shape, microguest_domain, start, vcpu_side
from tests.libvirt.tolerated import MAP, NO_SUCH_COUNT, QUERIES, REFUSALS, VCPUS_UNNEEDED, VCPUS_UNSAID, Difference

__all__ = ["Operation", "Twins", "running_twins", "story"]

Kind = Literal["plug", "unplug", "count", "map"]


@dataclass(frozen=True)
class Operation:
    """What both are asked for.

    Attributes:
        kind: Which of our calls it is.
        wish: The vCPU of a plug or unplug; the count; the map's vCPUs.
    """

    kind: Kind
    wish: int | tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.wish}"


@dataclass(frozen=True)
class Side:
    """What came of an operation on one side.

    Attributes:
        refusal: What was said against it; "" if it was done.
        sent: What was sent to QEMU, each command with its arguments, in their order.
        vcpus: ``<vcpu>`` and ``<vcpus>`` afterwards.
        anew: The same in a document that is written without one to start from; on libvirt's side: *vcpus*.
        rest: All else in its document, which is libvirt's; on our side: as we leave it.
        qemu: What QEMU has plugged where, in the order of creation; on our side: what we take it to have.
    """

    refusal: str
    sent: list[tuple[str, list[tuple[str, Any]]]]
    vcpus: str
    anew: str
    rest: list[str]
    qemu: list[tuple[int, str, str, list[tuple[str, Any]]]]

    @property
    def changes(self) -> list[tuple[str, list[tuple[str, Any]]]]:
        """The commands that are no questions."""
        return [each for each in self.sent if not each[0].startswith("query-")]


@dataclass
class Twins:
    """The two VMs, and what comparing them came to.

    Attributes:
        virsh: Where libvirt is asked to change the VM ``theirs``.
        look: A look at the QEMU of that VM past libvirt.
        ours: The VM that we change; libvirt started it and has no part in it since.
        base: libvirt's document of it, from the beginning.
        log: What libvirt sends.
        compared: How many operations were.
        tolerated: The differences that are on the list, as far as they were met.
        unexplained: All others.
    """

    virsh: Console
    look: VcpuController
    ours: VcpuController
    base: bytes
    log: MonitorLog
    compared: int = 0
    tolerated: set[Difference] = field(default_factory=set)
    unexplained: list[str] = field(default_factory=list)

    async def compare(self, operation: Operation) -> None:
        """Have both do it, and compare what each did and how things are now."""
        steps = self._steps(operation)
        theirs, ours = await asyncio.gather(self._libvirt(operation, steps), self._us(operation))
        self.compared += 1
        for what, one, other in (
            ("refusal", theirs.refusal, ours.refusal),
            ("commands", theirs.changes, ours.changes),
            ("<vcpus>", theirs.vcpus, ours.vcpus),
            ("<vcpus> written anew", theirs.anew, ours.anew),
            ("the rest of the document", theirs.rest, ours.rest),
            ("QEMU", theirs.qemu, ours.qemu),
        ):
            if one != other and not self._explains(what, theirs, ours):
                told = f"{what} after {operation} (no. {self.compared})"
                self.unexplained.append(f"{told}\nlibvirt: {one}\nours:    {other}")
        if theirs.sent != theirs.changes and len(theirs.sent) - len(theirs.changes) > len(ours.sent) - len(
            ours.changes
        ):
            self.tolerated.add(QUERIES)

    def _explains(self, what: str, theirs: Side, ours: Side) -> bool:
        """True if a difference is on the list, which is noted."""
        if what == "refusal" and theirs.refusal and ours.refusal:
            texts = [REFUSALS[DenialReason[ours.refusal]]]
            if ours.refusal == "UNKNOWN_VCPU":
                texts += NO_SUCH_COUNT
            return any(text in theirs.refusal for text in texts)
        only_boot = not any("/peripheral/" in path for _, path, *_ in ours.qemu)
        if what == "<vcpus>" and only_boot and theirs.vcpus.startswith(ours.vcpus):
            self.tolerated.add(VCPUS_UNNEEDED)
            return True
        if what == "<vcpus> written anew" and only_boot and ours.anew.startswith(theirs.anew):
            self.tolerated.add(VCPUS_UNSAID)
            return True
        return False

    def _steps(self, operation: Operation) -> list[tuple[int, str]]:
        """The single calls to libvirt that make a map."""
        if not isinstance(operation.wish, tuple):
            return []
        plan = self.ours.plan(operation.wish)
        words = {Action.PLUG: "--enable", Action.UNPLUG: "--disable"}
        return [(vcpu, words[step.action]) for step in plan.steps for vcpu in step.ids]

    async def _libvirt(self, operation: Operation, steps: list[tuple[int, str]]) -> Side:
        refusal = await asyncio.to_thread(self._ask_libvirt, operation, steps)
        layout = await self.look.refresh()
        sent = [(each["execute"], list(each.get("arguments", {}).items())) for each in self.log.sent()]
        live = (await asyncio.to_thread(self.virsh.ask, "dumpxml theirs")).encode()
        return Side(refusal, sent, vcpu_side(live), vcpu_side(live), rest_of(live), plugged(layout))

    def _ask_libvirt(self, operation: Operation, steps: list[tuple[int, str]]) -> str:
        try:
            match operation:
                case Operation("plug", int() as vcpu):
                    self.virsh.ask(f"setvcpu theirs {vcpu} --enable --live")
                case Operation("unplug", int() as vcpu):
                    self.virsh.ask(f"setvcpu theirs {vcpu} --disable --live")
                case Operation("count", int() as count):
                    self.virsh.ask(f"setvcpus theirs {count} --live")
                case _:
                    self._ask_for_a_map(steps)
        except VirshError as error:
            return str(error).strip()
        return ""

    def _ask_for_a_map(self, steps: list[tuple[int, str]]) -> None:
        for word in ("--enable", "--disable"):
            vcpus = [vcpu for vcpu, each in steps if each == word]
            if len(vcpus) > 1:
                with contextlib.suppress(VirshError):
                    self.virsh.ask(f"setvcpu theirs {','.join(map(str, vcpus))} {word} --live")
                    self.unexplained.append(f"libvirt took several at once: {vcpus}")
                self.tolerated.add(MAP)
        for vcpu, word in steps:
            self.virsh.ask(f"setvcpu theirs {vcpu} {word} --live")

    async def _us(self, operation: Operation) -> Side:
        with sent_by(self.ours) as sent:
            refusal = await self._ask_us(operation)
        layout = self.ours.layout
        live = render(layout, base=self.base)
        return Side(refusal, sent, vcpu_side(live), vcpu_side(render(layout)), rest_of(live), plugged(layout))

    async def _ask_us(self, operation: Operation) -> str:
        try:
            match operation:
                case Operation("plug", int() as vcpu):
                    await self.ours.plug(vcpu)
                case Operation("unplug", int() as vcpu):
                    await self.ours.unplug(vcpu)
                case Operation("count", int() as count):
                    await self.ours.set_count(count)
                case Operation("map", tuple() as wish):
                    await self.ours.set_map(wish)
        except StepDeniedError as error:
            return error.reason.name
        except TransitionError as error:
            return str(error)
        return ""


def plugged(layout: Layout) -> list[tuple[int, str, str, list[tuple[str, Any]]]]:
    """What is plugged where, in the order of creation."""
    slots = [layout.slot_of(first) for first in layout.creation]
    return [(each.first, str(each.qom_path), each.type, list(each.props.items())) for each in slots]


def rest_of(live: bytes) -> list[str]:
    """The lines of a document that say nothing of vCPUs, and nothing of which twin it is."""
    side = vcpu_side(live).splitlines()
    return [
        re.sub(r" id='\d+'|(theirs|ours)\b|<uuid>.*", "", line)
        for line in live.decode().splitlines()
        if line not in side
    ]


@contextlib.asynccontextmanager
async def running_twins(libvirt: Libvirt, qemu: Path, shape: Shape, *, accel: str = "kvm") -> AsyncIterator[Twins]:
    """Have libvirt start two VMs of one document, and attach to their second monitors."""
    domains = []
    for name in ("theirs", "ours"):
        domain, document = microguest_domain(libvirt, name, qemu, accel=accel, shape=shape)
        domains.append((domain, document))
    await asyncio.gather(*(asyncio.to_thread(start, *each) for each in domains))
    theirs, ours = (domain for domain, _ in domains)
    async with (
        qmpvcpu.attach(theirs.qmp, resync_interval=None) as look,
        qmpvcpu.attach(ours.qmp, resync_interval=None) as vm,
    ):
        with open_console(libvirt) as virsh:
            yield Twins(virsh, look, vm, ours.live(), MonitorLog(libvirt))


def story(seed: str, shape: Shape, length: int, *, unplugs: bool = True) -> list[tuple[Operation, set[int]]]:
    """Return operations, each fit for what the ones before made, with what must be plugged after each.

    All that libvirt refuses is among them, as far as *length* goes.

    Args:
        seed: Equal seeds give equal stories.
        shape: The VM's.
        length: How many.
        unplugs: False: none that takes a vCPU out.
    """
    choose = random.Random(seed)  # noqa: S311 - no secret
    boot = set(range(shape.boot))
    everything = set(range(shape.vcpus))
    plugged = boot | set(shape.plugged)
    refusals: list[Operation] = []
    told: list[tuple[Operation, set[int]]] = []
    while len(told) < length:
        if not refusals:
            refusals = _refused(plugged, boot, everything, choose)
        if told and choose.random() < 0.25:
            operation = refusals.pop()
            if operation not in _refused(plugged, boot, everything, choose):
                continue  # it was to be refused when it was thought of
        else:
            operation, plugged = _done(plugged, boot, everything, choose, unplugs=unplugs)
        told.append((operation, set(plugged)))
    return told


def _refused(plugged: set[int], boot: set[int], everything: set[int], choose: random.Random) -> list[Operation]:
    beyond = len(everything)
    refused = [
        Operation("unplug", 0),
        Operation("plug", 0),
        Operation("plug", beyond),
        Operation("unplug", beyond),
        Operation("count", 0),
        Operation("count", beyond + 1),
        *(Operation("unplug", vcpu) for vcpu in boot),
        *(Operation("plug", vcpu) for vcpu in plugged),
        *(Operation("unplug", vcpu) for vcpu in everything - plugged),
        *(Operation("count", count) for count in range(1, len(boot))),
    ]
    choose.shuffle(refused)
    return refused


def _done(
    plugged: set[int], boot: set[int], everything: set[int], choose: random.Random, *, unplugs: bool
) -> tuple[Operation, set[int]]:
    """One that is done, and what is plugged then."""
    free, leaving = sorted(everything - plugged), sorted(plugged - boot)
    kinds: list[Kind] = ["count"]
    if free:
        kinds.append("plug")
    if unplugs:
        kinds.append("map")
    if unplugs and leaving:
        kinds.append("unplug")
    match choose.choice(kinds):
        case "plug":
            vcpu = choose.choice(free)
            return Operation("plug", vcpu), plugged | {vcpu}
        case "unplug":
            vcpu = choose.choice(leaving)
            return Operation("unplug", vcpu), plugged - {vcpu}
        case "count":
            count = choose.randint(len(boot) if unplugs else len(plugged), len(everything))
            more = count - len(plugged)
            now = plugged | set(free[:more]) if more >= 0 else plugged - set(leaving[more:])
            return Operation("count", count), now
        case _:
            wish = boot | {vcpu for vcpu in everything if choose.random() < 0.5}
            return Operation("map", tuple(sorted(wish))), wish
