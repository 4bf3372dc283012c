"""Values as JSON, and back: one codec for every value that is printed, kept or sent to another host.

JSON has the shape of the value:

- A dataclass is an object with a key for each field. A class that is one of several, such as a verdict, has a class
  variable ``name``; its object begins with ``kind``, that name in small letters.
- An enum is the name of its member in small letters, a VcpuMap its text, bytes are UTF-8 text.
- Tuples and sets are lists (sets are sorted), mappings are objects. What is annotated as Any is JSON already.

Reading checks every value against the annotation of its field and converts nothing. An annotation can be narrowed:
``Annotated[str, CPU_TYPE]``, with a ``Shape``. A class with a method ``check_foreign`` is asked to raise ValueError
if its fields contradict each other. Errors name the bad value by its path from the outermost object. Every key must
be there, and keys that a class does not have are ignored, so that a later version can add some. A class with a true
class variable ``closed``, which people and other programs write, is read the other way round: what is left out has
its default, and an unknown key is an error.
"""

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

from qmpvcpu.errors import shorten
from qmpvcpu.model.names import Shape
from qmpvcpu.model.vcpumap import VcpuMap

_T = TypeVar("_T")
_Read = Callable[[Any], Any]

_MOST_QUOTED: Final = 60

SCHEMA: Final = "qmpvcpu/1"
"""The format of all documents that are printed, kept on a server or sent."""

KNOWN_SCHEMA: Final = Shape(f"{SCHEMA}, which this version reads", lambda text: text == SCHEMA)
"""The shape of the ``schema`` of what others wrote."""


def to_json(value: Any) -> Any:
    """Return *value* as JSON: what ``json.dumps`` takes. Foreign objects within are written as their text."""
    kind: Any = type(value)
    return _writer_of(kind)(value)


def to_bytes(value: Any) -> bytes:
    """Return *value* as JSON in UTF-8, as it is kept on a server."""
    return json.dumps(to_json(value)).encode()


def from_json(kind: type[_T], data: Mapping[str, Any] | str | bytes) -> _T:
    """Return the value of *kind* that ``to_json`` was given, from the JSON object, or from its text or its UTF-8.

    Raises:
        ValueError: It has another shape, or contradicts itself; the text names the key.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        content = json.loads(text) if isinstance(text, str) else text
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    annotation: Any = kind
    value: _T = _reader_of(annotation)(content)
    return value


def members(data: object, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of the JSON object *data* that *kinds* names, each read by its annotation there.

    For an object that is no value of one class. The annotation ``object`` takes any JSON as it is.

    Raises:
        ValueError: One is missing, or has another shape; the text names the key.
    """
    content = _mapping(data)
    return {name: _take(content, name, _reader_of(kind)) for name, kind in kinds.items()}


# Writing.


@cache  # a function of the class alone
def _writer_of(kind: type) -> Callable[[Any], Any]:
    if dataclasses.is_dataclass(kind):
        return _object_writer(kind)
    return next((write for base, write in _WRITERS if issubclass(kind, base)), str)


def _object_writer(kind: type) -> Callable[[Any], Any]:
    names = tuple(field.name for field in dataclasses.fields(kind))
    tag = {"kind": _kind_of(kind)} if _kind_of(kind) else {}
    return lambda value: tag | {name: to_json(getattr(value, name)) for name in names}


def _kind_of(kind: type) -> str:
    """Return the word that tells *kind* from other classes in its place; "" if there are no others."""
    name = vars(kind).get("name")
    return name.lower() if isinstance(name, str) else ""


_WRITERS: Final[tuple[tuple[Any, Callable[[Any], Any]], ...]] = (
    (enum.Enum, lambda value: value.name.lower()),
    (str | int | float | NoneType, lambda value: value),
    (bytes, lambda value: value.decode()),
    (Mapping, lambda value: {str(key): to_json(each) for key, each in value.items()}),
    (tuple | list, lambda value: [to_json(each) for each in value]),
    (set | frozenset, lambda value: sorted(to_json(each) for each in value)),
)


# Reading. A reader returns the value, or raises ValueError.


def _unlike(value: object, wanted: str) -> str:
    """Say that *value* is not what is *wanted*, for an error."""
    return f"{shorten(value, _MOST_QUOTED)} is not {wanted}"


@cache  # a function of the annotation alone
def _reader_of(kind: Any) -> _Read:
    if (origin := get_origin(kind)) is not None:
        return _GENERIC[origin](get_args(kind))
    if kind in _PLAIN:
        return _PLAIN[kind]
    if dataclasses.is_dataclass(kind):
        return _object_reader(kind)
    if issubclass(kind, enum.Enum):
        return _choice({member.name.lower(): member for member in kind})
    return lambda value: kind(_mapping(value))  # a Mapping, which checks its members itself


def _object_reader(kind: Any) -> _Read:
    annotations: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}
    readers = {name: _reader_of(annotation) for name, annotation in annotations.items()}
    check = getattr(kind, "check_foreign", None)
    closed = getattr(kind, "closed", False)
    with_default = {field.name for field in dataclasses.fields(kind) if closed and not _must_be_there(field)}

    def read(value: object) -> Any:
        data = _mapping(value)
        if closed and (unknown := data.keys() - readers):
            raise ValueError(f"{shorten(min(unknown), _MOST_QUOTED)} is no key of it: {', '.join(readers)}")
        found = kind(
            **{
                name: _take(data, name, read_one)
                for name, read_one in readers.items()
                if name in data or name not in with_default
            }
        )
        if check is not None:
            check(found)
        return found

    return read


def _must_be_there(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _take(data: Mapping[str, Any], key: str, read: _Read) -> Any:
    if key not in data:
        raise ValueError(f"{key!r} is missing")
    try:
        return read(data[key])
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error


def _union_reader(kinds: tuple[Any, ...]) -> _Read:
    """Read None, or one of *kinds*: classes that have a ``kind`` if there are several."""
    some = [each for each in kinds if each is not NoneType]
    if len(some) == 1:
        read_some = _reader_of(some[0])
    else:
        readers = {_kind_of(each): _reader_of(each) for each in some}
        choose = _choice(readers)

        def read_some(value: object) -> Any:
            return _take(_mapping(value), "kind", choose)(value)

    if NoneType not in kinds:
        return read_some
    return lambda value: None if value is None else read_some(value)


def _list_reader(read: _Read) -> Callable[[Any], list[Any]]:
    def read_all(value: object) -> list[Any]:
        found: list[Any] = []
        for each in _list(value):
            try:
                found.append(read(each))
            except ValueError as error:
                raise ValueError(f"[{len(found)}]: {error}") from error
        return found

    return read_all


def _row_reader(parts: tuple[Any, ...]) -> _Read:
    """Read a tuple: of any length, or of as many equal parts as its annotation has."""
    read_all = _list_reader(_reader_of(parts[0]))
    if parts[1:] == (...,):
        return lambda value: tuple(read_all(value))

    def read_some(value: object) -> tuple[Any, ...]:
        if len(_list(value)) != len(parts):
            raise ValueError(_unlike(value, f"a list of {len(parts)}"))
        return tuple(read_all(value))

    return read_some


def _choice(choices: Mapping[str, Any]) -> _Read:
    def read(value: object) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(_unlike(value, f"one of {', '.join(choices)}"))
        return choices[value]

    return read


def _shape_reader(parts: tuple[Any, Shape]) -> _Read:
    read, shape = _reader_of(parts[0]), parts[1]

    def read_shaped(value: object) -> Any:
        found = read(value)
        if not shape.fits(found):
            raise ValueError(_unlike(value, shape.what))
        return found

    return read_shaped


def _mapping_reader(parts: tuple[Any, Any]) -> _Read:
    """Read a mapping of texts; the first of its two parts says so."""
    read_one = _reader_of(parts[1])
    return lambda value: {key: _take(value, key, read_one) for key in _mapping(value)}


def _set_reader(parts: tuple[Any, ...]) -> _Read:
    read_all = _list_reader(_reader_of(parts[0]))
    return lambda value: frozenset(read_all(value))


def _typed(kind: type, what: str) -> _Read:
    def read(value: object) -> Any:
        if not isinstance(value, kind):
            raise ValueError(_unlike(value, what))  # noqa: TRY004 -- bad content, whatever its type
        return value

    return read


_text = _typed(str, "text")
_mapping = _typed(Mapping, "a JSON object")
_list = _typed(list, "a list")


def _whole_number(value: object) -> int:
    if type(value) is not int or value < 0:  # a bool is an int to isinstance
        raise ValueError(_unlike(value, "a whole number from 0 on"))
    return value


def _number(value: object) -> float:
    if type(value) in (int, float):
        try:
            if math.isfinite(value):  # type: ignore[arg-type]  # it is one of the two
                return float(value)  # type: ignore[arg-type]
        except OverflowError:  # an int of hundreds of digits
            pass
    raise ValueError(_unlike(value, "a number"))


_PLAIN: Final[Mapping[Any, _Read]] = {
    str: _text,
    object: lambda value: value,
    bool: _typed(bool, "true or false"),
    int: _whole_number,
    float: _number,
    bytes: lambda value: _text(value).encode(),
    Any: lambda value: value,
    VcpuMap: lambda value: VcpuMap.parse(_text(value)),
}


_GENERIC: Final[Mapping[Any, Callable[[Any], _Read]]] = {
    Annotated: _shape_reader,
    Union: _union_reader,
    UnionType: _union_reader,
    Mapping: _mapping_reader,
    tuple: _row_reader,
    frozenset: _set_reader,
}
