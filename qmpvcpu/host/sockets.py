"""Which sockets of this host are connected to each other, and who has them open.

Source: man 7 sock_diag; Linux net/unix/diag.c, ``UDIAG_SHOW_PEER``; net/ipv4/inet_diag.c,
``inet_diag_dump_one_icsk``.
"""

import os
import socket
import struct
from asyncio.trsock import TransportSocket
from collections.abc import Collection, Iterator
from typing import Final

from qmpvcpu.host.files import names_in, read_link, read_text

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_UDIAG_SHOW_PEER: Final = 4
_UNIX_DIAG_PEER: Final = 2
_ANY: Final = 0xFFFFFFFF
_HEADER: Final = 16  # bytes: that of netlink
_UNIX_DIAG_MSG: Final = 16
_INET_DIAG_MSG: Final = 72
_ESTABLISHED: Final = 1


def peer_inode(sock: socket.socket | TransportSocket) -> int | None:
    """Return the inode of the socket at the other end of a connection, if it is on this host.

    For TCP, only within this network namespace. 0: the server has not accepted it yet. None: unknown.
    """
    try:
        if sock.family == socket.AF_UNIX:
            return unix_peer(os.fstat(sock.fileno()).st_ino)
        return _tcp_inode(sock.family, sock.getpeername(), sock.getsockname())
    except OSError:
        return None


def unix_peer(inode: int) -> int | None:
    """Return the number of the socket that a UNIX socket is connected to; 0: not accepted yet; None: unknown."""
    question = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, _ANY, inode, _UDIAG_SHOW_PEER, _ANY, _ANY)
    answer = _ask(question)
    at = _HEADER + _UNIX_DIAG_MSG
    while at + 8 <= len(answer):
        length, kind, value = struct.unpack_from("=HHI", answer, at)
        if kind == _UNIX_DIAG_PEER:
            return int(value)
        at += max(4, (length + 3) & ~3)
    return None


def unix_accepted(path: str) -> Iterator[int]:
    """Yield the numbers of the sockets that a server on *path* has accepted.

    Source: proc(5), ``/proc/net/unix``: a socket that was accepted has its server's path, and state 03.
    """
    for line in read_text("/proc/net/unix").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if fields[7:] == [path] and fields[5] == "03" and fields[6] != "0":
            yield int(fields[6])


def openers(inodes: Collection[int]) -> list[int]:
    """Return the processes that have one of these sockets open, of those that we may look into."""
    targets = {f"socket:[{inode}]" for inode in inodes if inode}
    if not targets:
        return []
    return [int(name) for name in names_in("/proc") if name.isdigit() and _has_open(name, targets)]


def has_open(pid: int, inode: int) -> bool | None:
    """Return whether process *pid* has a socket open; None: we may not look into it."""
    if not names_in(f"/proc/{pid}/fd"):
        return None
    return _has_open(str(pid), {f"socket:[{inode}]"})


def _has_open(pid: str, targets: Collection[str]) -> bool:
    return any(read_link(f"/proc/{pid}/fd/{file}") in targets for file in names_in(f"/proc/{pid}/fd"))


def _tcp_inode(family: int, local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """Return the number of the TCP socket with this *local* address, connected to *remote*; None: not here."""
    (source, its_port), (target, our_port) = local[:2], remote[:2]
    if family == socket.AF_INET6 and source.startswith("::ffff:"):
        family, source, target = socket.AF_INET, source[7:], target[7:]
    addresses = [socket.inet_pton(family, each.partition("%")[0]).ljust(16, b"\0") for each in (source, target)]
    where = struct.pack("!HH16s16s", its_port, our_port, *addresses)
    question = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ANY) + where
    answer = _ask(question + struct.pack("=III", 0, _ANY, _ANY))
    if len(answer) < _HEADER + _INET_DIAG_MSG:
        return None
    if answer[_HEADER + 1] != _ESTABLISHED:
        return None  # where no such socket is here, one that listens on the same port of any address is found
    inode: int
    (inode,) = struct.unpack_from("=I", answer, _HEADER + _INET_DIAG_MSG - 4)
    return inode or None


def _ask(question: bytes) -> bytes:
    """Return the kernel's answer about one socket, b"" if it has none."""
    header = struct.pack("=IHHII", _HEADER + len(question), _SOCK_DIAG_BY_FAMILY, 1, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(0.1)
            kernel.send(header + question)
            answer = kernel.recv(4096)
    except OSError:
        return b""
    (kind,) = struct.unpack_from("=H", answer, 4)
    return answer if kind == _SOCK_DIAG_BY_FAMILY else b""
