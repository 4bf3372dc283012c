"""What a script that moves a VM needs besides ``migrate``: export, check-target, confirm-target, take-back.

The export of the library also keeps its process from changing the source meanwhile. A command has ended by then:
what the source became is compared by ``confirm-target --source``.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qmpvcpu.cli.answer import REACHED, Answer
from qmpvcpu.cli.documents import as_line, document
from qmpvcpu.cli.launching import read_document
from qmpvcpu.cli.options import BadUsageError, Daring, Options, check_seconds
from qmpvcpu.cli.run import Shell, carry_out
from qmpvcpu.cli.show import state_json, state_text
from qmpvcpu.errors import Outcome, RecordError, TargetMismatchError, printable
from qmpvcpu.model.vmstate import VmState
from qmpvcpu.planning.compatibility import Difference, DifferenceKind, changes_since
from qmpvcpu.record.file import save
from qmpvcpu.vm.migration import check_target, confirm_target

_ARRIVAL_TIMEOUT = 10.0

StatePath = Annotated[
    Path, typer.Argument(metavar="STATE", help="What export has written; - reads standard input.", show_default=False)
]


def export(
    *,
    settle: Annotated[
        float | None,
        typer.Option(
            "--settle", metavar="SECONDS", help="Wait so long for removals that are pending.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it to this file.", show_default=False),
    ] = None,
    daring: Daring,
    options: Options,
) -> int:
    """Print a VM's vCPUs for the other side of a migration, or of a save, as JSON. Reads only.

    From here on no vCPU of the source may change until the VM has arrived: the target must have exactly these. Then:
    start the target with -smp for the vCPUs that the VM booted with and -incoming defer, plug the others into it in
    their order, check-target, migrate, confirm-target. docs/migration.md has the whole.

      qmpvcpu export --settle 10 -o vm.json --qmp /run/vm.qmp

    Exit codes: 0 printed; 2 bad usage, or denied: it migrates, has migrated away, or this QEMU would not get it away;
    3 no connection, or QEMU lost; 4 record unreadable or locked.
    """
    return carry_out(options, lambda shell: _export(shell, settle, output, daring))


def check_target_(
    state: StatePath,
    *,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept", metavar="KIND", help="A difference that is known to be right: qemu-version, ...; repeatable."
        ),
    ] = None,
    options: Options,
) -> int:
    """Tell whether the QEMU at --qmp, which waits for a migration, can take over what was exported. Reads only.

    To be called before migrate. Each difference is told with what QEMU makes of it, and what to do.

      qmpvcpu check-target vm.json --qmp /run/target.qmp

    Exit codes: 0 it can; 1 it cannot, or what arrives would not be what left; 2 bad usage or input; 3 no connection,
    or QEMU lost; 4 record unreadable or locked.
    """
    kinds = [_kind(each) for each in accept or ()]
    return carry_out(options, lambda shell: _check(shell, state, kinds))


def confirm_target_(
    state: StatePath,
    *,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="ADDRESS",
            help="The source's QMP socket: has its guest let go of a vCPU since the export?",
            show_default=False,
        ),
    ] = None,
    options: Options,
) -> int:
    """Make sure that the VM has arrived in the QEMU at --qmp, with exactly the vCPUs that were exported.

    Waits for it up to --timeout (10 s). Only after a 0 may the source be quit. With --record that file follows the VM
    from then on; it may be the source's, which nobody else may keep.

      qmpvcpu confirm-target vm.json --source /run/vm.qmp --qmp /run/target.qmp

    Exit codes: 0 it is there; 1 it is, with other vCPUs; 2 bad usage or input; 3 no connection, or it has not
    arrived: the source still has it; 4 record unreadable or locked.
    """
    return carry_out(options, lambda shell: _confirm(shell, state, source))


def take_back(
    *,
    gone: Annotated[
        bool,
        typer.Option(
            "--destination-is-gone",
            help="Your word that no other QEMU runs this VM, or will: it would run twice.",
            show_default=False,
        ),
    ] = False,
    options: Options,
) -> int:
    """Have the source at --qmp run its VM again, after a migration that did not arrive.

      qmpvcpu take-back --destination-is-gone --qmp /run/vm.qmp

    Exit codes: 0 it runs; 1 it does not, or was not left behind; 2 bad usage, or without that word; 3 no
    connection, or QEMU lost; 4 record unreadable or locked.
    """
    if not gone:
        raise BadUsageError("take-back needs your word that no other QEMU has this VM: --destination-is-gone")
    return carry_out(options, _take_back)


async def _export(shell: Shell, settle: float | None, output: Path | None, daring: Daring) -> Answer:
    seconds = check_seconds("--settle", settle) or 0.0
    async with (
        shell.attach(reply_timeout=shell.reply_timeout, read_only=True) as vm,
        await vm.export(settle=seconds, allow_fatal=daring.allow_fatal) as exported,
    ):
        state = exported.state
    text = as_line(state.as_json())
    content = document(export=state.as_json(), **state_json(state.layout))
    if output is None:
        return Answer(REACHED, content, data=text.encode())
    try:
        await save(output, text.encode())
    except RecordError as error:
        raise BadUsageError(f"--output: {error}") from error
    return Answer(REACHED, content | {"output": str(output)}, printable(f"written to {output}"))


async def _check(shell: Shell, path: Path, accept: list[DifferenceKind]) -> Answer:
    state = await _read(path)
    async with shell.attach(reply_timeout=shell.reply_timeout, read_only=True) as vm:
        try:
            notes = await check_target(state, vm, accept=accept)
        except TargetMismatchError as error:
            _note(shell, error)
            raise
        return _agreed(f"VM {printable(state.name)} can come", notes, state_json(vm.layout))


async def _confirm(shell: Shell, path: Path, source: str | None) -> Answer:
    state = await _read(path)
    timeout = _ARRIVAL_TIMEOUT if shell.options.timeout is None else shell.options.timeout
    record = shell.options.record
    try:
        # A record of the source's is the target's only once the VM is there.
        shell.options = replace(shell.options, record=None)
        async with shell.attach() as vm:
            notes = await confirm_target(state, vm, timeout=timeout)
            if source is not None:
                await _compare_source(state, source, notes)
        if record is not None:
            shell.options = replace(shell.options, record=record)
            async with shell.attach(arrived=True) as vm:
                await confirm_target(state, vm, timeout=timeout)
    except TargetMismatchError as error:
        _note(shell, error)
        raise
    except RecordError as error:
        why = f"{error.why}; VM {state.name!r} has arrived, and that is not recorded"
        raise RecordError(error.path, why, outcome=Outcome.CHANGED) from error
    text = f"VM {printable(state.name)} has arrived: {state_text(vm.layout)}"
    return _agreed(text, notes, state_json(vm.layout))


async def _compare_source(state: VmState, address: str, notes: Iterable[Difference]) -> None:
    """Compare what was exported with what the source became.

    Raises:
        TargetMismatchError: A vCPU of it has left, or come, since.
    """
    async with Shell(Options(qmp=address)).attach() as vm:
        changes = changes_since(state, vm.layout)
    if changes:
        raise TargetMismatchError(state.name, changes, list(notes))


async def _take_back(shell: Shell) -> Answer:
    async with shell.attach() as vm:
        layout = await vm.take_back(destination_is_gone=True)
    return Answer(REACHED, document(**state_json(layout)), f"it runs again: {state_text(layout)}")


async def _read(path: Path) -> VmState:
    text = await asyncio.to_thread(read_document, path)
    try:
        return VmState.from_json(text.decode())
    except ValueError as error:
        raise BadUsageError(f"{path}: no export: {error}") from error


def _kind(word: str) -> DifferenceKind:
    try:
        return DifferenceKind[word.upper().replace("-", "_")]
    except KeyError:
        known = ", ".join(each.name.lower().replace("_", "-") for each in DifferenceKind)
        raise BadUsageError(f"--accept {word}: no kind of difference; there are {known}") from None


def _agreed(text: str, notes: Iterable[Difference], state: dict[str, Any]) -> Answer:
    said = "\n".join([text, *(f"  note: {each}" for each in notes)])
    return Answer(REACHED, document(notes=[_difference_json(each) for each in notes], **state), said)


def _note(shell: Shell, error: TargetMismatchError) -> None:
    """Have the differences as objects in the document, beside the error's sentences."""
    shell.beside["differences"] = [_difference_json(each) for each in error.differences]
    shell.beside["notes"] = [_difference_json(each) for each in error.notes]


def _difference_json(each: Difference) -> dict[str, str]:
    return {
        "kind": each.kind.name,
        "source": each.source,
        "target": each.target,
        "severity": each.severity.name,
        "advice": each.advice,
        "ids": str(each.ids),
    }
