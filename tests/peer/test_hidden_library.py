"""Another package named ``qemu`` on the path, which hides qemu.qmp."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("hiding", ["qemu/__init__.py", "qemu.py", "qemu/qmp.py", "qemu/qmp/__init__.py"])
def test_the_error_names_the_file_that_hides_it(hiding: str, tmp_path: Path) -> None:
    culprit = tmp_path / hiding
    culprit.parent.mkdir(exist_ok=True, parents=True)
    culprit.touch()
    ran = run(tmp_path, "-c", "import qmpvcpu; qmpvcpu.attach")
    what = "hides the library qemu.qmp, which qmpvcpu needs: rename it, or remove its directory from sys.path"
    said = f"{culprit} {what} (PYTHONPATH)"
    assert ran.stderr.splitlines()[-1] == f"ImportError: {said}"
    ran = run(tmp_path, "-m", "qmpvcpu", "list", "--qmp", "/run/vm.qmp")
    assert (ran.returncode, ran.stderr) == (2, f"qmpvcpu: {said}\n")


def test_a_library_that_is_not_there_is_said_to_be_missing() -> None:
    program = "import sys; sys.path = [each for each in sys.path if 'site-packages' not in each]; import qmpvcpu.qmp"
    ran = run(Path(__file__).parents[2], "-S", "-c", program)
    assert ran.stderr.splitlines()[-1] == "ImportError: qemu.qmp is not installed: pip install qemu.qmp"
