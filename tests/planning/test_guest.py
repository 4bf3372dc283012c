"""What the guest may not do of a plan, told beforehand: by the CPU that it sees, by its past, by the system in it."""

from dataclasses import replace

import pytest

from qmpvcpu import DenialReason, StepDeniedError, VcpuMap
from qmpvcpu.model.guest import GuestOs
from qmpvcpu.model.options import CheckedOptions, Proof
from qmpvcpu.model.vm import VmInfo
from qmpvcpu.planning.checks import Situation, check_plug, check_unplug
from qmpvcpu.planning.plan import plan_count, plan_map, plan_plugs, plan_state
from tests.layouts import KVM, TCG
from tests.planning.situations import situation, vcpus

STORY = {0: "boot", 1: "boot", 6: "ours"}
HIDDEN = "the VM's CPU model hides the hypervisor from Linux: since 6.12.77 it acknowledges a vCPU and never"
UNDER_TCG = "Linux does not see TCG as a hypervisor: since 6.12.77 it acknowledges a vCPU and never uses it"
NESTED = "Linux may keep a vCPU offline that is added now (kvm_intel: Inconsistent VMCS config)"
UNHEARD = "the guest has answered nothing about a vCPU since it started: while it boots"
SERVER = GuestOs("mswindows", "Microsoft Windows", full_name="Windows Server 2022 Standard", variant="server")
CLIENT = GuestOs("mswindows", "Microsoft Windows", full_name="Windows 11 Pro", variant="client")


def hiding(vm: VmInfo = KVM) -> VmInfo:
    return replace(vm, hides_hypervisor=True)


def linux(kernel: str) -> GuestOs:
    return GuestOs("debian", "Debian GNU/Linux", "12", kernel, "x86_64")


def warned(now: Situation, wish: str, options: CheckedOptions | None = None) -> list[str]:
    return list(plan_map(now, vcpus(wish), options or CheckedOptions()).warnings)


def test_a_guest_that_has_started_a_vcpu_which_came_later_takes_another() -> None:
    now = situation(STORY, vm=hiding())
    assert len(warned(now, "0-2,6")) == 1
    slots = [slot.proving(Proof.ONLINE, 1.0) if slot.present else slot for slot in now.layout.slots]
    of_boot = [slot.proving(Proof.ONLINE, 1.0) if slot.is_boot else slot for slot in now.layout.slots]
    assert warned(now._replace(layout=replace(now.layout, slots=tuple(of_boot))), "0-2,6") == warned(now, "0-2,6")
    assert warned(now._replace(layout=replace(now.layout, slots=tuple(slots))), "0-2,6") == []


@pytest.mark.parametrize(
    ("now", "wish", "says"),
    [
        (situation(STORY, vm=hiding()), "0-2,6", HIDDEN),
        (situation(STORY, vm=hiding(replace(KVM, arch="i386"))), "0-2,6", HIDDEN),
        (situation(STORY, vm=hiding()), "0-1", ""),  # a removal needs no hypervisor
        (situation(STORY, vm=KVM), "0-2,6", ""),
        (situation(STORY, vm=TCG), "0-2,6", UNDER_TCG),
        (situation(STORY, vm=hiding(TCG)), "0-2,6", UNDER_TCG),
        (situation(STORY, vm=replace(TCG, arch="s390x")), "0-2,6", ""),
        (situation(STORY, vm=replace(KVM, accelerator="mshv")), "0-2,6", ""),
        (situation(STORY, vm=hiding(), guest_os=linux("6.12.77+deb13-amd64")), "0-2,6", HIDDEN),
        (situation(STORY, vm=hiding(), guest_os=linux("6.12.43+deb13-amd64")), "0-2,6", HIDDEN),
        (situation(STORY, vm=hiding(), guest_os=linux("7.3.4")), "0-2,6", HIDDEN),
        (situation(STORY, vm=hiding(), guest_os=linux("unknown")), "0-2,6", HIDDEN),
        (situation(STORY, vm=hiding(), guest_os=linux("6.1.0-44-amd64")), "0-2,6", ""),
        (situation(STORY, vm=hiding(), guest_os=SERVER), "0-1,6", ""),
        (situation(STORY, vm=replace(KVM, nested=True), arrived=True), "0-2,6", NESTED),
        (situation(STORY, vm=replace(KVM, nested=True), arrived=True), "0-1", ""),
        (situation(STORY, vm=replace(KVM, nested=True)), "0-2,6", ""),
        (situation(STORY, arrived=True), "0-2,6", ""),
    ],
)
def test_what_the_guest_sees_of_its_cpu_may_keep_it_from_using_one(now: Situation, wish: str, says: str) -> None:
    warnings = warned(now, wish)
    assert len(warnings) == (says != "")
    assert not says or says in warnings[0]


@pytest.mark.parametrize(
    ("now", "wish", "options", "says"),
    [
        (situation(STORY, unheard=True), "0-1", {}, "a removal is rejected, refused, or pending for good"),
        (situation(STORY, unheard=True), "0-2,6", {}, ""),
        (situation(STORY, unheard=True, pending=(6,)), "0-1", {}, ""),  # it is joined
        (situation(STORY, unheard=True), "0-2,6", {"proof": Proof.ACKNOWLEDGED}, "starts it late"),
        (situation(STORY, unheard=True), "0-2,6", {"require_proof": True}, "starts it late"),
        (situation(STORY, unheard=True, guest_os=linux("6.1.0")), "0-1", {}, ""),  # its agent has answered: it is up
        (situation(STORY), "0-1", {}, ""),
    ],
)
def test_a_guest_that_has_never_answered_may_be_booting(
    now: Situation, wish: str, options: dict[str, object], says: str
) -> None:
    warnings = warned(now, wish, CheckedOptions(**options))  # type: ignore[arg-type]  # two of its options
    assert len(warnings) == (says != "")
    assert not says or (warnings[0].startswith(UNHEARD) and warnings[0].endswith(says))


@pytest.mark.parametrize(
    ("name", "variant", "takes"),
    [
        ("Microsoft Windows Server 2022 Standard", "server", True),
        ("Windows Server 2019 Datacenter", "server", True),
        ("Windows Server 2022 Datacenter Azure Edition", "server", True),
        ("Windows Server 2008 R2 Enterprise", "server", True),
        ("Windows Server 2012 R2 Essentials", "server", False),
        ("Microsoft Windows 11 Pro", "client", False),
        ("Microsoft Windows 10 Enterprise", "client", False),
        ("", "server", False),
        ("", "", False),
    ],
)
def test_a_windows_guest_is_warned_of_where_its_edition_takes_no_vcpu(name: str, variant: str, takes: bool) -> None:
    now = situation(STORY, guest_os=GuestOs("mswindows", "Microsoft Windows", full_name=name, variant=variant))
    *sees, stays = warned(now, "0-3,6")
    assert stays == "vCPUs 2-3 cannot be unplugged again: Windows releases no vCPU"
    assert len(sees) == (not takes)
    assert takes or "sees a new vCPU at its next boot" in sees[0]
    assert takes or sees[0].startswith(name or "this edition of Windows")


@pytest.mark.parametrize("system", [SERVER, CLIENT])
def test_a_windows_guest_is_asked_for_no_vcpu_whatever_the_caller_allows(system: GuestOs) -> None:
    now = situation(STORY, guest_os=system)
    everything = CheckedOptions(allow_fatal=True, allow_boot_vcpus=True)
    plans = [
        plan_map(now, vcpus("0-1")),
        plan_map(now, vcpus("0-1"), everything),
        plan_count(now, 2, everything),
    ]
    for plan in plans:
        assert [(each.ids, each.reason) for each in plan.denied] == [(vcpus("6"), DenialReason.GUEST_CANNOT_UNPLUG)]
        assert "denied 6  (the guest is Windows, which releases no vCPU" in str(plan)
    with pytest.raises(StepDeniedError, match="pending for good, and QEMU cannot withdraw it") as caught:
        check_unplug(now, 6, everything)
    assert caught.value.reason is DenialReason.GUEST_CANNOT_UNPLUG
    with pytest.raises(StepDeniedError):
        plan_state(now, 6, enabled=False)


def test_a_removal_that_a_windows_guest_was_asked_for_can_still_be_waited_for() -> None:
    now = situation(STORY, pending=(6,), guest_os=SERVER, leaving=frozenset({6}))
    (step,) = plan_state(now, 6, enabled=False).steps
    assert step.joins


def test_what_is_plugged_again_by_itself_is_warned_of_too() -> None:
    assert plan_plugs(situation(STORY, vm=hiding()), [2]).warnings[0].startswith(HIDDEN)


def test_a_confidential_guest_takes_none_and_may_give_some_back() -> None:
    now = situation(STORY, vm=replace(KVM, confidential=True))
    with pytest.raises(StepDeniedError) as caught:
        check_plug(now, 2)
    assert caught.value.reason is DenialReason.CONFIDENTIAL
    assert check_unplug(now, 6).ids == VcpuMap([6])  # QEMU keeps KVM's vCPU; nothing is made
    (again,) = warned(now, "0-1")
    assert again.startswith("plugging vCPU 6 again, as reverting does, is known to be fatal: the VM is confidential")


def test_secure_execution_takes_a_vcpu() -> None:
    sealed = replace(KVM, arch="s390x", machine="s390-ccw-virtio-10.0", confidential=True)
    assert check_plug(situation(STORY, vm=sealed), 2).ids == VcpuMap([2])
