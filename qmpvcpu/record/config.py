"""DomainConfig: the document that a VM is next started from, changed on disk."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import aiofiles.os

from qmpvcpu.domainxml import DomainVcpus, Metadata, parse, read_identity, start_of, update, validate
from qmpvcpu.domainxml.domainrule import RuleStage
from qmpvcpu.domainxml.next_boot import slot_of, with_count, with_map, with_max, with_state
from qmpvcpu.errors import ConfigDeniedError, DenialReason, DomainRuleError, RecordError
from qmpvcpu.given import checked
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.record.file import KeptFile, read_file, see_through


@dataclass(frozen=True, slots=True)
class _Document:
    """What is on disk.

    Attributes:
        data: The document.
        rows: What it says of vCPUs.
        metadata: Our own element, if it is a record.
    """

    data: bytes
    rows: DomainVcpus
    metadata: Metadata | None

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls.of(path, read_file(path))

    @classmethod
    def of(cls, path: Path, data: bytes | None) -> Self:
        if data is None:
            raise RecordError(path, "there is no such file")
        return cls(data, parse(data), read_identity(data).metadata)

    @property
    def next_boot(self) -> DomainVcpus:
        """What the next boot has: the rows of a record are of the VM as it runs."""
        return start_of(self.rows)

    def saying(self, domain: DomainVcpus) -> bytes:
        """Return the document that has *domain* as its next boot; all else is as it was."""
        if domain == self.next_boot:
            return self.data
        if self.metadata is None:
            return update(self.data, domain)
        metadata = replace(self.metadata, next_boot=domain.enabled, generation=self.metadata.generation + 1)
        return update(self.data, self.rows, metadata=metadata)

    def kept(self, domain: DomainVcpus) -> DomainVcpus:
        """Return *domain* as the next look shows it: a record keeps which vCPUs it has, and nothing else of it."""
        if self.metadata is None or domain == self.next_boot:
            return domain
        return start_of(replace(self.rows, next_boot=domain.enabled))


class DomainConfig:
    """The vCPUs of a VM's next boot, in its document on disk; made by ``load``, or by ``open``.

    Works without the VM. What the methods change is a value in memory, computed as libvirt computes it for a
    persistent definition (``docs/next-boot.md``); ``save`` puts it on disk, and leaves every other byte of the
    document as it is.

    The record of a running VM is such a document too: its rows are the VM as it runs, and its next boot, which is
    what is shown and changed here, is a map beside them.

    Attributes:
        path: Where it is.

    Example:
        >>> document = "<domain type='kvm'><name>vm</name><vcpu current='2'>8</vcpu></domain>"
        >>> Path("vm.xml").write_text(document)
        69
        >>> async with DomainConfig.open("vm.xml") as config:
        ...     config.set_count(4)
        ...     await config.save()
        >>> Path("vm.xml").read_text()
        "<domain type='kvm'><name>vm</name><vcpu current='4'>8</vcpu></domain>"
    """

    def __init__(self, path: Path, document: _Document, kept: KeptFile | None = None) -> None:
        self.path = path
        self._document = document
        self._kept = kept
        self._domain = document.next_boot

    @classmethod
    async def load(cls, path: str | os.PathLike[str]) -> "DomainConfig":
        """Read the document at *path*.

        It is not locked: ``save`` finds out whether somebody else has changed it meanwhile.

        Raises:
            RecordError: There is none, or it is a symlink, no regular file, too large, or cannot be read.
            DomainXmlError: libvirt would not define it; or our own element in it is damaged.
        """
        file = Path(path).absolute()  # noqa: ASYNC240 -- it only asks the kernel where it is
        return cls(file, await _read_in_thread(file))

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str | os.PathLike[str]) -> "AsyncIterator[DomainConfig]":
        """Read the document at *path*, and lock it against other keepers for as long as the block runs.

        Nothing is saved at its end: that is what ``save`` is for.

        Raises:
            RecordLockedError: Somebody else keeps it.
            QmpVcpuError: As ``load``; or it cannot be locked.
        """
        file = Path(path).absolute()  # noqa: ASYNC240 -- it only asks the kernel where it is
        work = asyncio.ensure_future(_open_in_thread(file))
        try:
            kept, document = await asyncio.shield(work)  # JUSTIFICATION: the thread goes on, and takes the lock
        except asyncio.CancelledError:
            work.add_done_callback(_release)
            await asyncio.wait({work})
            raise
        try:
            yield cls(file, document, kept)
        finally:
            await see_through(_release_in_thread(kept))

    @property
    def domain(self) -> DomainVcpus:
        """What the next boot is to have, as it is shown once it is saved.

        Of a record only ``domain.enabled`` is kept: what comes to the VM as it runs is hotpluggable.
        """
        return self._domain

    @domain.setter
    def domain(self, domain: DomainVcpus) -> None:
        self._domain = self._document.kept(domain)

    @property
    def changed(self) -> bool:
        """True if ``save`` has something to write."""
        return self.domain != self._document.next_boot

    @property
    def is_record(self) -> bool:
        """True if the document is the record of a running VM."""
        return self._document.metadata is not None

    @property
    def refused_by_libvirt(self) -> tuple[DomainRuleError, ...]:
        """The rules for which libvirt would not define the document that ``save`` would write, though we read it.

        Empty but where it was written from a running VM of more than 255 vCPUs, and has no ``<iommu>``.
        """
        return tuple(each for each in validate(self.to_bytes()) if each.stage is RuleStage.DEFINE)

    @property
    def before(self) -> DomainVcpus:
        """What the next boot has by what is on disk."""
        return self._document.next_boot

    def set_map(self, wish: str | Iterable[int]) -> None:
        """Have exactly the vCPUs of *wish* (libvirt's cpuset text, or ids) at the next boot.

        Raises:
            InvalidMapError: *wish* is no set of vCPU ids.
            ConfigDeniedError: vCPU 0 is not in it, one is beyond the maximum, or a slot is in it in part.
        """
        self.domain = with_map(self.domain, VcpuMap.parse(wish) if isinstance(wish, str) else wish)

    @checked
    def set_count(self, count: int, *, hotpluggable: bool = False) -> None:
        """Have *count* vCPUs at the next boot: the lowest free ones come, the highest leave.

        Args:
            count: How many.
            hotpluggable: Have those that come plugged before the guest runs, so that libvirt can unplug them.

        Raises:
            ConfigDeniedError: *count* is not 1 to the maximum, or takes a part of a slot.
        """
        self.domain = with_count(self.domain, count, hotpluggable=hotpluggable)

    @checked
    def set_state(self, vcpu: int, *, enabled: bool) -> None:
        """Have one vCPU, with its whole slot, at the next boot, or not.

        Raises:
            ConfigDeniedError: vCPU 0 is to leave, it is beyond the maximum, or it is not the first of its slot.
        """
        self.domain = with_state(self.domain, slot_of(self.domain, vcpu, enabled=enabled), enabled=enabled)

    @checked
    def set_max(self, maximum: int) -> None:
        """Have room for *maximum* vCPUs at the next boot; those above are dropped, with their pins.

        Raises:
            ConfigDeniedError: *maximum* is not 1 to 16384, does not fit the topology or the NUMA cells, or this is
                the record of a running VM.
        """
        if self.is_record and maximum != self.domain.max:
            detail = "a record's maximum is that of the VM as it runs: change the document that it is started from"
            raise ConfigDeniedError(f"maximum {maximum}", VcpuMap(), DenialReason.RECORD_MAXIMUM, detail)
        self.domain = with_max(self.domain, maximum)

    def to_bytes(self) -> bytes:
        """Return the document that ``save`` would write."""
        return self._document.saying(self.domain)

    async def save(self) -> None:
        """Put it on disk, durably: all of it, or nothing.

        The file keeps its mode and owner, and has a new inode. Where nothing is changed, nothing is written; that
        nobody else has changed it is looked at all the same. Cancelling waits for the disk once, as that of a record
        does.

        Raises:
            RecordLockedError: Somebody else keeps the document.
            RecordError: It has changed since it was read, or cannot be written: it is as it is. ``outcome`` is
                UNKNOWN only where it was replaced and the directory could not be synchronised.
        """
        self._document = await see_through(_save_in_thread(self._kept, self.path, self._document, self.domain))


def _open(path: Path) -> tuple[KeptFile, _Document]:
    kept = KeptFile(path)
    try:
        return kept, _Document.of(path, kept.data)
    except BaseException:
        kept.release()
        raise


def _save(held: KeptFile | None, path: Path, document: _Document, domain: DomainVcpus) -> _Document:
    """Have *document* say that *domain* is the next boot, on disk; return it as it is then."""
    before, after = document.data, _Document.of(path, document.saying(domain))
    kept = KeptFile(path) if held is None else held
    try:
        kept.renew()
        is_same = after.data == before
        if kept.look() != before or not (is_same or kept.replace(after.data, before=before, keeps_owner=True)):
            raise RecordError(path, "changed by somebody else since it was read; it is left alone")
    finally:
        if held is None:
            kept.release()
    return after


def _release(opening: "asyncio.Future[tuple[KeptFile, _Document]]") -> None:
    """Let go of what a cancelled ``open`` has got all the same."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].release()


_read_in_thread = aiofiles.os.wrap(_Document.read)
_open_in_thread = aiofiles.os.wrap(_open)
_save_in_thread = aiofiles.os.wrap(_save)
_release_in_thread = aiofiles.os.wrap(KeptFile.release)
