"""SIGINT and SIGTERM: gently first, then at once."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """What the signals do while a command runs.

    The first one does what the command has set for it, else it ends the command as the second one does: it is
    cancelled, the VM is let go, what is known is printed. The third one kills this process. A signal that this
    process was started to ignore, as in the background of a script, goes on being ignored. Once one was heeded, the
    next that comes after the command's end is not: what was done is being printed.

    Attributes:
        gently: What the first signal does, or None.
        signal: The name of the signal that came, or "".
    """

    def __init__(self) -> None:
        self.gently: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.signal = ""
        self._stopping: asyncio.Task[None] | None = None
        self._count = 0

    @contextlib.contextmanager
    def heeded(self, task: "asyncio.Task[object]") -> Iterator[None]:
        """Have the signals end *task* inside."""
        loop = asyncio.get_running_loop()
        heard = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        set_ = []
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: its owner has the signals
            for each in heard:
                loop.add_signal_handler(each, self._on_signal, each, task)
                set_.append(each)
        try:
            yield
        finally:
            for each in set_:
                loop.remove_signal_handler(each)
                if self.signal:
                    signal.signal(each, _ignore_once)

    @contextlib.contextmanager
    def stopped_by(self, gently: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
        """Have the first signal do *gently* inside."""
        self.gently = gently
        try:
            yield
        finally:
            self.gently = None

    def _on_signal(self, which: signal.Signals, task: "asyncio.Task[object]") -> None:
        self._count += 1
        self.signal = which.name
        if self._count == 1 and self.gently is not None:
            self._stopping = asyncio.ensure_future(self.gently())
        elif self._count <= 2:  # noqa: PLR2004 - the second
            task.cancel()
        else:
            signal.signal(which, signal.SIG_DFL)
            os.kill(os.getpid(), which)


def _ignore_once(which: int, _: FrameType | None) -> None:
    signal.signal(which, signal.SIG_DFL)
