"""A peer that says anything at all, against the real attach, refresh, plug, unplug, set_map and reconnecting.

What must hold whatever it says: only our own errors reach callers, nothing fails in the background, no vCPU leaves or
comes without a word that it did, memory stays bounded, and once the peer is honest the layout is the truth.
``QMPVCPU_FUZZ_MESSAGES=200000 pytest tests/controller/test_fuzz.py`` has it talk longer.
"""

import asyncio
import contextlib
import gc
import logging
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import MonitorLostError, OnFailure, QmpVcpuError, VcpuController, VcpuMap
from qmpvcpu.events import VcpuUnplugged
from qmpvcpu.testing.directory import vm_directory
from tests.controller.fuzz_peer import BOOT, KEPT, NEVER, SLOTS, HostilePeer
from tests.peer.conftest import sockets
from tests.waiting import until

MESSAGES = int(os.environ.get("QMPVCPU_FUZZ_MESSAGES", "12000"))
SEED = int(os.environ.get("QMPVCPU_FUZZ_SEED", "1"))
A_SESSION = 600  # messages
GROWTH_KIB = 48 * 1024  # of this process, from the first sessions to the last
PATIENCE = 0.3  # seconds for a reply: many never come


class Faults(logging.Handler):
    """What must not happen, as it is reported to nobody in particular."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None or record.levelno >= logging.ERROR:
            self.seen.append(self.format(record))

    def report(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """As the loop's exception handler."""
        self.seen.append(f"{context.get('message')}: {context.get('exception')!r} {context.get('task')}")


@pytest.fixture
async def faults() -> AsyncIterator[Faults]:
    found = Faults()
    logger = logging.getLogger("qmpvcpu")
    asyncio.get_running_loop().set_exception_handler(found.report)
    logger.addHandler(found)
    yield found
    logger.removeHandler(found)


class Callers:
    """Users of one VM, who want this and that, and give up."""

    def __init__(self, vm: VcpuController, dice: random.Random) -> None:
        self._vm = vm
        self._random = dice
        self.claims = dict.fromkeys(range(SLOTS), 0)

    async def listen(self) -> None:
        """Count what is said to have left."""
        async for event in self._vm.events():
            if isinstance(event, VcpuUnplugged):
                for each in event.ids:
                    self.claims[each] += 1

    async def work(self) -> None:
        """Do one thing after the other; only our own errors come back."""
        while True:
            call = self._random.choice(self._calls())()
            try:
                async with asyncio.timeout(self._random.choice((None, 0.02, 1))):
                    await call
            except (QmpVcpuError, TimeoutError):
                await asyncio.sleep(0)
            assert KEPT in self._vm.layout.enabled
            assert NEVER not in self._vm.layout.enabled

    def _calls(self) -> list[Callable[[], Coroutine[Any, Any, object]]]:
        vm, vcpu, limit = self._vm, self._random.randrange(SLOTS), self._random.choice((0, 0.01, 0.05))
        wanted = VcpuMap({0} | {each for each in range(SLOTS) if self._random.random() < 0.5})
        policy = self._random.choice(list(OnFailure))

        async def request() -> object:
            return await (await vm.request_unplug(vcpu)).wait(limit)

        async def keep() -> object:
            with pytest.raises(QmpVcpuError):
                await vm.unplug(KEPT, timeout=limit)
            return None

        return [
            vm.refresh,
            vm.guest_answers,
            request,
            keep,
            lambda: vm.plug(vcpu, timeout=limit),
            lambda: vm.unplug(vcpu, timeout=limit),
            lambda: vm.set_state(vcpu, enabled=bool(vcpu % 2), timeout=limit),
            lambda: vm.set_map(wanted, on_failure=policy, timeout=limit, total_timeout=0.3),
            lambda: vm.set_count(1 + vcpu, on_failure=policy, timeout=limit, total_timeout=0.3),
            lambda: vm.wait_for(lambda layout: vcpu in layout.free, timeout=limit),
            lambda: vm.wait_settled(timeout=limit),
            vm.cancel,
        ]


async def one_session(peer: HostilePeer, dice: random.Random, folder: Path) -> None:
    """Attach, be told *A_SESSION* messages, then the truth."""
    reconnects = dice.random() < 0.7
    record = folder / "vm.xml" if dice.random() < 0.3 else None
    peer.hostility = dice.choice((0.0, 0.1, 0.3, 0.6))
    goal = peer.sent + A_SESSION
    shown = dict(peer.shown_gone)
    try:
        vm = await qmpvcpu.attach(
            peer.path, reply_timeout=PATIENCE, reconnect=reconnects, record=record, resync_interval=0.02
        )
    except QmpVcpuError:
        return
    callers = Callers(vm, dice)
    tasks = [asyncio.create_task(work) for work in (callers.listen(), *(callers.work() for _ in range(3)))]
    try:
        while peer.sent < goal and not vm._engine.closed:
            await a_moment(peer, dice)
            for task in tasks[1:]:
                if task.done():
                    task.result()
    finally:
        peer.hostility = 0.0
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks[1:])
        if not vm._engine.closed:
            await expect_truth(peer, vm, reconnects=reconnects)
        await vm.close()
        await asyncio.wait_for(tasks[0], 5)
    for each, count in callers.claims.items():
        assert count <= peer.shown_gone[each] - shown[each], each
    assert callers.claims[KEPT] == 0


async def a_moment(peer: HostilePeer, dice: random.Random) -> None:
    """Let things happen that nobody asked for."""
    for _ in range(dice.randrange(20) if peer.hostility else 0):
        peer.chatter()
    if dice.random() < 0.2:
        peer.come_and_go()
    if dice.random() < 0.02:
        peer.hang_up()
    await asyncio.sleep(0.001)


async def expect_truth(peer: HostilePeer, vm: VcpuController, *, reconnects: bool) -> None:
    """The peer is honest now: so is the layout, as soon as what was on its way has come to its end."""
    deadline = asyncio.get_running_loop().time() + 20
    shown: object = None
    while asyncio.get_running_loop().time() < deadline:
        try:
            layout = await vm.refresh()
        except MonitorLostError:
            if vm._engine.closed or not reconnects:
                return  # it was lost before, or taken for another VM
        except QmpVcpuError:  # of what was sent before the peer became honest
            await asyncio.sleep(0.01)
        else:
            shown = {slot.first: slot.qom_path for slot in layout.slots if slot.present}, layout.order
            if shown == (peer.plugged, tuple(peer.plugged)):
                return
            await asyncio.sleep(0.01)
    raise AssertionError(f"{shown} is shown, and {peer.plugged} are plugged")


def resident_kib() -> int:
    gc.collect()
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


@pytest.mark.timeout(max(300, MESSAGES // 100))
async def test_no_peer_hurts_whoever_attaches(faults: Faults) -> None:
    dice = random.Random(SEED)  # noqa: S311 - a seeded game
    before = sockets()
    early: int | None = None
    sessions = 0
    with vm_directory() as folder:
        async with HostilePeer(f"{folder}/qmp", SEED) as peer:
            while peer.sent < MESSAGES:
                sessions += 1
                async with asyncio.timeout(60):
                    await one_session(peer, dice, Path(folder))
                await until(lambda: peer.clients == 0, within=20)  # all that it connected, it has closed
                assert faults.seen == [], f"session {sessions}, seed {SEED}"
                if early is None and peer.sent > MESSAGES // 4:
                    early = resident_kib()
            growth = resident_kib() - (early or 0)
    await asyncio.sleep(0)
    gc.collect()
    assert faults.seen == []
    current = asyncio.current_task()
    assert [task for task in asyncio.all_tasks() if task is not current] == []
    with contextlib.suppress(FileNotFoundError):
        assert sockets() - before == set()
    assert growth < GROWTH_KIB
    print(f"{sessions} sessions, {peer.sent} messages, {growth} KiB more at the end")  # noqa: T201 - for a long run
    assert set(BOOT) <= set(peer.plugged)
