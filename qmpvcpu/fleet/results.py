"""What each VM came to, one by one as they come, or all at once."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Self, TypeVar, cast

from qmpvcpu.documents.failures import code_of, error_from_json, error_json
from qmpvcpu.documents.form import INTERRUPTED, REACHED
from qmpvcpu.documents.layouts import layout_from_json, layout_json, state_json
from qmpvcpu.errors import QmpVcpuError, TransitionError
from qmpvcpu.model.codec import members
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.verdicts import Verdict, verdict_of

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

# A whole attach takes a tenth of it where QEMU answers. Longer means waiting for somebody, which needs no place.
_PATIENCE_S: Final = 0.1
# How a document names that a VM was not begun, or was given up.
_GIVEN_UP: Final = (asyncio.CancelledError.__name__, KeyboardInterrupt.__name__)


@dataclass(frozen=True, slots=True)
class VmResult(Generic[_T_co]):
    """The result of one VM.

    Attributes:
        address: Its address, as ``unix:PATH`` or ``tcp:HOST:PORT``.
        name: The name that it was given, else as much of its address as tells it from the others; "" where it was
            never reached.
        layout: Its layout at the end, or as last seen; None where it was not reached.
        value: What was returned for it; None after an error.
        error: What was raised instead, or None.
        seconds: How long it took from its own beginning, attaching included; waiting for a place is not in it.
    """

    address: str
    name: str
    layout: Layout | None
    value: _T_co | None
    error: BaseException | None
    seconds: float

    def unwrap(self) -> _T_co:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error
        return cast("_T_co", self.value)

    @property
    def report(self) -> TransitionReport | None:
        """The report of its transition, reached or not; None where there was none."""
        if isinstance(self.error, TransitionError):
            return self.error.report
        return self.value if isinstance(self.value, TransitionReport) else None

    @property
    def verdict(self) -> Verdict | None:
        """The verdict that its error stands for; None where that is about no single vCPU's change."""
        return verdict_of(self.error) if isinstance(self.error, QmpVcpuError) else None

    @property
    def code(self) -> int:
        """The exit code that a command on this VM alone would have had."""
        if self.error is None:
            return REACHED
        return INTERRUPTED if isinstance(self.error, asyncio.CancelledError) else code_of(self.error)

    def to_json(self, *, whole: bool, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return it as ``fleet list``, ``set`` and ``count`` print it with ``--json``; ``from_json`` reads it back.

        Args:
            whole: Include every vCPU of the layout, not only its map.
            more: What else the document has, before the layout.
        """
        return {
            "address": self.address,
            "name": self.name,
            "code": self.code,
            "seconds": round(self.seconds, 6),
            "error": None if self.error is None else error_json(self.error),
            **({} if self.report is None else self.report.to_json()),
            **(more or {}),
            **({} if self.layout is None else layout_json(self.layout) if whole else state_json(self.layout)),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "VmResult[TransitionReport | None]":
        """Return the result that ``to_json`` was called on, as far as the document has it.

        Its value is the report, or None. ``seconds`` is that of the report if there is one. Without *whole* its
        layout is the report's, or None.

        Raises:
            ValueError: It has another shape; the text names the key.
        """
        content = members(data, {"address": str, "name": str, "seconds": float, "error": object})
        report = TransitionReport.from_json(data) if "steps" in data else None
        layout = layout_from_json(data) if "vcpus" in data else report.layout if report is not None else None
        error: BaseException | None = None
        match content["error"]:
            case None:
                pass
            case {"kind": kind} if kind in _GIVEN_UP:
                error = asyncio.CancelledError()
            case told:
                error = error_from_json(told, report=report)
        value = report if error is None else None
        return VmResult(content["address"], content["name"], layout, value, error, content["seconds"])


class Admission:
    """Lets so many VMs be worked on at a time; a VM that takes long no longer counts."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    @contextlib.asynccontextmanager
    async def granted(self) -> AsyncIterator[None]:
        """Wait for admission; it is given back at the end, or earlier if the end is long in coming."""
        await self._free.acquire()
        held = [self._free]

        def give_back() -> None:
            if held:
                held.pop().release()

        timer = asyncio.get_running_loop().call_later(_PATIENCE_S, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()


class Results(Generic[_T]):
    """What each VM comes to: ``async for result in results`` as they come, or ``await results`` for all of them.

    The work has begun when this is returned, and belongs to the fleet: it goes on whether or not anybody iterates,
    until it is done, ``aclose`` is called, or the fleet is closed. Leaving the loop early stops nothing;
    ``contextlib.aclosing`` around it does.

    Every VM has one result, in the order in which they end; one that fails does not affect the others. Cancelling
    ``anext`` loses nothing. Cancelling ``await results`` is ``aclose``.

    Attributes:
        stopped: True once no other VM is begun.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        work: Callable[[str, "Results[_T]"], Awaitable[VmResult[_T] | None]],
        admission: Admission,
        start: Callable[[Coroutine[Any, Any, VmResult[_T] | None]], "asyncio.Task[VmResult[_T] | None]"],
    ) -> None:
        self.stopped = False
        self._addresses = tuple(addresses)
        self._ended: deque[asyncio.Task[VmResult[_T] | None]] = deque()
        self._news = asyncio.Event()
        self._tasks = {start(self._begin(address, work, admission)) for address in self._addresses}
        for task in self._tasks:
            task.add_done_callback(self._on_end)

    def stop(self) -> None:
        """Begin no other VM: those have no result. What was begun is seen to its end.

        To stop at the first failure: ``if result.error: results.stop()``.
        """
        self.stopped = True

    async def aclose(self) -> None:
        """Cancel what runs, wait for its end, and drop what has no result yet; idempotent.

        A map that is being set stops at its next safe point: what was sent is awaited, nothing more is.
        """
        self.stop()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _begin(
        self,
        address: str,
        work: Callable[[str, "Results[_T]"], Awaitable[VmResult[_T] | None]],
        admission: Admission,
    ) -> VmResult[_T] | None:
        async with admission.granted():
            return None if self.stopped else await work(address, self)

    def _on_end(self, task: "asyncio.Task[VmResult[_T] | None]") -> None:
        self._tasks.discard(task)
        self._ended.append(task)
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> VmResult[_T]:
        while True:
            while self._ended:
                task = self._ended.popleft()
                if not task.cancelled() and (result := task.result()) is not None:
                    return result
            if not self._tasks:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    def __await__(self) -> Generator[Any, None, tuple[VmResult[_T], ...]]:
        return self._all().__await__()

    async def _all(self) -> tuple[VmResult[_T], ...]:
        try:
            results = {result.address: result async for result in self}
        except asyncio.CancelledError:
            await self.aclose()
            raise
        return tuple(results[address] for address in self._addresses if address in results)
