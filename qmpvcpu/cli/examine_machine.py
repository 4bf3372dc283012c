"""What ``doctor`` finds on this machine: packages, KVM, and QEMUs that it runs a guest in."""

import asyncio
import contextlib
import importlib.metadata
import itertools
import logging
import os
import platform
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import qmpvcpu
from qmpvcpu.cli.findings import Finding, Level, owner_of
from qmpvcpu.errors import QmpVcpuError, milliseconds
from qmpvcpu.model.options import Proof
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.testing import MicroGuest, QemuNotFoundError, find_qemus, probe_accelerator
from qmpvcpu.testing.directory import TemporaryDirectoryError
from qmpvcpu.testing.linuxguest import HOW_TO_MAKE, LinuxGuestMissingError, find_images
from qmpvcpu.testing.qemu import Accelerator

_KVM: Final = Path("/dev/kvm")
_X86_HOSTS: Final = ("x86_64", "i686", "i386")
_GROUP_MAY: Final = stat.S_IRGRP | stat.S_IWGRP
_PACKAGES: Final = ("qemu.qmp", "aiofiles", "lxml", "click", "rich")
# A guest needs a tenth of a second, and a machine under load ten times that.
_TRIAL_S: Final = 15.0
_STEP_S: Final = 5.0
_MOST_SAID: Final = 300


@dataclass(frozen=True)
class Trial:
    """The micro-guest, run under one accelerator: a vCPU plugged, acknowledged and unplugged again.

    Attributes:
        accelerator: What it ran under.
        seconds: Until the guest was up, until the vCPU was acknowledged, until it had left; shorter where it failed.
        why: Why it failed, or "".
        faults: What this QEMU is known not to survive under it.
    """

    accelerator: Accelerator
    seconds: tuple[float, ...] = ()
    why: str = ""
    faults: frozenset[KnownFault] = frozenset()


@dataclass(frozen=True)
class TriedQemu:
    """One QEMU of this machine.

    Attributes:
        version: Such as ``10.0.2``.
        path: Where it is.
        trials: How it did, by accelerator; KVM is left out where it runs no guest.
    """

    version: str
    path: Path
    trials: tuple[Trial, ...]


def examine_machine(qemus: Iterable[TriedQemu]) -> Iterator[Finding]:
    """Tell what is installed, what KVM does here, and what is missing."""
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    yield Finding(
        Level.OK, "qmpvcpu", f"{qmpvcpu.__version__} on Python {platform.python_version()}, with {versions}"
    )
    tried = [trial.accelerator for qemu in qemus for trial in qemu.trials]
    yield _examine_kvm(runs_guests="kvm" in tried if tried else None)
    try:
        find_images()
    except LinuxGuestMissingError:
        advice = f"demo --guest linux and qmpvcpu.testing.LinuxGuest need it: {HOW_TO_MAKE}"
        yield Finding(Level.NOTE, "Linux guest", "none here that this user can read", advice)
    else:
        yield Finding(Level.OK, "Linux guest", "there, for demo --guest linux")
    if shutil.which("setpriv") is None:
        found = "setpriv is missing: a QEMU of the test kit survives if its parent is killed"
        yield Finding(Level.WARNING, "test kit", found, "install util-linux")
    there = "there" if shutil.which("virsh") else "not there"
    yield Finding(Level.OK, "libvirt", f"not needed (virsh is {there})")


def _version(package: str) -> str:
    """Return the version of *package*; one that another brings along, or that was copied, may have none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of no known version"


def _examine_kvm(*, runs_guests: bool | None) -> Finding:
    """Tell whether KVM is there, may be used, and runs a guest (None: not tried): one says little of the other."""
    if not _KVM.exists():
        advice = "load kvm_intel or kvm_amd; inside a VM its host must allow nested virtualisation. TCG does, slower"
        return Finding(Level.NOTE, "KVM", f"no {_KVM}", advice)
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return _examine_closed_kvm(_KVM.stat())
    try:
        os.close(os.open(_KVM, os.O_RDWR))
    except OSError as error:
        found = f"this user may open {_KVM}, but opening it fails: {error.strerror}"
        advice = "in a container, give it the device (docker run --device /dev/kvm); else see the kernel's log"
        return Finding(Level.WARNING, "KVM", found, f"{advice}. TCG does, slower")
    return _examine_open_kvm(runs_guests=runs_guests)


def _examine_open_kvm(*, runs_guests: bool | None) -> Finding:
    if runs_guests is None:
        return Finding(Level.NOTE, "KVM", f"{_KVM} may be opened; no QEMU was there to try it with")
    if runs_guests:
        return Finding(Level.OK, "KVM", f"{_KVM} may be opened, and runs the micro-guest (16-bit code)")
    if platform.machine() not in _X86_HOSTS:
        found = f"{_KVM} may be opened; the micro-guest is x86 and cannot try the KVM of {platform.machine()}"
        return Finding(Level.NOTE, "KVM", found)
    found = f"{_KVM} may be opened, and no QEMU here runs a guest under it"
    return Finding(Level.WARNING, "KVM", found, "use -accel tcg; the kernel's log may say why KVM does not work")


def _examine_closed_kvm(status: os.stat_result) -> Finding:
    owner, mode = owner_of(status.st_uid, status.st_gid), stat.S_IMODE(status.st_mode)
    group = owner.partition(":")[2]
    if status.st_gid == 0 or mode & _GROUP_MAY != _GROUP_MAY:  # as after a start without udev, and in containers
        advice = f"as root: chgrp kvm {_KVM}; chmod 660 {_KVM}, and join the group kvm; in a container, its host"
    elif status.st_gid in os.getgroups():
        advice = "you are in that group, so something else forbids it: an ACL (getfacl), or a container's rules"
    else:
        advice = f"join the group {group} (usermod -aG {group} USER, then log in anew)"
    found = f"{_KVM} may not be opened by this user (mode {mode:04o}, of {owner})"
    return Finding(Level.WARNING, "KVM", found, f"{advice}. TCG does, slower")


async def try_qemus() -> tuple[list[TriedQemu], list[Finding]]:
    """Run the micro-guest with every QEMU that is found, under KVM and TCG, and tell how that went."""
    with _overheard("qmpvcpu.testing.qemu") as warnings:
        try:
            found = await asyncio.to_thread(find_qemus)
        except QemuNotFoundError as error:
            return [], [Finding(Level.FAULT, "QEMU", str(error), "name a qemu-system-x86_64, or unset QMPVCPU_QEMU")]
    findings = [Finding(Level.WARNING, "QEMU", words, "mend it, or take it out of PATH") for words in warnings]
    if not found:
        advice = "the demo and the test kit need one: apt install qemu-system-x86; a VM of your own does not"
        findings.append(Finding(Level.WARNING, "QEMU", "no qemu-system-x86_64 in PATH or the cache", advice))
    try:
        qemus = await asyncio.gather(*(_try_qemu(version, path) for version, path in found.items()))
    except TemporaryDirectoryError as error:
        return [], [*findings, Finding(Level.FAULT, "QEMU", f"none can be tried: {error}")]
    return list(qemus), [*findings, *_findings_of(qemus)]


@contextlib.contextmanager
def _overheard(logger: str) -> Iterator[list[str]]:
    """Give the warnings that *logger* gets inside."""
    heard: list[str] = []

    class _Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = _Ear(logging.WARNING)
    logging.getLogger(logger).addHandler(ear)
    try:
        yield heard
    finally:
        logging.getLogger(logger).removeHandler(ear)


async def _try_qemu(version: str, path: Path) -> TriedQemu:
    accelerators: list[Accelerator] = ["tcg"]
    if os.access(_KVM, os.R_OK | os.W_OK) and await probe_accelerator(path) == "kvm":
        accelerators.insert(0, "kvm")
    return TriedQemu(version, path, tuple([await _try(path, accelerator) for accelerator in accelerators]))


async def _try(qemu: Path, accelerator: Accelerator) -> Trial:
    """Plug a vCPU and unplug it again, in a VM of its own."""
    times = [time.monotonic()]
    faults: frozenset[KnownFault] = frozenset()
    why = ""
    try:
        async with asyncio.timeout(_TRIAL_S), MicroGuest(qemu, accel=accelerator) as guest:
            times.append(time.monotonic())
            async with qmpvcpu.attach(guest.qmp, reply_timeout=_STEP_S, resync_interval=None) as vm:
                faults = vm.capabilities.known_faults
                await vm.plug(1, proof=Proof.ACKNOWLEDGED, require_proof=True, timeout=_STEP_S)
                times.append(time.monotonic())
                await vm.unplug(1, timeout=_STEP_S)
                times.append(time.monotonic())
    except (QmpVcpuError, TimeoutError, OSError) as error:
        why = str(error)[:_MOST_SAID] or f"not over after {_TRIAL_S:g} s"
    seconds = tuple(round(after - before, 6) for before, after in itertools.pairwise(times))
    return Trial(accelerator, seconds, why, faults)


def _findings_of(qemus: Iterable[TriedQemu]) -> Iterator[Finding]:
    affected: dict[KnownFault, list[str]] = {}
    for qemu in qemus:
        for trial in qemu.trials:
            subject = f"QEMU {qemu.version}, {trial.accelerator.upper()}"
            if trial.why:
                advice = f"do not use {qemu.path} with -accel {trial.accelerator}, or mend it"
                yield Finding(Level.FAULT, subject, f"does not run the micro-guest: {trial.why}", advice)
            else:
                up, plugged, left = map(milliseconds, trial.seconds)
                found = f"runs the micro-guest: up in {up}, plug {plugged}, unplug {left}"
                yield Finding(Level.OK, subject, f"{found} ({qemu.path})")
            for fault in trial.faults:
                affected.setdefault(fault, []).append(qemu.version)
    known = [fault for fault in KnownFault if fault in affected]
    for fault in known:
        subject = f"QEMU {', '.join(affected[fault])}"
        advice = "what would hit one of these is denied, unless --allow-fatal; KVM has none of them"
        yield Finding(Level.NOTE, subject, f"known fault: {fault.value}", advice if fault is known[-1] else "")
