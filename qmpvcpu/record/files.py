"""Files that are replaced whole or not at all. What is here blocks; ``save`` and ``load`` take it to a thread."""

import asyncio
import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import TypeVar

import aiofiles.os

from qmpvcpu.errors import Outcome, RecordCorruptError, RecordError

__all__ = [
    "close",
    "directory_of",
    "load",
    "opened",
    "read_file",
    "replace_file",
    "save",
    "see_through",
    "sweep",
    "told_as_record_error",
]

_T = TypeVar("_T")

# 4096 vCPUs, the most that QEMU 11.1 takes, are a document of 300 KB.
_MOST_BYTES = 4 * 1024 * 1024


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


def replace_file(path: Path, data: bytes, *, keeps_owner: bool = False) -> None:
    """Do what ``save`` does, and block; with *keeps_owner* the new file has the mode and the owner of the old one."""
    with told_as_record_error(path), directory_of(path) as directory:
        before = _refuse_irregular(path, directory)
        temporary = f".{path.name}.{secrets.token_hex(4)}.tmp"
        with _new_file(temporary, directory) as file:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(file, view) :]
                if keeps_owner and before is not None:
                    os.fchown(file, before.st_uid, before.st_gid)
                    os.fchmod(file, stat.S_IMODE(before.st_mode))
                os.fsync(file)
                os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
                raise
        try:
            os.fsync(directory)
        except OSError as error:
            why = f"replaced, but it may not outlive a crash of the host: {error.strerror}"
            raise RecordError(path, why, outcome=Outcome.UNKNOWN) from error


def read_file(path: Path) -> bytes | None:
    """Do what ``load`` does, and block."""
    with told_as_record_error(path):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(file, "rb") as stream:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise RecordError(path, "no regular file")
            data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise RecordCorruptError(path, f"larger than {_MOST_BYTES} bytes; it is left alone")
    return data


def sweep(path: Path) -> None:
    """Remove what killed writers left beside *path*.

    Raises:
        RecordError: The directory cannot be read.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    with told_as_record_error(path), directory_of(path) as directory:
        for name in filter(ours.fullmatch, os.listdir(directory)):  # noqa: PTH208 -- a Path cannot list a descriptor
            # Held by a living writer, or gone meanwhile: no matter.
            with contextlib.suppress(OSError), opened(name, os.O_RDONLY | os.O_NONBLOCK, directory) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=directory)


_replace_in_thread = aiofiles.os.wrap(replace_file)
_read_in_thread = aiofiles.os.wrap(read_file)


@contextlib.contextmanager
def told_as_record_error(path: Path) -> Iterator[None]:
    """Tell what the system says as what it means for the record at *path*."""
    try:
        yield
    except OSError as error:
        why = "a symlink, which is never followed" if error.errno == errno.ELOOP else str(error.strerror)
        if error.errno == errno.ENOENT and not path.parent.exists():
            why += f": there is no directory {path.parent}"
        raise RecordError(path, why) from error


@contextlib.contextmanager
def directory_of(path: Path) -> Iterator[int]:
    """Open the directory that *path* is in."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        close(directory)


@contextlib.contextmanager
def opened(name: str, flags: int, directory: int) -> Iterator[int]:
    """Open a file in *directory*, by its own name and no other."""
    file = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        yield file
    finally:
        close(file)


def close(file: int) -> None:
    """Close a file whose fate is decided already: what it says now is no news, and Linux closes it all the same."""
    with contextlib.suppress(OSError):
        os.close(file)


@contextlib.contextmanager
def _new_file(name: str, directory: int) -> Iterator[int]:
    with opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory) as file:
        # A sweeper that locks it first removes it: the rename then fails, and nothing is torn. Where the file system
        # has no locks, a sweeper gets none either, and removes nothing.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _refuse_irregular(path: Path, directory: int) -> os.stat_result | None:
    # rename() would replace a symlink, not follow it; but somebody put it there, and means the file behind it.
    try:
        status = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(status.st_mode):
        raise RecordError(path, "a symlink, which is never followed")
    if not stat.S_ISREG(status.st_mode):
        raise RecordError(path, "no regular file")
    return status
