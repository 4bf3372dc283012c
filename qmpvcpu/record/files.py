"""Files that are replaced whole or not at all. What is here blocks; ``save`` and ``load`` take it to a thread."""

import asyncio
import contextlib
import errno
import fcntl
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

from qmpvcpu.errors import Outcome, RecordCorruptError, RecordError

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
