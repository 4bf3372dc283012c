"""doctor: what works here, what does not, and what to do about it."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from qmpvcpu.cli.examine_agent import examine_agent
from qmpvcpu.cli.examine_machine import TriedQemu, examine_machine, try_qemus
from qmpvcpu.cli.examine_vm import examine_host, examine_vm, unreachable
from qmpvcpu.cli.findings import Finding, Level
from qmpvcpu.cli.options import AGENT, NAME, OUTPUT_OPTIONS, QMP, READ_RECORD, REPLY_TIMEOUT, command
from qmpvcpu.cli.output import Column, Line, Table
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.documents.form import NO_ANSWER, NOT_REACHED, REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.errors import MonitorError, counted, printable
from qmpvcpu.model.codec import to_json

_STYLES: Final = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.FAULT: "bold red"}


@command(QMP, NAME, READ_RECORD, AGENT, REPLY_TIMEOUT, *OUTPUT_OPTIONS)
async def doctor(shell: Shell) -> CommandResult:
    """Show what works here, what does not, and what to do about it. Changes nothing.

    Runs the micro-guest with every QEMU found, under KVM and TCG, since one that is present may still fail.
    Lists these QEMUs' known faults, and files that cannot be opened or are missing. With --qmp it also says whether
    that VM answers, can plug and unplug CPUs, whether its guest has ever answered, and whether its threads can be
    found and moved on this host; with --record also which have drifted. With --agent it also
    says what the guest agent may do, and how it is known which of the guest's CPUs each vCPU is.

      qmpvcpu doctor

      qmpvcpu doctor --qmp /run/vm.qmp --json

      qmpvcpu doctor --qmp /run/vm.qmp --agent /run/vm.agent

    Exit codes: 0 no fault; 1 something does not work; 2 bad usage; 3 no connection to the VM named, or QEMU lost;
    4 record unreadable or locked; 130 stopped by a signal.
    """
    address = shell.options.address if shell.options.qmp else ""  # checked before anything else
    shell.note("running the micro-guest with every QEMU found ...")
    (qemus, of_qemus), (of_vm, seen) = await asyncio.gather(try_qemus(), _look_at_vm(shell, address))
    findings = [*examine_machine(qemus), *of_qemus, *of_vm]
    faults = sum(each.level is Level.FAULT for each in findings)
    content = document(
        faults=faults,
        findings=[_finding_json(each) for each in findings],
        qemus=[_qemu_json(each) for each in qemus],
        **seen,
    )
    code = NO_ANSWER if address and not seen else NOT_REACHED if faults else REACHED
    return CommandResult(code, content, (_table(findings), "", _summary(findings)))


async def _look_at_vm(shell: Shell, address: str) -> tuple[list[Finding], dict[str, Any]]:
    """Return what is found of the VM at *address*, and its map if it could be read; nothing if *address* is ""."""
    if not address:
        advice = "name the VM too: --qmp ADDRESS"
        alone = [Finding(Level.NOTE, "agent", "it was not asked: the VM it belongs to is not named", advice)]
        unread = [Finding(Level.NOTE, "record", "it was not read: the VM it belongs to is not named", advice)]
        options = shell.options
        return [*(alone if options.agent_address else []), *(unread if options.record else [])], {}
    try:
        async with shell.attach(read_only=True) as vm:
            answers = await vm.guest_answers()
            threads = await examine_host(vm, address, shell.options.record)
            # The agent first: what it tells of the guest decides about plugs and unplugs too.
            asked = await examine_agent(vm, shell.options.reply_timeout) if vm.guest.has_agent else []
            return [*examine_vm(vm, answers.values()), *threads, *asked], state_json(vm.layout)
    except MonitorError as error:
        return [unreachable(address, error)], {}


def _finding_json(finding: Finding) -> dict[str, str]:
    return {
        "level": finding.level.value,
        "subject": finding.subject,
        "found": finding.found,
        "advice": finding.advice,
    }


def _qemu_json(qemu: TriedQemu) -> dict[str, Any]:
    return {
        "version": qemu.version,
        "path": str(qemu.path),
        "trials": [
            {
                "accelerator": trial.accelerator,
                "works": not trial.why,
                "why": trial.why,
                "seconds": list(trial.seconds),
                "known_faults": to_json(frozenset(trial.faults)),
            }
            for trial in qemu.trials
        ],
    }


def _table(findings: Sequence[Finding]) -> Table:
    """Return the findings, each with what to do in a line of its own."""
    table = Table(Column(), Column(fold=True))
    for each in findings:
        parts = [(f"{printable(each.subject)}: ", "bold"), (printable(each.found), "")]
        if each.advice:
            style = "italic" if each.level is Level.NOTE else _STYLES[each.level]
            parts.append((f"\n-> {printable(each.advice)}", style))
        table.add(Line((each.level.value, _STYLES[each.level])), Line(*parts))
    return table


def _summary(findings: Sequence[Finding]) -> Line:
    counts = ((level, sum(each.level is level for each in findings)) for level in (Level.FAULT, Level.WARNING))
    said = [counted(count, level.value) for level, count in counts if count]
    return Line(", ".join(said) or "no fault found", style="" if said else "green")
