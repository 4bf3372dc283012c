"""The wheel alone in an empty virtual environment: what works there, and what says what it lacks."""

import subprocess
from pathlib import Path

import pytest

from tests.packaging.conftest import Environment

DEMO = ["plug 3", "plug 6", "plug 5", "plug", "unplug 6", "unplug 5", "unplug 5", "unplug 1", "(event)"]
VERDICTS = ["PLUGGED"] * 4 + ["UNPLUGGED", "REFUSED", "UNPLUGGED", "PENDING", "UNPLUGGED"]


@pytest.mark.qemu
def test_the_demo_works(alone: Environment) -> None:
    ran = alone.run("qmpvcpu", "demo")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("QEMU ")
    told = [line for line in lines if line.startswith(("plug", "unplug", "(event)"))]
    assert [line[:9].strip() for line in told] == DEMO
    assert [verdict in line.split() for verdict, line in zip(VERDICTS, told, strict=True)] == [True] * len(DEMO)
    assert lines[-1] == "</domain>"
    assert ran.stderr.splitlines()[-1] == "All other commands: pip install 'qmpvcpu[cli]'"


@pytest.mark.qemu
def test_the_demo_stops_quietly_where_nobody_reads_on(alone: Environment) -> None:
    demo = subprocess.Popen(
        [alone.path("python"), "-m", "qmpvcpu", "demo"],
        cwd=alone.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert demo.stdout is not None
    assert demo.stderr is not None
    demo.stdout.readline()
    demo.stdout.close()
    assert demo.stderr.read() == b"starting a VM with the micro-guest ...\n"
    demo.stderr.close()
    assert demo.wait() == 0


@pytest.mark.parametrize("words", [["plug", "3"], ["--help"], [], ["demo", "--json"]], ids=" ".join)
def test_every_other_command_says_in_one_line_what_to_install(alone: Environment, words: list[str]) -> None:
    ran = alone.run("qmpvcpu", *words)
    assert ran.returncode == 2
    assert ran.stderr == (
        "qmpvcpu: the command line needs click, which is not installed: pip install 'qmpvcpu[cli]'\n"
    )


def test_it_says_which_version_it_is_as_a_script_and_as_a_module(alone: Environment) -> None:
    assert alone.run("qmpvcpu", "--version").stdout == "qmpvcpu 0.1.0\n"
    assert alone.run("python", "-m", "qmpvcpu", "--version").stdout == "qmpvcpu 0.1.0\n"


def test_nothing_else_was_installed(alone: Environment) -> None:
    listed = alone.run("python", "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check").stdout
    names = {line.partition("==")[0] for line in listed.splitlines()} - {"pip", "setuptools"}
    assert names == {"qmpvcpu", "qemu.qmp", "aiofiles", "lxml"}


def test_each_public_module_can_be_imported(alone: Environment) -> None:
    modules = "qmpvcpu, qmpvcpu.bus, qmpvcpu.domainxml, qmpvcpu.fleet, qmpvcpu.launch, qmpvcpu.testing.nats"
    ran = alone.run("python", "-c", f"import {modules}; print(qmpvcpu.__file__)")
    assert ran.stderr == ""
    assert Path(ran.stdout.strip()).is_relative_to(alone.directory)
