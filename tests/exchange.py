"""What is sent to QEMUs, as the monitor logs it."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from qmpvcpu import VcpuController

_T = TypeVar("_T")


class _Sent(logging.Handler, Generic[_T]):
    """Makes something of every command that is sent, from its address and message."""

    def __init__(self, make: Callable[[str, dict[str, Any]], list[_T]]) -> None:
        super().__init__(logging.DEBUG)
        self.made: list[_T] = []
        self._make = make

    def emit(self, record: logging.LogRecord) -> None:
        said = record.__dict__  # the monitor's `extra` is in it
        if said.get("direction") == "sent":
            self.made += self._make(said["vm"], said["qmp"])


@contextlib.contextmanager
def _sent(make: Callable[[str, dict[str, Any]], list[_T]]) -> Iterator[list[_T]]:
    handler = _Sent(make)
    logger = logging.getLogger("qmpvcpu.qmp")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.made
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def exchange() -> contextlib.AbstractContextManager[list[str]]:
    """The names of all commands that are sent inside."""
    return _sent(lambda _, message: [message["execute"]])


def sent_by(vm: VcpuController) -> contextlib.AbstractContextManager[list[tuple[str, list[tuple[str, Any]]]]]:
    """The commands that *vm* sends inside, with their arguments."""
    return _sent(
        lambda address, message: (
            [(message["execute"], list(message.get("arguments", {}).items()))] if address == vm.address else []
        )
    )
