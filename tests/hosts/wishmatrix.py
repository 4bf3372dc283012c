"""Stories of one wish, played again and again while somebody dies or is cut off; and what must be true after."""

import abc
import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from qmpvcpu import Affect, OnFailure, QmpVcpuError, VcpuMap
from qmpvcpu.bus import Bucket, Bus, ServerAddress
from qmpvcpu.domainxml import read_identity
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.hosts import LEASES, STATES, WISHES, VmKey
from qmpvcpu.model.wish import Wish, WishOptions, WishPhase
from qmpvcpu.testing import Behaviour
from qmpvcpu.testing.hosts import read_changes
from qmpvcpu.testing.vms import TRACE_ARGUMENTS, TRACE_FILE, read_transcript
from tests.crash.matrix import Agenda, KillMatrix
from tests.crash.stage import REFUSAL, START, Stage, Story, check_record
from tests.crash.zygote import Zygote
from tests.figures import WISHES_KEPT
from tests.hosts.agents import LOOKED, QUIET, AgentJob
from tests.waiting import until

_Way = TypeVar("_Way")

LEASE_S: Final = 1.0
ANSWER_S: Final = 40.0
_PHASES_OVER: Final = {phase.value for phase in WishPhase if phase.is_over}
MORE = VcpuMap.parse("0-4,6")
FEWER = VcpuMap.parse("0")
MIXED = VcpuMap.parse("0,2-5")
SLOW = (Behaviour.slow(300),)


@dataclass(frozen=True)
class WishStory:
    """What is wished of a VM that is at START.

    Attributes:
        name: What to call it.
        wish: The wish.
        reached: What the VM has if it is reached.
        otherwise: What it may have if it is not.
        guest: How its guest behaves.
        agents: How many agents die: one, and then so many in a row.
        newer: A wish that comes when the guest was asked for a vCPU, or the agent is dead.
        reached_then: What the VM has in the end if that is reached.
        is_withdrawn: Whether it is deleted then.
        is_here: False if there is no such VM.
    """

    name: str
    wish: Wish
    reached: VcpuMap
    otherwise: tuple[VcpuMap, ...] = ()
    guest: tuple[Behaviour, ...] = ()
    agents: tuple[int, ...] = (1,)
    newer: Wish | None = None
    reached_then: VcpuMap | None = None
    is_withdrawn: bool = False
    is_here: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def key(self) -> VmKey:
        """Its VM: each story has a host of its own."""
        return VmKey(self.name, "web")


def _mapped(name: str, to: VcpuMap, guest: tuple[Behaviour, ...] = (), **options: Any) -> WishStory:
    wish = Wish(name, to, options=WishOptions(**options))
    # Only a guest that refuses has anything reverted: that an agent died is no failure.
    otherwise = (START,) if guest and options.get("on_failure") is OnFailure.REVERT else ()
    return WishStory(name, wish, to, otherwise, guest)


MIXED_STORY = replace(_mapped("mixed, revert", MIXED, on_failure=OnFailure.REVERT), agents=(1, 2))
SUPERSEDED = WishStory(
    "superseded",
    Wish("superseded", MIXED),
    MIXED,
    guest=SLOW,
    newer=Wish("newer", VcpuMap.parse("0-3")),
    reached_then=VcpuMap.parse("0-3"),
)
WITHDRAWN = WishStory("withdrawn", Wish("withdrawn", MIXED), MIXED, guest=SLOW, is_withdrawn=True)
STORIES = (
    replace(_mapped("plug", MORE), agents=(1, 2)),
    _mapped("unplug", FEWER),
    MIXED_STORY,
    _mapped("mixed, revert, 6 refused", MIXED, (REFUSAL.for_slot(6),), on_failure=OnFailure.REVERT),
    _mapped("both", MIXED, affect=Affect.BOTH),
    WishStory("count up", Wish("count up", count=5), VcpuMap.parse("0-3,6")),
    WishStory("count down", Wish("count down", count=2), VcpuMap.parse("0-1")),
    SUPERSEDED,
    WITHDRAWN,
    WishStory("expired", Wish("expired", MORE, drop_after=0.3), START, is_here=False),
)


class Transcript:
    """What QEMU itself was asked for from now on, by all of its clients."""

    def __init__(self, at: Stage) -> None:
        self._path = at.guest.process.directory / TRACE_FILE
        data = self._path.read_bytes()
        self._head = data[: data.index(b"\n", data.index(b'"QMP"')) + 1]  # tells which monitor is nobody's
        self._begin = len(data)

    @property
    def carried_out(self) -> Counter[str]:
        """How often QEMU plugged each vCPU, and took up each unplug.

        What a client has sent before it died QEMU may throw away: there is no answer to it.
        """
        changes = read_changes(read_transcript((self._head + self._news()).decode()))
        return Counter(f"{each.command} {each.device}" for each in changes if each.accepted is not None)

    @property
    def has_removal(self) -> bool:
        """Whether the guest was asked for a vCPU."""
        return b'"device_del"' in self._news()

    def _news(self) -> bytes:
        return self._path.read_bytes()[self._begin :]


@dataclass
class Told:
    """What everybody could see on the server of one VM, in order."""

    states: list[dict[str, Any]] = field(default_factory=list)
    audit: list[dict[str, Any]] = field(default_factory=list)
    revision: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def over(self, revision: int) -> list[tuple[str, int]]:
        """Each answer to the wish of *revision* that says that it is over."""
        return [
            (answer["phase"], answer["code"])
            for answer in self.answers
            if answer["revision"] == revision and answer["phase"] in _PHASES_OVER
        ]

    @property
    def answers(self) -> list[dict[str, Any]]:
        """What was told of wishes."""
        return [state["answer"] for state in self.states if state["answer"] is not None]


class World:
    """A server, or a cluster, and what is to be seen there of each VM.

    Args:
        url: Its address.
        bus: A connection to it.
        wishes: The bucket of wishes.
        states: The bucket of states.
        leases: The bucket of leases.
    """

    def __init__(self, url: str, bus: Bus, wishes: Bucket, states: Bucket, leases: Bucket) -> None:
        self.url = url
        self.bus = bus
        self.wishes = wishes
        self.states = states
        self.leases = leases

    @classmethod
    @contextlib.asynccontextmanager
    async def at(cls, url: str, *, replicas: int = 1) -> "AsyncIterator[World]":
        """Connect to the server at *url*, and prepare it."""
        async with await Bus.connect(ServerAddress(url), name="test") as bus:
            await bus.prepare(lease_s=LEASE_S, replicas=replicas)
            wishes, states, leases = [await bus.bucket(each) for each in (WISHES, STATES, LEASES)]
            yield cls(url, bus, wishes, states, leases)

    @contextlib.asynccontextmanager
    async def told(self, key: VmKey) -> AsyncIterator[Told]:
        """Collect what is told of a VM."""
        told = Told()

        async def collect_states() -> None:
            async for entry in self.states.watch(key.key):
                if entry is not None:
                    told.revision = entry.revision
                    told.states += [json.loads(entry.value)] if entry.value else []
                    told.changed.set()

        async def collect_audit() -> None:
            async for each in self.bus.follow(f"qmpvcpu.event.{key.key}.Answered"):
                told.audit.append(json.loads(each.data))

        tasks = [asyncio.ensure_future(each()) for each in (collect_states, collect_audit)]
        try:
            yield told
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.wait(tasks)


class Wishing:
    """What is wished in a story, while an agent is there or has gone.

    Attributes:
        revisions: Those of the wishes.
        transcript: What QEMU is asked for.
        told: What is told of the VM.
        gone: Set when the agent has ended.
    """

    def __init__(self, wished: WishStory, world: World, transcript: Transcript, told: Told) -> None:
        self.revisions: list[int] = []
        self.transcript = transcript
        self.told = told
        self.gone = asyncio.Event()
        self._wished = wished
        self._world = world

    async def run(self) -> None:
        """Wish it all; return when the last wish is answered, or the agent has gone."""
        await self._write(self._wished.wish)
        if self._wished.newer is not None or self._wished.is_withdrawn:
            await until(lambda: self.gone.is_set() or self.transcript.has_removal, ANSWER_S)
        if self._wished.newer is not None:
            await self._write(self._wished.newer)
        elif self._wished.is_withdrawn:
            await self._world.wishes.delete(self._wished.key.key)
        gone = asyncio.ensure_future(self.gone.wait())
        async with asyncio.timeout(ANSWER_S):
            while not (gone.done() or self.told.over(self.revisions[-1])):
                self.told.changed.clear()
                seen = asyncio.ensure_future(self.told.changed.wait())
                await asyncio.wait({seen, gone}, return_when=asyncio.FIRST_COMPLETED)
                seen.cancel()
        gone.cancel()

    async def _write(self, wish: Wish) -> None:
        content = json.dumps(to_json(wish)).encode()
        self.revisions.append(await self._world.wishes.put(self._wished.key.key, content, timeout=ANSWER_S))


class WishMatrix(KillMatrix[_Way], Generic[_Way]):
    """One story: at each point something happens, and then all must come right.

    Args:
        wished: The story.
        zygote: Where the agents come from.
        world: The server.
        folder: For VMs and records.
        ways: What may happen.
        agenda: As of ``PointMatrix``.
    """

    tries = 5

    def __init__(
        self,
        wished: WishStory,
        zygote: Zygote,
        world: World,
        folder: Path,
        ways: Sequence[_Way],
        *,
        agenda: Agenda[_Way] | None = None,
    ) -> None:
        super().__init__(Story(wished.name, OnFailure.STOP, wished.guest), folder, TRACE_ARGUMENTS, agenda=agenda)
        self.ways = ways
        self.wished = wished
        self.twice: list[str] = []
        self.crossed: list[str] = []
        self.world = world
        self.zygote = zygote
        self.job = AgentJob("", "", "", "")
        self._told = Told()

    @abc.abstractmethod
    async def happen(self, point: str, way: _Way, wishing: Wishing) -> None:
        """Have agents carry it out, and something happen at *point*; add the points to *crossed*."""

    async def play(self) -> list[str]:
        """Have it happen at every point; return them."""
        async with self.world.told(self.wished.key) as self._told:
            return await super().play()

    async def run(self, point: str | None, way: _Way) -> tuple[str, ...]:
        """Have it carried out, while something happens at *point*; then look."""
        at = await self.at_start()
        self.job = self._new_job(at)
        for bucket in (self.world.wishes, self.world.states):
            await bucket.delete(self.wished.key.key)
        self._told.states.clear()
        self.crossed.clear()
        wishing = Wishing(self.wished, self.world, Transcript(at), self._told)
        try:
            await self.happen(point or "", way, wishing)
            await self._look(at, wishing)
        except (AssertionError, QmpVcpuError, TimeoutError) as error:
            self.lost.append(f"{self.wished}: {point}, {way}: {type(error).__name__}: {error}")
            await self.drop_stage()
        return tuple(each for each in self.crossed if each not in (QUIET, LOOKED))

    def _new_job(self, at: Stage) -> AgentJob:
        folder = self.new_folder()
        vms, records = folder / "vms", folder / "records"
        vms.mkdir()
        records.mkdir()
        if self.wished.is_here:
            (vms / "web.qmp").symlink_to(at.guest.qmp)
        return AgentJob(self.world.url, self.wished.key.host, str(vms), str(records))

    async def live(self, job: AgentJob, way: _Way, *, wishing: Wishing | None = None) -> int:
        """Have an agent live until it dies, or has nothing to do any more; return how it ended.

        Args:
            job: What it is to do.
            way: What happens if it stops at a point.
            wishing: What is wished once it is there, and is to be answered by it; None: nothing new.
        """
        pid = await self.zygote.start(job)
        wisher: asyncio.Task[None] | None = None

        def signal_it(number: int) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

        try:
            while not (said := await self.zygote.line()).startswith("="):
                self.crossed.append(said)
                if said == LOOKED and wishing is not None:
                    wisher = asyncio.ensure_future(wishing.run())
                    wisher.add_done_callback(lambda _: signal_it(signal.SIGTERM))
                elif said == QUIET and wishing is None:
                    signal_it(signal.SIGTERM)
                elif said == job.hold_at:
                    await self.interfere(way, lambda: signal_it(signal.SIGUSR1))
        except BaseException:
            signal_it(signal.SIGKILL)
            while not (await self.zygote.line()).startswith("="):
                pass
            raise
        finally:
            if wishing is not None:
                wishing.gone.set()
        if wisher is not None:
            await wisher
        return int(said[1:])

    async def interfere(self, way: _Way, go_on: Callable[[], None]) -> None:
        """Do what happens while an agent has stopped at a point, have it go on, and put things right again."""
        raise NotImplementedError

    async def _look(self, at: Stage, wishing: Wishing) -> None:
        story, told, revisions = self.wished, self._told, wishing.revisions
        twice = [f"{each}: {count} times" for each, count in wishing.transcript.carried_out.items() if count > 1]
        self.twice += twice
        assert not twice, ", ".join(twice)
        entry = await self.world.states.get(story.key.key)
        if entry is not None:
            await until(lambda: told.revision >= entry.revision)
        plugged = await at.plugged()
        over = told.over(revisions[-1])
        assert len(set(over)) <= 1, f"it was answered as {over}"
        if not over:
            begun = any(answer["revision"] == revisions[-1] for answer in told.answers)
            assert story.is_withdrawn, "it was never answered"
            assert not begun, "it was told to be carried out, and never answered"
            return
        phase, code = over[0]
        assert code != 3, "its answer says that nothing is known"
        if story.is_here:
            self._check_result(phase, code, plugged)
            assert entry is not None
            state = json.loads(entry.value or b"")
            # What is pending may be over since the last agent has gone.
            assert state["pending"] or state["enabled"] == str(plugged), f"{state['enabled']} are told, not {plugged}"
            assert not state["drift"]
            assert state["error"] is None or code, f"answered 0, and with {state['error']}"
            self._check_record(plugged, reached=code == 0)
        else:
            assert phase == "expired"
            assert await self.world.wishes.get(story.key.key) is None
        await until(lambda: any(each["revision"] == revisions[-1] for each in told.audit))
        answers = [each for each in told.audit if each["revision"] == revisions[-1]]
        assert len(answers) == 1, f"told {len(answers)} times: {answers}"

    def _check_result(self, phase: str, code: int, plugged: VcpuMap) -> None:
        story = self.wished
        reached = story.reached_then or story.reached
        if phase == "withdrawn":  # what was asked for by then comes to its end
            assert plugged <= (START | reached), f"it was withdrawn, and there are {plugged}"
            return
        assert phase == "ended"
        if code == 0:
            assert plugged == reached, f"answered 0, and there are {plugged}"
        else:
            assert plugged in story.otherwise, f"answered {code}, and there are {plugged}"

    def _check_record(self, plugged: VcpuMap, *, reached: bool) -> None:
        (path,) = Path(self.job.records).iterdir()
        if not self.wished.is_withdrawn:
            check_record(path, plugged)
        if reached and self.wished.wish.options.affect is Affect.BOTH:
            metadata = read_identity(path.read_bytes()).metadata
            assert metadata is not None
            assert metadata.next_boot in (None, plugged)


class Disturbed(WishMatrix[_Way]):
    """At each point of an agent, something happens to what it talks to; the agent itself stays."""

    tries = 2

    async def happen(self, point: str, way: _Way, wishing: Wishing) -> None:
        """Have one agent carry it out, and ``interfere`` at *point*."""
        assert await self.live(replace(self.job, hold_at=point, only_talk=True), way, wishing=wishing) == 0


async def play(what: str, matrices: Sequence[WishMatrix[Any]], record_property: Callable[[str, object], None]) -> int:
    """Play them all at once; return how many points there were, once all is well. *what*: what happens there."""
    await asyncio.gather(*(matrix.play() for matrix in matrices))
    count = 0
    for agenda in dict.fromkeys(matrix.agenda for matrix in matrices):
        sharing = [matrix for matrix in matrices if matrix.agenda is agenda]
        unmet = [each for matrix in sharing for each in matrix.unmet]
        count += len(agenda.points) - len(unmet)
        print(f"\n{sharing[0].wished}: {len(agenda.points)} points; not met again: {unmet}")  # noqa: T201 -- for pytest -s
    lost = [each for matrix in matrices for each in matrix.lost]
    twice = [each for matrix in matrices for each in matrix.twice]
    record_property(WISHES_KEPT, (what, count, len(lost), len(twice)))
    assert not lost, "\n".join(lost)
    return count
