"""Record: one VM's state on disk, kept by one keeper, written in the order in which it was given."""

import asyncio
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import aiofiles.os

from qmpvcpu.domainxml import Identity, Instance, Metadata, parse, read_identity, render
from qmpvcpu.domainxml.cpumodel import cpu_differs
from qmpvcpu.domainxml.updating import identify
from qmpvcpu.errors import DomainXmlError, RecordCorruptError, RecordError
from qmpvcpu.model import Intent, Layout, VcpuMap
from qmpvcpu.record.document import Document
from qmpvcpu.record.files import read_file, see_through
from qmpvcpu.record.kept import KeptFile

__all__ = ["Record"]

# A hostile document's names can be as long as it is.
_MOST_TOLD = 400


@dataclass(frozen=True, slots=True)
class _State:
    """What one save writes."""

    layout: Layout
    intent: Intent | None
    desired: VcpuMap | None


class _Found(NamedTuple):
    """What was at a record's path, and what it is to go on from.

    Attributes:
        previous: The record that was there, or None.
        base: The document that is only changed in place; None: the record is written anew each time.
        uuid: The uuid in these, or None.
    """

    previous: Identity | None = None
    base: bytes | None = None
    uuid: str | None = None


class Record:
    """The record of one VM, locked; made by ``Record.open``, to be closed.

    Attributes:
        path: Where it is.
        previous: What was on disk when it was opened, or None if there was nothing.
        uuid: The uuid made up for a VM whose QEMU has none (kept from the first save on), or None.
        instance: The QEMU that runs, or None where not known; what is set here is in the next save.
        next_boot: The vCPUs that the next boot is to have, or None for those that are plugged; saved likewise.
    """

    def __init__(
        self,
        path: Path,
        document: Document,
        *,
        previous: Identity | None = None,
        uuid: str | None = None,
        emulator: str | None = None,
        instance: Instance | None = None,
    ) -> None:
        self.path = path
        self.previous = previous
        self.uuid = uuid
        self.instance = instance
        self.next_boot = previous.metadata.next_boot if previous and previous.metadata else None
        self._document = document
        self._emulator = emulator
        self._generation = previous.metadata.generation if previous and previous.metadata else 0
        self._next: tuple[_State, asyncio.Future[None]] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        name: str,
        uuid: str | None,
        emulator: str | None = None,
        instance: Instance | None = None,
        base: bytes | str | os.PathLike[str] | None = None,
    ) -> "Record":
        """Return the record of a VM at *path*, existing or to be, locked against every other keeper.

        Nothing is written yet; what killed writers left beside the record is removed. Cancelling it leaves no lock.

        A record that we made of what QEMU tells is written anew each time. One that was started from a document
        (*base*), or that others wrote more into, is only ever changed in place: nothing of it is lost.

        Args:
            path: The file; its directory must exist. A later change of the working directory does not move it.
            name: The VM's name, which must be that of the record.
            uuid: The uuid as QEMU tells it, which must be that of the record; None where QEMU has none: the record's
                must then be one that was made up for it.
            emulator: Absolute path of the QEMU that libvirt shall start from the record, or None; a document that is
                changed in place has its own.
            instance: The QEMU that runs, or None where not known.
            base: A domain document of this VM to start the record from where there is none yet: its bytes, or its
                path. If that is *path* itself, the document there becomes the record.

        Raises:
            RecordLockedError: Another process, or this one, has it open.
            RecordCorruptError: What is there is damaged, hostile, written by a newer version, or not a record of ours
                (a libvirt document of the user's own): it is left alone.
            RecordError: It is that of another VM, cannot be read, or cannot be locked: it is left alone; or *base*
                cannot be read, is another VM's, or is none that libvirt would define.
        """
        file = Path(path).absolute()  # noqa: ASYNC240 -- it only asks the kernel where it is
        work = asyncio.ensure_future(_open_in_thread(file, name, uuid, base))
        try:
            kept, found = await asyncio.shield(work)  # JUSTIFICATION: the thread goes on, and takes the lock
        except asyncio.CancelledError:
            work.add_done_callback(_release)
            await asyncio.wait({work})
            raise
        known = uuid or found.uuid or str(uuid4())
        return cls(
            file,
            Document(kept, found.base, known),
            previous=found.previous,
            uuid=None if uuid is not None else known,
            emulator=emulator,
            instance=instance,
        )

    def cpu_differs(self, layout: Layout) -> str | None:
        """Say in what the VM's own document names another CPU model than QEMU runs; None: in nothing."""
        own = self._document.own
        return None if own is None else cpu_differs(layout, parse(own))

    @property
    def closed(self) -> bool:
        """True once it is, or is being, closed."""
        return self._closing is not None

    async def write(self, layout: Layout, *, intent: Intent | None = None, desired: VcpuMap | None = None) -> None:
        """Save all of this; returns when it, or what was given later, is on disk.

        Calls made while a save is under way are served by one save, of what was given last: nothing is kept of what
        an earlier call gave, an intent neither. Cancelling a call does not recall it.

        Args:
            layout: The state of the VM.
            intent: The transition under way, or None if there is none.
            desired: The map that was last asked for, or None.

        Raises:
            RecordError: As ``save``; or libvirt has no domain for this layout (as ``domainxml.render``), and
                nothing is written; or the record is closed, or its lock was lost to somebody else.
        """
        if self.closed:
            raise RecordError(self.path, "closed")
        done = self._next[1] if self._next else asyncio.get_running_loop().create_future()
        self._next = _State(layout, intent, desired), done
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_pending(), name=f"record {self.path.name}")
        await asyncio.shield(done)  # JUSTIFICATION: one caller's cancel must not cancel the others' save

    async def close(self) -> None:
        """Wait until nothing is left to be written, and let go of the lock. Idempotent.

        A cancel is raised when that is done; a second one, at once.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"record {self.path.name}: close")
        await see_through(self._closing)

    async def _close(self) -> None:
        if self._writer is not None:
            await asyncio.wait({self._writer})
        await _release_in_thread(self._document)

    async def _write_pending(self) -> None:
        while self._next is not None:
            state, done = self._next
            self._next = None
            try:
                await self._write_one(state)
            except RecordError as error:
                done.set_exception(error)
            except BaseException:
                done.cancel()
                raise
            else:
                done.set_result(None)

    async def _write_one(self, state: _State) -> None:
        # Counted even if the save fails: a generation that may have reached the disk is never given out twice.
        self._generation += 1
        metadata = Metadata.of(
            state.layout,
            generation=self._generation,
            uuid=self.uuid,
            instance=self.instance,
            intent=state.intent,
            desired=state.desired,
            next_boot=self.next_boot,
        )
        await see_through(_save_in_thread(self._document, partial(self._render, state.layout, metadata)))

    def _render(self, layout: Layout, metadata: Metadata, base: bytes | None) -> bytes:
        metadata = replace(metadata, in_place=base is not None)
        try:
            return render(layout, base=base, emulator=self._emulator, metadata=metadata)
        except DomainXmlError as error:
            raise RecordError(self.path, str(error)) from error


def _open(
    path: Path, name: str, uuid: str | None, base: bytes | str | os.PathLike[str] | None
) -> tuple[KeptFile, _Found]:
    kept = KeptFile(path)
    try:
        if kept.data is not None:
            try:
                return kept, _admit(path, kept.data, name, uuid)
            except RecordCorruptError:
                if base is None or _document(base) != kept.data:
                    raise
        return kept, _Found() if base is None else _admit_base(path, _document(base), name, uuid)
    except BaseException:
        kept.release()
        raise


_open_in_thread = aiofiles.os.wrap(_open)
_save_in_thread = aiofiles.os.wrap(Document.save)
_release_in_thread = aiofiles.os.wrap(Document.release)


def _release(opening: "asyncio.Future[tuple[KeptFile, _Found]]") -> None:
    """Let go of what a cancelled ``open`` has got all the same."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].release()


def _admit(path: Path, data: bytes, name: str, uuid: str | None) -> _Found:
    try:
        found = read_identity(data)
        in_place = found.metadata is not None and (found.metadata.in_place or bool(found.foreign))
        if in_place:
            parse(data)
    except DomainXmlError as error:
        raise RecordCorruptError(path, f"cannot be trusted and is left alone: {str(error)[:_MOST_TOLD]}") from error
    told = found.name[:_MOST_TOLD]
    if found.metadata is None:
        hint = "base= with this path makes it the record"
        raise RecordCorruptError(path, f"a libvirt document of {told!r} that is not ours; it is left alone ({hint})")
    if found.name != name:
        raise RecordError(path, f"the record of VM {told!r}, not of {name!r}; it is left alone")
    # A VM without uuid has the one that we made up for it, and no other.
    expected = uuid or found.metadata.uuid
    if found.uuid is None or found.uuid != expected:
        raise RecordError(path, f"the record of a VM with uuid {found.uuid}, not {uuid}; it is left alone")
    return _Found(found, data if in_place else None, found.uuid)


def _document(base: bytes | str | os.PathLike[str]) -> bytes:
    data = base if isinstance(base, bytes) else read_file(Path(base))
    if data is None:
        raise RecordError(base, "is not there, and a record was to start from it")
    return data


def _admit_base(path: Path, data: bytes, name: str, uuid: str | None) -> _Found:
    try:
        found = read_identity(data)
        parse(data)
    except DomainXmlError as error:
        raise RecordError(path, f"cannot be started from that document: {str(error)[:_MOST_TOLD]}") from error
    if found.name != name:
        raise RecordError(
            path, f"cannot be started from the document of VM {found.name[:_MOST_TOLD]!r}, not {name!r}"
        )
    if None not in (found.uuid, uuid) and found.uuid != uuid:
        raise RecordError(path, f"cannot be started from the document of a VM with uuid {found.uuid}, not {uuid}")
    known = uuid or found.uuid or str(uuid4())
    return _Found(None, identify(data, known), known)
