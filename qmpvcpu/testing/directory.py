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


@contextmanager
def vm_directory() -> Iterator[Path]:
    """A new directory in the system's one for temporary files; removed at the end.

    Its name is short: a UNIX socket's path has at most 107 bytes. As long as this process lives it holds a lock in
    there, so that :func:`sweep` can tell what a killed process has left.
    """
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
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


def sweep() -> list[Path]:
    """Remove the directories of this user's processes that have been killed.

    Returns:
        Those that were removed.
    """
    gone = []
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
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
