"""Session: the machinery under VcpuController. Carries the engine's news outwards, and QEMU's words inwards.

The engine decides what is known; this reads when it wants a read, wakes whoever waits, feeds the streams, and runs
the commands that change the VM in tasks of its own, so that cancelling a caller never leaves an outcome unread and a
reply that comes after the caller's deadline is still taken in.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qmpvcpu import qapi
from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.ledger import Read
from qmpvcpu.engine.removal import Removal, State
from qmpvcpu.errors import MonitorLostError, MonitorTimeoutError, OutcomeUnknownError, WaitTimeoutError, printable
from qmpvcpu.events import Disconnected
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Pending
from qmpvcpu.qmp.monitor import Monitor, wait_ended
from qmpvcpu.qmp.queries import Reader
from qmpvcpu.vm.audience import Audience
from qmpvcpu.vm.keeper import Keeper
from qmpvcpu.vm.request import UnplugVerdict, rejected_error, verdict_on
from qmpvcpu.vm.trouble import Trouble

if TYPE_CHECKING:
    from qmpvcpu.vm.nextboot import NextBoot

_log = logging.getLogger("qmpvcpu.vm")

# At a deadline one last read may still find the CPU gone (a guest that ejects without a word, under TCG); a QEMU that
# does not answer it within this many seconds shall not stretch the caller's deadline any further.
_LAST_LOOK_S = 1.0
_T = TypeVar("_T")

# A read that nobody waits for and that failed is tried again: soon, then at a pace that is no load.
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0

# close() gives commands in flight this long to be answered, so that their outcome is recorded.
_CLOSING_S = 1.0


class Watcher(Protocol):
    """Whoever carries a transition out: told of the same news as everybody, in the same step."""

    def on_news(self, settled: Sequence[Removal]) -> None:
        """Take in that something changed, and which removals became final."""

    def cancel(self) -> None:
        """Stop at the next safe point."""

    def on_lost(self, why: str, *, may_return: bool) -> None:
        """Take in that the connection is lost."""

    def on_return(self, *, same_instance: bool) -> None:
        """Take in that the connection is back, and the engine has read the VM again."""


class Session:
    """One VM's connection, reads and waits. One event loop, one owner.

    Attributes:
        audience: Who is told what happens.
        monitor: The QMP connection.
        reader: What reads over it.
        engine: What is known of the VM.
        keeper: What keeps its record.
        timeout: Deadline of each QMP command, in seconds.
        lost: Why the connection is gone, or None while it is there.
        closed: True once it is gone for good.
        watcher: Who carries a transition out, or None.
        next_boot: What the VM is next started with, or None where nothing keeps that.
        reconnect: Finds QEMU again once the connection is lost; None: nobody does.
    """

    def __init__(
        self,
        monitor: Monitor,
        reader: Reader,
        engine: Engine,
        *,
        keeper: Keeper,
        timeout: float,
        resync_interval: float | None,
    ) -> None:
        self.monitor = monitor
        self.reader = reader
        self.engine = engine
        self.keeper = keeper
        self.timeout = timeout
        self.lost: MonitorLostError | None = None
        self.closed = False
        self.watcher: Watcher | None = None
        self.next_boot: NextBoot | None = None
        self.reconnect: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.loop = asyncio.get_running_loop()
        self.audience = Audience(lambda: engine.layout, engine.take_events())
        self._telling: asyncio.Handle | None = None
        self._back: asyncio.Future[None] | None = None
        self._returning: asyncio.Task[None] | None = None
        self._letting_go: asyncio.Task[None] | None = None
        self._commands: set[asyncio.Task[Any]] = set()
        self._reading: asyncio.Task[None] | None = None
        self._reading_again: asyncio.TimerHandle | None = None
        self._pause = _FIRST_PAUSE_S
        self._unread = Trouble(f"cannot read {engine.layout.vm.name}", engine.layout.vm.name)
        self._resync = self.loop.create_task(self._resync_every(resync_interval)) if resync_interval else None

    @property
    def layout(self) -> Layout:
        """All slots, as known now."""
        return self.engine.layout

    async def check_open(self) -> None:
        """Raise MonitorLostError if the connection is gone, and does not come back within a command's deadline."""
        if self._back is not None:
            await asyncio.wait({self._back}, timeout=self.timeout)
        if self.lost is not None:
            raise MonitorLostError(self.lost.why) from self.lost
        if self.closed:
            raise MonitorLostError("closed by this side")

    # News.

    def on_event(self, event: qapi.QemuEvent) -> None:
        """Take one event in."""
        if self.lost is not None:
            return
        self.engine.receive(event, self.loop.time())
        if self.watcher is None:
            self.publish()
        elif self._telling is None:
            # A map brings bursts of events: what one read of the socket brought is told at once.
            self._telling = self.loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = None
        self.publish()

    def on_lost(self, error: MonitorLostError) -> None:
        """Take the loss of the connection in; the first one counts."""
        if self.lost is not None:
            return
        if self._telling is not None:  # it was so before
            self._telling.cancel()
            self._tell()
        self.lost = error
        self.audience.push(Disconnected(generation=self.layout.generation, why=error.why))
        if self.reconnect is not None and not self.closed:
            self._back = self.loop.create_future()
            self._returning = self.loop.create_task(self.reconnect())
            if self.watcher is not None:
                self.watcher.on_lost(error.why, may_return=True)
        else:
            self.give_up(error)

    def on_return(self, *, had: Layout, same_instance: bool) -> None:
        """Take in that the connection is back, and the engine has read the VM again, which *had* these vCPUs."""
        self.lost = None
        self.publish()
        if self.watcher is not None:
            self.watcher.on_return(same_instance=same_instance)
        if not same_instance:
            self.keeper.forget(had)
        if self._back is not None:
            self._back.set_result(None)
            self._back = None

    def give_up(self, error: MonitorLostError) -> None:
        """End everything that waits: the connection does not come back."""
        self.lost = error
        self.closed = True
        self.audience.close(error)
        if self.watcher is not None:
            self.watcher.on_lost(error.why, may_return=False)
        if self._back is not None:
            self._back.set_result(None)
            self._back = None
        # Whoever attaches anew shall find the record free, whether or not this one is closed first.
        self._letting_go = self.loop.create_task(self._let_go())

    async def _let_go(self) -> None:
        if self._commands:
            await asyncio.wait(self._commands, timeout=_CLOSING_S)
        await self.keeper.close()

    def publish(self) -> None:
        """Carry the engine's news to whoever waits for them; to be called after each word to the engine."""
        for event in self.engine.take_events():
            if _log.isEnabledFor(logging.INFO):
                _log.info("%s", event, extra={"vm": printable(self.layout.vm.name), "event": event})
            self.audience.push(event)
        settled = self.engine.take_settled()
        self.audience.tell(settled)
        if self.watcher is not None:
            self.watcher.on_news(settled)
        reading = self._reading_again is not None or (self._reading is not None and not self._reading.done())
        if self.engine.wanted is not Read.NONE and self.lost is None and not reading:
            self._reading = self.loop.create_task(self._read_wanted())
        self.keeper.changed()

    # Waiting.

    async def wait_for(self, predicate: Callable[[Layout], object], limit: float | None) -> Layout:
        """Wait until *predicate* holds for the layout, at most *limit* seconds."""
        await self.check_open()
        if predicate(self.layout):
            return self.layout
        try:
            await self.audience.wait_for(predicate, limit)
        except TimeoutError:
            raise WaitTimeoutError(limit or 0.0, self.layout.enabled, self.layout.pending) from None
        return self.layout

    async def wait_answer(self, removal: Removal, limit: float | None) -> UnplugVerdict:
        """Wait for the guest's answer to *removal*, at most *limit* seconds; PENDING if there is none.

        Raises:
            CommandRejectedError: QEMU rejected it.
            MonitorLostError: The connection was lost before the answer.
        """
        if (verdict := verdict_on(removal)) is not None:
            return verdict
        await self.check_open()
        if not removal.state.is_final:
            await self.audience.wait_settled(removal, limit)
        if not removal.state.is_final and limit:
            self.want(Read.SLOTS)
            if self._reading is not None:
                await asyncio.wait({self._reading}, timeout=min(_LAST_LOOK_S, self.timeout))
            if self.closed:
                await self.check_open()
        if (verdict := verdict_on(removal)) is not None:
            return verdict
        if removal.state is State.REJECTED:
            raise rejected_error(removal)
        if removal.state is State.UNKNOWN:
            raise MonitorLostError(f"{removal.state.value}; vCPU {removal.ids} is as layout says")
        self.engine.deadline_passed(removal)
        self.publish()
        working = removal.state is State.WORKING
        return Pending(removal.ids, acknowledged=working, seconds=self.loop.time() - removal.requested_at)

    # Commands.

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run a command that changes the VM; whoever waits for it may be cancelled, it is not."""
        task = self.loop.create_task(work)
        self._commands.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self._commands.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.info("%s", error, extra={"vm": printable(self.layout.vm.name)})

    async def replied(self, action: str, ids: VcpuMap, task: asyncio.Task[None]) -> None:
        """Wait for a command's reply within its deadline; the command itself goes on."""
        if not await wait_ended(task, self.timeout):
            silence = MonitorTimeoutError("device_add" if action == "plug" else "device_del", self.timeout)
            why = f"{silence}; a late reply is taken in, and is an event"
            raise OutcomeUnknownError(action, ids, why) from silence
        task.result()

    # Reading.

    async def know_status(self) -> None:
        """Ask what the VM does, unless it runs, which it cannot stop doing without an event."""
        await self.check_open()
        if self.engine.status is None or not self.engine.status.is_steady:
            await self.read_status()

    async def read_status(self) -> None:
        """Ask what the VM does."""
        self.engine.status = await self.reader.status()

    async def refresh(self) -> Layout:
        """Read the slots and what the VM does, anew."""
        await self.check_open()
        await asyncio.gather(self.read(Read.FULL), self.read_status())
        return self.layout

    async def read(self, read: Read) -> None:
        """Read the slots and take in what they show."""
        sent = self.engine.read_sent(read)
        slots, threads = await self.reader.slots(full=read is Read.FULL)
        self.engine.observed(sent, slots, threads, self.loop.time())
        self.publish()

    def want(self, read: Read) -> None:
        """Have the slots read, now and by nobody in particular."""
        self.engine.wanted = max(self.engine.wanted, read)
        self._stop_pausing()
        self.publish()

    async def wait_read(self) -> None:
        """Wait for the read that is under way, if one is: it may end a doubt."""
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=self.timeout)

    async def _read_wanted(self) -> None:
        while (read := self.engine.wanted) is not Read.NONE:
            if not await self.read_quietly(read):
                self.engine.wanted = max(self.engine.wanted, read)
                if self._reading_again is None and self.lost is None:
                    self._reading_again = self.loop.call_later(self._pause, self._read_again)
                    self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
                return
            self._pause = _FIRST_PAUSE_S

    def _read_again(self) -> None:
        self._reading_again = None
        self.publish()

    def _stop_pausing(self) -> None:
        if self._reading_again is not None:
            self._reading_again.cancel()
            self._reading_again = None

    async def _resync_every(self, interval: float) -> None:
        while not self.closed:
            await asyncio.sleep(interval)
            if self.lost is None:
                await self.read_quietly(Read.FULL)

    async def read_quietly(self, read: Read) -> bool:
        """Read where no caller is there to be told of a failure; return False after one."""
        try:
            await self.read(read)
        except Exception as error:  # noqa: BLE001 - JUSTIFICATION: whatever a peer says, background work goes on
            if self.lost is None:
                self._unread.failed(error)
            return False
        self._unread.over()
        return True

    async def last_look(self, read: Read) -> None:
        """Read at a deadline: it may still show the CPU gone, and shall not stretch the deadline any further."""
        look = self.loop.create_task(self.read_quietly(read))
        await asyncio.wait({look}, timeout=min(_LAST_LOOK_S, self.timeout))

    async def close(self) -> None:
        """End everything; a borrowed client and the VM stay as they are. Idempotent."""
        self.closed = True
        self._stop_pausing()
        if self.watcher is not None:
            self.watcher.cancel()
        if self._commands:
            await asyncio.wait(self._commands, timeout=_CLOSING_S)
        if self.lost is None:
            self.on_lost(MonitorLostError("closed by this side"))
        elif self._back is not None:
            self.give_up(MonitorLostError("closed by this side"))
        await self.monitor.close()
        if self._commands:  # a reply that will not come now is an error to whoever waits for it
            await asyncio.wait(self._commands, timeout=_CLOSING_S)
        tasks = [task for task in (self._resync, self._reading, self._returning, *self._commands) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._letting_go is not None:
            await asyncio.wait({self._letting_go})
        await self.keeper.close()
