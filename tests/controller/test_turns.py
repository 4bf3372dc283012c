"""Who goes when: single commands side by side, transitions alone, in the order in which they came."""

import asyncio

import pytest

from qmpvcpu.vm.turns import Turn, Turns


class Course:
    """Who is inside, and who was, in order."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.inside: set[str] = set()
        self.began: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def enter(self, name: str, *, alone: bool = False) -> "asyncio.Task[None]":
        """Take a place in the queue now; hold the turn until ``let``."""
        self.gates[name] = asyncio.Event()
        turn = self.turns.alone() if alone else self.turns.together()
        return asyncio.get_running_loop().create_task(self._stay(name, turn))

    async def _stay(self, name: str, turn: Turn) -> None:
        async with turn:
            self.inside.add(name)
            self.began.append(name)
            try:
                await self.gates[name].wait()
            finally:
                self.inside.discard(name)

    async def let(self, *names: str) -> None:
        """Let these leave, and whoever may then enter do so."""
        for name in names:
            self.gates[name].set()
        await self.settled()

    async def settled(self) -> None:
        """Wait until nothing moves any more."""
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
def course() -> Course:
    return Course()


async def test_single_commands_are_inside_together(course: Course) -> None:
    tasks = [course.enter(name) for name in "abc"]
    await course.settled()
    assert course.inside == {"a", "b", "c"}
    await course.let("a", "b", "c")
    await asyncio.gather(*tasks)


async def test_a_transition_is_alone(course: Course) -> None:
    tasks = [course.enter("a"), course.enter("T", alone=True), course.enter("b"), course.enter("U", alone=True)]
    await course.settled()
    assert course.inside == {"a"}
    await course.let("a")
    assert course.inside == {"T"}
    await course.let("T")
    assert course.inside == {"b"}
    await course.let("b")
    assert course.inside == {"U"}
    await course.let("U")
    await asyncio.gather(*tasks)
    assert course.began == ["a", "T", "b", "U"]


async def test_whoever_gives_up_its_place_blocks_nobody(course: Course) -> None:
    tasks = [course.enter("a"), course.enter("T", alone=True), course.enter("b")]
    await course.settled()
    tasks[1].cancel()
    await course.settled()
    assert course.inside == {"a", "b"}
    await course.let("a", "b")
    await asyncio.gather(*tasks, return_exceptions=True)
    assert course.began == ["a", "b"]


async def test_whoever_is_cancelled_as_its_turn_comes_leaves_at_once(course: Course) -> None:
    tasks = [course.enter("a"), course.enter("T", alone=True), course.enter("b")]
    await course.settled()
    course.gates["a"].set()
    await tasks[0]
    tasks[1].cancel()  # admitted, and not running yet
    await course.settled()
    assert course.inside == {"b"}
    await course.let("b")
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_place_that_is_never_entered_can_be_given_up(course: Course) -> None:
    turn = course.turns.alone()
    waiting = course.enter("a")
    await course.settled()
    assert not course.inside
    turn.withdraw()
    turn.withdraw()
    await course.settled()
    assert course.inside == {"a"}
    await course.let("a")
    await waiting
