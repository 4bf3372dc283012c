"""Directories for VMs: one each, known to be in use as long as their owner lives, swept when it has died."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "qmpvcpu-"
_LOCK = "in-use"
_SUN_PATH_MAX = 107  # bytes of a UNIX socket's path (man 7 unix)
_ROOM = 24  # bytes for the directory's own name and a socket's name in it
_SHORT = (Path("/tmp"), Path("/dev/shm"))  # noqa: S108 - mkdtemp makes an unguessable name in there


@contextmanager
def vm_directory() -> Iterator[Path]:
    """A new directory for temporary files; removed at the end.

    It is in the system's directory for temporary files (``TMPDIR``), unless UNIX sockets in there would have paths
    that are too long; then it is in ``/tmp`` or ``/dev/shm``. As long as this process lives it holds a lock in the
    directory, so that :func:`sweep` can tell what a killed process has left.
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
    chosen = Path(tempfile.gettempdir())
    if len(os.fsencode(chosen)) + _ROOM <= _SUN_PATH_MAX:
        return chosen
    return next((each for each in _SHORT if os.access(each, os.W_OK | os.X_OK)), chosen)


def sweep() -> list[Path]:
    """Remove the directories of this user's processes that have been killed.

    Returns:
        Those that were removed.
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
