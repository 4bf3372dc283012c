"""What a user must not write: mypy --strict rejects each marked line, and calls a mark without need an error."""

import qmpvcpu
from qmpvcpu import OnFailure, Pending, Recovery, Refused, TransitionReport, Unplugged, VcpuController, VcpuMap
from qmpvcpu.testing import Behaviour, MicroGuest


async def attaching(vm: VcpuController) -> None:
    qmpvcpu.attach(17)  # type: ignore[arg-type]
    qmpvcpu.attach("/run/vm.qmp", "vm")  # type: ignore[call-arg]
    qmpvcpu.attach("/run/vm.qmp", on_interrupted="ignore")  # type: ignore[arg-type]
    qmpvcpu.attach("/run/vm.qmp", retries=3)  # type: ignore[call-arg]
    with qmpvcpu.attach("/run/vm.qmp"):  # type: ignore[attr-defined]
        pass
    vm.layout = await vm.refresh()  # type: ignore[misc]


async def one_vcpu(vm: VcpuController) -> None:
    await vm.plug("3")  # type: ignore[arg-type]
    await vm.unplug()  # type: ignore[call-arg]
    await vm.unplug(3, 30)  # type: ignore[call-arg, arg-type]
    await vm.set_state(3)  # type: ignore[call-arg]
    await vm.plug(3, proof="acknowledged")  # type: ignore[arg-type]
    gone: bool = await vm.unplug(3)  # type: ignore[assignment]
    request = await vm.request_unplug(3)
    seconds = request.wait(20).seconds  # type: ignore[attr-defined]
    verdict = await request.wait(20)
    code = verdict.code  # type: ignore[union-attr]
    assert gone, (seconds, code)


async def whole_maps(vm: VcpuController) -> None:
    await vm.set_map(5)  # type: ignore[arg-type]
    await vm.set_map(["0", "2"])  # type: ignore[list-item]
    await vm.set_map("0-3", on_failure="revert")  # type: ignore[arg-type]
    await vm.set_count("4")  # type: ignore[arg-type]
    await vm.recover("retry")  # type: ignore[arg-type]
    report: TransitionReport = await vm.recover(Recovery.REPORT)  # type: ignore[assignment]
    report.outcome = OnFailure.STOP  # type: ignore[misc, assignment]


def every_verdict_is_looked_at(verdict: Unplugged | Refused | Pending) -> str:  # type: ignore[return]
    match verdict:
        case Unplugged():
            return "gone"
        case Refused(reason=reason):
            return reason


def maps_are_values(vcpus: VcpuMap) -> None:
    vcpus.add(3)  # type: ignore[attr-defined]
    VcpuMap("0-3")  # type: ignore[arg-type]


async def guests() -> None:
    MicroGuest(accel="xen")  # type: ignore[arg-type]
    MicroGuest(behaviour="refusing")  # type: ignore[arg-type]
    Behaviour.refusing(0x82).for_slot("2")  # type: ignore[arg-type]
