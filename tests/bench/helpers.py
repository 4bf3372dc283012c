"""Processes of the bench's own that take lines and answer each with one, and what they cost."""

import asyncio
import os
import resource
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Self

__all__ = ["Helper", "allow_many_files", "cpu_ms", "resident_kb", "serve", "tree_cpu_ms"]


class Helper:
    """One process: ``python -m tests.bench.MODULE``, ready once it has said so.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, module: str, *given: object) -> Self:
        """Start it; it is not ready yet: see ``answer``."""
        command = [sys.executable, "-m", f"tests.bench.{module}", *map(str, given)]
        return cls(await asyncio.create_subprocess_exec(*command, stdin=-1, stdout=-1))

    async def ask(self, line: str) -> list[float]:
        """Return the numbers that answer *line*."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        return await self.answer()

    async def answer(self) -> list[float]:
        """Return the numbers of the next line; a first one is empty: it is ready."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, f"process {self.pid} has ended"
        return [*map(float, line.split())]

    async def end(self) -> None:
        """Close its input, and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def serve(answer: Callable[[list[str]], Awaitable[Iterable[float]]]) -> None:
    """Say that this process is ready, and answer each line's words with numbers, until there are no more."""
    given = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(given), sys.stdin)
    said: Iterable[float] = ()
    while True:
        sys.stdout.write(" ".join(map(str, said)) + "\n")
        sys.stdout.flush()
        if not (words := (await given.readline()).decode().split()):
            return
        said = await answer(words)


def allow_many_files() -> None:
    """Let this process have as many files open as it may: most systems begin with 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def cpu_ms(pids: Iterable[int]) -> float:
    """Return the CPU time of all threads of these processes until now, in milliseconds."""
    threads = (thread for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


def tree_cpu_ms(pid: int) -> float:
    """Return the CPU time of a process and all of its descendants, those that have ended too, in milliseconds."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended this moment
        return 0.0
    ticks = sum(int(each) for each in fields[11:15])  # its own, and those of children that it has waited for
    return ticks * 1000 / os.sysconf("SC_CLK_TCK") + sum(tree_cpu_ms(int(each)) for each in children)


def resident_kb(pids: Iterable[int]) -> float:
    """Return the resident memory of these processes, in kB; what several of them share counts once."""
    texts = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return float(sum(int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("Pss:")))
