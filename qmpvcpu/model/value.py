"""What the many small values have in common, written once instead of generated for each.

``dataclass`` generates up to seven methods for each class, and compiles each by itself: for three dozen classes that
was half of what ``import qmpvcpu`` cost. Here only the constructor is.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any, NoReturn

__all__ = ["Value", "dataclass"]


class Value:
    """Base of frozen dataclasses that are equal if they are of one kind and all their attributes are."""

    __slots__ = ()

    def _values(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]  # heirs are

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Value) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), *self._values().values()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._values().items())
        return f"{type(self).__name__}({shown})"

    if not TYPE_CHECKING:  # to type checkers the heirs are frozen already

        def __setattr__(self, name: str, value: object) -> NoReturn:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")

        def __delattr__(self, name: str) -> NoReturn:
            raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __getstate__(self) -> object:
        return self._values()

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, slots: bool = False, kw_only: bool = False, **as_in_value: bool) -> Callable[[type], type]:
        """Do what ``dataclasses.dataclass(frozen=True, eq=False, repr=False)`` does for an heir of Value."""
        if as_in_value != {"frozen": True, "eq": False, "repr": False}:
            raise TypeError(f"a Value is frozen, and has its eq and repr already: {as_in_value}")

        def made(kind: type) -> type:
            kind = dataclasses.dataclass(init=False, eq=False, repr=False, slots=slots, kw_only=kw_only)(kind)
            kind.__init__ = _constructor(kind)
            return kind

        return made


def _constructor(kind: type) -> Callable[..., None]:
    fields = dataclasses.fields(kind)
    known: dict[str, Any] = {"_set": object.__setattr__}
    parameters = ["self"]
    for field in sorted(fields, key=lambda field: field.kw_only is True):
        if field.kw_only and "*" not in parameters:
            parameters.append("*")
        if field.default is dataclasses.MISSING:
            parameters.append(field.name)
        else:
            known[f"_{field.name}"] = field.default
            parameters.append(f"{field.name}=_{field.name}")
    lines = [f"def __init__({', '.join(parameters)}):"]
    lines += [f"    _set(self, '{field.name}', {field.name})" for field in fields] or ["    pass"]
    exec("\n".join(lines), known)  # noqa: S102 -- as dataclasses itself does, from names in our own source
    constructor: Callable[..., None] = known["__init__"]
    constructor.__qualname__ = f"{kind.__qualname__}.__init__"
    constructor.__annotations__ = {field.name: field.type for field in fields} | {"return": None}
    return constructor
