"""Events: what ``vm.events()`` yields, in the order in which it became known."""

import enum
from dataclasses import dataclass

from qmpvcpu.model.vcpumap import VcpuMap


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
class VcpuPlugged(Event):
    """A slot is occupied now.

    Attributes:
        ids: All vCPU ids of the slot.
    """

    ids: VcpuMap


@dataclass(frozen=True, slots=True, kw_only=True)
class UnplugRequested(Event):
    """QEMU accepted a request to unplug; nothing is removed yet.

    Attributes:
        ids: All vCPU ids of the slot.
    """

    ids: VcpuMap


@dataclass(frozen=True, slots=True, kw_only=True)
class UnplugAcknowledged(Event):
    """The guest says that it works on a removal (OST 0x84).

    Attributes:
        ids: All vCPU ids of the slot.
    """

    ids: VcpuMap


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuUnplugged(Event):
    """A slot is empty now.

    Attributes:
        ids: All vCPU ids of the slot.
        late: True if a deadline for it had passed before.
        requested_at: When it was requested, in seconds of the event loop's clock; None if not by us.
    """

    ids: VcpuMap
    late: bool = False
    requested_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnplugRefused(Event):
    """The guest refused to give a slot up.

    Attributes:
        ids: All vCPU ids of the slot.
        code: ACPI _OST status, or None where the machine has no such code.
        reason: The code in words.
        late: True if a deadline for it had passed before.
    """

    ids: VcpuMap
    code: int | None
    reason: str
    late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UnplugPending(Event):
    """A deadline passed without an answer; the request lives on in QEMU.

    Attributes:
        ids: All vCPU ids of the slot.
        acknowledged: True if the guest said that it works on it.
    """

    ids: VcpuMap
    acknowledged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutChanged(Event):
    """A read showed something that no event had announced, or events were dropped.

    Attributes:
        resync: True if this subscriber fell behind and lost events; read ``vm.layout``.
    """

    resync: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VmReset(Event):
    """The VM was reset. Pending unplugs stay pending: they fire at the next hotplug of any vCPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmStopped(Event):
    """The VM's vCPUs stopped running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmResumed(Event):
    """The VM's vCPUs run again."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconnected(Event):
    """The QMP connection is back, and the VM has been read again; what happened meanwhile came before this event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceChanged(Event):
    """The same VM runs in another QEMU than the record, or the lost connection, knew: pending removals are void."""
