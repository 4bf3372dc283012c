"""Another package named ``qemu`` on the path, which hides qemu.qmp."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Whose package it is must not change: both names are used, and each is what it was.
USES_BOTH = """
import qemu
import qmpvcpu
from qmpvcpu.qmp.client import TunedClient
from qemu.qmp import QMPClient
from qemu.qmp.message import Message
assert isinstance(TunedClient(), QMPClient)
print(qemu.__file__)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )


def make(path: Path, content: str = "") -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize("hiding", ["qemu/__init__.py", "qemu.py"])
@pytest.mark.parametrize("first", ["import qemu", "import qmpvcpu; qmpvcpu.attach"])
def test_a_package_of_that_name_is_left_alone_and_ours_is_found(hiding: str, first: str, tmp_path: Path) -> None:
    theirs = make(tmp_path / hiding)
    ran = run(tmp_path, "-c", f"{first}\n{USES_BOTH}")
    assert (ran.stdout, ran.stderr) == (f"{theirs}\n", "")
    ran = run(tmp_path, "-m", "qmpvcpu", "list", "--qmp", "/run/none.qmp")
    assert (ran.returncode, "no such path" in ran.stderr) == (3, True)


@pytest.mark.parametrize("stub", ["types.ModuleType('qemu')", "unittest.mock.MagicMock()"])
def test_a_stub_of_that_name_does_not_hide_ours(stub: str, tmp_path: Path) -> None:
    stubbed = f"import sys, types, unittest.mock; sys.modules['qemu'] = {stub}; import qmpvcpu; qmpvcpu.attach"
    assert run(tmp_path, "-c", stubbed).stderr == ""


def test_a_folder_of_tests_of_that_name_is_collected_and_its_tests_attach(tmp_path: Path) -> None:
    make(tmp_path / "tests/qemu/__init__.py")
    make(
        tmp_path / "tests/qemu/test_it.py",
        "import qmpvcpu\ndef test_it(qemu_vm):\n    pass\ndef test_that():\n    assert qmpvcpu.attach\n",
    )
    plugin = ("-p", "qmpvcpu.testing.pytest_plugin") if "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in os.environ else ()
    ran = run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, str(tmp_path / "tests"))
    assert "2 passed" in ran.stdout


@pytest.mark.parametrize("hiding", ["qemu/qmp.py", "qemu/qmp/__init__.py"])
@pytest.mark.parametrize("around", [True, False], ids=["package", "namespace"])
def test_the_error_names_the_file_that_hides_it(hiding: str, around: bool, tmp_path: Path) -> None:
    culprit = make(tmp_path / hiding)
    if around:
        make(tmp_path / "qemu/__init__.py")
    ran = run(tmp_path, "-c", "import qmpvcpu; qmpvcpu.attach")
    what = "hides the library qemu.qmp, which qmpvcpu needs: rename it, or remove its directory from sys.path"
    said = f"{culprit} {what} (PYTHONPATH)"
    assert ran.stderr.splitlines()[-1] == f"ImportError: {said}"
    ran = run(tmp_path, "-m", "qmpvcpu", "list", "--qmp", "/run/vm.qmp")
    assert (ran.returncode, ran.stderr) == (2, f"qmpvcpu: {said}\n")


def test_one_that_cannot_even_be_imported_is_named(tmp_path: Path) -> None:
    culprit = make(tmp_path / "qemu/qmp.py", "print 'of Python 2'\n")
    make(tmp_path / "qemu/__init__.py")
    ran = run(tmp_path, "-m", "qmpvcpu", "list", "--qmp", "/run/vm.qmp")
    assert (ran.returncode, ran.stderr.startswith(f"qmpvcpu: {culprit} hides the library qemu.qmp")) == (2, True)


def test_a_library_that_is_too_old_is_named(tmp_path: Path) -> None:
    """The source tree of QEMU 7 has all its modules, and a ``connect`` that takes no socket."""
    import qemu.qmp

    (tmp_path / "qemu/qmp").mkdir(parents=True)
    for source in Path(qemu.qmp.__file__).parent.glob("*.py"):
        text = source.read_text().replace("Union[SocketAddrT, socket.socket]", "SocketAddrT")
        (tmp_path / "qemu/qmp" / source.name).write_text(text)
    ran = run(tmp_path, "-m", "qmpvcpu", "list", "--qmp", "/run/vm.qmp")
    culprit = tmp_path / "qemu/qmp/__init__.py"
    what = "is older than qemu.qmp 0.0.3, which qmpvcpu needs: pip install -U qemu.qmp, or rename it, or remove its"
    said = f"qmpvcpu: {culprit} {what} directory from sys.path (PYTHONPATH)\n"
    assert (ran.returncode, ran.stderr) == (2, said)


def test_a_library_that_is_not_there_is_said_to_be_missing() -> None:
    program = "import sys; sys.path = [each for each in sys.path if 'site-packages' not in each]; import qmpvcpu.qmp"
    ran = run(ROOT, "-S", "-c", program)
    assert ran.stderr.splitlines()[-1] == "ImportError: qemu.qmp is not installed: pip install qemu.qmp"
