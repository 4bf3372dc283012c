"""Which sockets a directory has."""

import os
import stat
from pathlib import Path

from qmpvcpu.errors import SocketDirectoryError

# Device and inode: the same by every path that leads there.
SocketId = tuple[int, int]


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
