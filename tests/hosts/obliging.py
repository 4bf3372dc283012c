"""Hosts without VMs: their agents claim each wish and answer at once, on a real server."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from qmpvcpu.bus import Bucket, Bus, Entry
from qmpvcpu.errors import StaleError
from qmpvcpu.model.codec import from_json, to_json
from qmpvcpu.model.hosts import LEASES, STATES, WISHES, HostInfo, VmKey
from qmpvcpu.model.wish import Answer, Claim, Wish, WishPhase


class ObligingHosts:
    """What all these hosts do: claim, then answer with the code that *code_of* returns for the VM."""

    def __init__(self, bus: Bus, hosts: tuple[str, ...], code_of: Callable[[VmKey], int] = lambda _: 0) -> None:
        self.claims: Counter[VmKey] = Counter()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._bus = bus
        self._hosts = hosts
        self._code_of = code_of
        self._work: set[asyncio.Task[None]] = set()

    def has_claimed(self, count: int) -> bool:
        return self.claims.total() >= count

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["ObligingHosts"]:
        leases, wishes, states = [await self._bus.bucket(each) for each in (LEASES, WISHES, STATES)]
        for host in self._hosts:
            info = HostInfo(host, "obliging", "0", (), 0.0, 0)
            await leases.put(f"host.{host}", json.dumps(to_json(info)).encode())
        serving = asyncio.ensure_future(self._serve(wishes, states))
        try:
            yield self
        finally:
            tasks = {serving, *self._work}
            for each in tasks:
                each.cancel()
            await asyncio.wait(tasks)

    async def _serve(self, wishes: Bucket, states: Bucket) -> None:
        whose = f"{self._hosts[0]}.>" if len(self._hosts) == 1 else ">"
        async with wishes.watch(whose) as entries:
            async for entry in entries:
                if entry is not None and entry.value is not None and entry.key.partition(".")[0] in self._hosts:
                    task = asyncio.ensure_future(self._carry_out(entry, wishes, states))
                    self._work.add(task)
                    task.add_done_callback(self._work.discard)

    async def _carry_out(self, entry: Entry, wishes: Bucket, states: Bucket) -> None:
        wish = from_json(Wish, (entry.value or b"").decode())
        if wish.claim is not None:
            return
        vm = VmKey.parse(entry.key)
        claimed = replace(wish, claim=Claim(entry.revision, entry.created, "obliging", 0))
        with contextlib.suppress(StaleError):
            await wishes.update(entry.key, json.dumps(to_json(claimed)).encode(), last=entry.revision)
            self.claims[vm] += 1
            await self._answer(vm, states, Answer(entry.revision, wish.id, WishPhase.RUNNING))
            await self.may_answer.wait()
            code = self._code_of(vm)
            await self._answer(vm, states, Answer(entry.revision, wish.id, WishPhase.ENDED, code))

    async def _answer(self, vm: VmKey, states: Bucket, answer: Answer) -> None:
        row = {"address": "", "name": vm.vm, "code": answer.code, "seconds": 0.0, "error": None}
        state = {**row, "host": vm.host, "answer": to_json(answer)}
        await states.put(vm.key, json.dumps(state).encode())
