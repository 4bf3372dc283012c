"""What ``doctor`` finds: on this machine, with QEMUs that it runs a guest in, and of one VM, which it only reads."""

import asyncio
import contextlib
import enum
import grp
import importlib.metadata
import itertools
import logging
import os
import platform
import pwd
import shlex
import shutil
import stat
import time
from collections import Counter
from collections.abc import Awaitable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import qmpvcpu
from qmpvcpu.cli.guest import KNOWN_BY, READ_FILES, not_listed
from qmpvcpu.cli.pin import drift_lines
from qmpvcpu.cli.show import headline
from qmpvcpu.cli.wording import in_options
from qmpvcpu.errors import (
    AgentForbiddenError,
    DenialReason,
    GuestAgentError,
    GuestRefusedError,
    MonitorConnectError,
    MonitorError,
    QmpVcpuError,
    Unreachable,
    counted,
    milliseconds,
)
from qmpvcpu.model.guest import GuestVcpu
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.options import Proof
from qmpvcpu.model.vcpumap import VcpuMap, named
from qmpvcpu.model.verdicts import OstAnswer, OstStatus
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.planning.guest import NESTED, hidden_hypervisor
from qmpvcpu.qmp.address import Address
from qmpvcpu.testing import MicroGuest, QemuNotFoundError, find_qemus, probe_accelerator
from qmpvcpu.testing.directory import TemporaryDirectoryError
from qmpvcpu.testing.linuxguest import HOW_TO_MAKE, LinuxGuestMissingError, find_images
from qmpvcpu.testing.qemu import Accelerator
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.placing import allowing

_T = TypeVar("_T")

_KVM: Final = Path("/dev/kvm")
_DETECTABLE: Final = "-cpu MODEL,-hypervisor -smbios type=1,serial=VMware-1 makes it detect one"
_X86_HOSTS: Final = ("x86_64", "i686", "i386")
_GROUP_MAY: Final = stat.S_IRGRP | stat.S_IWGRP
_HOTPLUG_MACHINES: Final = {
    "x86_64": "q35 or pc",
    "i386": "q35 or pc",
    "ppc64": "pseries",
    "s390x": "s390-ccw-virtio",
    "loongarch64": "virt, with QEMU 10 or later",
}
_PACKAGES: Final = ("qemu.qmp", "aiofiles", "lxml", "click", "rich")
_SHARING = "-qmp unix:PATH2,server=on,wait=off, or what else docs/sharing.md says"
# What each command of the agent is needed for.
_AGENT_COMMANDS: Final = (
    (("guest-get-vcpus",), "--proof online, guest and --offline-first cannot work"),
    (("guest-set-vcpus",), "it can bring no vCPU online, and take none offline first"),
    (
        ("guest-file-open", "guest-file-read", "guest-file-close"),
        "which CPU of the guest a vCPU is may stay unknown, and then nothing is done to it",
    ),
    (("guest-get-osinfo",), "it is not known whether it is Windows, which releases no vCPU"),
)
_FINDABLE: Final = "docs/placement.md says what it takes: QEMU on this host, a UNIX socket, its user or root"
_ALLOW: Final = "allow it: block-rpcs or allow-rpcs in the guest's qemu-ga.conf, or qemu-ga's options -b and -a"
# A guest needs a tenth of a second, and a machine under load ten times that.
_TRIAL_S: Final = 15.0
_STEP_S: Final = 5.0
_MOST_SAID: Final = 300
_LONGEST_WAY: Final = 1000  # links may lead in circles


class Level(enum.Enum):
    """How much a finding matters.

    OK: as it should be. NOTE: to be known. WARNING: something does not work that may be needed. FAULT: what was asked
    about does not work.
    """

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
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
    owner, mode = _name(status.st_uid, status.st_gid), stat.S_IMODE(status.st_mode)
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


def unreachable(address: str, error: MonitorError) -> Finding:
    """Tell why the VM at *address* cannot be spoken with."""
    if not isinstance(error, MonitorConnectError):
        return Finding(Level.FAULT, "VM", str(error), "look whether QEMU still runs")
    match error.reason:
        case Unreachable.FORBIDDEN:
            advice = _who_may(address) or error.hint
        case Unreachable.HELD:
            advice = f"{error.hint}: {_SHARING}"
        case Unreachable.LEFT_BEHIND:
            advice = "start QEMU again: it replaces the socket"
        case _:
            advice = error.hint
    found = f"cannot speak QMP on {error.address}: {error.why}"
    return Finding(Level.FAULT, "VM", found, advice or "name a QMP socket: -qmp unix:PATH,server=on,wait=off")


def _who_may(address: str) -> str:
    """Say who may use the socket at *address*, or the first directory on its way that is closed to us."""
    where = Address.parse(address)
    told = ""
    for each in () if where.path is None or where.is_abstract else _way_to(Path(where.path).absolute()):
        try:
            found = each.stat()
        except OSError:
            break
        told = f"{each} is of {_name(found.st_uid, found.st_gid)}, mode {stat.S_IMODE(found.st_mode):04o}"
        if stat.S_ISDIR(found.st_mode) and not os.access(each, os.X_OK, effective_ids=True):
            break
    return f"{told}: run this as that user, or let the group in" if told else ""


def _way_to(path: Path) -> Iterator[Path]:
    """Give every directory that the kernel passes on its way to *path*, and what is there; links are followed."""
    ahead, here = list(reversed(path.parts)), Path()
    for _ in range(_LONGEST_WAY):
        if not ahead:
            return
        here /= ahead.pop()
        try:
            ahead += reversed(here.readlink().parts)
        except OSError:  # no link, or one that may not be read: the caller finds out
            yield here
        else:
            here = here.parent


def _name(uid: int, gid: int) -> str:
    """Return user and group in words where they have names."""
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    try:
        return f"{user}:{grp.getgrgid(gid).gr_name}"
    except KeyError:
        return f"{user}:{gid}"


_DENIED: Final = "what would hit it is denied"
_DENIALS: Final = {
    KnownFault.TCG_CREATED_BEYOND_MAX: f"{_DENIED}, as far as the count is known: others may have plugged more",
    KnownFault.TCG_REPLUG_CORRUPTS_HEAP: f"{_DENIED} at a plug if the unplug is known; plan warns of a reset",
    KnownFault.TCG_LINUX_LOCKS_UP: "nothing is denied for it, plan warns",
    KnownFault.TCG_PSERIES_RESET_ABORTS: "nothing is denied for it, plan warns",
}


def examine_vm(vm: VcpuController, answers: Collection[OstAnswer]) -> Iterator[Finding]:
    """Tell what *vm* can do, and what is known of its guest, of whom *answers* are the last ones."""
    layout = vm.layout
    yield Finding(Level.OK, "VM", headline(layout))
    for fault in sorted(vm.capabilities.known_faults, key=lambda each: each.name):
        yield Finding(Level.NOTE, "VM's QEMU", f"known: {fault.value}", _DENIALS.get(fault, _DENIED))
    if layout.vm.libvirt_owned:
        found = "libvirt has started it: its boot vCPUs stay, unless --allow-boot-vcpus"
        yield Finding(Level.NOTE, "VM", found, "docs/libvirt.md says how both live with one VM")
    yield _examine_plug(vm, layout)
    if layout.vm.can_plug:
        yield _examine_unplug(vm, layout)
        yield _examine_guest(layout, answers)
        warnings = vm.plan(range(layout.max)).warnings
        if hidden_hypervisor(layout.vm) in warnings:
            hidden = layout.vm.hides_hypervisor and layout.vm.accelerator != "tcg"
            advice = "start the VM with neither hypervisor=off nor kvm=off" if hidden else _DETECTABLE
            yield Finding(Level.NOTE, "guest", hidden_hypervisor(layout.vm), advice)
        if NESTED in warnings:
            yield Finding(Level.NOTE, "guest", NESTED, "unless it runs VMs, start it with -cpu MODEL,-vmx or -svm")
    if layout.pending:
        found = f"the removal of {layout.pending} is asked for and unanswered; QEMU never forgets it"
        yield Finding(Level.WARNING, "guest", found, "qmpvcpu unplug of it waits for the answer")


def _examine_plug(vm: VcpuController, layout: Layout) -> Finding:
    if not layout.vm.can_plug:
        found = f"machine {layout.vm.machine} neither takes CPUs nor gives any back while it runs"
        arch = layout.vm.arch
        known = _HOTPLUG_MACHINES.get(arch)
        advice = f"start the VM with {known}" if known else f"QEMU has no machine for {arch} that does"
        return Finding(Level.FAULT, "plug", found, advice)
    if not layout.free:
        found = f"{layout.max} of {counted(layout.max, 'vCPU')} plugged"
        return Finding(Level.NOTE, "plug", found, f"start the VM with -smp N,maxcpus=M, M more than {layout.max}")
    first = next(slot for slot in layout.slots if not slot.present)
    return _as_planned(vm, "plug", layout.enabled | first.ids, f"vCPU {first.ids} can be tried")


def _examine_unplug(vm: VcpuController, layout: Layout) -> Finding:
    if not layout.vm.can_unplug:
        found = f"machine {layout.vm.machine} does not give CPUs back"
        return Finding(Level.WARNING, "unplug", found, "only plugs are possible on it")
    last = next((slot for slot in reversed(layout.slots) if layout[slot.first].hotpluggable), None)
    if last is None:
        return Finding(Level.NOTE, "unplug", "nothing is plugged that could leave", "plug something first")
    return _as_planned(vm, "unplug", layout.enabled - last.ids, f"vCPU {last.ids} can be tried")


def _as_planned(vm: VcpuController, subject: str, wish: VcpuMap, can: str) -> Finding:
    """Tell whether *wish* would be denied, and why."""
    denied = vm.plan(wish).denied
    if not denied:
        return Finding(Level.OK, subject, can)
    if denied[0].reason is DenialReason.GUEST_CANNOT_UNPLUG:
        return Finding(Level.WARNING, subject, denied[0].detail, "only plugs are possible in it")
    return Finding(Level.FAULT, subject, in_options(denied[0].detail), "wait until that is over, or mend it")


def _examine_guest(layout: Layout, answers: Collection[OstAnswer]) -> Finding:
    """Tell whether the guest has ever answered, as QEMU remembers of each slot."""
    if not layout.vm.acknowledges:
        found = f"guests of machine {layout.vm.machine} cannot say that they take a CPU"
        return Finding(Level.NOTE, "guest", found + (", only that they keep one" if layout.vm.can_unplug else ""))
    if not answers:
        found = "it has answered nothing yet: whether it reacts is not known"
        return Finding(Level.NOTE, "guest", found, "qmpvcpu plug --proof acknowledged tells")
    last = f"it answers: the last word on {counted(len(answers), 'slot')}"
    failed = [each for each in answers if each.status is OstStatus.FAILURE]
    if failed:
        found = f"{last} is a no on {len(failed)}, such as: {failed[0].reason}"
        return Finding(Level.NOTE, "guest", found, "look into the guest's log for what stands in the way")
    return Finding(Level.OK, "guest", f"{last} is no refusal")


async def examine_host(vm: VcpuController, address: str, record: str | None) -> list[Finding]:
    """Tell whether QEMU's threads can be found and moved on this host, and which are not where *record* has them."""
    facts, wanted = vm.host.facts(), bool(vm.host.placement)
    if facts.unreachable or facts.forbidden:
        level = Level.WARNING if wanted else Level.NOTE
        told = f"they cannot be found: {facts.unreachable}" if facts.unreachable else facts.forbidden
        return [Finding(level, "threads", told, _FINDABLE)]
    cpus = f"host CPUs {facts.usable}" + (f" ({facts.cgroup})" if facts.usable != facts.online else "")
    findings = [Finding(Level.OK, "threads", f"they can be found, and moved on {cpus}")]
    if facts.why_not_realtime:
        found = f"highest real-time priority {facts.highest_priority}: {facts.why_not_realtime}"
        findings.append(Finding(Level.NOTE, "threads", found, "only --sched fifo and rr need more"))
    if facts.why_not_core_scheduling:
        findings.append(Finding(Level.NOTE, "threads", f"no core scheduling: {facts.why_not_core_scheduling}"))
    drifted = [thread for thread in await vm.host.threads() if thread.drifted] if wanted else []
    restore = shlex.join(["qmpvcpu", "pin", "--restore", "--record", record, "--qmp", address]) if record else ""
    for thread, line in zip(drifted, drift_lines(drifted), strict=True):
        why_not = allowing(facts, thread.tid).why_not(thread.wanted)
        advice = f"it cannot be put there: {why_not}" if why_not else restore
        findings.append(Finding(Level.WARNING, "threads", line, advice))
    if wanted and not drifted:
        findings.append(Finding(Level.OK, "threads", "each is in its place"))
    return findings


async def examine_agent(vm: VcpuController, timeout: float) -> list[Finding]:
    """Tell what the guest's agent may do, and what it tells; it has *timeout* seconds for each answer."""
    try:
        commands = await _or_none(vm.guest.commands(timeout=timeout))
        system = await _or_none(vm.guest.os(timeout=timeout))
        cpus = await _or_none(vm.guest.vcpus(timeout=timeout))
    except GuestAgentError as error:
        found = f"on {error.address}: {error.why}"
        return [Finding(Level.FAULT, "agent", found, error.hint or "see docs/guest-agent.md")]
    findings = [Finding(Level.OK, "agent", f"it answers{'' if system is None else f': {system}'}")]
    findings += _forbidden(commands)
    return findings if cpus is None else [*findings, *_examine_cpus(vm.layout, cpus)]


async def _or_none(question: Awaitable[_T]) -> _T | None:
    """Return the answer; None where the agent may not give it."""
    try:
        return await question
    except (AgentForbiddenError, GuestRefusedError):
        return None


def _forbidden(commands: Collection[str] | None) -> Iterator[Finding]:
    if commands is None:
        found = "it does not tell which commands it carries out (guest-info)"
        yield Finding(Level.NOTE, "agent", found, _ALLOW)
        return
    missing = [(sorted({*group} - {*commands}), what) for group, what in _AGENT_COMMANDS]
    for names, what in missing:
        if names:
            yield Finding(Level.WARNING, "agent", f"it does not carry out {', '.join(names)}: {what}", _ALLOW)
    if not any(names for names, _ in missing):
        yield Finding(Level.OK, "agent", "it carries out every command that is needed")


def _examine_cpus(layout: Layout, cpus: Collection[GuestVcpu]) -> Iterator[Finding]:
    by_vcpu = {cpu.vcpu: cpu for cpu in cpus if cpu.vcpu is not None}
    counts = Counter(cpu.known_by for cpu in cpus)
    known = ", ".join(f"{counts[how]} by {word}" for how, word in KNOWN_BY.items() if word and counts[how])
    unknown = [str(cpu.number) for cpu in cpus if cpu.vcpu is None]
    if known:
        yield Finding(Level.OK, "guest's CPUs", f"which vCPU each is: {known}")
    if unknown:
        found = (
            f"it is not known which vCPU the guest's CPU {', '.join(unknown)} is: it is neither proven nor changed"
        )
        yield Finding(Level.WARNING, "guest's CPUs", found, READ_FILES)
    elif missing := not_listed(cpus, layout):
        found = f"{named(missing)}: plugged, but not in the guest's list"
        yield Finding(Level.WARNING, "guest's CPUs", found, "docs/what-happens.md says what keeps a guest from it")
    if offline := VcpuMap(vcpu for vcpu, cpu in by_vcpu.items() if not cpu.online):
        yield Finding(Level.NOTE, "guest's CPUs", f"{named(offline)}: offline", f"qmpvcpu guest online {offline}")
