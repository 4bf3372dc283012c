"""What the commands do that are about a whole map: set, count, plan, recover."""

import asyncio
import contextlib
import dataclasses
import enum
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Group, RenderableType

from qmpvcpu import Affect, VcpuController
from qmpvcpu.cli.nextboot import change_config
from qmpvcpu.cli.options import BadUsageError, Bulk, Impact, Permits, check_seconds
from qmpvcpu.cli.progress import progress
from qmpvcpu.cli.reports import intent_json, intent_text, plan_json, plan_text, report_text
from qmpvcpu.cli.run import NOT_REACHED, NOT_SENT, REACHED, Answer, Shell
from qmpvcpu.cli.show import document, map_row, state_json, state_text
from qmpvcpu.errors import InvalidMapError, MonitorLostError, RecordError
from qmpvcpu.model import Layout, Step, TransitionError, TransitionOutcome, TransitionReport, VcpuMap
from qmpvcpu.planning import Plan, finish_wish, revert_wish
from qmpvcpu.record import DomainConfig

__all__ = ["How", "Wish", "plan", "recover", "set_wish"]

_T = TypeVar("_T")


class How(enum.Enum):
    """What ``recover`` does with a transition that was cut short."""

    REPORT = "report"
    FINISH = "finish"
    REVERT = "revert"


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

    def write(self, config: DomainConfig) -> None:
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


async def plan(shell: Shell, wish: Wish, permits: Permits, impact: Impact) -> Answer:
    """Show what it would take, of the VM as it runs, of its next boot, or of both; send and write nothing."""
    wish = wish.checked()
    if impact.affect is Affect.CONFIG:
        return await change_config(shell, impact.document(shell.options), wish.write, dry=True)
    path = impact.document(shell.options) if impact.affect is Affect.BOTH else None
    async with shell.attach(config=impact.config) as vm:
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


async def set_wish(shell: Shell, wish: Wish, bulk: Bulk, permits: Permits, impact: Impact) -> Answer:
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


async def recover(shell: Shell, how: How, config: Path | None) -> Answer:
    """Tell of a transition that was cut short, finish it, or revert it."""
    if shell.options.record is None:
        raise BadUsageError("recover reads what was wanted from the VM's record: name it with --record PATH")
    await asyncio.to_thread(_require, shell.options.record)
    async with shell.attach(config=config) as vm:
        intent = vm.interrupted
        if intent is not None and intent.config is not None and config is None:
            raise BadUsageError(
                f"the next boot was to be written too: name its document with --config {intent.config}"
            )
        looked = await vm.recover("report")
        if intent is None or looked is None:
            return _nothing_interrupted(vm.layout, how)
        shell.beside["interrupted"] = intent_json(intent)
        shell.say(intent_text(intent))
        if how is How.REPORT:
            return _as_looked(shell, looked)
        wish = finish_wish(intent, vm.layout) if how is How.FINISH else revert_wish(intent, vm.layout)
        work = vm.recover(how.value, timeout=shell.options.timeout)
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


def _nothing_interrupted(layout: Layout, how: How) -> Answer:
    """Tell so, and of removals that are still to be answered: nothing can finish or revert those but the guest."""
    content = document(interrupted=None, **state_json(layout))
    text = f"nothing was interrupted\n{state_text(layout)}"
    if not layout.pending:
        return Answer(REACHED, content, text)
    slots = " ".join(str(first) for first in sorted(layout.pending_slots))
    pending = f"qmpvcpu: the removal of vCPU {layout.pending} was asked for, and the guest has still to answer"
    advice = f"to wait for it: qmpvcpu unplug {slots} (nothing is sent again); to have it stay: qmpvcpu set, with it"
    return Answer(REACHED if how is How.REPORT else NOT_REACHED, content, text, (pending, advice))


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
