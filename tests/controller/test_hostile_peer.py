"""What the library tells of a peer that means harm: errors, tracebacks and log records are printable lines."""

import asyncio
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu.errors import CommandRejectedError, MonitorConnectError, QmpVcpuError
from qmpvcpu.events import Disconnected, MigrationChanged
from qmpvcpu.testing import MicroGuest
from qmpvcpu.testing.peer import HANG, ScriptedPeer
from tests.hostile import HOSTILE, hostile_vm, impossible_vms

_AS_LINES = logging.Formatter("%(vm)s %(message)s")


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Every record of ours as a handler writes it that prints its field ``vm`` too; without tracebacks."""
    ours = [record for record in caplog.records if record.name.startswith("qmpvcpu.")]
    return [_AS_LINES.formatMessage(record) for record in ours if record.getMessage() and hasattr(record, "vm")]


@pytest.fixture
def warning() -> Iterator[asyncio.Event]:
    """Set once the controller has logged a warning."""
    came = asyncio.Event()

    class Setting(logging.Handler):
        def emit(self, _: logging.LogRecord) -> None:
            came.set()

    handler = Setting(logging.WARNING)
    logging.getLogger("qmpvcpu.vm").addHandler(handler)
    yield came
    logging.getLogger("qmpvcpu.vm").removeHandler(handler)


async def test_a_log_has_a_line_a_record_whatever_a_peer_calls_itself(
    caplog: pytest.LogCaptureFixture, warning: asyncio.Event
) -> None:
    caplog.set_level(logging.DEBUG, logger="qmpvcpu")
    async with hostile_vm() as peer, qmpvcpu.attach(peer.address, resync_interval=0.05, reply_timeout=0.2) as vm:
        events = vm.events()
        await peer.event("MIGRATION", {"status": "active"})
        assert isinstance(await anext(events), MigrationChanged)
        peer.answers["query-hotpluggable-cpus"] = HANG
        await warning.wait()
        assert vm.layout.vm.name == HOSTILE
    lines = lines_of(caplog)
    assert {record.levelname for record in caplog.records} >= {"DEBUG", "INFO", "WARNING"}
    assert any("FORGED" in line for line in lines)
    assert [line for line in lines if not line.isprintable()] == []


async def test_an_error_and_its_traceback_are_printable_and_its_evidence_is_exact() -> None:
    async with hostile_vm() as peer, qmpvcpu.attach(peer.address) as vm:
        with pytest.raises(CommandRejectedError) as caught:
            await vm.plug(2)
        assert repr(vm).isprintable()
    assert str(caught.value).isprintable()
    assert (caught.value.error_class, caught.value.desc) == (HOSTILE, HOSTILE)
    told = "".join(traceback.format_exception(caught.value))
    assert "FORGED" in told
    assert all(line.isprintable() for line in told.split("\n"))


async def test_a_reply_that_no_qemu_gives_is_quoted_in_one_line() -> None:
    for vm in impossible_vms():
        async with vm as peer:
            try:
                async with qmpvcpu.attach(peer.address) as attached:
                    assert attached.layout.enabled == {0, 1}
            except QmpVcpuError as error:
                assert str(error).isprintable()  # noqa: PT017 - some of these may be attached to


async def test_a_socket_whose_path_means_harm_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "\x1b]0;owned\x07\nFORGED\udcff"
    with pytest.raises(MonitorConnectError) as caught:
        await qmpvcpu.attach(path)
    assert str(caught.value).isprintable()
    assert caught.value.address == f"unix:{path}"


async def test_a_peer_that_is_no_qemu_is_quoted_in_one_line() -> None:
    async with ScriptedPeer(greeting=b"220 \x1b]0;owned\x07 \xe2\x80\xaemail\r\n") as peer:
        with pytest.raises(MonitorConnectError) as caught:
            await qmpvcpu.attach(peer.address)
    assert str(caught.value).isprintable()
    assert "220 " in str(caught.value)


async def test_a_lost_peer_is_told_in_one_line() -> None:
    async with hostile_vm() as peer, qmpvcpu.attach(peer.address, resync_interval=None) as vm:
        events = vm.events()
        await peer.send(b"\x1b]0;owned\x07\xff\r\n")
        event = await anext(events)
        while not isinstance(event, Disconnected):
            event = await anext(events)
    assert event.why.isprintable()


@pytest.mark.qemu
async def test_a_process_whose_name_is_cut_within_a_letter_can_be_recorded(tmp_path: Path) -> None:
    # The kernel cuts it after 15 bytes.
    async with (
        MicroGuest(extra_args=["-name", "vm,process=db-server-ööö"]) as guest,
        qmpvcpu.attach(guest.qmp, record=tmp_path / "vm.xml") as vm,
    ):
        assert await vm.plug(3) == {3}
