"""Commands: the two that change a VM, sent, and their replies told to the engine."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from qmpvcpu import qapi
from qmpvcpu.engine.ledger import Read
from qmpvcpu.engine.removal import Evidence, Removal, State
from qmpvcpu.errors import CommandRejectedError, MonitorError, OutcomeUnknownError, RecordError
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.verdicts import Rejected
from qmpvcpu.vm.request import rejected_error
from qmpvcpu.vm.session import Session


class Commands:
    """Sends ``device_add`` and ``device_del``; the engine has been told that they are about to be sent."""

    def __init__(self, session: Session, look: Callable[[], Awaitable[Layout]]) -> None:
        self._session = session
        self._engine = session.engine
        self._keeper = session.keeper
        self._look = look
        self._asking: dict[int, asyncio.Task[None]] = {}  # by slot: the device_del without a reply

    def start_unplug(self, first: int, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what asks for the slot of vCPU *first*, so that others find the reply; see ``reply_to``."""
        task = self._asking[first] = self._session.start(work)

        def forget(_: asyncio.Task[None]) -> None:
            if self._asking.get(first) is task:
                del self._asking[first]

        task.add_done_callback(forget)
        return task

    async def reply_to(self, removal: Removal) -> None:
        """Wait for QEMU's reply to a removal that somebody else has asked for.

        Raises:
            CommandRejectedError: QEMU rejected it.
            OutcomeUnknownError: The connection was lost, or silent.
            RecordError: It could not be recorded, and was not sent.
        """
        task = self._asking.get(min(removal.ids))
        if task is not None:
            await self._session.replied(Action.UNPLUG.value, removal.ids, task)
        if removal.state is State.REJECTED:
            raise rejected_error(removal)

    async def plug(self, slot: Slot, path: str) -> None:
        """Plug *slot*, at *path*.

        Raises:
            CommandRejectedError: QEMU answered with an error; nothing was plugged.
            OutcomeUnknownError: The connection was lost with the command in flight.
        """
        try:
            await self._session.monitor.execute("device_add", qapi.device_add(slot, path))
        except CommandRejectedError as error:
            self._engine.plug_failed(slot.first)
            raise _rejected(Action.PLUG, slot, error, await self._explain(slot, Action.PLUG, path)) from error
        except MonitorError as error:
            self._engine.plug_lost(slot.first)
            self._session.want(Read.FULL)  # if it is there all the same, that is found
            raise OutcomeUnknownError("plug", slot.ids, str(error)) from error
        self._engine.plug_accepted(slot.first)
        self._session.publish()

    async def unplug(self, slot: Slot, removal: Removal) -> None:
        """Have QEMU ask the guest for *slot*.

        Raises:
            CommandRejectedError: QEMU answered with an error, and it is still there.
            OutcomeUnknownError: The connection was lost with the command in flight.
        """
        try:
            await self._session.monitor.execute("device_del", qapi.device_del(slot))
        except CommandRejectedError as error:
            hint = await self._explain(slot, Action.UNPLUG)
            self._replied(removal, Evidence.REJECTION, Rejected(slot.ids, error.error_class, error.desc, hint))
            if removal.state is not State.UNPLUGGED:  # if the look showed it gone, that is what was asked for
                raise _rejected(Action.UNPLUG, slot, error, hint) from error
        except MonitorError as error:
            self._replied(removal, Evidence.LOST)
            self._session.want(Read.FULL)
            raise OutcomeUnknownError("unplug", slot.ids, str(error)) from error
        else:
            self._replied(removal, Evidence.ACCEPTED)

    async def plug_alone(self, slot: Slot, path: str) -> None:
        """Plug *slot* at *path*, as a transition of its own: recorded before.

        Raises:
            RecordError: The record cannot be written; nothing was sent.
            StepError: As ``plug``.
        """
        step = Step(Action.PLUG, slot.ids)
        try:
            await self._keeper.begin_step(step)
        except RecordError:
            self._engine.plug_failed(slot.first)
            raise
        try:
            await self.plug(slot, path)
        finally:
            self._keeper.end_step(step)

    async def unplug_alone(self, slot: Slot, removal: Removal) -> None:
        """Ask for *slot*, as a transition of its own: recorded before.

        Raises:
            RecordError: The record cannot be written; nothing was sent.
            StepError: As ``unplug``.
        """
        step = Step(Action.UNPLUG, slot.ids, slot.qom_path)
        try:
            await self._keeper.begin_step(step)
        except RecordError as error:
            self._replied(removal, Evidence.REJECTION, Rejected(slot.ids, type(error).__name__, str(error)))
            raise
        try:
            await self.unplug(slot, removal)
        finally:
            self._keeper.end_step(step)

    def _replied(self, removal: Removal, evidence: Evidence, rejection: Rejected | None = None) -> None:
        self._engine.unplug_replied(removal, evidence, self._session.loop.time(), rejection=rejection)
        self._session.publish()

    async def _explain(self, slot: Slot, action: Action, path: str = "") -> str:
        """Look at the VM after a rejection, since QEMU's texts are no ground to stand on."""
        try:
            layout = await self._look()
            if action is Action.PLUG:
                self._engine.others_read(await self._session.reader.other_paths())
        except MonitorError:
            return ""
        status = self._engine.status
        if status is not None and (status.migrating or status.migrated_away):
            return f"the VM is migrating or has migrated: run state {status.run_state}, migration {status.migration}"
        now = layout.slot_of(slot.first)
        if action is Action.PLUG:
            return self._explain_plug(now, path)
        if not now.present:
            return "it is gone already"
        if layout.vm.arch in {"x86_64", "i386"}:
            return (
                "it is still plugged; most likely the guest's ACPI hotplug is not up yet (firmware, early boot, or no"
                " ACPI): ask again once the guest runs"
            )
        return "it is still plugged"

    def _explain_plug(self, now: Slot, path: str) -> str:
        if now.present:
            return f"the slot is occupied meanwhile, by {now.qom_path}"
        if self._engine.is_taken(path):
            return f"another device is {path}: ask again, and the vCPU gets another id"
        # Until QEMU has joined the thread of a vCPU, its slot is empty and its id is taken.
        return "the slot is empty; if a vCPU has just left it, QEMU may hold its id for a moment: ask again"


def _rejected(action: Action, slot: Slot, error: CommandRejectedError, hint: str) -> CommandRejectedError:
    return CommandRejectedError(
        error.error_class, error.desc, error.sent, action=action.value, ids=slot.ids, hint=hint
    )
