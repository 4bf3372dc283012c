"""The placement of QEMU's threads, as given on the command line."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from qmpvcpu.cli.options import flag, option
from qmpvcpu.cli.result import BadUsageError
from qmpvcpu.errors import InvalidMapError, PlacementError, QmpVcpuError
from qmpvcpu.model.vcpumap import VcpuMap, named

# Imports in functions below: few commands say anything of threads.
if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qmpvcpu.cli.run import Shell
    from qmpvcpu.model.placement import Placement, Scheduler
    from qmpvcpu.record.config import DomainConfig
    from qmpvcpu.vm.controller import VcpuController

_T = TypeVar("_T")


class HostCpus(click.ParamType):  # type: ignore[type-arg]  # it has no type argument in older versions
    """A set of host CPUs."""

    name = "cpus"
    example = "8-11"
    what = "host CPUs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> VcpuMap:
        """Return the set."""
        from qmpvcpu.model.placement import host_cpus

        try:
            return host_cpus(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Schedule(click.ParamType):  # type: ignore[type-arg]  # as above
    """A scheduler, with its priority if it is a real-time one."""

    name = "policy"
    example = "fifo:10"
    what = "a scheduler"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Scheduler":
        """Return the scheduler."""
        from qmpvcpu.model.placement import Scheduler

        try:
            return Scheduler.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class OfVcpus(click.ParamType):  # type: ignore[type-arg]  # as above
    """What is wanted of the threads of some vCPUs, such as ``3=8-11`` or ``0-3=8-11``; read by *wanted*."""

    name = "wish"

    def __init__(self, wanted: HostCpus | Schedule) -> None:
        self._wanted = wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[VcpuMap, Any]:
        """Return the vCPUs, and what is wanted of them."""
        vcpus, separator, wanted = str(value).partition("=")
        example = f"such as 3={self._wanted.example}"
        if not separator:
            self.fail(f"{value} names no {self._wanted.what.removeprefix('a ')}: VCPU=..., {example}", param, ctx)
        if not vcpus.strip():
            self.fail(f"{value} names no vCPU: {example}", param, ctx)
        if not wanted.strip():
            self.fail(f"{value} needs {self._wanted.what} after the =: {example}", param, ctx)
        try:
            ids = VcpuMap.parse(vcpus)
        except InvalidMapError as error:
            self.fail(str(error), param, ctx)
        if not ids:
            self.fail(f"{value} names no vCPU: {example}", param, ctx)
        return ids, self._wanted.convert(wanted, param, ctx)

    def shell_complete(self, ctx: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """Have the shell offer the vCPUs that are plugged, with the = that follows them."""
        from click.shell_completion import CompletionItem

        from qmpvcpu.cli.completion import is_plugged, offered_ids

        if "=" in incomplete:
            return []
        return [CompletionItem(f"{each.value}=", help=each.help) for each in offered_ids(ctx, incomplete, is_plugged)]


PLACEMENT: Final = option(
    "--placement",
    metavar="POLICY",
    type=click.Choice(["required", "preferred"]),
    help="What happens to a vCPU that cannot be in its place. required (the default): it is not plugged, or is taken"
    " out again. preferred: it is kept, and the report says so.",
)
EXCLUSIVE: Final = flag("--exclusive", "Refuse overlapping host CPUs: each vCPU, and the emulator, needs its own.")
CORE_SCHEDULING: Final = option(
    "--core-scheduling",
    metavar="THREADS",
    type=click.Choice(["none", "vcpus", "emulator"]),
    help="Which threads share no core with other programs. none: change nothing. vcpus: vCPU threads form a group."
    " emulator: all of QEMU's threads do.",
)
PLACEMENT_OPTIONS: Final = (
    option(
        "--pin",
        metavar="VCPU=CPUS",
        type=OfVcpus(HostCpus()),
        multiple=True,
        help="Which host CPUs a vCPU runs on, from its first instruction: 3=8-11, or 0-3=8-11. May be repeated.",
    ),
    option(
        "--sched",
        metavar="VCPU=POLICY",
        type=OfVcpus(Schedule()),
        multiple=True,
        help="The scheduler of a vCPU: 3=fifo:10, 3=batch; other, batch, idle, fifo:PRIORITY, rr:PRIORITY. May be"
        " repeated.",
    ),
    PLACEMENT,
    EXCLUSIVE,
    CORE_SCHEDULING,
)


def take_wish(change: dict[str, Any]) -> "Placement | None":
    """Have *change*, the options of a command, say as ``placement`` what ``PLACEMENT_OPTIONS`` say.

    Returns:
        The placement; None: none is given.

    Raises:
        BadUsageError: They contradict each other.
    """
    names = ("pin", "sched", "exclusive", "core_scheduling", "placement")
    said = {name: change.pop(name, None) for name in names}
    policy = said.pop("placement")
    wish = wish_of(policy=policy, **said)
    if wish is not None or policy is not None:
        change["placement"] = policy if wish is None else wish
    return wish


def wish_of(
    *,
    pin: Iterable[tuple[VcpuMap, VcpuMap]] | None = (),
    sched: Iterable[tuple[VcpuMap, "Scheduler"]] | None = (),
    emulator_cpus: VcpuMap | None = None,
    emulator_scheduler: "Scheduler | None" = None,
    exclusive: bool | None = False,
    core_scheduling: str | None = None,
    policy: str | None = None,
) -> "Placement | None":
    """Return what these say of QEMU's threads; None: nothing.

    Raises:
        BadUsageError: They contradict each other.
    """
    if not any((pin, sched, emulator_cpus, emulator_scheduler, exclusive, core_scheduling not in (None, "none"))):
        return None
    from qmpvcpu.model.placement import CoreScheduling, Place, Placement, PlacementPolicy

    pins, scheds = _by_vcpu("on host CPUs", pin or ()), _by_vcpu("scheduled as", sched or ())
    with _refusing_overlap():
        return Placement(
            {vcpu: Place(pins.get(vcpu), scheds.get(vcpu)) for vcpu in sorted({*pins, *scheds})},
            Place(emulator_cpus, emulator_scheduler),
            exclusive=bool(exclusive),
            core_scheduling=CoreScheduling(core_scheduling or "none"),
            policy=PlacementPolicy(policy or "required"),
        )


def _by_vcpu(how: str, said: Iterable[tuple[VcpuMap, _T]]) -> Mapping[int, _T]:
    """Return what is *said* of each vCPU.

    Raises:
        BadUsageError: Two different things are.
    """
    found: dict[int, _T] = {}
    for vcpus, wanted in said:
        for vcpu in vcpus:
            if found.setdefault(vcpu, wanted) != wanted:
                raise BadUsageError(
                    f"vCPU {vcpu} cannot be both {how} {found[vcpu]} and {how} {wanted}: name it once"
                )
    return found


def check_wish(vm: "VcpuController", wish: "Placement | None") -> None:
    """Make sure that *wish* goes together with what is wanted of the threads of *vm* already.

    Raises:
        BadUsageError: Sets overlap that must not.
    """
    if wish is not None:
        with _refusing_overlap():
            wish.over(vm.host.placement)


def place(config: "DomainConfig", wish: "Placement | None") -> None:
    """Put *wish* over the placement of the next boot; None: leave it.

    Raises:
        BadUsageError: Sets overlap with those of the document that must not.
    """
    if wish is not None:
        with _refusing_overlap():
            config.place(wish)


@contextlib.contextmanager
def _refusing_overlap() -> Iterator[None]:
    """Say which option it was that does not allow sets of host CPUs to overlap."""
    try:
        yield
    except QmpVcpuError:  # some are a ValueError too, such as that of a document
        raise
    except ValueError as error:
        raise BadUsageError(f"--exclusive: {error}") from error


def check_used(
    shell: "Shell", vm: "VcpuController", wish: "Placement | None", plugged: Iterable[int], otherwise: str
) -> None:
    """Tell which vCPUs *wish* names that are neither plugged nor about to be *plugged*, if nothing keeps it.

    Args:
        shell: The shell; with a record, the wish is kept.
        vm: The VM.
        wish: What is wanted of QEMU's threads; None: nothing.
        plugged: The vCPUs that the command plugs.
        otherwise: What to do instead if the wish has no effect at all.

    Raises:
        BadUsageError: It names no other vCPU, and no emulator threads, so it would have no effect.
    """
    if wish is None or shell.options.record is not None:
        return
    possible = VcpuMap(vcpu for vcpu in wish.vcpus if vcpu < vm.layout.max)
    unused = possible - vm.layout.enabled - VcpuMap(plugged)
    if not unused:
        return
    what = f"{named(unused)}: not plugged, and without --record nothing keeps its place"
    if len(unused) == len(wish.vcpus) and not wish.emulator:
        raise BadUsageError(f"{what}: {otherwise}")
    shell.note(f"qmpvcpu: {what}")


async def note_moved(shell: "Shell", vm: "VcpuController", wish: "Placement | None", before: VcpuMap) -> None:
    """Tell which vCPUs of *wish* were plugged *before*, and whether they were moved: no step tells of them."""
    there = VcpuMap() if wish is None else before & VcpuMap(wish.vcpus)
    if not there:
        return
    try:
        drifted = [each.vcpu for each in await vm.host.threads() if each.drifted]
        astray = VcpuMap(vcpu for vcpu in drifted if vcpu is not None and vcpu in there)
    except PlacementError:  # the threads cannot be found, so none was moved
        astray = there
    for vcpus, told in ((there - astray, "and moved to"), (astray, "but not moved to")):
        if vcpus:
            shell.note(f"qmpvcpu: {named(vcpus)}: already plugged, {told} where --pin and --sched say")
