"""What each command does: one or two calls of the library, and the answer made of what they return."""

import dataclasses
import time
from collections.abc import Sequence

from rich.console import Group

from qmpvcpu import Affect, Proof, VcpuController
from qmpvcpu.cli.nextboot import change_config, disable, enable
from qmpvcpu.cli.options import Daring, Impact, Permits
from qmpvcpu.cli.progress import progress
from qmpvcpu.cli.run import REACHED, Answer, Shell
from qmpvcpu.cli.show import document, headline, map_row, milliseconds, state_json
from qmpvcpu.cli.table import WIDE, vcpu_table
from qmpvcpu.controller.request import error_for
from qmpvcpu.errors import PlugUnprovenError, QmpVcpuError
from qmpvcpu.model import Action, Plugged, Step, Unplugged, VmStatus, as_json, verdict_of
from qmpvcpu.model.jsonform import layout_as_json
from qmpvcpu.planning import Situation, check_unplug
from qmpvcpu.record import DomainConfig

__all__ = ["list_vcpus", "plug", "unplug"]


async def list_vcpus(shell: Shell) -> Answer:
    """Read the VM and show every vCPU."""
    async with shell.attach(reply_timeout=shell.reply_timeout) as vm:
        layout = vm.layout
    width = shell.out.width
    text = Group(headline(layout, width), "", vcpu_table(layout, narrow=width < WIDE))
    return Answer(REACHED, document(**layout_as_json(layout)), text)


async def plug(shell: Shell, vcpu: int | None, proof: Proof, daring: Daring, impact: Impact) -> Answer:
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
                verdict = Plugged(vm.layout.slot_of(error.vcpus[0]).ids, False, error.code, error.reason, seconds)
                shell.done.append(as_json(verdict))
                raise
        seconds = time.monotonic() - started
        layout = vm.layout
    slot = layout.slot_of(min(ids))
    acknowledged = layout[slot.first].acknowledged
    step = as_json(Plugged(ids, acknowledged, slot.answer.code if slot.answer else None, seconds=seconds))
    said = ", the guest acknowledged it" if acknowledged else ""
    said += ", at the next boot too" if impact.affect is Affect.BOTH else ""
    text = f"plugged vCPU {ids} as {slot.device_id} in {milliseconds(seconds)}{said}\n{map_row(layout)}"
    return Answer(REACHED, document(steps=[step], **impact.as_json(), **state_json(layout)), text)


async def unplug(shell: Shell, vcpus: Sequence[int], permits: Permits, impact: Impact) -> Answer:
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
            disable(await DomainConfig.load(impact.config), wanted)  # its value only: denied before anything is sent
        shell.not_sent = wanted
        while shell.not_sent:
            if impact.affect is Affect.BOTH:
                await _unplug_both(shell, vm, shell.not_sent.pop(0), timeout, permits)
            else:
                await _unplug_one(shell, vm, shell.not_sent.pop(0), timeout, permits)
        layout = vm.layout
    content = document(steps=shell.done, **impact.as_json(), **state_json(layout))
    return Answer(REACHED, content, map_row(layout))


async def _unplug_both(shell: Shell, vm: VcpuController, vcpu: int, timeout: float, permits: Permits) -> None:  # noqa: ASYNC109 - passed on
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


async def _unplug_one(shell: Shell, vm: VcpuController, vcpu: int, timeout: float, permits: Permits) -> None:  # noqa: ASYNC109 - passed on
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
