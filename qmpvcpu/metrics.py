"""Metrics for Prometheus: what vCPUs do, how their changes end, and how long they take; extra ``metrics``.

``VcpuCollector`` is a prometheus-client collector: it registers itself in a registry, and a server of that registry
serves these metrics. docs/metrics.md lists names, labels and units.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Self, TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

import qmpvcpu
from qmpvcpu.errors import MonitorLostError, QmpVcpuError, SocketDirectoryError, clip, printable
from qmpvcpu.events import (
    Event,
    PlaceDrifted,
    UnplugAcknowledged,
    UnplugPending,
    UnplugRefused,
    UnplugRequested,
    VcpuPlaced,
    VcpuPlugged,
    VcpuProven,
    VcpuUnplugged,
)
from qmpvcpu.fleet import Fleet
from qmpvcpu.model.counters import EXITS, HALTED
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Proof
from qmpvcpu.model.statistics import VcpuStatistics, VmStatistics
from qmpvcpu.model.transition import Action, TransitionOutcome, TransitionReport
from qmpvcpu.model.verdicts import EJECTION_REASONS
from qmpvcpu.vm.connection import Trouble
from qmpvcpu.vm.controller import VcpuController

if TYPE_CHECKING:
    from qmpvcpu.vm.subscribers import EventStream

__all__ = ["VcpuCollector", "exposition", "process_registry"]

_T = TypeVar("_T")

# A reading ends when no VM has answered for so long: the others are silent, and nobody waits for them.
_QUIET_S: Final = 0.2
# A VM that was silent the last time is waited for no longer than this.
_SHORT_S: Final = 0.02
# Another thread than the event loop's waits for a reading no longer than this.
_LONGEST_S: Final = 5.0
# A VM of a fleet that was just found is being attached: until that has ended, but no longer than this, there are no
# metrics of it.
_NEW_S: Final = 5.0

_COUNTERS: Final = (*EXITS, HALTED)

_PLACED: Final = "placed"
_MOST_LETTERS: Final = 100
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# Events that are counted from 0 on, so that the first one shows as an increase.
_COUNTED_FROM_0: Final = (VcpuPlugged, VcpuUnplugged, UnplugRequested, UnplugRefused, UnplugPending, PlaceDrifted)
# A guest can answer with any of four billion numbers: a label for each that ACPI has a meaning for, and for 0, with
# which it said that the vCPU is gone, and kept it.
_CODES: Final = {code: f"{code:#04x}" for code in (0, *EJECTION_REASONS)}


@dataclass(frozen=True)
class _Seen:
    """One VM at the end of a reading, for a scrape in any thread.

    Attributes:
        label: What it is called.
        address: Where its QMP is.
        up: True if it answered.
        layout: Its layout, which follows events; None where it is not attached, or lost.
        statistics: What it answered last; None as above.
        read_at: When it did, in seconds of the monotonic clock.
        pending_since: Since when its oldest pending removal is known, likewise; None: none is pending.
        drifted: How many threads have drifted from their place; None as above.
        unplaced: How many vCPUs could not be put in their place when they were plugged.
        events: How many events of each kind there were.
        refusals: How many removals were refused with each code.
    """

    label: str
    address: str
    up: bool
    layout: Layout | None
    statistics: VmStatistics | None
    read_at: float | None
    pending_since: float | None
    drifted: int | None
    unplaced: int
    events: Mapping[str, int]
    refusals: Mapping[str, int]


class _Metric(NamedTuple, Generic[_T]):
    """One metric: its name, what it tells, and its value; None where that cannot be had."""

    name: str
    tells: str
    value: Callable[[_T], float | None]

    def of(self, labels: tuple[str, ...], subjects: Iterable[tuple[tuple[str, ...], _T]]) -> Metric:
        """Return the metric of *subjects*, each with the values of its *labels*."""
        values = ((each, self.value(subject)) for each, subject in subjects)
        return _family(self.name, self.tells, labels, values)


def _family(
    name: str, tells: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float | None]]
) -> Metric:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, tells, labels=labels)
    for each, value in values:
        if value is not None:
            family.add_metric(each, value)
    return family


def _age(since: float | None) -> float | None:
    return None if since is None else time.monotonic() - since


_OF_A_VM: Final[tuple[_Metric[_Seen], ...]] = (
    _Metric("qmpvcpu_up", "1 if the VM answered this scrape.", lambda vm: vm.up),
    _Metric("qmpvcpu_reading_age_seconds", "How old the statistics of the VM are.", lambda vm: _age(vm.read_at)),
    _Metric(
        "qmpvcpu_pending_age_seconds",
        "For how long the oldest removal without an answer is known.",
        lambda vm: _age(vm.pending_since),
    ),
    _Metric(
        "qmpvcpu_threads_drifted",
        "Threads that have drifted from their place on the host.",
        lambda vm: vm.drifted,
    ),
    _Metric("qmpvcpu_unplaced_total", "Plugged vCPUs that could not be put in their place.", lambda vm: vm.unplaced),
)
_OF_A_LAYOUT: Final[tuple[_Metric[Layout], ...]] = (
    _Metric("qmpvcpu_vcpus_plugged", "vCPUs that are plugged.", lambda layout: len(layout.enabled)),
    _Metric("qmpvcpu_vcpus_maximum", "vCPUs that the machine can have.", lambda layout: layout.max),
    _Metric("qmpvcpu_vcpus_pending", "vCPUs whose removal the guest has not answered.", lambda vm: len(vm.pending)),
    _Metric("libvirt_domain_vcpu_current", "vCPUs that are plugged.", lambda layout: len(layout.enabled)),
    _Metric("libvirt_domain_vcpu_maximum", "vCPUs that the machine can have.", lambda layout: layout.max),
)
_OF_A_VCPU: Final[tuple[_Metric[VcpuStatistics], ...]] = (
    _Metric("libvirt_domain_vcpu_time_seconds_total", "Time that it ran on a host CPU.", lambda vcpu: vcpu.run_s),
    _Metric(
        "libvirt_domain_vcpu_delay_seconds_total",
        "Time that it was ready and waited for a host CPU, which the guest sees as steal time.",
        lambda vcpu: vcpu.delay_s,
    ),
    _Metric(
        "libvirt_domain_vcpu_wait_seconds_total",
        "The same as the host's schedstats count it; none where they are off.",
        lambda vcpu: vcpu.wait_s,
    ),
    _Metric("libvirt_domain_vcpu_state", "1 running, 2 blocked (halted).", lambda vcpu: 2 if vcpu.halted else 1),
    _Metric("libvirt_domain_vcpu_cpu", "The host CPU that it ran on last.", lambda vcpu: vcpu.host_cpu),
    _Metric("qmpvcpu_vcpu_turns_total", "How often it was given a host CPU.", lambda vcpu: vcpu.turns),
    _Metric("qmpvcpu_vcpu_halted", "1 if it has nothing to do just now; KVM tells.", lambda vcpu: vcpu.halted),
    _Metric("qmpvcpu_vcpu_kvm_exits_total", "How often it left guest mode; KVM tells.", lambda vcpu: vcpu.kvm.exits),
)
_INFO: Final = ("address", "uuid", "machine", "accelerator", "qemu")


def _safe(text: str) -> str:
    """Return *text* from outside as the value of a label."""
    return clip(printable(text), _MOST_LETTERS)


def _told(vm: _Seen, layout: Layout) -> tuple[str, ...]:
    """Return the values of ``_INFO``."""
    info = layout.vm
    version = ".".join(map(str, info.qemu_version))
    return tuple(map(_safe, (vm.address, info.uuid or "", info.machine, info.accelerator, version)))


class _Operations:
    """How long changes took, and how they ended: of all VMs together, so that there are few."""

    def __init__(self) -> None:
        self._stages = Histogram(
            "qmpvcpu_stage_seconds",
            "How long changes of vCPUs took to reach each stage.",
            ("action", "stage"),
            registry=None,
            buckets=_BUCKETS,
        )
        self._transitions = Histogram(
            "qmpvcpu_transition_seconds",
            "How long changes of whole maps took, by outcome; of those that observe() was given.",
            ("outcome",),
            registry=None,
            buckets=_BUCKETS,
        )
        self._steps: Counter[tuple[str, str]] = Counter()
        for proof in Proof:
            self._stages.labels("plug", proof.value)
        self._stages.labels("plug", _PLACED)
        for stage in ("acknowledged", "gone", "refused"):
            self._stages.labels("unplug", stage)
        for outcome in TransitionOutcome:
            self._transitions.labels(outcome.value)

    def reached(self, action: str, stage: str, seconds: float) -> None:
        """Count that a change took so long to reach *stage*."""
        self._stages.labels(action, stage).observe(seconds)

    def ended(self, report: TransitionReport) -> None:
        """Count how a change of the whole map ended."""
        self._transitions.labels(report.outcome.value).observe(report.seconds)
        for step in report.steps:
            self._steps[step.action.value, step.word.lower() or "not sent"] += 1
            if step.action is Action.PLUG and step.proofs is not None and step.proofs.present is not None:
                self.reached("plug", Proof.PRESENT.value, step.proofs.present)  # no event tells it

    def collect(self) -> Iterator[Metric]:
        """Return all of it."""
        yield from self._stages.collect()
        yield from self._transitions.collect()
        tells = "Steps of changes that observe() was given, by how they ended."
        yield _family("qmpvcpu_steps_total", tells, ("action", "verdict"), [*self._steps.items()])


class _Member:
    """One VM: what is known of it, and the reading that is under way.

    Attributes:
        address: Where its QMP is.
        name: What it is called, now or when it was last attached.
        label: The same, made different from that of every other VM.
    """

    def __init__(self, address: str, operations: _Operations) -> None:
        self.address = address
        self.name = _safe(address)  # until it is known better
        self.label = ""
        self._trouble = Trouble(f"no metrics of {address}", address)
        self._gaps = Trouble(f"not all metrics of {address}", address)
        self._operations = operations
        self._found_at = time.monotonic()
        self._failed = False
        self._vm: VcpuController | None = None
        self._stream: EventStream | None = None
        self._reading: asyncio.Task[None] | None = None
        self._answered = True  # as far as it was asked
        self._lost = False
        self._statistics: VmStatistics | None = None
        self._read_at: float | None = None
        self._pending: dict[int, float] = {}  # by first vCPU of a slot: since when its removal is known to be pending
        self._requested: dict[int, float] = {}  # likewise: when it was last asked for
        self._events = Counter({kind.__name__: 0 for kind in _COUNTED_FROM_0})
        self._refusals: Counter[str] = Counter()
        self._unplaced = 0

    @property
    def is_new(self) -> bool:
        """True while it is being attached for the first time."""
        tried = self._vm is not None or self._failed or self._read_at is not None
        return not tried and time.monotonic() - self._found_at < _NEW_S

    def follow(self, vm: VcpuController | None) -> None:
        """Read and hear *vm* from now on; None: it is not attached."""
        if vm is self._vm:
            return
        self.let_go()
        self._vm, self._answered, self._lost = vm, True, False
        if vm is not None:
            self.name = _safe(vm.layout.vm.name)
            self._stream = vm.events()
            self._stream.on_news = self._take_events
            self._take_events()

    def let_go(self) -> None:
        """Read and hear it no more."""
        if self._stream is not None:
            self._stream.on_news = None
        if self._reading is not None:
            self._reading.cancel()
        self._vm = self._stream = self._reading = self._statistics = None
        self._requested.clear()

    def failed(self, error: Exception) -> None:
        """Note that it cannot be attached."""
        self._failed = True
        self._trouble.failed(error)

    def begin(self) -> None:
        """Begin a reading, unless the last one is still without an answer."""
        if self._vm is not None and self.reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read(self._vm))

    @property
    def reading(self) -> asyncio.Task[None] | None:
        """The reading that is under way, or None."""
        return None if self._reading is None or self._reading.done() else self._reading

    @property
    def is_awaited(self) -> bool:
        """True if there is a reading under way of a VM that answered the last time."""
        return self._answered and self.reading is not None

    async def _read(self, vm: VcpuController) -> None:
        try:
            self._statistics = await vm.statistics(kvm=_COUNTERS)
        except Exception as error:  # noqa: BLE001 -- JUSTIFICATION: one VM's failure is none of the scrape's
            self._answered, self._lost = False, isinstance(error, MonitorLostError)
            self._trouble.failed(error)
        else:
            self._answered, self._lost, self._read_at = True, False, time.monotonic()
            self._trouble.over()
            if why := self._statistics.why_incomplete:
                self._gaps.failed(QmpVcpuError(why))
            else:
                self._gaps.over()

    def look(self) -> _Seen:
        """Return what is known at the end of a reading."""
        if self.reading is not None:
            self._answered = False
        is_here = self._vm is not None and not self._lost
        layout = self._vm.layout if self._vm is not None and is_here else None
        now = time.monotonic()
        pending = () if layout is None else layout.pending_slots
        self._pending = {first: self._pending.get(first, now) for first in pending}
        return _Seen(
            label=self.label,
            address=self.address,
            up=is_here and self._answered and self._read_at is not None,
            layout=layout,
            statistics=self._statistics if is_here else None,
            read_at=self._read_at,
            pending_since=min(self._pending.values(), default=None),
            drifted=len(self._vm.host.drifted) if self._vm is not None and is_here else None,
            unplaced=self._unplaced,
            events=dict(self._events),
            refusals=dict(self._refusals),
        )

    def _take_events(self) -> None:
        while self._stream is not None and (event := self._stream.take()) is not None:
            self._take(event)

    def _take(self, event: Event) -> None:
        self._events[type(event).__name__] += 1
        now = time.monotonic()
        match event:
            case VcpuProven(proof=proof, seconds=float(seconds)):
                self._operations.reached("plug", proof.value, seconds)
            case VcpuPlaced(why_not="", seconds=float(seconds)):
                self._operations.reached("plug", _PLACED, seconds)
            case VcpuPlaced(why_not=why_not) if why_not:
                self._unplaced += 1
            case UnplugRequested(ids=ids):
                self._requested[ids.lowest] = now
                self._pending.setdefault(ids.lowest, now)
            case UnplugAcknowledged(ids=ids):
                self._reached("acknowledged", self._requested.get(ids.lowest))
            case VcpuUnplugged(ids=ids):
                self._reached("gone", self._requested.pop(ids.lowest, None))
            case UnplugRefused(ids=ids, code=code):
                self._refusals["none" if code is None else _CODES.get(code, "other")] += 1
                self._reached("refused", self._requested.pop(ids.lowest, None))

    def _reached(self, stage: str, requested: float | None) -> None:
        if requested is not None:
            self._operations.reached("unplug", stage, time.monotonic() - requested)


class VcpuCollector:
    """A prometheus-client collector for the vCPUs of VMs; it registers itself, as ``ProcessCollector`` does.

    Each scrape reads every VM, all at once: ``await collector.read()`` in the event loop of the VMs, and then render
    the registry. If the registry is rendered in another thread (``prometheus_client.start_http_server``), it is read
    from there. If it is rendered in the event loop without ``read``, a scrape has what was read for the one before. A
    VM that does not answer delays no scrape: it has ``qmpvcpu_up`` 0, and the values that it answered last.

    VMs of a fleet are found, attached, and attached again here, as long as the fleet is open. Leaving the context
    (``async with``) or ``close`` unregisters it; the VMs stay as they are.

    Args:
        *sources: Each a ``VcpuController`` or a ``Fleet``; ``add`` and ``remove`` change them later.
        registry: Where to register; None: nowhere.
        rescan_interval: How often fleets look for VMs that came and went, in seconds.

    Raises:
        ValueError: The registry has such a collector: one is enough for all VMs.
        RuntimeError: No event loop runs.

    Example:
        >>> registry = CollectorRegistry()
        >>> vm = await qmpvcpu.attach("/run/vm.qmp", name="vm")
        >>> async with VcpuCollector(vm, registry=registry) as collector:
        ...     await collector.read()
        ...     print('qmpvcpu_vcpus_maximum{domain="vm"} 8.0' in exposition(registry)[1].decode())
        True
        >>> await vm.close()
    """

    def __init__(
        self,
        *sources: VcpuController | Fleet,
        registry: CollectorRegistry | None = REGISTRY,
        rescan_interval: float = 5.0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._registry = registry
        self._rescan_interval = rescan_interval
        self._operations = _Operations()
        self._fleets: dict[Fleet, asyncio.Task[None]] = {}
        self._members: dict[tuple[VcpuController | Fleet, str], _Member] = {}
        self._seen: tuple[_Seen, ...] = ()
        self._round: asyncio.Task[None] | None = None
        self._is_fresh = False
        self._took_s = 0.0
        if registry is not None:
            registry.register(self)
        for source in sources:
            self.add(source)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        attaching = [*self._fleets.values()]
        self.close()
        if attaching:  # a connection that is being made is closed in order, if nobody hurries it
            await asyncio.wait(attaching)

    def close(self) -> None:
        """Unregister it and let go of the VMs; idempotent."""
        if self._registry is not None:
            self._registry.unregister(self)
            self._registry = None
        for source in {*self._fleets, *(source for source, _ in self._members)}:
            self.remove(source)
        if self._round is not None:
            self._round.cancel()

    def add(self, source: VcpuController | Fleet) -> None:
        """Have metrics of a VM, or of a fleet, from now on.

        Raises:
            TypeError: The fleet is of other hosts: have an exporter on each.
        """
        if isinstance(source, VcpuController):
            self._member(source, printable(source.address)).follow(source)
        elif source not in self._fleets:
            if not source.is_local:
                raise TypeError("these are VMs of other hosts: have an exporter on each, qmpvcpu exporter")
            self._fleets[source] = self._loop.create_task(self._keep_attached(source))

    def remove(self, source: VcpuController | Fleet) -> None:
        """Have no more metrics of a VM, or of a fleet."""
        if isinstance(source, Fleet) and (task := self._fleets.pop(source, None)) is not None:
            task.cancel()
        for key in [key for key in self._members if key[0] is source]:
            self._members.pop(key).let_go()

    def observe(self, report: TransitionReport | None) -> None:
        """Count how a change of the whole map ended, which no event tells; None, as a VmResult may have, is none."""
        if report is not None:
            self._operations.ended(report)

    async def read(self) -> None:
        """Read all VMs, for the scrape that follows; a reading that is under way is joined.

        It takes as long as those VMs take that answer; the others add some tenths of a second, once.
        """
        await asyncio.shield(self._begin())
        self._is_fresh = True

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without their values, as registries want them."""
        return self._families(())

    def collect(self) -> Iterable[Metric]:
        """Return the metrics, as registries want them; the class says as of when."""
        if not self._is_own_loop():
            self._read_from_elsewhere()
        elif not self._is_fresh:
            self._begin()
        self._is_fresh = False
        return self._families(self._seen)

    # Reading.

    def _is_own_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _read_from_elsewhere(self) -> None:
        if not self._loop.is_running():
            return
        reading = asyncio.run_coroutine_threadsafe(self.read(), self._loop)
        with contextlib.suppress(TimeoutError):
            reading.result(_LONGEST_S)

    def _begin(self) -> "asyncio.Task[None]":
        if self._round is None or self._round.done():
            self._round = self._loop.create_task(self._read_all())
        return self._round

    async def _read_all(self) -> None:
        started = time.monotonic()
        for fleet in self._fleets:
            self._follow_all(fleet)
        members = [*self._members.values()]
        for member in members:
            member.begin()
        if readings := [reading for member in members if (reading := member.reading) is not None]:
            await asyncio.wait(readings, timeout=_SHORT_S)
        while waiting := [member.reading for member in members if member.is_awaited]:
            answered, _ = await asyncio.wait([each for each in waiting if each is not None], timeout=_QUIET_S)
            if not answered:
                break
        known = [member for member in members if not member.is_new]
        _give_labels(known)
        self._seen = tuple(member.look() for member in known)
        self._took_s = time.monotonic() - started

    def _member(self, source: VcpuController | Fleet, address: str) -> _Member:
        key = source, address
        if key not in self._members:
            self._members[key] = _Member(address, self._operations)
        return self._members[key]

    def _follow_all(self, fleet: Fleet) -> None:
        """Have a member for each VM of *fleet*, and for no other."""
        vms, addresses = fleet.vms, {*fleet.addresses}
        for key in [key for key in self._members if key[0] is fleet and key[1] not in addresses]:
            self._members.pop(key).let_go()
        for address in fleet.addresses:
            self._member(fleet, address).follow(vms.get(address))

    async def _keep_attached(self, fleet: Fleet) -> None:
        """Attach the VMs of *fleet* again and again, and those that come at once: others may be silent for long."""
        unreadable = Trouble("cannot look for VMs", "")
        attaching = self._loop.create_task(self._attach(fleet))
        try:
            while True:
                await asyncio.sleep(self._rescan_interval)
                came = await _rescan(fleet, unreadable)
                if came and not attaching.done():
                    attaching.cancel()
                    await asyncio.wait([attaching])
                if attaching.done():
                    attaching = self._loop.create_task(self._attach(fleet))
        finally:
            attaching.cancel()
            await asyncio.wait([attaching])

    async def _attach(self, fleet: Fleet) -> None:
        try:
            attaching = fleet.attach()
        except RuntimeError:  # it is closed
            return
        async with contextlib.aclosing(attaching) as results:
            async for result in results:
                if isinstance(result.error, Exception):
                    self._member(fleet, result.address).failed(result.error)

    # Rendering.

    def _families(self, seen: Sequence[_Seen]) -> Iterator[Metric]:
        by_vm = [((vm.label,), vm) for vm in seen]
        layouts = [((vm.label,), vm.layout) for vm in seen if vm.layout is not None]
        vcpus = [
            ((vm.label, str(vcpu.id)), vcpu)
            for vm in seen
            if vm.statistics is not None
            for vcpu in vm.statistics.vcpus
        ]
        yield from (each.of(("domain",), by_vm) for each in _OF_A_VM)
        yield from (each.of(("domain",), layouts) for each in _OF_A_LAYOUT)
        yield from (each.of(("domain", "vcpu"), vcpus) for each in _OF_A_VCPU)
        told = [((vm.label, *_told(vm, vm.layout)), 1) for vm in seen if vm.layout is not None]
        yield _family("qmpvcpu_vm_info", "What the VM is; always 1.", ("domain", *_INFO), told)
        events = [((vm.label, kind), count) for vm in seen for kind, count in vm.events.items()]
        yield _family("qmpvcpu_events_total", "Events of the VM, by their class.", ("domain", "event"), events)
        refusals = [((vm.label, code), count) for vm in seen for code, count in vm.refusals.items()]
        yield _family(
            "qmpvcpu_unplug_refusals_total", "Removals that the guest refused.", ("domain", "code"), refusals
        )
        yield from self._operations.collect()
        yield _family("qmpvcpu_scrape_duration_seconds", "How long reading the VMs took.", (), [((), self._took_s)])
        yield _family("qmpvcpu_build_info", "The version; always 1.", ("version",), [((qmpvcpu.__version__,), 1)])


def _give_labels(members: Iterable[_Member]) -> None:
    """Label each VM with its name, and one whose name another has with its address too."""
    taken = set[str]()
    for member in members:
        name = member.name
        member.label = f"{name} ({printable(member.address)})" if name in taken else name
        taken.add(member.label)


async def _rescan(fleet: Fleet, trouble: Trouble) -> bool:
    """Have *fleet* look for VMs, and return whether any came."""
    if fleet.directory is None:
        return False
    try:
        came, _ = await fleet.rescan()
    except SocketDirectoryError as error:
        trouble.failed(error)
        return False
    trouble.over()
    return bool(came)


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[str, bytes]:
    """Return the metrics of *registry* as an HTTP response has them: content type and body.

    Args:
        registry: The registry.
        accept: The request's Accept header, which chooses between Prometheus' text format and OpenMetrics; one that
            makes no sense gets the text format.
    """
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # it reads version=abc, and compares that with numbers
        encode, content_type = choose_encoder("")
    return content_type, encode(registry)


def process_registry() -> CollectorRegistry:
    """Return a new registry with the metrics of this process itself: its CPU time, memory and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
