"""Reading JSON that may come from anywhere: every value is checked for its kind, nothing is converted.

Readers take a value and return it, or raise ValueError; ``take`` puts the key before what went wrong inside it, so
that an error names the bad value by its path from the outermost object.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeGuard, TypeVar

from qmpvcpu.errors import shorten
from qmpvcpu.model.vcpumap import VcpuMap

_T = TypeVar("_T")

_MAX_QUOTE: Final = 60


def take(data: object, key: str, read: Callable[[Any], _T]) -> _T:
    """Return what *read* makes of ``data[key]``.

    Raises:
        ValueError: There is no such key, or its value is not what it should be; the text names the key.
    """
    if not isinstance(data, Mapping):
        raise ValueError(unlike(data, "a JSON object"))  # noqa: TRY004 -- bad content, whatever its type
    if key not in data:
        raise ValueError(f"{key!r} is missing")
    try:
        return read(data[key])
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error


def text(value: object) -> str:
    """Return *value* if it is text.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, str):
        raise ValueError(unlike(value, "text"))  # noqa: TRY004 -- bad content, whatever its type
    return value


def flag(value: object) -> bool:
    """Return *value* if it is true or false.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(unlike(value, "true or false"))  # noqa: TRY004 -- bad content, whatever its type
    return value


def number(value: object) -> float:
    """Return *value* if it is a finite number.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:  # an int of hundreds of digits
            pass
    raise ValueError(unlike(value, "a number"))


def vcpu_map(value: object) -> VcpuMap:
    """Return the map that *value* is the text of.

    Raises:
        ValueError: It is none.
    """
    return VcpuMap.parse(text(value))


def optional(read: Callable[[Any], _T]) -> Callable[[Any], _T | None]:
    """Return a reader that lets null be None, and has *read* read the rest."""
    return lambda value: None if value is None else read(value)


def one_of(choices: Mapping[str, _T]) -> Callable[[Any], _T]:
    """Return a reader of the words that *choices* has."""

    def read(value: object) -> _T:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(unlike(value, f"one of {', '.join(choices)}"))
        return choices[value]

    return read


def shaped(is_so: Callable[[object], TypeGuard[_T]], what: str) -> Callable[[Any], _T]:
    """Return a reader of values that *is_so* says yes to; *what* they are is for the error."""

    def read(value: object) -> _T:
        if not is_so(value):
            raise ValueError(unlike(value, what))
        return value

    return read


def rows(read: Callable[[Any], _T]) -> Callable[[Any], tuple[_T, ...]]:
    """Return a reader of lists, each row of which *read* reads; an error tells its place, from 0."""

    def read_all(value: object) -> tuple[_T, ...]:
        if not isinstance(value, list):
            raise ValueError(unlike(value, "a list"))  # noqa: TRY004 -- bad content, whatever its type
        found: list[_T] = []
        for row in value:
            try:
                found.append(read(row))
            except ValueError as error:
                raise ValueError(f"[{len(found)}]: {error}") from error
        return tuple(found)

    return read_all


def whole_number(value: object) -> int:
    """Return *value* if it is a whole number from 0 on.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(unlike(value, "a whole number from 0 on"))
    return value


def unlike(value: object, wanted: str) -> str:
    """Say that *value* is not what is *wanted*."""
    return f"{shorten(value, _MAX_QUOTE)} is not {wanted}"
