"""User code under ``mypy --strict`` against the installed wheel: what is right is accepted, what is wrong is not."""

import re
import subprocess
import sys
from pathlib import Path

from tests.packaging.conftest import ROOT, Environment

PROGRAMS = ROOT / "tests" / "typing"


def mypy(environment: Environment, directory: Path, program: str) -> list[str]:
    """Check *program* as its author would, far from the working tree; return the errors."""
    file = directory / "program.py"
    file.write_text(program)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", environment.path("python"), file],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.stderr == ""
    return [line for line in checked.stdout.splitlines() if ": error: " in line]


def test_the_types_of_the_wheel_are_those_that_users_see(alone: Environment, tmp_path: Path) -> None:
    assert mypy(alone, tmp_path, (PROGRAMS / "api.py").read_text()) == []


def test_each_wrong_use_is_rejected_for_its_reason(alone: Environment, tmp_path: Path) -> None:
    lines = (PROGRAMS / "wrong.py").read_text().splitlines()
    marks = [re.search(r"# type: ignore\[(.*)\]", line) for line in lines]
    wanted = {(str(n), code) for n, mark in enumerate(marks, start=1) if mark for code in mark[1].split(", ")}
    said = mypy(alone, tmp_path, "\n".join(line.partition("  # type: ignore")[0] for line in lines))
    assert {(line.split(":")[1], line.rpartition("[")[2].rstrip("]")) for line in said} == wanted
