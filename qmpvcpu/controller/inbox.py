"""What arrives while the VM is being read: listening comes first, so that nothing in between is missed."""

from collections.abc import Mapping
from typing import Any

from qmpvcpu.controller.session import Session
from qmpvcpu.errors import MonitorLostError

__all__ = ["Inbox"]


class Inbox:
    """Keeps events, and the loss of the connection, until there is a session to take them."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._early: list[Mapping[str, Any]] = []
        self._lost: MonitorLostError | None = None

    def event(self, message: Mapping[str, Any]) -> None:
        """Take one QMP event in."""
        if self._session is None:
            self._early.append(message)
        else:
            self._session.on_event(message)

    def lost(self, error: MonitorLostError) -> None:
        """Take the loss of the connection in."""
        self._lost = error
        if self._session is not None:
            self._session.on_lost(error)

    def hand_over(self, session: Session) -> None:
        """Give *session* what has arrived, and all that follows."""
        self._session = session
        for message in self._early:
            session.on_event(message)
        if self._lost is not None:
            session.on_lost(self._lost)
