"""The system calls that a record makes, counted, and made to fail or to be the last one, one after the other."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.domainxml import Metadata, render
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.placement import Placement
from qmpvcpu.model.transition import Action, Intent, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.record import file
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from tests.domainxml.examples import layout_of

UUID = "6f9e0a3e-6a2e-4a8d-9a38-0f6f4f8f4b8a"
CALLS = (
    *("open", "stat", "fstat", "listdir", "write", "ftruncate", "pwrite", "fsync", "rename", "unlink", "close"),
    *("flock", "pread"),
)
LAYOUT = layout_of(4, [0, 2], boot=1)
INTENT = Intent(VcpuMap([0, 2]), VcpuMap([0, 2, 3]), (Step(Action.PLUG, VcpuMap([3])),))

PLACEMENT = Placement.pinned({3: "0-1"})

# Is given the number of the call, what it is called, and the call itself, to do; returns what it returns.
Meddler = Callable[[int, str, Callable[[], Any]], Any]


class _Meddled:
    """A module, the calls of which are counted and meddled with."""

    def __init__(self, module: Any, calls: list[str], meddle: Meddler) -> None:
        self._module = module
        self._calls = calls
        self._meddle = meddle

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name not in CALLS:
            return value

        def meddled(*args: Any, **kwargs: Any) -> Any:
            self._calls.append(_told(name, args))
            return self._meddle(len(self._calls) - 1, name, lambda: value(*args, **kwargs))

        return meddled


def _told(name: str, args: tuple[Any, ...]) -> str:
    """Name a call so that a reader of the list knows which it is."""
    if name == "fsync":
        return "fsync directory" if Path(f"/proc/self/fd/{args[0]}").is_dir() else "fsync file"
    text = str(args[0]) if args else ""
    for end in (".tmp", ".lock"):
        if text.endswith(end):
            return f"{name} {end}"
    return name


@contextmanager
def meddling(meddle: Meddler) -> Iterator[list[str]]:
    """Have all calls of the record's file go through *meddle*; yields their names, as they are made."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "os", _Meddled(os, calls, meddle))
        patch.setattr(file, "fcntl", _Meddled(fcntl, calls, meddle))
        yield calls


def untouched(_number: int, _name: str, call: Callable[[], Any]) -> Any:
    """Do as asked."""
    return call()


async def live(path: Path, layout: Layout = LAYOUT, intent: Intent | None = INTENT) -> None:
    """Open, save once, and close."""
    record = await Record.open(path, Claim("vm"))
    try:
        await record.write(layout, intent=intent, desired=VcpuMap([0]), placement=PLACEMENT)
    finally:
        await record.close()


def prepare(folder: Path, *, existing: bool) -> Path:
    """Make a folder for a record, and a first save of it if it is to be an existing one; return the record's path."""
    folder.mkdir()
    if existing:
        (folder / "vm.xml").write_bytes(render(LAYOUT, metadata=Metadata(generation=1, uuid=UUID)))
    return folder / "vm.xml"
