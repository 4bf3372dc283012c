"""Events as JSON."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Final

from qmpvcpu import events
from qmpvcpu.errors import shorten
from qmpvcpu.events import Event
from qmpvcpu.model.codec import members, to_json

_OURS: Final = "requested_at"  # on the clock of the process that received it


def event_json(event: Event) -> dict[str, Any]:
    """Return *event* with all its fields, except for the time of the request, which is on one process's clock."""
    said = {field.name: to_json(getattr(event, field.name)) for field in fields(event) if field.name != _OURS}
    return {"event": type(event).__name__, **said}


def event_from_json(data: object) -> Event:
    """Return the event that ``event_json`` was given; other keys are not read.

    Raises:
        ValueError: It is not an event, or has another shape; the text names the key.
    """
    name = members(data, {"event": str})["event"]
    kind = vars(events).get(name)
    if not isinstance(kind, type) or not issubclass(kind, Event):
        raise ValueError(f"'event': {shorten(name)} is no event")  # noqa: TRY004 -- bad content, whatever its type
    return kind(**members(data, _kinds(name)))


@cache  # it depends on the class alone
def _kinds(name: str) -> Mapping[str, Any]:
    """Return the fields of the event called *name*, each with the annotation to read it by."""
    from qmpvcpu.model.placement import Place  # few events have one

    return {
        field.name: Place if field.type == Place.__name__ else field.type
        for field in fields(vars(events)[name])
        if field.name != _OURS
    }
