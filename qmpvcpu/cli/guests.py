"""The two guests of the demo under one set of words: refuse, comply, hesitate, and what the guest sees."""

from pathlib import Path
from types import TracebackType
from typing import Self

from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.microguest import MicroGuest
from qmpvcpu.testing.rom import Behaviour

_BUSY = 0x82
_MAX_VCPUS = 8


class _DemoGuest:
    """A guest of the test kit, entered and left with this.

    Attributes:
        name: What it is, for people.
        patience: Seconds to wait for a guest that hesitates.
    """

    name: str
    patience: float

    def __init__(self, guest: MicroGuest | LinuxGuest) -> None:
        self._running = guest

    async def __aenter__(self) -> Self:
        await self._running.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._running.__aexit__(kind, value, trace)

    @property
    def qmp(self) -> Path:
        """Path of its QMP socket."""
        return self._running.qmp

    @property
    def accelerator(self) -> str:
        """What it runs under."""
        return self._running.accelerator


class MicroDemoGuest(_DemoGuest):
    """The micro-guest: some hundred bytes that answer as they are told, up in a tenth of a second."""

    name = "a VM with the micro-guest"
    patience = 0.2

    def __init__(self, qemu: Path) -> None:
        self._guest = MicroGuest(qemu, boot=1, max_vcpus=_MAX_VCPUS)
        super().__init__(self._guest)

    async def refuse(self) -> None:
        """Refuse removals from now on."""
        await self._guest.set_behaviour(Behaviour.refusing(_BUSY))

    async def comply(self) -> None:
        """Oblige from now on, also where it hesitates."""
        await self._guest.set_behaviour(Behaviour.complying())

    async def hesitate(self) -> None:
        """Take removals up and decide nothing."""
        await self._guest.set_behaviour(Behaviour.hanging())

    async def online(self, expected: int) -> VcpuMap | None:  # noqa: ARG002 - the other guest's word
        """Return None: it has no words for what it sees."""
        return None


class LinuxDemoGuest(_DemoGuest):
    """A real Linux. It refuses by real-time reservations that need every CPU, and tells the CPUs that it runs on."""

    name = "a VM with Linux in it (a few seconds where KVM does not run it)"
    patience = 0.0  # it does not hesitate: whoever does not wait at all is early

    def __init__(self, qemu: Path) -> None:
        self._guest = LinuxGuest(qemu, boot=1, max_vcpus=_MAX_VCPUS)
        super().__init__(self._guest)

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
