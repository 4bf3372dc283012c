"""The story of a whole map on a real Linux: it refuses one removal, and each policy does what its name says."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

import qmpvcpu
from qmpvcpu import OnFailure, Proof, TransitionError, TransitionOutcome, TransitionReport, VcpuController, VcpuMap
from qmpvcpu.domainxml import read_identity
from qmpvcpu.testing.linuxguest import LinuxGuest
from tests.controller.vms import other_client, present

pytestmark = pytest.mark.guest

START, TARGET = VcpuMap.parse("0-1,6"), VcpuMap.parse("0,2-5")

Agree = Callable[[str], Awaitable[None]]


@pytest.fixture
async def vm(guest: LinuxGuest, third: Callable[[int], int], tmp_path: Path) -> AsyncIterator[VcpuController]:
    """Eight vCPUs: 0, 1 and 6 are plugged and online, and a Linux that will not let vCPU 6 go."""
    async with qmpvcpu.attach(guest.qmp, name="story", record=tmp_path / "vm.xml") as vm:
        await vm.plug(6, proof=Proof.ACKNOWLEDGED, require_proof=True)
        await guest.wait_online(lambda cpus: len(cpus) == len(START))
        assert vm.layout.max == 8
        await guest.refuse(third(6))
        yield vm


@pytest.fixture
def all_agree_on(vm: VcpuController, guest: LinuxGuest, tmp_path: Path) -> Agree:
    """Compares our view, QEMU's, the record's and the guest's own."""

    async def check(text: str) -> None:
        wanted = VcpuMap.parse(text)
        assert vm.layout.enabled == wanted
        async with other_client(guest) as client:
            assert len(await present(client)) == len(wanted)
        record = (tmp_path / "vm.xml").read_bytes()
        enabled = [vcpu for vcpu in range(8) if f"<vcpu id='{vcpu}' enabled='yes'".encode() in record]
        assert enabled == list(wanted)
        metadata = read_identity(record).metadata
        assert metadata is not None
        assert metadata.intent is None
        assert len(await guest.wait_online(lambda cpus: len(cpus) == len(wanted))) == len(wanted)

    return check


async def failing(vm: VcpuController, policy: OnFailure) -> TransitionReport:
    """What set_map says when Linux refuses vCPU 6."""
    with pytest.raises(TransitionError, match="unplug 6: REFUSED: the guest refused: device is busy") as caught:
        await vm.set_map(TARGET, on_failure=policy, timeout=30)
    report = caught.value.report
    refused = [step for step in report.steps if not step.ok and step.verdict is not None]
    assert [str(step.ids) for step in refused] == ["6"]
    assert refused[0].verdict is not None
    assert refused[0].verdict.name == "REFUSED"
    assert getattr(refused[0].verdict, "code", None) == 0x82
    return report


async def test_stop_sends_nothing_after_the_refusal(vm: VcpuController, all_agree_on: Agree) -> None:
    report = await failing(vm, OnFailure.STOP)
    assert report.outcome is TransitionOutcome.PARTIAL
    assert [str(step) for step in report.steps if step.verdict is None] == [
        "unplug 1: not sent: an earlier step failed"
    ]
    await all_agree_on("0-6")


async def test_continue_does_all_the_rest(vm: VcpuController, all_agree_on: Agree) -> None:
    report = await failing(vm, OnFailure.CONTINUE)
    assert report.outcome is TransitionOutcome.PARTIAL
    assert [str(step.ids) for step in report.steps if step.ok] == ["2", "3", "4", "5", "1"]
    await all_agree_on("0,2-6")


async def test_revert_undoes_what_it_did(vm: VcpuController, all_agree_on: Agree) -> None:
    report = await failing(vm, OnFailure.REVERT)
    assert report.outcome is TransitionOutcome.REVERTED
    assert [str(step.ids) for step in report.steps if step.undone] == ["2", "3", "4", "5", "1"]
    await all_agree_on("0-1,6")


async def test_a_guest_that_complies_gets_where_it_should(
    vm: VcpuController, guest: LinuxGuest, all_agree_on: Agree
) -> None:
    await failing(vm, OnFailure.STOP)
    await guest.comply()
    report = await vm.set_map(TARGET, on_failure=OnFailure.STOP)
    assert report.outcome is TransitionOutcome.REACHED
    assert [str(step) for step in report.steps] == ["unplug 6: UNPLUGGED", "unplug 1: UNPLUGGED"]
    await all_agree_on("0,2-5")
