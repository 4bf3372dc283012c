"""What is wanted of one VM, as the record keeps it: what is under way, what was asked for last, what is owed.

QEMU cannot tell any of this. It is computed when a save begins, so a save is never stale.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import Action, Intent, Step
from qmpvcpu.model.vcpumap import VcpuMap

if TYPE_CHECKING:
    from qmpvcpu.model.exported import PreviousVcpus
    from qmpvcpu.model.placement import Placement


class Promised(NamedTuple):
    """What the next boot is to have, once everything is done that was promised.

    Attributes:
        vcpus: Its vCPUs.
        config: The document that keeps it; None: the record.
        placement: Where QEMU's threads are to run then; None: that stays as it is.
    """

    vcpus: VcpuMap
    config: str | None
    placement: "Placement | None" = None


class Recorded(NamedTuple):
    """What a save that begins now writes.

    Attributes:
        generation: Of the layout that is written.
        intent: What is under way, or was left so; None: nothing.
        desired: The map that was asked for last, or None.
        previous: What an earlier QEMU had, and this one has not been given again; None: nothing.
        placement: Where QEMU's threads are to run on its host; None: nothing is wanted of them.
    """

    generation: int
    intent: Intent | None
    desired: VcpuMap | None
    previous: "PreviousVcpus | None"
    placement: "Placement | None" = None


class Intentions:
    """What is wanted of one VM.

    Args:
        interrupted: The transition that was begun and is not over, or None.
        desired: The map that was asked for last, or None.
        previous: What an earlier QEMU had and this one has not been given again, or None.

    Attributes:
        interrupted: As given, until it is taken up or superseded.
        desired: As given; the map that is asked for, from the first change on.
        previous: As given, until the VM has it, or a change is asked for that is not to bring it back.
    """

    def __init__(
        self,
        interrupted: Intent | None = None,
        desired: VcpuMap | None = None,
        previous: "PreviousVcpus | None" = None,
    ) -> None:
        self.interrupted = interrupted
        self.desired = desired
        self.previous = previous

    def drop_if_there(self, layout: Layout) -> None:
        """Keep nothing of an earlier QEMU if *layout* has all of it."""
        if self.previous is not None and self.previous.is_there(layout):
            self.previous = None

    def want_map(self, target: VcpuMap, *, rebuilds: bool) -> Callable[[], None]:
        """Note that a whole map is asked for; return what takes that back, if it could not be recorded."""
        interrupted, desired, previous = self.interrupted, self.desired, self.previous

        def take_back() -> None:
            self.interrupted = _both(interrupted, self.interrupted)
            self.desired, self.previous = desired, previous

        self.interrupted, self.desired = None, target
        if not rebuilds:
            self.previous = None
        return take_back

    def want_steps(self, steps: Sequence[Step], enabled: VcpuMap) -> Callable[[], None]:
        """Note that single steps are asked for; return what takes that back, as far as others want nothing else."""
        desired, previous = self.desired, self.previous
        before = enabled if desired is None else desired

        def take_back() -> None:
            if self.desired == _after(steps, before):
                self.desired, self.previous = desired, previous
            elif self.desired is not None:
                concerned = {each for step in steps for each in step.ids}
                self.desired = (self.desired - concerned) | (before & concerned)

        self.desired, self.previous = _after(steps, before), None
        return take_back

    def leave(self, intent: Intent | None) -> None:
        """Note that a map is over but for *intent*; what single steps have left meanwhile stays."""
        self.interrupted = _both(intent, self.interrupted)


def _both(first: Intent | None, then: Intent | None) -> Intent | None:
    if first is None or then is None:
        return first or then
    return merged(first, then.steps, then.start, None)


def merged(
    base: Intent | None,
    steps: tuple[Step, ...],
    enabled: VcpuMap,
    promised: Promised | None,
) -> Intent | None:
    """Return the intent of *base* and of further single *steps*, with what the next boot is *promised*."""
    intent = base
    if steps:
        base = base or Intent(enabled, enabled, ())
        intent = replace(base, target=_after(steps, base.target), steps=(*base.steps, *steps))
    return promising(intent, promised)


def promising(intent: Intent | None, promised: Promised | None) -> Intent | None:
    """Return *intent* with what the next boot is *promised*, if there are both."""
    if intent is None or promised is None:
        return intent
    vcpus, config, placement = promised
    return replace(intent, next_boot=vcpus, config=config, next_placement=placement)


def _after(steps: Iterable[Step], enabled: VcpuMap) -> VcpuMap:
    """Return *enabled* once *steps* are done."""
    for step in steps:
        enabled = enabled - step.ids if step.action is Action.UNPLUG else enabled | step.ids
    return enabled
