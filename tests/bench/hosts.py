"""Many hosts: 30 simulated VMs each, real agents and a real NATS server; beside it one ssh per host, as people do it.

All of it shares this machine, so the times are not those of hosts of their own. What counts is how the cost of a VM
grows with the number of hosts, and who pays it.
"""

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from pathlib import Path

from qmpvcpu.bus import Bus, ServerAddress
from qmpvcpu.testing.nats import NatsServer
from tests.bench.helpers import Helper, cpu_ms, resident_kb, tree_cpu_ms
from tests.bench.processes import PYTHON
from tests.bench.row import EACH_VM, KEPT, OVER_NATS, SSH, Goal, Row, Samples
from tests.bench.setting import Setting
from tests.bench.simulated import host_name, record, socket_of
from tests.bench.sshd import Sshd, running_sshd
from tests.waiting import until

__all__ = ["measure"]

VMS = 30  # of each host
BY_SSH = (10, 30)  # hosts; beyond that it only takes longer
AGENTS_EACH = 10  # to a process, at every size: Python's garbage collector takes longer where there are more objects
PEERS_EACH = 50  # hosts to a process
ROUNDS = 2
MANY = 100  # hosts, with which one round takes long enough
WAVE = 20  # hosts whose agents start at a time, as two cores allow
EVENTS = 10  # of each VM
IDLE_S = 5.0  # each agent looks for new VMs once
LEASE_S = 60.0  # four times what is usual: where hundreds of hosts share two cores, a turn may take long
SETS = ("0-3", "0")
MOST_GROWTH = 1.5

READS = {
    "attach all": "from the agents' start until the state of every VM is on the server",
    "attach all, CPU of agents": "CPU time of the agents meanwhile; each VM is attached twice, since it has a record",
    "know all": 'entering Fleet("nats://..."), which reads every state',
    "list all": "fleet.refresh(): each host's agent is asked once, and reads its VMs again",
    "list all, CPU of who asks": "CPU time of the process with that Fleet alone",
    "list all, CPU of agents": "CPU time of the agents meanwhile",
    "list all, CPU of the server": "CPU time of nats-server meanwhile",
    "set all": "fleet.set_map(): a wish for each VM, which its agent claims, records, carries out and answers",
    "set all, CPU of who asks": "CPU time of the process with that Fleet alone",
    "set all, CPU of agents": "CPU time of the agents meanwhile",
    "set all, CPU of the server": "CPU time of nats-server meanwhile",
    "events of all": f"wall time until fleet.events() has had {EVENTS} stops and resumes of each VM, for one of them",
    "idle, CPU of agents": "CPU time of the agents while nothing happens, each second",
    "idle, CPU of the server": "CPU time of nats-server meanwhile: agents renew their leases",
    "memory of agents": f"resident memory of the agents' processes, {AGENTS_EACH} agents to a process",
    "memory of the server": "resident memory of nats-server, once each VM was set",
    "memory of who asks": 'what Fleet("nats://...") adds to resident memory',
    "files of the server": "what is in its directory, once each VM was set; its events stay a week",
}
UNITS = {"know all": "µs", "events of all": "µs", "idle, CPU of agents": "µs", "idle, CPU of the server": "µs"} | {
    work: "kB" for work in READS if work.startswith(("memory", "files"))
}
BESIDE = (
    f"until all {VMS} VMs of every host have answered, which all work on this machine too; ssh: qmpvcpu fleet --json"
    " on each host, 16 at a time, without records; kept: ControlMaster"
)
ASKS = "CPU time of who asks alone, each host: the ssh processes, or the process with the Fleet"
WORKS = "CPU time of the host itself: sshd and qmpvcpu, which attaches its VMs anew; or its agent"


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Grow the number of hosts, and measure at each size; first what ssh takes, before any agent has the VMs."""
    folder = setting.folder / "hosts"
    folder.mkdir()
    recording = folder / "recording.json"
    await record(recording, setting.qemus[setting.newest], setting.accel)
    beside = {hosts: Samples() for hosts in BY_SSH if hosts in setting.hosts}
    async with AsyncExitStack() as stack:
        sshd = await stack.enter_async_context(running_sshd(folder / "ssh"))
        world = _World(folder, recording, stack, beside)
        if sshd is not None:
            for hosts in beside:
                await world.add_peers(hosts)
                await world.by_ssh(sshd, hosts)
        await world.start()
        for hosts in setting.hosts:
            await world.grow(hosts)
            await world.measure()
    for work, reads in READS.items():
        samples = world.samples[work]
        goals = tuple(Goal(who, MOST_GROWTH, next(iter(samples))) for who in list(samples)[-1:] if len(samples) > 1)
        yield Row(f"{work}, each VM", EACH_VM, reads, samples, UNITS.get(work, "ms"), goals)
    for hosts, compared in beside.items():
        for work in ("list all", "set all"):
            yield Row(work, f"{hosts} hosts of {VMS} VMs", BESIDE, compared[work])
            for whose, reads in (("who asks", ASKS), ("each host", WORKS)):
                yield Row(
                    f"{work}, CPU of {whose}",
                    f"{hosts} hosts of {VMS} VMs",
                    reads,
                    compared[f"{work}, CPU of {whose}"],
                )


class _World:
    """All that runs: simulated VMs, agents, the server, and who asks."""

    def __init__(self, folder: Path, recording: Path, stack: AsyncExitStack, beside: dict[int, Samples]) -> None:
        self.samples = Samples()
        self._beside = beside
        self._folder = folder
        self._recording = recording
        self._stack = stack
        self._hosts = 0
        self._peers: list[Helper] = []
        self._peers_of = 0  # hosts
        self._agents: list[Helper] = []
        self._server: NatsServer
        self._asker: Helper

    async def add_peers(self, hosts: int) -> None:
        """Have simulated VMs for so many *hosts*."""
        self._peers += await self._helpers(
            "simulated", range(self._peers_of, hosts), PEERS_EACH, self._recording, self._folder, VMS
        )
        self._peers_of = max(hosts, self._peers_of)

    async def start(self) -> None:
        """Start the server, and who asks."""
        data = self._folder / "server"
        data.mkdir()
        self._server = await self._stack.enter_async_context(NatsServer(directory=data))
        async with await Bus.connect(ServerAddress(self._server.url), name="bench") as bus:
            await bus.prepare(lease_s=LEASE_S)
        (self._asker,) = await self._helpers("asker", range(1), 1, self._server.url)

    async def _helpers(self, module: str, hosts: range, each: int, *given: object) -> list[Helper]:
        some = [(first, min(first + each, hosts.stop)) for first in hosts[::each]]
        helpers = [await Helper.start(module, *given, *(() if module == "asker" else one)) for one in some]
        for helper in helpers:
            self._stack.push_async_callback(helper.end)
        for helper in helpers:
            await helper.answer()
        return helpers

    def _note(self, work: str, took: float, *, each: float = VMS) -> None:
        self.samples.note(work, f"{self._hosts} hosts", took / self._hosts / each)

    async def by_ssh(self, sshd: Sshd, hosts: int) -> None:
        """Measure what people do, on *hosts* of them."""
        names = [host_name(host) for host in range(hosts)]
        await sshd.on_each([f"{name}.kept" for name in names], [["true"]] * hosts)  # opens them
        for who, suffix in ((SSH, ""), (KEPT, ".kept")):
            for work, *what in (("list all", "list"), *(("set all", "set", vcpus) for vcpus in SETS)):
                program: list[str | Path] = [PYTHON.parent / "qmpvcpu", "fleet", *what, "--json", "--dir"]
                commands = [[*program, socket_of(self._folder, host, 0).parent] for host in range(hosts)]
                asking, working, start = _cpu_of_children(), tree_cpu_ms(sshd.pid), time.perf_counter()
                await sshd.on_each([name + suffix for name in names], commands)
                wall = (time.perf_counter() - start) * 1000
                working = tree_cpu_ms(sshd.pid) - working
                self._compare(hosts, work, who, wall, asking=_cpu_of_children() - asking, working=working)

    def _compare(self, hosts: int, work: str, who: str, wall: float, *, asking: float, working: float) -> None:
        if (beside := self._beside.get(hosts)) is not None:
            beside.note(work, who, wall)
            beside.note(f"{work}, CPU of who asks", who, asking / hosts)
            beside.note(f"{work}, CPU of each host", who, working / hosts)

    async def grow(self, hosts: int) -> None:
        """Have so many *hosts*, with agents, and note what those cost that came."""
        await self.add_peers(hosts)
        before, start = self._hosts, time.perf_counter()
        agents: list[Helper] = []
        for first in range(before, hosts, WAVE):
            self._hosts = min(first + WAVE, hosts)
            some = range(first, self._hosts)
            agents += await self._helpers("agents", some, AGENTS_EACH, self._server.url, self._folder)
            await until(self._all_known, 300)
        share = hosts / (hosts - before)
        self._note("attach all", (time.perf_counter() - start) * 1000 * share)
        self._note("attach all, CPU of agents", cpu_ms(each.pid for each in agents) * share)
        self._agents += agents

    async def _all_known(self) -> bool:
        await asyncio.sleep(0.1)
        return await self._asker.ask("count") == [self._hosts * VMS]

    async def measure(self) -> None:
        """Measure all that is done with so many hosts."""
        for _ in range(ROUNDS if self._hosts < MANY else 1):
            wall, _, memory = await self._asker.ask("open")
            self._note("know all", wall * 1000)
            await self._ask("list all", "list")
            for vcpus in SETS:
                before = await self._sent()
                await self._ask("set all", f"set {vcpus}")
                sent = await self._sent() - before
                assert sent == 3 * self._hosts * VMS, "a vCPU was plugged or unplugged twice, or not at all"
        self._note("memory of who asks", memory)
        self._note("memory of agents", resident_kb(self._pids))
        self._note("memory of the server", resident_kb([self._server.pid]))
        self._note("files of the server", sum(file.stat().st_blocks for file in self._files) / 2)
        agents, server = cpu_ms(self._pids), cpu_ms([self._server.pid])
        await asyncio.sleep(IDLE_S)
        self._note("idle, CPU of agents", (cpu_ms(self._pids) - agents) * 1000 / IDLE_S)
        self._note("idle, CPU of the server", (cpu_ms([self._server.pid]) - server) * 1000 / IDLE_S)
        await self._hear()

    @property
    def _pids(self) -> list[int]:
        return [each.pid for each in self._agents]

    @property
    def _files(self) -> Iterable[Path]:
        return (path for path in self._server.directory.rglob("*") if path.is_file())

    async def _ask(self, work: str, question: str) -> None:
        agents, server = cpu_ms(self._pids), cpu_ms([self._server.pid])
        wall, asking = await self._asker.ask(question)
        agents, server = cpu_ms(self._pids) - agents, cpu_ms([self._server.pid]) - server
        self._note(work, wall)
        self._note(f"{work}, CPU of who asks", asking)
        self._note(f"{work}, CPU of agents", agents)
        self._note(f"{work}, CPU of the server", server)
        self._compare(self._hosts, work, OVER_NATS, wall, asking=asking, working=agents)

    async def _sent(self) -> float:
        return sum([sum(await peers.ask("count")) for peers in self._peers])

    async def _hear(self) -> None:
        """Have every VM tell of events, and note when all were heard."""
        await self._asker.ask("listen")
        start = time.monotonic()
        told = asyncio.gather(*(peers.ask(f"emit {EVENTS} 1e9") for peers in self._peers))
        heard, last = await self._asker.ask(f"hear {EVENTS * self._hosts * VMS}")
        emitted = sum(sum(each) for each in await told)
        assert heard == emitted, f"{emitted - heard} of {emitted} events were lost"
        self._note("events of all", (last - start) * 1e6, each=VMS * EVENTS)


def _cpu_of_children() -> float:
    """Return the CPU time of processes of ours that have ended, in milliseconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1000
