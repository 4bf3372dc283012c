"""A VM that moves to another QEMU: what leaves, whether it can arrive, whether it has, and the way back.

``migrate`` itself is the VMM's to send; this keeps it from losing the VM.
"""

import asyncio
import contextlib
from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qmpvcpu.errors import (
    CommandRejectedError,
    DomainXmlError,
    MonitorError,
    MonitorLostError,
    Outcome,
    TakeBackError,
    TargetLostError,
    TargetMismatchError,
    WaitTimeoutError,
)
from qmpvcpu.given import checked
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.model.vmstate import VmState
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
from qmpvcpu.vm.session import Session
from qmpvcpu.vm.turns import Turns

if TYPE_CHECKING:
    from qmpvcpu.vm.controller import VcpuController

# A target that stays paused after the arrival announces nothing: it is asked this often, in seconds.
_LOOK_EVERY_S = 0.1


class Export:
    """What ``vm.export()`` returns: a handle on the source, which lets no vCPU change until it is released.

    An async context manager that releases it at the end. Nothing is written down of it: a new ``attach`` to the
    source finds it unlocked, and denies changes by QEMU's own word while the VM migrates and once it is away.

    Attributes:
        state: What left, as a value for the other side.
    """

    def __init__(self, migration: "Migration", state: VmState) -> None:
        self.state = state
        self._migration = migration

    @property
    def locked(self) -> bool:
        """True while changes on the source are denied because of it."""
        return self._migration.locks(self)

    def to_json(self) -> dict[str, Any]:
        """Return ``state`` as a JSON object; ``VmState.from_json`` reads it on another host."""
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

    def __init__(self, session: Session, turns: Turns) -> None:
        self._session = session
        self._engine = session.engine
        self._turns = turns
        self._export: Export | None = None
        self._arrived = False  # and has been confirmed to have

    def locks(self, export: Export) -> bool:
        """Return True if changes are denied because of *export*."""
        return self._export is export and not self._session.closed

    def unlock(self) -> None:
        """Let vCPUs change again."""
        self._export, self._engine.exported = None, False

    async def look(self) -> Layout:
        """Read slots and run state anew."""
        return await self._session.refresh()

    # The source.

    async def export(self, *, settle: float, allow_fatal: bool) -> Export:
        """See ``VcpuController.export``."""
        async with self._turns.alone():
            await self._session.know_status()
            check_export(self._engine.situation, allow_fatal=allow_fatal)
            self._engine.exported = True
        try:
            with contextlib.suppress(WaitTimeoutError):
                await self._session.wait_for(lambda layout: not layout.pending_slots, settle)
            # Commands that nobody waits for any more are answered before this: QEMU keeps the order.
            layout = await self.look()
            check_export(self._engine.situation._replace(exported=False), allow_fatal=allow_fatal)
            export = Export(self, VmState(layout, desired=self._session.keeper.desired, xml=_xml_of(layout)))
        except BaseException:
            self.unlock()
            raise
        self._export = export
        return export

    async def take_back(self, *, destination_is_gone: bool) -> Layout:
        """See ``VcpuController.take_back``."""
        if destination_is_gone is not True:
            why = "only its caller can know that the destination is gone, and must say so: a VM must never run twice"
            raise TakeBackError(self._engine.layout.vm.name, why)
        await self._session.check_open()
        work = self._session.start(self._take_back())
        return await asyncio.shield(work)  # JUSTIFICATION: what was sent is taken in, even if nobody asks now

    async def _take_back(self) -> Layout:
        session, name = self._session, self._engine.layout.vm.name
        async with self._turns.alone():
            await session.read_status()
            status = self._status()
            if not _is_left_behind(status):
                why = f"run state {status.run_state}, migration {status.migration}: no VM that was left behind"
                if status.run_state == "running":
                    why += "; it runs here, so there is nothing to take back: end the export that is open, if one is"
                raise TakeBackError(name, why, run_state=status.run_state)
            try:
                await session.monitor.execute("cont", timeout=session.timeout)
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

    async def check(self, state: VmState, accept: Collection[DifferenceKind]) -> tuple[Difference, ...]:
        """See ``check_target``."""
        layout = await self.look()
        return raise_if_incompatible(state.name, compare_target(state, layout, self._status()), accept)

    async def confirm(self, state: VmState, timeout: float) -> tuple[Difference, ...]:
        """See ``confirm_target``."""
        session = self._session
        try:
            await self._wait_arrived(state.name, timeout)
            layout, answers = await asyncio.gather(self.look(), session.reader.answers())
        except MonitorError as error:
            raise TargetLostError(state.name, str(error)) from error
        found = raise_if_incompatible(state.name, compare_arrived(state, layout))
        if not self._arrived:
            self._arrived = True
            self._engine.arrived(state.pending, answers, session.loop.time())
            # What was plugged here to make room for the VM was nobody's wish.
            session.keeper.desired = state.desired
            session.publish()
        # The source's record is of no use once the source is quit.
        await session.keeper.written(f"VM {state.name!r} has arrived")
        return found

    async def _wait_arrived(self, name: str, timeout: float) -> None:
        session = self._session
        deadline = session.loop.time() + timeout
        await session.check_open()
        while True:
            await session.read_status()
            status = self._status()
            if arrived(status):
                return
            left = deadline - session.loop.time()
            why = arrival_failure(status)
            if not why and left <= 0:
                why = f"after {timeout:g} s it has run state {status.run_state}, migration {status.migration}"
            if why:
                raise TargetLostError(name, why)
            await self._wait_news(status, min(left, _LOOK_EVERY_S))

    async def _wait_news(self, seen: VmStatus, limit: float) -> None:
        with contextlib.suppress(WaitTimeoutError):
            await self._session.wait_for(lambda _: self._status() != seen, limit)

    def _status(self) -> VmStatus:
        return self._engine.status or VmStatus("unknown")


async def check_target(
    export: Export | VmState, vm: "VcpuController", *, accept: Collection[DifferenceKind] = ()
) -> tuple[Difference, ...]:
    """Look whether the QEMU of *vm*, which waits for a migration, can take over what was exported.

    To be called before ``migrate-incoming`` and ``migrate``: a target that lacks a slot dies while an older source
    reports ``completed``; one with a slot too many is accepted silently. Changes nothing.

    Args:
        export: What ``vm.export()`` returned on the source, or its state (``VmState.from_json`` on another host).
        vm: The target, attached; its QEMU was started with ``-incoming``.
        accept: Kinds of difference that the caller knows to be right, such as ``DifferenceKind.QEMU_VERSION``.

    Returns:
        The differences that do no harm, and those that were accepted.

    Raises:
        TargetMismatchError: It cannot, or what arrives would not be what left; ``differences`` has all of them.
        MonitorError: The target is gone or silent.

    Source: measured on QEMU 7.2.22 and 10.0.2.
    """
    return await vm.migration.check(_state_of(export), accept)


@checked
async def confirm_target(
    export: Export | VmState,
    vm: "VcpuController",
    *,
    timeout: float = 10.0,
) -> tuple[Difference, ...]:
    """Make sure that the VM has arrived in the QEMU of *vm*; only then may the source be quit.

    It has if QEMU answers, completed an incoming migration, runs the VM or keeps it paused, and has exactly the vCPUs
    that were exported. With an Export of this process whose source is attached, the source is read again too: a guest
    may have let go of a vCPU on the way. What was pending is taken over: an answer is then known to be a late one of
    ours. So is the map that was asked for last. With a record, both are on disk when this returns. Calling it again
    compares again, and takes nothing over a second time.

    Args:
        export: As in ``check_target``.
        vm: The target, attached before the migration or after it.
        timeout: How long the VM may take to arrive, in seconds from now.

    Returns:
        The differences that do no harm.

    Raises:
        TargetLostError: The target died, is silent, or the VM has not arrived in time. The source still has it:
            ``export.take_back()``.
        TargetMismatchError: It has arrived, with other vCPUs.
        MonitorError: It has arrived, and the source does not answer.
        RecordError: It has arrived, and the target's record cannot be written.
    """
    state = _state_of(export)
    found = await vm.migration.confirm(state, timeout)
    if isinstance(export, Export):
        with contextlib.suppress(MonitorLostError):  # whoever let go of the source, or quit it, has said so
            changes = await export.changes()
            if changes:
                raise TargetMismatchError(state.name, changes, found)
    return found


def _state_of(export: Export | VmState) -> VmState:
    return export.state if isinstance(export, Export) else export


def _is_left_behind(status: VmStatus) -> bool:
    """Return True if a VM stands here that was to migrate, and does not run."""
    return status.migrated_away or (status.run_state == "paused" and status.migration in {"failed", "cancelled"})


def _xml_of(layout: Layout) -> bytes | None:
    # Here, and not above: XML is a large part of the time that importing us would take.
    from qmpvcpu.domainxml import render

    try:
        return render(layout)
    except DomainXmlError:
        return None
