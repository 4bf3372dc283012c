"""Plugs and unplugs of single vCPUs as JSON, one step each."""

from typing import Any

from qmpvcpu.errors import PlacementError, UnprovenError
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Proof
from qmpvcpu.model.transition import ProofSeconds
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Plugged, Verdict


def plug_json(
    layout: Layout,
    ended: VcpuMap | UnprovenError | PlacementError,
    *,
    seconds: float,
    proofs: ProofSeconds,
    placed: float | None = None,
    unplaced: str = "",
) -> dict[str, Any]:
    """Return the step that plugged a slot.

    Args:
        layout: The VM afterwards.
        ended: The slot's vCPU ids, or the error if it was plugged but not as requested.
        seconds: How long it took.
        proofs: What was proven about it, and when.
        placed: After how many seconds its threads were in place on the host, or None.
        unplaced: Why they are not in place; "" if they are, or have no place to be in.
    """
    taken_out: bool | None = False
    if isinstance(ended, PlacementError):
        verdict = Plugged(ended.ids, seconds=seconds)
        unplaced, taken_out = ended.why, ended.taken_out
    elif isinstance(ended, UnprovenError):
        slot = layout.slot_of(ended.ids.lowest)
        acknowledged = False if ended.wanted is Proof.ACKNOWLEDGED else slot.acknowledged
        verdict = Plugged(slot.ids, acknowledged, ended.code, ended.reason, seconds)
    else:
        slot = layout.slot_of(ended.lowest)
        verdict = Plugged(ended, slot.acknowledged, slot.answer.code if slot.answer else None, seconds=seconds)
    shown = {"verdict": to_json(verdict), "proofs": to_json(proofs), "placed": placed}
    return shown | {"unplaced": unplaced, "taken_out": taken_out}


def unplug_json(verdict: Verdict, *, joined: bool) -> dict[str, Any]:
    """Return the step that unplugged a slot, or failed to; *joined* if its removal was already pending."""
    return {"verdict": to_json(verdict), "joined": joined}
