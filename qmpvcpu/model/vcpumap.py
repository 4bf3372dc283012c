"""VcpuMap: an immutable set of vCPU ids, with libvirt's text and byte forms."""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Self

from qmpvcpu.errors import InvalidMapError

__all__ = ["VcpuMap"]

# libvirt refuses a cpuset with a bit from here on (VIR_DOMAIN_CPUMASK_LEN), measured with libvirt 9.0.0.
_MAX_ID = 16383


class VcpuMap(AbstractSet[int]):
    """An immutable set of vCPU ids: libvirt's numbers, 0 up to the VM's maximum less 1.

    Iterates in ascending order, compares and combines with any set of ints, and is hashable.

    Args:
        ids: The vCPU ids, in any order; repeats count once.

    Raises:
        InvalidMapError: An id is no int, is negative, or is above 16383 (libvirt's bound).

    Example:
        >>> VcpuMap([5, 0, 2, 3, 4])
        VcpuMap('0,2-5')
        >>> VcpuMap.parse("0-3,^2") | {7}
        VcpuMap('0-1,3,7')
    """

    __slots__ = ("_ids",)

    def __init__(self, ids: Iterable[int] = ()) -> None:
        given = list(ids)
        for each in given:
            if isinstance(each, bool) or not isinstance(each, int):
                raise InvalidMapError(each, "a vCPU id is an int")
            if not 0 <= each <= _MAX_ID:
                raise InvalidMapError(each, f"a vCPU id is 0 to {_MAX_ID}")
        self._ids = tuple(sorted(set(given)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read libvirt's cpuset grammar: ids and ranges, ``^`` takes out what stands before it.

        An empty text is the empty map (libvirt itself has no way to write that).

        Raises:
            InvalidMapError: The text is not of that grammar, or an id is out of bounds.
        Source:
            libvirt formatdomain, "CPU Allocation", attribute cpuset.

        Example:
            >>> str(VcpuMap.parse("0-3,^2,8"))
            '0-1,3,8'
        """
        ids: set[int] = set()
        if not text.strip():
            return cls()
        for part in text.split(","):
            body = part.strip()
            exclude = body.startswith("^")
            low, dash, high = body.removeprefix("^").partition("-")
            if exclude and dash:
                raise InvalidMapError(text, f"{body!r}: only one id can be excluded at a time")
            first = _number(low, text)
            last = _number(high, text) if dash else first
            if last < first:
                raise InvalidMapError(text, f"{body!r} runs downwards")
            if exclude:
                ids.discard(first)
            else:
                ids.update(range(first, last + 1))
        return cls(ids)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read libvirt's cpumap: bit ``i`` of byte ``j`` is vCPU ``8 * j + i``.

        Raises:
            InvalidMapError: A bit above 16383 is set.
        """
        value = int.from_bytes(data, "little")
        return cls(each for each in range(value.bit_length()) if value >> each & 1)

    def to_int(self) -> int:
        """Return the map as a bit mask: bit ``i`` is vCPU ``i``."""
        return sum(1 << each for each in self._ids)

    def to_bytes(self, length: int | None = None) -> bytes:
        """Return libvirt's cpumap, little endian, of *length* bytes (default: as few as needed, at least 1).

        Raises:
            OverflowError: *length* bytes cannot hold the map.
        """
        needed = (self._ids[-1] // 8 + 1) if self._ids else 1
        return self.to_int().to_bytes(needed if length is None else length, "little")

    def __contains__(self, item: object) -> bool:
        return item in self._ids

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        # Defined here, and not only inherited, so that type checkers let it be compared with plain sets.
        return super().__eq__(other)

    def __hash__(self) -> int:
        return self._hash()

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for each in self._ids:
            if runs and runs[-1][1] == each - 1:
                runs[-1][1] = each
            else:
                runs.append([each, each])
        return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)

    def __repr__(self) -> str:
        return f"VcpuMap({str(self)!r})"


def _number(digits: str, text: str) -> int:
    cleaned = digits.strip()
    if not (cleaned.isascii() and cleaned.isdigit()):
        raise InvalidMapError(text, f"{cleaned!r} is no vCPU id")
    # Bounded before int(): a digit string of megabytes must not cost quadratic time, nor a range its memory.
    if len(cleaned.lstrip("0")) > len(str(_MAX_ID)) or int(cleaned) > _MAX_ID:
        raise InvalidMapError(text, f"a vCPU id is 0 to {_MAX_ID}")
    return int(cleaned)
