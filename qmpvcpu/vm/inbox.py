"""What arrives while the VM is being read: listening comes first, so that nothing in between is missed."""

from collections.abc import Mapping
from typing import Any, Final

from qmpvcpu import qapi
from qmpvcpu.engine.ledger import Read
from qmpvcpu.errors import MonitorLostError
from qmpvcpu.model.vcpumap import MOST_VCPUS
from qmpvcpu.vm.session import Session

# A word on each slot, and on so many devices besides.
_MOST: Final = MOST_VCPUS + 1024


class Inbox:
    """Keeps what is heard of each slot, device and run state last, and the loss of the connection, for a session.

    That is as much as QEMU itself remembers, and as much as a peer can make this process keep.
    """

    def __init__(self) -> None:
        self._session: Session | None = None
        self._early: dict[object, qapi.QemuEvent] = {}  # by what it speaks of, in the order of the last words
        self._forgot = False
        self._lost: MonitorLostError | None = None

    def event(self, message: Mapping[str, Any]) -> None:
        """Take one QMP event in."""
        event = qapi.parse_event(message)
        if event is None:
            return
        if self._session is not None:
            self._session.on_event(event)
            return
        subject = _subject_of(event)
        self._early.pop(subject, None)
        self._early[subject] = event
        if len(self._early) > _MOST:
            del self._early[next(iter(self._early))]
            self._forgot = True

    def lost(self, error: MonitorLostError) -> None:
        """Take the loss of the connection in."""
        self._lost = error
        if self._session is not None:
            self._session.on_lost(error)

    def hand_over(self, session: Session) -> None:
        """Give *session* what has arrived, and all that follows."""
        self._session = session
        for event in self._early.values():
            if isinstance(event, qapi.Deleted):  # it may be older than what was read, and the path another CPU's now
                session.want(Read.FULL)
            else:
                session.on_event(event)
        self._early.clear()
        if self._forgot:
            session.want(Read.FULL)
        if self._lost is not None:
            session.on_lost(self._lost)


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
