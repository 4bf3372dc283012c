"""The trials: one for each ability, in the order in which they are made."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

from qmpvcpu.certify.judging import NotDoneError, judged, not_possible, pending_reason, reason_of
from qmpvcpu.certify.refusing import DeadlineTasks, Provocation
from qmpvcpu.certify.waiting import now, seen, wait_booted
from qmpvcpu.errors import DenialReason, GuestAgentError, MonitorError, QmpVcpuError, WaitTimeoutError
from qmpvcpu.events import VmReset
from qmpvcpu.model.certificate import Ability, AbilityRow, AbilityVerdict
from qmpvcpu.model.options import ChangeOptions, OnFailure, Proof
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Refused, Unplugged
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.planning.guest import MAY_BOOT, tells_why_unused
from qmpvcpu.vm.controller import UnplugRequest, VcpuController

# As many at once show what there is to see; a machine of hundreds would take minutes.
_MOST_AT_ONCE: Final = 8
_SEVERAL: Final = 2
_BY_ITSELF_S: Final = 5.0  # how long a guest has to use a vCPU without being told; Linux took 1 on a busy machine
_NO_AGENT: Final = "no agent was given that could be asked"
_MAY_BOOT: Final = "the guest may not have been up yet: certify it later, with a longer boot=, or with its agent"
_COUNTED: Final = (
    f"{KnownFault.TCG_CREATED_BEYOND_MAX.value}, and the other rows need what is left: start it with a larger maxcpus"
)
_UNCOUNTED: Final = (
    f"{KnownFault.TCG_CREATED_BEYOND_MAX.value}, and nothing tells how many have left it: start it anew, and confirm"
    " that none has with fresh=True"
)


class _Done(NamedTuple):
    """A trial that worked: how long it took, in seconds, and what was seen."""

    seconds: float | None
    detail: str = ""


_Trial = Callable[[], Awaitable[_Done]]


class Trials:
    """The trials on one VM, and what each of them leaves for the next."""

    def __init__(
        self,
        vm: VcpuController,
        timeout: float,
        boot: float,
        provocation: Provocation | None,
        *,
        resets: bool,
        fresh: bool,
    ) -> None:
        layout = vm.layout
        self._vm = vm
        self._timeout = timeout
        self._boot = boot
        self._resets = resets
        self._provocation = provocation
        self._is_counted = fresh or KnownFault.TCG_CREATED_BEYOND_MAX not in layout.vm.known_faults
        self._start = layout.enabled - layout.pending
        free = [slot.first for slot in layout.slots if not slot.present]
        self._first = free[0] if free else None
        self._above = free[2] if free[2:] else None  # with a free one below it
        rest = free[1:2] + free[3:]
        room = max(min(len(rest) - resets, _MOST_AT_ONCE), 0)
        self._many = rest[: min(room, self._budget())]
        self._why_not_many = _COUNTED if room >= _SEVERAL else "there is no room for several more"
        self._rows: dict[Ability, AbilityRow] = {}
        self._lost = ""
        self._paused = False
        self._booting = False
        self._plugged_at = 0.0
        self._suspects: list[str] = []
        self._told_at: float | None = None
        self._request: UnplugRequest | None = None
        self._why_no_request = "the VM may not be reset"
        self._left_by_itself = False

    def _budget(self) -> int:
        """Return how many vCPUs may be plugged at once: of some QEMUs each plug counts for ever."""
        layout = self._vm.layout
        if KnownFault.TCG_CREATED_BEYOND_MAX not in layout.vm.known_faults:
            return _MOST_AT_ONCE
        single = 3 + self._resets  # each alone: the first, the one above a hole, the first again, one after a reset
        return max((layout.max - len(layout.enabled)) // layout.slots[0].count - single, 0)

    def all(self) -> Mapping[Ability, _Trial]:
        """What is tried, in order."""
        return {
            Ability.PLUG: self._plug,
            Ability.ACKNOWLEDGED: self._acknowledged,
            Ability.STARTED: self._started,
            Ability.ONLINE: self._online,
            Ability.IN_A_HOLE: self._in_a_hole,
            Ability.ALL_AT_ONCE: self._all_at_once,
            Ability.UNPLUG: self._unplug,
            Ability.OFFLINE_FIRST: self._offline_first,
            Ability.PLUG_AGAIN: self._plug_again,
            Ability.REFUSAL: self._refusal,
            Ability.AFTER_REBOOT: self._after_reboot,
            Ability.PENDING_OVER_RESET: self._pending_over_reset,
            Ability.PUT_BACK: self.put_back,
        }

    async def row(self, ability: Ability, trial: _Trial) -> AbilityRow:
        """Carry one trial out, and tell how it ended."""
        began = now()
        try:
            if self._lost:
                raise not_possible(self._lost)
            done = await trial()
            row = AbilityRow(ability, AbilityVerdict.WORKS, done.seconds, done.detail)
        except NotDoneError as error:
            row = AbilityRow(ability, error.verdict, error.seconds, error.detail)
        except QmpVcpuError as error:
            verdict, detail = judged(error)
            tried = verdict is not AbilityVerdict.NOT_POSSIBLE
            row = AbilityRow(ability, verdict, now() - began if tried else None, detail)
        if row.verdict is AbilityVerdict.LOST:
            self._lost = f"QEMU was lost at: {ability.value}"
        self._rows[ability] = row
        return row

    # Plugs.

    async def _plug(self) -> _Done:
        if self._first is None:
            raise not_possible(f"{DenialReason.MACHINE_FULL.value}: start it with -smp N,maxcpus=M")
        self._need_count()
        plan = self._vm.plan(self._vm.layout.enabled | self._vm.layout.slot_of(self._first).ids, proof=Proof.STARTED)
        self._suspects = [warning for warning in plan.warnings if tells_why_unused(warning)]
        self._plugged_at = now()
        await self._vm.plug(self._first, timeout=self._timeout)
        return _Done(now() - self._plugged_at)

    async def _acknowledged(self) -> _Done:
        self._need(Ability.PLUG)
        vm, first = self._vm, self._first
        if first is None or not vm.capabilities.acknowledges:
            raise not_possible(DenialReason.MACHINE_CANNOT_ACKNOWLEDGE.value)
        try:
            layout = await vm.wait_for(lambda layout: layout[first].acknowledged is not None, timeout=self._timeout)
        except WaitTimeoutError:
            raise NotDoneError(AbilityVerdict.NEVER, self._why_unused(), self._timeout) from None
        took = now() - self._plugged_at
        slot = layout[first].slot
        if not slot.acknowledged and slot.answer is not None:
            why = f"{slot.answer.reason}, OST status {slot.answer.code:#04x}"
            raise NotDoneError(AbilityVerdict.REFUSED, why, took)
        return _Done(took)

    async def _started(self) -> _Done:
        self._need(Ability.PLUG)
        vm, first = self._vm, self._first
        if first is None or vm.capabilities.start_unknowable:
            raise not_possible(vm.capabilities.start_unknowable)

        async def has_started() -> bool:
            return await vm.run_control.has_started(first)

        if vm.guest.has_agent and not await seen(has_started, min(_BY_ITSELF_S, self._timeout)):
            with contextlib.suppress(GuestAgentError):  # the next row tells
                await self._bring_online(first)
        if not await seen(has_started, self._timeout):
            why = "; ".join(filter(None, ("it has run no guest code", self._why_unused())))
            raise NotDoneError(AbilityVerdict.NEVER, why, self._timeout)
        return self._done_by()

    def _why_unused(self) -> str:
        """Return why the guest may have taken no notice of the first vCPU, as far as that was known beforehand."""
        heard = self._works(Ability.ACKNOWLEDGED)
        known = (_MAY_BOOT if why == MAY_BOOT else why for why in self._suspects if not (heard and why == MAY_BOOT))
        return "; ".join(known)

    async def _online(self) -> _Done:
        self._need(Ability.PLUG)
        guest, first = self._vm.guest, self._first
        if first is None or not guest.has_agent:
            raise not_possible(_NO_AGENT)

        async def is_online() -> bool:
            return any(cpu.online for cpu in await guest.vcpus(timeout=self._timeout) if cpu.vcpu == first)

        async def may_be_listed() -> bool:
            return any(cpu.vcpu in (first, None) for cpu in await guest.vcpus(timeout=self._timeout))

        if not await seen(is_online, min(_BY_ITSELF_S, self._timeout)):
            if not await seen(may_be_listed, self._timeout):
                raise NotDoneError(AbilityVerdict.NEVER, "the guest does not list it", self._timeout)
            await self._bring_online(first)
        return self._done_by()

    async def _bring_online(self, vcpu: int) -> None:
        began = now()
        if await self._vm.guest.set_online(vcpu, timeout=self._timeout):  # it was offline until then
            self._told_at = began

    def _done_by(self) -> _Done:
        """Tell who had the guest use the first vCPU, and in how many seconds: from the plug, or from being told."""
        if self._told_at is None:
            return _Done(now() - self._plugged_at, "on its own")
        return _Done(now() - self._told_at, "by the agent")

    async def _in_a_hole(self) -> _Done:
        self._need(Ability.PLUG)
        if self._above is None:
            raise not_possible("it takes three free vCPUs to leave one out")
        return await self._plug_proven(self._above)

    async def _all_at_once(self) -> _Done:
        self._need(Ability.PLUG)
        if len(self._many) < _SEVERAL:
            raise not_possible(self._why_not_many)
        layout = self._vm.layout
        target = layout.enabled | VcpuMap(each for first in self._many for each in layout.slot_of(first).ids)
        began = now()
        await self._vm.set_map(target, **self._proven())
        return _Done(now() - began, f"{len(self._many)} of them")

    async def _plug_again(self) -> _Done:
        self._need(Ability.UNPLUG)
        assert self._first is not None  # noqa: S101 - JUSTIFICATION: it was unplugged
        return await self._plug_proven(self._first)

    async def _plug_proven(self, vcpu: int) -> _Done:
        began = now()
        await self._vm.plug(vcpu, **self._proven())
        return _Done(now() - began)

    def _proven(self) -> ChangeOptions:
        """Return options for a plug that has worked only with as much proof as the first one had."""
        options: ChangeOptions = {"timeout": self._timeout, "on_failure": OnFailure.CONTINUE}
        if self._works(Ability.ONLINE):
            options["proof"] = Proof.ONLINE
        elif self._works(Ability.STARTED):
            options["proof"] = Proof.STARTED
        elif self._works(Ability.ACKNOWLEDGED):
            options |= {"proof": Proof.ACKNOWLEDGED, "require_proof": True}
        return options

    # Removals.

    async def _unplug(self) -> _Done:
        self._need(Ability.PLUG)
        assert self._first is not None  # noqa: S101 - JUSTIFICATION: it was plugged
        began = now()
        await self._vm.unplug(self._first, timeout=self._timeout)
        return _Done(now() - began)

    async def _offline_first(self) -> _Done:
        if not self._vm.guest.has_agent:
            raise not_possible(_NO_AGENT)
        self._need(Ability.ONLINE)
        vcpu = self._one_of_ours()
        began = now()
        await self._vm.unplug(vcpu, timeout=self._timeout, offline_first=True)
        return _Done(now() - began)

    async def _refusal(self) -> _Done:
        unplug = self._rows[Ability.UNPLUG]
        if unplug.verdict is AbilityVerdict.REFUSED:
            return _Done(unplug.seconds, unplug.detail)
        if self._provocation is None:
            raise not_possible("nothing here makes this guest refuse")
        if isinstance(self._provocation, DeadlineTasks):
            self._need(Ability.ONLINE)  # a CPU that the guest does not use leaves all the same
        vcpu = self._one_of_ours()
        try:
            try:
                await self._provocation.refuse()
            except QmpVcpuError as error:
                _, why = judged(error)
                raise not_possible(f"the guest could not be made to refuse: {why}") from error
            began = now()
            verdict = await (await self._vm.request_unplug(vcpu)).wait(self._timeout)
        finally:
            with contextlib.suppress(QmpVcpuError):  # what does not work any more is told by the rows to come
                await self._provocation.comply()
        match verdict:
            case Refused():
                return _Done(now() - began, reason_of(verdict))
            case Unplugged():
                raise NotDoneError(AbilityVerdict.NEVER, "it gave the vCPU up all the same", now() - began)
        raise NotDoneError(AbilityVerdict.NEVER, "it said neither yes nor no", self._timeout)

    # Over a reset.

    async def _after_reboot(self) -> _Done:
        if not self._resets:
            raise not_possible("the VM may not be reset")
        self._need_count()
        fault = KnownFault.TCG_REPLUG_CORRUPTS_HEAP
        left = self._works(Ability.UNPLUG) or self._works(Ability.OFFLINE_FIRST)
        if left and fault in self._vm.capabilities.known_faults:
            self._why_no_request = fault.value
            raise not_possible(fault.value)
        await self._reset_with_a_removal_pending()
        await wait_booted(self._vm, timeout=self._boot)
        self._booting = False
        self._left_by_itself = self._request is not None and self._request.verdict is not None
        free = [slot.first for slot in self._vm.layout.slots if not slot.present]
        if not free:
            raise not_possible(DenialReason.MACHINE_FULL.value)
        return await self._plug_proven(free[-1])

    async def _reset_with_a_removal_pending(self) -> None:
        """Reset the VM; a removal is asked for first, while the guest cannot answer."""
        control = self._vm.run_control
        self._paused = True
        await control.pause()
        try:
            self._request = await self._request_unanswered()
        except (NotDoneError, QmpVcpuError) as error:
            if isinstance(error, MonitorError):
                raise
            _, self._why_no_request = judged(error)
        events = self._vm.events()
        self._booting = True
        await control.reset()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._boot):  # what the agent says before it is of the boot before
                async for event in events:
                    if isinstance(event, VmReset):
                        break
        await control.resume()
        self._paused = False

    async def _request_unanswered(self) -> UnplugRequest:
        if KnownFault.TCG_PSERIES_RESET_ABORTS in self._vm.capabilities.known_faults:
            raise not_possible(KnownFault.TCG_PSERIES_RESET_ABORTS.value)
        return await self._vm.request_unplug(self._one_of_ours())

    async def _pending_over_reset(self) -> _Done:
        if self._request is None:
            raise not_possible(self._why_no_request)
        verdict = await self._request.wait(self._timeout)
        match verdict:
            case Unplugged():
                return _Done(None, "on its own" if self._left_by_itself else "with the next plug")
            case Refused():
                raise NotDoneError(AbilityVerdict.REFUSED, reason_of(verdict))
        raise NotDoneError(AbilityVerdict.NEVER, pending_reason(verdict), self._timeout)

    # The end.

    async def put_back(self) -> _Done:
        """Let the VM run, with the vCPUs that it had."""
        vm = self._vm
        if self._paused:
            await vm.run_control.resume()
            self._paused = False
        if self._booting:  # what is asked of a guest before it is up may be pending for ever
            await wait_booted(vm, timeout=self._boot)
        surplus = len(vm.layout.enabled - self._start)
        began = now()
        await vm.set_map(self._start, on_failure=OnFailure.CONTINUE, timeout=self._timeout)
        return _Done(now() - began, f"{surplus} at once")

    # What the trials have in common.

    def _need(self, ability: Ability) -> None:
        """Return if *ability* works, without which another cannot be tried."""
        if not self._works(ability):
            raise not_possible(f"it needs: {ability.value}")

    def _need_count(self) -> None:
        """Return if QEMU does not mind how many vCPUs were ever created, or that can be counted."""
        if not self._is_counted:
            self._why_no_request = _UNCOUNTED
            raise not_possible(_UNCOUNTED)

    def _works(self, ability: Ability) -> bool:
        return ability in self._rows and self._rows[ability].verdict is AbilityVerdict.WORKS

    def _one_of_ours(self) -> int:
        """Return the highest vCPU that was plugged here and that nobody has asked for."""
        layout = self._vm.layout
        for slot in reversed(layout.slots):
            if slot.present and not slot.ids & self._start and slot.first not in layout.pending_slots:
                return slot.first
        raise not_possible("no vCPU could be plugged for it")
