"""plug and unplug: one vCPU in, vCPUs out."""

import time
from typing import TYPE_CHECKING, Any, Final

import click

import qmpvcpu
from qmpvcpu.cli.change_options import (
    ALLOW_FATAL,
    NEXT_BOOT_OPTIONS,
    PROOF,
    SAFETY_OPTIONS,
    allowed,
    next_boot_file,
)
from qmpvcpu.cli.config import change_config, disable, enable
from qmpvcpu.cli.options import TIMEOUT, VM_OPTIONS, command
from qmpvcpu.cli.progress import progress
from qmpvcpu.cli.result import REACHED, CommandResult, document
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import milliseconds, state_json
from qmpvcpu.errors import PlugUnprovenError, QmpVcpuError
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.options import Affect, CheckedOptions, Proof
from qmpvcpu.model.transition import Action, Step
from qmpvcpu.model.verdicts import Plugged, Unplugged, verdict_of
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.checks import Situation, check_unplug

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qmpvcpu.vm.controller import VcpuController

# libvirt's own bound; no machine of QEMU's comes near it.
_MAX_ID: Final = 16383


class _VcpuId(click.IntRange):
    """A vCPU id; a shell offers those that are *free*, or those that can leave."""

    def __init__(self, *, free: bool) -> None:
        super().__init__(0, _MAX_ID)
        self._free = free

    def shell_complete(self, ctx: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from qmpvcpu.cli.completion import offered_ids  # not at the top: only completion needs it

        return offered_ids(ctx, incomplete, free=self._free)


@command(
    click.Argument(["vcpu"], metavar="[ID]", required=False, type=_VcpuId(free=True)),
    PROOF,
    *NEXT_BOOT_OPTIONS,
    ALLOW_FATAL,
    TIMEOUT,
    *VM_OPTIONS,
)
async def plug(
    shell: Shell, *, vcpu: int | None, proof: Proof, affect: Affect, config: str | None, **change: Any
) -> CommandResult:
    """Plug one vCPU: the one with this ID, or the first free one.

    What is known not to work is denied and never sent: an occupied slot, an unknown id, a full machine, a VM that
    migrates, a step that this QEMU would not survive.

      qmpvcpu plug 3 --qmp /run/vm.qmp

      qmpvcpu plug --proof acknowledged --timeout 5 --qmp /run/vm.qmp

      qmpvcpu plug 3 --affect both --config vm.xml --qmp /run/vm.qmp

    Exit codes: 0 plugged; 1 rejected by QEMU, or plugged without the proof asked for; 2 denied, nothing sent;
    3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by a signal.
    """
    next_boot = next_boot_file(affect, config, shell.options.record)
    if affect is Affect.CONFIG:
        return await change_config(shell, next_boot, lambda each: enable(each, vcpu))
    async with shell.attach(config=config) as vm:
        started = time.monotonic()
        require = proof is Proof.ACKNOWLEDGED
        async with progress(vm, shell.err, waiting="plugging"):
            try:
                ids = await vm.plug(vcpu, proof=proof, require_proof=require, affect=affect, **change)
            except PlugUnprovenError as error:
                seconds = time.monotonic() - started
                verdict = Plugged(vm.layout.slot_of(min(error.ids)).ids, False, error.code, error.reason, seconds)
                shell.done.append({"verdict": to_json(verdict)})
                raise
        seconds = time.monotonic() - started
        layout = vm.layout
    slot = layout.slot_of(min(ids))
    acknowledged = layout[slot.first].acknowledged
    verdict = Plugged(ids, acknowledged, slot.answer.code if slot.answer else None, seconds=seconds)
    step = {"verdict": to_json(verdict)}
    said = ", the guest acknowledged it" if acknowledged else ""
    said += ", at the next boot too" if affect is Affect.BOTH else ""
    text = f"plugged vCPU {ids} as {slot.device_id} in {milliseconds(seconds)}{said}", str(layout)
    return CommandResult(REACHED, document(steps=[step], **_affected(affect), **state_json(layout)), text)


@command(
    click.Argument(["vcpus"], metavar="ID...", nargs=-1, required=True, type=_VcpuId(free=False)),
    *NEXT_BOOT_OPTIONS,
    *SAFETY_OPTIONS,
    TIMEOUT,
    *VM_OPTIONS,
)
async def unplug(
    shell: Shell, *, vcpus: tuple[int, ...], affect: Affect, config: str | None, **change: Any
) -> CommandResult:
    """Unplug the vCPUs with these IDs, one by one; each is gone when QEMU proves it, not when it was asked.

    The guest may refuse (its reason is shown, it can be asked again), or take its time: after --timeout the vCPU is
    pending. QEMU never forgets such a request; unplug it again to wait for the same answer.
    After one that does not leave, no other is asked for.

      qmpvcpu unplug 3 --qmp /run/vm.qmp

      qmpvcpu unplug 5 4 3 --timeout 60 --qmp /run/vm.qmp

    Exit codes: 0 all are gone; 1 refused, rejected or pending; 2 denied, nothing sent; 3 no connection, QEMU lost,
    outcome unknown; 4 record unreadable or locked; 130 stopped by a signal.
    """
    wanted = list(dict.fromkeys(vcpus))
    next_boot = next_boot_file(affect, config, shell.options.record)
    if affect is Affect.CONFIG:
        return await change_config(shell, next_boot, lambda each: disable(each, wanted))
    async with shell.attach(config=config) as vm:
        _check_all(vm, wanted, change)
        if affect is Affect.BOTH and config is not None:
            # On a copy, so that what the document does not allow is denied before anything is sent.
            disable(await qmpvcpu.DomainConfig.load(config), wanted)
        shell.not_sent = wanted
        while shell.not_sent:
            await _unplug_one(shell, vm, shell.not_sent.pop(0), affect=affect, **change)
        layout = vm.layout
    content = document(steps=shell.done, **_affected(affect), **state_json(layout))
    return CommandResult(REACHED, content, (str(layout),))


async def _unplug_one(shell: Shell, vm: "VcpuController", vcpu: int, *, affect: Affect, **change: Any) -> None:
    planned = vm.plan(vm.layout.enabled - vm.layout.slot_of(vcpu).ids)
    joined = any(step.joins and vcpu in step.ids for step in planned.steps)
    if joined:
        shell.note(f"vCPU {vcpu}: asked for before and unanswered, so nothing is sent; waiting for the answer")
    slots = [vm.layout.slot_of(each) for each in ([vcpu, *shell.not_sent] if shell.not_sent else ())]
    steps = [Step(Action.UNPLUG, slot.ids, slot.qom_path) for slot in slots]
    started = time.monotonic()
    async with progress(vm, shell.err, waiting=f"vCPU {vcpu}: asking for it", steps=steps):
        try:
            ids = await vm.unplug(vcpu, affect=affect, **change)
        except QmpVcpuError as error:
            if (verdict := verdict_of(error)) is not None:
                shell.done.append({"verdict": to_json(verdict), "joined": joined})
            raise
    seconds = time.monotonic() - started
    shell.done.append({"verdict": to_json(Unplugged(ids, seconds=seconds)), "joined": joined})
    said = ", at the next boot too" if affect is Affect.BOTH else ""
    shell.say(f"unplugged vCPU {ids} in {milliseconds(seconds)}{said}")


def _check_all(vm: "VcpuController", vcpus: list[int], change: dict[str, Any]) -> None:
    """Deny what can be known beforehand while nothing is sent; the VM's run state is checked with each unplug."""
    now = Situation(layout=vm.layout, status=VmStatus("running"), created=0)
    for vcpu in vcpus:
        check_unplug(now, vcpu, CheckedOptions(**allowed(change)))


def _affected(affect: Affect) -> dict[str, str]:
    """Return what a document says of it: nothing where only the VM as it runs is changed."""
    return {} if affect is Affect.LIVE else {"affect": affect.value}
