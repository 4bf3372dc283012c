"""What a fleet asks of wherever its VMs are: the calls of one protocol, on this host or on others."""

from collections.abc import Awaitable, Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, Unpack

from qmpvcpu.fleet.merged import FleetEvents
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import ChangeOptions
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap

if TYPE_CHECKING:
    from qmpvcpu.model.statistics import VmStatistics
    from qmpvcpu.planning.plan import Plan

_Vm_co = TypeVar("_Vm_co", covariant=True)


class Rescan(NamedTuple):
    """What another look for VMs found.

    Attributes:
        came: Addresses of those that are new.
        went: Addresses of those that are gone: on this host, whose socket and connection are both gone.
    """

    came: tuple[str, ...]
    went: tuple[str, ...]


class FleetVm(Protocol):
    """A VM that can be worked on, wherever it is; a ``VcpuController`` is one."""

    async def refresh(self) -> Layout:
        """Read it again."""
        ...

    def plan(self, target: VcpuMap, **options: Unpack[ChangeOptions]) -> "Plan | Awaitable[Plan]":
        """Return what it takes to have exactly these vCPUs plugged; nothing is sent to QEMU."""
        ...

    def plan_count(
        self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]
    ) -> "Plan | Awaitable[Plan]":
        """Return what it takes to have so many vCPUs plugged; nothing is sent to QEMU."""
        ...

    async def statistics(self, *, kvm: Collection[str] | None = None) -> "VmStatistics":
        """Read what its vCPUs have done."""
        ...

    async def set_map(self, target: VcpuMap, **options: Unpack[ChangeOptions]) -> TransitionReport:
        """Have exactly these vCPUs plugged."""
        ...

    async def set_count(
        self, count: int, *, include_boot: bool = False, **options: Unpack[ChangeOptions]
    ) -> TransitionReport:
        """Have so many vCPUs plugged."""
        ...


class Member(Protocol[_Vm_co]):
    """One address of a fleet, and what was last seen there."""

    @property
    def name(self) -> str:
        """The VM's name; "" until it was reached."""
        ...

    @property
    def layout(self) -> Layout | None:
        """Its layout, as last seen; None: not yet."""
        ...

    @property
    def is_extra(self) -> bool:
        """True for another way to a VM that the fleet has, which gets no result of its own."""
        ...

    async def reach(self) -> _Vm_co:
        """Return the VM; whatever it raises is the error of this address."""
        ...


class Transport(Protocol):
    """Where the VMs of a fleet are, and how they are reached; it bounds nothing, and knows nothing of results.

    Attributes:
        concurrency: How many VMs are begun at a time if nobody says otherwise.
    """

    concurrency: int

    @property
    def addresses(self) -> tuple[str, ...]:
        """Whom it has, in order."""
        ...

    async def open(self) -> None:
        """Find the VMs."""
        ...

    async def rescan(self) -> Rescan:
        """Look for VMs again."""
        ...

    def check_options(self, options: ChangeOptions) -> None:
        """Raise TypeError or ValueError if these are not options of a change there; asks no VM."""
        ...

    def members(self) -> Mapping[str, Member[FleetVm]]:
        """Return whom to work on now, by address."""
        ...

    def drifted(self) -> Mapping[str, VcpuMap]:
        """Return what was wished of VMs that somebody has changed by hand since, by address."""
        ...

    def layouts(self) -> Mapping[str, Layout]:
        """Return the layouts as known now, by address, of the VMs that are reached; asks nobody."""
        ...

    def events(self, *, audit: bool) -> FleetEvents:
        """Return the events of all VMs, from now on until ``close``; *audit*: also who asks agents for what."""
        ...

    async def close(self) -> None:
        """Let go of all VMs; idempotent, and it raises nothing. What ran was cancelled just before."""
        ...
