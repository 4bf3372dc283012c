"""Where a QMP server listens: reading such an address, connecting to it, and who is at the other end.

Sockets, no QMP. Every failure is a `MonitorConnectError` that says what is wrong.
"""

import asyncio
import contextlib
import os
import re
import socket
import stat
import struct
import threading
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qmpvcpu.errors import MonitorConnectError, Unreachable, shorten
from qmpvcpu.host.processes import read_children, read_stat, why_idle
from qmpvcpu.host.sockets import openers, peer_inode, unix_accepted, unix_peer

_SUN_PATH_MAX = 107  # sun_path holds 108 bytes, one of them the final NUL (man 7 unix)
_BACKLOG_RETRY_S = 0.02
_PORT_MAX = 65535
_PORT = "[0-9]{1,5}"
_Place = tuple[int, tuple[Any, ...]]  # an address family, and an address of it

# An address as QEMU's arguments have it, socat's, a URI, or ss. Compiled when first used, since most addresses are a
# path.
_OPTION = r"\s*--?(?:qmp(?:-pretty)?|monitor|chardev|mon)(?:\s+|=)"
_SCHEME = r"(?ai)(unix|unix-connect|unix-listen|tcp[46]?|tcp[46]?-connect|file):"
_ELSEWHERE = r"(fd|udp|vsock|telnet|websocket|pipe|chardev|[a-z][a-z0-9+.-]*(?=://))[:=]"
_TCP = r"(?://)?(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<host>[^:\[\]]*)):(?P<port>[^:/]*)/?"
_HOST_PORT = r"(?a)(?:\[[^\[\]/]+\]|[\w.-]*):[0-9]+"
_BARE_IPV6 = r"[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9]+"
# Of a chardev "socket", and of -qmp itself (QEMU chardev/char.c, qemu_chardev_opts; monitor/monitor.c).
_KEY = (
    "abstract|delay|id|ipv[46]|keep-alive|logappend|logfile|mode|mptcp|mux|nodelay|noserver|nowait|pretty|reconnect"
    "|reconnect-ms|server|telnet|tight|tls-authz|tls-creds|tn3270|to|wait|websocket"
)
_TELLING = frozenset({"server", "noserver", "nowait", "abstract"})
_CHARDEV = ("socket,", "path=")
_FIELD = "(?:[^,]|,,)+"  # two commas are one in a value
_OTHER_PROTOCOLS = ("telnet", "tn3270", "tls-creds", "websocket")
_ASK_FOR = "give QEMU -qmp unix:PATH,server=on,wait=off"

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a regular file"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Address(NamedTuple):
    """An address of a QMP server: a UNIX path, or a TCP host and port.

    Attributes:
        path: Path of the UNIX socket, or None.
        host: TCP host name or number, or None.
        port: TCP port, 0 where there is a path.
    """

    path: str | None = None
    host: str | None = None
    port: int = 0

    @classmethod
    def parse(cls, target: object) -> "Address":
        """Return the address that *target* names; nothing is looked up or tried.

        Text may be written as QEMU's ``-qmp`` has it, with ``-qmp`` and its options or without: ``unix:PATH``,
        ``tcp:HOST:PORT`` (a numeric IPv6 host in brackets; no host is this one), ``socket,path=PATH``. Also a plain
        path, in which ``~`` is a home directory; ``HOST:PORT``, which has no slash (a file of such a name is
        ``./HOST:PORT``); ``@NAME``, an abstract socket; a URI with ``unix:``, ``tcp:`` or ``file:``.

        Args:
            target: Such text; a path as ``os.PathLike``, taken as it is; or a pair of host and port.

        Returns:
            The address.

        Raises:
            MonitorConnectError: The text is malformed, the port is not one, or the path is too long for a UNIX
                socket.
            TypeError: *target* is none of these.
        """
        match target:
            case (str() as host, int() as port) if not isinstance(port, bool):
                if not host:
                    raise MonitorConnectError(f"tcp::{shorten(port)}", "the host is missing")
                return cls._tcp(f"tcp:{host}:{shorten(port)}", host, shorten(port))
            case str():
                return cls._read(target)
            case os.PathLike():
                path = os.fsdecode(target)
                return cls._unix(path, path)
        raise TypeError(
            "a QMP server is given as a path, 'unix:PATH', 'tcp:HOST:PORT', (host, port), a connected socket"
            f" or a QMPClient, not as {type(target).__name__}"
        )

    @classmethod
    def _read(cls, text: str) -> "Address":
        """Read text as people paste it."""
        path = text.removeprefix("unix:")
        if path.startswith(("/", "./", "../")) and "," not in path and "//" not in path and path == path.strip():
            return cls._unix(text, path)
        body, options = _split_options(re.sub(f"^{_OPTION}", "", text.strip()).strip("'\""))
        _check_options(text, options)
        if body.startswith(_CHARDEV):
            values = _read_chardev(text, body)
            if "port" in values:
                return cls._tcp(text, values.get("host") or "localhost", values["port"])
            body = values.get("path", "")
        scheme = re.match(_SCHEME, body)
        if scheme is None:
            if elsewhere := re.match(_ELSEWHERE, body):
                raise _elsewhere(text, elsewhere[1])
            if re.fullmatch(_BARE_IPV6, body):
                raise MonitorConnectError(text, "put a numeric IPv6 host in brackets, as in [::1]:4444")
            if re.fullmatch(_HOST_PORT, body):
                return cls._read_tcp(text, body)
            return cls._unix(text, _expand(body, options))
        rest = body[scheme.end() :]
        if scheme[1][:3].lower() == "tcp":
            return cls._read_tcp(text, rest)
        if scheme[1].lower() == "file":
            from urllib.parse import unquote  # rarely needed, and takes as long to import as the rest

            rest = unquote(rest.removeprefix("//localhost"))
        return cls._unix(text, _expand("/" + rest.lstrip("/") if rest.startswith("/") else rest, options))

    @classmethod
    def _read_tcp(cls, text: str, rest: str) -> "Address":
        found = re.fullmatch(_TCP, rest)
        if found is None:
            raise MonitorConnectError(text, "a TCP address is tcp:HOST:PORT, with a numeric IPv6 host in brackets")
        return cls._tcp(text, found["bracketed"] or found["host"] or "localhost", found["port"])

    @classmethod
    def _tcp(cls, text: str, host: str, port: str) -> "Address":
        """Check the port of *text*."""
        if re.fullmatch(_PORT, port) is None or not 0 < int(port) <= _PORT_MAX:
            raise MonitorConnectError(text, f"the port is {port!r}, not a number from 1 to {_PORT_MAX}")
        return cls(host=host, port=int(port))

    @classmethod
    def _unix(cls, text: str, path: str) -> "Address":
        """Check the path that *text* is or names."""
        if not path.strip("\0") or "\0" in path[1:]:
            raise MonitorConnectError(repr(text), "the path is empty or holds a NUL")
        try:
            length = len(os.fsencode(path))
        except UnicodeEncodeError as err:
            raise MonitorConnectError(repr(text), "the path cannot be encoded: it holds half of a character") from err
        if length > _SUN_PATH_MAX:
            why = f"the path has {length} bytes, a UNIX socket's can have {_SUN_PATH_MAX}"
            raise MonitorConnectError(f"unix:{path}", why, hint="a relative path or a symbolic link is shorter")
        return cls(path=path)

    @property
    def is_abstract(self) -> bool:
        """True for a UNIX socket that has a name and no file."""
        return self.path is not None and self.path[0] == "\0"

    def leads_to(self, other: "Address") -> bool:
        """Return True if this is the same place as *other*, perhaps by another path, or a symbolic link."""
        if self == other:
            return True
        if self.path is None or other.path is None or self.is_abstract or other.is_abstract:
            return False
        try:
            return os.path.samefile(self.path, other.path)  # noqa: PTH121 - pathlib brings urllib
        except OSError:
            return False

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:@{self.path[1:]}" if self.is_abstract else f"unix:{self.path}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in str(self.host) else f"tcp:{self.host}:{self.port}"


def _split_options(text: str) -> tuple[str, dict[str, str]]:
    """Split the options of a chardev off the end of *text*; return what is before them, and the options.

    To QEMU two commas are one in a path. A comma that begins no option belongs to the path, and so does every comma
    of a path without an option that only a chardev has.
    """
    options: dict[str, str] = {}
    rest = text
    while True:
        body, comma, last = rest.rpartition(",")
        name, _, value = last.partition("=")
        if not comma or body.endswith(",") or re.fullmatch(_KEY, name) is None:
            break
        rest, options[name] = body, value or "on"
    if text.startswith(_CHARDEV):
        return rest, options  # two commas stay two: there are more options before the path
    if not (options.keys() & _TELLING or text.startswith("tcp:")):
        return text, {}
    return rest.replace(",,", ",") if options else text, options


def _read_chardev(text: str, body: str) -> Mapping[str, str]:
    """Return the values in *body*, ``socket,path=...``; a flag has none."""
    values = {}
    for field in re.findall(_FIELD, body.removeprefix("socket,")):
        name, is_, value = field.replace(",,", ",").partition("=")
        if not is_ and re.fullmatch(_KEY, name) is None:
            why = f"{shorten(name)} is no option of a chardev; write a comma in a path twice"
            raise MonitorConnectError(text, why)
        values[name] = value
    return values


def _check_options(text: str, options: Mapping[str, str]) -> None:
    """Refuse a chardev that does not listen, or does not speak plain QMP."""
    if options.get("server") in ("off", "no") or "noserver" in options:
        why = "with server=off QEMU connects instead of listening"
        raise MonitorConnectError(text, why, reason=Unreachable.UNFIT, hint=_ASK_FOR)
    if options.get("abstract") in ("on", "yes") and options.get("tight") in ("off", "no"):
        raise MonitorConnectError(text, "with tight=off QEMU adds NULs to the name, which no address here can say")
    for each in _OTHER_PROTOCOLS:
        if options.get(each, "off") not in ("off", "no"):
            why = f"with {each} QEMU does not speak plain JSON"
            raise MonitorConnectError(text, why, reason=Unreachable.UNFIT, hint=_ASK_FOR)


def _expand(path: str, options: Mapping[str, str]) -> str:
    """Return *path* with a home directory in place of ``~``, or as the kernel names an abstract socket."""
    if options.get("abstract") in ("on", "yes"):
        path = f"@{path}"
    if path.startswith("@"):
        return "\0" + path[1:]
    return os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111 - pathlib brings urllib


def _elsewhere(text: str, kind: str) -> MonitorConnectError:
    """Return the error for a *kind* of address that leads to no socket of a VM: why, and what to write."""
    known = "a path, unix:PATH or tcp:HOST:PORT"
    if kind.partition("+")[0] == "qemu":
        why = f"that is a URI of libvirt; the address of a VM's socket is {known}"
        return MonitorConnectError(text, why, hint="docs/libvirt.md says how a VM of libvirt gets one")
    why = f"{kind} leads to no socket of a VM; the address of one is {known}"
    if kind == "fd":
        return MonitorConnectError(text, why, hint="attach() takes a connected socket")
    return MonitorConnectError(text, why, reason=Unreachable.UNFIT, hint=_ASK_FOR)


async def connect(address: Address, *, deadline: float) -> socket.socket:
    """Return a non-blocking socket connected to *address*; on failure or cancellation none is left open.

    Args:
        address: Where to.
        deadline: Time of the running loop's clock at which to give up.

    Returns:
        The socket; the caller closes it.

    Raises:
        MonitorConnectError: Nothing usable is there, or it did not accept by the deadline.
    """
    try:
        async with asyncio.timeout_at(deadline):
            if address.path is not None:
                return await _connect_unix(str(address), address.path)
            return await _connect_tcp(str(address), str(address.host), address.port)
    except TimeoutError:
        if address.path is None:
            raise MonitorConnectError(str(address), "the host did not answer within the deadline") from None
        raise MonitorConnectError(
            str(address),
            "its queue of waiting clients is full: another client holds this socket while others wait already, or"
            " QEMU is stopped",
            reason=Unreachable.HELD,
            hint="SIGCONT lets a stopped QEMU go on; a QMP socket serves one client at a time: give a QEMU that runs "
            "a second -qmp",
        ) from None


async def _connect_unix(text: str, path: str) -> socket.socket:
    """Connect to a UNIX socket; waits as long as the listener's queue is full."""
    if path[0] != "\0":
        _check_file(text, path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(0)
        while True:
            # Not loop.sock_connect: on a full queue the kernel says EAGAIN and starts nothing, which asyncio
            # takes for a connection that is coming about.
            with contextlib.suppress(BlockingIOError):
                sock.connect(path)
                return sock
            await asyncio.sleep(_BACKLOG_RETRY_S)
    except ConnectionRefusedError:
        sock.close()
        why, reason = "connection refused: nobody listens", Unreachable.ABSENT
        if path[0] != "\0":
            why, reason = f"{why}, the socket was left behind by a process that has ended", Unreachable.LEFT_BEHIND
        raise MonitorConnectError(text, why, reason=reason) from None
    except OSError as err:
        sock.close()
        raise MonitorConnectError(text, _explain(err), reason=_reason(err)) from err
    except BaseException:
        sock.close()
        raise


def _check_file(text: str, path: str) -> None:
    """Make sure that there is a socket at *path*."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - one stat of a local path; str keeps a "./"
    except FileNotFoundError:
        hint = f"is QEMU running, with -qmp unix:PATH,server=on,wait=off?{_other_reading(path)}"
        raise MonitorConnectError(text, "no such path", reason=Unreachable.ABSENT, hint=hint) from None
    except OSError as err:
        raise MonitorConnectError(text, _explain(err), reason=_reason(err)) from err
    if not stat.S_ISSOCK(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise MonitorConnectError(text, f"the path is {kind}, no socket")


def _other_reading(path: str) -> str:
    """Say what a *path* that does not exist may have been meant as, or ""."""
    if re.fullmatch(_PORT, path):
        return f" A port is written tcp:HOST:{path}"
    if "$" in path:
        return " $NAME is not expanded here"
    return "" if "/" in path else " A name alone is a path; a host is written tcp:HOST:PORT"


async def _connect_tcp(text: str, host: str, port: int) -> socket.socket:
    """Connect to the first of the host's addresses that accepts."""
    loop = asyncio.get_running_loop()
    try:
        found = _numeric(host, port) or await _look_up(host, port)
    except (socket.gaierror, ValueError) as err:  # ValueError: a label that no host name can have, or a NUL
        why = f"the host name cannot be resolved: {getattr(err, 'strerror', None) or err}"
        raise MonitorConnectError(text, why) from err
    failure = OSError("the host has no address")
    for family, where in found:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(0)
            await loop.sock_connect(sock, where)
        except OSError as err:
            sock.close()
            failure = err
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    reason = _reason(failure)
    hint = "is QEMU running, with -qmp tcp:HOST:PORT,server=on,wait=off,nodelay=on?"
    hint = hint if reason is Unreachable.ABSENT else ""
    raise MonitorConnectError(text, _explain(failure), reason=reason, hint=hint) from failure


def _numeric(host: str, port: int) -> list[_Place]:
    """Return where a numeric address is; nothing for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError, ValueError):
            socket.inet_pton(family, host)
            return [(family, (host, port))]
    return []


async def _look_up(host: str, port: int) -> list[_Place]:
    """Look up a host name in a thread of its own; a caller that gives up leaves the thread running.

    ``loop.getaddrinfo`` would take one of the loop's few threads, which also write the records: a look-up that nobody
    answers holds it for ten seconds, and ``asyncio.run`` does not end before.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[_Place]] = loop.create_future()

    def tell(found: list[_Place], error: Exception | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(found)
        else:
            answer.set_exception(error)

    def ask() -> None:
        found: list[_Place] = []
        failure: Exception | None = None
        try:
            found = [(each[0], each[4]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, ValueError) as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, found, failure)

    threading.Thread(target=ask, name=f"look up {host}", daemon=True).start()
    return await answer


def _explain(err: OSError) -> str:
    """Return in words why the kernel refused."""
    if isinstance(err, PermissionError):
        return "permission denied: it takes write permission on the socket and search permission on its directories"
    if isinstance(err, ConnectionRefusedError):
        return "connection refused: nobody listens on that port"
    return err.strerror or str(err)


def _reason(err: OSError) -> Unreachable:
    """Return the same for programs."""
    if isinstance(err, PermissionError):
        return Unreachable.FORBIDDEN
    return Unreachable.ABSENT if isinstance(err, ConnectionRefusedError) else Unreachable.OTHER


def connected_socket(sock: socket.socket) -> tuple[str, socket.socket]:
    """Return *sock* made non-blocking, and its name for messages.

    Raises:
        MonitorConnectError: It is closed, no stream, or not connected.
    """
    name = f"fd {sock.fileno()}"
    if sock.type != socket.SOCK_STREAM:
        raise MonitorConnectError(name, "it is not a stream socket")
    try:
        sock.getpeername()
    except OSError as err:
        raise MonitorConnectError(name, f"it is not a connected socket: {err.strerror}") from err
    sock.settimeout(0)
    return name, sock


async def first_bytes(sock: socket.socket, size: int = 128) -> bytes:
    """Wait for the peer's first bytes, and return them without taking them off the socket.

    Args:
        sock: A connected non-blocking socket that nothing reads from.
        size: How many bytes at most.

    Returns:
        The bytes, b"" if the peer has hung up.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
    return sock.recv(size, socket.MSG_PEEK)


def peer_name(sock: socket.socket) -> str | None:
    """Return what the server of a connected socket calls it: its path as the server bound it, or ``tcp:HOST:PORT``.

    That is how QEMU names it (``query-chardev``), whatever symbolic link, host name or mount led here. "" for an
    abstract socket, which QEMU does not name; None if the connection is lost.
    """
    try:
        name = sock.getpeername()
    except OSError:
        return None
    if isinstance(name, tuple):
        host, port = name[:2]
        return str(Address(host=host, port=port))
    return "" if isinstance(name, bytes) else str(name)


def peer_pid(sock: socket.socket | TransportSocket) -> int | None:
    """Return the process id of the peer of a connected UNIX socket, None where there is none to know.

    It is the process that called ``listen()``: a QEMU that was handed a listening socket shows its launcher's.
    """
    if sock.family != socket.AF_UNIX:
        return None
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid or None  # 0: a process outside our PID namespace


def is_accepted(sock: socket.socket) -> bool | None:
    """Tell whether the server has accepted the connection of *sock*; None where the kernel does not tell.

    One that serves another client accepts nobody meanwhile, and one that is stopped accepts nobody either. Until then
    this end has no peer with a number.
    """
    if sock.family != socket.AF_UNIX:
        return None
    peer = peer_inode(sock)
    return None if peer is None else bool(peer)


def find_clients(sock: socket.socket) -> list[int]:
    """Return the processes that the server of *sock* serves on the same UNIX socket, as far as the kernel tells.

    It looks through the open files of all processes that this one may look into, so call it in a thread.
    """
    path = peer_name(sock)
    if sock.family != socket.AF_UNIX or not path:
        return []
    return openers([peer for each in unix_accepted(path) if (peer := unix_peer(each))])


def describe_peer(pid: int | None) -> tuple[Unreachable, str]:
    """Say what the kernel tells about a peer that does not greet, and what to do about it.

    Args:
        pid: The peer's process id, or None if unknown.

    Returns:
        HELD, or OTHER if it does not run; and a sentence, such as ``pid 123 (qemu-system-x86) is stopped (SIGSTOP)``.
    """
    advice = "a QMP socket serves one client at a time; give QEMU a second -qmp"
    if pid is None:
        return Unreachable.HELD, advice
    peer = read_stat(pid)
    if peer is None:
        return Unreachable.HELD, f"the process that opened it, pid {pid}, has ended; {advice}"
    who = describe_process(pid)
    if why := why_idle(pid):
        return Unreachable.OTHER, f"{who} {why}"
    for child in read_children(pid):
        started = read_stat(child)
        if started is not None and started.name.startswith("qemu") and (why := why_idle(child)):
            return Unreachable.OTHER, f"pid {child} ({started.name}), started by {who}, {why}"
    return Unreachable.HELD, f"{who} runs, so most likely another client holds the socket; {advice}"


def describe_process(pid: int) -> str:
    """Return ``pid 123 (qemu-system-x86)``, or ``pid 123`` if it is gone or hidden."""
    stat = read_stat(pid)
    return f"pid {pid}" if stat is None else f"pid {pid} ({stat.name})"


def why_silent(pid: int | None) -> str:
    """Return why the peer *pid* does not answer, if the kernel knows: ``pid 123 (qemu-system-x86) is stopped``."""
    peer = None if pid is None else read_stat(pid)
    why = "" if pid is None else why_idle(pid)
    return f"pid {pid} ({peer.name}) {why}" if peer is not None and why else ""
