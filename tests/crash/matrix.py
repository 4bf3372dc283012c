"""One story, played again and again: each time something happens at another point of it."""

import abc
import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from tests.crash.stage import Stage, Story, stage

_Way = TypeVar("_Way")


class Agenda(Generic[_Way]):
    """All points of one story, and where something has still to happen.

    Several matrices that play the same story may share one: each point is met by one of them.

    Attributes:
        points: Those that were ever seen to be crossed.
    """

    def __init__(self) -> None:
        self.points: list[str] = []
        self._open: deque[tuple[str, _Way]] = deque()

    def add(self, crossed: Iterable[str], ways: Sequence[_Way]) -> None:
        """Take note of points, each to be met in each of the *ways*."""
        for point in crossed:
            if point not in self.points:
                self.points.append(point)
                self._open.extend((point, way) for way in ways)

    def take(self) -> tuple[str, _Way] | None:
        """Return the next point to be met, and how; None: nothing is left."""
        return self._open.popleft() if self._open else None


class PointMatrix(abc.ABC, Generic[_Way]):
    """All points of one story.

    Args:
        agenda: Where the points are kept, if it is shared.

    Attributes:
        agenda: Its points.
        ways: What may happen: each point is met once for each.
        tries: How often a point is tried that depends on who is faster, and does not come up in each run.
        lost: What was found to be wrong, and after what.
        unmet: The points that did not come up again.
    """

    ways: Sequence[_Way]
    tries: ClassVar[int] = 20

    def __init__(self, *, agenda: Agenda[_Way] | None = None) -> None:
        self.agenda = agenda or Agenda[_Way]()
        self.lost: list[str] = []
        self.unmet: list[str] = []

    @abc.abstractmethod
    async def run(self, point: str | None, way: _Way) -> Sequence[str]:
        """Play it to its end, while something happens at *point*, and look; return which points were crossed."""

    async def play(self) -> list[str]:
        """Have it happen at every point that is ever seen to be crossed, once for each way; return the points.

        Points that others are about to meet are left to them.
        """
        self.agenda.add(await self.run(None, self.ways[0]), self.ways)
        while (left := self.agenda.take()) is not None:
            self.agenda.add(await self._meet(*left), self.ways)
        return self.agenda.points

    async def _meet(self, point: str, way: _Way) -> Iterable[str]:
        for _ in range(self.tries):
            crossed = await self.run(point, way)
            if point in crossed:
                return crossed
        self.unmet.append(f"{point}, {way}")
        return ()


class KillMatrix(PointMatrix[_Way], Generic[_Way]):
    """All points of a story of one VM.

    Args:
        story: The story.
        folder: For the records.
        extra_args: More arguments for QEMU.
        agenda: As of ``PointMatrix``.

    Attributes:
        story: The story.
    """

    def __init__(
        self, story: Story, folder: Path, extra_args: Sequence[str] = (), *, agenda: Agenda[_Way] | None = None
    ) -> None:
        super().__init__(agenda=agenda)
        self.story = story
        self._folder = folder
        self._extra_args = tuple(extra_args)
        self._runs = 0
        self._stages = contextlib.AsyncExitStack()
        self._stage: Stage | None = None

    async def play(self) -> list[str]:
        """As of ``PointMatrix``."""
        async with self._stages:
            return await super().play()

    def new_folder(self) -> Path:
        """Return a folder for one run."""
        folder = self._folder / str(self._runs)
        folder.mkdir()
        self._runs += 1
        return folder

    async def at_start(self) -> Stage:
        """Return the stage, with the VM at START again."""
        if self._stage is not None and self._stage.guest.accelerator == "tcg":
            await self.drop_stage()
        if self._stage is None:
            self._stage = await self._stages.enter_async_context(stage(self.story, extra_args=self._extra_args))
        await self._stage.to_start()
        return self._stage

    async def drop_stage(self) -> None:
        """Have another VM the next time."""
        await self._stages.aclose()
        self._stage = None
