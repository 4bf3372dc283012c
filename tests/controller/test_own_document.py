"""A VM whose libvirt document is kept as its record: attached to, changed, left, and found again."""

from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.domainxml import parse, read_identity
from qmpvcpu.errors import RecordCorruptError, RecordError
from qmpvcpu.testing import MicroGuest
from tests.domainxml.documents import outside
from tests.record.conftest import listing

pytestmark = pytest.mark.qemu

DOCUMENT = b"""<domain type="kvm" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <name>web</name> <!-- the shop -->
  <memory unit="MiB">16</memory>
  <vcpu placement="static" cpuset="0-1">8</vcpu> <!-- enough -->
  <cputune>
    <vcpupin vcpu="3" cpuset="1"/>
  </cputune>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
  </os>
  <features><acpi/></features>
  <devices>
    <disk type="file" device="disk">
      <source file="/srv/web.img"/>
      <target dev="vda" bus="virtio"/>
    </disk>
  </devices>
  <qemu:commandline>
    <qemu:arg value="-nodefaults"/>
  </qemu:commandline>
</domain>
"""


async def test_a_vm_goes_on_in_its_own_document_and_is_found_in_it_again(tmp_path: Path) -> None:
    path = tmp_path / "web.xml"
    path.write_bytes(DOCUMENT)
    async with MicroGuest() as guest:
        async with qmpvcpu.attach(guest.qmp, name="web", record=path, base=path) as vm:
            await vm.plug(3)
            await vm.plug(1)
            await vm.set_map("0,3,5")
        said = parse(path.read_bytes())
        assert said.enabled == {0, 3, 5}
        assert said.order == (3, 5)
        assert said.pins == parse(DOCUMENT).pins
        async with qmpvcpu.attach(guest.qmp, name="web", record=path) as vm:
            await vm.set_map("0")
    written = path.read_bytes()
    assert parse(written).enabled == {0}
    uuid = read_identity(written).uuid
    assert uuid is not None
    assert outside(written).replace(f"\n  <uuid>{uuid}</uuid>".encode(), b"") == outside(DOCUMENT)


async def test_a_document_without_our_element_is_left_alone_with_a_word_on_how_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "web.xml"
    path.write_bytes(DOCUMENT)
    async with MicroGuest() as guest:
        with pytest.raises(RecordCorruptError, match="base= with this path makes it the record"):
            await qmpvcpu.attach(guest.qmp, name="web", record=path)
        assert path.read_bytes() == DOCUMENT


async def test_the_document_of_a_vm_with_another_maximum_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "web.xml"
    async with MicroGuest(max_vcpus=4) as guest:
        with pytest.raises(RecordError, match="a maximum of 8 vCPUs, and QEMU has 4"):
            await qmpvcpu.attach(guest.qmp, name="web", record=path, base=DOCUMENT)
        assert listing(tmp_path) == []


async def test_a_document_without_a_record_to_start_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="it needs record="):
        await qmpvcpu.attach("/nowhere", base=DOCUMENT)
