"""What the tests of crashes share: the VM, the stories that are played on it, and what must be true after."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import OnFailure, VcpuController, VcpuMap
from qmpvcpu.domainxml import read_identity
from qmpvcpu.engine.places import EMULATOR
from qmpvcpu.model.placement import Place, Placement
from qmpvcpu.testing import Behaviour, MicroGuest, best_qemu, probe_accelerator
from qmpvcpu.testing.agent import Mood, ScriptedAgent

START = VcpuMap.parse("0-1,6")
TARGET = VcpuMap.parse("0,2-5")
Pins = Mapping[int, tuple[str, str | None]]
REFUSAL = Behaviour.refusing(0x82)


@dataclass(frozen=True)
class Story:
    """A transition from START to a target.

    Attributes:
        name: What to call it.
        policy: What to do when a step fails.
        guest: How the guest behaves.
        refused: True if the guest refuses to give up the vCPU that it keeps.
        keeps: That one.
        offline_first: True if the guest's agent is asked first.
        refuses_agent: True if the guest refuses that to its agent, so that QEMU is not asked.
        target: The map that is asked for.
        pins: Where the threads of vCPUs are to run, as ``Place.on`` takes it, and QEMU's others as EMULATOR; empty:
            nothing is said.
        stuck: The vCPU whose thread the host does not let go there, while the story is played; -1: none.
    """

    name: str
    policy: OnFailure
    guest: tuple[Behaviour, ...] = ()
    refused: bool = False
    keeps: int = 6
    offline_first: bool = False
    refuses_agent: bool = False
    target: VcpuMap = TARGET
    pins: Pins = field(default_factory=dict)
    stuck: int = -1

    def __str__(self) -> str:
        return self.name

    @property
    def result(self) -> VcpuMap:
        """What it comes to if nothing interferes."""
        if not (self.refused or self.stuck >= 0):
            return self.target
        return START if self.policy is OnFailure.REVERT else VcpuMap(self.target | {self.keeps})


STOP = Story("stop", OnFailure.STOP)
CONTINUE_SLOWLY = Story("continue, guest slow", OnFailure.CONTINUE, (Behaviour.slow(10),))
REVERT = Story("revert, nothing fails", OnFailure.REVERT)
REVERT_REFUSED = Story("revert, 6 refused", OnFailure.REVERT, (REFUSAL.for_slot(6),), refused=True)
STORIES = (STOP, CONTINUE_SLOWLY, REVERT, REVERT_REFUSED)
FEWER = VcpuMap.parse("0,2")
OFFLINE_FIRST = Story("offline first", OnFailure.STOP, offline_first=True, target=FEWER)
# vCPU 6 has left when the guest, or its agent, refuses to let 1 go: it is plugged again, and brought online.
OFFLINE_REFUSED = replace(
    OFFLINE_FIRST,
    name="offline first, revert, 1 refused",
    policy=OnFailure.REVERT,
    guest=(REFUSAL.for_slot(1),),
    refused=True,
    keeps=1,
)
OFFLINE_KEPT = replace(OFFLINE_REFUSED, name="offline first, revert, 1 kept online", guest=(), refuses_agent=True)
OFFLINE_STORIES = (OFFLINE_FIRST, OFFLINE_REFUSED, OFFLINE_KEPT)
HOME = VcpuMap(os.sched_getaffinity(0))
# vCPU 3 is born elsewhere than 2, 4 where QEMU's main thread is at home, and 5 has to be scheduled besides.
PINS = {
    2: (f"{min(HOME)}", None),
    3: (f"{max(HOME)}", None),
    4: (f"{HOME}", None),
    5: (f"{max(HOME)}", "batch"),
}
PLACED = Story("placed", OnFailure.REVERT, pins=PINS)
PLACED_REFUSED = replace(REVERT_REFUSED, name="placed, revert, 6 refused", pins=PINS)
# Its plug has succeeded when it turns out that it cannot be where it has to be: it is taken out again.
PLACED_NOWHERE = replace(PLACED, name="placed, revert, 5 cannot be placed", stuck=5)
# vCPU 6 has left when the guest refuses to let 1 go: it is plugged again, where it was.
PLACED_AGAIN = Story(
    "placed, revert, 1 refused",
    OnFailure.REVERT,
    (REFUSAL.for_slot(1),),
    refused=True,
    keeps=1,
    target=FEWER,
    pins={2: (f"{min(HOME)}", None), 6: (f"{max(HOME)}", "batch")},
)
PLACED_STORIES = (PLACED, PLACED_REFUSED, PLACED_NOWHERE, PLACED_AGAIN)


def placement_of(pins: Pins) -> Placement | None:
    """Return the placement that has threads there; None: nothing is said."""
    places = {vcpu: Place.on(*place) for vcpu, place in pins.items()}
    return Placement(places, places.pop(EMULATOR, Place())) if pins else None


class Stage:
    """A VM to play a story on, and somebody else's view of it.

    Attributes:
        story: The story.
        guest: The VM; it is at START to begin with.
        other: Raw QMP, on a socket of its own.
        agent: The guest's agent, which outlives who asks it; None: the story needs none.
    """

    def __init__(self, story: Story, guest: MicroGuest, other: QMPClient, agent: ScriptedAgent | None = None) -> None:
        self.story = story
        self.guest = guest
        self.other = other
        self.agent = agent
        self._fresh = True
        if agent is not None:
            agent.look = self.plugged

    @property
    def agent_path(self) -> str | None:
        """Where the agent listens, or None."""
        return None if self.agent is None else self.agent.path

    def check_online(self, wanted: VcpuMap) -> None:
        """The guest uses these vCPUs, as it did before anybody took some offline."""
        if self.agent is not None:
            offline = [vcpu for vcpu in wanted if not self.agent.is_online(vcpu)]
            assert not offline, f"left offline in the guest: {offline}"

    @property
    def main_cpus(self) -> VcpuMap:
        """Where QEMU's main thread is."""
        return VcpuMap(os.sched_getaffinity(self.guest.process.pid))

    async def check_places(self, pins: Pins | None = None) -> None:
        """Each thread is where it is to be, as the story, or *pins*, say; those not named are at home."""
        pins = self.story.pins if pins is None else pins
        threads: Any = await self.other.execute("query-cpus-fast")
        slots: Any = await self.other.execute("query-hotpluggable-cpus")
        ids = {slot["qom-path"]: vcpu for vcpu, slot in enumerate(reversed(slots)) if "qom-path" in slot}
        vcpus = {each["thread-id"]: ids.get(each["qom-path"]) for each in threads}
        for task in Path(f"/proc/{self.guest.process.pid}/task").iterdir():
            tid = int(task.name)
            vcpu = vcpus.get(tid, EMULATOR)
            if vcpu is None:
                continue  # it is just leaving
            pin, scheduler = pins.get(vcpu, (str(HOME), None))
            with contextlib.suppress(ProcessLookupError):  # a worker of QEMU's that ends meanwhile
                found = VcpuMap(os.sched_getaffinity(tid))
                assert found == VcpuMap.parse(pin), f"{self._called(tid, vcpus)} is on host CPUs {found}, not {pin}"
                policy = os.SCHED_BATCH if scheduler == "batch" else os.SCHED_OTHER
                assert os.sched_getscheduler(tid) == policy, f"{self._called(tid, vcpus)} is scheduled otherwise"

    def _called(self, tid: int, vcpus: Mapping[int, int | None]) -> str:
        if tid == self.guest.process.pid:
            return "QEMU's main thread"
        return f"the thread of vCPU {vcpus[tid]}" if tid in vcpus else f"thread {tid}"

    async def plugged(self) -> VcpuMap:
        """What QEMU itself says is plugged; it lists slots in descending order."""
        reply: Any = await self.other.execute("query-hotpluggable-cpus")
        return VcpuMap(number for number, slot in enumerate(reversed(reply)) if "qom-path" in slot)

    async def to_start(self) -> None:
        """Have the VM at START; vCPU 1 is never the boot vCPU, so that points have the same names each time."""
        async with qmpvcpu.attach(self.guest.qmp) as vm:
            if self._fresh:
                self._fresh = False
                await self.guest.set_behaviour()
                await vm.unplug(1)
                await self.guest.set_behaviour(self.story.guest)
            await vm.set_map(START)
            await vm.host.place(placement_of({vcpu: pin for vcpu, pin in self.story.pins.items() if vcpu in START}))
        if self.agent is not None:
            self.agent.reboot(START)

    async def agrees(self, vm: VcpuController) -> None:
        """Return when the layout is what QEMU says, which may change in this very moment."""
        try:
            async with asyncio.timeout(5):
                while vm.layout.enabled != await self.plugged():
                    pass
        except TimeoutError:
            seen = await self.plugged()
            raise AssertionError(f"layout says {vm.layout.enabled}, QEMU says {seen}") from None


@contextlib.asynccontextmanager
async def stage(story: Story, *, qmp_sockets: int = 2, extra_args: Sequence[str] = ()) -> AsyncIterator[Stage]:
    """A VM at START, on the best that this machine has."""
    qemu = best_qemu()
    accel = await probe_accelerator(qemu)
    # Under TCG a QEMU dies when it has created more vCPUs than maxcpus.
    size = 8 if accel == "kvm" else 64
    async with MicroGuest(
        qemu,
        accel=accel,
        boot=START,
        max_vcpus=size,
        behaviour=story.guest,
        qmp_sockets=qmp_sockets,
        extra_args=extra_args,
    ) as guest:
        other = QMPClient("other")
        await other.connect(str(guest.sockets[1]))
        try:
            if not story.offline_first:
                yield Stage(story, guest, other)
                return
            async with ScriptedAgent(START, maximum=size) as agent:
                if story.refuses_agent:
                    agent.refuses = frozenset({agent.number_of(story.keeps)})
                    await agent.turn(Mood.REFUSING)
                yield Stage(story, guest, other, agent)
        finally:
            with contextlib.suppress(EOFError, OSError):
                await other.disconnect()


def check_record(path: Path, plugged: VcpuMap) -> None:
    """The record is whole, says what QEMU says as libvirt would, and knows of nothing that is under way."""
    data = path.read_bytes()
    metadata = read_identity(data).metadata
    assert metadata is not None
    assert metadata.intent is None
    domain = ET.fromstring(data)  # noqa: S314 -- ours
    enabled = {int(vcpu.get("id", "")) for vcpu in domain.iter("vcpu") if vcpu.get("enabled") == "yes"}
    assert enabled == plugged
    assert domain.find("vcpu[@current]") is not None
    assert int(domain.findall("vcpu")[0].get("current", "0")) == len(plugged)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
