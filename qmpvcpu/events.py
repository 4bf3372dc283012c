"""Events: what ``vm.events()`` yields, in the order in which it became known."""

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmpvcpu.model.options import Proof
from qmpvcpu.model.vcpumap import VcpuMap

if TYPE_CHECKING:
    from qmpvcpu.model.placement import Place


class Origin(enum.Enum):
    """Who brought a change about, as far as QMP tells."""

    US = "us"
    OTHER = "other"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events: frozen values, equal if they are of one kind and all their attributes are.

    Attributes:
        generation: Counts the changes of the layout since attach; the layout that this event led to has it.
        origin: Who brought it about.
    """

    generation: int
    origin: Origin = Origin.UNKNOWN


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotEvent(Event):
    """Base of the events of one slot.

    Attributes:
        ids: All vCPU ids of the slot.
    """

    ids: VcpuMap


# A subclass without attributes of its own is a dataclass already: to make one takes longer than to import a module.


class VcpuPlugged(SlotEvent):
    """A slot is occupied now."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuProven(SlotEvent):
    """A higher rung is known of a slot than before.

    Attributes:
        proof: The rung.
        seconds: Since it is known to be plugged; None where that was before ``attach``.
    """

    proof: Proof
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuPlaced(SlotEvent):
    """The threads of a plugged slot are in their place on the host, or could not be put there.

    Attributes:
        why_not: Why they are not; "" if they are.
        seconds: Since it is known to be plugged; None where that was before ``attach``.
    """

    why_not: str = ""
    seconds: float | None


class UnplugRequested(SlotEvent):
    """QEMU accepted a request to unplug; nothing is removed yet."""

    __slots__ = ()


class UnplugAcknowledged(SlotEvent):
    """The guest says that it works on a removal (OST 0x84)."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuUnplugged(SlotEvent):
    """A slot is empty now.

    Attributes:
        late: True if a deadline for it had passed before.
        requested_at: When it was requested, in seconds of the event loop's clock; None if not by us.
    """

    late: bool = False
    requested_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnplugRefused(SlotEvent):
    """The guest refused to give a slot up.

    Attributes:
        code: ACPI _OST status, or None where the machine has no such code.
        reason: The code in words.
        late: True if a deadline for it had passed before.
    """

    code: int | None
    reason: str
    late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UnplugPending(SlotEvent):
    """A deadline passed without an answer; the request lives on in QEMU.

    Attributes:
        acknowledged: True if the guest said that it works on it.
    """

    acknowledged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutChanged(Event):
    """A read showed something that no event had announced, or events were dropped.

    Attributes:
        resync: True if this subscriber fell behind and lost events; read ``vm.layout``.
    """

    resync: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceDrifted(Event):
    """A read found a thread out of its place on the host; usually somebody has moved it.

    Attributes:
        ids: The vCPU whose thread it is; empty for QEMU's main thread.
        wanted: Its place.
        found: Where it runs.
    """

    ids: VcpuMap
    wanted: "Place"
    found: "Place"


class VmReset(Event):
    """The VM was reset. Pending unplugs stay pending: they fire at the next hotplug of any vCPU.

    On pseries the reset completes them.
    """

    __slots__ = ()


class VmStopped(Event):
    """The VM's vCPUs stopped running."""

    __slots__ = ()


class VmResumed(Event):
    """The VM's vCPUs run again."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationChanged(Event):
    """A migration changed its state (QEMU tells only where its ``events`` capability is on).

    Attributes:
        status: QEMU's MigrationStatus, such as ``setup``, ``active``, ``completed``.
    """

    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected(Event):
    """The QMP connection is lost; no event follows, unless ``attach(reconnect=True)`` finds QEMU again.

    Attributes:
        why: What ended it.
    """

    why: str


class Reconnected(Event):
    """The QMP connection is back, and the VM has been read again; what happened meanwhile came before this event."""

    __slots__ = ()


class InstanceChanged(Event):
    """The same VM runs in another QEMU than the record, or the lost connection, knew: pending removals are void."""

    __slots__ = ()
