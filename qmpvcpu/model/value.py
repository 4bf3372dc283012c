"""What the many small values have in common, written once instead of generated for each."""

from dataclasses import fields

__all__ = ["Value"]


class Value:
    """Base of frozen dataclasses that are equal if they are of one kind and all their attributes are.

    ``@dataclass(eq=False, repr=False)`` leaves these methods to it: generated for each of two dozen classes they
    were a third of what ``import qmpvcpu`` costs.
    """

    __slots__ = ()

    def _values(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]  # heirs are

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Value) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), *self._values().values()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._values().items())
        return f"{type(self).__name__}({shown})"
