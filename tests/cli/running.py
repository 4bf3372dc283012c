"""The command line run as users run it: a process, its words, its exit code."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.cli import main
from tests.cli.forking import Forked, forked
from tests.cli.schema import check, command_of
from tests.cli.screen import Screen

_DEADLINE = 40.0


@dataclass(frozen=True)
class Ran:
    """What one run left behind."""

    code: int
    out: str
    err: str
    command: str = "usage"

    @property
    def document(self) -> dict[str, Any]:
        """The one document on standard output, which is as its schema says."""
        document: dict[str, Any] = json.loads(self.out)
        check(document, self.command)
        return document

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The documents on standard output, one a line."""
        documents: list[dict[str, Any]] = [json.loads(line) for line in self.out.splitlines()]
        for document in documents:
            check(document, self.command)
        return documents

    @property
    def error(self) -> dict[str, Any]:
        """The error in it."""
        error: dict[str, Any] = self.document["error"]
        assert error["message"]
        return error


@dataclass
class Running:
    """A run that goes on."""

    process: asyncio.subprocess.Process | Forked
    command: str

    async def wait_said(self, words: str) -> None:
        """Return when *words* were said on standard error."""
        assert self.process.stderr is not None
        heard = ""
        async with asyncio.timeout(_DEADLINE):
            while words not in heard:
                line = await self.process.stderr.readline()
                assert line, f"it ended without saying {words!r}: {heard}"
                heard += line.decode()

    async def end(self, *, within: float = _DEADLINE) -> Ran:
        """Return what it left behind, once it has ended."""
        async with asyncio.timeout(within):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        ran = Ran(self.process.returncode, out.decode(), err.decode(), self.command)
        assert "Traceback" not in ran.out + ran.err, ran
        return ran


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, without what would choose a VM or a QEMU, and with *changes*."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"QMPVCPU_QMP", "QMPVCPU_AGENT", "QMPVCPU_QEMU"}
    }
    return kept | {"COLUMNS": "80"} | changes


@contextlib.asynccontextmanager
async def _fresh(
    arguments: Sequence[str | Path], env: dict[str, str], code: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    program = f"import sys\nfrom qmpvcpu.cli import main\n{code}\nsys.exit(main())"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *map(str, arguments)),
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@contextlib.asynccontextmanager
async def running(
    *arguments: str | Path, env: dict[str, str] | None = None, code: str = ""
) -> AsyncIterator[Running]:
    """Start the command line with *arguments*; *code* runs before it, in a Python that has imported nothing."""
    env = environment() if env is None else env
    async with _fresh(arguments, env, code) if code else forked([*map(str, arguments)], env) as process:
        yield Running(process, command_of(arguments))


async def run(
    *arguments: str | Path, env: dict[str, str] | None = None, code: str = "", within: float = _DEADLINE
) -> Ran:
    """Run the command line with *arguments* to its end."""
    async with running(*arguments, env=env, code=code) as it:
        return await it.end(within=within)


async def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """Run the command line in a thread of this process, where it starts sooner."""
    code = await asyncio.to_thread(main, [*map(str, arguments)])
    spoken = capsys.readouterr()
    return Ran(code, spoken.out, spoken.err, command_of(arguments))


@dataclass
class Terminal:
    """What a run shows on a terminal of its own.

    Attributes:
        process: The run.
        screen: What the terminal shows now.
        master: The other end of the terminal.
        shown: Everything so far, as text.
        raw: The same, as it was written.
    """

    process: asyncio.subprocess.Process
    screen: Screen
    master: int
    shown: str = ""
    raw: bytes = b""
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def type(self, keys: str) -> None:
        """Press *keys*."""
        os.write(self.master, keys.encode())

    def read(self) -> None:
        """Take in what there is; at the end of the other side there is an error instead."""
        try:
            said = os.read(self.master, 65536)
        except OSError:
            asyncio.get_running_loop().remove_reader(self.master)
            self._ended.set()
        else:
            self.raw += said
            self.screen.feed(said)
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode(errors="replace"))
        self._news.set()

    async def wait_shown(self, words: str) -> None:
        """Return when *words* were shown."""
        await self.wait_until(lambda: words in self.shown)

    async def wait_on_screen(self, words: str) -> None:
        """Return when *words* stand on the screen."""
        await self.wait_until(lambda: words in str(self.screen))

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when *condition* holds of what was shown."""
        async with asyncio.timeout(_DEADLINE):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def end(self, *, within: float = _DEADLINE) -> int:
        """Return the exit code, once it has ended and all that it showed is taken in."""
        async with asyncio.timeout(within):
            code = await self.process.wait()
            await self._ended.wait()
        return code


@contextlib.asynccontextmanager
async def on_terminal(
    *arguments: str | Path, columns: int = 80, lines: int = 30, env: dict[str, str] | None = None
) -> AsyncIterator[Terminal]:
    """Start the command line with *arguments* on a terminal of so many columns and lines."""
    words = (sys.executable, "-m", "qmpvcpu", *map(str, arguments))
    async with program_on_terminal(*words, columns=columns, lines=lines, env=env or environment()) as terminal:
        yield terminal


@contextlib.asynccontextmanager
async def program_on_terminal(
    *argv: str, env: dict[str, str], columns: int = 80, lines: int = 30, cwd: Path | None = None
) -> AsyncIterator[Terminal]:
    """Start any program on a terminal of so many columns and lines."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    env = {name: value for name, value in env.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    process = await asyncio.create_subprocess_exec(*argv, env=env, cwd=cwd, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    terminal = Terminal(process, Screen(columns, lines), master)
    asyncio.get_running_loop().add_reader(master, terminal.read)
    try:
        yield terminal
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)
