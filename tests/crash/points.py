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
from qmpvcpu.model.transition import Direction, Intent
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Verdict
from qmpvcpu.qmp.client import TunedClient
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.record.record import Record
from qmpvcpu.vm.guest import Guest

INTENT_SAVED = "the intent is saved"
TURN_SAVED = "the turn is saved"
OUTCOME_SAVED = "the outcome is saved"


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


@contextmanager
def watching(points: Points) -> Iterator[None]:
    """Inside, have *points* cross every point: of commands, replies, answers of the guest and saves.

    Of what the agent is asked, only where it is to change something.
    """
    execute, send = Monitor.execute, TunedClient.write_all
    replied, answered, write = Batch.replied, Batch.answered, Record.write

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

    async def _write(self: Record, layout: Any, *, intent: Intent | None = None, **more: Any) -> None:
        if intent is None and INTENT_SAVED not in points.crossed:
            await write(self, layout, intent=intent, **more)  # what the agent has listed before the plan
            return
        points.cross(f"before the {_content(intent)} is saved")
        await write(self, layout, intent=intent, **more)
        points.cross(f"the {_content(intent)} is saved")

    with pytest.MonkeyPatch.context() as patch:
        _watch_agent(points, patch)
        patch.setattr(Monitor, "execute", _execute)
        patch.setattr(TunedClient, "write_all", staticmethod(_send))
        patch.setattr(Batch, "replied", _replied)
        patch.setattr(Batch, "answered", _answered)
        patch.setattr(Record, "write", _write)
        yield
