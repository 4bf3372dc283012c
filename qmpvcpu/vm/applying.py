"""Applier: carries transitions out, one at a time. The engine says what to do next; this brings it about."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from qmpvcpu.engine.batch import Batch
from qmpvcpu.engine.ledger import Read
from qmpvcpu.engine.removal import Removal
from qmpvcpu.engine.transition import Phase, Transition
from qmpvcpu.engine.work import LastLook, Look, Save, Send, Terms, Work
from qmpvcpu.errors import (
    CommandRejectedError,
    MonitorLostError,
    Outcome,
    OutcomeUnknownError,
    RecordError,
    TransitionError,
)
from qmpvcpu.model.report import ConfigOutcome, ConfigReport, TransitionOutcome, TransitionReport
from qmpvcpu.model.transition import Affect, Direction, Intent
from qmpvcpu.model.verdicts import Plugged, Unknown, verdict_of
from qmpvcpu.planning.plan import Plan, check_plan
from qmpvcpu.vm.commands import Commands
from qmpvcpu.vm.session import Session
from qmpvcpu.vm.turns import Turn, Turns

if TYPE_CHECKING:
    from qmpvcpu.vm.nextboot import Change, NextBoot, Promise


class NextBootChange(NamedTuple):
    """What follows a transition that has reached its target.

    Attributes:
        of: The next boot.
        change: What is changed in it.
    """

    of: "NextBoot"
    change: "Change"


class Applier:
    """Carries transitions out on one VM; they queue, and never overlap with each other or with single commands."""

    def __init__(self, session: Session, commands: Commands, turns: Turns) -> None:
        self._session = session
        self._commands = commands
        self._turns = turns
        self._run: _Run | None = None

    async def apply(
        self,
        make_plan: Callable[[], Plan],
        terms: Terms,
        *,
        intent: Intent | None = None,
        next_boot: "NextBootChange | None" = None,
        rebuilds: bool = False,
    ) -> TransitionReport:
        """Wait for its turn, plan, and carry the plan out.

        Cancelling drops it while it waits for its turn, and stops it at the next safe point after; whatever was sent
        is still taken in and recorded.

        Args:
            make_plan: Plans from what is known then.
            terms: How to carry it out.
            intent: What is to be recorded as under way, where it is not the plan itself.
            next_boot: The next boot, and what is to be changed in it once the plan's target is reached; or None.
            rebuilds: True if it brings back what an earlier QEMU had, which any other transition supersedes.

        Returns:
            The report, if what was wanted is reached.

        Raises:
            TransitionError: It is not.
            PlanError: It cannot be planned, on either side; nothing was sent.
            RecordError: The intent cannot be recorded, or the next boot not be read, and nothing was sent; or it is
                reached, and not recorded.
            MonitorError: The connection was lost before.
        """
        run = _Run(self._session, self._commands, terms, rebuilds=rebuilds)
        turn = self._turns.alone()
        task = self._session.start(self._carry_out(run, turn, make_plan, intent, next_boot))
        try:
            report = await asyncio.shield(task)  # JUSTIFICATION: what was sent is taken in, even if nobody asks now
        except asyncio.CancelledError:
            if run.transition is None:
                task.cancel()
                turn.withdraw()
            else:
                run.cancel()
            raise
        reverts = intent is not None and intent.direction is Direction.REVERTING
        if report.outcome is not (TransitionOutcome.REVERTED if reverts else TransitionOutcome.REACHED):
            raise TransitionError(report) from run.unwritten or run.unrecorded
        if run.unrecorded is not None:
            why = f"{run.unrecorded.why}; what was wanted is reached, and not recorded"
            raise RecordError(run.unrecorded.path, why, outcome=Outcome.CHANGED) from run.unrecorded
        return report

    async def cancel(self) -> TransitionReport | None:
        """Stop the transition that runs, at the next safe point; return its report, or None if none runs."""
        if self._run is None:
            return None
        self._run.cancel()
        return await asyncio.shield(self._run.ended)  # JUSTIFICATION: it ends for its caller too

    async def _carry_out(
        self,
        run: "_Run",
        turn: Turn,
        make_plan: Callable[[], Plan],
        intent: Intent | None,
        next_boot: "NextBootChange | None",
    ) -> TransitionReport:
        session = self._session
        async with turn, contextlib.AsyncExitStack() as stack:
            await self._look()
            if next_boot is not None:
                run.promise = await stack.enter_async_context(next_boot.of.promise())
            plan = make_plan()
            check_plan(plan, session.layout)
            if next_boot is not None and run.promise is not None:
                run.promise.make(next_boot.change)
            self._run = session.watcher = run
            try:
                with session.keeper.held():
                    return await run.carry_out(plan, intent)
            finally:
                self._run = session.watcher = None

    async def _look(self) -> None:
        """Read the VM, so that what nobody announced is found here, and not half-way."""
        session = self._session
        while True:
            await session.check_open()
            try:
                await asyncio.gather(session.read(Read.SLOTS), session.know_status())
            except MonitorLostError:
                if session.reconnect is None or session.closed:
                    raise
            else:
                return


class _Run:
    """One transition, carried out."""

    def __init__(self, session: Session, commands: Commands, terms: Terms, *, rebuilds: bool) -> None:
        self.transition: Transition | None = None
        self.ended: asyncio.Future[TransitionReport] = session.loop.create_future()
        self._session = session
        self._commands = commands
        self._terms = terms
        self._rebuilds = rebuilds
        self._wake = asyncio.Event()
        self._to_save: Save | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self.unrecorded: RecordError | None = None
        self.unwritten: RecordError | None = None
        self.promise: Promise | None = None
        self._config: ConfigReport | None = None
        self._offline_until: float | None = None

    async def carry_out(self, plan: Plan, intent: Intent | None) -> TransitionReport:
        """Carry *plan* out, which is of the layout as it is now."""
        transition = Transition(plan, self._session.engine, self._terms, self._session.loop.time(), intent=intent)
        self.transition = transition
        try:
            while not transition.ended:
                self._wake.clear()
                self._go_on()
                if self._to_save is not None:
                    save, self._to_save = self._to_save, None
                    await self._save(transition, save.intent)
                    transition.saved()
                elif not transition.ended:
                    await self._sleep(transition)
        finally:
            self._silence()
            if not self.ended.done():
                self.ended.set_result(self._report(transition))
        return self.ended.result()

    def _report(self, transition: Transition) -> TransitionReport:
        report = transition.report(unrecorded="" if self.unrecorded is None else str(self.unrecorded))
        if self.promise is None:
            return report
        config = self._config or self.promise.not_tried()
        failed = config.outcome is ConfigOutcome.FAILED
        outcome = TransitionOutcome.PARTIAL if failed else report.outcome
        return replace(report, affect=Affect.BOTH, config=config, outcome=outcome)

    def cancel(self) -> None:
        """Stop at the next safe point."""
        if self.transition is not None:
            self.transition.cancel(self._session.loop.time())
            self._go_on()

    # News, from the session.

    def on_news(self, settled: Sequence[Removal]) -> None:
        """Take in that something changed, and which removals became final."""
        if self.transition is not None and (settled or self.transition.batch.looks_at_layout):
            for removal in settled:
                self.transition.answered(removal, self._session.loop.time())
            self._go_on()

    def on_lost(self, why: str, *, may_return: bool) -> None:
        """Take in that the connection is lost."""
        if self.transition is None:
            return
        now = self._session.loop.time()
        if may_return:
            self.transition.paused()
            self._offline_until = now + max(self._terms.timeout, self._terms.reply_timeout)
        else:
            self._lose(self.transition, why)
        self._go_on()

    def on_return(self, *, same_instance: bool) -> None:
        """Take in that the connection is back, and the engine has read the VM again."""
        if self.transition is None:
            return
        self._offline_until = None
        if same_instance:
            self.transition.resumed(self._session.loop.time())
        else:
            self._lose(self.transition, "another QEMU runs this VM now")
        self._go_on()

    def _lose(self, transition: Transition, why: str) -> None:
        transition.lose(why, self._session.loop.time())
        self._session.keeper.abandon()

    # Effects.

    async def _sleep(self, transition: Transition) -> None:
        """Wait for news, or for the next deadline."""
        now = self._session.loop.time()
        if self._offline_until is not None and now >= self._offline_until:
            self._lose(transition, "the connection is lost, and did not come back in time")
            return
        self._set_alarm(transition)
        await self._wake.wait()

    def _set_alarm(self, transition: Transition) -> None:
        """Have the next deadline wake ``carry_out``.

        An alarm that rings early does no harm; deadlines of replies only ever move away, so one is set once.
        """
        deadline = transition.deadline
        if self._offline_until is not None:
            deadline = self._offline_until if deadline is None else min(deadline, self._offline_until)
        if deadline is not None and (self._alarm is None or deadline < self._alarm.when()):
            self._silence()
            self._alarm = self._session.loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._wake.set()

    def _silence(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _go_on(self) -> None:
        """Bring about what is to be done now, in the same step as the news that led to it: commands follow closely.

        A save is for ``carry_out``; until it is over there is nothing else to be done.
        """
        transition = self.transition
        if transition is None:
            return
        for effect in transition.advance(self._session.loop.time()):
            match effect:
                case Save():
                    self._to_save = effect
                case Send(work):
                    sending = self._send(transition.batch, work)
                    if work.plugs:
                        self._session.start(sending)
                    else:
                        self._commands.start_unplug(work.step.first, sending)
                case Look():
                    self._session.start(self._look(transition.batch, Read.FULL if effect.full else Read.SLOTS))
                case LastLook():
                    self._session.start(self._last_look(transition, effect))
        if self._to_save is not None or transition.ended:
            self._wake.set()
        else:
            self._set_alarm(transition)
        if self._session.engine.has_news:  # that a deadline has passed is news too, and nobody else's to tell
            self._session.publish()

    async def _save(self, transition: Transition, intent: Intent | None) -> None:
        keeper = self._session.keeper
        try:
            if transition.phase is Phase.FINISH:
                # Before the outcome is recorded: if we die in between, the record still says what is to be written.
                if self.promise is not None and transition.report().outcome is TransitionOutcome.REACHED:
                    self._config, self.unwritten = await self.promise.try_to_keep()
                await keeper.end(intent, transition.wanted)
            elif intent is not None:
                await keeper.begin(intent, rebuilds=self._rebuilds)
        except RecordError as error:
            if transition.phase is Phase.BEGIN:
                raise
            self.unrecorded = error

    async def _send(self, batch: Batch, work: Work) -> None:
        engine, loop = self._session.engine, self._session.loop
        slot = engine.slots[work.step.first]
        started = loop.time()
        try:
            if work.path is not None:
                await self._commands.plug(slot, work.path)
                plugged = Plugged(slot.ids, seconds=round(loop.time() - started, 6))
                batch.replied(work, plugged, loop.time())
            elif work.removal is not None:
                await self._commands.unplug(slot, work.removal)
                batch.replied(work, None, loop.time())
        except OutcomeUnknownError as error:
            if isinstance(error.__cause__, MonitorLostError):
                batch.unanswered(work, str(error.__cause__), loop.time())
            else:
                batch.replied(work, Unknown(slot.ids, str(error)), loop.time())
        except CommandRejectedError as error:
            batch.replied(work, verdict_of(error), loop.time())
        self._go_on()

    async def _look(self, batch: Batch, read: Read) -> None:
        await self._session.last_look(read)
        batch.looked(self._session.loop.time())
        self._go_on()

    async def _last_look(self, transition: Transition, look: LastLook) -> None:
        failed = ""
        try:
            await self._session.read(Read.SLOTS)
        except Exception as error:  # noqa: BLE001 - JUSTIFICATION: whatever a peer says, the transition ends
            failed = str(error)
        transition.confirmed(look, failed, self._session.loop.time())
        self._go_on()
