"""What a reader does on one page, from top to bottom: one directory, one shell, one Python prompt, one VM.

The pages' VM is ``/run/vm.qmp`` (its second monitor ``/run/vm.qmp2``), also the one in ``/run/vms``; here these
are the sockets of a micro-guest with vCPU 0 of 8, which complies, and `QMPVCPU_QMP` names it. Its guest agent, at
``/run/vm.agent``, is a scripted one, whose system uses what is plugged. What was printed is
compared with what is shown, after times, process ids and the like are made alike on both sides; ``...`` stands for
anything.
"""

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
import json
import os
import re
import sys
import tomllib
import traceback
from pathlib import Path
from typing import Any, Self

import yaml
from lxml import etree

from qmpvcpu.domainxml import parse, validate
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.qmp.queries import look
from qmpvcpu.testing import MicroGuest, ScriptedAgent
from tests.docs.blocks import DATA, FOR_SPHINX, PROMPT, SHELL, Block, syntax_tree

ADDRESS = "/run/vm.qmp"
AGENT = "/run/vm.agent"
VMS = "/run/vms"
_DEADLINE = 150.0
_AWAIT = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_MARK = "\x1e"  # between the outputs of two commands
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_ALIKE = [  # what differs from run to run -> what stands for it
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S*"), "TIME"),
    (re.compile(r"\b\d\d:\d\d:\d\d(\.\d+)?\b"), "TIME"),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "UUID"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s|seconds)\b"), "T s"),
    (re.compile(r"seconds(\"?[=:] ?)[\d.e-]+"), r"seconds\1T"),
    (re.compile(r"\b\d+\.\d+\.\d+\b"), "VERSION"),
    (re.compile(r"\b0x[0-9a-f]{5,}\b"), "ADDRESS"),
    (re.compile(r"(?<!\()\b\d{3,}\b"), "N"),  # a process, a thread; an OST status is in brackets
    (re.compile(r"─+|━+|-{4,}"), "--"),
]


class MismatchError(AssertionError):
    """A page shows other words than its command prints."""

    def __init__(self, where: object, command: str, shown: str, printed: str) -> None:
        super().__init__(f"{where}: {command.strip()}\nshown:\n{shown}\nprinted:\n{printed}")


def alike(text: str, *places: Path) -> str:
    """Return *text* without what differs from run to run; *places* are directories that the pages do not name."""
    for place in places:
        text = text.replace(f"{place}/", "").replace(str(place), ".")
    for pattern, word in _ALIKE:
        text = pattern.sub(word, text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def told_alike(shown: str, printed: str, *places: Path) -> bool:
    """Return whether *printed* is what *shown* says."""
    want, got = alike(shown, *places) + "\n", alike(printed, *places) + "\n"
    return doctest.OutputChecker().check_output(want, got, _OPTIONS)


class Session:
    """A reader's session; an async context manager.

    Args:
        directory: Where it begins; empty.
        guest: The VM at ``/run/vm.qmp``; None: one of its own once a block needs it.
    """

    def __init__(self, directory: Path, guest: MicroGuest | None = None) -> None:
        self.directory = directory
        self.guest = guest
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self._agents_path = ""
        self._ends = contextlib.AsyncExitStack()
        self._before = Path.cwd()
        self._vms = directory.with_name(f"{directory.name}.vms")
        paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        unset = {"FORCE_COLOR", "VIRTUAL_ENV"}
        self._environment = {name: value for name, value in os.environ.items() if name not in unset}
        self._environment |= {"PATH": paths, "COLUMNS": "110", "NO_COLOR": "1"}

    async def __aenter__(self) -> Self:
        await self._ends.__aenter__()
        self._ends.callback(os.chdir, self._before)
        os.chdir(self.directory)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._ends.aclose()

    async def run(self, block: Block) -> str:
        """Do what *block* says, and return what a shell printed.

        Raises:
            AssertionError: It fails, or prints something else than it shows.
        """
        if block.file:
            (self.directory / block.file).write_text(await self._here(block.text))
        elif block.language == "console":
            await self._console(block)
        elif block.language in SHELL:
            ((code, printed),) = await self._shell(f"set -e\n{block.text}")
            assert code == 0, f"{block} ended with {code}:\n{printed}"
            return printed
        elif block.language in PROMPT:
            await self.prompt(str(block), block.text)
        elif block.language in DATA:
            read_data(block)
        else:
            assert block.language in FOR_SPHINX, f"{block}: nothing runs {block.language!r}"
        return ""

    async def prompt(self, where: str, text: str) -> None:
        """Type what has ``>>>`` before it in the *text* of *where*, at a prompt that knows ``await``."""
        for example in doctest.DocTestParser().get_examples(text):
            if example.options.get(doctest.SKIP):
                continue
            printed = await self._evaluate(await self._here(example.source))
            shown = example.want if example.exc_msg is None else example.exc_msg
            if not told_alike(shown, printed, self.directory):
                raise MismatchError(where, example.source, shown, printed)

    async def _here(self, text: str) -> str:
        """Return *text* with the address of our VM in the place of the pages'."""
        if ADDRESS in text or VMS in text:
            guest = await self._vm()
            text = text.replace(VMS, str(self._vms)).replace(f"{ADDRESS}2", str(guest.process.sockets[1]))
            text = text.replace(ADDRESS, str(guest.qmp))
        return text.replace(AGENT, await self._agent()) if AGENT in text else text

    async def _agent(self) -> str:
        if self._agents_path == "":
            second = (await self._vm()).process.sockets[1]

            async def plugged() -> VcpuMap:
                return (await look(second)).enabled

            agent = await self._ends.enter_async_context(ScriptedAgent(look=plugged, onlines=True))
            self._agents_path = agent.path
        return self._agents_path

    async def _vm(self) -> MicroGuest:
        if self.guest is None:
            self.guest = await self._ends.enter_async_context(MicroGuest())
        if not self._vms.exists():
            self._vms.mkdir()
            (self._vms / "vm.qmp").symlink_to(self.guest.qmp)
        return self.guest

    async def _evaluate(self, source: str) -> str:
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                for statement in syntax_tree(source).body:
                    code = compile(ast.Interactive([statement]), "prompt", "single", flags=_AWAIT)
                    if inspect.isawaitable(done := eval(code, self.names)):  # noqa: S307 - it is our own page
                        await done
        except Exception as error:  # noqa: BLE001 - a page may show any
            return out.getvalue() + "".join(traceback.format_exception_only(error))
        return out.getvalue()

    async def _console(self, block: Block) -> None:
        commands: list[tuple[str, str]] = []
        for line in block.text.splitlines(keepends=True):
            if line.startswith("$ "):
                commands.append((line[2:], ""))
            elif line.startswith("> ") and commands and not commands[-1][1]:
                commands[-1] = (commands[-1][0] + line[2:], "")
            else:
                commands[-1] = (commands[-1][0], commands[-1][1] + line)
        done = await self._shell(*(command for command, _ in commands))
        for number, ((command, shown), (code, printed)) in enumerate(zip(commands, done, strict=True)):
            if not told_alike(shown, printed, self.directory, *self._places):
                raise MismatchError(block, command, shown, printed)
            asked = number + 1 < len(commands) and commands[number + 1][0].strip() == "echo $?"
            assert code == 0 or asked, f"{block}: {command.strip()} ended with {code}, and no `echo $?` shows it"

    @property
    def _places(self) -> list[Path]:
        return [self.guest.qmp.parent] if self.guest else []

    async def _shell(self, *commands: str) -> list[tuple[int, str]]:
        """Run *commands* in one bash; what they export is there for later blocks too."""
        if any("qmpvcpu" in command for command in commands):
            guest = await self._vm()
            self._environment.setdefault("QMPVCPU_QMP", str(guest.qmp))
        end = f"code=$?; printf '{_MARK}%s{_MARK}' $code; (exit $code)\n"
        script = "exec 2>&1\n" + "".join([f"{await self._here(command)}\n{end}" for command in commands])
        keep = 'python3 -c \'import json, os; json.dump(dict(os.environ), open(os.environ["KEPT"], "w"))\'\n'
        kept = self.directory.with_name(f"{self.directory.name}.environment")
        process = await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            script + keep,
            cwd=self.directory,
            env=self._environment | {"KEPT": str(kept)},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(_DEADLINE):
            output, _ = await process.communicate()
        parts = output.decode().split(_MARK)
        if kept.exists():
            self._environment = json.loads(kept.read_text())
            kept.unlink()
        done = [(int(code), printed) for printed, code in zip(parts[0::2], parts[1::2], strict=False)]
        return done or [(process.returncode or 0, output.decode())]


def read_data(block: Block) -> None:
    """Read *block* as what it says it is; a domain document must be one that libvirt defines."""
    match block.language:
        case "json":
            json.loads(block.text)
        case "toml":
            tomllib.loads(block.text)
        case "yaml":
            yaml.safe_load(block.text)
        case _:
            root = etree.fromstring(f"<all>{block.text}</all>")
            for domain in root.iter("domain"):
                document = etree.tostring(domain)
                assert validate(document) == (), f"{block}: libvirt would refuse it"
                parse(document)
