import grp
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qmpvcpu.cli import examine_machine, examine_vm
from qmpvcpu.cli.findings import Level
from qmpvcpu.model.guest import GuestOs
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.vm import KnownFault, VmStatus
from qmpvcpu.planning.checks import Situation
from qmpvcpu.planning.plan import plan_map
from qmpvcpu.testing import Behaviour, MicroGuest, QemuProcess, best_qemu, find_qemus
from tests.cli.running import Ran, environment, run
from tests.layouts import TCG, layout

pytestmark = pytest.mark.qemu


def found(ran: Ran, subject: str) -> dict[str, str]:
    """The one finding about *subject*."""
    (finding,) = [each for each in ran.document["findings"] if each["subject"] == subject]
    assert isinstance(finding, dict)
    return finding


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def machine_of(directory: Path, **variables: str) -> dict[str, str]:
    """An environment in which only the programs of *directory* are found, and what starts QEMU."""
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    (directory / "setpriv").symlink_to(setpriv)
    return environment(PATH=str(directory), QMPVCPU_CACHE=str(directory), **variables)


async def test_every_qemu_has_run_a_guest_and_a_vm_that_answers_is_in_order(guest: MicroGuest) -> None:
    assert (await run("set", "0-2", "--qmp", guest.qmp)).code == 0
    ran = await run("doctor", "--qmp", guest.qmp, "--json")
    assert (ran.code, ran.document["faults"], ran.document["enabled"]) == (0, 0, "0-2")
    assert {each["version"] for each in ran.document["qemus"]} == find_qemus().keys()
    for qemu in ran.document["qemus"]:
        for trial in qemu["trials"]:
            assert (trial["works"], trial["why"], len(trial["seconds"])) == (True, "", 3)
            assert bool(trial["known_faults"]) == (trial["accelerator"] == "tcg")
    assert found(ran, "plug")["found"] == "vCPU 3 can be tried"
    assert found(ran, "unplug")["found"] == "vCPU 2 can be tried"
    assert found(ran, "guest")["level"] == "ok"


async def test_a_guest_that_refused_and_one_that_hesitates_are_told(tmp_path: Path) -> None:
    behaviours = [Behaviour.refusing(0x82).for_slot(1), Behaviour.hanging().for_slot(2)]
    env = machine_of(tmp_path)
    async with MicroGuest(boot=3, behaviour=behaviours) as guest:
        assert (await run("unplug", "1", "--qmp", guest.qmp)).code == 1
        refused = await run("doctor", "--qmp", guest.qmp, "--json", env=env)
        assert "device is busy" in found(refused, "guest")["found"]
        assert (await run("unplug", "2", "--timeout", "0", "--qmp", guest.qmp)).code == 1
        ran = await run("doctor", "--qmp", guest.qmp, env=env)
    assert ran.code == 0
    assert "the removal of 2 is asked for and unanswered" in ran.out
    assert "QEMU: no qemu-system-x86_64 in PATH or the cache" in ran.out


async def test_a_qemu_that_is_stopped_is_advised_to_go_on_and_not_to_be_shared(
    guest: MicroGuest, tmp_path: Path
) -> None:
    guest.process.kill(signal.SIGSTOP)
    try:
        ran = await run("doctor", "--reply-timeout", "0.5", "--qmp", guest.qmp, "--json", env=machine_of(tmp_path))
    finally:
        guest.process.kill(signal.SIGCONT)
    assert ran.code == 3
    assert found(ran, "VM")["advice"].endswith("is stopped (SIGSTOP); SIGCONT lets it go on")


async def test_a_machine_that_cannot_is_a_fault(tmp_path: Path) -> None:
    async with QemuProcess(best_qemu(), ["-machine", "microvm", "-S"]) as process:
        ran = await run("doctor", "--qmp", process.qmp, "--json", env=machine_of(tmp_path))
    assert ran.code == 1
    assert found(ran, "plug")["level"] == "fault"
    assert "microvm" in found(ran, "plug")["found"]


async def test_a_qemu_that_hangs_and_one_that_is_none_hold_nothing_up(tmp_path: Path) -> None:
    hanging = program(tmp_path / "hanging", '[ "$1" = --version ] && echo "QEMU emulator version 9.9.9" || sleep 600')
    (tmp_path / "sleep").symlink_to(shutil.which("sleep") or "")
    program(tmp_path / "qemu-system-x86_64", "exit 1")
    env = machine_of(tmp_path, QMPVCPU_QEMU=str(hanging))
    ran = await run("doctor", "--json", env=env)
    assert ran.code == 1
    assert found(ran, "QEMU 9.9.9, TCG")["level"] == "fault"
    assert str(hanging) in found(ran, "QEMU 9.9.9, TCG")["advice"]
    assert "does not answer --version" in found(ran, "QEMU")["found"]


async def test_a_name_that_is_no_qemu_is_a_fault(tmp_path: Path) -> None:
    ran = await run("doctor", "--json", env=machine_of(tmp_path, QMPVCPU_QEMU="/etc/passwd"))
    assert (ran.code, found(ran, "QEMU")["level"]) == (1, "fault")


async def test_a_record_of_a_vm_that_is_not_named_is_not_read(tmp_path: Path) -> None:
    ran = await run("--record", tmp_path / "vm.xml", "doctor", "--json", env=machine_of(tmp_path))
    assert found(ran, "record")["found"] == "it was not read: the VM it belongs to is not named"
    assert not (tmp_path / "vm.xml").exists()


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path in the place of /dev/kvm, where nothing is yet."""
    monkeypatch.setattr(examine_machine, "_KVM", tmp_path / "kvm")
    return tmp_path / "kvm"


def test_kvm_is_judged_by_a_guest_and_not_by_its_node(kvm: Path) -> None:
    missing = examine_machine._examine_kvm(runs_guests=False)
    assert (missing.level, "no /" in missing.found) == (Level.NOTE, True)
    kvm.touch()
    broken = examine_machine._examine_kvm(runs_guests=False)
    assert (broken.level, "no QEMU here runs a guest under it" in broken.found) == (Level.WARNING, True)
    assert examine_machine._examine_kvm(runs_guests=True).level is Level.OK
    untried = examine_machine._examine_kvm(runs_guests=None)
    assert (untried.level, untried.found) == (Level.NOTE, f"{kvm} may be opened; no QEMU was there to try it with")


def test_a_kvm_that_cannot_be_opened_all_the_same_is_told_with_the_reason(kvm: Path) -> None:
    kvm.mkdir()  # opening one for writing is an error for root too
    finding = examine_machine._examine_kvm(runs_guests=False)
    assert finding.level is Level.WARNING
    assert "but opening it fails: Is a directory" in finding.found


def test_kvm_of_another_host_is_not_judged_by_a_guest_of_x86(kvm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvm.touch()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    finding = examine_machine._examine_kvm(runs_guests=False)
    assert (finding.level, finding.advice) == (Level.NOTE, "")
    assert "cannot try the KVM of aarch64" in finding.found


@pytest.mark.parametrize(
    ("mode", "group", "advice"),
    [
        (0o660, 1, f"join the group {grp.getgrgid(1).gr_name} (usermod -aG {grp.getgrgid(1).gr_name} USER"),
        (0o660, 4242, "join the group 4242 (usermod -aG 4242 USER"),
        (0o660, 0, "as root: chgrp kvm"),
        (0o600, 0, "as root: chgrp kvm"),
        (0o600, 1, "as root: chgrp kvm"),
        (0o660, -1, "you are in that group, so something else forbids it"),
    ],
)
def test_a_kvm_that_may_not_be_opened_is_advised_what_helps(
    mode: int, group: int, advice: str, kvm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvm.touch()
    kvm.chmod(mode)
    os.chown(kvm, 0, 4243 if group == -1 else group)
    monkeypatch.setattr("os.access", lambda *_, **__: False)  # as it is for anyone but root
    monkeypatch.setattr("os.getgroups", lambda: [4243])
    finding = examine_machine._examine_kvm(runs_guests=False)
    assert finding.level is Level.WARNING
    assert f"mode {mode:04o}" in finding.found
    assert finding.advice.startswith(advice)
    assert "join the group root" not in finding.advice


def test_a_socket_behind_a_link_blames_the_directory_that_is_closed(open_directory: Path) -> None:
    closed = open_directory / "closed"
    closed.mkdir()
    closed.chmod(0)
    (open_directory / "link").symlink_to("closed/sub/vm.qmp")
    (open_directory / "circle").symlink_to("circle")
    user = os.geteuid()
    if user == 0:  # root may everything
        os.seteuid(65534)
    try:
        told = examine_vm._who_may(str(open_directory / "link"))
    finally:
        os.seteuid(user)
    assert told.startswith(f"{closed} is of ")
    assert ", mode 0000: run this as that user, or let the group in" in told
    assert examine_vm._who_may(str(open_directory / "circle")) != ""


async def test_what_was_not_tried_is_not_said_to_fail(tmp_path: Path) -> None:
    ran = await run("doctor", "--json", env=machine_of(tmp_path))
    assert "no QEMU here runs a guest" not in ran.out


def machine(arch: str, name: str, *, arrived: bool = False, system: Any = None, **changes: Any) -> Any:
    """What doctor looks at of a VM of that machine, with vCPU 0 of 4."""
    seen = layout({0: "boot"}, slots=4, vm=replace(TCG, arch=arch, machine=name, **changes))
    now = Situation(layout=seen, status=VmStatus("running"), created=1, arrived=arrived, guest_os=system)
    return SimpleNamespace(layout=seen, capabilities=seen.vm, plan=lambda target: plan_map(now, VcpuMap(target)))


CANNOT = {"can_plug": False, "can_unplug": False}


@pytest.mark.parametrize(
    ("vm", "subjects", "says"),
    [
        (machine("aarch64", "virt-10.0", **CANNOT), ["VM", "plug"], "QEMU has no machine for aarch64 that does"),
        (machine("x86_64", "microvm", **CANNOT), ["VM", "plug"], "start the VM with q35 or pc"),
        (
            machine("loongarch64", "virt-8.2", **CANNOT),
            ["VM", "plug"],
            "start the VM with virt, with QEMU 10 or later",
        ),
        (
            machine("s390x", "s390-ccw-virtio-10.0", can_unplug=False),
            ["VM", "VM's QEMU", "plug", "unplug", "guest"],
            "guests of machine s390-ccw-virtio-10.0 cannot say that they take a CPU",
        ),
    ],
)
def test_of_each_machine_is_said_what_it_can_do_and_nothing_else(vm: Any, subjects: list[str], says: str) -> None:
    findings = list(examine_vm.examine_vm(vm, []))
    assert [each.subject for each in findings] == subjects
    said = "\n".join(f"{each.found} {each.advice}" for each in findings)
    assert says in said
    assert "acknowledged" not in said
    assert ("only plugs are possible" in said) is vm.layout.vm.can_plug


@pytest.mark.parametrize(
    ("version", "fault", "advice"),
    [
        ((11, 1, 3), KnownFault.TCG_CREATED_BEYOND_MAX, "is denied, as far as the count is known"),
        ((11, 1, 3), KnownFault.TCG_SINGLE_THREAD_UNPLUG, "what would hit it is denied"),
        ((8, 2, 2), KnownFault.TCG_LINUX_LOCKS_UP, "nothing is denied for it, plan warns"),
        ((7, 2, 22), KnownFault.TCG_REPLUG_CORRUPTS_HEAP, "plan warns of a reset"),
    ],
)
def test_no_more_is_said_to_be_denied_than_is(version: tuple[int, int, int], fault: KnownFault, advice: str) -> None:
    vm = machine("x86_64", "pc-q35", qemu_version=version)
    (told,) = [each for each in examine_vm.examine_vm(vm, []) if each.found == f"known: {fault.value}"]
    assert advice in told.advice


@pytest.mark.parametrize(
    ("vm", "advice"),
    [
        (machine("x86_64", "pc-q35-11.1"), "-cpu MODEL,-hypervisor -smbios"),
        (machine("x86_64", "pc-q35-11.1", hides_hypervisor=True), "-cpu MODEL,-hypervisor -smbios"),
        (machine("x86_64", "pc-q35-11.1", accelerator="kvm"), ""),
        (
            machine("x86_64", "pc-q35-11.1", accelerator="kvm", hides_hypervisor=True),
            "neither hypervisor=off nor kvm=off",
        ),
        (machine("ppc64", "pseries-11.1"), ""),
        (machine("x86_64", "pc-q35-11.1", system=GuestOs("debian", kernel="6.1.0-44-amd64")), ""),
        (
            machine("x86_64", "pc-q35-11.1", system=GuestOs("debian", kernel="7.3.4")),
            "-cpu MODEL,-hypervisor -smbios",
        ),
    ],
)
def test_that_linux_may_ignore_a_vcpu_is_told_where_it_does(vm: Any, advice: str) -> None:
    found = [each for each in examine_vm.examine_vm(vm, []) if "never uses it" in each.found]
    assert bool(found) is bool(advice)
    assert all(advice in each.advice for each in found)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_guest_that_runs_vms_is_told_of_once_it_has_migrated(arrived: bool) -> None:
    vm = machine("x86_64", "pc-q35-11.1", accelerator="kvm", nested=True, arrived=arrived)
    found = [each for each in examine_vm.examine_vm(vm, []) if "Inconsistent VMCS config" in each.found]
    assert bool(found) is arrived
    assert all("-cpu MODEL,-vmx" in each.advice for each in found)


def test_a_package_without_metadata_is_named_all_the_same() -> None:
    assert examine_machine._version("no-such-package") == "of no known version"
