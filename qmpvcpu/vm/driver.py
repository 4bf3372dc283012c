"""Driver: carries out what the engine asks for, and hands what comes of it back. It decides nothing.

Everything that happens (an event, a reply, a request, the end of a save) is put into one queue and taken from there,
one at a time, so the engine is never entered from within itself. Slow work runs in the driver's own tasks: cancelling
a caller never leaves an outcome unread, and a reply that comes after the caller's deadline is taken in.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from qmpvcpu import qapi
from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.messages import (
    Accepted,
    Ask,
    BackgroundRead,
    Cancelled,
    Change,
    ConfigWritten,
    Effect,
    Finished,
    GuestTold,
    Heard,
    Hold,
    HostIs,
    Input,
    LetGo,
    Look,
    Looked,
    LookFailed,
    Lost,
    NotBorn,
    PlaceThreads,
    Publish,
    Refresh,
    Rejection,
    Release,
    Request,
    Save,
    Saved,
    Send,
    Settle,
    Stop,
    ThreadsPlaced,
    Tick,
    Unanswered,
    Wanted,
    WantRead,
    WriteConfig,
)
from qmpvcpu.engine.vmstate import Read
from qmpvcpu.errors import (
    CommandRejectedError,
    GuestAgentError,
    GuestRefusedError,
    HostBusyError,
    HostError,
    MonitorError,
    MonitorLostError,
    Outcome,
    QmpVcpuError,
    RecordError,
    WaitTimeoutError,
    printable,
)
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.vm.connection import Connection, Finder, Trouble
from qmpvcpu.vm.guest import Guest
from qmpvcpu.vm.record_writer import RecordWriter
from qmpvcpu.vm.subscribers import Subscribers, check_loop

if TYPE_CHECKING:
    from qmpvcpu.model.placement import Placement
    from qmpvcpu.traces import Traces
    from qmpvcpu.vm.placing import Placer

_log = logging.getLogger("qmpvcpu.vm")

# close() gives commands in flight this long to be answered, so that their outcome is recorded.
_CLOSING_S = 1.0

# Another program that plugs vCPUs into their place is waited for so long, and looked at so often.
_TURN_S = 5.0
_TURN_STEP_S = 0.003

_T = TypeVar("_T")


class Driver:
    """One VM: its engine, its connection, its record, and those who wait for it. One event loop, one owner.

    Args:
        engine: Decides.
        connection: To QEMU; the driver closes it.
        writer: Writes the record.
        finder: Finds QEMU again once the connection is lost; None: nobody does.
        guest: The guest's agent; it hears every event, and is closed with the driver.
        traces: Makes spans of the changes; None: nobody does.

    Attributes:
        engine: As given.
        connection: As given; another one once QEMU was found again.
        writer: As given.
        guest: As given.
        subscribers: Streams of events, and waits for the layout.
        closed: True once this side has let go of the VM.
    """

    def __init__(
        self,
        engine: Engine,
        connection: Connection,
        writer: RecordWriter,
        finder: Finder | None,
        guest: Guest,
        *,
        traces: "Traces | None" = None,
    ) -> None:
        self.engine = engine
        self.connection = connection
        self.writer = writer
        self.guest = guest
        self.closed = False
        self._finder = finder
        self._traces = traces
        self._loop = asyncio.get_running_loop()
        self.subscribers = Subscribers(engine.state.take_events(), self._loop)
        self._inputs: deque[Input] = deque()
        self._draining = False
        self._later: asyncio.Handle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._requests: dict[Request, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._letting_go: asyncio.Task[None] | None = None
        self._calm: asyncio.Future[None] | None = None
        self._placer: Placer | None = None
        name = engine.layout.vm.name
        self._extra = {"vm": printable(name)}
        self._unread = Trouble(f"cannot read {name}", name)
        self._effects: dict[type, Callable[[Any], object]] = {
            Send: self._begin_to_send,
            Look: lambda effect: self.start(self._look(effect)),
            Ask: lambda effect: self.start(self._ask(effect)),
            PlaceThreads: lambda effect: self.start(self._place(effect)),
            Save: lambda effect: self.start(self._save(effect)),
            WriteConfig: lambda effect: self.start(self._write_config(effect)),
            Publish: self._publish,
            Settle: self._settle,
            BackgroundRead: self._tell_of_reading,
            LetGo: self._let_go,
        }
        if traces is not None:
            self._effects[Finished] = traces.finished
            self._effects[Publish] = _each(traces.heard, self._publish)
            self._effects[Settle] = _each(traces.settled, self._settle)
        connection.ear.hand_over(self._heard, self._doubt, self._lost)
        self.put(Tick())

    @property
    def layout(self) -> Layout:
        """All slots, as known now."""
        return self.engine.layout

    @property
    def placer(self) -> "Placer":
        """What puts QEMU's threads in their place."""
        if self._placer is None:
            from qmpvcpu.vm.placing import Placer  # most VMs have no placement

            self._placer = Placer(self.engine.state, lambda: self.connection.monitor)
        return self._placer

    # What happens.

    def put(self, given: Input) -> None:
        """Have the engine take *given* in, after all that came before it."""
        self._inputs.append(given)
        self._drain()

    def _heard(self, event: qapi.QemuEvent) -> None:
        self._inputs.append(Heard(event))
        if not self.engine.holds_saves:
            self._drain()
        elif self._later is None:  # a map brings bursts of events: what one read of the socket brought is one burst
            self._later = self._loop.call_soon(self._drain)

    def _doubt(self) -> None:
        self.put(WantRead(Read.FULL))

    def _lost(self, error: MonitorLostError) -> None:
        may_return = self._finder is not None and not self.closed
        self.put(Lost(error, may_return))
        if may_return and self._finder is not None:
            self.start(self._come_back(self._finder))

    def _drain(self) -> None:
        if self._draining:
            return
        self._draining = True
        try:
            while self._inputs:
                given = self._inputs.popleft()
                try:
                    effects = self.engine.receive(given, self._loop.time())
                except Exception as error:  # noqa: BLE001 -- a fault of ours: one input is lost, the others are not
                    _log.exception("%s could not be taken in", printable(str(given)), extra=self._extra)
                    if isinstance(given, Request):
                        self._perform(Settle(given, error=error))
                    continue
                for effect in effects:
                    self._perform(effect)
        finally:
            self._draining = False
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._set_alarm()
        if self.subscribers.are_waiting:
            self.subscribers.tell(self.engine.layout)
        self.writer.changed()
        if self._calm is not None and not self._calm.done() and not self.engine.is_busy:
            self._calm.set_result(None)

    def _set_alarm(self) -> None:
        """Have the engine told when its next deadline passes; an alarm that rings early does no harm."""
        deadline = self.engine.deadline
        if deadline is not None and (self._alarm is None or deadline < self._alarm.when()):
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self.put(Tick())

    # Requests.

    async def request(self, request: Request) -> Any:
        """Have *request* done, and return its result.

        Raises:
            QmpVcpuError: What it was settled with.
        """
        try:
            return await self.begin(request)
        except asyncio.CancelledError:
            self.put(Cancelled(request))
            raise

    def begin(self, request: Request) -> "asyncio.Future[Any]":
        """Have *request* begun, and return the future of its result.

        Raises:
            RuntimeError: It is called in another event loop than that of ``attach``.
        """
        check_loop(self._loop)
        if isinstance(request, Change):
            self.look_at_host(request.options.placement)
            if self._traces is not None:
                self._traces.begun(request)
        future = self._requests[request] = self._loop.create_future()
        self.put(request)
        return future

    def meet_host(self) -> None:
        """Have the engine told what the host allows, and where threads are, if anything is wanted of them."""
        state = self.engine.state
        if state.places.placement is not None:
            self.look_at_host()
            state.found(self.placer.read_places(state.layout.slots))

    def look_at_host(self, given: "Placement | None" = None) -> None:
        """Have the engine told what the host allows, if anything is wanted of threads, also if only *given* is."""
        wanted = self.engine.state.places.wanted_with(given)
        if wanted is not None:
            self.put(HostIs(self.placer.facts(wanted)))

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Keep every change out for the time of the context."""
        hold = Hold()
        try:
            await self.request(hold)
            yield
        finally:
            self.put(Release(hold))

    async def wait_for(self, predicate: Callable[[Layout], object], limit: float | None) -> Layout:
        """Wait until *predicate* holds for the layout, at most *limit* seconds.

        Raises:
            WaitTimeoutError: It did not hold in time.
            MonitorLostError: The connection was lost.
        """
        if self.engine.closed or self.closed:
            await self.check_open()
        check_loop(self._loop)
        layout = self.layout
        if predicate(layout):
            return layout
        try:
            return await self.subscribers.wait_for(predicate, limit)
        except TimeoutError:
            raise WaitTimeoutError(limit or 0.0, self.layout.enabled, self.layout.pending) from None

    async def check_open(self) -> None:
        """Raise MonitorLostError if the connection is gone, and does not come back within a command's deadline."""
        check_loop(self._loop)
        if self.engine.lost is not None or self.closed:
            await self.request(Refresh(Read.NONE, status=False))

    def traced(self, call: str, **told: str) -> contextlib.AbstractContextManager[object]:
        """Return the context of a *call* that is no change: a span with what is *told*, where spans are made.

        What the driver itself asks the guest is none: the steps' spans tell of it.
        """
        if self._traces is None or asyncio.current_task() in self._tasks:
            return contextlib.nullcontext()
        return self._traces.call(call, **told)

    # What is to be done.

    def _perform(self, effect: Effect) -> None:
        self._effects[type(effect)](effect)

    def start(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Run *work* to its end, even if nobody waits for it any more."""
        task = self._loop.create_task(work)
        self._tasks.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.info("%s", error, extra=self._extra)

    def _begin_to_send(self, send: Send) -> None:
        if send.born_on is not None:
            try:
                self.placer.birthplace.begin(send.born_on, send.threads)
            except HostBusyError as error:
                self.start(self._send_in_turn(send, send.born_on, error))
                return
            except (HostError, OSError) as error:
                self.put(NotBorn(send.number, str(error)))
                return
        self.start(self._send(send))

    async def _send_in_turn(self, send: Send, born_on: VcpuMap, busy: HostBusyError) -> None:
        """Send a plug once the other program's are over: they take some milliseconds each."""
        why: HostError | OSError = busy
        deadline = self._loop.time() + _TURN_S
        while isinstance(why, HostBusyError) and self._loop.time() < deadline:
            await asyncio.sleep(_TURN_STEP_S)
            try:
                self.placer.birthplace.begin(born_on, send.threads)
            except (HostError, OSError) as error:
                why = error
            else:
                await self._send(send)
                return
        self.put(NotBorn(send.number, str(why)))

    async def _send(self, send: Send) -> None:
        try:
            await self.connection.monitor.execute(send.command, send.arguments)
        except CommandRejectedError as error:
            told: Input = Rejection(send.number, error.error_class, error.desc)
        except MonitorError as error:
            told = Unanswered(send.number, error)
        else:
            told = Accepted(send.number, send.born_on is not None and self.placer.birthplace.is_born())
        self.put(told)
        if send.born_on is not None:
            # Not before: what follows may be born in the same place, or in another.
            self.placer.birthplace.end(send.threads if isinstance(told, Rejection) else 0)

    async def _look(self, look: Look) -> None:
        try:
            looked = await self._read(look)
        except Exception as error:  # noqa: BLE001 -- a peer may say anything, and somebody waits for the end of the look
            self.put(LookFailed(look.number, error))
        else:
            self.put(looked)

    async def _read(self, look: Look) -> Looked:
        reader = self.connection.reader
        queries: list[Coroutine[Any, Any, Any]] = []
        if look.read is not Read.NONE:
            queries.append(reader.slots(full=look.read is Read.FULL))
        if look.status:
            queries.append(reader.status())
        if look.other_paths:
            queries.append(reader.other_paths())
        if look.started:
            queries.append(reader.started(look.started))
        replies = deque([await queries[0]] if len(queries) == 1 else await asyncio.gather(*queries))
        slots, threads = (None, None) if look.read is Read.NONE else replies.popleft()
        status = replies.popleft() if look.status else None
        other_paths = replies.popleft() if look.other_paths else None
        started = replies.popleft() if look.started else None
        places = None
        if slots and look.read is Read.FULL and self.engine.state.places.placement is not None:
            places = self.placer.read_places(slots)
        return Looked(look.number, slots, threads, status, other_paths, started, places)

    async def _ask(self, ask: Ask) -> None:
        guest = self.guest
        changed = ask.ids
        try:
            if ask.online is None:
                await guest.vcpus(timeout=ask.limit)
            else:
                change = guest.set_online if ask.online else guest.set_offline
                changed = await change(ask.ids, timeout=ask.limit)
        except GuestRefusedError as error:
            told = GuestTold(ask.number, None, error.done, error)
        except QmpVcpuError as error:
            told = GuestTold(ask.number, None, error=error)
        except Exception as error:  # noqa: BLE001 -- an agent may say anything, and somebody waits for the end of this
            outcome = Outcome.UNCHANGED if ask.online is None else Outcome.UNKNOWN
            told = GuestTold(ask.number, None, error=GuestAgentError(guest.address, repr(error), outcome=outcome))
        else:
            told = GuestTold(ask.number, None, changed)
        self.put(told)

    async def _place(self, effect: PlaceThreads) -> None:
        try:
            seen = self.placer.birthplace.snapshot()
            readings = await self.connection.reader.threads()
            why_not = self.placer.place(effect.slots, readings, seen)
        except (MonitorError, HostError, OSError) as error:
            told = ThreadsPlaced(effect.number, {}, error)
        else:
            shared = qapi.runs_single_threaded(readings) if len(readings) > 1 else None
            told = ThreadsPlaced(effect.number, why_not, single_threaded=shared)
        self.put(told)

    async def _save(self, save: Save) -> None:
        try:
            await self.writer.save()
        except RecordError as error:
            self.put(Saved(save.number, error))
        else:
            self.put(Saved(save.number, None))

    async def _write_config(self, effect: WriteConfig) -> None:
        report, error = await effect.config.write(effect.done)
        self.put(ConfigWritten(effect.number, report, error))

    def _publish(self, effect: Publish) -> None:
        for event in effect.events:
            if _log.isEnabledFor(logging.INFO):
                _log.info("%s", event, extra={**self._extra, "event": event})
            self.guest.heard(event)
            self.subscribers.push(event)

    def _tell_of_reading(self, effect: BackgroundRead) -> None:
        if effect.error is None:
            self._unread.over()
        else:
            self._unread.failed(effect.error)

    def _settle(self, effect: Settle) -> None:
        future = self._requests.pop(effect.request, None)
        if future is None or future.done():
            return
        if effect.error is not None:
            future.set_exception(effect.error)
            future.exception()  # the waiter may be gone, and asyncio would report it
        else:
            future.set_result(effect.result)

    # The connection.

    async def _come_back(self, finder: Finder) -> None:
        try:
            found = await finder.find(self.layout, self.engine.state.check_slots)
        except MonitorLostError as error:
            self.put(Lost(error, may_return=False))
            return
        if self.closed:
            await found.connection.monitor.close()
            return
        # Swapped before the wait: a close() during it closes the new one, and cancels this.
        left, self.connection = self.connection, found.connection
        await left.monitor.close()
        if self.closed:
            return
        if (record := self.writer.record) is not None:
            record.instance = found.instance
            if record.next_placement is not None and not found.returned.same_instance:
                self.put(Wanted(record.next_placement.instead_of(self.engine.state.places.placement)))
        places = self.engine.state.places
        if places.placement is not None or places.host is not None:
            # Before anything is sent: another QEMU may run elsewhere, and while none was there nothing was known.
            self.put(HostIs(self.placer.facts(places.placement, slots=found.returned.slots)))
        self.put(found.returned)
        self.connection.ear.hand_over(self._heard, self._doubt, self._lost)

    def _let_go(self, effect: LetGo) -> None:
        self.subscribers.close(effect.error)
        # Release the record now, so that a new attach can lock it.
        self._letting_go = self._loop.create_task(self._let_go_of_record())

    async def _let_go_of_record(self) -> None:
        await self._wait_calm()
        await self.writer.close()

    async def _wait_calm(self) -> None:
        """Wait until the outcome of what is under way is known and recorded, for a second at most."""
        if self.engine.is_busy:
            self._calm = self._calm or self._loop.create_future()
            await asyncio.wait({self._calm}, timeout=_CLOSING_S)
            self._calm = None

    async def close(self) -> None:
        """End everything; a borrowed client and the VM stay as they are. Idempotent."""
        check_loop(self._loop)
        self.closed = True
        self.put(Stop())
        await self._wait_calm()
        lost = MonitorLostError("closed by this side")
        self.put(Lost(lost, may_return=False))
        await self.connection.monitor.close()
        await self.guest.close()
        await self._wait_calm()  # a reply that will not come now is an error to those who wait for it
        for request in tuple(self._requests):  # what will not end now
            self._perform(Settle(request, error=MonitorLostError(lost.why, outcome=Outcome.UNKNOWN)))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._letting_go is not None:
            await asyncio.wait({self._letting_go})
        if self._alarm is not None:
            self._alarm.cancel()
        if self._placer is not None:
            self._placer.birthplace.restore()
        await self.writer.close()


def _each(*takers: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return what hands an effect to each of *takers*, in order."""

    def hand_out(effect: Effect) -> None:
        for take in takers:
            take(effect)

    return hand_out
