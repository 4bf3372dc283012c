"""doctor: what works here, what does not, and what to do about it."""

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qmpvcpu.cli.answer import NO_ANSWER, NOT_REACHED, REACHED, Answer
from qmpvcpu.cli.documents import document
from qmpvcpu.cli.examine import Finding, Level, TriedQemu, examine_machine, try_qemus
from qmpvcpu.cli.examine_vm import examine_vm, unreachable
from qmpvcpu.cli.options import BadUsageError, Options, Saying, check_seconds
from qmpvcpu.cli.run import Shell, carry_out
from qmpvcpu.cli.show import state_json
from qmpvcpu.errors import MonitorError, printable

_STYLES: Final = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.FAULT: "bold red"}
_REPLY_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class Looking(Saying):
    """What is looked at besides this machine.

    Attributes:
        qmp: Address of a VM's QMP socket, or None.
        timeout: How long that VM's QEMU has for each reply, in seconds, or None.
    """

    qmp: Annotated[
        str | None,
        typer.Option("--qmp", metavar="ADDRESS", help="Look at this VM too. Else $QMPVCPU_QMP.", show_default=False),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", help="How long its QEMU has for each reply (5).", show_default=False
        ),
    ] = None

    def after(self, earlier: Options) -> "Looking":
        """Return these options on top of those given *earlier*, before the command.

        Raises:
            BadUsageError: The deadline is no length of time, or a record is named.
        """
        if earlier.record is not None:
            raise BadUsageError("doctor reads no record: recover --record tells what is in one")
        return Looking(
            json=self.json or earlier.json,
            verbose=self.verbose or earlier.verbose,
            qmp=earlier.qmp if self.qmp is None else self.qmp,
            timeout=check_seconds("--timeout", earlier.timeout if self.timeout is None else self.timeout),
        )


def doctor(
    *,
    options: Looking,
) -> int:
    """Tell what works here, what does not, and what to do about it. Changes nothing.

    Runs the micro-guest with every QEMU that is found, under KVM and TCG: that an accelerator is there says little.
    Names what these QEMUs are known not to survive, what may not be opened, what is missing. With --qmp also whether
    that VM can be spoken with, takes CPUs and gives them back, and whether its guest has ever answered.

      qmpvcpu doctor

      qmpvcpu doctor --qmp /run/vm.qmp --json

    Exit codes: 0 no fault; 1 something does not work; 2 bad usage; 3 no connection to the VM named, or QEMU lost;
    130 stopped by SIGINT or SIGTERM.
    """
    shared = Options(json=options.json, verbose=options.verbose, qmp=options.qmp, timeout=options.timeout)
    return carry_out(shared, _doctor)


async def _doctor(shell: Shell) -> Answer:
    if shell.options.qmp:
        shell.options = dataclasses.replace(shell.options, qmp=shell.options.address)  # checked before all else
    shell.err.print("running the micro-guest with every QEMU found ...", soft_wrap=True, style="dim")
    (qemus, of_qemus), (of_vm, seen) = await asyncio.gather(try_qemus(), _look_at_vm(shell))
    findings = [*examine_machine(qemus), *of_qemus, *of_vm]
    faults = sum(each.level is Level.FAULT for each in findings)
    unreached = bool(shell.options.qmp) and not seen
    content = document(
        faults=faults,
        findings=[_finding_json(each) for each in findings],
        qemus=[_qemu_json(each) for each in qemus],
        **seen,
    )
    code = NO_ANSWER if unreached else NOT_REACHED if faults else REACHED
    return Answer(code, content, Group(_table(findings), "", _summary(findings)))


async def _look_at_vm(shell: Shell) -> tuple[list[Finding], dict[str, Any]]:
    """Return what is found of the VM that is named, and its map if it could be read; nothing if none is."""
    address = shell.options.qmp
    if not address:
        return [], {}
    timeout = _REPLY_TIMEOUT if shell.options.timeout is None else shell.reply_timeout
    try:
        async with shell.attach(reply_timeout=timeout) as vm:
            answers = await vm.guest_answers()
            return list(examine_vm(vm, answers.values())), state_json(vm.layout)
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
                "known_faults": sorted(fault.name for fault in trial.faults),
            }
            for trial in qemu.trials
        ],
    }


def _table(findings: Sequence[Finding]) -> Table:
    """Return the findings, each with what to do in a line of its own."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        said = Text.assemble((f"{printable(each.subject)}: ", "bold"), printable(each.found))
        if each.advice:
            said.append(
                f"\n-> {printable(each.advice)}", "italic" if each.level is Level.NOTE else _STYLES[each.level]
            )
        table.add_row(Text(each.level.value, _STYLES[each.level]), said)
    return table


def _summary(findings: Sequence[Finding]) -> Text:
    counts = ((level, sum(each.level is level for each in findings)) for level in (Level.FAULT, Level.WARNING))
    said = [f"{count} {level.value}{'' if count == 1 else 's'}" for level, count in counts if count]
    return Text(", ".join(said) or "no fault found", "" if said else "green")
