"""Reconnecting: finds QEMU again after the connection was lost, and makes sure that it is the same VM."""

import asyncio
from typing import TYPE_CHECKING

from qmpvcpu.errors import MalformedReplyError, MonitorConnectError, MonitorLostError
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.qmp.monitor import Monitor, Target
from qmpvcpu.qmp.queries import Reader
from qmpvcpu.vm.inbox import Inbox
from qmpvcpu.vm.session import Session
from qmpvcpu.vm.trouble import Trouble

if TYPE_CHECKING:
    from qmpvcpu.domainxml import Instance

# Between two attempts: soon at first, since most losses are of the connection only; then at a pace that is no load.
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


class Reconnecting:
    """Tries until QEMU is found, or another VM is.

    Args:
        session: Whose connection it is.
        target: Where to connect to.
        name: What the VM was called by who attached, or None.
        instance: Which run of QEMU it was.
    """

    def __init__(self, session: Session, target: Target, name: str | None, instance: "Instance | None") -> None:
        self._session = session
        self._target = target
        self._name = name
        self._instance = instance
        self._difference = ""  # what the last one that answered had of another VM
        vm = session.layout.vm.name
        self._trouble = Trouble(f"{vm} is not back yet", vm)

    async def run(self) -> None:
        """Come back when the session is connected again, or given up."""
        pause = _FIRST_PAUSE_S
        while not self._session.closed:
            try:
                await self._once()
            except Exception as error:  # noqa: BLE001 - JUSTIFICATION: whatever answers, the next one may be QEMU
                self._trouble.failed(error)
            else:
                self._trouble.over()
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _once(self) -> None:
        # Where nobody reconnects, the XML that it comes with is not imported.
        from qmpvcpu.record.owner import instance_of, same_instance

        session = self._session
        inbox = Inbox()
        monitor = await Monitor.open(self._target, timeout=session.timeout, on_event=inbox.event, on_lost=inbox.lost)
        try:
            reader = Reader(monitor, session.timeout)
            before = session.layout
            (slots, threads), status, answers, found = await reader.everything(self._name)
            tids = slots[0].host_tids if slots else ()
            instance = instance_of(tids[0] if tids else None, monitor.peer_pid)
            same = same_instance(self._instance, instance)
            now = session.loop.time()
            _check_told(monitor, before.vm, found)
            differs = _difference(before.vm, found, same_instance=same)
            if not differs:
                try:
                    session.engine.resync(
                        slots, threads or (), status=status, answers=answers, same_instance=same, now=now
                    )
                except MalformedReplyError as error:
                    differs = str(error)
            if differs:
                self._take_for_another(differs, monitor)
                await monitor.close()
                return
            await session.monitor.close()
        except BaseException:
            await monitor.close()
            raise
        session.monitor, session.reader = monitor, reader
        self._instance, self._difference = instance, ""
        if session.keeper.record is not None:
            session.keeper.record.instance = instance
        session.on_return(had=before, same_instance=same)
        inbox.hand_over(session)

    def _take_for_another(self, differs: str, monitor: Monitor) -> None:
        """Give the VM up, if what answers looks like another one for the second time: one reply may be wrong.

        Raises:
            MonitorConnectError: It is the first time.
        """
        why = f"what answers now is not the same VM: {differs}"
        if differs != self._difference:
            self._difference = differs
            raise MonitorConnectError(monitor.address, why)
        self._session.give_up(MonitorLostError(why))


def _check_told(monitor: Monitor, before: VmInfo, found: VmInfo) -> None:
    """Return if *found* tells what *before* told: no answer is not another VM.

    Raises:
        MonitorConnectError: It does not.
    """
    if (found.uuid is None and before.uuid is not None) or (found.machine == "unknown" != before.machine):
        raise MonitorConnectError(monitor.address, "it does not tell which VM it is")


def _difference(before: VmInfo, found: VmInfo, *, same_instance: bool) -> str:
    """Say in what *found* is another VM than *before*; "" if it is none."""
    if (found.uuid, found.machine) != (before.uuid, before.machine):
        return "another uuid or machine type"
    if same_instance or found.uuid is not None:
        return ""
    if found.identity is None:
        return "another QEMU, with neither a uuid nor a name that would tell that it runs this VM"
    return "" if found.identity == before.identity else "another name"
