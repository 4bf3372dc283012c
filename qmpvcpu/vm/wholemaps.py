"""WholeMaps: the change of many vCPUs at once, as users see it."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from qmpvcpu.engine.work import Terms
from qmpvcpu.errors import ConfigDeniedError, DenialReason
from qmpvcpu.given import at_least, checked
from qmpvcpu.model.report import ConfigReport, TransitionOutcome, TransitionReport
from qmpvcpu.model.transition import Affect, OnFailure
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Proof
from qmpvcpu.planning.plan import Plan, parse_target, plan_count, plan_map
from qmpvcpu.vm.applying import Applier, NextBootChange
from qmpvcpu.vm.onevcpu import OneVcpu
from qmpvcpu.vm.session import Session

if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpus

Wish = str | Iterable[int]


class WholeMaps(OneVcpu):
    """One VM, changed by whole maps too; the part of VcpuController that knows of no other QEMU than this."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._applier = Applier(session, self._commands, self._turns)

    @checked
    def plan(self, wish: Wish, *, allow_fatal: bool = False, allow_boot_vcpus: bool = False) -> Plan:
        """Return what ``set_map`` would do now; nothing is sent or read. ``str(plan)`` explains it.

        Args:
            wish: The vCPUs that shall be plugged, as libvirt's cpuset text or as ids.
            allow_fatal: Plan even what this QEMU is known not to survive.
            allow_boot_vcpus: Plan to take boot vCPUs from a VM that libvirt runs.

        Raises:
            InvalidMapError: *wish* is empty, or no set of vCPU ids. What cannot be done is in ``plan.denied``.
        """
        target = parse_target(wish, self.layout)
        return plan_map(self._engine.situation, target, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus)

    @checked
    def plan_count(
        self, count: int, *, include_boot: bool = False, allow_fatal: bool = False, allow_boot_vcpus: bool = False
    ) -> Plan:
        """Return what ``set_count`` would do now; nothing is sent or read. What cannot be done is in ``denied``."""
        return plan_count(
            self._engine.situation,
            count,
            include_boot=include_boot,
            allow_fatal=allow_fatal,
            allow_boot_vcpus=allow_boot_vcpus,
        )

    @checked
    async def set_map(
        self,
        wish: Wish | Plan,
        *,
        on_failure: OnFailure = OnFailure.STOP,
        timeout: float = 30.0,
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
            in_flight: At most so many commands without a reply. Under STOP a removal is asked for only when the one
                before has ended; CONTINUE and REVERT ask for all at once, which is faster.
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
        target = wish.target if isinstance(wish, Plan) else parse_target(wish, self.layout)

        def make_plan() -> Plan:
            if isinstance(wish, Plan):
                return wish
            return self.plan(target, allow_fatal=allow_fatal, allow_boot_vcpus=allow_boot_vcpus)

        def change(domain: "DomainVcpus") -> "DomainVcpus":
            from qmpvcpu.domainxml.next_boot import with_map

            return with_map(domain, target)

        return await self._bring_about(make_plan, terms, affect, f"map {target}", change)

    @checked
    async def set_count(
        self,
        count: int,
        *,
        include_boot: bool = False,
        on_failure: OnFailure = OnFailure.STOP,
        timeout: float = 30.0,
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

        def change(domain: "DomainVcpus") -> "DomainVcpus":
            from qmpvcpu.domainxml.next_boot import with_count

            return with_count(domain, count)

        return await self._bring_about(make_plan, terms, affect, f"count {count}", change)

    @checked
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
            raise ConfigDeniedError(f"maximum {maximum}", VcpuMap(), DenialReason.RECORD_MAXIMUM, detail)
        from qmpvcpu.domainxml.next_boot import with_max

        return await next_boot.change(lambda domain: with_max(domain, maximum))

    async def cancel(self) -> TransitionReport | None:
        """Stop the transition that runs, at the next safe point, and return its report; None if none runs.

        Nothing more is sent, replies of QEMU are awaited, answers of the guest's are not: a removal that it works on
        is PENDING. Nothing is reverted. Whoever asked for the transition gets TransitionError with this report, or
        the report if the map was reached all the same. Those that wait for their turn go on.
        """
        return await self._applier.cancel()

    async def _bring_about(
        self,
        make_plan: Callable[[], Plan],
        terms: Terms,
        affect: Affect,
        asked: str,
        change: "Callable[[DomainVcpus], DomainVcpus]",
    ) -> TransitionReport:
        """Carry out what is planned, or make *change* to the next boot, or both."""
        if affect is Affect.LIVE:
            return await self._applier.apply(make_plan, terms)
        next_boot = NextBootChange(self._next_boot(asked), change)
        if affect is Affect.BOTH:
            return await self._applier.apply(make_plan, terms, next_boot=next_boot)
        config = await next_boot.of.change(change)
        return TransitionReport(
            start=config.start,
            target=config.target,
            on_failure=terms.on_failure,
            outcome=TransitionOutcome.REACHED,
            steps=(),
            layout=self.layout,
            affect=Affect.CONFIG,
            config=config,
        )

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
        return Terms(
            on_failure=on_failure,
            timeout=timeout,
            total_timeout=total_timeout,
            revert_timeout=timeout if revert_timeout is None else revert_timeout,
            reply_timeout=self._session.timeout,
            in_flight=at_least("in_flight", in_flight, 1),
            proof=proof,
            allow_fatal=allow_fatal,
            allow_boot_vcpus=allow_boot_vcpus,
            reconnect=self._session.reconnect is not None,
        )
