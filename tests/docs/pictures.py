"""Pictures of the command line's output for the pages: run for real on a terminal, its screen drawn as SVG.

``python -m tests.docs.pictures [NAME...]`` makes them anew in ``docs/images``; a test holds what is there against
what the commands print now.
"""

import asyncio
import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from rich.console import Console
from rich.text import Text

from qmpvcpu.testing import Behaviour, LinuxGuest, MicroGuest
from tests.cli.running import Terminal, on_terminal, run

__all__ = ["DIRECTORY", "PICTURES", "same_words", "words_in"]

DIRECTORY = Path(__file__).parents[2] / "docs" / "images"
_COLUMNS = 80
_BUSY = 0x82

# Letters of a terminal, in pixels.
_WIDTH, _HEIGHT, _SIZE = 8.4, 18, 14
_MARGIN, _TOP = 14, 44
_INK, _PAPER = "#d4d7d6", "#23272b"
_COLOURS = {
    "green": "#8cc265",
    "yellow": "#e5b95c",
    "red": "#e8707a",
    "blue": "#6fa8dc",
    "cyan": "#56b6c2",
    "magenta": "#c678dd",
    "bright_black": "#8b9298",
}
_NOWHERE: Final = Console(file=io.StringIO())
_DOTS = ("#ff5f57", "#febc2e", "#28c840")


@contextlib.asynccontextmanager
async def _vm(*qemu: str) -> AsyncIterator[tuple[MicroGuest, Path]]:
    """A VM named web1, with a short path to its socket."""
    with tempfile.TemporaryDirectory(prefix="qmpvcpu-") as directory:
        async with MicroGuest(boot=2, extra_args=("-name", "web1", *qemu)) as guest:
            path = Path(directory) / "web1.qmp"
            path.symlink_to(guest.qmp)
            yield guest, path


async def _ended(*arguments: str | Path, columns: int = _COLUMNS, lines: int = 60) -> list[Text]:
    """What the command has left on the screen."""
    async with on_terminal(*arguments, columns=columns, lines=lines) as it:
        await it.end(within=120)
    return it.screen.coloured


def _at_the_usual_place(line: Text) -> Text:
    """Return *line* with the path of a QEMU in the cache, or of the server in this environment, as most have it."""
    for place, usual in ((r"/\S*qmpvcpu/(?=qemu-)", "~/.cache/qmpvcpu/"), (r"/\S*/(?=\.venv/)", "~/qmpvcpu/")):
        if found := re.search(place, line.plain):
            return Text.assemble(line[: found.start()], usual, line[found.end() :])
    return line


async def _demo() -> list[Text]:
    lines = [_at_the_usual_place(line) for line in await _ended("demo", columns=200, lines=100)]
    end = next(number for number, line in enumerate(lines) if line.plain.startswith("The state as libvirt's"))
    return lines[:end]  # the XML below fills a page of its own


async def _list() -> list[Text]:
    async with _vm() as (guest, path):
        assert (await run("set", "0-3,6", "--qmp", guest.sockets[1])).code == 0
        await guest.set_behaviour(Behaviour.hanging())
        assert (await run("unplug", "3", "--timeout", "0", "--qmp", guest.sockets[1])).code == 1
        return await _ended("list", "--qmp", path)


_LAST_OF_WATCH = "vCPU 5: the guest works on it (by another client)"


async def _watch() -> list[Text]:
    """A guest that takes vCPUs in, gives one back late, refuses another, and has one still to decide about."""
    async with _vm() as (guest, path), on_terminal("watch", "--qmp", path, columns=_COLUMNS, lines=24) as it:
        other = ("--qmp", guest.sockets[1])
        await it.wait_on_screen("host tid")
        await _then(it, run("set", "0-2,5-6", *other), "vCPU 6 is plugged")
        await guest.set_behaviour(Behaviour.hanging())
        await _then(it, run("unplug", "6", "--timeout", "0", *other), "vCPU 6: the guest works on it")
        await _then(it, guest.set_behaviour(Behaviour.complying()), "vCPU 6 is gone")
        await guest.set_behaviour(Behaviour.refusing(_BUSY))
        await _then(it, run("unplug", "2", *other), "vCPU 2: the guest refused")
        await guest.set_behaviour(Behaviour.hanging())
        await _then(it, run("unplug", "5", "--timeout", "0", *other), _LAST_OF_WATCH)
        # A frame is drawn from its top: with its last line it is whole.
        await it.wait_until(lambda: "(2 s)" in str(it.screen) and it.screen.lines[-1].endswith(_LAST_OF_WATCH))
        return it.screen.coloured


async def _stats() -> list[Text]:
    """A Linux that has three of its vCPUs work."""
    busy = {"path": "/bin/sh", "arg": ["-c", "while :; do :; done"]}
    async with LinuxGuest(boot=4, extra_args=("-name", "web1")) as guest:
        replies, agent = await asyncio.open_unix_connection(guest.agent)
        for _ in range(3):
            agent.write(json.dumps({"execute": "guest-exec", "arguments": busy}).encode() + b"\n")
            await replies.readline()
        agent.close()
        return await _ended("stats", "--by", "vcpu", "--interval", "0.5", "--count", "16", "--qmp", guest.qmp)


async def _then(it: Terminal, does: Awaitable[object], words: str) -> None:
    await does
    await it.wait_on_screen(words)


async def _set() -> list[Text]:
    async with _vm() as (guest, path):
        assert (await run("plug", "6", "--qmp", guest.sockets[1])).code == 0
        await guest.set_behaviour(Behaviour.refusing(_BUSY).for_slot(1))
        return await _ended("set", "0,2-4", "--on-failure", "revert", "--qmp", path)


async def _hosts_demo() -> list[Text]:
    lines = [_at_the_usual_place(line) for line in await _ended("hosts", "demo", columns=100, lines=100)]
    end = next(number for number, line in enumerate(lines) if line.plain.startswith("All of it is gone now."))
    return lines[:end]  # what to try next is on the page


async def _doctor() -> list[Text]:
    """This machine, and a VM that has taken and given vCPUs."""
    async with _vm() as (guest, path):
        assert (await run("set", "0-3", "--qmp", guest.sockets[1])).code == 0
        assert (await run("unplug", "3", "--qmp", guest.sockets[1])).code == 0
        return [_at_the_usual_place(line) for line in await _ended("doctor", "--qmp", path)]


# Each with what was typed for it, and what makes it.
PICTURES: dict[str, tuple[str, Callable[[], Awaitable[list[Text]]]]] = {
    "demo": ("qmpvcpu demo", _demo),
    "list": ("qmpvcpu list", _list),
    "watch": ("qmpvcpu watch", _watch),
    "stats": ("qmpvcpu stats --by vcpu --interval 0.5", _stats),
    "hosts-demo": ("qmpvcpu hosts demo", _hosts_demo),
    "doctor": ("qmpvcpu doctor --qmp /run/web1.qmp", _doctor),
    "set": ("qmpvcpu set 0,2-4 --on-failure revert", _set),
}


def drawn(name: str, lines: Sequence[Text]) -> str:
    """Return the picture of *lines* as SVG.

    Each word has a place of its own, so that columns stay columns in any font; it asks for no font from elsewhere.
    """
    typed = PICTURES[name][0]
    rows = [Text.assemble(("$ ", "bold green"), typed), *lines]
    columns = max(_COLUMNS, *(len(row.plain.rstrip()) for row in rows))
    width = round(columns * _WIDTH) + 2 * _MARGIN
    height = _TOP + len(rows) * _HEIGHT + _MARGIN
    dots = "".join(
        f'<circle cx="{22 + 18 * place}" cy="20" r="6" fill="{colour}"/>' for place, colour in enumerate(_DOTS)
    )
    shown = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{typed}">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{_PAPER}"/>',
        dots,
        f'<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{_SIZE}" fill="{_INK}">',
        *(word for number, row in enumerate(rows) for word in _words(row, _TOP + (number + 0.8) * _HEIGHT)),
        "</g>",
        "</svg>",
    ]
    return "\n".join(shown) + "\n"


def _words(row: Text, y: float) -> Iterator[str]:
    for found in re.finditer(r"\S+", row.plain):
        for style, letters in groupby(range(*found.span()), lambda place: row.get_style_at_offset(_NOWHERE, place)):
            places = list(letters)
            word = row.plain[places[0] : places[-1] + 1]
            colour = style.color and _COLOURS[style.color.name]
            fill = f' fill="{colour}"' if colour else ""
            bold = ' font-weight="bold"' if style.bold else ""
            x = _MARGIN + places[0] * _WIDTH
            length = len(word) * _WIDTH
            yield f'<text x="{x:.1f}" y="{y:.1f}" textLength="{length:.1f}"{fill}{bold}>{escape(word)}</text>'


def words_in(svg: str) -> list[str]:
    """Return the lines of text that a picture shows, words apart by one space."""
    rows: dict[float, list[str]] = {}
    for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):  # noqa: S314 - made above
        rows.setdefault(float(element.get("y", 0)), []).append(element.text or "")
    return [" ".join(row) for _, row in sorted(rows.items())]


# What is another thing on another day, or on another machine.
_VARIES = (
    (r"\d\d:\d\d:\d\d(\.\d{3})?", "TIME"),
    (r"\d+(\.\d+)? (ms|s)\b", "SECONDS"),
    (r"pc-q35-\d+\.\d+", "MACHINE"),
    (r"QEMU \d+(\.\d+)+", "QEMU"),
    (r"\b(kvm|tcg|KVM|TCG)\b", "ACCELERATOR"),
    (r"NATS server \S+ at \S+:", "SERVER"),
    (r"a network namespace\.|a directory \(.*", "SEPARATE"),
    (", the cable is cut", ""),
    (r"\S*/(qemu-system-x86_64|nats-server)", "PATH"),
    (r"(?<=\] )\d+|\b\d{3,}\b(?!\.\d%)", "TID"),  # a machine that has just started counts its threads from 1
    (r"\d+\.\d%.*", "SHARES"),
    (r" +", " "),
)


def same_words(lines: Sequence[str]) -> list[str]:
    """Return *lines* without what differs from run to run."""
    said = []
    for line in lines:
        for pattern, word in _VARIES:
            line = re.sub(pattern, word, line)  # noqa: PLW2901 - one after another
        said.append(line.strip())
    while said and not said[-1]:
        said.pop()
    return [line for line in said if line]


async def make(name: str) -> str:
    """Return the picture *name*, made anew."""
    return drawn(name, await PICTURES[name][1]())


async def _main(names: Sequence[str]) -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for name in names or PICTURES:
        (DIRECTORY / f"{name}.svg").write_text(await make(name))


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
