"""What cannot be trusted is told as such and left exactly as it is."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpvcpu.domainxml import NAMESPACE, Instance, Metadata, render
from qmpvcpu.errors import Outcome, RecordCorruptError, RecordError
from qmpvcpu.model.transition import Action, Intent, Step
from qmpvcpu.model.vcpumap import VcpuMap
from tests.domainxml.examples import Q35, layout_of
from tests.domainxml.test_read_identity import HOSTILE
from tests.record.conftest import UUID, OpenRecord, listing

INTENT = Intent(VcpuMap([0, 2]), VcpuMap([0, 3]), (Step(Action.PLUG, VcpuMap([3])),))
OURS = render(
    replace(layout_of(4, [0, 2], boot=1), vm=replace(Q35, uuid=UUID)),
    emulator="/bin/qemu",
    metadata=Metadata(generation=1, instance=Instance(7, 8), intent=INTENT, desired=VcpuMap([0, 3])),
)


def changed(old: str, new: str) -> bytes:
    text = OURS.decode()
    assert old in text
    return text.replace(old, new, 1).encode()


XINCLUDE = '<x:include xmlns:x="http://www.w3.org/2001/XInclude" href="/etc/passwd" parse="text"/>'
CORRUPT = {
    **{name: (document.encode(), "document type is not accepted") for name, document in HOSTILE.items()},
    "empty": (b"", "empty"),
    "a disk's zeros": (bytes(4096), "not well-formed"),
    "half of it": (OURS[: len(OURS) // 2], "not well-formed"),
    "two in one": (OURS + OURS, "not well-formed"),
    "zeros at its end": (OURS[:-600] + bytes(600), "not well-formed"),
    "JSON": (b'{"vcpus": 4}', "not well-formed"),
    "another kind of document": (b"<network><name>vm</name></network>", "a <network>, not a <domain>"),
    "UTF-16": (OURS.decode().encode("utf-16"), "not UTF-8"),
    "Latin-1": (changed("<name>vm<", "<name>\u00fc<").decode().encode("latin-1"), "line 2: not UTF-8"),
    "an entity of its own": (changed("<name>vm<", "<name>&vm;<"), "line 2: not well-formed"),
    "a document type at its end": (OURS + b"<!DOCTYPE domain>", "document type"),
    "XInclude in our own element": (changed("<qmpvcpu:desired", f"{XINCLUDE}<qmpvcpu:desired"), "XInclude"),
    "XInclude in a step": (changed("<qmpvcpu:step", f"{XINCLUDE}<qmpvcpu:step"), "XInclude"),
    "a document of libvirt's": (b"<domain type='kvm'><name>vm</name></domain>", "base= with this path"),
    "another's disk and vCPUs that libvirt refuses": (
        changed("<acpi/>", "<acpi/><pae/>").replace(b"'2' enabled='yes'", b"'9' enabled='yes'"),
        "vCPU ids run from 0",
    ),
    "a newer format": (changed(NAMESPACE, f"{NAMESPACE[:-1]}2"), "written by a newer version"),
    "a newer attribute": (changed('generation="1"', 'generation="1" seal="x"'), "written by a newer version"),
    "a newer element": (changed("<qmpvcpu:desired", "<qmpvcpu:pins/><qmpvcpu:desired"), "written by a newer version"),
    "a damaged generation": (changed('generation="1"', 'generation="l"'), "line 5: our metadata is damaged"),
    "a damaged wish": (changed('<qmpvcpu:desired vcpus="0,3"', '<qmpvcpu:desired vcpus="0,"'), "metadata is damaged"),
    "a damaged step": (changed('action="plug"', 'action="PLUG"'), "our metadata is damaged: <step>"),
}


@pytest.mark.parametrize("case", CORRUPT)
async def test_it_is_told_and_the_file_keeps_its_bytes_its_time_and_its_inode(
    open_record: OpenRecord, tmp_path: Path, case: str
) -> None:
    data, told = CORRUPT[case]
    path = tmp_path / "vm.xml"
    path.write_bytes(data)
    os.utime(path, (1, 1))
    before = path.stat()
    with pytest.raises(RecordCorruptError, match=re.escape(told)) as refused:
        await open_record(path)
    assert refused.value.outcome is Outcome.UNCHANGED
    assert str(path) in str(refused.value)
    assert "left alone" in str(refused.value)
    after = path.stat()
    assert path.read_bytes() == data
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)
    assert listing(tmp_path) == ["vm.xml"]


async def test_a_hundred_megabytes_are_refused_for_their_size_before_they_are_read(
    open_record: OpenRecord, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(OURS)
    os.truncate(path, 100_000_000)
    with pytest.raises(RecordCorruptError, match="larger than 4194304 bytes"):
        await open_record(path)
    assert path.stat().st_size == 100_000_000
    assert listing(tmp_path) == ["vm.xml"]


async def test_the_whole_of_it_is_a_record(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    path.write_bytes(OURS)
    record = await open_record(path)
    assert record.previous is not None
    assert record.previous.metadata is not None
    assert record.previous.metadata.intent == INTENT


@given(cut=st.integers(0, len(OURS.rstrip()) - 1), filler=st.sampled_from([b"", b"\0", b" ", b"<"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_torn_anywhere_it_is_no_record(
    open_record: OpenRecord, tmp_path: Path, cut: int, filler: bytes
) -> None:
    path = tmp_path / "vm.xml"
    torn = OURS[:cut] + filler * (len(OURS) - cut)
    path.write_bytes(torn)
    with pytest.raises(RecordCorruptError):
        await open_record(path)
    assert path.read_bytes() == torn


async def test_what_is_told_of_a_hostile_document_is_short(open_record: OpenRecord, tmp_path: Path) -> None:
    path = tmp_path / "vm.xml"
    long = "x" * 40_000
    for document in (
        changed("<name>vm<", f"<name>{long * 90}<").replace(UUID.encode(), b"7" + UUID[1:].encode()),
        f"<{long}/>".encode(),
        changed('<qmpvcpu:desired vcpus="0,3"', f'<qmpvcpu:desired vcpus="{long * 90}"'),
        f"<domain><name>{long}</name></domain>".encode(),
    ):
        path.write_bytes(document)
        with pytest.raises(RecordError) as refused:
            await open_record(path)
        assert len(str(refused.value)) < 1000
