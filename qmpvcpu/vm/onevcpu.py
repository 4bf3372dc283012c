"""OneVcpu: the change of one vCPU, as users see it."""

import asyncio
import contextlib
from typing import TYPE_CHECKING

from qmpvcpu.engine.ledger import Read
from qmpvcpu.engine.removal import Removal
from qmpvcpu.errors import (
    CommandRejectedError,
    ConfigDeniedError,
    DenialReason,
    MonitorLostError,
    PlugUndoneError,
    PlugUnprovenError,
    WaitTimeoutError,
    describe,
)
from qmpvcpu.given import checked
from qmpvcpu.model.layout import Slot
from qmpvcpu.model.transition import Affect
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Proof, Refused
from qmpvcpu.planning.checks import check_plug, check_unplug, find_slot
from qmpvcpu.vm.commands import Commands
from qmpvcpu.vm.observed import ObservedVm
from qmpvcpu.vm.request import UnplugRequest, error_for
from qmpvcpu.vm.session import Session
from qmpvcpu.vm.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qmpvcpu.vm.nextboot import NextBoot, Promise


class OneVcpu(ObservedVm):
    """One VM, changed one vCPU at a time; the part of VcpuController that knows of no maps."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._commands = Commands(session, self.refresh)
        self._turns = Turns()
        self._plugging: dict[int, asyncio.Task[None]] = {}

    @checked
    async def plug(
        self,
        vcpu: int | None = None,
        *,
        proof: Proof = Proof.PRESENT,
        require_proof: bool = False,
        timeout: float = 30.0,
        allow_fatal: bool = False,
        affect: Affect = Affect.LIVE,
    ) -> VcpuMap:
        """Plug one vCPU, with its whole slot, and return the ids that are plugged now.

        One ``device_add``, no query. The guest's acknowledgement, if one comes, is
        ``layout[vcpu].acknowledged``.

        Args:
            vcpu: The first vCPU id of the slot; None takes the first free slot.
            proof: PRESENT is content with QEMU's acceptance; ACKNOWLEDGED waits for the guest too.
            require_proof: Raise if the guest does not acknowledge it.
            timeout: How long to wait for the guest, in seconds.
            allow_fatal: Send even what this QEMU is known not to survive.
            affect: CONFIG has it at the next boot, and sends nothing; BOTH both, the next boot once it is plugged.
                The first free one is then the same for both.

        Raises:
            StepDeniedError: Not sent: occupied, unknown, part of a slot, full, migrating, fatal, ...
            ConfigDeniedError: Not sent: the next boot cannot have it, or nothing keeps the next boot.
            CommandRejectedError: QEMU answered with an error; nothing was plugged.
            OutcomeUnknownError: The connection was lost, or silent, with the command in flight.
            PlugUnprovenError: *require_proof*, and the guest did not acknowledge; it is plugged.
            PlugUndoneError: An earlier removal that was asked for twice ejected it again.
            RecordError: The record or the next boot could not be read or written: before (nothing was sent), or after
                (it is plugged).
            MonitorLostError: The connection was lost before.

        Source: QEMU docs/system/cpu-hotplug.rst.
        """
        asked = "plug" if vcpu is None else describe("plug", [vcpu])
        if affect is Affect.CONFIG:
            return await self._next_boot(asked).enable(vcpu)

        async def plug(promise: "Promise | None") -> VcpuMap:
            return await self._plug(
                vcpu, promise, proof=proof, require_proof=require_proof, timeout=timeout, allow_fatal=allow_fatal
            )

        return await (plug(None) if affect is Affect.LIVE else self._both(asked, plug))

    async def _plug(
        self,
        vcpu: int | None,
        promise: "Promise | None",
        *,
        proof: Proof,
        require_proof: bool,
        timeout: float,
        allow_fatal: bool,
    ) -> VcpuMap:
        async with self._turns.together():
            await self._session.know_status()
            slot = check_plug(self._engine.situation, vcpu, allow_fatal=allow_fatal)
            if promise is not None:
                promise.make_state(slot.ids, enabled=True)
            plugging = self._commands.plug_alone(slot, self._engine.plug_sent(slot.first))
            task = self._plugging[slot.first] = self._session.start(plugging)
            task.add_done_callback(lambda _: self._plugging.pop(slot.first, None))
            await self._session.replied("plug", slot.ids, task)
        await self._session.keeper.written(f"vCPU {slot.ids} is plugged")
        doubled = slot.first in self._engine.doubled
        if proof is Proof.ACKNOWLEDGED or require_proof or doubled:
            await self._prove(slot, timeout, require_proof=require_proof, doubled=doubled)
        return slot.ids

    @checked
    async def request_unplug(
        self, vcpu: int, *, allow_fatal: bool = False, allow_boot_vcpus: bool = False
    ) -> UnplugRequest:
        """Ask the guest to give a vCPU up, with its whole slot; return when QEMU has accepted.

        A removal that is pending already is joined, and nothing is sent: a second request would eject whatever is
        plugged there next.

        Args:
            vcpu: The first vCPU id of the slot.
            allow_fatal: Send even what this QEMU is known not to survive.
            allow_boot_vcpus: Take a boot vCPU from a VM that libvirt runs, which makes libvirtd lose the VM.

        Raises:
            StepDeniedError: Not sent: vCPU 0, not plugged, unknown, part of a slot, migrating, fatal, ...
            CommandRejectedError: QEMU answered with an error (most often: the guest's ACPI is not up yet).
            OutcomeUnknownError: The connection was lost, or silent, with the command in flight.
            RecordError: The record could not be written; nothing was sent.
            MonitorLostError: The connection was lost before.
        """
        await self._session.check_open()
        if (removal := self._joinable(vcpu)) is not None:
            return await self._join(removal)
        async with self._turns.together():
            await self._session.know_status()
            if self._engine.single_threaded is None and self.layout.vm.accelerator == "tcg":
                await self._session.read(Read.FULL)  # only two vCPUs' threads tell, and there are two now
            # From here to the command there is no await: whoever asked while we looked is joined.
            if (removal := self._joinable(vcpu)) is not None:
                return await self._join(removal)
            slot = check_unplug(
                self._engine.situation, vcpu, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus
            )
            removal = self._engine.unplug_sent(slot.first, self._session.loop.time())
            task = self._commands.start_unplug(slot.first, self._commands.unplug_alone(slot, removal))
            await self._session.replied("unplug", slot.ids, task)
        return UnplugRequest(removal, self._session.wait_answer, joined=False)

    def _joinable(self, vcpu: int) -> Removal | None:
        removal = self._engine.removals.get(vcpu)
        return removal if removal is not None and not removal.recalled else None

    async def _join(self, removal: Removal) -> UnplugRequest:
        await self._commands.reply_to(removal)
        return UnplugRequest(removal, self._session.wait_answer, joined=True)

    @checked
    async def unplug(
        self,
        vcpu: int,
        *,
        timeout: float = 30.0,
        allow_fatal: bool = False,
        allow_boot_vcpus: bool = False,
        affect: Affect = Affect.LIVE,
    ) -> VcpuMap:
        """Unplug one vCPU, with its whole slot, and return the ids that are gone now, on evidence.

        Args:
            vcpu: The first vCPU id of the slot; boot vCPUs other than 0 too.
            timeout: How long to wait for the guest's answer, in seconds from QEMU's acceptance; 0 only asks.
            allow_fatal: As in ``request_unplug``.
            allow_boot_vcpus: As in ``request_unplug``.
            affect: CONFIG leaves it out at the next boot, and sends nothing; BOTH both, the next boot once it left.

        Raises:
            UnplugRefusedError: The guest said no, with its reason; it is still plugged and may be asked again.
            UnplugPendingError: No answer in time. The request lives on: a late answer changes the layout and is an
                event, and a new call joins it. It does not change the next boot.
            ConfigDeniedError: Not sent: the next boot cannot be without it, or nothing keeps the next boot.
            RecordError: The record or the next boot could not be read or written: before (nothing was sent), or after
                (it is unplugged).
            QmpVcpuError: As ``request_unplug``.
        """
        asked = describe("unplug", [vcpu])
        if affect is Affect.CONFIG:
            return await self._next_boot(asked).disable(vcpu)

        async def unplug(promise: "Promise | None") -> VcpuMap:
            if promise is not None:
                ids = find_slot("unplug", self.layout, vcpu).ids
                promise.make_state(ids, enabled=False)
            return await self._unplug(
                vcpu, timeout=timeout, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus
            )

        return await (unplug(None) if affect is Affect.LIVE else self._both(asked, unplug))

    async def _unplug(
        self,
        vcpu: int,
        *,
        timeout: float,
        allow_fatal: bool,
        allow_boot_vcpus: bool,
    ) -> VcpuMap:
        request = await self.request_unplug(vcpu, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus)
        verdict = await request.wait(timeout)
        error = error_for(verdict, timeout)
        if error is not None:
            raise error
        await self._session.keeper.written(f"vCPU {verdict.ids} is unplugged")
        return verdict.ids

    @checked
    async def set_state(
        self,
        vcpu: int,
        *,
        enabled: bool,
        timeout: float = 30.0,
        allow_fatal: bool = False,
        affect: Affect = Affect.LIVE,
    ) -> VcpuMap:
        """Make one vCPU, with its whole slot, plugged or unplugged; nothing is sent if it is so already.

        A vCPU that shall stay while its removal is pending is not safe by being there still: its answer is waited
        for, and it is plugged again if it left. Under CONFIG, and once that is so under BOTH, the next boot has it or
        not.

        Returns:
            The ids of the slot.

        Raises:
            UnplugPendingError: Its removal is pending, and was not answered within *timeout* seconds.
            QmpVcpuError: As ``plug`` and ``unplug``.
        """
        asked = describe("plug" if enabled else "unplug", [vcpu])
        if affect is Affect.CONFIG:
            next_boot = self._next_boot(asked)
            return await (next_boot.enable(vcpu) if enabled else next_boot.disable(vcpu))

        async def set_state(promise: "Promise | None") -> VcpuMap:
            if promise is not None:
                ids = find_slot("plug" if enabled else "unplug", self.layout, vcpu).ids
                promise.make_state(ids, enabled=enabled)
            return await self._set_state(vcpu, enabled=enabled, timeout=timeout, allow_fatal=allow_fatal)

        return await (set_state(None) if affect is Affect.LIVE else self._both(asked, set_state))

    async def _set_state(
        self,
        vcpu: int,
        *,
        enabled: bool,
        timeout: float,
        allow_fatal: bool,
    ) -> VcpuMap:
        await self._session.check_open()
        if not enabled:
            slot = find_slot("unplug", self.layout, vcpu)
            return await self.unplug(vcpu, timeout=timeout, allow_fatal=allow_fatal) if slot.present else slot.ids
        slot = find_slot("plug", self.layout, vcpu)
        if vcpu in self._plugging:  # another caller's wish is the same
            await self._session.replied("plug", slot.ids, self._plugging[vcpu])
            slot = self.layout.slot_of(vcpu)
        removal = self._engine.removals.get(vcpu)
        if removal is not None:
            with contextlib.suppress(CommandRejectedError):  # then it stays, which is what is wished
                verdict = await self._session.wait_answer(removal, timeout)
                error = error_for(verdict, timeout)
                if error is not None and not isinstance(verdict, Refused):
                    raise error
            slot = self.layout.slot_of(vcpu)
        return slot.ids if slot.present else await self.plug(vcpu, timeout=timeout, allow_fatal=allow_fatal)

    # How it is done.

    def _next_boot(self, asked: str) -> "NextBoot":
        """Return what keeps the next boot, which needs no QEMU.

        Raises:
            ConfigDeniedError: Nothing does.
            MonitorLostError: This side has let go of the VM.
        """
        if self._let_go:
            raise MonitorLostError("closed by this side")
        if self._session.next_boot is None:
            detail = "nothing keeps the next boot of this VM: attach with config=PATH, or with record=PATH"
            raise ConfigDeniedError(asked, VcpuMap(), DenialReason.NO_CONFIG, detail)
        return self._session.next_boot

    async def _both(self, asked: str, change: "Callable[[Promise], Awaitable[VcpuMap]]") -> VcpuMap:
        """Do *change*, then have the next boot follow: in a task, so that cancelling its caller leaves no half."""

        async def change_both() -> VcpuMap:
            async with self._next_boot(asked).promise() as promise:
                ids = await change(promise)
                done = f"{asked} is done"
                await promise.keep(done)
            await self._session.keeper.written(f"{done}, at the next boot too")
            return ids

        # JUSTIFICATION: what was sent is taken in, and what was promised is written, even if nobody asks now
        return await asyncio.shield(self._session.start(change_both()))

    async def _prove(self, slot: Slot, limit: float, *, require_proof: bool, doubled: bool) -> None:
        # The guest's word is advisory: without require_proof it is PLUGGED all the same.
        with contextlib.suppress(WaitTimeoutError):
            await self.wait_for(
                lambda now: now[slot.first].acknowledged is not None or not now[slot.first].enabled, timeout=limit
            )
        if doubled:
            await self._session.read(Read.FULL)
            self._engine.doubled.discard(slot.first)
        now = self.layout.slot_of(slot.first)
        if not now.present:
            raise PlugUndoneError(slot.ids)
        if require_proof and not self.layout[slot.first].acknowledged:
            answer = now.answer
            reason = answer.reason if answer else f"no answer within {limit:g} s"
            raise PlugUnprovenError(slot.ids, answer.code if answer else None, reason)
