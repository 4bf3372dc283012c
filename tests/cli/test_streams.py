"""Outputs that are closed, full, narrow, or cannot take every letter: a line and an exit code, never a traceback."""

import asyncio
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmpvcpu.cli import main
from qmpvcpu.documents import as_line
from tests.cli.running import environment, on_terminal, run
from tests.hostile import small_vm

_NOT_UTF8 = b"\xff\x1b[31m\n"
_DOMAIN = (
    "<domain type='kvm'><name>vm</name><memory>1024</memory><vcpu current='1'>4</vcpu>"
    "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
)
# What a shell may say of standard output and standard error.
_NOWHERE = [">/dev/full", ">&-", "| true"]
_UNHEARD = ["", "2>/dev/full", "2>&-"]


def shell(script: str, *words: str | bytes, **changes: str) -> tuple[int, bytes]:
    """Run *script*, in which ``"$@"`` is the command line with *words*, and return its code and what is printed."""
    argv = ("bash", "-c", f"set -o pipefail; {script}", "bash", sys.executable, "-m", "qmpvcpu", *words)
    done = subprocess.run(argv, env=environment(**changes), capture_output=True, check=False, timeout=50)
    assert b"Traceback" not in done.stderr + done.stdout, done
    assert b"Exception ignored" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("words", [["--version"], ["plug", "--help"], ["list", "--json"]], ids=str)
@pytest.mark.parametrize("error", _UNHEARD[:2])
@pytest.mark.parametrize("out", _NOWHERE)
def test_outputs_that_nobody_takes_end_with_a_code(words: list[str], out: str, error: str) -> None:
    code, said = shell(f'"$@" {error} {out}', *words, QMPVCPU_QMP="/nonexistent")
    # A reader that has seen enough is no fault; an answer that cannot be printed is one, unless there is a worse one.
    assert code == (3 if "list" in words else int(out != "| true"))
    assert (b"cannot print the answer" in said) == (out != "| true" and not error)


@pytest.mark.parametrize("error", _UNHEARD[1:])
@pytest.mark.parametrize(
    ("words", "code"), [((), 2), (("frobnicate",), 2), (("list", "--qmp", "/nonexistent", "--verbose"), 3)], ids=str
)
def test_an_error_that_nobody_hears_is_still_a_code(words: tuple[str, ...], code: int, error: str) -> None:
    assert shell(f'"$@" {error}', *words) == (code, b"")


@pytest.mark.parametrize("columns", ["1", "5", "19"])
@pytest.mark.parametrize("words", [[], ["plug"], ["fleet", "set"], ["config"]], ids=str)
def test_help_is_told_on_a_terminal_of_any_width(
    words: list[str], columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Usage: qmpvcpu")
    assert max(map(len, lines)) < 60


async def test_a_table_of_one_column_is_a_table() -> None:
    async with small_vm() as peer:
        for words in ("list", "plan 0-2", "watch --for 0", "stats --interval 0.05 --count 1", "fleet list"):
            async with on_terminal(*words.split(), "--qmp", peer.address, columns=1, lines=200) as it:
                assert await it.end() == 0
            assert "Traceback" not in it.shown


async def test_a_name_that_the_output_cannot_encode_is_escaped() -> None:
    env = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    for words in ("list", "watch --for 0", "stats --interval 0.05 --count 1", "fleet list"):
        async with small_vm(query_name={"name": "größe-日本"}) as peer:
            ran = await run(*words.split(), "--qmp", peer.address, env=env, code="import sys")
        assert ran.code == 0
        assert "gr\\xf6\\xdfe-\\u65e5\\u672c" in ran.out


async def test_a_document_is_utf_8_whatever_the_output_is(tmp_path: Path) -> None:
    (tmp_path / "base.xml").write_text(_DOMAIN.replace(">vm<", ">größe<"))
    async with small_vm() as peer:
        env = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        words = ("xml", "--base", tmp_path / "base.xml", "--qmp", peer.address)
        ran = await run(*words, env=env, code="import sys")
    assert ran.code == 0
    assert "<name>größe</name>" in ran.out


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--qmp", _NOT_UTF8],
        ["list", "--qmp", b"tcp:" + _NOT_UTF8 + b":1"],
        ["list", "--record", b"/nonexistent/" + _NOT_UTF8, "--qmp", "{address}"],
        ["xml", "--emulator", _NOT_UTF8, "--qmp", "{address}"],
        ["xml", "--base", _NOT_UTF8, "--qmp", "{address}"],
        ["xml", "--output", b"/nonexistent/" + _NOT_UTF8, "--qmp", "{address}"],
        ["set", _NOT_UTF8, "--qmp", "{address}"],
        ["plug", _NOT_UTF8],
        ["unplug", _NOT_UTF8],
        ["set", "0", "--on-failure", _NOT_UTF8],
        ["fleet", "list", "--dir", _NOT_UTF8],
        ["fleet", "list", "--dir", ".", "--pattern", _NOT_UTF8],
        ["args", _NOT_UTF8],
        ["args", "{domain}", "--cpu", _NOT_UTF8],
        ["config", _NOT_UTF8],
        ["config", "{domain}", "--set", _NOT_UTF8],
        ["check-target", _NOT_UTF8, "--qmp", "{address}"],
        ["check-target", "x", "--accept", _NOT_UTF8, "--qmp", "{address}"],
        ["demo", "--qemu", _NOT_UTF8],
        ["watch", "--until", _NOT_UTF8, "--qmp", "{address}"],
        [_NOT_UTF8],
        ["list", b"--" + _NOT_UTF8],
    ],
    ids=str,
)
async def test_an_argument_that_is_no_text_is_told_in_printable_lines(
    words: list[str | bytes], tmp_path: Path
) -> None:
    (tmp_path / "vm.xml").write_text(_DOMAIN)
    async with small_vm() as peer:
        named = {"address": peer.address, "domain": str(tmp_path / "vm.xml")}
        given = [each if isinstance(each, bytes) else each.format(**named) for each in words]
        for mode in ([], ["--json"]):
            argv = [os.fsdecode(each) for each in given] + mode
            ran = await run(*argv)
            assert ran.code in (0, 2, 3, 4)
            assert all(line.isprintable() for line in (ran.out + ran.err).split("\n")) or argv[0] == "args"
            if mode:
                assert json.loads(ran.out)["schema"] == "qmpvcpu/1"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_json_has_no_number_that_is_none(number: float) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    line = as_line({"a": [1.5, {"b": number}], "c": (number,), "d": "NaN"})
    word = json.dumps(number)
    assert json.loads(line, parse_constant=refuse) == {"a": [1.5, {"b": word}], "c": [word], "d": "NaN"}
    assert line.endswith("\n")


async def test_a_number_that_is_none_in_a_reply_is_no_number_in_json() -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    slot = {"type": "qemu64-x86_64-cpu", "vcpus-count": 1, "props": {"core-id": float("nan")}}
    for words in (["list", "--json"], ["list", "--json", "--reply-timeout", "5"], ["plan", "0", "--json"]):
        async with small_vm(query_hotpluggable_cpus=[slot]) as peer:
            ran = await run(*words, "--qmp", peer.address)
        assert "core-id" in ran.out
        json.loads(ran.out, parse_constant=refuse)


_IN_NO_DIRECTORY = "import os, tempfile; gone = tempfile.mkdtemp(); os.chdir(gone); os.rmdir(gone)"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("list --record vm.xml", 4),
        ("plug 3 --record vm.xml", 4),
        ("plug 3 --record vm.xml --affect both --config base.xml", 4),
        ("set 0 --affect config --config vm.xml", 4),
        ("recover --record vm.xml", 4),
        ("config vm.xml", 4),
        ("fleet list --record records", 4),
        ("xml --emulator qemu", 2),
    ],
)
async def test_a_relative_path_in_a_directory_that_was_removed_is_named(line: str, code: int) -> None:
    words = line.split()
    async with small_vm() as peer:
        address = () if words[0] == "config" else ("--qmp", peer.address)
        ran = await run(*words, *address, "--json", code=_IN_NO_DIRECTORY)
    assert ran.code == code
    assert "working directory, which was removed" in ran.error["message"]
    assert any(word in ran.error["message"] for word in words if word.endswith((".xml", "records", "qemu")))


def test_what_the_system_refuses_is_no_matter_of_printing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: asyncio.Runner) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(asyncio.Runner, "get_loop", refuse)
    assert main(["list", "--qmp", "/nonexistent", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "[Errno 24] Too many open files"


def test_a_module_that_cannot_be_read_is_no_matter_of_printing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: str) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "list.py")

    monkeypatch.setattr("qmpvcpu.cli.app.import_module", refuse)
    assert main(["list", "--qmp", "/nonexistent", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "list.py: Too many open files"
