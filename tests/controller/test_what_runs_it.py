"""What runs the vCPUs, and whether it takes more of them: asked at attach, of QEMUs old and new."""

from collections.abc import Callable
from typing import Any

import pytest

import qmpvcpu
from qmpvcpu import DenialReason, MonitorTimeoutError, StepDeniedError
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.qmp.monitor import Monitor
from qmpvcpu.qmp.queries import Reader
from qmpvcpu.testing import MicroGuest, QemuProcess
from qmpvcpu.testing.guestvm import GuestVm
from qmpvcpu.testing.peer import HANG, Command, Failure, ScriptedPeer
from tests.controller.test_scripted import CAPTURES, recorded
from tests.migration.moving import call, move
from tests.substrates import Substrate, substrates

OLD, NEW = "10.0.2-q35-sct-2x2x2-boot3", "11.1.3-q35-sct-2x2x2-boot3"
MISSING = Failure("The command has not been found", "CommandNotFound")
KVM, NO_KVM = {"enabled": True, "present": True}, {"enabled": False, "present": True}


def accelerators(name: Any) -> dict[str, Any]:
    return {"enabled": name, "present": ["kvm", "mshv", "tcg"]}


@pytest.mark.parametrize(
    ("capture", "new", "old", "expected"),
    [
        (NEW, accelerators("kvm"), MISSING, "kvm"),
        (NEW, accelerators("tcg"), MISSING, "tcg"),
        (NEW, accelerators("mshv"), NO_KVM, "mshv"),
        (NEW, MISSING, KVM, "kvm"),
        (NEW, MISSING, NO_KVM, "tcg"),
        (NEW, MISSING, MISSING, "unknown"),
        (NEW, accelerators(None), {"enabled": 1}, "unknown"),
        (NEW, accelerators("kvm\x1b[2J"), MISSING, "unknown"),
        (NEW, accelerators("k" * 1000), [], "unknown"),
        (OLD, MISSING, KVM, "kvm"),
        (OLD, MISSING, NO_KVM, "tcg"),
        (OLD, MISSING, MISSING, "unknown"),
        (OLD, accelerators("hvf"), NO_KVM, "hvf"),
    ],
)
async def test_the_accelerator_is_what_qemu_calls_it_and_unknown_is_not_tcg(
    capture: str, new: object, old: object, expected: str
) -> None:
    async with recorded(capture, {"query-accelerators": new, "query-kvm": old}) as (_, vm):
        assert vm.layout.vm.accelerator == expected
        assert (KnownFault.TCG_CREATED_BEYOND_MAX in vm.capabilities.known_faults) == (expected == "tcg")


async def test_a_new_qemu_is_not_asked_what_is_deprecated() -> None:
    async with recorded(NEW, {"query-accelerators": accelerators("kvm")}) as (peer, _):
        assert (peer.count("query-accelerators"), peer.count("query-kvm")) == (1, 0)


@pytest.mark.parametrize("capture", [OLD, NEW])
async def test_what_runs_the_vm_is_asked_in_the_round_of_all_the_rest(capture: str) -> None:
    data = CAPTURES[capture].data
    async with ScriptedPeer.from_capture(data, answers={"query-accelerators": HANG, "query-kvm": HANG}) as peer:
        with pytest.raises(MonitorTimeoutError):
            await qmpvcpu.attach(peer.address, reply_timeout=0.5)
        asked = [str(said) for said in peer.transcript if said.sender == "client"]
    assert [each for each in asked if "confidential-guest-support" in each]


def machine(support: str) -> Callable[[Command], Any]:
    """Answers of a machine with that confidential-guest-support, and nothing else to tell."""
    asked = {"path": "/machine", "property": "confidential-guest-support"}
    return lambda command: support if command.arguments == asked else MISSING


async def test_a_confidential_vm_gets_no_vcpu_unless_the_caller_insists() -> None:
    async with recorded(NEW, {"qom-get": machine("/objects/sev0"), "device_add": {}}) as (peer, vm):
        assert vm.layout.vm.confidential
        for denied in (vm.plug(3), vm.plug(), vm.set_map("0-3"), vm.set_count(4)):
            with pytest.raises(StepDeniedError) as caught:
                await denied
            assert caught.value.reason is DenialReason.CONFIDENTIAL
        assert peer.count("device_add") == 0
        await vm.plug(3, allow_fatal=True)
        assert peer.count("device_add") == 1
    async with recorded(NEW, {"qom-get": machine("")}) as (_, vm):
        assert not vm.layout.vm.confidential


async def test_secure_execution_is_confidential_and_takes_a_vcpu() -> None:
    s390x = "11.1.3-s390-ccw-virtio"
    answers = {"qom-get": machine("/objects/pv0"), "device_add": {}}
    async with recorded(s390x, answers) as (peer, vm):
        assert vm.layout.vm.confidential
        await vm.plug()
        assert peer.count("device_add") == 1


def cpu(ecx: int, features: int = 1, **properties: Any) -> Callable[[Command], Any]:
    """Answers of a CPU that shows the guest these feature words, and has those properties besides."""
    words = [
        {"cpuid-register": "ECX", "cpuid-input-eax": 1, "features": ecx},
        {"cpuid-register": "EAX", "cpuid-input-eax": 0x4000_0001, "features": features},
    ]
    known = {"feature-words": words} | {name.replace("_", "-"): value for name, value in properties.items()}

    def answer(command: Command) -> Any:
        at_cpu = command.arguments["path"] == "/machine/unattached/device[0]"
        return known.get(command.arguments["property"], MISSING) if at_cpu else MISSING

    return answer


HV = {"hv_vpindex": True, "hv_passthrough": False, "hv_vendor_id": "Microsoft Hv"}


@pytest.mark.parametrize(
    ("properties", "hidden"),
    [
        (cpu(1 << 31), False),
        (cpu(0), True),
        (cpu(1 << 31, 0, kvm=False), True),
        (cpu(1 << 31, 0, kvm=True), False),  # its features are off, each by name
        (cpu(1 << 31, 0, kvm=False, **HV), False),
        (cpu(1 << 31, 0, kvm=False, **HV | {"hv_vpindex": False}), True),
        (cpu(1 << 31, 0, kvm=False, **HV | {"hv_vpindex": False, "hv_passthrough": True}), False),
        (cpu(1 << 31, 0, kvm=False, **HV | {"hv_vendor_id": "null"}), True),
        (lambda _: MISSING, False),
        (cpu(0, feature_words=7), False),
    ],
)
async def test_a_hidden_hypervisor_is_known_by_what_vcpu_0_shows(
    properties: Callable[[Command], Any], hidden: bool
) -> None:
    async with recorded(NEW, {"query-accelerators": accelerators("kvm"), "qom-get": properties}) as (_, vm):
        assert vm.layout.vm.hides_hypervisor is hidden
        assert any("hides the hypervisor" in each for each in vm.plan("0-3").warnings) is hidden


async def test_what_vcpu_0_shows_costs_one_query_unless_kvm_is_hidden() -> None:
    for features, queries in ((1, 1), (0, 5)):
        given = {"query-accelerators": accelerators("kvm"), "qom-get": cpu(1 << 31, features, kvm=False)}
        async with recorded(NEW, given) as (peer, _):
            asked = [
                str(said)
                for said in peer.transcript
                if said.sender == "client" and "unattached" in str(said) and "qom-get" in str(said)
            ]
            assert len(asked) == queries


async def test_a_machine_that_is_no_pc_hides_nothing() -> None:
    async with recorded("11.1.3-s390-ccw-virtio", {"qom-get": cpu(0)}) as (_, vm):
        assert not vm.layout.vm.hides_hypervisor


@pytest.mark.parametrize(
    ("accelerator", "migration", "warned"),
    [
        ("kvm", {"status": "completed"}, True),
        ("kvm", {"status": "completed", "ram": {}}, False),
        ("kvm", {}, False),
        ("tcg", {"status": "completed"}, False),
    ],
)
async def test_a_guest_that_can_run_vms_and_has_migrated_is_warned_of(
    accelerator: str, migration: dict[str, Any], warned: bool
) -> None:
    given = {
        "query-accelerators": accelerators(accelerator),
        "query-migrate": migration,
        "qom-get": cpu(1 << 31 | 1 << 5),
    }
    async with recorded(NEW, given) as (_, vm):
        assert vm.layout.vm.nested is (accelerator == "kvm")
        assert any("Inconsistent VMCS config" in each for each in vm.plan("0-3").warnings) is warned


@pytest.mark.kvm
@pytest.mark.parametrize("on", substrates(["q35"], accels=["kvm"]))
@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        ("qemu64", False),
        ("qemu64,hypervisor=off", True),
        ("qemu64,kvm=off", True),
        ("qemu64,kvm=off,hv-relaxed=on", True),
        ("qemu64,kvm=off,hv-passthrough=on", False),
        ("qemu64,kvm=off,hv-passthrough=on,hv-vendor-id=null", True),
    ],
)
async def test_a_real_cpu_model_that_hides_the_hypervisor_is_known(on: Substrate, model: str, hidden: bool) -> None:
    args = ["-machine", on.machine, "-accel", "kvm", "-cpu", model, "-smp", "1,maxcpus=2", "-S"]
    async with QemuProcess(on.qemu, args) as process, qmpvcpu.attach(process.qmp) as vm:
        assert vm.layout.vm.hides_hypervisor is hidden
        (warning,) = [each for each in vm.plan("0-1").warnings if "hypervisor" in each] or [""]
        assert ("CPU model hides the hypervisor" in warning) is hidden
        assert await vm.plug(1) == {1}  # a warning denies nothing


@pytest.mark.qemu
@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_tcg_is_no_hypervisor_to_linux(on: Substrate) -> None:
    args = ["-machine", on.machine, "-accel", "tcg", "-smp", "1,maxcpus=2", "-S"]
    async with QemuProcess(on.qemu, args) as process, qmpvcpu.attach(process.qmp) as vm:
        assert not vm.layout.vm.hides_hypervisor
        assert not vm.layout.vm.nested  # the model has svm
        assert "Linux does not see TCG as a hypervisor" in vm.plan("0-1").warnings[-1]


@pytest.mark.qemu
@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
@pytest.mark.parametrize("secure", ["on", "off"])
async def test_firmware_with_smm_is_known_by_its_flash_and_gets_no_vcpu_under_tcg(on: Substrate, secure: str) -> None:
    flash = {"code.fd": bytes(4096), "vars.fd": bytes(4096)}
    args = ["-machine", "q35,smm=on", "-accel", "tcg", "-smp", "1,maxcpus=2", "-S"]
    args += ["-global", f"driver=cfi.pflash01,property=secure,value={secure}"]
    for unit, name in enumerate(flash):
        args += ["-drive", f"if=pflash,format=raw,unit={unit},file={name},snapshot=on"]
    async with QemuProcess(on.qemu, args, files=flash) as process, qmpvcpu.attach(process.qmp) as vm:
        assert vm.capabilities.smm_firmware is (secure == "on")
        if secure == "on":
            with pytest.raises(StepDeniedError, match="hangs at a plug if the VM's firmware uses SMM"):
                await vm.plug(1)
        else:
            assert await vm.plug(1) == {1}


@pytest.mark.qemu
@pytest.mark.parametrize("on", substrates(["q35"], accels=["tcg"]))
async def test_a_vm_is_known_to_have_migrated_by_its_target_alone(on: Substrate) -> None:
    async with (
        MicroGuest(on.qemu, machine=on.machine, accel=on.accel, qmp_sockets=2) as source,
        MicroGuest(on.qemu, machine=on.machine, accel=on.accel, qmp_sockets=2, incoming=True) as target,
    ):
        assert [await has_arrived(each) for each in (source, target)] == [False, False]
        assert await move(source, target) == "completed"
        await call(source, "cont")  # so that both run; the source says completed too
        assert [await has_arrived(each) for each in (source, target)] == [False, True]


async def has_arrived(guest: GuestVm) -> bool:
    monitor = await Monitor.open(guest.qmp, timeout=5, on_event=lambda _: None, on_lost=lambda _: None)
    try:
        return (await Reader(monitor, 5).status()).arrived
    finally:
        await monitor.close()
