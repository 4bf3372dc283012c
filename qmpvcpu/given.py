"""Checks of what callers pass, made before anything is done with it.

One rule for all public calls: durations are finite real numbers and not negative, whole numbers are whole, flags are
True or False, and choices are of their kind. A wrong type is a TypeError, a wrong value a ValueError; both name the
parameter, and say what was given. Each check takes the parameter's *name* and the *value* that it was given.
"""

import enum
import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from qmpvcpu.errors import shorten

_P = ParamSpec("_P")
_R = TypeVar("_R")

_Check = Callable[[str, Any], Any]


def seconds(name: str, value: object) -> float:
    """Return *value* as a number of seconds: finite, and 0 or more. Text, True and a Decimal are not real numbers."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a number of seconds, not {_quoted(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is a finite number of seconds, 0 or more, not {_quoted(value)}")
    return number


def whole(name: str, value: object) -> int:
    """Return *value* as an int, if it stands for one: not text, True or 3.0, nor a number too long to print."""
    if isinstance(value, bool):
        raise TypeError(f"{name} is a whole number, not {value}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # which is what is found out
    except TypeError:
        raise TypeError(f"{name} is a whole number, not {_quoted(value)}") from None
    try:
        str(number)
    except ValueError:
        raise ValueError(f"{name} is {_quoted(number)}, and no VM has so many") from None
    return number


def at_least(name: str, value: object, least: int) -> int:
    """Return *value* as an int of *least* or more."""
    number = whole(name, value)
    if number < least:
        raise ValueError(f"{name} is at least {least}, not {number}")
    return number


def flag(name: str, value: object) -> bool:
    """Return *value* if it is True or False: "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {_quoted(value)}")
    return value


def text(name: str, value: object) -> str:
    """Return *value* if it is text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is text, not {_quoted(value)}")
    return value


def path(name: str, value: object) -> object:
    """Return *value* if it can be a path: text, or a path of text, that is not empty and has no NUL in it."""
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(plain, str):
        raise TypeError(f"{name} is a path, not {_quoted(value)}")
    if not plain or "\0" in plain:
        raise ValueError(f"{name} is a path, not {_quoted(plain)}")
    return value


def member(name: str, value: object, kind: type[enum.Enum]) -> object:
    """Return *value* if it is of *kind*."""
    if not isinstance(value, kind):
        known = ", ".join(map(str, kind))
        raise TypeError(f"{name} is one of {known}, not {_quoted(value)}")
    return value


def instance(name: str, value: object, kind: type | UnionType) -> Any:
    """Return *value* if it is of the class *kind*, or of one of these classes."""
    if not isinstance(value, kind):
        known = [each.__name__ for each in get_args(kind) or (kind,) if each is not NoneType]
        raise TypeError(f"{name} is a {' or '.join(known)}, not {_quoted(value)}")
    return value


def members(name: str, value: object, kind: type[enum.Enum]) -> Collection[object]:
    """Return *value* as a list if it is a collection of members of *kind*."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise TypeError(f"{name} is a collection of {kind.__name__}, not {_quoted(value)}")
    return [member(f"each of {name}", each, kind) for each in value]


def texts(name: str, value: object) -> Collection[object]:
    """Return *value* as a list if it is a collection of text; a single text is none."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise TypeError(f"{name} is a collection of text, not {_quoted(value)}")
    return [text(f"each of {name}", each) for each in value]


def called(name: str, value: object) -> object:
    """Return *value*, which *name* was given, if it can be called; not a coroutine function, as nothing awaits it.

    Raises:
        TypeError: It is none.
    """
    if not callable(value):
        raise TypeError(f"{name} is a function, not {_quoted(value)}")
    if inspect.iscoroutinefunction(value):
        raise TypeError(f"{name} is a plain function, not one that is async: what it returns is not awaited")
    return value


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have *function* begin only when its arguments are what their annotations say.

    ``float`` is a duration, ``str | PathLike[str]`` a path; ``int``, ``bool``, ``str`` and enumerations are what they
    say; each also with ``| None``. A ``Literal`` is one of its words, a ``Callable`` a function, and a ``Collection``
    of an enumeration, or of ``str``, has members of it. Other annotations are not checked.
    """
    checks = _checks_of(function)
    code = inspect.unwrap(function).__code__
    names = code.co_varnames[: code.co_argcount]

    by_place = [(place, name) for place, name in enumerate(names) if name in checks]

    def take(args: tuple[Any, ...], given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        taken = list(args)
        for place, name in by_place:
            if place < len(taken):
                taken[place] = checks[name](name, taken[place])
        return taken, {name: _taken(checks, name, value) for name, value in given.items()}

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def begin(*args: Any, **given: Any) -> Any:
            taken, named = take(args, given)
            return await function(*taken, **named)

    else:

        @functools.wraps(function)
        def begin(*args: Any, **given: Any) -> Any:
            taken, named = take(args, given)
            return function(*taken, **named)

    return begin  # type: ignore[return-value]  # it is called as the function is


def values(options: Callable[..., object], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is *given* of *options*, a TypedDict or a function, checked against its annotations."""
    checks = _checks_of(options)
    if unknown := given.keys() - options.__annotations__.keys():
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}")
    return {name: _taken(checks, name, value) for name, value in given.items()}


@functools.cache
def _checks_of(function: Callable[..., object]) -> Mapping[str, _Check]:
    found = {name: _check_for(kind) for name, kind in function.__annotations__.items() if name != "return"}
    return {name: check for name, check in found.items() if check is not None}


def _taken(checks: Mapping[str, _Check], name: str, value: object) -> Any:
    return checks[name](name, value) if name in checks else value


def _check_for(annotation: Any) -> _Check | None:
    """Return what checks a value that is to be *annotation*; None: nothing does."""
    if get_origin(annotation) is Literal:
        return functools.partial(_one_of, words=get_args(annotation))
    if get_origin(annotation) is Callable:
        return called
    if get_origin(annotation) is Collection:
        (kind,) = get_args(annotation)
        if kind is str:
            return texts
        return functools.partial(members, kind=kind) if _is_enumeration(kind) else None
    if get_origin(annotation) is not UnionType:
        return _check_of(annotation)
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    check = path if kinds == [str, os.PathLike[str]] else _check_for(kinds[0]) if len(kinds) == 1 else None
    return None if check is None else functools.partial(_unless_none, check=check)


def _check_of(kind: Any) -> _Check | None:
    known: Mapping[Any, _Check] = {float: seconds, int: whole, bool: flag, str: text}
    return functools.partial(member, kind=kind) if _is_enumeration(kind) else known.get(kind)


def _is_enumeration(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _unless_none(name: str, value: object, *, check: _Check) -> Any:
    return None if value is None else check(name, value)


def _one_of(name: str, value: object, *, words: tuple[str, ...]) -> object:
    if value not in words:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name} is one of {', '.join(words)}, not {_quoted(value)}")
    return value


def _quoted(value: object) -> str:
    return repr(value) if value is None or isinstance(value, bool | float) else shorten(value)
