"""KVM's counters for one vCPU, from QEMU or from JSON."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from qmpvcpu.errors import shorten
from qmpvcpu.model.names import WORD, is_word

# How often a vCPU has left guest mode: on x86, arm64 and riscv, and on powerpc (the kernel's arch/*/kvm,
# kvm_vcpu_stats_desc). s390x and loongarch count each cause of its own, and have no such sum.
EXITS: Final = ("exits", "sum_exits")
# Whether it has nothing to do just now.
HALTED: Final = "blocking"

_LARGEST: Final = (1 << 64) - 1  # QAPI's uint64
_MOST_COUNTERS: Final = 512  # of one vCPU: x86 has 47, s390x some hundred
_MOST_COLUMNS: Final = 1024  # of one histogram: x86 has 32
_MOST_QUOTED: Final = 60

KvmValue = int | bool | tuple[int, ...]


class KvmCounters(Mapping[str, KvmValue]):
    """KVM's counters for one vCPU, by their names in ``query-stats``: numbers, truth values, columns of histograms.

    A read-only mapping. Units are KVM's, as in the names (``halt_wait_ns``). The columns of a histogram are a tuple,
    in JSON a list.

    Args:
        counters: The counters by name, as QEMU or JSON has them.

    Raises:
        ValueError: There are too many, or one has a name or a value that KVM could not give it.

    Source: QEMU qapi/stats.json, ``StatsValue``; the kernel's virt/kvm/api.rst, ``KVM_GET_STATS_FD``.
    """

    __slots__ = ("_items",)

    def __init__(self, counters: Mapping[str, Any]) -> None:
        if len(counters) > _MOST_COUNTERS:
            raise ValueError(f"{len(counters)} counters of one vCPU are more than {_MOST_COUNTERS}")
        self._items: dict[str, KvmValue] = dict(counters)
        for name, value in counters.items():
            if not _is_name(name):
                raise ValueError(f"{shorten(name, _MOST_QUOTED)} is not {WORD.what}")
            kind = type(value)
            if kind is int:
                if not 0 <= value <= _LARGEST:
                    raise ValueError(f"{name!r}: {shorten(value, _MOST_QUOTED)} has not 64 bits")
            elif kind is list or kind is tuple:
                self._items[name] = _columns(name, value)
            elif kind is not bool:
                raise ValueError(f"{name!r}: {shorten(value, _MOST_QUOTED)} is no number, truth value or histogram")

    @property
    def exits(self) -> int | None:
        """How often the vCPU has left guest mode; None if that is not counted."""
        counts = (self._items.get(name) for name in EXITS)
        return next((count for count in counts if type(count) is int), None)

    def __getitem__(self, name: str) -> KvmValue:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"KvmCounters({self._items!r})"


NO_COUNTERS: Final = KvmCounters({})
"""Those of a vCPU for which KVM counts nothing."""


@lru_cache(maxsize=1024)  # all vCPUs have the same
def _is_name(name: str) -> bool:
    return is_word(name)


def _columns(name: str, value: list[Any] | tuple[Any, ...]) -> tuple[int, ...]:
    if len(value) > _MOST_COLUMNS:
        raise ValueError(f"{name!r}: a histogram of {len(value)} columns has more than {_MOST_COLUMNS}")
    if value and ({*map(type, value)} != {int} or min(value) < 0 or max(value) > _LARGEST):
        raise ValueError(f"{name!r}: a column of {shorten(value, _MOST_QUOTED)} is no number of 64 bits")
    return tuple(value)
