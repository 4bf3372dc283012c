"""Real QEMUs for tests: where they are, which accelerator runs a guest, one process with its sockets."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from qmpvcpu.errors import QmpVcpuError, printable
from qmpvcpu.given import checked
from qmpvcpu.host.processes import why_idle
from qmpvcpu.testing.directory import vm_directory
from qmpvcpu.testing.rom import rom_image
from qmpvcpu.testing.signals import send_signal

_LOGGER = logging.getLogger(__name__)
_BINARY = "qemu-system-x86_64"

Accelerator = Literal["kvm", "tcg"]


class QemuNotFoundError(QmpVcpuError):
    """No usable QEMU on this machine."""


class QemuProcessError(QmpVcpuError):
    """A QEMU, or the guest in it, did not do what a test needs.

    Attributes:
        argv: The command line.
        stderr: All that QEMU wrote to its standard output and error, unfiltered.
        returncode: How it ended, as in :mod:`subprocess`; None: it runs, or never did.
    """

    def __init__(self, why: str, *, argv: Sequence[str], stderr: str, returncode: int | None) -> None:
        super().__init__(f"{why}\n  {' '.join(argv)}\n{stderr}".rstrip())
        self.argv = tuple(argv)
        self.stderr = stderr
        self.returncode = returncode

    def __str__(self) -> str:
        return printable(Exception.__str__(self), lines=True)


class QemuStartError(QemuProcessError):
    """QEMU, or the guest in it, did not come up."""


class Serial(NamedTuple):
    """Our end of one of the guest's serial ports."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


def find_qemus() -> dict[str, Path]:
    """The machine's QEMUs for x86, by full version: ``10.0.2`` and ``10.0.13`` have different faults.

    Looks at ``QMPVCPU_QEMU`` (a path or a name in PATH; several with colons between), then PATH, then the cache
    directory (``QMPVCPU_CACHE``, else ``qmpvcpu`` in the user's cache). Of two with the same version the first found
    counts. Runs each with ``--version``, so it blocks for some tens of milliseconds.

    Returns:
        ``{"7.2.22": path, "10.0.2": path}``, in the order in which they were found.

    Raises:
        QemuNotFoundError: ``QMPVCPU_QEMU`` names something that is no QEMU.
    """
    found: dict[str, Path] = {}
    for named in filter(None, os.environ.get("QMPVCPU_QEMU", "").split(os.pathsep)):
        chosen = qemu_named(named)
        if chosen is None:
            raise QemuNotFoundError(f"QMPVCPU_QEMU={named}: no program that can be run")
        version = qemu_version(chosen)
        if version is None:
            raise QemuNotFoundError(f"QMPVCPU_QEMU={named} is not a QEMU: it does not answer --version")
        found.setdefault(version, chosen)
    in_path = shutil.which(_BINARY)
    candidates = [Path(in_path)] if in_path else []
    try:
        candidates += sorted(cache_directory().glob(f"qemu-*/bin/{_BINARY}"))
    except PermissionError as error:  # another user's, such as root's after setpriv
        _LOGGER.warning("no QEMU is looked for in %s: %s", printable(str(cache_directory())), error.strerror)
    for path in candidates:
        version = qemu_version(path)
        if version is None:
            _LOGGER.warning("%s does not answer --version: left out", printable(str(path)))
        else:
            found.setdefault(version, path)
    return found


def best_qemu() -> Path:
    """The QEMU to use if none was chosen: the first of ``QMPVCPU_QEMU``, else the newest.

    From 10.0 on unplugging is safe under TCG too; with an older QEMU it is safe under KVM only.

    Raises:
        QemuNotFoundError: None is there.
    """
    found = find_qemus()
    if not found:
        raise QemuNotFoundError(
            f"no {_BINARY} in PATH or in {cache_directory()}: install one, or name it in QMPVCPU_QEMU"
        )
    if os.environ.get("QMPVCPU_QEMU"):
        return next(iter(found.values()))
    return max(found.items(), key=lambda item: tuple(map(int, item[0].split("."))))[1]


@checked
async def probe_accelerator(qemu: Path, *, timeout: float = 3.0) -> Accelerator:
    """Which accelerator runs guests of *qemu*: found by running the micro-guest, never by looking at /dev/kvm.

    A device node that opens says little: some hosts' KVM runs 16-bit real mode and nothing else. That is enough for
    the micro-guest, not for an operating system.

    Args:
        qemu: The binary.
        timeout: Seconds that the guest may take under KVM (it needs 0.1).

    Returns:
        ``"kvm"`` if the micro-guest came up under it, else ``"tcg"``.
    """
    args = ["-machine", "q35", "-accel", "kvm", "-m", "16", "-bios", "microguest.rom"]
    try:
        async with QemuProcess(qemu, args, files={"microguest.rom": rom_image()}, serials=1) as process:
            async with asyncio.timeout(timeout):
                await process.serials[0].reader.readuntil(b"R")
    except (QemuStartError, TimeoutError, asyncio.IncompleteReadError) as why:
        _LOGGER.info("KVM does not run guests of %s here: %s", qemu, printable(str(why)))
        return "tcg"
    return "kvm"


class QemuProcess:
    """One QEMU in a temporary directory of its own, killed and removed at the end.

    An async context manager. QEMU runs with ``-nodefaults -display none`` and dies with this process, however that
    ends. Its QMP sockets are listened on before it starts, so that a client may connect at once, and is greeted when
    QEMU is up. Not reusable. Cancelling the entry or the exit kills QEMU just the same.

    Args:
        qemu: The binary.
        args: Its arguments; it runs in its own directory, so relative paths mean *files*.
        qmp_sockets: How many QMP sockets it gets: each serves one client at a time.
        serials: How many of the guest's serial ports are connected to :attr:`serials`; what comes out of them is also
            in the directory, in ``serial0.log`` and so on.
        chardevs: Ids of socket chardevs for *args* to connect devices to. Each listens on a socket of that name in
            the directory, and logs to ``NAME.log`` there.
        files: Files that are written to the directory first, by name.
        as_given: Run *args* as they are, without ``-nodefaults -display none``, in our own working directory.

    Attributes:
        argv: The whole command line.
        directory: Its directory.
        sockets: Paths of the QMP sockets.
        serials: Our ends of the serial ports.
    """

    def __init__(
        self,
        qemu: Path,
        args: Sequence[str],
        *,
        qmp_sockets: int = 1,
        serials: int = 0,
        chardevs: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        as_given: bool = False,
    ) -> None:
        self._qemu = Path(qemu).absolute()
        self._as_given = as_given
        self._args = tuple(args)
        self._files = dict(files or {})
        self._serial_count = serials
        self._chardevs = tuple(chardevs)
        self._socket_count = qmp_sockets
        self._resources = contextlib.AsyncExitStack()
        self._process: asyncio.subprocess.Process | None = None
        self._monitor: Serial | None = None
        self._questions = itertools.count(1)
        self._asking = asyncio.Lock()  # a stream has one reader at a time
        self._last_words = ""
        self.argv: tuple[str, ...] = ()
        self.directory = Path()
        self.sockets: tuple[Path, ...] = ()
        self.serials: tuple[Serial, ...] = ()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def qmp(self) -> Path:
        """Path of the first QMP socket."""
        return self.sockets[0]

    @property
    def pid(self) -> int:
        """QEMU's process id.

        Raises:
            RuntimeError: It was never started.
        """
        return self._running().pid

    @property
    def returncode(self) -> int | None:
        """How QEMU ended, as in :mod:`subprocess`; None: it runs, or never started."""
        return None if self._process is None else self._process.returncode

    @property
    def stderr(self) -> str:
        """Everything that QEMU wrote to its standard output and error so far, unfiltered."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "stderr").read_text(errors="replace")
        return self._last_words

    @checked
    async def wait_ready(self, *, timeout: float = 10.0) -> None:
        """Return when QEMU has built the machine and answers QMP.

        It asks on a monitor of its own: the sockets stay untouched.

        Raises:
            QemuStartError: QEMU ended, or did not answer within *timeout* seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._ask("query-status")
        except TimeoutError as why:
            raise self.failure(f"QEMU did not come up within {timeout:g} s", start=True) from why
        except EOFError as why:
            await self.wait()
            raise self.failure("QEMU did not come up", start=True) from why

    @checked
    async def count_vcpus(self, *, timeout: float = 10.0) -> int:
        """How many vCPUs QEMU has now, asked as in :meth:`wait_ready`.

        Raises:
            QemuProcessError: QEMU ended, or did not answer within *timeout* seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                return len(await self._ask("query-cpus-fast"))
        except TimeoutError as why:
            raise self.failure(f"QEMU did not list its vCPUs within {timeout:g} s") from why
        except EOFError as why:
            await self.wait()
            raise self.failure("QEMU ended before it listed its vCPUs") from why

    async def wait(self) -> int:
        """Return QEMU's return code when it has ended."""
        return await self._running().wait()

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Send *sig* to QEMU; nothing happens when it has ended. After SIGSTOP all of it stands still."""
        if self._process is not None and self._process.returncode is None:
            send_signal(self._process.pid, sig)  # that of the process may reap it, and its status would be lost

    def failure(self, why: str, *, start: bool = False) -> QemuProcessError:
        """The error that says *why*, with the command line and QEMU's words as evidence."""
        kind = QemuStartError if start else QemuProcessError
        if self._process is not None:
            why += f" (QEMU {fate(self._process.pid, self.returncode)})"
        return kind(why, argv=self.argv, stderr=self.stderr, returncode=self.returncode)

    async def aclose(self) -> None:
        """Kill QEMU, wait for its end, remove the directory. Idempotent."""
        self.kill()
        try:
            if self._process is not None:
                await self._process.wait()
        finally:
            self._last_words = self.stderr
            await self._resources.aclose()

    async def _ask(self, command: str) -> Any:
        """QEMU's answer to *command* on our own monitor; EOFError: it ended."""
        if self._monitor is None:
            raise RuntimeError("this QEMU was never started")
        async with self._asking:
            return await self._answer(command, *self._monitor)

    async def _answer(self, command: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        asked = next(self._questions)
        with contextlib.suppress(ConnectionError):
            # The greeting may come before the machine is built; a reply may not. To ask for the capabilities again is
            # an error that harms nothing.
            for name, number in (("qmp_capabilities", None), (command, asked)):
                writer.write(json.dumps({"execute": name, "id": number}).encode() + b"\n")
            while line := await reader.readline():
                said = json.loads(line)
                if said.get("id") == asked:
                    return said["return"]
        raise EOFError

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("this QEMU was never started")
        return self._process

    async def _start(self) -> None:
        self._make_directory()
        self.argv = (str(self._qemu), *self._args)
        if not os.access(self._qemu, os.X_OK):
            raise self.failure(f"{self._qemu} is not a program", start=True)
        args = [*(() if self._as_given else ("-nodefaults", "-display", "none")), *self._args]
        with contextlib.ExitStack() as theirs:  # QEMU's ends: ours to close once it has them
            fds: list[int] = []

            def lend(end: socket.socket, name: str, options: str = "") -> None:
                theirs.enter_context(end)
                fds.append(end.fileno())
                args.extend(("-chardev", f"socket,id={name},fd={end.fileno()}{options}"))

            for path in self.sockets:
                lend(_listening(path), path.name, ",server=on,wait=off")
                args.extend(("-qmp", f"chardev:{path.name}"))
            for name in self._chardevs:
                lend(_listening(self.directory / name), name, f",server=on,wait=off,logfile={name}.log")
            for number in range(self._serial_count):
                ours, end = await self._connection()
                self.serials += (ours,)
                lend(end, f"serial{number}", f",logfile=serial{number}.log")
                args.extend(("-serial", f"chardev:serial{number}"))
            self._monitor, end = await self._connection()
            lend(end, "ready")
            args.extend(("-qmp", "chardev:ready"))
            self.argv = (str(self._qemu), *args)
            self._process = await self._spawn(fds)

    def _make_directory(self) -> None:
        self.directory = self._resources.enter_context(vm_directory())
        for name, content in self._files.items():
            (self.directory / name).write_bytes(content)
        self.sockets = tuple(self.directory / f"qmp{number}" for number in range(self._socket_count))

    async def _connection(self) -> tuple[Serial, socket.socket]:
        ours, theirs = socket.socketpair()
        stream = Serial(*await asyncio.open_connection(sock=ours))
        self._resources.push_async_callback(_close, stream.writer)
        return stream, theirs

    async def _spawn(self, fds: Sequence[int]) -> asyncio.subprocess.Process:
        with (self.directory / "stderr").open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *tied_to_us(),
                *self.argv,
                cwd=None if self._as_given else self.directory,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def fate(pid: int, returncode: int | None) -> str:
    """What has become of the process *pid*, as words that follow its name, such as ``runs``.

    Args:
        pid: Its process id.
        returncode: How it ended, as in :mod:`subprocess`; None: not yet.
    """
    if returncode is None:
        return why_idle(pid) or "runs"
    if returncode < 0:
        number = -returncode
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(number).name} (signal {number})"
        return f"was ended by signal {number}"
    return f"ended with exit status {returncode}"


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def _listening(path: Path) -> socket.socket:
    """A socket that listens at *path* already: clients that connect before QEMU is up are greeted later."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def tied_to_us() -> list[str]:
    """The prefix of a command line that makes the program die with us (util-linux has it, so nearly every Linux)."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        _LOGGER.warning("no setpriv (util-linux): what is started will survive if this process is killed")
        return []
    return [setpriv, "--pdeathsig", "KILL", "--"]


def cache_directory() -> Path:
    """Where the Linux guest and further QEMUs are: ``QMPVCPU_CACHE``, else ``qmpvcpu`` in the user's cache."""
    named = os.environ.get("QMPVCPU_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmpvcpu"


def qemu_named(name: str) -> Path | None:
    """The program that a user names: a path, in which ``~`` is the home directory, or a name in PATH; None: none."""
    found = shutil.which(os.path.expanduser(name))  # noqa: PTH111 - a Path drops "./", and is then looked for in PATH
    return Path(found).absolute() if found else None


def qemu_version(qemu: Path) -> str | None:
    """``"10.0.2"``, or None if *qemu* does not answer as a QEMU. Blocks while that runs with ``--version``."""
    try:
        done = subprocess.run(
            [str(qemu.absolute()), "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"QEMU emulator version (\d+\.\d+(?:\.\d+)?)", done.stdout)
    return match[1] if match else None
