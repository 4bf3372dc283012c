"""plug and unplug: vCPUs in, vCPUs out, one by one."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import click

from qmpvcpu.cli.change_options import (
    ALLOW_FATAL,
    NEXT_BOOT_OPTIONS,
    OFFLINE_FIRST,
    PROOF_OPTIONS,
    SAFETY_OPTIONS,
    check_together,
    next_boot_file,
)
from qmpvcpu.cli.config import VcpuIds, change_config, check_next_boot, disable, enable, listed
from qmpvcpu.cli.options import AGENT, TIMEOUT, VM_OPTIONS, command
from qmpvcpu.cli.progress import progress
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.wishes import PLACEMENT_OPTIONS, check_used, check_wish, note_moved, place, take_wish
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.documents.steps import unplug_json
from qmpvcpu.errors import PlacementError, QmpVcpuError, UnprovenError, milliseconds
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Affect, ChangeOptions, CheckedOptions, Proof
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Unplugged, verdict_of
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.checks import Situation, check_placement, check_plug, check_unplug

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qmpvcpu.model.guest import GuestOs
    from qmpvcpu.record.config import DomainConfig
    from qmpvcpu.vm.controller import VcpuController
    from qmpvcpu.vm.one_step import PlugClock


class _OfferedIds(VcpuIds):
    """vCPU ids; a shell offers those that are free, or those that can leave."""

    def shell_complete(self, ctx: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from qmpvcpu.cli.completion import can_leave, is_free, offered_ids  # not at the top: only completion needs it

        return offered_ids(ctx, incomplete, is_free if self.free else can_leave)


@command(
    click.Argument(["vcpus"], metavar="[ID]...", nargs=-1, type=_OfferedIds(free=True)),
    *PROOF_OPTIONS,
    *PLACEMENT_OPTIONS,
    *NEXT_BOOT_OPTIONS,
    ALLOW_FATAL,
    TIMEOUT,
    AGENT,
    *VM_OPTIONS,
)
async def plug(
    shell: Shell, *, vcpus: tuple[list[int], ...], affect: Affect, config: str | None, base: str | None, **change: Any
) -> CommandResult:
    """Plug the vCPUs with these IDs, one by one; without an ID the first free one.

    An ID may be a range or a list, as in a map: 2-4, or 2,5. After one that cannot be plugged no other is.

    What is known not to work is denied and never sent: an occupied slot, an unknown id, a full machine, a VM that
    migrates, a step that this QEMU would not survive.

      qmpvcpu plug 3 --qmp /run/vm.qmp

      qmpvcpu plug 2-4 --proof acknowledged --timeout 5 --qmp /run/vm.qmp

      qmpvcpu plug 3 --pin 3=8-11 --qmp /run/vm.qmp

      qmpvcpu plug 3 --affect both --config vm.xml --qmp /run/vm.qmp

    Exit codes: 0 plugged; 1 rejected by QEMU, or plugged without the proof asked for, or taken out again because it
    could not be in its place, or only some of them are plugged; 2 denied, nothing sent; 3 no connection, QEMU lost,
    outcome unknown; 4 record unreadable or locked; 130 stopped by a signal.
    """
    ids = listed(vcpus)
    wish = take_wish(change)
    check_together(affect, change)
    next_boot = next_boot_file(affect, config, shell.options.record, base)

    def follow(config: "DomainConfig") -> None:
        enable(config, ids)
        place(config, wish)

    if affect is Affect.CONFIG:
        return await change_config(shell, next_boot, follow)
    async with shell.attach(config=config, base=base) as vm:
        ids, before = by_slots(vm.layout, ids), vm.layout.enabled
        check_wish(vm, wish)
        check_used(shell, vm, wish, ids or _first_free(vm.layout), "--pin and --sched are for what is plugged")
        _check_all(shell, vm, ids, check_plug, change)
        await check_next_boot(affect, config, follow)
        await _one_by_one(shell, ids or [None], lambda vcpu: _plug_one(shell, vm, vcpu, affect=affect, **change))
        await note_moved(shell, vm, wish, before)
        layout = vm.layout
    return _all_done(shell, layout, affect)


@command(
    click.Argument(["vcpus"], metavar="ID...", nargs=-1, required=True, type=_OfferedIds(free=False)),
    OFFLINE_FIRST,
    *NEXT_BOOT_OPTIONS,
    *SAFETY_OPTIONS,
    TIMEOUT,
    AGENT,
    *VM_OPTIONS,
)
async def unplug(
    shell: Shell, *, vcpus: tuple[list[int], ...], affect: Affect, config: str | None, base: str | None, **change: Any
) -> CommandResult:
    """Unplug the vCPUs with these IDs, one by one; each is gone when QEMU proves it, not when it was asked.

    An ID may be a range or a list, as in a map: 2-4, or 2,5. Their highest goes first.

    The guest may refuse (its reason is shown, it can be asked again), or take its time: after --timeout the vCPU is
    pending. QEMU never forgets such a request; unplug it again to wait for the same answer.
    After one that does not leave, no other is asked for.

      qmpvcpu unplug 3 --qmp /run/vm.qmp

      qmpvcpu unplug 5 2-4 --timeout 60 --qmp /run/vm.qmp

    Exit codes: 0 all are gone; 1 refused, rejected or pending; 2 denied, nothing sent; 3 no connection, QEMU lost,
    outcome unknown; 4 record unreadable or locked; 130 stopped by a signal.
    """
    ids = listed(vcpus)
    check_together(affect, change)
    next_boot = next_boot_file(affect, config, shell.options.record, base)
    if affect is Affect.CONFIG:
        return await change_config(shell, next_boot, lambda each: disable(each, ids))
    async with shell.attach(config=config, base=base) as vm:
        ids = by_slots(vm.layout, ids)
        system = await shell.ask_system(vm)
        _check_all(shell, vm, ids, check_unplug, change, system=system)
        await check_next_boot(affect, config, lambda each: disable(each, ids))
        await _one_by_one(shell, ids, lambda vcpu: _unplug_one(shell, vm, vcpu, affect=affect, **change))
        layout = vm.layout
    return _all_done(shell, layout, affect)


def _first_free(layout: Layout) -> VcpuMap:
    """Return the vCPUs that are plugged where no ID is given; none if the machine is full."""
    return layout.slot_of(layout.free.lowest).ids if layout.free else layout.free


def by_slots(layout: Layout, ids: list[int]) -> list[int]:
    """Return *ids*; a slot whose ids are all among them is named by its first: its vCPUs move together."""
    named = set(ids)
    slots = {each: layout.slot_of(each) for each in ids if each < layout.max}
    whole = {each: slot.first for each, slot in slots.items() if named.issuperset(slot.ids)}
    return list(dict.fromkeys(whole.get(each, each) for each in ids))


def _check_all(
    shell: Shell,
    vm: "VcpuController",
    ids: list[int],
    check: Callable[..., object],
    change: dict[str, Any],
    *,
    system: "GuestOs | None" = None,
) -> None:
    """Deny what can be known beforehand while nothing is sent; the VM's run state is checked with each step."""
    now = Situation(vm.layout, VmStatus("running"), created=0, guest_os=system, has_agent=vm.guest.has_agent)
    options = CheckedOptions.of(cast("ChangeOptions", change))
    if options.placement is not None or shell.options.record is not None:  # else nothing is wanted of any thread
        known = vm.host.placement
        wanted = known if options.placement is None else options.placement.over(known)
        if wanted:
            now = now._replace(placement=wanted, host=vm.host.facts())
            check_placement(now)
    for vcpu in ids:
        check(now, vcpu, options)


async def _one_by_one(shell: Shell, ids: list[Any], work: Callable[[Any], Awaitable[VcpuMap]]) -> None:
    """Do *work*, which returns the ids that are done, on each of *ids*; the first failure is the last thing done."""
    shell.not_sent = ids
    while shell.not_sent:
        done = await work(shell.not_sent.pop(0))
        shell.not_sent = [each for each in shell.not_sent if each not in done]


def _all_done(shell: Shell, layout: Layout, affect: Affect) -> CommandResult:
    affected = {} if affect is Affect.LIVE else {"affect": affect.value}
    return CommandResult(REACHED, document(steps=shell.done, **affected, **state_json(layout)), (str(layout),))


async def _plug_one(
    shell: Shell, vm: "VcpuController", vcpu: int | None, *, proof: Proof, affect: Affect, **change: Any
) -> VcpuMap:
    from qmpvcpu.vm.one_step import PlugClock  # not at the top: completion and help do without

    require = proof is Proof.ACKNOWLEDGED
    waiting = "plugging" if vcpu is None else f"vCPU {vcpu}: plugging"
    async with PlugClock(vm.events()) as clock, progress(vm, shell.err, waiting=waiting):
        try:
            ids = await vm.plug(vcpu, proof=proof, require_proof=require, affect=affect, **change)
        except (UnprovenError, PlacementError) as error:
            shell.done.append(clock.step_json(vm.layout, error))
            raise
    seconds = clock.seconds
    shell.done.append(clock.step_json(vm.layout, ids))
    slot = vm.layout.slot_of(min(ids))
    acknowledged = slot.acknowledged
    said = ", the guest acknowledged it" if acknowledged else ""
    said = f", {replace(clock.proofs(ids), present=None)}" if proof is not Proof.PRESENT else said
    said += _where(vm, ids, clock)
    said += ", at the next boot too" if affect is Affect.BOTH else ""
    shell.say(f"plugged vCPU {ids} as {slot.device_id} in {milliseconds(seconds)}{said}")
    return ids


def _where(vm: "VcpuController", ids: VcpuMap, clock: "PlugClock") -> str:
    """Return where the threads of what was plugged run, if that was wanted, for the end of a sentence."""
    placed, why_not = clock.placed(ids)
    if placed is None:
        return f", not in its place: {why_not}" if why_not else ""
    places = {str(place) for vcpu in ids if (place := vm.host.placement.of_vcpu(vcpu))}
    return f", on {places.pop()}" if len(places) == 1 else ", in its place"


async def _unplug_one(shell: Shell, vm: "VcpuController", vcpu: int, *, affect: Affect, **change: Any) -> VcpuMap:
    from qmpvcpu.vm.one_step import joins  # as above

    joined = joins(vm, vcpu)
    if joined:
        shell.note(f"vCPU {vcpu}: asked for before and unanswered, so nothing is sent; waiting for the answer")
    slots = [vm.layout.slot_of(each) for each in ([vcpu, *shell.not_sent] if shell.not_sent else ())]
    steps = [Step(Action.UNPLUG, slot.ids, slot.qom_path) for slot in slots]
    started = time.monotonic()
    first = "the guest's agent is asked to take it offline" if change.get("offline_first") and not joined else ""
    waiting = f"vCPU {vcpu}: {first or 'asking for it'}"
    async with progress(vm, shell.err, waiting=waiting, steps=steps):
        try:
            ids = await vm.unplug(vcpu, affect=affect, **change)
        except QmpVcpuError as error:
            if (verdict := verdict_of(error)) is not None:
                shell.done.append(unplug_json(verdict, joined=joined))
            raise
    seconds = time.monotonic() - started
    shell.done.append(unplug_json(Unplugged(ids, seconds=seconds), joined=joined))
    said = ", at the next boot too" if affect is Affect.BOTH else ""
    shell.say(f"unplugged vCPU {ids} in {milliseconds(seconds)}{said}")
    return ids
