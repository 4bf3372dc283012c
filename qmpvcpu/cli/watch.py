"""watch: what happens to a VM's vCPUs, as it happens: a live table, a line an event, or a document an event."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

import typer
from rich.live import Live

from qmpvcpu.cli.answer import INTERRUPTED, NOT_REACHED, REACHED, Answer
from qmpvcpu.cli.documents import as_line, document
from qmpvcpu.cli.live import LiveTable, clock, told
from qmpvcpu.cli.options import BadUsageError, Options, check_seconds
from qmpvcpu.cli.run import Shell, carry_out
from qmpvcpu.cli.show import headline, map_row, plain, state_json
from qmpvcpu.events import Event
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.vm.controller import VcpuController

# What nobody announces, such as a plug that the guest does not acknowledge, is to be seen within this time.
_RESYNC_S = 5.0


@dataclass(frozen=True, slots=True)
class _End:
    """When watching ends by itself: at a map, after a time, or never."""

    map: VcpuMap | None = None
    seconds: float | None = None

    def check(self, layout: Layout) -> None:
        """Refuse to wait for what this VM can never have.

        Raises:
            BadUsageError: The map has no vCPU 0, or vCPUs that the VM has no slot for.
        """
        if self.map is None:
            return
        if 0 not in self.map:
            raise BadUsageError(f"--until {self.map}: it would never end, since vCPU 0 never leaves")
        if beyond := VcpuMap(each for each in self.map if each >= layout.max):
            raise BadUsageError(f"--until {self.map}: no vCPU {beyond}: this machine has 0 to {layout.max - 1}")

    def reached(self, layout: Layout) -> bool:
        return self.map is not None and layout.enabled == self.map and not layout.pending


def watch(
    *,
    seconds: Annotated[
        float | None, typer.Option("--for", metavar="SECONDS", help="End after so long.", show_default=False)
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="MAP",
            help="End when exactly these are plugged and none is pending.",
            show_default=False,
        ),
    ] = None,
    reconnect: Annotated[
        bool,
        typer.Option("--reconnect", help="When QEMU is lost, wait for it to come back.", show_default=False),
    ] = False,
    options: Options,
) -> int:
    """Follow what happens to the vCPUs, whoever does it, until SIGINT. Reads only.

    On a terminal: the table of vCPUs with the last events below. Else one line an event. With --json one document a
    line: the state first ("event": null), then each event, at the end why it ended, or the error.

    It takes a QMP socket of its own: a UNIX one serves one client at a time.

      qmpvcpu watch --qmp /run/vm.qmp2

      qmpvcpu watch --until 0-3 --for 60 --qmp /run/vm.qmp2 --json

    Exit codes: 0 the map of --until is there; without it: --for has passed, or SIGINT or SIGTERM; 1 --for has passed
    first; 2 bad usage or input; 3 no connection, or QEMU lost; 4 record unreadable or locked; 130 SIGINT or SIGTERM
    came first.
    """
    return carry_out(options, lambda shell: _watch(shell, until, seconds, reconnect=reconnect))


async def _watch(shell: Shell, until: str | None, seconds: float | None, *, reconnect: bool) -> Answer:
    """Tell of every event until the end that was asked for, a signal, or the loss of QEMU.

    Raises:
        BadUsageError: The end can never come.
        MonitorLostError: QEMU is lost.
    """
    end = _End(None if until is None else VcpuMap.parse(until), check_seconds("--for", seconds))
    attaching = shell.attach(
        reply_timeout=shell.reply_timeout, reconnect=reconnect, resync_interval=_RESYNC_S, read_only=True
    )
    async with attaching as vm:
        end.check(vm.layout)
        async with _display(shell, vm) as display:
            code, why = await _follow(shell, vm, end, display)
    complaint = (f"qmpvcpu: {end.map} not reached ({why})",) if code else ()
    return Answer(code, document(ended=why, **state_json(vm.layout)), complaint=complaint)


async def _follow(shell: Shell, vm: VcpuController, end: _End, display: "_Display") -> tuple[int, str]:
    """Return the exit code and why it ended."""
    reading = asyncio.create_task(_read(shell, vm, end, display))

    async def stop() -> None:
        reading.cancel()

    with shell.stopping.stopped_by(stop):
        await asyncio.wait({reading}, timeout=end.seconds)
    if not reading.done():
        reading.cancel()
        return (REACHED if end.map is None else NOT_REACHED), "time"
    if reading.cancelled():
        return (REACHED if end.map is None else INTERRUPTED), shell.stopping.signal
    return REACHED, reading.result()


async def _read(shell: Shell, vm: VcpuController, end: _End, display: "_Display") -> str:
    events = vm.events()
    display.begin(vm.layout)
    if end.reached(vm.layout):
        return "reached"
    async for event in events:
        display.tell(event, vm.layout)
        if end.reached(vm.layout):
            # The layout is ahead of the events: what led to it is told too.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    async for more in events:
                        display.tell(more, vm.layout)
            return "reached"
        if shell.unread:
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
async def _display(shell: Shell, vm: VcpuController) -> AsyncIterator[_Display]:
    if shell.options.json:
        yield _Documents(shell)
    elif not shell.out.is_terminal:
        yield _Lines(shell)
    else:
        with Live(console=shell.out, auto_refresh=False) as live:
            table = LiveTable(live, vm)
            drawing = asyncio.create_task(table.draw())
            try:
                yield table
            finally:
                drawing.cancel()
                table.draw_now()


class _Documents:
    """One JSON document a line."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def begin(self, layout: Layout) -> None:
        """Print the state without an event."""
        self._print({"event": None}, layout)

    def tell(self, event: Event, layout: Layout) -> None:
        """Print the event."""
        names = [each.name for each in fields(event) if each.name != "requested_at"]  # of this process's clock
        said = {name: plain(getattr(event, name)) for name in names}
        said["origin"] = event.origin.value
        self._print({"event": type(event).__name__, **said}, layout)

    def _print(self, said: dict[str, Any], layout: Layout) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = as_line(document(time=now, **said, **state_json(layout)))
        self._shell.put(lambda: sys.stdout.write(line))


class _Lines:
    """One line an event."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def begin(self, layout: Layout) -> None:
        """Print the VM and its map."""
        self._shell.say(headline(layout))

    def tell(self, event: Event, layout: Layout) -> None:
        """Print the event and the map."""
        self._shell.say(f"{clock()}  {told(event)}  {map_row(layout)}")
