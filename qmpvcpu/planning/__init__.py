"""Floor 2: what may be done to a VM, and in which order, decided from what is known of it. Pure: no I/O, no clock.

``checks`` says of one step whether it may be sent; ``plan`` turns a wish into steps; ``recovery`` turns a transition
that was cut short into a wish; ``replaying`` finds what a stopped QEMU lacks of a VM's vCPUs; ``migrating`` says
whether another QEMU can take the VM over.
"""

from typing import TYPE_CHECKING

from qmpvcpu.lazy import lazily

if TYPE_CHECKING:
    from qmpvcpu.planning.checks import Situation, check_export, check_plug, check_unplug, find_slot
    from qmpvcpu.planning.migrating import (
        Difference,
        DifferenceKind,
        Effect,
        TargetMismatchError,
        arrived,
        changes_since,
        compare_arrived,
        compare_target,
        demand,
        never_came,
    )
    from qmpvcpu.planning.plan import Plan, check_plan, plan_count, plan_map, read_wish
    from qmpvcpu.planning.recovery import finish_wish, in_order_of, observed_report, revert_wish
    from qmpvcpu.planning.replaying import Wanted, check_replayed, plan_replay

__all__ = [
    "Difference",
    "DifferenceKind",
    "Effect",
    "Plan",
    "Situation",
    "TargetMismatchError",
    "Wanted",
    "arrived",
    "changes_since",
    "check_export",
    "check_plan",
    "check_plug",
    "check_replayed",
    "check_unplug",
    "compare_arrived",
    "compare_target",
    "demand",
    "find_slot",
    "finish_wish",
    "in_order_of",
    "never_came",
    "observed_report",
    "plan_count",
    "plan_map",
    "plan_replay",
    "read_wish",
    "revert_wish",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, __all__, ("checks", "plan", "migrating", "recovery", "replaying"))
