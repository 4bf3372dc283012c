"""fleet plan: what a change of many VMs would do, VM by VM."""

import time
from collections.abc import Sequence
from typing import Any

import click

from qmpvcpu.cli.change_options import INCLUDE_BOOT, OFFLINE_FIRST, PROOF, SAFETY_OPTIONS
from qmpvcpu.cli.fleet import FLEET_OPTIONS, Row, worst
from qmpvcpu.cli.options import command, option
from qmpvcpu.cli.output import Block, Line
from qmpvcpu.cli.progress import short_address
from qmpvcpu.cli.reports import plan_lines
from qmpvcpu.cli.result import CommandResult
from qmpvcpu.cli.run import Shell
from qmpvcpu.cli.set import Target
from qmpvcpu.cli.vms import Vms
from qmpvcpu.cli.wishes import PLACEMENT
from qmpvcpu.cli.wording import in_options
from qmpvcpu.documents.form import NOT_SENT, document
from qmpvcpu.documents.plans import plan_json
from qmpvcpu.errors import counted, milliseconds
from qmpvcpu.fleet import VmResult
from qmpvcpu.planning.plan import Plan

_MOST_NAMED = 8


@command(
    click.Argument(["target"], metavar="[MAP]", required=False),
    option("--count", metavar="N", type=int, help="Instead of a map: how many."),
    INCLUDE_BOOT,
    PROOF,
    OFFLINE_FIRST,
    PLACEMENT,
    *SAFETY_OPTIONS,
    *FLEET_OPTIONS,
)
async def plan(
    shell: Shell, *, target: str | None, count: int | None, include_boot: bool, **given: Any
) -> CommandResult:
    """Show what set or count would do now in every VM, and what would be denied. Changes nothing.

    VMs with the same plan are shown together; with --json each VM has its own.

      qmpvcpu fleet plan 0-3 --dir /run/vms

      qmpvcpu fleet plan --count 2 --nats nats://10.0.0.1:4222 --where 'name=web-*'

    Exit codes: 0 it can be tried everywhere, or is so already; 2 denied for a VM, or bad usage or input; 3 a VM gave
    no answer, or no connection to the server; 4 a record is unreadable or locked.
    """
    wanted = Target(target, count, include_boot)
    which = Vms.take(given)
    started = time.monotonic()
    async with which.opened(shell, read_only=True) as fleet:
        if wanted.count is not None:
            results = await fleet.plan_count(wanted.count, include_boot=include_boot, **given)
        else:
            results = await fleet.plan(wanted.map or "", **given)
    rows = [Row(each.address, each) for each in results]
    codes = [_code(row, each.value) for row, each in zip(rows, results, strict=True)]
    documents = [
        row.as_json(whole=False) | ({} if each.value is None else plan_json(each.value)) | {"code": code}
        for row, each, code in zip(rows, results, codes, strict=True)
    ]
    content = document(seconds=round(time.monotonic() - started, 6), vms=documents)
    head = f"{counted(len(rows), 'VM')} asked in {milliseconds(time.monotonic() - started)}"
    complaint = tuple(row.told for row in rows if row.complaint)
    return CommandResult(worst(codes), content, (head, *_blocks(results)), complaint)


def _code(row: Row, planned: Plan | None) -> int:
    """Return the exit code that ``plan`` of this VM alone would have had."""
    return NOT_SENT if planned is not None and planned.denied else row.code


def _blocks(results: Sequence[VmResult[Plan]]) -> list[Block]:
    """Return the plans, each once, with whose they are."""
    planned: dict[str, list[str]] = {}
    for each in results:
        if each.value is not None:
            planned.setdefault(str(each.value), []).append(short_address(each.address))
    blocks: list[Block] = []
    for text, whose in planned.items():
        named = ", ".join(whose[:_MOST_NAMED])
        more = f" and {len(whose) - _MOST_NAMED} more" if len(whose) > _MOST_NAMED else ""
        blocks += ["", Line((f"{named}{more}:", "bold")), *plan_lines(in_options(text))]
    return blocks
