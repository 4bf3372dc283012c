"""What the guest's own system says of its CPUs, as its agent tells. All of it is the guest's word."""

import enum
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GuestCpu:
    """One entry of ``guest-get-vcpus``.

    Attributes:
        number: What the guest calls the CPU; no vCPU id.
        online: True if the guest uses it.
        can_offline: True if the guest can stop using it.
    """

    number: int
    online: bool
    can_offline: bool


@dataclass(frozen=True, slots=True)
class GuestOs:
    """What system runs in the guest; each text is "" where the agent does not tell.

    Attributes:
        id: A word for the system, such as ``debian``, ``mswindows``.
        name: Its name for people.
        version: Its version.
        kernel: The kernel's release, such as ``6.12.117+deb13-amd64``.
        machine: Its architecture, such as ``x86_64``.
    """

    id: str = ""
    name: str = ""
    version: str = ""
    kernel: str = ""
    machine: str = ""


class KnownBy(enum.Enum):
    """How it is known which vCPU a guest's CPU is.

    FIRMWARE: the guest's own files name its slot. RULE: the guest's kernel numbers CPUs by a rule that is known, and
    the guest's list is as the rule says. LEARNT: one vCPU came, and one number. UNKNOWN: nothing tells.
    """

    FIRMWARE = "firmware"
    RULE = "rule"
    LEARNT = "learnt"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class GuestVcpu:
    """One CPU of the guest, and the vCPU that it is.

    Attributes:
        vcpu: Its vCPU id, or None where that is unknown.
        number: What the guest calls it.
        online: True if the guest uses it.
        can_offline: True if the guest can stop using it.
        known_by: How its vCPU is known.
    """

    vcpu: int | None
    number: int
    online: bool
    can_offline: bool
    known_by: KnownBy
