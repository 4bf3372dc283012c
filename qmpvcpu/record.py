"""Floor 4: durable state on disk, and the only door to aiofiles.

A record is one file. It is replaced whole or not at all: what is read is always what one save wrote. A save is one
hop to a thread (a hop per system call takes over twice as long), and no symlink is followed on the way.

Beside the record ``NAME``, ``.NAME.<8 hex digits>.tmp`` is a save under way; its writer holds a lock (``flock``) on
it, which the kernel drops if the writer dies. ``Record.open`` removes those that nobody holds.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import aiofiles.os

from qmpvcpu.domainxml import Identity, Instance, Metadata, read_identity, render
from qmpvcpu.errors import DomainXmlError, Outcome, RecordError
from qmpvcpu.model import Layout

__all__ = ["Record", "instance_of", "load", "save"]

# 4096 vCPUs, the most that QEMU 11.1 takes, are a document of 300 KB.
_MOST_BYTES = 4 * 1024 * 1024


async def save(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the record at *path* by *data*, durably: all of it, or nothing.

    When it returns, the new record outlives a crash of the machine. The file has mode 0600 and a new inode.
    Idempotent. Cancelling waits for the disk once (a thread cannot be stopped, and must not replace a later save's
    record), then raises CancelledError, whether or not the record was replaced; a second cancel does not wait.

    Raises:
        RecordError: *path* is a symlink or no regular file, its directory is missing or read-only, the disk is full,
            ...: the record there is as it was, and nothing is left beside it. ``outcome`` is UNKNOWN only where the
            record was replaced and then the directory could not be synchronised.
    """
    work = asyncio.ensure_future(_save_in_thread(Path(path), data))
    try:
        await asyncio.shield(work)  # JUSTIFICATION: the thread goes on whatever is done to this task
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise


async def load(path: str | os.PathLike[str]) -> bytes | None:
    """Return what the record at *path* holds, or None if there is none.

    Raises:
        RecordError: It is a symlink, no regular file, larger than 4 MiB, or cannot be read.
    """
    return await _load_in_thread(Path(path))


def instance_of(host_tid: int | None, pid: int | None) -> Instance | None:
    """Return which run of QEMU this is, or None where vCPU 0's thread is not known.

    Args:
        host_tid: Thread id of vCPU 0 on QEMU's host.
        pid: QEMU's process id, or None where it runs on another host.

    Source:
        proc(5), ``/proc/pid/task/tid/stat``, field 22.
    """
    if host_tid is None:
        return None
    ticks = None
    if pid is not None:
        with contextlib.suppress(OSError):  # it may have ended, or be hidden from us: then only its number is known
            fields = Path(f"/proc/{pid}/task/{host_tid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[19])
    return Instance(host_tid, ticks)


class Record:
    """The record of one VM; made by ``Record.open``.

    Attributes:
        path: Where it is.
        previous: What was on disk when it was opened, or None if there was nothing.
        uuid: The uuid made up for a VM whose QEMU has none (kept from the first save on), or None.
    """

    def __init__(
        self,
        path: Path,
        *,
        previous: Identity | None = None,
        uuid: str | None = None,
        emulator: str | None = None,
        instance: Instance | None = None,
    ) -> None:
        self.path = path
        self.previous = previous
        self.uuid = uuid
        self._emulator = emulator
        self._instance = instance
        self._generation = previous.metadata.generation if previous and previous.metadata else 0
        self._next: tuple[Layout, asyncio.Future[None]] | None = None
        self._writer: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str,
        uuid: str | None,
        emulator: str | None = None,
        instance: Instance | None = None,
    ) -> "Record":
        """Return the record of a VM at *path*, existing or to be.

        Nothing is written yet; what killed writers left beside the record is removed.

        Args:
            path: The file; its directory must exist.
            name: The VM's name, which must be that of the record.
            uuid: The uuid as QEMU tells it, which must be that of the record; None where QEMU has none: the record's
                must then be one that was made up for it.
            emulator: Absolute path of the QEMU that libvirt shall start from the record, or None.
            instance: The QEMU that runs, or None where not known.

        Raises:
            RecordError: What is there is not a record of ours, is damaged, is that of another VM, or holds more than
                a record of ours (a libvirt document of the user's own): it is left alone.
        """
        file = Path(path)
        await _sweep_in_thread(file)
        data = await load(file)
        previous = None if data is None else _admit(file, data, name, uuid)
        kept = previous.uuid if previous else None
        made_up = None if uuid is not None else kept or str(uuid4())
        return cls(file, previous=previous, uuid=made_up, emulator=emulator, instance=instance)

    async def write(self, layout: Layout) -> None:
        """Save *layout*; returns when it, or a later one, is on disk.

        Calls made while a save is under way are served by one save, of the layout given last. Cancelling a call
        does not recall its layout.

        Raises:
            RecordError: As ``save``; or libvirt has no domain for this layout (as ``domainxml.render``), and
                nothing is written.
        """
        done = self._next[1] if self._next else asyncio.get_running_loop().create_future()
        self._next = layout, done
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_pending(), name=f"record {self.path.name}")
        await asyncio.shield(done)  # JUSTIFICATION: one caller's cancel must not cancel the others' save

    async def wait_written(self) -> None:
        """Wait until nothing is left to be written: after a cancelled ``write``, before the program ends."""
        if self._writer is not None:
            await asyncio.wait({self._writer})

    async def _write_pending(self) -> None:
        while self._next is not None:
            layout, done = self._next
            self._next = None
            try:
                await self._write_one(layout)
            except RecordError as error:
                done.set_exception(error)
            except BaseException:
                done.cancel()
                raise
            else:
                done.set_result(None)

    async def _write_one(self, layout: Layout) -> None:
        metadata = Metadata.of(layout, generation=self._generation + 1, uuid=self.uuid, instance=self._instance)
        try:
            data = render(layout, emulator=self._emulator, metadata=metadata)
        except DomainXmlError as error:
            raise RecordError(self.path, str(error)) from error
        # Counted even if the save fails: a generation that may have reached the disk is never given out twice.
        self._generation += 1
        await save(self.path, data)


def _admit(path: Path, data: bytes, name: str, uuid: str | None) -> Identity:
    try:
        found = read_identity(data)
    except DomainXmlError as error:
        raise RecordError(path, f"cannot be trusted and is left alone: {error}") from error
    if found.metadata is None:
        raise RecordError(path, f"a libvirt document of {found.name!r} that is not ours; it is left alone")
    if found.foreign:
        more = ", ".join(f"<{name}>" for name in found.foreign)
        raise RecordError(path, f"holds what a record of ours does not ({more}); it is left alone")
    if found.name != name:
        raise RecordError(path, f"the record of VM {found.name!r}, not of {name!r}; it is left alone")
    # A VM without uuid has the one that we made up for it, and no other.
    expected = uuid or found.metadata.uuid
    if found.uuid is None or found.uuid != expected:
        raise RecordError(path, f"the record of a VM with uuid {found.uuid}, not {uuid}; it is left alone")
    return found


def _save(path: Path, data: bytes) -> None:
    with _told_as_record_error(path), _directory_of(path) as directory:
        _refuse_irregular(path, directory)
        temporary = f".{path.name}.{secrets.token_hex(4)}.tmp"
        with _new_file(temporary, directory) as file:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(file, view) :]
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


def _load(path: Path) -> bytes | None:
    with _told_as_record_error(path):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with os.fdopen(file, "rb") as stream:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise RecordError(path, "no regular file")
            data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise RecordError(path, f"larger than {_MOST_BYTES} bytes")
    return data


def _sweep(path: Path) -> None:
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    with _told_as_record_error(path), _directory_of(path) as directory:
        for name in filter(ours.fullmatch, os.listdir(directory)):  # noqa: PTH208 -- a Path cannot list a descriptor
            # Held by a living writer, or gone meanwhile: no matter.
            with contextlib.suppress(OSError), _opened(name, os.O_RDONLY | os.O_NONBLOCK, directory) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=directory)


_save_in_thread = aiofiles.os.wrap(_save)
_load_in_thread = aiofiles.os.wrap(_load)
_sweep_in_thread = aiofiles.os.wrap(_sweep)


@contextlib.contextmanager
def _told_as_record_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "a symlink, which is never followed" if error.errno == errno.ELOOP else error.strerror
        raise RecordError(path, str(why)) from error


@contextlib.contextmanager
def _directory_of(path: Path) -> Iterator[int]:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)


@contextlib.contextmanager
def _opened(name: str, flags: int, directory: int) -> Iterator[int]:
    file = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def _new_file(name: str, directory: int) -> Iterator[int]:
    with _opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory) as file:
        # A sweeper that locks it first removes it: the rename then fails, and nothing is torn. Where the file system
        # has no locks, a sweeper gets none either, and removes nothing.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _refuse_irregular(path: Path, directory: int) -> None:
    # rename() would replace a symlink, not follow it; but somebody put it there, and means the file behind it.
    try:
        mode = os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise RecordError(path, "a symlink, which is never followed")
    if not stat.S_ISREG(mode):
        raise RecordError(path, "no regular file")
