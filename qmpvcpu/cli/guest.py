"""guest list, online and offline: which vCPUs the guest's own system uses, through its agent."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from qmpvcpu.cli.app import LazyGroup, pass_on
from qmpvcpu.cli.config import VcpuIds, listed
from qmpvcpu.cli.options import (
    AGENT,
    NAME,
    OUTPUT_OPTIONS,
    QMP,
    REPLY_TIMEOUT,
    Seconds,
    command,
    option,
)
from qmpvcpu.cli.output import Block, Column, Line, Table
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.guest import GuestVcpu, KnownBy
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap, named

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_HELP = """Show which vCPUs the guest uses, and bring them online or take them offline there.

QEMU knows which vCPUs are plugged. Only the guest knows which it uses. Its agent (qemu-ga) tells, on a socket of its
own; docs/guest-agent.md shows how to set it up.

  qmpvcpu guest list --qmp /run/vm.qmp --agent /run/vm.agent

  qmpvcpu guest online 3 --qmp /run/vm.qmp --agent /run/vm.agent

Exit codes: 0 reached; 1 refused by the guest, or forbidden to its agent; 2 bad usage, or it is not known which of the
guest's CPUs a vCPU is, nothing done; 3 no connection, the agent does not answer, outcome unknown; 130 stopped by a
signal.
"""

guest = LazyGroup(
    "guest",
    {
        "list": ("guest:list_", "Show which vCPUs the guest uses."),
        "online": ("guest:online", "Bring vCPUs online in the guest."),
        "offline": ("guest:offline", "Take vCPUs offline in the guest."),
    },
    help=_HELP,
    params=[REPLY_TIMEOUT, *OUTPUT_OPTIONS],
    callback=pass_on,
    no_args_is_help=False,
)

KNOWN_BY: Final = {
    KnownBy.FIRMWARE: "the guest's files",
    KnownBy.RULE: "the kernel's rule",
    KnownBy.LEARNT: "what was seen",
    KnownBy.UNKNOWN: "",
}
"""How a guest's number is known, in words that follow "by"."""

READ_FILES: Final = "let the agent read files (docs/guest-agent.md)"
"""What to do about a number that is unknown."""

_TIMEOUT: Final = option(
    "--timeout", metavar="SECONDS", type=Seconds(), help="How long the guest has for all of it. Else --reply-timeout."
)
_OPTIONS: Final = (_TIMEOUT, AGENT, QMP, NAME, REPLY_TIMEOUT, *OUTPUT_OPTIONS)


class _PluggedIds(VcpuIds):
    """vCPU ids; a shell offers those that are plugged."""

    def shell_complete(self, ctx: click.Context, _: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from qmpvcpu.cli.completion import is_plugged, offered_ids  # not at the top: only completion needs it

        return offered_ids(ctx, incomplete, is_plugged)


def _ids() -> click.Argument:
    return click.Argument(["vcpus"], metavar="ID...", nargs=-1, required=True, type=_PluggedIds(free=True))


@command(*_OPTIONS)
async def list_(shell: Shell, *, timeout: float | None = None) -> CommandResult:
    """Show the guest's CPUs by its own numbers, which vCPU each is, and whether the guest uses it. Reads only.

    A guest's CPU number is not a vCPU id. The vCPU is left empty if it is not known.

      qmpvcpu guest list --qmp /run/vm.qmp --agent /run/vm.agent

      qmpvcpu guest list --qmp /run/vm.qmp --agent /run/vm.agent --json

    Exit codes: 0 shown; 1 forbidden to the agent; 2 bad usage; 3 no connection, or the agent does not answer;
    130 stopped by a signal.
    """
    limit = shell.options.reply_timeout if timeout is None else timeout
    _check_named(shell)
    async with shell.attach() as vm:
        cpus = await vm.guest.vcpus(timeout=limit)
        system = await shell.ask_system(vm)
        layout = vm.layout
    content = document(os=to_json(system), **_cpus_json(cpus, layout), **state_json(layout))
    said = str(system or "the agent does not tell which system it is (guest-get-osinfo)")
    return CommandResult(REACHED, content, (said, "", *_table(cpus, layout)))


@command(_ids(), *_OPTIONS)
async def online(shell: Shell, *, vcpus: tuple[list[int], ...], timeout: float | None = None) -> CommandResult:
    """Bring the vCPUs with these IDs online in the guest, and check that they are. Those online already stay so.

    An ID is a vCPU id, as in plug, and may be a range or a list: 2-4, or 2,5.

      qmpvcpu guest online 3 --qmp /run/vm.qmp --agent /run/vm.agent

    Exit codes: 0 the guest uses them; 1 refused by the guest, or forbidden to its agent; 2 bad usage, one is not
    plugged, or it is not known which of the guest's CPUs it is, nothing done; 3 no connection, the agent does not
    answer, outcome unknown; 130 stopped by a signal.
    """
    return await _switch(shell, vcpus, timeout, is_online=True)


@command(_ids(), *_OPTIONS)
async def offline(shell: Shell, *, vcpus: tuple[list[int], ...], timeout: float | None = None) -> CommandResult:
    """Take the vCPUs with these IDs offline in the guest, and check that they are. They stay plugged.

    An ID is a vCPU id, as in unplug, and may be a range or a list: 2-4, or 2,5. To unplug them too, use unplug
    --offline-first.

      qmpvcpu guest offline 3 --qmp /run/vm.qmp --agent /run/vm.agent

    Exit codes: 0 the guest does not use them; 1 refused by the guest, or forbidden to its agent; 2 bad usage, one is
    not plugged, or it is not known which of the guest's CPUs it is, nothing done; 3 no connection, the agent does not
    answer, outcome unknown; 130 stopped by a signal.
    """
    return await _switch(shell, vcpus, timeout, is_online=False)


async def _switch(
    shell: Shell, vcpus: tuple[list[int], ...], timeout: float | None, *, is_online: bool
) -> CommandResult:
    ids = VcpuMap(listed(vcpus))
    word = "online" if is_online else "offline"
    limit = shell.options.reply_timeout if timeout is None else timeout
    _check_named(shell)
    async with shell.attach() as vm:
        switch = vm.guest.set_online if is_online else vm.guest.set_offline
        changed = await switch(ids, timeout=limit)
        cpus = await vm.guest.vcpus(timeout=limit)
        layout = vm.layout
    said = [f"{named(changed)}: {word} in the guest now"] if changed else []
    said += [f"{named(ids - changed)}: {word} in the guest already"] if ids - changed else []
    content = document(changed=str(changed), **_cpus_json(cpus, layout), **state_json(layout))
    return CommandResult(REACHED, content, (*said, "", *_table(cpus, layout)))


def _check_named(shell: Shell) -> None:
    """Make sure that a VM is named, and its agent.

    Raises:
        BadUsageError: One of them is not.
    """
    options = shell.options
    if options.address and options.agent_address is None:
        raise BadUsageError("which agent? Name its socket: --agent ADDRESS, or QMPVCPU_AGENT in the environment")


def not_listed(cpus: Collection[GuestVcpu], layout: Layout) -> VcpuMap:
    """Return the plugged vCPUs that the guest's list does not have; none where it has CPUs that may be these."""
    if any(cpu.vcpu is None for cpu in cpus):
        return VcpuMap()
    return layout.enabled - {cpu.vcpu for cpu in cpus if cpu.vcpu is not None}


def _cpus_json(cpus: Sequence[GuestVcpu], layout: Layout) -> dict[str, Any]:
    return {"cpus": [to_json(cpu) for cpu in cpus], "not_listed": str(not_listed(cpus, layout))}


def _table(cpus: Sequence[GuestVcpu], layout: Layout) -> list[Block]:
    """Return the guest's CPUs, and what is plugged and not among them."""
    table = Table(
        Column("guest's\nnumber", "right"),
        Column("vCPU", "right"),
        Column("state"),
        Column("may go\noffline"),
        Column("known by", fold=True),
    )
    for cpu in sorted(cpus, key=lambda each: each.number):
        state = Line(("online", "green") if cpu.online else ("offline", "yellow"))
        vcpu = "" if cpu.vcpu is None else str(cpu.vcpu)
        table.add(str(cpu.number), vcpu, state, "yes" if cpu.can_offline else "no", KNOWN_BY[cpu.known_by])
    blocks: list[Block] = [table]
    if missing := not_listed(cpus, layout):
        blocks.append(Line((f"plugged, but not in the guest's list: {named(missing)}", "yellow")))
    if unknown := [cpu.number for cpu in cpus if cpu.vcpu is None]:
        numbers = VcpuMap(unknown)
        blocks.append(f"it is not known which vCPU the guest's CPU {numbers} is: {READ_FILES}")
    return blocks
