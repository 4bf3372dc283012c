"""What users are given, built once: the sdist, the wheel, and a virtual environment with that wheel and no extra."""

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Built:
    """What was built.

    Attributes:
        sdist: The source distribution.
        wheel: The wheel that was made from it.
        from_tree: The wheel that was made from the working tree.
    """

    sdist: Path
    wheel: Path
    from_tree: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it.

    Attributes:
        directory: Where it is.
    """

    directory: Path

    def path(self, program: str) -> Path:
        """Return the path of one of its programs."""
        return self.directory / "bin" / program

    def run(self, program: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of its programs outside the working tree; return how it ended."""
        return subprocess.run(
            [self.path(program), *words],
            cwd=self.directory,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the whole run: with pytest-xdist all its processes have the same."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "packaging"
    place.mkdir(exist_ok=True)
    return place


@contextlib.contextmanager
def once(directory: Path) -> Iterator[bool]:
    """Tell whether *directory* is yet to be made, which one process does while the others wait."""
    done = directory.with_suffix(".done")
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def built(place: Path) -> Built:
    """Build all of it; without isolation, since the tests have what builds it."""
    dist, tree = place / "dist", place / "tree"
    build: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation", ROOT, "--outdir"]
    with once(dist) as needed:
        if needed:
            subprocess.run([*build, dist], check=True, capture_output=True)
            subprocess.run([*build, tree, "--wheel"], check=True, capture_output=True)
    ((sdist,), (wheel,), (from_tree,)) = dist.glob("*.tar.gz"), dist.glob("*.whl"), tree.glob("*.whl")
    return Built(sdist, wheel, from_tree)


@pytest.fixture(scope="session")
def alone(built: Built, place: Path) -> Environment:
    """A virtual environment with the wheel and what it requires, and nothing else."""
    environment = Environment(place / "alone")
    with once(environment.directory) as needed:
        if needed:
            venv.create(environment.directory, with_pip=True)
            pip: list[str | Path] = [environment.path("python"), "-m", "pip", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "--quiet", built.wheel], check=True, capture_output=True)
    return environment


@pytest.fixture(scope="session")
def with_oldest_qmp(alone: Environment, place: Path) -> Environment:
    """A virtual environment like `alone`, but with the oldest qemu.qmp that the wheel accepts."""
    environment = Environment(place / "with-oldest-qmp")
    with once(environment.directory) as needed:
        if needed:
            venv.create(environment.directory, with_pip=False)
            pip: list[str | Path] = [alone.path("python"), "-m", "pip", "--disable-pip-version-check"]
            (home,) = environment.directory.glob("lib/python*/site-packages")
            oldest = oldest_accepted("qemu.qmp")
            subprocess.run(
                [*pip, "install", "--quiet", "--no-deps", "--target", home, f"qemu.qmp=={oldest}"],
                check=True,
                capture_output=True,
            )
            # All else is that of the other environment; what stands here comes first.
            (others,) = alone.directory.glob("lib/python*/site-packages")
            (home / "others.pth").write_text(f"{others}\n")
    return environment


def oldest_accepted(name: str) -> str:
    """Return the lower bound of a dependency in pyproject.toml."""
    (found,) = [
        re.match(rf"{re.escape(name)}>=([\d.]+)", each)
        for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if each.startswith(name)
    ]
    assert found is not None
    return found[1]
