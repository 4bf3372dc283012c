import asyncio
import socket
import sys
from pathlib import Path

import pytest

from qmpvcpu.testing import MicroGuest
from tests.cli.running import environment, run

pytestmark = pytest.mark.qemu

# What bash does when Tab is pressed after these words.
_TAB = 'COMP_WORDS=({words} "{begun}"); COMP_CWORD={place}; _qmpvcpu_completion qmpvcpu; echo "${{COMPREPLY[*]}}"'


async def test_bash_completes_commands_options_and_their_values(tmp_path: Path) -> None:
    program = tmp_path / "qmpvcpu"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qmpvcpu.cli "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    asked = [("qmpvcpu", "unp", 1), ("qmpvcpu set --on-failure", "", 3), ("qmpvcpu fleet", "c", 2)]
    tabs = [_TAB.format(words=words, begun=begun, place=place) for words, begun, place in asked]
    script = "\n".join(['eval "$(qmpvcpu --show-completion)"', *tabs])
    shell = await asyncio.create_subprocess_exec(
        *("bash", "--norc", "-c", script), env=environment(PATH=path), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(shell.communicate(), 50)
    assert [line.split() for line in said.decode().splitlines()] == [
        ["unplug"],
        ["stop", "continue", "revert"],
        ["count"],
    ]


@pytest.mark.parametrize(("shell", "words"), [("zsh", "#compdef qmpvcpu"), ("fish", "complete --command qmpvcpu")])
async def test_other_shells_get_a_script_of_their_own(shell: str, words: str) -> None:
    named = environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    ran = await run("--show-completion", shell, env=named)
    assert ran.code == 0
    assert words in ran.out


async def offered(words: str, address: Path) -> list[str]:
    """What fish is told after *words*, the VM being named as most name it."""
    asked = environment(
        QMPVCPU_QMP=str(address),
        _QMPVCPU_COMPLETE="complete_fish",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
        _TYPER_COMPLETE_ARGS=words,
    )
    ran = await run(env=asked)
    assert ran.err == ""
    return ran.out.split("\n")[:-1] if ran.out.strip() else []


async def test_vcpu_ids_are_those_of_the_vm_with_their_places(guest: MicroGuest) -> None:
    assert await offered("qmpvcpu unplug ", guest.qmp) == ["1\tcore 0 thread 1 socket 0"]
    free = await offered("qmpvcpu plug ", guest.qmp)
    assert [line.split("\t")[0] for line in free] == ["2", "3", "4", "5", "6", "7"]
    with socket.socket(socket.AF_UNIX) as holder:  # then nothing is offered, and nobody waits long
        holder.connect(str(guest.qmp))
        assert await offered("qmpvcpu plug ", guest.qmp) == []
