"""Record: one VM's state on disk, kept by one keeper, written in the order in which it was given."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import aiofiles.os

from qmpvcpu.domainxml import DomainVcpus, Identity, Instance, Metadata, parse, read_identity, render
from qmpvcpu.domainxml.cpu import cpu_differs
from qmpvcpu.domainxml.patch import with_uuid
from qmpvcpu.errors import DomainXmlError, RecordCorruptError, RecordError, shorten
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.transition import Intent
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vmstate import PreviousVcpus
from qmpvcpu.record.file import KeptFile, read_file, see_through
from qmpvcpu.record.owner import Claim, refuse_other, refuse_other_document, same_instance

_MOST_TOLD = 400


# Somebody who writes at each of so many looks does not stop.
_MOST_TRIES = 5
_ALONE = "it is left alone: put it right, or remove it, and the next save writes what is known"


class Document:
    """The document that a record is.

    Args:
        kept: Its file.
        base: The document that is only changed in place from the first save on; None: it is written anew each time,
            until somebody edits it.
        uuid: The VM's uuid.
    """

    def __init__(self, kept: KeptFile, base: bytes | None, uuid: str) -> None:
        self._kept = kept
        self._base = base
        self._in_place = base is not None
        self._uuid = uuid
        self._opened = kept.data

    def release(self) -> None:
        """Let go of the file. Idempotent; never fails."""
        self._kept.release()

    def save(self, make: Callable[[bytes | None], bytes]) -> None:
        """Replace the document by what *make* makes of it, durably; what others have written into it stays.

        Args:
            make: Takes the document that is to be changed in place, or None if it is to be written anew.

        Raises:
            RecordLockedError: Somebody else keeps it.
            RecordError: It cannot be written; or others have made of it what is no record of this VM, or have changed
                our element in it. It is as it was.
        """
        for _ in range(_MOST_TRIES):
            self._kept.renew()
            now = self._kept.look()
            if now is None or now == self._kept.data:
                data = make(self.own)
            else:
                data = make(self._edited(now))
                self._in_place = True  # also if the save fails: nothing is lost by it
            if self._kept.replace(data, before=now):
                return
        raise RecordError(self._kept.path, f"changed by somebody else {_MOST_TRIES} times while it was to be saved")

    @property
    def own(self) -> bytes | None:
        """The VM's own document, as known, which is changed in place; None: it is written anew each time."""
        if not self._in_place:
            return None
        return self._base if self._kept.data is self._opened else self._kept.data

    def _edited(self, now: bytes) -> bytes:
        """Return the document as others have left it, to be changed in place.

        Raises:
            RecordError: It cannot be.
        """
        path, before = self._kept.path, self._kept.data
        if before is None:
            raise RecordError(path, f"somebody has put a file there that is not ours; {_ALONE}")
        known = read_identity(before)
        try:
            found = read_identity(now)
            parse(now)
        except DomainXmlError as error:
            why = f"edited by somebody, and cannot be read any more ({str(error)[:_MOST_TOLD]}); {_ALONE}"
            raise RecordCorruptError(path, why) from error
        if (found.name, found.uuid) != (known.name, known.uuid):
            told = f"{shorten(found.name)}, uuid {found.uuid}"
            raise RecordError(path, f"somebody has put the document of VM {told}, there; {_ALONE}")
        if found.metadata != known.metadata:
            raise RecordError(path, f"our own element in it was edited or removed by somebody; {_ALONE}")
        return with_uuid(now, self._uuid)


@dataclass(frozen=True, slots=True)
class _State:
    """What one save writes."""

    layout: Layout
    intent: Intent | None
    desired: VcpuMap | None
    previous: PreviousVcpus | None


class _Found(NamedTuple):
    """What was at a record's path, and what it is to go on from.

    Attributes:
        previous: The record that was there, or None.
        base: The document that is only changed in place; None: the record is written anew each time.
        uuid: The uuid in these, or None.
        name: The name in these, or None.
        same_instance: True if the record was of the QEMU that runs, or its VM has migrated into that one.
        earlier: What the QEMU of the record had, or one before it, if that is another than runs.
    """

    previous: Identity | None = None
    base: bytes | None = None
    uuid: str | None = None
    name: str | None = None
    same_instance: bool = False
    earlier: PreviousVcpus | None = None


class Record:
    """The record of one VM, locked; made by ``Record.open``, to be closed.

    Attributes:
        path: Where it is.
        previous: What was on disk when it was opened, or None if there was nothing.
        name: The VM's name: that of the record where the VM was given none.
        same_instance: True if what was on disk is of the QEMU that runs, so that what was under way still is.
        earlier: What an earlier QEMU of the VM had, and has not been given to another; None: nothing is kept.
        read_only: True if it is neither locked nor ever written.
        uuid: The uuid made up for a VM whose QEMU has none (kept from the first save on), or None.
        instance: The QEMU that runs, or None where not known; what is set here is in the next save.
        next_boot: The vCPUs that the next boot is to have, or None for those that are plugged; saved likewise.
    """

    def __init__(
        self,
        path: Path,
        document: Document | None,
        found: _Found,
        *,
        name: str,
        uuid: str | None = None,
        emulator: str | None = None,
        instance: Instance | None = None,
    ) -> None:
        previous = found.previous
        self.path = path
        self.previous = previous
        self.name = name
        self.same_instance = found.same_instance
        self.earlier = found.earlier
        self.read_only = document is None
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
        named: bool = True,
        arrived: bool = False,
        read_only: bool = False,
    ) -> "Record":
        """Return the record of a VM at *path*, existing or to be, locked against every other keeper.

        Nothing is written yet; what killed writers left beside the record is removed. Cancelling it leaves no lock.

        A record that we made of what QEMU tells is written anew each time. One that was started from a document
        (*base*), or that others wrote more into, is only ever changed in place: nothing of it is lost.

        Args:
            path: The file; its directory must exist. A later change of the working directory does not move it.
            name: The VM's name, which must be that of the record where QEMU has no uuid.
            uuid: The uuid as QEMU tells it, which must be that of the record; None where QEMU has none: the record's
                must then be one that was made up for it.
            emulator: Absolute path of the QEMU that libvirt shall start from the record, or None; a document that is
                changed in place has its own.
            instance: The QEMU that runs, or None where not known. That of the record is the same VM, whatever it is
                called; another is another VM as long as that of the record runs.
            base: A domain document of this VM to start the record from where there is none yet: its bytes, or its
                path. If that is *path* itself, the document there becomes the record.
            named: False if *name* is a label: it then tells nothing, and only the instance, or the uuid, does.
            arrived: True if the VM has migrated into this QEMU from that of the record.
            read_only: True to only read it: it is not locked, and every ``write`` is an error.

        Raises:
            RecordLockedError: Another process, or this one, has it open.
            RecordCorruptError: What is there is damaged, hostile, written by a newer version, or not a record of ours
                (a libvirt document of the user's own): it is left alone.
            RecordError: It is that of another VM, cannot be read, or cannot be locked: it is left alone; or *base*
                cannot be read, is another VM's, or is none that libvirt would define.
        """
        file = Path(path).absolute()  # noqa: ASYNC240 -- it only asks the kernel where it is
        claim = Claim(name, named, uuid, instance, arrived)
        work = asyncio.ensure_future(_open_in_thread(file, claim, base, read_only=read_only))
        try:
            kept, found = await asyncio.shield(work)  # JUSTIFICATION: the thread goes on, and takes the lock
        except asyncio.CancelledError:
            work.add_done_callback(_release)
            await asyncio.wait({work})
            raise
        known = uuid or found.uuid or str(uuid4())
        return cls(
            file,
            None if kept is None else Document(kept, found.base, known),
            found,
            name=name if named else found.name or name,
            uuid=None if uuid is not None else known,
            emulator=emulator,
            instance=instance,
        )

    def cpu_differs(self, layout: Layout) -> str | None:
        """Say in what the VM's own document names another CPU model than QEMU runs; None: in nothing."""
        own = None if self._document is None else self._document.own
        return None if own is None else cpu_differs(layout, parse(own))

    @property
    def closed(self) -> bool:
        """True once it is, or is being, closed."""
        return self._closing is not None

    async def write(
        self,
        layout: Layout,
        *,
        intent: Intent | None = None,
        desired: VcpuMap | None = None,
        previous: PreviousVcpus | None = None,
    ) -> None:
        """Save all of this; returns when it, or what was given later, is on disk.

        Calls made while a save is under way are served by one save, of what was given last: nothing is kept of what
        an earlier call gave, an intent neither. Cancelling a call does not recall it.

        Args:
            layout: The state of the VM.
            intent: The transition under way, or None if there is none.
            desired: The map that was last asked for, or None.
            previous: What an earlier QEMU had and is kept, or None.

        Raises:
            RecordError: It is only read; or as ``save``; or libvirt has no domain for this layout (as
                ``domainxml.render``), and nothing is written; or the record is closed, or its lock was lost to
                somebody else.
        """
        if self.read_only:
            raise RecordError(self.path, "attached to with read_only, and a change would have to be recorded")
        if self.closed:
            raise RecordError(self.path, "closed")
        done = self._next[1] if self._next else asyncio.get_running_loop().create_future()
        self._next = _State(layout, intent, desired, previous), done
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
        if self._document is not None:
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
        metadata = Metadata(
            generation=self._generation,
            uuid=self.uuid,
            instance=self.instance,
            intent=state.intent,
            desired=state.desired,
            next_boot=self.next_boot,
            previous=state.previous,
        ).with_layout(state.layout)
        assert self._document is not None  # noqa: S101 -- JUSTIFICATION: write() refuses without, mypy cannot know
        await see_through(_save_in_thread(self._document, partial(self._render, state.layout, metadata)))

    def _render(self, layout: Layout, metadata: Metadata, base: bytes | None) -> bytes:
        metadata = replace(metadata, in_place=base is not None)
        try:
            return render(layout, base=base, emulator=self._emulator, metadata=metadata)
        except DomainXmlError as error:
            raise RecordError(self.path, str(error)) from error


def _open(
    path: Path, claim: Claim, base: bytes | str | os.PathLike[str] | None, *, read_only: bool
) -> tuple[KeptFile | None, _Found]:
    if read_only:
        return None, _find(path, read_file(path), claim, base)
    kept = KeptFile(path)
    try:
        return kept, _find(path, kept.data, claim, base)
    except BaseException:
        kept.release()
        raise


def _find(path: Path, data: bytes | None, claim: Claim, base: bytes | str | os.PathLike[str] | None) -> _Found:
    if data is not None:
        try:
            return _admit(path, data, claim)
        except RecordCorruptError:
            if base is None or _document(base) != data:
                raise
    return _Found() if base is None else _admit_base(path, _document(base), claim)


_open_in_thread = aiofiles.os.wrap(_open)
_save_in_thread = aiofiles.os.wrap(Document.save)
_release_in_thread = aiofiles.os.wrap(Document.release)


def _release(opening: "asyncio.Future[tuple[KeptFile | None, _Found]]") -> None:
    """Let go of what a cancelled ``open`` has got all the same."""
    if not opening.cancelled() and opening.exception() is None and (kept := opening.result()[0]) is not None:
        kept.release()


def _admit(path: Path, data: bytes, claim: Claim) -> _Found:
    try:
        found = read_identity(data)
        metadata = found.metadata
        if metadata is None:
            hint = "base= with this path makes it the record"
            told = found.name[:_MOST_TOLD]
            raise RecordCorruptError(
                path, f"a libvirt document of {told!r} that is not ours; it is left alone ({hint})"
            )
        refuse_other(path, found, metadata, claim)
        in_place = metadata.in_place or bool(found.foreign)
        same = claim.arrived or same_instance(metadata.instance, claim.instance)
        earlier = metadata.previous
        if in_place or (earlier is None and not same):
            domain = parse(data)
            earlier = earlier if same else earlier or _had(domain)
    except DomainXmlError as error:
        raise RecordCorruptError(path, f"cannot be trusted and is left alone: {str(error)[:_MOST_TOLD]}") from error
    label = found.name if len(found.name) <= _MOST_TOLD else None
    return _Found(found, data if in_place else None, found.uuid, label, same, earlier)


def _had(domain: DomainVcpus) -> PreviousVcpus:
    return PreviousVcpus(domain.max, domain.started_with, domain.creation, domain.topology)


def _document(base: bytes | str | os.PathLike[str]) -> bytes:
    data = base if isinstance(base, bytes) else read_file(Path(base))
    if data is None:
        raise RecordError(base, "is not there, and a record was to start from it")
    return data


def _admit_base(path: Path, data: bytes, claim: Claim) -> _Found:
    try:
        found = read_identity(data)
        parse(data)
    except DomainXmlError as error:
        raise RecordError(path, f"cannot be started from that document: {str(error)[:_MOST_TOLD]}") from error
    refuse_other_document(path, found.name, found.uuid, claim)
    known = claim.uuid or found.uuid or str(uuid4())
    return _Found(None, with_uuid(data, known), known, found.name)
