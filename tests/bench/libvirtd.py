"""libvirt's side: a libvirtd of our own, the micro-guest as its domain, and libvirt-python in Debian's own Python."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.libvirt.daemon import Libvirt
from tests.libvirt.microguests import Shape, microguest_domain, start

__all__ = ["Peer", "peer"]

# libvirt-python is built for the distribution's Python; it takes its own time, in its own process.
SERVER = """
import json, sys, time
import libvirt
connection = libvirt.open(sys.argv[1])
domain = connection.lookupByName(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    domain.setVcpusFlags(int(line), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    print(json.dumps((time.perf_counter() - start) * 1000), flush=True)
"""


class Peer:
    """A VM that libvirt runs, of the same QEMU and with the same guest."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def set_vcpus(self, count: int) -> float:
        """Milliseconds that libvirt takes to make *count* vCPUs plugged."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return float(json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def peer(libvirt: Libvirt, qemu: Path, vcpus: int) -> Iterator[Peer]:
    """Have *libvirt* run a VM of *vcpus* slots on *qemu*, with one of them plugged."""
    domain, document = microguest_domain(libvirt, f"bench{vcpus}", qemu, shape=Shape(vcpus=vcpus))
    start(domain, document)
    arguments = ["/usr/bin/python3", "-c", SERVER, f"qemu+unix:///system?socket={libvirt.socket}", domain.name]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise RuntimeError("libvirt-python did not come up")
        yield Peer(process)
    finally:
        process.kill()
        process.wait()
        domain.virsh("destroy")
