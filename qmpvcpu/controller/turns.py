"""Turns: who may change the VM now. Single commands go side by side, a transition goes alone."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

__all__ = ["Turns"]


class Turns:
    """A queue in front of one VM: first come, first served. Cancelling whoever waits leaves no trace."""

    def __init__(self) -> None:
        self._queue: deque[tuple[bool, asyncio.Future[None]]] = deque()
        self._inside = 0
        self._alone = False

    @contextlib.asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Wait until nobody is alone, or was there before to be."""
        await self._enter(alone=False)
        try:
            yield
        finally:
            self._leave()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait until all who came before have left."""
        await self._enter(alone=True)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, *, alone: bool) -> None:
        if not self._queue and self._admits(alone=alone):
            self._admit(alone=alone)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((alone, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # it was admitted in the same moment
            else:
                self._queue.remove((alone, turn))
                self._call()
            raise

    def _admits(self, *, alone: bool) -> bool:
        return not self._alone and not (alone and self._inside)

    def _admit(self, *, alone: bool) -> None:
        self._inside += 1
        self._alone = alone

    def _leave(self) -> None:
        self._inside -= 1
        self._alone = False
        self._call()

    def _call(self) -> None:
        while self._queue and self._admits(alone=self._queue[0][0]):
            alone, turn = self._queue.popleft()
            self._admit(alone=alone)
            turn.set_result(None)
