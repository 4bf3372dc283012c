"""The transcript of a QEMU's monitors, whatever its trace lines look like."""

import pytest

import qmpvcpu
from qmpvcpu import Proof
from qmpvcpu.testing import MicroGuest, find_qemus
from qmpvcpu.testing.vms import TRACE_ARGUMENTS, TRACE_FILE, read_transcript

FORMS = {"up to 10.0": "31585@1796042925.224296:", "from 11.1": "2026-11-30T12:48:45.224296Z "}


@pytest.mark.parametrize("prefix", FORMS.values(), ids=FORMS)
def test_a_trace_line_is_read_with_the_time_before_it(prefix: str) -> None:
    lines = (
        'monitor_qmp_respond mon 0x1 resp: {"QMP": {}}',
        'monitor_qmp_respond mon 0x2 resp: {"QMP": {}}',
        'handle_qmp_command mon 0x2 req: {"execute": "quit"}',
        'handle_qmp_command mon 0x2 req: {"execute": "cut',
        "something else",
    )
    greeting, command = read_transcript("".join(f"{prefix}{line}\n" for line in lines))
    assert (greeting.sender, greeting.content) == ("qemu", {"QMP": {}})
    assert (command.sender, command.monitor, command.content) == ("client", 1, {"execute": "quit"})
    assert command.at == pytest.approx(1796042925.224296, abs=1e-6)


@pytest.mark.qemu
@pytest.mark.parametrize("version", find_qemus())
async def test_every_qemu_tells_what_was_said(version: str) -> None:
    async with MicroGuest(find_qemus()[version], accel="tcg", extra_args=TRACE_ARGUMENTS) as guest:
        async with qmpvcpu.attach(guest.qmp) as vm:
            await vm.plug(3, proof=Proof.ACKNOWLEDGED, require_proof=True)
        trace = (guest.process.directory / TRACE_FILE).read_text()
        assert "deprecated" not in guest.process.stderr
    said = [message.content for message in read_transcript(trace)]
    assert [each["arguments"]["id"] for each in said if each.get("execute") == "device_add"] == ["vcpu3"]
    assert [each for each in said if each.get("event") == "ACPI_DEVICE_OST"]
