"""One record has one keeper, whoever dies, and whatever is done to the lock's file."""

import asyncio
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpvcpu.errors import RecordError, RecordLockedError
from qmpvcpu.record.file import LockedFile
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from qmpvcpu.testing.signals import send_signal
from tests.domainxml.examples import layout_of
from tests.record.conftest import UUID, OpenRecord, listing

LAYOUT = layout_of(4, [0, 2], boot=1)
LOCK = ".vm.xml.lock"
KEEPER = """
import asyncio, sys
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record

async def main():
    record = await Record.open(sys.argv[1], Claim("vm"))
    print("open", flush=True)
    sys.stdin.read()
    await record.close()

if len(sys.argv) > 2:
    with open("/proc/self/comm", "w") as comm:
        comm.write(sys.argv[2])
asyncio.run(main())
"""


@contextmanager
def keeper(path: Path, *name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that keeps the record until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPER, path, *name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def held(path: Path, signature: bytes) -> Iterator[None]:
    """Hold the lock as somebody who signs as given."""
    with path.open("wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(signature)
        yield


async def test_a_second_process_is_told_at_once_who_keeps_the_record(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    with keeper(path, "vmm") as other:
        with pytest.raises(RecordLockedError, match=rf"locked by process {other.pid} \(vmm\)") as locked:
            await open_record(path)
        assert locked.value.pid == other.pid
        assert locked.value.path == str(path)
        assert listing(tmp_path) == [LOCK]
        assert stat.S_IMODE((tmp_path / LOCK).stat().st_mode) == 0o600
        other.communicate()
    assert listing(tmp_path) == []
    await open_record(path)


async def test_a_second_keeper_in_the_same_process_is_told_so(open_record: OpenRecord, tmp_path: Path) -> None:
    first = await open_record(tmp_path / "vm.xml", uuid=None)
    with pytest.raises(RecordLockedError, match=f"this process, {os.getpid()}") as locked:
        await open_record(tmp_path / "vm.xml")
    assert locked.value.pid == os.getpid()
    await first.write(LAYOUT)  # a save puts a new file in the record's place, and the lock holds on
    with pytest.raises(RecordLockedError):
        await open_record(tmp_path / "vm.xml")
    await first.close()
    await open_record(tmp_path / "vm.xml", uuid=None)


async def test_a_killed_keeper_leaves_nothing_locked(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    with keeper(path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / LOCK).read_text() == f"{other.pid}\n"
        record = await open_record(path)
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
        await record.close()
    assert listing(tmp_path) == []


async def test_nothing_of_an_earlier_keepers_longer_number_is_left(open_record: OpenRecord, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("9" * 30)
    await open_record(tmp_path / "vm.xml")
    assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"


async def test_a_stopped_keeper_keeps_the_record(open_record: OpenRecord, tmp_path: Path) -> None:
    with keeper(tmp_path / "vm.xml") as other:
        send_signal(other.pid, signal.SIGSTOP)
        with pytest.raises(RecordLockedError, match=str(other.pid)):
            await open_record(tmp_path / "vm.xml")


async def test_a_keeper_cannot_write_to_our_terminal_by_its_name(open_record: OpenRecord, tmp_path: Path) -> None:
    with keeper(tmp_path / "vm.xml", "\x1b[31mred") as other, pytest.raises(RecordLockedError) as locked:
        await open_record(tmp_path / "vm.xml")
    assert f"process {other.pid} (\\x1b[31mred)" in str(locked.value)


@pytest.mark.parametrize(
    ("signature", "pid", "told"),
    [
        (b"", None, "another process"),
        (b"no number", None, "another process"),
        (b"4194305\n", 4194305, "process 4194305:"),
        (b"9" * 100, int("9" * 20), "process 9"),
    ],
)
async def test_a_keeper_that_cannot_be_looked_up_is_told_as_far_as_it_is_known(
    open_record: OpenRecord, tmp_path: Path, signature: bytes, pid: int | None, told: str
) -> None:
    with held(tmp_path / LOCK, signature), pytest.raises(RecordLockedError, match=told) as locked:
        await open_record(tmp_path / "vm.xml")
    assert locked.value.pid == pid


async def test_a_signature_that_cannot_be_read_is_no_reason_to_say_anything_but_locked(
    open_record: OpenRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with held(tmp_path / LOCK, b"1\n"):
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(RecordLockedError, match="another process"):
            await open_record(tmp_path / "vm.xml")


async def test_records_of_one_folder_have_a_lock_each(open_record: OpenRecord, tmp_path: Path) -> None:
    for name in ("vm.xml", "other.xml", "vm"):
        await (await open_record(tmp_path / name)).write(LAYOUT)
    assert listing(tmp_path) == [".other.xml.lock", ".vm.lock", LOCK, "other.xml", "vm", "vm.xml"]


async def test_another_way_to_the_same_folder_is_no_way_around_the_lock(
    open_record: OpenRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    record = await open_record(Path("vm.xml"))
    with pytest.raises(RecordLockedError):
        await open_record(tmp_path / "link" / "vm.xml")
    monkeypatch.chdir(tmp_path)  # and it stays where it was opened
    await record.write(LAYOUT)
    await record.close()
    assert listing(tmp_path / "real") == ["vm.xml"]


PLACED: dict[str, Callable[[Path, Path], None]] = {
    "a symlink": lambda place, precious: place.symlink_to(precious),
    "a fifo": lambda place, _: os.mkfifo(place),
    "a folder": lambda place, _: place.mkdir(),
    "another name of a file": lambda place, precious: place.hardlink_to(precious),
}


@pytest.mark.parametrize("kind", PLACED)
async def test_what_stands_in_the_place_of_the_lock_is_not_touched(
    open_record: OpenRecord, tmp_path: Path, kind: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    place = tmp_path / LOCK
    PLACED[kind](place, precious)
    with pytest.raises(RecordError, match=f"cannot be locked with {LOCK}"):
        await open_record(tmp_path / "vm.xml")
    assert precious.read_text() == "precious"
    assert listing(tmp_path) == [LOCK, "precious"]


async def test_a_file_system_without_locks_is_told_and_nothing_is_written(
    open_record: OpenRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(RecordError, match="Operation not supported; it takes a file system with locks") as failed:
        await open_record(tmp_path / "vm.xml")
    assert not isinstance(failed.value, RecordLockedError)
    assert not (tmp_path / "vm.xml").exists()


async def test_a_refused_record_is_not_left_locked(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(b"torn")
    for _ in range(2):
        with pytest.raises(RecordError, match="left alone"):
            await open_record(path)
    assert listing(tmp_path) == ["vm.xml"]


async def test_a_lock_whose_file_somebody_removed_is_taken_again_at_the_next_save(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    (tmp_path / LOCK).unlink()
    await record.write(LAYOUT)
    with pytest.raises(RecordLockedError):
        await open_record(path)
    await record.close()
    assert listing(tmp_path) == ["vm.xml"]


async def test_a_keeper_that_lost_its_lock_to_another_writes_no_more_and_leaves_the_others_lock_alone(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    first = await open_record(path, uuid=None)
    (tmp_path / LOCK).unlink()
    second = await open_record(path, uuid=None)
    await second.write(LAYOUT)
    saved = path.read_bytes()
    with pytest.raises(RecordLockedError):
        await first.write(layout_of(4, [0], boot=1))
    assert path.read_bytes() == saved
    await first.close()
    assert (tmp_path / LOCK).exists()
    with pytest.raises(RecordLockedError):
        await open_record(path, uuid=None)


async def test_a_lock_that_its_last_keeper_removes_while_we_open_it_is_not_taken_for_one(
    open_record: OpenRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    removed: list[int] = []

    def remove_first(file: int, operation: int) -> None:
        if not removed:
            removed.append((tmp_path / LOCK).stat().st_ino)
            (tmp_path / LOCK).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    await open_record(tmp_path / "vm.xml")
    assert len(removed) == 1
    with pytest.raises(RecordLockedError):
        await open_record(tmp_path / "vm.xml")


def test_many_who_come_and_go_are_never_two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    inside: list[int] = []
    most = []
    deadline = time.monotonic() + 50

    def come_and_go(number: int) -> int:
        turns = 0
        while turns < 40:
            assert time.monotonic() < deadline
            try:
                kept = LockedFile(path)
            except RecordLockedError:
                continue
            inside.append(number)
            most.append(len(inside))
            kept.renew()
            inside.remove(number)
            kept.release()
            turns += 1
        return turns

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(come_and_go, range(4))) == [40] * 4
    assert set(most) == {1}
    assert listing(tmp_path) == []


async def test_closing_is_idempotent_and_what_is_closed_writes_no_more(tmp_path: Path) -> None:
    record = await Record.open(tmp_path / "vm.xml", Claim("vm", UUID))
    await asyncio.gather(record.close(), record.close())
    await record.close()
    with pytest.raises(RecordError, match="closed"):
        await record.write(LAYOUT)
    assert listing(tmp_path) == []


def test_letting_go_never_fails_and_a_lock_let_go_is_not_taken_again_by_that(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    kept = LockedFile(folder / "vm.xml")
    folder.rename(tmp_path / "moved")
    kept.release()
    kept.release()
    assert listing(tmp_path / "moved") == []
    again = LockedFile(tmp_path / "moved" / "vm.xml")
    again.release()
    assert listing(tmp_path / "moved") == []


async def test_a_cancelled_close_has_let_go_when_it_ends(tmp_path: Path) -> None:
    record = await Record.open(tmp_path / "vm.xml", Claim("vm", UUID))
    write = asyncio.create_task(record.write(LAYOUT))
    await asyncio.sleep(0)
    close = asyncio.create_task(record.close())
    await asyncio.sleep(0)
    close.cancel()
    with pytest.raises(asyncio.CancelledError):
        await close
    await write
    assert listing(tmp_path) == ["vm.xml"]


async def test_an_open_that_is_cancelled_twice_lets_go_as_soon_as_it_can(
    open_record: OpenRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    flock = fcntl.flock
    locking, go_on, let_go = asyncio.Event(), threading.Event(), asyncio.Event()

    def wait_and_lock(file: int, operation: int) -> None:
        loop.call_soon_threadsafe(locking.set)
        assert go_on.wait(10)
        flock(file, operation)

    release = LockedFile.release

    def release_and_tell(kept: LockedFile) -> None:
        release(kept)
        loop.call_soon_threadsafe(let_go.set)

    monkeypatch.setattr(fcntl, "flock", wait_and_lock)
    monkeypatch.setattr(LockedFile, "release", release_and_tell)
    opening = asyncio.create_task(open_record(tmp_path / "vm.xml"))
    await locking.wait()
    for _ in range(2):
        opening.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await opening
    go_on.set()
    await asyncio.wait_for(let_go.wait(), 10)
    assert listing(tmp_path) == []


def test_a_lock_that_is_dropped_says_so_and_keeps_nobody_out(tmp_path: Path) -> None:
    kept = LockedFile(tmp_path / "vm.xml")
    with pytest.warns(ResourceWarning):
        del kept
    LockedFile(tmp_path / "vm.xml").release()
    assert listing(tmp_path) == []
