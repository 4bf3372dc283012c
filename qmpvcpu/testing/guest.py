"""What every VM of the test kit has, whatever guest runs in it."""

from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpvcpu.testing.qemu import Accelerator, QemuProcess


class GuestVm(ABC):
    """A QEMU with a guest in it; base of the kit's guests.

    Attributes:
        process: The :class:`~qmpvcpu.testing.QemuProcess`, once entered.
        accelerator: What it runs under, once entered.
    """

    process: QemuProcess
    accelerator: Accelerator

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Start it; each guest has its own way."""

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    @property
    def qmp(self) -> Path:
        """Path of the first QMP socket."""
        return self.process.qmp

    @property
    def sockets(self) -> tuple[Path, ...]:
        """Paths of all QMP sockets."""
        return self.process.sockets

    async def _stop(self) -> None:
        await self.process.aclose()
