"""One transition, told as a story: what happens, and what is then to be done, in words."""

from collections.abc import Iterable
from typing import Any

from qmpvcpu import Layout, OnFailure, Plugged, TransitionReport, VcpuMap, qapi
from qmpvcpu.engine.engine import Engine
from qmpvcpu.engine.removal import Evidence, Removal
from qmpvcpu.engine.transition import Phase, Transition
from qmpvcpu.engine.work import Effect, LastLook, Look, Save, Send, Terms, Work
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.numbering import ThreadReading
from qmpvcpu.model.ost import OstAnswer
from qmpvcpu.model.report import StepReport
from qmpvcpu.model.transition import Direction, Intent
from qmpvcpu.model.verdicts import Pending, Rejected, Verdict
from qmpvcpu.model.vm import VmInfo, VmStatus
from qmpvcpu.planning.plan import plan_map

__all__ = ["RUNNING", "Story", "make_engine", "path", "read_slots", "story"]

BOOT = "/machine/unattached/device[0]"
RUNNING = VmStatus("running")


def path(vcpu: int) -> str:
    return f"/machine/peripheral/vcpu{vcpu}" if vcpu else BOOT


def read_slots(paths: dict[int, str], count: int = 8) -> tuple[Slot, ...]:
    return tuple(
        Slot(v, 1, "t", CpuProps({"core-id": v}), v, paths.get(v), (100 + v,) if v in paths else ())
        for v in range(count)
    )


def make_engine(present: str, *, vm: dict[str, Any] | None = None, **changes: Any) -> Engine:
    """Return an engine of a VM of 8 vCPUs with *present* plugged."""
    enabled = VcpuMap.parse(present)
    info = VmInfo("test", "x86_64", "q35", "kvm", (10, 0, 2), **(vm or {}))
    layout = Layout(vm=info, slots=read_slots({v: path(v) for v in enabled}), creation=tuple(enabled))
    given: dict[str, Any] = {"status": RUNNING, "single_threaded": None, "answers": {}, "now": 0.0}
    return Engine(layout, **{**given, **changes})


class Story:
    """A transition and its owner, who writes down what it is to do.

    Every method that tells something returns what is then to be done: ``save intent``, ``save reverting``,
    ``save outcome`` (nothing is left), ``save the rest`` (something is unknown), ``add 3``, ``del 3``, ``look``,
    ``look closely``. Saves succeed at once, unless ``saves_wait``; so do last looks, which are not written down,
    unless ``last_looks_wait``: then ``last look`` is, and ``see`` ends it.
    """

    def __init__(
        self,
        start: str | Engine,
        wish: str,
        *,
        intent: Intent | None = None,
        saves_wait: bool = False,
        last_looks_wait: bool = False,
        **terms: Any,
    ) -> None:
        self.engine = make_engine(start) if isinstance(start, str) else start
        self.now = 1.0
        self.saves_wait = saves_wait
        self.last_looks_wait = last_looks_wait
        self.last_looks: list[LastLook] = []
        self.sent: dict[int, Work] = {}
        plan = plan_map(self.engine.situation, VcpuMap.parse(wish))
        self.subject = Transition(plan, self.engine, Terms(**terms), self.now, intent=intent)
        self.intents: list[Intent | None] = []
        self.begun = self.go()

    def go(self) -> list[str]:
        done: list[str] = []
        self.engine.take_events()
        for removal in self.engine.take_settled():
            self.subject.answered(removal, self.now)
        while effects := self.subject.advance(self.now):
            for effect in effects:
                if isinstance(effect, LastLook) and not self.last_looks_wait:
                    self.subject.confirmed(effect, "", self.now)
                    continue
                done.append(self._do(effect))
                if isinstance(effect, Save):
                    if self.saves_wait:
                        return done
                    self.subject.saved()
        return done

    def _do(self, effect: Effect) -> str:
        match effect:
            case Save(intent=intent):
                self.intents.append(intent)
                if intent is None:
                    return "save outcome"
                if self.subject.phase.name == "FINISH":
                    return "save the rest"
                return "save reverting" if intent.direction is Direction.REVERTING else "save intent"
            case Send(work=work):
                self.sent[work.step.first] = work
                return f"{'add' if work.plugs else 'del'} {work.step.first}"
            case Look(full=full):
                return "look closely" if full else "look"
            case LastLook():
                self.last_looks.append(effect)
                return "last look"

    def see(self, *, failed: str = "") -> list[str]:
        """The last look that was to be done first is over."""
        self.subject.confirmed(self.last_looks.pop(0), failed, self.now)
        return self.go()

    # QEMU.

    def accept(self, *vcpus: int) -> list[str]:
        for vcpu in vcpus:
            work = self.sent.pop(vcpu)
            if work.plugs:
                self.engine.plug_accepted(vcpu)
                self.subject.batch.replied(work, Plugged(work.step.ids), self.now)
            else:
                self.engine.unplug_replied(self._removal(work), Evidence.ACCEPTED, self.now)
                self.subject.batch.replied(work, None, self.now)
        return self.go()

    def reject(self, vcpu: int) -> list[str]:
        work = self.sent.pop(vcpu)
        if work.plugs:
            self.engine.plug_failed(vcpu)
        else:
            self.engine.unplug_replied(self._removal(work), Evidence.REJECTION, self.now)
        self.subject.batch.replied(work, Rejected(work.step.ids, "GenericError", "no", "why"), self.now)
        return self.go()

    def read(self, present: str, *, others: Iterable[int] = (), is_the_look: bool = False) -> list[str]:
        """A read shows *present*, some of it plugged by others; it may be the look that was to be done."""
        theirs = set(others)
        paths = {v: f"/machine/peripheral/other{v}" if v in theirs else path(v) for v in VcpuMap.parse(present)}
        self.engine.observed(self.engine.read_sent(self.engine.wanted), read_slots(paths), None, self.now)
        for removal in self.engine.take_settled():
            self.subject.answered(removal, self.now)
        if is_the_look:
            self.subject.batch.looked(self.now)
        return self.go()

    def look(self, present: str, *, others: Iterable[int] = ()) -> list[str]:
        return self.read(present, others=others, is_the_look=True)

    # The guest.

    def ost(self, vcpu: int, code: int, *, source: int = 3) -> list[str]:
        self.engine.receive(qapi.OstEvent(vcpu, OstAnswer(source, code)), self.now)
        return self.go()

    def works(self, vcpu: int) -> list[str]:
        return self.ost(vcpu, 0x84)

    def refuses(self, vcpu: int) -> list[str]:
        return self.ost(vcpu, 0x82)

    def ejects(self, *vcpus: int) -> list[str]:
        done: list[str] = []
        for vcpu in vcpus:
            self.engine.receive(qapi.Deleted(self.engine.layout.slot_of(vcpu).qom_path or ""), self.now)
            done += self.go()
        return done

    # Time, the caller and the connection.

    def wait(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.go()

    def saved(self) -> list[str]:
        self.subject.saved()
        return self.go()

    def cancel(self) -> list[str]:
        self.subject.cancel(self.now)
        return self.go()

    def pause(self) -> list[str]:
        """The connection is lost, and what is in flight with it."""
        self.subject.paused()
        for vcpu, work in sorted(self.sent.items()):
            if work.plugs:
                self.engine.plug_lost(vcpu)
            else:
                self.engine.unplug_replied(self._removal(work), Evidence.LOST, self.now)
            self.subject.batch.unanswered(work, "lost", self.now)
        self.sent.clear()
        return self.go()

    def resume(self, present: str, answers: dict[int, OstAnswer] | None = None) -> list[str]:
        enabled = VcpuMap.parse(present)
        slots = read_slots({v: path(v) for v in enabled})
        threads = tuple(ThreadReading(path(v), 100 + v, v, CpuProps({})) for v in enabled)
        self.engine.resync(slots, threads, status=RUNNING, answers=answers or {}, same_instance=True, now=self.now)
        done = self.go()
        self.subject.resumed(self.now)
        return done + self.go()

    def lose(self, why: str = "gone") -> list[str]:
        self.subject.lose(why, self.now)
        return self.go()

    # What came of it.

    @staticmethod
    def _removal(work: Work) -> Removal:
        assert work.removal is not None
        return work.removal

    @property
    def phase(self) -> Phase:
        return self.subject.phase

    @property
    def report(self) -> TransitionReport:
        return self.subject.report()

    def step(self, vcpu: int) -> StepReport:
        return next(step for step in self.report.steps if vcpu in step.ids)

    def verdict(self, vcpu: int) -> Verdict | None:
        return self.step(vcpu).verdict

    @property
    def verdicts(self) -> dict[int, str]:
        """By vCPU: the verdict, and what became of undoing it."""
        said = {None: "", True: ", undone", False: ", not undone"}
        return {
            min(step.ids): (step.verdict.name if step.verdict else "not sent") + said[step.undone]
            for step in self.report.steps
        }

    @property
    def outcome(self) -> str:
        return self.report.outcome.name

    def pending(self, vcpu: int) -> Pending:
        verdict = self.verdict(vcpu)
        assert isinstance(verdict, Pending)
        return verdict


def story(
    *, on_failure: OnFailure = OnFailure.STOP, start: str = "0-1,6", wish: str = "0,2-5", **terms: Any
) -> Story:
    return Story(start, wish, on_failure=on_failure, **terms)
