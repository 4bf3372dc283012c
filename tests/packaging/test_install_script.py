"""fixtures/install.sh on a machine that lacks packages: what it runs as root, and whom it asks for that."""

import subprocess
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

# A Debian on which no package is there, and whose tools write down what they are run as.
_TOOLS = {
    "id": "echo $UID_SHOWN",
    "uname": "echo x86_64",
    "dpkg-query": "exit 1",
    "apt-get": 'echo "apt-get $*" >>ran; exit 1',
    "apt-cache": "exit 1",
    "sudo": 'echo "sudo $*" >>ran; exit 1',
}
_SCRIPTS = ["fixtures/install.sh", "fixtures/linux/build.sh"]


def runs_as_root(script: str, folder: Path, *, uid: int, **environment: str) -> tuple[str, str]:
    """Return what *script* tried to run by sudo or apt-get, and what it said."""
    tools = folder / "bin"
    tools.mkdir()
    for name, does in _TOOLS.items():
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(folder), "UID_SHOWN": str(uid), **environment}
    done = subprocess.run(
        ["bash", ROOT / script], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    ran = folder / "ran"
    return ran.read_text() if ran.exists() else "", done.stderr


@pytest.mark.parametrize("script", _SCRIPTS)
@pytest.mark.parametrize("answer", [{}, {"QMPVCPU_SUDO": ""}, {"QMPVCPU_SUDO": "0"}])
def test_without_root_a_script_says_what_to_run_and_leaves_sudo_alone(
    tmp_path: Path, script: str, answer: dict[str, str]
) -> None:
    ran, said = runs_as_root(script, tmp_path, uid=1000, **answer)
    assert "sudo" not in ran
    assert "as root: apt-get" in said
    assert "QMPVCPU_SUDO=1" in said


@pytest.mark.parametrize("script", _SCRIPTS)
def test_sudo_is_used_where_it_is_asked_for(tmp_path: Path, script: str) -> None:
    ran, _ = runs_as_root(script, tmp_path, uid=1000, QMPVCPU_SUDO="1")
    assert "sudo apt-get" in ran


@pytest.mark.parametrize("script", _SCRIPTS)
def test_root_needs_no_sudo(tmp_path: Path, script: str) -> None:
    ran, _ = runs_as_root(script, tmp_path, uid=0)
    assert "apt-get" in ran
    assert "sudo" not in ran


def test_no_page_has_its_reader_work_where_another_user_could_have_been_first() -> None:
    assert [str(page) for page in PAGES if "/tmp/" in page.read_text()] == []  # noqa: S108
