"""What holds of every command there is, whatever it does: bad words, no VM, and output that nobody takes."""

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from qmpvcpu import Layout, Slot
from qmpvcpu.cli import main
from qmpvcpu.cli.app import program
from qmpvcpu.model.exported import ExportedState
from qmpvcpu.model.layout import CpuProps
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.testing import MicroGuest, ScriptedAgent
from qmpvcpu.testing.nats import free_ports
from tests.cli.running import environment, on_terminal, run

pytestmark = pytest.mark.qemu

# A line for each command with what it needs besides a VM; those that change it leave it as it is.
ON_A_VM = [
    "list",
    "plug 3",
    "unplug 3",
    "set 0-1",
    "count 2",
    "plan 0-2",
    "pin 1=0",
    "sched 1=other",
    "recover --record {record}",
    "xml",
    "watch --for 0",
    "stats --interval 0.05 --count 1",
    "doctor",
    "certify --disturb --fresh --no-reset --timeout 1",
    "export",
    "check-target {state}",
    "confirm-target --timeout 0 {state}",
    "take-back --destination-is-gone",
    "replay {state}",
    "guest list --agent {agent}",
    "guest online 0 --agent {agent}",
    "guest offline 1 --agent {agent}",
    "fleet list",
    "fleet plan 0-1",
    "fleet set 0-1",
    "fleet count 2",
]
WITHOUT = ["demo", "args {xml}", "config {xml}", "exporter --for 0 --listen 127.0.0.1:0 --dir ."]
# This takes longer than all others together; tests/hosts/test_demo.py runs it.
WITH_HOSTS = ["hosts demo"]
# These have a server instead of a VM.
OVER_NATS = [
    "agent --dir . --record .",
    "hosts init",
    "hosts list",
    "campaign list",
    "campaign show 1",
    "campaign pause 1",
    "campaign resume 1",
    "campaign stop 1",
    "campaign forget 1",
    "campaign run",
]
# These have either.
OF_MANY = ["fleet list", "fleet plan 0-1", "fleet set 0-1", "fleet count 2", "watch --for 0", "stats --count 1"]
# These tell of a VM that runs what is wrong with that, which is no answer but an error.
OF_A_MIGRATION = ("check-target", "confirm-target", "take-back", "replay")
# This tells of the micro-guest that it starts no vCPU.
OF_THE_GUEST = ("certify",)
# What a command that plugs does without.
OTHERS = (
    "lxml",
    "aiofiles",
    "qmpvcpu.testing",
    "qmpvcpu.cli.demo",
    "qmpvcpu.cli.doctor",
    "qmpvcpu.cli.watch",
    "qmpvcpu.cli.stats",
)
# Each of many commands that one process runs, with its standard output as a test wants it.
PROGRAM = """
import contextlib, io, json, os, sys
from pathlib import Path
from qmpvcpu.cli import main

lines, outputs, results = json.loads(sys.argv[1]), sys.argv[2], []
for words in lines:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if outputs == "full":
        fd = os.open("/dev/full", os.O_WRONLY)
    elif outputs == "closed pipe":
        ours, fd = os.pipe()
        os.close(ours)
    else:
        fd = os.open(os.devnull, os.O_RDONLY if outputs == "closed" else os.O_WRONLY)
    os.dup2(fd, 1)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(open("said", "wb"), write_through=True)
    code = main(words)
    results.append([code, Path("said").read_text()])
Path("results").write_text(json.dumps(results))
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """An export of some VM."""
    vm = VmInfo("vm", "x86_64", "pc-q35-10.0", "tcg", (10, 0, 2))
    boot = Slot(0, 1, "qemu64-x86_64-cpu", CpuProps({"core-id": 0}), 0, "/machine/unattached/device[0]", (1,))
    path = tmp_path / "vm.json"
    path.write_text(json.dumps(ExportedState(Layout(vm, (boot,), (0,))).to_json()))
    return path


def within(command: click.Command) -> dict[str, click.Command]:
    """The commands of a group, by name; of no group none."""
    if not isinstance(command, click.Group):
        return {}
    context = click.Context(command)
    found = {name: command.get_command(context, name) for name in command.list_commands(context)}
    return {name: each for name, each in found.items() if each is not None}


GROUPS = [name for name, command in within(program()).items() if isinstance(command, click.Group)]


def words_of(line: str) -> int:
    """How many words of *line* name its command."""
    return 2 if line.split(maxsplit=1)[0] in GROUPS else 1


def commands() -> set[str]:
    """Every command there is, by its words."""
    return {
        f"{name} {inner}" if inner else name
        for name, command in within(program()).items()
        for inner in [*within(command)] or [""]
    }


def lines_with(directory: Path, *address: str | Path) -> list[list[str]]:
    """The line of each command, on the VM at *address*."""
    files = {
        "record": directory / "record.xml",
        "xml": directory / "vm.xml",
        "state": directory / "vm.json",
        "agent": directory / "agent",
    }
    on_vm = [[*line.format(**files).split(), *map(str, address)] for line in ON_A_VM]
    return on_vm + [line.format(**files).split() for line in WITHOUT]


def test_there_is_a_line_for_every_command() -> None:
    lines = [" ".join(line.split()[: words_of(line)]) for line in ON_A_VM + WITHOUT + WITH_HOSTS + OVER_NATS]
    assert set(lines) == commands()


async def test_a_command_loads_nothing_of_what_only_others_need(guest: MicroGuest) -> None:
    refusing = "\n".join(f"sys.modules[{name!r}] = None" for name in OTHERS)
    ran = await run("set", "0-2", "--qmp", guest.qmp, "--json", code=refusing)
    assert ran.document["enabled"] == "0-2"


@pytest.mark.parametrize("line", ON_A_VM + WITHOUT + WITH_HOSTS + OVER_NATS)
def test_wrong_words_are_told_with_where_help_is(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QMPVCPU_QMP", raising=False)
    words = line.format(record="r", xml="x", state="s", agent="a").split()
    for wrong, told in ((["--frobnicate"], "No such option"), (["a", "b", "c", "d"], "")):
        assert main([*words, *wrong]) == 2
        said = capsys.readouterr()
        assert told in said.err
        assert said.err.startswith("qmpvcpu: ")
        assert said.out == ""


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("line", sorted({*commands(), "", *GROUPS}))
def test_help_fits_the_terminal(
    line: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*line.split(), "--help"]) == 0
    help_ = capsys.readouterr().out
    assert " ".join(help_.split()).count("Exit codes: 0") == 1
    assert max(map(len, help_.splitlines())) <= columns


@pytest.mark.parametrize("line", [each for each in ON_A_VM if each != "doctor"])
def test_no_vm_and_a_dead_one_are_told_with_what_to_do(
    line: str, state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QMPVCPU_QMP", raising=False)
    tmp_path = state.parent
    record = tmp_path / "record.xml"
    record.touch()  # it is not looked into before there is a VM
    words = line.format(record=record, state=state, agent=tmp_path / "agent").split()
    assert main(words) == 2
    assert "which VM" in capsys.readouterr().err
    dead = tmp_path / "dead.qmp"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(dead))
    for address, why in ((dead, "nobody listens"), (tmp_path / "none.qmp", "is QEMU running, with -qmp")):
        assert main([*words, "--qmp", str(address)]) == 3
        said = capsys.readouterr()
        assert why in said.out + said.err
        assert main(["--json", *words, "--qmp", str(address)]) == 3
        document = json.loads(capsys.readouterr().out)
        error = document["vms"][0]["error"] if line.startswith("fleet") else document["error"]
        assert error["kind"] == "MonitorConnectError"


@pytest.mark.parametrize("line", [*OVER_NATS, *OF_MANY])
def test_no_server_and_a_dead_one_are_told_with_what_to_do(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QMPVCPU_QMP", raising=False)
    monkeypatch.delenv("QMPVCPU_NATS", raising=False)
    monkeypatch.chdir(tmp_path)
    words = line.split()
    if line in OVER_NATS:
        assert main(words) == 2
        assert "which server" in capsys.readouterr().err
    (port,) = free_ports(1)
    for url, code, why in (
        (f"nats://127.0.0.1:{port}", 3, "start the server"),
        (f"127.0.0.1:{port}", 3, "start the server"),
        ("nats://me:secret@127.0.0.1", 2, "a user or password in it"),
        ("ftp://127.0.0.1", 2, "--nats"),
    ):
        assert main([*words, "--nats", url]) == code
        said = capsys.readouterr().err
        assert why in said
        assert "secret" not in said
        assert main([*words, "--nats", url, "--json"]) == code
        assert json.loads(capsys.readouterr().out)["error"]["message"] in said


async def results_of(lines: Sequence[Sequence[str]], outputs: str, directory: Path, *before: str) -> list[Any]:
    """Code and standard error of each line, all run in one process."""
    process = await asyncio.create_subprocess_exec(
        *before, sys.executable, "-c", PROGRAM, json.dumps(lines), outputs, cwd=directory, env=environment()
    )
    assert await process.wait() == 0
    results: list[Any] = json.loads((directory / "results").read_text())
    assert [said for _, said in results if "Traceback" in said or "Exception" in said] == []
    return results


async def test_a_socket_that_may_not_be_used_is_told_with_what_it_takes(state: Path) -> None:
    tmp_path = state.parent
    path = tmp_path / "vm.qmp"
    (tmp_path / "record.xml").touch()
    lines = [line for line in lines_with(tmp_path, "--qmp", path) if "--qmp" in line]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        # root may use any socket, unless it gives that up.
        caps = "-dac_override,-dac_read_search"
        before = ("setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}") if os.geteuid() == 0 else ()
        assert not before or shutil.which("setpriv")
        results = await results_of(lines, "shown", tmp_path, *before)
    assert {code for code, _ in results} == {3}
    told = [said for line, (_, said) in zip(lines, results, strict=True) if line[0] != "doctor"]
    assert [said for said in told if "it takes write permission on the socket" not in said] == []


@pytest.mark.parametrize("outputs", ["full", "closed", "closed pipe"])
async def test_output_that_nobody_takes_is_told_and_the_command_is_done(
    outputs: str, guest: MicroGuest, tmp_path: Path
) -> None:
    record = tmp_path / "record.xml"
    assert (await run("xml", "-o", tmp_path / "vm.xml", "--qmp", guest.qmp)).code == 0
    assert (await run("set", "0-1", "--record", record, "--qmp", guest.qmp)).code == 0
    without = (*OF_A_MIGRATION, *OF_THE_GUEST)
    lines = [line for line in lines_with(tmp_path, "--qmp", guest.qmp) if line[0] not in without]
    lines += [["--help"], ["--show-completion", "bash"]]
    lines += [[*line, "--json"] for line in lines if line[0] in ("list", "xml", "watch", "stats", "plan")]
    async with ScriptedAgent(vcpus=(0, 1), path=tmp_path / "agent") as agent:
        agent.cpus[1].online = False
        results = await results_of(lines, outputs, tmp_path)
    reader_left = outputs == "closed pipe"
    assert [code for code, _ in results] == [0 if reader_left else 1] * len(lines)
    told = [said for _, said in results if "cannot print the answer" in said]
    assert len(told) == (0 if reader_left else len(lines))
    assert (await run("list", "--json", "--qmp", guest.qmp)).document["enabled"] == "0-1"


@pytest.mark.parametrize(
    "line", ["doctor", "unplug 1", "count 3", "xml", "demo", "fleet list", "recover --record {record}"]
)
async def test_a_terminal_of_40_columns_shows_all_of_it(line: str, guest: MicroGuest, tmp_path: Path) -> None:
    record = tmp_path / "record.xml"
    assert "{record}" not in line or (await run("set", "0-1", "--record", record, "--qmp", guest.qmp)).code == 0
    words = line.format(record=record).split()
    address = () if line == "demo" else ("--qmp", guest.qmp)
    async with on_terminal(*words, *address, columns=40, lines=200) as it:
        assert await it.end() == 0
    assert "…" not in str(it.screen)
    assert len(it.screen.lines) > 1


def examples(command: click.Command) -> Iterator[list[str]]:
    """Return the words of each example in a command's help."""
    for line in (command.help or "").splitlines():
        if line.startswith("  qmpvcpu ") and "--version" not in line:
            said = re.split(r" {2,}", line.strip())[0].rstrip(",")
            yield shlex.split(said.partition(" | ")[0])[1:]
        elif " | qmpvcpu " in line:
            yield shlex.split(line.partition(" | ")[2])[1:]


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))


def test_every_example_in_the_help_is_understood() -> None:
    commands = dict(every_command(program()))
    tried = [words for command in (program(), *commands.values()) for words in examples(command)]
    for words in tried:
        path = tuple(words[: words_of(words[0])])
        commands[path].make_context(" ".join(path), words[len(path) :])
    assert len(tried) > 40


def test_the_help_says_what_an_option_does_in_that_command() -> None:
    commands = dict(every_command(program()))

    def help_of(name: str, option: str) -> str:
        (found,) = (each for each in commands[tuple(name.split())].params if option in each.opts)
        assert isinstance(found, click.Option)
        return found.help or ""

    for name in ("list", "plan", "xml", "watch", "stats", "export", "check-target"):
        assert "not written" in help_of(name, "--record")
    assert "Keep" in help_of("set", "--record")
    assert "to arrive" in help_of("confirm-target", "--timeout")
    assert "Send" not in help_of("plan", "--allow-fatal")
