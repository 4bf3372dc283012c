"""set, count and plan: a whole map, or how many vCPUs."""

from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from qmpvcpu.cli.change_options import (
    AFFECT,
    CONFIG,
    INCLUDE_BOOT,
    MAP_OPTIONS,
    NEXT_BOOT_OPTIONS,
    OFFLINE_FIRST,
    PROOF,
    SAFETY_OPTIONS,
    check_together,
    next_boot_file,
)
from qmpvcpu.cli.config import change_config
from qmpvcpu.cli.options import AGENT, READ_OPTIONS, VM_OPTIONS, command, option
from qmpvcpu.cli.progress import run_transition
from qmpvcpu.cli.reports import intent_text, plan_lines, report_blocks
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.wishes import PLACEMENT_OPTIONS, check_used, check_wish, note_moved, place, take_wish
from qmpvcpu.cli.wording import in_options
from qmpvcpu.documents.form import NOT_SENT, REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.documents.plans import plan_json
from qmpvcpu.errors import InvalidMapError
from qmpvcpu.model.options import Affect, Proof
from qmpvcpu.model.transition import Action, TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap, union

if TYPE_CHECKING:
    from qmpvcpu.cli.output import Block
    from qmpvcpu.model.campaign import CampaignSpec
    from qmpvcpu.model.placement import Placement
    from qmpvcpu.model.wish import WishOptions
    from qmpvcpu.planning.plan import Plan
    from qmpvcpu.record.config import DomainConfig
    from qmpvcpu.vm.controller import VcpuController


@dataclass(frozen=True)
class Target:
    """Which vCPUs there should be: a map, or how many.

    Attributes:
        map: The vCPUs, as text, or None.
        count: How many, or None.
        include_boot: Whether a count may take boot vCPUs out.

    Raises:
        BadUsageError: Neither is given, or both; or *include_boot* goes with a map.
        InvalidMapError: The map cannot be read.
    """

    map: str | None = None
    count: int | None = None
    include_boot: bool = False

    def __post_init__(self) -> None:
        if (self.map is None) == (self.count is None):
            raise BadUsageError("name the map, such as 0,2-5, or how many with --count N: one of them")
        if self.include_boot and self.count is None:
            raise BadUsageError("--include-boot goes with a count: a map says itself which vCPUs stay")
        if self.map is not None and not VcpuMap.parse(self.map):
            raise InvalidMapError(self.map, "it is empty, and vCPU 0 never leaves")

    def write(self, config: "DomainConfig", wish: "Placement | None" = None) -> None:
        """Make it the next boot, with threads where *wish* has them."""
        if self.count is not None:
            config.set_count(self.count)
        else:
            config.set_map(self.map or "")
        place(config, wish)

    def plan(self, vm: "VcpuController", **change: Any) -> "Plan":
        """Return what it takes to reach it."""
        if self.count is not None:
            return vm.plan_count(self.count, include_boot=self.include_boot, **change)
        return vm.plan(self.map or "", **change)

    def campaign(self, options: "WishOptions", **bounds: Any) -> "CampaignSpec":
        """Return the campaign that has it on many VMs."""
        from qmpvcpu.model.campaign import CampaignSpec  # not at the top: most changes are of one host

        wanted = None if self.map is None else VcpuMap.parse(self.map)
        return CampaignSpec(map=wanted, count=self.count, include_boot=self.include_boot, options=options, **bounds)

    def reach(self, vm: "VcpuController", *, proof: Proof, **change: Any) -> Coroutine[Any, Any, TransitionReport]:
        """Return the work of reaching it; a *proof* that is asked for is required, as in ``plug``."""
        change |= {"proof": proof, "require_proof": proof is Proof.ACKNOWLEDGED}
        if self.count is not None:
            return vm.set_count(self.count, include_boot=self.include_boot, **change)
        return vm.set_map(self.map or "", **change)


@command(
    click.Argument(["target"], metavar="MAP"),
    *PLACEMENT_OPTIONS,
    *NEXT_BOOT_OPTIONS,
    *MAP_OPTIONS,
    *SAFETY_OPTIONS,
    AGENT,
    *VM_OPTIONS,
)
async def set_(shell: Shell, *, target: str, config: str | None, **change: Any) -> CommandResult:
    """Have exactly the vCPUs of this MAP plugged, boot vCPUs included: the others leave.

    A map has ids and ranges, as libvirt writes them: 0,2-5, or 0-3,^2.

    What cannot be is denied before anything is sent, as plan shows it. Plugs come first, then unplugs, highest first.
    The guest may refuse any of them, or take its time: --timeout is for each answer, and --on-failure says what
    becomes of the rest. The report has a row for each slot: what was done, how it ended, whether it was undone.

    With --record it can be looked at, finished or reverted later, whatever ends this program: qmpvcpu recover.

      qmpvcpu set 0,2-5 --qmp /run/vm.qmp

      qmpvcpu set 0-3,^2 --on-failure revert --timeout 10 --record vm.xml --qmp /run/vm.qmp --json

      qmpvcpu set 0-3 --pin 0-1=8 --pin 2-3=9 --placement preferred --qmp /run/vm.qmp

      qmpvcpu set 0-3 --affect config --config vm.xml

    Exit codes: 0 reached, also if it was so already; 1 refused, rejected, pending, partial or reverted; 2 bad usage
    or input, denied, nothing sent; 3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked;
    130 stopped by a signal.
    """
    return await _set(shell, Target(target), config, **change)


@command(
    click.Argument(["number"], metavar="N", type=int),
    INCLUDE_BOOT,
    *PLACEMENT_OPTIONS,
    *NEXT_BOOT_OPTIONS,
    *MAP_OPTIONS,
    *SAFETY_OPTIONS,
    AGENT,
    *VM_OPTIONS,
)
async def count(shell: Shell, *, number: int, include_boot: bool, config: str | None, **change: Any) -> CommandResult:
    """Have N vCPUs plugged, as libvirt's setvcpus does: the lowest free ones in, the highest out.

    What was there at boot stays, unless --include-boot; vCPU 0 always does. The rest is as in set.

      qmpvcpu count 4 --qmp /run/vm.qmp

      qmpvcpu count 1 --include-boot --on-failure continue --qmp /run/vm.qmp

    Exit codes: 0 reached, also if it was so already; 1 refused, rejected, pending, partial or reverted; 2 bad usage
    or input, denied, nothing sent; 3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked;
    130 stopped by a signal.
    """
    return await _set(shell, Target(count=number, include_boot=include_boot), config, **change)


@command(
    click.Argument(["target"], metavar="[MAP]", required=False),
    option("--count", metavar="N", type=int, help="Instead of a map: how many."),
    INCLUDE_BOOT,
    AFFECT,
    CONFIG,
    PROOF,
    OFFLINE_FIRST,
    *PLACEMENT_OPTIONS,
    *SAFETY_OPTIONS,
    AGENT,
    *READ_OPTIONS,
)
async def plan(
    shell: Shell,
    *,
    target: str | None,
    count: int | None,
    include_boot: bool,
    affect: Affect,
    config: str | None,
    **change: Any,
) -> CommandResult:
    """Show what set, or count, would do now, step by step, and what would be denied. Nothing is sent, or written.

      qmpvcpu plan 0,2-5 --qmp /run/vm.qmp

      qmpvcpu plan --count 2 --include-boot --qmp /run/vm.qmp --json

      qmpvcpu plan 0-3 --affect both --config vm.xml --qmp /run/vm.qmp

    Exit codes: 0 it can be tried, or is so already; 2 denied, or bad usage or input; 3 no connection, or QEMU lost;
    4 record unreadable or locked.
    """
    wanted = Target(target, count, include_boot)
    wish = take_wish(change)
    check_together(affect, change)
    next_boot = next_boot_file(affect, config, shell.options.record)
    if affect is Affect.CONFIG:
        return await change_config(shell, next_boot, lambda each: wanted.write(each, wish), dry=True)
    async with shell.attach(config=config, read_only=True) as vm:
        check_wish(vm, wish)
        await shell.ask_system(vm)
        planned = wanted.plan(vm, **change)
        layout = vm.layout
    content = document(**plan_json(planned), **state_json(layout))
    said: list[Block] = [*plan_lines(in_options(str(planned))), str(layout)]
    if next_boot:
        written = await change_config(shell, next_boot, lambda each: wanted.write(each, wish), dry=True)
        content |= {"affect": affect.value} | {key: written.document[key] for key in ("config", "changes")}
        said += ["", *written.text]
    return CommandResult(NOT_SENT if planned.denied else REACHED, content, tuple(said))


async def _set(
    shell: Shell, target: Target, config: str | None, *, affect: Affect, base: str | None, **change: Any
) -> CommandResult:
    wish = take_wish(change)
    check_together(affect, change)
    next_boot = next_boot_file(affect, config, shell.options.record, base)
    if affect is Affect.CONFIG:
        return await change_config(shell, next_boot, lambda each: target.write(each, wish))
    async with shell.attach(config=config, base=base) as vm:
        check_wish(vm, wish)
        steps, before = target.plan(vm, **change).steps, vm.layout.enabled
        coming = union(step.ids for step in steps if step.action is not Action.UNPLUG)
        check_used(shell, vm, wish, coming, "--pin and --sched are for what is plugged")
        if any(step.action is Action.UNPLUG for step in steps):
            await shell.ask_system(vm)
        if vm.interrupted is not None:
            shell.note(f"given up for this: {intent_text(vm.interrupted)}")
        report = await run_transition(shell, vm, target.reach(vm, affect=affect, **change), steps, change["proof"])
        await note_moved(shell, vm, wish, before & report.layout.enabled)
    content = document(**report.to_json(), **state_json(report.layout))
    return CommandResult(REACHED, content, report_blocks(report, proven=change["proof"] is not Proof.PRESENT))
