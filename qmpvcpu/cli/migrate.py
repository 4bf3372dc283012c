"""What a script that moves a VM needs besides ``migrate``: export, check-target, confirm-target, take-back.

The library's export also keeps its process from changing the source meanwhile. A command has ended by then, so
``confirm-target --source`` compares what the source became.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import click

from qmpvcpu.cli.change_options import ALLOW_FATAL
from qmpvcpu.cli.options import (
    OUTPUT,
    READ_OPTIONS,
    VM_OPTIONS,
    File,
    Seconds,
    command,
    exported_in,
    flag,
    option,
    read_document,
    write_file,
)
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Options, Shell
from qmpvcpu.cli.show import state_text
from qmpvcpu.documents.form import REACHED, as_line, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.errors import Outcome, RecordError, TargetMismatchError, printable
from qmpvcpu.migration import check_target, confirm_target
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.planning.compatibility import Difference, DifferenceKind, changes_since

_STATE: Final = click.Argument(["state"], metavar="STATE", type=File())


@command(
    option("--settle", metavar="SECONDS", type=Seconds(), help="Wait so long for removals that are pending."),
    OUTPUT,
    ALLOW_FATAL,
    *READ_OPTIONS,
)
async def export(shell: Shell, *, settle: float | None, output: str | None, allow_fatal: bool) -> CommandResult:
    """Print a VM's vCPUs for the other side of a migration, or of a save, as JSON. Reads only.

    From here on no vCPU of the source may change until the VM has arrived: the target must have exactly these. Then:
    start the target with -smp for the vCPUs that the VM booted with and -incoming defer, plug the others into it in
    their order, check-target, migrate, confirm-target. docs/migration.md has the whole.

      qmpvcpu export --settle 10 -o vm.json --qmp /run/vm.qmp

    Exit codes: 0 printed; 2 bad usage, or denied: it migrates, has migrated away, or this QEMU would not get it away;
    3 no connection, or QEMU lost; 4 record unreadable or locked.
    """
    async with (
        shell.attach(read_only=True) as vm,
        await vm.export(settle=settle or 0.0, allow_fatal=allow_fatal) as exported,
    ):
        state = exported.state
    data = as_line(state.to_json()).encode()
    content = document(export=state.to_json(), **state_json(state.layout))
    if output is None:
        return CommandResult(REACHED, content, data=data)
    await write_file(output, data)
    return CommandResult(REACHED, content | {"output": output}, (f"written to {output}",))


@command(
    _STATE,
    option(
        "--accept",
        metavar="KIND",
        multiple=True,
        help="A difference that is known to be right: qemu-version, ...; repeatable.",
    ),
    *READ_OPTIONS,
)
async def check_target_command(shell: Shell, *, state: str, accept: tuple[str, ...]) -> CommandResult:
    """Tell whether the QEMU at --qmp, which waits for a migration, can take over what was exported. Reads only.

    STATE is what export has written; - reads standard input. Call it before migrate. Each difference is told with
    what QEMU makes of it, and what to do.

      qmpvcpu check-target vm.json --qmp /run/target.qmp

    Exit codes: 0 it can; 1 it cannot, or what arrives would not be what left; 2 bad usage or input; 3 no connection,
    or QEMU lost; 4 record unreadable or locked.
    """
    kinds = [_kind(each) for each in accept]
    exported = await _read(state)
    async with shell.attach(read_only=True) as vm:
        try:
            notes = await check_target(exported, vm, accept=kinds)
        except TargetMismatchError as error:
            _note(shell, error)
            raise
        return _agreed(f"VM {printable(exported.name)} can come", notes, state_json(vm.layout))


@command(
    _STATE,
    option(
        "--source",
        metavar="ADDRESS",
        help="The source's QMP socket: has its guest let go of a vCPU since the export?",
    ),
    option("--timeout", metavar="SECONDS", type=Seconds(), help="How long the VM has to arrive (10)."),
    *VM_OPTIONS,
)
async def confirm_target_command(
    shell: Shell, *, state: str, source: str | None, timeout: float = 10.0
) -> CommandResult:
    """Make sure that the VM has arrived in the QEMU at --qmp, with exactly the vCPUs that were exported.

    STATE is what export has written; - reads standard input. Only after a 0 may the source be quit. With --record
    that file follows the VM from then on; it may be the source's, which nobody else may keep.

      qmpvcpu confirm-target vm.json --source /run/vm.qmp --qmp /run/target.qmp

    Exit codes: 0 it is there; 1 it is, with other vCPUs; 2 bad usage or input; 3 no connection, or it has not
    arrived: the source still has it; 4 record unreadable or locked.
    """
    exported = await _read(state)
    record = shell.options.record
    try:
        # A record of the source's is the target's only once the VM is there.
        shell.options = shell.options._replace(record=None)
        async with shell.attach() as vm:
            notes = await confirm_target(exported, vm, timeout=timeout)
            if source is not None:
                await _compare_source(exported, source, notes)
        if record is not None:
            shell.options = shell.options._replace(record=record)
            async with shell.attach(arrived=True) as vm:
                await confirm_target(exported, vm, timeout=timeout)
    except TargetMismatchError as error:
        _note(shell, error)
        raise
    except RecordError as error:
        why = f"{error.why}; VM {exported.name!r} has arrived, and that is not recorded"
        raise RecordError(error.path, why, outcome=Outcome.CHANGED) from error
    text = f"VM {printable(exported.name)} has arrived: {state_text(vm.layout)}"
    return _agreed(text, notes, state_json(vm.layout))


@command(
    flag("--destination-is-gone", "Your word that no other QEMU runs this VM, or will: it would run twice."),
    *VM_OPTIONS,
)
async def take_back(shell: Shell, *, destination_is_gone: bool) -> CommandResult:
    """Have the source at --qmp run its VM again, after a migration that did not arrive.

      qmpvcpu take-back --destination-is-gone --qmp /run/vm.qmp

    Exit codes: 0 it runs; 1 it does not, or was not left behind; 2 bad usage, or without that word; 3 no
    connection, or QEMU lost; 4 record unreadable or locked.
    """
    if not destination_is_gone:
        raise BadUsageError("take-back needs your word that no other QEMU has this VM: --destination-is-gone")
    async with shell.attach() as vm:
        layout = await vm.take_back(destination_is_gone=True)
    return CommandResult(REACHED, document(**state_json(layout)), (f"it runs again: {state_text(layout)}",))


async def _compare_source(state: ExportedState, address: str, notes: Iterable[Difference]) -> None:
    """Compare what was exported with what the source became.

    Raises:
        TargetMismatchError: A vCPU of it has left, or come, since.
    """
    async with Shell(Options(qmp=address)).attach() as vm:
        changes = changes_since(state, vm.layout)
    if changes:
        raise TargetMismatchError(state.name, changes, list(notes))


async def _read(path: str) -> ExportedState:
    return exported_in(path, await asyncio.to_thread(read_document, path))


def _kind(word: str) -> DifferenceKind:
    try:
        return DifferenceKind[word.upper().replace("-", "_")]
    except KeyError:
        known = ", ".join(each.name.lower().replace("_", "-") for each in DifferenceKind)
        raise BadUsageError(f"--accept {word}: no kind of difference; there are {known}") from None


def _agreed(text: str, notes: Iterable[Difference], state: dict[str, Any]) -> CommandResult:
    said = text, *(f"  note: {each}" for each in notes)
    return CommandResult(REACHED, document(notes=to_json(notes), **state), said)


def _note(shell: Shell, error: TargetMismatchError) -> None:
    """Have the differences as objects in the document, besides the error's sentences."""
    shell.extra["differences"] = to_json(error.differences)
    shell.extra["notes"] = to_json(error.notes)
