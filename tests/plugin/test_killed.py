"""Sessions that are killed: no QEMU outlives them, and what they leave behind is swept by the next."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmpvcpu.testing.directory import sweep, vm_directory
from tests.plugin.sessions import command, environment, run, write
from tests.waiting import is_gone

HANGING = """
    import os
    import time
    from pathlib import Path

    def wait_for_the_end(qemu_vm, name):
        Path(name + ".new").write_text(f"{os.getpid()} {qemu_vm.pid} {qemu_vm.qmp.parent}")
        Path(name + ".new").rename(name)
        time.sleep(60)

    def test_one(qemu_vm):
        wait_for_the_end(qemu_vm, "one.pids")

    def test_two(qemu_vm):
        wait_for_the_end(qemu_vm, "two.pids")
"""


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition; the test's timeout bounds it."""
    while not condition():
        time.sleep(0.02)


def own_temporary(directory: Path) -> dict[str, str]:
    """An environment in which nobody else sweeps."""
    (directory / "t").mkdir(exist_ok=True)
    return environment(TMPDIR=str(directory / "t"))


@contextlib.contextmanager
def hanging(directory: Path, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """A session in the middle of its tests."""
    write(directory, test_hanging=HANGING)
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            command(*args), cwd=directory, env=own_temporary(directory), stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def started(directory: Path, *names: str) -> list[tuple[int, int, Path]]:
    """The pytest process, the QEMU and the QEMU's directory of each test, once they are all there."""
    files = [directory / f"{name}.pids" for name in names]
    until(lambda: all(file.exists() for file in files))
    found = [file.read_text().split() for file in files]
    assert not any(is_gone(int(pid)) for _, pid, _ in found)
    return [(int(worker), int(pid), Path(home)) for worker, pid, home in found]


@pytest.mark.qemu
def test_no_qemu_outlives_a_killed_session_and_the_next_one_sweeps(tmp_path: Path) -> None:
    with hanging(tmp_path) as session:
        ((_, qemu, home),) = started(tmp_path, "one")
        session.kill()
        until(lambda: is_gone(qemu))
    assert home.exists()
    write(tmp_path, test_hanging="def test_one(qemu_vm): pass")
    assert run(tmp_path, env=own_temporary(tmp_path)).outcomes == {"passed": 1}
    assert not home.exists()


@pytest.mark.qemu
@pytest.mark.parametrize("whom", ["a worker", "the controller"])
def test_no_qemu_outlives_a_killed_process_of_a_parallel_session(tmp_path: Path, whom: str) -> None:
    with hanging(tmp_path, "-n", "2", "--max-worker-restart=0") as session:
        (worker, qemu, _), (_, other, _) = started(tmp_path, "one", "two")
        if whom == "a worker":
            os.kill(worker, signal.SIGKILL)
            until(lambda: is_gone(qemu))
            assert not is_gone(other)
        session.kill()
        until(lambda: is_gone(qemu) and is_gone(other))


@pytest.mark.qemu
def test_an_interrupted_session_tells_of_the_test_that_hung_and_cleans_up(tmp_path: Path) -> None:
    with hanging(tmp_path, "--junitxml=junit.xml", "--qemu-artifacts=kept") as session:
        ((_, qemu, home),) = started(tmp_path, "one")
        session.send_signal(signal.SIGINT)
        assert session.wait() == pytest.ExitCode.INTERRUPTED
    assert is_gone(qemu)
    assert not home.exists()
    output = (tmp_path / "output").read_text()
    assert "time.sleep(60)" in output
    assert "qemu_vm: QEMU -" in output
    assert "FAILED test_hanging.py::test_one - KeyboardInterrupt" in output
    assert "It runs." in (tmp_path / "junit.xml").read_text()
    (kept,) = (tmp_path / "kept").iterdir()
    assert "R: that it is ready" in (kept / "qemu_vm" / "guest-s-serial-port.txt").read_text()


@pytest.mark.qemu
def test_each_process_of_an_interrupted_session_keeps_what_its_vms_told(tmp_path: Path) -> None:
    with hanging(tmp_path, "-n", "2", "--qemu-artifacts=kept") as session:
        both = started(tmp_path, "one", "two")
        for pid in (session.pid, *(worker for worker, _, _ in both)):  # as a terminal does
            os.kill(pid, signal.SIGINT)
        assert session.wait() == pytest.ExitCode.INTERRUPTED
    until(lambda: all(is_gone(qemu) for _, qemu, _ in both))
    assert len([*(tmp_path / "kept").glob("*/qemu_vm/QEMU.txt")]) == 2


def test_a_directory_in_use_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with vm_directory() as used:
        assert sweep() == []
        assert used.exists()
    assert not used.exists()


def test_what_is_not_ours_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "in-use").touch()
    (tmp_path / "qmpvcpu-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "qmpvcpu-not-yet-locked").mkdir()
    (tmp_path / "qmpvcpu-left").mkdir()
    (tmp_path / "qmpvcpu-left" / "in-use").touch()
    assert sweep() == [tmp_path / "qmpvcpu-left"]
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "qmpvcpu-link", "qmpvcpu-not-yet-locked"}
    monkeypatch.setattr("os.getuid", lambda: os.geteuid() + 1)
    (tmp_path / "qmpvcpu-not-yet-locked" / "in-use").touch()
    assert sweep() == []
