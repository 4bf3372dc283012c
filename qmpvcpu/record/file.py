"""Files that are replaced whole or not at all, and the lock that gives each one writer.

Everything here blocks, except ``save``, ``lock_file`` and ``finish_despite_cancel``, which use a thread.

Whatever cannot be done raises RecordError, and leaves the file as it was: it is a symlink or not a regular file, its
directory is missing or another one by now, the disk is full, ... It is RecordLockedError if another writer has the
lock, and RecordCorruptError if the file is larger than 4 MiB.
"""

import asyncio
import contextlib
import errno
import fcntl
import io
import os
import re
import stat
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import aiofiles.os

from qmpvcpu.errors import Outcome, RecordCorruptError, RecordError, RecordLockedError
from qmpvcpu.host.processes import read_stat

_T = TypeVar("_T")

# 4096 vCPUs, the most that QEMU 11.1 takes, make a document of 300 KB.
_MOST_BYTES: Final = 4 * 1024 * 1024
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SYMLINK: Final = "a symlink, which is never followed"
_IRREGULAR: Final = "not a regular file"


# What the event loop may call.


async def save(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the record at *path* by *data*, durably: all of it or nothing.

    When it returns, the new record survives a crash of the machine. The file has mode 0600 and a new inode. It takes
    no lock: ``Record`` does that. Idempotent. Cancelling waits for the disk once (a thread cannot be stopped,
    and must not replace a later save's record), then raises CancelledError, whether or not the record was replaced; a
    second cancel does not wait.

    Raises:
        RecordError: The record is unchanged, and nothing is left next to it. ``outcome`` is UNKNOWN only where it was
            replaced and then the directory could not be synchronised.
    """
    await finish_despite_cancel(_replace_in_thread(Path(path), data))


async def lock_file(path: Path, use: Callable[[bytes | None], _T]) -> "tuple[LockedFile, _T]":
    """Lock the file at *path*, and return it with what *use* makes of its content, in a thread.

    If *use* raises, or the call is cancelled, no lock is left.
    """
    work = asyncio.ensure_future(_lock_in_thread(path, use))
    try:
        return await asyncio.shield(work)  # JUSTIFICATION: the thread goes on, and takes the lock
    except asyncio.CancelledError:
        work.add_done_callback(_release_result)
        await asyncio.wait({work})
        raise


async def finish_despite_cancel(work: Awaitable[_T]) -> _T:
    """Wait for *work*, which cannot be stopped. A cancel is raised when it has ended; a second one, at once."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)  # JUSTIFICATION: a thread goes on when this task is cancelled
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


# A file in its directory.


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return *path* from the root on, so that it means the same file when the working directory changes."""
    try:
        return Path(path).absolute()
    except FileNotFoundError as error:
        why = "it is relative to the working directory, which was removed: name the whole path"
        raise RecordError(path, why) from error


class Place:
    """A file's place: its directory, opened once, and its name there. To be closed.

    Everything is done in that directory, even if the path leads elsewhere meanwhile.

    Attributes:
        path: Where the file is.
        directory: A descriptor of the directory.
        close: Closes it; idempotent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _as_record_error(path):
            self.directory = os.open(path.parent, _DIRECTORY)
        self.close = weakref.finalize(self, _close, self.directory)

    def check(self) -> None:
        """Check that the path still leads here; if this directory was removed, use the new one there."""
        with _as_record_error(self.path):
            now, here = self.path.parent.stat(), os.fstat(self.directory)
            if os.path.samestat(now, here):
                return
            if here.st_nlink or now.st_uid != here.st_uid:
                why = (
                    f"{self.path.parent} is another directory than when it was opened: it is left alone; "
                    "move the old one back, or restart what keeps this record"
                )
                raise RecordError(self.path, why)
            directory = os.open(self.path.parent, _DIRECTORY)
            try:
                os.dup2(directory, self.directory, inheritable=False)
            finally:
                _close(directory)

    def status(self) -> os.stat_result | None:
        """Return the file's status, or None if there is none."""
        with _as_record_error(self.path):
            try:
                status = os.stat(self.path.name, dir_fd=self.directory, follow_symlinks=False)
            except FileNotFoundError:
                return None
        # rename() would replace a symlink, which was put there to lead to the file behind it.
        if stat.S_ISLNK(status.st_mode):
            raise RecordError(self.path, _SYMLINK)
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(self.path, _IRREGULAR)
        return status

    def replace(
        self,
        data: bytes,
        replaced: Callable[[int], None],
        *,
        keeps_owner: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Replace the file, durably, unless *check* raises just before.

        Args:
            data: The new content.
            replaced: Takes a descriptor of the new file, locked if the file system has locks, once it is in place.
            keeps_owner: Give the new file the mode and the owner of the old one.
            check: Called right before the new file takes the place of the old one.
        """
        temporary = f".{self.path.name}.{os.urandom(4).hex()}.tmp"
        before = self.status()
        with _as_record_error(self.path):
            file = _create(temporary, self.directory)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(file, view) :]
                if keeps_owner and before is not None:
                    os.fchown(file, before.st_uid, before.st_gid)
                    os.fchmod(file, stat.S_IMODE(before.st_mode))
                os.fsync(file)
                check()
                os.rename(temporary, self.path.name, src_dir_fd=self.directory, dst_dir_fd=self.directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self.directory)
                _close(file)
                raise
        replaced(file)
        try:
            os.fsync(self.directory)
        except OSError as error:
            why = f"replaced, but it may not survive a crash of the host: {error.strerror}"
            raise RecordError(self.path, why, outcome=Outcome.UNKNOWN) from error

    def sweep(self) -> None:
        """Remove what killed writers left next to the file."""
        ours = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{8}}\.tmp")
        with _as_record_error(self.path):
            for name in filter(ours.fullmatch, os.listdir(self.directory)):  # noqa: PTH208 -- a Path cannot list it
                # A living writer holds it, or it is gone by now: either is fine.
                with contextlib.suppress(OSError):
                    file = os.open(name, _READ, dir_fd=self.directory)
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(name, dir_fd=self.directory)
                    finally:
                        _close(file)


# Its lock.


class _Lock:
    """The lock on the file at *place*, held until ``release``.

    It is on a file of its own: each save replaces the file itself, and at first there is none. The lock belongs to an
    open file, so that it also excludes a second writer in this process; a forked child that does not exec keeps it.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._path = place.path
        self._name = f".{place.path.name}.lock"
        self._file = self._take()

    def renew(self) -> None:
        """Take the lock again if somebody has removed its file, which would let others in."""
        self._place.check()
        with _as_record_error(self._path):
            is_there = self._is_there(self._file)
        if not is_there:
            lost, self._file = self._file, self._take()
            _close(lost)

    def release(self) -> None:
        """Release it and remove its file. Idempotent; never fails: the lock is gone in any case."""
        if self._file.closed:
            return
        # Removed while it is still locked: the next to lock it finds it removed, and makes a new one.
        with contextlib.suppress(OSError):
            if self._is_there(self._file):
                os.unlink(self._name, dir_fd=self._place.directory)
        _close(self._file)

    def _take(self) -> io.FileIO:
        with _as_record_error(self._path):
            while True:
                file = self._open()
                try:
                    self._refuse_irregular(file)
                    self._lock(file)
                    if self._is_there(file):
                        _sign(file)
                        return file
                except BaseException:
                    _close(file)
                    raise
                _close(file)  # its last holder removed it after we opened and before we locked it

    def _open(self) -> io.FileIO:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return _file_object(os.open(self._name, flags, 0o600, dir_fd=self._place.directory), "r+")
        except OSError as error:
            raise self._cannot(error.strerror) from error

    def _refuse_irregular(self, file: io.FileIO) -> None:
        # It is going to be written to: a file that has another name too is somebody else's.
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise self._cannot("not a regular file of its own")

    def _lock(self, file: io.FileIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordLockedError(self._path, *_holder(file)) from error
        except OSError as error:
            raise self._cannot(f"{error.strerror}; it takes a file system with locks") from error

    def _is_there(self, file: io.FileIO) -> bool:
        try:
            there = os.stat(self._name, dir_fd=self._place.directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(file.fileno()))

    def _cannot(self, why: str | None) -> RecordError:
        return RecordError(self._path, f"cannot be locked with {self._name}: {why}")


def _sign(file: io.FileIO) -> None:
    # Only for the message that others get; a full disk leaves it out.
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), b"%d\n" % os.getpid(), 0)


def _holder(file: io.FileIO) -> tuple[int | None, str]:
    """Return the process that signed *file*, and its description."""
    text = b""
    with contextlib.suppress(OSError):
        text = os.pread(file.fileno(), 20, 0).strip()
    if not text.isdigit():
        return None, "another process"
    pid = int(text)
    words = f"this process, {pid}" if pid == os.getpid() else f"process {pid}"
    if (holder := read_stat(pid)) is not None:  # it may be on another host, or hidden from us
        words += f" ({holder.name})"
    return pid, words


class LockedFile:
    """The file at *path*, locked until ``release``; what killed writers left next to it is removed.

    Two locks keep other writers out: that of ``.NAME.lock``, which works before the file exists, and one on the file
    itself, which holds even if somebody removes the other. File systems without locks for it do without the second.
    Programs that do not use these locks can edit the file all the same.

    Attributes:
        path: Where it is.
        data: What it held when it was locked, or last replaced here; None: there was no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = Place(path)
        self._file: io.FileIO | None = None
        try:
            self._lock = _Lock(self._place)
        except BaseException:
            self._place.close()
            raise
        try:
            self._place.check()
            self._place.sweep()
            self.data = self.read()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release it. Idempotent; never fails."""
        self._hold(None)
        self._lock.release()
        self._place.close()

    def renew(self) -> None:
        """Check that it is still locked, and that its path still leads to it."""
        self._lock.renew()

    def read(self) -> bytes | None:
        """Return what the file holds now, or None if there is none.

        Compare the content to detect an edit: a time stamp may be that of the save before.
        """
        status = self._place.status()
        if status is None:
            return None
        with _as_record_error(self.path):
            is_held = self._file is not None and os.path.samestat(status, os.fstat(self._file.fileno()))
        if not is_held:
            file = _open(self.path, self.path.name, self._place.directory)
            if file is None:
                return None
            try:
                self._lock_itself(file)
            except BaseException:
                _close(file)
                raise
            self._hold(file)
        assert self._file is not None  # noqa: S101 -- JUSTIFICATION: held above, mypy cannot know
        return _read_all(self.path, self._file.fileno())

    def replace(self, data: bytes, *, before: bytes | None, keeps_owner: bool = False) -> bool:
        """Replace what it holds, durably, if that is still *before*; return False if it is not."""

        def replaced(file: int) -> None:
            self._hold(file)
            self.data = data

        try:
            self._place.replace(data, replaced, keeps_owner=keeps_owner, check=lambda: self._compare(before))
        except _ChangedError:
            return False
        return True

    def _compare(self, before: bytes | None) -> None:
        # The last check, with only the rename to come: writing and syncing the new file took a while.
        self.renew()
        if self.read() != before:
            raise _ChangedError

    def _lock_itself(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordLockedError(self.path, None, "another process, whose lock file is gone") from error
        except OSError:
            pass  # no locks for a file that is open for reading (NFS): the other lock is enough

    def _hold(self, file: int | None) -> None:
        if self._file is not None:
            _close(self._file)
        self._file = None if file is None else _file_object(file, "r")


class _ChangedError(Exception):
    """The file is not what it was."""


# System calls.


def read_file(path: Path) -> bytes | None:
    """Return what the record at *path* holds, or None if there is none."""
    file = _open(path, path)
    if file is None:
        return None
    try:
        return _read_all(path, file)
    finally:
        _close(file)


def _replace(path: Path, data: bytes) -> None:
    with contextlib.closing(Place(path)) as place:
        place.replace(data, _close)


def _lock_and_use(path: Path, use: Callable[[bytes | None], _T]) -> tuple[LockedFile, _T]:
    file = LockedFile(path)
    try:
        return file, use(file.data)
    except BaseException:
        file.release()
        raise


def _release_result(work: "asyncio.Future[tuple[LockedFile, object]]") -> None:
    if not work.cancelled() and work.exception() is None:
        work.result()[0].release()


_replace_in_thread = aiofiles.os.wrap(_replace)
_lock_in_thread = aiofiles.os.wrap(_lock_and_use)


@contextlib.contextmanager
def _as_record_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = _SYMLINK if error.errno == errno.ELOOP else str(error.strerror)
        if error.errno == errno.ENOENT and not path.parent.exists():
            why += f": there is no directory {path.parent}"
        raise RecordError(path, why) from error


def _close(file: int | io.FileIO) -> None:
    # Its fate is decided already, and Linux closes it even if it reports an error.
    with contextlib.suppress(OSError):
        if isinstance(file, int):
            os.close(file)
        else:
            file.close()


def _file_object(file: int, mode: str) -> io.FileIO:
    """Return an object that warns (ResourceWarning) and closes if it is dropped without being closed."""
    return io.FileIO(file, mode)


def _open(path: Path, name: str | Path, directory: int | None = None) -> int | None:
    with _as_record_error(path):
        try:
            file = os.open(name, _READ, dir_fd=directory)
        except FileNotFoundError:
            return None
        try:
            is_regular = stat.S_ISREG(os.fstat(file).st_mode)
        except BaseException:
            _close(file)
            raise
    if not is_regular:
        _close(file)
        raise RecordError(path, _IRREGULAR)
    return file


def _read_all(path: Path, file: int) -> bytes:
    pieces = []
    size = 0
    with _as_record_error(path):
        while size <= _MOST_BYTES and (piece := os.pread(file, _MOST_BYTES + 1 - size, size)):
            pieces.append(piece)
            size += len(piece)
    if size > _MOST_BYTES:
        raise RecordCorruptError(path, f"larger than {_MOST_BYTES} bytes; it is left alone")
    return b"".join(pieces)


def _create(name: str, directory: int) -> int:
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    # If a sweeper locks it first, it removes it: the rename then fails, and nothing is torn. On a file system without
    # locks, sweepers get none either, and remove nothing.
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    return file
