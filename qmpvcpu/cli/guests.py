"""The two guests of the demo under one set of words: refuse, comply, hesitate, and what the guest sees."""

from pathlib import Path
from types import TracebackType
from typing import Final, Self

from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.model import VcpuMap
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.microguest import MicroGuest
from qmpvcpu.testing.rom import Personality

__all__ = ["LinuxDemoGuest", "MicroDemoGuest"]

_BUSY = 0x82
_MAX_VCPUS = 8


class MicroDemoGuest:
    """The micro-guest: some hundred bytes that answer as they are told, up in a tenth of a second.

    Attributes:
        patience: Seconds to wait for a guest that hesitates.
    """

    name: Final = "a VM with the micro-guest"
    patience: Final = 0.2

    def __init__(self, qemu: Path) -> None:
        self._guest = MicroGuest(qemu, boot=1, max_vcpus=_MAX_VCPUS)

    async def __aenter__(self) -> Self:
        await self._guest.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._guest.__aexit__(kind, value, trace)

    @property
    def qmp(self) -> Path:
        """Path of its QMP socket."""
        return self._guest.qmp

    @property
    def accelerator(self) -> str:
        """What it runs under."""
        return self._guest.accelerator

    async def refuse(self) -> None:
        """Refuse removals from now on."""
        await self._guest.become(Personality.refusing(_BUSY))

    async def comply(self) -> None:
        """Oblige from now on, also where it hesitates."""
        await self._guest.become(Personality.obliging())

    async def hesitate(self) -> None:
        """Take removals up and decide nothing."""
        await self._guest.become(Personality.held())

    async def online(self, expected: int) -> VcpuMap | None:  # noqa: ARG002 - the other guest's word
        """Return None: it has no words for what it sees."""
        return None


class LinuxDemoGuest:
    """A real Linux. It refuses by real-time reservations that need every CPU, and tells the CPUs that it runs on.

    Attributes:
        patience: Seconds to wait for a guest that hesitates: none, since this one does not.
    """

    name: Final = "a VM with Linux in it (a few seconds where KVM does not run it)"
    patience: Final = 0.0

    def __init__(self, qemu: Path) -> None:
        self._guest = LinuxGuest(qemu, boot=1, max_vcpus=_MAX_VCPUS)

    async def __aenter__(self) -> Self:
        await self._guest.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._guest.__aexit__(kind, value, trace)

    @property
    def qmp(self) -> Path:
        """Path of its QMP socket."""
        return self._guest.qmp

    @property
    def accelerator(self) -> str:
        """What it runs under."""
        return self._guest.accelerator

    async def refuse(self) -> None:
        """Refuse removals from now on."""
        await self._guest.refuse()

    async def comply(self) -> None:
        """Oblige from now on."""
        await self._guest.comply()

    async def hesitate(self) -> None:
        """Do as always: Linux takes tens of milliseconds, which is later than at once."""

    async def online(self, expected: int) -> VcpuMap | None:
        """Return the CPUs that Linux says it runs on, in its own numbers, once they are *expected* many."""
        try:
            return await self._guest.wait_online(lambda cpus: len(cpus) == expected)
        except QmpVcpuError:
            return await self._guest.online()
