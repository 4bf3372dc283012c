"""Connections to QEMU: what is heard before anybody can take it, and how QEMU is found again after a loss."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qmpvcpu import qapi
from qmpvcpu.engine.messages import Returned
from qmpvcpu.errors import MalformedReplyError, MonitorConnectError, MonitorLostError, QmpVcpuError, printable
from qmpvcpu.model.layout import Layout, Slot
from qmpvcpu.model.vcpumap import MOST_VCPUS
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.qmp.monitor import Monitor, Target
from qmpvcpu.qmp.queries import Reader

if TYPE_CHECKING:
    from qmpvcpu.domainxml.record_element import Instance
    from qmpvcpu.host.finding import Found as FoundQemu

_log = logging.getLogger("qmpvcpu.vm")

# Between two attempts: soon at first, since most losses are of the connection only; then at a pace that is no load.
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0

# An event of each slot, and of so many other devices.
_MOST_EARLY: Final = MOST_VCPUS + 1024


class Ear:
    """Hears what a session says, and keeps it until somebody takes it.

    It keeps what is heard of each slot, device and run state last, and the loss of the session. That is as much as
    QEMU itself remembers, and as much as a peer can make this process keep.
    """

    def __init__(self) -> None:
        self._early: dict[object, qapi.QemuEvent] = {}  # by what it speaks of, in the order of the last words
        self._forgot = False
        self._lost: MonitorLostError | None = None
        self._on_event: Callable[[qapi.QemuEvent], None] = self._keep
        self._on_lost: Callable[[MonitorLostError], None] = self._keep_loss

    def event(self, message: Mapping[str, Any]) -> None:
        """Take one QMP event in."""
        event = qapi.parse_event(message)
        if event is not None:
            self._on_event(event)

    def lost(self, error: MonitorLostError) -> None:
        """Take the loss of the session in."""
        self._on_lost(error)

    def hand_over(
        self,
        on_event: Callable[[qapi.QemuEvent], None],
        on_doubt: Callable[[], None],
        on_lost: Callable[[MonitorLostError], None],
    ) -> None:
        """Hand over what was heard, and all that follows; *on_doubt* where something may have been missed."""
        self._on_event, self._on_lost = on_event, on_lost
        for event in self._early.values():
            if isinstance(event, qapi.Deleted):  # it may be older than what was read, and the path another CPU's now
                on_doubt()
            else:
                on_event(event)
        self._early.clear()
        if self._forgot:
            on_doubt()
        if self._lost is not None:
            on_lost(self._lost)

    def _keep(self, event: qapi.QemuEvent) -> None:
        subject = _subject_of(event)
        self._early.pop(subject, None)
        self._early[subject] = event
        if len(self._early) > _MOST_EARLY:
            del self._early[next(iter(self._early))]
            self._forgot = True

    def _keep_loss(self, error: MonitorLostError) -> None:
        self._lost = error


class Connection(NamedTuple):
    """A QMP session; made by ``open``.

    Attributes:
        monitor: The session.
        reader: Reads the VM over it.
        ear: Has what was heard so far, and hands that over with all that follows.
    """

    monitor: Monitor
    reader: Reader
    ear: Ear

    @classmethod
    async def open(cls, target: Target, reply_timeout: float) -> "Connection":
        """Connect to *target*; *reply_timeout*, in seconds, is the deadline of that, and of each command.

        Raises:
            MonitorError: As ``Monitor.open``.
        """
        ear = Ear()
        monitor = await Monitor.open(target, timeout=reply_timeout, on_event=ear.event, on_lost=ear.lost)
        return cls(monitor, Reader(monitor, reply_timeout), ear)

    def find_qemu(self, slots: Sequence[Slot]) -> "FoundQemu":
        """Return which process of this host is QEMU, which has these *slots*: that with the threads of vCPU 0."""
        return self.monitor.find_qemu([tid for tid in slots[0].host_tids if tid is not None] if slots else [])


class Found(NamedTuple):
    """QEMU, found again.

    Attributes:
        connection: To it.
        returned: What was read there.
        instance: Which run of QEMU it is.
    """

    connection: Connection
    returned: Returned
    instance: "Instance | None"


def called(vm: VmInfo, name: str | None) -> VmInfo:
    """Return *vm* under the *name* that its user gives it, if any."""
    return replace(vm, name=name, named=True) if name else vm


class Finder:
    """Finds QEMU again after the connection was lost, and makes sure that it is the same VM.

    Args:
        target: Where to connect to.
        name: The name that was given to ``attach``, or None.
        instance: Which run of QEMU it was.
        reply_timeout: Deadline of connecting, and of each command, in seconds.
    """

    def __init__(self, target: Target, name: str | None, instance: "Instance | None", reply_timeout: float) -> None:
        self._target = target
        self._name = name
        self._instance = instance
        self._reply_timeout = reply_timeout
        self._difference = ""  # what the last one that answered had of another VM

    async def find(self, before: Layout, check_slots: Callable[[Sequence[Slot]], None]) -> Found:
        """Try until QEMU is found.

        Args:
            before: The VM as it was.
            check_slots: Raises MalformedReplyError if slots are not those of this VM.

        Raises:
            MonitorLostError: What answers is another VM.
        """
        trouble = Trouble(f"{before.vm.name} is not back yet", before.vm.name)
        pause = _FIRST_PAUSE_S
        while True:
            try:
                found = await self._once(before, check_slots)
            except MonitorLostError as error:
                if isinstance(error, _OtherVmError):
                    raise MonitorLostError(error.why) from None
                trouble.failed(error)
            except Exception as error:  # noqa: BLE001 -- the next one to answer may be QEMU
                trouble.failed(error)
            else:
                trouble.over()
                return found
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _once(self, before: Layout, check_slots: Callable[[Sequence[Slot]], None]) -> Found:
        # Here, and not above: it brings XML, and few reconnect.
        from qmpvcpu.record.owner import instance_running, same_instance

        connection = await Connection.open(self._target, self._reply_timeout)
        try:
            (slots, threads), status, answers, vm = await connection.reader.everything()
            vm = called(vm, self._name)
            instance = instance_running(slots, connection.find_qemu(slots).pid)
            same = same_instance(self._instance, instance)
            _check_told(connection.monitor, before.vm, vm)
            differs = _difference(before.vm, vm, same_instance=same)
            if not differs:
                try:
                    check_slots(slots)
                except MalformedReplyError as error:
                    differs = str(error)
            if differs:
                self._take_for_another(differs, connection.monitor.address)
        except BaseException:
            await connection.monitor.close()
            raise
        self._instance, self._difference = instance, ""
        return Found(connection, Returned(slots, threads or (), status, answers, same), instance)

    def _take_for_another(self, differs: str, address: str) -> None:
        """Raise MonitorConnectError, and the second time MonitorLostError: one reply may be wrong."""
        why = f"what answers now is not the same VM: {differs}"
        if differs != self._difference:
            self._difference = differs
            raise MonitorConnectError(address, why)
        raise _OtherVmError(why)


class _OtherVmError(MonitorLostError):
    """Another VM answers."""


def _check_told(monitor: Monitor, before: VmInfo, found: VmInfo) -> None:
    """Raise MonitorConnectError if *found* lacks what *before* told: no answer is not another VM."""
    if (found.uuid is None and before.uuid is not None) or (found.machine == "unknown" != before.machine):
        raise MonitorConnectError(monitor.address, "it does not tell which VM it is")


def _difference(before: VmInfo, found: VmInfo, *, same_instance: bool) -> str:
    """Say how *found* differs from *before*, as another VM does; "" if it is the same VM."""
    if (found.uuid, found.machine) != (before.uuid, before.machine):
        return "another uuid or machine type"
    if same_instance or found.uuid is not None:
        return ""
    if found.identity is None:
        return "another QEMU, with neither a uuid nor a name that would tell that it runs this VM"
    return "" if found.identity == before.identity else "another name"


def _subject_of(event: qapi.QemuEvent) -> object:
    match event:
        case qapi.OstEvent():
            return event.cpu_index
        case qapi.Deleted() | qapi.GuestError():
            return type(event), event.path
        case qapi.MigrationStatus():
            return type(event)
        case qapi.RunEvent():
            return event


class Trouble:
    """A run of failures of one kind of background work: logged as it begins and once it is over, not in between.

    Args:
        what: What fails, such as ``cannot read vm``.
        vm: The VM's name, for the log's extra field.
    """

    def __init__(self, what: str, vm: str) -> None:
        self._what = printable(what)
        self._extra = {"vm": printable(vm)}
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Note a failure."""
        self._failures += 1
        why = printable(str(error))
        cause = None if isinstance(error, QmpVcpuError) else error
        if self._failures == 1:
            _log.warning("%s: %s", self._what, why, extra=self._extra, exc_info=cause)
        else:
            _log.debug("%s: %s", self._what, why, extra=self._extra, exc_info=cause)

    def over(self) -> None:
        """Note a success, after which the next failure is news again."""
        if self._failures:
            _log.info("%s: over, after %d failures", self._what, self._failures, extra=self._extra)
            self._failures = 0
