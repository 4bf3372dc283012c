"""The demo of many hosts: a rolling change, though a guest refuses, a host dies, and the controller is killed.

Agents and controllers are real processes, ``qmpvcpu agent``, ``fleet set`` and ``campaign run``. What is told of them
is read from the server and from the QEMUs, and each step is compared with what was expected.
"""

import asyncio
import contextlib
import enum
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from qmpvcpu.bus import Bucket, Bus, Entry, ServerAddress
from qmpvcpu.documents import event_from_json
from qmpvcpu.events import Event, UnplugRefused
from qmpvcpu.model.campaign import Ended, Ledger
from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.hosts import CAMPAIGNS, LEASES, STATES, WISHES, VmKey, name_of
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import Answer, Wish, WishPhase
from qmpvcpu.qmp.queries import look
from qmpvcpu.testing.demo import choose_qemu
from qmpvcpu.testing.hosts import Change, Hosts, HostVm, VmHost
from qmpvcpu.testing.nats import NatsServer, find_nats
from qmpvcpu.testing.netns import HostProcess
from qmpvcpu.testing.rom import Behaviour

__all__ = ["Fate", "HostsDemo", "Stage", "Step", "Vcpus", "VmRow", "play"]

_HOSTS: Final = ("rack1-a", "rack1-b", "rack2-a")
_VMS: Final = ("db1", "web1", "web2")
_DIES: Final = "rack2-a"
_REFUSES: Final = VmKey("rack1-b", "web2")
_BUSY: Final = 0x82

_BOOT: Final = (0, 2, 3)
_MAX: Final = 6
_BEFORE: Final = VcpuMap(_BOOT)
_WANTED: Final = VcpuMap.parse("0,2,4-5")
_REFUSED_VCPU: Final = 3
# What it takes, as QEMU is asked for it.
_FORTH: Final = (("device_add", "vcpu4"), ("device_add", "vcpu5"), ("device_del", "vcpu3"))
_FORTH_AND_BACK: Final = (*_FORTH, ("device_del", "vcpu5"), ("device_del", "vcpu4"))

_AT_ONCE: Final = 3
_PER_HOST: Final = 1
_LEASE_S: Final = 3.0
_DROP_AFTER_S: Final = 8.0
_IN_A_WHILE: Final = Behaviour.slow(500)  # a guest takes its time over a removal
_ALICE: Final = "alice"
_BOB: Final = "bob"
_CHANGE: Final = (
    *("fleet", "set", str(_WANTED), "--where", "host=*", "--at-once", str(_AT_ONCE), "--per-host", str(_PER_HOST)),
    *("--stop-after", "4", "--on-failure", "revert", "--drop-after", f"{_DROP_AFTER_S:g}"),
)
# The machine may be busy with other things: what is expected is there much sooner.
_PATIENCE_S: Final = 60.0
_LOOK_S: Final = 0.2


class Fate(enum.Enum):
    """How far a VM is in the change."""

    STARTS = "starts"
    WAITS = "waits"
    BEGUN = "begun"
    RUNS = "runs"
    OVER = "over"


class Vcpus(NamedTuple):
    """The vCPUs of a VM: how many it can have, which it has, and which of these are on their way out."""

    max: int
    enabled: VcpuMap
    pending: VcpuMap

    def __str__(self) -> str:
        return "".join(self._cell(vcpu) for vcpu in range(self.max))

    def _cell(self, vcpu: int) -> str:
        if vcpu not in self.enabled:
            return "[ ]"
        return f"({vcpu})" if vcpu in self.pending else f"[{vcpu}]"


@dataclass(frozen=True)
class VmRow:
    """One VM, as the server tells of it.

    Attributes:
        vm: Which VM.
        vcpus: What it has, as its host told last; None: nothing yet.
        fate: How far it is.
        event: What happened last to its vCPUs since it was begun, or None.
        code: Where it is over, the exit code that a command on this VM alone would have had.
        why: Where it is over, and not reached: why.
        begun_by: Who has begun it, or "".
        is_dead: Whether its host was there, and is gone.
    """

    vm: VmKey
    vcpus: Vcpus | None
    fate: Fate
    event: Event | None
    code: int
    why: str
    begun_by: str
    is_dead: bool


@dataclass(frozen=True)
class Step:
    """One step of the story, as it went.

    Attributes:
        call: What was done, as the command line says it where it was one.
        expected: What was expected to be so after it.
        found: What was so.
        seconds: When that was found, from when the demo began.
    """

    call: str
    expected: str
    found: str
    seconds: float

    @property
    def as_expected(self) -> bool:
        """True if it went as expected."""
        return self.found == self.expected


class Stage(Protocol):
    """Where the demo is shown.

    Attributes:
        done: JSON of the steps so far.
    """

    done: list[dict[str, Any]]

    def say(self, *parts: str | tuple[str, str], at: float | None = None) -> None:
        """Show one line made of *parts*, each a text or a text with its style, as said *at* so many seconds."""

    def show(self, rows: Sequence[VmRow]) -> None:
        """Show all VMs as they are now, in place of what they were."""


@dataclass(frozen=True)
class HostsDemo:
    """How the demo went.

    Attributes:
        content: All of it as JSON.
        rows: The VMs at the end.
        differences: What went otherwise than expected, in sentences.
    """

    content: dict[str, Any]
    rows: tuple[VmRow, ...]
    differences: tuple[str, ...]


async def play(stage: Stage, *, qemu: str | None = None, separate: bool | None = None) -> HostsDemo:
    """Start a server, hosts with VMs and their agents, and play the story until a step goes otherwise than expected.

    Args:
        stage: Where it is shown.
        qemu: The QEMU to run; None: ``QMPVCPU_QEMU``, else the newest that is found.
        separate: Whether each host is a network namespace; None: if that can be done.

    Raises:
        QmpVcpuError: There is no QEMU or no server, one of them does not come up, or nats-py is not installed.
    """
    started = time.monotonic()
    binary, why = choose_qemu(qemu)
    nats = find_nats()
    async with (
        Hosts(_HOSTS, vms=0, separate=separate, qemu=binary, boot=_BOOT, max_vcpus=_MAX) as hosts,
        NatsServer(binary=nats, host=hosts.network.address, name="demo") as server,
        await Bus.connect(ServerAddress(server.url), name="qmpvcpu hosts demo") as bus,
    ):
        await bus.prepare(lease_s=_LEASE_S)
        is_separate = hosts.network.is_separate
        kind = "a network namespace" if is_separate else "a directory (root could make network namespaces)"
        stage.say(f"NATS server {bus.server_version} at {server.url}: {nats}")
        stage.say(f"QEMU: {binary} ({why})")
        stage.say(f"Each host is {kind}.")
        stage.say("")
        view = _View([VmKey(host, vm) for host in _HOSTS for vm in _VMS], stage.show)
        async with view.following(bus):
            story = _Story(stage, hosts, server.url, view, started)
            differences = await story.play()
            vms = await story.vms_json()
    content: dict[str, Any] = {
        "hosts_are": "namespaces" if is_separate else "directories",
        "server": {"path": str(nats), "version": bus.server_version},
        "qemu": {"path": str(binary), "chosen": why},
        "as_expected": not differences,
        "differences": list(differences),
        "steps": stage.done,
        "vms": vms,
        "seconds": round(time.monotonic() - started, 3),
    }
    return HostsDemo(content, view.rows, differences)


class _Story:
    """The story: each step does something, and waits until what is expected of it is so."""

    def __init__(self, stage: Stage, hosts: Hosts, url: str, view: "_View", started: float) -> None:
        self._stage = stage
        self._hosts = hosts
        self._url = url
        self._view = view
        self._started = started
        self._vms: dict[VmKey, HostVm] = {}
        self._late: frozenset[str] = frozenset()

    async def play(self) -> tuple[str, ...]:
        """Play it; return what went otherwise than expected."""
        async with contextlib.aclosing(self._steps()) as steps:
            async for step in steps:
                self._stage.done.append({**to_json(step), "as_expected": step.as_expected})
                mark = ("as expected: ", "green") if step.as_expected else ("NOT AS EXPECTED: ", "bold red")
                self._stage.say("  ", mark, step.found, at=step.seconds)
                if not step.as_expected:
                    return (f"{step.call}: expected {step.expected}; found {step.found}",)
        return ()

    async def _steps(self) -> AsyncGenerator[Step, None]:
        yield await self._start()
        alice = await self._run_at("desk1", _ALICE, *_CHANGE)
        yield await self._begin(alice)
        yield await self._kill(alice)
        yield await self._crash()
        bob = await self._run_at("desk2", _BOB, "campaign", "run")
        yield await self._take_over(bob)
        yield await self._refusal(bob)
        yield await self._silence(bob)
        yield await self._summary(bob)
        yield self._bounds()
        yield await self._count()

    # The steps.

    async def _start(self) -> Step:
        """Start the VMs, then the agents."""
        call = "qmpvcpu agent --host NAME --dir vms --record records, on each host"
        self._say(call)
        try:
            async with asyncio.TaskGroup() as starting:
                for host in self._hosts:
                    for name in _VMS:
                        starting.create_task(self._start_vm(host, name))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        agents = [await host.start_agent(self._url, "--rescan", "0.5") for host in self._hosts]
        wanted = f"3 hosts have an agent; 9 VMs have the vCPUs {_BEFORE}"

        def found() -> str:
            ready = [row for row in self._view.rows if row.vcpus is not None and row.vcpus.enabled == _BEFORE]
            return f"{len(self._view.hosts)} hosts have an agent; {len(ready)} VMs have the vCPUs {_BEFORE}"

        return await self._step(call, wanted, found, *agents)

    async def _begin(self, alice: HostProcess) -> Step:
        def found() -> str:
            begun = {key.partition(".")[0] for key in self._view.claimed}
            return f"{len(begun)} hosts have begun with their first VM"

        return await self._step(_call(_CHANGE), "3 hosts have begun with their first VM", found, alice)

    async def _kill(self, alice: HostProcess) -> Step:
        """Kill the controller in the middle; wait for what hosts had begun."""
        call = f"kill -9 {alice.pid}, which is {_ALICE}'s fleet set"
        self._say(call)
        alice.kill()
        await alice.wait()
        view = self._view
        for vm, each in self._vms.items():
            if vm.key in view.begun:
                await each.guest.set_behaviour(_IN_A_WHILE)
        settled = asyncio.ensure_future(self._settle())
        try:
            await self._until(settled.done)
            if settled.done():
                settled.result()
        finally:
            settled.cancel()
        begun, left = len(view.begun), len(view.keys) - len(view.begun)
        wanted = f"the hosts have ended the {begun} that were begun; {left} are not begun"
        found = f"the hosts have ended the {len(view.answered)} that were begun; {left} are not begun"
        return self._now(call, wanted, found)

    async def _settle(self) -> None:
        """Wait until what was begun is over; the last wish may still be on its way."""
        view = self._view
        seen: set[str] | None = None
        while seen != view.begun or view.begun - view.answered:
            seen = set(view.begun)
            await asyncio.sleep(_LOOK_S)
            await view.read_wishes()

    async def _crash(self) -> Step:
        """Have a host die on which nothing is under way: what would come of that is known a minute later."""
        is_separate = self._hosts.network.is_separate
        call = f"power failure at {_DIES}: agent and QEMUs are killed{', the cable is cut' * is_separate}"
        self._say(call)
        host = self._hosts[_DIES]
        self._late = frozenset(key for key in self._view.keys if key.startswith(f"{_DIES}.")) - self._view.begun
        if is_separate:
            await host.host.cut()  # as with a real one, nobody is told
        await host.crash()
        wanted = "2 hosts have an agent: rack1-a, rack1-b"

        def found() -> str:
            names = sorted(self._view.hosts)
            return f"{len(names)} hosts have an agent: {', '.join(names)}"

        return await self._step(call, wanted, found)

    async def _take_over(self, bob: HostProcess) -> Step:
        wanted = f"campaign run of {_BOB} goes on with it, after fleet of {_ALICE}"

        def found() -> str:
            former, now = ("nobody", "nobody", *self._view.controllers)[-2:]
            return f"{now} goes on with it, after {former}"

        return await self._step("qmpvcpu campaign run", wanted, found, bob)

    async def _refusal(self, bob: HostProcess) -> Step:
        vm = self._vms[_REFUSES]
        wanted = f"refused: device is busy; it has {_BEFORE} again, as its QEMU says"
        self._say(f"the guest of {_REFUSES} does not give up vCPU {_REFUSED_VCPU}")
        await self._until(lambda: _REFUSES.key in self._view.ended, bob)
        plugged = await _plugged(vm)
        ended = self._view.ended.get(_REFUSES.key)
        said = "no answer" if ended is None else self._view.why(_REFUSES.key) or "reached"
        found = f"{said}; it has {plugged}{' again' * (plugged == _BEFORE)}, as its QEMU says"
        return self._now(f"the change of {_REFUSES}", wanted, found)

    async def _silence(self, bob: HostProcess) -> Step:
        waits = sorted(self._late)
        names = ", ".join(str(VmKey.parse(key)) for key in waits)
        wanted = f"{names}: not begun in time, exit code 3"
        self._say(f"the VMs of {_DIES} have their turn last, and wait for it for {_DROP_AFTER_S:g} s")

        def found() -> str:
            ended = {key: self._view.ended.get(key) for key in waits}
            late = [key for key, each in ended.items() if each is not None and each.phase is WishPhase.EXPIRED]
            codes = sorted({each.code for each in ended.values() if each is not None})
            names = ", ".join(str(VmKey.parse(key)) for key in late)
            return f"{names}: not begun in time, exit code {', '.join(map(str, codes))}"

        return await self._step(f"the change of the VMs of {_DIES}", wanted, found, bob)

    async def _summary(self, bob: HostProcess) -> Step:
        view = self._view
        call = "the campaign, as the server keeps it"
        self._say(call)
        late = len(self._late)

        def found() -> str:
            ledger = view.ledger
            if ledger is None:
                return "there is none"
            status = ledger.status.value
            return f"the campaign is {status}: {ledger.reached} of {ledger.vms} reached, {ledger.failed} failed"

        wanted = f"the campaign is done: {len(view.keys) - 1 - late} of 9 reached, {1 + late} failed"
        return await self._step(call, wanted, found, bob)

    def _bounds(self) -> Step:
        call = "every state of the campaign that was seen"
        self._say(call)
        view = self._view
        wanted = f"never more than {_AT_ONCE} VMs at once, and {_PER_HOST} of a host"
        found = f"never more than {view.most_at_once} VMs at once, and {view.most_per_host} of a host"
        return self._now(call, wanted, found)

    async def _count(self) -> Step:
        call = "the QMP transcripts of all QEMUs, the dead ones' too"
        self._say(call)
        lost, twice, asked = [], 0, 0
        for vm, host_vm in self._vms.items():
            changes = [(change.command, change.device) for change in host_vm.changes]
            asked += len(changes)
            twice += sum(change.is_repeated for change in host_vm.changes)
            is_told = vm.key in self._view.ended and _are(changes, self._due(vm))
            if not is_told or (vm.host != _DIES and await _plugged(host_vm) != self._left(vm)):
                lost.append(vm)
        found = f"{len(lost)} lost, {twice} twice, of {asked} requests to {len(self._vms)} QEMUs"
        due = sum(len(self._due(vm)) for vm in self._vms)
        return self._now(call, f"0 lost, 0 twice, of {due} requests to 9 QEMUs", found)

    def _due(self, vm: VmKey) -> Sequence[tuple[str, str]]:
        """What its QEMU was to be asked, by what the campaign says of it."""
        if vm == _REFUSES:
            return _FORTH_AND_BACK
        return _FORTH if self._view.code(vm.key) == 0 else ()

    def _left(self, vm: VmKey) -> VcpuMap:
        """What it was to have in the end, by what the campaign says of it."""
        return _WANTED if self._view.code(vm.key) == 0 else _BEFORE

    async def vms_json(self) -> list[dict[str, Any]]:
        """Return every VM with what came of it."""
        return [
            {
                "host": row.vm.host,
                "vm": row.vm.vm,
                "begun_by": row.begun_by,
                "fate": row.fate.value,
                "code": row.code if row.fate is Fate.OVER else None,
                "why": row.why,
                "map": None if row.vcpus is None else str(row.vcpus.enabled),
                "host_is_dead": row.is_dead,
                "asked": [f"{each.command} {each.device}" for each in self._changes(row.vm)],
                "twice": sum(each.is_repeated for each in self._changes(row.vm)),
            }
            for row in self._view.rows
        ]

    def _changes(self, vm: VmKey) -> Sequence[Change]:
        return self._vms[vm].changes if vm in self._vms else ()

    # What they are made of.

    async def _start_vm(self, host: VmHost, name: str) -> None:
        vm = VmKey(host.name, name)
        # So the first of each host is in the middle of it when the controller is killed, however slow the machine.
        behaviour = [Behaviour.hanging() if name == _VMS[0] else _IN_A_WHILE]
        if vm == _REFUSES:
            behaviour.insert(0, Behaviour.refusing(_BUSY).for_slot(_REFUSED_VCPU))
        self._vms[vm] = await host.add_vm(name, behaviour=behaviour)

    async def _run_at(self, desk: str, who: str, *words: str) -> HostProcess:
        """Start a command as *who*, on a host of their own."""
        self._say(f"{who}: {_call(words)}")
        host = await self._hosts.network.host(desk)
        env = {"QMPVCPU_WHO": who, "QMPVCPU_NATS": self._url}
        return await host.run(sys.executable, "-m", "qmpvcpu", *words, env=env)

    def _say(self, what: str) -> None:
        self._stage.say((what, "bold"), at=time.monotonic() - self._started)

    async def _step(self, call: str, wanted: str, found: Callable[[], str], *needed: HostProcess) -> Step:
        """Wait until *found* is what is *wanted*, or until that will not be."""
        await self._until(lambda: found() == wanted, *needed)
        dead = "".join(f" ({each})" for each in needed if each.returncode is not None)
        return self._now(call, wanted, found() + dead)

    def _now(self, call: str, wanted: str, found: str) -> Step:
        return Step(call, wanted, found, round(time.monotonic() - self._started, 3))

    async def _until(self, condition: Callable[[], bool], *needed: HostProcess) -> None:
        """Wait until *condition* holds, one of the programs that it needs has ended, or it takes too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                while not condition() and all(each.returncode is None for each in needed):
                    await self._view.wait_news(_LOOK_S)


async def _plugged(vm: HostVm) -> VcpuMap:
    """Return the vCPUs that a VM's QEMU says it has."""
    return (await look(vm.guest.sockets[1])).enabled


def _are(asked: Sequence[tuple[str, str]], due: Sequence[tuple[str, str]]) -> bool:
    """Tell whether just this was asked; the order in which it is undone is not the demo's business."""
    return sorted(asked) == sorted(due)


def _call(words: Iterable[str]) -> str:
    return shlex.join(("qmpvcpu", *words))


class _View:
    """What the server tells, up to date.

    Attributes:
        keys: The keys of all VMs, in order.
        hosts: The names of the hosts that have an agent.
        controllers: Who has carried the campaign out, one after the other.
        ledger: The campaign as last seen, or None.
        begun: The VMs whose wishes were seen.
        claimed: Those whose hosts have begun.
        answered: Those whose hosts have said that it is over.
        ended: What the campaign notes of each that is over.
        most_at_once: The most VMs that were in flight.
        most_per_host: The most of one host.
    """

    def __init__(self, vms: Sequence[VmKey], show: Callable[[Sequence[VmRow]], None]) -> None:
        self.keys = [vm.key for vm in vms]
        self.hosts: set[str] = set()
        self.controllers: list[str] = []
        self.ledger: Ledger | None = None
        self.begun: set[str] = set()
        self.claimed: set[str] = set()
        self.answered: set[str] = set()
        self.ended: dict[str, Ended] = {}
        self.most_at_once = 0
        self.most_per_host = 0
        self._vms = tuple(vms)
        self._show = show
        self._vcpus: dict[str, tuple[float, Vcpus]] = {}  # with when that was told
        self._answers: dict[str, Answer] = {}
        self._events: dict[str, Event] = {}
        self._refusals: dict[str, UnplugRefused] = {}
        self._epochs: dict[str, int] = {}
        self._were_there: set[str] = set()
        self._news = asyncio.Event()
        self._watches: list[asyncio.Task[None]] = []
        self._wishes: Bucket

    @contextlib.asynccontextmanager
    async def following(self, bus: Bus) -> AsyncIterator[None]:
        """Follow the server inside."""
        self._wishes = await bus.bucket(WISHES)
        takes = {LEASES: self._take_lease, CAMPAIGNS: self._take_campaign, STATES: self._take_state}
        work = [self._watch(await bus.bucket(name), take) for name, take in takes.items()]
        work += [self._watch(self._wishes, self._take_wish), self._hear(bus)]
        self._watches = [asyncio.ensure_future(each) for each in work]
        self._tell()
        try:
            yield
        finally:
            for each in self._watches:
                each.cancel()
            await asyncio.wait(self._watches)

    async def wait_news(self, most: float) -> None:
        """Wait until the server tells something, for *most* seconds at most.

        Raises:
            HostsError: It does not tell any more.
        """
        for each in self._watches:
            if each.done():
                each.result()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most):
                await self._news.wait()
        self._news.clear()

    async def read_wishes(self) -> None:
        """Read all wishes as they are now."""
        for entry in (await self._wishes.all()).values():
            self._take_wish(entry)

    @property
    def rows(self) -> tuple[VmRow, ...]:
        """All VMs as they are now."""
        return tuple(map(self._row, self._vms))

    def code(self, key: str) -> int:
        """Return the exit code of a VM that is over."""
        ended = self.ended.get(key)
        return self._answers[key].code if ended is None else ended.code

    def why(self, key: str) -> str:
        """Return why a VM that is over has not reached it; "" if it has."""
        if self.code(key) == 0:
            return ""
        if key in self._refusals:
            return f"refused: {self._refusals[key].reason}"
        ended = self.ended.get(key)
        if ended is not None and ended.phase is WishPhase.EXPIRED:
            return "not begun in time"
        return (ended.why if ended is not None else "") or "it failed"

    def _row(self, vm: VmKey) -> VmRow:
        key = vm.key
        vcpus = self._vcpus[key][1] if key in self._vcpus else None
        fate = Fate.STARTS if vcpus is None else Fate.WAITS
        if key in self.answered or key in self.ended:
            fate = Fate.OVER
        elif key in self.claimed:
            fate = Fate.RUNS
        elif key in self._epochs:
            fate = Fate.BEGUN
        is_over = fate is Fate.OVER
        epoch = self._epochs.get(key, 0)
        begun_by = self.controllers[epoch - 1] if 0 < epoch <= len(self.controllers) else ""
        return VmRow(
            vm,
            vcpus,
            fate,
            self._events.get(key),
            self.code(key) if is_over else 0,
            self.why(key) if is_over else "",
            begun_by,
            is_dead=vm.host in self._were_there - self.hosts,
        )

    # News.

    async def _watch(self, bucket: Bucket, take: Callable[[Entry], None]) -> None:
        async with bucket.watch() as entries:
            async for entry in entries:
                if entry is not None:
                    take(entry)
                    self._tell()

    async def _hear(self, bus: Bus) -> None:
        async with bus.follow("qmpvcpu.event.>") as happened:
            async for each in happened:
                key = ".".join(each.subject.split(".")[2:4])
                said = json.loads(each.data)
                with contextlib.suppress(ValueError):  # what is told of wishes is no event of a VM
                    event = self._events[key] = event_from_json(said)
                    if isinstance(event, UnplugRefused):
                        self._refusals[key] = event
                    self._take_vcpus(key, each.created, said)
                    self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._show(self.rows)

    def _take_lease(self, entry: Entry) -> None:
        kind, _, name = entry.key.partition(".")
        if kind == "host":
            (self.hosts.discard if entry.value is None else self.hosts.add)(name_of(name))
            self._were_there |= self.hosts
        elif entry.value is not None:
            controller = json.loads(entry.value)["controller"]
            if controller not in self.controllers[-1:]:
                self.controllers.append(controller)

    def _take_campaign(self, entry: Entry) -> None:
        text = (entry.value or b"").decode()
        if "." not in entry.key:
            self._take_ledger(from_json(Ledger, text))
        elif ".ended." in entry.key:
            self.ended[entry.key.partition(".ended.")[2]] = from_json(Ended, text)

    def _take_ledger(self, ledger: Ledger) -> None:
        self.ledger = ledger
        for key in ledger.in_flight:
            self._epochs.setdefault(key, ledger.epoch)
        hosts = Counter(key.partition(".")[0] for key in ledger.in_flight)
        self.most_at_once = max(self.most_at_once, hosts.total())
        self.most_per_host = max(self.most_per_host, *hosts.values(), 0)

    def _take_wish(self, entry: Entry) -> None:
        if entry.value is None:
            return
        self.begun.add(entry.key)
        if from_json(Wish, entry.value.decode()).claim is not None:
            self.claimed.add(entry.key)

    def _take_state(self, entry: Entry) -> None:
        if entry.value is None:
            return
        said = json.loads(entry.value)
        self._take_vcpus(entry.key, entry.created, said)
        if said["answer"] is not None:
            answer = self._answers[entry.key] = from_json(Answer, said["answer"])
            if answer.phase.is_over:
                self.answered.add(entry.key)

    def _take_vcpus(self, key: str, when: float, said: dict[str, Any]) -> None:
        """Take in which vCPUs a VM has, by a state or an event; what was told later counts."""
        if "max" in said and (key not in self._vcpus or when >= self._vcpus[key][0]):
            maps = (VcpuMap.parse(said[each]) for each in ("enabled", "pending"))
            self._vcpus[key] = when, Vcpus(said["max"], *maps)
