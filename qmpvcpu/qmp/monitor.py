"""`Monitor`: commands, events and loss, on a client of our own or on one that was given."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, Runstate, StateError
from qemu.qmp.error import ProtocolError
from qemu.qmp.qmp_client import BadReplyError

from qmpvcpu.errors import (
    CommandRejectedError,
    MalformedReplyError,
    MonitorConnectError,
    MonitorLostError,
    MonitorTimeoutError,
    clip,
    printable,
    shorten,
)
from qmpvcpu.host.processes import has_ended
from qmpvcpu.host.sockets import peer_inode
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.qmp.address import Address, connect, connected_socket, peer_pid, why_silent
from qmpvcpu.qmp.client import TunedClient, end, establish, explain, has_hung_up, longest_line, read_version

if TYPE_CHECKING:
    from asyncio.trsock import TransportSocket

    from qmpvcpu.host.finding import Found

Target = str | os.PathLike[str] | tuple[str, int] | socket.socket | QMPClient

_T = TypeVar("_T")


def is_address(target: Target) -> bool:
    """Return True if *target* can be opened again, False if it is a socket or a client that was given."""
    return not isinstance(target, socket.socket | QMPClient)


_log = logging.getLogger("qmpvcpu.qmp")
_CLOSE_GRACE_S: Final = 1.0  # how long close() waits for a peer to take what is still to be sent
_LONGEST_CLASS: Final = 100  # of what a peer sends as an error; QEMU's own texts have some hundred characters
_LONGEST_DESC: Final = 4000
_MOST_LATE: Final = 64  # commands whose late replies are waited for
_LOGGED: Final = 1000  # characters of a message in a log line; the extra field has all of it


class _Listener(EventListener):
    """Passes each event on as it comes off the wire: no queue, no history, no other task."""

    def __init__(self, deliver: Callable[[Message], None]) -> None:
        super().__init__()
        self._deliver = deliver

    async def put(self, event: Message) -> None:
        self._deliver(event)


class Monitor:
    """A running QMP session; made by `open`.

    Attributes:
        address: What it is connected to, as text for messages: ``unix:/run/x``, ``tcp:host:port``, ``fd 7``,
            ``the given QMPClient``.
        version: QEMU's version, such as ``(10, 0, 2)``.
        package: The distributor's name for it, or "".
        peer_pid: Process id at the other end (the one that called ``listen()``), None where it is not local.
        lost: What ended the session, or None while it runs.
    """

    def __init__(
        self,
        client: QMPClient,
        sock: socket.socket | None,
        address: str,
        on_event: Callable[[Mapping[str, Any]], None],
        on_lost: Callable[[MonitorLostError], None],
    ) -> None:
        self.address: Final = address
        self.version = (0, 0, 0)
        self.package = ""
        self.peer_pid: int | None = None
        self.lost: MonitorLostError | None = None
        self._client = client
        self._sock = sock  # None: the client is its owner's, not ours
        self._connection: socket.socket | TransportSocket | None = sock  # also that of a client which is not ours
        self._found: tuple[set[int], Found] | None = None
        self._on_event = on_event
        self._on_lost = on_lost
        self._listener = _Listener(self._deliver)
        self._watcher: asyncio.Task[object]
        self._ending = False
        self._running: set[asyncio.Task[object]] = set()  # asyncio itself holds tasks weakly
        self._late: list[asyncio.Task[object]] = []  # those whose deadline has passed, oldest first

    @property
    def longest_line(self) -> int:
        """How many bytes a reply may have: one that is longer ends the session."""
        return longest_line(self._client)

    @classmethod
    async def open(
        cls,
        target: Target,
        *,
        timeout: float,
        on_event: Callable[[Mapping[str, Any]], None],
        on_lost: Callable[[MonitorLostError], None],
    ) -> Self:
        """Connect to *target*, read its greeting and negotiate; after failure or cancellation nothing is left open.

        A `QMPClient` stays its owner's: a listener is added, nothing else changes. A socket becomes ours, and is
        closed on failure too.

        Units: seconds.

        Args:
            target: UNIX path, ``"unix:PATH"``, ``"tcp:HOST:PORT"``, ``(host, port)``, a connected stream socket
                whose greeting has not been read, or a running `QMPClient`.
            timeout: For connection, greeting and negotiation together.
            on_event: Called with each event, in wire order; possibly before `open` returns. What it raises is
                logged.
            on_lost: Called once when the session ends other than by `close`, before any command in flight is told.

        Returns:
            The session.

        Raises:
            MonitorConnectError: No session could be opened; it says why.
            TypeError: *target* is none of these.
        """
        if isinstance(target, QMPClient):
            name = f"the given QMPClient {target.name!r}" if target.name else "the given QMPClient"
            monitor = cls(target, None, name, on_event, on_lost)
            await monitor._adopt(timeout)
        else:
            deadline = asyncio.get_running_loop().time() + timeout
            if isinstance(target, socket.socket):
                name, sock = connected_socket(target)
            else:
                address = Address.parse(target)
                name, sock = str(address), await connect(address, deadline=deadline)
            client = TunedClient()
            monitor = cls(client, sock, name, on_event, on_lost)
            client.register_listener(monitor._listener)
            try:
                await establish(client, sock, name, deadline=deadline, timeout_s=timeout)
                greeting = client.greeting
                monitor.version, monitor.package = read_version(name, greeting.QMP.version if greeting else None)
                monitor.peer_pid = peer_pid(sock)
            except BaseException:
                await end(client, sock, grace_s=0)
                raise
        monitor._watcher = asyncio.create_task(monitor._watch())
        return monitor

    async def _adopt(self, timeout_s: float) -> None:
        """Start to listen on a client that is not ours."""
        client = self._client
        if client.runstate is not Runstate.RUNNING:
            why = f"it is not connected (runstate {client.runstate.name})"
            raise MonitorConnectError(self.address, why, hint="connect() it first; it was not touched")
        # Only to know the peer's process; with a client that keeps its writer elsewhere it stays unknown.
        writer: asyncio.StreamWriter | None = getattr(client, "_writer", None)
        if writer is not None:
            self._connection = writer.get_extra_info("socket")
            self.peer_pid = peer_pid(writer.get_extra_info("socket"))
        version: object = client.greeting.QMP.version if client.greeting else None
        if version is None:  # connected with await_greeting and negotiate off
            try:
                async with asyncio.timeout(timeout_s):
                    version = await client.execute("query-version")
            except TimeoutError:
                raise MonitorConnectError(self.address, f"no reply to query-version in {timeout_s:g} s") from None
            except (ExecuteError, ExecInterruptedError, ProtocolError) as err:
                raise MonitorConnectError(self.address, f"query-version failed: {clip(str(err))}") from None
        self.version, self.package = read_version(self.address, version)
        client.register_listener(self._listener)

    def find_qemu(self, tids: Collection[int]) -> "Found":
        """Return which process of this host is QEMU, whose vCPU threads it calls *tids*; see ``host.finding``.

        The same threads are looked for once: what is at the other end does not change.
        """
        if self._found is None or self._found[0] != {*tids}:
            from qmpvcpu.host.finding import find_qemu  # most programs need no thread of QEMU's

            connection = None if self._connection is None else peer_inode(self._connection)
            self._found = {*tids}, find_qemu(self.peer_pid, tids, connection=connection)
        return self._found[1]

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Send a command and return what QEMU returned.

        A deadline or a cancellation does not withdraw the command: QEMU may carry it out all the same. A reply after
        the deadline is dropped silently.

        Units: seconds.

        Args:
            command: QMP command.
            arguments: Its arguments, JSON-serializable.
            timeout: Deadline for the reply; None: wait as long as the session lives, which costs less.

        Returns:
            The reply's ``return``.

        Raises:
            CommandRejectedError: QEMU answered with an error.
            MalformedReplyError: It answered with something that is not a reply.
            MonitorTimeoutError: No reply by the deadline.
            MonitorLostError: The session has ended, before or while the command was in flight.
        """
        if self.lost is not None:
            raise MonitorLostError(self.lost.why, hung_up=self.lost.hung_up)
        verbose = _log.isEnabledFor(logging.DEBUG)
        if verbose:
            self._log_message("sent", {"execute": command, **({"arguments": arguments} if arguments else {})})
        try:
            if timeout is None:
                result = await self._client.execute(command, arguments)
            else:
                result = await self._execute_until(timeout, command, arguments)
        except ExecuteError as err:
            if verbose:
                self._log_message("received", err.received)
            told = clip(err.error_class, _LONGEST_CLASS), clip(err.error.error.desc, _LONGEST_DESC)
            # Not from err: a traceback would print QEMU's text as it is.
            raise CommandRejectedError(*told, err.sent, ids=VcpuMap()) from None
        except BadReplyError as err:
            raise MalformedReplyError(command, err.error_message, dict(err.msg)) from err
        except (ExecInterruptedError, StateError) as err:
            await asyncio.wait({self._watcher})  # it is about to know why
            lost = self.lost or MonitorLostError("the event loop is ending")
            last_sent = None if isinstance(err, StateError) else command
            raise MonitorLostError(lost.why, hung_up=lost.hung_up, last_sent=last_sent) from err
        if verbose:
            self._log_message("received", {"return": result})
        return result

    async def _execute_until(self, timeout_s: float, command: str, arguments: Mapping[str, Any] | None) -> object:
        """Send a command; after the deadline it stays in a task of its own, which takes the late reply."""
        task = asyncio.create_task(self._client.execute(command, arguments))
        self._running.add(task)
        task.add_done_callback(self._forget)
        if not await wait_ended(task, timeout_s):
            self._late = [each for each in self._late if not each.done()] + [task]
            if len(self._late) > _MOST_LATE:  # a QEMU that is stopped for a day is queried every half minute
                self._late.pop(0).cancel()
            raise MonitorTimeoutError(command, timeout_s, hint=why_silent(self.peer_pid))
        return task.result()

    def _forget(self, task: asyncio.Task[object]) -> None:
        """Drop an ended command, and look at its error so that asyncio does not report it."""
        self._running.discard(task)
        if not task.cancelled():
            task.exception()

    async def close(self) -> None:
        """End the session; never raises because of the peer, and may be called again.

        On a `QMPClient` that was given we only stop listening, and commands in flight run on. On a client of our own
        they raise `MonitorLostError`.
        """
        if self.lost is None:
            self.lost = MonitorLostError("it was closed on this side")
        if not self._ending:
            self._ending = True
            self._watcher.cancel()
            if self._sock is None:
                self._client.remove_listener(self._listener)
            else:
                self._watcher = asyncio.create_task(end(self._client, self._sock, grace_s=_CLOSE_GRACE_S))
        await asyncio.wait({self._watcher})  # not a plain await: our being cancelled must not cancel it

    async def _watch(self) -> None:
        """Wait for the session's end, find out why, and report it."""
        # runstate_changed() is a pulse: look first, then wait, with no await between.
        if self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._ending = True
        if self._sock is None:
            self._client.remove_listener(self._listener)  # or its owner's next session would reach us
            cause = self._foreign_cause()
            why = f"the QMPClient was disconnected (runstate {self._client.runstate.name})"
            if cause is not None:
                why = explain(cause, longest_line(self._client))
        else:
            cause = await end(self._client, self._sock, grace_s=0)
            why = explain(cause, longest_line(self._client))
            if isinstance(cause, EOFError | ConnectionResetError) and self.peer_pid and has_ended(self.peer_pid):
                why += f"; its process, {self.peer_pid}, has ended"
        if self.lost is not None:
            return
        self.lost = MonitorLostError(why, hung_up=has_hung_up(cause))
        self._tell(self._on_lost, self.lost)

    def _foreign_cause(self) -> BaseException | None:
        """Return what ended a session that only its owner may disconnect(), or None if that is not known."""
        # The reader knows more than the runstate. Where a client has none, we say less.
        reader: asyncio.Task[None] | None = getattr(self._client, "_reader_task", None)
        return reader.exception() if reader is not None and reader.done() and not reader.cancelled() else None

    def _deliver(self, event: Message) -> None:
        """Hand an event to the caller's function."""
        if self.lost is not None:
            return
        if _log.isEnabledFor(logging.DEBUG):
            self._log_message("event", event)
        self._tell(self._on_event, dict(event))

    def _tell(self, function: Callable[[_T], None], news: _T) -> None:
        """Call a function of the caller's."""
        try:
            function(news)
        except Exception:  # noqa: BLE001 - raised further it ends the reader of a client that may not be ours
            address = printable(self.address)
            _log.exception("%s: the function called with %s failed", address, news, extra={"vm": address})

    def _log_message(self, direction: str, message: Mapping[str, Any]) -> None:
        """Log one message of the exchange."""
        qmp = dict(message)
        address = printable(self.address)
        extra = {"vm": address, "direction": direction, "qmp": qmp}
        _log.debug("%s %s %s", address, direction, printable(shorten(qmp, _LOGGED)), extra=extra)


# asyncio.wait does the same as these, and wakes its caller one turn of the loop later. That counts where a VM is
# attached with a dozen queries, and where each vCPU of a map has its answer.


def wake(waiting: asyncio.Future[None]) -> None:
    """Let the caller that waits for *waiting* go on; may be called again."""
    if not waiting.done():
        waiting.set_result(None)


async def wait_woken(waiting: asyncio.Future[None], limit: float | None) -> None:
    """Wait until *waiting*, which belongs to the caller alone, is woken; at most *limit* seconds."""
    alarm = None if limit is None else waiting.get_loop().call_later(limit, wake, waiting)
    try:
        await waiting
    finally:
        if alarm is not None:
            alarm.cancel()


async def wait_ended(task: asyncio.Task[Any], limit: float) -> bool:
    """Wait until *task* ends, at most *limit* seconds; return whether it has. Cancelling this leaves it running."""
    ended = task.get_loop().create_future()
    task.add_done_callback(lambda _: wake(ended))
    await wait_woken(ended, limit)
    return task.done()
