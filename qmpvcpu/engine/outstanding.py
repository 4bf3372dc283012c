"""The work of a transition that is out: sent and not replied to, or accepted and not answered."""

from collections import deque

from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.work import Stage, Work
from qmpvcpu.model.transition import Action
from qmpvcpu.model.verdicts import Pending


class Outstanding:
    """Everything that is waited for, each found in constant time.

    One timeout holds for all replies, and one for all answers, so that both stand in the order of their deadlines.

    Attributes:
        unsure: Work whose command was in flight when the connection was lost.
    """

    def __init__(self) -> None:
        self.unsure: list[Work] = []
        self._sent: dict[int, Work] = {}  # by id(), oldest first
        self._asked: dict[int, Work] = {}
        self._due: deque[Work] = deque()
        self._plugs: dict[int, Work] = {}
        self._unplugs: dict[int, Work] = {}
        self._by_removal: dict[int, Work] = {}

    def __bool__(self) -> bool:
        return bool(self._sent or self._asked or self.unsure)

    @property
    def sent(self) -> tuple[Work, ...]:
        """Work without a reply, oldest first."""
        return tuple(self._sent.values())

    @property
    def asked(self) -> tuple[Work, ...]:
        """Work without an answer of the guest's."""
        return tuple(self._asked.values())

    @property
    def unproven(self) -> tuple[Work, ...]:
        """Plugs that QEMU accepted and the guest is to acknowledge."""
        return tuple([work for work in self._plugs.values() if work.stage is Stage.ASKED]) if self._plugs else ()

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
        """When the first of them is no longer waited for."""
        reply = next(iter(self._sent.values())).deadline if self._sent else None
        answer = self._due[0].deadline if self._due else None
        if reply is None or answer is None:
            return answer if reply is None else reply
        return min(reply, answer)

    def watch(self, work: Work, removal: Removal) -> None:
        """Note that the end of *removal* is that of *work*."""
        work.removal = removal
        self._by_removal[id(removal)] = work

    def asked_by(self, removal: Removal) -> Work | None:
        """Return the work that awaits the end of *removal*, will when its turn comes, or did until its deadline."""
        work = self._by_removal.get(id(removal))
        if work is None or work.removal is not removal:
            return None
        waits = id(work) in self._asked or work.stage is Stage.WAITING or isinstance(work.verdict, Pending)
        return work if waits else None

    def send(self, work: Work, now: float, limit: float) -> None:
        """Note that the command of *work* is sent."""
        work.stage, work.sent_at, work.deadline = Stage.SENT, now, now + limit
        self._sent[id(work)] = work
        self._note(work)

    def take_reply(self, work: Work) -> bool:
        """Note a reply to *work*; return False if it is no longer waited for."""
        return self._sent.pop(id(work), None) is not None

    def ask(self, work: Work, now: float, limit: float) -> None:
        """Note that the guest's answer to *work* is awaited from now on."""
        work.stage, work.deadline = Stage.ASKED, now + limit
        self._asked[id(work)] = work
        self._due.append(work)
        self._note(work)

    def _note(self, work: Work) -> None:
        if work.plugs:
            self._plugs[id(work)] = work
        elif work.step.action is Action.UNPLUG:
            self._unplugs[id(work)] = work

    def drop(self, work: Work) -> None:
        """Wait for *work* no more."""
        self._sent.pop(id(work), None)
        self._asked.pop(id(work), None)
        self._plugs.pop(id(work), None)
        self._unplugs.pop(id(work), None)

    def overdue_replies(self, now: float) -> list[Work]:
        """Return what QEMU should have replied to by *now*."""
        return [work for work in self._sent.values() if work.deadline is not None and now >= work.deadline]

    def take_overdue_answers(self, now: float) -> list[Work]:
        """Return what the guest should have answered by *now*; each once."""
        overdue: list[Work] = []
        while self._due and (self._due[0].stage is not Stage.ASKED or now >= (self._due[0].deadline or 0.0)):
            work = self._due.popleft()
            if work.stage is Stage.ASKED:
                overdue.append(work)
        return overdue
