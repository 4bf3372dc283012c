"""What happened to an agent's VMs, and who asked for what, on its way into the stream of events."""

import asyncio
import itertools
import json
import logging
from collections import deque
from dataclasses import replace
from typing import Any, Final, NamedTuple
from uuid import uuid4

from qmpvcpu.bus import Bus
from qmpvcpu.documents.events import event_json
from qmpvcpu.documents.form import document
from qmpvcpu.errors import HostsError, ServerLostError, UnfitServerError
from qmpvcpu.fleet import Answered, Asked
from qmpvcpu.model.hosts import VmKey, event_subject
from qmpvcpu.model.wish import Answer, Wish

_log = logging.getLogger("qmpvcpu.hosts")

_MOST_EVENTS: Final = 10_000
_MOST_AUDIT: Final = 100_000
_AT_ONCE: Final = 64  # published before the server has acknowledged the first of them
_AGAIN_S: Final = 1.0
_MOMENT_S: Final = 1.0  # so long an answer waits for the stream


class _Told(NamedTuple):
    """What is to be published: where, and under an id that lets the server drop a repetition."""

    subject: str
    content: bytes
    id: str


class _Queues:
    """What is to be published, by VM; beyond *most*, a VM loses its oldest message.

    Args:
        most: How much is kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._queues: dict[VmKey, deque[_Told]] = {}  # those whose turn is next come first

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __contains__(self, vm: object) -> bool:
        return vm in self._queues

    def put(self, vm: VmKey, told: _Told) -> VmKey | None:
        """Add it; return the VM that loses its oldest message to make room, or None."""
        loser = None
        if self._count >= self._most:
            loser = vm if vm in self._queues else next(iter(self._queues))
            self._pop(loser)
        self._queues.setdefault(vm, deque()).append(told)
        self._count += 1
        return loser

    def first(self, most: int) -> list[tuple[VmKey, _Told]]:
        """Return the first of each VM, of at most so many VMs."""
        return [(vm, queue[0]) for vm, queue in itertools.islice(self._queues.items(), most)]

    def done(self, vm: VmKey, told: _Told) -> None:
        """Remove what was first of *vm*, and have other VMs come before it."""
        if vm in self._queues and self._queues[vm][0] is told:
            self._pop(vm)
        if vm in self._queues:
            self._queues[vm] = self._queues.pop(vm)

    def _pop(self, vm: VmKey) -> None:
        self._queues[vm].popleft()
        self._count -= 1
        if not self._queues[vm]:
            del self._queues[vm]


class Outbox:
    """What happened and who asked for what, on its way into the stream: of each VM in order, of many VMs at once.

    While the server or the stream is away, it is kept; if that takes so long that too much comes together, the oldest
    events are given up, and how many is told. Who asked for what, and what came of it, comes first and is kept
    longest.

    Args:
        bus: The server.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._events = _Queues(_MOST_EVENTS)
        self._audit = _Queues(_MOST_AUDIT)
        self._missed: dict[VmKey, int] = {}
        self._news = asyncio.Event()
        self._progress = asyncio.Event()
        self._is_late = False  # nobody waits for it
        self._idle = asyncio.Event()
        self._idle.set()

    def happened(self, vm: VmKey, kind: str, said: dict[str, Any]) -> None:
        """Tell that *kind* happened to *vm*."""
        if (loser := self._put(self._events, vm, {"event": kind, **said})) is not None:
            self._missed[loser] = self._missed.get(loser, 0) + 1

    def asked(self, vm: VmKey, wish: Wish, revision: int) -> None:
        """Tell that *wish* has been begun."""
        unclaimed = replace(wish, claim=None)
        asked = Asked(who=wish.who, operation="wish", why=wish.why, revision=revision, wish=unclaimed)
        self._put(self._audit, vm, event_json(asked), once=f"asked {vm.key} {revision}")

    def answered(self, vm: VmKey, answer: Answer, *, who: str) -> None:
        """Tell what came of a wish of *who*'s; "": that is not known."""
        answered = Answered(
            who=who,
            operation="wish",
            code=answer.code,
            why=answer.why,
            revision=answer.revision,
            id=answer.id,
            phase=answer.phase,
        )
        self._put(self._audit, vm, event_json(answered), once=f"answered {vm.key} {answer.revision}")

    def requested(self, vm: VmKey, operation: str, who: str, request: dict[str, Any]) -> None:
        """Tell that *who* asked for *operation*."""
        self._put(self._audit, vm, event_json(Asked(who=who, operation=operation, request=request)))

    def replied(self, vm: VmKey, operation: str, who: str, code: int, why: str) -> None:
        """Tell what came of a request: its exit code, and its error in words."""
        self._put(self._audit, vm, event_json(Answered(who=who, operation=operation, code=code, why=why)))

    def _put(self, among: _Queues, vm: VmKey, said: dict[str, Any], *, once: str = "") -> VmKey | None:
        """Have it published; what two agents tell *once* is there once, if they do it within two minutes.

        Return the VM that loses its oldest message to make room, or None.
        """
        content = document(time=round(self._bus.now(), 3), host=vm.host, vm=vm.vm, **said)
        told = _Told(event_subject(vm, said["event"]), json.dumps(content).encode(), once or uuid4().hex)
        self._news.set()
        self._idle.clear()
        return among.put(vm, told)

    async def audited(self, vm: VmKey) -> None:
        """Wait until it is told who asked for what of *vm*, and what came of it; a moment, if the stream takes it."""
        try:
            async with asyncio.timeout(_MOMENT_S):
                while vm in self._audit and not self._is_late:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            self._is_late = True
            self._progress.set()

    async def told(self) -> None:
        """Wait until everything is told."""
        await self._idle.wait()

    async def run(self) -> None:
        """Publish what there is, until it is cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._audit or self._events or self._missed:
                if not (self._audit or self._events):
                    vm, count = self._missed.popitem()
                    self._put(self._events, vm, {"event": "Missed", "count": count})
                await self._publish()
            self._idle.set()

    async def _publish(self) -> None:
        """Publish what is first of each VM, of many at once; what the server does not take now stays there."""
        audit = self._audit.first(_AT_ONCE)
        events = self._events.first(_AT_ONCE - len(audit))
        work = [self._publish_one(self._audit, *each) for each in audit]
        work += [self._publish_one(self._events, *each) for each in events]
        failures = [each for each in await asyncio.gather(*work) if each is not None]
        if failures:
            _log.warning("what happened cannot be told yet: %s", failures[0])
            await self._bus.wait_connected()
        if len(failures) == len(work):
            await asyncio.sleep(_AGAIN_S)

    async def _publish_one(self, among: _Queues, vm: VmKey, told: _Told) -> HostsError | None:
        """Publish the first of *vm*; return why it is to be tried again, or None."""
        try:
            await self._bus.publish(told.subject, told.content, message=told.id)
        except (ServerLostError, UnfitServerError) as error:  # the stream may be made anew
            return error
        except HostsError as error:
            _log.warning("what happened to %s cannot be told: %s", vm, error)
        else:
            self._is_late = False
        among.done(vm, told)
        self._progress.set()
        return None
