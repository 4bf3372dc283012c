"""What callers give: durations, whole numbers, flags and choices, checked in one place."""

import enum
import math
from collections.abc import Collection
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

import pytest

from qmpvcpu.given import checked, seconds, values, whole


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Seven:
    """What other packages' whole numbers are to Python."""

    def __index__(self) -> int:
        return 7


@checked
def paint(
    coats: int,
    *,
    pause: float = 0.0,
    limit: float | None = None,
    first: int | None = None,
    dry: bool = True,
    colour: Colour = Colour.RED,
    how: Literal["thin", "thick"] = "thin",
    other: int | str = 0,
) -> tuple[Any, ...]:
    return coats, pause, limit, first, dry, colour, how, other


@checked
async def wait(limit: float) -> float:
    return limit


@pytest.mark.parametrize("given", [0, 30, 0.5, Fraction(1, 2), 10**18, 1e300])
def test_a_real_number_is_a_duration(given: float) -> None:
    taken = seconds("timeout", given)
    assert taken == given
    assert type(taken) is float


@pytest.mark.parametrize("given", ["30", b"30", Decimal(30), True, None, 1j, [30], object()])
def test_what_is_no_real_number_is_no_duration(given: object) -> None:
    with pytest.raises(TypeError, match="timeout is a number of seconds, not "):
        seconds("timeout", given)


@pytest.mark.parametrize("given", [math.nan, math.inf, -math.inf, -1, -1e-9, 10**400, Fraction(-1, 3)])
def test_a_duration_is_finite_and_not_negative(given: float) -> None:
    with pytest.raises(ValueError, match="timeout is a finite number of seconds, 0 or more, not ") as caught:
        seconds("timeout", given)
    assert len(str(caught.value)) < 500


def test_what_stands_for_a_whole_number_is_one() -> None:
    taken = whole("vcpu", Seven())
    assert taken == 7
    assert type(taken) is int


@pytest.mark.parametrize("given", ["3", 3.0, True, None, Decimal(3), Fraction(3), [3]])
def test_what_is_no_whole_number_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match="vcpu is a whole number, not "):
        whole("vcpu", given)


def test_a_number_that_cannot_be_told_of_is_refused_in_few_words() -> None:
    with pytest.raises(ValueError, match="vcpu is a very large int"):
        whole("vcpu", 10**5000)


def test_arguments_are_what_their_annotations_say() -> None:
    taken = paint(Seven(), pause=Fraction(1, 4), limit=2, first=Seven(), other="any")  # type: ignore[arg-type]
    assert taken == (7, 0.25, 2.0, 7, True, Colour.RED, "thin", "any")
    assert [type(each) for each in taken[:4]] == [int, float, float, int]
    assert paint(1, limit=None, first=None)[2:4] == (None, None)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"coats": "1"}, TypeError, 'coats is a whole number, not "1"'),
        ({"pause": "1"}, TypeError, 'pause is a number of seconds, not "1"'),
        ({"pause": None}, TypeError, "pause is a number of seconds, not None"),
        ({"limit": math.nan}, ValueError, "limit is a finite number of seconds, 0 or more, not nan"),
        ({"first": 1.0}, TypeError, "first is a whole number, not 1.0"),
        ({"dry": "no"}, TypeError, 'dry is True or False, not "no"'),
        ({"dry": 1}, TypeError, "dry is True or False, not 1"),
        ({"colour": "red"}, TypeError, 'colour is one of Colour.RED, Colour.BLUE, not "red"'),
        ({"how": "wet"}, ValueError, 'how is one of thin, thick, not "wet"'),
        ({"how": 1}, TypeError, "how is one of thin, thick, not 1"),
    ],
)
def test_what_they_do_not_say_is_refused(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        paint(**{"coats": 1, **given})
    assert str(caught.value) == said
    with pytest.raises(kind) as earlier:
        values(paint, given)
    assert str(earlier.value) == said


@checked
def listen(to: Collection[str] | None = None) -> Collection[str] | None:
    return to


def test_a_collection_of_text_is_one() -> None:
    assert listen() is None
    assert listen({"exits"}) == ["exits"]
    assert listen(()) == []


@pytest.mark.parametrize(("given", "said"), [("exits", "to is a collection of text"), ([1], "each of to is text")])
def test_what_is_no_collection_of_text_is_refused(given: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        listen(given)


def test_an_option_that_is_none_is_refused_before_the_call() -> None:
    with pytest.raises(TypeError, match="there is no option colours"):
        values(paint, {"colours": Colour.RED})


async def test_a_coroutine_function_stays_one() -> None:
    waiting = wait("1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match='limit is a number of seconds, not "1"'):
        await waiting
    assert await wait(Fraction(1)) == 1.0  # type: ignore[arg-type]
