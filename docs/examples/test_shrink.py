"""A CI job: code of yours, here `shrink`, against guests that comply, refuse, hesitate or are gone.

Every VM is a real QEMU, and answers as its test says, within milliseconds; nothing is mocked. The last guest is a
Linux; `python -m qmpvcpu.testing.linuxguest` makes it. docs/testing.md has all fixtures, docs/examples/ci workflow
files.

    pip install 'qmpvcpu[pytest]'
    pytest test_shrink.py
"""

import pytest

import qmpvcpu
from qmpvcpu import OnFailure, VcpuController
from qmpvcpu.testing import Behaviour, LinuxVm, QemuVm, ScriptedPeer

pytestmark = pytest.mark.asyncio


async def shrink(vm: VcpuController, count: int, patience: float = 10) -> str:
    """The code under test: make do with *count* vCPUs, and tell a person what came of it."""
    try:
        report = await vm.set_count(count, on_failure=OnFailure.CONTINUE, timeout=patience)
    except qmpvcpu.TransitionError as error:
        report = error.report
    except qmpvcpu.MonitorError:
        return "the VM is gone"
    stayed = [f"vCPU {step.ids} stays, {step.reason}" for step in report.steps if not step.ok]
    return "; ".join(stayed) or f"{len(report.layout.enabled)} vCPUs left"


@pytest.mark.qemu_vm(boot=1, max_vcpus=4)
async def test_a_guest_that_complies_shrinks(vcpus: VcpuController) -> None:
    await vcpus.set_map("0-3")
    assert await shrink(vcpus, 1) == "1 vCPUs left"
    assert vcpus.layout.enabled == {0}


@pytest.mark.qemu_vm(behaviour=Behaviour.refusing(0x82).for_slot(2))
async def test_a_vcpu_that_the_guest_keeps_is_named_with_the_guests_reason(vcpus: VcpuController) -> None:
    await vcpus.set_map("0-3")
    assert await shrink(vcpus, 1) == "vCPU 2 stays, the guest refused: device is busy (OST status 0x82)"
    assert vcpus.layout.enabled == {0, 2}


async def test_it_works_once_the_guests_obstacle_is_gone(qemu_vm: QemuVm, vcpus: VcpuController) -> None:
    await vcpus.plug(3)
    qemu_vm.refuse()
    assert "stays" in await shrink(vcpus, 1)
    qemu_vm.comply()
    assert await shrink(vcpus, 1) == "1 vCPUs left"


@pytest.mark.qemu_vm(behaviour=Behaviour.hanging())
async def test_a_late_answer_still_counts(qemu_vm: QemuVm, vcpus: VcpuController) -> None:
    await vcpus.plug(3)
    told = await shrink(vcpus, 1, patience=0.1)
    assert told == "vCPU 3 stays, the guest works on it, and has not answered in time"
    qemu_vm.comply()
    await vcpus.wait_settled(timeout=10)
    assert vcpus.layout.enabled == {0}


async def test_a_qemu_that_crashes_is_told_from_a_guest_that_refuses(qemu_vm: QemuVm, vcpus: VcpuController) -> None:
    await vcpus.plug(3)
    qemu_vm.kill()
    assert await shrink(vcpus, 1) == "the VM is gone"


@pytest.mark.scripted_qmp(greeting=None)
async def test_a_monitor_that_somebody_else_holds_hangs_nobody(scripted_qmp: ScriptedPeer) -> None:
    with pytest.raises(qmpvcpu.MonitorConnectError):
        await qmpvcpu.attach(scripted_qmp.path, reply_timeout=0.2)


async def test_a_real_linux_has_one_cpu_less(linux_vm: LinuxVm, vcpus: VcpuController) -> None:
    await vcpus.plug()
    linux_vm.wait_online(lambda cpus: len(cpus) == 3)
    assert await shrink(vcpus, 2) == "2 vCPUs left"
    assert linux_vm.online() == {0, 1}
