"""All messages of a stream in order, without a gap: through a lost connection, a lost consumer and a new leader."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Self, TypeVar, cast

from qmpvcpu.bus.clock import NS, Clock, seconds
from qmpvcpu.bus.link import ApiError, Link, missing
from qmpvcpu.errors import ServerLostError

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

_T = TypeVar("_T")

_SHORT: Final = 9
HEARTBEAT_S: Final = 2.0
"""How often the server says that a session is alive."""
_SILENT: Final = 3  # heartbeats: a loaded machine is late by one
_FORGET_S: Final = 30.0  # the server removes a consumer that nobody listens to
_PAUSE_S: Final = 0.2
_LONGEST_S: Final = 600.0  # then a new one is begun, which also shows the server's clock anew


class Happened(NamedTuple):
    """One message of a stream."""

    subject: str
    data: bytes
    created: float


class Received(NamedTuple):
    """One message of a session.

    Attributes:
        subject: Its subject.
        data: Its payload.
        headers: Its headers.
        sequence: Its number in the stream.
        created: When the server wrote it, in seconds since 1970.
        pending: How many more there were when it was sent.
    """

    subject: str
    data: bytes
    headers: dict[str, str]
    sequence: int
    created: float
    pending: int


class GapError(Exception):
    """Messages may have been missed, so a new session is needed: raised inside this package only."""


class Session:
    """A consumer of a stream, and what it has sent; any doubt about that ends it with GapError."""

    def __init__(self, link: Link, stream: str, clock: Clock, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._heartbeat_s = heartbeat_s
        self._silent_s = _SILENT * heartbeat_s
        self._link = link
        self._stream = stream
        self._clock = clock
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._expected = 1
        self._ends = 0.0
        self._is_live = False  # what comes has just been written
        self.pending = 0
        """How many messages there were when it began."""

    async def begin(self, subject: str, start: dict[str, Any], *, headers_only: bool = False) -> None:
        """Subscribe to *subject*, from *start* on.

        Raises:
            GapError: It could not begin now; another try may.
            ServerForbiddenError: The server does not let us.
            UnfitServerError: There is no such stream.
        """
        import nats.errors

        link = self._link
        await link.wait_connected()
        client = link.client
        asked = f"watch {subject}"
        inbox = client.new_inbox()
        name = inbox.rpartition(".")[2]

        async def received(message: "Msg") -> None:
            self._queue.put_nowait(message)

        link.on_cut.add(self._cut)
        try:
            self._subscription = await client.subscribe(inbox, cb=received)
        except nats.errors.Error as error:
            raise GapError(str(error)) from error
        config = {
            "name": name,
            "deliver_subject": inbox,
            "filter_subject": subject,
            "ack_policy": "none",
            "max_deliver": 1,
            "replay_policy": "instant",
            "flow_control": True,
            "idle_heartbeat": int(self._heartbeat_s * NS),
            "inactive_threshold": int(_FORGET_S * NS),
            "headers_only": headers_only,
            "mem_storage": True,
            "num_replicas": 1,
            **start,
        }
        before = time.monotonic()
        try:
            answer = await link.api(
                f"CONSUMER.CREATE.{self._stream}.{name}.{subject}",
                {"stream_name": self._stream, "config": config},
                asked=asked,
            )
        except ApiError as error:
            if error.is_without_stream:
                raise missing(self._stream) from None
            raise GapError(str(error)) from error
        except ServerLostError as error:
            raise GapError(str(error)) from error
        now = time.monotonic()
        self._clock.saw(str(answer.get("created", "")), before, now)
        self._ends = now + _LONGEST_S
        self.pending = int(answer.get("num_pending", 0))
        self._is_live = self.pending == 0

    def _cut(self) -> None:
        self._queue.put_nowait(None)

    async def next(self, timeout: float | None = None) -> Received | None:
        """Return the next message; None: there was none for *timeout*, or the server says that there is none now.

        Raises:
            GapError: Some may have been missed.
        """
        while True:
            if time.monotonic() > self._ends and self._queue.empty():
                raise GapError("it is old")
            try:
                async with asyncio.timeout(self._silent_s if timeout is None else min(timeout, self._silent_s)):
                    message = await self._queue.get()
            except TimeoutError:
                if timeout is not None and timeout < self._silent_s:
                    return None
                raise GapError("the consumer is silent") from None
            if message is None:
                raise GapError("the connection was lost")
            headers = message.headers or {}
            if not (status := headers.get("Status")):
                return self._numbered(message, headers)
            if not await self._control(message, status, headers):
                return None

    async def _control(self, message: "Msg", status: str, headers: dict[str, str]) -> bool:
        """Answer the server's message about the session; return whether it has more to send."""
        if status != "100":
            raise GapError(f"the server ended it: {status} {headers.get('Description', '')}")
        last = headers.get("Nats-Last-Consumer")
        if last is not None and int(last) != self._expected - 1:
            raise GapError("messages were lost")
        reply = message.reply or headers.get("Nats-Consumer-Stalled", "")
        if not reply:
            return False
        # The server waits for this before it sends more: what is here has been taken.
        with contextlib.suppress(Exception):  # a loss of the connection is seen elsewhere
            await self._link.client.publish(reply)
        return True

    def _numbered(self, message: "Msg", headers: dict[str, str]) -> Received:
        # $JS.ACK.STREAM.CONSUMER.TRIES.SEQUENCE.NUMBER.TIME.PENDING, or with a domain and an account before STREAM
        words = message.reply.split(".")
        sequence, number, created, pending = map(int, words[5:9] if len(words) == _SHORT else words[7:11])
        if number != self._expected:
            raise GapError("messages were lost")
        self._expected += 1
        if pending == 0:
            if self._is_live:
                self._clock.heard(seconds(created))
            self._is_live = True
        return Received(message.subject, message.data, headers, sequence, seconds(created), pending)

    async def end(self) -> None:
        """End it; the server forgets the consumer by itself."""
        self._link.on_cut.discard(self._cut)
        if self._subscription is not None:
            with contextlib.suppress(Exception):  # it is gone with its connection
                await self._subscription.unsubscribe()


class Feed(Generic[_T]):
    """What comes, one after the other, until it is closed: an async iterator, and a context that closes it.

    Entering the context begins it, so that what happens from then on is in it; without one, the first ``await`` does.
    """

    def __init__(self, source: AsyncGenerator[_T | None, None]) -> None:
        self._source = source
        self._begun = False

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            await anext(self._source)  # the sources say once that they have begun

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        await self._begin()
        return cast("_T", await anext(self._source))  # only the first is None

    async def aclose(self) -> None:
        """Close it."""
        await self._source.aclose()


async def happened(link: Link, clock: Clock, stream: str, subject: str) -> AsyncGenerator[Happened | None, None]:
    """Yield None when it has begun, and what happens from then on."""
    made, last = await _state(link, stream)
    has_begun = False
    while True:
        session = Session(link, stream, clock)
        try:
            before, (made, newest) = made, await _state(link, stream)
            # Of a stream that was made anew everything is new; another may have lost its end with a server's disk.
            last = min(last, newest) if made == before else 0
            await session.begin(subject, {"deliver_policy": "by_start_sequence", "opt_start_seq": last + 1})
            if not has_begun:
                has_begun = True
                yield None
            while True:
                message = await session.next()
                if message is not None:
                    last = message.sequence
                    yield Happened(message.subject, message.data, message.created)
        except (GapError, ServerLostError):
            await asyncio.sleep(_PAUSE_S)
        finally:
            await session.end()


async def _state(link: Link, stream: str) -> tuple[str, int]:
    """Return when *stream* was made, and the number of its newest message."""
    try:
        answer = await link.api(f"STREAM.INFO.{stream}", {}, asked=f"look at {stream}")
    except ApiError as error:
        if error.is_missing:
            raise missing(stream) from None
        raise
    return str(answer["created"]), int(answer["state"]["last_seq"])
