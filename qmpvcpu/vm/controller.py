"""VcpuController: one VM, as its users see it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack

from qmpvcpu.engine.answers import UnplugVerdict, verdict_on
from qmpvcpu.engine.messages import Cancelled, Change, DropPrevious, Refresh, Result, StopRunning, Wait
from qmpvcpu.engine.removal import Removal
from qmpvcpu.errors import (
    ConfigDeniedError,
    DenialReason,
    MonitorLostError,
    PlacementError,
    QmpVcpuError,
    ReplayMismatchError,
    StalePlanError,
    StepDeniedError,
    TransitionError,
    describe,
    printable,
)
from qmpvcpu.given import checked
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Affect, ChangeOptions, CheckedOptions, OnFailure, Recovery
from qmpvcpu.model.transition import ConfigReport, Direction, Intent, TransitionOutcome, TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap, union
from qmpvcpu.model.verdicts import OstAnswer, Refused, Unplugged
from qmpvcpu.model.vm import RecordInfo, VmInfo
from qmpvcpu.planning.checks import PLUG, UNPLUG, Situation, check_placement, find_slot
from qmpvcpu.planning.plan import (
    Plan,
    check_plan,
    parse_target,
    plan_count,
    plan_map,
    plan_plug,
    plan_state,
    plan_unplug,
)
from qmpvcpu.vm.driver import Driver
from qmpvcpu.vm.guest import Guest
from qmpvcpu.vm.subscribers import EventStream

# Imports in functions below: what few calls need takes a tenth of the time of importing this.
if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpus
    from qmpvcpu.model.exported import PreviousVcpus
    from qmpvcpu.model.placement import Placement
    from qmpvcpu.model.statistics import VmStatistics
    from qmpvcpu.planning.replay import ReplayTarget
    from qmpvcpu.vm.host import Host
    from qmpvcpu.vm.migrating import Export, Migration
    from qmpvcpu.vm.next_boot import Change as ConfigChange
    from qmpvcpu.vm.next_boot import NextBoot
    from qmpvcpu.vm.run_control import RunControl
    from qmpvcpu.vm.statistics import StatisticsReader

_log = logging.getLogger("qmpvcpu.vm")

# A guest serves removals one by one, so late answers come one by one: two in a row have been seen.
_RECOVERIES = 3


class UnplugRequest:
    """A handle on one removal; it outlives every timeout, as the removal does.

    Attributes:
        ids: The vCPU ids of the slot.
        joined: True if the removal was under way already, and nothing was sent.
    """

    def __init__(self, removal: Removal, driver: Driver, *, joined: bool) -> None:
        self._removal = removal
        self._driver = driver
        self.ids: VcpuMap = removal.ids
        self.joined = joined

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of vCPU {self.ids}: {self.verdict or 'no answer yet'}>"

    @property
    def verdict(self) -> Unplugged | Refused | None:
        """The verdict, or None while there is none (see ``wait`` for PENDING)."""
        return verdict_on(self._removal)

    @checked
    async def wait(self, timeout: float | None = None) -> UnplugVerdict:
        """Wait for the guest's answer.

        May be called again after PENDING, by several tasks at once, and cancelled: the removal goes on.

        Args:
            timeout: Seconds from now; None waits for ever, 0 only looks.

        Returns:
            UNPLUGGED, REFUSED, or PENDING if *timeout* passed; a timeout is never raised.

        Raises:
            MonitorLostError: The connection was lost, or the VM closed, before the answer.
        """
        verdict: UnplugVerdict = await self._driver.request(Wait(self._removal, timeout))
        return verdict


class VcpuController:
    """One VM. Made by ``attach``; all methods are for one event loop.

    Any number of tasks may call it at once. Changes of one vCPU (``plug``, ``unplug``, ``set_state``) run together; a
    change of the whole map (``set_map``, ``set_count``, ``recover``, ``replay``) runs alone, and queues: first
    come, first served. After the connection is lost every call raises MonitorLostError, and a new ``attach`` tells
    the truth; with ``attach(reconnect=True)`` calls wait for it to come back, as long as for a reply of QEMU's.

    Cancelling a call drops it if it has not begun. If it has, nothing more is sent for it; what was sent is still
    taken in, shows in ``layout``, is recorded and is an event.

    The options of every change are described in ``ChangeOptions``. What every change raises:

    - ``TypeError``, ``ValueError``: an option is wrong; nothing was sent.
    - ``ConfigDeniedError``: the next boot cannot be so, or nothing keeps it; nothing was sent.
    - ``RecordError``: the record or the next boot cannot be read or written: before the change, and nothing was sent
      (``outcome`` UNCHANGED), or after it (CHANGED).
    - ``MonitorError``: the connection is lost, silent, or speaks nonsense.
    """

    def __init__(self, driver: Driver, next_boot: "NextBoot | None" = None) -> None:
        self._driver = driver
        self._engine = driver.engine
        self._config = next_boot

    def __repr__(self) -> str:
        layout = self.layout
        pending = f", pending {layout.pending}" if layout.pending else ""
        return f"<{type(self).__name__} {printable(self.address)}: vCPUs {layout.enabled} of {layout.max}{pending}>"

    # What is known.

    @property
    def layout(self) -> Layout:
        """All slots, as known now; a new object after each change."""
        return self._engine.layout

    @property
    def capabilities(self) -> VmInfo:
        """What this VM can do, and what its QEMU is known not to survive: ``layout.vm``."""
        return self.layout.vm

    @property
    def address(self) -> str:
        """Where QMP is spoken, for messages."""
        return self._driver.connection.monitor.address

    @property
    def peer_pid(self) -> int | None:
        """Process that listens where QMP is spoken: QEMU, or who started it; None where it is not on this host."""
        return self._driver.connection.monitor.peer_pid

    @property
    def record_info(self) -> RecordInfo | None:
        """Which record follows this VM, and how often it was written; None: ``attach`` was given none."""
        record = self._driver.writer.record
        return None if record is None else record.info

    @property
    def guest(self) -> Guest:
        """The guest's own system, through its agent; see Guest. Without ``attach(agent=)`` its calls raise."""
        return self._driver.guest

    @cached_property
    def host(self) -> "Host":
        """QEMU's threads on this host; see Host."""
        from qmpvcpu.vm.host import Host

        return Host(self._driver, self._next_boot)

    def events(self) -> EventStream:
        """Return a stream of all events from now on; see EventStream."""
        return self._driver.subscribers.stream()

    async def refresh(self) -> Layout:
        """Read the VM again and return its layout.

        Raises:
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        await self._driver.request(Refresh())
        return self.layout

    @checked
    async def wait_for(self, predicate: Callable[[Layout], object], *, timeout: float | None = None) -> Layout:
        """Wait until *predicate* holds for the layout, and return that layout.

        It is tried at once and at every change; nothing is polled.

        Raises:
            WaitTimeoutError: It did not hold within *timeout* seconds.
            MonitorLostError: The connection was lost.
        """
        return await self._driver.wait_for(predicate, timeout)

    @checked
    async def wait_settled(self, *, timeout: float | None = None) -> Layout:
        """Wait until no removal is pending, and return the layout.

        Raises:
            WaitTimeoutError: One still was after *timeout* seconds.
            MonitorLostError: The connection was lost.
        """
        return await self._driver.wait_for(lambda layout: not layout.pending_slots, timeout)

    async def guest_answers(self) -> dict[int, OstAnswer]:
        """Read the guest's last answer of each slot, by ``cpu_index``: QEMU keeps them all.

        A slot that the guest never spoke of has none; a machine without ACPI hotplug has none at all. The layout has
        those to plugs: of ``attach``, and what was heard since.

        Raises:
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        await self._driver.check_open()
        answers = await self._driver.connection.reader.answers()
        return {slot: answer for slot, answer in answers.items() if answer.source}

    @checked
    async def statistics(self, *, kvm: Collection[str] | None = None) -> "VmStatistics":
        """Read what each plugged vCPU has done: time on a host CPU, time waiting for one, KVM's counters, and more.

        It reads QEMU's threads on this host, and queries QEMU at most once: for KVM's counters, and for the threads
        of vCPUs plugged since the last full read. Under TCG it needs only the latter. Values that are not available
        are None, and ``why_incomplete`` says why: for a QEMU on another host there are only KVM's counters.

        Args:
            kvm: Which of KVM's counters to read, by name; None: all, some 50 for each vCPU; ``()``: none, and QEMU
                is not asked. A QEMU before 8.1 interrupts each vCPU to read them.

        Raises:
            MonitorError: The connection is lost, silent, or speaks nonsense.
        """
        return await self._statistics.read(kvm)

    @cached_property
    def _statistics(self) -> "StatisticsReader":
        from qmpvcpu.vm.statistics import StatisticsReader

        return StatisticsReader(self._driver)

    async def close(self) -> None:
        """Let go of the VM: the VM and a borrowed client stay as they are. Idempotent.

        Commands in flight get a second to be answered, so that their outcome is recorded. Calls that still wait raise
        MonitorLostError.
        """
        await self._driver.close()

    # One vCPU.

    @checked
    async def plug(self, vcpu: int | None = None, **options: Unpack[ChangeOptions]) -> VcpuMap:
        """Plug one vCPU, with its whole slot, and return the ids that are plugged now.

        One ``device_add``, no query. The guest's acknowledgement, if one comes, is ``layout[vcpu].acknowledged``.

        Args:
            vcpu: The first vCPU id of the slot; None takes the first free slot.
            **options: See ``ChangeOptions``. With ``affect=BOTH`` the first free slot is the same for both sides.

        Raises:
            StepDeniedError: Not sent: occupied, unknown, part of a slot, full, migrating, fatal, ...
            CommandRejectedError: QEMU answered with an error; nothing was plugged.
            OutcomeUnknownError: The connection was lost, or silent, with the command in flight.
            UnprovenError: ``require_proof``, and the guest did not acknowledge it; it is plugged.
            PlugUndoneError: An earlier removal that was asked for twice ejected it again.
            QmpVcpuError: As every change.

        Source: QEMU docs/system/cpu-hotplug.rst.
        """
        given = CheckedOptions.of(options)
        asked = describe("plug", [] if vcpu is None else [vcpu])
        if given.affect is Affect.CONFIG:
            return await self._next_boot(asked).set_state(vcpu, enabled=True, placement=given.placement)
        change = Change(
            lambda now: plan_plug(now, vcpu, given),
            given,
            Result.IDS,
            slot=vcpu,
            subject=asked,
            call="plug",
        )
        ids: VcpuMap = await self._change(change, lambda plan: _with_state(plan.ids, enabled=True))
        return ids

    @checked
    async def unplug(self, vcpu: int, **options: Unpack[ChangeOptions]) -> VcpuMap:
        """Unplug one vCPU, with its whole slot, and return the ids that are gone now, on evidence.

        A removal that is under way is joined, and nothing is sent: a second request would eject the CPU that is
        plugged there next.

        Args:
            vcpu: The first vCPU id of the slot; boot vCPUs other than 0 too.
            **options: See ``ChangeOptions``.

        Raises:
            StepDeniedError: Not sent: vCPU 0, not plugged, unknown, part of a slot, migrating, fatal, ...
            CommandRejectedError: QEMU answered with an error (most often: the guest's ACPI is not up yet).
            OutcomeUnknownError: The connection was lost, or silent, with the command in flight.
            UnplugRefusedError: The guest said no, with its reason; it is still plugged and may be asked again.
            UnplugPendingError: No answer in time. The request lives on: a late answer changes the layout and is an
                event, and a new call joins it. It does not change the next boot.
            QmpVcpuError: As every change.
        """
        given = CheckedOptions.of(options)
        asked = describe("unplug", [vcpu])
        if given.affect is Affect.CONFIG:
            return await self._next_boot(asked).set_state(vcpu, enabled=False, placement=given.placement)
        change = self._unplug(vcpu, given, Result.IDS, asked)
        ids: VcpuMap = await self._change(change, lambda plan: _with_state(plan.ids, enabled=False))
        return ids

    @checked
    async def request_unplug(self, vcpu: int, **options: Unpack[ChangeOptions]) -> UnplugRequest:
        """Ask the guest to give a vCPU up, with its whole slot; return when QEMU has accepted.

        A removal that is under way is joined, as in ``unplug``. The next boot is not changed.

        Args:
            vcpu: The first vCPU id of the slot.
            **options: See ``ChangeOptions``; ``timeout`` has no effect: ``UnplugRequest.wait`` has its own.

        Raises:
            ValueError: ``affect`` is not LIVE.
            QmpVcpuError: As ``unplug``, but for the guest's answer.
        """
        given = _live("request_unplug", CheckedOptions.of(options))
        change = self._unplug(vcpu, given, Result.REMOVAL, describe("unplug", [vcpu]))
        removal, joined = await self._driver.request(change)
        return UnplugRequest(removal, self._driver, joined=joined)

    @checked
    async def set_state(self, vcpu: int, *, enabled: bool, **options: Unpack[ChangeOptions]) -> VcpuMap:
        """Make one vCPU, with its whole slot, plugged or unplugged; nothing is sent if it is so already.

        If a vCPU you want to keep has a pending removal, this waits for the answer and plugs it again if it left.

        Args:
            vcpu: The first vCPU id of the slot.
            enabled: True to have it plugged.
            **options: See ``ChangeOptions``.

        Returns:
            The ids of the slot.

        Raises:
            UnplugPendingError: Its removal is pending, and was not answered within ``timeout`` seconds.
            QmpVcpuError: As ``plug`` and ``unplug``.
        """
        given = CheckedOptions.of(options)
        asked = describe("plug" if enabled else "unplug", [vcpu])
        if given.affect is Affect.CONFIG:
            return await self._next_boot(asked).set_state(vcpu, enabled=enabled, placement=given.placement)
        change = Change(
            lambda now: plan_state(now, vcpu, given, enabled=enabled),
            given,
            Result.IDS,
            slot=vcpu,
            joins=not enabled,
            waits_for_plug=enabled,
            subject=asked,
            call="set_state",
        )

        def follow(plan: Plan) -> "ConfigChange":
            return _with_state(plan.ids or self.layout.slot_of(vcpu).ids, enabled=enabled)

        await self._change(change, follow)
        return find_slot(PLUG if enabled else UNPLUG, self.layout, vcpu).ids

    # The whole map.

    @checked
    def plan(self, target: str | Iterable[int], **options: Unpack[ChangeOptions]) -> Plan:
        """Return what ``set_map`` would do now; nothing is sent or read. ``str(plan)`` explains it.

        Args:
            target: The vCPUs to have plugged, as libvirt's cpuset text or as ids.
            **options: Those that ``set_map`` would be given; what a plan does not depend on has no effect.

        Raises:
            InvalidMapError: *target* is empty, or no set of vCPU ids. What cannot be done is in ``plan.denied``.
        """
        wanted = parse_target(target, self.layout)
        given = CheckedOptions.of(options)
        return plan_map(self._situation(given), wanted, given)

    @checked
    def plan_count(self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]) -> Plan:
        """Return what ``set_count`` would do now; nothing is sent or read. What cannot be done is in ``denied``."""
        given = CheckedOptions.of(options)
        return plan_count(self._situation(given), count, given, include_boot=include_boot)

    @checked
    async def set_map(self, target: str | Iterable[int] | Plan, **options: Unpack[ChangeOptions]) -> TransitionReport:
        """Make exactly these vCPUs plugged, boot vCPUs included.

        Planned from what is known when its turn comes; a step that is denied fails the whole before anything is
        sent, under every policy. Plugs come first. Idempotent: what is so already costs one query.

        If a vCPU you want removed has a pending removal, it is joined; if one you want to keep has, this waits for
        the answer and plugs it again if it left.

        With a record, the intent is on disk before the first command, and the outcome when this returns: two writes,
        and a third where it turns to reverting. Cancelling it while it runs stops it at the next safe point: replies
        of QEMU are awaited, the outcome is recorded; nothing is reverted.

        Args:
            target: The vCPUs to have plugged (libvirt's cpuset text, or ids), or a plan for this layout, which is
                carried out with the options given here, and with offline_first if it was planned so.
            **options: See ``ChangeOptions``.

        Returns:
            The report, slot by slot, if the map is reached; ``report.config`` tells of the next boot.

        Raises:
            TransitionError: It is not; ``error.report`` tells what happened, what was undone and what could not be.
                With ``affect=BOTH`` also where the map is reached and the next boot cannot be written
                (``__cause__`` says why): the outcome is PARTIAL, and nothing is undone.
            InvalidMapError: *target* is empty, or no set of vCPU ids.
            StepDeniedError: A step cannot or must not be sent; nothing was.
            StalePlanError: *target* is a plan, and the VM has changed since; nothing was sent.
            QmpVcpuError: As every change.
        """
        given = CheckedOptions.of(options)
        wanted = target.target if isinstance(target, Plan) else parse_target(target, self.layout)
        if isinstance(target, Plan) and any(step.asks_agent for step in target.steps):
            given = given._replace(offline_first=True)  # as it was planned

        def plan(now: Situation) -> Plan:
            if isinstance(target, Plan):
                check_plan(target, now.layout)
            return plan_map(now, wanted, given)

        return await self._whole_map(plan, given, f"map {wanted}", _with_map(wanted), call="set_map")

    @checked
    async def set_count(
        self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]
    ) -> TransitionReport:
        """Make so many vCPUs plugged, as libvirt's setVcpus does: the lowest free ones in, the highest removable out.

        Boot vCPUs stay, and a count below them is denied, naming them. A removal that is pending is joined before
        another vCPU is asked for. At the next boot a count may take out those that QEMU starts with, as libvirt does.

        Args:
            count: How many vCPUs to have plugged.
            include_boot: Take boot vCPUs out too, highest first, never vCPU 0.
            **options: See ``ChangeOptions``.

        Returns:
            The report, if the count is reached.

        Raises:
            QmpVcpuError: As ``set_map``.

        Source: libvirt, virDomainSetVcpusFlags; which vCPUs it chooses was measured with libvirt 9.0.0.
        """
        given = CheckedOptions.of(options)

        def plan(now: Situation) -> Plan:
            return plan_count(now, count, given, include_boot=include_boot)

        def follow(domain: "DomainVcpus") -> "DomainVcpus":
            from qmpvcpu.domainxml.next_boot import with_count  # XML is not for everybody

            return with_count(domain, count)

        return await self._whole_map(plan, given, f"count {count}", follow, call="set_count")

    @checked
    async def set_max(self, maximum: int) -> ConfigReport:
        """Have room for *maximum* vCPUs at the next boot; a running VM keeps the maximum that QEMU started with.

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
        """Stop the map that runs, at the next safe point, and return its report; None if none runs.

        Nothing more is sent, replies of QEMU are awaited, answers of the guest's are not: a removal that it works on
        is PENDING. Nothing is reverted. The caller of that map gets TransitionError with this report, or the report
        if the map was reached all the same. Those that wait for their turn go on.
        """
        report: TransitionReport | None = await self._driver.request(StopRunning())
        return report

    @property
    def last_report(self) -> TransitionReport | None:
        """What became of the last whole map that ended since ``attach``, or None.

        For those who did not wait for it: a map whose caller was cancelled (``asyncio.timeout``) ends at the next
        safe point, and ``cancel`` waits for that.
        """
        return self._engine.last_report

    # A map that something cut short.

    @property
    def interrupted(self) -> Intent | None:
        """The change that was begun and whose outcome is not recorded, or None.

        Its process died, or the connection was lost. A new ``set_map`` supersedes it.
        """
        return self._engine.intentions.interrupted

    @checked
    async def recover(self, how: Recovery, *, timeout: float | None = None) -> TransitionReport | None:
        """Look at the change that was cut short, and report it, finish it, or revert it.

        Only the slots of its steps are touched: what others have changed since stays.

        Args:
            how: REPORT tells what a fresh look shows of each step, changes nothing, and leaves it interrupted.
                FINISH goes on to its target under its policy. REVERT undoes what it had done.
            timeout: How long the guest has for each answer, in seconds; None: as long as the change gave it.

        Returns:
            The report; None if nothing was interrupted.

        Raises:
            TransitionError: What was asked for was not reached.
            StalePlanError: Another change has superseded it before its turn came; nothing was sent.
            QmpVcpuError: As ``set_map``.
        """
        intent = self.interrupted
        if intent is None:
            return None
        if how is Recovery.REPORT:
            return await self._seen(intent)
        from qmpvcpu.planning.recovery import finish_target, in_order_of, revert_plan, revert_target

        reverts = how is Recovery.REVERT
        direction = Direction.REVERTING if reverts else Direction.FORWARD
        options = CheckedOptions(
            on_failure=OnFailure.CONTINUE if reverts else intent.on_failure,
            timeout=intent.timeout if timeout is None else timeout,
            offline_first=not reverts and any(step.asks_agent for step in intent.steps),
        )

        begun = False

        def plan(now: Situation) -> Plan:
            nonlocal begun
            if not begun and self.interrupted is not intent:
                why = "another change has superseded the one that was cut short"
                raise StalePlanError(intent.start, now.layout.enabled, why)
            begun = True
            target = (revert_target if reverts else finish_target)(intent, now.layout)
            plan = plan_map(now, target, options)
            return revert_plan(intent, plan, now.layout) if reverts else in_order_of(intent, plan)

        change = Change(
            plan,
            options,
            intent=replace(intent, direction=direction),
            rebuilds=True,
            tries=_RECOVERIES,
            subject=f"map {intent.target}",
            call="recover",
        )
        follow = None if reverts else self._follow(intent)
        concerned = union(step.ids for step in intent.steps)  # who died may not have put them in their place
        try:
            report: TransitionReport = await self._change(change, follow)
        except TransitionError:
            await self.host.place_vcpus(concerned)
            raise
        await self.host.place_vcpus(concerned)
        return report

    async def _seen(self, intent: Intent) -> TransitionReport:
        """Return what a fresh look shows of *intent*, and of the next boot that it was to have."""
        from qmpvcpu.planning.recovery import observed_report

        report = observed_report(intent, await self.refresh())
        if intent.direction is Direction.REVERTING or intent.next_boot is None:
            return report
        self._follow(intent)
        now = await self._next_boot(f"map {intent.next_boot}").look(
            _with_map(intent.next_boot, intent.next_placement)
        )
        reached = report.outcome is TransitionOutcome.REACHED and now.ok
        outcome = TransitionOutcome.REACHED if reached else TransitionOutcome.PARTIAL
        return replace(report, outcome=outcome, affect=Affect.BOTH, config=now)

    def _follow(self, intent: Intent) -> "Callable[[Plan], ConfigChange] | None":
        """Return what is to follow *intent*, or None if nothing is.

        Raises:
            ConfigDeniedError: The next boot is, and it is kept in a document that ``attach`` was not given.
        """
        wanted = intent.next_boot
        if wanted is None:
            return None
        if self._next_boot(f"map {wanted}").path is None and intent.config is not None:
            detail = f"it was to be written to {intent.config}: attach with config= and that path"
            raise ConfigDeniedError(f"map {wanted}", wanted, DenialReason.NO_CONFIG, detail)
        return lambda _: _with_map(wanted, intent.next_placement)

    # Another QEMU for the same VM.

    @property
    def desired(self) -> VcpuMap | None:
        """The map that was last asked for, as the record has it; None if there is none."""
        return self._engine.intentions.desired

    @property
    def previous(self) -> "PreviousVcpus | None":
        """What an earlier QEMU of this VM had, and this one has not; None where nothing is kept.

        It is kept in the record, from one QEMU to the next, until this QEMU has the same vCPUs in the same order
        (``replay``), a change is asked for instead, or it is dropped (``drop_previous``).
        """
        return self._engine.intentions.previous

    async def drop_previous(self) -> None:
        """Keep nothing of an earlier QEMU any more; idempotent.

        Raises:
            RecordError: It cannot be recorded, and is kept.
        """
        await self._driver.request(DropPrevious())

    @checked
    async def replay(
        self,
        source: "DomainVcpus | Layout | PreviousVcpus | bytes | None" = None,
        **options: Unpack[ChangeOptions],
    ) -> TransitionReport:
        """Plug into a QEMU that is stopped what another, or an earlier one, had: the same vCPUs in the same order.

        For a QEMU started with ``launch.arguments(source).boot_argv`` and ``-S`` or ``-incoming``: QEMU itself says
        what each vCPU's slot takes. All is checked before anything is sent: the VM is prelaunch, paused or
        inmigrate, it has the same maximum, topology and NUMA cells as far as *source* says them, QEMU has started
        with the vCPUs that it is to start with, and what else is plugged is a beginning of the rest. So it is
        idempotent, and goes on where an earlier replay ended. At the end QEMU is read again, and the order compared.

        A change like ``set_map``: recorded, cancelled and recovered in the same way.

        Args:
            source: A domain document, what ``parse`` read of one, or another VM's layout. Of a record it is what the
                VM is next started with (``domainxml.start_of``). None: as the record of this VM has it, which needs
                ``previous``.
            **options: See ``ChangeOptions``; QEMU keeps the order of commands in flight. The next boot is not
                changed.

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
        from qmpvcpu.planning.replay import check_replayed, plan_replay
        from qmpvcpu.vm.migrating import replay_target

        given = _live("replay", CheckedOptions.of(options))
        wanted = self._kept() if source is None else replay_target(source)
        await self.refresh()  # a map looks at slots only, and others may have plugged some in another order
        change = Change(
            lambda now: plan_replay(now, wanted, given),
            given,
            rebuilds=True,
            subject="replay",
            call="replay",
        )
        report: TransitionReport = await self._driver.request(change)
        layout = await self.refresh()
        check_replayed(layout, wanted)
        if self.previous is not None:
            await self.drop_previous()
        return replace(report, layout=layout)

    def _kept(self) -> "ReplayTarget":
        """Return what the VM is to be started with by its record.

        Raises:
            ReplayMismatchError: Nothing is kept of an earlier QEMU.
        """
        from qmpvcpu.vm.migrating import replay_target

        record, previous = self._driver.writer.record, self.previous
        if previous is None:
            why = "attached without its record, or it is here again, was superseded by a change, or dropped"
            raise ReplayMismatchError([f"nothing is kept of an earlier QEMU: {why}; name what is to be replayed"])
        if record is None or record.next_boot is None:
            return replay_target(previous)
        from qmpvcpu.domainxml import domain_from

        return replay_target(replace(domain_from(self.layout), previous=previous, next_boot=record.next_boot))

    @cached_property
    def migration(self) -> "Migration":
        """What ``export``, ``take_back`` and ``qmpvcpu.migration`` are made of."""
        from qmpvcpu.vm.migrating import Migration

        return Migration(self._driver)

    @cached_property
    def run_control(self) -> "RunControl":
        """What ``qmpvcpu.certify`` pauses, resumes and resets the VM with."""
        from qmpvcpu.vm.run_control import RunControl

        return RunControl(self._driver)

    @checked
    async def export(self, *, settle: float = 0.0, allow_fatal: bool = False) -> "Export":
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
        """Have a source go on whose VM did not arrive; see ``qmpvcpu.migration.confirm_target``.

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

    # How it is done.

    def _situation(self, given: CheckedOptions) -> Situation:
        """Return what decides whether a change with these options may be planned now."""
        self._driver.look_at_host(given.placement)
        now = self._engine.situation_of(given)
        check_placement(now)
        return now

    def _unplug(self, vcpu: int, given: CheckedOptions, result: Result, asked: str) -> Change:
        return Change(
            lambda now: plan_unplug(now, vcpu, given),
            given,
            result,
            slot=vcpu,
            joins=True,
            subject=asked,
            call="unplug" if result is Result.IDS else "request_unplug",
        )

    async def _whole_map(
        self,
        plan: Callable[[Situation], Plan],
        given: CheckedOptions,
        asked: str,
        follow: "ConfigChange",
        *,
        call: str,
    ) -> TransitionReport:
        if given.affect is Affect.CONFIG:
            from qmpvcpu.vm.next_boot import and_placed

            config = await self._next_boot(asked).change(and_placed(follow, given.placement))
            return TransitionReport(
                start=config.start,
                target=config.target,
                on_failure=given.on_failure,
                outcome=TransitionOutcome.REACHED,
                steps=(),
                layout=self.layout,
                affect=Affect.CONFIG,
                config=config,
            )
        report: TransitionReport = await self._change(Change(plan, given, subject=asked, call=call), lambda _: follow)
        return report

    async def _change(self, change: Change, follow: "Callable[[Plan], ConfigChange] | None") -> Any:
        """Have *change* carried out; if it affects both sides, the next boot follows as *follow* says."""
        placement = change.options.placement
        if placement is None:
            return await self._carry_out(change, follow)
        # Those that are there already are of no step.
        there = {vcpu: place for vcpu, place in placement.vcpus.items() if vcpu in self.layout.enabled}
        if there or placement.emulator:
            self._deny_beforehand(change)
            wish = replace(placement, vcpus=there, cpuset=None, everywhere=False)
            await self._place_there(wish, required=change.options.requires_place(placement))
        came: set[int] = set()  # by changes before this one, which were to place them elsewhere

        def plan(now: Situation) -> Plan:
            came.update(placement.vcpus.keys() & {*now.layout.enabled} - there.keys())
            return change.plan(now)

        try:
            done = await self._carry_out(replace(change, plan=plan), follow)
            await self.host.place_vcpus(came)
        except asyncio.CancelledError:
            self._driver.start(self.host.place_vcpus(came))  # they are wanted there by now
            raise
        except QmpVcpuError:
            with contextlib.suppress(QmpVcpuError):
                await self.host.place_vcpus(came)
            raise
        return done

    async def _place_there(self, wish: "Placement", *, required: bool) -> None:
        """Put threads that are there in their place; unless that is *required*, leave those that cannot be.

        Raises:
            StepDeniedError: It is required, and the host does not allow it.
            PlacementError: It is required, and a thread could not be moved.
        """
        from qmpvcpu.model.placement import Place  # few changes have one

        try:
            await self.host.place(wish)
        except (StepDeniedError, PlacementError) as error:
            if required:
                raise
            parts = [replace(wish, vcpus={vcpu: place}, emulator=Place()) for vcpu, place in wish.vcpus.items()]
            parts += [replace(wish, vcpus={})] if wish.emulator else []
            failures = [error] if len(parts) == 1 else [await self._failure_to_place(part) for part in parts]
            for failure in filter(None, failures):
                _log.warning("%s", failure, extra={"vm": printable(self.layout.vm.name)})

    async def _failure_to_place(self, wish: "Placement") -> StepDeniedError | PlacementError | None:
        try:
            await self.host.place(wish)
        except (StepDeniedError, PlacementError) as error:
            return error
        return None

    async def _carry_out(self, change: Change, follow: "Callable[[Plan], ConfigChange] | None") -> Any:
        affects_both = change.options.affect is Affect.BOTH or change.intent is not None
        if follow is None or not affects_both:
            return await self._driver.request(change)
        await self._driver.check_open()
        begun: list[Change] = []
        work = self._driver.start(self._change_both(change, self._next_boot(change.subject), follow, begun))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # The next boot stays held until what was sent is taken in, even if nobody waits for it now.
            if work.cancelled() and not _is_cancelled():
                raise MonitorLostError("closed by this side") from None
            if begun:
                self._driver.put(Cancelled(begun[0]))
            else:
                work.cancel()
            raise

    def _deny_beforehand(self, change: Change) -> None:
        """Deny *change* while no thread is moved for it, unless what stands in its way is under way and may end.

        Raises:
            PlanError: It cannot be carried out.
        """
        try:
            plan = change.plan(self._situation(change.options))
            if change.result is Result.REPORT:
                check_plan(plan, self.layout)
        except StepDeniedError as error:
            if error.reason is not DenialReason.IN_PROGRESS:
                raise

    async def _change_both(
        self, change: Change, next_boot: "NextBoot", follow: "Callable[[Plan], ConfigChange]", begun: list[Change]
    ) -> Any:
        placement = change.options.placement
        from qmpvcpu.vm.next_boot import and_placed

        async with next_boot.pending(lambda plan: and_placed(follow(plan), placement)) as config:
            begun.append(replace(change, config=config))
            return await self._driver.begin(begun[0])

    def _next_boot(self, asked: str) -> "NextBoot":
        """Return what keeps the next boot, which needs no QEMU.

        Raises:
            ConfigDeniedError: Nothing does.
            MonitorLostError: This side has let go of the VM.
        """
        if self._driver.closed:
            raise MonitorLostError("closed by this side")
        if self._config is None:
            detail = "nothing keeps the next boot of this VM: attach with config=PATH, or with record=PATH"
            raise ConfigDeniedError(asked, VcpuMap(), DenialReason.NO_CONFIG, detail)
        return self._config


def _is_cancelled() -> bool:
    """Return True if somebody cancels the caller."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _live(asked: str, given: CheckedOptions) -> CheckedOptions:
    if given.affect is not Affect.LIVE:
        raise ValueError(f"affect is Affect.LIVE for {asked}, which changes no next boot, not {given.affect}")
    return given


def _with_state(ids: VcpuMap, *, enabled: bool) -> "ConfigChange":
    def change(domain: "DomainVcpus") -> "DomainVcpus":
        from qmpvcpu.domainxml.next_boot import with_state

        return with_state(domain, ids, enabled=enabled)

    return change


def _with_map(target: VcpuMap, placement: "Placement | None" = None) -> "ConfigChange":
    """Return the change to a next boot with these vCPUs, and with this placement if there is one."""

    def change(domain: "DomainVcpus") -> "DomainVcpus":
        from qmpvcpu.domainxml import with_placement
        from qmpvcpu.domainxml.next_boot import with_map

        changed = with_map(domain, target)
        return changed if placement is None else with_placement(changed, placement)

    return change
