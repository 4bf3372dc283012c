"""Session: the machinery under VcpuController. Carries the engine's news outwards, and QEMU's words inwards.

The engine decides what is known; this reads when it wants a read, wakes whoever waits, feeds the streams, keeps the
record up, and runs the commands that change the VM in tasks of its own, so that cancelling a caller never leaves an
outcome unread and a reply that comes after the caller's deadline is still taken in.
"""

import asyncio
import logging
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from qmpvcpu import qapi
from qmpvcpu.controller.reading import Reader
from qmpvcpu.controller.request import UnplugVerdict, verdict_on
from qmpvcpu.controller.stream import EventStream
from qmpvcpu.engine import Engine, Read, Removal, State
from qmpvcpu.errors import (
    MonitorError,
    MonitorLostError,
    MonitorTimeoutError,
    Outcome,
    OutcomeUnknownError,
    RecordError,
    WaitTimeoutError,
)
from qmpvcpu.model import Disconnected, Layout, Pending, VcpuMap
from qmpvcpu.monitor import Monitor

if TYPE_CHECKING:
    from qmpvcpu.record import Record

__all__ = ["Session"]

_log = logging.getLogger("qmpvcpu.controller")

# At a deadline one last read may still find the CPU gone (a guest that ejects without a word, under TCG); a QEMU that
# does not answer it within this many seconds shall not stretch the caller's deadline any further.
_LAST_LOOK_S = 1.0
# close() gives commands in flight this long to be answered, so that their outcome is recorded.
_CLOSING_S = 1.0


class Session:
    """One VM's connection, reads, waits and record. One event loop, one owner.

    Attributes:
        monitor: The QMP connection.
        engine: What is known of the VM.
        timeout: Deadline of each QMP command, in seconds.
        lost: Why the connection is gone, or None while it is there.
    """

    def __init__(
        self,
        monitor: Monitor,
        reader: Reader,
        engine: Engine,
        *,
        record: "Record | None",
        timeout: float,
        resync_interval: float | None,
    ) -> None:
        self.monitor = monitor
        self.engine = engine
        self.timeout = timeout
        self.lost: MonitorLostError | None = None
        self.loop = asyncio.get_running_loop()
        self._reader = reader
        self._record = record
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._waiters: list[tuple[Callable[[Layout], object], asyncio.Future[None]]] = []
        self._settling: dict[int, tuple[Removal, asyncio.Future[None]]] = {}
        self._commands: set[asyncio.Task[None]] = set()
        self._reading: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._saved = engine.layout.generation
        self._resync = self.loop.create_task(self._resync_every(resync_interval)) if resync_interval else None

    @property
    def layout(self) -> Layout:
        """All slots, as known now."""
        return self.engine.layout

    def check_open(self) -> None:
        """Raise MonitorLostError if the connection is gone."""
        if self.lost is not None:
            raise MonitorLostError(self.lost.why) from self.lost

    # News.

    def on_event(self, message: Mapping[str, Any]) -> None:
        """Take one QMP event in."""
        event = qapi.parse_event(message)
        if event is not None and self.lost is None:
            self.engine.receive(event, self.loop.time())
            self.publish()

    def on_lost(self, error: MonitorLostError) -> None:
        """Take the loss of the connection in; the first one counts."""
        if self.lost is not None:
            return
        self.lost = error
        for stream in self._streams:
            stream.push(Disconnected(generation=self.layout.generation, why=error.why))
            stream.close()
        for future in [*(f for _, f in self._waiters), *(f for _, f in self._settling.values())]:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever waited may be gone: not retrieving it is then no fault
        self._waiters.clear()
        self._settling.clear()

    def publish(self) -> None:
        """Carry the engine's news to whoever waits for them; to be called after each word to the engine."""
        for event in self.engine.take_events():
            if _log.isEnabledFor(logging.INFO):
                _log.info("%s", event, extra={"vm": self.layout.vm.name, "event": event})
            for stream in self._streams:
                stream.push(event)
        for removal in self.engine.take_settled():
            _, settled = self._settling.pop(id(removal), (None, None))
            if settled is not None and not settled.done():
                settled.set_result(None)
        for predicate, future in self._waiters:
            if not future.done():
                _try(predicate, self.layout, future)
        idle = self._reading is None or self._reading.done()
        if self.engine.wanted is not Read.NONE and idle and self.lost is None:
            self._reading = self.loop.create_task(self._read_wanted())
        if self._record is not None and (self._saving is None or self._saving.done()):
            self._saving = self.loop.create_task(self._save(self._record))
            self._saving.add_done_callback(self._look_at_save)

    def stream(self) -> EventStream:
        """Return a stream of all events from now on."""
        stream = EventStream()
        if self.lost is None:
            self._streams.add(stream)
        else:
            stream.close()
        return stream

    # Waiting.

    async def wait_for(self, predicate: Callable[[Layout], object], limit: float | None) -> Layout:
        """Wait until *predicate* holds for the layout, at most *limit* seconds."""
        self.check_open()
        if predicate(self.layout):
            return self.layout
        entry = (predicate, self.loop.create_future())
        self._waiters.append(entry)
        try:
            async with asyncio.timeout(limit):
                await entry[1]
        except TimeoutError:
            raise WaitTimeoutError(limit or 0.0, str(self.layout.enabled), str(self.layout.pending)) from None
        finally:
            if entry in self._waiters:  # not after a loss, which clears them all
                self._waiters.remove(entry)
        return self.layout

    async def wait_answer(self, removal: Removal, limit: float | None) -> UnplugVerdict:
        """Wait for the guest's answer to *removal*, at most *limit* seconds; PENDING if there is none."""
        if (verdict := verdict_on(removal)) is not None:
            return verdict
        self.check_open()
        _, future = self._settling.setdefault(id(removal), (removal, self.loop.create_future()))
        await asyncio.wait({future}, timeout=limit)
        if not future.done() and limit:
            self.want(Read.SLOTS)
            if self._reading is not None:
                await asyncio.wait({self._reading}, timeout=min(_LAST_LOOK_S, self.timeout))
        if future.done():
            future.result()
        if (verdict := verdict_on(removal)) is not None:
            return verdict
        self.engine.deadline_passed(removal)
        self.publish()
        working = removal.state is State.WORKING
        return Pending(removal.ids, acknowledged=working, seconds=self.loop.time() - removal.requested_at)

    # Commands.

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a command that changes the VM; whoever waits for it may be cancelled, it is not."""
        task = self.loop.create_task(work)
        self._commands.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._commands.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.info("%s", error, extra={"vm": self.layout.vm.name})

    async def replied(self, action: str, ids: VcpuMap, task: asyncio.Task[None]) -> None:
        """Wait for a command's reply within its deadline; the command itself goes on."""
        await asyncio.wait({task}, timeout=self.timeout)
        if not task.done():
            silence = MonitorTimeoutError("device_add" if action == "plug" else "device_del", self.timeout)
            why = f"{silence}; a late reply is taken in, and is an event"
            raise OutcomeUnknownError(action, ids, why) from silence
        task.result()

    # Reading.

    async def know_status(self) -> None:
        """Ask what the VM does, unless it runs, which it cannot stop doing without an event."""
        self.check_open()
        if self.engine.status is None or not self.engine.status.is_steady:
            await self.read_status()

    async def read_status(self) -> None:
        """Ask what the VM does."""
        self.engine.status = await self._reader.status()

    async def read(self, read: Read) -> None:
        """Read the slots and take in what they show."""
        sent = self.engine.read_sent(read)
        slots, threads = await self._reader.slots(full=read is Read.FULL)
        self.engine.observed(sent, slots, threads, self.loop.time())
        self.publish()

    def want(self, read: Read) -> None:
        """Have the slots read, soon and by nobody in particular."""
        self.engine.wanted = max(self.engine.wanted, read)
        self.publish()

    async def _read_wanted(self) -> None:
        while self.engine.wanted is not Read.NONE and await self._read_quietly(self.engine.wanted):
            pass

    async def _resync_every(self, interval: float) -> None:
        while self.lost is None:
            await asyncio.sleep(interval)
            await self._read_quietly(Read.FULL)

    async def _read_quietly(self, read: Read) -> bool:
        """Read where no caller is there to be told of a failure; return False after one."""
        try:
            await self.read(read)
        except MonitorError as error:
            _log.warning("cannot read %s: %s", self.layout.vm.name, error, extra={"vm": self.layout.vm.name})
            return False
        return True

    # The record.

    async def _save(self, record: "Record") -> None:
        while self._saved != self.layout.generation:
            layout = self.layout
            await record.write(layout)
            self._saved = layout.generation

    async def recorded(self, action: str, ids: VcpuMap) -> None:
        """Wait until what is known now is on disk; if that fails, say that *action* was done all the same."""
        if self._saving is None:
            return
        try:
            await asyncio.shield(self._saving)
        except RecordError as error:
            why = f"{error.why}; the {action} of vCPU {ids} is done, and not recorded"
            raise RecordError(error.path, why, outcome=Outcome.CHANGED) from error

    def _look_at_save(self, saving: "asyncio.Task[None]") -> None:
        """Tell of a save that failed with nobody waiting for it; the next change tries again."""
        if not saving.cancelled() and (error := saving.exception()) is not None:
            _log.error("%s", error, extra={"vm": self.layout.vm.name})

    async def close(self) -> None:
        """End everything; a borrowed client and the VM stay as they are. Idempotent."""
        if self._commands:
            await asyncio.wait(self._commands, timeout=_CLOSING_S)
        if self._saving is not None:
            await asyncio.wait({self._saving})
        self.on_lost(MonitorLostError("closed by this side"))
        await self.monitor.close()
        tasks = [task for task in (self._resync, self._reading, *self._commands) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _try(predicate: Callable[[Layout], object], layout: Layout, future: asyncio.Future[None]) -> None:
    """Settle *future* if *predicate* holds; what it raises is its owner's to see, not the monitor's."""
    try:
        if predicate(layout):
            future.set_result(None)
    except Exception as error:  # noqa: BLE001 - JUSTIFICATION: it is the caller's code, and is handed to the caller
        future.set_exception(error)
