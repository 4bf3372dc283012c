"""What the README says about one's own pytest: from a clone and nothing else to a refused unplug."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, block

PLACE = "~/qmpvcpu-try"


def steps(place: Path) -> list[str]:
    """The two blocks of commands, for *place* instead of the README's."""
    return [
        block("README.md", "the environment").text.replace(PLACE, str(place)),
        block("README.md", "the run").text.replace(PLACE, str(place)),
    ]


def pytest_says(command: str) -> tuple[int, str]:
    # The README says how to silence the loop-scope warning of pytest-asyncio; there must be no other.
    options = os.environ | {"PYTEST_ADDOPTS": "-W error -o asyncio_default_fixture_loop_scope=function"}
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, env=options, capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    return ran.returncode, ran.stdout


@pytest.mark.qemu
def test_someone_who_follows_the_readme_sees_a_guest_refuse_in_their_own_pytest(tmp_path: Path) -> None:
    place = tmp_path / "try"
    install, run = steps(place)
    subprocess.run(["bash", "-e", "-c", install], cwd=ROOT, check=True, capture_output=True)
    (place / "test_refused.py").write_text(block("README.md", "the test file").text)
    code, said = pytest_says(run)
    assert code == 0, said
    assert " 1 passed in " in said
    test = (place / "test_refused.py").read_text()
    (place / "test_refused.py").write_text(re.sub(r".*\brefuse\(.*\n", "", test))
    code, said = pytest_says(run)
    assert code == 1, said
    assert "DID NOT RAISE" in said
    assert '{"execute": "device_del"' in said


def test_the_readme_needs_three_commands_for_it() -> None:
    commands = [line for text in steps(Path(PLACE)) for line in text.splitlines()]
    assert len(commands) == 3
    assert f"`{PLACE}/test_refused.py`" in (ROOT / "README.md").read_text()


def test_every_claim_about_others_names_its_source() -> None:
    section = (ROOT / "README.md").read_text().partition("## Compared with other tools")[2].partition("\n## ")[0]
    sources = set(re.findall(r"^(\d+)\. ", section, re.MULTILINE))
    rows = [line.strip("| ").split("|")[2:] for line in section.splitlines() if line.startswith("| ")][1:]
    cited = {number for row in rows for cell in row for number in re.findall(r"\[(\d+)\]", cell)}
    assert cited == sources
