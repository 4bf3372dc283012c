"""What each command does: one or two calls of the library, and the answer made of what they return."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group

from qmpvcpu import Proof, VcpuController
from qmpvcpu.cli.options import BadUsageError, Daring, Permits
from qmpvcpu.cli.progress import progress
from qmpvcpu.cli.run import REACHED, Answer, Shell
from qmpvcpu.cli.show import (
    document,
    headline,
    map_row,
    milliseconds,
    state_json,
    vcpu_table,
)
from qmpvcpu.controller.request import error_for
from qmpvcpu.domainxml import omissions, render
from qmpvcpu.errors import PlugUnprovenError, RecordError
from qmpvcpu.model import Plugged, Unplugged, VmStatus, as_json
from qmpvcpu.model.jsonform import layout_as_json
from qmpvcpu.planning import Situation, check_unplug
from qmpvcpu.record import save

__all__ = ["list_vcpus", "plug", "unplug", "write_xml"]


# Columns that all of the table needs.
_WIDE = 72


async def list_vcpus(shell: Shell) -> Answer:
    """Read the VM and show every vCPU."""
    async with shell.attach(reply_timeout=shell.reply_timeout) as vm:
        layout = vm.layout
    text = Group(headline(layout), "", vcpu_table(layout, narrow=shell.out.width < _WIDE))
    return Answer(REACHED, document(**layout_as_json(layout)), text)


async def plug(shell: Shell, vcpu: int | None, proof: Proof, daring: Daring) -> Answer:
    """Plug one vCPU, or the first free one."""
    timeout = shell.guest_timeout
    async with shell.attach() as vm:
        started = time.monotonic()
        require = proof is Proof.ACKNOWLEDGED
        async with progress(vm, shell.err, wanted="plugging"):
            try:
                ids = await vm.plug(
                    vcpu, proof=proof, require_proof=require, timeout=timeout, allow_fatal=daring.allow_fatal
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
    text = f"plugged vCPU {ids} as {slot.device_id} in {milliseconds(seconds)}{said}\n{map_row(layout)}"
    return Answer(REACHED, document(steps=[step], **state_json(layout)), text)


async def unplug(shell: Shell, vcpus: Sequence[int], permits: Permits) -> Answer:
    """Unplug vCPUs one by one; after one that does not leave, no other is asked for."""
    timeout = shell.guest_timeout
    wanted = list(dict.fromkeys(vcpus))
    async with shell.attach() as vm:
        _check_all(vm, wanted, permits)
        shell.not_sent = wanted
        while shell.not_sent:
            await _unplug_one(shell, vm, shell.not_sent.pop(0), timeout, permits)
        layout = vm.layout
    return Answer(REACHED, document(steps=shell.done, **state_json(layout)), map_row(layout))


def _check_all(vm: VcpuController, vcpus: Sequence[int], permits: Permits) -> None:
    """Deny what can be known beforehand while nothing is sent; the VM's run state is asked for with each."""
    now = Situation(layout=vm.layout, status=VmStatus("running"), created=0)
    for vcpu in vcpus:
        check_unplug(now, vcpu, **dataclasses.asdict(permits))


async def _unplug_one(shell: Shell, vm: VcpuController, vcpu: int, timeout: float, permits: Permits) -> None:  # noqa: ASYNC109 - passed on
    async with progress(vm, shell.err, wanted=f"vCPU {vcpu}: asking for it"):
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


async def write_xml(shell: Shell, emulator: str | None, output: Path | None) -> Answer:
    """Write the live state as libvirt's domain XML."""
    async with shell.attach(reply_timeout=shell.reply_timeout) as vm:
        layout = vm.layout
    xml = render(layout, emulator=emulator)
    left_out = omissions(layout)
    content = document(xml=xml.decode(), left_out=list(left_out), **state_json(layout))
    if output is None:
        return Answer(REACHED, content, xml.decode().rstrip("\n"), complaint=left_out)
    try:
        await save(output, xml)
    except RecordError as error:
        raise BadUsageError(f"--output: {error}") from error
    return Answer(REACHED, content | {"output": str(output)}, f"written to {output}", complaint=left_out)
