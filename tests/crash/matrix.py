"""One story, played again and again: each time something happens at another point of it."""

import abc
import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from tests.crash.stage import Stage, Story, stage

_Way = TypeVar("_Way")


class PointMatrix(abc.ABC, Generic[_Way]):
    """All points of one story.

    Attributes:
        ways: What may happen: each point is met once for each.
        tries: How often a point is tried that depends on who is faster, and does not come up in each run.
        lost: What was found to be wrong, and after what.
        unmet: The points that did not come up again.
    """

    ways: Sequence[_Way]
    tries: ClassVar[int] = 20

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.unmet: list[str] = []

    @abc.abstractmethod
    async def run(self, point: str | None, way: _Way) -> Sequence[str]:
        """Play it to its end, while something happens at *point*, and look; return which points were crossed."""

    async def play(self) -> list[str]:
        """Have it happen at every point that is ever seen to be crossed, once for each way; return the points."""
        points = list(await self.run(None, self.ways[0]))
        for point in points:  # which grows
            for way in self.ways:
                met = await self._meet(point, way)
                points += [each for each in met if each not in points]
        return points

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

    Attributes:
        story: The story.
    """

    def __init__(self, story: Story, folder: Path, extra_args: Sequence[str] = ()) -> None:
        super().__init__()
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
