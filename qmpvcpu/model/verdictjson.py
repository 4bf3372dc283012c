"""Verdicts as JSON beside what else is told of a step, and back."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

from qmpvcpu.errors import DenialReason
from qmpvcpu.model.jsonread import flag, number, one_of, optional, take, text, vcpu_map, whole_number
from qmpvcpu.model.verdicts import Denied, Pending, Plugged, Refused, Rejected, Unknown, Unplugged, Verdict, as_json

_VERDICTS: Final[Mapping[str, type[Verdict]]] = {
    kind.name: kind for kind in (Plugged, Unplugged, Refused, Pending, Rejected, Denied, Unknown)
}


def verdict_beside(verdict: Verdict | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return *verdict* as a JSON object with the keys of *own* in it, which win.

    Where the verdict has another value for such a key, it stands under ``verdict_`` and the key.
    """
    shown = {"verdict": None} if verdict is None else as_json(verdict)
    hidden = {f"verdict_{key}": shown[key] for key, value in own.items() if key in shown and shown[key] != value}
    return {**shown, **own, **hidden}


def verdict_from_json(data: Mapping[str, Any]) -> Verdict | None:
    """Return the verdict that ``as_json`` or ``verdict_beside`` was given; None if it was None.

    Raises:
        ValueError: It is not of that shape; the text names the key.
    """
    kind = take(data, "verdict", optional(one_of(_VERDICTS)))
    if kind is None:
        return None
    return kind(**{field.name: _take_evidence(data, kind, field.name) for field in fields(kind)})


def _take_evidence(data: Mapping[str, Any], kind: type[Verdict], name: str) -> Any:
    reader = _EVIDENCE.get((kind, name)) or _EVIDENCE[None, name]
    hidden = f"verdict_{name}"
    return take(data, hidden if hidden in data else name, reader)


_EVIDENCE: Final[Mapping[tuple[type[Verdict] | None, str], Callable[[Any], Any]]] = {
    (None, "ids"): vcpu_map,
    (None, "acknowledged"): flag,
    (Plugged, "acknowledged"): optional(flag),
    (None, "code"): optional(whole_number),
    (None, "reason"): text,
    (Denied, "reason"): one_of(DenialReason.__members__),
    (None, "seconds"): number,
    (None, "error_class"): text,
    (None, "desc"): text,
    (None, "hint"): text,
    (None, "detail"): text,
    (None, "why"): text,
}
