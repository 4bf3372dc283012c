"""VcpuController: one VM, as its users see it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from qmpvcpu.errors import ConfigDeniedError, DenialReason, ReplayMismatchError, TransitionError
from qmpvcpu.given import checked
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.ost import OstAnswer
from qmpvcpu.model.report import TransitionOutcome, TransitionReport
from qmpvcpu.model.transition import Affect, Direction, Intent, OnFailure, Recovery
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vmstate import PreviousVcpus
from qmpvcpu.planning.plan import Plan
from qmpvcpu.planning.recovery import finish_target, in_order_of, observed_report, revert_target
from qmpvcpu.planning.replay import ReplayTarget, check_replayed, plan_replay
from qmpvcpu.vm.applying import NextBootChange
from qmpvcpu.vm.migration import Export, Migration
from qmpvcpu.vm.replaying import wanted_of
from qmpvcpu.vm.session import Session
from qmpvcpu.vm.wholemaps import WholeMaps

if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpus

# A guest serves removals one by one, so late answers come one by one: two in a row have been seen.
_RECOVERIES = 3


class VcpuController(WholeMaps):
    """One VM. Made by ``attach``; all methods are for one event loop.

    Any number of tasks may call it at once. Single commands go side by side; a transition (``set_map``,
    ``set_count``, ``recover``) goes alone, and queues: first come, first served. Cancelling a call stops the waiting,
    not what was sent: its outcome is still taken in, shows in ``layout``, is recorded and is an event. After the
    connection is lost every call raises MonitorLostError, and a new ``attach`` tells the truth; with
    ``attach(reconnect=True)`` calls wait for it to come back, as long as for a reply of QEMU's.

    Attributes:
        migration: What ``export``, ``take_back``, ``check_target`` and ``confirm_target`` are made of.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.migration = Migration(session, self._turns)

    async def guest_answers(self) -> dict[int, OstAnswer]:
        """Read the guest's last answer of each slot, by ``cpu_index``: QEMU keeps them, whoever asked.

        A slot that the guest never spoke of has none; a machine without ACPI hotplug has none at all. The layout has
        only those that were heard since ``attach``.

        Raises:
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        await self._session.check_open()
        answers = await self._session.reader.answers()
        return {slot: answer for slot, answer in answers.items() if answer.source}

    # A transition that something cut short.

    @property
    def interrupted(self) -> Intent | None:
        """The transition that was begun and whose outcome is not recorded, or None.

        Its process died, or the connection was lost. A new ``set_map`` supersedes it.
        """
        return self._session.keeper.interrupted

    @checked
    async def recover(self, how: Recovery, *, timeout: float | None = None) -> TransitionReport | None:
        """Look at the transition that was cut short, and report it, finish it, or revert it.

        Only the slots of its steps are touched: what others have changed since stays.

        Args:
            how: REPORT tells what a fresh look shows of each step, changes nothing, and leaves it interrupted.
                FINISH goes on to its target under its policy. REVERT undoes what it had done.
            timeout: How long the guest has for each answer, in seconds; None: as long as the transition gave it.

        Returns:
            The report; None if nothing was interrupted.

        Raises:
            TransitionError: What was asked for was not reached.
            QmpVcpuError: As ``set_map``.
        """
        intent = self.interrupted
        if intent is None:
            return None
        if how is Recovery.REPORT:
            return await self._seen(intent)
        reverts = how is Recovery.REVERT
        next_boot = None if reverts else self._next_boot_of(intent)
        wish_for = revert_target if reverts else finish_target
        terms = self._terms(
            on_failure=OnFailure.CONTINUE if reverts else intent.on_failure,
            timeout=intent.timeout if timeout is None else timeout,
        )

        def plan() -> Plan:
            plan = self.plan(wish_for(intent, self.layout))
            return plan if reverts else in_order_of(intent, plan)

        again = replace(intent, direction=Direction.REVERTING if reverts else Direction.FORWARD)
        for _ in range(_RECOVERIES - 1):
            try:
                return await self._applier.apply(plan, terms, intent=again, next_boot=next_boot, rebuilds=True)
            except TransitionError as error:
                # Every step went well, and it is not reached all the same: a removal that had been asked for before
                # the crash, and that nobody could know of, was answered meanwhile.
                if error.report.cancelled or not all(step.ok for step in error.report.steps):
                    raise
        return await self._applier.apply(plan, terms, intent=again, next_boot=next_boot, rebuilds=True)

    async def _seen(self, intent: Intent) -> TransitionReport:
        """Return what a fresh look shows of *intent*, and of the next boot that it was to have."""
        report = observed_report(intent, await self.refresh())
        if intent.direction is Direction.REVERTING or (next_boot := self._next_boot_of(intent)) is None:
            return report
        now = await next_boot.of.look(next_boot.change)
        reached = report.outcome is TransitionOutcome.REACHED and now.ok
        outcome = TransitionOutcome.REACHED if reached else TransitionOutcome.PARTIAL
        return replace(report, outcome=outcome, affect=Affect.BOTH, config=now)

    def _next_boot_of(self, intent: Intent) -> NextBootChange | None:
        """Return what is to follow *intent*, or None if nothing is.

        Raises:
            ConfigDeniedError: The next boot is, and it is kept in a document that ``attach`` was not given.
        """
        wish = intent.next_boot
        if wish is None:
            return None
        next_boot = self._next_boot(f"map {wish}")
        if next_boot.path is None and intent.config is not None:
            detail = f"it was to be written to {intent.config}: attach with config= and that path"
            raise ConfigDeniedError(f"map {wish}", wish, DenialReason.NO_CONFIG, detail)
        from qmpvcpu.domainxml.next_boot import with_map

        return NextBootChange(next_boot, lambda domain: with_map(domain, wish))

    # Another QEMU for the same VM.

    @property
    def desired(self) -> VcpuMap | None:
        """The map that was last asked for, as the record has it; None if there is none."""
        return self._session.keeper.desired

    @property
    def previous(self) -> PreviousVcpus | None:
        """What an earlier QEMU of this VM had, and this one has not; None where nothing is kept.

        It is kept in the record, from one QEMU to the next, until this QEMU has the same vCPUs in the same order
        (``replay``), a change is asked for instead, or it is dropped (``drop_previous``).
        """
        return self._session.keeper.previous

    async def drop_previous(self) -> None:
        """Keep nothing of an earlier QEMU any more; idempotent.

        Raises:
            RecordError: It cannot be recorded, and is kept.
        """
        await self._session.keeper.drop_previous()

    @checked
    async def replay(
        self,
        source: "DomainVcpus | Layout | PreviousVcpus | bytes | None" = None,
        *,
        in_flight: int = 8,
        allow_fatal: bool = False,
    ) -> TransitionReport:
        """Plug into a QEMU that is stopped what another, or an earlier one, had: the same vCPUs in the same order.

        For a QEMU started with ``launch.arguments(source).boot_argv`` and ``-S`` or ``-incoming``: QEMU itself says
        what each vCPU's slot takes. All is checked before anything is sent: the VM is prelaunch, paused or
        inmigrate, it has the same maximum, topology and NUMA cells as far as *source* says them, QEMU has started
        with the vCPUs that it is to start with, and what is plugged besides is a beginning of the rest. So it is
        idempotent, and goes on where an earlier replay ended. At the end QEMU is read again, and the order compared.

        A transition like ``set_map``: recorded, cancelled and recovered in the same way.

        Args:
            source: A domain document, what ``parse`` read of one, or another VM's layout. Of a record it is what the
                VM is next started with (``domainxml.start_of``). None: as the record of this VM has it, which needs
                ``previous``.
            in_flight: At most so many commands without a reply; QEMU keeps their order.
            allow_fatal: Send even what this QEMU is known not to survive.

        Returns:
            The report, with a step for each vCPU that was plugged.

        Raises:
            ReplayMismatchError: The VM runs, or is another than *source* says, or nothing is kept of an earlier QEMU;
                ``differences`` lists all of it, and nothing was sent. With ``outcome`` CHANGED: all was done, and
                what QEMU has is something else.
            StepDeniedError: A plug must not be sent; nothing was.
            TransitionError: QEMU rejected a plug; its report tells what was plugged before.
            DomainXmlError: *source* is no domain document that can be read.
            QmpVcpuError: As ``set_map``.
        """
        wanted = self._kept() if source is None else wanted_of(source)
        terms = self._terms(on_failure=OnFailure.STOP, timeout=30.0, in_flight=in_flight, allow_fatal=allow_fatal)
        await self.refresh()  # a transition looks at slots only, and others may have plugged some in another order
        report = await self._applier.apply(
            lambda: plan_replay(self._engine.situation, wanted, allow_fatal=allow_fatal),
            terms,
            rebuilds=True,
        )
        layout = await self.refresh()
        check_replayed(layout, wanted)
        if self.previous is not None:
            await self.drop_previous()
        return replace(report, layout=layout)

    def _kept(self) -> ReplayTarget:
        """Return what the VM is to be started with by its record.

        Raises:
            ReplayMismatchError: Nothing is kept of an earlier QEMU.
        """
        record, previous = self._session.keeper.record, self.previous
        if previous is None:
            why = "attached without its record, or it is here again, was superseded by a change, or dropped"
            raise ReplayMismatchError([f"nothing is kept of an earlier QEMU: {why}; name what is to be replayed"])
        if record is None or record.next_boot is None:
            return wanted_of(previous)
        from qmpvcpu.domainxml import domain_from

        return wanted_of(replace(domain_from(self.layout), previous=previous, next_boot=record.next_boot))

    @checked
    async def export(self, *, settle: float = 0.0, allow_fatal: bool = False) -> Export:
        """Let no vCPU change from now on, and return the VM's state for the target of a migration.

        It waits for its turn, and then denies every change by this controller (``DenialReason.EXPORTED``, in ``plan``
        too) until the export is released or the VM is taken back: the target must have exactly these vCPUs. A call
        that joins a removal which is pending already sends nothing, and is not denied. The lock outlives a lost
        connection that is found again; an export that fails or is cancelled leaves none. Others are not kept from
        anything: see ``Export.changes``. Use as ``async with await vm.export() as export:``.

        Args:
            settle: How long to wait for the answers to removals that are pending, in seconds. What is pending still
                is in the export: QEMU's requests migrate along, and fire on the target.
            allow_fatal: Export even from a QEMU whose migration is known not to come off: under TCG, once a vCPU has
                left, it may stay in its setup for ever, and cannot be cancelled.

        Raises:
            StepDeniedError: The VM is exported already, migrates, has migrated away, has not arrived yet, or would
                be stuck.
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        return await self.migration.export(settle=settle, allow_fatal=allow_fatal)

    async def take_back(self, *, destination_is_gone: bool) -> Layout:
        """Have a source go on whose VM did not arrive; see ``confirm_target``.

        For a VM in ``postmigrate``, or paused after a migration that failed. Sends ``cont``, makes sure that it runs,
        and releases the export, if there is one. Cancelling stops the waiting, not what was sent.

        Args:
            destination_is_gone: The caller's word, True, that no other QEMU runs this VM or will: it would run twice,
                on the same disks.

        Raises:
            TakeBackError: Nobody gave that word, the VM is not one that was left behind, or it does not go on.
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        return await self.migration.take_back(destination_is_gone=destination_is_gone)
