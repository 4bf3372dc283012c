"""VcpuMap: an immutable set of vCPU ids, with libvirt's text and byte forms."""

import operator
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any, Self, SupportsIndex, TypeVar

from qmpvcpu.errors import InvalidMapError, shorten

_K = TypeVar("_K")

MOST_VCPUS = 16384
"""How many vCPUs a VM can have at most: libvirt refuses a higher id (VIR_DOMAIN_CPUMASK_LEN), measured with 9.0.0."""

_MAX_ID = MOST_VCPUS - 1
# Twice what it takes to name every id one by one; more would only cost time.
_MAX_TEXT = 200_000
_MAX_QUOTE = 40
_MOST_NAMED = 60


class VcpuMap(AbstractSet[int]):
    """An immutable set of vCPU ids: libvirt's numbers, 0 up to the VM's maximum less 1.

    Iterates in ascending order, compares and combines with any set of ints, and is hashable.

    Args:
        ids: The vCPU ids, in any order; repeats count once.

    Raises:
        InvalidMapError: An id is not an int, is negative, or is above 16383 (libvirt's bound).

    Example:
        >>> VcpuMap([5, 0, 2, 3, 4])
        VcpuMap('0,2-5')
        >>> VcpuMap.parse("0-3,^2") | {7}
        VcpuMap('0-1,3,7')
    """

    __slots__ = ("_bits", "_bytes", "_ids")

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._bits = _bits_of(ids)
        # Made when they are first needed: a bit of a long int takes as long to find as the int is.
        self._bytes: bytes | None = None
        self._ids: tuple[int, ...] | None = None

    @classmethod
    def _made(cls, bits: int) -> Self:
        made = cls.__new__(cls)
        made._bits, made._bytes, made._ids = bits, None, None  # noqa: SLF001 -- as __init__ does, without its checks
        return made

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read libvirt's cpuset grammar: ids and ranges, ``^`` takes one id out of what stands before it.

        An empty text is the empty map (libvirt itself has no way to write that). Taking out what is not in is no
        error; including no id at all is.

        Raises:
            InvalidMapError: The text is not of that grammar, or an id is out of bounds; it names the bad part.
        Source:
            libvirt formatdomain, "CPU Allocation", attribute cpuset; compared with virsh 9.0.0, which also takes a
            comma at the end.

        Example:
            >>> str(VcpuMap.parse("0-3,^2,8"))
            '0-1,3,8'
        """
        if not isinstance(text, str):
            raise TypeError(f"a map to be read is text, not {shorten(text)}")
        if len(text) > _MAX_TEXT:
            raise InvalidMapError(text, f"it is longer than {_MAX_TEXT} characters")
        if not text.strip():
            return cls()
        bits = 0  # cheaper than a set where long ranges are named again and again
        includes = False
        for part in text.split(","):
            body = part.strip()
            low, dash, high = body.partition("-")
            if body.startswith("^"):
                if dash:
                    raise InvalidMapError(text, f"{_quoted(body)}: only one id can be taken out at a time")
                bits &= ~(1 << _number(body[1:], body, text))
                continue
            first = _number(low.rstrip(), body, text)
            last = _number(high.lstrip(), body, text) if dash else first
            if last < first:
                raise InvalidMapError(text, f"{_quoted(body)} runs downwards")
            bits |= (1 << (last + 1)) - (1 << first)
            includes = True
        if not includes:
            raise InvalidMapError(text, f"{_quoted(text.strip())} excludes an id, and no id is included")
        return cls._made(bits)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read libvirt's cpumap: bit ``i`` of byte ``j`` is vCPU ``8 * j + i``.

        Raises:
            InvalidMapError: A bit above 16383 is set.
        """
        value = int.from_bytes(data, "little")
        if value.bit_length() > _MAX_ID + 1:
            raise InvalidMapError(value.bit_length() - 1, f"a vCPU id is 0 to {_MAX_ID}")
        return cls._made(value)

    @property
    def lowest(self) -> int:
        """The lowest id, by which a slot of these ids is named; -1 if there is none."""
        return (self._bits & -self._bits).bit_length() - 1

    def to_int(self) -> int:
        """Return the map as a bit mask: bit ``i`` is vCPU ``i``."""
        return self._bits

    def to_bytes(self, length: int | None = None) -> bytes:
        """Return libvirt's cpumap, little endian, of *length* bytes (default: as few as needed, at least 1).

        Raises:
            OverflowError: *length* bytes cannot hold the map.
        """
        needed = max(1, (self._bits.bit_length() + 7) // 8)
        return self._bits.to_bytes(needed if length is None else length, "little")

    def __contains__(self, item: object) -> bool:
        if type(item) is not int:
            return item in tuple(self)
        if self._bytes is None:
            self._bytes = self.to_bytes()
        return 0 <= item < 8 * len(self._bytes) and bool(self._bytes[item >> 3] >> (item & 7) & 1)

    def __iter__(self) -> Iterator[int]:
        if self._ids is None:
            self._ids = _ids_of(self._bits)
        return iter(self._ids)

    def __len__(self) -> int:
        return self._bits.bit_count()

    # Defined here, and not only inherited, for their speed, and so that type checkers know what comes of them.

    def __or__(self, other: AbstractSet[Any]) -> Self:
        return self._made(self._bits | _bits_of(other))

    def __xor__(self, other: AbstractSet[Any]) -> Self:
        return self._made(self._bits ^ _bits_of(other))

    def __and__(self, other: AbstractSet[object]) -> Self:
        return self._made(self._bits & self._bits_in(other))

    def __sub__(self, other: AbstractSet[object]) -> Self:
        return self._made(self._bits & ~self._bits_in(other))

    def _bits_in(self, other: Iterable[object]) -> int:
        """Return which of the ids are in *other*, which may have anything else too."""
        if isinstance(other, VcpuMap):
            return other.to_int()
        members = frozenset(other)
        return _bits_of(each for each in self if each in members)

    def __eq__(self, other: object) -> bool:
        return self._bits == other._bits if isinstance(other, VcpuMap) else super().__eq__(other)

    def __hash__(self) -> int:
        return self._hash()

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for each in self:
            if runs and runs[-1][1] == each - 1:
                runs[-1][1] = each
            else:
                runs.append([each, each])
        return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)

    def __repr__(self) -> str:
        return f"VcpuMap({str(self)!r})"


def named(ids: VcpuMap) -> str:
    """Return ``vCPU 3``, or ``vCPUs 3-5``; a very scattered map is cut."""
    text = str(ids)
    shown = text if len(text) <= _MOST_NAMED else f"{text[:_MOST_NAMED]}..."
    return f"vCPU {shown}" if len(ids) == 1 else f"vCPUs {shown}"


def possible_ids(ids: Iterable[int]) -> VcpuMap:
    """Return those of *ids* that can be vCPU ids, for an error about ids that were not checked."""
    return VcpuMap(each for each in ids if 0 <= each <= _MAX_ID)


def union(maps: Iterable[VcpuMap]) -> VcpuMap:
    """Return the ids of all *maps*."""
    bits = 0
    for each in maps:
        bits |= each.to_int()
    return VcpuMap._made(bits)  # noqa: SLF001 -- it is of this module


def union_by(pairs: Iterable[tuple[_K, VcpuMap]]) -> dict[_K, VcpuMap]:
    """Return the ids of all maps with the same key, by key, in the order of the first of each."""
    found: dict[_K, VcpuMap] = {}
    for key, ids in pairs:
        found[key] = found.get(key, VcpuMap()) | ids
    return found


def _bits_of(ids: Iterable[int]) -> int:
    if isinstance(ids, VcpuMap):
        return ids.to_int()
    if isinstance(ids, str | bytes | bytearray):  # these have elements too, which are no vCPU ids
        raise InvalidMapError(ids, "text is read by VcpuMap.parse, libvirt's bytes by VcpuMap.from_bytes")
    if not isinstance(ids, Iterable):
        given = None if ids is None else shorten(ids)
        raise TypeError(f"vCPU ids are given as a collection, such as [3] or VcpuMap.parse('3'), not {given}")
    bits = 0
    for each in ids:
        number = each if type(each) is int else _index(each)
        if not 0 <= number <= _MAX_ID:
            raise InvalidMapError(each, f"a vCPU id is 0 to {_MAX_ID}")
        bits |= 1 << number
    return bits


def _ids_of(bits: int) -> tuple[int, ...]:
    lowest = max((bits & -bits).bit_length() - 1, 0)  # a map of few high ids is short
    return tuple(place for place, bit in enumerate(reversed(f"{bits >> lowest:b}"), lowest) if bit == "1")


def _index(given: SupportsIndex) -> int:
    if isinstance(given, bool) or not isinstance(given, SupportsIndex):
        raise InvalidMapError(given, "a vCPU id is an int")
    return operator.index(given)


def _number(digits: str, part: str, text: str) -> int:
    if not (digits.isascii() and digits.isdigit()):
        whole = "" if digits == part else f" in {_quoted(part)}"
        raise InvalidMapError(text, f"{_quoted(digits)}{whole} is not a vCPU id")
    # Bounded before int(): a digit string of megabytes must not cost quadratic time, nor a range its memory.
    significant = digits.lstrip("0") or "0"  # int() refuses thousands of digits, zeros as well
    if len(significant) > len(str(_MAX_ID)) or int(significant) > _MAX_ID:
        raise InvalidMapError(text, f"{_quoted(digits)} is too high: a vCPU id is 0 to {_MAX_ID}")
    return int(significant)


def _quoted(part: str) -> str:
    return shorten(part, _MAX_QUOTE)
