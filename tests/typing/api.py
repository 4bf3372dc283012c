"""What a user may write, and what its type is: checked by mypy --strict against the installed wheel, never run."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import assert_never, assert_type

from qemu.qmp import QMPClient

import qmpvcpu
from qmpvcpu import (
    Affect,
    DenialReason,
    DomainConfig,
    Layout,
    OnFailure,
    Outcome,
    Pending,
    Plan,
    Proof,
    Recovery,
    Refused,
    Slot,
    StepReport,
    TransitionOutcome,
    TransitionReport,
    Unplugged,
    UnplugRequest,
    Vcpu,
    VcpuController,
    VcpuMap,
    Verdict,
)
from qmpvcpu.bus import ServerAddress
from qmpvcpu.domainxml import DomainVcpus, parse, render, update, validate
from qmpvcpu.errors import DomainRuleError
from qmpvcpu.events import Event, VcpuUnplugged
from qmpvcpu.fleet import Fleet, VmResult
from qmpvcpu.launch import LaunchArguments, arguments
from qmpvcpu.migration import Export, check_target, confirm_target
from qmpvcpu.model.transition import ConfigReport, Intent, Step
from qmpvcpu.model.vm import KnownFault, VmInfo
from qmpvcpu.testing import Behaviour, LinuxVm, MicroGuest, QemuVm, QmpMessage
from qmpvcpu.vm.subscribers import EventStream


async def every_kind_of_target(client: QMPClient, connected: socket.socket) -> None:
    for target in ("/run/vm.qmp", "tcp:host:1234", Path("/run/vm.qmp"), ("host", 1234), client, connected):
        async with qmpvcpu.attach(target) as vm:
            assert_type(vm, VcpuController)
    vm = await qmpvcpu.attach(
        "/run/vm.qmp",
        name="vm",
        record="/var/lib/vm.xml",
        base=b"<domain/>",
        config=Path("/etc/vm.xml"),
        reply_timeout=5,
        reconnect=True,
        on_interrupted=Recovery.FINISH,
        resync_interval=None,
    )
    assert_type(vm, VcpuController)
    await vm.close()


async def what_is_known(vm: VcpuController) -> None:
    assert_type(vm.layout, Layout)
    assert_type(vm.layout[3], Vcpu)
    assert_type(vm.layout.slots, tuple[Slot, ...])
    assert_type(vm.layout.enabled, VcpuMap)
    assert_type(vm.layout.order, tuple[int, ...])
    assert_type(vm.layout[3].host_tid, int | None)
    assert_type(vm.capabilities, VmInfo)
    assert_type(vm.capabilities.known_faults, frozenset[KnownFault])
    assert_type(await vm.refresh(), Layout)
    before, now = await vm.statistics(), await vm.statistics(kvm=["exits"])
    assert_type(now[3].delay_s, float | None)
    assert_type(now.since(before)[3].run, float | None)
    assert_type(await vm.wait_for(lambda layout: 3 in layout.enabled, timeout=5), Layout)
    assert_type(await vm.wait_settled(timeout=5), Layout)


async def one_vcpu(vm: VcpuController) -> str:
    assert_type(await vm.plug(), VcpuMap)
    assert_type(await vm.plug(3, proof=Proof.ACKNOWLEDGED, require_proof=True, timeout=5), VcpuMap)
    assert_type(await vm.unplug(3, timeout=30, affect=Affect.BOTH), VcpuMap)
    assert_type(await vm.set_state(3, enabled=True), VcpuMap)
    request = await vm.request_unplug(3)
    assert_type(request, UnplugRequest)
    assert_type(request.verdict, Unplugged | Refused | None)
    match await request.wait(20):
        case Unplugged(seconds=seconds):
            assert_type(seconds, float)
            return "gone"
        case Refused(code=code, reason=reason):
            assert_type(code, int | None)
            return reason
        case Pending(acknowledged=acknowledged):
            return "at work" if acknowledged else "silent"
        case never:
            assert_never(never)


async def whole_maps(vm: VcpuController) -> None:
    plan = vm.plan("0,2-5")
    assert_type(plan, Plan)
    assert_type(plan.steps, tuple[Step, ...])
    for wish in ("0,2-5", {0, 2}, VcpuMap.parse("0-3,^2"), range(4), plan):
        assert_type(await vm.set_map(wish, on_failure=OnFailure.REVERT, in_flight=1), TransitionReport)
    report = await vm.set_count(4, include_boot=True)
    assert_type(report.outcome, TransitionOutcome)
    assert_type(report.steps, tuple[StepReport, ...])
    assert_type(report.steps[0].verdict, Verdict | None)
    assert_type(TransitionReport.from_json(report.to_json()), TransitionReport)
    assert_type(await vm.set_max(16), ConfigReport)
    assert_type(await vm.cancel(), TransitionReport | None)
    assert_type(vm.interrupted, Intent | None)
    assert_type(await vm.recover(Recovery.REVERT, timeout=5), TransitionReport | None)


async def events(vm: VcpuController) -> AsyncIterator[VcpuMap]:
    assert_type(vm.events(), EventStream)
    async for event in vm.events():
        assert_type(event, Event)
        if isinstance(event, VcpuUnplugged):
            assert_type(event.requested_at, float | None)
            yield event.ids


async def errors(vm: VcpuController) -> None:
    try:
        await vm.unplug(3)
    except qmpvcpu.UnplugRefusedError as error:
        assert_type(error.code, int | None)
        assert_type(error.ids, VcpuMap)
    except qmpvcpu.UnplugPendingError as error:
        assert_type(error.timeout, float)
    except qmpvcpu.StepDeniedError as error:
        assert_type(error.reason, DenialReason)
    except qmpvcpu.TransitionError as error:
        assert_type(error.report, TransitionReport)
    except qmpvcpu.QmpVcpuError as error:
        assert_type(error.outcome, Outcome)


async def another_qemu(vm: VcpuController, target: VcpuController) -> None:
    async with await vm.export(settle=5) as export:
        assert_type(export, Export)
        await check_target(export, target)
        await confirm_target(export, target)
    assert_type(await target.replay(vm.layout), TransitionReport)


async def documents(vm: VcpuController, xml: bytes) -> None:
    assert_type(render(vm.layout, base=xml), bytes)
    domain = parse(xml)
    assert_type(domain, DomainVcpus)
    assert_type(validate(xml), tuple[DomainRuleError, ...])
    assert_type(update(xml, domain), bytes)
    assert_type(arguments(domain), LaunchArguments)
    assert_type(arguments(vm.layout).argv, list[str])
    async with DomainConfig.open("vm.xml") as config:
        config.set_map("0-3")
        await config.save()


async def a_fleet() -> None:
    async with Fleet(directory="/run/vms", pattern="*.qmp", concurrency=4) as fleet:
        async for result in fleet.set_map("0-3", timeout=10):
            assert_type(result, VmResult[TransitionReport])
            assert_type(result.unwrap().layout.enabled, VcpuMap)
        assert_type(await fleet.refresh(), tuple[VmResult[Layout], ...])
    server = ServerAddress("nats://server:4222", nkey="/etc/nkey", tls_ca=Path("/etc/ca.pem"))
    async with Fleet(server, where="host=rack1-*", who="me", drop_after=60) as far:
        assert_type(await far.set_count(4, timeout=10), tuple[VmResult[TransitionReport], ...])
        assert_type(await fleet.each(lambda vm: vm.unplug(3)), tuple[VmResult[VcpuMap], ...])
    Fleet("nats://server:4222", where="name=web-*", concurrency=100)
    Fleet(server, directory="/run/vms")  # type: ignore[call-overload]  # other hosts' agents have the directory
    Fleet(["/run/vm.qmp"], where="name=web-*")  # type: ignore[call-overload]  # there is no server


async def a_guest() -> None:
    refusing = Behaviour.refusing(0x82).for_slot(2)
    async with MicroGuest(behaviour=[refusing, Behaviour.slow(20)]) as guest:
        assert_type(guest.qmp, Path)
        await guest.set_behaviour(Behaviour.complying())


def fixtures_of_the_pytest_plugin(qemu_vm: QemuVm, linux_vm: LinuxVm, vcpus: VcpuController) -> None:
    assert_type(qemu_vm.qmp, Path)
    qemu_vm.set_behaviour(Behaviour.hanging())
    assert_type(qemu_vm.transcript, tuple[QmpMessage, ...])
    assert_type(linux_vm.online(), VcpuMap)
    assert_type(vcpus.layout, Layout)
