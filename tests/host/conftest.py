"""Threads to be found and moved, cgroups, and other users and namespaces to look from."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmpvcpu.host.threads import HostThread, find
from qmpvcpu.model.vcpumap import VcpuMap

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
ONLY_ROOT = "only root may do this"
NO_V1 = "no cgroup v1 here"


class Sleeper:
    """A thread of this process that sleeps until it is told to end."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._end.wait)
        self._thread.start()
        assert self._thread.native_id is not None
        self.tid = self._thread.native_id

    @property
    def found(self) -> HostThread:
        return find(os.getpid(), [self.tid])[self.tid]

    def end(self) -> None:
        self._end.set()
        self._thread.join()
        while Path(f"/proc/self/task/{self.tid}").exists():
            pass


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    made = Sleeper()
    yield made
    made.end()


@pytest.fixture
def thread(sleeper: Sleeper) -> HostThread:
    return sleeper.found


@pytest.fixture
def everywhere() -> VcpuMap:
    """The host CPUs that this process may run on."""
    return VcpuMap(os.sched_getaffinity(0))


@pytest.fixture
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip(ONLY_ROOT)


MakeCgroup = Callable[[str], Path]


@pytest.fixture
def nobodys(root: None) -> Iterator[int]:  # noqa: ARG001 - a condition
    """A process of another user than root."""
    with subprocess.Popen([*NOBODY, "sleep", "60"]) as process:
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            pass
        yield process.pid
        process.kill()


@pytest.fixture
def make_cgroup(root: None) -> Iterator[MakeCgroup]:  # noqa: ARG001 - a condition
    """Makes a cgroup of version 1 below ours, for the controller that it is told; they go with the test."""
    made: list[Path] = []

    def make(controller: str) -> Path:
        own = [line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
        names = [line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines()]
        parent = Path(f"/sys/fs/cgroup/{controller}")
        if controller not in names or not parent.is_dir():
            pytest.skip(NO_V1)
        below = parent / own[names.index(controller)].lstrip("/")
        cgroup = below / f"qmpvcpu-{os.getpid()}"
        cgroup.mkdir()
        made.append(cgroup)
        if controller == "cpuset":
            for name in ("cpuset.mems", "cpuset.cpus"):
                (cgroup / name).write_text((below / name).read_text())
        return cgroup

    yield make
    for cgroup in made:
        for tid in (cgroup / "tasks").read_text().split():
            with contextlib.suppress(OSError):
                (cgroup.parent / "tasks").write_text(tid)
        cgroup.rmdir()


def run(code: str, *arguments: object, before: tuple[str, ...] = (), cwd: Path = Path("/")) -> str:
    """Return what a program of its own prints, which *before* starts: as another user, in another namespace."""
    command = [*before, sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
