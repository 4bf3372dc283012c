"""A record that an admin edits while a real VM is changed: the edit stays, or nothing is sent."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import Outcome, RecordError
from qmpvcpu.domainxml import parse, read_identity
from qmpvcpu.engine.messages import Persist
from qmpvcpu.testing import Behaviour, MicroGuest
from tests import waiting
from tests.exchange import exchange

pytestmark = pytest.mark.qemu

LINE = b"  <description>added by the admin</description>\n"


@pytest.fixture
async def guest() -> AsyncIterator[MicroGuest]:
    """A VM of its own."""
    async with MicroGuest() as running_guest:
        yield running_guest


async def test_an_edit_of_the_vms_own_document_outlives_the_changes_of_the_vm(
    guest: MicroGuest, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    async with qmpvcpu.attach(guest.qmp, name="web") as vm:
        path.write_bytes(qmpvcpu.domainxml.render(vm.layout))
    async with qmpvcpu.attach(guest.qmp, name="web", record=path, base=path) as vm:
        await vm.plug(3)
        path.write_bytes(path.read_bytes().replace(b"</domain>", LINE + b"</domain>"))
        await vm.plug(4)
        assert LINE in path.read_bytes()
        await vm.set_map("0,4-5")
    assert LINE in path.read_bytes()
    assert parse(path.read_bytes()).enabled == {0, 4, 5}


async def test_a_record_that_is_no_record_any_more_costs_the_change_and_not_what_is_known(
    guest: MicroGuest, tmp_path: Path
) -> None:
    path = tmp_path / "vm.xml"
    async with qmpvcpu.attach(guest.qmp, name="web", record=path) as vm:
        await vm.plug(3)
        before = path.read_bytes()
        edited = before.replace(b"<name>web<", b"<name>db<")
        path.write_bytes(edited)
        with exchange() as sent:
            for change in (vm.plug(4), vm.unplug(3), vm.set_map("0,5")):
                with pytest.raises(RecordError, match=r"somebody has put the document of VM .db") as caught:
                    await change
                assert caught.value.outcome is Outcome.UNCHANGED
        assert not {"device_add", "device_del"} & set(sent)
        assert path.read_bytes() == edited
        path.unlink()
        await vm.set_map("0,3,5")
    found = read_identity(path.read_bytes())
    assert found.metadata is not None
    assert found.name == "web"
    assert found.metadata.desired == {0, 3, 5}


async def test_what_could_not_be_written_is_written_once_the_record_is_put_right_and_at_the_latest_at_the_end(
    guest: MicroGuest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "vm.xml"
    await guest.set_behaviour(Behaviour.hanging())
    async with qmpvcpu.attach(guest.qmp, name="web", record=path) as vm:
        await vm.plug(3)
        await vm.request_unplug(3)
        await vm._driver.request(Persist())
        before = path.read_bytes()
        path.write_bytes(before[:-20])
        await guest.set_behaviour(Behaviour.complying())
        await vm.wait_for(lambda layout: 3 not in layout.enabled, timeout=10)
        await waiting.until(lambda: "no longer readable" in caplog.text)
        with pytest.raises(RecordError, match="no longer readable"):
            await vm._driver.request(Persist())
        path.write_bytes(before)
    assert "no longer readable" in caplog.text
    assert b"<vcpu id='3' enabled='no'" in path.read_bytes()
