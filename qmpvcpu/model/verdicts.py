"""What the guest answers to a change of a vCPU, and the verdicts: how the change ended, each with its evidence.

Every verdict has a class variable ``name``, its word in logs and text (``"UNPLUGGED"``), which JSON has in small
letters. ``match`` tells them apart::

    match await request.wait(20):
        case Unplugged(): ...
        case Refused(code=code, reason=reason): ...
        case Pending(acknowledged=working): ...

Source: ACPI 6.5, section 6.3.5 "_OST (OSPM Status Indication)": the sources and statuses that QEMU forwards in
``ACPI_DEVICE_OST`` and keeps in ``query-acpi-ospm-status``.
"""

import enum
from dataclasses import dataclass
from typing import ClassVar

from qmpvcpu.errors import (
    CommandRejectedError,
    DenialReason,
    OutcomeUnknownError,
    QmpVcpuError,
    StepDeniedError,
    UnplugPendingError,
    UnplugRefusedError,
)
from qmpvcpu.model.vcpumap import VcpuMap

_INSERTION_SOURCES = frozenset({0x1, 0x200})  # device check; insertion processing
_EJECTION_SOURCES = frozenset({0x3, 0x103})  # eject request; ejection processing

EJECTION_REASONS = {
    0x01: "non-specific failure",
    0x02: "unrecognized notify code",
    0x80: "device is locked",
    0x81: "device is in use by an application",
    0x82: "device is busy",
    0x83: "ejection dependency is busy or not supported",
}
_INSERTION_REASONS = {
    0x01: "non-specific failure",
    0x02: "unrecognized notify code",
    0x81: "device driver load failure",
    0x82: "device not supported by the OS",
}


class OstStatus(enum.Enum):
    """How one answer is to be taken."""

    SUCCESS = "success"
    IN_PROGRESS = "in progress"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class OstAnswer:
    """One _OST evaluation of the guest.

    Attributes:
        source: ACPI source event code; 3 and 0x103 speak of an ejection, 1 and 0x200 of an insertion.
        code: ACPI status code.
    """

    source: int
    code: int

    @property
    def is_ejection(self) -> bool:
        """True if this answers a request to unplug."""
        return self.source in _EJECTION_SOURCES

    @property
    def is_insertion(self) -> bool:
        """True if this answers a plug."""
        return self.source in _INSERTION_SOURCES

    @property
    def status(self) -> OstStatus:
        """Success, in progress, or failure.

        An ejection of 0x84 ("in progress") precedes success and refusal alike; an insertion of 0x80 is
        ACPI's "insertion in progress".
        """
        if self.code == 0:
            return OstStatus.SUCCESS
        progress = 0x84 if self.is_ejection else 0x80
        return OstStatus.IN_PROGRESS if self.code == progress else OstStatus.FAILURE

    @property
    def reason(self) -> str:
        """The status in words."""
        status = self.status
        if status is not OstStatus.FAILURE:
            return str(status.value)
        table = EJECTION_REASONS if self.is_ejection else _INSERTION_REASONS
        return table.get(self.code, f"status {self.code:#x}, unknown to ACPI")


@dataclass(frozen=True, slots=True)
class Plugged:
    """QEMU accepted the vCPU.

    Attributes:
        ids: The vCPU ids of the slot.
        acknowledged: True if the guest acknowledged it, False if it was waited for in vain or answered with a
            failure, None if nobody waited.
        code: The guest's OST status, or None.
        reason: The same in words, or "".
        seconds: From sending to the verdict.
    """

    name: ClassVar[str] = "PLUGGED"
    ids: VcpuMap
    acknowledged: bool | None = None
    code: int | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Unplugged:
    """The slot is empty, on evidence: QEMU's ``DEVICE_DELETED``, or a read that was sent after the request.

    Attributes:
        ids: The vCPU ids of the slot.
        seconds: From the request to the evidence.
    """

    name: ClassVar[str] = "UNPLUGGED"
    ids: VcpuMap
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """The guest said no; the vCPU is still plugged and may be asked for again.

    Attributes:
        ids: The vCPU ids of the slot.
        code: ACPI _OST status, or None where the machine has no such code (pseries), or the agent refused.
        reason: The code in words, or what the agent said.
        seconds: From the request to the answer.
        by_agent: True if the guest's agent refused to take it offline: nothing was sent to QEMU, nothing is pending.
    """

    name: ClassVar[str] = "REFUSED"
    ids: VcpuMap
    code: int | None
    reason: str
    seconds: float = 0.0
    by_agent: bool = False


@dataclass(frozen=True, slots=True)
class Pending:
    """QEMU accepted the request, and the deadline passed without an answer; it lives on in QEMU.

    Attributes:
        ids: The vCPU ids of the slot.
        acknowledged: True if the guest said that it works on it (OST 0x84).
        seconds: From the request to now.
    """

    name: ClassVar[str] = "PENDING"
    ids: VcpuMap
    acknowledged: bool
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Rejected:
    """QEMU answered the command with an error.

    Attributes:
        ids: The vCPU ids of the slot.
        error_class: QEMU's error class.
        desc: QEMU's text; evidence, never to be branched on.
        hint: What a look at the VM afterwards tells.
        seconds: From sending to the answer.
    """

    name: ClassVar[str] = "REJECTED"
    ids: VcpuMap
    error_class: str
    desc: str
    hint: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Denied:
    """Never sent: it could be known beforehand.

    Attributes:
        ids: The vCPU ids that were named.
        reason: Why, as a word to branch on.
        detail: Why, as a sentence.
    """

    name: ClassVar[str] = "DENIED"
    ids: VcpuMap
    reason: DenialReason
    detail: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """The connection was lost, or stayed silent, with the command in flight: the next read tells.

    Attributes:
        ids: The vCPU ids of the slot.
        why: What happened.
    """

    name: ClassVar[str] = "UNKNOWN"
    ids: VcpuMap
    why: str


Verdict = Plugged | Unplugged | Refused | Pending | Rejected | Denied | Unknown


def verdict_of(error: QmpVcpuError) -> Verdict | None:
    """Return the verdict that *error* stands for, or None if it is not about one vCPU's change."""
    match error:
        case StepDeniedError():
            return Denied(error.ids, error.reason, error.detail)
        case CommandRejectedError():
            return Rejected(error.ids, error.error_class, error.desc, error.hint)
        case UnplugRefusedError():
            return Refused(error.ids, error.code, error.reason, by_agent=error.by_agent)
        case UnplugPendingError():
            return Pending(error.ids, acknowledged=error.acknowledged, seconds=error.timeout)
        case OutcomeUnknownError():
            return Unknown(error.ids, str(error))
    return None
