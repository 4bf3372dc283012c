"""watch, of many VMs: what happens to any of them, and which come and go."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from qmpvcpu.cli.failures import printed_error
from qmpvcpu.cli.output import Block, Column, Line, Table
from qmpvcpu.cli.progress import kept, short_address
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import WIDE
from qmpvcpu.cli.vms import Vms, look_again
from qmpvcpu.cli.watch import (
    RESYNC_S,
    STYLES,
    End,
    LastEvents,
    clock,
    follow,
    room_for_rows,
    stamp,
    told,
)
from qmpvcpu.cli.wording import in_options
from qmpvcpu.documents.events import event_json
from qmpvcpu.documents.form import as_line, document
from qmpvcpu.errors import counted, printable
from qmpvcpu.events import Disconnected, Event
from qmpvcpu.fleet import Answered, Asked, Fleet, MapState, VmEvent, VmResult
from qmpvcpu.model.codec import to_json

if TYPE_CHECKING:
    from qmpvcpu.cli.terminal import Screen
    from qmpvcpu.model.layout import Layout

# How often VMs that came or went are looked for, and what no event has told.
_LOOK_S: Final = 1.0
# What is known otherwise than by events may be older or newer than the last of them: it is believed after so long.
_QUIET_S: Final = 3.0
_MOST_NAMED: Final = 8
_LEAST_LAST: Final = 20  # letters of a row's last event


async def watch_many(shell: Shell, vms: Vms, end: End) -> CommandResult:
    """Follow what happens to *vms* until *end*."""
    async with (
        vms.opened(shell, read_only=True, resync_interval=RESYNC_S) as fleet,
        _display(shell) as display,
    ):
        watch = _Watch(shell, fleet, end, display)
        code, why = await follow(shell, end, watch.read())
    known = sorted(watch.vms.values(), key=lambda vm: vm.address)
    short = [short_address(vm.address) for vm in known if vm.state is None or not end.reached(vm.state)]
    more = f" and {len(short) - _MOST_NAMED} more" if len(short) > _MOST_NAMED else ""
    by = f" by {', '.join(short[:_MOST_NAMED])}{more}" if short else ""
    return end.result(code, why, {"vms": [vm.as_json(with_error=True) for vm in known]}, by)


@dataclass
class _Watched:
    """One VM, as it is known now.

    Attributes:
        address: Its address.
        host: Its host; None: this one.
        name: Its name.
        state: What it has, as was last known; None: that was never known.
        error: Why it was not reached, or None.
        is_lost: Its QEMU is lost.
        touched: When something of it was last told, by the loop's clock.
        last: Its last event, when that was, and its kind.
    """

    address: str
    host: str | None
    name: str
    state: MapState | None = None
    error: BaseException | None = None
    is_lost: bool = False
    touched: float = 0.0
    last: tuple[str, str, type[Event]] | None = None

    def as_json(self, *, with_error: bool) -> dict[str, Any]:
        """Return whose it is, and what it has as far as that is known; *with_error*: and why it was not reached."""
        said: dict[str, Any] = {"address": self.address, "host": self.host, "vm": self.name}
        if with_error:
            said["error"] = None if self.error is None else printed_error(self.error, self.complaint)
        return said if self.state is None else said | to_json(self.state)

    def is_known_as(self, state: MapState) -> bool:
        """Return True if it is known to be reached, and to have this *state*."""
        return self.error is None and not self.is_lost and self.state == state

    @property
    def complaint(self) -> str:
        """Why it was not reached."""
        return in_options(str(self.error)) or type(self.error).__name__

    @property
    def map(self) -> str:
        """What it has, in words."""
        if self.state is None:
            return ""
        return f"{self.state.enabled}" + (f", pending {self.state.pending}" if self.state.pending else "")


class _Display(Protocol):
    """Where it is told."""

    def show(self, vm: _Watched) -> None:
        """Tell what a VM has that is new, or of which no event has told this."""

    def tell(self, each: VmEvent, vm: _Watched) -> None:
        """Tell of an event."""

    def gone(self, vm: _Watched) -> None:
        """Tell that a VM is not among the chosen any more."""


class _Watch:
    """Reads what happens to the VMs of a fleet.

    Attributes:
        vms: What is known of each, by address.
    """

    def __init__(self, shell: Shell, fleet: Fleet, end: End, display: _Display) -> None:
        self.vms: dict[str, _Watched] = {}
        self._shell = shell
        self._fleet = fleet
        self._end = end
        self._display = display
        self._noted = {""}
        self._asking: asyncio.Task[Sequence[VmResult[Any]]] | None = None
        self._told = False

    async def read(self) -> str:
        """Tell all that happens; return why it ended."""
        events = self._fleet.events(audit=True)
        async for result in self._fleet.refresh():
            self._take(result)
        loop = asyncio.get_running_loop()
        due = loop.time() + _LOOK_S
        try:
            while not (why := await self._over()):
                if loop.time() >= due:
                    await self._look()
                    due = loop.time() + _LOOK_S
                try:
                    async with asyncio.timeout_at(due):
                        each = await anext(events)
                except TimeoutError:
                    continue
                except StopAsyncIteration:
                    return "closed"
                self._tell(each)
            with contextlib.suppress(TimeoutError):  # what led to the map is told too
                async with asyncio.timeout(0):
                    async for each in events:
                        self._tell(each)
        finally:
            if self._asking is not None:
                self._asking.cancel()
        return why

    async def _over(self) -> str:
        """Return why it is over; "": it is not."""
        if self._all_reached() and await self._is_so():
            return "reached"
        # Else a quiet VM would have it go on for nobody.
        return "nobody reads" if self._shell.stdout_closed and (self._told or self._end.map is None) else ""

    def _all_reached(self) -> bool:
        return set(self._fleet.addresses) == self.vms.keys() and all(
            vm.state is not None and vm.error is None and not vm.is_lost and self._end.reached(vm.state)
            for vm in self.vms.values()
        )

    async def _is_so(self) -> bool:
        """Read all again: an event may tell of what has passed."""
        async for result in self._fleet.refresh():
            if result.error is not None or (result.layout and not self._end.reached(result.layout)):
                self._take(result)
        return self._all_reached()

    # What is found out by looking.

    def _take(self, result: VmResult[Any]) -> None:
        if result.layout is not None and result.error is None:
            self._found(result.address, result.layout)
            return
        vm = self._vm(result.address, result.name)
        if vm.error is None or str(vm.error) != str(result.error):
            vm.error = result.error
            self._display.show(vm)

    def _found(self, address: str, layout: "Layout") -> None:
        self._end.check(layout, short_address(address))
        vm = self._vm(address, layout.vm.name)
        vm.state, vm.error, vm.is_lost = MapState.of(layout), None, False
        self._display.show(vm)

    def _vm(self, address: str, name: str) -> _Watched:
        if address not in self.vms:
            host, _, its_name = (None, "", name) if self._fleet.is_local else address.partition("/")
            self.vms[address] = _Watched(address, host, its_name)
        return self.vms[address]

    async def _look(self) -> None:
        """Look for VMs that came or went, and for what no event has told."""
        why = await look_again(self._fleet)
        if why not in self._noted:
            self._noted.add(why)
            self._shell.note(f"qmpvcpu: {why}")
        for address in self.vms.keys() - set(self._fleet.addresses):
            self._display.gone(self.vms.pop(address))
        now, layouts = asyncio.get_running_loop().time(), self._fleet.layouts
        quiet = {address for address, vm in self.vms.items() if now - vm.touched >= _QUIET_S}
        for address, layout in layouts.items():
            vm = self.vms.get(address)
            if vm is None or vm.state is None or (address in quiet and not vm.is_known_as(MapState.of(layout))):
                self._found(address, layout)
        away = [self.vms[address] for address in quiet - layouts.keys()]
        unexplained = any(vm.error is None and not vm.is_lost for vm in away)
        if self._asking is not None and self._asking.done():
            for result in self._asking.result():
                if result.error is not None and not (result.address in self.vms and self.vms[result.address].is_lost):
                    self._take(result)
            self._asking = None
        if self._asking is None and (self._fleet.is_local or unexplained):
            self._asking = asyncio.ensure_future(_all_of(self._fleet))

    # What events tell.

    def _tell(self, each: VmEvent) -> None:
        if each.address not in self.vms:
            vm = self._vm(each.address, each.name)
            vm.state = each.state
            self._display.show(vm)
        vm = self.vms[each.address]
        vm.touched = asyncio.get_running_loop().time()
        if each.state is not None:
            vm.state, vm.error = each.state, None
        vm.is_lost = isinstance(each.event, Disconnected) or (vm.is_lost and each.state is None)
        vm.last = clock(each.at), words(each.event), type(each.event)
        self._told = True
        self._display.tell(each, vm)


async def _all_of(fleet: Fleet) -> Sequence[VmResult[Any]]:
    """Have the VMs attached that came or were lost; of other hosts, ask why they are not reached."""
    return await (fleet.attach() if fleet.is_local else fleet.refresh())


def words(event: Event) -> str:
    """Return *event* in words; also who asked an agent for what, and what came of it."""
    match event:
        case Asked(wish=wish) if wish is not None:
            return printable(f"{event.who or 'somebody'} wishes {wish}{_because(event.why)}")
        case Asked(request=request):
            given = {name: value for name, value in (request or {}).items() if name != "vm"}
            return printable(f"{event.who} asks for {event.operation}{_because(_given(given))}")
        case Answered(phase=None):
            return printable(f"{event.operation} of {event.who}: {_came_to(event)}")
        case Answered():
            whose = f"of {event.who}" if event.who else event.id
            how = "" if event.phase is None else event.phase.value
            return printable(f"the wish {whose}: {how}, {_came_to(event)}")
    return told(event)


def _given(request: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in request.items() if value not in (None, {}, []))


def _because(why: str) -> str:
    return f": {why}" if why else ""


def _came_to(event: Answered) -> str:
    return f"exit code {event.code}{_because(event.why)}"


@contextlib.asynccontextmanager
async def _display(shell: Shell) -> AsyncIterator[_Display]:
    if shell.options.json:
        yield _Documents(shell)
    elif not shell.out.draws:
        yield _Lines(shell)
    else:
        table = _LiveTable()
        async with kept(table, shell.out):
            yield table


class _Documents:
    """One JSON document a line."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def show(self, vm: _Watched) -> None:
        """Print the state without an event."""
        self._print({"event": None}, vm.as_json(with_error=True))

    def tell(self, each: VmEvent, vm: _Watched) -> None:
        """Print the event."""
        self._print(event_json(each.event), vm.as_json(with_error=False), each.at)

    def gone(self, vm: _Watched) -> None:
        """Print what it had last."""
        self._print({"event": "Gone"}, vm.as_json(with_error=False))

    def _print(self, said: dict[str, Any], vm: dict[str, Any], at: float | None = None) -> None:
        line = as_line(document(time=stamp(at), **said, **vm))
        self._shell.put(lambda: sys.stdout.write(line))


class _Lines:
    """One line an event, with whose it is first."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def show(self, vm: _Watched) -> None:
        """Print its map."""
        if vm.error is not None or vm.state is None:
            self._say(vm, vm.complaint if vm.error is not None else "nothing is known of it")
        else:
            self._say(vm, f"{len(vm.state.enabled)} of {counted(vm.state.max, 'vCPU')} plugged: {vm.map}")

    def tell(self, each: VmEvent, vm: _Watched) -> None:
        """Print the event and the map."""
        self._say(vm, f"{clock(each.at)}  {words(each.event)}  {vm.map}".rstrip())

    def gone(self, vm: _Watched) -> None:
        """Print that it is gone."""
        self._say(vm, f"{clock()}  the VM is gone")

    def _say(self, vm: _Watched, words: str) -> None:
        self._shell.say(f"{short_address(vm.address)}  {words}")


class _LiveTable:
    """A row for each VM, and the last events, as large as the terminal is."""

    def __init__(self) -> None:
        self._vms: dict[str, _Watched] = {}
        self._last = LastEvents()

    def show(self, vm: _Watched) -> None:
        """Take it in."""
        self._vms[vm.address] = vm

    def tell(self, each: VmEvent, vm: _Watched) -> None:
        """Take the event in; a row has its VM as it is now."""
        self._last.add(clock(each.at), f"{short_address(vm.address)}: {words(each.event)}", type(each.event))

    def gone(self, vm: _Watched) -> None:
        """Take it out."""
        self._vms.pop(vm.address, None)
        self._last.add(clock(), f"{short_address(vm.address)}: the VM is gone", Disconnected)

    def picture(self, screen: "Screen") -> Iterator[Block]:
        """Return all of it, not higher than the screen."""
        rows = sorted(self._vms.values(), key=lambda vm: vm.address)
        pending = sum(bool(vm.state and vm.state.pending) for vm in rows)
        away = sum(vm.is_lost or vm.error is not None for vm in rows)
        head = [
            Line((counted(len(rows), "VM"), "bold"), f", {pending} with pending removals, {away} without an answer")
        ]
        room = room_for_rows(screen, head)
        if cut := max(len(rows) - room + 1, 0) if len(rows) > room else 0:
            latest = {vm.address for vm in sorted(rows, key=lambda vm: -vm.touched)[: len(rows) - cut]}
            rows = [vm for vm in rows if vm.address in latest]
        short = screen.width < WIDE
        above: list[Block] = [*head, "", _table(rows, screen.width)]
        above += [Line(f"{cut} more, where less has happened", style="dim")] if cut else []
        above.append("")
        yield from above
        yield from self._last.blocks(screen, screen.height - screen.height_of(*above) - 1, short=short)


def _table(rows: Sequence[_Watched], width: int) -> Table:
    """Return a table with a line for each; what happened last is cut where there is no more room for it."""
    short = width < WIDE
    columns = (Column("VM"), Column("plugged", "right"), *(() if short else (Column("vCPUs"),)), Column("pending"))
    table = Table(*columns)
    for vm in rows:
        state = vm.state
        plugged = "" if state is None else f"{len(state.enabled)} of {state.max}"
        ids = [] if short else ["" if state is None else str(state.enabled)]
        pending = "" if state is None else str(state.pending)
        table.add(short_address(vm.address), plugged, *ids, pending, style="bold red" if vm.is_lost else "")
    left = max(width - max(map(len, str(table).splitlines())) - table.gap - 1, _LEAST_LAST)
    drawn = Table(*columns, Column("last event"))
    for vm, (cells, style) in zip(rows, table.rows, strict=True):
        drawn.add(*cells, _last(vm, left), style=style)
    return drawn


def _last(vm: _Watched, room: int) -> Line:
    """Return what happened to *vm* last, or why it is not reached, in so many letters."""
    if vm.error is not None:
        return Line(_cut(printable(vm.complaint), room), style="red")
    if vm.last is None:
        return Line("")
    at, said, kind = vm.last
    return Line((f"{at[:8]} ", "dim"), (_cut(said, room - len(at[:8]) - 1), STYLES.get(kind, "")))


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."
