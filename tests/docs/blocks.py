"""The fenced blocks of the pages, and which test runs each.

A block is run in one of these ways, which `docs/CONTRIBUTING.md` tells writers:

- A comment above it, ``<!-- run by tests/docs: NAME -->``: a test below that path says
  ``block("docs/PAGE.md", "NAME")`` and runs it.
- ``<!-- run by FILE: WHY -->`` with any other file: that file has each line of it, and is what is run.
- ``<!-- file: NAME -->``: it is written to that file, and a later block of the page uses the file.
- No comment: what a shell or a Python prompt is given is run as a reader would (`tests/docs/session.py`), and data is
  read by what reads such data.
"""

import ast
import gc
import re
import types
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SHELL = {"sh", "console"}
PROMPT = {"pycon"}
DATA = {"xml", "json", "toml", "yaml"}
FOR_SPHINX = {"{toctree}", "{eval-rst}"}  # directives: building the manual runs them

_FENCE = re.compile(
    r"(?:^<!-- (?P<verb>run by|file:) (?P<about>[^\n]*?) -->\n\n?)?^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path of its page from the root, such as ``docs/maps.md``.
        line: Where its fence stands.
        language: The word after the fence.
        text: What is between the fences.
        runner: The path that its comment names, or "".
        name: What its comment calls it, or "".
        file: The file that it is written to, or "".
    """

    page: str
    line: int
    language: str
    text: str
    runner: str = ""
    name: str = ""
    file: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def as_it_stands(self) -> bool:
        """True if it is run as a reader would: typed, written to its file, or read."""
        return not self.runner and self.language not in FOR_SPHINX

    @property
    def lines(self) -> list[str]:
        """What it says, without blank lines, comments and the prompt of a shell."""
        told = [line.strip().removeprefix("$ ") for line in self.text.splitlines()]
        return [line for line in told if line and not line.startswith("#")]

    def module(self) -> types.ModuleType:
        """Run it as the source of a module, and return that."""
        module = types.ModuleType("example")
        exec(compile(self.text, str(self), "exec"), module.__dict__)  # noqa: S102 - it is our own page
        return module


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    """Return all blocks of *page*, from top to bottom."""
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    found = []
    for each in _FENCE.finditer(text):
        line = text.count("\n", 0, each.start("language")) + 1
        verb, about = each["verb"] or "", each["about"] or ""
        runner, _, title = about.partition(": ") if verb == "run by" else ("", "", "")
        file = about if verb == "file:" else ""
        found.append(Block(name, line, each["language"], each["text"], runner, title, file))
    return tuple(found)


def block(page: str, name: str) -> Block:
    """Return the one block of *page* (from the root) whose comment calls it *name*; whoever calls this runs it."""
    (found,) = [each for each in blocks_of(ROOT / page) if each.name == name]
    return found


def syntax_tree(source: str) -> ast.Module:
    """Parse *source*, with the garbage collector paused.

    A collection in the middle of ``ast.parse`` may end a task whose error nobody took. asyncio logs the traceback of
    it, for which Python 3.11 parses lines itself; the outer parse then fails with "AST constructor recursion depth
    mismatch". Python 3.12 keeps count for each call.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if running:
            gc.enable()


@cache
def claims() -> dict[tuple[str, str], str]:
    """Return which test file asks for which block: a call of ``block`` with two literals is a claim."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(syntax_tree(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Name("block"), args=[ast.Constant(str() as page), ast.Constant(str() as name)]
                ):
                    found[page, name] = str(path.relative_to(ROOT))
    return found


def why_not_run(block: Block) -> str:
    """Return what is missing for *block* to be run by the tests; "" if it is."""
    if block.runner.startswith("tests/") and not (ROOT / block.runner).is_file():
        claimed = claims().get((block.page, block.name), "")
        call = f'block("{block.page}", "{block.name}")'
        return "" if claimed.startswith(block.runner) else f"no test in {block.runner} asks for it by {call}"
    if block.runner:
        if not (ROOT / block.runner).is_file():
            return f"there is no {block.runner}"
        text = (ROOT / block.runner).read_text()
        missing = [line for line in block.lines if line not in text]
        return f"{block.runner} does not have {missing[0]!r}" if missing else ""
    if block.file:
        later = [each for each in blocks_of(ROOT / block.page) if each.line > block.line and not each.file]
        return "" if any(block.file in each.text for each in later) else f"nothing after it uses {block.file}"
    known = SHELL | PROMPT | DATA | FOR_SPHINX
    return "" if block.language in known else "nothing says what runs it: see docs/CONTRIBUTING.md"
