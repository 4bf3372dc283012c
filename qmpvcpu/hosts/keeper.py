"""Carries out the wishes for one VM: whatever crashes, none is lost, and none is carried out twice."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, Final, NamedTuple

from qmpvcpu.bus import Bucket, Bus, Entry
from qmpvcpu.documents.failures import code_of
from qmpvcpu.documents.form import NO_ANSWER, NOT_REACHED, NOT_SENT, REACHED
from qmpvcpu.errors import HostsError, QmpVcpuError, StaleError, TransitionError
from qmpvcpu.fleet import VmResult
from qmpvcpu.hosts.hosted import HostedVm
from qmpvcpu.hosts.outbox import Outbox
from qmpvcpu.hosts.policy import AgentPolicy
from qmpvcpu.model.codec import from_json, to_bytes
from qmpvcpu.model.hosts import MOST_BYTES, Operation
from qmpvcpu.model.options import Affect, OnFailure, Recovery
from qmpvcpu.model.transition import Action, Direction, Intent, TransitionOutcome, TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import OstStatus
from qmpvcpu.model.wish import GRACE_S, Answer, Claim, Wish, WishPhase
from qmpvcpu.vm.controller import VcpuController

_log = logging.getLogger("qmpvcpu.hosts")

# Pause before a write is repeated that the server refused.
_AGAIN_S: Final = 1.0


class Duty(NamedTuple):
    """What the keepers of a host share.

    Attributes:
        bus: The server.
        wishes: The bucket of wishes.
        agent: The id of this run of the agent.
        policy: What the agent may do.
        outbox: Takes the audit: who asked for what, and the result.
        may_begin: Returns False while another agent may be serving this host.
        told: Waits until a VM's answer is in its bucket.
    """

    bus: Bus
    wishes: Bucket
    agent: str
    policy: AgentPolicy
    outbox: Outbox
    may_begin: Callable[[], bool]
    told: Callable[[str], Awaitable[None]]


class WishKeeper:
    """Carries out the newest wish for one VM, each revision once.

    It claims a wish before anything is sent to QEMU. After a crash, the next agent finds the claim and continues from
    the VM's record, or answers with what it finds in the VM. A newer wish stops a running one at its next safe point.

    Args:
        hosted: The VM.
        duty: What the keepers of a host share.
    """

    def __init__(self, hosted: HostedVm, duty: Duty) -> None:
        self._hosted = hosted
        self._duty = duty
        self._bus = duty.bus
        self._wishes = duty.wishes
        self._outbox = duty.outbox
        self._newest: Entry | None = None
        self._news = asyncio.Event()
        self._stop = asyncio.Event()
        self._idle_since: float | None = None
        self._serving: int | None = None  # the revision that is being carried out
        self._who = ""  # wished what is being looked at

    def stop(self) -> None:
        """Make ``run`` return as soon as the wish under way has ended."""
        self._stop.set()
        if self._serving is None:
            self._newest = None
            self._news.set()

    def take(self, entry: Entry) -> None:
        """Take in an entry of the bucket; repeated and older ones are ignored."""
        if self._newest is not None and entry.revision <= self._newest.revision:
            return
        if self._serving is not None and self._is_mine(entry):
            return  # the claim, or an answer to a claim, of what is being carried out
        self._newest = entry
        self._idle_since = None
        self._news.set()

    @property
    def idle_s(self) -> float:
        """How many seconds the VM has been without a wish; 0 while it has one."""
        return 0.0 if self._idle_since is None else asyncio.get_running_loop().time() - self._idle_since

    def _is_mine(self, entry: Entry) -> bool:
        try:
            claim = json.loads(entry.value or b"{}")["claim"]
            return bool(claim["revision"] == self._serving and claim["agent"] == self._duty.agent)
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    async def run(self) -> None:
        """Carry out one wish after another, until cancelled."""
        while not self._stop.is_set():
            await self._news.wait()
            self._news.clear()
            entry = self._newest
            if entry is not None:
                try:
                    await self._serve(entry)
                except StaleError:
                    continue  # something newer is there, and comes
                except HostsError as error:  # the server is away or refuses: read everything again
                    _log.warning("%s: %s", self._hosted.key, error)
                    await self._first(timeout=_AGAIN_S)
                    await first_of(self._bus.wait_connected(), self._stop.wait())
                    self._news.set()
                except Exception as error:  # noqa: BLE001 -- JUSTIFICATION: our own fault is answered, not tried for ever
                    _log.exception("%s", self._hosted.key)
                    why = f"its agent failed: {type(error).__name__}: {error}"
                    self._answer(entry.revision, "", WishPhase.ENDED, code=NO_ANSWER, why=why)

    async def _serve(self, entry: Entry) -> None:
        answer = self._hosted.answer
        self._who = ""
        if entry.value is None:
            self._idle_since = asyncio.get_running_loop().time()
            self._hosted.target = None
            if answer is not None and not answer.phase.is_over:
                why = _deleted(entry)
                self._answer(answer.revision, answer.id, WishPhase.WITHDRAWN, code=NOT_REACHED, why=why)
            self._hosted.take_deletion(entry.revision)
            return
        if await self._is_over(entry, entry.revision) or (wish := self._read(entry)) is None:
            return
        claim, begun = wish.claim, False
        if claim is not None and await self._is_over(entry, claim.revision):
            return
        if not self._may_carry_out(entry, wish):
            return
        if claim is None:
            claim = await self._claim(entry, wish)
        else:
            claim, begun = await self._take_over(entry, wish, claim)
        if claim is not None:
            await self._carry_out(wish, claim, begun=begun)

    async def _is_over(self, entry: Entry, revision: int) -> bool:
        """Return True if the wish with this *revision* has been answered."""
        answer = self._hosted.answer
        if answer is None or answer.revision != revision or not answer.phase.is_over:
            return False
        if answer.phase is WishPhase.EXPIRED:
            await self._drop(entry)
        return True

    def _read(self, entry: Entry) -> Wish | None:
        """Return the wish; None if it cannot be read, which is answered."""
        value = entry.value or b""
        if len(value) > MOST_BYTES:
            self._reject(entry, "", f"it has {len(value):,} bytes: {MOST_BYTES:,} are read")
            return None
        try:
            wish = from_json(Wish, value)
        except ValueError as error:
            self._reject(entry, "", f"it cannot be read: {error}")
            return None
        self._who = wish.who
        if wish.claim is not None and wish.claim.revision >= entry.revision:
            self._reject(entry, wish.id, f"its claim is of revision {wish.claim.revision}, which is yet to come")
            return None
        return wish

    def _may_carry_out(self, entry: Entry, wish: Wish) -> bool:
        """Return True if this agent carries out such wishes; if it does not, that is answered."""
        operation = Operation.COUNT if wish.map is None else Operation.SET
        why = self._duty.policy.refusal(operation, self._hosted.key.vm)
        if why:
            self._reject(entry, wish.id, why)
        return not why

    def _reject(self, entry: Entry, wish: str, why: str) -> None:
        self._hosted.target = None
        self._answer(entry.revision, wish, WishPhase.REJECTED, code=NOT_SENT, why=why)

    async def _claim(self, entry: Entry, wish: Wish) -> Claim | None:
        """Wait until *wish* can begin, and claim it; return None if it must not begin any more."""
        if await self._wait_for_vm(wish, entry.revision, entry.created + wish.drop_after):
            return await self._write_claim(entry, wish, entry.revision, entry.created)
        if not self._news.is_set():
            await self._expire(entry, wish, entry.revision)
        return None

    async def _take_over(self, entry: Entry, wish: Wish, claim: Claim) -> tuple[Claim | None, bool]:
        """Take over a wish that was claimed before: return the claim, or None if nothing is left to do.

        Also return whether anything may have been sent for it.
        """
        until = claim.written + wish.drop_after
        if not await self._wait_for_vm(wish, claim.revision, max(until, self._bus.now()) + GRACE_S):
            if not self._news.is_set():
                why = f"its agent died, and the VM could not be reached since: {self._why_not()}"
                self._answer(claim.revision, wish.id, WishPhase.ENDED, code=NO_ANSWER, why=why)
            return None, False
        if self._hosted.vm is None or _was_begun(self._hosted.vm, claim):
            return claim, True
        if self._bus.now() >= until:
            await self._expire(entry, wish, claim.revision)
            return None, False
        # Anew, since the record may have been written since, which would look as if something had been sent.
        return await self._write_claim(entry, wish, claim.revision, claim.written), False

    async def _write_claim(self, entry: Entry, wish: Wish, revision: int, written: float) -> Claim | None:
        """Write the claim into *entry*; return None if it is gone or has changed."""
        vm = self._hosted.vm
        info = None if vm is None else vm.record_info
        claim = Claim(revision, written, self._duty.agent, 0 if info is None else info.saves)
        self._serving = revision
        try:
            claimed = to_bytes(replace(wish, claim=claim))
            await self._wishes.update(self._hosted.key.key, claimed, last=entry.revision)
        except StaleError:
            self._serving = None
            await self._look_again(entry.revision)
            return None
        except BaseException:
            self._serving = None
            raise
        return claim

    async def _look_again(self, after: int) -> None:
        """Read the bucket again, and take what is newer than revision *after*."""
        now = await self._wishes.get(self._hosted.key.key)
        if now is not None and now.revision > after:
            self.take(now)

    async def _expire(self, entry: Entry, wish: Wish, revision: int) -> None:
        why = f"it was not begun within {wish.drop_after:g} s: {self._why_not()}"
        self._answer(revision, wish.id, WishPhase.EXPIRED, code=NOT_SENT, why=why)
        await self._drop(entry)

    async def _drop(self, entry: Entry) -> None:
        """Delete an expired wish, but report it first: afterwards nobody could find out."""
        await self._duty.told(self._hosted.key.vm)
        with contextlib.suppress(StaleError):  # something newer is there
            await self._wishes.delete(self._hosted.key.key, last=entry.revision)

    def _why_not(self) -> str:
        hosted = self._hosted
        if hosted.error is not None:
            return str(hosted.error)
        if hosted.turn.locked():
            return "another change is under way"
        return "its agent came too late" if self._duty.may_begin() else "its agent is not sure to be the only one"

    async def _wait_for_vm(self, wish: Wish, revision: int, deadline: float) -> bool:
        """Wait until the VM is here and nobody else changes it; False after *deadline*, or if a newer wish came."""
        hosted = self._hosted
        while not self._news.is_set() and (left := deadline - self._bus.now()) > 0:
            if hosted.is_here and not hosted.turn.locked() and self._duty.may_begin():
                return True
            hosted.moved.clear()
            if hosted.answer is None or hosted.answer.revision != revision or hosted.answer.why != self._why_not():
                self._answer(revision, wish.id, WishPhase.WAITING, why=self._why_not())
            await self._first(hosted.moved, timeout=left)
        return False

    async def _first(self, *others: asyncio.Event, timeout: float) -> None:
        """Wait for a newer wish, or until one of the *others* is set."""
        await first_of(*(each.wait() for each in (self._news, *others)), timeout=timeout)

    # What is done for it.

    async def _carry_out(self, wish: Wish, claim: Claim, *, begun: bool) -> None:
        self._serving = claim.revision
        hosted = self._hosted
        outcome = None
        try:
            async with hosted.turn:
                if hosted.vm is not None:  # it may have been lost while this was claimed
                    self._answer(claim.revision, wish.id, WishPhase.RUNNING)
                    self._outbox.asked(hosted.key, wish, claim.revision)
                    outcome = await self._to_its_end(hosted.vm, wish, claim, begun=begun)
        finally:
            self._serving = None
            hosted.moved.set()
        if outcome is None:
            await self._look_again(claim.revision)
            return
        report = outcome.report
        reached = outcome.error is None
        hosted.target = report.target if reached and report is not None else None
        phase, why = WishPhase.ENDED, ""
        if not reached and self._news.is_set() and self._newest is not None:
            is_deleted = self._newest.value is None
            phase = WishPhase.WITHDRAWN if is_deleted else WishPhase.SUPERSEDED
            why = _deleted(self._newest) if is_deleted else "a newer wish came"
        elif begun:
            why = "its agent died meanwhile: found by looking"
        code = REACHED if outcome.error is None else code_of(outcome.error)
        self._answer(claim.revision, wish.id, phase, code=code, why=why, outcome=outcome)

    async def _to_its_end(
        self, vm: VcpuController, wish: Wish, claim: Claim, *, begun: bool
    ) -> VmResult[TransitionReport | None]:
        """Carry *wish* out until it ends, its time is up, or a newer wish comes."""
        hosted = self._hosted
        loop = asyncio.get_running_loop()
        started = loop.time()
        left = claim.written + wish.drop_after - self._bus.now()
        work = self._resume(vm, wish, left) if begun else self._reach(vm, wish, left)
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop_in_time(vm, task, left + GRACE_S))
        value: TransitionReport | None = None
        error: BaseException | None = None
        try:
            await asyncio.wait({task})
            value = task.result()
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise
            error = TransitionError(_without_steps(vm, _target(vm, wish), TransitionOutcome.PARTIAL, cancelled=True))
        except QmpVcpuError as err:
            error = err
        except Exception as err:  # noqa: BLE001 -- JUSTIFICATION: our own fault is answered, not tried for ever
            _log.exception("%s", hosted.key)
            error = err
        finally:
            stopping.cancel()
        return VmResult(hosted.address, hosted.key.vm, vm.layout, value, error, loop.time() - started)

    async def _stop_in_time(self, vm: VcpuController, task: "asyncio.Task[Any]", seconds: float) -> None:
        await self._first(timeout=max(seconds, 0.0))
        stopped: TransitionReport | None = None
        with contextlib.suppress(QmpVcpuError):
            stopped = await vm.cancel()
        if stopped is None:  # it has not begun, or the VM is lost
            task.cancel()

    def _reach(self, vm: VcpuController, wish: Wish, left: float) -> Coroutine[Any, Any, TransitionReport]:
        """Return the work that carries *wish* out in the seconds that are *left*."""
        options = wish.options.given()
        given = options.get("total_timeout")
        options["total_timeout"] = max(left if given is None else min(left, given), 0.0)
        if wish.map is not None:
            return vm.set_map(wish.map, **options)
        return vm.set_count(wish.count or 0, include_boot=wish.include_boot, **options)

    async def _resume(self, vm: VcpuController, wish: Wish, left: float) -> TransitionReport:
        """Continue what an earlier agent began, from the record or, without one, by reading the VM."""
        report = await self._recover(vm, wish, left)
        if report is not None:
            return report
        if wish.options.affect is Affect.CONFIG:
            return await self._reach(vm, wish, left)
        await vm.refresh()
        target = _target(vm, wish)
        if vm.layout.enabled != target:
            raise TransitionError(_without_steps(vm, target, TransitionOutcome.PARTIAL))
        if wish.options.affect is Affect.BOTH:
            return await self._reach(vm, wish, left)  # the next boot may not have followed; QEMU is sent nothing
        return _without_steps(vm, target, TransitionOutcome.REACHED)

    async def _recover(self, vm: VcpuController, wish: Wish, left: float) -> TransitionReport | None:
        """Finish what was cut short of *wish*, under its policy; return None if nothing was.

        A dead agent does not count as a failure of the change. If a step had already failed, the policy decides
        whether to revert. If the time is up, the VM is only read.
        """
        intent = vm.interrupted
        if intent is None or (wish.map is not None and intent.target != wish.map):
            return None  # another client's intent
        how = Recovery.REPORT
        if left > 0:
            how = Recovery.REVERT if await _has_failed(vm, intent) else Recovery.FINISH
        report = await vm.recover(how)
        if report is not None and report.outcome is not TransitionOutcome.REACHED:
            raise TransitionError(report)
        return report

    def _answer(
        self,
        revision: int,
        wish: str,
        phase: WishPhase,
        *,
        code: int = 0,
        why: str = "",
        outcome: VmResult[TransitionReport | None] | None = None,
    ) -> None:
        answer = Answer(revision, wish, phase, code, why)
        if answer == self._hosted.answer and outcome is None:
            return
        self._hosted.take_answer(answer, outcome)
        if phase.is_over:
            self._outbox.answered(self._hosted.key, answer, who=self._who)


async def first_of(*waits: Coroutine[Any, Any, object], timeout: float | None = None) -> None:
    """Wait until one of *waits* ends, or *timeout* seconds have passed; cancel the others."""
    tasks = [asyncio.ensure_future(each) for each in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in tasks:
            each.cancel()


def _was_begun(vm: VcpuController, claim: Claim) -> bool:
    """Return whether anything may have been sent for a wish that an earlier agent claimed."""
    info = vm.record_info
    return info is None or info.found > claim.saves  # the intent is recorded before anything is sent


async def _has_failed(vm: VcpuController, intent: Intent) -> bool:
    """Return whether *intent* was being reverted when it was cut short, or was about to be."""
    if intent.direction is Direction.REVERTING:
        return True
    if intent.on_failure is not OnFailure.REVERT:
        return False
    answers = await vm.guest_answers()
    leaving = [vm.layout.slot_of(step.first) for step in intent.steps if step.action is Action.UNPLUG]
    last = [answers.get(slot.cpu_index) for slot in leaving if slot.present]
    return any(each is not None and each.is_ejection and each.status is OstStatus.FAILURE for each in last)


def _deleted(entry: Entry) -> str:
    return f"it was deleted (revision {entry.revision})"


def _target(vm: VcpuController, wish: Wish) -> VcpuMap:
    """Return the vCPUs that *wish* asks for."""
    if wish.map is not None:
        return wish.map
    return vm.plan_count(wish.count or 0, include_boot=wish.include_boot).target


def _without_steps(
    vm: VcpuController, target: VcpuMap, outcome: TransitionOutcome, *, cancelled: bool = False
) -> TransitionReport:
    layout = vm.layout
    return TransitionReport(layout.enabled, target, OnFailure.STOP, outcome, (), layout, cancelled=cancelled)
