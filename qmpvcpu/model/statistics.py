"""What the vCPUs of one VM have done, as QEMU and its host count it, and what they did between two readings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from qmpvcpu.model.counters import NO_COUNTERS, KvmCounters

# A thread is read some time after the clock is: a share may be that much more than the whole.
_MOST_SHARE: Final = 1.05


@dataclass(frozen=True, slots=True)
class VcpuStatistics:
    """What one vCPU has done since its thread began; None: not available.

    Attributes:
        id: The vCPU.
        host_tid: Its thread id, as QEMU reports it.
        run_s: How long it ran on a host CPU, in seconds.
        delay_s: How long it was ready and waited for a host CPU, in seconds: what the guest sees as steal time.
        wait_s: How long it waited, as counted by the kernel's schedstats, in seconds; None if they are off, which is
            usual.
        turns: How often it was given a host CPU.
        halted: True if it is idle at the moment. Needs KVM and QEMU 8.1 or newer: an older QEMU wakes a vCPU to read
            its counters.
        host_cpu: The host CPU it last ran on.
        kvm: KVM's counters, which may include an earlier vCPU in its slot; empty under TCG.

    Source: the kernel's scheduler/sched-stats.rst; proc(5), ``/proc/pid/stat``; QEMU qapi/stats.json, and
    accel/kvm/kvm-all.c, ``kvm_park_vcpu()``.
    """

    id: int
    host_tid: int | None = None
    run_s: float | None = None
    delay_s: float | None = None
    wait_s: float | None = None
    turns: int | None = None
    halted: bool | None = None
    host_cpu: int | None = None
    kvm: KvmCounters = NO_COUNTERS

    def since(self, earlier: "VcpuStatistics | None", seconds: float) -> "VcpuRates":
        """Return what it did in the *seconds* since the *earlier* reading, None if it was not plugged then."""
        if earlier is not None and not _has_another_thread(self, earlier):
            return self._grown(earlier, seconds, _growth(self.kvm, earlier.kvm, seconds))
        if (self.run_s or 0.0) + (self.delay_s or 0.0) > seconds * _MOST_SHARE:  # it was there, and not read
            return VcpuRates(self.id, restarted=True)
        return replace(self._grown(_UNBORN, seconds, {}), restarted=True)

    def _grown(self, before: "VcpuStatistics", seconds: float, kvm: Mapping[str, float]) -> "VcpuRates":
        turns = None if self.turns is None or before.turns is None else (self.turns - before.turns) / seconds
        run = _share(self.run_s, before.run_s, seconds)
        delay = _share(self.delay_s, before.delay_s, seconds)
        return VcpuRates(self.id, run, delay, _share(self.wait_s, before.wait_s, seconds), turns, kvm)


_UNBORN: Final = VcpuStatistics(-1, run_s=0.0, delay_s=0.0, wait_s=0.0, turns=0)


def _has_another_thread(now: VcpuStatistics, before: VcpuStatistics) -> bool:
    """Tell whether its thread is another than it was, by its number, or by a count that has fallen."""
    if None not in (now.host_tid, before.host_tid) and now.host_tid != before.host_tid:
        return True
    pairs = (now.run_s, before.run_s), (now.delay_s, before.delay_s), (now.turns, before.turns)
    return any(mine is not None and its is not None and mine < its for mine, its in pairs)


def _share(now: float | None, before: float | None, seconds: float) -> float | None:
    return None if now is None or before is None else min(max(now - before, 0.0) / seconds, 1.0)


def _growth(now: KvmCounters, before: KvmCounters, seconds: float) -> dict[str, float]:
    """Return how much each number grew in a second; one that is lower than it was did not only grow."""
    growth: dict[str, float] = {}
    for name, value in now.items():
        its = before.get(name)
        if type(value) is int and type(its) is int and value >= its:  # a truth value is an int to isinstance
            growth[name] = (value - its) / seconds
    return growth


@dataclass(frozen=True, slots=True)
class VcpuRates:
    """What one vCPU did between two readings; None: not available.

    Attributes:
        id: The vCPU.
        run: The share of the time in which it ran on a host CPU, from 0 to 1.
        delay: The share in which it was ready and waited for a host CPU, from 0 to 1.
        wait: The same by ``VcpuStatistics.wait_s``.
        turns: How often it was given a host CPU, per second.
        kvm: How much KVM's numeric counters grew, per second. Those that have fallen are left out.
        restarted: True if its thread began after the earlier reading: the vCPU was plugged since then, or unplugged
            and plugged again, or QEMU was replaced. The shares are then those of the new thread, over the whole time,
            and ``kvm`` is empty, since KVM's counters may include an earlier vCPU.
    """

    id: int
    run: float | None = None
    delay: float | None = None
    wait: float | None = None
    turns: float | None = None
    kvm: Mapping[str, float] = field(default_factory=dict)
    restarted: bool = False

    @property
    def idle(self) -> float | None:
        """The share in which it neither ran nor waited for a host CPU; its guest may have halted it."""
        return None if self.run is None or self.delay is None else max(1.0 - self.run - self.delay, 0.0)


@dataclass(frozen=True, slots=True)
class VmRates:
    """What the vCPUs of one VM did between two readings.

    Attributes:
        name: The VM.
        seconds: How long it was from one reading to the other.
        vcpus: The vCPUs of the later reading, by ascending id.
    """

    name: str
    seconds: float
    vcpus: tuple[VcpuRates, ...]

    def __getitem__(self, vcpu: int) -> VcpuRates:
        return _of(self.vcpus, vcpu)


@dataclass(frozen=True, slots=True)
class VmStatistics:
    """What the vCPUs of one VM have done; ``statistics[3]`` is that of vCPU 3.

    Attributes:
        name: The VM.
        at: When it was read, in seconds since 1970.
        clock: The same by the host's monotonic clock, in seconds: for the time between two readings.
        vcpus: The vCPUs that are plugged, by ascending id.
        why_incomplete: Why values are missing, for example because QEMU runs on another host; or "".
    """

    name: str
    at: float
    clock: float
    vcpus: tuple[VcpuStatistics, ...]
    why_incomplete: str = ""

    def __getitem__(self, vcpu: int) -> VcpuStatistics:
        return _of(self.vcpus, vcpu)

    def since(self, earlier: "VmStatistics") -> VmRates:
        """Return what the vCPUs did since an *earlier* reading of the same VM, taken on the same host.

        Raises:
            ValueError: *earlier* is not earlier: it is this one, or of another boot of the host.
        """
        seconds = self.clock - earlier.clock
        if seconds <= 0:
            raise ValueError("rates need an earlier reading, but this one is not earlier: are the two swapped?")
        before = {vcpu.id: vcpu for vcpu in earlier.vcpus}
        return VmRates(self.name, seconds, tuple(vcpu.since(before.get(vcpu.id), seconds) for vcpu in self.vcpus))


_V = TypeVar("_V", VcpuStatistics, VcpuRates)


def _of(vcpus: tuple[_V, ...], vcpu: int) -> _V:
    found = next((each for each in vcpus if each.id == vcpu), None)
    if found is None:
        raise KeyError(f"vCPU {vcpu} is not plugged")
    return found
