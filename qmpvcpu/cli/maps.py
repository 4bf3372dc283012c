"""The commands that are about a whole map: set, count, plan, recover."""

import asyncio
import contextlib
import dataclasses
import shlex
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Group, RenderableType

from qmpvcpu.cli.answer import NOT_REACHED, NOT_SENT, REACHED, Answer
from qmpvcpu.cli.documents import document
from qmpvcpu.cli.nextboot import change_config
from qmpvcpu.cli.options import BadUsageError, Bulk, ConfigPath, Impact, Options, Permits, check_seconds
from qmpvcpu.cli.progress import progress
from qmpvcpu.cli.reports import intent_json, intent_text, plan_json, plan_text, report_text
from qmpvcpu.cli.run import Shell, carry_out
from qmpvcpu.cli.show import map_row, state_json, state_text
from qmpvcpu.errors import InvalidMapError, MonitorLostError, RecordError, TransitionError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.report import TransitionOutcome, TransitionReport
from qmpvcpu.model.transition import Affect, Recovery, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vmstate import PreviousVcpus
from qmpvcpu.planning.plan import Plan
from qmpvcpu.planning.recovery import finish_target, revert_target
from qmpvcpu.vm.controller import VcpuController

if TYPE_CHECKING:
    from qmpvcpu.record.config import DomainConfig

_T = TypeVar("_T")
_MAP_HELP = "vCPU ids and ranges, as libvirt writes them: 0,2-5, or 0-3,^2."

IncludeBoot = Annotated[
    bool, typer.Option("--include-boot", help="Take boot vCPUs out too, highest first, never 0.", show_default=False)
]


@dataclass(frozen=True, slots=True)
class Wish:
    """What is wished for: a map, or how many.

    Attributes:
        map: The vCPUs, as text, or None.
        count: How many, or None.
        include_boot: Whether a count may take boot vCPUs out.
    """

    map: str | None = None
    count: int | None = None
    include_boot: bool = False

    def checked(self) -> "Wish":
        """Return this wish if it is one.

        Raises:
            BadUsageError: It is none, or two; or what goes with a count stands beside a map.
            InvalidMapError: The map cannot be read.
        """
        if (self.map is None) == (self.count is None):
            raise BadUsageError("name the map, such as 0,2-5, or how many with --count N: one of them")
        if self.include_boot and self.count is None:
            raise BadUsageError("--include-boot goes with a count: a map says itself which vCPUs shall stay")
        if self.map is not None and not VcpuMap.parse(self.map):
            raise InvalidMapError(self.map, "it is empty, and vCPU 0 never leaves")
        return self

    def write(self, config: "DomainConfig") -> None:
        """Have it as the next boot."""
        if self.count is not None:
            config.set_count(self.count)
        else:
            config.set_map(self.map or "")

    def plan(self, vm: VcpuController, permits: Permits) -> Plan:
        """Return what it takes to fulfil it."""
        fatal, boot = permits.allow_fatal, permits.allow_boot_vcpus
        if self.count is not None:
            return vm.plan_count(self.count, include_boot=self.include_boot, allow_fatal=fatal, allow_boot_vcpus=boot)
        return vm.plan(self.map or "", allow_fatal=fatal, allow_boot_vcpus=boot)


def set_(
    wish: Annotated[str, typer.Argument(metavar="MAP", help=_MAP_HELP)],
    *,
    impact: Impact,
    bulk: Bulk,
    permits: Permits,
    options: Options,
) -> int:
    """Have exactly these vCPUs plugged, boot vCPUs included: the others leave.

    What cannot be is denied before anything is sent, as plan shows it. Plugs come first, then unplugs, highest first.
    The guest may refuse any of them, or take its time: --timeout is for each answer, and --on-failure says what
    becomes of the rest. The report has a row for each slot: what was done, how it ended, whether it was undone.

    With --record it can be looked at, finished or reverted later, whatever ends this program: qmpvcpu recover.

      qmpvcpu set 0,2-5 --qmp /run/vm.qmp

      qmpvcpu set 0-3,^2 --on-failure revert --timeout 10 --record vm.xml --qmp /run/vm.qmp --json

      qmpvcpu set 0-3 --affect config --config vm.xml

    Exit codes: 0 reached, also if it was so already; 1 refused, rejected, pending, partial or reverted; 2 bad usage
    or input, denied, nothing sent; 3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked;
    130 stopped by SIGINT or SIGTERM.
    """
    return carry_out(options, lambda shell: _set_wish(shell, Wish(wish), bulk, permits, impact))


def count(
    number: Annotated[int, typer.Argument(metavar="N", help="How many vCPUs shall be plugged.")],
    *,
    include_boot: IncludeBoot = False,
    impact: Impact,
    bulk: Bulk,
    permits: Permits,
    options: Options,
) -> int:
    """Have so many vCPUs plugged, as libvirt's setvcpus does: the lowest free ones in, the highest out.

    What was there at boot stays, unless --include-boot; vCPU 0 always does. The rest is as in set.

      qmpvcpu count 4 --qmp /run/vm.qmp

      qmpvcpu count 1 --include-boot --on-failure continue --qmp /run/vm.qmp

    Exit codes: 0 reached, also if it was so already; 1 refused, rejected, pending, partial or reverted; 2 bad usage
    or input, denied, nothing sent; 3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked;
    130 stopped by SIGINT or SIGTERM.
    """
    wish = Wish(count=number, include_boot=include_boot)
    return carry_out(options, lambda shell: _set_wish(shell, wish, bulk, permits, impact))


def plan(
    wish: Annotated[str | None, typer.Argument(metavar="MAP", help=_MAP_HELP, show_default=False)] = None,
    *,
    number: Annotated[
        int | None, typer.Option("--count", metavar="N", help="Instead of a map: how many.", show_default=False)
    ] = None,
    include_boot: IncludeBoot = False,
    impact: Impact,
    permits: Permits,
    options: Options,
) -> int:
    """Show what set, or count, would do now, step by step, and what would be denied. Nothing is sent, or written.

      qmpvcpu plan 0,2-5 --qmp /run/vm.qmp

      qmpvcpu plan --count 2 --include-boot --qmp /run/vm.qmp --json

      qmpvcpu plan 0-3 --affect both --config vm.xml --qmp /run/vm.qmp

    Exit codes: 0 it can be tried, or is so already; 2 denied, or bad usage or input; 3 no connection, or QEMU lost;
    4 record unreadable or locked.
    """
    return carry_out(options, lambda shell: _plan(shell, Wish(wish, number, include_boot), permits, impact))


def recover(
    *,
    finish: Annotated[bool, typer.Option("--finish", help="Go on to what was wanted.", show_default=False)] = False,
    revert: Annotated[bool, typer.Option("--revert", help="Undo what was done of it.", show_default=False)] = False,
    drop_previous: Annotated[
        bool,
        typer.Option(
            "--drop-previous", help="Forget what an earlier QEMU had and this one has not.", show_default=False
        ),
    ] = False,
    config: ConfigPath = None,
    options: Options,
) -> int:
    """Look at a set, count, plug or unplug that was cut short (killed, QEMU unreachable), and end it.

    The record says what was wanted, in which order, under which policy; QEMU says what is so now. Without --finish or
    --revert both are shown, and nothing is changed or written. Only the vCPUs concerned are touched.

    If the VM was started again, what its earlier QEMU had is shown too, until it has that again: qmpvcpu args RECORD
    has the arguments for it. Another change, or --drop-previous, forgets it.

      qmpvcpu recover --record vm.xml --qmp /run/vm.qmp

      qmpvcpu recover --finish --record vm.xml --qmp /run/vm.qmp

    Exit codes: 0 nothing was interrupted, or nothing is left to do of it; 1 something is left to do, also where
    --finish or --revert finds but a removal that the guest has still to answer; 2 bad usage, or denied, nothing sent;
    3 no connection, QEMU lost, outcome unknown; 4 record unreadable or locked; 130 stopped by SIGINT or SIGTERM.
    """
    if finish + revert + drop_previous > 1:
        raise BadUsageError("--finish, --revert or --drop-previous: one of them")
    how = Recovery.FINISH if finish else Recovery.REVERT if revert else Recovery.REPORT
    return carry_out(options, lambda shell: _recover(shell, how, config, drop_previous=drop_previous))


async def _plan(shell: Shell, wish: Wish, permits: Permits, impact: Impact) -> Answer:
    """Show what it would take, of the VM as it runs, of its next boot, or of both; send and write nothing."""
    wish = wish.checked()
    if impact.affect is Affect.CONFIG:
        return await change_config(shell, impact.document(shell.options), wish.write, dry=True)
    path = impact.document(shell.options) if impact.affect is Affect.BOTH else None
    async with shell.attach(config=impact.config, read_only=True) as vm:
        planned = wish.plan(vm, permits)
        layout = vm.layout
    code = NOT_SENT if planned.denied else REACHED
    content = document(**plan_json(planned), **state_json(layout))
    said: list[RenderableType] = [plan_text(planned), map_row(layout)]
    if path is not None:
        next_boot = await change_config(shell, path, wish.write, dry=True)
        content |= impact.as_json() | {key: next_boot.document[key] for key in ("config", "changes")}
        said += ["", next_boot.text or ""]
    return Answer(code, content, Group(*said))


async def _set_wish(shell: Shell, wish: Wish, bulk: Bulk, permits: Permits, impact: Impact) -> Answer:
    """Make it so, under the policy that was asked for."""
    wish = wish.checked()
    if impact.affect is Affect.CONFIG:
        return await change_config(shell, impact.document(shell.options), wish.write)
    if impact.affect is Affect.BOTH:
        impact.document(shell.options)
    options: dict[str, Any] = {
        "on_failure": bulk.on_failure,
        "timeout": shell.guest_timeout,
        "total_timeout": check_seconds("--total-timeout", bulk.total_timeout),
        "in_flight": bulk.in_flight,
        "proof": bulk.proof,
        "affect": impact.affect,
        **dataclasses.asdict(permits),
    }
    async with shell.attach(config=impact.config) as vm:
        steps = wish.plan(vm, permits).steps
        if vm.interrupted is not None:
            shell.err.print(f"given up for this: {intent_text(vm.interrupted)}", soft_wrap=True)
        if wish.count is not None:
            work = vm.set_count(wish.count, include_boot=wish.include_boot, **options)
        else:
            work = vm.set_map(wish.map or "", **options)
        report = await _see_through(shell, vm, work, steps)
    return Answer(REACHED, document(**report.as_json(), **state_json(report.layout)), report_text(report))


async def _recover(shell: Shell, how: Recovery, config: Path | None, *, drop_previous: bool) -> Answer:
    """Tell of a transition that was cut short, finish it, or revert it."""
    if shell.options.record is None:
        raise BadUsageError("recover reads what was wanted from the VM's record: name it with --record PATH")
    await asyncio.to_thread(_require, shell.options.record)
    if how is Recovery.REPORT:  # which takes no lock, and what somebody is at work on is not interrupted
        await asyncio.to_thread(_refuse_kept, shell.options.record)
    async with shell.attach(config=config, read_only=how is Recovery.REPORT and not drop_previous) as vm:
        if drop_previous:
            await vm.drop_previous()
        shell.beside["previous"] = _previous_json(vm.previous)
        if vm.previous is not None:
            shell.say(_previous_text(vm.previous, shell.options.record))
        intent = vm.interrupted
        if intent is not None and intent.config is not None and config is None:
            raise BadUsageError(
                f"the next boot was to be written too: name its document with --config {shlex.quote(intent.config)}"
            )
        looked = await vm.recover(Recovery.REPORT)
        if intent is None or looked is None:
            return _nothing_interrupted(shell, vm.layout, how)
        shell.beside["interrupted"] = intent_json(intent)
        shell.say(intent_text(intent))
        if how is Recovery.REPORT:
            return _as_looked(shell, looked)
        wish = finish_target(intent, vm.layout) if how is Recovery.FINISH else revert_target(intent, vm.layout)
        work = vm.recover(how, timeout=shell.options.timeout)
        report = await _see_through(shell, vm, work, vm.plan(wish).steps) or looked
    content = document(**shell.beside, **report.as_json(), **state_json(report.layout))
    return Answer(REACHED, content, report_text(report))


def _require(record: Path) -> None:
    """Make sure that there is a record: attaching would begin a new one, in which nothing was ever interrupted.

    Raises:
        RecordError: There is none. What else is wrong with it is found by whoever reads it.
    """
    with contextlib.suppress(OSError):
        if not record.is_symlink() and not record.exists():
            raise RecordError(record, "there is no record of that name, so what was wanted is not known")


def _refuse_kept(record: Path) -> None:
    """Make sure that nobody keeps the record.

    Raises:
        RecordLockedError: Somebody does.
        RecordError: It cannot be locked or read.
    """
    from qmpvcpu.record.file import LockedFile

    LockedFile(record.absolute()).release()


def _previous_json(previous: PreviousVcpus | None) -> dict[str, Any] | None:
    if previous is None:
        return None
    return {"max": previous.max, "enabled": str(previous.enabled), "order": list(previous.order)}


def _previous_text(previous: PreviousVcpus, record: Path) -> str:
    order = ",".join(map(str, previous.order))
    return (
        f"an earlier QEMU of this VM had vCPUs {previous.enabled}, created as {order}; this one has not\n"
        f"to start one that has: qmpvcpu args {record}; to forget it: qmpvcpu recover --drop-previous"
    )


def _nothing_interrupted(shell: Shell, layout: Layout, how: Recovery) -> Answer:
    """Tell so, and of removals that are still to be answered: nothing can finish or revert those but the guest."""
    content = document(interrupted=None, **shell.beside, **state_json(layout))
    text = f"nothing was interrupted\n{state_text(layout)}"
    if not layout.pending:
        return Answer(REACHED, content, text)
    slots = " ".join(str(first) for first in sorted(layout.pending_slots))
    pending = f"qmpvcpu: the removal of vCPU {layout.pending} was asked for, and the guest has still to answer"
    advice = f"to wait for it: qmpvcpu unplug {slots} (nothing is sent again); to have it stay: qmpvcpu set, with it"
    return Answer(REACHED if how is Recovery.REPORT else NOT_REACHED, content, text, (pending, advice))


def _as_looked(shell: Shell, looked: TransitionReport) -> Answer:
    over = looked.outcome in (TransitionOutcome.REACHED, TransitionOutcome.REVERTED)
    content = document(**shell.beside, **looked.as_json(), **state_json(looked.layout))
    advice = () if over else ("to go on: qmpvcpu recover --finish, or --revert",)
    return Answer(REACHED if over else NOT_REACHED, content, report_text(looked, looked=True), advice)


async def _see_through(shell: Shell, vm: VcpuController, work: Coroutine[Any, Any, _T], steps: Iterable[Step]) -> _T:
    """Wait for a transition and tell how it goes; the first signal stops it at the next safe point."""
    task = asyncio.ensure_future(work)

    async def stop() -> None:
        shell.err.print("stopping at the next safe point; once more abandons at once", soft_wrap=True)
        if await vm.cancel() is None:  # it has not begun
            task.cancel()

    with shell.stopping.stopped_by(stop):
        try:
            async with progress(vm, shell.err, wanted="asking QEMU", steps=steps):
                return await task
        except TransitionError:
            await _note_loss(shell, vm)
            raise


async def _note_loss(shell: Shell, vm: VcpuController) -> None:
    """Note whether the connection is lost, which a report does not say; asks nothing of QEMU."""
    try:
        await vm.wait_for(lambda _: True)
    except MonitorLostError as error:
        shell.lost = str(error)
