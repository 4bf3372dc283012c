"""Publishes the states of an agent's VMs."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any, Final

from qmpvcpu.bus import Bucket, Bus
from qmpvcpu.errors import HostsError, TooLongError, printable
from qmpvcpu.fleet import VmResult
from qmpvcpu.hosts.outbox import Outbox
from qmpvcpu.model.hosts import VmKey, token

_log = logging.getLogger("qmpvcpu.hosts")

# Pause between two states of one VM; a state that somebody is waiting for is published at once.
_APART_S: Final = 0.2
_AGAIN_S: Final = 1.0
# A watch for what hardly ever happens; of thousands of hosts the heartbeats would be most of what the server does.
_SELDOM_S: Final = 30.0


class StateBoard:
    """Keeps the newest state of each VM of a host in its bucket, also across lost connections.

    Args:
        bus: The server.
        host: The host.
        compose: Returns the current state of the VM with this name, or None if there is no such VM: its key is then
            deleted.
        outbox: Takes the audit. A wish's result goes there before its state is published, since nobody would repeat
            it afterwards. A slow stream delays the state only briefly.
    """

    def __init__(self, bus: Bus, host: str, compose: Callable[[str], dict[str, Any] | None], outbox: Outbox) -> None:
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
        """Note that *vm* has a new state; *urgent* if somebody is waiting for it."""
        now = asyncio.get_running_loop().time()
        due = now if urgent else max(now, self._told.get(vm, 0.0) + _APART_S)
        self._due[vm] = min(due, self._due.get(vm, due))
        self._news.set()
        self._untold.add(vm)

    async def told(self, vm: str | None = None) -> None:
        """Wait until the newest state of *vm* is published; None: those of all VMs."""
        async with self._progress:
            await self._progress.wait_for(lambda: not self._untold if vm is None else vm not in self._untold)

    async def run(self, states: Bucket) -> None:
        """Publish new states to the bucket *states*, until cancelled."""
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

    async def keep(self, states: Bucket) -> None:
        """Publish again what somebody else deletes from the bucket *states*, until cancelled."""
        while True:
            try:
                async with states.watch(f"{token(self._host)}.>", values=False, heartbeat_s=_SELDOM_S) as entries:
                    for vm in self._told:  # it may have been deleted in the meantime
                        self.changed(vm, urgent=False)
                    async for entry in entries:
                        if entry is not None and entry.value is None:
                            self._is_gone(entry.key)
            except HostsError as error:
                _log.warning("whether states are deleted cannot be told: %s", error)
                await asyncio.sleep(_AGAIN_S)

    def _is_gone(self, key: str) -> None:
        """Take in a deletion; it may be our own, of a VM that is gone."""
        with contextlib.suppress(ValueError):
            vm = VmKey.parse(key).vm
            if self._compose(vm) is not None:
                self.changed(vm, urgent=False)

    async def _tell(self, vm: str, states: Bucket) -> None:
        key = VmKey(self._host, vm).key
        try:
            await self._outbox.audited(VmKey(self._host, vm))
            state = self._compose(vm)
            if state is None:
                self._told.pop(vm, None)
                await states.delete(key)
                return
            try:
                await states.put(key, json.dumps(state).encode())
            except TooLongError as error:
                await states.put(key, json.dumps(_in_short(state, error)).encode())
        except TooLongError as error:  # the server will not take it later either
            _log.warning("the state of %s cannot be told: %s", printable(vm), error)
        except HostsError as error:
            _log.warning("the state of %s cannot be told: %s", vm, error)
            self._due.setdefault(vm, asyncio.get_running_loop().time() + _AGAIN_S)
            await self._bus.wait_connected()


def _in_short(state: dict[str, Any], error: TooLongError) -> dict[str, Any]:
    """Return *state* without the parts that make it too long: the reason, and the wish's result."""
    known: VmResult[None] = VmResult(state["address"], state["name"], None, None, error, 0.0)
    return known.to_json(whole=True) | {
        name: state[name] for name in ("host", "time", "answer", "wanted", "drift", "deleted")
    }
