import asyncio
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu import Layout, Slot
from qmpvcpu.cli.completion import words
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.testing import MicroGuest
from tests.cli.running import environment, program_on_terminal, run
from tests.hostile import slots, small_vm

pytestmark = pytest.mark.qemu

# What bash does when Tab is pressed after these words.
_TAB = (
    'COMPREPLY=(); COMP_WORDS=({words} "{begun}"); COMP_CWORD={place}; '
    '_qmpvcpu_completion qmpvcpu; echo "${{COMPREPLY[*]}}"'
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory with the program in its bin/, and an empty directory to work in."""
    for folder in ("bin", "here"):
        (tmp_path / folder).mkdir()
    program = tmp_path / "bin/qmpvcpu"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qmpvcpu "$@"\n')
    program.chmod(0o755)
    return tmp_path


def at_home(home: Path, **changes: str) -> dict[str, str]:
    path = f"{home}/bin:/usr/bin:/bin"
    return environment(PATH=path, HOME=str(home), **changes)


async def said_by(home: Path, *argv: str, **changes: str) -> str:
    """What a shell prints that runs and ends."""
    shell = await asyncio.create_subprocess_exec(
        *argv, cwd=home / "here", env=at_home(home, **changes), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(shell.communicate(), 50)
    return said.decode()


async def test_bash_completes_commands_options_and_their_values(home: Path) -> None:
    asked = [("qmpvcpu", "unp", 1), ("qmpvcpu set --on-failure", "", 3), ("qmpvcpu fleet", "c", 2)]
    tabs = [_TAB.format(words=words, begun=begun, place=place) for words, begun, place in asked]
    said = await said_by(home, "bash", "--norc", "-c", "\n".join(['eval "$(qmpvcpu --show-completion bash)"', *tabs]))
    assert [line.split() for line in said.splitlines()] == [["unplug"], ["stop", "continue", "revert"], ["count"]]


@pytest.mark.parametrize(
    ("shell", "words"), [("zsh", "#compdef qmpvcpu"), ("fish", "complete --no-files --command qmpvcpu")]
)
async def test_other_shells_get_a_script_of_their_own(shell: str, words: str) -> None:
    ran = await run("--show-completion", shell)
    assert ran.code == 0
    assert words in ran.out


async def in_bash(home: Path, address: str) -> str:
    """What bash offers after ``qmpvcpu plug``."""
    tab = _TAB.format(words="qmpvcpu plug", begun="", place=2)
    script = f'eval "$(qmpvcpu --show-completion bash)"\n{tab}'
    return await said_by(home, "bash", "--norc", "-c", script, QMPVCPU_QMP=address)


async def in_fish(home: Path, address: str) -> str:
    """What fish offers after ``qmpvcpu plug``."""
    script = "qmpvcpu --show-completion fish | source; complete --do-complete 'qmpvcpu plug '"
    return await said_by(home, "fish", "--no-config", "-c", script, QMPVCPU_QMP=address)


async def in_zsh(home: Path, address: str) -> str:
    """What zsh shows when Tab is pressed after ``qmpvcpu plug``: only its line editor completes."""
    ready = "autoload -U compinit; compinit -u; eval \"$(qmpvcpu --show-completion zsh)\"; PS1='rea''dy> '\n"
    env = at_home(home, QMPVCPU_QMP=address)
    async with program_on_terminal("zsh", "-f", "-i", env=env, cwd=home / "here") as zsh:
        zsh.type(ready)
        await zsh.wait_shown("ready> ")
        zsh.type("qmpvcpu plug \t\x15echo 'ov''er'\n")  # what follows Tab is read when all is offered
        await zsh.wait_shown("over")
        return zsh.shown


SHELLS = pytest.mark.parametrize("tab", [in_bash, in_zsh, in_fish])
Tab = Callable[[Path, str], Coroutine[Any, Any, str]]


@SHELLS
async def test_each_shell_offers_the_ids_that_are_free(home: Path, tab: Tab) -> None:
    async with small_vm() as peer:
        said = await tab(home, peer.address)
    assert {"2", "3"} <= set(said.split())
    assert "core 3" in said or tab is in_bash  # which shows no descriptions


# Each as a value, and as a property's name. zsh evaluates twice, so that a backslash too many is one too few.
_COMMANDS = [
    "$(touch harm)",
    "\\$(touch harm)",
    "\\\\$(touch harm)",
    "`touch harm`",
    "\\`touch harm`",
    "';touch harm;'",
]
_COMMANDS += ['"; touch harm; "', "(touch harm)", "\n touch harm\n", "))'; touch harm; ((", "[red]$(touch harm)", "*"]


@pytest.mark.parametrize("commands", [_COMMANDS[1:2], _COMMANDS], ids=["one", "all"])
@SHELLS
async def test_no_shell_runs_what_qemu_calls_a_place(home: Path, tab: Tab, commands: list[str]) -> None:
    props = {f"{number}-id": each for number, each in enumerate(commands)} | dict.fromkeys(commands, 1)
    async with small_vm(query_hotpluggable_cpus=slots(props)) as peer:
        said = await tab(home, peer.address)
    assert "harm" not in said
    assert list((home / "here").iterdir()) == []


@pytest.mark.parametrize("value", ["$(id)", "1", True, 1.5, None, [1], {"a": 1}])
def test_what_is_offered_has_only_numbers_and_small_letters(value: object) -> None:
    props: Any = {"core-id": 3, "socket-id": value, "$(id)": 1, "Core-id": 1, "core-id\n": 1, "": 1}
    slot = Slot(first=0, count=1, type="$(id)", props=props, cpu_index=0)
    vm = VmInfo(name="$(id)", arch="x86_64", machine="pc", accelerator="kvm", qemu_version=(10, 0, 2))
    assert list(words(Layout(vm=vm, slots=(slot,)), lambda _: True)) == [("0", "core 3")]


async def offered(words: str, address: Path) -> list[str]:
    """What fish is told after *words*, the VM being named as most name it."""
    asked = environment(
        QMPVCPU_QMP=str(address),
        _QMPVCPU_COMPLETE="fish_complete",
        COMP_WORDS=words,
        COMP_CWORD="",
    )
    ran = await run(env=asked)
    assert ran.err == ""
    return [line.removeprefix("plain,") for line in ran.out.splitlines() if line]


@pytest.mark.parametrize(
    ("shell", "file", "startup"),
    [
        ("bash", ".bash_completions/qmpvcpu.sh", ".bashrc"),
        ("zsh", ".zfunc/_qmpvcpu", ".zshrc"),
        ("fish", ".config/fish/completions/qmpvcpu.fish", ""),
    ],
)
async def test_it_is_set_up_once_however_often_it_is_asked_for(
    home: Path, shell: str, file: str, startup: str
) -> None:
    if startup:
        (home / startup).write_text("alias q=qmpvcpu")  # without a line break at its end
    for _ in range(2):
        assert (await run("--install-completion", shell, env=at_home(home))).code == 0
    assert (home / file).read_text() == (await run("--show-completion", shell, env=at_home(home))).out
    if startup:
        first, *lines = (home / startup).read_text().splitlines()
        assert first == "alias q=qmpvcpu"
        assert len(lines) == len(set(lines)) > 0


async def test_what_is_set_up_for_bash_completes(home: Path) -> None:
    assert (await run("--install-completion", "bash", env=at_home(home))).code == 0
    tab = _TAB.format(words="qmpvcpu", begun="unp", place=1)
    said = await said_by(home, "bash", "--norc", "-c", f"source ~/.bashrc\n{tab}")
    assert said == "unplug\n"


async def test_a_shell_that_is_not_known_and_a_home_that_is_none_are_told(tmp_path: Path) -> None:
    ran = await run("--install-completion", "csh", "--json")
    assert (ran.code, ran.error["message"]) == (2, "which shell? Name one of bash, zsh, fish")
    (tmp_path / "home").touch()
    ran = await run("--install-completion", "bash", "--json", env=environment(HOME=str(tmp_path / "home")))
    assert (ran.code, "completion cannot be set up" in ran.error["message"]) == (2, True)


async def test_vcpu_ids_are_those_of_the_vm_with_their_places(guest: MicroGuest) -> None:
    assert await offered("qmpvcpu unplug ", guest.qmp) == ["1\tcore 0 thread 1 socket 0"]
    free = await offered("qmpvcpu plug ", guest.qmp)
    assert [line.split("\t")[0] for line in free] == ["2", "3", "4", "5", "6", "7"]
    plugged = await offered("qmpvcpu guest offline ", guest.qmp)
    assert [line.split("\t")[0] for line in plugged] == ["0", "1"]
    with socket.socket(socket.AF_UNIX) as holder:  # then nothing is offered, and nobody waits long
        holder.connect(str(guest.qmp))
        assert await offered("qmpvcpu plug ", guest.qmp) == []
