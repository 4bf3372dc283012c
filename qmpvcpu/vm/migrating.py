"""A VM that moves to another QEMU: what leaves, whether it can arrive, whether it has, and the way back.

``migrate`` itself is the VMM's to send; this keeps it from losing the VM. ``replay_target`` says which vCPUs a QEMU
that is started anew must get.
"""

import asyncio
import contextlib
from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qmpvcpu.engine.messages import Arrived, ExportLock, Persist, Refresh
from qmpvcpu.engine.vmstate import Read
from qmpvcpu.errors import (
    CommandRejectedError,
    DomainXmlError,
    MonitorError,
    Outcome,
    RecordError,
    TakeBackError,
    TargetLostError,
    WaitTimeoutError,
)
from qmpvcpu.model.exported import ExportedState, PreviousVcpus
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.checks import check_export
from qmpvcpu.planning.compatibility import (
    Difference,
    DifferenceKind,
    arrival_failure,
    arrived,
    changes_since,
    compare_arrived,
    compare_target,
    raise_if_incompatible,
)
from qmpvcpu.planning.replay import ReplayTarget
from qmpvcpu.vm.driver import Driver

if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpus
    from qmpvcpu.model.placement import Placement

# A target that stays paused after the arrival announces nothing: it is asked this often, in seconds.
_LOOK_EVERY_S = 0.1


class Export:
    """What ``vm.export()`` returns: a handle on the source, which lets no vCPU change until it is released.

    An async context manager that releases it at the end. Nothing is written down of it: a new ``attach`` to the
    source finds it unlocked, and denies changes by QEMU's own word while the VM migrates and once it is away.

    Attributes:
        state: What left, as a value for the other side.
    """

    def __init__(self, migration: "Migration", state: ExportedState) -> None:
        self.state = state
        self._migration = migration

    def __repr__(self) -> str:
        layout = self.state.layout
        return f"<{type(self).__name__} of {layout.vm.name!r}: vCPUs {layout.enabled}{', locked' * self.locked}>"

    @property
    def locked(self) -> bool:
        """True while changes on the source are denied because of it."""
        return self._migration.locks(self)

    def to_json(self) -> dict[str, Any]:
        """Return ``state`` as a JSON object; ``ExportedState.from_json`` reads it on another host."""
        return self.state.to_json()

    def release(self) -> None:
        """Let vCPUs of the source change again; idempotent. One that has migrated away denies it all the same."""
        if self.locked:
            self._migration.unlock()

    async def changes(self) -> tuple[Difference, ...]:
        """Read the source again, and return in which vCPUs it differs from ``state``.

        A guest can let go of a vCPU after the export, if its removal was pending; the target, built for ``state``,
        then has one that the guest does not know, and nobody says so. Once the source is in ``postmigrate`` the
        answer is final.

        Raises:
            MonitorError: The source is gone or silent.
        """
        return changes_since(self.state, await self._migration.look())

    async def take_back(self, *, destination_is_gone: bool) -> Layout:
        """As ``vm.take_back``, and release the export."""
        return await self._migration.take_back(destination_is_gone=destination_is_gone)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Migration:
    """What one VM, source or target, does for its migration."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._state = driver.engine.state
        self._export: Export | None = None
        self._arrived = False  # and has been confirmed to have

    def locks(self, export: Export) -> bool:
        """Return True if changes are denied because of *export*."""
        return self._export is export and not self._driver.engine.closed

    def unlock(self) -> None:
        """Let vCPUs change again."""
        self._export = None
        self._driver.put(ExportLock(locked=False))

    async def look(self) -> Layout:
        """Read slots and run state anew."""
        await self._driver.request(Refresh())
        return self._driver.layout

    # The source.

    async def export(self, *, settle: float, allow_fatal: bool) -> Export:
        """See ``VcpuController.export``."""
        async with self._driver.held():
            await self._read_status()
            check_export(self._state.situation, allow_fatal=allow_fatal)
            self._driver.put(ExportLock(locked=True))
        try:
            with contextlib.suppress(WaitTimeoutError):
                await self._driver.wait_for(lambda layout: not layout.pending_slots, settle)
            # Commands that nobody waits for any more are answered before this: QEMU keeps the order.
            layout = await self.look()
            check_export(self._state.situation._replace(exported=False), allow_fatal=allow_fatal)
            xml = _xml_of(layout, self._state.places.placement)
            export = Export(self, ExportedState(layout, desired=self._driver.engine.intentions.desired, xml=xml))
        except BaseException:
            self.unlock()
            raise
        self._export = export
        return export

    async def take_back(self, *, destination_is_gone: bool) -> Layout:
        """See ``VcpuController.take_back``."""
        if destination_is_gone is not True:
            why = "only its caller can know that the destination is gone, and must say so: a VM must never run twice"
            raise TakeBackError(self._driver.layout.vm.name, why)
        await self._driver.check_open()
        work = self._driver.start(self._take_back())
        return await asyncio.shield(work)  # JUSTIFICATION: what was sent is taken in, even if nobody asks now

    async def _take_back(self) -> Layout:
        driver, name = self._driver, self._driver.layout.vm.name
        async with driver.held():
            await self._read_status()
            status = self._status()
            if not _is_left_behind(status):
                why = f"run state {status.run_state}, migration {status.migration}: no VM that was left behind"
                if status.run_state == "running":
                    why += "; it runs here, so there is nothing to take back: end the export that is open, if one is"
                raise TakeBackError(name, why, run_state=status.run_state)
            try:
                await driver.connection.monitor.execute("cont", timeout=driver.engine.reply_timeout)
            except CommandRejectedError as error:
                raise TakeBackError(name, str(error), run_state=status.run_state) from error
            layout = await self.look()
            status = self._status()
            if status.run_state != "running":
                why = f"it was told to go on, and does not: run state {status.run_state}"
                raise TakeBackError(name, why, run_state=status.run_state, outcome=Outcome.UNKNOWN)
            self.unlock()
            return layout

    # The target.

    async def check(self, state: ExportedState, accept: Collection[DifferenceKind]) -> tuple[Difference, ...]:
        """See ``check_target``."""
        layout = await self.look()
        return raise_if_incompatible(state.name, compare_target(state, layout, self._status()), accept)

    async def confirm(self, state: ExportedState, timeout: float) -> tuple[Difference, ...]:
        """See ``confirm_target``."""
        driver = self._driver
        try:
            await self._wait_arrived(state.name, timeout)
            layout, answers = await asyncio.gather(self.look(), driver.connection.reader.answers())
        except MonitorError as error:
            raise TargetLostError(state.name, str(error)) from error
        found = raise_if_incompatible(state.name, compare_arrived(state, layout))
        if not self._arrived:
            self._arrived = True
            # Nobody asked for what was plugged here to make room for the VM.
            driver.put(Arrived(state.pending, answers, state.desired))
        # The source's record is of no use once the source is quit.
        try:
            await driver.request(Persist())
        except RecordError as error:
            why = f"{error.why}; VM {state.name!r} has arrived, and not recorded"
            raise RecordError(error.path, why, outcome=Outcome.CHANGED) from error
        return found

    async def _wait_arrived(self, name: str, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        await self._driver.check_open()
        while True:
            await self._read_status()
            status = self._status()
            if arrived(status):
                return
            left = deadline - loop.time()
            why = arrival_failure(status)
            if not why and left <= 0:
                why = f"after {timeout:g} s it has run state {status.run_state}, migration {status.migration}"
            if why:
                raise TargetLostError(name, why)
            await self._wait_news(status, min(left, _LOOK_EVERY_S))

    async def _wait_news(self, seen: VmStatus, limit: float) -> None:
        with contextlib.suppress(WaitTimeoutError):
            await self._driver.wait_for(lambda _: self._status() != seen, limit)

    def _status(self) -> VmStatus:
        return self._state.status or VmStatus("unknown")

    async def _read_status(self) -> None:
        await self._driver.request(Refresh(Read.NONE))


def _is_left_behind(status: VmStatus) -> bool:
    """Return True if the VM failed to migrate and is stopped here."""
    return status.migrated_away or (status.run_state == "paused" and status.migration in {"failed", "cancelled"})


def _xml_of(layout: Layout, placement: "Placement | None") -> bytes | None:
    # Here, and not above: XML is a large part of the time that importing us would take.
    from qmpvcpu.domainxml import render

    try:
        return render(layout, placement=placement)
    except DomainXmlError:
        return None


def replay_target(source: "DomainVcpus | Layout | PreviousVcpus | bytes") -> ReplayTarget:
    """Return which vCPUs a QEMU that is started as *source* says must get.

    Raises:
        DomainXmlError: It is no domain document that can be read.
        TypeError: It is none of these; a document is bytes.
    """
    if isinstance(source, Layout | PreviousVcpus):
        return ReplayTarget.of(source)
    from qmpvcpu.domainxml import DomainVcpus, parse, start_of  # here, as in _xml_of
    from qmpvcpu.domainxml.cpu import qemu_model

    source = start_of(source if isinstance(source, DomainVcpus) else parse(source))
    return ReplayTarget(
        max=source.max,
        started_with=source.started_with,
        later=source.order,
        topology=source.topology,
        cells={each: cell.id for cell in source.numa for each in cell.cpus},
        model=None if source.cpu is None else qemu_model(source),
    )
