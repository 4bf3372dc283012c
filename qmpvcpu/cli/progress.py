"""What goes on while a command runs, from the VMs' events alone: a live board on a terminal, else lines."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

from qmpvcpu.cli.output import Block, Column, Line, Output, Table
from qmpvcpu.errors import MonitorLostError, TransitionError, counted, printable
from qmpvcpu.events import (
    Disconnected,
    Event,
    InstanceChanged,
    LayoutChanged,
    MigrationChanged,
    PlaceDrifted,
    Reconnected,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlaced,
    VcpuPlugged,
    VcpuProven,
    VcpuUnplugged,
    VmReset,
    VmResumed,
    VmStopped,
)
from qmpvcpu.model.options import Proof
from qmpvcpu.model.transition import Action, Step

if TYPE_CHECKING:
    from qmpvcpu.cli.run import Shell
    from qmpvcpu.cli.terminal import Screen
    from qmpvcpu.fleet import VmResult
    from qmpvcpu.vm.controller import VcpuController
    from qmpvcpu.vm.subscribers import EventStream

_T = TypeVar("_T")

# A guest that answers sooner needs no commentary.
_QUIET_S: Final = 0.4
_TICK_S: Final = 0.1
_BAR_WIDTH: Final = 20
# Where a transition has more steps, those under way are shown and the rest is counted.
_MOST_ROWS: Final = 16
# Lines of a terminal that show no step, and no VM.
_OTHER_LINES: Final = 5
# How many VMs that are waited for are named.
_MOST_NAMED: Final = 3

_SENTENCES: Final[Mapping[type[Event], str]] = {
    VcpuPlugged: "vCPU {event.ids} is plugged",
    VcpuProven: "vCPU {event.ids} {event.proof.value}",
    VcpuPlaced: "vCPU {event.ids} is in its place",
    PlaceDrifted: "vCPU {event.ids} has drifted to {event.found}; its place is {event.wanted}",
    UnplugRequested: "vCPU {event.ids}: the guest is asked, no reaction yet",
    UnplugAcknowledged: "vCPU {event.ids}: the guest works on it",
    UnplugRefused: "vCPU {event.ids}: the guest refused: {event.reason}",
    UnplugPending: "vCPU {event.ids}: no answer in time, it is pending",
    VcpuUnplugged: "vCPU {event.ids} is gone",
    VmStopped: "the VM is paused: the guest answers when it runs again",
    VmResumed: "the VM runs again",
    VmReset: "the VM was reset: what is pending stays so",
    MigrationChanged: "migration: {event.status}",
    LayoutChanged: "a read showed what no event had told",
    Disconnected: "the QMP connection is lost: {event.why}",
    Reconnected: "the QMP connection is back",
    InstanceChanged: "another QEMU runs this VM now: what was pending is void",
}

# What a step does, by its last event, with the style in which that is shown.
_STATES: Final[Mapping[type[Event], tuple[str, str]]] = {
    VcpuPlugged: ("plugged", "green"),
    VcpuProven: ("plugged, {event.proof.value}", "green"),
    UnplugRequested: ("asked, no reaction yet", "yellow"),
    UnplugAcknowledged: ("the guest works on it", "yellow"),
    UnplugRefused: ("refused: {event.reason}", "red"),
    UnplugPending: ("no answer in time, pending", "yellow"),
    VcpuUnplugged: ("gone", "green"),
}

# Steps under way come first, then settled ones, then those that have not begun.
_DOING, _SETTLED, _WAITING = range(3)


def sentence(event: Event) -> str:
    """Return what *event* means to somebody who waits."""
    if isinstance(event, LayoutChanged) and event.resync:
        return "too much happened at once: some events were dropped"
    if isinstance(event, VcpuPlaced) and event.why_not:
        return printable(f"vCPU {event.ids} is not in its place: {event.why_not}")
    if isinstance(event, PlaceDrifted) and not event.ids:
        return f"QEMU's main thread has drifted to {event.found}; its place is {event.wanted}"
    return printable(_SENTENCES[type(event)].format(event=event))


class Picture(Protocol):
    """What a terminal shows while something goes on."""

    def picture(self, screen: "Screen") -> Iterable[Block]:
        """Return it as it is now, not higher than *screen*."""


class Board(Picture, Protocol):
    """The same, which can be told in lines too."""

    def line(self) -> str:
        """Return it in one line, for a file or a pipe."""


@contextlib.asynccontextmanager
async def shown(board: Board, output: Output) -> AsyncIterator[None]:
    """Show *board* while the body runs, if that takes a while: drawn on a terminal, else each new line."""
    async with meanwhile(_show(board, output)):
        yield


@contextlib.asynccontextmanager
async def kept(picture: Picture, output: Output) -> AsyncIterator[None]:
    """Draw *picture* on the terminal *output* while the body runs; the last one stays."""
    with output.live(keep=True) as screen:
        try:
            async with meanwhile(_draw(picture, screen)):
                yield
        finally:
            screen.draw(*picture.picture(screen))


async def _show(board: Board, output: Output) -> None:
    started = time.monotonic()
    await asyncio.sleep(_QUIET_S)
    if output.draws:
        with output.live(keep=False) as screen:
            await _draw(board, screen)
    shown = ""
    while True:
        if shown != (line := board.line()):
            shown = line
            output.print(f"{time.monotonic() - started:5.1f} s  {line}")
        await asyncio.sleep(_TICK_S)


async def _draw(picture: Picture, screen: "Screen") -> None:
    while True:
        screen.draw(*picture.picture(screen))
        await asyncio.sleep(_TICK_S)


@contextlib.asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do *work* while the body runs."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class StepRow(NamedTuple):
    """One step, as it stands.

    Attributes:
        step: Action and vCPU ids.
        words: What it does, or how it ended.
        style: How to show these.
        seconds: How long it has been under way; None: it is not.
    """

    step: str
    words: str
    style: str
    seconds: float | None


class StepTracker:
    """Follows *steps* by events: which are settled, one way or the other, which are undone again, what each does.

    A plug is settled once its *proof* is there.

    Attributes:
        total: How many steps there are.
        undone: How many of the settled ones are undone.
    """

    def __init__(self, steps: Iterable[Step], proof: Proof = Proof.PRESENT) -> None:
        self._proof = proof
        self._unproven: set[int] = set()
        self._steps = {step.first: step for step in steps}
        self._open = {first: step.action for first, step in self._steps.items()}
        self._done: dict[int, Action] = {}
        self._words: dict[int, tuple[str, str]] = {}
        self._began: dict[int, float] = {}
        self.total = len(self._open)
        self.undone = 0

    @property
    def settled(self) -> int:
        """How many are answered."""
        return self.total - len(self._open)

    def is_news(self, event: Event) -> bool:
        """Return False for what the guest's list proves of a vCPU that was plugged before, if nothing waits for it.

        Before an unplug the guest is asked, and so tells that the vCPU is online: the opposite of what is wanted.
        """
        if isinstance(event, VcpuProven) and event.seconds is None:
            return self._waits(min(event.ids), Action.ONLINE)
        return True

    def take(self, event: Event) -> None:
        """Take one event in."""
        undone = self.undone
        match event:
            case VcpuPlugged(ids=ids) | VcpuProven(ids=ids):
                if not self._take_plug(event, min(ids)):
                    return
            case VcpuUnplugged(ids=ids):
                self._settle(min(ids), Action.UNPLUG)
            case UnplugRefused(ids=ids) | UnplugPending(ids=ids):
                self._open.pop(min(ids), None)
            case UnplugRequested(ids=ids) | UnplugAcknowledged(ids=ids):
                self._began.setdefault(min(ids), time.monotonic())
            case _:
                return
        words, style = _STATES[type(event)]
        words = printable(words.format(event=event))
        if self.undone > undone:
            words = "undone"
        elif self._done.get(min(ids)) is Action.PLUG and not isinstance(event, VcpuPlugged | VcpuProven):
            words = f"to be undone: {words}"
        self._words[min(ids)] = words, style

    def _take_plug(self, event: VcpuPlugged | VcpuProven, first: int) -> bool:
        """Take in what is known of a plug, and return whether that is all that is awaited of it."""
        if isinstance(event, VcpuPlugged):
            if self._proof is Proof.PRESENT or not self._waits(first, Action.PLUG):
                self._settle(first, Action.PLUG)
                return True
            self._unproven.add(first)
            self._began.setdefault(first, time.monotonic())
            self._words[first] = f"plugged, not yet {self._proof.value}", "yellow"
            return False
        if event.proof is Proof.ONLINE and self._waits(first, Action.ONLINE):
            self._settle(first, Action.ONLINE)
        elif first in self._unproven and self._proof <= event.proof:
            self._unproven.discard(first)
            self._settle(first, Action.PLUG)
        return not self._waits(first, Action.PLUG)

    def _waits(self, first: int, action: Action) -> bool:
        """Return True if what is awaited of a slot is *action*."""
        return self._open.get(first) is action

    def _settle(self, first: int, action: Action) -> None:
        wanted = self._open.get(first)
        if first in self._unproven and action is Action.UNPLUG:  # so it is undone without having been proven
            self._unproven.discard(first)
            self._done[first] = self._open.pop(first)
        if wanted is action or (wanted is Action.KEEP and action is Action.PLUG):
            self._done[first] = self._open.pop(first)
        elif first in self._done and self._done[first] not in (action, Action.KEEP):
            del self._done[first]
            self.undone += 1

    def __str__(self) -> str:
        undone = f", {self.undone} undone" if self.undone else ""
        return f"{self.settled} of {self.total}{undone}"

    def rows(self, most: int) -> list[StepRow]:
        """Return what each step does, in their order; where there are more than *most*, those under way first."""
        ranked = [self._row(step) for step in self._steps.values()]
        if len(ranked) > most:
            ranked.sort(key=lambda row: row[0])
        return [row for _, row in ranked[:most]]

    def _row(self, step: Step) -> tuple[int, StepRow]:
        first = step.first
        if first not in self._words:
            goes_first = step.action is Action.UNPLUG and step.asks_agent
            words = "goes offline in the guest first" if goes_first else "waits"
            return _WAITING, StepRow(str(step), words, "dim", None)
        words, style = self._words[first]
        if first not in self._open:
            return _SETTLED, StepRow(str(step), words, style, None)
        began = self._began.get(first)
        return _DOING, StepRow(str(step), words, style, None if began is None else time.monotonic() - began)


@contextlib.asynccontextmanager
async def progress(
    vm: "VcpuController", output: Output, *, waiting: str, steps: Iterable[Step] = (), proof: Proof = Proof.PRESENT
) -> AsyncIterator[None]:
    """Say what *vm*'s guest does while the body runs.

    Args:
        vm: The VM.
        output: Where to say it.
        waiting: What the body waits for, until something happens.
        steps: What the body is to bring about; it is told how many of them are settled, and what each does.
        proof: What each plug needs.
    """
    board = _VmProgress(waiting, StepTracker(steps, proof))
    async with meanwhile(board.listen(vm.events())), shown(board, output):
        yield


class _VmProgress:
    """One VM: what happened last, and each step."""

    def __init__(self, waiting: str, tracker: StepTracker) -> None:
        self._now = waiting
        self._aside = waiting  # what is about no vCPU: those have rows of their own
        self._tracker = tracker
        self._started = time.monotonic()

    async def listen(self, events: "EventStream") -> None:
        async for event in events:
            if not self._tracker.is_news(event):
                continue
            self._tracker.take(event)
            self._now = sentence(event)
            self._aside = "" if hasattr(event, "ids") else self._now

    def line(self) -> str:
        return f"{self._tracker}: {self._now}" if self._tracker.total else self._now

    def picture(self, screen: "Screen") -> Iterator[Block]:
        seconds = time.monotonic() - self._started
        if not self._tracker.total:
            yield f"{self._now} ({seconds:.1f} s)"
            return
        yield _bar(self._tracker.settled, self._tracker.total, screen, f"{self._tracker}  {seconds:.0f} s")
        if self._aside:
            yield self._aside
        rows = self._tracker.rows(max(min(screen.height - _OTHER_LINES, _MOST_ROWS), 1))
        table = Table(Column(), Column(fold=True))
        for row in rows:
            took = "" if row.seconds is None else f" ({row.seconds:.1f} s)"
            table.add(row.step, Line(row.words + took, style=row.style))
        yield table
        if left := self._tracker.total - len(rows):
            yield Line(f"... and {left} more", style="dim")


def _bar(done: int, total: int, screen: "Screen", words: str) -> Line:
    width = min(_BAR_WIDTH, screen.width // 5)
    full = width * done // max(total, 1)
    return Line(("━" * full, "green"), ("━" * (width - full), "dim"), f"  {words}")


async def run_transition(
    shell: "Shell",
    vm: "VcpuController",
    work: Coroutine[Any, Any, _T],
    steps: Iterable[Step],
    proof: Proof = Proof.PRESENT,
) -> _T:
    """Wait for a transition and show how it goes; the first signal stops it at the next safe point."""
    task = asyncio.ensure_future(work)
    steps = tuple(steps)
    agents = any(step.asks_agent and step.action is Action.UNPLUG for step in steps)
    waiting = "asking the guest's agent, then QEMU" if agents else "asking QEMU"

    async def stop() -> None:
        shell.note("stopping at the next safe point; a second signal lets go of the VM at once")
        if await vm.cancel() is None:  # it has not begun
            task.cancel()

    with shell.signals.stopped_by(stop):
        try:
            async with progress(vm, shell.err, waiting=waiting, steps=steps, proof=proof):
                return await task
        except TransitionError:
            await _note_loss(shell, vm)
            raise


async def _note_loss(shell: "Shell", vm: "VcpuController") -> None:
    """Note whether the connection is lost, which a report does not say; asks nothing of QEMU."""
    try:
        await vm.wait_for(lambda _: True)
    except MonitorLostError as error:
        shell.lost = str(error)


def short_address(address: str) -> str:
    """Return *address* as it is shown."""
    return printable(address.removeprefix("unix:"))


class FleetProgress:
    """The VMs at *addresses*: how many are done, and what each of the others does.

    Attributes:
        held: Why no more VMs are begun, and what goes on with them; "": they are.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.held = ""
        self._total = len(addresses)
        self._left = dict.fromkeys(addresses)
        self._failed = 0
        self._doing: dict[str, str] = {}
        self._started = time.monotonic()

    def take(self, result: "VmResult[Any]") -> None:
        """Take in that one VM is done."""
        self._left.pop(result.address, None)
        self._failed += result.error is not None

    @contextlib.asynccontextmanager
    async def following(self, vm: "VcpuController", steps: Iterable[Step], proof: Proof) -> AsyncIterator[None]:
        """Show what becomes of *steps*, whose plugs need *proof*, on *vm* while the body runs."""
        try:
            async with meanwhile(self._follow(vm.address, vm.events(), StepTracker(steps, proof))):
                yield
        finally:
            self._doing.pop(vm.address, None)

    async def _follow(self, address: str, events: "EventStream", tracker: StepTracker) -> None:
        async for event in events:
            if not tracker.is_news(event):
                continue
            tracker.take(event)
            self._doing[address] = f"{tracker}: {sentence(event)}"

    def line(self) -> str:
        """Return how many are done, and who is waited for."""
        failed = f", {self._failed} failed" if self._failed else ""
        few = len(self._left) <= _MOST_NAMED
        waiting = f"; waiting for {', '.join(map(short_address, self._left))}" if self._left and few else ""
        held = f"; {self.held}" if self.held and self._left else ""
        return f"{self._total - len(self._left)} of {counted(self._total, 'VM')}{failed}{held}{waiting}"

    def picture(self, screen: "Screen") -> Iterator[Block]:
        """Return the bar, and a row for each VM that does something, as far as there is room."""
        seconds = time.monotonic() - self._started
        yield _bar(self._total - len(self._left), self._total, screen, f"{seconds:.0f} s  {self.line()}")
        table = Table(Column(fold=True), Column(fold=True))
        room = max((screen.height - _OTHER_LINES) // 2, 1)  # each may take two lines
        for address, words in list(self._doing.items())[:room]:
            table.add(short_address(address), Line(words, style="yellow"))
        yield table
