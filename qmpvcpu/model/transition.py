"""What a transition is made of: actions, steps, policies, and the intent that is recorded before it begins."""

import enum
from dataclasses import dataclass

from qmpvcpu.model.vcpumap import VcpuMap


class Action(enum.Enum):
    """What a step does to its slot.

    KEEP is for a vCPU that should stay while its removal is pending. QEMU cannot withdraw a removal, so the step
    waits for the guest's answer and plugs the vCPU again if it left.
    """

    PLUG = "plug"
    UNPLUG = "unplug"
    KEEP = "keep"


class Affect(enum.Enum):
    """What a change applies to.

    LIVE: the running VM. CONFIG: its next boot; nothing is sent to QEMU. BOTH: both are checked first, then the
    running VM is changed, and the next boot only once that has succeeded.

    Source: libvirt, virDomainModificationImpact.
    """

    LIVE = "live"
    CONFIG = "config"
    BOTH = "both"


class OnFailure(enum.Enum):
    """What to do with the remaining steps when one fails.

    STOP: send nothing more; removals are requested one at a time, so that after a refusal nothing else leaves.
    CONTINUE: do the others all the same. REVERT: send nothing more, wait for what is in flight, and undo what this
    transition did, in reverse order. CONTINUE and REVERT request all removals at once.
    """

    STOP = "stop"
    CONTINUE = "continue"
    REVERT = "revert"


class Recovery(enum.Enum):
    """What to do with a transition that was interrupted.

    REPORT: report what a read shows of it, change nothing, and leave it interrupted. FINISH: go on to its target
    under its policy. REVERT: undo what it had done.
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
        qom_path: The CPU that should go, or stay; None for a plug.
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
    """A transition as it is recorded: before its first command, and until its outcome is known.

    Attributes:
        start: The vCPUs that were plugged before.
        target: The vCPUs that should be.
        steps: The slots concerned, in order.
        on_failure: The policy.
        timeout: How long the guest has for each answer, in seconds.
        direction: Which way it goes now.
        next_boot: What the next boot should have once the target is reached; None: it stays as it is.
        config: The document that keeps the next boot; None: the record.
    """

    start: VcpuMap
    target: VcpuMap
    steps: tuple[Step, ...]
    on_failure: OnFailure = OnFailure.STOP
    timeout: float = 30.0
    direction: Direction = Direction.FORWARD
    next_boot: VcpuMap | None = None
    config: str | None = None
