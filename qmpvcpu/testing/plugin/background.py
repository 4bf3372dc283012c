"""An event loop on a thread of its own, for what has to go on while a test does anything it likes."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Background:
    """Runs coroutines on its own thread; a context manager.

    QEMUs are started from that thread and it outlives them: what ties a QEMU to its parent (PR_SET_PDEATHSIG) is the
    end of the *thread* that made it. Its loop is asyncio's own, whatever loop the tests use.
    """

    def __init__(self) -> None:
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._serve, name="qmpvcpu VMs", daemon=True)
        self._stop = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop = self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what still runs, and end the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what *work* returns, or raise what it raises; interrupted (by a signal), cancel it first."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _serve(self) -> None:
        async def until_stopped() -> None:
            self._started.set_result(asyncio.get_running_loop())
            await self._stop.wait()

        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(until_stopped())
