"""A record that holds more than ours is changed in place, from the first save to the last: nothing of it is lost."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qmpvcpu.domainxml import parse, read_identity
from qmpvcpu.errors import RecordCorruptError, RecordError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.record.owner import Claim
from qmpvcpu.record.record import Record
from tests.domainxml.documents import SAMPLES, one_plugged, outside, started_from
from tests.domainxml.examples import Q35, layout_of
from tests.record.conftest import UUID, OpenRecord, listing
from tests.record.test_corrupt import OURS, XINCLUDE, changed
from tests.record.test_record import INTENT, LAYOUT

FOUR = replace(LAYOUT, vm=replace(Q35, uuid=UUID))
MORE = {
    "XInclude for a name": changed("<name>vm<", f"<name>vm{XINCLUDE}<"),
    "XInclude in the vCPUs": changed("<vcpus>", f"<vcpus>{XINCLUDE}"),
    "XInclude beside our own element": changed("<metadata>", f"<metadata>{XINCLUDE}"),
    "metadata of somebody else": changed("<metadata>", "<metadata><o:os xmlns:o='urn:o'/>"),
    "somebody's element further down": changed("<acpi/>", "<acpi/><o:x xmlns:o='urn:o'/>"),
    "QEMU's arguments": changed(
        "<devices>", "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'/><devices>"
    ),
    "a disk": changed("<devices>", "<devices><disk/>"),
    "shares of the host's CPUs": changed("</vcpus>", "</vcpus><cputune><shares>2</shares></cputune>"),
    "a pin of an I/O thread": changed(
        "</vcpus>", "</vcpus><cputune><iothreadpin iothread='1' cpuset='0'/></cputune>"
    ),
    "a placement by numad": changed("<vcpu placement='static'", "<vcpu placement='auto'"),
    "a comment": changed("<devices>", "<!-- by hand --><devices>"),
}


def vm_of(case: str, name: str = "vm") -> tuple[bytes, Layout]:
    """Return a sample under another name, and the layout of its VM as libvirt starts it."""
    document = re.sub(rb"<name>[^<]*<", b"<name>%b<" % name.encode(), SAMPLES[case])
    return document, started_from(parse(document))


@pytest.mark.parametrize("case", MORE)
async def test_what_others_wrote_into_a_record_is_still_there_after_a_save(
    open_record: OpenRecord, tmp_path: Path, case: str
) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(MORE[case])
    record = await open_record(path)
    assert record.previous is not None
    await record.write(FOUR, desired=VcpuMap([0]))
    written = path.read_bytes()
    assert outside(written) == outside(MORE[case])
    found = read_identity(written)
    assert found.metadata is not None
    assert found.metadata.generation == 2
    assert found.metadata.desired == {0}
    assert found.metadata.intent is None
    await record.write(FOUR, desired=VcpuMap([0]))
    assert path.read_bytes() == written.replace(b'generation="2"', b'generation="3"')


async def test_a_record_of_ours_alone_is_written_anew(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(OURS.replace(b"65536", b"1024"))
    await (await open_record(path)).write(FOUR)
    assert b"<memory unit='KiB'>65536</memory>" in path.read_bytes()
    assert b"in-place" not in path.read_bytes()


@pytest.mark.parametrize(
    "case", ["comments-everywhere", "cputune-everything", "metadata-of-others", "minimal", "crlf"]
)
@pytest.mark.parametrize("as_path", [True, False], ids=["its path", "its bytes"])
async def test_a_record_starts_from_a_document_and_stays_that_document(
    open_record: OpenRecord, tmp_path: Path, case: str, *, as_path: bool
) -> None:
    document, layout = vm_of(case)
    given = tmp_path / "given.xml"
    given.write_bytes(document)
    path = tmp_path / "vm.xml"
    record = await open_record(path, uuid=layout.vm.uuid, base=given if as_path else document)
    assert record.previous is None
    assert not path.exists()
    await record.write(layout)
    assert without_uuid(outside(path.read_bytes())) == without_uuid(outside(document))
    after = one_plugged(layout)
    assert after is not None
    await record.write(after, desired=after.enabled)
    await record.close()
    assert given.read_bytes() == document
    # The next one needs not be told, and finds the same document again, plain as it may look.
    again = await open_record(path, uuid=layout.vm.uuid)
    assert again.previous is not None
    await again.write(layout)
    written = path.read_bytes()
    assert without_uuid(outside(written)) == without_uuid(outside(document))
    assert parse(written).enabled == layout.enabled
    found = read_identity(written).metadata
    assert found is not None
    assert found.in_place
    assert found.generation == 3


def without_uuid(xml: bytes) -> bytes:
    return re.sub(rb"\s*<uuid>.*</uuid>", b"", xml)


async def test_a_document_without_uuid_gets_that_of_the_vm_or_one_made_up_for_it(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    document, layout = vm_of("minimal")
    named = await open_record(tmp_path / "named.xml", uuid=UUID, base=document)
    await named.write(layout)
    assert read_identity(named.path.read_bytes()).uuid == UUID
    path = tmp_path / "vm.xml"
    record = await open_record(path, uuid=None, base=document)
    await record.write(layout)
    await record.close()
    assert read_identity(path.read_bytes()).uuid == record.uuid
    assert b"</name>\n  <uuid>" in path.read_bytes()
    assert (await open_record(path, uuid=None)).uuid == record.uuid


@pytest.mark.parametrize("uuid", [b"<uuid/>", b"<uuid></uuid>"])
async def test_an_empty_uuid_is_filled_in(open_record: OpenRecord, tmp_path: Path, uuid: bytes) -> None:
    document, layout = vm_of("minimal")
    record = await open_record(tmp_path / "vm.xml", base=document.replace(b"</name>", b"</name>" + uuid))
    await record.write(layout)
    assert read_identity(record.path.read_bytes()).uuid == UUID
    assert record.path.read_bytes().count(b"<uuid") == 1


async def test_a_base_that_cannot_be_read_is_named(open_record: OpenRecord, tmp_path: Path) -> None:
    base = tmp_path / "own.xml"
    base.write_bytes(b"<domain>")
    with pytest.raises(RecordError, match=f"cannot be started from that document: {base}: line 1: not well-formed"):
        await open_record(tmp_path / "vm.xml", base=base)
    with pytest.raises(RecordError, match="cannot be started from that document: line 1: not well-formed"):
        await open_record(tmp_path / "vm.xml", base=base.read_bytes())


async def test_a_qemu_without_uuid_keeps_that_of_its_document(open_record: OpenRecord, tmp_path: Path) -> None:
    document, layout = vm_of("crlf")
    path = tmp_path / "vm.xml"
    record = await open_record(path, uuid=None, base=document)
    await record.write(replace(layout, vm=replace(layout.vm, uuid=None)))
    await record.close()
    assert read_identity(path.read_bytes()).uuid == layout.vm.uuid
    assert (await open_record(path, uuid=None)).previous is not None


async def test_a_document_in_the_records_place_becomes_the_record_only_if_that_is_said(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    document, layout = vm_of("tabs")
    path = tmp_path / "vm.xml"
    path.write_bytes(document)
    for base in (None, SAMPLES["crlf"]):
        with pytest.raises(RecordCorruptError, match="base= with this path makes it the record"):
            await open_record(path, uuid=layout.vm.uuid, base=base)
    assert path.read_bytes() == document
    record = await open_record(path, uuid=layout.vm.uuid, base=path)
    await record.write(layout)
    assert outside(path.read_bytes()) == outside(document)
    assert read_identity(path.read_bytes()).metadata is not None


async def test_a_document_is_not_looked_at_where_a_record_is(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(OURS)
    record = await open_record(path, base=tmp_path / "missing.xml")
    assert record.previous is not None
    await record.write(FOUR)
    assert b"in-place" not in path.read_bytes()


@pytest.mark.parametrize(
    ("document", "told"),
    [
        (SAMPLES["crlf"], f"the document of VM 'windows-made', with uuid .*, not of one with uuid {UUID}"),
        (vm_of("crlf")[0], f"the document of VM 'vm', with uuid .*, not of one with uuid {UUID}"),
        (b"<domain", "not well-formed"),
        (b"<!DOCTYPE d><domain type='kvm'><name>vm</name></domain>", "document type"),
        (b"<domain type='kvm'><name>vm</name><vcpu>-1</vcpu></domain>", "libvirt at define"),
        (OURS.replace(b"record:1", b"record:2"), "newer version"),
    ],
)
async def test_a_document_that_no_record_can_start_from_is_refused(
    open_record: OpenRecord, tmp_path: Path, document: bytes, told: str
) -> None:
    with pytest.raises(RecordError, match=told):
        await open_record(tmp_path / "vm.xml", base=document)
    assert listing(tmp_path) == []


async def test_a_document_that_is_missing_is_named(open_record: OpenRecord, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"other\.xml: is not there"):
        await open_record(tmp_path / "vm.xml", base=tmp_path / "other.xml")
    assert listing(tmp_path) == []


async def test_a_vm_with_another_maximum_than_its_document_is_not_recorded_in_it(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    document, _ = vm_of("minimal")
    record = await open_record(tmp_path / "vm.xml", base=document)
    with pytest.raises(RecordError, match="a maximum of 4 vCPUs, and QEMU has 8"):
        await record.write(layout_of(8, [0], boot=1))
    assert not record.path.exists()


async def test_a_save_that_failed_is_made_up_for_by_the_next(open_record: OpenRecord, tmp_path: Path) -> None:
    document, layout = vm_of("comments-everywhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    record = await open_record(folder / "vm.xml", uuid=layout.vm.uuid, base=document)
    more = one_plugged(layout)
    assert more is not None
    await record.write(layout)
    folder.rename(tmp_path / "away")
    with pytest.raises(RecordError):
        await record.write(more, intent=INTENT)
    (tmp_path / "away").rename(folder)
    await record.write(more)
    written = record.path.read_bytes()
    assert parse(written).enabled == more.enabled
    assert outside(written) == outside(document)
    found = read_identity(written).metadata
    assert found is not None
    assert found.intent is None


async def test_a_cancelled_opening_with_a_document_leaves_no_lock(tmp_path: Path) -> None:
    document, layout = vm_of("tabs")
    opening = asyncio.ensure_future(Record.open(tmp_path / "vm.xml", Claim("vm", layout.vm.uuid), base=document))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    record = await Record.open(tmp_path / "vm.xml", Claim("vm", layout.vm.uuid), base=document)
    await record.write(layout)
    await record.close()
    assert listing(tmp_path) == ["vm.xml"]
