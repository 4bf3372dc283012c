"""Controlling processes that die: forked from one that has imported everything, since a fresh Python takes 0.25 s.

``python -m tests.crash.zygote``: each line of standard input is a job; its process writes the name of each point that
it crosses, and when it is over, its exit status follows, after a ``=``. Other modules have other jobs.
"""

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import qmpvcpu
import qmpvcpu.agent.door
import qmpvcpu.agent.numbering
import qmpvcpu.record.record
import qmpvcpu.vm.attaching
import qmpvcpu.vm.placing
from qmpvcpu import Affect, OnFailure, TransitionError, VcpuController
from qmpvcpu.model.placement import Placement
from tests.crash.points import Points, watching
from tests.crash.stage import placement_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from qmpvcpu.model.options import ChangeOptions

NAME = "crash"
ROOT = Path(__file__).parents[2]
# What is held, and forgotten by a test that fails, does not stay.
_LONGEST_S = 50


@dataclass(frozen=True)
class Job:
    """One transition, to be carried out in a process of its own.

    Attributes:
        qmp: Address of the VM.
        record: Its record.
        target: The map.
        policy: What to do when a step fails.
        timeout: For the guest's answers, in seconds.
        die_at: The point at which it kills itself; "" lets it live.
        hold_at: The point at which it stops, to be killed.
        agent: Address of the guest's agent, which is asked first; "": none is.
        pins: Where the threads of the vCPUs are to run, as ``Place.on`` takes it.
        stuck: The vCPU whose thread the host does not let go there; -1: none.
        place: Only threads are moved, and the next boot is changed too as this ``Affect`` says; "": a map is set.
    """

    qmp: str
    record: str
    target: str
    policy: str
    timeout: float
    die_at: str = ""
    hold_at: str = ""
    agent: str = ""
    pins: Sequence[tuple[int, tuple[str, str | None]]] = ()
    stuck: int = -1
    place: str = ""


@dataclass(frozen=True)
class Death:
    """How a process ended, and the points that it crossed before."""

    code: int
    crossed: tuple[str, ...]


class Zygote:
    """The test's side.

    Args:
        module: What to run: it calls ``serve``.
        prefix: What the command begins with.
    """

    def __init__(self, module: str = "tests.crash.zygote", *, prefix: Sequence[str] = ()) -> None:
        self._module = module
        self._prefix = tuple(prefix)
        self._child: int | None = None  # the job that runs

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(*self._prefix, sys.executable, "-m", self._module),
            cwd=ROOT,
            # What is killed saves nothing of what coverage measured in it, and measuring slows it down.
            env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in (self._child, self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
        await self._process.communicate()

    async def start(self, job: "DataclassInstance") -> int:
        """Start a job, and return its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        self._child = int(await self.line())
        return self._child

    async def crossed(self, point: str) -> None:
        """Return when the job has crossed *point*."""
        while (said := await self.line()) != point:
            assert not said.startswith("="), f"it ended before {point}"

    async def end(self) -> Death:
        """Return how the job ended, and the points of which nobody has asked yet."""
        crossed: list[str] = []
        while not (said := await self.line()).startswith("="):
            crossed.append(said)
        return Death(int(said[1:]), tuple(crossed))

    async def run(self, job: "DataclassInstance") -> Death:
        """Do a job, and return how it ended."""
        await self.start(job)
        return await self.end()

    async def line(self) -> str:
        """Return the next line that the job says; the last one begins with ``=``."""
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            line = await self._process.stdout.readline()
        assert line, "the zygote is gone"
        if line.startswith(b"="):
            self._child = None
        return line.decode().rstrip("\n")


def say(words: str) -> None:
    """Tell the test something, from a job: at once and whole, so that nothing is left in a buffer by a SIGKILL."""
    os.write(1, f"{words}\n".encode())


def dying_at(point: str, *, hold_at: str = "") -> Callable[[str], None]:
    """Return what tells the test of each point, and kills this process at *point*, or stops it at *hold_at*.

    SIGUSR1 has it go on.
    """

    def act(name: str) -> None:
        say(name)
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == hold_at:
            signal.sigwait({signal.SIGUSR1})  # also if it has come already

    return act


async def _control(job: Job) -> None:
    points = Points(dying_at(job.die_at, hold_at=job.hold_at))
    placement = placement_of({vcpu: (cpus, scheduler) for vcpu, (cpus, scheduler) in job.pins})
    vm = await qmpvcpu.attach(job.qmp, name=NAME, record=job.record, agent=job.agent or None)
    with watching(points, stuck=job.stuck, only_places=bool(job.place)):
        points.cross("attached")
        if job.place:
            await vm.host.place(placement, affect=Affect(job.place))
        else:
            await _set_map(vm, job, placement)
        points.cross("over")
        await vm.close()
    points.cross("closed")


async def _set_map(vm: VcpuController, job: Job, placement: Placement | None) -> None:
    options: ChangeOptions = {"on_failure": OnFailure(job.policy), "timeout": job.timeout}
    if job.agent:
        options["offline_first"] = True
    if placement is not None:
        options["placement"] = placement
    with contextlib.suppress(TransitionError):
        await vm.set_map(job.target, **options)


def _live(work: Callable[[dict[str, Any]], Awaitable[None]], job: dict[str, Any], longest: int) -> None:
    async def live() -> None:
        await work(job)

    signal.alarm(longest)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        asyncio.run(live())
    except BaseException:  # noqa: BLE001 -- the child must not come back from here and play the zygote
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def serve(work: Callable[[dict[str, Any]], Awaitable[None]], *, longest: int = _LONGEST_S) -> None:
    """Do one job after another, each in a process of its own, which ends after *longest* seconds."""
    gc.freeze()  # so that no fork looks through all that was imported, and has a copy of it made
    for line in sys.stdin:
        child = os.fork()
        if not child:
            say(str(os.getpid()))
            _live(work, json.loads(line), longest)
        _, status = os.waitpid(child, 0)
        say(f"={os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    serve(lambda job: _control(Job(**job)))
