"""What others write into a record while it is kept: it stays, or the record is left alone, and both are told."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qmpvcpu import DomainConfig, Outcome, RecordCorruptError, RecordError, VcpuMap
from qmpvcpu.domainxml import parse, read_identity
from qmpvcpu.model.layout import Layout
from qmpvcpu.record.record import Record
from tests.domainxml.documents import one_plugged, outside
from tests.record.conftest import UUID, OpenRecord, listing
from tests.record.faults import meddling
from tests.record.test_in_place import FOUR, vm_of
from tests.record.test_record import INTENT

LINE = b"  <description>added by the admin</description>\n"


def with_a_line(xml: bytes) -> bytes:
    return xml.replace(b"</domain>", LINE + b"</domain>")


def written_in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def replaced_by_rename(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    other.rename(path)


def with_the_time_stamp_of_the_save(path: Path, data: bytes) -> None:
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


WAYS = (written_in_place, replaced_by_rename, with_the_time_stamp_of_the_save)
Way = Callable[[Path, bytes], None]


async def own_document(open_record: OpenRecord, path: Path) -> tuple[Record, Layout, Layout]:
    """Return the record of a VM in its own document, and its layout before and after a plug."""
    document, layout = vm_of("cputune-everything")
    path.write_bytes(document)
    more = one_plugged(layout)
    assert more is not None
    return await open_record(path, uuid=layout.vm.uuid, base=path), layout, more


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_what_is_edited_between_two_saves_is_there_after_the_second(
    open_record: OpenRecord, tmp_path: Path, way: Way
) -> None:
    path = tmp_path / "vm.xml"
    record, layout, more = await own_document(open_record, path)
    await record.write(layout)
    edited = with_a_line(path.read_bytes())
    way(path, edited)
    await record.write(more, desired=more.enabled)
    await record.write(more, desired=more.enabled)
    written = path.read_bytes()
    assert outside(written) == outside(edited)
    assert parse(written).enabled == more.enabled
    found = read_identity(written).metadata
    assert found is not None
    assert (found.generation, found.desired) == (3, more.enabled)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_an_edit_of_as_many_bytes_is_one_too(open_record: OpenRecord, tmp_path: Path, way: Way) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR)
    way(path, path.read_bytes().replace(b"65536", b"65537"))
    await record.write(FOUR, desired=VcpuMap([0]))
    assert path.read_bytes().count(b"<memory unit='KiB'>65537<") == 1


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_what_is_edited_before_the_first_save_is_there_after_it(
    open_record: OpenRecord, tmp_path: Path, way: Way
) -> None:
    path = tmp_path / "vm.xml"
    record, layout, _ = await own_document(open_record, path)
    edited = with_a_line(path.read_bytes())
    way(path, edited)
    await record.write(layout)
    assert outside(path.read_bytes()) == outside(edited)


async def test_a_document_without_uuid_that_is_edited_before_the_first_save_gets_the_one_that_it_was_to_get(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    document, layout = vm_of("minimal")
    path = tmp_path / "vm.xml"
    path.write_bytes(document)
    record = await open_record(path, uuid=UUID, base=path)
    path.write_bytes(with_a_line(document))
    await record.write(layout)
    assert LINE in path.read_bytes()
    assert read_identity(path.read_bytes()).uuid == UUID


async def test_a_record_of_ours_alone_is_changed_in_place_once_somebody_has_edited_it(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR)
    edited = with_a_line(path.read_bytes())
    path.write_bytes(edited)
    await record.write(FOUR)
    await record.close()
    again = await open_record(path)
    await again.write(FOUR)
    assert outside(path.read_bytes()) == outside(edited)
    found = read_identity(path.read_bytes()).metadata
    assert found is not None
    assert found.in_place


async def test_rows_that_are_edited_say_again_what_runs(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR)
    path.write_bytes(path.read_bytes().replace(b"id='3' enabled='no'", b"id='3' enabled='yes' order='3'"))
    await record.write(FOUR)
    assert parse(path.read_bytes()).enabled == FOUR.enabled


REFUSED: dict[str, tuple[Callable[[bytes], bytes], type[RecordError], str]] = {
    "torn": (lambda xml: xml[: len(xml) // 2], RecordCorruptError, "no longer readable .*not well-formed"),
    "emptied": (lambda _: b"", RecordCorruptError, "no longer readable .the document is empty"),
    "with a document type": (lambda xml: b"<!DOCTYPE d>" + xml, RecordCorruptError, "document type"),
    "what libvirt would not define": (
        lambda xml: xml.replace(b"current='2'", b"current='x'"),
        RecordCorruptError,
        "no longer readable",
    ),
    "large": (lambda xml: xml + b" " * 5_000_000, RecordCorruptError, "larger than"),
    "another name": (
        lambda xml: xml.replace(b"<name>vm<", b"<name>db<"),
        RecordError,
        "somebody has put the document of VM .db",
    ),
    "another uuid": (
        lambda xml: xml.replace(UUID[:8].encode(), b"00000000"),
        RecordError,
        "somebody has put the document of VM",
    ),
    "another maximum": (lambda xml: xml.replace(b">4</vcpu>", b">8</vcpu>"), RecordError, "a maximum of 8 vCPUs"),
    "our element taken out": (
        lambda xml: xml[: xml.index(b"  <metadata>")] + xml[xml.index(b"</metadata>\n") + 12 :],
        RecordError,
        "our own element",
    ),
    "our element edited": (
        lambda xml: xml.replace(b'desired vcpus="0"', b'desired vcpus="0-3"'),
        RecordError,
        "our own element in it was edited",
    ),
    "our element of an earlier save": (
        lambda xml: xml.replace(b'generation="1"', b'generation="0"'),
        RecordError,
        "our own element in it was edited",
    ),
    "our element damaged": (
        lambda xml: xml.replace(b'generation="1"', b'generation="x"'),
        RecordCorruptError,
        "our metadata is damaged",
    ),
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_no_record_of_this_vm_any_more_is_left_alone_until_it_is_put_right(
    open_record: OpenRecord, tmp_path: Path, what: str, way: Way
) -> None:
    edit, kind, told = REFUSED[what]
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR, desired=VcpuMap([0]))
    before = path.read_bytes()
    edited = edit(before)
    assert edited != before
    way(path, edited)
    for _ in range(2):
        with pytest.raises(RecordError, match=told) as caught:
            await record.write(FOUR, intent=INTENT)
        assert type(caught.value) is kind
        assert caught.value.outcome is Outcome.UNCHANGED
        assert path.read_bytes() == edited
    path.write_bytes(before)
    await record.write(FOUR, intent=INTENT)
    found = read_identity(path.read_bytes()).metadata
    assert found is not None
    assert found.intent == INTENT
    await record.close()
    assert listing(tmp_path) == ["vm.xml"]


@pytest.mark.parametrize("what", ["torn", "another name", "our element edited"])
async def test_what_is_left_alone_can_be_removed_and_is_then_written_again(
    open_record: OpenRecord, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(FOUR, desired=VcpuMap([0]))
    path.write_bytes(REFUSED[what][0](path.read_bytes()))
    with pytest.raises(RecordError, match="remove it, and the next save writes what is known"):
        await record.write(FOUR)
    path.unlink()
    await record.write(FOUR, desired=VcpuMap([0, 1]))
    found = read_identity(path.read_bytes())
    assert found.metadata is not None
    assert found.metadata.desired == {0, 1}


async def test_a_document_that_was_removed_is_written_again_with_all_that_was_in_it(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record, layout, more = await own_document(open_record, path)
    await record.write(layout)
    path.write_bytes(with_a_line(path.read_bytes()))
    await record.write(more)
    before = path.read_bytes()
    path.unlink()
    await record.write(more)
    assert outside(path.read_bytes()) == outside(before)


async def test_what_somebody_puts_where_no_record_was_is_left_alone(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    path.write_bytes(b"precious")
    with pytest.raises(RecordError, match="somebody has put a file there"):
        await record.write(FOUR)
    assert path.read_bytes() == b"precious"


def while_it_is_synced(edit: Callable[[], object], times: int) -> Callable[[int, str, Callable[[], Any]], Any]:
    """Edit while the disk is waited for, which is nearly all of the time that a save takes."""
    left = [edit] * times

    def meddle(_count: int, name: str, do: Callable[[], Any]) -> Any:
        if name == "fsync" and left:
            left.pop()()
        return do()

    return meddle


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_an_edit_while_a_save_waits_for_the_disk_is_not_lost(
    open_record: OpenRecord, tmp_path: Path, way: Way
) -> None:
    path = tmp_path / "vm.xml"
    record, layout, more = await own_document(open_record, path)
    await record.write(layout)
    edited = with_a_line(path.read_bytes())
    with meddling(while_it_is_synced(lambda: way(path, edited), 1)):
        await record.write(more)
    assert outside(path.read_bytes()) == outside(edited)
    assert parse(path.read_bytes()).enabled == more.enabled
    assert listing(tmp_path) == [".vm.xml.lock", "vm.xml"]


async def test_somebody_who_never_stops_to_edit_is_told_of_and_loses_nothing(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record, layout, more = await own_document(open_record, path)
    await record.write(layout)
    with (
        meddling(while_it_is_synced(lambda: path.write_bytes(with_a_line(path.read_bytes())), 99)),
        pytest.raises(RecordError, match="changed by somebody else 5 times") as caught,
    ):
        await record.write(more)
    assert caught.value.outcome is Outcome.UNCHANGED
    assert path.read_bytes().count(LINE) == 5
    assert listing(tmp_path) == [".vm.xml.lock", "vm.xml"]


async def test_a_document_of_the_next_boot_that_is_edited_while_it_is_saved_is_left_alone(tmp_path: Path) -> None:
    document, _ = vm_of("cputune-everything")
    path = tmp_path / "vm.xml"
    path.write_bytes(document)
    for load in (True, False):
        config = await DomainConfig.load(path)
        async with DomainConfig.open(path) as held:
            config = config if load else held
            config.set_count(1)
            if not load:
                await save_with_an_edit(config)
        if load:
            await save_with_an_edit(config)
    assert path.read_bytes() == with_a_line(with_a_line(document))
    assert listing(tmp_path) == ["vm.xml"]


async def save_with_an_edit(config: DomainConfig) -> None:
    edit = while_it_is_synced(lambda: config.path.write_bytes(with_a_line(config.path.read_bytes())), 1)
    with meddling(edit), pytest.raises(RecordError, match="changed by somebody else since it was read"):
        await config.save()


async def test_who_reads_meanwhile_sees_a_whole_document_with_the_edit_or_before_it(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record, layout, more = await own_document(open_record, path)
    await record.write(layout)
    seen: list[bytes] = []

    def look(_count: int, _name: str, do: Callable[[], Any]) -> Any:
        result = do()
        seen.append(path.read_bytes())
        return result

    before = with_a_line(path.read_bytes())
    replaced_by_rename(path, before)
    with meddling(look):
        await asyncio.gather(record.write(more), record.write(replace(more, generation=more.generation + 1)))
    assert set(seen) == {before, path.read_bytes()}
