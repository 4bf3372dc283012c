"""What the vCPUs of one VM have done, as QEMU and its host count it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class VcpuStatistics:
    """What one vCPU has done since its thread began; None is what cannot be had.

    Attributes:
        id: The vCPU.
        host_tid: Its thread, by QEMU's own number.
        run_s: How long it ran on a host CPU, in seconds.
        delay_s: How long it was ready and waited for a host CPU, in seconds: what the guest sees as steal time.
        wait_s: The same as the kernel's schedstats count it, in seconds; None where they are switched off.
        turns: How often it was given a host CPU.
        halted: True if it has nothing to do just now; only KVM tells.
        host_cpu: The host CPU that it ran on last.
        kvm: What KVM counts of it, by the names of ``query-stats``: numbers, truth values, or the columns of a
            histogram; empty under TCG.

    Source: the kernel's scheduler/sched-stats.rst; proc(5), ``/proc/pid/stat``; QEMU qapi/stats.json.
    """

    id: int
    host_tid: int | None = None
    run_s: float | None = None
    delay_s: float | None = None
    wait_s: float | None = None
    turns: int | None = None
    halted: bool | None = None
    host_cpu: int | None = None
    kvm: Mapping[str, int | bool | tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VmStatistics:
    """What the vCPUs of one VM have done.

    Attributes:
        name: The VM.
        at: When it was read, in seconds since 1970.
        vcpus: The vCPUs that are plugged, by ascending id.
        why_incomplete: Why something is missing that others have, such as that QEMU runs on another host; or "".
    """

    name: str
    at: float
    vcpus: tuple[VcpuStatistics, ...]
    why_incomplete: str = ""
