"""DomainConfig: the document that a VM is next started from, changed on disk."""

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import aiofiles.os

from qmpvcpu.domainxml import DomainVcpus, Identity, placement_of, start_of, update, validate, with_placement
from qmpvcpu.domainxml.domainrule import RuleStage
from qmpvcpu.domainxml.next_boot import slot_of, with_count, with_map, with_max, with_places, with_state
from qmpvcpu.domainxml.placing import has_same_places, with_places_of
from qmpvcpu.domainxml.reader import ReadDocument
from qmpvcpu.errors import ConfigDeniedError, DenialReason, DomainRuleError, RecordError, naming_file, shorten
from qmpvcpu.given import checked
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.record.file import LockedFile, absolute, finish_despite_cancel, lock_file, read_file


class _Document(NamedTuple):
    """What is on disk.

    Attributes:
        data: The document.
        rows: What it says about vCPUs.
        identity: Whose it is; with our own element, if it is a record.
        next_boot: What the next boot has. The rows of a record describe the running VM.
    """

    data: bytes
    rows: DomainVcpus
    identity: Identity
    next_boot: DomainVcpus

    @classmethod
    def of(cls, path: Path, data: bytes | None) -> Self:
        if data is None:
            raise RecordError(path, "there is no such file")
        with naming_file(path):
            read = ReadDocument(data)
            return cls(data, read.domain, read.identity, start_of(read.domain))

    def with_next_boot(self, domain: DomainVcpus) -> bytes:
        """Return the document with *domain* as its next boot, and otherwise unchanged."""
        metadata = self.identity.metadata
        if domain == self.next_boot:
            return self.data
        if metadata is None:
            return update(self.data, domain)
        next_boot, next_placement = self._kept(domain)
        generation = metadata.generation + 1
        metadata = replace(metadata, next_boot=next_boot, next_placement=next_placement, generation=generation)
        return update(self.data, self.rows, metadata=metadata)

    def as_kept(self, domain: DomainVcpus) -> DomainVcpus:
        """Return *domain* as it would be read back: a record keeps only which vCPUs it has, and their placement."""
        if self.identity.metadata is None or domain == self.next_boot:
            return domain
        next_boot, next_placement = self._kept(domain)
        return start_of(replace(self.rows, next_boot=next_boot, next_placement=next_placement))

    def _kept(self, domain: DomainVcpus) -> tuple[VcpuMap | None, Placement | None]:
        """Return what a record keeps of *domain*; what follows the running VM and is not changed still follows it."""
        has_same_vcpus = with_places_of(domain, self.next_boot) == self.next_boot
        return (
            self.rows.next_boot if has_same_vcpus else domain.enabled,
            self.rows.next_placement if has_same_places(domain, self.next_boot) else placement_of(domain),
        )


class DomainConfig:
    """The vCPUs of a VM's next boot, in its document on disk; made by ``load`` or ``open``.

    Works without the VM. The methods change a value in memory, computed as libvirt computes it for a persistent
    definition (``docs/next-boot.md``). ``save`` writes it, and leaves every other byte of the document unchanged.

    The record of a running VM is such a document too: its rows and ``<cputune>`` describe the running VM. Its next
    boot, shown and changed here, is kept apart: a map, and a placement.

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

    def __init__(self, path: Path, document: _Document, file: LockedFile | None = None) -> None:
        self.path = path
        self._document = document
        self._file = file
        self._domain = document.next_boot

    @classmethod
    async def load(cls, path: str | os.PathLike[str]) -> "DomainConfig":
        """Read the document at *path*.

        It is not locked: ``save`` finds out whether somebody else has changed it meanwhile.

        Raises:
            RecordError: There is none, or it is a symlink, not a regular file, too large, or cannot be read.
            DomainXmlError: libvirt would not define it; or our own element in it is damaged.
        """
        where = absolute(path)
        return cls(where, await _read_in_thread(where))

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str | os.PathLike[str]) -> "AsyncIterator[DomainConfig]":
        """Read the document at *path*, and lock it against other writers while the block runs.

        Nothing is saved at its end: call ``save``.

        Raises:
            RecordLockedError: Somebody else has locked it.
            QmpVcpuError: As ``load``; or it cannot be locked.
        """
        where = absolute(path)
        file, document = await lock_file(where, partial(_Document.of, where))
        try:
            yield cls(where, document, file)
        finally:
            await finish_despite_cancel(_release_in_thread(file))

    @property
    def identity(self) -> Identity:
        """Whose document it is, according to the document on disk."""
        return self._document.identity

    @property
    def domain(self) -> DomainVcpus:
        """What the next boot will have, as it reads once it is saved.

        A record keeps only ``domain.enabled``, where the vCPUs added to the running VM are hotpluggable, and its
        placement.
        """
        return self._domain

    @domain.setter
    def domain(self, domain: DomainVcpus) -> None:
        self._domain = self._document.as_kept(domain)

    @property
    def changed(self) -> bool:
        """True if ``save`` has something to write."""
        return self.domain != self.before

    @property
    def is_record(self) -> bool:
        """True if the document is the record of a running VM."""
        return self.identity.metadata is not None

    @property
    def refused_by_libvirt(self) -> tuple[DomainRuleError, ...]:
        """The rules for which libvirt would not define the document that ``save`` would write, though we read it.

        Empty unless it was written from a running VM of more than 255 vCPUs, and has no ``<iommu>``.
        """
        return tuple(each for each in validate(self.to_bytes()) if each.stage is RuleStage.DEFINE)

    @property
    def before(self) -> DomainVcpus:
        """What the next boot has according to the document on disk."""
        return self._document.next_boot

    def set_map(self, wish: str | Iterable[int]) -> None:
        """Have exactly the vCPUs of *wish* (libvirt's cpuset text, or ids) at the next boot.

        Raises:
            InvalidMapError: *wish* is not a set of vCPU ids.
            ConfigDeniedError: vCPU 0 is missing, an id is beyond the maximum, or only part of a slot is in it.
        """
        self.domain = with_map(self.domain, VcpuMap.parse(wish) if isinstance(wish, str) else wish)

    @checked
    def set_count(self, count: int, *, hotpluggable: bool = False) -> None:
        """Have *count* vCPUs at the next boot: the lowest free ones are added, the highest removed.

        Args:
            count: How many.
            hotpluggable: Plug those added before the guest runs, so that libvirt can unplug them.

        Raises:
            ConfigDeniedError: *count* is not 1 to the maximum, or would split a slot.
        """
        self.domain = with_count(self.domain, count, hotpluggable=hotpluggable)

    @checked
    def set_state(self, vcpu: int, *, enabled: bool) -> None:
        """Enable or disable one vCPU, with its whole slot, at the next boot.

        Raises:
            ConfigDeniedError: vCPU 0 would be disabled, the id is beyond the maximum, or not the first of its slot.
        """
        self.domain = with_state(self.domain, slot_of(self.domain, vcpu, enabled=enabled), enabled=enabled)

    @checked
    def set_max(self, maximum: int) -> None:
        """Have a maximum of *maximum* vCPUs at the next boot; those above are dropped, with their pins.

        Raises:
            ConfigDeniedError: *maximum* is not 1 to 16384, does not fit the topology or the NUMA cells, or this is
                the record of a running VM.
        """
        if self.is_record and maximum != self.domain.max:
            detail = "a record's maximum is that of the running VM: change the document that it is started from"
            raise ConfigDeniedError(f"maximum {maximum}", VcpuMap(), DenialReason.RECORD_MAXIMUM, detail)
        self.domain = with_max(self.domain, maximum)

    @property
    def placement(self) -> Placement:
        """The placement from the next boot on, as ``domainxml.placement_of`` returns it.

        Setting it replaces all of it, including the places of threads that the new one does not name.

        Raises:
            DomainXmlError: The document has a priority that no kernel has.
        """
        return placement_of(self.domain)

    @placement.setter
    def placement(self, placement: Placement) -> None:
        self.domain = with_placement(self.domain, placement)

    def place(self, placement: Placement) -> None:
        """Put *placement* over that of the next boot; what it does not specify stays.

        The places of disabled vCPUs are kept for when they are plugged. A document cannot express core scheduling,
        ``exclusive`` or the policy, so they are not kept.

        Raises:
            ConfigDeniedError: It names a vCPU beyond the maximum.
            DomainXmlError: The document has a priority that no kernel has.
            ValueError: The sets of an exclusive placement overlap with those that stay.
        """
        if not isinstance(placement, Placement):
            raise TypeError(f"placement is a Placement, not {shorten(placement)}")
        self.domain = with_places(self.domain, placement)

    def to_bytes(self) -> bytes:
        """Return the document that ``save`` would write."""
        return self._document.with_next_boot(self.domain)

    async def save(self) -> None:
        """Write it, durably: all of it or nothing.

        The file keeps its mode and owner, and gets a new inode. If nothing has changed, nothing is written, but
        another writer's change is still detected. Cancelling waits for the disk once, as for a record.

        Raises:
            RecordLockedError: Somebody else has locked the document.
            RecordError: It has changed since it was read, or cannot be written: it is unchanged. ``outcome`` is
                UNKNOWN only where it was replaced and the directory could not be synchronised.
        """
        self._document = await finish_despite_cancel(
            _save_in_thread(self._file, self.path, self._document, self.domain)
        )


def _read(path: Path) -> _Document:
    return _Document.of(path, read_file(path))


def _save(held: LockedFile | None, path: Path, document: _Document, domain: DomainVcpus) -> _Document:
    before, after = document.data, _Document.of(path, document.with_next_boot(domain))
    file = LockedFile(path) if held is None else held
    try:
        file.renew()
        is_same = after.data == before
        if file.read() != before or not (is_same or file.replace(after.data, before=before, keeps_owner=True)):
            raise RecordError(path, "changed by somebody else since it was read; it is left alone")
    finally:
        if held is None:
            file.release()
    return after


_read_in_thread = aiofiles.os.wrap(_read)
_save_in_thread = aiofiles.os.wrap(_save)
_release_in_thread = aiofiles.os.wrap(LockedFile.release)
