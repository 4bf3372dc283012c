"""`ScriptedPeer`: a QMP server that does what a test tells it to, faults included.

A test is a dialogue. The peer itself answers the commands in `ScriptedPeer.answers`. Every other command waits until
the test takes it with `ScriptedPeer.expect` and answers it: late, twice, cut short, or not at all::

    async with ScriptedPeer(answers={"query-status": {"status": "running", "running": True}}) as peer:
        asking = asyncio.create_task(client.execute("device_del", {"id": "vcpu3"}))
        command = await peer.expect("device_del")
        await peer.event("DEVICE_DELETED", {"device": "vcpu3", "path": "/machine/peripheral/vcpu3"})
        await command.reply({})
"""

import asyncio
import codecs
import contextlib
import inspect
import itertools
import json
import socket
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self

from qmpvcpu.errors import counted
from qmpvcpu.given import checked
from qmpvcpu.testing.directory import vm_directory

_KEPT_MESSAGES: Final = 1000
_KEPT_OF_EACH: Final = 10_000  # bytes

GREETING: Final[Mapping[str, Any]] = {
    "QMP": {
        "version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": "scripted"},
        "capabilities": ["oob"],
    }
}


class _Connection(Protocol):
    """The connection that a command came on."""

    async def send(self, message: Mapping[str, Any] | bytes) -> None: ...

    async def hang_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Line:
    """What one side said to the other.

    Attributes:
        at: When, in seconds since the epoch.
        sender: Who; the scripted peer plays QEMU.
        text: What, as it was on the wire but for bytes that are no UTF-8.
    """

    at: float
    sender: Literal["client", "qemu"]
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer: QMP's error reply.

    Attributes:
        desc: QEMU's text.
        error_class: QEMU's error class.
    """

    desc: str
    error_class: str = "GenericError"


@dataclass(frozen=True, slots=True)
class Hang:
    """An answer: none, ever."""


HANG: Final = Hang()


@dataclass(frozen=True, slots=True)
class Command:
    """One command that the peer received, and the ways to answer it.

    Attributes:
        name: The QMP command.
        arguments: Its arguments, {} if it had none.
        message: All of the message.
    """

    name: str
    arguments: Mapping[str, Any]
    message: Mapping[str, Any]
    _peer: _Connection = field(repr=False)

    def _reply(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a reply message, with this command's id if it had one."""
        return {**content, **({"id": self.message["id"]} if "id" in self.message else {})}

    async def reply(self, value: Any) -> None:
        """Answer with a ``return``; may be called again, to answer twice."""
        await self._peer.send(self._reply({"return": value}))

    async def fail(self, desc: str, error_class: str = "GenericError") -> None:
        """Answer with an ``error``."""
        await self._peer.send(self._reply({"error": {"class": error_class, "desc": desc}}))

    async def answer(self, content: Mapping[str, Any]) -> None:
        """Answer with any message, such as one with neither ``return`` nor ``error``; the id is added."""
        await self._peer.send(self._reply(content))

    async def cut(self, value: Any) -> None:
        """Send the first half of a reply, and hang up."""
        data = json.dumps(self._reply({"return": value})).encode()
        await self._peer.send(data[: len(data) // 2])
        await self._peer.hang_up()


# What stands in ScriptedPeer.answers: a value to return, a Failure, HANG, or a function of the command that returns
# one of these, itself or awaited. A function may send events first, with the peer that it closes over.
Answer = Any


def first_message(text: str) -> tuple[Any, int] | None:
    """Return the message that *text* begins with, and its length; None if the rest is still to come."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return None


class ScriptedPeer:
    """A QMP server on a UNIX or TCP socket; an async context manager, which raises at its end what an answer raised.

    Like QEMU it serves one client at a time: another one connects, and waits ungreeted until the first has left.

    Attributes:
        answers: What to answer by itself, by command; may be changed at any time. Values are JSON, `Failure`, `HANG`,
            or functions ``(Command) -> answer`` (plain or async).
        received: Every command, in order; not the handshake.
        transcript: What was said last, by either side: at most 1000 messages, the first 10 kB of each.
        reject_others: Answer ``CommandNotFound`` to what is not in `answers`, instead of waiting for `expect`.
    """

    def __init__(
        self,
        *,
        answers: Mapping[str, Answer] | None = None,
        greeting: Mapping[str, Any] | bytes | None = GREETING,
        tcp: bool = False,
        reject_others: bool = False,
    ) -> None:
        """Prepare a peer.

        Args:
            answers: See the class.
            greeting: What to say first: a message, raw bytes, or None for silence.
            tcp: Listen on a TCP port of the loopback interface instead of on a UNIX socket.
            reject_others: See the class.
        """
        self.answers: dict[str, Answer] = {"qmp_capabilities": {}, **(answers or {})}
        self.received: list[Command] = []
        self.transcript: deque[Line] = deque(maxlen=_KEPT_MESSAGES)
        self.reject_others = reject_others
        self._greeting = greeting
        self._tcp = tcp
        self._waiting: deque[Command] = deque()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._faults: list[BaseException] = []
        self._resources = contextlib.ExitStack()
        self._address = ""

    @classmethod
    def from_capture(
        cls, capture: Path | Mapping[str, Any], *, answers: Mapping[str, Answer] | None = None, tcp: bool = False
    ) -> Self:
        """Return a peer that speaks as a recorded QEMU did.

        A query is answered from the stretch of the recording that the peer is in. A change (`device_add`,
        `device_del`) that the recording has is answered as there, and moves the peer to what follows it; any other is
        rejected.

        Args:
            capture: The recording or its file: a greeting, and steps of ``execute``, ``arguments``, and ``return`` or
                ``error``.
            answers: More answers; they go before the recording's.
            tcp: As in the constructor.

        Returns:
            The peer.
        """
        data = json.loads(capture.read_text()) if isinstance(capture, Path) else capture
        replay = Replay(data["steps"])
        return cls(
            answers={**replay.answers(), **(answers or {})}, greeting=data["greeting"], tcp=tcp, reject_others=True
        )

    @property
    def address(self) -> str:
        """Where it listens, as ``unix:PATH`` or ``tcp:HOST:PORT``."""
        return self._address

    @property
    def path(self) -> str:
        """Path of its UNIX socket."""
        return self._address.removeprefix("unix:")

    async def __aenter__(self) -> Self:
        if self._tcp:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self._address = f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
        else:
            folder = self._resources.enter_context(vm_directory())
            self._address = f"unix:{folder}/qmp"
            server = await asyncio.start_unix_server(self._accept, self.path)
        self._resources.callback(server.close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._faults and error is None:
            raise self._faults[0]

    async def send(self, message: Mapping[str, Any] | bytes) -> None:
        """Send a message, or raw bytes as they are, to the client that is being served."""
        if self._writer is None:
            raise ConnectionError("no client is being served")
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
        text = data[:_KEPT_OF_EACH].decode(errors="backslashreplace").rstrip()
        self.transcript.append(Line(time.time(), "qemu", text))
        self._writer.write(data)
        await self._writer.drain()

    async def event(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event, stamped now."""
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        message: dict[str, Any] = {"timestamp": {"seconds": seconds, "microseconds": microseconds}, "event": name}
        if data is not None:
            message["data"] = data
        await self.send(message)

    async def hang_up(self) -> None:
        """Close the connection, after what was sent."""
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    def reset(self) -> None:
        """Close the connection so that a TCP client gets ECONNRESET."""
        if self._writer is not None:
            linger = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._writer.transport.abort()

    @checked
    async def expect(self, name: str, *, within: float = 5.0) -> Command:
        """Return the next command that nothing has answered, which has to be *name*.

        Args:
            name: The QMP command.
            within: Seconds to wait for it.

        Returns:
            The command, to be answered.

        Raises:
            AssertionError: Another one came, or none.
        """
        await self._until(lambda: bool(self._waiting), f"{name} was not sent", within)
        command = self._waiting.popleft()
        if command.name != name:
            raise AssertionError(f"{name} was expected, {command.name} was sent: {dict(command.message)}")
        return command

    @checked
    async def wait_for(self, name: str, n: int = 1, *, within: float = 5.0) -> Command:
        """Wait until *name* has been received *n* times, answered or not, and return the n-th.

        Raises:
            AssertionError: It was not, in *within* seconds.
        """
        await self._until(lambda: self.count(name) >= n, f"{name} was not sent {counted(n, 'time')}", within)
        return next(itertools.islice((one for one in self.received if one.name == name), n - 1, None))

    @checked
    async def wait_connected(self, *, within: float = 5.0) -> None:
        """Wait until a client is being served.

        Raises:
            AssertionError: None was, in *within* seconds.
        """
        await self._until(lambda: self._writer is not None, "no client came", within)

    @checked
    async def wait_left(self, *, within: float = 5.0) -> None:
        """Wait until no client is being served.

        Raises:
            AssertionError: One still is, after *within* seconds.
        """
        await self._until(lambda: self._writer is None, "the client did not leave", within)

    def count(self, name: str) -> int:
        """Return how often *name* has been received."""
        return sum(command.name == name for command in self.received)

    async def _until(self, is_met: Callable[[], bool], otherwise: str, within: float) -> None:
        """Wait for a condition of what has happened so far."""
        try:
            async with asyncio.timeout(within):
                while not is_met():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            names = [command.name for command in self.received]
            raise AssertionError(f"{otherwise} within {within:g} s; received: {names}") from None

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client in a task that the peer can end."""
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        """Keep what an answer raised, for the end of the test."""
        self._tasks.discard(task)
        fault = None if task.cancelled() else task.exception()
        if fault is not None:
            self._faults.append(fault)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client, when its turn has come, until it leaves."""
        try:
            async with self._turn:
                try:
                    self._writer = writer
                    self._changed.set()
                    if self._greeting is not None:
                        await self.send(self._greeting)
                    await self._listen(reader)
                finally:
                    self._writer = None
                    self._changed.set()
        except OSError:
            pass  # the client is gone, as some scripts want it
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Take the client's messages off the stream; they need not end with a newline."""
        text = ""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="ignore")  # 0xFF flushes an agent's parser
        while data := await reader.read(65536):
            text += utf8.decode(data)
            while (found := first_message(text := text.lstrip())) is not None:
                message, used = found
                self.transcript.append(Line(time.time(), "client", text[: min(used, _KEPT_OF_EACH)]))
                text = text[used:]
                await self._receive(message)

    async def _receive(self, message: Mapping[str, Any]) -> None:
        """Answer a message, or keep it for the test."""
        name = message.get("execute") or message.get("exec-oob") or ""
        command = Command(name, message.get("arguments") or {}, message, self)
        if name != "qmp_capabilities":
            self.received.append(command)
        if name in self.answers:
            await self._answer(command, self.answers[name])
        elif self.reject_others:
            await command.fail(f"The command {name} has not been found", "CommandNotFound")
        else:
            self._waiting.append(command)
        self._changed.set()

    async def _answer(self, command: Command, answer: Answer) -> None:
        """Answer as the script says."""
        if callable(answer):
            answer = answer(command)
            if inspect.isawaitable(answer):
                answer = await _awaited(answer)
        if isinstance(answer, Failure):
            await command.fail(answer.desc, answer.error_class)
        elif answer != HANG:
            await command.reply(answer)


async def _awaited(answer: Awaitable[Any]) -> Any:
    """Await an answer whose type is only known now."""
    return await answer


_QUERIES: Final = ("query-", "qom-get", "qom-list", "device-list-properties")


class Replay:
    """The steps of a recording, and how far they have been replayed."""

    def __init__(self, steps: Iterable[Mapping[str, Any]]) -> None:
        self._steps = tuple(steps)
        self._at = 0

    def answers(self) -> dict[str, Answer]:
        """Return an answer for each command that the recording has."""
        names = {step["execute"] for step in self._steps}
        return {name: self._query if name.startswith(_QUERIES) else self._change for name in sorted(names)}

    def _query(self, command: Command) -> Answer:
        """Answer from here up to the next change, else from before."""
        for step in self._steps[self._at :]:
            if not step["execute"].startswith(_QUERIES):
                break
            if self._is(step, command):
                return self._outcome(step)
        for step in reversed(self._steps[: self._at]):
            if self._is(step, command):
                return self._outcome(step)
        return Failure(f"the recording has no {command.name} with {dict(command.arguments)} up to here")

    def _change(self, command: Command) -> Answer:
        """Answer as recorded, and move to what follows."""
        for number, step in enumerate(self._steps[self._at :], start=self._at + 1):
            if self._is(step, command):
                self._at = number
                return self._outcome(step)
        return Failure(f"the recording has no {command.name} with {dict(command.arguments)} from here")

    @staticmethod
    def _is(step: Mapping[str, Any], command: Command) -> bool:
        """Tell whether a step is this command."""
        return step["execute"] == command.name and (step.get("arguments") or {}) == dict(command.arguments)

    @staticmethod
    def _outcome(step: Mapping[str, Any]) -> Answer:
        """Return a step's answer."""
        if "error" in step:
            return Failure(step["error"]["desc"], step["error"]["class"])
        return step["return"]
