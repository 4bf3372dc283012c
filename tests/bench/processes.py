"""The command line, whole processes: from exec to exit."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import qmpvcpu
from qmpvcpu.testing import MicroGuest
from tests.bench.libvirtd import peer
from tests.bench.row import BARE, OURS, VIRSH, Goal, Row, Samples
from tests.bench.setting import Setting

__all__ = ["measure"]

VCPUS = 8
PYTHON = Path(sys.executable)
# Byte code is kept, as it is for any installed package.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
OURS_TOO = "import asyncio, qemu.qmp; from qmpvcpu import attach"
IMPORT = f"python -c '{OURS_TOO}', beside the same without qmpvcpu; user and system time"
LIST = (
    "qmpvcpu list --json, beside virsh vcpuinfo and an interpreter that only imports asyncio and qemu.qmp: no "
    "Python program is faster than that; a program that keeps one connection pays `look at what is known` instead"
)
PLUG = "qmpvcpu plug 3 --json beside virsh setvcpu --live --enable"


async def measure(setting: Setting) -> AsyncIterator[Row]:
    """Compare commands on VMs of 8 slots."""
    qemu = setting.qemus[setting.newest]
    name = setting.named(setting.newest, VCPUS)
    samples = Samples()
    async with MicroGuest(qemu, accel=setting.accel, max_vcpus=VCPUS) as guest:  # type: ignore[arg-type]  # a literal
        with peer(setting.libvirt, qemu, VCPUS, accel=setting.accel) as theirs:
            script = [str(PYTHON.parent / "qmpvcpu")]
            virsh: list[str | Path] = []
            if setting.libvirt is not None:
                virsh = ["virsh", "--quiet", "--connect", f"qemu+unix:///system?socket={setting.libvirt.socket}"]
            for number in range(2 * setting.rounds + 1):
                took = {
                    ("import", BARE): _run([PYTHON, "-c", "import asyncio, qemu.qmp"]),
                    ("import", OURS): _run([PYTHON, "-c", OURS_TOO]),
                    ("list", OURS): _run([*script, "list", "--json", "--qmp", guest.qmp]),
                    ("plug", OURS): _run([*script, "plug", "3", "--json", "--qmp", guest.qmp]),
                }
                async with qmpvcpu.attach(guest.qmp) as vm:
                    await vm.unplug(3, allow_fatal=True)
                if theirs is not None:
                    took["list", VIRSH] = _run([*virsh, "vcpuinfo", "bench0"])
                    if setting.kvm:  # under TCG libvirt never gets it out again
                        took["plug", VIRSH] = _run([*virsh, "setvcpu", "bench0", "3", "--enable", "--live"])
                        theirs.set_state(3, enabled=False)
                if number:  # the first one reads everything from disk
                    for (work, who), (wall, cpu) in took.items():
                        samples.note(f"{work} wall", who, wall)
                        samples.note(f"{work} cpu", who, cpu)
    bare = samples["import cpu"][BARE]
    yield Row("import attach, CPU time", "whole process", IMPORT, samples["import cpu"])
    listed = {BARE: bare, **samples["list cpu"]}
    yield Row("command list, CPU time", name, LIST, listed, goals=(Goal(OURS, 20, BARE, above=True),))
    yield Row("command list, wall time", name, LIST, {BARE: samples["import wall"][BARE], **samples["list wall"]})
    plugged = {BARE: bare, **samples["plug cpu"]}
    yield Row("command plug, CPU time", name, PLUG, plugged, goals=(Goal(OURS, 45, BARE, above=True),))
    yield Row("command plug, wall time", name, PLUG, {BARE: samples["import wall"][BARE], **samples["plug wall"]})


def _run(command: Sequence[str | Path]) -> tuple[float, float]:
    """Milliseconds of wall and of CPU time of a whole process; virsh leaves libvirtd's own CPU time out."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall * 1000, cpu * 1000
