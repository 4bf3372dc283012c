"""Where QEMU's threads should run on the host, and how they are scheduled; and what the host allows."""

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final

from qmpvcpu import given
from qmpvcpu.errors import InvalidMapError, shorten
from qmpvcpu.model.vcpumap import VcpuMap, union

LOWEST_PRIORITY: Final = 1
HIGHEST_PRIORITY: Final = 99

_NO_CPUS: Final = VcpuMap()
_SCHEDULER: Final = re.compile(r"([a-z]+)(?::(-?[0-9]{1,9}))?")


class SchedPolicy(enum.Enum):
    """A scheduling policy of the host's kernel, in libvirt's words.

    OTHER: the kernel's default. BATCH: as OTHER, for work that nobody waits for. IDLE: only when nothing else runs.
    FIFO, RR: real time, with a priority from 1 to 99.

    Source: sched(7); libvirt formatdomain, ``vcpusched``.
    """

    OTHER = "other"
    BATCH = "batch"
    IDLE = "idle"
    FIFO = "fifo"
    RR = "rr"

    @property
    def is_realtime(self) -> bool:
        """True if it has a priority."""
        return self in (SchedPolicy.FIFO, SchedPolicy.RR)


@dataclass(frozen=True, slots=True)
class Scheduler:
    """How a thread is scheduled; ``parse`` reads what ``str()`` returns.

    Attributes:
        policy: The policy.
        priority: 1 to 99 for FIFO and RR; None for the others.

    Raises:
        TypeError: One of them is of another kind.
        ValueError: The priority does not go with the policy.
    """

    policy: SchedPolicy
    priority: int | None = None

    def __post_init__(self) -> None:
        given.member("policy", self.policy, SchedPolicy)
        if self.priority is not None:
            object.__setattr__(self, "priority", given.whole("priority", self.priority))
        if not self.policy.is_realtime:
            if self.priority is not None:
                raise ValueError(f"scheduler {self.policy.value} has no priority: only fifo and rr have one")
        elif self.priority is None:
            raise ValueError(f"scheduler {self.policy.value} needs a priority, such as {self.policy.value}:10")
        elif not LOWEST_PRIORITY <= self.priority <= HIGHEST_PRIORITY:
            said = f"not {self.priority}"
            raise ValueError(f"a priority is {LOWEST_PRIORITY} to {HIGHEST_PRIORITY} (the highest), {said}")

    def __str__(self) -> str:
        return self.policy.value if self.priority is None else f"{self.policy.value}:{self.priority}"

    @classmethod
    def parse(cls, text: str) -> "Scheduler":
        """Read ``other``, ``batch``, ``idle``, ``fifo:PRIORITY`` or ``rr:PRIORITY``.

        Raises:
            ValueError: It is none of these.
        """
        found = _SCHEDULER.fullmatch(given.text("a scheduler", text).strip())
        if found is None or found[1] not in {policy.value for policy in SchedPolicy}:
            raise ValueError(
                f"{shorten(text)} is not a scheduler: use other, batch, idle, fifo:PRIORITY or rr:PRIORITY"
            )
        return cls(SchedPolicy(found[1]), None if found[2] is None else int(found[2]))


class CoreScheduling(enum.Enum):
    """Which threads of a VM share no core with other programs, in the words of ``sched_core`` in libvirt's qemu.conf.

    NONE: change nothing. VCPUS: the vCPU threads are one group. EMULATOR: all threads of QEMU are one group.

    Source: the kernel's admin-guide/hw-vuln/core-scheduling.rst.
    """

    NONE = "none"
    VCPUS = "vcpus"
    EMULATOR = "emulator"


class PlacementPolicy(enum.Enum):
    """What happens to a vCPU that was plugged, but cannot be put in its place.

    REQUIRED: it is taken out again, and the step fails. PREFERRED: it is kept, and the report says so.
    """

    REQUIRED = "required"
    PREFERRED = "preferred"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a thread runs on the host, and how it is scheduled: as wanted, or as found.

    Attributes:
        cpus: The host CPUs it may run on; None: not specified.
        scheduler: How it is scheduled; None: not specified.

    Raises:
        TypeError: *cpus* is not a VcpuMap, or *scheduler* not a Scheduler; ``on`` takes text and numbers.
        ValueError: *cpus* is empty.
    """

    cpus: VcpuMap | None = None
    scheduler: Scheduler | None = None

    def __post_init__(self) -> None:
        given.instance("cpus", self.cpus, VcpuMap | None)
        given.instance("scheduler", self.scheduler, Scheduler | None)
        if self.cpus is not None and not self.cpus:
            raise ValueError("a thread needs a host CPU to run on, but none is named")

    def __bool__(self) -> bool:
        return self.cpus is not None or self.scheduler is not None

    def __str__(self) -> str:
        said = ("" if self.cpus is None else f"host CPUs {self.cpus}", str(self.scheduler or ""))
        return ", ".join(filter(None, said)) or "anywhere"

    @classmethod
    def on(cls, cpus: str | Iterable[int], scheduler: str | Scheduler | None = None) -> "Place":
        """Return the place on these host CPUs (libvirt's cpuset text, or numbers).

        Raises:
            ValueError: *cpus* is empty or not a set of CPUs, or *scheduler* is not a scheduler.
        """
        return cls(host_cpus(cpus), Scheduler.parse(scheduler) if isinstance(scheduler, str) else scheduler)

    def over(self, other: "Place") -> "Place":
        """Return this place; what it does not specify comes from *other*."""
        return Place(
            other.cpus if self.cpus is None else self.cpus,
            other.scheduler if self.scheduler is None else self.scheduler,
        )

    def differs(self, found: "Place") -> bool:
        """Return True if a thread *found* there is not in this place."""
        elsewhere = self.cpus is not None and found.cpus is not None and self.cpus != found.cpus
        other = self.scheduler is not None and found.scheduler is not None and self.scheduler != found.scheduler
        return elsewhere or other


@dataclass(frozen=True, slots=True)
class Placement:
    """The places of one VM's threads.

    A vCPU's own host CPUs win over *cpuset*, as in libvirt. In libvirt's words, ``vcpus`` is ``vcpupin`` and
    ``vcpusched``, ``emulator`` is ``emulatorpin`` and ``emulatorsched``, and ``cpuset`` is that of ``<vcpu>``.

    Attributes:
        vcpus: The place of each vCPU, by its id; a copy is kept.
        emulator: The place of the emulator threads: QEMU's main thread and workers, not its iothreads.
        cpuset: The host CPUs of all threads without their own; None: not specified.
        everywhere: True lets a vCPU thread without host CPUs run on all of the host's, as libvirt does; False leaves
            it where QEMU's main thread runs. If the record is the VM's own document, it is True as soon as any place
            is specified: that is what the document means.
        core_scheduling: Which threads share no core with other programs.
        exclusive: True refuses overlapping sets: each vCPU has its own host CPUs.
        policy: What happens to a vCPU that was plugged but cannot be put in its place.

    Raises:
        TypeError: An argument has the wrong type; a vCPU's place, for example, is a Place.
        ValueError: *cpuset* is empty, a vCPU id is negative, or *exclusive* sets overlap.
    """

    vcpus: Mapping[int, Place] = field(default_factory=dict)
    emulator: Place = Place()
    cpuset: VcpuMap | None = None
    everywhere: bool = False
    core_scheduling: CoreScheduling = CoreScheduling.NONE
    exclusive: bool = False
    policy: PlacementPolicy = PlacementPolicy.REQUIRED

    def __post_init__(self) -> None:
        given.instance("vcpus", self.vcpus, Mapping)
        vcpus = {
            given.at_least("a vCPU id", vcpu, 0): given.instance("the place of a vCPU", place, Place)
            for vcpu, place in self.vcpus.items()
        }
        object.__setattr__(self, "vcpus", vcpus)
        given.instance("emulator", self.emulator, Place)
        given.instance("cpuset", self.cpuset, VcpuMap | None)
        given.flag("everywhere", self.everywhere)
        given.member("core_scheduling", self.core_scheduling, CoreScheduling)
        given.flag("exclusive", self.exclusive)
        given.member("policy", self.policy, PlacementPolicy)
        if self.cpuset is not None and not self.cpuset:
            raise ValueError("the cpuset of a VM names no host CPU")
        if self.exclusive:
            self._refuse_overlap()

    @property
    def names_places(self) -> bool:
        """True if it specifies host CPUs or a scheduler for any thread."""
        return any(map(bool, self.vcpus.values())) or bool(self.emulator) or self.cpuset is not None

    def __bool__(self) -> bool:
        return self.names_places or self.groups

    @classmethod
    def pinned(
        cls,
        pins: Mapping[int, str | Iterable[int]],
        *,
        policy: PlacementPolicy = PlacementPolicy.REQUIRED,
        exclusive: bool = False,
    ) -> "Placement":
        """Return the placement that pins each of these vCPUs to its host CPUs (libvirt's cpuset text, or numbers).

        Raises:
            ValueError: A set is empty or not a set of CPUs, or *exclusive* sets overlap.
        """
        places = {vcpu: Place.on(cpus) for vcpu, cpus in pins.items()}
        return cls(places, policy=policy, exclusive=exclusive)

    def of_vcpu(self, vcpu: int) -> Place:
        """Return the place of *vcpu*; if ``cpus`` is None, see *everywhere*."""
        return self.vcpus.get(vcpu, _NOWHERE).over(Place(self.cpuset))

    def of_emulator(self) -> Place:
        """Return the place of the emulator threads."""
        return self.emulator.over(Place(self.cpuset))

    def of_vcpus(self, vcpus: Iterable[int], host: "HostFacts") -> dict[int, Place]:
        """Return the places of these vCPUs on *host*; vCPUs without one are left out."""
        all_of_it = Place(host.usable) if self.everywhere and host.usable else _NOWHERE
        places = {vcpu: self.of_vcpu(vcpu).over(all_of_it) for vcpu in vcpus}
        return {vcpu: place for vcpu, place in places.items() if place}

    def born_on(self, vcpus: Iterable[int], host: "HostFacts") -> VcpuMap | None:
        """Return the host CPUs on which the threads of these vCPUs are born together; None: not specified.

        One ``device_add`` creates all threads of a slot. They are born on the host CPUs where all of them may run; if
        there are none, where any of them may.
        """
        sets = [place.cpus for place in self.of_vcpus(vcpus, host).values() if place.cpus is not None]
        if not sets:
            return None
        common = sets[0]
        for each in sets[1:]:
            common &= each
        return common or union(sets)

    def why_not(self, vcpus: Iterable[int], host: "HostFacts") -> str:
        """Return why the threads of these vCPUs cannot be in their places on *host*; "": they can."""
        vcpus = tuple(vcpus)
        if not self.wants(vcpus):
            return ""
        why = host.unreachable or host.forbidden
        for place in () if why else map(self.of_vcpu, vcpus):
            if reason := host.why_not(place):
                return f"its place is {place}: {reason}"
        if not why and self.groups and host.why_not_core_scheduling:
            return f"it needs core scheduling: {host.why_not_core_scheduling}"
        return why

    def why_not_emulator(self, host: "HostFacts") -> str:
        """Return why the emulator threads cannot be in their place on *host*; "": they can."""
        why = host.why_not(self.of_emulator())
        return f"the place of the emulator threads is {self.of_emulator()}: {why}" if why else ""

    @property
    def groups(self) -> bool:
        """True if it groups threads for core scheduling."""
        return self.core_scheduling is not CoreScheduling.NONE

    def wants(self, vcpus: Iterable[int]) -> bool:
        """Return True if it specifies anything for the threads of these vCPUs."""
        return self.groups or self.everywhere or any(self.of_vcpu(vcpu) for vcpu in vcpus)

    def with_vcpus(self, places: Mapping[int, Place]) -> "Placement":
        """Return this placement with *places* for these vCPUs; what these do not specify stays."""
        merged = {vcpu: place.over(self.vcpus.get(vcpu, _NOWHERE)) for vcpu, place in places.items()}
        return replace(self, vcpus={**self.vcpus, **merged})

    def instead_of(self, other: "Placement | None") -> "Placement":
        """Return the places of this placement, with the policy and the core scheduling of *other*."""
        if other is None:
            return self
        # Whether sets may overlap was decided when these were asked for.
        return replace(other, vcpus=self.vcpus, emulator=self.emulator, cpuset=self.cpuset, exclusive=False)

    def over(self, other: "Placement") -> "Placement":
        """Return this placement; what it does not specify, and the policy, come from *other*."""
        return replace(
            other.with_vcpus(self.vcpus),
            emulator=self.emulator.over(other.emulator),
            cpuset=other.cpuset if self.cpuset is None else self.cpuset,
            everywhere=self.everywhere or other.everywhere,
            core_scheduling=self.core_scheduling if self.groups else other.core_scheduling,
            exclusive=self.exclusive or other.exclusive,
        )

    def _refuse_overlap(self) -> None:
        named = [(f"vCPU {vcpu}", place.cpus) for vcpu, place in sorted(self.vcpus.items()) if place.cpus is not None]
        if self.emulator.cpus is not None:
            named.append(("the emulator", self.emulator.cpus))
        for (one, its), (other, others) in combinations(named, 2):
            if its & others:
                raise ValueError(
                    f"{one} and {other} must not share host CPUs (exclusive), but both have {its & others}"
                )


_NOWHERE: Final = Place()

PlacementWish = Placement | PlacementPolicy | str
"""What a caller says of the placement: all of it, or only the policy (also as its word)."""


class ThreadKind(enum.Enum):
    """What a QEMU thread does; EMULATOR: its main thread, and every thread that is neither of the others."""

    VCPU = "vcpu"
    IOTHREAD = "iothread"
    EMULATOR = "emulator"


@dataclass(frozen=True, slots=True)
class QemuThread:
    """One of QEMU's threads, as it was found.

    Attributes:
        kind: What it does.
        vcpu: The vCPU it runs, or None.
        tid: Its id on this host.
        name: Its name, at most 15 bytes.
        found: Where it runs, and how it is scheduled.
        wanted: Its place; None for what is not specified.
        host_cpu: The host CPU it last ran on.
        node: The NUMA node of that CPU, or None.
    """

    kind: ThreadKind
    vcpu: int | None
    tid: int
    name: str
    found: Place
    wanted: Place
    host_cpu: int | None
    node: int | None

    @property
    def drifted(self) -> bool:
        """True if it is not in its place."""
        return self.wanted.differs(self.found)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a host allows for the threads of one QEMU, as it is now.

    Attributes:
        unreachable: Why QEMU's threads cannot be found from here, or ""; if set, ignore the rest.
        forbidden: Why we may not move them, or "".
        existing: The host's CPUs.
        online: Those that are online.
        allowed: Those that the cgroup of QEMU's main thread allows.
        cgroup: The name of that cgroup, for messages.
        main_cpus: Where QEMU's main thread runs, when no vCPU is being born; empty: not known, since another program
            has vCPUs born.
        highest_priority: The highest real-time priority we may set; 0: none.
        why_not_realtime: Why it is not 99, or "".
        why_not_core_scheduling: Why this kernel has no core scheduling, or "".
    """

    unreachable: str = ""
    forbidden: str = ""
    existing: VcpuMap = _NO_CPUS
    online: VcpuMap = _NO_CPUS
    allowed: VcpuMap = _NO_CPUS
    cgroup: str = ""
    main_cpus: VcpuMap = _NO_CPUS
    highest_priority: int = 0
    why_not_realtime: str = ""
    why_not_core_scheduling: str = ""

    @property
    def usable(self) -> VcpuMap:
        """The host CPUs that this QEMU's threads can run on."""
        return self.allowed & self.online

    def why_not(self, place: Place) -> str:
        """Return why a thread cannot be put in *place*, as a sentence without a full stop; "": it can."""
        if not place:
            return ""
        if self.unreachable or self.forbidden:
            return self.unreachable or self.forbidden
        if place.cpus is not None and (why := self._why_not_on(place.cpus)):
            return why
        priority = 0 if place.scheduler is None else place.scheduler.priority or 0
        if priority > self.highest_priority:
            limit = f"the highest is {self.highest_priority}" if self.highest_priority else "none may be set"
            return f"a real-time priority of {priority} is not allowed here, {limit}: {self.why_not_realtime}"
        return ""

    def _why_not_on(self, cpus: VcpuMap) -> str:
        if beyond := cpus - self.existing:
            return f"this host has no {_named(beyond)}: it has {self.existing}"
        if offline := cpus - self.online:
            is_or_are = "is" if len(offline) == 1 else "are"
            return f"host {_named(offline)} {is_or_are} offline (chcpu --enable {offline})"
        if outside := cpus - self.allowed:
            cgroup = f" ({self.cgroup})" if self.cgroup else ""
            return f"the cgroup of QEMU{cgroup} does not allow host {_named(outside)}, only {self.allowed}"
        return ""


def _named(cpus: VcpuMap) -> str:
    return f"CPU {cpus}" if len(cpus) == 1 else f"CPUs {cpus}"


def host_cpus(cpus: str | Iterable[int]) -> VcpuMap:
    """Return a set of host CPUs, given as libvirt's cpuset text or as numbers.

    Raises:
        ValueError: It is empty, or no set of CPUs.
        TypeError: It is neither text nor a collection of numbers.
    """
    if not isinstance(cpus, Iterable):
        raise TypeError(f"a set of host CPUs is text or numbers, such as '8-11' or [8], not {shorten(cpus)}")
    try:
        found = VcpuMap.parse(cpus) if isinstance(cpus, str) else VcpuMap(cpus)
    except InvalidMapError as error:
        why = str(error).partition(": ")[2].replace("a vCPU id", "a host CPU")
        raise ValueError(f"{shorten(str(cpus))} is not a set of host CPUs: {why}") from None
    if not found:
        raise ValueError("no host CPU is named: say which, such as 8-11")
    return found
