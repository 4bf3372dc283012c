"""The examples as their users run them: as programs, with a terminal's two directions."""

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DEADLINE_S = 30.0


class Running:
    """One example that runs.

    Attributes:
        said: What it has printed so far, errors included.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.said = ""

    async def hear(self, pattern: str) -> re.Match[str]:
        """Return the first line from here on in which *pattern* is found."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            while line := (await self.process.stdout.readline()).decode():
                self.said += line
                if found := re.search(pattern, line):
                    return found
        raise AssertionError(f"it ended, and did not say {pattern!r}:\n{self.said}")

    async def tell(self, line: str) -> None:
        """Type *line*."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        await self.process.stdin.drain()

    async def end(self) -> int:
        """End its standard input; return how it ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        async with asyncio.timeout(DEADLINE_S):
            self.said += (await self.process.stdout.read()).decode()
            return await self.process.wait()


@contextlib.asynccontextmanager
async def running(name: str, *words: object) -> AsyncIterator[Running]:
    """Run an example; it is killed at the end, if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / name),
        *map(str, words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"COLUMNS": "200"},
    )
    example = Running(process)
    try:
        yield example
    finally:
        if process.returncode is None:
            process.kill()
        await example.end()
