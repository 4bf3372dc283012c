"""Directories for VMs: one each, known to be in use as long as their owner lives, swept when it has died."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmpvcpu.errors import QmpVcpuError

_PREFIX = "qmpvcpu-"
_LOCK = "in-use"
_SUN_PATH_MAX = 107  # bytes of a UNIX socket's path (man 7 unix)
_ROOM = 24  # bytes for the directory's own name and a socket's name in it
_VARIABLES = ("TMPDIR", "TEMP", "TMP")  # where Python looks (tempfile.gettempdir)
_SHORT = (Path("/tmp"), Path("/dev/shm"))  # noqa: S108 - mkdtemp makes an unguessable name in there


class TemporaryDirectoryError(QmpVcpuError):
    """No directory of this machine can hold the UNIX sockets of a VM."""


@contextmanager
def vm_directory() -> Iterator[Path]:
    """A new directory for temporary files; removed at the end.

    It is in the system's directory for temporary files (``TMPDIR``), unless UNIX sockets in there would have paths
    that are too long; then it is in ``/tmp`` or ``/dev/shm``. As long as this process lives it holds a lock in the
    directory, so that :func:`sweep` can tell what a killed process has left.

    Raises:
        TemporaryDirectoryError: None of them will do.
    """
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_home()))
    lock = None
    try:
        lock = os.open(path / f"{_LOCK}.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (path / f"{_LOCK}.new").rename(path / _LOCK)  # locked before anybody can look for it
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _home() -> Path:
    """Return where to make directories."""
    variable = next((each for each in _VARIABLES if os.environ.get(each)), _VARIABLES[0])
    limit = _SUN_PATH_MAX - _ROOM
    try:
        chosen = Path(tempfile.gettempdir())
    except FileNotFoundError:  # it tries some more, and whether they can be written
        why = f"no directory for temporary files can be written, {os.environ.get(variable, 'such as /tmp')} included"
    else:
        length = len(os.fsencode(chosen))
        if length <= limit:
            return chosen
        for each in _SHORT:
            if os.access(each, os.W_OK | os.X_OK):
                return each
        why = f"{chosen} has {length} bytes, and {' and '.join(map(str, _SHORT))} cannot be written"
    raise TemporaryDirectoryError(
        f"nowhere to put a VM's UNIX sockets: {why}. Set {variable} to a directory of at most {limit} bytes"
    )


def sweep() -> list[Path]:
    """Remove the directories of this user's processes that have been killed.

    Returns:
        Those that were removed.

    Raises:
        TemporaryDirectoryError: There is no place for such directories.
    """
    gone = []
    for lock in _home().glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            if lock.parent.is_symlink() or lock.parent.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
                gone.append(lock.parent)
            finally:
                os.close(descriptor)
    return gone
