"""Starts the VMs of a session's tests, and knows which test they belong to."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from qmpvcpu.testing.directory import TemporaryDirectoryError, sweep
from qmpvcpu.testing.guestvm import GuestVm
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.microguest import MicroGuest
from qmpvcpu.testing.plugin.evidence import Evidence, VmEvidence
from qmpvcpu.testing.plugin.finder import Qemu, QemuFinder
from qmpvcpu.testing.plugin.options import REQUIREMENTS, Options, Settings, options_of
from qmpvcpu.testing.qemu import QemuProcessError
from qmpvcpu.testing.vms import TRACE_ARGUMENTS, LinuxVm, QemuVm, Vm

G = TypeVar("G", bound=GuestVm)
V = TypeVar("V", bound=Vm[Any])
T = TypeVar("T")


class Background:
    """Runs coroutines on its own thread; a context manager.

    QEMUs are started from that thread and it outlives them: what ties a QEMU to its parent (PR_SET_PDEATHSIG) is the
    end of the *thread* that made it. Its loop is asyncio's own, even if the tests use another.
    """

    def __init__(self) -> None:
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._serve, name="qmpvcpu VMs", daemon=True)
        self._stop = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop = self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what still runs, and end the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what *work* returns, or raise what it raises; interrupted (by a signal), cancel it first."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _serve(self) -> None:
        async def until_stopped() -> None:
            self._started.set_result(asyncio.get_running_loop())
            await self._stop.wait()

        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(until_stopped())


class VmHost:
    """One session's VMs."""

    def __init__(self, background: Background, finder: QemuFinder) -> None:
        self._background = background
        self._finder = finder

    @contextlib.contextmanager
    def qemu_vms(self, test: "Test") -> Iterator[Callable[..., QemuVm]]:
        """A function that starts micro-guests for a test; at the end they are gone."""

        def start(qemu: Qemu, options: Options) -> MicroGuest:
            accel = self._finder.accelerator(qemu, options)
            return self._enter(_made(MicroGuest, qemu.path, accel=accel, **_for_guest(options)))

        with self._starter(test, "qemu_vm", start, QemuVm) as starter:
            yield starter

    @contextlib.contextmanager
    def linux_vms(self, test: "Test") -> Iterator[Callable[..., LinuxVm]]:
        """A function that starts Linux guests for a test; at the end they are gone."""

        def start(qemu: Qemu, options: Options) -> LinuxGuest:
            accel = self._finder.linux_accelerator(qemu, options)
            linux = _made(LinuxGuest, qemu.path, accel=accel, **_for_guest(options))
            guest = self._finder.available(lambda: self._enter(linux))
            self._finder.linux_ran_under(qemu, guest.accelerator)
            return guest

        with self._starter(test, "linux_vm", start, LinuxVm) as starter:
            yield starter

    @contextlib.contextmanager
    def _starter(
        self, test: "Test", fixture: str, start: Callable[[Qemu, Options], G], kind: Callable[..., V]
    ) -> Iterator[Callable[..., V]]:
        with contextlib.ExitStack() as stack:

            def starter(given: object = None, /, **options: Any) -> V:
                wanted = options_of(test.item, fixture, options or given)
                qemu = self._finder.qemu(test.qemu)
                guest = start(qemu, wanted)
                stack.callback(lambda: self._background.run(guest.__aexit__(None, None, None)))
                names = (fixture if number == 1 else f"{fixture} {number}" for number in itertools.count(1))
                name = next(name for name in names if name not in {one.name for one in test.evidence})
                vm = kind(name, guest, self._background, qemu=qemu.path, version=qemu.version)
                evidence = VmEvidence(vm)
                test.evidence.append(evidence)
                # A test's last report may come when its VM is gone; of a session, later tests have to do with others.
                if isinstance(test.item, pytest.Session):
                    stack.callback(test.evidence.remove, evidence)
                else:
                    stack.callback(evidence.keep)
                return vm

            yield starter

    def _enter(self, guest: G) -> G:
        """Start a guest; where QEMU does not, fail with what it said."""
        with _told_without_our_insides(QemuProcessError):
            self._background.run(guest.__aenter__())
        return guest


@dataclass(frozen=True, slots=True)
class Test:
    """What VMs are started for: a test, or a session, whose tests share them.

    Attributes:
        item: The test, or the session.
        qemu: The QEMU that was chosen for it; None: the best of the machine.
        evidence: Gets that of each VM.
    """

    item: pytest.Item | pytest.Session
    qemu: str | None
    evidence: list[Evidence]


class HostedVms:
    """VMs that several tests share: what the fixture ``shared_vms`` gives."""

    def __init__(self, host: VmHost, session: Test) -> None:
        self._host = host
        self._session = session

    @contextlib.contextmanager
    def qemu_vm(self, **options: Any) -> Iterator[QemuVm]:
        """A VM with the micro-guest, and its end."""
        with self._host.qemu_vms(self._session) as start:
            yield start(**options)

    @contextlib.contextmanager
    def linux_vm(self, **options: Any) -> Iterator[LinuxVm]:
        """A VM with Linux, and its end."""
        with self._host.linux_vms(self._session) as start:
            yield start(**options)


@contextlib.contextmanager
def hosting(settings: Settings, shared: Path | None) -> Iterator[VmHost]:
    """The host of a session.

    Args:
        settings: What the user chose.
        shared: See :class:`~qmpvcpu.testing.plugin.finder.QemuFinder`.
    """
    with _told_without_our_insides(TemporaryDirectoryError):
        sweep()
    with Background() as background:
        yield VmHost(background, QemuFinder(settings, background, shared))


def _for_guest(options: Options) -> Options:
    """What the guest's class takes; every VM has its QMP traced."""
    own = {name: value for name, value in options.items() if name not in REQUIREMENTS}
    return own | {"extra_args": (*TRACE_ARGUMENTS, *own.get("extra_args", ()))}


def _made(kind: Callable[..., G], *args: Any, **options: Any) -> G:
    """Make a guest of the options of a test; where there can be none, fail with the reason."""
    with _told_without_our_insides(ValueError, TypeError, saying="impossible VM: "):
        return kind(*args, **options)


@contextlib.contextmanager
def _told_without_our_insides(*errors: type[Exception], saying: str = "") -> Iterator[None]:
    """Fail the test with what one of *errors* says, once, and no traceback."""
    try:
        yield
    except errors as why:
        raise pytest.fail.Exception(f"{saying}{why}", pytrace=False) from None
