"""What an agent tells everybody: the states of its VMs, what happens to them, and who asked for what."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple
from uuid import uuid4

from qmpvcpu.bus import Bucket, Bus
from qmpvcpu.documents.events import event_json
from qmpvcpu.documents.form import document
from qmpvcpu.errors import HostsError, ServerLostError, TooLongError, printable
from qmpvcpu.fleet import Answered, Asked, VmResult
from qmpvcpu.model.hosts import VmKey, event_subject
from qmpvcpu.model.wish import Answer, Wish

_log = logging.getLogger("qmpvcpu.hosts")

# The state of a VM that changes again and again is told so often; one that somebody waits for at once.
_APART_S: Final = 0.2
_AGAIN_S: Final = 1.0
_MOST_EVENTS: Final = 10_000
_MOST_AUDIT: Final = 100_000


class _Told(NamedTuple):
    """What is to be published: of which VM, where, and under an id that lets the server drop a repetition."""

    vm: VmKey
    subject: str
    content: bytes
    id: str


class StateBoard:
    """Keeps the states of a host's VMs in their bucket: the newest of each, whatever happens to the connection.

    Args:
        bus: The server.
        host: The host.
        compose: Returns the state of the VM of a name now; None: there is none, and its key is deleted.
        outbox: What came of a wish is in the stream before a state says so: after that nobody would tell it again.
    """

    def __init__(
        self, bus: Bus, host: str, compose: Callable[[str], dict[str, Any] | None], outbox: "Outbox"
    ) -> None:
        self._bus = bus
        self._host = host
        self._compose = compose
        self._outbox = outbox
        self._due: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._news = asyncio.Event()
        self._untold: set[str] = set()
        self._progress = asyncio.Condition()

    def changed(self, vm: str, *, urgent: bool) -> None:
        """Note that there is something new to tell of *vm*; *urgent*: somebody waits for it."""
        now = asyncio.get_running_loop().time()
        due = now if urgent else max(now, self._told.get(vm, 0.0) + _APART_S)
        self._due[vm] = min(due, self._due.get(vm, due))
        self._news.set()
        self._untold.add(vm)

    async def told(self, vm: str | None = None) -> None:
        """Wait until everything is told of *vm*; None: of all."""
        async with self._progress:
            await self._progress.wait_for(lambda: not self._untold if vm is None else vm not in self._untold)

    async def run(self, states: Bucket) -> None:
        """Tell what is new in the bucket of *states*, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            for vm in [vm for vm, due in self._due.items() if due <= now]:
                self._told[vm] = now
                del self._due[vm]
                await self._tell(vm, states)
                async with self._progress:
                    self._untold &= self._due.keys()
                    self._progress.notify_all()
            self._news.clear()
            left = min(self._due.values(), default=None)
            try:
                async with asyncio.timeout(None if left is None else max(left - loop.time(), 0.0)):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _tell(self, vm: str, states: Bucket) -> None:
        key = VmKey(self._host, vm).key
        try:
            await self._outbox.audited()
            state = self._compose(vm)
            if state is None:
                self._told.pop(vm, None)
                await states.delete(key)
                return
            try:
                await states.put(key, json.dumps(state).encode())
            except TooLongError as error:
                await states.put(key, json.dumps(_in_short(state, error)).encode())
        except TooLongError as error:  # nor does the server take it later
            _log.warning("the state of %s cannot be told: %s", printable(vm), error)
        except HostsError as error:
            _log.warning("the state of %s cannot be told: %s", vm, error)
            self._due.setdefault(vm, asyncio.get_running_loop().time() + _AGAIN_S)
            await self._bus.wait_connected()


def _in_short(state: dict[str, Any], error: TooLongError) -> dict[str, Any]:
    """Return *state* without what makes it too long: why, and what came of the wish."""
    known: VmResult[None] = VmResult(state["address"], state["name"], None, None, error, 0.0)
    return known.to_json(whole=True) | {
        name: state[name] for name in ("host", "time", "answer", "wanted", "drift", "deleted")
    }


class Outbox:
    """What happened and who asked for what, on its way into the stream, in order.

    While the server is away it is kept; if that takes so long that too much comes together, the oldest events are
    given up, and how many is told. Who asked for what, and what came of it, is kept longest.

    Args:
        bus: The server.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._events: deque[_Told] = deque()
        self._audit: deque[_Told] = deque(maxlen=_MOST_AUDIT)
        self._missed: dict[VmKey, int] = {}
        self._news = asyncio.Event()
        self._audited = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def happened(self, vm: VmKey, kind: str, said: dict[str, Any]) -> None:
        """Tell that *kind* happened to *vm*."""
        if len(self._events) >= _MOST_EVENTS:
            lost = self._events.popleft()
            self._missed[lost.vm] = self._missed.get(lost.vm, 0) + 1
        self._put(self._events, vm, {"event": kind, **said})

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

    def _put(self, among: "deque[_Told]", vm: VmKey, said: dict[str, Any], *, once: str = "") -> None:
        """Have it published; what two agents tell *once* is there once, if they do it within two minutes."""
        content = document(time=round(self._bus.now(), 3), host=vm.host, vm=vm.vm, **said)
        among.append(_Told(vm, event_subject(vm, said["event"]), json.dumps(content).encode(), once or uuid4().hex))
        self._news.set()
        self._idle.clear()

    async def audited(self) -> None:
        """Wait until it is told who asked for what, and what came of it."""
        while self._audit:
            self._audited.clear()
            await self._audited.wait()

    async def told(self) -> None:
        """Wait until everything is told."""
        await self._idle.wait()

    async def run(self) -> None:
        """Publish what there is, until it is cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while (among := self._audit or self._events) or self._missed:
                if among:
                    await self._publish(among)
                else:
                    vm, count = self._missed.popitem()
                    self._put(self._events, vm, {"event": "Missed", "count": count})
            self._idle.set()

    async def _publish(self, among: "deque[_Told]") -> None:
        """Publish the first of *among*, which stays there until the server has it."""
        first = among[0]
        try:
            await self._bus.publish(first.subject, first.content, message=first.id)
        except ServerLostError:
            await self._bus.wait_connected()
            return
        except HostsError as error:
            _log.warning("what happened to %s cannot be told: %s", first.vm, error)
        if among and among[0] is first:
            among.popleft()
        if not self._audit:
            self._audited.set()
