"""Keeper: the record in step with the VM. Intents before commands, outcomes after, nothing in between."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpvcpu.errors import Outcome, RecordError, printable
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import Action, Intent, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vmstate import PreviousVcpus

if TYPE_CHECKING:
    from qmpvcpu.record.record import Record

_log = logging.getLogger("qmpvcpu.vm")

# What nobody waits for is written this much later: changes come in bursts, and most unplugs are answered in less.
_SOON_S = 0.02


class Keeper:
    """Writes the record of one VM; without a record it only remembers.

    Args:
        record: Where to write, or None.
        look: Returns the layout as known now.
        interrupted: The transition that the record says was begun and is not over, or None.
        desired: The map that was last asked for, or None.
        previous: What an earlier QEMU had and this one has not been given again, or None.

    Attributes:
        record: As given.
        interrupted: As given, until it is taken up or superseded.
        desired: As given; the map that is asked for, from the first command on.
        previous: As given, until the VM has it, or a change is asked for that is not to bring it back.
        promised: Returns what the next boot is to have once what is under way is reached, and the document that it is
            kept in (None: the record); None: nothing was promised.
    """

    def __init__(
        self,
        record: "Record | None",
        look: Callable[[], Layout],
        *,
        interrupted: Intent | None = None,
        desired: VcpuMap | None = None,
        previous: PreviousVcpus | None = None,
    ) -> None:
        self.record = record
        self.interrupted = interrupted
        self.desired = desired
        self.previous = previous
        self._look = look
        self._transition: Intent | None = None
        self.promised: Callable[[], tuple[VcpuMap, str | None] | None] = lambda: None
        self._steps: list[Step] = []  # of single commands, each its own intent
        self._ended: list[Step] = []  # of these, those that are not over until the next boot is written too
        self._holds = 0
        self._saved: object = None
        self._saving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._drop_if_there()

    def _drop_if_there(self) -> None:
        if self.previous is not None and self.previous.is_there(self._look()):
            self.previous = None

    @property
    def intent(self) -> Intent | None:
        """What is under way, or was left so."""
        base = self._transition or self.interrupted
        if not self._steps:
            return base
        enabled = self._look().enabled
        plugged = {each for step in self._steps if step.action is Action.PLUG for each in step.ids}
        unplugged = {each for step in self._steps if step.action is Action.UNPLUG for each in step.ids}
        start, target = (base.start, base.target) if base is not None else (enabled, enabled)
        before = base.steps if base is not None else ()
        own = Intent(start, VcpuMap((target | plugged) - unplugged), (*before, *self._steps))
        if base is not None:
            own = replace(own, next_boot=base.next_boot, config=base.config)
        return self._with_next_boot(own)

    def _with_next_boot(self, intent: Intent) -> Intent:
        promised = self.promised()
        return intent if promised is None else replace(intent, next_boot=promised[0], config=promised[1])

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Write nothing but intents inside: what changes meanwhile is written at the end, at once."""
        self._holds += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            yield
        finally:
            self._holds -= 1
            self.changed()

    def changed(self) -> None:
        """Note that something may have changed; it is written soon, and by nobody in particular."""
        self._drop_if_there()
        if self.record is None or self.record.read_only or self.record.closed:
            # What comes after the end is for the next one who looks.
            return
        if self._timer is None and not self._holds and self._state() != self._saved:
            self._timer = asyncio.get_running_loop().call_later(_SOON_S, self._start)

    def _start(self) -> "asyncio.Task[None]":
        """Begin to write what is not written, or join who does."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._saving is None or self._saving.done():
            self._saving = asyncio.get_running_loop().create_task(self._save_all())
            self._saving.add_done_callback(self._look_at_save)
        return self._saving

    async def begin(self, intent: Intent, *, rebuilds: bool = False) -> None:
        """Record a transition, durably, before its first command, or as it turns back.

        What an earlier QEMU had is kept if it *rebuilds* that, and superseded by any other.

        Raises:
            RecordError: It could not be recorded.
        """
        before = self._transition, self.interrupted, self.desired, self.previous
        self._transition, self.interrupted, self.desired = self._with_next_boot(intent), None, intent.target
        if not rebuilds:
            self.previous = None
        try:
            await self.save()
        except RecordError:
            self._transition, self.interrupted, self.desired, self.previous = before
            raise

    async def end(self, left: Intent | None, desired: VcpuMap) -> None:
        """Record the outcome of a transition; *left* is what of it is still unknown.

        Raises:
            RecordError: It could not be recorded.
        """
        left = None if left is None else self._with_next_boot(left)
        self._transition, self.interrupted, self.desired = None, left, desired
        self._drop_if_there()
        await self.save()

    async def drop_previous(self) -> None:
        """Keep nothing of an earlier QEMU any more, durably.

        Raises:
            RecordError: It could not be recorded, and is kept.
        """
        before, self.previous = self.previous, None
        try:
            await self.save()
        except RecordError:
            self.previous = before
            raise

    def abandon(self) -> None:
        """Leave the transition in the record as it stands: the connection is lost, the next look will tell."""
        self._transition, self.interrupted = None, self._transition or self.interrupted

    def forget(self, had: Layout) -> None:
        """Drop what was under way, or was left so: it was of a QEMU that is no more, which *had* these vCPUs."""
        self._transition = self.interrupted = None
        if self.previous is None and 0 in had.enabled:
            self.previous = PreviousVcpus.of(had)
        self.changed()

    async def begin_step(self, step: Step) -> None:
        """Record a single command, durably, before it is sent.

        Raises:
            RecordError: It could not be recorded.
        """
        before = self.desired, self.previous
        self.previous = None
        if self.record is None:
            return
        self._steps.append(step)
        wished = self.desired if self.desired is not None else self._look().enabled
        self.desired = VcpuMap(wished | step.ids if step.action is Action.PLUG else wished - step.ids)
        try:
            await self.save()
        except RecordError:
            self._steps.remove(step)
            self.desired, self.previous = before
            raise

    def end_step(self, step: Step) -> None:
        """Note that QEMU has replied to a single command; written with whatever comes of it."""
        if step not in self._steps:
            return
        if self.promised() is None:
            self._steps.remove(step)
        else:
            self._ended.append(step)

    def promises_are_over(self) -> None:
        """Note that nothing of the next boot is promised any more: what QEMU has replied to is over too."""
        for step in self._ended:
            self._steps.remove(step)
        self._ended.clear()
        self.changed()

    async def written(self, done: str) -> None:
        """Wait until what is known now is on disk; if that fails, say that *done* is done all the same.

        Raises:
            RecordError: It is not on disk; ``outcome`` is CHANGED.
        """
        if self.record is None:
            return
        try:
            await asyncio.shield(self._start())  # JUSTIFICATION: one caller's cancel must not cancel the save
        except RecordError as error:
            raise RecordError(
                error.path, f"{error.why}; {done}, and not recorded", outcome=Outcome.CHANGED
            ) from error

    async def close(self) -> None:
        """Write what is not written, and let go of the record."""
        if self.record is None:
            return
        # What failed before is tried once more: the disk may have room again, or an edited record be put right.
        if self._saved is not None and self._state() != self._saved:
            await asyncio.wait({self._start()})
        await self.record.close()

    def _state(self) -> object:
        next_boot = None if self.record is None else self.record.next_boot
        return self._look().generation, self.intent, self.desired, self.previous, next_boot

    async def save(self) -> None:
        """Write what is known now, durably.

        Raises:
            RecordError: It cannot be written.
        """
        if self.record is not None:
            state = self._state()
            await self.record.write(self._look(), intent=self.intent, desired=self.desired, previous=self.previous)
            self._saved = state

    async def _save_all(self) -> None:
        while self._state() != self._saved:
            await self.save()
            if self._holds:  # what changes from here on is for the end
                return

    def _look_at_save(self, saving: "asyncio.Task[None]") -> None:
        """Tell of a save that failed with nobody waiting for it; the next change tries again."""
        if not saving.cancelled() and (error := saving.exception()) is not None:
            _log.error("%s", error, extra={"vm": printable(self._look().vm.name)})
