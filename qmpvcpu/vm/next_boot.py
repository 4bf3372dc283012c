"""NextBoot: what an attached VM is next started with, and how a change of it follows one of the running VM.

It is kept in the document that ``attach(config=)`` names, else next to the live state in the record. A document is
locked, and read, for as long as a change is under way, so that what was checked before the live change is what is
written after it; concurrent changes share the lock, and are written one after the other.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from qmpvcpu.domainxml import DomainVcpus, domain_from, placement_of, with_placement
from qmpvcpu.domainxml.next_boot import first_free, slot_of, with_map, with_places, with_state
from qmpvcpu.domainxml.placing import has_same_places
from qmpvcpu.engine.intents import Promised
from qmpvcpu.errors import ConfigDeniedError, DomainXmlError, Outcome, RecordError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.transition import ConfigOutcome, ConfigReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.planning.plan import Plan
from qmpvcpu.record.config import DomainConfig
from qmpvcpu.record.file import absolute, finish_despite_cancel
from qmpvcpu.record.owner import Claim, refuse_other_document
from qmpvcpu.record.record import Record
from qmpvcpu.vm.record_writer import RecordWriter

Change = Callable[[DomainVcpus], DomainVcpus]


def and_placed(change: Change, placement: Placement | None) -> Change:
    """Return *change*, after which the next boot also has what *placement* says of QEMU's threads."""
    return change if placement is None else lambda domain: with_places(change(domain), placement)


class NextBoot:
    """The next boot of one VM.

    What reads or changes it raises RecordError if that cannot be done, DomainXmlError if libvirt would not define the
    document, and ConfigDeniedError if the change is not possible; the next boot is as it was then.

    Args:
        writer: Writes the VM's record.
        look: Returns the layout as known now.
        config: The document, or None: the record.

    Attributes:
        path: The document, or None: it is in the record.
        promises: The changes that are promised, in order.
    """

    def __init__(
        self, writer: RecordWriter, look: Callable[[], Layout], config: str | os.PathLike[str] | None
    ) -> None:
        self._writer = writer
        self._look = look
        self.path = None if config is None else absolute(config)
        self._store: _Store | None = None
        self._holders = 0
        self._opening = asyncio.Lock()
        self._writing = asyncio.Lock()
        self.promises: list[PendingConfigChange] = []

    async def check(self) -> None:
        """Read the document once, so that an unusable one is an error before anything depends on it."""
        if self.path is not None:
            config = await DomainConfig.load(self.path)
            refuse_other_document(config.path, config.identity, Claim.of(self._look()))

    async def change(self, change: Change) -> ConfigReport:
        """Change the next boot and nothing else."""
        async with self._held() as store:
            return await self.write(store, change)

    async def place(self, placement: Placement) -> ConfigReport:
        """Have threads run where *placement* has them, from the next boot on; what it does not say stays.

        Raises:
            ValueError: The sets of an exclusive placement overlap with those that stay.
        """
        async with self._held() as store:
            return await self.write(store, lambda domain: with_places(domain, placement), only_places=True)

    async def set_state(self, vcpu: int | None, *, enabled: bool, placement: Placement | None = None) -> VcpuMap:
        """Have one vCPU at the next boot (None: the first free one), or leave it out; return the ids of its slot."""
        ids = VcpuMap()

        def change(domain: DomainVcpus) -> DomainVcpus:
            nonlocal ids
            ids = slot_of(domain, first_free(domain) if vcpu is None else vcpu, enabled=enabled)
            return with_state(domain, ids, enabled=enabled)

        await self.change(and_placed(change, placement))
        return ids

    async def look(self, change: Change) -> ConfigReport:
        """Return whether the next boot is as *change* would make it."""
        async with self._held() as store:
            now = store.domain
            wanted = change(now)
            so = now == wanted
            outcome, why = (ConfigOutcome.UNCHANGED, "") if so else (ConfigOutcome.NOT_TRIED, "not done")
            return ConfigReport(store.path, outcome, now.enabled, wanted.enabled, now.max, why)

    @contextlib.asynccontextmanager
    async def pending(self, change_for: Callable[[Plan], Change]) -> "AsyncIterator[PendingConfigChange]":
        """Hold the next boot for as long as a live change takes that is to be followed by one of it.

        Args:
            change_for: Returns the change that follows a plan of the live one.
        """
        async with self._held() as store:
            pending = PendingConfigChange(self, store, change_for)
            try:
                yield pending
            finally:
                self.drop(pending)

    def drop(self, pending: "PendingConfigChange") -> None:
        """Count *pending* as promised no longer; idempotent."""
        if pending in self.promises:
            self.promises.remove(pending)
        self._writer.changed()

    async def write(self, store: "_Store", change: Change, *, only_places: bool = False) -> ConfigReport:
        """Make *change* in what *store* keeps; *only_places*: it is about no vCPU, only about where threads run."""
        async with self._writing:
            before = store.domain
            domain = change(before)
            await store.write(domain, only_places=only_places)
        outcome = ConfigOutcome.UNCHANGED if domain == before else ConfigOutcome.WRITTEN
        return ConfigReport(store.path, outcome, before.enabled, domain.enabled, domain.max)

    @contextlib.asynccontextmanager
    async def _held(self) -> "AsyncIterator[_Store]":
        self._holders += 1
        try:
            async with self._opening:
                if self._store is None:
                    self._store = await self._open()
                store = self._store
            yield store
        finally:
            self._holders -= 1
            if not self._holders:
                await finish_despite_cancel(self._close())

    async def _close(self) -> None:
        async with self._opening:
            if self._store is not None and not self._holders:
                store, self._store = self._store, None
                await store.close()

    async def _open(self) -> "_Store":
        record = self._writer.record
        if self.path is None and record is not None and not self._writer.is_over:
            return _InRecord(record, self._writer, self._look)
        if self.path is None and record is not None:
            await self._writer.close()  # its lock is needed next
        path = self.path or (record.path if record is not None else None)
        assert path is not None  # noqa: S101 -- JUSTIFICATION: attach makes none without either, mypy cannot know
        return await _InDocument.open(path, self._look())


class PendingConfigChange:
    """A change of the next boot that is to follow one of the running VM; made by ``NextBoot.pending``.

    Attributes:
        change: What is to be changed, once ``promise`` was called.
    """

    def __init__(self, next_boot: NextBoot, store: "_Store", change_for: Callable[[Plan], Change]) -> None:
        self.change: Change = lambda domain: domain
        self._next_boot = next_boot
        self._store = store
        self._change_for = change_for

    def promise(self, plan: Plan) -> None:
        """Make sure that the change is possible, and promise it: it is in the record's intents from here on."""
        change = self._change_for(plan)
        change(self._store.domain)
        self.change = change
        self._next_boot.drop(self)
        self._next_boot.promises.append(self)

    @property
    def promised(self) -> Promised | None:
        """What the next boot is to have once everything promised is done; None: nothing is promised."""
        if not self._next_boot.promises:
            return None
        before, path = self._store.domain, self._next_boot.path
        domain = before
        for each in self._next_boot.promises:
            with contextlib.suppress(ConfigDeniedError):  # another promise may have made it impossible
                domain = each.change(domain)
        placement = None if has_same_places(domain, before) else placement_of(domain)
        return Promised(domain.enabled, None if path is None else str(path), placement)

    async def write(self, done: str) -> tuple[ConfigReport, RecordError | None]:
        """Write what was promised, now that *done* is; return how that ended, and the error if it failed."""
        try:
            return await self._next_boot.write(self._store, self.change), None
        except (RecordError, ConfigDeniedError, DomainXmlError) as error:
            why = error.why if isinstance(error, RecordError) else str(error)
            told = RecordError(
                self._store.path, f"{why}; {done}, and the next boot is as it was", outcome=Outcome.CHANGED
            )
            told.__cause__ = error
            return self._told(ConfigOutcome.FAILED, told.why), told
        finally:
            self._next_boot.drop(self)

    def not_tried(self) -> ConfigReport:
        """Return the report of a change that is not made, since the running VM is not as wanted."""
        return self._told(ConfigOutcome.NOT_TRIED, "the running VM is not as requested")

    def _told(self, outcome: ConfigOutcome, why: str) -> ConfigReport:
        now = self._store.domain
        try:
            wanted = self.change(now).enabled
        except ConfigDeniedError:
            wanted = now.enabled
        return ConfigReport(self._store.path, outcome, now.enabled, wanted, now.max, why)


# Where the next boot is kept. ``domain`` is what it has. ``write`` makes another one the next boot, durably, even
# if it is so already; if that fails, the next boot is as it was.


class _InDocument:
    """A document of its own; or a record that the controller has let go of, since its VM is lost."""

    def __init__(self, config: DomainConfig, stack: contextlib.AsyncExitStack) -> None:
        self._config = config
        self._stack = stack

    @classmethod
    async def open(cls, path: Path, layout: Layout) -> "_InDocument":
        async with contextlib.AsyncExitStack() as stack:
            config = await stack.enter_async_context(DomainConfig.open(path))
            refuse_other_document(config.path, config.identity, Claim.of(layout))
            return cls(config, stack.pop_all())

    @property
    def path(self) -> str:
        return str(self._config.path)

    @property
    def domain(self) -> DomainVcpus:
        return self._config.domain

    async def write(self, domain: DomainVcpus, *, only_places: bool) -> None:  # noqa: ARG002 -- it keeps all of it
        self._config.domain = domain
        try:
            await self._config.save()
        finally:
            self._config.domain = self._config.before

    async def close(self) -> None:
        await self._stack.aclose()


class _InRecord:
    """A map and a placement in the record, next to the live state."""

    def __init__(self, record: Record, writer: RecordWriter, look: Callable[[], Layout]) -> None:
        self._record = record
        self._writer = writer
        self._look = look
        self._seen: tuple[Layout, DomainVcpus] | None = None

    @property
    def path(self) -> str:
        return str(self._record.path)

    @property
    def domain(self) -> DomainVcpus:
        layout = self._look()
        if self._seen is None or self._seen[0] is not layout:
            self._seen = layout, domain_from(layout)
        wish, placement = self._record.next_boot, self._record.next_placement
        domain = self._seen[1] if wish is None else with_map(self._seen[1], wish)
        if placement is None:
            placement = self._record.placement
        return domain if placement is None else with_placement(domain, placement)

    async def write(self, domain: DomainVcpus, *, only_places: bool) -> None:
        record = self._record
        before = record.next_boot, record.next_placement
        # Even if the VM has just these as it runs: from here on the next boot no longer follows it.
        wish = before[0] if only_places else domain.enabled
        is_placed_so = has_same_places(domain, self.domain) and not only_places
        wanted = wish, before[1] if is_placed_so else placement_of(domain)
        if before == wanted:
            return
        record.next_boot, record.next_placement = wanted
        try:
            await self._writer.save()
        except RecordError:
            record.next_boot, record.next_placement = before
            raise

    async def close(self) -> None:
        pass


_Store = _InDocument | _InRecord
