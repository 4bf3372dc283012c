"""One door to each part of the system."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.testing import MicroGuest

PACKAGE = Path(qmpvcpu.__file__).parent

# Files of the guest, which its agent reads.
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
IN_THE_GUEST = {("vm/guest.py", _BOOT_ID), ("testing/agent.py", _BOOT_ID)}
# A program that runs without the package, so that it outlives what it guards.
PROGRAMS = {"testing/guardian.py"}


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def docstrings(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            yield node.value


def test_only_host_opens_proc_and_moves_threads() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith("host/") or name in PROGRAMS:
            continue
        tree = ast.parse(file.read_text())
        told = {id(each) for each in docstrings(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
                if node.value.startswith(("/proc/", "/sys/fs/")) and (name, node.value) not in IN_THE_GUEST:
                    found.append((name, node.value))
            elif isinstance(node, ast.Attribute) and node.attr.startswith("sched_"):
                found.append((name, node.attr))
    assert found == []


@pytest.mark.qemu
async def test_a_plug_without_a_placement_imports_nothing_that_places_threads() -> None:
    program = """
import asyncio, sys, qmpvcpu

async def main():
    async with qmpvcpu.attach(sys.argv[1]) as vm:
        await vm.plug(3)
        await vm.refresh()

asyncio.run(main())
print(*sys.modules)
"""
    async with MicroGuest() as guest:
        imported = run("-c", program, str(guest.qmp)).split()
    unneeded = ["finding", "threads", "facts", "birthplace"]
    parts = {f"qmpvcpu.host.{name}" for name in unneeded} | {"qmpvcpu.model.placement"}
    assert not parts & {*imported}
