"""RecordWriter: keeps the record in step with the VM: when the engine asks, and soon after anything changed."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from qmpvcpu.engine.engine import Engine
from qmpvcpu.errors import RecordError, printable

if TYPE_CHECKING:
    from qmpvcpu.record.record import Record

_log = logging.getLogger("qmpvcpu.vm")

# What nobody waits for is written this much later: changes come in bursts, and most unplugs are answered in less.
_SOON_S = 0.02


class RecordWriter:
    """Writes the record of one VM; without a record it does nothing.

    Args:
        record: Where to write, or None.
        engine: What there is to be written.
    """

    def __init__(self, record: "Record | None", engine: Engine) -> None:
        self.record = record
        self._engine = engine
        self._saved: object = None
        self._given: object = None  # what is on its way to the disk, or there
        self._writing: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """True once the connection is gone for good: the record is closed, or about to be."""
        return self._engine.closed or self.record is None or self.record.closed

    async def save(self) -> None:
        """Write what is so now, durably, unless that is on disk.

        Raises:
            RecordError: It cannot be written.
        """
        if self.record is None:
            return
        if self._state() == self._given and self._writing is None:
            return
        if self._writing is None or self._state() != self._given:
            self._given = self._state()
            recorded = self._engine.recorded
            writing = self.record.write(
                self._engine.layout,
                intent=recorded.intent,
                desired=recorded.desired,
                previous=recorded.previous,
                placement=recorded.placement,
            )
            self._writing = asyncio.get_running_loop().create_task(self._write(writing, self._given))
        await asyncio.shield(self._writing)  # one caller's cancel must not cancel another's save

    async def _write(self, writing: Coroutine[Any, Any, None], state: object) -> None:
        try:
            await writing
            self._saved = state
        finally:
            if self._given == state:
                self._given, self._writing = self._saved, None

    def changed(self) -> None:
        """Note that something may have changed; it is written soon, and nobody in particular waits for that."""
        if self.record is None or self.record.read_only or self.record.closed:
            return  # changes after close are not recorded
        if self._timer is None and not self._engine.holds_saves and self._state() != self._given:
            self._timer = asyncio.get_running_loop().call_later(_SOON_S, self._save_soon)

    async def close(self) -> None:
        """Write what is not written, and let go of the record."""
        if self.record is None:
            return
        self._stop_timer()
        # What failed before is tried once more: the disk may have room again, or an edited record be put right.
        if self._saved is not None and not self.record.closed and self._state() != self._given:
            self._save_soon()
        if self._saving is not None:
            await asyncio.wait({self._saving})
        await self.record.close()

    def _state(self) -> object:
        record = self.record
        return self._engine.recorded, record and (record.next_boot, record.next_placement)

    def _save_soon(self) -> None:
        self._stop_timer()
        if self._engine.holds_saves or self._state() == self._given:
            return
        if self._saving is None or self._saving.done():
            self._saving = asyncio.get_running_loop().create_task(self._save_all())

    async def _save_all(self) -> None:
        """Write until nothing is left to be written; the next change tries again what failed."""
        try:
            while not self._engine.holds_saves and self._state() != self._given:
                await self.save()
        except RecordError as error:
            _log.error("%s", error, extra={"vm": printable(self._engine.layout.vm.name)})

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
