"""The record of one VM: its own and nobody else's, and never smaller than what was there."""

import asyncio
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qmpvcpu.domainxml import Instance, Metadata, read_identity, render
from qmpvcpu.errors import RecordCorruptError, RecordError
from qmpvcpu.model.options import OnFailure
from qmpvcpu.model.transition import Action, Direction, Intent, Step
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.record.owner import instance_of, same_instance
from tests.domainxml.examples import Q35, layout_of, vcpu_rows
from tests.record.conftest import UUID, OpenRecord, listing

LAYOUT = layout_of(4, [0, 2], boot=1)
INTENT = Intent(
    VcpuMap([0, 2]),
    VcpuMap([0, 3]),
    (
        Step(Action.PLUG, VcpuMap([3])),
        Step(Action.UNPLUG, VcpuMap([2]), "/machine/peripheral/vcpu2", joins=True),
        Step(Action.KEEP, VcpuMap([0]), "/machine/unattached/device[0]"),
    ),
    OnFailure.REVERT,
    12.5,
    Direction.REVERTING,
)


async def test_a_vm_without_uuid_keeps_the_one_made_up_for_it_from_run_to_run(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    first = await open_record(path, uuid=None)
    assert first.previous is None
    await first.write(LAYOUT)
    await first.close()
    again = await open_record(path, uuid=None)
    assert again.uuid == first.uuid == read_identity(path.read_bytes()).uuid
    await again.write(LAYOUT)
    assert read_identity(path.read_bytes()).uuid == first.uuid


async def test_a_vm_that_libvirt_started_from_the_record_has_that_uuid_and_is_the_same_vm(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    before = await open_record(path, uuid=None)
    await before.write(LAYOUT)
    await before.close()
    after = await open_record(path, uuid=before.uuid)
    assert after.uuid is None
    assert after.previous is not None


async def test_what_is_written_tells_the_state_the_emulator_and_the_instance(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path, emulator="/bin/qemu", instance=Instance(7, 8))
    layout = replace(LAYOUT, vm=replace(Q35, uuid=UUID), pending_slots=frozenset({2}))
    await record.write(layout)
    assert path.read_bytes() == render(
        layout, emulator="/bin/qemu", metadata=Metadata(generation=1, instance=Instance(7, 8)).with_layout(layout)
    )


async def test_an_intent_and_a_wish_are_there_for_the_next_one_and_go_with_the_save_that_has_none(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    for given in (INTENT, None):
        record = await open_record(path, uuid=None)
        await record.write(LAYOUT, intent=given, desired=VcpuMap([0, 3]))
        await record.close()
        again = await open_record(path, uuid=None)
        assert again.previous is not None
        assert again.previous.metadata is not None
        assert again.previous.metadata.intent == given
        assert again.previous.metadata.desired == {0, 3}
        await again.close()


async def test_a_qemu_that_is_found_again_as_another_instance_is_in_the_next_save(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    record = await open_record(tmp_path / "vm.xml", instance=Instance(7, 8))
    await record.write(LAYOUT)
    record.instance = Instance(9, 10)
    await record.write(LAYOUT)
    metadata = read_identity(record.path.read_bytes()).metadata
    assert metadata is not None
    assert metadata.instance == Instance(9, 10)


async def test_an_intent_that_cannot_be_written_is_an_error_and_the_record_stays(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    record = await open_record(tmp_path / "vm.xml")
    await record.write(LAYOUT)
    before = record.path.read_bytes()
    with pytest.raises(RecordError, match="nan is not a time"):
        await record.write(LAYOUT, intent=replace(INTENT, timeout=float("nan")))
    assert record.path.read_bytes() == before


async def test_the_generation_goes_on_from_the_last_run(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    for expected in (1, 2, 3):
        record = await open_record(path)
        await record.write(replace(LAYOUT, vm=replace(Q35, uuid=UUID)))
        await record.close()
        metadata = read_identity(path.read_bytes()).metadata
        assert metadata is not None
        assert metadata.generation == expected


OURS = render(replace(LAYOUT, vm=replace(Q35, uuid=UUID)), metadata=Metadata(generation=1)).decode()
REFUSED = {
    "another uuid": (OURS.replace(UUID, UUID.replace("6f", "7f")), "a VM with uuid 7f9e"),
    "no uuid": (re.sub("<uuid>.*</uuid>", "", OURS), "a VM with no uuid"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_another_vms_record_is_refused_and_left_alone(
    open_record: OpenRecord, tmp_path: Path, case: str
) -> None:
    text, told = REFUSED[case]
    path = tmp_path / "vm.xml"
    path.write_text(text)
    with pytest.raises(RecordError, match=re.escape(told)) as refused:
        await open_record(path)
    assert not isinstance(refused.value, RecordCorruptError)
    assert path.read_text() == text
    assert listing(tmp_path) == ["vm.xml"]


async def test_the_record_of_a_vm_that_has_a_uuid_is_not_taken_for_one_that_has_none(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    path.write_text(OURS)
    with pytest.raises(RecordError, match="this QEMU has no uuid"):
        await open_record(path, uuid=None)


async def test_a_record_cannot_be_opened_in_a_missing_folder_or_through_a_symlink(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    (tmp_path / "link.xml").symlink_to(tmp_path / "target.xml")
    for path in (tmp_path / "link.xml", tmp_path / "missing" / "vm.xml"):
        with pytest.raises(RecordError):
            await open_record(path)


async def test_opening_removes_what_killed_writers_left(open_record: OpenRecord, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f".vm.xml.0000000{number}.tmp").touch()
    (tmp_path / ".other.xml.00000000.tmp").touch()
    await (await open_record(tmp_path / "vm.xml")).close()
    assert listing(tmp_path) == [".other.xml.00000000.tmp"]


async def test_a_layout_that_libvirt_has_no_domain_for_is_an_error_and_the_record_stays(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    await record.write(LAYOUT)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="memory size"):
        await record.write(replace(LAYOUT, vm=replace(Q35, memory_kib=None)))
    assert path.read_bytes() == before
    await record.write(layout_of(4, [0], boot=1))
    assert path.read_bytes() != before


async def test_of_many_writes_at_once_the_last_is_on_disk_after_two_saves(
    open_record: OpenRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    rename = os.rename
    saves: list[str] = []

    def count_and_rename(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        saves.append(new)
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "rename", count_and_rename)
    plugged = [[0, *range(1, most + 1)] for most in range(8)]
    first = asyncio.create_task(record.write(layout_of(8, plugged[0], boot=1)))
    await asyncio.sleep(0)
    await asyncio.gather(*(record.write(layout_of(8, each, boot=1)) for each in plugged[1:]))
    await first
    assert saves == ["vm.xml"] * 2
    assert [row[1] for row in vcpu_rows(path.read_bytes())] == ["yes"] * 8


async def test_a_write_returns_when_its_layout_or_a_later_one_is_on_disk(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)

    async def write_and_look(most: int) -> None:
        await record.write(layout_of(9, range(most), boot=1))
        enabled = [row for row in vcpu_rows(path.read_bytes()) if row[1] == "yes"]
        assert len(enabled) >= most

    await asyncio.gather(*(write_and_look(most) for most in range(1, 10)))


async def test_a_cancelled_write_is_written_all_the_same_and_closing_waits_for_it(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    record = await open_record(path)
    write = asyncio.create_task(record.write(LAYOUT))
    await asyncio.sleep(0)
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    await record.close()
    assert len(vcpu_rows(path.read_bytes())) == LAYOUT.max


async def test_a_save_that_fails_is_told_to_all_who_wait_for_it_and_the_next_one_is_tried(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    record = await open_record(folder / "vm.xml")
    shutil.rmtree(folder)
    failed = await asyncio.gather(*(record.write(LAYOUT) for _ in range(3)), return_exceptions=True)
    assert [type(each) for each in failed] == [RecordError] * 3
    folder.mkdir()
    await record.write(LAYOUT)
    assert (folder / "vm.xml").exists()


async def test_the_end_of_the_loop_in_the_middle_of_a_write_cancels_who_waits(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    record = await open_record(tmp_path / "vm.xml")
    write = asyncio.create_task(record.write(LAYOUT))
    await asyncio.sleep(0)
    writer = next(task for task in asyncio.all_tasks() if task.get_name() == "record vm.xml")
    await asyncio.sleep(0)
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    assert (tmp_path / "vm.xml").exists()


def test_an_instance_is_known_by_its_thread_and_when_that_started() -> None:
    ours = instance_of(os.getpid(), os.getpid())
    assert ours is not None
    assert ours.host_tid == os.getpid()
    assert ours.start_ticks is not None
    assert instance_of(os.getpid(), os.getpid()) == ours
    assert instance_of(7, None) == Instance(7)  # on another host
    assert instance_of(2**22 + 1, os.getpid()) == Instance(2**22 + 1)  # it has ended
    assert instance_of(None, os.getpid()) is None


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (Instance(7, 8), Instance(7, 8), True),
        (Instance(7, 8), Instance(7, 9), False),
        (Instance(7, 8), Instance(9, 8), False),
        (Instance(7), Instance(7, 8), True),
        (Instance(7, 8), Instance(7), True),
        (Instance(7), Instance(9), False),
        (None, Instance(7, 8), True),
        (Instance(7, 8), None, True),
        (None, None, True),
    ],
)
def test_another_instance_is_told_on_evidence_only(
    before: Instance | None, now: Instance | None, *, same: bool
) -> None:
    assert same_instance(before, now) is same
