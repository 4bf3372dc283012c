"""The connection to the NATS server of many hosts."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, Self

from qmpvcpu.bus.address import ServerAddress
from qmpvcpu.bus.bucket import Bucket
from qmpvcpu.bus.clock import NS, Clock
from qmpvcpu.bus.feed import Feed, GapError, Happened, Session, happened
from qmpvcpu.bus.link import CALL_S, DEFAULT_INBOX, ApiError, CutError, Link, NobodyError, missing, shown
from qmpvcpu.bus.service import Endpoint, serving
from qmpvcpu.errors import HostFailedError, HostSilentError, ServerLostError, UnfitServerError
from qmpvcpu.model.hosts import CAMPAIGNS, EVENTS, LEASES, STATES, WISHES

_OURS: Final = "qmpvcpu: "
_DESCRIPTIONS: Final = {
    WISHES: f"{_OURS}what VMs are to have",
    STATES: f"{_OURS}what VMs have",
    LEASES: f"{_OURS}who is alive",
    CAMPAIGNS: f"{_OURS}campaigns",
    EVENTS: f"{_OURS}what happened",
}
_EVENTS_AGE_S: Final = 7 * 86400
_EVENTS_BYTES: Final = 256 * 1024 * 1024
_DUPLICATES_S: Final = 120.0
_NAME_IN_USE: Final = 10058
_NO_PEERS: Final = 10005  # no suitable peers for placement
_PAUSE_S: Final = 0.2


class Bus:
    """A connection to the server, which opens itself again. ``async with await Bus.connect(...) as bus``."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._clock = Clock()

    @classmethod
    async def connect(
        cls,
        address: ServerAddress,
        *,
        name: str,
        inbox: str = DEFAULT_INBOX,
        timeout: float = 5.0,
        on_lost: Callable[[], None] | None = None,
        on_back: Callable[[], None] | None = None,
    ) -> "Bus":
        """Connect to one of the servers; each is tried once.

        Args:
            address: The servers.
            name: The connection's name, which the server's administrator sees.
            inbox: The subject below which answers arrive. If the server has permissions for each user, it must be
                ``host_inbox`` or ``client_inbox`` of ``qmpvcpu.model.hosts``: a user may listen nowhere else.
            timeout: Seconds that it may take.
            on_lost: Called when the connection is lost; it reopens by itself.
            on_back: Called when it is open again.

        Raises:
            ServerConnectError: No server lets us in.
            UnfitServerError: nats-py is not installed.
        """
        return cls(await Link(address, name, inbox, on_lost, on_back).open(timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()

    # --- what it is connected to

    @property
    def server_name(self) -> str:
        """What the server calls itself."""
        return self._link.server_name

    @property
    def server_version(self) -> str:
        """The server's version, such as ``2.15.1``."""
        return self._link.server_version

    @property
    def in_cluster(self) -> bool:
        """True if it is one server of a cluster."""
        return self._link.in_cluster

    @property
    def most_bytes(self) -> int:
        """The longest message that it takes, in bytes."""
        return self._link.most_bytes

    @property
    def is_connected(self) -> bool:
        """True while there is a connection."""
        return self._link.is_connected

    async def wait_connected(self) -> None:
        """Wait until there is a connection."""
        await self._link.wait_connected()

    def now(self) -> float:
        """Return the server's time, in seconds since 1970; this host's, until ``sync_clock`` or a watch has asked."""
        return self._clock.now()

    async def sync_clock(self) -> None:
        """Ask the server for its time.

        Raises:
            ServerLostError, ServerForbiddenError, UnfitServerError: As of ``Bucket.get``.
        """
        session = Session(self._link, f"KV_{LEASES}", self._clock)
        try:
            await session.begin(f"$KV.{LEASES}.clock", {"deliver_policy": "new"})
        except GapError as error:
            raise ServerLostError("ask for the time", str(error), maybe_done=False) from None
        finally:
            await session.end()

    # --- buckets and the stream

    async def bucket(self, name: str) -> Bucket:
        """Return the bucket *name*.

        Raises:
            UnfitServerError: It is missing, or somebody else's.
            ServerLostError, ServerForbiddenError: As of ``Bucket.get``.
        """
        stream = f"KV_{name}"
        config = await self._config(stream)
        if config is None:
            raise missing(stream)
        return Bucket(self._link, self._clock, name, config.get("max_age", 0) / NS or None)

    async def _config(self, stream: str) -> dict[str, Any] | None:
        """Return how *stream* is configured; None: it is not there."""
        try:
            answer = await self._link.api(f"STREAM.INFO.{stream}", {}, asked=f"look at {shown(stream)}")
        except ApiError as error:
            if error.is_missing:
                return None
            raise
        config: dict[str, Any] = answer["config"]
        if not str(config.get("description", "")).startswith(_OURS):
            raise UnfitServerError(
                shown(stream),
                "somebody else made it",
                "use an account of its own for hosts, or delete it if nobody needs it",
            )
        return config

    async def prepare(self, *, replicas: int | None = None, lease_s: float = 15.0, timeout: float = 30.0) -> None:
        """Make the buckets and the stream that are missing; existing ones are kept.

        Args:
            replicas: How many servers keep each; existing ones are changed to it. None: as they are, and 1 on a
                single server.
            lease_s: After how many seconds a silent host counts as gone.
            timeout: Seconds that it may take: a cluster that has just been started has no leader yet.

        Raises:
            UnfitServerError: It is a cluster, and *replicas* was not given; or something of that name is somebody
                else's; or there is no JetStream.
            ServerLostError, ServerForbiddenError: As of ``Bucket.get``.
        """
        deadline = time.monotonic() + timeout
        if replicas is not None and replicas > 1 and not self.in_cluster:
            raise UnfitServerError(
                self.server_name, f"it is no cluster, so it cannot have {replicas} replicas", "leave them out"
            )
        for stream, wanted in _streams(lease_s).items():
            there = await self._config(stream)
            if there is None:
                if replicas is None and self.in_cluster:
                    raise UnfitServerError(
                        shown(stream),
                        "it is not there, and this is a cluster",
                        "run 'qmpvcpu hosts init --replicas 3'",
                    )
                # Of one that is made anew after it was deleted, revisions are later than all that anybody remembers.
                first = {"first_seq": time.time_ns() // 1_000_000, "num_replicas": replicas or 1}
                await self._make("CREATE", stream, wanted | first, deadline)
            elif replicas is not None and there.get("num_replicas") != replicas:
                await self._make("UPDATE", stream, there | {"num_replicas": replicas}, deadline)

    async def _make(self, verb: str, stream: str, config: dict[str, Any], deadline: float) -> None:
        while True:
            left = max(1.0, deadline - time.monotonic())
            try:
                await self._link.api(f"STREAM.{verb}.{stream}", config, asked=f"make {shown(stream)}", timeout=left)
            except ApiError as error:
                if error.number == _NAME_IN_USE and await self._config(stream) is not None:
                    return  # another one made it meanwhile
                if error.number != _NO_PEERS or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(_PAUSE_S)  # the servers of a cluster find each other one by one
            else:
                return

    # --- messages

    async def request(self, subject: str, data: bytes, timeout: float) -> bytes:
        """Ask the agent that answers to *subject*.

        Raises:
            HostSilentError: There is none, or it does not answer in *timeout* seconds.
            HostFailedError: It failed.
            ServerForbiddenError: The server does not let this user ask it.
            ServerLostError: There is no connection.
            TooLongError: The question is longer than the server takes.
        """
        deadline = time.monotonic() + timeout
        asked = f"ask {subject}"
        try:
            async with asyncio.timeout(timeout):
                await self.wait_connected()
            left = max(0.0, deadline - time.monotonic())
            answer = await self._link.ask(subject, data, timeout=left, asked=asked)
        except TimeoutError:
            raise ServerLostError(asked, "there is no connection", maybe_done=False) from None
        except NobodyError:
            raise HostSilentError(subject) from None
        except CutError as error:
            if self.is_connected:
                raise HostSilentError(subject, timeout) from None
            raise ServerLostError(asked, str(error), maybe_done=error.sent) from None
        headers = answer.headers or {}
        if "Nats-Service-Error" in headers:
            raise HostFailedError(subject, headers["Nats-Service-Error"])
        return answer.data

    async def publish(
        self, subject: str, data: bytes, *, message: str | None = None, timeout: float = CALL_S
    ) -> None:
        """Write *data* to the stream of events, and wait until the server has it.

        Args:
            subject: Its subject.
            data: The event.
            message: A unique id: if it is published again within two minutes, the server keeps it once.
            timeout: Seconds that it may take.

        Raises:
            ServerLostError, ServerForbiddenError, UnfitServerError, TooLongError: As of ``Bucket.put``.
        """
        headers = {"Nats-Msg-Id": message or self._link.unique()}
        await self._link.insist(subject, data, asked=f"publish {subject}", timeout=timeout, headers=headers)

    def serve(
        self,
        name: str,
        version: str,
        description: str,
        metadata: Mapping[str, str],
        endpoints: Mapping[str, Endpoint],
    ) -> AbstractAsyncContextManager[None]:
        """Answer requests while the context lasts, as a micro service of NATS.

        Args:
            name: Letters, digits, ``_`` and ``-``.
            version: As of semver.org.
            description: For people.
            metadata: For programs.
            endpoints: What is answered, by name.

        Raises:
            ServerForbiddenError: On entering: the server does not let this user answer one of them.
            ServerLostError: On entering: there is no connection.
        """
        return serving(
            self._link, name=name, version=version, description=description, metadata=metadata, endpoints=endpoints
        )

    def follow(self, subject: str) -> Feed[Happened]:
        """Return the events that match *subject*, from now on.

        It never ends by itself. After a lost connection it continues where it was, and misses nothing that the server
        still has.

        Raises:
            ServerForbiddenError: The server does not let this user read it.
            UnfitServerError: There is no such stream.
            ServerLostError: On entering: the server does not answer.
        """
        return Feed(happened(self._link, self._clock, EVENTS, subject))


def _streams(lease_s: float) -> dict[str, dict[str, Any]]:
    """Return how the buckets and the stream are configured, by the name of their stream."""
    ages = {WISHES: 0.0, STATES: 0.0, LEASES: lease_s, CAMPAIGNS: 0.0}
    streams: dict[str, dict[str, Any]] = {}
    for bucket, age in ages.items():
        streams[f"KV_{bucket}"] = {
            "name": f"KV_{bucket}",
            "description": _DESCRIPTIONS[bucket],
            "subjects": [f"$KV.{bucket}.>"],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "max_msgs_per_subject": 1,
            "max_age": int(age * NS),
            "max_bytes": -1,
            "max_msgs": -1,
            "max_consumers": -1,
            "duplicate_window": int(min(age or _DUPLICATES_S, _DUPLICATES_S) * NS),
            "allow_direct": True,
            "allow_rollup_hdrs": False,  # or whoever may write one key could remove all others
            "deny_delete": True,
        }
    streams[EVENTS] = {
        "name": EVENTS,
        "description": _DESCRIPTIONS[EVENTS],
        "subjects": ["qmpvcpu.event.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_age": _EVENTS_AGE_S * NS,
        "max_bytes": _EVENTS_BYTES,
        "max_msgs": -1,
        "max_consumers": -1,
        "duplicate_window": int(_DUPLICATES_S * NS),
    }
    return streams
