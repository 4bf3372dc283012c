"""File systems that fail: real ones, in a mount namespace that ends with the test."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import pytest

from qmpvcpu.domainxml import Instance
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record

# Saves at the path given, twice, in a directory that is a file system of its own; tells what became of each.
SAVER = """
import asyncio, os, sys
from qmpvcpu.errors import RecordError
from qmpvcpu.record.file import save

async def main():
    for data in sys.argv[2:]:
        try:
            await save(sys.argv[1], data.encode() * int(os.environ.get("REPEAT", "1")))
            print("saved")
        except RecordError as error:
            print("RecordError:", error)
    print(sorted(os.listdir(os.path.dirname(sys.argv[1]))), open(sys.argv[1]).read(5))

asyncio.run(main())
"""

ROOT = Path(__file__).parents[2]
UUID = "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a"


class OpenRecord(Protocol):
    """``Record.open``, for a VM of the name "vm"; what it opens is closed when the test ends."""

    async def __call__(
        self,
        path: Path,
        *,
        name: str = "vm",
        uuid: str | None = UUID,
        emulator: str | None = None,
        instance: Instance | None = None,
        base: bytes | Path | None = None,
    ) -> Record: ...


@pytest.fixture
async def open_record() -> AsyncIterator[OpenRecord]:
    opened = []

    async def open_(
        path: Path,
        *,
        name: str = "vm",
        uuid: str | None = UUID,
        emulator: str | None = None,
        instance: Instance | None = None,
        base: bytes | Path | None = None,
    ) -> Record:
        record = await Record.open(path, Claim(name, uuid, instance=instance), emulator=emulator, base=base)
        opened.append(record)
        return record

    yield open_
    for record in opened:
        await record.close()


# Keeps the record at the path given, and writes it at each line of its input; tells what became of each.
KEEPER = """
import asyncio, os, sys
from qmpvcpu.errors import RecordError
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from tests.record.faults import INTENT, LAYOUT

async def main():
    try:
        record = await Record.open(sys.argv[1], Claim("vm"))
    except RecordError as error:
        print("RecordError:", error)
        return
    found = record.previous and record.previous.metadata
    print("open", found and (found.generation, found.intent == INTENT), flush=True)
    for line in sys.stdin:
        os.system(line)
        try:
            await record.write(LAYOUT, intent=INTENT)
            print("saved", flush=True)
        except RecordError as error:
            print(error.outcome.value, error, flush=True)
    await record.close()
    print(sorted(name for name in os.listdir(os.path.dirname(sys.argv[1])) if name != "filler"))

asyncio.run(main())
"""

RunInNamespace = Callable[[str], list[str]]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def in_namespace(tmp_path: Path) -> RunInNamespace:
    """Run a shell script in a mount namespace of its own.

    ``$DISK`` is an empty folder, ``$SAVE`` saves (SAVER above), ``$KEEP`` keeps (KEEPER above).
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    saver = tmp_path / "saver.py"
    saver.write_text(SAVER)
    keeper = tmp_path / "keeper.py"
    keeper.write_text(KEEPER)

    def run(script: str) -> list[str]:
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        result = subprocess.run(
            ["unshare", *user, "--mount", "sh", "-ec", script],
            env={
                **os.environ,
                "DISK": str(disk),
                "SAVE": f"{sys.executable} {saver}",
                "KEEP": f"{sys.executable} {keeper}",
                "PYTHONPATH": str(ROOT),
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run
