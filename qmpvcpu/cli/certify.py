"""certify: what a guest can do with vCPUs, as a table."""

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, Final

import click

from qmpvcpu.certify import Ability, AbilityRow, AbilityVerdict, Certificate, certify, wait_booted
from qmpvcpu.cli.failures import failure
from qmpvcpu.cli.options import (
    AGENT,
    NAME,
    OUTPUT_OPTIONS,
    QMP,
    REPLY_TIMEOUT,
    TIMEOUT,
    Seconds,
    command,
    flag,
    named_on_the_line,
    option,
)
from qmpvcpu.cli.output import Line
from qmpvcpu.cli.progress import progress
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import headline
from qmpvcpu.cli.wording import in_options
from qmpvcpu.documents.form import NO_ANSWER, NOT_REACHED, NOT_SENT, REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.errors import MonitorError, printable
from qmpvcpu.model.guest import GuestOs
from qmpvcpu.testing.directory import TemporaryDirectoryError
from qmpvcpu.testing.qemu import QemuProcess, QemuProcessError, qemu_named
from qmpvcpu.vm.controller import VcpuController

# So many more vCPUs let everything be tried, also where each plug is one of maxcpus for ever.
_ROOM: Final = 8
_AGENT_PORT: Final = "org.qemu.guest_agent.0"  # as qemu-ga looks for it in the guest
_TO_END_S: Final = 5.0  # how long a QEMU that was told to end, or hung up, may take for that
_WIDTH: Final = max(len(ability.value) for ability in Ability)
_STYLES: Final = {
    AbilityVerdict.WORKS: "green",
    AbilityVerdict.REFUSED: "yellow",
    AbilityVerdict.NEVER: "red",
    AbilityVerdict.NOT_POSSIBLE: "dim",
    AbilityVerdict.LOST: "bold red",
}


@command(
    click.Argument(["qemu"], metavar="[-- QEMU...]", nargs=-1),
    flag("--disturb", "Confirm that the VM at --qmp may be disturbed: its vCPUs come and go, and it is reset."),
    flag("--fresh", "Confirm that no vCPU has left the QEMU at --qmp yet. Under TCG nothing is plugged otherwise."),
    flag("--no-reset", "Leave out the rows that need a reset."),
    option(
        "--boot",
        metavar="SECONDS",
        type=Seconds(),
        help="How long the guest may take to boot (60), after certify has started or reset it. Without an agent,"
        " certify waits that long.",
    ),
    flag("--markdown", "Print the table as Markdown."),
    TIMEOUT,
    QMP,
    AGENT,
    NAME,
    REPLY_TIMEOUT,
    *OUTPUT_OPTIONS,
)
async def certify_(
    shell: Shell,
    *,
    qemu: tuple[str, ...],
    disturb: bool,
    fresh: bool,
    no_reset: bool,
    boot: float | None,
    markdown: bool,
    timeout: float = 30.0,
) -> CommandResult:
    """Try everything a guest can do with vCPUs, and show what works.

    It tries the VM at --qmp, which nobody else should be using, or starts the QEMU command after --. It gives that
    QEMU a QMP socket, and room for more vCPUs if its -smp has none, and ends it afterwards. Each row says works,
    refused, never (within the timeout) or not possible, and why. Steps that this QEMU is known not to survive are not
    tried. At the end, and when it is stopped, the VM at --qmp gets back the vCPUs that it had.

    Under KVM some hosts' kernels end QEMU when a vCPU is plugged again into a slot whose vCPU has run. One row does
    just that (docs/qemu-versions.md), so on a new host try a VM first that you can lose.

      qmpvcpu certify --disturb --qmp /run/vm.qmp

      qmpvcpu certify --markdown -- qemu-system-x86_64 -m 1024 -snapshot -drive file=disk.img

    Exit codes: 0 everything that can work did; 1 something was refused, or never came; 2 bad usage, nothing sent;
    3 no connection, QEMU did not start, or was lost; 130 stopped by a signal.
    """
    options = {"timeout": timeout, "fresh": fresh, "resets": not no_reset, "boot": 60.0 if boot is None else boot}
    if qemu:
        if named_on_the_line("qmp") or disturb:
            raise BadUsageError("certify tries the VM at --qmp, or the one that is started after --, not both")
        return await _certify_own(shell, qemu, options | {"fresh": True}, markdown=markdown)
    address = shell.options.address
    if not disturb:
        raise BadUsageError(f"certify plugs, unplugs and resets the VM at {address}: confirm that with --disturb")
    async with shell.attach() as vm:
        guest = await wait_booted(vm, timeout=options["boot"]) if vm.guest.has_agent else None
        return await _certify(shell, vm, guest, options, markdown=markdown)


async def _certify_own(
    shell: Shell, words: Sequence[str], options: dict[str, Any], *, markdown: bool
) -> CommandResult:
    program = qemu_named(words[0])
    if program is None:
        raise BadUsageError(f"{words[0]}: no program that can be run")
    given = {f"-{word.lstrip('-')}" for word in words if word.startswith("-")}  # two dashes are one to QEMU
    if "-daemonize" in given:
        raise BadUsageError("-daemonize: QEMU would leave; certify ends the QEMU that it starts")
    args = with_room(words[1:])
    shell.note(f"starting {words[0]} ...")
    try:
        async with QemuProcess(program, args, as_given=True) as process:
            await process.wait_ready(timeout=shell.options.reply_timeout)
            name = shell.options.name or (None if "-name" in given else "guest")
            agent = shell.options.agent or agent_of(args)
            shell.options = shell.options._replace(qmp=str(process.qmp), agent=agent, name=name)
            return await _certify_process(shell, process, options, markdown=markdown)
    except TemporaryDirectoryError as error:
        return failure(error, shell, NOT_SENT)
    except QemuProcessError as error:
        return failure(error, shell, NO_ANSWER)


async def _certify_process(
    shell: Shell, process: QemuProcess, options: dict[str, Any], *, markdown: bool
) -> CommandResult:
    async with shell.attach() as vm:
        try:
            await vm.run_control.resume()  # it may have been started with -S
            if not vm.guest.has_agent:
                shell.note(f"giving the guest {options['boot']:g} s to boot; with --agent it tells when it is up")
            guest = await wait_booted(vm, timeout=options["boot"])
            result = await _certify(shell, vm, guest, options | {"disposable": True}, markdown=markdown)
        finally:
            with contextlib.suppress(MonitorError):  # killed, it would lose what it has not written yet
                await vm.run_control.quit()
    with contextlib.suppress(TimeoutError):  # it hangs, which is told too
        async with asyncio.timeout(_TO_END_S):
            await process.wait()
    if result.code == NO_ANSWER:
        result.complaint = (*result.complaint, str(process.failure("what QEMU said")))
    return result


async def _certify(
    shell: Shell, vm: VcpuController, guest: GuestOs | None, options: dict[str, Any], *, markdown: bool
) -> CommandResult:
    rows: list[AbilityRow] = []
    before = vm.layout.enabled
    if not markdown:
        shell.say(headline(vm.layout, shell.out.width), "")
    task = asyncio.ensure_future(_rows(shell, vm, certify(vm, **options), rows, told=not markdown))

    async def stop() -> None:
        if "disposable" not in options:
            shell.note("putting the vCPUs back; a second signal lets go of the VM at once")
        task.cancel()

    with shell.signals.stopped_by(stop):
        try:
            await task
        except asyncio.CancelledError:
            result = failure(KeyboardInterrupt(), shell)
        else:
            result = _ended(rows)
    certificate = Certificate.of(vm.capabilities, rows, guest)
    result.document |= certificate.to_json() | state_json(vm.layout)
    if markdown:
        result.text = (as_markdown(certificate),)
    lost = any(row.verdict is AbilityVerdict.LOST for row in rows)  # the layout is of before that
    if vm.layout.enabled != before and not lost and "disposable" not in options:
        result.complaint = (*result.complaint, f"not as before: plugged are {vm.layout.enabled}, not {before}")
    return result


async def _rows(
    shell: Shell, vm: VcpuController, found: AsyncGenerator[AbilityRow, None], rows: list[AbilityRow], *, told: bool
) -> None:
    async with contextlib.aclosing(found):
        for ability in Ability:
            async with progress(vm, shell.err, waiting=f"{ability.value} ..."):
                row = await anext(found)
            row = replace(row, detail=in_options(row.detail))
            rows.append(row)
            if told:
                style = _STYLES[row.verdict]
                shell.say(Line(f"{row.ability.value:<{_WIDTH}}  ", (row.said, style)))


def _ended(rows: Sequence[AbilityRow]) -> CommandResult:
    lost = any(row.verdict is AbilityVerdict.LOST for row in rows)
    failed = [row.ability.value for row in rows if not row.ok]
    code = NO_ANSWER if lost else NOT_REACHED if failed else REACHED
    tried = sum(row.verdict is not AbilityVerdict.NOT_POSSIBLE for row in rows)
    untried = f" ({len(rows) - tried} were not possible)" if tried < len(rows) else ""
    said = f"qmpvcpu: {len(failed)} of {tried} that were tried did not work: {', '.join(failed)}{untried}"
    complaint = (said,) if failed else ()
    return CommandResult(code, document(), complaint=complaint)


def as_markdown(certificate: Certificate) -> str:
    """Return *certificate* as a table for a page."""
    who = [certificate.machine, certificate.accelerator, f"QEMU {certificate.qemu}", certificate.guest]
    rows = [
        ("vCPUs", ", ".join(filter(None, who))),
        ("---", "---"),
        *((row.ability.value, row.said) for row in certificate.rows),
    ]
    return "\n".join(f"| {left} | {_cell(right)} |" for left, right in rows)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def agent_of(arguments: Sequence[str]) -> str | None:
    """Return the path of the socket at which *arguments* of a QEMU put the guest's agent; None: there is none."""
    paths: dict[str, str] = {}
    ports = []
    for word, value in itertools.pairwise(arguments):
        kind, *options = value.split(",")
        given = dict(option.partition("=")[::2] for option in options)
        if word.lstrip("-") == "chardev" and kind == "socket":
            paths[given.get("id", "")] = given.get("path", "")
        elif word.lstrip("-") == "device" and kind == "virtserialport" and given.get("name") == _AGENT_PORT:
            ports.append(given.get("chardev", ""))
    return next((path for port in ports if (path := paths.get(port))), None)


def with_room(arguments: Sequence[str]) -> list[str]:
    """Return *arguments* of a QEMU with room for more vCPUs, if its ``-smp`` has none.

    Raises:
        BadUsageError: The ``-smp`` is none that can be read.
    """
    args = [*arguments]
    places = [place for place, word in enumerate(args[:-1], 1) if word in ("-smp", "--smp")]
    if not places:
        return [*args, "-smp", f"1,maxcpus={_ROOM}"]
    smp = args[places[-1]]
    options = (each.rpartition("=") for each in smp.split(","))
    try:
        counts = {name or "cpus": int(value) for name, _, value in options}
    except ValueError:
        raise BadUsageError(f"-smp {smp}: not understood") from None
    levels = {name: count for name, count in counts.items() if name not in ("cpus", "maxcpus")}
    whole = counts.get("maxcpus", math.prod(levels.values()))
    boot = counts.get("cpus", whole)
    if whole > boot:
        return args
    wanted = {"cpus": boot, **levels, "maxcpus": boot + _ROOM}
    if levels:
        inner = math.prod(count for name, count in levels.items() if name != "sockets")
        sockets = math.ceil((boot + _ROOM) / inner)
        wanted |= {"sockets": sockets, "maxcpus": sockets * inner}
    args[places[-1]] = ",".join(f"{name}={count}" for name, count in wanted.items())
    return args
