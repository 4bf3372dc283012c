"""Turns: who may change the VM now. Single commands go side by side, a transition goes alone."""

import asyncio
from collections import deque
from types import TracebackType


class Turn:
    """A place in the queue, from when it is made: ``async with turn`` waits for it, and leaves at the end."""

    def __init__(self, turns: "Turns", *, alone: bool) -> None:
        self.alone = alone
        self.came: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns = turns

    async def __aenter__(self) -> None:
        try:
            await self.came
        except asyncio.CancelledError:
            self.withdraw()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.withdraw()

    def withdraw(self) -> None:
        """Leave, or give the place in the queue up; idempotent."""
        self._turns.leave(self)


class Turns:
    """A queue in front of one VM: first come, first served."""

    def __init__(self) -> None:
        self._queue: deque[Turn] = deque()
        self._inside: set[Turn] = set()

    def together(self) -> Turn:
        """Queue until nobody is alone inside, or came before to be."""
        return self._take(Turn(self, alone=False))

    def alone(self) -> Turn:
        """Queue until all who came before have left."""
        return self._take(Turn(self, alone=True))

    def leave(self, turn: Turn) -> None:
        """Take *turn* out, wherever it is."""
        self._inside.discard(turn)
        if turn in self._queue:
            self._queue.remove(turn)
        self._call()

    def _take(self, turn: Turn) -> Turn:
        self._queue.append(turn)
        self._call()
        return turn

    def _call(self) -> None:
        while self._queue and self._admits(self._queue[0]):
            turn = self._queue.popleft()
            self._inside.add(turn)
            if not turn.came.done():
                turn.came.set_result(None)

    def _admits(self, turn: Turn) -> bool:
        return not self._inside if turn.alone else not any(each.alone for each in self._inside)
