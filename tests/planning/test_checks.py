"""What may be sent, and the named reason why not."""

from dataclasses import replace
from typing import Any

import pytest

from qmpvcpu import DenialReason, Layout, StepDeniedError
from qmpvcpu.errors import UnsupportedMachineError
from qmpvcpu.model.layout import CpuProps, Slot
from qmpvcpu.model.options import CheckedOptions, Proof
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import Topology, VmInfo, VmStatus
from qmpvcpu.planning.checks import Situation, check_export, check_plug, check_unplug
from tests.layouts import KVM, OLD_TCG, TCG, layout

PSERIES = replace(TCG, arch="ppc64", machine="pseries-10.0", qemu_version=(10, 0, 13))


def situation(vm: VmInfo = KVM, *, present: tuple[int, ...] = (0, 2), count: int = 1, **changes: Any) -> Situation:
    plugged = {first: "ours" if first > 1 else "boot" for first in present}
    now = layout(plugged, slots=4, count=count, pending=changes.pop("pending", ()), vm=vm)
    given: dict[str, Any] = {"status": VmStatus("running"), "created": len(present)}
    return Situation(layout=now, **{**given, **changes})


def test_a_free_slot_may_be_filled_and_the_lowest_is_taken_by_default() -> None:
    assert check_plug(situation(), 3).first == 3
    assert check_plug(situation(), None).first == 1
    assert check_plug(situation(in_flight=frozenset({1})), None).first == 3


def test_a_plugged_vcpu_may_leave_boot_vcpus_too() -> None:
    assert check_unplug(situation(), 2).first == 2
    assert check_unplug(situation(present=(0, 1)), 1).first == 1


@pytest.mark.parametrize(
    ("now", "vcpu", "reason", "says"),
    [
        (situation(), 9, DenialReason.UNKNOWN_VCPU, "no vCPU 9: this machine has 0 to 3"),
        (situation(), -1, DenialReason.UNKNOWN_VCPU, "no vCPU -1"),
        (situation(), 2, DenialReason.SLOT_OCCUPIED, "plugged already, as /machine/peripheral/vcpu2"),
        (situation(pending=frozenset({2})), 2, DenialReason.SLOT_OCCUPIED, "a removal of it is pending"),
        (situation(in_flight=frozenset({3})), 3, DenialReason.IN_PROGRESS, "in flight"),
        (situation(present=(0,), count=4), 5, DenialReason.PART_OF_SLOT, "slot of vCPUs 4-7"),
        (situation(present=(0, 1, 2, 3)), None, DenialReason.MACHINE_FULL, "4 vCPUs, all plugged"),
        (situation(present=()), None, DenialReason.MACHINE_NOT_BUILT, "-preconfig"),
        (situation(present=()), 3, DenialReason.MACHINE_NOT_BUILT, "-preconfig"),
        (situation(status=VmStatus("running", "active")), 3, DenialReason.MIGRATING, "status active"),
        (situation(status=VmStatus("postmigrate")), 3, DenialReason.MIGRATED_AWAY, "migrated away"),
        (situation(exported=True), 3, DenialReason.EXPORTED, "the VM is exported"),
        (situation(OLD_TCG, unplug_seen=True), 3, DenialReason.FATAL, "corrupts its heap"),
        (situation(TCG, created=4), 3, DenialReason.FATAL, "more vCPUs were ever created"),
        (situation(replace(KVM, confidential=True)), 3, DenialReason.CONFIDENTIAL, "sealed at launch"),
        (situation(replace(KVM, can_plug=False)), 3, DenialReason.MACHINE_CANNOT_PLUG, "no hotpluggable CPUs"),
        (situation(replace(TCG, smm_firmware=True)), 3, DenialReason.FATAL, "firmware uses SMM"),
    ],
)
def test_a_plug_is_denied_with_its_reason(now: Situation, vcpu: int | None, reason: DenialReason, says: str) -> None:
    with pytest.raises(StepDeniedError, match=says) as caught:
        check_plug(now, vcpu)
    assert caught.value.reason is reason
    assert caught.value.action == "plug"
    assert "nothing was sent" in str(caught.value)


@pytest.mark.parametrize(
    ("now", "vcpu", "reason", "says"),
    [
        (situation(), 4, DenialReason.UNKNOWN_VCPU, "no vCPU 4"),
        (situation(), 3, DenialReason.SLOT_EMPTY, "not plugged"),
        (situation(), 0, DenialReason.BOOT_VCPU, "vCPU 0"),
        (situation(present=(0, 4), count=4), 6, DenialReason.PART_OF_SLOT, "name it by the first, 4"),
        (situation(replace(KVM, can_unplug=False)), 2, DenialReason.MACHINE_CANNOT_UNPLUG, "does not give CPUs back"),
        (
            situation(replace(KVM, libvirt_owned=True), present=(0, 1)),
            1,
            DenialReason.LIBVIRT_OWNED,
            "libvirtd would forget the VM",
        ),
        (situation(status=VmStatus("finish-migrate", "device")), 2, DenialReason.MIGRATING, "migrating"),
        (situation(exported=True), 2, DenialReason.EXPORTED, "the VM is exported"),
        (situation(TCG, single_threaded=True), 2, DenialReason.FATAL, "single-threaded TCG"),
        (situation(PSERIES), 2, DenialReason.FATAL, "pseries machine gives up a vCPU"),
    ],
)
def test_an_unplug_is_denied_with_its_reason(now: Situation, vcpu: int, reason: DenialReason, says: str) -> None:
    with pytest.raises(StepDeniedError, match=says) as caught:
        check_unplug(now, vcpu)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("now", "reason", "says"),
    [
        (situation(exported=True), DenialReason.EXPORTED, r"release\(\) the export"),
        (situation(status=VmStatus("inmigrate")), DenialReason.MIGRATING, "no VM has arrived here yet"),
        (situation(status=VmStatus("running", "active")), DenialReason.MIGRATING, "status active"),
        (situation(status=VmStatus("postmigrate", "completed")), DenialReason.MIGRATED_AWAY, "migrated away"),
        (situation(TCG, unplug_seen=True), DenialReason.FATAL, "may never get a migration out of its setup"),
    ],
)
def test_an_export_is_denied_with_its_reason(now: Situation, reason: DenialReason, says: str) -> None:
    with pytest.raises(StepDeniedError, match=says) as caught:
        check_export(now)
    assert (caught.value.action, caught.value.ids, caught.value.reason) == ("export", VcpuMap(), reason)


@pytest.mark.parametrize("options", [CheckedOptions(proof=Proof.ACKNOWLEDGED), CheckedOptions(require_proof=True)])
def test_a_plug_does_not_wait_for_what_no_guest_of_the_machine_can_say(options: CheckedOptions) -> None:
    s390x = situation(replace(KVM, arch="s390x", machine="s390-ccw-virtio-10.0"))
    with pytest.raises(StepDeniedError, match=r"no way to acknowledge it: use Proof\.PRESENT") as caught:
        check_plug(s390x, 3, options)
    assert caught.value.reason is DenialReason.MACHINE_CANNOT_ACKNOWLEDGE
    assert check_plug(s390x, 3).first == 3
    assert check_plug(situation(), 3, options).first == 3


def test_a_plug_does_not_wait_for_a_start_that_nothing_tells() -> None:
    options = CheckedOptions(proof=Proof.STARTED)
    remote = situation(replace(TCG, start_unknowable="its threads are on another host"))
    with pytest.raises(StepDeniedError, match=r"threads are on another host: use Proof\.PRESENT") as caught:
        check_plug(remote, 3, options)
    assert caught.value.reason is DenialReason.CANNOT_TELL_STARTED
    assert check_plug(remote, 3).first == 3
    assert check_plug(situation(TCG), 3, options).first == 3
    # VmInfo could not tell while there was one vCPU
    with pytest.raises(StepDeniedError, match="one host thread runs all vCPUs"):
        check_plug(situation(TCG, single_threaded=True), 3, options)


@pytest.mark.parametrize(
    ("check", "options", "told"),
    [
        (check_plug, CheckedOptions(proof=Proof.ONLINE), r"Proof\.ONLINE asks the guest's agent: attach with agent="),
        (check_unplug, CheckedOptions(offline_first=True), "offline_first=True asks the guest's agent: attach with"),
    ],
)
def test_what_asks_the_agent_is_denied_where_none_is_known(check: Any, options: CheckedOptions, told: str) -> None:
    vcpu = 3 if check is check_plug else 2
    with pytest.raises(StepDeniedError, match=told) as caught:
        check(situation(), vcpu, options)
    assert caught.value.reason is DenialReason.NO_AGENT
    assert check(situation(has_agent=True), vcpu, options).first == vcpu
    assert check(situation(), vcpu).first == vcpu


def test_an_export_from_a_vm_that_may_leave_goes_through() -> None:
    for now in (situation(), situation(unplug_seen=True), situation(status=VmStatus("paused")), situation(TCG)):
        check_export(now)
    check_export(situation(TCG, unplug_seen=True), allow_fatal=True)
    for version in ((10, 0, 13), (11, 1, 3)):
        check_export(situation(replace(TCG, qemu_version=version), unplug_seen=True))


def test_a_slot_is_filled_again_where_that_is_known_to_be_safe() -> None:
    for version in ((8, 2, 2), (10, 0, 2), (11, 1, 3)):
        assert check_plug(situation(replace(TCG, qemu_version=version), unplug_seen=True), 3).first == 3


def test_what_is_fatal_goes_through_when_the_caller_insists() -> None:
    assert check_plug(situation(OLD_TCG, unplug_seen=True), 3, CheckedOptions(allow_fatal=True)).first == 3
    assert check_plug(situation(TCG, created=9), 3, CheckedOptions(allow_fatal=True)).first == 3
    assert check_plug(situation(replace(KVM, confidential=True)), 3, CheckedOptions(allow_fatal=True)).first == 3
    assert check_unplug(situation(PSERIES), 2, CheckedOptions(allow_fatal=True)).first == 2
    assert check_unplug(situation(TCG, single_threaded=True), 2, CheckedOptions(allow_fatal=True)).first == 2
    owned = situation(replace(KVM, libvirt_owned=True), present=(0, 1))
    assert check_unplug(owned, 1, CheckedOptions(allow_boot_vcpus=True)).first == 1


def test_kvm_knows_none_of_tcgs_limits() -> None:
    assert check_plug(situation(replace(KVM, qemu_version=(7, 2, 22)), unplug_seen=True, created=99), 3).first == 3
    assert check_unplug(situation(single_threaded=True), 2).first == 2


def test_an_apic_id_that_only_x2apic_reaches_is_fatal_under_tcg() -> None:
    topology = Topology(max_cpus=256 * 2, sockets=2, cores=256)
    props = CpuProps({"socket-id": 1, "core-id": 0, "thread-id": 0})
    slots = (
        Slot(0, 1, "t", CpuProps({"socket-id": 0, "core-id": 0, "thread-id": 0}), 0, "/machine/unattached/device[0]"),
        Slot(1, 1, "t", props, 256),
    )
    for x2apic, denied in ((False, True), (True, False)):
        vm = replace(TCG, topology=topology, x2apic=x2apic)
        now = Situation(layout=Layout(vm=vm, slots=slots, creation=(0,)), status=VmStatus("running"), created=1)
        if denied:
            with pytest.raises(StepDeniedError, match="x2apic"):
                check_plug(now, 1)
        else:
            assert check_plug(now, 1).first == 1


def test_a_machine_that_cannot_is_named() -> None:
    with pytest.raises(UnsupportedMachineError) as caught:
        check_plug(situation(replace(KVM, machine="microvm", can_plug=False)), None)
    assert caught.value.machine == "microvm"
    assert caught.value.ids == VcpuMap()
