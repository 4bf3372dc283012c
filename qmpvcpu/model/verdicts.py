"""Verdicts: how one vCPU's change ended, each with its evidence.

Every verdict has a class variable ``name``, its word in logs and text (``"UNPLUGGED"``), which JSON has in small
letters. ``match`` tells them apart::

    match await request.wait(20):
        case Unplugged(): ...
        case Refused(code=code, reason=reason): ...
        case Pending(acknowledged=working): ...
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


class Proof(enum.Enum):
    """What a plug waits for.

    PRESENT: QEMU accepted the ``device_add``. ACKNOWLEDGED: the guest said so through _OST (advisory: it never
    comes for a plug in early boot, and a guest may say it without taking the CPU).
    """

    PRESENT = "present"
    ACKNOWLEDGED = "acknowledged"


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
        code: ACPI _OST status, or None where the machine has no such code (pseries).
        reason: The code in words.
        seconds: From the request to the answer.
    """

    name: ClassVar[str] = "REFUSED"
    ids: VcpuMap
    code: int | None
    reason: str
    seconds: float = 0.0


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
            return Refused(error.ids, error.code, error.reason)
        case UnplugPendingError():
            return Pending(error.ids, acknowledged=error.acknowledged, seconds=error.timeout)
        case OutcomeUnknownError():
            return Unknown(error.ids, str(error))
    return None
