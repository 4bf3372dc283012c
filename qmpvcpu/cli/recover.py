"""recover: a change that was cut short, looked at, finished or reverted."""

import asyncio
import contextlib
import shlex
from pathlib import Path
from typing import Any

from qmpvcpu.cli.change_options import CONFIG
from qmpvcpu.cli.options import AGENT, TIMEOUT, VM_OPTIONS, command, flag
from qmpvcpu.cli.progress import run_transition
from qmpvcpu.cli.reports import intent_text, report_blocks
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.show import state_text
from qmpvcpu.cli.wishes import PLACEMENT
from qmpvcpu.documents.form import NOT_REACHED, REACHED, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.errors import RecordError
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.exported import PreviousVcpus
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Recovery
from qmpvcpu.model.transition import Action, Intent, TransitionOutcome, TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap, named, union
from qmpvcpu.planning.recovery import finish_target, revert_target
from qmpvcpu.record.config import DomainConfig
from qmpvcpu.record.file import LockedFile, absolute


@command(
    flag("--finish", "Go on to what was wanted."),
    flag("--revert", "Undo what was done of it."),
    flag("--drop-previous", "Forget what an earlier QEMU had and this one has not."),
    CONFIG,
    PLACEMENT,
    TIMEOUT,
    AGENT,
    *VM_OPTIONS,
)
async def recover(
    shell: Shell,
    *,
    finish: bool,
    revert: bool,
    drop_previous: bool,
    config: str | None,
    placement: str | None,
    **change: Any,
) -> CommandResult:
    """Look at a set, count, plug or unplug that was cut short (killed, QEMU unreachable), and end it.

    The record says what was wanted, in which order, under which policy; QEMU says what is so now. Without --finish or
    --revert both are shown, and nothing is changed or written. Only the vCPUs concerned are touched.

    If the VM was started again, what its earlier QEMU had is shown too, until it has that again: qmpvcpu args RECORD
    prints the arguments for it. Another change, or --drop-previous, forgets it.

      qmpvcpu recover --record vm.xml --qmp /run/vm.qmp

      qmpvcpu recover --finish --record vm.xml --qmp /run/vm.qmp

    Exit codes: 0 nothing was interrupted, or nothing is left to do of it; 1 something is left to do, also where
    --finish or --revert finds only a removal that the guest has not answered yet; 2 bad usage, or denied, nothing
    sent; 3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by a signal.
    """
    if finish + revert + drop_previous > 1:
        raise BadUsageError("--finish, --revert or --drop-previous: one of them")
    record = shell.options.record
    if record is None:
        raise BadUsageError("recover reads what was wanted from the VM's record: name it with --record PATH")
    looks_only = not (finish or revert or drop_previous)
    await asyncio.to_thread(_check_record, absolute(record), not_kept=not (finish or revert))
    async with shell.attach(config=config, read_only=looks_only, placement=placement) as vm:
        if drop_previous:
            await vm.drop_previous()
        shell.extra["previous"] = to_json(vm.previous)
        if vm.previous is not None:
            shell.say(await _previous_text(vm.previous, record))
        intent = vm.interrupted
        if intent is not None:
            shell.extra["interrupted"] = to_json(intent)
            shell.say(intent_text(intent))
            if intent.config is not None and config is None:
                path = shlex.quote(intent.config)
                raise BadUsageError(f"the next boot was to be written too: name its document with --config {path}")
        looked = await vm.recover(Recovery.REPORT)
        if intent is None or looked is None:
            return _nothing_interrupted(shell, vm.layout, acts=finish or revert)
        offline = VcpuMap() if vm.guest.has_agent else _maybe_offline(intent, vm.layout)
        if not (finish or revert):
            return _as_looked(shell, looked, offline)
        if offline:
            shell.note(_which_agent(offline))
        target = finish_target(intent, vm.layout) if finish else revert_target(intent, vm.layout)
        work = vm.recover(Recovery.FINISH if finish else Recovery.REVERT, **change)
        report = await run_transition(shell, vm, work, vm.plan(target).steps) or looked
    content = document(**shell.extra, **report.to_json(), **state_json(report.layout))
    return CommandResult(REACHED, content, report_blocks(report))


def _check_record(record: Path, *, not_kept: bool) -> None:
    """Make sure that there is a record: attaching would begin a new one, in which nothing was ever interrupted.

    With *not_kept* nobody may be at work on it either: only looking takes no lock.

    Raises:
        RecordError: There is none. What else is wrong with it is found when it is read.
        RecordLockedError: Another process keeps it.
    """
    with contextlib.suppress(OSError):
        if not record.is_symlink() and not record.exists():
            raise RecordError(record, "there is no record of that name, so what was wanted is not known")
    if not_kept:
        LockedFile(record).release()


async def _previous_text(previous: PreviousVcpus, record: str) -> str:
    order = ",".join(map(str, previous.order))
    kept = (await DomainConfig.load(record)).identity.metadata
    start = f"qmpvcpu args {shlex.quote(record)}"
    if kept is not None and kept.next_boot is not None:
        advice = f"its next boot is to have {kept.next_boot}, which is what {start} prints"
    else:
        advice = f"to start one that has: {start}"
    return (
        f"an earlier QEMU of this VM had vCPUs {previous.enabled}, created as {order}; this one has not\n"
        f"{advice}; to forget it: qmpvcpu recover --drop-previous"
    )


def _nothing_interrupted(shell: Shell, layout: Layout, *, acts: bool) -> CommandResult:
    """Say so, and name removals that the guest has not answered: nobody else can finish or revert those."""
    content = document(interrupted=None, **shell.extra, **state_json(layout))
    text = "nothing was interrupted", state_text(layout)
    if not layout.pending:
        return CommandResult(REACHED, content, text)
    slots = " ".join(str(first) for first in sorted(layout.pending_slots))
    which = named(layout.pending)
    pending = f"qmpvcpu: the removal of {which} was requested, and the guest has not answered yet"
    wait = f"to wait for the answer: qmpvcpu unplug {slots} (asks again only if the guest does not work on it)"
    advice = f"{wait}; to keep {which}: qmpvcpu set {layout.enabled}, which plugs again what leaves"
    return CommandResult(NOT_REACHED if acts else REACHED, content, text, (pending, advice))


def _maybe_offline(intent: Intent, layout: Layout) -> VcpuMap:
    """Return the vCPUs that are plugged and that the agent may have taken offline in the guest for *intent*."""
    asked = union(step.ids for step in intent.steps if step.asks_agent and step.action is Action.UNPLUG)
    return asked & layout.enabled


def _which_agent(offline: VcpuMap) -> str:
    return (
        f"{named(offline)} may be offline in the guest, which only its agent can change: name it with --agent ADDRESS"
    )


def _as_looked(shell: Shell, looked: TransitionReport, offline: VcpuMap) -> CommandResult:
    over = looked.outcome in (TransitionOutcome.REACHED, TransitionOutcome.REVERTED)
    content = document(**shell.extra, **looked.to_json(), **state_json(looked.layout))
    advice = [] if over else ["to go on: qmpvcpu recover --finish, or --revert"]
    advice += [_which_agent(offline)] if offline else []
    return CommandResult(REACHED if over else NOT_REACHED, content, report_blocks(looked, looked=True), tuple(advice))
