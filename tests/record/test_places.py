"""A record has one keeper, who writes where it was opened, whatever is done to its folder and its lock's file."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu import DomainConfig, Outcome, RecordError, RecordLockedError
from tests.domainxml.examples import layout_of
from tests.record.conftest import KEEPER, ROOT, OpenRecord, listing
from tests.record.faults import LAYOUT, meddling
from tests.record.test_in_place import vm_of

LOCK = ".vm.xml.lock"


class Other:
    """Another process that keeps a record, or would; it saves each time it is told."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.said = self._read()

    def save(self) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write("true\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip()


@contextmanager
def other(path: Path) -> Iterator[Other]:
    process = subprocess.Popen(
        [sys.executable, "-c", KEEPER, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Other(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """A symlink to folder ``a``, next to folder ``b``."""
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    return tmp_path / "link"


def lead(link: Path, folder: str) -> None:
    new = link.with_name("new")
    new.symlink_to(folder)
    new.rename(link)


def test_of_two_processes_one_writes_at_a_time_wherever_the_path_leads(link: Path) -> None:
    path, b = link / "vm.xml", link.with_name("b")
    with other(path) as first:
        assert (first.said, first.save()) == ("open None", "saved")
        lead(link, "b")
        assert "is another directory than when it was opened" in first.save()
        assert listing(b) == []
        with other(path) as second:
            assert (second.said, second.save()) == ("open None", "saved")
            before = (b / "vm.xml").read_bytes()
            assert first.save().startswith("unchanged /")
            assert (b / "vm.xml").read_bytes() == before
            lead(link, "a")
            assert first.save() == "saved"
            assert second.save().startswith("unchanged /")
            with other(path) as third:
                assert "locked by process" in third.said
    assert (b / "vm.xml").read_bytes() == before


def test_a_folder_under_another_name_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with other(tmp_path / "a" / "vm.xml") as first:
        assert first.save() == "saved"
        (tmp_path / "a").rename(tmp_path / "b")
        with other(tmp_path / "b" / "vm.xml") as second:
            assert "locked by process" in second.said
        assert "there is no directory" in first.save()
        (tmp_path / "a").symlink_to("b")
        assert first.save() == "saved"


def test_a_lock_whose_file_is_removed_still_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    with other(path) as first:
        for _ in range(2):
            assert first.save() == "saved"
            (tmp_path / LOCK).unlink()
            with other(path) as second:
                assert "locked by another process, whose lock file is gone" in second.said
            assert listing(tmp_path) == ["vm.xml"]
        assert first.save() == "saved"
        assert listing(tmp_path) == [LOCK, "vm.xml"]


def test_a_lock_whose_file_is_removed_before_there_is_a_record_is_lost_to_who_comes_then(tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    with other(path) as first:
        (tmp_path / LOCK).unlink()
        with other(path) as second:
            assert (second.said, second.save()) == ("open None", "saved")
            assert "locked by process" in first.save()
            assert second.save() == "saved"


def test_a_record_that_was_replaced_by_another_keepers_is_locked(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with other(tmp_path / "a" / "vm.xml") as first, other(tmp_path / "b" / "vm.xml") as second:
        assert (first.save(), second.save()) == ("saved", "saved")
        (tmp_path / "b" / "vm.xml").rename(tmp_path / "a" / "vm.xml")
        assert "locked by another process, whose lock file is gone" in first.save()


def at_call(name: str, do_first: Callable[[], None]) -> Callable[[int, str, Callable[[], Any]], Any]:
    """Meddle once, right before the first call of that name."""
    left = [do_first]

    def meddle(_count: int, called: str, do: Callable[[], Any]) -> Any:
        if called == name and left:
            left.pop()()
        return do()

    return meddle


@pytest.mark.parametrize("when", ["flock", "listdir", "pread", "write", "fsync", "rename"])
async def test_a_folder_that_is_swapped_at_any_moment_sends_nothing_elsewhere(
    open_record: OpenRecord, link: Path, when: str
) -> None:
    saved = await open_record(link / "vm.xml", uuid=None)
    await saved.write(LAYOUT)
    await saved.close()
    before = (link / "vm.xml").read_bytes()

    async def live() -> None:
        record = await open_record(link / "vm.xml", uuid=None)
        await record.write(layout_of(4, [0], boot=1))

    with meddling(at_call(when, lambda: lead(link, "b"))):
        if when == "rename":  # where nothing can be looked at any more
            await live()
        else:
            with pytest.raises(RecordError, match="is another directory") as caught:
                await live()
            assert caught.value.outcome is Outcome.UNCHANGED
    assert ((link.with_name("a") / "vm.xml").read_bytes() == before) == (when != "rename")
    assert listing(link.with_name("b")) == []


@pytest.mark.parametrize("when", ["flock", "write", "fsync"])
async def test_a_document_of_the_next_boot_is_not_written_elsewhere_either(link: Path, when: str) -> None:
    document, _ = vm_of("cputune-everything")
    for folder in "ab":
        (link.with_name(folder) / "vm.xml").write_bytes(document)

    async def change() -> None:
        async with DomainConfig.open(link / "vm.xml") as config:
            config.set_count(1)
            await config.save()

    with (
        meddling(at_call(when, lambda: lead(link, "b"))),
        pytest.raises(RecordError, match="is another directory"),
    ):
        await change()
    for folder in "ab":
        assert (link.with_name(folder) / "vm.xml").read_bytes() == document
        assert listing(link.with_name(folder)) == ["vm.xml"]


async def test_a_document_whose_locks_file_is_removed_is_still_held(tmp_path: Path) -> None:
    document, _ = vm_of("cputune-everything")
    path = tmp_path / "vm.xml"
    path.write_bytes(document)
    async with DomainConfig.open(path) as config:
        (tmp_path / LOCK).unlink()
        with pytest.raises(RecordLockedError, match="whose lock file is gone"):
            async with DomainConfig.open(path):
                pass
        config.set_count(1)
        await config.save()
    assert listing(tmp_path) == ["vm.xml"]
