"""What agents tell in one stream: what happens to VMs, and who asked for what and what came of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

from qmpvcpu.documents import event_from_json
from qmpvcpu.errors import printable
from qmpvcpu.events import Event, LayoutChanged, Origin
from qmpvcpu.model.codec import from_json
from qmpvcpu.model.hosts import VmKey, name_of
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.wish import Wish, WishPhase

_log = logging.getLogger("qmpvcpu.fleet")

_MISSED: Final = "Missed"


@dataclass(frozen=True)
class MapState:
    """A layout in short.

    Attributes:
        max: How many vCPUs the machine can have.
        enabled: Those that are plugged.
        pending: Those whose removal is asked for and unanswered.
    """

    max: int
    enabled: VcpuMap
    pending: VcpuMap

    @classmethod
    def of(cls, layout: Layout) -> "MapState":
        """Return *layout* in short."""
        return cls(layout.max, layout.enabled, layout.pending)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Event):
    """A host's agent has begun a wish or a request.

    Attributes:
        who: Who asked.
        operation: ``wish``, or the operation of a request, such as ``plug``.
        why: The reason, for people; "": a request.
        revision: The revision of the wish; None: it is a request.
        wish: The wish; None: it is a request.
        request: The request, as it came; None: it is a wish.
    """

    closed: ClassVar[bool] = True

    generation: int = 0
    origin: Origin = Origin.OTHER
    who: str
    operation: str
    why: str = ""
    revision: int | None = None
    wish: Wish | None = None
    request: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Event):
    """What came of a wish or a request to a host's agent.

    Attributes:
        who: Who asked; "": unknown.
        operation: As in ``Asked``.
        code: The exit code that the command would have had.
        why: What went wrong; "": nothing to say.
        revision: The revision of the wish; None: it was a request.
        id: The wish's id; "": a request, or a wish that could not be read.
        phase: How far the wish got; None: it was a request.
    """

    closed: ClassVar[bool] = True

    generation: int = 0
    origin: Origin = Origin.OTHER
    who: str = ""
    operation: str
    code: int = 0
    why: str = ""
    revision: int | None = None
    id: str = ""
    phase: WishPhase | None = None


_AUDIT: Final[Mapping[str, type[Event]]] = {"Asked": Asked, "Answered": Answered}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told(Event):
    """An event that another host told of, with when and what was known then, on its way to who takes it."""

    event: Event
    at: float
    state: MapState | None


def whose(subject: str) -> tuple[VmKey, str]:
    """Return whose event has *subject*, and its kind.

    Raises:
        ValueError: A token of it stands for no name.
    """
    host, vm, kind = subject.split(".")[-3:]
    return VmKey(name_of(host), name_of(vm)), kind


def is_audit(kind: str) -> bool:
    """Return True if *kind* tells who asked for what, or what came of it."""
    return kind in _AUDIT


def read_told(kind: str, data: bytes, at: float) -> Told | None:
    """Return the event of *kind* in *data*, told *at* that time; None if it cannot be read."""
    if kind == _MISSED:
        missed = LayoutChanged(generation=0, resync=True)
        return Told(generation=0, event=missed, at=at, state=None)
    try:
        content = from_json(dict, data)
        event = _audit(_AUDIT[kind], content) if kind in _AUDIT else event_from_json(content)
        state = from_json(MapState, content) if "enabled" in content else None
    except ValueError as error:
        _log.warning("an event %s cannot be read: %s", printable(kind), printable(str(error)))
        return None
    return Told(generation=event.generation, origin=event.origin, event=event, at=at, state=state)


def _audit(kind: type[Event], content: Mapping[str, Any]) -> Event:
    return from_json(kind, {each.name: content[each.name] for each in fields(kind) if each.name in content})
