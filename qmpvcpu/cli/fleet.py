"""fleet list, set and count: the same for many VMs at once."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from qmpvcpu.cli.app import LazyGroup, pass_on
from qmpvcpu.cli.change_options import INCLUDE_BOOT, MAP_OPTIONS, SAFETY_OPTIONS, check_together
from qmpvcpu.cli.failures import printed_error
from qmpvcpu.cli.options import (
    OUTPUT_OPTIONS,
    REPLY_TIMEOUT,
    File,
    Seconds,
    command,
    flag,
    named_on_the_line,
    option,
    said,
)
from qmpvcpu.cli.output import Block, ByWidth, Column, Line, Table
from qmpvcpu.cli.progress import FleetProgress, short_address, shown
from qmpvcpu.cli.reports import intent_text, shortcoming
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.server import SERVER_OPTIONS
from qmpvcpu.cli.set import Target
from qmpvcpu.cli.vms import DIRECTORY, PATTERN, QMP, WHERE, Vms
from qmpvcpu.cli.wishes import PLACEMENT
from qmpvcpu.cli.wording import in_options
from qmpvcpu.documents.form import BAD_RECORD, INTERRUPTED, NO_ANSWER, NOT_REACHED, NOT_SENT, REACHED, document
from qmpvcpu.errors import GuestAgentError, TransitionError, counted, milliseconds, printable
from qmpvcpu.fleet import Fleet, Results, VmResult
from qmpvcpu.model.campaign import CampaignSpec
from qmpvcpu.model.options import Affect, Proof
from qmpvcpu.model.transition import TransitionReport
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import Refused
from qmpvcpu.model.wish import DROP_AFTER_S

if TYPE_CHECKING:
    from qmpvcpu.vm.controller import VcpuController

# The command's code is the first of these that any VM has: what nobody knows comes first, what was not even begun
# last.
_WORST_FIRST: Final = (NO_ANSWER, INTERRUPTED, BAD_RECORD, NOT_REACHED, NOT_SENT)
_WORDS: Final = {
    REACHED: ("ok", "green"),
    NOT_REACHED: ("FAILED", "red"),
    NOT_SENT: ("DENIED", "yellow"),
    NO_ANSWER: ("NO ANSWER", "red"),
    BAD_RECORD: ("BAD RECORD", "red"),
    INTERRUPTED: ("STOPPED", "yellow"),
}
# On a narrower terminal ids and paths would be columns of single letters.
_TABLE_WIDTH: Final = 64
_ONLINE_COLUMN: Final = 5
_MOST_REASONS: Final = 2

_HELP = """Work on many VMs at once, of this host or of many.

Name the VMs with --qmp, as often as needed, and with --dir: every socket there, or those that match --pattern. With
--nats they are the VMs of all hosts that have an agent, or those that --where chooses. A VM that does not answer
delays no other, and has its own error.

  qmpvcpu fleet list --dir /run/vms

  qmpvcpu fleet set 0-3 --dir /run/vms --pattern '*/qmp.sock' --timeout 10

  qmpvcpu fleet count 4 --qmp /run/a.qmp --qmp tcp:host:4444 --json

  qmpvcpu fleet list --nats nats://10.0.0.1:4222 --where 'name=web-*'

Exit codes: 0 reached by all, else the worst of all VMs: 3 no connection, QEMU lost, outcome unknown; else 130 stopped
by a signal; else 4 record unreadable or locked; else 1 refused, rejected, pending or partial; else 2 bad
usage or input, denied, nothing sent.
"""


fleet = LazyGroup(
    "fleet",
    {
        "list": ("fleet:list_", "Show the vCPUs of every VM."),
        "plan": ("fleet_plan:plan", "Show what set or count would do, in every VM."),
        "set": ("fleet:set_", "Plug these vCPUs and unplug all others, in every VM."),
        "count": ("fleet:count", "Change how many vCPUs are plugged, in every VM."),
    },
    help=_HELP,
    params=[REPLY_TIMEOUT, *OUTPUT_OPTIONS],
    callback=pass_on,
    no_args_is_help=False,
)

FLEET_OPTIONS: Final = (
    QMP,
    DIRECTORY,
    PATTERN,
    option(
        "--concurrency",
        metavar="N",
        type=click.IntRange(min=1),
        help="How many VMs are begun at a time (16; with --nats 64).",
    ),
    option(
        "--record",
        metavar="DIR",
        type=File(),
        help="Keep each VM's durable record in this directory, as NAME.xml: its -name, else its uuid, else its"
        " socket's whole path with - for /.",
    ),
    option(
        "--agent",
        metavar="PATTERN",
        help="Where each VM's guest agent is, such as '{dir}/{stem}.agent': {dir}, {stem} and {name} are those of its"
        " QMP socket.",
    ),
    *SERVER_OPTIONS,
    WHERE,
    REPLY_TIMEOUT,
    *OUTPUT_OPTIONS,
)
_USUAL: Final = CampaignSpec(count=1)
_CAMPAIGN_OPTIONS: Final = (
    option(
        "--at-once",
        metavar="N",
        type=click.IntRange(min=1),
        help=f"With --nats: how many VMs are changed at a time ({_USUAL.at_once}).",
    ),
    option(
        "--per-host",
        metavar="N",
        type=click.IntRange(min=1),
        help=f"With --nats: how many of one host ({_USUAL.per_host}).",
    ),
    option(
        "--stop-after",
        metavar="N",
        type=click.IntRange(min=0),
        help=f"With --nats: begin no more VMs after so many have failed; 0: always go on ({_USUAL.stop_after}).",
    ),
    option(
        "--drop-after",
        metavar="SECONDS",
        type=Seconds(some="a host needs some time to begin"),
        help=f"With --nats: how long each VM may take, once it is its turn ({DROP_AFTER_S:g}).",
    ),
    option("--why", metavar="TEXT", help="With --nats: the reason, shown with the campaign."),
    flag("--detach", "With --nats: only make the campaign; leave it to a 'qmpvcpu campaign run'."),
)
_AFFECT: Final = option(
    "--affect",
    default=Affect.LIVE,
    help="live: the VMs as they run. config: their next boots, in their records. both: live, then config.",
)


@command(*FLEET_OPTIONS)
async def list_(shell: Shell, **vms: Any) -> CommandResult:
    """Show which vCPUs are plugged, VM by VM. Reads only; with --json every vCPU, as in list.

    With --agent each guest is asked which it uses. One that does not answer is no failure.

      qmpvcpu fleet list --dir /run/vms

      qmpvcpu fleet list --dir /run --pattern '*/qmp.sock' --reply-timeout 2 --json

      qmpvcpu fleet list --dir /run/vms --agent '{dir}/{stem}.agent'

    Exit codes: 0 all are shown; 3 one or more gave no answer; 4 a record is unreadable or locked; 2 bad usage, no
    socket there, or two that lead to one VM; 130 stopped by a signal.
    """
    which = Vms.take(vms)
    async with which.opened(shell, read_only=True) as fleet:
        results: Results[Any]
        results = fleet.each(lambda vm: _ask_guest(shell, vm)) if which.server is None else fleet.refresh()
        progress = FleetProgress(fleet.addresses)
        return await _finish(shell, fleet, results, results.aclose, progress, whole=True)


class Asked(NamedTuple):
    """What became of asking a guest which vCPUs it uses.

    Attributes:
        error: Why that is not known, or None.
    """

    error: GuestAgentError | None


async def _ask_guest(shell: Shell, vm: "VcpuController") -> Asked | None:
    """Ask the guest which vCPUs it uses; None if *vm* has no agent."""
    return Asked(await shell.ask_cpus(vm)) if vm.guest.has_agent else None


@command(
    click.Argument(["target"], metavar="MAP"),
    _AFFECT,
    *MAP_OPTIONS,
    PLACEMENT,
    *SAFETY_OPTIONS,
    *_CAMPAIGN_OPTIONS,
    *FLEET_OPTIONS,
)
async def set_(shell: Shell, *, target: str, **given: Any) -> CommandResult:
    """Have exactly the vCPUs of this MAP plugged in every VM, each for itself, as set does.

    A VM that fails is undone if --on-failure says so; the others are not. SIGINT stops all of them at their next safe
    points. With --nats it is a campaign: a few VMs at a time. SIGINT then ends it: no more VMs are begun, and those
    that were begun are finished. If this program dies, campaign resume continues it.

      qmpvcpu fleet set 0-3 --dir /run/vms

      qmpvcpu fleet set 0,2 --on-failure revert --timeout 10 --qmp /run/a.qmp --qmp /run/b.qmp --json

      qmpvcpu fleet set 0-3 --nats nats://10.0.0.1:4222 --where 'host=rack1-* name=web-*' --at-once 50 --stop-after 3

    Exit codes: 0 reached by all, also if it was so already; else the worst of all VMs, as qmpvcpu fleet --help says.
    """
    return await _set_all(shell, Target(target), **given)


@command(
    click.Argument(["number"], metavar="N", type=int),
    INCLUDE_BOOT,
    _AFFECT,
    *MAP_OPTIONS,
    PLACEMENT,
    *SAFETY_OPTIONS,
    *_CAMPAIGN_OPTIONS,
    *FLEET_OPTIONS,
)
async def count(shell: Shell, *, number: int, include_boot: bool, **given: Any) -> CommandResult:
    """Have N vCPUs plugged in every VM, each for itself, as count does.

      qmpvcpu fleet count 4 --dir /run/vms

    Exit codes: 0 reached by all, also if it was so already; else the worst of all VMs, as qmpvcpu fleet --help says.
    """
    return await _set_all(shell, Target(count=number, include_boot=include_boot), **given)


async def _set_all(shell: Shell, target: Target, **change: Any) -> CommandResult:
    vms = Vms.take(change)
    bounds = _take_bounds(change, vms)
    affect = change["affect"]
    check_together(affect, change)
    if vms.server is not None:
        from qmpvcpu.cli.campaign import carry_out  # not at the top: it imports this module

        return await carry_out(shell, vms, target, bounds, **change)
    if affect is not Affect.LIVE and shell.options.record is None:
        raise BadUsageError(f"--affect {affect.value}: what keeps the next boots? Name the records: --record DIR")
    async with vms.opened(shell) as fleet:
        setting = _Setting(shell, target, change, FleetProgress(fleet.addresses))
        results = fleet.each(setting.one)

        async def stop() -> None:
            shell.note("stopping at the next safe points; a second signal lets go of the VMs at once")
            results.stop()
            await setting.stop()

        return await _finish(shell, fleet, results, stop, setting.progress, whole=False)


def _take_bounds(given: dict[str, Any], vms: Vms) -> dict[str, Any]:
    """Take the bounds of a campaign out of *given*.

    Raises:
        BadUsageError: They do not go with these VMs.
    """
    names = [str(each.name) for each in _CAMPAIGN_OPTIONS]
    bounds = said({name: given.pop(name) for name in names})
    if vms.server is None and bounds:
        raise BadUsageError(f"--{next(iter(bounds)).replace('_', '-')} is about a campaign: it goes with --nats")
    if vms.server is not None and named_on_the_line("concurrency"):
        raise BadUsageError("--concurrency is about VMs of this host: with --nats it is --at-once")
    if bounds.get("stop_after") == 0:
        bounds["stop_after"] = None
    return bounds


async def _finish(
    shell: Shell,
    fleet: Fleet,
    results: Results[Any],
    stop: Callable[[], Coroutine[Any, Any, None]],
    progress: FleetProgress,
    *,
    whole: bool,
) -> CommandResult:
    """Take the results as they come, and show how far it is; the first signal does *stop*."""
    started = time.monotonic()
    came: dict[str, Any] = {}
    shell.extra["vms"] = []
    with shell.signals.stopped_by(stop):
        async with shown(progress, shell.err):
            async for result in results:
                came[result.address] = result
                # If it is abandoned, the document has what came until then.
                shell.extra["vms"].append(Row(result.address, result).as_json(whole=False))
                progress.take(result)
    rows = [Row(address, came.get(address)) for address in fleet.addresses]
    told = merged(rows, seconds=time.monotonic() - started, whole=whole)
    if fleet.drifted:
        told.document["drift"] = {address: str(vcpus) for address, vcpus in fleet.drifted.items()}
        told.text += ("", *(_drift(address, vcpus) for address, vcpus in fleet.drifted.items()))
    return told


def _drift(address: str, vcpus: VcpuMap) -> Line:
    return Line(
        (f"{printable(address)}: drift: a wish for {vcpus} was reached, and others have changed it since", "yellow")
    )


class _Setting:
    """One target, set on each VM; can be stopped gently.

    Attributes:
        progress: How far it is.
    """

    def __init__(self, shell: Shell, target: Target, change: dict[str, Any], progress: FleetProgress) -> None:
        self.progress = progress
        self._shell = shell
        self._target = target
        self._change = change
        self._running: dict[asyncio.Task[TransitionReport], VcpuController] = {}

    async def one(self, vm: "VcpuController") -> TransitionReport:
        """Set it on *vm*."""
        if vm.interrupted is not None:
            self._shell.note(f"{printable(vm.address)}: given up for this: {intent_text(vm.interrupted)}")
        live = self._change["affect"] is not Affect.CONFIG
        if live:
            await self._shell.ask_system(vm)
        steps = self._target.plan(vm, **self._change).steps if live else ()
        task = asyncio.ensure_future(self._target.reach(vm, **self._change))
        self._running[task] = vm
        try:
            async with self.progress.following(vm, steps, self._change["proof"]):
                return await task
        finally:
            del self._running[task]

    async def stop(self) -> None:
        """Stop all at their next safe points."""
        await asyncio.gather(*(self._stop_one(task, vm) for task, vm in self._running.items()))

    async def _stop_one(self, task: "asyncio.Task[TransitionReport]", vm: "VcpuController") -> None:
        if await vm.cancel() is None:  # it has not begun
            task.cancel()


class Row(NamedTuple):
    """What one VM came to.

    Attributes:
        address: Its address.
        result: Its result; None: it was not begun, or was given up.
    """

    address: str
    result: VmResult[Any] | None

    @property
    def code(self) -> int:
        """The exit code that this VM alone would have had."""
        return INTERRUPTED if self.result is None else self.result.code

    @property
    def complaint(self) -> str:
        """What went wrong, in a sentence; "" if nothing did."""
        if self.code == REACHED:
            return ""
        error = self.result.error if self.result is not None else None
        if isinstance(error, TransitionError):
            return f"{shortcoming(error.report)}{_refusals(error.report)}"
        if error is None or isinstance(error, asyncio.CancelledError):
            return "stopped before anything was sent"
        return in_options(str(error)) or type(error).__name__

    @property
    def asked(self) -> Asked | None:
        """What became of asking its guest; None: it was not asked."""
        value = None if self.result is None else self.result.value
        return value if isinstance(value, Asked) else None

    @property
    def told(self) -> str:
        """The complaint, with whose it is."""
        complaint = self.complaint
        return complaint if printable(self.address) in complaint else f"{short_address(self.address)}: {complaint}"

    def as_json(self, *, whole: bool) -> dict[str, Any]:
        """Return it as JSON; *whole* has every vCPU of the layout."""
        result = self.result or VmResult(self.address, "", None, None, KeyboardInterrupt(), 0.0)
        asked: dict[str, Any] = {}
        if self.asked is not None:
            error = self.asked.error
            asked["agent_error"] = None if error is None else printed_error(error, str(error))
        shown = result.to_json(whole=whole, more=asked)
        if result.error is not None:
            shown["error"] = printed_error(result.error, self.complaint)
        return shown


def _refusals(report: TransitionReport) -> str:
    """Return why the guest refused, which no table of steps tells here; "" if it did not."""
    verdicts = [step.verdict for step in report.steps]
    reasons = dict.fromkeys(printable(each.reason) for each in verdicts if isinstance(each, Refused))
    return f"; the guest said: {', '.join([*reasons][:_MOST_REASONS])}" if reasons else ""


def worst(of_each: Iterable[int]) -> int:
    """Return the exit code that tells of all VMs, from that *of_each*."""
    codes = set(of_each)
    return next((each for each in _WORST_FIRST if each in codes), REACHED)


def merged(rows: Sequence[Row], *, seconds: float, whole: bool) -> CommandResult:
    """Return the result that tells of all: a table, one document, and the worst code."""
    code = worst(row.code for row in rows)
    reached = sum(row.code == REACHED for row in rows)
    content = document(
        reached=reached,
        failed=len(rows) - reached,
        seconds=round(seconds, 6),
        vms=[row.as_json(whole=whole) for row in rows],
    )
    head = f"{reached} of {counted(len(rows), 'VM')} {'read' if whole else 'reached'} in {milliseconds(seconds)}"
    complaint = tuple(row.told for row in rows if row.code != REACHED)
    complaint += tuple(
        f"{short_address(row.address)}: which vCPUs the guest uses is not known: {row.asked.error}"
        for row in rows
        if row.asked is not None and row.asked.error is not None
    )
    table = ByWidth(_TABLE_WIDTH, _table(rows), [line for row in rows for line in _lines(row)])
    return CommandResult(code, content, (head, "", table), complaint)


def _table(rows: Sequence[Row]) -> Table:
    asked = any(row.asked is not None for row in rows)
    table = Table(
        Column("VM", fold=True),
        Column("QMP socket" if any(":" in row.address for row in rows) else "host/VM", fold=True),
        Column("state"),
        Column("plugged", "right"),
        Column("vCPUs", fold=True),
        *([Column("online", fold=True)] if asked else []),
        Column("pending", fold=True),
        Column("time", "right"),
    )
    for row in rows:
        cells: list[str | Line] = [*_cells(row)]
        if asked:
            cells.insert(_ONLINE_COLUMN, _online(row))
        table.add(*cells)
    return table


def _online(row: Row) -> str:
    """Return the vCPUs that the guest uses, as it has told."""
    if row.asked is None or row.asked.error is not None or row.result is None or row.result.layout is None:
        return ""
    return str(VcpuMap(vcpu.id for vcpu in row.result.layout if vcpu.proof is Proof.ONLINE))


def _lines(row: Row) -> Iterator[Block]:
    """Return what a narrow terminal shows of one VM."""
    name, address, word, plugged, ids, pending, took = _cells(row)
    yield Line((str(name or address), "bold"), ": ", *word.parts)
    if name:
        yield f"  {address}"
    if ids:
        online = f", online {_online(row)}" if _online(row) else ""
        yield f"  {plugged} plugged: {ids}{online}" + (f", pending {pending}" if pending else "")
    if took:
        yield f"  in {took}"


def _cells(row: Row) -> tuple[str, str, Line, str, str, str, str]:
    """Return what the row of one VM shows."""
    word, style = _WORDS[row.code]
    result = row.result
    if result is None:
        return "", short_address(row.address), Line((word, style)), "", "", "", ""
    if result.report is not None:
        word = result.report.outcome.name.replace("_", " ")
    layout = result.layout
    state = ("", "", "")
    if layout is not None:
        state = (f"{len(layout.enabled)} of {layout.max}", str(layout.enabled), str(layout.pending))
    took = milliseconds(result.seconds)
    return printable(result.name), short_address(row.address), Line((word, style)), *state, took
