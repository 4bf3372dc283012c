"""The steps of a batch that are out: sent and not replied to, or accepted and not answered."""

from collections import deque

from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.steprun import StepRun, StepStage
from qmpvcpu.model.transition import Action
from qmpvcpu.model.verdicts import Pending


class InFlight:
    """Everything that is waited for, each found in constant time.

    Replies share one timeout and answers another, so both are sorted by deadline.

    Attributes:
        unsure: Steps whose command was in flight when the connection was lost.
    """

    def __init__(self) -> None:
        self.unsure: list[StepRun] = []
        self._sent: dict[StepRun, None] = {}  # oldest first
        self._awaited: dict[StepRun, None] = {}
        self._due: deque[tuple[float, StepRun]] = deque()  # one that waited before stands twice
        self._plugs: dict[StepRun, None] = {}
        self._unplugs: dict[StepRun, None] = {}
        self._by_removal: dict[Removal, StepRun] = {}
        self._present: dict[int, StepRun] = {}  # plugs that the guest is to acknowledge, by the slot's first vCPU id
        self._touched: dict[StepRun, None] = {}

    def __bool__(self) -> bool:
        return bool(self._sent or self._awaited or self.unsure)

    @property
    def sent(self) -> tuple[StepRun, ...]:
        """Steps without a reply of QEMU's, oldest first."""
        return tuple(self._sent)

    @property
    def awaited(self) -> tuple[StepRun, ...]:
        """Steps without an answer of the guest's."""
        return tuple(self._awaited)

    def touch(self, first: int) -> bool:
        """Note that something new is known of the slot of vCPU *first*; return whether a plug waits there."""
        run = self._present.get(first)
        if run is not None:
            self._touched[run] = None
        return run is not None

    def take_touched(self) -> list[StepRun]:
        """Return the plugs in whose slot something new is known since the last call, or that began to wait."""
        if not self._touched:
            return []
        touched, self._touched = self._touched, {}
        return list(touched)

    @property
    def commands(self) -> int:
        """How many commands have no reply."""
        return len(self._sent)

    @property
    def plugging(self) -> bool:
        """True while a plug is out."""
        return bool(self._plugs)

    @property
    def unplugging(self) -> bool:
        """True while a removal that is to be made is out."""
        return bool(self._unplugs)

    @property
    def deadline(self) -> float | None:
        """When the first of them is no longer waited for, or earlier."""
        reply = next(iter(self._sent)).deadline if self._sent else None
        while self._due and not _waits(*self._due[0]):
            self._due.popleft()
        answer = self._due[0][0] if self._due else None
        if reply is None or answer is None:
            return answer if reply is None else reply
        return min(reply, answer)

    def watch(self, run: StepRun, removal: Removal) -> None:
        """Note that the end of *removal* is that of *run*."""
        run.removal = removal
        self._by_removal[removal] = run

    def watcher(self, removal: Removal) -> StepRun | None:
        """Return the step that awaits the end of *removal*, will when its turn comes, or did until its deadline."""
        run = self._by_removal.get(removal)
        if run is None or run.removal is not removal:
            return None
        waits = run in self._awaited or run.stage is StepStage.QUEUED or isinstance(run.verdict, Pending)
        return run if waits else None

    def send(self, run: StepRun, now: float, limit: float) -> None:
        """Note that the command of *run* is sent."""
        run.stage, run.sent_at, run.deadline = StepStage.SENT, now, now + limit
        self._sent[run] = None
        self._note(run)

    def take_reply(self, run: StepRun) -> bool:
        """Note a reply to *run*; return False if it is no longer waited for."""
        waited = run in self._sent
        self._sent.pop(run, None)
        return waited

    def wait(self, run: StepRun, stage: StepStage, deadline: float) -> None:
        """Note that *run* waits in *stage* from now on."""
        run.stage, run.deadline = stage, deadline
        self._awaited[run] = None
        self._due.append((deadline, run))
        self._note(run)
        if stage is StepStage.PRESENT:
            self._present[run.step.first] = run
            self._touched[run] = None

    def _note(self, run: StepRun) -> None:
        if run.plugs:
            self._plugs[run] = None
        elif run.step.action is Action.UNPLUG:
            self._unplugs[run] = None

    def drop(self, run: StepRun) -> None:
        """Wait for *run* no more."""
        for those in (self._sent, self._awaited, self._plugs, self._unplugs):
            those.pop(run, None)
        if self._present.get(run.step.first) is run:
            del self._present[run.step.first]

    def overdue_replies(self, now: float) -> list[StepRun]:
        """Return the steps that QEMU should have replied to by *now*."""
        return [run for run in self._sent if run.deadline is not None and now >= run.deadline]

    def take_overdue_answers(self, now: float) -> list[StepRun]:
        """Return the steps that should have been answered by *now*; each once."""
        overdue: dict[StepRun, None] = {}
        while self._due and (now >= self._due[0][0] or not _waits(*self._due[0])):
            deadline, run = self._due.popleft()
            if _waits(deadline, run):
                overdue[run] = None
        return list(overdue)


def _waits(deadline: float, run: StepRun) -> bool:
    return run.deadline == deadline and run.stage in {StepStage.PRESENT, StepStage.REQUESTED}
