"""Campaigns: a change to VMs of many hosts, a few at a time, which goes on if a program dies."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, cast

import click

from qmpvcpu.cli.app import LazyGroup, pass_on
from qmpvcpu.cli.fleet import Row, merged, worst
from qmpvcpu.cli.options import OUTPUT_OPTIONS, command, flag
from qmpvcpu.cli.output import Block, Column, Line, Table
from qmpvcpu.cli.progress import FleetProgress, shown
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.server import SERVER_OPTIONS, connected, take_server, who
from qmpvcpu.cli.set import Target
from qmpvcpu.cli.vms import Vms
from qmpvcpu.documents.form import INTERRUPTED, REACHED, document
from qmpvcpu.errors import LeaseTakenError, counted, printable
from qmpvcpu.model.campaign import CampaignStatus, Ended, Ledger
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.hosts import VmKey
from qmpvcpu.model.options import ChangeOptions, Proof
from qmpvcpu.model.wish import WishOptions, WishPhase

if TYPE_CHECKING:
    from qmpvcpu.bus import Bus
    from qmpvcpu.fleet import VmResult
    from qmpvcpu.hosts.campaignbook import CampaignBook, CampaignSummary
    from qmpvcpu.model.transition import TransitionReport

_AGAIN_S: Final = 1.0  # between two looks at whether a campaign has become free
_STYLES: Final = {
    CampaignStatus.DONE: "green",
    CampaignStatus.RUNNING: "bold",
    CampaignStatus.HALTED: "red",
}

_HELP = """Show and control campaigns.

A campaign changes VMs of many hosts, a few at a time: fleet set --nats and fleet count --nats make one. The server
keeps it, so any client can pause, resume or stop it, and if the program that carries it out dies, another continues.

  qmpvcpu campaign list --nats nats://10.0.0.1:4222

  qmpvcpu campaign pause 1201-0931-k4m7q --nats nats://10.0.0.1:4222

Exit codes: 0 done; 2 bad usage, no such campaign, or the server refuses; 3 no connection to the server.
"""

campaign = LazyGroup(
    "campaign",
    {
        "list": ("campaign:list_", "Show all campaigns."),
        "show": ("campaign:show", "Show a campaign, VM by VM."),
        "pause": ("campaign:pause", "Begin no more VMs until it is resumed."),
        "resume": ("campaign:resume", "Continue a campaign."),
        "stop": ("campaign:stop", "End a campaign: begin no more VMs."),
        "forget": ("campaign:forget", "Delete a campaign that is over."),
        "run": ("campaign:run", "Carry out campaigns that have no program."),
    },
    help=_HELP,
    params=[*OUTPUT_OPTIONS],
    callback=pass_on,
    no_args_is_help=False,
)

_ID: Final = click.Argument(["campaign_id"], metavar="ID")


async def carry_out(
    shell: Shell, vms: Vms, target: Target, bounds: dict[str, Any], *, proof: Proof, **change: Any
) -> CommandResult:
    """Make a campaign within *bounds* that has *target* on all of *vms*, and carry it out."""
    assert vms.server is not None  # noqa: S101 -- JUSTIFICATION: it is called with a server only, mypy cannot know
    detach = bounds.pop("detach", False)
    change |= {"proof": proof, "require_proof": proof is Proof.ACKNOWLEDGED}
    try:
        spec = target.campaign(WishOptions.of(cast("ChangeOptions", change)), where=vms.where, who=who(), **bounds)
        spec.check_foreign()
    except ValueError as error:
        raise BadUsageError(str(error)) from error
    async with vms.opened(shell) as fleet, connected(vms.server, "qmpvcpu fleet") as bus:
        book = await _book(bus)
        selection = [VmKey(host, vm) for host, _, vm in (each.partition("/") for each in fleet.addresses)]
        ledger = await book.create(spec, selection)
        shell.extra["campaign"] = _ledger_json(ledger)
        about = f"{spec} on {counted(len(selection), 'VM')}"
        if detach:
            said = f"campaign {ledger.id} is made: {about}; qmpvcpu campaign run carries it out"
            return CommandResult(REACHED, document(campaign=_ledger_json(ledger), vms=[]), (said,))
        shell.note(f"campaign {ledger.id}: {about}; if this dies, campaign resume {ledger.id} continues it")
        return await _see_through(shell, bus, book, ledger, fleet.addresses)


async def _see_through(
    shell: Shell, bus: "Bus", book: "CampaignBook", ledger: Ledger, addresses: tuple[str, ...]
) -> CommandResult:
    """Carry a campaign out, or watch who does, until it is over."""
    started = time.monotonic()
    course = _Course(ledger, FleetProgress(addresses))
    shell.extra["vms"] = course.documents
    carrying = asyncio.ensure_future(_carry_out(bus, ledger.id))
    following = asyncio.ensure_future(course.follow(book))

    async def stop() -> None:
        shell.note(f"stopping: no more VMs are begun; a second signal leaves campaign {ledger.id} as it is")
        await book.stop(ledger.id)

    try:
        with shell.signals.stopped_by(stop):
            async with shown(course.progress, shell.err):
                await asyncio.wait({carrying, following}, return_when=asyncio.FIRST_EXCEPTION)
                if not following.done():
                    carrying.result()
                await following
    finally:
        for each in (carrying, following):
            each.cancel()
        await asyncio.wait({carrying, following})
    rows = [course.rows[each] for each in addresses if each in course.rows]
    left = [each for each in addresses if each not in course.rows]
    result = merged(rows, seconds=time.monotonic() - started, whole=False)
    code = worst(row.code for row in rows) or (INTERRUPTED if left else REACHED)
    content = {**result.document, "campaign": _ledger_json(course.ledger)}
    untouched = (f"not begun: {_named(left)}",) if left else ()
    return CommandResult(code, content, (_headline(course.ledger), *result.text, *untouched), result.complaint)


async def _carry_out(bus: "Bus", campaign: str) -> None:
    """Carry a campaign out until it is over, or wait while somebody else does: who does so may die, or have died."""
    from qmpvcpu.hosts.controller import CampaignController  # not at the top: few commands carry one out

    controller = CampaignController(bus, name=f"fleet of {who()}")
    while True:
        with contextlib.suppress(LeaseTakenError):
            if (await controller.run(campaign)).is_over:
                return
        await asyncio.sleep(_AGAIN_S)


class _Course:
    """A campaign as it goes on.

    Attributes:
        ledger: How far it is.
        progress: What people see of that.
        rows: What each VM came to, by address.
        documents: The same, as the document has it.
    """

    def __init__(self, ledger: Ledger, progress: FleetProgress) -> None:
        self.ledger = ledger
        self.progress = progress
        self.rows: dict[str, Row] = {}
        self.documents: list[dict[str, Any]] = []

    async def follow(self, book: "CampaignBook") -> None:
        """Follow it until it is over."""
        async with contextlib.aclosing(book.follow(self.ledger.id)) as news:
            async for each in news:
                if isinstance(each, Ledger):
                    self.ledger = each
                    paused = each.status is CampaignStatus.PAUSED
                    self.progress.held = f"paused until campaign resume {each.id}" if paused else ""
                    continue
                result = _result(each)
                row = Row(result.address, result)
                self.rows[row.address] = row
                self.documents.append(row.as_json(whole=False))
                self.progress.take(result)


def _result(ended: Ended) -> "VmResult[TransitionReport | None]":
    from qmpvcpu.hosts.campaignbook import vm_result  # not at the top: only results need it

    return vm_result(ended)


@command(*SERVER_OPTIONS, *OUTPUT_OPTIONS)
async def list_(_: Shell, **server: Any) -> CommandResult:
    """Show all campaigns that the server keeps, the newest last.

      qmpvcpu campaign list --nats nats://10.0.0.1:4222

    Exit codes: 0 shown; 2 bad usage, or the server refuses; 3 no connection to the server.
    """
    async with connected(take_server(server), "qmpvcpu campaign list") as bus:
        book = await _book(bus)
        ledgers, controllers = await book.all(), await book.controllers()
    table = Table(
        Column("campaign"),
        Column("wants", fold=True),
        Column("status"),
        Column("reached", "right"),
        Column("failed", "right"),
        Column("in flight", "right"),
        Column("not begun", "right"),
        Column("who", fold=True),
        Column("made"),
        Column("carried out by", fold=True),
    )
    for each in ledgers:
        numbers = map(str, (each.reached, each.failed, len(each.in_flight), each.waiting))
        status = Line((each.status.value, _STYLES.get(each.status, "yellow")))
        by = "" if each.is_over else printable(controllers.get(each.id, "")) or "nobody"
        table.add(each.id, str(each.spec), status, *numbers, printable(each.spec.who), _at(each.created), by)
    content = document(campaigns=[_ledger_json(each) | _carried_out(each, controllers) for each in ledgers])
    return CommandResult(REACHED, content, (table,) if ledgers else ("there are no campaigns",))


@command(
    _ID, flag("--follow", "Show each VM as it ends, until the campaign is over."), *SERVER_OPTIONS, *OUTPUT_OPTIONS
)
async def show(shell: Shell, *, campaign_id: str, follow: bool, **server: Any) -> CommandResult:
    """Show a campaign, and how each of its VMs ended.

      qmpvcpu campaign show 1201-0931-k4m7q --nats nats://10.0.0.1:4222

      qmpvcpu campaign show 1201-0931-k4m7q --follow --nats nats://10.0.0.1:4222

    Exit codes: 0 shown; 2 bad usage, no such campaign, or the server refuses; 3 no connection to the server.
    """
    async with connected(take_server(server), "qmpvcpu campaign show") as bus:
        book = await _book(bus)
        if follow:
            await _follow(shell, book, campaign_id)
        summary, controllers = await book.summary(campaign_id), await book.controllers()
    content = document(
        campaign=_ledger_json(summary.ledger) | _carried_out(summary.ledger, controllers),
        vms=[{**to_json(each), "state": {}} for each in summary.ended],
        in_flight=[str(each) for each in summary.in_flight],
        waiting=[str(each) for each in summary.waiting],
    )
    nobody = f"nobody carries it out: qmpvcpu campaign resume {campaign_id}, or campaign run"
    told = (nobody,) if not summary.ledger.is_over and campaign_id not in controllers else ()
    return CommandResult(REACHED, content, (*_blocks(summary), *told))


async def _follow(shell: Shell, book: "CampaignBook", campaign_id: str) -> None:
    following = asyncio.ensure_future(_tell(shell, book, campaign_id))

    async def stop() -> None:
        following.cancel()

    with shell.signals.stopped_by(stop):
        await asyncio.wait({following})
    if not following.cancelled():
        following.result()


async def _tell(shell: Shell, book: "CampaignBook", campaign_id: str) -> None:
    async with contextlib.aclosing(book.follow(campaign_id)) as news:
        async for each in news:
            if isinstance(each, Ended):
                shell.say(_ended_line(each))
            if shell.stdout_closed:
                return


@command(_ID, *SERVER_OPTIONS, *OUTPUT_OPTIONS)
async def pause(_: Shell, *, campaign_id: str, **server: Any) -> CommandResult:
    """Begin no more VMs of a campaign until it is resumed. VMs that were begun are finished.

      qmpvcpu campaign pause 1201-0931-k4m7q --nats nats://10.0.0.1:4222

    Exit codes: 0 done; 2 bad usage, no such campaign, it is over, or the server refuses; 3 no connection.
    """
    async with connected(take_server(server), "qmpvcpu campaign pause") as bus:
        return _steered(await (await _book(bus)).pause(campaign_id))


@command(_ID, *SERVER_OPTIONS, *OUTPUT_OPTIONS)
async def resume(shell: Shell, *, campaign_id: str, **server: Any) -> CommandResult:
    """Continue a campaign, and carry it out if no other program does.

      qmpvcpu campaign resume 1201-0931-k4m7q --nats nats://10.0.0.1:4222

    Exit codes: 0 reached by all, else those of fleet set; 2 also if there is no such campaign, or it is over.
    """
    async with connected(take_server(server), "qmpvcpu campaign resume") as bus:
        book = await _book(bus)
        ledger = await book.resume(campaign_id)
        keys = map(VmKey.parse, await book.selection(ledger))
        return await _see_through(shell, bus, book, ledger, tuple(map(str, keys)))


@command(_ID, *SERVER_OPTIONS, *OUTPUT_OPTIONS)
async def stop(_: Shell, *, campaign_id: str, **server: Any) -> CommandResult:
    """End a campaign: begin no more of its VMs. VMs that were begun are finished.

      qmpvcpu campaign stop 1201-0931-k4m7q --nats nats://10.0.0.1:4222

    Exit codes: 0 done; 2 bad usage, no such campaign, it is over, or the server refuses; 3 no connection.
    """
    async with connected(take_server(server), "qmpvcpu campaign stop") as bus:
        return _steered(await (await _book(bus)).stop(campaign_id))


@command(_ID, *SERVER_OPTIONS, *OUTPUT_OPTIONS)
async def forget(_: Shell, *, campaign_id: str, **server: Any) -> CommandResult:
    """Delete a campaign that is over, with its results. What its VMs have, and are wished to have, stays.

      qmpvcpu campaign forget 1201-0931-k4m7q --nats nats://10.0.0.1:4222

    Exit codes: 0 done; 2 bad usage, no such campaign, it is not over, or the server refuses; 3 no connection.
    """
    async with connected(take_server(server), "qmpvcpu campaign forget") as bus:
        ledger = await (await _book(bus)).forget(campaign_id)
    return CommandResult(REACHED, document(campaign=_ledger_json(ledger)), (f"campaign {ledger.id} is deleted",))


@command(*SERVER_OPTIONS, *OUTPUT_OPTIONS)
async def run(shell: Shell, **server: Any) -> CommandResult:
    """Carry out every campaign that no other program carries out, until a signal.

    Those are campaigns made with --detach, and campaigns whose program has died. Run it on two machines, so that one
    takes over from the other.

      qmpvcpu campaign run --nats nats://10.0.0.1:4222

    Exit codes: 0 a signal came; 2 bad usage, or the server refuses; 3 no connection to the server.
    """
    where = take_server(server)
    from qmpvcpu.hosts.controller import CampaignController  # not at the top: help needs none of it

    async with connected(where, "qmpvcpu campaign run") as bus:
        running = asyncio.ensure_future(CampaignController(bus, name=f"campaign run of {who()}").adopt())

        async def stop() -> None:
            running.cancel()

        with shell.signals.stopped_by(stop):
            shell.note(f"carrying out campaigns at {where}")
            await asyncio.wait({running})
        if not running.cancelled():
            running.result()
    return CommandResult(REACHED, document(signal=shell.signals.came))


async def _book(bus: "Bus") -> "CampaignBook":
    from qmpvcpu.hosts.campaignbook import CampaignBook  # as above

    return await CampaignBook.open(bus)


def _steered(ledger: Ledger) -> CommandResult:
    return CommandResult(REACHED, document(campaign=_ledger_json(ledger)), (_headline(ledger),))


def _ledger_json(ledger: Ledger) -> dict[str, Any]:
    counts = {"reached": ledger.reached, "waiting": ledger.waiting, "in_flight": len(ledger.in_flight)}
    return {**to_json(ledger), **counts}


def _carried_out(ledger: Ledger, controllers: Mapping[str, str]) -> dict[str, str | None]:
    """Return who carries a campaign out, null for nobody."""
    return {"controller": controllers.get(ledger.id)}


def _headline(ledger: Ledger) -> Line:
    counts = f"{ledger.reached} of {ledger.vms} reached, {ledger.failed} failed"
    counts += f", {len(ledger.in_flight)} in flight" if ledger.in_flight else ""
    counts += f", {ledger.waiting} not begun" if ledger.waiting else ""
    status = (ledger.status.name, _STYLES.get(ledger.status, "yellow"))
    return Line(f"campaign {ledger.id} ", status, f": {ledger.spec}, {counts}")


def _blocks(summary: "CampaignSummary") -> list[Block]:
    spec = summary.ledger.spec
    bounds = f"{spec.at_once} at once, {spec.per_host} per host"
    bounds += "" if spec.stop_after is None else f", stops after {spec.stop_after} that failed"
    blocks: list[Block] = [
        _headline(summary.ledger),
        f"{bounds}; by {printable(spec.who)}, {_at(summary.ledger.created)}",
    ]
    blocks += [printable(spec.why)] if spec.why else []
    blocks += [_ended_line(each) for each in summary.ended]
    blocks += [f"in flight: {_named(summary.in_flight)}"] if summary.in_flight else []
    blocks += [f"not begun: {_named(summary.waiting)}"] if summary.waiting else []
    return blocks


def _ended_line(each: Ended) -> Line:
    result = _result(each)
    failed = "failed" if each.phase is WishPhase.ENDED else each.phase.value
    word = ("reached", "green") if each.code == REACHED else (failed, "red")
    complaint = Row(result.address, result).complaint
    said = f"  {complaint}" if complaint else ""
    return Line(f"{_at(each.time)}  {printable(str(each.key))}: ", word, said)


def _named(vms: "tuple[object, ...] | list[str]") -> str:
    return ", ".join(printable(str(each)) for each in vms)


def _at(seconds: float) -> str:
    """Return a time of the server's as this machine's people read it."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
