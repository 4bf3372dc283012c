"""Hosts for tests: network namespaces with an address and a link each, which can be cut.

Nothing is left behind: the namespaces have no names, so the kernel removes them and their links once they have no
processes. That happens at the end of the context, or when this process is killed: see
:mod:`qmpvcpu.testing.guardian`.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Self

from qmpvcpu.errors import QmpVcpuError, printable
from qmpvcpu.given import checked
from qmpvcpu.host.processes import network_namespace
from qmpvcpu.testing import guardian
from qmpvcpu.testing.clock import other_clock
from qmpvcpu.testing.directory import vm_directory
from qmpvcpu.testing.qemu import fate, tied_to_us
from qmpvcpu.testing.signals import send_signal

__all__ = ["Host", "HostProcess", "Network", "NetworkError", "can_make_namespaces"]

_LOGGER = logging.getLogger(__name__)
_TOOLS: Final = ("ip", "unshare", "nsenter", "setpriv")
_SEPARATE: Final = ipaddress.IPv4Network("10.64.0.0/10")
_LOOPBACK: Final = ipaddress.IPv4Network("127.64.0.0/10")
_PREFIX: Final = 20  # bits of a network's address: room for 4000 hosts, and for 1024 networks on a machine
_HOLD: Final = "echo; exec sleep infinity"


class NetworkError(QmpVcpuError):
    """A test network cannot be made, or cannot do what was asked."""


def can_make_namespaces() -> bool:
    """Return whether this process may make network namespaces and links. It tries to, which takes some 10 ms."""
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in _TOOLS):
        return False
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "bridge", "type", "bridge"],  # noqa: S607 - any of them will do
        capture_output=True,
        check=False,
    )
    if tried.returncode:
        _LOGGER.info("no network namespaces here: %s", printable(tried.stderr.decode(errors="replace").strip()))
    return tried.returncode == 0


class HostProcess:
    """A program that runs on a host; see :meth:`Host.run`.

    Attributes:
        argv: Its command line.
        pid: The program's own process id, not a wrapper's; also the id of its process group and session.
    """

    def __init__(self, argv: tuple[str, ...], process: asyncio.subprocess.Process, outputs: Path) -> None:
        self.argv = argv
        self.pid = process.pid
        self._process = process
        self._outputs = outputs

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.pid}, which {fate(self.pid, self.returncode)}: {' '.join(self.argv)}>"

    @property
    def returncode(self) -> int | None:
        """Its exit status, as in :mod:`subprocess`; None while it runs."""
        return self._process.returncode

    @property
    def stdout(self) -> str:
        """What it has written to its standard output so far."""
        return self._outputs.with_suffix(".out").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has written to its standard error so far."""
        return self._outputs.with_suffix(".err").read_text(errors="replace")

    async def wait(self) -> int:
        """Wait until it has ended; return its exit status, as in :mod:`subprocess`."""
        return await self._process.wait()

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Send *sig* to the program alone, if it has not ended; with SIGSTOP, wait until it has stopped."""
        if self.returncode is None:
            send_signal(self.pid, sig)

    async def end(self) -> None:
        """Kill it and its process group; return when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self.wait()


class Host:
    """A host of a :class:`Network`.

    Attributes:
        name: Its name.
        address: Its address.
        directory: A directory for its files, removed with the network.
    """

    def __init__(self, name: str, address: str, directory: Path, link: "_Link | None") -> None:
        self.name = name
        self.address = address
        self.directory = directory
        self._link = link
        self._processes: list[HostProcess] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} at {self.address}>"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to run it on the host without :meth:`run`; the process id stays the same."""
        return () if self._link is None else self._link.inside

    @property
    def processes(self) -> tuple[HostProcess, ...]:
        """Everything that was started on it, oldest first, also what has ended."""
        return tuple(self._processes)

    async def run(
        self, *argv: str | Path, env: Mapping[str, str] | None = None, clock_offset: float = 0.0
    ) -> HostProcess:
        """Start a program on the host, in its directory; it is killed when the network ends, or with this process.

        Args:
            argv: The command line.
            env: More variables of its environment.
            clock_offset: How many seconds its clock is ahead of the machine's; negative: behind. See
                :func:`qmpvcpu.testing.clock.other_clock`.

        Raises:
            ClockError: Its clock cannot be shifted here.
            FileNotFoundError: There is no such program.
        """
        words = tuple(map(str, argv))
        program = shutil.which(words[0]) if words else None
        if program is None:
            raise FileNotFoundError(f"host {self.name}: no program {' '.join(words[:1])!r} to run")
        clock = await other_clock(clock_offset, self.directory) if clock_offset else {}
        outputs = self.directory / f"{len(self._processes)}"
        with outputs.with_suffix(".out").open("wb") as out, outputs.with_suffix(".err").open("wb") as err:
            process = await asyncio.create_subprocess_exec(
                *tied_to_us(),
                *self.prefix,
                *("env", *(f"{name}={value}" for name, value in clock.items())),  # not for nsenter
                program,
                *words[1:],
                cwd=self.directory,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        started = HostProcess(words, process, outputs)
        self._processes.append(started)
        return started

    async def cut(self) -> None:
        """Pull the cable: nothing gets in or out, and connections stay open without an error. Idempotent.

        Raises:
            NetworkError: The network is not :attr:`Network.is_separate`.
        """
        await self._needs_link("cut").set_up(up=False)

    async def mend(self) -> None:
        """Plug the cable in again. Idempotent.

        Raises:
            NetworkError: The network is not :attr:`Network.is_separate`.
        """
        await self._needs_link("mended").set_up(up=True)

    async def crash(self) -> None:
        """Kill everything on the host, as a power failure does; return when it has ended.

        The host stays, and can run programs again.
        """
        for each in self._processes:
            await each.end()
        if self._link is not None:
            await self._link.kill_all()

    def _needs_link(self, what: str) -> "_Link":
        if self._link is None:
            raise NetworkError(
                f"host {self.name} cannot be {what}: it shares this machine's loopback. Run as root, with iproute2"
                " installed, to give each host a network namespace"
            )
        return self._link


class Network:
    """A network of hosts: an async context manager that kills everything on the hosts when it ends.

    Each host is a network namespace. A bridge in a further namespace joins them and this process. Where namespaces
    cannot be made, hosts are directories that share this machine's loopback; only ``cut`` and ``mend`` do not work
    then.

    Args:
        separate: Whether to make namespaces; None: if possible.

    Attributes:
        is_separate: True if hosts are namespaces.
        address: This machine's address in the network; every host can reach what listens on it.

    Raises:
        NetworkError: There is no free range of addresses, or ``ip`` failed.

    Example:
        >>> async def a_host_that_is_cut_off():
        ...     async with Network() as net:
        ...         host = await net.host("rack1-a")
        ...         server = await host.run("python3", "-m", "http.server", "--bind", host.address)
        ...         await host.cut()
    """

    @checked
    def __init__(self, *, separate: bool | None = None) -> None:
        self._separate = separate
        self._hosts: dict[str, Host] = {}
        self._resources = contextlib.AsyncExitStack()
        self._turn = asyncio.Lock()
        self._bridge: _Namespace | None = None
        self._guardian: asyncio.subprocess.Process | None = None
        self.is_separate = False
        self.address = ""

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._resources.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._resources.aclose()

    @property
    def hosts(self) -> Mapping[str, Host]:
        """The hosts, by name."""
        return MappingProxyType(self._hosts)

    @checked
    async def host(self, name: str) -> Host:
        """Return the host with this name; make it if there is none.

        Raises:
            NetworkError: ``ip`` failed, or all addresses are taken.
            ValueError: The name cannot be a directory's.
        """
        if not name or "/" in name or name in {".", ".."}:
            raise ValueError(f"{name!r} is no name for a host")
        async with self._turn:
            if name not in self._hosts:
                self._hosts[name] = await self._new_host(name)
        return self._hosts[name]

    async def _open(self) -> None:
        self.is_separate = await asyncio.to_thread(can_make_namespaces) if self._separate is None else self._separate
        self._directory = self._resources.enter_context(vm_directory())
        self._range = await self._claim_range()
        self._addresses = self._range.hosts()
        self.address = str(next(self._addresses))
        self._resources.push_async_callback(self._end_hosts)
        if self.is_separate:
            await self._make_bridge()

    async def _claim_range(self) -> ipaddress.IPv4Network:
        """Return a range of addresses that nobody uses; it is ours while a socket of that name is bound."""
        used = await _routes() if self.is_separate else ()
        ranges = list((_SEPARATE if self.is_separate else _LOOPBACK).subnets(new_prefix=_PREFIX))
        for each in random.sample(ranges, len(ranges)):
            if any(each.overlaps(route) for route in used):
                continue
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(f"\0qmpvcpu-network-{each}")
            except OSError:  # another process has it
                claim.close()
                continue
            self._resources.callback(claim.close)
            return each
        raise NetworkError(f"no free range of addresses for a network: all of {_SEPARATE} is in use")

    async def _make_bridge(self) -> None:
        self._guardian = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guardian.__file__), stdin=subprocess.PIPE, start_new_session=True
        )
        self._resources.push_async_callback(_dismiss, self._guardian)
        bridge = self._bridge = await self._namespace()
        await bridge.ip("link add bridge type bridge forward_delay 0", "link set bridge up")
        ours = f"qmpvcpu{int(self._range.network_address) >> 32 - _PREFIX & 0x3FF}"  # as free as the range is
        await _ip(f"link add {ours} type veth peer name machine netns {bridge.pid}")
        self._resources.push_async_callback(_ip, f"link delete {ours}")  # the kernel removes namespaces with a delay
        await bridge.ip("link set machine master bridge up")
        await _ip(f"address add {self.address}/{_PREFIX} dev {ours}", f"link set {ours} up")

    async def _new_host(self, name: str) -> Host:
        address = next(self._addresses, None)
        if address is None:
            raise NetworkError(f"no address left for host {name}: {self._range} has {len(self._hosts)} hosts")
        directory = self._directory / name
        directory.mkdir()
        link = None
        if self._bridge is not None:
            link = _Link(self._bridge, await self._namespace(), f"port{len(self._hosts)}")
            await link.make(f"{address}/{_PREFIX}")
        return Host(name, str(address), directory, link)

    async def _namespace(self) -> "_Namespace":
        holder = await asyncio.create_subprocess_exec(
            *(*tied_to_us(), "unshare", "--net", "sh", "-c", _HOLD),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._resources.push_async_callback(_end, holder)
        assert holder.stdout is not None  # noqa: S101 - for mypy
        assert holder.stderr is not None  # noqa: S101 - for mypy
        if not await holder.stdout.readline():
            raise NetworkError(
                f"no network namespace: {(await holder.stderr.read()).decode(errors='replace').strip()}"
            )
        namespace = _Namespace(holder.pid)
        assert self._guardian is not None  # noqa: S101 - for mypy
        assert self._guardian.stdin is not None  # noqa: S101 - for mypy
        self._guardian.stdin.write(f"{namespace.name}\n".encode())
        await self._guardian.stdin.drain()
        return namespace

    async def _end_hosts(self) -> None:
        for host in self._hosts.values():
            for each in host.processes:
                await each.end()


class _Namespace:
    """A network namespace; it lives as long as the process *pid*, or any other in it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        path = network_namespace(pid)
        self.name = str(Path(path).readlink())
        self.inside = ("nsenter", f"--net={path}", "--")

    async def ip(self, *commands: str) -> None:
        await _ip(*commands, inside=self.inside)


class _Link:
    """One host's cable: its namespace, and its port on the bridge."""

    def __init__(self, bridge: _Namespace, host: _Namespace, port: str) -> None:
        self._bridge = bridge
        self._host = host
        self._port = port
        self.inside = host.inside

    async def make(self, address: str) -> None:
        await self._bridge.ip(
            f"link add {self._port} type veth peer name eth0 netns {self._host.pid}",
            f"link set {self._port} master bridge up",
        )
        await self._host.ip("link set lo up", f"address add {address} dev eth0", "link set eth0 up")

    async def set_up(self, *, up: bool) -> None:
        # The bridge's end: if the host's own end went down, the host would notice by errors.
        await self._bridge.ip(f"link set {self._port} {'up' if up else 'down'}")

    async def kill_all(self) -> None:
        """Kill everything in the namespace but the process that holds it open."""
        await asyncio.to_thread(guardian.kill_all, {self._host.name}, spare={self._host.pid})


async def _ip(*commands: str, inside: Sequence[str] = ()) -> None:
    """Run these commands of ``ip``, in a namespace or in our own."""
    process = await asyncio.create_subprocess_exec(
        *(*inside, "ip", "-batch", "-"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, stderr = await process.communicate("".join(f"{each}\n" for each in commands).encode())
    if process.returncode:
        why = stderr.decode(errors="replace").strip()
        raise NetworkError(f"ip failed: {printable(why)} (of: {'; '.join(commands)})")


async def _routes() -> list[ipaddress.IPv4Network]:
    """Return the networks that this machine has a route to, without the default route."""
    process = await asyncio.create_subprocess_exec("ip", "-json", "-4", "route", "show", stdout=subprocess.PIPE)
    stdout, _ = await process.communicate()
    return [ipaddress.IPv4Network(route["dst"]) for route in json.loads(stdout) if route["dst"] != "default"]


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _dismiss(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None  # noqa: S101 - for mypy
    process.stdin.close()
    await process.wait()
