"""docs/testing.md does what it shows, block after block, and its tables have all there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qmpvcpu.testing.plugin.options import ENVIRONMENT, KNOWN
from tests.docs.blocks import ROOT, block
from tests.plugin.page import is_as_shown
from tests.plugin.sessions import environment, run

RECIPES = ROOT / "docs" / "examples" / "ci"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the page's first test."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "pytest.ini").write_text(block("docs/testing.md", "pytest.ini").text)
    (directory / "test_vcpus.py").write_text(block("docs/testing.md", "test_vcpus.py").text)
    return directory


def shown(directory: Path, console: str) -> tuple[str, str]:
    """What a block shows of its command's output, and what that prints."""
    command, _, output = console.partition("\n")
    done = subprocess.run(
        ["sh", "-c", command.removeprefix("$ ")],
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return output, done.stdout


@pytest.mark.qemu
def test_the_first_test_passes_as_shown(first: Path) -> None:
    output, printed = shown(first, block("docs/testing.md", "it passes").text)
    assert is_as_shown(output, printed), printed


@pytest.mark.qemu
def test_a_failing_test_reports_as_shown(first: Path) -> None:
    (first / "test_scale_down.py").write_text(block("docs/testing.md", "test_scale_down.py").text)
    output, printed = shown(first, block("docs/testing.md", "it fails, and the report tells why").text)
    assert is_as_shown(output, printed), printed
    assert list((first / "qemu-logs").iterdir())


@pytest.mark.qemu
def test_the_other_tests_of_the_page_pass(first: Path) -> None:
    (first / "test_tool.py").write_text(block("docs/testing.md", "test_tool.py").text)
    (first / "test_markers.py").write_text(block("docs/testing.md", "test_markers.py").text)
    session = run(first, "test_tool.py", "test_markers.py")
    assert session.outcomes == {"passed": 5}, session.output


@pytest.mark.guest
def test_a_linux_is_shared_by_plain_and_other_tests(first: Path) -> None:
    (first / "test_sharing.py").write_text(block("docs/testing.md", "test_sharing.py").text)
    session = run(first, "test_sharing.py")
    assert session.outcomes == {"passed": 3}, session.output


@pytest.mark.guest
def test_the_agents_of_the_page_do_what_it_says(first: Path) -> None:
    (first / "test_agents.py").write_text(block("docs/testing.md", "test_agents.py").text)
    session = run(first, "test_agents.py")
    assert session.outcomes == {"passed": 3}, session.output


def test_every_block_of_the_page_is_run_by_a_test() -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    named = set(re.findall(r"^<!-- run by tests/plugin: (.*) -->$", page, re.MULTILINE))
    asked = set(re.findall(r'block\("docs/testing\.md", "(.*?)"\)', Path(__file__).read_text()))
    assert named == asked
    assert len(re.findall("^```", page, re.MULTILINE)) == 2 * len(re.findall("^<!-- run by ", page, re.MULTILINE))


def test_every_option_is_on_the_page() -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    options = {option for taken in ("qemu_vm", "linux_vm") for option in KNOWN[taken]}
    assert [marker for marker in KNOWN if f"`@pytest.mark.{marker}(" not in page and marker != "linux_vm"] == []
    assert [option for option in sorted(options) if f"`{option}`" not in page] == []
    flags = [f"`--{name.replace('_', '-')}=" for name in ENVIRONMENT] + [f"`{name}`" for name in ENVIRONMENT.values()]
    assert [flag for flag in flags if flag not in page] == []


def steps(recipe: str) -> list[str]:
    """The commands of a workflow, in order."""
    document = yaml.safe_load((RECIPES / recipe).read_text())
    if "jobs" in document:
        return [step["run"] for step in document["jobs"]["vcpus"]["steps"] if "run" in step]
    return list(document["vcpus"]["script"])


def test_the_page_and_the_recipes_say_the_same() -> None:
    wanted = block("docs/testing.md", "what a CI does").text.splitlines()
    for recipe in ("workflow.yml", "gitlab-ci.yml"):
        said = "\n".join(steps(recipe)).replace("sudo ", "").splitlines()
        assert [line for line in said if line in wanted] == wanted
    first = block("docs/testing.md", "what has to be installed").text.splitlines()
    assert all(any(word in line for line in wanted) for word in ("qemu-system-x86", "'qmpvcpu[pytest]'"))
    assert ["qemu-system-x86" in first[0], "'qmpvcpu[pytest]'" in first[1]] == [True, True]


@pytest.mark.qemu
def test_the_steps_of_the_recipes_work(tmp_path: Path) -> None:
    """Every `run:` of both, in a fresh virtual environment, with what this machine cannot do replaced.

    The package comes from this tree instead of from an index, and is there already for the second. apt-get is only
    simulated, so that the names of the packages are checked and the machine is left as it is; chmod of the machine's
    /dev/kvm is left out likewise.
    """
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    replaced = {
        "sudo": 'exec "$@"',
        "chmod": 'test "$*" = "0666 /dev/kvm"',
        "apt-get": 'test "$1" = update || exec /usr/bin/apt-get --simulate "$@"',
    }
    for name, script in replaced.items():
        (venv / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (venv / "bin" / name).chmod(0o755)
    env = environment() | {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for recipe, package in (("workflow.yml", f"{ROOT}["), ("gitlab-ci.yml", "qmpvcpu[")):  # the second finds it there
        project = tmp_path / recipe
        project.mkdir()
        for name in ("pytest.ini", "test_vcpus.py"):
            (project / name).write_text(block("docs/testing.md", name).text)
        for step in steps(recipe):
            command = step.replace("qmpvcpu[", package)
            done = subprocess.run(
                ["bash", "-e", "-c", command], cwd=project, env=env, text=True, capture_output=True, check=False
            )
            assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"
        assert (
            '<testsuite name="pytest" errors="0" failures="0" skipped="0" tests="1"'
            in (project / "junit.xml").read_text()
        )
    # Whoever installs the package can make the Linux guest: here it is found to be made of the same already.
    (build,) = venv.glob("lib/python*/site-packages/qmpvcpu/testing/linux/build.sh")
    assert build.read_bytes() == (ROOT / "fixtures" / "linux" / "build.sh").read_bytes()
    make = block("docs/testing.md", "making the Linux guest").text
    done = subprocess.run(["bash", "-e", "-c", make], env=env, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
