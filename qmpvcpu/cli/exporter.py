"""exporter: metrics of all VMs of a host, served for Prometheus."""

import asyncio
import contextlib
import errno
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from qmpvcpu.cli.options import JSON, REPLY_TIMEOUT, VERBOSE, File, Seconds, command, option
from qmpvcpu.cli.progress import meanwhile
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.vms import DIRECTORY, PATTERN, QMP, Vms, records_in
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.errors import DomainXmlError, counted
from qmpvcpu.fleet import Fleet

if TYPE_CHECKING:
    from qmpvcpu.model.placement import Placement
    from qmpvcpu.model.vm import VmInfo

_ADDRESS: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+(?:%\w+)?)\]|([^\[\]:\s]*)):([0-9]{1,5})")
_HIGHEST_PORT: Final = 65535
_RESYNC_S: Final = 30.0
_MOST_CLIENTS: Final = 64
_MOST_HEAD_BYTES: Final = 16 * 1024
# How long a client may take to send its request, and to take the answer.
_CLIENT_S: Final = 10.0
_INDEX: Final = b'<!doctype html><title>qmpvcpu exporter</title><a href="/metrics">metrics</a>\n'
_REQUEST: Final = re.compile(rb"(\S+) (\S+) HTTP/1\.[01]")
_ACCEPT: Final = re.compile(rb"\r\naccept:([^\r\n]*)", re.IGNORECASE)

Page = Callable[[str], Awaitable[tuple[str, bytes]]]
"""Returns the content type and the body of a scrape, for the request's Accept header."""


@command(
    QMP,
    DIRECTORY,
    PATTERN,
    option(
        "--listen",
        metavar="HOST:PORT",
        default="127.0.0.1:9177",
        help="Where to serve: 127.0.0.1:9177, [::1]:9177; without a host everywhere. Port 0: any free one.",
    ),
    option(
        "--rescan",
        metavar="SECONDS",
        type=Seconds(some="looking takes some time"),
        default=5.0,
        help="How often to look for VMs that came or went, and to connect to those that are not connected.",
    ),
    option("--for", "seconds", metavar="SECONDS", type=Seconds(), help="End after this time."),
    option(
        "--record",
        metavar="DIR",
        type=File(),
        help="Read each VM's record in this directory, as fleet keeps them: it has the placement.",
    ),
    REPLY_TIMEOUT,
    JSON,
    VERBOSE,
)
async def exporter(shell: Shell, *, listen: str, rescan: float, seconds: float | None, **vms: Any) -> CommandResult:
    """Serve metrics of the vCPUs of all VMs of a host for Prometheus, until a signal. Reads only.

    VMs that come and go are found. A VM that does not answer delays no scrape: its qmpvcpu_up is 0. A QMP socket
    serves one client at a time, so give each QEMU a socket for the exporter. There is no password and no encryption:
    serve other hosts through a proxy that has both.

      qmpvcpu exporter --dir /run/vms

      qmpvcpu exporter --dir /run/vms --record /var/lib/vms

      qmpvcpu exporter --dir /run --pattern '*/metrics.qmp' --listen '[::1]:9177'

    Exit codes: 0 ended by a signal, or after --for; 2 bad usage, or prometheus-client is not installed; 3 it
    cannot listen at the address, for example because the port is taken.
    """
    host, port = _parse(listen)
    metrics = _import_metrics()
    record = records_in(shell.options.record)
    async with Vms(**vms).opened(shell, read_only=True, may_be_empty=True, resync_interval=_RESYNC_S) as fleet:
        registry = metrics.process_registry()
        async with metrics.VcpuCollector(fleet, registry=registry, rescan_interval=rescan) as collector:
            scrapes = _Scrapes(collector.read, lambda accept: metrics.exposition(registry, accept))
            server = _Server(scrapes.page)
            async with server.listening(host, port) as at:
                tell = shell.note if shell.options.json else shell.say  # a program too may want to know the port
                tell(f"metrics of {counted(len(fleet.addresses), 'VM')} at http://{at}/metrics")
                async with meanwhile(_heed_records(fleet, record, rescan)):
                    await _until_stopped(shell, seconds)
    return CommandResult(REACHED, document(listened=at, requests=server.requests))


def _parse(listen: str) -> tuple[str | None, int]:
    """Return the host, None for all of this machine's addresses, and the port.

    Raises:
        BadUsageError: *listen* names none.
    """
    found = _ADDRESS.fullmatch(listen)
    if found is None or int(found[3]) > _HIGHEST_PORT:
        raise BadUsageError(f"--listen {listen}: say HOST:PORT, such as 127.0.0.1:9177 or [::1]:9177")
    return found[1] or found[2] or None, int(found[3])


def _import_metrics() -> ModuleType:
    try:
        from qmpvcpu import metrics  # not at the top: without the extra, that is a sentence and no traceback
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] != "prometheus_client":
            raise
        raise BadUsageError(
            "the exporter needs prometheus-client, which is not installed: pip install 'qmpvcpu[metrics]'"
        ) from error
    return metrics


async def _until_stopped(shell: Shell, seconds: float | None) -> None:
    """Wait for a signal, or so long."""
    stopped = asyncio.Event()

    async def stop() -> None:
        stopped.set()

    with shell.signals.stopped_by(stop), contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopped.wait()


async def _heed_records(fleet: Fleet, record: "Callable[[str, VmInfo], Path] | None", interval: float) -> None:
    """Have VMs attached anew whose records say another placement by now: a record is read as one is attached."""
    known: dict[str, object] = {}
    while record is not None:
        vms = dict(fleet.vms)
        paths = {address: record(address, vm.layout.vm) for address, vm in vms.items()}
        before, known = known, {address: _version_of(path) for address, path in paths.items()}
        news = [address for address, version in known.items() if address not in before or before[address] != version]
        changed = {address for address in news if _says_otherwise(paths[address], vms[address].host.placement)}
        for address in changed:
            await vms[address].close()
        if changed:
            await _attach_again(fleet, changed)
        await asyncio.sleep(interval)


async def _attach_again(fleet: Fleet, addresses: set[str]) -> None:
    """Attach these VMs, without waiting for others that are silent."""
    left = set(addresses)
    async with contextlib.aclosing(fleet.attach()) as results:
        async for result in results:
            left.discard(result.address)
            if not left:
                break


def _version_of(path: Path) -> object:
    """Return what tells a file from what stood there before; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _says_otherwise(path: Path, placement: "Placement") -> bool:
    """Return True if a record names other places than *placement*, or no longer any that can be read."""
    # Not at the top: XML takes long to import, and few exporters read records.
    from qmpvcpu.domainxml import parse
    from qmpvcpu.domainxml.placing import placement_of

    try:
        said = placement_of(parse(path.read_bytes()))
    except (OSError, DomainXmlError):  # attaching will say why
        return bool(placement)
    return (said.vcpus, said.emulator, said.cpuset) != (placement.vcpus, placement.emulator, placement.cpuset)


class _Scrapes:
    """Scrapes that come at the same time, as one: they share a reading, and what it is rendered to.

    Args:
        read: Reads all VMs.
        render: Returns what there is to tell, for an Accept header.
    """

    def __init__(self, read: Callable[[], Awaitable[None]], render: Callable[[str], tuple[str, bytes]]) -> None:
        self._read = read
        self._render = render
        self._reading: asyncio.Future[None] | None = None
        self._pages: dict[str, tuple[str, bytes]] = {}

    async def page(self, accept: str) -> tuple[str, bytes]:
        """Return the content type and the body for a request with this Accept header."""
        if self._reading is None or self._reading.done():
            self._reading, self._pages = asyncio.ensure_future(self._read()), {}
        pages = self._pages
        await asyncio.shield(self._reading)
        if accept not in pages:
            pages[accept] = self._render(accept)
        return pages[accept]


class _Server:
    """Answers GET and HEAD, one request a connection; a client that is slow, or talks nonsense, is let go.

    Args:
        page: What ``/metrics`` is.

    Attributes:
        requests: How many requests were answered with it.
    """

    def __init__(self, page: Page) -> None:
        self.requests = 0
        self._page = page
        self._clients: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, host: str | None, port: int) -> AsyncIterator[str]:
        """Serve inside; yield the address, as a URL has it.

        Raises:
            OSError: It cannot be listened at; it says where, and why.
        """
        try:
            server = await asyncio.start_server(self._connected, host, port, limit=_MOST_HEAD_BYTES)
        except UnicodeError as error:  # a label that no host name can have
            raise OSError(errno.EADDRNOTAVAIL, "no host has such a name", f"--listen {host or ''}:{port}") from error
        except OSError as error:
            why = str(error) if error.errno is None else error.strerror or os.strerror(error.errno)
            if error.errno == errno.EADDRINUSE:
                why = "the port is taken; exporters of libvirt have 9177 too"
            elif error.errno == errno.EADDRNOTAVAIL:
                why = "this host has no such address"
            raise OSError(error.errno, why, f"--listen {host or ''}:{port}") from error
        try:
            shown, number = server.sockets[0].getsockname()[:2]
            yield f"[{shown}]:{number}" if ":" in shown else f"{shown}:{number}"
        finally:
            server.close()
            for client in self._clients:
                client.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - JUSTIFICATION: a coroutine that runs is in a task, mypy cannot know
        self._clients.add(task)
        try:
            busy = len(self._clients) > _MOST_CLIENTS
            answer = _answer(503, b"too many clients\n") if busy else await self._answered(reader)
            async with asyncio.timeout(_CLIENT_S):
                writer.write(answer)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):  # TimeoutError is an OSError: it is slow, or has gone
            pass
        finally:
            self._clients.discard(task)
            writer.transport.abort()

    async def _answered(self, reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(_CLIENT_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _answer(431, b"the request is too long\n")
        request = _REQUEST.fullmatch(head.partition(b"\r\n")[0])
        if request is None:
            return _answer(400, b"this speaks HTTP/1.1\n")
        method, path = request[1], request[2].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _answer(405, b"GET is all there is\n", "Allow: GET, HEAD\r\n")
        if path == b"/metrics":
            self.requests += 1
            accept = _ACCEPT.search(head)
            kind, body = await self._page("" if accept is None else accept[1].decode("latin-1").strip())
            answer = _answer(200, body, kind=kind)
        elif path == b"/":
            answer = _answer(200, _INDEX, kind="text/html; charset=utf-8")
        else:
            answer = _answer(404, b"/metrics is all there is\n")
        return answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == b"HEAD" else answer


def _answer(status: int, body: bytes, more: str = "", *, kind: str = "text/plain; charset=utf-8") -> bytes:
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("latin-1") + body
