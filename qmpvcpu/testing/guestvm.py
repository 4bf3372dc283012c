"""`GuestVm`: a QEMU whose guest talks on a serial port; what the kit's guests have in common."""

import asyncio
import contextlib
import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

from qmpvcpu.errors import counted
from qmpvcpu.testing.qemu import Accelerator, QemuProcess, QemuProcessError, QemuStartError, best_qemu

TIMEOUT: Final = 10.0
"""How long a guest may take for what it does at once, in seconds."""

_LOGGER = logging.getLogger(__name__)
_LEVELS = {  # of -smp, with the property that places a CPU in it; outermost first
    "sockets": "socket-id",
    "dies": "die-id",
    "modules": "module-id",
    "cores": "core-id",
    "threads": "thread-id",
}


class GuestVm(ABC):
    """A QEMU with a guest in it; base of the kit's guests, which are async context managers.

    Attributes:
        process: The :class:`~qmpvcpu.testing.QemuProcess`, once entered.
        accelerator: What it runs under, once entered.
    """

    process: QemuProcess
    accelerator: Accelerator
    _name: ClassVar[str]

    def __init__(self, qemu: Path | None, accel: Accelerator | None, *, qmp_sockets: int) -> None:
        self._qemu = qemu
        self._accel = accel
        self._qmp_sockets = qmp_sockets
        self._news = asyncio.Condition()
        self._gone = False
        self._listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        qemu = self._qemu or best_qemu()
        to_try = (self._accel,) if self._accel else await self._to_try(qemu)
        for accel in to_try:
            try:
                await self._boot(qemu, accel)
            except QemuStartError as why:
                await self._stop()
                if accel == to_try[-1]:
                    raise
                _LOGGER.info("%s does not run under %s here: %s", self._name, accel.upper(), why)
            except BaseException:
                await self._stop()
                raise
            else:
                break
        return self

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

    @abstractmethod
    async def refuse(self) -> None:
        """Make the guest refuse to give up any vCPU."""

    @abstractmethod
    async def comply(self) -> None:
        """Make the guest give up vCPUs."""

    async def _to_try(self, qemu: Path) -> Sequence[Accelerator]:  # noqa: ARG002 - some guests have to ask it
        """What to run under if nobody chose: each is tried if the guest does not come up under the one before."""
        return "kvm", "tcg"

    @abstractmethod
    async def _boot(self, qemu: Path, accel: Accelerator) -> None:
        """Start QEMU, and return when the guest is up; QemuStartError: it does not come up."""

    @abstractmethod
    async def _take_in(self, reader: asyncio.StreamReader) -> bool:
        """Take in what the guest says next; False: it has said all."""

    async def _start(
        self,
        qemu: Path,
        args: Sequence[str],
        *,
        chardevs: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Start QEMU, and listen to the guest."""
        self._gone = False
        args = ["-accel", self.accelerator, *args]
        self.process = QemuProcess(
            qemu, args, qmp_sockets=self._qmp_sockets, serials=1, chardevs=chardevs, files=files
        )
        await self.process.__aenter__()
        self._listener = asyncio.create_task(self._listen(self.process.serials[0].reader))

    async def _stop(self) -> None:
        if self._listener is not None:
            await self.process.aclose()
            await self._listener  # it ends with QEMU's end of the serial port
            self._listener = None

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while await self._take_in(reader):
                async with self._news:
                    self._news.notify_all()
        async with self._news:
            self._gone = True
            self._news.notify_all()

    def _say(self, message: bytes) -> None:
        self.process.serials[0].writer.write(message)

    async def _hear(self, condition: Callable[[], bool], what: str, *, timeout: float = TIMEOUT) -> None:
        """Return when what the guest has said meets *condition*; *what* follows "the guest did not"."""
        try:
            async with asyncio.timeout(timeout), self._news:
                await self._news.wait_for(lambda: self._gone or condition())
                if condition():
                    return
        except TimeoutError:
            raise self._failure(f"{self._name} did not {what} within {timeout:g} s") from None
        await self.process.wait()
        raise self._failure(f"QEMU ended, and {self._name} did not {what}")

    def _failure(self, why: str, *, start: bool = False) -> QemuProcessError:
        """The error that says *why*, with evidence."""
        return self.process.failure(why, start=start)

    @contextlib.asynccontextmanager
    async def _coming_up(self) -> AsyncIterator[None]:
        """Turn a failure in here into the guest's failure to come up."""
        try:
            yield
        except QemuProcessError as why:
            raise self._failure(f"{self._name} did not come up", start=True) from why


def cpu_args(
    boot: int | Collection[int], max_vcpus: int, topology: str | None, extra_args: Sequence[str]
) -> list[str]:
    """-smp for the unbroken start of *boot*, -device for the vCPUs after its first gap.

    Args:
        boot: A count of vCPUs, or their ids.
        max_vcpus: How many there can be.
        topology: As in ``-smp``; None: of 8 vCPUs one with every level, else one socket for each.
        extra_args: All other arguments of QEMU: a ``-cpu`` among them gives the CPU model.

    Raises:
        TypeError: *boot* is neither.
        ValueError: *boot* or *topology* do not fit *max_vcpus*.
    """
    topology = topology or ("sockets=2,cores=2,threads=2" if max_vcpus == 2 * 2 * 2 else f"sockets={max_vcpus}")
    try:
        ids = set(range(boot)) if isinstance(boot, int) else set(boot)
    except TypeError:
        raise TypeError(f"boot is {boot!r}, must be a count of vCPUs, or their ids") from None
    if 0 not in ids or min(ids) < 0 or max(ids) >= max_vcpus:
        raise ValueError(f"boot is {boot!r}, must be within 0..{max_vcpus - 1} and have vCPU 0")
    try:
        counts = {name: int(count) for name, _, count in (part.partition("=") for part in topology.split(","))}
    except ValueError:
        raise ValueError(f"{topology!r} is not a topology, such as 'sockets=2,cores=2,threads=2'") from None
    if math.prod(counts.values()) != max_vcpus or not counts.keys() <= set(_LEVELS):
        raise ValueError(f"{topology!r} does not make {counted(max_vcpus, 'vCPU')} of {', '.join(_LEVELS)}")
    start = next(number for number in itertools.count() if number not in ids)
    args = ["-smp", f"{start},maxcpus={max_vcpus},{topology}"]
    for number in sorted(ids):
        if number >= start:
            place = ",".join(_place(number, counts))
            args += ["-device", f"{_cpu_model(extra_args)}-x86_64-cpu,id=vcpu{number},{place}"]
    return args


def _cpu_model(args: Sequence[str]) -> str:
    """The CPU model that *args* choose, or the machines' default."""
    chosen = [value for option, value in itertools.pairwise(args) if option == "-cpu"]
    return chosen[-1].split(",")[0] if chosen else "qemu64"  # the last of an option counts


def _place(number: int, counts: Mapping[str, int]) -> list[str]:
    """Where vCPU *number* sits: the last level counts fastest; dies and modules of one are not properties."""
    place = []
    for option, prop in reversed(_LEVELS.items()):
        count = counts.get(option, 1)
        if count > 1 or option in {"sockets", "cores", "threads"}:
            place.append(f"{prop}={number % count}")
        number //= count
    return place
