"""list, plug and unplug: one or two calls of the library each, and the answer made of what they return."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Annotated, Final

import typer
from rich.console import Group

import qmpvcpu
from qmpvcpu.cli.answer import REACHED, Answer
from qmpvcpu.cli.completing import ids_to_plug, ids_to_unplug
from qmpvcpu.cli.documents import document
from qmpvcpu.cli.nextboot import change_config, disable, enable
from qmpvcpu.cli.options import Daring, Impact, Options, Permits
from qmpvcpu.cli.progress import progress
from qmpvcpu.cli.run import Shell, carry_out
from qmpvcpu.cli.show import headline, map_row, milliseconds, state_json
from qmpvcpu.cli.table import WIDE, vcpu_table
from qmpvcpu.errors import PlugUnprovenError, QmpVcpuError, printable
from qmpvcpu.model.jsonform import layout_as_json
from qmpvcpu.model.transition import Action, Affect, Step
from qmpvcpu.model.verdicts import Plugged, Proof, Unplugged, as_json, verdict_of
from qmpvcpu.model.vm import VmStatus
from qmpvcpu.planning.checks import Situation, check_unplug
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.request import error_for

# libvirt's own bound; no machine of QEMU's comes near it.
_MAX_ID: Final = 16383


def list_(
    *,
    options: Options,
) -> int:
    """Show every vCPU: plugged or free, order, place, device id, QOM path, host thread.

    Reads only. States: plugged; fixed (plugged, cannot be unplugged by us now); pending (its removal is accepted and
    the guest has not answered); free.

      qmpvcpu list --qmp /run/vm.qmp

      qmpvcpu list --qmp tcp:host:4444 --json

    Exit codes: 0 shown; 2 bad usage; 3 no connection, or QEMU lost; 4 record unreadable or locked.
    """
    return carry_out(options, _list)


def plug(
    vcpu: Annotated[
        int | None,
        typer.Argument(
            metavar="ID",
            min=0,
            max=_MAX_ID,
            help="vCPU id; none: the first free one.",
            show_default=False,
            autocompletion=ids_to_plug,
        ),
    ] = None,
    *,
    proof: Annotated[
        Proof, typer.Option("--proof", help="present: QEMU has it. acknowledged: the guest has said so too.")
    ] = Proof.PRESENT,
    impact: Impact,
    daring: Daring,
    options: Options,
) -> int:
    """Plug one vCPU, the chosen one or the first free one.

    What is known not to work is denied and never sent: an occupied slot, an unknown id, a full machine, a VM that
    migrates, a step that this QEMU would not survive.

      qmpvcpu plug 3 --qmp /run/vm.qmp

      qmpvcpu plug --proof acknowledged --timeout 5 --qmp /run/vm.qmp

      qmpvcpu plug 3 --affect both --config vm.xml --qmp /run/vm.qmp

    Exit codes: 0 plugged; 1 rejected by QEMU, or plugged without the proof asked for; 2 denied, nothing sent;
    3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT or
    SIGTERM.
    """
    return carry_out(options, lambda shell: _plug(shell, vcpu, proof, daring, impact))


def unplug(
    vcpus: Annotated[
        list[int],
        typer.Argument(
            metavar="ID...",
            min=0,
            max=_MAX_ID,
            help="vCPU ids, asked for one by one.",
            autocompletion=ids_to_unplug,
        ),
    ],
    *,
    impact: Impact,
    permits: Permits,
    options: Options,
) -> int:
    """Unplug vCPUs one by one; each has left when QEMU proves it, not when it was asked.

    The guest may refuse (its reason is shown, it can be asked again), or take its time: after --timeout the vCPU is
    pending. QEMU never forgets such a request; unplug it again to wait for the same answer, nothing is sent twice.
    After one that does not leave, no other is asked for.

      qmpvcpu unplug 3 --qmp /run/vm.qmp

      qmpvcpu unplug 5 4 3 --timeout 60 --qmp /run/vm.qmp

    Exit codes: 0 all are gone; 1 refused, rejected or pending; 2 denied, nothing sent; 3 no connection, QEMU lost,
    outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT or
    SIGTERM.
    """
    return carry_out(options, lambda shell: _unplug(shell, vcpus, permits, impact))


async def _list(shell: Shell) -> Answer:
    """Read the VM and show every vCPU."""
    async with shell.attach(reply_timeout=shell.reply_timeout, read_only=True) as vm:
        layout = vm.layout
    width = shell.out.width
    text = Group(headline(layout, width), "", vcpu_table(layout, narrow=width < WIDE))
    return Answer(REACHED, document(**layout_as_json(layout)), text)


async def _plug(shell: Shell, vcpu: int | None, proof: Proof, daring: Daring, impact: Impact) -> Answer:
    """Plug one vCPU, or the first free one."""
    timeout = shell.guest_timeout
    if impact.affect is Affect.CONFIG:
        return await change_config(shell, impact.document(shell.options), lambda config: enable(config, vcpu))
    if impact.affect is Affect.BOTH:
        impact.document(shell.options)
    async with shell.attach(config=impact.config) as vm:
        started = time.monotonic()
        require = proof is Proof.ACKNOWLEDGED
        async with progress(vm, shell.err, wanted="plugging"):
            try:
                ids = await vm.plug(
                    vcpu,
                    proof=proof,
                    require_proof=require,
                    timeout=timeout,
                    allow_fatal=daring.allow_fatal,
                    affect=impact.affect,
                )
            except PlugUnprovenError as error:
                seconds = time.monotonic() - started
                verdict = Plugged(vm.layout.slot_of(min(error.ids)).ids, False, error.code, error.reason, seconds)
                shell.done.append(as_json(verdict))
                raise
        seconds = time.monotonic() - started
        layout = vm.layout
    slot = layout.slot_of(min(ids))
    acknowledged = layout[slot.first].acknowledged
    step = as_json(Plugged(ids, acknowledged, slot.answer.code if slot.answer else None, seconds=seconds))
    said = ", the guest acknowledged it" if acknowledged else ""
    said += ", at the next boot too" if impact.affect is Affect.BOTH else ""
    text = (
        f"plugged vCPU {ids} as {printable(str(slot.device_id))} in {milliseconds(seconds)}{said}\n{map_row(layout)}"
    )
    return Answer(REACHED, document(steps=[step], **impact.as_json(), **state_json(layout)), text)


async def _unplug(shell: Shell, vcpus: Sequence[int], permits: Permits, impact: Impact) -> Answer:
    """Unplug vCPUs one by one; after one that does not leave, no other is asked for."""
    timeout = shell.guest_timeout
    wanted = list(dict.fromkeys(vcpus))
    if impact.affect is Affect.CONFIG:
        return await change_config(shell, impact.document(shell.options), lambda config: disable(config, wanted))
    if impact.affect is Affect.BOTH:
        impact.document(shell.options)
    async with shell.attach(config=impact.config) as vm:
        _check_all(vm, wanted, permits)
        if impact.affect is Affect.BOTH and impact.config is not None:
            disable(
                await qmpvcpu.DomainConfig.load(impact.config), wanted
            )  # its value only: denied before anything is sent
        shell.not_sent = wanted
        while shell.not_sent:
            if impact.affect is Affect.BOTH:
                await _unplug_both(shell, vm, shell.not_sent.pop(0), timeout, permits)
            else:
                await _unplug_one(shell, vm, shell.not_sent.pop(0), timeout, permits)
        layout = vm.layout
    content = document(steps=shell.done, **impact.as_json(), **state_json(layout))
    return Answer(REACHED, content, map_row(layout))


async def _unplug_both(shell: Shell, vm: VcpuController, vcpu: int, timeout: float, permits: Permits) -> None:
    started = time.monotonic()
    joined = vcpu in vm.layout.pending
    async with progress(
        vm, shell.err, wanted=f"vCPU {vcpu}: asking for it", steps=_several(vm, vcpu, shell.not_sent)
    ):
        try:
            ids = await vm.unplug(vcpu, timeout=timeout, affect=Affect.BOTH, **dataclasses.asdict(permits))
        except QmpVcpuError as error:
            if (verdict := verdict_of(error)) is not None:
                shell.done.append(as_json(verdict) | {"joined": joined})
            raise
    seconds = time.monotonic() - started
    shell.done.append(as_json(Unplugged(ids, seconds=seconds)) | {"joined": joined})
    shell.say(f"unplugged vCPU {ids} in {milliseconds(seconds)}, at the next boot too")


def _check_all(vm: VcpuController, vcpus: Sequence[int], permits: Permits) -> None:
    """Deny what can be known beforehand while nothing is sent; the VM's run state is asked for with each."""
    now = Situation(layout=vm.layout, status=VmStatus("running"), created=0)
    for vcpu in vcpus:
        check_unplug(now, vcpu, **dataclasses.asdict(permits))


def _several(vm: VcpuController, vcpu: int, others: Sequence[int]) -> list[Step]:
    """Return what is to leave still, *vcpu* first, for who waits; nothing if it is *vcpu* alone."""
    slots = [vm.layout.slot_of(each) for each in ([vcpu, *others] if others else ())]
    return [Step(Action.UNPLUG, slot.ids, slot.qom_path) for slot in slots]


async def _unplug_one(shell: Shell, vm: VcpuController, vcpu: int, timeout: float, permits: Permits) -> None:
    async with progress(
        vm, shell.err, wanted=f"vCPU {vcpu}: asking for it", steps=_several(vm, vcpu, shell.not_sent)
    ):
        request = await vm.request_unplug(vcpu, **dataclasses.asdict(permits))
        if request.joined:
            shell.err.print(
                f"vCPU {vcpu}: asked for before and unanswered, so nothing is sent; waiting for the answer"
            )
        verdict = await request.wait(timeout)
    shell.done.append(as_json(verdict) | {"joined": request.joined})
    error = error_for(verdict, timeout)
    if error is not None:
        raise error
    if isinstance(verdict, Unplugged):
        shell.say(f"unplugged vCPU {verdict.ids} in {milliseconds(verdict.seconds)}")
