"""Real pytest sessions, each in its own process and directory, in which the plugin is loaded as users load it."""

import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

AUTO = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
STRICT = AUTO.replace("auto", "strict", 1)


@dataclass(frozen=True)
class Session:
    """What a session came to."""

    returncode: int
    output: str

    @property
    def outcomes(self) -> Counter[str]:
        """How many tests passed, failed, had an error, were skipped."""
        (last,) = re.findall(r"^=* ?(\d+ (?:passed|failed|error|skipped).*) in [\d.]+s", self.output, re.MULTILINE)
        counts = re.findall(r"(\d+) (passed|failed|error|skipped)", last)
        return Counter({outcome: int(count) for count, outcome in counts})

    def report(self, test: str) -> str:
        """The report of one failed test."""
        title = rf"^_+ (?:ERROR at \w+ of )?{re.escape(test)} _+$"
        found = re.search(title + r"(.*?)^[_=]{3,} \w", self.output, re.MULTILINE | re.DOTALL)
        assert found, f"no report of {test} in\n{self.output}"
        return found[1]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with our programs and without what chooses QEMUs, changed."""
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("QMPVCPU_", "PYTEST_"))}
    if "QMPVCPU_CACHE" in os.environ:
        cleared["QMPVCPU_CACHE"] = os.environ["QMPVCPU_CACHE"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return cleared | {"PATH": path, "COLUMNS": "80", "PY_COLORS": "0"} | changes


def write(directory: Path, ini: str = AUTO, **modules: str) -> None:
    """Write the ini file and modules, by name."""
    (directory / "pytest.ini").write_text(ini)
    for name, source in modules.items():
        (directory / f"{name}.py").write_text(textwrap.dedent(source))


def command(*args: str) -> list[str]:
    """The command line of a session."""
    unused = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")  # the second is half of the time of a session
    return [sys.executable, "-m", "pytest", *unused, "--strict-markers", *args]


def run(directory: Path, *args: str, env: Mapping[str, str] | None = None) -> Session:
    """Run a session."""
    done = subprocess.run(
        command(*args),
        cwd=directory,
        env=environment() if env is None else env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Session(done.returncode, done.stdout)
