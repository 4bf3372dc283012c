"""Which VM it is, by real QEMUs: never by the file name of its socket."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import Affect, DomainConfig, MonitorLostError, RecordError, VcpuMap
from qmpvcpu.domainxml import domain_from, render, update
from qmpvcpu.events import InstanceChanged, Reconnected
from qmpvcpu.testing import Behaviour, MicroGuest
from tests.controller.vms import other_client, until

pytestmark = pytest.mark.qemu

UUID = "8e9a45f1-0b52-4f1e-9d0c-3a5a7f6b2c11"
WHO = {"uuid": ("-uuid", UUID), "name": ("-name", "web"), "neither": ()}


@contextlib.asynccontextmanager
async def at(address: Path, *who: str, **options: object) -> AsyncIterator[MicroGuest]:
    """A VM whose QMP socket is *address*; a second one leads to it too."""
    address.parent.mkdir(exist_ok=True)
    async with MicroGuest(extra_args=who, **options) as guest:  # type: ignore[arg-type]  # passed on
        address.unlink(missing_ok=True)
        address.symlink_to(guest.qmp)
        yield guest


async def test_two_nameless_vms_at_sockets_of_one_name_do_not_share_a_record(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    one, two = tmp_path / "a" / "qmp.sock", tmp_path / "b" / "qmp.sock"
    async with at(one), at(two):
        async with qmpvcpu.attach(one, record=record) as vm:
            assert not vm.layout.vm.named
            await vm.plug(3)
        before = record.read_bytes()
        with pytest.raises(RecordError, match="neither a uuid nor a name"):
            await qmpvcpu.attach(two, record=record)
        with pytest.raises(RecordError, match="still runs"):  # nor if somebody calls it so
            await qmpvcpu.attach(two, record=record, name="qmp")
        assert record.read_bytes() == before
    async with at(two):  # nor once the first is gone: nothing tells that this is not another VM
        with pytest.raises(RecordError, match="neither a uuid nor a name"):
            await qmpvcpu.attach(two, record=record)
        async with qmpvcpu.attach(two, record=record, name="qmp") as vm:  # but who knows may say so
            assert vm.previous is not None
            assert vm.previous.enabled == VcpuMap.parse("0,3")


async def test_the_record_of_another_living_vm_is_not_taken_as_the_document_of_the_next_boot(tmp_path: Path) -> None:
    record = tmp_path / "vm.xml"
    one, two = tmp_path / "a" / "qmp.sock", tmp_path / "b" / "qmp.sock"
    async with at(two):
        async with at(one):
            async with qmpvcpu.attach(one, record=record):
                pass
            before = record.read_bytes()
            for name in (None, "qmp"):
                with pytest.raises(RecordError, match="whose QEMU still runs"):
                    await qmpvcpu.attach(two, config=record, name=name)
            assert record.read_bytes() == before
            async with qmpvcpu.attach(one, config=record) as vm:  # its own it may change
                await vm.set_count(4, affect=Affect.CONFIG)
        async with qmpvcpu.attach(two, config=record) as vm:  # once that VM is gone, the caller decides
            assert (await DomainConfig.load(record)).domain.current == 4


@pytest.mark.parametrize("who", WHO)
async def test_one_vm_through_two_sockets_has_one_record(tmp_path: Path, who: str) -> None:
    record = tmp_path / "vm.xml"
    async with at(tmp_path / "qmp.sock", *WHO[who], behaviour=Behaviour.hanging()) as guest:
        async with qmpvcpu.attach(tmp_path / "qmp.sock", record=record) as vm:
            name = vm.layout.vm.name
            await vm.plug(3)
            await vm.request_unplug(3)
        assert f"<name>{name}</name>".encode() in record.read_bytes()
        async with qmpvcpu.attach(guest.sockets[1], record=record) as vm:
            assert vm.layout.pending == {3}
            assert vm.layout.vm.name == name
        assert f"<name>{name}</name>".encode() in record.read_bytes()


@pytest.mark.parametrize("who", ["uuid", "name"])
async def test_a_vm_that_is_started_again_is_the_same_and_its_copy_is_not_while_it_runs(
    tmp_path: Path, who: str
) -> None:
    record = tmp_path / "vm.xml"
    async with at(tmp_path / "one.sock", *WHO[who]):
        async with qmpvcpu.attach(tmp_path / "one.sock", record=record) as vm:
            await vm.plug(3)
        async with at(tmp_path / "two.sock", *WHO[who]):
            for read_only in (False, True):
                with pytest.raises(RecordError, match=r"still runs \(its vCPU 0 is thread \d+\)"):
                    await qmpvcpu.attach(tmp_path / "two.sock", record=record, read_only=read_only)
    async with at(tmp_path / "two.sock", *WHO[who]), qmpvcpu.attach(tmp_path / "two.sock", record=record) as vm:
        event = await anext(vm.events())
        assert isinstance(event, InstanceChanged)
        assert vm.previous is not None


async def test_a_document_is_not_told_by_the_name_of_a_socket(tmp_path: Path) -> None:
    document, record = tmp_path / "own.xml", tmp_path / "vm.xml"
    async with at(tmp_path / "web.sock"):
        async with qmpvcpu.attach(tmp_path / "web.sock", name="db") as vm:
            document.write_bytes(render(vm.layout))
        cases: list[dict[str, Any]] = [{"config": document}, {"record": record, "base": document}]
        for options in cases:
            with pytest.raises(RecordError, match="not of 'web'"):
                await qmpvcpu.attach(tmp_path / "web.sock", name="web", **options)
            async with qmpvcpu.attach(tmp_path / "web.sock", **options):  # who names it says whose it is
                pass


async def test_a_document_with_the_vms_uuid_is_its_own_under_any_name(tmp_path: Path) -> None:
    document, record = tmp_path / "own.xml", tmp_path / "vm.xml"
    async with at(tmp_path / "qmp.sock", "-uuid", UUID):
        async with qmpvcpu.attach(tmp_path / "qmp.sock") as vm:
            layout = vm.layout
        renamed = render(layout).replace(b"<name>qmp<", b"<name>guest1<")
        document.write_bytes(update(renamed, domain_from(layout)))
        async with qmpvcpu.attach(tmp_path / "qmp.sock", record=record, base=document) as vm:
            assert vm.layout.vm.name == "guest1"
        async with qmpvcpu.attach(tmp_path / "qmp.sock", record=record) as vm:
            assert vm.layout.vm.name == "guest1"


@pytest.mark.parametrize("who", WHO)
async def test_another_qemu_at_the_same_address_is_the_vm_if_uuid_or_name_say_so(tmp_path: Path, who: str) -> None:
    address = tmp_path / "qmp.sock"
    async with contextlib.AsyncExitStack() as first, contextlib.AsyncExitStack() as second:
        await first.enter_async_context(at(address, *WHO[who]))
        vm = await second.enter_async_context(qmpvcpu.attach(address, reconnect=True))
        events = vm.events()
        await first.aclose()
        await second.enter_async_context(at(address, *WHO[who]))
        if who == "neither":
            with pytest.raises(MonitorLostError, match="neither a uuid nor a name"):
                await vm.wait_for(lambda _: False, timeout=20)
        else:
            assert any(isinstance(event, InstanceChanged) for event in await until(events, Reconnected))


async def test_another_name_at_the_same_address_is_another_vm(tmp_path: Path) -> None:
    address = tmp_path / "qmp.sock"
    async with contextlib.AsyncExitStack() as first, contextlib.AsyncExitStack() as second:
        await first.enter_async_context(at(address, "-name", "web"))
        vm = await second.enter_async_context(qmpvcpu.attach(address, reconnect=True))
        await first.aclose()
        await second.enter_async_context(at(address, "-name", "db"))
        with pytest.raises(MonitorLostError, match="another name"):
            await vm.wait_for(lambda _: False, timeout=20)


async def test_a_read_only_attach_reads_what_is_known_and_writes_and_changes_nothing(tmp_path: Path) -> None:
    record = tmp_path / "record" / "vm.xml"
    record.parent.mkdir()
    async with at(tmp_path / "qmp.sock", "-name", "web", behaviour=Behaviour.hanging()) as guest:
        async with qmpvcpu.attach(guest.qmp, record=record, read_only=True) as vm:  # there is none yet
            assert vm.desired is None
        assert list(record.parent.iterdir()) == []
        async with qmpvcpu.attach(guest.qmp, record=record) as keeper:
            await keeper.plug(3)
            await keeper.request_unplug(3)
            await keeper.close()
        before = record.read_bytes()
        record.parent.chmod(0o555)
        async with (
            qmpvcpu.attach(guest.sockets[0], record=record, read_only=True) as vm,
            other_client(guest) as other,
        ):
            assert vm.layout.pending == {3}
            assert vm.desired == {0}
            for change in (lambda: vm.plug(4), lambda: vm.set_map("0-4"), vm.drop_previous):
                with pytest.raises(RecordError, match="read_only"):
                    await change()
            await other.execute("device_add", {**vm.layout[5].props, "driver": vm.layout[5].type, "id": "vcpu5"})
            await vm.refresh()
            assert vm.layout.enabled == VcpuMap.parse("0,3,5")
        assert record.read_bytes() == before
        assert [each.name for each in record.parent.iterdir()] == ["vm.xml"]
        record.parent.chmod(0o755)


async def test_options_about_a_record_need_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arrived= .* needs record="):
        await qmpvcpu.attach(tmp_path / "qmp.sock", arrived=True)
    with pytest.raises(ValueError, match=r"read_only= .* needs record="):
        await qmpvcpu.attach(tmp_path / "qmp.sock", read_only=True)
