"""config, and --affect config: the vCPUs of a VM's next boot, in a document, without the VM."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

import qmpvcpu
from qmpvcpu.cli.options import OUTPUT_OPTIONS, File, command, flag, option
from qmpvcpu.cli.output import Block, Column, Table
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.documents.form import REACHED, document
from qmpvcpu.errors import InvalidMapError, counted, printable
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.options import Affect
from qmpvcpu.model.transition import ConfigOutcome, ConfigReport
from qmpvcpu.model.vcpumap import VcpuMap, union_by

if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpu, DomainVcpus
    from qmpvcpu.domainxml.domain import ThreadSched
    from qmpvcpu.record.config import DomainConfig


class VcpuIds(click.ParamType):  # type: ignore[type-arg]  # it has no type argument in older versions
    """vCPU ids, as in a map: *free* ones that are added, or others that are taken out, highest first."""

    name = "ids"

    def __init__(self, *, free: bool) -> None:
        self.free = free

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the ids in the order in which they are worked off, which is that of ``set``."""
        try:
            ids = VcpuMap.parse(value)
        except InvalidMapError as error:
            self.fail(str(error), param, ctx)
        if not ids:
            self.fail("it names no vCPU", param, ctx)
        return sorted(ids, reverse=not self.free)


def listed(words: Iterable[list[int]]) -> list[int]:
    """Return the ids of all words, each once."""
    return list(dict.fromkeys(each for word in words for each in word))


@command(
    click.Argument(["xml"], metavar="XML", type=File()),
    option("--set", "target", metavar="MAP", help="Have exactly these vCPUs."),
    option("--count", metavar="N", type=int, help="Have so many vCPUs."),
    flag("--hotpluggable", "With --count: those that come can be unplugged."),
    option(
        "--enable",
        "added",
        metavar="ID",
        type=VcpuIds(free=True),
        multiple=True,
        help="Have these too: 3, or 2-4.",
    ),
    option(
        "--disable",
        "removed",
        metavar="ID",
        type=VcpuIds(free=False),
        multiple=True,
        help="Leave these out.",
    ),
    option("--max", "maximum", metavar="N", type=int, help="Have room for so many."),
    *OUTPUT_OPTIONS,
)
async def config(
    shell: Shell,
    *,
    xml: str,
    target: str | None,
    count: int | None,
    hotpluggable: bool,
    added: tuple[list[int], ...],
    removed: tuple[list[int], ...],
    maximum: int | None,
) -> CommandResult:
    """Show what vCPUs a VM has at its next boot, or change that in its domain XML. No VM is needed.

    XML is the domain XML, or the record of a running VM.

    It becomes what libvirt itself would make of it, and takes at define and start; nothing else of the document
    changes. The file is replaced whole or not at all, and not if somebody else has changed it meanwhile.

      qmpvcpu config vm.xml

      qmpvcpu config vm.xml --set 0,2-5

      qmpvcpu config vm.xml --enable 5 --enable 2-3

      qmpvcpu config vm.xml --max 16 --json

    Exit codes: 0 shown, or changed, also if it was so already; 2 bad usage or input, denied, nothing written; 4 the
    file cannot be read or written, or somebody else keeps it.
    """
    asked: dict[str, Callable[[DomainConfig], None] | None] = {
        "--set": None if target is None else lambda each: each.set_map(target),
        "--count": None if count is None else lambda each: each.set_count(count, hotpluggable=hotpluggable),
        "--enable": (lambda each: enable(each, listed(added))) if added else None,
        "--disable": (lambda each: disable(each, listed(removed))) if removed else None,
        "--max": None if maximum is None else lambda each: each.set_max(maximum),
    }
    changes = {name: change for name, change in asked.items() if change is not None}
    if len(changes) > 1:
        raise BadUsageError(f"{' and '.join(changes)}: one change at a time")
    if hotpluggable and count is None:
        raise BadUsageError("--hotpluggable goes with --count: what is named can be unplugged anyway")
    return await change_config(shell, xml, *changes.values())


async def change_config(
    shell: Shell, path: str, change: "Callable[[DomainConfig], None] | None" = None, *, dry: bool = False
) -> CommandResult:
    """Show what the document at *path* says of the next boot, after *change* if there is one; *dry*: unwritten."""
    if change is None or dry:
        config = await qmpvcpu.DomainConfig.load(path)
        if change is None:
            return _result(config, config.domain, None)
        change(config)
        return _result(config, config.before, ConfigOutcome.NOT_TRIED if config.changed else ConfigOutcome.UNCHANGED)
    async with qmpvcpu.DomainConfig.open(path) as config:
        before = config.domain
        change(config)
        outcome = ConfigOutcome.WRITTEN if config.changed else ConfigOutcome.UNCHANGED
        shell.extra["affect"] = "config"
        await config.save()
    return _result(config, before, outcome)


async def check_next_boot(affect: Affect, path: str | None, change: "Callable[[DomainConfig], None]") -> None:
    """Do *change* on a copy, so that what the document does not allow is denied before anything is sent."""
    if affect is Affect.BOTH and path is not None:
        change(await qmpvcpu.DomainConfig.load(path))


def enable(config: "DomainConfig", vcpus: Iterable[int]) -> None:
    """Have these vCPUs at the next boot; the first free one if there are none."""
    from qmpvcpu.domainxml.next_boot import first_free  # as all of XML, only where a document is changed

    for vcpu in list(vcpus) or [first_free(config.domain)]:
        config.set_state(vcpu, enabled=True)


def disable(config: "DomainConfig", vcpus: Iterable[int]) -> None:
    """Leave vCPUs out of the next boot."""
    for vcpu in vcpus:
        config.set_state(vcpu, enabled=False)


def _result(config: "DomainConfig", before: "DomainVcpus", outcome: ConfigOutcome | None) -> CommandResult:
    now = config.domain
    content: dict[str, Any] = {"name": now.name, "max": now.max, "enabled": str(now.enabled)}
    content["vcpus"] = [_row_json(row) for row in now.vcpus]
    said: list[Block] = [
        f"{printable(now.name)}  next boot: {now.current} of {counted(now.max, 'vCPU')}: {now.enabled}"
    ]
    if outcome is not None:
        report = ConfigReport(str(config.path), outcome, before.enabled, now.enabled, now.max)
        changes = list(_changes(before, now))
        content |= {"affect": "config", "config": to_json(report), "changes": changes}
        said += [
            f"{_WRITTEN.get(outcome, outcome.value)}: {printable(str(config.path))}",
            *(f"  {each}" for each in changes),
        ]
    elif now.emulator_pin is not None or now.emulator_sched is not None:
        said.append(f"QEMU's other threads: {_emulator(now)}")
    refused = tuple(str(each) for each in config.refused_by_libvirt)
    if refused:
        content["refused_by_libvirt"] = list(refused)
    return CommandResult(REACHED, document(**content), (*said, "", _table(now)), refused)


# Planned only.
_WRITTEN = {ConfigOutcome.NOT_TRIED: "not written"}


def _row_json(row: "DomainVcpu") -> dict[str, Any]:
    return {"id": row.id, "enabled": row.enabled, "hotpluggable": row.hotpluggable, "order": row.order}


def _changes(before: "DomainVcpus", now: "DomainVcpus") -> Iterator[str]:
    """Say what of *before* is otherwise now, a line for all that change alike."""
    if before.max != now.max:
        yield f"room for {before.max} -> {counted(now.max, 'vCPU')}"
    both = zip(before.vcpus, now.vcpus, strict=False)
    changed = [(_state(old), _state(new), new.id) for old, new in both if _state(old) != _state(new)]
    for was, becomes in dict.fromkeys((was, becomes) for was, becomes, _ in changed):
        ids = VcpuMap(each for *states, each in changed if states == [was, becomes])
        yield f"vCPU {ids}: {was} -> {becomes}"

    places = (
        (_place(now, row.id), VcpuMap([row.id])) for row in now.vcpus if _place(before, row.id) != _place(now, row.id)
    )
    for place, ids in union_by(places).items():
        yield f"vCPU {ids}: {place}"
    if _emulator(before) != _emulator(now):
        yield f"emulator threads: {_emulator(now)}"


def _place(domain: "DomainVcpus", vcpu: int) -> str:
    """Return what the document says of the thread of a vCPU itself."""
    return _said(domain.pins.get(vcpu), domain.scheds.get(vcpu))


def _emulator(domain: "DomainVcpus") -> str:
    return _said(domain.emulator_pin, domain.emulator_sched)


def _said(cpus: VcpuMap | None, sched: "ThreadSched | None") -> str:
    parts = ["" if cpus is None else f"host CPUs {cpus}"]
    if sched is not None:
        parts.append(sched.scheduler + ("" if sched.priority is None else f":{sched.priority}"))
    return ", ".join(filter(None, parts)) or "anywhere"


def _state(row: "DomainVcpu") -> str:
    if not row.enabled:
        return "off"
    return "on, hotpluggable" if row.hotpluggable else "on"


def _table(domain: "DomainVcpus") -> Table:
    """Return the vCPUs of the next boot, with their places if the document has any."""
    placed = bool(domain.pins or domain.scheds or domain.cpuset)
    columns = [Column("place", fold=True)] if placed else []
    table = Table(Column("vCPU", "right"), Column("next boot"), Column("order", "right"), *columns)

    def alike(row: "DomainVcpu") -> tuple[str, int | None, str]:
        return _state(row), row.order, _said(domain.pins.get(row.id, domain.cpuset), domain.scheds.get(row.id))

    for (state, order, place), rows in groupby(domain.vcpus, alike):
        ids = VcpuMap(row.id for row in rows)
        places = [place] if placed else []
        table.add(str(ids), state, str(order or ""), *places, style="dim" if state == "off" else "")
    return table
