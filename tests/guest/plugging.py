"""Plugs whose order a Linux sees: a slow guest finds several at once, and takes the lowest slot first."""

from qmpvcpu import Proof, VcpuController
from qmpvcpu.testing.linuxguest import LinuxGuest


async def plug_in_order(vm: VcpuController, guest: LinuxGuest, *ids: int) -> None:
    """Plug vCPUs one after another, each once Linux runs on the one before; return when it runs on all of them."""
    for each in ids:
        await vm.plug(each, proof=Proof.ACKNOWLEDGED, require_proof=True, timeout=30)
        await guest.online()  # what it reported last may be of before an unplug
        await guest.wait_online(lambda cpus: len(cpus) == len(vm.layout.enabled), timeout=30)
