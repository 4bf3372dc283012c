"""libvirt's side: a libvirtd of our own, the micro-guest as its domain, and libvirt-python in Debian's own Python."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qmpvcpu.testing import rom_image
from tests.libvirt.daemon import Libvirt

__all__ = ["Peer", "peer"]

# libvirt-python is built for the distribution's Python; it takes its own time, in its own process.
SERVER = """
import json, sys, time
import libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
connection = libvirt.open(sys.argv[1])
domain = None
print("ready", flush=True)
for line in sys.stdin:
    call, arguments = json.loads(line)
    if call == "createXML":
        domain = connection.createXML(*arguments)
        print("0", flush=True)
        continue
    target = connection if hasattr(connection, call) else domain
    start = time.perf_counter()
    try:
        getattr(target, call)(*arguments)
    except libvirt.libvirtError as error:
        if "timed out" not in str(error) and "timeout" not in str(error):
            raise
    print(json.dumps((time.perf_counter() - start) * 1000), flush=True)
"""

DOMAIN = """<domain type='{type}'>
  <name>{name}</name>
  <memory unit='MiB'>16</memory>
  <vcpu placement='static' current='1'>{vcpus}</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><loader type='rom'>{rom}</loader></os>
  <features><acpi/></features>{cpu}
  <devices><emulator>{emulator}</emulator><memballoon model='none'/></devices>
</domain>"""
# Without the last feature libvirt 9 finds that some hosts' KVM gives less than was asked for.
HOST_CPU = """
  <cpu mode='host-passthrough' check='none'><feature policy='disable' name='arch-capabilities'/></cpu>"""

LIVE = 1  # VIR_DOMAIN_AFFECT_LIVE
VCPU_STATS = 8  # VIR_DOMAIN_STATS_VCPU


class Peer:
    """libvirt-python on one connection, and the VM that it started last."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def call(self, name: str, *arguments: object) -> float:
        """Milliseconds of a method of the connection, or else of the domain."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))

    def set_count(self, count: int) -> float:
        """Milliseconds that libvirt takes to make *count* vCPUs plugged."""
        return self.call("setVcpusFlags", count, LIVE)

    def set_state(self, vcpu: int, *, enabled: bool) -> float:
        """Milliseconds that libvirt takes to plug or unplug *vcpu*; under TCG it gives an unplug up after five seconds."""
        return self.call("setVcpu", str(vcpu), int(enabled), LIVE)


@contextlib.contextmanager
def peer(
    libvirt: Libvirt | None, qemu: Path, vcpus: int, *, accel: str = "kvm", copies: int = 1
) -> "Iterator[Peer | None]":
    """Have *libvirt* run VMs of *vcpus* slots on *qemu*, with one of them plugged; None without libvirt."""
    if libvirt is None:
        yield None
        return
    rom = libvirt.socket.parent / "microguest.rom"
    rom.write_bytes(rom_image(()))
    arguments = ["/usr/bin/python3", "-c", SERVER, f"qemu+unix:///system?socket={libvirt.socket}"]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    names = [f"bench{number}" for number in range(copies)]
    try:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise RuntimeError("libvirt-python did not come up")
        one = Peer(process)
        kind, cpu = ("kvm", HOST_CPU) if accel == "kvm" else ("qemu", "")
        for name in names:
            one.call("createXML", DOMAIN.format(type=kind, cpu=cpu, name=name, vcpus=vcpus, rom=rom, emulator=qemu))
        yield one
    finally:
        process.kill()
        process.wait()
        for name in names:
            with contextlib.suppress(Exception):  # it was never started
                libvirt.virsh("destroy", name)
