"""A row: one piece of work, who did it, and what each run of it took."""

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "BARE",
    "EACH_VM",
    "KEPT",
    "LIBVIRT",
    "OURS",
    "OVER_NATS",
    "RAW",
    "RECORDED",
    "SSH",
    "VIRSH",
    "Goal",
    "Row",
    "Samples",
]

RAW = "raw QMP"
BARE = "python -c 'import asyncio, qemu.qmp'"
OURS = "qmpvcpu"
RECORDED = "qmpvcpu, recorded"
LIBVIRT = "libvirt-python"
VIRSH = "virsh"
OVER_NATS = "qmpvcpu over NATS"
SSH = "one ssh per host"
KEPT = "ssh, connections kept"
EACH_VM = "hosts over NATS"
"""The setting of rows that say how the cost of a VM grows with the number of hosts."""


@dataclass(frozen=True)
class Goal:
    """What the median of *who* shall at most be: over that of *over*, above it, or by itself.

    Attributes:
        who: Whose median.
        at_most: The bound.
        over: Beside whom; None: by itself, in the row's unit.
        above: Bound the difference to *over*, in the row's unit, not the ratio.
    """

    who: str
    at_most: float
    over: str | None = None
    above: bool = False


@dataclass(frozen=True)
class Row:
    """One piece of work.

    Attributes:
        work: What was done.
        setting: On what.
        reads: What it measures, and how to read it.
        samples: What each run took, by who did it; who comes first is the base of the ratios.
        unit: Of the samples.
        goals: What it shall be.
    """

    work: str
    setting: str
    reads: str
    samples: Mapping[str, tuple[float, ...]]
    unit: str = "ms"
    goals: tuple[Goal, ...] = field(default=())

    @property
    def rank(self) -> tuple[bool, list[int]]:
        """What sorts rows of the same work: KVM above TCG, then by QEMU's version."""
        version = re.search(r"QEMU ([\d.]+)", self.setting)
        return self.setting.startswith("KVM"), [int(number) for number in version[1].split(".")] if version else []

    def median(self, who: str) -> float:
        """The median of what *who* took."""
        return statistics.median(self.samples[who])

    def ratio(self, who: str, over: str) -> float | None:
        """The median of *who* over that of *over*; None where one of them did not take part."""
        if who not in self.samples or over not in self.samples:
            return None
        return self.median(who) / self.median(over)

    def judge(self, goal: Goal) -> tuple[float, bool] | None:
        """What *goal* bounds, and whether it is met; None where somebody did not take part."""
        if goal.who not in self.samples or (goal.over is not None and goal.over not in self.samples):
            return None
        value = self.median(goal.who)
        if goal.over is not None:
            value = value - self.median(goal.over) if goal.above else value / self.median(goal.over)
        return value, value <= goal.at_most


class Samples:
    """What runs took, as they are taken."""

    def __init__(self) -> None:
        self._taken: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def note(self, work: str, who: str, took: float) -> None:
        """Add what one run took."""
        self._taken[work][who].append(took)

    def __getitem__(self, work: str) -> dict[str, tuple[float, ...]]:
        return {who: tuple(taken) for who, taken in self._taken[work].items()}
