"""What ``doctor`` finds on this machine: versions, QEMUs that it has run a guest with, KVM, what is missing."""

import asyncio
import contextlib
import enum
import grp
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
from qmpvcpu.cli.show import milliseconds
from qmpvcpu.errors import QmpVcpuError
from qmpvcpu.model.verdicts import Proof
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.testing import MicroGuest, QemuNotFoundError, find_qemus, probe_accelerator
from qmpvcpu.testing.linuxguest import LinuxGuestMissingError, find_images
from qmpvcpu.testing.qemu import Accelerator

_KVM: Final = Path("/dev/kvm")
_PACKAGES: Final = ("qemu.qmp", "aiofiles", "lxml", "typer", "rich")
# A guest needs a tenth of a second, and a machine under load ten times that.
_TRIAL_S: Final = 15.0
_STEP_S: Final = 5.0
_MOST_SAID: Final = 300


class Level(enum.Enum):
    """How much a finding matters.

    OK: as it should be. NOTE: to be known. WARNING: something does not work that may be needed. FAULT: what was asked
    about does not work.
    """

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: How much it matters.
        subject: What was looked at.
        found: What is so.
        advice: What to do next, or "".
    """

    level: Level
    subject: str
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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
        Level.OK, "qmpvcpu", f"{_version('qmpvcpu')} on Python {platform.python_version()}, with {versions}"
    )
    yield _examine_kvm(runs_guests=any(trial.accelerator == "kvm" for qemu in qemus for trial in qemu.trials))
    try:
        find_images()
    except LinuxGuestMissingError:
        advice = "demo --guest linux and qmpvcpu.testing.LinuxGuest need it: bash fixtures/linux/build.sh in a clone"
        yield Finding(Level.NOTE, "Linux guest", "not made on this machine", advice)
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


def _examine_kvm(*, runs_guests: bool) -> Finding:
    """Tell whether KVM is there, may be used, and runs a guest: the one says little about the other."""
    if not _KVM.exists():
        advice = "load kvm_intel or kvm_amd; inside a VM its host must allow nested virtualisation. TCG does, slower"
        return Finding(Level.NOTE, "KVM", f"no {_KVM}", advice)
    if not os.access(_KVM, os.R_OK | os.W_OK):
        owner = _KVM.stat()
        try:
            group = grp.getgrgid(owner.st_gid).gr_name
        except KeyError:
            group = str(owner.st_gid)
        advice = f"join the group {group} (usermod -aG {group} USER, then log in anew). TCG does, slower"
        found = f"{_KVM} may not be opened by this user (mode {stat.S_IMODE(owner.st_mode):04o}, group {group})"
        return Finding(Level.WARNING, "KVM", found, advice)
    if runs_guests:
        return Finding(Level.OK, "KVM", f"{_KVM} may be opened, and runs the micro-guest (16-bit code)")
    found = f"{_KVM} may be opened, and no QEMU here runs a guest under it"
    return Finding(Level.WARNING, "KVM", found, "use -accel tcg; the kernel's log may say why KVM does not work")


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
    qemus = await asyncio.gather(*(_try_qemu(version, path) for version, path in found.items()))
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
