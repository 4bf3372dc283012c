"""VcpuController: one VM, as its users see it: single vCPUs, and whole maps."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from qmpvcpu import planning
from qmpvcpu.controller.applying import Applier
from qmpvcpu.controller.migration import Export, Migration
from qmpvcpu.controller.onevcpu import OneVcpu
from qmpvcpu.controller.session import Session
from qmpvcpu.engine import Terms
from qmpvcpu.model import Direction, Intent, Layout, OnFailure, Proof, TransitionError, TransitionReport
from qmpvcpu.planning import Plan

__all__ = ["How", "VcpuController", "Wish"]

# A guest serves removals one by one, so late answers come one by one: two in a row have been seen.
_RECOVERIES = 3

Wish = str | Iterable[int]
How = Literal["report", "finish", "revert"]


class VcpuController(OneVcpu):
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
        self._applier = Applier(session, self._commands, self._turns)
        self.migration = Migration(session, self._turns)

    # Whole maps.

    def plan(self, wish: Wish, *, allow_fatal: bool = False, allow_boot_vcpus: bool = False) -> Plan:
        """Return what ``set_map`` would do now; nothing is sent or read. ``str(plan)`` explains it.

        Args:
            wish: The vCPUs that shall be plugged, as libvirt's cpuset text or as ids.
            allow_fatal: Plan even what this QEMU is known not to survive.
            allow_boot_vcpus: Plan to take boot vCPUs from a VM that libvirt runs.

        Raises:
            InvalidMapError: *wish* is empty, or no set of vCPU ids. What cannot be done is in ``plan.denied``.
        """
        target = planning.read_wish(wish, self.layout)
        return planning.plan_map(
            self._engine.situation, target, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus
        )

    def plan_count(
        self, count: int, *, include_boot: bool = False, allow_fatal: bool = False, allow_boot_vcpus: bool = False
    ) -> Plan:
        """Return what ``set_count`` would do now; nothing is sent or read. What cannot be done is in ``denied``."""
        return planning.plan_count(
            self._engine.situation,
            count,
            include_boot=include_boot,
            allow_fatal=allow_fatal,
            allow_boot_vcpus=allow_boot_vcpus,
        )

    async def set_map(
        self,
        wish: Wish | Plan,
        *,
        on_failure: OnFailure = OnFailure.STOP,
        timeout: float = 30.0,  # noqa: ASYNC109 -- of each answer of the guest's
        total_timeout: float | None = None,
        revert_timeout: float | None = None,
        in_flight: int = 8,
        proof: Proof = Proof.PRESENT,
        allow_fatal: bool = False,
        allow_boot_vcpus: bool = False,
    ) -> TransitionReport:
        """Make exactly these vCPUs plugged, boot vCPUs included.

        Planned from what is known when its turn comes; a step that is denied fails the whole before anything is
        sent, under every policy. Plugs come first. Where the guest's answer to an earlier removal is pending: a vCPU
        that shall go joins it; one that shall stay is not safe by being there still, so its answer is awaited, and
        it is plugged again if it left. Idempotent: what is so already costs one query.

        With a record, the intent is on disk before the first command, and the outcome when this returns: two writes,
        and a third where it turns to reverting.

        Cancelling drops it if it waits for its turn, and stops it at the next safe point if it runs: nothing more is
        sent, replies of QEMU are awaited, the outcome is recorded; nothing is reverted.

        Args:
            wish: The vCPUs that shall be plugged (libvirt's cpuset text, or ids), or a plan for this layout.
            on_failure: What becomes of the rest when a step fails; see OnFailure.
            timeout: How long the guest has for each answer, in seconds from QEMU's acceptance; 0 only requests.
            total_timeout: How long all may take that leads to the target, in seconds; None: no bound of its own.
            revert_timeout: As *timeout*, for what is undone; None: the same.
            in_flight: At most so many commands without a reply; under STOP, so many removals without an answer (1:
                strictly one by one). CONTINUE and REVERT request all removals at once.
            proof: ACKNOWLEDGED waits for the guest's word on each plug too; it is advisory, and fails nothing.
            allow_fatal: Send even what this QEMU is known not to survive.
            allow_boot_vcpus: Take boot vCPUs from a VM that libvirt runs, which makes libvirtd lose the VM.

        Returns:
            The report, slot by slot, if the map is reached.

        Raises:
            TransitionError: It is not; ``error.report`` tells what happened, what was undone and what could not be.
            InvalidMapError: *wish* is empty, or no set of vCPU ids.
            StepDeniedError: A step cannot or must not be sent; nothing was.
            StalePlanError: *wish* is a plan, and the VM has changed since; nothing was sent.
            RecordError: The intent cannot be recorded, and nothing was sent (``outcome`` UNCHANGED); or the map is
                reached, and that cannot be recorded (CHANGED).
            MonitorError: The connection was lost before.
        """
        terms = self._terms(
            on_failure=on_failure,
            timeout=timeout,
            total_timeout=total_timeout,
            revert_timeout=revert_timeout,
            in_flight=in_flight,
            proof=proof,
            allow_fatal=allow_fatal,
            allow_boot_vcpus=allow_boot_vcpus,
        )
        if isinstance(wish, Plan):
            return await self._applier.apply(lambda: wish, terms)
        target = planning.read_wish(wish, self.layout)
        return await self._applier.apply(
            lambda: self.plan(target, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus), terms
        )

    async def set_count(
        self,
        count: int,
        *,
        include_boot: bool = False,
        on_failure: OnFailure = OnFailure.STOP,
        timeout: float = 30.0,  # noqa: ASYNC109 -- of each answer of the guest's
        total_timeout: float | None = None,
        revert_timeout: float | None = None,
        in_flight: int = 8,
        proof: Proof = Proof.PRESENT,
        allow_fatal: bool = False,
        allow_boot_vcpus: bool = False,
    ) -> TransitionReport:
        """Make so many vCPUs plugged, as libvirt's setVcpus does: the lowest free ones in, the highest removable out.

        Boot vCPUs stay, and a count below them is denied, naming them. A removal that is pending is joined before
        another vCPU is asked for.

        Args:
            count: How many vCPUs shall be plugged.
            include_boot: Take boot vCPUs out too, highest first, never vCPU 0.
            on_failure: As in ``set_map``, like all that follow.
            timeout: As in ``set_map``.
            total_timeout: As in ``set_map``.
            revert_timeout: As in ``set_map``.
            in_flight: As in ``set_map``.
            proof: As in ``set_map``.
            allow_fatal: As in ``set_map``.
            allow_boot_vcpus: As in ``set_map``.

        Returns:
            The report, if the count is reached.

        Raises:
            QmpVcpuError: As ``set_map``.

        Source: libvirt, virDomainSetVcpusFlags; which vCPUs it chooses was measured with libvirt 9.0.0.
        """
        terms = self._terms(
            on_failure=on_failure,
            timeout=timeout,
            total_timeout=total_timeout,
            revert_timeout=revert_timeout,
            in_flight=in_flight,
            proof=proof,
            allow_fatal=allow_fatal,
            allow_boot_vcpus=allow_boot_vcpus,
        )
        return await self._applier.apply(
            lambda: self.plan_count(
                count, include_boot=include_boot, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus
            ),
            terms,
        )

    async def cancel(self) -> TransitionReport | None:
        """Stop the transition that runs, at the next safe point, and return its report; None if none runs.

        Nothing more is sent, replies of QEMU are awaited, answers of the guest's are not: a removal that it works on
        is PENDING. Nothing is reverted. Whoever asked for the transition gets TransitionError with this report, or
        the report if the map was reached all the same. Those that wait for their turn go on.
        """
        return await self._applier.cancel()

    # A transition that something cut short.

    @property
    def interrupted(self) -> Intent | None:
        """The transition that was begun and whose outcome is not recorded, or None.

        Its process died, or the connection was lost. A new ``set_map`` supersedes it.
        """
        return self._session.keeper.interrupted

    async def recover(self, how: How, *, timeout: float | None = None) -> TransitionReport | None:  # noqa: ASYNC109
        """Look at the transition that was cut short, and report it, finish it, or revert it.

        Only the slots of its steps are touched: what others have changed since stays.

        Args:
            how: ``"report"`` tells what a fresh look shows of each step, changes nothing, and leaves it interrupted.
                ``"finish"`` goes on to its target under its policy. ``"revert"`` undoes what it had done.
            timeout: How long the guest has for each answer, in seconds; None: as long as the transition gave it.

        Returns:
            The report; None if nothing was interrupted.

        Raises:
            TransitionError: What was asked for was not reached.
            QmpVcpuError: As ``set_map``.
        """
        if how not in ("report", "finish", "revert"):
            raise ValueError(f"how to recover: report, finish or revert, not {how!r}")
        intent = self.interrupted
        if intent is None:
            return None
        if how == "report":
            return planning.observed_report(intent, await self.refresh())
        reverts = how == "revert"
        wish_for = planning.revert_wish if reverts else planning.finish_wish
        terms = self._terms(
            on_failure=OnFailure.CONTINUE if reverts else intent.on_failure,
            timeout=intent.timeout if timeout is None else timeout,
        )
        again = replace(intent, direction=Direction.REVERTING if reverts else Direction.FORWARD)
        for _ in range(_RECOVERIES - 1):
            try:
                return await self._applier.apply(
                    lambda: self.plan(wish_for(intent, self.layout)), terms, intent=again
                )
            except TransitionError as error:
                # Every step went well, and it is not reached all the same: a removal that had been asked for before
                # the crash, and that nobody could know of, was answered meanwhile.
                if error.report.cancelled or not all(step.ok for step in error.report.steps):
                    raise
        return await self._applier.apply(lambda: self.plan(wish_for(intent, self.layout)), terms, intent=again)

    # Migration.

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

    def _terms(
        self,
        *,
        on_failure: OnFailure,
        timeout: float,
        total_timeout: float | None = None,
        revert_timeout: float | None = None,
        in_flight: int = 8,
        proof: Proof = Proof.PRESENT,
        allow_fatal: bool = False,
        allow_boot_vcpus: bool = False,
    ) -> Terms:
        if in_flight < 1:
            raise ValueError(f"in_flight is at least 1, not {in_flight}")
        limits = {"timeout": timeout, "total_timeout": total_timeout, "revert_timeout": revert_timeout}
        for name, limit in limits.items():
            if limit is not None and not limit >= 0:
                raise ValueError(f"{name} is a number of seconds, 0 or more, not {limit!r}")
        return Terms(
            on_failure=on_failure,
            timeout=timeout,
            total_timeout=total_timeout,
            revert_timeout=timeout if revert_timeout is None else revert_timeout,
            reply_timeout=self._session.timeout,
            in_flight=in_flight,
            proof=proof,
            allow_fatal=allow_fatal,
            allow_boot_vcpus=allow_boot_vcpus,
            reconnect=self._session.reconnect is not None,
        )
