"""Plans as JSON."""

from collections.abc import Mapping
from typing import Any, Final

from qmpvcpu.model.codec import members, to_json
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Denied
from qmpvcpu.planning.plan import Plan

_TOLD: Final[Mapping[str, Any]] = {
    "start": VcpuMap,
    "target": VcpuMap,
    "steps": tuple[Step, ...],
    "denied": tuple[Denied, ...],
    "warnings": tuple[str, ...],
}


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return the planned steps, and the denied ones."""
    return {name: to_json(getattr(plan, name)) for name in _TOLD}


def plan_from_json(data: Mapping[str, Any], layout: Layout | None = None) -> Plan:
    """Return the plan that ``plan_json`` was given.

    Args:
        data: The JSON object.
        layout: The VM that the plan was made for, if known; the plan uses it to explain its steps.

    Raises:
        ValueError: It has another shape; the text names the key.
    """
    told = members(data, _TOLD)
    if layout is not None:
        told |= {"slots": layout.slots, "pending_slots": layout.pending_slots}
    return Plan(**told)
