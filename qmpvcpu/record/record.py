"""Record: one VM's state on disk, with one writer, saved in the order in which it was given."""

import asyncio
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple
from uuid import uuid4

import aiofiles.os

from qmpvcpu.domainxml import Identity, Metadata, parse, placement_of, read_identity, render, start_of
from qmpvcpu.domainxml.cpu import cpu_differs
from qmpvcpu.domainxml.patch import with_uuid
from qmpvcpu.domainxml.reader import ReadDocument
from qmpvcpu.errors import DomainXmlError, RecordCorruptError, RecordError, naming_file, shorten
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.transition import Intent
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import RecordInfo
from qmpvcpu.record.file import LockedFile, absolute, finish_despite_cancel, lock_file, read_file
from qmpvcpu.record.owner import MOST_TOLD, Claim, refuse_other, refuse_other_document, same_instance

# A writer who interferes with so many saves does not stop.
_MOST_TRIES: Final = 5
_ALONE: Final = "it is left alone: repair or remove it, and the next save writes what is known"


class _State(NamedTuple):
    """What one save writes."""

    layout: Layout
    intent: Intent | None
    desired: VcpuMap | None
    previous: PreviousVcpus | None
    placement: Placement | None


class _Found(NamedTuple):
    """What was at a record's path, and what the record continues from.

    Attributes:
        previous: The record that was there, or None.
        base: The document that is only changed in place; None: the record is written anew each time.
        uuid: The uuid in these, or None.
        name: The name in these, or None.
        same_instance: True if the record was of the QEMU that runs, or its VM has migrated into that one.
        earlier: What the QEMU of the record, or one before it, had, if another one runs now.
        placement: Where these have QEMU's threads run; None: they say nothing of that.
        everywhere: True if these have threads for which nothing is said run on all host CPUs.
    """

    previous: Identity | None = None
    base: bytes | None = None
    uuid: str | None = None
    name: str | None = None
    same_instance: bool = False
    earlier: PreviousVcpus | None = None
    placement: Placement | None = None
    everywhere: bool = False


class Record:
    """The record of one VM, locked; made by ``Record.open``, to be closed.

    Attributes:
        path: Where it is.
        previous: What was on disk when it was opened, or None if there was nothing.
        name: The VM's name: that of the record where the VM was given none.
        same_instance: True if what was on disk is of the QEMU that runs, so that what was under way still is.
        earlier: What an earlier QEMU of the VM had and no other has been given, or None.
        read_only: True if it is neither locked nor ever written.
        uuid: The uuid made up for a VM whose QEMU has none (kept from the first save on), or None.
        instance: The QEMU that runs, or None where not known; set it, and the next save has it.
        next_boot: The vCPUs of the next boot, or None for those that are plugged; saved likewise.
        next_placement: Where threads are to run from the next boot on, or None for where they do now; saved likewise.
        placement: Where QEMU's threads are to run: as was given last to be saved, else as the document said that was
            opened; for another QEMU than it is of, that of the next boot. None: nothing was said of that.
        everywhere: True if it is the VM's own document, and has vCPU threads for which nothing is said run on all
            host CPUs, once anything is said of any.
    """

    def __init__(
        self, path: Path, file: LockedFile | None, found: _Found, claim: Claim, emulator: str | None
    ) -> None:
        known = claim.uuid or found.uuid or str(uuid4())
        before = None if found.previous is None else found.previous.metadata
        self.path = path
        self.previous = found.previous
        self.name = claim.name if claim.named else found.name or claim.name
        self.same_instance = found.same_instance
        self.earlier = found.earlier
        self.read_only = file is None
        self.uuid = None if claim.uuid is not None else known
        self.instance = claim.instance
        self.next_boot = before.next_boot if before else None
        self.next_placement = before.next_placement if before else None
        self.placement = found.placement
        self.everywhere = found.everywhere
        self._document = None if file is None else _RecordDocument(file, found.base, known)
        self._emulator = emulator
        self._found = self._generation = before.generation if before else 0
        self._next: tuple[_State, asyncio.Future[None]] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        claim: Claim,
        *,
        emulator: str | None = None,
        base: bytes | str | os.PathLike[str] | None = None,
        read_only: bool = False,
    ) -> "Record":
        """Return the record of a VM at *path*, existing or new, locked against every other writer.

        Nothing is written yet; what killed writers left next to the record is removed. Cancelling leaves no lock.

        A record made from what QEMU reports is written anew each time. One that was started from a document (*base*),
        or that others wrote more into, is only changed in place: nothing in it is lost.

        Args:
            path: The file; its directory must exist. A later change of the working directory does not move it.
            claim: The VM. If QEMU reports a uuid, it must be the record's. If not, the record's must be one that
                was made up for it, and the name must be the same. If the QEMU that runs is that of the record, it is
                the same VM, whatever its name; if it is another, it is another VM while that of the record runs.
            emulator: Absolute path of the QEMU that libvirt should start from the record, or None; a document that is
                changed in place has its own.
            base: A domain document of this VM to start the record from where there is none yet: its bytes, or its
                path. If that is *path* itself, the document there becomes the record.
            read_only: True to only read it: it is not locked, and every ``write`` is an error.

        Raises:
            RecordLockedError: Another process, or this one, has it open.
            RecordCorruptError: What is there is damaged, hostile, written by a newer version, or not our record (a
                libvirt document of the user's own): it is left alone.
            RecordError: It is another VM's, cannot be read, or cannot be locked: it is left alone; or *base* cannot
                be read, is another VM's, or libvirt would not define it.
        """
        where = absolute(path)
        find = partial(_find, where, claim, base)
        if read_only:
            file, found = None, await _read_in_thread(where, find)
        else:
            file, found = await lock_file(where, find)
        return cls(where, file, found, claim, emulator)

    def cpu_differs(self, layout: Layout) -> str | None:
        """Return how the CPU model in the VM's own document differs from the running one; None: it does not."""
        own = None if self._document is None else self._document.own
        return None if own is None else cpu_differs(layout, parse(own))

    @property
    def info(self) -> RecordInfo:
        """Where it is, and how often it was written."""
        return RecordInfo(str(self.path), self._found, self._generation)

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
        placement: Placement | None = None,
    ) -> None:
        """Save all of this; returns when it, or what was given later, is on disk.

        Calls made during a save are served by one more save, of what was given last: nothing is kept of an earlier
        call, not even its intent. Cancelling a call does not withdraw it.

        Args:
            layout: The state of the VM.
            intent: The transition under way, or None if there is none.
            desired: The map last requested, or None.
            previous: What an earlier QEMU had and is kept, or None.
            placement: Where the VM's threads are to run, for the document's ``<cputune>``; vCPUs that are not plugged
                keep their places. None: the document keeps its own.

        Raises:
            RecordError: As ``save``; or libvirt has no domain for this layout (as ``domainxml.render``), and nothing
                is written; or the record is read-only or closed, or its lock was lost to somebody else.
        """
        if self.read_only:
            raise RecordError(self.path, "attached to with read_only, and a change would have to be recorded")
        if self.closed:
            raise RecordError(self.path, "closed")
        done = self._next[1] if self._next else asyncio.get_running_loop().create_future()
        if placement is not None:
            self.placement = placement
        self._next = _State(layout, intent, desired, previous, placement), done
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_pending(), name=f"record {self.path.name}")
        await asyncio.shield(done)  # JUSTIFICATION: one caller's cancel must not cancel the others' save

    async def close(self) -> None:
        """Wait until everything is written, and release the lock. Idempotent.

        A cancel is raised when that is done; a second one, at once.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"record {self.path.name}: close")
        await finish_despite_cancel(self._closing)

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
        # Counted even if the save fails: a generation that may have reached the disk is never used twice.
        self._generation += 1
        metadata = Metadata(
            generation=self._generation,
            uuid=self.uuid,
            instance=self.instance,
            intent=state.intent,
            desired=state.desired,
            next_boot=self.next_boot,
            next_placement=self.next_placement,
            previous=state.previous,
            core_scheduling=self.placement.core_scheduling if self.placement and self.placement.groups else None,
        ).with_layout(state.layout)
        assert self._document is not None  # noqa: S101 -- JUSTIFICATION: write() refuses without, mypy cannot know
        render_it = partial(
            self._render, state.layout, metadata, placement=state.placement, placement_anew=self.placement
        )
        await finish_despite_cancel(_save_in_thread(self._document, render_it))

    def _render(
        self,
        layout: Layout,
        metadata: Metadata,
        base: bytes | None,
        *,
        placement: Placement | None,
        placement_anew: Placement | None,
    ) -> bytes:
        metadata = replace(metadata, in_place=base is not None)
        if base is None:  # what is written anew says all that is known, also where the placement is as it was
            placement = placement_anew
        try:
            return render(layout, base=base, emulator=self._emulator, metadata=metadata, placement=placement)
        except DomainXmlError as error:
            raise RecordError(self.path, str(error)) from error


# Its document. What is here blocks.


class _RecordDocument:
    """The document that a record is, saved without losing what others have written into it meanwhile.

    Args:
        file: Its file.
        base: The document that is only changed in place, from the first save on; None: it is written anew each time,
            until somebody edits it.
        uuid: The VM's uuid.
    """

    def __init__(self, file: LockedFile, base: bytes | None, uuid: str) -> None:
        self._file = file
        self._base = base
        self._in_place = base is not None
        self._uuid = uuid
        self._opened = file.data

    def release(self) -> None:
        """Release the file. Idempotent; never fails."""
        self._file.release()

    @property
    def own(self) -> bytes | None:
        """The VM's own document, which is changed in place; None: it is written anew each time."""
        if not self._in_place:
            return None
        return self._base if self._file.data is self._opened else self._file.data

    def save(self, make: Callable[[bytes | None], bytes]) -> None:
        """Replace the document by what *make* makes of it, durably; what others have written into it stays.

        Args:
            make: Takes the document to be changed in place, or None to write it anew.

        Raises:
            RecordError: It cannot be written; or others have turned it into something else than a record of this VM,
                or have changed our element in it. It is unchanged.
        """
        for _ in range(_MOST_TRIES):
            self._file.renew()
            now = self._file.read()
            if now is None or now == self._file.data:
                data = make(self.own)
            else:
                data = make(self._edited(now))
                self._in_place = True  # also if the save fails: that loses nothing
            if self._file.replace(data, before=now):
                return
        raise RecordError(self._file.path, f"changed by somebody else {_MOST_TRIES} times while it was being saved")

    def _edited(self, now: bytes) -> bytes:
        """Return the document as others have left it, to be changed in place; raise RecordError if it cannot be."""
        path, before = self._file.path, self._file.data
        if before is None:
            raise RecordError(path, f"somebody has put a file there that is not ours; {_ALONE}")
        known = read_identity(before)
        try:
            document = ReadDocument(now)
            found, _ = document.identity, document.domain
        except DomainXmlError as error:
            why = f"edited by somebody, and no longer readable ({str(error)[:MOST_TOLD]}); {_ALONE}"
            raise RecordCorruptError(path, why) from error
        if (found.name, found.uuid) != (known.name, known.uuid):
            told = f"{shorten(found.name)}, uuid {found.uuid}"
            raise RecordError(path, f"somebody has put the document of VM {told}, there; {_ALONE}")
        if found.metadata != known.metadata:
            raise RecordError(path, f"our own element in it was edited or removed by somebody; {_ALONE}")
        return with_uuid(now, self._uuid)


def _find(path: Path, claim: Claim, base: bytes | str | os.PathLike[str] | None, data: bytes | None) -> _Found:
    if data is not None:
        try:
            return _admit(path, data, claim)
        except RecordCorruptError:
            if base is None or _base_document(base) != data:
                raise
    return _Found() if base is None else _admit_base(path, base, claim)


def _admit(path: Path, data: bytes, claim: Claim) -> _Found:
    try:
        document = ReadDocument(data)
        found = document.identity
        metadata = found.metadata
        if metadata is None:
            told = found.name[:MOST_TOLD]
            hint = "base= with this path makes it the record"
            why = f"a libvirt document of {told!r} that is not ours; it is left alone ({hint})"
            raise RecordCorruptError(path, why)
        refuse_other(path, found, claim)
        in_place = metadata.in_place or bool(found.foreign)
        same = claim.arrived or same_instance(metadata.instance, claim.instance)
        earlier = metadata.previous
        if in_place or (earlier is None and not same):
            domain = document.domain
            had = PreviousVcpus(domain.max, domain.started_with, domain.creation, domain.topology)
            earlier = earlier if same else earlier or had
        placement = _placement(document, is_next=not same)
        if placement is not None and not in_place:
            # Nobody but us has written it, for a VM whose main thread may have been put somewhere.
            placement = replace(placement, everywhere=False) or None
        everywhere = in_place and document.domain.placement == "static"
    except DomainXmlError as error:
        raise RecordCorruptError(path, f"cannot be trusted and is left alone: {str(error)[:MOST_TOLD]}") from error
    label = found.name if len(found.name) <= MOST_TOLD else None
    return _Found(found, data if in_place else None, found.uuid, label, same, earlier, placement, everywhere)


def _admit_base(path: Path, base: bytes | str | os.PathLike[str], claim: Claim) -> _Found:
    data = _base_document(base)
    try:
        with nullcontext() if isinstance(base, bytes) else naming_file(base):
            document = ReadDocument(data)
            found, domain, placement = document.identity, document.domain, document.placement or None
    except DomainXmlError as error:
        raise RecordError(path, f"cannot be started from that document: {str(error)[:MOST_TOLD]}") from error
    refuse_other_document(path, found, claim)
    uuid = claim.uuid or found.uuid or str(uuid4())
    return _Found(
        None, with_uuid(data, uuid), uuid, found.name, placement=placement, everywhere=domain.placement == "static"
    )


def _placement(document: ReadDocument, *, is_next: bool) -> Placement | None:
    """Return where a record has QEMU's threads run: those of the QEMU that it is of, or of the next one."""
    metadata = document.metadata or Metadata()
    found = document.placement
    if is_next and metadata.next_placement is not None:
        found = placement_of(start_of(replace(document.domain, next_boot=None)))
    kind = metadata.core_scheduling
    return (found if kind is None else replace(found, core_scheduling=kind)) or None


def _base_document(base: bytes | str | os.PathLike[str]) -> bytes:
    data = base if isinstance(base, bytes) else read_file(Path(base))
    if data is None:
        raise RecordError(base, "is not there, and a record was to start from it")
    return data


def _read(path: Path, find: Callable[[bytes | None], _Found]) -> _Found:
    return find(read_file(path))


_read_in_thread = aiofiles.os.wrap(_read)
_save_in_thread = aiofiles.os.wrap(_RecordDocument.save)
_release_in_thread = aiofiles.os.wrap(_RecordDocument.release)
