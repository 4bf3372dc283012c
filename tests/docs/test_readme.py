"""What the README shows is run."""

import asyncio
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.docs.blocks import ROOT, block
from tests.docs.session import Session


@pytest.mark.qemu
async def test_the_script_in_the_readme_does_the_job(tmp_path: Path) -> None:
    script = block("README.md", "the job in ten lines").text
    statements = [line for line in script.splitlines() if line.strip()]
    assert len(statements) <= 10
    (tmp_path / "script.py").write_text(script)
    async with MicroGuest() as guest:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "script.py",
            str(guest.qmp),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    assert output.decode().splitlines() == ["plugged: 3 now: 0,3", "unplugged: 3 now: 0"]
    assert process.returncode == 0
    assert b"<vcpu placement='static' current='1'>8</vcpu>" in (tmp_path / "vm.xml").read_bytes()


@pytest.mark.qemu
async def test_every_way_an_unplug_can_end_is_told_by_the_readme() -> None:
    take_out = block("README.md", "every way an unplug can end").module().take_out
    refusing = Behaviour.refusing(0x82).for_slot(2)
    async with MicroGuest(behaviour=refusing) as guest, qmpvcpu.attach(guest.qmp) as vm:
        await vm.plug(2)
        await vm.plug(3)
        assert await take_out(vm, 2) == "refused: device is busy (130)"
        assert re.fullmatch(r"gone after 0\.\d{3} s", await take_out(vm, 3))


async def test_the_commands_in_the_readme_end_well(tmp_path: Path) -> None:
    shown = block("README.md", "the commands")
    assert shown.text.endswith("qmpvcpu watch\nqmpvcpu xml --emulator /usr/bin/qemu-system-x86_64\n")
    ends = replace(shown, text=shown.text.replace("qmpvcpu watch\n", "qmpvcpu watch --for 0.2\n"))
    async with Session(tmp_path) as session:
        printed = await session.run(ends)
    assert "<vcpu placement='static' current='5'>8</vcpu>" in printed


def test_what_installs_packages_is_there_and_run_by_other_tests() -> None:
    (command,) = block("README.md", "from nothing").lines
    script = (ROOT / command.removeprefix("bash ")).read_text()
    # Its two halves: the installation is the first step of tests/run.sh, the demo is run by tests/cli/test_demo.py.
    assert "install.sh" in script
    assert "qmpvcpu" in script


def test_all_tests_are_run_by_the_command_that_the_readme_names() -> None:
    (command,) = block("README.md", "all tests").lines  # which has just run this
    assert command.removeprefix("bash ") in (ROOT / ".ci" / "run").read_text()
