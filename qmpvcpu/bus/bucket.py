"""Keys and values on the server, changed by compare-and-set, and watched without missing a change."""

import asyncio
import base64
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.bus.clock import Clock, seconds_of
from qmpvcpu.bus.feed import HEARTBEAT_S, Feed, GapError, Received, Session
from qmpvcpu.bus.link import CALL_S, ApiError, Link, missing
from qmpvcpu.errors import ServerLostError, StaleError

if TYPE_CHECKING:
    from collections.abc import Mapping

_KEY: Final = re.compile(r"[-/_=a-zA-Z0-9]+(\.[-/_=a-zA-Z0-9]+)*")
_FILTER: Final = re.compile(r"(([-/_=a-zA-Z0-9]+|\*)\.)*([-/_=a-zA-Z0-9]+|\*|>)")
_ID: Final = "Nats-Msg-Id"
_OPERATION: Final = "KV-Operation"
_MARKER: Final = "Nats-Marker-Reason"
_LATE_S: Final = 0.5  # the server removes what has expired in rounds
_PAUSE_S: Final = 0.2


@dataclass(frozen=True)
class Entry:
    """The value of a key.

    Attributes:
        key: The key.
        value: Its value; None: it was deleted, or has expired.
        revision: The number of this change, for compare-and-set; in a bucket it only grows.
        created: When the server wrote it, in seconds since 1970 by the server's clock.
    """

    key: str
    value: bytes | None
    revision: int
    created: float


class Bucket:
    """Keys and values. ``Bus.bucket`` returns it.

    Each call is retried until its *timeout*, through a change of leader and a lost connection. If the answer to a
    write is lost, the write is looked up, so it is done and reported once.

    Attributes:
        name: Its name.
        ttl: After how many seconds a value expires if it is not written again; None: never.
    """

    def __init__(self, link: Link, clock: Clock, name: str, ttl: float | None) -> None:
        self._link = link
        self._clock = clock
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."
        self.name = name
        self.ttl = ttl

    async def get(self, key: str, *, timeout: float = CALL_S) -> Entry | None:
        """Return what *key* has; None: nothing.

        Raises:
            ServerLostError: No answer came in time.
            ServerForbiddenError: The server does not let this user read.
            UnfitServerError: The bucket is gone.
        """
        entry = await self.last(key, timeout=timeout)
        return entry if entry is not None and entry.value is not None else None

    async def last(self, key: str, *, timeout: float = CALL_S) -> Entry | None:
        """Return the last change of *key*, which may be that it was deleted; None: there was none.

        Raises:
            ServerLostError, ServerForbiddenError, UnfitServerError: As of ``get``.
        """
        found = await self._stored(_checked_key(key), timeout)
        if found is None:
            return None
        message, headers = found
        value = None if _is_marker(headers) else base64.b64decode(message.get("data", ""))
        return Entry(key, value, int(message["seq"]), seconds_of(message["time"]))

    async def _stored(self, key: str, timeout: float) -> tuple[dict[str, Any], dict[str, str]] | None:
        """Return the last message of *key*, and its headers."""
        # The leader is asked: a replica may be behind, and who has just written must find that.
        try:
            answer = await self._link.api(
                f"STREAM.MSG.GET.{self._stream}",
                {"last_by_subj": self._prefix + key},
                asked=f"{self.name}: read {key}",
                timeout=timeout,
            )
        except ApiError as error:
            if error.is_without_stream:
                raise missing(self._stream) from None
            if error.is_missing:
                return None
            raise
        message: dict[str, Any] = answer["message"]
        lines = base64.b64decode(message.get("hdrs", "")).decode(errors="replace").split("\r\n")[1:]
        return message, {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    async def put(self, key: str, value: bytes, *, timeout: float = CALL_S) -> int:
        """Write *value*, whatever is there; return its revision.

        Raises:
            TooLongError: It is longer than the server takes.
            ServerLostError: No answer came in time; it may have been written.
            ServerForbiddenError: The server does not let this user write it.
            UnfitServerError: The bucket is gone.
        """
        return await self._write(_checked_key(key), value, None, timeout)

    async def create(self, key: str, value: bytes, *, timeout: float = CALL_S) -> int:
        """Write *value* if *key* has none; return its revision.

        Raises:
            StaleError: It has one.
            ServerLostError, ServerForbiddenError, UnfitServerError, TooLongError: As of ``put``.
        """
        try:
            return await self._write(_checked_key(key), value, 0, timeout)
        except StaleError:
            there = await self.last(key, timeout=timeout)
            if there is None or there.value is not None:
                raise
            return await self._write(key, value, there.revision, timeout)

    async def update(self, key: str, value: bytes, last: int, *, timeout: float = CALL_S) -> int:
        """Write *value* if the last revision of *key* is *last*; return the new one.

        Raises:
            StaleError: It has another one.
            ServerLostError, ServerForbiddenError, UnfitServerError, TooLongError: As of ``put``.
        """
        return await self._write(_checked_key(key), value, last, timeout)

    async def delete(self, key: str, last: int | None = None, *, timeout: float = CALL_S) -> int:
        """Delete *key*, if its last revision is *last* where that is given; return the revision of its deletion.

        Raises:
            StaleError: It has another one.
            ServerLostError, ServerForbiddenError, UnfitServerError: As of ``put``.
        """
        return await self._write(_checked_key(key), None, last, timeout)

    async def _write(self, key: str, value: bytes | None, last: int | None, timeout: float) -> int:
        unique = self._link.unique()
        headers = {_ID: unique}  # a try whose answer was lost is not written twice
        if value is None:
            headers[_OPERATION] = "DEL"
        if last is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(last)
        asked = f"{self.name}: {'delete' if value is None else 'write'} {key}"
        try:
            answer = await self._link.insist(
                self._prefix + key, value or b"", asked=asked, timeout=timeout, headers=headers
            )
        except ApiError as error:
            if not error.is_stale:
                raise
            there = await self._stored(key, timeout) if error.sent_before else None
            if there is not None and there[1].get(_ID) == unique:
                return int(there[0]["seq"])
            raise StaleError(self.name, key, last or 0) from None
        return int(answer["seq"])

    async def keys(self, filter: str = ">", *, timeout: float = CALL_S) -> list[str]:  # noqa: A002 - NATS's word
        """Return the keys that match *filter*, in the order in which they were written.

        Raises:
            ServerLostError, ServerForbiddenError, UnfitServerError: As of ``get``.
        """
        return list(await self._all(filter, timeout, headers_only=True))

    async def all(self, filter: str = ">", *, timeout: float = CALL_S) -> "dict[str, Entry]":  # noqa: A002 - as above
        """Return what each key has that matches *filter*, in the order in which they were written.

        Raises:
            ServerLostError, ServerForbiddenError, UnfitServerError: As of ``get``.
        """
        return await self._all(filter, timeout, headers_only=False)

    async def _all(self, filter: str, timeout: float, *, headers_only: bool) -> "dict[str, Entry]":  # noqa: A002
        why = "no answer"
        try:
            async with asyncio.timeout(timeout):
                while True:
                    session = Session(self._link, self._stream, self._clock)
                    try:
                        return await self._snapshot(session, _checked_filter(filter), headers_only=headers_only)
                    except GapError as error:
                        why = str(error)
                        await asyncio.sleep(_PAUSE_S)
                    finally:
                        await session.end()
        except TimeoutError:
            raise ServerLostError(f"{self.name}: read {filter}", why, maybe_done=False) from None

    async def _snapshot(self, session: Session, filter: str, *, headers_only: bool) -> "dict[str, Entry]":  # noqa: A002
        await self._begin(session, filter, headers_only=headers_only)
        found: dict[str, Entry] = {}
        left = session.pending
        while left > 0:
            message = await session.next()
            if message is None:
                break
            entry = self._entry(message)
            found.pop(entry.key, None)
            if entry.value is not None:
                found[entry.key] = entry
            left = min(left - 1, message.pending)
        return found

    async def _begin(self, session: Session, filter: str, *, headers_only: bool = False) -> None:  # noqa: A002
        await session.begin(self._prefix + filter, {"deliver_policy": "last_per_subject"}, headers_only=headers_only)

    def _entry(self, message: Received) -> Entry:
        value = None if _is_marker(message.headers) else message.data
        return Entry(message.subject.removeprefix(self._prefix), value, message.sequence, message.created)

    def watch(
        self,
        filter: str = ">",  # noqa: A002 - as above
        *,
        deleted: bool = False,
        values: bool = True,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> Feed[Entry | None]:
        """Yield the entries of the keys that match *filter*, then None, and then each change.

        It never ends by itself. After a lost connection, a lost consumer or a new leader it reads all keys again, so
        the last change of each key is never missed; earlier ones may be.

        Args:
            filter: Which keys.
            deleted: Begin with those that were deleted, too: their revisions are needed to write them by
                compare-and-set.
            values: Whether the values are sent too; if not, each that is there is b"".
            heartbeat_s: How often the server says that it is still watched for; after three times as long without a
                word the watch begins anew.

        Raises:
            ServerForbiddenError: The server does not let this user watch it.
            UnfitServerError: The bucket is gone.
        """
        return Feed(
            self._watch(
                _checked_filter(filter), _Seen(deleted=deleted), headers_only=not values, heartbeat_s=heartbeat_s
            )
        )

    async def _watch(
        self,
        filter: str,  # noqa: A002 - as above
        seen: "_Seen",
        *,
        headers_only: bool,
        heartbeat_s: float,
    ) -> AsyncGenerator[Entry | None, None]:
        while True:
            session = Session(self._link, self._stream, self._clock, heartbeat_s=heartbeat_s)
            try:
                await self._begin(session, filter, headers_only=headers_only)
                if seen.is_new:
                    yield None  # it has begun
                async for each in self._present(session, seen):
                    yield each
                if seen.is_new:
                    seen.is_new = False
                    yield None
                async for each in self._changes(session, seen):
                    yield each
            except (GapError, ServerLostError):
                await asyncio.sleep(_PAUSE_S)
            finally:
                await session.end()

    async def _present(self, session: Session, seen: "_Seen") -> AsyncGenerator[Entry, None]:
        """Yield what is there and not in *seen*, and what is gone from there."""
        present: set[str] = set()
        left = session.pending
        while left > 0:
            message = await session.next()
            if message is None:
                break
            left = min(left - 1, message.pending)
            entry = self._entry(message)
            present.add(entry.key)
            if seen.is_news(entry):
                yield entry
        for key in [key for key in seen.entries if key not in present]:
            yield self._expired(seen.entries.pop(key))

    async def _changes(self, session: Session, seen: "_Seen") -> AsyncGenerator[Entry, None]:
        """Yield what changes; ends with GapError only."""
        while True:
            message = await session.next(self._until_expiry(seen.entries))
            if message is not None and seen.is_news(entry := self._entry(message)):
                yield entry
            for each in await self._expiries(seen.entries):
                yield each

    def _expired(self, entry: Entry) -> Entry:
        return Entry(entry.key, None, entry.revision, self._clock.now())

    def _until_expiry(self, known: "Mapping[str, Entry]") -> float | None:
        """Return in how many seconds a key may have expired; None: never."""
        if self.ttl is None or not known:
            return None
        oldest = min(entry.created for entry in known.values())
        return max(_PAUSE_S, oldest + self.ttl + _LATE_S - self._clock.now())

    async def _expiries(self, known: dict[str, Entry]) -> list[Entry]:
        """Return which keys have expired: the server says nothing of it (before 2.11, and if it was not told to)."""
        if self.ttl is None:
            return []
        due = [key for key, entry in known.items() if entry.created + self.ttl + _LATE_S <= self._clock.now()]
        gone = []
        for key in due:
            there = await self.last(key)
            if there is None:
                gone.append(self._expired(known.pop(key)))
        return gone


class _Seen:
    """What a watch has told of so far."""

    def __init__(self, *, deleted: bool) -> None:
        self.entries: dict[str, Entry] = {}
        self.is_new = True
        self._deleted = deleted
        self._newest = 0

    def is_news(self, entry: Entry) -> bool:
        """Note *entry*; return whether to tell of it."""
        before = self.entries.get(entry.key)
        is_later = entry.revision > self._newest
        self._newest = max(self._newest, entry.revision)
        if entry.value is not None:
            self.entries[entry.key] = entry
            return before is None or before.revision != entry.revision
        # A watch begins with what is there. Later it tells of a deletion even if it never had the value before it.
        return self.entries.pop(entry.key, None) is not None or (is_later and (self._deleted or not self.is_new))


def _is_marker(headers: "Mapping[str, str]") -> bool:
    """Return whether a message says that its key was deleted, or has expired."""
    return _OPERATION in headers or _MARKER in headers


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key[:100]!r} is no key: it has letters, digits and -/_= in tokens with dots between")
    return key


def _checked_filter(text: str) -> str:
    if not _FILTER.fullmatch(text):
        raise ValueError(f"{text[:100]!r} matches no key: write tokens with dots between, * for one, > for the rest")
    return text
