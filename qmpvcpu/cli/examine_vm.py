"""What ``doctor`` finds out about one VM: what it can do, whether its guest reacts. Reads only."""

import grp
import pwd
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from qmpvcpu.cli.examine import Finding, Level
from qmpvcpu.cli.show import headline, in_options, is_held
from qmpvcpu.errors import MonitorConnectError, MonitorError
from qmpvcpu.model.layout import Layout
from qmpvcpu.model.ost import OstAnswer, OstStatus
from qmpvcpu.model.vcpumap import VcpuMap
from qmpvcpu.qmp.address import Address
from qmpvcpu.vm.controller import VcpuController

_SHARING = "-qmp unix:PATH2,server=on,wait=off, or what else docs/sharing.md says"


def unreachable(address: str, error: MonitorError) -> Finding:
    """Tell why the VM at *address* cannot be spoken with."""
    if not isinstance(error, MonitorConnectError):
        return Finding(Level.FAULT, "VM", str(error), "look whether QEMU still runs")
    advice = error.hint
    if "permission denied" in error.why:
        advice = _who_may(address) or advice
    elif is_held(error):
        advice = f"{error.hint}: {_SHARING}"
    elif "left behind" in error.why:
        advice = "start QEMU again: it replaces the socket"
    found = f"cannot speak QMP on {error.address}: {error.why}"
    return Finding(Level.FAULT, "VM", found, advice or "name a QMP socket: -qmp unix:PATH,server=on,wait=off")


def _who_may(address: str) -> str:
    """Say who may use the socket at *address*, and the first directory on its way that is closed."""
    path = Address.parse(address).path
    if path is None:
        return ""
    for each in (*reversed(Path(path).absolute().parents), Path(path)):
        try:
            found = each.stat()
        except OSError:
            break
        told = f"{each} is of {_name(found.st_uid, found.st_gid)}, mode {stat.S_IMODE(found.st_mode):04o}"
    return f"{told}: run this as that user, or let the group in" if told else ""


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


def examine_vm(vm: VcpuController, answers: Collection[OstAnswer]) -> Iterator[Finding]:
    """Tell what *vm* can do, and what is known of its guest, of whom *answers* are the last ones."""
    layout = vm.layout
    yield Finding(Level.OK, "VM", headline(layout))
    for fault in sorted(vm.capabilities.known_faults, key=lambda each: each.name):
        yield Finding(Level.NOTE, "VM's QEMU", f"known: {fault.value}", "what would hit it is denied")
    if layout.vm.libvirt_owned:
        found = "libvirt has started it: its boot vCPUs stay, unless --allow-boot-vcpus"
        yield Finding(Level.NOTE, "VM", found, "docs/libvirt.md says how both live with one VM")
    yield _examine_plug(vm, layout)
    yield _examine_unplug(vm, layout)
    yield _examine_guest(answers)
    if layout.pending:
        found = f"the removal of {layout.pending} is asked for and unanswered; QEMU never forgets it"
        yield Finding(Level.WARNING, "guest", found, "wait for the answer: qmpvcpu unplug of it again sends nothing")


def _examine_plug(vm: VcpuController, layout: Layout) -> Finding:
    if not layout.vm.can_plug:
        found = f"machine {layout.vm.machine} takes no CPUs while it runs"
        return Finding(Level.FAULT, "plug", found, "start the VM with q35, pc, pseries or s390-ccw-virtio")
    if not layout.free:
        found = f"all {layout.max} vCPUs are plugged"
        return Finding(Level.NOTE, "plug", found, f"start the VM with -smp N,maxcpus=M, M more than {layout.max}")
    first = next(slot for slot in layout.slots if not slot.present)
    return _as_planned(vm, "plug", VcpuMap(layout.enabled | first.ids), f"vCPU {first.ids} can be tried")


def _examine_unplug(vm: VcpuController, layout: Layout) -> Finding:
    if not layout.vm.can_unplug:
        found = f"machine {layout.vm.machine} does not give CPUs back"
        return Finding(Level.FAULT, "unplug", found, "only plugs are possible on it")
    last = next((slot for slot in reversed(layout.slots) if layout[slot.first].hotpluggable), None)
    if last is None:
        return Finding(Level.NOTE, "unplug", "nothing is plugged that could leave", "plug something first")
    return _as_planned(vm, "unplug", VcpuMap(layout.enabled - last.ids), f"vCPU {last.ids} can be tried")


def _as_planned(vm: VcpuController, subject: str, wish: VcpuMap, can: str) -> Finding:
    """Tell whether *wish* would be denied, and why."""
    denied = vm.plan(wish).denied
    if not denied:
        return Finding(Level.OK, subject, can)
    return Finding(Level.FAULT, subject, in_options(denied[0].detail), "wait until that is over, or mend it")


def _examine_guest(answers: Collection[OstAnswer]) -> Finding:
    """Tell whether the guest has ever answered, as QEMU remembers of each slot."""
    if not answers:
        found = "it has answered nothing yet: whether it reacts is not known"
        return Finding(Level.NOTE, "guest", found, "qmpvcpu plug --proof acknowledged tells")
    last = f"it answers: the last word on {_slots(len(answers))}"
    failed = [each for each in answers if each.status is OstStatus.FAILURE]
    if failed:
        found = f"{last} is a no on {len(failed)}, such as: {failed[0].reason}"
        return Finding(Level.NOTE, "guest", found, "look into the guest's log for what stands in the way")
    return Finding(Level.OK, "guest", f"{last} is no refusal")


def _slots(number: int) -> str:
    return "one slot" if number == 1 else f"{number} slots"
