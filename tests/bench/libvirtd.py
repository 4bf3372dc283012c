"""libvirt's side: a libvirtd of our own, the micro-guest as its domain, and libvirt-python in Debian's own Python."""

import contextlib
import json
import os
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

from tests.libvirt.daemon import Libvirt
from tests.libvirt.microguests import Shape, microguest_domain, start

__all__ = ["VCPU_STATS", "Peer", "peer", "run_domain"]

# libvirt-python is built for the distribution's Python; it takes its own time, in its own process.
SERVER = """
import json, sys, time
import libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
connection = libvirt.open(sys.argv[1])
domain = connection.lookupByName(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    call, arguments = json.loads(line)
    target = connection if hasattr(connection, call) else domain
    start = time.perf_counter()
    try:
        getattr(target, call)(*(tuple(each) if isinstance(each, list) else each for each in arguments))
    except libvirt.libvirtError as error:
        if "timed out" not in str(error) and "timeout" not in str(error):
            raise
    print(json.dumps((time.perf_counter() - start) * 1000), flush=True)
"""

LIVE = 1  # VIR_DOMAIN_AFFECT_LIVE
VCPU_STATS = 8  # VIR_DOMAIN_STATS_VCPU


class Peer:
    """libvirt-python on one connection, and a VM that libvirt runs, of the same QEMU and with the same guest."""

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

    def pin(self, vcpu: int, cpus: Collection[int]) -> float:
        """Milliseconds that libvirt takes to have a vCPU run on these host CPUs, now or once it is plugged."""
        return self.call("pinVcpuFlags", vcpu, [number in cpus for number in range(os.cpu_count() or 1)], LIVE)

    def set_state(self, vcpu: int, *, enabled: bool) -> float:
        """Milliseconds of a plug or an unplug; under TCG libvirt gives an unplug up after five seconds."""
        return self.call("setVcpu", str(vcpu), int(enabled), LIVE)


def run_domain(
    stack: contextlib.ExitStack, libvirt: Libvirt, qemu: Path, vcpus: int, *, accel: str, number: int
) -> str:
    """Have *libvirt* run one more VM until *stack* is left; return its name."""
    shape = Shape(vcpus=vcpus)
    domain, document = microguest_domain(libvirt, f"bench{number}", qemu, accel=accel, shape=shape)
    start(domain, document)
    stack.callback(domain.virsh, "destroy")
    return domain.name


@contextlib.contextmanager
def peer(
    libvirt: Libvirt | None, qemu: Path, vcpus: int, *, accel: str = "kvm", number: int = 0
) -> Iterator[Peer | None]:
    """Have *libvirt* run a VM of *vcpus* slots on *qemu*, with one of them plugged; None without libvirt."""
    if libvirt is None:
        yield None
        return
    with contextlib.ExitStack() as stack:
        name = run_domain(stack, libvirt, qemu, vcpus, accel=accel, number=number)
        arguments = ["/usr/bin/python3", "-c", SERVER, f"qemu+unix:///system?socket={libvirt.socket}", name]
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(process.wait)
        stack.callback(process.kill)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise RuntimeError("libvirt-python did not come up")
        yield Peer(process)
