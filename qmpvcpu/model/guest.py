"""What the guest's own system says of its CPUs, as its agent tells. All of it is the guest's word."""

import enum
import re
from dataclasses import dataclass
from typing import Final

from qmpvcpu.errors import printable

_HOT_ADDING_WINDOWS: Final = ("Datacenter", "Enterprise", "Standard")
_RELEASE: Final = re.compile(r"(\d{1,4})\.(\d{1,4})")
_FIRST_TO_WANT_HYPERVISOR: Final = (6, 12)  # in 6.12.77; distributions patch their kernels under lower numbers too


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
    """What system runs in the guest; each text is "" where the agent does not tell. ``str()`` is for people.

    Attributes:
        id: A word for the system, such as ``debian``, ``mswindows``.
        name: Its name for people.
        version: Its version.
        kernel: The kernel's release, such as ``6.12.117+deb13-amd64``.
        machine: Its architecture, such as ``x86_64``.
        full_name: Its name with version and edition, such as ``Windows Server 2022 Standard``.
        variant: On Windows ``server`` or ``client``; elsewhere as the system has it.

    Source: QEMU qga/qapi-schema.json, ``guest-get-osinfo``.
    """

    id: str = ""
    name: str = ""
    version: str = ""
    kernel: str = ""
    machine: str = ""
    full_name: str = ""
    variant: str = ""

    def __str__(self) -> str:
        name = self.full_name or " ".join(filter(None, (self.name or self.id, self.version)))
        more = ", ".join(filter(None, (f"kernel {self.kernel}" if self.kernel else "", self.machine)))
        return printable(f"{name or 'a system without a name'}{f' ({more})' if more else ''}")

    @property
    def is_windows(self) -> bool:
        """True for any Windows: none gives a CPU up while it runs.

        Source: cloud-hypervisor issue 2457, which tried it with QEMU too: ``device_del`` is accepted, and the CPU is
        there even after a reboot.
        """
        return self.id == "mswindows"

    @property
    def ignores_new_cpus(self) -> bool:
        """True for a Windows of an edition that takes no CPU while it runs.

        Source: Microsoft's SQL Server documentation, "Thread and task architecture guide", hot add CPU: the editions
        Datacenter and Enterprise of Windows Server; since 2012 also Standard. Here every Standard counts.
        """
        hot_adding = self.variant != "client" and any(edition in self.full_name for edition in _HOT_ADDING_WINDOWS)
        return self.is_windows and not hot_adding

    @property
    def may_want_hypervisor(self) -> bool:
        """True unless it is known to use hotplugged CPUs even where it detects no hypervisor.

        Source: Linux commit adbf61cc47cb, in 6.12.77 and later; 6.1.192 was measured to be without it.
        """
        if self.is_windows:
            return False
        release = _RELEASE.match(self.kernel)
        return release is None or tuple(map(int, release.groups())) >= _FIRST_TO_WANT_HYPERVISOR


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
