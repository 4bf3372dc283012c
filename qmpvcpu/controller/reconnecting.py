"""Reconnecting: finds QEMU again after the connection was lost, and makes sure that it is the same VM."""

import asyncio
import logging
from typing import TYPE_CHECKING

from qmpvcpu.controller.inbox import Inbox
from qmpvcpu.controller.session import Session
from qmpvcpu.errors import MalformedReplyError, MonitorError, MonitorLostError
from qmpvcpu.monitor import Monitor, Target
from qmpvcpu.reading import Reader

if TYPE_CHECKING:
    from qmpvcpu.domainxml import Instance

__all__ = ["Reconnecting"]

_log = logging.getLogger("qmpvcpu.controller")

# Between two attempts: soon at first, since most losses are of the connection only; then at a pace that is no load.
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


class Reconnecting:
    """Tries until QEMU is found, or another VM is.

    Args:
        session: Whose connection it is.
        target: Where to connect to.
        instance: Which run of QEMU it was.
    """

    def __init__(self, session: Session, target: Target, instance: "Instance | None") -> None:
        self._session = session
        self._target = target
        self._instance = instance

    async def run(self) -> None:
        """Come back when the session is connected again, or given up."""
        pause = _FIRST_PAUSE_S
        while not self._session.closed:
            try:
                await self._once()
            except MonitorError as error:
                _log.debug("not back yet: %s", error, extra={"vm": self._session.layout.vm.name})
            else:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _once(self) -> None:
        # Where nobody reconnects, the XML that it comes with is not imported.
        from qmpvcpu.record import instance_of, same_instance  # noqa: PLC0415

        session = self._session
        inbox = Inbox()
        monitor = await Monitor.open(self._target, timeout=session.timeout, on_event=inbox.event, on_lost=inbox.lost)
        try:
            reader = Reader(monitor, session.timeout)
            vm = session.layout.vm
            (slots, threads), status, answers, found = await reader.everything(vm.name)
            tids = slots[0].host_tids if slots else ()
            instance = instance_of(tids[0] if tids else None, monitor.peer_pid)
        except BaseException:
            await monitor.close()
            raise
        same = same_instance(self._instance, instance)
        now = session.loop.time()
        differs = "" if (found.uuid, found.machine) == (vm.uuid, vm.machine) else "another uuid or machine type"
        if not differs:
            try:
                session.engine.resync(
                    slots, threads or (), status=status, answers=answers, same_instance=same, now=now
                )
            except MalformedReplyError as error:
                differs = str(error)
        if differs:
            session.give_up(MonitorLostError(f"what answers now is not the same VM: {differs}"))
            await monitor.close()
            return
        await session.monitor.close()
        session.monitor, session.reader = monitor, reader
        self._instance = instance
        if session.keeper.record is not None:
            session.keeper.record.instance = instance
        session.on_return(same_instance=same)
        inbox.hand_over(session)
