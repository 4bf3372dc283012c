"""What the commands do that are about a VM's next boot: a document, shown or changed, without the VM."""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

import qmpvcpu
from qmpvcpu.cli.answer import REACHED, Answer
from qmpvcpu.cli.documents import document
from qmpvcpu.cli.options import BadUsageError, Options, Saying
from qmpvcpu.cli.run import Shell, carry_out
from qmpvcpu.errors import ConfigDeniedError, DenialReason, printable
from qmpvcpu.model.report import ConfigOutcome, ConfigReport
from qmpvcpu.model.vcpumap import VcpuMap

if TYPE_CHECKING:
    from qmpvcpu.domainxml import DomainVcpu, DomainVcpus
    from qmpvcpu.record.config import DomainConfig


def config(
    xml: Annotated[Path, typer.Argument(metavar="XML", help="The domain XML, or the record of a running VM.")],
    *,
    wish: Annotated[
        str | None, typer.Option("--set", metavar="MAP", help="Have exactly these vCPUs.", show_default=False)
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", metavar="N", help="Have so many vCPUs.", show_default=False)
    ] = None,
    hotpluggable: Annotated[
        bool,
        typer.Option("--hotpluggable", help="With --count: those that come can be unplugged.", show_default=False),
    ] = False,
    come: Annotated[
        int | None, typer.Option("--enable", metavar="ID", help="Have this vCPU too.", show_default=False)
    ] = None,
    leave: Annotated[
        int | None, typer.Option("--disable", metavar="ID", help="Leave this vCPU out.", show_default=False)
    ] = None,
    maximum: Annotated[
        int | None, typer.Option("--max", metavar="N", help="Have room for so many.", show_default=False)
    ] = None,
    options: Saying,
) -> int:
    """Show what vCPUs a VM has at its next boot, or change that in its domain XML. No VM is needed.

    It becomes what libvirt itself would make of it, and takes at define and start; nothing else of the document
    changes. The file is replaced whole or not at all, and not if somebody else has changed it meanwhile.

      qmpvcpu config vm.xml

      qmpvcpu config vm.xml --set 0,2-5

      qmpvcpu config vm.xml --max 16 --json

    Exit codes: 0 shown, or changed, also if it was so already; 2 bad usage or input, denied, nothing written; 4 the
    file cannot be read or written, or somebody else keeps it.
    """
    asked: dict[str, Callable[[DomainConfig], None] | None] = {
        "--set": None if wish is None else lambda config: config.set_map(wish),
        "--count": None if count is None else lambda config: config.set_count(count, hotpluggable=hotpluggable),
        "--enable": None if come is None else lambda config: config.set_state(come, enabled=True),
        "--disable": None if leave is None else lambda config: config.set_state(leave, enabled=False),
        "--max": None if maximum is None else lambda config: config.set_max(maximum),
    }
    changes = {option: change for option, change in asked.items() if change is not None}
    if len(changes) > 1:
        raise BadUsageError(f"{' and '.join(changes)}: one change at a time")
    if hotpluggable and count is None:
        raise BadUsageError("--hotpluggable goes with --count: what is named can be unplugged anyway")
    shared = Options(json=options.json, verbose=options.verbose)
    return carry_out(shared, lambda shell: change_config(shell, xml, *changes.values()))


async def change_config(
    shell: Shell, path: Path, change: "Callable[[DomainConfig], None] | None" = None, *, dry: bool = False
) -> Answer:
    """Show what the document at *path* says of the next boot, after *change* if there is one; *dry*: unwritten."""
    if change is None or dry:
        config = await qmpvcpu.DomainConfig.load(path)
        if change is None:
            return _answer(config, config.domain, None)
        change(config)
        return _answer(config, config.before, ConfigOutcome.NOT_TRIED if config.changed else ConfigOutcome.UNCHANGED)
    async with qmpvcpu.DomainConfig.open(path) as config:
        before = config.domain
        change(config)
        outcome = ConfigOutcome.WRITTEN if config.changed else ConfigOutcome.UNCHANGED
        shell.beside["affect"] = "config"
        await config.save()
    return _answer(config, before, outcome)


def enable(config: "DomainConfig", vcpu: int | None) -> None:
    """Have one vCPU at the next boot; the first free one if None."""
    if vcpu is None:
        vcpu = next((row.id for row in config.domain.vcpus if not row.enabled), None)
    if vcpu is None:
        detail = f"all of its {config.domain.max} vCPUs are there already"
        raise ConfigDeniedError("plug", VcpuMap(), DenialReason.MACHINE_FULL, detail)
    config.set_state(vcpu, enabled=True)


def disable(config: "DomainConfig", vcpus: Iterable[int]) -> None:
    """Leave vCPUs out of the next boot."""
    for vcpu in vcpus:
        config.set_state(vcpu, enabled=False)


def _answer(config: "DomainConfig", before: "DomainVcpus", outcome: ConfigOutcome | None) -> Answer:
    now = config.domain
    content: dict[str, Any] = {"name": now.name, "max": now.max, "enabled": str(now.enabled)}
    content["vcpus"] = [_row_json(row) for row in now.vcpus]
    said: list[Any] = [f"{printable(now.name)}  next boot: {now.current} of {now.max} vCPUs: {now.enabled}"]
    if outcome is not None:
        report = ConfigReport(str(config.path), outcome, before.enabled, now.enabled, now.max)
        changes = list(_changes(before, now))
        content |= {"affect": "config", "config": report.as_json(), "changes": changes}
        said += [
            f"{_SAID.get(outcome, outcome.value)}: {printable(str(config.path))}",
            *(f"  {each}" for each in changes),
        ]
    refused = tuple(str(each) for each in config.refused_by_libvirt)
    if refused:
        content["refused_by_libvirt"] = list(refused)
    return Answer(REACHED, document(**content), Group(*said, "", _table(now)), complaint=refused)


# Planned only.
_SAID = {ConfigOutcome.NOT_TRIED: "not written"}


def _row_json(row: "DomainVcpu") -> dict[str, Any]:
    return {"id": row.id, "enabled": row.enabled, "hotpluggable": row.hotpluggable, "order": row.order}


def _changes(before: "DomainVcpus", now: "DomainVcpus") -> Iterator[str]:
    """Say what of *before* is otherwise now, a line for all that change alike."""
    if before.max != now.max:
        yield f"room for {before.max} -> {now.max} vCPUs"
    both = zip(before.vcpus, now.vcpus, strict=False)
    changed = [(_state(old), _state(new), new.id) for old, new in both if _state(old) != _state(new)]
    for was, becomes in dict.fromkeys((was, becomes) for was, becomes, _ in changed):
        ids = VcpuMap(each for *states, each in changed if states == [was, becomes])
        yield f"vCPU {ids}: {was} -> {becomes}"


def _state(row: "DomainVcpu") -> str:
    if not row.enabled:
        return "off"
    return "on, hotpluggable" if row.hotpluggable else "on"


def _table(domain: "DomainVcpus") -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("vCPU", justify="right", no_wrap=True)
    table.add_column("next boot", no_wrap=True)
    table.add_column("order", justify="right", no_wrap=True)
    for (state, order), rows in groupby(domain.vcpus, lambda row: (_state(row), row.order)):
        ids = VcpuMap(row.id for row in rows)
        table.add_row(str(ids), state, str(order or ""), style="dim" if state == "off" else None)
    return table
