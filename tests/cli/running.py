"""The command line run as users run it: a process, its words, its exit code."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DEADLINE = 40.0


@dataclass(frozen=True)
class Ran:
    """What one run left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one document on standard output."""
        document: dict[str, Any] = json.loads(self.out)
        assert document["schema"] == "qmpvcpu/1"
        return document

    @property
    def error(self) -> dict[str, Any]:
        """The error in it."""
        error: dict[str, Any] = self.document["error"]
        assert error["message"]
        return error


@dataclass
class Running:
    """A run that goes on."""

    process: asyncio.subprocess.Process

    async def wait_said(self, words: str) -> None:
        """Return when *words* were said on standard error."""
        assert self.process.stderr is not None
        heard = ""
        async with asyncio.timeout(_DEADLINE):
            while words not in heard:
                line = await self.process.stderr.readline()
                assert line, f"it ended without saying {words!r}: {heard}"
                heard += line.decode()

    async def end(self) -> Ran:
        """Return what it left behind, once it has ended."""
        async with asyncio.timeout(_DEADLINE):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        ran = Ran(self.process.returncode, out.decode(), err.decode())
        assert "Traceback" not in ran.out + ran.err, ran
        return ran


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what would choose a VM or a QEMU, and with *changes*."""
    kept = {name: value for name, value in os.environ.items() if name not in {"QMPVCPU_QMP", "QMPVCPU_QEMU"}}
    return kept | {"COLUMNS": "80"} | changes


@contextlib.asynccontextmanager
async def running(
    *arguments: str | Path, env: dict[str, str] | None = None, code: str = ""
) -> AsyncIterator[Running]:
    """Start the command line with *arguments*; *code* runs in the process before it."""
    program = f"import sys\nfrom qmpvcpu.cli import main\n{code}\nsys.exit(main())"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        *map(str, arguments),
        env=environment() if env is None else env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def run(*arguments: str | Path, env: dict[str, str] | None = None, code: str = "") -> Ran:
    """Run the command line with *arguments* to its end."""
    async with running(*arguments, env=env, code=code) as it:
        return await it.end()
