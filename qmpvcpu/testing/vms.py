"""A VM as a test sees it: its sockets, the controls of its guest, and what was said on its monitors.

The transcript comes from QEMU's trace log, which has every client on every monitor and costs no time; nothing stands
between a client and its QEMU. A QEMU that was built without the trace backend ``log`` writes none.
"""

import json
import re
import signal
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.testing.guestvm import GuestVm
from qmpvcpu.testing.linuxguest import LinuxGuest
from qmpvcpu.testing.microguest import MicroGuest
from qmpvcpu.testing.qemu import Accelerator
from qmpvcpu.testing.rom import Behaviour

_G = TypeVar("_G", bound=GuestVm)
_T = TypeVar("_T")


TRACE_FILE: Final = "qmp.log"
TRACE_ARGUMENTS: Final = (
    *("-msg", "timestamp=on"),
    *("-trace", "handle_qmp_command", "-trace", "monitor_qmp_respond"),
    *("-D", TRACE_FILE),
)
"""Arguments that make QEMU, which runs in its own directory, write what :func:`read_transcript` reads."""

_LINE: Final = re.compile(
    r"(?:\d+@(?P<at>\d+\.\d+):|(?P<date>\d{4}-\S+Z) )"
    r"(?P<event>handle_qmp_command|monitor_qmp_respond) mon (?P<monitor>\S+) (?:req|resp): (?P<content>.*)"
)


@dataclass(frozen=True, slots=True)
class QmpMessage:
    """One message on a monitor.

    Attributes:
        at: When QEMU read or wrote it, in seconds since the epoch.
        monitor: Which of QEMU's monitors, counted from 1 in the order in which their first clients came.
        sender: Who said it. A client's message is here once it was parsed: of garbage there is only the error.
        content: The message.
    """

    at: float
    monitor: int
    sender: Literal["client", "qemu"]
    content: Mapping[str, Any]

    def __str__(self) -> str:
        return json.dumps(self.content)


def read_transcript(trace: str) -> Iterator[QmpMessage]:
    """The messages in a trace log, in order.

    Left out: the monitor on which :class:`~qmpvcpu.testing.QemuProcess` itself waits for QEMU, which is the first to
    be greeted, before anybody else can connect; events on a monitor that has had no client yet; a line that was cut
    short. Events that QEMU emitted when a client had left look like those that it saw.

    Source:
        QEMU monitor/trace-events, ``handle_qmp_command`` and ``monitor_qmp_respond``; the same from 7.2 to 11.1.
        Before them stand the process id and the time up to 10.0, the time of ``-msg timestamp=on`` in 11.1.
    """
    monitors: dict[str, int] = {}
    for match in map(_LINE.fullmatch, trace.splitlines()):
        if match is None:
            continue
        try:
            content = json.loads(match["content"])
        except json.JSONDecodeError:
            continue
        if "QMP" in content:
            monitors.setdefault(match["monitor"], len(monitors))
        if number := monitors.get(match["monitor"], 0):
            sender: Literal["client", "qemu"] = "client" if match["event"] == "handle_qmp_command" else "qemu"
            at = float(match["at"] or datetime.fromisoformat(match["date"]).timestamp())
            yield QmpMessage(at, number, sender, content)


class Runner(Protocol):
    """Runs a coroutine elsewhere, and blocks until it is done."""

    def run(self, work: Coroutine[Any, Any, _T], /) -> _T:
        """Return what *work* returns, or raise what it raises."""
        ...


class Vm(Generic[_G]):
    """A QEMU with a guest, which runs on a thread of its own.

    So the same object works in tests of any kind, and the guest answers while a test blocks. Its methods are plain
    calls that return within milliseconds unless they say otherwise.

    Attributes:
        name: What a report calls it.
        guest: The guest, whose coroutines belong to that thread.
        qemu: The QEMU.
        version: Its version, such as ``"10.0.2"``.
    """

    def __init__(self, name: str, guest: _G, runner: Runner, *, qemu: Path, version: str) -> None:
        self.name = name
        self.guest = guest
        self.qemu = qemu
        self.version = version
        self._runner = runner

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: QEMU {self.version} under {self.accelerator}, {self.qmp}>"

    @property
    def qmp(self) -> Path:
        """Path of the QMP socket for what is tested."""
        return self.guest.qmp

    @property
    def sockets(self) -> tuple[Path, ...]:
        """Paths of all QMP sockets, :attr:`qmp` first. Each serves one client at a time."""
        return self.guest.sockets

    @property
    def accelerator(self) -> Accelerator:
        """What it runs under."""
        return self.guest.accelerator

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self.guest.process.pid

    @property
    def returncode(self) -> int | None:
        """How QEMU ended, as in :mod:`subprocess`; None: it runs."""
        return self.guest.process.returncode

    @property
    def transcript(self) -> tuple[QmpMessage, ...]:
        """What was said on the QMP sockets so far, by any client; empty once the VM is gone."""
        try:
            trace = (self.guest.process.directory / TRACE_FILE).read_text(errors="replace")
        except FileNotFoundError:
            return ()
        return tuple(read_transcript(trace))

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Send QEMU a signal; SIGKILL: it is a crash, SIGSTOP: it hangs until SIGCONT."""
        self.guest.process.kill(sig)

    def wait_ended(self) -> int:
        """Return how QEMU ended, as in :mod:`subprocess`, once it has."""
        return self._runner.run(self.guest.process.wait())


class QemuVm(Vm[MicroGuest]):
    """A VM with the micro-guest."""

    def set_behaviour(self, behaviour: Behaviour | Iterable[Behaviour] = ()) -> None:
        """Give the guest other behaviours: see :meth:`qmpvcpu.testing.MicroGuest.set_behaviour`.

        Raises:
            TypeError: They are no behaviours.
            ValueError: Too many behaviours, or one that never applies.
            QemuProcessError: The guest does not listen, or QEMU ended.
        """
        self._runner.run(self.guest.set_behaviour(behaviour))

    def refuse(self, status: int = 0x82, *, slot: int | None = None) -> None:
        """Make the guest refuse to give up a vCPU, or any: see :meth:`qmpvcpu.testing.MicroGuest.refuse`.

        Raises:
            ValueError: The status is no refusal, or the VM has no such slot.
            QemuProcessError: The guest does not listen, or QEMU ended.
        """
        self._runner.run(self.guest.refuse(status, slot=slot))

    def comply(self) -> None:
        """Make the guest give up every vCPU that it is asked for.

        Raises:
            QemuProcessError: The guest does not listen, or QEMU ended.
        """
        self._runner.run(self.guest.comply())

    def scan_slots(self) -> None:
        """Make the guest look for hot-plug events now: see :meth:`qmpvcpu.testing.MicroGuest.scan_slots`.

        Raises:
            QemuProcessError: The guest does not listen, or QEMU ended.
        """
        self._runner.run(self.guest.scan_slots())

    def wait_ready(self) -> None:
        """Return when the guest is up once more: see :meth:`qmpvcpu.testing.MicroGuest.wait_ready`.

        Raises:
            QemuProcessError: It did not come up within 10 seconds, or QEMU ended.
        """
        self._runner.run(self.guest.wait_ready())


class LinuxVm(Vm[LinuxGuest]):
    """A VM with the Linux guest. CPU numbers are Linux's own, which are not vCPU ids."""

    @property
    def console(self) -> str:
        """What the kernel printed so far; empty once QEMU is gone."""
        return self.guest.console

    @property
    def agent(self) -> Path:
        """Path of the socket of the guest agent's port; it serves one client at a time."""
        return self.guest.agent

    def start_agent(self, *, blocks: Collection[str] = ()) -> None:
        """Start the guest agent anew: see :meth:`qmpvcpu.testing.LinuxGuest.start_agent`.

        Raises:
            QemuProcessError: Linux has no agent, or does not answer, or QEMU ended.
        """
        self._runner.run(self.guest.start_agent(blocks=blocks))

    def stop_agent(self) -> None:
        """End the guest agent, which closes its port.

        Raises:
            QemuProcessError: Linux does not answer, or QEMU ended.
        """
        self._runner.run(self.guest.stop_agent())

    def pause_agent(self) -> None:
        """Stop the guest agent until it resumes: it is silent, and its port stays open.

        Raises:
            QemuProcessError: Linux does not answer, or QEMU ended.
        """
        self._runner.run(self.guest.pause_agent())

    def resume_agent(self) -> None:
        """Let a guest agent that was paused go on.

        Raises:
            QemuProcessError: Linux does not answer, or QEMU ended.
        """
        self._runner.run(self.guest.resume_agent())

    def set_auto_online(self, on: bool) -> None:  # noqa: FBT001 - the name says what is on
        """Make Linux bring plugged CPUs online, or leave those that come from now on offline.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        self._runner.run(self.guest.set_auto_online(on))

    def wait_ready(self) -> None:
        """Return when Linux is up once more: see :meth:`qmpvcpu.testing.LinuxGuest.wait_ready`.

        Raises:
            QemuProcessError: It did not come up within 60 seconds, or QEMU ended.
        """
        self._runner.run(self.guest.wait_ready())

    def online(self) -> VcpuMap:
        """The CPUs that Linux runs on now.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        return self._runner.run(self.guest.online())

    def present(self) -> VcpuMap:
        """The CPUs that Linux knows to be plugged now, online or not.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        return self._runner.run(self.guest.present())

    def wait_online(self, condition: Callable[[VcpuMap], bool], *, timeout: float = 10.0) -> VcpuMap:
        """Return the CPUs that Linux runs on as soon as they meet *condition*; blocks up to *timeout* seconds.

        In an async test that must go on meanwhile: ``await asyncio.to_thread(linux_vm.wait_online, condition)``.

        Raises:
            QemuProcessError: They did not within *timeout* seconds, or QEMU ended.
        """
        return self._runner.run(self.guest.wait_online(condition, timeout=timeout))

    def refuse(self, cpu: int | None = None) -> None:
        """Make Linux refuse to give up a CPU, or any: see :meth:`qmpvcpu.testing.LinuxGuest.refuse`.

        Raises:
            QemuProcessError: It does not answer, it does not run on every vCPU, it has no such CPU, or QEMU ended.
        """
        self._runner.run(self.guest.refuse(cpu))

    def comply(self) -> None:
        """Make Linux give up CPUs again.

        Raises:
            QemuProcessError: It does not answer, or QEMU ended.
        """
        self._runner.run(self.guest.comply())


class QemuVmFactory(Protocol):
    """Type of the fixture ``qemu_vm_factory``: each call starts a VM; all of them end with the test."""

    def __call__(self, **options: Any) -> QemuVm:
        """Start a VM with the options of the marker ``qemu_vm``; the test's markers give the other options."""
        ...


class LinuxVmFactory(Protocol):
    """Type of the fixture ``linux_vm_factory``: each call starts a VM; all of them end with the test."""

    def __call__(self, **options: Any) -> LinuxVm:
        """Start a VM with the options of the marker ``linux_vm``; the test's markers give the other options."""
        ...


class SharedVms(Protocol):
    """Type of the fixture ``shared_vms``: VMs for a fixture of yours, of any scope, whose tests share them.

    Each is a context manager that starts a VM and ends it, with the options of the marker of the same name.
    """

    def qemu_vm(self, **options: Any) -> AbstractContextManager[QemuVm]:
        """A VM with the micro-guest."""
        ...

    def linux_vm(self, **options: Any) -> AbstractContextManager[LinuxVm]:
        """A VM with Linux."""
        ...
