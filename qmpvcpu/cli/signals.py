"""SIGINT, SIGTERM and SIGHUP: the first stops gently, the second at once."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """What the signals do while a command runs.

    The first one does what the command has asked for with ``stopped_by``, if anything; else it does what the second
    one does: the command is cancelled, the VM is let go, and what is known is printed. The third one kills this
    process. A signal that this process was started to ignore (in the background of a script, or by nohup) stays
    ignored. After a signal one more is ignored once the command has ended, while its result is being printed.

    Attributes:
        came: The name of the signal that came, or "".
    """

    def __init__(self) -> None:
        self.came = ""
        self._gently: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._count = 0

    @contextlib.contextmanager
    def handling_signals(self, task: "asyncio.Task[object]") -> Iterator[None]:
        """Let the signals end *task* inside."""
        loop = asyncio.get_running_loop()
        handled = []
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: its owner has the signals
            for each in _SIGNALS:
                if signal.getsignal(each) is not signal.SIG_IGN:
                    loop.add_signal_handler(each, self._on_signal, each, task)
                    handled.append(each)
        try:
            yield
        finally:
            for each in handled:
                loop.remove_signal_handler(each)
                if self.came:
                    signal.signal(each, _ignore_once)

    @contextlib.contextmanager
    def stopped_by(self, gently: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
        """Let the first signal do *gently* inside."""
        self._gently = gently
        try:
            yield
        finally:
            self._gently = None

    def _on_signal(self, which: signal.Signals, task: "asyncio.Task[object]") -> None:
        self._count += 1
        self.came = which.name
        if self._count == 1 and self._gently is not None:
            self._stopping = asyncio.ensure_future(self._gently())
        elif self._count <= 2:  # noqa: PLR2004 - the second
            task.cancel()
        else:
            signal.signal(which, signal.SIG_DFL)
            os.kill(os.getpid(), which)


def _ignore_once(which: int, _: FrameType | None) -> None:
    signal.signal(which, signal.SIG_DFL)
