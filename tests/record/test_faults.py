"""Every system call in a record's life fails once, and is the last one once: what is on disk is whole."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu.errors import Outcome, RecordError
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from tests.record.conftest import listing
from tests.record.faults import live, meddling, prepare, untouched

ROOT = Path(__file__).parents[2]


async def calls_of(path: Path) -> list[str]:
    with meddling(untouched) as calls:
        await live(path)
    return list(calls)


async def test_a_save_is_on_disk_before_it_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    calls = await calls_of(tmp_path / "vm.xml")
    told = [call for call in calls if call.split()[0] in {"write", "fsync", "rename"}]
    assert told == ["write", "fsync file", "rename .tmp", "fsync directory"]
    locked, swept, written = calls.index("flock"), calls.index("listdir"), calls.index("write")
    assert locked < swept < written < calls.index("unlink .lock")


async def find(path: Path) -> tuple[int, bool] | None:
    """Return generation and whether there is an intent, as the next one finds them; None if there is no record."""
    record = await Record.open(path, Claim("vm"))
    await record.close()
    if record.previous is None:
        return None
    metadata = record.previous.metadata
    assert metadata is not None
    return metadata.generation, metadata.intent is not None


async def life_that_fails(path: Path, number: int, code: int) -> RecordError | None:
    """Live, with call *number* failing; return what was told of it."""

    def fail(count: int, name: str, do: Callable[[], Any]) -> Any:
        if count != number:
            return do()
        if name == "close":
            do()  # Linux closes it, whatever it says
        raise OSError(code, os.strerror(code))

    with meddling(fail):
        try:
            await live(path)
        except RecordError as error:
            return error
    return None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("existing", [False, True], ids=["first save", "second save"])
async def test_whatever_call_fails_the_record_is_the_last_one_or_the_new_one_and_the_error_says_which(
    tmp_path: Path, code: int, *, existing: bool, record_property: Callable[[str, object], None]
) -> None:
    old, new = ((1, False), (2, True)) if existing else (None, (1, True))
    calls = await calls_of(prepare(tmp_path / "dry", existing=existing))
    must_be_told = {"write", "fsync file", "rename .tmp", "fsync directory", "open .tmp", "open .lock", "listdir"}
    assert must_be_told < set(calls)
    told = 0
    for number, call in enumerate(calls):
        path = prepare(tmp_path / str(number), existing=existing)
        before = path.stat() if existing else None
        error = await life_that_fails(path, number, code)
        where = f"{number}: {call}, {error}"
        told += error is not None
        assert [name for name in listing(path.parent) if name.endswith(".tmp")] == [], where
        if error is None:
            assert call not in must_be_told, where
            assert await find(path) == new, where
        elif call == "fsync directory":
            assert error.outcome is Outcome.UNKNOWN
            assert await find(path) == new, where
        else:
            assert error.outcome is Outcome.UNCHANGED, where
            assert os.strerror(code) in str(error), where
            assert await find(path) == old, where
            assert before is None or os.path.samestat(before, path.stat()), where
        assert listing(path.parent) == (["vm.xml"] if path.exists() else []), where
    record_property("calls that failed once", len(calls))
    record_property("of them told", told)


def test_wherever_it_dies_the_next_one_finds_a_whole_record_and_nothing_else_in_the_folder(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.record.dying", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    deaths = json.loads(done.stdout)
    assert {death["call"] for death in deaths} >= {"write", "fsync file", "rename .tmp", "fsync directory", "flock"}
    for death in deaths:
        old, new = ((1, False), (2, True)) if death["existing"] else ((None, False), (1, True))
        found = (death["generation"], death["intent"])
        assert found in {old, new}, death
        assert death["left"] == (["vm.xml"] if found[0] else []), death
    renamed = [death for death in deaths if death["call"] == "rename .tmp"]
    assert {(death["after"], death["intent"]) for death in renamed} == {(False, False), (True, True)}
    assert len(deaths) > 100
    record_property("deaths", len(deaths))


async def test_a_temporary_that_cannot_even_be_removed_is_swept_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"

    def fail(_count: int, name: str, do: Callable[[], Any]) -> Any:
        if name in {"write", "unlink"}:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return do()

    with meddling(fail), pytest.raises(RecordError, match="Input/output error"):
        await live(path)
    assert [name[-4:] for name in listing(tmp_path)] == [".tmp", "lock"]
    await live(path)
    assert listing(tmp_path) == ["vm.xml"]


async def test_a_disk_that_takes_a_byte_at_a_time_takes_it_all(tmp_path: Path) -> None:
    await live(tmp_path / "whole.xml")
    with pytest.MonkeyPatch.context() as patch:
        write = os.write
        patch.setattr(os, "write", lambda file, data: write(file, data[:1]))
        await live(tmp_path / "vm.xml")
    assert len((tmp_path / "vm.xml").read_bytes()) == len((tmp_path / "whole.xml").read_bytes())
    assert await find(tmp_path / "vm.xml") == (1, True)


async def life_that_is_cancelled(path: Path, number: int) -> None:
    """Live, and be cancelled during call *number*."""
    loop = asyncio.get_running_loop()
    cancelled = threading.Event()

    def cancel() -> None:
        life.cancel()
        cancelled.set()

    def meddle(count: int, _name: str, do: Callable[[], Any]) -> Any:
        if count == number:
            loop.call_soon_threadsafe(cancel)
            assert cancelled.wait(10)
        return do()

    with meddling(meddle):
        life = asyncio.create_task(live(path))
        await life


async def test_a_cancel_at_any_call_leaves_a_whole_record_no_temporary_and_no_lock(tmp_path: Path) -> None:
    ends = set()
    calls = await calls_of(prepare(tmp_path / "dry", existing=True))
    for number, call in enumerate(calls):
        path = prepare(tmp_path / str(number), existing=True)
        with pytest.raises(asyncio.CancelledError):
            await life_that_is_cancelled(path, number)
        assert listing(path.parent) == ["vm.xml"], call
        ends.add(await find(path))
    assert ends == {(1, False), (2, True)}


async def test_a_cancel_while_a_record_is_refused_leaves_no_lock_and_the_record_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(b"torn")
    for number in range(13):
        with pytest.raises(asyncio.CancelledError):
            await life_that_is_cancelled(path, number)
        assert listing(tmp_path) == ["vm.xml"]
    assert path.read_bytes() == b"torn"
