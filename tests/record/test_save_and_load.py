"""One file, replaced whole or not at all, whatever the disk or the caller does."""

import asyncio
import fcntl
import os
import signal
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from qmpvcpu.errors import Outcome, RecordCorruptError, RecordError
from qmpvcpu.record.file import Place, read_file, save
from tests.record.conftest import RunInNamespace, listing


def sweep(path: Path) -> None:
    with closing(Place(path)) as place:
        place.sweep()


async def test_what_was_saved_is_loaded_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    assert read_file(path) is None
    for data in (b"first", b"", b"x" * 1_000_000):
        await save(path, data)
        assert read_file(path) == data
    assert listing(tmp_path) == ["vm.xml"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_reader_sees_one_save_or_the_other_never_a_mixture(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    versions = [bytes([digit]) * 300_000 for digit in b"0123456789"]
    await save(path, versions[0])

    async def write() -> None:
        for data in versions:
            await save(path, data)

    writer = asyncio.create_task(write())
    seen = set()
    while not writer.done():
        data = await asyncio.to_thread(read_file, path)
        assert data in versions
        seen.add(data)
    await writer
    assert len(seen) > 1


@pytest.mark.parametrize("target", ["there", "missing"])
async def test_a_symlink_is_neither_followed_nor_replaced(tmp_path: Path, target: str) -> None:
    behind = tmp_path / "there"
    behind.write_bytes(b"precious")
    link = tmp_path / "vm.xml"
    link.symlink_to(tmp_path / target)
    with pytest.raises(RecordError, match="symlink"):
        await save(link, b"new")
    with pytest.raises(RecordError, match="symlink"):
        read_file(link)
    assert link.is_symlink()
    assert behind.read_bytes() == b"precious"
    assert listing(tmp_path) == ["there", "vm.xml"]


async def test_a_folder_or_a_fifo_is_no_record_and_nobody_waits_for_its_other_end(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):
        with pytest.raises(RecordError, match="not a regular file"):
            await save(tmp_path / name, b"new")
        with pytest.raises(RecordError):
            read_file(tmp_path / name)
    assert listing(tmp_path) == ["fifo", "folder"]


async def test_a_missing_folder_is_an_error_that_names_the_record(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "vm.xml"
    with pytest.raises(RecordError, match="No such file") as failed:
        await save(path, b"new")
    assert failed.value.path == str(path)
    assert failed.value.outcome is Outcome.UNCHANGED
    assert listing(tmp_path) == []


async def test_a_name_too_long_for_its_temporary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="too long"):
        await save(tmp_path / ("x" * 250), b"new")
    assert listing(tmp_path) == []


def test_a_read_only_file_system_leaves_the_record_as_it_was(in_namespace: RunInNamespace) -> None:
    lines = in_namespace(
        'mount -t tmpfs none "$DISK"; printf older > "$DISK/vm.xml"; mount -o remount,ro "$DISK";'
        '$SAVE "$DISK/vm.xml" newer'
    )
    assert "Read-only file system" in lines[0]
    assert lines[1] == "['vm.xml'] older"


def test_a_full_disk_leaves_the_record_as_it_was_and_no_temporary(in_namespace: RunInNamespace) -> None:
    lines = in_namespace(
        'mount -t tmpfs -o size=64k none "$DISK"; printf older > "$DISK/vm.xml";'
        'REPEAT=20000 $SAVE "$DISK/vm.xml" newer; $SAVE "$DISK/vm.xml" fresh'
    )
    assert "No space left on device" in lines[0]
    assert lines[1:] == ["['vm.xml'] older", "saved", "['vm.xml'] fresh"]


def test_a_disk_without_room_for_another_name_leaves_the_record_as_it_was(in_namespace: RunInNamespace) -> None:
    lines = in_namespace(
        'mount -t tmpfs -o nr_inodes=2 none "$DISK"; printf older > "$DISK/vm.xml"; $SAVE "$DISK/vm.xml" newer'
    )
    assert "No space left on device" in lines[0]
    assert lines[1] == "['vm.xml'] older"


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
async def test_a_system_call_that_fails_leaves_the_record_as_it_was_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "vm.xml"
    await save(path, b"older")

    def fail(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RecordError, match="Input/output error") as failed:
        await save(path, b"newer")
    assert failed.value.outcome is Outcome.UNCHANGED
    assert path.read_bytes() == b"older"
    assert listing(tmp_path) == ["vm.xml"]


async def test_a_folder_that_cannot_be_synchronised_is_told_as_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vm.xml"
    synchronise = os.fsync

    def fail_for_folders(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(5, "Input/output error")
        synchronise(file)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    with pytest.raises(RecordError, match="replaced") as failed:
        await save(path, b"newer")
    assert failed.value.outcome is Outcome.UNKNOWN
    assert path.read_bytes() == b"newer"


async def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:3]))
    await save(tmp_path / "vm.xml", b"eleven byte")
    assert read_file(tmp_path / "vm.xml") == b"eleven byte"


async def test_a_cancelled_save_ends_before_its_caller_and_a_later_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vm.xml"
    loop = asyncio.get_running_loop()
    started = asyncio.Event()
    release = os.pipe()
    synchronise = os.fsync

    def wait_for_the_test(file: int) -> None:
        loop.call_soon_threadsafe(started.set)
        os.read(release[0], 1)
        synchronise(file)

    monkeypatch.setattr(os, "fsync", wait_for_the_test)
    first = asyncio.create_task(save(path, b"first"))
    await started.wait()
    first.cancel()
    os.write(release[1], b"12")
    with pytest.raises(asyncio.CancelledError):
        await first
    assert path.read_bytes() == b"first"
    monkeypatch.setattr(os, "fsync", synchronise)
    await save(path, b"second")
    assert path.read_bytes() == b"second"
    assert listing(tmp_path) == ["vm.xml"]
    for end in release:
        os.close(end)


async def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=f"there is no directory {tmp_path / 'none'}$"):
        await save(tmp_path / "none" / "vm.xml", b"")


async def test_a_record_larger_than_the_bound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.touch()
    os.truncate(path, 4 * 1024 * 1024)
    assert len(read_file(path) or b"") == 4 * 1024 * 1024
    os.truncate(path, 4 * 1024 * 1024 + 1)
    with pytest.raises(RecordCorruptError, match="larger"):
        read_file(path)


async def test_a_record_that_may_not_be_read_is_an_error_not_an_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(RecordError, match="Permission denied"):
        read_file(tmp_path / "vm.xml")


KILLED = """
import asyncio, os, sys
from qmpvcpu.record.file import save
os.rename = lambda *a, **k: (print("writing", flush=True), sys.stdin.read())
asyncio.run(save(sys.argv[1], b"half"))
"""


def test_what_a_killed_writer_left_is_removed_and_a_living_writers_is_not(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(b"older")
    (tmp_path / ".vm.xml.0123abcd.tmp.bak").touch()
    writers = []
    for _ in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writers.append(writer)
    left = set(listing(tmp_path)) - {"vm.xml", ".vm.xml.0123abcd.tmp.bak"}
    assert len(left) == 2
    writers[0].send_signal(signal.SIGKILL)
    writers[0].communicate()
    sweep(path)
    alive = set(listing(tmp_path)) - {"vm.xml", ".vm.xml.0123abcd.tmp.bak"}
    assert len(alive) == 1
    assert alive < left
    writers[1].kill()
    writers[1].communicate()
    sweep(path)
    assert listing(tmp_path) == [".vm.xml.0123abcd.tmp.bak", "vm.xml"]
    assert path.read_bytes() == b"older"


async def test_a_file_system_without_locks_still_saves_and_its_temporaries_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".vm.xml.0123abcd.tmp").touch()
    await save(tmp_path / "vm.xml", b"saved")
    sweep(tmp_path / "vm.xml")
    assert listing(tmp_path) == [".vm.xml.0123abcd.tmp", "vm.xml"]
