"""``qmpvcpu list --json``, which programs run again and again, without what only people need.

Importing typer, rich, lxml and all other commands takes several times as long as this command does. Whatever says
anything else, and whatever goes wrong, is theirs.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from qmpvcpu.cli.documents import as_line, document
from qmpvcpu.cli.stopping import Stopping
from qmpvcpu.errors import MonitorConnectError, QmpVcpuError
from qmpvcpu.model.jsonform import layout_as_json
from qmpvcpu.model.layout import Layout
from qmpvcpu.qmp.address import Address
from qmpvcpu.qmp.queries import look


def address_of(arguments: Sequence[str]) -> str | None:
    """Return the address if *arguments* are ``list --json`` and it, in any order; None if they say anything else."""
    words = list(arguments)
    address = os.environ.get("QMPVCPU_QMP", "")
    for place, word in enumerate(words):
        if word.startswith("--qmp"):
            name, equals, address = word.partition("=")
            address = address if equals else (words[place + 1 : place + 2] or [""])[0]
            del words[place : place + (1 if equals else 2)]
            if name != "--qmp" or address.startswith("-"):
                return None
            break
    if sorted(words) != ["--json", "list"]:
        return None
    try:
        Address.parse(address)
    except MonitorConnectError:
        return None
    return address


def list_json(address: str) -> int:
    """Print every vCPU of the VM at *address* as one JSON document, and return the exit code."""
    stopping = Stopping()
    try:
        found = document(**layout_as_json(asyncio.run(_look(address, stopping))))
    except (QmpVcpuError, asyncio.CancelledError) as error:
        return _told(address, stopping, KeyboardInterrupt() if isinstance(error, asyncio.CancelledError) else error)
    try:
        sys.stdout.write(as_line(found))
        sys.stdout.flush()
    except OSError:
        return _told(address, stopping, found)
    return 0


def _told(address: str, stopping: Stopping, what: BaseException | dict[str, Any]) -> int:
    """Tell of an error, or of a document that cannot be printed, as every command does."""
    # Not at the top: this is rare, and may take its time.
    from qmpvcpu.cli.answer import REACHED, Answer
    from qmpvcpu.cli.options import Options
    from qmpvcpu.cli.run import Shell, failure, print_answer

    shell = Shell(Options(json=True, qmp=address), stopping=stopping)
    return print_answer(Answer(REACHED, what) if isinstance(what, dict) else failure(what, shell), shell)


async def _look(address: str, stopping: Stopping) -> Layout:
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())  # as for every command: the error says it better
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - JUSTIFICATION: a coroutine that runs is in a task, mypy cannot know
    with stopping.heeded(task):
        return await look(address)
