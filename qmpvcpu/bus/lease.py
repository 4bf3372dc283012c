"""Leases: who may do something, as long as they are alive."""

import asyncio
import contextlib
import logging
import time
from types import TracebackType
from typing import Final, Self

from qmpvcpu.bus.bucket import Bucket
from qmpvcpu.errors import HostsError, LeaseTakenError, StaleError

_LOGGER = logging.getLogger("qmpvcpu.bus")
_RELEASE_S: Final = 2.0
_LOOK_S: Final = 0.5
_LATE_S: Final = 1.0  # the server removes what has expired in rounds


class Lease:
    """A key with a single holder, which expires if it is not renewed. Use it as an async context.

    It is renewed three times in its bucket's ``ttl``, by compare-and-set. The holder stops relying on it before the
    server forgets it, so no two hold it at once. Once lost, it is not taken again by itself. Who waits for it also
    takes one that was not renewed for so long, even if the server has not forgotten it.

    Args:
        bucket: A bucket with a ``ttl``.
        key: The lease.
        value: Who the holder is, for others that want the lease.
        wait: How many seconds to wait for it while somebody else holds it: a dead holder is forgotten after ``ttl``.

    Attributes:
        lost: Set when it is no longer held.

    Raises:
        LeaseTakenError: On entering: somebody else holds it.
        ServerLostError, ServerForbiddenError, UnfitServerError: On entering, as of ``Bucket.put``.
    """

    def __init__(self, bucket: Bucket, key: str, value: bytes, *, wait: float = 0.0) -> None:
        if bucket.ttl is None:
            raise ValueError(f"bucket {bucket.name} forgets nothing, so a lease in it would be held for ever")
        self._bucket = bucket
        self._key = key
        self._value = value
        self._wait = wait
        self._ttl = bucket.ttl
        self._revision = 0
        self._renewing: asyncio.Task[None] | None = None
        self._one_write = asyncio.Lock()
        self.lost = asyncio.Event()
        self.held_until = 0.0
        """Until when it is held if it is not renewed again, in seconds of the monotonic clock."""

    async def __aenter__(self) -> Self:
        deadline = time.monotonic() + self._wait
        seen, since = 0, 0.0
        while True:
            before = time.monotonic()
            try:
                self._revision = await self._bucket.create(self._key, self._value)
            except StaleError:
                holder = await self._bucket.get(self._key)
                if holder is None:
                    continue  # it has just become free
                if holder.revision != seen:
                    seen, since = holder.revision, time.monotonic()
                elif time.monotonic() - since > self._ttl + _LATE_S:
                    # Nobody renews it, and the server, whose clock may have been set back, does not forget it.
                    with contextlib.suppress(StaleError):
                        await self._bucket.delete(self._key, seen)
                    continue
                left = deadline - time.monotonic()
                if left <= 0:
                    raise LeaseTakenError(self._key, holder.value or b"") from None
                await asyncio.sleep(min(_LOOK_S, left))
            else:
                break
        self.held_until = before + self._ttl
        self._renewing = asyncio.create_task(self._renew(), name=f"lease {self._key}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait((self._renewing,))
        if self.is_held:
            with contextlib.suppress(HostsError):  # then it is forgotten by itself
                await self._bucket.delete(self._key, self._revision, timeout=_RELEASE_S)
        self.lost.set()

    @property
    def is_held(self) -> bool:
        """True if nobody else can hold it now."""
        return not self.lost.is_set() and time.monotonic() < self.held_until

    async def update(self, value: bytes) -> None:
        """Replace what it says of the holder; this renews it too.

        Raises:
            StaleError: It is lost.
            ServerLostError, ServerForbiddenError, UnfitServerError, TooLongError: As of ``Bucket.put``.
        """
        async with self._one_write:
            await self._write(value, self._ttl / 3)

    async def _write(self, value: bytes, timeout: float) -> None:
        if not self.is_held:
            self.lost.set()
            raise StaleError(self._bucket.name, self._key, self._revision)
        before = time.monotonic()
        try:
            self._revision = await self._bucket.update(self._key, value, self._revision, timeout=timeout)
        except StaleError:
            self.lost.set()
            raise
        self._value = value
        self.held_until = before + self._ttl

    async def _renew(self) -> None:
        """Renew it in time, until it is lost."""
        while self.is_held:
            since = self.held_until - self._ttl
            await asyncio.sleep(max(0.0, min(since + self._ttl / 3, self.held_until) - time.monotonic()))
            async with self._one_write:
                left = self.held_until - time.monotonic()
                if left <= 0:
                    break
                if self.held_until - self._ttl > since:
                    continue  # it was updated meanwhile
                try:
                    async with asyncio.timeout(left):
                        await self._write(self._value, min(left, self._ttl / 3))
                except StaleError:
                    break
                except (HostsError, TimeoutError) as error:
                    _LOGGER.warning(
                        "lease %s is not renewed, and is held for %.1f s more: %s", self._key, left, error
                    )
                    await asyncio.sleep(min(_LOOK_S, max(0.0, self.held_until - time.monotonic())))
        _LOGGER.warning("lease %s is lost", self._key)
        self.lost.set()
