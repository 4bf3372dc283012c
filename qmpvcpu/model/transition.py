"""What a transition is made of: actions, steps, policies, and the intent that is recorded before it begins."""

import enum
from dataclasses import dataclass

from qmpvcpu.model.vcpumap import VcpuMap


class Action(enum.Enum):
    """What a step does to its slot.

    KEEP is for a vCPU that shall stay while its removal is pending, which QEMU has no way to withdraw: the guest's
    answer is waited for, and the vCPU is plugged again if it left.
    """

    PLUG = "plug"
    UNPLUG = "unplug"
    KEEP = "keep"


class Affect(enum.Enum):
    """What a change is of.

    LIVE: the VM as it runs. CONFIG: its next boot; QEMU is not spoken to. BOTH: both are checked first, then LIVE is
    changed, and CONFIG only once LIVE is as wished.

    Source: libvirt, virDomainModificationImpact.
    """

    LIVE = "live"
    CONFIG = "config"
    BOTH = "both"


class OnFailure(enum.Enum):
    """What becomes of the other steps when one fails.

    STOP: nothing more is sent; removals are asked for one at a time, so that after a refusal nothing else leaves.
    CONTINUE: the others are done all the same. REVERT: nothing more is sent, what is in flight is awaited, and what
    this transition did is undone, in reverse order. CONTINUE and REVERT ask for all removals at once.
    """

    STOP = "stop"
    CONTINUE = "continue"
    REVERT = "revert"


class Recovery(enum.Enum):
    """What to do with a transition that was cut short.

    REPORT: look at it, change nothing, and leave it interrupted. FINISH: go on to its target under its policy.
    REVERT: undo what it had done.
    """

    REPORT = "report"
    FINISH = "finish"
    REVERT = "revert"


class Direction(enum.Enum):
    """Whether a transition goes towards its target or back to its start."""

    FORWARD = "forward"
    REVERTING = "reverting"


@dataclass(frozen=True, slots=True)
class Step:
    """One slot's part of a transition.

    Attributes:
        action: What is done.
        ids: All vCPU ids of the slot, which move together.
        qom_path: The CPU that is to go, or to stay; None for a plug.
        joins: True for the unplug of a vCPU whose removal is pending already: nothing is sent, its answer is awaited.
    """

    action: Action
    ids: VcpuMap
    qom_path: str | None = None
    joins: bool = False

    @property
    def first(self) -> int:
        """The first vCPU id of the slot, which names it."""
        return min(self.ids)

    def __str__(self) -> str:
        return f"{self.action.value} {self.ids}"


@dataclass(frozen=True, slots=True)
class Intent:
    """What is wanted of the VM and under way: in the record before its first command, until its outcome is known.

    Attributes:
        start: The vCPUs that were plugged before.
        target: The vCPUs that are to be.
        steps: The slots concerned, in order.
        on_failure: The policy.
        timeout: How long the guest has for each answer, in seconds.
        direction: Which way it goes now.
        next_boot: What the next boot is to have once the target is reached; None: it is left as it is.
        config: The document that the next boot is kept in; None: the record.
    """

    start: VcpuMap
    target: VcpuMap
    steps: tuple[Step, ...]
    on_failure: OnFailure = OnFailure.STOP
    timeout: float = 30.0
    direction: Direction = Direction.FORWARD
    next_boot: VcpuMap | None = None
    config: str | None = None
