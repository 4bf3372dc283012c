"""Which sockets a directory has, and where the agents of their VMs are."""

import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from qmpvcpu.errors import SocketDirectoryError

# Device and inode: the same by every path that leads there.
SocketId = tuple[int, int]

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
# What of a QMP socket's path a pattern may take.
_PARTS: Mapping[str, Callable[[Path], str]] = {
    "dir": lambda path: str(path.parent),
    "name": lambda path: path.name,
    "stem": lambda path: path.stem,
}


def socket_id(path: str | os.PathLike[str]) -> SocketId | None:
    """Return what tells the socket at *path* from others, None if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - str keeps a "./", as connecting does
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def find_sockets(directory: Path, pattern: str) -> dict[Path, SocketId]:
    """Return the sockets in *directory* whose path in it matches *pattern*, ordered by name, links last.

    What is no socket is passed over, and so is what goes away meanwhile, or may not be looked at.

    Raises:
        SocketDirectoryError: *directory* cannot be read.
    """
    try:
        with os.scandir(directory):  # glob() finds nothing in what is not there, and says nothing
            pass
    except OSError as err:
        raise SocketDirectoryError(directory, err.strerror or str(err)) from err
    found = {path: known for path in directory.glob(pattern) if (known := socket_id(path)) is not None}
    return {path: found[path] for path in sorted(found, key=lambda path: (path.is_symlink(), path))}


def has_placeholder(pattern: str) -> bool:
    """Return True if *pattern* names another agent for each QMP socket."""
    return _PLACEHOLDER.search(pattern) is not None


def check_agent_pattern(pattern: str) -> None:
    """Return if *pattern* says where the agent of each VM is.

    Raises:
        ValueError: It has no placeholder, or one that is unknown.
    """
    unknown = [name for name in _PLACEHOLDER.findall(pattern) if name not in _PARTS]
    if unknown or not has_placeholder(pattern):
        why = f"{{{unknown[0]}}} is unknown" if unknown else "all VMs would have one agent"
        raise ValueError(f"{pattern!r}: {why}; a pattern is such as {{dir}}/{{stem}}.agent, or has {{name}}")


def agent_socket(pattern: str, socket: Path) -> Path:
    """Return the path of the agent of the VM whose QMP socket is *socket*."""
    return Path(_PLACEHOLDER.sub(lambda found: _PARTS[found[1]](socket), pattern))
