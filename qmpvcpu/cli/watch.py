"""watch: what happens to a VM's vCPUs, as it happens: a live table, a line an event, or a document an event."""

import asyncio
import contextlib
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

from qmpvcpu.cli.list import HOST, look_at_threads
from qmpvcpu.cli.options import AGENT, Seconds, command, flag, option
from qmpvcpu.cli.output import Block, Column, Line, Table
from qmpvcpu.cli.progress import kept, meanwhile, sentence
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import WIDE, age, headline, vcpu_table
from qmpvcpu.cli.vms import READ_MANY_OPTIONS, take_many
from qmpvcpu.documents.events import event_json
from qmpvcpu.documents.form import INTERRUPTED, NOT_REACHED, REACHED, as_line, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.errors import GuestAgentError, MonitorError
from qmpvcpu.events import (
    Disconnected,
    Event,
    InstanceChanged,
    LayoutChanged,
    Origin,
    PlaceDrifted,
    Reconnected,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlugged,
    VcpuProven,
    VcpuUnplugged,
)
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap, named

if TYPE_CHECKING:
    from qmpvcpu.cli.terminal import Screen
    from qmpvcpu.model.placement import QemuThread
    from qmpvcpu.vm.controller import VcpuController

RESYNC_S: Final = 5.0
"""What nobody announces, such as a plug that the guest does not acknowledge, is seen within this time."""
# How often QEMU's threads are looked at.
_LOOK_S: Final = 1.0
# How long the guest has for the first list before the state is shown without it.
_FIRST_LIST_S: Final = 2.0
_MOST_EVENTS: Final = 20
# Lines that show no vCPU and no event: heads of the columns, blank ones, the cursor's.
_OTHER_LINES: Final = 7
# Of the rest a third is for events, at least these.
_FEWEST_EVENTS: Final = 3
_FEWEST_ROWS: Final = 4

STYLES: Final[dict[type[Event], str]] = {
    VcpuPlugged: "green",
    VcpuProven: "green",
    VcpuUnplugged: "green",
    UnplugRequested: "yellow",
    UnplugAcknowledged: "yellow",
    UnplugPending: "yellow",
    UnplugRefused: "red",
    PlaceDrifted: "yellow",
    Disconnected: "bold red",
    InstanceChanged: "bold",
}


@dataclass(frozen=True)
class End:
    """When watching ends by itself: at a map, after a time, or never."""

    map: VcpuMap | None = None
    seconds: float | None = None

    def check(self, layout: Layout, whose: str = "this machine") -> None:
        """Refuse to wait for what this VM, which is called *whose*, can never have.

        Raises:
            BadUsageError: The map has no vCPU 0, or vCPUs that the VM has no slot for.
        """
        if self.map is None:
            return
        if 0 not in self.map:
            raise BadUsageError(f"--until {self.map}: it would never end, since vCPU 0 never leaves")
        if beyond := VcpuMap(each for each in self.map if each >= layout.max):
            raise BadUsageError(f"--until {self.map}: no {named(beyond)}: {whose} has 0 to {layout.max - 1}")

    def reached(self, state: "_State") -> bool:
        """Return True if *state* is what was waited for."""
        return self.map is not None and state.enabled == self.map and not state.pending

    def result(self, code: int, why: str, state: dict[str, Any], short_of_it: str = "") -> CommandResult:
        """Return the result: why it ended, the *state* then, and in words what is *short_of_it*."""
        how = f" within {self.seconds:g} s" if why == "time" and self.seconds is not None else f" ({why})"
        complaint = (f"qmpvcpu: {self.map} not reached{how}{short_of_it}",) if code else ()
        return CommandResult(code, document(ended=why, **state), complaint=complaint)


class _State(Protocol):
    """What a VM has, whole or in short."""

    @property
    def enabled(self) -> VcpuMap:
        """Those that are plugged."""

    @property
    def pending(self) -> VcpuMap:
        """Those whose removal is unanswered."""


@command(
    option("--for", "seconds", metavar="SECONDS", type=Seconds(), help="End after so long."),
    option("--until", metavar="MAP", help="End when exactly these are plugged and none is pending."),
    flag("--reconnect", "When QEMU is lost, wait for it to come back."),
    HOST,
    AGENT,
    *READ_MANY_OPTIONS,
)
async def watch(
    shell: Shell, *, seconds: float | None, until: str | None, reconnect: bool, host: bool, **vms: Any
) -> CommandResult:
    """Follow every change to the vCPUs, by any client, until SIGINT. Reads only.

    On a terminal: the table of vCPUs with the last events below. Else one line an event. With --json one document a
    line: the state first ("event": null), then each event, at the end why it ended, or the error.

    It takes a QMP socket of its own: a UNIX one serves one client at a time. With --agent the guest is asked again
    and again which vCPUs it uses, and what that proves is told; the agent's socket is held meanwhile.

    With --host, or if the record has a placement, the table and the first document show where the vCPU threads run.
    A thread that drifts is reported.

    With --nats, --dir or more than one --qmp: all these VMs, and those that come later. The table has a row for each
    VM, each line begins with its VM, and watching goes on when a VM is lost. With --nats also who asked for what, and
    what came of it. --until waits until all VMs have exactly this map.

      qmpvcpu watch --qmp /run/vm.qmp2

      qmpvcpu watch --until 0-3 --for 60 --qmp /run/vm.qmp2 --json

      qmpvcpu watch --nats nats://10.0.0.1:4222 --where 'host=rack1-*'

    Exit codes: 0 the map of --until is there; without it: --for has passed, or a signal came; 1 --for has passed
    first; 2 bad usage or input; 3 no connection, or QEMU lost; 4 record unreadable or locked; 130 a signal
    came first.
    """
    end = End(None if until is None else VcpuMap.parse(until), seconds)
    if (many := take_many(shell, vms)) is not None:
        from qmpvcpu.cli.watch_many import watch_many  # not at the top: one VM does without

        return await watch_many(shell, many, end)
    async with shell.attach(reconnect=reconnect, resync_interval=RESYNC_S, read_only=True) as vm:
        end.check(vm.layout)
        threads = _Threads(shell, vm, host=host)
        async with _asking(shell, vm), threads.followed(), _display(shell, vm, threads) as display:
            code, why = await follow(shell, end, _read(shell, vm, end, display))
    return end.result(code, why, state_json(vm.layout))


@contextlib.asynccontextmanager
async def _asking(shell: Shell, vm: "VcpuController") -> AsyncIterator[None]:
    """Ask the guest which vCPUs it uses, now and while the body runs; if it does not answer, that is told once."""
    if not vm.guest.has_agent:
        yield
        return

    async def ask_on() -> None:
        while True:
            await asyncio.sleep(RESYNC_S)
            with contextlib.suppress(GuestAgentError):
                await vm.guest.vcpus(timeout=RESYNC_S)

    try:
        await vm.guest.vcpus(timeout=_FIRST_LIST_S)
    except GuestAgentError as error:
        shell.note(f"qmpvcpu: which vCPUs the guest uses is not known yet: {error}")
    async with meanwhile(ask_on()):
        yield


class _Threads:
    """Where QEMU's threads run, read again and again, if anybody wants that.

    Attributes:
        seen: As found last; none: nobody looks, or they cannot be found.
    """

    def __init__(self, shell: Shell, vm: "VcpuController", *, host: bool) -> None:
        self.seen: Sequence[QemuThread] = ()
        self._shell = shell
        self._vm = vm
        self._wanted = host or bool(shell.options.record is not None and vm.host.placement)

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Look now, and while the body runs; that they cannot be found is told once."""
        if not self._wanted:
            yield
            return
        self.seen, error = await look_at_threads(self._vm)
        if error is not None:
            self._shell.note(f"qmpvcpu: where the vCPU threads run is not known: {error}")
        async with meanwhile(self._look_on()):
            yield

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(MonitorError):  # until the connection is back
                self.seen, _ = await look_at_threads(self._vm)

    def as_json(self) -> dict[str, Any]:
        """Return them for the document; nothing if nobody looks."""
        if not self._wanted:
            return {}
        from qmpvcpu.cli.pin import threads_json  # not at the top: most do without

        return {"threads": threads_json(self.seen)}

    def drifted(self) -> Iterator[str]:
        """Return a line for each that has drifted."""
        if any(thread.drifted for thread in self.seen):
            from qmpvcpu.cli.pin import drift_lines  # as above

            yield from drift_lines(self.seen)


async def follow(shell: Shell, end: End, read: Coroutine[Any, Any, str]) -> tuple[int, str]:
    """Have it *read* what happens until *end*, or a signal; return the exit code and why it ended."""
    reading = asyncio.create_task(read)

    async def stop() -> None:
        reading.cancel()

    with shell.signals.stopped_by(stop):
        await asyncio.wait({reading}, timeout=end.seconds)
    if not reading.done():
        reading.cancel()
        return (REACHED if end.map is None else NOT_REACHED), "time"
    if reading.cancelled():
        return (REACHED if end.map is None else INTERRUPTED), shell.signals.came
    why = reading.result()
    return (REACHED if end.map is None or why == "reached" else NOT_REACHED), why


async def _read(shell: Shell, vm: "VcpuController", end: End, display: "_Display") -> str:
    events = vm.events()
    display.begin(vm.layout)
    if end.reached(vm.layout):
        return "reached"
    if shell.stdout_closed and end.map is None:  # else a quiet VM would have it hold a socket for nobody
        return "nobody reads"
    async for event in events:
        display.tell(event, vm.layout)
        if end.reached(vm.layout):
            # The layout is ahead of the events: what led to it is told too.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    async for more in events:
                        display.tell(more, vm.layout)
            return "reached"
        if shell.stdout_closed:
            return "nobody reads"
    await vm.refresh()  # the stream has ended: this says why
    return "closed"


class _Display(Protocol):
    """Where it is told."""

    def begin(self, layout: Layout) -> None:
        """Tell what is so at the start."""

    def tell(self, event: Event, layout: Layout) -> None:
        """Tell of one event; *layout* is what is known now."""


@contextlib.asynccontextmanager
async def _display(shell: Shell, vm: "VcpuController", threads: _Threads) -> "AsyncIterator[_Display]":
    if shell.options.json:
        yield _Documents(shell, threads)
    elif not shell.out.draws:
        yield _Lines(shell, threads)
    else:
        table = _LiveTable(vm, threads)
        async with kept(table, shell.out):
            yield table


class _Documents:
    """One JSON document a line."""

    def __init__(self, shell: Shell, threads: _Threads) -> None:
        self._shell = shell
        self._threads = threads

    def begin(self, layout: Layout) -> None:
        """Print the state without an event."""
        self._print({"event": None, **self._threads.as_json()}, layout)

    def tell(self, event: Event, layout: Layout) -> None:
        """Print the event."""
        self._print(event_json(event), layout)

    def _print(self, said: dict[str, Any], layout: Layout) -> None:
        line = as_line(document(time=stamp(), **said, **state_json(layout)))
        self._shell.put(lambda: sys.stdout.write(line))


class _Lines:
    """One line an event."""

    def __init__(self, shell: Shell, threads: _Threads) -> None:
        self._shell = shell
        self._threads = threads

    def begin(self, layout: Layout) -> None:
        """Print the VM and its map, and what is not in its place."""
        self._shell.say(headline(layout), *self._threads.drifted())

    def tell(self, event: Event, layout: Layout) -> None:
        """Print the event and the map."""
        self._shell.say(f"{clock()}  {told(event)}  {layout}")


def stamp(at: float | None = None) -> str:
    """Return the time *at* which something was, in seconds since 1970, as a document has it; None: now."""
    return datetime.fromtimestamp(time.time() if at is None else at, UTC).isoformat(timespec="milliseconds")


def clock(at: float | None = None) -> str:
    """Return the time of day of *at*, to the millisecond; None: now."""
    moment = datetime.fromtimestamp(time.time() if at is None else at).astimezone()
    return moment.isoformat(" ", "milliseconds")[11:23]


def told(event: Event) -> str:
    """Return *event* in words, with who brought it about if that was another client of QEMU's."""
    by = " (by another client)" if event.origin is Origin.OTHER and not isinstance(event, PlaceDrifted) else ""
    return f"{sentence(event)}{by}"


class _Since:
    """Since when a removal is pending; None: since before this was watching."""

    def __init__(self, *, before: bool) -> None:
        self._at = "" if before else clock()
        self._started = time.monotonic()

    def words(self, *, short: bool) -> str:
        if not self._at:
            return "before"
        if short:
            return self._at[:8]
        return f"{self._at[:8]} ({age(time.monotonic() - self._started)})"


class _LiveTable:
    """The vCPUs and the last events, as large as the terminal is."""

    def __init__(self, vm: "VcpuController", threads: _Threads) -> None:
        self._vm = vm
        self._threads = threads
        self._since = {first: _Since(before=True) for first in vm.layout.pending_slots}
        self._last = LastEvents()
        self._lost = False

    def begin(self, layout: Layout) -> None:
        """Take the state in."""
        self._note_pending(layout)

    def tell(self, event: Event, layout: Layout) -> None:
        """Take the event in."""
        self._note_pending(layout)
        if not isinstance(event, LayoutChanged) or event.resync:  # the table shows what a read has found
            self._last.add(clock(), told(event), type(event))
        self._lost = isinstance(event, Disconnected) or (self._lost and not isinstance(event, Reconnected))

    def _note_pending(self, layout: Layout) -> None:
        self._since = {
            first: self._since.get(first) or _Since(before=False) for first in sorted(layout.pending_slots)
        }

    def picture(self, screen: "Screen") -> Iterator[Block]:
        """Return all of it, not higher than the screen: the rest would be cut at its bottom."""
        layout = self._vm.layout
        short = screen.width < WIDE
        head: list[Block] = [Line(("QEMU is lost; it was:", "bold red"))] if self._lost else []
        head.append(headline(layout, screen.width))
        since = {first: each.words(short=short) for first, each in self._since.items()}
        room = room_for_rows(screen, head)
        threads = {thread.vcpu: thread for thread in self._threads.seen if thread.vcpu is not None}
        table = vcpu_table(layout, width=screen.width, since=since, room=room, threads=threads)
        above = [*head, "", *table, ""]
        yield from above
        yield from self._last.blocks(screen, screen.height - screen.height_of(*above) - 1, short=short)


def room_for_rows(screen: "Screen", head: Sequence[Block]) -> int:
    """Return how many rows a live table has below *head*, so that the last events fit below it."""
    left = screen.height - _OTHER_LINES - screen.height_of(*head)
    return max(left - max(left // 3, _FEWEST_EVENTS), _FEWEST_ROWS)


class LastEvents:
    """The last events, to be shown below a live table."""

    def __init__(self) -> None:
        self._last: deque[tuple[str, Line]] = deque(maxlen=_MOST_EVENTS)

    def add(self, at: str, words: str, kind: type[Event]) -> None:
        """Take one in: its time, what it is in words, and its kind."""
        self._last.append((at, Line(words, style=STYLES.get(kind, ""))))

    def blocks(self, screen: "Screen", left: int, *, short: bool) -> list[Block]:
        """Return the last events, as many as fit into *left* lines, the newest at the bottom."""
        events: list[Block] = []
        for at, words in reversed(self._last):
            row = Table(Column(), Column(fold=True))
            row.add(Line(at[:8] if short else at, style="dim"), words)
            left -= screen.height_of(row)
            if left < 0:
                break
            events.append(row)
        return events[::-1]
