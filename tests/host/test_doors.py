"""One door to each part of the system."""

import ast
from collections.abc import Iterator
from pathlib import Path

import qmpvcpu

PACKAGE = Path(qmpvcpu.__file__).parent

# Files of the guest, which its agent reads.
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
IN_THE_GUEST = {("vm/guest.py", _BOOT_ID), ("testing/agent.py", _BOOT_ID)}


def docstrings(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            yield node.value


def test_only_host_opens_proc_and_moves_threads() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith("host/"):
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
