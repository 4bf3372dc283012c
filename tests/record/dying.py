"""Dies at each system call of a record's life, in a process of its own each time, and tells what was left.

``python -m tests.record.dying FOLDER``: prints one JSON document, a list with an entry for each death.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from tests.record.faults import live, meddling, prepare, untouched

DIED = 9


async def _look(path: Path) -> dict[str, Any]:
    """Tell what the next one finds, and what is there when it has gone."""
    record = await Record.open(path, Claim("vm"))
    previous = record.previous
    await record.close()
    metadata = previous.metadata if previous else None
    return {
        "generation": metadata.generation if metadata else None,
        "intent": metadata is not None and metadata.intent is not None,
        "left": sorted(each.name for each in path.parent.iterdir()),
    }


def _die(path: Path, number: int, *, after: bool) -> None:
    def meddle(count: int, _name: str, call: Callable[[], Any]) -> Any:
        if count == number and not after:
            os._exit(DIED)
        try:
            return call()
        finally:
            if count == number:
                os._exit(DIED)

    child = os.fork()
    if not child:
        with meddling(meddle):
            asyncio.run(live(path))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == DIED, f"call {number} was not made"


def main(folder: Path) -> None:
    told = []
    for existing in (False, True):
        with meddling(untouched) as calls:
            path = prepare(folder / f"dry-{existing}", existing=existing)
            calls.clear()
            asyncio.run(live(path))
        for number, call in enumerate(list(calls)):
            for after in (False, True):
                path = prepare(folder / f"{existing}-{number}-{after}", existing=existing)
                _die(path, number, after=after)
                told.append({"call": call, "after": after, "existing": existing, **asyncio.run(_look(path))})
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
