"""Files that are replaced whole or not at all. What is here blocks; ``save`` and ``load`` take it to a thread."""

import asyncio
import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import stat
import weakref
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiofiles.os

from qmpvcpu.errors import Outcome, RecordCorruptError, RecordError, RecordLockedError

_T = TypeVar("_T")

# 4096 vCPUs, the most that QEMU 11.1 takes, are a document of 300 KB.
_MOST_BYTES = 4 * 1024 * 1024
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_SYMLINK = "a symlink, which is never followed"
_IRREGULAR = "no regular file"


async def save(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the record at *path* by *data*, durably: all of it, or nothing.

    When it returns, the new record outlives a crash of the machine. The file has mode 0600 and a new inode. No lock
    is needed or taken: that is ``Record``'s part. Idempotent. Cancelling waits for the disk once (a thread cannot be
    stopped, and must not replace a later save's record), then raises CancelledError, whether or not the record was
    replaced; a second cancel does not wait.

    Raises:
        RecordError: *path* is a symlink or no regular file, its directory is missing or read-only, the disk is full,
            ...: the record there is as it was, and nothing is left beside it. ``outcome`` is UNKNOWN only where the
            record was replaced and then the directory could not be synchronised.
    """
    await see_through(_replace_in_thread(Path(path), data))


async def load(path: str | os.PathLike[str]) -> bytes | None:
    """Return what the record at *path* holds, or None if there is none.

    Raises:
        RecordCorruptError: It is larger than 4 MiB.
        RecordError: It is a symlink, no regular file, or cannot be read.
    """
    return await _read_in_thread(Path(path))


async def see_through(work: Awaitable[_T]) -> _T:
    """Wait for what cannot be stopped. A cancel is raised when it has ended; a second one, at once."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)  # JUSTIFICATION: a thread goes on whatever is done to this task
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


class Place:
    """The place of one file: its directory, opened once, and its name there.

    All that is done is done in that directory, wherever its path leads meanwhile. To be closed. What is here blocks.

    Attributes:
        path: Where the file is.
        directory: A descriptor of the directory.
        close: Closes it; idempotent.

    Raises:
        RecordError: There is no such directory, or it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with told_as_record_error(path):
            self.directory = os.open(path.parent, _DIRECTORY)
        self.close = weakref.finalize(self, close, self.directory)

    def check(self) -> None:
        """Check that the path still leads here; if this directory was removed, take the new one in its place.

        Raises:
            RecordError: It leads to another directory, and this one is still somewhere; or there is none.
        """
        with told_as_record_error(self.path):
            now, here = self.path.parent.stat(), os.fstat(self.directory)
            if os.path.samestat(now, here):
                return
            if here.st_nlink or now.st_uid != here.st_uid:
                why = (
                    f"{self.path.parent} is another directory than when it was opened, and is left alone: open again"
                )
                raise RecordError(self.path, why)
            directory = os.open(self.path.parent, _DIRECTORY)
            try:
                os.dup2(directory, self.directory, inheritable=False)
            finally:
                close(directory)

    def status(self) -> os.stat_result | None:
        """Return what the file is, or None if there is none.

        Raises:
            RecordError: It is a symlink or no regular file.
        """
        with told_as_record_error(self.path):
            try:
                status = os.stat(self.path.name, dir_fd=self.directory, follow_symlinks=False)
            except FileNotFoundError:
                return None
        # rename() would replace a symlink, not follow it; but somebody put it there, and means the file behind it.
        if stat.S_ISLNK(status.st_mode):
            raise RecordError(self.path, _SYMLINK)
        if not stat.S_ISREG(status.st_mode):
            raise RecordError(self.path, _IRREGULAR)
        return status

    def open(self) -> int | None:
        """Open the file to read it, or return None if there is none; the caller closes it.

        Raises:
            RecordError: It is a symlink, no regular file, or cannot be opened.
        """
        return _open(self.path, self.path.name, self.directory)

    def read(self, file: int) -> bytes:
        """Return all that *file*, opened here, holds.

        Raises:
            RecordCorruptError: It is larger than 4 MiB.
            RecordError: It cannot be read.
        """
        return _read_all(self.path, file)

    def replace(
        self, data: bytes, *, keeps_owner: bool = False, check: Callable[[], None] = lambda: None
    ) -> "Replacement":
        """Replace the file, durably, if *check* raises nothing once all but that is done.

        Args:
            data: What it is to hold.
            keeps_owner: Give the new file the mode and the owner of the old one.
            check: Called right before the new file takes the place of the old one.

        Raises:
            RecordError: As ``save``.
        """
        temporary = f".{self.path.name}.{secrets.token_hex(4)}.tmp"
        before = self.status()
        with told_as_record_error(self.path):
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
                close(file)
                raise
            try:
                os.fsync(self.directory)
            except OSError as error:
                return Replacement(file, error)
        return Replacement(file)

    def sweep(self) -> None:
        """Remove what killed writers left beside the file.

        Raises:
            RecordError: The directory cannot be read.
        """
        ours = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{8}}\.tmp")
        with told_as_record_error(self.path):
            for name in filter(ours.fullmatch, os.listdir(self.directory)):  # noqa: PTH208 -- a Path cannot list it
                # Held by a living writer, or gone meanwhile: no matter.
                with contextlib.suppress(OSError), _opened(name, self.directory) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=self.directory)


@dataclass(frozen=True, slots=True)
class Replacement:
    """A file that has taken the place of another.

    Attributes:
        file: A descriptor of it, locked where the file system has locks; the caller closes it.
        error: Why it may not outlive a crash of the host, or None if it does.
    """

    file: int
    error: OSError | None = None

    def check(self, path: Path) -> None:
        """Say so if it may not outlive a crash of the host.

        Raises:
            RecordError: It may not; ``outcome`` is UNKNOWN.
        """
        if self.error is not None:
            why = f"replaced, but it may not outlive a crash of the host: {self.error.strerror}"
            raise RecordError(path, why, outcome=Outcome.UNKNOWN) from self.error


def read_file(path: Path) -> bytes | None:
    """Do what ``load`` does, and block."""
    file = _open(path, path)
    if file is None:
        return None
    try:
        return _read_all(path, file)
    finally:
        close(file)


def _replace(path: Path, data: bytes) -> None:
    with contextlib.closing(Place(path)) as place:
        replaced = place.replace(data)
    close(replaced.file)
    replaced.check(path)


_replace_in_thread = aiofiles.os.wrap(_replace)
_read_in_thread = aiofiles.os.wrap(read_file)


@contextlib.contextmanager
def told_as_record_error(path: Path) -> Iterator[None]:
    """Tell what the system says as what it means for the record at *path*."""
    try:
        yield
    except OSError as error:
        why = _SYMLINK if error.errno == errno.ELOOP else str(error.strerror)
        if error.errno == errno.ENOENT and not path.parent.exists():
            why += f": there is no directory {path.parent}"
        raise RecordError(path, why) from error


def close(file: int) -> None:
    """Close a file whose fate is decided already: what it says now is no news, and Linux closes it all the same."""
    with contextlib.suppress(OSError):
        os.close(file)


def _open(path: Path, name: str | Path, directory: int | None = None) -> int | None:
    with told_as_record_error(path):
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return None
        try:
            is_regular = stat.S_ISREG(os.fstat(file).st_mode)
        except BaseException:
            close(file)
            raise
    if not is_regular:
        close(file)
        raise RecordError(path, _IRREGULAR)
    return file


def _read_all(path: Path, file: int) -> bytes:
    pieces = []
    size = 0
    with told_as_record_error(path):
        while size <= _MOST_BYTES and (piece := os.pread(file, _MOST_BYTES + 1 - size, size)):
            pieces.append(piece)
            size += len(piece)
    if size > _MOST_BYTES:
        raise RecordCorruptError(path, f"larger than {_MOST_BYTES} bytes; it is left alone")
    return b"".join(pieces)


@contextlib.contextmanager
def _opened(name: str, directory: int) -> Iterator[int]:
    file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        yield file
    finally:
        close(file)


def _create(name: str, directory: int) -> int:
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    # A sweeper that locks it first removes it: the rename then fails, and nothing is torn. Where the file system has
    # no locks, a sweeper gets none either, and removes nothing.
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


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


class KeptFile:
    """The file at *path*, locked against other keepers until ``release``; what killed writers left is removed.

    Two locks keep others out: that of ``.NAME.lock``, which is there before the file is, and one on the file itself,
    which holds also if somebody removes the other. A file system that has none for it does without the second.

    Attributes:
        path: Where it is.
        data: What it held when it was last read at the making of this, or replaced here; None: there was no file.

    Raises:
        RecordLockedError: Somebody else keeps it.
        RecordError: It cannot be locked or read, is a symlink or no regular file, or is larger than 4 MiB.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = Place(path)
        self._file: io.FileIO | None = None
        try:
            self._lock = Lock(self._place)
        except BaseException:
            self._place.close()
            raise
        try:
            self._place.check()
            self._place.sweep()
            self.data = self.look()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of it. Idempotent; never fails."""
        self._hold(None)
        self._lock.release()
        self._place.close()

    def renew(self) -> None:
        """Check that it is still kept here, and that its path still leads to it.

        Raises:
            RecordLockedError: Somebody else keeps it meanwhile.
            RecordError: The path leads to another directory, or the lock cannot be taken again.
        """
        self._lock.renew()

    def look(self) -> bytes | None:
        """Return what the file holds now, or None if there is none.

        Its content is what tells an edit: a time stamp may be that of the save before.

        Raises:
            RecordLockedError: It was replaced by somebody who keeps it too.
            RecordError: It cannot be read, is a symlink or no regular file, or is larger than 4 MiB.
        """
        status = self._place.status()
        if status is None:
            return None
        with told_as_record_error(self.path):
            is_held = self._file is not None and os.path.samestat(status, os.fstat(self._file.fileno()))
        if not is_held:
            file = self._place.open()
            if file is None:
                return None
            try:
                self._lock_itself(file)
            except BaseException:
                close(file)
                raise
            self._hold(file)
        assert self._file is not None  # noqa: S101 -- JUSTIFICATION: held above, mypy cannot know
        return self._place.read(self._file.fileno())

    def replace(self, data: bytes, *, before: bytes | None, keeps_owner: bool = False) -> bool:
        """Replace what it holds, durably, if that is still *before*; return whether it was.

        Raises:
            RecordError: As ``save``.
        """
        try:
            replaced = self._place.replace(data, keeps_owner=keeps_owner, check=lambda: self._compare(before))
        except _ChangedError:
            return False
        self._hold(replaced.file)
        self.data = data
        replaced.check(self.path)
        return True

    def _compare(self, before: bytes | None) -> None:
        # The last look at both, with nothing but the rename to come: making and syncing the new file took a while.
        self.renew()
        if self.look() != before:
            raise _ChangedError

    def _lock_itself(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecordLockedError(self.path, None, "another keeper, whose lock's file is gone") from error
        except OSError:
            pass  # no locks for a file that is open for reading (NFS): the other lock is there

    def _hold(self, file: int | None) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        # A file object, since it says so (ResourceWarning) and closes if it is dropped without release().
        self._file = None if file is None else io.FileIO(file, "r")


class _ChangedError(Exception):
    """The file is not what it was."""
