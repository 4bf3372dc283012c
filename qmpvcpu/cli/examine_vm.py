"""What ``doctor`` finds of one VM, which it only reads, or why the VM cannot be spoken with."""

import os
import shlex
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from qmpvcpu.cli.findings import Finding, Level, owner_of
from qmpvcpu.cli.pin import drift_lines
from qmpvcpu.cli.show import headline
from qmpvcpu.cli.wording import in_options
from qmpvcpu.errors import DenialReason, MonitorConnectError, MonitorError, Unreachable, counted
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.model.verdicts import OstAnswer, OstStatus
from qmpvcpu.model.vm import KnownFault
from qmpvcpu.planning.guest import NESTED, hidden_hypervisor
from qmpvcpu.qmp.address import Address
from qmpvcpu.vm.controller import VcpuController
from qmpvcpu.vm.placing import allowing

_DETECTABLE: Final = "-cpu MODEL,-hypervisor -smbios type=1,serial=VMware-1 makes it detect one"
_HOTPLUG_MACHINES: Final = {
    "x86_64": "q35 or pc",
    "i386": "q35 or pc",
    "ppc64": "pseries",
    "s390x": "s390-ccw-virtio",
    "loongarch64": "virt, with QEMU 10 or later",
}
_SHARING = "-qmp unix:PATH2,server=on,wait=off, or what else docs/sharing.md says"
_FINDABLE: Final = "docs/placement.md says what it takes: QEMU on this host, a UNIX socket, its user or root"
_LONGEST_WAY: Final = 1000  # links may lead in circles


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
        told = f"{each} is of {owner_of(found.st_uid, found.st_gid)}, mode {stat.S_IMODE(found.st_mode):04o}"
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
