"""The lock that makes one record have one keeper. What is here blocks."""

import contextlib
import fcntl
import io
import os
import stat
from pathlib import Path

from qmpvcpu.errors import RecordError, RecordLockedError
from qmpvcpu.record.files import Place, told_as_record_error


class Lock:
    """The keeping of the file at *place*, held from its making to ``release``.

    The file itself cannot carry it: each save puts a new one in its place, and at first there is none. The lock
    belongs to an open file, so a second keeper in the same process is turned away too; a child that is forked, and
    lives on without an exec, holds it on.

    Raises:
        RecordLockedError: Somebody else keeps the file.
        RecordError: The lock's file cannot be made beside it, is no regular file, or its file system has no locks.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._path = place.path
        self._name = f".{place.path.name}.lock"
        self._file = self._take()

    def renew(self) -> None:
        """Take the lock again if somebody has removed its file, which lets others keep the record too.

        Raises:
            RecordLockedError: Somebody else keeps the record meanwhile.
            RecordError: The lock's file cannot be made again, or the path leads to another directory now.
        """
        self._place.check()
        with told_as_record_error(self._path):
            in_place = self._is_in_place(self._file)
        if not in_place:
            lost, self._file = self._file, self._take()
            _close(lost)

    def release(self) -> None:
        """Let go, and remove the file. Idempotent; never fails: the lock is gone in any case."""
        if self._file.closed:
            return
        # While it is still locked: whoever locks it next finds it removed, and makes a new one.
        with contextlib.suppress(OSError):
            if self._is_in_place(self._file):
                os.unlink(self._name, dir_fd=self._place.directory)
        _close(self._file)

    def _take(self) -> io.FileIO:
        with told_as_record_error(self._path):
            while True:
                file = self._open(self._place.directory)
                try:
                    self._refuse_irregular(file)
                    self._lock(file)
                    if self._is_in_place(file):
                        _sign(file)
                        return file
                except BaseException:
                    _close(file)
                    raise
                _close(file)  # its last keeper removed it between our opening and our locking it

    def _open(self, directory: int) -> io.FileIO:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            file = os.open(self._name, flags, 0o600, dir_fd=directory)
        except OSError as error:
            raise self._cannot(error.strerror) from error
        # A file object, since it says so (ResourceWarning) and closes if it is dropped without release().
        return io.FileIO(file, "r+")

    def _refuse_irregular(self, file: io.FileIO) -> None:
        # It is going to be written to: a file that has another name too is somebody else's.
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise self._cannot("no regular file of its own")

    def _lock(self, file: io.FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordLockedError(self._path, *_keeper(file)) from error
        except OSError as error:
            raise self._cannot(f"{error.strerror}; it takes a file system with locks") from error

    def _is_in_place(self, file: io.FileIO) -> bool:
        try:
            there = os.stat(self._name, dir_fd=self._place.directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(file.fileno()))

    def _cannot(self, why: str | None) -> RecordError:
        return RecordError(self._path, f"cannot be locked with {self._name}: {why}")


def _sign(file: io.FileIO) -> None:
    # For the message that others get, and for nothing else: on a full disk it stays away.
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), b"%d\n" % os.getpid(), 0)


def _keeper(file: io.FileIO) -> tuple[int | None, str]:
    """Return the process that signed *file*, and words for it."""
    text = b""
    with contextlib.suppress(OSError):
        text = os.pread(file.fileno(), 20, 0).strip()
    if not text.isdigit():
        return None, "another process"
    pid = int(text)
    words = f"this process, {pid}" if pid == os.getpid() else f"process {pid}"
    with contextlib.suppress(OSError):  # on another host, or hidden from us
        words += f" ({Path(f'/proc/{pid}/comm').read_text(errors='replace').strip()})"
    return pid, words


def _close(file: io.FileIO) -> None:
    with contextlib.suppress(OSError):
        file.close()
