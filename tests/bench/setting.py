"""What all measurements share: the QEMUs, the libvirtd, and how often."""

import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from tests.libvirt.daemon import Libvirt

__all__ = ["Setting", "timed"]


@dataclass(frozen=True)
class Setting:
    """What is measured on.

    Attributes:
        qemus: The QEMUs of this machine, by series.
        kvm: True if KVM runs the micro-guest here.
        libvirt: A libvirtd of our own, or None where there is none.
        folder: A folder for files.
        rounds: How often each piece of work is done by each.
        hosts: How many hosts, from size to size.
    """

    qemus: dict[str, Path]
    kvm: bool
    libvirt: Libvirt | None
    folder: Path
    rounds: int
    hosts: tuple[int, ...]

    @property
    def newest(self) -> str:
        """The newest version."""
        return max(self.qemus, key=lambda version: [int(number) for number in version.split(".")])

    @property
    def accel(self) -> str:
        """What most rows run under."""
        return "kvm" if self.kvm else "tcg"

    def named(self, version: str, slots: int, accel: str | None = None) -> str:
        """Name a VM, as rows do."""
        return f"{(accel or self.accel).upper()}, QEMU {version}, {slots} slots"


async def timed(work: Awaitable[object]) -> float:
    """Milliseconds that *work* takes."""
    start = time.perf_counter()
    await work
    return (time.perf_counter() - start) * 1000
