"""VcpuController: one VM, as its users see it: single vCPUs, and whole maps."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from qmpvcpu import planning
from qmpvcpu.controller.applying import Applier, NextBootChange
from qmpvcpu.controller.migration import Export, Migration
from qmpvcpu.controller.onevcpu import OneVcpu
from qmpvcpu.controller.replaying import wanted_of
from qmpvcpu.controller.session import Session
from qmpvcpu.engine import Terms
from qmpvcpu.errors import ConfigDeniedError, DenialReason
from qmpvcpu.model import (
    Affect,
    ConfigReport,
    Direction,
    Intent,
    Layout,
    OnFailure,
    Proof,
    TransitionError,
    TransitionOutcome,
    TransitionReport,
)
from qmpvcpu.planning import Plan

if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpus

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
        affect: Affect = Affect.LIVE,
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
            affect: CONFIG has these vCPUs at the next boot, and sends nothing; BOTH both: each side is checked before
                anything is sent, and the next boot is written once the map is reached.

        Returns:
            The report, slot by slot, if the map is reached; ``report.config`` tells of the next boot.

        Raises:
            TransitionError: It is not; ``error.report`` tells what happened, what was undone and what could not be.
                Under BOTH also where the map is reached and the next boot cannot be written (``__cause__`` says why):
                the outcome is PARTIAL, and nothing is undone.
            ConfigDeniedError: The next boot cannot be so, or nothing keeps it; nothing was sent.
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
        target = wish.target if isinstance(wish, Plan) else planning.read_wish(wish, self.layout)

        def make_plan() -> Plan:
            if isinstance(wish, Plan):
                return wish
            return self.plan(target, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus)

        if affect is Affect.LIVE:
            return await self._applier.apply(make_plan, terms)
        from qmpvcpu.domainxml.changes import with_map  # noqa: PLC0415 -- as in attach: XML is not for everybody

        next_boot = NextBootChange(self._next_boot(f"map {target}"), lambda domain: with_map(domain, target))
        if affect is Affect.BOTH:
            return await self._applier.apply(make_plan, terms, next_boot=next_boot)
        return self._of_config(await next_boot.of.change(next_boot.change), on_failure)

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
        affect: Affect = Affect.LIVE,
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
            affect: As in ``set_map``. At the next boot a count may take those that QEMU starts with out, as libvirt's
                does.

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

        def make_plan() -> Plan:
            return self.plan_count(
                count, include_boot=include_boot, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus
            )

        if affect is Affect.LIVE:
            return await self._applier.apply(make_plan, terms)
        from qmpvcpu.domainxml.changes import with_count  # noqa: PLC0415 -- as in set_map

        next_boot = NextBootChange(self._next_boot(f"count {count}"), lambda domain: with_count(domain, count))
        if affect is Affect.BOTH:
            return await self._applier.apply(make_plan, terms, next_boot=next_boot)
        return self._of_config(await next_boot.of.change(next_boot.change), on_failure)

    async def set_max(self, maximum: int) -> ConfigReport:
        """Have room for *maximum* vCPUs at the next boot; that of the VM as it runs is its QEMU's for good.

        vCPUs above a lower maximum are dropped, with their pins.

        Returns:
            What became of the document.

        Raises:
            ConfigDeniedError: It does not fit the document's topology or NUMA cells, or ``attach`` was given no
                document with *config*.
            RecordError: The document cannot be read or written, and is as it was.
        """
        next_boot = self._next_boot(f"maximum {maximum}")
        if next_boot.path is None:
            detail = "a record's maximum is that of the VM as it runs: attach with config=PATH"
            raise ConfigDeniedError(f"maximum {maximum}", (), DenialReason.RECORD_MAXIMUM, detail)
        from qmpvcpu.domainxml.changes import with_max  # noqa: PLC0415 -- as in set_map

        return await next_boot.change(lambda domain: with_max(domain, maximum))

    def _of_config(self, config: ConfigReport, on_failure: OnFailure) -> TransitionReport:
        return TransitionReport(
            start=config.start,
            target=config.target,
            on_failure=on_failure,
            outcome=TransitionOutcome.REACHED,
            steps=(),
            layout=self.layout,
            affect=Affect.CONFIG,
            config=config,
        )

    async def replay(
        self, source: "DomainVcpus | Layout | bytes", *, in_flight: int = 8, allow_fatal: bool = False
    ) -> TransitionReport:
        """Plug into a QEMU that is stopped what another, or an earlier one, had: the same vCPUs in the same order.

        For a QEMU started with ``launch.arguments(source).boot_argv`` and ``-S`` or ``-incoming``: QEMU itself says
        what each vCPU's slot takes. All is checked before anything is sent: the VM is prelaunch, paused or
        inmigrate, it has the same maximum, topology and NUMA cells as far as *source* says them, QEMU has started
        with the vCPUs that it is to start with, and what is plugged besides is a beginning of the rest. So it is
        idempotent, and goes on where an earlier replay ended. At the end QEMU is read again, and the order compared.

        A transition like ``set_map``: recorded, cancelled and recovered in the same way.

        Args:
            source: A domain document, what ``parse`` read of one, or another VM's layout.
            in_flight: At most so many commands without a reply; QEMU keeps their order.
            allow_fatal: Send even what this QEMU is known not to survive.

        Returns:
            The report, with a step for each vCPU that was plugged.

        Raises:
            ReplayMismatchError: The VM runs, or is another than *source* says: ``differences`` lists all of it, and
                nothing was sent. With ``outcome`` CHANGED: all was done, and what QEMU has is something else.
            StepDeniedError: A plug must not be sent; nothing was.
            TransitionError: QEMU rejected a plug; its report tells what was plugged before.
            DomainXmlError: *source* is no domain document that can be read.
            QmpVcpuError: As ``set_map``.
        """
        wanted = wanted_of(source)
        terms = self._terms(on_failure=OnFailure.STOP, timeout=30.0, in_flight=in_flight, allow_fatal=allow_fatal)
        await self.refresh()  # a transition looks at slots only, and others may have plugged some in another order
        report = await self._applier.apply(
            lambda: planning.plan_replay(self._engine.situation, wanted, allow_fatal=allow_fatal), terms
        )
        layout = await self.refresh()
        planning.check_replayed(layout, wanted)
        return replace(report, layout=layout)

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
            return await self._seen(intent)
        reverts = how == "revert"
        next_boot = None if reverts else self._next_boot_of(intent)
        wish_for = planning.revert_wish if reverts else planning.finish_wish
        terms = self._terms(
            on_failure=OnFailure.CONTINUE if reverts else intent.on_failure,
            timeout=intent.timeout if timeout is None else timeout,
        )

        def plan() -> Plan:
            plan = self.plan(wish_for(intent, self.layout))
            return plan if reverts else planning.in_order_of(intent, plan)

        again = replace(intent, direction=Direction.REVERTING if reverts else Direction.FORWARD)
        for _ in range(_RECOVERIES - 1):
            try:
                return await self._applier.apply(plan, terms, intent=again, next_boot=next_boot)
            except TransitionError as error:
                # Every step went well, and it is not reached all the same: a removal that had been asked for before
                # the crash, and that nobody could know of, was answered meanwhile.
                if error.report.cancelled or not all(step.ok for step in error.report.steps):
                    raise
        return await self._applier.apply(plan, terms, intent=again, next_boot=next_boot)

    async def _seen(self, intent: Intent) -> TransitionReport:
        """Return what a fresh look shows of *intent*, and of the next boot that it was to have."""
        report = planning.observed_report(intent, await self.refresh())
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
        from qmpvcpu.domainxml.changes import with_map  # noqa: PLC0415 -- as in set_map

        return NextBootChange(next_boot, lambda domain: with_map(domain, wish))

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
