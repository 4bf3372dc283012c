"""The points between two effects of a transition: seen from outside, named, and one of them made a special one."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from qmpvcpu.engine.batch import Batch
from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.steprun import StepRun
from qmpvcpu.errors import CommandRejectedError
from qmpvcpu.host import birthplace
from qmpvcpu.host.birthplace import Birthplace
from qmpvcpu.host.threads import HostThread, put, set_affinity
from qmpvcpu.model.placement import Place
from qmpvcpu.model.transition import Direction, Intent
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Verdict
from qmpvcpu.qmp.client import TunedClient
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.record.record import Record
from qmpvcpu.vm import placing
from qmpvcpu.vm.guest import Guest
from qmpvcpu.vm.placing import Placer

INTENT_SAVED = "the intent is saved"
SAVING_TURN = "before the turn is saved"
TURN_SAVED = "the turn is saved"
OUTCOME_SAVED = "the outcome is saved"
PLACEMENT_SAVED = "the placement is saved"
_NO_CPUS = VcpuMap()


class Points:
    """Those that were crossed, by name; each name once.

    Args:
        act: Called at each point with its name, just as it is crossed.
    """

    def __init__(self, act: Callable[[str], None]) -> None:
        self.crossed: list[str] = []
        self._act = act

    def cross(self, name: str) -> None:
        """Take note of a point; one that was crossed before gets a number."""
        again = sum(each.partition(" (")[0] == name for each in self.crossed)
        named = f"{name} ({again + 1})" if again else name
        self.crossed.append(named)
        self._act(named)


def acting_at(wanted: str | None, act: Callable[[], None]) -> Callable[[str], None]:
    """What calls *act* when the point *wanted* is crossed."""

    def look(name: str) -> None:
        if name == wanted:
            act()

    return look


def _told(command: object, arguments: Mapping[str, Any] | None) -> str:
    device = (arguments or {}).get("id", "")
    return f"{command} {device}".rstrip() if isinstance(device, str) else str(command)


def _content(intent: Intent | None) -> str:
    if intent is None:
        return "outcome"
    return "intent" if intent.direction is Direction.FORWARD else "turn"


def _watch_agent(points: Points, patch: pytest.MonkeyPatch) -> None:
    set_offline, set_online = Guest.set_offline, Guest.set_online

    async def _set_offline(self: Guest, ids: Any, *, timeout: float) -> VcpuMap:
        points.cross(f"before {ids} is offline in the guest")
        done = await set_offline(self, ids, timeout=timeout)
        points.cross(f"{ids} is offline in the guest")
        return done

    async def _set_online(self: Guest, ids: Any, *, timeout: float) -> VcpuMap:
        points.cross(f"before {ids} is online in the guest")
        done = await set_online(self, ids, timeout=timeout)
        points.cross(f"{ids} is online in the guest")
        return done

    patch.setattr(Guest, "set_offline", _set_offline)
    patch.setattr(Guest, "set_online", _set_online)


def _watch_saves(points: Points, patch: pytest.MonkeyPatch, *, only_places: bool) -> None:
    write = Record.write

    async def _write(self: Record, layout: Any, *, intent: Intent | None = None, **more: Any) -> None:
        if only_places:
            points.cross(f"before {PLACEMENT_SAVED}")
            await write(self, layout, intent=intent, **more)
            points.cross(PLACEMENT_SAVED)
            return
        if intent is None and INTENT_SAVED not in points.crossed:
            await write(self, layout, intent=intent, **more)  # what the agent has listed before the plan
            return
        points.cross(f"before the {_content(intent)} is saved")
        await write(self, layout, intent=intent, **more)
        points.cross(f"the {_content(intent)} is saved")

    patch.setattr(Record, "write", _write)


def _watch_threads(points: Points, patch: pytest.MonkeyPatch, stuck: int) -> None:
    begin, restore, end = Birthplace.begin, Birthplace.restore, Birthplace.end
    placed, place = Batch.placed, Placer.place

    def _put(thread: HostThread, place: Place, *, everywhere: VcpuMap = _NO_CPUS) -> Place:
        points.cross(f"before a thread is put on {place}")
        found = put(thread, place, everywhere=everywhere)
        points.cross(f"a thread is put on {place}")
        return found

    def _set_affinity(main: HostThread, cpus: VcpuMap, *, everywhere: VcpuMap = _NO_CPUS) -> None:
        points.cross(f"before QEMU's main thread is put on host CPUs {cpus}")
        set_affinity(main, cpus, everywhere=everywhere)
        points.cross(f"QEMU's main thread is put on host CPUs {cpus}")

    def _begin(self: Birthplace, cpus: VcpuMap, *given: Any) -> None:
        begin(self, cpus, *given)
        points.cross(f"a birth on {cpus} has begun")

    def _end(self: Birthplace, *given: Any) -> None:
        end(self, *given)
        points.cross("a birth is over")

    def _restore(self: Birthplace) -> None:
        restore(self)
        points.cross("QEMU's main thread is at home")

    def _placed(self: Batch, *given: Any) -> None:
        placed(self, *given)
        points.cross("the places are taken in")

    def _place(self: Placer, slots: Any, *given: Any) -> dict[int, str]:
        told = place(self, slots, *given)
        return {first: "it is stuck" if first == stuck else why for first, why in told.items()}

    patch.setattr(birthplace, "set_affinity", _set_affinity)
    patch.setattr(birthplace, "put", _put)
    patch.setattr(placing, "put", _put)
    patch.setattr(Birthplace, "begin", _begin)
    patch.setattr(Birthplace, "end", _end)
    patch.setattr(Birthplace, "restore", _restore)
    patch.setattr(Batch, "placed", _placed)
    patch.setattr(Placer, "place", _place)


@contextmanager
def watching(points: Points, *, stuck: int = -1, only_places: bool = False) -> Iterator[None]:
    """Inside, have *points* cross every point: of commands, replies, answers of the guest, threads and saves.

    Of what the agent is asked, only where it is to change something. *stuck*: the host does not let the thread of
    this vCPU go where it has to be. *only_places*: no vCPU comes or goes, and threads are moved.
    """
    execute, send = Monitor.execute, TunedClient.write_all
    replied, answered = Batch.replied, Batch.answered

    async def _execute(self: Monitor, command: str, arguments: Any = None, **options: Any) -> Any:
        name = _told(command, arguments)
        points.cross(f"before {name}")
        try:
            reply = await execute(self, command, arguments, **options)
        except CommandRejectedError:
            points.cross(f"{name} rejected")
            raise
        points.cross(f"{name} replied to")
        return reply

    def _send(writer: asyncio.StreamWriter, messages: Sequence[Any]) -> None:
        send(writer, messages)  # the socket has room: the kernel has all of it now
        for message in messages:
            told = _told(message.get("execute"), message.get("arguments"))
            if not told.startswith("guest-") or told == "guest-set-vcpus":
                points.cross(f"{told} handed over")

    def _replied(self: Batch, run: StepRun, verdict: Verdict | None, now: float) -> None:
        replied(self, run, verdict, now)
        points.cross(f"reply to {run.step} taken in")

    def _answered(self: Batch, removal: Removal, now: float) -> None:
        answered(self, removal, now)
        points.cross(f"answer for vCPU {removal.ids} taken in")

    with pytest.MonkeyPatch.context() as patch:
        _watch_agent(points, patch)
        _watch_threads(points, patch, stuck)
        patch.setattr(Monitor, "execute", _execute)
        patch.setattr(TunedClient, "write_all", staticmethod(_send))
        patch.setattr(Batch, "replied", _replied)
        patch.setattr(Batch, "answered", _answered)
        _watch_saves(points, patch, only_places=only_places)
        yield
