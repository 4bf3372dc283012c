"""What becomes of the steps of a transition while it runs, as the VM's events tell. No I/O."""

import time
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from qmpvcpu.errors import printable
from qmpvcpu.events import (
    Event,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlugged,
    VcpuUnplugged,
)
from qmpvcpu.model.transition import Action, Step

# What is under way comes first, then what is settled, then what has not begun.
_DOING, _SETTLED, _WAITING = range(3)

_WORDS: Final[Mapping[type[Event], tuple[str, str]]] = {  # with the style in which they are shown
    VcpuPlugged: ("plugged", "green"),
    UnplugRequested: ("asked, no reaction yet", "yellow"),
    UnplugAcknowledged: ("the guest works on it", "yellow"),
    UnplugRefused: ("refused: {event.reason}", "red"),
    UnplugPending: ("no answer in time, pending", "yellow"),
    VcpuUnplugged: ("gone", "green"),
}


class Row(NamedTuple):
    """One step, as it stands.

    Attributes:
        step: Action and vCPU ids.
        words: What it does, or how it ended.
        style: How to show these.
        seconds: How long it has been under way; None: it is not.
    """

    step: str
    words: str
    style: str
    seconds: float | None


class Tally:
    """Follows *steps* by events: which are settled, one way or the other, which are undone again, what each does.

    Attributes:
        total: How many steps there are.
        undone: How many of those that were settled are undone.
    """

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps = {step.first: step for step in steps}
        self._open = {first: step.action for first, step in self._steps.items()}
        self._done: dict[int, Action] = {}
        self._words: dict[int, tuple[str, str]] = {}
        self._began: dict[int, float] = {}
        self.total = len(self._open)
        self.undone = 0

    @property
    def settled(self) -> int:
        """How many are answered."""
        return self.total - len(self._open)

    def take(self, event: Event) -> None:
        """Take one event in."""
        undone = self.undone
        match event:
            case VcpuPlugged(ids=ids):
                self._settle(min(ids), Action.PLUG)
            case VcpuUnplugged(ids=ids):
                self._settle(min(ids), Action.UNPLUG)
            case UnplugRefused(ids=ids) | UnplugPending(ids=ids):
                self._open.pop(min(ids), None)
            case UnplugRequested(ids=ids) | UnplugAcknowledged(ids=ids):
                self._began.setdefault(min(ids), time.monotonic())
            case _:
                return
        words, style = _WORDS[type(event)]
        words = printable(words.format(event=event))
        if self.undone > undone:
            words = "undone"
        elif self._done.get(min(ids)) is Action.PLUG and not isinstance(event, VcpuPlugged):
            words = f"to be undone: {words}"
        self._words[min(ids)] = words, style

    def _settle(self, first: int, action: Action) -> None:
        wanted = self._open.get(first)
        if wanted is action or (wanted is Action.KEEP and action is Action.PLUG):
            self._done[first] = self._open.pop(first)
        elif first in self._done and self._done[first] not in (action, Action.KEEP):
            del self._done[first]
            self.undone += 1

    def __str__(self) -> str:
        undone = f", {self.undone} undone" if self.undone else ""
        return f"{self.settled} of {self.total}{undone}"

    def rows(self, most: int) -> list[Row]:
        """Return what each step does, in their order; of more than *most* those that are under way first."""
        ranked = [self._row(step) for step in self._steps.values()]
        if len(ranked) > most:
            ranked.sort(key=lambda row: row[0])
        return [row for _, row in ranked[:most]]

    def _row(self, step: Step) -> tuple[int, Row]:
        first = step.first
        if first not in self._words:
            return _WAITING, Row(str(step), "waits", "dim", None)
        words, style = self._words[first]
        if first not in self._open:
            return _SETTLED, Row(str(step), words, style, None)
        began = self._began.get(first)
        return _DOING, Row(str(step), words, style, None if began is None else time.monotonic() - began)
