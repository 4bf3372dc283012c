"""The core, and notes of what it does for whom."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from qmpvcpu.engine.batch import AskGuest, Batch
from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.messages import Change, GuestTold, Refresh, Wait
from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.steprun import StepRun
from qmpvcpu.engine.transition import LastLook, Phase, SaveIntent, Task, Transition
from qmpvcpu.engine.vmstate import Read
from qmpvcpu.model.layout import Slot
from qmpvcpu.model.vcpumap import VcpuMap

__all__ = ["Watched"]


class Watched(Engine):
    """The core, and notes of what it does for whom.

    Attributes:
        begun: The transition of each change that has begun, the last one if there were several.
        senders: By the number of a command: the transition and the step that it is of.
        savers: By the number of a save: the transition that it is of, and its phase.
        askers: By the number of a question to the agent: the transition and the step that it is of, but for lists.
        purposes: By the number of a look, or of a question to the agent: what it is for.
        confirmed: Transitions whose last look was taken in, since somebody cleared it.
        ended_removals: Likewise.
        superseded: Slots of transitions that were cut short, and that a map has superseded.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.begun: dict[Change, Transition] = {}
        self.senders: dict[int, tuple[Transition, StepRun]] = {}
        self.savers: dict[int, tuple[Transition, Phase]] = {}
        self.askers: dict[int, tuple[Transition, StepRun]] = {}
        self.purposes: dict[int, str] = {}
        self.confirmed: list[Transition] = []
        self.ended_removals: list[Removal] = []
        self.superseded: set[int] = set()
        self._purpose = ""

    def _advance(self, transition: Transition) -> None:
        self.begun[transition.change] = transition
        super()._advance(transition)

    def _send(self, transition: Transition, run: StepRun, batch: Batch | None = None) -> None:
        super()._send(transition, run, batch)
        self.senders[max(self._commands)] = transition, run

    def _ask_for(self, transition: Transition, ask: AskGuest) -> None:
        super()._ask_for(transition, ask)
        if ask.online is not None:
            self.askers[max(self._asks)] = transition, ask.runs[0]

    def _save_intent(self, transition: Transition, task: SaveIntent) -> None:
        if transition.is_map and task.phase is Phase.START and self.intentions.interrupted is not None:
            self.superseded |= {step.first for step in self.intentions.interrupted.steps}
        super()._save_intent(transition, task)
        if self._saves:
            self.savers[max(self._saves)] = transition, task.phase

    def _removal_changed(self, removal: Removal) -> None:
        if removal.state.is_final:
            self.ended_removals.append(removal)
        super()._removal_changed(removal)

    def _confirmed(self, transition: Transition, look: LastLook, error: Exception | None) -> None:
        if error is None:
            self.confirmed.append(transition)
        super()._confirmed(transition, look, error)

    # Looks.

    @contextlib.contextmanager
    def _for(self, purpose: str) -> Iterator[None]:
        before, self._purpose = self._purpose, purpose
        try:
            yield
        finally:
            self._purpose = before

    def _look(
        self,
        read: Read,
        then: Callable[[Exception | None], None],
        *,
        status: bool = False,
        other_paths: bool = False,
        started: tuple[Slot, ...] = (),
    ) -> int | None:
        number = super()._look(read, then, status=status, other_paths=other_paths, started=started)
        if number is not None:
            self.purposes.setdefault(number, self._purpose)
        return number

    def _do(self, transition: Transition, task: Task) -> None:
        with self._for("last" if isinstance(task, LastLook) else "again"):
            super()._do(transition, task)

    def _ask_first(self, change: Change, limit: float) -> None:
        with self._for("first"):
            super()._ask_first(change, limit)

    def _look_first(self, change: Change) -> None:
        with self._for("first"):
            super()._look_first(change)

    def _ask(self, ids: VcpuMap, *, online: bool | None, limit: float, then: Callable[[GuestTold], None]) -> None:
        super()._ask(ids, online=online, limit=limit, then=then)
        self.purposes[max(self._asks)] = self._purpose

    def _refresh(self, request: Refresh) -> None:
        with self._for("refresh"):
            super()._refresh(request)

    def _look_for(self, wait: Wait) -> None:
        with self._for("wait"):
            super()._look_for(wait)

    def _look_why(self) -> None:
        with self._for("rejection"):
            super()._look_why()

    def _read_wanted(self) -> None:
        with self._for("background"):
            super()._read_wanted()

    def _resync(self) -> None:
        with self._for("background"):
            super()._resync()
