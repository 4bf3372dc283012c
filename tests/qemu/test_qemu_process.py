"""The process kit: which QEMUs there are, and one of them with its sockets, from start to end."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu.testing import (
    UNTIL_TOLD,
    MicroGuest,
    QemuNotFoundError,
    QemuProcess,
    QemuProcessError,
    QemuStartError,
    ScriptedPeer,
    best_qemu,
    find_qemus,
    probe_accelerator,
)
from qmpvcpu.testing.directory import TemporaryDirectoryError, sweep
from qmpvcpu.testing.qemu import qemu_version
from tests.waiting import is_gone, until

pytestmark = pytest.mark.qemu

PAUSED = ["-S", "-accel", "tcg", "-machine", "q35"]


def program(path: Path, script: str) -> Path:
    """A shell script at *path* that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_qemu(tmp_path: Path) -> Path:
    """A program that answers as QEMU 99.1 and starts no VM."""
    return program(
        tmp_path / "qemu-system-x86_64",
        '[ "$1" = --version ] && echo "QEMU emulator version 99.1.0" && exit\necho no machine today >&2\nexit 3',
    )


def test_a_qemu_is_found_by_its_full_version(
    fake_qemu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cached = program(cache / "qemu-98" / "bin" / fake_qemu.name, "echo QEMU emulator version 98.0.50")
    sibling = program(cache / "qemu-98-too" / "bin" / fake_qemu.name, "echo QEMU emulator version 98.0.13")
    program(cache / "qemu-97" / "bin" / fake_qemu.name, "exit 1")
    other = program(tmp_path / "other", "exec " + str(fake_qemu) + ' "$@"')
    monkeypatch.setenv("PATH", f"{fake_qemu.parent}:/usr/bin:/bin")
    monkeypatch.setenv("QMPVCPU_CACHE", str(cache))
    monkeypatch.delenv("QMPVCPU_QEMU", raising=False)
    assert find_qemus() == {"99.1.0": fake_qemu, "98.0.50": cached, "98.0.13": sibling}
    assert best_qemu() == fake_qemu
    monkeypatch.setenv("QMPVCPU_QEMU", str(cached))
    assert best_qemu() == cached
    monkeypatch.setenv("QMPVCPU_QEMU", str(other))
    assert find_qemus() == {"99.1.0": other, "98.0.50": cached, "98.0.13": sibling}


@pytest.mark.parametrize("spelling", ["mine", "./mine", "~/mine"], ids=["by its name", "from here", "from home"])
def test_a_chosen_qemu_may_be_spelled_as_in_a_shell(
    fake_qemu: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spelling: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    mine = program(here / "mine", "exec " + str(fake_qemu) + ' "$@"')
    monkeypatch.chdir("/" if spelling == "mine" else here)
    monkeypatch.setenv("PATH", f"{here}:/usr/bin:/bin" if spelling == "mine" else "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path))
    monkeypatch.setenv("QMPVCPU_QEMU", spelling)
    assert best_qemu() == mine


def test_a_chosen_qemu_that_cannot_be_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMPVCPU_QEMU", "/nonexistent/qemu")
    with pytest.raises(QemuNotFoundError, match="QMPVCPU_QEMU=/nonexistent/qemu: no program that can be run"):
        best_qemu()


def test_a_chosen_qemu_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMPVCPU_QEMU", "/bin/true")
    with pytest.raises(QemuNotFoundError, match="QMPVCPU_QEMU=/bin/true"):
        best_qemu()


def test_a_machine_without_qemu_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("QMPVCPU_CACHE", str(tmp_path))
    monkeypatch.delenv("QMPVCPU_QEMU", raising=False)
    assert find_qemus() == {}
    with pytest.raises(QemuNotFoundError, match="install one"):
        best_qemu()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")
def test_a_cache_of_another_user_has_no_qemu_and_no_guest(tmp_path: Path) -> None:
    code = """
import os
from qmpvcpu.testing import find_qemus
from qmpvcpu.testing.linuxguest import LinuxGuestMissingError, find_images
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    find_images()
except LinuxGuestMissingError:
    print([*find_qemus()])
"""
    cache = tmp_path / "closed" / "cache"
    cache.mkdir(parents=True)
    cache.parent.chmod(0o700)
    environment = {**os.environ, "PATH": "/usr/bin:/bin", "QMPVCPU_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    in_path = shutil.which("qemu-system-x86_64", path=environment["PATH"])
    assert done.stdout == f"{[qemu_version(Path(in_path))] if in_path else []}\n"
    assert f"no QEMU is looked for in {cache}: Permission denied" in done.stderr


async def test_a_qemu_under_which_no_guest_comes_up_gets_tcg(fake_qemu: Path) -> None:
    assert await probe_accelerator(fake_qemu) == "tcg"


@pytest.mark.kvm
async def test_a_qemu_under_which_the_micro_guest_comes_up_gets_kvm() -> None:
    assert await probe_accelerator(best_qemu()) == "kvm"


async def test_each_socket_greets_a_client_of_its_own() -> None:
    async with QemuProcess(best_qemu(), PAUSED, qmp_sockets=2) as process, contextlib.AsyncExitStack() as stack:
        clients = [QMPClient(path.name) for path in process.sockets]
        for client, path in zip(clients, process.sockets, strict=True):
            await client.connect(str(path))
            stack.push_async_callback(client.disconnect)
        replies = await asyncio.gather(*(client.execute("query-name") for client in clients))
    assert replies == [{}, {}]


async def test_ready_means_that_the_machine_is_built() -> None:
    async with QemuProcess(best_qemu(), PAUSED) as process:
        await process.wait_ready()
        assert process.returncode is None
        assert process.qmp.is_socket()
        await process.wait_ready()  # and it can be asked again
        assert await process.count_vcpus() == 1
        assert [*await asyncio.gather(process.count_vcpus(), process.count_vcpus())] == [1, 1]


async def test_a_qemu_that_was_never_started_is_not_waited_for() -> None:
    with pytest.raises(RuntimeError, match="never started"):
        await QemuProcess(best_qemu(), PAUSED).wait_ready()


async def test_a_qemu_that_ends_instead_of_starting_is_told_with_its_words(fake_qemu: Path) -> None:
    async with QemuProcess(fake_qemu, ["-foo"]) as process:
        with pytest.raises(QemuStartError, match="no machine today") as caught:
            await process.wait_ready()
    assert caught.value.returncode == 3
    assert caught.value.stderr == "no machine today\n"
    assert "-foo" in caught.value.argv


async def test_a_path_that_is_no_program_is_told(tmp_path: Path) -> None:
    with pytest.raises(QemuStartError, match="is not a program"):
        async with QemuProcess(tmp_path / "nothing", []):
            pass


async def test_a_stopped_qemu_is_not_ready_and_is_killed_all_the_same() -> None:
    async with QemuProcess(best_qemu(), PAUSED) as process:
        process.kill(signal.SIGSTOP)
        with pytest.raises(QemuStartError, match="QEMU is stopped"):
            await process.wait_ready(timeout=0.2)
    assert process.returncode == -signal.SIGKILL


async def test_nothing_is_left_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with QemuProcess(best_qemu(), PAUSED) as process:
        await process.wait_ready()
        assert process.directory.parent == tmp_path
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a path's own method is called blocking, this is not
    assert is_gone(process.pid)
    assert process.returncode == -signal.SIGKILL
    await process.aclose()


async def test_the_words_of_a_qemu_are_kept_after_its_end(fake_qemu: Path) -> None:
    async with QemuProcess(fake_qemu, []) as process:
        assert await process.wait() == 3
    assert process.stderr == "no machine today\n"
    process.kill()


async def test_qemu_dies_with_the_program_that_started_it() -> None:
    script = (
        "import asyncio, sys\n"
        "from qmpvcpu.testing import QemuProcess, best_qemu\n"
        "async def main():\n"
        f"    async with QemuProcess(best_qemu(), {PAUSED!r}) as process:\n"
        "        await process.wait_ready()\n"
        "        print(process.pid, process.directory, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid, directory = (await parent.stdout.readline()).decode().split()
    os.kill(int(pid), 0)
    parent.kill()
    await parent.wait()
    await until(lambda: is_gone(int(pid)))
    shutil.rmtree(directory)


async def test_a_guest_whose_qemu_dies_is_told_at_once() -> None:
    async with MicroGuest() as guest:
        guest.process.kill()
        with pytest.raises(QemuProcessError, match="QEMU ended, and the micro-guest did not say"):
            await guest.wait_ready()
        with pytest.raises(QemuProcessError, match="QEMU ended, and the micro-guest did not say"):
            await guest.set_behaviour()


async def test_where_kvm_does_not_run_the_guest_tcg_does(tmp_path: Path) -> None:
    without_kvm = program(
        tmp_path / "qemu",
        f'case "$*" in *"-accel kvm"*) echo no KVM here >&2; exit 1;; esac\nexec {best_qemu()} "$@"',
    )
    async with MicroGuest(without_kvm) as guest:
        assert guest.accelerator == "tcg"
    async with MicroGuest(without_kvm, wait=False) as guest:
        assert guest.accelerator == "tcg"
        await guest.wait_ready()
    with pytest.raises(QemuStartError, match="no KVM here"):
        async with MicroGuest(without_kvm, accel="kvm"):
            pass


async def test_a_guest_that_nobody_waits_for_and_that_does_not_start_under_kvm_is_an_error(
    fake_qemu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kvm(_: Path) -> str:
        return "kvm"

    monkeypatch.setattr("qmpvcpu.testing.microguest.probe_accelerator", kvm)
    with pytest.raises(QemuStartError, match="no machine today"):
        async with MicroGuest(fake_qemu, wait=False):
            pass


async def test_cancelling_the_start_of_a_guest_leaves_no_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    guest = MicroGuest(accel="tcg", ready_after_ms=UNTIL_TOLD)
    starting = asyncio.create_task(guest.__aenter__())
    await until(lambda: [*tmp_path.glob("*/serial0.log")], within=30)  # QEMU makes it
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert is_gone(guest.process.pid)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a path's own method is called blocking, this is not


async def test_a_paused_guest_is_ready_once_it_runs() -> None:
    async with MicroGuest(extra_args=["-S"], wait=False) as guest:
        client = QMPClient("test")
        await client.connect(str(guest.qmp))
        await client.execute("cont")
        await guest.wait_ready()
        status = await client.execute("query-status")
        await client.disconnect()
    assert isinstance(status, dict)
    assert status["status"] == "running"


async def test_boot_vcpus_can_have_gaps() -> None:
    async with MicroGuest(boot=[0, 1, 5]) as guest:
        argv = guest.process.argv
    assert argv[argv.index("-smp") + 1] == "2,maxcpus=8,sockets=2,cores=2,threads=2"
    assert argv[argv.index("-device") + 1] == "qemu64-x86_64-cpu,id=vcpu5,thread-id=1,core-id=0,socket-id=1"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"boot": {1, 2}}, "have vCPU 0"),
        ({"boot": 9}, "must be within 0..7"),
        ({"boot": 0}, "have vCPU 0"),
        ({"topology": "sockets=3"}, "does not make 8"),
        ({"topology": "boards=8"}, "does not make 8"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_start(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        MicroGuest(**options)  # type: ignore[arg-type]  # the options are of many types


async def test_a_long_directory_for_temporary_files_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * max(1, 85 - len(str(tmp_path))))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    async with MicroGuest() as guest, qmpvcpu.attach(guest.qmp) as vm:
        assert vm.layout.enabled == {0}
        kept = guest.process.directory
        assert kept not in sweep()
    assert list(long.iterdir()) == []
    assert not kept.exists()


async def test_where_no_directory_can_hold_sockets_the_path_and_the_variable_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * max(1, 85 - len(str(tmp_path))))
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr("qmpvcpu.testing.directory._SHORT", (tmp_path / "missing",))
    monkeypatch.setenv("TEMP", str(long))
    monkeypatch.delenv("TMPDIR", raising=False)
    named = rf"{long} has {len(str(long))} bytes, .*/missing cannot be written. Set TEMP to a directory of at most"
    for kit in (MicroGuest(), ScriptedPeer()):
        with pytest.raises(TemporaryDirectoryError, match=named):
            await kit.__aenter__()


async def test_where_nothing_can_be_written_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_usable() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none_usable)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(TemporaryDirectoryError, match=r"/missing included. Set TMPDIR to"):
        await MicroGuest().__aenter__()
