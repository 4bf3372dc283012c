"""The small values: OST answers, verdicts, what a QEMU does not survive."""

import copy
import dataclasses
import itertools
import pickle
from dataclasses import replace
from typing import Any

import pytest

from qmpvcpu import (
    CommandRejectedError,
    DenialReason,
    Denied,
    MonitorLostError,
    OutcomeUnknownError,
    Pending,
    Plugged,
    Proof,
    Refused,
    Rejected,
    StepDeniedError,
    Unknown,
    Unplugged,
    UnplugPendingError,
    UnplugRefusedError,
    VcpuMap,
)
from qmpvcpu.errors import Outcome, UnprovenError, describe, shorten
from qmpvcpu.events import VcpuPlugged, VmResumed, VmStopped
from qmpvcpu.model.codec import to_json
from qmpvcpu.model.options import CheckedOptions
from qmpvcpu.model.verdicts import OstAnswer, OstStatus, verdict_of
from qmpvcpu.model.vm import KnownFault, Topology, VmInfo, VmStatus, apic_id, needs_x2apic


@pytest.mark.parametrize(
    ("source", "code", "status", "reason"),
    [
        (3, 0, OstStatus.SUCCESS, "success"),
        (3, 0x84, OstStatus.IN_PROGRESS, "in progress"),
        (0x103, 0x84, OstStatus.IN_PROGRESS, "in progress"),
        (3, 0x82, OstStatus.FAILURE, "device is busy"),
        (3, 1, OstStatus.FAILURE, "non-specific failure"),
        (0x103, 0x83, OstStatus.FAILURE, "ejection dependency is busy or not supported"),
        (3, 0x99, OstStatus.FAILURE, "status 0x99, unknown to ACPI"),
        (1, 0, OstStatus.SUCCESS, "success"),
        (1, 0x80, OstStatus.IN_PROGRESS, "in progress"),
        (0x200, 0x81, OstStatus.FAILURE, "device driver load failure"),
        (1, 0x84, OstStatus.FAILURE, "status 0x84, unknown to ACPI"),
    ],
)
def test_an_ost_answer_is_read_as_acpi_means_it(source: int, code: int, status: OstStatus, reason: str) -> None:
    answer = OstAnswer(source, code)
    assert answer.status is status
    assert answer.reason == reason
    assert answer.is_ejection == (source in {3, 0x103})
    assert answer.is_insertion == (source in {1, 0x200})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            StepDeniedError("unplug", VcpuMap([0]), DenialReason.BOOT_VCPU, "never"),
            Denied(VcpuMap([0]), DenialReason.BOOT_VCPU, "never"),
        ),
        (
            CommandRejectedError(
                "GenericError", "no", {"execute": "device_del"}, action="unplug", ids=VcpuMap([3]), hint="h"
            ),
            Rejected(VcpuMap([3]), "GenericError", "no", "h"),
        ),
        (UnplugRefusedError(VcpuMap([3]), 0x82, "busy"), Refused(VcpuMap([3]), 0x82, "busy")),
        (
            UnplugPendingError(VcpuMap([3]), 2.0, acknowledged=True),
            Pending(VcpuMap([3]), acknowledged=True, seconds=2.0),
        ),
    ],
)
def test_every_step_error_is_a_verdict(error: StepDeniedError, expected: object) -> None:
    assert verdict_of(error) == expected


def test_an_unknown_outcome_is_a_verdict_and_a_lost_monitor_alone_is_none() -> None:
    error = OutcomeUnknownError("plug", VcpuMap([1]), "gone")
    assert verdict_of(error) == Unknown(VcpuMap([1]), str(error))
    assert verdict_of(MonitorLostError("gone")) is None


def test_verdicts_are_json() -> None:
    assert to_json(Refused(VcpuMap([4, 5]), 0x82, "device is busy", seconds=0.06312345678)) == {
        "kind": "refused",
        "ids": "4-5",
        "code": 130,
        "reason": "device is busy",
        "seconds": 0.06312345678,
        "by_agent": False,
    }
    assert to_json(Denied(VcpuMap([0]), DenialReason.BOOT_VCPU, "d"))["reason"] == "boot_vcpu"
    assert to_json(Plugged(VcpuMap([1])))["kind"] == "plugged"
    assert to_json(Unplugged(VcpuMap([1])))["kind"] == "unplugged"


def vm(accelerator: str, version: tuple[int, int, int], **changes: Any) -> VmInfo:
    return replace(VmInfo("test", "x86_64", "pc-q35", accelerator, version), **changes)


PSERIES = {"arch": "ppc64", "machine": "pseries-8.2"}
ALWAYS = {KnownFault.TCG_CREATED_BEYOND_MAX, KnownFault.TCG_SINGLE_THREAD_UNPLUG}
REPLUG = KnownFault.TCG_REPLUG_CORRUPTS_HEAP
BLOCKS = KnownFault.TCG_UNPLUG_BLOCKS_MIGRATION
APIC = KnownFault.TCG_APIC_ID_255
LOCKS = KnownFault.TCG_LINUX_LOCKS_UP
UNPLUG_OF_PSERIES = KnownFault.TCG_PSERIES_UNPLUG_ABORTS
RESET_OF_PSERIES = KnownFault.TCG_PSERIES_RESET_ABORTS


@pytest.mark.parametrize(
    ("version", "faults", "of_pseries"),
    [
        ((7, 2, 22), {REPLUG, BLOCKS, APIC}, {RESET_OF_PSERIES}),
        ((8, 2, 2), {BLOCKS, LOCKS}, {RESET_OF_PSERIES}),
        ((10, 0, 2), {BLOCKS, APIC}, {RESET_OF_PSERIES}),
        ((10, 0, 13), {APIC}, {UNPLUG_OF_PSERIES}),
        ((11, 1, 3), set(), set()),
    ],
)
def test_each_version_that_was_measured_has_its_own_faults(
    version: tuple[int, int, int], faults: set[KnownFault], of_pseries: set[KnownFault]
) -> None:
    assert vm("tcg", version).known_faults == ALWAYS | faults
    assert vm("tcg", version, x2apic=True).known_faults == ALWAYS | faults - {APIC}
    assert vm("tcg", version, **PSERIES).known_faults == ALWAYS | faults - {APIC} | of_pseries


@pytest.mark.parametrize(
    ("version", "faults"),
    [
        ((6, 2, 0), {REPLUG, BLOCKS, APIC}),
        ((7, 2, 23), {REPLUG, BLOCKS, APIC, LOCKS}),
        ((8, 2, 1), {REPLUG, BLOCKS, APIC, LOCKS}),
        ((8, 2, 3), {BLOCKS, APIC, LOCKS}),
        ((9, 2, 0), {BLOCKS, APIC, LOCKS}),
        ((10, 0, 12), {BLOCKS, APIC}),
        ((10, 0, 14), {APIC}),
        ((10, 1, 0), {BLOCKS, APIC}),
        ((11, 1, 2), {BLOCKS, APIC}),
        ((11, 1, 4), set()),
        ((12, 0, 0), set()),
    ],
)
def test_a_version_that_was_not_measured_has_the_faults_of_its_neighbours(
    version: tuple[int, int, int], faults: set[KnownFault]
) -> None:
    assert vm("tcg", version).known_faults == ALWAYS | faults


@pytest.mark.parametrize("version", [(7, 2, 22), (10, 0, 2), (12, 0, 0)])
def test_a_machine_has_the_faults_of_what_it_can_do(version: tuple[int, int, int]) -> None:
    arm = vm("tcg", version, arch="aarch64", machine="virt-10.0", can_plug=False, can_unplug=False)
    assert arm.known_faults == frozenset()
    s390x = vm("tcg", version, arch="s390x", machine="s390-ccw-virtio-10.0", can_unplug=False)
    assert s390x.known_faults == {KnownFault.TCG_CREATED_BEYOND_MAX}
    assert vm("tcg", version, smm_firmware=True).known_faults >= {KnownFault.TCG_SMM_PLUG_HANGS}
    assert vm("kvm", version, smm_firmware=True).known_faults == frozenset()


@pytest.mark.parametrize(
    ("changes", "acknowledges"),
    [
        ({}, True),
        ({"arch": "loongarch64", "machine": "virt"}, True),
        (PSERIES, False),
        ({"arch": "s390x", "machine": "s390-ccw-virtio-10.0"}, False),
        ({"machine": "isapc"}, False),
        ({"arch": "aarch64", "machine": "virt-10.0", "can_plug": False}, False),
    ],
)
def test_a_guest_acknowledges_where_its_machine_has_words_for_it(changes: dict[str, Any], acknowledges: bool) -> None:
    assert vm("kvm", (10, 0, 2), **changes).acknowledges is acknowledges


@pytest.mark.parametrize("accelerator", ["kvm", "mshv", "hvf", "nvmm", "whpx", "xen", "unknown"])
def test_what_is_not_tcg_has_none_of_its_faults(accelerator: str) -> None:
    assert vm(accelerator, (7, 2, 22)).known_faults == frozenset()
    assert vm(accelerator, (10, 0, 13), **PSERIES).known_faults == frozenset()


def test_apic_ids_leave_room_for_sizes_that_are_no_power_of_two() -> None:
    topology = Topology(max_cpus=12, sockets=2, cores=3, threads=2)
    assert apic_id(topology, {"socket-id": 1, "core-id": 2, "thread-id": 1}) == 0b1101
    wide = Topology(max_cpus=300, sockets=300)
    assert not needs_x2apic(wide, {"socket-id": 254, "core-id": 0, "thread-id": 0})
    assert needs_x2apic(wide, {"socket-id": 255, "core-id": 0, "thread-id": 0})


@pytest.mark.parametrize(
    ("status", "migrating", "away", "steady"),
    [
        (VmStatus("running"), False, False, True),
        (VmStatus("running", "completed"), False, False, True),
        (VmStatus("running", "active"), True, False, False),
        (VmStatus("finish-migrate", "device"), True, False, False),
        (VmStatus("postmigrate", "completed"), False, True, False),
        (VmStatus("paused"), False, False, False),
        (VmStatus("inmigrate", "none"), False, False, False),
        (VmStatus("running", "some-future-phase"), True, False, False),
    ],
)
def test_a_status_knows_a_migration(status: VmStatus, migrating: bool, away: bool, steady: bool) -> None:
    assert (status.migrating, status.migrated_away, status.is_steady) == (migrating, away, steady)


def test_values_of_one_kind_and_content_are_one() -> None:
    one, same, other = (VcpuPlugged(generation=n, ids=VcpuMap([3])) for n in (1, 1, 2))
    assert one == same
    assert len({one, same, other}) == 2
    assert len({VmStopped(generation=1), VmResumed(generation=1)}) == 2
    assert repr(one) == "VcpuPlugged(generation=1, origin=<Origin.UNKNOWN: 'unknown'>, ids=VcpuMap('3'))"


def test_what_an_error_quotes_is_short_and_never_fails() -> None:
    assert shorten({"a": 1}) == '{"a": 1}'
    assert shorten("x" * 1000, limit=10).endswith("(1002 characters)")
    assert shorten({1}) == "{1}"
    assert describe("plug", ()) == "plug"
    assert describe("unplug", VcpuMap([4, 5, 6, 7])) == "unplug of vCPUs 4-7"


def test_a_value_is_frozen_and_can_be_copied_and_pickled() -> None:
    vm = VmInfo("vm", "x86_64", "q35", "kvm", (10, 0, 2), topology=Topology(max_cpus=8, sockets=8))
    event = VcpuPlugged(generation=3, ids=VcpuMap([1]))
    for value in (vm, event, OstAnswer(3, 0)):
        name = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(value, name)
        assert copy.copy(value) == pickle.loads(pickle.dumps(value)) == value  # noqa: S301 -- our own bytes
    assert dataclasses.replace(event, generation=4).generation == 4


def test_proofs_are_the_rungs_of_a_ladder() -> None:
    ladder = [Proof.PRESENT, Proof.ACKNOWLEDGED, Proof.STARTED, Proof.ONLINE]
    assert sorted(reversed(ladder)) == ladder  # noqa: C414 -- the order is what is tested
    assert max(ladder) is Proof.ONLINE
    for low, high in itertools.pairwise(ladder):
        assert low < high
        assert low <= high
        assert high > low
        assert high >= low
        assert not high < low


@pytest.mark.parametrize("seen", [copy.copy, copy.deepcopy, lambda proof: pickle.loads(pickle.dumps(proof))])  # noqa: S301
def test_a_rung_stays_the_same_rung(seen: Any) -> None:
    for proof in Proof:
        assert seen(proof) is proof
        assert {proof: 1}[seen(proof)] == 1


@pytest.mark.parametrize(
    ("options", "awaited", "required"),
    [
        ({}, Proof.PRESENT, Proof.PRESENT),
        ({"proof": Proof.ACKNOWLEDGED}, Proof.ACKNOWLEDGED, Proof.PRESENT),
        ({"require_proof": True}, Proof.ACKNOWLEDGED, Proof.ACKNOWLEDGED),
        ({"proof": Proof.ACKNOWLEDGED, "require_proof": True}, Proof.ACKNOWLEDGED, Proof.ACKNOWLEDGED),
        ({"proof": Proof.STARTED}, Proof.STARTED, Proof.STARTED),
        ({"proof": Proof.STARTED, "require_proof": True}, Proof.STARTED, Proof.STARTED),
        ({"proof": Proof.ONLINE}, Proof.ONLINE, Proof.ONLINE),
    ],
)
def test_only_an_acknowledgement_is_advisory(options: dict[str, Any], awaited: Proof, required: Proof) -> None:
    checked = CheckedOptions(**options)
    assert (checked.awaited_proof, checked.required_proof) == (awaited, required)


def test_a_refusal_by_the_agent_is_told_apart() -> None:
    error = UnplugRefusedError(VcpuMap([3]), None, "Device or resource busy (EBUSY)", by_agent=True)
    assert verdict_of(error) == Refused(VcpuMap([3]), None, "Device or resource busy (EBUSY)", by_agent=True)
    assert "nothing was sent to QEMU" in str(error)


def test_an_unproven_plug_says_how_far_it_came_and_what_usually_causes_it() -> None:
    error = UnprovenError(VcpuMap([3]), Proof.STARTED, Proof.PRESENT, "it has run nothing", hint="it still boots")
    assert str(error) == "plug of vCPU 3: plugged and present, never started: it has run nothing (it still boots)"
    assert (error.wanted, error.reached, error.code) == (Proof.STARTED, Proof.PRESENT, None)
    assert error.outcome is Outcome.CHANGED
    answered = UnprovenError(VcpuMap([3]), Proof.ACKNOWLEDGED, Proof.PRESENT, "failure", code=1, hint="unused")
    assert str(answered).endswith("never acknowledged: failure (OST status 0x01)")
