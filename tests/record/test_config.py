"""The document of the next boot, on disk: changed where it is to be, or as it was."""

import asyncio
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import ConfigDeniedError, DenialReason, DomainConfig, DomainXmlError, InvalidMapError, VcpuMap
from qmpvcpu.domainxml import Metadata, parse, read_identity, render
from qmpvcpu.errors import Outcome, RecordError, RecordLockedError
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from tests.domainxml.domains import said
from tests.domainxml.examples import layout_of
from tests.record.conftest import listing
from tests.record.faults import meddling, untouched

XML = """<?xml version="1.0"?>
<!-- kept by hand -->
<domain type="qemu" xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm</name>
  <memory>65536</memory>
  <vcpu   current="2">4</vcpu> <!-- four, one day -->
  <cputune><vcpupin vcpu='3' cpuset='1'/></cputune>
  <os><type arch='x86_64'>hvm</type></os>
  <qemu:commandline><qemu:arg value="-S"/></qemu:commandline>
</domain>
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A document of somebody's, in a folder of its own."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "vm.xml").write_text(XML)
    return folder / "vm.xml"


async def test_a_change_is_of_the_vcpus_and_of_no_other_byte(path: Path) -> None:
    config = await DomainConfig.load(path)
    assert said(config.domain) == "00--"
    config.set_count(3)
    assert config.changed
    await config.save()
    assert not config.changed
    assert path.read_text() == XML.replace('current="2"', 'current="3"')
    assert listing(path.parent) == ["vm.xml"]


async def test_all_changes_are_of_the_value_until_they_are_saved(path: Path) -> None:
    config = await DomainConfig.load(path)
    config.set_map("0,3")
    config.set_state(1, enabled=True)
    config.set_state(3, enabled=False)
    config.set_max(6)
    config.set_count(3)
    assert said(config.domain) == "0++---"
    assert said(config.before) == "00--"
    assert path.read_text() == XML
    assert parse(config.to_bytes()).vcpus == config.domain.vcpus
    await config.save()
    assert said((await DomainConfig.load(path)).domain) == "0++---"


async def test_what_is_so_already_is_not_written(path: Path) -> None:
    config = await DomainConfig.load(path)
    before = path.stat()
    config.set_count(4)
    config.set_map("0-1")
    assert config.changed, "what came and left is hotpluggable now"
    config = await DomainConfig.load(path)
    config.set_map([0, 1])
    with meddling(untouched) as calls:
        await config.save()
    assert not {"write", "rename .tmp"} & set(calls)
    assert os.path.samestat(before, path.stat())


async def test_the_file_keeps_its_mode_and_owner(path: Path) -> None:
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    before = path.stat()
    config = await DomainConfig.load(path)
    config.set_count(1)
    await config.save()
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert stat.S_IMODE(after.st_mode) == 0o640
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)


async def test_what_somebody_else_has_changed_meanwhile_is_left_alone(path: Path) -> None:
    config = await DomainConfig.load(path)
    config.set_count(4)
    path.write_text(XML.replace("kept by hand", "changed by hand"))
    with pytest.raises(RecordError, match="changed by somebody else since it was read") as caught:
        await config.save()
    assert caught.value.outcome is Outcome.UNCHANGED
    assert "changed by hand" in path.read_text()
    assert config.changed
    path.unlink()
    with pytest.raises(RecordError, match="changed by somebody else"):
        await config.save()
    assert listing(path.parent) == []


async def test_one_that_is_held_is_nobody_elses_to_change(path: Path) -> None:
    other = await DomainConfig.load(path)
    other.set_count(4)
    async with DomainConfig.open(path) as config:
        with pytest.raises(RecordLockedError, match="this process"):
            await other.save()
        with pytest.raises(RecordLockedError):
            async with DomainConfig.open(path):
                pass
        config.set_count(1)
        await config.save()
        assert listing(path.parent) == [".vm.xml.lock", "vm.xml"]
    assert listing(path.parent) == ["vm.xml"]
    with pytest.raises(RecordError, match="changed by somebody else"):
        await other.save()
    assert said((await DomainConfig.load(path)).domain) == "0---"


async def test_the_lock_goes_whatever_ends_the_block_and_a_cancel_takes_none(path: Path) -> None:
    with pytest.raises(ConfigDeniedError):
        async with DomainConfig.open(path) as config:
            config.set_count(9)
    assert listing(path.parent) == ["vm.xml"]

    async def hold() -> None:
        async with DomainConfig.open(path):
            raise AssertionError("it was cancelled before")

    task = asyncio.create_task(hold())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with DomainConfig.open(path) as config:
        assert not config.changed


async def test_a_symlink_is_never_followed(path: Path) -> None:
    link = path.parent / "link.xml"
    link.symlink_to(path)
    with pytest.raises(RecordError, match="a symlink, which is never followed"):
        await DomainConfig.load(link)
    config = await DomainConfig.load(path)
    config.set_count(4)
    path.rename(path.parent / "moved.xml")
    path.symlink_to(path.parent / "moved.xml")
    with pytest.raises(RecordError, match="a symlink"):
        await config.save()
    assert (path.parent / "moved.xml").read_text() == XML


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
async def test_whatever_call_fails_it_is_the_old_one_or_the_new_one_and_the_error_says_which(
    path: Path, code: int, record_property: Callable[[str, object], None]
) -> None:
    async def life() -> RecordError | None:
        path.write_text(XML)
        try:
            async with DomainConfig.open(path) as config:
                config.set_count(3)
                await config.save()
        except RecordError as error:
            return error
        return None

    with meddling(untouched) as calls:
        assert await life() is None
    told = 0
    for number, name in enumerate(list(calls)):

        def fail(count: int, call: str, do: Callable[[], Any], number: int = number) -> Any:
            if count != number:
                return do()
            if call == "close":
                do()  # Linux closes it, whatever it says
            raise OSError(code, os.strerror(code))

        with meddling(fail):
            error = await life()
        where = f"{number}: {name}, {error}"
        told += error is not None
        replaced = error is None or error.outcome is Outcome.UNKNOWN
        assert path.read_text() == (XML.replace('current="2"', 'current="3"') if replaced else XML), where
        assert error is None or os.strerror(code) in str(error), where
        async with DomainConfig.open(path):
            assert listing(path.parent) == [".vm.xml.lock", "vm.xml"], where
        assert listing(path.parent) == ["vm.xml"], where
    assert told > 5
    record_property("calls that failed once", len(calls))


async def test_a_process_that_dies_with_it_leaves_it_to_the_next_one(path: Path) -> None:
    dying = (
        "import asyncio, os, sys, qmpvcpu\n"
        "async def main():\n"
        "    async with qmpvcpu.DomainConfig.open(sys.argv[1]) as config:\n"
        "        config.set_count(4)\n"
        "        os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", dying, str(path))
    assert await process.wait() == 9
    async with DomainConfig.open(path) as config:
        assert said(config.domain) == "00--"
    assert listing(path.parent) == ["vm.xml"]


BAD: dict[str, tuple[str, type[Exception], str]] = {
    "empty": ("", DomainXmlError, "empty"),
    "torn": (XML[:200], DomainXmlError, "not well-formed"),
    "no domain": ("<network/>", DomainXmlError, "not a <domain>"),
    "entities": (f"<!DOCTYPE domain [<!ENTITY a 'b'>]>{XML}", DomainXmlError, "not accepted|not well-formed"),
    "wrong": (XML.replace('current="2"', 'current="x"'), DomainXmlError, "current"),
    "large": (XML + "<!-- " + "x" * 5_000_000 + " -->", RecordError, "larger than"),
}


@pytest.mark.parametrize("what", BAD)
async def test_what_cannot_be_read_is_told_and_left_alone(path: Path, what: str) -> None:
    content, kind, words = BAD[what]
    path.write_text(content)
    with pytest.raises(kind, match=words):
        await DomainConfig.load(path)
    with pytest.raises(kind, match=words):
        async with DomainConfig.open(path):
            pass
    assert path.read_text() == content
    assert listing(path.parent) == ["vm.xml"]


@pytest.mark.parametrize("uuid", ["<uuid/>", "<uuid></uuid>"])
async def test_an_empty_uuid_is_none_and_stays(path: Path, uuid: str) -> None:
    path.write_text(f"<domain type='kvm'><name>vm</name>{uuid}<vcpu current='2'>8</vcpu></domain>")
    async with DomainConfig.open(path) as config:
        assert config.identity.uuid is None
        config.set_count(4)
        await config.save()
    assert path.read_text() == f"<domain type='kvm'><name>vm</name>{uuid}<vcpu current='4'>8</vcpu></domain>"


async def test_an_error_names_the_file_before_the_line(path: Path) -> None:
    path.write_text(XML.replace('current="2"', 'current="x"'))
    with pytest.raises(DomainXmlError) as refused:
        await DomainConfig.load(path)
    assert str(refused.value).startswith(f"{path}: line {refused.value.line}: <vcpu> current")
    assert refused.value.path == str(path)


async def test_there_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="there is no such file"):
        await DomainConfig.load(tmp_path / "vm.xml")
    with pytest.raises(RecordError, match="not a regular file"):
        await DomainConfig.load("/dev/null")


async def test_what_cannot_be_is_denied_and_changes_nothing(path: Path) -> None:
    config = await DomainConfig.load(path)
    denied: list[tuple[Callable[[], None], DenialReason]] = [
        (lambda: config.set_map("1-2"), DenialReason.BOOT_VCPU),
        (lambda: config.set_count(5), DenialReason.UNKNOWN_VCPU),
        (lambda: config.set_state(4, enabled=True), DenialReason.UNKNOWN_VCPU),
        (lambda: config.set_max(0), DenialReason.UNKNOWN_VCPU),
    ]
    for change, reason in denied:
        with pytest.raises(ConfigDeniedError) as caught:
            change()
        assert caught.value.reason is reason
    with pytest.raises(InvalidMapError):
        config.set_map("0-")
    assert not config.changed


async def test_the_next_boot_in_a_record_is_a_map_beside_the_vm_as_it_runs(tmp_path: Path) -> None:
    layout = layout_of(4, [0, 2], boot=1)
    record = await Record.open(tmp_path / "vm.xml", Claim("vm"))
    await record.write(layout, desired=VcpuMap([0, 2]))
    with pytest.raises(RecordLockedError):
        async with DomainConfig.open(record.path):
            pass
    await record.close()
    before = record.path.read_bytes()
    config = await DomainConfig.load(record.path)
    assert config.is_record
    assert said(config.domain) == "0-b-", "nothing else was asked for"
    config.set_map("0,2-3")
    assert said(config.domain) == "0-bc"
    with pytest.raises(ConfigDeniedError) as caught:
        config.set_max(8)
    assert caught.value.reason is DenialReason.RECORD_MAXIMUM
    config.set_max(4)
    await config.save()
    after = record.path.read_bytes()
    assert parse(after).enabled == {0, 2}, "the rows are of the VM as it runs"
    added = b'<qmpvcpu:next-boot vcpus="0,2-3"/>'
    assert added in after
    unchanged = [line for line in before.splitlines() if b"<qmpvcpu:record" not in line]
    assert [line for line in after.splitlines() if b"<qmpvcpu:record" not in line and added not in line] == unchanged
    metadata, old = read_identity(after).metadata, read_identity(before).metadata
    assert metadata is not None
    assert old is not None
    assert metadata == replace(old, generation=old.generation + 1, next_boot=VcpuMap([0, 2, 3]))
    assert said((await DomainConfig.load(record.path)).domain) == "0-bc"
    again = await Record.open(record.path, Claim("vm"))
    assert again.next_boot == {0, 2, 3}
    await again.write(layout_of(4, [0], boot=1))
    await again.close()
    assert added in record.path.read_bytes(), "it survives what happens to the VM"


CHANGES: dict[str, Callable[[DomainConfig], None]] = {
    "a count": lambda config: config.set_count(3),
    "a higher count": lambda config: config.set_count(4),
    "a lower count": lambda config: config.set_count(1),
    "a hotpluggable count": lambda config: config.set_count(3, hotpluggable=True),
    "a map": lambda config: config.set_map("0,3"),
    "a vCPU more": lambda config: config.set_state(1, enabled=True),
    "a vCPU less": lambda config: config.set_state(2, enabled=False),
}


@pytest.mark.parametrize("second", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
async def test_who_changes_a_record_sees_what_the_next_look_shows(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(render(layout_of(4, [0, 2], boot=1), metadata=Metadata(generation=1)))
    for change in (first, second):
        async with DomainConfig.open(path) as config:
            CHANGES[change](config)
            shown = config.domain
            await config.save()
            assert config.domain == shown
        assert (await DomainConfig.load(path)).domain == shown


@pytest.mark.parametrize("change", CHANGES)
async def test_who_changes_a_document_sees_what_the_next_look_shows(path: Path, change: str) -> None:
    async with DomainConfig.open(path) as config:
        CHANGES[change](config)
        await config.save()
        shown = config.domain
    assert (await DomainConfig.load(path)).domain == shown


def test_a_next_boot_without_vcpu_0_is_no_record_of_ours() -> None:
    xml = render(layout_of(4, [0], boot=1), metadata=Metadata(next_boot=VcpuMap([0, 1])))
    assert read_identity(xml).metadata == Metadata(next_boot=VcpuMap([0, 1]))
    with pytest.raises(DomainXmlError, match="<next-boot>: vcpus: '1' lacks vCPU 0"):
        read_identity(xml.replace(b'<qmpvcpu:next-boot vcpus="0-1"/>', b'<qmpvcpu:next-boot vcpus="1"/>'))


def test_the_package_is_imported_without_xml_and_files_until_they_are_asked_for() -> None:
    lazy = "import sys, qmpvcpu; print([name for name in ('lxml', 'aiofiles') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", lazy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert qmpvcpu.DomainConfig is DomainConfig
